"""The hash that stochastic rounding draws from: the kernels' bits are stage 01's."""
import importlib

import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import DEVICE

from kernels.draws import block_keys, draw16, split_key

nvfp4 = importlib.import_module("01_nvfp4")


@triton.jit(do_not_specialize=["k0", "k1", "start"])
def _draw(u, start, k0, k1, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    element = start.to(tl.int64) + i
    bits = draw16(block_keys(element // 16, k0, k1), (element % 16).to(tl.int32))
    tl.store(u + i, bits.to(tl.float32) / 65536)


@pytest.mark.parametrize("seed", [0, 1, 16, 123456789123, 2**63 + 5, -7])
@pytest.mark.parametrize("start", [0, 16, 1 << 37])
def test_kernel_draws_are_the_stages_bit_for_bit(seed, start):
    """Positions beyond 2^32 change the key's high word: a 32-bit index would repeat the draws of a large tensor's beginning."""
    u = torch.empty(256, device=DEVICE)
    _draw[(4,)](u, start, *split_key(seed)[1:], BLOCK=64)
    assert split_key(seed)[1:] == nvfp4.split_key(seed)
    assert torch.equal(u.cpu(), nvfp4.uniform_draws(seed, start, 256))
