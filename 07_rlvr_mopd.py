"""07 · Reinforcement learning with verifiable rewards, teachers, on-policy distillation from several of them, and a boosted MTP head.

Left out:  judges and reward models, penalties for single turns, the MTP loss during RL (the head is boosted at the end), several workers.
Sources:   [Ultra] Nemotron 3 Ultra report, arXiv 2606.15007 · [Super], [Nano] the Nemotron 3 Super and Nano reports
           [RL] NVIDIA NeMo-RL, the code that trained it, with its released configuration · [DAPO] arXiv 2503.14476 · [GRPO] arXiv 2402.03300
           [IcePop] Ant Group, Every Step Evolves, arXiv 2510.18855 · [PivotRL] arXiv 2603.21383 · [MiMo] MiMo-V2-Flash, arXiv 2601.02780
           [Megatron] Megatron-LM, hidden-state mixing
Run:       python 07_rlvr_mopd.py                       # from the newest checkpoint in out/sft, minutes on 2 CPU cores: everything below
           python 07_rlvr_mopd.py --sync                # the same arithmetic in one process, never off-policy
           python 07_rlvr_mopd.py --resume              # goes on after Ctrl-C, or when the worker died
           python 07_rlvr_mopd.py --prompts 16 --answers 16 --weights icepop --mopd.rounds 2 --out out/mine --base out/sft/step-000520
Contents:  1 config   2 rollouts   3 rewards and advantages   4 policy loss   5 curriculum   6 learner   7 PivotRL   8 teachers
           9 multi-teacher on-policy distillation   10 MTP boosting   11 acceptance of drafts   12 tables and figure   13 command
Letters:   g groups (prompts)  n answers a prompt  r rollouts (g·n)  t tokens  v vocabulary  d model width  k prediction depth  b batch
           h turns of conversations (PivotRL)
"""
from __future__ import annotations

import importlib
import json
import math
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import curriculum, tasks
from data.batches import Batch
from data.curriculum import NothingToLearn, gaussian_curriculum, gaussian_quotas, largest_remainders, make_plan, make_pools  # noqa: F401
from data.tasks.turns import Pivot, cut_turns, pivot_turns, same_calls, verify_turn  # noqa: F401  (names of this stage)
from data.tokenizer import Tokenizer
from data.worker import SharedWeights, Worker  # noqa: F401

nvfp4, nemotron, pretrain, sft = (importlib.import_module(name) for name in ("01_nvfp4", "04_model", "05_pretrain", "06_sft"))

# %% 1 · Config  [Ultra, RLVR, MOPD and MTP boosting; RL, released configuration]
# Every setting once, Ultra's value beside ours. Which domain gets which teacher; each kind is a pipeline of its own (section 8).

Mode = sft.Mode
Weighting = Literal["tis", "icepop"]
Teacher = Literal["rlvr", "pivot", "sft"]
Mixing = Literal["off", "heads", "trunk"]
# ours: tool use learns turn by turn, as Ultra's agents do; where sampling hardly ever finds an answer, worked solutions come first
TEACHERS: dict[str, Teacher] = dict(arithmetic="rlvr", numbers="rlvr", strings="sft", logic="sft", tools="pivot", instructions="sft")
EDGES = (0.2, 0.5, 0.8, 0.95, 1.05, 1.25, 2.0, 5.0)      # ours: of the histogram of importance weights, the bounds of both modes among them


@dataclass(frozen=True)
class MOPDConfig:
    """Teachers, distillation from them, and the boosted MTP head."""
    teachers: tuple[str, ...] = ("numbers", "tools")      # domains that get a teacher, ours; Ultra: more than ten teachers
    rounds: int = 1                  # of teachers and distillation, each round's teachers branched from the last student, ours; Ultra 2
    teacher_steps: int = 16          # of RL a teacher, ours
    teacher_prompts: int = 4         # a step, ours; Ultra 128, 32 for software engineering  [RL]
    teacher_lr: float = 1e-4         # ours; Ultra 2.5e-6 to 3e-6  [RL]
    teacher_sft: int = 60            # steps of fine-tuning in the pipeline that begins with it, ours
    pivot: tuple[int, int] = (10, 8)      # worked conversations that are cut, ours; local rollouts of each turn  [PivotRL: at least 8]
    pivot_below: float = 0.9         # a turn worth training earns less in the mean, ours: the paper's bound is not known
    warmup: tuple[int, int] = (48, 12)    # questions that each teacher answers, and steps of SFT on what was right, ours; 0 steps = without
    sft_lr: float = 5e-4             # of the warmup and of teacher_sft, ours
    steps: int = 16                  # of distillation a round, ours; Nemotron-Cascade 2: 40 to 52
    prompts: int = 32                # a step, one rollout each, ours; Ultra 1,024
    lr: float = 2e-4                 # of distillation, ours; Ultra 2e-6
    clip: float = 0.2                # ours: the report prints no epsilon
    icepop: tuple[float, float] = (0.5, 2.0)      # ours: Nemotron-Cascade 2's bounds, the report prints none
    boost: tuple[int, int, int] = (100, 2, 512)   # steps of MTP boosting, packs a step, tokens a pack, ours; Ultra 12,000, 64, 8,192
    boost_lr: float = 1e-3           # ours: the report prints none
    boost_rollouts: int = 256        # of the finished student, ours
    depths: int = 7                  # of the head that learn, and drafts that are measured  [Ultra]
    temperature: float = 2.0         # of both distributions  [Ultra]
    mixing: Mixing = "trunk"         # states that a depth may be fed with: also the trunk's [Megatron], only the heads' [the report], no mixing
    held_out: int = 40               # held-out questions a domain, ours

    def __post_init__(self):
        least = dict(rounds=1, teacher_steps=1, teacher_prompts=1, teacher_sft=1, pivot=2, warmup=0, steps=1, prompts=1, boost=1, boost_rollouts=1,
                     depths=1, held_out=1)
        if low := [name for name, value in least.items() if np.min(getattr(self, name)) < value]:      # two rollouts: one is compared with another
            raise ValueError(f"{low[0]} = {getattr(self, low[0])} must be at least {least[low[0]]}.")
        if self.mixing not in get_args(Mixing): raise ValueError(f"unknown mixing {self.mixing!r}: choose one of {', '.join(get_args(Mixing))}.")
        if (unknown := [d for d in self.teachers if d not in TEACHERS]) or not self.teachers:
            raise ValueError(f"no teacher for {unknown[0] if unknown else 'any domain'}: choose some of {', '.join(TEACHERS)}.")


