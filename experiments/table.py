"""Turns result rows into tables: the summary that ends `make run`, and the tables of README.md and experiments/README.md, so that no number there
is typed by hand. The report's claims are in claims.py.

Run:   python experiments/table.py summary     # out/results.jsonl, what the last run of the stages showed
       python experiments/table.py readme      # experiments/results.jsonl into both pages, between their <!-- table --> marks
       python experiments/table.py check       # exit code 1 when a page is not what `readme` would write
"""
from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

claims = importlib.import_module(f"{__package__}.claims" if __package__ else "claims")      # from this folder as a script, or as experiments.table
newest, newest_posttraining, points, read_rows = claims.newest, claims.newest_posttraining, claims.points, claims.read_rows

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "experiments/README.md")
STAGES = {"01_nvfp4": "what four bits keep and lose, and the three products of a linear layer in 4 bits",
          "02_mamba": "the state space layer as recurrence, attention matrix and chunked scan",
          "03_latentmoe": "a router, experts in a narrow latent, and what keeps them busy",
          "04_model": "the hybrid model with its multi-token head, checkpoints and text generation",
          "05_pretrain": "tokenizer, data, schedule, trainer: a model that learns from real text",
          "06_sft": "chat format, reasoning modes, packing, tools: a model that answers",
          "07_rlvr_mopd": "rollouts, GRPO in two processes, teachers, distillation from several of them, a boosted prediction head",
          "08_infer": "a quantized checkpoint, caches in slots, drafts that are verified and rolled back, thinking on a budget, a chat"}


def timing(rows: list[dict], stage: str) -> dict | None:
    """The newest timed run of a stage on its default preset; None before its first."""
    mine = (row for row in reversed(rows) if row["stage"] == "command" and stage in row["command"] and "--preset" not in row["command"])
    return next(mine, None)


# what a stage showed, in one line made of its newest rows
def showed_01(rows):
    row = newest(rows, "01_nvfp4")
    return row and (f"Gaussians in NVFP4: {row['db']['NVFP4 nearest, Gaussian']:.2f} dB nearest, {row['db']['stochastic, Gaussian']:.2f} stochastic; "
                    f"Four-Over-Six {row['mse_change']['four_over_six']:+.1%} squared error, full sweep {row['mse_change']['mse']:+.1%}")


def showed_02(rows):
    row = newest(rows, "02_mamba")
    if row is None: return None
    error = max(value for rung in row["rungs"] for key, value in rung.items() if key.endswith("_error"))
    return f"three rungs agree to {error:.0e} in fp32; Ultra's fp32 state is as large as {row['equal_at_tokens']:,} tokens of FP8 keys and values"


def showed_03(rows):
    off, on = newest(rows, "03_latentmoe", run="loss 1e-4 only"), newest(rows, "03_latentmoe", run="loss 1e-4 and bias 1e-3")
    if on is None: return None
    return f"busiest expert at {off['max_violation']:.1f} times the mean load without the selection bias, {on['max_violation']:.1f} times with it"


def showed_04(rows):
    row = newest(rows, "04_model", preset="tiny")
    return row and (f"{row['total'] / 1e6:.2f}M parameters + {row['mtp'] / 1e6:.2f}M in the MTP head; a fresh model's loss {row['loss']:.2f} "
                    f"(ln vocabulary {row['ln_vocab']:.2f}); cached against whole: {row['cache_gap']:.0e}")


def showed_05(rows):
    row = newest(rows, "05_pretrain")
    if row is None: return None
    gap = ", ".join(f"{k} {v:+.2%}" for k, v in row["branch_gap"].items())
    return (f"loss {row['loss']:.2f} after {row['tokens'] / 1e6:.2f}M tokens; {row['bits_per_byte']['all']:.2f} bits per byte of held-out text; "
            f"loss gap of {gap}")


def showed_06(rows):
    row = newest(rows, "06_sft")
    if row is None: return None
    modes = ", ".join(f"{mode} {x['accuracy']:.0%} in {x['tokens']:.0f} tokens" for mode, x in row["all"].items())
    constant = next(iter(row["all"].values()))["constant"]
    return (f"held-out questions answered exactly: {modes} (best constant answer {constant:.0%}); packs {row['filled'][0]:.0%} full, "
            f"padding would fill {row['padded']:.0%}")


