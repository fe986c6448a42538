"""Causal depthwise convolution with SiLU, the twin of `causal_conv1d` in 02_mamba.py, forward and backward.

The idea. A thread owns a few channels and walks down time. It keeps the last w - 1 inputs of its channels in registers, so each input is read
once from memory and converted once to fp32; per tap there is one multiplication and addition. Memory is the only limit.

The tiling. A program takes BLOCK channels and STEPS tokens of one row of the batch, and its last inputs before them (the halo):

             channels ->
             +---------+---------+---------+
      halo   | w-1 rows of the tile above  |   read again, mostly from the L2 cache; the window where there is no tile above
             +---------+---------+---------+
      time   | GROUP   |         |         |   GROUP rows are asked for at once, so that many loads are on their way before the
        |    | GROUP   | next    | next    |   first is used. PITFALL: the compiler moves no load above a store that might touch the
        v    | ...     | program | program |   same memory, so loads and stores that alternate row by row wait for each other.
             +---------+---------+---------+

Backward. d_pre = d_y silu'(pre) with pre computed again from x. An input's gradient is a sum over its w readers, the token itself and the next
w - 1: a thread keeps w - 1 unfinished sums in registers and stores a row when its last reader has passed. A tile therefore walks w - 1 rows
into the tile below. The gradients of the taps and of the bias are summed over the tile in registers and written as one partial sum each;
PyTorch adds the partial sums, so that two runs give the same bits.

Documents and padding. The tape of 02_mamba.py lists real tokens only. `_tape` orders a row's tokens that way, padding last, and says how far each
may look back (`reach`: 0 for the first token of a document, -1 for padding). The kernels walk along this order instead of time; a tap beyond the
reach reads zero. The first document's reach extends over the window, so no further case is needed.

Bytes at Ultra's shape, 8192 tokens x 18432 channels in bf16: forward reads x and writes y, 604 MB; backward reads x and dy and writes dx, 906 MB,
plus 5 % for partial sums. At 4.28 TB/s that is 0.141 and 0.212 ms. FLOPs: 8 a channel and token for the taps, about 8 for SiLU: 2.4 GFLOP.
float64 inputs are computed in float64, all others in float32.
Measured on an H200: forward 0.170 ms, of a slice of the projection 0.172 (a copy of the same bytes 0.146); with documents 0.37, of which the tape is
0.07; forward and backward 0.51, bound by about 45 instructions an element. Tried: 8 channels a thread, 0.184 forward.

A decode step. `conv_step` is the convolution of the few new tokens of some slots, whose last inputs lie in a ring by place in the text. A program
takes BLOCK channels of one row, reads the w - 1 inputs before its tokens from the ring, stores the new ones there and walks over them; the last
programs of a row compute its step sizes. One launch does what PyTorch does with some 15, and nothing is left to do when tokens are taken back.

Sources: 02_mamba.py sections 5 and 7; Dao's causal-conv1d for the idea to fuse bias, SiLU and window (no code).
"""
from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.interpreter import narrow


def _tiles(backward: bool) -> dict:
    """Launch parameters: a program takes BLOCK channels and STEPS tokens, and asks for GROUP rows at once. GROUP divides STEPS."""
    # 4 channels a thread: with 8 the forward pass was slower, and the backward pass with documents no longer fits the registers
    return dict(BLOCK=512, STEPS=128 if backward else 64, GROUP=4, num_warps=4)


# --- the pieces of a walk. A tuple in a kernel is a name for several registers: its length is known when the kernel is compiled.

@triton.jit
def _taps(weight_ptr, c_c, c, W: tl.constexpr, W2: tl.constexpr, WIDE: tl.constexpr):
    """The w factors of each channel, oldest first; weight is [c, 1, w] without gaps, W2 the power of two from w on."""
    # one tile in the order of memory, then picked apart: loading tap by tap would touch every line of the cache w times
    k_1k = tl.arange(0, W2)[None, :]
    weight_ck = tl.load(weight_ptr + c_c[:, None] * W + k_1k, mask=(c_c[:, None] < c) & (k_1k < W), other=0).to(WIDE)
    taps = ()
    for k in tl.static_range(W):
        taps = taps + (tl.sum(tl.where(k_1k == k, weight_ck, 0), axis=1),)
    return taps


@triton.jit
def _mask(c_c, c, wanted):
    """Every channel there is, or none."""
    return c_c < tl.where(wanted, c, 0)


