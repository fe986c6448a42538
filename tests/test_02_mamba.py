"""Stage 02: three forms of one sequence map, the convolution, norms, the layer and its cache. Oracles: fp64, F.conv1d, transformers' mixer."""
import importlib
import math

import pytest
import torch
import torch.nn.functional as F

nvfp4, mamba = (importlib.import_module(m) for m in ("01_nvfp4", "02_mamba"))
CHUNK = 8
LENGTHS = [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
EXACT = 1e-10          # one algorithm against another in fp64, of the largest entry: 5 digits above its rounding


def gap(ours, theirs):
    """Largest difference, relative to the largest entry of the oracle."""
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-300)).item()


def assert_no_worse(ours, plain, oracle, factor=2.0):
    """May round differently than plain PyTorch in the same dtype, not worse."""
    err = lambda y: (y.double() - oracle).abs().max().item()
    assert err(ours) <= factor * err(plain), f"{err(ours):.1e} against {err(plain):.1e}"


def inputs(t, b=2, h=6, p=3, g=2, n=5, dtype=torch.float64, seed=0):
    """x, dt, A, B, C, D and a state, all asking for gradients; steps up to 0.5 and decays of very different speed."""
    rng = torch.Generator().manual_seed(seed)
    x, B, C, state = (torch.randn(*size, generator=rng, dtype=torch.float64) for size in ((b, t, h, p), (b, t, g, n), (b, t, g, n), (b, h, p, n)))
    dt, D = 0.5 * torch.rand(b, t, h, generator=rng, dtype=torch.float64), torch.randn(h, generator=rng, dtype=torch.float64)
    A = -torch.tensor([0.02, 0.1, 0.5, 1.0, 4.0, 16.0], dtype=torch.float64)[:h]
    return [z.to(dtype).requires_grad_() for z in (x, dt, A, B, C, D, state)]


def run(rung, tensors, state=True, doc=None, **kw):
    """Outputs, then gradients of a loss that reads y and the final state, for every input."""
    leaves = dict(zip("x dt A B C D S".split(), (z.detach().clone().requires_grad_() for z in tensors)))
    x, dt, A, B, C, D, S = leaves.values()
    y, final = rung(x, dt, A, B, C, D_h=D, state_bhpn=S if state else None, doc_bt=doc, **kw)
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    ((y * weight).sum() + final.sin().sum()).backward()
    return {"y": y.detach(), "final": final.detach(), **{name: z.grad for name, z in leaves.items() if z.grad is not None}}


def packed_ids(t, seed=0):
    """Documents of random lengths, ids that come back, padding at both edges and inside."""
    rng = torch.Generator().manual_seed(seed)
    change = torch.rand(2, t, generator=rng) < 0.2
    ids = change.cumsum(1) % 3
    ids[torch.rand(2, t, generator=rng) < 0.2] = -1
    return ids


# --- the rungs

@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("case", ["zero state", "state", "documents"])
def test_three_rungs_compute_one_map_forward_and_backward(t, case):
    """Lengths around the chunk; a wrong border, a state passed once too often or a gradient that skips it shows at one of them."""
    arguments = inputs(t), case != "zero state", packed_ids(t) if case == "documents" else None
    want = run(mamba.ssd_recurrence, *arguments)
    for got in (run(mamba.ssd_quadratic, *arguments), run(mamba.ssd_chunked, *arguments, chunk=CHUNK)):
        assert got.keys() == want.keys() and len(got) >= 8
        for name in want:
            scale = want[name].abs().max().clamp(min=1)      # gradients of A over one token are 0 in one form and rounding in another
            assert ((got[name] - want[name]).abs().max() / scale) < EXACT, name


def test_the_recurrence_is_a_geometric_series():
    """The definition itself against a closed form: constant input, B = C = 1, no skip; y_t = dt (1 - a^t) / (1 - a)."""
    t, dt, A = 40, 0.3, -0.7
    one = torch.ones(1, t, 1, 1, dtype=torch.float64)
    y, state = mamba.ssd_recurrence(one, torch.full((1, t, 1), dt, dtype=torch.float64), torch.tensor([A], dtype=torch.float64), one, one)
    a = math.exp(dt * A)
    want = dt * (1 - a ** torch.arange(1, t + 1, dtype=torch.float64)) / (1 - a)
    assert gap(y[0, :, 0, 0], want) < 1e-13 and gap(state.view(1), want[-1:]) < 1e-13


def test_the_handwritten_backward_passes_gradcheck():
    """Finite differences know nothing of our other rungs. Two groups, documents, a state, a length that leaves a short last chunk."""
    x, dt, A, B, C, D, S = inputs(7, b=1, h=2, p=2, g=2, n=2)
    doc = torch.tensor([[0, 0, -1, 0, 1, 1, 1]])
    f = lambda x, dt, A, B, C, D, S: mamba.ssd_chunked(x, dt, A, B, C, D, 3, S, doc)
    with torch.no_grad(): dt += 0.1                      # away from 0, where a step may not be negative
    assert torch.autograd.gradcheck(f, (x, dt, A, B, C, D, S))


