"""kernels/cross_entropy.py against the definition of 04_model.py, section 6, in float64: linear_cross_entropy forward and backward."""
import importlib

import pytest
import torch
from kernel_checks import DEVICE, assert_no_worse, randn

model04 = importlib.import_module("04_model")
twin04 = importlib.import_module("kernels.cross_entropy")
linear_cross_entropy = twin04.linear_cross_entropy


def problem(r, v, d, dtype=torch.float32, scale=1.0, learn_share=0.7, seed=0):
    """(h, weight, labels, mask) with logits of standard deviation `scale`; the last label is that of a row nobody learns from."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, v, (r,), generator=g)
    mask = torch.rand(r, generator=g) < learn_share
    mask[0] = True
    if r > 1: labels[-1] = -100
    return randn(r, d, seed=seed, dtype=dtype), randn(v, d, seed=seed + 1, dtype=dtype, scale=scale / d ** 0.5), labels.to(DEVICE), mask.to(DEVICE)


def with_gradients(f, h, w, labels, mask, factor=1.0, frozen=()):
    """[loss, dh, dweight] of f(...) · factor; the names in `frozen` need no gradient."""
    h, w = h.clone().requires_grad_("h" not in frozen), w.clone().requires_grad_("w" not in frozen)
    value = f(h, w, labels, mask)
    (value * factor).backward()
    return [value, h.grad, w.grad]


def definition(h, w, labels, mask):
    return model04.cross_entropy_definition(h.double(), w.double(), labels.clamp(min=0), mask & (labels >= 0))


def plain(h, w, labels, mask):
    return model04.linear_cross_entropy(h, w, labels, mask, impl="torch")


def use_tiles(monkeypatch, **fixed):
    """Fixes launch parameters, so that a small problem has several chunks or several steps a row."""
    usual = twin04._tiles
    monkeypatch.setattr(twin04, "_tiles", lambda r, v, itemsize: usual(r, v, itemsize) | fixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("r, v, d, chunk, block", [(1, 515, 24, 1, 1024), (33, 515, 24, 8, 128), (70, 96, 17, 4, 32), (70, 515, 40, 70, 256)])
def test_loss_and_gradients_are_no_worse_than_plain_pytorch(r, v, d, chunk, block, dtype, monkeypatch):
    """Sizes that no chunk and no step divides. A sum not rescaled to the new maximum, a step or chunk left out, a label one column off, a
    gradient without 1/count or without the incoming 3 breaks it."""
    use_tiles(monkeypatch, chunk=chunk, block=block)
    given = problem(r, v, d, dtype, scale=3.0)
    exact = with_gradients(definition, *given, factor=3.0)
    ours, theirs = (with_gradients(f, *given, factor=3.0) for f in (linear_cross_entropy, plain))
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype and ours[2].dtype == dtype
    for name, *values in zip(("loss", "dh", "dweight"), ours, theirs, exact): assert_no_worse(*values, what=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_are_weighed(dtype, monkeypatch):
    """Weights from 0.01 to 3, some 0, against the definition: a weight left out of loss, gradient or sum, or the next row's, breaks it. Scaled so
    that they sum to less than 1 they mean the same."""
    use_tiles(monkeypatch, chunk=8, block=128)
    h, w, labels, mask = problem(33, 515, 24, dtype, scale=3.0)
    weights = torch.linspace(0.01, 3, 33, device=DEVICE) * mask
    wild = torch.where(mask, labels, 2**40)
    exact = with_gradients(lambda h, w, labels, m: model04.cross_entropy_definition(h.double(), w.double(), labels.clamp(min=0), m), h, w, labels,
                           (weights * (labels >= 0)).double())
    for scale in (1.0, 1e-3):
        ours, theirs = (with_gradients(f, h, w, x, weights * scale) for f, x in ((linear_cross_entropy, wild), (plain, labels)))
        for name, *values in zip(("loss", "dh", "dweight"), ours, theirs, exact):
            if dtype == torch.float64: torch.testing.assert_close(values[0], values[2], rtol=1e-6, atol=1e-8)      # weights are fp32
            else: assert_no_worse(*values, what=name)


def test_float64_stays_float64(monkeypatch):
    use_tiles(monkeypatch, chunk=16, block=128)
    given = problem(33, 515, 24, torch.float64)
    for a, b in zip(with_gradients(linear_cross_entropy, *given, 0.5), with_gradients(definition, *given, 0.5)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_incoming_gradient_is_not_rounded_to_bf16():
    """1.0039 lies between two bf16 numbers: multiplied as a bf16 scalar it would make all gradients 0.4 % too large. With 32 rows that count, an
    incoming 32 shows the stored gradient as it is, and 32 · 1.0039 must give its product in fp32, rounded once."""
    given = problem(32, 515, 24, torch.bfloat16, learn_share=1.0)
    given[2][-1] = 0
    stored, scaled = (with_gradients(linear_cross_entropy, *given, factor=factor, frozen=("w",))[1] for factor in (32.0, 32 * 1.0039))
    assert torch.equal(scaled, (stored.float() * (torch.tensor(32 * 1.0039, device=DEVICE) / 32)).bfloat16())


def test_the_weight_gradient_is_summed_in_fp32(monkeypatch):
    """128 chunks that all add the same: a bf16 sum stops growing as it should once a chunk's share falls below half its last digit."""
    use_tiles(monkeypatch, chunk=1)
    h, w, labels, _ = problem(1, 16, 8, torch.bfloat16)
    given = h.expand(128, 8), w, labels.expand(128), torch.ones(128, dtype=torch.bool, device=DEVICE)
    results = [with_gradients(f, *given)[2] for f in (linear_cross_entropy, plain, definition)]
    assert_no_worse(*results, what="dweight")