@triton.jit
def _row(ptr, place, stride, order_ptr, t, c_c, c, ORDERED: tl.constexpr):
    """The row of a tensor [t, c] at a place of the tape; zeros outside of it. ptr: the tensor's channels at token 0."""
    inside = (place >= 0) & (place < t)
    row = place
    if ORDERED: row = tl.load(order_ptr + place, mask=inside, other=0)
    # NOTE: int64, because tokens times the features of a projection pass 2^31 in long rows
    return tl.load(ptr + tl.cast(row, tl.int64) * stride, mask=_mask(c_c, c, inside), other=0)


@triton.jit
def _reach(reach_ptr, place, t, W: tl.constexpr, ORDERED: tl.constexpr):
    """How many places back the token may look; -1: there is no token."""
    reach = W - 1
    if ORDERED: reach = tl.load(reach_ptr + place, mask=place < t, other=-1)
    return reach


@triton.jit
def _halo(x_ptr, window_ptr, first, stride, order_ptr, t, c_c, c, W: tl.constexpr, ORDERED: tl.constexpr, WINDOW: tl.constexpr,
          WIDE: tl.constexpr):
    """The w - 1 inputs before the place `first`, oldest first; before the tape's beginning lies the window."""
    past = ()
    for k in tl.static_range(W - 1):
        place = first - (W - 1) + k
        x_c = _row(x_ptr, place, stride, order_ptr, t, c_c, c, ORDERED).to(WIDE)
        if WINDOW:
            old_c = tl.load(window_ptr + (place + W - 1) * c, mask=_mask(c_c, c, place < 0), other=0).to(WIDE)
            x_c = tl.where(place < 0, old_c, x_c)
        past = past + (x_c,)
    return past


@triton.jit
def _seen(past, x_c, reach, W: tl.constexpr, ORDERED: tl.constexpr):
    """The w inputs that a token's taps meet, oldest first. PITFALL: select, do not multiply by 0, or a NaN crosses into the next document."""
    inputs, seen = past + (x_c,), ()
    for k in tl.static_range(W):
        u_c = inputs[k]
        if ORDERED: u_c = tl.where(reach >= W - 1 - k, u_c, 0)
        seen = seen + (u_c,)
    return seen


@triton.jit
def _dot(taps, seen, bias_c, W: tl.constexpr):
    pre_c = bias_c
    for k in tl.static_range(W): pre_c += taps[k] * seen[k]
    return pre_c


@triton.jit
def _dpre(pre_c, dy_c, reach, ORDERED: tl.constexpr):
    """dy silu'(pre); 0 where there is no token."""
    gate_c = 1 / (1 + tl.exp(-pre_c))
    dpre_c = dy_c * (gate_c * (1 + pre_c * (1 - gate_c)))
    if ORDERED: dpre_c = tl.where(reach >= 0, dpre_c, 0)
    return dpre_c


@triton.jit
def _share_out(open_sums, dpre_c, taps, reach, W: tl.constexpr, ORDERED: tl.constexpr):
    """Add a token's d_pre to the gradients of the w inputs it has read, oldest first; its own input's sum is the new one."""
    sums = ()
    for k in tl.static_range(W):
        share_c = taps[k] * dpre_c
        if ORDERED: share_c = tl.where(reach >= W - 1 - k, share_c, 0)
        if k < W - 1: share_c += open_sums[k]
        sums = sums + (share_c,)
    return sums


@triton.jit
def _finish(dx_ptr, dwindow_ptr, order_ptr, sum_c, place, start, stop, c_c, c, W: tl.constexpr, ORDERED: tl.constexpr, WINDOW: tl.constexpr):
    """Store the gradient of the input at `place`, which has met its last reader, if it lies in this tile or in the window."""
    row, mine = place, (place >= start) & (place < stop)
    if ORDERED: row = tl.load(order_ptr + place, mask=mine, other=0)
    tl.store(dx_ptr + tl.cast(row, tl.int64) * c, narrow(sum_c, dx_ptr.dtype.element_ty), mask=_mask(c_c, c, mine))
    if WINDOW:
        before = _mask(c_c, c, (place < 0) & (start == 0))
        tl.store(dwindow_ptr + (place + W - 1) * c, narrow(sum_c, dwindow_ptr.dtype.element_ty), mask=before)


# --- the two walks

