"""The planner: does a layout fit, how long does the run take, and what travels between the GPUs. Nothing is run; everything is counted.

Run:   python experiments/plan.py --preset ultra --gpus 1024 --chip gb200          # 5 s, CPU: chooses a layout and prints the plan
       python experiments/plan.py --chip gb300 --tp 8 --ep 64 --recompute none --sharding zero1
       python experiments/plan.py --gpus 512 --seq 1048576 --batch 24 --tp 8 --cp 32 --ep 128 --pp 2     # the report's long-context layout

Counted elsewhere and only read here: parameters, FLOPs and cache sizes by stage 04's ledger, formats by its placement, tensors by the model on the
meta device, all-to-all bytes by stage 03's layer_cost. Written here: what the backward pass keeps, and who holds, sends and receives what.
Left out: overlap of transfers with compute (times stand beside each other, not added), latency, interleaved pipeline schedules, checkpoint writing,
uneven pipeline stages in the time (the memory is the fullest stage's).
[Ultra] states tokens, batch, sequence, steps, the size of the bf16 checkpoint, and a layout for the long-context phase only (CP 32, TP 8, EP 128,
PP 2). It gives no number of GPUs, no days, no throughput and no layout of the main run: nothing here can be compared with those.
Sources: [Ultra] Nemotron 3 Ultra report, arXiv 2606.15007 · [NVFP4] arXiv 2509.25149 · [Megatron] Megatron-LM · [FSDP2] torch's fully_shard
         [Megatron Bridge] NVIDIA's table of training speeds, release 26.02 · chips: see CHIPS
"""
from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


def stage(name: str):
    """A numbered stage, importable from this folder."""
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


nvfp4, moe, nemotron = (stage(name) for name in ("01_nvfp4", "03_latentmoe", "04_model"))


# %% Chips

@dataclass(frozen=True)
class Chip:
    """One accelerator. Peaks are dense. A data sheet's GB are taken as 10^9 bytes, which is never too many."""
    memory: float           # GB
    bandwidth: float        # TB/s to that memory
    bf16: float             # PFLOP/s
    fp8: float
    fp4: float | None       # None: no FP4 units; the recipe's products then run decoded, in bf16, as this repository's kernels do on Hopper
    domain: int             # chips joined by the fast link (NVLink, NeuronLink)
    link: float             # GB/s a chip on that link, one direction
    network: float          # GB/s a chip between domains, one direction
    source: str

    def rate(self, fmt: str) -> float:
        """PFLOP/s of products in a format of stage 04's placement."""
        return self.bf16 if fmt == "high" or self.fp4 is None else {"nvfp4": self.fp4, "mxfp8": self.fp8}[fmt]


# FP4 and FP8 of Trainium 2, Trainium 3, GB200 and VR200 are [Ultra]'s comparison; data sheets for the rest, sparse peaks halved.
# NOTE: the data sheets' figures are second-hand and were not compared with the sheets: do that for the chip that you rent.
CHIPS = {
    "h100": Chip(80, 3.35, 0.989, 1.979, None, 8, 450, 50, "[NVIDIA data sheet, H100 SXM; DGX H100: 8 × 400 Gb/s]"),
    "h200": Chip(141, 4.8, 0.989, 1.979, None, 8, 450, 50, "[NVIDIA data sheet, H200 SXM; DGX H200: 8 × 400 Gb/s]"),
    "b200": Chip(180, 8.0, 2.25, 4.5, 9.0, 8, 900, 50, "[NVIDIA data sheet, DGX B200, an eighth of it]"),
    "gb200": Chip(186, 8.0, 2.5, 5.0, 10.0, 72, 900, 50, "[Ultra: FP4, FP8; NVIDIA data sheet, GB200 NVL72; 400 Gb/s a GPU]"),
    "gb300": Chip(279, 8.0, 2.5, 5.0, 15.0, 72, 900, 100, "[NVIDIA data sheet, GB300 NVL72; 800 Gb/s a GPU]"),
    "vr200": Chip(288, 22.0, 4.0, 17.5, 35.0, 72, 1800, 200, "[Ultra: FP4, FP8; NVIDIA's preliminary figures, Vera Rubin NVL72]"),
    "trainium2": Chip(96, 2.9, 0.667, 1.3, None, 64, 640, 25, "[Ultra: FP8; AWS Neuron documentation; ours: 200 Gb/s of network a chip]"),
    "trainium3": Chip(144, 4.9, 0.671, 2.5, 2.5, 144, 1280, 25, "[Ultra: FP4, FP8; AWS Neuron documentation; ours: 200 Gb/s of network a chip]"),
}


# %% Settings and layout

