# %% [markdown]
# # 04 · The model: where are 550 billion parameters, and what does a token pay?
#
# Stage file: [`04_model.py`](../04_model.py). Every function that runs below is imported from it; open it beside this page.

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

import math
from dataclasses import replace

import torch
from IPython.display import Image

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")      # kernels run in Triton's interpreter, slowly
nvfp4, nemotron, table = (importlib.import_module(name) for name in ("01_nvfp4", "04_model", "experiments.table"))
pictures = nvfp4.writable_folder(root / "out" / "notebooks")

# %% [markdown]
# ## The question
#
# Ultra is 108 letters: `M` for Mamba-2, `E` for LatentMoE, `*` for attention, each a layer `x + mixer(norm(x))`. With the sizes from its config
# that is all you need to say where its parameters sit, what a token costs, and what a long context costs, without having the weights. So: why these
# letters in this proportion? What would it cost to attend more, or less?

# %%
print(nemotron.ULTRA_PATTERN)
print({letter: nemotron.ULTRA_PATTERN.count(letter) for letter in "ME*"})

# %% [markdown]
# ## By hand: the ledger of three letters
#
# A model small enough to count with pencil and paper, one layer of each kind. Left, the count from the sizes; right, what the built model holds. The
# stage's [§7 · Ledger](../04_model.py) is these formulas for any config.

# %%
small = nemotron.ModelConfig(pattern="M*E", d_model=32, vocab=64, heads=2, kv_heads=1, head_dim=16, mamba_heads=16, mamba_head_dim=2, groups=2,
                             state=4, experts=6, experts_per_token=2, latent=16, expert_width=32, shared_width=48)
torch.manual_seed(0)
model = nemotron.Nemotron(small)
d, inner, conv = 32, 16 * 2, 16 * 2 + 2 * 2 * 4             # Mamba: z and x are as wide as `inner`; x, B and C go through the convolution
by_hand = {
    "M": ("in_proj z|x|B|C|dt, out_proj, conv + bias, A D dt, two norms", (inner + conv + 16) * d + d * inner + conv * (4 + 1) + 3 * 16 + inner + d),
    "*": ("q, k, v, o, norm", d * 32 + 2 * d * 16 + 32 * d + d),
    "E": ("6 experts of two matrices, shared expert, latent in and out, router + bias, norm",
          6 * 2 * 16 * 32 + 2 * d * 48 + 2 * d * 16 + 6 * (d + 1) + d)}
built = {letter: sum(n.numel() for n in block.state_dict().values()) for letter, block in zip(small.pattern, model.backbone.layers)}
formula = {letter: sum(nemotron.ledger(replace(small, pattern=letter, vocab=0)).parts.values()) - d for letter in "M*E"}      # less the final norm
nvfp4.print_table("parameters of one layer each", ["layer", "made of", "by hand", "ledger", "built model"],
                  [[letter, what, f"{n:,}", f"{formula[letter]:,}", f"{built[letter]:,}"] for letter, (what, n) in by_hand.items()])

book = nemotron.ledger(small)
idle = 4 * 2 * 16 * 32                                      # four of six experts do nothing for a given token
print(f"\nwhole model {book.total:,}: embedding and output layer 2 · 64 · 32 and a norm besides; a token meets {book.active:,} of them")
print(f"  ({book.total:,} less {idle:,} in idle experts, less {64 * 32:,} of the embedding, which is looked up)")
print(f"a token leaves {book.kv_values_per_token} keys and values; a sequence holds {book.state_values} state values, however long it is")

# %% [markdown]
# ## Three rungs
#
# In a small model the largest product is the last one, and the largest tensor its output: a logit for every token and word. For one sequence of
# Ultra's 8,192 tokens and 131,072 words that is 4.3 GB in fp32, and its gradient again as much. [§6 · Loss](../04_model.py) has the definition, the
# algorithm that goes through the rows in chunks and computes the gradient on the way, and the kernel; the training loss stands on them.

# %%
rng = torch.Generator().manual_seed(0)
hidden, weight = torch.randn(70, 32, generator=rng, dtype=torch.float64), torch.randn(64, 32, generator=rng, dtype=torch.float64)
labels = torch.randint(-1, 64, (70,), generator=rng)        # -1: nothing to learn here
mask = (labels >= 0).double()

def loss_and_gradients(rung, dtype, *rest, **how):
    leaves = [z.detach().to(dtype).requires_grad_() for z in (hidden, weight)]
    value = rung(*leaves, *rest, **how)
    return [value.detach(), *torch.autograd.grad(value, leaves)]

