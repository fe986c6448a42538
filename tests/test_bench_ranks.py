"""experiments/bench_ranks.py: its tokens, its processes on a CPU, and what it says when one fails."""
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")      # a GPU machine may lack what only commands need
sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
bench, table = importlib.import_module("bench_ranks"), importlib.import_module("table")
SMALL = bench.Config(preset="tiny", precision="fp32", device="cpu", batch=1, seq=32, long=32, document=12, steps=1)


def test_processes_together_read_what_one_reads():
    """Rows 0 and 1 of two processes are rows 0 and 1 of one, anew each step of a check; a timed run keeps its first batch."""
    checked = replace(SMALL, check=True)
    whole = bench.random_batches(checked, 4096, 2, 32, 0, 1)
    parts = [bench.random_batches(checked, 4096, 2, 32, rank, 2) for rank in range(2)]
    for step in range(2):
        for one, *split in zip(whole(step), *(part(step) for part in parts)): assert torch.equal(one, torch.cat(split))
    assert not torch.equal(whole(0).ids_bt, whole(1).ids_bt) and whole(0).doc_bt[0].bincount().tolist() == [12, 12, 8]
    timed = bench.random_batches(SMALL, 4096, 2, 32, 0, 1)
    assert timed(0) is timed(1)


def test_two_processes_on_a_cpu_give_the_losses_of_one_and_a_row(tmp_path, capsys):
    """The whole way: torchrun, shared experts, the row. A rank that reads other rows, or a gradient not shared, moves the second loss."""
    bench.main(replace(SMALL, check=True, only="experts", out=tmp_path))
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert (row["what"], row["case"], row["gpus"], row["steps"]) == ("losses", "FSDP + experts", 2, 5) and row["apart"] < 1e-5
    assert "5 steps, 2 processes against one" in capsys.readouterr().out


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"FSDP on 1: exit code 1(.|\n)*unknown preset"): bench.launch(replace(SMALL, preset="big"), "FSDP", 1)


def test_without_the_gpus_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match="2 GPUs are asked for and 1 are here"): bench.main(replace(SMALL, device="cuda"))


def test_the_table_marks_a_ratio_that_was_missed():
    """Of two rows of one case and size the newer counts."""
    row = dict(stage="bench_ranks", what="speed", case="FSDP", tokens=64, gpus=2, seq=16, one_tokens_per_s=1000.0, tokens_per_s=1500.0, ratio=1.5,
               preset="tiny", precision="bf16", device="GPU", torch="2")
    losses = dict(stage="bench_ranks", what="losses", apart=2.07e-07)
    shown = table.table_ranks([row, losses])
    assert "| FSDP | 32 in rows of 16 | 1,000 | 1,500 | 1.50× (1.7 asked: missed) |" in shown and "at most 2e-07 apart" in shown
    assert "| 1.80× |" in table.table_ranks([row, row | dict(ratio=1.8)]) and "missed" not in table.table_ranks([row, row | dict(ratio=1.8)])
    assert table.table_ranks([]) == "Not measured yet."
