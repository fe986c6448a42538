"""The Triton twin of the causal convolution against 02_mamba.py, forward and backward. In the interpreter without a GPU."""
import importlib
import math

import pytest
import torch
from kernel_checks import DEVICE, assert_no_worse, randn

from kernels import conv1d as kernel

mamba = importlib.import_module("02_mamba")
NAMES = ("y", "next window", "dx", "dweight", "dbias", "dwindow")
DOCUMENTS = {
    "padding in all places": [[-1, 0, 0, -1, -1, 0, 1, 0, 0, 0, 0, 0, -1, -1], [2] * 5 + [-1] + [2] * 3 + [3] * 5],
    "documents of one token": [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6, 5], [4, -1, 5, -1, -1, -1, 6, 6, -1, 7, -1, 7, 8, -1]],
    "nothing but padding": [[-1] * 14, [0] * 14],
    "padding through whole tiles": [[0] + [-1] * 12 + [0], [-1] * 13 + [5]],
    "an end shorter than the window": [[0] * 12 + [1, 1], [0] * 11 + [1, -1, -1]],
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Several programs down time, and groups that do not end with the sequence."""
    monkeypatch.setattr(kernel, "_tiles", lambda backward: dict(BLOCK=8, STEPS=8, GROUP=4, num_warps=1))


def inputs(t, b=2, c=6, w=4, dtype=torch.float64):
    """x, weight, bias, window."""
    sizes = ((b, t, c), (c, 1, w), (c,), (b, w - 1, c))
    return [randn(*size, seed=seed, dtype=dtype).requires_grad_() for seed, size in enumerate(sizes)]


def results(function, leaves, doc_bt=None, **options):
    """Output, next window, and the gradients of both outputs together."""
    y, new = function(*leaves, doc_bt, **options)
    given = randn(*y.shape, seed=10, dtype=y.dtype), randn(*new.shape, seed=11, dtype=y.dtype)
    return [y, new, *torch.autograd.grad((y, new), leaves, given, materialize_grads=True)]


def compare(leaves, doc_bt=None):
    """Twin and plain PyTorch against PyTorch in float64, on the same rounded inputs."""
    twin, plain = results(kernel.causal_conv1d, leaves, doc_bt), results(mamba.causal_conv1d, leaves, doc_bt, impl="torch")
    exact = results(mamba.causal_conv1d, [z.detach().double().requires_grad_() for z in leaves], doc_bt, impl="torch")
    assert torch.equal(twin[1], plain[1])                            # the window is a copy
    for name, a, b, oracle in zip(NAMES, twin, plain, exact):
        if not a.numel(): continue
        # float64 against float64: sums of up to 66 terms of size 1 in another order
        if a.dtype == torch.float64: assert (a - oracle).abs().max() < 1e-12, name
        else: assert_no_worse(a, b, oracle, what=name)
    return twin


@pytest.mark.parametrize("t, dtype", [(1, torch.float64), (2, torch.float32), (3, torch.bfloat16), (19, torch.float64), (19, torch.float32),
                                      (19, torch.float16), (19, torch.bfloat16)])
def test_values_and_gradients_are_pytorchs(t, dtype, small_tiles):
    """Also sequences shorter than the window. A tile that does not walk into the tile below loses gradient at its end."""
    compare(inputs(t, b=1, c=11 if t == 3 else 6, dtype=dtype))


@pytest.mark.parametrize("w", [1, 2, 6, 8])
def test_any_number_of_taps_works(w, monkeypatch):
    """w = 6 and 8 look back over more than a whole tile: the second tile once wrote gradients of the window as well."""
    monkeypatch.setattr(kernel, "_tiles", lambda backward: dict(BLOCK=8, STEPS=4, GROUP=2, num_warps=1))
    if w != 2: compare(inputs(7, b=1, w=w))
    if w in (2, 6): compare(inputs(14, w=w), torch.tensor(DOCUMENTS["padding in all places"], device=DEVICE))


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_documents_and_padding_are_kept_apart(kind, small_tiles):
    """Values, the next window and all gradients; padding's are exactly 0, the next window taking none of it."""
    doc_bt = torch.tensor(DOCUMENTS[kind], device=DEVICE)
    y, _, dx, *_ = compare(inputs(14, dtype=torch.bfloat16 if "one token" in kind else torch.float64), doc_bt)
    assert (y[doc_bt < 0] == 0).all() and (dx[doc_bt < 0] == 0).all()


