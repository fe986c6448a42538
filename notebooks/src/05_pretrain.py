# %% [markdown]
# # 05 · Pretraining: when should the learning rate come down?
#
# Stage file: [`05_pretrain.py`](../05_pretrain.py). Every function that runs below is imported from it; open it beside this page.

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

import tempfile

import torch
from IPython.display import Image
from tqdm import tqdm

nvfp4, nemotron, pretrain, table = (importlib.import_module(name) for name in ("01_nvfp4", "04_model", "05_pretrain", "experiments.table"))
pictures = nvfp4.writable_folder(root / "out" / "notebooks")

# %% [markdown]
# ## The question
#
# Ultra's learning rate rises for 200 billion tokens, stays at 2.5e-4 for most of 20 trillion, and falls over the last 5 trillion. Two things are
# odd about that. A quarter of the most expensive run in the house is spent on letting go of the accelerator; and while the rate is high, nobody can
# see how good the model *would be* after a decay. The answer to both is the same idea: **a decay is an average over the path**, and averages can
# also be taken afterwards.
#
# (The stage trains a real model on real text in six minutes: `python 05_pretrain.py`. Here you take its schedule and its merging apart.)

# %% [markdown]
# ## By hand: twelve steps, six checkpoints
#
# Warmup, a plateau, and a decay of the form 1 − √r ([§4 · Schedule and optimizer](../05_pretrain.py)), small enough to check: the first quarter of
# the decay halves the rate.

# %%
rates = [pretrain.wsd_lr(n, total=12, warmup=2, decay=4, peak=1.0, low=0.0) for n in range(13)]
nvfp4.print_table("the rate of 12 steps: 2 of warmup, 4 of decay", ["step", *map(str, range(13))], [["rate", *(f"{rate:.3f}" for rate in rates)]])
print("step 9: 1 - sqrt(1/4) = 0.5,   step 10: 1 - sqrt(2/4) = 0.293,   step 11: 1 - sqrt(3/4) = 0.134")

weights = pretrain.merge_weights(6)
nvfp4.print_table("what the same decay gives six checkpoints of a run without decay, oldest first", ["checkpoint", *map(str, range(6))],
                  [["weight", *(f"{weight:.3f}" for weight in weights)]])
print(f"sum {sum(weights):.3f}; the oldest weighs most, because 1 - sqrt(r) falls fastest at first")

# %% [markdown]
# ## Three rungs
#
# Why should a mean of checkpoints be a decay? Let the checkpoints be θ₀ … θ₅, and say that a decay would have multiplied the update from one to the
# next by w₁ … w₅. It would have ended at θ₀ + Σ wᵢ (θᵢ − θᵢ₋₁). Sort that sum by checkpoints instead of updates, and it is a weighted mean of them
# ([§6 · Merging checkpoints](../05_pretrain.py)). Three times the same point: by replaying the updates with the schedule's rates, by the mean, and
# from files of a real (tiny) model, as a trainer would do it ([§5 · Checkpoints](../05_pretrain.py)).

# %%
small = nemotron.ModelConfig(pattern="M*E", d_model=32, vocab=64, heads=2, kv_heads=1, head_dim=16, mamba_heads=16, mamba_head_dim=2, groups=2,
                             state=4, experts=4, experts_per_token=2, latent=16, expert_width=32, shared_width=32, mtp_pattern="", mtp_depths=0)
torch.manual_seed(0)
path = [torch.randn(64, 32)]
for _ in range(5): path.append(path[-1] + 0.1 * torch.randn(64, 32))      # six checkpoints of one matrix, a random walk

rate_of = lambda i: pretrain.wsd_lr(i, total=6, warmup=0, decay=6, peak=1.0, low=0.0)
replayed = path[0].double()
for i in range(1, 6): replayed = replayed + rate_of(i) * (path[i].double() - path[i - 1].double())
averaged = sum(weight * point.double() for weight, point in zip(pretrain.merge_weights(6), path))

with tempfile.TemporaryDirectory() as home:
    folders = []
    for i, point in enumerate(path):
        model = nemotron.Nemotron(small)
        model.lm_head.weight.data.copy_(point)
        folders.append(Path(home) / f"step-{i:06d}")
        pretrain.write_folder(folders[-1], pretrain.unfinished(folders[-1]), lambda work, model=model: nemotron.save_checkpoint(work, model))
    merged = pretrain.merge_checkpoints(folders).lm_head.weight.detach()

