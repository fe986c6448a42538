"""A phase of long sequences after pretraining, and what it buys: loss by position, recall over a distance, memory by length.

Ultra ends its pretraining with 33B tokens at the constant rate 2.5e-6: 92 % of the iterations at 1,048,576 tokens, 8 % at 4,096, never mixed in
one, 25,165,824 tokens each; 46 % of the data are long documents, 54 % the second blend, none of it looks like the tests  [Ultra, long context].
Attention has no position encoding, so no length is new to it; Mamba's state and the experts have still never seen what comes after so many tokens.

Three models on the same texts and prompts: before the phase; after it; and after as many steps at the same rate on the same blend in short windows
only. What the second gains over the first may be more training; what it gains over the third is what length buys.
Of a model that was trained for minutes expect little: at the default rate the phase and its control both lower the loss by 0.01 nats at every
position, and neither model copies a string or finds a needle. What shows at once: no length hurts, though training saw 256 tokens; and the memory.

Run:      python experiments/long_context.py                    # 3 min on a CPU, from out/pretrain's newest checkpoint; figure and rows in out/
          python experiments/long_context.py --steps 400 --save # a longer phase; its model goes to out/long_context
          python experiments/long_context.py --from-checkpoint out/mine/pretrain/step-000850 --out experiments
Shows:    1  the phase   2  loss by position on held-out long documents   3  copy and needle   4  memory, time and cache by length
Contents: 1 long documents   2 the phase   3 loss by position   4 copy and needle   5 memory and time   6 figure and command
Letters:  b batch  t time  v vocabulary  n documents (rows of an evaluation)  r scored tokens
"""
from __future__ import annotations

import dataclasses
import importlib
import json
import math
import random
import re
import statistics
import sys
import sysconfig
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent


def stage(name: str):
    """A numbered stage, importable from this folder."""
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


@dataclass(frozen=True)
class Config:
    """Trains a checkpoint further on long sequences and compares it with what it was, and with as much training on short ones."""
    from_checkpoint: Path | None = None     # a checkpoint of stage 05; nothing = the newest of home/pretrain, or a fresh short training
    steps: int = 30                 # optimizer steps of the phase, ours: Ultra 33B tokens / 25,165,824 a step = 1,311
    long_seq: int = 2048            # tokens of a long sequence, ours: Ultra 1,048,576
    short_seq: int = 256            # tokens of a short one, as in stage 05; ours: Ultra 4,096
    batch: int = 1                  # long sequences a step; a short step has as many tokens
    share: float = 0.92             # of the steps that are long  [Ultra]
    long_data: float = 0.46         # share of the windows from long documents, the rest is the second blend  [Ultra]
    lr: float | None = None         # constant rate; nothing = the checkpoint's lr_min, as in Ultra (2.5e-6 is where its decay ended)
    base_steps: int = 300           # of the fresh training, when there is no checkpoint
    longest: int = 8192             # tokens a row of the evaluation
    documents: int = 4              # held-out long documents scored by position
    prompts: int = 4                # copy prompts, and as many needle prompts, at each distance
    distances: tuple[int, ...] = (128, 1024, 6144)     # tokens of other text between a fact and its recall
    memory: tuple[int, ...] = (1024, 1536, 2048, 4096, 8192)    # lengths of which memory and time are measured; of training, those up to long_seq
    seed: int = 0
    data: tuple[str, ...] = ()      # of the fresh training, as stage 05's; a checkpoint names its own
    threads: int = 1                # torch threads
    save: bool = False              # write the model after the phase to home/long_context
    home: Path = ROOT / "out"       # the figure, stage 05's text and checkpoints, the long documents
    out: Path = ROOT / "out"        # results.jsonl in this folder gets the rows

    def __post_init__(self):
        for name in ("steps", "long_seq", "short_seq", "batch", "base_steps", "longest", "documents", "prompts", "threads"):
            if getattr(self, name) < 1: raise ValueError(f"{name} = {getattr(self, name)} must be at least 1.")
        for name in ("share", "long_data"):
            if not 0 < getattr(self, name) <= 1: raise ValueError(f"{name} = {getattr(self, name)} must lie in (0, 1].")
        for name, value in (("batch × long_seq", self.batch * self.long_seq), ("longest", self.longest)):
            if value % self.short_seq: raise ValueError(f"{name} = {value:,} must be a multiple of short_seq = {self.short_seq}.")
        if sum(t <= self.long_seq for t in self.memory) < 3 or list(self.memory) != sorted(set(self.memory)):
            raise ValueError(f"memory = {self.memory}: give rising lengths, at least three of them up to long_seq = {self.long_seq:,} (two always "
                             "lie on a line).")
        if not self.distances or min(self.distances) < 1 or max(self.distances) > self.longest:
            raise ValueError(f"distances = {self.distances} must lie between 1 and longest = {self.longest:,}.")


