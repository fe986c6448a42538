"""What rounding an SSM state does to it: constant inputs with a closed form, then the text of a trained model.

A state that is rounded to nearest after every token is biased. Near its stall a slow head adds less than half a step, and is rounded back for ever;
stochastic rounding goes up with the chance that makes the mean right. Rounding less often (a snapshot a window, a replay a flush) moves the stall.

Constant input x and decay a:      s_t = x (1 - a^t) / (1 - a)
fp16 nearest stops at the first    |x - (1 - a) s| <= ulp(s) / 2      (r tokens a rounding: both coefficients of r tokens)
int8 nearest, one scale a row      the largest code is 127 at every token. Entries that grow with it keep the code nearest to 127 times their share,
                                   wrong by at most half a code. Beside a large value an entry stays 0 while it adds less than half a code

Run:     python experiments/ssm_states.py        # 2 to 3 min on 2 cores, after `make run`; the figure and rows in experiments/
         python experiments/ssm_states.py --only constant --rows 1024
Sources: [Ultra] Nemotron 3 Ultra report, inference: Table 16 rounds the states of Super   [Super] its report: fp16 to nearest makes answers longer
Letters: b batch  t time  h heads  p head width  g groups  n state: here one constant input an entry  v vocabulary
"""
from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ("fp32", "fp16", "fp16_sr", "int8", "int8_sr")
WAYS = ("plain", "snapshot", "replay")      # how states are taken back; plain: nothing is drafted


def stage(name: str):
    """A numbered stage, importable from this folder."""
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


@dataclass(frozen=True)
class Config:
    """Measures the bias of rounded states and what it does to generated text."""
    only: Literal["all", "constant", "text"] = "all"
    decay: float = 0.9999           # of the slow head
    steps: int = 10_000             # tokens of constant input
    inputs: int = 64                # constant inputs, over two octaves
    rows: int = 64                  # rows of a state, each with every input: the stochastic formats' mean is over these
    draft: int = 3                  # drafts a window where states are taken back
    base: Path | None = None        # a checkpoint or a run's folder; nothing = the newest in out/boosted, else out/sft
    texts: int = 10                 # texts that the distributions are compared on
    tokens: int = 220               # of each
    questions: int = 16             # held-out questions of each family
    max_tokens: int = 96            # of an answer
    threads: int = 2                # torch threads
    out: Path = ROOT / "experiments"    # results.jsonl gets the rows, ssm_states.png the figure

    def __post_init__(self):
        for name in ("steps", "inputs", "rows", "texts", "tokens", "questions", "max_tokens", "threads"):
            if getattr(self, name) < 1: raise ValueError(f"{name} = {getattr(self, name)} must be at least 1.")
        if not 0 < self.decay < 1: raise ValueError(f"decay = {self.decay} must lie between 0 and 1.")
        if not 1 <= self.draft <= 7: raise ValueError(f"draft = {self.draft} must lie between 1 and 7: two windows have to fit the ring of a replay.")


# %% 1 · Constant inputs

LARGEST = 4.0       # ours: the value that a row holds beside the inputs, as large as the largest steady state


def constant_inputs(n: int, decay: float) -> Tensor:
    """n inputs over two octaves, with steady states from 1 to 4.    64, 0.9999 -> 1e-4, 1.022e-4, .. 3.914e-4"""
    return (2 ** (2 * torch.arange(n, dtype=torch.float64) / n) * (1 - decay)).float()


def kept_of(decay: float) -> float:
    """The decay as a step applies it, in fp32."""
    return torch.tensor(math.log(decay)).exp().item()


def true_state(x_n: Tensor, decay: float, t: int) -> Tensor:
    """x (1 - a^t) / (1 - a), in fp64."""
    a = kept_of(decay)
    return x_n.double() * (1 - a ** t) / (1 - a)


