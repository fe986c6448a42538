"""What stage 08 measures of itself: the tour that `make run` ends with, and tokens a second by batch size and number of drafts.

Run:   python 08_infer.py                      # 1 min, CPU: quantize the boosted checkpoint, draft for it, price its caches, ask it in every mode
       python 08_infer.py bench                # tokens a second of a checkpoint
       python 08_infer.py bench --preset super --random-weights --weights w4a16 --forced 0.7     # one H200: sizes alone, acceptance made up
"""
from __future__ import annotations

import importlib
import json
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tqdm import tqdm

from data import tasks, terminal
from data.tokenizer import Tokenizer

infer = importlib.import_module("08_infer")
nvfp4, nemotron, pretrain, sft = infer.nvfp4, infer.nemotron, infer.pretrain, infer.sft


# %% 1 · Speed

class Speed(NamedTuple):
    """tokens_per_s: of answers, their prompts' reading included; kept: share of drafts kept by place, of those whose predecessors were."""
    tokens_per_s: float
    kept: list[float]
    answers: list[list[int]]

    @property
    def tokens_per_pass(self) -> float:
        """One, and every draft that is kept:  .5 .5 -> 1 + .5 + .25 = 1.75"""
        chance, out = 1.0, 1.0
        for share in self.kept: chance *= share; out += chance
        return out


def measure_speed(model: nemotron.Nemotron, prompts: list[list[int]], slots: int, k: int, sampling: nemotron.SamplingParams, **options) -> Speed:
    """Answers all prompts, `slots` at a time, drafting k tokens a pass. The first few tokens, which compile kernels on a GPU, are not timed."""
    engine = infer.Engine(model, slots, max(map(len, prompts)) + sampling.max_tokens, k, **options)
    for i in range(slots): engine.submit(prompts[i % len(prompts)], replace(sampling, max_tokens=2 * k + 2))
    engine.run()
    infer.drafts_kept(engine)      # counts from here on
    ids = [engine.submit(prompt, sampling, place=i) for i, prompt in enumerate(prompts)]
    began = time.perf_counter()
    done = engine.run()
    seconds = time.perf_counter() - began
    answers = [done[i].ids for i in ids]
    return Speed(sum(map(len, answers)) / seconds, engine.acceptance(), answers)


def best_of(speeds: dict[int, Speed]) -> int: return max(speeds, key=lambda k: speeds[k].tokens_per_s)


def print_speeds(title: str, speeds: dict[int, dict[int, Speed]]) -> None:
    """speeds[slots][k]: tokens a second, and in brackets tokens a pass."""
    drafts = list(next(iter(speeds.values())))
    rows = [[f"{slots}", *(f"{x.tokens_per_s:,.0f} ({x.tokens_per_pass:.2f})" for x in by.values()), f"k = {best_of(by)}"]
            for slots, by in speeds.items()]
    nvfp4.print_table(title, ["batch", *(f"k = {k}" for k in drafts), "fastest"], rows)


# %% 2 · Bench

@dataclass(frozen=True)
class BenchConfig:
    """Tokens a second by batch size and number of drafts. Prompts are random ids, answers greedy and of one length."""
    model: Path = Path("out/boosted")      # a checkpoint, quantized or not, or a run's folder: then its newest one
    preset: str | None = None              # with --random-weights: an untrained model of this size instead
    random_weights: bool = False
    weights: Literal["16bit", "w4a16", "w4a4"] = "16bit"      # form of random weights; in codes they are drawn as codes
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batches: tuple[int, ...] = (1, 8, 32)
    drafts: tuple[int, ...] = (0, 1, 2, 3, 5, 7)
    forced: float | None = None            # keep every draft with this chance, whatever it says: the text is not the model's
    rollback: Literal["snapshot", "replay"] = "snapshot"
    state_format: str = "fp32"             # of the SSM states: fp32, fp16, fp16_sr, int8 or int8_sr
    kv_format: str | None = None           # fp32, bf16 or fp8; as the weights when not given
    prompt_tokens: int = 32
    tokens: int = 128                      # of each answer
    ahead: int | None = None               # windows between two looks of the host, ours: 8 on a GPU, 1 on a CPU
    out: Path = Path("out")                # where result rows go

    def __post_init__(self):
        least = dict(prompt_tokens=self.prompt_tokens, tokens=self.tokens, batches=min(self.batches, default=0),
                     ahead=1 if self.ahead is None else self.ahead)
        if small := [name for name, n in least.items() if n < 1]: raise ValueError(f"--{small[0].replace('_', '-')} must be at least 1.")
        if not self.drafts or min(self.drafts) < 0: raise ValueError("--drafts takes numbers from 0 on, at least one.")
        if self.forced is not None and not 0 <= self.forced <= 1: raise ValueError(f"--forced {self.forced} is a chance: from 0 to 1.")
        if self.random_weights != (self.preset is not None):
            raise ValueError("--preset and --random-weights go together: a preset has no trained weights.")


