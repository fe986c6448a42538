"""The Triton twins of the norms against 02_mamba.py, forward and backward. In the interpreter without a GPU."""
import importlib

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, assert_no_worse, randn

from kernels import norm as kernel

mamba = importlib.import_module("02_mamba")


@pytest.fixture
def small_tiles(monkeypatch):
    """Several programs, several tiles each, tiles that hang over the end."""
    tiles = lambda width, gated, backward: dict(BLOCK=64, ROWS=2, STEPS=3, STAGES=2, num_warps=1)
    monkeypatch.setattr(kernel, "_tiles", tiles)


def inputs(*shape, dtype=torch.float64, scale=1.0):
    """x or y, z, weight."""
    return [randn(*shape, seed=1, dtype=dtype, scale=scale).requires_grad_(), randn(*shape, seed=2, dtype=dtype).requires_grad_(),
            randn(shape[-1], seed=3, dtype=dtype).requires_grad_()]


def results(module, leaves, groups, dout, **options):
    """Output and gradients of the plain norm (groups None) or the gated one."""
    x, z, weight = leaves
    out = module.rmsnorm(x, weight, 1e-5, **options) if groups is None else module.gated_rmsnorm(x, z, weight, groups, 1e-5, **options)
    return [out, *torch.autograd.grad(out, (x, weight) if groups is None else (x, z, weight), dout)]


def compare(leaves, groups, dout=None):
    """Twin and plain PyTorch against PyTorch in float64, on the same rounded inputs."""
    x = leaves[0]
    if dout is None: dout = randn(*x.shape, seed=4, dtype=x.dtype)
    twin, plain = results(kernel, leaves, groups, dout), results(mamba, leaves, groups, dout, impl="torch")
    exact = results(mamba, [v.detach().double().requires_grad_() for v in leaves], groups, dout.double(), impl="torch")
    for name, a, b, oracle in zip(("out", "dx", "dweight") if groups is None else ("out", "dy", "dz", "dweight"), twin, plain, exact):
        # float64 against float64: sums in another order, relative to the largest value
        if a.dtype == torch.float64: assert (a - oracle).abs().max() <= 1e-13 * oracle.abs().max(), name
        else: assert_no_worse(a, b, oracle, what=name)


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])


@DTYPES
def test_rmsnorm_and_its_gradients_are_pytorchs(dtype, small_tiles):
    """33 wide and 13 tokens: the masked part of a row must not count in the mean, rows behind the last must not count in dweight."""
    compare(inputs(1, 33, dtype=dtype), None)
    compare(inputs(13, 33, dtype=dtype), None)


@DTYPES
def test_gated_rmsnorm_and_its_gradients_are_pytorchs(dtype, small_tiles):
    """Groups of a width that is no power of two. A gate after the norm, or one norm over all groups, is a different function."""
    compare(inputs(13, 3 * 20, dtype=dtype), 3)
    compare(inputs(1, 1, 33, dtype=dtype), 1)


@pytest.mark.parametrize("shape, groups", [((100,), None), ((2, 3, 2100), None), ((2, 17, 48), 2), ((3, 6000), 2)])
def test_the_launch_parameters_in_use_are_right_too(shape, groups):
    """The tests above cut small tiles; these are the real ones, with narrow rows that share a tile and wide ones that do not."""
    compare(inputs(*shape, dtype=torch.float32), groups)
    if len(shape) == 2: compare(inputs(*shape, dtype=torch.bfloat16), groups)


@pytest.mark.parametrize("scale", [0.0, 1e-3])
def test_eps_counts_where_the_input_is_small(scale, small_tiles):
    """Rows of zeros give zeros and finite gradients; at 1e-3 eps = 1e-5 is ten times the mean square, and rounding it to fp32 would show."""
    compare(inputs(5, 40, scale=scale), None)
    compare(inputs(5, 40, scale=scale), 2)


@pytest.mark.parametrize("groups", [None, 2])
def test_slices_are_read_where_they_lie(groups, small_tiles):
    """z is a slice of the projection; the gradient comes transposed, or as one broadcast number from a sum."""
    wide = randn(2, 7, 100, dtype=torch.float64).requires_grad_()
    weight = randn(40, seed=5, dtype=torch.float64).requires_grad_()
    x_of, z_of = lambda: wide[..., 3:43], lambda: wide[..., 45:85]
    for dout in (randn(2, 40, 7, dtype=torch.float64).mT, torch.ones(1, 1, 1, dtype=torch.float64, device=DEVICE).expand(2, 7, 40)):
        both = []
        for module, options in ((kernel, {}), (mamba, dict(impl="torch"))):
            if groups is None: out = module.rmsnorm(x_of(), weight, **options)
            else: out = module.gated_rmsnorm(x_of(), z_of(), weight, groups, **options)
            both.append([out, *torch.autograd.grad(out, (wide, weight), dout)])
        for a, b in zip(*both): assert (a - b).abs().max() < 1e-12
    x_rc = randn(40, 5, dtype=torch.float64).T                      # values of a row far apart: a copy is made
    assert (kernel.rmsnorm(x_rc, weight) - mamba.rmsnorm(x_rc, weight, impl="torch")).abs().max() < 1e-12


def test_weights_in_fp32_multiply_before_the_rounding(small_tiles):
    """bf16 activations, fp32 weight, as under autocast: rounding the normed value first would be a second error."""
    x, z, weight = inputs(6, 40, dtype=torch.bfloat16)
    compare([x, z, randn(40, seed=3).requires_grad_()], None)
    compare([x, z, randn(40, seed=3).requires_grad_()], 2)
    x, weight = randn(32, 64).bfloat16(), randn(64, seed=3)
    normed = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    once, twice = (normed * weight).bfloat16(), (normed.bfloat16() * weight.double()).bfloat16()
    y = kernel.rmsnorm(x, weight).bfloat16()
    assert (y != once).float().mean() < 0.01 < 0.1 < (twice != once).float().mean()


