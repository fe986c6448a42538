# %% [markdown]
# # 02 · Mamba-2: how does a layer remember in a fixed space?
#
# Stage file: [`02_mamba.py`](../02_mamba.py). Every function that runs below is imported from it; open it beside this page.

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

import torch
import torch.nn.functional as F
from IPython.display import Image

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")      # kernels run in Triton's interpreter, slowly
nvfp4, mamba, table = (importlib.import_module(name) for name in ("01_nvfp4", "02_mamba", "experiments.table"))
pictures = nvfp4.writable_folder(root / "out" / "notebooks")
inference = torch.set_grad_enabled(False)      # nothing here is trained

# %% [markdown]
# ## The question
#
# Attention remembers everything: each token leaves a key and a value in every attention layer, and a million tokens leave a million of them. A
# Mamba-2 layer keeps one matrix a head, of the same size after ten tokens and after a million; 48 of Ultra's 108 layers work like that, and only 12
# attend. Two questions follow:
#
# - A recurrence takes one token after the other. How do you train it on a GPU, which wants everything at once?
# - What fits into a matrix, and what happens when it is full?

# %% [markdown]
# ## By hand: five tokens
#
# One head, a state of one number. With step `dt`, decay rate `A` and input `x` ([§2 · Recurrence](../02_mamba.py)):
#
#     S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_t          y_t = C_t S_t
#
# Take A = −ln 2 and B = C = 1. Then a step of 1 halves the state, and a step of 2 quarters it. The step is computed from the token itself, and does
# two things at once: a token with a large step is *written strongly* and *wipes out what was there*. That is the selection in "selective state
# space".

# %%
x = torch.tensor([1.0, 0, 0, 2, 0])
dt = torch.tensor([1.0, 1, 1, 2, 1])
A = torch.tensor([-math.log(2)])
ones = torch.ones(1, 5, 1, 1)
y, state = mamba.ssd_recurrence(x.view(1, 5, 1, 1), dt.view(1, 5, 1), A, ones, ones)

before, lines = 0.0, []
for t in range(5):
    keep, write = math.exp(dt[t] * A[0]), (dt[t] * x[t]).item()
    lines.append([str(t), f"{x[t]:g}", f"{dt[t]:g}", f"{keep:g}", f"{before:g}", f"{keep:g} · {before:g} + {write:g}", f"{y[0, t, 0, 0]:g}"])
    before = keep * before + write
nvfp4.print_table("a scan of five tokens", ["token", "x", "dt", "decay", "state before", "state after", "y of the stage"], lines)

# feed five unit impulses, one a row of the batch, and the responses are the columns of a matrix: the layer as attention without softmax
impulses = torch.eye(5).view(5, 5, 1, 1)
response, _ = mamba.ssd_quadratic(impulses, dt.expand(5, 5).unsqueeze(-1), A, ones.expand(5, 5, 1, 1), ones.expand(5, 5, 1, 1))
M = response[:, :, 0, 0].T
nvfp4.print_table("the same map as a matrix M: row = token that reads, column = token that is read", ["", *(f"s={s}" for s in range(5))],
                  [[f"t={t}", *(f"{M[t, s]:g}" for s in range(5))] for t in range(5)])
print(f"\nM x = {[round(v, 5) for v in (M @ x).tolist()]}")

# %% [markdown]
# Row 4, column 0 says what token 4 still sees of token 0: 1/2 · 1/2 · 1/4 · 1/2. Column 3 is twice as strong, because token 3 had twice the step.
# Everything above the diagonal is 0, the future. The whole layer is a causal attention matrix whose entries fade with distance, so there are two
# ways to compute it: walk (linear work, no parallelism) or multiply by M (parallel, quadratic work).

# %% [markdown]
# ## Three rungs
#
# The third way takes the better half of each: [§4 · Chunked scan](../02_mamba.py) multiplies by M inside chunks of, say, 128 tokens and walks from
# chunk to chunk with the state. All are the same function. Below: four heads, documents packed into one row (a new document starts from an empty
# state), an odd number of tokens.

# %%
inputs = mamba.random_inputs(1, 77, 4, 16, 2, 16, seed=0)
docs = torch.tensor([[0] * 30 + [1] * 40 + [-1] * 7])         # two documents, then padding
truth, _ = mamba.ssd_recurrence(*(z.double() for z in inputs), doc_bt=docs)
ways = {"recurrence": lambda *z: mamba.ssd_recurrence(*z, doc_bt=docs), "quadratic": lambda *z: mamba.ssd_quadratic(*z, doc_bt=docs),
        "chunked, 16 a chunk": lambda *z: mamba.ssd_chunked(*z, chunk=16, doc_bt=docs, impl="torch"),
        "chunked, 77 a chunk": lambda *z: mamba.ssd_chunked(*z, chunk=77, doc_bt=docs, impl="torch")}
