"""Attention within documents for long sequences, and of a few new tokens over the cells of a cache.

Long sequences: PyTorch's flex_attention over the blocks in which somebody sees something. A dense mask of t queries and s keys has t·s entries: 4 GB
a row at 65,536 tokens, and each is read. Documents leave most of it empty:

    keys       0 0 0 0 1 1 1 1 1 1 2 2 2 2 2 2        16 tokens of three documents, blocks of 4
    block 0    ■ . . .                                a query sees from the beginning of its document to itself, so the blocks that a block of
    block 1    . ■ . .                                queries needs lie side by side: from where its first query's document begins to its last query
    block 2    . ■ ■ .
    block 3    . . ■ ■

So the list of blocks is two numbers a row, computed on the GPU with no wait for the host (a recorded step can hold it), and inside a block the rule
of 04_model.py, attention_mask, decides. Work and memory grow with what is seen: for documents of one length, linearly in t.

A library does the rest: flex_attention compiles the rule into its kernel, forward and backward, for grouped queries and any t and s. Its first call
for new shapes compiles for some seconds, so 04_model.py comes here only where a dense mask would be large.

A decode step (`attend_cells`).  A token or a few of each slot look over the slot's cells, and the cells are all that is read, so their bytes are the
time: nothing else may be copied, and all processors must read. Three launches:
    _append_kernel     keys and values of the new tokens into their cells, rounded to FP8 where the pool is of bytes
    _cells_kernel      a program takes up to 64 queries that share a key head (the heads of a group, times tokens), and one of SPLITS stretches of
                       the cells; it keeps the maximum, the sum and the weighted values of what it has seen so far
    _combine_kernel    y = sum over stretches of 2^(lse - max) y_stretch / sum of 2^(lse - max); not launched when there is one stretch

    cells of a slot    0 ........ start + count | not yet written, or rejected     the stretches divide what lies left of |, by a length that is
    stretches          [ 0 ][ 1 ][ 2 ][ 3 ]                                        read on the GPU: a recorded step serves every length, and an
                                                                                   empty cache costs no bandwidth
A row without tokens has an empty range: y is 0, not NaN. Bytes at Super's shape, a slot of 32,768 cells: 2 · 2 heads · 128 in bf16 are 33.6 MB a
layer, 7.8 us at 4.28 TB/s, in FP8 half. In FP8 the scale of the keys goes into the scores and that of the values into y: codes are multiplied as they
are, and fit bf16.

Sources:  04_model.py, section 3 · 08_infer.py, section 4 · Flash-Decoding (Dao et al.) for the stretches, no code
          torch.nn.attention.flex_attention, BlockMask.from_kv_blocks
"""
from __future__ import annotations

import functools
import importlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kernels.interpreter import dot, narrow
from kernels.nvfp4 import _e4m3, _e4m3_byte

mamba = importlib.import_module("02_mamba")
BLOCK = 128     # flex_attention's default: tokens a side