@dataclass(frozen=True)
class Config:
    """Plans a training run of one preset. Sizes of 0 are chosen."""
    preset: str = "ultra"
    gpus: int = 1024                # ours: the report gives none
    chip: str = "gb200"
    dp: int = 0                     # copies of the model (under fsdp sharded ones): gpus / (tp · cp · pp)
    tp: int = 0                     # tensor: heads and widths
    ep: int = 0                     # experts, spread over ranks of the dp · cp · tp group
    cp: int = 0                     # context: the sequence
    pp: int = 0                     # pipeline: the layers
    batch: int = 3072               # sequences a step [Ultra]
    seq: int = 8192                 # tokens a sequence [Ultra]
    micro_batch: int = 1            # ours: sequences a rank computes at a time
    tokens: float = 20e12           # [Ultra]
    utilisation: float = 0.2        # ours: share of each product's own peak; Llama 3 70B in NVFP4 on GB200: 2,047 of 10,000 TFLOP/s [Megatron Bridge]
    precision: Literal["nvfp4", "bf16"] = "nvfp4"
    recompute: Literal["none", "selective", "full"] = "full"    # full: as stage 05's --recompute; selective: norms, conv, squares; a plan only
    sharding: Literal["fsdp", "zero1"] = "fsdp"     # over data ranks: everything (FSDP2), or the optimizer alone (Megatron's distributed optimizer)
    moment_bytes: int = 4           # of each of AdamW's two; master weights and gradients are fp32 [NVFP4, training methodology]
    imbalance: float = 1.2          # rows of the fullest rank's experts over the mean [Ultra: MaxVio's median, a bound for a rank]; memory only
    reserve: float = 0.08           # ours: share of the memory kept for CUDA, NCCL's buffers and fragmentation
    out: Path = Path("out")         # figure and result row

    def __post_init__(self):
        if self.chip not in CHIPS: raise ValueError(f"unknown chip {self.chip!r}: choose one of {', '.join(CHIPS)}.")
        for name in ("gpus", "batch", "seq", "micro_batch", "tokens", "moment_bytes"):
            if getattr(self, name) <= 0: raise ValueError(f"{name} = {getattr(self, name)} must be positive.")
        for axis in AXES:
            if getattr(self, axis) < 0: raise ValueError(f"{axis} = {getattr(self, axis)} is negative: 0 lets the planner choose.")
        if not 0 < self.utilisation <= 1: raise ValueError(f"utilisation = {self.utilisation} is a share of the peak: it must lie in (0, 1].")
        if self.imbalance < 1: raise ValueError(f"imbalance = {self.imbalance}: the fullest rank holds at least the mean, so give 1 or more.")
        if not 0 <= self.reserve < 1: raise ValueError(f"reserve = {self.reserve} is a share of the memory: it must lie in [0, 1).")


AXES = {"dp": "the batch", "tp": "heads and widths", "ep": "the experts", "cp": "the sequence", "pp": "the layers"}


@dataclass(frozen=True)
class Layout:
    """Sizes of the five axes. dp · tp · cp · pp = GPUs; the experts of a pipeline stage lie on ep of its dp · cp · tp ranks  [Megatron, parallel
    folding]: an MoE layer has no use for the other axes, so its experts may take their ranks."""
    dp: int
    tp: int
    ep: int
    cp: int
    pp: int

    @property
    def gpus(self) -> int: return self.dp * self.tp * self.cp * self.pp

    @property
    def copies(self) -> int: return self.dp * self.cp                           # ranks with the same slice of what is no expert

    @property
    def expert_copies(self) -> int: return self.dp * self.cp * self.tp // self.ep

    def __str__(self) -> str: return " ".join(f"{axis} {getattr(self, axis)}" for axis in AXES)


def check(run: Config, layout: Layout) -> None:
    """ValueError, in one sentence, for a layout that cannot be run whatever the memory."""
    c = nemotron.preset(run.preset)
    for axis in AXES:
        if getattr(layout, axis) < 1: raise ValueError(f"{axis} = {getattr(layout, axis)}: a size of a layout must be at least 1.")
    if layout.gpus != run.gpus:
        raise ValueError(f"dp · tp · cp · pp = {layout.gpus:,} ranks and there are {run.gpus:,} GPUs: the product must be the number of GPUs.")
    if "E" in c.pattern and c.experts % layout.ep:
        raise ValueError(f"ep = {layout.ep} does not divide the {c.experts} experts: choose a divisor, so that every rank holds as many.")
    ranks = layout.dp * layout.cp * layout.tp
    if ranks % layout.ep: raise ValueError(f"ep = {layout.ep} does not divide dp · cp · tp = {ranks:,}: the experts of a stage lie on these ranks.")
    if run.seq % (layout.cp * c.chunk):
        raise ValueError(f"cp = {layout.cp} cannot cut {run.seq:,} tokens into whole chunks of {c.chunk}: lower cp or lengthen the sequence.")
    for name, size in (("Mamba groups", c.groups), ("attention heads", c.heads)):
        if size % layout.tp: raise ValueError(f"tp = {layout.tp} does not divide the {size} {name}: a head or group lives on one rank; lower tp.")
    if layout.pp > c.layers:
        raise ValueError(f"pp = {layout.pp} stages and {c.layers} layers: a stage needs at least one layer; lower pp.")
    if run.batch % (layout.dp * run.micro_batch):
        raise ValueError(f"a batch of {run.batch:,} sequences is not a multiple of dp · micro_batch = {layout.dp * run.micro_batch:,}: every rank "
                         "computes as many; change batch, or raise tp, cp or pp, which lowers dp.")


def micro_batches(run: Config, layout: Layout) -> int: return run.batch // (layout.dp * run.micro_batch)


# %% Weights: every tensor of the model, where it lives and how it is cut

class Weight(NamedTuple):
    count: int
    fmt: str        # nvfp4, mxfp8 or high, by stage 04's placement
    layer: int      # in the trunk; -1 the embedding, layers the output layer and final norm, layers + 1 the prediction head
    cut: str        # "ep", "tp", "kv" (by tp as far as there are key heads) or "copied"

    def local(self, layout: Layout, kv_heads: int) -> float:
        """Values a rank computes with."""
        return self.count / {"ep": layout.ep, "tp": layout.tp, "kv": min(layout.tp, kv_heads), "copied": 1}[self.cut]


WHOLE = ("norm", ".gate.", "latent_proj")       # with tp every rank has these whole: they see all features of some tokens  [Megatron, "duplicated"]


