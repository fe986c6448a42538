"""04 · The model: Mamba-2, attention and LatentMoE layers in one stack, with a shared multi-token-prediction head.

Left out:  dropout, biases and positions (the report has none), pipeline and tensor parallelism, dense MLP layers ("-" in older patterns).
Sources:   [Ultra] Nemotron 3 Ultra report, arXiv 2606.15007 · [Config] the released config.json of Nano, Super and Ultra
           [Megatron] Megatron-LM, the code that trained them · [HF] transformers' modeling_nemotron_h, the oracle of the tests
Run:       python 04_model.py                   # 10 s, CPU: builds preset tiny, prints placement, ledger, loss at initialisation
           python 04_model.py --preset ultra    # 5 s, CPU: builds all 560 billion parameters on the meta device and prints the ledger
           python 04_model.py --preset ultra --slice    # GPU: times one Mamba, attention and LatentMoE layer at full width, bf16 and NVFP4
Contents:  1 config and presets   2 precision placement   3 attention   4 blocks and trunk   5 multi-token prediction
           6 loss   7 ledger   8 checkpoints   9 generate   10 measurements
Letters:   b batch  t time  s source time  d model width  v vocabulary  h heads  p head width  e experts  r flattened rows (b·t)
           l latent  f expert width  k prediction depth  m MoE layer
"""
from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

nvfp4, mamba, moe = (importlib.import_module(name) for name in ("01_nvfp4", "02_mamba", "03_latentmoe"))

# %% 1 · Config and presets  [Config]
# One letter a layer: M Mamba-2, E LatentMoE, * attention. A layer is x + mixer(norm(x)) with exactly one mixer, so "one transformer
# block" is two letters here. KEYS maps our field names to the released ones; both released ways to write the layer list are read and written.

LETTERS = {"M": "mamba", "E": "moe", "*": "attention"}
WORDS = {"mamba": "M", "moe": "E", "attention": "*", "linear_attention": "M", "full_attention": "*"}   # old words, then transformers 5's
KEYS = dict(
    d_model="hidden_size", vocab="vocab_size", heads="num_attention_heads", kv_heads="num_key_value_heads", head_dim="head_dim",
    mamba_heads="mamba_num_heads", mamba_head_dim="mamba_head_dim", groups="n_groups", state="ssm_state_size", conv_kernel="conv_kernel",
    chunk="chunk_size", dt_min="time_step_min", dt_max="time_step_max", dt_floor="time_step_floor", experts="n_routed_experts",
    experts_per_token="num_experts_per_tok", latent="moe_latent_size", expert_width="moe_intermediate_size",
    shared_width="moe_shared_expert_intermediate_size", routed_scale="routed_scaling_factor", eps="layer_norm_epsilon",
    init_std="initializer_range", mtp_depths="mtp_trained_depths", bos="bos_token_id", eos="eos_token_id", pad="pad_token_id")
# What a file may leave out, and what it then means (the released modeling code's defaults).
OPTIONAL = dict(chunk_size=128, conv_kernel=4, n_groups=8, ssm_state_size=128, head_dim=128, mamba_head_dim=64, routed_scaling_factor=1.0,
                moe_latent_size=None, time_step_min=1e-3, time_step_max=0.1, time_step_floor=1e-4, layer_norm_epsilon=1e-5, initializer_range=0.02,
                mtp_trained_depths=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
# What the architecture fixes. A file that says otherwise describes another model, and is refused rather than half understood.
FIXED = dict(attention_bias=False, mlp_bias=False, use_bias=False, mamba_proj_bias=False, use_conv_bias=True, tie_word_embeddings=False,
             mlp_hidden_act="relu2", mamba_hidden_act="silu", n_group=1, topk_group=1, norm_topk_prob=True, n_shared_experts=1, sliding_window=None)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of one model. The defaults are preset `tiny`; the comments give Ultra's values  [Config]."""
    pattern: str = "MEM*EMEM*E"     # ours: Ultra has 108 letters
    d_model: int = 128              # ours: Ultra 8192
    vocab: int = 4096               # ours: Ultra 131072
    heads: int = 4                  # attention query heads, ours: Ultra 64
    kv_heads: int = 2               # attention key/value heads [Config: 2 in all three models]
    head_dim: int = 32              # ours: Ultra 128
    mamba_heads: int = 16           # ours: Ultra 256
    mamba_head_dim: int = 16        # ours: Ultra 64
    groups: int = 2                 # heads that share B and C, and the groups of the gated norm, ours: Ultra 8
    state: int = 32                 # SSM state width, ours: Ultra 128
    conv_kernel: int = 4            # [Config]
    chunk: int = 32                 # SSD chunk length, ours: Ultra 128
    time_step_limit: tuple[float, float] = (0.0, math.inf)     # clamp of dt after softplus [Config]
    dt_min: float = 1e-3            # initial step sizes are log-uniform in [dt_min, dt_max] [Config]
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    experts: int = 16               # routed experts, ours: Ultra 512
    experts_per_token: int = 4      # ours: Ultra 22
    latent: int | None = 64         # width the routed experts live in, None = full width as in Nano, ours: Ultra 2048
    expert_width: int = 128         # ours: Ultra 5120
    shared_width: int = 256         # ours: Ultra 10240
    routed_scale: float = 5.0       # factor on the routed weights [Config]
    mtp_pattern: str = "*E"         # layers of the shared prediction head, "" = no head [Config]
    mtp_depths: int = 2             # depths trained with the one shared head [Ultra, pretraining]
    eps: float = 1e-5               # of every RMSNorm [Config]
    init_std: float = 0.02          # [Config]; NVIDIA's training run of Ultra used 0.0099
    bos: int = 1
    eos: int = 2
    pad: int = 0

    def __post_init__(self):
        for name in ("pattern", "mtp_pattern"):
            if bad := set(getattr(self, name)) - set(LETTERS):
                raise ValueError(f"{name} has the unknown layer letter {sorted(bad)[0]!r}: use M (Mamba-2), E (LatentMoE) and * (attention).")
        if not self.pattern: raise ValueError("pattern is empty: a model needs at least one layer, for example \"MEM*E\".")
        widths = dict(d_model=self.d_model, mamba_heads=self.mamba_heads, expert_width=self.expert_width, shared_width=self.shared_width,
                      latent=self.latent or self.d_model)
        for name, width in widths.items():
            if width <= 0 or width % 16:
                raise ValueError(f"{name} = {width}: NVFP4 blocks hold 16 values, so this width must be a positive multiple of 16.")
        for name, value in (("mamba_heads × mamba_head_dim", self.inner), ("d_model", self.d_model)):
            if value % 32: raise ValueError(f"{name} = {value}: MXFP8 blocks hold 32 values, so this width must be a multiple of 32.")
        for name, value, part, by in (("mamba_heads", self.mamba_heads, "groups", self.groups), ("heads", self.heads, "kv_heads", self.kv_heads)):
            if by <= 0 or value % by: raise ValueError(f"{name} = {value} cannot be shared out over {part} = {by}: make it a multiple.")
        if self.in_proj_rows % 16:
            raise ValueError(f"groups × state = {self.groups * self.state} gives in_proj {self.in_proj_rows} rows: blocks hold 16 values, so make "
                             "groups × state a multiple of 8.")
        if not 0 < self.experts_per_token <= self.experts:
            raise ValueError(f"experts_per_token = {self.experts_per_token} must lie between 1 and experts = {self.experts}.")
        if self.mtp_depths < 0: raise ValueError(f"mtp_depths = {self.mtp_depths} is negative: 0 switches multi-token prediction off.")

    @property
    def inner(self) -> int: return self.mamba_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int: return self.inner + 2 * self.groups * self.state

    @property
    def in_proj_rows(self) -> int: return self.inner + self.conv_channels + self.mamba_heads     # z | x | B | C | dt

    @property
    def layers(self) -> int: return len(self.pattern)

    def to_dict(self) -> dict:
        """The released config.json: every key that NVIDIA's, vLLM's or transformers' reader looks for, the layer list in both styles."""
        values = {key: getattr(self, name) for name, key in KEYS.items()}
        if self.latent is None: del values["moe_latent_size"]
        listed = dict(layers_block_type=[LETTERS[c] for c in self.pattern], hybrid_override_pattern=self.pattern, num_hidden_layers=self.layers)
        head = dict(num_nextn_predict_layers=int(bool(self.mtp_pattern)), mtp_layers_block_type=[LETTERS[c] for c in self.mtp_pattern or "*E"],
                    mtp_hybrid_override_pattern=self.mtp_pattern or "*E")
        low, high = self.time_step_limit
        return dict(architectures=["NemotronHForCausalLM"], model_type="nemotron_h", **values, **listed, **head, **FIXED, norm_eps=self.eps,
                    time_step_limit=[low, 1e308 if math.isinf(high) else high],     # as Ultra writes infinity: strict JSON has no word for it
                    intermediate_size=self.expert_width, expand=2, residual_in_fp32=False, rescale_prenorm_residual=True,
                    mamba_ssm_cache_dtype="float32", max_position_embeddings=262144)

    @classmethod
    def from_dict(cls, released: dict) -> ModelConfig:
        """Reads a released config.json (Nano's, Super's and Ultra's keys). Raises ValueError for a key that asks for another architecture."""
        for key, value in FIXED.items():
            if released.get(key, value) != value: raise ValueError(f"config key {key} = {released[key]!r}: only {value!r} is built here.")
        if missing := [key for key in KEYS.values() if key not in {**OPTIONAL, **released}]:
            raise ValueError(f"the config lacks {', '.join(missing)}: is this the config.json of a nemotron_h model?")
        values = {name: {**OPTIONAL, **released}[key] for name, key in KEYS.items()}
        values["pattern"] = _letters(released, "hybrid_override_pattern", "layers_block_type")
        if values["pattern"] is None: raise ValueError("the config has no layer list: give layers_block_type or hybrid_override_pattern.")
        if not released.get("num_nextn_predict_layers", 0): values |= dict(mtp_pattern="", mtp_depths=0)
        else: values["mtp_pattern"] = _letters(released, "mtp_hybrid_override_pattern", "mtp_layers_block_type") or "*E"
        low, high = (_number(x) for x in released.get("time_step_limit", (0.0, math.inf)))
        return cls(**values, time_step_limit=(low, math.inf if high >= 1e308 else high))


def _letters(released: dict, pattern_key: str, list_key: str) -> str | None:
    """Layer letters from whichever style the file uses; both present must agree."""
    pattern, words = released.get(pattern_key), released.get(list_key)
    if words and (unknown := [w for w in words if w not in WORDS]): raise ValueError(f"{list_key} names the unknown layer {unknown[0]!r}.")
    listed = "".join(WORDS[w] for w in words) if words else None
    if pattern and listed and pattern != listed: raise ValueError(f"{pattern_key} and {list_key} disagree: {pattern!r} against {listed!r}.")
    return pattern or listed


def _number(x) -> float:
    return float(x["__float__"]) if isinstance(x, dict) else float(x)     # transformers writes {"__float__": "Infinity"}


ULTRA_PATTERN = "ME" * 3 + ("M*E" + "ME" * 2 + "M*E" + "ME" * 3 + "M*E" + "ME" * 3) * 4 + "ME"     # [Ultra, layer pattern figure]
SUPER_PATTERN = "MEMEMEM*E" + "MEMEMEM*E" * 2 + "MEMEMEMEM*E" * 4 + "MEMEMEM*E" + "MEMEMEME"
NANO_PATTERN = "MEMEM*E" + "MEMEM*E" * 4 + "MEMEMEM*E" + "MEMEMEME"
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(),                                                       # trains on a laptop
    "small": ModelConfig(pattern="MEM*E" * 4, d_model=1024, vocab=131072, heads=8, head_dim=128, mamba_heads=32, mamba_head_dim=64, groups=8,
                         state=128, chunk=128, experts=64, experts_per_token=6, latent=256, expert_width=640, shared_width=1280),
    "nano": ModelConfig(pattern=NANO_PATTERN, d_model=2688, vocab=131072, heads=32, head_dim=128, mamba_heads=64, mamba_head_dim=64, groups=8,
                        state=128, chunk=128, experts=128, experts_per_token=6, latent=None, expert_width=1856, shared_width=3712,
                        routed_scale=2.5, mtp_pattern="", mtp_depths=0),
    "super": ModelConfig(pattern=SUPER_PATTERN, d_model=4096, vocab=131072, heads=32, head_dim=128, mamba_heads=128, mamba_head_dim=64, groups=8,
                         state=128, chunk=128, experts=512, experts_per_token=22, latent=1024, expert_width=2688, shared_width=5376),
    "ultra": ModelConfig(pattern=ULTRA_PATTERN, d_model=8192, vocab=131072, heads=64, head_dim=128, mamba_heads=256, mamba_head_dim=64, groups=8,
                         state=128, chunk=128, experts=512, experts_per_token=22, latent=2048, expert_width=5120, shared_width=10240),
}
assert len(ULTRA_PATTERN) == 108 and ULTRA_PATTERN.count("*") == 12 and ULTRA_PATTERN.count("M") == 48


