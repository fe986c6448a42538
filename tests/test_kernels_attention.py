"""kernels/attention.py against the dense mask of stage 04: the blocks by counting, the values on a CPU unfused, forward and backward on a GPU."""
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

model04, twin = importlib.import_module("04_model"), importlib.import_module("kernels.attention")
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
