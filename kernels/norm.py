"""RMSNorm and its gated, grouped form, the twins of `rmsnorm` and `gated_rmsnorm` in 02_mamba.py, forward and backward.

The idea. One kernel serves both: a row is what is normed at once, a whole token or one group of it, and the gate is one more input.
    u = x   or   y silu(z)          s = 1 / sqrt(mean(u²) + eps)          out = u s weight
A row fits the registers of one program, so each input is read once: nothing is written between the square, the mean and the product. For the
backward pass only s is kept, 4 bytes a row; u and silu(z) are cheaper to compute again than to store and load.
    g = d_out weight                du = s (g - u s mean(g u s))          dweight = sum over tokens of d_out u s

The tiling, here with 2 groups; a program takes STEPS tiles of ROWS tokens of one group, one below the other, and keeps the weights in registers:

                 group 0       group 1
              +-------------+-------------+
    tokens    | program 0   | program 1   |   a tile: ROWS tokens, the whole width of the group
       |      |   STEPS     |             |
       v      |   tiles     |             |   backward: the sum for dweight stays in registers on the way down and is written once a program;
              +-------------+-------------+   PyTorch adds the programs' sums, so two runs give the same bits
              | program 2   | program 3   |

Decoding adds a block's output to the residual stream before each norm: add_rmsnorm does both in one launch, without a gradient.
A width that is no power of two is masked; the zeros in the rest change no sum.

Bytes at Ultra's shape, bf16. rmsnorm, 8192 tokens x 8192: forward 268 MB (read x, write out), 0.063 ms at 4.28 TB/s; backward 403 MB (read x and
d_out, write dx), 0.094 ms. gated_rmsnorm, 8192 x 16384: forward 805 MB, 0.188 ms; backward 1342 MB (read y, z, d_out, write dy, dz), 0.314 ms.
Measured on an H200: rmsnorm 0.071 and with backward 0.182, gated 0.191 and 0.547. Tried: short programs of 16 tiles in the backward pass, 0.203.
FLOPs: 4 to 15 an element, far below what the bytes leave time for. float64 inputs are computed in float64, all others in float32.

Sources: 02_mamba.py section 6; the layer norm of Triton's tutorials for partial sums of dweight (no code).
"""
from __future__ import annotations

import importlib

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.interpreter import narrow