def test_the_launch_parameters_in_use_are_right_too():
    """The other tests cut small tiles; these are the real ones, in fp32, with and without documents."""
    leaves, doc_bt = inputs(66, b=1, c=33, dtype=torch.float32), torch.tensor([[0] * 20 + [-1] * 5 + [1] * 41], device=DEVICE)
    compare(leaves, doc_bt)
    compare(inputs(9, b=1, c=33, dtype=torch.float32))


def test_without_a_window_the_tape_starts_with_zeros(small_tiles):
    x, weight, bias, window = inputs(5)
    y, new = kernel.causal_conv1d(x, weight, bias)
    want, old = kernel.causal_conv1d(x, weight, bias, torch.zeros_like(window))
    leaves, dy = (x, weight, bias), randn(2, 5, 6, seed=9, dtype=torch.float64)
    assert torch.equal(y, want) and torch.equal(new, old)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy)): assert torch.equal(a, b)


@pytest.mark.parametrize("documents", [False, True])
def test_slices_are_read_where_they_lie(documents, small_tiles):
    """x is a slice of the projection, dy comes transposed or as one broadcast number: strides, not luck."""
    wide, (_, weight, bias, window) = randn(2, 14, 20, dtype=torch.float64).requires_grad_(), inputs(14)
    doc_bt = torch.tensor(DOCUMENTS["padding in all places"], device=DEVICE) if documents else None
    dy = torch.ones(1, 1, 1, dtype=torch.float64, device=DEVICE).expand(2, 14, 6) if documents else randn(2, 6, 14, dtype=torch.float64).mT
    both = []
    for function, options in ((kernel.causal_conv1d, {}), (mamba.causal_conv1d, dict(impl="torch"))):
        y, _ = function(wide[..., 9:15], weight, bias, window, doc_bt, **options)
        both.append([y, *torch.autograd.grad(y, (wide, weight, bias, window), dy)])
    for a, b in zip(*both): assert (a - b).abs().max() < 1e-12
    x_bct = randn(1, 6, 5, dtype=torch.float64)                      # channels far apart: a copy is made
    assert (kernel.causal_conv1d(x_bct.mT, weight, bias)[0] - mamba.causal_conv1d(x_bct.mT, weight, bias, impl="torch")[0]).abs().max() < 1e-12


@pytest.mark.parametrize("documents", [False, True])
def test_pieces_chained_by_their_windows_equal_one_pass(documents, small_tiles):
    """Pieces of 1, 2 and more tokens: a window one token late, or one that forgets which document it belongs to, shows at the next piece."""
    x, weight, bias, window = inputs(14, dtype=torch.float32)
    doc_bt = torch.tensor([[0, 0, 0, 0, 1, 1, -1, 1, 1, -1], [2] * 5 + [-1] + [2, 3, 3, -1]], device=DEVICE) if documents else None
    if documents: x = x[:, :10]
    whole, last = kernel.causal_conv1d(x, weight, bias, window, doc_bt)
    ys = []
    for lo, hi in ((0, 1), (1, 4), (4, 8), (8, 10)) if documents else ((0, 1), (1, 3), (3, 4), (4, 9), (9, 14)):
        # NOTE: the window is the first document's, whatever its id: only the caller knows that row 0 opens a document at 4
        if documents and lo == 4: window = torch.cat([torch.zeros_like(window[:1]), window[1:]])
        y, window = kernel.causal_conv1d(x[:, lo:hi], weight, bias, window, None if doc_bt is None else doc_bt[:, lo:hi])
        ys.append(y)
    assert (torch.cat(ys, 1) - whole).abs().max() < 1e-6 and torch.equal(window, last)          # 1e-6: fp32 sums of five terms near 1


