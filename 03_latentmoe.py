"""03 · LatentMoE: a router that picks 22 of 512 experts, and experts that live in a narrow room.

You build the feed-forward layer of Nemotron 3: a sigmoid router in fp32, routed experts written twice (as the definition and as the
algorithm that is fast), the latent projections around them, one shared expert, the two forces that keep every expert busy, and the exchange
of rows that lets the experts of a layer live on several GPUs.

Left out:  sending a token once to a GPU that holds several of its experts, exchange and computation at the same time, router z-loss, token
           dropping and capacity factors, group-limited routing (the released configs have one group).
Sources:   [Ultra] Nemotron 3 Ultra report, arXiv 2606.15007 · [LatentMoE] LatentMoE, arXiv 2601.18089 · [Super] Nemotron 3 Super report
           [Megatron] Megatron-LM's router and MoE layer · [HF] transformers' modeling_nemotron_h, the oracle of the tests
           [LossFree] Wang et al. 2024, arXiv 2408.15664, balance by a selection bias · [Config] the released config.json files
Run:       python 03_latentmoe.py               # 15 s, CPU: what the latent buys, a routing by hand, balance with and without bias, times
           python 03_latentmoe.py --steps 2000  # the balance for longer
           python 03_latentmoe.py --impl triton # GPU: adds the kernel to the times
Contents:  1 router   2 experts as a loop   3 sort and group   4 one expert at a time   5 load balance   6 expert parallelism
           7 the layer   8 packed weights   9 measurements   10 demo
Letters:   b batch  t time  d model width  e experts  k chosen experts  l latent (or d without one)  f expert hidden width
           r flattened rows (b·t)  q routed rows (r·k), one for each token and chosen expert, sorted by expert
           n ranks that share a layer's experts  m routed rows that arrived at this rank
"""
from __future__ import annotations

import contextlib
import importlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.modelopt import ALGORITHMS

nvfp4, mamba = (importlib.import_module(name) for name in ("01_nvfp4", "02_mamba"))

# %% 1 · Router  [Ultra; Megatron, router]
# One score per expert, each on its own (a sigmoid, not a softmax: experts do not compete for a fixed sum). A bias decides with the score
# who is chosen, and has no say in how much the chosen count:
#     s = sigmoid(x Wᵀ)        chosen = top-k of s + b        p_i = scale · s_i / (sum of the chosen s + 1e-20)
# The bias is no parameter: section 5 moves it by hand, so balance needs no gradient that would pull against the loss.

def bf16_parts(x: Tensor) -> list[Tensor]:
    """fp32 as three bf16 tensors that sum to it, 8 bits of it each; a bf16 tensor is its own only part.  1.01 -> 1.0078125 + 0.0021820068 + ..."""
    if x.dtype == torch.bfloat16: return [x]
    high = x.bfloat16()
    middle = (x - high).bfloat16()
    return [high, middle, (x - high - middle).bfloat16()]


def fp32_product(a_mk: Tensor, b_nk: Tensor) -> Tensor:
    """a · bᵀ of fp32 accuracy on a GPU's bf16 tensor cores: products of bf16 numbers are exact in fp32, so an fp32 operand goes in parts, side by
    side along the contraction. Parts i and j of both operands matter together down to i + j = 2. Tensor cores cut the last bits of a sum: errors
    were 4e-7 of the result's norm where fp32's are 1e-7. Several times as fast as an fp32 product."""
    pairs = [(a, b) for i, a in enumerate(bf16_parts(a_mk)) for j, b in enumerate(bf16_parts(b_nk)) if i + j < 3]
    a, b = (torch.cat(side, dim=1) for side in zip(*pairs))
    return torch.mm(a, b.T, out_dtype=torch.float32)


class RouterLogits(torch.autograd.Function):
    """x · wᵀ in fp32 for bf16 activations on a GPU, by fp32_product; w is bf16 or fp32."""
    @staticmethod
    def forward(ctx, x_rd, weight_ed):
        ctx.save_for_backward(x_rd, weight_ed)
        return fp32_product(x_rd, weight_ed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogits_re):
        x_rd, weight_ed = ctx.saved_tensors
        return fp32_product(dlogits_re, weight_ed.T).to(x_rd.dtype), fp32_product(dlogits_re.T, x_rd.T).to(weight_ed.dtype)


FEW_ROWS = 256       # ours: so many tokens of a decode step are routed by two kernels of our own, which have no gradient