def cut_of(name: str) -> str:
    if ".mixer.experts." in name: return "ep"
    if any(part in name for part in WHOLE) and ".mixer.norm." not in name: return "copied"      # Mamba's gated norm goes with its heads
    return "kv" if name.endswith(("k_proj.weight", "v_proj.weight")) else "tp"


@lru_cache
def weights(sizes: nemotron.ModelConfig) -> tuple[Weight, ...]:
    """Every parameter of the model built on the meta device."""
    torch = importlib.import_module("torch")
    with torch.device("meta"): model = nemotron.Nemotron(sizes)
    def layer_of(name: str) -> int:
        if name.startswith("backbone.layers."): return int(name.split(".")[2])
        return -1 if "embeddings" in name else sizes.layers + name.startswith("mtp.")
    return tuple(Weight(p.numel(), nemotron.placement_of(name, sizes)[0], layer_of(name), cut_of(name)) for name, p in model.named_parameters())


def on_stage(sizes: nemotron.ModelConfig, layout: Layout, stage: int) -> list[Weight]:
    """The weights of one pipeline stage. The prediction head sits with the output layer and needs an embedding of its own there  [Megatron]."""
    last = layout.pp - 1
    place = lambda layer: 0 if layer < 0 else last if layer >= sizes.layers else layer * layout.pp // sizes.layers
    own = [w for w in weights(sizes) if place(w.layer) == stage]
    return own + [w for w in weights(sizes) if w.layer < 0 and stage == last and last > 0 and sizes.mtp_pattern]


# %% Activations: what the backward pass keeps of one block

class Saved(NamedTuple):
    """One tensor that a block's backward pass reads. kept: by selective recomputation too, as the output of a product, a scan or a transfer."""
    name: str
    bytes: float            # a token
    kept: bool
    cut: str = "tp"         # by tp all are cut, features or tokens (sequence parallelism); "kv" and "routed" as for the weights; "states"


SCAN_CHUNK = 64     # tokens between the states that the Triton scan keeps of 16-bit inputs, whatever the config's chunk  (kernels/ssd.py)


def saved_by_block(letter: str, c: nemotron.ModelConfig, path: Literal["torch", "bf16", "nvfp4"], context: int = 8192) -> list[Saved]:
    """What one layer keeps a token, by tensor; tests/test_plan.py measures all three paths. "torch": the PyTorch functions in fp32. "bf16" and
    "nvfp4": 16-bit activations with the Triton twins, which keep the inputs of fused kernels in place of what lies between. Weights are not counted.

    An NVFP4 product keeps its input in 16 bits and quantizes it again in the backward pass, as stage 01 does.
    """
    plain, w = path == "torch", 4 if path == "torch" else 2
    again = lambda name, values: [Saved(name, values * w, False)] if plain else []      # in between: kept by autograd, not by the twins
    rows = [Saved("block input", c.d_model * w, True), Saved("normalised input", c.d_model * w, False), Saved("scale of the norm", 4, True),
            *again("normalised, before the norm's weight", c.d_model)]
    if letter == "M":
        states = (math.ceil(context / c.chunk) + 1) / context * 4 if plain else w / SCAN_CHUNK
        rows += [Saved("in_proj: z, x, B, C, dt", c.in_proj_rows * w, True), Saved("x, B, C after the convolution", c.conv_channels * w, False),
                 *again("its input on the tape, and before SiLU", 2 * c.conv_channels), Saved("scan output", c.inner * w, True),
                 Saved("out_proj input", c.inner * w, False), *again("gated norm: y + D x, silu(z), their product, normalised", 4 * c.inner),
                 Saved("steps, decays, scales of the gated norm", (c.mamba_heads * (3 if plain else 7) + c.groups) * 4, True),
                 Saved("states, one a chunk", c.inner * c.state * states, True, "states")]
    elif letter == "*":
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        rows += [Saved("queries", q * w, True), Saved("keys and values", 2 * kv * w, True, "kv"), Saved("attention output", q * w, True),
                 Saved("log of the softmax's sum", c.heads * 4, True)]
    else:
        k, width, f = c.experts_per_token, c.latent or c.d_model, c.expert_width
        fused = path == "bf16"      # one function for both products: it keeps the square, and neither hidden rows nor output rows
        rows += [Saved("rows sent to experts", k * width * w, True, "routed"), Saved("hidden rows", 0 if fused else k * f * w, True, "routed"),
                 Saved("hidden rows squared", k * f * w, fused, "routed"), Saved("rows sent back", 0 if fused else k * width * w, True),
                 Saved("sum of the experts", (c.latent or 0) * w, True), Saved("shared expert, hidden", c.shared_width * w, True),
                 Saved("shared expert, squared", c.shared_width * w, False), Saved("router scores", c.experts * 4, True),
                 Saved("choices: weights, experts, orders", k * (2 * 4 + 3 * 8) + 16, True)]
    return rows


def block_bytes(run: Config, layout: Layout, letter: str) -> dict[str, float]:
    """{"all": …, "kept": …, "input": …} bytes of one micro-batch on one rank, states apart as "states"."""
    c = nemotron.preset(run.preset)
    tokens = run.micro_batch * run.seq / layout.cp
    share = {"tp": 1 / layout.tp, "kv": 1 / min(layout.tp, c.kv_heads), "routed": run.imbalance / layout.tp, "states": 1 / layout.tp}
    rows = [(s, s.bytes * tokens * share[s.cut]) for s in saved_by_block(letter, c, run.precision, run.seq)]
    pick = lambda wanted: sum(n for s, n in rows if wanted(s))
    return dict(all=pick(lambda s: s.cut != "states"), kept=pick(lambda s: s.kept and s.cut != "states"), input=rows[0][1],
                states=pick(lambda s: s.cut == "states"))


