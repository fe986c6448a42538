"""The routed experts of a LatentMoE layer: sort the rows by expert, two grouped products, one sum by token. Twin of 03_latentmoe.py, sections 2-4.

    y = sum over a token's chosen experts of  p · Down relu(Up x)²

The idea. Rows sorted by expert turn 512 small layers into one stretch of rows after another. A program computes one tile: some rows of one expert
times some columns of that expert's weights. Where the stretches end is known on the GPU only, so the grid has the largest number of tiles that any
routing could need, a small table (`_Routing.plan`) says what each tile is, and the programs left over return at once. No capacity, no padding rows,
no wait for the GPU; an expert with every token, or with none, is only another table.

The tiling of a grouped product, here with 2, 0 and 1 row tiles in experts 0, 1 and 2; numbers are program ids:

              x (rows sorted by expert)        weights of the row's expert, columns
                                                  block 0   block 1   block 2
    expert 0  ┌──────────────┐ rows   0..191   →     0         2         4      rows fastest: programs 0 and 1 run side by side and
              │              │ rows 192..239   →     1         3         5      read the same weights, once from memory, then from L2
    expert 1  ├──────────────┤ no rows
    expert 2  ├──────────────┤ rows 240..415   →     6         7         8      a tile has 64, 128 or 128 + 64 rows, as many as are left
              └──────────────┘

    _rows_kernel    rows × weights of their expert: up (stores relu²), down, and in the backward pass dy · Down and du · Up, which read the same
                    weights along the other dimension. A tile of 192 rows is two products with one block of weights in shared memory: nearly every
                    expert's weights pass the L2 once. Rows come by descriptor, for which those of x and dy are written out in order first.
    _sum_kernel     y[r] = sum over k of p · out, in the order of the choices: fp32, one program a token, so two runs agree bit for bit.
    _weight_kernel  dW[e] = sum over the expert's rows of token · hidden: a short sum (176 rows) into a large matrix; zeros for an idle expert.

A tile of dW is two or three steps of products, too few to hide a load, so the loop runs over tiles instead. A program keeps a panel, all of an
expert's tokens times 128 of their columns, in shared memory, and moves along the hidden layer; the next tile's rows arrive while this one is
multiplied and the last one is stored. Those rows come through a descriptor that the program makes for its expert: it ends with the expert's rows,
so the hardware puts zeros where a neighbour's rows would be, and no thread spends instructions on addresses. In fp32, for experts with more than 256
rows, and for rows of no whole 16 bytes, which no descriptor can load, a loop over the expert's rows computes each tile; where most experts have that
many, a program computes one tile only, since few large experts would not occupy the GPU.

                  hidden f  →  tile 0   tile 1   tile 2  ...  one product each, no loop over rows
    panel: 176 tokens        ┌────────┬────────┬────────┐
    × 128 columns of l    →  │ stored │multiply│ loading│
                             └────────┴────────┴────────┘

Backward. With a = relu(Up x)², h = sqrt(a), dy = dL/dy, all of one row:
    da = Downᵀ dy      dp = a · da      du = 2 p h da      dx = Upᵀ du      dDown = sum of (p dy) aᵀ      dUp = sum of du xᵀ
Only a is kept, rounded once; h comes back as its root, with half of a's relative error, and is 0 exactly where the ReLU was closed.

What must move for 4096 tokens at Ultra's sizes (22 of 512 experts, l 2048, f 5120, bf16): 90,112 rows, 176 an expert.
    up      1.89 TFLOP    weights 10.7 GB, x from L2, a 0.92 GB written        down   the same work, a read, 0.37 GB written
    backward   4 × 1.89 TFLOP, weights read once more and dW written once
    gather  0.37 GB written, twice                                             sum    0.37 GB read
    Through the L2, in tiles of 192 × 256: weights 10.7 GB, rows n / 256 times 0.37 (up, da) or 0.92 GB; and dW, in tiles of 128 × 128: 15 GB
    of hidden rows and 10.7 GB written. 176 rows an expert are computed as 192, 8 % for nothing.
For 64 tokens (1,408 rows on about 480 experts) only the weights count: 20 GB, each matrix streamed once past a handful of rows.
Measured on an H200, 4096 tokens: up 3.59 ms (torch._grouped_mm 4.35; both slower under a power limit, 3.94 and 4.53), down 3.42, da 4.22, dx 3.41,
dW 5.5 and 6.0; forward 7.7, with backward 27.7. 64 tokens: forward 4.52 (the weights of all experts take 4.7 at 4.28 TB/s, but some are idle).
Tried: row tiles of at most 128, up 4.30, as weights pass the L2 twice (37 GB through it, 95 % of its throughput); dW with a loop over 3 blocks of
rows a tile, 6.7 and 6.0; the panel with pointers in place of descriptors, 6.1 and 6.2.

A decode step routes a few tokens: `route` without a gradient in two launches, where PyTorch takes some 20. The first computes scores, a few experts
and tokens a program, in fp32 by fused multiply-adds: 67 M of them for 32 tokens of Super, which is nothing, and no operand is cut into bf16 parts.
The second takes a token: a score that orders as an integer, with the expert's number below it, makes choosing one reduction a place; equal scores go
to the smaller number (torch.topk leaves that open). `relu2` is one launch in place of two.

Left to the stage: training in NVFP4 (`recipe`; its products have kernels of their own) and float64, in which tests compare algorithms. Where rows
leave between sorting and summing (NVFP4, expert parallelism), copy_to_experts and weighted_sum are those two ends with a backward of their own:
autograd's adds rows up with atomics. Preset gap trains in NVFP4 at 322,000 tokens/s in place of 294,000.
Sources: 03_latentmoe.py; Triton's tutorial on grouped products (one launch for many problems of unequal size); [LatentMoE] 2601.18089.
"""
from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.interpreter import dot, narrow
from kernels.packed import _experts_by_pair, _few_pairs

_UP, _PLAIN, _DA = 0, 1, 2      # what _rows_kernel does with a finished tile: store relu², store, or finish the hidden layer's gradient


