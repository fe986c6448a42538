"""Attention within documents for long sequences: PyTorch's flex_attention over the blocks in which somebody sees something.

The idea.  A dense mask of t queries and s keys has t·s entries: 4 GB a row at 65,536 tokens, and each is read. Documents leave most of it empty:

    keys       0 0 0 0 1 1 1 1 1 1 2 2 2 2 2 2        16 tokens of three documents, blocks of 4
    block 0    ■ . . .                                a query sees from the beginning of its document to itself, so the blocks that a block of
    block 1    . ■ . .                                queries needs lie side by side: from where its first query's document begins to its last query
    block 2    . ■ ■ .
    block 3    . . ■ ■

So the list of blocks is two numbers a row, computed on the GPU with no wait for the host (a recorded step can hold it), and inside a block the rule
of 04_model.py, attention_mask, decides. Work and memory grow with what is seen: for documents of one length, linearly in t.

A library does the rest: flex_attention compiles the rule into its kernel, forward and backward, for grouped queries and any t and s. Its first call
for new shapes compiles for some seconds, so 04_model.py comes here only where a dense mask would be large.

Sources:  04_model.py, section 3 · torch.nn.attention.flex_attention, BlockMask.from_kv_blocks
"""
from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

mamba = importlib.import_module("02_mamba")
BLOCK = 128     # flex_attention's default: tokens a side


def attention_mask(doc_bs: Tensor, t: int) -> BlockMask:
    """Who sees whom for the last t of s tokens, as 04_model.attention_mask says it, in blocks."""
    s, device = doc_bs.shape[1], doc_bs.device
    segment_bs, real_bs = mamba.segments(doc_bs).contiguous(), doc_bs >= 0
    first_bs = torch.searchsorted(segment_bs, segment_bs)      # where each token's document begins

    def sees(row, head, query, key):
        query = query + (s - t)
        same = (segment_bs[row, query] == segment_bs[row, key]) & real_bs[row, key]
        return (same & (query >= key)) | (query == key)

    begin_i = torch.arange(s - t, s, BLOCK, device=device)
    from_bi = first_bs[:, begin_i] // BLOCK
    to_i = (begin_i + BLOCK - 1).clamp(max=s - 1) // BLOCK
    blocks = -(-s // BLOCK)
    index_bij = (from_bi[..., None] + torch.arange(blocks, device=device)).clamp(max=blocks - 1)
    count_bi = to_i - from_bi + 1
    return BlockMask.from_kv_blocks(count_bi[:, None].int(), index_bij[:, None].int(), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(t, s))


@functools.cache
def _compiled(): return torch.compile(flex_attention, dynamic=False)


def attend(q_bhtp: Tensor, k_bhsp: Tensor, v_bhsp: Tensor, mask: BlockMask) -> Tensor:
    """softmax(q kᵀ / sqrt(p)) v over what the mask shows; k and v may have fewer heads. -> [b, h, t, p]"""
    return _compiled()(q_bhtp, k_bhsp, v_bhsp, block_mask=mask, enable_gqa=True)
