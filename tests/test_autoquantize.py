"""AutoQuantize: choices against brute force, sensitivities against their definitions, mixed models against stored checkpoints."""
import copy
import dataclasses
import importlib
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import corpus
from data.batches import Batch
from data.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
experiment = importlib.import_module("autoquantize")
nvfp4, model04, infer = (importlib.import_module(m) for m in ("01_nvfp4", "04_model", "08_infer"))

MICRO = model04.ModelConfig(pattern="ME*", d_model=32, vocab=64, heads=4, kv_heads=2, head_dim=8, mamba_heads=16, mamba_head_dim=2, groups=2,
                            state=4, chunk=16, experts=2, experts_per_token=1, latent=16, expert_width=48, shared_width=64)
FORMATS = ("bf16", "fp8", "nvfp4", "w4a16")


def make_model(config=MICRO, seed=0):
    """Every parameter with values of its own: at the default init norms are 1 and biases 0, and a wrong model passes."""
    torch.manual_seed(seed)
    model = model04.Nemotron(config)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if p.dim() < 2 or "conv1d" in name: p.add_(0.2 * torch.rand_like(p))
            else: p.normal_(0, 1.2 / p.shape[-1] ** 0.5)
    return model.eval()


def make_pack(seed: int, t: int = 40) -> Batch:
    """Two rows: two conversations and padding; three conversations. Half of the labels are learnt."""
    rng = np.random.default_rng(seed)
    ids, doc = rng.integers(3, 64, (2, t + 1)), np.zeros((2, t + 1), np.int64)
    doc[0, 15:], doc[0, 34:], doc[1, 12:], doc[1, 30:] = 1, -1, 1, 2
    batch = Batch.from_windows(ids, doc)
    return batch._replace(mask_bt=batch.mask_bt & torch.from_numpy(rng.random((2, t)) < 0.5))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """(checkpoint, units, calibration, mixer of all formats, packs, log-probabilities of the bf16 model)"""
    folder = tmp_path_factory.mktemp("auto") / "plain"
    model04.save_checkpoint(folder, make_model())
    model, packs = experiment.load_rounded(folder), [make_pack(0), make_pack(1)]
    units, amax = experiment.find_units(model), infer.calibrate(model, packs)
    mixer = experiment.Mixer(folder, units, FORMATS, amax)
    return folder, units, amax, mixer, packs, [experiment.log_probabilities(model, pack) for pack in packs]


# ---- the choice

def brute_force(costs, losses, budget) -> float:
    """Least sum of losses over all combinations that the budget allows."""
    every = itertools.product(*(range(len(row)) for row in costs))
    fits = [options for options in every if sum(row[o] for row, o in zip(costs, options)) <= budget]
    return min(sum(row[o] for row, o in zip(losses, options)) for options in fits)


def test_the_choice_by_hand():
    """Ratios mislead: the first unit gains 6 a bit, the second 4 a bit, and with two bits the second is the better buy."""
    costs, losses = [(1, 2), (1, 3)], [(6, 0), (8, 0)]
    assert experiment.knapsack(costs, losses, [2, 3, 4, 4.9, 5, 100]) == [(0, 0), (1, 0), (0, 1), (0, 1), (1, 1), (1, 1)]
    assert experiment.knapsack([(4, 2, 2), (7, 7)], [(1.0, 1.0, 1.0), (0.5, 0.5)], [100]) == [(1, 0)]      # of equals the cheaper, then the first


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_best_of_all(seed):
    """Every combination of up to five units, at every budget: a cell rounded up or down, or an option left out, would lose somewhere."""
    rng = np.random.default_rng(seed)
    costs = [tuple((int(rng.integers(1, 4)) * rng.integers(1, 12, size=rng.integers(2, 5))).tolist()) for _ in range(rng.integers(2, 6))]
    losses = [tuple(rng.choice([0, 1e-9, 1, 3, 7, 7.5], len(row)) if seed % 3 == 0 else rng.exponential(size=len(row))) for row in costs]
    budgets = range(sum(map(min, costs)), sum(map(max, costs)) + 2)
    for budget, options in zip(budgets, experiment.knapsack(costs, losses, budgets)):
        assert sum(row[o] for row, o in zip(costs, options)) <= budget
        assert sum(row[o] for row, o in zip(losses, options)) == pytest.approx(brute_force(costs, losses, budget), abs=1e-12)


