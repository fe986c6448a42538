# %% [markdown]
# # 03 · LatentMoE: who is asked, and who is busy?
#
# Stage file: [`03_latentmoe.py`](../03_latentmoe.py). Every function that runs below is imported from it; open it beside this page.

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
from tqdm import tqdm

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")      # kernels run in Triton's interpreter, slowly
nvfp4, moe, table = (importlib.import_module(name) for name in ("01_nvfp4", "03_latentmoe", "experiments.table"))
pictures = nvfp4.writable_folder(root / "out" / "notebooks")

# %% [markdown]
# ## The question
#
# Nine tenths of Ultra's weights are feed-forward experts, and a token is multiplied with 22 of 512 of them. A small *router* decides which. Three
# things can go wrong: the router may send everybody to the same few experts; the tokens have to travel to the GPUs where their experts live; and
# the experts' weights have to be read from memory. The *latent* in LatentMoE is about the last two, and the first is the hardest: it is a feedback
# loop.

# %% [markdown]
# ## By hand: six experts, three tokens, two chosen
#
# Every expert gets a score of its own, a sigmoid. A **bias** is added to decide who is chosen, and left out when the chosen are weighed
# ([§1 · Router](../03_latentmoe.py)). The routing matrix below is the identity, so that the scores are just what we write down. Experts 4 and 5 had
# been idle for long, and their biases have grown.

# %%
scores = torch.tensor([[0.90, 0.65, 0.50, 0.30, 0.20, 0.10], [0.80, 0.75, 0.40, 0.35, 0.10, 0.20], [0.85, 0.60, 0.30, 0.55, 0.15, 0.05]])
bias = torch.tensor([-0.1, 0.0, 0.0, 0.0, 0.3, 0.6])
weights, chosen, _ = moe.route(torch.logit(scores), torch.eye(6), bias, k=2, scale=1.0)
row = lambda values: " ".join(f"{value:5.2f}" for value in values.tolist())
nvfp4.print_table("three tokens", ["token", "scores", "score + bias", "chosen", "weights, from the scores alone"],
                  [[str(i), row(scores[i]), row(scores[i] + bias), str(chosen[i].tolist()), row(weights[i])] for i in range(3)])

load = moe.count_load(chosen, 6)
print(f"\nloads {load.tolist()}, largest / mean = MaxVio {moe.max_violation(load):.2f}, experts without a token: {moe.dead_experts(load)}")
after = bias.clone()
moe.update_expert_bias(after, load, rate=0.001)
print(f"the bias moves by {[f'{step:+.3f}' for step in (after - bias).tolist()]}: down where the load is above the mean, up where below")

order, inverse, ends = moe.sort_by_expert(chosen, 6)
print(f"\ncopies of tokens, sorted by expert: {[f'token {i // 2} to expert {chosen.flatten()[i]}' for i in order.tolist()]}")
print(f"so expert e works on one stretch of rows, which ends at {ends.tolist()}")

# %% [markdown]
# Expert 5 was chosen by all three tokens although nearly everybody dislikes it, and counts for as little as its score says. So the bias steers
# traffic without telling lies about quality: no gradient flows through it, and the loss never hears of it.

# %% [markdown]
# ## Three rungs
#
# The layer's sum is `y = Σ p_i · Down_i relu(Up_i x)²` over the chosen experts. As its definition, asking expert after expert which tokens chose it
# ([§2 · Experts as a loop](../03_latentmoe.py)); as one sort and two grouped products ([§3 · Sort and group](../03_latentmoe.py)); and as the
# fastest way at hand, here one expert at a time with a backward pass by hand, on a GPU the Triton kernel ([§4 · One expert at a
# time](../03_latentmoe.py)). All have to agree in the output and in every gradient, also for an expert that nobody chose.

# %%
rng = torch.Generator().manual_seed(0)
normal = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)
x, up, down, dy = normal(256, 16), normal(4, 32, 16) / 4, normal(4, 16, 32) / 6, normal(256, 16)
p, experts, _ = moe.route(x, normal(4, 16), torch.tensor([0, 0, 0, -9.0]), k=2, scale=2.5)      # nobody chooses expert 3