def drive(x_n: Tensor, rows: int, decay: float, steps: int, state_format: str, largest: float | None = None, seed: int = 0) -> Iterator[Tensor]:
    """The states [rows, n] in fp32 after each of `steps` tokens, by stage 02's ssd_step with dt = 1 and an input of 1, so that B is the input.
    largest: every row also holds this value, at its steady state."""
    mamba, n = stage("02_mamba"), len(x_n)
    held = torch.tensor([] if largest is None else [largest])
    B_bgn = torch.cat([x_n, held * (1 - kept_of(decay))])[None, None]
    start = torch.cat([torch.zeros(n), held]).expand(1, 1, rows, -1).contiguous()
    state = mamba.quantize_state(start, state_format, seed)
    x_bhp, dt_bh, A_h = torch.ones(1, 1, rows), torch.ones(1, 1), torch.tensor([math.log(decay)])
    for step in range(1, steps + 1):
        mamba.ssd_step(x_bhp, dt_bh, A_h, B_bgn, B_bgn, state_bhpn=state, state_format=state_format, seed=seed + step)
        yield mamba.dequantize_state(state)[0, 0, :, :n]


def constant_model(x_n: Tensor, decay: float, rows: int):
    """A model of one Mamba layer whose scan reads the same x, dt = 1 and B = 1 at every token, whatever the text says: in_proj is 0, so that the
    biases behind it are all there is. Entry (head, channel) is driven by one input, n times.   inputs must be a multiple of 32."""
    nemotron, heads = stage("04_model"), 16
    model = nemotron.Nemotron(nemotron.ModelConfig(pattern="M", d_model=32, vocab=32, heads=2, kv_heads=1, head_dim=16, mamba_heads=heads,
                                                   mamba_head_dim=len(x_n) // heads, groups=1, state=rows, chunk=8, experts=2, experts_per_token=1,
                                                   latent=16, expert_width=16, shared_width=16))
    layer = model.backbone.layers[0].mixer
    wanted = torch.cat([x_n.double(), torch.ones(2 * rows, dtype=torch.float64)])
    bias = 1.5 * wanted
    for _ in range(50):     # Newton, for silu(bias) = wanted
        s = torch.sigmoid(bias)
        bias -= (bias * s - wanted) / (s * (1 + bias * (1 - s)))
    with torch.no_grad():
        layer.in_proj.weight.zero_(); layer.conv1d.bias.copy_(bias)
        layer.dt_bias.fill_(math.log(math.e - 1)); layer.A_log.fill_(math.log(-math.log(decay)))
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def drive_caches(model, way: str, state_format: str, draft: int, keep: int, tokens: int, seed: int = 0) -> tuple[Tensor, float]:
    """(state [inputs, n - 1] of a slot of stage 08 after at least `tokens` tokens, tokens a rounding) where every window keeps `keep` of draft + 1.
    Each row also holds its steady state, in the entry that is left out here: for int8, a large value beside those that begin at 0."""
    mamba, infer = stage("02_mamba"), stage("08_infer")
    draft, keep, way = (0, 1, "snapshot") if way == "plain" else (draft, keep, way)
    caches = infer.SlotCaches(model, 1, tokens + draft + 1, draft, way, state_format, seed=seed)
    ids_rt, count_r, keep_r = torch.ones(1, draft + 1, dtype=torch.long), torch.tensor([draft + 1]), torch.tensor([keep])
    roundings, pool, flush = 0, caches.mambas[0], caches.flush
    start_hpn = torch.zeros_like(mamba.dequantize_state(pool.state)[0])
    x_c = F.silu(pool.layer.conv1d.bias[:start_hpn[..., 0].numel()])
    start_hpn[..., 0] = x_c.view(start_hpn.shape[:2]) / (1 - torch.exp(-pool.layer.A_log.exp()))[:, None]
    mamba.write_slots(pool.state, start_hpn[None], torch.zeros(1, dtype=torch.long), state_format.removesuffix("_sr"), None)

    def counted(full_b: Tensor) -> None:
        nonlocal roundings
        roundings += int((full_b & (caches.kept_b > 0)).any())
        flush(full_b)

    caches.flush = counted
    while int(caches.length_b[0]) < tokens:
        rows = caches.rows(None, count_r, draft + 1, caches.length_b, "last" if not draft else "none" if caches.replays else "each")
        caches.trunk(ids_rt, rows); caches.commit(rows, keep_r)
        roundings += not caches.replays
    if caches.replays: caches.flush(torch.ones(1, dtype=torch.bool))
    S_hpn = mamba.dequantize_state(pool.state)[int(caches.entry_b[0])]
    return S_hpn[..., 1:].flatten(0, 1), int(caches.length_b[0]) / roundings


