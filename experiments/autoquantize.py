"""AutoQuantize: which layers may go to 4 bits, found by measuring, under a budget of bits a parameter; and what those bits buy.

Each quantizable linear layer, or stack of experts, takes one format. Its sensitivity to a format is what the model loses when it alone is quantized;
the assignment with the least sum of sensitivities under the budget is found exactly  [Super, quantization; ModelOpt]. Two sensitivities:
    second order   1/2 · sum over tokens and outputs of (dL/dy)² (y_q - y)², nats a token: the diagonal of the Fisher matrix in a layer's outputs,
                   as ModelOpt takes it. One backward pass for all; outputs and not weights, so that rounded inputs count too
    KL             of the bf16 model's next-token distribution to that of the model with one layer quantized, nats a token: one forward pass each
Controls: random assignments of the same budgets, the released Ultra's table, one format for everything. Super was quantized so, at 4.75 bits; Ultra's
table was made by hand after that  [Super; Ultra]. Sensitivities come from one half of the validation conversations, results from the other half and
from held-out questions (06's evaluation). Bits: of weights and scales, over what can be quantized; embedding, output layer and MTP head stay bf16.
NOTE: W4A16 is a little smaller than W4A4 and rounds no inputs, so under a budget of bits alone it always wins; what W4A4 buys is time on FP4 tensor
cores. So one of them is to choose from, W4A4 by default; --formats bf16 fp8 w4a16 asks for a Hopper GPU's assignment.

Run:      python experiments/autoquantize.py           # 4 min, CPU, after `make run` (out/boosted); rows and figure in out/
          python experiments/autoquantize.py --budgets 5 --save out/auto      # and the assignment by KL, as a checkpoint for load_quantized
Sources:  [Ultra] Nemotron 3 Ultra report, arXiv 2606.15007 · [Super] Nemotron 3 Super report · [ModelOpt] NVIDIA Model-Optimizer, autoquantize
Letters:  b batch  t time  r learnt tokens  v vocabulary  c conversations, or questions  u units  f formats  w cells of a budget
"""
from __future__ import annotations

import functools
import importlib
import itertools
import math
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


def stage(name: str):
    """A numbered stage, importable from this folder."""
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


nvfp4, moe, nemotron, pretrain, sft, infer, tasks, tokenizers = (stage(name) for name in (
    "01_nvfp4", "03_latentmoe", "04_model", "05_pretrain", "06_sft", "08_infer", "data.tasks", "data.tokenizer"))

Assignment = tuple[str, ...]                    # a format for every unit, in their order
Sums = dict[str, tuple[Tensor, Tensor]]         # by measure: (sum, weight) of every conversation or question, float64 [c]
Curves = dict[str, list[tuple[float, list[Sums]]]]      # by the way of choosing: (bits, one Sums a seed) in the order of the budgets


@dataclass(frozen=True)
class Config:
    """Assigns a format to every layer under budgets of bits, and compares with random assignments, the released table and single formats."""
    base: Path = ROOT / "out" / "boosted"     # a checkpoint, or a run's folder: then its newest one
    budgets: tuple[float, ...] = (4.75, 5.0, 5.5, 11.0)      # bits a parameter; 4.75 is Super's. Those of Ultra's table and of FP8 join them
    formats: tuple[Literal["bf16", "fp8", "nvfp4", "w4a16"], ...] = ("bf16", "fp8", "nvfp4")      # to choose from
    scale_rule: Literal["max", "mse", "four_over_six"] = "four_over_six"      # of 4-bit weights  [Ultra]
    seeds: int = 3                  # random assignments a budget
    conversations: int = 32         # in each half, at most, ours: Super 512 samples
    families: tuple[str, ...] = ("count_bits", "calendar_arithmetic")      # held-out questions, ours: the two that make run's model answers best
    questions: int = 24             # a family
    max_tokens: int = 96            # of an answer, as in stage 06
    tokens: int = 16_384            # of training conversations that fix the scales of inputs, as in stage 08
    threads: int = 1                # torch threads
    save: Path | None = None        # folder for the assignment by KL under the first budget, in ModelOpt's layout
    out: Path = ROOT / "out"        # the figure, and results.jsonl gets the row

    def __post_init__(self):
        for name in ("seeds", "conversations", "questions", "max_tokens", "tokens", "threads"):
            if getattr(self, name) < 1: raise ValueError(f"{name} = {getattr(self, name)} must be at least 1.")
        if not self.budgets or "bf16" not in self.formats or len(set(self.formats)) < 2:
            raise ValueError("give at least one budget, and as formats bf16 and another one to choose from.")


