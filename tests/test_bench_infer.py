"""The benches of inference: what a row says is what was timed, counted and answered; run whole on a small model."""
import functools
import importlib
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
bench = importlib.import_module("bench_infer")
nemotron, infer, sft = (importlib.import_module(m) for m in ("04_model", "08_infer", "06_sft"))
states, bench_cpu = importlib.import_module("ssm_states"), importlib.import_module("bench_cpu")
Tokenizer, corpus = importlib.import_module("data.tokenizer").Tokenizer, importlib.import_module("data.corpus")

MICRO = nemotron.ModelConfig(pattern="MEM*E", d_model=32, vocab=320, heads=4, kv_heads=2, head_dim=8, mamba_heads=16, mamba_head_dim=4, groups=2,
                             state=8, chunk=8, experts=8, experts_per_token=3, latent=16, expert_width=16, shared_width=32)


@pytest.fixture
def micro(monkeypatch):
    monkeypatch.setitem(nemotron.PRESETS, "tiny", MICRO)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model with a tokenizer, every tensor with values of its own."""
    torch.manual_seed(0)
    model, folder = nemotron.Nemotron(MICRO), tmp_path_factory.mktemp("base") / "step-000001"
    with torch.no_grad():
        for _, p in [*model.named_parameters(), *model.named_buffers()]: p.add_(torch.randn(p.shape) * (0.3 if p.dim() < 2 else 0.2))
    nemotron.save_checkpoint(folder, model, Tokenizer.train(itertools.islice(corpus.stories_and_facts(0), 40), 320))
    return folder


def config(tmp_path, **kwargs):
    return bench.Config(**dict(device="cpu", batch=(1, 3), prompt=5, new=12, rounds=1, ahead=(1,), forced=(1.0,), forced_drafts=2, threads=1,
                               out=tmp_path, questions=2, max_tokens=6, draft=(0, 1, 3), draft_batch=(2,), budgets=(2,), margin=2) | kwargs)


def test_the_whole_script_runs_on_a_cpu(micro, checkpoint, tmp_path, capsys):
    """All three parts: rows with what they measured, figures, and the same text at every draft length, since drafting is lossless."""
    bench.main(config(tmp_path, only=("speed", "drafts", "budgets"), trained=checkpoint))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    speed, drafts, budgets = ([r for r in rows if r["what"] == what] for what in ("speed", "drafts", "budgets"))
    assert [(r["contender"].split(",")[0], r["batch"]) for r in speed] == [(n, b) for b in (1, 3) for n in ("ours", "ours", "transformers")]
    assert [r.get("acceptance") for r in speed] == [None, [1.0, 1.0], None] * 2
    assert all("forced" in r["contender"] for r in speed if "acceptance" in r)
    # no draft: one token a slot and step; two that are always kept: three
    assert [r.get("tokens_a_step") for r in speed] == [1, 3, None, 3, 9, None] and speed[0]["operators_a_step"] > 50
    assert [r["draft"] for r in drafts] == [0, 1, 3] and all(r["same_text"] == 1 and r["tokens_per_s"] > 0 for r in drafts)
    assert len({r["tokens"] for r in drafts}) == 1 and [len(r["acceptance"]) for r in drafts] == [0, 1, 3]
    assert [(r["mode"], r["budget"]) for r in budgets] == [("off", None), ("medium", None), ("regular", None), ("regular", 2)]
    assert budgets[2]["closed"] == 0 and budgets[3]["closed"] > 0.5     # a random model writes no </think> of its own
    for name in ("drafts.png", "budgets.png"): assert (tmp_path / name).stat().st_size > 10_000
    assert "fastest: " in capsys.readouterr().out


def test_speed_is_tokens_over_median_seconds_and_ratios_are_paired(micro, tmp_path, monkeypatch):
    """Contenders that take known times: batch × new / median; the ratio is the median of the rounds' ratios, not the ratio of medians."""
    given = iter([[1.0, 4.0, 2.0], [3.0, 4.0, 20.0]] * 2)
    monkeypatch.setattr(bench_cpu, "interleaved", lambda contenders, rounds: {name: next(given) for name in contenders})
    monkeypatch.setattr(bench, "count_launches", lambda *args: {})
    rows = bench.speed(config(tmp_path, forced=(), new=60))
    assert [(r["batch"], r["tokens_per_s"], r["slowest"], r["fastest"], r.get("ratio")) for r in rows] == [
        (1, 30.0, 15.0, 60.0, 3.0), (1, 15.0, 3.0, 20.0, None), (3, 90.0, 45.0, 180.0, 3.0), (3, 45.0, 9.0, 60.0, None)]


def test_contenders_write_as_many_tokens_as_the_row_divides_by(micro, tmp_path, monkeypatch):
    """Each timed run writes `new` tokens for every prompt, with and without drafts, and the peer reads the same prompts: one that stops early or
    reads less would look fast."""
    seen = {}
    def once(contenders, rounds):
        seen.update({name: f() for name, f in contenders.items()})
        return {name: [1.0] for name in contenders}
    monkeypatch.setattr(bench_cpu, "interleaved", once)
    bench.speed(config(tmp_path, batch=(3,)))
    peer = seen.pop("transformers, no kernels")
    assert len(seen) == 2 and tuple(peer.shape) == (3, 5 + 12) and peer[:, :5].tolist() == bench.random_prompts(config(tmp_path), 3, 320)
    for answers in seen.values(): assert [len(a.ids) for a in answers] == [12, 12, 12] and {a.reason for a in answers} == {"length"}