truth = loss_and_gradients(nemotron.cross_entropy_definition, torch.float64, labels.clamp(min=0), mask)
worst = lambda got: f"{max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, truth)):.0e}"
lines = [["definition", "64 x 70", worst(loss_and_gradients(nemotron.cross_entropy_definition, torch.float32, labels.clamp(min=0), mask))]]
chunked = lambda **how: worst(loss_and_gradients(nemotron.linear_cross_entropy, torch.float32, labels, **how))
for chunk in (70, 16, 3): lines.append([f"chunks of {chunk} rows", f"64 x {chunk}", chunked(chunk=chunk, impl="torch")])
if importlib.util.find_spec("triton"): lines.append(["Triton kernel", "on chip", chunked(impl="triton")])
nvfp4.print_table("loss and both gradients against the definition in fp64", ["rung, fp32", "logits at a time", "largest difference"], lines)

ids = torch.randint(0, 64, (4, 33), generator=rng)
losses = nemotron.loss(model, ids[:, :-1], ids[:, 1:])
states = model.hidden(ids[:, :-1]).flatten(0, 1)
again = nemotron.cross_entropy_definition(states, model.lm_head.weight, ids[:, 1:].flatten(), torch.ones(4 * 32))
print(f"\nthe small model: loss {losses.main:.5f}, by the definition {again:.5f}, of a model that knows nothing ln 64 = {math.log(64):.5f}")
print(f"two and three tokens ahead, by the one shared head: {', '.join(f'{depth:.5f}' for depth in losses.mtp_k)}")

# %% [markdown]
# ## Experiment: how many layers should attend?
#
# Ultra has 60 layers that mix tokens: 48 Mamba and 12 attention. You vary **the number that attend**, from none to all, and leave everything else
# as it is. The ledger then says what one sequence keeps in memory and what a token costs, at any context. Before running: at 8,192 tokens, is a
# Mamba layer cheaper than an attention layer with only two key heads?

# %% tags=["parameters"]
attending = [0, 6, 12, 30, 60]                      # attention layers among the 60 mixers; Ultra has 12 (tiny: [0, 12])
contexts = [2**power for power in range(11, 21)]    # tokens (tiny: [4096, 65536])

# %%
ultra = nemotron.PRESETS["ultra"]

def with_attention(number):
    """Ultra's letters with `number` of the 60 mixers attending, spread evenly over the depth."""
    places = [i for i, letter in enumerate(ultra.pattern) if letter != "E"]
    chosen = {places[int((j + 0.5) * len(places) / number)] for j in range(number)}
    return "".join("E" if letter == "E" else "*" if i in chosen else "M" for i, letter in enumerate(ultra.pattern))

cache, work = {}, {}
for number in attending:
    for context in contexts:
        book = nemotron.ledger(replace(ultra, pattern=with_attention(number)), context)
        cache[number, context] = 4 * book.state_values + book.kv_values_per_token * context        # fp32 states, FP8 keys and values
        work[number, context] = sum(book.flops_per_token.values())

columns = contexts[::3]
for title, numbers, unit in (("cache of one sequence", cache, "B"), ("work a token, forward", work, "FLOP")):
    nvfp4.print_table(title, ["attention layers"] + [f"{context:,} tokens" for context in columns],
                      [[str(number)] + [nemotron.short(numbers[number, context], unit) for context in columns] for number in attending])

alone = {letter: nemotron.ledger(replace(ultra, pattern=letter, vocab=0), context=1) for letter in "M*"}
work_of = {letter: sum(one.flops_per_token.values()) for letter, one in alone.items()}
per_token = sum(nemotron.ledger(replace(ultra, pattern="*", vocab=0), context=2).flops_per_token.values()) - work_of["*"]
print(f"\nan attention layer works as much as a Mamba layer at {1 + (work_of['M'] - work_of['*']) / per_token:,.0f} tokens, "
      f"and its cache is as large at {4 * alone['M'].state_values / alone['*'].kv_values_per_token:,.0f}")

# %%
fig, (left, right) = nvfp4.new_figure(columns=2)
for number in attending:
    width = 3 if number == 12 else 1.5
    left.loglog(contexts, [cache[number, context] / 1e9 for context in contexts], linewidth=width, label=f"{number} of 60 attend")
    right.semilogx(contexts, [work[number, context] / 1e9 for context in contexts], linewidth=width, label=f"{number} of 60 attend")
left.set(title="Attention pays for its memory by the token", xlabel="context, tokens", ylabel="cache of one sequence, GB")
right.set(title="and for its work too", xlabel="context, tokens", ylabel="GFLOP a token, mean over the context")
for ax in (left, right):
    ax.set_xticks(contexts[::2], [f"{context // 1024}K" for context in contexts[::2]]); ax.minorticks_off()
    ax.legend(frameon=False)
nvfp4.save_figure(fig, pictures / "04_attention.png")
Image(pictures / "04_attention.png")

# %% [markdown]
# With two key heads an attention layer is *cheaper* than a Mamba layer in short texts, in memory and in work. All the curves of the cache cross at
# one point, where one layer's keys and values are as large as one layer's state; with four Mamba layers to each attention layer the two caches as a
# whole are equal at four times as many tokens, the 65,536 of notebook 02. Beyond that attention pays by the token, and at a million tokens a model
# that only attends keeps several times as much and works several times as much. What the figure cannot show is quality: notebook 02 showed what a
# fixed state forgets, and the 12 layers are there for that.

