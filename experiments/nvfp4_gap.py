"""What four bits cost: the same training in bf16 and in NVFP4, branches on the way, and the recipe with one ingredient taken away.

A pair shares start, data and schedule; only the precision differs. Its gap is (loss in 4 bits - loss) / loss, paired by seed, with Student's t
interval over seeds. Three measures follow the reports: the gap along a whole run [NVFP4, results], branches that leave 4 bits at 25, 50 and 80 %
of the run, as Ultra's did at 5T, 10T and 16T of 20T tokens [Ultra, health check of NVFP4], and held-out text. The ablations are short runs with
their own short references. NVFP4's products are emulated exactly (stage 01), so the losses are those of 4 bits and the speed is not.

Run:     python experiments/nvfp4_gap.py --seeds 0 --minutes 8       # as much of the pair as fits; the same command again goes on
         python experiments/nvfp4_gap.py --seeds 0 --minutes 8 --runs ablations     # or single ones: --runs nvfp4-short mxfp4
         python experiments/nvfp4_gap.py --report --device cuda --out experiments --figure experiments/nvfp4_gap.png     # table, rows, figure
         python experiments/nvfp4_gap.py --preset tiny --megabytes 8 --seeds 0 1 2     # a CPU's version of it: the machinery, no result
Needs:   a GPU like one H200 for preset `gap`: a pair of 3,072 steps of 65,536 tokens (201M), 6 epochs at most of 100 MB of text or more.
         matplotlib draws the figure; rustbpe, tiktoken and tyro must be there as well
Text:    the Python sources installed with the interpreter, each file under its own package's licence; they are read here and not passed on.
         A held-out piece may come from a file whose other pieces were trained on: it serves to compare, not to judge a model.
Rows:    a finished run leaves one row with its loss in a hundred parts of the run, so that machines need to hand back rows only:
         add them to a file that --rows names. The report adds one row a measure.
Sources: [Ultra] Nemotron 3 Ultra report, arXiv 2606.15007 · [NVFP4] Pretraining LLMs with NVFP4, arXiv 2509.25149
         [DeepSeek] DeepSeek LLM, arXiv 2401.02954: learning rate and batch from compute
"""
from __future__ import annotations

import contextlib
import gc
import glob
import hashlib
import importlib
import importlib.util
import json
import math
import os
import random
import shutil
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent


def stage(name: str):
    """A numbered stage, importable from this folder."""
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


nvfp4, nemotron, pretrain, corpus = (stage(name) for name in ("01_nvfp4", "04_model", "05_pretrain", "data.corpus"))
RECIPE = nvfp4.NVFP4Recipe()

# %% 1 · Runs

@dataclass(frozen=True)
class Run:
    """One training: its precision, and what it does differently from Ultra's recipe."""
    precision: Literal["fp32", "bf16", "nvfp4"]
    short: bool = True                       # ablations and their references
    recipe: nvfp4.NVFP4Recipe = RECIPE
    last_layers_high: bool = True            # False: the last 15 % of layers train in 4 bits as well
    switch: float | None = None              # share of the steps after which the forward pass leaves 4 bits
    label: str = "whole recipe"              # in the figure
    published: str = ""                      # what [NVFP4] says; it gives its ablations' deltas in a plot only


RAISES = "raises the loss (12B)"
RUNS = {
    **{p: Run(p, short=False) for p in ("fp32", "bf16", "nvfp4")},
    **{f"{p}-short": Run(p) for p in ("fp32", "bf16", "nvfp4")},
    "no-stochastic-rounding": Run("nvfp4", recipe=replace(RECIPE, stochastic_gradients=False), label="no stochastic rounding", published=RAISES),
    "no-rht": Run("nvfp4", recipe=replace(RECIPE, rht=False), label="no Hadamard transform", published=RAISES),
    "weight-rows": Run("nvfp4", recipe=replace(RECIPE, weight_tiles=False), label="weights in rows, not tiles", published=RAISES),
    "no-high-layers": Run("nvfp4", last_layers_high=False, label="last layers in 4 bits too", published=RAISES),
    "mxfp4": Run("nvfp4", recipe=replace(RECIPE, format="mxfp4"), label="MXFP4", published="2.5 % beside 1.5 % (8B)"),
    "late-forward-switch": Run("nvfp4", switch=0.82, label="forward pass in high\nprecision from 82 %",      # at 8.2T of 10T tokens  [NVFP4]
                               published="1.5 % -> 0.5 % (12B)"),
}
ABLATIONS = tuple(name for name, run in RUNS.items() if run.short and not name.endswith("-short"))
POINTS = {0.25: "0.27 % (Ultra, 5T)", 0.50: "0.28 % (Ultra, 10T)", 0.80: "0.25 % (Ultra, 16T of 20T)"}     # [Ultra, health check of NVFP4]
MEASURES = {"whole run after the warmup": "below 0.4 % on average (Ultra)", "before the decay": "below 1 % (12B, to FP8)",
            "at the end": "slightly above 1.5 % (12B, to FP8)", "held-out text": ""}                       # [Ultra], [NVFP4]
