# %% [markdown]
# # 08 · Inference: how can a guess be free?
#
# Stage file: [`08_infer.py`](../08_infer.py). Every function that runs below is imported from it; open it beside this page.

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

import copy

import torch
from IPython.display import Image
from tqdm import tqdm

nvfp4, nemotron, infer, table = (importlib.import_module(name) for name in ("01_nvfp4", "04_model", "08_infer", "experiments.table"))
pictures = nvfp4.writable_folder(root / "out" / "notebooks")

# %% [markdown]
# ## The question
#
# A large model writes one token a pass, and a pass for one token takes nearly as long as one for eight: the time goes into reading weights. So let
# a small head *guess* the next k tokens, and let the model read all of them in one pass. Guesses that the model would have written itself are kept.
# Two questions decide whether that is worth anything: does the text stay the model's own, to the last digit of its probabilities? And what does a
# wrong guess leave behind in a Mamba state, which cannot simply be cut off as keys and values can?

# %% [markdown]
# ## By hand: one guess among three words
#
# The model says p, the head drew its guess from q. A guess x is kept with probability min(1, p/q). If it is not, the token comes from what is left
# of p, max(p − q, 0) ([§5 · Sampling and drafts](../08_infer.py)). Follow every way to the three words:

# %%
p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.7, 0.1, 0.2], dtype=torch.float64)
words, total, lines = ("cat", "dog", "owl"), torch.zeros(3, dtype=torch.float64), []
for x in range(3):
    # the stage's rule, asked at 10,000 evenly spaced dice: the share of them that keeps the guess, and what the others draw from
    throws = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    kept, behind = infer.accept(p.expand(10_000, 2, 3), q.expand(10_000, 1, 3), torch.full((10_000, 1), x), throws[:, None])
    keep, rest = kept.double().mean().item(), behind[kept == 0]
    left = rest[0] / rest[0].sum() if len(rest) else torch.zeros(3, dtype=torch.float64)
    total += q[x] * (keep * torch.eye(3, dtype=torch.float64)[x] + (1 - keep) * left)
    lines.append([words[x], f"{p[x]:.1f}", f"{q[x]:.1f}", f"{keep:.3f}", " ".join(f"{v:.2f}" for v in left.tolist())])
nvfp4.print_table("one guess", ["guess", "model p", "head q", "kept with", "if not, drawn from"], lines)
print(f"\nall ways together: {', '.join(f'{word} {v:.4f}' for word, v in zip(words, total.tolist()))}")

# %% [markdown]
# The head likes *cat* too much: some of its cats are refused, and every refused cat becomes a dog, which the head had offered too rarely. What
# comes out is p. That holds for **any** q; a bad head costs speed, never quality.

# %% [markdown]
# ## Three rungs
#
# A small hybrid model, trained here for seconds on a text in which two tokens nearly tell the next, decodes the same prompts three times: by stage
# 04's plain loop, by the engine of [§6 · Engine](../08_infer.py) without guesses, and by the engine with three guesses a pass, in both ways to take
# a wrong guess out of the Mamba states again ([§4 · Slot caches](../08_infer.py)): a *snapshot* of the state behind each guess, or a *replay* of
# what was kept. First the distribution: the model's probabilities, plain draws, and guesses that are accepted or replaced.

# %%
rng = torch.Generator().manual_seed(0)
logits, guess = 2 * torch.randn(1, 12, generator=rng), torch.rand(12, generator=rng, dtype=torch.float64)
wanted, _ = infer.probabilities(logits, torch.ones(1), torch.ones(1), cut=False)
guess, n = guess / guess.sum(), 200_000
throws = torch.rand(4, n, generator=rng, dtype=torch.float64)
plainly = infer.draw(wanted.expand(n, 12), None, throws[0])
drafted = infer.draw(guess.expand(n, 12), None, throws[1])
kept, behind = infer.accept(wanted.expand(n, 2, 12), guess.expand(n, 1, 12), drafted[:, None], throws[2][:, None])
accepted = torch.where(kept == 1, drafted, infer.draw(behind, None, throws[3]))
away = lambda tokens: f"{(tokens.bincount(minlength=12) / n - wanted[0]).abs().max().item():.4f}"
nvfp4.print_table(f"largest difference to the model's probabilities, {n:,} tokens (one standard error: at most {(0.25 / n) ** 0.5:.4f})",
                  ["drawn", "difference"],
                  [["plainly", away(plainly)], ["guessed, then kept or replaced", away(accepted)], ["guessed, and always kept", away(drafted)]])

# %% tags=["parameters"]
lessons = 150      # training steps of the small model (tiny: 15)
small = nemotron.ModelConfig(pattern="MEM*E", d_model=32, vocab=96, heads=4, kv_heads=2, head_dim=8, mamba_heads=16, mamba_head_dim=4, groups=2,
                             state=8, chunk=8, experts=8, experts_per_token=3, latent=16, expert_width=16, shared_width=32)
torch.manual_seed(0)
damage = 3.0      # noise on one matrix of the head, in its standard deviations
model, after = nemotron.Nemotron(small), torch.randint(20, 96, (8, 96), generator=rng)

