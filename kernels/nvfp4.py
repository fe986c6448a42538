"""NVFP4 quantizers on the GPU: `quantize`, `quantize_rows`, `quantize_columns`, `quantize_pair`, `dequantize` and `transpose_codes` of 01_nvfp4.py,
bit for bit: same codes, same block scales, same second level.

Idea: two passes. The first reads x for its largest magnitude (the second level needs it before the first code can be written), the second reads
x again and writes everything: block maxima, scales, rounding and packing stay in registers. Memory is slow, so nothing else is read or
written: no padded, transposed or Hadamard-transformed copy of x exists. A pair (rows for dgrad, columns for wgrad) takes one pass for both maxima and
one for each copy: a single pass for both copies would save a read, but its threads would have to hold whole blocks of both directions, or pass values
to each other.

    rows [r, d]: a program owns R x C values         columns [d, tokens]: the same kind of tile seen from the other side
                 C = q blocks of 16                              D features, F a thread
        +----+----+----+----+                            +-+-+-+-+-----+-+
      R | 16 | 16 | 16 | 16 |  -> 8 bytes a block      T | | | | | ... | |  16 tokens (of one expert, a short block is filled with zeros),
        +----+----+----+----+     + 1 scale byte         +-+-+-+-+-----+-+  mixed by H, then quantized like a row of 16: 8 bytes + 1
        | 16 | 16 | 16 | 16 |
        +----+----+----+----+                          One thread owns a whole block in both: its maximum, its scale, the sums of the transform
    16x16 tiles share one scale: R is a multiple       and its draws' key are computed once and never leave the thread's registers.
    of 16, and the maximum is taken over 16 rows.

At Ultra's shape, 16384 x 8192 in bf16: 268 MB for each read of x, 75 MB written per copy (67 of codes, 8 of scales). Rows: 612 MB; pair: 956 MB.
Compiled for sm_90, a value takes about 5 instructions for its maximum (9 with the transform), 18 to round to nearest, 22 stochastically, and in
a column 6 more. Four an SM and cycle can start, but shifts, logic and comparisons only two: the stochastic passes are bound by them, not by memory.

Measured on an H200, 16384 x 8192: maximum 0.074 ms, rows given it 0.102, together 0.165; the pair with transform and draws 0.318 (maxima 0.074,
columns 0.155, rows 0.119 with a launch of their own), tiles of 8192 x 8192 0.106. Tried: 12 instructions a value more, 0.358; one kernel for both
copies of the pair, 0.82 (122 instructions a value, registers spill) and, with code unrolled further, 1.6 (it no longer fits the instruction cache);
codes gathered through shared memory before the store, 0.02 ms more for rows.

NOTE: which thread owns what is decided by the order of dimensions in the two loads, as Triton 3.6 hands out work: along the contiguous dimension
first, then along the others from the left. Triton 3.9 goes from the right: there the results are the same, but values move through shared memory.

What differs from stage 01, which raises for NaN and Inf: asking would make the host wait for the GPU. Here a measured maximum that is NaN or Inf
makes the global scale NaN, so everything that is multiplied with it is NaN and the step can be skipped where the loss is read. With a given amax
(or MXFP4) only the block's own scale becomes NaN; a given amax that is not finite or negative gives NaN throughout. Float64 is rounded to fp32 first,
as in stage 01, but before the Hadamard transform. The sum of 16 in the transform may round in another order than on the CPU.
With offsets_e the length of the columns depends on data: they are allocated for the worst case, rows + 15 a non-empty expert, and end in zeros.
scale_rule "mse" tries 126 scales a block for a checkpoint that is written once: it runs stage 01's code.

Sources: [NVFP4] 2509.25149; [PTX] ISA 8.7, cvt; integer rounding of floats: adding 1.5 * 2^23 leaves the rounded value in the low bits.
"""
from __future__ import annotations

import importlib
import math

import torch
import triton
import triton.language as tl

from kernels.draws import block_keys, key_words, split_key

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_NATIVE = None        # True: convert with Blackwell's cvt.e2m1x2; False: portable; None: ask the device


def _stage():
    return importlib.import_module("01_nvfp4")


