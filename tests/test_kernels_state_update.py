"""kernels/state_update.py against the definitions of 02_mamba.py, section 7: ssd_step in float64 for the numbers, quantize_state for the codes."""
import importlib
import math

import pytest
import torch
from kernel_checks import DEVICE, assert_no_worse, randn

mamba = importlib.import_module("02_mamba")
twin = importlib.import_module("kernels.state_update")
FORMATS = list(mamba.STATE_FORMATS)
SIZES = dict(h=4, p=5, g=2, n=24)           # neither fills its block


def inputs(b, t, dtype=torch.float32, seed=0, h=4, p=5, g=2, n=24):
    """x, dt, A, B, C, D as slices of one projection, so that nothing but the last dimension is contiguous."""
    parts = randn(b, t, h * p + 2 * g * n + h, seed=seed, dtype=dtype).split([h * p, g * n, g * n, h], -1)
    x, B, C, dt = parts[0].unflatten(-1, (h, p)), parts[1].unflatten(-1, (g, n)), parts[2].unflatten(-1, (g, n)), parts[3]
    return x, dt.abs() * 0.3, -randn(h, seed=seed + 1).abs() * 2, B, C, randn(h, seed=seed + 2)


def exact_inputs(b, t, seed=0, h=4, p=5, g=2, n=24):
    """Without decay, and with so few digits that every state is exact in fp32, however its products are rounded."""
    x, dt, A, B, C, D = inputs(b, t, seed=seed, h=h, p=p, g=g, n=n)
    return (x * 8).round() / 8, torch.where(dt > 0.2, 0.5, 0.25), A * 0, (B * 8).round() / 8, C, D


def pool(slots, state_format, seed=9, h=4, p=5, g=2, n=24, exact=False):
    S = randn(slots, h, p, n, seed=seed)
    stored = mamba.quantize_state((S * 2**12).round() / 2**12 if exact else S, state_format, seed=1, impl="torch")
    if exact and state_format.startswith("int8"): stored = stored._replace(scale=torch.full_like(stored.scale, 2.0**-5))
    return stored


def clone(state): return mamba.QuantizedState(*(z.clone() for z in state)) if isinstance(state, tuple) else state.clone()


def assert_same(a, b):
    """Bit for bit: 0 and -0 are equal numbers, and other codes."""
    for ours, theirs in zip(mamba.parts(a), mamba.parts(b)):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs) and torch.equal(ours.signbit(), theirs.signbit())


def several_heads(monkeypatch, **changed):
    tiles = twin._tiles
    monkeypatch.setattr(twin, "_tiles", lambda *shape: {**tiles(*shape), **changed})


def ids(*values): return torch.tensor(values, device=DEVICE)


# --- the numbers

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("t, sizes", [(1, SIZES), (2, dict(h=2, p=16, g=1, n=16)), (5, dict(h=3, p=3, g=3, n=7)), (8, SIZES)])
def test_ssd_step_is_no_worse_than_pytorch(t, sizes, dtype):
    """Outputs and states of drafts of every length, with odd widths, against the recurrence in float64: a wrong stride, mask, group or skip shows."""
    x, dt, A, B, C, D = inputs(2, t, dtype, **sizes)
    S = pool(2, "fp32", **sizes)
    y_exact, S_exact = mamba.ssd_recurrence(*(z.double() for z in (x, dt, A, B, C, D, S)))
    one = (lambda z: z[:, 0]) if t == 1 else lambda z: z
    arguments = one(x), one(dt), A, one(B), one(C), D
    plain, S_plain = mamba.ssd_step(*arguments, S.clone(), impl="torch")
    y, S_twin = twin.ssd_step(*arguments, S.clone())
    assert_no_worse(y, plain, one(y_exact), what="y")
    assert_no_worse(S_twin, S_plain, S_exact, what="state")


