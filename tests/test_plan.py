"""The planner against numbers worked out by hand from the report's sizes, and its activation formula against what autograd really keeps."""
import dataclasses
import importlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
plan, model04, pretrain = (importlib.import_module(m) for m in ("plan", "04_model", "05_pretrain"))
Config, Layout = plan.Config, plan.Layout
ULTRA = Layout(dp=1024, tp=1, ep=64, cp=1, pp=1)
MIXED = Layout(dp=8, tp=8, ep=64, cp=4, pp=4)


# ---- memory

def test_one_gpu_would_hold_the_released_parameters_at_18_bytes_each():
    """bf16 weights, fp32 gradients and three fp32 numbers of the optimizer: 2 + 4 + 12 bytes for 549.3B parameters and the head's 11.22B."""
    run = Config(gpus=1, batch=1, precision="bf16", sharding="zero1")
    need = plan.memory(run, Layout(1, 1, 1, 1, 1))
    for part, size in (("weights", 2), ("gradients", 4), ("optimizer", 12)):
        assert getattr(need, part) == pytest.approx(size * (549.3e9 + 11.22e9), rel=1e-3), part


def test_sharding_spreads_the_optimizer_without_losing_any_of_it():
    """What all ranks hold together is 12 bytes a parameter, for experts and for the rest: a wrong group size shows as a factor."""
    for layout in (ULTRA, replace(ULTRA, dp=256, cp=4, ep=16), replace(ULTRA, dp=512, ep=512, cp=2)):
        need = plan.memory(Config(), layout)
        assert 1024 * need.optimizer == pytest.approx(12 * 560.5e9, rel=1e-3)


def test_expert_weights_by_hand():
    """48 layers and one in the head, 512 experts, two matrices of 2048 × 5120: over 64 ranks 8.22B values of them a rank."""
    experts = [w for w in plan.weights(model04.PRESETS["ultra"]) if w.cut == "ep"]
    assert sum(w.count for w in experts) == 49 * 512 * 2 * 2048 * 5120
    assert sum(w.local(ULTRA, 2) for w in experts) == 49 * 8 * 2 * 2048 * 5120
    run = Config(sharding="zero1", precision="bf16")
    slim, wide = (plan.memory(run, replace(ULTRA, ep=ep)).weights for ep in (64, 128))
    assert slim - wide == 2 * 49 * 4 * 2 * 2048 * 5120


def test_more_expert_parallelism_never_raises_the_weights_of_a_gpu():
    """Under zero1 the weights of a rank; under fsdp what it gathers."""
    for sharding in ("zero1", "fsdp"):
        sizes = [plan.memory(Config(sharding=sharding), replace(ULTRA, ep=ep)).weights for ep in (1, 2, 8, 64, 512)]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_fsdp_gathers_the_outer_layers_and_two_more():
    """bf16 embedding, output layer and twice the largest unit, the prediction head; and the 4- and 8-bit copies of one Mamba layer."""
    head = 8 * 2 * 2048 * 5120 + 2 * 8192 * 10240 + 2 * 8192 * 2048 + 512 * 8192 + 2 * 8192 * 128 * 66 + 2 * 8192 * 8192
    copies = 35072 * 8192 * 9 / 8 + 16384 * 8192 * 16.5 / 8
    need = plan.memory(Config(), ULTRA)
    assert need.weights == pytest.approx(2 * (2 * 131072 * 8192 + 2 * head) + copies, rel=1e-4)


def test_the_fused_loss_holds_the_output_layers_gradient_once_a_prediction():
    """Main and two further depths: fp32 [131072, 8192] and bf16 [8192, 8192] each, and one bf16 piece of logits [8192, 131072]."""
    assert plan.memory(Config(), ULTRA).loss == 3 * (4 * 131072 * 8192 + 2 * 8192 * 8192) + 2 * 8192 * 131072


