"""One decode step on the GPU: the twin of ssd_step and quantize_state in 02_mamba.py, section 7.

The idea: a step does little with much data. Every number of a state is read, multiplied three times and written back, so the kernel is a copy with
some arithmetic on the way, and its time is that of the copy, as long as the arithmetic is short: with 8 bits a number, or with draws, instructions
are what counts. A program therefore takes a few rows of one head's state into registers, moves them on by all t tokens there, and writes them once
(or once a snapshot, or not at all); then it turns to the next of its heads. No program needs another's numbers.

                 n = 128 (state)                   x_t [p]  B_t, C_t [n]  dt_t
            +--------+--------+--------+--------+     |         |          |
    BLOCK_P |  S     |        |        |        |  <- S = exp(dt A) S + (dt x_p) B_n  for each token, in fp32
    rows p  |        |        |        |        |  -> y_p = sum over n of S C_n + D x_p
            +--------+--------+--------+--------+
    grid: (some heads of one group and block of rows, batch row)

Work at Ultra's shape (batch 64, 256 heads of 64 x 128, one token): 134 M state numbers. Bytes: 1.07 GB read and written in fp32, 0.54 GB in fp16,
0.27 GB in int8; inputs and outputs are under 2 % of that. FLOPs: 5 a number and token, 0.7 GFLOP.

A number's instructions, compiled for sm_90, one token and four heads a program: 10 in fp16 and 16 in int8 to nearest, 23 and 25 stochastically. In
fp16_sr 4 are the state's, 7 the draw's (half a hash, and an eighth of a key: two threads compute that of a block of 16), 6.5 the rounding's; the
rest is what a thread does once a head or once a program (addresses, B and C, the sum for y) and has 32 numbers to share it. What keeps them few:
    both    several heads a program: addresses and the hash of the seed once
    fp16    x · 2^-112 puts fp16's grid, subnormal numbers included, on fp32's, and one integer sum rounds, whatever the magnitude
    int8    no conversion but the one that reads a code: u is made of a draw's bits, and a floating-point sum that rounds down is a floor
    int8    the old scale is multiplied with the row's decay, not with every number

Measured on an H200, batch 64: fp32 0.264 ms (floor 0.25), fp16 0.138, fp16_sr 0.154, int8 0.101, int8_sr 0.134; batch 1 in fp32 0.009. What was
tried: one hash for every number, 0.183 for both stochastic formats; 80 registers at most, so that three programs fit on a processor, 0.155 -> 0.154
and 0.149 -> 0.134; 64 registers spill, 0.161. A thread block no wider than a row sends the state through shared memory: 1.1 ms.

Differences from the PyTorch function: none in the meaning. exp is Triton's, and S u B is one fused multiply-add on a GPU, so fp32 states agree to
rounding. Equal fp32 states give equal codes, draws included. fp64 states are computed in fp64.

Sources: Ultra report, inference; the selective state update of state-spaces/mamba, vLLM and FlashInfer for the contract (slots, snapshots, formats).
"""
from __future__ import annotations

import importlib
import math

import torch
import triton
import triton.language as tl

from kernels.draws import block_keys, key_words, split_key
from kernels.interpreter import INTERPRETED, narrow


