"""Stage 02, section 8: a sequence in pieces on several processes equals the sequence on one. Oracles: the layer on the whole sequence in fp64, and
numbers written by hand.

One set of four processes runs every case and leaves its results in files, because starting processes costs more than all the cases: once as a
group of four, once as two groups of two (ranks 0 and 2, 1 and 3), so that a rank in its group differs from the rank in the world.
"""
import datetime
import importlib
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.checkpoint import checkpoint

mamba = importlib.import_module("02_mamba")
WORLD = 4
EXACT = 1e-10          # one algorithm against another in fp64, of the largest entry: 5 digits above its rounding


def ids(*runs):
    """(id, length) pairs of one row, written out."""
    return [i for i, length in runs for _ in range(length)]


# two rows each, 24 tokens: pieces of 6 for four ranks, of 12 for two
DOCUMENTS = {
    "one document": None,
    "borders inside pieces": [ids((0, 4), (1, 5), (2, 7), (3, 8)), ids((7, 9), (3, 10), (7, 5))],
    "borders at the cuts": [ids((0, 6), (1, 6), (2, 6), (3, 6)), ids((4, 12), (5, 12))],
    "a document over three pieces": [ids((0, 3), (1, 18), (2, 3)), ids((1, 5), (2, 19))],
    "a piece that is one document": [ids((0, 6), (1, 6), (0, 12)), ids((2, 3), (0, 9), (5, 6), (0, 6))],
    "padding at the end": [ids((0, 10), (1, 5), (-1, 9)), ids((3, 21), (-1, 3))],
    "padding anywhere": [ids((-1, 2), (0, 3), (-1, 9), (0, 4), (1, 2), (-1, 4)), ids((-1, 7), (5, 2), (-1, 8), (5, 3), (6, 4))],
    "a row of padding": [ids((0, 24)), ids((-1, 24))],
}
SCANNED = ("one document", "a document over three pieces", "padding anywhere")      # by the interpreted twin, which is slow
CASES = {name: dict(doc=doc) for name, doc in DOCUMENTS.items()} | {
    "a chunk longer than a piece": dict(doc=DOCUMENTS["borders inside pieces"], chunk=128),
    "pieces shorter than the taps": dict(t=8),
    "short pieces of several documents": dict(t=8, doc=[[0, 0, 0, 1, 1, 1, 1, 2], [-1, 0, 0, -1, 0, 1, -1, 1]]),
    "pieces of one token": dict(t=4),
    "a convolution of one tap": dict(taps=1, doc=DOCUMENTS["borders inside pieces"]),
    "int32 ids": dict(doc=DOCUMENTS["padding anywhere"], doc_dtype=torch.int32),
    "a loss on the last token only": dict(last=True),
    "two layers, computed again in the backward pass": dict(layers=2),
}
LOW = {"fp32": dict(dtype=torch.float32), "bf16": dict(dtype=torch.bfloat16), "autocast": dict(dtype=torch.float32, autocast=True)}


