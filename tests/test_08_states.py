"""Rounded SSM states under constant input: stalls worked out in exact fractions, means against the closed form, and stage 08's slots against a
simulation that rounds as rarely as they do."""
import bisect
import importlib
import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
experiment = importlib.import_module("ssm_states")
mamba, nemotron, infer = (importlib.import_module(m) for m in ("02_mamba", "04_model", "08_infer"))

DECAY, STEPS = 0.9999, 10_000


def last(states):
    """(the state in the middle, the last one)"""
    for step, state in enumerate(states, 1):
        if step == STEPS // 2: middle = state.clone()
    return middle, state.clone()


def stall(x: Fraction, fades: Fraction, fp32: bool) -> Fraction:
    """The first value of fp16 that a state rising from 0 does not leave: x - fades · s is at most half a step of fp16 there (on a tie, the even one).

    fp32: with both terms taken to the grid on which the step computes. For s in [2^e, 2^(e + 1)), whose fp16 step is 2^(e - 10), fp32's is
    g = 2^(e - 23): fl(a s) = s - round(fades · s / g) g, and adding x moves that by round(x / g) g, since s is a multiple of g.
    """
    for e in range(-14, 15):
        step, g = Fraction(2) ** (e - 10), Fraction(2) ** (e - 23)
        def moves(m, step=step, g=g): return (round(x / g) - round(fades * m * step / g)) * g if fp32 else x - fades * m * step
        m = bisect.bisect_left(range(2048), True, 1024, key=lambda m, most=step / 2, moves=moves: moves(m) <= most)    # less and less
        while m < 2048 and moves(m) == step / 2 and m % 2: m += 1
        if m < 2048: return m * step
    raise AssertionError("no stall below fp16's largest value")


def test_fp16_to_nearest_stalls_where_half_a_step_is_not_reached():
    """64 inputs over two octaves: the state stands still at the closed form's value, exactly, long before the true state is there. Fails when
    states are truncated, rounded up, or kept in more bits than they are stored in."""
    x = experiment.constant_inputs(64, DECAY)
    assert x[0] == np.float32(1e-4) and x[-1] / x[0] == pytest.approx(2 ** (2 * 63 / 64))
    fades = 1 - Fraction(experiment.kept_of(DECAY))
    middle, end = last(experiment.drive(x, 1, DECAY, STEPS, "fp16"))
    assert torch.equal(middle, end)
    exact = [stall(Fraction(v), fades, True) for v in x.tolist()]
    assert end[0].tolist() == [float(s) for s in exact]
    # without fp32's grid: the same value or a neighbour, since fp32's own rounding of the move is 2^-13 steps, as much as the move of one value
    plain = [stall(Fraction(v), fades, False) for v in x.tolist()]
    apart = [abs(s - p) / Fraction(2) ** (math.floor(math.log2(p)) - 10) for s, p in zip(exact, plain)]
    assert max(apart) <= 1 and sum(a == 0 for a in apart) >= 48
    share = [float(s * fades / Fraction(v)) for s, v in zip(exact, x.tolist())]
    assert 0.16 < min(share) < 0.18 and 0.27 < max(share) < 0.30


def check_mean(states_rn, true_n, least):
    """Each input's mean over the rows within 5 standard errors of the true state, at most one false alarm in 1.7 million comparisons; and these
    errors are small: at most `least` of the true state, so that a bias of 5 times that is seen."""
    states = states_rn.double()
    errors = states.std(0) / math.sqrt(len(states))
    assert (errors < least * true_n).all(), (errors / true_n).max()
    assert ((states.mean(0) - true_n).abs() < 5 * errors).all(), ((states.mean(0) - true_n) / errors).abs().max()


def test_fp16_stochastic_is_right_on_average():
    """4,096 rows of the first, the last and two inputs between. Nearest is wrong by 54 to 73 %; here 0.15 % would be seen. Fails when a draw
    repeats, is not uniform, or rounds up with another chance than the dropped bits'."""
    x = experiment.constant_inputs(64, DECAY)[[0, 21, 42, 63]]
    check_mean(last(experiment.drive(x, 4096, DECAY, STEPS, "fp16_sr"))[1], experiment.true_state(x, DECAY, STEPS), 3e-4)


def test_the_true_state_is_the_recurrence():
    """The closed form beside the definition in fp64, and fp32's state within the rounding of 10,000 steps."""
    x, s = experiment.constant_inputs(64, DECAY), np.zeros(64)
    for _ in range(STEPS): s = experiment.kept_of(DECAY) * s + x.double().numpy()
    true = experiment.true_state(x, DECAY, STEPS)
    assert np.abs(true.numpy() / s - 1).max() < 1e-10
    end = last(experiment.drive(x, 1, DECAY, STEPS, "fp32"))[1][0].double()
    assert ((end - true).abs() / true).max() < 1e-3         # at most 2^-24 of the state a step, twice, and 6,300 steps that count