@pytest.mark.parametrize("rung", list(mamba.RUNGS.values()), ids=list(mamba.RUNGS))
def test_packed_documents_do_not_see_each_other(rung):
    """Ids 0 1 0, one border on a chunk's and one inside: each document alone gives the same, and the last state is the last one's."""
    tensors, ids, kw = inputs(21, b=1), torch.tensor([[0] * CHUNK + [1] * 3 + [0] * 10]), {} if rung is not mamba.ssd_chunked else dict(chunk=CHUNK)
    x, dt, A, B, C, D, S = (z.detach() for z in tensors)
    y, final = rung(x, dt, A, B, C, D_h=D, state_bhpn=S, doc_bt=ids, **kw)
    for lo, hi, state in ((0, CHUNK, S), (CHUNK, CHUNK + 3, None), (CHUNK + 3, 21, None)):
        alone, last = rung(x[:, lo:hi], dt[:, lo:hi], A, B[:, lo:hi], C[:, lo:hi], D_h=D, state_bhpn=state, **kw)
        assert gap(y[:, lo:hi], alone) < EXACT
    assert gap(final, last) < EXACT


def test_segments_look_through_padding():
    """Padding is no change of document, and at the left edge it belongs to the first real one: else a left-padded prompt loses its state."""
    doc = torch.tensor([[-1, 7, -1, 7, 8, -1], [0, 1, 0, -1, 0, 0], [-1, -1, -1, -1, -1, -1], [3, -1, 4, -1, -1, 3]])
    assert mamba.segments(doc).tolist() == [[0, 0, 0, 0, 1, 1], [0, 1, 2, 2, 2, 2], [0] * 6, [0, 0, 1, 1, 1, 2]]
    assert mamba.fill_padding(doc).tolist() == [[7, 7, 7, 7, 8, 8], [0, 1, 0, 0, 0, 0], [-1] * 6, [3, 3, 4, 4, 4, 3]]


def test_strong_decay_stays_finite_and_right():
    """dt·A down to -2,000 a token: exp of the hidden half overflows unless it is masked first, and inf times 0 is NaN."""
    x, dt, A, B, C, D, S = inputs(3 * CHUNK + 5)
    tensors = [x, dt * 250, A, B, C, D, S]
    want = run(mamba.ssd_recurrence, tensors)
    for got in (run(mamba.ssd_quadratic, tensors), run(mamba.ssd_chunked, tensors, chunk=CHUNK)):
        for name in want: assert got[name].isfinite().all() and gap(got[name], want[name]) < EXACT, name


def test_fp32_is_no_worse_than_the_recurrence():
    """300 tokens: values and gradients of the scan against autograd through the plain loop, both in fp32, both against fp64."""
    tensors = inputs(300, b=1)
    single = [z.detach().float() for z in tensors]
    rounded = [z.double() for z in single]
    oracle, plain, ours = run(mamba.ssd_recurrence, rounded), run(mamba.ssd_recurrence, single), run(mamba.ssd_chunked, single, chunk=64)
    # 4: products of 64 terms round in another order than sums of 300; a lost decay or an unmasked entry is off by far more
    for name in oracle: assert_no_worse(ours[name], plain[name], oracle[name], factor=4.0)


def test_bf16_inputs_round_once():
    """Inputs in bf16 are computed in fp32: as close to fp64 as the plain loop, the state stays fp32, and an error of 1% would be seen."""
    x, dt, A, B, C, D, S = (z.detach() for z in inputs(45))
    low = [x.bfloat16(), dt.float(), A.float(), B.bfloat16(), C.bfloat16(), D.float()]
    oracle, _ = mamba.ssd_recurrence(*(z.double() for z in low))
    plain, _ = mamba.ssd_recurrence(*low)
    ours, state = mamba.ssd_chunked(*low, chunk=16)
    assert ours.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_no_worse(ours, plain, oracle)
    with pytest.raises(AssertionError): assert_no_worse(ours * 1.01, plain, oracle)


def test_autocast_does_not_reach_the_scan():
    """Under bf16 autocast the products inside would round decays and states to 8 bits, also in the backward pass; so would the convolution."""
    tensors = inputs(19, dtype=torch.float32)
    want = run(mamba.ssd_chunked, tensors, chunk=CHUNK)
    with torch.autocast("cpu", torch.bfloat16): got = run(mamba.ssd_chunked, tensors, chunk=CHUNK)
    for name in want: assert torch.equal(got[name], want[name]), name
    conv = [z.detach().float() for z in conv_inputs(9)]
    with torch.autocast("cpu", torch.bfloat16): low = mamba.causal_conv1d(*conv)
    for a, b in zip(low, mamba.causal_conv1d(*conv)): assert torch.equal(a, b)