gap = lambda got: f"{((got.double() - truth).abs().max() / truth.abs().max()).item():.0e}"
lines = [[name, gap(way(*(z.double() for z in inputs))[0]), gap(way(*inputs)[0])] for name, way in ways.items()]
if importlib.util.find_spec("triton"): lines.append(["Triton kernel", "-", gap(mamba.ssd_chunked(*inputs, doc_bt=docs, impl="triton")[0])])
nvfp4.print_table("largest difference to the recurrence in fp64, of the largest output", ["rung", "in fp64", "in fp32"], lines)

# %% [markdown]
# In fp64 they are equal to the last digits. In fp32 length matters: the quadratic form subtracts sums of decays that grow with the sequence, and
# the small difference of two large numbers has few digits left. The chunked scan starts its sums anew with every chunk. So it is faster than the
# quadratic form and more exact:

# %%
lengths = [64, 256, 1024]
errors = mamba.measure_rungs(lengths)
nvfp4.print_table("largest error in fp32, by length", ["tokens", *mamba.RUNGS],
                  [[f"{row['length']:,}", *(f"{row[f'{name}_error']:.1e}" for name in mamba.RUNGS)] for row in errors])

# %% [markdown]
# ## Experiment: fill the memory
#
# Write *pairs* (key → value) into one state and ask for them again. B is the key while writing, C while reading, and with decay 0 nothing fades, so
# that the state is a plain sum of outer products: `S = sum x_i B_iᵀ`, and reading with key j gives `x_j` plus whatever the other keys, not being
# quite orthogonal, bring along. A reading counts as right when the answer lies nearest to the value that was stored under this key, among all
# stored.
#
# You vary **the state's width n** (Ultra: 128). Before running: how many pairs will 32 numbers a row hold?

# %% tags=["parameters"]
widths = [16, 32, 64, 128]                     # n, the width of a key and of the state (tiny: [16, 32])
loads = [4, 8, 16, 32, 64, 128, 256, 512]      # pairs written before the questions come (tiny: [4, 64])
half_life = math.inf                           # tokens after which half of a pair is left; infinite = no decay (tiny: math.inf)
batch = 16                                     # independent memories to average over (tiny: 2)

# %%
def recall(n, pairs, half_life=math.inf, batch=16, p=32):
    """Which of the pairs are found again, bool [batch, pairs]: write all, then ask for all, in one scan of 2 · pairs tokens."""
    rng = torch.Generator().manual_seed(0)
    keys = F.normalize(torch.randn(batch, pairs, 1, n, generator=rng), dim=-1)
    values = torch.randn(batch, pairs, 1, p, generator=rng).sign()
    nothing = torch.zeros_like
    steps = torch.cat([torch.ones(batch, pairs, 1), torch.zeros(batch, pairs, 1)], 1)      # dt = 0 reads without writing or fading
    y, _ = mamba.ssd_chunked(torch.cat([values, nothing(values)], 1), steps, torch.tensor([-math.log(2) / half_life]),
                             torch.cat([keys, nothing(keys)], 1), torch.cat([nothing(keys), keys], 1))
    answer = torch.einsum("bqp,bkp->bqk", y[:, pairs:, 0], values[:, :, 0]).argmax(-1)
    return answer == torch.arange(pairs)

found = {(n, pairs): recall(n, pairs, half_life, batch).float().mean().item() for n in widths for pairs in loads}
nvfp4.print_table("pairs found again, %", ["state width"] + [f"{pairs} pairs" for pairs in loads],
                  [[f"n = {n}", *(f"{100 * found[n, pairs]:.0f}" for pairs in loads)] for n in widths])

# %%
fig, (left, right) = nvfp4.new_figure(columns=2)
for n in widths:
    share = [100 * found[n, pairs] for pairs in loads]
    left.semilogx(loads, share, "o-", base=2, label=f"n = {n}")
    right.semilogx([pairs / n for pairs in loads], share, "o-", base=2, label=f"n = {n}")
left.set(title="A wider state holds more", xlabel="pairs in the state", ylabel="found again, %")
right.set(title="What counts is pairs per width", xlabel="pairs / n", ylabel="found again, %")
left.set_xticks(loads, [str(pairs) for pairs in loads])
right.axvline(1, color="0.6", linewidth=1, linestyle="--")
for ax in (left, right): ax.legend(frameon=False)
nvfp4.save_figure(fig, pictures / "02_recall.png")
Image(pictures / "02_recall.png")

# %% [markdown]
# The curves fall together when you divide by the width: a state holds about as many pairs as it is wide, and then blurs **everything**, old and new
# alike. More memory a head is the only cure, and it is what attention has: its memory grows with the text. That is why a hybrid keeps a few
# attention layers for exact recall, and leaves the rest of the work to layers whose memory costs nothing more.
#
# A fresh layer does not run with decay 0. Its heads start with half-lives between less than a token and hundreds of tokens, so they forget at many
# speeds:

