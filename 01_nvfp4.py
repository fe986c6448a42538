"""01 · NVFP4: train and serve with numbers of four bits.

You build the format (16 values, two levels of scales), its quantizer, the three matrix products of a linear layer with their operands in
4 bits, and `NVFP4Linear`, whose forward and backward a Blackwell GPU would run on its FP4 tensor cores. Here a CPU emulates it exactly.

Left out: the native FP4 product (it needs Blackwell), the copy of each operand that a fused kernel keeps in 4 bits, calibration (stage 08).
Sources:  [NVFP4] Pretraining Large Language Models with NVFP4, 2509.25149; [Ultra] Nemotron 3 Ultra report, 2606.15007;
          [TE] TransformerEngine's NVFP4 reference quantizer; [4/6] Four Over Six, 2512.02010; [MX] OCP Microscaling Formats v1.0;
          [MXFP8] Recipes for Pre-training LLMs with MXFP8, 2506.08027; [INT4vFP4] INT v.s. FP, 2510.25602; [ModelOpt] Model-Optimizer.
Run:      python 01_nvfp4.py               # 15 s on one CPU core: error tables, biases, four figures in out/
          python 01_nvfp4.py --rows 128    # 8 s, rougher numbers
          python 01_nvfp4.py --impl triton # GPU: adds a table of the kernels
Contents: 1 Shared helpers   2 The E2M1 grid   3 Counter-based draws   4 Two-level scales   5 Scale rules   6 Quantize
          7 Hadamard transform   8 Products   9 The three products and their operands   10 The linear layer   11 MXFP8
          12 Measurements   13 Figures   14 Main
Letters:  b batch  t time  s source time  d model width  v vocabulary  h heads  g groups  p head width  n state  c conv channels
          e experts  k chosen experts  l latent  f expert hidden width  r flattened rows (b·t);
          and in this file only: q columns in blocks (one number a block of 16), o output features, i input features
"""
from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP4_MAX, E4M3_MAX = 6.0, 448.0                    # largest magnitudes of E2M1 and E4M3  [NVFP4, data format]
FOUR_OVER_SIX_MAX = 256.0                         # what Four-Over-Six maps the largest block to: 1.5 times as much still fits E4M3  [4/6]
FP32_MAX = torch.finfo(torch.float32).max


# %% 1 · Shared helpers
# What every later stage imports from here, so that there is no utils.py: the choice between PyTorch and a Triton twin, one line of results,
# one look for all figures, and the seeds of random rounding.

TWINS = {"auto": True}     # what plain_pytorch() switches


@contextmanager
def plain_pytorch():
    """Inside, impl="auto" means PyTorch on every device: to compare, and to time. Forward and backward both have to run inside."""
    before, TWINS["auto"] = TWINS["auto"], False
    try: yield
    finally: TWINS["auto"] = before


def find_twin(module: str, name: str, impl: str, x: Tensor) -> Callable | None:
    """The Triton twin `kernels/<module>.py: <name>` when it should run, else None (then the caller's PyTorch body runs).

    "auto" takes the twin for a CUDA tensor when it exists, "torch" never does, "triton" insists: ValueError when it is missing.
    """
    if impl not in ("auto", "torch", "triton"): raise ValueError(f"impl={impl!r} is unknown: use 'auto', 'torch' or 'triton'.")
    if impl == "torch" or (impl == "auto" and not (x.is_cuda and TWINS["auto"])): return None
    if not x.is_cuda and not os.environ.get("TRITON_INTERPRET"):
        raise ValueError("Triton kernels need a CUDA device: use impl='torch', or start Python with TRITON_INTERPRET=1 to interpret them on the CPU.")
    try: return getattr(importlib.import_module(f"kernels.{module}"), name)
    except (ImportError, AttributeError) as error:
        if impl == "auto": return None
        raise ValueError(f"the Triton twin {name} of kernels/{module}.py cannot be imported ({error}): use impl='torch'.") from error


def demo_device(impl: str) -> str:
    """Where a stage's tables run, "cuda" or "cpu", for the flag --impl: a GPU when there is one, unless plain PyTorch is asked for."""
    if impl not in ("auto", "torch", "triton"): raise ValueError(f"impl={impl!r} is unknown: use 'auto', 'torch' or 'triton'.")
    if impl == "triton" and not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
        raise ValueError("--impl triton needs a CUDA device. To see the kernels interpreted on a CPU, slowly, start with TRITON_INTERPRET=1.")
    return "cuda" if impl != "torch" and torch.cuda.is_available() else "cpu"


def best_ms(run: Callable, repeats: int = 3) -> tuple[float, object]:
    """(milliseconds of the fastest call after one to warm up, what it returned); waits for the GPU when there is one."""
    wait, times = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None), []
    for _ in range(1 + repeats):
        wait(); start = time.perf_counter()
        result = run()
        wait(); times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:]), result


def writable_folder(path: Path) -> Path:
    """Create the folder, or say in one sentence why not: to be called before the work whose results go there."""
    try: Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder {path} cannot be created ({error.strerror}): choose another one.") from error
    if not os.access(path, os.W_OK): raise ValueError(f"the folder {path} cannot be written to: choose another one.")
    return Path(path)


def run_command(main: Callable, config_class: type, doc: str) -> None:
    """What `python NN_stage.py` does: flags from the dataclass, then main(config). A ValueError or OSError, which our functions raise for what a
    person can mend, becomes one sentence and exit code 1; TRACEBACK=1 in the environment shows where it came from."""
    import tyro
    try: main(tyro.cli(config_class, description=doc))
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"): raise
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")
    except KeyboardInterrupt: sys.exit(f"{Path(sys.argv[0]).stem}: stopped by Ctrl-C; files that were written are whole.")


def write_row(out: Path, stage: str, **values) -> None:
    """Append one JSON line to out/results.jsonl: the stage's numbers and what is needed to run it again."""
    try: git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError: git = ""      # no git on this machine
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    row = dict(stage=stage, **values, commit=git or None, device=device, torch=torch.__version__, argv=sys.argv[1:])
    with (writable_folder(out) / "results.jsonl").open("a") as file: file.write(json.dumps(row) + "\n")