def sized_model(config: BenchConfig) -> nemotron.Nemotron:
    """The untrained model that the flags ask for. ValueError where it does not fit, before anything is drawn."""
    device = nvfp4.demo_device("auto") if config.device == "auto" else config.device
    if device == "cuda" and not torch.cuda.is_available(): raise ValueError("--device cuda: there is no CUDA device here; use cpu.")
    sizes, dtype = nemotron.preset(config.preset), torch.float32 if device == "cpu" else torch.bfloat16
    recipe = None if config.weights == "16bit" else infer.Recipe(weights_only=config.weights == "w4a16")
    with torch.device("meta"): shapes = list(nemotron.released_tensors(nemotron.Nemotron(sizes)))
    shares = infer.count_bits(shapes, recipe or infer.Recipe(precision=(), kv_fp8=False))
    need = sum(s["bits"] * (2 if fmt == "bf16" and device == "cpu" else 1) for (fmt, _), s in shares.items()) / 8
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else pretrain._physical_memory()
    if need > 0.95 * free:
        raise ValueError(f"preset {config.preset} in {config.weights} takes {nemotron.short(need, 'B')} and {nemotron.short(free, 'B')} are there: "
                         "choose --weights w4a16, or a smaller preset.")
    print(f"preset {config.preset}, random weights ({config.weights}): {nemotron.short(need, 'B')} on {device}")
    return infer.random_model(sizes, recipe, device, dtype)


def bench(config: BenchConfig) -> None:
    nvfp4.writable_folder(config.out)
    model = sized_model(config) if config.random_weights else infer.open_model(config.model, config.device)[0]
    drafts = [k for k in config.drafts if k == 0 or hasattr(model, "mtp")] or [0]
    if len(drafts) < len(config.drafts): print("the model has no MTP head: it is measured without drafts")
    low, high = 12, model.config.vocab       # ids below are special tokens
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(low, high, (max(config.batches), config.prompt_tokens), generator=draw).tolist()
    sampling = nemotron.SamplingParams(max_tokens=config.tokens, temperature=0.0, stop_ids=())
    ahead = config.ahead or (8 if model.lm_head.weight.is_cuda else 1)
    options = dict(rollback=config.rollback, state_format=config.state_format, kv_format=config.kv_format, forced=config.forced, ahead=ahead)
    speeds: dict[int, dict[int, Speed]] = {}
    where = torch.cuda.get_device_name() if model.lm_head.weight.is_cuda else f"{torch.get_num_threads()} CPU threads"
    about = dict(model=None if config.random_weights else str(config.model), preset=config.preset, weights=config.weights if config.preset else None,
                 where=where, **options)
    for slots, k in tqdm(list(product(config.batches, drafts)), desc="bench", leave=False):
        speed = speeds.setdefault(slots, {})[k] = measure_speed(model, prompts[:slots], slots, k, sampling, **options)
        nvfp4.write_row(config.out, "08_bench", **about, batch=slots, draft=k, tokens_per_s=round(speed.tokens_per_s, 1),
                        kept=[round(x, 4) for x in speed.kept])
    made_up = f"; every draft kept with chance {config.forced}, MADE UP, the text is not the model's" if config.forced is not None else ""
    print_speeds(f"tokens/s (in brackets: tokens a pass of the trunk), {config.tokens} tokens each, {where}{made_up}", speeds)


# %% 3 · Tour

@dataclass(frozen=True)
class TourConfig:
    """What stage 08 shows of the boosted checkpoint; the tables of `make run`."""
    model: Path = Path("out/boosted")      # a checkpoint, or a run's folder: then its newest one
    out: Path = Path("out")                # quantized checkpoint, figure and results.jsonl go here
    questions: int = 24                    # held-out ones, for speed and acceptance
    drafts: tuple[int, ...] = (1, 2, 3, 5, 7)      # beside none
    tokens: int = 16_384                   # to calibrate on, as in quantize

    def __post_init__(self):
        if self.questions < 1: raise ValueError(f"--questions {self.questions}: the tour asks at least one.")
        if min(self.drafts, default=0) < 1: raise ValueError("--drafts takes numbers from 1 on, at least one.")