# %%
half, _ = mamba.measure_memory(heads=256, length=64)
shares = (0.02, 0.25, 0.5, 0.75, 0.98)
nvfp4.print_table("half-lives of the 256 heads of a fresh layer, tokens", ["share of heads below"] + [f"{share:.0%}" for share in shares],
                  [["half-life"] + [f"{half.quantile(share).item():,.1f}" for share in shares]])

# %% [markdown]
# ## The report and our measurement
#
# A state that never grows is large from the first token on, and kept in fp32. When is it the smaller cache? The report: Ultra's fp32 Mamba cache is
# larger than the FP8 keys and values *below 65,536 tokens*. Beside it what the layer itself says (built on the meta device, without memory), and
# the newest recorded row.

# %%
rows = table.read_rows(root / "experiments" / "results.jsonl")
recorded = table.newest(rows, "02_mamba")
states, windows, per_token = mamba.measure_cache()
nvfp4.print_table("Ultra's caches for one sequence", ["", "published", "recorded row", "this cell"], [
    ["fp32 states of 48 Mamba layers, bytes", "-", f"{recorded['state_bytes']:,}", f"{states:,}"],
    ["FP8 keys and values of 12 attention layers, bytes a token", "-", f"{recorded['kv_bytes_per_token']:,}", f"{per_token:,}"],
    ["context at which both are equal, tokens  [Ultra, inference]", "65,536", f"{recorded['equal_at_tokens']:,}", f"{states // per_token:,}"],
    ["prefill, then single steps, against one pass: largest gap", "-", f"{recorded['decode_gap']:.0e}", f"{mamba.measure_decode():.0e}"]])

# %% [markdown]
# ## Exercises
#
# **1. Is forgetting a weakness?** Write 256 pairs into a state of width 16, sixteen times its size, and ask for the *last eight* only. Nothing
# decays: how many come back? Now let a pair lose half of its strength every 8 tokens.
#
# <details><summary>Answer</summary>
#
# Without decay nearly nothing is found, however new: 248 old pairs shout as loud as the last eight. With a half-life of 8 tokens nearly all of the
# last eight come back, at the price of the old ones. A fixed memory is useful because it forgets, and a layer with many heads forgets at many
# speeds.
#
# ```python
# recent = {life: recall(16, 256, life, batch=64)[:, -8:].float().mean().item() for life in (math.inf, 8)}
# print({life: f"{100 * share:.0f} %" for life, share in recent.items()})
# assert recent[math.inf] < 0.15 and recent[8] > 0.9
# ```
#
# </details>
#
# **2. What does a chunk cost?** For one head with chunks of L tokens, count multiply-adds a token: inside the chunk, and with the state. At which L
# are both equal for Ultra (p = 64, n = 128, 32 heads share B and C)? ([§4 · Chunked scan](../02_mamba.py))
#
# <details><summary>Answer</summary>
#
# Inside: L·p for M u, and L·n for C Bᵀ, shared by the heads of a group. With the state: n·p to read it, n·p to write it. A larger L costs more
# work, a smaller one leaves more steps that wait for each other and smaller products. Equal at L = 2 n p / (p + n / 32) = 241; the released config
# says 128.
#
# ```python
# p, n, sharing = 64, 128, mamba.ULTRA["heads"] // mamba.ULTRA["groups"]
# print(f"equal at a chunk of {2 * n * p / (p + n / sharing):.0f} tokens")
# assert sharing == 32 and round(2 * n * p / (p + n / sharing)) == 241
# ```
#
# </details>
#
# **3. One token late.** Training packs several documents into a row. What would the second document see if nobody told the layer where it starts?
# Which parts of the layer have to know? ([§5 · Causal convolution](../02_mamba.py), [§1 · Documents and arguments](../02_mamba.py))
#
# <details><summary>Answer</summary>
#
# The state of the first, faded, and its last three inputs, through the convolution's window. Both have to start anew: with document ids the second
# document's outputs are those it has alone, without them they are not.
#
# ```python
# torch.manual_seed(0)
# layer, text = mamba.Mamba2(32, heads=4, head_dim=16, groups=2, state=8), torch.randn(1, 20, 32)
# ids = torch.tensor([[0] * 12 + [1] * 8])
# alone = layer(text[:, 12:])
# told, untold = ((layer(text, doc_bt=doc)[:, 12:] - alone).abs().max().item() for doc in (ids, None))
# print(f"largest difference to the document alone: {told:.0e} with ids, {untold:.0e} without")
# assert told < 1e-5 < 1e-3 < untold
# ```
#
# </details>