def test_quantised_copies_cost_twice_4_5_bits():
    """Routed experts under the recipe: rows and columns of 4.5 bits stand beside bf16, 25 bits in all. The last 16 layers (7 of them MoE) do not."""
    copies = [plan.memory(Config(sharding="zero1", precision=p), replace(ULTRA, ep=512)).weights for p in ("nvfp4", "bf16")]
    c, four_bit, low = model04.PRESETS["ultra"], "nvfp4", {"nvfp4": 9 / 8, "mxfp8": 16.5 / 8, "high": 0}
    by_hand = sum(w.local(replace(ULTRA, ep=512), 2) * low[w.fmt] for w in plan.weights(c))
    assert copies[0] - copies[1] == pytest.approx(by_hand, rel=1e-12)
    late = [w for w in plan.weights(c) if w.cut == "ep" and w.fmt != four_bit and w.layer < 108]
    assert len(late) == 2 * c.pattern[-16:].count("E")


def test_every_weight_lies_on_one_pipeline_stage():
    """The stages' weights add up to the model, and to one more embedding, which the prediction head reads on the last stage."""
    c = model04.PRESETS["ultra"]
    total, embedding = sum(w.count for w in plan.weights(c)), 131072 * 8192
    for pp in (1, 2, 7, 108):
        layout = Layout(1, 1, 1, 1, pp)
        held = sum(w.count for s in range(pp) for w in plan.on_stage(c, layout, s))
        assert held == total + embedding * (pp > 1), pp


def test_an_early_stage_keeps_as_many_micro_batches_as_stages_follow():
    """1F1B: with 27 layers a stage and full recomputation, stage 0 of 4 keeps 4 inputs of 8192 × 8192 values for each layer."""
    layout, run = replace(ULTRA, dp=256, pp=4), Config()
    per_layer = 2 * 8192 * 8192
    first, second = (plan.activation_memory(run, layout, s)[0] for s in (0, 1))
    assert first - second == pytest.approx(27 * per_layer)
    few = replace(run, batch=512)      # two micro-batches a rank: no stage can hold more than there are
    assert plan.activation_memory(few, layout, 0)[0] == plan.activation_memory(few, layout, 1)[0]


# ---- activations, measured

def kept_by_autograd(block: torch.nn.Module, x: torch.Tensor, shapes=()) -> int:
    """Bytes of all storages that autograd saves in one forward pass, parameters and buffers not counted. A bf16 x runs under autocast; the copies of
    parameters that it makes then are told by their `shapes`."""
    own, seen = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}, {}
    def pack(t):
        # PITFALL: two views of one tensor keep one storage; and a storage must be held here, or its address is given to the next one
        copy = t.dtype == torch.bfloat16 and (t.shape in shapes or t.mT.shape in shapes)
        if (storage := t.untyped_storage()).data_ptr() not in own and not copy: seen[storage.data_ptr()] = (storage.nbytes(), t)
        return t
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast: block(x)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("letter", "M*E")
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_the_formula_counts_what_a_block_keeps(name, letter):
    """The PyTorch path in fp32. A tensor forgotten is 5 % or more; 3 % leaves room for offsets, counts and the convolution's three zeros.
    256 tokens are few enough for tiny's experts to take experts_sorted, the path that the formula describes."""
    c, t = model04.PRESETS[name], 256
    block = model04.Block(letter, c).train()
    measured = kept_by_autograd(block, torch.randn(1, t, c.d_model, requires_grad=True))
    counted = t * sum(s.bytes for s in plan.saved_by_block(letter, c, "torch", context=t))
    assert counted == pytest.approx(measured, rel=0.03)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton interprets on machines without a GPU only (conftest.py)")
