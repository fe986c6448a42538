"""02 · Mamba-2: the layer that reads a sequence with a state of fixed size, from the recurrence to chunks of matrix products.

You write the same sequence map three times: a recurrence (linear in time, one token after the other), a masked attention matrix (parallel,
quadratic) and a chunked scan (parallel inside a chunk, linear over chunks). Around it grow a short convolution, a gated norm, the one-token
step that decoding uses, the exchange between GPUs that share one sequence, and the layer as Nemotron 3 releases it.

Left out: starting several processes and cutting the sequence for them (stage 05), the bookkeeping of slots, drafts and replays (decoding,
          stage 08), the Triton kernels.
Sources:  [M2] Dao & Gu, Transformers are SSMs, 2405.21060; [M1] Gu & Dao, Mamba, 2312.00752; [Ultra] Nemotron 3 Ultra report, 2606.15007;
          [Config] its released config.json; [HF] modeling_nemotron_h.py in transformers; [Megatron] Megatron-LM's Mamba mixer.
Run:      python 02_mamba.py          # CPU, 10 s: compares the three rungs, shows what heads remember and what a cache costs, figures in out/
          python 02_mamba.py --impl triton     # GPU: adds the kernel to the table
Contents: 1 Documents and arguments   2 Recurrence   3 Quadratic form   4 Chunked scan   5 Causal convolution   6 Norms
          7 One decode step   8 Context parallelism   9 The layer and its cache   10 Measurements   11 Figures   12 Main
Letters:  b batch  t time  s source time  d model width  h heads  g groups  p head width  n state  c conv channels  r flattened rows (b·t);
          and in this file only: w taps of the convolution, i inner width (h·p), j heads of one group (h/g), q their rows (j·p), k ranks
"""
from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

nvfp4 = importlib.import_module("01_nvfp4")


# %% 1 · Documents and arguments
# The map all three rungs compute, for one head with state S [p, n], input x [p], step dt > 0 and decay A < 0; B and C [n] are shared by the
# heads of a group, as keys and queries are in grouped-query attention:
#     S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_tᵀ          y_t = S_t C_t + D x_t
# A row may pack several documents and padding. A new document starts from a zero state. Padding is a token that is not there: dt = 0 leaves
# the state alone, and its output is 0.

def fill_padding(doc_bt: Tensor) -> Tensor:
    """Document ids with padding (-1) given its neighbour's: the document before it, or at the left edge the one after.  -1 7 -1 8 -> 7 7 7 8."""
    pad_bt, t = doc_bt < 0, doc_bt.shape[1]
    real_bt = torch.arange(t, device=doc_bt.device).expand_as(doc_bt).masked_fill(pad_bt, -1).cummax(1).values   # last real token so far
    first_b1 = (~pad_bt).int().argmax(1, keepdim=True)
    return doc_bt.gather(1, torch.where(real_bt < 0, first_b1, real_bt))


def segments(doc_bt: Tensor) -> Tensor:
    """How many changes of document lie behind each token, int64 [b, t]: ids may come back.  0 0 1 -1 0 -> 0 0 1 1 2."""
    filled_bt = fill_padding(doc_bt)
    return F.pad(filled_bt[:, 1:] != filled_bt[:, :-1], (1, 0)).cumsum(1)


def padding(doc_bt: Tensor | None) -> Tensor | None:
    """Where padding is, bool [b, t], or None when there is none, as in most packed rows: every mask is a pass over the data. On a GPU the mask
    always, since asking whether there is any would make the host wait."""
    pad_bt = None if doc_bt is None else doc_bt < 0
    return pad_bt if pad_bt is not None and (pad_bt.is_cuda or pad_bt.any()) else None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that decays, states and norms are computed in: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(x: Tensor):
    """A context in which autocast leaves matrix products in the dtype they are written in."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def check_shapes(shapes: dict[str, tuple[Tensor | None, tuple]], **letters: int) -> None:
    """ValueError that names the argument whose shape does not fit; None is an argument left out."""
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            known = ", ".join(f"{letter}={size}" for letter, size in letters.items())
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} where {shape} is needed (from the other arguments: {known}).")


def prepare(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, state_bhpn, doc_bt):
    """The rungs' arguments checked, in the wide dtype, with defaults in place and dt = 0 at padding (whose x must be finite), then the
    segment of each token and where padding is."""
    if x_bthp.dim() != 4 or B_btgn.dim() != 4:
        raise ValueError(f"x is [b, t, h, p] and B is [b, t, g, n]: got {tuple(x_bthp.shape)} and {tuple(B_btgn.shape)}.")
    (b, t, h, p), (g, n) = x_bthp.shape, B_btgn.shape[2:]
    check_shapes({"dt_bth": (dt_bth, (b, t, h)), "A_h": (A_h, (h,)), "B_btgn": (B_btgn, (b, t, g, n)), "C_btgn": (C_btgn, (b, t, g, n)),
                  "D_h": (D_h, (h,)), "state_bhpn": (state_bhpn, (b, h, p, n)), "doc_bt": (doc_bt, (b, t))}, b=b, t=t, h=h, p=p, g=g, n=n)
    if t == 0: raise ValueError("the sequence is empty: pass at least one token.")
    if h % g: raise ValueError(f"{h} heads cannot share B and C in {g} groups: the number of heads must be a multiple of the groups.")
    if A_h.device.type == "cpu" and (A_h > 0).any():       # on a GPU the look would stop the queue
        raise ValueError("A_h must not be positive, or states grow without bound: pass -exp(A_log).")
    tensors = [x_bthp, dt_bth, A_h, B_btgn, C_btgn, x_bthp.new_zeros(h) if D_h is None else D_h,
               x_bthp.new_zeros(b, h, p, n) if state_bhpn is None else state_bhpn]
    x, dt, *others = (z.to(wide(x_bthp.dtype)) for z in tensors)
    if doc_bt is None: return x, dt, *others, None, None
    pad_bt = padding(doc_bt)
    return x, dt if pad_bt is None else dt.masked_fill(pad_bt[..., None], 0), *others, segments(doc_bt), pad_bt


def finish(y: Tensor, pad_bt: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y [b, t, ...] in the caller's dtype, 0 at padding."""
    return (y if pad_bt is None else y.masked_fill(pad_bt.view(*pad_bt.shape, *[1] * (y.dim() - 2)), 0)).to(dtype)


# %% 2 · Recurrence  [M2, the SSM recurrence]
# Rung 1, the definition. One step a token: nothing to get wrong, and nothing for a GPU to do in parallel.

