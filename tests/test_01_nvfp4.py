"""Claims of 01_nvfp4.py, held to ml_dtypes, torchao, a scalar loop in numpy and closed forms."""
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F

nvfp4 = importlib.import_module("01_nvfp4")
NVFP4Recipe, quantize = nvfp4.NVFP4Recipe, nvfp4.quantize


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bits(x):
    return x.contiguous().view(torch.uint8)


def assert_same_codes(a, b):
    """Quantised numbers compare exactly: one code apart is a bug, not a tolerance."""
    assert torch.equal(a.codes, b.codes) and torch.equal(bits(a.block_scale), bits(b.block_scale)) and a.block == b.block


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# the grid

def test_e2m1_codes_equal_ml_dtypes_for_every_half_precision_number():
    """Ties, signs of zero and saturation: the wrong side of one tie shows in no average."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[~np.isnan(every)].astype(np.float32)
    ours = nvfp4.encode_e2m1(torch.from_numpy(every))
    assert np.array_equal(ours.numpy(), every.astype(ml_dtypes.float4_e2m1fn).view(np.uint8))
    codes = torch.arange(16, dtype=torch.uint8)
    assert nvfp4.E2M1.tolist() == np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32).tolist()
    assert torch.equal(nvfp4.encode_e2m1(nvfp4.E2M1), codes)                                       # decode then encode, -0 included
    edges = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])                                  # one fp32 step around every tie
    around = torch.cat([edges, edges.nextafter(torch.tensor(9.0)), edges.nextafter(torch.tensor(0.0))])
    assert np.array_equal(nvfp4.encode_e2m1(around).numpy(), around.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8))


def test_scales_round_to_e4m3_as_ml_dtypes_does():
    """torch's cast must round half to even, also among the subnormals, and never reach NaN (code 127)."""
    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)                # every finite half-precision number >= 0
    ours = bits(nvfp4.e4m3(torch.from_numpy(every))).numpy()
    assert np.array_equal(ours, np.minimum(every, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    assert ours.max() == 126


def test_low_nibble_is_the_even_column():
    """The released checkpoints store pairs so; swapped nibbles still look like a plausible weight."""
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert nvfp4.pack(codes).tolist() == [[0x21, 0x0F]]
    assert torch.equal(nvfp4.unpack(nvfp4.pack(codes)), codes)
    q = quantize(torch.tensor([[6.0, -3.0] + [0.0] * 14]))
    assert q.codes[0, 0].item() == 0xD7 and q.dequantize()[0, :2].tolist() == pytest.approx([6.0, -3.0], rel=1e-6)


# two-level scales

def scalar_quantize(x, amax, height=1):
    """The two-level recipe in NVIDIA's order of operations, one number at a time. x: float32 [rows, columns] -> codes, scale bytes, decode scale."""
    f = np.float32
    with np.errstate(over="ignore", divide="ignore"):
        s_enc = f(1) if amax == 0 else min(f(2688) / f(amax), np.finfo(f).max)
        s_dec = f(1) / s_enc
        codes, scales = np.zeros(x.shape, np.uint8), np.zeros((x.shape[0], x.shape[1] // 16), np.uint8)
        for row in range(0, x.shape[0], height):
            for block in range(x.shape[1] // 16):
                part = x[row : row + height, 16 * block : 16 * block + 16]
                s_b = np.array(min(f(np.abs(part).max()) * (s_enc * (f(1) / f(6))), f(448)), f).astype(ml_dtypes.float8_e4m3fn)
                scales[row : row + height, block] = s_b.view(np.uint8)
                if s_b == 0:
                    continue
                enc = min(f(1) / (f(s_b) * s_dec), np.finfo(f).max)
                for i in range(part.shape[0]):
                    for j in range(16):
                        y = np.array(np.clip(part[i, j] * enc, f(-6), f(6)), f)
                        codes[row + i, 16 * block + j] = y.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return codes, scales, s_dec


def hard_cases():
    x = normal(16, 64)
    zero_blocks = x.clone(); zero_blocks[:, 16:32] = 0; zero_blocks[3] = -0.0
    outliers = torch.where(normal(16, 64, seed=1) > 2, 1000 * x, x)
    underflow = x.clone(); underflow[:8] *= 1e-7                    # rows so far below the maximum that their E4M3 scale is subnormal or 0
    one = torch.zeros(16, 64); one[5, 5] = -3.0
    # block maxima half-way between two E4M3 scales: the order of operations decides, and other orders (amax / 6 · s_enc) go the other way
    maxima = torch.tensor([1224, 1512, 1800, 612, 756, 900, 306, 378]).repeat(8).view(16, 4) / 1024
    scale_ties = maxima.repeat_interleave(16, 1)
    scale_ties[0, 0] = 252 / 128
    return {"gaussian": x, "zero blocks": zero_blocks, "outliers": outliers, "underflow": underflow, "one value": one, "all zero": 0 * x,
            "bf16": x.bfloat16(), "fp16": (100 * x).half(), "tiny": 1e-30 * x, "s_enc overflows": 1e-36 * x, "subnormal": 1e-42 * x, "huge": 1e37 * x,
            "scale ties": scale_ties,
            "grid ties": torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]).repeat(16, 8) * torch.tensor([1.0, -1.0]).repeat(32)}


@pytest.mark.parametrize("height", [1, 16])
@pytest.mark.parametrize("case", hard_cases())
def test_codes_and_scales_are_bit_equal_to_the_scalar_recipe(case, height):
    """Order of operations decides last bits; zero blocks, underflow and saturation are where implementations part."""
    x = hard_cases()[case]
    q = quantize(x, block=(height, 16))
    codes, scales, s_dec = scalar_quantize(x.float().numpy(), x.abs().max().float().numpy(), height)
    assert np.array_equal(nvfp4.unpack(q.codes).numpy(), codes)
    assert np.array_equal(bits(q.block_scale).numpy(), scales)
    assert q.global_scale.shape == () and q.global_scale.item() == s_dec
    values = nvfp4.E2M1[torch.from_numpy(codes).int()] * q.block_scale.float().repeat_interleave(16, 1) * q.global_scale
    assert torch.equal(q.dequantize(), values)


def test_a_dead_block_is_code_zero_and_small_values_keep_their_sign():
    """A block whose scale rounds to 0 must not come back as ±6 (1/0 is clamped, not harmless), and -0 elsewhere is code 8."""
    x = torch.zeros(1, 48)
    x[0, 0], x[0, 1], x[0, 2] = 1.0, -1e-3, -0.0
    x[0, 16:32] = -1e-7                      # 1e-7 · 448 is below half of the smallest E4M3 number
    x[0, 32:] = -0.0
    q = quantize(x)
    codes = nvfp4.unpack(q.codes)[0]
    assert codes[:3].tolist() == [7, 8, 8] and codes[3:].eq(0).all()
    assert bits(q.block_scale).tolist() == [[126, 0, 0]]
    assert nvfp4.unpack(quantize(-x).codes)[0, :3].tolist() == [15, 0, 0]


def test_values_beyond_a_given_amax_saturate():
    """A shared or calibrated amax may be too small; then the block scale stops at 448 and values at 6 of its steps."""
    q = quantize(torch.tensor([[100.0] + [1.0] * 15]), amax=torch.tensor(6.0))
    assert q.block_scale.float().item() == 448 and q.dequantize()[0, 0].item() == pytest.approx(6.0, rel=1e-6)


def test_a_stack_of_experts_is_quantized_expert_by_expert():
    """One amax over all experts would let the largest expert push a small one into the E4M3 subnormals."""
    w = normal(3, 32, 48) * torch.tensor([1.0, 1e-4, 30.0])[:, None, None]
    for block in ((1, 16), (16, 16)):
        stack = quantize(w, block=block)
        assert stack.global_scale.shape == (3,) and stack.shape == w.shape and stack.block_scale.shape == (3, 32, 3)
        for e in range(3):
            alone = quantize(w[e], block=block)
            assert torch.equal(stack.codes[e], alone.codes) and torch.equal(bits(stack.block_scale[e]), bits(alone.block_scale))
            assert torch.equal(stack.dequantize()[e], alone.dequantize()) and stack.global_scale[e] == alone.global_scale
        assert_same_codes(quantize(w, block=block, amax=w.abs().amax((1, 2))), stack)
    by_row = quantize(w[0], amax=w[0].abs().amax(1))              # the same rule, one amax per leading index, gives every row its own
    assert all(torch.equal(by_row.codes[r], quantize(w[0, r]).codes) for r in range(32)) and by_row.global_scale.shape == (32,)
    assert torch.equal(by_row.dequantize()[7], quantize(w[0, 7]).dequantize())


def test_size_in_bytes_and_layout():
    """4.5 bits a value plus four bytes; an inference engine allocates from this."""
    q = quantize(normal(32, 64, dtype=torch.bfloat16))
    assert q.nbytes == 32 * 32 + 32 * 4 + 4 and q.shape == (32, 64) and q.codes.dtype == torch.uint8
    assert q.block_scale.dtype == torch.float8_e4m3fn and q.global_scale.dtype == torch.float32
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16
    strided = normal(64, 32).T
    assert_same_codes(quantize(strided), quantize(strided.contiguous()))
    assert_same_codes(quantize(strided.double()), quantize(strided))


def test_tiles_transpose_exactly_and_rows_refuse():
    """dgrad reads the forward's codes from the other side; a tile that is quantised anew could differ."""
    w = normal(3, 32, 64) * normal(3, 32, 64, seed=1).exp()
    q = quantize(w, block=(16, 16))
    assert torch.equal(q.T.dequantize(), q.dequantize().mT) and q.T.shape == (3, 64, 32)
    assert_same_codes(q.T, quantize(w.mT, block=(16, 16)))
    assert_same_codes(q.T.T, q)
    with pytest.raises(ValueError, match="cannot be transposed"):
        _ = quantize(w).T


def test_torchao_agrees_up_to_its_other_order_of_operations():
    """torchao divides where NVIDIA multiplies: scales equal on fp32 Gaussians, at most 0.1 % of codes apart and then neighbours; on bf16 data up to
    3 % of scales differ by one code. It floors scales at 2^-6, so blocks below are left out."""
    torchao = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    for dtype, scale_share in ((torch.float32, 0.0), (torch.bfloat16, 0.03)):
        x = normal(256, 1024, seed=3, dtype=dtype)
        q = quantize(x)
        scale, packed = torchao.nvfp4_quantize(x, 16, x.abs().max().float() / (6 * 448))
        scale, theirs, ours = bits(scale.view_as(q.block_scale)).int(), nvfp4.unpack(packed.view(256, 512)).int(), nvfp4.unpack(q.codes).int()
        steps = (bits(q.block_scale).int() - scale).abs()[q.block_scale.float() >= 2**-6]
        assert steps.max() <= 1 and steps.bool().float().mean() <= scale_share
        same = (bits(q.block_scale).int() == scale).repeat_interleave(16, 1)
        apart = ((ours & 7) - (theirs & 7)).abs()[same]
        assert apart.max() <= 1 and apart.bool().float().mean() <= 1e-3 and torch.equal((ours & 8)[same], (theirs & 8)[same])


@pytest.mark.parametrize("rows,columns", [(128, 4), (256, 12), (33, 5), (1, 1)])
def test_swizzled_scales_equal_torchao_byte_for_byte(rows, columns):
    """The tensor core reads 128×4 tiles; one wrong transpose multiplies every block by a neighbour's scale."""
    to_blocked = pytest.importorskip("torchao.prototype.mx_formats.utils").to_blocked
    scale = torch.randint(0, 127, (2, rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).view(torch.float8_e4m3fn)
    ours = nvfp4.swizzle_scales(scale)
    assert ours.dtype == torch.float8_e4m3fn
    for e in range(2):
        assert torch.equal(bits(ours[e]), bits(to_blocked(scale[e])).flatten())
        assert torch.equal(bits(nvfp4.swizzle_scales(scale[e])), bits(ours[e]))


# errors in closed form

def test_gaussian_errors_are_the_known_decibels():
    """20.44 dB nearest, 17.25 stochastic, 19.07 tiles; the Hadamard transform changes nothing on Gaussians; seeds move these by under 0.02 dB."""
    x = normal(1024, 4096, seed=5)
    db = lambda target, q: nvfp4.decibels(nvfp4.relative_error(target, q.dequantize()))
    assert db(x, quantize(x)) == pytest.approx(20.44, abs=0.05)
    assert db(x, quantize(x, rounding="stochastic", seed=1)) == pytest.approx(17.25, abs=0.05)
    assert db(x, quantize(x, block=(16, 16))) == pytest.approx(19.07, abs=0.05)
    y = nvfp4.hadamard16(x)
    assert db(y, quantize(y)) == pytest.approx(20.44, abs=0.05)


def test_four_over_six_and_the_sweep_lower_the_error_as_published():
    """-16.4 % and -27 % against max, which the Ultra report finds on its expert weights too."""
    x = normal(1024, 4096, seed=6)
    error = lambda x, rule: nvfp4.relative_error(x, quantize(x, scale_rule=rule).dequantize())
    change = lambda x, rule: 100 * (error(x, rule) / error(x, "max") - 1)
    assert change(x, "four_over_six") == pytest.approx(-16.4, abs=0.3)
    assert change(x[:256], "mse") == pytest.approx(-27.0, abs=0.3)


@pytest.mark.parametrize("height", [1, 16])
def test_four_over_six_picks_by_squared_error_from_two_candidates(height):
    """Both candidates are rebuilt from the formula in fp64; a tie keeps 6. The tensor's largest block is scaled to 256, or 384 as a four."""
    x = normal(32, 128, seed=7) * normal(32, 1, seed=8).exp()
    if height > 1:                                                           # Gaussian tiles all keep 6: flat ones, at 3/4 of their maximum, prefer 4
        x[:, :64] = x[:, :64].sign() * (0.73 + 0.04 * torch.rand(32, 64)); x[::16, :64:16] = 1.0
    q = quantize(x, block=(height, 16), scale_rule="four_over_six")
    s_enc = np.float32(1536) / x.abs().max().numpy()
    assert q.global_scale.item() == np.float32(1) / s_enc
    blocks = x.numpy().reshape(32 // height, height, 8, 16)
    base = np.abs(blocks).max((1, 3)) * (s_enc * (np.float32(1) / np.float32(6)))
    candidates, errors = [], []
    for factor in (1.0, 1.5):
        scale = (np.float32(factor) * base).astype(ml_dtypes.float8_e4m3fn)
        step = scale.astype(np.float64)[:, None, :, None] / np.float64(s_enc)
        values = np.clip(blocks / step, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * step
        candidates.append(scale.view(np.uint8)); errors.append(((values - blocks) ** 2).sum((1, 3)))
    chosen = np.where(errors[1] < errors[0], candidates[1], candidates[0])
    clear = np.abs(errors[1] - errors[0]) > 1e-5 * errors[0]                 # fp32 sums may order a near tie differently
    ours = bits(q.block_scale)[::height].numpy()
    assert clear.mean() > 0.9 and np.array_equal(ours[clear], chosen[clear])
    assert 0 < (chosen == candidates[1]).sum() and (chosen == candidates[0]).sum() > 0
    tie = torch.zeros(1, 16); tie[0, 0] = 6.0                                # exact with either scale
    assert quantize(tie, scale_rule="four_over_six").block_scale.float().item() == 256


def test_the_sweep_finds_the_best_of_all_126_scales():
    """Brute force in fp64 over the same codes; the chosen scale may not lose more than rounding against the best."""
    x = normal(4, 64, seed=9) * torch.tensor([1.0, 1e-2, 1e-4, 1e-5])[:, None]      # small rows need small codes
    q = quantize(x, scale_rule="mse")
    blocks, s_dec = x.numpy().astype(np.float64).reshape(4, 4, 16), q.global_scale.double().item()

    def loss(scale):
        step = np.float64(scale) * s_dec
        return ((np.clip(blocks / step, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * step - blocks) ** 2).sum(-1)

    table = np.stack([loss(s) for s in np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)])
    ours = np.take_along_axis(table, bits(q.block_scale).numpy()[None].astype(int) - 1, 0)[0]
    assert np.all(ours <= table.min(0) * (1 + 1e-5))
    assert not torch.equal(bits(q.block_scale), bits(quantize(x).block_scale))
    assert_same_codes(quantize(torch.zeros(1, 16), scale_rule="mse"), quantize(torch.zeros(1, 16)))


def test_mxfp4_and_mxfp8_equal_torchao():
    """Blocks of 32 with the floor rule for MXFP4, and for MXFP8 the exponent rounded up as NVIDIA trains (torchao's RCEIL)."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = normal(64, 128, seed=10) * normal(64, 1, seed=11).mul(3).exp()
    q = quantize(x, format="mxfp4")
    scale, packed = mx.to_mx(x, torch.float4_e2m1fn_x2, 32)
    assert q.block == (1, 32) and q.block_scale.dtype == torch.float8_e8m0fnu
    assert torch.equal(bits(q.block_scale), bits(scale.view(64, 4))) and torch.equal(q.codes, packed.view(torch.uint8).view(64, 64))
    scale, elements = mx.to_mx(x, torch.float8_e4m3fn, 32, mx.ScaleCalculationMode.RCEIL)
    theirs = elements.float().view(64, 4, 32) * scale.float().view(64, 4, 1)
    assert torch.equal(nvfp4.mxfp8_round_trip(x), theirs.view(64, 128))
    exact = torch.tensor([[448.0] + [1.0] * 31, [449.0] + [1.0] * 31])          # 448 needs scale 1, 449 scale 2: 449 then rounds to 448
    assert nvfp4.mxfp8_round_trip(exact)[:, 0].tolist() == [448, 448]
    assert nvfp4.power_of_two_scale(exact.amax(1), 448, round_up=True).float().tolist() == [1, 2]
    tiles = quantize(x, block=(16, 16), format="mxfp4")
    assert tiles.block == (32, 32) and torch.equal(tiles.T.dequantize(), tiles.dequantize().T)
    assert quantize(torch.full((1, 32), -0.0), format="mxfp4").codes.eq(0).all()


# random draws

def scalar_draw(seed, i):
    """The documented function, in Python integers: what a Triton twin must reproduce."""
    def mix(x):
        x ^= x >> 16; x = x * 0x7FEB352D % 2**32
        x ^= x >> 15; x = x * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    key = nvfp4.mix64(seed)
    block = mix(mix((i // 16) % 2**32 ^ key % 2**32) ^ (i // 16) // 2**32 ^ key // 2**32)
    bits = mix((block + (i % 16 // 2) * 0x9E3779B9) % 2**32)
    return (bits >> 16 if i % 2 else bits % 2**16) / 2**16


def test_draws_follow_the_documented_integers_beyond_32_bits():
    """int32 wrap-around and logical shifts are easy to get wrong by a sign; expert stacks have more than 2^32 elements."""
    for seed, start in ((0, 0), (123456789012345, 4096), (2**63 - 1, 2**40 + 32), (7, 16 * (2**32 - 1))):
        ours = nvfp4.uniform_draws(seed, start, 64)
        assert ours.tolist() == [scalar_draw(seed, start + j) for j in range(64)]
    assert nvfp4.mix64(0) == 0xE220A8397B1DCDAF            # the first output of SplitMix64 with seed 0


def test_draws_are_uniform_and_uncorrelated():
    """Each bound is five standard errors: about one false alarm in two million per check, 20 checks."""
    n = 2**19
    u = nvfp4.uniform_draws(1, 0, n).double()
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * n) and abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    counts = torch.histc(u, 256, 0, 1)
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum().item()
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)
    low_bits = (u * 2**16).long() % 256                      # the low bits of the 16 must be as good as the high ones
    chi2 = ((torch.bincount(low_bits, minlength=256) - n / 256) ** 2 / (n / 256)).sum().item()
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)
    c = (u - 0.5) * math.sqrt(12)
    for lag in (1, 2, 15, 16, 17, 256, 4096):
        assert abs((c[lag:] * c[:-lag]).mean()) < 5 / math.sqrt(n - lag), lag
    for seed in (0, 2, 3, 2**32 + 1, 2**62):                 # neighbours and seeds that share a word
        other = (nvfp4.uniform_draws(seed, 0, n).double() - 0.5) * math.sqrt(12)
        for lag in (0, 16):
            assert abs((c[lag:] * other[: n - lag]).mean()) < 5 / math.sqrt(n - lag), (seed, lag)


def test_a_piece_rounds_as_within_the_whole():
    """With offset the draw does not depend on chunks, so ranks and sequence parts reproduce the single-device result."""
    x = normal(48, 4096, seed=12)                           # more than one slice of the cache-sized loop
    whole = quantize(x, rounding="stochastic", seed=5)
    part = quantize(x[20:31], rounding="stochastic", seed=5, amax=x.abs().max(), offset=20 * 4096)
    assert torch.equal(whole.codes[20:31], part.codes)
    assert not torch.equal(whole.codes, quantize(x, rounding="stochastic", seed=6).codes)
    assert_same_codes(whole, quantize(x, rounding="stochastic", seed=5))


def test_stochastic_rounding_is_unbiased_between_the_two_neighbours():
    """Mean over draws within five standard errors of the value (one false alarm in two million per value, 40 values); grid values never move."""
    n = 2**17
    u = nvfp4.uniform_draws(3, 0, n)
    for m in torch.linspace(0.03, 5.93, 40).tolist():
        low = max(g for g in (0, 0.5, 1, 1.5, 2, 3, 4) if g <= m)
        high = min(g for g in (0.5, 1, 1.5, 2, 3, 4, 6) if g > m)
        values = nvfp4.E2M1[nvfp4.encode_e2m1(torch.full((n,), -m), u).int()]
        assert set(values.tolist()) == {-low, -high}
        p = (m - low) / (high - low)
        assert abs(values.double().mean().item() + m) < 5 * (high - low) * math.sqrt(p * (1 - p) / n) + 1e-6
    for grid in nvfp4.E2M1.tolist():
        assert nvfp4.encode_e2m1(torch.full((1000,), grid), u[:1000]).unique().tolist() == nvfp4.encode_e2m1(torch.tensor([grid])).tolist()
    assert nvfp4.encode_e2m1(torch.full((1000,), 6.3), u[:1000]).eq(7).all()


def test_saturation_leaves_a_known_bias():
    """Where E4M3 rounds the block scale down, the maximum is cut to 6: half of the blocks, and -0.3 % of a Gaussian that no draw brings back."""
    s = nvfp4.measure_saturation(rows=128, draws=4)
    assert 0.45 < s["blocks_cut"] < 0.56 and 0.055 < s["worst_excess"] < 0.067        # half an E4M3 step is at most 1/16 of the scale
    assert -0.0038 < s["gain_cut"] < -0.0029
    assert abs(s["gain_stochastic"] - s["gain_cut"]) < 5e-4      # stochastic rounding adds no bias of its own: its error is about 1e-4 here


def test_nearest_loses_small_gradients_and_stochastic_does_not():
    """The reason for stochastic rounding of gradients: 4,096 steps later nearest has lost almost half of the sum."""
    sums = {name: total[-1].item() for name, total in nvfp4.measure_long_sum().items()}
    assert sums["nearest"] < 0.6 * sums["true"] and abs(sums["stochastic"] / sums["true"] - 1) < 0.02      # 2 % is five standard errors


def test_draw_seeds_differ_in_every_argument():
    """A seed that ignored the micro batch or added its arguments would repeat draws; equal arguments must repeat them."""
    seeds = {nvfp4.draw_seed_for(*words) for words in np.ndindex(3, 3, 3, 3, 3)}
    assert len(seeds) == 3**5 and all(0 <= seed < 2**63 for seed in seeds)
    assert nvfp4.draw_seed_for(1, 2, 3, 4, 5) == nvfp4.draw_seed_for(1, 2, 3, 4, 5) != nvfp4.draw_seed_for(5, 4, 3, 2, 1)


# Hadamard transform and products

def test_the_hadamard_transform_leaves_products_unchanged_and_spreads_outliers():
    """Orthogonal, so (XH)(YH)ᵀ = XYᵀ to rounding in fp64; an outlier shrinks to a quarter; the signs are the published ones."""
    x, y = normal(5, 48, dtype=torch.float64), normal(7, 48, seed=1, dtype=torch.float64)
    assert torch.allclose(nvfp4.hadamard16(x) @ nvfp4.hadamard16(y).T, x @ y.T, rtol=0, atol=1e-12)
    assert torch.equal(nvfp4.hadamard16(x.T, dim=0), nvfp4.hadamard16(x).T)
    stack = normal(3, 32, 5)
    assert torch.equal(nvfp4.hadamard16(stack, dim=1)[2], nvfp4.hadamard16(stack[2], dim=0))
    h = nvfp4.hadamard16(torch.eye(16))
    assert torch.equal(h, nvfp4.HADAMARD16) and h.abs().eq(0.25).all()
    assert (h[:, 0] * 4).tolist() == [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]
    assert torch.equal(h[1] * 4, torch.tensor([1.0, -1.0] * 8)) and torch.equal(h[8] * -4, torch.tensor([1.0] * 8 + [-1.0] * 8))     # Sylvester order
    outlier = torch.zeros(1, 16); outlier[0, 9] = 8.0
    assert nvfp4.hadamard16(outlier).abs().eq(2).all()
    assert nvfp4.hadamard16(x.bfloat16()).dtype == torch.float32


def test_products_multiply_the_decoded_values_whole_and_grouped():
    """Against fp64; one empty expert, both ways of cutting."""
    a, b = normal(33, 64), normal(3, 48, 64, seed=1)
    qa, qb = quantize(a), quantize(b, block=(16, 16))
    offsets = torch.tensor([10, 10, 33])
    plain = nvfp4.matmul(qa, quantize(b[0]))
    assert plain.dtype == torch.float32
    assert torch.allclose(plain.double(), qa.dequantize(torch.float64) @ quantize(b[0]).dequantize(torch.float64).T, rtol=0, atol=1e-4)
    rows = nvfp4.matmul(qa, qb, offsets, torch.float64)
    expect = torch.cat([qa.dequantize().double()[:10] @ qb.dequantize().double()[0].T, qa.dequantize().double()[10:] @ qb.dequantize().double()[2].T])
    assert torch.allclose(rows, expect, rtol=0, atol=1e-12) and nvfp4.matmul(qa, qb, offsets, torch.bfloat16).dtype == torch.bfloat16
    contraction = nvfp4.matmul(quantize(normal(8, 64)), quantize(normal(16, 64, seed=2)), torch.tensor([16, 16, 64]))
    assert contraction.shape == (3, 8, 16) and contraction[1].eq(0).all()
    assert torch.allclose(contraction.sum(0), nvfp4.matmul(quantize(normal(8, 64)), quantize(normal(16, 64, seed=2))), rtol=0, atol=1e-4)
    x = normal(33, 64, dtype=torch.bfloat16)
    w = quantize(b[0])
    assert torch.equal(nvfp4.matmul_w4a16(x, w), x @ w.dequantize(torch.bfloat16).T)
    assert torch.equal(nvfp4.matmul_w4a16(x, qb, offsets)[10:], x[10:] @ qb.dequantize(torch.bfloat16)[2].T)
    with pytest.raises(ValueError, match="offsets_e"):
        nvfp4.matmul(qa, qb, torch.tensor([10, 10, 32]))


# the linear layer

def run(x, w, dy, recipe, seed=0, offsets_e=None):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = nvfp4.nvfp4_linear(x, w, recipe, offsets_e, seed)
    y.backward(dy)
    return y.detach(), x.grad, w.grad


def layer_case(r=33, i=32, o=48, dtype=torch.float64):
    """33 tokens: the token axis needs padding."""
    return normal(r, i, dtype=dtype), normal(o, i, seed=1, dtype=dtype) / 4, 1e-4 * normal(r, o, seed=2, dtype=dtype)


def columns(a, rht=True):
    a = F.pad(a, (0, 0, 0, -a.shape[0] % 16))
    return nvfp4.hadamard16(a, dim=0).T if rht else a.T


@pytest.mark.parametrize("rht", [True, False])
def test_the_three_products_use_the_operands_of_the_report(rht):
    """Each operand is rebuilt here from quantize alone, with nearest gradients so that it is exact."""
    x, w, dy = layer_case()
    y, dx, dw = run(x, w, dy, NVFP4Recipe(stochastic_gradients=False, rht=rht))
    value = lambda a, **kwargs: quantize(a, **kwargs).dequantize(torch.float64)
    w_hat = value(w, block=(16, 16))
    assert torch.allclose(y, value(x) @ w_hat.T, rtol=0, atol=1e-12)
    assert torch.allclose(dx, value(dy) @ w_hat, rtol=0, atol=1e-14)
    assert torch.allclose(dw, value(columns(dy, rht)) @ value(columns(x, rht)).T, rtol=0, atol=1e-14)
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.float64,) * 3
    assert relative(y, x @ w.T) < 0.25 and relative(dx, dy @ w) < 0.25 and relative(dw, dy.T @ x) < 0.25


@pytest.mark.parametrize("switch,changes", [("weight_tiles", "y dx"), ("rht", "dw"), ("stochastic_gradients", "dx dw"), ("forward", "y"),
                                            ("backward", "dx dw")])
def test_every_switch_of_the_recipe_changes_what_it_names_and_nothing_else(switch, changes):
    """A flag that is parsed and ignored makes an ablation that shows nothing."""
    case = layer_case()
    full, without = run(*case, NVFP4Recipe()), run(*case, NVFP4Recipe(**{switch: False}))
    assert [name for name, a, b in zip(("y", "dx", "dw"), full, without) if not torch.equal(a, b)] == changes.split()


def test_format_switches_to_blocks_of_32():
    """All three products must change, and the backward must hold its own contract with 32-token padding."""
    x, w, dy = layer_case(r=33, i=64, o=32)
    recipe = NVFP4Recipe(format="mxfp4", stochastic_gradients=False)
    y, dx, dw = run(x, w, dy, recipe)
    value = lambda a, **kwargs: quantize(a, format="mxfp4", **kwargs).dequantize(torch.float64)
    w_hat = value(w, block=(32, 32))
    padded = lambda a: nvfp4.hadamard16(F.pad(a, (0, 0, 0, 31)), dim=0).T
    assert torch.allclose(y, value(x) @ w_hat.T, rtol=0, atol=1e-12) and torch.allclose(dx, value(dy) @ w_hat, rtol=0, atol=1e-14)
    assert torch.allclose(dw, value(padded(dy)) @ value(padded(x)).T, rtol=0, atol=1e-14)


def test_without_tiles_fprop_and_dgrad_see_different_weights():
    """The chain rule breaks: 1×16 blocks along two axes give two weights, 13 % apart; tiles give one."""
    w = normal(64, 64)
    eye = torch.eye(64)                                      # ones quantise exactly, so the products return the weight itself
    for tiles, apart in ((True, 0.0), (False, 0.13)):
        y, dx, _ = run(eye, w, eye, NVFP4Recipe(weight_tiles=tiles, stochastic_gradients=False))
        # 1e-6: an operand of ones decodes to 1 within an fp32 rounding
        assert relative(y.T, dx) == pytest.approx(apart, abs=0.01 if apart else 1e-6)
    (_, *tiled), (_, *rows) = nvfp4.measure_consistency(size=128)
    assert tiled[2] == "0.00 %" and rows[2] != "0.00 %"


def test_high_precision_is_exactly_a_linear_layer_in_fp64():
    """forward and backward switched off: outputs and gradients of F.linear, plain and grouped with an empty expert."""
    x, w, dy = layer_case()
    for got, expect in zip(run(x, w, dy, NVFP4Recipe(forward=False, backward=False)), (x @ w.T, dy @ w, dy.T @ x)):
        assert torch.allclose(got, expect, rtol=0, atol=1e-13)
    w_e, offsets = normal(3, 48, 32, dtype=torch.float64), torch.tensor([5, 5, 33])
    y, dx, dw = run(x, w_e, dy, NVFP4Recipe(forward=False, backward=False), offsets_e=offsets)
    assert torch.allclose(y[5:], x[5:] @ w_e[2].T) and torch.allclose(dx[:5], dy[:5] @ w_e[0])
    assert dw[1].eq(0).all() and torch.allclose(dw[2], dy[5:].T @ x[5:])


def clip(a):
    """What saturation leaves of a when it is quantised with max scales: the expectation of stochastic rounding."""
    q = quantize(a)
    limit = 6 * q.block_scale.double() * q.global_scale.double()
    return a.unflatten(-1, (-1, 16)).clamp(-limit[..., None], limit[..., None]).flatten(1)


def test_gradients_are_right_on_average():
    """E[dX] = clip(dY)·Ŵ and E[dW] = clip(RHT dY)ᵀ·(quantised RHT X). Over 200 seeds the squared distance of the mean from there, in units of its
    own variance, averages 1. Each row mixes 48 sums of the same rounding errors, worth at least 10 independent ones, so the average stays within
    5·sqrt(2 / (10·rows)): one false alarm in two million per identity. Nearest rounding, or an identity without the clip, must fall outside."""
    x, w, dy = layer_case(r=30, i=48, o=64)
    dx, dw = (torch.stack(part) for part in zip(*[run(x, w, dy, NVFP4Recipe(), seed=seed)[1:] for seed in range(200)]))
    w_hat = quantize(w, block=(16, 16)).dequantize(torch.float64)
    x_hat = quantize(columns(x)).dequantize(torch.float64)
    distance = lambda mean, expect, draws: ((mean - expect).square() / (draws.var(0) / len(draws))).mean().item()
    for draws, expect, unclipped in ((dx, clip(dy) @ w_hat, dy @ w_hat), (dw, clip(columns(dy)) @ x_hat.T, columns(dy) @ x_hat.T)):
        bound = 5 * math.sqrt(2 / (10 * draws.shape[1]))
        assert abs(distance(draws.mean(0), expect, draws) - 1) < bound
        assert distance(draws.mean(0), unclipped, draws) > 1 + bound
    nearest = run(x, w, dy, NVFP4Recipe(stochastic_gradients=False))[1]
    assert distance(nearest, clip(dy) @ w_hat, dx) > 10


def test_grouped_equals_every_expert_by_itself():
    """Padding, amax and blocks must not leak between experts; an expert may be empty, and experts differ by 10^4 in scale."""
    counts = [7, 0, 40, 16, 1]
    offsets = torch.tensor(counts).cumsum(0)
    size = torch.tensor([1.0, 1.0, 1e-4, 30.0, 1.0], dtype=torch.float64).repeat_interleave(torch.tensor(counts))[:, None]
    x, dy = (normal(64, width, seed=width, dtype=torch.float64) * size for width in (32, 48))
    w = normal(5, 48, 32, seed=1, dtype=torch.float64)
    for rht in (True, False):
        recipe = NVFP4Recipe(stochastic_gradients=False, rht=rht)
        y, dx, dw = run(x, w, dy, recipe, offsets_e=offsets)
        for e, (start, end) in enumerate(zip([0, *offsets.tolist()], offsets.tolist())):
            y_e, dx_e, dw_e = run(x[start:end], w[e], dy[start:end], recipe)
            assert torch.equal(y[start:end], y_e) and torch.equal(dx[start:end], dx_e)
            assert torch.allclose(dw[e], dw_e, rtol=0, atol=1e-12 * dw_e.abs().max().item())
    stochastic = run(x, w, dy, NVFP4Recipe(), offsets_e=offsets.int())           # int32 offsets, as grouped_mm wants them
    assert 0.01 < relative(stochastic[1], dx) < 0.3 and stochastic[2][1].eq(0).all()


def test_quantize_pair_is_rows_and_transformed_columns_with_separate_draws():
    """The two copies have different maxima and must not share random numbers."""
    x = normal(33, 32)
    rows, cols = nvfp4.quantize_pair(x)
    assert_same_codes(rows, quantize(x)); assert_same_codes(cols, quantize(columns(x)))
    assert cols.shape == (32, 48) and cols.global_scale != rows.global_scale
    assert_same_codes(nvfp4.quantize_pair(x, rht=False)[1], quantize(columns(x, rht=False)))
    square = torch.full((16, 16), 0.3); square.fill_diagonal_(1)                 # symmetric: the same draws would give the same codes
    a, b = nvfp4.quantize_pair(square, rounding="stochastic", rht=False, seed=4)
    assert torch.equal(bits(a.block_scale), bits(b.block_scale)) and not torch.equal(a.codes, b.codes)
    assert nvfp4.padded_offsets(torch.tensor([3, 3, 20])).tolist() == [16, 16, 48]


def test_the_layer_takes_any_shape_and_keeps_dtypes():
    """Non-contiguous input, leading dimensions, one token, no token; bf16 in and out with an fp32 weight gradient; autocast decides when it is on."""
    layer = nvfp4.NVFP4Linear(32, 48)
    x = normal(3, 32, 5).transpose(1, 2).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    flat = nvfp4.nvfp4_linear(x.detach().reshape(15, 32), layer.weight, layer.recipe)
    assert torch.equal(y, flat.view(3, 5, 48)) and x.grad.shape == x.shape and layer.weight.grad.dtype == torch.float32
    assert layer(torch.randn(32)).shape == (48,) and layer(torch.randn(2, 0, 32)).shape == (2, 0, 48)
    layer(torch.randn(2, 0, 32, requires_grad=True)).sum().backward()
    low = normal(4, 32, dtype=torch.bfloat16).requires_grad_()
    layer.weight.grad = None
    layer(low).float().sum().backward()
    assert layer(low).dtype == torch.bfloat16 and low.grad.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    assert torch.equal(layer(low), layer(low.float()).bfloat16())
    expect = layer(low.float()).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(low.float()), expect)            # the result is rounded once, the decoded operands are not
        for recipe in (NVFP4Recipe(), NVFP4Recipe(forward=False, backward=False)):
            layer.recipe = recipe
            assert layer(low.float()).dtype == torch.bfloat16
            assert nvfp4.hadamard16(low).dtype == torch.float32
    assert dict(layer.named_parameters()).keys() == {"weight"} and "32, 48" in repr(layer)


def test_draw_seed_makes_the_backward_repeatable():
    """Same seed, same gradient, also through activation recomputation; another seed, another gradient; the forward never moves."""
    layer, x = nvfp4.NVFP4Linear(32, 48), normal(20, 32)

    def gradients(seed, recompute=False):
        layer.draw_seed, layer.weight.grad, inputs = seed, None, x.clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(layer, inputs, use_reentrant=False) if recompute else layer(inputs)
        y.sin().sum().backward()
        return y.detach(), inputs.grad, layer.weight.grad

    first = gradients(7)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(7))) and all(torch.equal(a, b) for a, b in zip(first, gradients(7, True)))
    y, dx, dw = gradients(8)
    assert torch.equal(first[0], y) and not torch.equal(first[1], dx) and not torch.equal(first[2], dw)


def test_mxfp8_layer_rounds_each_operand_along_its_contraction():
    """The report keeps Mamba's output projections in MXFP8; errors a tenth of NVFP4's, and blocks of 32 in every product."""
    layer = nvfp4.MXFP8Linear(64, 32)
    x, dy = normal(2, 33, 64).requires_grad_(), normal(2, 33, 32, seed=1)
    y = layer(x)
    y.backward(dy)
    x, dx, dy, w = x.detach().view(66, 64), x.grad.view(66, 64), dy.view(66, 32), layer.weight.detach()
    value, tokens = lambda a: nvfp4.mxfp8_round_trip(a).double(), lambda a: F.pad(a, (0, 0, 0, 30)).T
    assert torch.allclose(y.detach().view(66, 32).double(), value(x) @ value(w).T, rtol=0, atol=1e-5)
    assert torch.allclose(dx.double(), value(dy) @ value(w.T).T, rtol=0, atol=1e-5)
    assert torch.allclose(layer.weight.grad.double(), value(tokens(dy)) @ value(tokens(x)).T, rtol=0, atol=1e-4)
    assert 0 < relative(y.detach().view(66, 32), x @ w.T) < 0.05 and layer.draw_seed == 0
    assert layer(x.bfloat16()).dtype == torch.bfloat16 and layer(x[0]).shape == (32,)


# bad input

@pytest.mark.parametrize("call,words", [
    (lambda: quantize(torch.ones(4, 40)), ["40", "multiple of 16", "pad"]),
    (lambda: quantize(torch.ones(24, 32), block=(16, 16)), ["24", "multiple of 16", "pad"]),
    (lambda: quantize(torch.ones(4, 48), format="mxfp4"), ["48", "multiple of 32", "pad"]),
    (lambda: quantize(torch.tensor([[math.nan] + [1.0] * 15])), ["input", "NaN or Inf"]),
    (lambda: quantize(torch.tensor([[-math.inf] + [1.0] * 15]), name="layer 3's weight"), ["layer 3's weight", "NaN or Inf"]),
    (lambda: quantize(torch.tensor([[math.nan] + [1.0] * 15]), amax=torch.tensor(1.0)), ["input", "NaN or Inf"]),
    (lambda: quantize(torch.ones(1, 16), amax=torch.tensor(math.nan)), ["amax", "finite"]),
    (lambda: quantize(torch.ones(4, 16), amax=torch.ones(3)), ["amax", "(3,)", "(4, 16)"]),
    (lambda: quantize(torch.ones(1, 16), rounding="stochastic"), ["seed"]),
    (lambda: quantize(torch.ones(1, 16), rounding="stochastic", seed=0, offset=8), ["offset", "16"]),
    (lambda: quantize(torch.ones(1, 16), rounding="stochastic", seed=0, scale_rule="mse"), ["stochastic", "mse"]),
    (lambda: quantize(torch.ones(1, 32), format="mxfp4", scale_rule="mse"), ["mse", "MXFP4"]),
    (lambda: quantize(torch.ones(1, 16), rounding="up"), ["up", "nearest"]),
    (lambda: quantize(torch.ones(1, 16), scale_rule="best"), ["best", "four_over_six"]),
    (lambda: quantize(torch.ones(1, 16), block=(4, 4)), ["(4, 4)", "(16, 16)"]),
    (lambda: quantize(torch.ones(1, 16, dtype=torch.int32)), ["int32", "floating"]),
    (lambda: quantize(torch.ones(1, 16), impl="fast"), ["fast", "triton"]),
    (lambda: nvfp4.writable_folder(Path(__file__) / "out"), ["test_01_nvfp4.py/out", "choose another"]),
    (lambda: nvfp4.hadamard16(torch.ones(8)), ["multiple of 16"]),
    (lambda: nvfp4.NVFP4Linear(32, 40), ["out_features=40", "16"]),
    (lambda: nvfp4.NVFP4Linear(48, 32, NVFP4Recipe(format="mxfp4")), ["in_features=48", "32"]),
    (lambda: nvfp4.MXFP8Linear(48, 32), ["in_features=48", "32"]),
    (lambda: nvfp4.mxfp8_round_trip(torch.full((1, 32), math.inf)), ["NaN or Inf"]),
    (lambda: nvfp4.nvfp4_linear(torch.ones(4, 16), torch.ones(16, 32), NVFP4Recipe()), ["(4, 16)", "(16, 32)"]),
    (lambda: nvfp4.nvfp4_linear(torch.full((4, 16), math.nan), torch.ones(16, 16), NVFP4Recipe()), ["input of a linear layer", "NaN or Inf"]),
])
def test_bad_input_gets_one_clear_sentence(call, words):
    """What is wrong, in which tensor, and what to do."""
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_a_bad_gradient_is_named():
    """NaN in dY must be found before it is spread over 16 tokens by the transform."""
    layer, x = nvfp4.NVFP4Linear(16, 16), torch.ones(4, 16, requires_grad=True)
    with pytest.raises(ValueError, match="gradient of a linear layer's output holds NaN or Inf"):
        (layer(x) * math.nan).sum().backward()


# helpers

def test_twins_are_found_by_name_and_missing_ones_are_explained(monkeypatch):
    """auto on a CPU tensor must stay in PyTorch even when a twin exists; triton insists."""
    twin = type(sys)("kernels.fake"); twin.double = lambda x: 2 * x
    monkeypatch.setitem(sys.modules, "kernels", type(sys)("kernels")); monkeypatch.setitem(sys.modules, "kernels.fake", twin)
    x = torch.ones(1)
    assert nvfp4.find_twin("fake", "double", "auto", x) is None and nvfp4.find_twin("fake", "double", "torch", x) is None
    assert nvfp4.find_twin("fake", "double", "triton", x) is twin.double
    with pytest.raises(ValueError, match="kernels/fake.py.*impl='torch'"):
        nvfp4.find_twin("fake", "triple", "triton", x)


def test_result_rows_and_figures_are_written(tmp_path):
    """Rows append, one JSON object a line, with what is needed to repeat them; figures need no display."""
    nvfp4.write_row(tmp_path / "new", "01_nvfp4", loss=1.5)
    nvfp4.write_row(tmp_path / "new", "01_nvfp4", loss=1.25)
    rows = [json.loads(line) for line in (tmp_path / "new" / "results.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [1.5, 1.25] and {"stage", "commit", "device", "torch", "argv"} <= rows[0].keys()
    pytest.importorskip("matplotlib")
    fig, axes = nvfp4.new_figure(columns=2)
    axes[0].plot([1, 2])
    nvfp4.save_figure(fig, tmp_path / "a" / "b.png")
    assert (tmp_path / "a" / "b.png").stat().st_size > 5000


def test_import_needs_neither_tyro_nor_matplotlib():
    """A GPU machine has torch and triton, not always the rest."""
    code = "import sys, importlib; importlib.import_module('01_nvfp4'); print([m for m in ('tyro', 'matplotlib') if m in sys.modules])"
    root = Path(nvfp4.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout.strip() == "[]"