@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits_neither_overflow_nor_lose_the_loss(sign, monkeypatch):
    """Logits up to ±1e4 with the largest at the start, in the middle and at the end of the row: exp of any of them alone is inf or 0."""
    use_tiles(monkeypatch, block=32)
    v = 96
    w = torch.eye(v, device=DEVICE)
    h = sign * torch.linspace(-1e4, 1e4, v, device=DEVICE).expand(4, v).clone()
    h[1] = h[1].flip(0); h[2, 40] = 2e4; h[3] = 1e4 + torch.arange(v, device=DEVICE) / 64
    labels = torch.tensor([v - 1, 0, 40, 7], device=DEVICE)
    given = h, w, labels, torch.ones(4, dtype=torch.bool, device=DEVICE)
    exact = with_gradients(definition, *given)
    for name, *values in zip(("loss", "dh", "dweight"), with_gradients(linear_cross_entropy, *given), with_gradients(plain, *given), exact):
        assert torch.isfinite(values[0]).all()
        assert_no_worse(*values, what=name)


def test_masked_rows_give_nothing_and_may_hold_anything():
    """Labels out of range, negative or huge, in rows that do not count; a second row of labels must not be read in their place."""
    h, w, labels, mask = problem(33, 515, 24)
    labels[-1] = 3
    mask[::3] = False
    clean = with_gradients(linear_cross_entropy, h, w, labels, mask)
    wild = labels.clone()
    wild[::3] = torch.tensor([-100, 515, 2**40, -2**62] * 3, device=DEVICE)[:len(wild[::3])]
    for a, b in zip(clean, with_gradients(linear_cross_entropy, h, w, wild, mask)): assert torch.equal(a, b)
    assert clean[1][::3].abs().max() == 0 and (clean[1].abs().amax(1) > 0).sum() == mask.sum()
    by_label = with_gradients(linear_cross_entropy, h, w, torch.where(mask, labels, -1), None)
    for a, b in zip(clean, by_label): assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_learn_gives_zero(rows):
    """All rows masked, or no rows: 0 and gradients of 0, not 0/0 and not what the allocator left."""
    h, w, labels, mask = problem(5, 96, 16)
    value, dh, dw = with_gradients(linear_cross_entropy, h[:rows], w, labels[:rows], torch.zeros_like(mask[:rows]))
    assert value == 0 and dh.abs().sum() == 0 and dw.abs().sum() == 0


def test_a_label_beyond_the_vocabulary_is_loud():
    h, w, labels, mask = problem(5, 96, 16)
    labels[0] = 96
    assert linear_cross_entropy(h, w, labels, mask).isnan()


@pytest.mark.parametrize("frozen", ["h", "w"])
def test_only_the_gradient_that_is_asked_for_is_computed(frozen, monkeypatch):
    """A frozen output layer must not cost a third product and [v, d] of fp32."""
    use_tiles(monkeypatch, chunk=16)
    sums = []
    right = twin04._add_product
    monkeypatch.setattr(twin04, "_add_product", lambda *args, **kwargs: (sums.append(1), right(*args, **kwargs)))
    given = problem(33, 96, 16)
    whole = with_gradients(linear_cross_entropy, *given)
    assert len(sums) == 3
    part = with_gradients(linear_cross_entropy, *given, frozen=(frozen,))
    assert len(sums) == (6 if frozen == "h" else 3)
    for a, b in zip(whole, part): assert b is None or torch.equal(a, b)
    assert (part[1] is None) == (frozen == "h") and (part[2] is None) == (frozen == "w")