@pytest.mark.parametrize("path, letter", [("bf16", "M"), ("bf16", "*"), ("bf16", "E"), ("nvfp4", "E")])
def test_the_formula_counts_what_a_block_keeps_with_the_kernels(path, letter, monkeypatch):
    """16-bit activations and the Triton twins, in Triton's interpreter. Taken off: the 16-bit copies of weights that autocast makes (weights, in the
    plan), the fp32 copy that the router reads on a CPU only, and, as one rank alone sends nothing, the copies of rows for other ranks' experts."""
    pytest.importorskip("triton")
    nvfp4, c, t = importlib.import_module("01_nvfp4"), model04.PRESETS["tiny"], 192      # not a width of tiny: shapes tell weights apart
    take, twins = nvfp4.find_twin, ("norm", "ssd", "conv1d", "experts")
    monkeypatch.setattr(nvfp4, "find_twin", lambda module, name, impl, x: take(module, name, "triton" if module in twins else impl, x))
    model = model04.Nemotron(replace(c, pattern=letter + "MMM", vocab=16, mtp_pattern="", mtp_depths=0))
    if path == "nvfp4": model04.apply_recipe(model, nvfp4.NVFP4Recipe())
    block, x = model.backbone.layers[0].train(), torch.randn(1, t, c.d_model, dtype=torch.bfloat16, requires_grad=True)
    measured = kept_by_autograd(block, x, shapes={p.shape for p in block.parameters() if p.dim() > 1})
    counted = t * sum(s.bytes for s in plan.saved_by_block(letter, c, path, context=t))
    if letter == "E": measured -= t * 4 * c.d_model
    if letter == "E" and path == "bf16": counted -= t * 2 * (c.experts_per_token - 1) * c.latent
    assert counted == pytest.approx(measured, rel=0.03)


def test_recomputation_keeps_less_and_the_kernels_keep_less_than_autograd():
    """none > selective > full, and 16-bit twins below half of fp32 autograd."""
    for letter in "M*E":
        sizes = plan.block_bytes(Config(), ULTRA, letter)
        assert sizes["all"] > sizes["kept"] > sizes["input"] == 8192 * 8192 * 2
        torch_path, twins = (sum(s.bytes for s in plan.saved_by_block(letter, model04.PRESETS["ultra"], path)) for path in ("torch", "nvfp4"))
        assert twins <= torch_path / 2
    totals = [plan.memory(Config(recompute=r), ULTRA).total for r in ("none", "selective", "full")]
    assert totals == sorted(totals, reverse=True)


# ---- work and time

def forward_by_hand() -> tuple[float, float]:
    """(all, in 4 bits) FLOPs of one token of Ultra forward, from the report's sizes: trunk, and twice the prediction head."""
    d, v, context = 8192, 131072, (8192 + 1) / 2
    in_proj, out_proj = 2 * d * (16384 + 18432 + 256), 2 * d * 16384
    mamba = in_proj + out_proj + 2 * 18432 * 4 + 6 * 16384 * 128
    attention = 2 * d * 128 * (64 + 2 + 2 + 64) + 4 * 64 * 128 * context
    experts, shared = 2 * 22 * 2 * 2048 * 5120, 2 * 2 * d * 10240
    moe = experts + shared + 2 * 2 * d * 2048 + 2 * d * 512
    head = attention + moe + 2 * 2 * d * d + 2 * v * d
    first = model04.ULTRA_PATTERN[:92]      # the last 16 layers stay in 16 bits
    return 48 * mamba + 12 * attention + 48 * moe + 2 * v * d + 2 * head, first.count("M") * in_proj + first.count("E") * (experts + shared)


def test_work_by_hand_for_ultra():
    """Total and 4-bit share; full recomputation repeats everything but the three passes of the output layer."""
    total, four_bit = forward_by_hand()
    cost = plan.work(Config(recompute="none"))
    assert sum(cost.forward.values()) == pytest.approx(total, rel=1e-9) and cost.forward["nvfp4"] == pytest.approx(four_bit, rel=1e-9)
    assert cost.total == pytest.approx(3 * total, rel=1e-9)
    assert plan.work(Config()).total == pytest.approx(4 * total - 3 * 2 * 131072 * 8192, rel=1e-9)


