"""The pipeline's measurement: intervals and verdicts worked by hand, the objective and the controls written for it, and a whole small run."""
import importlib
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import corpus, tasks

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
experiment = importlib.import_module("posttrain")
nvfp4, nemotron, sft, rl = (importlib.import_module(name) for name in ("01_nvfp4", "04_model", "06_sft", "07_rlvr_mopd"))
MICRO = nemotron.ModelConfig(pattern="MEM*E", d_model=32, vocab=320, heads=2, kv_heads=1, head_dim=16, mamba_heads=16, mamba_head_dim=2, groups=1,
                             state=8, chunk=16, experts=4, experts_per_token=2, latent=16, expert_width=16, shared_width=16)


def make(config=MICRO, seed=0, dtype=torch.float32):
    """A model whose every matrix matters: at the default init its layers hardly speak."""
    torch.manual_seed(seed)
    model = nemotron.Nemotron(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1: p.normal_(0, 1 / math.sqrt(p.shape[-1]))
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return sft.Tokenizer.train(itertools.islice(corpus.stories_and_facts(0), 40), 320)


# ---- intervals and verdicts

def test_the_interval_of_four_questions_is_that_of_all_their_draws():
    """Differences 1 1 0 0 in some order: of the 4^4 draws the mean has the binomial distribution of 4 halves, so its 2.5 % and 97.5 % quantiles are
    0 and 1 (0 has weight 1/16). An interval over something else than the questions would not reach them."""
    mean, low, high = experiment.paired([np.array([1, 1, 1, 0])], [np.array([0, 0, 1, 0])])
    assert (mean, low, high) == (0.5, 0.0, 1.0)


def test_the_interval_is_that_of_theory_for_many_questions():
    """Of n independent differences the mean's standard error is their deviation / sqrt(n); the bootstrap's quantiles lie 1.96 of them away."""
    rng = np.random.default_rng(1)
    a, b = rng.random(3000) < 0.7, rng.random(3000) < 0.5
    mean, low, high = experiment.paired([a], [b])
    error = (a.astype(float) - b).std() / math.sqrt(3000)
    assert mean == pytest.approx(a.mean() - b.mean())
    # the quantile of 4,000 draws has a standard error of some 4 % of an error
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error) and high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)


def test_seeds_are_averaged_before_questions_are_drawn():
    """Two seeds that differ on the same questions in opposite directions leave nothing to draw: intervals by seed, pooled, would be wide."""
    x, y = np.array([1, 0, 1, 0, 1, 0]), np.array([0, 1, 0, 1, 0, 1])
    assert experiment.paired([x, y], [y, x]) == (0.0, 0.0, 0.0)
    mean, low, high = experiment.paired([x], [y])
    assert mean == 0 and low < -0.5 and high > 0.5


def test_pairing_takes_out_what_both_share():
    """Checkpoints that fail on the same questions: unpaired, the interval would be that of two coins."""
    hard = np.arange(1000) % 2 == 0
    better = hard.copy()
    better[1:100:2] = True
    mean, low, high = experiment.paired([better], [hard])
    assert mean == pytest.approx(0.05) and 0.03 < low < high < 0.07


@pytest.mark.parametrize("low, high, aim, side, said", [
    (2.0, 5.0, 1.0, "above", "holds"), (2.0, 5.0, 6.0, "above", "does not hold"), (2.0, 5.0, 3.0, "above", "too small to tell"),
    (0.0, 0.0, 0.0, "above", "does not hold"), (0.1, 2.0, 0.0, "above", "holds"), (-4.0, -2.0, -3.0, "above", "too small to tell"),
    (-2.9, 0.0, -3.0, "above", "holds"), (-9.0, -3.1, -3.0, "above", "does not hold"),
    (-1.0, 0.9, 1.0, "below", "holds"), (-1.0, 1.1, 1.0, "below", "too small to tell"), (1.2, 3.0, 1.0, "below", "does not hold"),
    (0.4, 0.5, 0.6, "below", "holds"), (0.6, 0.7, 0.6, "below", "does not hold"), (None, None, 0.6, "above", "no interval"),
    (1.0, 2.0, None, "above", "no aim")])
def test_a_verdict_is_what_the_interval_says(low, high, aim, side, said):
    """A mean beyond the aim proves nothing while the interval reaches across it; equal checkpoints are not better."""
    assert experiment.verdict(low, high, aim, side) == said


def test_bits_survive_their_text():
    """Nine bits are two bytes; reading all sixteen would add seven wrong answers."""
    bits = np.array([1, 0, 1, 1, 0, 0, 0, 1, 1], dtype=bool)
    assert experiment.as_hex(bits) == "b180" and experiment.from_hex("b180", 9).tolist() == bits.tolist()
    assert experiment.from_hex(experiment.as_hex(np.zeros(0, bool)), 0).tolist() == []


# ---- full-vocabulary KL

def rows_for(mask, ids, teacher_of):
    doc = torch.zeros_like(ids[:, :-1])
    more = dict(teacher_of=torch.tensor(teacher_of)[:, None].expand(-1, ids.shape[1] - 1))
    none = torch.zeros(mask.shape, dtype=torch.float64)
    return rl.Rows(ids[:, :-1], ids[:, 1:], doc, mask, none, none, mask.sum().double(), more)


