"""03 · Expert parallelism: several processes that share the experts, against one process that holds all experts and all tokens."""
import functools
import importlib
import math
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.checkpoint import checkpoint

moe, nvfp4 = importlib.import_module("03_latentmoe"), importlib.import_module("01_nvfp4")
D, E, K, FW, S, L = 32, 16, 3, 48, 40, 16      # model width, experts, chosen, expert width, shared width, latent
WORLD = 4                                      # processes; a case uses them as one group of 4, or as two groups of 2 that work at the same time
NEAREST = nvfp4.NVFP4Recipe(stochastic_gradients=False)


@dataclass(frozen=True)
class Case:
    ranks: int                                 # size of a group
    routing: str = "even"                      # "even": as it falls; "one": all tokens choose the last rank's experts; "swap": none its own rank's;
    dtype: torch.dtype = torch.float64         # "empty": the first rank has no tokens
    latent: int | None = L
    recipe: nvfp4.NVFP4Recipe | None = None
    autocast: bool = False
    recompute: bool = False
    impl: str = "auto"
    seed: int = 7


CASES = {f"{routing}, {ranks} ranks, {str(dtype)[6:]}": Case(ranks, routing, dtype) for routing in ("even", "one", "swap", "empty")
         for ranks, dtype in ((2, torch.float64), (4, torch.float64), (4, torch.float32))}
CASES |= {"no latent": Case(2, latent=None), "recomputed": Case(4, recompute=True),
          "nvfp4, nearest": Case(4, recipe=NEAREST), "nvfp4, nearest, an idle rank": Case(2, "one", recipe=NEAREST)}
TWIN = {"twin, an idle rank": Case(2, "one", dtype=torch.float32, impl="triton")}
LOOSE = {"nvfp4": Case(2, dtype=torch.float32, recipe=nvfp4.NVFP4Recipe()), "nvfp4, other draws": Case(2, dtype=torch.float32, seed=8,
         recipe=nvfp4.NVFP4Recipe()), "autocast": Case(4, dtype=torch.float32, latent=None, autocast=True)}
every_case = pytest.mark.parametrize("name", CASES | TWIN)


# --- what both sides build

def whole_layer(case: Case):
    """All parameters and the selection bias random (at the usual init a wrong layer passes), then bent to the routing of the case."""
    draw = torch.Generator().manual_seed(0)
    layer = moe.LatentMoE(D, E, K, FW, S, case.latent, scale=2.5)
    with torch.no_grad():
        for p in layer.parameters(): p.copy_(torch.randn(p.shape, generator=draw) * 1.5 / math.sqrt(p.shape[-1]))
        bias_e = layer.gate.e_score_correction_bias
        bias_e.copy_(0.1 * torch.randn(E, generator=draw))
        home_e = torch.arange(E) // (E // case.ranks)
        if case.routing == "one": bias_e += 10 * (home_e == case.ranks - 1)
        if case.routing == "swap":      # input column i asks for the experts of rank i
            for i in range(case.ranks): layer.gate.weight[:, i] = torch.where(home_e == i, 2.0, -2.0)
    layer.experts.recipe = case.recipe
    layer.experts.draw_seed = torch.tensor([[nvfp4.draw_seed_for(case.seed, 0, 0, i, j) for j in (0, 1)] for i in (0, 1)])      # as stage 04 sets it
    return layer.to(case.dtype)


def batch(case: Case, rank: int):
    """(x_btd, dy_btd) of a process of the world; every rank another number of tokens."""
    draw, place = torch.Generator().manual_seed(100 + rank), rank % case.ranks
    few = case.impl == "triton"         # the interpreter takes its time
    t = 0 if case.routing == "empty" and place == 0 else 1 + rank if few else 100 if case.routing == "one" else 5 + 4 * rank
    x_btd, dy_btd = (torch.randn(2, t, D, generator=draw).to(case.dtype) for _ in range(2))
    if case.routing == "swap":
        x_btd[..., :case.ranks] = 0
        x_btd[..., (place + 1) % case.ranks] = 2
    return x_btd, dy_btd


def step(layer, case: Case, x_btd, dy_btd) -> dict:
    """Output, loads and all gradients of sum(y · dy)."""
    x_btd = x_btd.detach().requires_grad_()
    run = functools.partial(layer, impl=case.impl)
    with torch.autocast(x_btd.device.type, torch.bfloat16) if case.autocast else nullcontext():
        y_btd, balance = checkpoint(run, x_btd, use_reentrant=False) if case.recompute else run(x_btd)
    y_btd.backward(dy_btd.to(y_btd.dtype))
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return dict(y=y_btd.detach().flatten(0, 1), dx=x_btd.grad.flatten(0, 1), load=balance.load_e, **grads)


def to_cpu(results: dict) -> dict:
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in results.items()}


# --- the processes

