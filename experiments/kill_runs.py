"""A training run that is killed again and again: does it end with the numbers of one that was left alone?

The run is stage 05's own command. It is killed (SIGKILL, which no program can catch) at random moments: while it reads text, trains, or writes a
checkpoint; each time the same command goes on from the newest whole checkpoint. Losses of all steps must be equal to the bit.

Run:   python experiments/kill_runs.py               # ten kills, 2 min on 2 CPU cores; a row in out/
       python experiments/kill_runs.py --kills 3
"""
from __future__ import annotations

import importlib
import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Config:
    """Kills a run and resumes it."""
    kills: int = 10
    steps: int = 120                    # of the run
    save_every: int = 4                 # steps between checkpoints: a kill falls into one often enough
    seed: int = 0                       # of the moments
    home: Path = Path("out/kill")       # folder of both runs, deleted first
    out: Path = Path("out")             # the result row


def command(config: Config, name: str, how: str) -> list[str]:
    return [sys.executable, str(ROOT / "05_pretrain.py"), "--out", str(config.home / name), "--data", "tasks", "--steps", str(config.steps),
            "--batch", "2", "--seq", "32", "--save-every", str(config.save_every), "--eval-windows", "1", "--branches", how]


def losses(config: Config, name: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (config.home / name / "pretrain" / "metrics.jsonl").read_text().splitlines()]


def steps_in(home: Path) -> int:
    log = home / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def start_of(home: Path) -> str:
    """--resume when there is a whole checkpoint, else --fresh."""
    pretrain = importlib.import_module("05_pretrain")
    return "--resume" if any(not pretrain.damage(folder) for folder in pretrain.checkpoints(home)) else "--fresh"


def main(config: Config) -> None:
    sys.path.insert(0, str(ROOT))
    nvfp4 = importlib.import_module("01_nvfp4")
    shutil.rmtree(config.home, ignore_errors=True)
    subprocess.run(command(config, "alone", "--fresh"), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (config.home / "alone" / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    seconds, moments, unfinished, resumed = sum(row["seconds"] for row in rows), random.Random(config.seed), 0, []
    shutil.copytree(config.home / "alone" / "data", config.home / "killed" / "data")       # both read the same text

    for _ in tqdm(range(config.kills), desc="kills", disable=None):
        home = config.home / "killed" / "pretrain"
        before = steps_in(home)
        run = subprocess.Popen(command(config, "killed", start_of(home)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # one start in five dies before its first step; the others get a share of the run, so that all kills find it unfinished
        wait = moments.uniform(0, 4) if moments.random() < 0.2 else None
        while wait is None and run.poll() is None and steps_in(home) in (0, before): time.sleep(0.01)
        time.sleep(moments.uniform(0, 1.5 * seconds / (config.kills + 1)) if wait is None else wait)
        unfinished += run.poll() is None
        run.kill(); run.wait()
        folders = sorted(home.glob("step-*"))
        resumed.append(folders[-1].name if folders else "nothing")
    how = start_of(config.home / "killed" / "pretrain")
    subprocess.run(command(config, "killed", how), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    alone, killed = losses(config, "alone"), losses(config, "killed")
    equal = alone == killed and len(alone) == config.steps
    print(f"{unfinished} of {config.kills} starts were killed, behind {', '.join(resumed)}; "
          f"losses of all {config.steps} steps {'equal to the bit' if equal else 'DIFFER'}, the last {killed[-1]:.6f} and {alone[-1]:.6f}")
    nvfp4.write_row(config.out, "kill_runs", kills=unfinished, steps=config.steps, equal=equal, behind=resumed, loss=killed[-1])
    if not equal: sys.exit("the killed run ended elsewhere: that is a bug.")


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Config, description=__doc__))