def showed_07(rows):
    row = newest(rows, "07_rlvr_mopd")
    if row is None: return None
    mean = lambda by, domains: sum(by[d] for d in domains) / len(domains)
    stages, taught = [name for name in row["accuracy"] if name != "teacher"], list(row["accuracy"]["teacher"])
    line = ", ".join(f"{name} {mean(row['accuracy'][name], row['accuracy'][name]):.0%}" for name in stages)
    drafts = ", ".join(f"{row['drafts'][f'before {way}']:.2f} to {row['drafts'][f'after {way}']:.2f} {way}" for way in ("greedy", "sampled"))
    return (f"held-out questions answered exactly, mean over domains: {line}; where teachers are: RLVR {mean(row['accuracy']['RLVR'], taught):.0%}, "
            f"{stages[-1]} {mean(row['accuracy'][stages[-1]], taught):.0%}, teachers {mean(row['accuracy']['teacher'], taught):.0%}; "
            f"tokens a pass by boosting: {drafts}")


def showed_08(rows):
    row = newest(rows, "08_infer")
    if row is None: return None
    fastest = {slots: max(by, key=by.get) for slots, by in row["tokens_per_s"].items()}
    speed = ", ".join(f"{row['tokens_per_s'][slots]['0']:,.0f} plain and {row['tokens_per_s'][slots][k]:,.0f} with {k} drafts at batch {slots}"
                      for slots, k in fastest.items())
    before, after = row["losses"]["as it was"], row["losses"]["quantized, 4-bit weights and inputs"]
    passes = " to ".join(f"{row['tokens_per_pass'][name]:.2f}" for name in ("before", "after") if name in row["tokens_per_pass"])
    deepest = len(row["kept"]["after"])
    return (f"{row['bits_per_element']:.2f} bits a parameter, loss {before:.4f} to {after:.4f}; tokens/s: {speed}; "
            f"tokens a pass with {deepest} drafts, by boosting: {passes}")


SHOWED: dict[str, Callable] = dict(zip(STAGES, (showed_01, showed_02, showed_03, showed_04, showed_05, showed_06, showed_07, showed_08)))


def summary() -> None:
    """What every stage of the last run showed, and where the figures are."""
    rows = read_rows(ROOT / "out" / "results.jsonl")
    print(f"\n{'stage':14} what it showed")
    for stage, show in SHOWED.items(): print(f"{stage:14} {show(rows) or 'not run'}")
    figures = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "out").glob("*.png"))
    print("\nfigures: " + "\n         ".join(figures))


def table_posttraining(rows: list[dict]) -> str:
    """Every difference of the newest full run, with what its interval says of its aim."""
    run = newest_posttraining(rows)
    if run is None: return "Not measured yet."
    lines = []
    for name, row in run.found.items():
        aim = "" if row["aim"] is None else f"{row['side']} {points(row['aim'])[0]}: {row['verdict']}"
        mean, low, high, *values = points(row["mean"], row["low"], row["high"], *row["by_seed"])
        by_seed = ", ".join(f"{seed}: {x}" for seed, x in zip(row["seeds"], values, strict=True))
        lines.append(f"| {name.replace(' - ', ' − ')} | {mean} | {low} to {high} | {by_seed} | {aim} |")
    minutes = {seed: sum(mark["seconds"] for mark in phases.values()) / 60 for seed, phases in run.settings["phases"].items()}
    return (f"{run.size} parameters, {row['n']:,} held-out questions; seeds "
            f"(minutes of finished phases, on {run.settings['ran_on']}): {', '.join(f'{seed} ({x:.0f})' for seed, x in minutes.items())}. "
            "In points of questions answered exactly; 95 % is over the questions:\n\n"
            "| difference | mean | 95 % | by seed | aim |\n|---|---|---|---|---|\n" + "\n".join(lines))


def table_of_all(rows: list[dict]) -> str:
    """Every claim, then the controls that nobody has published."""
    return (f"{claims.tally(rows)}\n\n{claims.table_all(rows)}\n\nControls and choices without a published figure:\n\n"
            f"{claims.table_all(rows, claims.CONTROLS)}")


def table_stages(rows: list[dict]) -> str:
    timed = [(stage, run) for stage in STAGES if (run := timing(rows, stage))]
    lines = [f"| [`{stage}.py`]({stage}.py) | {STAGES[stage]} | {run['seconds']:.0f} s | {SHOWED[stage](rows)} |" for stage, run in timed]
    return f"| file | what you build | time on {timed[-1][1]['cores']} CPU cores | what it showed |\n|---|---|---|---|\n" + "\n".join(lines)


