"""08 · Inference: a trained checkpoint in 4 and 8 bits, written as NVIDIA writes it, and a model that computes with it.

Left out:  FP8 tensor cores (on a GPU the FP8 layers multiply in 16 bits), AWQ, quantization-aware training.
Sources:   [Ultra] Nemotron 3 Ultra report, arXiv 2606.15007 · [ModelOpt] NVIDIA Model-Optimizer: its export, its recipe nvfp4-46-max for Ultra
Run:       python 08_infer.py quantize                     # 10 s, CPU: the newest checkpoint in out/boosted, into out/quantized
           python 08_infer.py quantize --base out/sft --out out/quantized --scale-rule mse
           python 08_infer.py quantize --preset ultra      # 6 s, CPU: what 560 billion parameters take, from their shapes alone
Contents:  1 precision   2 quantize a checkpoint   3 compute with it   4 command
Letters:   b batch  t time  e experts  k chosen experts  l latent  f expert width  r flattened rows (b·t)  q rows sorted by expert;
           o output features, i input features of a linear layer
"""
from __future__ import annotations

import importlib
import json
import re
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.batches import Batch
from data.tokenizer import Tokenizer

nvfp4, moe, nemotron, pretrain, sft = (importlib.import_module(name) for name in ("01_nvfp4", "03_latentmoe", "04_model", "05_pretrain", "06_sft"))

# %% 1 · Precision  [Ultra, quantization; ModelOpt]
# The released Ultra, as data; the first pattern that matches a name wins. Routed experts are most of the parameters, and each is read by few tokens:
# they go to 4 bits. What every token passes keeps more.
#     nvfp4  W4A4, weights and inputs in 4 bits      w4a16  4-bit weights only, as a Hopper GPU serves them
#     fp8    E4M3, one scale a tensor, both          bf16   not quantized

PRECISION = (
    ("mtp.*", "bf16", "multi-token prediction"),           # first, or its experts would match the next line
    ("*.mixer.experts.*", "nvfp4", "routed experts"),
    ("*.mixer.shared_experts.*", "fp8", "shared experts"),
    ("*.mixer.in_proj.weight", "fp8", "Mamba projections"), ("*.mixer.out_proj.weight", "fp8", "Mamba projections"),
    ("*.mixer.[qkvo]_proj.weight", "bf16", "attention projections"), ("*.mixer.fc?_latent_proj.weight", "bf16", "latent projections"),
    ("backbone.embeddings.weight", "bf16", "embedding and output layer"), ("lm_head.weight", "bf16", "embedding and output layer"),
    ("*", "bf16", "router, norms, conv, A, D, dt bias"),   # NOTE: of these, what stage 04 keeps in fp32 stays as it was
)
ALGORITHMS = {"nvfp4": "NVFP4", "w4a16": "W4A16_NVFP4", "fp8": "FP8", "bf16": "BF16"}      # our words and ModelOpt's
INPUT_RANGE = {"nvfp4": nvfp4.FP4_MAX * nvfp4.E4M3_MAX, "fp8": nvfp4.E4M3_MAX}      # input_scale = largest input / this  [ModelOpt]


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
    amax, hooks, valid_r = {}, [], None

    def note(name: str, x: Tensor) -> None:     # NOTE: torch.maximum hands a NaN on, Python's max would lose it
        amax[name] = torch.maximum(amax.get(name, x.new_zeros(())), x.abs().amax())

    def note_experts(name: str, up_efl: Tensor, x_rl: Tensor, experts_rk: Tensor) -> None:
        order_q, inverse_q, offsets_e = moe.sort_by_expert(experts_rk, len(up_efl))
        x_ql = moe.copy_to_experts(x_rl, experts_rk.shape[1], order_q, inverse_q)
        note(f"{name}.up_proj", x_rl)
        note(f"{name}.down_proj", moe.relu2(moe.grouped_linear(x_ql, up_efl, offsets_e)))

    valid = lambda x: x.flatten(0, -2)[valid_r]
    for name, module in model.backbone.named_modules(prefix="backbone"):
        if isinstance(module, moe.Experts):
            hooks.append(module.register_forward_pre_hook(lambda m, args, n=name: note_experts(n, m.up_proj, valid(args[0]), valid(args[2]))))
        elif isinstance(module, nn.Linear): hooks.append(module.register_forward_pre_hook(lambda m, args, n=name: note(n, valid(args[0]))))
        if scale := Recipe().kv_scale(f"{name}.weight"): hooks.append(module.register_forward_hook(lambda m, args, y, n=scale: note(n, valid(y))))
    try:
        for batch in (b.to(model.lm_head.weight.device) for b in batches):
            valid_r = (batch.doc_bt >= 0).flatten()
            model.hidden(batch.ids_bt, batch.doc_bt)
    finally:
        for hook in hooks: hook.remove()
    return {name: x.item() for name, x in amax.items()}


