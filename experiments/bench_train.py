"""Training speed of one preset on one GPU, beside what a user would pick instead: transformers' NemotronH with mamba_ssm's kernels.

Every contender takes the same steps: random tokens, forward, backward, fused AdamW. The peer has neither multi-token prediction nor the balance
loss, and trains pure bf16 weights without an fp32 master copy; so ours runs that way, with master weights, and with the full recipe.

Run:   python experiments/bench_train.py                        # a minute on one H200; rows to experiments/results.jsonl
       python experiments/bench_train.py --only "full recipe" --profile     # where the time goes, kernel by kernel; no row
Peers: mamba_ssm (and a built causal_conv1d) on PYTHONPATH; without them transformers runs its own PyTorch and the row says so.
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

import torch

ROOT = Path(__file__).resolve().parent.parent


def stage(name: str):
    """A numbered stage, importable from this folder."""
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


@dataclass(frozen=True)
class Config:
    """Times training steps on one GPU."""
    preset: str = "small"
    batch: int = 4                      # sequences a step
    seq: int = 2048                     # tokens a sequence
    steps: int = 20                     # timed, after 5 to warm up
    only: str = ""                      # contenders whose name holds this, or one of these: "bf16,nvfp4"
    profile: bool = False               # print the kernels of one step by their share of its time
    out: Path = ROOT / "experiments"    # results.jsonl in this folder gets the rows


def random_batches(config: Config, vocab: int, documents: int):
    """step -> Batch of random tokens, in documents of equal length, on the GPU already. One batch serves all steps."""
    pretrain = stage("05_pretrain")
    ids_bt = torch.randint(12, vocab, (config.batch, config.seq + 1), generator=torch.Generator().manual_seed(0))
    doc_bt = (torch.arange(config.seq + 1) * documents // (config.seq + 1)).expand(config.batch, -1).contiguous()
    batch = pretrain.Batch.from_windows(ids_bt.numpy(), doc_bt.numpy()).to("cuda")
    return lambda step: batch


def ours(config: Config, precision: str, recipe: bool, master: bool) -> Callable[[], None]:
    """A training step of stage 05's Trainer. recipe: multi-token prediction and balance loss; master: fp32 weights under the products."""
    pretrain, model04 = stage("05_pretrain"), stage("04_model")
    sizes = model04.preset(config.preset)
    with torch.device("cuda"): model = model04.Nemotron(sizes)
    if not master: model = model.bfloat16()
    train = pretrain.PretrainConfig(preset=config.preset, batch=config.batch, seq=config.seq, steps=10**6, device="cuda", precision=precision,
                                    mtp_weight=0.1 if recipe else 0.0, aux_weight=1e-4 if recipe else 0.0, branches=())
    trainer = pretrain.Trainer(train, model, random_batches(config, sizes.vocab, 4 if recipe else 1), Path(tempfile.gettempdir()))
    return trainer.train_step


def theirs(config: Config) -> Callable[[], None]:
    """transformers' model with our sizes, grouped_mm experts, no MTP, weights in bf16."""
    from transformers import NemotronHConfig, NemotronHForCausalLM
    sizes = stage("04_model").preset(config.preset)
    dropped = ("num_nextn", "mtp", "architectures", "model_type", "layers_block_type")      # the pattern string says the layers
    keys = {k: v for k, v in sizes.to_dict().items() if not k.startswith(dropped)}
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"): model = NemotronHForCausalLM(NemotronHConfig(**keys))
    finally: torch.set_default_dtype(torch.float32)
    model.config._experts_implementation = "grouped_mm"
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    ids_bt = torch.randint(12, sizes.vocab, (config.batch, config.seq), device="cuda")
    def step():
        model(input_ids=ids_bt, labels=ids_bt).loss.backward()
        optimizer.step(); optimizer.zero_grad()
    return step


def contenders(config: Config) -> dict[str, Callable]:
    """name -> function that builds the step."""
    found = [name for name in ("mamba_ssm", "causal_conv1d") if importlib.util.find_spec(name)]
    return {"bf16 weights": lambda: ours(config, "bf16", recipe=False, master=False),
            "bf16, fp32 master weights": lambda: ours(config, "bf16", recipe=False, master=True),
            "bf16, full recipe": lambda: ours(config, "bf16", recipe=True, master=True),
            "nvfp4, full recipe": lambda: ours(config, "nvfp4", recipe=True, master=True),
            f"transformers, bf16 weights, {' and '.join(found) or 'no kernels'}": lambda: theirs(config)}


def profile(step: Callable[[], None]) -> None:
    """Prints the kernels of three steps by total time, and how long the GPU was busy."""
    from torch.profiler import ProfilerActivity
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        start = time.perf_counter()
        for _ in range(3): step()
        torch.cuda.synchronize()
        wall = (time.perf_counter() - start) / 3
    kernels = [e for e in record.key_averages() if e.self_device_time_total and e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.self_device_time_total for e in kernels) / 3e3
    print(f"a step under the profiler: {1e3 * wall:.1f} ms, GPU busy {busy:.1f} ms, {sum(e.count for e in kernels) // 3} kernels")
    for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:45]:
        print(f"{e.self_device_time_total / 3e3:8.3f} ms {e.count / 3:6.0f} ×  {e.key[:120]}")


def measure(step: Callable[[], None], steps: int) -> tuple[float, float]:
    """(median seconds a step, GiB that PyTorch holds: a recorded step keeps its activations' memory between calls, where "allocated" overlooks it)"""
    torch.cuda.reset_peak_memory_stats()
    for _ in range(5): step()
    torch.cuda.synchronize()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times), torch.cuda.max_memory_reserved() / 2**30


def main(config: Config) -> None:
    if not torch.cuda.is_available(): raise SystemExit("bench_train: no CUDA device here; experiments/bench_cpu.py times training on a CPU.")
    nvfp4, tokens = stage("01_nvfp4"), config.batch * config.seq
    for name, build in contenders(config).items():
        if not any(part in name for part in config.only.split(",")): continue
        torch.manual_seed(0)
        torch.cuda.empty_cache()
        try:
            step = build()
            seconds, peak = measure(step, config.steps)
        except Exception as error:      # a peer may fail in many ways; the others still run
            print(f"{name:60} failed: {type(error).__name__}: {str(error)[:300]}")
            continue
        print(f"{name:60} {tokens / seconds:10,.0f} tokens/s  {1e3 * seconds:7.1f} ms a step  peak {peak:5.1f} GiB", flush=True)
        if config.profile: profile(step)
        else: nvfp4.write_row(config.out, "bench_train", contender=name, preset=config.preset, batch=config.batch, seq=config.seq,
                              tokens_per_s=round(tokens / seconds), ms=round(1e3 * seconds, 2), peak_gib=round(peak, 2))
        del step


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Config, description=__doc__))