PARTS = 100             # of a run, in each of which the loss is averaged: the curve of a row
TAIL = 0.05             # share of the run at its end, and before its decay, over which a gap is taken
HORIZON = 25 * 60       # seconds in which a pair shall fit, for the printed estimate
# Student's t, two-sided 95 %, by degrees of freedom (any table of statistics)
T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


@dataclass(frozen=True)
class Sizes:
    """A model with the run it gets."""
    model: nemotron.ModelConfig
    steps: int               # of a pair
    short_steps: int         # of an ablation
    branch_steps: int        # of a branch, ours: 2 % of the run; Ultra's took 5B of 20T tokens
    batch: int
    seq: int
    lr: float
    least_megabytes: float   # of text


PRESETS = {
    # ours: pattern and state of `small`, half as wide, three quarters as deep. 32 Mamba heads give in_proj 3,104 rows, a multiple of MXFP4's 32.
    # batch and lr: [DeepSeek]'s laws give 79k tokens and 2.6e-3 for this compute (deepseek_laws)
    "gap": Sizes(nemotron.ModelConfig(pattern="MEM*E" * 3, d_model=512, vocab=16384, heads=4, head_dim=128, mamba_heads=32, mamba_head_dim=32,
                                      groups=4, state=128, chunk=128, experts=64, experts_per_token=6, latent=256, expert_width=384,
                                      shared_width=1024),
                 steps=3072, short_steps=300, branch_steps=64, batch=64, seq=1024, lr=2.5e-3, least_megabytes=100.0),
    # stage 04's tiny with other Mamba heads, for the same reason; ours: half of stage 05's lr, since so short a run hardly warms up
    "tiny": Sizes(replace(nemotron.PRESETS["tiny"], mamba_heads=32, mamba_head_dim=8),
                  steps=60, short_steps=20, branch_steps=4, batch=4, seq=128, lr=2e-3, least_megabytes=0.0),
}


@dataclass(frozen=True)
class Config:
    """Trains pairs in bf16 and NVFP4 for some minutes, or reports their gap."""
    runs: tuple[str, ...] = ()            # bf16, nvfp4, an ablation or "ablations"; nothing = the pair (fp32 and nvfp4 on a CPU)
    seeds: tuple[int, ...] = (0,)         # of start, data order and stochastic rounding
    minutes: float = 8.0                  # after which no step begins; saving takes some seconds more
    report: bool = False                  # train nothing: table, figure and rows of all seeds found
    preset: Literal["gap", "tiny"] = "gap"
    steps: int | None = None              # optimizer steps of a pair; None = the preset's, here and below
    short_steps: int | None = None        # of an ablation
    branch_steps: int | None = None       # of a branch
    batch: int | None = None              # sequences a step
    seq: int | None = None                # tokens a sequence
    lr: float | None = None               # peak learning rate
    micro_batches: int = 1                # pieces of a batch, when it does not fit into memory at once
    data: tuple[str, ...] = ()            # *.py by pattern, or as stage 05's: files, hf:NAME; nothing = installed Python sources
    megabytes: float = 250.0              # of *.py taken at most, files in random order; more would take minutes to tokenize
    max_epochs: float = 6.0               # refuse to read the text more often
    device: Literal["auto", "cpu", "cuda"] = "auto"
    home: Path = ROOT / "out" / "nvfp4_gap"            # text, tokens, checkpoints, metrics
    out: Path = ROOT / "out"                           # results.jsonl in this folder gets the rows
    rows: tuple[Path, ...] = (ROOT / "experiments" / "results.jsonl",)     # the report reads these files too
    figure: Path = ROOT / "out" / "nvfp4_gap.png"

    def __post_init__(self):
        if unknown := [name for name in self.runs if name not in RUNS and name != "ablations"]:
            raise ValueError(f"unknown run {unknown[0]!r}: choose among ablations, {', '.join(RUNS)}.")
        if not self.seeds: raise ValueError("no seed is given: name at least one with --seeds.")
        other = {"bf16": "fp32", "fp32": "bf16"}[self.reference]
        if not self.report and any(RUNS[name].precision == other for name in self.runs if name in RUNS):
            raise ValueError(f"an nvfp4 run on {self.place} computes the rest in {self.reference}, so its pair is {self.reference}, not {other}.")

    @property
    def place(self) -> str: return self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def reference(self) -> str: return "bf16" if self.place == "cuda" else "fp32"

    @property
    def names(self) -> tuple[str, ...]:
        """The runs asked for, in order, each once."""
        asked = self.runs or (self.reference, "nvfp4")
        spread = [(f"{self.reference}-short", "nvfp4-short", *ABLATIONS) if name == "ablations" else (name,) for name in asked]
        return tuple(dict.fromkeys(name for names in spread for name in names))

    @property
    def sizes(self) -> Sizes:
        given = {k: v for k in ("steps", "short_steps", "branch_steps", "batch", "seq", "lr") if (v := getattr(self, k)) is not None}
        return replace(PRESETS[self.preset], **given)

    def same(self, name: str) -> dict:
        """What runs must agree in to be compared."""
        s = self.sizes
        return dict(preset=self.preset, steps=steps_of(self, name), batch=s.batch, seq=s.seq, lr=s.lr)

    def folder(self, name: str, seed: int) -> Path: return self.home / f"{self.preset}-seed-{seed}-{name}"