@triton.jit
def _forward(x_ptr, weight_ptr, bias_ptr, window_ptr, order_ptr, reach_ptr, y_ptr, t, c, x_stride_b, x_stride_t,
             W: tl.constexpr, W2: tl.constexpr, ORDERED: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr,
             BLOCK: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr):
    b, start = tl.program_id(2).to(tl.int64), tl.program_id(1) * STEPS
    c_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok_c = c_c < c
    x_ptr += b * x_stride_b + c_c
    y_ptr += b * t * c + c_c
    if WINDOW: window_ptr += b * (W - 1) * c + c_c
    if ORDERED:
        order_ptr += b * t
        reach_ptr += b * t

    taps = _taps(weight_ptr, c_c, c, W, W2, WIDE)
    bias_c = tl.load(bias_ptr + c_c, mask=ok_c, other=0).to(WIDE)
    past = _halo(x_ptr, window_ptr, start, x_stride_t, order_ptr, t, c_c, c, W, ORDERED, WINDOW, WIDE)
    for passed in range(0, tl.minimum(STEPS, t - start), GROUP):
        first = start + passed
        xs, reaches = (), ()
        for i in tl.static_range(GROUP):
            xs = xs + (_row(x_ptr, first + i, x_stride_t, order_ptr, t, c_c, c, ORDERED),)
            reaches = reaches + (_reach(reach_ptr, first + i, t, W, ORDERED),)
        for i in tl.static_range(GROUP):
            x_c = xs[i].to(WIDE)
            pre_c = _dot(taps, _seen(past, x_c, reaches[i], W, ORDERED), bias_c, W)
            y_c = pre_c / (1 + tl.exp(-pre_c))
            row, inside = first + i, first + i < t
            if ORDERED:
                y_c = tl.where(reaches[i] >= 0, y_c, 0)
                row = tl.load(order_ptr + row, mask=inside, other=0)
            tl.store(y_ptr + tl.cast(row, tl.int64) * c, narrow(y_c, y_ptr.dtype.element_ty), mask=_mask(c_c, c, inside))
            past = (past + (x_c,))[1:]


@triton.jit
def _backward(x_ptr, weight_ptr, bias_ptr, window_ptr, order_ptr, reach_ptr, dy_ptr, dx_ptr, dwindow_ptr, partial_ptr, t, c,
              x_stride_b, x_stride_t, dy_stride_b, dy_stride_t,
              W: tl.constexpr, W2: tl.constexpr, ORDERED: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr,
              BLOCK: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr):
    b, start = tl.program_id(2).to(tl.int64), tl.program_id(1) * STEPS
    stop = tl.minimum(start + STEPS, t)
    c_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok_c = c_c < c
    x_ptr += b * x_stride_b + c_c
    dy_ptr += b * dy_stride_b + c_c
    dx_ptr += b * t * c + c_c
    if WINDOW:
        window_ptr += b * (W - 1) * c + c_c
        dwindow_ptr += b * (W - 1) * c + c_c
    if ORDERED:
        order_ptr += b * t
        reach_ptr += b * t

    taps = _taps(weight_ptr, c_c, c, W, W2, WIDE)
    bias_c = tl.load(bias_ptr + c_c, mask=ok_c, other=0).to(WIDE)
    past = _halo(x_ptr, window_ptr, start, x_stride_t, order_ptr, t, c_c, c, W, ORDERED, WINDOW, WIDE)
    dbias_c, dtaps, open_sums = tl.zeros([BLOCK], WIDE), (), ()      # open_sums: of the last w - 1 inputs, whose readers have not all passed
    for _ in tl.static_range(W): dtaps = dtaps + (tl.zeros([BLOCK], WIDE),)
    for _ in tl.static_range(W - 1): open_sums = open_sums + (tl.zeros([BLOCK], WIDE),)

    # 1. the tile's own tokens. Rows after the end of the tape are loaded as zeros, so their d_pre is 0
    for passed in range(0, stop - start, GROUP):
        first = start + passed
        xs, dys, reaches = (), (), ()
        for i in tl.static_range(GROUP):
            xs = xs + (_row(x_ptr, first + i, x_stride_t, order_ptr, t, c_c, c, ORDERED),)
            dys = dys + (_row(dy_ptr, first + i, dy_stride_t, order_ptr, t, c_c, c, ORDERED),)
            reaches = reaches + (_reach(reach_ptr, first + i, t, W, ORDERED),)
        for i in tl.static_range(GROUP):
            x_c = xs[i].to(WIDE)
            seen = _seen(past, x_c, reaches[i], W, ORDERED)
            dpre_c = _dpre(_dot(taps, seen, bias_c, W), dys[i].to(WIDE), reaches[i], ORDERED)
            dbias_c += dpre_c
            sums = ()
            for k in tl.static_range(W): sums = sums + (dtaps[k] + dpre_c * seen[k],)
            dtaps, sums = sums, _share_out(open_sums, dpre_c, taps, reaches[i], W, ORDERED)
            _finish(dx_ptr, dwindow_ptr, order_ptr, sums[0], first + i - (W - 1), start, stop, c_c, c, W, ORDERED, WINDOW)
            open_sums, past = sums[1:], (past + (x_c,))[1:]

    # 2. the next w - 1 tokens: they read the tile's last inputs; their share of the parameters' gradients is the next program's
    after = start + tl.cdiv(stop - start, GROUP) * GROUP
    for i in tl.static_range(W - 1):
        place = after + i
        x_c = _row(x_ptr, place, x_stride_t, order_ptr, t, c_c, c, ORDERED).to(WIDE)
        dy_c = _row(dy_ptr, place, dy_stride_t, order_ptr, t, c_c, c, ORDERED).to(WIDE)
        reach = _reach(reach_ptr, place, t, W, ORDERED)
        dpre_c = _dpre(_dot(taps, _seen(past, x_c, reach, W, ORDERED), bias_c, W), dy_c, reach, ORDERED)
        sums = _share_out(open_sums, dpre_c, taps, reach, W, ORDERED)
        _finish(dx_ptr, dwindow_ptr, order_ptr, sums[0], place - (W - 1), start, stop, c_c, c, W, ORDERED, WINDOW)
        open_sums, past = sums[1:], (past + (x_c,))[1:]

    partial_ptr += (b * tl.num_programs(1) + tl.program_id(1)) * (W + 1) * c + c_c
    for k in tl.static_range(W): tl.store(partial_ptr + k * c, dtaps[k], mask=ok_c)
    tl.store(partial_ptr + W * c, dbias_c, mask=ok_c)