# %% 1 · Units, and a model that mixes formats

class Unit(NamedTuple):
    """Layers that take one format together: servers fuse q, k and v into one product, and the experts of a layer into another  [ModelOpt]."""
    name: str
    modules: tuple[str, ...]
    tensors: dict[str, Tensor]     # by released name
    bits: dict[str, int]           # by format, scales included


def recipe_for(units: Sequence[Unit], assignment: Assignment, scale_rule: str = "four_over_six"):
    """The Recipe that stores these units in these formats, and the rest in bf16."""
    named = tuple((f"{module}.*", fmt, unit.name) for unit, fmt in zip(units, assignment) for module in unit.modules)
    return infer.Recipe(scale_rule, precision=(*named, ("*", "bf16", "the rest")))


def find_units(model) -> list[Unit]:
    """All of the trunk that quantize_weight takes, in order."""
    groups, released, units = {}, dict(nemotron.released_tensors(model)), []
    for name, module in model.backbone.named_modules(prefix="backbone"):
        if isinstance(module, (nn.Linear, moe.Experts)): groups.setdefault(re.sub(r"\.[qkv]_proj$", ".qkv_proj", name), []).append(name)
    for name, modules in groups.items():
        units.append(unit := Unit(name, tuple(modules), {k: x for k, x in released.items() if k.startswith(tuple(f"{m}." for m in modules))}, {}))
        for fmt in infer.ALGORITHMS:
            unit.bits[fmt] = round(sum(share["bits"] for share in infer.count_bits(unit.tensors.items(), recipe_for([unit], (fmt,))).values()))
    return units


def elements(units: list[Unit]) -> int: return sum(tensor.numel() for unit in units for tensor in unit.tensors.values())


def load_rounded(directory: Path):
    """The checkpoint with its values rounded to bf16, computed in fp32: what the formats are compared with."""
    model = nemotron.load_checkpoint(directory, dtype=torch.float32).eval()
    for name, p in model.named_parameters():
        if not name.endswith(nemotron.FP32): p.data = p.data.bfloat16().float()
    return model


class Mixer:
    """One model whose units change formats. Each format's layers come out of a checkpoint that stage 08 has written and read."""
    def __init__(self, directory: Path, units: list[Unit], formats: Sequence[str], amax: dict[str, float], scale_rule: str = "four_over_six"):
        self.units, self.model, self.versions = units, load_rounded(directory), {"bf16": load_rounded(directory)}
        for fmt in set(formats) - {"bf16"}:
            with tempfile.TemporaryDirectory() as folder:
                infer.quantize_checkpoint(directory, recipe_for(units, (fmt,) * len(units), scale_rule), Path(folder) / fmt, amax)
                self.versions[fmt] = infer.load_quantized(Path(folder) / fmt, dtype=torch.float32).eval()

    def set(self, assignment: Assignment):
        """The model in this assignment, until the next call."""
        for unit, fmt in zip(self.units, assignment):
            for name in unit.modules: self.model.set_submodule(name, self.versions[fmt].get_submodule(name))
        return self.model


# %% 2 · What a model says, by conversation

@torch.no_grad()
def log_probabilities(model, pack) -> Tensor:
    """[r, v] at the learnt tokens of a pack."""
    return model.lm_head(model.hidden(pack.ids_bt, pack.doc_bt)[pack.mask_bt]).log_softmax(-1)


def read(model, packs: list, reference: list[Tensor]) -> Sums:
    """loss and kl of every conversation. reference: the bf16 model's log_probabilities, pack by pack.
    KL(p || q) = sum p (e^d - 1 - d) with d = log q - log p: no term is negative, so that small ones do not cancel."""
    sums = []
    for pack, logp_rv in zip(packs, reference):
        logq_rv = log_probabilities(model, pack)
        loss_r, d_rv = -logq_rv.gather(1, pack.labels_bt[pack.mask_bt][:, None])[:, 0], logq_rv - logp_rv
        values_3r = torch.stack([loss_r, (logp_rv.exp() * (d_rv.expm1() - d_rv)).sum(-1), torch.ones_like(loss_r)]).double()
        which_r = (pack.doc_bt + pack.doc_bt.shape[1] * torch.arange(len(pack.doc_bt))[:, None])[pack.mask_bt].unique(return_inverse=True)[1]
        sums.append(values_3r.new_zeros(3, int(which_r.max()) + 1).index_add_(1, which_r, values_3r))
    loss_c, kl_c, tokens_c = torch.cat(sums, 1)
    return dict(loss=(loss_c, tokens_c), kl=(kl_c, tokens_c))


