"""What four bits do to a model's tensors: values flushed to zero, values clipped, by kind of layer and operand.

A training step of a checkpoint under the NVFP4 recipe, with every quantizer watched: inputs, weights, and the two copies of each output gradient.
    flushed   share of values that were not zero and have code 0
    clipped   share of values beyond 6 times their block's scale, which end at 6 (a block's scale is rounded, downwards as well)
    zero      share of values that were zero before
[Ultra] keeps the Mamba output projections in 8 bits because up to 40 % of their values were flushed on Nano; here they are watched as NVFP4 would
treat them (--all puts every linear into 4 bits).

Run:   python experiments/nvfp4_stats.py                                   # the newest checkpoint of out/pretrain, seconds on a CPU
       python experiments/nvfp4_stats.py --home runs/x/pretrain --all      # as if no layer were kept in higher precision
"""
from __future__ import annotations

import importlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent


def stage(name: str):
    """A numbered stage, importable from this folder."""
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


nvfp4, moe, nemotron, pretrain = (stage(name) for name in ("01_nvfp4", "03_latentmoe", "04_model", "05_pretrain"))
KINDS = [("*.in_proj", "Mamba input"), ("*.mixer.out_proj", "Mamba output"), ("*.shared_experts.*", "shared expert"), ("*.experts", "routed experts"),
         ("*.[qkvo]_proj", "attention"), ("*.fc?_latent_proj", "latent projection"), ("*", "other")]
OPERANDS = ("input", "weight", "gradient, rows", "gradient, columns")


def kind_of(layer: str) -> str:
    return next(kind for pattern, kind in KINDS if fnmatch(layer, pattern))