def quantize_weight(name: str, weight_oi: Tensor, fmt: str, scale_rule: str = "max") -> tuple[dict[str, Tensor], Tensor]:
    """({suffix: tensor} as ModelOpt stores it, the values it stands for). ValueError for what is no matrix of a linear layer."""
    if weight_oi.dim() != 2 or not name.endswith("_proj.weight"):
        raise ValueError(f"{name} cannot be stored as {ALGORITHMS[fmt]}: only matrices named *_proj.weight can, so give it bf16 in the table.")
    w = weight_oi.float()
    if fmt != "fp8":
        q = nvfp4.quantize(w, scale_rule=scale_rule, name=name)      # NaN, and a width that blocks do not divide, are errors there
        return dict(weight=q.codes, weight_scale=q.block_scale, weight_scale_2=q.global_scale), q.dequantize()
    if not (amax := w.abs().amax()).isfinite(): raise ValueError(f"{name} holds NaN or Inf and cannot be quantized: take an older checkpoint.")
    scale = torch.where(amax > 0, amax / nvfp4.E4M3_MAX, 1.0)
    codes = nvfp4.e4m3(w / scale)
    return dict(weight=codes, weight_scale=scale), codes.float() * scale


def quantized_tensors(name: str, tensor: Tensor, recipe: Recipe, amax: dict[str, float], share: Counter) -> dict[str, Tensor]:
    """What one tensor of the checkpoint becomes; `share` keeps the account."""
    def input_scale(name: str, largest: float) -> Tensor:
        if 0 < (seen := amax.get(name, 0.0)) < float("inf"): return torch.tensor(seen) / largest
        raise ValueError(f"the largest activation seen at {name} is {seen}, which gives no scale: pass amax=calibrate(model, batches), on more text.")

    fmt, module = recipe.format_of(name)[0], name.removesuffix(".weight")
    if fmt == "bf16": stored = {name: tensor if name.endswith(nemotron.FP32) else tensor.to(torch.bfloat16)}
    else:
        parts, values = quantize_weight(name, tensor, fmt, recipe.scale_rule)
        if fmt in INPUT_RANGE: parts["input_scale"] = input_scale(re.sub(r"\.experts\.\d+\.", ".experts.", module), INPUT_RANGE[fmt])
        stored = {f"{module}.{suffix}": part for suffix, part in parts.items()}
        energy = lambda x: x.square().sum(dtype=torch.float64).item()
        share.update(error=energy(values - tensor), energy=energy(tensor.float()))
    if key := recipe.kv_scale(name): stored[key] = input_scale(key, nvfp4.E4M3_MAX)
    share.update(tensors=1, elements=tensor.numel(), bits=8 * sum(t.nbytes for t in stored.values()))
    return stored