# %% 1 · Long documents
# The built-in documents are shorter than a window. Long ones: classes and functions of the standard library beyond 4,000 characters, which are too
# long for the source in data/corpus.py. So a model of stage 05 has read none of them, and those held out here are new to every model compared.

SHORT_PIECE = 4000      # characters; data/corpus.py takes pieces up to this length


def long_pieces(file: Path) -> list[str]:
    """A module's top-level classes and functions that the built-in source leaves out as too long."""
    try: text = file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError): return []
    pieces = re.split(r"\n{2,}(?=@|(?:def|class|async def)\b)", text)[1:]      # the first is what stands above them: imports, tables of data
    return [piece.strip() + "\n" for piece in pieces if len(piece) > SHORT_PIECE]


def long_documents(size: int, root: Path | None = None) -> Iterator[str]:
    """Documents of at least `size` characters: the long pieces of neighbouring modules, a module always whole, each under its path."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    # ours: the folders that data/corpus.py leaves out too
    skip, parts = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages", "__pycache__"}, []
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if skip & set(name.parts) or not (pieces := long_pieces(file)): continue
        parts.append("\n\n".join([f"# {name.as_posix()}\n", *pieces]))
        if sum(map(len, parts)) >= size: yield "\n\n".join(parts); parts = []      # the last few, too short for a document, are left out


class LongText(NamedTuple):
    train: object           # Shard
    held_out: object        # Shard
    rows_nt: Tensor         # the first longest + 1 tokens of held-out documents, one a row


def write_long_text(config: Config, tokenizer, folder: Path) -> LongText:
    """Tokenizes the long documents with the model's own tokenizer; one in eight is held out, by its content."""
    corpus, shards = stage("data.corpus"), stage("data.shards")
    # ours: 5 characters a token is more than code needs (about 4 with 4,096 tokens), so that nearly every document fills a row
    sides = {"train": [], "held_out": []}
    for text in long_documents(5 * max(config.longest, config.long_seq)):
        sides["held_out" if corpus.is_held_out(text, 1 / 8) else "train"].append(text)
    folder.mkdir(parents=True, exist_ok=True)
    for side, texts in sides.items(): shards.Shard.write(folder / f"long.{side}.bin", texts, tokenizer)
    train, held_out = (shards.Shard(folder / f"long.{side}.bin") for side in sides)
    starts = [0, *held_out.ends[:-1]]
    rows = [held_out.tokens[a:a + config.longest + 1] for a, b in zip(starts, held_out.ends) if b - a > config.longest][:config.documents]
    if not rows or len(train.tokens) == 0:
        raise ValueError(f"the standard library gives no held-out document of {config.longest:,} tokens: lower --longest.")
    return LongText(train, held_out, torch.stack([torch.from_numpy(row.astype("int64")) for row in rows]))


# %% 2 · The phase  [Ultra, long context]

def phase_batches(config: Config, data, long_text: LongText, share: float) -> Callable:
    """LongShort batches. ours: both lengths read the same blend (Ultra has math and code in the short steps only), so that the lengths are all
    that differs between the phase and its control; the second blend stays what it was."""
    pretrain = stage("05_pretrain")
    second = pretrain.Blend.of(data.train).phase2
    shares = {"long documents": config.long_data} | {name: (1 - config.long_data) * w for name, w in second.items()}
    blend, shards = pretrain.Blend(shares, shares), {"long documents": long_text.train} | data.train
    rows = config.batch * config.long_seq // config.short_seq
    long, short = (pretrain.Batches(shards, blend, b, t, config.steps, config.seed + 1)      # a seed that pretraining did not have
                   for b, t in ((config.batch, config.long_seq), (rows, config.short_seq)))
    return pretrain.LongShort(long, short, share)


def needed_documents(doc_bt: Tensor) -> Tensor | None:
    """None when every row is one document: attention is then plainly causal and no [t, t] mask is made, which would cost t² bytes."""
    return None if (doc_bt == doc_bt[:, :1]).all() and (doc_bt >= 0).all() else doc_bt


def settings_of(config: Config, checkpoint: Path):
    """The checkpoint's PretrainConfig, set to go on at a constant rate on one long sequence a micro-batch."""
    pretrain, about = stage("05_pretrain"), json.loads((checkpoint / "pretrain.json").read_text())
    saved = {f.name: about["config"][f.name] for f in dataclasses.fields(pretrain.PretrainConfig) if f.name in about["config"]}
    saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    # without warmup and decay the rate is constant: wsd_lr
    low = saved["lr_min"] if config.lr is None else config.lr
    return pretrain.PretrainConfig(**saved | dict(out=config.home, branch_from=None, steps=max(about["step"], 1), warmup=0.0, decay=0.0, lr=low,
                                                  batch=config.batch, micro_batches=config.batch, seq=config.long_seq, health_every=0, device="cpu",
                                                  keep=1, resume=False, fresh=False, branches=()))