far = lambda point: f"{((point.double() - replayed).norm() / replayed.norm()).item():.0e}"
nvfp4.print_table("one point, three ways", ["rung", "distance to the first"],
                  [["updates replayed with the schedule's rates", far(replayed)], ["mean of checkpoints", far(averaged)],
                   ["from six folders, fp32", far(merged)]])

# %% [markdown]
# ## Experiment: how long a decay?
#
# A replay is not the real thing: in a real decay the later gradients are taken where the smaller steps have led. So compare. The landscape is a
# valley: 32 directions, the steepest a thousand times as steep as the flattest, and a noisy gradient, as from small batches. Steep directions
# bounce between the walls at a high rate; flat ones need that rate to arrive at all. You vary **the share of the run that decays**, and beside each
# run stands the merge of checkpoints from an equally long end of a run that never decayed. Before running: is there a share that is too long?

# %% tags=["parameters"]
shares = [0.0, 0.05, 0.1, 0.25, 0.5, 1.0]      # of the steps that decay; Ultra 0.25 (tiny: [0.0, 0.25])
steps = 2000                                   # of each run (tiny: 200)
noise = 0.3                                    # of the gradient
copies = 64                                    # runs with other noise, averaged (tiny: 4)

# %%
steepness = torch.logspace(0, -3, 32)
height = lambda point: (steepness * point.square()).sum(-1).mean().item() / 2

def descend(share):
    """(height above the valley's floor after every step, the points) of stochastic gradient descent on the stage's schedule."""
    rng, point = torch.Generator().manual_seed(0), torch.ones(copies, 32)
    heights, points = [], []
    for n in range(steps):
        rate = pretrain.wsd_lr(n, steps, 0, int(share * steps), peak=0.5, low=0.0)
        point = point - rate * (steepness * point + noise * steepness.sqrt() * torch.randn(copies, 32, generator=rng))
        heights.append(height(point)); points.append(point)
    return heights, points