def test_one_hot_rows_by_hand(small_tiles):
    """x = a e_i has rms |a| / sqrt(n), so rmsnorm gives sign(a) sqrt(n) weight_i whatever a is; of the gate only the sign of silu(z) is left."""
    n, weight = 16, randn(16, seed=6, dtype=torch.float64)
    x = 1e7 * torch.eye(n, dtype=torch.float64, device=DEVICE)
    assert (kernel.rmsnorm(x, weight) - 4 * torch.diag(weight)).abs().max() < 1e-9
    z = randn(n, n, dtype=torch.float64)
    assert (kernel.gated_rmsnorm(x, z, weight, 4) - 2 * torch.diag(weight * F.silu(z.diagonal()).sign())).abs().max() < 1e-9


def test_empty_batches_are_answered():
    x, z, weight = inputs(0, 4, 40)
    for out in (kernel.rmsnorm(x, weight), kernel.gated_rmsnorm(x, z, weight, 2)):
        assert out.shape == (0, 4, 40)
        assert torch.autograd.grad(out.sum(), weight)[0].abs().sum() == 0


def test_nothing_is_kept_when_no_gradient_is_asked(monkeypatch):
    """Under no_grad the inverse root mean squares are neither allocated nor stored, although the weight is a parameter."""
    saved, launch = [], kernel._forward
    class Spy:
        def __getitem__(self, grid): return lambda *args, **known: (saved.append((args[4], known["SAVE"])), launch[grid](*args, **known))
    monkeypatch.setattr(kernel, "_forward", Spy())
    x, z, weight = inputs(3, 40)
    with torch.no_grad(): kernel.rmsnorm(x, weight), kernel.gated_rmsnorm(x, z, weight, 2)
    kernel.rmsnorm(x.detach(), weight.detach())
    assert saved == [(None, False)] * 3
    kernel.rmsnorm(x.detach(), weight)
    assert saved[-1][1] and saved[-1][0].shape == (3, 1)


def test_two_runs_give_the_same_bits(small_tiles):
    """dweight is a sum over all tokens; partial sums are added in a fixed order, atomic additions would not be."""
    leaves, dout = inputs(13, 40, dtype=torch.bfloat16), randn(13, 40, seed=4, dtype=torch.bfloat16)
    for groups in (None, 2):
        for a, b in zip(results(kernel, leaves, groups, dout), results(kernel, leaves, groups, dout)): assert torch.equal(a, b)


@DTYPES
def test_add_rmsnorm_norms_the_sum_that_it_stores(dtype, small_tiles):
    """The norm of an unrounded sum would be another model's; slices of a projection, and a last tile that hangs over."""
    wide, y, weight = (v.detach() for v in inputs(13, 70, dtype=dtype))
    x, y, weight = wide[:, 3:36], y[:, :33], weight[:33]
    (total, out), (total_plain, plain) = kernel.add_rmsnorm(x, y, weight), mamba.add_rmsnorm(x, y, weight, impl="torch")
    assert torch.equal(total, x + y) and torch.equal(total, total_plain) and torch.equal(out, kernel.rmsnorm(total, weight))
    u = (x + y).double()
    exact = u / (u.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    if dtype == torch.float64: torch.testing.assert_close(out, exact, rtol=1e-13, atol=0)
    else: assert_no_worse(out, plain, exact)
    with pytest.raises(ValueError, match="alike"): kernel.add_rmsnorm(x, y[:1], weight)


def test_the_stage_finds_the_twins():
    x, z, weight = inputs(3, 40, dtype=torch.float32)
    for a, b in zip(mamba.add_rmsnorm(x, z, weight, impl="triton"), kernel.add_rmsnorm(x, z, weight)): assert torch.equal(a, b)
    assert torch.equal(mamba.rmsnorm(x, weight, impl="triton"), kernel.rmsnorm(x, weight))
    assert torch.equal(mamba.gated_rmsnorm(x, z, weight, 2, impl="triton"), kernel.gated_rmsnorm(x, z, weight, 2))


def test_wrong_shapes_are_told():
    x, z, weight = (v.detach() for v in inputs(3, 40))
    with pytest.raises(ValueError, match="weight"): kernel.rmsnorm(x, weight[:39])
    with pytest.raises(ValueError, match="weight"): kernel.gated_rmsnorm(x, z, weight[:1], 2)
    with pytest.raises(ValueError, match="3 groups"): kernel.gated_rmsnorm(x, z, weight, 3)
    with pytest.raises(ValueError, match="one shape"): kernel.gated_rmsnorm(x, z[:1], weight, 2)


def launches(device, arch):
    """Ultra's shapes: the norm before a layer, and Mamba's output norm with z a slice of the projection."""
    empty = lambda *size: torch.empty(*size, dtype=torch.bfloat16, device=device, requires_grad=True)
    x, weight = empty(1, 8192, 8192), empty(8192)
    torch.autograd.grad(kernel.rmsnorm(x, weight), (x, weight), x)
    y, projected, weight = empty(1, 8192, 16384), empty(1, 8192, 16384 + 18432 + 256), empty(16384)
    torch.autograd.grad(kernel.gated_rmsnorm(y, projected[..., :16384], weight, 8), (y, projected, weight), y)
    kernel.add_rmsnorm(x[0, :32], x[0, :32], torch.empty(8192, device=device))
