"""The stages on a CUDA device against the CPU:  python -m pytest tests -m gpu"""
import dataclasses
import importlib

import pytest
import torch

nvfp4, mamba, moe, model04 = (importlib.import_module(m) for m in ("01_nvfp4", "02_mamba", "03_latentmoe", "04_model"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TINY = model04.PRESETS["tiny"]


def tokens(*shape, seed=0):
    return torch.randint(12, 4096, shape, generator=torch.Generator().manual_seed(seed))


def step(device, recipe=None, autocast=False, recompute=False):
    """(losses, gradients on the CPU) of one step of tiny with two documents a row."""
    torch.manual_seed(0)
    model = model04.Nemotron(TINY)
    model.recompute = recompute
    if recipe: model04.apply_recipe(model, recipe)
    model, row = model.to(device), tokens(2, 66).to(device)
    doc_bt = (torch.arange(65, device=device) > 40).long().expand(2, 65)
    model.set_draws(model.draw_seeds(0, 0).to(device))
    with torch.autocast(device, torch.bfloat16, enabled=autocast): losses = model04.loss(model, row[:, :-1], row[:, 1:], doc_bt)
    losses.total.backward()
    return losses, torch.cat([p.grad.cpu().float().flatten() for p in model.parameters()])


def cosine(a, b): return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()


def test_a_step_equals_the_cpus():
    """fp32 products without TF32: every layer's forward and backward runs on CUDA and gives the CPU's numbers."""
    torch.backends.cuda.matmul.allow_tf32 = False
    (a, ga), (b, gb) = step("cuda"), step("cpu")
    assert a.total.item() == pytest.approx(b.total.item(), rel=1e-5) and cosine(ga, gb) > 1 - 1e-5
    assert (a.load_me.cpu() - b.load_me).abs().sum() <= 4      # a tie in the router may fall the other way


@pytest.mark.parametrize("recipe, autocast, bound", [(None, True, 0.98), (nvfp4.NVFP4Recipe(), True, 0.85), (nvfp4.NVFP4Recipe(), False, 0.85)],
                         ids=["bf16", "nvfp4 on bf16", "nvfp4 on fp32"])
def test_low_precision_steps_stay_close(recipe, autocast, bound):
    """The loss within 2 % and the gradient's direction kept: a wrong scale, a dtype that autocast mixed up, or a dropped operand breaks it."""
    (a, ga), (b, gb) = step("cuda", recipe, autocast), step("cpu")
    assert a.total.item() == pytest.approx(b.total.item(), rel=0.02) and torch.isfinite(ga).all() and cosine(ga, gb) > bound


def test_recomputation_repeats_the_stochastic_draws():
    (a, ga), (b, gb) = step("cuda", nvfp4.NVFP4Recipe(), True), step("cuda", nvfp4.NVFP4Recipe(), True, recompute=True)
    assert torch.equal(a.load_me, b.load_me) and cosine(ga, gb) > 1 - 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choose", ["spread", "one", "half"])
def test_grouped_experts_on_cuda_equal_the_loop(dtype, choose):
    """torch._grouped_mm with empty experts and with all tokens on one, forward and backward, against the definition in float64."""
    g = torch.Generator().manual_seed(0)
    score = torch.rand(70, 8, generator=g)
    if choose == "half": score[:, 4:] -= 2
    if choose == "one": score[:, 0] += 2
    experts = score.topk(1 if choose == "one" else 3).indices
    make = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    inputs = [make(70, 32), torch.rand(experts.shape, generator=g), make(8, 48, 32) * 0.2, make(8, 32, 48) * 0.2]
    dy, results = torch.randn(70, 32, generator=g), []
    for device, wide, run in (("cuda", None, moe.experts_grouped), ("cpu", torch.float64, moe.experts_loop), ("cuda", None, moe.experts_loop)):
        x, w, up, down = (t.to(device, wide or t.dtype).requires_grad_() for t in inputs)
        y = run(x, w, experts.to(device), up, down)
        results.append([t.detach().cpu().double() for t in (y, *torch.autograd.grad(y, (x, w, up, down), dy.to(y)))])
    for ours, exact, plain in zip(*results):
        assert (ours - exact).norm() <= 2 * (plain - exact).norm() + 1e-6 * exact.norm()


def test_generation_on_cuda_equals_the_cpus():
    """Ragged prompts, greedy, fp32: caches, left padding and the decode step on CUDA."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    model = model04.Nemotron(dataclasses.replace(TINY, init_std=0.1))      # confident enough that no two logits tie
    prompts, greedy = [tokens(n, seed=n).tolist() for n in (3, 17, 9)], model04.SamplingParams(max_tokens=12, temperature=0.0, stop_ids=())
    on_cpu = [c.ids for c in model04.generate(model, prompts, greedy)]
    assert [c.ids for c in model04.generate(model.cuda(), prompts, greedy)] == on_cpu


def test_a_quantised_tensor_has_the_cpus_bits():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for kwargs in (dict(), dict(block=(16, 16)), dict(rounding="stochastic", seed=7), dict(scale_rule="four_over_six"), dict(format="mxfp4")):
        a, b = nvfp4.quantize(x.cuda(), **kwargs), nvfp4.quantize(x, **kwargs)
        assert torch.equal(a.codes.cpu(), b.codes) and torch.equal(a.block_scale.cpu().view(torch.uint8), b.block_scale.view(torch.uint8))


TWINS = dict(nvfp4=("quantize", "quantize_rows", "quantize_columns", "quantize_pair", "dequantize", "transpose_codes"),
             nvfp4_gemm=("matmul", "matmul_w4a16"), ssd=("ssd_chunked",), conv1d=("causal_conv1d",), norm=("rmsnorm", "gated_rmsnorm"),
             state_update=("ssd_step", "quantize_state"), experts=("experts_grouped", "copy_to_experts", "weighted_sum"),
             cross_entropy=("linear_cross_entropy",), attention=("attention_mask",))


def test_a_model_on_a_gpu_runs_every_twin_by_default(monkeypatch):
    """Training in NVFP4, then generation with a 16-bit state: nothing asks for a kernel, and each one runs. An import that fails would be silent."""
    found, find = set(), nvfp4.find_twin
    def note(module, name, impl, x):
        twin = find(module, name, impl, x)
        if twin: found.add((module, name))
        return twin
    monkeypatch.setattr(nvfp4, "find_twin", note)
    step("cuda", nvfp4.NVFP4Recipe(), True)
    model04.attention_mask(torch.zeros(1, 4097, dtype=torch.long, device="cuda"), 4097)
    model = model04.Nemotron(TINY).cuda()
    model04.generate(model, [[1, 20, 30]], model04.SamplingParams(max_tokens=2, temperature=0.0))
    mamba.quantize_state(torch.randn(1, 2, 16, 32, device="cuda"), "fp16")
    q = nvfp4.quantize(torch.randn(32, 64, device="cuda"), (16, 16))
    nvfp4.matmul_w4a16(torch.randn(3, 64, device="cuda"), q), q.T.dequantize()
    assert found == {(module, name) for module, names in TWINS.items() for name in names}
    with nvfp4.plain_pytorch(): assert find("norm", "rmsnorm", "auto", torch.ones(1, device="cuda")) is None


def test_offsets_beyond_two_to_the_31_are_right():
    """A stack of experts has more than 2^31 elements, and an offset in 32 bits would read and write elsewhere: the last expert tells."""
    e, f, l = 520, 4096, 1024
    up, down = (torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(std=0.03) for shape in ((e, f, l), (e, l, f)))
    x, chosen = torch.randn(20, l, device="cuda", dtype=torch.bfloat16), torch.full((20, 2), e - 1, device="cuda")
    chosen[:, 1], weights = torch.arange(20, device="cuda") * 26, torch.rand(20, 2, device="cuda")
    y, exact = moe.experts_grouped(x, weights, chosen, up, down), moe.experts_loop(x.float(), weights, chosen, up.float(), down.float())
    assert ((y.float() - exact).norm() / exact.norm()).item() < 0.01
    del exact, down
    q, last = nvfp4.quantize(up), nvfp4.quantize(up[-1])
    assert torch.equal(q.codes[-1], last.codes) and torch.equal(q.block_scale[-1].view(torch.uint8), last.block_scale.view(torch.uint8))
    served = nvfp4.matmul_w4a16(x, q, torch.full((e,), 20, device="cuda", dtype=torch.int32) * (torch.arange(e, device="cuda") == e - 1))
    assert ((served.float() - x.float() @ last.dequantize().T).norm() / served.float().norm()).item() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_router_of_bf16_activations_has_fp32s_accuracy(dtype):
    """Three parts of 8 bits and all pairs that matter: without the lowest part, or the products of middle parts, the error is 1e-5 of the norm.
    1e-6 is what tensor cores, which cut the last bits of their sums, may add to fp32's own error."""
    torch.backends.cuda.matmul.allow_tf32 = False
    x, w, dy = (torch.randn(*shape, device="cuda") for shape in ((70, 300), (40, 300), (70, 40)))
    x, w = x.bfloat16(), w.to(dtype)
    def logits_and_gradients(run, wide):
        leaves = [t.detach().to(wide or t.dtype).requires_grad_() for t in (x, w)]
        y = run(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]
    ours = logits_and_gradients(moe.RouterLogits.apply, None)
    plain, exact = (logits_and_gradients(lambda x, w: x @ w.T, wide) for wide in (torch.float32, torch.float64))
    for ours_t, plain_t, exact_t in zip(ours, plain, exact):
        error = (plain_t.to(ours_t.dtype).double() - exact_t).norm()      # gradients of bf16 tensors are rounded to bf16
        assert (ours_t.double() - exact_t).norm() <= 2 * error + 1e-6 * exact_t.norm()


class Ids:
    """step -> Batch of random tokens, another one each step."""
    def __call__(self, step):
        pretrain = importlib.import_module("05_pretrain")
        return pretrain.Batch.from_windows(tokens(4, 65, seed=step).numpy(), (torch.arange(65) // 40).expand(4, 65).contiguous().numpy())


def train(tmp_path, precision, record, steps=6, **settings):
    pretrain = importlib.import_module("05_pretrain")
    config = pretrain.PretrainConfig(device="cuda", precision=precision, record=record, micro_batches=2, steps=20, lr=1e-2, warmup=0.1, branches=(),
                                     **settings)
    torch.manual_seed(0)
    trainer = pretrain.Trainer(config, model04.Nemotron(TINY), Ids(), tmp_path)
    return [trainer.train_step() for _ in range(steps)], trainer


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nvfp4"])
def test_a_recorded_step_gives_the_numbers_of_a_plain_one(precision, tmp_path):
    """Steps 3 to 6 are replayed: a batch, a rate, a rounding seed or a gradient that stays behind from the recording changes their losses."""
    (plain, one), (recorded, two) = train(tmp_path, precision, False), train(tmp_path, precision, True)
    assert len(two.compute.graphs) == 1 and two.compute.calls.total() == 6
    for key in ("loss", "mtp_2", "grad_norm", "lr", "max_vio"):
        assert [row[key] for row in recorded] == pytest.approx([row[key] for row in plain], rel=2e-4), key
    start = train(tmp_path, precision, False, steps=0)[1]
    a, b, c = (torch.cat([p.detach().flatten() for p in t.model.parameters()]) for t in (one, two, start))
    assert (a - b).norm() < 0.02 * (a - c).norm()


@pytest.mark.parametrize("record", [False, True], ids=["plain", "recorded"])
def test_compiled_blocks_train_alike(record, tmp_path):
    """torch.compile around the twins, also inside a recorded step: compiling happens in the first call, recording in the third."""
    try: (plain, _), (compiled, _) = train(tmp_path, "fp32", record), train(tmp_path, "fp32", record, compile=True)
    finally: torch._dynamo.reset()
    for key in ("loss", "mtp_2", "grad_norm"): assert [row[key] for row in compiled] == pytest.approx([row[key] for row in plain], rel=2e-4), key


def test_a_recorded_step_that_is_not_finite_leaves_the_weights(tmp_path):
    """The check runs on the GPU, inside the recording: an optimizer that ignored it would write NaN everywhere."""
    trainer = train(tmp_path, "bf16", True, steps=4)[1]
    trainer.model.backbone.norm_f.weight.data[0] = float("nan")
    before = {name: p.clone() for name, p in trainer.model.state_dict().items() if "norm_f" not in name}
    with pytest.raises(ValueError, match="step 5: the loss is nan"): trainer.train_step()
    after = trainer.model.state_dict()
    assert all(torch.equal(p, after[name]) for name, p in before.items()) and trainer.step == 4