def _tiles(kind: str, rows: float, n: int, k: int, itemsize: int) -> dict:
    """Block sizes and launch parameters of a product ("up", "down", "da", "dx", "wgrad") or a row kernel ("sum", "gather").
    rows: mean rows an expert; n, k: output columns and contraction; for "wgrad" the columns of tokens and hidden layer.

    half: a row tile has BLOCK_M / 2, BLOCK_M or, in two parts, 3/2 BLOCK_M rows. rows_tma: rows, like weights, come by descriptor, for which a gather
    is first written out. panel: a program of "wgrad" keeps up to 4 blocks of BLOCK_K rows; experts with more take a loop over rows.
    """
    small = lambda block, width: min(block, max(16, triton.next_power_of_2(width)))
    if kind in ("sum", "gather"): return dict(BLOCK=small(1024, n), num_warps=2)
    if kind == "wgrad":
        if itemsize == 4: block = (64, 64, 32, 4, 2)
        elif rows <= 224: block = (128, 128, 64, 8, 3)
        else: block = (128, 256, 64, 8, 3)                   # most experts have more rows than a panel holds
        return dict(BLOCK_L=small(block[0], n), BLOCK_F=small(block[1], k), BLOCK_K=block[2], num_warps=block[3], num_stages=block[4],
                    panel=itemsize < 4 and rows <= 224)
    if itemsize == 4: block = (32, 64, 32, 4, 2)             # fp32 multiplies without tensor cores
    elif rows <= 12: block = (16, 128, 128, 4, 3)            # decode: nothing but streaming weights
    elif rows <= 64: block = (64, 128, 64, 4, 4)
    elif kind == "down": block = (128, 256, 32, 8, 8)
    else: block = (128, 256, 64, 8, 3 if kind == "up" else 4)
    many = block[0] == 128
    return dict(BLOCK_M=block[0], BLOCK_N=small(block[1], n), BLOCK_K=small(block[2], k), num_warps=block[3], num_stages=block[4],
                half=many, rows_tma=many)


_FEW = 2048     # pairs of a decode step: each counts those before it, and one launch sorts them all, where PyTorch takes a dozen


@triton.jit
def _sort_kernel(experts_q, order_q, inverse_q, token_q, offsets_e, rows, experts, K: tl.constexpr, BLOCK: tl.constexpr, ALL: tl.constexpr):
    """A stable sort by counting: a pair's place is the number of pairs of smaller experts, and of its own before it. The last programs count what
    is not behind an expert's end."""
    j, pairs = tl.arange(0, ALL)[None, :], tl.cdiv(rows, BLOCK)
    other_1j = tl.load(experts_q + j, mask=j < rows, other=0x7FFFFFFF).to(tl.int32)
    if tl.program_id(0) < pairs:
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mine_i1 = tl.load(experts_q + i, mask=i < rows, other=0).to(tl.int32)[:, None]
        before_ij = (other_1j < mine_i1) | ((other_1j == mine_i1) & (j < i[:, None]))
        place_i = tl.sum(before_ij.to(tl.int32), axis=1)
        tl.store(order_q + place_i, i.to(tl.int64), mask=i < rows)
        tl.store(token_q + place_i, i // K, mask=i < rows)
        tl.store(inverse_q + i, place_i.to(tl.int64), mask=i < rows)
    else:
        e = (tl.program_id(0) - pairs) * BLOCK + tl.arange(0, BLOCK)
        tl.store(offsets_e + e, tl.sum((other_1j <= e[:, None]).to(tl.int32), axis=1), mask=e < experts)


@triton.jit
def _plan_kernel(offsets_e, plan_t5, experts, bound, HEIGHT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr):
    """_Routing.plan in one program; a line that no tile needs says that its expert has none."""
    e, t = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_T)
    end_e = tl.load(offsets_e + e, mask=e < experts, other=0)
    start_e = tl.load(offsets_e + e - 1, mask=(e > 0) & (e < experts), other=0)
    tiles_e = tl.where(e < experts, tl.cdiv(end_e - start_e, HEIGHT), 0)
    first_e = tl.cumsum(tiles_e, axis=0) - tiles_e
    for i in range(tl.max(tiles_e, axis=0)):
        line, mine = plan_t5 + (first_e + i) * 5, i < tiles_e
        tl.store(line, e, mask=mine)
        tl.store(line + 1, start_e, mask=mine)
        tl.store(line + 2, end_e, mask=mine)
        tl.store(line + 3, first_e, mask=mine)
        tl.store(line + 4, tiles_e, mask=mine)
    for field in tl.static_range(5): tl.store(plan_t5 + t * 5 + field, tl.zeros_like(t), mask=(t >= tl.sum(tiles_e, axis=0)) & (t < bound))


class _Routing:
    """Sorted rows: order_q (sorted place -> pair r·k + slot), inverse_q, token_q (sorted place -> r), offsets_e (where each expert's rows end), and
    tile tables by tile height."""
    def __init__(self, experts_rk: Tensor, experts: int):
        self.experts, self.k, self.rows, self.plans = experts, experts_rk.shape[1], experts_rk.numel(), {}
        if self.rows <= _FEW: return self.sort_few(experts_rk.contiguous())
        moe = importlib.import_module("03_latentmoe")
        self.order_q, self.inverse_q, self.offsets_e = moe.sort_by_expert(experts_rk, experts)
        self.token_q = torch.div(self.order_q, self.k, rounding_mode="floor").int()

    def sort_few(self, experts_rk: Tensor) -> None:
        make = lambda n, dtype: torch.empty(n, dtype=dtype, device=experts_rk.device)
        self.order_q, self.inverse_q = make(self.rows, torch.int64), make(self.rows, torch.int64)
        self.token_q, self.offsets_e = make(self.rows, torch.int32), make(self.experts, torch.int32)
        _sort_kernel[(triton.cdiv(self.rows, 16) + triton.cdiv(self.experts, 16),)](
            experts_rk, self.order_q, self.inverse_q, self.token_q, self.offsets_e, self.rows, self.experts, K=self.k, BLOCK=16,
            ALL=max(16, triton.next_power_of_2(self.rows)), num_warps=8 if self.rows > 256 else 4)

    def plan(self, height: int) -> Tensor:
        """int32 [t, 5], one line a row tile: expert, its first row, its end, its first tile, its number of tiles."""
        # the bound: every expert with rows starts one tile, and each full `height` of rows fills at most one more
        bound = min(self.experts, self.rows) + self.rows // height
        if height not in self.plans and self.rows <= _FEW:
            plan_t5 = self.plans[height] = torch.empty(bound, 5, dtype=torch.int32, device=self.offsets_e.device)
            if bound: _plan_kernel[(1,)](self.offsets_e, plan_t5, self.experts, bound, HEIGHT=height, BLOCK_E=triton.next_power_of_2(self.experts),
                                         BLOCK_T=triton.next_power_of_2(bound), num_warps=4)
        elif height not in self.plans:
            starts_e = F.pad(self.offsets_e[:-1], (1, 0))
            tiles_e = (self.offsets_e - starts_e + height - 1) // height
            last_e = tiles_e.cumsum(0, dtype=torch.int32)
            tile_t = torch.arange(bound, device=last_e.device, dtype=torch.int32)
            expert_t = torch.searchsorted(last_e, tile_t, right=True).clamp_(max=self.experts - 1)
            expert_e = torch.arange(self.experts, device=last_e.device, dtype=torch.int32)
            table_e5 = torch.stack((expert_e, starts_e, self.offsets_e, last_e - tiles_e, tiles_e), dim=1).int()
            self.plans[height] = table_e5.index_select(0, expert_t)
        return self.plans[height]


