"""Figures of stage 04: which layers of Ultra train in 4 bits, and where each preset's parameters and work sit.

Run:   python experiments/plot_model.py      # out/04_layers.png and out/04_ledger.png
"""
from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def stage(name: str):
    """A numbered stage, importable from this folder."""
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


nvfp4, nemotron = stage("01_nvfp4"), stage("04_model")


def plot_layers(config, name: str, path: Path) -> None:
    """Figure: every layer of a model as one tile, lettered by kind and coloured by the format its linears train in."""
    from matplotlib.patches import Patch, Rectangle
    fig, ax = nvfp4.new_figure(width=11, height=2.8)
    colours, of = {"nvfp4": "#8cc46a", "high": "#a9c1de"}, {"M": "mixer.in_proj.weight", "E": "mixer.experts.up_proj", "*": "mixer.q_proj.weight"}
    row, last = 36, (config.layers - 1) // 36
    for i, letter in enumerate(config.pattern):
        fmt = nemotron.placement_of(f"backbone.layers.{i}.{of[letter]}", config)[0]
        ax.add_patch(Rectangle((i % row, -(i // row)), 0.9, 0.9, color=colours[fmt]))
        ax.text(i % row + 0.45, 0.43 - i // row, {"M": "M", "E": "E", "*": "A"}[letter], ha="center", va="center", fontsize=9)
    ax.set_xlim(-0.2, row + 0.1); ax.set_ylim(-last - 1.5, 1.1); ax.axis("off")
    ax.text(0, -last - 0.5, "read left to right, top to bottom:   M  Mamba-2      E  mixture of experts      A  attention", fontsize=10)
    ax.set_title(f"{name}, {config.layers} layers: attention and the last 15 % train in 16 bits, the rest in 4")
    ax.legend(handles=[Patch(color=colours["nvfp4"], label="4-bit NVFP4 (Mamba output projections 8-bit MXFP8, latent projections 16-bit)"),
                       Patch(color=colours["high"], label="16-bit")], loc="lower left", ncols=2, frameon=False, bbox_to_anchor=(0, -0.08))
    nvfp4.save_figure(fig, path)


def plot_presets(books: dict, path: Path) -> None:
    """Figure: where the parameters sit and where one token's work goes, by preset."""
    fig, axes = nvfp4.new_figure(columns=2, width=6.2, height=3.4)
    groups = {"embedding and output": ("embedding", "output layer"), "routed experts": ("routed experts",), "shared experts": ("shared experts",),
              "Mamba": ("Mamba linears", "Mamba", "Mamba conv, A, D, dt, norms"), "attention": ("attention",),
              "router and latent": ("router and latent", "latent projections", "router and norm", "final norm")}
    titles = {"parts": ("In the released sizes nearly all parameters are routed experts", "% of parameters"),
              "flops_per_token": ("Work for one token: spread over all kinds of layer", "% of forward FLOPs at 8,192 tokens of context")}
    for ax, (part, (title, unit)) in zip(axes, titles.items()):
        left = [0.0] * len(books)
        for label, keys in groups.items():
            share = [100 * sum(getattr(b, part).get(k, 0) for k in keys) / sum(getattr(b, part).values()) for b in books.values()]
            ax.barh(list(books), share, left=left, label=label)
            left = [a + b for a, b in zip(left, share)]
        ax.set_title(title); ax.set_xlabel(unit); ax.invert_yaxis(); ax.grid(False)
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    nvfp4.save_figure(fig, path)


@dataclass(frozen=True)
class Config:
    """Draws the layers of Ultra and the ledger of every preset."""
    out: Path = Path("out")     # where the figures go


def main(config: Config) -> None:
    plot_layers(nemotron.PRESETS["ultra"], "Nemotron 3 Ultra", config.out / "04_layers.png")
    plot_presets({name: nemotron.ledger(sizes) for name, sizes in nemotron.PRESETS.items()}, config.out / "04_ledger.png")
    print(f"figures: {config.out / '04_layers.png'}, {config.out / '04_ledger.png'}")


if __name__ == "__main__":
    nvfp4.run_command(main, Config, __doc__)