def test_windows_ahead_are_a_contender_and_a_field(micro, tmp_path):
    """Plain decoding once for each number, drafts with the last; what a window costs does not depend on it."""
    rows = [r for r in bench.speed(config(tmp_path, batch=(3,), ahead=(1, 4), peer=False))]
    assert [(r["contender"], r["ahead"]) for r in rows] == [("ours", 1), ("ours, 4 windows between looks", 4),
                                                            ("ours, 2 drafts kept with chance 1, forced", 4)]
    assert [r["tokens_a_step"] for r in rows] == [3, 3, 9] and rows[0]["operators_a_step"] == rows[1]["operators_a_step"]
    with pytest.raises(ValueError, match="ahead is empty"): config(tmp_path, ahead=())


def test_acceptances_are_those_of_windows_whose_request_was_there(checkpoint, tmp_path, monkeypatch):
    """Answers that a stop id ends, here one id in seven, of drafts that a coin keeps: with many windows between looks text and counts are those with
    one."""
    texts = bench.texts
    monkeypatch.setattr(infer, "Engine", functools.partial(infer.Engine, forced=0.6))
    monkeypatch.setattr(bench, "texts", lambda *args: (texts(*args)[0], infer.SamplingParams(40, temperature=0.0, stop_ids=tuple(range(0, 320, 7)))))
    one, many = (bench.draft_lengths(config(tmp_path, trained=checkpoint, draft=(2,), ahead=(n,))) for n in (1, 7))
    assert [r["ahead"] for r in one + many] == [1, 7] and one[0]["tokens"] < 16 * 40 and 0.3 < one[0]["acceptance"][0] < 0.9
    for name in ("tokens", "acceptance", "tokens_a_pass"): assert one[0][name] == many[0][name], name


def test_the_fastest_draft_length_is_found_for_each_batch():
    """The interior optimum of worked rows; the order of the rows does not matter."""
    speeds = {1: [10, 14, 17, 16], 32: [10, 11, 9, 4], 8: [10, 9, 8, 7]}
    rows = [dict(batch=b, draft=k, tokens_per_s=v) for b, line in speeds.items() for k, v in reversed(list(enumerate(line)))]
    assert bench.best_drafts(rows) == {1: 2, 32: 1, 8: 0}


def test_tokens_a_pass_are_the_accepted_ones_and_one_more(checkpoint, tmp_path):
    """Ten windows of two drafts that keep 6 and then 3 bring 19 tokens; and a row says the same of its own acceptances. All answers are whole."""
    assert bench.tokens_a_pass([10, 6], [6, 3]) == 1.9 and bench.tokens_a_pass([], []) == 1.0
    row = bench.draft_lengths(config(tmp_path, trained=checkpoint, draft=(0, 2), text="stories", new=9))[1]
    first, second = row["acceptance"]
    assert row["tokens_a_pass"] == pytest.approx(1 + first + first * second, abs=2e-3)
    assert row["tokens"] == 16 * 9 and row["requests"] == 16


def test_a_budget_row_counts_what_was_answered(checkpoint, tmp_path, monkeypatch):
    """3 of 4 right, 2 closed, 1 without an end: shares, tokens and Wilson's interval, by hand."""
    answer = lambda n, finished, inserted: infer.Answer([1] * n, finished=finished, inserted=inserted)
    given = states.Scored(3.0, 4, 20, [answer(5, True, None), answer(5, True, 2), answer(5, True, 1), answer(5, False, None)])
    monkeypatch.setattr(states, "ask", lambda engine, questions, mode, sampling: given)
    row = bench.budgets(config(tmp_path, trained=checkpoint))[0]
    centre, half = (0.75 + 1.96**2 / 8) / (1 + 1.96**2 / 4), 1.96 * math.sqrt(0.75 * 0.25 / 4 + 1.96**2 / 64) / (1 + 1.96**2 / 4)
    assert (row["accuracy"], row["tokens"], row["closed"], row["without_end"]) == (0.75, 5.0, 0.5, 0.25)
    assert (row["low"], row["high"]) == (pytest.approx(centre - half, abs=1e-4), pytest.approx(centre + half, abs=1e-4))


def test_random_weights_lie_in_the_dtype_that_is_timed(micro, tmp_path, monkeypatch):
    """bf16 but for what stage 04 keeps in fp32, another draw for another seed; Super is asked for in codes."""
    monkeypatch.setattr(bench.Config, "dtype", torch.bfloat16)
    model, other = bench.random_model(config(tmp_path)), bench.random_model(config(tmp_path, seed=1))
    for name, p in model.named_parameters(): assert p.dtype == (torch.float32 if name.endswith(nemotron.FP32) else torch.bfloat16), name
    assert model.lm_head.weight.std() > 0 and not torch.equal(model.lm_head.weight, other.lm_head.weight)
    monkeypatch.setattr(infer, "random_model", lambda *args: args)
    sizes, recipe, where, dtype, seed = bench.random_model(config(tmp_path, preset="super"))
    assert (sizes, recipe, where, dtype, seed) == (nemotron.preset("super"), infer.Recipe(weights_only=True), "cpu", torch.bfloat16, 0)


def test_training_first_takes_the_preset_and_the_steps(tmp_path, monkeypatch):
    """--train-steps hands stage 05 the preset, the device and the length, and measures what that leaves."""
    pretrain, asked = importlib.import_module("05_pretrain"), []
    monkeypatch.setattr(pretrain, "main", asked.append)
    home = bench.train(config(tmp_path, train_steps=7))
    assert (asked[0].preset, asked[0].steps, asked[0].device, asked[0].branches) == ("tiny", 7, "cpu", ()) and home == asked[0].out / "pretrain"


def test_impossible_settings_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="rounds"): config(tmp_path, rounds=0)
    with pytest.raises(ValueError, match="draft is empty"): config(tmp_path, draft=())
    with pytest.raises(ValueError, match="prompt = 1"): config(tmp_path, prompt=1)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"): bench.main(config(tmp_path, device="cuda"))