def test_no_nan_crosses_into_another_document(small_tiles):
    """A mask by multiplication keeps NaN alive: 0 * NaN is NaN. PyTorch drops what is in padding too."""
    doc_bt = torch.tensor([[0] * 6 + [-1] + [1] * 7], device=DEVICE)
    x, weight, bias, window = inputs(14, b=1)
    broken = x.detach().masked_fill(doc_bt[..., None] < 0, float("nan")).requires_grad_()
    for a, b in zip(results(kernel.causal_conv1d, [broken, weight, bias, window], doc_bt),
                    results(kernel.causal_conv1d, [x, weight, bias, window], doc_bt)): assert torch.equal(a, b)
    broken = x.detach().masked_fill(doc_bt[..., None] == 0, float("nan")).requires_grad_()
    y, new, dx, *_ = results(kernel.causal_conv1d, [broken, weight, bias, window], doc_bt)
    for z in (y[:, 6:], new, dx[:, 6:]): assert z.isfinite().all()
    assert y[:, :6].isnan().all()


def test_empty_tensors_are_answered():
    for b, t, c in ((2, 0, 6), (0, 5, 6)):
        leaves = inputs(t, b=b, c=c)
        for doc_bt in (None, torch.zeros(b, t, dtype=torch.long, device=DEVICE)):
            y, new = kernel.causal_conv1d(*leaves, doc_bt)
            assert y.shape == (b, t, c) and torch.equal(new, leaves[3])
            assert all(not z.any() for z in torch.autograd.grad(y.sum(), leaves))


def test_the_next_window_is_no_view_of_x():
    """A view would keep the whole projection alive in every layer's cache, and change when x is overwritten."""
    x, weight, bias, window = (z.detach() for z in inputs(5))
    for given in (window, None):
        for doc_bt in (None, torch.zeros(2, 5, dtype=torch.long, device=DEVICE)):
            new = kernel.causal_conv1d(x, weight, bias, given, doc_bt)[1]
            assert new.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() and torch.equal(new, x[:, 2:])


def test_two_runs_give_the_same_bits(small_tiles):
    """Partial sums are added in a fixed order; atomic additions would not be."""
    leaves = inputs(9, b=1, dtype=torch.bfloat16)
    for a, b in zip(results(kernel.causal_conv1d, leaves), results(kernel.causal_conv1d, leaves)): assert torch.equal(a, b)


def test_documents_are_laid_out_without_a_look_at_their_values():
    """Tensors on the meta device have no values to look at: reading a length on the host would raise, and on a GPU it would stop the queue."""
    doc_bt = torch.empty(2, 14, dtype=torch.long, device="meta")
    order_bt, reach_bt = kernel._tape(doc_bt, 4)
    new = kernel._next_window(torch.empty(2, 14, 6, device="meta"), torch.empty(2, 3, 6, device="meta"), order_bt, reach_bt)
    assert order_bt.shape == reach_bt.shape == (2, 14) and new.shape == (2, 3, 6)


def test_the_stage_finds_the_twin():
    leaves, doc_bt = inputs(5, dtype=torch.float32), torch.tensor([[0, 0, 1, 1, -1], [0] * 5], device=DEVICE)
    for a, b in zip(mamba.causal_conv1d(*leaves, doc_bt, impl="triton"), kernel.causal_conv1d(*leaves, doc_bt)): assert torch.equal(a, b)