def route(x_rd: Tensor, weight_ed: Tensor, bias_e: Tensor, k: int, scale: float, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """(weights_rk, experts_rk, scores_re): how much, who, and every expert's score, in fp32 whatever x is (float64 stays float64).

    scores .9 .5 .4, bias 0 0 .2, k 2, scale 1  ->  experts 0 and 2, weights .9/1.3 and .4/1.3: the bias chose expert 2 but did not raise it.
    """
    e, d = weight_ed.shape
    if x_rd.shape[-1] != d: raise ValueError(f"the router reads rows of width {d}, got {x_rd.shape[-1]}: give it the full width, not the latent")
    if bias_e.shape != (e,): raise ValueError(f"the selection bias needs one value for each of {e} experts, got shape {tuple(bias_e.shape)}")
    if not 1 <= k <= e: raise ValueError(f"cannot choose k={k} of {e} experts: k must lie between 1 and {e}")

    few = len(x_rd) <= FEW_ROWS and x_rd.dtype != torch.float64 and not torch.is_grad_enabled()
    if few and (twin := nvfp4.find_twin("experts", "route", impl, x_rd)): return twin(x_rd, weight_ed, bias_e, k, scale)
    # PITFALL: two experts whose scores differ by less than a bf16 step swap places; then training and inference use different experts.
    wide = torch.float64 if x_rd.dtype == torch.float64 else torch.float32
    with torch.autocast(x_rd.device.type, enabled=False):
        by_parts = x_rd.is_cuda and x_rd.dtype == torch.bfloat16 and weight_ed.dtype in (torch.bfloat16, torch.float32)
        logits_re = RouterLogits.apply(x_rd, weight_ed) if by_parts else x_rd.to(wide) @ weight_ed.to(wide).T
        scores_re = logits_re.sigmoid()
        experts_rk = (scores_re.detach() + bias_e.detach()).topk(k, dim=-1).indices
        chosen_rk = scores_re.gather(1, experts_rk)
        weights_rk = scale * chosen_rk / (chosen_rk.sum(-1, keepdim=True) + 1e-20)
    return weights_rk, experts_rk, scores_re


# %% 2 · Experts as a loop: the definition  [LatentMoE; HF]
#     y = sum over the chosen experts i of  p_i · Down_i relu(Up_i x)²
# Two matrices an expert, no gate, no bias. Weights are stacked: up_efl, down_elf.

def relu2(x: Tensor, impl: str = "auto") -> Tensor:
    """Squared ReLU: -2 -> 0, 3 -> 9."""
    if not torch.is_grad_enabled() and (twin := nvfp4.find_twin("experts", "relu2", impl, x)): return twin(x)
    h = x.relu()
    return h * h      # PITFALL: h.square() is a power to autocast, which computes powers in fp32: bf16 in, fp32 out on a GPU


def experts_loop(x_rl: Tensor, weights_rk: Tensor, experts_rk: Tensor, up_efl: Tensor, down_elf: Tensor) -> Tensor:
    """Rung 1, the definition: ask each expert in turn which tokens chose it.

    The weight multiplies after the down projection, as the released code does; in exact arithmetic it could come before.
    """
    y_rl = torch.zeros_like(x_rl, dtype=weights_rk.dtype)
    for e, (up_fl, down_lf) in enumerate(zip(up_efl, down_elf)):
        rows, slots = (experts_rk == e).nonzero(as_tuple=True)
        out = F.linear(relu2(F.linear(x_rl[rows], up_fl)), down_lf)
        y_rl = y_rl.index_add(0, rows, (out * weights_rk[rows, slots, None]).to(y_rl.dtype))
    return y_rl.to(x_rl.dtype)


# %% 3 · Sort and group: the algorithm
# Copy every token k times, sort the copies by expert, and each expert's work is one stretch of consecutive rows:
#     experts of tokens 0 1 2:  (2 0) (0 1) (2 1)    order 1 2 | 3 5 | 0 4    offsets 2 4 6    inverse 4 0 1 2 5 3
# A grouped product then needs only the stretch ends, which stay on the device: no token count ever has to reach the CPU.

def count_load(experts_rk: Tensor, experts: int, valid_r: Tensor | None = None) -> Tensor:
    """int64 tokens that chose each expert; rows with valid False are not counted. No wait for the device, unlike bincount."""
    ones_rk = torch.ones_like(experts_rk) if valid_r is None else valid_r.to(experts_rk.dtype)[:, None].expand_as(experts_rk)
    return experts_rk.new_zeros(experts).scatter_add_(0, experts_rk.reshape(-1), ones_rk.reshape(-1))


def sort_by_expert(experts_rk: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order_q, inverse_q, offsets_e): sorted place -> pair r·k + slot, pair -> sorted place, and where each expert's rows end (int32)."""
    # NOTE: stable, so an expert sees its tokens in their order and sums round the same way in every run
    order_q = torch.argsort(experts_rk.reshape(-1), stable=True)
    inverse_q = torch.empty_like(order_q).scatter_(0, order_q, torch.arange(len(order_q), device=order_q.device))
    return order_q, inverse_q, count_load(experts_rk, experts).cumsum(0, dtype=torch.int32)


def grouped_linear(x_qd: Tensor, w_end: Tensor, offsets_e: Tensor, recipe: nvfp4.NVFP4Recipe | None = None, seed: int = 0) -> Tensor:
    """Rows of expert i times w[i]ᵀ, for all experts; with a recipe in NVFP4.  seed: of the recipe's stochastic rounding."""
    if isinstance(w_end, nvfp4.NVFP4Tensor): return nvfp4.matmul_w4a16(x_qd, w_end, offsets_e)
    if recipe is not None: return nvfp4.nvfp4_linear(x_qd, w_end, recipe, offsets_e=offsets_e, seed=seed)
    # torch's grouped product wants rows of whole 16 bytes and knows no float64 (in which the tests compare algorithms): a loop serves the rest
    aligned = all(width * x_qd.element_size() % 16 == 0 for width in w_end.shape[1:])
    if aligned and x_qd.dtype != torch.float64: return torch._grouped_mm(x_qd, w_end.transpose(1, 2), offs=offsets_e)
    ends = offsets_e.tolist()
    return torch.cat([F.linear(x_qd[start:end], w_nd) for start, end, w_nd in zip([0, *ends], ends, w_end)])


class Permuted(torch.autograd.Function):
    """Rows in the order order_q; inverse_q undoes it, and orders the gradient. Autograd's own would add it up, row by row, on a GPU with atomics."""
    @staticmethod
    def forward(ctx, x_ql, order_q, inverse_q):
        ctx.inverse_q = inverse_q
        return x_ql.index_select(0, order_q)

    @staticmethod
    def backward(ctx, dy_ql):
        return dy_ql.index_select(0, ctx.inverse_q), None, None


def copy_to_experts(x_rl: Tensor, k: int, order_q: Tensor, inverse_q: Tensor, impl: str = "auto") -> Tensor:
    """[q, l]: k copies of every token, sorted by expert."""
    if twin := nvfp4.find_twin("experts", "copy_to_experts", impl, x_rl): return twin(x_rl, k, order_q, inverse_q)
    # NOTE: copy, then permute: the gradient of the copies is a sum over k in a fixed order. x_rl[order_q // k] would scatter-add.
    return Permuted.apply(x_rl.repeat_interleave(k, dim=0), order_q, inverse_q)


def weighted_sum(out_ql: Tensor, order_q: Tensor, inverse_q: Tensor, weights_rk: Tensor, impl: str = "auto") -> Tensor:
    """[r, l]: the k rows of a token brought together again, each times its weight."""
    if twin := nvfp4.find_twin("experts", "weighted_sum", impl, out_ql): return twin(out_ql, order_q, inverse_q, weights_rk)
    out_rkl = Permuted.apply(out_ql, inverse_q, order_q).unflatten(0, weights_rk.shape)
    return (out_rkl * weights_rk[..., None]).sum(1).to(out_ql.dtype)


def experts_sorted(x_rl: Tensor, weights_rk: Tensor, experts_rk: Tensor, up_efl: Tensor, down_elf: Tensor,
                   recipe: nvfp4.NVFP4Recipe | None = None, seed: int | Tensor = 0) -> Tensor:
    """Rung 2: the same sum, with one grouped product per projection.  seed: of the recipe's stochastic rounding, or int64 [2, 2] with both seeds of
    both products."""
    order_q, inverse_q, offsets_e = sort_by_expert(experts_rk, up_efl.shape[0])
    up_seed, down_seed = seed if isinstance(seed, Tensor) else (nvfp4.draw_seed_for(seed, 0, 0, 0, operand) for operand in (1, 2))
    x_ql = copy_to_experts(x_rl, experts_rk.shape[1], order_q, inverse_q)
    hidden_qf = relu2(grouped_linear(x_ql, up_efl, offsets_e, recipe, up_seed))
    return weighted_sum(grouped_linear(hidden_qf, down_elf, offsets_e, recipe, down_seed), order_q, inverse_q, weights_rk)


# %% 4 · One expert at a time: the same sum for a CPU
# A grouped product writes the hidden rows of all experts to memory before anything reads them. Taking one expert through both projections
# keeps its rows in the cache, and a backward pass by hand drops copies that autograd would keep. With a = h², h = relu(Up x), dy = dL/dy:
#     da = Downᵀ dy     dp = a · da     dDown = sum p dy aᵀ     du = 2 p h da  (0 where h is 0)     dx = Upᵀ du     dUp = sum du xᵀ

CACHE_ROWS = 128     # ours: with fewer rows an expert, the loop in Python costs more than the cache saves (measured on two CPU cores)


class ExpertsInCache(torch.autograd.Function):
    """y_rl from x_rl, weights_rk, up_efl, down_elf and what sort_by_expert returned; y has the dtype of weights_rk."""
    @staticmethod
    def forward(ctx, x_rl, weights_rk, up_efl, down_elf, order_q, inverse_q, offsets_e):
        r, k = weights_rk.shape
        ends = offsets_e.tolist()
        ctx.busy = [(e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *ends], ends)) if start < end]
        x_ql = x_rl.index_select(0, order_q // k)
        hidden_qf, out_ql = x_ql.new_empty(r * k, up_efl.shape[1]), torch.empty_like(x_ql)

        for e, rows in ctx.busy:
            h = torch.mm(x_ql[rows], up_efl[e].T, out=hidden_qf[rows]).relu_()
            torch.mm(h * h, down_elf[e].T, out=out_ql[rows])

        ctx.save_for_backward(x_ql, hidden_qf, weights_rk, up_efl, down_elf, order_q, inverse_q)
        # one bag is one token: the weighted sum of the k rows that inverse_q names
        return F.embedding_bag(inverse_q.view(r, k), out_ql.to(weights_rk.dtype), mode="sum", per_sample_weights=weights_rk)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_rl):
        x_ql, hidden_qf, weights_rk, up_efl, down_elf, order_q, inverse_q = ctx.saved_tensors
        r, k = weights_rk.shape
        dy_ql = dy_rl.to(x_ql.dtype).index_select(0, order_q // k)
        p_q1 = weights_rk.to(x_ql.dtype).reshape(-1).index_select(0, order_q)[:, None]
        dx_ql, dp_q = torch.empty_like(x_ql), torch.empty_like(p_q1[:, 0])
        dup_efl, ddown_elf = torch.zeros_like(up_efl), torch.zeros_like(down_elf)     # an expert without tokens keeps its zeros

        for e, rows in ctx.busy:
            h, dy, p = hidden_qf[rows], dy_ql[rows], p_q1[rows]
            a, da = h * h, torch.mm(dy, down_elf[e])
            torch.mm(dy.mul_(p).T, a, out=ddown_elf[e])
            torch.sum(a.mul_(da), dim=1, out=dp_q[rows])
            du = da.mul_(h).mul_(2 * p)
            torch.mm(du, up_efl[e], out=dx_ql[rows])
            torch.mm(du.T, x_ql[rows], out=dup_efl[e])

        dx_rl = F.embedding_bag(inverse_q.view(r, k), dx_ql, mode="sum")
        dweights_rk = dp_q.index_select(0, inverse_q).view(r, k).to(weights_rk.dtype)
        return dx_rl, dweights_rk, dup_efl, ddown_elf, None, None, None


def experts_gathered(x_rl: Tensor, weights_rk: Tensor, experts_rk: Tensor, up_efl: Tensor, down_elf: Tensor) -> Tensor:
    """The other way round, for the few tokens of a decode step: bring the chosen weights to the tokens. No sorting, and each weight is read
    about once, which is all that a step of a few rows costs."""
    (r, k), l = experts_rk.shape, x_rl.shape[1]
    chosen_q = experts_rk.reshape(-1)
    x_ql1 = x_rl[:, None, :, None].expand(r, k, l, 1).reshape(r * k, l, 1)
    out_ql1 = torch.bmm(down_elf.index_select(0, chosen_q), relu2(torch.bmm(up_efl.index_select(0, chosen_q), x_ql1)))
    return torch.bmm(weights_rk[:, None], out_ql1.view(r, k, l).to(weights_rk.dtype))[:, 0].to(x_rl.dtype)


def experts_grouped(x_rl: Tensor, weights_rk: Tensor, experts_rk: Tensor, up_efl: Tensor | nvfp4.NVFP4Tensor, down_elf: Tensor | nvfp4.NVFP4Tensor,
                    recipe: nvfp4.NVFP4Recipe | None = None, seed: int = 0, impl: str = "auto") -> Tensor:
    """The fastest way at hand: the Triton twin, or experts_sorted; with impl "auto" also one expert at a time (many rows on a CPU) and
    experts_gathered (a decode step with fewer rows than experts). Weights held in 4 bits serve as they are, without gradients."""
    (e, f, l), (r, k) = up_efl.shape, experts_rk.shape
    if x_rl.shape != (r, l) or weights_rk.shape != (r, k) or down_elf.shape != (e, l, f):
        raise ValueError(f"experts of up {tuple(up_efl.shape)} and down {tuple(down_elf.shape)} cannot serve rows {tuple(x_rl.shape)} with choices "
                         f"{tuple(experts_rk.shape)}: they must be [e, f, l], [e, l, f], [r, l] and [r, k]")
    if twin := nvfp4.find_twin("experts", "experts_grouped", impl, x_rl):
        return twin(x_rl, weights_rk, experts_rk, up_efl, down_elf, recipe, seed)
    if recipe is not None or isinstance(up_efl, nvfp4.NVFP4Tensor):
        return experts_sorted(x_rl, weights_rk, experts_rk, up_efl, down_elf, recipe, seed)

    # neither torch._grouped_mm nor our own Function sees autocast: apply it here
    dtype = nvfp4.output_dtype(x_rl)
    x_rl, up_efl, down_elf = x_rl.to(dtype), up_efl.to(dtype), down_elf.to(dtype)
    if impl == "auto" and x_rl.device.type == "cpu" and r * k >= CACHE_ROWS * e:
        return ExpertsInCache.apply(x_rl, weights_rk, up_efl, down_elf, *sort_by_expert(experts_rk, e)).to(dtype)
    if impl == "auto" and r * k <= e and not torch.is_grad_enabled(): return experts_gathered(x_rl, weights_rk, experts_rk, up_efl, down_elf)
    return experts_sorted(x_rl, weights_rk, experts_rk, up_efl, down_elf)


# %% 5 · Load balance  [Megatron, router and aux losses; LossFree; Ultra, MaxVio]
# Left alone, a router that likes an expert trains it more and likes it better. Two forces hold against that:
#     a weak loss per sequence      L = E · sum_i f_i P_i       (times 1e-4; the caller multiplies)
#     a bias moved after each step  b_i <- b_i + 1e-3 · sign(mean load - load_i)
# f_i is the share of the choices that fell on expert i, P_i its mean share of the score. Even routing gives L = 1.

def sequence_aux_loss(scores_bte: Tensor, k: int, valid_bt: Tensor | None = None, context: mamba.ContextGroup | None = None) -> Tensor:
    """Balance loss, a mean over the sequences that hold a valid token. The gradient flows through P only; choices are counted.
    With a context the t tokens are this rank's piece of each sequence, and all ranks get the loss of the whole.

    One sequence, two tokens, scores (.6 .2) and (.6 .2), k 1:  f = 1 0, P = .75 .25, L = 2 · .75 = 1.5
    """
    # NOTE: sources disagree. The Super report calls this "the standard load balancing loss" and cites GShard, which counts over the whole
    # batch; the released training configuration names the sequence-wise variant, which is the one here.
    b, t, e = scores_bte.shape
    if not 1 <= k <= e: raise ValueError(f"cannot choose k={k} of {e} experts: k must lie between 1 and {e}")
    valid_bt1 = scores_bte.new_ones(b, t, 1) if valid_bt is None else valid_bt[..., None].to(scores_bte.dtype)
    tokens_b1 = valid_bt1.sum(1)
    # top-k of the scores alone: the loss pushes on what the router thinks of an expert, whatever the bias has already repaired
    chosen_btk = scores_bte.detach().topk(k, dim=-1).indices
    f_be = torch.zeros_like(tokens_b1).expand(b, e).scatter_add(1, chosen_btk.view(b, t * k), valid_bt1.expand(b, t, k).reshape(b, t * k))
    P_be = (scores_bte / (scores_bte.sum(-1, keepdim=True) + 1e-20) * valid_bt1).sum(1)
    if context is not None: tokens_b1, f_be, P_be = mamba.gather_ranks(torch.cat([tokens_b1, f_be, P_be], 1), context).sum(0).split([1, e, e], 1)
    loss_b = e * (f_be / k * P_be).sum(1) / tokens_b1[:, 0].clamp(min=1) ** 2
    return loss_b.sum() / (tokens_b1 > 0).sum().clamp(min=1)


def max_violation(load_e: Tensor) -> Tensor:
    """MaxVio = largest load / mean load, over the last dimension:  1 is even, E/k is the worst when all tokens choose the same k experts.

    loads 6 1 1 0 -> 3.  No tokens at all -> 0.
    """
    # NOTE: [LossFree], where the number comes from, subtracts 1; the Ultra report does not (its bound E/k = 512/22 = 23.27 shows it).
    load_e = load_e.double()
    return load_e.amax(-1) / load_e.mean(-1).clamp(min=1e-20)


def dead_experts(load_e: Tensor) -> Tensor:
    """How many experts saw no token:  loads 6 1 1 0 -> 1."""
    return (load_e == 0).sum(-1)


@torch.no_grad()
def update_expert_bias(bias_e: Tensor, load_e: Tensor, rate: float = 1e-3) -> None:
    """b_i += rate · sign(mean load - load_i), in place. Once per optimizer step, with loads summed over the global batch and all ranks.

    loads 6 1 1 0 (mean 2), rate .001  ->  -.001 +.001 +.001 +.001.  The bias is never centred.
    """
    if bias_e.shape != load_e.shape: raise ValueError(f"one load per expert is needed: bias {tuple(bias_e.shape)}, loads {tuple(load_e.shape)}")
    # sign(sum - E · load) equals sign(mean - load) and stays exact in integers
    bias_e += rate * torch.sign(load_e.sum(-1, keepdim=True) - load_e.shape[-1] * load_e).to(bias_e.dtype)


# %% 6 · Expert parallelism  [LatentMoE; Megatron, all-to-all dispatcher]
# The experts of one Ultra layer are 11 billion parameters. So n ranks share them: rank i holds experts i·e/n to (i+1)·e/n, and the rows travel.
# Two ranks with two experts each; a2 is the copy of token a for expert 2, | lies between ranks, / between experts:
#
#                        rank 0, experts 0 and 1          rank 1, experts 2 and 3
#     chosen             a: 0 2    b: 3 1                 c: 2 3    d: 1 3
#     sorted by expert   a0 / b1 | a2 / b3                d1 | c2 / c3 d3           left of | goes to rank 0, right of it to rank 1
#     arrived            a0 / b1 | d1                     a2 / b3 | c2 / c3 d3      by sender, then by expert: one sort more, and
#     computed           a0 / b1 d1                       a2 c2 / b3 c3 d3          each expert's rows are together, as in section 3
#     sent back          a0 b1 a2 b3                      d1 c2 c3 d3               the same exchange with the splits swapped
#     weighted sum       a = p·a0 + p·a2   ...            c = p·c2 + p·c3   ...     p never travels
#
# The rows are latent rows: 2 · k · l · 2 bytes a token, there and back in bf16, where a MoE of full width moves 2 · k · d · 2. In Ultra that is
# 180 KB in place of 721 KB (all_to_all_bytes).
# A rank can make room for what comes only when it knows how much that is. So the counts go first, and the host waits for them, once a layer
# (a CUDA graph cannot hold such a layer). A library such as DeepEP can do without: its kernels read the splits on the device, and receive into
# a buffer that has room for the most that could come.

def all_to_all_bytes(k: float, width: int, ranks: int | None = None, itemsize: int = 2) -> float:
    """Bytes of a token's rows to its experts and back, bf16 by default; the backward pass moves as many again.  ranks: even routing leaves 1 / ranks
    of them at home, and only the others count.  Ultra, k 22:  latent 2048 -> 180,224   full width 8192 -> 720,896   latent, 8 ranks -> 157,696."""
    return 2 * k * width * itemsize * (1 if ranks is None else (ranks - 1) / ranks)


class Exchange(torch.autograd.Function):
    """Rows to the ranks of a group and from them: the first send_n[0] rows go to rank 0, the next send_n[1] to rank 1; receive_n counts by sender."""
    @staticmethod
    def forward(ctx, rows_ql, send_n, receive_n, group):
        ctx.way = send_n, receive_n, group
        received_ml = rows_ql.new_empty(sum(receive_n), rows_ql.shape[1])
        dist.all_to_all_single(received_ml, rows_ql.contiguous(), receive_n, send_n, group=group)
        return received_ml

    @staticmethod
    def backward(ctx, dreceived_ml):
        # a row's gradient is wherever the row went: fetch it from there
        send_n, receive_n, group = ctx.way
        return Exchange.apply(dreceived_ml, receive_n, send_n, group), None, None, None


def experts_exchanged(x_rl: Tensor, weights_rk: Tensor, experts_rk: Tensor, up_efl: Tensor, down_elf: Tensor, group: dist.ProcessGroup,
                      recipe: nvfp4.NVFP4Recipe | None = None, seed: int | Tensor = 0, impl: str = "auto") -> Tensor:
    """experts_grouped over the ranks of a group: x, weights and choices are this rank's tokens, up_efl and down_elf this rank's experts.
    Every rank has to call it, and to run its backward pass, also without tokens: the others wait for it. With a recipe each rank quantizes the
    rows of its own experts; the seed may be the same everywhere, since no expert is in two places."""
    ranks, local = dist.get_world_size(group), up_efl.shape[0]
    order_q, inverse_q, _ = sort_by_expert(experts_rk, ranks * local)
    send_ne = count_load(experts_rk, ranks * local).view(ranks, local)
    receive_ne = torch.empty_like(send_ne)
    dist.all_to_all_single(receive_ne, send_ne, group=group)
    counts = torch.stack([send_ne, receive_ne]).sum(2).to("cpu", non_blocking=True)
    counted = torch.cuda.current_stream().record_event() if x_rl.is_cuda else None
    x_ql = copy_to_experts(x_rl.to(nvfp4.output_dtype(x_rl)), experts_rk.shape[1], order_q, inverse_q)
    if counted is not None: counted.synchronize()      # NOTE: here the host waits, while the device copies rows
    send_n, receive_n = counts.tolist()

    x_ml = Exchange.apply(x_ql, send_n, receive_n, group)
    expert_m = torch.arange(local, device=x_rl.device).repeat(ranks).repeat_interleave(receive_ne.view(-1), output_size=len(x_ml))
    # each arrived row is a token with one expert and weight 1: the sort by expert, the twin and NVFP4 are those of one rank
    out_ml = experts_grouped(x_ml, weights_rk.new_ones(len(x_ml), 1), expert_m[:, None], up_efl, down_elf, recipe, seed, impl)
    return weighted_sum(Exchange.apply(out_ml, receive_n, send_n, group), order_q, inverse_q, weights_rk)


class DividedGradient(torch.autograd.Function):
    """x as it is; its gradient divided by n."""
    @staticmethod
    def forward(ctx, x, n):
        ctx.n = n
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx / ctx.n, None


def expert_parallel(layer: LatentMoE, group: dist.ProcessGroup | None) -> LatentMoE:
    """Keep this rank's share of the layer's experts, in place, as new parameters; from then on its rows travel. Before, all ranks hold equal layers.

    Router, latent projections and shared expert stay whole on every rank, and Balance counts this rank's tokens only.
    NOTE: gradients. Rows of all ranks reach an expert, so its gradient would be the *sum* over the group's ranks of what each rank's loss gives,
    while data parallelism takes the *mean* over ranks of what stays whole. So it is divided by the group's size here: then everything is to be
    averaged, the experts over the groups where there are several.
    """
    if group is None or dist.get_world_size(group) == 1: return layer
    ranks, rank, experts = dist.get_world_size(group), dist.get_rank(group), layer.experts
    if rank < 0: raise ValueError("this process is no member of the group: give expert_parallel the group that holds this rank")
    if experts.group is not None: raise ValueError("this layer's experts are spread over ranks already: call expert_parallel once")
    count = experts.up_proj.shape[0]
    if count % ranks: raise ValueError(f"{ranks} ranks cannot share {count} experts evenly: choose a number of ranks that divides {count}")
    own = slice(rank * count // ranks, (rank + 1) * count // ranks)
    for name, stack in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(stack.detach()[own].clone(), stack.requires_grad))      # clone: a slice would keep the whole in memory
    experts.group = group
    return layer


# %% 7 · The layer  [LatentMoE; Ultra; HF for the names]
#     z = W_down x                          d -> l, once a token         fc1_latent_proj
#     r = sum_i p_i E_i(z)                  in the latent                experts
#     y = W_up r + Shared(x)                l -> d, once a token         fc2_latent_proj, shared_experts
# Router and shared expert read the full x. The routed scale is inside p, so the shared expert is not scaled.

class Balance(NamedTuple):
    """What a step needs to know about the routing. aux: sequence_aux_loss, unscaled, 0 in eval mode.  load_e: tokens per expert, no padding."""
    aux: Tensor
    load_e: Tensor


class Router(nn.Module):
    """route() with its weight [e, d] and the selection bias, a buffer that stays fp32 when the model is cast."""
    def __init__(self, d_model: int, experts: int, k: int, scale: float = 1.0):
        super().__init__()
        if not 1 <= k <= experts: raise ValueError(f"cannot choose k={k} of {experts} experts: k must lie between 1 and {experts}")
        self.k, self.scale = k, scale
        self.weight = nn.Parameter(torch.empty(experts, d_model))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))
        nn.init.normal_(self.weight, std=0.02)     # initializer_range  [Config]

    def forward(self, x_rd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return route(x_rd, self.weight, self.e_score_correction_bias, self.k, self.scale)

    def _apply(self, fn, recurse=True):
        # PITFALL: model.bfloat16() would cast the bias too, and in bf16 a bias of 0.5 no longer moves by 0.001
        bias_e = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved_e = self.e_score_correction_bias
        if moved_e.dtype != torch.float32: self.e_score_correction_bias = moved_e.float() if bias_e.is_meta else bias_e.to(moved_e.device)
        return self


class Experts(nn.Module):
    """All routed experts of a layer, stacked; or one rank's share of them, when expert_parallel has set `group`. `recipe` puts both products into
    NVFP4; `draw_seed` feeds its stochastic rounding."""
    def __init__(self, experts: int, width: int, expert_width: int):
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(experts, expert_width, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, expert_width))
        self.recipe: nvfp4.NVFP4Recipe | None = None
        self.draw_seed: int = 0
        self.group: dist.ProcessGroup | None = None
        for weight in (self.up_proj, self.down_proj): nn.init.normal_(weight, std=0.02)     # initializer_range  [Config]

    def forward(self, x_rl: Tensor, weights_rk: Tensor, experts_rk: Tensor, impl: str = "auto") -> Tensor:
        routed, stacks = (x_rl, weights_rk, experts_rk), (self.up_proj, self.down_proj)
        if self.group is None: return experts_grouped(*routed, *stacks, self.recipe, self.draw_seed, impl)
        stacks = (DividedGradient.apply(stack, dist.get_world_size(self.group)) for stack in stacks)
        return experts_exchanged(*routed, *stacks, self.group, self.recipe, self.draw_seed, impl)