def preset(name: str) -> ModelConfig:
    """PRESETS[name], or one sentence with the names that exist."""
    if name not in PRESETS: raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


# %% 2 · Precision placement  [Ultra, NVFP4 pretraining]
# All linears train in NVFP4 except those listed first. The table is data: the first pattern that matches a tensor's name wins, and
# print_placement shows the outcome before a run, so nobody infers a dtype from control flow. "high" is bf16 on a GPU, fp32 on a CPU.
# NOTE: order matters. "*.mixer.*_proj*" as a lazy rule for NVFP4 would also catch attention and the latent projections.

PLACEMENT = [
    ("mtp.*", "high", "multi-token prediction"),
    ("backbone.embeddings.*", "high", "embedding and output layer"), ("lm_head.*", "high", "embedding and output layer"),
    ("*.gate.*", "high", "router (computed in fp32)"),
    ("*.mixer.fc?_latent_proj.*", "high", "latent projections"),
    ("*.mixer.[qkvo]_proj.*", "high", "attention projections"),
    ("<last 15 % of layers>", "high", "linears of the last 15 % of layers"),
    ("*.mixer.out_proj.*", "mxfp8", "Mamba output projections"),     # NVFP4 flushed up to 40 % of their values to zero on Nano  [Ultra]
    ("*.mixer.in_proj.*", "nvfp4", "Mamba input projections"),
    ("*.mixer.experts.*", "nvfp4", "routed experts"),
    ("*.mixer.shared_experts.*", "nvfp4", "shared experts"),
    ("*", "high", "norms, conv, A, D, dt bias"),
]
BITS = {"high": 16, "mxfp8": 8 + 8 / 32, "nvfp4": 4 + 8 / 16}     # stored bits a value, scales included


def in_last_layers(name: str, config: ModelConfig) -> bool:
    """True for a *linear* in the last max(1, floor(0.15 L)) of L layers: Ultra 16 of 108. Norms and other vectors fall to the last rule anyway."""
    parts = name.split(".")
    kept = max(1, math.floor(0.15 * config.layers))
    return name.startswith("backbone.layers.") and int(parts[2]) >= config.layers - kept and "_proj" in name


def placement_of(name: str, config: ModelConfig) -> tuple[str, str]:
    """(format, label) of the first rule of PLACEMENT that matches a parameter's name."""
    return next((fmt, label) for pattern, fmt, label in PLACEMENT
                if (in_last_layers(name, config) if pattern.startswith("<") else fnmatch(name, pattern)))


def print_placement(model: Nemotron) -> None:
    """Prints one line per rule: format, tensors, parameters and their share, as training will use them."""
    rows: dict[tuple[str, str], list[int]] = {}
    for name, p in model.named_parameters():
        row = rows.setdefault(placement_of(name, model.config), [0, 0])
        row[0] += 1; row[1] += p.numel()
    total = sum(n for _, n in rows.values())
    print(f"{'precision in training':22} {'tensors':>8} {'parameters':>16} {'share':>7}   what")
    for (fmt, label), (tensors, n) in sorted(rows.items(), key=lambda item: -item[1][1]):
        active = fmt if model.recipe is not None else "high"
        shown = {"high": "bf16 (fp32 on a CPU)", "mxfp8": "MXFP8", "nvfp4": "NVFP4"}[active]
        print(f"{shown:22} {tensors:8,d} {n:16,d} {n / total:7.1%}   {label}")


# %% 3 · Attention  [Ultra, architecture]
# Grouped-query attention without any position information: order comes from the Mamba layers around it. The few attention layers do what a
# fixed-size state cannot, exact recall. Tokens see earlier tokens of their own document only.

