"""Triton twin of 02_mamba.py's chunked scan, forward and backward: the state stays in registers while a program walks over the tokens.

The idea. Inside a chunk of L tokens everything is a matrix product, between chunks only a state S [p, n] moves on (02, section 4):
    y = (C Bᵀ * decay) u + into * (C Sᵀ)          S <- keep * S + (out * u)ᵀ B           u = dt x
The length of a chunk does not change the result, so `chunk` is checked and the kernels take their own.

    forward, many heads: one program a head

        x  │ L×p │ L×p │ L×p │ ..      time ->             scores = C Bᵀ [L, L], masked and faded
        B  │ L×n │ L×n │ L×n │ ..                          y = C Sᵀ * into + (scores * decay * dt) x + D x
        C  │ L×n │ L×n │ L×n │ ..                          S [p, n] in fp32 registers from the first chunk to the last
             └─S──>└─S──>└─S──> state

        A program's chunks wait for each other, so its time is what it waits for. Triton's pipeline has the copy engine (TMA) bring the next chunk's
        x, B and C into shared memory while S takes in this chunk. fp32, and inputs that do not lie as the engine needs them, go by pointers.

    forward, few heads: not enough programs to fill a GPU, so time is cut too: 1. what every chunk adds to the state, all at once;
        2. the short walk over chunks that adds these up; 3. the outputs of every chunk, all at once.
        A sequence on several GPUs takes these steps too: between 1 and 2 the ranks exchange what their pieces add up to, and 2 starts from what
        lies before. On the way back the same exchange, reversed, gives dS at the piece's end.
    backward: the same walk (or the same three steps) from the last chunk to the first gives dS at the end of every chunk. Then one program a
        chunk and group loops over the group's heads, so that sums over heads gather in registers, and no head writes its own. In two kernels,
        for one that does it all has more live tiles than registers:
            what tokens read     x, dy, S  -> dC [L, n], the gradient of C Bᵀ [L, L]        y_t = into_t S C_t + ..
            what tokens wrote    x, dy, dS -> dB [L, n], dx of every head                   du_s = out_s dS B_s + ..
        The gradient of the running sums needs <dS, S> as well: the second kernel reads S for it, one head ahead.

The steps (running sums of dt A, their exponentials, borders of documents, padding) are worked out once in a small kernel. A document's
border makes entries of decay, into, out or keep 0; padding has dt = 0 and its x and dy are read as 0.

What must move at Ultra's layer (t 8192, h 256, p 64, g 8, n 128, bf16): x and y 2 × 268 MB, B and C 2 × 17 MB; but every head reads B and C from
the L2 cache, 512 bytes a token beside 256 for its own x and y. Products at L = 64: 2·(2 p n + L p + L n) FLOPs a
head and token, 120 GFLOP. A gradient keeps the state of every chunk: 537 MB in bf16. The backward pass moves 3.7 GB (the walk 0.8, the kernels
of what was read and written 1.1 and 1.8) and multiplies 206 GFLOP.

Measured on an H200 (Triton 3.6, torch 2.11): forward 0.381 ms (mamba_ssm 1.115 in the same run), at Nano's layer 0.381; forward and backward 2.15.
Tried, forward: pointers in place of descriptors 0.470 (64-bit addresses fill the registers, and others spill); two heads a program, scores from a
kernel of their own, chunks of 128: 0.67 and more. Tried, both: one backward kernel in place of two, which spills, 2.97; <dS, S> on the diagonal of
a product 2.18, S for it loaded when needed 2.27.

Precision: products take operands in the inputs' dtype (fp32 exactly, without TF32) and sum in fp32; S is rounded for the product that reads it,
never where it is carried. float64 is computed in fp32: the tensor cores' fp64 products are not worth a second set of tiles.
NOTE: nothing here reads a value back to the host, and sums have a fixed order: equal inputs give equal bits.
Sources: [M2] Dao & Gu 2024, the SSD algorithm; 02_mamba.py, whose backward pass states the rule for the gradient of the decays.
"""
from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.interpreter import INTERPRETED, dot, narrow

mamba = importlib.import_module("02_mamba")

LOG2E = tl.constexpr(1.4426950408889634)        # the kernels keep running sums in powers of two: exp2 is one instruction, exp is two


def _tiles(b: int, t: int, h: int, g: int, p: int, n: int, size: int) -> dict:
    """Launch parameters by shape; size: bytes of an element of x. All that a sweep may want to replace."""
    j, big = h // g, triton.next_power_of_2(p) * triton.next_power_of_2(n) > 32 * 64
    # fp32 has no tensor core here: its products are unrolled into multiply-adds, and longer chunks spill registers by the thousand
    chunk = min(64 if size < 4 else 16 if big else 32, max(16, triton.next_power_of_2(t)))
    programs, splits = b * g * triton.cdiv(t, chunk), 1
    while programs * splits < 132 and j % (2 * splits) == 0: splits *= 2
    wide, stages = triton.next_power_of_2(p) * triton.next_power_of_2(n) > 64 * 128 or (size == 4 and big), 2 if size < 4 else 1
    deep = 3 if size < 4 and not wide else 1                                                # the next head's tiles come while one is worked on
    return dict(chunk=chunk, walk=b * h >= 96,                                              # walk: one program a head, not three steps
                scan=dict(TMA=size < 4, num_warps=8 if wide else 4, num_stages=stages), back=dict(num_warps=8, num_stages=deep),
                add=dict(num_warps=8 if wide else 4, num_stages=1), outputs=dict(num_warps=8 if wide else 4, num_stages=1),
                grads_read=dict(num_warps=8, num_stages=deep), grads_write=dict(num_warps=8, num_stages=deep), splits=splits)


# --- the steps: from dt [b, t, h] to what the chunks need, [b, h, 4, t padded to whole chunks] in fp32: cs, dt, into, out

