"""Speed of stage 08's engine beside what a user would pick instead, and what drafting and budgets buy.

Every contender decodes greedily; its time holds the reading of the prompts. Each round times each contender once, in turn; a row holds medians.
Random weights never agree with a random head, so on them drafts are accepted by a coin (--forced), which the rows say: these show the cost of
drafting and of rolling back, not text. Real acceptances are those of --only drafts, on a trained checkpoint, where all draft lengths write the
same text.

Run:   python experiments/bench_infer.py                               # CPU: preset tiny beside transformers; rows to experiments/results.jsonl
       python experiments/bench_infer.py --preset small                # one H200: with mamba_ssm and causal_conv1d on PYTHONPATH for the peer
       python experiments/bench_infer.py --preset nano --batch 1 --no-peer --forced
       python experiments/bench_infer.py --preset super --batch 1 --no-peer --forced       # random 4-bit codes, 16-bit inputs
       python experiments/bench_infer.py --only drafts budgets         # figures drafts.png and budgets.png, on the newest of out/boosted or out/sft
       python experiments/bench_infer.py --preset small --only drafts --train-steps 300 --text stories     # trained here, then measured
"""
from __future__ import annotations

import importlib
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parent.parent


def stage(name: str):
    """A numbered stage or another experiment, importable from this folder."""
    for folder in (ROOT, ROOT / "experiments"):
        if str(folder) not in sys.path: sys.path.insert(0, str(folder))
    return importlib.import_module(name)


@dataclass(frozen=True)
class Config:
    """Times stage 08's engine."""
    preset: Literal["tiny", "small", "nano", "super"] = "tiny"
    only: tuple[Literal["speed", "drafts", "budgets"], ...] = ("speed",)
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: a GPU where one is; bf16 there, fp32 on a CPU
    batch: tuple[int, ...] = (1, 32)        # slots, all of them busy
    prompt: int = 128                       # tokens of each prompt
    new: int = 256                          # tokens of each answer
    ahead: tuple[int, ...] = (1, 8)         # windows between two looks of the host, compared; drafts take the last of them
    rounds: int = 5                         # timed rounds, after one to warm up
    peer: bool = True                       # also time transformers' generate on a model of the same sizes
    forced: tuple[float, ...] = (0.5, 0.7, 0.9)         # chances at which drafts are kept, whatever they say; nothing = no drafts
    forced_drafts: int = 5                  # of each window then  [Ultra: rollouts draft 5]
    rollback: Literal["snapshot", "replay"] = "snapshot"        # how drafts are taken back
    trained: Path | None = None             # drafts, budgets: a checkpoint or a run's folder; nothing = the newest in out/boosted, else out/sft
    train_steps: int = 0                    # drafts, budgets: train the preset for so many steps first, and measure that model
    draft: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)   # drafts a window, compared
    draft_batch: tuple[int, ...] = (1, 8, 32)
    text: Literal["questions", "stories"] = "questions"     # what drafts continue: held-out questions to their end, or prompts of stories
    questions: int = 32                     # held-out questions of each family, for drafts and budgets
    budgets: tuple[int, ...] = (4, 8, 16, 24, 32)       # tokens of thought at which a trace is closed
    margin: int = 8                         # beyond a budget, until a newline comes, ours: traces are short here  [Card: 500]
    max_tokens: int = 96                    # of an answer to a question
    threads: int = 2                        # torch threads on a CPU
    seed: int = 0
    out: Path = ROOT / "experiments"        # results.jsonl gets the rows, drafts.png and budgets.png the figures

    def __post_init__(self):
        for name in ("batch", "ahead", "draft", "draft_batch"):
            if not getattr(self, name): raise ValueError(f"{name} is empty: give at least one number.")
        for name in ("prompt", "new", "rounds", "questions", "max_tokens", "threads", "forced_drafts"):
            if getattr(self, name) < 1: raise ValueError(f"{name} = {getattr(self, name)} must be at least 1.")
        if self.prompt < 2: raise ValueError("prompt = 1: give at least 2, so that there is something to read before decoding begins.")

    @property
    def where(self) -> str: return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device

    @property
    def dtype(self) -> torch.dtype: return torch.bfloat16 if self.where == "cuda" else torch.float32


# %% 1 · Models, engines and time