class KVCache:
    """Keys and values of one attention layer, [b, kv_heads, capacity, p], filled from the left."""
    def __init__(self, batch: int, kv_heads: int, capacity: int, head_dim: int, device=None, dtype=None):
        self.k_bhsp = torch.zeros(batch, kv_heads, capacity, head_dim, device=device, dtype=dtype)
        self.v_bhsp = torch.zeros_like(self.k_bhsp)
        self.length = 0

    def append(self, k_bhtp: Tensor, v_bhtp: Tensor) -> tuple[Tensor, Tensor]:
        """Adds t tokens and returns all keys and values so far. Raises ValueError when the capacity is exceeded."""
        end, capacity = self.length + k_bhtp.shape[2], self.k_bhsp.shape[2]
        if end > capacity: raise ValueError(f"the KV cache holds {capacity} tokens and {end} are needed: make it with a larger capacity.")
        self.k_bhsp[:, :, self.length:end], self.v_bhsp[:, :, self.length:end] = k_bhtp, v_bhtp
        self.length = end
        return self.k_bhsp[:, :, :end], self.v_bhsp[:, :, :end]


LONG = 2**24       # entries of a mask, 4,096 tokens squared: larger ones a GPU keeps as a list of blocks

def attention_mask(doc_bs: Tensor, t: int, impl: str = "auto") -> Tensor:
    """Who sees whom, bool [b, 1, t, s], for the last t of s tokens: same document, not later.

    Padding (id -1) is seen by nobody and sees itself, because a softmax over nothing is NaN. It costs t·s bytes, the twin's blocks next to nothing.
    """
    s = doc_bs.shape[1]
    if t * s > LONG and (twin := nvfp4.find_twin("attention", "attention_mask", impl, doc_bs)): return twin(doc_bs, t)
    segment_bs = mamba.segments(doc_bs)
    query_bt, index_s = segment_bs[:, s - t:], torch.arange(s, device=doc_bs.device)
    causal_ts = index_s[s - t:, None] >= index_s
    same_bts = (query_bt[:, :, None] == segment_bs[:, None, :]) & (doc_bs >= 0)[:, None, :]
    return ((same_bts & causal_ts) | (index_s[s - t:, None] == index_s))[:, None]