def new_figure(columns=1, rows=1, width=6.4, height=4.2):
    """(figure, axes) for a grid of plots, each about width × height inches; axes is one Axes, or an array of them."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no window, nothing changed in a notebook
    fig = Figure(figsize=(width * columns, height * rows), dpi=110, layout="constrained")
    axes = fig.subplots(rows, columns)
    for ax in fig.axes:
        ax.grid(True, color="0.9", linewidth=0.8); ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=10)
        for text, size in ((ax.title, 12), (ax.xaxis.label, 11), (ax.yaxis.label, 11)): text.set_fontsize(size)
    return fig, axes


def print_table(title: str, header: list[str], rows: list[list]) -> None:
    """Aligned columns; the first is text, floats keep two decimals unless they come as strings."""
    cells = [header] + [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        print("  " + row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:])))


def save_figure(fig, path: Path) -> None:
    writable_folder(Path(path).parent)
    fig.savefig(path)


def mix64(z: int) -> int:
    """One step of SplitMix64: one flipped bit of z flips about half of the 64 result bits."""
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def draw_seed_for(seed: int, step: int, micro: int = 0, layer: int = 0, operand: int = 0) -> int:
    """A 63-bit seed for one operand of one layer at one step: the same after a resume, in a recomputation and on every rank."""
    h = 0
    for word in (seed, step, micro, layer, operand): h = mix64(h ^ (word % 2**64))
    return h >> 1


def pair_seeds(seed: int | Tensor) -> tuple:
    """Two seeds from one, for both directions of a tensor, as signed 64-bit numbers. An int64 tensor [2] holds two already: a CUDA graph, which
    repeats its kernels with the same arguments, finds new seeds in memory."""
    return tuple(seed) if isinstance(seed, Tensor) else tuple((mix64(2 * seed + i) ^ 2**63) - 2**63 for i in (0, 1))


# %% 2 · The E2M1 grid  [NVFP4, data format]
# One sign bit, two exponent bits, one mantissa bit: 0 .5 1 1.5 2 3 4 6 and their negatives. Code = position on this list, plus 8 for a minus.
# The steps are 1/2 up to 2, then 1 up to 4, then 2 up to 6, so three rulers measure every magnitude: with the ruler that is too fine or too
# coarse for a value the position comes out too large, never too small, so the smallest of the three is right. Ties go to the even position,
# which is the value whose mantissa bit is 0.

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
# both values of a packed byte in one lookup: the real part is the even column (low nibble), the imaginary part the odd one
E2M1_PAIRS = torch.complex(E2M1.repeat(16), E2M1.repeat_interleave(16))


def grid_position(m: Tensor, u: Tensor | None = None) -> Tensor:
    """Positions 0..7 (as floats) of magnitudes on the grid's scale; beyond 6 they saturate.  0.25 -> 0 (0), 0.75 -> 2 (1.0), 5 -> 6 (4.0)

    Without u: to nearest, ties to even. With u uniform in [0, 1): up when u is below the distance to the lower neighbour (in steps),
    so the mean over u is the value itself, and a value on the grid stays where it is.
    """
    def ruler(z):
        return z.round() if u is None else (low := z.floor()) + (z - low - u).ceil()

    m = m.clamp(max=FP4_MAX)
    return torch.minimum(torch.minimum(ruler(2 * m), ruler(m) + 2), ruler(m / 2) + 4)


def encode_e2m1(y: Tensor, u: Tensor | None = None) -> Tensor:
    """Codes 0..15, one per byte. What rounds to zero keeps its sign:  -0.1 -> 8 (-0)."""
    return grid_position(y.abs(), u).to(torch.uint8) | (torch.signbit(y).to(torch.uint8) << 3)


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the even column in the low nibble, as the released checkpoints store them."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


# %% 3 · Counter-based draws
# Stochastic rounding needs one uniform number per element. A generator with a state would give other numbers after a resume, in an activation
# recomputation or on another rank; a hash of (seed, position) gives the same ones, in any order, in a Triton kernel too. All in uint32:
#     k0, k1 = low and high word of mix64(seed);   key = mix(mix(lo(i // 16) ^ k0) ^ hi(i // 16) ^ k1)        one key a block of 16 elements
#     h = mix(key + (i % 16 // 2) * 0x9E3779B9);   u = (low half of h for an even i, high half for an odd i) / 2^16     i = element index + offset
#     mix(x): x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15;  x *= 0x846CA68B;  x ^= x >> 16                  (Wellons' lowbias32)
# ours: 16 bits an element, so that one hash serves two: on a GPU the hash is a large part of a rounding kernel's instructions. The price: a value is
# rounded up with a probability that is up to 2^-16 too high.

def int32(word: int) -> int:
    """The signed number with the same 32 bits: torch has few uint32 operations, and int32 wraps around alike."""
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


PAIRS = torch.tensor([int32(lane * 0x9E3779B9) for lane in range(8)], dtype=torch.int32)


def mix32(x: Tensor) -> Tensor:
    """lowbias32 on int32, in place. The masks turn torch's arithmetic shift into a logical one."""
    x ^= (x >> 16) & 0xFFFF
    x *= int32(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x *= int32(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def split_key(seed: int) -> tuple[int, int]:
    """(k0, k1) of a seed, as signed 32-bit numbers."""
    key = mix64(seed % 2**64)
    return int32(key), int32(key >> 32)


def uniform_draws(seed: int | Tensor, start: int, count: int, device=None) -> Tensor:
    """The draws of elements start .. start + count - 1 in [0, 1), 16 bits each; start and count are multiples of 16."""
    if start % 16 or count % 16: raise ValueError(f"draws come in blocks of 16: offset {start} and count {count} must be multiples of 16.")
    k0, k1 = split_key(int(seed))
    block = torch.arange(start // 16, (start + count) // 16, device=device)
    keys = mix32(mix32(block.to(torch.int32) ^ k0) ^ (block >> 32).to(torch.int32) ^ k1)
    h = mix32(keys[:, None] + PAIRS.to(keys.device))
    return (torch.stack((h & 0xFFFF, (h >> 16) & 0xFFFF), dim=-1) * 2.0**-16).flatten()


# %% 4 · Two-level scales  [NVFP4, data format; TE, reference quantizer]
# A block of 16 values shares one E4M3 scale; E4M3 ends at 448, so one fp32 scale for the tensor first brings the largest block scale there.
#     s_enc = 6·448 / amax                 s_dec = 1 / s_enc                        one of each per tensor (per expert in a stack)
#     s_b   = e4m3(amax_b · (s_enc · 1/6))                                          one byte per block, 0.5 bit per value
#     code  = e2m1(x · 1 / (s_b · s_dec))                                           from the *rounded* s_b: what the product will divide out
#     x_hat = grid[code] · s_b · s_dec
# PITFALL: when E4M3 rounds the block scale down, the block's largest value lands above 6 and saturates; section 12 counts how often.

@dataclass(frozen=True, eq=False)
class NVFP4Tensor:
    """Values in 4 bits with their scales. Contraction runs along the last dimension, the only layout FP4 tensor cores read."""
    codes: Tensor           # uint8 [..., K/2], two codes a byte, low nibble = even column
    block_scale: Tensor     # float8_e4m3fn [..., K/16]; a tile's scale is repeated on its rows, as the hardware reads (MXFP4: float8_e8m0fnu, K/32)
    global_scale: Tensor    # fp32 decode scale, shaped like amax: a scalar, [e] for a stack of experts, [r] by row, or [1, K/16] by block column
    block: tuple[int, int] = (1, 16)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], 2 * self.codes.shape[-1]))

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.block_scale.nbytes + self.global_scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32, impl: str = "auto") -> Tensor:
        """grid[code] · s_b · s_dec, in fp32, then cast. The first product is exact, the second rounds once."""
        if twin := find_twin("nvfp4", "dequantize", impl, self.codes): return twin(self, dtype)
        pairs = E2M1_PAIRS.to(self.codes.device).index_select(0, self.codes.flatten().int())
        blocks = torch.view_as_real(pairs).view(*self.block_scale.shape, self.block[1])
        x = blocks.mul_(self.block_scale.float()[..., None]).mul_(align(self.global_scale, len(self.shape))[..., None])
        return x.view(self.shape).to(dtype)

    @property
    def T(self) -> NVFP4Tensor:
        """The same tiles seen from the other side: identical values, so the backward product meets the weights of the forward product."""
        side = self.block[1]
        if self.block[0] != side:
            raise ValueError(f"blocks of {self.block} run along one dimension only and cannot be transposed: quantize with block={(side, side)}.")
        tiles = self.block_scale.view(torch.uint8)[..., ::side, :].mT
        scale = tiles.repeat_interleave(side, dim=-2).view(self.block_scale.dtype)
        return NVFP4Tensor(transpose_codes(self.codes), scale, self.global_scale, self.block)


def transpose_codes(codes: Tensor, impl: str = "auto") -> Tensor:
    """Packed codes [..., R, K/2] of the transposed matrix, [..., K, R/2]."""
    if twin := find_twin("nvfp4", "transpose_codes", impl, codes): return twin(codes)
    return pack(unpack(codes).mT.contiguous())


def align(scale: Tensor, ndim: int) -> Tensor:
    """A scale per leading index, [e] or [r], broadcasts against [..., rows, blocks]: append dimensions of 1."""
    return scale.reshape(*scale.shape, *[1] * (ndim - scale.ndim)) if scale.ndim else scale


def global_scales(amax: Tensor, budget: float = E4M3_MAX) -> tuple[Tensor, Tensor]:
    """(s_enc, s_dec): the largest block scale becomes `budget`. amax 0 gives 1; an amax so small that s_enc overflows gives the fp32 maximum."""
    # PITFALL: torch computes `2688 / tensor` as reciprocal times 2688, which is off by one bit now and then. A true division needs two tensors.
    s_enc = torch.where(amax > 0, torch.full_like(amax, FP4_MAX * budget) / amax, 1.0).clamp(max=FP32_MAX)
    return s_enc, s_enc.reciprocal()


