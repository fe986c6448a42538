"""The report's claims that a small run can mirror: what was published, what we measure, and what the committed rows say of it.

Nothing here is typed by hand but the published figures, with their source. A claim's `judge` reads experiments/results.jsonl and returns what we
found, with an interval or a spread, and a verdict:
    holds               the whole 95 % interval lies on the side of the bound that the claim says; or the number needs no interval (it is counted,
                        or its sampling error is far below the last printed digit)
    does not hold       the whole interval lies on the other side
    too small to tell   the bound lies inside the interval, or there is one seed and so no interval over seeds
The bound is the claim's own where it has one (below 0.4 %), else "any effect at all" (0), and never moved to meet a measurement. Small models
mirror directions and ratios, not scores: a claim that fails here may hold at 550B parameters.

Run:     python experiments/claims.py                  # every claim and its verdict
         python experiments/table.py readme            # into README.md and experiments/README.md
Sources: [Ultra], [Super], [Nano] Nemotron 3 reports (2606.15007 the first, 2512.20848 the last) · [NVFP4] 2509.25149 · [4/6] 2512.02010
         [LatentMoE] 2601.18089 · [PivotRL] 2603.21383 · [White paper] 2512.20856 · [INT4vFP4] 2510.25602
"""
from __future__ import annotations

import importlib
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
HOLDS, FAILS, SMALL, NO_ROW = "holds", "does not hold", "too small to tell", "no row"


# %% 1 · Rows

def read_rows(path: Path) -> list[dict]:
    if not path.exists(): raise SystemExit(f"{path} does not exist yet: run `make run` (or experiments/record.py) first.")
    return [json.loads(line) for line in path.read_text().splitlines()]


def newest(rows: list[dict], stage: str, **match) -> dict | None:
    """The last row of a stage whose fields equal `match`."""
    return next((row for row in reversed(rows) if row["stage"] == stage and all(row.get(k) == v for k, v in match.items())), None)


def percent(x: float, digits: int = 1) -> str: return f"{100 * x:+.{digits}f} %".replace("-", "−")


def signed(x: float, digits: int) -> str: return f"{x:+.{digits}f}".replace("-", "−")


def points(*values: float) -> list[str]: return [signed(x, 1) for x in values]


SIZES = {"course": "17M", "micro": "0.4M"}       # parameters of the models of experiments/posttrain.py, with their heads


class PostTraining(NamedTuple):
    """The newest full run of experiments/posttrain.py: its differences over all held-out questions by name, recoveries by domain, settings."""
    found: dict[str, dict]
    recovered: dict[str, dict]
    settings: dict

    @property
    def size(self) -> str: return SIZES[self.settings["settings"]["model"]]


def newest_posttraining(rows: list[dict]) -> PostTraining | None:
    """A run's rows end with its settings. None before the first."""
    found, recovered, run = {}, {}, None
    for row in rows:
        if row["stage"] != "posttrain" or not row["full"]: continue
        if row["what"] == "comparison" and row["kind"] == "difference" and row["domain"] == "all": found[row["name"]] = row
        if row["what"] == "comparison" and row["kind"] == "recovery": recovered[row["domain"]] = row
        if row["what"] == "settings": found, recovered, run = {}, {}, PostTraining(found, recovered, row)
    return run


# %% 2 · Intervals and verdicts

class Found(NamedTuple):
    """ours: the measurement in words.  margin: distance from the bound to the interval's nearest end, in half widths; inf for what needs no interval,
    0 for what is not decided."""
    ours: str
    verdict: str
    margin: float = 0.0


def t_interval(values: list[float]) -> tuple[float, float | None, float | None]:
    """Mean and 95 % interval of the mean over seeds, by Student's t; one value has none.    1 2 3 -> 2, -0.484, 4.484"""
    mean, n = statistics.mean(values), len(values)
    if n == 1: return mean, None, None
    # two-sided 95 % quantiles with n - 1 degrees of freedom; beyond ten seeds that of ten, which is wider
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306}.get(n, 2.262)
    half = t * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def wilson(hits: float, n: float) -> tuple[float, float, float]:
    """Share and its 95 % interval by Wilson's formula.    5 of 10 -> 0.5, 0.237, 0.763"""
    p, z = hits / n, 1.96
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, centre - half, centre + half