def random_model(config: Config):
    """A preset with random weights, drawn in the form that it will have: Super as 4-bit codes for 16-bit inputs; bf16 would not fit."""
    nemotron, infer = stage("04_model"), stage("08_infer")
    recipe = infer.Recipe(weights_only=True) if config.preset == "super" else None
    return infer.random_model(nemotron.preset(config.preset), recipe, config.where, config.dtype, config.seed)


def peer_model(config: Config):
    """transformers' model of the same sizes, and the name under which its rows stand."""
    nemotron, bench_cpu = stage("04_model"), stage("bench_cpu")
    sizes, default = nemotron.preset(config.preset), torch.get_default_dtype()
    torch.set_default_dtype(config.dtype)
    try:
        with torch.device(config.where): model = bench_cpu.peer_model(sizes, sizes.chunk).eval()
    finally: torch.set_default_dtype(default)
    found = [name for name in ("mamba_ssm", "causal_conv1d") if config.where == "cuda" and importlib.util.find_spec(name)]
    return model, f"transformers, {' and '.join(found) or 'no kernels'}"


def wait(config: Config) -> None:
    if config.where == "cuda": torch.cuda.synchronize()


def finished(config: Config, f: Callable[[], object]) -> Callable[[], object]:
    """f, and the GPU's work is done when it returns."""
    def run():
        out = f()
        wait(config)
        return out
    return run


def decode_all(engine, prompts: list[list[int]], sampling) -> list:
    """The answers, in the order of the prompts. An engine serves again and again: what it records once it keeps."""
    ids = [engine.submit(prompt, sampling, place=i) for i, prompt in enumerate(prompts)]
    answers = engine.run()
    return [answers[i] for i in ids]


def random_prompts(config: Config, count: int, vocab: int) -> list[list[int]]:
    return torch.randint(12, vocab, (count, config.prompt), generator=torch.Generator().manual_seed(config.seed)).tolist()


def count_launches(config: Config, engine, prompts: list[list[int]], sampling) -> dict:
    """What one window asks of the device, by torch.profiler: kernels and milliseconds of GPU work, on a CPU operators of ATen."""
    from torch.profiler import ProfilerActivity, profile
    ahead, engine.ahead = engine.ahead, 1       # steps of one window
    steps = max(1, min(8, config.new // (engine.caches.draft + 1) - 3))     # two come before, and no answer may end meanwhile
    for i, prompt in enumerate(prompts): engine.submit(prompt, sampling, place=i)
    while engine.queue or not all(request.ready for request in engine.owners.values()): engine.step()
    engine.step(); wait(config)
    before = {r.id: len(r.answer.ids) for r in engine.owners.values()}
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if config.where == "cuda" else [])]) as record:
        for _ in range(steps): engine.step()
        wait(config)
    written = sum(len(r.answer.ids) - before[r.id] for r in engine.owners.values())
    for id in before: engine.cancel(id)
    engine.run()
    engine.ahead = ahead
    events, out = record.key_averages(), dict(tokens_a_step=round(written / steps, 2))
    if config.where != "cuda": return out | dict(operators_a_step=round(sum(e.count for e in events if e.key.startswith("aten::")) / steps))
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    return out | dict(kernels_a_step=round(sum(e.count for e in kernels) / steps),
                      busy_ms_a_step=round(sum(e.self_device_time_total for e in kernels) / 1e3 / steps, 3))


# %% 2 · Speed