@dataclass(frozen=True)
class RLConfig:
    """RLVR of a checkpoint, teachers that branch from it, distillation from them, and a boosted MTP head."""
    base: Path | None = None         # directory with the released names and a tokenizer; nothing = the newest checkpoint in OUT/sft
    out: Path = Path("out")          # rows; metrics and checkpoints in OUT/NAME
    name: str = "rlvr"
    families: tuple[str, ...] = tasks.EASY    # questions by family; "all" = every one of data/tasks
    domains: tuple[str, ...] = ()    # only these; nothing = all. Ultra: RLVR in one stage over all, then teachers on one each
    level: int = 1                   # difficulty of the questions (0 the easiest), ours: one above those of stage 06; easier ones serve as well
    steps: int = 30                  # ours; Ultra about 180  [RL]
    prompts: int = 8                 # a step, ours; Ultra 512
    answers: int = 8                 # a prompt, ours; Ultra 16
    max_tokens: int = 96             # most tokens a turn may have, ours; Ultra 48K, then 64K for a whole conversation
    lr: float = 1e-4                 # constant, ours; Ultra 4e-6
    warmup_steps: int = 10           # from lr / 10  [RL: 4e-7 to 4e-6]
    rollout_engine: Literal["sampled", "speculative"] = "sampled"      # stage 04's generate, or stage 08's engine with drafts
    sync: bool = False               # draw and learn in turns, in one process
    age: int = 1                     # most optimizer steps between the weights that begin an answer and those that learn from it  [Ultra]
    in_flight: bool = True           # the worker takes new weights in the middle of an answer  [Ultra]
    weights: Weighting = "tis"       # what is done with importance weights  [RL: clamped; the report's text: masked]
    threshold: float = 2.0           # answers whose mean exp|logp - logp_gen| is above are not learnt  [RL]
    advantage_clip: float = 20.0     # [RL]
    clip: tuple[float, float] = (0.2, 0.28)       # how far rho may fall below 1, and rise above  [RL]
    medium: float = 0.025            # share of prompts asked at medium effort  [Ultra]
    effort: tuple[float, int] = (0.1, 32)         # their largest bonus, and tokens from which on length costs, ours: 32 of 96; Ultra 15,000 of 49,152
    overlong_filter: bool = False    # leave answers out that were cut at max_tokens  [Ultra: no; Nano: yes]
    profile: tuple[int, int] = (32, 4)            # questions a family and level whose pass rate is measured first, and answers to each, ours
    pool: int = 64                   # questions of each level that is used, ours: few of them, asked often, are learnt by heart
    rows: int = 256                  # answers drawn at once for that, about, ours; a GPU takes as long for 2,048
    band: tuple[float, float] = (0.1, 0.7)        # mean pass rate that a family's level must have to be used, ours
    curriculum: tuple[float, float, float] = (0.7, 0.3, 0.15)      # mean pass rate at the start, at the end, and width, ours: the report has words
    held_out: int = 4                # held-out questions a family and level, for the reward on them while training
    eval_every: int = 12             # steps between looks at the held-out reward; 0: never
    micro_batches: int = 4           # pieces a batch is learnt in, sorted by length; same loss, less padding and memory
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    seed: int = 0
    save_every: int = 12
    resume: bool = False             # go on from the newest whole checkpoint
    fresh: bool = False              # delete the checkpoints of an earlier run first
    mopd: MOPDConfig = MOPDConfig()  # what follows RLVR

    def __post_init__(self):
        least = dict(steps=1, prompts=1, answers=2, max_tokens=1, held_out=1, micro_batches=1, save_every=1, level=0, age=0, eval_every=0)
        if low := [name for name, value in least.items() if getattr(self, name) < value]:      # two answers: one is compared with the others
            raise ValueError(f"{low[0]} = {getattr(self, low[0])} must be at least {least[low[0]]}.")
        if self.prompts * self.answers % self.micro_batches:
            raise ValueError(f"{self.prompts * self.answers} answers cannot be cut into micro_batches = {self.micro_batches} equal pieces.")
        if not 0 <= self.medium <= 1: raise ValueError(f"medium = {self.medium} must be a share between 0 and 1.")
        if min(*self.profile, self.pool, self.effort[1]) < 1: raise ValueError(f"profile {self.profile}, pool and effort's bound must be positive.")
        if self.weights not in get_args(Weighting): raise ValueError(f"weights = {self.weights!r} is unknown: use 'tis' or 'icepop'.")
        if unknown := [d for d in self.domains if d not in tasks.DOMAINS]:
            raise ValueError(f"unknown domain {unknown[0]!r}: choose some of {', '.join(tasks.DOMAINS)}.")

    @property
    def home(self) -> Path: return Path(self.out) / self.name

    def questions(self, n: int, split: str) -> list[tasks.Task]:
        """At most n questions of every chosen family at each level up to self.level."""
        chosen = {domain: names for domain, names in sft.SFTConfig(families=self.families).by_domain.items() if domain in (self.domains or [domain])}
        levels = [(f, i) for names in chosen.values() for f in names for i in range(min(self.level, tasks.ENVIRONMENTS[f].levels - 1) + 1)]
        return [task for family, level in levels for task in tasks.draw(family, level, n, self.seed, split, at_most=True)]

    @property
    def sampling(self) -> nemotron.SamplingParams: return nemotron.SamplingParams(max_tokens=self.max_tokens, temperature=1.0, top_p=1.0)

    def training(self) -> pretrain.PretrainConfig:
        """The settings as 05's trainer reads them: warmup, then a constant rate; no balance loss, but a live selection bias  [RL]."""
        own = {name: getattr(self, name) for name in ("out", "steps", "lr", "device", "micro_batches", "seed", "save_every")}
        precision = "bf16" if self.device == "cuda" else "fp32"      # ours; the engine draws in fp32: importance weights repair the difference
        return pretrain.PretrainConfig(**own, precision=precision, batch=self.prompts * self.answers, warmup=min(self.warmup_steps / self.steps, 1.0),
                                       decay=0.0, beta1=0.9, beta2=0.999, weight_decay=0.0, clip=1.0, bias_rate=1e-3, aux_weight=0.0, mtp_weight=0.0,
                                       branches=(), branch_steps=self.steps, record=False, health_every=0)


# What may differ between a run and its continuation.
FREE = set("out name device save_every held_out eval_every rows resume fresh sync age in_flight mopd rollout_engine".split())


# %% 2 · Rollouts
# A rollout is one answer with all its turns: the model writes, tools answer, the model goes on, and the last turn is scored. The ids are kept as
# they were drawn, each with its log-probability, and later turns are appended to them.
# PITFALL: decoding a turn, parsing it and rendering the conversation anew (as 06's play does for scores) can cut the same text into other tokens.
# The log-probabilities would then belong to ids that the model has never drawn.

RolloutEngine = Callable[[nemotron.Nemotron, list[list[int]], nemotron.SamplingParams], list[nemotron.Completion]]


class Rollout(NamedTuple):
    task: tasks.Task
    mode: Mode
    ids: list[int]           # prompt, turns, tool responses: the whole conversation as the model read it
    learn: list[bool]        # of each id: written by the model
    logp: list[float]        # of each id under the weights that drew it; 0 where learn is False
    version: int             # optimizer steps of the weights its first token was drawn with
    score: float             # 1 or 0, exact
    reward: float            # score with effort shaping; what the advantage is made of
    finished: bool           # False: cut at max_tokens
    error: str | None        # what parse_completion found wrong with the last turn


def sampled(model: nemotron.Nemotron, prompts: list[list[int]], sampling: nemotron.SamplingParams) -> list[nemotron.Completion]:
    """The plain engine: 04's generate, with log-probabilities."""
    return nemotron.generate(model, prompts, sampling, return_logprobs=True)


def effort_reward(reward: float, length: int, medium: bool, weight: float = 0.1, bound: int = 15000) -> float:
    """A right answer to a prompt that asks for less effort earns up to `weight` more, the shorter the more; one longer than `bound` tokens pays,
    right or wrong.  L = min(1, weight (1 - length / bound));  r' = r + r max(L, 0) + min(L, 0)      [RL, released configuration: 0.1, 15,000]

    reward 1, length 0 -> 1.1     1, 7,500 -> 1.05     0, 7,500 -> 0     1, 30,000 -> 0.9     0, 30,000 -> -0.1
    """
    if not medium: return reward
    bonus = min(1.0, weight * (1 - length / bound))
    return reward + reward * max(bonus, 0.0) + min(bonus, 0.0)


def response_ids(calls: list[dict], response: dict, mode: Mode, tokenizer: Tokenizer) -> list[int]:
    """What the format writes between a turn's <|im_end|> and the model's next word: the tool's response and the next turn's head."""
    talk = [dict(role="user", content=""), dict(role="assistant", content="", tool_calls=calls), response]
    ids, learn = sft.render_chat(talk, mode, tokenizer=tokenizer, generation_prompt=True)
    return ids[len(learn) - learn[::-1].index(True):]


def rollouts(engine: RolloutEngine, model: nemotron.Nemotron, tokenizer: Tokenizer, questions: list[tasks.Task], modes: list[Mode],
             sampling: nemotron.SamplingParams, version: int = 0, effort: tuple[float, int] = (0.1, 15000),
             environments: dict | None = None) -> list[Rollout]:
    """One answer to each question, all in one batch, a turn at a time. effort: weight and bound of effort_reward.

    ValueError for another temperature or top_p than 1 (the log-probabilities would be another policy's), and for a score that is no number.
    """
    if (sampling.temperature, sampling.top_p) != (1.0, 1.0):
        raise ValueError(f"temperature {sampling.temperature}, top_p {sampling.top_p}: rollouts need 1 and 1, so that what is learnt is what drew.")
    environments, turn = tasks.ENVIRONMENTS if environments is None else environments, 0
    talks, live, out = [sft.opening(task) for task in questions], list(range(len(questions))), [None] * len(questions)
    read = [[(i, False, 0.0) for i in sft.render_chat(talk, mode, tokenizer=tokenizer, tools=task.tools, generation_prompt=True)[0]]
            for talk, mode, task in zip(talks, modes, questions, strict=True)]      # (id, learn, logp) of each conversation so far
    while live:
        drawn = replace(sampling, seed=nvfp4.draw_seed_for(sampling.seed, turn) % 2**40)      # a new turn, new dice
        going, turn = [], turn + 1
        for i, completion in zip(live, engine(model, [[x[0] for x in read[i]] for i in live], drawn), strict=True):
            task, mode, environment, new = questions[i], modes[i], environments[questions[i].family], completion.ids
            if len(completion.logprobs) != len(new):
                raise ValueError(f"the engine gave {len(completion.logprobs)} log-probabilities for {len(new)} tokens: it must return one for each.")
            read[i] += [(token, True, logp) for token, logp in zip(new, completion.logprobs)]
            text = tokenizer.decode(new[:-1] if new[-1] in sampling.stop_ids else new)
            parsed = tasks.parse_completion(text, thinking=mode != "off")
            talks[i].append(dict(role="assistant", content=parsed.content, reasoning=parsed.reasoning, tool_calls=parsed.tool_calls))
            response = environment.step(task, talks[i]) if completion.finished and not parsed.error and turn < environment.max_turns else None
            if response is not None:
                talks[i].append(response); going.append(i)
                read[i] += [(token, False, 0.0) for token in response_ids(parsed.tool_calls, response, mode, tokenizer)]
                continue
            score = environment.score(task, text, thinking=mode != "off") if completion.finished else 0.0      # no end: the answer may go on
            if not math.isfinite(score): raise ValueError(f"family {task.family} scored an answer {score}; the prompt is {task.prompt!r}.")
            reward = effort_reward(score, len(new), mode == "medium", *effort)
            out[i] = Rollout(task, mode, *map(list, zip(*read[i])), version, score, reward, completion.finished, parsed.error)
        live = going
    return out


@dataclass
class Draw:
    """step -> the rollouts that it learns from: `answers` to each question of plan[step], the same for the same weights. It travels to the worker."""
    engine: RolloutEngine
    tokenizer: Tokenizer
    plan: list[list[tuple[tasks.Task, Mode]]]
    answers: int
    sampling: nemotron.SamplingParams
    seed: int = 0
    effort: tuple[float, int] = (0.1, 15000)
    environments: dict | None = None      # nothing = those of data.tasks

    def __call__(self, model: nemotron.Nemotron, step: int, version: int) -> list[Rollout]:
        asked = [pair for pair in self.plan[step] for _ in range(self.answers)]
        sampling = replace(self.sampling, seed=nvfp4.draw_seed_for(self.seed, step) % 2**40)
        return rollouts(self.engine, model, self.tokenizer, [task for task, _ in asked], [mode for _, mode in asked], sampling, version, self.effort,
                        self.environments)