def e4m3(x: Tensor) -> Tensor:
    """Nearest E4M3, ties to even. Clamped first: E4M3 has no infinity, and a cast from far beyond 448 is NaN. Scales are never rounded
    stochastically: one that is too small would saturate its block.  [NVFP4]"""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def encode_scale(block_scale: Tensor, s_dec: Tensor) -> Tensor:
    return (block_scale.float() * s_dec).reciprocal().clamp(max=FP32_MAX)


# %% 5 · Scale rules
# max: the block's largest value maps to 6, where the grid is coarsest (4 then 6).
# four_over_six: also try 4 instead of 6 and keep what errs less: a map to 4 wastes the value 6 but has finer steps below the maximum. The 4-scale
#   is 1.5 times larger, so the tensor's largest block gets 256 in place of 448, and 384 still fits.  [4/6; Ultra, quantization]
#   ours: squared error, as in the paper and ModelOpt; TE's default is absolute error.
# mse: try all 126 positive E4M3 codes.  [ModelOpt, NVFP4 MSE calibrator]
# MXFP4, for comparison: blocks of 32 and a power of two as scale, 2^(floor(log2 amax_b) - 2), no second level.  [MX]
#   Then the largest value lands in [4, 8) and saturates above 6. The alternative, which NVIDIA's MXFP8 takes, rounds the exponent up: nothing
#   saturates and the steps are coarser.  [MXFP8]

