"""Divergence 1, in small: a bf16 sum forgets what the MTP heads have to say to the output layer.

At 8T tokens Ultra's output-layer gradient was accumulated in bf16 instead of fp32. The MTP losses weigh 0.05 each, so their addends are small
beside the sum; bf16 lost them, and the MTP-2 loss was the first to rise  [Ultra, divergence 1].

A bf16 number has 8 significant bits: a sum in [2^m, 2^(m+1)) moves in steps of 2^(m-7), and an addend below half a step, 2^(m-8), leaves it as
it was. So an addend is always lost when the sum is more than 512 times larger, and never when it is less than 256 times larger.

The smallest addends are lost first, so the share of entries lost runs ahead of the error of the MTP gradient as a whole; the table has both.
Part 2 says with its spread whether so short a training shows any harm; one seed cannot say, three may find none.

Run:     python experiments/mtp_gradient.py              # 2 to 3 min on a CPU; figure and rows in out/
         python experiments/mtp_gradient.py --steps 100 --seeds 3 --out experiments      # longer, rows to experiments/results.jsonl
Shows:   1  the mechanism: real gradients of preset tiny, summed over micro-batches in both dtypes
         2  what it does: two trainings from one start that differ only in the dtype of that sum
Letters: v vocabulary  d model width  k prediction depth
"""
from __future__ import annotations

import importlib
import math
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def stage(name: str):
    """A numbered stage, importable from this folder."""
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


@dataclass(frozen=True)
class Config:
    """Sums the output layer's gradient in fp32 and in bf16, and trains with both."""
    steps: int = 20                 # optimizer steps of each training
    micro_batches: int = 32         # of a step, one sequence each; ours: Ultra's step has 3,072 sequences
    seq: int = 64                   # tokens a sequence, ours: Ultra 8,192
    seeds: int = 1                  # pairs of trainings: another start and other data each
    mtp_weight: float = 0.1         # over both depths, in the trainings and the first sum  [Ultra]
    other_weight: float = 0.3       # in the second sum  [NVIDIA's recipe of Super]
    longest: int = 128              # micro-batches of the longest sum in part 1
    data: tuple[str, ...] = ()      # as stage 05's: built-in sources by name or files; nothing = all built-in sources
    threads: int = 1                # torch threads
    home: Path = ROOT / "out"       # the figure, and stage 05's text and tokens
    out: Path = ROOT / "out"        # results.jsonl in this folder gets the rows

    def __post_init__(self):
        for name in ("steps", "micro_batches", "seq", "seeds", "longest", "threads"):
            if getattr(self, name) < 1: raise ValueError(f"{name} = {getattr(self, name)} must be at least 1.")
        for name in ("mtp_weight", "other_weight"):
            if getattr(self, name) <= 0: raise ValueError(f"{name} = {getattr(self, name)} must be positive: without it there is no MTP gradient.")


# %% 1 · The sum

class RunningSum:
    """A gradient buffer in one dtype. Each addend comes in fp32 and the new sum is rounded once, as a product that accumulates into it does."""
    def __init__(self, like: Tensor, dtype: torch.dtype):
        self.sum = torch.zeros_like(like, dtype=dtype)

    def add(self, addend: Tensor) -> float:
        """Adds; returns the share lost: of the addend's non-zero entries, those that left the sum as it was.  bf16: 1 + 2^-9 is 1, lost."""
        before, self.sum = self.sum, (self.sum.float() + addend).to(self.sum.dtype)
        there, changed = torch.count_nonzero(addend).item(), torch.count_nonzero(self.sum != before).item()      # a zero changes nothing
        return (there - changed) / max(there, 1)


def gradient_parts(losses, weight_vd: Tensor) -> list[Tensor]:
    """The output layer's gradients of one micro-batch, unweighted: the main loss's, then each depth's."""
    return [torch.autograd.grad(part, weight_vd, retain_graph=True)[0].float() for part in (losses.main, *losses.mtp_k)]


def weighted(parts: list[Tensor], mtp_weight: float) -> list[Tensor]:
    """The addends of training, in the order in which they are added (ours): main, then mtp_weight / K times each depth's."""
    main, *mtp = parts
    return [main, *(mtp_weight / len(mtp) * part for part in mtp)]


