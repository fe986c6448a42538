"""Token shards: text as one long row of ids on disk, documents behind one another, and that row read over and over.

Memory-mapped, a shard costs no memory until it is read. The index beside it says where documents end, and its hash says which data a run saw.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np


class Shard:
    """Tokens of one source: .tokens (memory-mapped) and .ends (where each document ends, </s> included)."""
    def __init__(self, path: Path):
        self.index = json.loads(path.with_suffix(".json").read_text())
        size = path.stat().st_size
        if size != self.index["bytes"]:
            raise ValueError(f"{path} is cut short ({size:,} of {self.index['bytes']:,} bytes): delete {path.parent} and run again.")
        self.tokens = np.memmap(path, dtype=self.index["dtype"], mode="r") if size else np.zeros(0, self.index["dtype"])
        self.ends = np.array(self.index["ends"], dtype=np.int64)

    @staticmethod
    def write(path: Path, documents: Iterable[str], tokenizer) -> None:
        """Tokenizes documents into path (.bin) and its index (.json), each closed by tokenizer.eos.

        tokenizer: has len() (the size of its vocabulary), .eos and .encoding, a tiktoken.Encoding."""
        dtype, eos = np.dtype(np.uint16 if len(tokenizer) <= 2 ** 16 else np.uint32), tokenizer.eos
        ends, digest, total = [], hashlib.sha256(), 0
        with path.open("wb") as file:
            for batch in _batched(documents, 1024):
                for ids in tokenizer.encoding.encode_ordinary_batch(batch, num_threads=os.cpu_count() or 1):
                    raw = np.array([*ids, eos], dtype=dtype).tobytes()
                    file.write(raw); digest.update(raw)
                    total += len(ids) + 1
                    ends.append(total)
        index = dict(dtype=dtype.name, tokens=total, bytes=total * dtype.itemsize, sha256=digest.hexdigest(), ends=ends)
        path.with_suffix(".json").write_text(json.dumps(index))


def _batched(items: Iterable, n: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == n: yield batch; batch = []
    if batch: yield batch


class Stream:
    """A shard's documents over and over, each epoch in its own order."""
    def __init__(self, shard: Shard, seed: tuple[int, ...]):
        self.shard, self.seed, self.size = shard, seed, len(shard.tokens)
        self.starts, self.lengths = np.concatenate([[0], shard.ends[:-1]]), np.diff(shard.ends, prepend=0)
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(order of the documents in epoch n, where each ends)"""
        order = np.random.default_rng([*self.seed, n]).permutation(len(self.lengths))
        return order, self.lengths[order].cumsum()

    def window(self, position: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, document numbers from 0) of `length` tokens from `position` of the endless row."""
        ids, docs, n = np.empty(length, np.int64), np.empty(length, np.int64), 0
        epoch, at = divmod(position, self.size)
        order, ends = self.epoch(epoch)
        i, filled = int(np.searchsorted(ends, at, side="right")), 0
        while filled < length:
            if i == len(order): epoch, at, i = epoch + 1, 0, 0; order, ends = self.epoch(epoch)
            take = min(ends[i] - at, length - filled)
            start = self.starts[order[i]] + self.lengths[order[i]] - (ends[i] - at)
            ids[filled:filled + take], docs[filled:filled + take] = self.shard.tokens[start:start + take], n
            at, filled, n, i = at + take, filled + take, n + 1, i + 1
        return ids, docs
