"""What four bits cost: the same training in bf16 and in NVFP4, branches on the way, and the recipe with one ingredient taken away.

A pair shares start, data and schedule; only the precision differs. Its gap is (loss in 4 bits - loss) / loss, paired by seed, with Student's t
interval over seeds. Three measures follow the reports: the gap along a whole run [NVFP4, results], branches that leave 4 bits at 25, 50 and 80 %
of the run, as Ultra's did at 5T, 10T and 16T of 20T tokens [Ultra, health check of NVFP4], and held-out text. Ablations are branches too: the whole
recipe, and the recipe with one ingredient taken away, go on from one checkpoint of the bf16 run, since runs that start anew are further apart by
seed than by recipe. NVFP4's products are emulated exactly (stage 01), so the losses are those of 4 bits and the speed is not.

Run:     python experiments/nvfp4_gap.py --seeds 0 --minutes 8       # as much of the pair as fits; the same command again goes on
         python experiments/nvfp4_gap.py --seeds 0 --minutes 8 --runs ablations     # or single ones: --runs whole-recipe mxfp4
         python experiments/nvfp4_gap.py --report --device cuda --out experiments --figure experiments/nvfp4_gap.png     # table, rows, figure
         python experiments/nvfp4_gap.py --preset tiny --megabytes 8 --seeds 0 1 2     # a CPU's version of it: the machinery, no result
Needs:   a GPU like one H200 for preset `gap`: a pair of 3,072 steps of 65,536 tokens (201M), 6 epochs at most of 100 MB of text or more; ablations
         alone train the first 960 of bf16 and 832 of NVFP4, from where a pair goes on, and 6 × 192. A seed keeps up to seven checkpoints in --home.
         matplotlib draws the figure; rustbpe, tiktoken and tyro must be there as well
Text:    the Python sources installed with the interpreter, each file under its own package's licence; they are read here and not passed on.
         A held-out piece may come from a file whose other pieces were trained on: it serves to compare, not to judge a model.
Rows:    a finished run leaves one row with its loss in a hundred parts of the run, a branch one with its gap, so that machines need to hand back
         rows only: add them to a file that --rows names. The report adds one row a measure.
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
    recipe: nvfp4.NVFP4Recipe = RECIPE
    last_layers_high: bool = True            # False: the last 15 % of layers train in 4 bits as well
    label: str = ""                          # in table and figure
    published: str = ""                      # what [NVFP4] says; it gives its ablations' deltas in a plot only


RAISES = "raises the loss (12B)"
LEAVES, SWITCH = "high-precision", "late-forward-switch"      # an NVFP4 run's branches: all of it leaves 4 bits, or the forward pass
TRUNKS = {precision: Run(precision) for precision in ("fp32", "bf16", "nvfp4")}     # from the random start; what follows are branches of them
ABLATIONS = {
    "whole-recipe": Run("nvfp4", label="whole recipe"),
    "no-stochastic-rounding": Run("nvfp4", replace(RECIPE, stochastic_gradients=False), label="no stochastic rounding", published=RAISES),
    "no-rht": Run("nvfp4", replace(RECIPE, rht=False), label="no Hadamard transform", published=RAISES),
    "weight-rows": Run("nvfp4", replace(RECIPE, weight_tiles=False), label="weights in rows, not tiles", published=RAISES),
    "no-high-layers": Run("nvfp4", last_layers_high=False, label="last layers in 4 bits too", published=RAISES),
    "mxfp4": Run("nvfp4", replace(RECIPE, format="mxfp4"), label="MXFP4", published="2.5 % beside 1.5 % (8B)"),
}
RUNS = TRUNKS | ABLATIONS | {SWITCH: Run("nvfp4", replace(RECIPE, forward=False))}
POINTS = {0.25: "0.27 % (Ultra, 5T)", 0.50: "0.28 % (Ultra, 10T)", 0.80: "0.25 % (Ultra, 16T of 20T)"}     # [Ultra, health check of NVFP4]
ABLATE_AT = min(POINTS)      # ours: still on the schedule's plateau, as [NVFP4]'s fork at 3.43T of 10T tokens
SWITCHED = "67 % (12B, at 8.2T of 10T: 1.5 % -> 0.5 %)"      # of the gap, closed by leaving 4 bits in the forward pass  [NVFP4]
MEASURES = {"whole run after the warmup": "below 0.4 % on average (Ultra)", "before the decay": "below 1 % (12B, to FP8)",
            "at the end": "slightly above 1.5 % (12B, to FP8)", "held-out text": ""}                       # [Ultra], [NVFP4]
PARTS = 100             # of a run, in each of which the loss is averaged: the curve of a row
TAIL = 0.05             # share of the run at its end, and before its decay, over which a gap is taken
# Student's t, two-sided 95 %, by degrees of freedom (any table of statistics)
T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


@dataclass(frozen=True)
class Sizes:
    """A model with the run it gets."""
    model: nemotron.ModelConfig
    steps: int               # of a pair
    short_steps: int         # of an ablation, from its checkpoint on
    branch_steps: int        # of a branch, ours: 2 % of the run; Ultra's took 5B of 20T tokens
    batch: int
    seq: int
    lr: float
    least_megabytes: float   # of text


PRESETS = {
    # ours: pattern and state of `small`, half as wide, three quarters as deep. 32 Mamba heads give in_proj 3,104 rows, a multiple of MXFP4's 32.
    # batch and lr: [DeepSeek]'s laws give 79k tokens and 2.6e-3 for this compute (deepseek_laws)
    # an ablation is three times as long as a branch, whose gaps differ by 0.05 to 0.1 % between seeds: its mean is over 96 steps in place of 32
    "gap": Sizes(nemotron.ModelConfig(pattern="MEM*E" * 3, d_model=512, vocab=16384, heads=4, head_dim=128, mamba_heads=32, mamba_head_dim=32,
                                      groups=4, state=128, chunk=128, experts=64, experts_per_token=6, latent=256, expert_width=384,
                                      shared_width=1024),
                 steps=3072, short_steps=192, branch_steps=64, batch=64, seq=1024, lr=2.5e-3, least_megabytes=100.0),
    # stage 04's tiny with other Mamba heads, for the same reason; ours: half of stage 05's lr, since so short a run hardly warms up
    "tiny": Sizes(replace(nemotron.PRESETS["tiny"], mamba_heads=32, mamba_head_dim=8),
                  steps=60, short_steps=8, branch_steps=4, batch=4, seq=128, lr=2e-3, least_megabytes=0.0),
}


def points_of(steps: int) -> dict[int, float]:
    """Steps at which branches leave an NVFP4 run -> their share of it."""
    return {round(share * steps): share for share in POINTS}


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
        s, last = self.sizes, max(points_of(self.sizes.steps))
        if min(s.short_steps, s.branch_steps) < 1 or max(last + s.branch_steps, self.ablate_at + s.short_steps) > s.steps:
            raise ValueError(f"{s.steps} steps have no room for branches of {s.branch_steps} and ablations of {s.short_steps}: choose other numbers.")
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
        spread = [(*ABLATIONS, SWITCH) if name == "ablations" else (name,) for name in asked]
        return tuple(dict.fromkeys(name for names in spread for name in names))

    @property
    def sizes(self) -> Sizes:
        given = {k: v for k in ("steps", "short_steps", "branch_steps", "batch", "seq", "lr") if (v := getattr(self, k)) is not None}
        return replace(PRESETS[self.preset], **given)

    @property
    def ablate_at(self) -> int: return round(ABLATE_AT * self.sizes.steps)

    @property
    def same(self) -> dict:
        """What runs must agree in to be compared; for a branch it is its trunk's."""
        s = self.sizes
        return dict(preset=self.preset, steps=s.steps, batch=s.batch, seq=s.seq, lr=s.lr)


