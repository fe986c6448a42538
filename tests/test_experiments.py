"""The measuring scripts: fair turns, and a README that says what the rows say."""
import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("tyro")      # a GPU machine may lack what only commands need
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
bench, table = importlib.import_module("bench_cpu"), importlib.import_module("table")


def test_contenders_take_turns():
    """Times on a shared machine compare only when every round runs everybody, and nobody always goes first."""
    calls = []
    times = bench.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3)
    assert calls == list("abc") + list("abc") + list("bca") + list("cab")       # a warm-up, then three rounds
    assert all(len(t) == 3 for t in times.values())


def test_the_peer_is_what_it_is_said_to_be():
    """Same sizes, grouped_mm experts, the chunk that was asked for, and no MTP: as many parameters as our trunk."""
    config = importlib.import_module("04_model").PRESETS["tiny"]
    peer = bench.peer_model(config, 64)
    assert sum(p.numel() for p in peer.parameters()) + 4 * config.experts == importlib.import_module("04_model").ledger(config).total
    assert peer.config._experts_implementation == "grouped_mm" and peer.config.chunk_size == 64


def test_the_readme_says_what_the_rows_say():
    """A number typed by hand, or a row recorded without rendering, shows here: run `python experiments/table.py readme`."""
    text = (ROOT / "README.md").read_text()
    assert table.rendered(text, table.read_rows(ROOT / "experiments" / "results.jsonl")) == text