def test_the_kl_of_two_words_is_worked_by_hand():
    """p 1/2 1/2 and q 1/4 3/4: ln 2 / 2 + ln(2/3) / 2. The other direction gives 0.1308."""
    half, quarter = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert experiment.full_kl(half, quarter).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)
    assert experiment.full_kl(half, half).item() == 0


def test_the_objective_is_the_enumerated_kl_and_so_is_its_gradient():
    """Every learnt token, every word of the vocabulary, each row against its own teacher, in float64; the gradient is that of this plain sum."""
    small = nemotron.ModelConfig(**{**MICRO.__dict__, "vocab": 32})
    student, *teachers = (make(small, seed, torch.float64) for seed in range(3))
    ids = torch.randint(32, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]], dtype=torch.bool)
    rows = rows_for(mask, ids, [1, 0, 1])
    loss = experiment.full_kl_objective([t.eval() for t in teachers])(student, rows)
    loss.total.backward()
    mine = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    student.zero_grad()
    total = 0.0
    for r, t in mask.nonzero().tolist():
        p = torch.softmax(student.lm_head(student.hidden(ids[r:r + 1, :-1]))[0, t], -1)
        q = torch.softmax(teachers[[1, 0, 1][r]].lm_head(teachers[[1, 0, 1][r]].hidden(ids[r:r + 1, :-1]))[0, t], -1).detach()
        for v in range(32): total = total + p[v] * (p[v].log() - q[v].log()) / int(mask.sum())
    total.backward()
    assert loss.total.item() == pytest.approx(total.item(), abs=1e-12)
    assert loss.sums["kl"].item() / int(mask.sum()) == pytest.approx(total.item(), abs=1e-12)
    assert mine and all(torch.allclose(g, dict(student.named_parameters())[name].grad, atol=1e-10) for name, g in mine.items())
    assert all(p.grad is None for t in teachers for p in t.parameters())


def test_a_teacher_equal_to_the_student_teaches_nothing():
    """Loss 0 and gradient 0; with the halves of the objective exchanged the gradient would not vanish on single draws."""
    small = nemotron.ModelConfig(**{**MICRO.__dict__, "vocab": 32})
    student, teacher = make(small, 0, torch.float64), make(small, 0, torch.float64)
    ids = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(0))
    loss = experiment.full_kl_objective([teacher.eval()])(student, rows_for(torch.ones(2, 5, dtype=torch.bool), ids, [0, 0])).total
    loss.backward()
    assert abs(loss.item()) < 1e-12 and max(p.grad.abs().max().item() for p in student.parameters() if p.grad is not None) < 1e-12


# ---- cut traces

class Script:
    """Stands in for stage 04's generate: a fixed answer to every prompt, and a fixed one behind a prompt that ends with </think>."""
    def __init__(self, answers, behind=(7, 11)): self.answers, self.behind, self.seen = answers, list(behind), []

    def __call__(self, model, prompts, sampling):
        self.seen.append((prompts, sampling))
        found = [self.behind if prompt[-1] == sft.END_THINK else self.answers[prompt[0]] for prompt in prompts]
        return [nemotron.Completion(ids[:sampling.max_tokens], [], ids[:sampling.max_tokens][-1] == 11) for ids in found]


def test_a_trace_is_cut_behind_exactly_n_tokens(monkeypatch):
    """Traces of 2, 3 and 4 tokens at a budget of 3: only the last is cut. One token early or late changes who is cut, and where."""
    end = sft.END_THINK
    script = Script({1: [50, 51, end, 9, 11], 2: [60, 61, 62, end, 9, 11], 3: [70, 71, 72, 73, end, 9, 11]})
    monkeypatch.setattr(experiment.nemotron, "generate", script)
    sampling = nemotron.SamplingParams(max_tokens=10)
    short, exact, cut = experiment.InPieces(8, 3)(None, [[1], [2, 2], [3, 3, 3]], sampling)
    assert short.ids == script.answers[1] and exact.ids == script.answers[2]
    assert cut.ids == [70, 71, 72, end, 7, 11] and cut.finished and len(cut.logprobs) == 6
    prompts, used = script.seen[1]
    assert prompts == [[3, 3, 3, 70, 71, 72, end]] and used.max_tokens == 10 - 3 - 1 and used.temperature == 0
    nothing = experiment.InPieces(8, 0)(None, [[1]], sampling)[0]
    assert nothing.ids == [end, 7, 11]


def test_an_answer_without_end_of_thought_is_cut_as_well(monkeypatch):
    """A client does not wait for </think>: a trace that runs on to the limit, or stops early without it, is cut when it is longer than the budget."""
    monkeypatch.setattr(experiment.nemotron, "generate", Script({1: [50] * 9, 2: [51, 52, 11]}))
    long, short = experiment.InPieces(8, 4)(None, [[1], [2]], nemotron.SamplingParams(max_tokens=9))
    assert long.ids == [50] * 4 + [sft.END_THINK, 7, 11] and short.ids == [51, 52, 11]