class Job(NamedTuple):
    """One stretch of training: a run from the random start, or a branch from a run's checkpoint."""
    run: str                    # in RUNS
    seed: int
    until: int                  # the step it ends with
    trunk: str | None = None    # the run that a branch leaves ..
    start: int = 0              # .. behind this step

    def __str__(self) -> str: return f"{self.run}{f' from step {self.start} of {self.trunk}' if self.trunk else ''}, seed {self.seed}"


def folder_of(config: Config, job: Job) -> Path:
    home = config.home / f"{config.preset}-seed-{job.seed}-{job.trunk or job.run}"
    return home / f"{job.run}-{job.start:06d}" if job.trunk else home


def branch_jobs(config: Config, seed: int) -> list[Job]:
    """All that can leave a seed's runs: ablations the reference; NVFP4, at each of its points, the reference's precision and the switch."""
    s, reference, at = config.sizes, config.reference, config.ablate_at
    return [*(Job(name, seed, at + s.short_steps, reference, at) for name in ABLATIONS),
            *(Job(name, seed, point + s.branch_steps, "nvfp4", point) for point in points_of(s.steps) for name in (reference, SWITCH))]


def jobs(config: Config, seed: int) -> Iterator[Job]:
    """What this call has to do, in order: runs to their end when they are asked for, else as far as the first branch is compared with; then the
    branches of what has been reached."""
    names, reached = set(config.names) - {config.reference}, {}
    if names & {"nvfp4", SWITCH}: names.add(config.reference)      # as a branch, which the switch is held against
    branches = [job for job in branch_jobs(config, seed) if job.run in names]
    until = {name: config.sizes.steps for name in config.names if name in TRUNKS}
    for job in branches: until.setdefault(job.trunk, job.until)
    for name, end in until.items():
        yield (job := Job(name, seed, end))
        reached[name] = max(end, len(read_metrics(folder_of(config, job))))      # an earlier call may have come further
    yield from (job for job in branches if job.until <= reached[job.trunk])


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


