"""The cost of four bits: runs that stop and go on, ablations that change what they say, and gaps worked out by hand."""
import importlib
import itertools
import json
import math
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
SIZES = experiment.Sizes(MICRO, steps=8, short_steps=6, branch_steps=2, batch=2, seq=24, lr=4e-3, least_megabytes=0.0)


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


def run(config, data, name, steps=math.inf, seed=0, monkeypatch=None) -> bool:
    """One call that has time for so many steps: a clock that ticks when it is looked at, once at the start and once before each step."""
    if monkeypatch: monkeypatch.setattr(experiment, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    return experiment.advance(config, name, seed, data, steps + 1)


# ---- training

def test_a_run_cut_into_pieces_has_the_numbers_of_a_whole_one(config, data, tmp_path, monkeypatch):
    """Pieces of 3, 2 and 1 steps, the second ending at the late switch: a lost moment, another draw or a recipe forgotten shows. The forward pass
    leaves four bits after round(0.82 · 6) = 5 steps, cut or not; the backward pass stays."""
    seen, plain, name = [], pretrain.Trainer.train_step, "late-forward-switch"
    def noting(self):
        seen.append((self.step, {(r.forward, r.backward) for r in recipes(self.model).values()}, len(recipes(self.model))))
        return plain(self)
    monkeypatch.setattr(pretrain.Trainer, "train_step", noting)
    assert run(replace(config, home=tmp_path / "whole"), data, name)
    assert [run(config, data, name, steps, monkeypatch=monkeypatch) for steps in (3, 2, 99, 99)] == [False, False, True, True]
    assert seen == 2 * [(step, {(step < 5, True)}, len(FOUR_BITS)) for step in range(6)]
    whole, pieces = (home / f"tiny-seed-0-{name}" for home in (tmp_path / "whole", config.home))
    rows = experiment.read_metrics(pieces)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and numbers(rows) == numbers(experiment.read_metrics(whole))
    a, b = (json.loads((folder / "done.json").read_text()) for folder in (whole, pieces))
    assert a["curve"] == b["curve"] == pytest.approx([row["loss"] for row in rows], abs=1e-6) and a["held_out"] == b["held_out"] > 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2      # one row a run, none from the call that found it ended


def test_a_call_that_was_killed_goes_on_from_its_last_save(config, data, tmp_path, monkeypatch):
    """Steps after the last checkpoint are run again and stand once in the metrics; a damaged checkpoint is passed over."""
    assert run(replace(config, home=tmp_path / "whole"), data, "fp32")
    run(config, data, "fp32", 2, monkeypatch=monkeypatch)
    run(config, data, "fp32", 3, monkeypatch=monkeypatch)
    folder = config.folder("fp32", 0)
    (folder / "step-000005" / "files.json").unlink()
    assert run(config, data, "fp32", 99, monkeypatch=monkeypatch)
    assert numbers(experiment.read_metrics(folder)) == numbers(experiment.read_metrics(tmp_path / "whole" / folder.name))


def test_a_call_without_time_says_what_is_left(config, data, capsys, monkeypatch):
    """No minutes, no step and no folder of a run; then one call with time for a short run, after which nothing is left."""
    experiment.main(replace(config, minutes=0.0, seeds=(0, 1)))
    text = capsys.readouterr().out
    assert all(f"{name}, seed {seed}: step 0 of 8" in text for name in ("fp32", "nvfp4") for seed in (0, 1))
    assert "branches of seed 1: not all run" in text and "the same command goes on" in text and not list(config.home.glob("tiny-seed*"))
    experiment.main(replace(config, minutes=5.0, runs=("fp32-short",)))
    assert "all runs have ended" in capsys.readouterr().out and config.folder("fp32-short", 0).exists()
    monkeypatch.setattr(experiment.importlib.util, "find_spec", lambda name: None if name == "rustbpe" else name)
    with pytest.raises(ValueError, match="^needs rustbpe, not installed here: pip install rustbpe"): experiment.main(config)


def test_a_pair_shares_start_and_data(config, data):
    """A gap between two starts, or two texts, would be no gap of precision; another seed changes both."""
    high, four, other = (experiment.open_run(config, name, seed, data) for name, seed in (("fp32", 0), ("nvfp4", 0), ("fp32", 1)))
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


@pytest.mark.parametrize("name, switch, layers", [
    ("nvfp4", {}, FOUR_BITS), ("nvfp4-short", {}, FOUR_BITS), ("no-stochastic-rounding", dict(stochastic_gradients=False), FOUR_BITS),
    ("no-rht", dict(rht=False), FOUR_BITS), ("weight-rows", dict(weight_tiles=False), FOUR_BITS), ("mxfp4", dict(format="mxfp4"), FOUR_BITS),
    ("no-high-layers", {}, FOUR_BITS | LAST), ("late-forward-switch", {}, FOUR_BITS), ("bf16", None, set()), ("fp32-short", None, set())])
def test_a_run_changes_what_its_name_says_and_nothing_else(name, switch, layers, config, data, monkeypatch):
    """Switches and layers written out; the same again after a stop, when the layers are swapped on a model from disk."""
    for where in ("new", "resumed"):
        trainer = experiment.open_run(config, name, 0, data)
        found = recipes(trainer.model)
        assert set(found) == layers
        if layers: assert set(found.values()) == {nvfp4.NVFP4Recipe(**switch)}
        if name == "bf16": return      # not trained on a CPU here
        if where == "new": run(config, data, name, 1, monkeypatch=monkeypatch)
    assert trainer.step == 1


def test_the_placement_is_whole_again_after_a_run_without_its_rule(config, data):
    """Later models of the process would silently lose their high-precision layers; an error in between must not change that."""
    before = list(model04.PLACEMENT)
    experiment.open_run(config, "no-high-layers", 0, data)
    assert model04.PLACEMENT == before and [rule for rule in before if rule[0] == "<last 15 % of layers>"]
    with pytest.raises(KeyError), experiment.last_layers(high=False):
        assert [rule for rule in before if rule not in model04.PLACEMENT] == [("<last 15 % of layers>", "high", "linears of the last 15 % of layers")]
        raise KeyError
    assert model04.PLACEMENT == before
    assert set(recipes(experiment.open_run(config, "nvfp4", 0, data).model)) == FOUR_BITS


def test_each_ablation_has_its_own_numbers(config, data):
    """What changes the backward pass only leaves the first loss alone and changes the second; the others change the first already."""
    losses = {}
    for name in ("nvfp4-short", *experiment.ABLATIONS):
        trainer = experiment.open_run(config, name, 0, data)
        losses[name] = [trainer.train_step()["loss"] for _ in range(2)]
    whole = losses.pop("nvfp4-short")
    assert losses.pop("late-forward-switch") == whole      # its time comes later
    assert {name for name, pair in losses.items() if pair[0] == whole[0]} == {"no-stochastic-rounding", "no-rht"}
    assert all(pair[1] != whole[1] for pair in losses.values()) and len({pair[1] for pair in losses.values()}) == 5


def test_a_branch_starts_at_its_share_and_is_compared_with_the_same_steps(config, data, monkeypatch):
    """Points 2, 4 and 6 of 8 steps; the gap is over the second of two steps. In the trunk's own precision a branch repeats the trunk: gap 0."""
    run(config, data, "nvfp4", 5, monkeypatch=monkeypatch)
    trunk, plain = config.folder("nvfp4", 0), experiment.settings
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "settings", lambda config, name, seed, precision=None: plain(config, name, seed))
        assert not experiment.run_branches(config, 0, data, math.inf)      # only the first has its two steps beside it
    assert {share: row["gap"] for share, row in json.loads((trunk / "branches.json").read_text()).items()} == {"0.25": 0.0}
    (trunk / "branches.json").unlink()
    assert run(config, data, "nvfp4", 99, monkeypatch=monkeypatch) and experiment.run_branches(config, 0, data, math.inf)
    rows, found = experiment.read_metrics(trunk), json.loads((trunk / "branches.json").read_text())
    for share, point in (("0.25", 2), ("0.5", 4), ("0.8", 6)):
        branch = experiment.read_metrics(trunk / f"branch-{point:06d}")
        assert [row["step"] for row in branch] == [point + 1, point + 2] and branch[1]["lr"] == rows[point + 1]["lr"]
        want = (rows[point + 1]["loss"] - branch[1]["loss"]) / branch[1]["loss"]
        assert found[share]["gap"] == pytest.approx(want, abs=1e-6) and want != 0 and found[share]["precision"] == "fp32"
    assert [path.name for path in pretrain.checkpoints(trunk)] == ["step-000008"]      # the points are not needed any more


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
    """About 110M parameters, counted on the model itself; 200M tokens a pair, at most 20M an ablation; all widths fit MXFP4's blocks."""
    sizes = experiment.PRESETS["gap"]
    with torch.device("meta"): model = model04.Nemotron(sizes.model, nvfp4.NVFP4Recipe(format="mxfp4"))
    trunk = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mtp."))
    assert 105e6 < trunk < 120e6 and sizes.model.mtp_depths == 2
    tokens = sizes.batch * sizes.seq
    assert sizes.steps * tokens >= 200e6 and 18e6 < sizes.short_steps * tokens <= 20e6 and sizes.least_megabytes >= 100
    assert experiment.Config().max_epochs == 6
    # [DeepSeek]'s laws at 1e20 FLOP by logarithms: 0.3118 · 10^-2.5 and 0.2920 · 10^6.542
    lr, batch = experiment.deepseek_laws(1e20)
    assert lr == pytest.approx(9.86e-4, rel=1e-3) and batch == pytest.approx(1.017e6, rel=1e-3)