@triton.jit
def _hidden_gradient(da_mn, p_m, du_qn, a_qn, dp_q, rows_m, own_m, end, block, N, BLOCK_N: tl.constexpr):
    """du = 2 p h da with h the root of a, and these columns' part of dp = a · da."""
    columns_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    at_mn = own_m[:, None].to(tl.int64) * N + columns_n[None, :]
    kept_mn = (rows_m[:, None] < end) & (columns_n[None, :] < N)
    a_mn = tl.load(a_qn + at_mn, mask=kept_mn, other=0.0).to(tl.float32)
    # every column block leaves its own part: adding them with atomics would round in another order in every run
    tl.store(dp_q + own_m, tl.sum(a_mn * da_mn, axis=1), mask=rows_m < end)
    tl.store(du_qn + at_mn, narrow(2.0 * p_m[:, None] * tl.sqrt(a_mn) * da_mn, du_qn.dtype.element_ty), mask=kept_mn)


@triton.jit
def _row_starts(a, token_q, row, end, stride_a, GATHER: tl.constexpr, HEIGHT: tl.constexpr):
    """[HEIGHT, 1]: where the rows from `row` on start. Surplus rows repeat the last one: they load what is in the cache anyway."""
    source_m = tl.minimum(row + tl.arange(0, HEIGHT), end - 1)
    if GATHER: source_m = tl.load(token_q + source_m)
    return a + source_m[:, None].to(tl.int64) * stride_a