@triton.jit
def _steps(dt_ptr, A_ptr, segment_ptr, seen_ptr, steps_ptr, keep_ptr, dt_b, dt_t, dt_h, t, h, L: tl.constexpr, H: tl.constexpr, DOCS: tl.constexpr):
    """cs is in powers of two. seen: a token's segment, -1 for padding; segment: the same with padding given its neighbour's."""
    c, b, chunks = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    i, head = tl.arange(0, L), tl.program_id(2) * H + tl.arange(0, H)
    token, here, long = c * L + i, head < h, chunks * L
    real = token < t
    if DOCS: real = tl.load(seen_ptr + b * long + token) >= 0
    dt = tl.load(dt_ptr + b * dt_b + token[:, None].to(tl.int64) * dt_t + head[None, :] * dt_h, mask=real[:, None] & here[None, :], other=0.0)
    A = tl.load(A_ptr + head, mask=here, other=0.0)
    cs = tl.cumsum(dt * (A * LOG2E)[None, :], 0)
    # NOTE: the end is taken out of cs, not summed again: with a sum of thousands, cs_L - cs_L must still be 0
    end = tl.sum(tl.where((i == L - 1)[:, None], cs, 0.0), 0)
    into, out, keep = tl.exp2(cs), tl.exp2(end[None, :] - cs), tl.exp2(end)
    if DOCS:
        segment = tl.load(segment_ptr + b * long + token)
        before = tl.load(segment_ptr + b * long + tl.maximum(c * L - 1, 0)) * (c > 0)
        last = tl.load(segment_ptr + b * long + c * L + L - 1)
        into = tl.where(((segment == before) & real)[:, None], into, 0.0)
        out = tl.where((segment == last)[:, None], out, 0.0)
        keep = tl.where(last == before, keep, 0.0)
    at = steps_ptr + (b * h + head[None, :]) * 4 * long + token[:, None]
    tl.store(at, cs, mask=here[None, :])
    tl.store(at + long, dt, mask=here[None, :])
    tl.store(at + 2 * long, into, mask=here[None, :])
    tl.store(at + 3 * long, out, mask=here[None, :])
    tl.store(keep_ptr + (b * h + head) * chunks + c, keep, mask=here)


@triton.jit
def _steps_backward(dsteps_ptr, ends_ptr, dt_ptr, A_ptr, seen_ptr, ddt_ptr, dA_ptr, dD_ptr, dt_b, dt_t, dt_h, t, h, L: tl.constexpr,
                    H: tl.constexpr, P: tl.constexpr, DOCS: tl.constexpr):
    """dt A of a token is part of every later cs of its chunk: sum the gradient of cs from behind. dA_ptr and dD_ptr take a partial sum a chunk.

    The gradient of cs: <dy, y - D x> at the reader, -<du, u> at the one that is read, <dS, S> of the chunk's end at its last token.
    """
    c, b, chunks = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    i, head = tl.arange(0, L), tl.program_id(2) * H + tl.arange(0, H)
    token, here, long = c * L + i, head < h, chunks * L
    real = token < t
    if DOCS: real = tl.load(seen_ptr + b * long + token) >= 0
    at = dsteps_ptr + (b * h + head[None, :]) * 4 * long + token[:, None]
    dyy, dux = tl.load(at, mask=here[None, :], other=0.0), tl.load(at + long, mask=here[None, :], other=0.0)
    far, dyx = tl.load(at + 2 * long, mask=here[None, :], other=0.0), tl.load(at + 3 * long, mask=here[None, :], other=0.0)
    end = tl.load(ends_ptr + ((b * h + head[:, None]) * chunks + c) * P + tl.arange(0, P)[None, :], mask=here[:, None], other=0.0)
    dt = tl.load(dt_ptr + b * dt_b + token[:, None].to(tl.int64) * dt_t + head[None, :] * dt_h, mask=real[:, None] & here[None, :], other=0.0)
    A = tl.load(A_ptr + head, mask=here, other=0.0)
    end = tl.sum(end, 1) + tl.sum(far * dt, 0)
    da = tl.cumsum(dyy - dt * (dux + far) + tl.where((i == L - 1)[:, None], end[None, :], 0.0), 0, reverse=True)
    ddt = tl.where(real[:, None], dux + far + A[None, :] * da, 0.0)       # a padding token's dt counts as 0, whatever it is
    tl.store(ddt_ptr + (b * t + token[:, None]) * h + head[None, :], ddt, mask=(token < t)[:, None] & here[None, :])
    tl.store(dA_ptr + (b * chunks + c) * h + head, tl.sum(da * dt, 0), mask=here)
    tl.store(dD_ptr + (b * chunks + c) * h + head, tl.sum(dyx, 0), mask=here)


# --- pieces

@triton.jit
def _mask(rows, width: tl.constexpr, WIDTH: tl.constexpr):
    """Which entries of a tile are there: None is all, so that the common sizes carry no masks (they cost registers)."""
    mask = None
    if rows is not None: mask = rows[:, None]
    if width < WIDTH:
        col = (tl.arange(0, WIDTH) < width)[None, :]
        mask = col if rows is None else rows[:, None] & col
    return mask


@triton.jit
def _tile(ptr, row_stride, rows, width: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr):
    """[R, WIDTH] tile of a matrix with contiguous rows; 0 where `rows` is false and beyond `width`."""
    ptr += tl.arange(0, R)[:, None] * row_stride + tl.arange(0, WIDTH)[None, :]
    mask = _mask(rows, width, WIDTH)
    return tl.load(ptr) if mask is None else tl.load(ptr, mask=mask, other=0.0)


@triton.jit
def _put(ptr, row_stride, rows, tile, width: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr):
    at = ptr + tl.arange(0, R)[:, None] * row_stride + tl.arange(0, WIDTH)[None, :]
    tl.store(at, narrow(tile, ptr.dtype.element_ty), mask=_mask(rows, width, WIDTH))