def batches_of(config: Config, seed: int, data: pretrain.Data) -> pretrain.Batches:
    return pretrain.Batches(data.train, pretrain.Blend.of(data.train), config.sizes.batch, config.sizes.seq, config.sizes.steps, seed)


def deepseek_laws(flops: float) -> tuple[float, float]:
    """(peak learning rate, tokens a batch) for a training that takes `flops` outside the embeddings  [DeepSeek, scaling of hyperparameters]."""
    return 0.3118 * flops ** -0.1250, 0.2920 * flops ** 0.3271


def describe(config: Config, data: pretrain.Data) -> float:
    """Prints what will be trained; returns the epochs of a whole run. ValueError when they are too many."""
    s = config.sizes
    book, tokens = nemotron.ledger(s.model, s.seq), s.steps * s.batch * s.seq
    epochs = max(batches_of(config, config.seeds[0], data).epochs(s.steps).values())
    print(f"model: preset {config.preset}, {book.total / 1e6:.1f}M parameters, {book.active / 1e6:.1f}M active a token, "
          f"{book.mtp / 1e6:.1f}M more in the MTP head")
    print(f"run: {s.steps:,} steps of {s.batch} × {s.seq} tokens = {tokens / 1e6:.2f}M tokens, {epochs:.2f} epochs of "
          f"{sum(len(shard.tokens) for shard in data.train.values()) / 1e6:.1f}M; ablations {s.short_steps} steps from step {config.ablate_at}")
    flops = 3 * (sum(book.flops_per_token.values()) - book.flops_per_token["output layer"]) * tokens
    lr, batch = deepseek_laws(flops)
    print(f"learning rate {s.lr:g}, {s.batch * s.seq:,} tokens a step; DeepSeek's laws for {flops:.1e} FLOP: {lr:.1e} and {batch:,.0f}\n")
    if epochs > config.max_epochs:
        raise ValueError(f"a run would read the text {epochs:.1f} times and --max-epochs is {config.max_epochs:g}: give more text with --data.")
    return epochs