def mean(found: Sequence[Sums], what: str) -> float: return float(np.mean([(sums[what][0].sum() / sums[what][1].sum()).item() for sums in found]))


def halves(tokenizer, conversations: int) -> list[list]:
    """Packs of validation conversations, one a question: every other one of each source for the sensitivities, the others for the results."""
    settings, groups, out = sft.SFTConfig(tokens=400 * conversations), {}, []      # tokens: some questions more than are taken
    for sample in {s.prompt: s for s in sft.build_samples(settings, tokenizer, "validation")}.values():
        groups.setdefault(sample.source, []).append(sample)
    for i in range(2):
        samples = sft.round_robin(group[i::2] for group in groups.values())[:conversations]
        rows = sft.pack_best_fit([len(s.ids) for s in samples], settings.pack[0])
        out.append([sft.pack_batch([[samples[j] for j in row]], settings.pack[0]) for row in rows])
    return out


# %% 3 · Sensitivities, [u, f] in nats a token

def second_order(mixer: Mixer, packs: list, formats: Sequence[str]) -> np.ndarray:
    """The loss is summed over a pack, so that a gradient belongs to its token; the result is divided by the tokens once."""
    model, out_uf, seen = mixer.set(("bf16",) * len(mixer.units)), np.zeros((len(mixer.units), len(formats))), []
    hooks = [model.get_submodule(name).register_forward_hook(lambda module, args, y, u=u, name=name: seen.append((u, name, args, y)))
             for u, unit in enumerate(mixer.units) for name in unit.modules]
    for pack in tqdm(packs, desc="second order", leave=False):
        total = nemotron.loss(model, *pack, mtp_weight=0.0, aux_weight=0.0).main * pack.mask_bt.sum()
        gradients = torch.autograd.grad(total, [y for *_, y in seen])
        with torch.no_grad():
            for ((u, name, args, y), gradient), (f, fmt) in itertools.product(zip(seen, gradients), enumerate(formats)):
                error = mixer.versions[fmt].get_submodule(name)(*args) - y if fmt != "bf16" else torch.zeros(())
                out_uf[u, f] += (gradient * error).square().sum(dtype=torch.float64).item() / 2
        seen.clear()
    for hook in hooks: hook.remove()
    return out_uf / sum(int(pack.mask_bt.sum()) for pack in packs)


