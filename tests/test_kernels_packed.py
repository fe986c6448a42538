"""kernels/packed.py: decoding with E4M3 linears and 4-bit experts. Weights are decoded and inputs rounded exactly, so against float64 on the decoded
numbers only fp32 sums and one rounding of the result are left, and `assert_summed` allows no more."""
import importlib

import pytest
import torch
from kernel_checks import DEVICE, randn

nvfp4, moe = (importlib.import_module(name) for name in ("01_nvfp4", "03_latentmoe"))
experts, packed = (importlib.import_module(name) for name in ("kernels.experts", "kernels.packed"))
STEP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}      # relative error of rounding to nearest


@pytest.fixture(autouse=True)
def serving():
    with torch.no_grad(): yield


def scalar(value): return torch.tensor(float(value), device=DEVICE)


def e4m3(*shape, seed=0, scale=60.0):
    """Weights on all of E4M3's range, with subnormal numbers, zeros and ±448."""
    x = randn(*shape, seed=seed) * scale
    return torch.where(randn(*shape, seed=seed + 1) < -1, x * 2.0**-15, x).clamp(-448, 448).to(torch.float8_e4m3fn)


def rounded(x_ri, input_scale):
    """float64 by stage 01's rounding, on the CPU."""
    return nvfp4.e4m3(x_ri.cpu().float() / input_scale.cpu()).double()


def assert_summed(y, oracle, magnitude, k, inner=0.0):
    """fp32 sums of k exact products in any order, two scales, one rounding to y's dtype; magnitude: sum of |products|, inner: what the inputs
    of the sum may be off. fp16 has subnormal numbers, hence the last term."""
    bound = (k + 4) * 2.0**-24 * magnitude + inner + STEP[y.dtype] * oracle.abs() * 1.01 + (2.0**-24 if y.dtype == torch.float16 else 1e-38)
    gap = (y.double().cpu() - oracle).abs()
    assert (gap <= bound).all(), f"{(gap / bound).max():.1f} times the bound"


def tiles(monkeypatch, **changes):
    """Other launch parameters: the same code on tiles that small tests can cross."""
    real = packed._tiles
    monkeypatch.setattr(packed, "_tiles", lambda kind, *sizes: {**(t := real(kind, *sizes)), **{name: v for name, v in changes.items() if name in t}})


def count_launches(monkeypatch):
    """A list that collects the names of the kernels that are launched."""
    names, function = [], type(packed._row_kernel)
    run = function.run

    def note(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)
    monkeypatch.setattr(function, "run", note)
    return names


# ---- E4M3

@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0731, 3.3e-5, 1713.0])
def test_inputs_are_rounded_bit_by_bit_as_the_stage_rounds_them(scale):
    """Quotients, ties between neighbours, numbers beyond 448, subnormal ones, zeros, infinities: catches division by a rounded reciprocal, ties away
    from zero, and a cut that forgets the sign."""
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = torch.cat([grid, (grid[1:] + grid[:-1]) / 2, torch.tensor([449.0, 464, 465, 1e9, torch.inf])])
    near = torch.cat([ties, ties * (1 + 2.0**-23), ties * (1 - 2.0**-23)]) * scale
    x = torch.cat([near, -near, randn(4000).cpu() * 200 * scale, randn(500, seed=1).cpu() * 0.01 * scale]).to(DEVICE)
    codes = torch.empty(len(x), dtype=torch.float16, device=DEVICE)
    packed._round_kernel[(9,)](codes, x, scalar(scale), len(x), BLOCK=1024)
    assert torch.equal(codes.double().cpu(), rounded(x, scalar(scale)))


def test_every_e4m3_byte_is_widened_exactly():
    """Row n of the weights is byte n, NaN included, and x is 1: a decoder that loses subnormal numbers or reads NaN as 480 shows."""
    w = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)[:, None]
    for r in (1, 3):
        y = packed.fp8_linear(torch.ones(r, 1, device=DEVICE), w, scalar(1), scalar(1), torch.float32)
        assert torch.equal(y.nan_to_num(777), w.float().T.expand(r, 256).nan_to_num(777))


