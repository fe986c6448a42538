"""Last, merged and really decayed checkpoints: what a mean of checkpoints at a constant rate is worth.

Ultra merged its checkpoints in a sliding window of 500B tokens, a checkpoint each 25B  [Ultra]. Super read 2 to 4 points more from merged
checkpoints than from the last one while the rate was constant, without running a decay for it, and nothing more after a long decay  [Super].
A window of steps s to s + W at a constant rate can end in three ways, all from the same text in the same order:
    last      the checkpoint at s + W
    merged    the mean of the checkpoints s, s + every, .., s + W with the weights of a minus-sqrt decay, in both timings of stage 05  [WSM],
              and with equal weights
    decayed   from the checkpoint at s, the same W steps once more while the rate falls by minus-sqrt to a hundredth
All of a checkpoint is averaged, the selection bias of the experts as well. The blend does not switch on the way, so that only the rate differs.
A seed is another start and another order of the text. Every difference is taken within a seed, then averaged over the seeds, with a 95 %
interval from Student's t: one seed has none. The defaults were tried out on seed 100, which no command here runs by itself.

Sources: [Ultra] Nemotron 3 Ultra report, arXiv 2606.15007 · [Super] Nemotron 3 Super report · [WSM] arXiv 2507.17634

Run:   python experiments/merging.py                                # 3 min on 2 CPU cores, one seed; figure and rows in out/
       python experiments/merging.py --seeds 3 --out experiments    # 9 min; rows to experiments/results.jsonl; --resume after Ctrl-C
Disk:  1.6 GB while a seed runs: about forty checkpoints of 40 MB, deleted when it is done.
"""
from __future__ import annotations

import importlib
import json
import math
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parent.parent
Weights = Literal["right", "left", "uniform"]
COLOURS = ("#1f4e8c", "#3d8b4f", "#e8a33d")      # windows, longest first


def stage(name: str):
    """A numbered stage, importable from this folder."""
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


