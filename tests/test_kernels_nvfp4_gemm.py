"""kernels/nvfp4_gemm.py against 01_nvfp4.py: `matmul` and `matmul_w4a16`. Decoding is exact, so wherever fp32 sums are exact the results are equal
bit by bit; elsewhere the twin may differ from plain PyTorch by the order of a sum."""
import importlib

import pytest
import torch
from kernel_checks import DEVICE, assert_no_worse, randn

nvfp4 = importlib.import_module("01_nvfp4")
gemm = importlib.import_module("kernels.nvfp4_gemm")
NVFP4Tensor, quantize = nvfp4.NVFP4Tensor, nvfp4.quantize
FORMATS = ("nvfp4", "mxfp4")


def integers(*shape, seed=0, format="nvfp4", scales=None):
    """An operand whose products and sums fp32 holds exactly: every code, block scales 1/2 to 12, a power of two as global scale."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), generator=generator, dtype=torch.uint8)
    width = 16 if format == "nvfp4" else 32
    levels = torch.tensor([0.5, 1, 1.5, 3, 10, 12] if format == "nvfp4" else [0.25, 1, 2, 16])
    block = levels[torch.randint(0, len(levels), (*shape[:-1], shape[-1] // width), generator=generator)]
    block = block.to(torch.float8_e4m3fn) if format == "nvfp4" else (torch.frexp(block).exponent + 126).to(torch.uint8).view(torch.float8_e8m0fnu)
    return NVFP4Tensor(codes.to(DEVICE), block.to(DEVICE), (torch.tensor(0.25) if scales is None else scales).to(DEVICE), (1, width))


def powers(*shape, seed=0):
    return 2.0 ** torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def ends(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def tiles(monkeypatch, **changes):
    """Other launch parameters: the same code on tiles that small tests can cross."""
    real = gemm._tiles
    monkeypatch.setattr(gemm, "_tiles", lambda kind, *args: real(kind, *args) if kind == "decode" else {**real(kind, *args), **changes})


def assert_equal(twin, stage):
    assert twin.dtype == stage.dtype and twin.shape == stage.shape
    assert torch.equal(twin, stage), f"{(twin != stage).sum()} of {twin.numel()} differ"


# ---- decoding

@pytest.mark.parametrize("format", FORMATS)
def test_every_code_times_every_scale_decodes_exactly(format):
    """All 16 codes, in each of a word's eight places, under all positive scales: catches subnormals lost and a wrong exponent offset."""
    scales = torch.arange(127, dtype=torch.uint8) if format == "nvfp4" else torch.arange(252, dtype=torch.uint8)
    width = 16 if format == "nvfp4" else 32
    # row c: the codes c, c + 1, ... so that each place sees each code; every block column has its own scale
    codes = (torch.arange(16)[:, None] + torch.arange(len(scales) * width)) % 16
    block_scale = scales.repeat(16, 1).view(torch.float8_e4m3fn if format == "nvfp4" else torch.float8_e8m0fnu)
    q = NVFP4Tensor(nvfp4.pack(codes.to(torch.uint8)).to(DEVICE), block_scale.to(DEVICE), torch.ones((), device=DEVICE), (1, width))
    decoded = gemm._decoded(q, torch.bfloat16).double() * gemm._owed(q)
    assert torch.equal(decoded, q.dequantize(torch.float64)), "a decoded number differs"


# ---- two 4-bit operands

@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("m, n, k", [(1, 1, 32), (33, 70, 96), (65, 50, 288)])
def test_matmul_is_bit_equal_where_sums_are_exact(m, n, k, format):
    """Odd sizes of both sides and of the contraction, fused (m <= 64) and decoded beforehand: catches a wrong mask, nibble order or scale column."""
    a, b = integers(m, k, format=format), integers(n, k, seed=1, format=format)
    for dtype in (None, torch.bfloat16) if m > 1 else (torch.float16,):
        assert_equal(gemm.matmul(a, b, None, dtype), nvfp4.matmul(a, b, None, dtype, impl="torch"))


@pytest.mark.parametrize("m, k", [(5, 16), (70, 48), (5, 33 * 16)])
def test_any_number_of_blocks_may_be_contracted(m, k):
    """k = 16, 48 and 33 blocks: less than a step, and a step that ends within a word's neighbours."""
    a, b = integers(m, k), integers(37, k, seed=1)
    assert_equal(gemm.matmul(a, b), nvfp4.matmul(a, b, impl="torch"))