@triton.jit
def _rows_of(p: tl.constexpr, P: tl.constexpr):
    """The rows of a state that are there, or None when all P are."""
    rows = None
    if p < P: rows = tl.arange(0, P) < p
    return rows


@triton.jit
def _tokens(seen_ptr, lo, t, L: tl.constexpr, DOCS: tl.constexpr):
    """Of the chunk that starts at token lo: which tokens lie inside the sequence, which of them are no padding, and their segments."""
    token = lo + tl.arange(0, L)
    inside = token < t
    real, seen = inside, token
    if DOCS:
        seen = tl.load(seen_ptr + token)
        real = seen >= 0
    return inside, real, seen


@triton.jit
def _outputs_of(x, C, scores, ST, D, cs, dt, into, seen, L: tl.constexpr, DOCS: tl.constexpr):
    """y [t, p] of one head in one chunk, from the state before it, transposed: [n, p]."""
    i = tl.arange(0, L)
    visible = i[:, None] >= i[None, :]
    if DOCS: visible &= seen[:, None] == seen[None, :]
    # PITFALL: mask before exp2. Above the diagonal cs_t - cs_s is positive: exp2 gives inf, and inf times a mask's 0 is NaN.
    M = scores * tl.exp2(tl.where(visible, cs[:, None] - cs[None, :], float("-inf"))) * dt[None, :]
    # NOTE: the second product does not continue the first one's sums. Triton would lay chained products out with all warps above each other,
    # and with 8 warps half of them would repeat the others' 64 rows.
    return dot(narrow(M, x.dtype), x, None) + dot(C, narrow(ST, C.dtype), None) * into[:, None] + D * x


@triton.jit
def _add(S, x, weight, B):
    """S + (weight * x)ᵀ B: what a chunk adds to the state [p, n]; from dy, into and C, what it adds to the state's gradient."""
    return dot(tl.trans(narrow(x * weight[:, None], B.dtype)), B, S)


# --- forward, many heads

@triton.jit
def _fetch(described, b, lo, head, L: tl.constexpr, W: tl.constexpr):
    """[L, W] tile of a described [b, t, h, w]; 0 beyond its ends. The copy engine (TMA) works out the addresses: no thread holds any."""
    return described.load([b.to(tl.int32), lo, head.to(tl.int32), 0]).reshape(L, W)


@triton.jit
def _send(described, b, at, head, tile, ROWS: tl.constexpr, P: tl.constexpr, W: tl.constexpr):
    """The other way, a block [1, ROWS, P, W]; what lies beyond the ends is not written."""
    described.store([b.to(tl.int32), at.to(tl.int32), head.to(tl.int32), 0], narrow(tile, described.dtype).reshape(1, ROWS, P, W))


