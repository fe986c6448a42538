"""What lets Triton's interpreter give the numbers of a GPU: it cuts where a GPU rounds to bf16, and multiplies bf16 by its bit patterns."""
from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in dtype, rounded to nearest even. Interpreted, bf16 is rounded by hand: add half a step to the bits, then cut."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a · b, summed in fp32; fp32 operands without TF32. acc None starts from zero."""
    if INTERPRETED: a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="ieee")