class Sums:
    """What one way of summing makes of the MTP parts: the sum with them, the sum without, and the true sum of the MTP parts alone in float64."""
    def __init__(self, like: Tensor, dtype: torch.dtype):
        self.both, self.alone, self.true = RunningSum(like, dtype), RunningSum(like, dtype), torch.zeros_like(like, dtype=torch.float64)
        self.main_lost, self.lost = [], []

    def add(self, main: Tensor, *mtp: Tensor) -> None:
        self.main_lost.append(self.both.add(main))
        self.lost += [self.both.add(part) for part in mtp]
        self.alone.add(main)
        for part in mtp: self.true += part

    def row(self) -> dict:
        """Of the sum so far:
        lost, main_lost: share of the MTP parts' entries (or the main parts') that left the sum as it was when they were added.
        error: what the MTP parts left behind is the sum with them minus the sum without; |left - true| / |true|.
        kept: the component of what they left along the true one, 1 is all of it.
        """
        left = self.both.sum.double() - self.alone.sum.double()
        return dict(lost=statistics.mean(self.lost), main_lost=statistics.mean(self.main_lost),
                    error=((left - self.true).norm() / self.true.norm()).item(), kept=((left * self.true).sum() / self.true.square().sum()).item())


def sum_up(micro_batches: Iterable[list[Tensor]], ways: list[tuple[str, float]]) -> dict[tuple[str, float], list[dict]]:
    """Adds gradient_parts of micro-batch 1, then 2, ...; for each way (dtype, mtp_weight) one row after 1, 2, 4, 8, ... of them."""
    sums, rows = {}, {way: [] for way in ways}
    for n, parts in enumerate(micro_batches, 1):
        for way in ways:
            dtype, mtp_weight = way
            if n == 1: sums[way] = Sums(parts[0], DTYPES[dtype])
            sums[way].add(*weighted(parts, mtp_weight))
            if n & (n - 1) == 0: rows[way].append(dict(micro_batches=n, **sums[way].row()))
    return rows


# %% 2 · A training whose output layer's gradient is summed in a dtype of our choice

class OutputGradient:
    """Takes the output layer's gradient away from autograd: an objective for stage 05's Trainer that keeps its own sum, part by part."""
    def __init__(self, model, config: Config, dtype: torch.dtype):
        self.weight, self.config, self.dtype, self.lost_now, self.lost = model.lm_head.weight, config, dtype, [], []
        self.weight.register_post_accumulate_grad_hook(self.replace)

    def replace(self, weight: Tensor) -> None:
        """After each micro-batch's backward pass: what autograd summed in fp32 gives way to our sum."""
        weight.grad.copy_(self.buffer.sum)

    def __call__(self, model, batch):
        losses = stage("04_model").loss(model, *batch, mtp_weight=self.config.mtp_weight)
        if self.weight.grad is None: self.buffer, self.lost_now = RunningSum(self.weight, self.dtype), []      # the first micro-batch of a step
        main, *mtp = weighted(gradient_parts(losses, self.weight), self.config.mtp_weight)
        self.buffer.add(main / self.config.micro_batches)
        self.lost_now += [self.buffer.add(part / self.config.micro_batches) for part in mtp]
        if len(self.lost_now) == len(mtp) * self.config.micro_batches: self.lost.append(statistics.mean(self.lost_now))
        return losses


def trainer_of(config: Config, seed: int, data):
    """Stage 05's Trainer with a fresh model: the same weights, text and schedule for the same seed."""
    model04, pretrain = stage("04_model"), stage("05_pretrain")
    settings = pretrain.PretrainConfig(steps=config.steps, batch=config.micro_batches, micro_batches=config.micro_batches, seq=config.seq, seed=seed,
                                       mtp_weight=config.mtp_weight, branches=())
    batches = pretrain.Batches(data.train, pretrain.Blend.of(data.train, settings.blend_switch), settings.batch, settings.seq, settings.steps, seed)
    torch.manual_seed(seed)
    return pretrain.Trainer(settings, model04.Nemotron(model04.preset(settings.preset)), batches, config.home)


def train(config: Config, seed: int, dtype: str, data):
    """The trainer after its steps; its objective.lost is the share of MTP additions lost, step by step."""
    trainer = trainer_of(config, seed, data)
    trainer.objective = OutputGradient(trainer.model, config, DTYPES[dtype])
    for _ in range(config.steps):
        row = trainer.train_step()
        if row["step"] % 10 == 0 or row["step"] in (1, config.steps):
            print(f"seed {seed} | {dtype} | step {row['step']:4d} | loss {row['loss']:.4f} | MTP-1 {row['mtp_1']:.4f} | MTP-2 {row['mtp_2']:.4f} | "
                  f"MTP parts lost {trainer.objective.lost[-1]:6.1%}", flush=True)
    return trainer