def train_phase(config: Config, checkpoint: Path, data, long_text: LongText, share: float, label: str):
    """The trainer after config.steps more steps from a checkpoint, `share` of them long."""
    model04, pretrain, settings = stage("04_model"), stage("05_pretrain"), settings_of(config, checkpoint)
    batches, first = phase_batches(config, data, long_text, share), settings.steps
    objective = lambda model, x: model04.loss(model, x.ids_bt, x.labels_bt, needed_documents(x.doc_bt), x.mask_bt, mtp_weight=settings.mtp_weight,
                                              aux_weight=settings.aux_weight)
    trainer = pretrain.Trainer.load(checkpoint, settings, lambda step: batches(step - first), config.home / "long_context",
                                    tokenizer=data.tokenizer, objective=objective, data_hash=pretrain.hash_of(data))
    for i in range(config.steps):
        row = trainer.train_step()
        row["long"] = batches.is_long(i)
        if (i + 1) % 10 == 0 or i in (0, config.steps - 1):
            print(f"{label} | step {i + 1:4d} | {'long ' if row['long'] else 'short'} | loss {row['loss']:.4f} | lr {row['lr']:.2e} | "
                  f"tok/s {row['tokens_per_s']:7,.0f}", flush=True)
    return trainer


def starting_point(config: Config) -> tuple[Path, object]:
    """(checkpoint, the data it was trained on). ValueError when that text is no longer the one it was trained on."""
    model04, pretrain = stage("04_model"), stage("05_pretrain")
    checkpoint = config.from_checkpoint
    if checkpoint is None and pretrain.checkpoints(config.home / "pretrain"): checkpoint = pretrain.newest_checkpoint(config.home / "pretrain")
    if checkpoint is None:
        print(f"no checkpoint in {config.home / 'pretrain'}: training tiny for {config.base_steps} steps of {config.short_seq} tokens")
        base = pretrain.PretrainConfig(data=config.data, out=config.home / "long_context", steps=config.base_steps, seq=config.short_seq,
                                       branches=(), health_every=0, save_every=config.base_steps, keep=1, fresh=True)
        data = pretrain.prepare_data(config.data, config.home / "data", model04.preset(base.preset).vocab)
        batches = pretrain.Batches(data.train, pretrain.Blend.of(data.train, base.blend_switch), base.batch, base.seq, base.steps, base.seed)
        if not pretrain.start(base, data, batches).fit(base.steps): raise KeyboardInterrupt
        return pretrain.newest_checkpoint(base.home), data
    if problem := pretrain.damage(checkpoint): raise ValueError(f"{problem}: give --from-checkpoint a folder like out/pretrain/step-000850.")
    about = json.loads((checkpoint / "pretrain.json").read_text())
    data = pretrain.prepare_data(tuple(about["config"]["data"]), config.home / "data", model04.preset(about["config"]["preset"]).vocab)
    if pretrain.hash_of(data) != about["data"]:
        raise ValueError(f"the text is not the one {checkpoint} was trained on: train again with `python 05_pretrain.py --fresh`.")
    return checkpoint, data


# %% 3 · Loss by position
# A token's loss depends on what stands before it only, so one pass over a long row gives the loss at every length up to it. Texts get easier or
# harder along the way for reasons of their own: so the same tokens are also scored in windows of short_seq, where nothing before the window is seen.

@torch.no_grad()
def token_nats(model, ids_bt: Tensor, rows: int = 1024) -> Tensor:
    """-log p of every token but the first, [b, t - 1]; `rows` rows of logits exist at a time."""
    h_rd, labels_r = model.hidden(ids_bt[:, :-1]).flatten(0, 1), ids_bt[:, 1:].flatten()
    parts = [F.cross_entropy(h @ model.lm_head.weight.T, labels, reduction="none") for h, labels in zip(h_rd.split(rows), labels_r.split(rows))]
    return torch.cat(parts).view(ids_bt.shape[0], -1)


def windowed_nats(model, ids_t: Tensor, window: int) -> Tensor:
    """The same of one row, [t - 1], where a token sees the tokens of its own window of `window` only: 0 to window - 1 before its predecessor."""
    return token_nats(model, ids_t.unfold(0, window + 1, window)).flatten()


def bucket_edges(first: int, longest: int) -> list[int]:
    """0, first, 2 first, 4 first, ... longest."""
    edges = [0, first]
    while edges[-1] < longest: edges.append(min(2 * edges[-1], longest))
    return edges


def bucket_means(nats_nt: Tensor, edges: list[int]) -> Tensor:
    """Mean of each row over the positions from one edge to before the next, [n, buckets].   1 2 3 5, edges 0 1 4 -> 1, 10/3"""
    return torch.stack([nats_nt[:, lo:hi].double().mean(1) for lo, hi in zip(edges, edges[1:])], 1)