def steps_of(config: Config, name: str) -> int:
    return config.sizes.short_steps if RUNS[name].short else config.sizes.steps


def points_of(steps: int) -> dict[int, float]:
    """Steps at which branches leave an NVFP4 run -> their share of it."""
    return {round(share * steps): share for share in POINTS}


def missing(*packages: str) -> str | None:
    """One sentence about packages that are not there, or None."""
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(lacking)}, not installed here: pip install {' '.join(lacking)}, or put a copy on PYTHONPATH." if lacking else None


# %% 2 · Text

def installed_sources() -> list[str]:
    """Patterns of the standard library's and the installed packages' sources."""
    paths = sysconfig.get_paths()
    roots = [paths["stdlib"], paths["purelib"], paths["platlib"], *(p for p in sys.path if Path(p).name in ("site-packages", "dist-packages"))]
    return [f"{root}/**/*.py" for root in dict.fromkeys(roots)]


def gather_sources(patterns: list[str], home: Path, megabytes: float) -> Path:
    """Source files -> home/text-KEY.jsonl, in pieces of some 4,000 characters, with what was taken in text-KEY.json. Once in a home: later calls find
    it, whatever was installed in between.

    ours: a file above 256 KB is a table or generated, and is left out; a copy of another file counts once. Pieces, because a batch reads documents
    one behind the other: whole files would give it a dozen subjects, pieces give it some hundred.
    """
    key = hashlib.sha256(json.dumps([*patterns, megabytes]).encode()).hexdigest()[:8]
    final, about = home / f"text-{key}.jsonl", dict(files=0, bytes=0, pieces=0, copies=0, large=0, not_utf8=0)
    if final.exists(): return final
    nvfp4.writable_folder(home)
    files = sorted({os.path.realpath(f) for pattern in patterns for f in glob.glob(pattern, recursive=True)})
    if not files: raise ValueError(f"no file matches {' '.join(patterns)}: give --data other files.")
    random.Random(0).shuffle(files)
    seen, part = set(), final.with_suffix(".part")
    with part.open("w", encoding="utf-8") as out:
        for file in files:
            raw = Path(file).read_bytes()
            if len(raw) > 2**18: about["large"] += 1; continue
            if (digest := hashlib.sha256(raw).digest()) in seen: about["copies"] += 1; continue
            try: text = raw.decode("utf-8")
            except UnicodeDecodeError: about["not_utf8"] += 1; continue
            seen.add(digest)
            for piece in corpus.pieces(text, 4000):
                out.write(json.dumps({"text": piece}) + "\n")
                about["pieces"] += 1
            about["files"] += 1; about["bytes"] += len(raw)
            if about["bytes"] >= megabytes * 1e6: break
    final.with_suffix(".json").write_text(json.dumps(about))
    os.replace(part, final)
    return final


def megabytes(data: pretrain.Data) -> float:
    """Size of the text, held-out part included."""
    return round(sum(part["bytes"] for source in data.record["sources"].values() for part in source.values()) / 1e6, 1)


def prepare(config: Config) -> pretrain.Data:
    """Text, tokenizer and tokens, made once in config.home; prints what the text is. ValueError when it is too short."""
    patterns = [item for item in config.data if item.endswith(".py")] if config.data else installed_sources()
    items = [item for item in config.data if not item.endswith(".py")]
    if patterns:
        path = gather_sources(patterns, config.home, config.megabytes)
        about = json.loads(path.with_suffix(".json").read_text())
        print(f"text: {about['bytes'] / 1e6:.1f} MB in {about['files']:,} Python files"
              f"{'' if config.data else ' installed here, each under its own licence'}; left out: "
              f"{about['copies']:,} copies, {about['large']:,} above 256 KB, {about['not_utf8']:,} not in UTF-8")
        items.append(str(path))
    data = pretrain.prepare_data(tuple(items), config.home / "data", config.sizes.model.vocab)
    if megabytes(data) < config.sizes.least_megabytes:
        raise ValueError(f"the text has {megabytes(data):.0f} MB and preset {config.preset} asks for {config.sizes.least_megabytes:.0f}: "
                         "give more with --data.")
    return data