@dataclass(frozen=True)
class Config:
    """Compares the last, the merged and the really decayed checkpoint of a run at a constant rate."""
    preset: Literal["tiny", "small"] = "tiny"
    steps: int = 400                # of the run; warmup as in stage 05, then the rate stays
    seeds: int = 1                  # runs: 0, 1, ..
    window: int = 48                # steps of the longest window, 12 % of the run; half and a quarter of it, too; ours: Ultra 500B tokens, 2.5 %
    every: int = 4                  # steps between checkpoints, a twelfth of the window, ours: Ultra 25B tokens, a twentieth
    batch: int = 4                  # sequences a step, ours: Ultra 3,072
    seq: int = 128                  # tokens a sequence, ours: Ultra 8,192
    lr: float = 4e-3                # the constant rate: stage 05's peak for tiny, ours: Ultra 2.5e-4
    eval_windows: int = 8           # windows of held-out text scored per source
    data: tuple[str, ...] = ()      # as stage 05's: built-in sources by name or files; nothing = all built-in sources
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    threads: int = 1                # torch threads
    resume: bool = False            # go on with a run of these settings that was stopped: seeds in out/results.jsonl, checkpoints in home
    home: Path = ROOT / "out"       # the figure, checkpoints while they are needed, and stage 05's text and tokens
    out: Path = ROOT / "out"        # results.jsonl in this folder gets the rows

    def __post_init__(self):
        for name in ("steps", "seeds", "window", "every", "batch", "seq", "eval_windows", "threads"):
            if getattr(self, name) < 1: raise ValueError(f"{name} = {getattr(self, name)} must be at least 1.")
        if self.window % (4 * self.every):
            raise ValueError(f"window = {self.window} must be a multiple of 4 · every = {4 * self.every}: a quarter of it is a window, too.")
        if self.lr <= 0: raise ValueError(f"lr = {self.lr} must be positive: without steps all checkpoints are equal.")
        warmup = stage("05_pretrain").PretrainConfig(steps=self.steps).warmup_steps
        if self.first < warmup:
            raise ValueError(f"the first window would begin at step {self.first}, in the warmup of {warmup} steps: raise steps or lower window.")

    @property
    def first(self) -> int: return self.steps - 2 * self.window      # of the checkpoints

    @property
    def windows(self) -> tuple[int, ...]: return self.window, self.window // 2, self.window // 4

    @property
    def ends(self) -> range: return range(self.steps - self.window, self.steps + 1, self.window // 4)     # where the sliding window stops


# %% 1 · Last, merged, decayed

def folder_at(home: Path, step: int) -> Path:
    return home / f"step-{step:06d}"


def run_settings(config: Config, seed: int):
    """Stage 05's settings of the run: no decay, one blend, checkpoints only where fit is told to save."""
    return stage("05_pretrain").PretrainConfig(
        preset=config.preset, out=config.home, steps=config.steps, batch=config.batch, seq=config.seq, lr=config.lr, decay=0.0,
        blend_switch=1.0, device=config.device, seed=seed, save_every=config.steps, keep=config.steps, health_every=0, branches=())


def text_of(settings, data):
    pretrain = stage("05_pretrain")
    blend = pretrain.Blend.of(data.train, settings.blend_switch)
    return pretrain.Batches(data.train, blend, settings.batch, settings.seq, settings.steps, settings.seed)


def fit(trainer, save_at, label: str) -> None:
    if not trainer.fit(trainer.config.steps, save_at=save_at, log_every=100, label=label): raise KeyboardInterrupt


def constant_run(config: Config, seed: int, data, home: Path) -> Path:
    """Trains to the end at a constant rate; returns the folder with the checkpoints of the last 2 · window steps. Goes on where it was stopped."""
    model04, pretrain, settings, run = stage("04_model"), stage("05_pretrain"), run_settings(config, seed), home / "constant"
    torch.manual_seed(seed)
    parts, shared = (text_of(settings, data), run), dict(tokenizer=data.tokenizer, data_hash=pretrain.hash_of(data))
    if pretrain.checkpoints(run): trainer = pretrain.Trainer.load(pretrain.newest_checkpoint(run), settings, *parts, **shared)
    else: trainer = pretrain.Trainer(settings, model04.Nemotron(model04.preset(settings.preset)), *parts, **shared)
    fit(trainer, range(config.first, config.steps + 1, config.every), f"seed {seed}, constant rate")
    return run


def decayed_run(config: Config, seed: int, data, constant: Path, window: int, save_at=()) -> Path:
    """The last `window` steps once more, with a decay over exactly these: share = window / steps of the same run, same text.

    The rate of step s + j is low + (lr - low) (1 - sqrt(j / window)), with low = lr / 100 at the end as in Ultra.
    """
    settings = replace(run_settings(config, seed), decay=window / config.steps, lr_min=config.lr / 100)
    home = constant.parent / f"decay-{window}"
    trainer = stage("05_pretrain").Trainer.load(folder_at(constant, config.steps - window), settings, text_of(settings, data), home,
                                                tokenizer=data.tokenizer)
    if trainer.step in save_at:
        trainer.saved_step = None       # the start is on disk, but not in this folder
        trainer.save()
    fit(trainer, save_at, f"seed {seed}, decay over {window} steps")
    return home


def window_of(home: Path, end: int, window: int, every: int) -> list[Path]:
    """Checkpoints of the window that ends at step `end`, oldest first, both edges included:  end 20, window 8, every 4 -> steps 12 16 20."""
    return [folder_at(home, step) for step in range(end - window, end + 1, every)]


def merged_model(home: Path, end: int, window: int, every: int, weights: Weights):
    pretrain, folders = stage("05_pretrain"), window_of(home, end, window, every)
    n = len(folders)
    return pretrain.merge_checkpoints(folders, [1 / n] * n if weights == "uniform" else pretrain.merge_weights(n, weights))


def held_out_loss(model, config: Config, data) -> float:
    """Bits per byte over the held-out text of all sources; the same windows for every model."""
    pretrain, model = stage("05_pretrain"), model.to(config.device).eval()
    scores = [pretrain.score_text(model, shard, data.tokenizer, config.seq, config.eval_windows) for shard in data.held_out.values()]
    nats, size = map(sum, zip(*scores))
    return nats / math.log(2) / size


def measure_seed(config: Config, seed: int, data, home: Path) -> dict:
    """Every loss of one seed.  last, decay_path: by step;  merged: by weights, window and end;  decayed, merged_after_decay: by window."""
    model04 = stage("04_model")
    loss = lambda model: held_out_loss(model, config, data)
    at = lambda folder: loss(model04.load_checkpoint(folder))
    merged_at = lambda run, end, window, weights: loss(merged_model(run, end, window, config.every, weights))

    run = constant_run(config, seed, data, home)
    last = {step: at(folder_at(run, step)) for step in range(config.first, config.steps + 1, config.every)}
    merged = {"right": {w: {end: merged_at(run, end, w, "right") for end in config.ends} for w in config.windows}}
    for weights in ("left", "uniform"): merged[weights] = {w: {config.steps: merged_at(run, config.steps, w, weights)} for w in config.windows}

    kept = range(config.steps - config.window, config.steps + 1, config.every)      # of the longest decay: merged as well
    branches = {w: decayed_run(config, seed, data, run, w, kept if w == config.window else ()) for w in config.windows}
    longest = branches[config.window]
    decay_path = {step: at(folder_at(longest, step)) for step in config.ends}
    decayed = {w: at(folder_at(branch, config.steps)) for w, branch in branches.items()}
    after = {w: merged_at(longest, config.steps, w, "right") for w in config.windows}
    return dict(last=last, merged=merged, decayed=decayed, decay_path=decay_path, merged_after_decay=after)


# %% 2 · Differences within a seed, interval over the seeds

def interval(values: list[float]) -> dict:
    """Mean, standard deviation over the seeds and half width of the 95 % interval of the mean: t · deviation / sqrt(n).  One value has no spread.

    1 2 3 -> mean 2, deviation 1, half 4.303 / sqrt(3) = 2.484
    """
    n = len(values)
    if n == 1: return dict(by_seed=values, mean=values[0], deviation=None, half=None)
    # two-sided 95 % quantile of Student's t with n - 1 degrees of freedom; beyond ten seeds that of ten, which is stricter
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306}.get(n, 2.262)
    deviation = statistics.stdev(values)
    return dict(by_seed=values, mean=statistics.mean(values), deviation=deviation, half=t * deviation / math.sqrt(n))