def test_runs_are_named_and_impossible_ones_refused():
    names = experiment.Config(runs=("ablations", "mxfp4"), device="cpu").names
    assert names == ("fp32-short", "nvfp4-short", "no-stochastic-rounding", "no-rht", "weight-rows", "no-high-layers", "mxfp4", "late-forward-switch")
    assert experiment.Config(device="cpu").names == ("fp32", "nvfp4") and experiment.Config(device="cuda").names == ("bf16", "nvfp4")
    with pytest.raises(ValueError, match="unknown run 'nvfp5'"): experiment.Config(runs=("nvfp5",))
    with pytest.raises(ValueError, match="its pair is fp32, not bf16"): experiment.Config(runs=("bf16", "nvfp4"), device="cpu")
    with pytest.raises(ValueError, match="its pair is bf16, not fp32"): experiment.Config(runs=("fp32-short",), device="cuda")
    assert experiment.missing("json") is None and experiment.missing("json", "no_such_package").startswith("needs no_such_package, not installed")


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
            nvfp4.write_row(path, "nvfp4_gap", what="run", run=name, seed=seed, same=config.same(name), data=text, held_out=0.9 * losses[-1],
                            curve=experiment.curve(rows, experiment.steps_of(config, name)))


def losses(warm, stable, late, end, steps=200):
    """Warmup of 4 %, up to the last twentieth before the decay, that twentieth, the decay."""
    return [warm] * (steps // 25) + [stable] * (steps * 66 // 100) + [late] * (steps // 20) + [end] * (steps // 4)


@pytest.fixture
def made_up(config, tmp_path):
    """Three pairs with gaps of 1, 2 and 3 % in the decay, and short runs of two seeds."""
    config = replace(config, steps=200, short_steps=100)
    pairs = {"fp32": [losses(9.0, 2.0, 2.0, 1.0)] * 3, "nvfp4": [losses(18.0, 2.02, 2.01, 1 + g / 100) for g in (1, 2, 3)]}
    short = {"fp32-short": [[4.0] * 100] * 2, "nvfp4-short": [[4.04] * 100, [4.08] * 100], "mxfp4": [[4.06] * 100, [4.14] * 100]}
    write_runs(tmp_path / "rows", config, pairs | short)
    for seed, gap in enumerate((0.001, 0.003)):
        nvfp4.write_row(tmp_path / "rows", "nvfp4_gap", what="branch", share=0.5, seed=seed, same=config.same("nvfp4"), branch_steps=2, gap=gap)
    return replace(config, report=True, rows=(tmp_path / "rows" / "results.jsonl",))


def test_the_report_has_the_gaps_worked_out_by_hand(made_up, tmp_path, capsys):
    """Every measure of made-up metrics; a gap taken over the wrong steps, unpaired seeds or a wrong sign shows."""
    found = {(row["kind"], row["name"]): row for row in experiment.report(made_up)}
    end = found["pair", "at the end"]
    assert end["gaps"] == pytest.approx([0.01, 0.02, 0.03]) and (end["low"], end["high"]) == pytest.approx((-0.004842, 0.044842), abs=1e-6)
    assert found["pair", "held-out text"]["gaps"] == pytest.approx([0.01, 0.02, 0.03])
    before = found["pair", "before the decay"]
    assert before["gaps"] == pytest.approx([0.005] * 3) and (before["low"], before["high"]) == pytest.approx((0.005, 0.005))
    # of 96 hundredths after the warmup: 66 at 1 %, 5 at 0.5 %, 25 at 1, 2 and 3 %
    assert found["pair", "whole run after the warmup"]["gaps"] == pytest.approx([(66 + 2.5 + 25 * g) / 9600 for g in (1, 2, 3)])
    branch = found["branch", "branch at 50% of the run"]
    assert branch["gaps"] == [0.001, 0.003] and branch["mean"] == pytest.approx(0.002) and branch["published"] == "0.28 % (Ultra, 10T)"
    assert found["ablation", "nvfp4-short"]["gaps"] == pytest.approx([0.01, 0.02])
    assert found["ablation", "mxfp4"]["gaps"] == pytest.approx([0.015, 0.035])
    more = found["difference", "mxfp4"]      # half a point and one and a half: 12.7062 · 0.5 on each side
    assert more["gaps"] == pytest.approx([0.005, 0.015])
    assert (more["low"], more["high"]) == pytest.approx((0.01 - 0.063531, 0.01 + 0.063531), abs=1e-6)
    text = capsys.readouterr().out
    assert "+2.00 %" in text and "-0.48 % to +4.48 %" in text and "below 0.4 % on average (Ultra)" in text
    assert made_up.figure.stat().st_size > 10_000
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["what"] for row in rows} == {"gap"} and len(rows) == len(found)