def test_a_choice_that_cannot_be_made_is_named():
    """Below the cheapest choice, and with a loss that is no number, any answer would be invented."""
    with pytest.raises(ValueError, match="below the cheapest choice, 5"): experiment.knapsack([(2, 3), (3, 4)], [(0, 0), (0, 0)], [9, 4])
    with pytest.raises(ValueError, match="NaN"): experiment.knapsack([(1, 2)], [(float("nan"), 0)], [2])


def test_random_assignments_fill_the_budget(bench):
    """A control with less in use than the budget allows would lose for that alone: no single step up may fit any more. And they differ."""
    units, rng, seen = bench[1], np.random.default_rng(0), set()
    for budget in (4.7, 6.0, 9.0, 16.5):
        for _ in range(8):
            assignment = experiment.random_assignment(units, FORMATS[:3], budget, rng)
            room = budget * experiment.elements(units) - sum(unit.bits[fmt] for unit, fmt in zip(units, assignment))
            steps = [unit.bits[fmt] - unit.bits[now] for unit, now in zip(units, assignment) for fmt in FORMATS[:3]]
            assert room >= -1e-2 and all(step <= 0 or step > room for step in steps)
            if budget in (6.0, 9.0): seen.add(assignment)
    assert len(seen) >= 12 and assignment == ("bf16",) * len(units)


# ---- units and formats

def test_units_and_their_bits_by_hand(bench):
    """MICRO on paper: q, k and v are one unit with two scales of the cache, two experts another; the head and the router are none."""
    units = bench[1]
    short = {unit.name.removeprefix("backbone.layers."): unit for unit in units}
    assert list(short) == ["0.mixer.in_proj", "0.mixer.out_proj", "1.mixer.experts", "1.mixer.shared_experts.up_proj",
                           "1.mixer.shared_experts.down_proj", "1.mixer.fc1_latent_proj", "1.mixer.fc2_latent_proj",
                           "2.mixer.qkv_proj", "2.mixer.o_proj"]
    experts, qkv = 4 * 48 * 16, 32 * 32 + 2 * 16 * 32
    of = lambda n, matrices, cache: dict(nvfp4=4.5 * n + 64 * matrices + cache, w4a16=4.5 * n + 32 * matrices + cache,
                                         fp8=8 * n + 64 * matrices + cache, bf16=16 * n + cache)
    assert short["1.mixer.experts"].bits == of(experts, 4, 0) and short["2.mixer.qkv_proj"].bits == of(qkv, 3, 64)
    assert experiment.elements(units) == experts + qkv + 32 * 32 + 96 * 32 + 32 * 32 + 2 * 64 * 32 + 2 * 32 * 16