def batches_of(config: Config, name: str, seed: int, data: pretrain.Data) -> pretrain.Batches:
    s = config.sizes
    return pretrain.Batches(data.train, pretrain.Blend.of(data.train), s.batch, s.seq, steps_of(config, name), seed)


def deepseek_laws(flops: float) -> tuple[float, float]:
    """(peak learning rate, tokens a batch) for a training that takes `flops` outside the embeddings  [DeepSeek, scaling of hyperparameters]."""
    return 0.3118 * flops ** -0.1250, 0.2920 * flops ** 0.3271


def describe(config: Config, data: pretrain.Data) -> float:
    """Prints what will be trained and how fast it has to be; returns the epochs of the longest run. ValueError when they are too many."""
    s, name = config.sizes, max(config.names, key=lambda name: steps_of(config, name))
    book, tokens = nemotron.ledger(s.model, s.seq), steps_of(config, name) * s.batch * s.seq
    epochs = max(batches_of(config, name, config.seeds[0], data).epochs(steps_of(config, name)).values())
    print(f"model: preset {config.preset}, {book.total / 1e6:.1f}M parameters, {book.active / 1e6:.1f}M active a token, "
          f"{book.mtp / 1e6:.1f}M more in the MTP head")
    print(f"run: {steps_of(config, name):,} steps of {s.batch} × {s.seq} tokens = {tokens / 1e6:.2f}M tokens, {epochs:.2f} epochs of "
          f"{sum(len(shard.tokens) for shard in data.train.values()) / 1e6:.1f}M; ablations {s.short_steps * s.batch * s.seq / 1e6:.2f}M tokens")
    flops = 3 * (sum(book.flops_per_token.values()) - book.flops_per_token["output layer"]) * s.steps * s.batch * s.seq
    lr, batch = deepseek_laws(flops)
    print(f"learning rate {s.lr:g}, {s.batch * s.seq:,} tokens a step; DeepSeek's laws for {flops:.1e} FLOP: {lr:.1e} and {batch:,.0f}")
    pair = (2 * s.steps + len(POINTS) * s.branch_steps) * s.batch * s.seq
    print(f"a pair with its branches in {HORIZON / 60:.0f} minutes needs {pair / HORIZON:,.0f} tokens/s on average\n")
    if epochs > config.max_epochs:
        raise ValueError(f"{name} would read the text {epochs:.1f} times and --max-epochs is {config.max_epochs:g}: give more text with --data.")
    return epochs


# %% 3 · Training, some minutes at a time

class OutOfTime(Exception):
    """Raised before a step that may not begin; everything is as after the step before it."""


class TimedTrainer(pretrain.Trainer):
    """Stage 05's trainer with a last moment for a step to begin, and a step from which on the forward pass is in high precision."""
    deadline, switch_at = math.inf, math.inf

    def train_step(self) -> dict:
        if time.monotonic() >= self.deadline: raise OutOfTime
        if self.step >= self.switch_at:
            self.use_recipe(replace(self.model.recipe, forward=False))
            self.switch_at = math.inf      # once in a process: on a GPU each change records the step anew
        return super().train_step()


@contextlib.contextmanager
def last_layers(high: bool) -> Iterator[None]:
    """Inside, with high=False, PLACEMENT has no rule that keeps the last 15 % of layers out of 4 bits. A model keeps what it was made with."""
    table = nemotron.PLACEMENT
    before = list(table)
    if not high: table[:] = [rule for rule in table if not rule[0].startswith("<last")]
    try: yield
    finally: table[:] = before


def settings(config: Config, name: str, seed: int, precision: str | None = None) -> pretrain.PretrainConfig:
    """Stage 05's settings of a run. NOTE: their `preset` stays at its default and is not used: the model is handed over."""
    s = config.sizes
    return pretrain.PretrainConfig(
        steps=steps_of(config, name), batch=s.batch, seq=s.seq, micro_batches=config.micro_batches, lr=s.lr, lr_min=s.lr / 100,
        warmup=0.04,              # ours: 12 steps of an ablation, 123 of a pair
        precision=precision or RUNS[name].precision, device=config.place, seed=seed, out=config.home, branches=(), branch_steps=s.branch_steps,
        save_every=10**9,         # saved where a branch begins, when the time is up, and at the end
        keep=99, health_every=0, eval_windows=256)


