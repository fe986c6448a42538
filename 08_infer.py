"""08 · Inference: a trained checkpoint in 4 and 8 bits, caches in slots, continuous batching, drafts that are verified and rolled back, budgets.

Left out:  trees of drafts, several devices, FP8 tensor cores (on a GPU the FP8 layers multiply in 16 bits), AWQ, quantization-aware training.
Sources:   [Ultra] Nemotron 3 Ultra report, arXiv 2606.15007 · [Card] its model card · [ModelOpt] NVIDIA Model-Optimizer: its export, its recipe
           nvfp4-46-max for Ultra · [vLLM] its nemotron_h_mtp and Mamba states · [Replay] TensorRT-LLM and FlashInfer
           [Leviathan] Speculative Decoding, arXiv 2211.17192
Run:       python 08_infer.py                              # 1 min, CPU: the tour: quantize, draft, caches, a question in every mode
           python 08_infer.py chat                         # talk to the newest checkpoint in out/boosted; /help there says how
           python 08_infer.py generate --prompt "gcd of 12 and 18?" --mode off --temperature 0 --draft 2
           python 08_infer.py bench --preset nano --random-weights    # one GPU: tokens/s by batch size and drafts, from sizes alone
           python 08_infer.py quantize --base out/sft --scale-rule mse     # 10 s, CPU, into out/quantized; --preset ultra: the bill alone
Contents:  1 precision  2 quantize a checkpoint  3 compute with it  4 slot caches  5 sampling and drafts  6 engine  7 reasoning budget  8 commands
Letters:   b batch, or slots  r rows: of one pass, or flattened (b·t)  t time  s cached time  k drafts, or chosen experts  w a window (k + 1)
           d model width  v vocabulary  h heads  p head width  g groups  n state  c conv channels  e experts  l latent  f expert width
           q rows sorted by expert;  o output features, i input features of a linear layer; i places of an answer
"""
from __future__ import annotations

import codecs
import importlib
import re
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import terminal
from data.batches import Batch
from data.modelopt import ALGORITHMS, is_quantized, read_config, write_configs, write_shards
from data.prefixes import Prefixes
from data.tokenizer import Tokenizer
from data.traces import Traced

nvfp4, mamba, moe, nemotron, pretrain, sft = (importlib.import_module(name) for name in (
    "01_nvfp4", "02_mamba", "03_latentmoe", "04_model", "05_pretrain", "06_sft"))

# %% 1 · Precision  [Ultra, quantization; ModelOpt]
# The released Ultra, as data; the first pattern that matches a name wins. Routed experts are most of the parameters, and each is read by few tokens:
# they go to 4 bits. What every token passes keeps more.
#     nvfp4  W4A4, weights and inputs in 4 bits      w4a16  4-bit weights only, as a Hopper GPU serves them
#     fp8    E4M3, one scale a tensor, both          bf16   not quantized

PRECISION = (("mtp.*", "bf16", "multi-token prediction"),           # first, or its experts would match the next line
    ("*.mixer.experts.*", "nvfp4", "routed experts"),
    ("*.mixer.shared_experts.*", "fp8", "shared experts"),
    ("*.mixer.in_proj.weight", "fp8", "Mamba projections"), ("*.mixer.out_proj.weight", "fp8", "Mamba projections"),
    ("*.mixer.[qkvo]_proj.weight", "bf16", "attention projections"), ("*.mixer.fc?_latent_proj.weight", "bf16", "latent projections"),
    ("backbone.embeddings.weight", "bf16", "embedding and output layer"), ("lm_head.weight", "bf16", "embedding and output layer"),
    ("*", "bf16", "router, norms, conv, A, D, dt bias"),   # NOTE: of these, what stage 04 keeps in fp32 stays as it was
)


@dataclass(frozen=True)
class Recipe:
    """How to quantize; the defaults are the released Ultra's."""
    scale_rule: Literal["max", "mse", "four_over_six"] = "four_over_six"      # of 4-bit weights; inputs take max, which needs no search
    weights_only: bool = False       # 4-bit weights without input scales
    kv_fp8: bool = True              # also write the scales of an FP8 cache of keys and values
    precision: tuple[tuple[str, str, str], ...] = PRECISION

    def __post_init__(self):
        nvfp4.check_request(torch.zeros(16), (1, 16), "nearest", self.scale_rule, None, "nvfp4", "input")      # an unknown rule is an error now
        if unknown := [fmt for _, fmt, _ in self.precision if fmt not in ALGORITHMS]:
            raise ValueError(f"the precision table names the unknown format {unknown[0]!r}: use one of {', '.join(ALGORITHMS)}.")

    def format_of(self, name: str) -> tuple[str, str]:
        """(format, label) of a tensor by its released name; ("bf16", "the rest") where no pattern matches."""
        fmt, label = next((rule[1:] for rule in self.precision if fnmatch(name, rule[0])), ("bf16", "the rest"))
        return "w4a16" if self.weights_only and fmt == "nvfp4" else fmt, label

    def kv_scale(self, name: str) -> str | None:
        """Name of the scale that lies beside a projection to keys or values; the head keeps those in 16 bits."""
        match = re.fullmatch(r"(backbone\..*\.([kv])_proj)\.weight", name) if self.kv_fp8 else None
        return match and f"{match[1]}.{match[2]}_scale"


Shares = defaultdict[tuple[str, str], Counter]      # by (format, label): tensors, elements, bits; error and energy, the sums of squares


def count_bits(tensors: Iterable[tuple[str, Tensor]], recipe: Recipe) -> Shares:
    """The bill before anything is quantized, all scales included. Shapes are enough: tensors may be on the meta device."""
    shares: Shares = defaultdict(Counter)
    for name, tensor in tensors:
        n, fmt = tensor.numel(), recipe.format_of(name)[0]
        bits = {"nvfp4": n * (4 + 8 / 16) + 64, "w4a16": n * (4 + 8 / 16) + 32, "fp8": 8 * n + 64,
                "bf16": n * (32 if name.endswith(nemotron.FP32) else 16)}[fmt] + (32 if recipe.kv_scale(name) else 0)
        shares[recipe.format_of(name)].update(tensors=1, elements=n, bits=bits)
    return shares


def bits_per_element(shares: Shares) -> float: return sum(s["bits"] for s in shares.values()) / sum(s["elements"] for s in shares.values())


def print_shares(title: str, shares: Shares) -> None:
    """One line a format and kind, the largest first, with the error where something was quantized."""
    row = lambda label, fmt, s: [label, ALGORITHMS.get(fmt, ""), f"{s['tensors']:,}", nemotron.short(s["elements"]), s["bits"] / s["elements"]]
    rows = []
    for (fmt, label), s in sorted(shares.items(), key=lambda item: -item[1]["elements"]):
        lost = s["error"] / s["energy"] if s["error"] else None
        rows.append(row(label, fmt, s) + ([f"{lost**0.5:.2%}", f"{nvfp4.decibels(lost):.2f} dB"] if lost else ["", ""]))
    rows.append([*row("all", "", sum(shares.values(), Counter())), "", ""])
    nvfp4.print_table(title, ["", "format", "tensors", "parameters", "bits each", "error", "signal to error"], rows)


# %% 2 · Quantize a checkpoint  [ModelOpt, export]
# Directories are read and written a tensor at a time, so a checkpoint may be larger than memory. Each X.weight becomes
#     NVFP4   weight uint8 [o, i/2], weight_scale e4m3 [o, i/16], weight_scale_2 fp32, input_scale fp32 (W4A16: without the last)
#     FP8     weight e4m3 [o, i], weight_scale fp32, input_scale fp32           scale = largest magnitude / 448
#     KV      k_proj.k_scale, v_proj.v_scale fp32                               likewise, of keys and values
# Inputs are rounded while serving, by a scale fixed here: the largest input that a layer meets in some text. The experts of a layer share theirs,
# the maximum over the rows of all, since few rows reach a single one.  [ModelOpt levels it over the experts, too]

@torch.no_grad()
def calibrate(model: nemotron.Nemotron, batches: Iterable[Batch]) -> dict[str, float]:
    """The largest magnitude of every projection's input, by module name ("….experts.up_proj" for all experts of a layer), and of keys and values
    ("….k_proj.k_scale"). Padding does not count. The prediction head is not run."""
    valid_r, kv_scale = None, lambda module: Recipe().kv_scale(f"{module}.weight")
    with moe.record_amax(model.backbone, "backbone", lambda x: x.flatten(0, -2)[valid_r], kv_scale) as amax:
        for batch in (b.to(model.lm_head.weight.device) for b in batches):
            valid_r = (batch.doc_bt >= 0).flatten()
            model.hidden(batch.ids_bt, batch.doc_bt)
    return {name: x.item() for name, x in amax.items()}


def quantized_tensors(name: str, tensor: Tensor, recipe: Recipe, amax: dict[str, float], share: Counter) -> dict[str, Tensor]:
    """What one tensor of the checkpoint becomes; `share` keeps the account."""
    def input_scale(name: str, largest: float) -> Tensor:
        if 0 < (seen := amax.get(name, 0.0)) < float("inf"): return torch.tensor(seen) / largest
        raise ValueError(f"the largest activation seen at {name} is {seen}, which gives no scale: pass amax=calibrate(model, batches), on more text.")

    fmt, module = recipe.format_of(name)[0], name.removesuffix(".weight")
    if fmt == "bf16": stored = {name: tensor if name.endswith(nemotron.FP32) else tensor.to(torch.bfloat16)}
    else:
        parts, values = moe.quantize_weight(name, tensor, fmt, recipe.scale_rule)
        if fmt in moe.INPUT_RANGE: parts["input_scale"] = input_scale(re.sub(r"\.experts\.\d+\.", ".experts.", module), moe.INPUT_RANGE[fmt])
        stored = {f"{module}.{suffix}": part for suffix, part in parts.items()}
        energy = lambda x: x.square().sum(dtype=torch.float64).item()
        share.update(error=energy(values - tensor), energy=energy(tensor.float()))
    if key := recipe.kv_scale(name): stored[key] = input_scale(key, nvfp4.E4M3_MAX)
    share.update(tensors=1, elements=tensor.numel(), bits=8 * sum(t.nbytes for t in stored.values()))
    return stored