def attend(q_bhtp: Tensor, k_bhsp: Tensor, v_bhsp: Tensor, mask=None) -> Tensor:
    """softmax(q kᵀ / sqrt(p)) v over what attention_mask shows, [b, h, t, p]; k and v may have fewer heads. Without a mask one query sees all."""
    if not (mask is None or isinstance(mask, Tensor)): return nvfp4.find_twin("attention", "attend", "auto", q_bhtp)(q_bhtp, k_bhsp, v_bhsp, mask)
    # NOTE: is_causal aligns the first query with the first key, right only when nothing is cached; one token after a cache sees all.
    if q_bhtp.shape[2] > 1: return F.scaled_dot_product_attention(q_bhtp, k_bhsp, v_bhsp, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    grouped = q_bhtp.view(q_bhtp.shape[0], k_bhsp.shape[1], -1, q_bhtp.shape[3])      # decode: heads that share a key head as its queries
    return F.scaled_dot_product_attention(grouped, k_bhsp, v_bhsp, attn_mask=mask).reshape(q_bhtp.shape)


def up_to_here(x: Tensor, dim: int, context: mamba.ContextGroup) -> Tensor:
    """The pieces of the ranks before this one, then its own, joined along `dim`. Every rank gathers all of them, the last needs all."""
    return torch.cat(list(mamba.gather_ranks(x, context)[:context.rank + 1]), dim)


class Attention(nn.Module):
    """Causal grouped-query attention, no positions, no biases. x [b, t, d] -> [b, t, d]."""
    context: mamba.ContextGroup | None = None      # set it, and x is this rank's piece of the sequence: keys and values come from those before it

    def __init__(self, d_model: int, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = nn.Linear(d_model, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, d_model, bias=False)

    def forward(self, x_btd: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """mask: from attention_mask, None = plain causal. With a cache the t tokens follow those already in it."""
        b, t, _ = x_btd.shape
        q_bhtp, k_bhtp, v_bhtp = (proj(x_btd).view(b, t, -1, self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None: k_bhtp, v_bhtp = cache.append(k_bhtp, v_bhtp)
        # NOTE: ours, the plainest way: few layers attend, and all their keys and values fit. The last rank has the most to do.
        if self.context is not None: k_bhtp, v_bhtp = up_to_here(torch.stack([k_bhtp, v_bhtp]), 3, self.context)
        assert mask is not None or t in (1, k_bhtp.shape[2]), "several tokens after cached ones need a mask"
        y_bhtp = attend(q_bhtp, k_bhtp, v_bhtp, mask)
        return self.o_proj(y_bhtp.transpose(1, 2).reshape(b, t, self.heads * self.head_dim))


# %% 4 · Blocks and trunk  [Ultra, architecture]
#     x <- embedding(ids);   x <- x + mixer_i(norm_i(x))  for each letter;   h = norm_f(x);   logits = h · lm_headᵀ

def make_mixer(letter: str, c: ModelConfig) -> nn.Module:
    """The one layer that a letter of the pattern stands for."""
    if letter == "M":
        return mamba.Mamba2(c.d_model, c.mamba_heads, c.mamba_head_dim, c.groups, c.state, c.conv_kernel, c.chunk, c.time_step_limit, c.eps,
                            c.dt_min, c.dt_max, c.dt_floor)
    if letter == "E":
        return moe.LatentMoE(c.d_model, c.experts, c.experts_per_token, c.expert_width, c.shared_width, c.latent, c.routed_scale)
    return Attention(c.d_model, c.heads, c.kv_heads, c.head_dim)


class Block(nn.Module):
    """One pre-norm residual layer. Returns (x, Balance of the router or None)."""
    def __init__(self, letter: str, config: ModelConfig):
        super().__init__()
        self.letter = letter
        self.norm = mamba.RMSNorm(config.d_model, config.eps)
        self.mixer = make_mixer(letter, config)

    def forward(self, x_btd: Tensor, doc_bt: Tensor | None = None, mask: Tensor | None = None, cache=None):
        u_btd, balance = self.norm(x_btd), None
        if self.letter == "M": y_btd = self.mixer(u_btd, doc_bt, cache)
        elif self.letter == "*": y_btd = self.mixer(u_btd, mask, cache)
        else: y_btd, balance = self.mixer(u_btd, None if doc_bt is None else doc_bt >= 0)
        return x_btd + y_btd, balance


class Cache:
    """Everything a sequence leaves behind: keys and values, conv windows and SSM states, and which document each cached token is of."""
    def __init__(self, layers: list, capacity: int):
        self.layers, self.capacity, self.length, self.doc_bs = layers, capacity, 0, None

    def extend(self, doc_bt: Tensor | None, b: int, t: int, device) -> Tensor | None:
        """Notes t more tokens; returns the ids of all tokens so far, or None while nobody has named a document."""
        if doc_bt is None and self.doc_bs is not None: doc_bt = self.doc_bs[:, -1:].expand(b, t)     # the last document goes on
        if doc_bt is not None:
            # tokens cached before anyone named a document belong to the first one named
            before = self.doc_bs if self.doc_bs is not None else mamba.fill_padding(doc_bt)[:, :1].expand(b, self.length)
            self.doc_bs = torch.cat([before, doc_bt.to(device)], 1)
        self.length += t
        return self.doc_bs


class Nemotron(nn.Module):
    """The whole model; parameter names equal the released ones, except that routed experts are stacked ([e, f, l] and [e, l, f]).

    recipe: an nvfp4.NVFP4Recipe puts the linears that PLACEMENT names into 4 bits for training; None trains in the dtype at hand.
    """
    context: mamba.ContextGroup | None = None      # set by context_parallel: the tokens are this rank's piece of the sequences

    def __init__(self, config: ModelConfig, recipe: nvfp4.NVFP4Recipe | None = None):
        super().__init__()
        self.config, self.recipe, self.recompute = config, None, False
        self.backbone = nn.Module()
        self.backbone.embeddings = nn.Embedding(config.vocab, config.d_model)
        self.backbone.layers = nn.ModuleList(Block(letter, config) for letter in config.pattern)
        self.backbone.norm_f = mamba.RMSNorm(config.d_model, config.eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab, bias=False)
        if config.mtp_pattern: self.mtp = MTP(config)
        initialise(self)
        if recipe is not None: apply_recipe(self, recipe)

    def forward(self, ids_bt: Tensor, doc_bt: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits [b, t, v]. doc_bt: document ids, -1 is padding. With a cache, the t tokens follow those already in it."""
        return self.lm_head(self.hidden(ids_bt, doc_bt, cache))

    def hidden(self, ids_bt: Tensor, doc_bt: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """The trunk's output after the final norm, [b, t, d]: what the output layer and the MTP head read."""
        return self.trunk(ids_bt, doc_bt, cache)[0]

    def trunk(self, ids_bt: Tensor, doc_bt: Tensor | None = None, cache: Cache | None = None) -> tuple[Tensor, list]:
        """(hidden [b, t, d], one Balance per MoE layer)."""
        b, t = ids_bt.shape
        x_btd, balances = self.backbone.embeddings(ids_bt), []
        x_btd = x_btd.to(nvfp4.output_dtype(x_btd))      # under autocast the residual stream is in 16 bits, as in Megatron
        doc_bs = doc_bt if cache is None else cache.extend(doc_bt, b, t, ids_bt.device)
        if cache is not None and doc_bs is None and t > 1 and cache.length > t: doc_bs = ids_bt.new_zeros(b, cache.length)
        mask = self.visible(doc_bs, b, t)
        for i, block in enumerate(self.backbone.layers):
            x_btd, balance = self.run(block, x_btd, doc_bt, mask, cache.layers[i] if cache is not None else None)
            if balance is not None: balances.append(balance)
        return self.backbone.norm_f(x_btd), balances

    def visible(self, doc_bs: Tensor | None, b: int, t: int):
        """attention_mask for the last t tokens; None is plain causal. With a context over all tokens up to this rank's last."""
        if self.context is not None:
            doc_bs = up_to_here(torch.zeros(b, t, dtype=torch.long, device=self.lm_head.weight.device) if doc_bs is None else doc_bs, 1, self.context)
        return None if doc_bs is None else attention_mask(doc_bs, t)

    def run(self, block: Block, *args):
        """One block; with self.recompute its activations are dropped and computed again in the backward pass."""
        if self.recompute and torch.is_grad_enabled(): return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
        return block(*args)

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """A fresh cache for `batch` sequences of up to `capacity` tokens, on the model's device and in its dtype (SSM states in fp32)."""
        weight, c = self.lm_head.weight, self.config
        make = {"M": lambda block: block.mixer.empty_cache(batch, weight.device, weight.dtype), "E": lambda block: None,
                "*": lambda block: KVCache(batch, c.kv_heads, capacity, c.head_dim, weight.device, weight.dtype)}
        return Cache([make[block.letter](block) for block in self.backbone.layers], capacity)

    def routers(self) -> list[moe.Router]:
        """Every router, trunk first, then the MTP head's: the rows of Losses.load_me."""
        heads = self.mtp.layers if hasattr(self, "mtp") else []
        return [block.mixer.gate for block in [*self.backbone.layers, *heads] if block.letter == "E"]

    def update_expert_bias(self, load_me: Tensor, rate: float = 1e-3) -> None:
        """Once per optimizer step, with the loads of the whole global batch: b <- b + rate · sign(mean load - load)  [Megatron]."""
        for router, load_e in zip(self.routers(), load_me): moe.update_expert_bias(router.e_score_correction_bias, load_e, rate)

    def draw_seeds(self, seed: int, step: int, micro: int = 0) -> Tensor:
        """Seeds of one micro-batch's stochastic rounding, the same after a resume: int64 [quantised layers, 2 products, 2 directions]."""
        layers = [[nvfp4.draw_seed_for(seed, step, micro, i, product) for product in range(2)] for i in range(len(self.quantised()))]
        return torch.tensor([[nvfp4.pair_seeds(product) for product in layer] for layer in layers], dtype=torch.int64)

    def set_draws(self, seeds_l22: Tensor) -> None:
        for module, seeds in zip(self.quantised(), seeds_l22): module.draw_seed = seeds if isinstance(module, moe.Experts) else seeds[0]

    def quantised(self) -> list[nn.Module]: return [m for m in self.modules() if hasattr(m, "draw_seed")]


def context_parallel(model: Nemotron, group) -> Nemotron:
    """Cuts sequences over the ranks of a process group, in place: each holds an equal piece, rank 0 the beginning. `loss` takes whole sequences."""
    for module in model.modules():
        if hasattr(type(module), "context"): module.context = mamba.ContextGroup(group)
    return model


OUTPUTS = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "down_proj", "fc2_latent_proj.weight")     # what writes to the residual stream


@torch.no_grad()
def initialise(model: Nemotron) -> None:
    """Normal(0, init_std); matrices that write to the residual stream divided by sqrt(L), so its variance does not grow with depth  [Megatron].

    NOTE: Megatron divides by sqrt(2L) for transformers, whose blocks write twice; here one letter writes once. Norms stay 1, the
    selection bias 0, and Mamba's own A, D, dt bias and conv keep what stage 02 gave them.
    """
    c = model.config
    for name, p in model.named_parameters():
        if p.dim() < 2 or ".conv1d." in name or p.is_meta: continue
        p.normal_(0.0, c.init_std / math.sqrt(c.layers) if name.endswith(OUTPUTS) else c.init_std)


def apply_recipe(model: Nemotron, recipe: nvfp4.NVFP4Recipe) -> Nemotron:
    """Swaps the linears that PLACEMENT names for their 4- and 8-bit twins, in place. The parameters stay the same objects."""
    for name, module in list(model.named_modules()):
        if isinstance(module, moe.Experts) and placement_of(f"{name}.up_proj", model.config)[0] == "nvfp4": module.recipe = recipe
        if not isinstance(module, nn.Linear): continue
        fmt = placement_of(f"{name}.weight", model.config)[0]
        if fmt == "high": continue
        with torch.device("meta"):
            new = nvfp4.NVFP4Linear(module.in_features, module.out_features, recipe) if fmt == "nvfp4" \
                else nvfp4.MXFP8Linear(module.in_features, module.out_features)
        new.weight = module.weight
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    model.recipe = recipe
    return model


# %% 5 · Multi-token prediction  [Ultra, MTP; Megatron, multi_token_prediction]
# One block, used again for every depth, predicts further ahead. With h_0 the trunk's output *after* its final norm:
#     u_k = eh_proj( [ enorm(embedding of token t+k),  hnorm(h_{k-1}) ] )        order: embedding first
#     h_k = final_layernorm( block(u_k) ),     logits_k = lm_head(h_k)  predicts token t+k+1
# Embedding and output layer are the trunk's. The loss averages the depths, so one weight serves all: at inference it drafts any length.

class MTP(nn.Module):
    """The shared head. Released names: layers.0 holds enorm, hnorm, eh_proj and the first mixer; the last layer holds final_layernorm."""
    def __init__(self, config: ModelConfig):
        super().__init__()
        d, eps = config.d_model, config.eps
        self.layers = nn.ModuleList(Block(letter, config) for letter in config.mtp_pattern)
        self.layers[0].enorm, self.layers[0].hnorm = mamba.RMSNorm(d, eps), mamba.RMSNorm(d, eps)
        self.layers[0].eh_proj = nn.Linear(2 * d, d, bias=False)
        self.layers[-1].final_layernorm = mamba.RMSNorm(d, eps)

    def forward(self, embedding_btd: Tensor, hidden_btd: Tensor, doc_bt=None, mask=None, caches=None, run=lambda block, *args: block(*args)):
        """(h_k [b, t, d], Balance) from the embeddings of the tokens one step further and h_{k-1}."""
        first, last = self.layers[0], self.layers[-1]
        x_btd, balance = first.eh_proj(torch.cat([first.enorm(embedding_btd.to(hidden_btd.dtype)), first.hnorm(hidden_btd)], -1)), None
        for i, block in enumerate(self.layers):
            x_btd, routed = run(block, x_btd, doc_bt, mask, caches[i] if caches else None)
            balance = routed if routed is not None else balance
        return last.final_layernorm(x_btd), balance


def roll_document(x_bt: Tensor, doc_bt: Tensor | None, fill: int = 0) -> Tensor:
    """x one step to the left inside each document; what would come from another document, or from beyond the end, becomes `fill`.

    x 5 6 7 8, documents 0 0 0 1  ->  6 7 fill fill
    """
    rolled_bt = F.pad(x_bt[:, 1:], (0, 1), value=fill)
    if doc_bt is None: return rolled_bt
    same_bt = F.pad(doc_bt[:, 1:] == doc_bt[:, :-1], (0, 1), value=False)
    return torch.where(same_bt, rolled_bt, fill)


# %% 6 · Loss  [Ultra, pretraining; Megatron]
#     L = L_main + (mtp_weight / K) · sum_k L_k + aux_weight · sum over MoE layers of the sequence balance loss
# The output layer is the largest product of a small model and its logits the largest tensor: linear_cross_entropy goes through the rows in
# chunks and computes the gradients on the way, so that [rows, vocabulary] never exists as a whole.

class Losses(NamedTuple):
    """total is what to differentiate; its parts keep their graphs, so a caller may weigh them anew. load_me counts tokens per expert: one row a
    MoE layer, the last row for the MTP head (all depths together)."""
    total: Tensor
    main: Tensor
    mtp_k: list[Tensor]
    aux: Tensor
    load_me: Tensor


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_rd, weight_vd, labels_r, w_r, chunk):
        dh_rd = torch.empty_like(h_rd) if h_rd.requires_grad else None
        # PITFALL: this sum runs over every chunk, micro-batch and MTP depth. In bf16 it loses the small MTP share: Ultra's divergence at 8T.
        dweight_vd = torch.zeros_like(weight_vd, dtype=torch.promote_types(weight_vd.dtype, torch.float32)) if weight_vd.requires_grad else None
        total = h_rd.new_zeros((), dtype=torch.promote_types(h_rd.dtype, torch.float32))
        w_r = w_r.to(total.dtype) / w_r.sum().clamp(min=1e-30)      # 0 / 1e-30 = 0: the mean of nothing
        for i in range(0, h_rd.shape[0], chunk):
            h, labels, w = h_rd[i:i + chunk], labels_r[i:i + chunk, None], w_r[i:i + chunk, None]
            logits = (h @ weight_vd.T).to(total.dtype)
            top, picked = logits.amax(-1, keepdim=True), logits.gather(1, labels)
            p = logits.sub_(top).exp_()                       # the softmax, once divided by z; one buffer serves loss and gradient
            z = p.sum(-1, keepdim=True)
            total += ((z.log() + top - picked) * w).sum()
            if dh_rd is None and dweight_vd is None: continue
            grad = p.mul_(w / z).scatter_add_(1, labels, -w).to(h.dtype)      # d loss / d logits = (softmax - one_hot) · w
            if dh_rd is not None: dh_rd[i:i + chunk] = grad @ weight_vd
            if dweight_vd is not None: dweight_vd += grad.T @ h
        ctx.save_for_backward(dh_rd, dweight_vd)
        ctx.dtypes = h_rd.dtype, weight_vd.dtype
        return total

    @staticmethod
    def backward(ctx, grad):
        dh_rd, dweight_vd = ctx.saved_tensors
        return (None if dh_rd is None else (dh_rd * grad).to(ctx.dtypes[0]), None if dweight_vd is None else (dweight_vd * grad).to(ctx.dtypes[1]),
                None, None, None)


def cross_entropy_definition(h_rd: Tensor, weight_vd: Tensor, labels_r: Tensor, w_r: Tensor) -> Tensor:
    """Rung 1: mean over the rows, weighed by w, of -log softmax(h · weightᵀ)[label]."""
    logits_rv = h_rd @ weight_vd.T
    loss_r = torch.logsumexp(logits_rv, -1) - logits_rv.gather(1, labels_r[:, None])[:, 0]
    return (loss_r * w_r).sum() / w_r.sum().clamp(min=1e-30)


def linear_cross_entropy(h_rd: Tensor, weight_vd: Tensor, labels_r: Tensor, w_r: Tensor | None = None, chunk: int = 512, impl: str = "auto"):
    """Mean cross-entropy of h · weightᵀ against labels, rows weighed by w (a mask is 0 and 1), a scalar in fp32 (fp64 for fp64 inputs).

    `chunk` rows of logits exist at a time. A row whose label is negative weighs nothing. No weight at all gives 0.
    """
    w_r = labels_r >= 0 if w_r is None else w_r * (labels_r >= 0)
    if twin := nvfp4.find_twin("cross_entropy", "linear_cross_entropy", impl, h_rd): return twin(h_rd, weight_vd, labels_r, w_r)
    if not torch.is_grad_enabled(): h_rd, weight_vd = h_rd.detach(), weight_vd.detach()     # the loss alone: a third of the work
    if not h_rd.is_cuda: h_rd, labels_r, w_r = (x[w_r != 0] for x in (h_rd, labels_r, w_r))      # a GPU would have to stop and count them
    return _LinearCrossEntropy.apply(h_rd, weight_vd, labels_r.clamp(min=0), w_r, chunk)


def loss(model: Nemotron, ids_bt: Tensor, labels_bt: Tensor, doc_bt: Tensor | None = None, mask_bt: Tensor | None = None,
         mtp_weight: float = 0.1, aux_weight: float = 1e-4, weigh: Callable | None = None, totals_k: Tensor | None = None) -> Losses:
    """Training loss. labels_bt[t] is the token after ids_bt[t]; mask_bt (True = learn) defaults to labels >= 0, outside padding.

    weigh(mask_bt, doc_bt): weights, instead of the mask; totals_k: what they sum to, by depth, in a batch of which this is a piece.
    mtp_weight 0.1 over both depths  [Ultra]; NVIDIA's recipe code says 0.3 for Super, and per token (not halved) in SFT.
    mtp_weight 0 skips the head, aux_weight 0 the balance loss; the loads are counted either way.
    After context_parallel every rank gives the whole sequences and gets its share: the mean over ranks is the loss.
    """
    if ids_bt.shape != labels_bt.shape: raise ValueError(f"ids {tuple(ids_bt.shape)} and labels {tuple(labels_bt.shape)} must have one shape.")
    c, context = model.config, model.context
    mask_bt = labels_bt >= 0 if mask_bt is None else mask_bt.bool() & (labels_bt >= 0)
    if doc_bt is not None: mask_bt = mask_bt & (doc_bt >= 0)
    if context is not None and ids_bt.shape[1] % context.size:
        raise ValueError(f"{ids_bt.shape[1]} tokens cannot be cut into {context.size} equal pieces: choose a multiple as sequence length.")
    mine = lambda x_bt: x_bt if x_bt is None or context is None else x_bt.chunk(context.size, 1)[context.rank]
    h_btd, balances = model.trunk(mine(ids_bt), mine(doc_bt))

    def ce(k, h_btd, labels_bt, mask_bt):
        w_bt = mask_bt if weigh is None else weigh(mask_bt, doc_bt)
        mean = linear_cross_entropy(h_btd.flatten(0, 1), model.lm_head.weight, mine(labels_bt).flatten(), mine(w_bt).flatten())
        # the mean of the ranks' numbers is to be the mean over all tokens, of which some ranks may have more than others
        part = mine(w_bt).sum() / (w_bt.sum().clamp(min=1e-30) if totals_k is None else totals_k[k])
        return mean * part * (1 if context is None else context.size)

    main = ce(0, h_btd, labels_bt, mask_bt)
    depths = c.mtp_depths if mtp_weight and hasattr(model, "mtp") else 0
    mtp_k, head_balances, visible = [], [], model.visible(mine(doc_bt), *mine(ids_bt).shape)
    for k in range(1, depths + 1):
        ids_bt, labels_bt = roll_document(ids_bt, doc_bt), roll_document(labels_bt, doc_bt)
        mask_bt = roll_document(mask_bt, doc_bt, fill=False)
        h_btd, balance = model.mtp(model.backbone.embeddings(mine(ids_bt)), h_btd, mine(doc_bt), visible, run=model.run)
        mtp_k.append(ce(k, h_btd, labels_bt, mask_bt))
        if balance is not None: head_balances.append(balance)

    loads = [b.load_e for b in balances]
    # the head's router is one module: both depths' tokens count towards its one bias
    if head_balances: loads.append(sum(b.load_e for b in head_balances))
    aux = sum((b.aux for b in [*balances, *head_balances]), start=main.new_zeros(()))
    total = main + (aux_weight * aux if aux_weight else 0.0) + (mtp_weight / depths * sum(mtp_k) if depths else 0.0)
    return Losses(total, main, mtp_k, aux, torch.stack(loads) if loads else ids_bt.new_zeros(0, c.experts))


# %% 7 · Ledger: parameters, FLOPs and bytes, from the formulas
# Counting by hand and comparing with the built model catches what a shape test does not: a missing expert, a doubled projection.

@dataclass(frozen=True)
class Ledger:
    """What a config costs. FLOPs count one multiply-add as 2 and are for one forward pass; training takes about three times as many."""
    parts: dict[str, int]               # parameters by part, MTP apart
    total: int                          # all of the trunk, embedding and output layer
    active: int                         # what one token is multiplied with, the input embedding left out
    mtp: int                            # the one shared MTP head (it borrows embedding and output layer)
    tensors: int                        # in an export with one tensor per expert matrix
    flops_per_token: dict[str, float]   # by part, at the given context, averaged over its positions
    kv_values_per_token: int            # keys and values a token leaves in all attention layers
    state_values: int                   # SSM state of one sequence, whatever its length
    window_values: int                  # conv windows of one sequence


def _layer_parameters(letter: str, c: ModelConfig) -> dict[str, int]:
    """Parameters of one layer by part, its pre-norm included."""
    if letter == "M":
        return {"Mamba linears": c.in_proj_rows * c.d_model + c.d_model * c.inner,
                "Mamba conv, A, D, dt, norms": c.conv_channels * (c.conv_kernel + 1) + 3 * c.mamba_heads + c.inner + c.d_model}
    if letter == "*":
        return {"attention": 2 * c.d_model * c.head_dim * (c.heads + c.kv_heads) + c.d_model}
    width = c.latent or c.d_model
    return {"routed experts": c.experts * 2 * width * c.expert_width, "shared experts": 2 * c.d_model * c.shared_width,
            "latent projections": 2 * c.d_model * c.latent if c.latent else 0, "router and norm": c.experts * (c.d_model + 1) + c.d_model}


def ledger(config: ModelConfig, context: int = 8192) -> Ledger:
    """Parameters, tensors, FLOPs a token and cache sizes of a config.  context: tokens over which attention's cost is averaged."""
    c, parts = config, {"embedding": config.vocab * config.d_model, "output layer": config.vocab * config.d_model, "final norm": config.d_model}
    for letter in c.pattern:
        for part, n in _layer_parameters(letter, c).items(): parts[part] = parts.get(part, 0) + n
    n_m, n_e, n_a = (c.pattern.count(letter) for letter in "ME*")
    idle = n_e * (c.experts - c.experts_per_token) * 2 * (c.latent or c.d_model) * c.expert_width
    active = sum(parts.values()) - parts["embedding"] - idle
    mtp = sum(sum(_layer_parameters(letter, c).values()) for letter in c.mtp_pattern) + (2 * c.d_model ** 2 + 3 * c.d_model if c.mtp_pattern else 0)

    tensors_in = {"M": 9, "*": 5, "E": 5 + 2 * c.experts + (2 if c.latent else 0)}
    tensors = 3 + sum(tensors_in[x] for x in c.pattern + c.mtp_pattern) + (4 if c.mtp_pattern else 0)
    routed_active = n_e * c.experts_per_token * 2 * (c.latent or c.d_model) * c.expert_width
    flops = {
        "Mamba": 2 * parts.get("Mamba linears", 0) + n_m * (2 * c.conv_channels * c.conv_kernel + 6 * c.inner * c.state),   # h = a h + x B',  y = h C
        "attention": 2 * (parts.get("attention", 0) - n_a * c.d_model) + n_a * 4 * c.heads * c.head_dim * (context + 1) / 2,
        "routed experts": 2 * routed_active, "shared experts": 2 * parts.get("shared experts", 0),
        "router and latent": 2 * (parts.get("latent projections", 0) + n_e * c.experts * c.d_model), "output layer": 2 * parts["output layer"]}
    return Ledger(parts, sum(parts.values()), active, mtp, tensors, flops, n_a * 2 * c.kv_heads * c.head_dim, n_m * c.inner * c.state,
                  n_m * c.conv_channels * (c.conv_kernel - 1))


def bytes_by_format(model: Nemotron) -> dict[str, float]:
    """Bytes of the weights under the training placement, scales included: {"nvfp4": …, "mxfp8": …, "high": …}. Works on the meta device."""
    total = dict.fromkeys(BITS, 0.0)
    for name, p in model.named_parameters():
        fmt = placement_of(name, model.config)[0]
        total[fmt] += p.numel() * BITS[fmt] / 8
    return total


# %% 8 · Checkpoints: the released layout
# config.json, model-00001-of-00050.safetensors … and their index, one tensor per expert matrix as in NVIDIA's release, so that transformers
# and vLLM open our directories and we open theirs. Experts are stacked in memory and copied shard by shard; nothing is held twice.

STACKED = (".experts.up_proj", ".experts.down_proj")
FP32 = ("A_log", ".D", "dt_bias", "e_score_correction_bias", "gate.weight")     # kept in fp32 whatever dtype a checkpoint is loaded in


def released_tensors(model: Nemotron) -> Iterator[tuple[str, Tensor]]:
    """(released name, tensor) for everything a checkpoint holds; the stacked experts come out one by one."""
    for name, tensor in model.state_dict().items():
        if not name.endswith(STACKED): yield name, tensor; continue
        stem, _, leaf = name.rpartition(".")
        for i, expert in enumerate(tensor): yield f"{stem}.{i}.{leaf}.weight", expert


def save_checkpoint(directory: str | Path, model: Nemotron, tokenizer=None, shard_bytes: int = 5 * 10 ** 9) -> None:
    """Writes config.json, the shards and their index (and tokenizer.save) into `directory`, which is made if needed.

    Raises OSError when the disk refuses; a caller that must never leave half a checkpoint writes to a new directory and renames it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards, size, total = [{}], 0, 0
    for name, tensor in released_tensors(model):
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + nbytes > shard_bytes: shards.append({}); size = 0
        shards[-1][name] = tensor
        size += nbytes; total += nbytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards):
        # clone: safetensors refuses slices that share one storage, as stacked experts do
        safetensors.torch.save_file({k: v.detach().cpu().clone() for k, v in shard.items()}, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": {name: file for file, shard in zip(names, shards) for name in shard}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (directory / "config.json").write_text(json.dumps(model.config.to_dict(), indent=1))
    if tokenizer is not None: tokenizer.save(directory)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists(): files = sorted({directory / f for f in json.loads(index.read_text())["weight_map"].values()})
    else: files = sorted(directory.glob("*.safetensors"))
    if not files: raise ValueError(f"no *.safetensors in {directory}: give a directory written by save_checkpoint or a released one.")
    for file in files:
        if not file.exists(): raise ValueError(f"the checkpoint's index names {file.name}, which is missing in {directory}: copy it there.")
    return files


def read_tensors(directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in a checkpoint directory, one in memory at a time. ValueError for a file that is cut short."""
    for file in _weight_files(Path(directory)):
        try:
            with safetensors.safe_open(file, framework="pt") as shard:
                for name in shard.keys(): yield name, shard.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{file} is cut short or damaged ({error}): copy it again, or take an older checkpoint.") from error


def load_checkpoint(directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Nemotron:
    """A Nemotron from a local directory in the released layout, sharded or not.  dtype: of the weights, None keeps the file's.

    A checkpoint without any mtp.* tensor (transformers drops them) gives a model without the head. Raises ValueError naming every kind of
    misfit: a missing, unexpected or mis-shaped tensor (name, expected, found), a damaged file, a directory without a config.
    """
    directory = Path(directory)
    if not (directory / "config.json").exists():
        raise ValueError(f"{directory} has no config.json: give a local checkpoint directory (nothing is downloaded here).")
    released = json.loads((directory / "config.json").read_text())
    if "quantization_config" in released: raise ValueError(f"{directory} is quantized: open it with load_quantized of 08_infer.py.")
    config = ModelConfig.from_dict(released)
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in read_tensors(directory)}
    if not any(name.startswith("mtp.") for name in shapes): config = replace(config, mtp_pattern="", mtp_depths=0)
    with torch.device("meta"): model = Nemotron(config)

    expected = {name: tuple(t.shape) for name, t in released_tensors(model)}
    problems = [f"missing {name}: expected {list(shape)}" for name, shape in expected.items() if name not in shapes]
    problems += [f"unexpected {name}: found {list(shape)}" for name, (shape, _) in shapes.items() if name not in expected]
    problems += [f"wrong shape of {name}: expected {list(expected[name])}, found {list(shape)}" for name, (shape, _) in shapes.items()
                 if name in expected and shape != expected[name]]
    if problems:
        shown = "; ".join(problems[:4]) + ("; …" if problems[4:] else "")
        raise ValueError(f"{directory} does not fit its config.json ({len(problems)} tensors): {shown}")

    dtype = dtype or shapes["lm_head.weight"][1]
    model = model.to_empty(device=device)
    for name, p in [*model.named_parameters(), *model.named_buffers()]: p.data = p.data.to(torch.float32 if name.endswith(FP32) else dtype)
    targets = dict(released_tensors(model))      # name -> the memory it belongs in, a view into the stack for an expert
    for name, tensor in read_tensors(directory): targets[name].copy_(tensor)
    return model


# %% 9 · Generate
# Prompts of different lengths are padded on the left: padding leaves Mamba's state and conv window untouched and attention never sees it,
# so a prompt's answer does not depend on its neighbours. Prefill once, then one token a step from the caches.

@dataclass(frozen=True)
class SamplingParams:
    """How to draw tokens. The draw for a prompt depends on seed and on the prompt's place in the list, never on the other prompts."""
    max_tokens: int = 64
    temperature: float = 1.0        # 0 = greedy  [Ultra's model card: 1.0]
    top_p: float = 0.95             # keep the most probable tokens that sum to top_p  [Ultra's model card]
    seed: int = 0
    stop_ids: tuple[int, ...] = (2, 11)     # end of document, end of a chat turn  [Config, generation]

    def __post_init__(self):
        if self.max_tokens < 1: raise ValueError(f"max_tokens = {self.max_tokens}: ask for at least one token.")
        if self.temperature < 0: raise ValueError(f"temperature = {self.temperature} is negative: 0 is greedy, 1 the model's own distribution.")
        if not 0 < self.top_p <= 1: raise ValueError(f"top_p = {self.top_p} must lie in (0, 1].")


@dataclass
class Completion:
    """ids: the generated tokens, the stop id included; logprobs: of each under the model at temperature 1; finished: a stop id ended it."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False


def sample(logits_bv: Tensor, temperature: float, top_p: float, u_b: Tensor) -> Tensor:
    """One token a row, [b], by inverting the cumulative distribution at u_b in [0, 1). temperature 0 takes the largest logit."""
    if temperature == 0: return logits_bv.max(-1).indices
    p_bv, ids_bv = torch.softmax(logits_bv.double() / temperature, -1), None
    if top_p < 1: p_bv, ids_bv = p_bv.sort(-1, descending=True)      # NOTE: takes longer than a small model's step, so only where something is cut
    cumulative_bv = p_bv.cumsum(-1)
    kept_bv = cumulative_bv - p_bv < top_p          # the token that crosses top_p stays in
    pick_b = torch.minimum(torch.searchsorted(cumulative_bv, (u_b * (p_bv * kept_bv).sum(-1))[:, None], right=True)[:, 0], kept_bv.sum(-1) - 1)
    return pick_b if ids_bv is None else ids_bv.gather(1, pick_b[:, None])[:, 0]


def left_pad(prompts: list[list[int]], pad: int, device=None) -> tuple[Tensor, Tensor | None]:
    """(ids [b, t], document ids 0 with -1 for padding, or None when all prompts have one length)."""
    longest = max(map(len, prompts))
    ids_bt = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    if min(map(len, prompts)) == longest: return ids_bt, None
    return ids_bt, torch.tensor([[-1] * (longest - len(p)) + [0] * len(p) for p in prompts], device=device)


def generate(model: Nemotron, prompts: list[list[int]], sampling: SamplingParams, return_logprobs: bool = False,
             progress: bool = False) -> list[Completion]:
    """Continues token-id prompts of any lengths in one batch. Raises ValueError for an empty prompt or an id outside the vocabulary."""
    vocab, training = model.config.vocab, model.training
    for i, prompt in enumerate(prompts):
        if not prompt: raise ValueError(f"prompt {i} is empty: begin with the id {model.config.bos} when there is nothing to continue.")
        if not 0 <= min(prompt) <= max(prompt) < vocab: raise ValueError(f"prompt {i} has an id outside the vocabulary of {vocab}.")
    if not prompts: return []
    model.eval()        # no balance loss to compute
    try: rows, logps = _decode(model, prompts, sampling, return_logprobs, progress)
    finally: model.train(training)
    return _completions(rows, logps, set(sampling.stop_ids))


@torch.inference_mode()
def _decode(model: Nemotron, prompts: list[list[int]], sampling: SamplingParams, return_logprobs: bool, progress: bool):
    """(token ids, log-probabilities or None) a prompt, until every row has met a stop id or max_tokens are drawn."""
    b, steps, device = len(prompts), sampling.max_tokens, model.lm_head.weight.device
    ids_bt, doc_bt = left_pad(prompts, model.config.pad, device)
    draws = [torch.rand(steps, generator=torch.Generator().manual_seed(sampling.seed * 1_000_003 + i), dtype=torch.float64) for i in range(b)]
    u_bt = torch.stack(draws).to(device)
    cache, stop = model.empty_cache(b, ids_bt.shape[1] + steps), torch.tensor(sampling.stop_ids, device=device, dtype=torch.long)
    done_b, tokens, logps = torch.zeros(b, dtype=torch.bool, device=device), [], []
    for step in tqdm(range(steps), desc="generate", unit="tok", leave=False, disable=not progress):
        logits_bv = model.lm_head(model.hidden(ids_bt, doc_bt if step == 0 else None, cache)[:, -1]).float()
        next_b = sample(logits_bv, sampling.temperature, sampling.top_p, u_bt[:, step])
        tokens.append(next_b)
        if return_logprobs: logps.append(logits_bv.log_softmax(-1).gather(1, next_b[:, None])[:, 0])
        done_b |= torch.isin(next_b, stop)
        if done_b.all(): break
        ids_bt = next_b[:, None]
    return torch.stack(tokens, 1).tolist(), torch.stack(logps, 1).tolist() if logps else None


def _completions(rows: list[list[int]], logps: list[list[float]] | None, stop: set[int]) -> list[Completion]:
    """Cuts every row after its first stop id."""
    out = []
    for i, row in enumerate(rows):
        n = next((j + 1 for j, token in enumerate(row) if token in stop), len(row))
        out.append(Completion(row[:n], logps[i][:n] if logps else [], row[n - 1] in stop))
    return out


# %% 10 · Measurements

def short(n: float, unit: str = "") -> str:
    """Five digits at most:  short(549_309_000_000) -> 549.31B (billion),  short(16_777_216, "B") -> 16.78 MB."""
    for size, count, prefix in ((1e12, "T", "T"), (1e9, "B", "G"), (1e6, "M", "M"), (1e3, "k", "k")):
        if abs(n) >= size: return f"{n / size:.2f}" + (f" {prefix}{unit}" if unit else count)
    return f"{n:g} {unit}".strip()


def measure_ledgers() -> dict[str, Ledger]:
    """Counts every preset twice, by formula and from the model built on the meta device, and prints the table."""
    out, table = {}, []
    for name, config in PRESETS.items():
        with torch.device("meta"): model = Nemotron(config)
        counted = {n: t.numel() for n, t in model.state_dict().items()}
        mtp = sum(n for key, n in counted.items() if key.startswith("mtp."))
        book = out[name] = ledger(config)
        assert (sum(counted.values()) - mtp, mtp) == (book.total, book.mtp), f"{name}: the formulas and the built model disagree"
        table.append([name, config.layers, short(book.total), short(book.active), short(book.mtp), f"{book.tensors:,}",
                      short(sum(book.flops_per_token.values()), "FLOP"), f"{book.kv_values_per_token:,}", short(book.state_values * 4, "B")])
    header = ["preset", "layers", "parameters", "active", "MTP", "tensors", "work/token", "KV values/token", "SSM state"]
    nvfp4.print_table("every preset, counted by formula and from the built model", header, table)
    return out


def print_ledger(config: ModelConfig) -> None:
    """The full ledger of one config: parameters and FLOPs by part, bytes by precision, cache bytes by context length."""
    book = ledger(config)
    with torch.device("meta"): model = Nemotron(config)
    flops = sum(book.flops_per_token.values())
    print(f"\n{short(book.total)} parameters, {short(book.active)} active a token (input embedding left out), {short(book.mtp)} more in the MTP head")
    for part, n in sorted(book.parts.items(), key=lambda item: -item[1]): print(f"  {part:30} {short(n):>10} {n / book.total:7.1%}")
    print(f"\n{short(flops, 'FLOP')} a token forward, at 8,192 tokens of context (training: about three times that)")
    for part, n in sorted(book.flops_per_token.items(), key=lambda item: -item[1]): print(f"  {part:30} {short(n, 'FLOP'):>13} {n / flops:7.1%}")
    print(f"\n{short(2 * (book.total + book.mtp), 'B')} of weights in bf16; under the training placement, scales included:")
    for fmt, n in bytes_by_format(model).items(): print(f"  {fmt:30} {short(n, 'B'):>11}")
    kv, state, window = book.kv_values_per_token, short(book.state_values * 4, "B"), short(book.window_values * 2, "B")
    nvfp4.print_table("cache of one sequence", ["tokens", "attention FP8", "attention bf16", "Mamba state fp32", "conv windows bf16"],
                      [[f"{n:,}", short(kv * n, "B"), short(2 * kv * n, "B"), state, window] for n in (8_192, 65_536, 1_048_576)])


def measure_twins(model: Nemotron, ids_bt: Tensor) -> dict[str, float]:
    """A training step on the GPU in PyTorch and with the Triton kernels, in fp32: milliseconds of both, and the loss."""
    model, ids_bt = model.cuda(), ids_bt.cuda()
    def step():
        total = loss(model, ids_bt[:, :-1], ids_bt[:, 1:]).total; total.backward()
        return total.item()
    with nvfp4.plain_pytorch(): plain = nvfp4.best_ms(step)
    table = [["PyTorch", *plain], ["Triton kernels", *nvfp4.best_ms(step)]]
    nvfp4.print_table(f"the same step twice, on one {torch.cuda.get_device_name()}", ["", "ms", "loss"], table)
    return dict(step_ms=table[0][1], step_kernels_ms=table[1][1])


def measure_initial_loss(config: ModelConfig, seed: int, impl: str = "torch") -> dict[str, float]:
    """A fresh model must know nothing: its loss is ln(vocabulary). And its cache must not change what it says."""
    torch.manual_seed(seed)
    model = Nemotron(config)
    ids_bt = torch.randint(12, config.vocab, (4, 257), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        losses = loss(model, ids_bt[:, :-1], ids_bt[:, 1:])
        cache, whole = model.empty_cache(1, 32), model(ids_bt[:1, :32])
        steps = torch.cat([model(ids_bt[:1, i:j], cache=cache) for i, j in ((0, 13), (13, 14), (14, 20), (20, 32))], 1)
    gap = ((whole - steps).abs().max() / whole.abs().max()).item()
    mtp = " ".join(f"{x.item():.3f}" for x in losses.mtp_k)
    print(f"\nloss of a fresh model {losses.main.item():.3f} (ln {config.vocab} = {math.log(config.vocab):.3f})   MTP depths {mtp}"
          f"   balance loss {losses.aux.item():.3f}"
          f"\nprefill in pieces against one pass: largest difference {gap:.1e} of the largest logit")
    row = dict(loss=losses.main.item(), ln_vocab=math.log(config.vocab), cache_gap=gap)
    return row | (measure_twins(model, ids_bt) if nvfp4.demo_device(impl) == "cuda" else {})


SLICE, BF16_PEAK = "M*E", 989.0     # one layer of each kind; TFLOP/s of an H100 or H200, dense  [NVIDIA, data sheet]


def slice_blocks(config: ModelConfig, recipe: nvfp4.NVFP4Recipe | None, device: str, dtype: torch.dtype) -> list[Block]:
    """The blocks of SLICE at full width, in `dtype` but for what checkpoints keep in fp32. PLACEMENT keeps the last layer high: a fourth, dropped."""
    with torch.device(device): model = Nemotron(replace(config, pattern=SLICE + "*", vocab=16, mtp_pattern="", mtp_depths=0), recipe)
    for name, p in model.named_parameters(): p.data = p.data.to(torch.float32 if name.endswith(FP32) else dtype)
    return list(model.backbone.layers)[:len(SLICE)]


def run_blocks(blocks: list[Block], x_btd: Tensor, dy_btd: Tensor | None) -> tuple[Tensor, ...]:
    """The blocks' output; given its gradient dy, the gradients of x and of all parameters instead."""
    y_btd = x_btd
    for block in blocks: y_btd = block(y_btd)[0]
    return (y_btd,) if dy_btd is None else torch.autograd.grad(y_btd, [x_btd, *(p for block in blocks for p in block.parameters())], dy_btd)


def measure_slice(config: Config) -> None:
    """Times SLICE and each of its layers, in high precision and under the recipe: a table and rows. ValueError where the preset cannot run."""
    cuda, t, table = torch.cuda.is_available(), config.tokens, []
    if t < 1: raise ValueError(f"--tokens {t}: the slice needs at least one.")
    books = {letters: ledger(replace(preset(config.preset), pattern=letters, vocab=0), context=t) for letters in (SLICE, *SLICE)}
    need = 6e-9 * books[SLICE].total + 10       # ours: 6 bytes a parameter for weights, gradients and copies, and 10 GB of activations
    if config.preset not in ("tiny", "small") and (torch.cuda.mem_get_info()[1] / 1e9 if cuda else 0) < need:
        raise ValueError(f"--slice of {config.preset} needs a CUDA device with about {need:.0f} GB of memory; on a CPU try --preset tiny --slice.")
    device, dtype, high = ("cuda", torch.bfloat16, "bf16") if cuda else ("cpu", torch.float32, "fp32")
    for precision, recipe in ((high, None), ("nvfp4", nvfp4.NVFP4Recipe())):
        blocks = slice_blocks(preset(config.preset), recipe, device, dtype)
        x_btd, dy_btd = torch.randn(2, 1, t, preset(config.preset).d_model, device=device, dtype=dtype)
        for letters, book in books.items():
            part = [block for block in blocks if block.letter in letters]
            if cuda: torch.cuda.reset_peak_memory_stats()
            forward, both = (nvfp4.best_ms(partial(run_blocks, part, x_btd.requires_grad_(), dy), repeats=5)[0] for dy in (None, dy_btd))
            work = t * sum(book.flops_per_token.values()) / 1e9       # GFLOP, three times for both; one a millisecond is a TFLOP/s
            row = dict(forward_ms=forward, forward_tflops=work / forward, both_ms=both, both_tflops=3 * work / both)
            if cuda: row |= dict(peak_share=3 * work / both / BF16_PEAK, peak_gb=torch.cuda.max_memory_allocated() / 1e9)
            table.append([f"{precision} {letters}", *row.values()])
            nvfp4.write_row(config.out, "04_slice", preset=config.preset, tokens=t, precision=precision, layers=letters, **row)
        del blocks, part        # before the next precision's weights
    header = ["layers", "forward ms", "TFLOP/s", "forward + backward ms", "TFLOP/s", *(["share of bf16 peak", "peak memory GB"] if cuda else [])]
    nvfp4.print_table(f"{config.preset} at full width, {t:,} tokens: M Mamba, * attention, E LatentMoE", header, table)


@dataclass(frozen=True)
class Config:
    """Builds one preset and prints what it is made of."""
    preset: str = "tiny"        # tiny, small, nano, super or ultra; nano and larger are built on the meta device only
    out: Path = Path("out")     # figures and result rows go here
    seed: int = 0
    impl: Literal["auto", "torch", "triton"] = "auto"       # "triton", or "auto" on a GPU, times a step with the kernels
    slice: bool = False         # time one layer of each kind at the preset's full width instead; a CPU can for tiny and small
    tokens: int = 4096          # of the slice


def main(config: Config) -> None:
    nvfp4.writable_folder(config.out)
    nvfp4.demo_device(config.impl)
    if config.slice: return measure_slice(config)
    sizes = preset(config.preset)
    print(f"preset {config.preset}: {sizes.pattern}\n")
    with torch.device("meta"): print_placement(Nemotron(sizes, nvfp4.NVFP4Recipe()))
    print_ledger(sizes)
    books = measure_ledgers()
    row = dict(preset=config.preset, total=books[config.preset].total, active=books[config.preset].active, mtp=books[config.preset].mtp)
    if config.preset in ("tiny", "small"): row |= measure_initial_loss(sizes, config.seed, config.impl)
    nvfp4.write_row(config.out, "04_model", **row)
    print(f"\npython experiments/plot_model.py --out {config.out} draws the layers of Ultra and the ledger")


if __name__ == "__main__":
    nvfp4.run_command(main, Config, __doc__)
