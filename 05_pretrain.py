"""05 · Pretraining: from text to a trained model, resumable to the bit.

Left out:  tensor and pipeline parallelism; data quality filters (the built-in text is clean by construction).
Sources:   [Ultra] Nemotron 3 Ultra report, arXiv 2606.15007 · [NVFP4] Pretraining LLMs with NVFP4, arXiv 2509.25149
           [WSM] Decay-free learning rates by checkpoint merging, arXiv 2507.17634
           [Megatron] Megatron-LM, the code that trained it · [Tekken] the tokenizer of Mistral NeMo, whose vocabulary Nemotron 3 uses
Run:       python 05_pretrain.py                     # minutes on 2 CPU cores: corpus, tokenizer, training, fp32 and NVFP4 branches, text
           python 05_pretrain.py --resume            # goes on after Ctrl-C or a crash, with the losses it would have had
           python 05_pretrain.py --data my/*.txt --out out/mine --branches    # your own text, no branches
           python 05_pretrain.py --branch-from out/pretrain/step-000598 --precision nvfp4 --branch-steps 40
           torchrun --nproc-per-node 4 05_pretrain.py --ep 2 --cp 2 --out out/four     # 4 processes share data, experts and sequences
Contents:  1 config   2 tokenizer and token shards   3 packed batches and blend   4 schedule and optimizer   5 checkpoints
           6 merging checkpoints   7 health   8 several devices   9 trainer   10 bits per byte   11 branches   12 samples and tables
           13 command
Letters:   b batch  t time  v vocabulary  m MoE layer  e experts
"""
from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import tensor as dtensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from tqdm import tqdm

from data import corpus
from data.batches import Batch, Batches, Blend, LongShort  # noqa: F401  (names of this stage)
from data.shards import Shard, Stream  # noqa: F401
from data.tokenizer import EOS, RESERVED, Tokenizer, train_bpe  # noqa: F401

nvfp4, mamba, moe, nemotron = (importlib.import_module(name) for name in ("01_nvfp4", "02_mamba", "03_latentmoe", "04_model"))

# %% 1 · Config  [Ultra, pretraining]
# Every setting once, with Ultra's value beside ours. The command's flags are made from this class.

Preset = Literal["tiny", "small", "nano", "super", "ultra"]
Precision = Literal["fp32", "bf16", "nvfp4"]
OnSpike = Literal["ignore", "stop", "rollback"]


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrains one preset of stage 04."""
    preset: Preset = "tiny"
    data: tuple[str, ...] = ()       # built-in sources by name, files (.txt .jsonl .parquet), hf:NAME@200MB; nothing = all built-in sources
    out: Path = Path("out")          # result rows; metrics and checkpoints in out/pretrain, text and tokens in out/data
    steps: int = 850                 # optimizer steps, ours: about 4 minutes on 2 cores; Ultra takes 794,728
    batch: int = 4                   # sequences a step, ours: Ultra 3,072
    seq: int = 256                   # tokens a sequence, ours: Ultra 8,192
    micro_batches: int = 1           # pieces a step's batch is computed in; gradients are averaged over them
    lr: float = 4e-3                 # peak learning rate, ours: Ultra 2.5e-4
    lr_min: float = 4e-5             # at the end, a hundredth of the peak as in Ultra
    warmup: float = 0.02             # share of the steps, ours: Ultra 0.01 (200B of 20T tokens)
    decay: float = 0.25              # share of the steps in the minus-sqrt decay [Ultra: the last 5T of 20T tokens]
    blend_switch: float = 0.75       # share of the tokens after which the second blend begins [Ultra]
    beta1: float = 0.9               # [Ultra]
    beta2: float = 0.95              # [Ultra]
    weight_decay: float = 0.1        # [Ultra]
    clip: float = 1.0                # largest gradient norm [Megatron's default]
    mtp_weight: float = 0.1          # over both prediction depths [Ultra]
    aux_weight: float = 1e-4         # sequence balance loss [NVIDIA's recipe]
    bias_rate: float = 1e-3          # step of the experts' selection bias [NVIDIA's recipe]
    precision: Precision = "fp32"    # nvfp4 stands on bf16 on a GPU and on fp32 on a CPU; Ultra: nvfp4
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    record: bool = True              # on a GPU: record the kernels of a step once and replay them, same numbers, no waiting for Python
    compile: bool = False            # torch.compile for what lies between the kernels; other rounding, so a run keeps what it began with
    recompute: bool = False          # drop activations and compute them again in the backward pass: less memory, same numbers
    dp: int = 0                      # processes that read different rows; 0: all that torchrun started, divided by cp
    ep: int = 1                      # processes that share the experts
    cp: int = 1                      # processes that share a sequence
    seed: int = 0
    save_every: int = 100            # steps between checkpoints
    keep: int = 2                    # checkpoints kept (the one that branches start from is kept too)
    async_save: bool = True          # several processes: train on while a checkpoint is written, from a copy in the host's memory
    health_every: int = 50           # steps between looks at the residual stream and the size of the updates; 0: never
    on_spike: OnSpike = "ignore"     # rollback: to the last good checkpoint, and begin the decay there [Ultra, near 16T tokens]
    eval_windows: int = 48           # windows of held-out text scored per source
    branches: tuple[Precision, ...] = ("fp32", "nvfp4")     # after training: short runs from the last checkpoint before the decay
    branch_steps: int = 40           # length of such a run, ours: Ultra's probes took 5B tokens
    branch_from: Path | None = None  # do nothing but one such run, from this checkpoint, in --precision
    resume: bool = False             # go on from the newest whole checkpoint
    fresh: bool = False              # delete the checkpoints of an earlier run in this folder first

    def __post_init__(self):
        choices = dict(preset=get_args(Preset), precision=get_args(Precision), on_spike=get_args(OnSpike), device=("cpu", "cuda", "mps"))
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed: raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(allowed)}.")
        for name in ("steps", "batch", "seq", "micro_batches", "save_every", "keep", "ep", "cp"):
            if getattr(self, name) < 1: raise ValueError(f"{name} = {getattr(self, name)} must be at least 1.")
        if self.batch % self.micro_batches:
            raise ValueError(f"batch = {self.batch} cannot be cut into micro_batches = {self.micro_batches} equal pieces.")
        if min(self.warmup, self.decay) < 0 or self.warmup + self.decay > 1:
            raise ValueError(f"warmup = {self.warmup} and decay = {self.decay} are shares of the steps: neither below 0, together at most 1.")

    @property
    def home(self) -> Path: return Path(self.out) / "pretrain"

    @property
    def warmup_steps(self) -> int: return round(self.warmup * self.steps)

    @property
    def decay_steps(self) -> int: return round(self.decay * self.steps)

    @property
    def branch_step(self) -> int: return max(self.steps - self.decay_steps - self.branch_steps, 0)     # the branch ends where the decay begins


# What may differ between a checkpoint and the run that goes on from it: everything that does not change a number of the main run.
FREE = {"out", "device", "record", "recompute", "dp", "ep", "cp", "save_every", "keep", "async_save", "health_every", "on_spike", "eval_windows",
        "branches", "branch_steps", "branch_from", "resume", "fresh"}


# %% 2 · Tokenizer and token shards  [Tekken]
# Byte-pair encoding (data/tokenizer.py: the definition, and what trains it fast) turns text into ids. The ids of documents lie behind one another
# in one long row on disk (data/shards.py), each closed by </s>.

class Data(NamedTuple):
    tokenizer: Tokenizer
    train: dict[str, Shard]
    held_out: dict[str, Shard]
    record: dict                # data/corpus.py's corpus.json: documents, bytes and hashes by source


def prepare_data(data: tuple[str, ...], folder: Path, vocab: int) -> Data:
    """Text, tokenizer and shards, built once and found again under folder/corpus-KEY/vocab-N."""
    home = corpus.build(data, folder)
    record = json.loads((home / "corpus.json").read_text())
    names, done = list(record["sources"]), home / f"vocab-{vocab}"
    if not done.exists():
        work = Path(tempfile.mkdtemp(prefix="vocab-", suffix=".part", dir=home))
        tokenizer = Tokenizer.train((text for name in names for text in corpus.documents(home, name)), vocab)
        tokenizer.save(work)
        for name in names:
            for part in ("train", "held_out"): Shard.write(work / f"{name}.{part}.bin", corpus.documents(home, name, part), tokenizer)
        os.replace(work, done)
    opened = ({name: Shard(done / f"{name}.{part}.bin") for name in names} for part in ("train", "held_out"))
    train, held_out = ({name: shard for name, shard in shards.items() if len(shard.tokens)} for shards in opened)
    return Data(Tokenizer.load(done), train, held_out, record)


# %% 3 · Packed batches and blend  [Ultra, data]
# data/batches.py. A training window is t + 1 tokens of a source's documents behind one another, cut without regard to them; doc_bt counts the
# documents, so that Mamba states and attention end where one does. Windows are dealt to sources by the blend's shares (Blend), and Batches is a
# function of (seed, step): the data position of a checkpoint is one number, and no loader has a state to lose. LongShort mixes two lengths.


# %% 4 · Schedule and optimizer  [Ultra, pretraining; Megatron, optimizer_param_scheduler]
#     warmup   lr = peak · n / warmup                          n optimizer steps, this one included
#     stable   lr = peak
#     decay    lr = low + (peak - low) · (1 - sqrt(r)),        r = (n - start of the decay) / decay steps

def wsd_lr(n: int, total: int, warmup: int, decay: int, peak: float, low: float) -> float:
    """Warmup-stable-decay with the minus-sqrt form. n = 0 gives 0, n = warmup the peak, n >= total the low end (decay 0: the peak):
    total 100, decay 25, peak 1, low 0:  n 75 -> 1,  n 81.25 -> 0.5,  n 100 -> 0.   The first quarter of the decay halves the rate."""
    if n < warmup: return peak * n / warmup
    if n <= total - decay or not decay: return peak
    if n >= total: return low
    return low + (peak - low) * (1 - math.sqrt((n - total + decay) / decay))


def decays(name: str, p: Tensor) -> bool:
    """Weight decay is for matrices and the conv filters. Norms, biases, A_log, D and dt_bias carry a scale that decay would pull to zero.

    The report gives 0.1 and no list of exceptions; this is Megatron's: nothing of one dimension, nor what Mamba marks. Embeddings decay.
    """
    return p.dim() > 1 and not name.endswith(("A_log", ".D", "dt_bias", "bias"))


def make_optimizer(model: nemotron.Nemotron, config: PretrainConfig) -> torch.optim.AdamW:
    groups: dict[tuple, dict] = {}
    for name, p in model.named_parameters():      # one kernel updates a whole group, and cannot mix parameters that are cut differently
        key = (decays(name, p), getattr(p, "device_mesh", None))
        groups.setdefault(key, dict(params=[], weight_decay=config.weight_decay * key[0]))["params"].append(p)
    groups = list(groups.values())
    on_gpu = config.device == "cuda"      # there the rate is a number in memory, which a recorded step reads anew each time
    lr = torch.tensor(config.lr, device="cuda") if on_gpu else config.lr
    return torch.optim.AdamW(groups, lr=lr, betas=(config.beta1, config.beta2), fused=True, capturable=on_gpu)


# %% 5 · Checkpoints
# A checkpoint is a folder: the released layout of stage 04 (any tool opens it), the optimizer, the random state, and the step, which is the data
# position. It is written under another name, forced to disk, and renamed last: a crash leaves the old one or the new one, never half of one.
# files.json holds the sizes, so that a copy cut short is noticed before anything is loaded. One process waits for the disk; several train on while
# a copy of the step is written (section 9: save, wait).

def checkpoints(home: Path) -> list[Path]:
    return sorted(Path(home).glob("step-[0-9]*[0-9]"))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words, or None."""
    if not (folder / "files.json").exists(): return f"{folder} has no files.json: it is not a whole checkpoint"
    for name, size in json.loads((folder / "files.json").read_text()).items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != size: return f"{folder / name} is " + ("missing" if found is None else f"cut short ({found:,} of {size:,} bytes)")
    return None


