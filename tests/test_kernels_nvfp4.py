"""The NVFP4 twins against stage 01: the same bits, in Triton's interpreter or on a GPU."""
import importlib
import math

import pytest
import torch
from kernel_checks import DEVICE, randn

import kernels.nvfp4 as kernel

nvfp4 = importlib.import_module("01_nvfp4")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")     # numpy, which interprets, warns of the 1/0 that is then cut to the maximum
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def raw(t):
    """Bytes or numbers that can be compared exactly: a NaN equals itself."""
    t = t.cpu()
    return t.view(torch.int32) if t.dtype == torch.float32 else t.view(torch.uint8)


def assert_same(twin, stage):
    """Codes, block scales and second level, bit for bit, with shapes and dtypes."""
    assert twin.block == stage.block
    for name in ("codes", "block_scale", "global_scale"):
        a, b = getattr(twin, name), getattr(stage, name)
        assert a.shape == b.shape and a.dtype == b.dtype, f"{name}: {a.shape} {a.dtype} against {b.shape} {b.dtype}"
        assert torch.equal(raw(a), raw(b)), f"{name}: {(raw(a) != raw(b)).sum()} of {raw(b).numel()} differ"


def stage_quantize(x, **request):
    """Stage 01 on the CPU, where it was checked against independent implementations."""
    request = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in request.items()}
    return nvfp4.quantize(x.cpu(), impl="torch", **request)


def wide(*shape, seed=0):
    """Gaussians whose rows differ in size by some powers of ten."""
    return randn(*shape, seed=seed) * (2 * randn(*shape[:-1], 1, seed=seed + 1)).exp()


def cut(columns, tokens):
    """The part of grouped columns that stage 01 has; what follows must be zeros."""
    assert not columns.codes[:, tokens // 2 :].any()
    width, scale = columns.block[1], columns.global_scale
    return nvfp4.NVFP4Tensor(columns.codes[:, : tokens // 2].contiguous(), columns.block_scale[:, : tokens // width].contiguous(),
                             scale[:, : tokens // width].contiguous() if scale.ndim else scale, columns.block)


REQUESTS = {"rows": {}, "tiles": dict(block=(16, 16)), "stochastic rows": dict(rounding="stochastic", seed=3, offset=48),
            "stochastic tiles": dict(block=(16, 16), rounding="stochastic", seed=2**63 + 5), "four over six": dict(scale_rule="four_over_six"),
            "four over six tiles": dict(scale_rule="four_over_six", block=(16, 16)), "mxfp4 rows": dict(format="mxfp4"),
            "mxfp4 stochastic tiles": dict(format="mxfp4", block=(16, 16), rounding="stochastic", seed=4)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("request_", REQUESTS)
def test_quantize_is_bit_equal_to_stage_01(request_, dtype):
    """Every mode, on a width that no tile of the kernel divides: a mask, a scale or the index of a draw that is off shows here."""
    x = wide(96, 160).to(DTYPES[dtype])
    assert_same(kernel.quantize(x, **REQUESTS[request_]), stage_quantize(x, **REQUESTS[request_]))


@pytest.mark.parametrize("dtype", ["fp16", "fp64"])
def test_other_dtypes_are_first_made_fp32(dtype):
    for x in (wide(33, 48).to(DTYPES[dtype]), wide(1, 16).to(DTYPES[dtype])):
        assert_same(kernel.quantize(x, rounding="stochastic", seed=1), stage_quantize(x, rounding="stochastic", seed=1))


def hard_cases():
    x = randn(16, 64)
    zero_blocks = x.clone(); zero_blocks[:, 16:32] = 0; zero_blocks[3] = -0.0
    underflow = x.clone(); underflow[:8] *= 1e-7
    one = torch.zeros_like(x); one[5, 5] = -3.0
    ties = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]).repeat(16, 8) * torch.tensor([1.0, -1.0]).repeat(32)
    return {"zero blocks": zero_blocks, "outliers": torch.where(x > 1.5, 1000 * x, x), "underflow": underflow, "one value": one, "all zero": -0.0 * x,
            "tiny": 1e-30 * x, "s_enc overflows": 1e-36 * x, "subnormal": 1e-42 * x, "huge": 1e37 * x, "ties": ties.to(DEVICE)}


@pytest.mark.parametrize("case", hard_cases())
def test_hard_numbers_are_bit_equal(case):
    """Zero blocks have code 0 but keep scales; -0 elsewhere is code 8; scales that underflow, overflow or lie half-way between two."""
    x = hard_cases()[case]
    for request in ({}, dict(block=(16, 16)), dict(rounding="stochastic", seed=1), dict(format="mxfp4"), dict(scale_rule="four_over_six")):
        assert_same(kernel.quantize(x, **request), stage_quantize(x, **request))


def test_every_midpoint_rounds_as_in_stage_01():
    """One float below, on and above each midpoint of the two grids: E2M1 for codes, E4M3 for scales (subnormal ones included)."""
    middle = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 0.5, 1, 2, 4])
    values = torch.cat((middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(9.0)), torch.tensor([2.0**-30, 1e-40, 6.2, 6.37])))
    x = torch.zeros(10, 16)
    x[:, 0], x[:, 1:9] = 6, torch.stack((values, -values)).view(10, 8)
    for request in (dict(amax=2688.0), dict(amax=2688.0, rounding="stochastic", seed=0)):        # both scales are then 1
        twin = kernel.quantize(x.to(DEVICE), **request)
        assert twin.block_scale.float().eq(1).all()
        assert_same(twin, stage_quantize(x, **request))
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = 6 * torch.cat((scales, (scales[1:] + scales[:-1]) / 2))
    maxima = torch.cat((middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(1e9)), torch.tensor([3e3, 1e9, 3e38])))
    x = maxima[:, None] * torch.linspace(-1, 0.6, 16)
    assert_same(kernel.quantize(x.to(DEVICE), amax=2688.0), stage_quantize(x, amax=2688.0))