def measure_constant(config: Config) -> dict[str, dict]:
    """By format, rounded once a token: the steps looked at (a hundred), the states then, mean over rows and of one row [steps, inputs]; at the last
    of them bias = mean of (state - true) / true, worst = largest of an input, spread = standard deviation of a row, error = of the bias."""
    x_n, every, out = constant_inputs(config.inputs, config.decay), max(1, config.steps // 100), {}
    runs = {"fp32": ("fp32", None), "fp16": ("fp16", None), "fp16_sr": ("fp16_sr", None), "int8": ("int8", None),
            "int8, beside a large value": ("int8", LARGEST), "int8_sr, beside a large value": ("int8_sr", LARGEST)}
    for name, (state_format, largest) in runs.items():
        rows = config.rows if state_format.endswith("_sr") else 1       # the others are all alike
        states = tqdm(drive(x_n, rows, config.decay, config.steps, state_format, largest), name, config.steps, leave=False, unit="token")
        at, mean, first = [], [], []
        for step, S_rn in enumerate(states, 1):
            if step % every: continue
            at.append(step); mean.append(S_rn.double().mean(0)); first.append(S_rn[0].double())
        true_n = true_state(x_n, config.decay, at[-1])
        error_rn = (S_rn.double() - true_n) / true_n
        out[name] = dict(at=at, mean=torch.stack(mean), first=torch.stack(first),
                         bias=error_rn.mean().item(), worst=error_rn.mean(0).abs().max().item(),
                         spread=error_rn.std(0).mean().item() if rows > 1 else None,
                         error=error_rn.mean(1).std().item() / math.sqrt(rows) if rows > 1 else None)
    return out


def measure_rollbacks(config: Config) -> list[dict]:
    """Mean of (state - true) / true over all entries after config.steps tokens in a slot of stage 08, by format and way; all drafts are kept."""
    if config.inputs % 32: raise ValueError(f"inputs = {config.inputs} must be a multiple of 32 to be the channels of a Mamba layer.")
    x_n, rows = constant_inputs(config.inputs, config.decay), []
    model, keep = constant_model(x_n, config.decay, 32), config.draft + 1
    tokens = -(-config.steps // 16) * 16
    true_x = true_state(x_n, config.decay, tokens)[:, None]
    for state_format, way in tqdm([(f, w) for f in FORMATS[1:] for w in WAYS[1:]], "slots of stage 08", leave=False):
        S_xn, tokens_a_rounding = drive_caches(model, way, state_format, config.draft, keep, tokens)
        error_xn = (S_xn.double() - true_x) / true_x
        spread = error_xn.std(1).mean().item() if state_format.endswith("_sr") else None
        rows.append(dict(format=state_format, way=way, tokens_a_rounding=tokens_a_rounding, bias=error_xn.mean().item(), spread=spread,
                         error=spread and spread / math.sqrt(error_xn.numel())))
    return rows


# %% 2 · Text of a trained model

def trained(base: Path | None):
    """(checkpoint folder, model, tokenizer) of base, of the newest checkpoint in base, or of the newest in out/boosted or out/sft."""
    pretrain, nemotron = stage("05_pretrain"), stage("04_model")
    homes = [base] if base else [ROOT / "out" / name for name in ("boosted", "sft")]
    home = next((h for h in homes if h.exists()), None)
    if home is None: raise ValueError("no trained checkpoint in out/boosted or out/sft: run `make run` first, or give a folder with --base.")
    folder = pretrain.newest_checkpoint(home) if pretrain.checkpoints(home) else home
    return folder, nemotron.load_checkpoint(folder).eval().requires_grad_(False), stage("data.tokenizer").Tokenizer.load(folder)


def held_out_questions(each: int) -> list:
    """`each` held-out questions of every family that stage 06 learns and that needs no tool, the easiest level."""
    tasks = stage("data.tasks")
    families = [family for family in tasks.EASY if tasks.ENVIRONMENTS[family].max_turns == 1]
    return [task for family in families for task in tasks.draw(family, 0, each, 0, "held_out", at_most=True)]


class Scored(NamedTuple):
    right: float        # sum of scores, exact answers
    n: int
    tokens: int         # generated, all answers
    answers: list       # of stage 08


def ask(engine, questions: list, mode: str, sampling) -> Scored:
    """Asks an engine of stage 08 all questions, in one mode, and scores the answers as stage 06 does: an answer without an end counts 0."""
    infer, sft, tasks = stage("08_infer"), stage("06_sft"), stage("data.tasks")
    answers = infer.generate_with_budget(engine, [sft.opening(task) for task in questions], mode, sampling)
    text = lambda a: engine.tokenizer.decode(a.ids[:-1] if a.reason == "stop_id" else a.ids)
    right = sum(tasks.ENVIRONMENTS[q.family].score(q, text(a), thinking=mode != "off") for q, a in zip(questions, answers) if a.finished)
    return Scored(right, len(questions), sum(len(a.ids) for a in answers), answers)


@torch.inference_mode()
def forced_logits(model, ids_bt: Tensor, way: str, state_format: str, draft: int, seed: int = 0) -> Iterable[Tensor]:
    """Log-probabilities [b, v] behind each token of a text, read token by token through stage 08's caches. With drafts every window holds one true
    token and rejected ones, so states are taken back at each token."""
    infer = stage("08_infer")
    b, t = ids_bt.shape
    draft = 0 if way == "plain" else draft
    caches = infer.SlotCaches(model, b, t + 1, draft, "snapshot" if way == "plain" else way, state_format, seed=seed)
    count_b, keep_b = torch.full((b,), draft + 1), torch.ones(b, dtype=torch.long)
    wrong_bk = torch.randint(12, model.config.vocab, (t, b, draft), generator=torch.Generator().manual_seed(0))
    for step in range(t):
        rows = caches.rows(None, count_b, draft + 1, caches.length_b, "last" if not draft else "none" if caches.replays else "each")
        h_bwd = caches.trunk(torch.cat([ids_bt[:, step, None], wrong_bk[step]], 1), rows)
        caches.commit(rows, keep_b)
        yield model.lm_head(h_bwd[:, 0]).float().log_softmax(-1)


def write_texts(model, tokenizer, config: Config) -> tuple[Tensor, int]:
    """(ids [texts, t] that the model has written itself, at temperature 1 with fp32 states; length of the prompt)"""
    infer, prompt = stage("08_infer"), tokenizer.encode("Once upon a time there was a")
    engine = infer.Engine(model, config.texts, len(prompt) + config.tokens + 1, tokenizer=tokenizer)
    for i in range(config.texts): engine.submit(prompt, infer.SamplingParams(config.tokens, stop_ids=(), seed=1), place=i)
    answers = engine.run(progress=True)
    return torch.tensor([prompt + answers[i].ids for i in sorted(answers)]), len(prompt)


def measure_text(config: Config) -> tuple[Path, list[dict]]:
    """(checkpoint, a row per format and way): distance to the distributions with fp32 states on the same text, exact answers, bytes of a slot."""
    infer = stage("08_infer")
    folder, model, tokenizer = trained(config.base)
    ids_bt, read = write_texts(model, tokenizer, config)
    questions, rows = held_out_questions(config.questions), []
    sampling = infer.SamplingParams(config.max_tokens, temperature=0.0)
    reference = list(forced_logits(model, ids_bt[:, :-1], "plain", "fp32", 0))[read - 1:]
    for state_format, way in tqdm([(f, w) for f in FORMATS for w in WAYS], "formats", leave=False):
        kl, same, count = 0.0, 0, 0
        for step, logp_bv in enumerate(forced_logits(model, ids_bt[:, :-1], way, state_format, config.draft, seed=7), 1 - read):
            if step < 0: continue
            want_bv = reference[step]
            kl += (want_bv.exp() * (want_bv - logp_bv)).double().sum().item()
            same += (want_bv.argmax(-1) == logp_bv.argmax(-1)).sum().item(); count += len(want_bv)
        draft = 0 if way == "plain" else config.draft
        engine = infer.Engine(model, 32, 256, draft, "snapshot" if way == "plain" else way, state_format, tokenizer=tokenizer, seed=7)
        scored = ask(engine, questions, "regular", sampling)
        if not rows: greedy = [a.ids for a in scored.answers]       # fp32, plain
        size, alike = engine.caches.bytes_per_slot(), sum(a.ids == g for a, g in zip(scored.answers, greedy))
        rows.append(dict(format=state_format, way=way, kl=kl / count, greedy_equal=same / count, compared=count, accuracy=scored.right / scored.n,
                         questions=scored.n, generated=scored.tokens, equal_answers=alike / scored.n,
                         state_bytes=size["state"] + size["kept"], slot_bytes=sum(size.values())))
    return folder, rows


# %% 3 · Tables, figure and command

def print_constant(constant: dict[str, dict], rollbacks: list[dict], config: Config) -> None:
    nvfp4, share = stage("01_nvfp4"), lambda x, digits=2: "-" if x is None else f"{x:.{digits}%}"
    nvfp4.print_table(f"bias after {config.steps:,} tokens of constant input, decay {config.decay}: mean of (state - true) / true over "
                      f"{config.inputs} inputs", ["rounded once a token", "bias", "worst input", "standard error", "one row's spread"],
                      [[name, share(r["bias"]), share(r["worst"]), share(r["error"], 3), share(r["spread"], 1)] for name, r in constant.items()])
    nvfp4.print_table(f"the same in a slot of stage 08, beside a large value, {config.draft} drafts a window, all kept",
                      ["format", "rollback", "tokens a rounding", "bias", "standard error", "one row's spread"],
                      [[r["format"], r["way"], f"{r['tokens_a_rounding']:.1f}", share(r["bias"]), share(r["error"], 3), share(r["spread"], 1)]
                       for r in rollbacks])


def print_text(folder: Path, rows: list[dict]) -> None:
    stage("01_nvfp4").print_table(
        f"{folder.parent.name}/{folder.name}: distributions on {rows[0]['compared']:,} tokens of its own text, answers to "
        f"{rows[0]['questions']} questions",
        ["states", "rollback", "KL to fp32, nats", "greedy token equal", "answers equal", "exact answers", "tokens written", "state kB", "slot kB"],
        [[r["format"], r["way"], f"{r['kl']:.1e}", f"{r['greedy_equal']:.2%}", f"{r['equal_answers']:.1%}", f"{r['accuracy']:.1%}",
          f"{r['generated']:,}", f"{r['state_bytes'] / 1e3:.1f}", f"{r['slot_bytes'] / 1e3:.1f}"] for r in rows])


def plot(constant: dict[str, dict], rollbacks: list[dict], config: Config, path: Path) -> None:
    """Figure: state over its steady state against the step, for every format; bias against how rarely the state is rounded."""
    nvfp4, x_n = stage("01_nvfp4"), constant_inputs(config.inputs, config.decay).double()
    steady_n, colours = x_n / (1 - kept_of(config.decay)), {"fp16": "#c0392b", "fp16_sr": "#1f4e8c", "int8": "#e8a33d", "int8_sr": "#3d8b4f"}
    fig, (left, right) = nvfp4.new_figure(columns=2)
    at = constant["fp32"]["at"]
    share = {name: (r["mean"] / steady_n, r["first"] / steady_n) for name, r in constant.items()}
    nearest_tn = share["fp16"][0]
    left.fill_between(at, nearest_tn.amin(1), nearest_tn.amax(1), color=colours["fp16"], alpha=0.35, linewidth=0,
                      label=f"fp16 nearest: {config.inputs} inputs")
    for name, label, colour in (("fp16_sr", "fp16 stochastic", "fp16_sr"), ("int8_sr, beside a large value", "int8 stochastic", "int8_sr")):
        left.plot(at, share[name][0].mean(1), color=colours[colour], linewidth=2, label=f"{label}: mean of {config.rows * config.inputs:,} rows")
    one = share["int8_sr, beside a large value"][1][:, 0]
    left.plot(at, one, color=colours["int8_sr"], linewidth=0.8, label="int8 stochastic: one row, the smallest input")
    left.plot(at, share["int8, beside a large value"][0].mean(1), color=colours["int8"], linewidth=2, label="int8 nearest, beside a large value")
    left.plot(at, [1 - kept_of(config.decay) ** t for t in at], "k--", linewidth=1.2, label="true (fp32 lies on it)")
    left.set_title("fp16 to nearest stalls; stochastic rounding is right on average")
    left.set_xlabel("token"); left.set_ylabel("state / steady state"); left.set_ylim(-0.04, 1.0)
    left.legend(frameon=False, fontsize=8.5, loc="upper left")
    for name, marker in (("fp16", "o"), ("fp16_sr", "s")):
        points = [(1.0, constant[name]["bias"])] + [(r["tokens_a_rounding"], r["bias"]) for r in rollbacks if r["format"] == name]
        right.plot([p[0] for p in points], [100 * p[1] for p in points], marker=marker, color=colours[name],
                   label={"fp16": "fp16 nearest", "fp16_sr": "fp16 stochastic"}[name])
        if name == "fp16":
            for (x, y), word in zip(points, ("plain decoding", "snapshot", "replay")):
                right.annotate(word, (x, 100 * y), (8, -4), textcoords="offset points", va="top", fontsize=9)
    right.axhline(0, color="0.3", linewidth=1)
    right.set_xscale("log", base=2)
    ticks = sorted({1.0, *(round(r["tokens_a_rounding"], 1) for r in rollbacks)})
    right.set_xticks(ticks, [f"{t:g}" for t in ticks]); right.set_xlim(0.9, 1.6 * ticks[-1])
    right.set_title(f"Fewer roundings, smaller bias ({config.steps:,} tokens)")
    right.set_xlabel("tokens a rounding"); right.set_ylabel("mean of (state − true) / true (%)")
    right.legend(frameon=False, fontsize=9, loc="lower right")
    low, high = right.get_ylim(); right.set_ylim(low - 0.12 * (high - low), high + 0.05 * (high - low))
    nvfp4.save_figure(fig, path)


def main(config: Config) -> None:
    began, nvfp4 = time.perf_counter(), stage("01_nvfp4")
    torch.set_num_threads(config.threads); torch.manual_seed(0)
    shared = dict(threads=config.threads)
    if config.only != "text":
        constant, rollbacks = measure_constant(config), measure_rollbacks(config)
        print_constant(constant, rollbacks, config)
        plot(constant, rollbacks, config, config.out / "ssm_states.png")
        summary = {name: {key: r[key] for key in ("bias", "worst", "error", "spread")} for name, r in constant.items()}
        nvfp4.write_row(config.out, "ssm_states", what="constant inputs", decay=config.decay, steps=config.steps, inputs=config.inputs,
                        rows=config.rows, by_format=summary, draft=config.draft, rollbacks=rollbacks,
                        seconds=round(time.perf_counter() - began, 1), **shared)
        print(f"\nfigure: {config.out / 'ssm_states.png'}   {time.perf_counter() - began:.0f} s")
    if config.only != "constant":
        folder, rows = measure_text(config)
        print_text(folder, rows)
        nvfp4.write_row(config.out, "ssm_states", what="text", base=f"{folder.parent.name}/{folder.name}", draft=config.draft, texts=config.texts,
                        tokens=config.tokens, rows=rows, seconds=round(time.perf_counter() - began, 1), **shared)
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    stage("01_nvfp4").run_command(main, Config, __doc__)