def newest_checkpoint(home: Path) -> Path:
    """The newest whole checkpoint; a damaged one is named and passed over. ValueError when there is none."""
    for folder in reversed(checkpoints(home)):
        if not (problem := damage(folder)): return folder
        print(f"passing over a damaged checkpoint: {problem}")
    raise ValueError(f"nothing to resume: {home} holds no whole checkpoint; start without --resume.")


def unfinished(final: Path) -> Path:
    """An empty place beside `final`, to write it in; what a killed run left there is gone. write_folder makes the folder."""
    work = final.with_name(final.name + ".part")
    shutil.rmtree(work, ignore_errors=True)
    return work


def write_folder(final: Path, work: Path, fill: Callable[[Path], None]) -> None:
    """Folder `work`, with what fill(work) adds, becomes `final`, all or nothing. OSError when the disk refuses; then `final` is as it was."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        fill(work)
        sizes = {f.name: f.stat().st_size for f in sorted(work.iterdir())}
        (work / "files.json").write_text(json.dumps(sizes, indent=1))
        for path in [*work.iterdir(), work]: _to_disk(path)
        if final.exists(): shutil.rmtree(final)
        os.replace(work, final)
        _to_disk(final.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt": return      # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try: os.fsync(handle)
    finally: os.close(handle)


# %% 6 · Merging checkpoints  [WSM, 2507.17634; Ultra, pretraining]
# A decay averages: late gradients count less and less, so the end point is a weighted mean of the points on the way. Then weights saved at a
# *constant* rate, averaged afterwards, stand in for a decay that was never run: a look at the final quality without leaving the trunk.
# If w_i is the factor that the decay would have put on the update from checkpoint i - 1 to i, the mean is
#     theta = sum of c_j theta_j,    c_0 = 1 - w_1,   c_j = w_j - w_(j+1),   c_k = w_k                      k + 1 checkpoints, sum of c = 1
# PITFALL: minus-sqrt falls fastest at first, so the *older* checkpoints weigh more.

def merge_weights(n: int, timing: Literal["left", "right"] = "right") -> list[float]:
    """c_0 .. c_(n-1) for n checkpoints, oldest first, of a minus-sqrt decay w = 1 - sqrt(t). Sources leave open when an update happens:
    "left": t = (i - 1) / k, at the beginning of its interval, so the oldest weighs 0. "right": t = i / (k + 1), which never reaches 1.

    n 6:  left 0 .447 .185 .142 .120 .106     right .408 .169 .130 .109 .096 .087
    """
    if n < 1: raise ValueError("there is no checkpoint to merge: give at least one.")
    if timing not in ("left", "right"): raise ValueError(f"timing={timing!r} is unknown: use 'left' or 'right'.")
    k = n - 1
    w = [1.0, *(1 - math.sqrt((i - 1) / k if timing == "left" else i / (k + 1)) for i in range(1, n)), 0.0]
    return [w[j] - w[j + 1] for j in range(n)]


def merge_checkpoints(folders: list[Path], weights: list[float] | None = None) -> nemotron.Nemotron:
    """A model with the weighted mean of checkpoints' tensors, selection bias included; folders oldest first, weights merge_weights' by default.

    Sums in fp64, one tensor of every checkpoint in memory at a time. ValueError for a damaged checkpoint or one of another model.
    """
    weights = merge_weights(len(folders)) if weights is None else weights
    if len(weights) != len(folders): raise ValueError(f"{len(weights)} weights for {len(folders)} checkpoints: give one for each.")
    if problem := next(filter(None, map(damage, folders)), None): raise ValueError(f"{problem}: leave it out.")
    merged = nemotron.load_checkpoint(folders[-1])
    targets, seen = dict(nemotron.released_tensors(merged)), 0
    for tensors in zip(*map(nemotron.read_tensors, folders)):
        name, x = tensors[-1]
        if any((other, y.shape) != (name, x.shape) for other, y in tensors):
            raise ValueError(f"{folders[-1]} and an older checkpoint differ at {name}: only checkpoints of one run can be merged.")
        targets[name].copy_(sum(w * y.double() for w, (_, y) in zip(weights, tensors)))
        seen += 1
    if seen != len(targets): raise ValueError(f"a checkpoint has fewer tensors than {folders[-1]}: only checkpoints of one run can be merged.")
    return merged


# %% 7 · Health  [Ultra, training stability]
# What the report watched: the busiest expert, the residual stream by depth, the losses of the prediction depths. The loss shows a divergence when
# it is there; the second depth's loss, or norms that grow in the early layers, show it coming.

@torch.no_grad()
def residual_rms(model: nemotron.Nemotron, batch: Batch) -> list[float]:
    """Root mean square of the residual stream behind each layer."""
    sizes = []
    hooks = [b.register_forward_hook(lambda _, __, out: sizes.append(out[0].float().square().mean().sqrt())) for b in model.backbone.layers]
    try: model.trunk(batch.ids_bt, batch.doc_bt)
    finally:
        for hook in hooks: hook.remove()
    return torch.stack(sizes).tolist()


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor that is cut over processes."""
    return x.to_local() if isinstance(x, dtensor.DTensor) else x