# %% 3 · Training, some minutes at a time

class OutOfTime(Exception):
    """Raised before a step that may not begin; everything is as after the step before it."""


class TimedTrainer(pretrain.Trainer):
    """Stage 05's trainer with a last moment for a step to begin."""
    deadline = math.inf

    def train_step(self) -> dict:
        if time.monotonic() >= self.deadline: raise OutOfTime
        return super().train_step()


@contextlib.contextmanager
def last_layers(high: bool) -> Iterator[None]:
    """Inside, with high=False, PLACEMENT has no rule that keeps the last 15 % of layers out of 4 bits. A model keeps what it was made with."""
    table = nemotron.PLACEMENT
    before = list(table)
    if not high: table[:] = [rule for rule in table if not rule[0].startswith("<last")]
    try: yield
    finally: table[:] = before


def settings(config: Config, name: str, seed: int) -> pretrain.PretrainConfig:
    """Stage 05's settings of a run. NOTE: their `preset` stays at its default and is not used: the model is handed over."""
    s = config.sizes
    return pretrain.PretrainConfig(
        steps=s.steps, batch=s.batch, seq=s.seq, micro_batches=config.micro_batches, lr=s.lr, lr_min=s.lr / 100, precision=RUNS[name].precision,
        warmup=0.04,              # ours: 123 steps of preset gap
        save_every=10**9,         # saved where a branch begins, when the time is up, and at the end
        device=config.place, seed=seed, out=config.home, branches=(), branch_steps=s.branch_steps, keep=99, health_every=0, eval_windows=256)


def read_metrics(folder: Path) -> list[dict]:
    log = folder / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def open_run(config: Config, job: Job, data: pretrain.Data) -> TimedTrainer:
    """The trainer of a job as its newest whole checkpoint left it; without one a new run, or a branch from its trunk's checkpoint."""
    run, home, train = RUNS[job.run], folder_of(config, job), settings(config, job.run, job.seed)
    batches = batches_of(config, job.seed, data)
    shared = dict(tokenizer=data.tokenizer, data_hash=pretrain.hash_of(data), recipe=run.recipe)
    own = bool(pretrain.checkpoints(home))
    with last_layers(run.last_layers_high):
        if own or job.trunk:
            folder = pretrain.newest_checkpoint(home) if own else home.parent / f"step-{job.start:06d}"
            if problem := pretrain.damage(folder):
                raise ValueError(f"{problem}: delete {folder.parent} to train that run again, or choose another --home.")
            pretrain.check_same_run(folder, train if own else settings(config, job.trunk, job.seed), shared["data_hash"])
            trainer = TimedTrainer.load(folder, train, batches, home, **shared)
            if trainer.model.config != config.sizes.model:
                raise ValueError(f"{folder} holds a model of other sizes than preset {config.preset}: choose another --home.")
        else:
            torch.manual_seed(job.seed)      # the same start for every precision
            trainer = TimedTrainer(train, nemotron.Nemotron(config.sizes.model), batches, home, **shared)
    trainer.rows = [row for row in read_metrics(home) if row["step"] <= trainer.step]      # those after the checkpoint will be written again
    nvfp4.writable_folder(home)
    (home / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trainer.rows))
    return trainer


