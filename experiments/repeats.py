"""Claims of which a stage shows one run, or none: the same parts of the stages, with several seeds and rows of their own.

    balance    stage 03's small layer with and without the selection bias: load of the busiest expert over the mean load
    latent     a small hybrid on text, its experts in full width and in latents of a half, a quarter and an eighth of it. Experts and chosen experts
               are multiplied by what the width is divided by, so that routed parameters and work stay the same  [LatentMoE]; a control has the
               quarter without more experts
    turns      single turns of worked tool conversations: share whose local rollouts all earn the same  [PivotRL]
    boosting   stage 07's boosting of the prediction head: tokens a pass of the trunk before and after, with rollouts and packs of each seed
    effort     stage 06 with each seed: held-out questions right, and tokens an answer, at regular and at medium effort

Run:     python experiments/repeats.py --what balance           # 20 s, CPU; row to out/results.jsonl (--out experiments: committed)
         python experiments/repeats.py --what latent            # 4 min, CPU
         python experiments/repeats.py --what turns             # 2 min, CPU, after `make run` (its checkpoint in out/sft)
         python experiments/repeats.py --what boosting          # 4 min, CPU, after `make run` (its checkpoint in out/mopd)
         python experiments/repeats.py --what effort            # 17 min, CPU, after `make run` (its checkpoint in out/pretrain)
Sources: [Ultra] Nemotron 3 Ultra report, arXiv 2606.15007 · [LatentMoE] arXiv 2601.18089 · [PivotRL] arXiv 2603.21383
"""
from __future__ import annotations

import importlib
import json
import math
import random
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parent.parent
BALANCES = {"loss only": 0.0, "loss and bias": 1e-3}      # rate of the bias  [Ultra: 1e-3]
# ours: all sizes. name: (experts, chosen, latent); width 128, expert width 64
LATENTS: dict[str, tuple[int, int, int | None]] = {
    "full width": (8, 2, None), "half": (16, 4, 64), "quarter": (32, 8, 32), "eighth": (64, 16, 16), "quarter, experts not multiplied": (8, 2, 32)}


def stage(name: str):
    """A numbered stage, importable from this folder."""
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


@dataclass(frozen=True)
class Config:
    """Repeats one measurement of the stages with several seeds."""
    what: Literal["balance", "latent", "turns", "boosting", "effort"] = "balance"
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 0                  # of training; 0 = 1,000 of balance, 80 of latent, stage 07's own of boosting
    conversations: int = 24         # of turns: worked conversations that are cut into turns
    threads: int = 1                # torch threads
    home: Path = ROOT / "out"       # text, and the checkpoints that are read
    out: Path = ROOT / "out"        # results.jsonl in this folder gets the row

    def __post_init__(self):
        if not self.seeds: raise ValueError("no seed is given: --seeds takes one or more.")
        if self.steps < 0 or self.conversations < 1: raise ValueError("steps must not be negative, and there must be at least one conversation.")


def measure_balance(config: Config) -> dict:
    """{"loss only" | "loss and bias": busiest expert's load over the mean of the last 50 steps, by seed}."""
    moe, steps = stage("03_latentmoe"), config.steps or 1000
    return dict(steps=steps, max_violation={name: [round(moe.max_violation(moe.measure_balance(rate, 1e-4, steps, seed)[1]).item(), 4)
                                                   for seed in config.seeds] for name, rate in BALANCES.items()})


def latent_loss(sizes: tuple[int, int, int | None], seed: int, steps: int, data, home: Path) -> float:
    """Held-out bits per byte of a small hybrid with these experts, after `steps` steps on the same text for every size."""
    nemotron, pretrain = stage("04_model"), stage("05_pretrain")
    experts, k, latent = sizes
    shape = replace(nemotron.preset("tiny"), pattern="ME*E", experts=experts, experts_per_token=k, latent=latent, expert_width=64)
    settings = pretrain.PretrainConfig(out=home, steps=steps, batch=4, seq=128, seed=seed, save_every=steps + 1, health_every=0, branches=())
    torch.manual_seed(seed)
    text = pretrain.Batches(data.train, pretrain.Blend.of(data.train, settings.blend_switch), settings.batch, settings.seq, steps, seed)
    trainer = pretrain.Trainer(settings, nemotron.Nemotron(shape), text, home, tokenizer=data.tokenizer, data_hash=pretrain.hash_of(data))
    if not trainer.fit(steps, log_every=10**9, label=f"{experts} experts, seed {seed}"): raise KeyboardInterrupt
    model = trainer.model.eval()
    nats, size = map(sum, zip(*(pretrain.score_text(model, shard, data.tokenizer, settings.seq, 8) for shard in data.held_out.values())))
    shutil.rmtree(home, ignore_errors=True)
    return round(nats / math.log(2) / size, 5)