def power_of_two_scale(amax_b: Tensor, largest: float, round_up: bool) -> Tensor:
    """E8M0 scales of blocks whose elements end at `largest`: the byte is the exponent + 127."""
    if round_up:        # smallest power of two with amax / scale <= largest
        mantissa, exponent = torch.frexp(amax_b / largest)
        exponent = exponent - (mantissa == 0.5).int()
    else:               # the amax's exponent minus that of `largest`  [MX, floor rule]
        exponent = torch.frexp(amax_b).exponent - math.frexp(largest)[1]
    return (exponent.clamp(-127, 127) + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def row_slices(x_rk: Tensor, multiple: int = 1):
    """Slices of whole rows. ours: 65,536 values at a time stay in a CPU core's cache, about twice as fast; a GPU takes all rows at once."""
    rows, columns = x_rk.shape
    step = rows if x_rk.is_cuda else max(1, 65_536 // max(1, columns * multiple)) * multiple
    return (slice(start, min(start + step, rows)) for start in range(0, rows, max(step, 1)))


def squared_error(m: Tensor, block_scale: Tensor, s_dec: Tensor, height: int) -> Tensor:
    """What each block (tile of `height` rows) loses with these scales. m: magnitudes [rows, blocks, 16]; scales: grids [rows / height, blocks]."""
    spread = lambda grid: grid.repeat_interleave(height, dim=0)[..., None] if height > 1 else grid[..., None]
    position = grid_position(m * spread(encode_scale(block_scale, s_dec)))
    m_hat = E2M1.to(m.device).index_select(0, position.int().flatten()).view(m.shape) * spread(block_scale.float()) * spread(s_dec)
    return (m_hat - m).square().sum(-1).unflatten(0, (-1, height)).sum(1)


def choose_scale(x_rk: Tensor, amax_b: Tensor, s_enc: Tensor, s_dec: Tensor, rule: str, height: int) -> Tensor:
    """The E4M3 scale of each block by max, four_over_six or mse; amax_b, s_enc and s_dec are grids [rows / height, blocks]."""
    base = amax_b * (s_enc * (1 / 6))          # in TE's order of operations, which fixes the last bit
    if rule == "max": return e4m3(base)
    chosen = torch.empty_like(base, dtype=torch.float8_e4m3fn)
    for rows in row_slices(x_rk, height):
        grid = slice(rows.start // height, rows.stop // height)
        m, s = x_rk[rows].abs().float().unflatten(-1, (-1, 16)), s_dec[grid]
        if rule == "four_over_six":
            six, four = e4m3(base[grid]), e4m3(1.5 * base[grid])
            pick_four = squared_error(m, four, s, height) < squared_error(m, six, s, height)      # a tie keeps 6
            chosen[grid] = torch.where(pick_four, four.float(), six.float()).to(torch.float8_e4m3fn)
            continue
        best, best_scale = squared_error(m, torch.zeros_like(s), s, height), e4m3(base[grid]).float()     # to beat: all zeros
        for byte in range(1, 127):
            scale = torch.tensor(byte, dtype=torch.uint8, device=m.device).view(torch.float8_e4m3fn).float().expand_as(s)
            error = squared_error(m, scale, s, height)
            best_scale = torch.where(error < best, scale, best_scale)
            best = torch.minimum(error, best)
        chosen[grid] = best_scale.to(torch.float8_e4m3fn)
    return chosen


# %% 6 · Quantize
# One function for weights, activations and gradients; the recipe of section 9 says which tensor gets which arguments.

def check_request(x: Tensor, block, rounding, scale_rule, seed, format, name) -> tuple[int, int]:
    """(height, width) of a block, or a ValueError that says what to change."""
    for value, known, label in ((rounding, ("nearest", "stochastic"), "rounding"), (format, ("nvfp4", "mxfp4"), "format"),
                                (scale_rule, ("max", "four_over_six", "mse"), "scale_rule")):
        if value not in known: raise ValueError(f"{label}={value!r} is unknown: use one of {', '.join(known)}.")
    width = 16 if format == "nvfp4" else 32
    if tuple(block) not in ((1, 16), (16, 16), (1, width), (width, width)):
        raise ValueError(f"block={block} is not an NVFP4 block: use (1, 16) for rows or (16, 16) for tiles.")
    height = 1 if block[0] == 1 else width
    if format == "mxfp4" and scale_rule != "max":
        raise ValueError(f"scale_rule={scale_rule!r} chooses among E4M3 scales, and MXFP4 has powers of two: use scale_rule='max'.")
    if rounding == "stochastic" and scale_rule != "max":       # [TE] raises as well
        raise ValueError(f"stochastic rounding is for gradients and scale_rule={scale_rule!r} for weights: use scale_rule='max'.")
    if rounding == "stochastic" and seed is None: raise ValueError("stochastic rounding draws from a seed: pass seed=... (draw_seed_for makes one).")
    if not x.is_floating_point(): raise ValueError(f"{name} has dtype {x.dtype}: only floating point tensors can be quantized.")
    if x.ndim == 0 or x.shape[-1] % width:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, and blocks hold {width} values of the last dimension: pad it to a multiple of {width}.")
    if height > 1 and (x.ndim < 2 or x.shape[-2] % height):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, and tiles span {height} rows: pad the second last dimension to a multiple of {height}.")
    return height, width


def check_amax(amax: Tensor | float, grid: tuple[int, ...], x: Tensor, name: str) -> Tensor:
    amax = torch.as_tensor(amax, dtype=torch.float32, device=x.device)
    if not (amax.isfinite() & (amax >= 0)).all():
        raise ValueError(f"the amax given for {name} must be finite and not negative: it is the largest magnitude.")
    aligned = align(amax, len(grid)).shape
    if len(aligned) > len(grid) or any(a not in (1, g) for a, g in zip(aligned[::-1], grid[::-1])):
        raise ValueError(f"amax of shape {tuple(amax.shape)} does not fit {name} {tuple(x.shape)}: pass a scalar, or one per leading index.")
    return amax


def block_amax(x_rk: Tensor, height: int, width: int) -> Tensor:
    """The largest magnitude of every block, fp32 [rows / height, K / width]."""
    amax_rq = torch.empty(x_rk.shape[0], x_rk.shape[1] // width, device=x_rk.device)
    for rows in row_slices(x_rk):
        amax_rq[rows] = x_rk[rows].abs().unflatten(-1, (amax_rq.shape[1], width)).amax(-1)
    return amax_rq.unflatten(0, (x_rk.shape[0] // height, height)).amax(1)


def encode_rows(x_rk: Tensor, enc_gq: Tensor, height: int, width: int, seed: int | None, offset: int) -> Tensor:
    """Packed codes [rows, K/2]. enc 0 marks a block whose scale is 0: code 0 throughout, without the sign."""
    codes = torch.empty(x_rk.shape[0], x_rk.shape[1] // 2, dtype=torch.uint8, device=x_rk.device)
    for rows in row_slices(x_rk, height):
        enc = enc_gq[rows.start // height : rows.stop // height].repeat_interleave(height, dim=0)[..., None]
        x = x_rk[rows].float().unflatten(-1, (-1, width))
        u = None if seed is None else uniform_draws(seed, rows.start * x_rk.shape[1] + offset, x.numel(), x.device).view(x.shape)
        codes[rows] = pack((encode_e2m1(x * enc, u) * (enc != 0)).flatten(1))
    return codes


def quantize(x: Tensor, block: tuple[int, int] = (1, 16), rounding: Literal["nearest", "stochastic"] = "nearest",
             scale_rule: Literal["max", "four_over_six", "mse"] = "max", amax: Tensor | None = None, seed: int | Tensor | None = None,
             offset: int = 0, format: Literal["nvfp4", "mxfp4"] = "nvfp4", impl: str = "auto", name: str = "input") -> NVFP4Tensor:
    """Blocks of 16 along the last dimension, or 16×16 tiles over the last two; leading dimensions are free.

    amax: the tensor's largest magnitude when it is known or shared: a scalar; [e] for a stack [e, f, l], or [r] for rows, of which each then
        has its own second level; [1, K/16] gives block columns their own. None measures it: one over a matrix, one *per leading index* of a
        stack, since every expert is a weight matrix of its own. Values beyond a given amax saturate.
    seed, offset: of the stochastic draws; element i of x takes draw i + offset, so a piece rounds as it does within the whole (offset % 16 == 0).
    format="mxfp4": blocks of 32 for either block argument, no second level (amax is not used).
    Arithmetic is fp32 whatever x's dtype. ValueError: a width that blocks do not divide, NaN or Inf in x (`name` is how the message calls it).
    """
    height, width = check_request(x, block, rounding, scale_rule, seed, format, name)
    if twin := find_twin("nvfp4", "quantize", impl, x): return twin(x, block, rounding, scale_rule, amax, seed, offset, format)
    x = x.detach().float() if x.dtype == torch.float64 else x.detach()
    lead, x_rk = x.shape[:-1], x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    blocks = x.shape[-1] // width

    # 1. the largest magnitudes
    amax_gq = block_amax(x_rk, height, width)
    if not amax_gq.isfinite().all():           # NOTE: a NaN survives amax, so this small grid tells about all of x
        raise ValueError(f"{name} holds NaN or Inf and cannot be quantized: find the step that made it, or skip this batch.")
    grid = (*lead[:-1], lead[-1] // height, blocks) if lead else (blocks,)
    if amax is None:
        amax = amax_gq.view(grid).flatten(-2).amax(-1) if x.ndim > 2 else amax_gq.amax() if amax_gq.numel() else amax_gq.new_zeros(())

    # 2. scales: one per tensor, one per block
    if format == "mxfp4":
        s_dec = torch.ones((), device=x.device)
        s_dec_gq, scale_gq = s_dec.expand(amax_gq.shape), power_of_two_scale(amax_gq, FP4_MAX, round_up=False)
    else:
        budget = FOUR_OVER_SIX_MAX if scale_rule == "four_over_six" else E4M3_MAX
        s_enc, s_dec = global_scales(check_amax(amax, grid, x, name), budget)
        s_enc_gq, s_dec_gq = (align(s, len(grid)).expand(grid).reshape(amax_gq.shape) for s in (s_enc, s_dec))
        scale_gq = choose_scale(x_rk, amax_gq, s_enc_gq, s_dec_gq, scale_rule, height)
    enc_gq = encode_scale(scale_gq, s_dec_gq).masked_fill((amax_gq == 0) | (scale_gq.float() == 0), 0)

    # 3. codes
    codes = encode_rows(x_rk, enc_gq, height, width, seed if rounding == "stochastic" else None, offset)
    scale = scale_gq.view(torch.uint8).repeat_interleave(height, dim=0).view(scale_gq.dtype)
    return NVFP4Tensor(codes.view(*lead, blocks * width // 2), scale.view(*lead, blocks), s_dec, (height, width))


# %% 7 · Hadamard transform  [NVFP4, random Hadamard transforms]
# An outlier costs its 15 neighbours their bits. An orthogonal H spreads it over the block: (X H)(Y H)ᵀ = X Yᵀ, so a product whose operands both
# carry H along the contraction is unchanged but for rounding. H = diag(signs) · Sylvester's 16×16 Hadamard / 4, one fixed sign vector for every
# layer; the signs keep a constant block, which H alone would turn into one outlier, from becoming one. Used for the weight gradient only.

HADAMARD_SIGNS = torch.tensor([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1.0])        # [TE]
HADAMARD4 = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
HADAMARD16 = HADAMARD_SIGNS[:, None] * torch.kron(HADAMARD4, HADAMARD4) / 4      # entries ±1/4: exact in every float format, bf16 included


def hadamard16(x: Tensor, dim: int = -1) -> Tensor:
    """Every 16 neighbours along `dim` times H; in fp32, or fp64 when x is. ours: TE's reference leaves bf16 data in bf16, one rounding more."""
    if x.shape[dim] % 16: raise ValueError(f"the Hadamard transform mixes 16 values: pad dimension {dim} of {tuple(x.shape)} to a multiple of 16.")
    x = (x if x.dtype == torch.float64 else x.float()).movedim(dim, 0)
    tiles = x.reshape(x.shape[0] // 16, 16, math.prod(x.shape[1:]))
    with torch.autocast(x.device.type, enabled=False):
        return (HADAMARD16.to(x).T @ tiles).view(x.shape).movedim(0, dim)


# %% 8 · Products
# FP4 tensor cores multiply a [m, k] by bᵀ with b [n, k]: both operands lie along the contraction. Decoding to fp32 and multiplying in fp32 gives the
# same numbers up to the order of the sum. Grouped products follow torch's grouped_mm: `offsets_e` holds where each expert's part ends;
# with b [e, n, k] it cuts the rows of a, with b [n, k] the common contraction (a weight gradient per expert: [e, m, n]).

def product(a: Tensor, b: Tensor, offsets_e: Tensor | None = None) -> Tensor:
    """a · bᵀ in the operands' own precision, whole or by expert."""
    with torch.autocast(a.device.type, enabled=False):
        if offsets_e is None: return a @ b.mT
        if a.is_cuda and b.ndim == 3 and a.dtype == torch.bfloat16 and a.shape[1] % 8 == 0: return torch._grouped_mm(a, b.mT, offs=offsets_e.int())
        ends, cut = offsets_e.tolist(), a.shape[0 if b.ndim == 3 else 1]
        if ends[-1] != cut or (b.ndim == 3 and b.shape[0] != len(ends)):
            raise ValueError(f"offsets_e ends at {ends[-1]} for {len(ends)} experts, but the operands are {tuple(a.shape)} and {tuple(b.shape)}: "
                             "it must hold each expert's end, the last equal to the number of rows.")
        spans = list(zip([0, *ends], ends))
        if b.ndim == 3: return torch.cat([a[start:end] @ b[e].T for e, (start, end) in enumerate(spans)])
        return torch.stack([a[:, start:end] @ b[:, start:end].T for start, end in spans])


def matmul(a: NVFP4Tensor, b: NVFP4Tensor, offsets_e: Tensor | None = None, out_dtype: torch.dtype | None = None, impl: str = "auto") -> Tensor:
    """a · bᵀ of two quantized operands, summed in fp32 as the hardware does (in fp64 for out_dtype float64, for tests); fp32 out by default."""
    if twin := find_twin("nvfp4_gemm", "matmul", impl, a.codes): return twin(a, b, offsets_e, out_dtype)
    dtype = torch.float64 if out_dtype == torch.float64 else torch.float32
    return product(a.dequantize(dtype), b.dequantize(dtype), offsets_e).to(out_dtype or dtype)


def matmul_w4a16(x: Tensor, w: NVFP4Tensor, offsets_e: Tensor | None = None, impl: str = "auto") -> Tensor:
    """x · wᵀ with 4-bit weights and x in its own dtype: how a GPU without FP4 tensor cores serves the checkpoint.  [Ultra, quantization]"""
    if twin := find_twin("nvfp4_gemm", "matmul_w4a16", impl, x): return twin(x, w, offsets_e)
    return product(x, w.dequantize(x.dtype), offsets_e)


def swizzle_scales(block_scale: Tensor) -> Tensor:
    """Block scales [..., rows, K/16] in the order Blackwell's product reads them: tiles of 128 rows × 4 scales, each stored as 32 × (4 × 4) so that
    rows r, r+32, r+64, r+96 lie side by side; rows and columns are padded with zeros to whole tiles. Returns [..., bytes]."""
    scale = block_scale.view(torch.uint8)
    rows, columns = scale.shape[-2:]
    scale = F.pad(scale, (0, -columns % 4, 0, -rows % 128))
    tiles = scale.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4, 32))             # [..., row tile, quarter, row, column tile, column]
    return tiles.movedim(-2, -4).transpose(-3, -2).flatten(-5).view(block_scale.dtype)


# %% 9 · The three products and their operands  [NVFP4, training methodology; TE, NVFP4 tensor]
# Three products, each along another dimension, so every tensor is quantized once per direction, always from the high-precision values:
#     fprop  Y  = X Wᵀ     X rows, nearest                       W tiles, nearest                        along input features
#     dgrad  dX = dY W     dY rows, stochastic                   the same W tiles, transposed            along output features
#     wgrad  dW = dYᵀ X    dY columns, Hadamard then stochastic  X columns, Hadamard then nearest        along tokens
# Tiles: both passes see one W, so dX is the gradient of the function that was computed. Stochastic rounding: rounding errors of small gradients
# average out over steps in place of adding up. The tensor maximum of columns is taken after the transform. dW is returned in W's dtype, fp32.

@dataclass(frozen=True)
class NVFP4Recipe:
    """Each ingredient has a switch, so that an experiment can take one away."""
    weight_tiles: bool = True              # 16×16 weight tiles shared by fprop and dgrad; False: 1×16 along each product's own contraction
    rht: bool = True                       # Hadamard transform of both operands of wgrad
    stochastic_gradients: bool = True      # stochastic rounding of dY in dgrad and wgrad
    forward: bool = True                   # fprop in 4 bits; False: in the layer's high precision
    backward: bool = True                  # dgrad and wgrad in 4 bits; False: in high precision
    format: Literal["nvfp4", "mxfp4"] = "nvfp4"     # mxfp4: blocks of 32 with power-of-two scales, for comparison

    @property
    def width(self) -> int:
        """Values a block holds: what layer widths must be multiples of."""
        return 16 if self.format == "nvfp4" else 32


def expert_of_rows(offsets_e: Tensor, rows: int) -> Tensor:
    return torch.searchsorted(offsets_e, torch.arange(rows, device=offsets_e.device, dtype=offsets_e.dtype), right=True)


def amax_by_expert(amax_r: Tensor, offsets_e: Tensor) -> Tensor:
    """Each row's entry becomes the maximum over its expert's rows: [r] -> [r]. Every expert has its own second level, as if quantized alone."""
    expert_r = expert_of_rows(offsets_e, len(amax_r))
    return amax_r.new_zeros(len(offsets_e)).scatter_reduce(0, expert_r, amax_r, "amax")[expert_r]


def padded_offsets(offsets_e: Tensor, width: int = 16) -> Tensor:
    """Ends of the experts once each has whole blocks of tokens:  [3, 3, 20] -> [16, 16, 48]."""
    counts_e = offsets_e.diff(prepend=offsets_e.new_zeros(1))
    return ((counts_e + width - 1) // width * width).cumsum(0)


def pad_tokens(x_rd: Tensor, offsets_e: Tensor | None, width: int) -> Tensor:
    """Zero rows until the token axis (of every expert) is a multiple of the block: zeros add nothing to a sum over tokens."""
    rows = x_rd.shape[0]
    if offsets_e is None: return F.pad(x_rd, (0, 0, 0, -rows % width))
    ends_e = padded_offsets(offsets_e, width)
    shift_e = ends_e.roll(1) - offsets_e.roll(1)           # rows of zeros inserted before each expert
    shift_e[0] = 0
    padded = x_rd.new_zeros(int(ends_e[-1]), x_rd.shape[1])
    padded[torch.arange(rows, device=x_rd.device) + shift_e[expert_of_rows(offsets_e, rows)]] = x_rd
    return padded


def quantize_rows(x_rd: Tensor, offsets_e: Tensor | None = None, rounding="nearest", seed: int | Tensor | None = None, format="nvfp4",
                  name="input", impl: str = "auto") -> NVFP4Tensor:
    """The operand whose contraction is its features: fprop's X, dgrad's dY."""
    if twin := find_twin("nvfp4", "quantize_rows", impl, x_rd): return twin(x_rd, offsets_e, rounding, seed, format)
    amax = None if offsets_e is None or format == "mxfp4" else amax_by_expert(x_rd.detach().abs().amax(-1).float(), offsets_e)
    return quantize(x_rd, (1, 16), rounding, amax=amax, seed=seed, format=format, impl=impl, name=name)


def quantize_columns(x_rd: Tensor, offsets_e: Tensor | None = None, rounding="nearest", seed: int | Tensor | None = None, format="nvfp4",
                     name="input", rht: bool = True, impl: str = "auto") -> NVFP4Tensor:
    """The operand whose contraction is the tokens, [d, padded tokens]: wgrad's X and dY. Experts end at padded_offsets(offsets_e)."""
    if twin := find_twin("nvfp4", "quantize_columns", impl, x_rd): return twin(x_rd, offsets_e, rounding, seed, format, rht)
    padded_rd = pad_tokens(x_rd.detach(), offsets_e, 16 if format == "nvfp4" else 32)
    padded_rd = hadamard16(padded_rd, dim=0) if rht else padded_rd
    amax = None
    if offsets_e is not None and format == "nvfp4":        # one entry per block of 16 tokens, since no block holds two experts
        amax = amax_by_expert(padded_rd.abs().amax(-1).float(), padded_offsets(offsets_e))[None, ::16]
    return quantize(padded_rd.T, (1, 16), rounding, amax=amax, seed=seed, format=format, impl=impl, name=name)


def quantize_pair(x_rd: Tensor, offsets_e: Tensor | None = None, rounding: Literal["nearest", "stochastic"] = "nearest", rht: bool = True,
                  seed: int | Tensor | None = None, format: Literal["nvfp4", "mxfp4"] = "nvfp4", impl: str = "auto", name: str = "input"
                  ) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """(rows, columns): both directions of one tensor from one read; the Hadamard transform touches the columns only. Each gets a seed of its own
    (pair_seeds), because equal draws in both copies would make the errors of dX and dW go together."""
    if twin := find_twin("nvfp4", "quantize_pair", impl, x_rd): return twin(x_rd, offsets_e, rounding, rht, seed, format)
    seeds = (None, None) if seed is None else pair_seeds(seed)
    return (quantize_rows(x_rd, offsets_e, rounding, seeds[0], format, name, impl),
            quantize_columns(x_rd, offsets_e, rounding, seeds[1], format, name, rht, impl))


# %% 10 · The linear layer
# One autograd function for plain and grouped layers, and a module as thin as nn.Linear.

GRADIENT = "the gradient of a linear layer's output"


class _NVFP4Linear(torch.autograd.Function):
    # NOTE: X and W are saved in high precision and quantized again in the backward. ours: the simpler choice, it serves every switch and gives the
    # same codes, since nearest rounding repeats itself. TE saves X's 4-bit columns in place of X, about a quarter of the memory of bf16.

    @staticmethod
    def forward(ctx, x_rd, w, recipe, offsets_e, seed, dtype):
        ctx.save_for_backward(x_rd, w, offsets_e)
        ctx.recipe, ctx.seed, ctx.dtype = recipe, seed, dtype
        if not recipe.forward: return product(x_rd.to(dtype), w.to(dtype), offsets_e)
        x_rows = quantize_rows(x_rd, offsets_e, format=recipe.format, name="the input of a linear layer")
        w_rows = quantize(w, (16, 16) if recipe.weight_tiles else (1, 16), format=recipe.format, name="the weight of a linear layer")
        return matmul(x_rows, w_rows, offsets_e, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_ro):
        (x_rd, w, offsets_e), recipe, dx, dw = ctx.saved_tensors, ctx.recipe, None, None
        if not recipe.backward:
            dy_ro = dy_ro.to(ctx.dtype)
            dx = product(dy_ro, w.to(ctx.dtype).mT, offsets_e).to(x_rd.dtype) if ctx.needs_input_grad[0] else None
            dw = product(dy_ro.mT, x_rd.to(ctx.dtype).mT, offsets_e).to(w.dtype) if ctx.needs_input_grad[1] else None
            return dx, dw, None, None, None, None
        rounding, seed = ("stochastic", ctx.seed) if recipe.stochastic_gradients else ("nearest", None)
        dy_rows, dy_columns = quantize_pair(dy_ro, offsets_e, rounding, recipe.rht, seed, recipe.format, name=GRADIENT)
        if ctx.needs_input_grad[0]:
            w_columns = quantize(w, (16, 16), format=recipe.format).T if recipe.weight_tiles else quantize(w.mT, format=recipe.format)
            dx = matmul(dy_rows, w_columns, offsets_e, x_rd.dtype)
        if ctx.needs_input_grad[1]:
            x_columns = quantize_columns(x_rd, offsets_e, format=recipe.format, rht=recipe.rht)
            dw = matmul(dy_columns, x_columns, None if offsets_e is None else padded_offsets(offsets_e, recipe.width), w.dtype)
        return dx, dw, None, None, None, None


def output_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype when it is on, else x's: as nn.Linear would answer."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def nvfp4_linear(x_rd: Tensor, w: Tensor, recipe: NVFP4Recipe, offsets_e: Tensor | None = None, seed: int | Tensor = 0) -> Tensor:
    """y = x wᵀ with forward and backward by the recipe. Plain: w [o, i]. Grouped: w [e, o, i], the rows of x sorted by expert, offsets_e their ends
    (an expert may be empty). `seed` is for the stochastic rounding of this call's backward."""
    if x_rd.shape[-1] != w.shape[-1] or x_rd.ndim != 2 or w.ndim != (2 if offsets_e is None else 3):
        raise ValueError(f"x {tuple(x_rd.shape)} does not fit w {tuple(w.shape)}: x is [rows, i]; w is [o, i], or [e, o, i] with offsets_e.")
    return _NVFP4Linear.apply(x_rd, w, recipe, offsets_e, seed, output_dtype(x_rd))


class QuantizedLinear(nn.Module):
    """What NVFP4Linear and MXFP8Linear share: an fp32 weight [out, in], no bias, nn.Linear's init, any leading dimensions of x."""
    def __init__(self, in_features: int, out_features: int, width: int):
        super().__init__()
        for label, size in (("in_features", in_features), ("out_features", out_features)):
            if size % width:       # dgrad contracts over out_features, so both must hold whole blocks
                raise ValueError(f"{type(self).__name__}: {label}={size} is not a multiple of {width}, the values of a block: change that width.")
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.draw_seed = 0         # the trainer sets it before each forward, with draw_seed_for
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class NVFP4Linear(QuantizedLinear):
    """A linear layer whose three products run in 4 bits by the recipe."""
    def __init__(self, in_features: int, out_features: int, recipe: NVFP4Recipe | None = None):
        self.recipe = recipe or NVFP4Recipe()
        super().__init__(in_features, out_features, self.recipe.width)

    def forward(self, x: Tensor) -> Tensor:
        return nvfp4_linear(x.reshape(-1, x.shape[-1]), self.weight, self.recipe, seed=self.draw_seed).view(*x.shape[:-1], self.out_features)


# %% 11 · MXFP8  [MXFP8; Ultra, pretraining]
# The report keeps the output projections of its Mamba layers in 8 bits: in NVFP4 too many of their values were flushed to zero. E4M3 elements,
# blocks of 32, a power of two rounded up as scale, nearest everywhere, and each operand of the three products blocked along its contraction.

def mxfp8_round_trip(x: Tensor, name: str = "input") -> Tensor:
    """Quantize and dequantize blocks of 32 along the last dimension, in fp32."""
    if x.shape[-1] % 32:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, and MXFP8 blocks hold 32 values along the last dimension: pad it to a multiple of 32.")
    blocks = x.detach().float().unflatten(-1, (x.shape[-1] // 32, 32))
    amax = blocks.abs().amax(-1, keepdim=True)
    if not amax.is_cuda and not amax.isfinite().all():      # a GPU is not made to wait for the answer: there a NaN goes on to the loss
        raise ValueError(f"{name} holds NaN or Inf and cannot be quantized: find the step that made it, or skip this batch.")
    scale = power_of_two_scale(amax, E4M3_MAX, round_up=True).float()
    return (e4m3(blocks / scale).float() * scale).flatten(-2)


def mxfp8_product(a: Tensor, b: Tensor, name: str = "input") -> Tensor:
    """a · bᵀ of operands rounded to MXFP8, fp32. On a GPU in bf16, which holds E4M3 times a power of two exactly, with fp32 sums."""
    a, b = mxfp8_round_trip(a, name), mxfp8_round_trip(b, "the weight of a linear layer")
    return torch.mm(a.bfloat16(), b.bfloat16().mT, out_dtype=torch.float32) if a.is_cuda else product(a, b)


class _MXFP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_rd, w_oi, dtype):
        ctx.save_for_backward(x_rd, w_oi)
        return mxfp8_product(x_rd, w_oi, "the input of a linear layer").to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_ro):
        x_rd, w_oi = ctx.saved_tensors
        dx = mxfp8_product(dy_ro, w_oi.mT, GRADIENT).to(x_rd.dtype)
        return dx, mxfp8_product(*(pad_tokens(a_rd, None, 32).mT for a_rd in (dy_ro, x_rd))).to(w_oi.dtype), None


class MXFP8Linear(QuantizedLinear):
    """A linear layer whose three products run in MXFP8. `draw_seed` is there as on every quantized module; nearest rounding has no use for it."""
    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, 32)

    def forward(self, x: Tensor) -> Tensor:
        return _MXFP8Linear.apply(x.reshape(-1, x.shape[-1]), self.weight, output_dtype(x)).view(*x.shape[:-1], self.out_features)


# %% 12 · Measurements
# Signal to error in decibels, 10·log10(sum x² / sum (x_hat - x)²), and the error's share of the energy: 20 dB is 1 % of it, or 10 % of the size.

DISTRIBUTIONS = ("Gaussian", "Laplace", "Student-t3", "outliers")
METHODS = {                      # name -> (target, approximation); the Hadamard row is compared in its own basis, which keeps all lengths
    "NVFP4 nearest": lambda x: (x, quantize(x).dequantize()),
    "  stochastic": lambda x: (x, quantize(x, rounding="stochastic", seed=0).dequantize()),
    "  16x16 tiles": lambda x: (x, quantize(x, block=(16, 16)).dequantize()),
    "  Hadamard, nearest": lambda x: ((y := hadamard16(x)), quantize(y).dequantize()),
    "  Four-Over-Six": lambda x: (x, quantize(x, scale_rule="four_over_six").dequantize()),
    "  mse sweep": lambda x: (x[:96], quantize(x[:96], scale_rule="mse").dequantize()),
    "MXFP4 nearest": lambda x: (x, quantize(x, format="mxfp4").dequantize()),
    "FP8 per tensor": lambda x: (x, e4m3_per_tensor(x)),
    "MXFP8": lambda x: (x, mxfp8_round_trip(x)),
}


def e4m3_per_tensor(x: Tensor) -> Tensor:
    """FP8 as the released checkpoint stores shared experts and Mamba weights: one fp32 scale, the tensor's maximum at 448.  [Ultra, quantization]"""
    scale = x.abs().max() / E4M3_MAX
    return e4m3(x / scale).float() * scale


def sample(distribution: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(rows, columns, generator=generator)
    x = normal()
    if distribution == "Laplace": return x.sign() * torch.empty(rows, columns).exponential_(generator=generator)
    if distribution == "Student-t3": return x / ((normal().square() + normal().square() + normal().square()) / 3).sqrt()
    if distribution == "outliers":             # one value in a thousand is 20 times larger
        return torch.where(torch.rand(rows, columns, generator=generator) < 1e-3, 20 * x, x)
    return x


def relative_error(target: Tensor, approximation: Tensor) -> float:
    """Energy of the error over energy of the target."""
    energy = lambda y: y.square().sum(dtype=torch.float64)
    return (energy(approximation - target) / energy(target)).item()


def decibels(relative: float) -> float:
    return -10 * math.log10(relative)


def measure_errors(rows: int = 1024, columns: int = 4096, seed: int = 0) -> dict[tuple[str, str], float]:
    """(method, distribution) -> relative squared error; the sweep, which tries 126 scales, reads 96 rows."""
    errors = {}
    for distribution in DISTRIBUTIONS:
        x = sample(distribution, rows, columns, seed)
        errors.update({(method, distribution): relative_error(*function(x)) for method, function in METHODS.items()})
    return errors


def measure_long_sum(terms: int = 4096, seed: int = 0) -> dict[str, Tensor]:
    """Running sums of one small gradient entry over `terms` steps. In each step its block also holds a value of size 1, which sets the scale:
    nearest rounds everything below 1/24 to zero, in every step; stochastic rounding is wrong each time and right on average."""
    x = 0.02 * torch.empty(terms, 16).exponential_(generator=torch.Generator().manual_seed(seed))
    x[:, 0] = 1
    values = dict(true=x, nearest=quantize(x).dequantize(), stochastic=quantize(x, rounding="stochastic", seed=seed).dequantize())
    return {name: value[:, 1:].double().mean(1).cumsum(0) for name, value in values.items()}


def measure_consistency(size: int = 1024, seed: int = 0) -> list[list]:
    """The weight that fprop multiplies with against the one that dgrad does."""
    w, rows = sample("Gaussian", size, size, seed), []
    for label, tiles in (("16x16 tiles", True), ("1x16, each along its contraction", False)):
        forward = quantize(w, (16, 16) if tiles else (1, 16))
        backward = forward.T.dequantize().T if tiles else quantize(w.T).dequantize().T
        percent = [f"{100 * math.sqrt(relative_error(*pair)):.2f} %" for pair in ((w, forward.dequantize()), (w, backward))]
        rows.append([label, *percent, f"{100 * relative_error(forward.dequantize(), backward) ** 0.5:.2f} %"])
    return rows


def measure_saturation(rows: int = 1024, columns: int = 4096, seed: int = 0, draws: int = 8) -> dict[str, float]:
    """What stochastic rounding cannot repair: where E4M3 rounded the block scale down, the block's maximum is cut to 6.
    gain: the factor by which a Gaussian comes back on average, sum(x_hat x) / sum(x²), exactly (cut, no rounding) and by averaging draws."""
    x = sample("Gaussian", rows, columns, seed)
    q = quantize(x)
    limit = (FP4_MAX * q.block_scale.float() * q.global_scale)[..., None]
    blocks = x.unflatten(-1, (-1, 16))
    over = blocks.abs().amax(-1, keepdim=True) / limit
    gain = lambda y: (y.double() * x.double()).sum().item() / x.double().square().sum().item()
    mean = sum(quantize(x, rounding="stochastic", seed=draw).dequantize() for draw in range(draws)) / draws
    return dict(blocks_cut=(over > 1).float().mean().item(), worst_excess=over.max().item() - 1,
                gain_cut=gain(blocks.clamp(-limit, limit).flatten(1)) - 1, gain_stochastic=gain(mean) - 1)


def measure_layer(tokens: int = 512, i: int = 256, o: int = 256, steps: int = 16, seed: int = 0) -> list[list]:
    """Errors of the three products, and of dW averaged over steps with the same data: what rounding leaves when its errors do not cancel."""
    x, dy = sample("Student-t3", tokens, i, seed), 1e-3 * sample("Student-t3", tokens, o, seed + 1)
    w = (sample("Gaussian", o, i, seed + 2) / i**0.5).requires_grad_()
    x.requires_grad_()
    recipes = {"full recipe": {}, "no weight tiles": dict(weight_tiles=False), "no Hadamard": dict(rht=False),
               "nearest gradients": dict(stochastic_gradients=False), "high-precision backward": dict(backward=False),
               "MXFP4, full recipe": dict(format="mxfp4")}
    exact = [t.detach().double() for t in (x @ w.T, dy @ w, dy.T @ x)]
    rows = []
    for label, switches in recipes.items():
        sums = [torch.zeros_like(t) for t in exact]
        first = None
        for step in range(steps if NVFP4Recipe(**switches).backward else 1):
            y = nvfp4_linear(x, w, NVFP4Recipe(**switches), seed=draw_seed_for(seed, step))
            results = [y, *torch.autograd.grad(y, (x, w), dy)]
            first = first or [t.detach() for t in results]
            sums = [s + t.detach() for s, t in zip(sums, results)]
        mean_dw = sums[2] / (step + 1)
        percent = [100 * math.sqrt(relative_error(*pair)) for pair in (*zip(exact, first), (exact[2], mean_dw))]
        rows.append([label, *(f"{p:.2f} %" for p in percent)])
    return rows


def measure_twins(device: str, size: int, seed: int = 0) -> list[list]:
    """Quantizer and products beside their Triton twins: milliseconds of both, and the share of codes that differ (for products the error)."""
    x = sample("Gaussian", size, size, seed).to(device)
    q, draws, rows = quantize(x, impl="torch"), dict(rounding="stochastic", seed=seed), []
    runs = {"quantize, rows": lambda impl: quantize(x, impl=impl).codes, "quantize, tiles": lambda impl: quantize(x, (16, 16), impl=impl).codes,
            "quantize, stochastic": lambda impl: quantize(x, **draws, impl=impl).codes,
            "quantize_pair, stochastic": lambda impl: quantize_pair(x, **draws, impl=impl)[1].codes,
            "matmul": lambda impl: matmul(q, q, impl=impl), "matmul_w4a16, 16 rows": lambda impl: matmul_w4a16(x[:16], q, impl=impl)}
    for label, run in runs.items():
        (plain_ms, plain), (twin_ms, twin) = (best_ms(lambda run=run, impl=impl: run(impl)) for impl in ("torch", "triton"))
        gap = (plain != twin).float().mean().item() if plain.dtype == torch.uint8 else relative_error(plain, twin) ** 0.5
        rows.append([label, plain_ms, twin_ms, f"{gap:.0e}"])
    return rows


# %% 13 · Figures

def plot_grid_and_scales(path: Path) -> None:
    fig, (left, right) = new_figure(columns=2, width=6.6)
    y = torch.linspace(0, 7.2, 2000)
    left.plot(y, E2M1[encode_e2m1(y).int()], color="C0", linewidth=2, label="nearest")
    left.plot(y.clamp(max=6), y.clamp(max=6), color="C1", linewidth=1.2, linestyle="--", label="stochastic, on average")
    left.axvspan(6, 7.2, color="C3", alpha=0.12, linewidth=0)
    left.text(6.6, 0.3, "cut to 6", color="C3", ha="center", fontsize=10)
    left.set(title="Eight magnitudes, with steps that widen: ½, 1, 2", xlabel="value / scale", ylabel="what 4 bits keep", yticks=E2M1[:8].tolist())
    left.legend(loc="upper left", fontsize=10)
    sizes = torch.tensor([1.0, 0.3, 3.0, 0.7, 0.1, 1.6])
    x = sample("Gaussian", 1, 96, seed=3) * sizes.repeat_interleave(16)
    q = quantize(x)
    for block, scale in enumerate((q.block_scale.float() * q.global_scale)[0].tolist()):
        levels = scale * torch.cat((E2M1[:8], -E2M1[1:8]))
        right.hlines(levels, block - 0.42, block + 0.42, color="C0", linewidth=0.9, alpha=0.7, label="levels it can store" if block == 0 else None)
        right.scatter(block + torch.linspace(-0.36, 0.36, 16), x[0, 16 * block : 16 * block + 16], s=14, color="C1", zorder=3,
                      label="values" if block == 0 else None)
    right.set(title="Every block of 16 values scales the grid to its own maximum", xlabel="block", ylabel="value", xticks=range(6), ylim=(-3.6, 4.8))
    right.legend(loc="upper right", fontsize=10)
    save_figure(fig, path)


def plot_errors(errors: dict[tuple[str, str], float], path: Path) -> None:
    fig, (left, right) = new_figure(columns=2, width=6.6)
    x = sample("Gaussian", 512, 1024, seed=1)
    block_max = x.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True)
    for label, kwargs in (("nearest", {}), ("stochastic", dict(rounding="stochastic", seed=1)), ("Four-Over-Six", dict(scale_rule="four_over_six"))):
        error = ((quantize(x, **kwargs).dequantize() - x).unflatten(-1, (-1, 16)) / block_max).flatten()
        left.hist((100 * error).numpy(), bins=121, range=(-30, 30), histtype="step", linewidth=1.6, density=True, label=label)
    left.set(title="Stochastic errors reach twice as far; Four-Over-Six shortens the tails", xlabel="error, % of the block's maximum",
             ylabel="density")
    left.legend(fontsize=10)
    methods = [method for method in METHODS if "8" not in method]          # FP8 lies 10 dB above the page
    for method, marker in zip(methods, "osD^vPX"):
        right.plot(range(4), [decibels(errors[method, d]) for d in DISTRIBUTIONS], marker=marker, markersize=8, linewidth=1, alpha=0.85,
                   label=method.strip())
    right.set(title="Heavy tails hurt tiles and powers of two; a searched scale always helps", ylabel="signal to error, dB (higher is better)",
              xlim=(-0.2, 5.1), xticks=range(4))
    right.set_xticklabels(DISTRIBUTIONS)
    right.legend(fontsize=9, loc="center right")
    save_figure(fig, path)


def plot_hadamard(path: Path) -> None:
    fig, (left, right) = new_figure(columns=2, width=6.6)
    x = sample("Gaussian", 1, 64, seed=5)
    x[0, 21] = 12
    y = hadamard16(x)
    left.vlines(range(64), 0, x[0], color="C3", linewidth=4, alpha=0.45, label=f"before: largest {x.abs().max():.1f}")
    left.vlines(range(64), 0, y[0], color="C0", linewidth=1.8, label=f"after: largest {y.abs().max():.1f}")
    for edge in (16, 32, 48): left.axvline(edge - 0.5, color="0.6", linewidth=0.8, linestyle=":")
    left.set(title="One outlier becomes sixteen values of a quarter of its size", xlabel="token (dotted: blocks of 16)", ylabel="value")
    left.legend(fontsize=10)
    heavy = sample("Student-t3", 512, 1024, seed=6)
    for label, data, color in (("before", heavy, "C3"), ("after", hadamard16(heavy), "C0"), ("Gaussian", sample("Gaussian", 512, 1024), "0.5")):
        blocks = data.unflatten(-1, (-1, 16))
        ratio = (blocks.abs().amax(-1) / blocks.square().mean(-1).sqrt()).flatten()
        right.hist(ratio.numpy(), bins=90, range=(1, 4), histtype="step", linewidth=1.8, density=True, color=color,
                   label=f"{label}: median {ratio.median():.2f}")
    right.set(title="After the transform, blocks of a heavy-tailed tensor look Gaussian", ylabel="density",
              xlabel="largest value of a block / its root mean square (4 = one value has it all)")
    right.legend(fontsize=10)
    save_figure(fig, path)


def plot_long_sum(sums: dict[str, Tensor], path: Path) -> None:
    fig, ax = new_figure(width=7.2)
    steps = range(1, len(sums["true"]) + 1)
    for (name, values), color, width in zip(sums.items(), ("0.35", "C3", "C0"), (5, 2, 1.5)):
        ax.plot(steps, values, color=color, linewidth=width, alpha=0.6 if name == "true" else 1, label=f"{name}: {values[-1]:.1f}")
    ax.set(title="Nearest rounding loses small gradients for good, stochastic rounding only blurs them", xlabel="steps summed",
           ylabel="running sum of a small entry")
    ax.legend(fontsize=10)
    save_figure(fig, path)


# %% 14 · Main

@dataclass(frozen=True)
class Config:
    out: Path = Path("out")     # folder for figures and results.jsonl
    rows: int = 1024            # rows of the 4,096-column matrices in the error table
    seed: int = 0               # of the samples
    impl: Literal["auto", "torch", "triton"] = "auto"     # "triton", or "auto" on a GPU, adds a table of the kernels


def main(config: Config) -> None:
    writable_folder(config.out)
    device = demo_device(config.impl)
    started = time.perf_counter()
    errors = measure_errors(rows=config.rows, seed=config.seed)
    for title, show in (("signal to error, dB (higher is better)", decibels), ("error energy / signal energy (lower is better)", "{:.5f}".format)):
        print_table(f"{title}: {config.rows} x 4096", ["", *DISTRIBUTIONS], [[m, *(show(errors[m, d]) for d in DISTRIBUTIONS)] for m in METHODS])
    # change of the mean squared error against max scales, on the same 256 rows for both
    x = sample("Gaussian", 256, 4096, config.seed)
    of_max = relative_error(x, quantize(x).dequantize())
    change = {rule: relative_error(x, quantize(x, scale_rule=rule).dequantize()) / of_max - 1 for rule in ("four_over_six", "mse")}
    print_table("published beside ours (ours: independent Gaussians)", ["", "published", "ours"], [
        ["NVFP4, signal to error  [INT4vFP4: mean over model tensors]", "20.60 dB", f"{decibels(errors['NVFP4 nearest', 'Gaussian']):.2f} dB"],
        ["Four-Over-Six against max, MSE  [Ultra: median of 49,152 expert matrices]", "-16.4 %", f"{change['four_over_six']:.1%}"],
        ["mse sweep against max, MSE  [Ultra: 'an additional 27.1%', read as against max]", "-27.1 %", f"{change['mse']:.1%}"]])
    sums = measure_long_sum(seed=config.seed)
    bias = {name: 100 * (total[-1] / sums["true"][-1] - 1).item() for name, total in sums.items()}
    print_table("a sum of 4,096 small gradients beside large ones", ["rounding", "sum", "bias"],
                [[name, f"{total[-1]:.2f}", f"{bias[name]:+.2f} %"] for name, total in sums.items()])
    print_table("one weight, two products", ["weight blocks", "error in fprop", "error in dgrad", "fprop against dgrad"],
                measure_consistency(seed=config.seed))
    saturation = measure_saturation(rows=256, seed=config.seed)
    labels = ("blocks whose maximum is cut", "largest excess over 6", "gain of the cut alone", "gain of 8 stochastic roundings, averaged")
    print_table("the bias that stochastic rounding keeps: maxima above 6 are cut", ["Gaussian, blocks of 16", ""],
                [[label, f"{100 * value:+.2f} %"] for label, value in zip(labels, saturation.values())])
    print_table("a linear layer's products against fp64 (heavy-tailed X and dY): error size", ["recipe", "Y", "dX", "dW", "dW, mean of 16 steps"],
                measure_layer(seed=config.seed))
    if config.impl == "triton" or device == "cuda":
        twins = measure_twins(device, size=4096 if device == "cuda" else 64)
        print_table(f"the Triton kernels on {device}", ["", "PyTorch ms", "kernel ms", "differs by"], twins)
    plot_grid_and_scales(config.out / "01_grid_and_scales.png")
    plot_errors(errors, config.out / "01_errors.png")
    plot_hadamard(config.out / "01_hadamard.png")
    plot_long_sum(sums, config.out / "01_long_sum.png")
    seconds = round(time.perf_counter() - started, 1)
    write_row(config.out, "01_nvfp4", seconds=seconds, db={f"{m.strip()}, {d}": round(decibels(e), 2) for (m, d), e in errors.items()},
              mse_change={k: round(v, 4) for k, v in change.items()}, bias_percent={k: round(v, 3) for k, v in bias.items()},
              saturation={k: round(v, 5) for k, v in saturation.items()})
    print(f"\n{seconds} s; figures and results.jsonl are in {config.out}/")


if __name__ == "__main__":
    run_command(main, Config, __doc__)