runs = {share: descend(share) for share in tqdm(shares)}
plain = runs[0.0][1]
merge_of = {}
for share in shares:
    last = plain[::-1][:int(share * steps) + 1:max(1, steps // 100)][::-1]         # a checkpoint each hundredth of the run
    merge_of[share] = height(sum(weight * point for weight, point in zip(pretrain.merge_weights(len(last)), last)))
nvfp4.print_table("height above the floor at the end", ["share that decays or is merged"] + [f"{share:.0%}" for share in shares],
                  [["real decay", *(f"{runs[share][0][-1]:.4f}" for share in shares)],
                   ["merged, never decayed", *(f"{merge_of[share]:.4f}" for share in shares)]])

# %%
fig, (left, right) = nvfp4.new_figure(columns=2)
for share in shares[::-1]:
    smooth = torch.tensor(runs[share][0]).unfold(0, max(1, steps // 100), max(1, steps // 200)).mean(-1)
    left.semilogy([steps * i / len(smooth) for i in range(len(smooth))], smooth, label=f"last {share:.0%} decay")
left.set(title="The gain of a decay comes within the decay", xlabel="step", ylabel="height above the floor")
ends = [share for share in shares if share]
right.semilogy([100 * share for share in ends], [runs[share][0][-1] for share in ends], "o-", label="real decay")
right.semilogy([100 * share for share in ends], [merge_of[share] for share in ends], "s--", label="merged from the run without decay")
right.axhline(runs[0.0][0][-1], color="0.5", linestyle=":", label="neither")
right.set(title="Merging shows most of it without decaying", xlabel="% of the run that decays, or is merged", ylabel="height at the end")
for ax in (left, right): ax.legend(frameon=False, fontsize=9)
nvfp4.save_figure(fig, pictures / "05_decay.png")
Image(pictures / "05_decay.png")

# %% [markdown]
# At a constant rate the run stops improving early: what is left is bouncing, and a few percent of decay remove most of it. A longer decay gives a
# little more, until so much of the run is slow that the flat directions do not arrive. The merge gets most of the gain for free and is a look at
# the final quality from anywhere on the plateau; the real decay still ends lower. Real losses are no valleys of 32 directions, so this says how the
# mechanism works, not which share is best for you.

# %% [markdown]
# ## The report and our measurement
#
# The schedule of the report, and the newest recorded rows of `experiments/merging.py` and of `05_pretrain.py` (preset `tiny`, Python sources).

# %%
rows = table.read_rows(root / "experiments" / "results.jsonl")
merging, trained = table.newest(rows, "merging", what="differences"), table.newest(rows, "05_pretrain")
gain = merging["bits_per_byte"]["merged right 48 - last"]
nvfp4.print_table("published beside ours", ["", "published", "recorded row"], [
    ["merging at a constant rate, against the last checkpoint  [Super: points of accuracy]", "+2 to +4 points",
     f"{gain['mean']:+.3f} ± {gain['half']:.3f} bits per byte"],
    ["seeds, and steps between the oldest and the newest", "-", f"{merging['seeds']}, {merging['window']}"],
    ["loss gap of NVFP4 after leaving it  [Ultra: branches at 5T, 10T, 16T]", "0.25 to 0.28 %", f"{trained['branch_gap']['nvfp4']:+.2%}"]])
billion = 1e9
ultra_rate = lambda tokens: pretrain.wsd_lr(tokens, 20_000 * billion, 200 * billion, 5_000 * billion, 2.5e-4, 2.5e-6)
marks = (100, 200, 10_000, 15_000, 16_250, 17_500, 20_000)
nvfp4.print_table("Ultra's schedule, from its four numbers", ["billion tokens"] + [f"{mark:,}" for mark in marks],
                  [["learning rate"] + [f"{ultra_rate(mark * billion):.2e}" for mark in marks]])

# %% [markdown]
# ## Exercises
#
# **1. Where did the gain come from?** Split the height into steep and flat directions, for the run without a decay and for one that decays for a
# quarter of the steps. Who gains?
#
# <details><summary>Answer</summary>
#
# The steep ones: they bounce at a height that is proportional to the rate, whatever the run's length. The flat ones were still on their way and
# gain much less.
#
# ```python
# part = lambda share, some: (steepness * runs[share][1][-1].square()).mean(0)[some].sum().item() / 2
# steep, flat = part(0.0, slice(0, 16)) / part(0.25, slice(0, 16)), part(0.0, slice(16, 32)) / part(0.25, slice(16, 32))
# print(f"steep directions: {steep:.0f} times lower with a decay; flat ones: {flat:.1f} times")
# assert steep > 3 * flat
# ```
#
# </details>
#
# **2. Left or right?** `merge_weights` knows two readings of the published formula: an update happens at the beginning of its interval or at its
# end. What does each give the oldest checkpoint of six, and which one makes a merge of *one* checkpoint that checkpoint?
#
# <details><summary>Answer</summary>
#
# "left" gives the oldest no weight at all, since its first update keeps the full rate; "right" gives it the largest, 0.408. Both give a single
# checkpoint weight 1: weights always sum to 1.
#
# ```python
# left_w, right_w = pretrain.merge_weights(6, "left"), pretrain.merge_weights(6, "right")
# assert left_w[0] == 0 and right_w[0] == max(right_w) and abs(right_w[0] - 0.408) < 1e-3
# assert pretrain.merge_weights(1, "left") == pretrain.merge_weights(1, "right") == [1.0]
# assert all(abs(sum(pretrain.merge_weights(n, timing)) - 1) < 1e-12 for n in range(1, 9) for timing in ("left", "right"))
# ```
#
# </details>
#
# **3. Half a checkpoint.** A copy of a checkpoint broke off, and nobody noticed. What does `merge_checkpoints` do with it, and how can it tell?
# ([§5 · Checkpoints](../05_pretrain.py))
#
# <details><summary>Answer</summary>
#
# It refuses: the folder's `files.json` holds the sizes of all files, and is written before the folder gets its name. A file that is missing or cut
# short is named.
#
# ```python
# with tempfile.TemporaryDirectory() as home:
#     folder = Path(home) / "step-000001"
#     pretrain.write_folder(folder, pretrain.unfinished(folder), lambda work: nemotron.save_checkpoint(work, nemotron.Nemotron(small)))
#     assert pretrain.damage(folder) is None
#     file = next(folder.glob("*.safetensors"))
#     file.write_bytes(file.read_bytes()[:-100])
#     try: pretrain.merge_checkpoints([folder])
#     except ValueError as error: print(str(error).split("/")[-1])
#     else: raise AssertionError("a checkpoint that was cut short has been merged")
# ```
#
# </details>