def test_a_step_without_state_and_skip_starts_from_zero():
    x, dt, A, B, C, _ = inputs(2, 3)
    y_exact, S_exact = mamba.ssd_recurrence(*(z.double() for z in (x, dt, A, B, C)))
    plain, S_plain = mamba.ssd_step(x, dt, A, B, C, impl="torch")
    for y, S in (twin.ssd_step(x, dt, A, B, C), mamba.ssd_step(x, dt, A, B, C, impl="triton")):
        assert_no_worse(y, plain, y_exact)
        assert_no_worse(S, S_plain, S_exact)
    empty, S = twin.ssd_step(x[:0], dt[:0], A, B[:0], C[:0])
    assert empty.shape == (0, 3, 4, 5) and S.shape == (0, 4, 5, 24)
    codes, scale = twin.ssd_step(x, dt, A, B, C, state_format="int8_sr", seed=3)[1]
    assert codes.dtype == torch.int8 and (codes != 0).any() and torch.isfinite(scale).all()


def test_float64_stays_float64():
    x, dt, A, B, C, D = (z.double() for z in inputs(2, 3))
    S = pool(2, "fp32").double()
    y, after = twin.ssd_step(x, dt, A, B, C, D, S.clone())
    y_exact, S_exact = mamba.ssd_recurrence(x, dt, A, B, C, D, S)
    assert y.dtype == after.dtype == torch.float64
    assert (y - y_exact).abs().max() < 1e-12 * y_exact.abs().max() and (after - S_exact).abs().max() < 1e-12 * S_exact.abs().max()


# --- slots, snapshots, replay

@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("write", ["last", "each", "none"])
def test_only_the_named_slots_are_written(write, state_format):
    """Permuted slots, a row without a sequence, one without a token, a snapshot that nobody wants: their memory, and every other slot, stays.
    NaN in the slots that a row may not read would reach its output."""
    b, t = 4, 2
    sizes = dict(h=2, p=5, g=1, n=24)
    arguments, memory = inputs(b, t, **sizes), pool(15, state_format, **sizes)
    guard = clone(memory)
    state = mamba.QuantizedState(*(z[1:] for z in memory)) if isinstance(memory, tuple) else memory[1:]      # so that slot -1 lies in memory of ours
    read = ids(6, -1, 2, 9)
    slots = torch.stack([read, ids(3, 4, 5, 7), ids(12, 10, -1, 8)], 1) if write == "each" else read
    doc_b, before = ids(0, 0, 5, -1), clone(state)
    mamba.parts(state)[-1][[0, 1, 9, 13]] = 99 if mamba.parts(state)[-1].dtype == torch.int8 else math.nan
    marked = clone(state)
    y, same = twin.ssd_step(*arguments, state, doc_b, slots, write, state_format, 5)
    written = {"last": [6, 2], "each": [3, 12, 5], "none": []}[write]
    for new, old in zip(mamba.parts(same), mamba.parts(marked)):
        for slot in range(14):
            assert torch.equal(new[slot].isnan(), old[slot].isnan())
            assert torch.equal(new[slot].nan_to_num(), old[slot].nan_to_num()) != (slot in written), slot
    for z, old in zip(mamba.parts(memory), mamba.parts(guard)): assert torch.equal(z[0], old[0])
    plain, _ = mamba.ssd_step(*arguments, before, doc_b, slots, write, state_format, 5, impl="torch")
    assert (y[1] == 0).all() and (y[3] == 0).all() and torch.allclose(y, plain, rtol=1e-5, atol=1e-5)


def test_snapshots_are_the_states_of_single_steps():
    """Bit for bit: a draft that is rejected must leave no trace."""
    sizes = dict(h=2, p=5, g=1, n=24)
    x, dt, A, B, C, D = inputs(2, 5, **sizes)
    S = pool(12, "fp32", **sizes)
    running, slots = S.clone(), torch.arange(12, device=DEVICE).view(2, 6)
    y_each, each = twin.ssd_step(x, dt, A, B, C, D, S.clone(), None, slots, "each")
    for t in range(5):
        y, _ = twin.ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, running, None, slots[:, 0])
        assert torch.equal(each[slots[:, 1 + t]], running[slots[:, 0]]) and torch.allclose(y_each[:, t], y, rtol=1e-6, atol=1e-6)


