"""The whole pipeline, measured: base -> SFT -> RLVR -> teachers -> MOPD warmup -> MOPD, twice -> boosted MTP head, with controls and ablations.

Nothing is learnt here in another way than stages 05, 06 and 07 do; this script puts their parts in order, gives every seed a folder a phase, scores
all checkpoints on the same held-out questions, and sets a 95 % interval to every difference.
    sft          06's two stages on all families at levels 0 and 1; a copy is kept at two thirds of its steps: has it plateaued?
    rlvr         GRPO on levels 0 to 2, of which it keeps what is neither solved nor out of reach
    more-sft     control: from the SFT checkpoint, RLVR's wall seconds spent on more of the SFT's own data
    teachers-1, warmup-1, mopd-1, teachers-2, warmup-2, mopd-2      two rounds; the second one's teachers branch from the first one's student
    no-warmup    mopd-1 from the RLVR student itself
    boost        acceptance of the head's drafts, before and after
    effort       medium effort, and regular traces cut so that answers become as short
    full-kl      mopd-1 with the reverse KL over the whole vocabulary in place of the drawn token's
    rollouts-4   mopd-1 with a quarter of the prompts, four rollouts each
    grpo         RLVR goes on over all domains with as many rollouts' tokens as mopd-1 drew and learnt
    sft-worked   control: RLVR's wall seconds on worked solutions of levels 0 to 2, an expert's traces, which RLVR does not have
A difference is taken question by question, then averaged over the seeds; 95 % is a bootstrap over the questions with the seeds held fixed. It says
what other questions would have shown of these very models. What other seeds would show is another matter: each seed's value stands beside it.
Of RLVR's wall seconds all of its phase count, of its controls' those of steps alone, so that these get a little more. One base serves all seeds.

Run:     python experiments/posttrain.py                                 # about 2 minutes on 2 CPU cores: the machinery, no result
         python experiments/posttrain.py --full --device cuda --seeds 0 1 2 --minutes 25       # on GPUs: seeds side by side; the same command goes on
         python experiments/posttrain.py --full --device cuda --seeds 1 --phases sft rlvr      # some phases of one seed
         python experiments/posttrain.py --report --full --files more/seeds --out experiments --figure experiments/posttrain.png
Needs:   a GPU like one H200 for --full, 5 GB of disk a seed; rustbpe, tiktoken and tyro, reasoning-gym for all families, matplotlib for the figure
Rows:    every run leaves HOME/seed-N.json with all answers as bits, which is all that --report reads: seeds may be run on several machines. The
         report writes one row a comparison, one of accuracies, and one of settings and seconds.
Sources: [Ultra] Nemotron 3 Ultra report, arXiv 2606.15007 · [DeepSeek] DeepSeek LLM, arXiv 2401.02954: learning rate and batch from compute
"""
from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


def stage(name: str):
    """A numbered stage, importable from this folder."""
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


nvfp4, nemotron, pretrain, sft, rl, infer = map(stage, ("01_nvfp4", "04_model", "05_pretrain", "06_sft", "07_rlvr_mopd", "08_infer"))
corpus, tasks, batches = map(stage, ("data.corpus", "data.tasks", "data.batches"))

# %% 1 · Config

MODELS = {
    # ours: tiny's pattern and vocabulary at twice its width, four times the state, twice the experts: 14.3M parameters and 2.7M in the head
    "course": nemotron.ModelConfig(pattern="MEM*EMEM*E", d_model=256, vocab=4096, heads=8, kv_heads=2, head_dim=32, mamba_heads=32, mamba_head_dim=16,
                                   groups=4, state=64, chunk=64, experts=32, experts_per_token=4, latent=128, expert_width=256, shared_width=512),
    "micro": nemotron.ModelConfig(pattern="MEM*E", d_model=64, vocab=1024, heads=4, kv_heads=2, head_dim=16, mamba_heads=16, mamba_head_dim=8,
                                  groups=2, state=16, chunk=32, experts=8, experts_per_token=2, latent=32, expert_width=64, shared_width=128),
}
# ours: a source's share of the base's text; "files" are worked questions of all families, at level 0 and of the training side
SHARES = {"files": 0.5, "stories": 0.25, "stdlib": 0.2, "pydoc": 0.05}