@pytest.mark.parametrize("seed", range(3))
def test_a_mixed_model_is_the_stored_checkpoint(bench, tmp_path, seed):
    """Bit for bit what load_quantized opens, and as large: a unit that keeps an earlier format, or a name that the table misses, shows here."""
    folder, units, amax, mixer, packs, _ = bench
    assignment = tuple(np.random.default_rng(seed).choice(FORMATS, len(units)).tolist())
    shares = infer.quantize_checkpoint(folder, experiment.recipe_for(units, assignment), tmp_path / "q", amax)
    stored = infer.load_quantized(tmp_path / "q", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(mixer.set(assignment)(packs[0].ids_bt, packs[0].doc_bt), stored(packs[0].ids_bt, packs[0].doc_bt))
        mixer.set(("nvfp4",) * len(units))
        plain = mixer.set(("bf16",) * len(units))(packs[0].ids_bt, packs[0].doc_bt)
        assert torch.equal(plain, experiment.load_rounded(folder)(packs[0].ids_bt, packs[0].doc_bt))
    ours, found = {unit.name: unit.bits[fmt] for unit, fmt in zip(units, assignment)}, {}
    for (_, label), share in shares.items(): found[label] = found.get(label, 0) + share["bits"]
    assert {label: bits for label, bits in found.items() if label != "the rest"} == ours


def test_the_reference_is_bf16_but_for_what_stays_fp32(bench):
    """The checkpoint is in fp32: unrounded, bf16 itself would seem to cost something; with the router rounded, experts would change."""
    model, plain = experiment.load_rounded(bench[0]), make_model()
    for (name, p), (_, was) in zip(model.named_parameters(), plain.named_parameters()):
        kept = name.endswith(("A_log", ".D", "dt_bias", "gate.weight"))
        assert torch.equal(p, was if kept else was.bfloat16().float()), name


# ---- measures

def test_sums_by_conversation_are_those_of_a_loop(bench):
    """Conversation by conversation in float64: padding counted, or two rows' conversations of one number added up, would differ."""
    _, units, _, mixer, packs, reference = bench
    model = mixer.set(("nvfp4",) * len(units))
    sums = experiment.read(model, packs, reference)
    expected = []
    for pack in packs:
        with torch.no_grad(): logq, logp = (m(pack.ids_bt, pack.doc_bt).double().log_softmax(-1) for m in (model, experiment.load_rounded(bench[0])))
        for row, doc in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
            at = [t for t in range(40) if pack.doc_bt[row, t] == doc and pack.mask_bt[row, t]]
            loss = sum(-logq[row, t, pack.labels_bt[row, t]].item() for t in at)
            kl = sum(F.kl_div(logq[row, t], logp[row, t], reduction="sum", log_target=True).item() for t in at)
            expected.append((loss, kl, len(at)))
    found = torch.stack([sums["loss"][0], sums["kl"][0], sums["kl"][1]]).T
    assert found.shape == (10, 3) and torch.equal(sums["loss"][1], sums["kl"][1])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6)      # fp32 logits against float64
    assert experiment.mean([experiment.read(mixer.set(("bf16",) * len(units)), packs, reference)], "kl") == 0


def test_the_measured_sensitivity_changes_one_unit(bench, tmp_path):
    """KL of the checkpoint in which that unit alone is quantized, stored and read again; 0 for bf16."""
    folder, units, amax, mixer, packs, reference = bench
    found = experiment.measured_kl(mixer, packs, reference, FORMATS[:3])
    assert found.shape == (len(units), 3) and (found[:, 0] == 0).all() and (found[:, 1:] > 0).all()
    for u in (1, 7):
        infer.quantize_checkpoint(folder, infer.Recipe(precision=(*((f"{m}.weight", "nvfp4", "") for m in units[u].modules), ("*", "bf16", ""))),
                                  tmp_path / str(u), amax)
        stored, total, n = infer.load_quantized(tmp_path / str(u), dtype=torch.float32).eval(), 0.0, 0
        for pack, logp in zip(packs, reference):
            logq = experiment.log_probabilities(stored, pack)
            total += F.kl_div(logq.double(), logp.double(), reduction="sum", log_target=True).item(); n += len(logp)
        assert found[u, 2] == pytest.approx(total / n, rel=1e-3)