def test_a_replay_of_the_accepted_tokens_is_their_snapshot():
    """`none` writes nothing; then `last` with the first a tokens, by length or with dt = 0 behind them, gives snapshot a."""
    sizes = dict(h=2, p=5, g=1, n=24)
    x, dt, A, B, C, D = inputs(2, 4, **sizes)
    S, slots = pool(10, "fp32", **sizes), torch.arange(10, device=DEVICE).view(2, 5)
    y_each, each = twin.ssd_step(x, dt, A, B, C, D, S.clone(), None, slots, "each")
    kept = S.clone()
    y, _ = twin.ssd_step(x, dt, A, B, C, D, kept, None, slots[:, 0], "none")
    assert torch.equal(kept, S) and torch.equal(y, y_each)
    for a in range(1, 5):
        flushed, _ = twin.ssd_step(x[:, :a], dt[:, :a], A, B[:, :a], C[:, :a], D, S.clone(), None, slots[:, 0])[::-1]
        padded, _ = twin.ssd_step(x, dt * (torch.arange(4, device=DEVICE) < a)[:, None], A, B, C, D, S.clone(), None, slots[:, 0])[::-1]
        assert torch.equal(flushed[slots[:, 0]], each[slots[:, a]]) and torch.equal(padded, flushed)


@pytest.mark.parametrize("write", ["last", "each", "none"])
@pytest.mark.parametrize("state_format", ["fp32", "fp16_sr", "int8_sr"])
def test_heads_may_share_a_program(monkeypatch, state_format, write):
    """A program that takes two heads, in blocks of four of their five rows, gives what two programs give: a head's pointers, decay, scale, skip or
    draws that stay those of the first would show. Four are asked for, but a group has two. NaN in a slot that no row reads stays."""
    arguments, memory, doc_b = inputs(2, 2), pool(7, state_format), ids(4, -1)
    mamba.parts(memory)[-1][6] = 99 if mamba.parts(memory)[-1].dtype == torch.int8 else math.nan
    slots = ids([5, 0, 3], [4, 2, -1]) if write == "each" else ids(5, 4)
    y, alone = twin.ssd_step(*arguments, clone(memory), doc_b, slots, write, state_format, 5)
    several_heads(monkeypatch, HEADS=4, BLOCK_P=4)
    y_shared, shared = twin.ssd_step(*arguments, clone(memory), doc_b, slots, write, state_format, 5)
    assert torch.allclose(y, y_shared, rtol=1e-5, atol=1e-5) and (y[0] != 0).any()        # another tile may sum y in another order
    for z, same in zip(mamba.parts(shared), mamba.parts(alone)): assert torch.equal(z.nan_to_num(7), same.nan_to_num(7))


# --- formats

@pytest.mark.parametrize("sizes", [dict(h=2, p=5, g=1, n=24), dict(h=2, p=3, g=1, n=7), dict(h=2, p=2, g=1, n=64)], ids=["n 24", "n 7", "n 64"])
@pytest.mark.parametrize("state_format", FORMATS[1:])
@pytest.mark.parametrize("write, t", [("last", 1), ("each", 2)])
def test_equal_states_get_the_definitions_codes(state_format, write, t, sizes):
    """Codes, scales and draws, for a seed of the host and one in memory (a captured graph changes it there): exact."""
    seed, state = -(2**62) - 3, pool(9, state_format, exact=True, **sizes)
    slots = ids([7, 0, 8], [2, 5, 1]) if write == "each" else ids(4, 1)
    arguments = exact_inputs(2, t, **sizes)
    want = mamba.ssd_step(*arguments, clone(state), None, slots, write, state_format, seed, impl="torch")[1]
    for same in (seed, torch.tensor(seed, device=DEVICE))[:1 + state_format.endswith("_sr")]:
        assert_same(twin.ssd_step(*arguments, clone(state), None, slots, write, state_format, same)[1], want)
    for z, old in zip(mamba.parts(want), mamba.parts(state)): assert not torch.equal(z, old)


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("offset", [0, 5, 2**36 + 48])
def test_quantize_state_has_the_definitions_codes(state_format, offset):
    """All sizes of numbers: fp16's subnormals and what lies beyond 65504, rows of zeros, of nothing but 1e-33 and with one large value."""
    for shape in ((2, 3, 32), (3, 2, 7)):
        x = randn(*shape, seed=3) * 2.0 ** randn(*shape, seed=4, scale=8).round()
        x[0, 0], x[0, 1] = 0, 1e-33
        x[1, 0, :6] = torch.tensor([7e4, -1e6, 6.1e-5, -3e-8, 2.0**-14 - 2.0**-26, 65519.0])
        x[1, 1] = 65504
        assert_same(twin.quantize_state(x, state_format, torch.tensor([3], device=DEVICE), offset),
                    mamba.quantize_state(x, state_format, 3, offset, impl="torch"))
        assert_same(twin.quantize_state(x.transpose(0, 1), state_format, 3, offset),
                    mamba.quantize_state(x.transpose(0, 1), state_format, 3, offset, impl="torch"))
    assert mamba.parts(twin.quantize_state(x[:0], state_format, 3))[0].shape == (0, 2, 7)


