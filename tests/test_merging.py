"""Last, merged and decayed checkpoints: a linear model whose end points are known, windows and intervals by hand, and rows that add up."""
import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
experiment = importlib.import_module("merging")
model04, pretrain = importlib.import_module("04_model"), importlib.import_module("05_pretrain")
# the smallest sizes that stage 04 accepts, with every kind of layer and the MTP head
MICRO = model04.ModelConfig(pattern="MEM*E", d_model=32, vocab=320, heads=2, kv_heads=1, head_dim=16, mamba_heads=16, mamba_head_dim=2, groups=1,
                            state=8, chunk=16, experts=4, experts_per_token=2, latent=16, expert_width=16, shared_width=16)


@pytest.fixture
def micro(monkeypatch):
    """Preset tiny in a size that trains in no time."""
    monkeypatch.setitem(model04.PRESETS, "tiny", MICRO)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A file of small documents, and a run of twelve steps on it."""
    home = tmp_path_factory.mktemp("merging")
    documents = [f"Document {i}: " + " ".join(f"word{(i * j) % 97} and {i + j}." for j in range(1, 20)) for i in range(300)]
    (home / "text.jsonl").write_text("".join(json.dumps(dict(text=document)) + "\n" for document in documents))
    return experiment.Config(steps=12, window=4, every=1, batch=2, seq=32, lr=0.1, eval_windows=2, home=home, out=home / "rows",
                             data=(str(home / "text.jsonl"),))


@pytest.fixture
def data(texts):
    return pretrain.prepare_data(texts.data, texts.home / "data", MICRO.vocab)


# ---- a linear model

def linear(model, ids_bt, labels_bt, doc_bt, mask_bt, mtp_weight, aux_weight):
    """The gradient of every weight is 1 wherever the weights are, so each AdamW step moves by exactly the rate; expert 0 gets every token."""
    total = sum(p.sum() for p in model.parameters())
    load_me = torch.zeros(len(list(model.routers())), MICRO.experts)
    load_me[:, 0] = ids_bt.numel()
    return model04.Losses(total, total, [total, total], total, load_me)


def steps_taken(model, lr: float) -> float:
    """How far a norm's weight, which starts at 1 and has no weight decay, has moved, in steps of the constant rate."""
    w_d = model.state_dict()["backbone.norm_f.weight"]
    assert (w_d == w_d[0]).all()
    return (1 - w_d[0].item()) / lr


def test_end_points_of_a_linear_model(micro, texts, data, monkeypatch, tmp_path):
    """Steps 8 to 12 of a constant rate, whose sums are known: a window moved by one checkpoint, a decay over other steps, or weights of another
    timing give another number. Factors 1 - sqrt(t): right t = 1/5 .. 4/5, left t = 0/4 .. 3/4, the decay itself t = 1/4 .. 4/4."""
    monkeypatch.setattr(model04, "loss", linear)
    run = experiment.constant_run(texts, 0, data, tmp_path)
    assert [f.name for f in pretrain.checkpoints(run)] == [f"step-{n:06d}" for n in range(4, 13)]
    assert steps_taken(model04.load_checkpoint(run / "step-000012"), 0.1) == pytest.approx(12, abs=1e-4)      # the last step is like the others

    right, left, uniform = (experiment.merged_model(run, 12, 4, 1, w) for w in ("right", "left", "uniform"))
    assert steps_taken(right, 0.1) == pytest.approx(8 + 0.55279 + 0.36754 + 0.22540 + 0.10557, abs=1e-4)
    assert steps_taken(left, 0.1) == pytest.approx(8 + 1 + 0.5 + 0.29289 + 0.13397, abs=1e-4)
    assert steps_taken(uniform, 0.1) == pytest.approx(8 + 2, abs=1e-4)
    assert steps_taken(experiment.merged_model(run, 10, 2, 1, "uniform"), 0.1) == pytest.approx(9, abs=1e-4)      # the mean of 8, 9 and 10

    branch = experiment.decayed_run(texts, 0, data, run, 4, save_at=range(8, 13))
    end = 8 + 0.99 * (0.5 + 0.29289 + 0.13397 + 0) + 4 * 0.01      # from the rate down to a hundredth of it
    assert steps_taken(model04.load_checkpoint(branch / "step-000012"), 0.1) == pytest.approx(end, abs=1e-4)
    assert [f.name for f in pretrain.checkpoints(branch)] == [f"step-{n:06d}" for n in range(8, 13)]
    assert steps_taken(model04.load_checkpoint(branch / "step-000008"), 0.1) == pytest.approx(8, abs=1e-4)