# %% Memory

@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU of the fullest pipeline stage."""
    weights: float          # what the products read: bf16, and the 4- and 8-bit copies
    gradients: float        # fp32
    optimizer: float        # fp32 master weights and AdamW's two moments
    activations: float      # kept for the backward pass, and one block recomputed
    states: float           # Mamba's states, one a chunk, kept for the backward pass
    loss: float             # output layer: its weight gradient, made in the forward pass once a prediction, and a piece of the logits
    stage: int = 0

    @property
    def parts(self) -> dict[str, float]: return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "stage"}

    @property
    def total(self) -> float: return sum(self.parts.values())


def weight_memory(run: Config, layout: Layout, own: list[Weight]) -> tuple[float, float, float]:
    """(weights, gradients, optimizer) bytes of a rank that holds `own`.

    zero1: bf16 weights and fp32 gradients of everything it computes with, the optimizer cut over the copies.
    fsdp: all three cut; gathered are the embedding and output layer, and two layers (one computes while the next arrives).  [FSDP2]
    """
    sizes = nemotron.preset(run.preset)
    local = [(w, w.local(layout, sizes.kv_heads)) for w in own]
    # a quantised weight is held twice, by rows and by columns: Blackwell's products read both operands along the contraction  [NVFP4, appendix]
    copy_of = lambda w: 2 * nemotron.BITS[w.fmt] / 8 if run.precision == "nvfp4" and w.fmt != "high" else 0
    shards = lambda w: layout.expert_copies if w.cut == "ep" else layout.copies
    cut = sum(n / shards(w) for w, n in local)
    optimizer = (4 + 2 * run.moment_bytes) * cut
    if run.sharding == "zero1": return sum(n * (2 + copy_of(w)) for w, n in local), sum(4 * n for _, n in local), optimizer
    root = sum(n for w, n in local if w.layer in (-1, sizes.layers))
    units, copies = {}, {}
    for w, n in local:
        if w.layer in (-1, sizes.layers): continue
        units[w.layer], copies[w.layer] = units.get(w.layer, 0) + n, copies.get(w.layer, 0) + n * copy_of(w)
    largest = max(units.values(), default=0)
    return 2 * (root + 2 * largest) + max(copies.values(), default=0), 4 * (cut + root + largest), optimizer


def activation_memory(run: Config, layout: Layout, stage: int) -> tuple[float, float, float]:
    """(activations, states, loss) bytes of a stage, which holds as many micro-batches as stages follow it, itself included  [1F1B schedule]."""
    c, last = nemotron.preset(run.preset), layout.pp - 1
    letters = [letter for i, letter in enumerate(c.pattern) if i * layout.pp // c.layers == stage]
    tokens, depths = run.micro_batch * run.seq / layout.cp, c.mtp_depths if c.mtp_pattern else 0
    head = list(c.mtp_pattern) * depths if stage == last else []
    book = {letter: block_bytes(run, layout, letter) for letter in {*letters, *head}}
    blocks = letters + head
    in_flight = min(layout.pp - stage, micro_batches(run, layout))

    column = {"none": "all", "selective": "kept", "full": "input"}[run.recompute]
    activations = in_flight * sum(book[x][column] for x in blocks)
    states = 0.0 if run.recompute == "full" else in_flight * sum(book[x]["states"] for x in blocks)
    if run.recompute != "none": activations += max(b["all"] - b[column] + (b["states"] if run.recompute == "full" else 0) for b in book.values())
    if stage < last: return activations, states, 0.0
    # eh_proj's input (twice the width), what its two norms read, and the final norm's input
    activations += in_flight * (depths * 5 + 2) * c.d_model * 2 * tokens / layout.tp
    per_prediction = 4 * c.vocab * c.d_model / layout.tp + 2 * c.d_model * tokens / layout.tp
    return activations, states, (1 + depths) * per_prediction + 2 * min(tokens, LOGIT_ROWS) * c.vocab / layout.tp


LOGIT_ROWS = 8192       # rows of logits that exist at a time  (kernels/cross_entropy.py)


def memory(run: Config, layout: Layout) -> Memory:
    """Of the fullest stage."""
    sizes = nemotron.preset(run.preset)
    stages = [Memory(*weight_memory(run, layout, on_stage(sizes, layout, s)), *activation_memory(run, layout, s), s) for s in range(layout.pp)]
    return max(stages, key=lambda m: m.total)


def limit(run: Config, chip: Chip) -> float: return 1e9 * chip.memory * (1 - run.reserve)


# %% Choosing a layout, and what to raise when one does not fit

def powers(top: int) -> list[int]: return [2 ** i for i in range(int(math.log2(top)) + 1)]


def largest_ep(run: Config, ranks: int) -> int:
    """The largest ep that stays in one NVLink domain  [Ultra: worth 20 %]."""
    c = nemotron.preset(run.preset)
    return max(e for e in powers(max(1, min(CHIPS[run.chip].domain, ranks))) if "E" in c.pattern and c.experts % e == 0 and ranks % e == 0 or e == 1)


def candidates(run: Config) -> Iterator[Layout]:
    """Layouts that keep the sizes given, smallest tp · cp · pp first; among equals the least pipeline, then tensor: stage 05 has neither."""
    c = nemotron.preset(run.preset)
    tops = (run.pp, min(c.layers, 64)), (run.tp, c.groups), (run.cp, max(1, run.seq // c.chunk))
    options = [[given] if given else powers(top) for given, top in tops]
    products = [(pp, tp, cp) for pp in options[0] for tp in options[1] for cp in options[2]]
    for pp, tp, cp in sorted(products, key=lambda x: (math.prod(x), *x)):
        dp = run.dp or max(1, run.gpus // (tp * cp * pp))
        layout = Layout(dp, tp, run.ep or largest_ep(run, dp * tp * cp), cp, pp)
        try: check(run, layout)
        except ValueError: continue
        yield layout


def choose(run: Config) -> Layout:
    """The first candidate that fits the chip; the one that needs least when none fits. ValueError when no candidate can be run at all."""
    best = None
    for layout in candidates(run):
        need = memory(run, layout).total
        if need <= limit(run, CHIPS[run.chip]): return layout
        if best is None or need < best[0]: best = need, layout
    if best: return best[1]
    ones = {axis: getattr(run, axis) or 1 for axis in AXES}
    dp = run.dp or max(1, run.gpus // (ones["tp"] * ones["cp"] * ones["pp"]))
    check(run, Layout(**{**ones, "dp": dp}))        # says what is wrong with the sizes given
    raise ValueError(f"no layout of {run.gpus:,} GPUs divides a batch of {run.batch:,} sequences: change gpus or batch.")


def remedies(run: Config, layout: Layout) -> list[tuple[str, float]]:
    """(what to change, bytes then needed) for every single change that can be run, best first."""
    tries = [(f"--{axis} {2 * getattr(layout, axis)}", run, replace(layout, **{axis: 2 * getattr(layout, axis)}, **less))
             for axis, less in (("ep", {}), *((axis, {"dp": layout.dp // 2}) for axis in ("cp", "tp", "pp")))]
    if run.recompute != "full": tries.append(("--recompute full", replace(run, recompute="full"), layout))
    if run.sharding != "fsdp": tries.append(("--sharding fsdp", replace(run, sharding="fsdp"), layout))
    out = []
    for what, changed, other in tries:
        try: check(changed, other)
        except ValueError: continue
        out.append((what, memory(changed, other).total))
    return sorted(out, key=lambda item: item[1])


def refusal(run: Config, layout: Layout) -> str | None:
    """One sentence when the layout does not fit the chip: by how much, and what helps."""
    chip, need = CHIPS[run.chip], memory(run, layout)
    over = need.total - limit(run, chip)
    if over <= 0: return None
    part = max(need.parts, key=need.parts.get)
    helps = [f"{what} ({bytes / 1e9:,.0f} GB)" for what, bytes in remedies(run, layout) if bytes < need.total][:3]
    advice = f"of single changes these help most: {', '.join(helps)}." if helps else "take more GPUs, or a chip with more memory."
    return (f"{run.preset} with {layout} needs {need.total / 1e9:,.0f} GB a GPU, {over / 1e9:,.0f} GB more than one {run.chip} has for it (most "
            f"of it {part}): {advice}")


# %% Work and time

@dataclass(frozen=True)
class Work:
    """FLOPs of one token; both dicts by format."""
    forward: dict[str, float]       # main model and prediction head
    again: dict[str, float]         # forward work repeated by recomputation

    @property
    def training(self) -> dict[str, float]: return {fmt: 3 * self.forward[fmt] + self.again[fmt] for fmt in self.forward}

    @property
    def total(self) -> float: return sum(self.training.values())


def work(run: Config) -> Work:
    """The ledger's FLOPs, shared out over formats by the placement; the backward pass is twice the forward pass."""
    c = nemotron.preset(run.preset)
    book, depths = nemotron.ledger(c, run.seq).flops_per_token, c.mtp_depths if c.mtp_pattern else 0
    total, output = sum(book.values()), book["output layer"]
    if depths:      # the head is a model of its own layers and the same output layer, behind eh_proj [2d -> d]
        head = nemotron.ledger(replace(c, pattern=c.mtp_pattern, mtp_pattern="", mtp_depths=0), run.seq).flops_per_token
        total += depths * (sum(head.values()) + 4 * c.d_model ** 2)
    forward = dict.fromkeys(nemotron.BITS, 0.0)
    for w in weights(c):
        if run.precision == "nvfp4" and w.fmt != "high": forward[w.fmt] += 2 * w.count * (c.experts_per_token / c.experts if w.cut == "ep" else 1)
    forward["high"] = total - sum(forward.values())
    # the output layer lies outside the blocks; its gradients are made in the forward pass
    repeated = run.recompute == "full"
    return Work(forward, {fmt: repeated * (n - (1 + depths) * output * (fmt == "high")) for fmt, n in forward.items()})