# --- documents, and the function

def _tape(doc_bt: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """(order, reach), int32 [b, t]: the row at each place of the tape (real tokens first), and how far the token there may look back.

    Two documents, w = 4:   5 5 -1 6 -> order 0 1 3 2, reach 3 3 0 -1. The first document looks into the window.
    """
    t, real_bt = doc_bt.shape[1], doc_bt >= 0
    row_bt = torch.arange(t, device=doc_bt.device).expand_as(doc_bt)
    upto_bt = real_bt.cumsum(1)                                     # real tokens up to and with this one
    place_bt = torch.where(real_bt, upto_bt - 1, upto_bt[:, -1:] + row_bt - upto_bt)
    order_bt = torch.empty_like(place_bt).scatter_(1, place_bt, row_bt)
    doc_bt = doc_bt.gather(1, order_bt)                             # from here on in the order of the tape
    opens_bt = F.pad(doc_bt[:, 1:] != doc_bt[:, :-1], (1, 0))
    start_bt = torch.where(opens_bt, row_bt, 1 - w).cummax(1).values
    reach_bt = (row_bt - start_bt).clamp(max=w - 1).masked_fill(doc_bt < 0, -1)
    return order_bt.int(), reach_bt.int()


def _next_window(x_btc: Tensor, window: Tensor, order_bt: Tensor | None, reach_bt: Tensor | None) -> Tensor:
    """The last w - 1 inputs of the tape [b, w-1, c], never a view of x. Plain PyTorch: it is a few rows, and has its gradient by itself."""
    w, t = window.shape[1] + 1, x_btc.shape[1]
    if order_bt is None: return torch.cat([window, x_btc[:, max(t - (w - 1), 0):]], 1)[:, -(w - 1):] if w > 1 else window
    count_b1 = (reach_bt >= 0).sum(1, keepdim=True)
    back_w = torch.arange(w - 2, -1, -1, device=x_btc.device)       # oldest first
    place_bw = count_b1 - 1 - back_w                                # negative: in the window
    take = lambda z, row_bw: z.gather(1, row_bw[..., None].expand(-1, -1, z.shape[-1]))
    from_x = take(x_btc, order_bt.gather(1, place_bw.clamp(min=0)).long())
    from_window = take(window, (place_bw + w - 1).clamp(max=w - 2))
    reach_b1 = reach_bt.gather(1, (count_b1 - 1).clamp(min=0)).masked_fill(count_b1 == 0, w - 1)      # padding only: the window passes through
    return torch.where((place_bw < 0)[..., None], from_window, from_x).masked_fill((back_w > reach_b1)[..., None], 0)


def _launch_values(x_btc: Tensor, w: int, window: Tensor | None, order_bt: Tensor | None, backward: bool) -> tuple[tuple, dict]:
    """(grid, values known at compilation)."""
    (b, t, c), tiles = x_btc.shape, _tiles(backward)
    known = dict(W=w, W2=triton.next_power_of_2(w), ORDERED=order_bt is not None, WINDOW=window is not None,
                 WIDE=tl.float64 if x_btc.dtype == torch.float64 else tl.float32)
    return (triton.cdiv(c, tiles["BLOCK"]), triton.cdiv(t, tiles["STEPS"]), b), known | tiles


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_btc, weight_c1w, bias_c, window, order_bt, reach_bt):
        (b, t, c), w = x_btc.shape, weight_c1w.shape[-1]
        y_btc = torch.empty(b, t, c, dtype=x_btc.dtype, device=x_btc.device)
        if y_btc.numel():
            grid, known = _launch_values(x_btc, w, window, order_bt, backward=False)
            _forward[grid](x_btc, weight_c1w, bias_c, window, order_bt, reach_bt, y_btc, t, c, *x_btc.stride()[:2], **known)
        ctx.save_for_backward(x_btc, weight_c1w, bias_c, window, order_bt, reach_bt)
        return y_btc

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_btc):
        x_btc, weight_c1w, bias_c, window, order_bt, reach_bt = ctx.saved_tensors
        (b, t, c), w = x_btc.shape, weight_c1w.shape[-1]
        dy_btc = _unit_stride(dy_btc)
        dx_btc = torch.empty(b, t, c, dtype=x_btc.dtype, device=x_btc.device)
        dwindow = None if window is None else torch.zeros_like(window)
        grid, known = _launch_values(x_btc, w, window, order_bt, backward=True)
        wide = torch.float64 if x_btc.dtype == torch.float64 else torch.float32
        partial_rkc = torch.empty(grid[1] * b, w + 1, c, dtype=wide, device=x_btc.device)      # the w taps and the bias of each tile
        if dx_btc.numel():
            _backward[grid](x_btc, weight_c1w, bias_c, window, order_bt, reach_bt, dy_btc, dx_btc, dwindow, partial_rkc, t, c,
                            *x_btc.stride()[:2], *dy_btc.stride()[:2], **known)
        sums_kc = partial_rkc.sum(0)
        return dx_btc, sums_kc[:w].T[:, None].to(weight_c1w.dtype), sums_kc[w].to(bias_c.dtype), dwindow, None, None