@triton.jit
def _load_rows(a, a_m1, row, start, K: tl.constexpr, ROWS_TMA: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """[HEIGHT, BLOCK_K]: a step's columns of the rows."""
    at_k = start + tl.arange(0, BLOCK_K)
    if ROWS_TMA: a_mk = a.load([row, start])
    elif EVEN: a_mk = tl.load(a_m1 + at_k[None, :])
    else: a_mk = tl.load(a_m1 + at_k[None, :], mask=at_k[None, :] < K, other=0.0)
    return a_mk


@triton.jit
def _finish(acc_mn, out, a_qn, dp_bq, weights_q, order_q, row, end, block, N, rows, EPILOGUE: tl.constexpr, HEIGHT: tl.constexpr,
            BLOCK_N: tl.constexpr):
    """What follows the product, and the store of those rows that are the expert's."""
    rows_m, columns_n = row + tl.arange(0, HEIGHT), block * BLOCK_N + tl.arange(0, BLOCK_N)
    own_m = tl.minimum(rows_m, end - 1)
    if EPILOGUE == 2:
        # a tile of da beside its tile of a needs more registers than a thread has: one half of the columns after the other
        p_m = tl.load(weights_q + tl.load(order_q + own_m)).to(tl.float32)
        left_mn, right_mn = tl.split(tl.permute(tl.reshape(acc_mn, (HEIGHT, 2, BLOCK_N // 2)), (0, 2, 1)))
        _hidden_gradient(left_mn, p_m, out, a_qn, dp_bq + (2 * block).to(tl.int64) * rows, rows_m, own_m, end, 2 * block, N, BLOCK_N // 2)
        _hidden_gradient(right_mn, p_m, out, a_qn, dp_bq + (2 * block + 1).to(tl.int64) * rows, rows_m, own_m, end, 2 * block + 1, N, BLOCK_N // 2)
    else:
        if EPILOGUE == 0:
            # PITFALL: tl.maximum(nan, 0) is 0, and a spoilt token would look healthy
            acc_mn = tl.where(acc_mn < 0.0, 0.0, acc_mn)
            acc_mn *= acc_mn
        kept_mn = (rows_m[:, None] < end) & (columns_n[None, :] < N)
        tl.store(out + own_m[:, None].to(tl.int64) * N + columns_n[None, :], narrow(acc_mn, out.dtype.element_ty), mask=kept_mn)


@triton.jit
def _row_tile(a, a_half, w, out, a_qn, dp_bq, weights_q, order_q, token_q, expert, row, end, block, N, rows, stride_a, K: tl.constexpr,
              GATHER: tl.constexpr, ACROSS: tl.constexpr, TMA: tl.constexpr, ROWS_TMA: tl.constexpr, EVEN: tl.constexpr, EPILOGUE: tl.constexpr,
              BLOCK_M: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """One tile of one expert: FIRST + SECOND rows from `row` on (those below `end` count) times BLOCK_N columns, and what follows the product.
    Two parts, because a block has a power of two of rows and 192 is none; both multiply the one block of weights that is in shared memory."""
    columns_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    first_weight = expert.to(tl.int64) * N * K      # a stack of experts has more than 2^31 elements
    # a descriptor loads blocks of one height, so there are two of them
    if FIRST == BLOCK_M: top = a
    else: top = a_half
    top_m1, bottom_m1 = top, a_half
    if not ROWS_TMA:
        top_m1 = _row_starts(a, token_q, row, end, stride_a, GATHER, FIRST)
        if SECOND: bottom_m1 = _row_starts(a, token_q, row + FIRST, end, stride_a, GATHER, SECOND)

    acc_mn = tl.zeros((FIRST, BLOCK_N), tl.float32)
    if SECOND: more_mn = tl.zeros((SECOND, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        at_k = start + tl.arange(0, BLOCK_K)
        a_mk = _load_rows(top, top_m1, row, start, K, ROWS_TMA, EVEN, BLOCK_K)
        if ACROSS:      # weights lie [k, n]
            if TMA: w_kn = w.load([expert * K + start, block * BLOCK_N])
            else: w_kn = tl.load(w + first_weight + at_k[:, None] * N + columns_n[None, :],
                                 mask=(at_k[:, None] < K) & (columns_n[None, :] < N), other=0.0)
        else:           # weights lie [n, k]
            if TMA: w_nk = w.load([expert * N + block * BLOCK_N, start])
            else: w_nk = tl.load(w + first_weight + columns_n[:, None] * K + at_k[None, :],
                                 mask=(columns_n[:, None] < N) & (at_k[None, :] < K), other=0.0)
            w_kn = w_nk.T
        acc_mn = dot(a_mk, w_kn, acc_mn)
        if SECOND:
            more_mn = dot(_load_rows(a_half, bottom_m1, row + FIRST, start, K, ROWS_TMA, EVEN, BLOCK_K), w_kn, more_mn)

    # the smaller part first: it frees its registers for what the larger one needs beside its sums
    if SECOND: _finish(more_mn, out, a_qn, dp_bq, weights_q, order_q, row + FIRST, end, block, N, rows, EPILOGUE, SECOND, BLOCK_N)
    _finish(acc_mn, out, a_qn, dp_bq, weights_q, order_q, row, end, block, N, rows, EPILOGUE, FIRST, BLOCK_N)


@triton.jit(do_not_specialize=["rows"])
def _rows_kernel(a, a_half, w, out, a_qn, dp_bq, weights_q, order_q, token_q, plan_t5, N, rows, stride_a, K: tl.constexpr, GATHER: tl.constexpr,
                 ACROSS: tl.constexpr, TMA: tl.constexpr, ROWS_TMA: tl.constexpr, EVEN: tl.constexpr, EPILOGUE: tl.constexpr, HALF: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out[q, n] = row q of a (or of the token it belongs to) times the weights of q's expert."""
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    # an expert's programs are as many as its tiles times `blocks`, so pid // blocks is one of its tiles, though not always the program's own
    plan = plan_t5 + (pid // blocks) * 5
    expert, start, end, first_tile, tiles = tl.load(plan), tl.load(plan + 1), tl.load(plan + 2), tl.load(plan + 3), tl.load(plan + 4)
    local = pid - first_tile * blocks
    if local >= tiles * blocks: return       # the bound on tiles is rarely met
    HEIGHT: tl.constexpr = BLOCK_M + BLOCK_M // 2 if HALF else BLOCK_M
    row, block = start + (local % tiles) * HEIGHT, local // tiles

    if HALF and end - row <= BLOCK_M // 2:
        _row_tile(a, a_half, w, out, a_qn, dp_bq, weights_q, order_q, token_q, expert, row, end, block, N, rows, stride_a, K, GATHER, ACROSS, TMA,
                  ROWS_TMA, EVEN, EPILOGUE, BLOCK_M, BLOCK_M // 2, 0, BLOCK_N, BLOCK_K)
    elif not HALF or end - row <= BLOCK_M:
        _row_tile(a, a_half, w, out, a_qn, dp_bq, weights_q, order_q, token_q, expert, row, end, block, N, rows, stride_a, K, GATHER, ACROSS, TMA,
                  ROWS_TMA, EVEN, EPILOGUE, BLOCK_M, BLOCK_M, 0, BLOCK_N, BLOCK_K)
    else:
        _row_tile(a, a_half, w, out, a_qn, dp_bq, weights_q, order_q, token_q, expert, row, end, block, N, rows, stride_a, K, GATHER, ACROSS, TMA,
                  ROWS_TMA, EVEN, EPILOGUE, BLOCK_M, BLOCK_M, BLOCK_M // 2, BLOCK_N, BLOCK_K)


@triton.jit
def _sum_kernel(rows_ql, inverse_q, weights_q, out_rl, L, WEIGHTED: tl.constexpr, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    """out[r] = sum over a token's choices of weight · row, in fp32 and in the order of the choices."""
    r, at_l = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total_l = tl.zeros((BLOCK,), tl.float32)
    for slot in range(CHOSEN):
        place = tl.load(inverse_q + r * CHOSEN + slot)
        row_l = tl.load(rows_ql + place * L + at_l, mask=at_l < L, other=0.0).to(tl.float32)
        if WEIGHTED: row_l *= tl.load(weights_q + r * CHOSEN + slot).to(tl.float32)
        total_l += row_l
    tl.store(out_rl + r * L + at_l, narrow(total_l, out_rl.dtype.element_ty), mask=at_l < L)


@triton.jit
def _gather_kernel(x_rl, token_q, out_ql, L, stride_x, BLOCK: tl.constexpr):
    """out[q] = x's row of the token at sorted place q."""
    q, at_l = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ql + q * L + at_l, tl.load(x_rl + tl.load(token_q + q).to(tl.int64) * stride_x + at_l, mask=at_l < L), mask=at_l < L)


@triton.jit
def _spread_kernel(rows_ql, dy_rl, order_q, weights_q, drows_ql, dweights_q, L, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    """Backward of the weighted sum, one sorted row a program: drow = weight · dy of its token, dweight = row · dy, at the pair's own place."""
    q = tl.program_id(0).to(tl.int64)
    pair = tl.load(order_q + q)
    weight, dweight = tl.load(weights_q + pair).to(tl.float32), 0.0
    for start in range(0, L, BLOCK):
        at_l = start + tl.arange(0, BLOCK)
        dy_l = tl.load(dy_rl + pair // CHOSEN * L + at_l, mask=at_l < L, other=0.0).to(tl.float32)
        dweight += tl.sum(tl.load(rows_ql + q * L + at_l, mask=at_l < L, other=0.0).to(tl.float32) * dy_l)
        tl.store(drows_ql + q * L + at_l, narrow(weight * dy_l, drows_ql.dtype.element_ty), mask=at_l < L)
    tl.store(dweights_q + pair, dweight)


@triton.jit
def _token_block(tokens_rl, token_q, order_q, weights_q, at_l, row, end, L, stride_tokens, WEIGHTED: tl.constexpr, DEPTH: tl.constexpr):
    """[DEPTH, BLOCK_L]: the tokens of the rows from `row` on, times their weights; zeros past the expert's end."""
    at_k = row + tl.arange(0, DEPTH)
    own_k = at_k < end
    token_k = tl.load(token_q + at_k, mask=own_k, other=0).to(tl.int64)
    rows_kl = tl.load(tokens_rl + (token_k * stride_tokens)[:, None] + at_l[None, :], mask=own_k[:, None] & (at_l[None, :] < L), other=0.0)
    if WEIGHTED:
        p_k = tl.load(weights_q + tl.load(order_q + at_k, mask=own_k, other=0), mask=own_k, other=0.0).to(tl.float32)
        rows_kl = narrow(rows_kl.to(tl.float32) * p_k[:, None], rows_kl.dtype)
    return rows_kl


@triton.jit
def _product(tokens_kl, hidden_kf, acc, TOKENS_FIRST: tl.constexpr):
    """acc + tokensᵀ · hidden, [l, f], or its transpose."""
    if TOKENS_FIRST: acc = dot(tokens_kl.T, hidden_kf, acc)
    else: acc = dot(hidden_kf.T, tokens_kl, acc)
    return acc


@triton.jit
def _store_tile(acc, out, expert, l, f, L, F, TOKENS_FIRST: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One tile of an expert's gradient, [l, f] or [f, l]."""
    m, n, M, N = (l, f, L, F) if TOKENS_FIRST else (f, l, F, L)
    if TMA: out.store([expert * M + m, n], narrow(acc, out.dtype))
    else:
        at_m, at_n = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        at_mn = expert.to(tl.int64) * M * N + at_m[:, None].to(tl.int64) * N + at_n[None, :]
        tl.store(out + at_mn, narrow(acc, out.dtype.element_ty), mask=(at_m[:, None] < M) & (at_n[None, :] < N))


@triton.jit
def _weight_panel(tokens_rl, hidden_qf, token_q, order_q, weights_q, out, expert, l, start, end, stride_tokens, L: tl.constexpr,
                  F: tl.constexpr, WEIGHTED: tl.constexpr, TOKENS_FIRST: tl.constexpr, TMA: tl.constexpr, BLOCK_L: tl.constexpr,
                  BLOCK_F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
                  STAGES: tl.constexpr):
    """BLOCK_L tokens' columns against all of the hidden layer's, for an expert with at most FIRST + SECOND rows, and at least one."""
    at_l = l + tl.arange(0, BLOCK_L)
    tokens_kl = _token_block(tokens_rl, token_q, order_q, weights_q, at_l, start, end, L, stride_tokens, WEIGHTED, FIRST)
    # PITFALL: the descriptor must end where the expert ends. A neighbour's row would meet zeros of the panel, but 0 · inf is NaN
    hidden = tl.make_tensor_descriptor(hidden_qf, [end, F], [F, 1], [FIRST, BLOCK_F])
    if SECOND:
        more_tokens_kl = _token_block(tokens_rl, token_q, order_q, weights_q, at_l, start + FIRST, end, L, stride_tokens, WEIGHTED, SECOND)
        more_hidden = tl.make_tensor_descriptor(hidden_qf, [end, F], [F, 1], [SECOND, BLOCK_F])
    for f in tl.range(0, F, BLOCK_F, num_stages=STAGES):
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = _product(tokens_kl, hidden.load([start, f]), acc, TOKENS_FIRST)
        if SECOND: acc = _product(more_tokens_kl, more_hidden.load([start + FIRST, f]), acc, TOKENS_FIRST)
        _store_tile(acc, out, expert, l, f, L, F, TOKENS_FIRST, TMA, BLOCK_M, BLOCK_N)


@triton.jit
def _weight_kernel(tokens_rl, hidden_qf, token_q, order_q, weights_q, offsets_e, out, stride_tokens, L: tl.constexpr, F: tl.constexpr,
                   WEIGHTED: tl.constexpr, TOKENS_FIRST: tl.constexpr, TMA: tl.constexpr, PANEL: tl.constexpr, BLOCK_L: tl.constexpr,
                   BLOCK_F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):
    """out[e, l, f] (TOKENS_FIRST) or out[e, f, l] = sum over the rows q of expert e of tokens[q's token, l] · hidden[q, f]."""
    # with panels a program goes along the whole hidden layer, without them it computes one tile
    blocks, parts, pid = tl.cdiv(L, BLOCK_L), 1 if PANEL else tl.cdiv(F, BLOCK_F), tl.program_id(0)
    expert, l, part = pid // (blocks * parts), pid // parts % blocks * BLOCK_L, pid % parts * BLOCK_F
    start, end = tl.load(offsets_e + expert - 1, mask=expert > 0, other=0), tl.load(offsets_e + expert)
    count = end - start
    if PANEL and (count > 0) & (count <= BLOCK_K):
        _weight_panel(tokens_rl, hidden_qf, token_q, order_q, weights_q, out, expert, l, start, end, stride_tokens, L, F, WEIGHTED, TOKENS_FIRST,
                      TMA, BLOCK_L, BLOCK_F, BLOCK_M, BLOCK_N, BLOCK_K, 0, STAGES)
    elif PANEL and (count > 0) & (count <= 2 * BLOCK_K):
        _weight_panel(tokens_rl, hidden_qf, token_q, order_q, weights_q, out, expert, l, start, end, stride_tokens, L, F, WEIGHTED, TOKENS_FIRST,
                      TMA, BLOCK_L, BLOCK_F, BLOCK_M, BLOCK_N, 2 * BLOCK_K, 0, STAGES)
    elif PANEL and (count > 0) & (count <= 3 * BLOCK_K):
        _weight_panel(tokens_rl, hidden_qf, token_q, order_q, weights_q, out, expert, l, start, end, stride_tokens, L, F, WEIGHTED, TOKENS_FIRST,
                      TMA, BLOCK_L, BLOCK_F, BLOCK_M, BLOCK_N, 2 * BLOCK_K, BLOCK_K, STAGES)
    elif PANEL and (count > 0) & (count <= 4 * BLOCK_K):
        _weight_panel(tokens_rl, hidden_qf, token_q, order_q, weights_q, out, expert, l, start, end, stride_tokens, L, F, WEIGHTED, TOKENS_FIRST,
                      TMA, BLOCK_L, BLOCK_F, BLOCK_M, BLOCK_N, 2 * BLOCK_K, 2 * BLOCK_K, STAGES - 1)
    else:      # no rows, or more than a panel holds: block by block, for every tile anew
        at_l = l + tl.arange(0, BLOCK_L)
        for f in range(part, F if PANEL else part + 1, BLOCK_F):
            at_f = f + tl.arange(0, BLOCK_F)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for row in range(start, end, BLOCK_K):
                at_k = row + tl.arange(0, BLOCK_K)
                tokens_kl = _token_block(tokens_rl, token_q, order_q, weights_q, at_l, row, end, L, stride_tokens, WEIGHTED, BLOCK_K)
                hidden_kf = tl.load(hidden_qf + at_k[:, None].to(tl.int64) * F + at_f[None, :], mask=(at_k[:, None] < end) & (at_f[None, :] < F),
                                    other=0.0)
                acc = _product(tokens_kl, hidden_kf, acc, TOKENS_FIRST)
            _store_tile(acc, out, expert, l, f, L, F, TOKENS_FIRST, TMA, BLOCK_M, BLOCK_N)


def _descriptor(x: Tensor, rows: int, columns: int, wanted: bool = True) -> TensorDescriptor | None:
    """x, flattened to a matrix, as a tensor descriptor with blocks of [rows, columns]; None where the hardware cannot: it copies whole 16 bytes."""
    flat = x.view(-1, x.shape[-1])
    if not wanted or flat.shape[0] == 0 or flat.data_ptr() % 16 or flat.shape[1] * flat.element_size() % 16: return None
    return TensorDescriptor.from_tensor(flat, [rows, columns])


def _blocks_end_with_the_expert(m: int, height: int) -> bool:
    """Whether blocks of `height` rows fill an expert's m rows of a stack. A descriptor sees one long matrix: a block that reaches past the expert's
    last row would overwrite the next expert's gradient."""
    return m % height == 0


def _rows_product(kind: str, a: Tensor, w: Tensor, routing: _Routing, out_dtype: torch.dtype, across: bool = False, gather: bool = False,
                  square_qn: Tensor | None = None, weights_rk: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(out_qn, dp_q): rows times their expert's weights, w [e, n, k], or with `across` [e, k, n]. gather: a holds tokens, not sorted rows.
    dp_q only for "da", which also needs square_qn, the hidden layer's relu², and the routing weights."""
    n, k = (w.shape[2], w.shape[1]) if across else (w.shape[1], w.shape[2])
    out_qn = a.new_empty(routing.rows, n, dtype=out_dtype)
    t = _tiles(kind, routing.rows / routing.experts, n, k, a.element_size())
    height, width, depth = t["BLOCK_M"], t["BLOCK_N"], t["BLOCK_K"]
    blocks = triton.cdiv(n, width)
    dp_bq = a.new_empty(2 * blocks, routing.rows, dtype=torch.float32) if kind == "da" else None
    if not routing.rows: return out_qn, None if dp_bq is None else dp_bq.sum(0)

    a = a if a.stride(1) == 1 else a.contiguous()
    if t["rows_tma"] and k * a.element_size() % 16 == 0:
        if gather: a = _gathered_rows(a, routing)
        gather, a = False, a.contiguous()
    full = None if gather else _descriptor(a, height, depth, t["rows_tma"])
    half = None if full is None else _descriptor(a, height // 2, depth)
    # PITFALL: across, a block that reaches past the contraction reads the next expert's weights, where the descriptor sees no edge. They meet zeros
    # of a, which do not help against an infinity: such shapes take masked loads
    moved = _descriptor(w, depth if across else width, width if across else depth, not (across and k % depth))

    plan_t5 = routing.plan(height + height // 2 if t["half"] else height)
    epilogue = {"up": _UP, "da": _DA}.get(kind, _PLAIN)
    _rows_kernel[(len(plan_t5) * blocks,)](
        a if full is None else full, a if full is None else half, w if moved is None else moved, out_qn, square_qn, dp_bq, weights_rk,
        routing.order_q, routing.token_q, plan_t5, n, routing.rows, a.stride(0), K=k, GATHER=gather, ACROSS=across, TMA=moved is not None,
        ROWS_TMA=full is not None, EVEN=k % depth == 0, EPILOGUE=epilogue, HALF=t["half"], BLOCK_M=height, BLOCK_N=width,
        BLOCK_K=depth, num_warps=t["num_warps"], num_stages=t["num_stages"])
    return out_qn, None if dp_bq is None else dp_bq.sum(0)


def _sum_by_token(rows_ql: Tensor, routing: _Routing | _Order, weights_rk: Tensor | None = None) -> Tensor:
    """[r, l]: the sum of a token's k rows, each times its weight when weights are given."""
    r, l = routing.rows // routing.k, rows_ql.shape[1]
    t, out_rl = _tiles("sum", r, l, 0, rows_ql.element_size()), rows_ql.new_empty(r, l)
    if r: _sum_kernel[(r, triton.cdiv(l, t["BLOCK"]))](rows_ql, routing.inverse_q, weights_rk, out_rl, l, weights_rk is not None, routing.k, **t)
    return out_rl


def _gathered_rows(x_rl: Tensor, routing: _Routing | _Order) -> Tensor:
    """[q, l]: every routed row's copy of its token."""
    l = x_rl.shape[1]
    t, out_ql = _tiles("gather", 1, l, 0, x_rl.element_size()), x_rl.new_empty(routing.rows, l)
    if routing.rows: _gather_kernel[(routing.rows, triton.cdiv(l, t["BLOCK"]))](x_rl, routing.token_q, out_ql, l, x_rl.stride(0), **t)
    return out_ql


def _weight_gradient(tokens_rl: Tensor, hidden_qf: Tensor, routing: _Routing, weights_rk: Tensor | None = None, tokens_first: bool = False) -> Tensor:
    """[e, f, l], or with tokens_first [e, l, f]: by expert, the sum over its rows of hidden's row times its token's row (times its weight)."""
    l, f, experts = tokens_rl.shape[1], hidden_qf.shape[1], routing.experts
    m, n = (l, f) if tokens_first else (f, l)
    t = _tiles("wgrad", routing.rows / experts, l, f, hidden_qf.element_size())
    height, width = (t["BLOCK_L"], t["BLOCK_F"]) if tokens_first else (t["BLOCK_F"], t["BLOCK_L"])
    out_emn = hidden_qf.new_empty(experts, m, n)
    moved = _descriptor(out_emn, height, width, _blocks_end_with_the_expert(m, height))
    # the panel's descriptors are made on the GPU: they need rows of whole 16 bytes, and memory to lie in
    panel = t["panel"] and hidden_qf.data_ptr() % 16 == 0 and f * hidden_qf.element_size() % 16 == 0
    # NOTE: this replaces an allocator that a program with kernels of its own has set
    if panel: triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=hidden_qf.device))
    tokens_rl = tokens_rl if tokens_rl.stride(1) == 1 else tokens_rl.contiguous()
    tiles = triton.cdiv(l, t["BLOCK_L"]) * (1 if panel else triton.cdiv(f, t["BLOCK_F"]))
    _weight_kernel[(experts * tiles,)](
        tokens_rl, hidden_qf, routing.token_q, routing.order_q, weights_rk, routing.offsets_e, out_emn if moved is None else moved,
        tokens_rl.stride(0), L=l, F=f, WEIGHTED=weights_rk is not None, TOKENS_FIRST=tokens_first, TMA=moved is not None, PANEL=panel,
        BLOCK_L=t["BLOCK_L"], BLOCK_F=t["BLOCK_F"], BLOCK_M=height, BLOCK_N=width, BLOCK_K=t["BLOCK_K"], STAGES=t["num_stages"],
        num_warps=t["num_warps"], num_stages=t["num_stages"])
    return out_emn


class _Order(NamedTuple):
    """What the row kernels need of a _Routing, of rows that others have sorted."""
    token_q: Tensor
    inverse_q: Tensor
    rows: int
    k: int


class _Copies(torch.autograd.Function):
    """x_ql from x_rl."""
    @staticmethod
    def forward(ctx, x_rl, order):
        ctx.order = order
        return _gathered_rows(x_rl if x_rl.stride(1) == 1 else x_rl.contiguous(), order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_ql): return _sum_by_token(dy_ql.contiguous(), ctx.order), None


class _Weighted(torch.autograd.Function):
    """y_rl from rows_ql and weights_rk."""
    @staticmethod
    def forward(ctx, rows_ql, weights_rk, order_q, order):
        ctx.save_for_backward(rows_ql, weights_rk, order_q)
        return _sum_by_token(rows_ql, order, weights_rk)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_rl):
        rows_ql, weights_rk, order_q = ctx.saved_tensors
        drows_ql, dweights_rk, (q, l) = torch.empty_like(rows_ql), torch.empty_like(weights_rk, dtype=torch.float32), rows_ql.shape
        t = _tiles("sum", q, l, 0, rows_ql.element_size())
        if q: _spread_kernel[(q,)](rows_ql, dy_rl.contiguous(), order_q, weights_rk, drows_ql, dweights_rk, l, weights_rk.shape[1], **t)
        return drows_ql, dweights_rk.to(weights_rk.dtype), None, None


def copy_to_experts(x_rl: Tensor, k: int, order_q: Tensor, inverse_q: Tensor) -> Tensor:
    """[q, l]: k copies of every token, sorted by expert. The gradient sums a token's copies in fp32; float64 stays with the stage."""
    moe = importlib.import_module("03_latentmoe")
    if x_rl.dtype == torch.float64: return moe.copy_to_experts(x_rl, k, order_q, inverse_q, impl="torch")
    return _Copies.apply(x_rl, _Order(torch.div(order_q, k, rounding_mode="floor").int(), inverse_q, len(order_q), k))


def weighted_sum(out_ql: Tensor, order_q: Tensor, inverse_q: Tensor, weights_rk: Tensor) -> Tensor:
    """[r, l]: the k rows of a token brought together again, each times its weight, summed in fp32; float64 stays with the stage."""
    moe = importlib.import_module("03_latentmoe")
    if out_ql.dtype == torch.float64: return moe.weighted_sum(out_ql, order_q, inverse_q, weights_rk, impl="torch")
    return _Weighted.apply(out_ql.contiguous(), weights_rk.contiguous(), order_q, _Order(None, inverse_q, len(order_q), weights_rk.shape[1]))


class _Experts(torch.autograd.Function):
    """y_rl from x_rl, weights_rk, up_efl, down_elf (x and both stacks in one dtype) and the routing."""
    @staticmethod
    def forward(ctx, x_rl, weights_rk, up_efl, down_elf, routing):
        square_qf, _ = _rows_product("up", x_rl, up_efl, routing, x_rl.dtype, gather=True)
        out_ql, _ = _rows_product("down", square_qf, down_elf, routing, x_rl.dtype)
        ctx.routing = routing
        if any(ctx.needs_input_grad): ctx.save_for_backward(x_rl, weights_rk, up_efl, down_elf, square_qf)
        return _sum_by_token(out_ql, routing, weights_rk)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_rl):
        (x_rl, weights_rk, up_efl, down_elf, square_qf), routing = ctx.saved_tensors, ctx.routing
        needs_x, needs_weights, needs_up, needs_down, _ = ctx.needs_input_grad
        dy_rl, dx_rl, dweights_rk, dup_efl, ddown_elf = dy_rl.contiguous(), None, None, None, None
        if needs_down: ddown_elf = _weight_gradient(dy_rl, square_qf, routing, weights_rk, tokens_first=True)
        if needs_x or needs_weights or needs_up:
            du_qf, dp_q = _rows_product("da", dy_rl, down_elf, routing, x_rl.dtype, across=True, gather=True, square_qn=square_qf,
                                        weights_rk=weights_rk)
            if needs_weights: dweights_rk = dp_q.index_select(0, routing.inverse_q).view_as(weights_rk).to(weights_rk.dtype)
            if needs_up: dup_efl = _weight_gradient(x_rl, du_qf, routing)
            if needs_x: dx_rl = _sum_by_token(_rows_product("dx", du_qf, up_efl, routing, x_rl.dtype, across=True)[0], routing)
        return dx_rl, dweights_rk, dup_efl, ddown_elf, None


def _serve(x_rl: Tensor, weights_rk: Tensor, experts_rk: Tensor, up_efl, down_elf, dtype: torch.dtype) -> Tensor:
    """Experts held in 4 bits (NVFP4Tensor): pair by pair for a decode step, else the same steps around products that decode the weights while they
    load them. No gradient."""
    nvfp4, moe = importlib.import_module("01_nvfp4"), importlib.import_module("03_latentmoe")
    if torch.is_grad_enabled() and (x_rl.requires_grad or weights_rk.requires_grad):
        raise ValueError("experts in 4 bits serve and do not train: call them under torch.no_grad(), or give the weights in bf16")
    if dtype != torch.float64 and _few_pairs(experts_rk.numel(), up_efl, down_elf):
        return _experts_by_pair(x_rl.to(dtype), weights_rk, experts_rk, up_efl, down_elf)
    routing = _Routing(experts_rk, up_efl.shape[0])
    x_ql = x_rl.to(dtype).index_select(0, routing.token_q)
    out_ql = nvfp4.matmul_w4a16(moe.relu2(nvfp4.matmul_w4a16(x_ql, up_efl, routing.offsets_e)), down_elf, routing.offsets_e)
    return _sum_by_token(out_ql.contiguous(), routing, weights_rk.contiguous())


def experts_grouped(x_rl: Tensor, weights_rk: Tensor, experts_rk: Tensor, up_efl, down_elf, recipe=None, seed: int = 0) -> Tensor:
    """y_rl, the weighted sum of each token's experts, in x's dtype (autocast's when it is on). up_efl, down_elf: tensors, or both NVFP4Tensor.

    bf16 and fp16 run on tensor cores; fp32 is multiplied as fp32; everything is summed in fp32. Two calls give the same bits.
    With a recipe, or in float64, the stage's experts_sorted computes.
    """
    nvfp4, moe = importlib.import_module("01_nvfp4"), importlib.import_module("03_latentmoe")
    (e, f, l), (r, k) = up_efl.shape, experts_rk.shape
    if x_rl.shape != (r, l) or weights_rk.shape != (r, k) or down_elf.shape != (e, l, f):
        raise ValueError(f"experts of up {tuple(up_efl.shape)} and down {tuple(down_elf.shape)} cannot serve rows {tuple(x_rl.shape)} with choices "
                         f"{tuple(experts_rk.shape)}: they must be [e, f, l], [e, l, f], [r, l] and [r, k]")
    if isinstance(up_efl, Tensor) != isinstance(down_elf, Tensor):
        raise ValueError("one stack of experts is in 4 bits and the other is not: quantize both or neither")
    # the device "meta", on which kernels are compiled for an absent GPU, knows no autocast
    dtype = x_rl.dtype if x_rl.is_meta else nvfp4.output_dtype(x_rl)
    if not isinstance(up_efl, Tensor): return _serve(x_rl, weights_rk, experts_rk, up_efl, down_elf, dtype)
    if recipe is not None: return moe.experts_sorted(x_rl, weights_rk, experts_rk, up_efl, down_elf, recipe, seed)
    x_rl, up_efl, down_elf = x_rl.to(dtype), up_efl.to(dtype).contiguous(), down_elf.to(dtype).contiguous()
    if dtype == torch.float64: return moe.experts_sorted(x_rl, weights_rk, experts_rk, up_efl, down_elf)
    return _Experts.apply(x_rl, weights_rk.contiguous(), up_efl, down_elf, _Routing(experts_rk, e))


# --- a decode step

@triton.jit
def _scores_kernel(x, weight, scores, rows, stride_x, E: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
                   BLOCK_D: tl.constexpr):
    """sigmoid(x · weightᵀ); the sum over d is kept open in registers until the end."""
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None, None]
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :, None]
    acc_red = tl.zeros((BLOCK_R, BLOCK_E, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, None, :]
        x_r1d = tl.load(x + r * stride_x + d, mask=(r < rows) & (d < D), other=0).to(tl.float32)
        acc_red += x_r1d * tl.load(weight + e * D + d, mask=(e < E) & (d < D), other=0).to(tl.float32)
    r, e = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None], tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    tl.store(scores + r * E + e, 1 / (1 + tl.exp(-tl.sum(acc_red, axis=2))), mask=(r < rows) & (e < E))


@triton.jit
def _choose_kernel(scores, bias, weights, experts, scale, E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr):
    """One token: its k experts by score + bias, the largest first, and their weights."""
    r, e, place = tl.program_id(0), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    value_e = tl.load(scores + r * E + e, mask=e < E, other=0.0) + tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)
    bits_e = value_e.to(tl.int32, bitcast=True)
    bits_e = bits_e ^ ((bits_e >> 31) & 0x7FFFFFFF)        # orders as the values do
    key_e = tl.where(e < E, (bits_e.to(tl.int64) << 32) | (BLOCK_E - 1 - e), -0x7FFFFFFFFFFFFFFF)
    chosen_k = tl.zeros((BLOCK_K,), tl.int32)
    for i in range(K):
        best = BLOCK_E - 1 - (tl.max(key_e, axis=0) & 0xFFFFFFFF).to(tl.int32)
        chosen_k = tl.where(place == i, best, chosen_k)
        key_e = tl.where(e == best, -0x7FFFFFFFFFFFFFFF, key_e)
    score_k = tl.load(scores + r * E + chosen_k, mask=place < K, other=0.0)
    tl.store(weights + r * K + place, tl.div_rn(scale * score_k, tl.zeros_like(score_k) + (tl.sum(score_k) + 1e-20)), mask=place < K)
    tl.store(experts + r * K + place, chosen_k.to(tl.int64), mask=place < K)


@triton.jit
def _relu2_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(x + at, mask=at < n, other=0)
    h = h.to(tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32)
    h = tl.where(h <= 0, 0.0, h)        # a maximum would drop a NaN
    tl.store(out + at, narrow(h * h, out.dtype.element_ty), mask=at < n)


def route(x_rd: Tensor, weight_ed: Tensor, bias_e: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(weights_rk, experts_rk, scores_re) for few tokens, without a gradient; of equal scores + biases the smaller expert goes first."""
    (r, d), e = x_rd.shape, weight_ed.shape[0]
    make = lambda n, dtype: torch.empty(r, n, dtype=dtype, device=x_rd.device)
    weights_rk, experts_rk, scores_re = make(k, torch.float32), make(k, torch.int64), make(e, torch.float32)
    x_rd, rows = x_rd if x_rd.stride(1) == 1 else x_rd.contiguous(), min(8, triton.next_power_of_2(max(r, 1)))
    tile = dict(BLOCK_R=rows, BLOCK_E=2 if rows == 1 else 4, BLOCK_D=min(512 if rows == 1 else 128, triton.next_power_of_2(d)))
    if r:
        _scores_kernel[(triton.cdiv(e, tile["BLOCK_E"]), triton.cdiv(r, rows))](
            x_rd, weight_ed.contiguous(), scores_re, r, x_rd.stride(0), E=e, D=d, **tile, num_warps=4)
        block = triton.next_power_of_2(e)       # one warp up to 512 experts: its lanes agree on the largest without shared memory
        _choose_kernel[(r,)](scores_re, bias_e, weights_rk, experts_rk, float(scale), E=e, K=k, BLOCK_E=block, BLOCK_K=triton.next_power_of_2(k),
                             num_warps=max(1, block // 512))
    return weights_rk, experts_rk, scores_re


def relu2(x: Tensor) -> Tensor:
    """relu(x)², without a gradient, rounded once."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel(): _relu2_kernel[(triton.cdiv(out.numel(), 1024),)](x.contiguous(), out, out.numel(), BLOCK=1024, num_warps=4)
    return out