@triton.jit
def _scan(x_ptr, B_ptr, C_ptr, D_ptr, steps_ptr, keep_ptr, seen_ptr, first_ptr, y_ptr, states_ptr, last_ptr, x_b, x_t, x_h,
          B_b, B_t, B_g, C_b, C_t, C_g, t, chunks, h, j, p: tl.constexpr, n: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
          DOCS: tl.constexpr, KEEP: tl.constexpr, TMA: tl.constexpr):
    """One program walks with one head from the first chunk to the last.

    TMA: x, B, C, y and states come as descriptors. By pointers, the addresses of a thread's pieces of the five tiles fill so many registers that
    others are spilled, and a spilled register comes back behind all loads and stores in flight. A described state is sent when a chunk ends, not
    when the next one starts: there its rounded copy would be held beside everything else.
    """
    bh, i = tl.program_id(0).to(tl.int64), tl.arange(0, L)
    b, head, long = bh // h, bh % h, chunks * L
    if not TMA:
        x_ptr += b * x_b + head * x_h
        y_ptr += (b * t * h + head) * p
        B_ptr += b * B_b + head // j * B_g
        C_ptr += b * C_b + head // j * C_g
        states_ptr += (b * chunks * h + head) * p * n
    steps_ptr += bh * 4 * long + i
    keep_ptr += bh * chunks
    seen_ptr += b * long
    row = _rows_of(p, P)
    S, D = _tile(first_ptr + bh * p * n, n, row, n, N, P), tl.load(D_ptr + head)
    if KEEP and TMA: _send(states_ptr, b, head, head * 0, S, 1, P, N)
    for c in range(chunks):
        inside, real, seen = _tokens(seen_ptr, c * L, t, L, DOCS)
        into, dt, out, keep = tl.load(steps_ptr + 2 * long), tl.load(steps_ptr + long), tl.load(steps_ptr + 3 * long), tl.load(keep_ptr)
        weight = dt * out
        if TMA:
            x, B, C = _fetch(x_ptr, b, c * L, head, L, P), _fetch(B_ptr, b, c * L, head // j, L, N), _fetch(C_ptr, b, c * L, head // j, L, N)
            if DOCS: x = tl.where(real[:, None], x, 0.0).to(x.dtype)
        else: x, B, C = _tile(x_ptr, x_t, real, p, P, L), _tile(B_ptr, B_t, inside, n, N, L), _tile(C_ptr, C_t, inside, n, N, L)
        y = _outputs_of(x, C, dot(C, tl.trans(B), None), tl.trans(S), D, tl.load(steps_ptr), dt, into, seen, L, DOCS)
        if TMA: _send(y_ptr, b, tl.cast(c * L, tl.int32), head, y, L, 1, P)
        # NOTE: this always holds. Triton's pipeline asks for the next chunk's tiles after a loop's straight code and before its branches: work in a
        # branch fills the time until they arrive.
        if c < chunks:
            if not TMA:
                _put(y_ptr, h * p, inside, y, p, P, L)
                if KEEP: _put(states_ptr, n, row, S, n, N, P)
            S = _add(S * keep, x, weight, B)
        if KEEP and TMA: _send(states_ptr, b, (c + 1) * h + head, head * 0, S, 1, P, N)    # the last one lies outside
        if not TMA:
            x_ptr += L * x_t
            y_ptr += L * h * p
            B_ptr += L * B_t
            C_ptr += L * C_t
            states_ptr += h * p * n
        steps_ptr += L
        keep_ptr += 1
    _put(last_ptr + bh * p * n, n, row, S, n, N, P)


# --- forward, few heads: three kernels; the first two also serve the backward pass

@triton.jit
def _additions(x_ptr, B_ptr, steps_ptr, seen_ptr, added_ptr, x_b, x_t, x_h, B_b, B_t, B_g, t, h, j, p: tl.constexpr, n: tl.constexpr,
               P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, DOCS: tl.constexpr, BACK: tl.constexpr):
    """1. What every chunk adds to the state (BACK: to its gradient, from dy and C in the places of x and B), fp32 [b, chunks, h, p, n]."""
    c, b, chunks = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    head, long, i = tl.program_id(0), chunks * L, tl.arange(0, L)
    inside, real, seen = _tokens(seen_ptr + b * long, tl.program_id(1) * L, t, L, DOCS)
    x = _tile(x_ptr + b * x_b + c * L * x_t + head * x_h, x_t, real, p, P, L)
    B = _tile(B_ptr + b * B_b + c * L * B_t + head // j * B_g, B_t, inside, n, N, L)
    steps_ptr += (b * h + head) * 4 * long + c * L + i
    weight = tl.load(steps_ptr + 2 * long) if BACK else tl.load(steps_ptr + long) * tl.load(steps_ptr + 3 * long)
    _put(added_ptr + ((b * chunks + c) * h + head) * p * n, n, _rows_of(p, P), _add(tl.zeros([P, N], tl.float32), x, weight, B), n, N, P)


@triton.jit
def _accumulate(added_ptr, keep_ptr, first_ptr, states_ptr, last_ptr, chunks, h, size, BLOCK: tl.constexpr, BACK: tl.constexpr,
                STORE: tl.constexpr = True):
    """2. The walk, one number of the state a thread; leaves the state before every chunk (BACK: the gradient after it, last chunk first), and
    without STORE the last one only."""
    bh, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, here = (bh // h * chunks * h + bh % h) * size, i < size
    S = tl.load(first_ptr + bh * size + i, mask=here, other=0.0)
    for k in range(chunks):
        c = chunks - 1 - k if BACK else k
        at = start + tl.cast(c, tl.int64) * h * size + i
        if STORE: tl.store(states_ptr + at, narrow(S, states_ptr.dtype.element_ty), mask=here)
        S = S * tl.load(keep_ptr + bh * chunks + c) + tl.load(added_ptr + at, mask=here, other=0.0)
    tl.store(last_ptr + bh * size + i, S, mask=here)


@triton.jit
def _outputs(x_ptr, B_ptr, C_ptr, D_ptr, steps_ptr, seen_ptr, states_ptr, y_ptr, x_b, x_t, x_h, B_b, B_t, B_g, C_b, C_t, C_g, t, h, j,
             p: tl.constexpr, n: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, DOCS: tl.constexpr):
    """3. y of one head in one chunk."""
    c, b, chunks = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    head, long = tl.program_id(0), chunks * L
    inside, real, seen = _tokens(seen_ptr + b * long, tl.program_id(1) * L, t, L, DOCS)
    x = _tile(x_ptr + b * x_b + c * L * x_t + head * x_h, x_t, real, p, P, L)
    B = _tile(B_ptr + b * B_b + c * L * B_t + head // j * B_g, B_t, inside, n, N, L)
    C = _tile(C_ptr + b * C_b + c * L * C_t + head // j * C_g, C_t, inside, n, N, L)
    S = _tile(states_ptr + ((b * chunks + c) * h + head) * p * n, n, _rows_of(p, P), n, N, P)
    steps_ptr += (b * h + head) * 4 * long + c * L + tl.arange(0, L)
    cs, dt, into = tl.load(steps_ptr), tl.load(steps_ptr + long), tl.load(steps_ptr + 2 * long)
    y = _outputs_of(x, C, dot(C, tl.trans(B), None), tl.trans(S), tl.load(D_ptr + head), cs, dt, into, seen, L, DOCS)
    _put(y_ptr + ((b * t + c * L) * h + head) * p, h * p, inside, y, p, P, L)


# --- backward

@triton.jit
def _scan_backward(dy_ptr, C_ptr, steps_ptr, keep_ptr, seen_ptr, dlast_ptr, dstates_ptr, dfirst_ptr, dy_b, dy_t, dy_h, C_b, C_t, C_g,
                   t, chunks, h, j, p: tl.constexpr, n: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, DOCS: tl.constexpr):
    """As _scan, from the last chunk to the first, for the gradient of the state alone. It writes that of the state after every chunk."""
    bh, i = tl.program_id(0).to(tl.int64), tl.arange(0, L)
    b, head, long, end = bh // h, bh % h, chunks * L, tl.cast(chunks - 1, tl.int64)
    dy_ptr += b * dy_b + head * dy_h + end * L * dy_t
    C_ptr += b * C_b + head // j * C_g + end * L * C_t
    dstates_ptr += ((b * chunks + end) * h + head) * p * n
    into_ptr = steps_ptr + bh * 4 * long + 2 * long + end * L + i
    keep_ptr += bh * chunks + end
    row = _rows_of(p, P)
    dS, keep = _tile(dlast_ptr + bh * p * n, n, row, n, N, P), tl.load(keep_ptr)
    dy_next, into_next = _tile(dy_ptr, dy_t, i + end * L < t, p, P, L), tl.load(into_ptr)
    for k in range(chunks):
        inside, real, seen = _tokens(seen_ptr + b * long, (chunks - 1 - k) * L, t, L, DOCS)
        hop = tl.minimum(chunks - 1 - k, 1)
        keep_next = tl.load(keep_ptr - hop)
        # dy and into come one chunk ahead, in registers; the first chunk's next one is itself: harmless, and nothing lies beyond the end
        dy, into = tl.where(real[:, None], dy_next, 0.0).to(dy_next.dtype) if DOCS else dy_next, into_next
        dy_next = _tile(dy_ptr - tl.cast(hop, tl.int64) * L * dy_t, dy_t, i - hop * L + (chunks - 1 - k) * L < t, p, P, L)
        into_next = tl.load(into_ptr - hop * L)
        C = _tile(C_ptr, C_t, inside, n, N, L)
        before = _add(dS * keep, dy, into, C)
        _put(dstates_ptr, n, row, dS, n, N, P)
        dS, keep = before, keep_next
        dy_ptr -= L * dy_t
        C_ptr -= L * C_t
        dstates_ptr -= h * p * n
        into_ptr -= L
        keep_ptr -= 1
    _put(dfirst_ptr + bh * p * n, n, row, dS, n, N, P)


@triton.jit
def _plus(a, b, c, d):
    """Two sums at once: warps that sum one tile must wait for each other, and wait once for both."""
    return a + c, b + d


@triton.jit
def _grads_read(x_ptr, dy_ptr, B_ptr, C_ptr, steps_ptr, seen_ptr, states_ptr, pair_ptr, dC_ptr, dsteps_ptr, x_b, x_t, x_h, dy_b, dy_t, dy_h,
                B_b, B_t, B_g, C_b, C_t, C_g, t, h, j, g, p: tl.constexpr, n: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
                DOCS: tl.constexpr, SPLITS: tl.constexpr):
    """One chunk, one group (or a SPLITS-th of its heads), what its tokens read: dC, the gradient of C Bᵀ, and sums of rows for dt, A and D.

    Matrices lie as [t, s], token t reads the earlier token s, and are written transposed. A sum over a tile makes warps wait for each other:
    sums in the same direction share one wait.
    """
    c, b, chunks = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(0)
    group, split, long, i = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS, chunks * L, tl.arange(0, L)
    head = group * j + split * (j // SPLITS)
    inside, real, seen = _tokens(seen_ptr + b * long, tl.program_id(0) * L, t, L, DOCS)
    row = _rows_of(p, P)
    visible = i[:, None] >= i[None, :]
    if DOCS: visible &= seen[:, None] == seen[None, :]
    B = _tile(B_ptr + b * B_b + c * L * B_t + group * B_g, B_t, inside, n, N, L)
    C = _tile(C_ptr + b * C_b + c * L * C_t + group * C_g, C_t, inside, n, N, L)
    scores, dscores, dC = dot(C, tl.trans(B), None), tl.zeros([L, L], tl.float32), tl.zeros([L, N], tl.float32)

    x_ptr += b * x_b + c * L * x_t + head * x_h
    dy_ptr += b * dy_b + c * L * dy_t + head * dy_h
    states_ptr += ((b * chunks + c) * h + head) * p * n
    steps_ptr += (b * h + head) * 4 * long + c * L + i
    dsteps_ptr += (b * h + head) * 4 * long + c * L + i
    cs, dt, into = tl.load(steps_ptr), tl.load(steps_ptr + long), tl.load(steps_ptr + 2 * long)
    for k in range(j // SPLITS):
        x, dy, S = _tile(x_ptr, x_t, real, p, P, L), _tile(dy_ptr, dy_t, real, p, P, L), _tile(states_ptr, n, row, n, N, P)
        # the next head's steps have this head's time to come; the last head loads its own again
        steps_ptr += tl.where(k + 1 < j // SPLITS, 4 * long, 0)
        cs_next, dt_next, into_next = tl.load(steps_ptr), tl.load(steps_ptr + long), tl.load(steps_ptr + 2 * long)
        # inside the chunk; on the diagonal, where nothing fades, lies <dy, x> for D
        dM = dot(dy, tl.trans(x), None) * tl.exp2(tl.where(visible, cs[:, None] - cs[None, :], float("-inf")))
        diagonal = tl.where(i[:, None] == i[None, :], dM, 0.0)
        dscores += dM * dt[None, :]
        dM *= scores
        tl.store(dsteps_ptr + long, tl.sum(dM, 0))
        # from the state: y_t = into_t S C_t. The sums run over S C_t and dy [L, p]: over C and its gradient [L, n] they would be twice as long
        near, old = dM * dt[None, :], dot(C, tl.trans(S), None) * dy * into[:, None]
        if L == P: dyy, dyx = tl.reduce((near + old, diagonal), 1, _plus)
        else: dyy, dyx = tl.sum(near, 1) + tl.sum(old, 1), tl.sum(diagonal, 1)
        tl.store(dsteps_ptr, dyy)
        tl.store(dsteps_ptr + 3 * long, dyx)
        dC = dot(narrow(dy * into[:, None], S.dtype), S, dC)
        cs, dt, into = cs_next, dt_next, into_next
        x_ptr += x_h
        dy_ptr += dy_h
        states_ptr += p * n
        dsteps_ptr += 4 * long
    pair_ptr += (((b * chunks + c) * g + group) * SPLITS + split) * 2 * L * L
    _put(pair_ptr, L, None, tl.trans(scores), L, L, L)
    _put(pair_ptr + L * L, L, None, tl.trans(dscores), L, L, L)
    dC_ptr += (((split * tl.num_programs(2) + b) * t + c * L) * g + group) * n
    _put(dC_ptr, g * n, inside, dot(narrow(dscores, B.dtype), B, dC), n, N, L)


@triton.jit
def _grads_write(x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, steps_ptr, keep_ptr, seen_ptr, states_ptr, dstates_ptr, pair_ptr, dx_ptr, dB_ptr, dsteps_ptr,
                 ends_ptr, x_b, x_t, x_h, dy_b, dy_t, dy_h, B_b, B_t, B_g, C_b, C_t, C_g, t, h, j, g, p: tl.constexpr, n: tl.constexpr,
                 P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, DOCS: tl.constexpr, SPLITS: tl.constexpr):
    """As _grads_read, what its tokens wrote: dx, dB, <du, x> through the state, and <dS, S> of the chunk's end (a sum for every row of S).

    NOTE: Triton's pipeline loads ahead what a product reads, and nothing else. S is read for a sum, so it is loaded a head ahead by hand, into
    registers.
    """
    c, b, chunks = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(0)
    group, split, long, i = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS, chunks * L, tl.arange(0, L)
    head = group * j + split * (j // SPLITS)
    inside, real, seen = _tokens(seen_ptr + b * long, tl.program_id(0) * L, t, L, DOCS)
    row = _rows_of(p, P)
    visible = i[:, None] <= i[None, :]
    if DOCS: visible &= seen[:, None] == seen[None, :]
    pair_ptr += (((b * chunks + c) * g + group) * SPLITS + split) * 2 * L * L
    B = _tile(B_ptr + b * B_b + c * L * B_t + group * B_g, B_t, inside, n, N, L)
    scores, dB = _tile(pair_ptr, L, None, L, L, L), tl.zeros([L, N], tl.float32)

    x_ptr += b * x_b + c * L * x_t + head * x_h
    dy_ptr += b * dy_b + c * L * dy_t + head * dy_h
    dx_ptr += ((b * t + c * L) * h + head) * p
    states_ptr += ((b * chunks + c) * h + head) * p * n
    dstates_ptr += ((b * chunks + c) * h + head) * p * n
    steps_ptr += (b * h + head) * 4 * long + c * L + i
    dsteps_ptr += (b * h + head) * 4 * long + 2 * long + c * L + i
    keep_ptr += (b * h + head) * chunks + c
    ends_ptr += ((b * h + head) * chunks + c) * P + tl.arange(0, P)
    D_ptr += head
    cs, dt, out, keep, D = tl.load(steps_ptr), tl.load(steps_ptr + long), tl.load(steps_ptr + 3 * long), tl.load(keep_ptr), tl.load(D_ptr)
    S_next = _tile(states_ptr, n, row, n, N, P)
    for k in range(j // SPLITS):
        x, dy, dS = _tile(x_ptr, x_t, real, p, P, L), _tile(dy_ptr, dy_t, real, p, P, L), _tile(dstates_ptr, n, row, n, N, P)
        # the next head's steps have this head's time to come; the last head loads its own again
        more = tl.where(k + 1 < j // SPLITS, 1, 0)
        steps_ptr += more * 4 * long
        keep_ptr += more * chunks
        D_ptr += more
        cs_next, dt_next, out_next = tl.load(steps_ptr), tl.load(steps_ptr + long), tl.load(steps_ptr + 3 * long)
        keep_next, D_next = tl.load(keep_ptr), tl.load(D_ptr)
        S = S_next
        states_ptr += more * p * n
        tl.store(ends_ptr, tl.sum(S.to(tl.float32) * dS, 1) * keep)
        S_next = _tile(states_ptr, n, row, n, N, P)
        du = dot(B, tl.trans(dS), None) * out[:, None]
        tl.store(dsteps_ptr, tl.sum(du * x, 1))
        dB = dot(narrow(x * (out * dt)[:, None], dS.dtype), dS, dB)
        M = scores * tl.exp2(tl.where(visible, cs[None, :] - cs[:, None], float("-inf")))
        dx = du * dt[:, None] + D * dy
        dx += dot(narrow(M, dy.dtype), dy, None) * dt[:, None]
        cs, dt, out, keep, D = cs_next, dt_next, out_next, keep_next, D_next
        _put(dx_ptr, h * p, inside, dx, p, P, L)
        x_ptr += x_h
        dy_ptr += dy_h
        dx_ptr += p
        dstates_ptr += p * n
        dsteps_ptr += 4 * long
        ends_ptr += chunks * P
    C = _tile(C_ptr + b * C_b + c * L * C_t + group * C_g, C_t, inside, n, N, L)
    dB_ptr += (((split * tl.num_programs(2) + b) * t + c * L) * g + group) * n
    _put(dB_ptr, g * n, inside, dot(narrow(_tile(pair_ptr + L * L, L, None, L, L, L), C.dtype), C, dB), n, N, L)


# --- the host's side

def _rows(z):
    """Kernels read rows of contiguous features, at any distance from each other."""
    return z if z.stride(-1) == 1 else z.contiguous()


def _count(k: int):
    """NOTE: a loop's bound must not be a constant of the kernel, or every length compiles anew; but Triton 3.6's interpreter, with NumPy 2.4 or
    later, can only loop to a constant."""
    return tl.constexpr(k) if INTERPRETED.value else k


def _sizes(p: int, n: int, chunk: int, doc) -> dict:
    return dict(p=p, n=n, P=max(16, triton.next_power_of_2(p)), N=max(16, triton.next_power_of_2(n)), L=chunk, DOCS=doc is not None)


def _describable(*tensors, P: int, N: int) -> bool:
    """The copy engine takes addresses and distances in multiples of 16 bytes, and blocks of at most 256 elements a side."""
    return max(P, N) <= 256 and all(z.numel() and z.data_ptr() % 16 == 0 and all(k * z.element_size() % 16 == 0 for k in z.stride()[:-1])
                                    for z in tensors)


def _documents(doc_bt, long: int):
    """(segment, seen), int32 [b, long]: segments with padding given its neighbour's, and with padding, and what lies beyond the end, at -1."""
    segment_bt = mamba.segments(doc_bt).int()
    beyond = (0, long - doc_bt.shape[1])
    last = segment_bt[:, -1:].expand(-1, beyond[1])
    return torch.cat([segment_bt, last], 1), F.pad(segment_bt.masked_fill(doc_bt < 0, -1), beyond, value=-1)


def _forward(x, dt, A, B, C, D, S, doc_bt, tiles: dict, for_backward: bool, enter=None):
    """-> y, final state, and what the backward pass needs: steps, keep, seen, states (None without it).

    enter: what the last state would be, had the tokens started from S -> the state that they do start from (not for a walk).
    """
    (b, t, h, p), (g, n), chunk = x.shape, B.shape[2:], tiles["chunk"]
    chunks, sizes = triton.cdiv(t, chunk), _sizes(p, n, chunk, doc_bt)
    steps, keep = (torch.empty(*shape, device=x.device) for shape in ((b, h, 4, chunks * chunk), (b, h, chunks)))
    segment, seen = (keep, keep) if doc_bt is None else _documents(doc_bt, chunks * chunk)
    _steps[(chunks, b, triton.cdiv(h, 16))](dt, A, segment, seen, steps, keep, *dt.stride(), t, h, L=chunk, H=16, DOCS=doc_bt is not None)

    y, last, walk = torch.empty(b, t, h, p, device=x.device, dtype=x.dtype), torch.empty_like(S), tiles["walk"]
    states = torch.empty(b, chunks, h, p, n, device=x.device, dtype=x.dtype) if for_backward or not walk else y
    strides = *x.stride()[:3], *B.stride()[:3]
    if walk:
        plan, L, P, N, of = tiles["scan"], chunk, sizes["P"], sizes["N"], (x, B, C, y, states)
        if plan["TMA"] and _describable(x, B, C, y, states, P=P, N=N):
            heads = (x, P), (B, N), (C, N), (y, P)
            of = [TensorDescriptor(z, list(z.shape), list(z.stride()), [1, L, 1, w]) for z, w in heads] + [states]
            if for_backward:
                by_row = states.flatten(1, 2)
                of[4] = TensorDescriptor(by_row, list(by_row.shape), list(by_row.stride()), [1, 1, P, N])
        else: plan = {**plan, "TMA": False}
        _scan[(b * h,)](*of[:3], D, steps, keep, seen, S, *of[3:], last, *strides, *C.stride()[:3], t, _count(chunks), h, h // g,
                        KEEP=for_backward, **sizes, **plan)
    else:
        added = torch.empty(b, chunks, h, p, n, device=x.device)
        _additions[(h, chunks, b)](x, B, steps, seen, added, *strides, t, h, h // g, BACK=False, **sizes, **tiles["add"])
        accumulate, more = _accumulate[(b * h, triton.cdiv(p * n, 512))], (states, last, _count(chunks), h, p * n)
        if enter is not None:
            accumulate(added, keep, S, *more, BLOCK=512, BACK=False, STORE=False)
            S = enter(last)
        accumulate(added, keep, S, *more, BLOCK=512, BACK=False)
        _outputs[(h, chunks, b)](x, B, C, D, steps, seen, states, y, *strides, *C.stride()[:3], t, h, h // g, **sizes, **tiles["outputs"])
    return y, last, (steps, keep, seen, states) if for_backward else None


def _backward(dy, dlast, x, dt, A, B, C, D, doc_bt, steps, keep, seen, states, tiles: dict, leave=None):
    """-> gradients of x, dt, A, B, C, D and the first state. leave: the way back of `enter`, from the gradient of the state that entered, had
    nobody read the last one -> the last one's gradient."""
    (b, t, h, p), (g, n), chunk, splits = x.shape, B.shape[2:], tiles["chunk"], tiles["splits"]
    chunks, sizes = triton.cdiv(t, chunk), _sizes(p, n, chunk, doc_bt)
    dstates, dfirst, strides = torch.empty_like(states), torch.empty_like(dlast), (*dy.stride()[:3], *C.stride()[:3])
    if tiles["walk"]:
        _scan_backward[(b * h,)](dy, C, steps, keep, seen, dlast, dstates, dfirst, *strides, t, _count(chunks), h, h // g, **sizes, **tiles["back"])
    else:
        added = torch.empty(b, chunks, h, p, n, device=x.device)
        _additions[(h, chunks, b)](dy, C, steps, seen, added, *strides, t, h, h // g, BACK=True, **sizes, **tiles["add"])
        accumulate, more = _accumulate[(b * h, triton.cdiv(p * n, 512))], (dstates, dfirst, _count(chunks), h, p * n)
        if leave is not None:
            accumulate(added, keep, dlast, *more, BLOCK=512, BACK=True, STORE=False)
            dlast = leave(dfirst)
        accumulate(added, keep, dlast, *more, BLOCK=512, BACK=True)

    dx, dsteps = torch.empty(b, t, h, p, device=x.device, dtype=x.dtype), torch.empty(b, h, 4, chunks * chunk, device=x.device)
    dA, dD, ddt, ends = (torch.empty(*shape, device=x.device) for shape in ((b, chunks, h), (b, chunks, h), (b, t, h), (b, h, chunks, sizes["P"])))
    dB, dC = (torch.empty(splits, b, t, g, n, device=x.device, dtype=x.dtype if splits == 1 else torch.float32) for _ in range(2))
    pair, grid = torch.empty(b, chunks, g, splits, 2, chunk, chunk, device=x.device), (chunks, g * splits, b)        # C Bᵀ and its gradient
    common = *x.stride()[:3], *dy.stride()[:3], *B.stride()[:3], *C.stride()[:3], t, h, _count(h // g), g
    _grads_read[grid](x, dy, B, C, steps, seen, states, pair, dC, dsteps, *common, SPLITS=splits, **sizes, **tiles["grads_read"])
    _grads_write[grid](x, dy, B, C, D, steps, keep, seen, states, dstates, pair, dx, dB, dsteps, ends, *common,
                       SPLITS=splits, **sizes, **tiles["grads_write"])
    _steps_backward[(chunks, b, triton.cdiv(h, 16))](dsteps, ends, dt, A, seen, ddt, dA, dD, *dt.stride(), t, h, L=chunk, H=16, P=sizes["P"],
                                                     DOCS=doc_bt is not None, num_warps=2, enable_fp_fusion=False)
    dB, dC = (z[0] if splits == 1 else z.sum(0).to(x.dtype) for z in (dB, dC))
    return dx, ddt, dA.sum((0, 1)), dB, dC, dD.sum((0, 1)), dfirst


class _ChunkedScan(torch.autograd.Function):
    """The scan with a gradient; it keeps its inputs, the steps and the state before every chunk."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, S, doc_bt, tiles):
        y, last, kept = _forward(x, dt, A, B, C, D, S, doc_bt, tiles, for_backward=True)
        ctx.save_for_backward(x, dt, A, B, C, D, doc_bt, *kept)
        ctx.tiles = tiles
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        return *_backward(_rows(dy), dlast.contiguous(), *ctx.saved_tensors, ctx.tiles), None, None


class _ScanAcrossRanks(torch.autograd.Function):
    """A rank's piece of a scan. The state enters when every chunk's addition is known, so that nothing is scanned twice and no output mended."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, log_bh, doc_bt, context, tiles):
        def enter(last):
            ctx.sent = last.detach().requires_grad_()      # the walk overwrites it; pass_state is linear, its gradient does not read it
            with torch.enable_grad(), mamba.full_precision(x): ctx.entered = mamba.pass_state(ctx.sent, log_bh, doc_bt, context)
            return ctx.entered.detach().contiguous()

        nothing = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=torch.float32)
        y, _, kept = _forward(x, dt, A, B, C, D, nothing, doc_bt, tiles, True, enter)
        ctx.save_for_backward(x, dt, A, B, C, D, doc_bt, *kept)
        ctx.tiles = tiles
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        # what read the state after my last token are the ranks behind me: pass_state's own gradient brings theirs back. The decays it used need
        # none from there: with the state that entered and the gradient that came back, the scan's own rule has all of it
        leave = lambda dfirst: torch.autograd.grad(ctx.entered, ctx.sent, dfirst)[0].contiguous()
        return *_backward(_rows(dy), torch.zeros_like(ctx.sent), *ctx.saved_tensors, ctx.tiles, leave)[:6], None, None, None, None


def _check(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, chunk, state_bhpn, doc_bt) -> None:
    """The stage's sentences for arguments that do not fit, without its look at the values."""
    if chunk < 1: raise ValueError(f"chunk={chunk}: a chunk holds at least one token.")
    if x_bthp.dim() != 4 or B_btgn.dim() != 4:
        raise ValueError(f"x is [b, t, h, p] and B is [b, t, g, n]: got {tuple(x_bthp.shape)} and {tuple(B_btgn.shape)}.")
    (b, t, h, p), (g, n) = x_bthp.shape, B_btgn.shape[2:]
    mamba.check_shapes(
        {"dt_bth": (dt_bth, (b, t, h)), "A_h": (A_h, (h,)), "B_btgn": (B_btgn, (b, t, g, n)), "C_btgn": (C_btgn, (b, t, g, n)), "D_h": (D_h, (h,)),
         "state_bhpn": (state_bhpn, (b, h, p, n)), "doc_bt": (doc_bt, (b, t))}, b=b, t=t, h=h, p=p, g=g, n=n)
    if t == 0: raise ValueError("the sequence is empty: pass at least one token.")
    if h % g: raise ValueError(f"{h} heads cannot share B and C in {g} groups: the number of heads must be a multiple of the groups.")


def _arguments(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h) -> tuple:
    """x, dt, A, B, C, D in the dtypes and layouts of the kernels."""
    common = torch.promote_types(torch.promote_types(x_bthp.dtype, B_btgn.dtype), C_btgn.dtype)
    common = torch.float32 if common == torch.float64 else common
    x, B, C = (_rows(z.to(common)) for z in (x_bthp, B_btgn, C_btgn))
    A, D = (z.to(torch.float32).contiguous() for z in (A_h, x_bthp.new_zeros(x_bthp.shape[2]) if D_h is None else D_h))
    return x, dt_bth.to(torch.float32), A, B, C, D


def ssd_chunked(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h=None, chunk: int = 128, state_bhpn=None, doc_bt=None):
    """-> (y_bthp in x's dtype, final state_bhpn in fp32; both fp64 for fp64 inputs, computed in fp32). dt is after softplus and limits; A_h <= 0."""
    _check(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, chunk, state_bhpn, doc_bt)
    (b, t, h, p), (g, n) = x_bthp.shape, B_btgn.shape[2:]
    x, *others = _arguments(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h)
    state_bhpn = x_bthp.new_zeros(b, h, p, n, dtype=torch.float32) if state_bhpn is None else state_bhpn
    arguments = x, *others, state_bhpn.to(torch.float32).contiguous(), doc_bt, _tiles(b, t, h, g, p, n, x.element_size())
    if torch.is_grad_enabled() and any(z.requires_grad for z in arguments[:7]): y, last = _ChunkedScan.apply(*arguments)
    else: y, last, _ = _forward(*arguments, for_backward=False)
    return y.to(x_bthp.dtype), last.to(torch.float64 if x_bthp.dtype == torch.float64 else torch.float32)


def ssd_across_ranks(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, chunk: int, doc_bt, context):
    """-> this rank's piece of y_bthp, in x's dtype. context: 02_mamba.ContextGroup."""
    _check(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, chunk, None, doc_bt)
    (b, t, h, p), (g, n) = x_bthp.shape, B_btgn.shape[2:]
    x, dt, A, *others = _arguments(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h)
    tiles = _tiles(b, t, h, g, p, n, x.element_size()) | dict(walk=False)      # a walk knows its last state when its outputs are written
    with torch.no_grad():
        pad_bt = mamba.padding(doc_bt)
        log_bh = (dt if pad_bt is None else dt.masked_fill(pad_bt[..., None], 0)).sum(1) * A
    return _ScanAcrossRanks.apply(x, dt, A, *others, log_bh, doc_bt, context, tiles).to(x_bthp.dtype)