def differences(config: Config, seeds: list[dict]) -> dict[str, dict]:
    """Name -> interval of a difference in bits per byte, negative where the first is better. All at the run's last step unless the name says more."""
    end, found = config.steps, {}
    def add(name, of): found[name] = interval([of(s) for s in seeds])
    for w in config.windows:
        for weights in ("right", "left", "uniform"):
            add(f"merged {weights} {w} - last", lambda s, w=w, weights=weights: s["merged"][weights][w][end] - s["last"][end])
    for w in config.windows:
        add(f"merged right {w} - last, mean of {len(config.ends)} ends",
            lambda s, w=w: statistics.mean(s["merged"]["right"][w][e] - s["last"][e] for e in config.ends))
    for w in config.windows: add(f"decayed {w} - last", lambda s, w=w: s["decayed"][w] - s["last"][end])
    for w in config.windows: add(f"merged right {w} - decayed {w}", lambda s, w=w: s["merged"]["right"][w][end] - s["decayed"][w])
    for w in config.windows:
        add(f"after the decay: merged right {w} - last", lambda s, w=w: s["merged_after_decay"][w] - s["decayed"][config.window])
    return found


def verdict(found: dict) -> str:
    if found["half"] is None: return "one seed: no statement"
    if abs(found["mean"]) <= found["half"]: return "no difference beyond the spread of the seeds"
    return "lower, at 95 %" if found["mean"] < 0 else "higher, at 95 %"


# %% 3 · Table, figure and command

def print_differences(found: dict[str, dict]) -> None:
    print(f"\n{'bits per byte of held-out text':48} {'mean':>8} {'95 %':>8} {'spread':>8}  by seed")
    for name, d in found.items():
        half, deviation = ("-" if d[key] is None else f"{d[key]:.4f}" for key in ("half", "deviation"))
        print(f"{name:48} {d['mean']:+8.4f} {'' if half == '-' else '±'}{half:>7} {deviation:>8}  "
              f"{' '.join(f'{x:+.4f}' for x in d['by_seed'])}   {verdict(d)}")


def mean_over(seeds: list[dict], *path) -> dict[int, float]:
    """{step: loss} averaged over the seeds."""
    curves = []
    for s in seeds:
        for key in path: s = s[key]
        curves.append(s)
    return {step: statistics.mean(c[step] for c in curves) for step in curves[0]}