def _unit_stride(z: Tensor) -> Tensor:
    """Channels next to each other in memory; rows may be far apart, as in a slice of a projection."""
    return z if z.stride(-1) == 1 else z.contiguous()


def causal_conv1d(x_btc: Tensor, weight_c1w: Tensor, bias_c: Tensor, window: Tensor | None = None,
                  doc_bt: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-> (silu of the convolution [b, t, c], the window for the next call [b, w-1, c]), both in x's dtype."""
    (b, t, c), w = x_btc.shape, weight_c1w.shape[-1]
    importlib.import_module("02_mamba").check_shapes(
        {"weight_c1w": (weight_c1w, (c, 1, w)), "bias_c": (bias_c, (c,)), "window": (window, (b, w - 1, c)), "doc_bt": (doc_bt, (b, t))},
        b=b, t=t, c=c, w=w)
    order_bt, reach_bt = (None, None) if doc_bt is None or t == 0 else _tape(doc_bt, w)
    old = x_btc.new_zeros(b, w - 1, c) if window is None else window.to(x_btc.dtype)
    new = _next_window(x_btc, old, order_bt, reach_bt)
    if window is not None: window = window.contiguous()
    return _CausalConv1d.apply(_unit_stride(x_btc), weight_c1w.contiguous(), bias_c.contiguous(), window, order_bt, reach_bt), new


# --- a decode step

@triton.jit
def _softplus(x):
    """log(1 + exp x), x itself above 20 as in PyTorch. log(1 + e) loses a small e; what the sum has rounded away is put back as a factor."""
    e = tl.exp(tl.where(x > 20.0, 0.0, x))         # a minimum would drop a NaN
    u = 1 + e
    return tl.where(x > 20.0, x, tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1))))