def quantization_config(formats: dict[str, str], kv_fp8: bool) -> tuple[dict, dict]:
    """(hf_quant_config.json, "quantization_config" of config.json) from {quantized module: format}."""
    if not formats: raise ValueError("the precision table quantizes nothing of this checkpoint: give some tensors another format than bf16.")
    width, groups = lambda fmt: {} if fmt == "fp8" else dict(group_size=16), {}
    layers = dict(quantized_layers={module: dict(quant_algo=ALGORITHMS[fmt], **width(fmt)) for module, fmt in formats.items()})
    for n, fmt in enumerate(dict.fromkeys(formats.values())):
        numbers = dict(dynamic=False, num_bits=8 if fmt == "fp8" else 4, type="float", **width(fmt))
        groups[f"group_{n}"] = dict({} if fmt == "w4a16" else dict(input_activations=numbers), weights=numbers,
                                    targets=sorted(module for module in formats if formats[module] == fmt))
    both = dict(quant_algo="MIXED_PRECISION", **layers)
    producer = dict(name="modelopt", version="0.46.0")      # readers ask for this name; the version is the one whose layout this is
    cache = dict(kv_cache_scheme=dict(dynamic=False, num_bits=8, type="float")) if kv_fp8 else {}
    return (dict(producer=producer, quantization=dict(both, kv_cache_quant_algo="FP8" if kv_fp8 else None)),
            dict(both, config_groups=groups, ignore=[], **cache, producer=producer, quant_method="modelopt"))


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Tensors, as they come, into model-0000i-of-0000n.safetensors and their index; one shard is in memory."""
    numbers, shard, size, total, count = {}, {}, 0, 0, 0
    for name, tensor in chain(tensors, [("", torch.empty(0))]):
        if shard and (not name or size + tensor.nbytes > shard_bytes):
            count, size = count + 1, 0
            safetensors.torch.save_file(shard, folder / f"{count}.part", metadata={"format": "pt"})
            numbers, shard = numbers | dict.fromkeys(shard, count), {}
        shard[name] = tensor.contiguous()
        size += tensor.nbytes; total += tensor.nbytes
    files = {i: f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
    for i, file in files.items(): (folder / f"{i}.part").rename(folder / file)
    index = dict(metadata=dict(total_size=total), weight_map={name: files[i] for name, i in numbers.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def read_config(directory: Path, quantized: bool) -> dict:
    """config.json of a checkpoint that is, or is not, quantized; ValueError for the other sort."""
    if not (directory / "config.json").exists(): raise ValueError(f"{directory} has no config.json: give a local checkpoint directory.")
    released = json.loads((directory / "config.json").read_text())
    if ("quantization_config" in released or (directory / "hf_quant_config.json").exists()) == quantized: return released
    raise ValueError(f"{directory} is not quantized: open it with load_checkpoint of stage 04." if quantized else
                     f"{directory} is quantized already: give the checkpoint that it was made from.")


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
        about, brief = quantization_config(formats, recipe.kv_fp8)
        (folder / "hf_quant_config.json").write_text(json.dumps(about, indent=4))
        (folder / "config.json").write_text(json.dumps(dict(released, quantization_config=brief), indent=1))
        for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "generation_config.json", "*.py"):
            for file in directory.glob(pattern): shutil.copy2(file, folder / file.name)

    pretrain.write_folder(out, pretrain.unfinished(out), fill)
    return shares


# %% 3 · Compute with it
# A quantized layer multiplies rounded inputs with rounded weights and sums in fp32, as tensor cores do. On a CPU weights are decoded to fp32 once, at
# loading, because decoding costs more than multiplying; inputs are rounded at each call, so the numbers are a GPU's up to the order of sums. On a
# GPU the codes stay as they are, and stage 01's kernels decode them on the way.

class Packed(nn.Module):
    """One weight [o, i], or a stack [e, o, i], as the checkpoint stores it, with the product that its format asks for."""
    def __init__(self, shape: tuple[int, ...], fmt: str):
        super().__init__()
        *stack, o, i = shape
        self.shape, self.fmt, self.decoded = tuple(shape), fmt, None
        if fmt == "fp8": fields = dict(weight=((o, i), torch.float8_e4m3fn), weight_scale=((), torch.float32))
        else: fields = dict(weight=((o, i // 2), torch.uint8), weight_scale=((o, i // 16), torch.float8_e4m3fn), weight_scale_2=((), torch.float32))
        if fmt in INPUT_RANGE: fields["input_scale"] = ((), torch.float32)
        for name, (size, dtype) in fields.items(): self.register_buffer(name, torch.empty((*stack, *size), dtype=dtype), persistent=False)

    def stored(self) -> nvfp4.NVFP4Tensor: return nvfp4.NVFP4Tensor(self.weight, self.weight_scale, self.weight_scale_2)

    def forward(self, x: Tensor, offsets_e: Tensor | None = None) -> Tensor:
        """x · wᵀ; with a stack, rows of x sorted by expert and offsets_e their ends."""
        dtype, x_ri, w = nvfp4.output_dtype(x), x.reshape(-1, x.shape[-1]), self.decoded
        # each expert may have a scale of its own: then one entry a row
        by_row = lambda scale: scale if offsets_e is None else scale[nvfp4.expert_of_rows(offsets_e, len(x_ri))]
        if self.fmt == "nvfp4":
            x_ri = nvfp4.quantize(x_ri, amax=by_row(self.input_scale) * INPUT_RANGE["nvfp4"], name="the input of a quantized layer")
            y_ro = nvfp4.matmul(x_ri, self.stored(), offsets_e, dtype) if w is None else nvfp4.product(x_ri.dequantize(), w, offsets_e)
        elif self.fmt == "w4a16":
            y_ro = nvfp4.matmul_w4a16(x_ri.to(dtype), self.stored(), offsets_e) if w is None else nvfp4.product(x_ri.float(), w, offsets_e)
        else:
            w, scale = self.weight.to(dtype) if w is None else w, by_row(self.input_scale)[..., None]
            codes = nvfp4.e4m3(x_ri.float() / scale).to(w.dtype)      # E4M3 values fit into every wider format
            y_ro = nvfp4.product(codes, w, offsets_e) * (scale * by_row(self.weight_scale)[..., None])
        return y_ro.to(dtype).view(*x.shape[:-1], self.shape[-2])


class QuantizedExperts(nn.Module):
    """Stage 03's experts with both stacks packed; their hidden rows are rounded too, between the products."""
    def __init__(self, up_proj: Packed, down_proj: Packed):
        super().__init__()
        self.up_proj, self.down_proj = up_proj, down_proj

    def forward(self, x_rl: Tensor, weights_rk: Tensor, experts_rk: Tensor, impl: str = "auto") -> Tensor:
        up, down = self.up_proj, self.down_proj
        if up.fmt == down.fmt == "w4a16":      # stage 03 serves such weights, and knows a fast way for a decode step
            x, stacks = (x_rl, (up.stored(), down.stored())) if up.decoded is None else (x_rl.float(), (up.decoded, down.decoded))
            return moe.experts_grouped(x, weights_rk, experts_rk, *stacks, impl=impl).to(x_rl.dtype)
        order_q, inverse_q, offsets_e = moe.sort_by_expert(experts_rk, up.shape[0])
        x_ql = moe.copy_to_experts(x_rl, experts_rk.shape[1], order_q, inverse_q, impl)
        hidden_qf = moe.relu2(up(x_ql, offsets_e))
        return moe.weighted_sum(down(hidden_qf, offsets_e), order_q, inverse_q, weights_rk, impl)