def test_without_gradients_the_logits_are_left_alone(monkeypatch):
    """Under no_grad, parameters that require gradients must not cost their products: one product, no second pass, nothing kept."""
    h, w, labels, mask = problem(33, 515, 24)
    w.requires_grad_()
    buffers, right = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: (buffers.append(right(*args, **kwargs)), buffers[-1])[1])
    with torch.no_grad(): value = linear_cross_entropy(h, w, labels, mask)
    assert len(buffers) == 1 and not value.requires_grad
    torch.testing.assert_close(buffers[0], h @ w.detach().T)
    assert torch.equal(value, linear_cross_entropy(h, w, labels, mask).detach())


def test_operands_may_be_slices_and_backward_may_run_twice():
    """Rows and columns cut out of larger tensors, labels and mask with a stride; a saved gradient scaled in place would come out squared."""
    h, w, labels, mask = problem(33, 96, 16)
    wide_h, wide_w = randn(66, 40), randn(96, 40)
    wide_h[::2, 8:24], wide_w[:, 5:21] = h, w
    strided = [labels.repeat_interleave(2)[::2], mask.repeat_interleave(2)[::2]]
    want = with_gradients(linear_cross_entropy, h, w, labels, mask)
    h_, w_ = wide_h.requires_grad_(), wide_w.requires_grad_()
    value = linear_cross_entropy(h_[::2, 8:24], w_[:, 5:21], *strided)
    for _ in range(2):
        dh, dw = torch.autograd.grad(value, (h_, w_), retain_graph=True)
        for a, b in zip((value, dh[::2, 8:24], dw[:, 5:21]), want): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert dh[1::2].abs().max() == 0


@pytest.mark.parametrize("held", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=["fp32", "bf16 hidden states"])
def test_autocast_runs_the_products_in_its_dtype(held, monkeypatch):
    """fp32 master weights: the loss is that of bf16 operands, and the weight's gradient arrives in fp32, not through bf16."""
    use_tiles(monkeypatch, chunk=8)
    h, w, labels, mask = problem(33, 515, 24)
    h, w = h.to(held[0]), w.to(held[1])
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, theirs = (with_gradients(f, h, w, labels, mask) for f in (linear_cross_entropy, plain))
    exact = with_gradients(definition, h.bfloat16(), w.bfloat16(), labels, mask)
    assert ours[1].dtype == held[0] and ours[2].dtype == torch.float32
    for name, *values in zip(("loss", "dh", "dweight"), ours, theirs, exact): assert_no_worse(*values, what=name)
    assert not torch.equal(ours[2], ours[2].bfloat16().float())


def test_the_stage_takes_the_twin():
    h, w, labels, mask = problem(33, 96, 16)
    ours = model04.linear_cross_entropy(h, w, labels, mask, impl="triton")
    torch.testing.assert_close(ours, plain(h, w, labels, mask), rtol=1e-5, atol=1e-6)


def test_operands_that_do_not_fit_are_named():
    h, w, labels, mask = problem(5, 96, 16)
    for bad in ((h[:, :8], w, labels, mask), (h, w, labels[:3], mask), (h, w, labels, mask[:3]), (h[None], w, labels, mask), (h, w[0], labels, mask)):
        with pytest.raises(ValueError, match=r"must be \[r, d\]"): linear_cross_entropy(*bad)


def test_chunks_stay_within_the_buffer_and_cover_all_rows():
    """Ultra 4,096 rows in bf16; never more than 1 GiB of logits, never an almost empty last chunk, never 0 rows."""
    assert twin04._tiles(8192, 131072, 2)["chunk"] == 4096 and twin04._tiles(5000, 131072, 2)["chunk"] == 2560
    assert twin04._tiles(1000, 131072, 2)["chunk"] == 1000 and twin04._tiles(0, 131072, 2)["chunk"] == 1
    for r in (1, 33, 4097, 12345, 90112):
        for v, itemsize in ((515, 4), (131072, 2), (131072, 4), (2**31, 2)):
            chunk = twin04._tiles(r, v, itemsize)["chunk"]
            assert 1 <= chunk <= r and (chunk * v * itemsize <= 2**30 or chunk == 1)


def launches(device, arch):
    """Ultra's output layer: with gradients, loss only, and with fp32 logits."""
    make = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device=device)
    labels, mask = make(4096, dtype=torch.long), make(4096, dtype=torch.bool)
    linear_cross_entropy(make(4096, 8192).requires_grad_(), make(131072, 8192).requires_grad_(), labels, mask).backward()
    linear_cross_entropy(make(4096, 8192), make(131072, 8192), labels, mask)
    linear_cross_entropy(make(4096, 1024, dtype=torch.float32).requires_grad_(), make(131072, 1024, dtype=torch.float32), labels, mask).backward()
