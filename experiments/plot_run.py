"""Figures of a training run, from its metrics.jsonl: the loss with its branches, and the run's health.

Run:   python experiments/plot_run.py                          # out/pretrain -> out/05_loss.png and out/05_health.png
       python experiments/plot_run.py --home runs/x/pretrain   # another run, finished or not
"""
from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def stage(name: str):
    """A numbered stage, importable from this folder."""
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


def read_metrics(home: Path) -> list[dict]:
    """Rows of home/metrics.jsonl, one a step. ValueError when there are none."""
    path = home / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not rows: raise ValueError(f"{path} has no rows: train first, or give --home the folder that holds a run's metrics.jsonl.")
    return rows


def read_branches(home: Path, order: tuple[str, ...]) -> dict[str, list[dict]]:
    """precision -> rows of the branches that ran after the main run, the reference first."""
    return {p: read_metrics(home / f"branch-{p}") for p in order if (home / f"branch-{p}" / "metrics.jsonl").exists()}


def settings(home: Path) -> dict:
    """The run's settings, as its newest checkpoint holds them."""
    return json.loads((stage("05_pretrain").newest_checkpoint(home) / "pretrain.json").read_text())["config"]


def smooth(values: list[float], width: int) -> np.ndarray:
    """Mean of the last `width` values at each point (of fewer at the beginning)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - width, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


def plot_gaps(ax, branches: dict[str, list[dict]]) -> None:
    """How far each branch's loss lies from the first branch's, step by step: the losses themselves would lie on one line."""
    gap = stage("05_pretrain").relative_gap
    (first, reference), *others = branches.items()
    steps = [row["step"] for row in reference]
    for (precision, run), colour in zip(others, ("#c0392b", "#3d8b4f", "#7d3c98")):
        ax.plot(steps, [100 * (r["loss"] / q["loss"] - 1) for r, q in zip(run, reference)], color=colour, marker=".", linewidth=1, label=precision)
        ax.axhline(100 * gap(run, reference), xmin=0.5, color=colour, linewidth=2)
    ax.axhline(0, color="0.3", linewidth=1)
    ax.set_title("Same checkpoint, same data, fewer bits: loss " + ", ".join(f"{100 * gap(run, reference):+.2f} % in {p}" for p, run in others))
    ax.set_xlabel("optimizer step"); ax.set_ylabel(f"loss against {first} (%)")
    ax.text(0.99, 0.95, "thick line: mean of the second half", transform=ax.transAxes, ha="right", fontsize=9, color="0.35"); ax.legend(frameon=False)


def plot_loss(rows: list[dict], branches: dict[str, list[dict]], config: dict, path: Path) -> None:
    """Figure: the loss by step with the learning rate behind it; beside it the branches."""
    nvfp4 = stage("01_nvfp4")
    fig, axes = nvfp4.new_figure(columns=2 if len(branches) > 1 else 1)
    ax = axes[0] if len(branches) > 1 else axes
    steps, loss = [r["step"] for r in rows], [r["loss"] for r in rows]
    line = smooth(loss, max(1, len(loss) // 30))
    ax.plot(steps, loss, color="#9fb8d8", linewidth=0.7, label="each step")
    ax.plot(steps, line, color="#1f4e8c", linewidth=2, label="mean of recent steps")
    ax.set_title(f"The model learns: loss {loss[0]:.1f} at the first step, {line[-1]:.2f} at the last")
    ax.set_xlabel("optimizer step"); ax.set_ylabel("training loss (nats a token)")
    rate = ax.twinx()
    rate.fill_between(steps, [r["lr"] for r in rows], color="#e8a33d", alpha=0.25, linewidth=0)
    rate.set_ylim(0, 3 * config["lr"]); rate.set_ylabel("learning rate (orange area)"); rate.grid(False)
    marks = {config["steps"] - round(config["decay"] * config["steps"]): ["decay"]}
    marks.setdefault(round(config["blend_switch"] * config["steps"]), []).insert(0, "second blend")      # other text: part of the fall is no learning
    for step, what in marks.items():
        ax.axvline(step, color="0.5", linestyle=":", linewidth=1)
        ax.text(step, 0.98, " and ".join(what) + " ", transform=ax.get_xaxis_transform(), rotation=90, ha="right", va="top", fontsize=9, color="0.35")
    ax.legend(loc="upper center", frameon=False)
    if len(branches) > 1: plot_gaps(axes[1], branches)
    nvfp4.save_figure(fig, path)


def plot_depth(ax, looks: list[dict]) -> None:
    """The residual stream's size behind each layer, one line a look, the darker the later."""
    import matplotlib
    colours = matplotlib.colormaps["viridis_r"](np.linspace(0.15, 1, len(looks)))
    for row, colour in zip(looks, colours):
        label = f"step {row['step']:,}" if row in (looks[0], looks[-1]) else None
        ax.plot(range(1, len(row["residual_rms"]) + 1), row["residual_rms"], color=colour, marker=".", linewidth=1.2, label=label)
    ax.set_yscale("log"); ax.legend(frameon=False)
    ax.set_title("Residual stream by depth"); ax.set_xlabel("layer"); ax.set_ylabel("root mean square")