def test_matmul_of_gaussians_is_no_worse_than_plain():
    """Random data, where sums round: a missing low-order bit of a decoded value would show."""
    a, b = quantize(randn(40, 528)), quantize(randn(72, 528, seed=1), (1, 16), scale_rule="four_over_six")
    oracle = nvfp4.matmul(a, b, None, torch.float64, impl="torch")
    for dtype in (torch.float32, torch.bfloat16):
        assert_no_worse(gemm.matmul(a, b, None, dtype), nvfp4.matmul(a, b, None, dtype, impl="torch"), oracle)


@pytest.mark.parametrize("m, by_row", [(20, (0, 1)), (20, (1, 0)), (70, (1, 1)), (70, (0, 0))])
def test_global_scales_of_every_shape(m, by_row):
    """One for the tensor or one a row, on either side."""
    sa, sb = (powers(*(size,) * by, seed=size) for size, by in zip((m, 50), by_row))
    a, b = integers(m, 64, scales=sa), integers(50, 64, seed=1, scales=sb)
    assert_equal(gemm.matmul(a, b), nvfp4.matmul(a, b, impl="torch"))


def test_scales_that_vary_within_a_sum_take_the_stage_itself():
    """A global scale by block column cannot leave the sum."""
    a, b = integers(20, 64, scales=powers(1, 4, seed=7)), integers(50, 64, seed=1)
    assert_equal(gemm.matmul(a, b), nvfp4.matmul(a, b, impl="torch"))


ROUTINGS = {"mixed": (3, 3, 20, 60, 60, 71), "all on one": (0, 0, 0, 71, 71, 71), "all on the first": (71,) * 6, "all on the last": (0,) * 5 + (71,),
            "one row each": (1, 2, 3, 4, 5, 71)}


@pytest.mark.parametrize("routing, format", [*((routing, "nvfp4") for routing in ROUTINGS), ("mixed", "mxfp4")])
def test_grouped_rows_with_empty_experts(routing, format, monkeypatch):
    """Tiles of 16 rows that no expert's rows fill: catches rows that take a neighbour's expert."""
    tiles(monkeypatch, BM=16, BN=64, BK=64)
    a = integers(71, 96, scales=powers(71, seed=2), format=format)
    b = integers(6, 40, 96, seed=1, scales=powers(6, seed=3), format=format)
    offsets_e = ends(*ROUTINGS[routing], dtype=torch.int64 if routing == "mixed" else torch.int32)
    assert_equal(gemm.matmul(a, b, offsets_e, torch.bfloat16), nvfp4.matmul(a, b, offsets_e, torch.bfloat16, impl="torch"))


def test_rows_behind_the_last_expert_are_zero():
    """A padded batch: what torch.empty left there must not reach the next layer."""
    a, b, offsets_e = integers(50, 32), integers(3, 20, 32, seed=1), ends(2, 2, 18)
    y = gemm.matmul(a, b, offsets_e)
    inside = NVFP4Tensor(a.codes[:18], a.block_scale[:18], a.global_scale, a.block)
    assert_equal(y[:18], nvfp4.matmul(inside, b, offsets_e, impl="torch"))
    assert not y[18:].any()


