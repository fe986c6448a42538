"""Counter-based draws on the GPU: the hash of 01_nvfp4.py, section 3, bit for bit, shared by the kernels that round stochastically.

A generator with a state would give other numbers after a resume or on another rank; a hash of (seed, position) gives the same ones in any order,
so a kernel may visit elements as it likes. About 6 integer instructions a draw, no memory.
"""
from __future__ import annotations

import importlib

import torch
import triton
import triton.language as tl


def split_key(seed: int | torch.Tensor | None) -> tuple[torch.Tensor | None, int, int]:
    """(tensor, k0, k1) to hand to a kernel for `key_words`: the words of mix64(seed), as signed 32-bit numbers, by stage 01's split_key. A seed in
    memory is hashed there: nobody waits for its value, and a CUDA graph, which repeats its arguments, finds a new one each time.

    PITFALL: name k0 and k1 in `do_not_specialize` of the kernel, or every seed that is 1 or a multiple of 16 compiles it anew.
    """
    if seed is None: return None, 0, 0
    return (seed, 0, 0) if isinstance(seed, torch.Tensor) else (None, *importlib.import_module("01_nvfp4").split_key(seed))


@triton.jit
def key_words(seed_ptr, k0, k1):
    """The two words of mix64(seed): as the host computed them, or of the int64 number that seed_ptr points to."""
    if seed_ptr is not None:
        z = tl.load(seed_ptr).to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        z = z ^ (z >> 31)
        k0, k1 = z.to(tl.uint32).to(tl.int32, bitcast=True), (z >> 32).to(tl.uint32).to(tl.int32, bitcast=True)
    return k0, k1


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

    NOTE: two neighbours have the same hash. The rounding kernels take it once for both and write its last step out, where it can be had for less.
    """
    bits = mix32(keys + (lane >> 1).to(tl.uint32) * 0x9E3779B9)
    return ((bits >> ((lane & 1) * 16).to(tl.uint32)) & 0xFFFF).to(tl.int32)