def speed(config: Config) -> list[dict]:
    """A row for each batch size and contender: ours plain with each number of windows ahead, ours with forced acceptances, transformers."""
    infer, bench_cpu = stage("08_infer"), stage("bench_cpu")
    sampling = infer.SamplingParams(max_tokens=config.new, temperature=0.0, top_p=1.0, stop_ids=())
    model, rows = random_model(config), []
    ours = {"ours" if n == 1 else f"ours, {n} windows between looks": dict(ahead=n) for n in config.ahead} | {
        f"ours, {config.forced_drafts} drafts kept with chance {p:g}, forced":
        dict(draft=config.forced_drafts, rollback=config.rollback, forced=p, ahead=config.ahead[-1])
        for p in (config.forced if hasattr(model, "mtp") else ())}
    peer, peer_name = peer_model(config) if config.peer else (None, "")
    for batch in config.batch:
        prompts, contenders, engines = random_prompts(config, batch, model.config.vocab), {}, {}
        capacity, read = config.prompt + config.new + 1, max(512, batch * config.prompt)        # all prompts in one pass, as the peer reads them
        for name, options in ours.items():
            engine = engines[name] = infer.Engine(model, batch, capacity, prefill_tokens=read, **options)
            contenders[name] = finished(config, lambda engine=engine, prompts=prompts: decode_all(engine, prompts, sampling))
        if peer is not None:
            ids_bt, exactly = torch.tensor(prompts, device=config.where), dict(max_new_tokens=config.new, min_new_tokens=config.new)
            contenders[peer_name] = finished(config, lambda ids_bt=ids_bt, exactly=exactly: peer.generate(
                ids_bt, attention_mask=torch.ones_like(ids_bt), do_sample=False, pad_token_id=0, **exactly))
        times = bench_cpu.interleaved(contenders, config.rounds)
        for name, seconds in times.items():
            row = dict(what="speed", contender=name, batch=batch, tokens_per_s=round(batch * config.new / statistics.median(seconds), 1),
                       slowest=round(batch * config.new / max(seconds), 1), fastest=round(batch * config.new / min(seconds), 1))
            if engine := engines.get(name):
                row["ahead"] = engine.ahead
                if config.peer: row["ratio"] = round(statistics.median(p / o for p, o in zip(times[peer_name], seconds)), 2)
                if engine.caches.draft: row["acceptance"] = [round(x, 3) for x in engine.acceptance()]
                row |= count_launches(config, engine, prompts, sampling)
            row["peak_gib"] = peak_memory(config, contenders[name])
            rows.append(row)
    return rows


def peak_memory(config: Config, run: Callable[[], object]) -> float | None:
    """GiB that PyTorch holds on the GPU at most during one more run, the other contenders' models and caches included; None on a CPU.
    NOTE: "allocated" would overlook the memory of recorded steps."""
    if config.where != "cuda": return None
    torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    run()
    return round(torch.cuda.max_memory_reserved() / 2**30, 2)


def print_speed(rows: list[dict], config: Config) -> None:
    launches = "kernels a step" if config.where == "cuda" else "operators a step"
    show = lambda x, form: "" if x is None else format(x, form)
    stage("01_nvfp4").print_table(
        f"preset {config.preset}, {str(config.dtype)[6:]}, {config.prompt} tokens read and {config.new} written, {config.rounds} rounds in turn",
        ["contender", "batch", "tokens/s", "(slowest", "fastest)", "× peer", launches, "tokens a step", "GPU ms a step", "peak GiB"],
        [[r["contender"], r["batch"], f"{r['tokens_per_s']:,.0f}", f"({r['slowest']:,.0f}", f"{r['fastest']:,.0f})", show(r.get("ratio"), ".2f"),
          r.get("kernels_a_step", r.get("operators_a_step", "")), show(r.get("tokens_a_step"), ".1f"), show(r.get("busy_ms_a_step"), ".2f"),
          show(r["peak_gib"], ".2f")] for r in rows])


# %% 3 · Draft lengths on a trained model

def train(config: Config) -> Path:
    """Trains the preset for a short while on stage 05's own text -> the run's folder."""
    pretrain, home = stage("05_pretrain"), Path(tempfile.mkdtemp(prefix="bench-infer-"))
    # ours: bigger steps and a lower rate for a bigger model, so that a minute on a GPU makes drafts that are often right
    more = dict(precision="bf16", batch=32, seq=512, lr=1e-3, lr_min=1e-5) if config.where == "cuda" and config.preset != "tiny" else {}
    pretrain.main(pretrain.PretrainConfig(preset=config.preset, steps=config.train_steps, device=config.where, out=home, branches=(), eval_windows=2,
                                          **more))
    return home / "pretrain"