def measure_latent(config: Config) -> dict:
    """{name of the size: bits per byte by seed}, and the sizes."""
    pretrain, steps = stage("05_pretrain"), config.steps or 80
    data = pretrain.prepare_data((), config.home / "data", stage("04_model").preset("tiny").vocab)
    losses = {name: [latent_loss(sizes, seed, steps, data, config.home / "repeats") for seed in config.seeds] for name, sizes in LATENTS.items()}
    return dict(steps=steps, sizes=LATENTS, bits_per_byte=losses)


def measure_turns(config: Config) -> dict:
    """{turns, same: those whose 8 local rollouts all earn the same reward, by seed}. The turns of each seed are cut from its own questions."""
    rl, found = stage("07_rlvr_mopd"), []
    for seed in config.seeds:
        settings = rl.RLConfig(out=config.home, seed=seed)
        base, (_, rollouts) = rl.find_base(settings), settings.mopd.pivot
        own, rng, turns = replace(settings, domains=("tools",)), random.Random(seed), []
        for task in rl.questions_of("tools", config.conversations, own, seed):
            worked = rl.tasks.ENVIRONMENTS[task.family].worked(task, "regular", rng)
            turns += rl.cut_turns(task, [*rl.sft.opening(task), *rl.sft.thought_of(worked)], "regular")
        draw = rl.PivotDraw(rl.sampled, rl.Tokenizer.load(base), [turns], rollouts, own.sampling, seed)
        rewards_hk = torch.tensor([x.reward for x in draw(rl.nemotron.load_checkpoint(base), 0, 0)]).view(-1, rollouts)
        found.append((len(turns), int((rewards_hk.var(1, unbiased=False) == 0).sum())))
    return dict(base=base.name, rollouts=rollouts, turns=[n for n, _ in found], same=[n for _, n in found])


def measure_boosting(config: Config) -> dict:
    """{"before greedy" | "after sampled" | ..: tokens a pass by seed, and shares of drafts kept by place} of the newest student of distillation."""
    rl, tokens, kept = stage("07_rlvr_mopd"), {}, {}
    student = rl.pretrain.newest_checkpoint(config.home / "mopd")
    for seed in config.seeds:
        settings = rl.RLConfig(out=config.home / "repeats", seed=seed, fresh=True)
        m = replace(settings.mopd, boost=(config.steps, *settings.mopd.boost[1:])) if config.steps else settings.mopd
        boosted = rl.boost_mtp(student, settings, m)
        for key, found in rl.measure_drafts(dict(before=student, after=boosted), settings, m).items():
            tokens.setdefault(" ".join(key), []).append(round(found.length, 4))
            kept.setdefault(" ".join(key), []).append([round(share, 4) for share in found.by_draft])
    shutil.rmtree(config.home / "repeats", ignore_errors=True)
    return dict(base=student.name, steps=m.boost[0], depths=m.depths, tokens_a_pass=tokens, kept=kept)


def measure_effort(config: Config) -> dict:
    """{mode: right answers by seed}, {mode: mean tokens by seed}, and questions a seed. Steps, when given, replace those of stage 06's first part."""
    sft, home, rows = stage("06_sft"), config.home / "repeats", []
    base = stage("05_pretrain").newest_checkpoint(config.home / "pretrain")
    for seed in config.seeds:
        shutil.rmtree(home, ignore_errors=True)
        settings = sft.SFTConfig(base=base, out=home, seed=seed)
        sft.main(replace(settings, steps=(config.steps, 1)) if config.steps else settings)
        rows.append(json.loads((home / "results.jsonl").read_text().splitlines()[-1])["all"])
    shutil.rmtree(home, ignore_errors=True)
    by_mode = lambda of: {mode: [of(row[mode]) for row in rows] for mode in ("regular", "medium")}
    return dict(base=base.name, questions=[row["regular"]["n"] for row in rows], right=by_mode(lambda x: round(x["accuracy"] * x["n"])),
                tokens=by_mode(lambda x: x["tokens"]))


MEASURES = dict(balance=measure_balance, latent=measure_latent, turns=measure_turns, boosting=measure_boosting, effort=measure_effort)


def main(config: Config) -> None:
    began = time.perf_counter()
    torch.set_num_threads(config.threads)
    found = MEASURES[config.what](config)
    by_seed = next((x for x in found.values() if isinstance(x, dict) and config.what != "latent"), found.get("bits_per_byte", found))
    for name, values in by_seed.items(): print(f"{name:34} {values}")
    seconds = round(time.perf_counter() - began, 1)
    stage("01_nvfp4").write_row(config.out, "repeats", what=config.what, seeds=list(config.seeds), **found, threads=config.threads, seconds=seconds)
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    stage("01_nvfp4").run_command(main, Config, __doc__)