def test_the_selection_bias_is_merged_too(micro, texts, data, monkeypatch, tmp_path):
    """It moves by 1e-3 a step outside the optimizer: a merge of parameters alone would leave the newest bias with averaged weights."""
    monkeypatch.setattr(model04, "loss", linear)
    run = experiment.constant_run(texts, 0, data, tmp_path)
    for router in experiment.merged_model(run, 12, 4, 1, "uniform").routers():
        torch.testing.assert_close(router.e_score_correction_bias.float(), torch.tensor([-0.010, 0.010, 0.010, 0.010]), rtol=0, atol=1e-6)


# ---- windows

def test_a_window_has_both_edges_and_keeps_the_order():
    """Oldest first, as the weights are; a window one checkpoint too short would begin after the decay it is compared with."""
    assert [f.name for f in experiment.window_of(Path("x"), end=20, window=8, every=4)] == ["step-000012", "step-000016", "step-000020"]
    config = experiment.Config(steps=400, window=48, every=4)
    assert config.windows == (48, 24, 12) and list(config.ends) == [352, 364, 376, 388, 400] and config.first == 304
    for end in config.ends: assert experiment.window_of(Path("x"), end, 48, 4)[0] >= Path("x/step-000304")


def test_a_decay_goes_on_with_the_same_text(micro, texts, data, tmp_path):
    """Real losses: the first decayed step sees the run's weights and the run's text, and then only the rate differs."""
    run = experiment.constant_run(texts, 0, data, tmp_path)
    branch = experiment.decayed_run(texts, 0, data, run, 4)
    constant, decayed = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (run, branch))
    assert [r["step"] for r in decayed] == [9, 10, 11, 12] and decayed[0]["loss"] == constant[8]["loss"] and decayed[1]["loss"] != constant[9]["loss"]
    assert [r["lr"] for r in constant] == [0.1] * 12
    assert [r["lr"] for r in decayed] == pytest.approx([0.001 + 0.099 * x for x in (0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0)])
    other = experiment.constant_run(texts, 1, data, tmp_path / "other")
    assert json.loads((other / "metrics.jsonl").read_text().splitlines()[0])["loss"] != constant[0]["loss"]


def test_a_stopped_run_goes_on_with_the_numbers_it_would_have_had(micro, texts, data, tmp_path, monkeypatch):
    """Stopped after step 6 of 12 and begun again: the same weights to the bit, and every checkpoint that a window needs."""
    whole, fit = experiment.constant_run(texts, 0, data, tmp_path / "whole"), pretrain.Trainer.fit
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain.Trainer, "fit", lambda self, until, **rest: fit(self, 6, **rest) and False)
        experiment.constant_run(texts, 0, data, tmp_path / "stopped")
    again = experiment.constant_run(texts, 0, data, tmp_path / "stopped")
    assert [f.name for f in pretrain.checkpoints(again)] == [f"step-{n:06d}" for n in range(4, 13)]
    assert len((again / "metrics.jsonl").read_text().splitlines()) == 12
    ends = (model04.load_checkpoint(folder / "step-000012").state_dict() for folder in (whole, again))
    for x, y in zip(*map(dict.values, ends)): assert torch.equal(x, y)


# ---- numbers