@pytest.mark.parametrize("place, name", enumerate(["weight_c1w", "bias_c", "window", "doc_bt"], 1))
def test_a_wrong_shape_names_its_argument(place, name):
    arguments = [z.detach() for z in inputs(5)] + [torch.zeros(2, 5, dtype=torch.long, device=DEVICE)]
    arguments[place] = torch.zeros(*(size + 1 for size in arguments[place].shape), device=DEVICE, dtype=arguments[place].dtype)
    with pytest.raises(ValueError, match=name if place != 1 else "weight_c1w|window"): kernel.causal_conv1d(*arguments)


# ---- a decode step

def serve(step, dtype, k, w=4, c=11, h=5, slots=5, limit=(0.05, 0.9), seed=0):
    """Passes of k + 1 tokens for three of the slots, of which each keeps some or none -> [(y, dt, kept text of the slots, inputs) a pass].
    The projection is a slice; step(x, dt, weight, bias, dt_bias, limit, window, slots, starts, real)."""
    g, t = torch.Generator().manual_seed(seed), k + 1
    weight, bias, dt_bias = randn(c, 1, w, seed=1, dtype=dtype), randn(c, seed=2, dtype=dtype), randn(h, seed=3, scale=2.0)
    window, texts, out = torch.zeros(slots, w - 1 + t, c, dtype=dtype, device=DEVICE), {i: [] for i in range(slots)}, []
    for turn in range(12):
        slot = torch.randperm(slots, generator=g)[:3]
        count = torch.randint(0, t + 1, (3,), generator=g) if turn % 3 else torch.tensor([0, t, t])
        keep = [int(torch.randint(0, n + 1, (1,), generator=g)) for n in count]
        projected = randn(3, t, 4 + c + h, seed=100 + turn, dtype=dtype, scale=2.0)
        x, dt = projected[..., 4:4 + c], projected[..., 4 + c:]
        start, real = torch.tensor([len(texts[int(i)]) for i in slot]), torch.arange(t) < count[:, None]
        y, sizes = step(x, dt, weight, bias, dt_bias, limit, window, *(z.to(DEVICE) for z in (slot, start, real)))
        out.append((y, sizes, real, [list(texts[int(i)]) for i in slot], x, dt, (weight, bias, dt_bias)))
        for i, n, row in zip(slot, keep, x): texts[int(i)] += row[:n]
    return out