def table_speed(rows: list[dict]) -> str:
    benches = {}
    for row in rows:
        if row["stage"] == "bench_cpu": benches[row["what"], row["contender"]] = row
    lines = [f"| {row['what']} | {row['contender']} | {row['tokens_per_s']:,} | {row['peer_tokens_per_s']:,} ({row['peer']}) | "
             f"{row['ratio']:.2f}× ({row['ratio_low']:.2f} to {row['ratio_high']:.2f}) |" for row in benches.values()]
    last = next(reversed(benches.values()))
    return (f"Preset `tiny`, fp32, {last['threads']} CPU threads, transformers {last['transformers']}, torch {last['torch']}:\n\n"
            "| what | ours | tokens/s | peer, tokens/s | ratio (range over rounds) |\n|---|---|---|---|---|\n" + "\n".join(lines))


def table_kernels(rows: list[dict]) -> str:
    """Every case's newest row; what misses its figure says so."""
    cases = {row["case"]: row for row in rows if row["stage"] == "bench_kernels"}
    if not cases: return "Not measured yet."
    lines = []
    for case, row in cases.items():
        if "failed" in row: lines.append(f"| {case} | failed: {row['failed']} | | | | |"); continue
        times, asked = dict(row["times"]), row["target_ms"]
        ms, eager, compiled = times.pop("ours"), times.pop("eager", None), times.pop("compiled", None)
        show = lambda x: "" if x is None else f"{x:.3g}"
        peers = ", ".join(f"{show(x)} {name}" for name, x in times.items())
        met = "" if asked is None else f"{show(asked)}{'' if ms <= asked else ' (missed)'}"
        lines.append(f"| {case.strip()} | **{show(ms)}** | {met} | {show(row['floor_ms'])} | {show(eager)} | {show(compiled)} | {peers} |")
    last = next(reversed(cases.values()))
    return (f"Milliseconds on one {last['device']}, torch {last['torch']}, Triton {last['triton']} (copy {last['copy_tb_s']} TB/s, bf16 8192³ "
            f"{last['product_tflop_s']} TFLOP/s); the floor is what these rates allow:\n\n"
            "| operation | ours | asked | floor | PyTorch | compiled | beside it |\n|---|---|---|---|---|---|---|\n" + "\n".join(lines))


def table_slice(rows: list[dict]) -> str:
    """One layer of each kind at Ultra's width: the newest run's rows."""
    newest_run = [row for row in rows if row["stage"] == "04_slice" and row["preset"] == "ultra"][-8:]
    if not newest_run: return "Not measured yet."
    names = {"M*E": "all three", "M": "Mamba-2", "*": "attention", "E": "LatentMoE"}
    lines = [f"| {names[row['layers']]} | {row['precision']} | {row['forward_ms']:.1f} | {row['both_ms']:.1f} | {row['both_tflops']:.0f} | "
             f"{row['peak_share']:.0%} | {row['peak_gb']:.0f} GB |" for row in newest_run]
    head = f"One {newest_run[0]['device']}, {newest_run[0]['tokens']:,} tokens, NVFP4 emulated on bf16 tensor cores:\n\n"
    return head + ("| layers at Ultra's width | precision | forward, ms | forward + backward, ms | TFLOP/s | of the bf16 peak | peak memory |\n"
                   "|---|---|---|---|---|---|---|\n" + "\n".join(lines))


def table_training(rows: list[dict]) -> str:
    """Tokens a second of one preset's training step on one GPU, the newest row of every contender."""
    contenders = {row["contender"]: row for row in rows if row["stage"] == "bench_train"}
    if not contenders: return "Not measured yet."
    lines = [f"| {name} | {row['tokens_per_s']:,} | {row['ms']:.1f} | {row['peak_gib']:.1f} GiB |" for name, row in contenders.items()]
    last = next(reversed(contenders.values()))
    return (f"Preset `{last['preset']}`, steps of {last['batch']} × {last['seq']:,} tokens on one {last['device']}, torch {last['torch']}:\n\n"
            "| training step | tokens/s | ms a step | memory held |\n|---|---|---|---|\n" + "\n".join(lines))


def table_ranks(rows: list[dict]) -> str:
    """Tokens a second of several GPUs beside one, the newest row of every case and size, and how far their losses are apart."""
    speed = {(row["case"], row["tokens"]): row for row in rows if row["stage"] == "bench_ranks" and row["what"] == "speed"}
    if not speed: return "Not measured yet."
    lines = [f"| {row['case']} | {row['tokens'] // row['gpus']:,} in rows of {row['seq']:,} | {row['one_tokens_per_s']:,.0f} | "
             f"{row['tokens_per_s']:,.0f} | {row['ratio']:.2f}×{'' if row['ratio'] >= 1.7 else ' (1.7 asked: missed)'} |" for row in speed.values()]
    last = next(reversed(speed.values()))
    apart = [row for row in rows if row["stage"] == "bench_ranks" and row["what"] == "losses"]
    worst = f" Losses of fp32 steps on two GPUs and on one are at most {max(row['apart'] for row in apart):.0e} apart." if apart else ""
    return (f"Preset `{last['preset']}`, full recipe in {last['precision']}, {last['gpus']} × {last['device']} (NCCL), torch {last['torch']}; one "
            f"GPU replays a CUDA graph.{worst}\n\n"
            f"| shared | tokens a GPU | one GPU, tokens/s | {last['gpus']} GPUs | ratio |\n|---|---|---|---|---|\n" + "\n".join(lines))