def pack_modules(model: nemotron.Nemotron, found: dict[str, str]) -> None:
    """Swaps the linears and experts that a checkpoint holds in codes, in place, and makes room for the scales of keys and values.
    found: its names, with shapes and the dtypes of codes in words."""
    def packed(module: str, shape) -> Packed | None:
        if f"{module}.weight_scale_2" in found: return Packed(shape, "nvfp4" if f"{module}.input_scale" in found else "w4a16")
        return Packed(shape, "fp8") if "float8" in found.get(f"{module}.weight", "") else None

    for name, module in list(model.named_modules()):
        if isinstance(module, moe.Experts):
            both = [packed(f"{name}.0.{leaf}", getattr(module, leaf).shape) for leaf in ("up_proj", "down_proj")]
            if all(both): model.set_submodule(name, QuantizedExperts(*both))
            elif any(both): raise ValueError(f"{name} has only one of its two projections quantized: quantize both or neither.")
        elif isinstance(module, nn.Linear) and (new := packed(name, module.weight.shape)): model.set_submodule(name, new)
        for scale in {f"{name}.k_scale", f"{name}.v_scale"} & found.keys():
            model.get_submodule(name).register_buffer(scale[-7:], torch.empty(()), persistent=False)


def targets(model: nemotron.Nemotron) -> dict[str, Tensor]:
    """Name in the checkpoint -> the memory it belongs in; an expert's is a piece of the stack."""
    out = dict(nemotron.released_tensors(model))
    for name, buffer in model.named_buffers():
        match = re.fullmatch(r"(.*\.experts)\.((?:up|down)_proj\..*)", name)
        if match: out |= {f"{match[1]}.{i}.{match[2]}": piece for i, piece in enumerate(buffer)}
        else: out[name] = buffer
    return out


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
        pack_modules(model, found)
    expected = describe(targets(model).items())
    if wrong := [f"{name}: expected {expected.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
                 for name in {**expected, **found} if expected.get(name) != found.get(name)]:
        raise ValueError(f"{directory} does not fit its config.json ({len(wrong)} tensors): {'; '.join(wrong[:4])}{'; …' if wrong[4:] else ''}")

    model = model.to_empty(device=device).requires_grad_(False)      # 4-bit weights serve, they do not train
    for name, p in model.named_parameters():
        if not name.endswith(nemotron.FP32): p.data = p.data.to(dtype)
    into = targets(model)
    for name, tensor in nemotron.read_tensors(directory): into[name].copy_(tensor)
    for module in filter(lambda m: isinstance(m, Packed), model.modules()):
        if weights_only and module.fmt == "nvfp4": module.fmt = "w4a16"
        if packed or packed is None and module.weight.is_cuda: continue
        module.decoded = module.weight.float() if module.fmt == "fp8" else module.stored().dequantize()      # FP8: its scale multiplies the product
    return model