def trained_model(config: Config):
    """(name, model on its device in its dtype, tokenizer) of --train-steps, --trained or the newest checkpoint here."""
    nemotron, states, pretrain = stage("04_model"), stage("ssm_states"), stage("05_pretrain")
    base = train(config) if config.train_steps else config.trained
    if config.where == "cpu": folder, model, tokenizer = states.trained(base)
    else:
        base = next((h for h in ([base] if base else [ROOT / "out" / name for name in ("boosted", "sft")]) if h.exists()), None)
        if base is None: raise ValueError("no trained checkpoint in out/boosted or out/sft: give --trained FOLDER or --train-steps.")
        folder = pretrain.newest_checkpoint(base) if pretrain.checkpoints(base) else base
        model = nemotron.load_checkpoint(folder, device=config.where, dtype=config.dtype).eval().requires_grad_(False)
        tokenizer = stage("data.tokenizer").Tokenizer.load(folder)
    if not hasattr(model, "mtp"): raise ValueError(f"{folder} has no prediction head: nothing can draft.")
    return f"{folder.parent.name}/{folder.name}" if not config.train_steps else f"{config.preset}, {config.train_steps} steps", model, tokenizer


def texts(config: Config, tokenizer, count: int) -> tuple[list[list[int]], object]:
    """(prompts, how to sample): held-out questions that are answered to their end, or beginnings of stories that go on for --new tokens."""
    infer, sft = stage("08_infer"), stage("06_sft")
    if config.text == "questions":
        asked = stage("ssm_states").held_out_questions(config.questions)
        prompts = [sft.render_chat(sft.opening(task), "regular", tokenizer=tokenizer, generation_prompt=True)[0] for task in asked]
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(config.seed)).tolist()      # families mixed
        return [prompts[i] for i in order][:count], infer.SamplingParams(config.max_tokens, temperature=0.0)
    corpus, ids = stage("data.corpus"), []
    for text in corpus.stories_and_facts(config.seed + 1):
        ids += tokenizer.encode(text)
        if len(ids) >= count * config.prompt: break
    prompts = [ids[i * config.prompt:(i + 1) * config.prompt] for i in range(count)]
    return prompts, infer.SamplingParams(config.new, temperature=0.0, stop_ids=())


def tokens_a_pass(offered: list[int], accepted: list[int]) -> float:
    """Of drafts by place; every window also brings one token of its own.    offered 10 6, accepted 6 3 -> 1.9;  no drafts -> 1"""
    return 1 + sum(accepted) / max(offered[0], 1) if offered else 1.0


def draft_lengths(config: Config) -> list[dict]:
    """A row for each batch size and number of drafts: tokens/s, acceptance by place, tokens a pass. The number of requests is the same for every
    length, twice the slots and at least 16 of them, so that slots are filled again as they come free."""
    infer, bench_cpu, rows = stage("08_infer"), stage("bench_cpu"), []
    name, model, tokenizer = trained_model(config)
    for batch in config.draft_batch:
        prompts, sampling = texts(config, tokenizer, max(16, 2 * batch))
        engines = {k: infer.Engine(model, batch, max(map(len, prompts)) + sampling.max_tokens + 1, draft=k, rollback=config.rollback,
                                   tokenizer=tokenizer, prefill_tokens=2048, ahead=config.ahead[-1]) for k in config.draft}
        written = {}
        def run(k, engine, prompts=prompts, sampling=sampling, written=written):
            written[k] = [a.ids for a in decode_all(engine, prompts, sampling)]
        times = bench_cpu.interleaved({k: finished(config, lambda k=k, e=e: run(k, e)) for k, e in engines.items()}, config.rounds)
        for k, seconds in times.items():
            engine, tokens = engines[k], sum(map(len, written[k]))
            infer.drafts_kept(engine)       # counted anew, without the windows that run on behind an answer's end
            engine.ahead = 1
            run(k, engine)
            offered, accepted = (z.tolist() for z in (engine.running.offered_k, engine.running.accepted_k))
            rows.append(dict(what="drafts", model=name, text=config.text, batch=batch, draft=k, rollback=config.rollback, ahead=config.ahead[-1],
                             requests=len(prompts), tokens=tokens, tokens_per_s=round(tokens / statistics.median(seconds), 1),
                             slowest=round(tokens / max(seconds), 1), fastest=round(tokens / min(seconds), 1),
                             acceptance=[round(x, 4) for x in engine.acceptance()],
                             tokens_a_pass=round(tokens_a_pass(offered, accepted), 3),
                             same_text=sum(a == b for a, b in zip(written[k], written[config.draft[0]])) / len(prompts)))
        for row in rows[-len(times):]:
            base = next((r for r in rows[-len(times):] if r["draft"] == 0), None)
            row["speedup"] = base and round(statistics.median(p / o for p, o in zip(times[0], times[row["draft"]])), 3)
    return rows