def test_days_by_hand():
    """20T tokens in bf16 at 40 % of 2.5 PFLOP/s on 1,024 GPUs; then a pipeline of 4 with 12 micro-batches, which idles 3 of 15 slots."""
    run = Config(precision="bf16", recompute="none", utilisation=0.4)
    seconds = 20e12 * 3 * forward_by_hand()[0] / (1024 * 2.5e15 * 0.4)
    assert plan.days(run, ULTRA, plan.CHIPS["gb200"]) == pytest.approx(seconds / 86400, rel=1e-9)
    piped = replace(ULTRA, dp=256, pp=4)
    assert plan.days(run, piped, plan.CHIPS["gb200"]) == pytest.approx(seconds / 86400 * 15 / 12, rel=1e-9)


def test_the_optimizer_runs_at_the_speed_of_memory():
    """30 bytes moved a parameter, 560.5B parameters over 1,024 ranks, 8 TB/s."""
    assert plan.optimizer_seconds(Config(), ULTRA, plan.CHIPS["gb200"]) == pytest.approx(30 * 560.5e9 / 1024 / 8e12, rel=1e-3)


def test_peaks_are_the_reports_and_hopper_has_no_fp4():
    """FP4 and FP8 of the report's comparison; what a chip cannot multiply in 4 bits is decoded and runs in bf16."""
    for chip, fp4, fp8 in (("trainium2", None, 1.3), ("trainium3", 2.5, 2.5), ("gb200", 10, 5), ("vr200", 35, 17.5)):
        assert (plan.CHIPS[chip].fp4, plan.CHIPS[chip].fp8) == (fp4, fp8)
    rates = {chip: [plan.CHIPS[chip].rate(fmt) for fmt in ("nvfp4", "mxfp8", "high")] for chip in ("gb200", "h200")}
    assert rates == {"gb200": [10, 5, 2.5], "h200": [0.989] * 3}


def test_the_reports_numbers_come_out():
    """794,728 whole steps in 20T tokens; and a bf16 checkpoint of 1.1 TB."""
    run, book = Config(), model04.ledger(model04.PRESETS["ultra"])
    assert int(run.tokens / (run.batch * run.seq)) == 794_728
    assert round(2 * (book.total + book.mtp) / 1e12, 1) == 1.1


# ---- traffic

def test_all_to_all_of_one_layer_by_hand(monkeypatch):
    """One MoE layer: 22 rows of 2048 bf16 values out and as many back, forward and backward; 63 of 64 leave the rank, all inside NVL72."""
    monkeypatch.setitem(model04.PRESETS, "one", replace(model04.PRESETS["ultra"], pattern="E", mtp_pattern="", mtp_depths=0))
    run = Config(preset="one", recompute="none")
    flow = plan.traffic(run, ULTRA, plan.CHIPS["gb200"])[0]
    by_hand = 22 * 2048 * 2 * 2 * 2 * 3 * 8192 * 63 / 64
    assert flow.inside == pytest.approx(by_hand) and flow.outside == 0
    assert plan.all_to_all_bytes(run, ULTRA, full_width=True) / plan.all_to_all_bytes(run, ULTRA) == 4
    again = plan.traffic(replace(run, recompute="full"), ULTRA, plan.CHIPS["gb200"])[0]
    assert again.inside == pytest.approx(1.5 * by_hand)     # computing the forward pass again sends its rows again
    hopper = plan.traffic(run, ULTRA, plan.CHIPS["h100"])[0]      # of 63 peers 7 share the domain of 8
    assert hopper.inside == pytest.approx(by_hand * 7 / 63) and hopper.outside == pytest.approx(by_hand * 56 / 63)


def test_a_collective_moves_every_byte_once():
    """1,024 ranks in 16 domains of 64: a rank sends 1023/1024 of the whole, and the 64 network cards share what comes from other domains."""
    flow = plan.collective("weights", 1024.0, group=1024, near=64)
    assert flow.inside + flow.outside == pytest.approx(1023) and flow.outside == pytest.approx((1024 - 64) / 64)
    assert plan.collective("", 1024.0, 64, 64).outside == 0 and plan.collective("", 1024.0, 64, 1).inside == 0
    assert plan.collective("", 1024.0, 1, 1) == plan.Flow("", 0, 0)