MODES = {"off": ("off", None), "medium": ("medium", None), "regular": ("regular", None), "regular, budget of 8 tokens": ("regular", 8)}


def ask_questions(n: int) -> list[tasks.Task]:
    """Held-out questions without tools, of the families that stages 06 and 07 train on, in turn; the same for the same n."""
    drawn = [tasks.draw(family, 0, n, 0, "held_out", at_most=True) for family in tasks.EASY]
    return sft.round_robin([task for task in group if not task.tools] for group in drawn)[:n]


def as_prompts(asked: list[tasks.Task], tokenizer: Tokenizer) -> list[list[int]]:
    return [sft.render_chat(sft.opening(task), "regular", tokenizer=tokenizer, generation_prompt=True)[0] for task in asked]


def student_of(boosted: Path) -> Path | None:
    """The checkpoint whose head was boosted, as stage 07 noted it; None where it is gone."""
    about = boosted / "pretrain.json"
    folder = Path(json.loads(about.read_text())["data"]) if about.exists() else Path()
    return folder if (folder / "config.json").exists() else None


def cache_table(model: nemotron.Nemotron, tokens: int = 2048, many: int = 65_536) -> int:
    """Prints bytes of one slot by format, for this model and for Ultra; returns the length at which Ultra's FP8 keys and values weigh as much as its
    fp32 states. One cell of a cache is for no token, so both hold one token less."""
    with torch.device("meta"): ultra = nemotron.Nemotron(nemotron.preset("ultra")).bfloat16()
    rows, short = [], lambda n: nemotron.short(n, "B")
    for kv, state, k, rollback in (("bf16", "fp32", 0, "snapshot"), ("fp8", "fp32", 0, "snapshot"), ("fp8", "fp16_sr", 0, "snapshot"),
                                   ("fp8", "int8_sr", 0, "snapshot"), ("fp8", "fp16_sr", 5, "snapshot"), ("fp8", "fp16_sr", 5, "replay")):
        label = f"KV {kv}, states {state}" + (f", {k} drafts, {rollback}" if k else "")
        costs = [infer.SlotCaches(m, 1, n - 1, k, rollback, state, kv).bytes_per_slot() for m, n in ((model, tokens), (ultra, many))]
        rows.append([label, *(short(x) for cost in costs for x in (cost["kv"], cost["state"] + cost["kept"], sum(cost.values())))])
        if (kv, state, k) == ("fp8", "fp32", 0): equal = costs[1]["state"] * many // costs[1]["kv"]
    header = ["", f"this model, {tokens:,} tokens: KV", "states", "all", f"Ultra, {many:,} tokens: KV", "states", "all"]
    nvfp4.print_table("what one slot of the caches occupies", header, rows)
    print(f"  Ultra's fp32 states weigh as much as its FP8 keys and values of {equal:,} tokens.")
    return equal


def show_modes(model: nemotron.Nemotron, tokenizer: Tokenizer, task: tasks.Task) -> dict[str, dict]:
    """One question in every mode, greedy: tokens, right or wrong, and the text."""
    engine, rows, out = infer.Engine(model, 1, 1024, tokenizer=tokenizer), [], {}
    for label, (mode, budget) in MODES.items():
        sampling = infer.SamplingParams(max_tokens=256, temperature=0.0, budget=budget, margin=8)
        answer, = infer.generate_with_budget(engine, [sft.opening(task)], mode, sampling)
        right = tasks.ENVIRONMENTS[task.family].score(task, answer.text, thinking=mode != "off") == 1
        out[label] = dict(tokens=len(answer.ids), right=right, text=answer.text)
        rows.append([label, len(answer.ids), "right" if right else "wrong", terminal.clean(answer.text.replace("\n", " ⏎ "))])
    nvfp4.print_table(f"a held-out question in every mode: {task.prompt}   (right: {task.answer})", ["mode", "tokens", "", "the model wrote"], rows)
    return out


