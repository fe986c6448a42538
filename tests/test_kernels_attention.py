"""kernels/attention.py against the dense mask of stage 04: the blocks by counting, the values on a CPU unfused, forward and backward on a GPU.
The decode step over cells against sums written out in float64."""
import importlib
import types

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, assert_no_worse, randn
from torch.nn.attention.flex_attention import flex_attention

model04, infer, twin = (importlib.import_module(name) for name in ("04_model", "08_infer", "kernels.attention"))
SIZES = [(300, 300), (256, 512), (700, 700), (128, 1000), (130, 387), (7, 900), (1, 1)]      # t, s


def documents(s, rate=0.01, padding=True):
    """Two rows of documents of random length; the first has padding in its middle, where a whole block may be of it."""
    doc_bs = (torch.rand(2, s, generator=torch.Generator().manual_seed(s)) < rate).long().cumsum(1)
    if padding: doc_bs[0, s // 3:s // 3 + s // 4] = -1
    return doc_bs


@pytest.mark.parametrize("t, s", SIZES)
def test_the_blocks_are_those_in_which_somebody_sees_something(t, s):
    """Without padding exactly these: one too few loses keys, one too many is work. Padding may only add blocks."""
    for padding in (False, True):
        doc_bs = documents(s, padding=padding)
        dense = model04.attention_mask(doc_bs, t, impl="torch")[:, 0]
        listed = twin.attention_mask(doc_bs, t).to_dense()[:, 0].bool()
        rows, columns = listed.shape[1:]
        whole = F.pad(dense, (0, columns * twin.BLOCK - s, 0, rows * twin.BLOCK - t)).view(2, rows, twin.BLOCK, columns, twin.BLOCK)
        seen = whole.any(4).any(2)
        assert not (seen & ~listed).any()
        if not padding: assert torch.equal(seen, listed)


def test_a_document_of_its_own_in_every_block_leaves_the_diagonal():
    """Written by hand: documents of 128 tokens, then one document of 512."""
    assert torch.equal(twin.attention_mask(torch.arange(512)[None] // 128, 512).to_dense()[0, 0].bool(), torch.eye(4, dtype=torch.bool))
    assert torch.equal(twin.attention_mask(torch.zeros(1, 512).long(), 512).to_dense()[0, 0].bool(), torch.ones(4, 4).tril().bool())


def inputs(t, s, p=16, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, n, p, generator=g).to(device, dtype) for h, n in ((4, t), (2, s), (2, s))]


def dense_answer(q, k, v, doc_bs, t):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=model04.attention_mask(doc_bs, t, impl="torch"), enable_gqa=True)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("t, s", SIZES)
def test_the_rule_inside_the_blocks_is_the_dense_mask(t, s):
    """flex_attention unfused: a query counted from 0 instead of s - t, or padding that is seen, changes the values."""
    doc_bs = documents(s)
    q, k, v = inputs(t, s)
    ours = flex_attention(q, k, v, block_mask=twin.attention_mask(doc_bs, t), enable_gqa=True)
    torch.testing.assert_close(ours, dense_answer(q, k, v, doc_bs, t), rtol=1e-5, atol=1e-5)


def test_stage_04_takes_blocks_only_for_long_sequences_on_a_gpu(monkeypatch):
    """Below LONG, and on a CPU, the mask is a tensor; above, with the twin forced, it is the twin's, and Attention hands it to the twin."""
    doc_bs = documents(300)
    assert isinstance(model04.attention_mask(doc_bs, 300), torch.Tensor)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert isinstance(model04.attention_mask(doc_bs, 300, impl="triton"), torch.Tensor)
    monkeypatch.setattr(model04, "LONG", 300 * 300 - 1)
    assert isinstance(model04.attention_mask(doc_bs, 300), torch.Tensor)
    assert isinstance(model04.attention_mask(doc_bs, 300, impl="triton"), twin.BlockMask)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("t, s", [(300, 300), (256, 512), (130, 387)])
def test_forward_and_backward_on_a_gpu_are_no_worse_than_the_dense_mask(t, s, dtype):
    """Against float64: values and all three gradients, for documents with padding and queries behind keys."""
    torch.backends.cuda.matmul.allow_tf32 = False
    doc_bs = documents(s).cuda()
    dy, results = torch.randn(2, 4, t, 64, generator=torch.Generator().manual_seed(1)).cuda(), []
    dense = lambda q, k, v: dense_answer(q, k, v, doc_bs, t)
    for wide, run in ((dtype, lambda q, k, v: twin.attend(q, k, v, twin.attention_mask(doc_bs, t))), (dtype, dense), (torch.float64, dense)):
        tensors = [x.to(dtype).to(wide).requires_grad_() for x in inputs(t, s, 64, torch.float64, "cuda")]
        y = run(*tensors)
        results.append([x.detach().double() for x in (y, *torch.autograd.grad(y, tensors, dy.to(y.dtype)))])
    for ours, plain, exact in zip(*results):
        assert (ours - exact).norm() <= 2 * (plain - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_step_with_blocks_equals_the_step_with_a_dense_mask(monkeypatch):
    """tiny on a GPU, 300 tokens of several documents with LONG lowered: loss and gradients of all parameters, also when recorded as a CUDA graph."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    model = model04.Nemotron(model04.PRESETS["tiny"]).cuda()
    ids_bt, doc_bs = torch.randint(12, 4096, (2, 301), device="cuda"), documents(300, padding=False).cuda()

    def step():
        losses = model04.loss(model, ids_bt[:, :-1], ids_bt[:, 1:], doc_bs)
        losses.total.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        for p in model.parameters(): p.grad = None
        return losses.total.detach(), grads

    plain = step()
    monkeypatch.setattr(model04, "LONG", 0)
    blocks = [step() for _ in range(3)][-1]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): recorded = step()
    graph.replay()
    for total, grads in (blocks, recorded):
        assert total.item() == pytest.approx(plain[0].item(), rel=1e-5)
        assert F.cosine_similarity(grads, plain[1], dim=0) > 1 - 1e-5


# ---- a decode step over cells

def cells_pass(turn, pool, slots, starts, counts, t, h, dtype, seen):
    """(q, k, v, rows) of one pass; q, k and v are slices of one projection."""
    heads, p = pool.k_bhsp.shape[1], pool.k_bhsp.shape[3]
    q, k, v = randn(len(slots), t, h + 2 * heads, p, seed=turn, dtype=dtype, scale=2.0).split([h, heads, heads], 2)
    slot, start, count = (torch.tensor(z, device=DEVICE) for z in (slots, starts, counts))
    real = torch.arange(t, device=DEVICE) < count[:, None]
    at = torch.where(real, start[:, None] + torch.arange(t, device=DEVICE), pool.k_bhsp.shape[2] - 1)      # what is no token: the last cell
    return q, k, v, types.SimpleNamespace(slot_r=slot, start_r=start, count_r=count, real_rt=real, at_rt=at, seen=seen, every=False)


def written_out(q, pool, rows):
    """Token by token in float64: softmax over the cells up to its own of its slot, heads of a group on one key head; [r, t, h, p], 0 for no token."""
    values = lambda z, scale: (z.view(torch.float8_e4m3fn).float() if z.dtype == torch.uint8 else z).double() * scale
    k_bhsp, v_bhsp, y = values(pool.k_bhsp, pool.k_scale), values(pool.v_bhsp, pool.v_scale), torch.zeros(q.shape, dtype=torch.float64)
    for r, (slot, start, count) in enumerate(zip(rows.slot_r.tolist(), rows.start_r.tolist(), rows.count_r.tolist())):
        for i in range(count):
            for head in range(q.shape[2]):
                at = slot, head // (q.shape[2] // k_bhsp.shape[1]), slice(0, start + i + 1)
                chance_s = torch.softmax(k_bhsp[at] @ q[r, i, head].double() / q.shape[3] ** 0.5, 0)
                y[r, i, head] = (chance_s @ v_bhsp[at]).cpu()
    return y


CASES = {       # slots and rows' (slot, start, count); cells, heads, key heads, width, tokens a row
    "one token": (3, [(2, 200, 1), (0, 0, 1)], 260, 4, 2, 16, 1),
    "odd sizes, a window, none": (4, [(1, 129, 4), (3, 64, 0), (0, 63, 2)], 140, 6, 2, 11, 4),
    "no slot has a token": (2, [(0, 5, 0), (1, 70, 0)], 100, 2, 1, 8, 2),
    "a chunk over several blocks of queries": (2, [(1, 60, 37), (0, 0, 40)], 130, 8, 2, 16, 40),
}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_new_tokens_read_their_slots_cells(case, splits, stored, monkeypatch):
    """Cells behind the length hold large numbers, as rejected drafts might; a cell one too far, a stretch that is lost or read twice, another slot's
    or head's cells, a query's head in another group, or a scale forgotten, show. What is not there is 0 and writes nothing."""
    b, where, cells, h, heads, p, t = CASES[case]
    dtype = torch.float32 if stored == torch.float32 else torch.bfloat16
    monkeypatch.setattr(twin, "_splits", lambda programs, cells, block: splits)
    ours, plain = (infer.KVPool(b, heads, cells, p, stored, DEVICE) for _ in range(2))
    fill = randn(2, b, heads, cells, p, seed=50, scale=3.0)
    for pool in (ours, plain):
        for z, x in zip((pool.k_bhsp, pool.v_bhsp), fill):
            z.copy_(x.to(stored).view(torch.uint8) if stored == torch.float8_e4m3fn else x)
        if stored == torch.float8_e4m3fn: pool.k_scale, pool.v_scale = 0.5, torch.tensor(2.0, device=DEVICE)
    if splits == 1: ours.k_scale, ours.v_scale = (torch.tensor(float(z), device=DEVICE) for z in (ours.k_scale, ours.v_scale))      # in memory
    q, k, v, rows = cells_pass(1, ours, *map(list, zip(*where)), t, h, dtype, cells - 1)
    y, y_plain = ours.attend_cells(q, k, v, rows, impl="triton"), plain.attend_cells(q, k, v, rows, impl="torch")
    for a, c in ((ours.k_bhsp, plain.k_bhsp), (ours.v_bhsp, plain.v_bhsp)): assert torch.equal(a[:, :, :-1], c[:, :, :-1])
    exact = written_out(q, ours, rows)
    assert y.isfinite().all() and not y[~rows.real_rt].any()
    if rows.real_rt.any(): assert_no_worse(y[rows.real_rt], y_plain[rows.real_rt], exact[rows.real_rt.cpu()])


@pytest.mark.parametrize("splits", [1, 4])
def test_a_broken_query_stays_broken(splits, monkeypatch):
    """NaN in one head's query: that head's answer is NaN and no other's. An answer of zeros would hide a broken model."""
    monkeypatch.setattr(twin, "_splits", lambda programs, cells, block: splits)
    pool = infer.KVPool(2, 2, 300, 16, torch.float32, DEVICE)
    q, k, v, rows = cells_pass(1, pool, [1, 0], [200, 3], [1, 1], 1, 4, torch.float32, 299)
    q[0, 0, 2, 5] = float("nan")
    y = pool.attend_cells(q, k, v, rows, impl="triton")
    assert y[0, 0, 2].isnan().all() and y.isnan().sum() == 16


@pytest.mark.filterwarnings("ignore::RuntimeWarning")       # the interpreter's NumPy tells of 3e38 / 0.3
def test_keys_are_rounded_to_fp8_as_the_stage_rounds_them():
    """Every bf16 number within range and beyond: ties, subnormal numbers, the cut at 448, both signs, NaN; the scale is no power of two.
    PITFALL: PyTorch on a GPU multiplies by the reciprocal of a Python number, which rounds twice and moves two of these codes. A checkpoint's scale
    lies in memory, and then it divides."""
    x = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16).to(DEVICE)
    x = torch.where(x.isinf(), 1.0, x).view(64, 1, 16, 64)      # [r, t, heads, p]
    pools = [infer.KVPool(64, 16, 2, 64, torch.float8_e4m3fn, DEVICE) for _ in range(2)]
    for pool, impl in zip(pools, ("triton", "torch")):
        pool.k_scale = pool.v_scale = torch.tensor(0.3, device=DEVICE) if impl == "torch" else 0.3
        *_, rows = cells_pass(1, pool, list(range(64)), [0] * 64, [1] * 64, 1, 16, torch.bfloat16, 1)
        pool.attend_cells(torch.zeros_like(x), x, -x, rows, impl=impl)
    for ours, plain in ((pools[0].k_bhsp, pools[1].k_bhsp), (pools[0].v_bhsp, pools[1].v_bhsp)):
        ours, plain = (z[:, :, 0].contiguous().view(torch.float8_e4m3fn).float() for z in (ours, plain))
        assert torch.equal(ours.isnan(), plain.isnan()) and torch.equal(ours.nan_to_num(), plain.nan_to_num())


def test_stretches_fill_the_gpu_and_never_outnumber_the_blocks():
    """A power of two each: Super alone in a cache of 32,768 cells, 32 requests, a large batch, a cache of one block."""
    assert [twin._splits(*z, 64) for z in ((2, 32_768), (64, 4096), (1024, 4096), (2, 50), (2, 200))] == [64, 4, 1, 1, 4]


def launches(device, arch):
    """Super: one request, 32 with 3 drafts in FP8, and a chunk of a prompt."""
    make = lambda dtype: (lambda *size: torch.empty(*size, dtype=dtype, device=device))
    bf16, long = make(torch.bfloat16), make(torch.long)
    for r, t, stored in ((1, 1, torch.bfloat16), (32, 4, torch.float8_e4m3fn), (1, 512, torch.bfloat16)):
        rows = types.SimpleNamespace(slot_r=long(r), start_r=long(r), count_r=long(r))
        twin.attend_cells(infer.KVPool(32, 2, 4096, 128, stored, device), bf16(r, t, 32, 128), bf16(r, t, 2, 128), bf16(r, t, 2, 128), rows)
