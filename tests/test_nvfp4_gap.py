"""The cost of four bits: runs and branches that stop and go on, ablations that change what they say, and gaps worked out by hand."""
import importlib
import itertools
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
experiment = importlib.import_module("nvfp4_gap")
nvfp4, model04, pretrain = (importlib.import_module(name) for name in ("01_nvfp4", "04_model", "05_pretrain"))
# every kind of layer, all widths of 4-bit layers multiples of MXFP4's 32; the last 15 % of 5 layers are layer 4, with experts
MICRO = model04.ModelConfig(pattern="MEM*E", d_model=32, vocab=320, heads=2, kv_heads=1, head_dim=16, mamba_heads=32, mamba_head_dim=1, groups=1,
                            state=16, chunk=16, experts=4, experts_per_token=2, latent=32, expert_width=32, shared_width=32)
KINDS = ("high-precision", "late-forward-switch")
SIZES = experiment.Sizes(MICRO, steps=8, short_steps=4, branch_steps=2, batch=2, seq=24, lr=4e-3, least_megabytes=0.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Sources of a made-up package: 150 files of a few functions each, of which some will be held out."""
    home = tmp_path_factory.mktemp("gap")
    (home / "src").mkdir()
    for i in range(150):
        functions = (f"def area_{i}_{k}(width, height):\n    return {k} * width * height + {i}\n\n\n" for k in range(3))
        (home / "src" / f"module_{i}.py").write_text("".join(functions))
    return home


@pytest.fixture
def config(home, tmp_path, monkeypatch):
    """A CPU run of the micro model; text and tokens are shared by all tests, runs are not."""
    monkeypatch.setitem(experiment.PRESETS, "tiny", SIZES)
    return experiment.Config(preset="tiny", data=(f"{home}/src/*.py",), home=tmp_path / "runs", out=tmp_path, rows=(), figure=tmp_path / "gap.png",
                             device="cpu", max_epochs=1e6)


@pytest.fixture
def data(config, home):
    return experiment.prepare(replace(config, home=home))


def numbers(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "seconds")} for row in rows]


def job_of(config, name, seed=0):
    """A run to its end, or the first branch of that name."""
    if name in experiment.TRUNKS: return experiment.Job(name, seed, config.sizes.steps)
    return next(job for job in experiment.branch_jobs(config, seed) if job.run == name)


def run(config, data, job, steps=math.inf, monkeypatch=None) -> bool:
    """One call that has time for so many steps: a clock that ticks when it is looked at, once at the start and once before each step."""
    job = job_of(config, job) if isinstance(job, str) else job
    if monkeypatch: monkeypatch.setattr(experiment, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    return experiment.advance(config, job, data, steps + 1)


def metrics(config, job) -> list[dict]:
    return experiment.read_metrics(experiment.folder_of(config, job_of(config, job) if isinstance(job, str) else job))


def rows_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def facts(rows: list[dict]) -> list[str]:
    """What rows say, whenever and wherever they were found."""
    keys = ("what", "run", "kind", "seed", "same", "share", "steps", "branch_steps", "gap", "curve", "held_out", "data", "reference")
    return sorted(json.dumps([row.get(key) for key in keys]) for row in rows)


def names_of(folders) -> list[str]:
    return [folder.name for folder in folders]


# ---- training

@pytest.mark.parametrize("name, trunk", [("nvfp4", None), ("no-stochastic-rounding", "fp32"), ("late-forward-switch", "nvfp4")])
def test_training_cut_into_pieces_has_the_numbers_of_a_whole_one(name, trunk, config, data, tmp_path, monkeypatch):
    """Pieces of 1, 2 and 99 steps of a run and of branches: a lost moment, another draw, or a branch that begins anew shows."""
    whole, job = replace(config, home=tmp_path / "whole"), job_of(config, name)
    if trunk: job = job._replace(until=job.start + 4)
    for where in (whole, config): assert trunk is None or run(where, data, experiment.Job(trunk, 0, 6))
    assert run(whole, data, job)
    assert [run(config, data, job, steps, monkeypatch=monkeypatch) for steps in (1, 2, 99, 99)] == [False, False, True, True]
    rows = metrics(config, job)
    assert [row["step"] for row in rows] == [*range(job.start + 1, job.until + 1)] and numbers(rows) == numbers(metrics(whole, job))
    a, b = (json.loads((experiment.folder_of(where, job) / "done.json").read_text()) for where in (whole, config))
    assert facts([a]) == facts([b]) and len(rows_in(tmp_path)) == 2      # one row each, none from the call that found it ended
    if trunk is None: assert a["curve"] == pytest.approx([row["loss"] for row in rows], abs=1e-6) and a["held_out"] > 0


def test_a_call_that_was_killed_goes_on_from_its_last_save(config, data, tmp_path, monkeypatch):
    """Steps after the last checkpoint are run again and stand once in the metrics; a damaged checkpoint is passed over. A run that was killed behind
    its last step still owes its row."""
    assert run(replace(config, home=tmp_path / "whole"), data, "fp32")
    run(config, data, "fp32", 3, monkeypatch=monkeypatch)
    run(config, data, "fp32", 2, monkeypatch=monkeypatch)
    folder = experiment.folder_of(config, job_of(config, "fp32"))
    (folder / "step-000005" / "files.json").unlink()
    assert run(config, data, "fp32", 99, monkeypatch=monkeypatch)
    assert numbers(metrics(config, "fp32")) == numbers(metrics(replace(config, home=tmp_path / "whole"), "fp32"))
    (folder / "done.json").unlink()
    assert run(config, data, "fp32", 99, monkeypatch=monkeypatch) and (folder / "done.json").exists() and len(rows_in(tmp_path)) == 3


def test_a_call_without_time_says_what_is_left(config, data, capsys, monkeypatch):
    """No minutes, no step and no folder of a run; then one call with time for a run, after which nothing is left."""
    experiment.main(replace(config, minutes=0.0, seeds=(0, 1)))
    text = capsys.readouterr().out
    assert all(f"{name}, seed {seed}: step 0 of 8" in text for name in ("fp32", "nvfp4") for seed in (0, 1))
    assert "fp32 from step 6 of nvfp4, seed 1: step 6 of 8" in text and "the same command goes on" in text
    assert not list(config.home.glob("tiny-seed*"))
    experiment.main(replace(config, minutes=5.0, runs=("fp32",)))
    assert "all runs have ended" in capsys.readouterr().out and names_of(config.home.glob("tiny-seed*")) == ["tiny-seed-0-fp32"]
    monkeypatch.setattr(experiment.importlib.util, "find_spec", lambda name: None if name == "rustbpe" else name)
    with pytest.raises(ValueError, match="^needs rustbpe, not installed here: pip install rustbpe"): experiment.main(config)


def test_ablations_train_no_further_than_they_must_and_the_pair_goes_on(config, data, tmp_path, monkeypatch):
    """Ablations first leave the reference at step 2 + 4 and NVFP4 at 2 + 2. The pair that goes on from there, and ablations that follow a whole
    pair, have the same rows: a run that starts anew, or a checkpoint tidied away before its last branch, shows."""
    monkeypatch.setattr(experiment, "prepare", lambda config: data)
    monkeypatch.setattr(experiment, "free_memory", lambda: None)      # nothing to free here, and a long look at the whole process
    early, late = (replace(config, home=tmp_path / name, out=tmp_path / name, minutes=5.0) for name in ("early", "late"))
    trunk = lambda at, name: at.home / f"tiny-seed-0-{name}"
    experiment.main(replace(early, runs=("ablations",)))
    for name, end in (("fp32", 6), ("nvfp4", 4)):
        assert len(metrics(early, name)) == end and not (trunk(early, name) / "done.json").exists()
        assert names_of(pretrain.checkpoints(trunk(early, name))) == ["step-000002", f"step-00000{end}"]
    first = [(row["what"], row.get("run", row.get("kind")), row["share"]) for row in rows_in(early.out)]
    assert first == [*(("ablation", name, 0.25) for name in experiment.ABLATIONS), *(("branch", kind, 0.25) for kind in KINDS)]
    experiment.main(early)
    experiment.main(replace(early, runs=("ablations",)))      # the switch at the later points
    experiment.main(late)
    assert [names_of(pretrain.checkpoints(trunk(late, name))) for name in ("fp32", "nvfp4")] == [
        ["step-000002", "step-000008"], ["step-000002", "step-000004", "step-000006", "step-000008"]]
    experiment.main(replace(late, runs=("ablations",)))
    assert facts(rows_in(early.out)) == facts(rows_in(late.out)) and len(rows_in(late.out)) == 2 + 6 + 2 * 3
    for name in ("fp32", "nvfp4"):
        assert numbers(metrics(early, name)) == numbers(metrics(late, name))
        for at in (early, late): assert names_of(trunk(at, name).glob("**/step-*")) == ["step-000008"]      # no point is needed any more


def test_many_short_calls_have_the_rows_of_a_long_one(config, data, tmp_path, monkeypatch, capsys):
    """Calls that end after seven looks at the clock, in the middle of runs and branches, say what is left until nothing is."""
    monkeypatch.setattr(experiment, "prepare", lambda config: data)
    monkeypatch.setattr(experiment, "free_memory", lambda: None)      # nothing to free here, and a long look at the whole process
    config = replace(config, runs=("nvfp4", "mxfp4", "late-forward-switch"))
    long, short = (replace(config, home=tmp_path / name, out=tmp_path / name) for name in ("long", "short"))
    experiment.main(long)
    assert "all runs have ended" in capsys.readouterr().out
    calls, text = 0, ""
    while "all runs have ended" not in text and calls < 40:
        monkeypatch.setattr(experiment, "time", SimpleNamespace(monotonic=itertools.count().__next__))
        experiment.main(replace(short, minutes=7 / 60))
        calls, text = calls + 1, capsys.readouterr().out
        assert ("the same command goes on" in text) != ("all runs have ended" in text)
    assert 5 < calls < 40 and facts(rows_in(short.out)) == facts(rows_in(long.out))


def test_a_pair_shares_start_and_data(config, data):
    """A gap between two starts, or two texts, would be no gap of precision; another seed changes both."""
    high, four, other = (experiment.open_run(config, job_of(config, name, seed), data) for name, seed in (("fp32", 0), ("nvfp4", 0), ("fp32", 1)))
    state, same, differs = (trainer.model.state_dict() for trainer in (high, four, other))
    assert all(torch.equal(state[k], same[k]) for k in state) and not all(torch.equal(state[k], differs[k]) for k in state)
    assert all(torch.equal(x, y) for x, y in zip(high.batches(5), four.batches(5)))
    assert not torch.equal(high.batches(5).ids_bt, other.batches(5).ids_bt)
    assert four.config.precision == "nvfp4" and high.config.precision == "fp32"


def recipes(model) -> dict[str, "nvfp4.NVFP4Recipe"]:
    """Layer name -> recipe, of the layers in 4 bits."""
    return {name: m.recipe for name, m in model.named_modules() if isinstance(m, nvfp4.NVFP4Linear) or
            type(m).__name__ == "Experts" and m.recipe is not None}


# the layers in 4 bits by hand: Mamba's in_proj in layers 0 and 2, experts in 1; layer 3 is attention, 4 among the last 15 %, MTP's never
FOUR_BITS = {"backbone.layers.0.mixer.in_proj", "backbone.layers.2.mixer.in_proj", "backbone.layers.1.mixer.experts",
             "backbone.layers.1.mixer.shared_experts.up_proj", "backbone.layers.1.mixer.shared_experts.down_proj"}
LAST = {"backbone.layers.4.mixer.experts", "backbone.layers.4.mixer.shared_experts.up_proj", "backbone.layers.4.mixer.shared_experts.down_proj"}


@pytest.fixture
def trunks(config, data):
    """The micro model's runs, as far as ablations and the first switch need them."""
    for name, end in (("fp32", 6), ("nvfp4", 4)): assert run(config, data, experiment.Job(name, 0, end))
    return config


@pytest.mark.parametrize("name, switch, layers", [
    ("nvfp4", {}, FOUR_BITS), ("whole-recipe", {}, FOUR_BITS), ("no-stochastic-rounding", dict(stochastic_gradients=False), FOUR_BITS),
    ("no-rht", dict(rht=False), FOUR_BITS), ("weight-rows", dict(weight_tiles=False), FOUR_BITS), ("mxfp4", dict(format="mxfp4"), FOUR_BITS),
    ("no-high-layers", {}, FOUR_BITS | LAST), ("late-forward-switch", dict(forward=False), FOUR_BITS), ("fp32", None, set())])
def test_a_run_changes_what_its_name_says_and_nothing_else(name, switch, layers, trunks, data, monkeypatch):
    """Switches and layers written out, on weights, moments, data and rates of the checkpoint; the same again after a stop, when the layers are
    swapped on the branch's own checkpoint."""
    job = job_of(trunks, name)
    for where in ("new", "resumed"):
        trainer = experiment.open_run(trunks, job, data)
        found = recipes(trainer.model)
        assert set(found) == layers
        if layers: assert set(found.values()) == {nvfp4.NVFP4Recipe(**switch)}
        if where == "new" and job.trunk:
            origin = pretrain.Trainer.load(experiment.folder_of(trunks, job).parent / "step-000002", experiment.settings(trunks, job.trunk, 0),
                                           trainer.batches, trunks.home, tokenizer=data.tokenizer)
            assert trainer.step == origin.step == 2 and trainer.rows == []
            for (key, a), (_, b) in zip(trainer.model.state_dict().items(), origin.model.state_dict().items(), strict=True): assert a.equal(b), key
            for a, b in zip(trainer.model.parameters(), origin.model.parameters(), strict=True):
                assert all(trainer.optimizer.state[a][k].equal(x) for k, x in origin.optimizer.state[b].items()) and origin.optimizer.state[b]
        if where == "new": run(trunks, data, job, 1, monkeypatch=monkeypatch)
    assert trainer.step == dict(nvfp4=5, fp32=7).get(name, 3)
    if job.trunk: assert trainer.rows[0]["lr"] == metrics(trunks, job.trunk)[2]["lr"] == SIZES.lr      # the plateau


def test_the_placement_is_whole_again_after_a_run_without_its_rule(trunks, data):
    """Later models of the process would silently lose their high-precision layers; an error in between must not change that."""
    before = list(model04.PLACEMENT)
    experiment.open_run(trunks, job_of(trunks, "no-high-layers"), data)
    assert model04.PLACEMENT == before and [rule for rule in before if rule[0] == "<last 15 % of layers>"]
    with pytest.raises(KeyError), experiment.last_layers(high=False):
        assert [rule for rule in before if rule not in model04.PLACEMENT] == [("<last 15 % of layers>", "high", "linears of the last 15 % of layers")]
        raise KeyError
    assert model04.PLACEMENT == before
    assert set(recipes(experiment.open_run(trunks, job_of(trunks, "whole-recipe"), data).model)) == FOUR_BITS


def test_an_ablation_begins_at_the_references_next_loss(trunks, data):
    """In the reference's own precision a branch is the reference, to the bit, and its gap is 0. In 4 bits its first loss is that of the checkpoint's
    weights, quantized, on the reference's next batch. What changes the backward pass only leaves this loss alone and changes the next one."""
    next_rows, at = metrics(trunks, "fp32")[2:6], experiment.folder_of(trunks, job_of(trunks, "fp32")) / "step-000002"
    again = job_of(trunks, "whole-recipe")._replace(run="fp32")
    assert run(trunks, data, again) and numbers(metrics(trunks, again)) == numbers(next_rows) and rows_in(trunks.out)[-1]["gap"] == 0
    losses = {name: [experiment.open_run(trunks, job_of(trunks, name), data)] for name in experiment.ABLATIONS}
    losses = {name: [trainer.train_step()["loss"] for _ in range(2)] for name, (trainer,) in losses.items()}
    for name, recipe in (("whole-recipe", {}), ("weight-rows", dict(weight_tiles=False)), ("mxfp4", dict(format="mxfp4"))):
        model = model04.apply_recipe(model04.load_checkpoint(at), nvfp4.NVFP4Recipe(**recipe)).train()
        assert losses[name][0] == model04.loss(model, *experiment.batches_of(trunks, 0, data)(2)).main.item()
        assert 0 < abs(losses[name][0] - next_rows[0]["loss"]) < abs(next_rows[1]["loss"] - next_rows[0]["loss"])      # less than a step of training
    whole = losses.pop("whole-recipe")
    assert {name for name, pair in losses.items() if pair[0] == whole[0]} == {"no-stochastic-rounding", "no-rht"}
    assert all(pair[1] != whole[1] for pair in losses.values()) and len({pair[1] for pair in losses.values()}) == 5


def test_gaps_are_taken_over_the_second_half_of_the_same_steps(trunks, data):
    """An ablation's is its own loss over the reference's, steps 5 and 6 of 3 to 6; that of a branch of NVFP4 is the run's loss over the branch's,
    step 4 of 3 and 4. Another sign, other steps or another run to compare with shows."""
    fp32, four = (metrics(trunks, name) for name in ("fp32", "nvfp4"))
    for name in ("mxfp4", "late-forward-switch"): assert run(trunks, data, name)
    assert run(trunks, data, (leaves := job_of(trunks, "nvfp4")._replace(run="fp32", until=4, trunk="nvfp4", start=2)))
    mine, switch, high = (metrics(trunks, job) for job in ("mxfp4", "late-forward-switch", leaves))
    assert [[row["step"] for row in rows] for rows in (mine, switch, high)] == [[3, 4, 5, 6], [3, 4], [3, 4]]
    ablation, forward, branch = rows_in(trunks.out)
    want = (mine[2]["loss"] + mine[3]["loss"]) / (fp32[4]["loss"] + fp32[5]["loss"]) - 1
    assert ablation["gap"] == pytest.approx(want, abs=1e-6) and want != 0
    for row, rows in ((forward, switch), (branch, high)):
        assert row["gap"] == pytest.approx((four[3]["loss"] - rows[1]["loss"]) / rows[1]["loss"], abs=1e-6) and row["gap"] != 0
    assert (ablation["what"], ablation["run"], ablation["share"], ablation["steps"]) == ("ablation", "mxfp4", 0.25, 4)
    assert [(row["what"], row["kind"], row["precision"]) for row in (branch, forward)] == [
        ("branch", "high-precision", "fp32"), ("branch", "late-forward-switch", "nvfp4")]


def test_a_branch_of_another_run_is_refused(trunks, data):
    """Without its checkpoint, with another learning rate, or behind other steps than its run has trained, its gap would be of something else."""
    with pytest.raises(ValueError, match="was trained with lr = 0.004, not 0.001"): run(replace(trunks, lr=1e-3), data, "whole-recipe")
    with pytest.raises(AssertionError, match="has not trained the same steps"):
        run(trunks, data, job_of(trunks, "whole-recipe")._replace(until=7))
    shutil.rmtree(experiment.folder_of(trunks, job_of(trunks, "fp32")) / "step-000002")
    with pytest.raises(ValueError, match="step-000002 has no files.json.*delete .*tiny-seed-0-fp32 to train that run"): run(trunks, data, "no-rht")


# ---- text

def test_sources_become_pieces_once(tmp_path):
    """Copies, generated tables and other encodings stay out; later calls find the first text, or a resumed run would read another one."""
    (tmp_path / "a.py").write_text("x = 1\n\n" * 1000)      # 7,000 characters, a blank line every 7
    (tmp_path / "b.py").write_text("x = 1\n\n" * 1000)
    (tmp_path / "c.py").write_text("y" * (2**18 + 1))
    (tmp_path / "d.py").write_bytes("é".encode("latin-1"))
    (tmp_path / "e.txt").write_text("no source")
    path = experiment.gather_sources([f"{tmp_path}/*.py"], tmp_path / "home", 100.0)
    about = json.loads(path.with_suffix(".json").read_text())
    assert about == dict(files=1, bytes=7000, pieces=2, copies=1, large=1, not_utf8=1)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert "".join(texts) == "x = 1\n\n" * 1000 and 4000 < len(texts[0]) <= 4007
    (tmp_path / "f.py").write_text("z = 2\n")
    assert experiment.gather_sources([f"{tmp_path}/*.py"], tmp_path / "home", 100.0) == path and len(path.read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="no file matches"): experiment.gather_sources([f"{tmp_path}/*.c"], tmp_path / "home", 100.0)


def test_too_little_text_is_refused(config, home, data, monkeypatch, capsys):
    """A model that has read its text ten times, or a pair on a few megabytes, would say nothing about pretraining."""
    tokens = sum(len(shard.tokens) for shard in data.train.values())
    epochs = experiment.describe(config, data)
    assert epochs == pytest.approx(8 * 2 * 24 / tokens)
    assert f"{epochs:.2f} epochs" in capsys.readouterr().out
    with pytest.raises(ValueError, match="would read the text .* times"): experiment.describe(replace(config, max_epochs=0.99 * epochs), data)
    monkeypatch.setitem(experiment.PRESETS, "tiny", replace(SIZES, least_megabytes=100.0))
    with pytest.raises(ValueError, match="the text has 0 MB and preset tiny asks for 100"): experiment.prepare(replace(config, home=home))


# ---- what a GPU will run

def test_preset_gap_is_what_the_text_says():
    """About 110M parameters, counted on the model itself; 200M tokens a pair; ablations of three branches' length, on the schedule's plateau."""
    sizes = experiment.PRESETS["gap"]
    with torch.device("meta"): model = model04.Nemotron(sizes.model, nvfp4.NVFP4Recipe(format="mxfp4"))      # all widths fit MXFP4's blocks
    trunk = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mtp."))
    assert 105e6 < trunk < 120e6 and sizes.model.mtp_depths == 2
    assert sizes.steps * sizes.batch * sizes.seq >= 200e6 and sizes.least_megabytes >= 100 and sizes.short_steps == 3 * sizes.branch_steps
    config = experiment.Config(runs=("ablations",), device="cuda")
    assert config.max_epochs == 6 and [(job.run, job.until) for job in experiment.jobs(config, 0)][:2] == [("bf16", 960), ("nvfp4", 832)]
    rates = experiment.settings(experiment.Config(device="cpu"), "fp32", 0)
    assert rates.warmup_steps < 768 and 960 < sizes.steps - rates.decay_steps
    # [DeepSeek]'s laws at 1e20 FLOP by logarithms: 0.3118 · 10^-2.5 and 0.2920 · 10^6.542
    lr, batch = experiment.deepseek_laws(1e20)
    assert lr == pytest.approx(9.86e-4, rel=1e-3) and batch == pytest.approx(1.017e6, rel=1e-3)


def test_runs_are_named_and_impossible_ones_refused():
    names = experiment.Config(runs=("ablations", "mxfp4"), device="cpu").names
    assert names == ("whole-recipe", "no-stochastic-rounding", "no-rht", "weight-rows", "no-high-layers", "mxfp4", "late-forward-switch")
    assert experiment.Config(device="cpu").names == ("fp32", "nvfp4") and experiment.Config(device="cuda").names == ("bf16", "nvfp4")
    with pytest.raises(ValueError, match="unknown run 'nvfp5'"): experiment.Config(runs=("nvfp5",))
    with pytest.raises(ValueError, match="its pair is fp32, not bf16"): experiment.Config(runs=("bf16", "nvfp4"), device="cpu")
    with pytest.raises(ValueError, match="its pair is bf16, not fp32"): experiment.Config(runs=("fp32",), device="cuda")
    for given in (dict(short_steps=46), dict(branch_steps=13), dict(branch_steps=0), dict(steps=10)):      # tiny's points are 15, 30 and 48 of 60
        with pytest.raises(ValueError, match="steps have no room for branches"): experiment.Config(preset="tiny", device="cpu", **given)
    experiment.Config(preset="tiny", device="cpu", short_steps=45, branch_steps=12)
    assert experiment.missing("json") is None and experiment.missing("json", "no_such_package").startswith("needs no_such_package, not installed")


def test_each_call_has_the_jobs_that_it_asks_for(tmp_path):
    """Runs first, then the branches that they reach: the switch has its branch in the reference's precision beside it, a pair no ablations."""
    of = lambda *runs: list(experiment.jobs(experiment.Config(runs=runs, preset="tiny", device="cpu", home=tmp_path), 3))
    jobs, ends = (lambda *runs: [str(job) for job in of(*runs)]), (lambda *runs: [job.until for job in of(*runs)])
    leaves = [f"fp32 from step {point} of nvfp4, seed 3" for point in (15, 30, 48)]
    assert jobs() == ["fp32, seed 3", "nvfp4, seed 3", *leaves] and ends() == [60, 60, 19, 34, 52]
    assert jobs("fp32") == ["fp32, seed 3"] and jobs("nvfp4") == ["nvfp4, seed 3", *leaves]
    assert jobs("mxfp4") == ["fp32, seed 3", "mxfp4 from step 15 of fp32, seed 3"] and ends("mxfp4") == [23, 23]
    switch = ["nvfp4, seed 3", leaves[0], "late-forward-switch from step 15 of nvfp4, seed 3"]
    assert jobs("late-forward-switch") == switch and ends("late-forward-switch") == [19, 19, 19]
    ablations = [f"{name} from step 15 of fp32, seed 3" for name in experiment.ABLATIONS]
    assert jobs("ablations") == ["fp32, seed 3", "nvfp4, seed 3", *ablations, *switch[1:]]
    assert len(jobs("fp32", "nvfp4", "ablations")) == 2 + 6 + 6 and ends("fp32", "ablations")[:2] == [60, 19]


# ---- gaps

def test_a_curve_is_the_mean_loss_of_each_part(monkeypatch):
    """Parts of equal length, none for a part that has not ended; 7 steps in 3 parts end at 2, 4 and 7."""
    rows = lambda *losses: [dict(loss=x) for x in losses]
    monkeypatch.setattr(experiment, "PARTS", 3)
    assert experiment.curve(rows(4, 4, 3, 1, 2, 2), 6) == [4, 2, 2]
    assert experiment.curve(rows(1, 3, 5, 7, 1, 2, 6), 7) == [2, 6, 3] and experiment.curve(rows(1, 3, 5, 7, 1, 2), 7) == [2, 6]
    assert experiment.curve(rows(5, 7), 2) == [5, 7]      # fewer steps than parts


def test_students_t_holds_95_percent():
    """The table against the density, integrated: one wrong digit would make an interval too narrow and a claim too strong."""
    for df, t in enumerate(experiment.T95, 1):
        x = torch.linspace(-t, t, 200_001, dtype=torch.float64)
        density = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi) * (1 + x * x / df) ** (-(df + 1) / 2)
        rounding = 1e-4 * density[-1].item()      # of the fourth decimal, at both ends
        assert torch.trapezoid(density, x).item() == pytest.approx(0.95, abs=rounding)