def record(calls: list, function):
    """The function, noting what it was given."""
    def noting(*args, **kwargs):
        calls.append((args, kwargs))
        return function(*args, **kwargs)
    return noting


def run_case(case: Case, rank: int, group, device: str) -> dict:
    layer = moe.expert_parallel(whole_layer(case).to(device), group)
    exchanges, twins, own, kernel = [], [], dist.all_to_all_single, None
    dist.all_to_all_single = record(exchanges, own)
    if case.impl == "triton":
        kernel = importlib.import_module("kernels.experts")
        grouped, kernel.experts_grouped = kernel.experts_grouped, record(twins, kernel.experts_grouped)
    try: results = step(layer, case, *(v.to(device) for v in batch(case, rank)))
    finally:
        dist.all_to_all_single = own
        if kernel: kernel.experts_grouped = grouped
    rows = [args[1] for args, _ in exchanges if args[1].is_floating_point()]
    return to_cpu(results) | dict(sent=[(tuple(v.shape), v.dtype) for v in rows], twin_calls=len(twins))


def edges(rank: int, group, alone, foreign) -> dict:
    """What needs a process group, but no exchange."""
    found = {}
    layer = moe.LatentMoE(D, E, K, FW, S, L)
    stack, gate = weakref.ref(layer.experts.up_proj), layer.gate.weight
    layer.experts.down_proj.requires_grad_(False)
    parallel = moe.expert_parallel(layer, group)
    up, down = layer.experts.up_proj, layer.experts.down_proj
    found["in place"] = parallel is layer and layer.gate.weight is gate
    found["whole stack freed"] = stack() is None and up.untyped_storage().nbytes() == up.numel() * 4 == E // WORLD * FW * L * 4
    found["flags kept"] = up.requires_grad and not down.requires_grad and isinstance(up, torch.nn.Parameter)
    found["names"] = [name for name, _ in layer.named_parameters()]
    with torch.device("meta"): ghost = moe.LatentMoE(D, E, K, FW, S, None)
    moe.expert_parallel(ghost, group)
    found["meta"] = {name: (tuple(p.shape), p.is_meta) for name, p in ghost.experts.named_parameters()}
    for name, wrong in {"six experts": lambda: moe.expert_parallel(moe.LatentMoE(D, 6, K, FW, S, L), group),
                        "twice": lambda: moe.expert_parallel(layer, group),
                        "foreign": lambda: moe.expert_parallel(moe.LatentMoE(D, E, K, FW, S, L), foreign)}.items():
        try: wrong()
        except ValueError as error: found[name] = str(error)
    small = moe.LatentMoE(D, E, K, FW, S, L)
    before = small.experts.up_proj
    found["alone"] = moe.expert_parallel(small, alone) is small and small.experts.up_proj is before and small.experts.group is None
    return found


