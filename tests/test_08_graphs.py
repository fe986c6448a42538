"""What a CUDA graph asks of a decode step, held to on a CPU: no number of the device is read, and nothing a step changes lives in Python.

On a CPU the branch for GPUs is taken, with a step of the states that writes without looking at slots, as 02's Triton twin does.
"""
import contextlib
import copy
import dataclasses
import importlib
import random
from types import SimpleNamespace

import pytest
import torch
from test_08_engine import MICRO, prompts, randomise
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

mamba, nemotron, infer, traces = (importlib.import_module(m) for m in ("02_mamba", "04_model", "08_infer", "data.traces"))
Engine, SamplingParams = infer.Engine, infer.SamplingParams
WAYS = [(0, "snapshot", "fp32"), (2, "snapshot", "fp32"), (2, "replay", "fp16_sr")]


@pytest.fixture(scope="module")
def model(): return randomise(nemotron.Nemotron(MICRO), 5).requires_grad_(False)


def tensor_step(x, dt, A_h, B, C, D_h, state, doc_b, slots_b, write, state_format, seed):
    """ssd_step for fp32 and fp16_sr, where slots and seed are only ever read by tensor operations."""
    x, dt, B, C = (z if x.dim() == 4 else z[:, None] for z in (x, dt, B, C))
    slots, ys, places = torch.arange(len(x))[:, None] if slots_b is None else slots_b.view(len(x), -1), [], torch.arange(len(state))
    S = state.float()[slots[:, 0].clamp(min=0)]

    def put(S, slot_r):
        hit_rs = slot_r[:, None] == places
        new = torch.einsum("rs,rhpn->shpn", hit_rs.float(), S)
        if state_format == "fp16_sr":
            u = ((torch.arange(new.numel()) * 2654435761 + seed * 40503) % 65536).view(new.shape) / 65536
            new = mamba.fp16_stochastic(new, u)
        state.copy_(torch.where(hit_rs.any(0)[:, None, None, None], new, state))

    for t in range(x.shape[1]):
        ys.append(mamba.move_state(S, x[:, t], dt[:, t], A_h, B[:, t], C[:, t], D_h, None))
        if write == "each": put(S, slots[:, 1 + t])
    if write == "last": put(S, slots[:, 0])
    y = torch.stack(ys, 1)
    return (y if slots_b is not None else y[:, 0]), state


def on_a_gpu(monkeypatch, model, slots, capacity, k, rollback, state_format, **options):
    """An engine whose steps take the GPU's branches. Prefill stays a CPU's."""
    monkeypatch.setattr(mamba, "ssd_step", tensor_step)
    engine = Engine(model, slots, capacity, draft=k, rollback=rollback, state_format=state_format, graphs=False, **options)
    engine.caches.static, engine.caches.plain = True, False
    return engine


class NoHostReads(TorchFunctionMode):
    """Tensor methods that hand a number to Python, or make a tensor of Python's numbers: PyTorch's dispatcher does not see all of them."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name not in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "tensor", "as_tensor"), name
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Counts operators; those whose result or shape is a number of the device are an error."""
    def __init__(self): super().__init__(); self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(name := str(op).removeprefix("aten.").split(".")[0])
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "lift_fresh", "bincount", "is_nonzero"), name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"): assert not any(z is not None and z.dtype == torch.bool for z in args[1])
        return op(*args, **(kwargs or {}))


def busy(engine, sampling):
    """Slots in every condition: decoding at unequal lengths, with a ring of kept inputs that is full, in a prompt, empty."""
    for i, p in enumerate(prompts(3, 2, 4, 12)): engine.submit(p, dataclasses.replace(sampling[i % len(sampling)], seed=i), place=i)
    for _ in range(4): engine.step()
    while engine.caches.replays and engine.caches.kept_b.max() <= infer.RING - 3: engine.step()
    engine.submit([7] * 35, sampling[0])
    engine.admit(); engine.prefill()
    return engine


MIXED = [SamplingParams(max_tokens=30, temperature=0.8, top_p=0.8, stop_ids=()), SamplingParams(max_tokens=30, temperature=0.0, stop_ids=())]


