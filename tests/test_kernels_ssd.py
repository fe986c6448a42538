"""The Triton twin of ssd_chunked against the recurrence in float64, and against a plain chunked scan in the same dtype."""
import importlib

import pytest
import torch
from kernel_checks import DEVICE, assert_no_worse, randn

from kernels import ssd
from kernels.ssd import ssd_chunked

mamba = importlib.import_module("02_mamba")
NAMES = ("x", "dt", "A", "B", "C", "D", "state")


def inputs(t, b=1, g=1, p=16, n=32, dtype=torch.float32, dt_scale=0.3):
    """x, dt, A, B, C, D, first state; three heads a group."""
    h = 3 * g
    dt, A = randn(b, t, h, seed=2).abs() * dt_scale, -randn(h, seed=3).abs() - 0.1
    return [randn(b, t, h, p, seed=1, dtype=dtype), dt, A, randn(b, t, g, n, seed=4, dtype=dtype), randn(b, t, g, n, seed=5, dtype=dtype),
            randn(h, seed=6), randn(b, h, p, n, seed=7)]


def packed(t, b=1):
    """Documents whose ids come back, with padding at the left, in the middle and at the right, and a border at 64 where a chunk begins."""
    ids = torch.zeros(t, dtype=torch.int64)
    ids[3:20], ids[24:33], ids[64:100], ids[100:] = 4, 7, 4, 0
    ids[:2] = ids[18:26] = -1
    if t > 40: ids[-5:] = -1
    return torch.stack([ids.roll(9 * i) for i in range(b)]).to(DEVICE)


def run(scan, tensors, doc=None, **kw):
    """Values and all gradients; the gradients that come in are exact in bf16, so that every dtype gets the same ones."""
    tensors = [z.detach().requires_grad_() for z in tensors]
    y, last = scan(*tensors[:6], state_bhpn=tensors[6], doc_bt=doc, **kw)
    coming = [randn(*z.shape, seed=8 + i).bfloat16().to(z.dtype) for i, z in enumerate((y, last))]
    return dict(y=y, last=last) | dict(zip(NAMES, torch.autograd.grad((y, last), tensors, coming)))


def plain(x, dt, A, B, C, D, state_bhpn, doc_bt=None, chunk=64):
    """What one would write with ordinary tensors: chunks, a state in fp32, operands of products rounded to x's dtype; autograd does the rest."""
    low, t, j = x.dtype, x.shape[1], x.shape[2] // B.shape[2]
    product = lambda how, *operands: torch.einsum(how, *(z.to(low).float() for z in operands))
    S, ys = state_bhpn, []
    segment = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device) if doc_bt is None else mamba.segments(doc_bt)
    if doc_bt is not None: dt = dt.masked_fill((doc_bt < 0)[..., None], 0)
    for lo in range(0, t, chunk):
        part, before = slice(lo, lo + chunk), segment[:, max(lo - 1, 0), None] if lo else torch.zeros_like(segment[:, :1])
        here, d, Bh, Ch = segment[:, part], dt[:, part], *(z[:, part].repeat_interleave(j, 2) for z in (B, C))
        cs = (d * A).cumsum(1)
        seen = torch.ones(here.shape[1], here.shape[1], dtype=torch.bool, device=x.device).tril() & (here[:, :, None] == here[:, None])
        decay = (cs[:, :, None] - cs[:, None]).masked_fill(~seen[..., None], -torch.inf).exp()
        into, out = cs.exp() * (here == before)[..., None], (cs[:, -1:] - cs).exp() * (here == here[:, -1:])[..., None]
        y = product("btsh,bshp->bthp", product("bthn,bshn->btsh", Ch, Bh) * decay * d[:, None], x[:, part])
        ys.append(y + into[..., None] * product("bthn,bhpn->bthp", Ch, S) + D[:, None] * x[:, part])
        S = into[:, -1, :, None, None] * S + product("bshp,bshn->bhpn", x[:, part] * (out * d)[..., None], Bh)
    y = torch.cat(ys, 1)
    return (y if doc_bt is None else y.masked_fill((doc_bt < 0)[..., None, None], 0)).to(low), S


@pytest.fixture
def tiles(monkeypatch):
    """Replace launch parameters: tiles(walk=False, splits=3) or, one level down, tiles(scan=dict(TMA=False))."""
    chosen = ssd._tiles

    def use(**changes):
        def changed(*sizes):
            return {k: {**v, **changes.get(k, {})} if isinstance(v, dict) else changes.get(k, v) for k, v in chosen(*sizes).items()}
        monkeypatch.setattr(ssd, "_tiles", changed)
    return use


def check(tensors, doc=None):
    got, ours = run(ssd_chunked, tensors, doc), run(plain, tensors, doc)
    want = run(mamba.ssd_recurrence, [z.double() for z in tensors], doc)
    for name in want: assert_no_worse(got[name], ours[name], want[name], what=name)


