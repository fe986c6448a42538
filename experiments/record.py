"""Runs the stages as `make run` does, times each, and keeps their result rows in experiments/results.jsonl, from which the README is rendered.

Run:   python experiments/record.py              # about 8 min on 2 cores: the stages, as `make run` runs them
       python experiments/record.py --what test  # `make test`, its installation included when there is no .venv yet
       python experiments/record.py --what gpu   # on a machine with a GPU: its suite, and one layer of each kind at Ultra's width
       python experiments/table.py readme        # then render
"""
from __future__ import annotations

import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("01_nvfp4.py", "02_mamba.py", "03_latentmoe.py", "04_model.py", "05_pretrain.py --fresh", "06_sft.py --fresh",
          "07_rlvr_mopd.py --fresh", "08_infer.py", "04_model.py --preset ultra")


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def timed(command: list[str]) -> tuple[float, str]:
    """Seconds and standard output; the output is shown as it comes. Stops the script when the command fails."""
    start, lines = time.perf_counter(), []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout: print(line, end="", flush=True); lines.append(line)
    if process.returncode: raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}: nothing is recorded for it.")
    return time.perf_counter() - start, "".join(lines)


@dataclass(frozen=True)
class Config:
    """Times the stages and keeps their rows, or times a suite."""
    what: Literal["stages", "test", "gpu"] = "stages"


def main(config: Config) -> None:
    sys.path.insert(0, str(ROOT))
    nvfp4, here = importlib.import_module("01_nvfp4"), dict(cores=cores(), python=platform.python_version())
    fresh = ROOT / "out" / "results.jsonl"
    stages = dict(stages=STAGES, gpu=("04_model.py --preset ultra --slice",)).get(config.what, ())
    for stage in stages:
        before = len(rows_of(fresh))
        seconds, _ = timed([sys.executable, *stage.split()])
        nvfp4.write_row(ROOT / "experiments", "command", command=f"python {stage}", seconds=round(seconds, 1), **here)
        for row in rows_of(fresh)[before:]:
            with (ROOT / "experiments" / "results.jsonl").open("a") as file: file.write(json.dumps(row) + "\n")
    suites = {"test": "make test", "gpu": "python -m pytest tests -m gpu"}
    if config.what in suites:
        name = suites[config.what]
        seconds, output = timed([sys.executable if word == "python" else word for word in name.split()])
        passed, versions = re.search(r"(\d+) passed", output), {}
        if config.what == "gpu": versions = dict(triton=importlib.import_module("triton").__version__, date=time.strftime("%d %B %Y"))
        nvfp4.write_row(ROOT / "experiments", "command", command=name, seconds=round(seconds, 1), passed=int(passed[1]), **here, **versions)


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Config, description=__doc__))
