"""Triton twin of 02_mamba.py's chunked scan, forward and backward: the state stays in registers while a program walks over the tokens.

The idea. Inside a chunk of L tokens everything is a matrix product, between chunks only a state S [p, n] moves on (02, section 4):
    y = (C Bᵀ * decay) u + into * (C Sᵀ)          S <- keep * S + (out * u)ᵀ B           u = dt x
The length of a chunk does not change the result, so `chunk` is checked and the kernels take their own.

    forward, many heads: one program a head (or two heads of a group, which then share what they read of B and C)

        x  │ L×p │ L×p │ L×p │ ..      time ->             scores = C Bᵀ [L, L], masked and faded
        B  │ L×n │ L×n │ L×n │ ..                          y = C Sᵀ * into + (scores * decay * dt) x + D x
        C  │ L×n │ L×n │ L×n │ ..                          S [p, n] in fp32 registers from the first chunk to the last
             └─S──>└─S──>└─S──> state

    forward, few heads: not enough programs to fill a GPU, so time is cut too: 1. what every chunk adds to the state, all at once;
        2. the short walk over chunks that adds these up; 3. the outputs of every chunk, all at once.
    backward: the same walk (or the same three steps) from the last chunk to the first gives dS at the end of every chunk. Then one program a
        chunk and group loops over the group's heads: dB, dC and the gradient of C Bᵀ gather in registers, so no head writes its own.

The steps (running sums of dt A, their exponentials, borders of documents, padding) are worked out once in a small kernel. A document's
border makes entries of decay, into, out or keep 0; padding has dt = 0 and its x and dy are read as 0.

What must move at Ultra's layer (t 8192, h 256, p 64, g 8, n 128, bf16): x and y 2 × 268 MB, B and C 2 × 17 MB; but every head reads B and C from
the L2 cache, 512 bytes a token beside 256 for its own x and y: two heads a program halve that. Products at L = 64: 2·(2 p n + L p + L n) FLOPs a
head and token, 120 GFLOP. A gradient keeps the state of every chunk: 537 MB in bf16. The backward pass moves 2.7 GB and multiplies 170 GFLOP.

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

LOG2E = tl.constexpr(1.4426950408889634)        # the kernels keep running sums in powers of two: exp2 is one instruction, exp is two


def _tiles(b: int, t: int, h: int, g: int, p: int, n: int, size: int) -> dict:
    """Launch parameters by shape; size: bytes of an element of x. All that a sweep may want to replace."""
    j, big = h // g, triton.next_power_of_2(p) * triton.next_power_of_2(n) > 32 * 64
    # fp32 has no tensor core here: its products are unrolled into multiply-adds, and longer chunks spill registers by the thousand
    chunk = min(64 if size < 4 else 16 if big else 32, max(16, triton.next_power_of_2(t)))
    programs, splits = b * g * triton.cdiv(t, chunk), 1
    while programs * splits < 132 and j % (2 * splits) == 0: splits *= 2
    wide, stages = triton.next_power_of_2(p) * triton.next_power_of_2(n) > 64 * 128 or (size == 4 and big), 2 if size < 4 else 1
    return dict(chunk=chunk, walk=b * h >= 96,                                              # walk: one program a head, not three steps
                scan=dict(HEADS=1, READ=False, num_warps=8 if wide else 4, num_stages=stages),
                back=dict(HEADS=1, num_warps=8 if wide else 4, num_stages=stages),
                add=dict(num_warps=8 if wide else 4, num_stages=1), outputs=dict(num_warps=8 if wide else 4, num_stages=1),
                grads=dict(num_warps=8, num_stages=stages), splits=splits)


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _cast(x, dtype: tl.constexpr):
    """x in dtype, rounded to nearest even. On the way to bf16 the interpreter only cuts: rounded by hand there."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dot(a, b, acc):
    """acc + a b in fp32. The interpreter multiplies bf16 by its bit patterns: widened first there, which is exact."""
    if INTERPRETED: a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="ieee")


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
def _steps_backward(dsteps_ptr, dt_ptr, A_ptr, seen_ptr, ddt_ptr, dA_ptr, dt_b, dt_t, dt_h, t, h, L: tl.constexpr, H: tl.constexpr,
                    DOCS: tl.constexpr):
    """dt A of a token is part of every later cs of its chunk: sum the gradient of cs from behind. dA_ptr takes one partial sum a chunk."""
    c, b, chunks = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    i, head = tl.arange(0, L), tl.program_id(2) * H + tl.arange(0, H)
    token, here, long = c * L + i, head < h, chunks * L
    real = token < t
    if DOCS: real = tl.load(seen_ptr + b * long + token) >= 0
    at = dsteps_ptr + (b * h + head[None, :]) * 2 * long + token[:, None]
    da = tl.cumsum(tl.load(at, mask=here[None, :], other=0.0), 0, reverse=True)
    dux = tl.load(at + long, mask=here[None, :], other=0.0)
    dt = tl.load(dt_ptr + b * dt_b + token[:, None].to(tl.int64) * dt_t + head[None, :] * dt_h, mask=real[:, None] & here[None, :], other=0.0)
    A = tl.load(A_ptr + head, mask=here, other=0.0)
    ddt = tl.where(real[:, None], dux + A[None, :] * da, 0.0)       # a padding token's dt counts as 0, whatever it is
    tl.store(ddt_ptr + (b * t + token[:, None]) * h + head[None, :], ddt, mask=(token < t)[:, None] & here[None, :])
    tl.store(dA_ptr + (b * chunks + c) * h + head, tl.sum(da * dt, 0), mask=here)


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
    tl.store(at, _cast(tile, ptr.dtype.element_ty), mask=_mask(rows, width, WIDTH))


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
def _outputs_of(x, C, scores, S, D, steps_ptr, long, seen, L: tl.constexpr, DOCS: tl.constexpr):
    """y [t, p] of one head in one chunk, from the state S [p, n] before it."""
    i = tl.arange(0, L)
    cs, dt, into = tl.load(steps_ptr + i), tl.load(steps_ptr + long + i), tl.load(steps_ptr + 2 * long + i)
    visible = i[:, None] >= i[None, :]
    if DOCS: visible &= seen[:, None] == seen[None, :]
    # PITFALL: mask before exp2. Above the diagonal cs_t - cs_s is positive: exp2 gives inf, and inf times a mask's 0 is NaN.
    M = scores * tl.exp2(tl.where(visible, cs[:, None] - cs[None, :], float("-inf"))) * dt[None, :]
    # NOTE: the second product does not continue the first one's sums. Triton would lay chained products out with all warps above each other,
    # and with 8 warps half of them would repeat the others' 64 rows.
    return _dot(_cast(M, x.dtype), x, None) + _dot(C, tl.trans(_cast(S, C.dtype)), None) * into[:, None] + D * x


