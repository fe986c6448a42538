"""Several GPUs against one, at equal tokens a GPU: FSDP, expert parallelism, context parallelism.

Each case runs stage 05's trainer twice: in one process on one GPU (as a user would run it: one recorded CUDA graph a step), and in --gpus processes
that share the work, each with as many tokens as the one had. Random tokens in documents of one length, full recipe: both prediction depths, balance
loss, fp32 master weights. --check trains preset tiny in fp32 instead, on the *same* tokens, and compares the losses.

Run:   python experiments/bench_ranks.py                          # on a machine with two GPUs, 3 minutes; rows to experiments/results.jsonl
       python experiments/bench_ranks.py --only context --recompute
       python experiments/bench_ranks.py --check
       python experiments/bench_ranks.py --preset tiny --device cpu --seq 64 --long 64 --document 24 --out out      # the machinery, on gloo
"""
from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
# name -> how n processes divide the work. FSDP cuts weights, gradients and moments over all of them in every case.
CASES = {"FSDP": lambda n: {}, "FSDP + experts": lambda n: dict(ep=n), "FSDP + context": lambda n: dict(cp=n)}


def stage(name: str):
    """A numbered stage, importable from this folder."""
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


@dataclass(frozen=True)
class Config:
    """Times a training step on one GPU and on several, at equal tokens a GPU."""
    preset: str = "small"
    precision: Literal["fp32", "bf16", "nvfp4"] = "bf16"
    device: Literal["cuda", "cpu"] = "cuda"
    gpus: int = 2                       # processes of the divided run
    batch: int = 16                     # sequences a GPU
    seq: int = 2048                     # tokens a sequence
    long: int = 32768                   # tokens a GPU of each sequence that --only context divides: 65,536 on two
    rows: int = 1                       # such sequences at a time
    document: int = 4096                # tokens a document
    recompute: bool = False             # activation checkpointing, in both runs
    steps: int = 10                     # timed, after 4 to warm up
    only: str = ""                      # cases whose name holds this, or one of these: "experts,context"
    check: bool = False                 # compare losses instead of times
    worker: str = ""                    # a case to run in this process: set by this script, which starts itself
    out: Path = ROOT / "experiments"    # results.jsonl in this folder gets the rows


