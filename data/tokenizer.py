"""The tokenizer: byte-pair encoding, as definition and trained fast.

Byte-pair encoding: begin with 256 bytes, join the most frequent neighbours into a new token, repeat. A pattern first cuts text into words, so
no token crosses one; it cuts numbers into single digits, because sums are computed digit by digit. Ids below RESERVED are no text at all: the
released special tokens sit on their released ids there and <SPECIAL_n> fills the rest; byte i is id RESERVED + i, and merge n (from 0) is id
RESERVED + 256 + n.

NOTE: a document ends with </s> and nothing opens it: the released base models end documents with id 2, and their chat format has no <s>.
Source: [Tekken] the tokenizer of Mistral NeMo, whose vocabulary Nemotron 3 uses.
"""
from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

RESERVED = 32      # ours: of 4,096; Tekken reserves 1,000 of 131,072
SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 10, "<|im_end|>": 11, "<think>": 12, "</think>": 13, "<tool_call>": 14,
            "</tool_call>": 15, "<tool_response>": 16, "</tool_response>": 17}
EOS = SPECIALS["</s>"]
PATTERN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"      # a word that ends in small letters, or
           r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"     # begins with capitals; one sign before it
           r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")                    # one digit | punctuation | line ends | spaces


def train_bpe(texts: Iterable[str], merges: int, pattern: str = PATTERN) -> dict[bytes, int]:
    """Rung 1, the definition: token bytes -> rank. It counts every pair anew for each merge; rustbpe finds the same merges, fast."""
    import regex  # python's own re has no \\p{...}
    counts = Counter(word for text in texts for word in regex.findall(pattern, text))
    words = [(list(word.encode()), n) for word, n in counts.items()]
    token = [bytes([i]) for i in range(256)]
    for new in range(256, 256 + merges):
        pairs = Counter()
        for ids, n in words:
            for pair in zip(ids, ids[1:]): pairs[pair] += n
        if not pairs: break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))      # the most frequent; of equals, the smallest ids
        token.append(token[best[0]] + token[best[1]])
        for ids, _ in words:
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best: ids[i:i + 2] = [new]
                i += 1
    return {b: rank for rank, b in enumerate(token)}


class Tokenizer:
    """Text <-> ids. ranks: token bytes -> rank in the order of the merges (0-255 are the bytes); an id is RESERVED + rank."""
    eos = EOS
    def __init__(self, ranks: dict[bytes, int], pattern: str = PATTERN):
        import tiktoken
        self.ranks, self.pattern = ranks, pattern
        names = {i: name for name, i in SPECIALS.items()}
        self.specials = {names.get(i, f"<SPECIAL_{i}>"): i for i in range(RESERVED)}
        ids = {b: RESERVED + rank for b, rank in ranks.items()}
        self.encoding = tiktoken.Encoding("nemotron-toy", pat_str=pattern, mergeable_ranks=ids, special_tokens=self.specials)

    @classmethod
    def train(cls, texts: Iterable[str], vocab: int) -> Tokenizer:
        """At most `vocab` ids in all; a short text has fewer pairs to merge and gives a smaller vocabulary."""
        import rustbpe
        if vocab < RESERVED + 256: raise ValueError(f"vocab = {vocab}: {RESERVED} reserved ids and 256 bytes need at least {RESERVED + 256}.")
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(texts), vocab - RESERVED, pattern=PATTERN)
        return cls({bytes(b): rank for b, rank in trainer.get_mergeable_ranks()})

    def __len__(self) -> int: return RESERVED + len(self.ranks)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. What looks like a special token stays text: "</s>" typed by a user does not end a document."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens by name. An id that no token has (a model's vocabulary may be larger) reads <unk>, a cut character U+FFFD."""
        return self.encoding.decode([i if i < len(self) else SPECIALS["<unk>"] for i in ids])

    def byte_counts(self, vocab: int) -> Tensor:
        """Bytes of text each id stands for, [v]; special tokens stand for none."""
        sizes = torch.zeros(vocab, dtype=torch.long)
        sizes[RESERVED:len(self)] = torch.tensor([len(b) for b in sorted(self.ranks, key=self.ranks.get)])
        return sizes

    def save(self, folder: str | Path) -> None:
        """tokenizer.tiktoken: one line a token, base64 bytes and rank. tokenizer_specials.json: pattern and special tokens."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{base64.b64encode(b).decode()} {rank}\n" for b, rank in sorted(self.ranks.items(), key=lambda item: item[1])]
        (folder / "tokenizer.tiktoken").write_text("".join(lines))
        (folder / "tokenizer_specials.json").write_text(json.dumps(dict(pattern=self.pattern, specials=self.specials), indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        folder = Path(folder)
        if not (folder / "tokenizer.tiktoken").exists():
            raise ValueError(f"{folder} has no tokenizer.tiktoken: give a folder that Tokenizer.save wrote.")
        pairs = (line.split() for line in (folder / "tokenizer.tiktoken").read_text().splitlines())
        return cls({base64.b64decode(b): int(rank) for b, rank in pairs}, json.loads((folder / "tokenizer_specials.json").read_text())["pattern"])