def differences(runs: dict[str, list[list[dict]]], key: str) -> list[list[float]]:
    """bf16 minus fp32 of one loss, [seed][step]."""
    return [[b[key] - f[key] for b, f in zip(low, full)] for low, full in zip(runs["bf16"], runs["fp32"])]


def summary(by_seed: list[list[float]]) -> dict:
    """Mean over the last quarter of the steps for each seed; mean and standard deviation of these over the seeds; and whether the mean lies
    outside what such a spread gives by chance (95 %). One seed cannot tell: effect is None."""
    means = [statistics.mean(steps[-math.ceil(len(steps) / 4):]) for steps in by_seed]
    n, mean = len(means), statistics.mean(means)
    # two-sided 95 % quantile of Student's t with n - 1 degrees of freedom; beyond ten seeds that of ten, which is stricter
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}.get(n, 2.26)
    spread = statistics.stdev(means) if n > 1 else None
    return dict(by_seed=means, mean=mean, spread=spread, effect=abs(mean) > t * spread / math.sqrt(n) if n > 1 else None)


# %% 3 · Figure and command

def measure_sums(config: Config, model, data) -> dict[tuple[str, float], list[dict]]:
    """sum_up over real gradients of one model, on text of another order than any training's."""
    model04, pretrain = stage("04_model"), stage("05_pretrain")
    # a seed that no training has
    batches = pretrain.Batches(data.train, pretrain.Blend.of(data.train), 1, config.seq, config.longest, seed=config.seeds)
    losses = (model04.loss(model, *batches(i), mtp_weight=config.mtp_weight) for i in range(config.longest))
    ways = dict.fromkeys((("fp32", config.mtp_weight), ("bf16", config.mtp_weight), ("bf16", config.other_weight)))      # each once
    return sum_up((gradient_parts(x, model.lm_head.weight) for x in losses), list(ways))


def print_sums(sums: dict[str, dict]) -> None:
    print("\nlost: entries added without changing the sum;  error, kept: of what the MTP parts left behind in the sum, against the true MTP gradient")
    print(f"{'model':16} {'sum':>5} {'MTP weight':>10} {'micro-batches':>14} {'MTP lost':>9} {'main lost':>10} {'MTP error':>10} {'MTP kept':>9}")
    for model, ways in sums.items():
        for (dtype, mtp_weight), rows in ways.items():
            for row in rows:
                print(f"{model:16} {dtype:>5} {mtp_weight:10g} {row['micro_batches']:14d} {row['lost']:9.2%} {row['main_lost']:10.2%} "
                      f"{row['error']:10.3f} {row['kept']:9.3f}")


def print_training(summaries: dict[str, dict], config: Config) -> None:
    print(f"\nbf16 minus fp32, mean of the last {math.ceil(config.steps / 4)} of {config.steps} steps")
    for name, s in summaries.items():
        verdict = {None: "one seed: no statement", False: "no effect beyond the spread of the seeds", True: "an effect, at 95 %"}[s["effect"]]
        print(f"{name:6} {s['mean']:+.4f} nats, standard deviation over seeds {'-' if s['spread'] is None else format(s['spread'], '.4f')} "
              f"({', '.join(f'{x:+.4f}' for x in s['by_seed'])}): {verdict}")