class SharedExpert(nn.Module):
    """The expert that every token passes: down(relu(up x)²) at full width."""
    def __init__(self, d_model: int, width: int):
        super().__init__()
        self.up_proj = nn.Linear(d_model, width, bias=False)
        self.down_proj = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(relu2(self.up_proj(x)))


class LatentMoE(nn.Module):
    """The layer. latent=None is Nano's plain MoE: routed experts at full width and no projections."""
    context: mamba.ContextGroup | None = None      # set it when x is this rank's piece of the sequences: the balance loss is of whole ones

    def __init__(self, d_model: int, experts: int, k: int, expert_width: int, shared_width: int, latent: int | None = None, scale: float = 1.0):
        super().__init__()
        sizes = dict(d_model=d_model, experts=experts, k=k, expert_width=expert_width, shared_width=shared_width, latent=latent)
        for name, size in sizes.items():
            if size is not None and size < 1: raise ValueError(f"{name} is {size}: every size of a LatentMoE layer must be at least 1")
        self.gate = Router(d_model, experts, k, scale)
        self.experts = Experts(experts, latent or d_model, expert_width)
        self.shared_experts = SharedExpert(d_model, shared_width)
        self.latent = latent
        if latent is not None:
            self.fc1_latent_proj = nn.Linear(d_model, latent, bias=False)
            self.fc2_latent_proj = nn.Linear(latent, d_model, bias=False)

    def mix(self, x_btd: Tensor, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
        """(y_btd, experts_rk, scores_re): the layer itself. Serving stops here, nobody asks it for a balance."""
        x_rd = x_btd.reshape(-1, x_btd.shape[-1])
        weights_rk, experts_rk, scores_re = self.gate(x_rd)
        z_rl = x_rd if self.latent is None else self.fc1_latent_proj(x_rd)
        routed_rd = self.experts(z_rl, weights_rk, experts_rk, impl)
        if self.latent is not None: routed_rd = self.fc2_latent_proj(routed_rd)
        return (routed_rd + self.shared_experts(x_rd)).view(x_btd.shape), experts_rk, scores_re

    def forward(self, x_btd: Tensor, valid_bt: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, Balance]:
        """(y_btd, Balance). valid_bt False marks padding: it is routed like any token, but counted in neither load nor loss."""
        b, t, _ = x_btd.shape
        y_btd, experts_rk, scores_re = self.mix(x_btd, impl)
        # a training signal only, so decoding does not pay for it
        aux = sequence_aux_loss(scores_re.unflatten(0, (b, t)), self.gate.k, valid_bt, self.context) if self.training else scores_re.new_zeros(())
        load_e = count_load(experts_rk, scores_re.shape[1], None if valid_bt is None else valid_bt.reshape(-1))
        return y_btd, Balance(aux, load_e)


# %% 8 · Packed weights  [ModelOpt]
# A checkpoint may hold weights as codes and scales (stage 08 writes such ones). Then every projection rounds its input as its format asks, multiplies
# codes, and sums in fp32:
#     nvfp4  4-bit weights and inputs      w4a16  4-bit weights, inputs as they come      fp8  E4M3, one scale a tensor, both

INPUT_RANGE = {"nvfp4": nvfp4.FP4_MAX * nvfp4.E4M3_MAX, "fp8": nvfp4.E4M3_MAX}      # input_scale = largest input / this  [ModelOpt]


def quantize_weight(name: str, weight_oi: Tensor, fmt: str, scale_rule: str = "max") -> tuple[dict[str, Tensor], Tensor]:
    """({suffix: tensor} as ModelOpt stores it, the values it stands for). ValueError for what is no matrix of a linear layer."""
    if weight_oi.dim() != 2 or not name.endswith("_proj.weight"):
        raise ValueError(f"{name} cannot be stored as {ALGORITHMS[fmt]}: only matrices named *_proj.weight can, so give it bf16 in the table.")
    w = weight_oi.float()
    if fmt != "fp8":
        q = nvfp4.quantize(w, scale_rule=scale_rule, name=name)      # NaN, and a width that blocks do not divide, are errors there
        return dict(weight=q.codes, weight_scale=q.block_scale, weight_scale_2=q.global_scale), q.dequantize()
    if not (amax := w.abs().amax()).isfinite(): raise ValueError(f"{name} holds NaN or Inf and cannot be quantized: take an older checkpoint.")
    scale = torch.where(amax > 0, amax / nvfp4.E4M3_MAX, 1.0)
    codes = nvfp4.e4m3(w / scale)
    return dict(weight=codes, weight_scale=scale), codes.float() * scale


FEW_FP8_ROWS = 64      # ours: what one program of the kernel takes, so each weight is read once; more rows repay writing the weights out in bf16


def fp8_linear(x_ri: Tensor, weight_oi: Tensor, input_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype, offsets_e: Tensor | None = None,
               impl: str = "auto") -> Tensor:
    """x · wᵀ in dtype: x rounded to E4M3 by input_scale, weight_oi E4M3 (or its values in a wider dtype, in which they are then multiplied).
    With a stack [e, o, i] and its rows' ends offsets_e, each expert has scales of its own, [e]."""
    few = len(x_ri) <= FEW_FP8_ROWS and offsets_e is None and weight_oi.dtype == torch.float8_e4m3fn and dtype != torch.float64
    if few and not torch.is_grad_enabled() and (twin := nvfp4.find_twin("packed", "fp8_linear", impl, x_ri)):
        return twin(x_ri, weight_oi, input_scale, weight_scale, dtype)
    by_row = lambda scale: scale if offsets_e is None else scale[nvfp4.expert_of_rows(offsets_e, len(x_ri))]
    w, scale = weight_oi.to(dtype) if weight_oi.dtype == torch.float8_e4m3fn else weight_oi, by_row(input_scale)[..., None]
    codes_ri = nvfp4.e4m3(x_ri.float() / scale).to(w.dtype)      # E4M3 values fit into every wider format
    return (nvfp4.product(codes_ri, w, offsets_e) * (scale * by_row(weight_scale)[..., None])).to(dtype)


class Packed(nn.Module):
    """One weight [o, i], or a stack [e, o, i], as the checkpoint stores it, with the product that its format asks for."""
    def __init__(self, shape: tuple[int, ...], fmt: str):
        super().__init__()
        *stack, o, i = shape
        self.shape, self.fmt, self.decoded = tuple(shape), fmt, None
        if fmt == "fp8": fields = dict(weight=((o, i), torch.float8_e4m3fn), weight_scale=((), torch.float32))
        else: fields = dict(weight=((o, i // 2), torch.uint8), weight_scale=((o, i // 16), torch.float8_e4m3fn), weight_scale_2=((), torch.float32))
        if fmt in INPUT_RANGE: fields["input_scale"] = ((), torch.float32)
        for name, (size, dtype) in fields.items(): self.register_buffer(name, torch.empty((*stack, *size), dtype=dtype), persistent=False)

    @torch.no_grad()
    def draw(self, std: float, g: torch.Generator, largest: float = 32.0) -> None:
        """Random codes, in place, for a layer of which only size and speed matter: weights of this standard deviation, inputs up to `largest`.
        4-bit codes are any; E4M3 bytes lie in [1, 4) with a sign, block scales in [1, 2): the scale in fp32 makes up for their root mean square."""
        square = lambda low, high: torch.arange(low, high, dtype=torch.uint8).view(torch.float8_e4m3fn).float().square().mean().item()
        if self.fmt == "fp8":
            byte = self.weight.view(torch.uint8).random_(0, 32, generator=g)
            byte.copy_(0x38 + (byte & 15) | (byte & 16) << 3)
            self.weight_scale.fill_(std * square(0x38, 0x48) ** -0.5)
        else:
            self.weight.random_(0, 256, generator=g); self.weight_scale.view(torch.uint8).random_(0x38, 0x40, generator=g)
            self.weight_scale_2.fill_(std * (nvfp4.E2M1.square().mean().item() * square(0x38, 0x40)) ** -0.5)
        if self.fmt in INPUT_RANGE: self.input_scale.fill_(largest / INPUT_RANGE[self.fmt])

    def stored(self) -> nvfp4.NVFP4Tensor: return nvfp4.NVFP4Tensor(self.weight, self.weight_scale, self.weight_scale_2)

    def forward(self, x: Tensor, offsets_e: Tensor | None = None) -> Tensor:
        """x · wᵀ; with a stack, rows of x sorted by expert and offsets_e their ends."""
        dtype, x_ri, w = nvfp4.output_dtype(x), x.reshape(-1, x.shape[-1]), self.decoded
        if self.fmt == "nvfp4":
            # each expert may have a scale of its own: then one entry a row
            scale = self.input_scale if offsets_e is None else self.input_scale[nvfp4.expert_of_rows(offsets_e, len(x_ri))]
            x_ri = nvfp4.quantize(x_ri, amax=scale * INPUT_RANGE["nvfp4"], name="the input of a quantized layer")
            y_ro = nvfp4.matmul(x_ri, self.stored(), offsets_e, dtype) if w is None else nvfp4.product(x_ri.dequantize(), w, offsets_e)
        elif self.fmt == "w4a16":
            y_ro = nvfp4.matmul_w4a16(x_ri.to(dtype), self.stored(), offsets_e) if w is None else nvfp4.product(x_ri.float(), w, offsets_e)
        else: y_ro = fp8_linear(x_ri, self.weight if w is None else w, self.input_scale, self.weight_scale, dtype, offsets_e)
        return y_ro.to(dtype).view(*x.shape[:-1], self.shape[-2])


class QuantizedExperts(nn.Module):
    """Experts with both stacks packed; their hidden rows are rounded too, between the products."""
    def __init__(self, up_proj: Packed, down_proj: Packed):
        super().__init__()
        self.up_proj, self.down_proj = up_proj, down_proj

    def forward(self, x_rl: Tensor, weights_rk: Tensor, experts_rk: Tensor, impl: str = "auto") -> Tensor:
        up, down = self.up_proj, self.down_proj
        if up.fmt == down.fmt == "w4a16":      # no rounding in between: the ways of section 3 serve
            x, stacks = (x_rl, (up.stored(), down.stored())) if up.decoded is None else (x_rl.float(), (up.decoded, down.decoded))
            return experts_grouped(x, weights_rk, experts_rk, *stacks, impl=impl).to(x_rl.dtype)
        order_q, inverse_q, offsets_e = sort_by_expert(experts_rk, up.shape[0])
        x_ql = copy_to_experts(x_rl, experts_rk.shape[1], order_q, inverse_q, impl)
        hidden_qf = relu2(up(x_ql, offsets_e))
        return weighted_sum(down(hidden_qf, offsets_e), order_q, inverse_q, weights_rk, impl)


def pack_modules(model: nn.Module, found: dict[str, str]) -> None:
    """Swaps the linears and experts that a checkpoint holds in codes, in place, and makes room for the scales of keys and values.
    found: its names, with shapes and the dtypes of codes in words."""
    def packed(module: str, shape) -> Packed | None:
        if f"{module}.weight_scale_2" in found: return Packed(shape, "nvfp4" if f"{module}.input_scale" in found else "w4a16")
        return Packed(shape, "fp8") if "float8" in found.get(f"{module}.weight", "") else None

    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            both = [packed(f"{name}.0.{leaf}", getattr(module, leaf).shape) for leaf in ("up_proj", "down_proj")]
            if all(both): model.set_submodule(name, QuantizedExperts(*both))
            elif any(both): raise ValueError(f"{name} has only one of its two projections quantized: quantize both or neither.")
        elif isinstance(module, nn.Linear) and (new := packed(name, module.weight.shape)): model.set_submodule(name, new)
        for scale in {f"{name}.k_scale", f"{name}.v_scale"} & found.keys():
            model.get_submodule(name).register_buffer(scale[-7:], torch.empty(()), persistent=False)


def packed_modules(model: nn.Module) -> Iterator[Packed]: return (module for module in model.modules() if isinstance(module, Packed))


def packed_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every buffer by its name in the checkpoint; an expert's is a piece of the stack."""
    out = {}
    for name, buffer in model.named_buffers():
        match = re.fullmatch(r"(.*\.experts)\.((?:up|down)_proj\..*)", name)
        if match: out |= {f"{match[1]}.{i}.{match[2]}": piece for i, piece in enumerate(buffer)}
        else: out[name] = buffer
    return out


@contextlib.contextmanager
def record_amax(root: nn.Module, prefix: str, valid: Callable[[Tensor], Tensor], output: Callable[[str], str | None]) -> Iterator[dict[str, Tensor]]:
    """While open: the largest magnitude of every input of a linear and of both products of experts, by module name below `prefix`; of a module's
    output too, under the name that output(module name) gives, if any. valid: picks the rows that count."""
    amax, hooks = {}, []

    def note(name: str, x: Tensor) -> None:     # NOTE: torch.maximum hands a NaN on, Python's max would lose it
        amax[name] = torch.maximum(amax.get(name, x.new_zeros(())), x.abs().amax())

    def note_experts(name: str, up_efl: Tensor, x_rl: Tensor, experts_rk: Tensor) -> None:
        order_q, inverse_q, offsets_e = sort_by_expert(experts_rk, len(up_efl))
        x_ql = copy_to_experts(x_rl, experts_rk.shape[1], order_q, inverse_q)
        note(f"{name}.up_proj", x_rl)
        note(f"{name}.down_proj", relu2(grouped_linear(x_ql, up_efl, offsets_e)))

    for name, module in root.named_modules(prefix=prefix):
        if isinstance(module, Experts):
            hooks.append(module.register_forward_pre_hook(lambda m, args, n=name: note_experts(n, m.up_proj, valid(args[0]), valid(args[2]))))
        elif isinstance(module, nn.Linear): hooks.append(module.register_forward_pre_hook(lambda m, args, n=name: note(n, valid(args[0]))))
        if other := output(name): hooks.append(module.register_forward_hook(lambda m, args, y, n=other: note(n, valid(y))))
    try: yield amax
    finally:
        for hook in hooks: hook.remove()


# %% 9 · Measurements
# What this stage claims, as numbers: the price of a layer, how balance moves while a router learns, and the time of each rung.

class Cost(NamedTuple):
    """The price of the routed part of one layer. Even routing is assumed where experts are counted."""
    parameters: float
    flops: float            # a token, forward; one multiply-add is 2
    sent_bytes: float       # a token, to its experts and back, bf16
    read_bytes: float       # weights a batch must read: experts at 4.5 bits, the latent projections in bf16
    log10_choices: float    # sets of experts a token can be given


def layer_cost(d_model: int, width: int, experts: float, k: float, expert_width: int, batch: int) -> Cost:
    """The routed experts of one layer and its latent projections, for experts that read rows of `width`."""
    per_expert = 2 * width * expert_width
    projections = 2 * d_model * width if width < d_model else 0
    touched = experts * (1 - (1 - k / experts) ** batch)      # experts that at least one token of the batch chose
    choices = math.lgamma(experts + 1) - math.lgamma(k + 1) - math.lgamma(experts - k + 1)
    return Cost(parameters=experts * per_expert + projections, flops=2 * (k * per_expert + projections), sent_bytes=all_to_all_bytes(k, width),
                read_bytes=touched * per_expert * 4.5 / 8 + projections * 2, log10_choices=choices / math.log(10))


def measure_costs(batch: int = 64) -> dict[str, tuple[tuple, Cost]]:
    """name -> ((experts, k, width), Cost) at Ultra's sizes: d 8192, latent 2048 (a quarter), 512 experts of width 5120, 22 chosen  [Config]."""
    d, l, e, k, f = 8192, 2048, 512, 22, 5120
    shrink = d // l
    layers = {"standard MoE, the same bill": (e // shrink, k / shrink, d), "LatentMoE, as in Ultra": (e, k, l),
              "LatentMoE, k not raised": (e, k / shrink, l), "standard MoE, Ultra's experts": (e, k, d)}
    return {name: ((n, chosen, width), layer_cost(d, width, n, chosen, f, batch)) for name, (n, chosen, width) in layers.items()}


def measure_balance(rate: float, aux_weight: float, steps: int, seed: int = 0) -> tuple[list[float], Tensor, float]:
    """(MaxVio of every step, loads summed over the last 50 steps, last loss) of a small layer that learns skewed data.

    24 kinds of tokens, the i-th with frequency 1/i, each a cloud around its own centre and with its own linear map to learn.  ours: all sizes
    """
    d, kinds, tokens = 32, 24, 512
    draw = torch.Generator().manual_seed(seed)
    centre_nd, map_ndd = torch.randn(kinds, d, generator=draw) + torch.randn(d, generator=draw), torch.randn(kinds, d, d, generator=draw) / d ** 0.5
    frequency_n = 1 / torch.arange(1, kinds + 1)
    torch.manual_seed(seed)
    layer = LatentMoE(d, experts=16, k=2, expert_width=32, shared_width=16, latent=16)
    optimizer, violations, loads = torch.optim.Adam(layer.parameters(), lr=3e-3), [], []

    for _ in range(steps):
        kind_r = torch.multinomial(frequency_n, tokens, replacement=True, generator=draw)
        x_rd = centre_nd[kind_r] + 0.5 * torch.randn(tokens, d, generator=draw)
        y_btd, balance = layer(x_rd.view(8, -1, d))
        loss = (y_btd.view(tokens, d) - torch.einsum("rd,rde->re", x_rd, map_ndd[kind_r])).square().mean()
        optimizer.zero_grad()
        (loss + aux_weight * balance.aux).backward()
        optimizer.step()
        update_expert_bias(layer.gate.e_score_correction_bias, balance.load_e, rate)
        violations.append(max_violation(balance.load_e).item()); loads.append(balance.load_e)
    return violations, torch.stack(loads[-50:]).sum(0), loss.item()


def measure_times(tokens: int, repeats: int = 5, device: str = "cpu", kernel: bool = False) -> dict[str, float]:
    """Milliseconds of forward and backward, best of `repeats`, at preset tiny's sizes: 16 experts, 4 chosen, latent 64, width 128."""
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=draw)
    x, up, down = ((0.1 * normal(*shape)).to(device).requires_grad_() for shape in ((tokens, 64), (16, 128, 64), (16, 64, 128)))
    weights, experts = (t.to(device) for t in route(normal(tokens, 64), 0.1 * normal(16, 64), torch.zeros(16), 4, 5.0)[:2])
    dy = normal(tokens, 64).to(device)
    rungs = {"experts_loop": experts_loop, "experts_sorted": experts_sorted, "experts_grouped": experts_grouped}
    if kernel: rungs |= {"experts_grouped": partial(experts_grouped, impl="torch"), "Triton kernel": partial(experts_grouped, impl="triton")}
    best = dict.fromkeys(rungs, math.inf)
    for _ in range(repeats):      # the rungs take turns, so a busy moment of the machine hits them alike
        for name, rung in rungs.items():
            both = lambda rung=rung: torch.autograd.grad(rung(x, weights, experts, up, down), (x, up, down), dy)
            best[name] = min(best[name], nvfp4.best_ms(both, repeats=1)[0])
    return best


def plot_balance(runs: dict[str, tuple[list[float], Tensor, float]], path: Path) -> None:
    """Left: MaxVio while the layer learns. Right: each expert's share of the tokens at the end, largest first."""
    figure, (left, right) = nvfp4.new_figure(columns=2)
    for i, (name, (violations, load_e, _)) in enumerate(runs.items()):
        smooth = torch.tensor(violations).unfold(0, min(20, len(violations)), 1).mean(-1)
        left.plot(range(len(violations) - len(smooth), len(violations)), smooth, label=name, linewidth=2)
        share_e = (100 * load_e / load_e.sum()).sort(descending=True).values
        right.bar([e + 0.4 * (i - 0.5) for e in range(1, len(share_e) + 1)], share_e, width=0.4, label=name)
    without, with_bias = (max_violation(load_e).item() for _, load_e, _ in runs.values())
    # one step routes few tokens: dice with an even chance for every expert would not fall evenly either
    dice = torch.randint(len(load_e), (200, int(load_e.sum()) // min(50, len(violations))), generator=torch.Generator().manual_seed(0))
    chance = max_violation(torch.stack([row.bincount(minlength=len(load_e)) for row in dice])).mean().item()
    left.axhline(chance, color="0.4", linestyle=":")
    left.text(0.01, chance - 0.07, f"even but for chance: {chance:.2f}", color="0.4", va="top", transform=left.get_yaxis_transform())
    left.set(title=f"The bias evens the load\n(all of the last 50 steps: {without:.1f} without, {with_bias:.1f} with it)",
             xlabel="training step (mean of the last 20)", ylabel="largest load / mean load (MaxVio)", ylim=(0.5, None))
    right.axhline(100 / len(load_e), color="0.4", linestyle=":")
    right.text(len(load_e) + 0.4, 100 / len(load_e), "even", color="0.4", ha="right", va="bottom")
    right.set(title="With the bias, every expert serves its share\n", xlabel="expert, busiest first",
              ylabel="% of the choices in the last 50 steps", xticks=range(1, len(load_e) + 1))
    for axes in (left, right): axes.legend(frameon=False)
    nvfp4.save_figure(figure, path)


# %% 10 · Demo

@dataclass(frozen=True)
class Config:
    """The demo's flags."""
    steps: int = 1000           # training steps of each balance run
    seed: int = 0               # of data and weights in the balance runs
    out: Path = Path("out")     # where figures and results.jsonl go
    impl: Literal["auto", "torch", "triton"] = "auto"     # "triton", or "auto" on a GPU, adds the kernel to the times

    def __post_init__(self):
        if self.steps < 1: raise ValueError(f"steps is {self.steps}: a balance run needs at least one step")


def show_costs(batch: int = 64) -> None:
    print(f"1 · What the latent buys: routed part of one Ultra layer (d 8192, expert width 5120), weights in NVFP4, batch of {batch} tokens")
    print(f"  {'':30} experts  top-k  width   parameters  GFLOP/token  sent KB/token  weights read GB  expert sets")
    for name, ((experts, k, width), cost) in measure_costs(batch).items():
        print(f"  {name:30} {experts:7d} {k:6g} {width:6d} {cost.parameters / 1e9:10.2f} B {cost.flops / 1e9:12.3f} {cost.sent_bytes / 1e3:14.1f} "
              f"{cost.read_bytes / 1e9:16.2f}  {'10^' + format(cost.log10_choices, '.0f'):>11}")
    print("  A latent of a quarter pays for four times the experts and four times the choices: same parameters, work and traffic, but for the\n"
          "  two projections. Top 5.5 stands between 5 and 6; it makes the bills equal.\n")


def show_routing() -> None:
    scores_re = torch.tensor([[0.9, 0.6, 0.3, 0.2], [0.8, 0.5, 0.4, 0.1], [0.7, 0.3, 0.5, 0.4]])
    bias_e = torch.tensor([0.0, 0.0, 0.0, 0.35])
    weights_rk, experts_rk, _ = route(torch.logit(scores_re), torch.eye(4), bias_e, k=2, scale=1.0)
    print("2 · Three tokens, four experts, two chosen; expert 3 was idle, so its bias has grown to 0.35")
    print("  token   scores                 score + bias           chosen   weights (from the scores alone)")
    row = lambda values: "  ".join(f"{v:.2f}" for v in values.tolist())
    for i in range(3):
        print(f"  {i:5d}   {row(scores_re[i])}   {row(scores_re[i] + bias_e)}   {experts_rk[i].tolist()}   {row(weights_rk[i])}")
    load_e = count_load(experts_rk, 4)
    print(f"  loads {load_e.tolist()}   MaxVio {max_violation(load_e):.2f}   dead {dead_experts(load_e)}\n")


def show_balance(config: Config) -> None:
    print(f"3 · Balance: 16 experts, 2 chosen, skewed data, {config.steps} steps; the second run balances as the report does")
    print("                            MaxVio of the    busiest expert            training")
    print("  run                       last 50 steps    (even: 6%)        dead    loss")
    runs = {}
    for name, rate in {"loss 1e-4 only": 0.0, "loss 1e-4 and bias 1e-3": 1e-3}.items():
        runs[name] = _, load_e, loss = measure_balance(rate, 1e-4, config.steps, config.seed)
        violation, share, dead = max_violation(load_e).item(), (load_e.max() / load_e.sum()).item(), int(dead_experts(load_e))
        print(f"  {name:25} {violation:13.2f} {share:13.0%} {dead:15d} {loss:9.3f}")
        nvfp4.write_row(config.out, "03_latentmoe", run=name, steps=config.steps, seed=config.seed, max_violation=round(violation, 3), dead=dead,
                        loss=round(loss, 4))
    plot_balance(runs, config.out / "03_balance.png")
    print("  A small layer pays for balance with a little loss; a large one, spread over many GPUs, waits in every step for its busiest expert.")
    print(f"  figure: {config.out / '03_balance.png'}\n")


def show_times(config: Config) -> None:
    device = nvfp4.demo_device(config.impl)
    where = f"{torch.get_num_threads()} thread(s)" if device == "cpu" else torch.cuda.get_device_name()
    kernel = config.impl == "triton" or device == "cuda"
    print(f"4 · Forward and backward in ms, preset tiny's experts, fp32, {where}")
    for tokens in (64, 512, 4096) if device == "cuda" or not kernel else (64,):       # the interpreter takes its time
        ms = measure_times(tokens, device=device, kernel=kernel)
        if tokens == 64: print("  tokens" + "".join(f"{name:>18}" for name in ms) + "   loop / grouped")
        print(f"  {tokens:6d}" + "".join(f"{v:18.2f}" for v in ms.values()) + f"{ms['experts_loop'] / ms['experts_grouped']:16.1f}x")
        nvfp4.write_row(config.out, "03_latentmoe", run="times", tokens=tokens, where=where, **{name: round(v, 3) for name, v in ms.items()})


def main(config: Config) -> None:
    nvfp4.writable_folder(config.out)
    show_costs()
    show_routing()
    show_balance(config)
    show_times(config)


if __name__ == "__main__":
    nvfp4.run_command(main, Config, __doc__)