def _tiles(kind: str, columns: int, height: int = 1) -> dict:
    """Launch parameters. R x C, T x D or R x B: what one program reads. F: features a thread. height: of a block."""
    widest = max(32, triton.next_power_of_2(columns))
    if kind == "amax_pair": return dict(T=32, D=256, F=4, num_warps=4)
    # a warp spans 64 features, 2 a thread, of one block of 16 tokens; four warps make stores of 32 bytes a feature
    if kind == "columns": return dict(T=64, D=64, F=2, num_warps=4)
    if kind == "transpose":
        return dict(R=128, B=64, num_warps=4)
    if height > 1: return dict(R=height, C=128, num_warps=2)
    # 8192 values a program, of one row where they divide it, and 2048 where draws take registers; amax: any tile will do
    size = {"amax": 16384, "quantize, stochastic": 2048}.get(kind, 8192)
    even = math.gcd(columns, size)
    C = even if kind != "amax" and even >= 1024 else min(1024, widest)
    return dict(R=size // C, C=C, num_warps={"dequantize": 8, "quantize, stochastic": 2}.get(kind, 4))


# Scales: on one value in 16, so plainness before speed.

@triton.jit
def _global_scales(amax, BUDGET: tl.constexpr):
    """(s_enc, s_dec) of a maximum; NaN when it is NaN, Inf or negative."""
    s_enc = tl.where(amax > 0, tl.div_rn(tl.zeros_like(amax) + 6.0 * BUDGET, amax), 1.0)
    s_enc = tl.where((amax >= 0) & (amax < float("inf")), tl.minimum(s_enc, 3.4028234663852886e38), float("nan"))
    return s_enc, tl.div_rn(tl.zeros_like(amax) + 1.0, s_enc)


@triton.jit
def _e4m3(x):
    """Nearest E4M3, ties to even, of x >= 0, cut to 448, as fp32. By hand: the interpreter's cast rounds otherwise.
    Adding 2^20 times x's power of two (at least 2^-6, where the steps stop shrinking) leaves three bits of mantissa."""
    x = tl.minimum(x, 448.0)
    big = ((tl.maximum(x, 0.015625).to(tl.int32, bitcast=True) & 0x7F800000) + (20 << 23)).to(tl.float32, bitcast=True)
    return (x + big) - big


@triton.jit
def _e4m3_byte(value):
    """An fp32 with the exponent bias 7 in place of 127 has E4M3's bits at the top of its mantissa, subnormal numbers included."""
    return (value * 7.52316384526264e-37).to(tl.int32, bitcast=True) >> 20             # 2^-120


@triton.jit
def _decode_e4m3(byte):
    return (byte << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36            # 2^120


@triton.jit
def _encode_scale(block_scale, s_dec):
    product = block_scale * s_dec
    return tl.minimum(tl.div_rn(tl.zeros_like(product) + 1.0, product), 3.4028234663852886e38)


# Rounding: on every value, so every instruction counts.

@triton.jit
def _nearest(m):
    """Bits of 1.5 * 2^23 + position of the magnitude on the grid, ties to even: stage 01's three rulers, each rounded by its one addition.
    Compared as integers, which may take three at a time."""
    fine = tl.fma(m, 2.0, 12582912.0).to(tl.int32, bitcast=True)
    middle = (m + 12582914.0).to(tl.int32, bitcast=True)
    coarse = tl.fma(m, 0.5, 12582916.0).to(tl.int32, bitcast=True)
    return tl.minimum(tl.minimum(tl.minimum(fine, middle), coarse), 0x4B400007)


@triton.jit
def _stochastic(y, room, STOCHASTIC: tl.constexpr):
    """Codes in the upper four bits of a word; room: 2^28 - 1 - draw * 2^12. Up when draw / 2^16 is below the distance to the lower neighbour.

    E2M1 is a tiny float, and an fp32 scaled by 2^-126 has the same shape: a grid of equal steps up to 1 (subnormal numbers), longer steps beyond.
    So the bits of the fp32 are the position and 22 bits of fraction, and adding a random number below one step rounds, whatever the magnitude.
    PITFALL: a value between two subnormal numbers must go to the upper one, or one just above a draw would look equal to it.
    """
    m = tl.minimum(tl.abs(y), 6.0)
    if STOCHASTIC == "ptx":
        tiny = tl.inline_asm_elementwise("mul.rp.f32 $0, $1, 0f00800000;", "=f,f", [m], dtype=tl.float32, is_pure=True, pack=1)
        bits = tiny.to(tl.int32, bitcast=True)
    else: bits = tl.where(m < 1, tl.ceil(m * 8388608.0).to(tl.int32), m.to(tl.int32, bitcast=True) - (126 << 23))
    up = bits.to(tl.uint32, bitcast=True) * 64 + room                      # one step is 2^28, a draw 2^12, "beyond the draw" at least 2^6
    return up | (y.to(tl.uint32, bitcast=True) & 0x80000000)


@triton.jit
def _native_words(y, R: tl.constexpr, C: tl.constexpr):
    """Blackwell's own conversion, two values at a time: compiled, not run here.
    NOTE: [PTX, cvt] "for .e2m1x2 ... the converted value from a is stored in the upper 4 bits of d and from b in the lower 4 bits", and
    the instruction reads `cvt d, a, b`: so a is the odd column ($2) and b the even one ($1), our low nibble."""
    even, odd = tl.split(tl.reshape(y, [R, C // 2, 2]))
    byte = tl.inline_asm_elementwise("{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, $2, $1; cvt.u32.u8 $0, pair; }", "=r,f,f", [even, odd],
                                     dtype=tl.int32, is_pure=True, pack=1)
    return tl.sum(tl.reshape(byte, [R, C // 16, 2, 4]) << (8 * tl.arange(0, 4))[None, None, None, :], axis=3)


@triton.jit
def _rooms(x):
    """2^28 - 1 - draw * 2^12 of two neighbours. Their draws are the lower and the upper half of h = mix32(x) (draws.py), written out here because
    a complement is free in the last product: ~(y * 0x846CA68B) = y * (2^32 - 0x846CA68B) - 1."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    inverse = (x ^ (x >> 15)) * 0x7B935975 - 1
    odd = (inverse >> 4) | 0xFFF                                           # h = product ^ (product >> 16): its upper half is the product's,
    return odd ^ (((inverse << 12) ^ 0xFFFFFFFF) & 0xFFFF000), odd         # its lower half the xor of both


@triton.jit
def _gather(even, odd, R: tl.constexpr, C: tl.constexpr):
    """The upper four bits of even and odd [R, C / 16, 8], in turn, eight to a word: [R, C / 16, 2].
    From the last one on, each is shifted in below those before: (word << 4) | (code >> 28) is one instruction, a funnel shift."""
    even_02, even_13 = tl.split(tl.reshape(even, [R, C // 16, 2, 2, 2]))
    odd_02, odd_13 = tl.split(tl.reshape(odd, [R, C // 16, 2, 2, 2]))
    c0, c4 = tl.split(even_02)
    c1, c5 = tl.split(odd_02)
    c2, c6 = tl.split(even_13)
    c3, c7 = tl.split(odd_13)
    word = c7 >> 28
    for code in tl.static_range(7):
        word = (word << 4) | ((c6, c5, c4, c3, c2, c1, c0)[code] >> 28)
    return word.to(tl.int32, bitcast=True)


@triton.jit
def _words(y, block, k0, k1, R: tl.constexpr, C: tl.constexpr, STOCHASTIC: tl.constexpr, NATIVE: tl.constexpr):
    """Codes of y [R, C / 16, 16] on the grid's scale, eight to a word: [R, C / 16, 2]."""
    if NATIVE and STOCHASTIC == "":
        return _native_words(y, R, C)
    if STOCHASTIC != "":
        even, odd = tl.split(tl.reshape(y, [R, C // 16, 8, 2]))
        room_even, room_odd = _rooms(block_keys(block, k0, k1)[:, :, None] + tl.arange(0, 8).to(tl.uint32)[None, None, :] * 0x9E3779B9)
        return _gather(_stochastic(even, room_even, STOCHASTIC), _stochastic(odd, room_odd, STOCHASTIC), R, C)
    code = _nearest(tl.abs(y)) + (y.to(tl.uint32, bitcast=True) >> 31).to(tl.int32) * 8
    # what _nearest adds to the position, eight times, each four places further left, is 0x3F400000 modulo 2^32
    return tl.sum(tl.reshape(code, [R, C // 16, 2, 8]) << (4 * tl.arange(0, 8))[None, None, None, :], axis=3) - 0x3F400000


@triton.jit
def _spread(grid, R: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """One number a block [R / H, C / W] -> one per 16 values of a row [R, C / 16]."""
    if H * W == 16:
        return grid
    return tl.reshape(tl.broadcast_to(grid[:, None, :, None], [R // H, H, C // W, W // 16]), [R, C // 16])


@triton.jit
def _squared_error(x, scale, s_dec, R: tl.constexpr, C: tl.constexpr, H: tl.constexpr):
    """What each block loses with this scale, in stage 01's order of operations; x [R, C / 16, 16] -> [R / H, C / 16]."""
    m = tl.abs(x)
    position = _nearest(m * _spread(_encode_scale(scale, s_dec), R, C, H, 16)[:, :, None]) & 7
    m_hat = (position << 22).to(tl.float32, bitcast=True) * 8.507059173023462e37             # 2^126: E2M1's bits in an fp32, as in _decode_e4m3
    m_hat = m_hat * _spread(scale, R, C, H, 16)[:, :, None] * _spread(tl.broadcast_to(s_dec, scale.shape), R, C, H, 16)[:, :, None]
    error = tl.sum((m_hat - m) * (m_hat - m), axis=2)
    return error if H == 1 else tl.sum(tl.reshape(error, [R // H, H, C // 16]), axis=1)


@triton.jit
def _fp32(x):
    """Exact. bf16 is the upper half of an fp32."""
    if x.dtype == tl.bfloat16: return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _larger(a, b):
    """The larger magnitude, or NaN if one is NaN, which a plain maximum would drop. On a GPU two bf16 at a time, as they lie in memory; then
    with some sign: the variant of the instruction that takes magnitudes gives its result the signs' xor."""
    if a.dtype == tl.bfloat16 and not _INTERPRETED:
        return tl.inline_asm_elementwise("max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.bfloat16, is_pure=True, pack=2)
    else: return tl.maximum(tl.abs(_fp32(a)), tl.abs(_fp32(b)), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(x, A: tl.constexpr, B: tl.constexpr):
    """Largest magnitude of each 16 of x [A, 16, B], as bits of an fp32 [A, B]."""
    for step in tl.static_range(4):
        if step == 3: x = _fp32(x)
        a, b = tl.split(tl.permute(tl.reshape(x, [A, 2, 8 >> step, B]), [0, 2, 3, 1]))
        x = _larger(a, b)
    return tl.reshape(x, [A, B]).to(tl.int32, bitcast=True)


@triton.jit
def _quantize_tile(x, bits, amax, block, k0, k1, R: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
                   STOCHASTIC: tl.constexpr, FOUR_OVER_SIX: tl.constexpr, MX: tl.constexpr, NATIVE: tl.constexpr,
                   NO_MINUS_ZERO: tl.constexpr = False):
    """fp32 x [R, C], bits of its largest magnitudes [R, C / 16] -> (words [R, C / 16, 2], scale bytes [R / H, C / W], s_dec like amax).
    `block`: draw index of each 16 values, [R, C / 16]."""
    if H * W > 16: bits = tl.max(tl.max(tl.reshape(bits, [R // H, H, C // W, W // 16]), axis=3), axis=1)
    finite = bits < 0x7F800000
    x = tl.reshape(x, [R, C // 16, 16])
    if MX:
        s_dec = amax
        byte = tl.where(bits == 0, 124, tl.maximum((bits >> 23) - 2, 0))               # 2^(floor(log2 amax) - 2), exponent + 127
        enc = tl.where((bits > 0) & finite, ((254 - byte) << 23).to(tl.float32, bitcast=True), 0.0)
        byte = tl.where(finite, byte, 255)
    else:
        s_enc, s_dec = _global_scales(amax, 256.0 if FOUR_OVER_SIX else 448.0)
        base = bits.to(tl.float32, bitcast=True) * (s_enc * 0.16666666666666666)
        scale = _e4m3(base)
        if FOUR_OVER_SIX:
            four = _e4m3(1.5 * base)
            scale = tl.where(_squared_error(x, four, s_dec, R, C, H) < _squared_error(x, scale, s_dec, R, C, H), four, scale)
        enc = tl.where(scale > 0, _encode_scale(scale, s_dec), 0.0)
        byte = tl.where(finite, _e4m3_byte(scale), 0x7F)
    enc = _spread(enc, R, C, H, W)[:, :, None]
    # PITFALL: -0 survives the Hadamard transform's rounds, where a sum that starts from 0 has no -0; adding 0 in the same instruction removes it
    y = tl.fma(x, tl.broadcast_to(enc, x.shape), tl.zeros_like(x)) if NO_MINUS_ZERO else x * enc
    words = _words(y, block, k0, k1, R, C, STOCHASTIC, NATIVE)
    return tl.where(enc != 0, words, 0), byte, s_dec


@triton.jit
def _raise(ptr, value):
    """Largest so far. A stale look at it costs an atomic too many, never a wrong result, and saves nearly all of them: they queue at one address."""
    if value > tl.load(ptr): tl.atomic_max(ptr, value, sem="relaxed")


@triton.jit
def _amax_kernel(x_ptr, amax_ptr, group_ptr, rows, columns, stride_e, stride_r, R: tl.constexpr, C: tl.constexpr, GROUPED: tl.constexpr):
    """Largest magnitudes, as integers: of a matrix (one entry per leading index), or of the rows that share group_ptr's number."""
    e = tl.program_id(2).to(tl.int64)
    row, column = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * C + tl.arange(0, C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + e * stride_e + row.to(tl.int64)[:, None] * stride_r + column[None, :], mask=inside, other=0).to(tl.float32)
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    if GROUPED:
        group = tl.load(group_ptr + row, mask=row < rows, other=0)
        tl.atomic_max(amax_ptr + group, bits, mask=row < rows, sem="relaxed")
    else:
        _raise(amax_ptr + e, tl.max(bits, axis=0))


@triton.jit(do_not_specialize=["k0", "k1", "first_block"])
def _quantize_kernel(x_ptr, amax_ptr, codes_ptr, scale_ptr, global_ptr, seed_ptr, k0, k1, first_block, rows, columns, stride_e, stride_r,
                     amax_e, amax_g, amax_q, R: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BY_ROW: tl.constexpr,
                     BY_BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr, FOUR_OVER_SIX: tl.constexpr, MX: tl.constexpr, NATIVE: tl.constexpr,
                     BACKWARDS: tl.constexpr):
    tile_r, tile_c, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if BACKWARDS:       # last tiles first: the pass before this one read them last, and they may still lie in the L2 cache
        tile_r, tile_c, e = tl.num_programs(0) - 1 - tile_r, tl.num_programs(1) - 1 - tile_c, tl.num_programs(2) - 1 - e
    row = (tile_r * R + tl.arange(0, R)).to(tl.int64)
    # a thread loads 8 values at a time. Halves of a block come last in the order of dimensions: they are dealt out when every thread has
    # one piece, so to the same thread
    start, within = tile_c * C + 16 * tl.arange(0, C // 16), 8 * tl.arange(0, 2)[:, None] + tl.arange(0, 8)[None, :]
    at = start[:, None, None, None] + within[None, None, :, :]
    x = tl.load(x_ptr + e * stride_e + row[None, :, None, None] * stride_r + at, mask=(row < rows)[None, :, None, None] & (at < columns), other=0)
    x = tl.reshape(tl.permute(x, [1, 0, 2, 3]), [R, C])
    bits = tl.reshape(_largest(tl.reshape(x, [R * C // 16, 16, 1]), R * C // 16, 1), [R, C // 16])

    g, q = tile_r * (R // H) + tl.arange(0, R // H), tile_c * (C // W) + tl.arange(0, C // W)
    if BY_ROW or BY_BLOCK:
        place = e * amax_e + g[:, None] * amax_g + q[None, :] * amax_q
        mine = (g < rows // H)[:, None] & (q < columns // W)[None, :]
        amax = tl.load(amax_ptr + place, mask=mine, other=0)
    else:
        place, mine = e * amax_e, (tile_r == 0) & (tile_c == 0)
        amax = tl.load(amax_ptr + place)

    row += e * rows                                                       # from here on a row of the whole stack
    half = tile_c * (C // 16) + tl.arange(0, C // 16)                     # index of 16 values in their row
    block = row[:, None] * (columns // 16) + half[None, :]
    if STOCHASTIC != "": k0, k1 = key_words(seed_ptr, k0, k1)
    words, byte, s_dec = _quantize_tile(_fp32(x), bits, amax, block + first_block, k0, k1, R, C, H, W, STOCHASTIC, FOUR_OVER_SIX, MX, NATIVE)

    kept = (row < (e + 1) * rows)[:, None] & (half < columns // 16)[None, :]
    # every thread stores the two words it has; left alone, Triton first gathers four in a thread, through shared memory
    tl.store(codes_ptr + tl.max_contiguous((2 * block)[:, :, None] + tl.arange(0, 2)[None, None, :], [1, 1, 2]), words, mask=kept[:, :, None])
    byte = tl.reshape(tl.broadcast_to(byte[:, None, :], [R // H, H, C // W]), [R, C // W]).to(tl.uint8)
    inside = (row < (e + 1) * rows)[:, None] & (q < columns // W)[None, :]
    tl.store(scale_ptr + row[:, None] * (columns // W) + q[None, :], byte, mask=inside)
    if not MX:
        if BY_BLOCK and not BY_ROW: mine = mine & (g == 0)[:, None]        # one writer an entry
        if BY_ROW and not BY_BLOCK: mine = mine & (q == 0)[None, :]
        tl.store(global_ptr + place, s_dec, mask=mine)


@triton.jit
def _load_tokens(x_ptr, source_ptr, count_ptr, tile_t, tile_d, rows, columns, tokens, stride_r: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
                 F: tl.constexpr, W: tl.constexpr, GROUPED: tl.constexpr):
    """x [T, D] of a tile of the padded tokens. The order of dimensions gives a thread all 16 tokens of a block, of F features."""
    column, i = tile_d * D + tl.arange(0, D)[None, None, :], tl.arange(0, 16)[None, :, None]
    first = tile_t * T + 16 * tl.arange(0, T // 16)[:, None, None]                # token that 16 of them begin with
    if GROUPED:
        row = tl.load(source_ptr + first // W, mask=first < tokens, other=0) + first % W
        valid = first % W + i < tl.load(count_ptr + first // W, mask=first < tokens, other=0)
    else: row, valid = first, first + i < rows
    # one address for 16 loads: the multiples of stride_r are part of their instructions, as it is a constexpr (a width of x compiles once more).
    # Left alone, Triton would give a thread 8 neighbouring features, and then not more than 2 tokens
    at = tl.max_contiguous((x_ptr + (row.to(tl.int64) * stride_r + column)) + i * stride_r, [1, 1, F])
    return tl.reshape(tl.load(at, mask=valid & (column < columns), other=0), [T, D])


@triton.jit
def _from_the_side(x, T: tl.constexpr, D: tl.constexpr, SIGNS: tl.constexpr, RHT: tl.constexpr):
    """x [T, D] -> (fp32 [D, T], each 16 tokens times H when RHT; bits of the largest magnitude of each 16, [D, T / 16]).
    SIGNS: bit i is set where row i of H is negated. Sylvester's matrix is four rounds of sums and differences of tokens 8, 4, 2 and 1 apart."""
    if not RHT:
        return tl.trans(_fp32(x)), tl.trans(_largest(tl.reshape(x, [T // 16, 16, D]), T // 16, D))
    # signs cost nothing: a sum takes its operands with either. NOTE: -x would cost a sum, which is how Triton writes it: 0 - x
    x = _fp32(x) * tl.where((SIGNS >> (tl.arange(0, T) % 16)) & 1 == 1, -1.0, 1.0)[:, None]
    for step in tl.static_range(4):
        a, b = tl.split(tl.permute(tl.reshape(x, [T >> (4 - step), 2, 8 >> step, D]), [0, 2, 3, 1]))
        if step == 3:       # the larger of |a + b| and |a - b|, rounded alike
            largest = tl.reshape(tl.abs(a) + tl.abs(b), [T // 16, 8, D]).to(tl.int32, bitcast=True)
        if step == 0:       # times 1/4, exactly: half of the products are part of a sum
            b *= 0.25
            quarter = tl.full(a.shape, 0.25, tl.float32)
            plus, minus = tl.fma(a, quarter, b), tl.fma(a, quarter, b * -1.0)
        else: plus, minus = a + b, a - b
        x = tl.reshape(tl.permute(tl.join(plus, minus), [0, 3, 1, 2]), [T, D])
    return tl.trans(x), tl.trans(tl.max(largest, axis=1))


@triton.jit
def _amax_pair_kernel(x_ptr, amax_ptr, source_ptr, count_ptr, group_ptr, rows, columns, tokens, stride_r: tl.constexpr, groups,
                      T: tl.constexpr, D: tl.constexpr, F: tl.constexpr, W: tl.constexpr, SIGNS: tl.constexpr, RHT: tl.constexpr,
                      ROWS: tl.constexpr, GROUPED: tl.constexpr):
    """amax_ptr [2, groups]: of x, and of its transform; one read for both."""
    tile_d, tile_t = tl.program_id(0), tl.program_id(1)
    x = _load_tokens(x_ptr, source_ptr, count_ptr, tile_t, tile_d, rows, columns, tokens, stride_r, T, D, F, W, GROUPED)
    y, x = _from_the_side(x, T, D, SIGNS, RHT)[1], _largest(tl.reshape(x, [T // 16, 16, D]), T // 16, D)       # W is 16: MXFP4 needs no maximum
    if GROUPED:
        q = tile_t * (T // W) + tl.arange(0, T // W)
        group = tl.load(group_ptr + q, mask=q < tokens // W, other=groups - 1)
        if ROWS: tl.atomic_max(amax_ptr + group, tl.max(x, axis=1), sem="relaxed")
        tl.atomic_max(amax_ptr + groups + group, tl.max(y, axis=0), sem="relaxed")
    else:
        if ROWS: _raise(amax_ptr, tl.max(tl.max(x, axis=1), axis=0))
        _raise(amax_ptr + groups, tl.max(tl.max(y, axis=1), axis=0))


@triton.jit(do_not_specialize=["k0", "k1"])
def _columns_kernel(x_ptr, amax_ptr, source_ptr, count_ptr, group_ptr, length_ptr, codes_ptr, scale_ptr, global_ptr, seed_ptr, k0, k1, rows, columns,
                    tokens, stride_r: tl.constexpr, groups, T: tl.constexpr, D: tl.constexpr, F: tl.constexpr, W: tl.constexpr, SIGNS: tl.constexpr,
                    RHT: tl.constexpr, GROUPED: tl.constexpr, STOCHASTIC: tl.constexpr, MX: tl.constexpr, NATIVE: tl.constexpr):
    """D rows of T / 16 blocks. tokens: what a row of the result holds; length_ptr: how many of them stage 01 would have, which numbers its draws."""
    tile_d, tile_t = tl.num_programs(0) - 1 - tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    x = _load_tokens(x_ptr, source_ptr, count_ptr, tile_t, tile_d, rows, columns, tokens, stride_r, T, D, F, W, GROUPED)
    q = tile_t * (T // W) + tl.arange(0, T // W)
    if GROUPED:
        group = tl.load(group_ptr + q, mask=q < tokens // W, other=groups - 1)
        amax, length = tl.load(amax_ptr + groups + group)[None, :], tl.load(length_ptr)
    else: amax, length = tl.load(amax_ptr + groups), tokens
    d = (tile_d * D + tl.arange(0, D)).to(tl.int64)
    half, word = tile_t * (T // 16) + tl.arange(0, T // 16), tile_t * (T // 8) + tl.arange(0, T // 8)
    block = d[:, None] * (length // 16) + half[None, :]
    x, bits = _from_the_side(x, T, D, SIGNS, RHT)
    if STOCHASTIC != "": k0, k1 = key_words(seed_ptr, k0, k1)
    words, byte, s_dec = _quantize_tile(x, bits, amax, block, k0, k1, D, T, 1, W, STOCHASTIC, False, MX, NATIVE, RHT)
    tl.store(codes_ptr + d[:, None] * (tokens // 8) + word[None, :], tl.reshape(words, [D, T // 8]),
             mask=(d < columns)[:, None] & (word < tokens // 8)[None, :])
    tl.store(scale_ptr + d[:, None] * (tokens // W) + q[None, :], byte.to(tl.uint8), mask=(d < columns)[:, None] & (q < tokens // W)[None, :])
    if not MX:
        if GROUPED:
            if tile_d == 0: tl.store(global_ptr + q[None, :], s_dec, mask=(q < tokens // W)[None, :])
        else: tl.store(global_ptr, s_dec, mask=(tile_d == 0) & (tile_t == 0))


@triton.jit
def _dequantize_kernel(codes_ptr, scale_ptr, global_ptr, out_ptr, rows, columns, global_e, global_r, global_q,
                       R: tl.constexpr, C: tl.constexpr, W: tl.constexpr, SINGLE: tl.constexpr, MX: tl.constexpr):
    tile_r, tile_c, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = (tile_r * R + tl.arange(0, R)).to(tl.int64)
    word, q, column = tile_c * (C // 8) + tl.arange(0, C // 8), tile_c * (C // W) + tl.arange(0, C // W), tile_c * C + tl.arange(0, C)
    inside = (row < rows)[:, None]
    at = e * rows + row[:, None]
    code = tl.load(codes_ptr + at * (columns // 8) + word[None, :], mask=inside & (word < columns // 8)[None, :], other=0)
    byte = tl.load(scale_ptr + at * (columns // W) + q[None, :], mask=inside & (q < columns // W)[None, :], other=0).to(tl.int32)
    if SINGLE: s_dec = tl.load(global_ptr + e * global_e)
    else: s_dec = tl.load(global_ptr + e * global_e + row[:, None] * global_r + q[None, :] * global_q, mask=inside & (q < columns // W)[None, :])
    if MX: scale = tl.where(byte == 255, float("nan"), tl.where(byte == 0, 5.877471754111438e-39, (byte << 23).to(tl.float32, bitcast=True)))
    else: scale = tl.where(byte == 0x7F, float("nan"), _decode_e4m3(byte))

    code = code[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]
    x = (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37        # 2^126
    x = tl.reshape(tl.reshape(x, [R, C // W, W]) * scale[:, :, None] * tl.broadcast_to(s_dec, [R, C // W])[:, :, None], [R, C])
    tl.store(out_ptr + at * columns + column[None, :], x.to(out_ptr.dtype.element_ty), mask=inside & (column < columns)[None, :])


@triton.jit
def _transpose_kernel(codes_ptr, out_ptr, rows, bytes_r, R: tl.constexpr, B: tl.constexpr):
    """Codes [e, rows, bytes_r] -> [e, 2 * bytes_r, rows / 2], both two to a byte: nibbles change partners."""
    tile_r, tile_b, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, at = tile_r * R + tl.arange(0, R), tile_b * B + tl.arange(0, B)
    codes = tl.load(codes_ptr + (e * rows + row)[:, None] * bytes_r + at[None, :], mask=(row < rows)[:, None] & (at < bytes_r)[None, :], other=0)
    upper, lower = tl.split(tl.permute(tl.reshape(codes, [R // 2, 2, B]), [0, 2, 1]))       # two neighbouring rows
    even, odd = (upper & 15) | (lower << 4), (upper >> 4) | (lower & 240)                   # the even and the odd column of each byte
    out = tl.trans(tl.reshape(tl.join(even, odd), [R // 2, 2 * B]))
    row, at = 2 * tile_b * B + tl.arange(0, 2 * B), tile_r * (R // 2) + tl.arange(0, R // 2)
    tl.store(out_ptr + (e * 2 * bytes_r + row)[:, None] * (rows // 2) + at[None, :], out,
             mask=(row < 2 * bytes_r)[:, None] & (at < rows // 2)[None, :])


# From here on the host's side: shapes, allocations, launches. Nothing reads a value back.

def _native(x: torch.Tensor) -> bool:
    return bool(_NATIVE) if _NATIVE is not None else x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 10


def _stack(x: torch.Tensor) -> torch.Tensor:
    """[..., K] as [e, rows, K] with contiguous rows; a copy only where the strides ask for one."""
    x = x.detach()
    x = x.reshape(1, -1, x.shape[-1]) if x.ndim < 3 else x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    return x if x.stride(-1) == 1 else x.contiguous()


def _key(rounding: str, seed: int | torch.Tensor | None) -> tuple:
    return split_key(seed if rounding == "stochastic" else None)


def _mode(rounding: str) -> str:
    """How the kernels round: "" to nearest, else stochastically, with an instruction that the interpreter lacks where they are compiled."""
    return "" if rounding == "nearest" else "portable" if triton.knobs.runtime.interpret else "ptx"


def _scale_dtype(format: str) -> torch.dtype:
    return torch.float8_e4m3fn if format == "nvfp4" else torch.float8_e8m0fnu


def _strides(scale: torch.Tensor, grid: tuple[int, ...]) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """A scale that broadcasts against grid [..., rows, blocks], as [e or 1, rows or 1, blocks or 1], with stride 0 where it has one entry."""
    scale = _stage().align(scale, len(grid))
    scale = scale.reshape(*[1] * (max(len(grid), 2) - scale.ndim), *scale.shape)
    lead = scale.shape[:-2]
    if lead.numel() > 1: scale = scale.expand(*grid[:-2], *scale.shape[-2:])
    scale = scale.reshape(math.prod(scale.shape[:-2]), *scale.shape[-2:]).contiguous()
    return scale, tuple(0 if size == 1 else stride for size, stride in zip(scale.shape, scale.stride()))


def _signs() -> int:
    """The negated rows of stage 01's Hadamard matrix, one bit each."""
    return sum((sign < 0) << i for i, sign in enumerate(_stage().HADAMARD_SIGNS.tolist()))


def _as_words(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes an element. PITFALL: a slice may start within a word, and then it must be copied."""
    codes = codes.contiguous()
    return (codes.clone() if codes.storage_offset() % 4 else codes).view(torch.int32)


def _given_amax(amax, grid: tuple[int, ...], x: torch.Tensor) -> torch.Tensor:
    """fp32 on x's device; ValueError for a shape that does not fit. Values on the device are not looked at."""
    if not isinstance(amax, torch.Tensor): amax = torch.full((), float(amax), device=x.device)
    amax = amax.detach().to(x.device, torch.float32)
    aligned = _stage().align(amax, len(grid)).shape
    if len(aligned) > len(grid) or any(a not in (1, g) for a, g in zip(aligned[::-1], grid[::-1])):
        raise ValueError(f"amax of shape {tuple(amax.shape)} does not fit the input {tuple(x.shape)}: pass a scalar, or one per leading index.")
    return amax


def _measure(x_erk: torch.Tensor, groups: int, group_r: torch.Tensor | None = None) -> torch.Tensor:
    """Largest magnitudes [groups]: one a matrix of the stack, or of the rows with the same number in group_r."""
    amax = torch.zeros(groups, device=x_erk.device)
    (e, rows, columns), tile = x_erk.shape, _tiles("amax", x_erk.shape[-1])
    if x_erk.numel():
        _amax_kernel[triton.cdiv(rows, tile["R"]), triton.cdiv(columns, tile["C"]), e](
            x_erk, amax.view(torch.int32), group_r, rows, columns, x_erk.stride(0), x_erk.stride(1), GROUPED=group_r is not None, **tile)
    return amax


def quantize(x, block=(1, 16), rounding="nearest", scale_rule="max", amax=None, seed=None, offset=0, format="nvfp4"):
    """Twin of stage 01's quantize. One read of x for amax when it is not given, one to quantize."""
    stage = _stage()
    height, width = stage.check_request(x, block, rounding, scale_rule, seed, format, "input")
    if scale_rule == "mse":
        return stage.quantize(x, block, rounding, scale_rule, amax, seed, offset, format, impl="torch")
    if rounding == "stochastic" and offset % 16: raise ValueError(f"draws come in blocks of 16: offset {offset} must be a multiple of 16.")
    lead, x_erk = x.shape[:-1], _stack(x)
    (e, rows, columns), mx, device = x_erk.shape, format == "mxfp4", x.device
    grid = (*lead[:-1], lead[-1] // height, columns // width) if lead else (columns // width,)
    measured = not mx and amax is None
    if mx: amax = torch.ones((), device=device)
    elif measured: amax = _measure(x_erk, e).view(lead[:-1] if x.ndim > 2 else ())
    else: amax = _given_amax(amax, grid, x)

    codes = torch.empty(e * rows, columns // 2, dtype=torch.uint8, device=device)
    scale = torch.empty(e * rows, columns // width, dtype=torch.uint8, device=device)
    amax_egq, strides = _strides(amax, grid)
    s_dec, tile = amax if mx else torch.empty_like(amax_egq), _tiles("quantize" + ", stochastic" * (rounding == "stochastic"), columns, height)
    if x.numel():
        _quantize_kernel[triton.cdiv(rows, tile["R"]), triton.cdiv(columns, tile["C"]), e](
            x_erk, amax_egq, codes.view(torch.int32), scale, s_dec, *_key(rounding, seed), offset // 16, rows, columns, x_erk.stride(0),
            x_erk.stride(1), *strides, H=height, W=width, BY_ROW=strides[1] != 0, BY_BLOCK=strides[2] != 0,
            STOCHASTIC=_mode(rounding), FOUR_OVER_SIX=scale_rule == "four_over_six", MX=mx, NATIVE=_native(x), BACKWARDS=measured,
            enable_fp_fusion=False, **tile)
    if s_dec.numel() != amax.numel() or not x.numel():       # more leading dimensions than amax has entries for, or no value at all
        s_dec = stage.global_scales(amax, stage.FOUR_OVER_SIX_MAX if scale_rule == "four_over_six" else stage.E4M3_MAX)[1]
    return stage.NVFP4Tensor(codes.view(*lead, columns // 2), scale.view(_scale_dtype(format)).view(*lead, columns // width), s_dec.view(amax.shape),
                             (height, width))


def quantize_rows(x_rd, offsets_e=None, rounding="nearest", seed=None, format="nvfp4"):
    """Twin of stage 01's quantize_rows: with offsets_e the rows of an expert share their second level."""
    amax = None
    if offsets_e is not None and format == "nvfp4":
        group_r = _stage().expert_of_rows(offsets_e, x_rd.shape[0])
        amax = _measure(_stack(x_rd), len(offsets_e), group_r)[group_r]
    return quantize(x_rd, (1, 16), rounding, amax=amax, seed=seed, format=format)


def _plan(offsets_e: torch.Tensor, rows: int, width: int) -> tuple[torch.Tensor, ...]:
    """Where the blocks of padded tokens come from: (first row in x, rows, expert) of each, and how many tokens there are, all on the device.
    A block beyond the last has 0 rows and belongs to one expert more than there are, whose maximum is 0."""
    stage, experts = _stage(), len(offsets_e)
    most = (rows + (width - 1) * min(experts, rows)) // width
    ends_e = stage.padded_offsets(offsets_e.long(), width)
    expert_q = torch.searchsorted(ends_e, torch.arange(most, device=ends_e.device) * width, right=True)
    at_e = torch.cat((offsets_e.long(), offsets_e.new_full((1,), rows).long()))              # one entry for the blocks beyond the last
    before_e = (ends_e - offsets_e).roll(1)                                                  # zero rows inserted before each expert
    before_e[:1] = 0
    source_q = torch.arange(most, device=ends_e.device) * width - torch.cat((before_e, before_e[-1:]))[expert_q]
    count_q = (at_e[expert_q] - source_q).clamp(0, width) * (expert_q < experts)
    return source_q.int(), count_q.int(), expert_q.int(), ends_e[-1:]


def _columns(x_rd, offsets_e, rounding, rht, seed, format, with_rows):
    """(second level of the rows, or None without with_rows; the columns) of a matrix."""
    stage, mx, grouped, device = _stage(), format == "mxfp4", offsets_e is not None, x_rd.device
    if x_rd.ndim != 2: raise ValueError(f"input has shape {tuple(x_rd.shape)}: columns are quantized from a matrix [rows, features].")
    width = stage.check_request(x_rd if with_rows else x_rd.new_empty(0), (1, 16), rounding, "max", seed, format, "input")[1]
    (rows, columns), x = x_rd.shape, _stack(x_rd)[0]
    source_q, count_q, group_q, length = _plan(offsets_e, rows, width) if grouped else (None,) * 4
    groups, tokens = (len(offsets_e) + 1, len(source_q) * width) if grouped else (1, triton.cdiv(rows, width) * width)

    codes = torch.empty(columns, tokens // 2, dtype=torch.uint8, device=device)
    scale = torch.empty(columns, tokens // width, dtype=torch.uint8, device=device)
    new = torch.ones if mx or not x.numel() else torch.empty                    # 1 is right for MXFP4 and for no values at all
    s_dec = new((1, tokens // width) if grouped and not mx else (), device=device)
    amax = torch.zeros(2, groups, device=device)
    if x.numel():
        shared = dict(W=width, SIGNS=_signs(), RHT=rht, GROUPED=grouped)
        if not mx:
            tile = _tiles("amax_pair", columns)
            _amax_pair_kernel[triton.cdiv(columns, tile["D"]), triton.cdiv(tokens, tile["T"])](
                x, amax.view(torch.int32), source_q, count_q, group_q, rows, columns, tokens, x.stride(0), groups, ROWS=with_rows, **shared, **tile)
        tile = _tiles("columns", columns)
        _columns_kernel[triton.cdiv(columns, tile["D"]), triton.cdiv(tokens, tile["T"])](
            x, amax, source_q, count_q, group_q, length, codes.view(torch.int32), scale, s_dec, *_key(rounding, seed), rows, columns, tokens,
            x.stride(0), groups, STOCHASTIC=_mode(rounding), MX=mx, NATIVE=_native(x), enable_fp_fusion=False, **shared, **tile)
    return amax[0], stage.NVFP4Tensor(codes, scale.view(_scale_dtype(format)), s_dec, (1, width))


def quantize_columns(x_rd, offsets_e=None, rounding="nearest", seed=None, format="nvfp4", rht=True):
    """Twin of stage 01's quantize_columns. With offsets_e the columns are longer than padded_offsets(offsets_e)[-1] and end in zeros."""
    return _columns(x_rd, offsets_e, rounding, rht, seed, format, with_rows=False)[1]


def quantize_pair(x_rd, offsets_e=None, rounding="nearest", rht=True, seed=None, format="nvfp4"):
    """Twin of stage 01's quantize_pair: x is read once for both maxima and once for each copy."""
    seeds = (None, None) if seed is None else _stage().pair_seeds(seed)
    amax_e, columns = _columns(x_rd, offsets_e, rounding, rht, seeds[1], format, with_rows=True)
    amax = amax_e[0] if offsets_e is None else amax_e[_stage().expert_of_rows(offsets_e, x_rd.shape[0])]
    return quantize(x_rd, (1, 16), rounding, amax=amax, seed=seeds[0], format=format), columns


def dequantize(q, dtype=torch.float32):
    """Twin of NVFP4Tensor.dequantize; float64 is cast from fp32, as there."""
    lead, columns = q.shape[:-1], q.shape[-1]
    e, rows = (lead[:-1].numel(), lead[-1]) if lead else (1, 1)
    # PITFALL: the interpreter cuts to bf16 where a GPU rounds, so there torch casts
    out = torch.empty(q.shape, dtype=torch.float32 if dtype == torch.float64 or triton.knobs.runtime.interpret else dtype, device=q.codes.device)
    global_erq, strides = _strides(q.global_scale, (*lead, columns // q.block[1]))
    if out.numel():
        tile = _tiles("dequantize", columns)
        _dequantize_kernel[triton.cdiv(rows, tile["R"]), triton.cdiv(columns, tile["C"]), e](
            _as_words(q.codes), q.block_scale.view(torch.uint8).contiguous(), global_erq, out, rows, columns, *strides, W=q.block[1],
            SINGLE=strides[1:] == (0, 0), MX=q.block_scale.dtype != torch.float8_e4m3fn, **tile)
    return out.to(dtype)


def transpose_codes(codes):
    """Twin of stage 01's transpose_codes: [..., R, K / 2] -> [..., K, R / 2]."""
    if codes.ndim < 2 or codes.shape[-2] % 2:
        raise ValueError(f"codes of shape {tuple(codes.shape)} cannot be transposed: two rows share a byte then, so the rows must be even in number.")
    *lead, rows, bytes_r = codes.shape
    out = torch.empty(*lead, 2 * bytes_r, rows // 2, dtype=torch.uint8, device=codes.device)
    if out.numel():
        tile = _tiles("transpose", bytes_r)
        _transpose_kernel[triton.cdiv(rows, tile["R"]), triton.cdiv(bytes_r, tile["B"]), math.prod(lead)](
            codes.contiguous(), out, rows, bytes_r, **tile)
    return out