def test_a_cut_answer_is_scored_by_what_stands_behind_the_cut(tokenizer, monkeypatch):
    """The right answer behind the inserted </think> counts, the one that the whole trace would have led to does not; and tokens are those written."""
    task = tasks.draw("gcd", 0, 1, 0)[0]
    right, wrong = tokenizer.encode(task.answer) + [11], tokenizer.encode(task.answer + "1") + [11]
    trace = [t for t in tokenizer.encode("one two three four five six seven eight") if t != sft.END_THINK][:6]

    def generate(model, prompts, sampling):
        ids = right if prompts[0][-1] == sft.END_THINK else trace + [sft.END_THINK] + wrong
        return [nemotron.Completion(list(ids), [], True)]

    monkeypatch.setattr(experiment.nemotron, "generate", generate)
    monkeypatch.setattr(experiment.nemotron, "load_checkpoint", lambda folder: torch.nn.Linear(1, 1))
    monkeypatch.setattr(experiment.sft.Tokenizer, "load", lambda folder: tokenizer)
    config = experiment.Config(max_tokens=40)
    whole, cut = (experiment.play(Path("x"), {"numbers": [task]}, config, cut=n) for n in (None, 3))
    assert whole.right["numbers"].tolist() == [False] and whole.tokens["numbers"].tolist() == [6 + 1 + len(wrong)]
    assert cut.right["numbers"].tolist() == [True] and cut.tokens["numbers"].tolist() == [3 + 1 + len(right)]


def test_pieces_and_their_order_change_no_answer():
    """Prompts are sorted by length and asked a few at a time: an answer given to another prompt shows here."""
    model, rng = make(), np.random.default_rng(0)
    prompts = [rng.integers(12, 300, size=n).tolist() for n in (7, 3, 9, 4, 5)]
    sampling = nemotron.SamplingParams(max_tokens=6)
    alone = [nemotron.generate(model, [p], replace(sampling, temperature=0.0))[0].ids for p in prompts]
    assert [x.ids for x in experiment.InPieces(2)(model, prompts, sampling)] == alone
    assert [x.ids for x in experiment.InPieces(64)(model, prompts, sampling)] == alone
    order = sorted(prompts, key=len)
    drawn = nemotron.generate(model, order, replace(sampling, temperature=1.0, top_p=0.95))
    sampled = experiment.InPieces(64, sampled=True)(model, prompts, sampling)
    assert [x.ids for x in sampled] == [drawn[order.index(p)].ids for p in prompts] != alone


def test_a_gpu_is_scored_and_practised_with_the_engine_that_answers_as_generate_does():
    """What a GPU's settings choose (all prompts at once, stage 08's slots, as many as the call has answers) writes the same tokens, cut or whole."""
    model, rng = make(), np.random.default_rng(0)
    prompts, sampling = [rng.integers(12, 300, size=n).tolist() for n in (7, 3, 9, 4, 5)], nemotron.SamplingParams(max_tokens=6)
    gpu, cpu = (experiment.Config(device=device, rows=2) for device in ("cuda", "cpu"))
    for way in (dict(), dict(sampled=True), dict(cut=2)):
        ours, plain = (experiment.InPieces.of(config, **way) for config in (gpu, cpu))
        assert isinstance(ours.engine, experiment.infer.rollout_engine) and plain.engine is None
        one_piece = replace(plain, rows=64)      # dice go by the place among the prompts of a call
        assert [x.ids for x in ours(model, prompts, sampling)] == [x.ids for x in one_piece(model, prompts, sampling)]
    assert experiment.engine_of(replace(gpu, rows=2048), 512).slots == 512 and experiment.engine_of(gpu, 512).slots == 2
    assert experiment.engine_of(cpu) is experiment.rl.sampled


def test_the_budget_is_the_one_whose_length_is_nearest():
    """lengths 5 8 11 14: wanted 10 is nearest to 11, wanted 9 to 8; beyond both ends the end serves. And it looks at few budgets."""
    lengths, seen = [5, 8, 11, 14], []
    length = lambda n: (seen.append(n), lengths[n])[1]
    assert [experiment.find_cut(length, wanted, 3) for wanted in (10, 9, 1, 99, 8)] == [2, 1, 0, 3, 1]
    seen.clear()
    assert experiment.find_cut(lambda n: (seen.append(n), n)[1], 41.0, 128) == 41 and len(set(seen)) < 12


# ---- the controls of equal time

@pytest.mark.parametrize("seconds, measured, steps", [(100.0, [9.0, 1.0, 1.0, 1.0], 92), (10.0, [1.0, 1.0], 10), (1.0, [5.0, 5.0, 5.0], 3),
                                                      (20.9, [1.0] * 5, 20), (100.0, [9.0, 9.0, 1.0, 1.0], 84)])
def test_a_time_holds_so_many_steps(seconds, measured, steps):
    """The first steps count with what they took, the rest at the pace of their second half; a slow start would else halve the control."""
    assert experiment.steps_that_fit(seconds, measured) == steps


# ---- phases