def apart(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
    """Difference a - b of two shares with intervals, and its interval by Newcombe's formula."""
    (p, p_low, p_high), (q, q_low, q_high) = a, b
    return p - q, p - q - math.hypot(p - p_low, q_high - q), p - q + math.hypot(p_high - p, q - q_low)


def judge(ours: str, low: float | None, high: float | None, above: float | None = None, below: float | None = None) -> Found:
    """The claim says that the measured value lies above, or below, a bound; low and high are its 95 % interval, None for a single seed."""
    assert (above is None) != (below is None), "a claim has one bound"
    if low is None: return Found(ours, SMALL)
    near, far = (low - above, high - above) if below is None else (below - high, below - low)      # both positive: the claim's side
    half = max((high - low) / 2, 1e-12)
    if near > 0: return Found(ours, HOLDS, near / half)
    return Found(ours, FAILS, -far / half) if far < 0 else Found(ours, SMALL)


def counted(ours: str, true: bool) -> Found:
    """For what is counted, or exact up to the printed digits."""
    return Found(ours, HOLDS if true else FAILS, math.inf)


def over_seeds(values: list[float], show: Callable[[float], str], above: float | None = None, below: float | None = None, more: str = "") -> Found:
    """A value a seed; text and verdict by the t interval."""
    mean, low, high = t_interval(values)
    span = "one seed" if low is None else f"95 % {show(low)} to {show(high)}; {len(values)} seeds"
    return judge(f"{show(mean)} ({span}){more}", low, high, above, below)


@dataclass(frozen=True)
class Claim:
    """One line of the table. The command makes the rows that `judge` reads; on: the machine it needs."""
    stage: int                       # file that it belongs to
    text: str
    published: str
    source: str
    measured: str                    # what we measure, of what size
    command: str
    on: Literal["CPU", "one H200"]
    judge: Callable[[list[dict]], Found | None]

    def verdict(self, rows: list[dict]) -> Found:
        """NO_ROW where nothing is measured yet."""
        return self.judge(rows) or Found("no row yet", NO_ROW)


# %% 3 · Stages 01 to 04

def of_scale_rule(rule: str, published: float) -> Callable:
    """Within 0.3 points of the published change: two draws of a million Gaussians differ by less."""
    def judge_rule(rows):
        row = newest(rows, "01_nvfp4")
        return row and counted(percent(row["mse_change"][rule]), abs(row["mse_change"][rule] - published) <= 0.003)
    return judge_rule


def of_error(rows):
    row = newest(rows, "01_nvfp4")
    # ours: 0.3 dB, since theirs are a model's tensors and ours Gaussians
    return row and counted(f"{row['db']['NVFP4 nearest, Gaussian']:.2f} dB", abs(row["db"]["NVFP4 nearest, Gaussian"] - 20.60) <= 0.3)


def of_mxfp4_error(rows):
    row = newest(rows, "01_nvfp4")
    if row is None: return None
    kinds = ("Gaussian", "Laplace", "Student-t3", "outliers")
    ahead = [row["db"][f"NVFP4 nearest, {kind}"] - row["db"][f"MXFP4 nearest, {kind}"] for kind in kinds]
    return counted(f"NVFP4 ahead by {min(ahead):.1f} to {max(ahead):.1f} dB on {len(kinds)} distributions", min(ahead) > 0)


def of_cache(rows):
    row = newest(rows, "02_mamba")
    return row and counted(f"{row['equal_at_tokens']:,} tokens", row["equal_at_tokens"] == 64 * 1024)


def of_balance(rows):
    row = newest(rows, "repeats", what="balance")
    if row is None: return None
    without = statistics.mean(row["max_violation"]["loss only"])
    return over_seeds(row["max_violation"]["loss and bias"], lambda x: f"{x:.2f}", below=1.3, more=f"; without the bias {without:.2f}")


def of_latent(name: str, against: str, **bound) -> Callable:
    def judge_latent(rows):
        row = newest(rows, "repeats", what="latent")
        if row is None: return None
        by_seed = [a - b for a, b in zip(row["bits_per_byte"][name], row["bits_per_byte"][against])]
        return over_seeds(by_seed, lambda x: signed(x, 3), **bound, more=" bits per byte")
    return judge_latent


def of_parameters(rows):
    row = newest(rows, "04_model", preset="ultra")
    if row is None: return None
    ours = " / ".join(f"{row[k] / 1e9:.{digits}f}B" for k, digits in (("total", 1), ("active", 2), ("mtp", 2)))
    return counted(ours, ours == ULTRA_PARAMETERS)


ULTRA_PARAMETERS = "549.3B / 54.99B / 11.22B"      # of the released checkpoint's tensors  [Ultra]
LATENT = ("python experiments/repeats.py --what latent --out experiments", "CPU")
EARLY = [
    Claim(1, "Four-Over-Six scales lower the squared error of weights", "−16.4 % (median of 49,152 matrices)", "[Ultra], weight scales",
          "Gaussian weights, against max scales", "python 01_nvfp4.py", "CPU", of_scale_rule("four_over_six", -0.164)),
    Claim(1, "a full sweep of block scales lowers the squared error of weights further", "−27.1 %", "[Ultra], weight scales",
          "Gaussian weights, against max scales", "python 01_nvfp4.py", "CPU", of_scale_rule("mse", -0.271)),
    Claim(1, "signal to error of NVFP4 at blocks of 16", "20.60 dB", "[INT4vFP4], mean over tensors", "Gaussians, rounded to nearest",
          "python 01_nvfp4.py", "CPU", of_error),
    Claim(1, "MXFP4 loses more of a tensor than NVFP4", "given as the reason of its larger loss gap", "[NVFP4], comparison with MXFP4",
          "Gaussian, Laplace, Student-t, outliers", "python 01_nvfp4.py", "CPU", of_mxfp4_error),
    Claim(2, "below some context Ultra's fp32 Mamba state is larger than its FP8 KV cache", "64K tokens", "[Ultra], inference",
          "bytes from the released sizes", "python 02_mamba.py", "CPU", of_cache),
    Claim(3, "the selection bias keeps the busiest expert near the mean load", "1.2 (Ultra, median), 1.3 (Nano)", "[Ultra], load balance",
          "load over mean, 16 experts, skewed data; claimed: below 1.3", "python experiments/repeats.py --what balance --out experiments", "CPU",
          of_balance),
    Claim(3, "experts in a latent of a quarter, and four times as many, learn more for the same routed parameters",
          "all five averages up, MMLU-Pro 29.3 to 34.9", "[LatentMoE], 95B-A8B", "bits per byte minus that of full width, 3-layer hybrid", *LATENT,
          of_latent("quarter", "full width", below=0.0)),
    Claim(3, "a latent of an eighth loses against a quarter", "quality kept up to a quarter only", "[LatentMoE], compression",
          "bits per byte minus the quarter's", *LATENT, of_latent("eighth", "quarter", above=0.0)),
    Claim(3, "a latent of a quarter without more experts loses against one with four times as many", "clearly worse", "[LatentMoE], compression",
          "bits per byte minus the quarter's", *LATENT, of_latent("quarter, experts not multiplied", "quarter", above=0.0)),
    Claim(4, "parameters of Ultra: total / active / MTP head", ULTRA_PARAMETERS, "[Ultra], released tensors", "the model on the meta device",
          "python 04_model.py --preset ultra", "CPU", of_parameters)]


# %% 4 · Stage 05

def gaps_of(rows: list[dict]) -> dict[str, dict]:
    """Name -> the newest row of experiments/nvfp4_gap.py's report."""
    return {row["name"]: row for row in rows if row["stage"] == "nvfp4_gap" and row["what"] == "gap"}


BRANCHES = tuple(f"branch at {share}% of the run" for share in (25, 50, 80))


def of_gap(name: str, below: float) -> Callable:
    def judge_gap(rows):
        row = gaps_of(rows).get(name)
        return row and over_seeds(row["gaps"], lambda x: percent(x, 2), below=below)
    return judge_gap


def of_decay(rows):
    before, end = (gaps_of(rows).get(name) for name in ("before the decay", "at the end"))
    if not (before and end): return None
    more = f"; {percent(before['mean'], 2)} before, {percent(end['mean'], 2)} at the end"
    return over_seeds([100 * (b - a) for a, b in zip(before["gaps"], end["gaps"])], lambda x: signed(x, 2), above=0.0, more=f" points{more}")


def of_branches(rows):
    found = [row for name, row in gaps_of(rows).items() if name in BRANCHES]
    if len(found) < 3: return None
    shown = ", ".join(percent(row["mean"], 2) for row in found)
    return over_seeds([statistics.mean(x) for x in zip(*(row["gaps"] for row in found))], lambda x: percent(x, 2), below=0.004, more=f": {shown}")


def of_branch_growth(rows):
    found = [row for name, row in gaps_of(rows).items() if name in BRANCHES]
    if len(found) < 3: return None
    grown = [100 * (last - first) for first, last in zip(found[0]["gaps"], found[-1]["gaps"])]
    return over_seeds(grown, lambda x: signed(x, 2), below=0.0, more=" points from first to last")


def of_ingredients(rows):
    """Holds when every ingredient's interval is above 0, does not hold when one's is below."""
    less = {name: row for name, row in gaps_of(rows).items() if row["kind"] == "difference" and name != "mxfp4"}
    if not less: return None
    ours = ", ".join(f"{name} {signed(100 * row['mean'], 2)}" for name, row in less.items())
    seeds = sorted({len(row["seeds"]) for row in less.values()})
    ours = f"{ours} points (seeds each: {' to '.join(map(str, seeds))})"
    verdicts = [over_seeds(row["gaps"], str, above=0.0) for row in less.values()]
    if all(x.verdict == HOLDS for x in verdicts): return Found(ours, HOLDS, min(x.margin for x in verdicts))
    failed = [x.margin for x in verdicts if x.verdict == FAILS]
    return Found(ours, FAILS, max(failed)) if failed else Found(ours, SMALL)


def of_mxfp4_gap(rows):
    row = {name: row for name, row in gaps_of(rows).items() if row["kind"] == "difference"}.get("mxfp4")
    return row and over_seeds([100 * x for x in row["gaps"]], lambda x: signed(x, 2), above=0.0, more=" points more than NVFP4")


def of_late_switch(rows):
    row = next((row for row in gaps_of(rows).values() if row["kind"] == "late-forward-switch"), None)
    # the row has the share for all seeds together, so there is no interval of it
    return row and judge(f"{row['closed']:.0%} of the gap closed ({len(row['seeds'])} seed)", None, None, above=0.0)


def of_flushed(rows):
    row = newest(rows, "nvfp4_stats", all=True)
    if row is None: return None
    forward = {name: x["flushed"] for name, x in row["shares"].items() if "gradient" not in name}
    worst = max(forward, key=forward.get)
    next_most = max(x for name, x in forward.items() if name != worst)
    ours = f"{forward['Mamba output: input']:.0%} of their inputs, of any other forward operand at most {next_most:.0%} (one checkpoint)"
    return Found(ours, HOLDS if worst == "Mamba output: input" else FAILS)      # a million values, but one training: no margin


def of_merging(name: str, **bound) -> Callable:
    def judge_merging(rows):
        row = newest(rows, "merging", what="differences")
        if row is None: return None
        return over_seeds(row["bits_per_byte"][name.format(row["window"])]["by_seed"], lambda x: signed(x, 3), **bound, more=" bits per byte")
    return judge_merging


def of_lost_gradient(rows):
    """The four settings (two models, two MTP weights) stand for seeds."""
    sums = [row for row in rows if row["stage"] == "mtp_gradient" and row["what"] == "sum" and row["dtype"] == "bf16"]
    if not sums: return None
    last = [row["rows"][-1] for row in sums]
    mean, low, high = t_interval([x["lost"] - x["main_lost"] for x in last])
    heads, main_part = (statistics.mean(x[key] for x in last) for key in ("lost", "main_lost"))
    ours = (f"{heads:.0%} of the heads' entries lost, {main_part:.0%} of the main part's ({last[0]['micro_batches']} micro-batches, {len(last)} "
            "settings)")
    return judge(ours, low, high, above=0.0)


def of_spike(rows):
    row = newest(rows, "mtp_gradient", what="training")
    return row and over_seeds(row["bf16_minus_fp32"]["MTP-2"]["by_seed"], lambda x: signed(x, 4), above=0.0, more=f" nats after {row['steps']} steps")


GAP = ("python experiments/nvfp4_gap.py --seeds 0 1 2", "one H200")
ABLATIONS = ("python experiments/nvfp4_gap.py --seeds 0 1 2 --runs ablations", "one H200")
MERGING = ("python experiments/merging.py --seeds 3 --out experiments", "CPU")
GRADIENT = ("python experiments/mtp_gradient.py --steps 20 --seeds 3 --out experiments", "CPU")
PRETRAINING = [
    Claim(5, "4-bit training costs little along the whole run", "below 0.4 % of the loss", "[Ultra], NVFP4 pretraining",
          "115M parameters, 201M tokens, loss gap to bf16", *GAP, of_gap("whole run after the warmup", 0.004)),
    Claim(5, "the loss gap of 4-bit training grows in the decay", "below 1 %, then slightly above 1.5 % (12B, to FP8)", "[NVFP4], 12B run",
          "the same runs", *GAP, of_decay),
    Claim(5, "a short branch out of 4 bits gains little loss", "0.27, 0.28, 0.25 %; claimed here: below 0.4 %", "[Ultra], branches at 5T, 10T, 16T",
          "branches at 25, 50, 80 % of that run", *GAP, of_branches),
    Claim(5, "what a branch out of 4 bits gains does not grow along the run", "0.27 to 0.25 %", "[Ultra], the same branches",
          "last branch minus first", *GAP, of_branch_growth),
    Claim(5, "each ingredient of the recipe is needed", "leaving one out raises the loss (12B)", "[NVFP4], ablations",
          "gap without it minus gap with all, short branches of that run", *ABLATIONS, of_ingredients),
    Claim(5, "MXFP4 costs more than NVFP4", "2.5 % beside 1.5 % (8B)", "[NVFP4], comparison with MXFP4", "the same branches", *ABLATIONS,
          of_mxfp4_gap),
    Claim(5, "leaving 4 bits late in the forward pass alone closes most of the gap", "1.5 to 0.5 %", "[NVFP4], 18 % before the end",
          "the same branches", *ABLATIONS, of_late_switch),
    Claim(5, "4 bits would flush most in Mamba's output projections", "up to 40 % of values (Nano)", "[Ultra], precision",
          "every linear of a trained `tiny` in 4 bits", "python experiments/nvfp4_stats.py --all --out experiments", "CPU", of_flushed),
    Claim(5, "merged checkpoints beat the last one at a constant rate", "+2 to +4 points", "[Super], checkpoint merging",
          "`tiny`, 13 checkpoints of 48 steps, minus-sqrt weights", *MERGING, of_merging("merged right {} - last", below=0.0)),
    Claim(5, "merging gains nothing after a decay", "no gain", "[Super], checkpoint merging", "the same window behind a real decay", *MERGING,
          of_merging("after the decay: merged right {} - last", above=0.0)),
    Claim(5, "summing the output layer's gradient in bf16 loses what the MTP heads add", "7 bits of mantissa, heads at weight 0.05 each",
          "[Ultra], divergence 1", "entries that leave the sum as it was, `tiny`", *GRADIENT, of_lost_gradient),
    Claim(5, "of that bf16 sum the MTP-2 loss suffers first", "spike at 8T tokens", "[Ultra], divergence 1",
          "MTP-2 loss, bf16 sum minus fp32, `tiny`", *GRADIENT, of_spike)]


# %% 5 · Stages 06 and 07

def of_effort(rows):
    """Over all questions of all seeds; one seed decides nothing."""
    row = newest(rows, "repeats", what="effort")
    if row is None: return None
    n, many = sum(row["questions"]), len(row["seeds"]) > 1
    fall, low, high = (100 * x for x in apart(*(wilson(sum(row["right"][mode]), n) for mode in ("medium", "regular"))))
    shorter = statistics.mean(row["tokens"]["regular"]) / statistics.mean(row["tokens"]["medium"])
    ours = (f"{shorter:.1f}× fewer, {signed(fall, 0)} points (95 % {signed(low, 0)} to {signed(high, 0)}; {n} questions, "
            f"{len(row['seeds'])} seed{'s' if many else ''})")
    return judge(ours, *((low, high) if many else (None, None)), above=-7.0)


def of_turns(rows):
    row = newest(rows, "repeats", what="turns")
    if row is None: return None
    share, low, high = wilson(sum(row["same"]), sum(row["turns"]))
    return judge(f"{share:.0%} (95 % {low:.0%} to {high:.0%}; {sum(row['turns']):,} turns)", low, high, above=0.5)


def of_boosting(way: str) -> Callable:
    def judge_boosting(rows):
        row = newest(rows, "repeats", what="boosting")
        if row is None: return None
        before, after = (row["tokens_a_pass"][f"{when} {way}"] for when in ("before", "after"))
        more = f": {statistics.mean(before):.2f} to {statistics.mean(after):.2f}"
        return over_seeds([b / a - 1 for a, b in zip(before, after)], percent, above=0.0, more=more)
    return judge_boosting


def of_posttraining(name: str, **bound) -> Callable:
    """In points of questions answered exactly. The interval is over questions, so one seed decides nothing."""
    def judge_posttraining(rows):
        run = newest_posttraining(rows)
        if run is None or name not in run.found: return None
        row = run.found[name]
        mean, low, high, *seeds = points(row["mean"], row["low"], row["high"], *row["by_seed"])
        ours = f"{mean} points (95 % {low} to {high}; seeds {', '.join(seeds)}), {row['n']:,} questions, {run.size} parameters"
        many = len(row["by_seed"]) > 1
        return judge(ours, row["low"] if many else None, row["high"] if many else None, **bound)
    return judge_posttraining


def of_recovery(rows):
    run = newest_posttraining(rows)
    if run is None or not run.recovered: return None
    ours = ", ".join(f"{domain} {row['mean']:.0%} (95 % {row['low']:.0%} to {row['high']:.0%}; {len(row['seeds'])} seed"
                     f"{'s' if len(row['seeds']) > 1 else ''})" for domain, row in run.recovered.items())
    found = [judge(ours, *((row["low"], row["high"]) if len(row["seeds"]) > 1 else (None, None)), above=0.17) for row in run.recovered.values()]
    return min(found, key=lambda x: (x.verdict == HOLDS, x.verdict == SMALL, x.margin))      # the worst domain speaks for all


FULL = ("python experiments/posttrain.py --full --device cuda --seeds 0 1 2", "one H200")
BOOSTING = ("python experiments/repeats.py --what boosting --out experiments", "CPU")
EXACT = "exact answers, 17M parameters"
POSTTRAINING = [
    Claim(6, "medium effort writes far fewer tokens for little accuracy", "2.5× fewer, −7 %", "[Ultra], reasoning modes",
          "`tiny`, held-out questions; claimed: above −7 points", "python experiments/repeats.py --what effort --out experiments", "CPU", of_effort),
    Claim(7, "RLVR raises accuracy over the SFT that it starts from", "up on 10 of 11 benchmarks", "[Ultra], table of stages", EXACT, *FULL,
          of_posttraining("RLVR - SFT", above=0.0)),
    Claim(7, "one round of distillation raises accuracy over RLVR", "up on all 11", "[Ultra], table of stages", EXACT, *FULL,
          of_posttraining("MOPD round 1 - RLVR", above=0.0)),
    Claim(7, "two rounds of distillation raise accuracy over RLVR", "up on all 11", "[Ultra], table of stages", EXACT, *FULL,
          of_posttraining("MOPD round 2 - RLVR", above=0.0)),
    Claim(7, "distillation recovers part of what its teachers are ahead", "17 to 173 %", "[Ultra], recovery",
          "domains where the teacher leads by 10 points; claimed: above 17 %", *FULL, of_recovery),
    Claim(7, "warming the student up on the teachers' answers helps distillation", "GDPVal 35.3 to 46.7, HLE 26.3 to 26.7",
          "[Ultra], warmup ablation", EXACT, *FULL, of_posttraining("MOPD with warmup - without", above=0.0)),
    Claim(7, "a teacher's word on every token teaches more than rewards", "students reach their teachers in two rounds", "[Ultra], MOPD",
          f"{EXACT}: GRPO of equal tokens minus MOPD", *FULL, of_posttraining("GRPO of equal tokens - MOPD", below=0.0)),
    Claim(7, "matching the teacher's whole distribution does not help", "no gain", "[Ultra], MOPD ablations",
          f"{EXACT}: full KL minus MOPD; claimed: below +1", *FULL, of_posttraining("full-vocabulary KL - MOPD", below=1.0)),
    Claim(7, "more rollouts a prompt do not help distillation", "no gain", "[Ultra], MOPD ablations",
          f"{EXACT}: four rollouts minus one; claimed: below +1", *FULL, of_posttraining("4 rollouts a prompt - MOPD", below=1.0)),
    Claim(7, "most single turns of worked conversations teach nothing: their rollouts all earn the same", "71 %", "[PivotRL], filter",
          "tools, 8 rollouts a turn, `tiny`; claimed: above 50 %", "python experiments/repeats.py --what turns --out experiments", "CPU", of_turns),
    Claim(7, "boosting the MTP head raises the tokens a pass with 7 greedy drafts", "4.387 to 4.584 tokens (+4.5 %)", "[Ultra], MTP boosting",
          "`tiny`, frozen trunk, forward KL", *BOOSTING, of_boosting("greedy")),
    Claim(7, "boosting raises the tokens a pass with 7 sampled drafts", "4.165 to 4.331 tokens (+4.0 %)", "[Ultra], MTP boosting", "the same",
          *BOOSTING, of_boosting("sampled"))]


# %% 6 · Stage 08

def of_states(plain: str, stochastic: str) -> Callable:
    """The bias of stochastic rounding must be clear below a tenth of that of rounding to nearest."""
    def judge_states(rows):
        row = newest(rows, "ssm_states", what="constant inputs")
        if row is None: return None
        near, sr = row["by_format"][plain], row["by_format"][stochastic]
        half = 1.96 * sr["error"]
        ours = (f"bias {percent(near['bias'], 2)} nearest, {percent(sr['bias'], 2)} ± {100 * half:.2f} stochastic after {row['steps']:,} "
                "constant inputs")
        return judge(ours, abs(sr["bias"]) - half, abs(sr["bias"]) + half, below=abs(near["bias"]) / 10)
    return judge_states


def drafts_of(rows: list[dict]) -> dict[tuple[int, int], dict]:
    """(batch, drafts) -> the newest row on a CPU, of trained text."""
    found = {}
    for row in rows:
        if row["stage"] == "bench_infer" and row.get("what") == "drafts" and row["device"] == "cpu": found[row["batch"], row["draft"]] = row
    return found


def speedup(found: dict, batch: int) -> tuple[int, float, float, float]:
    """(best number of drafts, its speed over plain decoding, lowest and highest ratio that the slowest and fastest rounds allow)."""
    plain, drafted = found[batch, 0], {k: row for (b, k), row in found.items() if b == batch and k}
    k, best = max(drafted.items(), key=lambda item: item[1]["tokens_per_s"])
    return k, best["tokens_per_s"] / plain["tokens_per_s"], best["slowest"] / plain["fastest"], best["fastest"] / plain["slowest"]


def of_draft_speed(rows):
    found = drafts_of(rows)
    if not found: return None
    k, ratio, low, high = speedup(found, 1)
    return judge(f"{ratio:.2f}× with {k} drafts (rounds {low:.2f} to {high:.2f})", low, high, above=1.0)


def of_batches(rows):
    found = drafts_of(rows)
    if not found: return None
    (k, one, *ends), (many_k, many, *many_ends) = speedup(found, 1), speedup(found, max(batch for batch, _ in found))
    fall, low, high = apart((one, *ends), (many, *many_ends))
    ours = f"{one:.2f}× with {k} drafts at batch 1, {many:.2f}× with {many_k} at batch {max(batch for batch, _ in found)}"
    return judge(ours, low, high, above=0.0)


def of_same_text(rows):
    found = [row["same_text"] for row in drafts_of(rows).values()]
    return counted(f"{min(found):.0%} of the texts equal in {len(found)} settings", min(found) == 1) if found else None


def of_first_drafts(rows):
    """The first two of 7 greedy drafts, as the share that both are kept of those that could be."""
    row = newest(rows, "repeats", what="boosting")
    return row and over_seeds([kept[0] * kept[1] for kept in row["kept"]["after greedy"]], lambda x: f"{x:.0%}", above=0.97)


def of_depth(rows):
    row = newest(rows, "repeats", what="boosting")
    if row is None: return None
    by_seed = row["kept"]["before greedy"]
    ends = [statistics.mean(kept[place] for kept in by_seed) for place in (0, -1)]
    more = f" points: {ends[0]:.0%} at place 1, {ends[1]:.0%} at place {len(by_seed[0])}"
    return over_seeds([100 * (kept[0] - kept[-1]) for kept in by_seed], lambda x: signed(x, 0), above=0.0, more=more)


def of_ranking(rows):
    """One checkpoint, and no interval of a score in the rows."""
    row = newest(rows, "autoquantize")
    if row is None: return None
    by_rule = {rule: row["curves"][f"all nvfp4, {rule}"][0] for rule in ("max", "four_over_six", "mse")}
    return judge("KL " + ", ".join(f"{x['kl']:.1e} {rule}" for rule, x in by_rule.items()) + "; exact " +
                 ", ".join(f"{x['exact']:.0%}" for x in by_rule.values()) + " (one checkpoint)", None, None, above=0.0)


def of_autoquantize(rows):
    row = newest(rows, "autoquantize")
    if row is None: return None
    table = row["curves"]["Ultra's table"][0]
    ours = min(row["curves"]["by KL"], key=lambda x: abs(x["bits"] - table["bits"]))
    return judge(f"{ours['kl']:.1e} against {table['kl']:.1e} nats a token at {ours['bits']:.2f} and {table['bits']:.2f} bits (one checkpoint)",
                 None, None, below=0.0)


DRAFTS = ("python experiments/bench_infer.py --only drafts", "CPU")
STATES = ("python experiments/ssm_states.py --only constant --out experiments", "CPU")
INFERENCE = [
    Claim(8, "SSM states in fp16 go wrong when rounded to nearest, and not when rounded stochastically",
          "accuracy −2.32 % nearest, +0.32 % stochastic", "[Ultra], SSM cache", "one slow-decaying head's state; claimed: a tenth of the bias",
          *STATES, of_states("fp16", "fp16_sr")),
    Claim(8, "so do SSM states in int8, where small numbers stand beside a large one", "−2.87 % nearest, 0.00 % stochastic", "[Ultra], SSM cache",
          "the same", *STATES, of_states("int8, beside a large value", "int8_sr, beside a large value")),
    Claim(8, "verified drafts leave the text as it was", "drafts that are verified change nothing", "[Ultra], speculative decoding",
          "`tiny`, greedy, batches 1 to 32, 0 to 7 drafts", *DRAFTS, of_same_text),
    Claim(8, "drafts speed up decoding at batch 1", "2.89× with 6 drafts (GB200)", "[Ultra], draft length", "`tiny`, 2 CPU threads", *DRAFTS,
          of_draft_speed),
    Claim(8, "the gain of drafting shrinks as the batch grows", "short drafts or none at large batches", "[Ultra], draft length", "the same", *DRAFTS,
          of_batches),
    Claim(8, "the first two MTP drafts are nearly always kept", "97 % of the first two", "[White paper], MTP",
          "`tiny`, boosted head: both kept, greedy", *BOOSTING, of_first_drafts),
    Claim(8, "later MTP drafts are kept less often than the first", "falls from place to place", "[Ultra], MTP boosting",
          "the head before boosting, first place minus last; seeds of the questions", *BOOSTING, of_depth),
    Claim(8, "a lower error of the weights need not make a better model", "Four-Over-Six 98.50, full sweep 98.40 %", "[Ultra], recovery at 5.03 bits",
          "`tiny` all in NVFP4, KL to 16 bits and exact answers", "python experiments/autoquantize.py --out experiments", "CPU", of_ranking)]
CLAIMS = [*EARLY, *PRETRAINING, *POSTTRAINING, *INFERENCE]

# what has no published counterpart: controls that the report does not have, and choices it did not measure
CONTROLS = [
    Claim(7, "RLVR against more SFT of equal wall time", "no such control", "-", EXACT, *FULL,
          of_posttraining("RLVR - more SFT of equal time", above=0.0)),
    Claim(7, "RLVR against SFT, sampled answers", "no such control", "-", EXACT, *FULL, of_posttraining("RLVR - SFT, sampled", above=0.0)),
    Claim(8, "KL to 16 bits: formats by AutoQuantize against Ultra's table at as many bits", "not published", "-", "`tiny`",
          "python experiments/autoquantize.py --out experiments", "CPU", of_autoquantize)]


# %% 7 · Tables

RULE = ("One claim of each stage: of those that the rows decide, either way, the one whose interval lies farthest from the claim's bound, counted in "
        "half widths of the interval.")


def strongest(rows: list[dict], claims: list[Claim] | None = None) -> list[Claim]:
    """One claim a stage, by RULE; among equals the first in the list. A stage without a decided claim shows its first."""
    best: dict[int, Claim] = {}
    for claim in CLAIMS if claims is None else claims:
        if claim.stage not in best or claim.verdict(rows).margin > best[claim.stage].verdict(rows).margin: best[claim.stage] = claim
    return [best[stage] for stage in sorted(best)]


def table_best(rows: list[dict]) -> str:
    lines = []
    for claim in strongest(rows):
        found = claim.verdict(rows)
        lines.append(f"| {claim.text} | {claim.published} | {found.ours} | **{found.verdict}** | `{claim.command}` |")
    return f"{RULE}\n\n| claim | published | here | verdict | command |\n|---|---|---|---|---|\n" + "\n".join(lines)


def tally(rows: list[dict]) -> str:
    """12 hold, 5 do not hold, ..  of all claims."""
    verdicts = [claim.verdict(rows).verdict for claim in CLAIMS]
    words = {HOLDS: "hold", FAILS: "do not hold", SMALL: "are too small to tell", NO_ROW: "have no row yet"}
    return f"Of {len(CLAIMS)} claims {', '.join(f'{verdicts.count(v)} {word}' for v, word in words.items() if v in verdicts)}."


def table_all(rows: list[dict], claims: list[Claim] | None = None) -> str:
    head = "| stage | claim | published | source | what we measure | here | verdict | command | on |\n|---|---|---|---|---|---|---|---|---|\n"
    lines = []
    for claim in CLAIMS if claims is None else claims:
        found = claim.verdict(rows)
        lines.append(f"| {claim.stage:02d} | {claim.text} | {claim.published} | {claim.source} | {claim.measured} | {found.ours} "
                     f"| **{found.verdict}** | `{claim.command}` | {claim.on} |")
    return head + "\n".join(lines)


@dataclass(frozen=True)
class Config:
    """Prints every claim with its verdict."""
    rows: Path = ROOT / "experiments" / "results.jsonl"


def main(config: Config) -> None:
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    rows = read_rows(config.rows)
    importlib.import_module("01_nvfp4").print_table(tally(rows), ["claim", "here", "verdict", "margin"], [
        [claim.text, found.ours, found.verdict, f"{found.margin:.1f}"] for claim in [*CLAIMS, *CONTROLS] for found in [claim.verdict(rows)]])


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Config, description=__doc__))