def step_seconds(run: Config, layout: Layout, chip: Chip) -> float:
    """Compute of one step at the utilisation, with the pipeline's idle share (pp - 1) / micro-batches on top; no transfers."""
    per_token = sum(flops / (1e15 * chip.rate(fmt)) for fmt, flops in work(run).training.items())
    return run.batch * run.seq * per_token / (layout.gpus * run.utilisation) * (1 + (layout.pp - 1) / micro_batches(run, layout))


def optimizer_seconds(run: Config, layout: Layout, chip: Chip) -> float:
    """AdamW at the speed of memory: reads the gradient, reads and writes master weight and moments, writes the bf16 weight."""
    state = 4 + 2 * run.moment_bytes
    return memory(run, layout).optimizer / state * (4 + 2 * state + 2) / (1e12 * chip.bandwidth)


def days(run: Config, layout: Layout, chip: Chip) -> float: return run.tokens / (run.batch * run.seq) * step_seconds(run, layout, chip) / 86400


# %% Traffic

@dataclass(frozen=True)
class Flow:
    """Bytes that a GPU sends a step, averaged over the pipeline's stages: inside its NVLink domain, and out of it."""
    name: str
    inside: float
    outside: float

    def seconds(self, chip: Chip) -> float: return max(self.inside / (1e9 * chip.link), self.outside / (1e9 * chip.network))