def test_mamba_hands_on_one_state_whatever_the_length():
    """48 states of 256 × 64 × 128 fp32 values, 402.7 MB, forward and their gradients back, for 7 of 8 ranks; keys and values grow with the length."""
    layout, chip = replace(ULTRA, dp=128, cp=8), plan.CHIPS["gb200"]
    near, far = (plan.context_flows(Config(recompute="none", seq=seq), layout, chip) for seq in (8192, 65536))
    assert near[0].inside == pytest.approx(48 * 256 * 64 * 128 * 4 * 2 * 24 * 7 / 8)
    assert near[1].inside == pytest.approx(48 * 3 * 18432 * 2 * 2 * 24 * 7 / 8)
    assert near[2].inside == pytest.approx((12 + 2) * 2 * 2 * 128 * 2 * 8192 * 2 * 24 * 7 / 8)       # 12 layers, and the head's one twice
    assert [f.inside for f in far] == [near[0].inside, near[1].inside, 8 * near[2].inside]


def test_zero1_reduces_once_a_step_and_fsdp_every_micro_batch():
    """Dense weights and gradients over 1,024 ranks, 3 micro-batches: 4 bytes a value against 12, and 2 against 12 for the weights."""
    dense = 560.5e9 - 49 * 512 * 2 * 2048 * 5120
    for sharding, reduced, gathered in (("zero1", 4, 2), ("fsdp", 3 * 4, 3 * 2 * 2)):
        flows = {f.name: f for f in plan.traffic(Config(sharding=sharding), ULTRA, plan.CHIPS["gb200"])}
        for name, size in (("gradients, reduce-scatter", reduced), ("weights, all-gather", gathered)):
            flow = flows[f"data: dense {name}"]
            assert flow.inside + flow.outside == pytest.approx(size * dense * 1023 / 1024, rel=2e-3)


def test_tensor_and_pipeline_traffic_by_hand():
    """dp 16, tp 8, cp 4, pp 2: 192 micro-batches of 2,048 tokens. 108 layers and 4 of the head: five transfers of tokens × 8192 bf16 values each, a
    rank sends 7/8 of each; over the boundary go an eighth of the tokens and back their gradients, and half of the GPUs have one ahead."""
    layout, run = Layout(dp=16, tp=8, ep=64, cp=4, pp=2), Config(recompute="none")
    flows = {f.name: f for f in plan.traffic(run, layout, plan.CHIPS["gb200"])}
    tensor, pipeline = flows["tensor: gather and scatter"], flows["pipeline: sends"]
    assert tensor.inside == pytest.approx(5 * 112 / 2 * 192 * 2048 * 8192 * 2 * 7 / 8) and tensor.outside == 0
    assert pipeline.outside == pytest.approx(2 * 192 * 2048 / 8 * 8192 * 2 / 2) and pipeline.inside == 0


def test_no_axis_of_size_one_sends_anything():
    """A single GPU talks to nobody."""
    run = Config(preset="small", gpus=1, batch=4)
    assert all(f.inside == f.outside == 0 for f in plan.traffic(run, Layout(1, 1, 1, 1, 1), plan.CHIPS["h200"]))


# ---- refusals and the choice

@pytest.mark.parametrize("change, run, sentence", [
    (dict(dp=512), {}, "dp · tp · cp · pp = 512 ranks and there are 1,024 GPUs"),
    (dict(ep=3), {}, "ep = 3 does not divide the 512 experts"),
    (dict(dp=32, pp=32, ep=64), {}, "ep = 64 does not divide dp · cp · tp = 32"),
    (dict(dp=8, cp=128), {}, "cp = 128 cannot cut 8,192 tokens into whole chunks of 128"),
    (dict(dp=64, tp=16), {}, "tp = 16 does not divide the 8 Mamba groups"),
    (dict(dp=8, pp=128, ep=8), {}, "pp = 128 stages and 108 layers"),
    ({}, dict(batch=1000), "a batch of 1,000 sequences is not a multiple of dp · micro_batch = 1,024"),
    ({}, dict(micro_batch=2), "a batch of 3,072 sequences is not a multiple of dp · micro_batch = 2,048"),
    (dict(tp=0), {}, "tp = 0: a size of a layout must be at least 1"),
])
def test_a_layout_that_cannot_run_is_refused_in_one_sentence(change, run, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)): plan.check(Config(**run), replace(ULTRA, **change))