def text(rows, length):
    """Most tokens follow from the two before them; one in ten is anything."""
    ids = torch.randint(20, 96, (rows, length), generator=rng)
    for i in range(2, length):
        ids[:, i] = torch.where(torch.rand(rows, generator=rng) < 0.1, ids[:, i], after[ids[:, i - 2] % 8, ids[:, i - 1]])
    return ids

optimizer = torch.optim.Adam(model.parameters(), 5e-3)
for _ in tqdm(range(lessons)):
    ids = text(16, 33)
    optimizer.zero_grad()
    nemotron.loss(model, ids[:, :-1], ids[:, 1:], mtp_weight=0.3).total.backward()
    optimizer.step()
model.eval().requires_grad_(False)
spoiled = copy.deepcopy(model)                                # the same trunk with a head that guesses badly
joint = spoiled.mtp.layers[0].eh_proj.weight
joint.add_(damage * joint.std() * torch.randn(joint.shape, generator=rng))

def serve(prompts, k, rollback="snapshot", model=model, **how):
    """(answers in the prompts' order, the engine) with k guesses a pass."""
    engine, answers = infer.Engine(model, slots=4, capacity=160, draft=k, rollback=rollback), {}
    order = [engine.submit(prompt, infer.SamplingParams(stop_ids=(), **how), place=i) for i, prompt in enumerate(prompts)]
    while not engine.idle: answers |= dict(engine.step())
    return [answers[i].ids for i in order], engine

prompts = text(4, 9).tolist()
greedy = dict(max_tokens=40, temperature=0.0)
plain = [answer.ids for answer in nemotron.generate(model, prompts, nemotron.SamplingParams(stop_ids=(), **greedy))]
same = lambda ids: f"{sum(a == b for x, y in zip(ids, plain) for a, b in zip(x, y))} of {sum(map(len, plain))}"
lines = [["stage 04's loop", same(plain), "-"]]
for name, k, how in (("no guesses", 0, {}), ("3 guesses, snapshot", 3, {}), ("3 guesses, replay", 3, dict(rollback="replay")),
                     ("3 bad guesses, snapshot", 3, dict(model=spoiled)), ("3 bad guesses, replay", 3, dict(model=spoiled, rollback="replay"))):
    ids, engine = serve(prompts, k, **how, **greedy)
    share = engine.running.accepted_k.sum() / engine.running.offered_k.sum().clamp(min=1)
    lines.append([f"engine, {name}", same(ids), f"{share:.0%}" if k else "-"])
nvfp4.print_table("greedy answers to four prompts", ["rung", "tokens equal to the first rung's", "guesses kept"], lines)

# %% [markdown]
# The last two lines are the test that counts: nearly every pass takes something back, and the text is still the same. (A small model that always
# takes the likeliest token soon repeats itself, and its own head foresees that nearly always.)

# %% [markdown]
# ## Experiment: how many guesses?
#
# You vary **k**, the guesses a pass. More guesses, more kept tokens; but a guess only counts if all before it were right. If each is right with
# chance a, independently, a pass yields (1 − aᵏ⁺¹)/(1 − a) tokens, never more than 1/(1 − a). Before running: sampling at temperature 1 instead of
# taking the likeliest token, does that make guessing harder?

# %% tags=["parameters"]
guesses = [0, 1, 2, 3, 5, 7]        # k, drafts of the head a pass (tiny: [0, 2])
tokens = 120                        # of each answer (tiny: 12)
questions = 8                       # prompts (tiny: 2)

# %%
asked = text(questions, 9).tolist()
yields, rates = {}, {}
ways = {"greedy": (model, 0.0), "temperature 1": (model, 1.0), "temperature 1, bad head": (spoiled, 1.0)}
for way, (speaker, temperature) in ways.items():
    for k in tqdm(guesses, desc=way):
        answers, engine = serve(asked, k, model=speaker, max_tokens=tokens, temperature=temperature, top_p=1.0)
        offered, taken = engine.running.offered_k, engine.running.accepted_k
        yields[way, k] = 1 + (taken.sum() / offered[0]).item() if k else 1.0
        rates[way, k] = torch.where(offered >= 30, taken / offered, float("nan")).tolist()      # of fewer a share says nothing
nvfp4.print_table("tokens a pass of the trunk", ["", *(f"{k} guesses" for k in guesses)],
                  [[way, *(yields[way, k] for k in guesses)] for way in ways])
most = max(guesses)
nvfp4.print_table(f"share of the guesses that are kept where all before them were, {most} guesses", ["", *(f"guess {i + 1}" for i in range(most))],
                  [[way, *("-" if rate != rate else f"{rate:.0%}" for rate in rates[way, most])] for way in ways])