def _tiles(b: int, h: int, p: int, n: int, t: int, itemsize: int, stochastic: bool) -> dict:
    """Launch parameters by shape; itemsize: bytes of one state number. HEADS: at most so many a program, and a divisor of a group's.

    PITFALL: more threads than a row has numbers. Else Triton reads B and C in a layout of their own, each number once, and sends the state through
    shared memory to meet them: fp16_sr at 4 warps, 64 rows and n = 128 compiled to 255 registers and 324 shuffles, at 8 warps to 77 and 16.
    """
    block_n = triton.next_power_of_2(n)
    warps = max(8, block_n // 16)
    rows = 64 if b * h >= 1024 else 16          # a small batch: more and smaller programs
    # what a program does before its first head serves them all: much where draws are made, nothing to a program that waits for memory
    heads = 1 if b * h < 4096 else 4 if stochastic else 2 if itemsize == 2 else 1
    return dict(HEADS=heads, BLOCK_P=min(rows, triton.next_power_of_2(p)), BLOCK_N=block_n, num_warps=min(warps, 16),
                maxnreg=80 if stochastic and t == 1 else None)      # three programs a processor and not two


def _row_tiles(n: int) -> dict:
    """The same for quantize_state, whose tile is [rows, n]."""
    block_n = triton.next_power_of_2(n)
    return dict(BLOCK_P=max(1, 8192 // block_n), BLOCK_N=block_n, num_warps=8)


# --- draws and formats

@triton.jit
def _hash(first, row_p, n, k0, k1, N: tl.constexpr, ALIGNED: tl.constexpr):
    """(word, odd) of the elements first + row · N + n, [rows, n]; first is int64. Two neighbours have the same word, the hash of draw16 short of its
    last step, word ^= word >> 16: the odd one's draw is the word's upper half as it is, the even one's upper half ^ lower half."""
    start_p = first + row_p * N
    if ALIGNED:     # rows start at a block of 16: a thread's neighbouring numbers have one key, and the compiler sees that in n >> 4
        keys, lane = block_keys((start_p >> 4)[:, None] + (n >> 4), k0, k1), n & 15
    else:
        element = start_p[:, None] + n
        keys, lane = block_keys(element >> 4, k0, k1), (element & 15).to(tl.int32)
    word = keys + (lane >> 1).to(tl.uint32) * 0x9E3779B9
    word ^= word >> 16
    word *= 0x7FEB352D
    word ^= word >> 15
    word *= 0x846CA68B
    return word, tl.broadcast_to((lane & 1) == 1, word.shape)


@triton.jit
def _rounded_product(x, y):
    """x · y that no later sum is fused with: x · up + u of int8, rounded once, would now and then be another code than the definition's."""
    if INTERPRETED: return x * y
    return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, tl.broadcast_to(y, x.shape)], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _by_127(x):
    """x / 127 for x > 1e-30, as if rounded once: a quotient by the rounded 1 / 127, then what that left of x, divided too. The same as tl.div_rn's
    for each of the 2^23 mantissas; that one branches and takes four times the instructions, and the interpreter's fma rounds twice."""
    if INTERPRETED: return tl.div_rn(x, 127.0)
    quotient = x * 0.007874015718698502
    return tl.where(x < float("inf"), tl.fma(tl.fma(quotient, -127.0, x), 0.007874015718698502, quotient), x)


@triton.jit
def _floor(x):
    """The integer below, in the lowest bits: a sum with 1.5 · 2^23 that rounds down. A conversion runs at an eighth of the speed of a sum."""
    if INTERPRETED: return tl.floor(x).to(tl.int32)
    return tl.inline_asm_elementwise("add.rm.f32 $0, $1, 0f4B400000;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _fp16(x, word, odd, STOCHASTIC: tl.constexpr):
    """fp32 -> fp16; see fp16_stochastic in 02_mamba.py."""
    # PITFALL: a clamp drops a NaN unless told not to, and a broken state would look like a large one.
    x = tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    if STOCHASTIC:
        # times 2^-112, fp16's smallest normal number is fp32's: both have their subnormal numbers below, and 13 bits follow every fp16's last one
        draw = tl.where(odd, word, (word << 16) ^ (word & 0xFFFF0000))         # in the upper half; 13 bits of it are used
        carried = (x * 1.925929944387236e-34).to(tl.int32, bitcast=True) + (draw >> 19).to(tl.int32)
        # a NaN's bits may have carried into 0: |x| · 0 brings it back, and makes what was rounded to -0 the definition's +0
        x = tl.fma((carried & -0x2000).to(tl.float32, bitcast=True), 5.192296858534828e33, tl.abs(x) * 0.0)
    return x.to(tl.float16)


@triton.jit
def _int8(x, word, odd, STOCHASTIC: tl.constexpr):
    """fp32 [rows, n] -> (codes, scale [rows])."""
    amax = tl.max(tl.abs(x), axis=1)
    some = tl.where(amax > 1e-30, amax, 127.0)      # a row of nothing gets scale 1 and codes 0
    up, scale = tl.where(amax > 1e-30, tl.div_rn(127.0, some), 0.0), _by_127(some)
    x = _rounded_product(x, up[:, None])
    if STOCHASTIC:
        u = (word >> 16) | 0x43000000           # beside 128 fp32's last bit is 2^-16, a draw's
        u = tl.where(odd, u, u ^ (word & 0xFFFF)).to(tl.float32, bitcast=True) - 128.0
        codes = _floor(tl.maximum(x + u, -127.0))        # x is at most 127.00001, and with u below 128
    else: codes = (x + 12582912.0).to(tl.int32, bitcast=True)       # beside 1.5 · 2^23 fp32 keeps integers only, in its lowest bits
    return codes.to(tl.int8), scale


@triton.jit
def _store(S, state_ptr, scale_ptr, first_row, row_p, n, live_p, in_n, first_draw, k0, k1,
           N: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr):
    """Round a tile once and store it; first_row (int64) is the tile's first row in the pool, first_draw that of its numbers' draws."""
    word, odd = 0, 0
    if STOCHASTIC: word, odd = _hash(first_draw, row_p, n, k0, k1, N, ALIGNED)
    at, live = state_ptr + first_row * N + (row_p * N)[:, None] + n, live_p[:, None] & in_n
    if state_ptr.dtype.element_ty == tl.int8:
        codes, scale_p = _int8(S, word, odd, STOCHASTIC)
        tl.store(at, codes, mask=live)
        tl.store(scale_ptr + first_row + row_p, scale_p, mask=live_p)
    elif state_ptr.dtype.element_ty == tl.float16: tl.store(at, _fp16(S, word, odd, STOCHASTIC), mask=live)
    else: tl.store(at, S, mask=live)


# --- kernels

@triton.jit(do_not_specialize=["k0", "k1"])
def _step_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, y_ptr, state_ptr, scale_ptr, doc_ptr, slots_ptr, seed_ptr, k0, k1,
                 x_b, x_t, x_h, dt_b, dt_t, dt_h, B_b, B_t, B_g, C_b, C_t, C_g, slots_stride,
                 T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, WRITE: tl.constexpr, STOCHASTIC: tl.constexpr,
                 HEADS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    wide = tl.float64 if state_ptr.dtype.element_ty == tl.float64 else tl.float32
    first_head, b = tl.program_id(0) // BLOCKS * HEADS, tl.program_id(1).to(tl.int64)
    group, low = first_head // (H // G), tl.program_id(0) % BLOCKS * BLOCK_P
    row_p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)[None, :]

    slot = b
    if slots_ptr is not None: slot = tl.load(slots_ptr + b * slots_stride).to(tl.int64)
    rows = tl.where(slot >= 0, P, 0)        # how many rows of a head are there: none without a sequence or a token
    if doc_ptr is not None: rows = tl.where(tl.load(doc_ptr + b) >= 0, rows, 0)
    in_p, live_p, in_n = low + row_p < P, low + row_p < rows, n < N
    row = (slot * H + first_head) * P + low         # int64: a pool of 1,100 slots has more numbers than int32
    if STOCHASTIC: k0, k1 = key_words(seed_ptr, k0, k1)
    x_ptr += b * x_b + first_head * x_h + low
    dt_ptr += b * dt_b + first_head * dt_h
    B_ptr += b * B_b + group * B_g
    C_ptr += b * C_b + group * C_g
    y_ptr += (b * T * H + first_head) * P + low

    for i in range(HEADS):
        S = tl.load(state_ptr + row * N + (row_p * N)[:, None] + n, mask=live_p[:, None] & in_n, other=0).to(wide)
        unit_p = tl.full((BLOCK_P,), 1.0, wide)
        if scale_ptr is not None: unit_p = tl.load(scale_ptr + row + row_p, mask=live_p, other=0.0)        # S in units of a row's scale, once
        A = tl.load(A_ptr + first_head + i).to(wide)
        for j in range(T):
            dt = tl.load(dt_ptr + i * dt_h + j * dt_t).to(wide)
            x_p = tl.load(x_ptr + i * x_h + j * x_t + row_p, mask=in_p, other=0).to(wide)
            B_n = tl.load(B_ptr + j * B_t + n, mask=in_n, other=0).to(wide)
            C_n = tl.load(C_ptr + j * C_t + n, mask=in_n, other=0).to(wide)
            # fma by name: left to the compiler, it might fuse the other product in another variant, and snapshots would differ from single steps
            S = tl.fma(tl.broadcast_to((dt * x_p)[:, None], S.shape), tl.broadcast_to(B_n, S.shape), (tl.exp(dt * A) * unit_p)[:, None] * S)
            unit_p = tl.full((BLOCK_P,), 1.0, wide)
            y_p = tl.sum(S * C_n, axis=1)
            if D_ptr is not None: y_p += tl.load(D_ptr + first_head + i).to(wide) * x_p
            tl.store(y_ptr + (j * H + i) * P + row_p, narrow(tl.where(live_p, y_p, 0.0), y_ptr.dtype.element_ty), mask=in_p)
            if WRITE == "each":
                into = tl.load(slots_ptr + b * slots_stride + 1 + j).to(tl.int64)
                to_row, keep_p = (into * H + first_head + i) * P + low, low + row_p < tl.where(into >= 0, rows, 0)
                _store(S, state_ptr, scale_ptr, to_row, row_p, n, keep_p, in_n, to_row * N, k0, k1, N, STOCHASTIC, N % 16 == 0)
        if WRITE == "last": _store(S, state_ptr, scale_ptr, row, row_p, n, live_p, in_n, row * N, k0, k1, N, STOCHASTIC, N % 16 == 0)
        row += P


@triton.jit(do_not_specialize=["k0", "k1", "offset", "rows"])
def _quantize_kernel(x_ptr, state_ptr, scale_ptr, seed_ptr, k0, k1, offset, rows, N: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
                     BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_P
    row_p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)[None, :]
    live_p = first_row + row_p < rows
    if STOCHASTIC: k0, k1 = key_words(seed_ptr, k0, k1)
    x = tl.load(x_ptr + first_row * N + (row_p * N)[:, None] + n, mask=live_p[:, None] & (n < N), other=0.0)
    _store(x, state_ptr, scale_ptr, first_row, row_p, n, live_p, n < N, first_row * N + offset, k0, k1, N, STOCHASTIC, ALIGNED)


# --- the twins

def quantize_state(state_bhpn, state_format: str, seed=None, offset: int = 0):
    """Same arguments and results as quantize_state in 02_mamba.py."""
    stage = importlib.import_module("02_mamba")
    stage.check_format(state_format, seed)
    if state_format == "fp32": return state_bhpn
    x = state_bhpn.float().contiguous()
    codes = torch.empty_like(x, dtype=stage.STATE_FORMATS[state_format])
    scale = torch.empty_like(x[..., 0]).contiguous() if codes.dtype == torch.int8 else None
    n = x.shape[-1]
    rows, tiles, stochastic = x.numel() // max(n, 1), _row_tiles(n), state_format.endswith("_sr")
    if x.numel():
        _quantize_kernel[(triton.cdiv(rows, tiles["BLOCK_P"]),)](
            x, codes, scale, *split_key(seed if stochastic else None), offset, rows, N=n, STOCHASTIC=stochastic,
            ALIGNED=n % 16 == 0 and offset % 16 == 0,
            **tiles)
    return codes if scale is None else stage.QuantizedState(codes, scale)


def ssd_step(x, dt, A_h, B, C, D_h=None, state_bhpn=None, doc_b=None, slots_b=None, write: str = "last", state_format: str = "fp32", seed=None):
    """Same arguments and results as ssd_step in 02_mamba.py."""
    stage = importlib.import_module("02_mamba")
    state = stage.check_step(x, dt, A_h, B, C, D_h, state_bhpn, doc_b, slots_b, write, state_format, seed)
    x_bthp, dt_bth, B_btgn, C_btgn = (z if x.dim() == 4 else z[:, None] for z in (x, dt, B, C))
    x_bthp, B_btgn, C_btgn = (z if z.stride(-1) == 1 else z.contiguous() for z in (x_bthp, B_btgn, C_btgn))
    (b, t, h, p), (g, n) = x_bthp.shape, B_btgn.shape[2:]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    A_h, D_h, doc_b, slots_b = (None if z is None else z.contiguous() for z in (A_h, D_h, doc_b, slots_b))
    codes, *scale = stage.parts(state)
    stochastic = state_format.endswith("_sr")
    tiles = _tiles(b, h, p, n, t, codes.itemsize, stochastic)
    tiles["HEADS"] = math.gcd(tiles["HEADS"], h // g)
    if y.numel():
        _step_kernel[(h // tiles["HEADS"] * triton.cdiv(p, tiles["BLOCK_P"]), b)](
            x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, y, codes, scale[0] if scale else None, doc_b, slots_b,
            *split_key(seed if stochastic else None),
            *x_bthp.stride()[:3], *dt_bth.stride(), *B_btgn.stride()[:3], *C_btgn.stride()[:3], 0 if slots_b is None else slots_b.stride(0),
            T=t, H=h, G=g, P=p, N=n, WRITE=write, STOCHASTIC=stochastic, **tiles)
    return y, state