@pytest.mark.parametrize("k, rollback, state_format", WAYS)
@pytest.mark.parametrize("how", [infer.Variant(seen=64), infer.Variant(seen=64, greedy=True, cut=False, logprobs=False)], ids=["drawn", "greedy"])
def test_a_step_reads_no_number_of_the_device(monkeypatch, model, k, rollback, state_format, how):
    """One .item(), boolean index or list in a step, and a GPU waits at each, or refuses to record it."""
    engine = busy(on_a_gpu(monkeypatch, model, 5, 64, k, rollback, state_format, prefill_tokens=8), MIXED)
    engine.running.how = how
    with Operators(), NoHostReads(): infer.packed_step(engine.caches, engine.running)
    with pytest.raises(AssertionError), Operators(), NoHostReads(): torch.ones(2)[torch.ones(2) > 0]
    with pytest.raises(AssertionError), Operators(), NoHostReads(): torch.ones(2).tolist()


def memory(engine):
    """Every tensor that a step may change, by name."""
    found = {}
    for i, pool in enumerate((*engine.caches.layers, *engine.caches.head_layers)):
        if isinstance(pool, infer.KVPool): found |= {f"{i} k": pool.k_bhsp, f"{i} v": pool.v_bhsp}
        elif pool is not None:
            found[f"{i} window"] = pool.window_bwc
            found |= {f"{i} {what} {j}": z for what, group in (("state", mamba.parts(pool.state)), ("kept", pool.kept)) for j, z in enumerate(group)}
    return found | {name: z for part in (engine.caches, engine.running) for name, z in vars(part).items() if isinstance(z, torch.Tensor)}


@contextlib.contextmanager
def restored(engine):
    before = {name: z.clone() for name, z in memory(engine).items()}
    yield
    for name, z in memory(engine).items(): z.copy_(before[name])


class Replayed:
    """In 05's Recorded's place: two plain calls, then the operators of one call are recorded and repeated on the same memory, as a CUDA graph repeats
    kernels. What Python computed in the recorded call, it computes no more."""
    engine, replays = None, 0

    def __init__(self, f): self.f, self.calls, self.trace = f, 0, None

    def __call__(self):
        self.calls, out, how = self.calls + 1, self.engine.graphs.out, self.engine.running.how
        if self.calls <= 2: return self.f()
        if self.trace is None:
            with restored(self.engine): self.trace = make_fx(lambda: (self.f(), out[how])[1])()       # tracing computes
        Replayed.replays += 1
        with torch.inference_mode(): out[how] = self.trace()


@pytest.mark.parametrize("k, rollback, state_format", WAYS)
def test_replayed_steps_serve_a_load_as_fresh_ones_do(monkeypatch, model, k, rollback, state_format):
    """Requests of three sorts come, end and are cancelled while every step is a replay: a seed, a length, a counter or a request's settings in
    Python would stay what they were at the recording."""
    def serve(replayed):
        engine = on_a_gpu(monkeypatch, model, 3, 300, k, rollback, state_format, prefill_tokens=9, seed=4)
        if replayed: engine.graphs = infer.StepGraphs(engine.caches, engine.running)
        Replayed.engine = engine
        rng, out = random.Random(1), {}
        drawn = dict(temperature=0.9, top_p=0.8, logprobs=True) if rollback == "snapshot" else dict(temperature=0.0)      # a trace takes seconds
        for i, p in enumerate(prompts(9, 5, 2, 20)):
            sort = dict(temperature=0.0) if i < 4 else drawn
            engine.submit(p, SamplingParams(max_tokens=rng.randint(3, 15), seed=i, stop_ids=(), **sort), place=i)
        engine.submit([9] * 245, SamplingParams(max_tokens=20, stop_ids=(), **drawn))      # into the next bucket of cells
        while not engine.idle:
            out.update(engine.step())
            if len(out) == 5: engine.cancel(6)
        accepted = [z.tolist() for z in (engine.running.accepted_k, engine.running.offered_k)]
        return {i: (a.ids, a.logprobs, a.reason) for i, a in out.items()}, accepted, engine

    monkeypatch.setattr(infer.pretrain, "Recorded", Replayed)
    before = Replayed.replays
    ours, counts, engine = serve(True)
    theirs, want, _ = serve(False)
    assert ours == theirs and counts == want and len(ours) == 10
    recorded = [how for how, graph in engine.graphs.recorded.items() if graph.trace]
    assert {how.greedy for how in recorded} == {True, rollback == "replay"} and {how.seen for how in recorded} == {256, 300 + k}
    assert Replayed.replays > before + 20