def config_in(home, **changes):
    return experiment.Config(**dict(dict(home=home / "runs", out=home, figure=home / "posttrain.png", held_out=2, families=("gcd",)), **changes))


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Phases that do nothing but say so, and a clock of their own; scores are taken down as well."""
    done, clock = [], SimpleNamespace(now=0.0)

    def work(name):
        def run(_):
            done.append(name); clock.now += 10
            return dict(folder=tmp_path / "runs" / name, scores={name: tmp_path / "runs" / name})
        return run

    monkeypatch.setattr(experiment, "WORK", {name: work(name) for name in experiment.NEEDS})
    monkeypatch.setattr(experiment, "score", lambda run, name, folder, domain=None, **way: done.append(f"score {name}"))
    monkeypatch.setattr(experiment, "pack_seed", lambda run: done.append("pack"))
    monkeypatch.setattr(experiment, "time", SimpleNamespace(monotonic=lambda: clock.now, perf_counter=lambda: clock.now))
    monkeypatch.setattr(experiment, "gc", SimpleNamespace(collect=lambda: None))
    return SimpleNamespace(done=done, clock=clock)


def test_phases_run_in_order_and_once(tmp_path, recorded):
    """All of them the first time, none the second: a phase done twice would cost its time, one out of order lacks what it reads."""
    config = config_in(tmp_path)
    assert experiment.run_seed(config, 0, tmp_path, math.inf) == []
    assert [x for x in recorded.done if " " not in x] == [*experiment.NEEDS, "pack"]
    position = {name: i for i, name in enumerate(experiment.NEEDS)}
    assert all(position[need] < position[name] for name, needs in experiment.NEEDS.items() for need in needs)
    recorded.done.clear()
    assert experiment.run_seed(config, 0, tmp_path, math.inf) == []
    assert [x for x in recorded.done if " " not in x] == ["pack"]
    assert json.loads((config.home / "seed-0" / "rlvr" / "done.json").read_text())["seconds"] == 10


def test_no_phase_begins_when_the_minutes_are_over(tmp_path, recorded):
    """25 seconds hold the beginnings of three phases of ten; the same call goes on with the fourth."""
    config, names = config_in(tmp_path), list(experiment.NEEDS)
    assert experiment.run_seed(config, 0, tmp_path, 25.0) == names[3:]
    assert recorded.done[-1] == "pack"
    recorded.done.clear()
    assert experiment.run_seed(config, 0, tmp_path, math.inf) == []
    assert [x for x in recorded.done if " " not in x][0] == names[3]


def test_a_phase_that_failed_is_begun_again_and_its_time_is_kept(tmp_path, recorded, monkeypatch):
    """RLVR's wall seconds are what the controls may spend: those before an interruption belong to them."""
    config, tries = config_in(tmp_path, phases=("sft", "rlvr")), []
    whole = experiment.WORK["rlvr"]

    def broken(run):
        tries.append(1); recorded.clock.now += 4
        if len(tries) == 1: raise ValueError("the generation worker failed")
        return whole(run)

    monkeypatch.setitem(experiment.WORK, "rlvr", broken)
    with pytest.raises(ValueError, match="worker failed"): experiment.run_seed(config, 0, tmp_path, math.inf)
    assert recorded.done[-1] == "pack" and not (config.home / "seed-0" / "rlvr" / "done.json").exists()
    experiment.run_seed(config, 0, tmp_path, math.inf)
    assert json.loads((config.home / "seed-0" / "rlvr" / "done.json").read_text())["seconds"] == 4 + 4 + 10


def test_a_phase_says_what_it_lacks(tmp_path, recorded):
    """--phases mopd-1 in an empty folder would else fail on a missing file."""
    with pytest.raises(ValueError, match="mopd-1 needs warmup-1"): experiment.run_seed(config_in(tmp_path, phases=("mopd-1",)), 0, tmp_path, math.inf)
    with pytest.raises(ValueError, match="no phase 'mopd'"): config_in(tmp_path, phases=("mopd",))


def test_a_seed_goes_on_with_its_own_settings_only(tmp_path, recorded):
    """Two learning rates in one seed's folder would be compared with one another."""
    experiment.run_seed(config_in(tmp_path), 0, tmp_path, math.inf)
    other = config_in(tmp_path, rl_lr=1e-3)
    with pytest.raises(ValueError, match="begun with rl_lr = 5e-05, not 0.001"): experiment.run_seed(other, 0, tmp_path, math.inf)
    experiment.run_seed(config_in(tmp_path, minutes=3.0, rows=7), 0, tmp_path, math.inf)      # what may differ


def test_a_phase_that_runs_over_is_stopped_and_left_to_the_next_call(tmp_path, recorded, monkeypatch):
    """A machine that is taken away at a fixed minute must find everything written; Ctrl-C, unlike that, ends the command."""
    monkeypatch.setattr(experiment, "time", time)
    monkeypatch.setitem(experiment.WORK, "rlvr", lambda run: time.sleep(20))
    config, began = config_in(tmp_path, phases=("sft", "rlvr"), grace=0.01), time.monotonic()
    before = signal.getsignal(signal.SIGTERM)
    assert experiment.run_seed(config, 0, tmp_path, time.monotonic() + 0.2) == ["rlvr"]
    assert time.monotonic() - began < 5 and signal.getsignal(signal.SIGTERM) is before
    was = signal.signal(signal.SIGINT, signal.default_int_handler)      # a process of pytest-xdist ignores it
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt): experiment.run_seed(config, 0, tmp_path, math.inf)
    finally: signal.signal(signal.SIGINT, was)