def plot(config: Config, sums: dict[str, dict], by_seed: list[list[float]], path: Path) -> None:
    """Figure: share of entries lost against the length of the sum; MTP-2 loss of the bf16 training minus that of the fp32 training."""
    nvfp4 = stage("01_nvfp4")
    fig, (left, right) = nvfp4.new_figure(columns=2)
    fresh, trained = sums.values()
    # one line of the left plot: rows, what of them, colour, style, label
    low, other, full = ("bf16", config.mtp_weight), ("bf16", config.other_weight), ("fp32", config.mtp_weight)
    lines = [(trained, low, "lost", "#1f4e8c", "-", f"MTP parts, weight {config.mtp_weight:g}"),
             (fresh, low, "lost", "#1f4e8c", "--", f"MTP parts, weight {config.mtp_weight:g}, untrained model"),
             (trained, other, "lost", "#e8a33d", "-", f"MTP parts, weight {config.other_weight:g}"),
             (trained, low, "main_lost", "0.5", "-", "main part"),
             (trained, full, "lost", "#3d8b4f", "-", f"MTP parts in an fp32 sum, weight {config.mtp_weight:g}")]
    for ways, way, key, colour, style, label in lines:
        left.plot([row["micro_batches"] for row in ways[way]], [100 * row[key] for row in ways[way]], style, color=colour, marker=".", label=label)
    last = trained[low][-1]
    left.set_title(f"A bf16 sum of {last['micro_batches']} micro-batches loses {last['lost']:.0%} of the MTP parts' entries")
    left.set_xscale("log", base=2); left.set_xticks([row["micro_batches"] for row in trained[low]], [row["micro_batches"] for row in trained[low]])
    left.set_xlabel("micro-batches summed"); left.set_ylabel("entries added without changing the sum (%)")
    left.set_ylim(-2, 102); left.legend(frameon=False, fontsize=9, loc="upper left")
    steps = range(1, config.steps + 1)
    for i, d in enumerate(by_seed): right.plot(steps, d, color="#9fb8d8", linewidth=1, label="one seed" if i == 0 else None)
    if len(by_seed) > 1: right.plot(steps, [statistics.mean(d) for d in zip(*by_seed)], color="#1f4e8c", linewidth=2, label="mean of the seeds")
    right.axhline(0, color="0.3", linewidth=1)
    s = summary(by_seed)
    right.set_title(f"MTP-2 loss with the bf16 sum: {s['mean']:+.4f} " + ("nats (one seed)" if s["spread"] is None else
                    f"± {s['spread']:.4f} nats ({len(by_seed)} seeds)"))
    quarter = math.ceil(config.steps / 4)
    right.axvspan(config.steps - quarter + 0.5, config.steps + 0.5, color="0.95", label="last quarter: the mean in the title")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_xlabel("optimizer step"); right.set_ylabel("MTP-2 loss, bf16 minus fp32 (nats)"); right.legend(frameon=False, fontsize=9)
    nvfp4.save_figure(fig, path)


def rounded(x, digits: int = 5):
    if isinstance(x, dict): return {key: rounded(value, digits) for key, value in x.items()}
    if isinstance(x, (list, tuple)): return [rounded(value, digits) for value in x]
    return round(x, digits) if isinstance(x, float) else x


def main(config: Config) -> None:
    began = time.perf_counter()
    nvfp4, model04, pretrain = stage("01_nvfp4"), stage("04_model"), stage("05_pretrain")
    torch.set_num_threads(config.threads)
    data = pretrain.prepare_data(config.data, config.home / "data", model04.preset("tiny").vocab)
    sums = {"untrained": measure_sums(config, trainer_of(config, 0, data).model, data)}
    runs, lost = {dtype: [] for dtype in DTYPES}, {dtype: [] for dtype in DTYPES}
    for seed in range(config.seeds):
        for dtype in DTYPES:
            trainer = train(config, seed, dtype, data)
            runs[dtype].append(trainer.rows); lost[dtype].append(statistics.mean(trainer.objective.lost))
            if seed == 0 and dtype == "fp32": sums[f"after {config.steps} steps"] = measure_sums(config, trainer.model, data)
    by_key = {name: differences(runs, key) for name, key in (("main", "loss"), ("MTP-1", "mtp_1"), ("MTP-2", "mtp_2"))}
    summaries = {name: summary(by_seed) for name, by_seed in by_key.items()}
    print_sums(sums)
    print_training(summaries, config)
    figure = config.home / "mtp_gradient.png"
    plot(config, sums, by_key["MTP-2"], figure)
    for model, ways in sums.items():
        for (dtype, mtp_weight), rows in ways.items():
            nvfp4.write_row(config.out, "mtp_gradient", what="sum", model=model, dtype=dtype, mtp_weight=mtp_weight, seq=config.seq,
                            rows=rounded(rows))
    nvfp4.write_row(config.out, "mtp_gradient", what="training", preset="tiny", steps=config.steps, micro_batches=config.micro_batches,
                    seq=config.seq, seeds=config.seeds, mtp_weight=config.mtp_weight,
                    lost=rounded({dtype: statistics.mean(x) for dtype, x in lost.items()}),
                    last_losses={dtype: rounded([[x[-1][key] for key in ("loss", "mtp_1", "mtp_2")] for x in runs[dtype]]) for dtype in DTYPES},
                    bf16_minus_fp32=rounded(summaries), mtp_2_by_step=rounded(by_key["MTP-2"]),
                    threads=config.threads, seconds=round(time.perf_counter() - began, 1))
    print(f"\nMTP additions lost in training: {statistics.mean(lost['bf16']):.1%} in bf16, {statistics.mean(lost['fp32']):.1%} in fp32"
          f"   figure: {figure}   {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    stage("01_nvfp4").run_command(main, Config, __doc__)