@pytest.mark.parametrize("format", FORMATS)
def test_grouped_contraction_with_empty_experts_and_a_padded_end(format, monkeypatch):
    """A weight gradient per expert; steps of 64 columns start in the middle of a step of the neighbour. Beyond the last end nothing counts."""
    tiles(monkeypatch, BM=32, BN=32, BK=64)
    unit = 16 if format == "nvfp4" else 32
    offsets_e = ends(*(unit * i for i in (0, 3, 3, 4, 9, 9)))
    columns = 11 * unit
    by_column = lambda seed: powers(6, seed=seed)[nvfp4.expert_of_rows(offsets_e.cpu(), columns)[::16].clamp(max=5)][None] if unit == 16 else None
    a = integers(20, columns, scales=by_column(2), format=format)
    b = integers(50, columns, seed=1, scales=by_column(3), format=format)
    cut = lambda q: NVFP4Tensor(q.codes[:, : 9 * unit // 2].contiguous(), q.block_scale[:, :9].contiguous(),
                                q.global_scale[:, :9] if q.global_scale.ndim else q.global_scale, q.block)
    y = gemm.matmul(a, b, offsets_e, torch.bfloat16)
    assert_equal(y, nvfp4.matmul(cut(a), cut(b), offsets_e, torch.bfloat16, impl="torch"))
    assert not y[0].any() and not y[2].any() and not y[5].any()


def test_products_of_nothing_are_zeros():
    """No rows, no weights, no columns."""
    assert gemm.matmul(integers(0, 32), integers(20, 32)).shape == (0, 20)
    assert gemm.matmul(integers(4, 32), integers(0, 32)).shape == (4, 0)
    assert not gemm.matmul(integers(4, 0), integers(20, 0)).any()
    assert gemm.matmul_w4a16(randn(0, 32), integers(20, 32)).shape == (0, 20)
    assert gemm.matmul_w4a16(randn(0, 32), integers(2, 20, 32), ends(0, 0)).shape == (0, 20)


def test_float64_out_is_the_stage_itself():
    a, b = quantize(randn(5, 32)), quantize(randn(7, 32, seed=1))
    assert_equal(gemm.matmul(a, b, None, torch.float64), nvfp4.matmul(a, b, None, torch.float64, impl="torch"))


# ---- 4-bit weights

@pytest.mark.parametrize("r, dtype, format", [(1, torch.bfloat16, "nvfp4"), (16, torch.bfloat16, "mxfp4"), (33, torch.bfloat16, "nvfp4"),
                                              (70, torch.bfloat16, "nvfp4"), (70, torch.bfloat16, "mxfp4"), (1, torch.float16, "nvfp4"),
                                              (70, torch.float16, "nvfp4"), (33, torch.float16, "mxfp4"), (1, torch.float32, "nvfp4"),
                                              (33, torch.float32, "nvfp4"), (20, torch.float32, "mxfp4")])
def test_w4a16_is_no_worse_than_plain(r, dtype, format):
    """Decoding (few rows) and prefill (many): plain PyTorch rounds the weights to x's dtype, the twin rounds only the result."""
    w, x = quantize(randn(70, 288, seed=1), format=format), randn(r, 288, dtype=dtype)
    oracle = x.double() @ w.dequantize(torch.float64).T
    assert_no_worse(gemm.matmul_w4a16(x, w), nvfp4.matmul_w4a16(x, w, impl="torch"), oracle)


@pytest.mark.parametrize("split", [2, 4])
def test_a_cut_contraction_adds_up_and_repeats(split, monkeypatch):
    """Parts that do not divide k, the last one empty or short: 528 columns in parts of 320 or 192."""
    tiles(monkeypatch, split=split, cut=1, BK=64)
    x, w = torch.randint(-8, 9, (3, 528), generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE), integers(40, 528)
    y = gemm.matmul_w4a16(x, w)
    assert_equal(y, (x.double() @ w.dequantize(torch.float64).T).bfloat16())
    assert_equal(gemm.matmul_w4a16(x, w), y)


@pytest.mark.parametrize("r, k, format, split", [(1, 272, "nvfp4", 1), (7, 96, "mxfp4", 1), (3, 528, "nvfp4", 2), (11, 32, "nvfp4", 1)])
def test_warps_that_cut_the_columns_of_a_step_add_up(r, k, format, split, monkeypatch):
    """Four warps, four quarters of each step; the last step is short, in (1, 272) for three of them: catches a quarter that is
    counted twice or never, and quarters of x that meet another warp's weights."""
    for cut in (2, 4):
        tiles(monkeypatch, BN=16, BM=16, BK=64 * cut, cut=cut, split=split, ordered=False)
        x, w = torch.randint(-8, 9, (r, k), generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE), integers(56, k, format=format)
        assert_equal(gemm.matmul_w4a16(x, w), (x.double() @ w.dequantize(torch.float64).T).bfloat16())


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("order, bn", [(1, 32), (4, 64)])
def test_the_order_of_columns_does_not_matter(ordered, order, bn, monkeypatch):
    """x reordered in the product or before it, for either instruction of the tensor cores; 272 columns are no multiple of a step."""
    tiles(monkeypatch, BN=bn, BM=16, BK=64, cut=1, ordered=ordered)
    assert gemm._order(gemm._tiles("whole", 20, 50, 272, 1, torch.bfloat16)) == order
    x, w = torch.randint(-8, 9, (20, 272), generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE), integers(50, 272)
    assert_equal(gemm.matmul_w4a16(x, w), (x.double() @ w.dequantize(torch.float64).T).bfloat16())


def test_every_choice_of_tiles_fits_into_shared_memory():
    """227 KB a block on an H200, counted from above: every stage of the loop, x once more for its second layout, the result on its way out."""
    for kind, e in (("whole", 1), ("rows", 8), ("rows", 512), ("contraction", 512)):
        for r in (1, 2, 8, 9, 16, 17, 33, 64, 65, 100, 1408, 4096, 90112):
            for n in (64, 2048, 8192, 20480):
                for dtype, codes in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False), (torch.float32, False)):
                    t, size = gemm._tiles(kind, r, n, 2048, e, dtype, codes), dtype.itemsize
                    if t.get("dense"): operands, result = 2 * (t["BN"] + t["BM"]) * t["BK"], 2 * t["BN"] * t["BM"]
                    else: operands, result = (9 / 16 * t["BN"] + size * t["BM"]) * t["BK"], 4 * t["BN"] * t["BM"]
                    again = 0 if t.get("dense") else size * t["BM"] * t["BK"] + (size * t["BN"] * t["BK"] if size == 4 else 0)
                    assert t["num_stages"] * operands + max(result, again) + 2048 <= 227 * 1024, (kind, r, n, e, dtype, codes, t)