# %% 3 · Rewards and advantages  [GRPO; RL, advantage_estimator]
# No value network: the other answers to the same prompt say what was to be expected. With n answers of rewards r_1 .. r_n,
#     b_i = mean of the others,   s_i = standard deviation of the others,   A_i = (r_i - b_i) / s_i,    or r_i - b_i where s_i is 0
# An answer's own reward is in neither, so the baseline does not depend on the answer and the policy gradient stays unbiased.

def leave_one_out_advantage(r_gn: Tensor, clip: float = 20.0, eps: float = 1e-6) -> Tensor:
    """[g, n] advantages, clipped to ±clip. Equal rewards give 0: such a group teaches nothing.

    1 of 16 right:  the winner gets +1, because the others do not differ and there is nothing to divide by, the losers -0.258
    2 of 16 right:  +3.61 and -0.379        8 of 16: ±1.033
    NOTE: so the only right answer of a group counts less than each of two. The released code has this edge too, and the report is silent about it.
    """
    n = r_gn.shape[1]
    if n < 2: return torch.zeros_like(r_gn)      # nobody to compare with
    baseline_gn = (r_gn.sum(1, keepdim=True) - r_gn) / (n - 1)
    others_gnn = r_gn[:, None, :] - baseline_gn[:, :, None]      # of every answer to everybody's baseline; one's own is left out of the sum
    square_gn = others_gnn.square().masked_fill(torch.eye(n, dtype=torch.bool, device=r_gn.device), 0).sum(-1)
    std_gn, gap_gn = (square_gn / max(n - 2, 1)).sqrt(), r_gn - baseline_gn
    return torch.where(std_gn > eps, gap_gn / (std_gn + eps), gap_gn).clamp(-clip, clip)


class Rows(NamedTuple):
    """Rollouts as the learner reads them, a rollout a row, padded on the right. labels_rt[t] is the id behind ids_rt[t]."""
    ids_rt: Tensor
    labels_rt: Tensor
    doc_rt: Tensor               # 0, or -1 for padding
    mask_rt: Tensor              # this label was written by the model and is learnt
    logp_gen_rt: Tensor          # of the label, under the weights that drew it
    advantage_rt: Tensor
    tokens: Tensor               # what sums over tokens are divided by: the learnt tokens of the whole batch
    more: dict[str, Tensor]      # further [r, t] tensors of an objective

    def to(self, device) -> Rows:
        return Rows(*(x.to(device) for x in self[:-1]), {name: x.to(device) for name, x in self.more.items()})

    def split(self, n: int) -> list[Rows]:
        """n pieces of rows of about the same length, each as wide as its longest. tokens is shared out, so that the mean over pieces is the whole."""
        lengths_r = (self.doc_rt >= 0).sum(1)
        pieces = [(rows, int(lengths_r[rows].max())) for rows in lengths_r.argsort(stable=True).chunk(n)]
        return [Rows(*(x[rows, :t] for x in self[:6]), self.tokens / n, {name: x[rows, :t] for name, x in self.more.items()}) for rows, t in pieces]


def to_rows(drawn: list[Rollout], answers: int = 1, advantage_clip: float = 20.0, overlong_filter: bool = False) -> Rows:
    """Row i is rollout i; each `answers` neighbours answer the same prompt. overlong_filter: a cut answer is compared with, and not learnt."""
    if not drawn or len(drawn) % answers: raise ValueError(f"{len(drawn)} rollouts are no groups of {answers}: give every prompt {answers} answers.")
    shape = len(drawn), max(len(x.ids) for x in drawn)
    ids_rt, doc_rt = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    learn_rt, logp_rt = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    for i, x in enumerate(drawn):
        t = len(x.ids)
        ids_rt[i, :t], doc_rt[i, :t - 1], logp_rt[i, :t] = torch.tensor(x.ids), 0, torch.tensor(x.logp)      # the last id is a label only
        if x.finished or not overlong_filter: learn_rt[i, :t] = torch.tensor(x.learn)
    rewards_gn = torch.tensor([x.reward for x in drawn], dtype=torch.float64).view(-1, answers)
    advantage_r1 = leave_one_out_advantage(rewards_gn, advantage_clip).float().view(-1, 1)
    mask_rt = learn_rt[:, 1:]
    return Rows(ids_rt[:, :-1], ids_rt[:, 1:], doc_rt[:, :-1], mask_rt, logp_rt[:, 1:], advantage_r1.expand(-1, shape[1] - 1),
                mask_rt.sum().clamp(min=1).float(), {})


# %% 4 · Policy loss  [GRPO; DAPO, token-level loss and higher clip; RL, loss_functions]
#     L = - 1/N sum over all learnt tokens of  w · min(rho A, clip(rho, 1 - low, 1 + high) A),      rho = exp(logp - logp_old)
# N: learnt tokens of the whole batch, so every token counts alike and a long answer weighs more than a short one. No KL term, no entropy bonus.
# w = exp(logp - logp_gen) repairs that other weights, or other arithmetic, drew the token than learn from it. Ultra takes one optimizer step a
# batch: then logp_old is logp itself, rho is 1 and the clip never acts; its gradient is w A grad logp. The clip is there for whoever takes several.

def importance_weights(logp_rt: Tensor, logp_gen_rt: Tensor, mode: Weighting = "tis", low: float | None = None,
                       high: float | None = None) -> Tensor:
    """w, detached: how much likelier the learner finds a token than the engine that drew it.

    "tis": clamped into [0.2, 5]  [RL, the released configuration].  "icepop": kept inside [0.5, 5] and 0 outside  [the report's text; RL's bounds].
    w 0.1 1 3 6:   tis -> 0.2 1 3 5      icepop -> 0 1 3 0
    """
    if mode not in ("tis", "icepop"): raise ValueError(f"mode={mode!r} is unknown: use 'tis' or 'icepop'.")
    low, high = (0.2 if mode == "tis" else 0.5) if low is None else low, 5.0 if high is None else high
    w_rt = (logp_rt.detach() - logp_gen_rt).exp()
    return w_rt.clamp(low, high) if mode == "tis" else torch.where((w_rt >= low) & (w_rt <= high), w_rt, 0.0)


def mismatched(logp_rt: Tensor, logp_gen_rt: Tensor, mask_rt: Tensor, threshold: float = 2.0) -> Tensor:
    """[r] True for answers whose mean of exp|logp - logp_gen| over their tokens is above the threshold: engine and learner disagree about them
    too much to learn from. No difference gives 1."""
    error_rt = (logp_rt.detach() - logp_gen_rt).abs().exp().masked_fill(~mask_rt.bool(), 0)
    return error_rt.sum(1) / mask_rt.sum(1).clamp(min=1) > threshold


def grpo_loss(logp_rt: Tensor, logp_old_rt: Tensor, advantage_rt: Tensor, mask_rt: Tensor, weights_rt: Tensor | None = None,
              clip_low: float = 0.2, clip_high: float = 0.28, tokens: float | Tensor | None = None) -> Tensor:
    """The loss above. advantage: of every token, or [r], one a row. tokens: what the sum is divided by, by default the learnt tokens at hand.

    rho 1.5, A +1 -> 1.28 and no gradient;  rho 1.5, A -1 -> -1.5;  rho 0.5, A -1 -> -0.8 and no gradient.
    """
    if advantage_rt.dim() == 1: advantage_rt = advantage_rt[:, None]
    ratio_rt = (logp_rt - logp_old_rt).exp()
    gain_rt = torch.minimum(ratio_rt * advantage_rt, ratio_rt.clamp(1 - clip_low, 1 + clip_high) * advantage_rt)
    if weights_rt is not None: gain_rt = gain_rt * weights_rt
    tokens = mask_rt.sum() if tokens is None else tokens
    return -(gain_rt * mask_rt).sum() / torch.as_tensor(tokens).clamp(min=1)


def token_logp(model: nemotron.Nemotron, ids_rt: Tensor, doc_rt: Tensor, labels_rt: Tensor, temperature: float = 1.0
               ) -> tuple[Tensor, Tensor, Tensor]:
    """(log p of the labels [r, t], entropy of the distribution they were drawn from [r, t], detached, tokens per expert [m, e]), in fp32.
    A label below 0 is not asked for: 0, and no work in the output layer."""
    h_rtd, balances = model.trunk(ids_rt, doc_rt)
    asked_rt = labels_rt >= 0
    logits_nv = model.lm_head(h_rtd[asked_rt])
    all_nv = (logits_nv.to(torch.promote_types(logits_nv.dtype, torch.float32)) / temperature).log_softmax(-1)
    none_rt = all_nv.new_zeros(ids_rt.shape)
    logp_rt = none_rt.masked_scatter(asked_rt, all_nv.gather(1, labels_rt[asked_rt][:, None])[:, 0])
    with torch.no_grad(): entropy_rt = none_rt.masked_scatter(asked_rt, -(all_nv.exp() * all_nv).sum(-1))
    loads = [balance.load_e for balance in balances]
    return logp_rt, entropy_rt, torch.stack(loads) if loads else ids_rt.new_zeros(0, model.config.experts)