@pytest.mark.parametrize("wrong, sentence", [(dict(chip="h1000"), "unknown chip 'h1000'"), (dict(gpus=0), "gpus = 0 must be positive"),
                                             (dict(utilisation=1.2), "share of the peak"), (dict(ep=-1), "ep = -1 is negative"),
                                             (dict(imbalance=0.5), "at least the mean"), (dict(reserve=1.0), "share of the memory")])
def test_impossible_settings_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)): Config(**wrong)


def test_a_layout_that_does_not_fit_is_refused_with_what_would_help():
    """Without recomputation a GB200 is 270 GB short; the first remedy named is real: with it the plan fits."""
    run = Config(recompute="none")
    need = plan.memory(run, ULTRA).total
    words = plan.refusal(run, ULTRA)
    assert f"{(need - 0.92 * 186e9) / 1e9:,.0f} GB more than one gb200 has" in words and "activations" in words
    assert "--recompute full" in words and plan.refusal(Config(), ULTRA) is None
    assert plan.remedies(run, ULTRA)[0][1] == plan.memory(Config(), ULTRA).total


def test_the_choice_is_the_smallest_model_parallel_product_that_fits():
    """Every smaller product was tried and does not fit; sizes given are kept; ep fills the NVLink domain."""
    run = Config(recompute="none", chip="h200")
    chosen = plan.choose(run)
    size = lambda layout: layout.tp * layout.cp * layout.pp
    fits = lambda layout: plan.refusal(run, layout) is None
    assert fits(chosen) and size(chosen) > 1 and not any(fits(other) for other in plan.candidates(run) if size(other) < size(chosen))
    assert plan.choose(Config()) == ULTRA
    given = plan.choose(replace(run, tp=8, pp=2, ep=16))
    assert (given.tp, given.pp, given.ep, given.gpus) == (8, 2, 16, 1024)


def test_the_reports_long_context_layout_can_be_run():
    """TP 8, CP 32, EP 128, PP 2 at 1,048,576 tokens, 24 sequences a step: 128 of the 256 ranks of a stage hold the experts, so ep must fold."""
    run = Config(gpus=512, seq=1_048_576, batch=24)
    plan.check(run, Layout(dp=1, tp=8, ep=128, cp=32, pp=2))
    assert Layout(dp=1, tp=8, ep=128, cp=32, pp=2).expert_copies == 2


# ---- the command and the launch script

def test_the_command_prints_a_plan_writes_a_row_and_refuses(tmp_path, capsys):
    """End to end on a small preset, then with a layout that no chip holds."""
    pytest.importorskip("matplotlib")
    plan.main(Config(preset="small", gpus=8, chip="h200", batch=64, seq=2048, tokens=1e9, out=tmp_path))
    words = capsys.readouterr().out
    for part in ("= 8 GPUs", "memory a GPU", "of each product's peak", "all-to-all in the latent space", "every chip"): assert part in words
    assert (tmp_path / "plan.png").stat().st_size > 10_000 and (tmp_path / "results.jsonl").read_text().count("\n") == 1
    with pytest.raises(ValueError, match="take more GPUs"): plan.main(Config(gpus=1, batch=1, chip="h100", ep=1, out=tmp_path))


def test_the_launch_script_is_valid_and_uses_flags_of_stage_05():
    """bash accepts it, and every flag behind 05_pretrain.py is one of its settings, but for the parallel sizes that a launch adds."""
    script = ROOT / "experiments" / "slurm" / "pretrain.sbatch"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    command = script.read_text().split("05_pretrain.py --preset")[1]
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", "--preset" + command)}
    known = {f.name for f in dataclasses.fields(pretrain.PretrainConfig)} | {"dp", "ep", "cp"}
    assert len(flags) > 12 and flags <= known and "NOT RUN HERE" in script.read_text()