@torch.no_grad()
def update_ratio(optimizer: torch.optim.AdamW) -> float:
    """Median over the weight matrices of |last update| / |weight|, from AdamW's moments. Around 1e-3 is usual; 0 learns nothing, 1e-1 forgets."""
    ratios = []
    for group in optimizer.param_groups:
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        for p in (p for p in group["params"] if p.dim() > 1 and p in optimizer.state):
            state = optimizer.state[p]
            n = float(state["step"])
            weight, mean, square = (local(x) for x in (p, state["exp_avg"], state["exp_avg_sq"]))
            adam = mean / (1 - beta1 ** n) / ((square / (1 - beta2 ** n)).sqrt() + group["eps"])
            ratios.append((lr * (adam + group["weight_decay"] * weight)).norm() / weight.norm().clamp(min=1e-12))
    return torch.stack(ratios).median().item()


def training_flops(c: nemotron.ModelConfig, seq: int, depths: int) -> float:
    """A token's FLOPs forward and backward, the latter twice the former: the ledger's, and `depths` passes of the MTP head, which is its own layers,
    the output layer, and eh_proj [2d -> d]. What --recompute computes again is no work, and a text's borders inside a window save none."""
    flops = sum(nemotron.ledger(c, seq).flops_per_token.values())
    if depths and c.mtp_pattern:
        head = nemotron.ledger(replace(c, pattern=c.mtp_pattern, mtp_pattern="", mtp_depths=0), seq).flops_per_token
        flops += depths * (sum(head.values()) + 4 * c.d_model ** 2)
    return 3 * flops


def peak_share(tokens_per_s: float, flops_per_token: float, peak: float, devices: int = 1) -> float:
    """Model FLOPs utilisation: 1,000 tokens a second of 3e9 FLOPs each, on 2 devices of 1e13 FLOP/s  ->  0.15."""
    return round(tokens_per_s * flops_per_token / (peak * devices), 5)


# The SXM cards of the data sheet, by the driver's name for them. NOTE: nvfp4 is held against the bf16 peak too: on these cards it is emulated.
PEAKS = {"NVIDIA H100 80GB HBM3": nemotron.BF16_PEAK * 1e12, "NVIDIA H200": nemotron.BF16_PEAK * 1e12}


def device_peak(device: str) -> float | None:
    """FLOP/s of bf16 products, dense; None where it is not known."""
    return PEAKS.get(torch.cuda.get_device_name()) if device == "cuda" else None


class SpikeDetector:
    """Sees a spike: loss or gradient norm above the median of recent steps by `width` times their spread, `patience` steps in a row.
    The spread is the median absolute deviation, at least half a percent of the median. ours: the report does not say what its alarm was."""
    def __init__(self, window: int = 64, width: float = 12.0, patience: int = 3):
        self.width, self.patience, self.high = width, patience, Counter()
        self.recent = {key: deque(maxlen=window) for key in ("loss", "grad_norm")}

    def __call__(self, row: dict) -> str | None:
        """What spiked, in words, or None."""
        for key, recent in self.recent.items():
            middle = float(np.median(recent)) if recent else 0.0
            spread = max(float(np.median(np.abs(np.array(recent) - middle))), 0.005 * abs(middle)) if recent else math.inf
            far = len(recent) == recent.maxlen and row[key] > middle + self.width * spread
            self.high[key] = self.high[key] + 1 if far else 0
            if not far: recent.append(row[key])      # a spike must not raise the bar that it is measured with
            if self.high[key] == self.patience:
                return f"{key} is {row[key]:.3g} and was {middle:.3g} in the median, {self.patience} steps in a row"
        return None


# %% 8 · Several devices  [FSDP2, torch.distributed.fsdp; Megatron, parallel folding]
# torchrun starts one process a device. The same processes share the work in three ways:
#     data      each reads rows of its own; weights, gradients and moments are cut over all of them, and a layer's weights are gathered just before
#               it runs (FSDP2)
#     context   cp neighbours hold the pieces of one sequence (02, section 8)
#     experts   ep neighbours share the experts (03, section 6): an MoE layer does not care which rows belong to which sequence, so any can
# A process's loss is its share, and every gradient the mean over all processes. Gradients are fp32, in every sum and on every wire.

class Ranks(NamedTuple):
    """Who does what: three views of the same processes. Neighbours in number share a sequence, and the experts."""
    everyone: DeviceMesh      # [world]
    experts: DeviceMesh       # [ep, copies]
    grid: DeviceMesh          # [dp, cp]
    files: dist.ProcessGroup  # all of them again, on the CPU: writes checkpoints while the others are busy with training

    @property
    def number(self) -> int: return self.everyone.get_rank()

    @property
    def rows(self) -> dict[str, int]: return dict(rank=self.grid.get_local_rank("dp"), ranks=self.grid.size(0))