@triton.jit
def _add(S, x, weight, B):
    """S + (weight * x)ᵀ B: what a chunk adds to the state [p, n]; from dy, into and C, what it adds to the state's gradient."""
    return _dot(tl.trans(_cast(x * weight[:, None], B.dtype)), B, S)


# --- scores = C Bᵀ of every chunk and group, [b, chunks, g, L, L]: once, not once a head

@triton.jit
def _scores(B_ptr, C_ptr, scores_ptr, B_b, B_t, B_g, C_b, C_t, C_g, t, n: tl.constexpr, N: tl.constexpr, L: tl.constexpr):
    c, group, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = tl.program_id(0) * L + tl.arange(0, L) < t
    B = _tile(B_ptr + b * B_b + c * L * B_t + group * B_g, B_t, inside, n, N, L)
    C = _tile(C_ptr + b * C_b + c * L * C_t + group * C_g, C_t, inside, n, N, L)
    scores_ptr += ((b * tl.num_programs(0) + c) * tl.num_programs(1) + group) * L * L
    _put(scores_ptr, L, None, _dot(C, tl.trans(B), None), L, L, L)


# --- forward, many heads

@triton.jit
def _advance(x_ptr, x_t, y_ptr, y_t, states_ptr, steps_ptr, keep_ptr, S, D, B, C, scores, inside, real, seen, long,
             p: tl.constexpr, n: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, DOCS: tl.constexpr, KEEP: tl.constexpr):
    """One head, one chunk: writes y (and the state before the chunk), returns the state after it."""
    x, i = _tile(x_ptr, x_t, real, p, P, L), tl.arange(0, L)
    if KEEP: _put(states_ptr, n, _rows_of(p, P), S, n, N, P)
    _put(y_ptr, y_t, inside, _outputs_of(x, C, scores, S, D, steps_ptr, long, seen, L, DOCS), p, P, L)
    return _add(S * tl.load(keep_ptr), x, tl.load(steps_ptr + long + i) * tl.load(steps_ptr + 3 * long + i), B)