def together(group: int, stride: int, chip: Chip) -> int:
    """How many of a group's ranks share a domain. Consecutive ranks fill one, tensor ranks first; ours: 64 of NVL72's 72 are used."""
    near = min(group, max(1, 2 ** int(math.log2(chip.domain)) // stride))
    while group % near: near -= 1
    return near


def collective(name: str, size: float, group: int, near: int) -> Flow:
    """All-gather or reduce-scatter of `size` bytes over `group` ranks: all but the own share. Each domain needs what lies outside once, and its
    `near` ranks share that out over their network cards; the rest goes by NVLink."""
    total, outside = size * (group - 1) / group, size * (1 - near / group) / near
    return Flow(name, total - outside, outside)


def pairwise(name: str, size: float, group: int, near: int) -> Flow:
    """All-to-all: `size` bytes in equal parts to the group's ranks; a rank's own part stays."""
    return Flow(name, size * (near - 1) / group, size * (group - near) / group)


def passes(run: Config) -> int: return 3 if run.recompute == "full" else 2     # forward, backward, and forward again


def all_to_all_bytes(run: Config, layout: Layout, full_width: bool = False) -> float:
    """Bytes a rank's tokens send to experts and back in a step, bf16, own expert included; full_width: had the experts no latent space."""
    c = nemotron.preset(run.preset)
    width = c.d_model if full_width else c.latent or c.d_model
    per_layer = moe.layer_cost(c.d_model, width, c.experts, c.experts_per_token, c.expert_width, batch=1).sent_bytes
    layers = c.pattern.count("E") + (c.mtp_depths * c.mtp_pattern.count("E"))
    return per_layer * layers * passes(run) * run.batch * run.seq / layout.gpus


def context_flows(run: Config, layout: Layout, chip: Chip) -> list[Flow]:
    """Per neighbour Mamba hands on one state and the convolution's window whatever the length; attention gathers all keys and values."""
    c, cp = nemotron.preset(run.preset), layout.cp
    book = nemotron.ledger(c)
    pattern = c.mtp_pattern * c.mtp_depths
    heads = nemotron.ledger(replace(c, pattern=pattern, mtp_pattern="", mtp_depths=0)) if pattern else None
    own, times = run.micro_batch / layout.pp * (cp - 1) / cp, passes(run) * micro_batches(run, layout)
    add = lambda field: getattr(book, field) + (getattr(heads, field) if heads else 0)
    near = together(cp, layout.tp, chip)
    hop = lambda name, size: Flow(name, size * (near == cp), size * (near < cp))
    kv = 2 * add("kv_values_per_token") * run.seq * run.micro_batch / layout.pp / min(layout.tp, c.kv_heads) * times
    return [hop("context: Mamba states (fp32)", 4 * add("state_values") / layout.tp * own * times),
            hop("context: convolution windows", 2 * add("window_values") / layout.tp * own * times),
            collective("context: keys and values", kv, cp, near)]


def traffic(run: Config, layout: Layout, chip: Chip) -> list[Flow]:
    """Everything a GPU sends in a step. Gradients are summed in fp32, weights and activations travel in bf16."""
    c, m = nemotron.preset(run.preset), micro_batches(run, layout)
    flows = [pairwise("experts: all-to-all", all_to_all_bytes(run, layout), layout.ep, together(layout.ep, 1, chip))]
    times = (2 * m, m) if run.sharding == "fsdp" else (1, 1)      # gathers (before forward and backward), reductions of a step
    for name, cut, group, stride in (("data: dense", False, layout.copies, layout.tp), ("data: experts", True, layout.expert_copies, layout.ep)):
        values = sum(w.local(layout, c.kv_heads) for s in range(layout.pp) for w in on_stage(c, layout, s) if (w.cut == "ep") == cut) / layout.pp
        near = together(group, stride, chip)
        flows += [collective(f"{name} gradients, reduce-scatter", 4 * values * times[1], group, near),
                  collective(f"{name} weights, all-gather", 2 * values * times[0], group, near)]
    flows += context_flows(run, layout, chip)
    tokens, tp = run.micro_batch * run.seq / layout.cp, layout.tp
    # a block gathers tokens and scatters sums: 2 forward, 2 backward and 1 more gather for the weight gradient; 2 when computed again
    blocks = (c.layers + c.mtp_depths * len(c.mtp_pattern)) / layout.pp
    moved = (5 + 2 * (run.recompute == "full")) * blocks * m * 2 * tokens * c.d_model
    flows.append(collective("tensor: gather and scatter", moved, tp, together(tp, 1, chip)))
    sends = 2 * m * 2 * tokens / tp * c.d_model * (layout.pp - 1) / layout.pp       # forward and backward over each boundary
    flows.append(Flow("pipeline: sends", sends * (layout.gpus <= chip.domain), sends * (layout.gpus > chip.domain)))
    return flows


# %% Printing

def gigabytes(n: float) -> str: return f"{n / 1e9:,.2f}" if n < 1e11 else f"{n / 1e9:,.0f}"


def print_layout(run: Config, layout: Layout) -> None:
    c, m = nemotron.preset(run.preset), micro_batches(run, layout)
    what = {"dp": f"{run.batch:,} sequences: {m} micro-batches of {run.micro_batch} a rank", "tp": f"{c.heads} heads, {c.groups} Mamba groups",
            "ep": f"{c.experts} experts: {c.experts // layout.ep} a rank, {layout.expert_copies} copies",
            "cp": f"{run.seq:,} tokens: {run.seq // layout.cp:,} a rank", "pp": f"{c.layers} layers: {c.layers / layout.pp:g} a stage"}
    nvfp4.print_table(f"{run.preset} on {run.gpus:,} {run.chip}, {run.precision}, recompute {run.recompute}, {run.sharding}",
                      ["axis", "size", "splits", "here"], [[axis, getattr(layout, axis), split, what[axis]] for axis, split in AXES.items()])
    print(f"  dp · tp · cp · pp = {layout.gpus:,} GPUs; ep folds into dp · cp · tp = {layout.dp * layout.cp * layout.tp:,}")


def print_memory(run: Config, layout: Layout) -> None:
    need, chip = memory(run, layout), CHIPS[run.chip]
    rows = [[part, gigabytes(n), f"{n / need.total:.1%}"] for part, n in need.parts.items()]
    rows += [["total", gigabytes(need.total), ""], ["limit", gigabytes(limit(run, chip)), f"{1 - run.reserve:.0%} of {chip.memory:g}"]]
    nvfp4.print_table(f"memory a GPU, pipeline stage {need.stage} (the fullest)", ["part", "GB", "share"], rows)


def print_work(run: Config, layout: Layout) -> None:
    cost, chip, tokens = work(run), CHIPS[run.chip], run.batch * run.seq
    rows = [[fmt, f"{n / 1e9:,.1f}", f"{n / cost.total:.1%}", f"{chip.rate(fmt):g}"] for fmt, n in cost.training.items() if n]
    nvfp4.print_table("work of one token: forward, backward" + (", forward again" if run.recompute == "full" else ""),
                      ["format", "GFLOP", "share", "peak PFLOP/s"], rows)
    seconds, steps = step_seconds(run, layout, chip), run.tokens / tokens
    print(f"  a step: {tokens:,} tokens, {tokens * cost.total / 1e18:,.1f} EFLOP, {seconds:,.2f} s at {run.utilisation:.0%} of each product's peak "
          f"({tokens * cost.total / seconds / layout.gpus / 1e15:.2f} PFLOP/s a GPU, recomputation counted)"
          f"\n  {int(steps):,} steps for {run.tokens / 1e12:g}T tokens: {days(run, layout, chip):,.1f} days; not in it: the optimizer's "
          f"{optimizer_seconds(run, layout, chip):.3f} s a step at {chip.bandwidth:g} TB/s of memory")


def print_traffic(run: Config, layout: Layout) -> None:
    chip, c = CHIPS[run.chip], nemotron.preset(run.preset)
    flows = traffic(run, layout, chip)
    compute = step_seconds(run, layout, chip)
    rows = [[f.name, gigabytes(f.inside), gigabytes(f.outside), f"{f.seconds(chip):.3f}", f"{f.seconds(chip) / compute:.0%}"]
            for f in flows if f.inside or f.outside]
    nvfp4.print_table(f"sent a GPU and step (compute: {compute:,.2f} s; overlap is not modelled, so nothing is added up)",
                      ["what", f"GB at {chip.link:g} GB/s", f"GB at {chip.network:g} GB/s", "seconds", "of compute"], rows)
    if c.latent and "E" in c.pattern:
        latent, full = (all_to_all_bytes(run, layout, width) * (layout.ep - 1) / layout.ep for width in (False, True))
        print(f"  all-to-all in the latent space {gigabytes(latent)} GB, at full width {gigabytes(full)} GB: a factor of {c.d_model / c.latent:g}")
    book = nemotron.ledger(c)
    kv = ", ".join(f"{gigabytes(2 * book.kv_values_per_token * t)} GB at {t:,} tokens" for t in (8192, 1_048_576))
    print(f"  context parallelism hands {gigabytes(4 * book.state_values)} GB of Mamba states a sequence to each neighbour at any length and gathers "
          f"keys and values:\n  {kv}")


def compare_chips(run: Config, layout: Layout) -> list[dict]:
    """The same plan on every chip: one dict a chip."""
    need, rows = memory(run, layout).total, []
    for name, chip in CHIPS.items():
        slowest = max(flow.seconds(chip) for flow in traffic(run, layout, chip)) / step_seconds(run, layout, chip)
        rows.append(dict(chip=name, need_gb=need / 1e9, limit_gb=limit(run, chip) / 1e9, fits=need <= limit(run, chip), fp4=chip.fp4, fp8=chip.fp8,
                         bf16=chip.bf16, days=days(run, layout, chip), transfer=slowest))
    return rows


def print_chips(run: Config, layout: Layout) -> None:
    rows = [[r["chip"], "yes" if r["fits"] else "no", f"{r['need_gb']:,.0f}", f"{r['limit_gb']:,.0f}", f"{r['fp4']:g}" if r["fp4"] else "none",
             f"{r['fp8']:g}", f"{r['bf16']:g}", f"{r['days']:,.0f}", f"{r['transfer']:.0%}"] for r in compare_chips(run, layout)]
    nvfp4.print_table("the same plan on every chip (dense PFLOP/s; without FP4 units the 4- and 8-bit products run in bf16)",
                      ["chip", "fits", "needs GB", "limit GB", "FP4", "FP8", "bf16", "days", "longest transfer, of compute"], rows)


def print_report(run: Config) -> None:
    """What the report states beside what is counted here."""
    ultra = Config(chip=run.chip)
    book = nemotron.ledger(nemotron.preset("ultra"))
    long = replace(ultra, gpus=512, seq=1_048_576, batch=24, precision=run.precision)
    layout = Layout(dp=1, tp=8, ep=128, cp=32, pp=2)
    check(long, layout)
    need = memory(long, layout).total
    nvfp4.print_table("beside the report  [Ultra]", ["", "report", "counted here"], [
        ["steps of 3,072 × 8,192 tokens for 20T", "794,728", f"{int(ultra.tokens / (ultra.batch * ultra.seq)):,}"],
        ["checkpoint in bf16, TB", "1.1", 2 * (book.total + book.mtp) / 1e12],
        ["long context: tokens a step, 24 × 1,048,576", "25,165,824", f"{long.batch * long.seq:,}"],
        [f"  TP 8, CP 32, EP 128, PP 2 (here {run.chip}, fsdp, recompute full)", "ran, chip not said",
         f"{'fits' if need <= limit(long, CHIPS[run.chip]) else 'does not fit'}: {need / 1e9:,.0f} GB on 512 GPUs or a multiple"],
        ["GPUs, days, throughput, main layout", "not stated", "-"]])


# %% Figure

COLOURS = dict(weights="#4c78a8", gradients="#9ecae9", optimizer="#f2b45c", activations="#8cc46a", states="#3f8f5b", loss="#b79ad1")


def alternatives(run: Config, layout: Layout) -> dict[str, Memory]:
    """The plan and other ways to run it, as labels and memory; those that cannot be run are left out."""
    resized = lambda axis, size: replace(layout, **{axis: size}, dp=layout.dp * getattr(layout, axis) // size)
    ways = {f"this plan: {run.sharding}, tp {layout.tp}, recompute {run.recompute}": (run, layout)}
    for recompute in ("full", "selective", "none"):
        for tp in (1, 8): ways[f"fsdp, tp {tp}, recompute {recompute}"] = replace(run, recompute=recompute, sharding="fsdp"), resized("tp", tp)
    for tp in (1, 8): ways[f"zero1, tp {tp}, recompute full"] = replace(run, recompute="full", sharding="zero1"), resized("tp", tp)
    out, seen = {}, []
    for label, (other, sizes) in ways.items():
        try: check(other, sizes)
        except ValueError: continue
        need = memory(other, sizes)
        if need in seen: continue
        seen.append(need); out[label] = need
    return out


def plot(run: Config, layout: Layout, path: Path) -> None:
    """Figure: memory a GPU by part, one bar a way to run the same model on the same GPUs; the chip's limit as a line."""
    bars, top = alternatives(run, layout), limit(run, CHIPS[run.chip]) / 1e9
    fig, ax = nvfp4.new_figure(width=9.5, height=1.7 + 0.42 * len(bars))
    left = [0.0] * len(bars)
    for part, colour in COLOURS.items():
        values = [getattr(need, part) / 1e9 for need in bars.values()]
        ax.barh(list(bars), values, left=left, label=part, color=colour, height=0.7)
        left = [a + b for a, b in zip(left, values)]
    for y, total in enumerate(left): ax.text(total, y, f" {total:,.0f}", va="center", fontsize=9)
    ax.axvline(top, color="#c0392b", linewidth=1.4)
    ax.text(top, -0.62, f" {top:,.0f} GB of one {run.chip}", color="#c0392b", fontsize=9, va="bottom")
    fitting = sum(total <= top for total in left)
    ax.set_title(f"{fitting} of {len(bars)} ways to train {run.preset} on {run.gpus:,} GPUs fit one {run.chip}'s memory", pad=20)
    ax.set_xlabel("GB a GPU, fullest pipeline stage"); ax.invert_yaxis(); ax.grid(False, axis="y"); ax.margins(x=0.08)
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.13), frameon=False, fontsize=10, ncols=len(COLOURS))
    nvfp4.save_figure(fig, path)


def main(run: Config) -> None:
    nvfp4.writable_folder(run.out)
    nemotron.preset(run.preset)
    layout = choose(run)
    print_layout(run, layout)
    print_memory(run, layout)
    plot(run, layout, run.out / "plan.png")
    why = refusal(run, layout)
    if why: raise ValueError(why)
    print_work(run, layout)
    print_traffic(run, layout)
    print_chips(run, layout)
    if run.preset == "ultra": print_report(run)
    chip, need = CHIPS[run.chip], memory(run, layout)
    settings = {k: v for k, v in asdict(run).items() if k not in (*AXES, "out")}
    nvfp4.write_row(run.out, "plan", **settings, layout=asdict(layout), memory_gb={part: round(n / 1e9, 2) for part, n in need.parts.items()},
                    gflop_per_token=round(work(run).total / 1e9, 1), step_s=round(step_seconds(run, layout, chip), 3),
                    days=round(days(run, layout, chip), 1), sent_gb={f.name: [round(f.inside / 1e9, 2), round(f.outside / 1e9, 2)]
                                                                     for f in traffic(run, layout, chip) if f.inside or f.outside})
    print(f"\nfigure: {run.out / 'plan.png'}   chip: {chip.source}")


if __name__ == "__main__":
    nvfp4.run_command(main, Config, __doc__)