# %% 4 · Command

@dataclass(frozen=True)
class QuantizeConfig:
    """Quantizes a checkpoint into NVIDIA's layout and says what that costs."""
    base: Path = Path("out/boosted")       # a checkpoint, or a run's folder: then its newest one
    out: Path = Path("out/quantized")      # the row of results goes to the folder above
    scale_rule: Literal["max", "mse", "four_over_six"] = "four_over_six"      # how 4-bit weights choose their scales
    weights_only: bool = False             # 4-bit weights without scales for their inputs, for GPUs without FP4
    tokens: int = 16_384                   # of built-in conversations, to calibrate on, ours
    preset: str | None = None              # print what this preset takes, from shapes alone, and stop


def calibration_batches(tokenizer: Tokenizer, tokens: int) -> Iterator[Batch]:
    """Packs of built-in training conversations, about `tokens` in all."""
    config = sft.SFTConfig(tokens=tokens)
    samples, width = sft.build_samples(config, tokenizer), config.pack[0]
    packs = sft.pack_best_fit([len(s.ids) for s in samples], width, [s.prompt for s in samples], config.pool, config.tolerance)
    for pack in tqdm(packs[:max(1, tokens // width)], desc="calibrate", leave=False): yield sft.pack_batch([[samples[i] for i in pack]], width)


def main(config: QuantizeConfig) -> None:
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
    bits, seconds = bits_per_element(shares), round(time.perf_counter() - began, 1)
    nvfp4.write_row(config.out.parent, "08_quantize", base=str(base), scale_rule=config.scale_rule, weights_only=config.weights_only,
                    bits_per_element=bits, losses=losses, seconds=seconds,
                    error_db={label: nvfp4.decibels(s["error"] / s["energy"]) for (_, label), s in shares.items() if s["error"]})
    print(f"\n{bits:.3f} bits a parameter in {config.out}, which load_quantized opens. {seconds} s")


if __name__ == "__main__":
    import tyro
    nvfp4.run_command(main, tyro.extras.subcommand_type_from_defaults({"quantize": QuantizeConfig()}), __doc__)