def test_bits_per_byte_of_a_model_that_knows_nothing(micro, texts, data, tmp_path):
    """Equal logits cost log2(320) bits a predicted token; all sources in one ratio, not a mean of ratios (which is another number here)."""
    model, held_out, tokens, size = model04.Nemotron(MICRO), {}, [], []
    torch.nn.init.zeros_(model.lm_head.weight)
    for name, documents in (("words", ["word5 and word7."] * 30), ("signs", ["<<>> ;; ##", "!?"] * 5)):
        pretrain.Shard.write(tmp_path / f"{name}.bin", documents, data.tokenizer)
        held_out[name] = pretrain.Shard(tmp_path / f"{name}.bin")
        ids = [data.tokenizer.encode(document) for document in documents]
        tokens.append(sum(len(x) for x in ids))      # a document's first token is predicted by nobody, its </s> is
        size.append(sum(len(data.tokenizer.decode(x[1:])) for x in ids))      # and has no bytes
    assert tokens[0] / size[0] < 0.8 * tokens[1] / size[1]
    found = experiment.held_out_loss(model, dataclasses.replace(texts, eval_windows=1000), data._replace(held_out=held_out))
    assert found == pytest.approx(math.log2(320) * sum(tokens) / sum(size), rel=1e-5)


def test_intervals_by_hand():
    """Student's t of three values is 4.303: 1 2 3 has 2 ± 4.303 / sqrt(3). Two values: 12.706 times half their distance. One value says nothing."""
    assert experiment.interval([1.0, 2.0, 3.0]) == dict(by_seed=[1.0, 2.0, 3.0], mean=2.0, deviation=1.0, half=pytest.approx(2.48434, abs=1e-5))
    assert experiment.interval([0.0, 1.0])["half"] == pytest.approx(6.353, abs=1e-3)
    assert experiment.interval([0.5]) == dict(by_seed=[0.5], mean=0.5, deviation=None, half=None)
    verdicts = {(-5.0, -4.0, -6.0): "lower, at 95 %", (5.0, 4.0, 6.0): "higher, at 95 %", (-5.0,): "one seed: no statement",
                (-1.0, -2.0, -3.0): "no difference beyond the spread of the seeds"}
    for values, says in verdicts.items(): assert experiment.verdict(experiment.interval(list(values))) == says


def made_up(level: float) -> dict:
    """Losses of a seed whose checkpoints all lie at `level`, merged and decayed ones a little below, by amounts that say what they are."""
    config = experiment.Config(steps=100, window=8, every=2)
    gain = {"right": 0.1, "left": 0.2, "uniform": 0.3}
    return dict(last={step: level for step in range(84, 101, 2)},
                merged={k: {w: {e: level - g - w / 100 + (100 - e) for e in (config.ends if k == "right" else [100])} for w in (8, 4, 2)}
                        for k, g in gain.items()},
                decayed={w: level - 0.5 - w / 100 for w in (8, 4, 2)}, decay_path={e: level for e in config.ends},
                merged_after_decay={w: level - 0.5 - 0.08 + w / 1000 for w in (8, 4, 2)})


def test_differences_are_taken_within_a_seed():
    """Seeds that lie whole bits apart and agree in every difference have no spread; each name gets its own pair. Ends 92 94 96 98 100 in a mean."""
    found = experiment.differences(experiment.Config(steps=100, window=8, every=2), [made_up(level) for level in (1.0, 5.0, 3.0)])
    expected = {"merged right 8 - last": -0.18, "merged left 4 - last": -0.24, "merged uniform 2 - last": -0.32,
                "merged right 2 - last, mean of 5 ends": -0.12 + 4, "decayed 8 - last": -0.58, "decayed 2 - last": -0.52,
                "merged right 4 - decayed 4": 0.40, "after the decay: merged right 8 - last": 0.008, "after the decay: merged right 2 - last": 0.002}
    assert {name: found[name]["mean"] for name in expected} == pytest.approx(expected)
    assert all(d["deviation"] == pytest.approx(0, abs=1e-9) and len(d["by_seed"]) == 3 for d in found.values()) and len(found) == 21


# ---- the command