def join(config: PretrainConfig) -> Ranks | None:
    """This process's place among those that torchrun started; None without torchrun. ValueError for sizes that do not fit."""
    world = int(os.environ.get("WORLD_SIZE", 0))
    if not world:
        if max(config.dp, config.ep, config.cp) > 1: raise ValueError("dp, ep and cp share work between processes: start them with torchrun.")
        return None
    dp = config.dp or world // config.cp
    if dp * config.cp != world: raise ValueError(f"dp {dp} · cp {config.cp} must be the {world} processes that torchrun started.")
    if config.batch % (dp * config.micro_batches):
        raise ValueError(f"{config.batch} rows cannot be dealt to dp = {dp} processes in micro_batches = {config.micro_batches} equal pieces.")
    if world % config.ep: raise ValueError(f"ep = {config.ep} must divide the {world} processes that torchrun started.")
    if config.device == "cuda": torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # states that cross a cut multiply in fp32: beside bf16's 8 bits TF32's 11 lose nothing
    if config.cp > 1 and config.precision == "bf16": torch.set_float32_matmul_precision("high")
    if not dist.is_initialized(): dist.init_process_group("cpu:gloo,cuda:nccl" if config.device == "cuda" else "gloo")
    numbers = torch.arange(world)
    return Ranks(DeviceMesh(config.device, numbers, mesh_dim_names=("all",)),
                 DeviceMesh(config.device, numbers.view(-1, config.ep).T, mesh_dim_names=("ep", "copies")),
                 DeviceMesh(config.device, numbers.view(dp, config.cp), mesh_dim_names=("dp", "cp")), dist.new_group(backend="gloo"))


MESSAGE = 2**25      # numbers that FSDP gathers at a time, at least, ours: each gather costs Python a millisecond, as much as a small layer

def parallelize(model: nemotron.Nemotron, ranks: Ranks) -> nemotron.Nemotron:
    """Cuts a model over the ranks, in place: sequences, experts, then everything that is left. All ranks must hold the same model before."""
    if ranks.grid.size(1) > 1: nemotron.context_parallel(model, ranks.grid.get_group("cp"))
    for layer in (m for m in model.modules() if isinstance(m, moe.LatentMoE)): moe.expert_parallel(layer, ranks.experts.get_group("ep"))
    groups = [[]]
    for layer in model.backbone.layers:
        if sum(p.numel() for part in groups[-1] for p in part.parameters()) >= MESSAGE: groups.append([])
        groups[-1].append(layer)
    if hasattr(model, "mtp"): groups.append([model.mtp])
    for group in groups:
        experts = [m for part in group for m in part.modules() if isinstance(m, moe.Experts)]
        if experts: fully_shard(experts, mesh=ranks.experts["copies"])
        fully_shard(group, mesh=ranks.everyone)
    fully_shard(model, mesh=ranks.everyone)
    register_fsdp_forward_method(model, "trunk")      # the loss calls this one, not forward
    return model


def clip_gradients(model: nn.Module, largest: float, ranks: Ranks | None) -> Tensor:
    """The norm over all gradients of all processes; they are scaled down to norm `largest` where it is above."""
    if ranks is None: return torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
    grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
    square = torch.stack(torch._foreach_norm(grads)).square().sum()
    dist.all_reduce(square)      # no number lies on two processes, so squares may be added
    norm = square.sqrt()
    torch._foreach_mul_(grads, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


# %% 9 · Trainer
# One optimizer step: for each micro-batch forward, loss and backward; clip; AdamW; move the experts' selection bias against the loads of the
# whole batch. Nothing in it waits for the GPU, so that a step of thousands of small kernels can be recorded as one CUDA graph.

class Recorded:
    """f(*tensors) without a result, on a GPU. The third call with tensors of the same shapes records its kernels; from then on they are replayed.

    A step of preset small is 3,600 kernels, which Python starts in 150 ms and an H200 computes in 90. What f reads and writes besides its arguments
    must stay where it is in memory, and nothing in f may wait for the GPU. Recording executes nothing, so the numbers are those of plain calls.
    """
    def __init__(self, f: Callable[..., None]):
        self.f, self.calls, self.graphs, self.pool = f, Counter(), {}, None

    def __call__(self, *tensors: Tensor) -> None:
        key = tuple((x.shape, x.dtype) for x in tensors)
        self.calls[key] += 1
        if self.calls[key] <= 2: return self.f(*tensors)      # what is made once (gradients, moments, compiled kernels) is made here
        if key not in self.graphs:
            held, graph = [x.clone() for x in tensors], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool): self.f(*held)
            self.graphs[key], self.pool = (graph, held), graph.pool()
        graph, held = self.graphs[key]
        for mine, x in zip(held, tensors): mine.copy_(x)
        graph.replay()


def compile_blocks(model: nemotron.Nemotron) -> None:
    """torch.compile, in place, for what lies between the kernels of a block: projections, gates, sums. Blocks of one letter share the code.

    Left as they are: what sizes its tensors by the data (documents, routing) or is a kernel already, and products in 4 and 8 bits, for whose scales
    (E8M0) torch's compiler for CPUs has no type. Without gradients (scores, text) blocks run as written: there shapes change from call to call.
    """
    kernels = ("rmsnorm", "gated_rmsnorm") if model.lm_head.weight.is_cuda else ()      # a CPU has no twin of them
    for name in ("conv_halo", "causal_conv1d", "ssd_chunked", "ssd_across_ranks", *kernels):
        setattr(mamba, name, torch.compiler.disable(inspect.unwrap(getattr(mamba, name))))
    torch._dynamo.config.recompile_limit = 32      # ours: 3 letters, in the trunk and in the head, for a few shapes; torch gives up behind 8
    plain, fast = nemotron.Block.forward, torch.compile(nemotron.Block.forward)
    def forward(block, *args): return (fast if torch.is_grad_enabled() else plain)(block, *args)
    for module in model.modules():      # bound anew, so that hooks stay outside and a copied model calls its own blocks
        if isinstance(module, nemotron.Block): module.forward = MethodType(forward, module)
        elif isinstance(module, (moe.Experts, nvfp4.NVFP4Linear, nvfp4.MXFP8Linear)):
            module.forward = MethodType(torch.compiler.disable(type(module).forward), module)


class NotFinite(ValueError):
    """A step whose loss or gradient norm is not finite; the weights are as before it."""