def read_metrics(folder: Path) -> list[dict]:
    log = folder / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def open_run(config: Config, name: str, seed: int, data: pretrain.Data) -> TimedTrainer:
    """The trainer of a run, new or as its newest whole checkpoint left it."""
    run, home, train, batches = RUNS[name], config.folder(name, seed), settings(config, name, seed), batches_of(config, name, seed, data)
    shared = dict(tokenizer=data.tokenizer, data_hash=pretrain.hash_of(data), recipe=run.recipe)
    with last_layers(run.last_layers_high):
        if pretrain.checkpoints(home):
            folder = pretrain.newest_checkpoint(home)
            pretrain.check_same_run(folder, train, shared["data_hash"])
            trainer = TimedTrainer.load(folder, train, batches, home, **shared)
            if trainer.model.config != config.sizes.model:
                raise ValueError(f"{folder} holds a model of other sizes than preset {config.preset}: choose another --home.")
        else:
            torch.manual_seed(seed)      # the same start for every precision
            trainer = TimedTrainer(train, nemotron.Nemotron(config.sizes.model), batches, home, **shared)
    trainer.rows = [row for row in read_metrics(home) if row["step"] <= trainer.step]      # those after the checkpoint will be written again
    nvfp4.writable_folder(home)
    (home / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trainer.rows))
    if run.switch is not None: trainer.switch_at = round(run.switch * train.steps)
    return trainer