def best_drafts(rows: list[dict]) -> dict[int, int]:
    """{batch: the fastest number of drafts}"""
    return {batch: max((r for r in rows if r["batch"] == batch), key=lambda r: r["tokens_per_s"])["draft"]
            for batch in dict.fromkeys(r["batch"] for r in rows)}


def print_drafts(rows: list[dict]) -> None:
    stage("01_nvfp4").print_table(
        f"drafts of {rows[0]['model']}, greedy, {rows[0]['text']}, rollback by {rows[0]['rollback']}",
        ["batch", "drafts", "tokens/s", "(slowest", "fastest)", "× no drafts", "tokens a pass", "same text", "acceptance by place"],
        [[r["batch"], r["draft"], f"{r['tokens_per_s']:,.0f}", f"({r['slowest']:,.0f}", f"{r['fastest']:,.0f})",
          "" if r["speedup"] is None else r["speedup"], r["tokens_a_pass"], f"{r['same_text']:.0%}", " ".join(f"{x:.2f}" for x in r["acceptance"])]
         for r in rows])
    print("\nfastest: " + ", ".join(f"{k} drafts at batch {batch}" for batch, k in best_drafts(rows).items()))


def plot_drafts(rows: list[dict], path: Path) -> None:
    """Figure: speed against the number of drafts, a line per batch size, the best marked; acceptance by place."""
    nvfp4, best = stage("01_nvfp4"), best_drafts(rows)
    fig, (left, right) = nvfp4.new_figure(columns=2)
    for (batch, k_best), colour in zip(best.items(), ("#1f4e8c", "#3d8b4f", "#e8a33d", "#c0392b", "0.4")):
        mine = [r for r in rows if r["batch"] == batch]
        first = mine[0]["tokens_per_s"]
        left.plot([r["draft"] for r in mine], [r["tokens_per_s"] / first for r in mine], marker=".", color=colour,
                  label=f"batch {batch}: {first:,.0f} tokens/s with {mine[0]['draft']}")
        left.plot(k_best, next(r for r in mine if r["draft"] == k_best)["tokens_per_s"] / first, "o", color=colour, markersize=9)
    left.axhline(1, color="0.3", linewidth=1)
    left.set_title("Best draft length (dots): " + ", ".join(f"{k} at batch {b}" for b, k in best.items()))
    left.set_xlabel("drafts a window"); left.set_ylabel(f"tokens/s, relative to {rows[0]['draft']} drafts"); left.legend(frameon=False, fontsize=9)
    largest = [r for r in rows if r["batch"] == max(best) and r["draft"]]
    for i, r in enumerate(largest):
        right.plot(range(1, r["draft"] + 1), r["acceptance"], marker=".", color=(0.1, 0.75 - 0.6 * i / len(largest), 0.45 + 0.4 * i / len(largest)),
                   label=f"{r['draft']} drafts a window")
    right.set_ylim(0, 1.02); right.set_title(f"Drafts kept where those before were, {rows[0]['model']}, batch {max(best)}", fontsize=10.5)
    right.set_xlabel("place in the window"); right.set_ylabel("kept"); right.legend(frameon=False, fontsize=9)
    for ax in (left, right): ax.xaxis.get_major_locator().set_params(integer=True)
    nvfp4.save_figure(fig, path)


# %% 4 · Budgets

def budgets(config: Config) -> list[dict]:
    """A row for each mode without a budget, and for mode regular with each: exact answers to held-out questions and tokens written."""
    infer, sft, states = stage("08_infer"), stage("06_sft"), stage("ssm_states")
    name, model, tokenizer = trained_model(config)
    questions, rows = states.held_out_questions(config.questions), []
    prompts = [sft.render_chat(sft.opening(task), mode, tokenizer=tokenizer, generation_prompt=True)[0] for task in questions for mode in sft.MODES]
    longest = max(map(len, prompts))
    slots, capacity = min(32, len(questions)), longest + config.max_tokens
    engine = stage("08_infer").Engine(model, slots, capacity, draft=2, rollback=config.rollback, tokenizer=tokenizer)
    for mode, budget in [*((mode, None) for mode in ("off", "medium", "regular")), *(("regular", b) for b in config.budgets)]:
        scored = states.ask(engine, questions, mode, infer.SamplingParams(config.max_tokens, temperature=0.0, budget=budget, margin=config.margin))
        low, high = sft.wilson(scored.right, scored.n)
        share = lambda hits, n=scored.n: round(hits / n, 4)
        rows.append(dict(what="budgets", model=name, mode=mode, budget=budget, margin=config.margin, questions=scored.n,
                         accuracy=share(scored.right), low=round(low, 4), high=round(high, 4), tokens=round(scored.tokens / scored.n, 2),
                         closed=share(sum(a.inserted is not None for a in scored.answers)),
                         without_end=share(sum(not a.finished for a in scored.answers))))
    return rows