def test_one_step_is_one_step_of_the_recurrence():
    """From a state and from none, with and without the skip; it writes into the state it was given, and a row without a token stays."""
    x, dt, A, B, C, D, S = (z.detach() for z in inputs(1))
    for skip in (D, None):
        want, after = mamba.ssd_recurrence(x, dt, A, B, C, skip, S)
        state = S.clone()
        y, same = mamba.ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], skip, state)
        assert same is state and gap(y, want[:, 0]) < EXACT and gap(state, after) < EXACT
    want, after = mamba.ssd_recurrence(x, dt, A, B, C)
    y, state = mamba.ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])
    assert gap(y, want[:, 0]) < EXACT and gap(state, after) < EXACT
    state = S.clone()
    y, _ = mamba.ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state, torch.tensor([3, -1]))
    assert (y[0] != 0).all() and (y[1] == 0).all() and torch.equal(state[1], S[1]) and not torch.equal(state[0], S[0])


def step_inputs(b, t, dtype=torch.float32):
    x, dt, A, B, C, D, S = (z.detach() for z in inputs(t, b=b, dtype=dtype))
    return (x, dt, A, B, C, D), torch.cat([S.flip(0), S, -S, S * 2, S / 3, 1 + S])


@pytest.mark.parametrize("t", [1, 2, 8, 32])
def test_a_step_of_several_tokens_is_the_recurrence(t):
    """From slots in any order; the row at -1 has no sequence, and no other slot changes."""
    arguments, pool = step_inputs(3, t, torch.float64)
    before, slots = pool.clone(), torch.tensor([4, -1, 1])
    want, after = mamba.ssd_recurrence(*arguments, pool[slots])
    y, same = mamba.ssd_step(*arguments, pool, slots_b=slots)
    assert same is pool and gap(y[::2], want[::2]) < EXACT and (y[1] == 0).all() and gap(pool[slots[::2]], after[::2]) < EXACT
    rest = [i for i in range(len(pool)) if i not in (4, 1)]
    assert torch.equal(pool[rest], before[rest])


def test_snapshot_and_replay_are_one_rollback():
    """After a draft of 5 with a accepted: snapshot a, a replay of a tokens, the draft with dt = 0 behind them and single steps, bit for bit."""
    (x, dt, A, B, C, D), pool = step_inputs(2, 5)
    slots = torch.tensor([[7, 1, 2, 3, 4, 5], [0, 6, 8, 9, -1, 10]])
    y, each = mamba.ssd_step(x, dt, A, B, C, D, pool.clone(), slots_b=slots, write="each")
    kept = pool.clone()
    assert torch.equal(mamba.ssd_step(x, dt, A, B, C, D, kept, slots_b=slots[:, 0], write="none")[0], y) and torch.equal(kept, pool)
    single = pool.clone()
    for a in range(1, 6):
        y_a, _ = mamba.ssd_step(x[:, a - 1], dt[:, a - 1], A, B[:, a - 1], C[:, a - 1], D, single, slots_b=slots[:, 0])
        replayed, _ = mamba.ssd_step(x[:, :a], dt[:, :a], A, B[:, :a], C[:, :a], D, pool.clone(), slots_b=slots[:, 0])[::-1]
        padded, _ = mamba.ssd_step(x, dt * (torch.arange(5) < a)[:, None], A, B, C, D, pool.clone(), slots_b=slots[:, 0])[::-1]
        for state in (replayed, padded): assert torch.equal(state[slots[:, 0]], single[slots[:, 0]])
        assert torch.equal(y[:, a - 1], y_a)
        for row in (0, 1):
            if slots[row, a] >= 0: assert torch.equal(each[slots[row, a]], single[slots[row, 0]])


@pytest.mark.parametrize("state_format", list(mamba.STATE_FORMATS))
def test_a_written_state_is_the_fp32_state_rounded_once(state_format):
    """Between the tokens of a call nothing is rounded; documents at -1 write nothing."""
    arguments, S = step_inputs(2, 3)
    pool, doc_b, seed = mamba.quantize_state(S, state_format, seed=1), torch.tensor([-1, 0]), 77
    wide = mamba.dequantize_state(pool).clone()
    y_want, wide = mamba.ssd_step(*arguments, wide[:2], doc_b)
    pool = mamba.QuantizedState(*(z[:2].clone() for z in pool)) if isinstance(pool, tuple) else pool[:2].clone()
    before = mamba.dequantize_state(pool).clone()
    y, same = mamba.ssd_step(*arguments, pool, doc_b, state_format=state_format, seed=seed)
    want = mamba.quantize_state(wide[1], state_format, seed, offset=wide[1].numel())
    assert same is pool and torch.equal(y, y_want) and torch.equal(mamba.dequantize_state(pool)[0], before[0])
    for ours, theirs in zip(mamba.parts(pool), mamba.parts(want)): assert torch.equal(ours[1], theirs)
    zeros = mamba.ssd_step(*arguments, state_format=state_format, seed=seed, write="none")[1]
    assert (mamba.dequantize_state(zeros) == 0).all() and mamba.parts(zeros)[0].dtype == mamba.STATE_FORMATS[state_format]


