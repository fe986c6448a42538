"""Packed batches and their blend: which windows of which source a step of training reads.

A source is an endless row of tokens: its documents in an order drawn anew for each epoch. A training window is t + 1 tokens of that row, cut
without regard to documents; doc_bt counts them, so that Mamba states and attention end where a document does. Windows are dealt to sources by
the blend's shares. All of it is a function of (seed, step): the data position of a checkpoint is one number, and no loader has a state to lose.

Sources:  [Ultra] Nemotron 3 Ultra report, arXiv 2606.15007
Letters:  b batch  t time
"""
from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import corpus
from data.shards import Shard, Stream


class Batch(NamedTuple):
    """One step's windows. labels_bt[t] is the token after ids_bt[t]; mask_bt is False where that token opens another document (or is padding)."""
    ids_bt: Tensor
    labels_bt: Tensor
    doc_bt: Tensor
    mask_bt: Tensor

    def split(self, n: int) -> list[Batch]:
        return [Batch(*piece) for piece in zip(*(x.chunk(n) for x in self))]

    def to(self, device) -> Batch:
        return Batch(*(x.to(device) for x in self))

    @classmethod
    def from_windows(cls, ids_bt: np.ndarray, doc_bt: np.ndarray) -> Batch:
        """ids and document numbers of t + 1 tokens a row.   ids 5 6 2 7, documents 0 0 0 1  ->  labels 6 2 7, mask 1 1 0"""
        ids_bt, doc_bt = torch.from_numpy(ids_bt), torch.from_numpy(doc_bt)
        return cls(ids_bt[:, :-1], ids_bt[:, 1:], doc_bt[:, :-1], (doc_bt[:, 1:] == doc_bt[:, :-1]) & (doc_bt[:, 1:] >= 0))


@dataclass(frozen=True)
class Blend:
    """Shares of the training windows by source, in two phases: first diversity, then quality  [Ultra]."""
    phase1: dict[str, float]
    phase2: dict[str, float]
    switch: float = 0.75

    @classmethod
    def of(cls, shards: dict[str, Shard], switch: float = 0.75) -> Blend:
        """data/corpus.py's table for built-in sources; by size as soon as there is other text, so that an epoch sees all of it once."""
        size = {name: float(len(shard.tokens)) for name, shard in shards.items()}
        known = all(name in corpus.SOURCES for name in shards)
        phases = [{name: getattr(corpus.SOURCES[name], phase) for name in shards} if known else size for phase in ("phase1", "phase2")]
        return cls(*({name: share / sum(phase.values()) for name, share in phase.items()} for phase in phases), switch)

    def plan(self, windows: int, budget: int) -> np.ndarray:
        """Which source each of `windows` windows reads; the phase switches after switch · budget of them. A longer plan begins like a shorter one.

        Window k of a source with share w is due at (k + 1/2) / w, and windows are dealt as they fall due: shares .5 .25 .25 -> 0 1 2 0 ...
        """
        first = min(round(self.switch * budget), windows)
        parts = []
        for shares, n in ((self.phase1, first), (self.phase2, windows - first)):
            due = [(np.arange(math.ceil(w * n) + 1) + 0.5) / w if w else np.zeros(0) for w in shares.values()]
            source = np.repeat(np.arange(len(due)), [len(d) for d in due])
            parts.append(source[np.argsort(np.concatenate(due), kind="stable")][:n])
        return np.concatenate(parts)


class Batches:
    """step -> Batch, for a run of `steps` steps (and any number beyond, in the second phase). Of `ranks` that share a step, rank i gets every row
    i, i + ranks, .. of it: together they read what one would read alone."""
    def __init__(self, shards: dict[str, Shard], blend: Blend, batch: int, seq: int, steps: int, seed: int, extra: int = 0, rank: int = 0,
                 ranks: int = 1):
        total = sum(len(s.tokens) for s in shards.values())
        if total < batch * seq + 1:
            raise ValueError(f"the corpus has {total:,} tokens and one batch of {batch} × {seq} needs {batch * seq + 1:,}: "
                             "give more text, or lower --batch or --seq.")
        if batch % ranks: raise ValueError(f"a batch of {batch} sequences cannot be shared by {ranks} ranks: choose a multiple.")
        self.batch, self.seq, self.names, self.rank, self.ranks = batch, seq, list(blend.phase1), rank, ranks
        self.streams = [Stream(shards[name], (seed, zlib.crc32(name.encode()))) for name in self.names]      # each source has its own order
        self.plan = blend.plan((steps + extra) * batch, steps * batch)
        self.turn = np.empty(len(self.plan), np.int64)      # which window of its source each one is
        for i in range(len(self.names)): self.turn[self.plan == i] = np.arange((self.plan == i).sum())

    def __call__(self, step: int) -> Batch:
        rows = range(step * self.batch + self.rank, (step + 1) * self.batch, self.ranks)
        # windows overlap by one token: the last label of one is the first input of the next, and every token is predicted once
        windows = [self.streams[self.plan[r]].window(int(self.turn[r]) * self.seq, self.seq + 1) for r in rows]
        return Batch.from_windows(*(np.stack(x) for x in zip(*windows)))

    def epochs(self, step: int) -> dict[str, float]:
        """How often each source has been read after `step` steps."""
        seen = np.bincount(self.plan[:step * self.batch], minlength=len(self.names)) * self.seq
        return {name: float(seen[i] / stream.size) for i, (name, stream) in enumerate(zip(self.names, self.streams))}


class LongShort:
    """step -> Batch of the long-context phase: most steps read long windows, the others short ones, and no step mixes lengths  [Ultra: 92 % of the
    steps at 1M tokens, 8 % at 4K]. Every step has the same number of tokens, so a long one has fewer windows."""
    def __init__(self, long: Batches, short: Batches, share: float = 0.92):
        if long.batch * long.seq != short.batch * short.seq:
            raise ValueError(f"long steps have {long.batch * long.seq:,} tokens and short ones {short.batch * short.seq:,}: they must be equal.")
        if not 0 <= share <= 1: raise ValueError(f"share = {share} of long steps must lie in [0, 1].")
        self.long, self.short, self.share = long, short, share

    def is_long(self, step: int) -> bool:
        """Evenly spread: of n steps, round(share · n) are long."""
        return math.floor((step + 1) * self.share + 0.5) > math.floor(step * self.share + 0.5)

    def __call__(self, step: int) -> Batch:
        return (self.long if self.is_long(step) else self.short)(step)
