"""One decode step on the GPU: the twin of ssd_step and quantize_state in 02_mamba.py, section 7.

The idea: a step does little with much data. Every number of a state is read, multiplied three times and written back, so the kernel is a copy with
some arithmetic on the way, and its time is that of the copy. A program therefore takes a few rows of one head's state into registers, moves them
on by all t tokens there, and writes them once (or once a snapshot, or not at all). No program needs another's numbers.

                 n = 128 (state)                   x_t [p]  B_t, C_t [n]  dt_t
            +--------+--------+--------+--------+     |         |          |
    BLOCK_P |  S     |        |        |        |  <- S = exp(dt A) S + (dt x_p) B_n  for each token, in fp32
    rows p  |        |        |        |        |  -> y_p = sum over n of S C_n + D x_p
            +--------+--------+--------+--------+
    grid: (head and block of rows, batch row)

Work at Ultra's shape (batch 64, 256 heads of 64 x 128, one token): 134 M state numbers. Bytes: 1.07 GB read and written in fp32, 0.54 GB in fp16,
0.27 GB in int8; inputs and outputs are under 2 % of that. FLOPs: 5 a number and token, 0.7 GFLOP. The draws of stochastic rounding are about 10
integer instructions a number (the key of a block of 16 is shared), the rounding to fp16 about 8 more.

Measured on an H200, batch 64: fp32 0.264 ms (floor 0.25), fp16 0.139, int8 0.104; batch 1 in fp32 0.010. Stochastic rounding to fp16 took 0.183
with a hash for every number; since then one hash serves two. A thread block no wider than a row sends the state through shared memory: 1.1 ms.

Differences from the PyTorch function: none in the meaning. exp is Triton's, and S u B is one fused multiply-add on a GPU, so fp32 states agree to
rounding. Equal fp32 states give equal codes, draws included. fp64 states are computed in fp64.

Sources: Ultra report, inference; the selective state update of state-spaces/mamba, vLLM and FlashInfer for the contract (slots, snapshots, formats).
"""
from __future__ import annotations

import importlib

import torch
import triton
import triton.language as tl

from kernels.draws import block_keys, draw16, split_key
from kernels.interpreter import narrow