@pytest.mark.parametrize("k, rollback, state_format", WAYS)
def test_a_step_without_a_decoding_slot_changes_nothing(monkeypatch, model, k, rollback, state_format):
    """Slots in their prompts, or between requests: every tensor stays what it was, but for the cells that hold no token, the dice, and what
    prefill writes before it is read."""
    engine = busy(on_a_gpu(monkeypatch, model, 5, 64, k, rollback, state_format, prefill_tokens=8), MIXED)
    engine.running.new_b.zero_()
    before = {name: z.clone() for name, z in memory(engine).items()}
    infer.packed_step(engine.caches, engine.running)
    for name, z in memory(engine).items():
        if name.endswith((" k", " v")): assert torch.equal(z[:, :, :-1], before[name][:, :, :-1]), name
        elif "kept " in name: assert torch.equal(z[:, :-1], before[name][:, :-1]), name
        elif name.endswith("window"):       # a ring: cells of the last tokens, and others that the next tokens overwrite before anyone reads them
            past_bw = (engine.caches.length_b[:, None] - torch.arange(1, z.shape[1] - k)) % z.shape[1]
            at = torch.arange(len(z))[:, None], past_bw
            assert past_bw.shape[1] == 3 and torch.equal(z[at], before[name][at]), name
        elif name not in ("seed_l", "ids_bw", "hidden_bwd"): assert torch.equal(z, before[name]), name