@pytest.mark.parametrize("routing, dtype", [*((routing, torch.bfloat16) for routing in ROUTINGS), ("mixed", torch.float32)])
def test_w4a16_by_expert(routing, dtype):
    """The decoding step of experts: most have a few rows, some none."""
    x, w, offsets_e = randn(71, 96, dtype=dtype), quantize(randn(6, 40, 96, seed=1)), ends(*ROUTINGS[routing])
    oracle = nvfp4.product(x.double(), w.dequantize(torch.float64), offsets_e)
    assert_no_worse(gemm.matmul_w4a16(x, w, offsets_e), nvfp4.matmul_w4a16(x, w, offsets_e, impl="torch"), oracle)


def test_w4a16_takes_slices_and_leading_dimensions():
    """x as a slice of a wider projection, with [batch, time] in front, and transposed."""
    wide, w = randn(2, 3, 200, dtype=torch.bfloat16), integers(20, 64)
    unaligned = randn(70 * 64 + 7, dtype=torch.bfloat16)[7:].view(70, 64)
    for x in (unaligned, wide[..., 7:71], wide[:, 1:2, ::3][..., :64], randn(64, 9, dtype=torch.bfloat16).T, randn(64, dtype=torch.bfloat16)):
        assert_no_worse(gemm.matmul_w4a16(x, w), nvfp4.matmul_w4a16(x, w, impl="torch"), x.double() @ w.dequantize(torch.float64).T)


def test_w4a16_ignores_what_lies_beyond_a_row():
    """Inf behind the last column of a slice must not meet a masked zero."""
    wide = torch.full((5, 80), torch.inf, device=DEVICE, dtype=torch.bfloat16)
    wide[:, :48] = 1
    w = integers(20, 48)
    assert_equal(gemm.matmul_w4a16(wide[:, :48], w), w.dequantize(torch.float64).sum(1).bfloat16().expand(5, 20))


@pytest.mark.parametrize("grouped", [False, True])
def test_w4a16_is_differentiable_in_x(grouped):
    """dx = dy · w; without a gradient nothing is kept."""
    w = integers(3, 20, 32) if grouped else integers(20, 32)
    offsets_e, dy = (ends(2, 2, 9) if grouped else None), randn(9, 20, seed=2)
    x = randn(9, 32).requires_grad_()
    y = gemm.matmul_w4a16(x, w, offsets_e)
    dx, = torch.autograd.grad(y, x, dy)
    dx_stage, = torch.autograd.grad(nvfp4.matmul_w4a16(x, w, offsets_e, impl="torch"), x, dy)
    torch.testing.assert_close(dx, dx_stage, rtol=1e-6, atol=1e-6)
    with torch.no_grad(): assert gemm.matmul_w4a16(x, w, offsets_e).grad_fn is None