def both_passes(rung, dtype, **how):
    """The output and the gradients of tokens, weights and both stacks of experts."""
    leaves = [z.detach().to(dtype).requires_grad_() for z in (x, p, up, down)]
    y = rung(leaves[0], leaves[1], experts, *leaves[2:], **how)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

truth = both_passes(moe.experts_loop, torch.float64)
worst = lambda got: f"{max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, truth)):.0e}"
lines = [["loop", worst(both_passes(moe.experts_loop, torch.float64)), worst(both_passes(moe.experts_loop, torch.float32))],
         ["sorted and grouped", worst(both_passes(moe.experts_sorted, torch.float64)), worst(both_passes(moe.experts_sorted, torch.float32))],
         ["one expert at a time", worst(both_passes(moe.experts_grouped, torch.float64)), worst(both_passes(moe.experts_grouped, torch.float32))]]
if importlib.util.find_spec("triton"): lines.append(["Triton kernel", "-", worst(both_passes(moe.experts_grouped, torch.float32, impl="triton"))])
nvfp4.print_table("largest difference to the loop in fp64, output and four gradients", ["rung", "in fp64", "in fp32"], lines)
print(f"\ntokens by expert: {moe.count_load(experts, 4).tolist()}; gradient of the idle expert's weights: {truth[3][3].abs().max():g}")

# %% [markdown]
# ## Experiment: how hard should the bias push?
#
# A small layer learns a task with 24 kinds of tokens, of which a few are frequent and most are rare ([§5 · Load balance](../03_latentmoe.py)). Left
# alone, a router that likes an expert trains it more, and likes it better. After each step the bias moves by a fixed **rate** against the load. You
# vary that rate; the report's is 0.001. Before running: what happens if you push a hundred times as hard?

# %% tags=["parameters"]
rates = [0.0, 0.001, 0.01, 0.1]      # steps of the selection bias; 0 switches it off (tiny: [0.0, 0.01])
steps = 500                          # training steps of each run (tiny: 20)
seed = 0                             # of data and weights

# %%
runs = {rate: moe.measure_balance(rate, 1e-4, steps, seed) for rate in tqdm(rates)}
mean = lambda values: sum(values) / len(values)
nvfp4.print_table(f"16 experts, 2 chosen, after {steps} steps (MaxVio: 1 is even, 8 the worst)",
                  ["rate", "MaxVio within one step", "MaxVio of 50 steps together", "last loss"],
                  [[f"{rate:g}", mean(violations[-50:]), moe.max_violation(loads).item(), f"{loss:.3f}"]
                   for rate, (violations, loads, loss) in runs.items()])

# %%
fig, (left, right) = nvfp4.new_figure(columns=2)
smooth = min(20, steps)
for rate, (violations, loads, _) in runs.items():
    left.plot(torch.tensor(violations).unfold(0, smooth, 1).mean(-1), label=f"rate {rate:g}", linewidth=1.6)
    right.plot(range(1, 17), (100 * loads / loads.sum()).sort(descending=True).values, "o-", markersize=4, label=f"rate {rate:g}")
left.set(title="Too hard a push throws the crowd to and fro", xlabel=f"training step (mean of {smooth})",
         ylabel="MaxVio within one step", ylim=(0.8, None))
right.set(title="Over 50 steps it looks more even than it is", xlabel="expert, busiest first",
          ylabel="% of the choices, last 50 steps", xticks=range(1, 17, 3))
right.axhline(100 / 16, color="0.5", linestyle=":")
for ax in (left, right): ax.legend(frameon=False)
nvfp4.save_figure(fig, pictures / "03_rates.png")
Image(pictures / "03_rates.png")

# %% [markdown]
# Rate 0 stays crooked: a few experts carry the layer. A slow rate needs many steps, since scores differ by tenths and the bias moves by
# thousandths, but what it reaches stays. A hundred times that rate overshoots: experts that were overloaded in this step are deserted in the next.
# Averaged over 50 steps the loads look better than they ever are, and it is the *single step* in which GPUs wait for the busiest one. Whoever
# reports balance has to say over how many tokens it was counted.