@pytest.mark.parametrize("drive", [0.0, 1.0], ids=["free decay", "constant input"])
def test_fp16_to_nearest_stands_still_and_stochastic_rounding_does_not(drive):
    """A head that keeps 0.9999 a token, 1,000 tokens. Its change is below half a step of fp16, so nearest gives the start for ever; the mean of 1,024
    stochastic rows is right. A row wanders at most half a step a token, steps of 2^-11: 5 standard errors, a false alarm in two million seeds."""
    start = 0.3125 if drive else 0.875
    a, shape = 0.9999, (1, 1, 64, 16)
    A, dt, one = torch.tensor([math.log(a)]), torch.ones(1, 1), torch.ones(1, 1, 16)
    x = torch.full((1, 1, 64), drive * (1 - a))
    states = {f: mamba.quantize_state(torch.full(shape, start), f, seed=0) for f in ("fp16", "fp16_sr", "fp32")}
    for step in range(1000):
        for f, state in states.items(): mamba.ssd_step(x, dt, A, one, one, state_bhpn=state, state_format=f, seed=step)
    true = drive + (start - drive) * a**1000
    sigma = 2.0**-12 * math.sqrt(1000 / 1024)
    assert torch.equal(states["fp16"], torch.full(shape, start).half()) and abs(states["fp32"].mean().item() - true) < 1e-4
    assert abs(true - start) > 100 * sigma and abs(states["fp16_sr"].double().mean().item() - true) < 5 * sigma


def test_int8_to_nearest_forgets_what_is_small_beside_the_rows_largest():
    """One large value and many of a quarter code: nearest stores 0 at every step, stochastic rounding keeps them on average (5 standard errors)."""
    B = torch.full((1, 1, 16), 0.25)
    B[..., 0] = 127
    x, dt, A, steps = torch.full((1, 4, 256), 0.1), torch.ones(1, 4), torch.full((4,), -1e-4), 20
    states = {f: mamba.quantize_state(torch.zeros(1, 4, 256, 16), f, seed=0) for f in ("int8", "int8_sr")}
    for step in range(steps):
        for f, state in states.items(): mamba.ssd_step(x, dt, A, B, B, state_bhpn=state, state_format=f, seed=step)
    small = {f: mamba.dequantize_state(state)[..., 1:].double() for f, state in states.items()}
    true = 0.25 * 0.1 * sum(math.exp(-1e-4 * i) for i in range(steps))
    scale = 0.1 * steps         # of the last write, the largest
    assert (small["int8"] == 0).all() and abs(small["int8_sr"].mean().item() - true) < 5 * 0.5 * scale * math.sqrt(steps / small["int8"].numel())
    assert true > 5 * 0.5 * scale * math.sqrt(steps / small["int8"].numel())


# --- the convolution

def conv_inputs(t, b=2, c=6, w=4):
    return [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((b, t, c), (c, 1, w), (c,), (b, w - 1, c))]


@pytest.mark.parametrize("t", [1, 2, 3, 11])
def test_the_convolution_is_conv1d_with_its_window(t):
    """Values and gradients against F.conv1d; also sequences shorter than the window, whose next window still holds old inputs."""
    x, weight, bias, window = conv_inputs(t)
    y, new = mamba.causal_conv1d(x, weight, bias, window)
    whole = torch.cat([window, x], 1)
    want = F.silu(F.conv1d(whole.transpose(1, 2), weight, bias, groups=6)).transpose(1, 2)
    assert gap(y, want) < EXACT and torch.equal(new, whole[:, t:])
    leaves = (x, weight, bias, window)
    for a, b in zip(torch.autograd.grad(y.sin().sum() + new.sum(), leaves), torch.autograd.grad(want.sin().sum() + whole[:, t:].sum(), leaves)):
        assert gap(a, b) < EXACT
    window, ys = window.detach(), []
    for i in range(t):
        step, window = mamba.causal_conv1d(x[:, i:i + 1], weight, bias, window)
        ys.append(step)
    assert gap(torch.cat(ys, 1), want) < EXACT and torch.equal(window, new)


def test_the_convolution_keeps_documents_and_padding_apart():
    """Each row by hand: a document sees the window only when it is the first, padding is skipped, and gradients stay inside documents."""
    t, doc = 14, torch.tensor([[-1, 0, 0, -1, -1, 0, 1, 0, 0, 0, 0, 0, -1, -1], [2] * 5 + [-1] + [2] * 3 + [3] * 5])
    x, weight, bias, window = conv_inputs(t)
    y, new = mamba.causal_conv1d(x, weight, bias, window, doc)
    assert (y[doc < 0] == 0).all()
    segment, by_hand = mamba.segments(doc), 0
    for row in range(2):
        for s in segment[row].unique().tolist():
            at = ((segment[row] == s) & (doc[row] >= 0)).nonzero()[:, 0]
            want, last = mamba.causal_conv1d(x[row, at][None], weight, bias, window[row:row + 1] if s == 0 else None)
            assert gap(y[row, at], want[0]) < EXACT
            by_hand = by_hand + want.sin().sum()
        assert torch.equal(new[row], last[0])
        by_hand = by_hand + last.sum()
    leaves = (x, weight, bias, window)
    for a, b in zip(torch.autograd.grad(y.sin().sum() + new.sum(), leaves, retain_graph=True), torch.autograd.grad(by_hand, leaves)):
        assert gap(a, b) < EXACT
    seen, = torch.autograd.grad(y[0, 6].sum(), x)                # a document of one token: only its own input
    assert seen[0, 6].abs().sum() > 0 and seen[0, :6].abs().sum() == 0 and seen[0, 7:].abs().sum() == 0 and seen[1].abs().sum() == 0
    y, new = mamba.causal_conv1d(x, weight, bias, window, torch.full((2, t), -1))
    assert (y == 0).all() and torch.equal(new, window)           # nothing but padding: the window passes through


