"""The products of 01_nvfp4.py, section 8: `matmul` of two 4-bit operands, `matmul_w4a16` of 4-bit weights with 16-bit activations.

The idea. A GPU without FP4 tensor cores decodes. An e2m1 code times its e4m3 block scale has at most 6 significant bits, so the decoded number is
*exact* in bf16, and a bf16 tensor-core product with fp32 sums is the FP4 product, up to the order of the sum. The global scales leave the sum:
they are multiplied once, in fp32, before the one rounding to the result's dtype.

Decoding must cost 2 to 3 instructions a weight or it is slower than the memory. So eight codes stay together in one 32-bit word:

    word    h7 h6 h5 h4 h3 h2 h1 h0        a nibble each, column 8j in h0
    i = 0   .. .. .. h4 .. .. .. h0        one AND picks the columns i and i + 4,
            h4 -> bf16 | h0 -> bf16        one multiplication by 2^12 + 2^6 puts the sign at bit 15 and the magnitude at bits 6 to 8 of both halves,
            × s          × s               one AND cleans, one packed bf16 product applies the block scale: 4 instructions for 2 weights

(i = 3 has its sign in place: a shift, two logical operations, no multiplication.) Bits 6 to 8 are the top mantissa bit and the low exponent bits of
bf16, so the pattern is the value · 2^-126, for the subnormal 0.5 as well; the scale is prepared as s · 2^118, which fits bf16; the epilogue owes
2^8. The sum may run in any order that both operands share. Columns are visited as (i, word, half), then a thread of the tensor-core product finds all
eight values of a word that it loaded itself; the words of a thread are neighbours (`_reorder`), then it loads 16 bytes at once and prepares a scale
for two words. The weights go from shared memory to registers to the product. 16-bit x is brought into this order by a small kernel beforehand and
then copied to where the tensor core reads it ("ordered"), or reordered in the product ("natural"); coded x is decoded in the same way.

    fused kernel                    x [r, k], 16 bits or codes                 dense kernel (two large operands, no groups)
                                   +-------------------------+                 decode a -> bf16, decode b -> bf16, then a persistent
       w [n, k] codes              | BM rows                 |                 product through the tensor memory accelerator, tiles
      +-------------+              +-------------------------+                 in bands so that neighbours share operands in L2
      | BN × BK     | decoded in       BK columns a step
      |             | registers    out tile = [BN, BM], stored transposed: the many weight rows fill the tensor core's 64 rows,
      +-------------+              so that one row of x wastes 15/16 of a narrow side and not 63/64 of a wide one

    grouped rows: a small kernel lists the row tiles, (expert, first row) each; tiles of a list that is too long end at once; an expert without
    rows has no tile and its weights are never read. Grouped contraction: an expert's part of k is the range of the loop. Split contraction
    (few weight rows): every part writes fp32 sums and a second kernel adds them in order, so results repeat.

    few rows (up to 8): there are 1280 strips of 16 weight rows for 528 schedulers, too few warps to hide each other's waiting. So the warps of a
    program take the same [BN, BK] tile and cut its columns, a product with a batch dimension; their sums meet once, behind the loop:

        columns of a step      warp 0 | warp 1 | warp 2 | warp 3        acc [4, BN, BM] -> sum over the 4 -> [BN, BM]

    That takes the older mma (8 columns) and not wgmma; x, 16 KB a row and in the caches, is reordered on its way from shared memory: one byte
    permutation for two numbers of x, used for BN rows of w. Decoding takes 3 instructions a weight: at 132 processors 0.018 ms for 8192 -> 20480.

At Ultra's shapes: one decoding row through 8192 -> 20480 reads 84 MB of codes and 10 MB of scales (0.022 ms at 4.28 TB/s) for 0.3 GFLOP; 8192³ is
1.1 TFLOP (1.4 ms at 790 TFLOP/s) on 75 MB; 90,112 rows through 512 experts of 2048 -> 5120 are 1.9 TFLOP (2.4 ms) on 3 GB of weights.
Measured on an H200: 1 row 0.040 ms, 16 rows 0.046 to 0.050, 64 rows 0.082 (cuBLAS with bf16 weights 0.097 for each); 1,408 rows on 512 experts 0.73
and 0.72 ms for up and down; FP4 x FP4 8192³ 1.40 (cuBLAS bf16 1.31), grouped rows 5.7, grouped contraction 7.9. Tried for one row: x reordered by a
launch of its own (0.042, 0.005 of it the launch), equal shares of the weights for every processor (0.044), the contraction cut in 2 or 4 (0.043 to
0.045).
On sm_100 `matmul` takes `tl.dot_scaled`, the native block-scaled product: compiled, not run here.

float64: `out_dtype=float64` and float64 x take the stage's PyTorch body, as do global scales of a shape that no quantizer of the stage gives.
Sources: 01_nvfp4.py, section 8; OCP Microscaling Formats v1.0; PTX ISA (wgmma register layout, fma.bf16x2); Triton's persistent matmul tutorial
(the order of tiles).
"""
from __future__ import annotations

import importlib

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# ---- launch parameters