def test_one_seed_has_no_interval(made_up, tmp_path, capsys):
    """Its spread is unknown: a bar of length zero would claim certainty."""
    lines = [line for line in made_up.rows[0].read_text().splitlines() if json.loads(line)["seed"] == 0]
    made_up.rows[0].write_text("\n".join(lines) + "\n")
    rows = experiment.report(made_up)
    assert rows and all(row["low"] is None and row["seeds"] == [0] for row in rows)
    assert "one seed: none" in capsys.readouterr().out and made_up.figure.exists()


def test_only_what_belongs_together_is_compared(made_up, tmp_path, capsys):
    """Runs on different text are an error; runs of other lengths are counted and left out; an unpaired seed adds nothing."""
    write_runs(tmp_path / "rows", replace(made_up, steps=100), {"nvfp4": [[9.0] * 100]})
    write_runs(tmp_path / "rows", made_up, {"nvfp4": [losses(18.0, 2.02, 2.01, g) for g in (1.01, 1.02, 1.03, 5.0)]})      # a fourth seed, alone
    assert len(next(row for row in experiment.report(made_up) if row["name"] == "at the end")["seeds"]) == 3
    assert "1 rows of other presets" in capsys.readouterr().out
    write_runs(tmp_path / "rows", made_up, {"fp32": [losses(9.0, 2.0, 2.0, 1.0)]}, text="other")
    with pytest.raises(ValueError, match="seed 0: nvfp4 and fp32 saw different text"): experiment.report(made_up)
    with pytest.raises(ValueError, match="train first"): experiment.report(replace(made_up, rows=()))


def test_a_report_of_runs_under_way_shows_how_far_they_are(config, data, monkeypatch, capsys):
    """A pair at steps 8 and 3 of 8: three parts in the figure, no gap at the end, no row."""
    assert run(config, data, "fp32") and not run(config, data, "nvfp4", 3, monkeypatch=monkeypatch)
    results = experiment.collect(config)
    pair = [[row["loss"] for row in experiment.read_metrics(config.folder(name, 0))] for name in ("nvfp4", "fp32")]
    assert experiment.gap_curves(results)[0] == pytest.approx([a / b - 1 for a, b in zip(*pair)], abs=1e-5) and len(pair[0]) == 3
    assert experiment.report(replace(config, report=True)) == [] and "no pair has ended yet" in capsys.readouterr().out
