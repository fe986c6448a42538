"""The measuring scripts: fair turns, and a README that says what the rows say."""
import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("tyro")      # a GPU machine may lack what only commands need
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
bench, claims, table = (importlib.import_module(name) for name in ("bench_cpu", "claims", "table"))


def test_contenders_take_turns():
    """Times on a shared machine compare only when every round runs everybody, and nobody always goes first."""
    calls = []
    times = bench.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3)
    assert calls == list("abc") + list("abc") + list("bca") + list("cab")       # a warm-up, then three rounds
    assert all(len(t) == 3 for t in times.values())


def test_the_peer_is_what_it_is_said_to_be():
    """Same sizes, grouped_mm experts, the chunk that was asked for, and no MTP: as many parameters as our trunk."""
    config = importlib.import_module("04_model").PRESETS["tiny"]
    peer = bench.peer_model(config, 64)
    assert sum(p.numel() for p in peer.parameters()) + 4 * config.experts == importlib.import_module("04_model").ledger(config).total
    assert peer.config._experts_implementation == "grouped_mm" and peer.config.chunk_size == 64


@pytest.mark.parametrize("page", table.PAGES)
def test_the_pages_say_what_the_rows_say(page):
    """A number typed by hand, or a row recorded without rendering, shows here: run `python experiments/table.py readme`."""
    text = (ROOT / page).read_text()
    assert "<!-- table:" in text and table.rendered(text, table.read_rows(ROOT / "experiments" / "results.jsonl")) == text


def difference(name, domain, mean, seeds, **more):
    return dict(stage="posttrain", what="comparison", full=True, kind="difference", name=name, domain=domain, n=80, seeds=seeds, mean=mean,
                low=mean - 1, high=mean + 1, by_seed=[mean] * len(seeds), aim=None, side="above", verdict="no aim") | more


def settings(model="course", full=True, **seconds):
    phases = {seed: {"sft": dict(seconds=x), "rlvr": dict(seconds=60.0)} for seed, x in seconds.items()}
    return dict(stage="posttrain", what="settings", full=full, settings=dict(model=model), ran_on="a GPU", phases=phases)


def test_post_training_is_shown_from_the_newest_full_run_alone():
    """A comparison that the newest run does not have must not stand beside it with an older run's number, nor that of a run without --full, of one
    domain, or of rows whose run has no end."""
    old = [difference("RLVR - SFT", "all", -3.0, [0]), difference("MOPD round 2 - RLVR", "all", 7.0, [0]), settings(s0=60.0)]
    new = [difference("RLVR - SFT", "tools", 9.0, [0, 2]), difference("RLVR - SFT", "all", 2.54, [0, 2], aim=8.0, verdict="does not hold"),
           settings(s0=120.0, s2=30.0)]
    small = [difference("RLVR - SFT", "all", 5.0, [0], full=False), settings(model="micro", full=False, s0=1.0)]
    cut = [difference("RLVR - SFT", "all", 6.0, [0])]
    assert table.table_posttraining(small) == table.table_posttraining(cut) == "Not measured yet."
    said = table.table_posttraining([*old, *new, *small, *cut])
    assert said.splitlines()[-1] == "| RLVR − SFT | +2.5 | +1.5 to +3.5 | 0: +2.5, 2: +2.5 | above +8.0: does not hold |"
    assert said.startswith("17M parameters, 80 held-out questions; seeds (minutes of finished phases, on a GPU): s0 (3), s2 (2). ")
    found = [claim.verdict([*old, *new, *small, *cut]) for claim in claims.CLAIMS if claim.text.startswith("RLVR raises accuracy")]
    assert found[0].ours == "+2.5 points (95 % +1.5 to +3.5; seeds +2.5, +2.5), 80 questions, 17M parameters" and found[0].verdict == claims.HOLDS


def test_models_of_post_training_have_the_size_that_is_said():
    """The trunk and the head, as stage 04 counts them: a width that is changed in posttrain.py shows here."""
    models, ledger = importlib.import_module("posttrain").MODELS, importlib.import_module("04_model").ledger
    counts = {name: ledger(config) for name, config in models.items()}
    said = {name: f"{(x.total + x.mtp) / 1e6:.{0 if x.total > 1e7 else 1}f}M" for name, x in counts.items()}
    assert claims.SIZES == said


def test_serving_shows_the_newest_rows_and_what_they_miss():
    """A faster row from before, a missed figure without its word, or a figure asked of a drafted row would mislead."""
    row = lambda **x: dict(stage="bench_infer", what="speed", device="NVIDIA H200", preset="small", batch=1, contender="ours", commit="a") | x
    rows = [row(tokens_per_s=2000.0), row(tokens_per_s=999.9, kernels_a_step=7, busy_ms_a_step=0.5, commit="b"), row(tokens_per_s=1500.0, batch=2),
            row(tokens_per_s=30_000.0, batch=32), row(tokens_per_s=9.0, contender="ours, 5 drafts kept with chance 0.7, forced"),
            row(device="cpu", preset="tiny", tokens_per_s=300.0, ratio=1.9), row(device="cpu", preset="tiny", batch=8, tokens_per_s=300.0, ratio=2.1)]
    assert table.table_serving([]) == "Not measured yet."
    assert table.table_serving(rows).splitlines()[2:] == [
        "| NVIDIA H200 | `small` | 1 | ours | 1,000 (1,000 asked: missed) |  | 7 | 0.50 | b |",
        "| NVIDIA H200 | `small` | 1 | ours, 5 drafts kept with chance 0.7, forced | 9 |  |  |  | a |",
        "| NVIDIA H200 | `small` | 2 | ours | 1,500 |  |  |  | a |", "| NVIDIA H200 | `small` | 32 | ours | 30,000 (20,000 asked) |  |  |  | a |",
        "| cpu | `tiny` | 1 | ours | 300 | 1.90× (2 asked: missed) |  |  | a |", "| cpu | `tiny` | 8 | ours | 300 | 2.10× |  |  | a |"]