def plot(speeds: dict[int, dict[int, Speed]], heads: dict[str, Speed], path: Path) -> None:
    """Left: speed against the number of drafts, relative to none. Right: drafts kept by place, before and after boosting."""
    fig, (left, right) = nvfp4.new_figure(columns=2, width=6.8)
    for (slots, by), colour in zip(speeds.items(), ("#2c6fa6", "#c9a227")):
        left.plot(list(by), [x.tokens_per_s / by[0].tokens_per_s for x in by.values()], "o-", color=colour, linewidth=2,
                  label=f"batch {slots}: {by[0].tokens_per_s:,.0f} tokens/s without drafts")
    passes = next(iter(speeds.values()))
    left.plot(list(passes), [x.tokens_per_pass for x in passes.values()], ":", color="0.4", label="tokens a pass of the trunk, batch 1")
    left.axhline(1, color="0.6", linewidth=0.8)
    left.set(title="What drafts yield, and what is left of it as speed", xlabel="drafts a pass, k", ylabel="speed against no drafts", ylim=(0, None))
    styles = dict(before=dict(color="0.5", linestyle="--", markerfacecolor="white"), after=dict(color="#2c6fa6"))
    for name, x in heads.items():
        right.plot(range(1, len(x.kept) + 1), x.kept, marker="o", linewidth=2, **styles[name],
                   label=f"{name} boosting: {x.tokens_per_pass:.2f} tokens a pass")
    right.set(title="Drafts kept, by place", xlabel="place of the draft", ylabel="share kept where all before were", ylim=(0, 1))
    for axes in (left, right): axes.legend(frameon=False, fontsize=9)
    nvfp4.save_figure(fig, path)


def tour(config: TourConfig) -> None:
    began = time.perf_counter()
    base = infer.newest(config.model)
    nvfp4.writable_folder(config.out)
    bill = infer.quantize_command(infer.QuantizeConfig(base=base, out=config.out / "quantized", tokens=config.tokens))
    model, tokenizer = infer.open_model(base, "cpu")
    asked = ask_questions(config.questions)
    prompts, sampling, speeds = as_prompts(asked, tokenizer), nemotron.SamplingParams(max_tokens=96, temperature=0.0), {}
    # one round after the other, so that a busy moment of the machine does not hit one k alone; the faster of two counts
    for _, slots, k in tqdm(list(product(range(2), (1, 8), (0, *config.drafts))), desc="speed", leave=False):
        by = speeds.setdefault(slots, {})
        found = measure_speed(model, prompts if slots > 1 else prompts[:max(1, len(prompts) // 3)], slots, k, sampling)
        by[k] = max(by.get(k, found), found, key=lambda speed: speed.tokens_per_s)
    print_speeds(f"tokens/s on held-out questions, greedy (in brackets: tokens a pass of the trunk), {torch.get_num_threads()} thread(s)", speeds)
    all_equal = all(x.answers == by[0].answers for by in speeds.values() for x in by.values())
    print(f"  Every answer with drafts is {'' if all_equal else 'NOT '}the answer without, token for token.")

    student, deepest = student_of(base), max(config.drafts)
    before = {} if student is None else dict(before=measure_speed(infer.open_model(student, "cpu")[0], prompts, 8, deepest, sampling))
    heads = before | dict(after=speeds[8][deepest])
    places = [str(place) for place in range(1, deepest + 1)]
    nvfp4.print_table(f"share of {deepest} drafts kept by place, of those whose predecessors were", ["head", *places, "tokens a pass"],
                      [[f"{name} boosting", *(f"{y:.0%}" for y in x.kept), x.tokens_per_pass] for name, x in heads.items()])
    equal_at = cache_table(model)
    modes = show_modes(model, tokenizer, asked[0])
    plot(speeds, heads, config.out / "08_infer.png")
    nvfp4.write_row(config.out, "08_infer", base=str(base), bits_per_element=bill["bits_per_element"], losses=bill["losses"],
                    tokens_per_s={slots: {k: round(x.tokens_per_s, 1) for k, x in by.items()} for slots, by in speeds.items()},
                    same_answers=all_equal, kept={name: [round(y, 4) for y in x.kept] for name, x in heads.items()},
                    tokens_per_pass={name: round(x.tokens_per_pass, 4) for name, x in heads.items()}, equal_at_tokens=equal_at,
                    modes=modes, threads=torch.get_num_threads(), seconds=round(time.perf_counter() - began, 1))
    print(f"\nfigure: {config.out / '08_infer.png'}   quantized: {config.out / 'quantized'}   {time.perf_counter() - began:.0f} s"
          "\npython 08_infer.py chat talks to the model")


COMMANDS = {TourConfig: tour, BenchConfig: bench}