def result(config: Config, job: Job, trainer: TimedTrainer, data: pretrain.Data) -> dict:
    """The row of a job that has ended. The gap of a branch is taken over the second half of its steps, to its trunk's losses of exactly these steps:
    an ablation is the one in 4 bits; where a branch leaves 4 bits, the trunk is."""
    s, mine, row = config.sizes, trainer.rows, dict(seed=job.seed, same=config.same, data=trainer.data_hash)
    if not job.trunk:
        held_out = pretrain.evaluate(trainer, data.held_out).get("all")
        return dict(what="run", run=job.run, **row, tokens=s.steps * s.batch * s.seq, epochs=round(max(trainer.batches.epochs(s.steps).values()), 3),
                    megabytes=megabytes(data), held_out=held_out and round(held_out, 5), curve=curve(mine, s.steps),
                    tokens_per_s=round(statistics.median(row["tokens_per_s"] for row in mine)))
    trunk = [row for row in read_metrics(trainer.home.parent) if job.start < row["step"] <= job.until]
    assert [row["step"] for row in mine] == [row["step"] for row in trunk], f"{job}: its trunk has not trained the same steps"
    row |= dict(share=points_of(s.steps)[job.start], reference=config.reference, precision=RUNS[job.run].precision)
    if job.run in ABLATIONS: return dict(what="ablation", run=job.run, **row, steps=len(mine), gap=round(pretrain.relative_gap(mine, trunk), 6))
    kind = SWITCH if job.run == SWITCH else LEAVES
    return dict(what="branch", kind=kind, **row, branch_steps=len(mine), gap=round(pretrain.relative_gap(trunk, mine), 6))