def loss_by_position(model, rows_nt: Tensor, window: int, edges: list[int]) -> dict[str, Tensor]:
    """{"whole": all of the row before a token is seen, "window": only its window}: mean nats, [n, buckets]."""
    whole = torch.cat([token_nats(model, row[None]) for row in rows_nt])
    return dict(whole=bucket_means(whole, edges), window=bucket_means(torch.stack([windowed_nats(model, row, window) for row in rows_nt]), edges))


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """(mean, its standard error) over rows; one row has no error."""
    values = values.double()
    return values.mean().item(), values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None


# %% 4 · Copy and needle
# A fact, other text, the fact again. Copy: a string of random words. Needle: a few keys with their digits, asked for in another order. Every
# scored token was drawn uniformly from a pool, so without memory of its first occurrence no guess is right more often than 1 / pool.
# hits        share of tokens that are the model's first choice of the whole vocabulary
# choice      share that are its first choice within the pool; chance is 1 / pool
# nats        mean -log p over the vocabulary
# recalled    mean of log p after this fact minus log p after another fact in its place, within the pool, in nats: 0 remembers nothing, and ln pool
#             is what there is to know. It sees what accuracy does not: a model that is still wrong, but less so.

class Prompt(NamedTuple):
    ids: list[int]
    other: list[int]        # the same with another fact: its scored tokens cannot be known
    scored: list[int]       # where the fact's tokens stand the second time
    pool: list[int]         # what each was drawn from


def word_tokens(tokenizer) -> list[int]:
    """Ids of tokens that are a space and at least three small letters."""
    return [i for i in range(len(tokenizer)) if re.fullmatch(r" [a-z]{3,}", tokenizer.decode([i]))]


def copy_prompt(tokenizer, filler: list[int], rng: random.Random, length: int = 48, pool: int = 64) -> Prompt:
    """A string of `length` words of a pool, the filler, the string. ours: 48 of 64. Scored from the second word on: the first has no cue."""
    words = word_tokens(tokenizer)
    if len(words) < pool: raise ValueError(f"the tokenizer has {len(words)} whole words and a copy string draws from {pool}: train on more text.")
    pool_ids = rng.sample(words, pool)
    string, another = rng.choices(pool_ids, k=length), rng.choices(pool_ids, k=length)
    again = length + len(filler)
    return Prompt([*string, *filler, *string], [*another, *filler, *string], list(range(again + 1, again + length)), pool_ids)


FACT, QUESTION = "The vault of {key} opens with ", "Which digits open the vault of {key}? The vault of {key} opens with "
END = ".\n"


def needle_prompt(tokenizer, filler: list[int], rng: random.Random, facts: int = 4, digits: int = 4) -> Prompt:
    """Facts, the filler, and the question for each with its answer, in another order. ours: 4 cities with 4 digits each."""
    keys = rng.sample([capital for _, capital, *_ in stage("data.corpus").COUNTRIES], facts)
    pool_ids = [tokenizer.encode(str(digit))[0] for digit in range(10)]
    values, others = ({key: rng.choices(pool_ids, k=digits) for key in keys} for _ in range(2))
    asked, scored = rng.sample(keys, facts), []

    def said(form: str, order: list[str], values: dict) -> list[int]:
        return [i for key in order for i in (*tokenizer.encode(form.format(key=key)), *values[key], *tokenizer.encode(END))]

    fact, other, questions = said(FACT, keys, values), said(FACT, keys, others), said(QUESTION, asked, values)
    ids = [*fact, *filler, *questions]
    for i in range(len(fact) + len(filler), len(ids)):
        if ids[i] in pool_ids: scored.append(i)      # the questions have no digits but the answers
    return Prompt(ids, [*other, *filler, *questions], scored, pool_ids)


def make_prompts(config: Config, tokenizer, rows_nt: Tensor) -> dict[str, dict[int, list[Prompt]]]:
    """task -> distance -> prompts. The facts are the same at every distance; the filler is the beginning of a held-out document."""
    return {task: {gap: [make(tokenizer, rows_nt[i % len(rows_nt), :gap].tolist(), random.Random(f"{task} {config.seed} {i}"))
                         for i in range(config.prompts)] for gap in config.distances}
            for task, make in (("copy", copy_prompt), ("needle", needle_prompt))}


def phrases(tokenizer, prompts: dict[str, dict[int, list[Prompt]]], run: int = 4) -> list[str]:
    """What would show that a test was in the training text: any `run` words in a row of a copy string, and the wordings of fact and question."""
    strings = [p.ids[p.scored[0] - 1:] for p in next(iter(prompts["copy"].values()))]
    runs = [tokenizer.decode(string[i:i + run]) for string in strings for i in range(0, len(string) - run + 1, run)]
    return [*runs, *(form.split("{key}")[0] for form in (FACT, QUESTION))]