def ssd_recurrence(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h=None, state_bhpn=None, doc_bt=None) -> tuple[Tensor, Tensor]:
    """-> (y_bthp in x's dtype, final state_bhpn in fp32 or fp64). dt is after softplus and limits; A_h <= 0."""
    dtype = x_bthp.dtype
    x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, S_bhpn, segment_bt, pad_bt = \
        prepare(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, state_bhpn, doc_bt)
    B_bthn, C_bthn = (z.repeat_interleave(x_bthp.shape[2] // z.shape[2], dim=2) for z in (B_btgn, C_btgn))
    ys = []
    for t in range(x_bthp.shape[1]):
        if segment_bt is not None and t > 0:
            S_bhpn = S_bhpn * (segment_bt[:, t] == segment_bt[:, t - 1])[:, None, None, None]
        decay_bh = (dt_bth[:, t] * A_h).exp()
        S_bhpn = decay_bh[..., None, None] * S_bhpn + torch.einsum("bh,bhp,bhn->bhpn", dt_bth[:, t], x_bthp[:, t], B_bthn[:, t])
        ys.append(torch.einsum("bhpn,bhn->bhp", S_bhpn, C_bthn[:, t]) + D_h[:, None] * x_bthp[:, t])
    return finish(torch.stack(ys, 1), pad_bt, dtype), S_bhpn


# %% 3 · Quadratic form  [M2, state space duality]
# Rung 2: unroll the recurrence and y = M x, a causal attention matrix without softmax, whose entries fade with the distance in steps dt:
#     M_ts = (C_t · B_s) exp(cs_t - cs_s) dt_s   for s <= t,      cs_t = sum of dt A up to t
# One product a head, and t² numbers: what the recurrence lacks in parallelism this pays in work.

def ssd_quadratic(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h=None, state_bhpn=None, doc_bt=None) -> tuple[Tensor, Tensor]:
    """Same arguments and results as ssd_recurrence."""
    dtype = x_bthp.dtype
    x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, S_bhpn, segment_bt, pad_bt = \
        prepare(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, state_bhpn, doc_bt)
    t, h = x_bthp.shape[1:3]
    segment_bt = torch.zeros_like(dt_bth[..., 0]) if segment_bt is None else segment_bt
    B_bthn, C_bthn = (z.repeat_interleave(h // z.shape[2], dim=2) for z in (B_btgn, C_btgn))
    u_bthp, cs_bth = dt_bth[..., None] * x_bthp, (dt_bth * A_h).cumsum(1)

    visible_bts = torch.ones(t, t, dtype=torch.bool, device=x_bthp.device).tril() & (segment_bt[:, :, None] == segment_bt[:, None, :])
    # PITFALL: mask before exp. Above the diagonal cs_t - cs_s is positive: exp gives inf, and inf times a mask's 0 is NaN.
    decay_btsh = (cs_bth[:, :, None] - cs_bth[:, None]).masked_fill(~visible_bts[..., None], -math.inf).exp()
    M_btsh = torch.einsum("bthn,bshn->btsh", C_bthn, B_bthn) * decay_btsh
    first_bth = cs_bth.exp() * (segment_bt == 0)[..., None]         # the incoming state is the first document's
    y_bthp = torch.einsum("btsh,bshp->bthp", M_btsh, u_bthp) + torch.einsum("bth,bthn,bhpn->bthp", first_bth, C_bthn, S_bhpn)

    S_bhpn = first_bth[:, -1, :, None, None] * S_bhpn + torch.einsum("bsh,bshp,bshn->bhpn", decay_btsh[:, -1], u_bthp, B_bthn)
    return finish(y_bthp + D_h[:, None] * x_bthp, pad_bt, dtype), S_bhpn


# %% 4 · Chunked scan  [M2, the SSD algorithm]
# Rung 3: the quadratic form inside chunks, the recurrence between them. Per chunk of length L, with the state S that comes in:
#     y = (C Bᵀ * decay) u + into * (C Sᵀ)            u = dt x,   into_t = exp(cs_t)            cs counted from the chunk's start
#     S <- keep * S + (out * u)ᵀ B                    out_s = exp(cs_L - cs_s),   keep = exp(cs_L)
# Work: t·L for the first product, t·n for the others. Heads of a group share C Bᵀ, and stand side by side as the q rows of one product with
# B or C. Time is the last dimension, so that [h, p, t] and [g, q, t] are two views of one tensor.
# A loop over chunks keeps one chunk's matrices in the processor's cache; the largest thing in memory is one state a chunk. And sums that
# start anew with each chunk keep their digits: over thousands of tokens cs_t - cs_s is the small difference of two large numbers.

class Chunk(NamedTuple):
    """What the forward and the backward pass both need of one chunk; t is the token that reads, s the one that is read."""
    u_bhpt: Tensor          # dt x
    B_bgsn: Tensor
    C_bgtn: Tensor
    hidden_bgts: Tensor     # bool: s is later than t, or in another document
    scores_bgts: Tensor     # C_t · B_s, 0 where hidden
    decay_bhts: Tensor      # exp(cs_t - cs_s); hidden entries are finite and meaningless
    into_bh1t: Tensor       # decay from the chunk's start to t; 0 once another document has begun
    out_bh1s: Tensor        # decay from s to the chunk's end; 0 for documents that have ended by then
    keep_bh11: Tensor       # decay of the incoming state over the whole chunk


def fade(log_decay: Tensor) -> Tensor:
    """exp, for exponents that are never positive where the result is used.

    PITFALL: clamp before exp. Hidden entries are positive and would overflow to inf, and inf times a mask's 0 is NaN. And below exp(-87)
    fp32 numbers are denormal, which a CPU multiplies many times more slowly: exp(-80) = 2e-35 is nothing and still a normal number.
    """
    return log_decay.clamp(-80, 0).exp_()


def open_chunk(x_bthp, dt_bth, A_h, B_btgn, C_btgn, segment_bt, lo: int, hi: int) -> Chunk:
    u_bhpt = (x_bthp[:, lo:hi] * dt_bth[:, lo:hi, :, None]).permute(0, 2, 3, 1).contiguous()
    B_bgsn, C_bgtn = (z[:, lo:hi].transpose(1, 2).contiguous() for z in (B_btgn, C_btgn))
    cs_bht = (dt_bth[:, lo:hi] * A_h).transpose(1, 2).cumsum(-1)
    decay_bhts = fade(cs_bht[..., :, None] - cs_bht[..., None, :])
    into_bh1t, out_bh1s = fade(cs_bht)[:, :, None], fade(cs_bht[..., -1:] - cs_bht)[:, :, None]

    hidden_bgts = torch.ones(hi - lo, hi - lo, dtype=torch.bool, device=u_bhpt.device).triu(1)
    if segment_bt is not None:
        here_bt = segment_bt[:, lo:hi]
        before_b1 = segment_bt[:, lo - 1:lo] if lo else torch.zeros_like(here_bt[:, :1])
        hidden_bgts = (hidden_bgts | (here_bt[:, :, None] != here_bt[:, None, :]))[:, None]
        into_bh1t = into_bh1t * (here_bt == before_b1)[:, None, None]
        out_bh1s = out_bh1s * (here_bt == here_bt[:, -1:])[:, None, None]
    scores_bgts = (C_bgtn @ B_bgsn.mT).masked_fill_(hidden_bgts, 0)
    return Chunk(u_bhpt, B_bgsn, C_bgtn, hidden_bgts, scores_bgts, decay_bhts, into_bh1t, out_bh1s, into_bh1t[..., -1:])


def by_group(z_bhpx: Tensor, groups: int) -> Tensor:
    """[b, h, p, x] -> [b, g, q, x], a view."""
    b, h, p, x = z_bhpx.shape
    return z_bhpx.view(b, groups, h // groups * p, x)


class _ChunkedScan(torch.autograd.Function):
    """y and the final state. The backward pass opens each chunk again instead of storing its matrices."""

    @staticmethod
    def forward(ctx, x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, S_bhpn, segment_bt, chunk: int, for_backward: bool):
        t, g = x_bthp.shape[1], B_btgn.shape[2]
        y_bthp, states = torch.empty_like(x_bthp, memory_format=torch.contiguous_format), [S_bhpn.clone(memory_format=torch.contiguous_format)]
        for lo in range(0, t, chunk):
            one, S_bhpn = open_chunk(x_bthp, dt_bth, A_h, B_btgn, C_btgn, segment_bt, lo, min(lo + chunk, t)), states[-1]
            # 1. what the chunk's tokens give each other   2. what the state brings in   3. the state after the chunk
            M_bhts = one.decay_bhts.unflatten(1, (g, -1)).mul_(one.scores_bgts[:, :, None]).flatten(1, 2)
            y_bhpt = one.u_bhpt @ M_bhts.mT
            y_bhpt += (by_group(S_bhpn, g) @ one.C_bgtn.mT).view_as(y_bhpt) * one.into_bh1t
            y_bthp[:, lo:lo + chunk] = y_bhpt.permute(0, 3, 1, 2)
            S_bhpn = S_bhpn * one.keep_bh11 + (by_group(one.u_bhpt * one.out_bh1s, g) @ one.B_bgsn).view_as(S_bhpn)
            if not for_backward: states.clear()
            states.append(S_bhpn)
        if for_backward: ctx.save_for_backward(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, segment_bt, y_bthp, *states)
        ctx.chunk = chunk
        return torch.addcmul(y_bthp, x_bthp, D_h[:, None]), states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_bthp, dS_bhpn):
        """The usual rules for products. The decays need none: they enter as exp(cs_t - cs_s) only, so the gradient of cs gathers <dy, y>
        at the token that reads, -<du, u> at the one that is read and <dS, S> at the chunk's end."""
        x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, segment_bt, y_bthp, *states = ctx.saved_tensors
        t, g = x_bthp.shape[1], B_btgn.shape[2]
        dx_bthp, ddt_bth, dB_btgn, dC_btgn = (torch.empty_like(z, memory_format=torch.contiguous_format) for z in (x_bthp, dt_bth, B_btgn, C_btgn))
        dA_h, dD_h, dS_bhpn = torch.zeros_like(A_h), torch.zeros_like(D_h), dS_bhpn.contiguous()
        with full_precision(x_bthp):
            for i in reversed(range(len(states) - 1)):
                part = slice(i * ctx.chunk, min((i + 1) * ctx.chunk, t))
                one = open_chunk(x_bthp, dt_bth, A_h, B_btgn, C_btgn, segment_bt, part.start, part.stop)
                x, dt, dy = x_bthp[:, part], dt_bth[:, part], dy_bthp[:, part]
                dy_bhpt, end_bh = dy.permute(0, 2, 3, 1).contiguous(), (dS_bhpn * states[i + 1]).sum((2, 3))
                # 1. inside the chunk
                decay_bgjts = one.decay_bhts.unflatten(1, (g, -1))
                du_bhpt = dy_bhpt @ (decay_bgjts * one.scores_bgts[:, :, None]).flatten(1, 2)
                dscores_bgts = decay_bgjts.mul_((dy_bhpt.mT @ one.u_bhpt).view_as(decay_bgjts)).sum(2).masked_fill_(one.hidden_bgts, 0)
                # 2. through the state
                dy_bgqt, u_bgqs = by_group(dy_bhpt * one.into_bh1t, g), by_group(one.u_bhpt * one.out_bh1s, g)
                S_bgqn, dS_bgqn = by_group(states[i], g), by_group(dS_bhpn, g)
                du_bhpt += (dS_bgqn @ one.B_bgsn.mT).view_as(du_bhpt) * one.out_bh1s
                dB_btgn[:, part] = (u_bgqs.mT @ dS_bgqn + dscores_bgts.mT @ one.C_bgtn).transpose(1, 2)
                dC_btgn[:, part] = (dy_bgqt.mT @ S_bgqn + dscores_bgts @ one.B_bgsn).transpose(1, 2)
                dS_bhpn = dS_bhpn * one.keep_bh11 + (dy_bgqt @ one.C_bgtn).view_as(dS_bhpn)
                # 3. u = dt x, the skip D x, and the decays: dt A of a token is part of every later cs
                du = du_bhpt.permute(0, 3, 1, 2).contiguous()
                dux = (du * x).sum(-1)
                dcs = (dy * y_bthp[:, part]).sum(-1) - dt * dux
                dcs[:, -1] += end_bh
                da = dcs.flip(1).cumsum(1).flip(1)
                torch.mul(du, dt[..., None], out=dx_bthp[:, part]).addcmul_(dy, D_h[:, None])
                torch.addcmul(dux, da, A_h, out=ddt_bth[:, part])
                dA_h += (da * dt).sum((0, 1))
                dD_h += (dy * x).sum((0, 1, 3))
        return dx_bthp, ddt_bth, dA_h, dB_btgn, dC_btgn, dD_h, dS_bhpn, None, None, None


def ssd_chunked(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h=None, chunk: int = 128, state_bhpn=None, doc_bt=None,
                impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Same results as ssd_recurrence, for any length. bf16 inputs are computed in fp32 and only y is rounded back.

    ours: the backward pass is written by hand; autograd's through the same products is slower and stores every chunk's matrices.
    """
    if twin := nvfp4.find_twin("ssd", "ssd_chunked", impl, x_bthp):
        return twin(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, chunk, state_bhpn, doc_bt)
    if chunk < 1: raise ValueError(f"chunk={chunk}: a chunk holds at least one token.")
    x, dt, A, B, C, D, S, segment_bt, pad_bt = prepare(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, state_bhpn, doc_bt)
    with full_precision(x):
        y, S = _ChunkedScan.apply(x, dt, A, B, C, D, S, segment_bt, chunk, torch.is_grad_enabled())
        return finish(y, pad_bt, x_bthp.dtype), S


# %% 5 · Causal convolution  [M1, the Mamba block]
# Every channel mixes its last w inputs, y_t = silu(bias + sum_k weight_k x_(t-w+1+k)), before the scan sees it: with w = 4 a head can tell
# "the token after a comma" without spending state on it. The last w - 1 inputs are the window that the next call starts from.
# Documents must not see each other and padding must not be seen, so they are laid on a longer tape: real tokens only, w - 1 zeros before each
# new document. One ordinary convolution over the tape then serves all.

def depthwise(tape_btc: Tensor, weight_c1w: Tensor) -> Tensor:
    """[b, t + w - 1, c] -> [b, t, c]. As a 2D convolution of height 1: PyTorch runs that one on channels-last data as it lies."""
    if tape_btc.shape[1] == weight_c1w.shape[-1]:                       # one token: calling a convolution costs more than its work
        return (tape_btc * weight_c1w[:, 0].T).sum(1, keepdim=True)
    return F.conv2d(tape_btc.mT.unsqueeze(2), weight_c1w.unsqueeze(2), groups=tape_btc.shape[-1]).squeeze(2).mT


def tape_slots(doc_bt: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """Each token's slot on the tape [b, t], padding at -1, and the slot of the row's last token [b]; the window lies in slots 0 .. w-2.

    Two documents, w = 4:   5 5 -1 6 -> 3 4 -1 8, as slots 5 6 7 hold the zeros.
    """
    real_bt = doc_bt >= 0
    slot_bt = (w - 1) * (1 + segments(doc_bt)) + real_bt.cumsum(1) - 1
    return slot_bt.masked_fill(~real_bt, -1), slot_bt.masked_fill(~real_bt, w - 2).amax(1)


def causal_conv1d(x_btc: Tensor, weight_c1w: Tensor, bias_c: Tensor, window: Tensor | None = None, doc_bt: Tensor | None = None,
                  impl: str = "auto") -> tuple[Tensor, Tensor]:
    """-> (silu of the convolution [b, t, c], the window for the next call [b, w-1, c]), both in x's dtype, computed in fp32 or fp64.

    window: the inputs before x, None = zeros. It belongs to the first document of doc_bt; the one returned holds the last document's inputs.
    """
    if twin := nvfp4.find_twin("conv1d", "causal_conv1d", impl, x_btc): return twin(x_btc, weight_c1w, bias_c, window, doc_bt)
    (b, t, c), w = x_btc.shape, weight_c1w.shape[-1]
    check_shapes({"weight_c1w": (weight_c1w, (c, 1, w)), "bias_c": (bias_c, (c,)), "window": (window, (b, w - 1, c)), "doc_bt": (doc_bt, (b, t))},
                 b=b, t=t, c=c, w=w)
    x, weight, bias = (z.to(wide(x_btc.dtype)) for z in (x_btc, weight_c1w, bias_c))
    window = x.new_zeros(b, w - 1, c) if window is None else window.to(x.dtype)
    with full_precision(x):
        if doc_bt is None:
            tape = torch.cat([window, x], 1)
            y, window = depthwise(tape, weight), tape[:, t:]
        else:
            slot_bt, last_b = tape_slots(doc_bt, w)
            length = int(last_b.max()) + 2                              # one more slot at the end, where padding is thrown
            row_b1 = torch.arange(b, device=x.device)[:, None]
            put_r = (row_b1 * length + torch.where(slot_bt < 0, length - 1, slot_bt)).flatten()
            take_r = (row_b1 * (length - w + 1) + (slot_bt - w + 1).clamp(min=0)).flatten()
            tape = F.pad(window, (0, 0, 0, length - w + 1)).flatten(0, 1).index_copy_(0, put_r, x.flatten(0, 1)).view(b, length, c)
            y = depthwise(tape, weight).flatten(0, 1).index_select(0, take_r).view(b, t, c)
            window = tape[row_b1, last_b[:, None] + torch.arange(2 - w, 1, device=x.device)]
        # the bias is added here because the convolution's own gradient for it is slow on channels-last data
        y = F.silu(y + bias)
    return finish(y, padding(doc_bt), x_btc.dtype), window.to(x_btc.dtype)


# %% 6 · Norms  [HF; Megatron]
# RMSNorm divides a token by its root mean square and learns one factor a channel. Mamba's output norm is gated and works group by group, so
# that a group's heads can live on one GPU:  u = y * silu(z),  then RMSNorm of each of the g parts of u.

def rmsnorm(x: Tensor, weight: Tensor, eps: float = 1e-5, impl: str = "auto") -> Tensor:
    """x / rms(x) * weight over the last dimension: in fp32 (or fp64) up to and with the weight, then back to x's dtype."""
    if twin := nvfp4.find_twin("norm", "rmsnorm", impl, x): return twin(x, weight, eps)
    u = x.to(wide(x.dtype))
    return F.rms_norm(u, (u.shape[-1],), weight.to(u.dtype), eps).to(x.dtype)      # u / sqrt(mean(u²) + eps) · weight, in one call


def add_rmsnorm(x: Tensor, y: Tensor, weight: Tensor, eps: float = 1e-5, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """(x + y, rmsnorm of that): the end of one residual block and the beginning of the next, for inference. The twin has no gradient."""
    if twin := nvfp4.find_twin("norm", "add_rmsnorm", impl, x): return twin(x, y, weight, eps)
    x = x + y
    return x, rmsnorm(x, weight, eps, impl)


def gated_rmsnorm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float = 1e-5, impl: str = "auto") -> Tensor:
    """norm(y * silu(z)) group by group over the last dimension, times weight; in fp32 (or fp64), then back to y's dtype.

    PITFALL: the gate comes first. The other order, silu(z) * norm(y), exists in other Mamba-2 code and gives a model that half works.
    """
    if twin := nvfp4.find_twin("norm", "gated_rmsnorm", impl, y): return twin(y, z, weight, groups, eps)
    if y.shape != z.shape or y.shape[-1] % groups:
        raise ValueError(f"y and z must have one shape whose last dimension splits into {groups} groups: got {tuple(y.shape)} and {tuple(z.shape)}.")
    u = (y.to(wide(y.dtype)) * F.silu(z.to(wide(y.dtype)))).view(*y.shape[:-1], groups, -1)
    return (F.rms_norm(u, (u.shape[-1],), None, eps).view(y.shape) * weight).to(y.dtype)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor, impl: str = "auto") -> Tensor:
        return rmsnorm(x, self.weight, self.eps, impl)


class GatedRMSNorm(RMSNorm):
    def __init__(self, width: int, groups: int, eps: float = 1e-5):
        super().__init__(width, eps)
        self.groups = groups

    def forward(self, y: Tensor, z: Tensor, impl: str = "auto") -> Tensor:
        return gated_rmsnorm(y, z, self.weight, self.groups, self.eps, impl)


# %% 7 · One decode step  [Ultra, inference; FlashInfer, state update]
# While writing text the model gets one token a call, and the recurrence is the fastest form: read the state once, write it once. The cost
# does not depend on how long the text already is.
#
# Slots. A server keeps the states of all its sequences in one pool [slots, h, p, n]; a batch names the slot of each row. So sequences come and
# go without a copy, and a row without a sequence names slot -1.
# Drafts. With t tokens a row at once, of which a verifier may reject the last ones, keys and values are cut off at the accepted length. A state
# cannot be: it has no inverse step (a decay that underflowed forgot for good). There are two ways back:
#   snapshot  write="each" stores the state after every token, t + 1 slots a sequence; accepting a tokens means to go on from the a-th. The
#             states of Ultra's 48 layers are 403 MB in fp32: a draft of 6 writes them 6 times.
#   replay    write="none" stores nothing. The caller keeps the inputs x, dt, B and C since the last state that was written, which are small
#             beside a state, and passes them again before the new tokens; rejected ones it forgets. When some 16 have gathered, write="last"
#             with the accepted ones moves the state up. It writes no state where the snapshot writes t, and pays with arithmetic on old tokens.
# Both give the same numbers. Rows of unequal length are filled up with dt = 0, tokens that leave the state alone; their y means nothing.
# Formats. The state is the traffic, so fewer bits are speed: fp16 halves it, int8 with one scale a row of n values quarters it. Arithmetic stays
# in fp32, and a state is rounded when it is written.
# PITFALL: rounding to nearest once a token is biased. A slow head adds less than half a step and is rounded back to where it was, or fails to
# decay, every time. Stochastic rounding (_sr) goes up with the probability that makes the mean right; its noise averages out.

STATE_FORMATS = {"fp32": torch.float32, "fp16": torch.float16, "fp16_sr": torch.float16, "int8": torch.int8, "int8_sr": torch.int8}
FP16_MAX, FP16_NORMAL = 65504.0, 2.0**-14       # largest value; below the second the step stays 2^-24
INT8_TINY = 1e-30       # ours: a row with nothing larger is stored as zeros; 127 / amax would leave fp32 at 4e-37


class QuantizedState(NamedTuple):
    """A state in int8: value = code · scale."""
    codes: Tensor       # int8 [..., p, n], -127 .. 127
    scale: Tensor       # fp32 [..., p]


def parts(state: Tensor | QuantizedState) -> tuple[Tensor, ...]:
    return state if isinstance(state, QuantizedState) else (state,)


def dequantize_state(state: Tensor | QuantizedState) -> Tensor:
    """In fp32 (fp64 stays)."""
    return state.codes * state.scale[..., None] if isinstance(state, QuantizedState) else state.to(wide(state.dtype))


def fp16_stochastic(x: Tensor, u: Tensor) -> Tensor:
    """fp32 -> fp16 with the top 13 bits of u added to the 13 bits that fp16 drops: a carry rounds up, with exactly the dropped bits' probability.

    Beyond 65504 the result is 65504. Subnormals are first moved to 2^-14 .. 2^-13, where fp32's 13 lowest bits lie below their step of 2^-24 too.
    """
    x = x.clamp(-FP16_MAX, FP16_MAX)
    shift = torch.where(x.abs() < FP16_NORMAL, torch.full_like(x, FP16_NORMAL).copysign(x), 0.0)
    bits = (x + shift).view(torch.int32) + (u * 2**13).int()
    rounded = (bits & ~0x1FFF).view(torch.float32) - shift
    return torch.where(x.isnan(), x, rounded).half()        # a carry out of a NaN's bits would make it 0


def check_format(state_format: str, seed: int | Tensor | None) -> None:
    if state_format not in STATE_FORMATS: raise ValueError(f"state_format={state_format!r} is unknown: use one of {', '.join(STATE_FORMATS)}.")
    if isinstance(seed, Tensor) and (seed.numel() != 1 or seed.dtype != torch.int64):
        raise ValueError(f"a seed in memory is one int64 number, not {seed.dtype} of shape {tuple(seed.shape)}.")
    if state_format.endswith("_sr") and seed is None: raise ValueError(f"state_format={state_format!r} rounds stochastically: pass a seed.")


def quantize_state(state_bhpn, state_format: str, seed: int | Tensor | None = None, offset: int = 0, impl: str = "auto") -> Tensor | QuantizedState:
    """fp32 [..., p, n] in another format: a tensor, or codes and scales. The draw of stage 01 for element i is number offset + i of `seed`.

    int8: scale = amax / 127 of each row of n values; a code is x · (127 / amax), to nearest even, or floor(that + u).
    """
    if twin := nvfp4.find_twin("state_update", "quantize_state", impl, state_bhpn): return twin(state_bhpn, state_format, seed, offset)
    check_format(state_format, seed)
    if state_format == "fp32": return state_bhpn
    x, u = state_bhpn.float(), None
    if state_format.endswith("_sr"):
        lead, count = offset % 16, x.numel()        # draws come in blocks of 16
        blocks = nvfp4.uniform_draws(int(seed), offset - lead, (lead + count + 15) // 16 * 16, x.device)
        u = blocks[lead:lead + count].view(x.shape)
    if state_format.startswith("fp16"): return x.clamp(-FP16_MAX, FP16_MAX).half() if u is None else fp16_stochastic(x, u)
    amax = x.abs().amax(-1, keepdim=True)
    # PITFALL: torch computes `127 / tensor` as reciprocal times 127, which rounds twice. A true division needs two tensors.
    up = torch.where(amax > INT8_TINY, torch.full_like(amax, 127) / amax, 0.0)
    scale = torch.where(amax > INT8_TINY, amax / torch.full_like(amax, 127), 1.0)       # a row of nothing gets scale 1 and codes 0
    codes = (x * up).round() if u is None else (x * up + u).floor()
    return QuantizedState(codes.clamp(-127, 127).to(torch.int8), scale[..., 0])


def check_step(x, dt, A_h, B, C, D_h, state, doc_b, slots_b, write, state_format, seed) -> Tensor | QuantizedState:
    """The step's arguments checked -> the state, zeros when it was None."""
    check_format(state_format, seed)
    if x.dim() not in (3, 4) or B.dim() != x.dim():
        raise ValueError(f"x is [b, h, p] or [b, t, h, p], and B has as many dimensions: got {tuple(x.shape)} and {tuple(B.shape)}.")
    lead, (h, p), (g, n) = tuple(x.shape[:-2]), x.shape[-2:], B.shape[-2:]
    b, t = lead[0], 1 if x.dim() == 3 else lead[1]
    if not 1 <= t <= 32: raise ValueError(f"a step takes 1 to 32 tokens a row, not {t}: longer pieces are ssd_chunked's.")
    if h % g: raise ValueError(f"{h} heads cannot share B and C in {g} groups: the number of heads must be a multiple of the groups.")
    if write not in ("last", "each", "none"): raise ValueError(f"write={write!r} is unknown: use 'last', 'each' or 'none'.")
    if slots_b is None and write == "each": raise ValueError("write='each' needs slots_b [b, 1 + t]: where to read, and where each state goes.")
    if slots_b is not None and (state is None or slots_b.dtype not in (torch.int32, torch.int64)):
        raise ValueError("slots_b is int32 or int64 and needs a pool of states to point into.")
    if state is None:
        zeros = torch.zeros(b, h, p, n, device=x.device, dtype=wide(x.dtype))
        state = quantize_state(zeros, state_format.removesuffix("_sr"), impl="torch")
    codes, *scale = parts(state)
    allowed = (torch.float32, torch.float64) if state_format == "fp32" else (STATE_FORMATS[state_format],)
    if codes.dtype not in allowed or len(scale) != (codes.dtype == torch.int8) or not all(z.is_contiguous() for z in parts(state)):
        raise ValueError(f"the state must be contiguous and {' or '.join(map(str, allowed))} for state_format={state_format!r}, not {codes.dtype}: "
                         "make it with Mamba2.empty_cache or quantize_state.")
    slots = b if slots_b is None else len(codes)
    check_shapes({"dt": (dt, (*lead, h)), "A_h": (A_h, (h,)), "B": (B, (*lead, g, n)), "C": (C, (*lead, g, n)), "D_h": (D_h, (h,)),
                  "state_bhpn": (codes, (slots, h, p, n)), "its scale": (scale[0] if scale else None, (slots, h, p)), "doc_b": (doc_b, (b,)),
                  "slots_b": (slots_b, (b, 1 + t) if write == "each" else (b,))}, b=b, t=t, h=h, p=p, g=g, n=n)
    return state


def move_state(S_bhpn, x_bhp, dt_bh, A_h, B_bgn, C_bgn, D_h, doc_b) -> Tensor:
    """Move S on by one token, in place -> y_bhp."""
    g = B_bgn.shape[1]
    x, dt, A, B, C = (z.to(S_bhpn.dtype) for z in (x_bhp, dt_bh, A_h, B_bgn, C_bgn))
    if doc_b is not None: dt = dt.masked_fill(doc_b[:, None] < 0, 0)
    with full_precision(x):
        S_bhpn.mul_((dt * A).exp()[..., None, None])
        by_group(S_bhpn, g).addcmul_(by_group((dt[..., None] * x)[..., None], g), B[:, :, None])
        y_bhp = (by_group(S_bhpn, g) @ C[..., None]).view(x.shape)
        if D_h is not None: y_bhp = torch.addcmul(y_bhp, x, D_h[:, None].to(x.dtype))
    return (y_bhp if doc_b is None else y_bhp.masked_fill(doc_b[:, None, None] < 0, 0)).to(x_bhp.dtype)


def read_slots(state, slots_b: Tensor) -> Tensor:
    """The slots' states as new fp32 (or fp64) tensors; slot -1 gives some slot's."""
    rows = [z[slots_b.clamp(min=0).long()] for z in parts(state)]
    return dequantize_state(QuantizedState(*rows) if len(rows) == 2 else rows[0])


def write_slots(state, S_bhpn: Tensor, slots_b: Tensor, state_format: str, seed: int | Tensor | None) -> None:
    """Round each row into its slot. Draws count from the pool's start, so two slots never share any, nor two snapshots of one call."""
    for S_hpn, slot in zip(S_bhpn, slots_b.tolist()):
        if slot < 0: continue
        stored = quantize_state(S_hpn, state_format, seed, slot * S_hpn.numel(), impl="torch")
        for pool, row in zip(parts(state), parts(stored)): pool[slot] = row


def ssd_step(x, dt, A_h, B, C, D_h=None, state_bhpn=None, doc_b=None, slots_b=None, write: str = "last", state_format: str = "fp32",
             seed: int | Tensor | None = None, impl: str = "auto") -> tuple[Tensor, Tensor | QuantizedState]:
    """-> (y, state). x [b, h, p] is one token a row, [b, t, h, p] are t <= 32; dt, B and C alike; y has x's shape. The state is overwritten in
    place (None = zeros) and must be contiguous; fp32 may be fp64. For decoding: autograd cannot look through overwritten states.

    doc_b: a row at -1 has no token now: its y is 0 and its state stays.      slots_b: as above; no slot may be written twice. None: row i is slot i
    write: "last" puts the state after the last token back. "none" writes nothing. "each": slots_b [b, 1 + t], column 0 is read and column j
           receives the state after token j (nothing where it is -1); between tokens the state goes on in fp32, unrounded.
    seed:  for the formats with _sr, a Python int or an int64 number in memory. Give every call another one, or its errors repeat and add up.
    """
    if twin := nvfp4.find_twin("state_update", "ssd_step", impl, x):
        return twin(x, dt, A_h, B, C, D_h, state_bhpn, doc_b, slots_b, write, state_format, seed)
    state = check_step(x, dt, A_h, B, C, D_h, state_bhpn, doc_b, slots_b, write, state_format, seed)
    if x.dim() == 3 and slots_b is None and (write, state_format) == ("last", "fp32"):      # the usual step: no copy
        return move_state(state, x, dt, A_h, B, C, D_h, doc_b), state
    x_bthp, dt_bth, B_btgn, C_btgn = (z if x.dim() == 4 else z[:, None] for z in (x, dt, B, C))
    slots = torch.arange(len(x), device=x.device)[:, None] if slots_b is None else slots_b.view(len(x), -1)
    absent = slots[:, :1] < 0 if doc_b is None else (slots[:, :1] < 0) | (doc_b[:, None] < 0)
    slots = slots.masked_fill(absent, -1)
    S_bhpn, ys = read_slots(state, slots[:, 0]), []
    for t in range(x_bthp.shape[1]):
        ys.append(move_state(S_bhpn, x_bthp[:, t], dt_bth[:, t], A_h, B_btgn[:, t], C_btgn[:, t], D_h, slots[:, 0]))
        if write == "each": write_slots(state, S_bhpn, slots[:, 1 + t], state_format, seed)
    if write == "last": write_slots(state, S_bhpn, slots[:, 0], state_format, seed)
    return torch.stack(ys, 1).view(x.shape), state


def step_sizes(raw_bth: Tensor, bias_h: Tensor, limit: tuple[float, float]) -> Tensor:
    """dt from what the input projection gives, alike for a whole text and for a step; in fp32 (or fp64)."""
    return F.softplus(raw_bth.to(wide(raw_bth.dtype)) + bias_h).clamp(*limit)


def conv_step(xBC_rtc: Tensor, dt_rth: Tensor, weight_c1w: Tensor, bias_c: Tensor, dt_bias_h: Tensor, limit: tuple[float, float],
              window_bwc: Tensor, slot_r: Tensor, start_r: Tensor, real_rt: Tensor, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Convolution and step sizes of t new tokens a row -> (silu of the convolution [r, t, c], dt after softplus and limits, 0 where no token is).

    window_bwc: a ring of inputs for each slot, overwritten in place: token i of the text lies in cell i mod its length, and a new slot's is zeros.
    With taps - 1 + t cells or more, tokens may be taken back by saying where the row starts (start_r) the next time; with fewer, real_rt's count.
    slot_r, start_r [r]: whose tokens these are, and how many came before. real_rt: which are there; a row's are on the left. dt comes out in fp32.
    """
    t, ring, old, row_r1 = xBC_rtc.shape[1], window_bwc.shape[1], weight_c1w.shape[2] - 1, slot_r[:, None]
    few = old + t <= ring and xBC_rtc.dtype != torch.float64
    if few and (twin := nvfp4.find_twin("conv1d", "conv_step", impl, xBC_rtc)):
        return twin(xBC_rtc, dt_rth, weight_c1w, bias_c, dt_bias_h, limit, window_bwc, slot_r, start_r, real_rt)
    cell_rw = (start_r[:, None] + torch.arange(-old, t, device=start_r.device)) % ring
    if old + t <= ring:
        window_bwc[row_r1, cell_rw[:, old:]] = xBC_rtc
        y_rtc = F.silu(depthwise(window_bwc[row_r1, cell_rw].to(wide(xBC_rtc.dtype)), weight_c1w.to(wide(xBC_rtc.dtype))) + bias_c).to(xBC_rtc.dtype)
    else:
        tape_rtc = torch.cat([window := window_bwc[row_r1, cell_rw[:, :old]], xBC_rtc], 1)
        last_rw = real_rt.sum(1, keepdim=True) + torch.arange(old, device=start_r.device)       # the last inputs that are there
        window_bwc[row_r1, cell_rw.gather(1, last_rw)] = tape_rtc[torch.arange(len(tape_rtc), device=start_r.device)[:, None], last_rw]
        y_rtc, _ = causal_conv1d(xBC_rtc, weight_c1w, bias_c, window, impl=impl)
    dt_rth = step_sizes(dt_rth, dt_bias_h, limit)
    return y_rtc, torch.where(real_rt[..., None], dt_rth, 0.0)        # PITFALL: after the clamp, whose lower limit may be above 0


# %% 8 · Context parallelism  [M2, sequence parallelism]
# A long sequence is cut into pieces of equal length: of k ranks, rank r holds tokens r·t/k .. (r+1)·t/k. Ultra trains on 1,048,576 tokens over
# 32 ranks, 32,768 each  [Ultra, long context]. Two things cross a cut: the convolution's halo (the last w - 1 inputs before the piece) and the
# state. No rank waits for the state before it scans, because the recurrence is linear in the state it starts from:
#     y_t = (y_t from a zero state) + exp(cs_t) S_in C_t         S_in of rank r = sum over j < r of  exp(sum of dt A on ranks j+1 .. r-1) S_j
# with S_j what rank j ends with when it starts from zero, and cs counted from the piece's start. All ranks scan at once, exchange, and add.
# ours: one all-gather of S_j and the sum of dt A; then each rank adds up what lies before it. A rank sends one state a layer, whatever the length:
# Ultra's 256 · 64 · 128 numbers in fp32 are 8.4 MB at batch 1  [Config]. An attention layer's keys and values grow with t: 2 · 2 heads · 128 in
# bf16 are 33.6 MB for 32,768 tokens. A chain, in which each rank adds its state and passes the sum on, takes k - 1 rounds one after the other; the
# all-gather takes one. But a rank receives k - 1 states, in a chain one and in a tree scan about log2 k: for many ranks these send less.
# Megatron sends activations instead: an all-to-all gives each rank the whole sequence of some heads, and no scan needs a correction  [Megatron].
# Documents and padding mean what they mean on one device, wherever the cuts are: what crosses a cut stops at a change of document.

class ContextGroup:
    """The ranks that hold the pieces of one sequence, in the order of time, all with the same batch rows."""
    def __init__(self, group: dist.ProcessGroup):
        self.group, self.seen = group, {}

    def once(self, f: Callable, doc_bt: Tensor, *args):
        """f(doc_bt, *args, self), computed for the first layer that asks; the others read the same documents. PITFALL: the same tensor counts as
        the same documents, so nobody may write into it."""
        kept, result = self.seen.get((f, args), (None, None))
        if kept is not doc_bt: self.seen[f, args] = doc_bt, (result := f(doc_bt, *args, self))
        return result

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)


class _GatherRanks(torch.autograd.Function):
    """Forward: all-gather. Backward: every rank has read my slice, so its gradient is the sum of theirs, a reduce-scatter."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup):
        ctx.group, every = group, x.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather(list(every.unbind(0)), x.contiguous(), group=group)
        return every

    @staticmethod
    @once_differentiable
    def backward(ctx, devery: Tensor):
        dx = torch.empty_like(devery[0], memory_format=torch.contiguous_format)
        dist.reduce_scatter(dx, list(devery.contiguous().unbind(0)), group=ctx.group)
        return dx, None


def gather_ranks(x: Tensor, context: ContextGroup) -> Tensor:
    """x [...], of one shape on all ranks -> [k, ...], all of theirs.

    PITFALL: the backward pass is a collective too. A rank that drops the result before its loss never calls it, and the others wait forever:
    rank 0, which has nobody before it, must read an empty slice.
    """
    return _GatherRanks.apply(x, context.group)


def last_places(doc_bt: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where the last `count` tokens lie that are not padding, oldest first -> (places [b, count], absent: True where there are fewer, place 0)."""
    real_bt = torch.arange(doc_bt.shape[1], device=doc_bt.device).masked_fill(doc_bt < 0, -1)
    place_bt = F.pad(real_bt, (count, 0), value=-1).topk(count, dim=1).values.flip(1)
    return place_bt.clamp(min=0), place_bt < 0


def pick(x_btc: Tensor, place_bt: Tensor, absent_bt: Tensor) -> Tensor:
    """x at the places, 0 where absent."""
    return x_btc[torch.arange(len(x_btc), device=x_btc.device)[:, None], place_bt].masked_fill(absent_bt[..., None], 0)


def halo_places(doc_bt: Tensor, count: int, context: ContextGroup) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(what each rank sends, absent; the halo's places among what all ranks sent, what of it is hidden), by the documents alone.

    Each rank sends its last `count` real tokens. A piece may hold fewer, so the halo is taken from what all the ranks before sent.
    """
    mine_bt, absent_bt = last_places(doc_bt, count)
    ids_bt = gather_ranks(doc_bt.gather(1, mine_bt).masked_fill(absent_bt, -1), context).transpose(0, 1).flatten(1, 2)
    later_t = torch.arange(ids_bt.shape[1], device=doc_bt.device) >= context.rank * count
    halo_bt, hidden_bt = last_places(ids_bt.masked_fill(later_t, -1), count)
    # ids may come back, so equal ids are not enough: no change of document may lie between the entry and my first token
    segment_bt = segments(torch.cat([ids_bt.gather(1, halo_bt).masked_fill(hidden_bt, -1), fill_padding(doc_bt)[:, :1]], 1))
    return mine_bt, absent_bt, halo_bt, hidden_bt | (segment_bt[:, :-1] != segment_bt[:, -1:])


def conv_halo(x_btc: Tensor, doc_bt: Tensor | None, taps: int, context: ContextGroup) -> Tensor:
    """The convolution's inputs before this rank's piece, causal_conv1d's window [b, taps-1, c]; 0 where they are of another document."""
    b, t, c = x_btc.shape
    if taps == 1: return x_btc.new_zeros(b, 0, c)
    if doc_bt is None: doc_bt = torch.zeros(b, t, dtype=torch.int64, device=x_btc.device)
    mine_bt, absent_bt, halo_bt, hidden_bt = context.once(halo_places, doc_bt, taps - 1)
    return pick(gather_ranks(pick(x_btc, mine_bt, absent_bt), context).transpose(0, 1).flatten(1, 2), halo_bt, hidden_bt)


def piece_segments(doc_bt: Tensor, context: ContextGroup) -> tuple[Tensor, Tensor]:
    """The segment of the whole sequence in which each rank's piece begins, and in which it ends, int64 [k, b] each.

    Three ranks:   5 5 | 5 6 | 6 -1 -> begins 0 0 1, ends 0 1 1.
    """
    filled_bt = fill_padding(doc_bt)
    first_kb, last_kb, changes_kb = gather_ranks(torch.stack([filled_bt[:, 0], filled_bt[:, -1], segments(doc_bt)[:, -1]]), context).unbind(1)
    # a piece of padding only has id -1 at both ends: it belongs to the document before it, as all padding does
    ends_bt = fill_padding(torch.stack([first_kb, last_kb], 1).flatten(0, 1).T)
    at_cut_kb = F.pad(ends_bt[:, 2::2] != ends_bt[:, 1:-1:2], (1, 0)).T
    ends_kb = (at_cut_kb + changes_kb).cumsum(0)
    return ends_kb - changes_kb, ends_kb


def first_segment(doc_bt: Tensor, context: ContextGroup) -> Tensor:
    """Which tokens of this rank's piece lie before its first change of document, bool [b, t]: the state that comes in is theirs."""
    return segments(doc_bt) == 0


def pass_state(S_bhpn: Tensor, log_decay_bh: Tensor, doc_bt: Tensor | None, context: ContextGroup) -> Tensor:
    """The state that enters this rank's piece [b, h, p, n], from what each rank's piece leaves when it starts from zero (S_bhpn) and the sum of
    dt A over it (log_decay_bh). Three ranks with S = 1 2 4, each halving what comes in: into rank 2 go 1 · 1/2 + 2 = 2.5."""
    rank = context.rank
    every_kbhx = gather_ranks(torch.cat([S_bhpn.flatten(2), log_decay_bh[..., None]], -1), context)[:rank]
    S_kbhpn, log_kbh = every_kbhx[..., :-1].unflatten(-1, S_bhpn.shape[2:]), every_kbhx[..., -1]
    # PITFALL: add logarithms, from my piece backwards. A product of decays underflows, and a difference of sums from rank 0 on loses a small
    # decay behind a large one.
    between_kbh = F.pad(log_kbh, (0, 0, 0, 0, 0, 1))[1:].flip(0).cumsum(0).flip(0)
    weight_kbh = fade(between_kbh)
    if doc_bt is not None:
        begins_kb, ends_kb = context.once(piece_segments, doc_bt)
        weight_kbh = weight_kbh * (ends_kb[:rank] == begins_kb[rank])[..., None]
    return torch.einsum("kbh,kbhpn->bhpn", weight_kbh, S_kbhpn)


def ssd_across_ranks(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, chunk: int, doc_bt, context: ContextGroup, impl: str = "auto") -> Tensor:
    """-> this rank's piece of the y_bthp that ssd_chunked gives for the whole sequence. The twin adds the state before it forms any output."""
    if twin := nvfp4.find_twin("ssd", "ssd_across_ranks", impl, x_bthp):
        return twin(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, chunk, doc_bt, context)
    y_bthp, S_bhpn = ssd_chunked(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, chunk, None, doc_bt, impl)
    p, g, pad_bt = x_bthp.shape[3], B_btgn.shape[2], padding(doc_bt)
    with full_precision(x_bthp):
        log_bth = dt_bth.to(S_bhpn.dtype) * A_h.to(S_bhpn.dtype)
        if pad_bt is not None: log_bth = log_bth.masked_fill(pad_bt[..., None], 0)
        # PITFALL: sums run along the last dimension. Along t of [b, t, h] a GPU gives each head one thread, and t steps one after the other.
        cs_bht = log_bth.transpose(1, 2).cumsum(-1)
        into_bht = fade(cs_bht)
        if doc_bt is not None: into_bht = into_bht * context.once(first_segment, doc_bt)[:, None]
        S_bhpn = pass_state(S_bhpn, cs_bht[..., -1], doc_bt, context)
        carried_bgtx = C_btgn.to(S_bhpn.dtype).transpose(1, 2) @ by_group(S_bhpn, g).transpose(2, 3)      # x: the heads of a group, h / g · p
        carried_btgjp = carried_bgtx.transpose(1, 2).unflatten(3, (-1, p))                                  # j: of h / g heads
        y_btgjp, into_btgj = y_bthp.unflatten(2, (g, -1)), into_bht.transpose(1, 2).unflatten(2, (g, -1))
        return finish(torch.addcmul(y_btgjp, carried_btgjp, into_btgj[..., None]).flatten(2, 3), pad_bt, x_bthp.dtype)


# %% 9 · The layer and its cache  [HF; Megatron]
# One matrix makes everything at once: gate z, input x, B, C (these three pass the convolution) and a raw step per head. A token therefore
# chooses how much to write (dt, B), what to read (C) and how fast to forget (dt again). The recurrence stays linear; what makes it
# a language model's layer is that its coefficients depend on the text.

@dataclass
class MambaCache:
    """What one layer keeps of a sequence, whatever its length. Mamba2.forward updates both tensors in place; they carry values, not gradients."""
    window_btc: Tensor      # the last w - 1 inputs of the convolution
    state_bhpn: Tensor      # fp32 (fp64 for an fp64 model): rewritten once a token, so rounding would add up

    @property
    def nbytes(self) -> int:
        return self.window_btc.nbytes + self.state_bhpn.nbytes


class Mamba2(nn.Module):
    """x [b, t, d] -> [b, t, d]. Parameters carry the released names and shapes; in_proj's rows are z | x | B | C | dt."""

    context: ContextGroup | None = None     # set it, and x and doc_bt are this rank's piece of the sequence (section 8)

    def __init__(self, d_model: int, heads: int, head_dim: int, groups: int, state: int, conv_kernel: int = 4, chunk: int = 128,
                 time_step_limit: tuple[float, float] = (0.0, math.inf), eps: float = 1e-5, dt_min: float = 1e-3, dt_max: float = 0.1,
                 dt_floor: float = 1e-4):
        super().__init__()
        sizes = dict(d_model=d_model, heads=heads, head_dim=head_dim, groups=groups, state=state, conv_kernel=conv_kernel, chunk=chunk)
        if min(sizes.values()) < 1: raise ValueError(f"every size of a Mamba2 layer must be at least 1: got {sizes}.")
        if heads % groups: raise ValueError(f"heads={heads} must be a multiple of groups={groups}: the heads of a group share B and C.")
        if not 0 <= time_step_limit[0] < time_step_limit[1]:
            raise ValueError(f"time_step_limit={time_step_limit} must be (low, high) with 0 <= low < high.")
        self.heads, self.head_dim, self.groups, self.state, self.chunk = heads, head_dim, groups, state, chunk
        self.time_step_limit = time_step_limit
        inner, conv = heads * head_dim, heads * head_dim + 2 * groups * state
        self.in_proj = nn.Linear(d_model, inner + conv + heads, bias=False)
        self.conv1d = nn.Conv1d(conv, conv, conv_kernel, groups=conv)        # holds weight and bias; causal_conv1d computes
        self.norm = GatedRMSNorm(inner, groups, eps)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        # NOTE: A in (1, 16) and dt in (dt_min, dt_max) as the training code draws them  [Megatron]. The released modeling file starts from
        # A = 1, 2, .. heads instead; whoever loads a checkpoint never sees the difference.
        dt_h = torch.empty(heads).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=dt_floor)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(dt_h + (-torch.expm1(-dt_h)).log())      # inverse of softplus
        self.D = nn.Parameter(torch.ones(heads))

    def empty_cache(self, batch: int, device=None, dtype: torch.dtype | None = None) -> MambaCache:
        """Zeros for `batch` new sequences; dtype (of the activations) is the window's, the state is fp32 or fp64."""
        dtype = dtype or self.conv1d.weight.dtype
        conv, taps = self.conv1d.weight.shape[0], self.conv1d.weight.shape[-1]
        return MambaCache(torch.zeros(batch, taps - 1, conv, device=device, dtype=dtype),
                          torch.zeros(batch, self.heads, self.head_dim, self.state, device=device, dtype=wide(dtype)))

    def scan_inputs(self, xBC_btc: Tensor, dt_bth: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(x_bthp, dt_bth, A_h, B_btgn, C_btgn) as the scan takes them, from the convolution's output and the raw steps."""
        h, p, g, n = self.heads, self.head_dim, self.groups, self.state
        x_bti, B_bti, C_bti = xBC_btc.split([h * p, g * n, g * n], dim=-1)
        dt_bth = step_sizes(dt_bth, self.dt_bias, self.time_step_limit)
        A_h = -self.A_log.to(dt_bth.dtype).exp()
        return x_bti.unflatten(-1, (h, p)), dt_bth, A_h, B_bti.unflatten(-1, (g, n)), C_bti.unflatten(-1, (g, n))

    def forward(self, x_btd: Tensor, doc_bt: Tensor | None = None, cache: MambaCache | None = None, impl: str = "auto") -> Tensor:
        """doc_bt: document ids, -1 is padding. With a cache the tokens follow those it has seen; prefill in pieces equals all at once."""
        h, p, g, n = self.heads, self.head_dim, self.groups, self.state
        if self.context is not None and cache is not None:
            raise ValueError("a layer with a context group takes no cache: a cache holds the end of a sequence, which only the last rank would have.")
        window, S_bhpn = (None, None) if cache is None else (cache.window_btc, cache.state_bhpn)
        z_bti, xBC_btc, dt_bth = self.in_proj(x_btd).split([h * p, h * p + 2 * g * n, h], dim=-1)
        if self.context is not None: window = conv_halo(xBC_btc, doc_bt, self.conv1d.weight.shape[-1], self.context)
        xBC_btc, window = causal_conv1d(xBC_btc, self.conv1d.weight, self.conv1d.bias, window, doc_bt, impl)
        x_bthp, dt_bth, A_h, B_btgn, C_btgn = self.scan_inputs(xBC_btc, dt_bth)

        # NOTE: the step overwrites its state, so a single token that needs gradients takes the scan
        if cache is not None and x_btd.shape[1] == 1 and not torch.is_grad_enabled():
            doc_b = None if doc_bt is None else doc_bt[:, 0]
            y_bhp, S_bhpn = ssd_step(x_bthp[:, 0], dt_bth[:, 0], A_h, B_btgn[:, 0], C_btgn[:, 0], self.D, S_bhpn, doc_b, impl=impl)
            y_bthp = y_bhp[:, None]
        elif self.context is not None:
            y_bthp = ssd_across_ranks(x_bthp, dt_bth, A_h, B_btgn, C_btgn, self.D, self.chunk, doc_bt, self.context, impl)
        else:
            y_bthp, S_bhpn = ssd_chunked(x_bthp, dt_bth, A_h, B_btgn, C_btgn, self.D, self.chunk, S_bhpn, doc_bt, impl)
        if cache is not None:
            cache.window_btc.copy_(window.detach())
            if S_bhpn is not cache.state_bhpn: cache.state_bhpn.copy_(S_bhpn.detach())      # the step has already written it
        return self.out_proj(self.norm(y_bthp.flatten(2), z_bti, impl))


# %% 10 · Measurements

def random_inputs(b: int, t: int, h: int, p: int, g: int, n: int, seed: int, dtype=torch.float32) -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D with steps and decays as a fresh layer has them."""
    rng = torch.Generator().manual_seed(seed)
    x, B, C = (torch.randn(b, t, *size, generator=rng, dtype=torch.float64) for size in ((h, p), (g, n), (g, n)))
    dt = torch.empty(b, t, h, dtype=torch.float64).uniform_(math.log(1e-3), math.log(0.1), generator=rng).exp()
    A = -torch.empty(h, dtype=torch.float64).uniform_(1, 16, generator=rng)
    D = torch.randn(h, generator=rng, dtype=torch.float64)
    return tuple(z.to(dtype) for z in (x, dt, A, B, C, D))


RUNGS = {"recurrence": ssd_recurrence, "quadratic": ssd_quadratic, "chunked": partial(ssd_chunked, impl="torch")}
KERNEL = {"kernel": partial(ssd_chunked, impl="triton")}       # the same scan in Triton, kernels/ssd.py


def measure_rungs(lengths: list[int], seed: int = 0, device: str = "cpu", rungs: dict = RUNGS) -> list[dict]:
    """Best-of-three milliseconds of each rung in fp32, and its largest error against the recurrence in fp64 over the largest output."""
    rows = []
    for t in lengths:
        inputs = [z.to(device) for z in random_inputs(1, t, 4, 16, 2, 16, seed)]
        oracle = ssd_recurrence(*(z.double() for z in inputs))[0]
        row = dict(length=t)
        for name, rung in rungs.items():
            ms, (y, _) = nvfp4.best_ms(lambda rung=rung, inputs=inputs: rung(*inputs))
            row |= {f"{name}_ms": ms, f"{name}_error": ((y - oracle).abs().max() / oracle.abs().max()).item()}
        rows.append(row)
    return rows


def measure_memory(heads: int = 256, length: int = 2048, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(half-life in tokens [h], what is left of one input after 0, 1, .. tokens [h, t]) of a fresh layer's heads at their initial step.

    Half-life = ln 2 / (dt |A|); the second comes out of the scan itself, fed with one impulse and B = C = 1.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = Mamba2(d_model=8, heads=heads, head_dim=1, groups=1, state=1)
    dt_h, A_h = F.softplus(layer.dt_bias.detach()), -layer.A_log.detach().exp()
    x_bthp, ones_btgn = torch.zeros(1, length, heads, 1), torch.ones(1, length, 1, 1)
    x_bthp[:, 0, :, 0] = 1 / dt_h
    y_bthp, _ = ssd_chunked(x_bthp, dt_h.expand(1, length, heads), A_h, ones_btgn, ones_btgn)
    return math.log(2) / (-A_h * dt_h), y_bthp[0, :, :, 0].T


ULTRA = dict(d_model=8192, heads=256, head_dim=64, groups=8, state=128)      # one Mamba layer  [Config]
ULTRA_MAMBA, ULTRA_ATTENTION = 48, 12                                        # layers of each kind  [Config]
ULTRA_KV_BYTES = 2 * 2 * 128 * 1       # keys and values x 2 heads x width 128 x FP8, one attention layer and token  [Config; Ultra, quantization]


def measure_cache() -> tuple[int, int, int]:
    """Bytes of Ultra's fp32 states, of its bf16 conv windows, and of one token's FP8 keys and values, over all layers."""
    with torch.device("meta"):
        cache = Mamba2(**ULTRA).empty_cache(1, dtype=torch.bfloat16)
    return ULTRA_MAMBA * cache.state_bhpn.nbytes, ULTRA_MAMBA * cache.window_btc.nbytes, ULTRA_ATTENTION * ULTRA_KV_BYTES


def measure_decode(seed: int = 0, prompt: int = 33, steps: int = 8) -> float:
    """Largest gap between a layer that reads everything at once and one that prefills, then takes single tokens (fp32, of the largest output)."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        layer, x_btd = Mamba2(64, 16, 8, 2, 16, chunk=16), torch.randn(2, prompt + steps, 64)
        cache, whole = layer.empty_cache(2), layer(x_btd)
        pieces = [layer(x_btd[:, :prompt], cache=cache), *(layer(x_btd[:, i:i + 1], cache=cache) for i in range(prompt, prompt + steps))]
    return ((torch.cat(pieces, 1) - whole).abs().max() / whole.abs().max()).item()


# %% 11 · Figures

def plot_rungs(rows: list[dict], path: Path, where: str = "one thread") -> None:
    fig, (left, right) = nvfp4.new_figure(columns=2)
    lengths = [row["length"] for row in rows]
    for name in [key.removesuffix("_ms") for key in rows[0] if key.endswith("_ms")]:
        label = {"chunked": "chunked scan", "quadratic": "quadratic form", "kernel": "Triton kernel"}.get(name, name)
        left.loglog(lengths, [row[f"{name}_ms"] for row in rows], marker="o", label=label)
        right.loglog(lengths, [row[f"{name}_error"] for row in rows], marker="o", label=label)
    left.set(title="Twice the length costs twice the time, the quadratic form four times", ylabel=f"time (ms, fp32, 4 heads, {where})")
    right.set(title="Sums of decays over the whole sequence lose digits", ylabel="largest error against fp64 (relative)")
    for ax in (left, right):
        ax.set_xticks(lengths, [f"{t:,}" for t in lengths])
        ax.minorticks_off()
        ax.set_xlabel("sequence length (tokens)")
        ax.legend(frameon=False)
    nvfp4.save_figure(fig, path)


def plot_memory(half_h: Tensor, left_ht: Tensor, path: Path) -> None:
    fig, (left, right) = nvfp4.new_figure(columns=2)
    order = half_h.argsort()
    for quantile in (0.02, 0.25, 0.5, 0.75, 0.98):
        head = order[round(quantile * (len(order) - 1))]
        left.plot(range(1, left_ht.shape[1]), left_ht[head, 1:], marker=".", markevery=[0], label=f"half-life {half_h[head]:,.1f} tokens")
    left.axhline(0.5, color="0.6", linewidth=1, linestyle="--")
    left.set_xscale("log")
    left.set(title="One input fades at each head's own pace", xlabel="tokens after the input", ylabel="share left in the state")
    left.legend(frameon=False, title="five of the heads")
    right.plot(range(1, len(order) + 1), half_h[order], color="C3")
    right.set_yscale("log")
    right.set(title=f"{len(order)} fresh heads cover half-lives from {half_h.min():.1f} to {half_h.max():,.0f} tokens",
              xlabel="head, from the shortest memory to the longest", ylabel="half-life (tokens)")
    nvfp4.save_figure(fig, path)


def plot_cache(state: int, window: int, kv_token: int, path: Path) -> None:
    fig, ax = nvfp4.new_figure()
    tokens, equal = [2**k for k in range(10, 21)], state / kv_token
    ax.loglog(tokens, [kv_token * t / 1e6 for t in tokens], label=f"keys and values, FP8, {ULTRA_ATTENTION} attention layers")
    ax.loglog(tokens, [state / 1e6] * len(tokens), label=f"states, fp32, {ULTRA_MAMBA} Mamba layers (conv windows: {window / 1e6:.0f} MB more)")
    ax.plot([equal], [state / 1e6], marker="o", color="black")
    ax.annotate(f"equal at {equal:,.0f} tokens", (equal, state / 1e6), xytext=(8, -16), textcoords="offset points", fontsize=10)
    ax.set(title="Nemotron 3 Ultra: the Mamba state does not grow with the text", xlabel="context (tokens)", ylabel="cache of one sequence (MB)")
    ax.set_xticks(tokens[::2], [f"{t // 1024}K" if t < 2**20 else "1M" for t in tokens[::2]])
    ax.minorticks_off()
    ax.legend(frameon=False)
    nvfp4.save_figure(fig, path)


# %% 12 · Main

@dataclass(frozen=True)
class Config:
    out: Path = Path("out")     # where figures and results.jsonl go
    longest: int = 2048         # longest sequence timed; the quadratic form's memory grows with its square
    seed: int = 0               # of inputs and fresh layers
    impl: Literal["auto", "torch", "triton"] = "auto"     # "triton", or "auto" on a GPU, adds the kernel to the table

    def __post_init__(self):
        if self.longest < 1: raise ValueError(f"longest={self.longest}: time at least one token.")


def main(config: Config) -> None:
    nvfp4.writable_folder(config.out)
    device = nvfp4.demo_device(config.impl)
    torch.set_num_threads(1)        # these sizes gain nothing from more, and one thread shows how the work grows
    lengths = [config.longest // 2**k for k in range(5, -1, -1) if config.longest // 2**k]
    rungs = RUNGS | (KERNEL if config.impl == "triton" or device == "cuda" else {})
    rows = measure_rungs(lengths, config.seed, device, rungs)
    print(f"the rungs of SSD in fp32 on {device} (4 heads of width 16, state 16; error against fp64)\n{'tokens':>8}", end="")
    print("".join(f"{name + ' ms':>15}{'error':>9}" for name in rungs))
    for row in rows:
        print(f"{row['length']:8,d}" + "".join(f"{row[f'{name}_ms']:15.2f}{row[f'{name}_error']:9.0e}" for name in rungs))
    plot_rungs(rows, config.out / "02_rungs.png", "one thread" if device == "cpu" else torch.cuda.get_device_name())

    half_h, left_ht = measure_memory(seed=config.seed)
    low, middle, high = half_h.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    print(f"\nwhat one head remembers, {len(half_h)} fresh heads: half of them longer than {middle:.1f} tokens, one in 20 under {low:.2f}, "
          f"one in 20 over {high:.0f}")
    plot_memory(half_h, left_ht, config.out / "02_memory.png")

    state, window, kv_token = measure_cache()
    print(f"Ultra's cache of one sequence: fp32 states {state / 1e6:.1f} MB and conv windows {window / 1e6:.1f} MB at any length; "
          f"FP8 keys and values {kv_token:,} bytes a token: the states equal {state / kv_token:,.0f} tokens of them")
    plot_cache(state, window, kv_token, config.out / "02_cache.png")

    gap = measure_decode(config.seed)
    print(f"prefill and single steps against all at once: largest gap {gap:.0e} of the largest output")
    nvfp4.write_row(config.out, "02_mamba", rungs=rows, half_life_tokens=dict(p5=low, p50=middle, p95=high), state_bytes=state, window_bytes=window,
                    kv_bytes_per_token=kv_token, equal_at_tokens=state // kv_token, decode_gap=gap)
    print(f"figures: {', '.join(str(config.out / f'02_{name}.png') for name in ('rungs', 'memory', 'cache'))}")


if __name__ == "__main__":
    nvfp4.run_command(main, Config, __doc__)
