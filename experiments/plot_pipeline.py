"""Draws the whole pipeline with what each stage of the last recorded `make run` showed, for the README.

Run:   python experiments/plot_pipeline.py           # docs/pipeline.png from experiments/results.jsonl, 2 s
"""
from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
claims = importlib.import_module(f"{__package__}.claims" if __package__ else "claims")
newest = claims.newest
# title -> (centre, colour); a box is 2 wide and 1.7 high
PLACES = {"Base": (1.1, 2.6, "#dbe7f3"), "SFT": (3.6, 2.6, "#dbe7f3"), "RLVR": (6.1, 2.6, "#f6e3d5"), "Teachers": (8.6, 0.5, "#f6e3d5"),
          "MOPD": (8.6, 2.6, "#f6e3d5"), "Boosting": (11.1, 2.6, "#e3efdc"), "Serving": (13.6, 2.6, "#e3efdc")}
ARROWS = (("Base", "SFT"), ("SFT", "RLVR"), ("RLVR", "MOPD"), ("RLVR", "Teachers"), ("Teachers", "MOPD"), ("MOPD", "Boosting"),
          ("Boosting", "Serving"))


def boxes(rows: list[dict]) -> dict[str, list[str]]:
    """Box -> its lines, the first of them file and what is done; numbers are the newest rows'. ValueError for a stage that has none."""
    found = {stage: newest(rows, stage) for stage in ("05_pretrain", "06_sft", "07_rlvr_mopd", "08_infer")}
    if missing := [stage for stage, row in found.items() if row is None]:
        raise ValueError(f"no row of {missing[0]}: run experiments/record.py first.")
    base, sft, rl, serve = found.values()
    mean = lambda stage, domains: sum(rl["accuracy"][stage][d] for d in domains) / len(domains)
    every, taught = list(rl["accuracy"]["SFT"]), list(rl["accuracy"]["teacher"])
    last = [stage for stage in rl["accuracy"] if stage.startswith("MOPD")][-1]
    speed = serve["tokens_per_s"]["1"]
    best = max(speed, key=speed.get)
    right, losses = sft["all"]["regular"], serve["losses"]
    return {
        "Base": ["05 · pretraining", f"{base['tokens'] / 1e6:.2f}M tokens", f"loss {base['loss']:.2f}",
                 f"{base['bits_per_byte']['all']:.2f} bits per byte"],
        "SFT": ["06 · conversations", f"right: {right['accuracy']:.0%}", f"in {right['tokens']:.0f} tokens", f"packs {sft['filled'][0]:.0%} full"],
        "RLVR": ["07 · verified rewards", "right, harder level:", f"SFT {mean('SFT', every):.0%}, RLVR {mean('RLVR', every):.0%}"],
        "Teachers": ["07 · one a domain", ", ".join(rl["teachers"]), f"right there: {mean('teacher', taught):.0%}",
                     f"(RLVR {mean('RLVR', taught):.0%})"],
        "MOPD": ["07 · distillation", "on the student's text", f"right: {mean(last, every):.0%}", f"(RLVR {mean('RLVR', every):.0%})"],
        "Boosting": ["07 · MTP head", "tokens a pass, 7 drafts", f"{rl['drafts']['before greedy']:.2f} to {rl['drafts']['after greedy']:.2f}"],
        "Serving": ["08 · 4 and 8 bits", f"loss {losses['as it was']:.4f}", f"to {losses['quantized, 4-bit weights and inputs']:.4f}",
                    f"{speed['0']:.0f} tokens/s, {speed[best]:.0f}", f"with {best} drafts" if best != "0" else "without drafts"]}


NOTE = """Preset tiny, minutes on 2 CPU cores. "Right": held-out questions answered exactly;
06 asks at the easiest level, 07 also one above. Runs as short as these show that
every phase works, not what it is worth: experiments/README.md has the intervals."""


def draw(rows: list[dict], path: Path) -> None:
    """The figure as a PNG of few colours, whose metadata hold the lines, so that a test can tell when they are old."""
    from matplotlib.patches import FancyBboxPatch
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    nvfp4, lines = importlib.import_module("01_nvfp4"), boxes(rows)
    fig, ax = nvfp4.new_figure(width=14.8, height=4.3)
    ax.set(xlim=(0, 14.7), ylim=(-0.45, 3.6))
    ax.axis("off")
    for title, (x, y, colour) in PLACES.items():
        ax.add_patch(FancyBboxPatch((x - 1.0, y - 0.85), 2.0, 1.7, boxstyle="round,pad=0.04", facecolor=colour, edgecolor="0.45"))
        ax.text(x, y + 0.66, title, ha="center", va="center", fontsize=13, fontweight="bold")
        ax.text(x, y + 0.38, lines[title][0], ha="center", va="center", fontsize=10, color="0.3")
        for i, line in enumerate(lines[title][1:]): ax.text(x, y + 0.08 - 0.26 * i, line, ha="center", va="center", fontsize=10.5)
    for start, end in ARROWS:
        (x, y, _), (u, v, _) = PLACES[start], PLACES[end]
        if x == u: ends = (x, y + 0.9), (u, v - 0.9)
        elif y == v: ends = (x + 1.05, y), (u - 1.05, v)
        else: ends = (x, y - 0.9), (u - 1.05, v)
        bend = "angle,angleA=-90,angleB=180" if x != u and y != v else "arc3"
        ax.annotate("", ends[1], ends[0], arrowprops=dict(arrowstyle="-|>", color="0.3", lw=1.6, connectionstyle=bend))
    ax.text(0.1, 0.6, NOTE, fontsize=10, va="center", color="0.3")
    nvfp4.save_figure(fig, path)
    info = PngInfo()
    info.add_text("Description", described(rows))
    with Image.open(path) as image: small = image.convert("RGB").quantize(64)
    small.save(path, optimize=True, pnginfo=info)


def described(rows: list[dict]) -> str: return "; ".join(f"{title}: {', '.join(lines)}" for title, lines in boxes(rows).items())


@dataclass(frozen=True)
class Config:
    """Draws the pipeline with the newest rows' numbers."""
    out: Path = ROOT / "docs"


def main(config: Config) -> None:
    draw(claims.read_rows(ROOT / "experiments" / "results.jsonl"), config.out / "pipeline.png")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    importlib.import_module("01_nvfp4").run_command(main, Config, __doc__)