def print_budgets(rows: list[dict]) -> None:
    stage("01_nvfp4").print_table(
        f"exact answers of {rows[0]['model']} to {rows[0]['questions']} held-out questions; a budget closes the trace at the next newline, by force "
        f"{rows[0]['margin']} tokens later", ["mode", "budget", "tokens an answer", "exact", "95 % interval", "traces closed", "without an end"],
        [[r["mode"], "none" if r["budget"] is None else r["budget"], f"{r['tokens']:.1f}", f"{r['accuracy']:.1%}",
          f"{r['low']:.1%} to {r['high']:.1%}", f"{r['closed']:.0%}", f"{r['without_end']:.0%}"] for r in rows])


def plot_budgets(rows: list[dict], path: Path) -> None:
    """Figure: accuracy against tokens an answer, with 95 % intervals: budgets as a line, modes as points."""
    nvfp4 = stage("01_nvfp4")
    fig, ax = nvfp4.new_figure()
    colours = {"off": "#c0392b", "medium": "#e8a33d", "regular": "#1f4e8c"}
    line = sorted((r for r in rows if r["mode"] == "regular"), key=lambda r: r["tokens"])
    bars = lambda rs: [[100 * max(0.0, r["accuracy"] - r["low"]) for r in rs], [100 * max(0.0, r["high"] - r["accuracy"]) for r in rs]]
    ax.errorbar([r["tokens"] for r in line], [100 * r["accuracy"] for r in line], bars(line), color=colours["regular"], marker="o", capsize=3,
                label="regular, closed at a budget (number) or not (∞)")
    for r in line:
        ax.annotate("∞" if r["budget"] is None else r["budget"], (r["tokens"], 100 * r["accuracy"]), (5, -13), textcoords="offset points", fontsize=9)
    for r in rows:
        if r["mode"] == "regular": continue
        ax.errorbar([r["tokens"]], [100 * r["accuracy"]], bars([r]), color=colours[r["mode"]], marker="s", capsize=3, label=f"{r['mode']}")
    ax.set_title(f"Tokens used against exact answers ({rows[0]['model']}, {rows[0]['questions']} questions)", fontsize=10.5)
    ax.set_xlabel("tokens an answer"); ax.set_ylabel("exact answers (%)"); ax.legend(frameon=False, fontsize=9, loc="upper left")
    ax.set_ylim(bottom=0); ax.set_xlim(left=0)
    nvfp4.save_figure(fig, path)


def main(config: Config) -> None:
    if config.where == "cuda" and not torch.cuda.is_available(): raise ValueError("--device cuda: this torch sees no GPU; use --device cpu.")
    nvfp4, began = stage("01_nvfp4"), time.perf_counter()
    if config.where == "cpu": torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    parts = {"speed": (speed, lambda rows: print_speed(rows, config), None), "drafts": (draft_lengths, print_drafts, plot_drafts),
             "budgets": (budgets, print_budgets, plot_budgets)}
    shared = dict(preset=config.preset, dtype=str(config.dtype)[6:], threads=config.threads if config.where == "cpu" else None)
    for part in dict.fromkeys(config.only):
        measure, show, draw = parts[part]
        rows = measure(config)
        show(rows)
        if draw:
            draw(rows, config.out / f"{part}.png")
            print(f"figure: {config.out / f'{part}.png'}")
        sizes = dict(prompt=config.prompt, new=config.new) if part == "speed" else {}
        for row in rows: nvfp4.write_row(config.out, "bench_infer", **row, **sizes, rounds=config.rounds, **shared)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    stage("01_nvfp4").run_command(main, Config, __doc__)