class Trainer:
    """A model on its way. batches: step -> Batch; objective: (model, Batch) -> Losses; schedule: step -> rate. By default 04's loss and wsd_lr."""
    def __init__(self, config: PretrainConfig, model: nemotron.Nemotron, batches: Callable[[int], Batch], home: Path,
                 tokenizer: Tokenizer | None = None, objective: Callable | None = None, data_hash: str = "",
                 recipe: nvfp4.NVFP4Recipe | None = None, ranks: Ranks | None = None, schedule: Callable[[int], float] | None = None):
        self.ranks, self.schedule = ranks, schedule
        self.config, self.batches, self.home, self.tokenizer, self.data_hash = config, batches, Path(home), tokenizer, data_hash
        self.objective = objective or (lambda model, x: nemotron.loss(model, *x, mtp_weight=config.mtp_weight, aux_weight=config.aux_weight))
        self.model = model.to(config.device).train()
        if config.precision == "nvfp4": nemotron.apply_recipe(self.model, recipe or nvfp4.NVFP4Recipe())
        self.model.recompute = config.recompute
        if config.compile: compile_blocks(self.model)
        if ranks is not None: parallelize(self.model, ranks)
        self.optimizer = make_optimizer(self.model, config)
        self.step, self.rows, self.saved_step, self.decay_from, self.spikes = 0, [], None, None, SpikeDetector()
        self.writing, self.background = None, ThreadPoolExecutor(1)      # (folder, what waits for it) of the checkpoint on its way to disk
        self.peak = None if objective else device_peak(config.device)      # whoever brings a loss of his own does other work than is counted here
        self.sums = self.load_me = None      # of the step at hand: losses (total, main, aux, one a depth) and gradient norm; tokens per expert
        self.draws = self.draw_table().to(config.device)
        self.compute = Recorded(self.compute_step) if config.record and config.device == "cuda" and ranks is None else self.compute_step

    def draw_table(self) -> Tensor:
        """Seeds of this step's stochastic rounding, int64 [micro-batches, layers, products, 2]: every micro-batch of every process has its own."""
        c, first = self.config, 0 if self.ranks is None else self.ranks.number * self.config.micro_batches
        return torch.stack([self.model.draw_seeds(c.seed, self.step, first + micro) for micro in range(c.micro_batches)])

    def use_recipe(self, recipe: nvfp4.NVFP4Recipe) -> None:
        """From the next step on other switches for the layers in 4 bits; replace(recipe, forward=False) leaves NVFP4 in the forward pass  [NVFP4]."""
        for module in self.model.quantised():
            if getattr(module, "recipe", None) is not None: module.recipe = recipe      # experts outside the recipe have None
        if isinstance(self.compute, Recorded): self.compute = Recorded(self.compute_step)

    @property
    def last_step(self) -> int:
        """Where the run ends: earlier than planned when a spike has moved the decay."""
        return self.config.steps if self.decay_from is None else min(self.config.steps, self.decay_from + self.config.decay_steps)

    def autocast(self):
        """bf16 products over fp32 weights: always for bf16, and under nvfp4 on a GPU. A CPU computes the rest of an nvfp4 run in fp32."""
        c = self.config
        on = c.precision == "bf16" or c.precision == "nvfp4" and c.device == "cuda"
        return torch.autocast(c.device, torch.bfloat16) if on else contextlib.nullcontext()

    def compute_step(self, *batch: Tensor) -> None:
        """The step's arithmetic: forward and backward of every micro-batch, clip, AdamW, selection bias. Results lie in .sums and .load_me.
        A loss or norm that is not finite leaves weights and bias alone; train_step reads it in .sums."""
        c, parts, load_me = self.config, [], 0
        for piece, draws in zip(Batch(*batch).split(c.micro_batches), self.draws):
            self.model.set_draws(draws)
            with self.autocast(): losses = self.objective(self.model, piece)
            # NOTE: the mean of the pieces' means, as Megatron does; pieces differ slightly in how many tokens count
            (losses.total / c.micro_batches).backward()
            parts.append(torch.stack([x.detach().float() for x in (losses.total, losses.main, losses.aux, *losses.mtp_k)]))
            load_me = load_me + losses.load_me
        norm, mean = clip_gradients(self.model, c.clip, self.ranks), torch.stack(parts).mean(0)
        if self.ranks is not None: dist.all_reduce(mean); dist.all_reduce(load_me); mean /= self.ranks.everyone.size()
        self.sums, self.load_me = torch.cat([mean, norm.float()[None]]), load_me
        broken = ~(self.sums[0].isfinite() & norm.isfinite())
        self.optimizer.found_inf = broken.float()      # the fused AdamW looks at this, as under a gradient scaler
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update_expert_bias(load_me, c.bias_rate * ~broken)

    def train_step(self) -> dict:
        """One optimizer step; returns its row of metrics. ValueError when the loss is not finite: the weights are then as before the step."""
        c, start = self.config, time.perf_counter()
        lr = self.schedule(self.step) if self.schedule else wsd_lr(self.step + 1, self.last_step, c.warmup_steps, c.decay_steps, c.lr, c.lr_min)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor): group["lr"].fill_(lr)
            else: group["lr"] = lr
        batch = self.batches(self.step).to(c.device)
        self.draws.copy_(self.draw_table())
        self.compute(*batch)
        total, main, aux, *mtp, norm = self.sums.tolist()
        load_me = self.load_me.cpu()
        violation = moe.max_violation(load_me).tolist()
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise NotFinite(f"step {self.step + 1}: the loss is {total} and its gradient norm {norm}; lower --lr, or --resume from a checkpoint.")
        self.step += 1
        seconds, tokens = time.perf_counter() - start, batch.ids_bt.numel() * (1 if self.ranks is None else self.ranks.grid.size(0))
        row = dict(step=self.step, loss=main, total=total, aux=aux, **{f"mtp_{k}": x for k, x in enumerate(mtp, 1)}, lr=lr, grad_norm=norm,
                   max_vio_median=float(np.median(violation)) if violation else None, max_vio=max(violation, default=None),
                   dead_experts=int(moe.dead_experts(load_me).sum()), tokens_per_s=round(tokens / seconds, 1),
                   seconds=round(seconds, 4))
        if self.peak is not None:
            depths, devices = self.model.config.mtp_depths if c.mtp_weight else 0, 1 if self.ranks is None else self.ranks.everyone.size()
            row["peak_share"] = peak_share(tokens / seconds, training_flops(self.model.config, batch.ids_bt.shape[1], depths), self.peak, devices)
        if c.health_every and self.step % c.health_every == 0:
            piece = batch.split(c.micro_batches)[0]
            if self.model.context is not None: piece = Batch(*(x.chunk(self.model.context.size, 1)[self.model.context.rank] for x in piece))
            with self.autocast(): row["residual_rms"] = residual_rms(self.model, piece)
            row["update_ratio"] = update_ratio(self.optimizer)
        self.rows.append(row)
        return row

    def fit(self, until: int, save_at: Iterable[int] = (), log_every: int = 50, label: str = "train") -> bool:
        """Trains to step `until`, saving every save_every steps, at `save_at` and at the end. False when Ctrl-C ended it (the step is saved).
        When it returns, every checkpoint is whole."""
        c, save_at, log = self.config, {*save_at, until}, self.home / "metrics.jsonl" if self.leads else Path(os.devnull)
        self.home.mkdir(parents=True, exist_ok=True)
        with _Interrupt() as interrupt, tqdm(total=until, initial=self.step, desc=label, unit="step", disable=None if self.leads else True) as bar:
            while self.step < min(until, self.last_step) and not self.anyone(interrupt.seen):
                try: row = self.train_step()
                except NotFinite as error:
                    self.wait()
                    if c.on_spike != "rollback": raise
                    self.roll_back(str(error), log); continue
                with log.open("a") as file: file.write(json.dumps(row) + "\n")
                bar.n = self.step; bar.set_postfix(loss=f"{row['loss']:.3f}", tok_s=f"{row['tokens_per_s']:,.0f}")
                if self.leads and (self.step % log_every == 0 or self.step in (1, until)): tqdm.write(log_line(row))
                if c.on_spike != "ignore" and (what := self.spikes(row)): self.roll_back(what, log); continue
                if self.step % c.save_every == 0 or self.step in save_at or self.step == self.last_step: self.save()
            stopped = self.anyone(interrupt.seen)
            if stopped: self.save()
            self.wait()
        return not stopped

    @property
    def leads(self) -> bool: return self.ranks is None or self.ranks.number == 0

    def anyone(self, said: bool) -> bool:
        """Has any process said so? Ctrl-C reaches them at different moments, and all have to stop behind the same step."""
        if self.ranks is None: return said
        votes = torch.tensor(float(said), device=self.config.device)
        dist.all_reduce(votes)
        return bool(votes)

    def roll_back(self, what: str, log: Path) -> None:
        """Back to the newest whole checkpoint from before a spike; the decay begins there. ValueError when the run shall stop, or has none."""
        self.wait()
        sound = [f for f in checkpoints(self.home) if int(f.name[5:]) <= self.step - 2 * self.spikes.patience and not damage(f)]
        if self.config.on_spike == "stop" or self.decay_from is not None or not sound:
            why = "" if self.config.on_spike == "stop" else ", with no checkpoint from before it" if self.decay_from is None else " a second time"
            raise ValueError(f"a spike at step {self.step}{why}: {what}. Lower --lr, or look at metrics.jsonl for what grew first.")
        spiked, self.decay_from = self.step, int(sound[-1].name[5:])
        self.restore(sound[-1])
        if self.leads:
            for later in checkpoints(self.home)[len(sound):]: shutil.rmtree(later)
        self.rows, self.spikes = [row for row in self.rows if row["step"] <= self.step], SpikeDetector()
        log.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        tqdm.write(f"a spike at step {spiked}: {what}. Back to step {self.step}; the decay begins here and ends at step {self.last_step}.")

    def save(self) -> Path:
        """Writes home/step-N and removes checkpoints beyond the newest `keep` (but never the one that branches start from).

        Several processes train on meanwhile: the folder holds this step's numbers, and has its name at the latest when `wait` returns.
        """
        folder, later = self.home / f"step-{self.step:06d}", self.ranks is not None and self.config.async_save
        if self.saved_step == self.step: return folder
        self.wait()      # one at a time
        finish = self.write(folder)
        self.saved_step, self.writing = self.step, (folder, self.background.submit(finish).result if later else finish)
        if not later: self.wait()
        return folder

    def wait(self) -> None:
        """Until the checkpoint on its way to disk, if there is one, is whole. All ranks call it behind the same step; ValueError on all of them when
        one could not write."""
        if self.writing is None: return
        (folder, finish), self.writing, failed = self.writing, None, None
        try: finish()
        except OSError as error: failed = error
        except dcp.CheckpointException as error: failed = next(iter(error.failures.values()))[0]      # one error a rank
        if self.anyone(failed is not None):
            self.saved_step, reason = None, "another process was refused" if failed is None else getattr(failed, "strerror", None) or failed
            raise ValueError(f"cannot write the checkpoint {folder} ({reason}): make room, then --resume.") from failed

    def write(self, folder: Path) -> Callable[[], None]:
        """Takes down the state of this step; the function that it returns brings it to disk. One process: weights in the released layout, and
        trainer.pt. Several: everything in parts, each process writing its own (DCP)."""
        trainer = dict(rng=torch.get_rng_state(), step=self.step, decay_from=self.decay_from)
        about = dict(config=asdict(self.config), step=self.step, data=self.data_hash, torch=torch.__version__)
        work = unfinished(folder) if self.leads else folder.with_name(folder.name + ".part")
        if self.ranks is not None:
            dist.barrier()      # nobody writes into a folder that is about to be emptied
            args = dict(state_dict=self.parts(), checkpoint_id=work, process_group=self.ranks.files)
            write_parts = dcp.async_save(**args).result if self.config.async_save else partial(dcp.save, **args)
            if not self.leads: return write_parts

        def fill(work: Path) -> None:
            if self.ranks is None:
                nemotron.save_checkpoint(work, self.model, self.tokenizer)
                trainer["optimizer"] = {name: self.optimizer.state[p] for name, p in self.model.named_parameters()}
            else:
                write_parts()      # returns when all processes have written theirs
                (work / "config.json").write_text(json.dumps(self.model.config.to_dict(), indent=1))
                if self.tokenizer is not None: self.tokenizer.save(work)
            torch.save(trainer, work / "trainer.pt")
            (work / "pretrain.json").write_text(json.dumps(about, indent=1, default=str))

        def finish() -> None:
            write_folder(folder, work, fill)
            for old in checkpoints(self.home)[:-self.config.keep]:
                if old.name != f"step-{self.config.branch_step:06d}": shutil.rmtree(old)

        return finish

    def parts(self) -> dict[str, Tensor]:
        """Everything that a checkpoint in parts holds, each tensor with its place in the whole, in the memory that training uses."""
        found = {f"buffer.{name}": x for name, x in self.model.named_buffers()}
        for name, p in self.model.named_parameters():
            if not self.optimizer.state[p]:      # loading comes before the first step
                self.optimizer.state[p] = dict(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state = self.optimizer.state[p]
            found |= {f"step.{name}": state["step"]}
            for key, x in (("weight", p.detach()), ("exp_avg", state["exp_avg"]), ("exp_avg_sq", state["exp_avg_sq"])):
                if self.ranks is not None and ".experts." in name and ".shared_experts." not in name:      # FSDP knows of this process's experts only
                    shape = (x.shape[0] * self.ranks.experts.size(0), *x.shape[1:])
                    x = dtensor.DTensor.from_local(local(x), self.ranks.experts, [dtensor.Shard(0), dtensor.Shard(0)], run_check=False, shape=shape,
                                           stride=torch.empty(shape, device="meta").stride())
                found[f"{key}.{name}"] = x
        return found

    @classmethod
    def load(cls, folder: Path, config: PretrainConfig, batches: Callable[[int], Batch], home: Path, **kwargs) -> Trainer:
        """A trainer as it was at a checkpoint. config.precision may be another than the checkpoint's: that is a branch."""
        if problem := damage(folder): raise ValueError(f"{problem}: take another checkpoint.")
        in_parts, sizes = (folder / ".metadata").exists(), json.loads((folder / "config.json").read_text())
        if kwargs.get("ranks") is not None and not in_parts:
            raise ValueError(f"{folder} was written by one process: go on with one, or begin a run of several with --fresh.")
        model = nemotron.Nemotron(nemotron.ModelConfig.from_dict(sizes)) if in_parts else nemotron.load_checkpoint(folder)
        trainer = cls(config, model, batches, home, **kwargs)
        trainer.restore(folder, weights=False)
        return trainer

    def restore(self, folder: Path, weights: bool = True) -> None:
        """Weights, optimizer, random state and step of a checkpoint, in place: a recorded step knows them by their addresses. A checkpoint in parts
        may come from any number of processes."""
        self.wait()
        saved = torch.load(folder / "trainer.pt", map_location=self.config.device, weights_only=True)
        if "optimizer" not in saved: dcp.load(self.parts(), checkpoint_id=folder)
        elif weights:
            held = dict(nemotron.released_tensors(self.model))
            for name, x in nemotron.read_tensors(folder): held[name].copy_(x)
        for name, p in self.model.named_parameters() if "optimizer" in saved else ():
            for key, x in saved["optimizer"][name].items():
                if key in self.optimizer.state[p]: self.optimizer.state[p][key].copy_(x)
                else: self.optimizer.state[p][key] = x
        torch.set_rng_state(saved["rng"].cpu())
        self.step = self.saved_step = saved["step"]
        self.decay_from = self.decay_from or saved.get("decay_from")


def log_line(row: dict) -> str:
    balance = "" if row["max_vio"] is None else f"max load/mean {row['max_vio_median']:.2f}, worst layer {row['max_vio']:.2f} | "
    return (f"step {row['step']:5d} | loss {row['loss']:.4f} | lr {row['lr']:.2e} | grad norm {row['grad_norm']:6.3f} | {balance}"
            f"tok/s {row['tokens_per_s']:7,.0f}")


class _Interrupt:
    """While inside, Ctrl-C (and a scheduler's SIGTERM) only sets .seen, so that the step at hand is finished; a second one stops at once."""
    def __enter__(self):
        self.seen, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            for which in (signal.SIGINT, signal.SIGTERM): self.before[which] = signal.signal(which, self.note)
        return self

    def note(self, which, frame):
        self.seen = True
        for which, handler in self.before.items(): signal.signal(which, handler)

    def __exit__(self, *_):
        for which, handler in self.before.items(): signal.signal(which, handler)


def check_same_run(folder: Path, config: PretrainConfig, data_hash: str) -> None:
    """ValueError naming the first setting, or the data, that differs from the checkpoint's: going on would be neither this run nor that one."""
    saved = json.loads((folder / "pretrain.json").read_text())
    now = json.loads(json.dumps(asdict(config), default=str))
    for f in fields(config):
        was = saved["config"].get(f.name, f.default)      # a setting that did not exist yet
        if f.name not in FREE and was != now[f.name]:
            raise ValueError(f"{folder} was trained with {f.name} = {was}, not {now[f.name]}: go on with the same settings, "
                             "or start over with --fresh.")
    if saved["data"] != data_hash:
        raise ValueError(f"the text is not the one {folder} was trained on: give the same --data, or start over with --fresh.")


# %% 10 · Bits per byte
# A loss per token depends on the tokenizer; bits per byte do not: nats of all predicted tokens / ln 2 / bytes these tokens stand for. </s> has no
# bytes, but its nats count: knowing where a text ends is part of predicting it. The first token of a window or a document is predicted by
# nobody and counts in neither.

@torch.no_grad()
def score_text(model: nemotron.Nemotron, shard: Shard, tokenizer: Tokenizer, seq: int, windows: int, autocast=contextlib.nullcontext,
               batch: int = 16) -> tuple[float, int]:
    """(nats, bytes) summed over the first `windows` windows of a shard's documents, in their order on disk."""
    device, size = model.lm_head.weight.device, tokenizer.byte_counts(model.config.vocab)
    n = min(windows, -(-max(len(shard.tokens) - 1, 0) // seq))
    ids_nt, doc_nt = np.zeros((n, seq + 1), np.int64), np.full((n, seq + 1), -1, np.int64)
    for i in range(n):
        span = np.arange(i * seq, min((i + 1) * seq + 1, len(shard.tokens)))
        ids_nt[i, :len(span)], doc_nt[i, :len(span)] = shard.tokens[span], np.searchsorted(shard.ends, span, side="right")
    nats = counted = 0
    for i in range(0, n, batch):
        x = Batch.from_windows(ids_nt[i:i + batch], doc_nt[i:i + batch])
        counted += int(size[x.labels_bt[x.mask_bt]].sum())
        x = x.to(device)
        with autocast():
            h_rd = model.hidden(x.ids_bt, x.doc_bt).flatten(0, 1)
            mean = nemotron.linear_cross_entropy(h_rd, model.lm_head.weight, x.labels_bt.flatten(), x.mask_bt.flatten())
        nats += mean.item() * int(x.mask_bt.sum())
    return nats, counted


def evaluate(trainer: Trainer, held_out: dict[str, Shard]) -> dict[str, float]:
    """Bits per byte of held-out text by source, and "all" over the bytes of all of them; prints the table."""
    c, sums = trainer.config, {}
    trainer.model.eval()
    for name, shard in held_out.items():
        sums[name] = score_text(trainer.model, shard, trainer.tokenizer, c.seq, c.eval_windows, trainer.autocast)
    trainer.model.train()
    sums = {name: pair for name, pair in sums.items() if pair[1]}
    if not sums: print("no held-out text: the corpus is too small to set one document in fifty aside"); return {}
    sums["all"] = tuple(map(sum, zip(*sums.values())))
    print(f"\n{'held-out text':16} {'bytes scored':>12} {'bits per byte':>14}")
    for name, (nats, counted) in sums.items(): print(f"{name:16} {counted:12,d} {nats / math.log(2) / counted:14.3f}")
    return {name: nats / math.log(2) / counted for name, (nats, counted) in sums.items()}


# %% 11 · Branches  [Ultra, health check of NVFP4]
# Does 4-bit training cost loss? Ultra answers by branching: from one checkpoint, on the same data, once in each precision. There the main run is
# in NVFP4 and the branch in bf16 (gap 0.25 to 0.28 % after 5B tokens); here the main run is in fp32 and both branches are short, for a CPU.

def run_branch(checkpoint: Path, config: PretrainConfig, data: Data, home: Path) -> Trainer:
    """config.branch_steps more steps from a checkpoint in config.precision, on the data and the learning rates it would have seen."""
    blend = Blend.of(data.train, config.blend_switch)
    batches = Batches(data.train, blend, config.batch, config.seq, config.steps, config.seed, extra=config.branch_steps)
    trainer = Trainer.load(checkpoint, config, batches, home, tokenizer=data.tokenizer)
    shutil.rmtree(home, ignore_errors=True)
    if not trainer.fit(trainer.step + config.branch_steps, log_every=20, label=f"branch in {config.precision}"): raise KeyboardInterrupt
    return trainer


def second_half(rows: list[dict]) -> float:
    """Mean loss of the second half of a branch: the first steps still show the jump of the switch."""
    return float(np.mean([row["loss"] for row in rows[len(rows) // 2:]]))


def relative_gap(branch: list[dict], reference: list[dict]) -> float:
    return second_half(branch) / second_half(reference) - 1      # (loss - reference loss) / reference loss


def compare_branches(config: PretrainConfig, data: Data) -> dict[str, list[dict]]:
    """Runs config.branches from the checkpoint before the decay, prints and returns their rows by precision."""
    checkpoint, runs = config.home / f"step-{config.branch_step:06d}", {}
    if not config.branches: return runs
    if not checkpoint.exists(): print(f"no branches: {checkpoint} is not there"); return runs
    print(f"\nbranches of {config.branch_steps} steps from {checkpoint}, same data, same schedule")
    for precision in config.branches:
        runs[precision] = run_branch(checkpoint, replace(config, precision=precision), data, config.home / f"branch-{precision}").rows
    first = config.branches[0]
    for precision in config.branches[1:]:
        print(f"relative loss gap of {precision} to {first}, last {config.branch_steps - config.branch_steps // 2} steps: "
              f"{relative_gap(runs[precision], runs[first]):+.2%}    (Ultra, NVFP4 to bf16: +0.25 to +0.28 %)")
    return runs


# %% 12 · Samples and tables

# three kinds of text, each with the temperature that suits it: a question has one right answer
PROMPTS = [("a story", "Once upon a time", 0.7), ("a Python function", "class File:\n    def __init__(self, name):\n", 0.4),
           ("an arithmetic question", "Q: how many 1 bits in 77?\nA:", 0.0)]


def write_samples(model: nemotron.Nemotron, tokenizer: Tokenizer, seed: int = 0) -> dict[str, str]:
    """Prints and returns how the model continues three prompts."""
    samples = {}
    for what, prompt, temperature in PROMPTS:
        sampling = nemotron.SamplingParams(max_tokens=120, temperature=temperature, top_p=0.95, seed=seed, stop_ids=(EOS,))
        ids = nemotron.generate(model, [tokenizer.encode(prompt)], sampling)[0].ids
        samples[what] = prompt + tokenizer.decode(i for i in ids if i != EOS)
        print(f"\n--- {what} (temperature {temperature}); the prompt is {prompt!r}\n{samples[what].rstrip()}")
    return samples


def print_data(data: Data, batches: Batches, blend: Blend, steps: int) -> None:
    print(f"{'source':14} {'MB':>6} {'documents':>10} {'tokens':>10} {'bytes/token':>12} {'held out':>9} {'phase 1':>8} {'phase 2':>8} {'epochs':>7}")
    for name, epochs in batches.epochs(steps).items():
        part, shard = data.record["sources"][name], data.train[name]
        size, tokens, held_out = part["train"]["bytes"], len(shard.tokens), part["held_out"]["documents"]
        print(f"{name:14} {size / 1e6:6.2f} {len(shard.ends):10,d} {tokens:10,d} {size / tokens:12.2f} {held_out:9,d} "
              f"{blend.phase1[name]:8.0%} {blend.phase2[name]:8.0%} {epochs:7.2f}")
    print(f"text read under Python {data.record['python']} (the standard library's text differs by version); vocabulary {len(data.tokenizer):,}\n")


# %% 13 · Command

def check_machine(config: PretrainConfig) -> None:
    """ValueError, before any work, for a device that is not there, a folder that cannot be written, or a model that cannot fit."""
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if not there[config.device]:
        raise ValueError(f"--device {config.device}: this torch sees no such device; use one of {', '.join(d for d in there if there[d])}.")
    try:
        config.home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=config.home): pass
    except OSError as error:
        raise ValueError(f"cannot write to {config.home} ({error.strerror or error}): choose another folder with --out.") from error
    if config.compile and config.device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        raise ValueError("--compile on a CPU needs a C++ compiler, and neither g++ nor clang++ is there: install one, or leave --compile out.")
    book = nemotron.ledger(nemotron.preset(config.preset))
    need = 16 * (book.total + book.mtp) / int(os.environ.get("WORLD_SIZE", 1))      # fp32 weight, gradient and two moments
    have = torch.cuda.get_device_properties(0).total_memory if config.device == "cuda" else _physical_memory()
    if need > have:
        raise ValueError(f"preset {config.preset} needs {need / 1e9:,.0f} GB for weights, gradients and optimizer and {config.device} has "
                         f"{have / 1e9:,.0f} GB: choose a smaller preset.")


def _physical_memory() -> float:
    try: return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError): return math.inf      # not known here (Windows)


def hash_of(data: Data) -> str:
    return hashlib.sha256("".join(shard.index["sha256"] for shard in data.train.values()).encode()).hexdigest()[:16]


def start(config: PretrainConfig, data: Data, batches: Batches, ranks: Ranks | None = None) -> Trainer:
    """The trainer of a new run, or of the one that --resume finds. ValueError when an earlier run would be overwritten unasked."""
    home, log = config.home, config.home / "metrics.jsonl"
    leads = ranks is None or ranks.number == 0
    if config.fresh and leads:
        for old in [*home.glob("step-*"), *home.glob("branch-*")]: shutil.rmtree(old)
        log.unlink(missing_ok=True)
    shared = dict(tokenizer=data.tokenizer, data_hash=hash_of(data), ranks=ranks)
    if ranks is not None: dist.barrier()
    if config.resume:
        folder = newest_checkpoint(home)
        check_same_run(folder, config, shared["data_hash"])
        trainer = Trainer.load(folder, config, batches, home, **shared)
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        trainer.rows = [row for row in rows if row["step"] <= trainer.step]      # those after the checkpoint will be written again
        if leads: log.write_text("".join(json.dumps(row) + "\n" for row in trainer.rows))
        print(f"resuming from {folder}\n")
        return trainer
    if checkpoints(home):
        raise ValueError(f"{home} holds checkpoints of an earlier run: --resume goes on with it, --fresh deletes it, --out chooses another folder.")
    torch.manual_seed(config.seed)
    return Trainer(config, nemotron.Nemotron(nemotron.preset(config.preset)), batches, home, **shared)


def branch_only(config: PretrainConfig) -> None:
    """--branch-from: one branch with the settings of the checkpoint, in --precision."""
    if problem := damage(config.branch_from): raise ValueError(f"{problem}: give --branch-from a folder like out/pretrain/step-000598.")
    saved = json.loads((config.branch_from / "pretrain.json").read_text())
    was = {f.name: saved["config"].get(f.name, f.default) for f in fields(config) if f.name not in FREE | {"precision"}}
    fixed = {name: tuple(value) if isinstance(value, list) else value for name, value in was.items()}
    config = replace(config, **fixed)
    data = prepare_data(config.data, config.out / "data", nemotron.preset(config.preset).vocab)
    check_same_run(config.branch_from, replace(config, precision=saved["config"]["precision"]), hash_of(data))
    trainer = run_branch(config.branch_from, config, data, config.home / f"branch-{config.precision}-{config.branch_from.name}")
    print(f"\n{config.branch_steps} steps in {config.precision}: mean loss of the second half {second_half(trainer.rows):.4f}"
          f"   rows: {trainer.home / 'metrics.jsonl'}   checkpoint: {trainer.save()}")


def main(config: PretrainConfig) -> None:
    began = time.perf_counter()
    check_machine(config)
    ranks = join(config)
    if config.branch_from: return branch_only(config)
    if ranks is not None and ranks.number: sys.stdout = open(os.devnull, "w")      # one process speaks for all
    sizes = nemotron.preset(config.preset)
    for turn in range(1 if ranks is None else 2):      # the first process makes text and tokens, the others find them
        if ranks is None or (ranks.number == 0) == (turn == 0): data = prepare_data(config.data, config.out / "data", sizes.vocab)
        if ranks is not None: dist.barrier()
    blend = Blend.of(data.train, config.blend_switch)
    batches = Batches(data.train, blend, config.batch, config.seq, config.steps, config.seed, **(ranks.rows if ranks is not None else {}))
    print_data(data, batches, blend, config.steps)
    trainer = start(config, data, batches, ranks)
    with torch.device("meta"): nemotron.print_placement(nemotron.Nemotron(sizes, trainer.model.recipe))      # of several processes each holds a part
    print(f"\npreset {config.preset} in {config.precision} on {config.device}: {config.steps} steps of {config.batch} × {config.seq} tokens "
          f"({config.steps * config.batch * config.seq / 1e6:.2f}M), learning rate {config.lr:g} to {config.lr_min:g}")
    if not trainer.fit(config.steps, save_at={config.branch_step}):
        print(f"\nstopped after step {trainer.step}, saved in {trainer.home / f'step-{trainer.step:06d}'}: the same command with --resume goes on.")
        sys.exit(130)
    if ranks is not None:
        print(f"\nsaved in {trainer.save()}; `python 05_pretrain.py --resume` in one process, with the same flags, scores it and writes text.")
        return dist.destroy_process_group()

    branches = compare_branches(config, data)
    bits = evaluate(trainer, data.held_out)
    samples = write_samples(trainer.model, data.tokenizer, config.seed)
    tail = trainer.rows[-max(1, len(trainer.rows) // 30):]
    gaps = {p: relative_gap(rows, branches[config.branches[0]]) for p, rows in branches.items() if p != config.branches[0]}
    nvfp4.write_row(config.out, "05_pretrain", preset=config.preset, precision=config.precision, seed=config.seed, steps=config.steps,
                    tokens=config.steps * config.batch * config.seq, loss=round(sum(r["loss"] for r in tail) / len(tail), 4),
                    bits_per_byte={k: round(v, 4) for k, v in bits.items()}, branch_gap={k: round(v, 5) for k, v in gaps.items()}, samples=samples,
                    tokens_per_s=float(np.median([r["tokens_per_s"] for r in trainer.rows])), python=data.record["python"],
                    threads=torch.get_num_threads(), seconds=round(time.perf_counter() - began, 1))
    print(f"\ncheckpoint: {trainer.home / f'step-{trainer.step:06d}'}   metrics: {trainer.home / 'metrics.jsonl'}; "
          f"python experiments/plot_run.py --home {trainer.home} draws them   {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    nvfp4.run_command(main, PretrainConfig, __doc__)