def test_an_interval_by_hand():
    """1, 2 and 3 %: mean 2, standard deviation 1, half width 4.3027 / sqrt(3) = 2.4842; one seed has no interval."""
    assert experiment.interval([0.01, 0.02, 0.03]) == pytest.approx((0.02, -0.004842, 0.044842), abs=1e-6)
    assert experiment.interval([0.5, 0.7]) == pytest.approx((0.6, 0.6 - 1.27062, 0.6 + 1.27062), abs=1e-5)      # 12.7062 · 0.141421 / sqrt(2)
    assert experiment.interval([0.02]) == (0.02, None, None)


def write_runs(path: Path, config, names: dict[str, list], text="abc") -> None:
    """A row for each run and seed from made-up metrics: names[run][seed] is its loss by step, with the held-out text 10 % below the last."""
    for name, seeds in names.items():
        for seed, losses in enumerate(seeds):
            rows = [dict(step=i, loss=loss) for i, loss in enumerate(losses, 1)]
            nvfp4.write_row(path, "nvfp4_gap", what="run", run=name, seed=seed, same=config.same, data=text, held_out=0.9 * losses[-1],
                            curve=experiment.curve(rows, config.sizes.steps))


def write_gaps(path: Path, config, what: str, gaps: list[float], text="abc", **row) -> None:
    """A row for each seed's gap, of a branch or an ablation."""
    for seed, gap in enumerate(gaps):
        nvfp4.write_row(path, "nvfp4_gap", what=what, seed=seed, same=config.same, reference="fp32", data=text, gap=gap, **row)


