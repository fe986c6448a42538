"""CPU speed beside what a user would pick instead: transformers' NemotronH at the sizes of preset tiny, fp32, no torch.compile.

Run:   python experiments/bench_cpu.py              # 2 min on 2 cores; appends rows to experiments/results.jsonl
       python experiments/bench_cpu.py --only train --out out

Training: one optimizer step of 16 × 256 tokens with AdamW. The peer has neither MTP nor the balance loss, so the comparable row leaves ours
out as well; the recipe's own step is a second row. The peer runs with grouped_mm experts at chunk 32, 64 and 128 and its best counts.
Generation: greedy, 64 new tokens after a prompt of 16, with caches. Every round times each contender once, in turn, so that a machine that
slows down slows all of them; a row holds the medians and the median of the round-by-round ratios.
"""
from __future__ import annotations

import dataclasses
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent


def stage(name: str):
    """A numbered stage, importable from this folder."""
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


def seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def interleaved(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds per contender and round, after one warm-up each; the order of the contenders turns every round."""
    for f in contenders.values(): f()
    names, times = list(contenders), {name: [] for name in contenders}
    for i in range(rounds):
        for name in names[i % len(names):] + names[:i % len(names)]: times[name].append(seconds(contenders[name]))
    return times


def peer_model(config, chunk: int):
    """transformers' model with our sizes, grouped_mm experts and no MTP."""
    from transformers import NemotronHConfig, NemotronHForCausalLM
    dropped = ("num_nextn", "mtp", "architectures", "model_type", "layers_block_type")      # the pattern string says the layers
    keys = {k: v for k, v in config.to_dict().items() if not k.startswith(dropped)}
    model = NemotronHForCausalLM(NemotronHConfig(**{**keys, "chunk_size": chunk}))
    model.config._experts_implementation = "grouped_mm"
    return model


def training_step(model, loss_of: Callable) -> Callable[[], None]:
    """forward, backward, AdamW, on fresh tokens every call."""
    import torch
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    draw = torch.Generator().manual_seed(0)
    def step():
        ids_bt = torch.randint(12, 4096, (16, 257), generator=draw)
        loss_of(ids_bt).backward()
        optimizer.step(); optimizer.zero_grad()
    return step


def bench_training(rounds: int) -> list[dict]:
    model04 = stage("04_model")
    config, tokens = model04.PRESETS["tiny"], 16 * 256
    def ours(mtp_weight, aux_weight):
        model = model04.Nemotron(config)
        return training_step(model, lambda ids: model04.loss(model, ids[:, :-1], ids[:, 1:], mtp_weight=mtp_weight, aux_weight=aux_weight).total)
    def theirs(chunk):
        model = peer_model(config, chunk)
        return training_step(model, lambda ids: model(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss)
    peers = [f"transformers, chunk {chunk}" for chunk in (32, 64, 128)]
    contenders = {"ours": ours(0.0, 0.0), "ours, MTP and balance loss": ours(0.1, 1e-4)}
    times = interleaved(contenders | {p: theirs(int(p.split()[-1])) for p in peers}, rounds)
    speed = {name: tokens / statistics.median(t) for name, t in times.items()}
    best = max(peers, key=speed.get)
    rows = []
    for name in ("ours", "ours, MTP and balance loss"):
        ratios = [b / a for a, b in zip(times[name], times[best])]
        rows.append(dict(what="training step", contender=name, tokens_per_s=round(speed[name]), peer=best, peer_tokens_per_s=round(speed[best]),
                         ratio=round(statistics.median(ratios), 3), ratio_low=round(min(ratios), 3), ratio_high=round(max(ratios), 3),
                         all_peers={p: round(speed[p]) for p in peers}))
    return rows


def bench_generation(rounds: int) -> list[dict]:
    import torch
    model04 = stage("04_model")
    config = model04.PRESETS["tiny"]
    model, peer = model04.Nemotron(dataclasses.replace(config, mtp_pattern="", mtp_depths=0)), peer_model(config, config.chunk).eval()
    greedy = model04.SamplingParams(max_tokens=64, temperature=0.0, stop_ids=())
    rows = []
    for b in (1, 32):
        ids_bt = torch.randint(12, 4096, (b, 16), generator=torch.Generator().manual_seed(0))
        times = interleaved({
            "ours": lambda ids_bt=ids_bt: model04.generate(model, ids_bt.tolist(), greedy),
            "transformers": lambda ids_bt=ids_bt: peer.generate(ids_bt, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0),
        }, rounds)
        ratios = [p / o for o, p in zip(times["ours"], times["transformers"])]
        rows.append(dict(what=f"greedy generation, batch {b}", contender="ours", tokens_per_s=round(b * 64 / statistics.median(times["ours"])),
                         peer="transformers", peer_tokens_per_s=round(b * 64 / statistics.median(times["transformers"])),
                         ratio=round(statistics.median(ratios), 3), ratio_low=round(min(ratios), 3), ratio_high=round(max(ratios), 3)))
    return rows


@dataclass(frozen=True)
class Config:
    """Times the CPU paths beside transformers."""
    only: Literal["all", "train", "generate"] = "all"   # what to time
    rounds: int = 7                                     # timed rounds of each contender
    threads: int = 2                                    # torch threads, the same for all
    out: Path = ROOT / "experiments"                    # results.jsonl in this folder gets the rows


def main(config: Config) -> None:
    import torch
    import transformers
    torch.set_num_threads(config.threads); torch.manual_seed(0)
    nvfp4, rows = stage("01_nvfp4"), []
    if config.only in ("all", "train"): rows += bench_training(config.rounds)
    if config.only in ("all", "generate"): rows += bench_generation(config.rounds)
    print(f"{'what':28} {'contender':28} {'tokens/s':>9} {'peer tokens/s':>14} {'ratio':>6}  (range over rounds)")
    for row in rows:
        print(f"{row['what']:28} {row['contender']:28} {row['tokens_per_s']:9,d} {row['peer_tokens_per_s']:14,d} {row['ratio']:5.2f}×  "
              f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f})   {row['peer']}")
        nvfp4.write_row(config.out, "bench_cpu", **row, threads=config.threads, rounds=config.rounds, transformers=transformers.__version__)


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Config, description=__doc__))