def problem(t=24, doc=None, chunk=5, taps=4, doc_dtype=torch.int64, last=False, layers=1, dtype=torch.float64, device="cpu", **_):
    """Layers with every parameter random and decays of very different speed, inputs, ids, and the weight of each output in the loss."""
    rng = torch.Generator().manual_seed(t)
    stack = torch.nn.ModuleList(mamba.Mamba2(8, 4, 3, 2, 5, conv_kernel=taps, chunk=chunk) for _ in range(layers)).double()
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64) * (0.5 if parameter.dim() > 1 else 0.3))
            if name.endswith("A_log"): parameter += torch.tensor([0.02, 0.3, 1.0, 8.0]).log()
            if "norm" in name: parameter += 1
    x, weight = (torch.randn(2, t, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    if last: weight[:, :-1] = 0
    stack, x = stack.to(dtype), x.to(dtype)
    return stack.to(device), x.to(device), None if doc is None else torch.tensor(doc, dtype=doc_dtype, device=device), weight.to(device)


def answer(case, context=None, **kw):
    """Output and gradients: of the whole sequence, or of this rank's piece."""
    stack, x_btd, doc_bt, weight = problem(**(case | kw))
    if context is not None:
        for layer in stack: layer.context = context
        t = x_btd.shape[1] // context.size
        x_btd, doc_bt, weight = (z if z is None else z[:, context.rank * t:(context.rank + 1) * t] for z in (x_btd, doc_bt, weight))
    x_btd = y_btd = x_btd.clone().requires_grad_()
    with torch.autocast(x_btd.device.type, torch.bfloat16, enabled=case.get("autocast", False)):
        for layer in stack:
            y_btd = layer(y_btd, doc_bt) if context is None or len(stack) == 1 else checkpoint(layer, y_btd, doc_bt, use_reentrant=False)
    (y_btd.double() * weight).sum().backward()
    return {"y": y_btd.detach().cpu(), "x": x_btd.grad.cpu(), **{name: parameter.grad.cpu() for name, parameter in stack.named_parameters()}}


def by_hand(context):
    """What the tests with numbers written by hand compare."""
    rank, out = context.rank, {}
    piece = slice(2 * rank, 2 * rank + 2)
    doc_bt = torch.tensor([[5, 5, 5, 6, 6, -1, -1, -1], [0, 0, 1, 1, 0, 0, 0, 2], [-1, -1, 3, -1, -1, 3, 4, 4]])
    out["segments"] = mamba.piece_segments(doc_bt[:, piece], context)
    x_btc, doc_bt = torch.arange(1.0, 9).view(1, 8, 1).repeat(2, 1, 2), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 0, 0, -1, 0, 0, 0]])
    out["halo"] = mamba.conv_halo(x_btc[:1, piece], None, 4, context)
    out["halo of documents"] = mamba.conv_halo(x_btc[:, piece], doc_bt[:, piece], 4, context)
    log_bh = torch.tensor([[0.5, 0.25, 0.5, 0.1], [0, 0.5, 0.25, 1], [1, 0, 0.25, 1]])[:, rank, None].log().clamp(min=-1e6)
    out["state"] = mamba.pass_state(torch.full((3, 1, 1, 1), 2.0**rank), log_bh, None, context)
    x, dt, A, B, C, D = mamba.random_inputs(2, 24, 4, 3, 2, 5, seed=0)
    doc_bt, piece = torch.tensor(DOCUMENTS["padding anywhere"]), slice(6 * rank, 6 * rank + 6)
    with torch.autocast("cpu", torch.bfloat16):
        out["y"] = mamba.ssd_across_ranks(*(z[:, piece] if z.dim() > 2 else z for z in (x, dt, A, B, C)), D, 5, doc_bt[:, piece], context)
    sent, gather = [], mamba.gather_ranks
    mamba.gather_ranks = lambda x, context: (sent.append(x.nbytes), gather(x, context))[1]
    for t in (8, 64):
        answer(dict(t=t), context, dtype=torch.float32)
        out[f"bytes of {t}"] = list(sent)
        sent.clear()
    mamba.gather_ranks = gather
    return out


def scan(doc, context=None):
    """y and the gradients of all inputs of a scan six times as long as `doc` says, so that a piece has several chunks: with the interpreted twin on
    this rank's piece, or by the recurrence in fp64 on the whole. A loss that weighs every output."""
    doc_bt = None if doc is None else torch.tensor(doc).repeat_interleave(6, 1)
    whole = *mamba.random_inputs(2, 144, 2, 3, 1, 5, seed=1), torch.randn(2, 144, 2, 3, generator=torch.Generator().manual_seed(2))
    length = 144 if context is None else 144 // context.size
    begin, dtype = (0, torch.float64) if context is None else (length * context.rank, torch.float32)
    piece = slice(begin, begin + length)
    *inputs, weight = (z.to(dtype)[:, piece] if z.dim() > 2 else z.to(dtype) for z in whole)
    inputs = [z.clone().requires_grad_() for z in inputs]
    doc_bt = doc_bt if doc is None else doc_bt[:, piece]
    y = mamba.ssd_recurrence(*inputs, None, doc_bt)[0] if context is None else mamba.ssd_across_ranks(*inputs, 5, doc_bt, context, "triton")
    (y * weight).sum().backward()
    return [y.detach(), *(z.grad for z in inputs)]