def measured_kl(mixer: Mixer, packs: list, reference: list[Tensor], formats: Sequence[str]) -> np.ndarray:
    plain, out_uf = ("bf16",) * len(mixer.units), np.zeros((len(mixer.units), len(formats)))
    for u, (f, fmt) in tqdm(list(itertools.product(range(len(plain)), enumerate(formats))), desc="KL, one unit at a time", leave=False):
        if fmt != "bf16": out_uf[u, f] = mean([read(mixer.set((*plain[:u], fmt, *plain[u + 1:])), packs, reference)], "kl")
    return out_uf


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank.   1 2 3 with 1 4 9 -> 1,  with 9 4 1 -> -1"""
    rank = lambda z: np.searchsorted(np.sort(z), z, "left") + np.searchsorted(np.sort(z), z, "right")
    return float(np.corrcoef(rank(np.asarray(x)), rank(np.asarray(y)))[0, 1])


# %% 4 · Choosing under a budget
# best[w] is the least sum of sensitivities for the units so far with at most w cells more than the cheapest choice; a cell is the greatest common
# divisor of all cost differences, so that nothing is rounded and the result is exact.

def knapsack(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budgets: Sequence[float]) -> list[tuple[int, ...]]:
    """For each budget the option of every unit. ValueError for a budget below the cheapest choice and for a loss that is no number.

    costs (1 2) (1 3), losses (6 0) (8 0):  budget 3 -> (1, 0), budget 4 -> (0, 1), budget 5 -> (1, 1)
    """
    if not all(math.isfinite(x) for row in losses for x in row): raise ValueError("a sensitivity is NaN or infinite: take another checkpoint.")
    cheapest, extra = sum(map(min, costs)), [[cost - min(row) for cost in row] for row in costs]
    if min(budgets) < cheapest: raise ValueError(f"a budget of {min(budgets):,.0f} bits is below the cheapest choice, {cheapest:,}: raise it.")
    cell, most = math.gcd(*(x for row in extra for x in row)) or 1, sum(map(max, extra))
    width_of = lambda budget: int(min(budget - cheapest, most) // cell) + 1
    best_w, chosen, out = np.zeros(width_of(max(budgets))), [], []
    for row, loss in zip(extra, losses):
        new_w, option_w = np.full(len(best_w), np.inf), np.zeros(len(best_w), np.uint8)
        for option in sorted(range(len(row)), key=row.__getitem__):      # the cheaper of equals comes first and stays
            at = row[option] // cell
            sum_w = best_w[:max(len(best_w) - at, 0)] + loss[option]
            better_w = sum_w < new_w[at:]
            new_w[at:][better_w], option_w[at:][better_w] = sum_w[better_w], option
        best_w = new_w; chosen.append(option_w)
    for budget in budgets:
        w, options = width_of(budget) - 1, []
        for row, option_w in zip(reversed(extra), reversed(chosen)):
            options.insert(0, int(option_w[w])); w -= row[options[0]] // cell
        out.append(tuple(options))
    return out


def choose(units: list[Unit], formats: Sequence[str], loss_uf: np.ndarray, budgets: Sequence[float]) -> list[Assignment]:      # bits a parameter
    picked = knapsack([[unit.bits[fmt] for fmt in formats] for unit in units], loss_uf.tolist(), [elements(units) * b + 1e-3 for b in budgets])
    return [tuple(formats[f] for f in options) for options in picked]


def random_assignment(units: list[Unit], formats: Sequence[str], budget: float, rng: np.random.Generator) -> Assignment:
    """From the cheapest choice on, a random unit takes a random dearer format that still fits, until none does."""
    now = [min(formats, key=unit.bits.__getitem__) for unit in units]
    room = budget * elements(units) + 1e-3 - sum(unit.bits[fmt] for unit, fmt in zip(units, now))
    more = lambda u, fmt: units[u].bits[fmt] - units[u].bits[now[u]]
    while steps := [(u, fmt) for u in range(len(units)) for fmt in formats if 0 < more(u, fmt) <= room]:
        u, fmt = steps[rng.integers(len(steps))]
        room -= more(u, fmt); now[u] = fmt
    return tuple(now)


# %% 5 · Measurements with their noise

def difference(ours: Sequence[Sums], others: Sequence[Sums], what: str, draws: int = 2000) -> tuple[float, float, float]:
    """(mean of ours minus mean of the others, its 95 % interval), by drawing the same conversations or questions again for all."""
    middle = lambda found: sum(sums[what][0] for sums in found) / len(found)
    delta_c, n_c = middle(ours) - middle(others), ours[0][what][1]
    counts = torch.from_numpy(np.random.default_rng(0).multinomial(len(n_c), np.full(len(n_c), 1 / len(n_c)), draws)).double()
    low, high = ((counts @ delta_c) / (counts @ n_c)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return (delta_c.sum() / n_c.sum()).item(), low, high


class Bench:
    """The checkpoint in every format, and what to measure it with; no assignment is measured twice."""
    def __init__(self, config: Config):
        self.base = pretrain.newest_checkpoint(config.base) if pretrain.checkpoints(config.base) else config.base
        infer.read_config(self.base, quantized=False)
        self.config, self.tokenizer, model = config, tokenizers.Tokenizer.load(self.base), load_rounded(self.base)
        self.units, self.amax = find_units(model), infer.calibrate(model, infer.calibration_batches(self.tokenizer, config.tokens))
        choose(self.units, config.formats, np.zeros((len(self.units), len(config.formats))), config.budgets)     # one too small?
        self.mixer = Mixer(self.base, self.units, {*config.formats, "fp8", "nvfp4", "w4a16"}, self.amax, config.scale_rule)
        self.packs = halves(self.tokenizer, config.conversations)
        self.reference = [[log_probabilities(model, pack) for pack in packs] for packs in self.packs]
        self.questions = [tasks.draw(family, 0, config.questions, 0, "held_out", at_most=True) for family in config.families]
        self.measure = functools.cache(lambda assignment: self.measure_model(self.mixer.set(assignment)))

    def measure_model(self, model) -> Sums:
        """loss and kl of the second half, and exact: the score of every held-out question."""
        answers = [a for group in self.questions for a in sft.play(model, self.tokenizer, group, "regular", self.config.max_tokens)]
        scores_c = torch.tensor([a.score for a in answers], dtype=torch.float64)
        return read(model, self.packs[1], self.reference[1]) | dict(exact=(scores_c, torch.ones_like(scores_c)))

    def bits(self, assignment: Assignment) -> float:      # a parameter that can be quantized
        return sum(unit.bits[fmt] for unit, fmt in zip(self.units, assignment)) / elements(self.units)


def measure_curves(bench: Bench, loss_uf: dict[str, np.ndarray]) -> tuple[Curves, dict[str, list[float]]]:
    """AutoQuantize, random assignments, Ultra's table, single formats, NVFP4 by each scale rule. And how a sensitivity's sum foretells the KL of the
    random assignments: [rank correlation, factor by which it is wrong, as a geometric mean]."""
    config, units, rng = bench.config, bench.units, np.random.default_rng(0)
    single = {f"all {fmt}": [[(fmt,) * len(units)]] for fmt in infer.ALGORITHMS}
    single["Ultra's table"] = [[tuple(infer.Recipe().format_of(next(iter(unit.tensors)))[0] for unit in units)]]
    budgets = sorted({*config.budgets, *(bench.bits(single[kind][0][0]) for kind in ("Ultra's table", "all fp8"))})
    chosen = {f"by {kind}": [[a] for a in choose(units, config.formats, x_uf, budgets)] for kind, x_uf in loss_uf.items()}
    chosen["random"] = [[random_assignment(units, config.formats, b, rng) for _ in range(config.seeds)] for b in budgets]
    curves = {kind: [] for kind in chosen | single}
    for kind, group in tqdm([(kind, group) for kind, groups in (chosen | single).items() for group in groups], desc="assignments", leave=False):
        curves[kind].append((float(np.mean([bench.bits(a) for a in group])), [bench.measure(a) for a in group]))
    for rule in ("max", "mse", "four_over_six"):
        mixer = Mixer(bench.base, units, ("nvfp4",), bench.amax, rule)
        curves[f"all nvfp4, {rule}"] = [(curves["all nvfp4"][0][0], [bench.measure_model(mixer.set(("nvfp4",) * len(units)))])]
    at = [[config.formats.index(fmt) for fmt in a] for group in chosen["random"] for a in group]
    found = np.array([mean([sums], "kl") for _, group in curves["random"] for sums in group])
    sums = {kind: np.array([x_uf[range(len(units)), options].sum() for options in at]) for kind, x_uf in loss_uf.items()}
    apart = lambda x: float(np.exp(np.abs(np.log((x + 1e-12) / (found + 1e-12))).mean()))
    return curves, {kind: [round(spearman(x, found), 3), round(apart(x), 3)] for kind, x in sums.items()}


def show(curves: Curves) -> None:
    signed = lambda delta, unit: "{:+.3f} ({:+.3f} to {:+.3f})".format(*(unit * x for x in delta))
    bf16, rows, less, rules = curves["all bf16"][0][1], [], [], {f"all nvfp4, {rule}": curves["all nvfp4, max"] for rule in ("mse", "four_over_six")}
    others = dict.fromkeys(curves) | {"by KL": curves["random"], "by second order": curves["by KL"]} | rules
    for kind, points in curves.items():
        for i, (bits, found) in enumerate(points):
            kl, exact = others[kind] and difference(found, others[kind][i][1], "kl"), difference(found, bf16, "exact")
            if kind == "by KL": less.append(kl[2] < 0)
            rows.append([kind, bits, f"{1e4 * mean(found, 'kl'):.3f}", signed(kl, 1e4) if kl else "", signed(difference(found, bf16, "loss"), 1e4),
                         f"{mean(found, 'exact'):.0%}", signed(exact, 100)])
    nvfp4.print_table("KL and loss in 1e-4 nats a token, exact answers in %; 95 % intervals from conversations or questions drawn again\n"
                      "KL less another's: by KL less random's, by second order less by KL, by scale rule less that of max",
                      ["assignment", "bits", "KL", "less another's", "loss less bf16's", "exact", "less bf16's"], rows)
    print(f"\nAutoQuantize by KL is closer to bf16 than random assignments, beyond noise, at {sum(less)} of {len(less)} budgets")


def plot(curves: Curves, path: Path) -> None:
    fig, axes = nvfp4.new_figure(columns=3, width=4.3, height=3.5)
    looks = {"random": ("-", "0.5"), "by KL": (".-", "#1f4e8c"), "by second order": (".-", "#e8a33d"), "Ultra's table": ("D", "#a03c2d"),
             "all fp8": ("s", "#a03c2d"), "all nvfp4": ("o", "#a03c2d"), "all w4a16": ("^", "#a03c2d")}
    titles = {"kl": "KL to bf16, nats a token", "loss": "loss minus bf16's, nats a token", "exact": "share of exact answers minus bf16's"}
    for ax, (what, title) in zip(axes, titles.items()):
        for kind, (line, colour) in looks.items():
            bits = [bits for bits, _ in curves[kind]]      # ends: [budget, seed, (value, low, high)]
            ends = np.array([[difference([x], curves["all bf16"][0][1], what) for x in found] for _, found in curves[kind]])
            ax.plot(bits, ends[..., 0].mean(1), line, color=colour, markersize=6, label=kind)
            if kind == "random": ax.fill_between(bits, ends[..., 0].min(1), ends[..., 0].max(1), color="0.88")
            if kind == "by KL": ax.errorbar(bits, ends[:, 0, 0], np.abs(ends[:, 0, 1:] - ends[:, 0, :1]).T, fmt="none", color=colour, linewidth=0.8)
        ax.set(xlabel="bits a parameter, scales included", title=title)
    axes[0].set_yscale("log"); axes[0].legend(frameon=False, fontsize=8)
    nvfp4.save_figure(fig, path)


# %% 6 · Command

def main(config: Config) -> None:
    began, formats = time.perf_counter(), config.formats
    nvfp4.writable_folder(config.out); torch.set_num_threads(config.threads)
    bench = Bench(config)
    loss_uf = {"KL": measured_kl(bench.mixer, bench.packs[0], bench.reference[0], formats),
               "second order": second_order(bench.mixer, bench.packs[0], formats)}
    low = formats.index(min(formats, key=bench.units[0].bits.get))
    layers = {unit.name.removeprefix("backbone."): [float(f"{x_uf[u, low]:.2e}") for x_uf in loss_uf.values()] for u, unit in enumerate(bench.units)}
    nvfp4.print_table(f"sensitivity to {formats[low]}, nats a token", ["layer", *loss_uf], [[k, *map(str, v)] for k, v in layers.items()])
    print(f"rank correlation of the two {(agree := round(spearman(*(x_uf[:, low] for x_uf in loss_uf.values())), 3))}")
    curves, foresight = measure_curves(bench, loss_uf)
    show(curves)
    for kind, (rank, factor) in foresight.items(): print(f"sums by {kind}, and KL of random assignments: rank correlation {rank}, {factor} x apart")
    if config.save:
        (assignment,) = choose(bench.units, formats, loss_uf["KL"], config.budgets[:1])
        shares = infer.quantize_checkpoint(bench.base, recipe_for(bench.units, assignment, config.scale_rule), config.save, bench.amax)
        print(f"{config.save}: {bench.bits(assignment):.3f} bits as above, {infer.bits_per_element(shares):.3f} with what stays in bf16")
    plot(curves, config.out / "autoquantize.png")
    short = lambda found: {what: float(f"{mean(found, what):.5g}") for what in ("loss", "kl", "exact")}
    nvfp4.write_row(config.out, "autoquantize", base="/".join(bench.base.parts[-2:]), formats=formats, scale_rule=config.scale_rule,
                    curves={kind: [dict(bits=round(bits, 4), **short(found)) for bits, found in points] for kind, points in curves.items()},
                    agree=agree, foresight=foresight, sensitivity=layers, seeds=config.seeds, seconds=round(time.perf_counter() - began, 1))
    print(f"figure: {config.out / 'autoquantize.png'}   {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    nvfp4.run_command(main, Config, __doc__)