def test_a_given_amax_of_any_shape_is_used():
    """A scalar, one by row, by block column, by both or by expert; too small a one saturates, and the second level keeps its shape."""
    x, stack = wide(48, 96), wide(3, 32, 48)
    some = lambda *shape: randn(*shape, seed=7).abs() + 0.1
    for amax in (2.5, torch.zeros((), device=DEVICE), some(48), some(48, 1), some(1, 6), some(48, 6)):
        assert_same(kernel.quantize(x, amax=amax), stage_quantize(x, amax=amax))
    for amax in (some(3), some(3, 32), some(3, 1, 3), 1.5):
        assert_same(kernel.quantize(stack, amax=amax), stage_quantize(stack, amax=amax))
    assert_same(kernel.quantize(stack, (16, 16), amax=some(3)), stage_quantize(stack, block=(16, 16), amax=some(3)))
    nested = stack.view(3, 2, 16, 48)
    for amax in (None, some(3), some(3, 2), some(1, 2, 1, 1)):
        assert_same(kernel.quantize(nested, amax=amax), stage_quantize(nested, amax=amax))


def test_a_stack_measures_every_expert_by_itself():
    x = torch.stack((randn(32, 48), 100 * randn(32, 48, seed=1), torch.zeros(32, 48, device=DEVICE)))
    for block in ((1, 16), (16, 16)):
        twin = kernel.quantize(x, block)
        assert twin.global_scale.shape == (3,)
        assert_same(twin, stage_quantize(x, block=block))


def test_strided_inputs_and_edges_of_shape():
    """A slice of a projection, a transposed view, one vector, one block, nothing: strides and tiles that stick out."""
    big = wide(40, 256)
    for x in (big[:, 16:112], big[::2], big[:16].T, big[3, :32], big[:1, :16], big[:0], big.bfloat16()[:, 128:]):
        assert_same(kernel.quantize(x, rounding="stochastic", seed=9), stage_quantize(x, rounding="stochastic", seed=9))
    assert_same(kernel.quantize(wide(4, 32, 48)[1:, :, 16:]), stage_quantize(wide(4, 32, 48)[1:, :, 16:]))


def test_a_search_over_all_scales_runs_stage_01s_code():
    x = randn(4, 32)
    assert_same(kernel.quantize(x, scale_rule="mse"), stage_quantize(x, scale_rule="mse"))


# dequantize and transpose