def test_seeds_run_side_by_side_and_one_that_fails_stops_nobody(tmp_path, capsys):
    """The failing one is named; the other's lines are in its log, each with its name, of a progress bar the last state only."""
    say = "import sys, time; time.sleep(0.2); print('10 %\\r50 %\\rdone'); sys.exit(int(sys.argv[1]))"
    began = time.monotonic()
    failed = experiment.side_by_side({f"seed-{i}": [sys.executable, "-c", say, str(i)] for i in (0, 1)}, tmp_path)
    assert failed == ["seed-1"] and time.monotonic() - began < 10
    assert [(tmp_path / f"seed-{i}.log").read_text() for i in (0, 1)] == ["seed-0 | done\n", "seed-1 | done\n"]
    assert "seed-1 failed with exit code 1" in capsys.readouterr().out


def test_seeds_share_several_gpus_in_turn(tmp_path):
    """Each process sees one GPU, whose number its place gives; with one GPU all see what their parent sees."""
    say = [sys.executable, "-c", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"]
    for gpus, seen in ((2, ["0", "1", "0"]), (1, [str(os.environ.get("CUDA_VISIBLE_DEVICES"))] * 3)):
        assert experiment.side_by_side({f"{gpus}-{i}": say for i in range(3)}, tmp_path, gpus) == []
        assert [(tmp_path / f"{gpus}-{i}.log").read_text() for i in range(3)] == [f"{gpus}-{i} | {x}\n" for i, x in enumerate(seen)]


def test_a_child_gets_the_command_of_its_parent():
    """A flag that is lost on the way to a seed's process would give that seed other settings than it is said to have."""
    tyro = pytest.importorskip("tyro")
    config = experiment.Config(full=True, device="cuda", seeds=(0, 1), phases=("sft", "rlvr"), sft_steps=(7, 3), rl_lr=1e-3, home=Path("x y"),
                               sync=True)
    flags = experiment.as_flags(config, seeds=(1,), minutes=2.5)
    assert tyro.cli(experiment.Config, args=flags) == replace(config, seeds=(1,), minutes=2.5)
    assert experiment.as_flags(experiment.Config()) == []


def test_small_sizes_stand_in_only_where_nothing_was_said():
    """--rl-steps 7 without --full must be 7; --full must change nothing."""
    small = experiment.sized(experiment.Config(rl_steps=7))
    assert small.rl_steps == 7 and small.model == "micro" and small.held_out == experiment.SMALL["held_out"]
    assert experiment.sized(config := experiment.Config(full=True)) == config


# ---- ablations of distillation

@pytest.fixture
def student(tmp_path, tokenizer):
    nemotron.save_checkpoint(tmp_path / "student", make(), tokenizer)
    return tmp_path / "student"


def test_four_rollouts_a_prompt_are_as_many_rollouts_a_step(tmp_path, student, monkeypatch):
    """Two of every eight prompts, four times each; full-vocabulary KL keeps all eight, and says of every row which teacher it is for."""
    settings, seen = rl.RLConfig(out=tmp_path, families=("gcd", "number_filtering"), sync=True, device="cpu"), []
    run = SimpleNamespace(config=experiment.Config(), last=lambda phase: student, rl_settings=lambda phase: settings, path=Path,
                          mopd=rl.MOPDConfig(steps=2, prompts=8), mark=lambda phase: dict(folder=student), teachers=lambda turn: {"numbers": student},
                          learnt=lambda folder: [dict(learnt=5)])
    monkeypatch.setattr(rl, "practise", lambda *args: seen.append(args) or student)
    assert experiment.distil_four(run)["tokens"] == experiment.distil_full_kl(run)["tokens"] == 5
    (four, *_), (full, _, read, start, _) = seen
    assert [len(step) for step in four.plan] == [2, 2] and four.answers == 4 and [len(step) for step in full.plan] == [8, 8] and full.answers == 1
    assert [step[:2] for step in full.plan] == four.plan and start == student
    drawn = [rl.Rollout(task, mode, [5, 6, 7], [False, True, True], [0.0] * 3, 0, 1.0, 1.0, True, None) for task, mode in full.plan[0]]
    expected = [["numbers", "logic"].index(task.domain) for task, _ in full.plan[0]]
    assert read(None, drawn).more["teacher_of"].tolist() == [[k, k] for k in expected] and len(set(expected)) == 2


# ---- questions

def test_held_out_questions_are_the_same_for_all_seeds_and_in_no_training():
    """Drawn with seed 0 whatever the run's; every one on the held-out side, none twice, families and levels in turn."""
    config = experiment.Config(families=("gcd", "count_bits", "shop"), held_out=40)
    asked = experiment.questions(config)
    assert set(asked) == {"numbers", "tools"} and all(len(some) == 40 for some in asked.values())
    assert experiment.digest(experiment.ask(replace(config, seeds=(5,)), 40, "held_out")) == experiment.digest(asked)
    every = [task for some in asked.values() for task in some]
    assert {tasks.split_of(task) for task in every} == {"held_out"} and len({(t.family, t.prompt) for t in every}) == len(every)
    counts = {(family, level): sum((t.family, t.level) == (family, level) for t in every) for family in ("gcd", "count_bits") for level in (0, 1, 2)}
    assert max(counts.values()) - min(counts.values()) <= 2, counts
    for seed in (0, 1):
        settings = rl.RLConfig(families=config.families, level=config.level, seed=seed)
        trained = {(t.family, t.prompt) for t in settings.questions(60, "train")}
        assert not trained & {(t.family, t.prompt) for t in every}
    tried = [t for some in experiment.ask(config, 10, "validation").values() for t in some]
    assert {tasks.split_of(task) for task in tried} == {"validation"}


def test_a_question_of_two_levels_is_asked_once():
    """A short cipher of level 0 may be drawn at level 1 too; asked twice, it would weigh double and the interval be too narrow. What is left out is
    made up for, as far as there are more."""
    plain = rl.questions_of("strings", 300, rl.RLConfig(families=("caesar_cipher",), level=1), 0, "held_out")
    assert len({task.prompt for task in plain}) < 290
    asked = experiment.questions(experiment.Config(families=("caesar_cipher",), level=1, held_out=300))["strings"]
    assert len({task.prompt for task in asked}) == len(asked) == 300 and asked[:9] == plain[:9]


# ---- drafts

def test_drafts_by_answer_sum_up_to_the_stage_s_acceptance():
    """Their sums give stage 07's length and places, which has its own tests; an answer too short to draft counts nothing."""
    model, rng = make(seed=3).eval(), np.random.default_rng(0)
    ids = [rng.integers(12, 300, size=n).tolist() for n in (12, 9, 5)]
    drawn = [rl.Rollout(None, "regular", x, [i >= 4 for i in range(len(x))], [0.0] * len(x), 0, 1.0, 1.0, True, None) for x in ids]
    for greedy in (True, False):
        mine, stage = experiment.count_drafts(model, drawn, 3, greedy), rl.acceptance(model, drawn, 3, greedy)
        assert mine.tokens == [7, 4, 0] and mine.passes[2] == 0
        assert sum(mine.tokens) / sum(mine.passes) == pytest.approx(stage.length, abs=1e-3)
        assert mine.by_draft == pytest.approx(stage.by_draft, abs=1e-4)


# ---- report on files made by hand

N = 200


def bits(share: float, flip: int = 0) -> np.ndarray:
    """The first share · N questions right, moved on by `flip`."""
    return np.roll(np.arange(N) < round(share * N), flip)


def seed_file(seed: int, scores: dict[str, dict[str, float]], tokens: dict[str, int] | None = None, drafts=None, settings=None) -> dict:
    made = {name: dict(right={d: experiment.as_hex(x if isinstance(x, np.ndarray) else bits(x)) for d, x in by.items()},
                       tokens={d: [(tokens or {}).get(name, 10)] * N for d in by}) for name, by in scores.items()}
    phases = {"boost": dict(drafts=drafts, seconds=3.0, folder="x")} if drafts else {"sft": dict(seconds=1.0)}
    return dict(seed=seed, settings=dict(full=True, **(settings or {})), questions=dict(a=N, b=N, c=N, d=N), digest="x", base=dict(bits_per_byte={}),
                phases=phases, scores=scores and made, device="none")


def write(folder: Path, *files: dict) -> experiment.Config:
    for x in files: experiment.write_json(folder / f"seed-{x['seed']}.json", x)
    return experiment.Config(report=True, home=folder, out=folder, figure=folder / "figure.png")


def everywhere(x: float, **other) -> dict[str, float]: return dict(a=x, b=x, c=x, d=x) | other


def test_the_report_says_what_the_files_hold(tmp_path, capsys):
    """RLVR 40 % -> 60 %; teachers at 90, 80, 75 and 62 %; the student at 84, 72, 60 and 56 %: recoveries of 24/30, 12/20 and 0/15, and the fourth
    does not count. Nested answers leave no other noise than whose question it is, so the means are exact."""
    scores = {"sft-two-thirds": everywhere(0.4), "sft": everywhere(0.4), "rlvr": everywhere(0.6), "more-sft": everywhere(0.5),
              "mopd-2": dict(a=0.84, b=0.72, c=0.6, d=0.56), "teacher-a-2": dict(a=0.9), "teacher-b-2": dict(b=0.8), "teacher-c-2": dict(c=0.75),
              "teacher-d-2": dict(d=0.62)}
    rows = experiment.report(write(tmp_path, seed_file(0, scores), seed_file(1, scores)))
    by = {(row["name"], row["domain"]): row for row in rows}
    assert by["RLVR - SFT", "all"]["mean"] == pytest.approx(20.0) and by["RLVR - SFT", "all"]["verdict"] == "holds"
    assert by["RLVR - SFT", "all"]["n"] == 4 * N and by["RLVR - SFT", "a"]["by_seed"] == pytest.approx([20.0, 20.0])
    assert by["RLVR - more SFT of equal time", "a"]["verdict"] == "too small to tell"      # 10 points of 200 questions: 6 to 14
    assert by["SFT: gain in its last third", "b"]["verdict"] == "holds" and by["SFT: gain in its last third", "b"]["mean"] == 0
    assert by["MOPD round 2 - RLVR", "d"]["mean"] == pytest.approx(-4.0) and by["MOPD round 2 - RLVR", "a"]["verdict"] == "holds"
    assert by["teacher of round 2 - RLVR", "a"]["verdict"] == "holds" and by["teacher of round 2 - RLVR", "d"]["verdict"] == "does not hold"
    recovered = {domain: row for (name, domain), row in by.items() if name.startswith("recovery")}
    assert set(recovered) == {"a", "b", "c", "all that lead"}
    assert [recovered[d]["mean"] for d in "abc"] == pytest.approx([0.8, 0.6, 0.0])
    assert recovered["all that lead"]["mean"] == pytest.approx((24 + 12 + 0) / (30 + 20 + 15))
    assert recovered["a"]["verdict"] == "holds" and recovered["b"]["verdict"] == "too small to tell" and recovered["c"]["verdict"] == "does not hold"
    said = capsys.readouterr().out
    assert "surely above 0: 3" in said and "failed" not in said
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [x["what"] for x in lines] == ["comparison"] * len(rows) + ["accuracy", "settings"] and (tmp_path / "figure.png").stat().st_size > 10_000
    one = next(x for x in lines if x.get("name") == "RLVR - SFT" and x["domain"] == "all")
    assert {"n", "seeds", "mean", "low", "high", "by_seed", "aim", "verdict"} <= one.keys() and one["seeds"] == [0, 1]


def test_a_domain_that_fell_is_said_so(tmp_path):
    """Twelve points below RLVR in one domain of four: the mean over all hides it, its own line does not."""
    scores = {"rlvr": everywhere(0.6), "mopd-2": everywhere(0.68, d=0.48)}
    by = {(row["name"], row["domain"]): row for row in experiment.report(write(tmp_path, seed_file(0, scores)))}
    assert by["MOPD round 2 - RLVR", "d"]["verdict"] == "does not hold" and by["MOPD round 2 - RLVR", "all"]["verdict"] == "holds"


def test_teachers_that_failed_are_said_to_have(tmp_path, capsys):
    """Two domains with a lead are fewer than three; and a lead of ten points that is not clear of 0 is none."""
    other = bits(0.7, 80)      # ten points more than 60 %, but right on 80 other questions and wrong on 60: -1 to 22
    scores = {"rlvr": everywhere(0.6), "mopd-2": everywhere(0.6), "teacher-a-2": dict(a=0.9), "teacher-b-2": dict(b=0.8),
              "teacher-c-2": dict(c=other)}
    rows = experiment.report(write(tmp_path, seed_file(0, scores)))
    assert "0: 2. The teachers failed" in capsys.readouterr().out
    lead = next(row for row in rows if row["name"].startswith("teacher") and row["domain"] == "c")
    assert lead["mean"] == pytest.approx(10.0) and lead["low"] < 0 and lead["verdict"] == "too small to tell"
    assert {row["domain"] for row in rows if row["kind"] == "recovery"} == {"a", "b", "all that lead"}


def test_a_seed_that_has_not_come_so_far_is_left_out_of_that_line_only(tmp_path):
    """Seed 1 has no RLVR yet: the SFT is averaged over both, the difference is seed 0's, and both say of which seeds they are."""
    files = seed_file(0, {"sft": everywhere(0.4), "rlvr": everywhere(0.5)}), seed_file(1, {"sft": everywhere(0.6), "sft-two-thirds": everywhere(0.6)})
    config = write(tmp_path, *files)
    by = {(row["name"], row["domain"]): row for row in experiment.report(config)}
    assert by["RLVR - SFT", "a"]["seeds"] == [0] and by["SFT: gain in its last third", "a"]["seeds"] == [1]
    assert experiment.accuracies(experiment.collect(config))["sft"]["a"] == pytest.approx(0.5)


def test_acceptance_and_lengths_are_ratios_of_sums(tmp_path):
    """Two answers of 10 and 30 tokens in 5 and 5 passes: 4 tokens a pass, not the mean of 2 and 6 weighed otherwise; medium 6 of 10 tokens is 0.6."""
    drafts = {f"{name} {way}": dict(tokens=[10, 30] * 30, passes=passes * 30, by_draft=[0.5])
              for way in ("greedy", "sampled") for name, passes in (("before", [5.0, 15.0]), ("after", [5.0, 5.0]))}
    scores = {"rlvr": everywhere(0.5), "rlvr-medium": everywhere(0.5)}
    rows = experiment.report(write(tmp_path, seed_file(0, scores, tokens={"rlvr-medium": 5}, drafts=drafts)))
    by = {row["name"]: row for row in rows if row["domain"] == "all"}
    assert by["tokens a pass before boosting, greedy"]["mean"] == 2 and by["tokens a pass after boosting, greedy"]["mean"] == 4
    gain = by["tokens a pass, after - before, sampled"]
    assert gain["mean"] == 2 and 1 < gain["low"] < 2 < gain["high"] < 3 and gain["verdict"] == "holds"
    shorter = by["RLVR: tokens, medium / regular"]
    assert (shorter["mean"], shorter["low"], shorter["high"], shorter["verdict"]) == (0.5, 0.5, 0.5, "holds")


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    """Another question list, other settings, one seed twice, none at all: each would give a table of nothing in particular."""
    whole = seed_file(0, {"sft": everywhere(0.4)})
    with pytest.raises(ValueError, match="no seed-"): experiment.report(write(tmp_path / "none"))
    for key, other, said in (("digest", "y", "other digest"), ("settings", dict(full=True, rl_lr=1.0), "other settings"), ("seed", 0, "second file")):
        folder = tmp_path / key
        experiment.write_json(folder / "more" / "seed-9.json", {**whole, "seed": 1, key: other})
        with pytest.raises(ValueError, match=said): experiment.report(replace(write(folder, whole), files=(folder / "more",)))


# ---- all of it

TINY = ["--families", "gcd", "number_filtering", "--teachers", "numbers", "logic", "--held-out", "6", "--base-tokens", "1024", "--megabytes", "0.1",
        "--max-tokens", "20", "--sft-tokens", "6000", "--sft-steps", "16", "2", "--sft-pack", "256", "256", "--rl-steps", "1", "--profile", "6", "4",
        "--first-steps", "2", "--teacher-steps", "1", "--warmup", "4", "1", "--mopd-steps", "1", "--boost", "1", "1", "128", "--boost-rollouts", "4",
        "--depths", "2", "--drafts", "3", "--tried", "1"]


def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["posttrain.py", *flags])
    nvfp4.run_command(experiment.main, experiment.Config, experiment.__doc__)