def random_batches(config: Config, vocab: int, batch: int, seq: int, first: int, every: int):
    """step -> Batch: rows first, first + every, .. of `batch` rows of random tokens, the same whoever reads them."""
    pretrain = stage("05_pretrain")
    doc_bt = (torch.arange(seq + 1) // config.document).expand(batch, -1)

    def read(step: int):
        ids_bt = torch.randint(12, vocab, (batch, seq + 1), generator=torch.Generator().manual_seed(step))
        return pretrain.Batch.from_windows(ids_bt[first::every].numpy(), doc_bt[first::every].contiguous().numpy())

    if config.check: return read
    one = read(0).to(config.device)      # timed runs read one batch again and again
    return lambda step: one


def work(config: Config, name: str) -> dict:
    """One process of a case: trains, and returns what the first process reports."""
    pretrain, model04 = stage("05_pretrain"), stage("04_model")
    n, divided = int(os.environ.get("WORLD_SIZE", 1)), "WORLD_SIZE" in os.environ
    share = CASES[name](config.gpus)
    batch, seq = (config.rows, config.long) if "cp" in share else (config.batch, config.seq)      # of a GPU
    # what n GPUs hold together; a check compares equal tokens, so there one process holds it too
    many = config.gpus if config.check else n
    batch, seq = (batch, seq * many) if "cp" in share else (batch * many, seq)
    train = pretrain.PretrainConfig(preset=config.preset, batch=batch, seq=seq, steps=10**6, warmup=1e-5, device=config.device,
                                    precision=config.precision, recompute=config.recompute, branches=(), health_every=0,
                                    **(share if divided else {}))
    ranks = pretrain.join(train)
    rows = (ranks.rows["rank"], ranks.rows["ranks"]) if ranks is not None else (0, 1)
    torch.manual_seed(0)
    sizes = model04.preset(config.preset)
    with torch.device(config.device): model = model04.Nemotron(sizes)
    batches = random_batches(config, sizes.vocab, batch, seq, *rows)
    trainer = pretrain.Trainer(train, model, batches, Path(tempfile.gettempdir()), ranks=ranks)
    wait = torch.cuda.synchronize if config.device == "cuda" else lambda: None
    losses, times = [], []
    for _ in range(4 + config.steps):
        if ranks is not None: dist.barrier()
        wait(); start = time.perf_counter()
        losses.append(trainer.train_step()["total"])
        wait(); times.append(time.perf_counter() - start)
    seconds = torch.tensor(statistics.median(times[4:]))
    peak = torch.tensor(torch.cuda.max_memory_reserved() / 2**30 if config.device == "cuda" else 0.0)
    if ranks is not None:
        for x in (seconds, peak): dist.all_reduce(x, dist.ReduceOp.MAX)      # the slowest process
    return dict(case=name, gpus=n, batch=batch, seq=seq, tokens=batch * seq, tokens_per_s=batch * seq / seconds.item(),
                ms=1e3 * seconds.item(), peak_gib=peak.item(), losses=losses)


def launch(config: Config, name: str, n: int) -> dict:
    """Runs a case in n new processes; RuntimeError with the end of their output when they fail."""
    flags = [f"--{key}={value}" for key, value in asdict(config).items() if key not in ("check", "recompute", "worker", "only", "out")]
    flags += [f"--{key}" for key in ("check", "recompute") if getattr(config, key)]
    start = [sys.executable] if n == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    # rows that arrive from other experts' tokens are never as many as before: without this the GPU's memory falls into pieces
    env = os.environ | (dict(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True") if n > 1 else {})
    done = subprocess.run([*start, __file__, *flags, "--worker", name], capture_output=True, text=True, cwd=ROOT, env=env)
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not found: raise RuntimeError(f"{name} on {n}: exit code {done.returncode}\n" + (done.stdout + done.stderr)[-3000:])
    return json.loads(found[-1])


def check(config: Config) -> None:
    """Losses of the same steps on one device and on several."""
    nvfp4 = stage("01_nvfp4")
    for name in chosen(config):
        one, many = (launch(config, name, n) for n in (1, config.gpus))
        apart = max(abs(a / b - 1) for a, b in zip(many["losses"], one["losses"]))
        print(f"{name:20} losses of {len(one['losses'])} steps, {many['gpus']} processes against one: at most {apart:.1e} apart", flush=True)
        nvfp4.write_row(config.out, "bench_ranks", what="losses", case=name, gpus=config.gpus, preset=config.preset, precision=config.precision,
                        steps=len(one["losses"]), apart=float(f"{apart:.3g}"))


def show(row: dict) -> dict:
    """Prints a run, and returns it."""
    print(f"{row['case']:16} {row['gpus']} × {row['tokens'] // row['gpus']:6,d} tokens in rows of {row['seq']:6,d}: "
          f"{row['tokens_per_s']:9,.0f} tokens/s {row['ms']:7.1f} ms a step, {row['peak_gib']:5.1f} GiB", flush=True)
    return row


def measure(config: Config) -> None:
    """Tokens a second of one device and of several, and their ratio."""
    nvfp4, alone = stage("01_nvfp4"), {}
    for name in chosen(config):
        long = "cp" in CASES[name](config.gpus)      # all other cases share what one GPU did
        try:
            if long not in alone: alone[long] = show(launch(config, name, 1))
            one, many = alone[long], show(launch(config, name, config.gpus))
        except RuntimeError as error: print(f"{name}: failed\n{error}", flush=True); continue      # out of memory, most likely; the others still run
        ratio = many["tokens_per_s"] / one["tokens_per_s"]
        print(f"{name:16} {many['gpus']} give {ratio:.2f} times the tokens/s of one", flush=True)
        facts = {k: round(v, 2) if isinstance(v, float) else v for k, v in many.items() if k != "losses"}
        nvfp4.write_row(config.out, "bench_ranks", what="speed", preset=config.preset, precision=config.precision, recompute=config.recompute,
                        document=config.document, **facts, one_tokens_per_s=round(one["tokens_per_s"], 2), one_peak_gib=round(one["peak_gib"], 2),
                        ratio=round(ratio, 3))


def chosen(config: Config) -> list[str]: return [name for name in CASES if any(part in name for part in config.only.split(","))]


def main(config: Config) -> None:
    if config.worker:
        row = work(config, config.worker)
        if not dist.is_initialized() or dist.get_rank() == 0: print(json.dumps(row), flush=True)
        return dist.destroy_process_group() if dist.is_initialized() else None
    if config.device == "cuda" and torch.cuda.device_count() < config.gpus:
        raise SystemExit(f"bench_ranks: {config.gpus} GPUs are asked for and {torch.cuda.device_count()} are here; --device cpu shows the machinery.")
    check(config) if config.check else measure(config)


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Config, description=__doc__))