def quantize_checkpoint(directory: str | Path, recipe: Recipe, out: str | Path, amax: dict[str, float], shard_bytes: int = 5 * 10**9,
                        progress: bool = False) -> Shares:
    """Writes the checkpoint in `directory` into `out`, in ModelOpt's layout and all or nothing; returns bits and weight error by format and kind.
    amax: what calibrate returned. ValueError for a directory that is none, or quantized, or damaged, and a width that blocks do not divide."""
    directory, out = Path(directory), Path(out)
    released, shares, formats = read_config(directory, quantized=False), defaultdict(Counter), {}
    if out.exists() and not (out / "hf_quant_config.json").exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} holds something else than a quantized checkpoint, which would be lost: choose another folder.")

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tqdm(nemotron.read_tensors(directory), desc="quantize", unit="tensor", leave=False, disable=not progress):
            kind = recipe.format_of(name)
            if kind[0] != "bf16": formats[name.removesuffix(".weight")] = kind[0]
            yield from quantized_tensors(name, tensor, recipe, amax, shares[kind]).items()

    def fill(folder: Path) -> None:
        write_shards(folder, stream(), shard_bytes)
        write_configs(folder, directory, released, formats, recipe.kv_fp8)

    pretrain.write_folder(out, pretrain.unfinished(out), fill)
    return shares


# %% 3 · Compute with it
# A quantized layer (stage 03, section 8) multiplies rounded inputs with rounded weights and sums in fp32, as tensor cores do. On a CPU weights are
# decoded to fp32 once, at loading, because decoding costs more than multiplying; inputs are rounded at each call, so the numbers are a GPU's up to
# the order of sums. On a GPU the codes stay as they are, and stage 01's kernels decode them on the way.

def targets(model: nemotron.Nemotron) -> dict[str, Tensor]:
    """Name in the checkpoint -> the memory it belongs in; an expert's is a piece of the stack."""
    return dict(nemotron.released_tensors(model)) | moe.packed_tensors(model)


def load_quantized(directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16, weights_only: bool = False,
                   packed: bool | None = None) -> nemotron.Nemotron:
    """A Nemotron that computes with a checkpoint in ModelOpt's layout, ours or a released one. ValueError for misfits.

    dtype: of what is not in codes. weights_only: 4-bit layers do not round their inputs, as on Hopper.
    packed: keep nothing but the codes; None: on a GPU. Scales of an FP8 cache lie at mixer.k_proj.k_scale and mixer.v_proj.v_scale.
    """
    directory = Path(directory)
    config = nemotron.ModelConfig.from_dict(read_config(directory, quantized=True))
    codes = {torch.uint8: " uint8", torch.float8_e4m3fn: " float8_e4m3fn"}      # the dtypes that must fit, others are converted
    describe = lambda tensors: {name: f"{list(t.shape)}{codes.get(t.dtype, '')}" for name, t in tensors}
    found = describe(nemotron.read_tensors(directory))
    if not any(name.startswith("mtp.") for name in found): config = replace(config, mtp_pattern="", mtp_depths=0)
    with torch.device("meta"):
        model = nemotron.Nemotron(config)
        moe.pack_modules(model, found)
    expected = describe(targets(model).items())
    if wrong := [f"{name}: expected {expected.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
                 for name in {**expected, **found} if expected.get(name) != found.get(name)]:
        raise ValueError(f"{directory} does not fit its config.json ({len(wrong)} tensors): {'; '.join(wrong[:4])}{'; …' if wrong[4:] else ''}")

    model = model.to_empty(device=device).requires_grad_(False)      # 4-bit weights serve, they do not train
    for p in (p for name, p in model.named_parameters() if not name.endswith(nemotron.FP32)): p.data = p.data.to(dtype)
    into = targets(model)
    for name, tensor in nemotron.read_tensors(directory): into[name].copy_(tensor)
    for module in moe.packed_modules(model):
        if weights_only and module.fmt == "nvfp4": module.fmt = "w4a16"
        if packed or packed is None and module.weight.is_cuda: continue
        module.decoded = module.weight.float() if module.fmt == "fp8" else module.stored().dequantize()      # FP8: its scale multiplies the product
    return model