@pytest.fixture
def easy(monkeypatch):
    """Little text for the base, and answers that are right when their length is even: a model of a few steps has something to reinforce."""
    for name in ("stories", "stdlib", "pydoc"): monkeypatch.setitem(corpus.SOURCES, name, replace(corpus.SOURCES[name], megabytes=0.1))
    kind = importlib.import_module("data.tasks.base").Environment
    monkeypatch.setattr(kind, "score", lambda self, task, completion, thinking=True: float(len(completion) % 2 == 0))


def test_the_whole_pipeline_runs_from_the_command_line(tmp_path, monkeypatch, capsys, easy):
    """Two seeds as far as the first control, then all phases of one of them; the next call finds everything done, and the report needs no more than
    the two files, in another folder."""
    pytest.importorskip("tyro")
    home = ["--home", str(tmp_path / "home"), "--out", str(tmp_path)]
    command(monkeypatch, *home, *TINY, "--seeds", "0", "1", "--phases", "sft", "rlvr", "more-sft")
    said = capsys.readouterr().out
    assert "no result" in said and "seed 1: all phases asked for are done." in said
    command(monkeypatch, *home, *TINY)
    files = [json.loads((tmp_path / "home" / f"seed-{i}.json").read_text()) for i in (0, 1)]
    assert [*files[0]["phases"]] == [*experiment.NEEDS] and [*files[1]["phases"]] == ["sft", "rlvr", "more-sft"]
    assert files[0]["digest"] == files[1]["digest"]
    assert files[0]["scores"].keys() >= {"sft", "sft-two-thirds", "rlvr", "more-sft", "sft-worked", "mopd-2", "rlvr-sampled", "full-kl",
                                            "rlvr-cut", "mopd-2-medium"}
    for i, x in enumerate(files):
        metrics = lambda phase, i=i: [json.loads(line) for path in (tmp_path / "home" / f"seed-{i}" / phase).glob("*/metrics.jsonl")
                                      for line in path.read_text().splitlines()]
        done = x["phases"]
        assert done["more-sft"]["steps"] == len(metrics("more-sft")) >= 2 and done["more-sft"]["allowed"] == done["rlvr"]["seconds"] > 0
        assert done["more-sft"]["steps"] == experiment.steps_that_fit(done["rlvr"]["seconds"], [row["seconds"] for row in metrics("more-sft")[:2]])
        if not i:
            assert len(metrics("mopd-1")) == len(metrics("full-kl")) == len(metrics("rollouts-4")) == 1
            assert done["grpo"]["wanted"] == done["mopd-1"]["tokens"] > 0
        # the same learning rates as its own cosine would have taken, had it known the number of steps from the start
        rates = [sft.cosine_lr(n, done["more-sft"]["steps"], 2, 5e-4, 5e-4 / 15) for n in range(1, done["more-sft"]["steps"] + 1)]
        assert [row["lr"] for row in metrics("more-sft")] == pytest.approx(rates)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "home").rglob("done.json")}
    # a home that is moved, or carried to another machine, must find its checkpoints
    assert len(before) > len(experiment.NEEDS) and not any(str(tmp_path) in path.read_text() for path in before)
    command(monkeypatch, *home, *TINY)
    assert {path: path.stat().st_mtime_ns for path in before} == before

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for i in (0, 1): (tmp_path / "home" / f"seed-{i}.json").rename(elsewhere / f"seed-{i}.json")
    command(monkeypatch, "--report", *home, "--files", str(elsewhere), "--figure", str(tmp_path / "figure.png"))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows if row["what"] == "comparison"} >= {"difference", "drafts", "length"} and (tmp_path / "figure.png").exists()
    assert all(row["seeds"] == [0, 1] for row in rows if row.get("name") == "RLVR - SFT")
