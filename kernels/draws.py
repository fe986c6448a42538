"""Counter-based draws on the GPU: the hash of 01_nvfp4.py, section 3, bit for bit, shared by the kernels that round stochastically.

A generator with a state would give other numbers after a resume or on another rank; a hash of (seed, position) gives the same ones in any order,
so a kernel may visit elements as it likes. About 6 integer instructions a draw, no memory.
"""
from __future__ import annotations

import importlib

import triton
import triton.language as tl


def split_key(seed: int) -> tuple[int, int]:
    """(k0, k1): the low and high word of mix64(seed), as signed 32-bit numbers to hand to a kernel; stage 01's own.

    PITFALL: name both in `do_not_specialize` of the kernel, or every seed that is 1 or a multiple of 16 compiles it anew.
    """
    return importlib.import_module("01_nvfp4").split_key(seed)


@triton.jit
def mix32(x):
    """lowbias32 on uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def block_keys(block, k0, k1):
    """uint32 key of a block of 16 elements; block: int64 element index // 16."""
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    return mix32(mix32(low ^ k0.to(tl.uint32, bitcast=True)) ^ high ^ k1.to(tl.uint32, bitcast=True))


@triton.jit
def draw16(keys, lane):
    """16 random bits, a number below 65536, of element `lane` (0..15) of the blocks whose keys are given; stage 01's uniform number times 2^16.

    NOTE: two neighbours write the same hash twice here. Where one thread holds both, the compiler computes it once.
    """
    bits = mix32(keys + (lane >> 1).to(tl.uint32) * 0x9E3779B9)
    return ((bits >> ((lane & 1) * 16).to(tl.uint32)) & 0xFFFF).to(tl.int32)