ASKED = {("small", 1): 1000, ("small", 32): 20_000, ("nano", 1): 250, ("super", 1): 120}      # tokens/s on one H200, without drafts


def table_serving(rows: list[dict]) -> str:
    """Tokens a second of stage 08's engine, the newest row of every device, preset, batch and contender."""
    found = {(row["device"], row["preset"], row["batch"], row["contender"]): row for row in rows
             if row["stage"] == "bench_infer" and row["what"] == "speed"}
    if not found: return "Not measured yet."
    lines = []
    for (device, preset, batch, contender), row in sorted(found.items(), key=lambda pair: (pair[0][0] == "cpu", pair[0][:3], pair[0][3])):
        plain = contender.startswith("ours") and "draft" not in contender
        asked = ASKED.get((preset, batch)) if device != "cpu" and plain else None
        met = "" if asked is None else f" ({asked:,} asked{'' if row['tokens_per_s'] >= asked else ': missed'})"
        missed = " (2 asked: missed)" if device == "cpu" and plain and row.get("ratio", 2) < 2 else ""
        cells = [device, f"`{preset}`", str(batch), contender, f"{row['tokens_per_s']:,.0f}{met}",
                 f"{row['ratio']:.2f}×{missed}" if "ratio" in row else "", str(row.get("kernels_a_step", row.get("operators_a_step", ""))),
                 f"{row['busy_ms_a_step']:.2f}" if "busy_ms_a_step" in row else "", row["commit"]]
        lines.append(f"| {' | '.join(cells)} |")
    return ("| device | preset | batch | contender | tokens/s | × transformers | kernels or operators a step | GPU ms a step | commit |\n"
            "|---|---|---|---|---|---|---|---|---|\n" + "\n".join(lines))


def gpu_tests(rows: list[dict]) -> str:
    row = newest(rows, "command", command="python -m pytest tests -m gpu")
    if row is None: return "# no complete run is recorded yet"
    return f"# {row['passed']} tests in {row['seconds']:.0f} s on one {row['device']}, torch {row['torch']}, Triton {row['triton']}, {row['date']}"


def command_time(rows: list[dict], command: str) -> str:
    """Minutes of `make run` (the sum of its stages) or `make test`."""
    if command == "run":
        stages = [run for stage in STAGES if (run := timing(rows, stage))]
        return f"# {sum(r['seconds'] for r in stages) / 60:.1f} min on {stages[0]['cores']} CPU cores, installed"
    row = newest(rows, "command", command="make test")
    if row is None: return "# not timed yet"
    return f"# {row['seconds'] / 60:.1f} min, {row['passed']} tests, installation included"


def rendered(text: str, rows: list[dict]) -> str:
    """A page's text with every marked table and time replaced."""
    for name, table in (("claims", claims.table_best), ("all claims", table_of_all), ("stages", table_stages), ("speed", table_speed),
                        ("kernels", table_kernels), ("slice", table_slice), ("training", table_training), ("ranks", table_ranks),
                        ("serving", table_serving), ("posttraining", table_posttraining)):
        text = re.sub(rf"(<!-- table:{name} -->\n).*?(<!-- end -->)", lambda m, table=table: m[1] + table(rows) + "\n" + m[2], text, flags=re.S)
    text = re.sub(r"(?m)^(    python -m pytest tests -m gpu +)#.*$", lambda m: m[1] + gpu_tests(rows), text)
    return re.sub(r"(?m)^(    make (run|test) +)#.*$", lambda m: m[1] + command_time(rows, m[2]), text)


@dataclass(frozen=True)
class Config:
    """Renders result rows."""
    what: tyro.conf.Positional[Literal["summary", "readme", "check"]] = "summary"


def main(config: Config) -> None:
    if config.what == "summary": return summary()
    rows = read_rows(ROOT / "experiments" / "results.jsonl")
    for name in PAGES:
        page = ROOT / name
        text = rendered(page.read_text(), rows)
        if config.what == "readme": page.write_text(text)
        elif text != page.read_text(): raise SystemExit(f"{name} is not what the rows say: run `python experiments/table.py readme`.")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