def plot(config: Config, seeds: list[dict], found: dict[str, dict], path: Path) -> None:
    """Figure: held-out loss by step of the last checkpoint, of merged windows and along the decay, means over the seeds; and the differences."""
    nvfp4 = stage("01_nvfp4")
    fig, (left, right) = nvfp4.new_figure(columns=2)
    draw = lambda curve, style, colour, label: left.plot(list(curve), list(curve.values()), style, color=colour, label=label)
    draw(mean_over(seeds, "last"), "-", "0.5", "last checkpoint, constant rate")
    for w, colour in zip(config.windows, COLOURS):
        draw(mean_over(seeds, "merged", "right", w), "o-", colour, f"merged, {w} steps ({w // config.every + 1} checkpoints)")
    draw(mean_over(seeds, "decay_path"), "s--", "#b03030", f"real decay, {config.window} steps")
    left.set_xlabel("optimizer step"); left.set_ylabel("held-out loss (bits per byte)"); left.legend(frameon=False, fontsize=9)

    labels = dict(right="minus-sqrt, right", left="minus-sqrt, left", uniform="equal weights")
    shown = [(f"{label}, {w} steps", f"merged {weights} {w} - last", colour)
             for w, colour in zip(config.windows, COLOURS) for weights, label in labels.items()]
    shown += [(f"real decay, {w} steps", f"decayed {w} - last", "#b03030") for w in config.windows]
    for y, (_, name, colour) in enumerate(shown):
        right.errorbar(found[name]["mean"], -y, xerr=found[name]["half"], fmt="o", color=colour, capsize=3)
    right.axvline(0, color="0.3", linewidth=1)
    right.set_yticks([-y for y in range(len(shown))], [label for label, _, _ in shown])
    right.set_xlabel("difference to the last checkpoint at the end (bits per byte)")

    many = f"mean of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    side = lambda mean: f"{abs(mean):.3f} {'below' if mean < 0 else 'above'}"
    merged, decayed = (side(found[name]["mean"]) for name in (f"merged right {config.window} - last", f"decayed {config.window} - last"))
    left.set_title(f"Bits per byte at the end: the merged window lies {merged} the\nlast checkpoint, the real decay {decayed} it ({many})")
    right.set_title("Left of the line: better than the last checkpoint" + ("\n(bars: 95 % intervals over the seeds)" if len(seeds) > 1 else ""))
    nvfp4.save_figure(fig, path)


def rounded(x, digits: int = 5):
    if isinstance(x, dict): return {key: rounded(value, digits) for key, value in x.items()}
    if isinstance(x, (list, tuple)): return [rounded(value, digits) for value in x]
    return round(x, digits) if isinstance(x, float) else x


def seeds_on_file(config: Config, same: dict) -> dict[int, dict]:
    """{seed: its losses} of the rows in out/results.jsonl that have the same settings, the newest of each seed."""
    file, found = config.out / "results.jsonl", {}
    for row in map(json.loads, file.read_text().splitlines() if file.exists() else ()):
        if row["stage"] == "merging" and row["what"] == "seed" and all(row[k] == v for k, v in same.items()):
            found[row["seed"]] = numbered(row["bits_per_byte"])
    return found


def numbered(x):
    """Steps and windows as numbers again: JSON has only words for keys."""
    return {int(k) if k.isdigit() else k: numbered(v) for k, v in x.items()} if isinstance(x, dict) else x


def main(config: Config) -> None:
    began = time.perf_counter()
    nvfp4, model04, pretrain = stage("01_nvfp4"), stage("04_model"), stage("05_pretrain")
    torch.set_num_threads(config.threads)
    pretrain.check_machine(run_settings(config, seed=0))
    data = pretrain.prepare_data(config.data, config.home / "data", model04.preset(config.preset).vocab)
    if not data.held_out:
        raise ValueError("there is no held-out text to score: one document in fifty is set aside, so give hundreds (a .txt file is one).")
    same = dict(preset=config.preset, steps=config.steps, window=config.window, every=config.every, batch=config.batch, seq=config.seq, lr=config.lr,
                eval_windows=config.eval_windows, text=pretrain.hash_of(data))
    seeds, done = [], seeds_on_file(config, same) if config.resume else {}
    for seed in range(config.seeds):
        if seed in done:
            seeds.append(done[seed]); print(f"seed {seed} is on file"); continue
        home = config.home / "merging" / f"seed-{seed}"
        if not config.resume: shutil.rmtree(home, ignore_errors=True)
        if pretrain.checkpoints(home / "constant"):
            pretrain.check_same_run(pretrain.newest_checkpoint(home / "constant"), run_settings(config, seed), pretrain.hash_of(data))
        seeds.append(rounded(measure_seed(config, seed, data, home)))
        shutil.rmtree(home)
        nvfp4.write_row(config.out, "merging", what="seed", seed=seed, **same, bits_per_byte=seeds[-1])
    found = differences(config, seeds)
    print_differences(found)
    figure = config.home / "merging.png"
    plot(config, seeds, found, figure)
    nvfp4.write_row(config.out, "merging", what="differences", **same, seeds=config.seeds, bits_per_byte=rounded(found), threads=config.threads,
                    seconds=None if config.resume else round(time.perf_counter() - began, 1))
    print(f"\nfigure: {figure}   {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    stage("01_nvfp4").run_command(main, Config, __doc__)