def work(rank: int, world: int, folder: Path, backend: str) -> None:
    """One process: every case in every group it belongs to."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl": torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    try:
        groups = [dist.group.WORLD] if world == 2 else [dist.group.WORLD, *(dist.new_group([0, 2]), dist.new_group([1, 3]))[rank % 2:][:1]]
        results, kw = {}, dict(device=device) | (dict(dtype=torch.float32) if backend == "nccl" else {})
        for context in map(mamba.ContextGroup, groups):
            for name, case in CASES.items():
                results[name, context.size] = answer(case, context, **kw)
            if backend == "gloo":
                if "TRITON_INTERPRET" in os.environ:
                    for name in SCANNED: results["scan", name, context.size] = scan(DOCUMENTS[name], context)
                for name, case in LOW.items(): results[name, context.size] = answer(case | dict(doc=DOCUMENTS["borders inside pieces"]), context)
        if backend == "gloo": results["by hand"] = by_hand(mamba.ContextGroup(dist.group.WORLD))
        torch.save(results, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def spawn(world: int, folder: Path, backend: str) -> list[dict]:
    """Results of each process; an exception in one of them is raised here."""
    mp.spawn(work, (world, folder, backend), nprocs=world)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return spawn(WORLD, tmp_path_factory.mktemp("gloo"), "gloo")


def joined(results, name, ranks):
    """The pieces of y and of the input's gradient side by side, the parameters' gradients summed over the ranks, in fp64."""
    parts = [results[r][name, ranks] for r in (range(len(results)) if ranks == len(results) else (1, 3))]
    return {key: torch.cat([p[key].double() for p in parts], 1) if key in "xy" else sum(p[key].double() for p in parts) for key in parts[0]}


def gap(ours, theirs):
    """Largest difference, relative to the largest entry of the oracle."""
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-300)).item()


def assert_no_worse(ours, plain, oracle, factor=2.0):
    """May round differently than one process in the same dtype, not worse."""
    err = lambda y: (y.double() - oracle.double()).abs().max().item()
    assert err(ours) <= factor * err(plain), f"{err(ours):.1e} against {err(plain):.1e}"


def hand(results, key):
    return [r["by hand"][key] for r in results]


# --- the layer and its scan

@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_pieces_on_several_ranks_give_what_one_process_gives(results, name, ranks):
    """Output and every gradient; a decay left out, a state or halo that crosses a border, and a gradient not sent back show in one of the cases."""
    ours, whole = joined(results, name, ranks), answer(CASES[name])
    for key in whole: assert gap(ours[key], whole[key]) < EXACT, key


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", LOW)
def test_low_precision_is_no_worse_in_pieces_than_in_one(results, name, ranks):
    """A smoke test of dtypes: a state kept in the dtype of the activations would be worse, and a gather that cannot carry bf16 would fail."""
    case = LOW[name] | dict(doc=DOCUMENTS["borders inside pieces"])
    stack, x_btd, doc_bt, weight = problem(**case)
    plain, ours = answer(case), joined(results, name, ranks)
    x_btd = x_btd.double().requires_grad_()
    y_btd = stack.double()[0](x_btd, doc_bt)        # on the same rounded inputs and parameters
    (y_btd * weight).sum().backward()
    oracle = {"y": y_btd, "x": x_btd.grad, **{key: parameter.grad for key, parameter in stack.named_parameters()}}
    assert results[0][name, 4]["y"].dtype == plain["y"].dtype
    for key in oracle: assert_no_worse(ours[key], plain[key], oracle[key])


def test_a_layer_in_a_context_group_refuses_a_cache():
    """A cache holds the sequence's end; on all ranks but the last it would hold another place's."""
    layer = mamba.Mamba2(8, 4, 3, 2, 5)
    layer.context = mamba.ContextGroup(None)
    with pytest.raises(ValueError, match="takes no cache"): layer(torch.randn(1, 3, 8), cache=layer.empty_cache(1))


def test_the_scan_over_ranks_is_the_recurrence_also_under_autocast(results):
    """Against the definition in fp64. fp32 rounds by 6e-8 and a few sums; a product that autocast takes in bf16 is wrong by 4e-3."""
    x, dt, A, B, C, D = (z.double() for z in mamba.random_inputs(2, 24, 4, 3, 2, 5, seed=0))
    oracle, _ = mamba.ssd_recurrence(x, dt, A, B, C, D, doc_bt=torch.tensor(DOCUMENTS["padding anywhere"]))
    assert gap(torch.cat(hand(results, "y"), 1), oracle) < 1e-6


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="needs Triton's interpreter, which is not started where a GPU is")
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", SCANNED)
def test_the_twin_lets_the_state_enter_between_its_steps(results, name, ranks):
    """Against the definition in fp64, output and every gradient. Without the way back of the state dx and dB of earlier ranks are wrong, and without
    what entered the decays' gradients are; fp32 rounds by 6e-8 and a few hundred sums."""
    parts = [results[r]["scan", name, ranks] for r in (range(4) if ranks == 4 else (1, 3))]
    for i, oracle in enumerate(scan(DOCUMENTS[name])):
        ours = torch.cat([part[i] for part in parts], 1) if oracle.dim() > 2 else sum(part[i].double() for part in parts)
        assert gap(ours, oracle) < 2e-5, ("y", "dx", "ddt", "dA", "dB", "dC", "dD")[i]