def test_the_command_leaves_rows_and_a_figure(micro, texts, capsys, monkeypatch):
    """A row a seed, a row of the differences that follow from it, the same number in the table; no checkpoint stays. --resume trains nothing anew,
    but only with the same settings."""
    pytest.importorskip("matplotlib")      # a GPU machine may lack what only figures need
    experiment.main(texts)
    seed, total = (json.loads(line) for line in (texts.out / "results.jsonl").read_text().splitlines())
    losses, found = seed["bits_per_byte"], total["bits_per_byte"]["merged left 4 - last"]
    assert (seed["what"], seed["seed"], total["what"], total["seeds"]) == ("seed", 0, "differences", 1)
    assert found["mean"] == pytest.approx(losses["merged"]["left"]["4"]["12"] - losses["last"]["12"], abs=3e-5) and abs(found["mean"]) > 1e-3
    assert losses["decay_path"]["8"] == losses["last"]["8"] and losses["decay_path"]["12"] == losses["decayed"]["4"]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("merged left 4 - last "))
    assert float(line.split()[5]) == pytest.approx(found["mean"], abs=1e-4) and (texts.home / "merging.png").stat().st_size > 10_000
    assert not list((texts.home / "merging").iterdir())

    def no_training(*_): raise AssertionError("trained again")
    monkeypatch.setattr(experiment, "measure_seed", no_training)
    experiment.main(dataclasses.replace(texts, resume=True))
    again = json.loads((texts.out / "results.jsonl").read_text().splitlines()[-1])
    assert again["bits_per_byte"] == total["bits_per_byte"]
    for change in (dict(resume=False), dict(resume=True, lr=0.2), dict(resume=True, seeds=2)):
        with pytest.raises(AssertionError, match="trained again"): experiment.main(dataclasses.replace(texts, **change))


def test_the_figure_says_on_which_side_the_merged_window_lies(tmp_path, monkeypatch):
    """Three seeds: the title follows the sign, and every difference of the right plot is where its row says."""
    pytest.importorskip("matplotlib")
    kept, nvfp4 = [], importlib.import_module("01_nvfp4")
    monkeypatch.setattr(nvfp4, "save_figure", lambda fig, path: kept.append(fig))
    config, seeds = experiment.Config(steps=100, window=8, every=2), [made_up(level) for level in (1.0, 5.0, 3.0)]
    found = experiment.differences(config, seeds)
    experiment.plot(config, seeds, found, tmp_path / "x.png")
    found["merged right 8 - last"]["mean"] *= -1
    experiment.plot(config, seeds, found, tmp_path / "x.png")
    assert "merged window lies 0.180 below" in kept[0].axes[0].get_title()
    assert "merged window lies 0.180 above" in kept[1].axes[0].get_title()
    right = kept[0].axes[1]
    points = {label.get_text(): line.get_xdata()[0] for label, line in zip(right.get_yticklabels(), (c.lines[0] for c in right.containers))}
    assert points["minus-sqrt, left, 4 steps"] == pytest.approx(-0.24) and points["equal weights, 2 steps"] == pytest.approx(-0.32)
    assert points["real decay, 8 steps"] == pytest.approx(-0.58) and len(points) == 12


def test_text_without_a_held_out_part_is_refused(micro, texts, tmp_path):
    """A file of plain text is one document, and it is trained on: nothing to score would be a division by zero, minutes later."""
    (tmp_path / "one.txt").write_text("one document, again and again. " * 200)
    with pytest.raises(ValueError, match="no held-out text"): experiment.main(dataclasses.replace(texts, data=(str(tmp_path / "one.txt"),)))


@pytest.mark.parametrize("change, says", [(dict(window=50), "multiple of 4"), (dict(steps=97), "in the warmup"), (dict(lr=0.0), "lr = 0.0"),
                                          (dict(seeds=0), "seeds = 0"), (dict(every=0), "every = 0")])
def test_a_setting_that_measures_nothing_is_named(change, says):
    """A window that is no whole number of checkpoints, or one that begins before the constant rate, compares something else."""
    with pytest.raises(ValueError, match=says): experiment.Config(**{"steps": 400, "window": 48, "every": 4, **change})