def by_hand(before, x_tc, weight, bias):
    """silu of the convolution of the new tokens behind a text, in float64, from the whole text."""
    c, _, w = weight.shape
    text = torch.stack([torch.zeros(c, dtype=torch.float64)] * (w - 1) + [z.double().cpu() for z in (*before, *x_tc)])
    pre = torch.stack([(text[i:i + w] * weight[:, 0].double().cpu().T).sum(0) for i in range(len(before), len(before) + len(x_tc))])
    return torch.nn.functional.silu(pre + bias.double().cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k, w", [(0, 4), (3, 4), (7, 2), (2, 6)])
def test_a_decode_step_goes_on_where_the_kept_text_ends(k, w, dtype):
    """Rows in any order of slots, of fewer tokens than the pass or none, and rejected ones: a cell that is one off, a token written into another's
    window, a step size that is not 0 where no token is (the lower limit is above 0), or a limit left out, shows within a few turns."""
    apart = lambda z: z.transpose(0, 1).contiguous().transpose(0, 1)      # rows far apart in memory
    twin = serve(lambda *args: kernel.conv_step(apart(args[0]), *args[1:]), dtype, k, w)
    plain = serve(lambda *args: mamba.conv_step(*args, impl="torch"), dtype, k, w)
    for (y, dt, real, before, x, raw, (weight, bias, dt_bias)), (y_plain, dt_plain, *_) in zip(twin, plain):
        exact_dt = torch.nn.functional.softplus(raw.double() + dt_bias.double()).clamp(0.05, 0.9).cpu()
        assert_no_worse(dt, dt_plain, torch.where(real[..., None], exact_dt, 0), what="dt")
        assert (dt[~real] == 0).all() and (dt[real] >= 0.05).all() and (dt <= 0.9).all()
        exact = torch.stack([by_hand(text, row, weight, bias) for text, row in zip(before, x)])
        if real.any(): assert_no_worse(y[real], y_plain[real], exact[real], what="y")


def test_a_prompt_fills_the_ring_that_decoding_goes_on_from():
    """Chunks longer than the ring, with rows of other lengths, then steps through the twin: the window of a row that brought two tokens still holds
    an older one."""
    w, c, ring = 4, 11, 4
    weight, bias, dt_bias = randn(c, 1, w, seed=1), randn(c, seed=2), randn(5, seed=3)
    window, text = torch.zeros(3, ring, c, device=DEVICE), [[], []]
    slot = torch.tensor([2, 0], device=DEVICE)
    for turn, counts in enumerate([(7, 2), (1, 9), (0, 2), (1, 1), (1, 1)]):
        t = max(counts)
        x, dt = randn(2, t, c, seed=10 + turn), randn(2, t, 5, seed=20 + turn)
        start, real = torch.tensor([len(z) for z in text], device=DEVICE), torch.arange(t)[None] < torch.tensor(counts)[:, None]
        y, _ = mamba.conv_step(x, dt, weight, bias, dt_bias, (0.0, math.inf), window, slot, start, real.to(DEVICE), impl="triton")
        for i, n in enumerate(counts):
            torch.testing.assert_close(y[i, :n].double().cpu(), by_hand(text[i], x[i, :n], weight, bias) if n else y[i, :0].double().cpu(),
                                       rtol=1e-5, atol=1e-5)
            text[i] += x[i, :n]
    assert not window[1].any()      # nobody's


def test_step_sizes_keep_their_small_values():
    """log(1 + e) would round e = exp(-18) away; above 20 the size is its argument; infinite limits change nothing; NaN stays."""
    raw = torch.tensor([-40.0, -18.0, -3.0, 0.0, 19.9, 20.1, 90.0, float("nan")], device=DEVICE)[None, None]
    step = lambda run: run(randn(1, 1, 2), raw, randn(2, 1, 4), randn(2), torch.zeros(8, device=DEVICE), (0.0, math.inf),
                           torch.zeros(1, 4, 2, device=DEVICE), *torch.zeros(2, 1, dtype=torch.long, device=DEVICE), raw[..., 0] < 0)[1]
    exact = torch.nn.functional.softplus(raw.double())
    # a GPU's exp is good to two units in the last place, and one more rounding each follows for the sum, the logarithm and the quotient
    torch.testing.assert_close(step(kernel.conv_step).double(), exact, rtol=1e-6, atol=0, equal_nan=True)


def launches(device, arch):
    """Ultra's shape: a slice of the projection z | x B C | dt, with and without documents."""
    projected = torch.empty(1, 8192, 16384 + 18432 + 256, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight, bias = (torch.empty(*size, dtype=torch.bfloat16, device=device) for size in ((18432, 1, 4), (18432,)))
    window, doc_bt = torch.empty(1, 3, 18432, dtype=torch.bfloat16, device=device), torch.empty(1, 8192, dtype=torch.long, device=device)
    for options in ((), (window, doc_bt)):
        y, _ = kernel.causal_conv1d(projected[..., 16384:-256], weight, bias, *options)
        torch.autograd.grad(y, projected, y)
    # a decode step of 32 slots with 3 drafts
    long = lambda *size: torch.empty(*size, dtype=torch.long, device=device)
    kernel.conv_step(projected[:, :128, 16384:-256].view(32, 4, 18432), projected[:, :128, -256:].view(32, 4, 256), weight, bias,
                     torch.empty(256, dtype=torch.float32, device=device), (0.0, math.inf),
                     torch.empty(64, 7, 18432, dtype=torch.bfloat16, device=device), long(32), long(32),
                     torch.empty(32, 4, dtype=torch.bool, device=device))