@dataclass(frozen=True)
class Config:
    """Runs the pipeline for some seeds, or reports what their files say. Defaults are those of --full; without it smaller ones stand in (SMALL)."""
    full: bool = False                   # the measurement; without it the same machinery at a size for a CPU, which is no result
    report: bool = False                 # run nothing: table, rows and figure of all seed files found
    seeds: tuple[int, ...] = (0,)        # on a GPU several run side by side, a process each; several GPUs share them
    phases: tuple[str, ...] = ()         # some of them; nothing = all, in order of importance
    minutes: float = 600.0               # after which no phase begins ..
    grace: float = 2.0                   # .. and minutes more, after which the one at hand is stopped behind a step; the same command goes on with it
    device: Literal["cpu", "cuda"] = "cpu"
    home: Path = ROOT / "out" / "posttrain"              # base, checkpoints, scores, seed files
    out: Path = ROOT / "out"                             # results.jsonl in this folder gets the rows
    figure: Path = ROOT / "out" / "posttrain.png"
    files: tuple[Path, ...] = ()         # report: seed files, or folders of them, beside those in home
    sync: bool = False                   # draw and learn in turns: the same arithmetic, no second process
    rows: int = 2048                     # answers written at once for scores and pass rates, ours: a decode step costs a GPU as much for 64
    held_out: int = 1000                 # questions a domain that every checkpoint answers
    families: tuple[str, ...] = ("all",)
    level: int = 2                       # of RL and of the held-out questions, with the easier ones; the SFT knows those below it

    model: Literal["course", "micro"] = "course"
    megabytes: float = 10.0              # of worked questions in the base's text, ours
    base_tokens: int = 60_000_000        # ours: 4 a parameter, for a minute or two of an H200
    base_batch: int = 64                 # sequences a step: 32,768 tokens; [DeepSeek]'s laws give 30,000 and 3.8e-3 for this compute
    base_seq: int = 512
    base_lr: float = 3e-3                # ours: a little below that law

    sft_tokens: int = 3_000_000          # to learn, ours: some 150,000 conversations
    sft_steps: tuple[int, int] = (1200, 120)             # of the two stages, ours
    sft_pack: tuple[int, int] = (1024, 2048)             # tokens a pack, ours
    sft_batch: tuple[int, int] = (32, 16)                # packs a step, ours
    sft_lr: tuple[float, float] = (1.5e-3, 3e-4)         # peaks, ours
    max_tokens: int = 192                # most tokens a turn may have, ours: the longest worked turn up to level 2 has 187

    rl_steps: int = 80                   # ours; Ultra about 180
    rl_prompts: int = 128                # a step, ours; Ultra 512. On a GPU their answers take hardly longer than those of 32
    rl_answers: int = 16                 # a prompt  [Ultra]
    rl_lr: float = 5e-5                  # ours: at 2e-4 RLVR forgot what SFT had taught
    rl_pieces: int = 4                   # that a batch is learnt in, ours
    profile: tuple[int, int] = (48, 4)   # questions a family and level whose pass rate is measured, and answers to each, ours
    pool: int = 300                      # questions of each level that is used, ours: 588 in all, each asked four times, were learnt by heart
    band: tuple[float, float] = (0.1, 0.7)               # mean pass rate of a family's level to be used, as in stage 07
    more_lr: float = 5e-4                # peak of the controls, ours: a third of the SFT's
    first_steps: int = 20                # of a control: its warmup, in which the seconds of a step are measured, ours

    teachers: tuple[str, ...] = ("numbers", "strings", "tools", "logic")
    teacher_steps: int = 16              # of RL a teacher, ours
    teacher_prompts: int = 64            # a step, with rl_answers answers each, ours
    teacher_sft: int = 1200              # steps of SFT of the kind of teacher that begins with it, ours: 1.2M tokens
    pivot: tuple[int, int] = (600, 8)    # worked tool conversations that are cut, rollouts of each turn, ours
    warmup: tuple[int, int] = (256, 100) # questions a teacher, steps of SFT, ours
    mopd_steps: int = 24                 # a round, ours; Nemotron-Cascade 2: 40 to 52
    mopd_prompts: int = 512              # a step, ours; Ultra 1,024
    mopd_lr: float = 2e-4                # ours: stage 07's
    boost: tuple[int, int, int] = (200, 16, 1024)        # steps, packs a step, tokens a pack, ours
    boost_rollouts: int = 1500           # of the finished student, ours
    depths: int = 7                      # drafts  [Ultra]
    drafts: int = 200                    # held-out answers that acceptance is measured on, greedy and sampled, ours
    tried: int = 60                      # validation questions a domain on which the budget of cut traces is chosen, ours

    def __post_init__(self):
        if unknown := [name for name in self.phases if name not in NEEDS]:
            raise ValueError(f"no phase {unknown[0]!r}: choose among {', '.join(NEEDS)}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds): raise ValueError(f"seeds {self.seeds}: give at least one, and each once.")
        for name in ("rows", "level", "held_out", "base_tokens", "first_steps", "drafts", "tried"):
            if getattr(self, name) < 1: raise ValueError(f"{name} = {getattr(self, name)} must be at least 1.")
        if self.mopd_prompts % 4: raise ValueError(f"mopd_prompts = {self.mopd_prompts} must be a multiple of 4: an ablation asks a quarter of them.")

    @property
    def chosen(self) -> list[str]: return [name for name in NEEDS if not self.phases or name in self.phases]

    @property
    def settings(self) -> dict:
        """What seeds must agree in to be averaged."""
        return json.loads(json.dumps({f.name: getattr(self, f.name) for f in fields(self) if f.name not in FREE}))


SAMPLED = ("sft", "rlvr", "more-sft", "mopd-2")      # checkpoints whose sampled answers are scored as well: RL raises what is drawn
FREE = {"report", "seeds", "phases", "minutes", "grace", "device", "home", "out", "figure", "files", "sync", "rows"}
# phase -> those that must be done before it; the order is that of importance
NEEDS: dict[str, tuple[str, ...]] = {
    "sft": (), "rlvr": ("sft",), "more-sft": ("sft", "rlvr"),
    "teachers-1": ("rlvr",), "warmup-1": ("teachers-1",), "mopd-1": ("warmup-1",),
    "teachers-2": ("mopd-1",), "warmup-2": ("teachers-2",), "mopd-2": ("warmup-2",),
    "no-warmup": ("teachers-1",), "boost": ("mopd-2",), "effort": ("mopd-2",),
    "full-kl": ("warmup-1",), "rollouts-4": ("warmup-1",), "grpo": ("mopd-1",), "sft-worked": ("sft", "rlvr")}
# ours: sizes for a CPU, families whose answers a model that can do little else gives now and then, so that there is something to reinforce
SMALL = dict(model="micro", level=1, families=("gcd", "count_bits", "letter_counting", "shop"), megabytes=0.4, base_tokens=100_000, base_batch=4,
             base_seq=128, rows=256, held_out=24, sft_tokens=60_000, sft_steps=(240, 20), sft_pack=(384, 512), sft_batch=(2, 1), sft_lr=(4e-3, 5e-4),
             max_tokens=48, rl_steps=3, rl_prompts=4, rl_answers=4, rl_pieces=1, profile=(8, 4), pool=12, band=(0.01, 0.99), first_steps=3,
             teachers=("numbers", "strings", "tools"), teacher_steps=2, teacher_prompts=2, teacher_sft=4, pivot=(6, 4), warmup=(8, 2), mopd_steps=2,
             mopd_prompts=8, boost=(4, 2, 256), boost_rollouts=16, depths=3, drafts=12, tried=4, sync=True)


def sized(config: Config) -> Config:
    """The settings of this call: without --full those of SMALL, wherever a flag has not said otherwise."""
    default = {f.name: f.default for f in fields(Config)}
    return config if config.full else replace(config, **{name: x for name, x in SMALL.items() if getattr(config, name) == default[name]})


# %% 2 · Base  [stage 05]

def write_worked(config: Config, path: Path) -> Path:
    """Worked questions of the families as text, one a line: a source of stage 05's corpus."""
    if path.exists(): return path
    names = tuple(tasks.ENVIRONMENTS) if "all" in config.families else config.families
    work, size = path.with_suffix(".part"), 0
    with work.open("w", encoding="utf-8") as file:
        for text in corpus.worked_tasks(0, names):
            file.write(json.dumps({"text": text}) + "\n")
            if (size := size + len(text)) >= config.megabytes * 1e6: break
    os.replace(work, path)
    return path


def train_base(config: Config) -> Path:
    """The base's last checkpoint, trained if it is not there: WSD on the built-in sources, with all families' worked questions."""
    home, done = nvfp4.writable_folder(config.home / "base"), config.home / "base" / "done.json"
    same = {name: x for name, x in config.settings.items() if name in ("model", "families", "megabytes") or name.startswith("base_")}
    if done.exists():
        found = json.loads(done.read_text())
        if found["settings"] != same: raise ValueError(f"{home} holds a base of other settings: delete {config.home}, or choose another --home.")
        return config.home / found["folder"]
    began, model = time.perf_counter(), MODELS[config.model]
    data = pretrain.prepare_data(("stories", "stdlib", "pydoc", str(write_worked(config, home / "worked.jsonl"))), home / "data", model.vocab)
    steps = max(config.base_tokens // (config.base_batch * config.base_seq), 1)
    settings = pretrain.PretrainConfig(out=home, steps=steps, batch=config.base_batch, seq=config.base_seq, lr=config.base_lr,
                                       lr_min=config.base_lr / 100, device=config.device, precision="bf16" if config.device == "cuda" else "fp32",
                                       branches=(), branch_steps=steps, health_every=0, save_every=max(steps // 2, 1), keep=1)
    read = batches.Batches(data.train, batches.Blend(SHARES, SHARES), settings.batch, settings.seq, steps, settings.seed)
    shared = dict(tokenizer=data.tokenizer, data_hash=pretrain.hash_of(data))
    if pretrain.checkpoints(home): trainer = pretrain.Trainer.load(pretrain.newest_checkpoint(home), settings, read, home, **shared)
    else:
        torch.manual_seed(settings.seed)
        trainer = pretrain.Trainer(settings, nemotron.Nemotron(model), read, home, **shared)
    folder = rl.last_of(trainer, trainer.fit(steps, log_every=max(steps // 10, 1), label="base"))
    bits = pretrain.evaluate(trainer, data.held_out)
    write_json(done, dict(folder=str(folder.relative_to(config.home)), settings=same, seconds=round(time.perf_counter() - began, 1),
                          tokens=steps * config.base_batch * config.base_seq, bits_per_byte={name: round(x, 4) for name, x in bits.items()}))
    return folder


def write_json(path: Path, value) -> None:
    """Whole or not at all."""
    nvfp4.writable_folder(path.parent)
    path.with_suffix(".part").write_text(json.dumps(value))
    os.replace(path.with_suffix(".part"), path)


# %% 3 · Questions and scores
# The same held-out questions for every seed and checkpoint, greedy, and for those in SAMPLED also at temperature 1. Kept are bits, a question each,
# so that any two checkpoints can be paired later.

def ask(config: Config, n: int, split: str) -> dict[str, list]:
    """domain -> at most n different questions, its families and levels in turn; drawn with seed 0 whatever the run's."""
    settings, out = rl.RLConfig(families=config.families, level=config.level), {}
    for domain in rl.domains_of(settings):
        found: dict[tuple, tasks.Task] = {}
        # a question may come at two levels, and counts once
        for task in rl.questions_of(domain, n + n // 4, settings, 0, split): found.setdefault((task.family, task.prompt), task)
        out[domain] = list(found.values())[:n]
    return out


def digest(asked: dict[str, list]) -> str:
    return hashlib.sha256(json.dumps([[task.prompt for task in some] for some in asked.values()]).encode()).hexdigest()[:16]


def engine_of(config: Config, answers: int = 10**9) -> Callable:
    """What writes rollouts, at most config.rows at a time. A GPU's steps are recorded ones of stage 08, and slots are filled again as answers end;
    04's generate waits for Python at every token."""
    return infer.rollout_engine(min(config.rows, answers), prefill_tokens=2**16) if config.device == "cuda" else rl.sampled


@dataclass(frozen=True)
class InPieces:
    """A rollout engine: `rows` prompts of about one length at a time; the likeliest token always, or sampled as the model card says.

    cut: a turn's trace ends after so many tokens. </think> is put behind them and the model goes on from there, as a client with a budget has it.
    """
    rows: int
    cut: int | None = None
    sampled: bool = False
    engine: Callable | None = None      # nothing = stage 04's generate

    @classmethod
    def of(cls, config: Config, cut: int | None = None, sampled: bool = False) -> InPieces:
        return cls(10**9, cut, sampled, engine_of(config)) if config.device == "cuda" else cls(config.rows, cut, sampled)

    def __call__(self, model, prompts: list[list[int]], sampling) -> list:
        order, out = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [None] * len(prompts)
        engine = self.engine or nemotron.generate
        sampling = replace(sampling, temperature=1.0, top_p=0.95) if self.sampled else replace(sampling, temperature=0.0)      # [Ultra's model card]
        for start in range(0, len(order), self.rows):
            some = order[start:start + self.rows]
            drawn = engine(model, [prompts[i] for i in some], sampling)
            if self.cut is not None: drawn = self.cut_traces(engine, model, [prompts[i] for i in some], drawn, sampling)
            for i, new in zip(some, drawn): out[i] = replace(new, logprobs=[0.0] * len(new.ids))      # nothing learns from them
        return out

    def cut_traces(self, engine: Callable, model, prompts: list[list[int]], drawn: list, sampling) -> list:
        """Completions with those traces cut and continued that have more than `cut` tokens before </think>."""
        over = [i for i, x in enumerate(drawn) if len(x.ids) > self.cut and sft.END_THINK not in x.ids[:self.cut + 1]]
        heads = [drawn[i].ids[:self.cut] + [sft.END_THINK] for i in over]
        rest = engine(model, [prompts[i] + head for i, head in zip(over, heads)],
                      replace(sampling, max_tokens=max(sampling.max_tokens - self.cut - 1, 1)))
        closed = {i: replace(new, ids=head + new.ids) for i, head, new in zip(over, heads, rest)}
        return [closed.get(i, x) for i, x in enumerate(drawn)]


class Scores(NamedTuple):
    right: dict[str, np.ndarray]      # domain -> bool a question
    tokens: dict[str, np.ndarray]     # domain -> tokens written, over all turns


def play(folder: Path, asked: dict[str, list], config: Config, mode: str = "regular", cut: int | None = None,
         sampled: bool = False) -> Scores:
    """A checkpoint's answers. Tools answer; the last turn is scored."""
    model, every = nemotron.load_checkpoint(folder).to(config.device).eval(), [task for some in asked.values() for task in some]
    sampling = nemotron.SamplingParams(max_tokens=config.max_tokens, temperature=1.0, top_p=1.0)      # what rollouts asks for; InPieces overrules it
    drawn = iter(rl.rollouts(InPieces.of(config, cut, sampled), model, sft.Tokenizer.load(folder), every, [mode] * len(every), sampling))
    mine = {domain: list(itertools.islice(drawn, len(some))) for domain, some in asked.items()}
    return Scores({d: np.array([x.score == 1 for x in some], dtype=bool) for d, some in mine.items()},
                  {d: np.array([sum(x.learn) for x in some]) for d, some in mine.items()})


def as_hex(right_n: np.ndarray) -> str: return np.packbits(right_n.astype(bool)).tobytes().hex()


def from_hex(text: str, n: int) -> np.ndarray:
    """as_hex backwards.   "a0", 3 -> 1 0 1"""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=n).astype(bool)


# %% 4 · A seed's folder

@dataclass(frozen=True)
class Run:
    """One seed: where its phases lie, and the settings of stages 06 and 07 for it."""
    config: Config
    seed: int
    base: Path

    @property
    def home(self) -> Path: return self.config.home / f"seed-{self.seed}"

    def mark(self, phase: str) -> dict | None:
        """What a phase left behind when it was done."""
        path = self.home / phase / "done.json"
        return json.loads(path.read_text()) if path.exists() else None

    def path(self, folder: str) -> Path: return self.config.home / folder

    def last(self, phase: str) -> Path: return self.path(self.mark(phase)["folder"])

    def teachers(self, turn: int) -> dict[str, Path]: return {d: self.path(x) for d, x in self.mark(f"teachers-{turn}")["teachers"].items()}

    @property
    def mopd(self) -> rl.MOPDConfig:
        c = self.config
        return rl.MOPDConfig(teachers=c.teachers, teacher_steps=c.teacher_steps, teacher_prompts=c.teacher_prompts, teacher_lr=c.rl_lr,
                             teacher_sft=c.teacher_sft, pivot=c.pivot, warmup=c.warmup, steps=c.mopd_steps, prompts=c.mopd_prompts, lr=c.mopd_lr,
                             boost=c.boost, boost_rollouts=c.boost_rollouts, depths=c.depths)

    def rl_settings(self, phase: str, **changes) -> rl.RLConfig:
        """Stage 07's settings; all that it writes lies in the phase's folder, and what it finds there it goes on with."""
        c = self.config
        own = dict(out=self.home / phase, families=c.families, level=c.level, steps=c.rl_steps, prompts=c.rl_prompts, answers=c.rl_answers,
                   max_tokens=c.max_tokens, lr=c.rl_lr, sync=c.sync, profile=c.profile, pool=c.pool, band=c.band, effort=(0.1, c.max_tokens // 3),
                   micro_batches=c.rl_pieces, rows=c.rows, device=c.device, seed=self.seed, eval_every=max(c.rl_steps // 3, 1), save_every=20,
                   resume=True, mopd=self.mopd)
        return rl.RLConfig(**own | changes)

    def sft_settings(self, **changes) -> sft.SFTConfig:
        c = self.config
        own = dict(out=self.home, families=c.families, tokens=c.sft_tokens, levels=c.level, steps=c.sft_steps, pack=c.sft_pack, batch=c.sft_batch,
                   lr=c.sft_lr, lr_min=(c.sft_lr[0] / 15, c.sft_lr[1] / 5), device=c.device, precision="bf16" if c.device == "cuda" else "fp32",
                   seed=self.seed, max_tokens=c.max_tokens, validate_every=0, save_every=500)
        return sft.SFTConfig(**own | changes)

    def relative(self, folder: Path) -> str: return str(Path(folder).relative_to(self.config.home))

    def learnt(self, folder: Path) -> list[dict]:
        """Rows of metrics of the trainer that wrote this checkpoint."""
        return [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]


# %% 5 · Phases: SFT, RLVR and its controls

@cache
def conversations(run: Run, levels: int) -> list[sft.Sample]:
    """A seed's worked questions, all three modes and cut copies; made once, since a control reads those of the SFT."""
    return sft.build_samples(run.sft_settings(levels=levels), sft.Tokenizer.load(run.base))


def tuner(run: Run, phase: str, settings: sft.SFTConfig, base: Path) -> sft.SFTTrainer:
    packs = sft.Packs(conversations(run, settings.levels), settings)
    return rl.trainer_of(sft.SFTTrainer, base, settings.training(), packs, run.rl_settings(phase), "sft", sft=settings)


def fine_tune(run: Run) -> dict:
    settings, snapshot = run.sft_settings(), run.home / "sft" / "two-thirds"
    trainer, total = tuner(run, "sft", settings, run.base), sum(settings.steps)
    if not snapshot.exists():
        folder = rl.last_of(trainer, trainer.fit(max(2 * total // 3, 1), log_every=200, label=f"seed {run.seed}, sft"))
        shutil.rmtree(part := snapshot.with_suffix(".part"), ignore_errors=True)
        shutil.copytree(folder, part, ignore=shutil.ignore_patterns("trainer.pt"))
        os.replace(part, snapshot)
    folder = rl.last_of(trainer, trainer.fit(total, log_every=200, label=f"seed {run.seed}, sft"))
    return dict(folder=folder, scores={"sft-two-thirds": snapshot, "sft": folder}, filled=round(trainer.batches.used[0][0], 4),
                tokens=sum(n * size * b for n, size, b in zip(settings.steps, settings.pack, settings.batch)))


def reinforce(run: Run) -> dict:
    folder = rl.reinforce(run.rl_settings("rlvr"), run.last("sft"), engine_of(run.config))
    return dict(folder=folder, scores={"rlvr": folder}, tokens=sum(row["learnt"] for row in run.learnt(folder)))


def steps_that_fit(seconds: float, measured: list[float]) -> int:
    """How many steps a time holds, all counted, when the first ones took `measured`: half of them are left out as warm-up.

    100 s and 9 1 1 1 -> 9 + 3 · 1 are gone, the others take 1 s each: 4 + 88 = 92 steps.   Never fewer than have been taken.
    """
    pace = statistics.median(measured[len(measured) // 2:])
    return len(measured) + max(int((seconds - sum(measured)) / pace), 0)


def spend(run: Run, phase: str, levels: int) -> dict:
    """Control: fine-tuning from the SFT checkpoint for as many steps as RLVR's wall seconds hold, on a cosine from a peak of its own.

    The first steps are the warmup, whose rates do not depend on the number of steps: it is fixed behind them, by what they took.
    """
    c, seconds, path = run.config, run.mark("rlvr")["seconds"], run.home / phase / "steps.json"
    most = 10 ** 9      # as good as without end
    settings = run.sft_settings(levels=levels, steps=(most, 0), warmup=(c.first_steps / most, 0.0), lr=(c.more_lr,) * 2, lr_min=(c.more_lr / 15,) * 2,
                                pack=(c.sft_pack[0],) * 2, save_every=200)
    trainer = tuner(run, phase, settings, run.last("sft"))
    if not path.exists():
        rl.last_of(trainer, trainer.fit(c.first_steps, log_every=10**9, label=f"seed {run.seed}, {phase}"))
        write_json(path, dict(steps=steps_that_fit(seconds, [row["seconds"] for row in trainer.rows]), seconds=seconds))
    total = json.loads(path.read_text())["steps"]
    trainer.sft = replace(settings, steps=(total, 0), warmup=(c.first_steps / total, 0.0))
    trainer.schedule = trainer.sft.rate
    folder = rl.last_of(trainer, trainer.fit(total, log_every=200, label=f"seed {run.seed}, {phase}"))
    return dict(folder=folder, scores={phase: folder}, steps=total, allowed=seconds, used=round(sum(row["seconds"] for row in trainer.rows), 1),
                tokens=total * settings.pack[0] * settings.batch[0])


# %% 6 · Phases: teachers and distillation

def teach(run: Run, turn: int) -> dict:
    c, phase, earlier = run.config, f"teachers-{turn}", run.teachers(turn - 1) if turn > 1 else {}
    student = run.last("rlvr" if turn == 1 else f"mopd-{turn - 1}")
    found = rl.train_teachers(student, earlier, run.rl_settings(phase), run.mopd, engine=engine_of(c, c.teacher_prompts * c.rl_answers))
    return dict(folder=student, teachers={domain: run.relative(x) for domain, x in found.items()},
                scores={f"teacher-{domain}-{turn}": (x, domain) for domain, x in found.items()},
                tokens=sum(row["learnt"] for x in found.values() if f"/{phase}/" in x.as_posix() for row in run.learnt(x)))


def warm_up(run: Run, turn: int) -> dict:
    folder = rl.warm_up(run.path(run.mark(f"teachers-{turn}")["folder"]), run.teachers(turn), run.rl_settings(f"warmup-{turn}"), run.mopd,
                        engine=engine_of(run.config))
    return dict(folder=folder, scores={f"warmup-{turn}": folder})


def all_teachers(run: Run, turn: int) -> dict[str, Path]:
    """Who teaches which domain: as in stage 07 the round's first student, where nobody else does."""
    settings = run.rl_settings(f"mopd-{turn}")
    return dict.fromkeys(rl.domains_of(settings), run.path(run.mark(f"teachers-{turn}")["folder"])) | run.teachers(turn)


def distil(run: Run, phase: str, turn: int, warm: bool = True) -> dict:
    start = run.last(f"warmup-{turn}") if warm else run.path(run.mark(f"teachers-{turn}")["folder"])
    folder = rl.distil(start, all_teachers(run, turn), run.rl_settings(phase), run.mopd, engine=engine_of(run.config, run.config.mopd_prompts))
    return dict(folder=folder, scores={phase: folder}, tokens=sum(row["learnt"] for row in run.learnt(folder)))


def full_kl(logp_nv: Tensor, teacher_nv: Tensor) -> Tensor:
    """Reverse KL over the whole vocabulary, [n]:  sum over v of p_v (log p_v - log q_v), with p the student's distribution and q the teacher's.

    p 1/2 1/2, q 1/4 3/4  ->  ln 2 / 2 + ln(2/3) / 2 = 0.1438
    The drawn token is an estimate of this from one draw; here all of the vocabulary is known, so that no importance weight is needed for it.
    """
    return (logp_nv.exp() * (logp_nv - teacher_nv)).sum(-1)


def full_kl_objective(teachers: list) -> Callable:
    """(student, rows) -> PolicyLoss. rows.more["teacher_of"] [r, t]: which of the teachers a row is for."""
    def objective(model, rows: rl.Rows) -> rl.PolicyLoss:
        h_rtd, balances = model.trunk(rows.ids_rt, rows.doc_rt)
        logp_nv = rl.log_softmax32(model, h_rtd[rows.mask_rt])
        teacher_nv, teacher_r = torch.empty_like(logp_nv), rows.more["teacher_of"][:, 0]
        row_n = rows.mask_rt.nonzero()[:, 0]
        with torch.no_grad():
            for k in teacher_r.unique().tolist():
                mine_r = teacher_r == k
                h_rtd = teachers[k].hidden(rows.ids_rt[mine_r], rows.doc_rt[mine_r])
                teacher_nv[mine_r[row_n]] = rl.log_softmax32(teachers[k], h_rtd[rows.mask_rt[mine_r]])
        kl_n = full_kl(logp_nv, teacher_nv)
        none_rt = logp_nv.new_zeros(rows.ids_rt.shape)
        logp_rt = none_rt.masked_scatter(rows.mask_rt, logp_nv.detach().gather(1, rows.labels_rt[rows.mask_rt][:, None])[:, 0])
        entropy_rt = none_rt.masked_scatter(rows.mask_rt, -(logp_nv.detach().exp() * logp_nv.detach()).sum(-1))
        loads = [x.load_e for x in balances]
        load_me = torch.stack(loads) if loads else rows.ids_rt.new_zeros(0, model.config.experts)
        return rl.PolicyLoss(kl_n.sum() / rows.tokens, load_me, rl.policy_sums(logp_rt, entropy_rt, rows) | dict(kl=kl_n.detach().sum()))
    return objective


def distil_full_kl(run: Run) -> dict:
    """mopd-1 with another objective: the same questions, as many rollouts and updates. ours: no importance weight, see full_kl."""
    start, teachers = run.last("warmup-1"), all_teachers(run, 1)
    draw, _, own = rl.distillation(start, teachers, run.rl_settings("full-kl"), run.mopd,
                                     engine=engine_of(run.config, run.config.mopd_prompts))
    models = [nemotron.load_checkpoint(x).to(own.device).eval() for x in teachers.values()]

    def read(_, drawn: list[rl.Rollout]) -> rl.Rows:
        rows, domains = rl.to_rows(drawn), list(teachers)
        teacher_r1 = torch.tensor([[domains.index(x.task.domain)] for x in drawn])
        return rows._replace(more=dict(teacher_of=teacher_r1.expand(-1, rows.ids_rt.shape[1])))

    folder = rl.practise(draw, full_kl_objective(models), read, start, own)
    return dict(folder=folder, scores={"full-kl": folder}, tokens=sum(row["learnt"] for row in run.learnt(folder)))


def distil_four(run: Run) -> dict:
    """mopd-1 with every fourth of each step's prompts, asked four times."""
    start = run.last("warmup-1")
    draw, read, own = rl.distillation(start, all_teachers(run, 1), run.rl_settings("rollouts-4"), run.mopd,
                                     engine=engine_of(run.config, run.config.mopd_prompts))
    draw = replace(draw, plan=[step[:len(step) // 4] for step in draw.plan], answers=4)
    folder = rl.practise(draw, rl.mopd_objective(run.mopd), read, start, own)
    return dict(folder=folder, scores={"rollouts-4": folder}, tokens=sum(row["learnt"] for row in run.learnt(folder)))


def go_on(run: Run) -> dict:
    """Equal-token GRPO: RLVR goes on for as many tokens as mopd-1 learnt, at the length of RLVR's last answers."""
    rows, wanted = run.learnt(run.last("rlvr")), run.mark("mopd-1")["tokens"]
    steps = max(round(wanted / statistics.mean(row["learnt"] for row in rows[-10:])), 1)
    # other questions and dice than RLVR's
    settings = run.rl_settings("grpo", steps=steps, warmup_steps=min(10, steps // 4), eval_every=0, seed=run.seed + 1000)
    folder = rl.reinforce(settings, run.last("rlvr"), engine_of(run.config))
    return dict(folder=folder, scores={"grpo": folder}, wanted=wanted, tokens=sum(row["learnt"] for row in run.learnt(folder)))


# %% 7 · Phases: drafts and effort

class Drafts(NamedTuple):
    """Acceptance of drafts, by answer and by place."""
    tokens: list[int]         # an answer: those to verify ..
    passes: list[float]       # .. and expected passes of the trunk; the length of stage 07's acceptance is sum / sum
    by_draft: list[float]


def count_drafts(model, drawn: list[rl.Rollout], depths: int, greedy: bool) -> Drafts:
    """What stage 07's acceptance sums up, kept by answer, so that answers can be drawn anew."""
    tokens, passes, reached_k, accepted_k = [], [], *torch.zeros(2, depths, dtype=torch.float64)
    for x in tqdm(drawn, desc="drafts", unit="answer", leave=False):
        there_tk, any_tk, inside_tk = (y.double().cpu() for y in rl.draft_chances(model, x.ids, torch.tensor(x.learn[1:]), depths, greedy))
        n, needed = rl.expected_passes(there_tk.tolist(), x.learn[1:])
        tokens.append(n); passes.append(round(needed, 4))
        before_tk = F.pad(there_tk.cumprod(1)[:, :-1], (1, 0), value=1.0)
        reached_k, accepted_k = reached_k + (before_tk * inside_tk).sum(0), accepted_k + (before_tk * any_tk).sum(0)
    return Drafts(tokens, passes, [round(x, 4) for x in (accepted_k / reached_k.clamp(min=1e-9)).tolist()])


def boost(run: Run) -> dict:
    c, settings, student = run.config, run.rl_settings("boost"), run.last("mopd-2")
    boosted = rl.boost_mtp(student, settings, run.mopd, engine_of(c))
    models = {name: nemotron.load_checkpoint(x).to(c.device).eval() for name, x in dict(before=student, after=boosted).items()}
    asked, found = sft.round_robin(questions(c).values())[:c.drafts], {}
    for way, engine in (("greedy", InPieces.of(c)), ("sampled", engine_of(c))):      # both have one trunk, so either may write
        drawn = rl.answer(models["after"], asked, settings, sft.Tokenizer.load(student), engine)
        found |= {f"{name} {way}": count_drafts(model, drawn, c.depths, way == "greedy")._asdict() for name, model in models.items()}
    return dict(folder=boosted, scores={}, drafts=found)


def find_cut(length: Callable[[int], float], wanted: float, most: int) -> int:
    """The budget from 0 to `most` whose mean length is nearest to the wanted one; length(n) grows with n.

    lengths 5 8 11 14 (n 0 to 3), wanted 10 -> 2
    """
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if length(middle) < wanted: low = middle + 1
        else: high = middle
    return min((n for n in (low - 1, low) if n >= 0), key=lambda n: abs(length(n) - wanted))


def efforts(run: Run) -> dict:
    """Medium effort of the RLVR student and of the last one, and their regular traces cut: the budget is chosen on validation questions, so that
    answers are as long as at medium effort."""
    c, tried, chosen = run.config, ask(run.config, run.config.tried, "validation"), {}

    @cache
    def length(name: str, **way) -> float:
        return float(np.mean(np.concatenate(list(play(run.last(name), tried, c, **way).tokens.values()))))

    for name in ("rlvr", "mopd-2"):
        chosen[name] = find_cut(lambda n, name=name: length(name, cut=n), length(name, mode="medium"), c.max_tokens)
        for way, settings in (("medium", dict(mode="medium")), ("cut", dict(cut=chosen[name]))):
            score(run, f"{name}-{way}", run.last(name), **settings)
    return dict(folder=run.last("mopd-2"), scores={}, cut=chosen)


# %% 8 · Running

WORK: dict[str, Callable[[Run], dict]] = {
    "sft": fine_tune, "rlvr": reinforce, "more-sft": lambda run: spend(run, "more-sft", run.config.level),
    "teachers-1": lambda run: teach(run, 1), "warmup-1": lambda run: warm_up(run, 1), "mopd-1": lambda run: distil(run, "mopd-1", 1),
    "teachers-2": lambda run: teach(run, 2), "warmup-2": lambda run: warm_up(run, 2), "mopd-2": lambda run: distil(run, "mopd-2", 2),
    "no-warmup": lambda run: distil(run, "no-warmup", 1, warm=False), "full-kl": distil_full_kl, "rollouts-4": distil_four, "grpo": go_on,
    "boost": boost, "effort": efforts, "sft-worked": lambda run: spend(run, "sft-worked", run.config.level + 1)}


@cache
def _asked(families: tuple[str, ...], level: int, n: int) -> dict[str, list]: return ask(Config(families=families, level=level), n, "held_out")


def questions(config: Config) -> dict[str, list]: return _asked(config.families, config.level, config.held_out)


def score(run: Run, name: str, folder: Path, domain: str | None = None, **way) -> None:
    """Scores of a checkpoint in scores/NAME.json, unless they are there."""
    path, asked, began = run.home / "scores" / f"{name}.json", questions(run.config), time.perf_counter()
    if path.exists(): return
    found = play(folder, {domain: asked[domain]} if domain else asked, run.config, **way)
    write_json(path, dict(right={d: as_hex(x) for d, x in found.right.items()}, tokens={d: x.tolist() for d, x in found.tokens.items()},
                          seconds=round(time.perf_counter() - began, 1)))
    shares = ", ".join(f"{d} {x.mean():.1%}" for d, x in found.right.items())
    print(f"seed {run.seed}, {name}: {shares}   {time.perf_counter() - began:.0f} s", flush=True)


def do(run: Run, phase: str) -> None:
    """One phase, to its mark. The seconds of earlier tries that were stopped count as well."""
    if lacking := [name for name in NEEDS[phase] if run.mark(name) is None]:
        raise ValueError(f"seed {run.seed}: {phase} needs {lacking[0]}, which is not done: add it to --phases.")
    spent, began = run.home / phase / "spent.json", time.perf_counter()
    before = json.loads(spent.read_text()) if spent.exists() else 0.0
    print(f"\n== seed {run.seed}: {phase}", flush=True)
    try: found = WORK[phase](run)
    finally: write_json(spent, before + time.perf_counter() - began)
    pairs = {name: x if isinstance(x, tuple) else (x, None) for name, x in found["scores"].items()}
    found |= dict(folder=run.relative(found["folder"]), scores={name: (run.relative(x), domain) for name, (x, domain) in pairs.items()})
    write_json(run.home / phase / "done.json", dict(found, seconds=round(json.loads(spent.read_text()), 1)))
    print(f"== seed {run.seed}: {phase} took {run.mark(phase)['seconds']:.0f} s", flush=True)
    for old in (run.home / phase).glob("*/step-*"):      # of what is done only the last checkpoint is read again
        if old != pretrain.checkpoints(old.parent)[-1]: shutil.rmtree(old)


@contextlib.contextmanager
def stopped_at(moment: float) -> Iterator[Callable[[], bool]]:
    """Inside, this process gets a SIGTERM at that moment (of time.monotonic). A trainer finishes its step and saves, anything else stops at once;
    KeyboardInterrupt follows in both cases. Gives a function: has it come to that?"""
    def stop(*_): raise KeyboardInterrupt

    wait, before = max(moment - time.monotonic(), 0.0), signal.signal(signal.SIGTERM, stop)
    timer = threading.Timer(min(wait, threading.TIMEOUT_MAX), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try: yield lambda: time.monotonic() >= moment
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


def run_seed(config: Config, seed: int, base: Path, deadline: float) -> list[str]:
    """The chosen phases of a seed that are not done, in order, while there is time; returns those that are left."""
    run = Run(config, seed, base)
    check_settings(run)
    with stopped_at(deadline + 60 * config.grace) as late:
        try:
            for phase in config.chosen:
                if run.mark(phase) is None:
                    if time.monotonic() >= deadline: break
                    do(run, phase)
                    gc.collect()
                    if config.device == "cuda": torch.cuda.empty_cache()
                for name, (folder, domain) in run.mark(phase)["scores"].items():
                    score(run, name, run.path(folder), domain)
                    if name in SAMPLED: score(run, f"{name}-sampled", run.path(folder), domain, sampled=True)
        except KeyboardInterrupt:
            if not late(): raise
        finally: pack_seed(run)
    return [phase for phase in config.chosen if run.mark(phase) is None]


def check_settings(run: Run) -> None:
    """ValueError when the seed's folder was begun with other settings."""
    path, now = run.home / "settings.json", run.config.settings
    if not path.exists(): write_json(path, now)
    was = json.loads(path.read_text())
    if differs := [name for name in now if now[name] != was.get(name)]:
        raise ValueError(f"{run.home} was begun with {differs[0]} = {was.get(differs[0])}, not {now[differs[0]]}: give the same, or another --home.")


def pack_seed(run: Run) -> None:
    """All that the report reads, in one file: HOME/seed-N.json."""
    asked = questions(run.config)
    marks = {phase: mark for phase in NEEDS if (mark := run.mark(phase)) is not None}
    scores = {path.stem: json.loads(path.read_text()) for path in sorted((run.home / "scores").glob("*.json"))}
    write_json(run.config.home / f"seed-{run.seed}.json",
               dict(seed=run.seed, settings=run.config.settings, questions={d: len(some) for d, some in asked.items()}, digest=digest(asked),
                    base=json.loads((run.config.home / "base" / "done.json").read_text()), phases=marks, scores=scores,
                    device=torch.cuda.get_device_name() if run.config.device == "cuda" else "cpu"))


def as_flags(config: Config, **changes) -> list[str]:
    """The command line that makes this config, where it differs from the defaults."""
    out, config = [], replace(config, **changes)
    for f in fields(config):
        value, flag = getattr(config, f.name), "--" + f.name.replace("_", "-")
        if value == f.default: continue
        out += [flag] if value is True else [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]
    return out


def side_by_side(commands: dict[str, list[str]], home: Path, gpus: int = 0) -> list[str]:
    """Runs all commands at once, dealt out to the GPUs where there are several; their lines go to HOME/NAME.log and, with the name before them, to
    the screen. Returns the names that failed."""
    def follow(name: str, process: subprocess.Popen) -> None:
        with (home / f"{name}.log").open("a") as log:
            for line in process.stdout:
                line = line.decode(errors="replace").rstrip("\n").split("\r")[-1]      # of a progress bar only where it stood last
                print(f"{name} | {line}", file=log, flush=True)
                print(f"{name} | {line}", flush=True)

    place = lambda i: dict(os.environ, CUDA_VISIBLE_DEVICES=str(i % gpus)) if gpus > 1 else None
    running = {name: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=place(i))
               for i, (name, command) in enumerate(commands.items())}
    threads = [threading.Thread(target=follow, args=pair) for pair in running.items()]
    try:
        with stopped_at(math.inf):      # who ends this process ends its seeds; they finish their steps
            for thread in threads: thread.start()
            for thread in threads: thread.join()
    finally:
        for process in running.values():
            if process.poll() is None: process.terminate()
    failed = [name for name, process in running.items() if process.wait()]
    for name in failed: print(f"{name} failed with exit code {running[name].returncode}: see {home / f'{name}.log'}; the others went on.")
    return failed


def run_seeds(asked: Config, began: float) -> None:
    config, deadline = sized(asked), began + 60 * asked.minutes
    # NOTE: caches that grow by a token a step leave holes of every size: five processes filled 140 GB. Segments that grow have none
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if config.device == "cuda" and not torch.cuda.is_available(): raise ValueError("--device cuda: this torch sees no GPU; leave it out.")
    if not config.full: print("the machinery at a small size: what comes out is no result. --full measures.\n")
    print("held-out questions: " + ", ".join(f"{domain} {len(some):,}{'' if len(some) == config.held_out else ' (there are no more)'}"
                                            for domain, some in questions(config).items()), flush=True)
    base = train_base(config)
    if config.device == "cuda" and len(config.seeds) > 1:
        left = max((deadline - time.monotonic()) / 60, 0.0)
        commands = {f"seed-{seed}": [sys.executable, str(Path(__file__).resolve()), *as_flags(asked, seeds=(seed,), minutes=round(left, 2))]
                    for seed in config.seeds}
        failed = side_by_side(commands, config.home, torch.cuda.device_count())
        if failed: raise ValueError(f"{', '.join(failed)} failed: the same command goes on with it.")
    else:
        for seed in config.seeds:
            left = run_seed(config, seed, base, deadline)
            rest = f"the minutes are over; left: {', '.join(left)}. The same command goes on." if left else "all phases asked for are done."
            print(f"\nseed {seed}: {rest}")
    print(f"\nfiles: {config.home}/seed-*.json   --report shows what they say   {time.monotonic() - began:.0f} s")


# %% 9 · Differences and verdicts

DRAWS = 4000      # of the questions, with replacement


@cache
def picks(n: int) -> np.ndarray: return np.random.default_rng(0).integers(n, size=(DRAWS, n), dtype=np.int32)


def interval(value: Callable[[np.ndarray], np.ndarray], n: int) -> tuple[float, float, float]:
    """(value of all n questions, 95 % interval of it over draws of them). value: [draws, n] chosen questions -> [draws]."""
    whole, pieces = float(value(np.arange(n)[None])[0]), np.array_split(picks(n), max(DRAWS * n // 2_000_000, 1))
    return whole, *np.quantile(np.concatenate([value(pick) for pick in pieces]), [0.025, 0.975]).tolist()


def paired(first: list[np.ndarray], second: list[np.ndarray]) -> tuple[float, float, float]:
    """Mean difference of two checkpoints, an array a seed, and its interval: each question's difference is averaged over the seeds, then drawn."""
    difference_n = np.mean([np.asarray(a, float) - np.asarray(b, float) for a, b in zip(first, second, strict=True)], axis=0)
    return interval(lambda pick: difference_n[pick].mean(1), len(difference_n))


def ratio(above: list[np.ndarray], below: list[np.ndarray], pick: np.ndarray) -> np.ndarray:
    """Sum / sum over the chosen questions, [seeds, draws]."""
    return np.array([np.asarray(a, float)[pick].sum(1) / np.maximum(np.asarray(b, float)[pick].sum(1), 1e-9) for a, b in zip(above, below)])


def verdict(low: float | None, high: float | None, aim: float | None, side: str = "above") -> str:
    """What an interval says of an aim; on it means neither beyond it nor below.

    interval 2 to 5:   above 1 holds   above 6 does not hold   above 3 too small to tell   below 6 holds
    """
    if aim is None: return "no aim"
    if low is None: return "no interval"
    if side == "below": low, high, aim = -high, -low, -aim
    return "holds" if low > aim else "does not hold" if high <= aim else "too small to tell"


class Results(NamedTuple):
    """Seed files, by seed."""
    seeds: dict[int, dict]

    @property
    def domains(self) -> list[str]: return list(next(iter(self.seeds.values()))["questions"])

    def values(self, name: str, domain: str, what: str = "right") -> dict[int, np.ndarray]:
        """seed -> bits, or tokens, of a checkpoint's answers in a domain, or in "all" of them one behind the other."""
        out, domains = {}, self.domains if domain == "all" else [domain]
        for seed, found in self.seeds.items():
            mine, asked = found["scores"].get(name, {}).get(what, {}), found["questions"]
            if not all(d in mine for d in domains): continue
            out[seed] = np.concatenate([from_hex(mine[d], asked[d]) if what == "right" else np.array(mine[d]) for d in domains])
        return out

    def shared(self, names: tuple[str, ...], domain: str, what: str = "right") -> tuple:
        """(seeds that have the answers of all these checkpoints, then for each checkpoint a list of them, an array a seed)"""
        found = [self.values(name, domain, what) for name in names]
        seeds = sorted(set.intersection(*map(set, found)))
        return seeds, *([of[seed] for seed in seeds] for of in found)


def collect(config: Config) -> Results:
    """All seed files in config.home and config.files. ValueError when there is none, or when they do not belong together."""
    paths = [path.resolve() for place in (config.home, *config.files) for path in ([place] if place.is_file() else sorted(place.glob("seed-*.json")))]
    seeds: dict[int, dict] = {}
    for path in dict.fromkeys(paths):
        found = json.loads(path.read_text())
        first = next(iter(seeds.values()), found)
        if found["seed"] in seeds: raise ValueError(f"{path} is a second file of seed {found['seed']}: take one away.")
        if differs := [key for key in ("settings", "digest", "questions") if found[key] != first[key]]:
            raise ValueError(f"{path} has other {differs[0]} than seed {first['seed']}: seeds are averaged only when all but the seed is the same.")
        seeds[found["seed"]] = found
    if not seeds: raise ValueError(f"no seed-*.json in {config.home} or --files: run some phases first.")
    return Results(dict(sorted(seeds.items())))


# name, checkpoint, checkpoint it is held against, the aim in points
DIFFERENCES: list[tuple[str, str, str, float | None, str]] = [
    ("SFT: gain in its last third", "sft", "sft-two-thirds", 1.0, "below"),
    ("RLVR - SFT", "rlvr", "sft", 8.0, "above"),
    ("RLVR - more SFT of equal time", "rlvr", "more-sft", 8.0, "above"),
    ("RLVR - SFT on RLVR's levels, equal time (expert's traces)", "rlvr", "sft-worked", None, "above"),
    ("RLVR - SFT, sampled", "rlvr-sampled", "sft-sampled", 8.0, "above"),
    ("RLVR - more SFT of equal time, sampled", "rlvr-sampled", "more-sft-sampled", 8.0, "above"),
    ("MOPD round 2 - RLVR, sampled", "mopd-2-sampled", "rlvr-sampled", -3.0, "above"),
    ("MOPD round 1 - RLVR", "mopd-1", "rlvr", None, "above"),
    ("MOPD round 2 - RLVR", "mopd-2", "rlvr", -3.0, "above"),
    ("MOPD with warmup - without", "mopd-1", "no-warmup", 0.0, "above"),
    ("full-vocabulary KL - MOPD", "full-kl", "mopd-1", None, "above"),
    ("4 rollouts a prompt - MOPD", "rollouts-4", "mopd-1", None, "above"),
    ("GRPO of equal tokens - MOPD", "grpo", "mopd-1", None, "above"),
    *((f"{label}: {text}", f"{name}-{a}", f"{name}{b}", None, "above") for name, label in (("rlvr", "RLVR"), ("mopd-2", "MOPD round 2"))
      for text, a, b in (("medium - regular", "medium", ""), ("cut - regular", "cut", ""), ("medium - cut", "medium", "-cut")))]
LEAD, RECOVERED, SHORTER = 10.0, 0.6, 0.6      # a teacher's lead in points that counts; aims for recovery, and for medium effort's tokens


def row_of(kind: str, name: str, domain: str, seeds: list[int], n: int, value: tuple, by_seed: list[float], aim: float | None, side: str) -> dict:
    mean, low, high = value
    return dict(kind=kind, name=name, domain=domain, n=n, seeds=seeds, mean=mean, low=low, high=high, by_seed=by_seed, aim=aim, side=side,
                verdict=verdict(low, high, aim, side))


def difference_rows(results: Results, name: str, first: str, second: str, domain: str, aim: float | None, side: str) -> list[dict]:
    """One row, in points; none where no seed has both checkpoints."""
    seeds, a, b = results.shared((first, second), domain)
    by_seed = [100 * float(np.mean(x.astype(float) - y)) for x, y in zip(a, b)]
    return [row_of("difference", name, domain, seeds, len(a[0]), tuple(100 * x for x in paired(a, b)), by_seed, aim, side)] if seeds else []


def compare(results: Results) -> list[dict]:
    """All differences between checkpoints: every domain, and all questions together."""
    return [row for name, first, second, aim, side in DIFFERENCES for domain in (*results.domains, "all")
            for row in difference_rows(results, name, first, second, domain, aim, side)]


def compare_teachers(results: Results) -> list[dict]:
    """Every teacher's lead over RLVR, and what of it the last student has recovered where it leads by LEAD points and surely leads at all."""
    lead = lambda turn, domain: difference_rows(results, f"teacher of round {turn} - RLVR", f"teacher-{domain}-{turn}", "rlvr", domain, LEAD, "above")
    first, second = ([row for domain in results.domains for row in lead(turn, domain)] for turn in (1, 2))
    leading, rows = [row["domain"] for row in second if row["mean"] >= LEAD and row["low"] > 0], first + second
    three = {d: found for d in leading if (found := results.shared(("mopd-2", "rlvr", f"teacher-{d}-2"), d))[0]}   # seeds, student, RLVR, teacher
    groups = [(domain, [domain]) for domain in three] + ([("all that lead", list(three))] if len(three) > 1 else [])
    for label, domains in groups:
        seeds = sorted(set.intersection(*(set(three[d][0]) for d in domains)))
        if not seeds: continue
        by_seed = [[np.concatenate([three[d][k][three[d][0].index(seed)] for d in domains]) for k in (1, 2, 3)] for seed in seeds]
        student, before, teacher = (np.mean(arrays, axis=0) for arrays in zip(*by_seed))
        rate = lambda s, b, t: rl.recovery_rate(s.mean(), b.mean(), t.mean()) if t.mean() != b.mean() else None
        value = (rate(student, before, teacher), *(rl.recovery_interval(student, before, teacher) or (None, None)))
        rows.append(row_of("recovery", "recovery of MOPD round 2", label, seeds, len(before), value, [rate(*x) for x in by_seed], RECOVERED, "above"))
    return rows


def drawn_row(kind: str, name: str, seeds: list[int], n: int, of: Callable[[np.ndarray], np.ndarray], aim: float | None, side: str = "above") -> dict:
    """A row of what `of` makes of chosen questions, [draws, n] -> [seeds, draws]: its mean over the seeds, which is drawn, and each seed's value."""
    return row_of(kind, name, "all", seeds, n, interval(lambda pick: of(pick).mean(0), n), of(np.arange(n)[None])[:, 0].tolist(), aim, side)


def compare_drafts(results: Results) -> list[dict]:
    """Tokens that a pass of the trunk yields, before and after boosting, which has no aim; and the difference."""
    rows, found = [], {seed: x["phases"]["boost"]["drafts"] for seed, x in results.seeds.items() if "boost" in x["phases"]}
    for way in ("greedy", "sampled") if found else ():
        part = lambda name, key, way=way: [x[f"{name} {way}"][key] for x in found.values()]
        before, after = (partial(ratio, part(name, "tokens"), part(name, "passes")) for name in ("before", "after"))
        gain = lambda pick, before=before, after=after: after(pick) - before(pick)
        rows += [drawn_row("drafts", f"tokens a pass{what}, {way}", list(found), len(part("before", "tokens")[0]), of, aim)
                 for what, of, aim in ((" before boosting", before, None), (" after boosting", after, None), (", after - before", gain, 0.0))]
    return rows


def compare_lengths(results: Results) -> list[dict]:
    """Tokens of answers at medium effort, and of cut ones, divided by regular effort's."""
    rows = []
    for (name, label), (way, aim) in itertools.product((("rlvr", "RLVR"), ("mopd-2", "MOPD round 2")), (("medium", SHORTER), ("cut", None))):
        seeds, a, b = results.shared((f"{name}-{way}", name), "all", "tokens")
        if seeds: rows.append(drawn_row("length", f"{label}: tokens, {way} / regular", seeds, len(a[0]), partial(ratio, a, b), aim, "below"))
    return rows


# %% 10 · Table, figure, command

def shown(row: dict, x: float | None) -> str:
    if x is None: return "-"
    return {"difference": f"{x:+.1f}", "recovery": f"{x:.0%}"}.get(row["kind"], f"{x:.3f}")


def print_rows(rows: list[dict]) -> None:
    goal = lambda row: "" if row["aim"] is None else f"{row['side']} {shown(row, row['aim'])}"
    table = [[f"{row['name']}, {row['domain']}", row["n"], shown(row, row["mean"]), f"{shown(row, row['low'])} to {shown(row, row['high'])}",
              " ".join(shown(row, x) for x in row["by_seed"]), goal(row), row["verdict"]] for row in rows]
    nvfp4.print_table("differences in points on held-out questions (95 %: bootstrap over questions, seeds fixed; the seeds stand beside)",
                      ["what and where", "questions", "mean", "95 %", "by seed", "aim", "says"], table)


def accuracies(results: Results) -> dict[str, dict[str, float]]:
    """checkpoint -> domain -> share of questions answered exactly, the mean over the seeds that have it."""
    names = dict.fromkeys(name for x in results.seeds.values() for name in x["scores"])
    order = {name: i for i, name in enumerate(["sft-two-thirds", *NEEDS])}
    return {name: {d: float(np.mean([x.mean() for x in some.values()])) for d in (*results.domains, "all") if (some := results.values(name, d))}
            for name in sorted(names, key=lambda name: (order.get(name, len(order)), name))}


BARS = {"sft": ("SFT", "#9aa5b1"), "rlvr": ("RLVR", "#2c6fa6"), "teacher": ("teacher of round 2", "#c9a227"), "mopd-1": ("MOPD round 1", "#e59866"),
        "mopd-2": ("MOPD round 2", "#c0392b")}


def plot(results: Results, rows: list[dict], path: Path) -> None:
    """Left: accuracy by stage and domain, the mean of the seeds with each seed as a dot. Right: differences over all questions, with aims."""
    there = {bar: {d: some for d in results.domains if (some := results.values(f"teacher-{d}-2" if bar == "teacher" else bar, d))} for bar in BARS}
    there = {bar: by for bar, by in there.items() if by}
    forest = [row for row in rows if row["kind"] == "difference" and row["domain"] == "all"][::-1]
    fig, (left, right) = nvfp4.new_figure(columns=2, width=7.6, height=5.0)
    width = 0.84 / max(len(there), 1)
    for i, (bar, by) in enumerate(there.items()):
        label, colour = BARS[bar]
        at = {d: results.domains.index(d) + (i - (len(there) - 1) / 2) * width for d in by}
        left.bar(list(at.values()), [100 * np.mean([x.mean() for x in by[d].values()]) for d in by], 0.92 * width, color=colour, label=label)
        left.plot(*zip(*((at[d], 100 * x.mean()) for d in by for x in by[d].values())), "o", color="0.15", markersize=2.5)
    left.set_xticks(range(len(results.domains)), results.domains, rotation=20)
    top = max([1.0, *(100 * x.mean() for by in there.values() for some in by.values() for x in some.values())])
    left.set(ylim=(0, 1.25 * top), ylabel="held-out questions answered exactly (%)", title="Exact answers by stage and domain (dots: seeds)")
    left.legend(frameon=False, fontsize=9, ncols=3, loc="upper center")
    colours = {"holds": "#3d8b4f", "does not hold": "#c0392b", "too small to tell": "#d68910", "no aim": "#1f4e8c"}
    for y, row in enumerate(forest):
        right.plot([row["low"], row["high"]], [y, y], color=colours[row["verdict"]], linewidth=1.8)
        right.plot(row["mean"], y, "o", color=colours[row["verdict"]], markersize=6)
        right.plot(row["by_seed"], [y] * len(row["by_seed"]), "|", color="0.35", markersize=9)
        if row["aim"] is not None: right.plot(row["aim"], y, ">" if row["side"] == "above" else "<", color="0.15", markersize=5, fillstyle="none")
    for text, colour in colours.items(): right.plot([], [], color=colour, linewidth=2, label=text)
    right.axvline(0, color="0.3", linewidth=1)
    right.set_yticks(range(len(forest)), [row["name"] for row in forest], fontsize=8)
    right.set(ylim=(-0.7, max(len(forest), 1) + 1.3), xlabel="difference over all questions (points)",
              title="95 % over questions; |: seeds, triangle: aim")
    right.legend(framealpha=1.0, edgecolor="none", fontsize=8, ncols=4, loc="upper center", columnspacing=1.0, handlelength=1.2)
    nvfp4.save_figure(fig, path)


def report(config: Config) -> list[dict]:
    """Table, figure and rows of all seed files found."""
    results = collect(config)
    first, full = next(iter(results.seeds.values())), all(x["settings"]["full"] for x in results.seeds.values())
    print(f"seeds {', '.join(map(str, results.seeds))}" + ("" if full else "; the machinery at a small size: no result"))
    scores = accuracies(results)
    nvfp4.print_table("held-out questions answered exactly, mean over the seeds", ["checkpoint", *results.domains, "all"],
                      [[name, *(f"{by[d]:.1%}" if d in by else "-" for d in (*results.domains, "all"))] for name, by in scores.items()])
    rows = [*compare(results), *compare_teachers(results), *compare_drafts(results), *compare_lengths(results)]
    print_rows(rows)
    leading = [row for row in rows if row["kind"] == "recovery" and row["domain"] in results.domains]
    if any(name.startswith("teacher-") and name.endswith("-2") for name in scores):
        print(f"\nteachers of round 2 that lead RLVR by {LEAD:.0f} points or more, surely above 0: {len(leading)}"
              + ("" if len(leading) >= 3 else ". The teachers failed: recovery asks for three such domains."))
    for seed, x in results.seeds.items():
        for key, drafts in (x["phases"].get("boost") or {}).get("drafts", {}).items():
            print(f"seed {seed}, drafts accepted by place, {key}: " + " ".join(f"{y:.0%}" for y in drafts["by_draft"]))
    tidy = lambda x: [tidy(y) for y in x] if isinstance(x, (list, tuple)) else round(float(x), 4) if isinstance(x, float) else x
    for row in rows: nvfp4.write_row(config.out, "posttrain", what="comparison", full=full, **{key: tidy(x) for key, x in row.items()})
    nvfp4.write_row(config.out, "posttrain", what="accuracy", full=full, seeds=list(results.seeds), questions=first["questions"],
                    accuracy={name: {d: tidy(x) for d, x in by.items()} for name, by in scores.items()})
    kept = ("seconds", "tokens", "steps", "used", "cut", "wanted")
    nvfp4.write_row(config.out, "posttrain", what="settings", full=full, settings=first["settings"], ran_on=first["device"], base=first["base"],
                    phases={seed: {phase: {key: mark[key] for key in kept if key in mark} for phase, mark in x["phases"].items()}
                            for seed, x in results.seeds.items()})
    plot(results, rows, config.figure)
    print(f"\nfigure: {config.figure}")
    return rows


def main(config: Config) -> None:
    report(config) if config.report else run_seeds(config, time.monotonic())


if __name__ == "__main__":
    nvfp4.run_command(main, Config, __doc__)