class PolicyLoss(NamedTuple):
    """What an objective returns for a piece of a batch. sums: by name a sum over its learnt tokens, for the log."""
    total: Tensor
    load_me: Tensor
    sums: dict[str, Tensor]


def policy_sums(logp_rt: Tensor, entropy_rt: Tensor, rows: Rows) -> dict[str, Tensor]:
    """What every objective logs: entropy, |logp - logp_gen|, and a histogram of the importance weights before any clamp."""
    gap_n = (logp_rt.detach() - rows.logp_gen_rt)[rows.mask_rt]
    bins = torch.bucketize(gap_n.exp(), torch.tensor(EDGES, device=gap_n.device)).bincount(minlength=len(EDGES) + 1)
    return dict(entropy=entropy_rt[rows.mask_rt].sum(), dlogp=gap_n.abs().sum(), weight_histogram=bins)


def grpo_objective(config: RLConfig) -> Callable[[nemotron.Nemotron, Rows], PolicyLoss]:
    def objective(model: nemotron.Nemotron, rows: Rows) -> PolicyLoss:
        logp_rt, entropy_rt, load_me = token_logp(model, rows.ids_rt, rows.doc_rt, rows.labels_rt.masked_fill(~rows.mask_rt, -1))
        # ours: an answer that is left out here stays in N, which is known before any piece is computed
        wrong_r1 = mismatched(logp_rt, rows.logp_gen_rt, rows.mask_rt, config.threshold)[:, None]
        weights_rt = importance_weights(logp_rt, rows.logp_gen_rt, config.weights)
        total = grpo_loss(logp_rt, logp_rt.detach(), rows.advantage_rt, rows.mask_rt & ~wrong_r1, weights_rt, *config.clip, rows.tokens)
        return PolicyLoss(total, load_me, policy_sums(logp_rt, entropy_rt, rows) | dict(mismatched=(rows.mask_rt & wrong_r1).sum()))
    return objective


# %% 5 · Curriculum  [Ultra, RLVR]
# How often a prompt is answered right is measured first; data/curriculum.py plans all batches from that.

def profile(model: nemotron.Nemotron, engine: RolloutEngine, tokenizer: Tokenizer, config: RLConfig) -> list[tuple[tasks.Task, float]]:
    """(question, pass rate under the present weights) of the training split: a few of every level up to config.level, then many of those to learn."""
    few, n = config.profile
    draw = Draw(engine, tokenizer, [], n, config.sampling, nvfp4.draw_seed_for(config.seed, 1))

    def ask(some: list[tasks.Task]) -> list[float]:
        draw.plan.append([(task, "regular") for task in some])
        return [x.score for x in draw(model, len(draw.plan) - 1, 0)]

    found = curriculum.pass_rates(ask, config.questions(few, "train"), n, config.rows)
    more = (tasks.draw(family, level, config.pool, config.seed, "train", at_most=True)[few:]
            for _, family, level in curriculum.levels_to_learn(found, config.band))
    return found + curriculum.pass_rates(ask, [task for some in more for task in some], n, config.rows)


# %% 6 · Learner and worker  [Ultra, RLVR; RL, async GRPO]
# data/worker.py draws batch n + 1 in a second process while this one learns batch n; the weights that drew a batch are at most `age` steps old.
# Router weights are frozen, since a router that moves changes which experts wrote and learn a token; the experts' selection bias goes on.

def describe(drawn: list[Rollout], step: int, answers: int) -> dict:
    """A batch in numbers, for the log: rewards by domain, groups that teach nothing, age, lengths, format errors."""
    mean = lambda values: round(float(np.mean(values)), 5)
    rewards_gn, lengths, by_domain = np.array([x.reward for x in drawn]).reshape(-1, answers), [sum(x.learn) for x in drawn], {}
    for x in drawn: by_domain.setdefault(x.task.domain, []).append(x.score)
    return dict(reward=mean(rewards_gn), score=mean([x.score for x in drawn]), score_by_domain={d: mean(scores) for d, scores in by_domain.items()},
                zero_advantage=mean(np.ptp(rewards_gn, 1) == 0), age=mean([step - x.version for x in drawn]), tokens=mean(lengths),
                longest=max(lengths), cut=mean([not x.finished for x in drawn]), errors=mean([x.error is not None for x in drawn]))


class RLTrainer(pretrain.Trainer):
    """05's trainer, one optimizer step a batch of rollouts. source: (model, step) -> what it learns, and notes for its row of metrics;
    after: (trainer) -> further notes, behind each step. fit_policy sets both."""
    def __init__(self, config: pretrain.PretrainConfig, model: nemotron.Nemotron, source: Callable | None, home: Path,
                 policy: Callable[[nemotron.Nemotron, Rows], PolicyLoss], after: Callable | None = None, **kwargs):
        self.source, self.policy, self.after = source, policy, after
        for router in model.routers(): router.weight.requires_grad_(False)
        super().__init__(config, model, lambda step: Batch(*self.batch[:4]), home, objective=self.piece_loss, **kwargs)

    def train_step(self) -> dict:
        began = time.perf_counter()
        rows, notes = self.source(self.model, self.step)
        self.batch, self.noted, waited = rows.to(self.config.device), {}, time.perf_counter() - began
        row = super().train_step()
        means, real = {name: (x.cpu() / rows.tokens.cpu()).tolist() for name, x in self.noted.items()}, int((rows.doc_rt >= 0).sum())
        row |= dict(notes, **means, learnt=int(rows.tokens), waited=round(waited, 4), tokens_per_s=round(real / row["seconds"], 1))
        if self.after is not None: row |= self.after(self)
        return row

    def compute_step(self, *batch: Tensor) -> None:
        self.pieces = iter(self.batch.split(self.config.micro_batches))
        super().compute_step(*batch)

    def piece_loss(self, model: nemotron.Nemotron, _: Batch) -> nemotron.Losses:
        loss = self.policy(model, next(self.pieces))
        for name, x in loss.sums.items(): self.noted[name] = self.noted.get(name, 0) + x
        return nemotron.Losses(loss.total, loss.total, [], loss.total.new_zeros(()), loss.load_me)