# %% [markdown]
# ## The report and our measurement
#
# Ultra is built here on PyTorch's meta device, which knows shapes and holds no numbers, and counted tensor by tensor.

# %%
rows = table.read_rows(root / "experiments" / "results.jsonl")
recorded = table.newest(rows, "04_model", preset="ultra")
with torch.device("meta"): giant = nemotron.Nemotron(ultra)
counted = {name: tensor.numel() for name, tensor in giant.state_dict().items()}
head = sum(n for name, n in counted.items() if name.startswith("mtp."))
book, stored = nemotron.ledger(ultra), nemotron.bytes_by_format(giant)
billions = lambda n: f"{n / 1e9:.2f}B"
nvfp4.print_table("Nemotron 3 Ultra", ["", "published", "recorded row", "this cell"], [
    ["parameters  [Ultra: 550B-A55B]", "550B", billions(recorded["total"]), billions(sum(counted.values()) - head)],
    ["active for a token", "55B", billions(recorded["active"]), billions(book.active)],
    ["parameters of the shared MTP head", "-", billions(recorded["mtp"]), billions(head)],
    ["checkpoint in bf16  [Ultra, quantization]", "1.1 TB", "-", nemotron.short(2 * sum(counted.values()), "B")],
    ["the same under the training placement", "-", "-", nemotron.short(sum(stored.values()), "B")]])
flops = sum(book.flops_per_token.values())
nvfp4.print_table("who has the parameters, and who does the work at 8,192 tokens", ["part", "of the parameters", "of the work"],
                  [["routed experts", f"{book.parts['routed experts'] / book.total:.1%}", f"{book.flops_per_token['routed experts'] / flops:.1%}"],
                   ["Mamba", f"{book.parts['Mamba linears'] / book.total:.1%}", f"{book.flops_per_token['Mamba'] / flops:.1%}"],
                   ["attention", f"{book.parts['attention'] / book.total:.1%}", f"{book.flops_per_token['attention'] / flops:.1%}"]])

# %% [markdown]
# ## Exercises
#
# **1. Sparse is not small.** Routed experts hold 94 % of the parameters. Which share of the work is theirs, and which number makes the difference?
#
# <details><summary>Answer</summary>
#
# About 40 %: a token is multiplied with 22 of 512 experts, 4.3 % of them, while Mamba's dense matrices, a 25th of the size, serve every token. That
# is what "550B-A55B" says: memory for one model, work for one of a tenth of the size.
#
# ```python
# share = book.flops_per_token["routed experts"] / flops
# expected = book.parts["routed experts"] * 2 * 22 / 512
# print(f"{share:.1%}; parameters · 2 · 22/512 = {expected / 1e9:.2f} GFLOP")
# assert 0.35 < share < 0.45 and abs(expected / book.flops_per_token["routed experts"] - 1) < 1e-9
# ```
#
# </details>
#
# **2. Which layers stay in high precision?** Ultra trains the linear layers of its last 15 % of layers in bf16 ([§2 · Precision
# placement](../04_model.py)). How many layers is that, and what do most of their parameters belong to?
#
# <details><summary>Answer</summary>
#
# 16 of 108, and nearly all of it is routed experts: that is where parameters are. So these layers keep a sixth of the model in 16 instead of
# 4.5 bits. First match wins in the table; the layers' norms would be in high precision anyway.
#
# ```python
# late = {name.split(".")[2] for name in counted if nemotron.in_last_layers(name, ultra)}
# kept = sum(n for name, n in counted.items() if nemotron.in_last_layers(name, ultra))
# of_experts = sum(n for name, n in counted.items() if nemotron.in_last_layers(name, ultra) and ".experts." in name)
# print(f"{len(late)} layers, {kept / book.total:.1%} of the parameters, of which {of_experts / kept:.0%} are routed experts")
# assert len(late) == 16 and of_experts / kept > 0.9 and 0.1 < kept / book.total < 0.2
# ```
#
# </details>
#
# **3. Two tokens ahead.** The MTP head learns to predict further tokens from the same text, shifted ([§5 · Multi-token
# prediction](../04_model.py)). A row holds the documents `5 6 7 8` and `9 4`. What are the targets at depth 1 and 2, and how many positions still
# have one?
#
# <details><summary>Answer</summary>
#
# Labels are the next tokens, each depth moves them one step further to the left *inside* a document, and what would come from another document has
# no label. Each depth loses one position a document.
#
# ```python
# docs = torch.tensor([[0, 0, 0, 0, 1, 1]])
# target = nemotron.roll_document(torch.tensor([[5, 6, 7, 8, 9, 4]]), docs, fill=-1)
# for depth in range(3):
#     print(f"depth {depth}: {target[0].tolist()}")
#     assert (target >= 0).sum() == (4, 2, 1)[depth]
#     target = nemotron.roll_document(target, docs, fill=-1)
# ```
#
# </details>