def advance(config: Config, job: Job, data: pretrain.Data, deadline: float) -> bool:
    """Trains until the job's end or the deadline, and saves. True when it is there; a whole run or branch then has its row, also in done.json."""
    home, part = folder_of(config, job), not job.trunk and job.until < config.sizes.steps
    if (home / "done.json").exists() or part and len(read_metrics(home)) >= job.until: return True
    if time.monotonic() >= deadline: return False
    trainer = open_run(config, job, data)
    trainer.deadline = deadline
    points = points_of(config.sizes.steps) if job.run == "nvfp4" else [config.ablate_at]
    try: ended = trainer.fit(job.until, () if job.trunk else points, max(1, (job.until - job.start) // 20), str(job))
    except OutOfTime:
        if trainer.step: trainer.save()
        return False
    if not ended: raise KeyboardInterrupt
    if part: return True
    nvfp4.write_row(config.out, "nvfp4_gap", **(row := result(config, job, trainer, data)))
    (home / "done.json").write_text(json.dumps(row))
    tidy(config, job)
    return True


def free_memory() -> None:
    """A trainer and its recorded step refer to each other: without a collection the next run would find the GPU full."""
    gc.collect()
    if torch.cuda.is_available(): torch.cuda.empty_cache()


def tidy(config: Config, job: Job) -> None:
    """After a branch its checkpoints go; of a run that has ended the last one stays, and those that a branch has yet to begin from."""
    home = folder_of(config, job)
    if job.trunk:
        for old in pretrain.checkpoints(home): shutil.rmtree(old)
        home = home.parent
    if not (home / "done.json").exists(): return
    branches = [(folder_of(config, branch), branch.start) for branch in branch_jobs(config, job.seed)]
    needed = {f"step-{start:06d}" for folder, start in branches if folder.parent == home and not (folder / "done.json").exists()}
    for old in pretrain.checkpoints(home)[:-1]:
        if old.name not in needed: shutil.rmtree(old)


def train(config: Config) -> None:
    """Everything asked for that is not there yet, until the time is up."""
    deadline = time.monotonic() + 60 * config.minutes
    if sentence := missing("rustbpe", "tiktoken"): raise ValueError(sentence)
    if config.place == "cuda" and not torch.cuda.is_available(): raise ValueError("--device cuda: this torch sees no GPU; leave the flag out.")
    data = prepare(config)
    describe(config, data)
    left = []
    for seed in config.seeds:
        for job in jobs(config, seed):
            if not advance(config, job, data, deadline): left.append(job)
            free_memory()
    print()
    for job in left:
        rows = read_metrics(folder_of(config, job))
        speed = statistics.median(row["tokens_per_s"] for row in rows) if rows else 0
        rest = (job.until - job.start - len(rows)) * config.sizes.batch * config.sizes.seq
        pace = f", about {rest / speed / 60:.1f} minutes left at {speed:,.0f} tokens/s" if speed else ""
        print(f"{job}: step {job.start + len(rows):,} of {job.until:,}{pace}")
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
    rows: dict[tuple[str, float], dict[int, dict]]      # (run or kind of branch, share of the run behind which it begins) -> seed -> its row
    reference: str

    def paired(self, a: str, b: str, share: float = 0.0) -> dict[int, tuple[dict, dict]]:
        """seed -> rows of a and b, where both have one. ValueError for rows of different text; older rows of branches do not name theirs."""
        a_s, b_s = self.rows.get((a, share), {}), self.rows.get((b, share), {})
        pairs = {seed: (a_s[seed], b_s[seed]) for seed in sorted(a_s.keys() & b_s.keys())}
        for seed, rows in pairs.items():
            if len({row["data"] for row in rows if "data" in row}) > 1:
                raise ValueError(f"seed {seed}: {a} and {b} saw different text: train both on one, or take a row out.")
        return pairs


def collect(config: Config) -> Results:
    """Rows of config.rows and config.out, then what lies in config.home: what has ended by its row, other runs by their metrics, which make a shorter
    curve. Rows of older kinds, such as ablations that were runs of their own, are passed over."""
    rows, s, other = {}, config.sizes, 0
    files = dict.fromkeys(Path(path).resolve() for path in (*config.rows, config.out / "results.jsonl"))
    found = [row for path in files if path.exists() for row in map(json.loads, path.read_text().splitlines()) if row["stage"] == "nvfp4_gap"]
    for home in sorted(config.home.glob(f"{config.preset}-seed-*-*")):
        seed, name = home.name[len(config.preset) + 6:].split("-", 1)
        if not (home / "done.json").exists() and pretrain.checkpoints(home):
            saved = json.loads((pretrain.newest_checkpoint(home) / "pretrain.json").read_text())
            same = dict(preset=config.preset, **{k: saved["config"][k] for k in ("steps", "batch", "seq", "lr")})
            part = dict(run=name, seed=int(seed), same=same, data=saved["data"], held_out=None, curve=curve(read_metrics(home), same["steps"]))
            found.insert(0, dict(what="run", **part))      # before the rows of whole runs, which replace it
        found += [json.loads(done.read_text()) for done in (*home.glob("done.json"), *sorted(home.glob("*/done.json")))]
    kinds = dict(run=(TRUNKS, None), ablation=(ABLATIONS, s.short_steps), branch=((LEAVES, SWITCH), s.branch_steps))
    for row in found:
        (known, length), name = kinds.get(row["what"], ((), None)), row.get("run", row.get("kind", LEAVES))
        if name not in known: continue
        if row["same"] != config.same or row.get("branch_steps", row.get("steps")) != length: other += 1
        else: rows.setdefault((name, row.get("share", 0.0)), {})[row["seed"]] = row
    if other: print(f"{other} rows of other presets, lengths or learning rates are left out")
    if not rows: raise ValueError(f"no run of preset {config.preset} with these settings in {config.home} or in the row files: train first.")
    high = any("bf16" in (name, row.get("reference"), row.get("precision")) for (name, _), seeds in rows.items() for row in seeds.values())
    return Results(rows, "bf16" if high else "fp32")


def gap_curves(results: Results) -> dict[int, np.ndarray]:
    """seed -> gap in each part of the run that both precisions have reached."""
    pairs = {seed: [row["curve"] for row in rows] for seed, rows in results.paired("nvfp4", results.reference).items()}
    return {seed: np.array(a[:n]) / np.array(b[:n]) - 1 for seed, (a, b) in pairs.items() if (n := min(len(a), len(b)))}


def tabulate(config: Config, results: Results) -> list[dict]:
    """One row for each measure, branch and ablation: the gap of every seed, their mean and interval."""
    rows, train, parts = [], settings(config, "nvfp4", 0), min(PARTS, config.sizes.steps)

    def add(kind: str, name: str, by_seed: dict[int, float], published: str = "", **more) -> None:
        if by_seed:
            seeds, values = list(by_seed), list(by_seed.values())
            mean, low, high = interval(values)
            rows.append(dict(kind=kind, name=name, seeds=seeds, gaps=values, mean=mean, low=low, high=high, published=published, **more))

    pairs = {seed: measure(*both, train.decay, train.warmup) for seed, both in results.paired("nvfp4", results.reference).items()
             if all(len(row["curve"]) == parts for row in both)}
    gaps = lambda name, share: {seed: row["gap"] for seed, row in sorted(results.rows.get((name, share), {}).items())}
    for name, published in MEASURES.items(): add("pair", name, {seed: gap[name] for seed, gap in pairs.items() if name in gap}, published)
    for share, published in POINTS.items(): add("branch", f"branch at {share:.0%} of the run", gaps(LEAVES, share), published, share=share)
    for share in POINTS:
        both = results.paired(SWITCH, LEAVES, share).values()
        part, whole = (sum(pair[i]["gap"] for pair in both) for i in (0, 1))
        add(SWITCH, f"forward pass leaves 4 bits at {share:.0%} of the run", gaps(SWITCH, share), SWITCHED if share == max(POINTS) else "",
            share=share, closed=part / whole if whole > 0 else None)      # a gap of noise, 0 or below, has no share
    for name, run in ABLATIONS.items():
        add("ablation", name, gaps(name, ABLATE_AT), run.published)
        # what leaving the ingredient out costs: the difference of two gaps of one seed
        more = {seed: mine["gap"] - whole["gap"] for seed, (mine, whole) in results.paired(name, "whole-recipe", ABLATE_AT).items()}
        if name != "whole-recipe": add("difference", name, more)
    return rows


def percent(x: float) -> str: return f"{100 * x:+.2f} %"


def bounds(row: dict) -> str: return "one seed: none" if row["low"] is None else f"{percent(row['low'])} to {percent(row['high'])}"


def print_tables(rows: list[dict], config: Config, reference: str) -> None:
    against, s = {row["name"]: f"{percent(row['mean'])} ({bounds(row)})" for row in rows if row["kind"] == "difference"}, config.sizes
    closed = lambda row: "" if row["closed"] is None else f"{row['closed']:.0%}"
    tables = [(("pair", "branch"), f"NVFP4 against {reference}, same start, data and schedule", {}),
              ((SWITCH,), f"Late switch: what {s.branch_steps} steps with the forward pass in {reference} close", {"share closed": closed}),
              (("ablation",), f"Ablations: {s.short_steps} steps from step {config.ablate_at:,} of {reference}, gap to its own over the second half",
               {"more than the whole recipe": lambda row: against.get(row["name"], "")})]
    for kinds, title, more in tables:
        lines = [[RUNS[row["name"]].label if row["kind"] == "ablation" else row["name"], len(row["seeds"]), percent(row["mean"]), bounds(row),
                  *(show(row) for show in more.values()), row["published"]] for row in rows if row["kind"] in kinds]
        if lines: nvfp4.print_table(title, ["loss gap, mean over seeds", "seeds", "gap", "95 % interval", *more, "published"], lines)


# %% 5 · Figure

def plot_gap(ax, config: Config, results: Results, rows: list[dict]) -> None:
    """Gap along the run: seeds thin, their mean thick; branches with their intervals, those of the late switch to the right of the others."""
    curves, steps, train = gap_curves(results), config.sizes.steps, settings(config, "nvfp4", 0)
    parts = min(PARTS, steps)
    middle = lambda n: (np.arange(n) + 0.5) * steps / parts
    for i, gap in enumerate(curves.values()):
        ax.plot(middle(len(gap)), 100 * gap, color="#9fb8d8", linewidth=0.9, label="each seed" if i == 0 else None)
    n = min(map(len, curves.values()))
    mean = np.mean([gap[:n] for gap in curves.values()], axis=0)
    if len(curves) > 1: ax.plot(middle(n), 100 * mean, color="#1f4e8c", linewidth=2.2, label=f"mean of {len(curves)} seeds")
    for kind, marker, colour, aside, label in (("branch", "D", "#c0392b", 0.0, f"branches in {results.reference}"),
                                               (SWITCH, "s", "#d68910", 0.016, "branches, only the forward pass leaves 4 bits")):
        for i, row in enumerate(row for row in rows if row["kind"] == kind):
            spread = None if row["low"] is None else 100 * (row["high"] - row["mean"])
            ax.errorbar((row["share"] + aside) * steps, 100 * row["mean"], yerr=spread, fmt=marker, color=colour, markersize=6, capsize=3, zorder=5,
                        label=label if i == 0 else None)
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


def plot_ablations(ax, config: Config, results: Results, rows: list[dict]) -> None:
    """Gap of the whole recipe and of every ablation from the one checkpoint: seeds as dots, their mean with its interval. The dots set the scale:
    of two seeds the interval may leave the frame."""
    rows, steps = [row for row in rows if row["kind"] == "ablation"][::-1], config.sizes.short_steps
    for y, row in enumerate(rows):
        whole, gaps, mean = row["name"] == "whole-recipe", [100 * gap for gap in row["gaps"]], 100 * row["mean"]
        colour = "#1f4e8c" if whole else "#c0392b"
        ax.plot(gaps, [y] * len(gaps), "o", color=colour, alpha=0.5, markersize=6)
        if row["low"] is not None: ax.errorbar(mean, y, xerr=100 * row["high"] - mean, fmt="|", color=colour, capsize=4, markersize=14)
        if whole: ax.axvline(mean, color=colour, linestyle=":", linewidth=1)
    ax.axvline(0, color="0.3", linewidth=1)
    dots = [100 * gap for row in rows for gap in row["gaps"]] + [0.0]
    margin = 0.3 * (max(dots) - min(dots)) or 1.0
    ax.set_xlim(min(dots) - margin, max(dots) + margin)
    ax.set_yticks(range(len(rows)), [RUNS[row["name"]].label for row in rows])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    bars = "dots: seeds, bars: 95 %" if any(row["low"] is not None for row in rows) else "one seed, no interval"
    ax.set_title(f"One ingredient taken away ({bars})")
    ax.set_xlabel(f"gap of the training loss to {results.reference}, steps {steps // 2 + 1} to {steps} from step {config.ablate_at:,} (%)")


def plot(config: Config, results: Results, rows: list[dict]) -> None:
    pairs, short = bool(gap_curves(results)), any(row["kind"] == "ablation" for row in rows)
    if not pairs and not short: print("no figure: no run has its reference beside it yet"); return
    fig, axes = nvfp4.new_figure(columns=pairs + short, width=7.6, height=4.6)
    axes = np.atleast_1d(axes)
    if pairs: plot_gap(axes[0], config, results, rows)
    if short: plot_ablations(axes[-1], config, results, rows)
    nvfp4.save_figure(fig, config.figure)
    print(f"\nfigure: {config.figure}")


def report(config: Config) -> list[dict]:
    """Tables, figure and rows of everything found."""
    results = collect(config)
    rows = tabulate(config, results)
    print_tables(rows, config, results.reference)
    if not rows: print("no pair has ended yet: the figure shows how far they are")
    for row in rows:
        tidy_row = {k: [round(x, 6) for x in v] if k == "gaps" else round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
        nvfp4.write_row(config.out, "nvfp4_gap", what="gap", reference=results.reference, same=config.same, **tidy_row)
    if sentence := missing("matplotlib"): print(f"no figure: it {sentence}")
    else: plot(config, results, rows)
    return rows


def main(config: Config) -> None:
    report(config) if config.report else train(config)


if __name__ == "__main__":
    if sentence := missing("tyro"): sys.exit(f"nvfp4_gap: {sentence}")
    nvfp4.run_command(main, Config, __doc__)