def _tiles(b: int, h: int, p: int, n: int, t: int, itemsize: int) -> dict:
    """Launch parameters by shape; itemsize: bytes of one state number.

    PITFALL: more threads than a row has numbers. Else Triton reads B and C in a layout of their own, each number once, and sends the state through
    shared memory to meet them: fp16_sr at 4 warps, 64 rows and n = 128 compiled to 255 registers and 324 shuffles, at 8 warps to 77 and 16.
    """
    block_n = triton.next_power_of_2(n)
    warps = max(8, block_n // 16)
    rows = 64 if b * h >= 1024 else 16          # a small batch: more and smaller programs
    return dict(BLOCK_P=min(rows, triton.next_power_of_2(p)), BLOCK_N=block_n, num_warps=min(warps, 16))


def _row_tiles(n: int) -> dict:
    """The same for quantize_state, whose tile is [rows, n]."""
    block_n = triton.next_power_of_2(n)
    return dict(BLOCK_P=max(1, 8192 // block_n), BLOCK_N=block_n, num_warps=8)


# --- draws and formats

@triton.jit
def _key(seed_ptr, k0, k1):
    """The two words of mix64(seed): from the host, or hashed here when the seed is a number in the GPU's memory (a CUDA graph can change that)."""
    if seed_ptr is not None:
        z = tl.load(seed_ptr).to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        z = z ^ (z >> 31)
        k0, k1 = z.to(tl.uint32).to(tl.int32, bitcast=True), (z >> 32).to(tl.uint32).to(tl.int32, bitcast=True)
    return k0, k1


@triton.jit
def _bits(first, row_p, n, k0, k1, N: tl.constexpr, ALIGNED: tl.constexpr):
    """16 random bits for the elements first + row · N + n, [rows, n]; first is int64."""
    start_p = first + row_p * N
    if ALIGNED:     # rows start at a block of 16: a thread's neighbouring numbers have one key, and the compiler sees that in n >> 4
        keys = block_keys((start_p >> 4)[:, None] + (n >> 4), k0, k1)
        return draw16(keys, n & 15)
    element = start_p[:, None] + n
    return draw16(block_keys(element >> 4, k0, k1), (element & 15).to(tl.int32))


@triton.jit
def _fp16(x, bits, STOCHASTIC: tl.constexpr):
    """fp32 -> fp16; see fp16_stochastic in 02_mamba.py."""
    # PITFALL: minimum and maximum drop a NaN unless told not to, and a broken state would look like a large one.
    x = tl.minimum(tl.maximum(x, -65504.0, propagate_nan=tl.PropagateNan.ALL), 65504.0, propagate_nan=tl.PropagateNan.ALL)
    if STOCHASTIC:
        signed = ((x.to(tl.int32, bitcast=True) & -0x80000000) | 0x38800000).to(tl.float32, bitcast=True)      # 2^-14 with x's sign
        shift = tl.where(tl.abs(x) < 6.103515625e-05, signed, 0.0)
        carried = (x + shift).to(tl.int32, bitcast=True) + (bits >> 3)
        rounded = (carried & -0x2000).to(tl.float32, bitcast=True) - shift
        x = tl.fma(x, 0.0, rounded)     # a NaN's bits may have carried into 0: x · 0 brings it back, for one instruction
    return x.to(tl.float16)


@triton.jit
def _int8(x, bits, STOCHASTIC: tl.constexpr):
    """fp32 [rows, n] -> (codes, scale [rows])."""
    amax = tl.max(tl.abs(x), axis=1)
    some = tl.where(amax > 1e-30, amax, 127.0)      # a row of nothing gets scale 1 and codes 0
    up, scale = tl.where(amax > 1e-30, tl.div_rn(127.0, some), 0.0), tl.div_rn(some, 127.0)
    x = x * up[:, None]
    if STOCHASTIC:
        x += bits.to(tl.float32) * 1.52587890625e-05        # u, in steps of 2^-16
        codes = tl.floor(tl.minimum(tl.maximum(x, -127.0), 127.0)).to(tl.int8)
    else: codes = (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)       # beside 1.5 · 2^23 fp32 keeps integers only, in its lowest bits
    return codes, scale


@triton.jit
def _store(S, state_ptr, scale_ptr, first_row, row_p, n, live_p, in_n, first_draw, k0, k1,
           N: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr):
    """Round a tile once and store it; first_row (int64) is the tile's first row in the pool, first_draw that of its numbers' draws."""
    bits = 0
    if STOCHASTIC: bits = _bits(first_draw, row_p, n, k0, k1, N, ALIGNED)
    at, live = state_ptr + first_row * N + (row_p * N)[:, None] + n, live_p[:, None] & in_n
    if state_ptr.dtype.element_ty == tl.int8:
        codes, scale_p = _int8(S, bits, STOCHASTIC)
        tl.store(at, codes, mask=live)
        tl.store(scale_ptr + first_row + row_p, scale_p, mask=live_p)
    elif state_ptr.dtype.element_ty == tl.float16: tl.store(at, _fp16(S, bits, STOCHASTIC), mask=live)
    else: tl.store(at, S, mask=live)


# --- kernels

@triton.jit(do_not_specialize=["k0", "k1"])
def _step_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, y_ptr, state_ptr, scale_ptr, doc_ptr, slots_ptr, seed_ptr, k0, k1,
                 x_b, x_t, x_h, dt_b, dt_t, dt_h, B_b, B_t, B_g, C_b, C_t, C_g, slots_stride,
                 T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, WRITE: tl.constexpr, STOCHASTIC: tl.constexpr,
                 BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    wide = tl.float64 if state_ptr.dtype.element_ty == tl.float64 else tl.float32
    head, b = tl.program_id(0) // BLOCKS, tl.program_id(1).to(tl.int64)
    group, low = head // (H // G), tl.program_id(0) % BLOCKS * BLOCK_P
    row_p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)[None, :]

    slot = b
    if slots_ptr is not None: slot = tl.load(slots_ptr + b * slots_stride).to(tl.int64)
    rows = tl.where(slot >= 0, P, 0)        # how many rows of the head are there: none without a sequence or a token
    if doc_ptr is not None: rows = tl.where(tl.load(doc_ptr + b) >= 0, rows, 0)
    in_p, live_p, in_n = low + row_p < P, low + row_p < rows, n < N
    first_row = (slot * H + head) * P + low         # int64: a pool of 1,100 slots has more numbers than int32
    if STOCHASTIC: k0, k1 = _key(seed_ptr, k0, k1)

    S = tl.load(state_ptr + first_row * N + (row_p * N)[:, None] + n, mask=live_p[:, None] & in_n, other=0).to(wide)
    if scale_ptr is not None: S *= tl.load(scale_ptr + first_row + row_p, mask=live_p, other=0.0)[:, None]
    A = tl.load(A_ptr + head).to(wide)
    x_ptr += b * x_b + head * x_h + low
    dt_ptr += b * dt_b + head * dt_h
    B_ptr += b * B_b + group * B_g
    C_ptr += b * C_b + group * C_g
    y_ptr += (b * T * H + head) * P + low

    for j in range(T):
        dt = tl.load(dt_ptr + j * dt_t).to(wide)
        x_p = tl.load(x_ptr + j * x_t + row_p, mask=in_p, other=0).to(wide)
        B_n = tl.load(B_ptr + j * B_t + n, mask=in_n, other=0).to(wide)
        C_n = tl.load(C_ptr + j * C_t + n, mask=in_n, other=0).to(wide)
        # fma by name: left to the compiler, it might fuse the other product in another variant, and snapshots would differ from single steps
        S = tl.fma((dt * x_p)[:, None] + tl.zeros_like(S), B_n + tl.zeros_like(S), tl.exp(dt * A) * S)
        y_p = tl.sum(S * C_n, axis=1)
        if D_ptr is not None: y_p += tl.load(D_ptr + head).to(wide) * x_p
        tl.store(y_ptr + j * (H * P) + row_p, narrow(tl.where(live_p, y_p, 0.0), y_ptr.dtype.element_ty), mask=in_p)
        if WRITE == "each":
            into = tl.load(slots_ptr + b * slots_stride + 1 + j).to(tl.int64)
            row, keep_p = (into * H + head) * P + low, low + row_p < tl.where(into >= 0, rows, 0)
            _store(S, state_ptr, scale_ptr, row, row_p, n, keep_p, in_n, row * N, k0, k1, N, STOCHASTIC, N % 16 == 0)
    if WRITE == "last": _store(S, state_ptr, scale_ptr, first_row, row_p, n, live_p, in_n, first_row * N, k0, k1, N, STOCHASTIC, N % 16 == 0)


@triton.jit(do_not_specialize=["k0", "k1", "offset", "rows"])
def _quantize_kernel(x_ptr, state_ptr, scale_ptr, seed_ptr, k0, k1, offset, rows, N: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
                     BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_P
    row_p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)[None, :]
    live_p = first_row + row_p < rows
    if STOCHASTIC: k0, k1 = _key(seed_ptr, k0, k1)
    x = tl.load(x_ptr + first_row * N + (row_p * N)[:, None] + n, mask=live_p[:, None] & (n < N), other=0.0)
    _store(x, state_ptr, scale_ptr, first_row, row_p, n, live_p, n < N, first_row * N + offset, k0, k1, N, STOCHASTIC, ALIGNED)


# --- the twins

def _seed(seed, state_format: str):
    """(tensor, k0, k1) to hand to a kernel: a seed in memory is hashed there, so that nobody waits for its value."""
    if not state_format.endswith("_sr"): return None, 0, 0
    return (seed, 0, 0) if isinstance(seed, torch.Tensor) else (None, *split_key(seed))


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
            x, codes, scale, *_seed(seed, state_format), offset, rows, N=n, STOCHASTIC=stochastic, ALIGNED=n % 16 == 0 and offset % 16 == 0,
            enable_fp_fusion=False, **tiles)
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
    tiles = _tiles(b, h, p, n, t, codes.itemsize)
    # NOTE: fused, x · up + u of int8 would now and then be another code than the definition's; the others have nothing to fuse but y's sum
    if y.numel():
        _step_kernel[(h * triton.cdiv(p, tiles["BLOCK_P"]), b)](
            x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, y, codes, scale[0] if scale else None, doc_b, slots_b, *_seed(seed, state_format),
            *x_bthp.stride()[:3], *dt_bth.stride(), *B_btgn.stride()[:3], *C_btgn.stride()[:3], 0 if slots_b is None else slots_b.stride(0),
            T=t, H=h, G=g, P=p, N=n, WRITE=write, STOCHASTIC=state_format.endswith("_sr"), enable_fp_fusion=codes.dtype != torch.int8, **tiles)
    return y, state