def test_int8_to_nearest_keeps_the_nearest_code_of_a_share_that_stands_still():
    """Entries that grow together: the first token's code is every token's, round(127 x / largest x). So the bias is half a code, and does not grow;
    the scale follows the largest entry."""
    x = experiment.constant_inputs(64, DECAY)
    share = 127 * x.double() / x.max()
    clear = ((share - share.floor()) - 0.5).abs() > 1e-3        # leaves out half the largest input, 63.5, where fp32's last bit decides
    x, share = x[clear], share[clear]
    assert len(x) >= 60
    true = experiment.true_state(x, DECAY, STEPS)
    for end in last(experiment.drive(x, 1, DECAY, STEPS, "int8")):
        codes = end[0].double() / end[0].max() * 127
        assert (codes - share.round()).abs().max() < 1e-4
    assert ((end[0] / true - 1).abs() <= (0.5 + 1e-2) / share).all() and ((end[0] / true - 1).abs() > 0.25 / share).any()


def test_int8_to_nearest_never_begins_beside_a_large_value_and_stochastic_does():
    """A row that holds 4 has codes of 4 / 127, a hundred times what a token adds: nearest writes 0 for ever, all of the state is lost. The mean of
    4,096 stochastic rows is right to 5 standard errors, for the first and the last input."""
    x = experiment.constant_inputs(64, DECAY)
    middle, end = last(experiment.drive(x, 1, DECAY, STEPS, "int8", experiment.LARGEST))
    assert not middle.any() and not end.any()
    x = x[[0, 63]]
    *_, end = experiment.drive(x, 4096, DECAY, STEPS // 2, "int8_sr", experiment.LARGEST)
    check_mean(end, experiment.true_state(x, DECAY, STEPS // 2), 0.03)


# ---- stage 08's slots

SLOW, TOKENS = 0.999, 2048      # faster than above, so that 2,048 tokens show it


def simulated(x, r: int, int8: bool):
    """The state when it is rounded once in r tokens, by numpy in fp64: fp16, or codes beside one that holds 127 and the steady state's value."""
    a, s = math.exp(-math.exp(math.log(-math.log(SLOW)))) ** r, np.zeros(len(x))
    for _ in range(TOKENS // r):
        steady = 127 * np.ones(len(x)) if int8 else x / (1 - experiment.kept_of(SLOW))
        s = a * s + (1 - a) * steady
        s = np.rint(s) if int8 else s.astype(np.float16).astype(np.float64)
    return s * x / (1 - experiment.kept_of(SLOW)) / 127 if int8 else s


@pytest.fixture(scope="module")
def slots():
    """drive_caches over windows of which half is kept, by (way, format): (state [64, n], tokens a rounding). A quarter of the tokens where rounding
    is right on average."""
    x = experiment.constant_inputs(64, SLOW)
    model, few = experiment.constant_model(x, SLOW, 8), lambda f: TOKENS if f in ("fp16", "int8") else TOKENS // 4
    return x, {(way, f): experiment.drive_caches(model, way, f, 3, 2, few(f)) for f in experiment.FORMATS for way in experiment.WAYS[1:]}


def test_a_snapshot_rounds_once_a_window_and_a_replay_once_a_flush(slots):
    """Windows of 4 of which 2 are kept: the ring of 16 is worked in when 14 inputs are there. Fails when a replay rounds at every window."""
    for (way, _), (_, tokens_a_rounding) in slots[1].items():
        assert tokens_a_rounding == pytest.approx(2 if way == "snapshot" else 14, rel=0.02)     # the last flush has fewer


@pytest.mark.parametrize("way, r", [("snapshot", 2), ("replay", 14)])
def test_nearest_in_slots_is_as_wrong_as_rounding_so_often_makes_it(slots, way, r):
    """fp16 and int8 against numpy, which rounds once in r tokens: fp16 to two steps (fp32 moves the point at which a value is left), int8's codes
    exactly. Fails when a replay's state is rounded at other tokens, or from inputs that were rounded."""
    x, ends = slots
    want = simulated(x.double().numpy(), r, int8=False)
    got = ends[way, "fp16"][0].double().numpy()
    assert (got == got[:, :1]).all() and (np.abs(got[:, 0] - want) <= 2 * 2.0 ** (np.floor(np.log2(want)) - 10)).all()
    want = simulated(x.double().numpy(), r, int8=True)
    got = ends[way, "int8"][0].double().numpy()
    code = x.double().numpy() / (1 - experiment.kept_of(SLOW)) / 127
    assert (np.abs(got - want[:, None]) < 1e-3 * code[:, None]).all()


def test_fewer_roundings_make_a_smaller_bias_in_slots(slots):
    """fp16 to nearest: a replay is wrong by less than a third of what a snapshot is; int8 loses all in snapshots and a part in replays;
    fp32 and the stochastic formats are right in both (means over 64 inputs of 7 rows; 5 standard errors, measured from the rows)."""
    x, ends = slots
    def bias(way, f):
        error = ends[way, f][0].double() / experiment.true_state(x, SLOW, TOKENS if f in ("fp16", "int8") else TOKENS // 4)[:, None] - 1
        return error.mean().item(), error.std(1).mean().item() / math.sqrt(error.numel())
    snapshot, replay = bias("snapshot", "fp16")[0], bias("replay", "fp16")[0]
    assert snapshot < -0.02 and abs(replay) < abs(snapshot) / 3, (snapshot, replay)
    assert bias("snapshot", "int8")[0] == -1 and -0.2 < bias("replay", "int8")[0] < -0.05
    for way in ("snapshot", "replay"):
        assert abs(bias(way, "fp32")[0]) < 1e-4
        for f, least in (("fp16_sr", 1e-3), ("int8_sr", 0.02)):
            mean, error = bias(way, f)
            assert error < least and abs(mean) < 5 * error, (way, f, mean, error)


# ---- the experiment's own pieces

MICRO = nemotron.ModelConfig(pattern="MEM*E", d_model=32, vocab=96, heads=4, kv_heads=2, head_dim=8, mamba_heads=16, mamba_head_dim=4, groups=2,
                             state=8, chunk=8, experts=8, experts_per_token=3, latent=16, expert_width=16, shared_width=32)


@pytest.fixture(scope="module")
def wild():
    """Random everywhere: at the default init norms are 1 and wrong code passes."""
    model, g = nemotron.Nemotron(MICRO), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(p.shape, generator=g)
            if p.dim() > 1 and "conv1d" not in name: p.copy_(noise * 1.2 / math.sqrt(p.shape[-1]))
            else: p.add_(0.3 * noise)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("way", experiment.WAYS)
def test_forced_distributions_are_those_of_one_pass_over_the_text(wild, way):
    """Token by token through the caches, rejected drafts in every window, against the whole text at once; with int8 they differ, but not much."""
    ids = torch.randint(0, 96, (3, 25), generator=torch.Generator().manual_seed(1))
    want = wild(ids).float().log_softmax(-1)
    got = torch.stack(list(experiment.forced_logits(wild, ids, way, "fp32", 3)), 1)
    assert (got - want).abs().max() < 1e-4
    rounded = torch.stack(list(experiment.forced_logits(wild, ids, way, "int8_sr", 3)), 1)
    assert 1e-4 < (rounded - want).abs().max() < 2.0


def test_answers_are_scored_when_they_end(monkeypatch):
    """The worked answer scores 1, another 0, and one that was cut 0 although its text is right; tokens are counted over all."""
    sft, tasks, tokenizer = (importlib.import_module(m) for m in ("06_sft", "data.tasks", "data.tokenizer"))
    tokenizer = tokenizer.Tokenizer.train(["Once upon a time. 0 1 2 3 4 5 6 7 8 9 monday friday"], 300)
    questions = experiment.held_out_questions(2)
    assert len(questions) >= 4 and all(tasks.split_of(q) == "held_out" and not q.tools for q in questions)
    question = next(q for q in questions if q.answer)
    ids = tokenizer.encode(question.answer)
    answer = lambda ids, reason: infer.Answer(ids + [sft.SPECIALS["<|im_end|>"]] * (reason == "stop_id"), finished=reason == "stop_id", reason=reason)
    given = [answer(ids, "stop_id"), answer(tokenizer.encode("no"), "stop_id"), answer(ids, "length")]
    monkeypatch.setattr(infer, "generate_with_budget", lambda engine, talks, mode, sampling: given)
    engine = type("Engine", (), dict(tokenizer=tokenizer))
    scored = experiment.ask(engine, [question] * 3, "off", None)
    assert (scored.right, scored.n, scored.tokens) == (1.0, 3, 2 * len(ids) + 2 + len(tokenizer.encode("no")))


def test_the_command_writes_a_row_and_a_figure(tmp_path, capsys):
    """Part 1 in small; impossible settings are one sentence."""
    experiment.main(experiment.Config(only="constant", decay=0.99, steps=200, inputs=32, rows=8, threads=1, out=tmp_path))
    assert (tmp_path / "ssm_states.png").stat().st_size > 10_000 and '"what": "constant inputs"' in (tmp_path / "results.jsonl").read_text()
    assert "beside a large value" in capsys.readouterr().out
    with pytest.raises(ValueError, match="draft"): experiment.Config(draft=8)
    with pytest.raises(ValueError, match="trained|folder"): experiment.trained(tmp_path / "nothing")