def test_the_convolution_in_bf16_rounds_once():
    """bf16 in and out, fp32 between: values within one rounding (2^-8 relative) of fp64, and the window is the input bit by bit."""
    x, weight, bias, window = (z.detach().bfloat16() for z in conv_inputs(9))
    y, new = mamba.causal_conv1d(x, weight, bias, window)
    want, _ = mamba.causal_conv1d(*(z.double() for z in (x, weight, bias, window)))
    assert y.dtype == new.dtype == torch.bfloat16 and torch.equal(new, x[:, -3:])
    assert ((y.double() - want).abs() < 2**-8 * want.abs() + 1e-6).all()          # 1e-6: fp32 sums of five terms near 1


# --- norms

def test_the_gated_norm_gates_first_and_norms_group_by_group():
    """Three parts of different size: gate after the norm, one norm over everything, and a forgotten weight must each be told apart."""
    y, z, weight = torch.randn(2, 7, 12).double(), torch.randn(2, 7, 12).double(), torch.rand(12).double()
    y = y * torch.tensor([1.0, 10, 100]).repeat_interleave(4)
    got = mamba.gated_rmsnorm(y, z, weight, 3, 1e-5)
    norm = lambda u: torch.cat([part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() for part in u.chunk(3, -1)], -1)
    gate = z * torch.sigmoid(z)
    assert gap(got, norm(y * gate) * weight) < EXACT
    for wrong in (norm(y) * gate * weight, norm(y * gate), mamba.gated_rmsnorm(y, z, weight, 1, 1e-5)): assert gap(got, wrong) > 0.1


def test_rmsnorm_multiplies_its_weight_before_rounding():
    """fp32 inside: against fp64 a bf16 norm errs by one rounding of the result, at most 2^-8 relative; rounding before the weight makes two."""
    x, weight = torch.randn(64, 48).bfloat16(), 1 + 0.3 * torch.randn(48)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    got = mamba.rmsnorm(x, weight, 1e-5)
    assert got.dtype == torch.bfloat16 and ((got.double() - want) / want).abs().max() < 2**-8 + 1e-6
    twice = (mamba.rmsnorm(x, torch.ones(48), 1e-5) * weight.bfloat16()).double()
    assert ((twice - want) / want).abs().max() > 1.2 * 2**-8
    assert gap(mamba.rmsnorm(x.double(), weight.double()), F.rms_norm(x.double(), (48,), weight.double(), 1e-5)) < EXACT


# --- the layer