def found_in_training(tokenizer, shards: dict, wanted: Iterable[str]) -> list[tuple[str, str]]:
    """(source, phrase) for every phrase that occurs in a source's training text. The shards are read back as text, so that it does not matter how
    the phrase falls into tokens."""
    wanted, found = sorted(set(wanted)), []
    for name, shard in shards.items():
        text = tokenizer.decode(shard.tokens.tolist())
        found += [(name, phrase) for phrase in wanted if phrase in text]
    return found


class Score(NamedTuple):
    hits: float
    choice: float
    nats: float
    choice_nats: float


def score(logits_rv: Tensor, answers_r: Tensor, pool: list[int]) -> Score:
    """Means over the scored tokens. Logits 0 0 ln 2 0 and answer 2, pool 1 2: hit, chosen, nats ln 5/2, within the pool ln 3/2."""
    logits_rv, pool_p = logits_rv.double(), torch.tensor(pool)
    in_pool_rp = logits_rv[:, pool_p]
    place_r = (pool_p == answers_r[:, None]).long().argmax(1)
    return Score((logits_rv.argmax(1) == answers_r).double().mean().item(), (in_pool_rp.argmax(1) == place_r).double().mean().item(),
                 F.cross_entropy(logits_rv, answers_r).item(), F.cross_entropy(in_pool_rp, place_r).item())


@torch.no_grad()
def score_prompt(model, prompt: Prompt) -> tuple[Score, Score]:
    """Scores of the second occurrence after the fact, and after another one."""
    ids_bt, at = torch.tensor([prompt.ids, prompt.other]), torch.tensor(prompt.scored)
    h_btd = model.hidden(ids_bt[:, :-1])
    return tuple(score(h_td[at - 1] @ model.lm_head.weight.T, ids_t[at], prompt.pool) for h_td, ids_t in zip(h_btd, ids_bt))      # i - 1 predicts i


def measure_recall(model, prompts: dict[str, dict[int, list[Prompt]]]) -> dict[str, list[dict]]:
    """task -> one row a distance: the scores after the fact, chance, and recalled with its standard error over prompts."""
    rows = {}
    for task, by_gap in prompts.items():
        rows[task] = []
        for gap, some in by_gap.items():
            known, unknown = zip(*(score_prompt(model, prompt) for prompt in some))
            recalled, error = mean_and_error(torch.tensor([b.choice_nats - a.choice_nats for a, b in zip(known, unknown)]))
            n, means = len(some[0].pool), {key: statistics.mean(getattr(s, key) for s in known) for key in Score._fields}
            rows[task].append(dict(distance=gap, **means, chance=1 / n, chance_nats=math.log(n), recalled=recalled, recalled_error=error,
                                   tokens=sum(len(p.scored) for p in some)))
    return rows


# %% 5 · Memory and time
# The peak is counted, not sampled: every tensor's storage is added when an operator returns it and taken off when it is freed. What an operator
# allocates and frees inside itself is not seen; on a CPU, attention without a mask keeps a few blocks there, whatever the length.

class PeakBytes(TorchDispatchMode):
    """While active, .peak is the largest number of bytes that tensors made inside held at once."""
    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        # what was there before (weights, inputs) is not counted, also when an operator hands it back
        for x in tree_leaves((args, kwargs)): self.note(x, 0)
        out = f(*args, **(kwargs or {}))
        for x in tree_leaves(out): self.note(x, None)
        self.peak = max(self.peak, self.live)
        return out

    def note(self, x, nbytes: int | None) -> None:
        if not isinstance(x, Tensor): return
        storage = x.untyped_storage()
        if storage._cdata in self.known: return
        nbytes = storage.nbytes() if nbytes is None else nbytes
        self.known.add(storage._cdata); self.live += nbytes
        weakref.finalize(storage, self.forget, storage._cdata, nbytes)

    def forget(self, key: int, nbytes: int) -> None:
        self.known.discard(key); self.live -= nbytes


def peak_bytes(work: Callable[[], object]) -> int:
    with PeakBytes() as count: work()
    return count.peak


def forward_pass(model, t: int, doc_bt: Tensor | None = None) -> None:
    """Hidden states of one row; the output layer's logits are made in chunks of rows and do not grow."""
    with torch.no_grad(): model.hidden(torch.arange(t)[None] % model.config.vocab, doc_bt)


def training_pass(model, t: int, doc_bt: Tensor | None = None) -> None:
    """Loss and gradients of one row, MTP head included."""
    ids_bt = torch.arange(t + 1)[None] % model.config.vocab
    stage("04_model").loss(model, ids_bt[:, :-1], ids_bt[:, 1:], doc_bt).total.backward()
    model.zero_grad(set_to_none=True)