def losses(warm, stable, late, end, steps=200):
    """Warmup of 4 %, up to the last twentieth before the decay, that twentieth, the decay."""
    return [warm] * (steps // 25) + [stable] * (steps * 66 // 100) + [late] * (steps // 20) + [end] * (steps // 4)


@pytest.fixture
def made_up(config, tmp_path):
    """Three pairs with gaps of 1, 2 and 3 % in the decay; branches and ablations of two seeds, one branch as older rows have it."""
    config = replace(config, steps=200, short_steps=100)
    pairs = {"fp32": [losses(9.0, 2.0, 2.0, 1.0)] * 3, "nvfp4": [losses(18.0, 2.02, 2.01, 1 + g / 100) for g in (1, 2, 3)]}
    write_runs(tmp_path / "rows", config, pairs)
    for seed, gap in enumerate((0.001, 0.003)):
        row = dict(what="branch", share=0.5, seed=seed, same=config.same, branch_steps=2, precision="fp32", gap=gap)
        nvfp4.write_row(tmp_path / "rows", "nvfp4_gap", **row)
    write_gaps(tmp_path / "rows", config, "branch", [0.004, 0.008, 0.5], kind="high-precision", share=0.8, branch_steps=2)
    write_gaps(tmp_path / "rows", config, "branch", [0.001, 0.002], kind="late-forward-switch", share=0.8, branch_steps=2)
    for name, gaps in (("whole-recipe", [0.01, 0.02]), ("mxfp4", [0.015, 0.035]), ("no-rht", [0.01, 0.02, 0.9])):
        write_gaps(tmp_path / "rows", config, "ablation", gaps, run=name, share=0.25, steps=100)
    return replace(config, report=True, rows=(tmp_path / "rows" / "results.jsonl",))


def table(config) -> dict[tuple[str, str], dict]:
    return {(row["kind"], row["name"]): row for row in experiment.report(config)}


def test_the_report_has_the_gaps_worked_out_by_hand(made_up, tmp_path, capsys):
    """Every measure of made-up metrics; a gap taken over the wrong steps, unpaired seeds or a wrong sign shows."""
    found = table(made_up)
    end = found["pair", "at the end"]
    assert end["gaps"] == pytest.approx([0.01, 0.02, 0.03]) and (end["low"], end["high"]) == pytest.approx((-0.004842, 0.044842), abs=1e-6)
    assert found["pair", "held-out text"]["gaps"] == pytest.approx([0.01, 0.02, 0.03])
    before = found["pair", "before the decay"]
    assert before["gaps"] == pytest.approx([0.005] * 3) and (before["low"], before["high"]) == pytest.approx((0.005, 0.005))
    # of 96 hundredths after the warmup: 66 at 1 %, 5 at 0.5 %, 25 at 1, 2 and 3 %
    assert found["pair", "whole run after the warmup"]["gaps"] == pytest.approx([(66 + 2.5 + 25 * g) / 9600 for g in (1, 2, 3)])
    branch = found["branch", "branch at 50% of the run"]
    assert branch["gaps"] == [0.001, 0.003] and branch["mean"] == pytest.approx(0.002) and branch["published"] == "0.28 % (Ultra, 10T)"
    assert found["branch", "branch at 80% of the run"]["gaps"] == [0.004, 0.008, 0.5]
    switch = found["late-forward-switch", "forward pass leaves 4 bits at 80% of the run"]
    assert switch["gaps"] == [0.001, 0.002] and switch["closed"] == pytest.approx(0.003 / 0.012)      # of seeds 0 and 1, which have both branches
    assert found["ablation", "whole-recipe"]["gaps"] == [0.01, 0.02] and found["ablation", "mxfp4"]["gaps"] == [0.015, 0.035]
    more = found["difference", "mxfp4"]      # half a point and one and a half: 12.7062 · 0.5 on each side
    assert more["gaps"] == pytest.approx([0.005, 0.015])
    assert (more["low"], more["high"]) == pytest.approx((0.01 - 0.063531, 0.01 + 0.063531), abs=1e-6)
    assert found["difference", "no-rht"]["gaps"] == [0, 0] and found["difference", "no-rht"]["seeds"] == [0, 1]      # paired by seed
    assert len(found) == 4 + 2 + 1 + 3 + 2      # no other row, and no difference of the whole recipe to itself
    text = capsys.readouterr().out
    assert "+2.00 %" in text and "-0.48 % to +4.48 %" in text and "below 0.4 % on average (Ultra)" in text
    assert "Ablations: 100 steps from step 50 of fp32" in text and "last" not in text
    line = next(line for line in text.splitlines() if line.startswith("  MXFP4"))
    assert "+2.50 %" in line and "+1.00 % (-5.35 % to +7.35 %)" in line
    assert " 25%  67 % (12B" in next(line for line in text.splitlines() if "forward pass leaves" in line)
    assert made_up.figure.stat().st_size > 10_000
    rows = rows_in(tmp_path)
    assert {row["what"] for row in rows} == {"gap"} and len(rows) == len(found)


def test_one_seed_has_no_interval(made_up, tmp_path, capsys):
    """Its spread is unknown: a bar of length zero would claim certainty."""
    lines = [line for line in made_up.rows[0].read_text().splitlines() if json.loads(line)["seed"] == 0]
    made_up.rows[0].write_text("\n".join(lines) + "\n")
    rows = experiment.report(made_up)
    assert rows and all(row["low"] is None and row["seeds"] == [0] for row in rows)
    assert "one seed: none" in capsys.readouterr().out and made_up.figure.exists()


def test_only_what_belongs_together_is_compared(made_up, tmp_path, capsys):
    """Runs and ablations on different text are an error; those of other lengths are counted and left out; an unpaired seed adds nothing."""
    plain = table(made_up)
    write_runs(tmp_path / "rows", replace(made_up, steps=180), {"nvfp4": [[9.0] * 180]})
    write_gaps(tmp_path / "rows", made_up, "ablation", [0.7], run="mxfp4", share=0.25, steps=20)
    write_gaps(tmp_path / "rows", made_up, "branch", [0.7], kind="late-forward-switch", share=0.8, branch_steps=3)
    write_runs(tmp_path / "rows", made_up, {"nvfp4": [losses(18.0, 2.02, 2.01, g) for g in (1.01, 1.02, 1.03, 5.0)]})      # a fourth seed, alone
    capsys.readouterr()
    assert table(made_up) == plain and "\n3 rows of other presets" in "\n" + capsys.readouterr().out
    write_gaps(tmp_path / "rows", made_up, "ablation", [0.015], text="other", run="mxfp4", share=0.25, steps=100)
    with pytest.raises(ValueError, match="seed 0: mxfp4 and whole-recipe saw different text"): experiment.report(made_up)
    write_runs(tmp_path / "rows", made_up, {"fp32": [losses(9.0, 2.0, 2.0, 1.0)]}, text="other")
    with pytest.raises(ValueError, match="seed 0: nvfp4 and fp32 saw different text"): experiment.report(made_up)
    with pytest.raises(ValueError, match="train first"): experiment.report(replace(made_up, rows=()))


def test_rows_of_older_kinds_are_passed_over(made_up, tmp_path, capsys):
    """Ablations were runs of their own, with short references: none may pass for an ablation or a run of today, or be spoken of as left out."""
    plain = table(made_up)
    for name in ("fp32-short", "nvfp4-short", "mxfp4", "no-rht", "late-forward-switch"):
        for steps in (100, 200):
            row = dict(what="run", run=name, seed=0, same=made_up.same | dict(steps=steps), data="old", curve=[4.0])
            nvfp4.write_row(tmp_path / "rows", "nvfp4_gap", **row)
    nvfp4.write_row(tmp_path / "rows", "nvfp4_gap", what="gap", kind="ablation", name="nvfp4-short", same=made_up.same, seeds=[0], gaps=[0.3])
    nvfp4.write_row(tmp_path / "rows", "05_pretrain", preset="tiny")
    capsys.readouterr()
    assert table(made_up) == plain and "left out" not in capsys.readouterr().out


def test_a_gap_of_noise_has_no_share(made_up, tmp_path):
    """A branch that closes nothing, or less than that, is nothing that the switch could close a part of."""
    write_gaps(tmp_path / "rows", made_up, "branch", [-0.004, 0.004], kind="high-precision", share=0.8, branch_steps=2)
    assert table(made_up)["late-forward-switch", "forward pass leaves 4 bits at 80% of the run"]["closed"] is None


def test_the_right_panel_shows_every_seed(made_up):
    """A dot for each seed of the three ablations there are, the whole recipe on top, and bars of the intervals; no bar for one seed."""
    results = experiment.collect(made_up)
    _, ax = nvfp4.new_figure()
    experiment.plot_ablations(ax, made_up, results, experiment.tabulate(made_up, results))
    dots = {line.get_ydata()[0]: [round(x, 6) for x in line.get_xdata()] for line in ax.lines if line.get_marker() == "o"}
    assert [text.get_text() for text in ax.get_yticklabels()] == ["MXFP4", "no Hadamard transform", "whole recipe"]
    assert dots == {0: [1.5, 3.5], 1: [1.0, 2.0, 90.0], 2: [1.0, 2.0]} and len(ax.containers) == 3
    assert "steps 51 to 100 from step 50" in ax.get_xlabel() and "fp32" in ax.get_xlabel()


def test_a_report_of_runs_under_way_shows_how_far_they_are(config, data, tmp_path, monkeypatch, capsys):
    """A pair at steps 8 and 3 of 8: three parts in the figure, no gap at the end, no row. A whole run's row counts more than a part of it here."""
    assert run(config, data, "fp32") and not run(config, data, "nvfp4", 3, monkeypatch=monkeypatch)
    results = experiment.collect(config)
    pair = [[row["loss"] for row in metrics(config, name)] for name in ("nvfp4", "fp32")]
    assert experiment.gap_curves(results)[0] == pytest.approx([a / b - 1 for a, b in zip(*pair)], abs=1e-5) and len(pair[0]) == 3
    assert experiment.report(replace(config, report=True)) == [] and "no pair has ended yet" in capsys.readouterr().out
    write_runs(tmp_path / "rows", config, {"nvfp4": [[4.0] * 8]}, text=rows_in(tmp_path)[0]["data"])
    assert experiment.collect(replace(config, rows=(tmp_path / "rows" / "results.jsonl",))).rows["nvfp4", 0.0][0]["curve"] == [4.0] * 8


def test_an_ablation_alone_can_be_reported(made_up):
    """A machine may hand back nothing but its ablations' rows: they name their reference, and the figure has one panel."""
    kept = [line for line in made_up.rows[0].read_text().splitlines() if json.loads(line)["what"] == "ablation"]
    made_up.rows[0].write_text("\n".join(kept).replace('"reference": "fp32"', '"reference": "bf16"') + "\n")
    assert experiment.collect(made_up).reference == "bf16"
    assert {row["kind"] for row in experiment.report(made_up)} == {"ablation", "difference"} and made_up.figure.exists()