@pytest.mark.parametrize("r, n, k, dtype", [(1, 37, 100, torch.bfloat16), (1, 8, 2064, torch.float16), (1, 70, 33, torch.float32),
                                            (2, 37, 4128, torch.bfloat16), (6, 70, 100, torch.float16), (17, 33, 272, torch.bfloat16),
                                            (33, 65, 129, torch.float32), (64, 40, 144, torch.bfloat16)])
def test_fp8_linear_is_its_fp32_sum_rounded_once(r, n, k, dtype):
    """Odd sizes of all three, scales that are no powers of two: catches a mask, a scale that is applied twice or not, a sum in 16 bits."""
    x, w, input_scale, weight_scale = randn(r, k, dtype=dtype, scale=3), e4m3(n, k, seed=1), scalar(0.0073), scalar(0.00291)
    y = packed.fp8_linear(x, w, input_scale, weight_scale, dtype)
    codes, weights, scale = rounded(x, input_scale), w.double().cpu(), 0.0073 * 0.00291
    assert y.shape == (r, n) and y.dtype == dtype and codes.abs().max() == 448
    assert_summed(y, codes @ weights.T * scale, codes.abs() @ weights.abs().T * scale, k)


@pytest.mark.parametrize("r, split, k", [(1, 1, 528), (3, 2, 528), (20, 4, 144), (3, 4, 64)])
def test_tiles_of_columns_add_up(r, split, k, monkeypatch):
    """Steps of 64 columns that do not divide k, parts that are short or empty; sums that fp32 holds exactly are equal bit by bit."""
    tiles(monkeypatch, BK=64, BN=16, SPLIT=split)
    draw = lambda *shape, seed: torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float().to(DEVICE)
    x, w = draw(r, k, seed=0), draw(37, k, seed=1)
    y = packed.fp8_linear(x * 0.5, w.to(torch.float8_e4m3fn), scalar(0.5), scalar(0.25), torch.float32)
    assert torch.equal(y, (x.double() @ w.double().T * 0.125).float())


@pytest.mark.parametrize("r", [1, 5])
def test_a_spoilt_row_stays_spoilt_and_alone(r):
    """NaN must come out as NaN: clamping would make 448 of it. Infinity saturates; a row of zeros gives zeros."""
    for value, expected in ((torch.nan, torch.nan), (torch.inf, 448.0), (-torch.inf, -448.0), (0.0, 0.0)):
        x = torch.zeros(r, 40, device=DEVICE, dtype=torch.bfloat16)
        x[r - 1, 7] = value
        y = packed.fp8_linear(x, torch.ones(20, 40, device=DEVICE).to(torch.float8_e4m3fn), scalar(0.5), scalar(2), torch.float32)
        assert torch.equal(y[r - 1].nan_to_num(777), torch.full((20,), expected, device=DEVICE).nan_to_num(777)) and not y[:r - 1].any()


def test_fp8_products_of_nothing_are_zeros():
    for r, n, k in ((0, 20, 32), (4, 0, 32), (4, 20, 0)):
        y = packed.fp8_linear(randn(r, k), e4m3(n, k), scalar(1), scalar(1), torch.bfloat16)
        assert y.shape == (r, n) and not y.any()


def test_what_lies_beyond_a_row_is_ignored():
    """x as a slice of a wider projection with NaN behind it, and rows of a transposed tensor."""
    wide, w = torch.full((5, 80), torch.nan, device=DEVICE), e4m3(20, 48, scale=1.0)
    wide[:, 7:55] = randn(5, 48)
    x = wide[:, 7:55]
    for r in (1, 5):
        y = packed.fp8_linear(x[:r], w, scalar(0.01), scalar(1), torch.float32)
        assert torch.equal(y, packed.fp8_linear(x[:r].T.contiguous().T, w, scalar(0.01), scalar(1), torch.float32)) and y.isfinite().all()