def _tiles(kind: str, r: int, n: int, k: int, e: int, dtype: torch.dtype, codes: bool = False) -> dict:
    """Block sizes of a launch. kind: "whole", "rows", "contraction" or "decode"; r rows of x, n rows of w, e experts (1: no groups); x as codes?

    split: parts of the contraction, in programs of their own; cut: parts of every step's columns, one for each warp (1, or num_warps with x in its
    natural order); ordered: x reordered before the product; dense: both operands decoded before it; band: tiles side by side."""
    if kind == "decode": return dict(BR=16, BK=256, num_warps=4)
    fused = dict(split=1, cut=1, ordered=True, num_warps=4, num_stages=3, maxnreg=None)
    if dtype == torch.float32: return dict(fused, BN=64, BM=16, BK=32, num_stages=2)
    if kind == "contraction": return dict(fused, BN=128, BM=128, BK=64)
    per_expert = triton.cdiv(r, e)
    if kind == "whole" and r > 64: return dict(dense=True, BM=128, BN=256, BK=64, band=8, flatten=True, num_warps=8, num_stages=3)
    if per_expert > 64: return dict(fused, BN=128, BM=64, BK=128) if codes else dict(fused, BN=256, BM=128, BK=64, num_warps=8)
    # half of the SMs idle when there are too few weight tiles: cut the contraction
    programs = triton.cdiv(n, 64) * (e if e > 1 else 1)
    split = 1 if programs >= 512 or k < 2048 else 2 if programs >= 256 else 4
    if per_expert > 16:
        block_m = triton.next_power_of_2(per_expert)
        return dict(fused, BN=128, BM=block_m, BK=256, split=split * 2 if split > 1 else 1, num_warps=8)
    if codes: return dict(fused, BN=64, BM=16, BK=256, split=split)
    if per_expert > 8: return dict(fused, BN=64, BM=16, BK=256, split=split, ordered=False, num_stages=4)
    if kind == "rows": return dict(fused, BN=128, BM=8, BK=256, maxnreg=128)
    return dict(fused, BN=32, BM=8, BK=512, cut=4, ordered=False)