@pytest.mark.parametrize("request_", ["rows", "tiles", "mxfp4 rows"])
def test_dequantize_is_exact_in_every_dtype(request_):
    x = wide(33 if "rows" in request_ else 48, 96)
    x[:, 16:32] = 0
    q = stage_quantize(x, **REQUESTS[request_])
    ours = nvfp4.NVFP4Tensor(q.codes.to(DEVICE), q.block_scale.to(DEVICE), q.global_scale.to(DEVICE), q.block)
    for dtype in DTYPES.values():
        out = kernel.dequantize(ours, dtype)
        assert out.dtype == dtype and torch.equal(out.cpu(), q.dequantize(dtype, impl="torch"))


def test_dequantize_spreads_every_second_level():
    """By row, by block column, by expert; codes that start within a 32-bit word; nothing at all."""
    x, stack = wide(48, 96), wide(3, 32, 48)
    some = lambda *shape: randn(*shape, seed=7).abs() + 0.1
    for values, amax in ((x, some(48)), (x, some(1, 6)), (x, some(48, 6)), (stack, None), (stack, some(3, 32)), (stack.view(3, 2, 16, 48), None),
                         (x[:0], None), (x[0], None)):
        twin, q = kernel.quantize(values, amax=amax), stage_quantize(values, amax=amax)
        assert torch.equal(kernel.dequantize(twin).cpu(), q.dequantize(impl="torch"))
    shifted = torch.cat((twin.codes.new_zeros(1), twin.codes))[1:]
    assert torch.equal(kernel.dequantize(nvfp4.NVFP4Tensor(shifted, twin.block_scale, twin.global_scale)).cpu(), q.dequantize(impl="torch"))


@pytest.mark.parametrize("shape", [(48, 24), (2, 2), (3, 34, 9), (2, 2, 16, 8), (0, 8)])
def test_transpose_codes_swaps_partners(shape):
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kernel.transpose_codes(codes.to(DEVICE)).cpu(), nvfp4.transpose_codes(codes, impl="torch"))
    if codes.ndim == 2 and codes.shape[1] % 2 == 0:
        assert torch.equal(kernel.transpose_codes(codes.to(DEVICE)[:, ::2]).cpu(), nvfp4.transpose_codes(codes[:, ::2], impl="torch"))


# rows, columns and pairs

OFFSETS = {"plain": None, "grouped": [3, 3, 20, 50, 50], "first empty": [0, 0, 50], "one row": [1, 50], "aligned": [16, 48, 50]}


def offsets_of(case):
    return None if OFFSETS[case] is None else torch.tensor(OFFSETS[case], dtype=torch.int32, device=DEVICE)


def on_cpu(offsets_e):
    return None if offsets_e is None else offsets_e.cpu()


def assert_pair(x, offsets_e, **request):
    """The twin's pair against stage 01's, and its single directions against those of the pair's seeds."""
    rows, columns = kernel.quantize_pair(x, offsets_e, **request)
    stage_rows, stage_columns = nvfp4.quantize_pair(x.cpu(), on_cpu(offsets_e), impl="torch", **request)
    assert_same(rows, stage_rows)
    assert_same(cut(columns, stage_columns.shape[-1]), stage_columns)
    most = 0 if offsets_e is None else 15 * len(offsets_e)
    assert columns.shape[-1] <= stage_columns.shape[-1] + (most if request.get("format") != "mxfp4" else 31 * 5)


@pytest.mark.parametrize("rht", [True, False])
@pytest.mark.parametrize("case", OFFSETS)
def test_pairs_are_bit_equal_where_sums_are_exact(case, rht):
    """bf16 numbers on a grid: sums of 16 are exact in any order. Experts share a second level, padding is zeros, each copy has its own draws."""
    x = (4 * randn(50, 64)).round().div(8).bfloat16()
    x[20:] *= 8
    assert_pair(x, offsets_of(case), rht=rht)
    assert_pair(x, offsets_of(case), rht=rht, rounding="stochastic", seed=5)


def edges_of_the_transform():
    """Blocks of 16 tokens by 32 features whose sums of 16 are exact: powers of two and zeros, of either sign."""
    signs = torch.where(randn(16, 32).cpu() < 0, -1.0, 1.0)
    zeros = (-0.0 * nvfp4.HADAMARD_SIGNS)[:, None].repeat(1, 32)          # -0 once they have the transform's signs: so is their sum
    half, one = zeros.clone(), zeros.clone()
    half[1::2], one[3, ::3] = signs[1::2], -2                             # the last round takes odd tokens that cancel from even ones
    return {"zeros of either sign": torch.cat((half, one, signs, zeros)), "huge": 2.0**125 * signs, "subnormal": 2.0**-133 * torch.cat((signs, half))}