@pytest.mark.parametrize("t, g, documents, dtype, walk", [
    (1, 1, False, torch.float32, True), (33, 2, True, torch.float32, True), (33, 1, False, torch.float32, False),
    (64, 1, False, torch.bfloat16, True), (64, 1, True, torch.bfloat16, False), (130, 2, True, torch.bfloat16, True),
    (257, 1, True, torch.float16, False)])
def test_the_twin_is_no_worse_than_a_plain_scan(t, g, documents, dtype, walk, tiles):
    """Values and every gradient, through a first state and into the last: a wrong border, mask or decay is off by far more than a factor of 2."""
    tiles(walk=walk)
    check(inputs(t, g=g, dtype=dtype), packed(t) if documents else None)


def test_every_plan_gives_the_same(tiles):
    """Chunks walked or all at once, tiles by descriptors, a group's heads split over programs, another length of chunks: only sums differ.
    Chunks of 16, as long as a head is wide, take two sums of rows at once; others take them one by one."""
    x, dt, A, B, C, D, S = (z[:, :, :4] if i < 2 else z[:4] if i in (2, 5) else z for i, z in enumerate(inputs(34, g=2)))
    tensors, doc = [x, dt, A, B, C, D, S[:, :4]], packed(34)
    want = run(ssd_chunked, tensors, doc)
    for changes in (dict(walk=True), dict(walk=True, scan=dict(TMA=True)), dict(walk=False, splits=2), dict(chunk=16), dict(chunk=64)):
        tiles(**changes)
        got = run(ssd_chunked, tensors, doc)
        # 3e-6 of the largest: sums of up to 34 fp32 terms in another order
        for name in want: assert (got[name] - want[name]).abs().max() <= 3e-6 * want[name].abs().max().clamp(min=1), f"{changes} {name}"


def test_tiles_by_descriptors_are_the_same_bits(tiles):
    """With widths that fill no block: a state written beyond its rows, or after the last chunk, would be in another head or sequence."""
    tensors, doc, results = inputs(70, b=2, p=24, n=24, dtype=torch.bfloat16), packed(70, 2), []
    for tma in (False, True):
        tiles(walk=True, scan=dict(TMA=tma))
        with torch.no_grad(): y, last = ssd_chunked(*tensors[:6], state_bhpn=tensors[6], doc_bt=doc)
        results.append([y, last, *ssd._forward(*tensors, doc, ssd._tiles(2, 70, 3, 1, 24, 24, 2), True)[2]])
    for pointers, descriptors in zip(*results): assert torch.equal(pointers, descriptors)


def test_against_the_stage_in_bf16():
    """The stage computes bf16 inputs in fp32 and rounds y once; the twin's products round their operands: y within twice its error plus one unit."""
    tensors = inputs(100, g=2, dtype=torch.bfloat16)
    want, _ = mamba.ssd_recurrence(*(z.double() for z in tensors))
    theirs, _ = mamba.ssd_chunked(*tensors[:6], state_bhpn=tensors[6], impl="torch")
    ours, last = ssd_chunked(*tensors[:6], state_bhpn=tensors[6])
    assert ours.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert_no_worse(ours, theirs, want)


def test_widths_that_are_no_powers_of_two():
    """p 20 and n 10 are padded to 32 and 16 inside; a mask forgotten reads a neighbour's numbers."""
    check(inputs(35, p=20, n=10), packed(35))


def test_padding_gives_and_takes_nothing():
    """Zero output and zero gradients at padding; the state passes a row of nothing but padding unchanged."""
    tensors, doc = inputs(31, b=2), packed(31, 2)
    doc[1] = -1
    got, pad = run(ssd_chunked, tensors, doc), doc < 0
    for name in ("y", "x", "dt", "B", "C"): assert (got[name][pad] == 0).all() and (got[name][~pad] != 0).any(), name
    assert torch.equal(got["last"][1], tensors[6][1])


@pytest.mark.parametrize("documents", [False, True])
def test_what_is_not_a_token_is_never_used(documents, tiles):
    """NaN beyond the end, and in x and y's gradient at padding, changes no bit: a tile loaded a chunk ahead needs the mask of its own chunk."""
    t, tensors = 70, inputs(90)
    tiles(walk=True)
    x, dt, A, B, C, D, S = tensors
    dy, doc = randn(*x.shape, seed=9), packed(t) if documents else None
    results = []
    for hole in (0.0, float("nan")):
        whole = [z.clone() for z in (x, dt, B, C, dy)]
        for z in whole: z[:, t:] = hole
        if documents:
            for z in (whole[0], whole[4]): z[:, :t][doc < 0] = hole
        x_t, dt_t, B_t, C_t, dy_t = (z[:, :t] for z in whole)
        leaves = [z.detach().requires_grad_() for z in (x_t, dt_t, B_t, C_t, S)]
        y, last = ssd_chunked(*leaves[:2], A, *leaves[2:4], D, state_bhpn=leaves[4], doc_bt=doc)
        results.append((y, last, *torch.autograd.grad((y, last), leaves, (dy_t, torch.ones_like(last)))))
    for zero, nan in zip(*results): assert torch.equal(zero, nan)