def _tiles(width: int, gated: bool, backward: bool) -> dict:
    """Launch parameters: a program takes STEPS tiles of ROWS tokens, and loads STAGES - 1 tiles ahead. Narrow rows share a tile, wide ones take
    more warps. NOTE: fixed by the shape, not by the GPU's number of processors, so that dweight is summed in the same order everywhere."""
    block = triton.next_power_of_2(width)
    tall = max(1, 2048 // block)
    if backward: return dict(BLOCK=block, ROWS=tall, STEPS=64, STAGES=2 if gated else 3, num_warps=max(4, min(8, block // 1024)))
    return dict(BLOCK=block, ROWS=tall, STEPS=1, STAGES=1, num_warps=max(4, min(16, block // 1024)))


@triton.jit
def _place(program, GROUPS: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr):
    """(first token, group) of a program; the groups of a token are neighbours, because they are neighbours in memory."""
    # NOTE: int64, because tokens times the features of a projection pass 2^31 in long batches
    return tl.cast(program // GROUPS, tl.int64) * (STEPS * ROWS), program % GROUPS


@triton.jit
def _forward(x_ptr, z_ptr, weight_ptr, out_ptr, scale_ptr, sum_ptr, rows, x_stride, z_stride, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
             EPS: tl.constexpr, GATED: tl.constexpr, SAVE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
             STEPS: tl.constexpr, STAGES: tl.constexpr):
    first, group = _place(tl.program_id(0), GROUPS, STEPS, ROWS)
    i_1w = tl.arange(0, BLOCK)[None, :]
    column_1w = group * WIDTH + i_1w
    weight_1w = tl.load(weight_ptr + column_1w, mask=i_1w < WIDTH, other=0).to(WIDE)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row_r1 = (first + step * ROWS + tl.arange(0, ROWS))[:, None]
        ok_rw = (row_r1 < rows) & (i_1w < WIDTH)
        u_rw = tl.load(x_ptr + row_r1 * x_stride + column_1w, mask=ok_rw, other=0).to(WIDE)
        if GATED:
            z_rw = tl.load(z_ptr + row_r1 * z_stride + column_1w, mask=ok_rw, other=0).to(WIDE)
            u_rw *= z_rw / (1 + tl.exp(-z_rw))
        if sum_ptr is not None:         # what is normed is the sum as it is stored
            sum_rw = narrow(u_rw + tl.load(z_ptr + row_r1 * z_stride + column_1w, mask=ok_rw, other=0).to(WIDE), sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + row_r1 * (GROUPS * WIDTH) + column_1w, sum_rw, mask=ok_rw)
            u_rw = sum_rw.to(WIDE)
        scale_r1 = tl.rsqrt(tl.sum(u_rw * u_rw, axis=1, keep_dims=True) / WIDTH + EPS)
        out_rw = narrow(u_rw * scale_r1 * weight_1w, out_ptr.dtype.element_ty)
        tl.store(out_ptr + row_r1 * (GROUPS * WIDTH) + column_1w, out_rw, mask=ok_rw)
        if SAVE: tl.store(scale_ptr + row_r1 * GROUPS + group, scale_r1, mask=row_r1 < rows)


@triton.jit
def _backward(x_ptr, z_ptr, weight_ptr, scale_ptr, dout_ptr, dx_ptr, dz_ptr, partial_ptr, rows, x_stride, z_stride, dout_stride,
              WIDTH: tl.constexpr, GROUPS: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
              STEPS: tl.constexpr, STAGES: tl.constexpr):
    first, group = _place(tl.program_id(0), GROUPS, STEPS, ROWS)
    i_1w = tl.arange(0, BLOCK)[None, :]
    column_1w = group * WIDTH + i_1w
    weight_1w = tl.load(weight_ptr + column_1w, mask=i_1w < WIDTH, other=0).to(WIDE)
    dweight_rw = tl.zeros([ROWS, BLOCK], WIDE)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row_r1 = (first + step * ROWS + tl.arange(0, ROWS))[:, None]
        ok_rw = (row_r1 < rows) & (i_1w < WIDTH)
        x_rw = tl.load(x_ptr + row_r1 * x_stride + column_1w, mask=ok_rw, other=0).to(WIDE)
        dout_rw = tl.load(dout_ptr + row_r1 * dout_stride + column_1w, mask=ok_rw, other=0).to(WIDE)
        scale_r1 = tl.load(scale_ptr + row_r1 * GROUPS + group, mask=row_r1 < rows, other=0)
        normed_rw = x_rw * scale_r1
        if GATED:
            z_rw = tl.load(z_ptr + row_r1 * z_stride + column_1w, mask=ok_rw, other=0).to(WIDE)
            sigmoid_rw = 1 / (1 + tl.exp(-z_rw))
            normed_rw *= z_rw * sigmoid_rw
        dweight_rw += dout_rw * normed_rw
        g_rw = dout_rw * weight_1w
        du_rw = scale_r1 * (g_rw - normed_rw * (tl.sum(g_rw * normed_rw, axis=1, keep_dims=True) / WIDTH))
        at_rw = row_r1 * (GROUPS * WIDTH) + column_1w
        if GATED:
            dz_rw = du_rw * x_rw * (sigmoid_rw * (1 + z_rw * (1 - sigmoid_rw)))           # the last factor is silu'(z)
            tl.store(dz_ptr + at_rw, narrow(dz_rw, dz_ptr.dtype.element_ty), mask=ok_rw)
            du_rw *= z_rw * sigmoid_rw
        tl.store(dx_ptr + at_rw, narrow(du_rw, dx_ptr.dtype.element_ty), mask=ok_rw)
    partial_ptr += tl.cast(tl.program_id(0) // GROUPS, tl.int64) * (GROUPS * WIDTH)
    tl.store(partial_ptr + column_1w, tl.sum(dweight_rw, axis=0, keep_dims=True), mask=i_1w < WIDTH)


def _rows(z: Tensor) -> Tensor:
    """[.., width] -> [rows, width], values of a row next to each other. A slice of a projection stays where it is."""
    z = z.reshape(-1, z.shape[-1]) if z.numel() else z.new_empty(0, z.shape[-1])
    return z if z.stride(-1) == 1 else z.contiguous()


def _launch_values(x_rc: Tensor, gated: bool, groups: int, backward: bool) -> tuple[int, dict]:
    """(programs down a group, values known at compilation)."""
    width = x_rc.shape[1] // groups
    tiles = _tiles(width, gated, backward)
    wide = tl.float64 if x_rc.dtype == torch.float64 else tl.float32
    return triton.cdiv(x_rc.shape[0], tiles["ROWS"] * tiles["STEPS"]), dict(WIDTH=width, GROUPS=groups, GATED=gated, WIDE=wide) | tiles


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, groups, eps, grad):
        gated, save = z is not None, grad and any(ctx.needs_input_grad)
        x_rc, z_rc = _rows(x), _rows(z) if gated else None
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale_rg = torch.empty(x_rc.shape[0], groups, dtype=wide, device=x.device) if save else None
        if out.numel():
            blocks, known = _launch_values(x_rc, gated, groups, backward=False)
            _forward[(blocks * groups,)](x_rc, z_rc, weight, out, scale_rg, None, x_rc.shape[0], x_rc.stride(0), z_rc.stride(0) if gated else 0,
                                         EPS=eps, SAVE=save, **known)
        if save:
            ctx.save_for_backward(x_rc, z_rc, weight, scale_rg)
            ctx.shape = x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x_rc, z_rc, weight, scale_rg = ctx.saved_tensors
        gated, dout_rc, (rows, groups) = z_rc is not None, _rows(dout), scale_rg.shape
        dx = torch.empty(ctx.shape, dtype=x_rc.dtype, device=x_rc.device)
        dz = torch.empty(ctx.shape, dtype=z_rc.dtype, device=x_rc.device) if gated else None
        blocks, known = _launch_values(x_rc, gated, groups, backward=True)
        partial_kc = torch.empty(blocks, x_rc.shape[1], dtype=scale_rg.dtype, device=x_rc.device)
        if dx.numel():
            _backward[(blocks * groups,)](x_rc, z_rc, weight, scale_rg, dout_rc, dx, dz, partial_kc, rows, x_rc.stride(0),
                                          z_rc.stride(0) if gated else 0, dout_rc.stride(0), **known)
        return dx, dz, partial_kc.sum(0).to(weight.dtype), None, None, None


def _check(weight: Tensor, width: int) -> None:
    importlib.import_module("02_mamba").check_shapes({"weight": (weight, (width,))}, width=width)


def rmsnorm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / rms(x) * weight over the last dimension, one rounding at the end."""
    _check(weight, x.shape[-1])
    return _Norm.apply(x, None, weight.contiguous(), 1, eps, torch.is_grad_enabled())


def add_rmsnorm(x: Tensor, y: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(x + y in their dtype, its rmsnorm) in one pass. No gradient."""
    _check(weight, x.shape[-1])
    if x.shape != y.shape or x.dtype != y.dtype: raise ValueError(f"x {tuple(x.shape)} {x.dtype} and y {tuple(y.shape)} {y.dtype} must be alike.")
    x_rc, y_rc = _rows(x), _rows(y)
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    blocks, known = _launch_values(x_rc, False, 1, backward=False)
    if out.numel(): _forward[(blocks,)](x_rc, y_rc, weight.contiguous(), out, None, total, x_rc.shape[0], x_rc.stride(0), y_rc.stride(0),
                                        EPS=eps, SAVE=False, **known)
    return total, out


def gated_rmsnorm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    """norm(y * silu(z)) group by group over the last dimension, times weight, one rounding at the end, in y's dtype."""
    if y.shape != z.shape or y.shape[-1] % groups:
        raise ValueError(f"y and z must have one shape whose last dimension splits into {groups} groups: got {tuple(y.shape)} and {tuple(z.shape)}.")
    _check(weight, y.shape[-1])
    return _Norm.apply(y, z, weight.contiguous(), groups, eps, torch.is_grad_enabled())