@triton.jit
def _step_sizes(dt_ptr, dt_bias_ptr, real_ptr, out_ptr, r, h_h, low, high, dt_r, dt_t, T: tl.constexpr, H: tl.constexpr):
    bias_h = tl.load(dt_bias_ptr + h_h, mask=h_h < H, other=0).to(tl.float32)
    for i in tl.static_range(T):
        raw_h = tl.load(dt_ptr + r * dt_r + i * dt_t + h_h, mask=h_h < H, other=0).to(tl.float32)
        dt_h = tl.clamp(_softplus(raw_h + bias_h), low, high, propagate_nan=tl.PropagateNan.ALL)
        # PITFALL: after the clamp, whose lower limit may be above 0
        dt_h = tl.where(tl.load(real_ptr + r * T + i) != 0, dt_h, 0.0)
        tl.store(out_ptr + (r * T + i) * H + h_h, dt_h, mask=h_h < H)


@triton.jit
def _conv_step_kernel(x_ptr, dt_ptr, weight_ptr, bias_ptr, dt_bias_ptr, window_ptr, slot_ptr, start_ptr, real_ptr, y_ptr, out_dt_ptr,
                      low, high, x_r, x_t, dt_r, dt_t, C: tl.constexpr, H: tl.constexpr, RING: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
                      W2: tl.constexpr, BLOCK: tl.constexpr):
    CONV: tl.constexpr = (C + BLOCK - 1) // BLOCK
    r, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    if block >= CONV:
        _step_sizes(dt_ptr, dt_bias_ptr, real_ptr, out_dt_ptr, r, (block - CONV) * BLOCK + tl.arange(0, BLOCK), low, high, dt_r, dt_t, T, H)
    else:
        c_c = block * BLOCK + tl.arange(0, BLOCK)
        ok_c, start = c_c < C, tl.load(start_ptr + r)
        ring_ptr = window_ptr + tl.load(slot_ptr + r).to(tl.int64) * (RING * C) + c_c
        taps = _taps(weight_ptr, c_c, C, W, W2, tl.float32)
        bias_c = tl.load(bias_ptr + c_c, mask=ok_c, other=0).to(tl.float32)
        past, new = (), ()
        for k in tl.static_range(W - 1):        # RING is added, because % keeps the sign of a place before the text
            past = past + (tl.load(ring_ptr + (start + k + RING - (W - 1)) % RING * C, mask=ok_c, other=0).to(tl.float32),)
        for i in tl.static_range(T): new = new + (tl.load(x_ptr + r * x_r + i * x_t + c_c, mask=ok_c, other=0),)
        for i in tl.static_range(T):
            tl.store(ring_ptr + (start + i) % RING * C, new[i], mask=ok_c)
            seen = past + (new[i].to(tl.float32),)
            pre_c = _dot(taps, seen, bias_c, W)
            tl.store(y_ptr + (r * T + i) * C + c_c, narrow(pre_c / (1 + tl.exp(-pre_c)), y_ptr.dtype.element_ty), mask=ok_c)
            past = seen[1:]


def conv_step(xBC_rtc: Tensor, dt_rth: Tensor, weight_c1w: Tensor, bias_c: Tensor, dt_bias_h: Tensor, limit: tuple[float, float],
              window_bwc: Tensor, slot_r: Tensor, start_r: Tensor, real_rt: Tensor) -> tuple[Tensor, Tensor]:
    """Same arguments and results as conv_step in 02_mamba.py, for passes that may be taken back: the ring has w - 1 + t cells or more."""
    (r, t, c), (h, w), ring = xBC_rtc.shape, (dt_rth.shape[2], weight_c1w.shape[2]), window_bwc.shape[1]
    if t + w - 1 > ring or not window_bwc.is_contiguous():
        raise ValueError(f"{t} tokens with {w} taps need a contiguous ring of {t + w - 1} cells, not {ring}.")
    xBC_rtc, dt_rth = _unit_stride(xBC_rtc), _unit_stride(dt_rth)
    y_rtc, out_rth = xBC_rtc.new_empty(r, t, c), torch.empty(r, t, h, dtype=torch.float32, device=dt_rth.device)
    block = 128 if r * c < 2**17 else 512       # few rows: more and smaller programs
    if r * t:
        _conv_step_kernel[(triton.cdiv(c, block) + triton.cdiv(h, block), r)](
            xBC_rtc, dt_rth, weight_c1w.contiguous(), bias_c, dt_bias_h, window_bwc, slot_r.contiguous(), start_r.contiguous(), real_rt.contiguous(),
            y_rtc, out_rth, *map(float, limit), *xBC_rtc.stride()[:2], *dt_rth.stride()[:2], C=c, H=h, RING=ring, T=t, W=w,
            W2=triton.next_power_of_2(w), BLOCK=block, num_warps=4)
    return y_rtc, out_rth
