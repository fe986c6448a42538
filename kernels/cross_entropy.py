"""Cross-entropy of h · weightᵀ without all the logits: cuBLAS multiplies, one Triton kernel turns a row of logits into its loss and its gradient.

The idea.  The logits of r rows are r·v numbers that nobody needs except for one scalar and one gradient. So rows go through in chunks, all chunks
share one buffer, and the gradient of the logits overwrites them where they lie:

                    d              v = 131072
                 ┌─────┐   ┌──────────────────────────┐
    chunk of h   │     │ · │ weightᵀ                  │ = logits, in the buffer        product 1, cuBLAS
                 └─────┘   └──────────────────────────┘
                           ├─BLOCK─┤─BLOCK─┤─ ... ──┤     one program a row
                 pass 1    ───────────────────────►       running maximum and sum of exponentials  ->  loss of the row
                 pass 2    ◄───────────────────────       x <- softmax(x) - one_hot(label), in place
                 dh      = buffer · weight                                               product 2, cuBLAS
                 dweight += bufferᵀ · chunk of h, summed in fp32                         product 3, cuBLAS

Pass 2 walks backwards: the end of the row was read last and is the likeliest to be in the L2 cache still. A row's weight is relative to the largest
one. What they sum to and the incoming gradient are one factor, applied in the backward: what is stored before lies in [-1, 1], which fp16 can hold,
and softmax / 8192 it could not.

Why not one fused kernel?  At Ultra (r 8192, d 8192, v 131072) each product is 2·r·v·d = 17.6 TFLOP, three of them 52.8: 67 ms at 790 TFLOP/s. In
bf16 the buffer is written once and read twice or three times by the products and passes, and overwritten once: about 6 · 2.1 GB = 13 GB, 3 ms at
4.28 TB/s. A kernel with the product inside saves these 3 ms, but must compute the logits a second time for the gradient: a fourth product, 22 ms.
At preset small (d 1024) the products take 8 ms and the buffer the same 3 ms; recomputing would cost 3 ms, so nothing is won there either. Only the
loss without gradients would gain: 1 ms of 4.

Precision.  Logits have the dtype of the product (bf16 for bf16 operands, autocast's dtype under autocast), as in 04_model.py: fp32 logits would
double the traffic above. Maximum, sum and loss are fp32; float64 stays float64. dweight is summed over the chunks in fp32: a bf16 sum loses what
later chunks add. It costs 8 bytes a weight and chunk, therefore chunks are large: at most 1 GiB of logits, 4,096 rows of Ultra.

Measured on an H200, forward and backward: 85.5 ms at d 8192 (plain cross_entropy 89.2), 11.7 at d 1024 (22.1). Tried: 16 warps a row, 10 % slower in
the row kernel; chunks of 1,024 rows, 94.6 ms at d 8192.

Sources:  04_model.py, section 6 · Milakov & Gimelshein 2018, "Online normalizer calculation for softmax" (pass 1)
"""
from __future__ import annotations

import importlib

import torch
import triton
import triton.language as tl
from torch import Tensor

BUFFER_BYTES = 2**30      # ours: logits that exist at a time