def test_a_packed_linear_takes_the_kernel_for_few_rows_without_a_gradient(monkeypatch):
    """Packed is what the model holds: 64 rows by the twin in one launch a row or few, 65 and training by PyTorch, and all the same numbers."""
    layer = moe.Packed((24, 48), "fp8").to(DEVICE)
    layer.weight.copy_(e4m3(24, 48, seed=3)); layer.weight_scale.fill_(0.0021); layer.input_scale.fill_(0.013)
    x, calls = randn(65, 48, dtype=torch.bfloat16), []

    def find(module, name, impl, tensor):
        calls.append((module, name))
        return packed.fp8_linear if name == "fp8_linear" else None
    plain = layer(x) if DEVICE == "cpu" else None
    monkeypatch.setattr(nvfp4, "find_twin", find)
    results = [layer(x), layer(x[:64]), layer(x[:1, None])]
    assert calls == [("packed", "fp8_linear")] * 2 and results[2].shape == (1, 1, 24)
    with torch.enable_grad(): layer(x[:1])
    assert len(calls) == 2
    if plain is None: plain = results[0]
    for y in results[1:]: torch.testing.assert_close(y.flatten(0, -2), plain[:y.numel() // 24], rtol=2.0**-6, atol=1e-3)


# ---- 4-bit experts

def stack(e, n, k, seed=0, by_expert=False):
    """NVFP4Tensor [e, n, k] of Gaussians, with one global scale or one an expert."""
    w = randn(e, n, k, seed=seed, scale=k**-0.5)
    if by_expert: w *= torch.linspace(0.3, 3, e, device=DEVICE)[:, None, None]
    return nvfp4.quantize(w, amax=w.abs().amax((1, 2)) if by_expert else None)


def choices(r, e, k, seed=0):
    """(weights_rk, experts_rk): k different experts a token, in any order."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(e, generator=generator)[:k] for _ in range(r)]).view(r, k)
    return torch.rand(r, k, generator=generator).to(DEVICE) + 0.1, chosen.to(DEVICE)


def test_every_code_times_every_scale_is_decoded_exactly():
    """All 16 codes under all positive scales, one column of x at a time, so that no other code can make up for a wrong one."""
    block_scale = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)[None, :, None]
    for turn in (0, 5):
        codes = nvfp4.pack(((torch.arange(16) + turn) % 16).to(torch.uint8).expand(1, 127, 16))
        w = nvfp4.NVFP4Tensor(codes.to(DEVICE).contiguous(), block_scale.to(DEVICE), scalar(0.3), (1, 16))
        one = torch.zeros(16, dtype=torch.int64, device=DEVICE)
        y_qn = packed._pairs_product(torch.eye(16, device=DEVICE), w, one, 1, False, torch.float32)
        assert torch.equal(y_qn, w.dequantize(torch.float32)[0].T)


@pytest.mark.parametrize("r, e, k, l, f, dtype, by_expert", [
    (1, 12, 6, 48, 80, torch.bfloat16, False), (2, 24, 5, 272, 32, torch.bfloat16, True), (3, 30, 5, 32, 272, torch.float16, True),
    (5, 40, 4, 16, 16, torch.float32, False), (2, 9, 2, 128, 64, torch.float32, True), (33, 140, 2, 48, 32, torch.bfloat16, True)])
def test_experts_by_pair_are_the_weighted_sum(r, e, k, l, f, dtype, by_expert, monkeypatch):
    """Odd sizes, several steps of columns in either product, global scales by expert, experts that several tokens chose: against float64 on decoded
    weights. The hidden rows are rounded once between the products."""
    if max(l, f) > 100: tiles(monkeypatch, BK=64)
    up, down, x, (weights, chosen) = stack(e, f, l, 1, by_expert), stack(e, l, f, 2, by_expert), randn(r, l, dtype=dtype), choices(r, e, k)
    assert r < 5 or len(chosen.unique()) < chosen.numel()
    y = packed._experts_by_pair(x, weights, chosen, up, down)
    assert y.dtype == dtype and y.shape == (r, l)
    wide_x, wide_up, wide_down, p = x.double().cpu(), up.dequantize(torch.float64).cpu(), down.dequantize(torch.float64).cpu(), weights.double().cpu()
    for i in range(r):
        oracle, magnitude, inner = (torch.zeros(l, dtype=torch.float64) for _ in range(3))
        for slot, expert in enumerate(chosen[i].tolist()):
            h = (wide_up[expert] @ wide_x[i]).clamp(min=0)
            off = (l + 4) * 2.0**-24 * (wide_up[expert].abs() @ wide_x[i].abs())          # of the first sum; squared, twice of it and its own square
            off = 2 * h * off + off**2 + STEP[dtype] * 1.01 * (h + off)**2 + (2.0**-24 if dtype == torch.float16 else 0)
            oracle += p[i, slot] * (wide_down[expert] @ h**2)
            magnitude += p[i, slot] * (wide_down[expert].abs() @ h**2)
            inner += p[i, slot] * (wide_down[expert].abs() @ off)
        assert_summed(y[i], oracle, magnitude, f + k, inner)


def test_a_token_that_is_not_a_number_spoils_itself_only():
    """relu² of NaN is NaN, not 0; the other token shares an expert with the spoilt one."""
    up, down, x = stack(8, 32, 48, 1), stack(8, 48, 32, 2), randn(2, 48, dtype=torch.bfloat16)
    weights, chosen = torch.ones(2, 2, device=DEVICE), torch.tensor([[3, 0], [5, 3]], device=DEVICE)
    x[0, 5] = torch.nan
    y = packed._experts_by_pair(x, weights, chosen, up, down)
    assert y[0].isnan().all() and y[1].isfinite().all()


def test_few_pairs_go_one_by_one_and_many_are_sorted(monkeypatch):
    """The border at half as many pairs as experts, from both sides; blocks of 32 and scales by row stay with the sorted rows. A token costs three
    launches, and either way gives the same numbers."""
    up, down, names = stack(8, 32, 48, 1), stack(8, 48, 32, 2), count_launches(monkeypatch)
    for r, by_pair in ((1, True), (2, True), (3, False)):
        (weights, chosen), x = choices(r, 8, 2, seed=r), randn(r, 48, dtype=torch.bfloat16)
        names.clear()
        y = experts.experts_grouped(x, weights, chosen, up, down)
        assert names == ["_pairs_kernel", "_pairs_kernel", "_combine_kernel"] if by_pair else names[0] == "_sort_kernel"
        with monkeypatch.context() as patch:
            patch.setattr(experts, "_few_pairs", lambda *_, other=not by_pair: other)
            torch.testing.assert_close(y, experts.experts_grouped(x, weights, chosen, up, down), rtol=2.0**-6, atol=2.0**-7 * y.abs().max().item())
    blocks = nvfp4.quantize(randn(8, 32, 64), format="mxfp4")
    rows = nvfp4.NVFP4Tensor(up.codes, up.block_scale, torch.ones(8, 32, 1, device=DEVICE), up.block)
    for other in (blocks, rows): assert not packed._few_pairs(2, other, down) and not packed._few_pairs(2, up, other)
    assert packed._few_pairs(4, up, down) and not packed._few_pairs(5, up, down) and not packed._few_pairs(0, up, down)
    assert packed._few_pairs(4, stack(8, 32, 16, by_expert=True), stack(8, 16, 32, by_expert=True))      # one block a row: its stride says nothing


def test_one_row_of_an_e4m3_linear_is_one_launch(monkeypatch):
    """PyTorch takes ten; and rounding x apart would be a second one."""
    names = count_launches(monkeypatch)
    packed.fp8_linear(randn(1, 32, dtype=torch.bfloat16), e4m3(20, 32), scalar(1), scalar(1), torch.bfloat16)
    assert names == ["_row_kernel"]


# --- what is compiled without a GPU

def launches(device, arch):
    """Super's widest and narrowest E4M3 linears and its experts, one token and six; 32 and 64 tokens through the linears."""
    def q(e, n, k):
        empty = lambda *size, dtype: torch.empty(*size, dtype=dtype, device=device)
        return nvfp4.NVFP4Tensor(empty(e, n, k // 2, dtype=torch.uint8), empty(e, n, k // 16, dtype=torch.float8_e4m3fn),
                                 empty(e, dtype=torch.float32))
    x = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device=device)
    scale = torch.empty((), device=device)
    for n, k in ((18560, 4096), (4096, 5376)):
        for r in (1, 6, 32, 64): packed.fp8_linear(x(r, k), x(n, k, dtype=torch.float8_e4m3fn), scale, scale, torch.bfloat16)
    stacks = q(512, 2688, 1024), q(512, 1024, 2688)
    for r in (1, 6): packed._experts_by_pair(x(r, 1024), x(r, 22, dtype=torch.float32), x(r, 22, dtype=torch.int64), *stacks)