# %%
fig, (left, right) = nvfp4.new_figure(columns=2)
for way, colour in zip(ways, ("C0", "C1", "C2")):
    left.plot(guesses, [yields[way, k] for k in guesses], "o-", color=colour, label=way)
    a = 0 if rates[way, most][0] != rates[way, most][0] else rates[way, most][0]
    left.plot(guesses, [sum(a**i for i in range(k + 1)) for k in guesses], ":", color=colour, label=f"if each held with {a:.0%}")
    right.plot(range(1, most + 1), [100 * rate for rate in rates[way, most]], "o-", color=colour, label=way)
left.set(title="The first guesses give most", xlabel="guesses a pass", ylabel="tokens a pass of the trunk")
right.set(title="Behind right guesses the next is right more often", xlabel="guess", ylabel="kept, where all before it were, %", ylim=(0, 103))
for ax in (left, right): ax.legend(frameon=False, fontsize=9)
nvfp4.save_figure(fig, pictures / "08_guesses.png")
Image(pictures / "08_guesses.png")

# %% [markdown]
# At temperature 1 the model surprises its own head, and the first guess is the riskiest: where it was right, the text is in an easy stretch and the
# next is likely to be right too. So the yield lies above the dotted lines of independent guesses. A head that is bad makes decoding slow, and
# changes nothing else.
#
# A pass that yields more tokens is not yet a faster one: k guesses cost k passes of the head, and the trunk has to read k + 1 tokens. Where reading
# weights is all the time there is (batch 1 on a GPU), that is nearly free; with many requests at once arithmetic counts, and short drafts or none
# are best. On a CPU it hardly pays at all.

# %% [markdown]
# ## The report and our measurement
#
# The newest recorded tour of stage 08 on the tiny model that stages 05 to 07 have trained, before and after its head was *boosted* by distillation.

# %%
rows = table.read_rows(root / "experiments" / "results.jsonl")
tour = table.newest(rows, "08_infer")
speed = {k: float(v) for k, v in tour["tokens_per_s"]["1"].items()}
best = max(speed, key=speed.get)
nvfp4.print_table("guessing, published and recorded", ["", "published", "recorded row"], [
    ["tokens a pass with 7 guesses, before boosting  [Ultra: greedy, sampled]", "4.39, 4.17", f"{tour['tokens_per_pass']['before']:.2f}"],
    ["tokens a pass with 7 guesses, after boosting  [Ultra: greedy, sampled]", "4.58, 4.33", f"{tour['tokens_per_pass']['after']:.2f}"],
    ["best number of guesses at batch 1", "6", best],
    ["speed at that number against none, batch 1", "2.89x", f"{speed[best] / speed['0']:.2f}x (CPU, 2 threads)"]])

# %% [markdown]
# ## Exercises
#
# **1. The worst head.** Let the head always guess the same word, whatever the model thinks. What comes out, and how many guesses are kept?
#
# <details><summary>Answer</summary>
#
# Exactly p again. The guess is kept with probability p(word), and otherwise the word is left out of what is drawn, so that it appears with just its
# p.
#
# ```python
# p3, stuck = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
# u = torch.rand(2, 100_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
# count, other = infer.accept(p3.expand(100_000, 2, 3), stuck.expand(100_000, 1, 3), torch.full((100_000, 1), 2), u[0][:, None])
# out = torch.where(count == 1, 2, infer.draw(other, None, u[1]))
# print((out.bincount() / 100_000).tolist(), "kept:", count.double().mean().item())
# assert (out.bincount() / 100_000 - p3).abs().max() < 0.01 and abs(count.double().mean().item() - 0.2) < 0.01
# ```
#
# </details>
#
# **2. One state late.** Why can a wrong guess simply be overwritten in the keys and values, and not in a Mamba layer? What would you see if the
# rollback restored the state one guess late?
#
# <details><summary>Answer</summary>
#
# Keys and values of a position lie in a cell of their own, and attention does not look beyond the length. A Mamba state is one sum of everything so
# far: a wrong token is mixed in and cannot be taken out again. Restored late, the state has seen a token that is not in the text: nothing crashes,
# and the text differs. That is why the rungs above compare tokens one by one, and why this has to hold at every k:
#
# ```python
# for k in (1, 4):
#     for rollback in ("snapshot", "replay"):
#         assert serve(prompts, k, rollback, spoiled, **greedy)[0] == plain, (k, rollback)
# ```
#
# </details>
#
# **3. When does a guess pay?** Let a pass of the trunk cost 1 and a pass of the head c. With a chance a for every guess, which k is best for a =
# 0.8 and c = 0.05? And for c = 0.3?
#
# <details><summary>Answer</summary>
#
# Tokens a unit of time are (1 − aᵏ⁺¹)/((1 − a)(1 + c k)). A cheap head should guess further ahead: 8 at c = 0.05, 3 at c = 0.3.
#
# ```python
# gain = lambda k, a, c: sum(a**i for i in range(k + 1)) / (1 + c * k)
# best_k = {c: max(range(20), key=lambda k: gain(k, 0.8, c)) for c in (0.05, 0.3)}
# print({c: (k, round(gain(k, 0.8, c), 2)) for c, k in best_k.items()})
# assert best_k == {0.05: 8, 0.3: 3}
# ```
#
# </details>