def _native(device: torch.device) -> bool:
    """Has this GPU block-scaled FP4 tensor cores?"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)


# ---- decoding

@triton.jit
def _multiply_pairs(a, b, GPU: tl.constexpr):
    """Two bf16 products in 32-bit words. Every product here is exact in bf16, so the portable way may cut fp32 products off."""
    if GPU:       # the interpreter knows no PTX; Triton has no packed multiplication of its own, and unpacked ones double the instructions
        return tl.inline_asm_elementwise("{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }", "=r,r,r", [a, b],
                                         dtype=tl.uint32, is_pure=True, pack=1)      # + (-0), which changes nothing: sm_80 has fma alone
    else:
        low = (a << 16).to(tl.float32, bitcast=True) * (b << 16).to(tl.float32, bitcast=True)
        high = (a & 0xFFFF0000).to(tl.float32, bitcast=True) * (b & 0xFFFF0000).to(tl.float32, bitcast=True)
        return (low.to(tl.uint32, bitcast=True) >> 16) | (high.to(tl.uint32, bitcast=True) & 0xFFFF0000)


@triton.jit
def _values(bits, scale, MX: tl.constexpr, GPU: tl.constexpr):
    """bf16 [..., 2] of the columns i and i + 4, whose sign and magnitude are at bits 15 and 6 to 8 of each half, times the scale."""
    # a power of two as scale has no upper end that leaves room for 2^126: first the value, then its scale
    if MX: bits = _multiply_pairs(bits, tl.full(bits.shape, 0x7E807E80, tl.uint32), GPU)
    bits = _multiply_pairs(bits, scale, GPU)
    return tl.join(bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True))


@triton.jit
def _decode(words_nj, scale_nq, MX: tl.constexpr, GPU: tl.constexpr):
    """bf16 [n, 8 j] · 2^-8 (MX: as it is) of codes [n, j] in 32-bit words and scale bytes [n, q]."""
    n: tl.constexpr = words_nj.shape[0]
    j: tl.constexpr = words_nj.shape[1]
    q: tl.constexpr = scale_nq.shape[1]
    scale = scale_nq.to(tl.uint32)
    if MX:         # E8M0 is bf16's exponent field; byte 0 is 2^-127, which bf16 holds as a subnormal
        scale = tl.where(scale == 0, 0x00400040, scale * 0x00800080)
    else:          # the byte's fields, four bits up, are bf16's with an exponent that is 120 too low: times 2^120, times 2^118
        scale = _multiply_pairs(scale * 0x00100010, tl.full(scale.shape, 0x7B807B80, tl.uint32), GPU)
        scale = _multiply_pairs(scale, tl.full(scale.shape, 0x7A807A80, tl.uint32), GPU)
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (n, q, j // q)), (n, j))
    down_nj = words_nj >> 6
    v0 = _values((words_nj & 0x000F000F) * 0x1040 & 0x81C081C0, scale, MX, GPU)
    v1 = _values((words_nj & 0x00F000F0) * 0x0104 & 0x81C081C0, scale, MX, GPU)
    v2 = _values((down_nj & 0x003C003C) * 0x0410 & 0x81C081C0, scale, MX, GPU)
    v3 = _values(words_nj & 0x80008000 | down_nj & 0x01C001C0, scale, MX, GPU)       # the sign is in place already
    values = tl.join(tl.join(v0, v2), tl.join(v1, v3))           # [n, j, half, i // 2, i % 2]: column 8 j + 4 half + i
    return tl.reshape(values, (n, 8 * j))


@triton.jit
def _reorder(x_rk, ORDER: tl.constexpr, CUT: tl.constexpr):
    """Columns (warp, part, word, half, i) -> (i, word, part, half), in ORDER parts. With CUT > 1 warps that take CUT parts of the columns, the warps
    come first: [CUT, r, k / CUT]. In registers when a thread holds eight neighbours."""
    r: tl.constexpr = x_rk.shape[0]
    k: tl.constexpr = x_rk.shape[1]
    x = tl.permute(tl.reshape(x_rk, (r, CUT, ORDER, k // (8 * CUT * ORDER), 2, 2, 2)), (1, 0, 5, 6, 3, 2, 4))
    if CUT > 1: return tl.reshape(x, (CUT, r, k // CUT))
    else: return tl.reshape(x, (r, k))


@triton.jit
def _load_codes(words, scales, row_n, j, q, end, ROW_WORDS, ROW_SCALES, WIDTH: tl.constexpr, EVEN: tl.constexpr, GPU: tl.constexpr):
    """Decoded columns [n, 8 j] of the rows whose numbers are given; j and q: word and scale numbers; beyond column `end` zeros."""
    words_at, scales_at = words + row_n[:, None] * ROW_WORDS + j[None, :], scales + row_n[:, None] * ROW_SCALES + q[None, :]
    if EVEN: words_nj, scale_nq = tl.load(words_at), tl.load(scales_at)
    else:
        words_nj = tl.load(words_at, mask=(j < end // 8)[None, :], other=0)
        scale_nq = tl.load(scales_at, mask=(q < end // WIDTH)[None, :], other=0)
    return _decode(words_nj.to(tl.uint32, bitcast=True), scale_nq, WIDTH == 32, GPU)


@triton.jit
def _decode_kernel(out, words, scales, R, K, ROW_WORDS, ROW_SCALES, BR: tl.constexpr, BK: tl.constexpr, WIDTH: tl.constexpr,
                   GPU: tl.constexpr):
    """Codes -> 16 bits without the global scale."""
    r = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    k0 = tl.program_id(1) * BK
    rows = tl.minimum(r, R - 1)
    values = _load_codes(words, scales, rows, k0 // 8 + tl.arange(0, BK // 8), k0 // WIDTH + tl.arange(0, BK // WIDTH), K, ROW_WORDS, ROW_SCALES,
                         WIDTH, False, GPU)
    k = k0 + tl.arange(0, BK)
    tl.store(out + r[:, None] * K + k[None, :], values, mask=(r < R)[:, None] & (k < K)[None, :])


@triton.jit
def _reorder_kernel(out, x, R, K, X_ROW, OUT_ROW, ORDER: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """x in the order of `_reorder` with zeros up to a multiple of BK: done once, the product can copy x to shared memory as it is."""
    r = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * BK + tl.arange(0, BK))[None, :]
    x_rk = _reorder(tl.load(x + r * X_ROW + k, mask=(r < R) & (k < K), other=0.0), ORDER, 1)
    tl.store(out + r * OUT_ROW + k, x_rk, mask=r < R)


@triton.jit
def _dot(a_mk, b_kn, acc_mn, GPU: tl.constexpr):
    """The tensor-core product with fp32 sums."""
    # PITFALL: the interpreter multiplies bf16 as the integers that it stores them in; there the exact fp32 values go in
    if GPU: return tl.dot(a_mk, b_kn, acc_mn, input_precision="ieee")
    else: return tl.dot(a_mk.to(tl.float32), b_kn.to(tl.float32), acc_mn, input_precision="ieee")


@triton.jit
def _rounded(y, dtype: tl.constexpr, GPU: tl.constexpr):
    """y in dtype, to nearest even."""
    # PITFALL: on the way to bf16 the interpreter cuts the low half off; there it is rounded by hand
    if not GPU and dtype == tl.bfloat16:
        bits = y.to(tl.uint32, bitcast=True)
        y = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return y.to(dtype)


# ---- the fused kernel

@triton.jit
def _in_bands(tile, n_tiles, m_tiles, BAND: tl.constexpr):
    """Tile number -> (n tile, m tile), in bands of BAND n tiles, so that the programs of one moment share operands in L2."""
    first = tile // (BAND * m_tiles) * BAND
    width = tl.minimum(n_tiles - first, BAND)
    rest = tile % (BAND * m_tiles)
    return first + rest % width, rest // width


@triton.jit
def _row_tiles_kernel(tile_e, tile_r, ends_e, R, E, TILES, BM: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr):
    """The list of row tiles: expert and first row. Rows behind the last expert count as expert E; a list that is too long ends with E + 1."""
    e = tl.arange(0, EP)
    end = tl.where(e < E, tl.load(ends_e + e, mask=e < E, other=0).to(tl.int32), R)
    start = tl.load(ends_e + e - 1, mask=(e > 0) & (e <= E), other=0).to(tl.int32)
    tiles = tl.where(e <= E, (end - start + BM - 1) // BM, 0)
    tiles_end = tl.cumsum(tiles, 0)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.sum((tiles_end[None, :] <= t[:, None]).to(tl.int32), 1)          # EP when t is beyond the last tile
    mine = e[None, :] == expert[:, None]
    first = tl.sum(tl.where(mine, (start - (tiles_end - tiles) * BM)[None, :], 0), 1) + t * BM
    tl.store(tile_e + t, tl.minimum(expert, E + 1), mask=t < TILES)
    tl.store(tile_r + t, first, mask=t < TILES)


@triton.jit
def _place(ends_e, tile_e, tile_r, R, N, K, E, GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """What this program computes: expert, n tile, first and last row, first and last column of the contraction. Expert E + 1: nothing."""
    pid, n_tiles = tl.program_id(0), (N + BN - 1) // BN
    if GROUP == "rows":
        e, r_start = tl.load(tile_e + pid // n_tiles), tl.load(tile_r + pid // n_tiles)
        r_end = tl.where(e < E, tl.load(ends_e + tl.minimum(e, E - 1)).to(tl.int32), R)
        return e, pid % n_tiles, r_start, r_end, 0, tl.where(e < E, K, 0)          # no sum for rows behind the last expert: zeros
    else:
        r_tiles = (R + BM - 1) // BM
        tile_n, tile = _in_bands(pid % (n_tiles * r_tiles), n_tiles, r_tiles, 8)
        if GROUP == "whole": return 0, tile_n, tile * BM, R, 0, K
        e = pid // (n_tiles * r_tiles)
        # NOTE: an expert's part starts at any multiple of 16; the compiler widens the loads by what it is told
        start, end = tl.load(ends_e + e - 1, mask=e > 0, other=0).to(tl.int32), tl.load(ends_e + e).to(tl.int32)
        return e, tile_n, tile * BM, R, tl.multiple_of(start, 16), tl.multiple_of(end, 16)


@triton.jit
def _finish(out, part, acc_nr, x_global, w_global, e, n, r, r_end, k_start, R, N, K, XG_E, XG_R, XG_Q, WG_E, WG_R, WG_Q, GROUP: tl.constexpr,
            SCALED: tl.constexpr, WIDTH: tl.constexpr, UNDO: tl.constexpr, GPU: tl.constexpr):
    """Multiply by the global scales and by what the decoder owes, round once, store."""
    # NOTE: the part of an empty expert may start behind the last block
    block = tl.minimum(k_start, K - WIDTH) // WIDTH if GROUP == "contraction" else 0
    scale_n = tl.load(w_global + e * WG_E + n * WG_R + block * WG_Q, mask=n < N, other=0.0)
    y_nr = acc_nr * (UNDO * scale_n)[:, None]
    if SCALED: y_nr *= tl.load(x_global + e * XG_E + r * XG_R + block * XG_Q, mask=r < r_end, other=0.0)[None, :]
    y_nr = _rounded(y_nr, out.dtype.element_ty, GPU)
    # w's rows are the columns of the result, or its rows when x's rows are columns too (a weight gradient)
    if GROUP == "contraction":
        to = out + e.to(tl.int64) * N * R + n.to(tl.int64)[:, None] * R + r[None, :]
        tl.store(to, y_nr, mask=(n < N)[:, None] & (r < R)[None, :])
    else:
        to = out + (part.to(tl.int64) * R + r)[:, None] * N + n[None, :]
        tl.store(to, y_nr.T, mask=(r < r_end)[:, None] & (n < N)[None, :])


@triton.jit
def _tile_sum(x, x_scales, w, w_scales, rows_n, rows_r, live_r, k_start, k_end, X_ROW, X_SCALES, W_ROW, W_SCALES, GROUP: tl.constexpr,
              FORM: tl.constexpr, ORDER: tl.constexpr, CUT: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, GPU: tl.constexpr,
              BK: tl.constexpr, STAGES: tl.constexpr):
    """fp32 [n, r], or [CUT, n, r] from CUT warps: the sum over columns k_start to k_end of the given rows of w and x."""
    j, q = tl.arange(0, BK // 8), tl.arange(0, BK // WIDTH)
    acc_nr = tl.zeros((CUT, rows_n.shape[0], rows_r.shape[0]) if CUT > 1 else (rows_n.shape[0], rows_r.shape[0]), tl.float32)
    for k in tl.range(k_start, k_end, BK, num_stages=STAGES):
        if GROUP == "contraction": k = tl.multiple_of(k, 16)
        c = k + tl.arange(0, BK)
        if FORM == "decoded": w_nk = tl.load(w + rows_n[:, None] * W_ROW + c[None, :], mask=(c < k_end)[None, :], other=0.0)
        else: w_nk = _reorder(_load_codes(w, w_scales, rows_n, k // 8 + j, k // WIDTH + q, k_end, W_ROW, W_SCALES, WIDTH, EVEN, GPU), ORDER, CUT)
        if FORM == "codes":
            x_rk = _reorder(_load_codes(x, x_scales, rows_r, k // 8 + j, k // WIDTH + q, k_end, X_ROW, X_SCALES, WIDTH, EVEN, GPU), ORDER, CUT)
        else:
            live = live_r[:, None] if EVEN or FORM == "ordered" else live_r[:, None] & (c < k_end)[None, :]
            x_rk = tl.load(x + rows_r[:, None] * X_ROW + c[None, :], mask=live, other=0.0)
            if FORM == "natural": x_rk = _reorder(x_rk, ORDER, CUT)
        acc_nr = _dot(w_nk.to(x_rk.dtype), tl.permute(x_rk, (0, 2, 1)) if CUT > 1 else x_rk.T, acc_nr, GPU)
    return acc_nr


@triton.jit
def _fused_kernel(out, x, x_scales, x_global, w, w_scales, w_global, ends_e, tile_e, tile_r, R, N, K, E, X_ROW, X_SCALES, W_ROW, W_SCALES, STEPS,
                  XG_E, XG_R, XG_Q, WG_E, WG_R, WG_Q, GROUP: tl.constexpr, FORM: tl.constexpr, ORDER: tl.constexpr, CUT: tl.constexpr,
                  SCALED: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, UNDO: tl.constexpr, GPU: tl.constexpr,
                  BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """One [BN, BM] tile of w · xᵀ. w [N, K] or [E, N, K] in words of codes, x [R, K]; FORM: x in words of codes ("codes"), in 16 (32) bits as
    it is ("natural") or reordered ("ordered"), or both operands "decoded"."""
    # 1. which expert, which rows, which part of the contraction
    e, tile_n, r_start, r_end, k_start, k_end = _place(ends_e, tile_e, tile_r, R, N, K, E, GROUP, BN, BM)
    if GROUP == "rows":
        if e > E: return
        e = tl.minimum(e, E - 1)
    if SPLIT > 1:
        k_start = tl.program_id(1) * STEPS * BK            # written with BK, which tells the compiler how far loads are aligned
        k_end = tl.minimum(k_start + STEPS * BK, k_end)

    # 2. the sum
    n = tile_n * BN + tl.arange(0, BN)
    r = r_start + tl.arange(0, BM)
    rows_n, rows_r = tl.minimum(n, N - 1).to(tl.int64), tl.minimum(r, R - 1).to(tl.int64)
    if GROUP == "rows": rows_n += e.to(tl.int64) * N
    acc_nr = _tile_sum(x, x_scales, w, w_scales, rows_n, rows_r, r < r_end, k_start, k_end, X_ROW, X_SCALES, W_ROW, W_SCALES, GROUP, FORM, ORDER,
                       CUT, WIDTH, EVEN, GPU, BK, STAGES)
    if CUT > 1: acc_nr = tl.sum(acc_nr, 0)

    # 3. the global scales, and the store
    _finish(out, tl.program_id(1), acc_nr, x_global, w_global, e, n, r, r_end, k_start, R, N, K, XG_E, XG_R, XG_Q, WG_E, WG_R, WG_Q, GROUP, SCALED,
            WIDTH, UNDO, GPU)


@triton.jit
def _sum_kernel(out, parts, SIZE, SPLIT: tl.constexpr, GPU: tl.constexpr, BLOCK: tl.constexpr):
    """The parts of a split contraction, added in order: the same result in every run."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT): total += tl.load(parts + part * SIZE + i, mask=i < SIZE, other=0.0)
    tl.store(out + i, _rounded(total, out.dtype.element_ty, GPU), mask=i < SIZE)