@pytest.mark.parametrize("state_format", ["fp16", "fp16_sr"])
def test_every_kind_of_number_gets_the_definitions_fp16(state_format):
    """Any bits of an fp32, Inf and -0 too; and where rounding could go wrong: beside and between fp16's subnormal numbers, halfway between the
    smallest numbers that can matter (2^-37), just below 2^-14 and 65504. What is rounded to 0 stochastically is +0."""
    bits = torch.randint(-2**31, 2**31, (256, 16), generator=torch.Generator().manual_seed(5)).to(torch.int32).view(torch.float32)
    tiny = (torch.arange(-96, 96).double() / 4 * 2.0**-37 + 2.0**-14 * torch.tensor([[0], [1 / 1024], [0.5], [1], [2]])).float()
    large = torch.tensor([65503.99, 65504, 65519.9, 65520, 65536, 1e38, 3.4028234663852886e38, math.inf, 0, 2.0**-149, 2.0**-126, 2.0**-38, 2.0**-37,
                          1, 3 * 2.0**-38, 2.0**-25])
    for x in (bits[~bits.isnan()], tiny.flatten(), large.repeat(16)):
        for sign in (1, -1):
            row = (sign * x[:len(x) // 16 * 16]).view(1, -1, 16).to(DEVICE)
            assert_same(twin.quantize_state(row, state_format, 3), mamba.quantize_state(row, state_format, 3, impl="torch"))


@pytest.mark.parametrize("state_format", ["int8", "int8_sr"])
def test_any_scale_is_divided_exactly(state_format):
    """The scale is amax / 127 and the codes use 127 / amax, each rounded once."""
    x = randn(512, 16, seed=6) * 2.0 ** torch.randint(-90, 100, (512, 1), generator=torch.Generator().manual_seed(7)).to(DEVICE)
    amax = x.abs().amax(1)
    x[:, 3], x[:, 8], x[:, 13] = -amax, amax, amax * torch.nextafter(torch.ones_like(amax), 0 * amax)
    x[:, 4:8] = amax[:, None] / 127 * torch.tensor([1, -1, 64, -126.5], device=DEVICE)
    assert_same(twin.quantize_state(x, state_format, 3), mamba.quantize_state(x, state_format, 3, impl="torch"))


def test_no_code_is_below_minus_127():
    """This number times 127 / itself is 127.0000076: with a draw of 0, one in 65536, its floor would be -128."""
    x = torch.full((4096, 64), -1.0014472007751465, device=DEVICE)
    q = twin.quantize_state(x, "int8_sr", 3)
    assert q.codes.min() == -127
    assert_same(q, mamba.quantize_state(x, "int8_sr", 3, impl="torch"))


@pytest.mark.parametrize("state_format", ["fp16", "fp16_sr"])
def test_a_broken_state_stays_broken_in_fp16(state_format):
    """All bits of a GPU's NaN are ones: 13 bits added to them would carry into the sign and leave 0."""
    x = torch.full((1, 1, 16), -1, dtype=torch.int32, device=DEVICE).view(torch.float32)
    x = torch.cat([x, x.abs()])
    assert twin.quantize_state(x, state_format, 3).isnan().all() and mamba.quantize_state(x, state_format, 3, impl="torch").isnan().all()


@pytest.mark.parametrize("value", [1 + 0.3 * 2.0**-10, -1 - 0.3 * 2.0**-10, 2.3 * 2.0**-24], ids=["above 1", "below -1", "subnormal"])
def test_stochastic_fp16_is_right_on_average(value):
    """Only the two neighbours, in the right proportion: 5 standard errors, a false alarm in two million seeds."""
    count, step = 4096, 2.0**-24 if abs(value) < 1e-5 else 2.0**-10
    q = twin.quantize_state(torch.full((count // 64, 64), value, device=DEVICE), "fp16_sr", seed=1).double()
    low = math.floor(value / step) * step
    assert set(q.flatten().tolist()) == {low, low + step}
    assert abs(q.mean().item() - value) < 5 * step * math.sqrt(0.3 * 0.7 / count)


def test_stochastic_int8_is_right_on_average():
    x = torch.full((256, 16), 0.3, device=DEVICE)
    x[:, 0], x[:, 1] = 127, -126.7
    q = twin.quantize_state(x, "int8_sr", seed=1)
    assert (q.scale == 1).all() and (q.codes[:, 0] == 127).all() and set(q.codes[:, 2:].unique().tolist()) == {0, 1}
    for column, mean, count in ((slice(2, 16), 0.3, 256 * 14), (slice(1, 2), -126.7, 256)):
        assert abs(q.codes[:, column].double().mean().item() - mean) < 5 * math.sqrt(0.3 * 0.7 / count)


def test_another_seed_gives_other_draws_and_another_slot_too():
    x = torch.full((2, 64), 1 + 0.5 * 2.0**-10, device=DEVICE)
    a, b = twin.quantize_state(x, "fp16_sr", 1), twin.quantize_state(x, "fp16_sr", 2)
    assert not torch.equal(a, b) and not torch.equal(a[0], a[1]) and torch.equal(a[1:], twin.quantize_state(x[1:], "fp16_sr", 1, offset=64))


@pytest.mark.parametrize("change, word", [
    (dict(state_format="fp8"), "unknown"), (dict(write="all"), "unknown"), (dict(write="each"), "slots_b"), (dict(state_format="fp16_sr"), "seed"),
    (dict(state_format="fp16"), "contiguous"), (dict(slots_b=torch.zeros(2)), "int32"), (dict(slots_b=torch.zeros(3, dtype=torch.int32)), "slots_b"),
])
def test_wrong_arguments_are_named_before_a_kernel_runs(change, word):
    arguments = dict(zip(("x", "dt", "A_h", "B", "C", "D_h"), inputs(2, 2)), state_bhpn=pool(2, "fp32"))
    with pytest.raises(ValueError, match=word): twin.ssd_step(**{**arguments, **change})


# --- what is compiled without a GPU

def launches(device, arch):
    """Ultra's layer, batch 64: every format, drafts with snapshots and without, a seed in memory; batch 1."""
    h, p, g, n = 256, 64, 8, 128
    bf16 = dict(device=device, dtype=torch.bfloat16)

    def step(b, t, write, state_format, seed=None):
        codes = torch.empty(b * (1 + t), h, p, n, device=device, dtype=mamba.STATE_FORMATS[state_format])
        state = mamba.QuantizedState(codes, torch.empty(codes.shape[:-1], device=device)) if codes.dtype == torch.int8 else codes
        slots = torch.empty((b, 1 + t) if write == "each" else (b,), device=device, dtype=torch.int32)
        x, B, C = (torch.empty(b, t, *size, **bf16) for size in ((h, p), (g, n), (g, n)))
        dt, A = torch.empty(b, t, h, device=device), torch.empty(h, device=device)
        twin.ssd_step(x, dt, A, B, C, torch.empty(h, **bf16), state, None, slots, write, state_format, seed)

    step(64, 1, "last", "fp32")
    step(64, 1, "last", "fp16_sr", 3)
    step(64, 1, "last", "int8", 3)
    step(64, 1, "last", "int8_sr", torch.empty(1, device=device, dtype=torch.int64))
    step(64, 6, "each", "fp32")
    step(64, 6, "none", "fp32")
    step(1, 1, "last", "fp16_sr", 3)
    twin.quantize_state(torch.empty(64, h, p, n, device=device), "int8_sr", 3)
