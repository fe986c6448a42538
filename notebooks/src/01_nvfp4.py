# %% [markdown]
# # 01 · NVFP4: what do four bits keep?
#
# Stage file: [`01_nvfp4.py`](../01_nvfp4.py). Every function that runs below is imported from it; open it beside this page.

# %%
# Finds the repository, or fetches it where there is none (Colab), and puts it on the import path.
import importlib
import os
import subprocess
import sys
from pathlib import Path

here = Path.cwd()
root = next((folder for folder in (here, *here.parents) if (folder / "experiments" / "results.jsonl").exists()), None)
if root is None:
    address = os.environ.get("REPOSITORY") or input("git address of this repository: ")
    subprocess.run(["git", "clone", "--depth", "1", address, "nemotron3"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", "nemotron3"], check=True)
    root = here / "nemotron3"
sys.path.insert(0, str(root))

import torch
from IPython.display import Image

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")      # kernels run in Triton's interpreter, slowly
nvfp4, table = importlib.import_module("01_nvfp4"), importlib.import_module("experiments.table")
pictures = nvfp4.writable_folder(root / "out" / "notebooks")

# %% [markdown]
# ## The question
#
# Nemotron 3 Ultra was pretrained on 20 trillion tokens with the matrix products of most layers in **four bits**. A 4-bit float (E2M1: one sign bit,
# two of exponent, one of mantissa) knows eight magnitudes: 0, ½, 1, 1½, 2, 3, 4 and 6. How can a network learn from gradients of all sizes when
# there are eight numbers to write them with?
#
# The answer has two halves. *Scales*: 16 neighbours share one, so the eight magnitudes are always near the numbers at hand. *Rounding*: where errors
# would add up over thousands of steps, round at random, so that they average out. You will see both, and where each of them fails.

# %% [markdown]
# ## By hand: sixteen numbers
#
# Two blocks of 16 values, the second four times as large. The tensor's maximum sits in the second block, so the first block's scale has to do
# something: watch it. See [§4 · Two-level scales](../01_nvfp4.py).

# %%
row = nvfp4.sample("Gaussian", 1, 32, seed=3)
row[:, 16:] *= 4
q = nvfp4.quantize(row)

# the two levels, from their definition
s_enc, s_dec = nvfp4.global_scales(row.abs().max())
wanted = row[0, :16].abs().max() * (s_enc * (1 / 6))       # the block's maximum is to become 6
stored = nvfp4.e4m3(wanted).float()                        # but a block scale has 8 bits too
print(f"largest value of the tensor {row.abs().max():.4f}: one fp32 scale of {s_dec:.6f} for all of it")
print(f"largest value of block 0    {row[0, :16].abs().max():.4f}: block scale {wanted:.3f}, stored in E4M3 as {stored:.3f}")

y = row[0, :16] * nvfp4.encode_scale(stored, s_dec)        # what E2M1 gets to see
code = nvfp4.unpack(q.codes)[0, :16].int()
back = q.dequantize()[0, :16]
nvfp4.print_table("the 16 numbers of block 0", ["value", "value / scale", "code", "on the grid", "decoded", "error"],
                  [[f"{row[0, i]:+.4f}", f"{y[i]:+.3f}", f"{code[i]:04b}", f"{nvfp4.E2M1[code[i]]:+g}", f"{back[i]:+.4f}",
                    f"{back[i] - row[0, i]:+.4f}"] for i in range(16)])
print(f"\n{8 * q.nbytes} bits for 32 values: 4 bits a code, 8 bits a block of 16, and 32 bits once")

# %% [markdown]
# Read the column *value / scale*. The largest magnitude lands at 6, or a little beside it, because E4M3 had to round the scale. If it lands above 6
# it is cut: that is a bias which no rounding scheme repairs, and the stage counts how often it happens (half of all blocks, by up to 6 %). Also
# look at the smallest values: anything below a quarter becomes zero, but a zero that remembers its sign (code `1000` is −0).
#
# The same picture for six blocks: each brings its own ruler.

# %%
nvfp4.plot_grid_and_scales(pictures / "01_grid.png")
Image(pictures / "01_grid.png")

# %% [markdown]
# ## Three rungs
#
# The same arithmetic three times: spelled out from the definition, as the fast function of [§6 · Quantize](../01_nvfp4.py), and as its Triton
# kernel (on a machine without a GPU in Triton's interpreter). Four bits leave no room for "almost equal": the codes have to agree **bit for bit**.
# Products of codes, in [§8 · Products](../01_nvfp4.py), may differ in the order of their sums only.

# %%
x = nvfp4.sample("Student-t3", 64, 64, seed=1)
w = nvfp4.sample("Gaussian", 48, 64, seed=2)

# rung 1: scale, then ask every value for the nearest of the 16 numbers on the grid
enc, dec = nvfp4.global_scales(x.abs().max())
blocks = x.unflatten(-1, (-1, 16))
scale = nvfp4.e4m3(blocks.abs().amax(-1) * (enc * (1 / 6)))
scaled = blocks * nvfp4.encode_scale(scale, dec)[..., None]
distance = (scaled.clamp(-6, 6)[..., None].double() - nvfp4.E2M1.double()).abs()
by_definition = nvfp4.encode_e2m1(scaled)
assert torch.equal(distance.gather(-1, by_definition.long()[..., None])[..., 0], distance.min(-1).values), "some code is not the nearest"

rungs = {"definition": None, "algorithm": "torch"} | ({"kernel": "triton"} if importlib.util.find_spec("triton") else {})
exact = nvfp4.product(nvfp4.quantize(x).dequantize(torch.float64), nvfp4.quantize(w).dequantize(torch.float64))
lines = []
for name, impl in rungs.items():
    codes = nvfp4.pack(by_definition.flatten(1)) if impl is None else nvfp4.quantize(x, impl=impl).codes
    out = exact if impl is None else nvfp4.matmul(nvfp4.quantize(x), nvfp4.quantize(w), impl=impl)
    wrong = (nvfp4.unpack(codes) != by_definition.flatten(1)).sum().item()
    lines.append([name, f"{wrong} of {x.numel():,}", f"{((out - exact).abs().max() / exact.abs().max()).item():.0e}"])
nvfp4.print_table("three rungs of one format", ["rung", "codes that differ", "product: largest error"], lines)

# %% [markdown]
# ## Experiment: one loud neighbour
#
# A block has one scale. Put **one** outlier among 16 Gaussian values and make it larger and larger: what is left of the other fifteen? Four ways to
# round, from the ingredients of the recipe ([§7 · Hadamard transform](../01_nvfp4.py), [§9 · The three products](../01_nvfp4.py)):
#
# - **nearest**, as weights and activations are rounded,
# - **stochastic**, as gradients are,
# - **Hadamard, nearest**: the transform first spreads the outlier over its block,
# - **Hadamard, stochastic**: what the weight gradient's operand gets.
#
# Two numbers tell the story. *Signal to error* says how wrong the fifteen are. *Gain* says how much of them comes back on average: 1 is unbiased, 0
# means that they are gone. Before you run it: which of the two do you expect the Hadamard transform to help?

# %% tags=["parameters"]
count = 4096                                  # blocks for each size of the outlier (tiny: 256)
sizes = [1, 2, 4, 8, 16, 32, 64, 128]         # of the outlier, where its neighbours have size 1 (tiny: [1, 64])
seed = 0                                      # of the values

# %%
unmix = lambda y: (y.unflatten(-1, (-1, 16)) @ nvfp4.HADAMARD16.T).flatten(-2)
random_up = dict(rounding="stochastic", seed=seed)
ways = {"nearest": lambda x: nvfp4.quantize(x).dequantize(),
        "stochastic": lambda x: nvfp4.quantize(x, **random_up).dequantize(),
        "Hadamard, nearest": lambda x: unmix(nvfp4.quantize(nvfp4.hadamard16(x)).dequantize()),
        "Hadamard, stochastic": lambda x: unmix(nvfp4.quantize(nvfp4.hadamard16(x), **random_up).dequantize())}

found = {}
for size in sizes:
    crowd = nvfp4.sample("Gaussian", count, 16, seed)
    crowd[:, 0] = size
    for way, run in ways.items():
        true, got = crowd[:, 1:], run(crowd)[:, 1:]
        found[way, size] = nvfp4.decibels(nvfp4.relative_error(true, got)), ((true * got).sum() / true.square().sum()).item()

for i, (title, form) in enumerate((("signal to error of the fifteen neighbours, dB", "{:.1f}"), ("gain of the fifteen neighbours", "{:.2f}"))):
    nvfp4.print_table(title, ["outlier", *map(str, sizes)], [[way, *(form.format(found[way, size][i]) for size in sizes)] for way in ways])

# %%
fig, (left, right) = nvfp4.new_figure(columns=2)
for way, style in zip(ways, ("o-", "s-", "^--", "D--")):
    left.semilogx(sizes, [found[way, size][0] for size in sizes], style, base=2, label=way)
    right.semilogx(sizes, [found[way, size][1] for size in sizes], style, base=2, label=way)
left.set(title="No way of rounding saves the neighbours' bits", xlabel="size of the outlier", ylabel="signal to error, dB")
right.set(title="But random rounding keeps their average", xlabel="size of the outlier", ylabel="gain (1 = unbiased, 0 = gone)")
right.axhline(1, color="0.6", linewidth=1)
for ax in (left, right): ax.legend(frameon=False, fontsize=9); ax.set_xticks(sizes, [str(size) for size in sizes])
nvfp4.save_figure(fig, pictures / "01_outlier.png")
Image(pictures / "01_outlier.png")

# %% [markdown]
# Nearest rounding keeps the fifteen as long as they reach a quarter of a grid step, then loses them *entirely and always*: the gain falls to 0.
# Stochastic rounding is wrong by more every single time, and right on average at every size: over many optimizer steps its errors cancel, while a
# gain of 0 stays 0. (That the last curve ends a little below 1 is the cut at 6 again, exercise 3.)
#
# And the Hadamard transform alone does not help here: it makes the loud value share its size with everybody, so that everybody is rounded with
# coarse steps, and what comes back depends on where that common size falls between two of them. What it does change is the shape of a whole tensor:
# after it, the blocks of a heavy-tailed one look Gaussian (`plot_hadamard`). NVIDIA found that a 12B model needs it for the weight gradient; the
# ablation of this repository is too small to tell (first table of the [README](../README.md)).

# %% [markdown]
# ## The report and our measurement
#
# Published figures beside the newest row that `01_nvfp4.py` wrote into `experiments/results.jsonl`, and beside what this cell computes.

# %%
rows = table.read_rows(root / "experiments" / "results.jsonl")
ours = table.newest(rows, "01_nvfp4")
sheet = nvfp4.sample("Gaussian", 96, 4096)
base = nvfp4.relative_error(sheet, nvfp4.quantize(sheet).dequantize())
change = {rule: nvfp4.relative_error(sheet, nvfp4.quantize(sheet, scale_rule=rule).dequantize()) / base - 1 for rule in ("four_over_six", "mse")}
nvfp4.print_table("published, recorded, computed here", ["", "published", "recorded row", "this cell"], [
    ["signal to error, nearest  [INT v.s. FP: mean over a model's tensors]", "20.60 dB", f"{ours['db']['NVFP4 nearest, Gaussian']} dB",
     f"{nvfp4.decibels(base):.2f} dB"],
    ["Four-Over-Six against max, squared error  [Ultra: median of weights]", "-16.4 %", f"{ours['mse_change']['four_over_six']:.1%}",
     f"{change['four_over_six']:.1%}"],
    ["full sweep against max, squared error  [Ultra]", "-27.1 %", f"{ours['mse_change']['mse']:.1%}", f"{change['mse']:.1%}"],
    ["sum of 4,096 small gradients, nearest: bias", "-", f"{ours['bias_percent']['nearest']:.1f} %", "-"],
    ["the same, stochastic", "-", f"{ours['bias_percent']['stochastic']:+.2f} %", "-"]])

# %% [markdown]
# ## Exercises
#
# **1. What does the second byte cost?** A block scale in E4M3 is itself rounded. Suppose that scales were exact. How many decibels would Gaussian
# data gain? Guess first: 0.1, 1 or 5?
#
# <details><summary>Answer</summary>
#
# About a tenth of a decibel: a scale that is off by up to 6 % stretches the ruler a little, and the ruler's own steps are much coarser than that.
# So one byte is enough, and an fp32 scale for each block (1.5 more bits a value) would buy nearly nothing.
#
# ```python
# sheet = nvfp4.sample("Gaussian", 512, 4096)
# parts = sheet.unflatten(-1, (-1, 16))
# ideal = parts.abs().amax(-1, keepdim=True) / 6
# without = nvfp4.decibels(nvfp4.relative_error(parts, nvfp4.E2M1[nvfp4.encode_e2m1(parts / ideal).int()] * ideal))
# with_e4m3 = nvfp4.decibels(nvfp4.relative_error(sheet, nvfp4.quantize(sheet).dequantize()))
# print(f"{with_e4m3:.2f} dB with E4M3 scales, {without:.2f} dB with exact ones")
# assert 0 < without - with_e4m3 < 0.2
# ```
#
# </details>
#
# **2. Why not transpose the codes?** The weight gradient contracts over tokens, the forward product over features. `nvfp4.quantize(x).T` would
# spare a second quantization of X. What happens, and why are *weights* different? ([§9 · The three products](../01_nvfp4.py))
#
# <details><summary>Answer</summary>
#
# It raises ValueError: the 16 values that share a scale lie along a row, and after the transpose they would lie across the contraction, which no FP4
# tensor core can read. Weights are quantized in tiles of 16×16, whose transpose is made of such tiles again. So forward and backward multiply
# with the same numbers, and the gradient is the gradient of the function that was computed.
#
# ```python
# try: nvfp4.quantize(nvfp4.sample("Gaussian", 32, 32)).T
# except ValueError as error: print(error)
# else: raise AssertionError("rows cannot be transposed")
# tiles = nvfp4.quantize(nvfp4.sample("Gaussian", 32, 32), block=(16, 16))
# assert torch.equal(tiles.T.dequantize(), tiles.dequantize().T)
# ```
#
# </details>
#
# **3. How fast does noise average out, and what stays?** Average *n* stochastic roundings of one matrix with different seeds. Plot the error
# against *n*. It falls as 1/√n at first. Does it go to zero?
#
# <details><summary>Answer</summary>
#
# No. Sixteen times as many draws divide the error by almost four, but a floor remains: the values that were cut to 6 because E4M3 rounded their
# block's scale down come back too small in every draw. `measure_saturation` in [§12 · Measurements](../01_nvfp4.py) counts them.
#
# ```python
# small = nvfp4.sample("Gaussian", 64, 1024)
# draw = lambda n: sum(nvfp4.quantize(small, rounding="stochastic", seed=i).dequantize() for i in range(n)) / n
# off = {n: nvfp4.relative_error(small, draw(n)) ** 0.5 for n in (1, 16, 256)}
# print({n: f"{100 * value:.2f} %" for n, value in off.items()})
# assert 3.5 < off[1] / off[16] < 4.0 and off[16] / off[256] < 3.5
# ```
#
# </details>