# ---- the dense kernel, and the native one

@triton.jit
def _finish_dense(out, acc_mn, a_global, b_global, m, n, M, N, AG_R, BG_R, SCALED: tl.constexpr, UNDO: tl.constexpr, GPU: tl.constexpr):
    """The global scales, one rounding, and the store of a tile that begins at row m, column n."""
    m, n = m + tl.arange(0, acc_mn.shape[0]), n + tl.arange(0, acc_mn.shape[1])
    acc_mn *= (UNDO * tl.load(b_global + n * BG_R, mask=n < N, other=0.0))[None, :]
    if SCALED: acc_mn *= tl.load(a_global + m * AG_R, mask=m < M, other=0.0)[:, None]
    y_mn = _rounded(acc_mn, out.dtype.element_ty, GPU)
    tl.store(out + m.to(tl.int64)[:, None] * N + n[None, :], y_mn, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _dense_kernel(out, a, b, a_global, b_global, M, N, K, AG_R, BG_R, SCALED: tl.constexpr, UNDO: tl.constexpr, GPU: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr, FLATTEN: tl.constexpr, STAGES: tl.constexpr):
    """a · bᵀ of 16-bit operands behind tensor descriptors; one program an SM, which walks over tiles."""
    m_tiles, n_tiles = (M + BM - 1) // BM, (N + BN - 1) // BN
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = _in_bands(tile, m_tiles, n_tiles, BAND)
        acc_mn = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, K, BK, num_stages=STAGES):
            acc_mn = _dot(a.load([tile_m * BM, k]), b.load([tile_n * BN, k]).T, acc_mn, GPU)
        # NOTE: a tile passes through shared memory on its way out, beside the operands; of 32-bit results only half of a tile fits there
        if out.dtype.element_ty == tl.float32:
            left, right = tl.split(tl.permute(tl.reshape(acc_mn, (BM, 2, BN // 2)), (0, 2, 1)))
            _finish_dense(out, left, a_global, b_global, tile_m * BM, tile_n * BN, M, N, AG_R, BG_R, SCALED, UNDO, GPU)
            _finish_dense(out, right, a_global, b_global, tile_m * BM, tile_n * BN + BN // 2, M, N, AG_R, BG_R, SCALED, UNDO, GPU)
        else: _finish_dense(out, acc_mn, a_global, b_global, tile_m * BM, tile_n * BN, M, N, AG_R, BG_R, SCALED, UNDO, GPU)


@triton.jit
def _native_kernel(out, x, x_scales, x_global, w, w_scales, w_global, ends_e, tile_e, tile_r, R, N, K, E, X_ROW, X_SCALES, W_ROW, W_SCALES,
                   XG_E, XG_R, XG_Q, WG_E, WG_R, WG_Q, GROUP: tl.constexpr, WIDTH: tl.constexpr, GPU: tl.constexpr,
                   BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """The fused kernel's contract on FP4 tensor cores, which read codes and block scales as they are (sm_100). Compiled, not run here."""
    e, tile_n, r_start, r_end, k_start, k_end = _place(ends_e, tile_e, tile_r, R, N, K, E, GROUP, BN, BM)
    if GROUP == "rows":
        if e > E: return
        e = tl.minimum(e, E - 1)
    n, r = tile_n * BN + tl.arange(0, BN), r_start + tl.arange(0, BM)
    rows_n, rows_r = tl.minimum(n, N - 1).to(tl.int64), tl.minimum(r, R - 1).to(tl.int64)
    if GROUP == "rows": rows_n += e.to(tl.int64) * N
    acc_rn = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(k_start, k_end, BK, num_stages=STAGES):
        c, q = k // 2 + tl.arange(0, BK // 2), k // WIDTH + tl.arange(0, BK // WIDTH)
        live_c, live_q = (c < k_end // 2)[None, :], (q < k_end // WIDTH)[None, :]
        x_rc = tl.load(x + rows_r[:, None] * X_ROW + c[None, :], mask=live_c, other=0)
        w_nc = tl.load(w + rows_n[:, None] * W_ROW + c[None, :], mask=live_c, other=0)
        x_scale_rq = tl.load(x_scales + rows_r[:, None] * X_SCALES + q[None, :], mask=live_q, other=0)
        w_scale_nq = tl.load(w_scales + rows_n[:, None] * W_SCALES + q[None, :], mask=live_q, other=0)
        if WIDTH == 16:       # dot_scaled tells the format of the scales by their dtype: bytes are powers of two
            x_scale_rq, w_scale_nq = x_scale_rq.to(tl.float8e4nv, bitcast=True), w_scale_nq.to(tl.float8e4nv, bitcast=True)
        acc_rn = tl.dot_scaled(x_rc, x_scale_rq, "e2m1", w_nc.T, w_scale_nq, "e2m1", acc_rn)
    _finish(out, tl.program_id(1), acc_rn.T, x_global, w_global, e, n, r, r_end, k_start, R, N, K, XG_E, XG_R, XG_Q, WG_E, WG_R, WG_Q, GROUP, True,
            WIDTH, 1.0, GPU)


# ---- host side

def _stage(): return importlib.import_module("01_nvfp4")


def _words(q) -> Tensor: return q.codes.contiguous().view(torch.int32)


def _scale_bytes(q) -> Tensor: return q.block_scale.contiguous().view(torch.uint8)


def _global_strides(q) -> tuple[int, int, int]:
    """Steps of the global scale by expert, row and block; 0 where it is shared."""
    strides = _stage().align(q.global_scale, q.codes.ndim).expand(q.block_scale.shape).stride()
    return (0,) * (3 - len(strides)) + tuple(strides)


def _owed(q) -> float: return 2.0**8 if q.block[1] == 16 else 1.0


def _served(operands, group: str) -> bool:
    """Do the kernels know these operands? One block format, and one global scale for all of a sum."""
    varies = any(q.block_scale.shape[-1] > 1 and _global_strides(q)[2] for q in operands)
    return len({q.block[1] for q in operands}) == 1 and (group == "contraction" or not varies)


def _check(x, w, offsets_e: Tensor | None) -> str:
    """How the product is cut; ValueError for operands that do not fit."""
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"the operands {tuple(x.shape)} and {tuple(w.shape)} do not fit: a · bᵀ needs equal last dimensions.")
    if offsets_e is None: return "whole"
    if len(w.shape) == 3 and w.shape[0] != len(offsets_e):
        raise ValueError(f"offsets_e has {len(offsets_e)} entries for {w.shape[0]} experts: it must hold each expert's end.")
    return "rows" if len(w.shape) == 3 else "contraction"


def _list_row_tiles(offsets_e: Tensor, rows: int, block_m: int) -> tuple[Tensor, Tensor]:
    """(expert, first row) of every row tile, in lists of the largest length that any routing needs: nothing is read back to the host."""
    experts = len(offsets_e)
    tiles = rows // block_m + experts + 1
    tile_e, tile_r = torch.empty(2, tiles, dtype=torch.int32, device=offsets_e.device)
    _row_tiles_kernel[(triton.cdiv(tiles, 16),)](tile_e, tile_r, offsets_e, rows, experts, tiles, BM=block_m,
                                                 EP=triton.next_power_of_2(experts + 1), BLOCK=16, num_warps=8)
    return tile_e, tile_r


def _decoded(q, dtype: torch.dtype) -> Tensor:
    """Codes times block scales, exact in 16 bits, without the global scale."""
    (rows, k), tiles = q.shape, _tiles("decode", *q.shape, 0, 1, dtype)
    out = torch.empty(rows, k, dtype=dtype, device=q.codes.device)
    _decode_kernel[(triton.cdiv(rows, tiles["BR"]), triton.cdiv(k, tiles["BK"]))](
        out, _words(q), _scale_bytes(q), rows, k, k // 8, k // q.block[1], WIDTH=q.block[1], GPU=_compiled(), **tiles)
    return out


def _reordered(x: Tensor, step: int, order: int) -> Tensor:
    """x [r, k] in the order of the product's steps of that many columns, with zeros behind the last one."""
    (rows, k), block_r = x.shape, min(triton.next_power_of_2(len(x)), max(1, 2048 // step))
    out = x.new_empty(rows, triton.cdiv(k, step) * step)
    _reorder_kernel[(triton.cdiv(rows, block_r), triton.cdiv(k, step))](out, x, rows, k, x.stride(0), out.shape[1], ORDER=order, BR=block_r, BK=step)
    return out


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132 if _compiled() else 4


def _compiled() -> bool: return isinstance(_fused_kernel, triton.runtime.jit.JITFunction)


def _dense(x, w, out_dtype: torch.dtype, dtype: torch.dtype, tiles: dict) -> Tensor:
    """Decode, then one product. x: NVFP4Tensor, or a tensor of that dtype."""
    codes = not isinstance(x, Tensor)
    a, b = _decoded(x, dtype) if codes else x.contiguous(), _decoded(w, dtype)
    if a.data_ptr() % 16: a = a.clone()                    # a descriptor's rows start at multiples of 16 bytes
    out = torch.empty(len(a), len(b), dtype=out_dtype, device=a.device)
    bm, bn, bk = (tiles[name] for name in ("BM", "BN", "BK"))
    grid = min(_processors(a.device), triton.cdiv(len(a), bm) * triton.cdiv(len(b), bn))
    _dense_kernel[(grid,)](out, TensorDescriptor.from_tensor(a, [bm, bk]), TensorDescriptor.from_tensor(b, [bn, bk]),
                           x.global_scale if codes else w.global_scale, w.global_scale, len(a), len(b), a.shape[1],
                           _global_strides(x)[1] if codes else 0, _global_strides(w)[1], SCALED=codes, UNDO=_owed(w) * (_owed(x) if codes else 1),
                           GPU=_compiled(), BM=bm, BN=bn, BK=bk, BAND=tiles["band"], FLATTEN=tiles["flatten"], STAGES=tiles["num_stages"],
                           num_warps=tiles["num_warps"])
    return out


def _order(tiles: dict) -> int:
    """The parts of `_reorder` that make the words of one thread neighbours: wgmma deals pairs of columns to four threads, mma here eight columns."""
    return 4 if tiles["BN"] >= 64 and tiles["BM"] >= 16 and tiles["num_warps"] % 4 == 0 and tiles["cut"] == 1 else 1


def _fused(x, w, offsets_e: Tensor | None, group: str, out_dtype: torch.dtype, tiles: dict) -> Tensor:
    """Decode inside the product. Grouped contraction: the result is [e, rows of w, rows of x]."""
    quantized, (rows, k), n = not isinstance(x, Tensor), x.shape, w.shape[-2]
    experts, device, split = 1 if offsets_e is None else len(offsets_e), w.codes.device, tiles["split"]
    bn, bm, bk, width, order = tiles["BN"], tiles["BM"], tiles["BK"], w.block[1], _order(tiles)
    # a grouped contraction reads both operands many times: decoded once, before it
    form = "decoded" if group == "contraction" else "codes" if quantized else "ordered" if tiles["ordered"] else "natural"
    shape = (experts, n, rows) if group == "contraction" else (rows, n)
    out = torch.empty(shape, dtype=out_dtype, device=device)
    parts = out if split == 1 else torch.empty(split, *shape, dtype=torch.float32, device=device)
    w_words, w_row = (_words(w), k // 8) if form != "decoded" else (_decoded(w, torch.bfloat16), k)
    if form == "codes": x_words, x_scales = _words(x), _scale_bytes(x)
    elif quantized: x_words, x_scales = _decoded(x, torch.bfloat16), out
    else:
        x_words, x_scales = x if x.stride(1) == 1 else x.contiguous(), out
        if form == "ordered": x_words = _reordered(x_words, bk, order)
    tile_e, tile_r = _list_row_tiles(offsets_e, rows, bm) if group == "rows" else (out, out)
    tiles_x = len(tile_e) if group == "rows" else triton.cdiv(rows, bm) * (experts if group == "contraction" else 1)
    even = group != "contraction" and k % (split * bk) == 0
    _fused_kernel[(triton.cdiv(n, bn) * tiles_x, split)](
        parts, x_words, x_scales, x.global_scale if quantized else w.global_scale, w_words, _scale_bytes(w), w.global_scale,
        out if offsets_e is None else offsets_e, tile_e, tile_r, rows, n, k, experts, x_words.stride(0), k // width, w_row, k // width,
        triton.cdiv(k, split * bk), *(_global_strides(x) if quantized else (0, 0, 0)), *_global_strides(w),
        GROUP=group, FORM=form, ORDER=order, CUT=tiles["cut"], SCALED=quantized, WIDTH=width, SPLIT=split, EVEN=even,
        UNDO=_owed(w) * (_owed(x) if quantized else 1), GPU=_compiled(),
        BN=bn, BM=bm, BK=bk, STAGES=tiles["num_stages"], num_warps=tiles["num_warps"], maxnreg=tiles["maxnreg"])
    if split > 1: _sum_kernel[(triton.cdiv(out.numel(), 256),)](out, parts, out.numel(), SPLIT=split, GPU=_compiled(), BLOCK=256, num_warps=2)
    return out


def _native_product(x, w, offsets_e: Tensor | None, group: str, out_dtype: torch.dtype) -> Tensor:
    """The same contract as _fused with two 4-bit operands, on FP4 tensor cores."""
    (rows, k), n, width = x.shape, w.shape[-2], w.block[1]
    experts, bm, bn, bk = 1 if offsets_e is None else len(offsets_e), 128, 128, 256
    out = torch.empty((experts, n, rows) if group == "contraction" else (rows, n), dtype=out_dtype, device=w.codes.device)
    tile_e, tile_r = _list_row_tiles(offsets_e, rows, bm) if group == "rows" else (out, out)
    tiles_x = len(tile_e) if group == "rows" else triton.cdiv(rows, bm) * (experts if group == "contraction" else 1)
    _native_kernel[(triton.cdiv(n, bn) * tiles_x,)](
        out, x.codes.contiguous(), _scale_bytes(x), x.global_scale, w.codes.contiguous(), _scale_bytes(w), w.global_scale,
        out if offsets_e is None else offsets_e, tile_e, tile_r, rows, n, k, experts, k // 2, k // width, k // 2, k // width,
        *_global_strides(x), *_global_strides(w), GROUP=group, WIDTH=width, GPU=_compiled(), BN=bn, BM=bm, BK=bk, STAGES=3, num_warps=4)
    return out


def matmul(a, b, offsets_e: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """Twin of matmul: a · bᵀ of two NVFP4Tensors. Rows of a grouped product behind offsets_e[-1] are zeros; so are columns of the contraction."""
    group, out_dtype = _check(a, b, offsets_e), out_dtype or torch.float32
    plain = a.codes.ndim == 2 and b.codes.ndim == (3 if group == "rows" else 2)
    if out_dtype == torch.float64 or not plain or not _served((a, b), group):
        return _stage().matmul(a, b, offsets_e, out_dtype, impl="torch")
    experts = 1 if offsets_e is None else len(offsets_e)
    # the fused kernel's result has w's rows before x's in a grouped contraction, and x's rows before w's elsewhere
    x, w = (b, a) if group == "contraction" else (a, b)
    (rows, k), n = x.shape, w.shape[-2]
    if not experts * rows * n * k:
        return torch.zeros((experts, n, rows) if group == "contraction" else (rows, n), dtype=out_dtype, device=a.codes.device)
    if _native(a.codes.device): return _native_product(x, w, offsets_e, group, out_dtype)
    tiles = _tiles(group, rows, n, k, experts, torch.bfloat16, True)
    return _dense(x, w, out_dtype, torch.bfloat16, tiles) if tiles.get("dense") else _fused(x, w, offsets_e, group, out_dtype, tiles)


def _weights_only(x: Tensor, w, offsets_e: Tensor | None) -> Tensor:
    """x · wᵀ without a gradient."""
    group = _check(x, w, offsets_e)
    if x.dtype == torch.float64 or group == "contraction" or w.codes.ndim != (2 if group == "whole" else 3) or not _served((w,), group):
        return _stage().matmul_w4a16(x, w, offsets_e, impl="torch")
    # a power of two as scale may leave the range of fp16
    x_rk = (x.float() if x.dtype == torch.float16 and w.block[1] == 32 else x).reshape(-1, x.shape[-1])
    (rows, k), n, experts = x_rk.shape, w.shape[-2], 1 if offsets_e is None else len(offsets_e)
    if not rows * n * k * experts: return x.new_zeros(*x.shape[:-1], n)
    tiles = _tiles("rows" if group == "rows" else "whole", rows, n, k, experts, x_rk.dtype)
    dense = tiles.get("dense")
    y_rn = _dense(x_rk, w, x.dtype, x_rk.dtype, tiles) if dense else _fused(x_rk, w, offsets_e, group, x.dtype, tiles)
    return y_rn.view(*x.shape[:-1], n)


class _WeightsOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, offsets_e):
        ctx.w, ctx.offsets_e = w, offsets_e
        return _weights_only(x, w, offsets_e)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        # NOTE: 4-bit weights serve, they do not train, so dx = dy · w takes the stage's product, which reads the offsets on the host
        return _stage().product(dy, ctx.w.dequantize(dy.dtype).mT, ctx.offsets_e), None, None


def matmul_w4a16(x: Tensor, w, offsets_e: Tensor | None = None) -> Tensor:
    """Twin of matmul_w4a16: x · wᵀ with x in its own dtype and w an NVFP4Tensor. Differentiable in x, by PyTorch."""
    if torch.is_grad_enabled() and x.requires_grad: return _WeightsOnly.apply(x, w, offsets_e)
    return _weights_only(x, w, offsets_e)