def randomised(layer, seed=0):
    """Every parameter away from its default, or a layer that ignores it would pass."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if name.endswith("proj.weight"): parameter.copy_(noise * 1.5 / parameter.shape[1] ** 0.5)
            elif name in ("A_log", "dt_bias"): parameter.add_(0.5 * noise)
            else: parameter.add_(0.3 * noise)
    return layer


def small_layer(dtype=torch.float64, **kw):
    return randomised(mamba.Mamba2(**{**dict(d_model=20, heads=6, head_dim=4, groups=3, state=5, chunk=CHUNK), **kw})).to(dtype)


def their_mixer(ours, limit=(0.0, math.inf)):
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer
    config = NemotronHConfig(hidden_size=20, mamba_num_heads=6, mamba_head_dim=4, n_groups=3, ssm_state_size=5, chunk_size=CHUNK,
                             hybrid_override_pattern="MEM*E", layer_norm_epsilon=1e-5)
    theirs = NemotronHMamba2Mixer(config, layer_idx=0)
    theirs.load_state_dict(ours.state_dict())        # strict: names and shapes are the released ones
    theirs.time_step_limit = limit                   # as built it would clamp dt at 0.001
    return theirs


MUTANTS = ["gate after the norm", "one norm group", "no conv bias", "D ignored", "A_log reversed", "dt_bias reversed", "norm weight ignored",
           "groups interleaved"]


def mutate(name, layer, monkeypatch):
    with torch.no_grad():
        if name == "no conv bias": layer.conv1d.bias.zero_()
        if name == "D ignored": layer.D.zero_()
        if name == "A_log reversed": layer.A_log.copy_(layer.A_log.flip(0))
        if name == "dt_bias reversed": layer.dt_bias.copy_(layer.dt_bias.flip(0))
        if name == "norm weight ignored": layer.norm.weight.fill_(1)
    if name == "one norm group": layer.norm.groups = 1
    if name == "gate after the norm":
        norm = mamba.gated_rmsnorm
        monkeypatch.setattr(mamba, "gated_rmsnorm", lambda y, z, w, groups, eps, impl: norm(y, torch.full_like(z, 50.0), w, groups, eps) * F.silu(z))
    if name == "groups interleaved":                 # head j reading group j mod g instead of j // (h / g)
        right = mamba.ssd_chunked
        spread = lambda z: z.repeat(1, 1, 2, 1)
        monkeypatch.setattr(mamba, "ssd_chunked", lambda x, dt, A, B, C, *rest: right(x, dt, A, spread(B), spread(C), *rest))


@pytest.mark.parametrize("mutant", ["none", *MUTANTS])
def test_the_layer_equals_transformers_and_its_mutants_do_not(mutant, monkeypatch):
    """Odd length, batch 2, three groups, every parameter randomised; outputs, input gradient and parameter gradients."""
    ours = small_layer(torch.float32)
    theirs = their_mixer(ours)
    mutate(mutant, ours, monkeypatch)
    x = torch.randn(2, 3 * CHUNK + 5, 20, requires_grad=True)
    ours(x).sin().sum().backward()
    got, x.grad = {"y": ours(x).detach(), "x": x.grad, **{k: p.grad for k, p in ours.named_parameters()}}, None
    theirs(x).sin().sum().backward()
    want = {"y": theirs(x).detach(), "x": x.grad, **{k: p.grad for k, p in theirs.named_parameters()}}
    # 1e-4 of the largest entry: fp32 on both sides, whose sums over 58 tokens run in different orders
    close = {name: gap(got[name], want[name]) < 1e-4 for name in want}
    assert all(close.values()) if mutant == "none" else not close["y"], close


@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.3, 0.9)])
def test_prefill_equals_pieces_equals_single_steps(limit):
    """One call, four pieces (one of a single token, one shorter than the conv window) and token by token; a limit on dt that binds."""
    layer, x = small_layer(time_step_limit=limit), torch.randn(3, 29, 20, dtype=torch.float64)
    with torch.no_grad():
        whole_cache = layer.empty_cache(3)
        whole = layer(x, cache=whole_cache)
        assert gap(layer(x), whole) < EXACT
        for cuts in ([0, 13, 14, 16, 29], list(range(30))):
            cache = layer.empty_cache(3)
            window, state = cache.window_btc, cache.state_bhpn
            pieces = torch.cat([layer(x[:, lo:hi], cache=cache) for lo, hi in zip(cuts, cuts[1:])], 1)
            assert gap(pieces, whole) < EXACT
            assert cache.window_btc is window and cache.state_bhpn is state, "the cache is updated in place"
            assert gap(window, whole_cache.window_btc) < EXACT and gap(state, whole_cache.state_bhpn) < EXACT


def test_the_step_limit_binds_in_prefill_and_in_decode():
    """transformers' own decode forgets the limit: ours must agree with their prefill, and differ from a layer without one at every token."""
    limit = (0.3, 0.9)
    ours = small_layer(torch.float32, time_step_limit=limit)
    free = small_layer(torch.float32)
    x = torch.randn(2, 11, 20)
    with torch.no_grad():
        want, cache = their_mixer(ours, limit)(x), ours.empty_cache(2)
        steps = torch.cat([ours(x[:, i:i + 1], cache=cache) for i in range(11)], 1)
        assert gap(steps, want) < 1e-5 and gap(ours(x), want) < 1e-5      # fp32 on both sides
        assert ((free(x) - want).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_a_padded_batch_equals_its_rows_alone(side):
    """Rows of 9, 13 and 2 tokens in one batch, then decoding goes on: outputs, state and window are those of each row alone, padding gives 0."""
    layer, width, lengths = small_layer(), 13, [9, 13, 2]
    rows = [torch.randn(1, n, 20, dtype=torch.float64) for n in lengths]
    more = torch.randn(3, 2, 20, dtype=torch.float64)
    doc, x = torch.full((3, width), -1), torch.randn(3, width, 20, dtype=torch.float64)
    for i, n in enumerate(lengths):
        scattered = torch.randperm(width, generator=torch.Generator().manual_seed(i))[:n].sort().values
        at = {"left": torch.arange(width - n, width), "right": torch.arange(n), "inside": scattered}[side]
        doc[i, at], x[i, at] = 0, rows[i][0]
    with torch.no_grad():
        cache = layer.empty_cache(3)
        y = layer(x, doc, cache)
        after = torch.cat([layer(more[:, i:i + 1], cache=cache) for i in range(2)], 1)
        assert (y[doc < 0] == 0).all()
        for i, row in enumerate(rows):
            alone = layer.empty_cache(1)
            assert gap(y[i][doc[i] >= 0], layer(row, cache=alone)[0]) < EXACT
            assert gap(after[i], layer(more[i:i + 1], cache=alone)[0]) < EXACT
            assert gap(cache.state_bhpn[i], alone.state_bhpn[0]) < EXACT and gap(cache.window_btc[i], alone.window_btc[0]) < EXACT


def test_packed_documents_in_the_layer_equal_each_alone():
    """Scan and convolution must cut at the same places, values and gradients: one of the two leaking is the common mistake."""
    layer, x = small_layer(), torch.randn(1, 23, 20, dtype=torch.float64, requires_grad=True)
    doc = torch.tensor([[5] * 7 + [2] * 10 + [5] * 6])
    y = layer(x, doc)
    for lo, hi in ((0, 7), (7, 17), (17, 23)):
        alone = layer(x[:, lo:hi])
        assert gap(y[:, lo:hi], alone) < EXACT
        got, want = torch.autograd.grad(y[:, lo:hi].sin().sum(), x, retain_graph=True)[0], torch.autograd.grad(alone.sin().sum(), x)[0]
        assert gap(got, want) < EXACT


def test_a_row_without_a_token_keeps_its_cache_in_decode():
    """doc -1 in a single step: this row's state and window stay bit by bit, the others move on."""
    layer, x = small_layer(), torch.randn(2, 6, 20, dtype=torch.float64)
    with torch.no_grad():
        cache = layer.empty_cache(2)
        layer(x, cache=cache)
        window, state = cache.window_btc.clone(), cache.state_bhpn.clone()
        y = layer(x[:, :1], torch.tensor([[-1], [0]]), cache)
    assert (y[0] == 0).all() and torch.equal(cache.window_btc[0], window[0]) and torch.equal(cache.state_bhpn[0], state[0])
    assert not torch.equal(cache.window_btc[1], window[1]) and not torch.equal(cache.state_bhpn[1], state[1])


def test_gradients_flow_through_a_call_with_a_cache():
    """The cache is overwritten while the graph still needs its old state; also a single token, which must not take the in-place step."""
    layer, x = small_layer(), torch.randn(2, 9, 20, dtype=torch.float64, requires_grad=True)
    old = layer.empty_cache(2)
    with torch.no_grad(): layer(x, cache=old)
    copied = lambda: mamba.MambaCache(old.window_btc.clone(), old.state_bhpn.clone())
    for n in (9, 1):
        cache, direction, eps = copied(), torch.randn_like(x), 1e-6
        got, = torch.autograd.grad(layer(x[:, :n], cache=cache).sum(), x)
        assert not cache.state_bhpn.requires_grad and not cache.window_btc.requires_grad
        up, down = (layer((x + move * direction)[:, :n], cache=copied()).sum() for move in (eps, -eps))
        assert gap((got * direction).sum(), (up - down).detach() / (2 * eps)) < 1e-6     # a central difference with eps 1e-6 keeps 8 digits


def test_mixed_precision_keeps_the_cache_wide():
    """Under bf16 autocast: output in bf16, state in fp32, and as good as the layer cast to bf16 entirely."""
    layer = small_layer(torch.float32)
    x = torch.randn(2, 21, 20)
    with torch.no_grad():
        oracle = small_layer(torch.float64)(x.double())
        cast = small_layer(torch.float32).bfloat16()(x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            cache = layer.empty_cache(2, dtype=torch.bfloat16)
            y = layer(x, cache=cache)
    assert y.dtype == torch.bfloat16 and cache.state_bhpn.dtype == torch.float32 and cache.window_btc.dtype == torch.bfloat16
    assert_no_worse(y, cast, oracle)


def test_a_fresh_layer_starts_as_the_training_code_does():
    """A in (1, 16), steps in (dt_min, dt_max) and never under the floor, D = 1: read back through the forward pass's own formulas."""
    layer = mamba.Mamba2(8, 400, 1, 1, 1, dt_min=1e-3, dt_max=0.1, dt_floor=5e-3)
    A, dt = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert 1 <= A.min() < 1.5 and 15.5 < A.max() <= 16 and (layer.D == 1).all()
    assert abs(dt.min().item() - 5e-3) < 1e-6 and 0.09 < dt.max() <= 0.1 + 1e-6
    assert abs((dt <= 5e-3 * 1.001).float().mean().item() - math.log(5) / math.log(100)) < 0.15      # 5 sigma for 400 heads is 0.12
    assert {name: tuple(p.shape) for name, p in mamba.Mamba2(12, 4, 3, 2, 5).named_parameters()} == {
        "A_log": (4,), "dt_bias": (4,), "D": (4,), "in_proj.weight": (12 + 32 + 4, 12), "conv1d.weight": (32, 1, 4), "conv1d.bias": (32,),
        "norm.weight": (12,), "out_proj.weight": (12, 12)}


def test_the_demo_measures_what_it_says():
    """65,536 tokens from real cache tensors, half-lives that the scan itself shows, rungs that agree."""
    state, window, kv_token = mamba.measure_cache()
    assert (state, kv_token, state / kv_token) == (402_653_184, 6_144, 65_536) and window == 48 * 3 * 18_432 * 2
    half_h, left_ht = mamba.measure_memory(heads=16, length=64)
    want = 0.5 ** (torch.arange(64) / half_h[:, None])
    assert torch.allclose(left_ht, want, atol=1e-4)        # fp32 sums of up to 64 decays
    row, = mamba.measure_rungs([40])
    assert all(row[f"{name}_error"] < 1e-5 for name in mamba.RUNGS) and mamba.measure_decode() < 1e-5


# --- errors and dispatch

ones = torch.ones


def rung_arguments():
    return dict(x_bthp=ones(2, 5, 4, 3), dt_bth=ones(2, 5, 4), A_h=-ones(4), B_btgn=ones(2, 5, 2, 4), C_btgn=ones(2, 5, 2, 4))


@pytest.mark.parametrize("change, word", [
    (dict(dt_bth=ones(2, 5, 3)), "dt_bth"), (dict(A_h=-ones(5)), "A_h"), (dict(A_h=ones(4)), "A_log"), (dict(B_btgn=ones(2, 5, 1, 4)), "C_btgn"),
    (dict(B_btgn=ones(2, 5, 3, 4), C_btgn=ones(2, 5, 3, 4)), "multiple of the groups"), (dict(D_h=ones(2)), "D_h"),
    (dict(state_bhpn=ones(2, 4, 4, 3)), "state_bhpn"), (dict(doc_bt=torch.zeros(2, 4, dtype=torch.long)), "doc_bt"),
    (dict(x_bthp=ones(2, 5, 12)), "x is"), ({k: v[:, :0] if v.dim() > 1 else v for k, v in rung_arguments().items()}, "empty"),
], ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("rung", list(mamba.RUNGS.values()), ids=list(mamba.RUNGS))
def test_wrong_arguments_of_a_rung_are_named(rung, change, word):
    """Broadcasting would accept several of these and compute something."""
    rung(**rung_arguments())
    with pytest.raises(ValueError, match=word): rung(**{**rung_arguments(), **change})


STEP = ones(2, 4, 3), ones(2, 4), -ones(4)


@pytest.mark.parametrize("call, word", [
    (lambda: mamba.Mamba2(8, 4, 2, 3, 2), "multiple of groups"), (lambda: mamba.Mamba2(8, 4, 0, 2, 2), "at least 1"),
    (lambda: mamba.Mamba2(8, 4, 2, 2, 2, time_step_limit=(0.2, 0.1)), "time_step_limit"),
    (lambda: mamba.ssd_chunked(**rung_arguments(), chunk=0), "at least one token"),
    (lambda: mamba.causal_conv1d(ones(1, 4, 6), ones(5, 1, 4), ones(6)), "weight_c1w"),
    (lambda: mamba.causal_conv1d(ones(1, 4, 6), ones(6, 1, 4), ones(6), ones(1, 4, 6)), "window"),
    (lambda: mamba.gated_rmsnorm(ones(2, 10), ones(2, 10), ones(10), 3), "3 groups"),
    (lambda: mamba.ssd_step(*STEP, ones(2, 3, 5), ones(2, 3, 5)), "multiple of the groups"),
    (lambda: mamba.ssd_step(*STEP, ones(2, 2, 5), ones(2, 2, 5), state_bhpn=ones(2, 4, 3, 5).bfloat16()), "empty_cache"),
    (lambda: mamba.ssd_step(*STEP, ones(2, 2, 5), ones(2, 2, 5), state_bhpn=ones(2, 4, 5, 3).mT), "contiguous"),
    (lambda: mamba.ssd_step(*STEP, ones(2, 2, 5), ones(2, 2, 5), state_format="int8_sr"), "seed"),
    (lambda: mamba.ssd_step(*STEP, ones(2, 2, 5), ones(2, 2, 5), state_bhpn=ones(2, 4, 3, 5), state_format="int8"), "int8"),
    (lambda: mamba.ssd_step(*STEP, ones(2, 2, 5), ones(2, 2, 5), write="each"), "slots_b"),
    (lambda: mamba.ssd_step(*STEP, ones(2, 2, 5), ones(2, 2, 5), slots_b=torch.arange(2)), "pool"),
    (lambda: mamba.ssd_step(ones(2, 33, 4, 3), ones(2, 33, 4), -ones(4), ones(2, 33, 2, 5), ones(2, 33, 2, 5)), "32 tokens"),
    (lambda: mamba.quantize_state(ones(2, 4), "int4"), "unknown"),
])
def test_wrong_sizes_give_one_clear_sentence(call, word):
    with pytest.raises(ValueError, match=word): call()


def test_every_hot_function_hands_all_its_arguments_to_a_twin(monkeypatch):
    """A twin that gets its arguments in another order, or not all of them, would be found only on a GPU."""
    calls, hot = [], {"ssd_chunked": ("ssd", 9), "causal_conv1d": ("conv1d", 5), "rmsnorm": ("norm", 3), "gated_rmsnorm": ("norm", 5),
                      "ssd_step": ("state_update", 12), "quantize_state": ("state_update", 4)}
    monkeypatch.setattr(mamba.nvfp4, "find_twin", lambda module, name, impl, x: lambda *args: calls.append((module, name, args)))
    for name, (module, count) in hot.items():
        arguments = [f"argument {i}" for i in range(count)]
        getattr(mamba, name)(*arguments, impl="triton")
        assert calls.pop() == (module, name, tuple(arguments))