# --- the pieces, by hand: four ranks with two tokens each

def test_a_state_fades_by_the_decays_of_the_ranks_between(results):
    """S = 1 2 4 8. Row 0 decays by 1/2 1/4 1/2: 4 + 2/2 + 1/8 enter rank 3. In the others a piece forgets everything (exp(-1e6) in fp32): what left
    before it is gone, what left after it is not, to the last digit, although sums from rank 0 on would round by 1/16."""
    into = torch.stack(hand(results, "state"))[:, :, 0, 0, 0]
    torch.testing.assert_close(into, torch.tensor([[0.0, 0, 0], [1, 1, 1], [2.25, 2.5, 2], [5.125, 4.625, 4.5]]), rtol=1e-6, atol=0)


def test_pieces_agree_on_the_segment_a_cut_lies_in(results):
    """5 5|5 6|6 -|- -: padding belongs to the 6 before it.   0 0|1 1|0 0|0 2: ids that come back.   - -|3 -|- 3|4 4: padding first and between."""
    for begins, ends in hand(results, "segments"):
        assert begins.T.tolist() == [[0, 0, 1, 1], [0, 1, 2, 2], [0, 0, 0, 1]]
        assert ends.T.tolist() == [[0, 1, 1, 1], [0, 1, 2, 3], [0, 0, 0, 1]]


def test_the_halo_is_the_last_inputs_of_my_document(results):
    """Token i has input i. A halo of three reaches over two pieces of two; the second row is 0 1|0 0|- 0|0 0, where only one 0 is near rank 2."""
    assert [z[0, :, 0].tolist() for z in hand(results, "halo")] == [[0, 0, 0], [0, 1, 2], [2, 3, 4], [4, 5, 6]]
    rows = [z[:, :, 1].tolist() for z in hand(results, "halo of documents")]
    assert rows == [[[0, 0, 0], [0, 0, 0]], [[0, 1, 2], [0, 0, 0]], [[0, 0, 4], [0, 3, 4]], [[4, 5, 6], [3, 4, 6]]]


def test_what_a_rank_sends_does_not_grow_with_the_sequence(results):
    """In fp32, two rows: 3 inputs of 32 channels and their ids, then 4 heads of 3 x 5 numbers and one decay."""
    for key in ("bytes of 8", "bytes of 64"):
        assert all(sorted(sent) == sorted([2 * 3 * 32 * 4, 2 * 3 * 8, 2 * 4 * (3 * 5 + 1) * 4]) for sent in hand(results, key)), key


# --- on GPUs

@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_are_no_worse_than_one(tmp_path):
    """NCCL's collectives and the Triton twins in fp32, against fp64. Below 1e-5 of the largest entry one GPU may be right by luck."""
    results = spawn(2, tmp_path, "nccl")
    for name, case in CASES.items():
        ours, plain, oracle = joined(results, name, 2), answer(case, dtype=torch.float32, device="cuda"), answer(case)
        for key in oracle:
            assert gap(ours[key], oracle[key]) <= max(2 * gap(plain[key], oracle[key]), 1e-5), f"{name}, {key}"