def plot_health(rows: list[dict], path: Path) -> None:
    """Figure: what to watch in a run, six panels."""
    nvfp4 = stage("01_nvfp4")
    fig, axes = nvfp4.new_figure(columns=3, rows=2, width=5.0, height=3.4)
    (balance, depth, norm), (ratio, depths, speed) = axes
    steps, looks = [r["step"] for r in rows], [r for r in rows if "residual_rms" in r]
    width = max(1, len(rows) // 50)
    if rows[-1]["max_vio"] is not None:
        balance.plot(steps, smooth([r["max_vio"] for r in rows], width), color="#c0392b", label="worst layer")
        balance.plot(steps, smooth([r["max_vio_median"] for r in rows], width), color="#1f4e8c", label="median layer")
        dead = max(r["dead_experts"] for r in rows[len(rows) // 2:])
        balance.set_title(f"Busiest expert; {f'up to {dead}' if dead else 'none'} without a token"); balance.set_ylabel("load / mean load")
        balance.legend(frameon=False)
    if looks:
        plot_depth(depth, looks)
        ratio.plot([r["step"] for r in looks], [r["update_ratio"] for r in looks], color="#1f4e8c", marker=".")
        ratio.set_yscale("log"); ratio.set_title("Size of a step"); ratio.set_ylabel("|update| / |weight|, median matrix")
    norm.plot(steps, [r["grad_norm"] for r in rows], color="#9fb8d8", linewidth=0.7)
    norm.plot(steps, smooth([r["grad_norm"] for r in rows], width), color="#1f4e8c", linewidth=2)
    norm.set_yscale("log"); norm.set_title("Gradient norm, before clipping"); norm.set_ylabel("norm")
    names = {"loss": ("next token", "#1f4e8c"), "mtp_1": ("MTP-1, one further", "#3d8b4f"), "mtp_2": ("MTP-2, two further", "#c0392b")}
    for key, (label, colour) in names.items():
        if key in rows[-1]: depths.plot(steps, smooth([r[key] for r in rows], width), color=colour, label=label)
    depths.set_title("Losses by prediction depth"); depths.set_ylabel("nats a token"); depths.legend(frameon=False)
    speed.plot(steps, [r["tokens_per_s"] for r in rows], color="#1f4e8c", linewidth=1)
    speed.set_ylim(bottom=0); speed.set_title("Speed"); speed.set_ylabel("tokens a second")
    if shares := [r["peak_share"] for r in rows if r.get("peak_share") is not None]:      # on a GPU whose peak is known
        speed.set_title(f"Speed: {100 * np.median(shares):.1f} % of the bf16 peak in the median")
        share = speed.twinx()
        share.plot([r["step"] for r in rows if r.get("peak_share") is not None], [100 * x for x in shares], color="#e8a33d", linewidth=1)
        # often one curve in two units: the share takes the lower half, so that both are seen
        share.set_ylim(0, 200 * max(shares)); share.set_ylabel("% of the bf16 peak (orange)"); share.grid(False)
    for ax in (balance, norm, ratio, depths, speed): ax.set_xlabel("optimizer step")
    for ax in (depth, norm): ax.yaxis.set_major_formatter("{x:g}"); ax.yaxis.set_minor_formatter("{x:g}")      # 2, not 2 × 10⁰
    nvfp4.save_figure(fig, path)


@dataclass(frozen=True)
class Config:
    """Draws a run's loss and health."""
    home: Path = Path("out/pretrain")      # the folder with metrics.jsonl and checkpoints
    out: Path | None = None                # folder of the figures; nothing = beside `home`


def main(config: Config) -> None:
    out, run = config.out or config.home.parent, settings(config.home)
    rows = read_metrics(config.home)
    plot_loss(rows, read_branches(config.home, tuple(run["branches"])), run, out / "05_loss.png")
    plot_health(rows, out / "05_health.png")
    print(f"figures: {out / '05_loss.png'}, {out / '05_health.png'}")


if __name__ == "__main__":
    stage("01_nvfp4").run_command(main, Config, __doc__)