def advance(config: Config, name: str, seed: int, data: pretrain.Data, deadline: float) -> bool:
    """Trains a run until its end or the deadline, and saves. True when it has ended; then its row is written and in done.json."""
    home, steps = config.folder(name, seed), steps_of(config, name)
    if (home / "done.json").exists(): return True
    if time.monotonic() >= deadline: return False
    trainer = open_run(config, name, seed, data)
    trainer.deadline = deadline
    try: ended = trainer.fit(steps, points_of(steps) if name == "nvfp4" else (), max(1, steps // 20), f"{name}, seed {seed}")
    except OutOfTime:
        if trainer.step: trainer.save()
        return False
    if not ended: raise KeyboardInterrupt
    held_out = pretrain.evaluate(trainer, data.held_out).get("all")
    epochs = max(trainer.batches.epochs(steps).values())
    row = dict(what="run", run=name, seed=seed, same=config.same(name), tokens=steps * config.sizes.batch * config.sizes.seq,
               epochs=round(epochs, 3), megabytes=megabytes(data), data=trainer.data_hash, held_out=held_out and round(held_out, 5),
               tokens_per_s=round(statistics.median(row["tokens_per_s"] for row in trainer.rows)), curve=curve(trainer.rows, steps))
    nvfp4.write_row(config.out, "nvfp4_gap", **row)
    (home / "done.json").write_text(json.dumps(row))
    if name != "nvfp4": tidy(home)
    return True


def free_memory() -> None:
    """A trainer and its recorded step refer to each other: without a collection the next run would find the GPU full."""
    gc.collect()
    if torch.cuda.is_available(): torch.cuda.empty_cache()


def tidy(home: Path) -> None:
    """Of a run that has ended only the last checkpoint stays."""
    for old in pretrain.checkpoints(home)[:-1]: shutil.rmtree(old)


def run_branches(config: Config, seed: int, data: pretrain.Data, deadline: float) -> bool:
    """Some steps in the reference's precision from every point of an NVFP4 run that has passed it. True when all are there. A branch is short and
    not cut at the deadline."""
    trunk, n = config.folder("nvfp4", seed), config.sizes.branch_steps
    rows, written = read_metrics(trunk), trunk / "branches.json"
    done = json.loads(written.read_text()) if written.exists() else {}
    for point, share in points_of(config.sizes.steps).items():
        ready = (trunk / f"step-{point:06d}").exists() and len(rows) >= point + n
        if str(share) in done or not ready or time.monotonic() >= deadline: continue
        home, train = trunk / f"branch-{point:06d}", settings(config, "nvfp4", seed, config.reference)
        branch = pretrain.run_branch(trunk / f"step-{point:06d}", train, data, home).rows
        row = dict(what="branch", share=share, seed=seed, same=config.same("nvfp4"), branch_steps=n, precision=config.reference,
                   gap=round(pretrain.relative_gap(rows[point:point + n], branch), 6))
        nvfp4.write_row(config.out, "nvfp4_gap", **row)
        written.write_text(json.dumps(done := {**done, str(share): row}))
        free_memory()
    if len(done) == len(POINTS) and (trunk / "done.json").exists(): tidy(trunk)
    return len(done) == len(POINTS)


def train(config: Config) -> None:
    """Everything asked for that is not there yet, until the time is up."""
    deadline = time.monotonic() + 60 * config.minutes
    if sentence := missing("rustbpe", "tiktoken"): raise ValueError(sentence)
    if config.place == "cuda" and not torch.cuda.is_available(): raise ValueError("--device cuda: this torch sees no GPU; leave the flag out.")
    data = prepare(config)
    describe(config, data)
    left = []
    for seed in config.seeds:
        for name in config.names:
            if not advance(config, name, seed, data, deadline): left.append((name, seed))
            free_memory()
        if "nvfp4" in config.names and not run_branches(config, seed, data, deadline): left.append(("branches", seed))
    print()
    for name, seed in left:
        if name == "branches": print(f"branches of seed {seed}: not all run"); continue
        rows, steps = read_metrics(config.folder(name, seed)), steps_of(config, name)
        speed = statistics.median(row["tokens_per_s"] for row in rows) if rows else 0
        rest = (steps - len(rows)) * config.sizes.batch * config.sizes.seq
        pace = f", about {rest / speed / 60:.1f} minutes left at {speed:,.0f} tokens/s" if speed else ""
        print(f"{name}, seed {seed}: step {len(rows):,} of {steps:,}{pace}")
    print("the same command goes on." if left else "all runs have ended: --report shows the gap.")


# %% 4 · Gaps

def curve(rows: list[dict], steps: int) -> list[float]:
    """Mean training loss in each part of a run of `steps` steps, as far as its rows reach.  steps 6 in 3 parts: 4 4 3 1 2 2 -> 4 2 2"""
    parts = min(PARTS, steps)
    ends = [steps * i // parts for i in range(parts + 1)]
    loss = [row["loss"] for row in rows]
    return [round(statistics.fmean(loss[a:b]), 6) for a, b in zip(ends, ends[1:]) if b <= len(loss)]


def interval(values: list[float]) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of Student's 95 % interval; one value has none, and its bounds are None."""
    mean, n = statistics.fmean(values), len(values)
    if n == 1: return mean, None, None
    if n - 1 > len(T95): raise ValueError(f"{n} seeds: the table of Student's t here ends at {len(T95) + 1}.")
    half = T95[n - 2] * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def measure(four: dict, reference: dict, decay: float, warmup: float) -> dict[str, float]:
    """Gaps of two finished runs by the names in MEASURES. decay, warmup: shares of the run."""
    if four["data"] != reference["data"]:
        raise ValueError(f"seed {four['seed']}: {four['run']} and {reference['run']} saw different text: train both on one, or take a row out.")
    a, b = np.array(four["curve"]), np.array(reference["curve"])
    n, tail = len(a), max(1, round(TAIL * len(a)))
    stable = n - round(decay * n)
    warm = math.ceil(warmup * n)
    gaps = {"whole run after the warmup": (a[warm:] / b[warm:]).mean() - 1,
            "before the decay": a[stable - tail:stable].mean() / b[stable - tail:stable].mean() - 1,
            "at the end": a[-tail:].mean() / b[-tail:].mean() - 1}
    if four["held_out"] and reference["held_out"]: gaps["held-out text"] = four["held_out"] / reference["held_out"] - 1
    return {name: float(gap) for name, gap in gaps.items()}


class Results(NamedTuple):
    runs: dict[tuple[str, int], dict]        # (run, seed) -> its row; of an unfinished run from its metrics, with a shorter curve
    branches: dict[tuple[float, int], dict]  # (share of the run, seed) -> its row
    reference: str

    def seeds(self, name: str, whole: int | None = None) -> list[int]:
        """Seeds of a run, with `whole` parts only those whose curve has that many."""
        return sorted(seed for run, seed in self.runs if run == name and (whole is None or len(self.runs[run, seed]["curve"]) == whole))


def collect(config: Config) -> Results:
    """Rows of config.rows and config.out, then what lies in config.home: finished runs by their row, the others by their metrics."""
    runs, branches, other = {}, {}, 0
    files = dict.fromkeys(Path(path).resolve() for path in (*config.rows, config.out / "results.jsonl"))
    found = [json.loads(line) for path in files if path.exists() for line in path.read_text().splitlines()]
    found = [row for row in found if row["stage"] == "nvfp4_gap" and row["what"] in ("run", "branch")]
    for home in sorted(config.home.glob(f"{config.preset}-seed-*-*")):
        seed, name = home.name[len(config.preset) + 6:].split("-", 1)
        if (home / "done.json").exists(): found.append(json.loads((home / "done.json").read_text()))
        elif pretrain.checkpoints(home):
            saved = json.loads((pretrain.newest_checkpoint(home) / "pretrain.json").read_text())
            same = dict(preset=config.preset, **{k: saved["config"][k] for k in ("steps", "batch", "seq", "lr")})
            found.append(dict(what="run", run=name, seed=int(seed), same=same, data=saved["data"], held_out=None,
                              curve=curve(read_metrics(home), same["steps"])))
        if (home / "branches.json").exists(): found += json.loads((home / "branches.json").read_text()).values()
    for row in found:
        if row["same"] != config.same(row.get("run", "nvfp4")): other += 1
        elif row["what"] == "run": runs[row["run"], row["seed"]] = row
        elif row["branch_steps"] == config.sizes.branch_steps: branches[row["share"], row["seed"]] = row
    if other: print(f"{other} rows of other presets, lengths or learning rates are left out")
    if not runs: raise ValueError(f"no run of preset {config.preset} with these settings in {config.home} or in the row files: train first.")
    return Results(runs, branches, "bf16" if any(name.startswith("bf16") for name, _ in runs) else "fp32")


def gap_curves(results: Results) -> dict[int, np.ndarray]:
    """seed -> gap in each part of the run that both precisions have reached."""
    pairs = {seed: [results.runs[name, seed]["curve"] for name in ("nvfp4", results.reference)]
             for seed in results.seeds("nvfp4") if (results.reference, seed) in results.runs}
    return {seed: np.array(a[:n]) / np.array(b[:n]) - 1 for seed, (a, b) in pairs.items() if (n := min(len(a), len(b)))}


def tabulate(config: Config, results: Results) -> list[dict]:
    """One row for each measure, branch and ablation: the gap of every seed, their mean and interval."""
    rows, train, reference = [], settings(config, "nvfp4", 0), results.reference

    def add(kind: str, name: str, by_seed: dict[int, float], published: str) -> None:
        if by_seed:
            seeds, values = list(by_seed), list(by_seed.values())
            mean, low, high = interval(values)
            rows.append(dict(kind=kind, name=name, seeds=seeds, gaps=values, mean=mean, low=low, high=high, published=published))

    def gaps(name: str, of: str) -> dict[int, dict[str, float]]:
        whole = min(PARTS, steps_of(config, name))
        both = [seed for seed in results.seeds(name, whole) if seed in results.seeds(of, whole)]
        return {seed: measure(results.runs[name, seed], results.runs[of, seed], train.decay, train.warmup) for seed in both}

    pairs = gaps("nvfp4", reference)
    for name, published in MEASURES.items(): add("pair", name, {seed: gap[name] for seed, gap in pairs.items() if name in gap}, published)
    for share, published in POINTS.items():
        branches = {seed: row["gap"] for (at, seed), row in sorted(results.branches.items()) if at == share}
        add("branch", f"branch at {share:.0%} of the run", branches, published)
    short, end = gaps("nvfp4-short", f"{reference}-short"), "at the end"
    add("ablation", "nvfp4-short", {seed: gap[end] for seed, gap in short.items()}, "")
    for name in ABLATIONS:
        mine = gaps(name, f"{reference}-short")
        add("ablation", name, {seed: gap[end] for seed, gap in mine.items()}, RUNS[name].published)
        # what leaving the ingredient out costs: the difference of two gaps of one seed
        add("difference", name, {seed: mine[seed][end] - short[seed][end] for seed in mine if seed in short}, "")
    return rows


def percent(x: float) -> str: return f"{100 * x:+.2f} %"


def bounds(row: dict) -> str: return "one seed: none" if row["low"] is None else f"{percent(row['low'])} to {percent(row['high'])}"


def print_tables(rows: list[dict], reference: str) -> None:
    header = ["loss gap, mean over seeds", "seeds", "gap", "95 % interval", "published"]
    line = lambda row: [row["name"], len(row["seeds"]), percent(row["mean"]), bounds(row), row["published"]]
    long = [line(row) for row in rows if row["kind"] in ("pair", "branch")]
    if long: nvfp4.print_table(f"NVFP4 against {reference}, same start, data and schedule", header, long)
    ablations, differences = ([row for row in rows if row["kind"] == kind] for kind in ("ablation", "difference"))
    if not ablations: return
    against = {row["name"]: f"{percent(row['mean'])} ({bounds(row)})" for row in differences}
    nvfp4.print_table(f"Ablations: short runs, gap at the end against {reference}-short, and against the whole recipe (nvfp4-short)",
                      [*header[:4], "more than the whole recipe", "published"],
                      [[*line(row)[:4], against.get(row["name"], ""), row["published"]] for row in ablations])


# %% 5 · Figure

def plot_gap(ax, config: Config, results: Results, rows: list[dict]) -> None:
    """Gap along the run: seeds thin, their mean thick, branches as diamonds with their intervals."""
    curves, steps, train = gap_curves(results), config.sizes.steps, settings(config, "nvfp4", 0)
    parts = min(PARTS, steps)
    middle = lambda n: (np.arange(n) + 0.5) * steps / parts
    for i, gap in enumerate(curves.values()):
        ax.plot(middle(len(gap)), 100 * gap, color="#9fb8d8", linewidth=0.9, label="each seed" if i == 0 else None)
    n = min(map(len, curves.values()))
    mean = np.mean([gap[:n] for gap in curves.values()], axis=0)
    if len(curves) > 1: ax.plot(middle(n), 100 * mean, color="#1f4e8c", linewidth=2.2, label=f"mean of {len(curves)} seeds")
    for i, row in enumerate(row for row in rows if row["kind"] == "branch"):
        share = float(row["name"].split()[2].rstrip("%")) / 100
        spread = None if row["low"] is None else 100 * (row["high"] - row["mean"])
        ax.errorbar(share * steps, 100 * row["mean"], yerr=spread, fmt="D", color="#c0392b", markersize=6, capsize=3, zorder=5,
                    label=f"branches in {results.reference}" if i == 0 else None)
    ax.axhline(0, color="0.3", linewidth=1)
    ax.axhline(0.4, color="#3d8b4f", linestyle="--", linewidth=1.2, label="Ultra: below 0.4 % on average")
    decay = steps - train.decay_steps
    ax.axvline(decay, color="0.5", linestyle=":", linewidth=1)
    ax.text(decay, 0.02, " decay", transform=ax.get_xaxis_transform(), va="bottom", fontsize=9, color="0.35")
    late = 100 * np.concatenate([gap[math.ceil(train.warmup * parts):] for gap in curves.values()])      # the warmup would set the scale
    if len(late):
        low, high = min(late.min(), 0), max(late.max(), 0.4)
        ax.set_ylim(low - 0.15 * (high - low), high + 0.45 * (high - low))
    ax.set_xlim(0, steps)
    whole = next((row for row in rows if row["name"] == "whole run after the warmup"), None)
    ax.set_title("Four bits along the run" + (f": {percent(whole['mean'])} loss in the mean" if whole else ", not yet at its end"))
    ax.set_xlabel("optimizer step"); ax.set_ylabel(f"gap of the training loss to {results.reference} (%)")
    ax.legend(frameon=False, loc="upper left", fontsize=9)


def plot_ablations(ax, results: Results, rows: list[dict]) -> None:
    """Gap of every short run at its end, with its interval."""
    rows = [row for row in rows if row["kind"] == "ablation"][::-1]
    for y, row in enumerate(rows):
        colour = "#1f4e8c" if row["name"] == "nvfp4-short" else "#c0392b"
        ax.plot([100 * gap for gap in row["gaps"]], [y] * len(row["gaps"]), "o", color=colour, alpha=0.35, markersize=4)
        spread = None if row["low"] is None else 100 * (row["high"] - row["mean"])
        ax.errorbar(100 * row["mean"], y, xerr=spread, fmt="o", color=colour, capsize=3, markersize=7)
        if row["name"] == "nvfp4-short": ax.axvline(100 * row["mean"], color=colour, linestyle=":", linewidth=1)
    ax.axvline(0, color="0.3", linewidth=1)
    ax.set_yticks(range(len(rows)), [RUNS[row["name"]].label for row in rows])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    bars = "bars: 95 % interval, dots: seeds" if any(row["low"] is not None for row in rows) else "one seed, no interval"
    ax.set_title(f"The recipe with one thing changed ({bars})")
    ax.set_xlabel(f"gap of the training loss to {results.reference}, at the end (%)")


def plot(config: Config, results: Results, rows: list[dict]) -> None:
    pairs, short = bool(gap_curves(results)), any(row["kind"] == "ablation" for row in rows)
    if not pairs and not short: print("no figure: no run has its reference beside it yet"); return
    fig, axes = nvfp4.new_figure(columns=pairs + short, width=7.2, height=4.6)
    axes = np.atleast_1d(axes)
    if pairs: plot_gap(axes[0], config, results, rows)
    if short: plot_ablations(axes[-1], results, rows)
    nvfp4.save_figure(fig, config.figure)
    print(f"\nfigure: {config.figure}")


def report(config: Config) -> list[dict]:
    """Tables, figure and rows of everything found."""
    results = collect(config)
    rows = tabulate(config, results)
    print_tables(rows, results.reference)
    if not rows: print("no pair has ended yet: the figure shows how far they are")
    for row in rows:
        tidy_row = {k: [round(x, 6) for x in v] if k == "gaps" else round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
        nvfp4.write_row(config.out, "nvfp4_gap", what="gap", reference=results.reference, same=config.same("nvfp4"), **tidy_row)
    if sentence := missing("matplotlib"): print(f"no figure: it {sentence}")
    else: plot(config, results, rows)
    return rows


def main(config: Config) -> None:
    report(config) if config.report else train(config)


if __name__ == "__main__":
    if sentence := missing("tyro"): sys.exit(f"nvfp4_gap: {sentence}")
    nvfp4.run_command(main, Config, __doc__)