def slopes(lengths: Iterable[int], amounts: Iterable[float]) -> list[float]:
    """Bytes (or whatever) a further token between neighbouring lengths.   lengths 1 2 4, amounts 3 5 9 -> 2 2"""
    points = list(zip(lengths, amounts))
    return [(b - a) / (hi - lo) for (lo, a), (hi, b) in zip(points, points[1:])]


def growth(lengths: Iterable[int], amounts: Iterable[float]) -> float:
    """Last slope / first slope: 1 is linear, t² alone gives the ratio of the spans' middles. Begin at 1,024: buffers of a fixed number of rows
    (512 rows of logits) are filled there, and below it the peak may lie in another layer."""
    found = slopes(lengths, amounts)
    return found[-1] / found[0] if found[0] else math.inf


def attention_seconds(model, t: int) -> tuple[float, float]:
    """(seconds of a forward pass of t tokens, of which in the attention layers), the fastest of three."""
    layers, times = [block.mixer for block in model.backbone.layers if block.letter == "*"], []
    for _ in range(3):
        spent, began = [0.0], [0.0]
        hooks = [layer.register_forward_pre_hook(lambda *_, began=began: began.__setitem__(0, time.perf_counter())) for layer in layers]
        hooks += [layer.register_forward_hook(lambda *_, spent=spent, began=began: spent.__setitem__(0, spent[0] + time.perf_counter() - began[0]))
                  for layer in layers]
        start = time.perf_counter()
        try: forward_pass(model, t)
        finally:
            for hook in hooks: hook.remove()
        times.append((time.perf_counter() - start, spent[0]))
    return min(times)


def cache_bytes(model_config, t: int, kv_bytes: int, state_bytes: int, window_bytes: int) -> dict[str, int]:
    """What decoding keeps of one sequence of t tokens, from stage 04's ledger: keys and values grow, state and conv window do not."""
    book = stage("04_model").ledger(model_config)
    return dict(kv=book.kv_values_per_token * kv_bytes * t, state=book.state_values * state_bytes + book.window_values * window_bytes)


def measure_memory(model, lengths: Iterable[int], train_to: int) -> list[dict]:
    """One row a length, training up to train_to. mask: what training needs more with document ids, where stage 04 makes a [t, t] mask, as it does
    for a packed row."""
    rows = []
    for t in lengths:
        one = torch.zeros(1, t, dtype=torch.long)
        seconds, attention = attention_seconds(model, t)
        row = dict(length=t, forward=peak_bytes(lambda t=t: forward_pass(model, t)), seconds=seconds, attention_seconds=attention,
                   cache=sum(cache_bytes(model.config, t, 4, 4, 4).values()))
        if t <= train_to:
            row["training"] = peak_bytes(lambda t=t: training_pass(model, t))
            row["mask"] = peak_bytes(lambda t=t, one=one: training_pass(model, t, one)) - row["training"]
        rows.append(row)
    return rows


MEMORY = {"forward": "forward", "training": "training", "mask": "a document mask adds", "cache": "decode cache"}


def growths(rows: list[dict]) -> dict[str, dict[str, float]]:
    """growth of every column of measure_memory over the lengths that have it, and what t² would give there."""
    found = {}
    for key in MEMORY:
        lengths, amounts = zip(*((row["length"], row[key]) for row in rows if key in row))
        found[key] = dict(growth=growth(lengths, amounts), square=growth(lengths, [t * t for t in lengths]))
    return found


# %% 6 · Figure and command

MODELS = {"before": "#8a8a8a", "after, short only": "#e8a33d", "after, long": "#1f4e8c"}


def print_losses(losses: dict[str, dict[str, Tensor]], edges: list[int], long_seq: int) -> None:
    spans = [f"{lo}-{hi}" + ("*" if hi > long_seq else "") for lo, hi in zip(edges, edges[1:])]
    table = [[f"{name}, {what}", *(f"{x:.3f}" for x in nats.mean(0).tolist())] for name, both in losses.items() for what, nats in both.items()]
    for name, other in (("after, long", "before"), ("after, long", "after, short only")):
        cells = (mean_and_error(column) for column in (losses[name]["whole"] - losses[other]["whole"]).T)
        table.append([f"{name} minus {other}", *(f"{m:+.3f}" + ("" if e is None else f"±{e:.3f}") for m, e in cells)])
    stage("01_nvfp4").print_table(f"nats a token by position, {len(losses['before']['whole'])} held-out long documents (whole: all before a token is "
                                  "seen, window: its own short window; *: beyond every training length; ±: over documents)", ["", *spans], table)