def shares(x: Tensor, q) -> dict[str, float]:
    """Counts of one quantised tensor: values, zero before, flushed to zero, clipped. x has q's shape."""
    x = x.detach().float()
    low, high = q.codes & 7, (q.codes >> 4) & 7
    zero_code = torch.stack((low, high), -1).flatten(-2) == 0
    # the largest value that the block can hold: 6 times its scale, without the tensor's rounding of the last bit
    scale = q.block_scale.float() * nvfp4.align(q.global_scale, q.block_scale.ndim)
    largest = 6 * scale.repeat_interleave(x.shape[-1] // scale.shape[-1], dim=-1)
    return dict(values=x.numel(), zero=(x == 0).sum().item(), flushed=(zero_code & (x != 0)).sum().item(),
                clipped=((x.abs() > largest * (1 + 1e-6)) & (largest > 0)).sum().item())


class Watch:
    """Sums of `shares` by (layer, operand) while a model trains."""
    def __init__(self):
        self.layer, self.sums = "", defaultdict(lambda: dict.fromkeys(("values", "zero", "flushed", "clipped"), 0))

    def add(self, operand: str, x: Tensor, q) -> None:
        for key, n in shares(x, q).items(): self.sums[self.layer, operand][key] += n

    def by_kind(self) -> dict[tuple[str, str], dict[str, float]]:
        """(kind, operand) -> shares of its values."""
        kinds = defaultdict(lambda: defaultdict(int))
        for (layer, operand), counts in self.sums.items():
            for key, n in counts.items(): kinds[kind_of(layer), operand][key] += n
        return {where: {key: n / counts["values"] for key, n in counts.items() if key != "values"} for where, counts in kinds.items()}


@contextmanager
def watching(model, watch: Watch) -> Iterator[None]:
    """Inside, every tensor that stage 01's linear layers quantize is counted, in plain PyTorch."""
    before = {name: getattr(nvfp4, name) for name in ("quantize_rows", "quantize", "quantize_pair")}

    def rows(x_rd, *args, **kwargs):
        q = before["quantize_rows"](x_rd, *args, **kwargs)
        if kwargs.get("name") == "the input of a linear layer": watch.add("input", x_rd, q)
        return q

    def weights(x, *args, **kwargs):
        q = before["quantize"](x, *args, **kwargs)
        if kwargs.get("name") == "the weight of a linear layer": watch.add("weight", x, q)
        return q

    def pair(x_rd, offsets_e=None, *args, **kwargs):
        one, two = before["quantize_pair"](x_rd, offsets_e, *args, **kwargs)
        watch.add("gradient, rows", x_rd, one)
        turned = nvfp4.pad_tokens(x_rd.detach().float(), offsets_e, 16)
        watch.add("gradient, columns", (nvfp4.hadamard16(turned, dim=0) if (args[1:2] or (True,))[0] else turned).T, two)
        return one, two

    names = {module: name for name, module in model.named_modules() if hasattr(module, "draw_seed")}
    def enter(module, *_): watch.layer = names[module]
    hooks = [hook for module in names for hook in (module.register_forward_pre_hook(enter), module.register_full_backward_pre_hook(enter))]
    try:
        nvfp4.quantize_rows, nvfp4.quantize, nvfp4.quantize_pair = rows, weights, pair
        with nvfp4.plain_pytorch(): yield
    finally:
        for hook in hooks: hook.remove()
        for name, function in before.items(): setattr(nvfp4, name, function)


@contextmanager
def every_linear_in_four_bits(wanted: bool) -> Iterator[None]:
    """Stage 04's table without its exceptions, but for what no linear layer holds."""
    before = list(nemotron.PLACEMENT)
    keep = [rule for rule in before if rule[0] in ("backbone.embeddings.*", "lm_head.*", "*.gate.*")]
    if wanted: nemotron.PLACEMENT[:] = [*keep, ("*_proj*", "nvfp4", "all linears"), ("*.experts.*", "nvfp4", "experts"), before[-1]]
    try: yield
    finally: nemotron.PLACEMENT[:] = before


@dataclass(frozen=True)
class Config:
    """Counts what NVFP4 flushes and clips in one training step of a checkpoint."""
    home: Path = Path("out/pretrain")      # folder with checkpoints
    data: Path = Path("out/data")          # text and tokens of the run
    batch: int = 4                         # sequences of the step
    all: bool = False                      # every linear layer in 4 bits, also those that the recipe keeps higher
    out: Path = Path("out")                # the result row

    def __post_init__(self):
        if self.batch < 1: raise ValueError(f"batch = {self.batch} must be at least 1.")


def measure(config: Config) -> dict[tuple[str, str], dict[str, float]]:
    folder = pretrain.newest_checkpoint(config.home)
    run = json.loads((folder / "pretrain.json").read_text())["config"]
    data = pretrain.prepare_data(tuple(run["data"]), config.data, nemotron.preset(run["preset"]).vocab)
    batches = pretrain.Batches(data.train, pretrain.Blend.of(data.train), config.batch, run["seq"], run["steps"], run["seed"])
    with every_linear_in_four_bits(config.all):
        model, watch = nemotron.load_checkpoint(folder).train(), Watch()
        nemotron.apply_recipe(model, nvfp4.NVFP4Recipe())
        model.set_draws(model.draw_seeds(run["seed"], 0))
        with watching(model, watch): nemotron.loss(model, *batches(run["steps"] - 1)).total.backward()
    return watch.by_kind()


def main(config: Config) -> None:
    found = measure(config)
    kinds = [kind for _, kind in KINDS if any(where[0] == kind for where in found)]
    rows = [[kind, operand, *(f"{100 * found[kind, operand][key]:.2f}" for key in ("flushed", "clipped", "zero"))]
            for kind in kinds for operand in OPERANDS if (kind, operand) in found]
    nvfp4.print_table("shares of values in %", ["layers", "operand", "flushed to zero", "clipped", "zero before"], rows)
    nvfp4.write_row(config.out, "nvfp4_stats", all=config.all, shares={f"{kind}: {operand}": values for (kind, operand), values in found.items()})


if __name__ == "__main__":
    nvfp4.run_command(main, Config, __doc__)