@triton.jit
def _scan(x_ptr, B_ptr, C_ptr, D_ptr, steps_ptr, keep_ptr, seen_ptr, scores_ptr, first_ptr, y_ptr, states_ptr, last_ptr, x_b, x_t, x_h,
          B_b, B_t, B_g, C_b, C_t, C_g, t, chunks, h, j, p: tl.constexpr, n: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
          DOCS: tl.constexpr, KEEP: tl.constexpr, READ: tl.constexpr, HEADS: tl.constexpr):
    """One program walks with HEADS (1 or 2) neighbouring heads of one group from the first chunk to the last. READ: scores are in memory."""
    bh = tl.program_id(0).to(tl.int64) * HEADS
    b, head, long = bh // h, bh % h, chunks * L
    x_ptr += b * x_b + head * x_h
    y_ptr += (b * t * h + head) * p
    B_ptr += b * B_b + head // j * B_g
    C_ptr += b * C_b + head // j * C_g
    states_ptr += (b * chunks * h + head) * p * n
    steps_ptr += bh * 4 * long
    keep_ptr += bh * chunks
    seen_ptr += b * long
    scores_ptr += (b * chunks * (h // j) + head // j) * L * L
    row = _rows_of(p, P)
    S, D = _tile(first_ptr + bh * p * n, n, row, n, N, P), tl.load(D_ptr + head)
    if HEADS == 2: S2, D2 = _tile(first_ptr + (bh + 1) * p * n, n, row, n, N, P), tl.load(D_ptr + head + 1)
    for c in range(chunks):
        inside, real, seen = _tokens(seen_ptr, c * L, t, L, DOCS)
        B, C = _tile(B_ptr, B_t, inside, n, N, L), _tile(C_ptr, C_t, inside, n, N, L)
        scores = _tile(scores_ptr, L, None, L, L, L) if READ else _dot(C, tl.trans(B), None)
        S = _advance(x_ptr, x_t, y_ptr, h * p, states_ptr, steps_ptr, keep_ptr, S, D, B, C, scores, inside, real, seen, long,
                     p, n, P, N, L, DOCS, KEEP)
        if HEADS == 2:
            S2 = _advance(x_ptr + x_h, x_t, y_ptr + p, h * p, states_ptr + p * n, steps_ptr + 4 * long, keep_ptr + chunks, S2, D2, B, C, scores,
                          inside, real, seen, long, p, n, P, N, L, DOCS, KEEP)
        x_ptr += L * x_t
        y_ptr += L * h * p
        B_ptr += L * B_t
        C_ptr += L * C_t
        scores_ptr += h // j * L * L
        states_ptr += h * p * n
        steps_ptr += L
        keep_ptr += 1
    _put(last_ptr + bh * p * n, n, row, S, n, N, P)
    if HEADS == 2: _put(last_ptr + (bh + 1) * p * n, n, row, S2, n, N, P)


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
def _accumulate(added_ptr, keep_ptr, first_ptr, states_ptr, last_ptr, chunks, h, size, BLOCK: tl.constexpr, BACK: tl.constexpr):
    """2. The walk, one number of the state a thread; leaves the state before every chunk (BACK: the gradient after it, last chunk first)."""
    bh, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, here = (bh // h * chunks * h + bh % h) * size, i < size
    S = tl.load(first_ptr + bh * size + i, mask=here, other=0.0)
    for k in range(chunks):
        c = chunks - 1 - k if BACK else k
        at = start + tl.cast(c, tl.int64) * h * size + i
        tl.store(states_ptr + at, _cast(S, states_ptr.dtype.element_ty), mask=here)
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
    y = _outputs_of(x, C, _dot(C, tl.trans(B), None), S, tl.load(D_ptr + head), steps_ptr + (b * h + head) * 4 * long + c * L,
                    long, seen, L, DOCS)
    _put(y_ptr + ((b * t + c * L) * h + head) * p, h * p, inside, y, p, P, L)


# --- backward

@triton.jit
def _retreat(dy_ptr, dy_t, dstates_ptr, into_ptr, keep_ptr, dS, C, real, p: tl.constexpr, n: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
             L: tl.constexpr):
    """One head, one chunk: writes the gradient of the state after the chunk, returns that of the state before it."""
    _put(dstates_ptr, n, _rows_of(p, P), dS, n, N, P)
    return _add(dS * tl.load(keep_ptr), _tile(dy_ptr, dy_t, real, p, P, L), tl.load(into_ptr + tl.arange(0, L)), C)


@triton.jit
def _scan_backward(dy_ptr, C_ptr, steps_ptr, keep_ptr, seen_ptr, dlast_ptr, dstates_ptr, dfirst_ptr, dy_b, dy_t, dy_h, C_b, C_t, C_g,
                   t, chunks, h, j, p: tl.constexpr, n: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, DOCS: tl.constexpr,
                   HEADS: tl.constexpr):
    """As _scan, from the last chunk to the first, for the gradient of the state alone."""
    bh = tl.program_id(0).to(tl.int64) * HEADS
    b, head, long, end = bh // h, bh % h, chunks * L, tl.cast(chunks - 1, tl.int64)
    dy_ptr += b * dy_b + head * dy_h + end * L * dy_t
    C_ptr += b * C_b + head // j * C_g + end * L * C_t
    dstates_ptr += ((b * chunks + end) * h + head) * p * n
    into_ptr = steps_ptr + bh * 4 * long + 2 * long + end * L
    keep_ptr += bh * chunks + end
    row = _rows_of(p, P)
    dS = _tile(dlast_ptr + bh * p * n, n, row, n, N, P)
    if HEADS == 2: dS2 = _tile(dlast_ptr + (bh + 1) * p * n, n, row, n, N, P)
    for k in range(chunks):
        inside, real, seen = _tokens(seen_ptr + b * long, (chunks - 1 - k) * L, t, L, DOCS)
        C = _tile(C_ptr, C_t, inside, n, N, L)
        dS = _retreat(dy_ptr, dy_t, dstates_ptr, into_ptr, keep_ptr, dS, C, real, p, n, P, N, L)
        if HEADS == 2: dS2 = _retreat(dy_ptr + dy_h, dy_t, dstates_ptr + p * n, into_ptr + 4 * long, keep_ptr + chunks, dS2, C, real, p, n, P, N, L)
        dy_ptr -= L * dy_t
        C_ptr -= L * C_t
        dstates_ptr -= h * p * n
        into_ptr -= L
        keep_ptr -= 1
    _put(dfirst_ptr + bh * p * n, n, row, dS, n, N, P)
    if HEADS == 2: _put(dfirst_ptr + (bh + 1) * p * n, n, row, dS2, n, N, P)


@triton.jit
def _grads(x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, steps_ptr, keep_ptr, seen_ptr, scores_ptr, states_ptr, dstates_ptr, dx_ptr, dB_ptr, dC_ptr,
           dsteps_ptr, dD_ptr, x_b, x_t, x_h, dy_b, dy_t, dy_h, B_b, B_t, B_g, C_b, C_t, C_g, t, h, j, g, p: tl.constexpr, n: tl.constexpr,
           P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, DOCS: tl.constexpr, SPLITS: tl.constexpr):
    """One chunk, one group (or a SPLITS-th of its heads): all gradients but those of dt and A, for which it leaves the gradient of cs and <du, x>.

    Matrices lie transposed, [s, t]: token s is read by the later token t. Then du = Mᵀ dy takes M's rows straight from registers.
    """
    c, b, chunks = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(0)
    group, split, long, i = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS, chunks * L, tl.arange(0, L)
    head = group * j + split * (j // SPLITS)
    inside, real, seen = _tokens(seen_ptr + b * long, tl.program_id(0) * L, t, L, DOCS)
    row = _rows_of(p, P)
    visible = i[:, None] <= i[None, :]
    if DOCS: visible &= seen[:, None] == seen[None, :]
    B = _tile(B_ptr + b * B_b + c * L * B_t + group * B_g, B_t, inside, n, N, L)
    C = _tile(C_ptr + b * C_b + c * L * C_t + group * C_g, C_t, inside, n, N, L)
    scores_ptr += ((b * chunks + c) * g + group) * L * L
    scores = tl.load(scores_ptr + i[None, :] * L + i[:, None]).to(tl.float32)
    dscores, dB, dC = tl.zeros([L, L], tl.float32), tl.zeros([L, N], tl.float32), tl.zeros([L, N], tl.float32)

    x_ptr += b * x_b + c * L * x_t + head * x_h
    dy_ptr += b * dy_b + c * L * dy_t + head * dy_h
    dx_ptr += ((b * t + c * L) * h + head) * p
    states_ptr += ((b * chunks + c) * h + head) * p * n
    dstates_ptr += ((b * chunks + c) * h + head) * p * n
    steps_ptr += (b * h + head) * 4 * long + c * L + i
    dsteps_ptr += (b * h + head) * 2 * long + c * L + i
    keep_ptr += (b * h + head) * chunks + c
    dD_ptr += (b * chunks + c) * h + head
    D_ptr += head
    for _ in range(j // SPLITS):
        x, dy = _tile(x_ptr, x_t, real, p, P, L), _tile(dy_ptr, dy_t, real, p, P, L)
        S, dS = _tile(states_ptr, n, row, n, N, P), _tile(dstates_ptr, n, row, n, N, P)
        cs, dt, into, out = tl.load(steps_ptr), tl.load(steps_ptr + long), tl.load(steps_ptr + 2 * long), tl.load(steps_ptr + 3 * long)
        # 1. through the state: du_s = out_s dS B_s, dC_t = into_t Sᵀ dy_t, dB_s = out_s dt_s dSᵀ x_s. The elementwise uses of tiles come first:
        # they hold registers until the last of them
        end = tl.sum(S.to(tl.float32) * dS) * tl.load(keep_ptr)
        du = _dot(B, tl.trans(dS), None) * out[:, None]
        far = tl.sum(du * x, 1)
        dx = du * dt[:, None] + tl.load(D_ptr) * dy
        part = _dot(dy, S, None) * into[:, None]
        dC += part
        dcs = tl.sum(part * C, 1)
        dB += _dot(x, dS, None) * (out * dt)[:, None]
        # 2. inside the chunk
        dM = _dot(x, tl.trans(dy), None)
        dD = tl.sum(tl.where(i[:, None] == i[None, :], dM, 0.0))
        fade = tl.exp2(tl.where(visible, cs[None, :] - cs[:, None], float("-inf")))
        dM *= fade
        dscores += dM * dt[:, None]
        dM *= scores
        dcs += tl.sum(dM * dt[:, None], 0)
        dux = tl.sum(dM, 1) + far
        dx += _dot(_cast(scores * fade, dy.dtype), dy, None) * dt[:, None]
        _put(dx_ptr, h * p, inside, dx, p, P, L)
        # 3. the gradient of cs: <dy, y> at the reader, -<du, u> at the one that is read, <dS, S> at the chunk's end
        end += tl.sum(far * dt)
        tl.store(dsteps_ptr, dcs - dt * dux + tl.where(i == L - 1, end, 0.0))
        tl.store(dsteps_ptr + long, dux)
        tl.store(dD_ptr, dD)
        x_ptr += x_h
        dy_ptr += dy_h
        dx_ptr += p
        states_ptr += p * n
        dstates_ptr += p * n
        steps_ptr += 4 * long
        dsteps_ptr += 2 * long
        keep_ptr += chunks
        dD_ptr += 1
        D_ptr += 1
    dB = _dot(_cast(dscores, C.dtype), C, dB)
    dC = _dot(tl.trans(_cast(dscores, B.dtype)), B, dC)
    at = (((split * tl.num_programs(2) + b) * t + c * L) * g + group) * n
    _put(dB_ptr + at, g * n, inside, dB, n, N, L)
    _put(dC_ptr + at, g * n, inside, dC, n, N, L)


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


def _documents(doc_bt, long: int):
    """(segment, seen), int32 [b, long]: segments with padding given its neighbour's, and with padding, and what lies beyond the end, at -1."""
    segment_bt = importlib.import_module("02_mamba").segments(doc_bt).int()
    beyond = (0, long - doc_bt.shape[1])
    last = segment_bt[:, -1:].expand(-1, beyond[1])
    return torch.cat([segment_bt, last], 1), F.pad(segment_bt.masked_fill(doc_bt < 0, -1), beyond, value=-1)


def _all_scores(B, C, chunks: int, chunk: int, n: int):
    b, t, g, _ = B.shape
    scores = torch.empty(b, chunks, g, chunk, chunk, device=B.device)
    _scores[(chunks, g, b)](B, C, scores, *B.stride()[:3], *C.stride()[:3], t, n=n, N=max(16, triton.next_power_of_2(n)), L=chunk)
    return scores


def _forward(x, dt, A, B, C, D, S, doc_bt, tiles: dict, for_backward: bool):
    """-> y, final state, and what the backward pass needs: steps, keep, seen, states (None without it)."""
    (b, t, h, p), (g, n), chunk = x.shape, B.shape[2:], tiles["chunk"]
    chunks, sizes = triton.cdiv(t, chunk), _sizes(p, n, chunk, doc_bt)
    steps, keep = (torch.empty(*shape, device=x.device) for shape in ((b, h, 4, chunks * chunk), (b, h, chunks)))
    segment, seen = (keep, keep) if doc_bt is None else _documents(doc_bt, chunks * chunk)
    _steps[(chunks, b, triton.cdiv(h, 16))](dt, A, segment, seen, steps, keep, *dt.stride(), t, h, L=chunk, H=16, DOCS=doc_bt is not None)

    y, last, walk = torch.empty(b, t, h, p, device=x.device, dtype=x.dtype), torch.empty_like(S), tiles["walk"]
    states = torch.empty(b, chunks, h, p, n, device=x.device, dtype=x.dtype) if for_backward or not walk else y
    strides = *x.stride()[:3], *B.stride()[:3]
    if walk:
        scores = _all_scores(B, C, chunks, chunk, n) if tiles["scan"]["READ"] else keep
        _scan[(b * h // tiles["scan"]["HEADS"],)](x, B, C, D, steps, keep, seen, scores, S, y, states, last, *strides, *C.stride()[:3], t,
                                                  _count(chunks), h, h // g, KEEP=for_backward, **sizes, **tiles["scan"])
    else:
        added = torch.empty(b, chunks, h, p, n, device=x.device)
        _additions[(h, chunks, b)](x, B, steps, seen, added, *strides, t, h, h // g, BACK=False, **sizes, **tiles["add"])
        _accumulate[(b * h, triton.cdiv(p * n, 512))](added, keep, S, states, last, _count(chunks), h, p * n, BLOCK=512, BACK=False)
        _outputs[(h, chunks, b)](x, B, C, D, steps, seen, states, y, *strides, *C.stride()[:3], t, h, h // g, **sizes, **tiles["outputs"])
    return y, last, (steps, keep, seen, states) if for_backward else None


def _backward(dy, dlast, x, dt, A, B, C, D, doc_bt, steps, keep, seen, states, tiles: dict):
    """-> gradients of x, dt, A, B, C, D and the first state."""
    (b, t, h, p), (g, n), chunk, splits = x.shape, B.shape[2:], tiles["chunk"], tiles["splits"]
    chunks, sizes = triton.cdiv(t, chunk), _sizes(p, n, chunk, doc_bt)
    dstates, dfirst, strides = torch.empty_like(states), torch.empty_like(dlast), (*dy.stride()[:3], *C.stride()[:3])
    if tiles["walk"]:
        _scan_backward[(b * h // tiles["back"]["HEADS"],)](dy, C, steps, keep, seen, dlast, dstates, dfirst, *strides, t, _count(chunks), h, h // g,
                                                           **sizes, **tiles["back"])
    else:
        added = torch.empty(b, chunks, h, p, n, device=x.device)
        _additions[(h, chunks, b)](dy, C, steps, seen, added, *strides, t, h, h // g, BACK=True, **sizes, **tiles["add"])
        _accumulate[(b * h, triton.cdiv(p * n, 512))](added, keep, dlast, dstates, dfirst, _count(chunks), h, p * n, BLOCK=512, BACK=True)

    dx, dsteps = torch.empty(b, t, h, p, device=x.device, dtype=x.dtype), torch.empty(b, h, 2, chunks * chunk, device=x.device)
    dA, dD, ddt = (torch.empty(b, rows, h, device=x.device) for rows in (chunks, chunks, t))
    dB, dC = (torch.empty(splits, b, t, g, n, device=x.device, dtype=x.dtype if splits == 1 else torch.float32) for _ in range(2))
    scores = _all_scores(B, C, chunks, chunk, n)
    _grads[(chunks, g * splits, b)](x, dy, B, C, D, steps, keep, seen, scores, states, dstates, dx, dB, dC, dsteps, dD, *x.stride()[:3],
                                    *dy.stride()[:3], *B.stride()[:3], *C.stride()[:3], t, h, _count(h // g), g, SPLITS=splits, **sizes,
                                    **tiles["grads"])
    _steps_backward[(chunks, b, triton.cdiv(h, 16))](dsteps, dt, A, seen, ddt, dA, *dt.stride(), t, h, L=chunk, H=16, DOCS=doc_bt is not None)
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


def _check(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, chunk, state_bhpn, doc_bt) -> None:
    """The stage's sentences for arguments that do not fit, without its look at the values."""
    if chunk < 1: raise ValueError(f"chunk={chunk}: a chunk holds at least one token.")
    if x_bthp.dim() != 4 or B_btgn.dim() != 4:
        raise ValueError(f"x is [b, t, h, p] and B is [b, t, g, n]: got {tuple(x_bthp.shape)} and {tuple(B_btgn.shape)}.")
    (b, t, h, p), (g, n) = x_bthp.shape, B_btgn.shape[2:]
    importlib.import_module("02_mamba").check_shapes(
        {"dt_bth": (dt_bth, (b, t, h)), "A_h": (A_h, (h,)), "B_btgn": (B_btgn, (b, t, g, n)), "C_btgn": (C_btgn, (b, t, g, n)), "D_h": (D_h, (h,)),
         "state_bhpn": (state_bhpn, (b, h, p, n)), "doc_bt": (doc_bt, (b, t))}, b=b, t=t, h=h, p=p, g=g, n=n)
    if t == 0: raise ValueError("the sequence is empty: pass at least one token.")
    if h % g: raise ValueError(f"{h} heads cannot share B and C in {g} groups: the number of heads must be a multiple of the groups.")


def ssd_chunked(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h=None, chunk: int = 128, state_bhpn=None, doc_bt=None):
    """-> (y_bthp in x's dtype, final state_bhpn in fp32; both fp64 for fp64 inputs, computed in fp32). dt is after softplus and limits; A_h <= 0."""
    _check(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, chunk, state_bhpn, doc_bt)
    (b, t, h, p), (g, n) = x_bthp.shape, B_btgn.shape[2:]
    common = torch.promote_types(torch.promote_types(x_bthp.dtype, B_btgn.dtype), C_btgn.dtype)
    common = torch.float32 if common == torch.float64 else common
    x, B, C = (_rows(z.to(common)) for z in (x_bthp, B_btgn, C_btgn))
    D_h = x_bthp.new_zeros(h) if D_h is None else D_h
    state_bhpn = x_bthp.new_zeros(b, h, p, n, dtype=torch.float32) if state_bhpn is None else state_bhpn
    A, D, S = (z.to(torch.float32).contiguous() for z in (A_h, D_h, state_bhpn))
    arguments = x, dt_bth.to(torch.float32), A, B, C, D, S, doc_bt, _tiles(b, t, h, g, p, n, x.element_size())
    if torch.is_grad_enabled() and any(z.requires_grad for z in arguments[:7]): y, last = _ChunkedScan.apply(*arguments)
    else: y, last, _ = _forward(*arguments, for_backward=False)
    return y.to(x_bthp.dtype), last.to(torch.float64 if x_bthp.dtype == torch.float64 else torch.float32)