def print_recall(recall: dict[str, dict[str, list[dict]]]) -> None:
    table = []
    for task in ("copy", "needle"):
        for name, tasks in recall.items():
            for row in tasks[task]:
                recalled = f"{row['recalled']:+.3f}" + ("" if row["recalled_error"] is None else f" ± {row['recalled_error']:.3f}")
                table.append([f"{task}, {name}", f"{row['distance']:,}", row["tokens"], f"{row['hits']:.1%}",
                              f"{row['choice']:.1%} ({row['chance']:.1%})", row["nats"], f"{recalled} of {row['chance_nats']:.2f}"])
    stage("01_nvfp4").print_table("recall of what was said before", ["task, model", "distance", "tokens", "hits", "in pool (chance)", "nats",
                                                                      "nats recalled"], table)


def print_memory(rows: list[dict]) -> None:
    table = [[f"{row['length']:,} tokens", *(f"{row[key] / 1e6:.2f}" if key in row else "" for key in MEMORY), f"{1e3 * row['seconds']:.0f}",
              f"{row['attention_seconds'] / row['seconds']:.0%}"] for row in rows]
    table.append(["last slope / first", *(f"{x['growth']:.2f}" for x in growths(rows).values()), "", ""])
    table.append(["  of t² (of t: 1.00)", *(f"{x['square']:.2f}" for x in growths(rows).values()), "", ""])
    stage("01_nvfp4").print_table("peak memory of one row in MB, and time", ["", *MEMORY.values(), "forward, ms", "in attention"], table)


def print_caches(config: Config, model_config) -> list[dict]:
    """Decode caches by length: tiny in fp32, and Ultra with FP8 keys and values, fp32 state and bf16 windows  [Ultra, released precision]."""
    presets, rows = stage("04_model").PRESETS, []
    for name, sizes, each in (("this model", model_config, (4, 4, 4)), ("ultra", presets["ultra"], (1, 4, 2))):
        for t in (config.short_seq, config.long_seq, config.longest, 65_536, 1_048_576):
            rows.append(dict(model=name, length=t, **cache_bytes(sizes, t, *each)))
    stage("01_nvfp4").print_table("decode cache of one sequence in MB", ["", "tokens", "keys and values", "state and windows"],
                                  [[r["model"], f"{r['length']:,}", r["kv"] / 1e6, r["state"] / 1e6] for r in rows])
    return rows


def plot(config: Config, losses: dict, recall: dict, edges: list[int], path: Path) -> None:
    """Left: loss by position. Middle: its change by the phase and by the control. Right: recall against distance."""
    nvfp4 = stage("01_nvfp4")
    fig, (left, middle, right) = nvfp4.new_figure(columns=3, width=6.4, height=4.8)
    places = range(len(edges) - 1)
    for (name, both), width in zip(losses.items(), (1.5, 4, 1.5)):      # wide under narrow: the last two may coincide
        left.plot(places, both["whole"].mean(0), color=MODELS[name], marker=".", linewidth=width, label=name)
        left.plot(places, both["window"].mean(0), ":", color=MODELS[name], linewidth=0.8 * width)
    left.plot([], [], ":", color="0.3", label=f"dotted: sees its window of {config.short_seq} only")
    after, last = losses["after, long"], f"{edges[-2]:,}–{edges[-1]:,}"
    left.set_title(f"All that stands before is worth {(after['window'] - after['whole'])[:, -1].mean():.3f} nats at {last}")
    left.set_ylabel("loss (nats a token)")
    for shift, name in ((-0.06, "after, short only"), (0.06, "after, long")):
        changes = [mean_and_error(column) for column in (losses[name]["whole"] - losses["before"]["whole"]).T]
        middle.errorbar([place + shift for place in places], [m for m, _ in changes], [e or 0 for _, e in changes], color=MODELS[name], marker=".",
                        capsize=3, label=f"{name}, minus before")
    middle.axhline(0, color="0.3", linewidth=1)
    length = (after["whole"] - losses["after, short only"]["whole"])[:, -1].mean()
    middle.set_title(f"Long instead of short steps: {length:+.4f} nats at {last}"); middle.set_ylabel("change of the loss (nats)")
    beyond = next((i for i, hi in enumerate(edges[1:]) if hi > config.long_seq), None)
    for ax in (left, middle):
        if beyond is not None: ax.axvspan(beyond - 0.5, len(edges) - 1.5, color="0.95", label="beyond every training length")
        ax.set_xticks(list(places), [f"{lo:,}–\n{hi:,}" for lo, hi in zip(edges, edges[1:])]); ax.margins(y=0.15)
        ax.set_xlabel("position in the text (tokens)"); ax.legend(frameon=False, fontsize=9)
    for task, style in (("copy", "-"), ("needle", "--")):
        for i, (name, tasks) in enumerate(recall.items()):      # a little apart, so that error bars are seen
            known = [(r["distance"] * 1.06 ** (i - 1), *(100 * (r[key] or 0) / r["chance_nats"] for key in ("recalled", "recalled_error")))
                     for r in tasks[task]]
            right.errorbar(*zip(*known), color=MODELS[name], linestyle=style, marker=".", capsize=3, label=f"{task}, {name}")
    right.axhline(0, color="0.3", linewidth=1)
    right.axvline(config.long_seq, color="0.6", linestyle=":", linewidth=1.5, label="longest training sequence")
    best = max(recall["after, long"]["copy"], key=lambda row: row["recalled"])
    right.set_title(f"Of a string read {best['distance']:,} tokens before, {best['recalled'] / best['chance_nats']:.1%} is recalled")
    right.set_xscale("log", base=2); right.set_xticks(config.distances, [f"{d:,}" for d in config.distances])
    right.margins(y=0.5); right.set_xlabel("tokens of other text in between")
    right.set_ylabel("recalled, % of what there is to know (0: nothing)"); right.legend(frameon=False, fontsize=9, ncols=2)
    nvfp4.save_figure(fig, path)


