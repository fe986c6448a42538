"""Repeated measurements: each seed is really used, sizes that are compared are equal in what they must be, and claims.py reads the rows."""
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
repeats, claims = importlib.import_module("repeats"), importlib.import_module("claims")


def found_by(start, row):
    return next(x for x in claims.CLAIMS if x.text.startswith(start)).verdict([row])


def test_latents_have_equal_routed_parameters_and_work():
    """Counted in the built models: a size with more of either would win for that. The control has a quarter of both."""
    nemotron, counts = repeats.stage("04_model"), {}
    for name, (experts, k, latent) in repeats.LATENTS.items():
        shape = replace(nemotron.preset("tiny"), pattern="ME*E", experts=experts, experts_per_token=k, latent=latent, expert_width=64)
        routed = {n: p for n, p in nemotron.Nemotron(shape).named_parameters() if ".mixer.experts." in n and n.startswith("backbone")}
        assert len(routed) == 4 and all(p.shape[0] == experts for p in routed.values())
        counts[name] = sum(p.numel() for p in routed.values()), sum(k * p[0].numel() for p in routed.values())
    full, *others, control = counts.values()
    assert others == [full] * 3 and control == (full[0] // 4, full[1] // 4) and "not multiplied" in list(counts)[-1]


def test_balance_is_measured_by_seed_and_read_by_its_claim(tmp_path):
    """Largest load over mean load, of each seed's own run; the row that is written is the row that the claim reads."""
    moe = repeats.stage("03_latentmoe")
    repeats.main(repeats.Config(what="balance", steps=30, seeds=(0, 3), out=tmp_path))
    row, = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    for seed, said in zip((0, 3), row["max_violation"]["loss and bias"], strict=True):
        load_e = moe.measure_balance(1e-3, 1e-4, 30, seed)[1].double()
        assert said == pytest.approx((load_e.max() / load_e.mean()).item(), abs=1e-4)
    assert row["seeds"] == [0, 3] and row["steps"] == 30 and len(set(row["max_violation"]["loss only"])) == 2
    assert found_by("the selection bias", row).ours.count("2 seeds") == 1


def test_boosting_gives_every_seed_its_own_run(tmp_path, monkeypatch):
    """With stage 07's parts in place of trainings: a seed that does not reach them would repeat one run under three names."""
    rl, seen = repeats.stage("07_rlvr_mopd"), []
    monkeypatch.setattr(rl.pretrain, "newest_checkpoint", lambda home: home / "step-000016")
    monkeypatch.setattr(rl, "boost_mtp", lambda student, settings, m: seen.append((student, settings.seed, m.boost[0])) or tmp_path)
    made = lambda seed: {(when, way): rl.Acceptance(4.0 + seed / 10 + (when == "after"), [0.9, 0.9 - seed / 10]) for when in ("before", "after")
                         for way in ("greedy", "sampled")}
    monkeypatch.setattr(rl, "measure_drafts", lambda folders, settings, m: made(settings.seed))
    repeats.main(repeats.Config(what="boosting", seeds=(0, 1, 2), steps=7, home=tmp_path, out=tmp_path))
    row, = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert seen == [(tmp_path / "mopd" / "step-000016", seed, 7) for seed in (0, 1, 2)]
    assert row["tokens_a_pass"]["before greedy"] == [4.0, 4.1, 4.2] and row["tokens_a_pass"]["after sampled"] == [5.0, 5.1, 5.2]
    assert found_by("boosting the MTP head", row).verdict == "holds"
    # 0.81, 0.72, 0.63: both of the first two kept
    assert found_by("the first two MTP drafts", row).ours == "72% (95 % 50% to 94%; 3 seeds)"


def test_effort_counts_right_answers_of_every_seed(tmp_path, monkeypatch):
    sft, of_seed = repeats.stage("06_sft"), {0: (0.5, 0.25), 1: (0.25, 0.25)}

    def train(settings):
        settings.out.mkdir()
        both = {mode: dict(n=8, accuracy=x, tokens=40.0 - 20 * i) for i, (mode, x) in enumerate(zip(("regular", "medium"), of_seed[settings.seed]))}
        (settings.out / "results.jsonl").write_text(json.dumps(dict(stage="06_sft", all=both)) + "\n")
    monkeypatch.setattr(sft, "main", train)
    monkeypatch.setattr(repeats.stage("05_pretrain"), "newest_checkpoint", lambda home: home / "step-000850")
    repeats.main(repeats.Config(what="effort", seeds=(0, 1), home=tmp_path, out=tmp_path))
    row, = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert row["right"] == dict(regular=[4, 2], medium=[2, 2]) and row["questions"] == [8, 8]
    said = found_by("medium effort", row)
    assert said.ours.startswith("2.0× fewer, −12 points") and said.verdict == "too small to tell"


def test_settings_that_measure_nothing_are_refused():
    with pytest.raises(ValueError, match="no seed"): repeats.Config(seeds=())
    with pytest.raises(ValueError, match="negative"): repeats.Config(steps=-1)
