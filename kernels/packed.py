"""Decoding with weights that stay packed: a token or a few through E4M3 linears (03_latentmoe.py, fp8_linear) and through 4-bit experts.

The idea. A decode step multiplies a few rows with all of a layer's weights, so its time is that of reading them once, packed as they are, and of the
launches around. PyTorch has no product of bf16 rows with E4M3 weights: it writes the weights out in bf16 first (1 byte read, 2 written, 2 read),
and rounding the input takes five launches more. Here the weights go from memory to registers, are widened there, which is exact, and meet fp32 sums.

One row, E4M3 (`_row_kernel`): no tensor core, since it would idle anyway. A program takes BN weight rows, its threads share the columns:

                 BK columns: 16 neighbours a thread                acc [BN, BK / 16] in registers; the sum over threads comes once, behind
    BN rows    ┌────────┬────────┬───  ...  ───┐                   the loop. The piece of x is rounded to E4M3 by every program for itself, and
    of w       │ thr. 0 │ thr. 1 │             │                   serves all of a thread's rows: 20 instructions a number of x, 2.5 a weight,
               │        │        │             │                   so a thread should have 8 rows. Few programs (4096 rows of w: 512 of 8
    x          └────────┴────────┴───  ...  ───┘                   rows) still fill 132 processors; the contraction is not cut.

Two to 64 rows, E4M3: x is rounded once, to fp16, which holds every E4M3 number (`_round_kernel`); `_rows_kernel` multiplies [BN, BK] weights with all
the rows on tensor cores. Where too few tiles of weights would leave processors idle, the contraction is cut in SPLIT parts, which a third launch
adds in order.

4-bit experts (`_pairs_kernel`): a program is one pair of a token and an expert times BN rows of the expert's weights, so nothing is sorted and no
table is made. Pair q = r · k + slot reads x's row r and writes row q. Up stores relu², down stores fp32, and `_combine_kernel` takes the weighted sum
in the order of the choices: three launches. Two tokens that chose one expert read it twice, so this serves a few pairs: see `_few_pairs`.

    word of 8 codes     h7 h6 h5 h4 h3 h2 h1 h0          a nibble each, column 8j in h0; code = sign, 2 exponent bits, 1 mantissa bit
    even columns        sign to the top of a byte, the other three bits to bits 2 to 4: an E4M3 number · 2^-6, the subnormal 0.5 included, four in
    odd columns         a word; likewise from the upper nibbles. E4M3 is widened by an instruction for two; the block scale multiplies each sum of 16.

At Super's sizes one token needs 76 MB for 4096 -> 18560 in E4M3 (17.8 us at 4.28 TB/s), 34 MB for 8192 -> 4096 (7.8 us), 22 MB for either shared
projection (5.1 us), and 34 MB for either projection of its 22 experts (8.0 us): 11.7 GB and 2.7 ms a token with all else.

Differences from PyTorch: one rounding of the result, where PyTorch rounds the sum and the scaled sum. No atomics, sums in a fixed order: results
repeat. Sources: 03_latentmoe.py, section 8; kernels/nvfp4_gemm.py for codes in words and for more rows.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.interpreter import INTERPRETED, dot, narrow
from kernels.nvfp4_gemm import _compiled, _global_strides, _scale_bytes, _sum_kernel, _words


def _tiles(kind: str, r: int, n: int, k: int) -> dict:
    """Block sizes and launch parameters. kind: "row" (one row of x, E4M3), "rows" (r of them), "pairs" (4-bit experts); n rows of w, k columns."""
    if kind == "pairs": return dict(BN=16, BK=min(1024, max(16, triton.next_power_of_2(k))), num_warps=4)
    if kind == "row":
        width = min(2048, max(16, triton.next_power_of_2(k)))
        return dict(BN=8, BK=width, STAGES=1, num_warps=4)
    # every program takes all rows, so weights are read once; too few tiles of weights: cut the contraction
    tiles = triton.cdiv(n, 32)
    split = 1 if tiles >= 264 or k < 2048 else 2 if tiles >= 132 else 4
    return dict(BN=32, BM=max(16, triton.next_power_of_2(r)), BK=128, SPLIT=split, STAGES=4, num_warps=4)


# --- E4M3

@triton.jit
def _e4m3(x, scale):
    """x / scale on E4M3's grid, in fp32: the quotient rounded as IEEE 754 asks, cut to 448, then rounded to nearest even. NaN stays NaN."""
    q = tl.clamp(tl.div_rn(x, tl.zeros_like(x) + scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    # adding 2^20 times q's power of two (at least 2^-6, where the steps stop shrinking) leaves three bits of mantissa
    big = ((tl.maximum(tl.abs(q), 0.015625).to(tl.int32, bitcast=True) & 0x7F800000) + (20 << 23)).to(tl.float32, bitcast=True)
    rounded = (tl.abs(q) + big) - big
    return tl.where(q < 0, -rounded, rounded)


@triton.jit
def _widen(byte, dtype: tl.constexpr):
    """E4M3 bytes in fp16 or fp32, exactly."""
    value = byte.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(dtype)
    if INTERPRETED: value = tl.where((byte & 0x7F) == 0x7F, float("nan"), value).to(dtype)       # the interpreter reads NaN as 480
    return value


@triton.jit
def _row_kernel(out, x, w, input_scale, weight_scale, N, K, EVEN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """One row of x times BN rows of w, bytes [N, K]."""
    n, scale = tl.program_id(0) * BN + tl.arange(0, BN), tl.load(input_scale)
    row_n = tl.minimum(n, N - 1).to(tl.int64)
    acc_nq = tl.zeros((BN, BK // 16), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        c = k + tl.arange(0, BK)
        if EVEN: w_nk, x_k = tl.load(w + row_n[:, None] * K + c[None, :]), tl.load(x + c)
        else: w_nk, x_k = tl.load(w + row_n[:, None] * K + c[None, :], mask=(c < K)[None, :], other=0), tl.load(x + c, mask=c < K, other=0.0)
        product_nk = _widen(w_nk, tl.float32) * _e4m3(x_k.to(tl.float32), scale)[None, :]
        acc_nq += tl.sum(tl.reshape(product_nk, (BN, BK // 16, 16)), 2)
    y_n = tl.sum(acc_nq, 1) * (scale * tl.load(weight_scale))
    tl.store(out + n, narrow(y_n, out.dtype.element_ty), mask=n < N)


@triton.jit
def _round_kernel(out, x, scale, SIZE, BLOCK: tl.constexpr):
    """x / scale rounded to E4M3, in fp16."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, _e4m3(tl.load(x + i, mask=i < SIZE, other=0.0).to(tl.float32), tl.load(scale)).to(tl.float16), mask=i < SIZE)


@triton.jit
def _rows_kernel(out, x, w, input_scale, weight_scale, R, N, K, STEPS, EVEN: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
                 SPLIT: tl.constexpr, STAGES: tl.constexpr):
    """R <= BM rows of rounded x, fp16 [R, K], times BN rows of w, over one of SPLIT parts of the columns; out is [R, N] or [SPLIT, R, N]."""
    n, r = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BM)
    row_n, part = tl.minimum(n, N - 1).to(tl.int64), tl.program_id(1)
    start = part * STEPS * BK
    acc_nr = tl.zeros((BN, BM), tl.float32)
    for k in tl.range(start, tl.minimum(start + STEPS * BK, K), BK, num_stages=STAGES):
        c = k + tl.arange(0, BK)
        if EVEN: w_nk, x_rk = tl.load(w + row_n[:, None] * K + c[None, :]), tl.load(x + r[:, None] * K + c[None, :], mask=r[:, None] < R, other=0.0)
        else:
            w_nk = tl.load(w + row_n[:, None] * K + c[None, :], mask=(c < K)[None, :], other=0)
            x_rk = tl.load(x + r[:, None] * K + c[None, :], mask=(r[:, None] < R) & (c < K)[None, :], other=0.0)
        acc_nr = dot(_widen(w_nk, tl.float16), x_rk.T, acc_nr)
    y_nr = acc_nr * (tl.load(input_scale) * tl.load(weight_scale))
    to = out + (part * R + r).to(tl.int64)[:, None] * N + n[None, :]
    tl.store(to, narrow(y_nr, out.dtype.element_ty).T, mask=(r < R)[:, None] & (n < N)[None, :])


def fp8_linear(x_ri: Tensor, weight_oi: Tensor, input_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Twin of fp8_linear for at most 64 rows and no offsets, without a gradient: E4M3 weights [o, i], both scales 0-d; the result in dtype."""
    (r, k), n = x_ri.shape, weight_oi.shape[0]
    out_ro = torch.empty(r, n, dtype=dtype, device=x_ri.device)
    if not r * n * k: return out_ro.zero_()
    x_ri, w, t = x_ri.contiguous(), weight_oi.contiguous().view(torch.uint8), _tiles("row" if r == 1 else "rows", r, n, k)
    if r == 1:
        _row_kernel[(triton.cdiv(n, t["BN"]),)](out_ro, x_ri, w, input_scale, weight_scale, n, k, EVEN=k % t["BK"] == 0, **t)
        return out_ro
    codes_ri, split = torch.empty(r, k, dtype=torch.float16, device=x_ri.device), t["SPLIT"]
    _round_kernel[(triton.cdiv(r * k, 512),)](codes_ri, x_ri, input_scale, r * k, BLOCK=512, num_warps=4)
    parts = out_ro if split == 1 else torch.empty(split, r, n, dtype=torch.float32, device=x_ri.device)
    _rows_kernel[(triton.cdiv(n, t["BN"]), split)](parts, codes_ri, w, input_scale, weight_scale, r, n, k, triton.cdiv(k, split * t["BK"]),
                                                   EVEN=k % t["BK"] == 0, **t)
    if split > 1: _sum_kernel[(triton.cdiv(r * n, 256),)](out_ro, parts, r * n, SPLIT=split, GPU=_compiled(), BLOCK=256, num_warps=2)
    return out_ro


# --- 4-bit experts

@triton.jit
def _four(bytes_nj):
    """fp16 [n, j, 4] of the four E4M3 bytes of each word."""
    first_third, second_fourth = tl.join(bytes_nj, bytes_nj >> 16), tl.join(bytes_nj >> 8, bytes_nj >> 24)
    bytes_njhi = tl.join(first_third, second_fourth).to(tl.uint8)
    return _widen(tl.reshape(bytes_njhi, (bytes_nj.shape[0], bytes_nj.shape[1], 4)), tl.float16)


@triton.jit
def _values(words_nj):
    """fp32 [n, 8 j] · 2^-6 of codes in words."""
    even, odd = (words_nj << 4) & 0x80808080 | (words_nj << 2) & 0x1C1C1C1C, words_nj & 0x80808080 | (words_nj >> 2) & 0x1C1C1C1C
    return tl.reshape(tl.join(_four(even), _four(odd)), (words_nj.shape[0], 8 * words_nj.shape[1])).to(tl.float32)


@triton.jit
def _pairs_kernel(out, x, words, scales, global_e, experts_q, N, X_ROW, G_E, K: tl.constexpr, SHARE: tl.constexpr, SQUARE: tl.constexpr,
                  BN: tl.constexpr, BK: tl.constexpr):
    """Pair q: row q // SHARE of x times BN rows of its expert's weights; with SQUARE relu² of it."""
    q, n = tl.program_id(1), tl.program_id(0) * BN + tl.arange(0, BN)
    e = tl.load(experts_q + q).to(tl.int64)
    row_n = e * N + tl.minimum(n, N - 1)           # a stack of experts has more than 2^31 codes
    x += (q // SHARE).to(tl.int64) * X_ROW
    acc_nb = tl.zeros((BN, BK // 16), tl.float32)
    for k in range(0, K, BK):
        c, j, b = k + tl.arange(0, BK), k // 8 + tl.arange(0, BK // 8), k // 16 + tl.arange(0, BK // 16)
        words_at, scales_at = words + row_n[:, None] * (K // 8) + j[None, :], scales + row_n[:, None] * (K // 16) + b[None, :]
        if K % BK == 0: words_nj, scale_nb, x_k = tl.load(words_at), tl.load(scales_at), tl.load(x + c)
        else:
            words_nj, scale_nb = tl.load(words_at, mask=(j < K // 8)[None, :], other=0), tl.load(scales_at, mask=(b < K // 16)[None, :], other=0)
            x_k = tl.load(x + c, mask=c < K, other=0.0)
        product_nk = _values(words_nj.to(tl.uint32, bitcast=True)) * x_k.to(tl.float32)[None, :]
        acc_nb += tl.sum(tl.reshape(product_nk, (BN, BK // 16, 16)), 2) * _widen(scale_nb, tl.float32)
    y_n = tl.sum(acc_nb, 1) * (64.0 * tl.load(global_e + e * G_E))
    if SQUARE:
        y_n = tl.where(y_n < 0, 0.0, y_n)          # PITFALL: tl.maximum(nan, 0) is 0, and a spoilt token would look healthy
        y_n *= y_n
    tl.store(out + q.to(tl.int64) * N + n, narrow(y_n, out.dtype.element_ty), mask=n < N)


@triton.jit
def _combine_kernel(out_rl, rows_ql, weights_rk, L, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    """out[r] = sum over a token's choices of weight · row, in the order of the choices."""
    r, l = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total_l = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(CHOSEN):
        row_l = tl.load(rows_ql + (r * CHOSEN + slot) * L + l, mask=l < L, other=0.0)
        total_l += row_l * tl.load(weights_rk + r * CHOSEN + slot).to(tl.float32)
    tl.store(out_rl + r * L + l, narrow(total_l, out_rl.dtype.element_ty), mask=l < L)


def _few_pairs(pairs: int, up_efl, down_elf) -> bool:
    """Do experts serve pair by pair? ours: up to half as many pairs as experts. Even routing of q pairs reaches e (1 - exp(-q / e)) of e experts, so
    at the border pairs read 1.27 times the weights that sorted rows would; beyond, reading an expert once for all its rows wins."""
    one_scale = lambda q: not any(stride for stride, size in zip(_global_strides(q)[1:], q.block_scale.shape[1:]) if size > 1)
    served = lambda q: q.block == (1, 16) and one_scale(q)
    return 0 < pairs <= up_efl.shape[0] // 2 and served(up_efl) and served(down_elf)


def _pairs_product(x: Tensor, w, experts_q: Tensor, share: int, square: bool, dtype: torch.dtype) -> Tensor:
    """[q, n] from rows of x [q / share, k] and an NVFP4Tensor [e, n, k]."""
    (_, n, k), pairs = w.shape, len(experts_q)
    t, out_qn = _tiles("pairs", pairs, n, k), torch.empty(pairs, n, dtype=dtype, device=x.device)
    _pairs_kernel[(triton.cdiv(n, t["BN"]), pairs)](
        out_qn, x, _words(w), _scale_bytes(w), w.global_scale, experts_q, n, x.stride(0), _global_strides(w)[0], K=k, SHARE=share, SQUARE=square, **t)
    return out_qn


def _experts_by_pair(x_rl: Tensor, weights_rk: Tensor, experts_rk: Tensor, up_efl, down_elf) -> Tensor:
    """experts_grouped for a few pairs and weights in 4 bits, in x's dtype."""
    (r, k), l, experts_q = experts_rk.shape, x_rl.shape[1], experts_rk.reshape(-1)
    square_qf = _pairs_product(x_rl if x_rl.stride(1) == 1 else x_rl.contiguous(), up_efl, experts_q, k, True, x_rl.dtype)
    rows_ql = _pairs_product(square_qf, down_elf, experts_q, 1, False, torch.float32)
    out_rl = torch.empty(r, l, dtype=x_rl.dtype, device=x_rl.device)
    _combine_kernel[(r, triton.cdiv(l, 128))](out_rl, rows_ql, weights_rk.contiguous(), l, CHOSEN=k, BLOCK=128, num_warps=4)
    return out_rl
