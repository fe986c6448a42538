"""A store of what has been computed for beginnings of texts, for prompts that begin alike. It knows no model: tensors in, the same tensors out.

An entry belongs to the token ids of a prefix of whole blocks and holds a copy of some tensors, by name. It stands alone: dropping one leaves the
others right. Prefixes are found by a hash that is chained over their blocks, so that all prefixes of a text cost one pass over it. A hash only says
where to look: the ids decide, so that two prefixes of one hash are never taken for each other. When the store is full, the entry goes that has not
been used for the longest time.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Entry(NamedTuple):
    ids: tuple[int, ...]; tensors: dict[str, Tensor]; nbytes: int


def chain(before: int, block: tuple[int, ...]) -> int:
    """Hash of a prefix, from the hash of all its blocks but the last and the ids of that one."""
    return hash((before, block))


class Prefixes:
    """At most limit_bytes of tensors. hits, misses: of find; saved: tokens that the hits cover. ValueError for sizes that make no sense."""
    def __init__(self, limit_bytes: int, block: int = 64):      # ours: 64 tokens a block
        if limit_bytes < 0 or block < 1: raise ValueError(f"{limit_bytes} bytes, blocks of {block}: use 0 bytes or more, and 1 token or more.")
        self.limit_bytes, self.block = limit_bytes, block
        self.entries: OrderedDict[int, Entry] = OrderedDict()      # by hash, the one used last at the end
        self.nbytes = self.hits = self.misses = self.saved = 0

    def keys(self, ids: Sequence[int]) -> list[int]:
        """The hash of every prefix of whole blocks, the shortest first."""
        blocks = (tuple(ids[i:i + self.block]) for i in range(0, len(ids) - self.block + 1, self.block))
        return list(accumulate(blocks, chain, initial=0))[1:]

    def find(self, ids: Sequence[int]) -> tuple[int, dict[str, Tensor]]:
        """(length, tensors) of the longest prefix of ids that is stored; (0, {}) when none is. The tensors are the store's own."""
        for i, key in reversed(list(enumerate(self.keys(ids), 1))):
            if (entry := self.entries.get(key)) and entry.ids == tuple(ids[:i * self.block]):
                self.entries.move_to_end(key)
                self.hits += 1; self.saved += len(entry.ids)
                return len(entry.ids), entry.tensors
        self.misses += 1
        return 0, {}

    def load(self, ids: Sequence[int], views: Callable[[int], Mapping[str, Tensor]]) -> int:
        """Copies what find gives into views(length) -> length; 0 when nothing is stored."""
        n, tensors = self.find(ids)
        for name, z in (views(n) if n else {}).items(): z.copy_(tensors[name])
        return n

    def store(self, ids: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Stores copies for exactly these ids, and makes room first; what is stored already counts as used. An entry larger than the limit is not
        stored and drives nothing out; of two prefixes of one hash the newer stays. ValueError when ids are not whole blocks."""
        if not ids or len(ids) % self.block: raise ValueError(f"{len(ids)} tokens are not whole blocks of {self.block}.")
        ids, key, size = tuple(ids), self.keys(ids)[-1], sum(z.nbytes for z in tensors.values())
        if (entry := self.entries.get(key)) and entry.ids == ids: self.entries.move_to_end(key); return
        if size > self.limit_bytes: return
        if entry: self.drop(key)
        while self.nbytes + size > self.limit_bytes: self.drop(next(iter(self.entries)))
        copies = {name: z.clone(memory_format=torch.contiguous_format) for name, z in tensors.items()}       # a view would keep its whole pool alive
        self.entries[key] = Entry(ids, copies, size); self.nbytes += size

    def drop(self, key: int) -> None: self.nbytes -= self.entries.pop(key).nbytes