def fit_policy(trainer: RLTrainer, draw: Draw, config: RLConfig, read: Callable[[nemotron.Nemotron, list[Rollout]], Rows],
               after: Callable[[RLTrainer], dict] | None = None) -> bool:
    """Trains on all of draw.plan, with a worker or (config.sync) in turns; `read` makes rows of a step's rollouts. False when Ctrl-C ended it."""
    threads, half, worker = torch.get_num_threads(), max(torch.get_num_threads() // 2, 1), None
    if not config.sync:
        build = partial(nemotron.Nemotron, trainer.model.config)
        worker = Worker(draw, build, trainer.model, trainer.step, len(draw.plan), config.age, config.in_flight, half)
        torch.set_num_threads(max(threads - half, 1))

    def source(model: nemotron.Nemotron, step: int) -> tuple[Rows, dict]:
        drawn = worker.take(step) if worker else draw(model, step, step)
        return read(model, drawn), describe(drawn, step, draw.answers)

    def behind(trainer: RLTrainer) -> dict:
        if worker: worker.shared.publish(trainer.model, trainer.step)
        return after(trainer) if after else {}

    trainer.source, trainer.after = source, behind
    try: return trainer.fit(len(draw.plan), log_every=10**9, label=config.name)
    finally:
        if worker: worker.close()
        torch.set_num_threads(threads)


def trainer_of(kind: type, base: Path, settings: pretrain.PretrainConfig, batches, config: RLConfig, name: str, **shared) -> pretrain.Trainer:
    """A trainer of the weights in `base`, or with --resume as its own newest checkpoint in OUT/NAME left it. ValueError when that would be lost."""
    home, shared = Path(config.out) / name, dict(shared, tokenizer=Tokenizer.load(base), data_hash=str(base))
    log = home / "metrics.jsonl"
    if config.fresh: shutil.rmtree(home, ignore_errors=True)
    if not pretrain.checkpoints(home):
        nvfp4.writable_folder(home)
        log.unlink(missing_ok=True)
        return kind(settings, nemotron.load_checkpoint(base).to(settings.device), batches, home, **shared)
    if not config.resume:
        raise ValueError(f"{home} holds checkpoints of an earlier run: --resume goes on with it, --fresh deletes it, --out chooses another folder.")
    trainer = kind.load(pretrain.newest_checkpoint(home), settings, batches, home, **shared)
    trainer.rows = [row for row in map(json.loads, log.read_text().splitlines() if log.exists() else ()) if row["step"] <= trainer.step]
    log.write_text("".join(json.dumps(row) + "\n" for row in trainer.rows))
    print(f"resuming {name} behind step {trainer.step}")
    return trainer


def last_of(trainer: pretrain.Trainer, whole: bool = True) -> Path:
    """The folder of the trainer's last step; KeyboardInterrupt when it was stopped before its end."""
    if not whole: raise KeyboardInterrupt
    return trainer.save()


def start(config: RLConfig, base: Path, engine: RolloutEngine) -> tuple[RLTrainer, Draw]:
    """The trainer of a new run and what it draws, or those of the run that --resume finds. ValueError for other settings than that had."""
    about = config.home / "rlvr.json"
    run = {key: value for key, value in asdict(config).items() if key not in FREE | {"base"}}
    run = json.loads(json.dumps(dict(run, base=str(base)), default=str))      # what a continuation must share with its run
    trainer = trainer_of(RLTrainer, base, config.training(), None, config, config.name, policy=grpo_objective(config))
    if trainer.step:
        saved = json.loads(about.read_text())
        if differs := [key for key in run if run[key] != saved["run"].get(key)]:
            raise ValueError(f"{config.home} had {differs[0]} = {saved['run'].get(differs[0])}, not {run[differs[0]]}: give the same, or --fresh.")
        plan = [[(tasks.Task(**dict(task, tools=tuple(task["tools"]))), mode) for task, mode in step] for step in saved["plan"]]
    else:
        pools, table = make_pools(profile(trainer.model, engine, trainer.tokenizer, config), config.band)
        nvfp4.print_table("pass rates before", ["family and level", "domain", "prompts", "mean", "never", "always", "used"], table)
        if missing := {row[1] for row in table} - set(pools): print(f"nothing to learn from in {', '.join(sorted(missing))}")
        plan = make_plan(pools, config.steps, config.prompts, config.curriculum, config.medium, config.seed)
        about.write_text(json.dumps(dict(run=run, plan=[[(task._asdict(), mode) for task, mode in step] for step in plan])))
    return trainer, Draw(engine, trainer.tokenizer, plan, config.answers, config.sampling, config.seed, config.effort)


def reinforce(config: RLConfig, base: Path, engine: RolloutEngine = sampled) -> Path:
    """RLVR from a checkpoint, start to end -> its last checkpoint; KeyboardInterrupt when Ctrl-C ended it (the step is saved)."""
    trainer, draw = start(config, base, engine)
    held_out = [(task, "regular") for task in config.questions(config.held_out, "held_out")]
    test = Draw(engine, trainer.tokenizer, [held_out], 1, config.sampling, config.seed + 1)

    def look(trainer: RLTrainer) -> dict:
        if not config.eval_every or trainer.step % config.eval_every: return {}
        row, seen = trainer.rows[-1], trainer.rows[-config.eval_every:]
        reward, score = float(np.mean([row["reward"] for row in seen])), float(np.mean([x.score for x in test(trainer.model, 0, trainer.step)]))
        tqdm.write(f"step {trainer.step:4d} | reward {reward:.3f} | held-out {score:.3f} | no advantage {row['zero_advantage']:.0%} | entropy "
                   f"{row['entropy']:.2f} | |dlogp| {row['dlogp']:.4f} | age {row['age']:.0f} | tokens {row['tokens']:.0f}")
        return dict(held_out=round(score, 5))

    read = lambda model, drawn: to_rows(drawn, config.answers, config.advantage_clip, config.overlong_filter)
    return last_of(trainer, fit_policy(trainer, draw, config, read, look))


# %% 7 · PivotRL  [PivotRL; Ultra, teachers]
# Tool conversations are long, and a reward at their end says little about each turn. So worked conversations are cut at every assistant turn; the
# frozen student answers each of them a few times, one turn and no more, and a verifier compares what it does with what the expert did. Turns that
# it always or never gets right teach nothing (71 % of them, says the paper). GRPO runs on the rest, a turn at a time.

class PivotDraw(Draw):
    """A Draw whose plan holds pivots: step -> `answers` single turns at each of them. No tool runs, and the reward is the verifier's word."""
    def __call__(self, model: nemotron.Nemotron, step: int, version: int) -> list[Rollout]:
        asked, out = [pivot for pivot in self.plan[step] for _ in range(self.answers)], []
        prompts = [sft.render_chat(p.history, p.mode, tokenizer=self.tokenizer, tools=p.task.tools, generation_prompt=True)[0] for p in asked]
        drawn = self.engine(model, prompts, replace(self.sampling, seed=nvfp4.draw_seed_for(self.seed, step) % 2**40))
        for pivot, prompt, new in zip(asked, prompts, drawn, strict=True):
            text = self.tokenizer.decode(new.ids[:-1] if new.finished else new.ids)
            score, error = verify_turn(pivot, text) if new.finished else 0.0, tasks.parse_completion(text, pivot.mode != "off").error
            learn, logp = [False] * len(prompt) + [True] * len(new.ids), [0.0] * len(prompt) + new.logprobs
            out.append(Rollout(pivot.task, pivot.mode, prompt + new.ids, learn, logp, version, score, score, new.finished, error))
        return out


def find_pivots(model: nemotron.Nemotron, draw: PivotDraw, below: float) -> list[Pivot]:
    """The turns of draw.plan[0] that are worth training under these weights; prints what was found. ValueError when there is none."""
    rewards_hk = torch.tensor([x.reward for x in draw(model, 0, 0)]).view(-1, draw.answers)
    kept_h, flat_h = pivot_turns(rewards_hk, below), rewards_hk.var(1, unbiased=False) == 0
    print(f"{len(kept_h)} turns of worked conversations: {flat_h.float().mean():.0%} always earn the same (71 % in the paper), {int(kept_h.sum())} "
          f"kept; mean reward {rewards_hk.mean():.0%}, of those kept {rewards_hk[kept_h].mean():.0%}")
    if not kept_h.any(): raise NothingToLearn("no turn is worth training: give more --mopd.pivot, or another level.")
    return [pivot for pivot, kept in zip(draw.plan[0], kept_h) if kept]


# %% 8 · Teachers  [Ultra, MOPD]
# A teacher begins as a copy of the student and learns one domain by what suits it:
#     rlvr     GRPO on the domain's questions alone
#     pivot    GRPO on single turns of worked tool conversations
#     sft      more fine-tuning on the domain's worked questions, then GRPO
# Each is a folder of checkpoints, OUT/teacher-DOMAIN, and goes on from its own newest one after an interruption.

def domains_of(config: RLConfig) -> list[str]: return list(dict.fromkeys(task.domain for task in config.questions(1, "train")))


def questions_of(domain: str, n: int, config: RLConfig, seed: int, split: str = "train") -> list[tasks.Task]:
    """Up to n questions of a domain: its families, at the level of RL and the easier ones, in turn."""
    groups: dict[tuple, list[tasks.Task]] = {}
    for task in replace(config, domains=(domain,), seed=seed).questions(n, split): groups.setdefault((task.family, task.level), []).append(task)
    if not groups: raise ValueError(f"no family of {domain} is among --families: choose one, or another teacher.")
    return sft.round_robin(groups.values())[:n]


def answer(model: nemotron.Nemotron, asked: list[tasks.Task], config: RLConfig, tokenizer: Tokenizer, engine: RolloutEngine, seed: int = 0):
    """A rollout of each question, in mode regular."""
    return rollouts(engine, model, tokenizer, asked, ["regular"] * len(asked), replace(config.sampling, seed=config.seed + seed))


def samples_of(drawn: list[Rollout]) -> list[sft.Sample]:
    """Rollouts as stage 06 packs them: the ids that were drawn, and which of them the model wrote."""
    return [sft.Sample(np.array(x.ids), np.array(x.learn), x.task.prompt, x.task.domain, x.mode) for x in drawn]


def packed(samples: list[sft.Sample], steps: int, batch: int, tokens: int, lr: float, config: RLConfig) -> tuple[sft.SFTConfig, sft.Packs]:
    """Stage 06's settings and packs for one stage of `steps` steps; packs grow to hold the longest sample. lr falls to a fifteenth  [Ultra, SFT]."""
    size = max(tokens, *(len(x.ids) for x in samples))
    settings = sft.SFTConfig(out=config.out, steps=(steps, 0), pack=(size, size), batch=(batch, 1), lr=(lr, lr), lr_min=(lr / 15, lr / 15),
                             mtp_weight=0.0, device=config.device, seed=config.seed, save_every=steps)
    return settings, sft.Packs(samples, settings)


def tune(samples: list[sft.Sample], steps: int, lr: float, base: Path, name: str, config: RLConfig) -> Path:
    """`steps` steps of stage 06's fine-tuning on these conversations."""
    settings, packs = packed(samples, steps, 2, 512, lr, config)
    trainer = trainer_of(sft.SFTTrainer, base, settings.training(), packs, config, name, sft=settings)
    return last_of(trainer, trainer.fit(steps, log_every=10**9, label=name))


def practise(draw: Draw | PivotDraw, policy: Callable, read: Callable, base: Path, config: RLConfig) -> Path:
    """RL on all of draw.plan, with section 6's worker; read: (model, rollouts) -> Rows."""
    trainer = trainer_of(RLTrainer, base, config.training(), None, config, config.name, policy=policy)
    return last_of(trainer, fit_policy(trainer, draw, config, read))


def train_teacher(domain: str, base: Path, config: RLConfig, m: MOPDConfig, mark: str = "", engine: RolloutEngine = sampled) -> Path:
    """The checkpoint of a domain's teacher, branched from the student in `base`. mark: of the round."""
    kind, tokenizer = TEACHERS[domain], Tokenizer.load(base)
    own = replace(config, name=f"teacher-{domain}{mark}", domains=(domain,), steps=m.teacher_steps, prompts=m.teacher_prompts, lr=m.teacher_lr,
                  warmup_steps=min(config.warmup_steps, m.teacher_steps // 4), eval_every=0)
    print(f"\nteacher of {domain}: {kind}, from {base}")
    if kind == "pivot":
        rng, turns = random.Random(own.seed), []
        for task in questions_of(domain, m.pivot[0], own, own.seed):
            turns += cut_turns(task, [*sft.opening(task), *sft.thought_of(tasks.ENVIRONMENTS[task.family].worked(task, "regular", rng))], "regular")
        draw = PivotDraw(engine, tokenizer, [turns], m.pivot[1], own.sampling, own.seed)
        turns = find_pivots(nemotron.load_checkpoint(base).to(own.device), draw, m.pivot_below)
        draw = replace(draw, plan=[rng.choices(turns, k=own.prompts) for _ in range(own.steps)], answers=own.answers, seed=own.seed + 1)
        return practise(draw, grpo_objective(own), lambda _, drawn: to_rows(drawn, own.answers, own.advantage_clip), base, own)
    if kind == "sft":
        families = tuple(dict.fromkeys(task.family for task in own.questions(1, "train")))
        worked = sft.build_samples(sft.SFTConfig(families=families, levels=own.level + 1, seed=own.seed + 1), tokenizer)
        base = tune(worked, m.teacher_sft, m.sft_lr, base, own.name + "-sft", own)
    return reinforce(own, base, engine)


def train_teachers(base: Path, earlier: dict[str, Path], config: RLConfig, m: MOPDConfig, mark: str = "",
                   engine: RolloutEngine = sampled) -> dict[str, Path]:
    """domain -> checkpoint, those of an earlier round where nothing is left to learn. ValueError when no domain has any."""
    teachers = dict(earlier)
    for domain in m.teachers:
        try: teachers[domain] = train_teacher(domain, base, config, m, mark, engine)
        except NothingToLearn as error: print(f"no new teacher of {domain}: {error}")
    if not teachers: raise ValueError(f"none of {', '.join(m.teachers)} has a teacher: choose other --mopd.teachers or a better checkpoint.")
    return teachers


# %% 9 · Multi-teacher on-policy distillation  [Ultra, MOPD; MiMo]
# The student writes, and the domain's teacher says of each token how much likelier it would have been: A_t = log pi_T - log pi. Its expectation
# under the student is -KL(student || teacher), so following it closes that gap on the student's own prefixes, with a signal for every token.

def mopd_loss(logp_rt: Tensor, logp_prox_rt: Tensor, logp_gen_rt: Tensor, logp_teacher_rt: Tensor, mask_rt: Tensor, clip: float = 0.2,
              low: float = 0.5, high: float = 2.0, tokens: float | Tensor | None = None) -> Tensor:
    """Clipped surrogate of the reverse KL with three policies: `gen` drew the token, `prox` began the update, the present one is learnt.

    A = log pi_T - log pi_prox;  c = pi_prox / pi_gen, 0 outside [low, high] (IcePop);  r = pi / pi_prox;   - sum m c min(r A, clip(r) A) / tokens
    ours: clip, as GRPO's lower side; [low, high] as Nemotron-Cascade 2's. The report prints neither. A teacher equal to the student gives 0.
    """
    advantage_rt = (logp_teacher_rt - logp_prox_rt).detach()
    weights_rt = importance_weights(logp_prox_rt, logp_gen_rt, "icepop", low, high)
    return grpo_loss(logp_rt, logp_prox_rt.detach(), advantage_rt, mask_rt, weights_rt, clip, clip, tokens)


@torch.no_grad()
def teacher_logp(rows: Rows, domains: list[str], teachers: dict[str, nemotron.Nemotron]) -> Tensor:
    """[r, t] log-probability of every learnt token under the teacher of its row's domain; 0 elsewhere. No other teacher reads the row."""
    out_rt = torch.zeros_like(rows.logp_gen_rt)
    if lost := set(domains) - set(teachers): raise ValueError(f"no teacher for {min(lost)}: distil questions of {', '.join(teachers)} only.")
    for domain in dict.fromkeys(domains):
        mine_r = torch.tensor([d == domain for d in domains])
        ids_rt, labels_rt, doc_rt, mask_rt = (x[mine_r] for x in rows[:4])
        out_rt[mine_r] = token_logp(teachers[domain], ids_rt, doc_rt, labels_rt.masked_fill(~mask_rt, -1))[0].to(out_rt.dtype)
    return out_rt


def with_teachers(rows: Rows, drawn: list[Rollout], teachers: dict[str, nemotron.Nemotron]) -> Rows:
    return rows._replace(more=rows.more | dict(teacher=teacher_logp(rows, [x.task.domain for x in drawn], teachers)))


def mopd_objective(config: MOPDConfig) -> Callable[[nemotron.Nemotron, Rows], PolicyLoss]:
    """As in GRPO one optimizer step a batch: the policy that begins the update is the present one, and only `gen` is older."""
    def objective(model: nemotron.Nemotron, rows: Rows) -> PolicyLoss:
        logp_rt, entropy_rt, load_me = token_logp(model, rows.ids_rt, rows.doc_rt, rows.labels_rt.masked_fill(~rows.mask_rt, -1))
        total = mopd_loss(logp_rt, logp_rt.detach(), rows.logp_gen_rt, rows.more["teacher"], rows.mask_rt, config.clip, *config.icepop, rows.tokens)
        gap = ((logp_rt.detach() - rows.more["teacher"]) * rows.mask_rt).sum()
        return PolicyLoss(total, load_me, policy_sums(logp_rt, entropy_rt, rows) | dict(kl=gap))
    return objective


def warm_up(base: Path, teachers: dict[str, Path], config: RLConfig, m: MOPDConfig, mark: str = "", engine: RolloutEngine = sampled) -> Path:
    """A light SFT of the student on what its teachers get right, so that it can write what they would: GDPVal 46.7 with it, 35.3 without [Ultra]."""
    samples, tokenizer = [], Tokenizer.load(base)
    for domain, folder in teachers.items():
        asked = questions_of(domain, m.warmup[0], config, config.seed + 2)
        right = [x for x in answer(nemotron.load_checkpoint(folder).to(config.device), asked, config, tokenizer, engine) if x.score == 1]
        print(f"the teacher of {domain} answered {len(right)} of {len(asked)} questions right: the student learns them first")
        samples += samples_of(right)
    return tune(samples, m.warmup[1], m.sft_lr, base, f"warmup{mark}", config) if samples and m.warmup[1] else base


def distillation(base: Path, teachers: dict[str, Path], config: RLConfig, m: MOPDConfig, mark: str = "", engine: RolloutEngine = sampled) -> tuple:
    """What one round of MOPD asks (a Draw), how its rollouts become rows, and its settings."""
    own = replace(config, name=f"mopd{mark}", steps=m.steps, prompts=m.prompts, lr=m.lr, warmup_steps=min(config.warmup_steps, m.steps // 4))
    each = -(-m.steps * m.prompts // len(teachers))
    models = {domain: nemotron.load_checkpoint(folder).to(own.device).eval() for domain, folder in teachers.items()}
    # equal shares of the domains in every batch, ours: the report's weights are not known
    pool, rng = [questions_of(domain, each, own, own.seed + 3) for domain in teachers], random.Random(own.seed)
    asked = sft.round_robin(rng.sample(some, len(some)) * -(-each // len(some)) for some in pool)
    pairs = [(task, "medium" if rng.random() < own.medium else "regular") for task in asked]
    draw = Draw(engine, Tokenizer.load(base), [pairs[i * m.prompts:(i + 1) * m.prompts] for i in range(m.steps)], 1, own.sampling, own.seed + 4)
    return draw, lambda _, drawn: with_teachers(to_rows(drawn).to(own.device), drawn, models), own


def distil(base: Path, teachers: dict[str, Path], config: RLConfig, m: MOPDConfig, mark: str = "", engine: RolloutEngine = sampled) -> Path:
    """One round of MOPD: the worker draws batch n + 1 while the teachers score batch n and the learner takes its step."""
    draw, read, own = distillation(base, teachers, config, m, mark, engine)
    return practise(draw, mopd_objective(m), read, base, own)


def recovery_rate(student: float, before: float, teacher: float) -> float:
    """(student - before) / (teacher - before): 0 nothing learnt, 1 the teacher's score, above 1 beyond it.  Terminal Bench 54.0 44.5 50.0 -> 1.727"""
    if teacher == before: raise ValueError("teacher and student began equal: there is no gap to recover.")
    return (student - before) / (teacher - before)


# %% 10 · MTP boosting  [Ultra, MTP boosting; Megatron, mtp_hsm]
# The head was trained for two depths, on text, each depth fed with the states of the one before. Serving it drafts further, on the student's own
# answers, and attends to a past that the trunk has written. So at last the head alone learns, on rollouts of the finished student:
#     L = T² / (K |A|) · sum over depths k and positions t of KL(softmax(z_{t+k} / T) || softmax(z^k_t / T))      no cross-entropy
# z_{t+k}: the trunk's logits k tokens later, which predict what depth k predicts at t. A draft that leaves its answer is not counted.

def mix_hidden(history: list[Tensor], choice_bt: Tensor, doc_bt: Tensor) -> Tensor:
    """Hidden-state mixing: for each token one of the states that predict its next target; history[j] is h_j [b, t, d], the newest last.

    An older entry predicts that target one token later for each depth it is older. Where its document has ended by then, the newest serves.
    choice_bt: index into history, 0 the oldest.    history h_0 h_1 h_2, choice 0 at token t  ->  h_0 of token t + 2
    """
    (b, t), newest, here_t = choice_bt.shape, len(history) - 1, torch.arange(choice_bt.shape[1], device=choice_bt.device)
    at_bt = here_t + newest - choice_bt
    valid_bt = (at_bt < t) & (doc_bt.gather(1, at_bt.clamp(max=t - 1)) == doc_bt)
    choice_bt, at_bt = torch.where(valid_bt, choice_bt, newest), torch.where(valid_bt, at_bt, here_t)
    return torch.stack(history)[choice_bt, torch.arange(b, device=choice_bt.device)[:, None], at_bt]


def inside_answer(mask_bt: Tensor, doc_bt: Tensor, depth: int) -> Tensor:
    """bool [b, t]: the token behind t and the `depth` tokens behind that one are all written by the model, in one document."""
    inside_bt = rolled_bt = mask_bt
    for _ in range(depth):
        rolled_bt = nemotron.roll_document(rolled_bt, doc_bt, fill=False)
        inside_bt = inside_bt & rolled_bt
    return inside_bt


def log_softmax32(model: nemotron.Nemotron, h_rd: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [r, v] behind hidden states, at least in fp32."""
    logits_rv = model.lm_head(h_rd)
    return (logits_rv.to(torch.promote_types(logits_rv.dtype, torch.float32)) / temperature).log_softmax(-1)


def boosting_loss(model: nemotron.Nemotron, batch: Batch, depths: int = 7, temperature: float = 2.0, mixing: Mixing = "trunk") -> nemotron.Losses:
    """The loss above. mixing: whether the trunk's h_0 is among the states to choose from, as in Megatron ("trunk"), or not, as the report words it
    ("heads"); depth 1 always reads h_0. The choices come from torch's random state, which checkpoints keep."""
    ids_bt, _, doc_bt, mask_bt = batch
    with torch.no_grad():
        history = [model.hidden(ids_bt, doc_bt)]
        target_rv = log_softmax32(model, history[0][mask_bt], temperature)
    row_bt = (mask_bt.flatten().cumsum(0) - 1).view_as(mask_bt)      # where a position's target stands in target_rv
    visible, kl_k, balances = model.visible(doc_bt, *ids_bt.shape), [], []
    for k in range(1, depths + 1):
        ids_bt, given_btd = nemotron.roll_document(ids_bt, doc_bt), history[-1]
        if mixing != "off" and k > 1:
            given_btd = mix_hidden(history, torch.randint(int(mixing == "heads"), k, ids_bt.shape).to(ids_bt.device), doc_bt)
        h_btd, balance = model.mtp(model.backbone.embeddings(ids_bt), given_btd, doc_bt, visible, run=model.run)
        history.append(h_btd)
        if balance is not None: balances.append(balance)
        row_r, token_r = inside_answer(mask_bt, doc_bt, k).nonzero(as_tuple=True)
        guess_rv = log_softmax32(model, h_btd[row_r, token_r], temperature)
        kl_k.append(F.kl_div(guess_rv, target_rv[row_bt[row_r, token_r + k]], reduction="sum", log_target=True))
    total = temperature ** 2 * sum(kl_k) / (depths * mask_bt.sum().clamp(min=1))
    # the trunk's routers see no load, so that their bias stays; a bias of exactly balanced loads does not move
    load_me = ids_bt.new_zeros(len(model.routers()), model.config.experts, dtype=torch.float32)
    if balances: load_me[-1] = sum(x.load_e for x in balances)
    return nemotron.Losses(total, total, [kl / mask_bt.sum().clamp(min=1) for kl in kl_k], total.new_zeros(()), load_me)


def boost_mtp(base: Path, config: RLConfig, m: MOPDConfig, engine: RolloutEngine = sampled) -> Path:
    """Trains the head of a checkpoint alone, on rollouts of the model itself; a trunk that stands still never makes them stale."""
    model, (steps, batch, tokens), domains = nemotron.load_checkpoint(base).to(config.device), m.boost, domains_of(config)
    if not hasattr(model, "mtp"): raise ValueError(f"{base} has no MTP weights, so there is no head to boost: take a checkpoint that has kept them.")
    asked = sft.round_robin(questions_of(d, -(-m.boost_rollouts // len(domains)), config, config.seed + 5) for d in domains)
    packs = packed(samples_of(answer(model, asked, config, Tokenizer.load(base), engine, seed=6)), steps, batch, tokens, m.boost_lr, config)[1]
    # ours: rate, warmup and decay, the report prints none of them
    settings = replace(config.training(), steps=steps, batch=batch, micro_batches=1, lr=m.boost_lr, lr_min=m.boost_lr / 100, warmup=0.1, decay=0.5)
    trainer = trainer_of(pretrain.Trainer, base, settings, packs, config, "boosted",
                         objective=lambda model, batch: boosting_loss(model, batch, m.depths, m.temperature, m.mixing))
    for name, p in trainer.model.named_parameters(): p.requires_grad_(name.startswith("mtp."))
    return last_of(trainer, trainer.fit(steps, log_every=10**9, label="boost"))


# %% 11 · Acceptance of drafts  [Ultra, MTP boosting]
# What boosting is for: how many tokens one pass of the trunk yields when the head drafts `depths` of them. The trunk's own answers are enough to
# tell, without a speculative decoder (stage 08 has one): rejection sampling keeps a draft with min(1, q / p) and leaves the text distributed as the
# trunk's, so that given the token y that came out, y was a kept draft with chance min(1, q(y) / p(y)).

@torch.inference_mode()
def draft_chances(model: nemotron.Nemotron, ids: list[int], mask_t: Tensor, depths: int, greedy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """How likely is draft k accepted that begins at token t, once those before it are: (for the token that stands there, over all tokens, whether
    there is one), each [t, k].

    Drafts from every token of an answer at once, a row each. The head's cache holds the states made from the trunk's hiddens up to t, as behind a
    verified prefix, then those of the drafts, made from the head's own. What was accepted are the tokens that stand there, so they are what is fed.
    Greedy: 1 where the head's best token stands there. Else rejection sampling: min(1, q / p) for the token there, drawn by the trunk from p, and
    sum over tokens of min(p, q) for any.
    """
    c, t, weight = model.config, len(ids) - 1, model.lm_head.weight
    if "M" in c.mtp_pattern: raise ValueError("drafts are measured for a head without Mamba layers: its states cannot be taken back here.")
    ids_1t, mask_1t, embed = torch.tensor([ids], device=weight.device), mask_t.to(weight.device)[None, :t], model.backbone.embeddings
    trunk_1td, start_r = model.hidden(ids_1t), mask_1t[0].nonzero()[:, 0]
    there_tk, any_tk, inside_tk = torch.zeros(3, t, depths, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    make = lambda rows: [nemotron.KVCache(rows, c.kv_heads, t + depths, c.head_dim, weight.device, weight.dtype) if letter == "*" else None
                         for letter in c.mtp_pattern]
    prefix, caches = make(1), make(len(start_r))
    h_r1d = model.mtp(embed(ids_1t[:, 1:]), trunk_1td[:, :-1], caches=prefix)[0][0, start_r][:, None]
    for old, new in zip(prefix, caches):
        if old is not None: new.append(*(x[:, :, :t].expand(len(start_r), -1, -1, -1) for x in (old.k_bhsp, old.v_bhsp)))
    # NOTE: there are no positions, so a draft's keys may stand behind the whole answer's: row r sees its prefix and its own drafts
    seen_rs = torch.arange(t, device=weight.device) <= start_r[:, None]
    for k in range(1, depths + 1):
        if k > 1:
            seen_rs, fed_r1 = F.pad(seen_rs, (0, 1), value=True), ids_1t[0, (start_r + k).clamp(max=t)][:, None]
            h_r1d, _ = model.mtp(embed(fed_r1), h_r1d, mask=seen_rs[:, None, None], caches=caches)
        inside_r = inside_answer(mask_1t, torch.zeros_like(mask_1t, dtype=torch.long), k)[0, start_r]
        at_r = start_r[inside_r]
        q_rv, p_rv, next_r1 = log_softmax32(model, h_r1d[inside_r, 0]), log_softmax32(model, trunk_1td[0, at_r + k]), ids_1t[0, at_r + k + 1][:, None]
        hit_r, inside_tk[at_r, k - 1] = (q_rv.argmax(-1) == next_r1[:, 0]).to(q_rv.dtype), 1.0
        there_tk[at_r, k - 1] = hit_r if greedy else (q_rv - p_rv).gather(1, next_r1)[:, 0].exp().clamp(max=1)
        any_tk[at_r, k - 1] = hit_r if greedy else torch.minimum(q_rv, p_rv).exp().sum(-1)
    return there_tk, any_tk, inside_tk


def expected_passes(chance_tk: list[list[float]], mask_t: list[bool]) -> tuple[int, float]:
    """(tokens to verify, expected passes of the trunk) for the answers of one rollout; the first token of an answer comes with its prompt.

    With t + 1 tokens read and one more written:  N(t) = 1 + sum over a of P(a drafts accepted) N(t + a + 1),  0 where the answer ends.
    One draft of chance 1/2, three tokens to verify:  N = 1 + (1.5 + 1) / 2 = 2.25
    """
    n, tokens, passes = [0.0] * (len(mask_t) + len(chance_tk[0]) + 2), 0, 0.0
    for t in reversed([t for t, pair in enumerate(zip(mask_t, mask_t[1:])) if all(pair)]):
        tokens, reached, n[t] = tokens + 1, 1.0, 1.0
        for a, chance in enumerate([*chance_tk[t], 0.0]):
            n[t] += reached * (1 - chance) * n[t + a + 1]
            reached *= chance
        if not t or not mask_t[t - 1]: passes += n[t]
    return tokens, passes


class Acceptance(NamedTuple):
    length: float           # tokens a pass of the trunk yields: accepted drafts, and the one that it writes itself
    by_draft: list[float]   # share of drafts accepted at each place, of those whose predecessors were


def acceptance(model: nemotron.Nemotron, rollouts: list[Rollout], depths: int, greedy: bool) -> Acceptance:
    """Of drafts of `depths` tokens, on rollouts that the model has written itself (greedily, or at temperature 1)."""
    if not hasattr(model, "mtp"): raise ValueError("the checkpoint has no MTP weights: nothing can draft; take one that was trained with the head.")
    tokens, passes, reached_k, accepted_k = 0, 0.0, *torch.zeros(2, depths, dtype=torch.float64)
    for r in rollouts:
        there_tk, any_tk, inside_tk = (x.double().cpu() for x in draft_chances(model, r.ids, torch.tensor(r.learn[1:]), depths, greedy))
        before_tk, new = F.pad(there_tk.cumprod(1)[:, :-1], (1, 0), value=1.0), expected_passes(there_tk.tolist(), r.learn[1:])
        tokens, passes = tokens + new[0], passes + new[1]
        reached_k, accepted_k = reached_k + (before_tk * inside_tk).sum(0), accepted_k + (before_tk * any_tk).sum(0)
    if not tokens: raise ValueError("no answer has two tokens: there is nothing to draft.")
    return Acceptance(tokens / passes, (accepted_k / reached_k.clamp(min=1e-9)).tolist())


def measure_drafts(folders: dict[str, Path], config: RLConfig, m: MOPDConfig, n: int = 24) -> dict[tuple[str, str], Acceptance]:
    """(checkpoint, "greedy" or "sampled") -> acceptance on n held-out questions, answered by the last of the checkpoints: all have one trunk."""
    models, last = {name: nemotron.load_checkpoint(x).to(config.device).eval() for name, x in folders.items()}, list(folders)[-1]
    asked, out = sft.round_robin(questions_of(d, n, config, config.seed, "held_out") for d in domains_of(config))[:n], {}
    for way, engine in (("greedy", lambda model, prompts, s: sampled(model, prompts, replace(s, temperature=0.0))), ("sampled", sampled)):
        drawn = answer(models[last], asked, config, Tokenizer.load(folders[last]), engine)
        out |= {(name, way): acceptance(model, drawn, m.depths, way == "greedy") for name, model in models.items()}
    return out


# %% 12 · Tables and figure

def score(folder: Path, asked: dict[str, list[tasks.Task]], config: RLConfig) -> dict[str, np.ndarray]:
    """domain -> 1 or 0 for each question, greedy, mode regular."""
    model, every = nemotron.load_checkpoint(folder).to(config.device), [task for some in asked.values() for task in some]
    right = iter(sft.play(model, Tokenizer.load(folder), every, "regular", config.max_tokens))
    return {domain: np.array([next(right).score for _ in some]) for domain, some in asked.items()}


def recovery_interval(student: np.ndarray, before: np.ndarray, teacher: np.ndarray, draws: int = 4000) -> tuple[float, float] | None:
    """95 % interval of the recovery over draws of the questions, with replacement; None where the teacher's gain itself is not clear of 0."""
    pick = np.random.default_rng(0).integers(len(before), size=(draws, len(before)))
    s, b, t = (x[pick].mean(1) for x in (student, before, teacher))
    return None if np.quantile(t - b, 0.025) <= 0 else tuple(np.quantile((s - b) / np.maximum(t - b, 0.5 / len(before)), [0.025, 0.975]).tolist())


def print_recovery(scores: dict[str, dict[str, np.ndarray]]) -> dict[str, float | None]:
    """Held-out accuracy by stage, as the report's table; scores: stage -> domain -> answers, "teacher" and the last MOPD among the stages."""
    stages, table, out, last = list(scores), [], {}, [name for name in scores if name.startswith("MOPD")][-1]
    cell = lambda x: "{:.0%} ({:.0%} to {:.0%})".format(x.mean(), *sft.wilson(x.sum(), len(x)))
    for domain, before in scores["RLVR"].items():
        mine, teacher = [scores[name].get(domain) for name in stages], scores["teacher"].get(domain)
        gap = teacher is not None and teacher.mean() > before.mean()
        out[domain] = (recovery_rate(scores[last][domain].mean(), before.mean(), teacher.mean()) or 0.0) if gap else None
        interval = recovery_interval(scores[last][domain], before, teacher) if gap else None
        shown = "no teacher" if teacher is None else "not ahead" if not gap else f"{out[domain]:.0%}, " + (
            "{:.0%} to {:.0%}".format(*interval) if interval else "gap not clear")
        table.append([f"{domain} ({len(before)})", *("-" if x is None else cell(x) for x in mine), shown])
    nvfp4.print_table(f"held-out questions answered exactly (95 % interval), and recovery = ({last} - RLVR) / (teacher - RLVR)",
                      ["domain (questions)", *stages, "recovery"], table)
    return out


def plot(scores: dict[str, dict[str, np.ndarray]], drafts: dict[tuple[str, str], Acceptance], path: Path) -> None:
    """Accuracy by stage and domain, and the acceptance of drafts by place, before and after boosting."""
    (fig, (left, right)), colours = nvfp4.new_figure(columns=2, width=7.2), ("#9aa5b1", "#2c6fa6", "#c0392b", "#7d3c98", "#c9a227")
    domains, width = list(scores["RLVR"]), 0.8 / len(scores)
    for i, (stage, colour) in enumerate(zip(scores, colours)):
        mine = [(x, scores[stage][d]) for x, d in enumerate(domains) if d in scores[stage]]
        shares, ends = [y.mean() for _, y in mine], np.array([sft.wilson(y.sum(), len(y)) for _, y in mine]).T
        left.bar([x + (i - (len(scores) - 1) / 2) * width for x, _ in mine], shares, 0.92 * width, yerr=np.abs(ends - shares), color=colour,
                 label=stage, error_kw=dict(elinewidth=1, ecolor="0.35"))
    left.set_xticks(range(len(domains)), domains, rotation=20)
    top = max(sft.wilson(x.sum(), len(x))[1] for by in scores.values() for x in by.values())
    left.set(ylim=(0, 1.2 * top), ylabel="held-out questions answered exactly", title="Exact answers by stage and domain")
    left.legend(frameon=False, fontsize=9, ncols=len(scores), loc="upper center")
    for (name, way), x in drafts.items():
        right.plot(range(1, len(x.by_draft) + 1), x.by_draft, "o-" if way == "greedy" else "o--", color=colours[1 + (name != "before")],
                   label=f"{name} boosting, {way}: {x.length:.2f} tokens a pass")
    right.set(xlabel="draft", ylabel="accepted, of those reached", ylim=(0, 1.05), title="MTP drafts accepted by place")
    right.legend(frameon=False, fontsize=9)
    nvfp4.save_figure(fig, path)


# %% 13 · Command

def find_base(config: RLConfig) -> Path:
    if config.base is not None: return Path(config.base)
    home = Path(config.out) / "sft"
    if not pretrain.checkpoints(home): raise ValueError(f"{home} holds no checkpoint: run python 06_sft.py first, or give --base a directory.")
    return pretrain.newest_checkpoint(home)


def main(config: RLConfig) -> None:
    began, m = time.perf_counter(), config.mopd
    nvfp4.writable_folder(config.out)
    base = find_base(config)
    engine = sampled if config.rollout_engine == "sampled" else importlib.import_module("08_infer").rollout_engine(draft=3)      # ours: 2 or 3 won
    student = reinforce(config, base, engine)
    asked = {domain: questions_of(domain, m.held_out, config, config.seed, "held_out") for domain in domains_of(config)}
    scores, teachers = dict(SFT=score(base, asked, config), RLVR=score(student, asked, config)), {}
    for turn, mark in enumerate(["", *(f"-{i}" for i in range(2, m.rounds + 1))], 1):
        teachers = train_teachers(student, teachers, config, m, mark, engine)
        # ours: where nobody teaches, the student of RLVR does; without it such domains fell (arithmetic, 10 to 0 %)
        every = dict.fromkeys(asked, student) | teachers
        student = distil(warm_up(student, teachers, config, m, mark, engine), every, config, m, mark, engine)
        scores[f"MOPD{turn}"] = score(student, asked, config)
    scores["teacher"] = {domain: score(folder, {domain: asked[domain]}, config)[domain] for domain, folder in teachers.items()}
    boosted = boost_mtp(student, config, m, engine)
    drafts = measure_drafts(dict(before=student, after=boosted), config, m)
    recovery = print_recovery(scores)
    nvfp4.print_table(f"tokens a pass of the trunk yields with {m.depths} drafts, and share accepted by place (Ultra: 4.387 to 4.584 tokens greedy, "
                      "4.165 to 4.331 at temperature 1)", ["head", "tokens", *map(str, range(1, m.depths + 1))],
                      [[f"{name} boosting, {way}", x.length, *(f"{y:.0%}" for y in x.by_draft)] for (name, way), x in drafts.items()])
    plot(scores, drafts, Path(config.out) / "07_rlvr_mopd.png")
    tidy = lambda x: None if x is None else round(float(x), 4)
    nvfp4.write_row(config.out, "07_rlvr_mopd", base=str(base), seed=config.seed, teachers={d: TEACHERS[d] for d in m.teachers}, rounds=m.rounds,
                    accuracy={stage: {d: tidy(x.mean()) for d, x in by.items()} for stage, by in scores.items()},
                    recovery={d: tidy(x) for d, x in recovery.items()}, drafts={" ".join(key): tidy(x.length) for key, x in drafts.items()},
                    threads=torch.get_num_threads(), seconds=round(time.perf_counter() - began, 1))
    print(f"\ncheckpoint: {boosted}   figure: {Path(config.out) / '07_rlvr_mopd.png'}   {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    nvfp4.run_command(main, RLConfig, __doc__)