def test_strong_decay_stays_finite_and_right():
    """dt A down to -2,000 a token: exp of the hidden half must not overflow, and running sums in the thousands must not blur a token's own weight."""
    check(inputs(70, dt_scale=700.0))       # a NaN is no better than anything


def test_slices_of_one_projection_need_no_copy():
    """x, B and C as the layer cuts them out of one tensor, y's gradient expanded from one number; same bits as from contiguous copies."""
    t, h, p, g, n = 33, 4, 16, 2, 32
    whole, (_, dt, A, *_) = randn(1, t, h * p + 2 * g * n), inputs(t, g=2)
    whole, dt, A = whole.requires_grad_(), dt[..., :h].requires_grad_(), A[:h]
    parts = whole.split([h * p, g * n, g * n], -1)
    x, B, C = parts[0].unflatten(-1, (h, p)), parts[1].unflatten(-1, (g, n)), parts[2].unflatten(-1, (g, n))
    y, _ = ssd_chunked(x, dt, A, B, C)
    dwhole, ddt = torch.autograd.grad(y.sum(), (whole, dt))
    copies = [z.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for z in (x, dt, B, C)]
    same, _ = ssd_chunked(*copies[:2], A, *copies[2:])
    dx, ddt_same, dB, dC = torch.autograd.grad(same.sum(), copies)
    assert torch.equal(y, same) and torch.equal(ddt, ddt_same)
    assert torch.equal(dwhole, torch.cat([z.flatten(2) for z in (dx, dB, dC)], -1))


def test_nothing_is_kept_without_a_gradient(monkeypatch):
    """Under no_grad, or when no input needs a gradient, no state of a chunk is written."""
    kept, forward = [], ssd._forward
    monkeypatch.setattr(ssd, "_forward", lambda *args, **kw: kept.append(kw["for_backward"]) or forward(*args, **kw))
    tensors = inputs(5)
    want, _ = ssd_chunked(*tensors[:6])
    tensors[5].requires_grad_()
    with torch.no_grad(): ssd_chunked(*tensors[:6])
    y, _ = ssd_chunked(*tensors[:6])
    assert kept == [False, False, True] and torch.equal(y, want) and y.requires_grad


def test_dtypes_follow_the_stage():
    """Steps in bf16 (whose gradient is bf16 too), float64 in and out, no D and no state, no rows at all."""
    x, dt, A, B, C, D, _ = inputs(20)
    dt = dt.bfloat16().requires_grad_()
    y, last = ssd_chunked(x, dt, A, B, C)
    want, S = mamba.ssd_recurrence(x, dt, A, B, C)
    assert (y - want).abs().max() < 1e-5 * want.abs().max() and (last - S).abs().max() < 1e-5 * S.abs().max()
    assert torch.autograd.grad(y.sum(), dt)[0].dtype == torch.bfloat16
    y, last = ssd_chunked(x.double(), dt, A, B, C, D)
    assert y.dtype == last.dtype == torch.float64 and (y - want - D[:, None] * x).abs().max() < 1e-5 * want.abs().max()
    y, last = ssd_chunked(x[:0], dt[:0], A, B[:0], C[:0])
    assert y.shape == (0, 20, 3, 16) and last.shape == (0, 3, 16, 32)


@pytest.mark.parametrize("change, word", [
    (dict(chunk=0), "at least one token"), (dict(t=0), "empty"), (dict(B=(1, 4, 2, 5)), "multiple of the groups"),
    (dict(A=(2,)), "A_h has shape"), (dict(doc=(1, 3)), "doc_bt has shape")])
def test_wrong_sizes_give_one_clear_sentence(change, word):
    t = change.get("t", 4)
    sizes = dict(x=(1, t, 3, 16), dt=(1, t, 3), A=(3,), B=(1, t, 1, 5), doc=(1, t)) | {k: v for k, v in change.items() if k in ("A", "B", "doc")}
    x, dt, A, B, doc = (torch.zeros(*size, device=DEVICE) for size in sizes.values())
    with pytest.raises(ValueError, match=word): ssd_chunked(x, dt, A, B, B, chunk=change.get("chunk", 128), doc_bt=doc.long())


def launches(device, arch):
    """Ultra's layer with a gradient, then 16 heads with documents without one."""
    for h, grad in ((256, True), (16, False)):
        xBC = torch.empty(1, 8192, h * 64 + 2 * 8 * 128, device=device, dtype=torch.bfloat16, requires_grad=grad)
        x, B, C = (z.unflatten(-1, size) for z, size in zip(xBC.split([h * 64, 1024, 1024], -1), ((h, 64), (8, 128), (8, 128))))
        doc = None if grad else torch.empty(1, 8192, device=device, dtype=torch.int64)
        y, last = ssd_chunked(x, torch.empty(1, 8192, h, device=device), torch.empty(h, device=device), B, C, torch.empty(h, device=device),
                              state_bhpn=torch.empty(1, h, 64, 128, device=device), doc_bt=doc)
        if grad: torch.autograd.backward((y, last), (torch.empty_like(y), torch.empty_like(last)))