@pytest.mark.parametrize("rht", [True, False])
@pytest.mark.parametrize("case", edges_of_the_transform())
def test_pairs_are_bit_equal_at_the_edges_of_the_transform(case, rht):
    """-0 that differences leave and sums from 0 do not; sums that overflow unless the factor 1/4 comes first; numbers that it makes subnormal."""
    x = edges_of_the_transform()[case].bfloat16().to(DEVICE)
    assert_pair(x, None, rht=rht)
    assert_pair(x, torch.tensor([5, len(x)], device=DEVICE), rht=rht, rounding="stochastic", seed=5)


@pytest.mark.parametrize("case", ["plain", "grouped"])
def test_pairs_in_mxfp4_have_blocks_of_32_tokens(case):
    x = (4 * randn(50, 64)).round().div(8)
    assert_pair(x, offsets_of(case), format="mxfp4", rounding="stochastic", seed=5)


@pytest.mark.parametrize("shape", [(0, 32), (1, 16), (33, 48), (300, 32)])
def test_pairs_of_odd_sizes(shape):
    x = (4 * randn(*shape)).round().div(8)
    assert_pair(x, None)
    assert_pair(x, torch.tensor([shape[0] // 3, shape[0]], device=DEVICE))


@pytest.mark.parametrize("case", ["plain", "grouped"])
def test_one_direction_alone_equals_stage_01(case):
    """The rows of fprop's X, the columns of wgrad's X; a strided x; a feature count that only columns accept."""
    x, offsets_e = (4 * randn(50, 96)).round().div(8)[:, 16:64], offsets_of(case)
    for request in ({}, dict(rounding="stochastic", seed=8)):
        assert_same(kernel.quantize_rows(x, offsets_e, **request), nvfp4.quantize_rows(x.cpu(), on_cpu(offsets_e), impl="torch", **request))
        stage = nvfp4.quantize_columns(x[:, :37].cpu(), on_cpu(offsets_e), impl="torch", **request)
        assert_same(cut(kernel.quantize_columns(x[:, :37], offsets_e, **request), stage.shape[-1]), stage)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", ["plain", "grouped"])
def test_pairs_of_gaussians_differ_in_the_order_of_a_sum_at_most(case, dtype):
    """Rows exactly; of the transformed columns at most one code in 10,000 goes to the neighbour, when the sum's last bit decides."""
    x, offsets_e = wide(50, 64).to(DTYPES[dtype]), offsets_of(case)
    rows, columns = kernel.quantize_pair(x, offsets_e)
    stage_rows, stage_columns = nvfp4.quantize_pair(x.cpu(), on_cpu(offsets_e), impl="torch")
    assert_same(rows, stage_rows)
    columns = cut(columns, stage_columns.shape[-1])
    codes, stage_codes = (nvfp4.unpack(q.codes.cpu()) for q in (columns, stage_columns))
    positions, stage_positions = codes.int() & 7, stage_codes.int() & 7
    assert (codes != stage_codes).float().mean() <= 1e-4 and (positions - stage_positions).abs().max() <= 1
    assert (raw(columns.block_scale) != raw(stage_columns.block_scale)).float().mean() <= 1e-3
    torch.testing.assert_close(columns.global_scale.cpu(), stage_columns.global_scale, rtol=1e-6, atol=0)


# stochastic rounding

def test_stochastic_rounding_is_unbiased_and_repeats_itself():
    """2.3 rounds to 2 or 3, on average to 2.3: five standard errors, one false alarm in about two million seeds."""
    x = torch.full((256, 256), 2.3)
    x[:, ::16] = 6.0
    twin = kernel.quantize(x.to(DEVICE), rounding="stochastic", seed=11, amax=2688.0)
    values = kernel.dequantize(twin)[x == 2.3].double().cpu()
    assert set(values.tolist()) == {2.0, 3.0}
    assert abs(values.mean().item() - 2.3) < 5 * math.sqrt(0.3 * 0.7 / values.numel())
    assert torch.equal(twin.codes, kernel.quantize(x.to(DEVICE), rounding="stochastic", seed=11, amax=2688.0).codes)
    assert not torch.equal(twin.codes, kernel.quantize(x.to(DEVICE), rounding="stochastic", seed=12, amax=2688.0).codes)


def test_a_value_goes_up_exactly_when_it_lies_beyond_its_draw():
    """On the threshold, one float below and one above, in each step of the grid: a product rounded to nearest would take "above" for "on"."""
    u = nvfp4.uniform_draws(21, 0, 7 * 16).view(7, 16)
    start, step = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4])[:, None], torch.tensor([0.5, 0.5, 0.5, 0.5, 1, 1, 2])[:, None]
    on = start + u * step
    for x, ups in ((on, 0), (on.nextafter(torch.tensor(0.0)), 0), (on.nextafter(torch.tensor(9.0)), 1)):
        x[:, 0] = 6                                                           # with this amax both scales are 1
        twin = kernel.quantize(x.to(DEVICE), rounding="stochastic", seed=21, amax=2688.0)
        assert torch.equal(nvfp4.unpack(twin.codes.cpu())[:, 1:], (torch.arange(7)[:, None] + ups).expand(7, 15).to(torch.uint8))
        assert_same(twin, stage_quantize(x, rounding="stochastic", seed=21, amax=2688.0))


def test_as_many_small_values_become_zero_as_in_stage_01():
    """Small gradients beside a large one: what nearest rounding loses is kept with the right probability, by the same draws."""
    x = 0.02 * randn(64, 64).abs()
    x[:, ::16] = 1
    twin, stage = kernel.quantize(x, rounding="stochastic", seed=2), stage_quantize(x, rounding="stochastic", seed=2)
    zeros = (nvfp4.unpack(twin.codes.cpu()) & 7 == 0).sum()
    assert 0 < zeros == (nvfp4.unpack(stage.codes) & 7 == 0).sum()


def test_draws_go_on_beyond_32_bits():
    """A piece far into a tensor: an index cut to 32 bits would repeat the draws of its beginning."""
    x, far = randn(4, 32), 2**40 + 2**33 + 16
    twin = kernel.quantize(x, rounding="stochastic", seed=1, offset=far, amax=1.0)
    assert_same(twin, stage_quantize(x, rounding="stochastic", seed=1, offset=far, amax=1.0))
    assert not torch.equal(twin.codes, kernel.quantize(x, rounding="stochastic", seed=1, offset=far % 2**32, amax=1.0).codes)


# what is not a number, and what is not allowed

@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_reach_everything_that_is_computed_from_them(bad, dtype):
    """Stage 01 raises; the twin must not wait for the GPU, so the global scale says NaN. With a given amax, the block's scale does."""
    x = randn(32, 64, dtype=DTYPES[dtype])
    x[5, 20] = bad
    for q in (kernel.quantize(x), kernel.quantize(x, (16, 16)), *kernel.quantize_pair(x), *kernel.quantize_pair(x, rht=False)):
        assert q.global_scale.isnan().all() and kernel.dequantize(q).isnan().all()
    for request in (dict(amax=3.0), dict(format="mxfp4")):
        values = kernel.dequantize(kernel.quantize(x, **request))
        width = 32 if "format" in request else 16
        expected = torch.zeros(32, 64, dtype=torch.bool)
        expected[5, 20 // width * width : 20 // width * width + width] = True
        assert torch.equal(values.isnan().cpu(), expected)
    grouped = kernel.quantize_rows(x, torch.tensor([4, 10, 32], device=DEVICE))
    assert torch.equal(grouped.global_scale.isnan().cpu(), (torch.arange(32) >= 4) & (torch.arange(32) < 10))
    columns = kernel.quantize_columns(x, torch.tensor([4, 10, 32], device=DEVICE))
    assert columns.global_scale[0, :4].isnan().tolist() == [False, True, False, False]
    assert kernel.quantize(randn(2, 16), amax=torch.tensor(bad, device=DEVICE)).global_scale.isnan()
    assert kernel.quantize(randn(2, 16), amax=-1.0).global_scale.isnan()


@pytest.mark.parametrize("call, words", [
    (lambda: kernel.quantize(randn(2, 24)), "multiple of 16"), (lambda: kernel.quantize(randn(24, 32), (16, 16)), "tiles span 16 rows"),
    (lambda: kernel.quantize(randn(2, 16), rounding="stochastic"), "seed"), (lambda: kernel.quantize(randn(2, 16).int()), "floating point"),
    (lambda: kernel.quantize(randn(2, 16), amax=randn(3)), "does not fit"), (lambda: kernel.quantize(randn(2, 16), format="fp4"), "unknown"),
    (lambda: kernel.quantize(randn(2, 16), rounding="stochastic", seed=1, offset=8), "multiple of 16"),
    (lambda: kernel.quantize_pair(randn(16, 24)), "multiple of 16"), (lambda: kernel.quantize_pair(randn(2, 16, 32)), "matrix"),
    (lambda: kernel.quantize_columns(randn(16, 16), rounding="stochastic"), "seed"),
    (lambda: kernel.transpose_codes(torch.zeros(3, 8).byte()), "even")])
def test_bad_input_gets_a_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_stage_01_finds_every_twin(monkeypatch):
    """impl="triton" reaches the kernels from each public function, with the arguments in their places."""
    x, offsets_e = (4 * randn(48, 32)).round().div(8), torch.tensor([20, 48], device=DEVICE)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert_same(nvfp4.quantize(x, (16, 16), impl="triton"), kernel.quantize(x, (16, 16)))
    pair = nvfp4.quantize_pair(x, offsets_e, "stochastic", False, 3, impl="triton")
    for ours, theirs in zip(pair, kernel.quantize_pair(x, offsets_e, "stochastic", False, 3)): assert_same(ours, theirs)
    assert_same(nvfp4.quantize_rows(x, offsets_e, impl="triton"), pair_rows := kernel.quantize_rows(x, offsets_e))
    assert_same(nvfp4.quantize_columns(x, offsets_e, rht=False, impl="triton"), kernel.quantize_columns(x, offsets_e, rht=False))
    assert torch.equal(pair_rows.dequantize(impl="triton"), kernel.dequantize(pair_rows))
    assert torch.equal(nvfp4.transpose_codes(pair_rows.codes, impl="triton"), kernel.transpose_codes(pair_rows.codes))


def launches(device, arch):
    """What a layer of Ultra quantizes: the gradient's pair, the input's columns by expert, weights as tiles, and back."""
    before, kernel._NATIVE = kernel._NATIVE, arch >= 100
    try:
        x = torch.empty(16384, 8192, dtype=torch.bfloat16, device=device)
        kernel.quantize_pair(x, rounding="stochastic", seed=1)
        kernel.quantize_columns(x[:, :2048], torch.empty(512, dtype=torch.int32, device=device))
        rows = kernel.quantize(x)
        tiles = kernel.quantize(torch.empty(5120, 2048, dtype=torch.bfloat16, device=device), (16, 16), amax=torch.empty((), device=device))
        kernel.dequantize(rows, torch.bfloat16)
        kernel.transpose_codes(tiles.codes)
    finally:
        kernel._NATIVE = before


def test_a_seed_in_memory_draws_what_its_number_draws():
    """A CUDA graph finds the next step's seed there; hashed on the device, it must be the host's mix64, for both directions of a pair and experts."""
    x = randn(48, 64, seed=3).to(DEVICE)
    offsets = torch.tensor([7, 7, 48], dtype=torch.int32, device=DEVICE)
    for seed in (0, 7, 2**62 + 11, 123456789123):
        for groups in (None, offsets):
            ours = nvfp4.quantize_pair(x, groups, "stochastic", seed=torch.tensor(nvfp4.pair_seeds(seed), device=DEVICE), impl="triton")
            for a, b in zip(ours, nvfp4.quantize_pair(x, groups, "stochastic", seed=seed, impl="triton")): assert torch.equal(a.codes, b.codes)
    other = nvfp4.quantize_pair(x, None, "stochastic", seed=torch.tensor(nvfp4.pair_seeds(1), device=DEVICE), impl="triton")
    assert not torch.equal(other[0].codes, nvfp4.quantize_pair(x, None, "stochastic", seed=0, impl="triton")[0].codes)