def worker(rank: int, world: int, folder: str, cases: dict, backend: str = "gloo") -> None:
    torch.set_num_threads(1)
    device = "cpu" if backend == "gloo" else f"cuda:{rank}"
    if backend == "nccl": torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        # every process has to take part in making every group
        teams = {size: [dist.new_group(list(range(i, i + size)), timeout=timedelta(seconds=60)) for i in range(0, world, size)] for size in (1, 2)}
        team = {size: groups[rank // size] for size, groups in teams.items()} | {world: dist.group.WORLD}
        results = {name: run_case(case, rank, team[case.ranks], device) for name, case in cases.items()}
        if backend == "gloo": results["edges"] = edges(rank, team[world], team[1], teams[1][rank - 1])
        torch.save(results, f"{folder}/{rank}.pt")
        dist.barrier()
    finally: dist.destroy_process_group()


def spawn(world: int, folder: Path, cases: dict, backend: str = "gloo") -> list[dict]:
    """What each process found; an exception in one of them is raised here."""
    # a server that has imported torch once and forks is several times as fast as a fresh start of every process
    method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
    if method == "forkserver": mp.set_forkserver_preload(["torch", "torch._dynamo"])      # torch.utils.checkpoint imports the second
    mp.start_processes(worker, (world, str(folder), cases, backend), nprocs=world, start_method=method)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """One start of the processes serves all tests: importing torch takes longer than all cases."""
    twins = TWIN if importlib.util.find_spec("triton") and not torch.cuda.is_available() else {}
    return spawn(WORLD, tmp_path_factory.mktemp("ranks"), CASES | LOOSE | twins)


# --- the process that holds everything

@functools.cache
def alone(case: Case, first: int, device: str = "cpu") -> dict:
    """The group whose first process is `first`, computed by one process: all tokens in one sequence, all experts in one place."""
    parts = [batch(case, rank) for rank in range(first, first + case.ranks)]
    x_btd, dy_btd = (torch.cat([v.flatten(0, 1) for v in side])[None].to(device) for side in zip(*parts))
    return to_cpu(step(whole_layer(case).to(device), case, x_btd, dy_btd))


def groups(found, name):
    """(the case, results of a group's processes in order, the same from one process) for every group."""
    case = (CASES | TWIN | LOOSE)[name]
    if name not in found[0]: pytest.skip("the twin needs Triton; on a GPU it runs in the test below")
    for first in range(0, len(found), case.ranks): yield case, [r[name] for r in found[first:first + case.ranks]], alone(case, first)


def error(a, b): return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item() if b.numel() else 0.0


def bound(case: Case) -> float:
    """One algorithm in another order of sums: rounding, relative to the largest value."""
    return 1e-12 if case.dtype == torch.float64 else 2e-6


# --- the claims

@every_case
def test_outputs_and_input_gradients_equal_one_process(found, name):
    """Rows that come back to the wrong token, or whose gradient goes to the wrong rank, break it."""
    for case, ranks, one in groups(found, name):
        for key in ("y", "dx"):
            together = torch.cat([r[key] for r in ranks])
            assert together.shape == one[key].shape and together.dtype == case.dtype and error(together, one[key]) <= bound(case), key


@every_case
def test_an_experts_gradient_is_the_mean_over_the_ranks(found, name):
    """Every rank holds its own experts' gradient complete, divided by the ranks as data parallelism divides the others'."""
    for case, ranks, one in groups(found, name):
        for key in ("experts.up_proj", "experts.down_proj"):
            for i, r in enumerate(ranks):
                share = one[key][i * E // case.ranks : (i + 1) * E // case.ranks]
                gap = (case.ranks * r[key] - share).abs().max()
                assert r[key].shape == share.shape and gap <= bound(case) * one[key].abs().max(), (key, i)


@every_case
def test_gradients_of_router_projections_and_shared_expert_sum_up(found, name):
    """These parameters are whole on every rank and see its tokens; the router learns through the weights, which stay at home."""
    for case, ranks, one in groups(found, name):
        whole = [key for key in one if key.endswith("weight")]
        assert len(whole) == (5 if case.latent else 3) and one["gate.weight"].abs().max() > 0
        for key in whole: assert error(sum(r[key] for r in ranks), one[key]) <= bound(case), key


@every_case
def test_loads_count_the_ranks_own_tokens(found, name):
    """Stage 05 sums them over ranks; loads already summed would count every token several times."""
    for _, ranks, one in groups(found, name):
        assert torch.equal(sum(r["load"] for r in ranks), one["load"])
        assert all(int(r["load"].sum()) == K * len(r["y"]) for r in ranks)


def test_the_uneven_cases_are_as_uneven_as_they_say(found):
    """Without this, a case whose routing drifts back to even would test nothing new."""
    for name in CASES:
        for case, ranks, _ in groups(found, name):
            shares = [r["load"].view(case.ranks, -1).sum(1).tolist() for r in ranks]
            if case.routing == "one": assert all(sum(share[:-1]) == 0 < share[-1] for share in shares)
            elif case.routing == "swap": assert all(share[i] == 0 < share[(i + 1) % case.ranks] == sum(share) for i, share in enumerate(shares))
            elif case.routing == "empty": assert sum(shares[0]) == 0 and all(sum(share) for share in shares[1:])
            else: assert min(sum(column) for column in zip(*shares)) > 0


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.routing == "one"])
def test_an_idle_rank_has_zero_gradients(found, name):
    """None in place of zeros: the optimizer would skip the rank's experts, and a collective over gradients would wait for ever."""
    for _, ranks, _ in groups(found, name):
        for r in ranks[:-1]: assert not r["experts.up_proj"].any() and not r["experts.down_proj"].any()


def test_nvfp4_gradients_stay_near_those_of_one_process(found):
    """The output rounds to nearest and is equal. A row that lies elsewhere takes other draws: stochastic rounding of Gaussian data is 13.7 % off, so
    two of them lie about sqrt(2) times as far apart, 19 %. A gradient that lost rows, or counted them twice, is further away."""
    for _, ranks, one in groups(found, "nvfp4"):
        assert error(torch.cat([r["y"] for r in ranks]), one["y"]) <= 2e-6
        for key in ("dx", "experts.up_proj", "experts.down_proj"):
            ours = torch.cat([r[key] for r in ranks]) * (1 if key == "dx" else len(ranks))
            assert torch.isfinite(ours).all() and 0 < (ours - one[key]).norm() / one[key].norm() < 0.3, key


def test_the_draws_come_from_the_layers_seed(found):
    """A seed lost on the way would round alike in every step, and rounding errors would add up instead of averaging out."""
    for r in found:
        assert torch.equal(r["nvfp4"]["y"], r["nvfp4, other draws"]["y"])
        assert not torch.equal(r["nvfp4"]["dx"], r["nvfp4, other draws"]["dx"])


def test_rows_travel_in_the_dtype_of_the_products(found):
    """Under autocast a full-width layer's input is fp32: sent as it is, the rows would cost twice the bytes that they are worth."""
    for _, ranks, one in groups(found, "autocast"):
        assert {dtype for r in ranks for _, dtype in r["sent"]} == {torch.bfloat16}
        for key in ("y", "dx"): assert error(torch.cat([r[key] for r in ranks]), one[key]) < 2 ** -7      # a step of bf16


@pytest.mark.parametrize("name, width", [("even, 4 ranks, float64", L), ("even, 2 ranks, float64", L), ("no latent", D)])
def test_the_counted_bytes_are_the_formulas(found, name, width):
    """Two exchanges forward and two backward, each of every token's k rows: in the latent where there is one."""
    for case, ranks, one in groups(found, name):
        shapes = [shape for r in ranks for shape, _ in r["sent"]]
        assert len(shapes) == 4 * case.ranks and {shape[1] for shape in shapes} == {width}
        counted = 8 * sum(rows * columns for rows, columns in shapes)
        assert counted == 2 * len(one["y"]) * moe.all_to_all_bytes(K, width, itemsize=8)


def test_ultras_bytes_by_hand():
    """22 rows of 2,048 values in bf16, there and back; a full-width layer moves four times as many. 8 ranks keep an eighth at home."""
    assert moe.all_to_all_bytes(22, 2048) == 22 * 4096 * 2 == 180_224
    assert moe.all_to_all_bytes(22, 8192) == 720_896
    assert moe.all_to_all_bytes(22, 2048, ranks=8) == 157_696 and moe.all_to_all_bytes(22, 2048, ranks=1) == 0
    assert moe.measure_costs()["LatentMoE, as in Ultra"][1].sent_bytes == 180_224


@pytest.mark.parametrize("name", TWIN)
def test_the_triton_twin_computes_the_arrived_rows(found, name):
    """impl has to reach the products: a layer that falls back to PyTorch gives the same numbers, slowly."""
    for _, ranks, _ in groups(found, name): assert all(r["twin_calls"] == 1 for r in ranks)


def test_a_rank_keeps_its_share_and_frees_the_rest(found):
    """A slice in place of a copy would keep all experts in memory; a lost flag would train what was frozen."""
    for r in found:
        assert r["edges"]["in place"] and r["edges"]["whole stack freed"] and r["edges"]["flags kept"]
        assert r["edges"]["names"] == [name for name, _ in moe.LatentMoE(D, E, K, FW, S, L).named_parameters()]


def test_meta_stacks_are_cut_by_shape(found):
    """A 550B model exists on the meta device first, where there is nothing to copy."""
    for r in found: assert r["edges"]["meta"] == {"up_proj": ((E // WORLD, FW, D), True), "down_proj": ((E // WORLD, D, FW), True)}


def test_what_cannot_be_shared_is_refused(found):
    for r in found:
        assert r["edges"]["six experts"] == "4 ranks cannot share 6 experts evenly: choose a number of ranks that divides 6"
        assert "already" in r["edges"]["twice"] and "no member" in r["edges"]["foreign"]


def test_one_rank_changes_nothing(found):
    """A group of one, or none: the layer of sections 1 to 7, with no process group needed."""
    layer = moe.LatentMoE(D, E, K, FW, S, L)
    stack = layer.experts.up_proj
    assert moe.expert_parallel(layer, None) is layer and layer.experts.up_proj is stack and layer.experts.group is None
    assert all(r["edges"]["alone"] for r in found)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_equal_one(tmp_path):
    """NCCL in place of gloo, and the Triton twin in place of PyTorch. fp32: sums in another order. bf16: gradients of whole parameters are rounded
    once on every rank. NVFP4: a last bit of the latent may move a code, and one code is a few percent of a value."""
    cases = {f"{routing}, {dtype}": Case(2, routing, torch.float32, autocast=dtype == "bf16") for routing in ("even", "one", "swap", "empty")
             for dtype in ("fp32", "bf16")}
    cases |= {"nvfp4": Case(2, "one", torch.float32, recipe=NEAREST)}
    torch.backends.cuda.matmul.allow_tf32 = False
    found = spawn(2, tmp_path, cases, "nccl")
    for name, case in cases.items():
        one, ranks = alone(case, 0, "cuda"), [r[name] for r in found]
        limit = 0.05 if case.recipe else 2 ** -6 if case.autocast else 1e-5
        for key in one:
            if key == "load" or key.endswith("weight"): ours = sum(r[key] for r in ranks)
            else: ours = torch.cat([r[key] for r in ranks])
            if key.startswith("experts."): ours = ours * case.ranks      # expert_parallel divides it, for the mean over ranks
            assert error(ours, one[key]) <= limit, (name, key)