def attention_mask(doc_bs: Tensor, t: int) -> BlockMask:
    """Who sees whom for the last t of s tokens, as 04_model.attention_mask says it, in blocks."""
    s, device = doc_bs.shape[1], doc_bs.device
    segment_bs, real_bs = mamba.segments(doc_bs).contiguous(), doc_bs >= 0
    first_bs = torch.searchsorted(segment_bs, segment_bs)      # where each token's document begins

    def sees(row, head, query, key):
        query = query + (s - t)
        same = (segment_bs[row, query] == segment_bs[row, key]) & real_bs[row, key]
        return (same & (query >= key)) | (query == key)

    begin_i = torch.arange(s - t, s, BLOCK, device=device)
    from_bi = first_bs[:, begin_i] // BLOCK
    to_i = (begin_i + BLOCK - 1).clamp(max=s - 1) // BLOCK
    blocks = -(-s // BLOCK)
    index_bij = (from_bi[..., None] + torch.arange(blocks, device=device)).clamp(max=blocks - 1)
    count_bi = to_i - from_bi + 1
    return BlockMask.from_kv_blocks(count_bi[:, None].int(), index_bij[:, None].int(), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(t, s))


@functools.cache
def _compiled(): return torch.compile(flex_attention, dynamic=False)


def attend(q_bhtp: Tensor, k_bhsp: Tensor, v_bhsp: Tensor, mask: BlockMask) -> Tensor:
    """softmax(q kᵀ / sqrt(p)) v over what the mask shows; k and v may have fewer heads. -> [b, h, t, p]"""
    return _compiled()(q_bhtp, k_bhsp, v_bhsp, block_mask=mask, enable_gqa=True)


# --- a decode step

def _splits(programs: int, cells: int, block: int) -> int:
    """Stretches of the cells, a power of two: about 256 programs in all, two a processor of an H200, and no more than there are blocks."""
    most = min(64, max(1, 256 // programs), triton.cdiv(cells, block))
    return 1 << (most.bit_length() - 1)


@triton.jit
def _scale_of(scale, LIES: tl.constexpr):
    """A number, or one that lies in memory."""
    if LIES: scale = tl.load(scale)
    return scale


@triton.jit
def _stored(x, scale, FP8: tl.constexpr, dtype: tl.constexpr):
    if FP8:
        value = tl.div_rn(x.to(tl.float32), tl.zeros_like(x).to(tl.float32) + scale)
        code = _e4m3_byte(_e4m3(tl.abs(value))) | ((value.to(tl.int32, bitcast=True) >> 24) & 0x80)
        x = tl.where(value != value, 0x7F, code).to(tl.uint8)        # the cut at 448 would drop a NaN
    else: x = narrow(x.to(tl.float32), dtype)
    return x


@triton.jit
def _append_kernel(k, v, k_pool, v_pool, k_scale, v_scale, slots, starts, counts, cells, k_r, k_t, k_h, v_r, v_t, v_h, T,
                   HEADS: tl.constexpr, P: tl.constexpr, FP8: tl.constexpr, LIES: tl.constexpr, BLOCK: tl.constexpr):
    """One token: its keys and values of all heads into their cell; nothing when it is not there."""
    r, i = (tl.program_id(0) // T).to(tl.int64), tl.program_id(0) % T
    head, p = tl.arange(0, BLOCK) // P, tl.arange(0, BLOCK) % P
    ok = head < tl.where(i < tl.load(counts + r), HEADS, 0)
    at = ((tl.load(slots + r).to(tl.int64) * HEADS + head) * cells + tl.load(starts + r) + i) * P + p
    k_new = tl.load(k + r * k_r + i * k_t + head * k_h + p, mask=ok, other=0)
    v_new = tl.load(v + r * v_r + i * v_t + head * v_h + p, mask=ok, other=0)
    tl.store(k_pool + at, _stored(k_new, _scale_of(k_scale, LIES), FP8, k_pool.dtype.element_ty), mask=ok)
    tl.store(v_pool + at, _stored(v_new, _scale_of(v_scale, LIES), FP8, v_pool.dtype.element_ty), mask=ok)


@triton.jit
def _cells(pool, s_s, p_p, end, P: tl.constexpr, FP8: tl.constexpr, dtype: tl.constexpr):
    """[s, p] of a pool's head, codes as numbers in the queries' dtype."""
    z_sp = tl.load(pool + s_s[:, None] * P + p_p[None, :], mask=(s_s[:, None] < end) & (p_p[None, :] < P), other=0)
    if FP8: z_sp = z_sp.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return z_sp.to(dtype)


@triton.jit
def _cells_kernel(q, k_pool, v_pool, k_scale, v_scale, slots, starts, counts, out, lse, cells, scale, q_r, q_t, q_h, T, H: tl.constexpr,
                  HEADS: tl.constexpr, P: tl.constexpr, FP8: tl.constexpr, LIES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr):
    split, block, head, r = tl.program_id(0), tl.program_id(1) // HEADS, tl.program_id(1) % HEADS, tl.program_id(2).to(tl.int64)
    GROUP: tl.constexpr = H // HEADS
    start, count = tl.load(starts + r).to(tl.int32), tl.load(counts + r).to(tl.int32)
    m_m, p_p = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_P)
    i_m, h_m = m_m // GROUP, head * GROUP + m_m % GROUP
    # 1. this program's stretch of the cells that its last token sees
    first, last = block * BLOCK_M // GROUP, tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP + 1, count)
    end = tl.where(first < count, start + last, 0)
    stretch = tl.cdiv(tl.cdiv(end, BLOCK_S), SPLITS) * BLOCK_S
    low = split * stretch
    end = tl.minimum(low + stretch, end)
    base = (tl.load(slots + r).to(tl.int64) * HEADS + head) * cells * P
    q_mp = tl.load(q + r * q_r + i_m[:, None] * q_t + h_m[:, None] * q_h + p_p[None, :], mask=(i_m < count)[:, None] & (p_p < P)[None, :], other=0)
    # 2. maximum, sum and weighted values so far
    scale *= _scale_of(k_scale, LIES)
    top_m, sum_m, acc_mp = tl.full((BLOCK_M,), -float("inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for from_s in range(low, end, BLOCK_S):
        s_s = from_s + tl.arange(0, BLOCK_S)
        score_ms = dot(q_mp, _cells(k_pool + base, s_s, p_p, end, P, FP8, q_mp.dtype).T, None) * scale
        seen_ms = (s_s[None, :] < end) & (s_s[None, :] <= start + i_m[:, None]) & (i_m < count)[:, None]
        score_ms = tl.where(seen_ms, score_ms, -float("inf"))
        new_m = tl.maximum(top_m, tl.max(score_ms, axis=1))
        safe_m = tl.where(new_m == -float("inf"), 0.0, new_m)        # a token that sees none of these cells: 0, not NaN
        weight_ms, fade_m = tl.exp2(score_ms - safe_m[:, None]), tl.exp2(top_m - safe_m)
        sum_m = sum_m * fade_m + tl.sum(weight_ms, axis=1)
        acc_mp = dot(narrow(weight_ms, q_mp.dtype), _cells(v_pool + base, s_s, p_p, end, P, FP8, q_mp.dtype), acc_mp * fade_m[:, None])
        top_m = new_m
    # 3. what is left of it
    sum_m = tl.where(sum_m == 0, 1.0, sum_m)
    y_mp = acc_mp * (_scale_of(v_scale, LIES) / sum_m)[:, None]
    row_m = ((r * T + i_m) * H + h_m) * SPLITS + split
    tl.store(out + row_m[:, None] * P + p_p[None, :], narrow(y_mp, out.dtype.element_ty), mask=(i_m < T)[:, None] & (p_p < P)[None, :])
    if SPLITS > 1: tl.store(lse + row_m, top_m + tl.log2(sum_m), mask=i_m < T)


@triton.jit
def _combine_kernel(part, lse, out, P: tl.constexpr, SPLITS: tl.constexpr, BLOCK_P: tl.constexpr):
    row, s, p_p = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS), tl.arange(0, BLOCK_P)
    lse_s = tl.load(lse + row * SPLITS + s)
    top = tl.max(lse_s, axis=0)
    weight_s = tl.exp2(lse_s - tl.where(top == -float("inf"), 0.0, top))
    part_sp = tl.load(part + (row * SPLITS + s[:, None]) * P + p_p[None, :], mask=(weight_s > 0)[:, None] & (p_p < P)[None, :], other=0)
    total = tl.sum(weight_s)
    y_p = tl.sum(part_sp * weight_s[:, None], axis=0) / tl.where(total == 0, 1.0, total)
    tl.store(out + row * P + p_p, narrow(y_p, out.dtype.element_ty), mask=p_p < P)


def attend_cells(pool, q_rthp: Tensor, k_rthp: Tensor, v_rthp: Tensor, rows) -> Tensor:
    """Same arguments and result as KVPool.attend_cells in 08_infer.py; what is said of a token that is not there is 0."""
    (r, t, h, p), (_, heads, cells, _) = q_rthp.shape, pool.k_bhsp.shape
    q_rthp, k_rthp, v_rthp = (z if z.stride(3) == 1 else z.contiguous() for z in (q_rthp, k_rthp, v_rthp))
    scales, lies = (pool.k_scale, pool.v_scale), isinstance(pool.k_scale, Tensor) or isinstance(pool.v_scale, Tensor)
    if lies: scales = tuple(torch.as_tensor(z, dtype=torch.float32, device=q_rthp.device) for z in scales)
    places = tuple(z.contiguous() for z in (rows.slot_r, rows.start_r, rows.count_r))
    out = torch.empty(r, t, h, p, dtype=q_rthp.dtype, device=q_rthp.device)
    if not out.numel(): return out
    known = dict(HEADS=heads, P=p, FP8=pool.k_bhsp.dtype == torch.uint8, LIES=lies)
    pools = pool.k_bhsp, pool.v_bhsp
    _append_kernel[(r * t,)](k_rthp, v_rthp, *pools, *scales, *places, cells, *k_rthp.stride()[:3], *v_rthp.stride()[:3], t,
                             BLOCK=triton.next_power_of_2(heads * p), num_warps=4, **known)
    height, width = min(64, max(16, triton.next_power_of_2(h // heads * t))), max(16, triton.next_power_of_2(p))
    blocks = triton.cdiv(h // heads * t, height)
    splits = _splits(blocks * heads * r, cells, 64)
    part, lse = out, None
    if splits > 1: part, lse = (torch.empty(r, t, h, splits, *z, dtype=torch.float32, device=out.device) for z in ((p,), ()))
    _cells_kernel[(splits, blocks * heads, r)](
        q_rthp, *pools, *scales, *places, part, lse, cells, math.log2(math.e) / math.sqrt(p), *q_rthp.stride()[:3], t, H=h, SPLITS=splits,
        BLOCK_M=height, BLOCK_S=64, BLOCK_P=width, num_warps=4, **known)
    if splits > 1: _combine_kernel[(r * t * h,)](part, lse, out, P=p, SPLITS=splits, BLOCK_P=width, num_warps=4)
    return out