def test_the_second_order_is_its_definition(bench):
    """1/2 sum (g · dy)²: g is the gradient of torch's cross-entropy in a shift of the outputs, dy comes from products of rounded matrices."""
    _, units, amax, mixer, packs, _ = bench
    found, names = experiment.second_order(mixer, packs, FORMATS), [unit.name.removeprefix("backbone.layers.") for unit in units]
    for name in ("0.mixer.in_proj", "1.mixer.shared_experts.down_proj", "2.mixer.o_proj"):
        module, seen, expected, n = f"backbone.layers.{name}", [], dict.fromkeys(FORMATS, 0.0), 0
        model = mixer.set(("bf16",) * len(units))
        w, stored = (m.get_submodule(module).weight.detach() for m in (model, make_model()))      # what is quantized has not been rounded to bf16
        for pack in packs:
            def shifted(m, args, y, seen=seen):
                seen.append((args[0].flatten(0, -2).detach(), torch.zeros_like(y, requires_grad=True)))
                return y + seen[-1][1]
            hook = model.get_submodule(module).register_forward_hook(shifted)
            logits = model(pack.ids_bt, pack.doc_bt)
            hook.remove()
            F.cross_entropy(logits[pack.mask_bt], pack.labels_bt[pack.mask_bt], reduction="sum").backward()
            (x, shift), top = seen[-1], torch.tensor(amax[module])
            in_four = nvfp4.quantize(stored, scale_rule="four_over_six").dequantize()
            in_eight = lambda z, scale: (z / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
            products = dict(bf16=x @ w.T, fp8=in_eight(x, top / 448) @ in_eight(stored, stored.abs().max() / 448).T, w4a16=x @ in_four.T,
                            nvfp4=nvfp4.quantize(x, amax=top).dequantize() @ in_four.T)
            for fmt, y in products.items(): expected[fmt] += 0.5 * (shift.grad.view_as(y) * (y - x @ w.T)).double().square().sum().item()
            n += int(pack.mask_bt.sum())
        assert found[names.index(name)].tolist() == pytest.approx([expected[fmt] / n for fmt in FORMATS], rel=1e-3), name
        assert found[names.index(name), 2] > found[names.index(name), 1] > 0
    assert not any(m._forward_hooks for m in mixer.model.modules())


def test_the_second_order_is_the_kl_of_a_small_error(bench, monkeypatch):
    """With labels drawn from the model its mean is the KL to second order. One output is wrong, so that no cross terms are left out."""
    _, units, _, mixer, packs, _ = bench
    unit = next(unit for unit in units if unit.name.endswith(".experts"))
    plain, pack, last = copy.deepcopy(mixer.versions["bf16"].get_submodule(unit.name)), packs[0], packs[0].mask_bt[1].nonzero()[-1].item()

    class Nudged(torch.nn.Module):
        """The experts with one output of that token moved by 0.003; the other learnt tokens do not see it."""
        def forward(self, *args):
            y_rl = plain(*args).clone()
            y_rl[pack.ids_bt.shape[1] + last, 3] += 0.003
            return y_rl

    def probabilities():
        with torch.no_grad(): return mixer.model(pack.ids_bt, pack.doc_bt)[1, last].double().softmax(-1)

    nudged = Nudged()
    mixer.set(("bf16",) * len(units))
    p_v = probabilities()
    mixer.model.set_submodule(unit.name, nudged)
    q_v = probabilities()
    monkeypatch.setattr(mixer, "units", [unit])
    monkeypatch.setitem(mixer.versions, "fp8", torch.nn.Module())
    monkeypatch.setattr(mixer.versions["fp8"], "get_submodule", lambda name: nudged)
    mask_bt, expected = torch.zeros_like(pack.mask_bt), 0.0
    mask_bt[1, last] = True
    for label, p in enumerate(p_v.tolist()):
        drawn = pack._replace(labels_bt=torch.full_like(pack.labels_bt, label), mask_bt=mask_bt)
        expected += p * experiment.second_order(mixer, [drawn], ("fp8",))[0, 0]
    assert expected == pytest.approx((p_v * (p_v.log() - q_v.log())).sum().item(), rel=0.05)


def test_rank_correlation_with_ties_by_hand():
    """Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5, variances 4.5 and 5."""
    assert experiment.spearman([1, 5, 5, 9], [0.1, 30, 20, 1e6]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert experiment.spearman([3, 1, 2], [30, 10, 20]) == pytest.approx(1) and experiment.spearman([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)


def test_differences_are_paired():
    """A shift that all conversations share has no noise; one conversation of four has what drawing it k of 4 times gives."""
    weight = torch.tensor([1.0, 3.0, 2.0, 4.0]).double()
    of = lambda *values: dict(kl=(torch.tensor(values).double(), weight))
    base = of(5.0, 1.0, 7.0, 2.0)
    shifted = dict(kl=(base["kl"][0] + 0.5 * weight, weight))
    assert experiment.difference([shifted], [base], "kl") == pytest.approx((0.5, 0.5, 0.5))
    assert experiment.difference([base, shifted], [base], "kl") == pytest.approx((0.25, 0.25, 0.25))
    even = lambda *values: dict(kl=(torch.tensor(values).double(), torch.ones(4).double()))
    # drawn k times with chance C(4, k) 3^(4-k) / 256: 0 has .316, more than 2 has .051, more than 3 .004
    assert experiment.difference([even(1.0, 0, 0, 0)], [even(0.0, 0, 0, 0)], "kl") == pytest.approx((0.25, 0, 0.75))


# ---- the command

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a small model and a tokenizer."""
    home = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer.train(list(itertools.islice(corpus.worked_tasks(0), 400)), 1024)
    model04.save_checkpoint(home / "plain", make_model(dataclasses.replace(MICRO, vocab=1024)), tokenizer)
    return home, tokenizer


def test_results_are_measured_on_other_questions_than_sensitivities(run):
    """Both halves hold several sources and share no conversation; choosing and judging on the same ones would flatter the choice."""
    first, second = experiment.halves(run[1], 12)
    parts = lambda pack: {tuple(pack.ids_bt[0][pack.doc_bt[0] == d].tolist()) for d in pack.doc_bt[0].unique() if d >= 0}
    texts = [set().union(*map(parts, half)) for half in (first, second)]
    assert [len(x) for x in texts] == [12, 12] and not texts[0] & texts[1]
    assert all(int(pack.mask_bt.sum()) > 0 for pack in first + second)


def test_the_command_leaves_a_row_a_figure_and_a_checkpoint(run, tmp_path, capsys):
    """The row's numbers are the table's; the same assignment has the same numbers; the checkpoint has the bits that were asked for."""
    pytest.importorskip("matplotlib")
    config = experiment.Config(base=run[0] / "plain", budgets=(6.0, 11.0), seeds=2, conversations=8, families=("calendar_arithmetic",), questions=2,
                               max_tokens=6, tokens=600, save=tmp_path / "auto", out=tmp_path)
    experiment.main(config)
    shown, row = capsys.readouterr().out, json.loads((tmp_path / "results.jsonl").read_text())
    curves = row["curves"]
    assert [len(curves[kind]) for kind in ("by KL", "by second order", "random", "Ultra's table", "all fp8")] == [4, 4, 4, 1, 1]
    for kind, points in curves.items():
        printed = re.findall(rf"^  {kind} +(\d+\.\d\d) +(\S+)", shown, re.M)
        recorded = [x for point in points for x in (point["bits"], 1e4 * point["kl"])]
        assert [float(x) for pair in printed for x in pair] == pytest.approx(recorded, abs=6e-3, rel=1e-4)      # both are rounded
    assert curves["all bf16"][0]["kl"] == 0 < curves["by KL"][-1]["kl"] and curves["all bf16"][0]["bits"] > 16
    assert all(a["bits"] <= b["bits"] for a, b in itertools.pairwise(curves["by KL"]))
    assert (tmp_path / "autoquantize.png").stat().st_size > 10_000 and curves["all nvfp4, four_over_six"] == curves["all nvfp4"]
    units = experiment.find_units(experiment.load_rounded(run[0] / "plain"))
    on_disk = {name: tensor.nbytes for name, tensor in model04.read_tensors(tmp_path / "auto")}
    bits = 8 * sum(size for name, size in on_disk.items() if name.startswith(tuple(f"{m}." for unit in units for m in unit.modules)))
    assert 5.5 < bits / experiment.elements(units) <= 6.0
    infer.load_quantized(tmp_path / "auto")


@pytest.mark.parametrize("field, value", [("seeds", 0), ("questions", 0), ("formats", ("fp8", "nvfp4")), ("budgets", ())])
def test_settings_that_measure_nothing_are_named(field, value):
    """Each would end minutes later in an empty table or a division by zero."""
    with pytest.raises(ValueError, match=field.removesuffix("s")): dataclasses.replace(experiment.Config(), **{field: value})


def test_a_budget_that_nothing_fits_is_named_before_the_work(run, monkeypatch):
    """4 bits hold no scales: said at once, not after the sensitivities."""
    monkeypatch.setattr(experiment, "measured_kl", lambda *args: pytest.fail("measured first"))
    config = experiment.Config(base=run[0] / "plain", budgets=(4.0,), tokens=600, out=run[0])
    with pytest.raises(ValueError, match="below the cheapest choice"): experiment.main(config)