def test_a_greedy_step_draws_no_distribution(model):
    """Neither softmax nor sort nor cumulative sums over the vocabulary, and no log-probabilities that nobody asked for; as many operators for one
    slot as for eight."""
    def operators(slots, **how):
        engine = Engine(model, slots, 40)
        for i in range(slots): engine.submit([5 + i, 8], SamplingParams(max_tokens=20, temperature=0.0, stop_ids=(), **how))
        for _ in range(3): engine.step()
        with Operators() as seen: engine.step()
        return seen.names
    plain = operators(1)
    assert not {"softmax", "_softmax", "log_softmax", "_log_softmax", "sort", "cumsum", "searchsorted"} & set(plain)
    assert len(operators(8)) == pytest.approx(len(plain), abs=25)      # the experts' products have two forms
    assert {"log_softmax", "_log_softmax"} & set(operators(1, logprobs=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU records every step")
def test_a_cpu_records_plain_steps_only(model):
    """States in other formats, and drafts, are written by code that looks at slots; asked for, that is an error, otherwise steps are plain."""
    packed = copy.deepcopy(model)
    packed.backbone.layers[0].mixer.add_module("packed", infer.moe.Packed((16, 16), "fp8"))
    recipe = nemotron.apply_recipe(copy.deepcopy(model), infer.nvfp4.NVFP4Recipe())
    for model_, options in ((model, dict(draft=2)), (model, dict(draft=2, rollback="replay")), (model, dict(state_format="fp16")),
                            (model, dict(kv_format="fp8")), (packed, {}), (copy.deepcopy(model).bfloat16(), {}), (recipe, {})):
        with pytest.raises(ValueError, match="only steps without"): Engine(model_, 1, 20, graphs=True, **options)
        assert Engine(model_, 1, 20, **options).graphs is None
    assert Engine(model, 1, 20).graphs and Engine(model, 1, 20, graphs=True).graphs and Engine(model, 1, 20, graphs=False).graphs is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU records every step")
def test_traced_steps_on_a_cpu_serve_a_load_as_plain_ones_do(monkeypatch, model):
    """To the bit, with requests of four sorts that come, end and are cancelled, slots that are all busy or not, and weights that change in place:
    what the tracer took for a constant would stay what it was."""
    model, runs, step = copy.deepcopy(model), [], infer.packed_step
    monkeypatch.setattr(infer, "packed_step", lambda *args: runs.append(1) or step(*args))
    before, answers = {name: z.clone() for name, z in model.state_dict().items()}, []
    recorded = []
    for plain_calls in (3, 10**9):
        monkeypatch.setattr(traces, "PLAIN", plain_calls)
        model.load_state_dict(before)
        engine, out, rng = Engine(model, 3, 300, prefill_tokens=9, seed=4, ahead=2), {}, random.Random(1)
        for i, p in enumerate(prompts(11, 5, 2, 20)):
            sort = dict(temperature=0.0) if i < 5 else dict(temperature=0.9, top_p=0.8 + 0.2 * (i % 2), logprobs=True)
            engine.submit(p, SamplingParams(max_tokens=rng.randint(8, 30), seed=i, stop_ids=(), **sort), place=i)
        engine.submit([9] * 245, SamplingParams(max_tokens=20, stop_ids=(), temperature=0.9))      # into the next bucket of cells
        while not engine.idle:
            out.update(engine.step())
            if len(out) == 5: engine.cancel(8)
            if len(out) == 7:
                with torch.no_grad():
                    for p in model.parameters(): p.mul_(1.01)
        answers.append(({i: (a.ids, a.logprobs, a.reason) for i, a in out.items()}, [z.clone() for z in memory(engine).values()], len(runs)))
        recorded = recorded or [how for how, one in engine.graphs.recorded.items() if one.trace]
        runs.clear()
    (ours, left, traced), (theirs, theirs_left, plain) = answers
    assert ours == theirs and len(ours) == 12 and all(torch.equal(a, b) for a, b in zip(left, theirs_left, strict=True))
    assert {how.full for how in recorded} == {how.greedy for how in recorded} == {True, False} and traced < plain - 20


def test_a_trace_begins_behind_the_plain_calls_and_loses_none(monkeypatch):
    """Each call counts once, also the recorded one; and a tensor that is not among the parts is the constant that the docstring warns of."""
    monkeypatch.setattr(traces, "PLAIN", 2)
    part, other, runs = SimpleNamespace(count=torch.zeros(()), name="x"), torch.zeros(()), []

    def f():
        runs.append(1); part.count += 1; other.add_(1)
        return part.count * 10 + other * 0

    traced = traces.Traced(f, torch.nn.Linear(1, 1), [part])
    assert [int(traced()) for _ in range(6)] == [10, 20, 30, 40, 50, 60] and len(runs) == 3 and part.count == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("state_format", mamba.STATE_FORMATS)
@pytest.mark.parametrize("k, rollback", [(0, "snapshot"), (3, "snapshot"), (3, "replay")])
def test_recorded_steps_answer_as_plain_ones_on_a_gpu(monkeypatch, k, rollback, state_format):
    """The same kernels on the same memory, so the same tokens, also of formats that round by dice; and Python runs a step only to record it."""
    model, runs, step = randomise(nemotron.Nemotron(MICRO), 5).cuda().requires_grad_(False), [], infer.packed_step
    monkeypatch.setattr(infer, "packed_step", lambda *args: runs.append(1) or step(*args))
    answers = []
    for graphs in (True, False):
        engine = Engine(model, 3, 300, draft=k, rollback=rollback, state_format=state_format, prefill_tokens=9, seed=4, graphs=graphs)
        for i, p in enumerate(prompts(9, 5, 2, 20)):
            sort = dict(temperature=0.0) if i < 4 else dict(temperature=0.9, top_p=0.8, logprobs=True)
            engine.submit(p, SamplingParams(max_tokens=15, seed=i, stop_ids=(), **sort), place=i)
        engine.submit([9] * 240, SamplingParams(max_tokens=25, stop_ids=()))
        done = engine.run()
        answers.append([(done[i].ids, done[i].reason) for i in range(10)])
        if graphs:
            recorded = engine.graphs.recorded.values()
            assert any(z.graphs for z in recorded) and len(runs) <= 3 * len(recorded) < 30
    assert answers[0] == answers[1]