def _tiles(r: int, v: int, itemsize: int) -> dict[str, int]:
    """Rows a chunk, and columns a step and warps of the row kernel. Chunks are even: 5,000 rows are twice 2,560 at most, not 4,096 and 904."""
    most = max(1, BUFFER_BYTES // (v * itemsize))
    chunks = triton.cdiv(r, most)
    even = triton.cdiv(triton.cdiv(r, chunks), 128) * 128 if chunks > 1 else r      # whole tiles for the products
    return dict(chunk=max(1, min(even, most)), block=min(8192, max(64, triton.next_power_of_2(v))), num_warps=8)


@triton.jit
def _row_kernel(logits_ptr, labels_ptr, w_ptr, loss_ptr, stride, v: tl.constexpr, GRADIENT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """One row: w times its loss, and with GRADIENT w (softmax - one_hot) over the logits. A negative label means masked: loss 0, gradient 0, nothing
    read. v is a constant because a model has one vocabulary."""
    row = tl.program_id(0)
    # PITFALL: 4,096 rows of 131,072 already take 30 of int32's 31 bits
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    label, lane = tl.load(labels_ptr + row), tl.arange(0, BLOCK)
    steps: tl.constexpr = (v + BLOCK - 1) // BLOCK
    if label >= 0:
        # PITFALL: read now. After pass 2 has begun, a slow warp would find the gradient of a fast one here.
        # NOTE: a label beyond the vocabulary cannot stop the queue; it makes the loss NaN.
        picked, w = tl.load(row_ptr + label, mask=label < v, other=float("nan")).to(WIDE), tl.load(w_ptr + row)

        top, z_j = tl.full((), float("-inf"), WIDE), tl.zeros([BLOCK], WIDE)
        for step in range(0, steps):
            v_j = step * BLOCK + lane
            x_j = tl.load(row_ptr + v_j, mask=v_j < v, other=float("-inf")).to(WIDE)
            higher = tl.maximum(top, tl.max(x_j, 0))
            # what was summed relative to the old maximum shrinks to the new one
            z_j = z_j * tl.exp(top - higher) + tl.exp(x_j - higher)
            top = higher
        z = tl.sum(z_j, 0)
        # NOTE: top - picked first: logits of 1e4 would swallow digits of log z
        tl.store(loss_ptr + row, w * (tl.log(z) + (top - picked)))

        if GRADIENT:
            for step in range(0, steps):
                v_j = (steps - 1 - step) * BLOCK + lane
                x_j = tl.load(row_ptr + v_j, mask=v_j < v).to(WIDE)
                g_j = w * (tl.exp(x_j - top) / z - tl.where(v_j == label, 1.0, 0.0))
                tl.store(row_ptr + v_j, g_j.to(logits_ptr.dtype.element_ty), mask=v_j < v)
    else:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:      # the products read every row of the buffer
            for step in range(0, steps):
                v_j = step * BLOCK + lane
                tl.store(row_ptr + v_j, tl.zeros([BLOCK], logits_ptr.dtype.element_ty), mask=v_j < v)


def _add_product(total_vd: Tensor, a_vr: Tensor, b_rd: Tensor, beta: float) -> None:
    """total <- beta · total + a · b, summed in total's dtype whatever that of a and b; beta 0 does not read total."""
    if a_vr.dtype == total_vd.dtype: total_vd.addmm_(a_vr, b_rd, beta=beta)
    elif a_vr.is_cuda: torch.addmm(total_vd, a_vr, b_rd, beta=beta, out_dtype=total_vd.dtype, out=total_vd)
    else: total_vd.addmm_(a_vr.to(total_vd.dtype), b_rd.to(total_vd.dtype), beta=beta)      # CPUs have no such product


def _times(x: Tensor, factor_1: Tensor, dtype: torch.dtype) -> Tensor:
    """x · factor, rounded once, to dtype."""
    # PITFALL: a factor without dimensions would be rounded to x's dtype first: in bf16 0.4 % on every gradient
    return torch.mul(x, factor_1, out=torch.empty_like(x, dtype=dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_rd, weight_vd, labels_r, w_r, dtype, learn_h, learn_weight):
        (r, _), (v, _) = h_rd.shape, weight_vd.shape
        wide = torch.promote_types(dtype, torch.float32)
        h, weight, w_r = h_rd.to(dtype), weight_vd.to(dtype), w_r.to(wide) * (labels_r >= 0)
        largest = w_r.amax() if r else w_r.sum()
        w_r = w_r / torch.where(largest > 0, largest, 1)
        total = w_r.sum().clamp(min=1)      # one weight is 1, unless all are 0
        loss_r, make = torch.empty(r, dtype=wide, device=h.device), torch.empty if r else torch.zeros
        dh_rd = make(h.shape, dtype=dtype, device=h.device) if learn_h else None
        dweight_vd = make(weight.shape, dtype=wide, device=h.device) if learn_weight else None

        tiles, learn = _tiles(r, v, h.element_size()), learn_h or learn_weight
        buffer = torch.empty(tiles["chunk"], v, dtype=dtype, device=h.device)
        for i in range(0, r, tiles["chunk"]):
            rows = slice(i, min(i + tiles["chunk"], r))
            logits = torch.mm(h[rows], weight.T, out=buffer[:rows.stop - i])
            _row_kernel[(rows.stop - i,)](logits, labels_r[rows], w_r[rows], loss_r[rows], logits.stride(0), v=v, GRADIENT=learn,
                                          WIDE=tl.float64 if wide == torch.float64 else tl.float32, BLOCK=tiles["block"],
                                          num_warps=tiles["num_warps"])
            if learn_h: torch.mm(logits, weight, out=dh_rd[rows])
            if learn_weight: _add_product(dweight_vd, logits.T, h[rows], beta=float(i > 0))

        if learn:
            ctx.save_for_backward(dh_rd, dweight_vd, total)
            ctx.dtypes = h_rd.dtype, weight_vd.dtype
        return loss_r.sum() / total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dh_rd, dweight_vd, total = ctx.saved_tensors
        factor_1 = (grad / total).view(1)
        dh_rd, dweight_vd = (None if x is None else _times(x, factor_1, dtype) for x, dtype in zip((dh_rd, dweight_vd), ctx.dtypes))
        return dh_rd, dweight_vd, None, None, None, None, None


def linear_cross_entropy(h_rd: Tensor, weight_vd: Tensor, labels_r: Tensor, w_r: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of h · weightᵀ against labels, rows weighed by w (a mask is 0 and 1), a scalar in fp32 (fp64 for fp64 inputs); 0 when all
    weigh nothing.

    A row whose label is negative weighs nothing. A label of v or more in a row that counts makes the loss NaN. The products run in the
    dtype of h, under autocast in its dtype; gradients come back in the dtypes of h and weight.
    """
    if h_rd.ndim != 2 or weight_vd.shape[1:] != h_rd.shape[1:] or any(x is not None and x.shape != h_rd.shape[:1] for x in (labels_r, w_r)):
        raise ValueError(f"h {tuple(h_rd.shape)} does not fit weight {tuple(weight_vd.shape)} and labels {tuple(labels_r.shape)}: they must be "
                         "[r, d], [v, d] and [r], the weights [r] too.")
    kind = h_rd.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else h_rd.dtype
    w_r = labels_r >= 0 if w_r is None else w_r
    labels_r = torch.where(w_r != 0, labels_r, -1)
    learn = torch.is_grad_enabled()
    with importlib.import_module("02_mamba").full_precision(h_rd):      # the casts below are the ones autocast would make
        return _LinearCrossEntropy.apply(h_rd, weight_vd, labels_r.contiguous(), w_r, dtype, learn and h_rd.requires_grad,
                                         learn and weight_vd.requires_grad)