def rounded(x, digits: int = 5):
    if isinstance(x, dict): return {key: rounded(value, digits) for key, value in x.items()}
    if isinstance(x, (list, tuple)): return [rounded(value, digits) for value in x]
    return round(x, digits) if isinstance(x, float) else x


def write_rows(config: Config, checkpoint: Path, trainers: dict, edges: list[int], losses: dict, recall: dict, memory: list[dict],
               caches: list[dict], found: int, seconds: float) -> None:
    shared = dict(checkpoint=f"{checkpoint.parent.name}/{checkpoint.name}", steps=config.steps, long_seq=config.long_seq, short_seq=config.short_seq,
                  share=config.share, seed=config.seed)
    write = lambda what, **values: stage("01_nvfp4").write_row(config.out, "long_context", what=what, **shared, **rounded(values))
    for name, trainer in trainers.items():
        rows = trainer.rows
        write("phase", model=name, lr=[min(r["lr"] for r in rows), max(r["lr"] for r in rows)], tokens=config.steps * config.batch * config.long_seq,
              long_steps=sum(r["long"] for r in rows), loss=[r["loss"] for r in rows],
              tokens_per_s=statistics.median(r["tokens_per_s"] for r in rows))
    for name, both in losses.items():
        write("loss by position", model=name, edges=edges, documents=len(both["whole"]), **{key: x.mean(0).tolist() for key, x in both.items()},
              whole_by_document=both["whole"].tolist())
    for name, tasks in recall.items():
        for task, rows in tasks.items(): write(task, model=name, rows=rows, prompts=config.prompts, found_in_training=found)
    write("memory", rows=memory, growth=growths(memory), caches=caches, threads=config.threads, seconds=seconds)


def main(config: Config) -> None:
    began = time.perf_counter()
    torch.set_num_threads(config.threads)
    checkpoint, data = starting_point(config)
    tokenizer = data.tokenizer
    long_text = write_long_text(config, tokenizer, config.home / "long_context")
    print(f"from {checkpoint}; long documents: {len(long_text.train.ends)} of {len(long_text.train.tokens):,} tokens to train on, "
          f"{len(long_text.rows_nt)} of {config.longest:,} tokens held out")
    prompts = make_prompts(config, tokenizer, long_text.rows_nt)
    wanted = phrases(tokenizer, prompts)
    if found := found_in_training(tokenizer, data.train | {"long documents": long_text.train}, wanted):
        raise ValueError(f"a test is in the training text ({found[0][0]!r} has {found[0][1]!r}): choose another --seed, or leave that source out.")
    print(f"{len(wanted)} phrases of the tests searched in the training text: none found\n")

    edges, model04 = bucket_edges(config.short_seq, config.longest), stage("04_model")
    trainers = {name: train_phase(config, checkpoint, data, long_text, share, name)
                for name, share in (("after, short only", 0.0), ("after, long", config.share))}
    models = {"before": model04.load_checkpoint(checkpoint), **{name: trainer.model for name, trainer in trainers.items()}}
    losses, recall = {}, {}
    for name, model in models.items():
        model.eval()
        losses[name] = loss_by_position(model, long_text.rows_nt, config.short_seq, edges)
        recall[name] = measure_recall(model, prompts)
    memory = measure_memory(models["before"], config.memory, config.long_seq)

    print_losses(losses, edges, config.long_seq)
    print_recall(recall)
    print_memory(memory)
    caches, figure = print_caches(config, models["before"].config), config.home / "long_context.png"
    plot(config, losses, recall, edges, figure)
    if config.save: print(f"\nmodel after the phase: {trainers['after, long'].save()}")
    seconds = round(time.perf_counter() - began, 1)
    write_rows(config, checkpoint, trainers, edges, losses, recall, memory, caches, len(found), seconds)
    print(f"\nfigure: {figure}   {seconds:.0f} s")


if __name__ == "__main__":
    stage("01_nvfp4").run_command(main, Config, __doc__)