# %% [markdown]
# ## The report and our measurement
#
# Ultra watches the same number. Its loads are counted over a batch of 25 million tokens and 512 experts; ours come from the newest rows that
# `03_latentmoe.py` recorded. Beside it what the latent buys, counted at Ultra's sizes by `measure_costs` ([§9 · Measurements](../03_latentmoe.py)).

# %%
rows = table.read_rows(root / "experiments" / "results.jsonl")
without, with_bias = (table.newest(rows, "03_latentmoe", run=run) for run in ("loss 1e-4 only", "loss 1e-4 and bias 1e-3"))
nvfp4.print_table("load of the busiest expert over the mean", ["", "published", "recorded row"], [
    ["with bias, a typical layer  [Ultra: median over layers]", "1.2", f"{with_bias['max_violation']:.2f}"],
    ["without bias", "-", f"{without['max_violation']:.2f}"],
    ["Ultra's first MoE layer, early and late in training", "4.8 to 12", "-"]])
costs = moe.measure_costs(batch=64)
nvfp4.print_table("the routed part of one Ultra layer, batch of 64 tokens",
                  ["", "experts", "k", "width", "parameters", "KB sent a token", "GB of weights read"],
                  [[name, str(e), f"{k:g}", str(width), f"{cost.parameters / 1e9:.2f}B", f"{cost.sent_bytes / 1e3:.0f}",
                    f"{cost.read_bytes / 1e9:.2f}"] for name, ((e, k, width), cost) in costs.items()])

# %% [markdown]
# The first two lines cost the same. One has 128 experts of which it asks five or six; the other has 512 and asks 22. A latent of a quarter of the
# width pays for four times the experts *and* four times the choices.
#
# ## Exercises
#
# **1. How bad can it get?** What is the largest MaxVio that a layer with E experts and k choices can have? Compute it for Ultra.
#
# <details><summary>Answer</summary>
#
# All tokens choose the same k experts: each of them has r tokens, the mean is r·k/E, so the ratio is E/k. For Ultra 512/22 = 23.27. (The paper that
# introduced the number subtracts 1; the report does not, and this bound shows it.)
#
# ```python
# same = torch.arange(22).expand(1000, 22)
# print(f"{moe.max_violation(moe.count_load(same, 512)):.2f}")
# assert abs(moe.max_violation(moe.count_load(same, 512)).item() - 512 / 22) < 1e-9
# ```
#
# </details>
#
# **2. Does the bias need a centre?** Over a long run all biases may drift up together. Does that change any choice, any weight, any output?
#
# <details><summary>Answer</summary>
#
# No. A common constant does not change the order of score + bias, and the weights come from the scores alone. So the bias is never centred. What
# does change things is precision: in bf16 a bias near 0.5 could no longer move by 0.001, which is why it is kept in fp32.
#
# ```python
# again = moe.route(torch.logit(scores), torch.eye(6), bias + 3.0, k=2, scale=1.0)
# assert torch.equal(again[1], chosen) and torch.equal(again[0], weights)
# assert torch.tensor(0.5).bfloat16() + 0.001 == 0.5 and torch.tensor(0.5) + 0.001 != 0.5
# ```
#
# </details>
#
# **3. Why is decoding a batch of 64 so expensive?** Each of 64 tokens picks 22 of 512 experts. What share of the experts' weights does the step
# have to read? Estimate, then simulate with an even router.
#
# <details><summary>Answer</summary>
#
# Nearly all: an expert is missed by all tokens with probability (1 − 22/512)⁶⁴ = 6 %. Eight tokens already read 30 % of the weights, so a step's
# time barely grows from there to 64 tokens: larger batches are nearly free, until arithmetic takes over.
#
# ```python
# def touched(batch, rounds=40):
#     draw = torch.Generator().manual_seed(0)
#     picks = [torch.rand(batch, 512, generator=draw).topk(22).indices for _ in range(rounds)]
#     return mean([(moe.count_load(pick, 512) > 0).double().mean().item() for pick in picks])
#
# for batch in (8, 64):
#     print(f"{batch} tokens: {touched(batch):.1%} simulated, {1 - (1 - 22 / 512) ** batch:.1%} by formula")
#     assert abs(touched(batch) - (1 - (1 - 22 / 512) ** batch)) < 0.01
# ```
#
# </details>