def test_operands_that_do_not_fit_get_a_sentence():
    with pytest.raises(ValueError, match="equal last dimensions"): gemm.matmul(integers(4, 32), integers(4, 48))
    with pytest.raises(ValueError, match="3 experts"): gemm.matmul_w4a16(randn(4, 32), integers(3, 4, 32), ends(2, 4))


# ---- the layer, and Blackwell's product

@pytest.mark.parametrize("grouped", [False, True])
def test_the_linear_layer_trains_through_the_twin(grouped, monkeypatch):
    """NVFP4Linear's three products, forward and backward, all by the twin: equal to the PyTorch path up to the order of sums."""
    w = (randn(4, 48, 64, seed=1) if grouped else randn(48, 64, seed=1)).requires_grad_()
    x, dy, offsets_e = randn(75, 64).requires_grad_(), randn(75, 48, seed=2), (ends(10, 10, 41, 75) if grouped else None)
    calls = []

    def results():
        y = nvfp4.nvfp4_linear(x, w, nvfp4.NVFP4Recipe(), offsets_e, seed=5)
        return y, *torch.autograd.grad(y, (x, w), dy)

    def find_matmul(module, name, impl, tensor):
        if name == "matmul": calls.append(name)
        return gemm.matmul if name == "matmul" else None

    monkeypatch.setattr(nvfp4, "find_twin", lambda module, name, impl, tensor: None)
    stage = results()
    monkeypatch.setattr(nvfp4, "find_twin", find_matmul)
    for name, twin, plain in zip(("y", "dx", "dw"), results(), stage):
        assert (twin - plain).abs().max() <= 2e-6 * plain.abs().max(), name
    assert len(calls) == 3


def test_the_native_product_keeps_the_contract(monkeypatch):
    """The kernel for FP4 tensor cores in the interpreter, which emulates them with powers of two as block scales only, so in MXFP4."""
    if gemm._compiled() or not hasattr(importlib.import_module("triton.runtime.interpreter").InterpreterBuilder, "create_dot_scaled"):
        pytest.skip("this Triton's interpreter has no block-scaled product" if not gemm._compiled() else "needs the interpreter")
    monkeypatch.setattr(gemm, "_native", lambda device: True)
    a, b, experts = (integers(*shape, seed=i, format="mxfp4", scales=powers(*shape[:1])) for i, shape in enumerate(((37, 96), (50, 96), (3, 50, 96))))
    assert_equal(gemm.matmul(a, b), nvfp4.matmul(a, b, impl="torch"))
    assert_equal(gemm.matmul(a, experts, ends(2, 2, 37)), nvfp4.matmul(a, experts, ends(2, 2, 37), impl="torch"))
    assert_equal(gemm.matmul(a, b, ends(32, 32, 96)), nvfp4.matmul(a, b, ends(32, 32, 96), impl="torch"))


# ---- compiling without a GPU

def launches(device, arch):
    """Ultra's shapes: the plain product, the three of its experts, decoding of one token and of a batch of 64 through the experts."""
    def q(*shape, scales=()):
        empty = lambda *size, dtype: torch.empty(*size, dtype=dtype, device=device)
        return NVFP4Tensor(empty(*shape[:-1], shape[-1] // 2, dtype=torch.uint8), empty(*shape[:-1], shape[-1] // 16, dtype=torch.float8_e4m3fn),
                           empty(scales, dtype=torch.float32))
    x = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device=device)
    offsets_e = torch.empty(512, dtype=torch.int32, device=device)
    with pytest.MonkeyPatch.context() as patch:
        if arch >= 100: patch.setattr(gemm, "_native", lambda device: True)
        gemm.matmul(q(8192, 8192), q(8192, 8192), None, torch.bfloat16)
        gemm.matmul(q(90112, 2048, scales=90112), q(512, 5120, 2048, scales=512), offsets_e, torch.bfloat16)
        gemm.matmul(q(5120, 98304, scales=(1, 6144)), q(2048, 98304, scales=(1, 6144)), offsets_e, torch.bfloat16)
    gemm.matmul_w4a16(x(1, 8192), q(20480, 8192))
    gemm.matmul(q(8192, 8192), q(8192, 8192))              # 32-bit results pass through more shared memory
    gemm.matmul_w4a16(x(1408, 2048), q(512, 5120, 2048, scales=512), offsets_e)
    if arch >= 100: gemm.matmul_w4a16(x(4096, 8192), q(20480, 8192))       # there the plain matmul above is native, this one is dense