@torch.no_grad()
def random_model(config: nemotron.ModelConfig, recipe: Recipe | None = None, device: str | torch.device = "cpu",
                 dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nemotron.Nemotron:
    """An untrained Nemotron for sizing, drawn where and as it will lie: with a recipe in codes and scales, so that Super fits a GPU.

    The embedding's values have size 1, those of a matrix with i columns 1 / sqrt(i), and 1 / sqrt(L) of that where it writes to the residual stream,
    as in stage 04. So each of L blocks adds about 1 / L of the stream's first variance, and hiddens neither vanish nor grow, however deep."""
    with torch.device("meta"):
        model, found = nemotron.Nemotron(config), {}
        for name, _ in nemotron.released_tensors(model) if recipe else ():
            fmt, scale, scales = recipe.format_of(name)[0], recipe.kv_scale(name), name.removesuffix("weight")
            codes = {"fp8": {name: "float8"}, "w4a16": {f"{scales}weight_scale_2": ""}, "bf16": {},
                     "nvfp4": {f"{scales}weight_scale_2": "", f"{scales}input_scale": ""}}[fmt]
            found |= codes | ({scale: ""} if scale else {})
        moe.pack_modules(model, found)
    for p in (p for name, p in model.named_parameters() if not name.endswith(nemotron.FP32)): p.data = p.data.to(dtype)
    model, g = model.to_empty(device=device).requires_grad_(False).eval(), torch.Generator(device).manual_seed(seed)
    size = lambda name, columns: (columns * (config.layers if name.endswith(nemotron.OUTPUTS) else 1)) ** -0.5
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("A_log"): t.uniform_(1, 16, generator=g).log_()
        elif name.endswith("dt_bias"): t.uniform_(-6.9, -2.25, generator=g)        # softplus of it: 0.001 to 0.1, as stage 02 draws dt
        elif t.dim() < 2: t.fill_(0 if name.endswith("bias") else 1)               # norms, D and the scales of an FP8 cache: 1
        elif t.element_size() > 1: t.normal_(0, 1 if "embeddings" in name else size(name, t.shape[-1]), generator=g)
    for name, module in model.named_modules():
        if isinstance(module, moe.Packed): module.draw(size(f"{name}.weight", module.shape[-1]), g)
    return model


# %% 4 · Slot caches  [Ultra, inference]
# A server holds a fixed number of slots; a sequence lives in one until it ends. Tensors keep shape and address for good, and how far each slot is
# filled stands in tensors of lengths: what a CUDA graph needs. A pass over tokens that may be rejected must be taken back. Keys, values and the conv
# window, a ring by place in the text: by the length. SSM state, two ways (stage 02, section 7):
#   snapshot   a ring of k + 2 entries a slot: the state before the window, and after each of its k + 1 tokens; accepting moves a pointer.
#   replay     one state a slot and the inputs since it was written, at most RING; accepting moves a cursor. A ring without room for a window is
#              worked into the state, so rounded formats are rounded once a flush instead of once a token.
# A pass fills rows up on the right: a token that is not there has dt = 0, its key goes to the last cell, what the pass says of it is ignored.

RING = 16           # inputs kept since the last written state  [Replay: 16]
KV_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
Rollback = Literal["snapshot", "replay"]


class Rows(NamedTuple):
    """One pass: row i brings count_r[i] tokens (of t, filled up on the right) to slot slot_r[i], behind start_r[i] that are there."""
    slot_r: Tensor; start_r: Tensor; count_r: Tensor
    real_rt: Tensor; at_rt: Tensor      # which tokens are there, and their places in the sequence: what is no token goes to the last cell
    seen: int                           # cells that any token may see: on a GPU all, so that shapes stay and nobody waits for a length
    every: bool                         # the rows are all slots in order: no copy of the keys
    full: bool                          # and each brings one token, to keep: the usual step
    write: str                          # what becomes of the SSM states, as in mamba.ssd_step
    states: Tensor | None = None        # SlotCaches.states_of
    turn: tuple[Tensor, Tensor] | None = None       # of a CPU's usual step: the new token's cell in the conv windows, and each cell's tap


class KVPool:
    """Keys and values of one attention layer, [b, kv_heads, cells, p]. The last cell takes what is no token. FP8 lies as bytes."""
    def __init__(self, slots: int, heads: int, cells: int, width: int, stored: torch.dtype, device=None):
        lies = torch.uint8 if stored == torch.float8_e4m3fn else stored         # float8 has no indexing on every device
        self.k_bhsp, self.v_bhsp = (torch.zeros(slots, heads, cells, width, device=device, dtype=lies) for _ in range(2))
        self.k_scale = self.v_scale = 1.0       # of FP8, which a quantized checkpoint brings with it

    def exchange(self, pool_bhsp: Tensor, new_rthp: Tensor, scale: float, rows: Rows) -> Tensor:
        """Puts the new tokens into their cells -> what the rows may see, [r, kv_heads, seen, p]."""
        stored, fp8 = new_rthp, pool_bhsp.dtype == torch.uint8
        if fp8: stored = (new_rthp.float() / scale).clamp(-nvfp4.E4M3_MAX, nvfp4.E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
        pool_bhsp[rows.slot_r[:, None], :, rows.at_rt] = stored.to(pool_bhsp.dtype)
        z = pool_bhsp[:, :, :rows.seen] if rows.every else pool_bhsp[rows.slot_r, :, :rows.seen]
        return (z.view(torch.float8_e4m3fn).float() * scale if fp8 else z).to(new_rthp.dtype)

    def mix(self, layer: nemotron.Attention, u_rtd: Tensor, rows: Rows) -> Tensor:
        q_rthp, k_rthp, v_rthp = (proj(u_rtd).unflatten(-1, (-1, layer.head_dim)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
        return layer.o_proj(self.attend_cells(q_rthp, k_rthp, v_rthp, rows).flatten(2))

    def attend_cells(self, q_rthp: Tensor, k_rthp: Tensor, v_rthp: Tensor, rows: Rows, impl: str = "auto") -> Tensor:
        """New tokens into their cells -> what each reads of its slot's cells up to its own, [r, t, h, p]. The twin needs no `seen`."""
        twin = None if q_rthp.dtype == torch.float64 else nvfp4.find_twin("attention", "attend_cells", impl, q_rthp)
        if twin: return twin(self, q_rthp, k_rthp, v_rthp, rows)
        k_rhsp, v_rhsp = self.exchange(self.k_bhsp, k_rthp, self.k_scale, rows), self.exchange(self.v_bhsp, v_rthp, self.v_scale, rows)
        # NOTE: cells behind the own place hold rejected drafts or an earlier owner's keys; only this mask keeps them out
        mask_r1ts = (torch.arange(rows.seen, device=q_rthp.device) <= rows.at_rt[..., None])[:, None]
        return F.scaled_dot_product_attention(q_rthp.transpose(1, 2), k_rhsp, v_rhsp, attn_mask=mask_r1ts, enable_gqa=True).transpose(1, 2)


class MambaPool:
    """Conv windows, SSM states and, for replay, the inputs kept since the states were written (one more cell for what is no token)."""
    def __init__(self, caches: SlotCaches, i: int, layer: mamba.Mamba2, dtype: torch.dtype, device):
        h, p, g, n, b = layer.heads, layer.head_dim, layer.groups, layer.state, caches.slots
        make, (channels, _, taps) = partial(torch.zeros, device=device), layer.conv1d.weight.shape
        zeros = make(b * caches.entries, h, p, n, dtype=mamba.wide(dtype))
        self.caches, self.i, self.layer = caches, i, layer
        self.state = mamba.quantize_state(zeros, caches.state_format.removesuffix("_sr"), impl="torch")
        self.window_bwc = make(b, taps + caches.draft, channels, dtype=dtype)       # a ring by place in the text, see mamba.conv_step
        sizes = ((h, p), (h,), (g, n), (g, n)) if caches.replays else ()      # x, dt, B, C
        self.kept = [make(b, RING + 1, *z, dtype=mamba.wide(dtype) if len(z) == 1 else dtype) for z in sizes]

    def step(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, slots_b: Tensor | None, write: str = "last") -> Tensor:
        """mamba.ssd_step -> y."""
        return mamba.ssd_step(x, dt, -self.layer.A_log.to(dt.dtype).exp(), B, C, self.layer.D, self.state, None, slots_b, write,
                              self.caches.state_format, self.caches.seed_l[self.i])[0]

    def mix(self, layer: mamba.Mamba2, u_rtd: Tensor, rows: Rows) -> Tensor:
        h, p, g, n = layer.heads, layer.head_dim, layer.groups, layer.state
        z_rti, xBC_rtc, dt_rth = layer.in_proj(u_rtd).split([h * p, h * p + 2 * g * n, h], dim=-1)
        if rows.full and self.caches.plain: return layer.out_proj(layer.norm(self.single(layer, xBC_rtc, dt_rth, rows), z_rti))
        xBC_rtc, dt_rth = mamba.conv_step(xBC_rtc, dt_rth, layer.conv1d.weight, layer.conv1d.bias, layer.dt_bias, layer.time_step_limit,
                                          self.window_bwc, rows.slot_r, rows.start_r, rows.real_rt)
        x_rti, B_rti, C_rti = xBC_rtc.split([h * p, g * n, g * n], dim=-1)
        y_rthp = self.scan((x_rti.unflatten(-1, (h, p)), dt_rth, B_rti.unflatten(-1, (g, n)), C_rti.unflatten(-1, (g, n))), rows)
        return layer.out_proj(layer.norm(y_rthp.flatten(2), z_rti))

    def single(self, layer: mamba.Mamba2, xBC_b1c: Tensor, dt_b1h: Tensor, rows: Rows) -> Tensor:
        """Convolution and scan [b, 1, h p] of a CPU's usual step in few operators: their number is its time."""
        cell_b, tap_bw = rows.turn
        self.window_bwc[rows.slot_r, cell_b] = xBC_b1c[:, 0]
        y_b1c = (self.window_bwc * layer.conv1d.weight[:, 0].T[tap_bw]).sum(1, keepdim=True).add_(layer.conv1d.bias)
        x, dt, A_h, B, C = (z if z.dim() == 1 else z[:, 0] for z in layer.scan_inputs(F.silu(y_b1c), dt_b1h))
        return mamba.move_state(self.state, x, dt, A_h, B, C, layer.D, None).flatten(1)[:, None]

    def scan(self, new: tuple[Tensor, ...], rows: Rows) -> Tensor:
        """y [r, t, h, p] and the states moved on, snapshotted or left, as rows.write says."""
        (x, dt, B, C), slot_r, (_, t), caches = new, rows.slot_r, rows.real_rt.shape, self.caches
        if rows.every and t == caches.entries == 1 and caches.state_format == "fp32": return self.step(*(z[:, 0] for z in new), None)[:, None]
        if rows.write == "each": return self.step(*new, rows.states, "each")
        if rows.write == "none":
            at_rt = torch.where(rows.real_rt, caches.kept_b[slot_r][:, None] + torch.arange(t, device=dt.device), RING)
            for ring, z in zip(self.kept, new): ring[slot_r[:, None], at_rt] = z
            x, dt, B, C = self.kept if rows.every else (ring[slot_r] for ring in self.kept)
            # NOTE: rejected inputs and the cell for no token lie behind; the recurrence does not look ahead, and nothing is written
            y = self.step(x, dt, B, C, rows.states, "none")
            return y.gather(1, at_rt[..., None, None].expand(-1, -1, *y.shape[2:]))
        if t <= (32 if caches.static else 4): return self.step(*new, rows.states)      # ours: 02's step goes token by token, its twin does not
        S_rhpn, A_h = mamba.read_slots(self.state, rows.states), -self.layer.A_log.to(dt.dtype).exp()
        y, S_rhpn = mamba.ssd_chunked(x, dt, A_h, B, C, self.layer.D, self.layer.chunk, S_rhpn)
        mamba.write_slots(self.state, S_rhpn, rows.states, caches.state_format, caches.seed_l[self.i])
        return y


class SlotCaches:
    """Everything that `slots` sequences of at most `capacity` tokens leave behind. draft: how many tokens a window may be taken back (0 = none)."""
    def __init__(self, model: nemotron.Nemotron, slots: int, capacity: int, draft: int = 0, rollback: Rollback = "snapshot",
                 state_format: str = "fp32", kv_format: str | None = None, seed: int = 0):
        c, weight = model.config, model.lm_head.weight
        if min(slots, capacity) < 1: raise ValueError(f"{slots} slots of {capacity} tokens: both must be at least 1.")
        if kv_format not in (None, *KV_FORMATS): raise ValueError(f"kv_format={kv_format!r} is unknown: use one of {', '.join(KV_FORMATS)}.")
        if rollback not in ("snapshot", "replay"): raise ValueError(f"rollback={rollback!r} is unknown: use 'snapshot' or 'replay'.")
        if not 0 <= draft < RING: raise ValueError(f"draft = {draft} must lie between 0 and {RING - 1}: a window must fit the ring of {RING} inputs.")
        if draft and not hasattr(model, "mtp"): raise ValueError("the checkpoint has no MTP weights: nothing can draft; use draft = 0.")
        if draft and "M" in c.mtp_pattern: raise ValueError("the MTP head has Mamba layers: their states cannot be taken back here.")
        mamba.check_format(state_format, seed)
        self.model, self.slots, self.capacity, self.draft, self.state_format = model, slots, capacity, draft, state_format
        self.replays, device = bool(draft) and rollback == "replay", weight.device
        self.entries, self.static = draft + 2 if draft and not self.replays else 1, weight.is_cuda      # static: no waiting for the device's numbers
        self.plain = not weight.is_cuda and weight.dtype in (torch.float32, torch.float64) and self.entries == 1 and state_format == "fp32"
        self.length_b, self.head_length_b, self.entry_b, self.kept_b = torch.zeros(4, slots, dtype=torch.long, device=device)
        # a window may begin at the last token that fits, so there are draft cells more, and the one for no token
        stored, cells = KV_FORMATS.get(kv_format, weight.dtype), capacity + draft + 1
        make = {"E": lambda *_: None, "*": lambda i, mixer: KVPool(slots, c.kv_heads, cells, c.head_dim, stored, device),
                "M": lambda i, mixer: MambaPool(self, i, mixer, weight.dtype, device)}
        self.layers, self.head_layers = ([make[block.letter](i, block.mixer) for i, block in enumerate(blocks)]
                                  for blocks in (model.backbone.layers, model.mtp.layers if draft else ()))
        self.mambas = [pool for pool in self.layers if isinstance(pool, MambaPool)]
        for mixer, pool in ((block.mixer, pool) for block, pool in zip(model.backbone.layers, self.layers) if isinstance(pool, KVPool)):
            if kv_format == "fp8" and hasattr(mixer.k_proj, "k_scale"): pool.k_scale, pool.v_scale = mixer.k_proj.k_scale, mixer.v_proj.v_scale
        # dice of stochastic rounding, other ones for every call: in memory, where a CUDA graph finds them and moves them on
        self.seed_l = torch.tensor([nvfp4.draw_seed_for(seed, 0, 0, i) for i in range(len(self.layers))], device=device)

    def mix(self, block: nemotron.Block, u_rtd: Tensor, pool: KVPool | MambaPool | None, rows: Rows) -> Tensor:
        """A block without its norm and residual."""
        return block.mixer.mix(u_rtd)[0] if pool is None else pool.mix(block.mixer, u_rtd, rows)

    def states_of(self, rows: Rows) -> Tensor:
        """Which states a pass reads (and those that it writes behind each token): an entry a row, -1 where there is no token."""
        entry_r = self.entry_b if rows.every else self.entry_b[rows.slot_r]
        here_r = torch.where(rows.count_r > 0, rows.slot_r * self.entries + entry_r, -1)
        if rows.write != "each": return here_r
        step_t = torch.arange(1, rows.real_rt.shape[1] + 1, device=here_r.device)
        after_rt = rows.slot_r[:, None] * self.entries + (entry_r[:, None] + step_t) % self.entries
        return torch.cat([here_r[:, None], after_rt.masked_fill(~rows.real_rt, -1)], 1)

    def trunk(self, ids_rt: Tensor, rows: Rows) -> Tensor:
        """The trunk's hiddens after its final norm [r, t, d]; `commit` must follow."""
        if self.replays:        # room for the window; a pass that writes needs an empty ring
            limit = RING - ids_rt.shape[1] if rows.write == "none" else 0
            full_r = (rows.count_r > 0) & (self.kept_b[rows.slot_r] > limit)
            self.flush(torch.zeros_like(self.kept_b, dtype=torch.bool).index_copy_(0, rows.slot_r, full_r))
        self.seed_l.add_(1)
        if rows.full and self.plain and self.mambas:        # the cell of the new token in a conv window, and the tap that each cell meets
            cell_b = rows.start_r % (cells := self.mambas[0].window_bwc.shape[1])
            rows = rows._replace(turn=(cell_b, (torch.arange(cells) - 1 - cell_b[:, None]) % cells))
        else: rows = rows._replace(states=self.states_of(rows))
        x_rtd, blocks = F.embedding(ids_rt, self.model.backbone.embeddings.weight), self.model.backbone.layers
        u_rtd = blocks[0].norm(x_rtd)
        for block, pool, norm in zip(blocks, self.layers, [*(later.norm for later in blocks[1:]), self.model.backbone.norm_f]):
            x_rtd, u_rtd = mamba.add_rmsnorm(x_rtd, self.mix(block, u_rtd, pool, rows), norm.weight, norm.eps)
        return u_rtd

    def head(self, ids_rt: Tensor, hidden_rtd: Tensor, rows: Rows) -> Tensor:
        """The MTP head's hiddens [r, t, d], from each place's hidden and the token that came after it."""
        pools = iter(self.head_layers)
        run = lambda block, x_rtd, *_: (x_rtd + self.mix(block, block.norm(x_rtd), next(pools), rows), None)
        return self.model.mtp(F.embedding(ids_rt, self.model.backbone.embeddings.weight), hidden_rtd, run=run)[0]

    def rows(self, slot_r: Tensor | None, count_r: Tensor, t: int, start_b: Tensor, write: str = "last", seen: int | None = None,
             full: bool = False) -> Rows:
        """slot_r None: all slots. seen: None asks for the longest (on a GPU: all cells). full: all rows are real, and kept."""
        every, step_t = slot_r is None, torch.arange(t, device=count_r.device)
        slot_r = torch.arange(self.slots, device=count_r.device) if every else slot_r
        start_r, cells = start_b if every else start_b[slot_r], self.capacity + self.draft
        if seen is None: seen = cells if self.static else int(start_r.max()) + t
        real_rt, seen = step_t < count_r[:, None], min(seen, cells)
        return Rows(slot_r, start_r, count_r, real_rt, torch.where(real_rt, start_r[:, None] + step_t, cells), seen, every, full, write)

    def commit(self, rows: Rows, keep_r: Tensor) -> None:
        """Keeps the first keep_r tokens of the last trunk pass and takes the others back. A pass with write "last" must be kept whole."""
        at = slice(None) if rows.every else rows.slot_r
        self.length_b[at] += keep_r
        if rows.write == "each": self.entry_b[at] = (self.entry_b[at] + keep_r) % self.entries
        if rows.write == "none": self.kept_b[at] += keep_r

    def flush(self, full_b: Tensor) -> None:
        """Works the kept inputs of some slots into their states: the step over them that writes."""
        slots_b = torch.where(full_b & (self.kept_b > 0), torch.arange(self.slots, device=full_b.device), -1)
        if not self.static and (slots_b < 0).all(): return
        self.seed_l.add_(1)
        gone_bt1 = (torch.arange(RING + 1, device=full_b.device) >= self.kept_b[:, None])[..., None]
        for pool in self.mambas:
            x, dt, B, C = pool.kept
            pool.step(x, dt.masked_fill(gone_bt1, 0), B, C, slots_b)
        self.kept_b.masked_fill_(full_b, 0)

    def reset(self, slot_r: Tensor) -> None:
        """Makes slots new. Old keys and values stay, behind the length, where no mask shows them."""
        for counts_b in (self.length_b, self.head_length_b, self.entry_b, self.kept_b): counts_b[slot_r] = 0
        for pool in self.mambas:
            for z, at_r in ((pool.window_bwc, slot_r), *((part, slot_r * self.entries) for part in mamba.parts(pool.state))): z[at_r] = 0

    def bytes_per_slot(self) -> dict[str, int]:
        """What a sequence occupies, used or not, counted from the tensors; a model on the meta device will do. Ultra's states in fp32 weigh as
        much as its keys and values of 65,536 tokens in FP8  [Ultra, inference]."""
        kv = [z for pool in (*self.layers, *self.head_layers) if isinstance(pool, KVPool) for z in (pool.k_bhsp, pool.v_bhsp)]
        tensors = dict(kv=kv, state=[z for pool in self.mambas for z in mamba.parts(pool.state)],
                       window=[pool.window_bwc for pool in self.mambas], kept=[z for pool in self.mambas for z in pool.kept])
        return {name: sum(z.nbytes for z in group) // self.slots for name, group in tensors.items()}


# %% 5 · Sampling and drafts  [Leviathan; vLLM; Ultra, inference]
# Every request has its own dice, three numbers for each of its tokens, from its seed and place alone: one draws the token (behind a rejected draft,
# from what is left), one a draft for that place, one accepts or rejects it. A draft that an earlier rejection swept away has left no trace, so its
# dice may be thrown again.

@dataclass(frozen=True)
class SamplingParams(nemotron.SamplingParams):
    """Stage 04's, and: texts that end the answer (it is cut before them), whether to return log-probabilities (at temperature 1), and at how many
    tokens a trace of thoughts is closed (section 7)."""
    stop: tuple[str, ...] = (); logprobs: bool = False
    budget: int | None = None; margin: int = 500        # [Card]


def dice(sampling: nemotron.SamplingParams, place: int) -> Tensor:
    """[3, max_tokens] in [0, 1); the first row is what 04's generate throws for prompt `place`."""
    n, first = sampling.max_tokens, torch.Generator().manual_seed(sampling.seed * 1_000_003 + place)
    more = torch.Generator().manual_seed(nvfp4.draw_seed_for(sampling.seed, place))
    return torch.cat([torch.rand(n, generator=first, dtype=torch.float64)[None], torch.rand(n, 2, generator=more, dtype=torch.float64).T])


def probabilities(logits_rv: Tensor, temperature_r: Tensor, top_p_r: Tensor, cut: bool) -> tuple[Tensor, Tensor | None]:
    """What is drawn from, fp64: (p_rv in vocabulary order, ids in the order of drawing or None). Greedy is a one on the largest logit.
    cut: some row has top_p < 1. Sorting takes longer than a small model's step."""
    greedy_r1 = temperature_r[:, None] == 0
    p_rv, ids_rv = torch.softmax(logits_rv.double() / torch.where(greedy_r1, 1.0, temperature_r[:, None]), -1), None
    if cut:
        sorted_rv, ids_rv = p_rv.sort(-1, descending=True)
        kept_rv = sorted_rv.cumsum(-1) - sorted_rv < top_p_r[:, None]           # the token that crosses top_p stays in
        whole_r1 = (top_p_r[:, None] == 1) | greedy_r1
        p_rv = torch.where(whole_r1, p_rv, torch.zeros_like(p_rv).scatter_(1, ids_rv, sorted_rv * kept_rv))
        ids_rv = torch.where(whole_r1, torch.arange(p_rv.shape[1], device=p_rv.device), ids_rv)
    one_hot_rv = torch.zeros_like(p_rv).scatter_(1, logits_rv.max(-1, keepdim=True).indices, 1.0)
    return torch.where(greedy_r1, one_hot_rv, p_rv / p_rv.sum(-1, keepdim=True)), ids_rv


def draw(p_rv: Tensor, ids_rv: Tensor | None, u_r: Tensor) -> Tensor:
    """One token a row by inverting the cumulative distribution, which need not sum to 1, in the order of ids."""
    p_rv = p_rv if ids_rv is None else p_rv.gather(1, ids_rv)
    cumulative_rv = p_rv.cumsum(-1)
    pick_r = torch.searchsorted(cumulative_rv, (u_r * cumulative_rv[:, -1])[:, None], right=True)[:, 0]
    last_r = torch.where(p_rv > 0, torch.arange(p_rv.shape[1], device=p_rv.device), 0).amax(-1)      # rounding never picks a zero
    pick_r1 = torch.minimum(pick_r, last_r)[:, None]
    return (pick_r1 if ids_rv is None else ids_rv.gather(1, pick_r1))[:, 0]


# The head proposes k tokens one by one, drawn from its q; the trunk reads the pending token and all k in one pass and knows its own p at every
# place. Draft x is kept with chance min(1, p(x) / q(x)). At the first rejection the token comes from max(p - q, 0), normalised; behind k kept drafts
# one from p is free. What comes out is distributed as p. Greedy is the case of p and q that are one on one token; k = 0 is plain decoding.
# The head's cache [vLLM]: what a verification has kept passes the head again with the trunk's true hiddens, over the keys that the drafts had left;
# then k - 1 single passes feed the head its own hidden.

class Variant(NamedTuple):
    """What the host knows and a step saves work by; the defaults serve all. seen, full: as in SlotCaches.rows. greedy: all requests are. cut: some
    request has top_p < 1. logprobs: some request wants them."""
    seen: int | None = None; full: bool = False; greedy: bool = False; cut: bool = True; logprobs: bool = True


class Running:
    """What decoding knows of each slot. ids_bw[:new_b] came out last, its last one is pending: the trunk has not read it. hidden_bwd[i] is the
    trunk's hidden that ids_bw[i] followed. new_b = 0: nothing to decode. made_b: tokens of the answer, which stops by itself at limit_b."""
    def __init__(self, caches: SlotCaches):
        b, w, weight, make = caches.slots, caches.draft + 1, caches.model.lm_head.weight, partial(torch.zeros, device=caches.length_b.device)
        self.ids_bw, self.hidden_bwd = make(b, w, dtype=torch.long), make(b, w, weight.shape[1], dtype=weight.dtype)
        self.new_b, self.made_b, self.limit_b = make(3, b, dtype=torch.long)
        self.temperature_b, self.top_p_b = make(2, b, dtype=torch.float64)
        self.dice_b3i, self.how = make(b, 3, caches.capacity + w, dtype=torch.float64), Variant()
        self.offered_k, self.accepted_k = make(2, caches.draft, dtype=torch.long)

    def throw(self, die: int, ahead: int | Tensor) -> Tensor:
        """The numbers for the tokens `ahead` ([b, n], [n] or one) of the next one, [b, n]."""
        return self.dice_b3i[:, die].gather(1, (self.made_b[:, None] + ahead).clamp(max=self.dice_b3i.shape[2] - 1))


def propose(caches: SlotCaches, run: Running) -> tuple[Tensor, Tensor | None]:
    """(drafts [b, k], the distributions they were drawn from [b, k, v], None when all are greedy)."""
    k, on_b, how = caches.draft, (run.new_b > 0).long(), run.how
    h_bwd = caches.head(run.ids_bw, run.hidden_bwd, caches.rows(None, run.new_b, k + 1, caches.head_length_b, seen=how.seen))
    h_bd = h_bwd.gather(1, (run.new_b - 1).clamp(min=0)[:, None, None].expand(-1, 1, h_bwd.shape[2]))[:, 0]
    caches.head_length_b += run.new_b; ids, qs = [], []
    for i in range(k):
        # a draft's keys lie behind the length: the next verification overwrites them
        if i: h_bd = caches.head(ids[-1][:, None], h_bd[:, None], caches.rows(None, on_b, 1, caches.head_length_b + i - 1, seen=how.seen))[:, 0]
        logits_bv = caches.model.lm_head(h_bd)
        if how.greedy: ids.append(logits_bv.max(-1).indices); continue
        q_bv, order_bv = probabilities(logits_bv.float(), run.temperature_b, run.top_p_b, how.cut)
        ids.append(draw(q_bv, order_bv, run.throw(1, i)[:, 0])); qs.append(q_bv)
    return torch.stack(ids, 1), torch.stack(qs, 1) if qs else None


def accept(p_bwv: Tensor, q_bkv: Tensor, draft_bk: Tensor, u_bk: Tensor, forced: float | None = None) -> tuple[Tensor, Tensor]:
    """(number of drafts kept [b], what the token behind them is drawn from [b, v], not normalised).
    p = (.5 .5), q = (.9 .1), draft 0: kept when u < .5/.9; else the token behind is drawn from max(p - q, 0) = (0 .4): it is 1."""
    k, row_b = draft_bk.shape[1], torch.arange(len(draft_bk), device=draft_bk.device)
    p_bk, q_bk = (z[:, :k].gather(2, draft_bk[..., None])[..., 0] for z in (p_bwv, q_bkv))
    kept_b = (u_bk * q_bk < p_bk if forced is None else u_bk < forced).long().cumprod(1).sum(1)
    p_bv, q_bv = p_bwv[row_b, kept_b], F.pad(q_bkv, (0, 0, 0, 1))[row_b, kept_b]       # behind k kept drafts q is 0
    left_bv = (p_bv - q_bv).clamp(min=0) if forced is None else p_bv
    return kept_b, torch.where(left_bv.sum(-1, keepdim=True) > 0, left_bv, p_bv)       # p = q up to rounding: a rejection has no chance


def verify(run: Running, logits_bwv: Tensor, draft_bk: Tensor, q_bkv: Tensor | None, forced: float | None) -> tuple[Tensor, Tensor]:
    """(tokens [b, k + 1]: the drafts, with the trunk's own token behind the kept ones; number of drafts kept [b])."""
    (b, w, _), step_k = logits_bwv.shape, torch.arange(draft_bk.shape[1], device=draft_bk.device)
    if run.how.greedy:
        best_bw = logits_bwv.max(-1).indices
        kept_b = (draft_bk == best_bw[:, :-1] if forced is None else run.throw(2, step_k) < forced).long().cumprod(1).sum(1)
        return F.pad(draft_bk, (0, 1)).scatter(1, kept_b[:, None], best_bw.gather(1, kept_b[:, None])), kept_b
    wide = lambda z_b: z_b[:, None].expand(b, w).reshape(-1)
    p_rv, order_rv = probabilities(logits_bwv.flatten(0, 1), wide(run.temperature_b), wide(run.top_p_b), run.how.cut)
    p_bwv = p_rv.view(logits_bwv.shape)
    kept_b, left_bv = torch.zeros_like(run.new_b), p_bwv[:, 0]
    if w > 1: kept_b, left_bv = accept(p_bwv, q_bkv, draft_bk, run.throw(2, step_k), forced)
    order_bv = None if order_rv is None else order_rv.view(logits_bwv.shape)[torch.arange(b, device=kept_b.device), kept_b]
    token_b = draw(left_bv, order_bv, run.throw(0, kept_b[:, None])[:, 0])
    return F.pad(draft_bk, (0, 1)).scatter(1, kept_b[:, None], token_b[:, None]), kept_b


@torch.inference_mode()
def speculative_step(caches: SlotCaches, run: Running, forced: float | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """One window for every decoding slot: (tokens [b, k + 1], how many of them count [b], their log-probabilities at temperature 1, if wanted).
    forced: every draft is kept with this chance, whatever it says. For benchmarks that say so; the text is not the model's."""
    k, on_b = caches.draft, run.new_b > 0
    pending_b1 = run.ids_bw.gather(1, (run.new_b - 1).clamp(min=0)[:, None]) if k else run.ids_bw
    draft_bk, q_bkv = propose(caches, run) if k else (pending_b1[:, :0], None)
    rows = caches.rows(None, on_b * (k + 1), k + 1, caches.length_b, "last" if not k else "none" if caches.replays else "each", run.how.seen,
                       run.how.full and not k)
    h_bwd = caches.trunk(torch.cat([pending_b1, draft_bk], 1), rows)
    logits_bwv = caches.model.lm_head(h_bwd)
    if run.how.logprobs or not run.how.greedy: logits_bwv = logits_bwv.float()
    ids_bw, kept_b = verify(run, logits_bwv, draft_bk, q_bkv, forced)
    logp_bw = logits_bwv.log_softmax(-1).gather(2, ids_bw[..., None])[..., 0] if run.how.logprobs else None
    new_b = on_b * (kept_b + 1)
    caches.commit(rows, new_b)
    if k:
        last_b1, place_k = torch.where(on_b, kept_b, -1)[:, None], torch.arange(k, device=kept_b.device)
        run.offered_k += (last_b1 >= place_k).sum(0); run.accepted_k += (last_b1 > place_k).sum(0)
        run.hidden_bwd.copy_(h_bwd)
    run.ids_bw.copy_(ids_bw); run.made_b.add_(new_b); run.new_b.copy_(new_b * (run.made_b < run.limit_b))      # at its limit: no cell, no dice
    return ids_bw, new_b, logp_bw


@torch.inference_mode()
def packed_step(caches: SlotCaches, run: Running, forced: float | None = None) -> Tensor:
    """speculative_step in one tensor, for one copy to the host: fp64 [b, 1 + w] or [b, 1 + 2w] of counts, tokens, log-probabilities if wanted."""
    ids_bw, count_b, logp_bw = speculative_step(caches, run, forced)
    return torch.cat([z.double() for z in (count_b[:, None], ids_bw, logp_bw) if z is not None], 1)


class StepGraphs:
    """packed_step without Python: of each Variant a few calls are plain, then one is recorded. A CUDA graph repeats kernels with the arguments and
    addresses they had, a trace (data/traces.py) a CPU's operators. So a step changes nothing but tensors that stay where they are: pools, lengths,
    dice, Running. A result lasts until the next call."""
    def __init__(self, caches: SlotCaches, run: Running, forced: float | None = None):
        self.step, self.recorded, self.out = partial(packed_step, caches, run, forced), {}, {}
        self.record = pretrain.Recorded if caches.static else partial(Traced, model=caches.model, parts=[caches, run, *filter(None, caches.layers)])

    def __call__(self, how: Variant) -> Tensor:
        if how not in self.recorded: self.recorded[how] = self.record(lambda: self.out.update({how: (z := self.step())}) or z)
        return self.out[how] if (z := self.recorded[how]()) is None else z


# %% 6 · Engine
# step(): requests enter free slots, prompts are read in chunks of at most prefill_tokens in all, then every decoding slot gets one window, so a long
# prompt never stops the others for longer than one chunk. Once all prompts are read it gets `ahead` windows, between which no GPU waits for the host.
# What a request answers depends on its prompt, sampling and place, not on the batch (up to the rounding of products of other shapes; stochastically
# rounded states depend on slot and step too). With a prefix cache passes end at block boundaries, where a slot is copied: keys could be cut anywhere,
# a state cannot, and a hit needs both.  [vLLM, mamba_cache_mode all]

Reason = Literal["stop_id", "stop", "length", "cache", "cancelled"]


@dataclass
class Answer(nemotron.Completion):
    """finished: a stop id or a stop string ended it. text: without the stop id, cut before a stop string ("" without a tokenizer)."""
    text: str = ""; reason: Reason | None = None
    inserted: int | None = None     # place in ids of the </think> that a budget wrote


@dataclass
class Request:
    """limit: most tokens of the answer. tokens: prompt and answer when it entered its slot; read: those in the caches; sent: characters streamed."""
    id: int; prompt: list[int]; sampling: SamplingParams; limit: int; dice_3i: Tensor; on_tokens: Callable[[int, list[int], str], None] | None
    answer: Answer = field(default_factory=Answer); tokens: list[int] = field(default_factory=list)
    slot: int = -1; read: int = 0; sent: int = 0
    utf8: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    @property
    def ready(self) -> bool: return self.slot >= 0 and self.read == len(self.tokens) - 1


class Engine:
    """Serves requests over a fixed number of slots. Not safe for several threads; on_tokens may call submit and cancel. graphs: record steps.
    prefix_bytes: of copies behind every prefix_block tokens of a prompt, so that others begin there (0: none). New weights need a new engine.
    ahead: windows between two looks of the host. With more, streams come in bursts and free slots wait; answers stay the same."""
    def __init__(self, model: nemotron.Nemotron, slots: int = 8, capacity: int = 2048, draft: int = 0, rollback: Rollback = "snapshot",
                 state_format: str = "fp32", kv_format: str | None = None, prefill_tokens: int = 512, ahead: int = 1, tokenizer=None,
                 forced: float | None = None, seed: int = 0, graphs: bool | None = None, prefix_bytes: int = 0, prefix_block: int = 64):
        if min(prefill_tokens, ahead) < 1: raise ValueError(f"prefill_tokens = {prefill_tokens}, ahead = {ahead}: both must be at least 1.")
        self.model, self.tokenizer, self.forced, self.prefill_tokens, self.ahead = model, tokenizer, forced, prefill_tokens, ahead
        self.caches = SlotCaches(model, slots, capacity, draft, rollback, state_format, kv_format, seed)
        self.queue: deque[Request] = deque(); self.owners: dict[int, Request] = {}      # owners: slot -> request, in the order of admission
        self.prefixes, self.block = (Prefixes(prefix_bytes, prefix_block), prefix_block) if prefix_bytes else (None, capacity)
        self.done: list[tuple[int, Answer]] = []; self.left: list[int] = []; self.submitted, self.running = 0, Running(self.caches)
        rounds = kv_format == "fp8" or any(isinstance(m, moe.Packed) or getattr(m, "recipe", None) for m in model.modules())
        can = self.caches.static or self.caches.plain and not (draft or rounds)     # what reads slots on a CPU, or types of bytes
        if graphs and not can: raise ValueError("graphs=True: a CPU records only steps without drafts and without rounding to fewer bits than fp32.")
        self.graphs = StepGraphs(self.caches, self.running, forced) if can and graphs is not False else None

    def submit(self, prompt: list[int], sampling: nemotron.SamplingParams, on_tokens=None, place: int = 0) -> int:
        """Queues a prompt -> the request's id. on_tokens(id, new ids, new text) streams. place: among the prompts of one seed, for the dice.
        ValueError for a prompt that is empty, has unknown ids or does not fit a slot, and for stop strings or a budget without a tokenizer."""
        vocab, capacity = self.model.config.vocab, self.caches.capacity
        sampling = sampling if isinstance(sampling, SamplingParams) else SamplingParams(**vars(sampling))
        if not prompt: raise ValueError(f"the prompt is empty: begin with the id {self.model.config.bos} when there is nothing to continue.")
        if not 0 <= min(prompt) <= max(prompt) < vocab: raise ValueError(f"the prompt has an id outside the vocabulary of {vocab}.")
        if len(prompt) > capacity: raise ValueError(f"the prompt has {len(prompt)} tokens and a slot holds {capacity}: shorten it or raise capacity.")
        if "" in sampling.stop: raise ValueError("an empty stop string would end every answer at once: leave it out.")
        if (sampling.stop or sampling.budget is not None) and self.tokenizer is None:
            raise ValueError("stop strings and budgets need the engine's tokenizer: pass it, or use stop_ids.")
        limit = min(sampling.max_tokens, capacity + 1 - len(prompt))        # the last token needs no cell
        self.queue.append(Request(self.submitted, list(prompt), sampling, limit, dice(sampling, place), on_tokens)); self.submitted += 1
        return self.submitted - 1

    def cancel(self, id: int) -> bool:
        """Ends a waiting or running request with what it has; False when there is none of that id."""
        request = next((r for r in (*self.queue, *self.owners.values()) if r.id == id), None)
        if request is not None: self.finish(request, "cancelled")
        return request is not None

    @property
    def idle(self) -> bool: return not (self.queue or self.owners or self.done)

    def step(self) -> list[tuple[int, Answer]]:
        """Admit, prefill, decode -> (id, answer) of the requests that have ended since the last step."""
        self.model.backbone.embeddings(self.caches.length_b[:0])      # no token: hooks there (data/worker.py) run before a step, and never in it
        if training := self.model.training: self.model.eval()       # no balance loss to compute
        try:
            self.admit(); left = self.prefill_tokens
            while left: left = self.prefill(left)
            self.decode()
        finally:
            if training: self.model.train()
        done, self.done = self.done, []; return done

    def run(self, progress: bool = False) -> dict[int, Answer]:
        """Steps until nothing is left -> answers by id."""
        out, bar = {}, tqdm(total=len(self.queue) + len(self.owners), desc="requests", leave=False, disable=not progress)
        while not self.idle: out.update(new := self.step()); bar.update(len(new))
        bar.close(); return out

    def left_by(self, slot: int, n: int) -> dict[str, Tensor]:
        """Views of all that n tokens leave in a slot that has only read so far. The head has n - 1 cells: the n-th needs the token behind."""
        pools = [(pool, n) for pool in self.caches.layers] + [(pool, n - 1) for pool in self.caches.head_layers]
        views = [(pool.k_bhsp[slot, :, :m], pool.v_bhsp[slot, :, :m]) if isinstance(pool, KVPool) else
                 (pool.window_bwc[slot], *(z[slot * self.caches.entries] for z in mamba.parts(pool.state))) for pool, m in pools if pool is not None]
        return {f"{i}.{j}": z for i, group in enumerate(views) for j, z in enumerate(group)} | dict(hidden=self.running.hidden_bwd[slot, 0])

    @torch.inference_mode()
    def admit(self) -> None:
        """Waiting requests, first come first, into free slots, with one write a tensor for all of them; none free: they wait."""
        caches, run, put = self.caches, self.running, partial(torch.tensor, device=self.caches.length_b.device)
        if self.left: run.new_b[put(self.left)] = 0; self.left = []         # slots whose requests have gone
        free = (slot for slot in range(caches.slots) if slot not in self.owners)
        entering = {slot: self.queue.popleft() for _, slot in zip(range(len(self.queue)), free)}
        if not entering: return
        caches.reset(slot_r := put([*entering])); run.hidden_bwd[slot_r, 0] = 0; self.owners |= entering
        for slot, request in entering.items():
            request.slot, request.read, request.tokens = slot, 0, (tokens := [*request.prompt, *request.answer.ids])
            if self.prefixes and (n := self.prefixes.load(tokens[:-1], partial(self.left_by, slot))):
                request.read = caches.length_b[slot] = n; caches.head_length_b[slot] = n - request.ready
                if caches.draft:        # the pair that was missing, into the head's n-th cell; where the prompt is read, `propose` feeds it again
                    at_r, next_r = put([[slot], tokens[n:n + 1]])
                    caches.head(next_r[None], run.hidden_bwd[at_r, :1], caches.rows(at_r, at_r * 0 + 1, 1, caches.length_b - 1, seen=n))
        numbers = [(r.tokens[-1], r.ready, len(r.answer.ids), r.limit, r.sampling.temperature, r.sampling.top_p) for r in entering.values()]
        into = run.ids_bw[:, 0], run.new_b, run.made_b, run.limit_b, run.temperature_b, run.top_p_b
        for z_b, new_r in zip(into, put(numbers, dtype=torch.float64).T): z_b[slot_r] = new_r.to(z_b.dtype)
        dice_ri3 = torch.nn.utils.rnn.pad_sequence([r.dice_3i.T[:run.dice_b3i.shape[2]] for r in entering.values()], batch_first=True)
        run.dice_b3i[slot_r, :, :dice_ri3.shape[1]] = dice_ri3.mT.to(slot_r.device)

    @torch.inference_mode()
    def prefill(self, left: int | None = None) -> int:
        """One pass over up to `left` tokens, oldest request first -> how many may still be read. Each one's last is left: decoding begins with it."""
        left, picked = left or self.prefill_tokens, []
        for request in self.owners.values():
            n = min(left, len(request.tokens) - 1 - request.read, self.block - request.read % self.block)
            if n: picked.append((request, n)); request.read += n; left -= n
        if not picked: return 0
        caches, run, device, t = self.caches, self.running, self.caches.length_b.device, max(n for _, n in picked)
        ids_rt = torch.tensor([r.tokens[r.read - n:r.read + 1] + [0] * (t - n) for r, n in picked], device=device)     # and the token behind
        slot_r, count_r, last_r = torch.tensor([(r.slot, n, r.ready) for r, n in picked], device=device).T
        h_rtd = caches.trunk(ids_rt[:, :-1], rows := caches.rows(slot_r, count_r, t, caches.length_b, seen=max(r.read for r, _ in picked)))
        caches.commit(rows, count_r)
        if caches.draft:        # the last hidden and the token that is left: `propose` feeds that pair
            caches.head(ids_rt[:, 1:], h_rtd, caches.rows(slot_r, count_r - last_r, t, caches.head_length_b, seen=rows.seen))
            caches.head_length_b[slot_r] += count_r - last_r
        row_r = torch.arange(len(picked), device=device)
        run.ids_bw[slot_r, 0], run.hidden_bwd[slot_r, 0], run.new_b[slot_r] = ids_rt[row_r, count_r], h_rtd[row_r, count_r - 1], last_r
        for r in (r for r, _ in picked if self.prefixes and r.read % self.block == 0):
            self.prefixes.store(r.tokens[:r.read], self.left_by(r.slot, r.read))
        return left

    def decode(self) -> None:
        """Windows for every slot whose prompt is read, `ahead` of them when all are; then the host looks."""
        decoding = [request for request in self.owners.values() if request.ready]
        if not decoding: return
        caches, run, w, asked = self.caches, self.running, self.caches.draft + 1, [r.sampling for r in decoding]
        n = min(self.ahead, max(r.limit - len(r.answer.ids) for r in decoding)) if len(decoding) == len(self.owners) else 1
        seen = max(len(r.prompt) + len(r.answer.ids) for r in decoding) + n * w - 1
        if caches.static or self.graphs: seen = min(1 << max(8, (seen - 1).bit_length()), caches.capacity + w - 1)      # ours: few graphs
        run.how = Variant(seen, caches.plain and len(decoding) == caches.slots, all(s.temperature == 0 for s in asked),
                          any(s.top_p < 1 and s.temperature > 0 for s in asked), any(s.logprobs for s in asked))
        windows = torch.stack([(self.graphs(run.how) if self.graphs else packed_step(caches, run, self.forced)).clone() for _ in range(n)]).tolist()
        run.how = Variant()
        for group in [[window] for window in windows] if any(r.on_tokens for r in decoding) else [windows]:     # a stream may cancel between two
            for r in (r for r in decoding if r.slot >= 0):      # others have ended meanwhile, or were sent back by their budget
                rows = [(row, 1 + int(row[0])) for row in (window[r.slot] for window in group)]
                self.deliver(r, [int(x) for row, end in rows for x in row[1:end]], [x for row, end in rows for x in row[1 + w:end + w]])

    def deliver(self, request: Request, ids: list[int], logps: list[float]) -> None:
        """Appends new tokens until something ends the answer; the rest is dropped with its slot."""
        answer, sampling, reason, again, before = request.answer, request.sampling, None, False, len(request.answer.ids)
        size = 1 if sampling.stop or sampling.budget is not None else len(ids)      # these two look behind every token
        for i in range(0, len(ids), size):
            reason = self.take(request, ids[i:i + size], logps[i:i + size])
            if reason is None and sampling.budget is not None and budget_used(answer, sampling, self.tokenizer):
                # ours: as NVIDIA's client, which sends the closed trace as a new prompt. It is read anew, and no cache is touched.
                answer.inserted, again = len(answer.ids), True
                reason = self.take(request, [sft.END_THINK], [0.0])
            if reason or again: break
        if request.on_tokens:
            sent, request.sent = request.sent, len(answer.text) - (0 if reason else terminal.held_back(answer.text, sampling.stop))
            request.on_tokens(request.id, answer.ids[before:], answer.text[sent:request.sent])
        if reason and not answer.reason: self.finish(request, reason)
        elif again and not answer.reason: self.release(request); self.queue.appendleft(request)

    def take(self, request: Request, ids: list[int], logps: list[float]) -> Reason | None:
        """More tokens of the answer, up to an id that ends it, and their text -> what ends it with them, if anything does."""
        answer, sampling, room = request.answer, request.sampling, request.limit - len(request.answer.ids)
        n = next((i for i, token in enumerate(ids[:room], 1) if token in sampling.stop_ids), min(room, len(ids)))
        answer.ids += ids[:n]; answer.logprobs += logps[:n] * sampling.logprobs
        reason = "stop_id" if ids[n - 1] in sampling.stop_ids else None if n < room else "length" if request.limit == sampling.max_tokens else "cache"
        if self.tokenizer is None: return reason
        start = max(0, len(answer.text) - max(map(len, sampling.stop), default=0) + 1)
        answer.text += request.utf8.decode(self.tokenizer.decode_bytes(ids[:n - (reason == "stop_id")]), final=bool(reason))
        ends = [at for stop in sampling.stop if (at := answer.text.find(stop, start)) >= 0]
        answer.text = answer.text[:min(ends, default=None)]
        return "stop" if ends else reason

    def finish(self, request: Request, reason: Reason) -> None:
        """Hands the answer over and frees the slot; the next owner's admission makes it new."""
        request.answer.reason, request.answer.finished = reason, reason in ("stop_id", "stop")
        self.done.append((request.id, request.answer))
        self.release(request) if request.slot >= 0 else self.queue.remove(request)

    def release(self, request: Request) -> None: del self.owners[request.slot]; self.left.append(request.slot); request.slot = -1

    def acceptance(self) -> list[float]:
        """Share of drafts kept at each place, of those whose predecessors were. Windows count whole, and until the host sees an answer's end."""
        return (self.running.accepted_k / self.running.offered_k.clamp(min=1)).tolist()


class rollout_engine:
    """An engine as stage 07 takes it: the results of 04's generate with log-probabilities. options: those of Engine (draft, rollback, ...). A GPU's
    Engine stays for later calls (they answer as a new one would, up to rounding). ours: it has few sizes, as each records its graphs anew, looks
    every 8 windows and has 256 slots unless told: a row is cheaper the more share a step, and so many of preset small with 3 drafts take 12 GB."""
    def __init__(self, slots: int | None = None, **options): self.slots, self.options, self.kept = slots, options, (None, None)
    def __reduce__(self): return partial(rollout_engine, self.slots, **self.options), ()      # to another process without caches and graphs
    def __call__(self, model, prompts, sampling) -> list[nemotron.Completion]:
        if not prompts: return []
        sampling, where = SamplingParams(**(vars(sampling) | dict(logprobs=True))), [model, *(x.data_ptr() for x in model.state_dict().values())]
        gpu, longest = model.lm_head.weight.is_cuda, max(map(len, prompts)) + sampling.max_tokens
        slots, more = (256, dict(ahead=8, prefill_tokens=8192)) if gpu else (64, {})
        slots = min(slots if self.slots is None else self.slots, sys.maxsize if gpu else len(prompts))
        size, (had, engine), self.kept = dict(slots=slots, capacity=-(-longest // 256) * 256) | more | self.options, self.kept, (None, None)
        if had != where or engine.caches.slots != slots or engine.caches.capacity < size["capacity"]: engine = Engine(model, **size)
        ids, seed_l = [engine.submit(prompt, sampling, place=i) for i, prompt in enumerate(prompts)], engine.caches.seed_l.clone()
        answers = engine.run()
        if engine.graphs: engine.caches.seed_l.copy_(seed_l); self.kept = where, engine      # not after an error: requests are left in it
        return [nemotron.Completion(answers[i].ids, answers[i].logprobs, answers[i].finished) for i in ids]


# %% 7 · Reasoning budget  [Card; Ultra, SFT]
# A trace that has used its budget is closed at its next newline, or by force when none comes: </think> is written for the model, which then goes
# on with the answer. SFT has cut traces at random places with the same insertion.

def budget_used(answer: Answer, sampling: SamplingParams, tokenizer) -> bool:
    """The trace is to be closed now:  budget 100, margin 500: at a newline from the 100th token on, at the 600th whatever it is."""
    n = len(answer.ids)
    if n < sampling.budget or sft.END_THINK in answer.ids: return False
    return n >= sampling.budget + sampling.margin or b"\n" in tokenizer.decode_bytes(answer.ids[-1:])


def generate_with_budget(engine: Engine, talks: list[list[dict]], mode: sft.Mode, sampling: SamplingParams, on_tokens=None) -> list[Answer]:
    """Answers to conversations (as render_chat takes them), each trace closed at sampling.budget tokens; mode off has none to close.
    An answer's ids hold the inserted </think>, at `inserted`, with log-probability 0: it is not the model's. max_tokens counts everything."""
    if engine.tokenizer is None or not engine.idle: raise ValueError("conversations need an engine with a tokenizer and without other requests.")
    sampling = replace(sampling, budget=None) if mode == "off" else sampling
    prompts = [sft.render_chat(talk, mode, tokenizer=engine.tokenizer, generation_prompt=True)[0] for talk in talks]
    ids = [engine.submit(prompt, sampling, on_tokens, place=i) for i, prompt in enumerate(prompts)]
    return [done[i] for done in [engine.run()] for i in ids]


# %% 8 · Commands

@dataclass(frozen=True)
class QuantizeConfig:
    """Quantizes a checkpoint into NVIDIA's layout and says what that costs."""
    base: Path = Path("out/boosted")       # a checkpoint, or a run's folder: then its newest one
    out: Path = Path("out/quantized")      # the row of results goes to the folder above
    scale_rule: Literal["max", "mse", "four_over_six"] = "four_over_six"      # how 4-bit weights choose their scales
    weights_only: bool = False             # 4-bit weights without scales for their inputs, for GPUs without FP4
    tokens: int = 16_384                   # of built-in conversations, to calibrate on, ours
    preset: str | None = None              # print what this preset takes, from shapes alone, and stop


@dataclass(frozen=True)
class ChatConfig:
    """Talks in the terminal; /help there says how."""
    model: Path = Path("out/boosted")      # a checkpoint, quantized or not, or a run's folder: then its newest one
    device: Literal["auto", "cpu", "cuda"] = "auto"
    mode: str = "regular"                  # of thinking: regular, medium or off
    sampling: SamplingParams = SamplingParams(max_tokens=512)
    draft: int = 3                         # tokens that the MTP head drafts a pass, ours; 0 for a model without one
    rollback: Rollback = "snapshot"        # how rejected drafts are taken back
    state_format: str = "fp32"             # of the SSM states: fp32, fp16, fp16_sr, int8 or int8_sr; sr rounds stochastically
    kv_format: str | None = None           # fp32, bf16 or fp8; as the weights when not given
    capacity: int = 4096                   # tokens that a conversation may have

    def engine(self, slots: int) -> Engine:
        if self.mode not in sft.MODES: raise ValueError(f"mode {self.mode!r} is unknown: choose one of {', '.join(sft.MODES)}.")
        model, words = open_model(self.model, self.device)      # ours: 256 MB of what was read, where a later turn of a chat begins
        return Engine(model, slots, self.capacity, self.draft, self.rollback, self.state_format, self.kv_format, tokenizer=words, prefix_bytes=2**28)


@dataclass(frozen=True)
class GenerateConfig(ChatConfig):
    """Answers a prompt, or every line of a file."""
    prompt: str = ""
    file: Path | None = None               # one prompt a line
    slots: int = 8                         # requests at a time


def newest(folder: Path) -> Path:
    """The checkpoint itself, or the newest one of a run's folder."""
    if (folder / "config.json").exists(): return folder
    if pretrain.checkpoints(folder): return pretrain.newest_checkpoint(folder)
    raise ValueError(f"{folder} holds no checkpoint: train one (make run, or stages 05 to 07), or name another folder.")


def open_model(folder: Path, device: str = "auto") -> tuple[nemotron.Nemotron, Tokenizer]:
    """A checkpoint, quantized or not: in fp32 on a CPU, in bf16 on a GPU, where 4-bit layers round their inputs only if the GPU has FP4."""
    if device == "cuda" and not torch.cuda.is_available(): raise ValueError("--device cuda: there is no CUDA device here; use cpu.")
    folder, device = newest(folder), nvfp4.demo_device("auto") if device == "auto" else device
    dtype, hopper = (torch.float32, False) if device == "cpu" else (torch.bfloat16, torch.cuda.get_device_capability() < (10, 0))
    model = load_quantized(folder, device, dtype, hopper) if is_quantized(folder) else nemotron.load_checkpoint(folder, device, dtype)
    return model.eval(), Tokenizer.load(folder)


def calibration_batches(tokenizer: Tokenizer, tokens: int) -> Iterator[Batch]:
    """Packs of built-in training conversations, about `tokens` in all."""
    config = sft.SFTConfig(tokens=tokens)
    samples, width = sft.build_samples(config, tokenizer), config.pack[0]
    packs = sft.pack_best_fit([len(s.ids) for s in samples], width, [s.prompt for s in samples], config.pool, config.tolerance)
    for pack in tqdm(packs[:max(1, tokens // width)], desc="calibrate", leave=False): yield sft.pack_batch([[samples[i] for i in pack]], width)


def quantize_command(config: QuantizeConfig) -> dict | None:
    began, recipe = time.perf_counter(), Recipe(config.scale_rule, config.weights_only)
    if config.preset:
        with torch.device("meta"): model = nemotron.Nemotron(nemotron.preset(config.preset))
        return print_shares(f"preset {config.preset}, from its shapes", count_bits(nemotron.released_tensors(model), recipe))
    if config.tokens < 1: raise ValueError(f"--tokens {config.tokens}: calibration needs at least one.")
    base = pretrain.newest_checkpoint(config.base) if pretrain.checkpoints(config.base) else config.base
    read_config(base, quantized=False)
    nvfp4.writable_folder(config.out.parent)
    tokenizer, model = Tokenizer.load(base), nemotron.load_checkpoint(base)
    held_out = sft.validation_batch(sft.SFTConfig(), tokenizer)
    loss = torch.no_grad()(lambda model: nemotron.loss(model.eval(), *held_out, mtp_weight=0.0, aux_weight=0.0).main.item())
    losses = {"as it was": loss(model)}
    shares = quantize_checkpoint(base, recipe, config.out, calibrate(model, calibration_batches(tokenizer, config.tokens)), progress=True)
    print_shares(f"{base} -> {config.out}, scales by {config.scale_rule}", shares)
    losses["quantized, 4-bit weights with 16-bit inputs"] = loss(load_quantized(config.out, dtype=torch.float32, weights_only=True))
    if not config.weights_only: losses["quantized, 4-bit weights and inputs"] = loss(load_quantized(config.out, dtype=torch.float32))
    nvfp4.print_table("loss on validation conversations, nats a token of the assistant", ["", "loss"], [[k, f"{x:.4f}"] for k, x in losses.items()])
    row = dict(bits_per_element=bits_per_element(shares), losses=losses, seconds=round(time.perf_counter() - began, 1),
               error_db={label: nvfp4.decibels(s["error"] / s["energy"]) for (_, label), s in shares.items() if s["error"]})
    nvfp4.write_row(config.out.parent, "08_quantize", base=str(base), scale_rule=config.scale_rule, weights_only=config.weights_only, **row)
    print(f"\n{row['bits_per_element']:.3f} bits a parameter in {config.out}, which load_quantized opens. {row['seconds']} s")
    return row


def drafts_kept(engine: Engine) -> float | None:
    """The share of all drafts since the last call; None without any."""
    offered, kept = (int(count_k.sum()) for count_k in (engine.running.offered_k, engine.running.accepted_k))
    engine.running.offered_k.zero_(); engine.running.accepted_k.zero_()
    return kept / offered if offered else None


def generate_command(config: GenerateConfig) -> None:
    talks = [[dict(role="user", content=text)] for text in terminal.read_prompts(config.prompt, config.file)]
    engine, began, alone = config.engine(min(config.slots, len(talks))), time.perf_counter(), len(talks) == 1
    stream = lambda id, ids, piece: terminal.write(terminal.clean(piece))
    answers = generate_with_budget(engine, talks, config.mode, config.sampling, stream if alone else None)
    for talk, answer in () if alone else zip(talks, answers): terminal.write(f"> {talk[0]['content']}\n{terminal.clean(answer.text)}\n")
    tokens, seconds = sum(len(answer.ids) for answer in answers), time.perf_counter() - began
    terminal.write(f"\n{terminal.Reply({}, tokens, seconds, drafts_kept(engine), answers[0].reason if alone else 'stop').line()}\n")


def chat_command(config: ChatConfig) -> None:
    engine = config.engine(1)

    def ask(messages: list[dict], mode: sft.Mode, budget: int | None, show, stopped) -> terminal.Reply:
        began, sampling = time.perf_counter(), replace(config.sampling, budget=budget, seed=config.sampling.seed + len(messages))
        stream = lambda id, ids, piece: (show(piece), stopped() and engine.cancel(id))
        answer, = generate_with_budget(engine, [messages], mode, sampling, stream)
        thought, end, said = answer.text.rpartition("</think>")        # later turns see no thoughts, nor a trace that has no end
        message = dict(role="assistant", content=said.strip() if end or mode == "off" else "")
        return terminal.Reply(message, len(answer.ids), time.perf_counter() - began, drafts_kept(engine), answer.reason)

    terminal.prepare()
    terminal.chat(ask, config.mode, config.sampling.budget)


COMMANDS = {QuantizeConfig: quantize_command, GenerateConfig: generate_command, ChatConfig: chat_command}


def main(config) -> None: COMMANDS[type(config)](config)


if __name__ == "__main__":
    import tyro

    from experiments import serving  # tour and bench: tables, rows and a figure
    commands = dict(tour=serving.TourConfig(), generate=GenerateConfig(), chat=ChatConfig(), bench=serving.BenchConfig(), quantize=QuantizeConfig())
    if len(sys.argv) == 1: sys.argv.append("tour")
    nvfp4.run_command(lambda config: (COMMANDS | serving.COMMANDS)[type(config)](config),
                      tyro.conf.OmitArgPrefixes[tyro.extras.subcommand_type_from_defaults(commands)], __doc__)
