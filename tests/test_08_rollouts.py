"""Stage 08's engine draws the rollouts of stage 07: log-probabilities that belong to the weights, two processes, new weights in the middle of an
answer, and an Engine that serves many calls."""
import importlib
import itertools
import pickle
import signal
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from test_08_engine import MICRO, prompts, randomise
from test_08_graphs import Replayed, on_a_gpu

from data import corpus, tasks, worker

nemotron, rlvr, infer = (importlib.import_module(m) for m in ("04_model", "07_rlvr_mopd", "08_infer"))
SMALL = replace(MICRO, vocab=320)       # of the tokenizer below
FREE = nemotron.SamplingParams(max_tokens=20, temperature=1.0, top_p=1.0, stop_ids=(21, 40, 57, 64, 70))


@pytest.fixture(scope="module")
def tokenizer():
    return rlvr.Tokenizer.train(itertools.islice(corpus.stories_and_facts(0), 40), 320)


def make(seed=5, config=MICRO):
    torch.manual_seed(seed)
    return randomise(nemotron.Nemotron(config), seed).requires_grad_(False)


def same(some, others, near=1e-4):
    """The same answers. Idle rows hold other numbers in an Engine that has served before, which changes the shapes of the experts' products."""
    if [(x.ids, x.finished) for x in some] != [(x.ids, x.finished) for x in others]: return False
    return all(a.logprobs == pytest.approx(b.logprobs, abs=near) for a, b in zip(some, others))


# ---- learning

class Bandit(tasks.Environment):
    """A question whose right answers begin with one class of letters in eight."""
    name, domain, levels = "bandit", "d", 1
    def score(self, task, completion, thinking=True): return float(bool(completion) and ord(completion[0]) % 8 == task.meta["class"])


@dataclass
class Short:
    """Answers are a few tokens, and complete: enough for drafts to be kept, rejected and cut."""
    engine: object
    tokens: int = 3

    def __call__(self, model, asked, sampling):
        drawn = self.engine(model, asked, replace(sampling, max_tokens=self.tokens, stop_ids=()))
        return [nemotron.Completion(x.ids, x.logprobs, True) for x in drawn]


@pytest.fixture
def config(tmp_path):
    return rlvr.RLConfig(out=tmp_path, prompts=2, answers=16, steps=4, lr=3e-3, warmup_steps=2, micro_batches=2, sync=True, save_every=1000)


def run(tokenizer, home, config, engine):
    asked = [(tasks.Task("bandit", "d", 0, f"question {i}", "", {"class": 2 * i + 1}), "off") for i in range(config.prompts)]
    plan = [asked] * config.steps
    draw = rlvr.Draw(engine, tokenizer, plan, config.answers, config.sampling, config.seed, config.effort, dict(bandit=Bandit()))
    model = make(config=SMALL).requires_grad_(True).train()
    trainer = rlvr.RLTrainer(config.training(), model, None, home, policy=rlvr.grpo_objective(config), tokenizer=tokenizer)
    assert rlvr.fit_policy(trainer, draw, config, lambda model, drawn: rlvr.to_rows(drawn, config.answers))
    return trainer


@pytest.mark.parametrize("options", [{}, dict(draft=3), dict(draft=3, rollback="replay")], ids=str)
def test_log_probabilities_are_those_of_one_pass_over_the_text(options):
    """Twelve answers of several lengths over five slots: each token with the log-probability that a learner with these weights computes."""
    model, asked = make(), prompts(12, 3, 2, 40)
    drawn = infer.rollout_engine(slots=5, **options)(model, asked, FREE)
    assert len({len(x.ids) for x in drawn}) > 3
    for prompt, x in zip(asked, drawn):
        ids = torch.tensor([prompt + x.ids])
        want = model(ids[:, :-1])[0, len(prompt) - 1:].log_softmax(-1).gather(1, ids[0, len(prompt):, None])[:, 0]
        gap = (want - torch.tensor(x.logprobs)).abs()
        assert gap.mean() < 1e-5 and gap.max() < 1e-4


def test_a_policy_learns_from_drafted_rollouts(tokenizer, config, tmp_path):
    """The bandit of stage 07's tests over fewer slots than answers: from an eighth by chance to nine in ten, as with sampled rollouts, and at age 0
    without anything for importance weights to repair."""
    settings = replace(config, prompts=1, steps=24, lr=8e-3, warmup_steps=3, answers=32, micro_batches=1)
    rows = run(tokenizer, tmp_path / "a", settings, Short(infer.rollout_engine(slots=20, draft=3))).rows
    early, late = (sum(row["reward"] for row in part) / len(part) for part in (rows[:2], rows[-5:]))
    assert early < 0.3 and late > 0.9, (early, late)
    assert all(row["age"] == 0 and row["dlogp"] < 1e-5 for row in rows)


# ---- two processes

def test_two_processes_with_drafts_are_one_to_the_bit_at_age_0(tokenizer, config, tmp_path, monkeypatch):
    """32 answers over seven slots. Whatever differs is a mistake in sending weights, rollouts or the engine. The new process imports its class by the
    name 08_infer, which is no identifier and does not lie in the working folder."""
    monkeypatch.chdir(tmp_path)
    engine = Short(infer.rollout_engine(slots=7, draft=3), 5)
    one = run(tokenizer, tmp_path / "a", config, engine)
    two = run(tokenizer, tmp_path / "b", replace(config, sync=False, age=0), engine)
    for key in ("loss", "reward", "grad_norm", "entropy", "dlogp", "weight_histogram", "age", "max_vio"):
        assert [row[key] for row in one.rows] == [row[key] for row in two.rows], key
    assert len({row["reward"] for row in one.rows}) > 1 and all(row["dlogp"] < 1e-5 for row in one.rows)
    assert all(x.equal(y) for x, y in zip(one.model.state_dict().values(), two.model.state_dict().values()))


def test_a_step_behind_the_learner_learns_too(tokenizer, config, tmp_path):
    """Age 1 with weights that change in flight, through a worker: the log-probabilities show it, and stay near."""
    rows = run(tokenizer, tmp_path / "a", replace(config, sync=False), Short(infer.rollout_engine(slots=7, draft=3))).rows
    assert [row["age"] for row in rows] == [0, 1, 1, 1]
    assert rows[0]["dlogp"] < 1e-5 and all(1e-5 < row["dlogp"] < 0.5 for row in rows[2:])


# ---- new weights in flight

def work(engine, in_flight, n):
    """What data/worker.py's process draws when newer weights are published while pass n of the model runs."""
    new, sent = make(9), []
    shared = worker.SharedWeights(make(), 3)

    def draw(model, step, version):
        calls = itertools.count(1)
        model.backbone.embeddings.register_forward_pre_hook(lambda *_: shared.publish(new, 4) if next(calls) == n else None)
        return version, engine(model, prompts(2, 1, 5, 20), replace(FREE, stop_ids=()))

    pipe, threads = type("Pipe", (), dict(send=staticmethod(sent.append))), torch.get_num_threads()
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    try: worker.work(draw, partial(make, 1), "cpu", shared, range(3, 4), 1, in_flight, 1, pipe)
    finally:
        for which, handler in handlers.items(): signal.signal(which, handler)
        torch.set_num_threads(threads)
    assert sent[0][0] == 3, sent
    return sent[0][1]


@pytest.mark.parametrize("n", [1, 6])
def test_new_weights_reach_the_middle_of_an_answer(n):
    """Without drafts a step writes one token, as a pass of 04's generate does: same dice, same change behind token n, same text. Not in flight: the
    old weights to the end."""
    theirs, ours = (work(engine, True, n) for engine in (rlvr.sampled, infer.rollout_engine(slots=2)))
    old = work(infer.rollout_engine(slots=2), False, n)
    for a, b, c in zip(ours, theirs, old):
        assert a.ids == b.ids and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert a.ids[:n] == c.ids[:n] and a.logprobs[:n] == c.logprobs[:n] and a.logprobs[n] != pytest.approx(c.logprobs[n], abs=1e-3)


def exchange(model, n):
    """Weights that change in place at call n of the embedding's hook; the list grows by one a call. A_log stays: the replay rollback would apply a
    new one to the inputs that it keeps, too."""
    calls, new = [], {name: x for name, x in make(9).state_dict().items() if not name.endswith("A_log")}

    def hook(*_):
        calls.append(1)
        if len(calls) == n:
            for name, x in new.items(): model.state_dict()[name].copy_(x)
    model.backbone.embeddings.register_forward_pre_hook(hook)
    return calls, new


@pytest.mark.parametrize("rollback", ["snapshot", "replay"])
def test_drafts_are_verified_by_the_weights_that_their_log_probabilities_are_of(rollback):
    """Weights change before step 5 and never inside a window: 04's cache, fed window by window with the weights of its step, says the same."""
    model, pieces = make(), {}
    calls, new = exchange(model, 5)
    engine = infer.Engine(model, 3, 80, draft=3, rollback=rollback, forced=0.7)      # forced: windows of all lengths
    watch = lambda id, ids, text: pieces.setdefault(id, []).append((len(calls), ids))
    asked, steps, done = prompts(3, 2, 5, 20), 0, {}
    for i, prompt in enumerate(asked): engine.submit(prompt, infer.SamplingParams(**vars(replace(FREE, max_tokens=30, stop_ids=())) | dict(
        logprobs=True)), watch, i)
    while not engine.idle: done.update(engine.step()); steps += 1
    assert len(calls) == steps > 6
    for i, prompt in enumerate(asked):
        again, said, pending = make(), [], prompt[-1]
        cache = again.empty_cache(1, 60)
        with torch.inference_mode():
            if prompt[:-1]: again.hidden(torch.tensor([prompt[:-1]]), None, cache)
            for step, ids in pieces[i]:
                if step == 5: again.load_state_dict(new, strict=False)
                for token in ids:
                    said.append(again.lm_head(again.hidden(torch.tensor([[pending]]), None, cache)[0, -1]).log_softmax(-1)[token].item())
                    pending = token
        assert done[i].logprobs == pytest.approx(said, abs=1e-4) and {len(ids) for _, ids in pieces[i][:-1]} >= {1, 4}


def test_a_recorded_step_finds_new_weights_and_no_hook(monkeypatch):
    """In a replay nothing of Python runs, so a hook inside of it would be called while recording and never again."""
    def serve(replayed):
        model = make()
        engine = on_a_gpu(monkeypatch, model, 2, 60, 2, "snapshot", "fp32")
        if replayed: engine.graphs = infer.StepGraphs(engine.caches, engine.running)
        Replayed.engine, (calls, _), steps = engine, exchange(model, 9), 0
        for i, prompt in enumerate(prompts(4, 5, 2, 20)):
            engine.submit(prompt, infer.SamplingParams(**vars(replace(FREE, stop_ids=())) | dict(logprobs=True)), place=i)
        done = {}
        while not engine.idle: done.update(engine.step()); steps += 1
        assert len(calls) == steps > 20
        return [(done[i].ids, done[i].logprobs) for i in range(4)]

    monkeypatch.setattr(infer.pretrain, "Recorded", Replayed)
    before, ours = Replayed.replays, serve(True)
    assert Replayed.replays > before + 15
    assert ours == serve(False)


# ---- one Engine for many calls

@pytest.fixture
def recording(monkeypatch):
    """Engines that stay, as on a GPU, where they have recorded their steps."""
    class Recording(infer.Engine):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.graphs = lambda how: infer.packed_step(self.caches, self.running)
    monkeypatch.setattr(infer, "Engine", Recording)


@pytest.mark.parametrize("options", [dict(state_format="fp16_sr"), dict(draft=2), dict(draft=3, rollback="replay", state_format="fp16_sr")], ids=str)
def test_later_calls_answer_as_the_first(recording, options):
    """Slots, dice of stochastic rounding, lengths and rings of an Engine that stays: nothing that a call leaves is seen by the next."""
    model, engine, asked, long = make(), infer.rollout_engine(slots=3, **options), prompts(7, 4), replace(FREE, seed=4, max_tokens=33)
    first, kept, near = engine(model, asked, FREE), engine.kept[1], 1e-2 if "state_format" in options else 1e-4
    other = engine(model, prompts(5, 8), long)
    assert engine.kept[1] is kept and kept.idle and same(engine(model, asked, FREE), first, near)
    assert same(infer.rollout_engine(slots=3, **options)(model, prompts(5, 8), long), other, near)
    assert kept.caches.seed_l.equal(infer.Engine(model, 3, **options).caches.seed_l)


def test_an_engine_stays_while_it_fits(recording):
    """Another model, weights that lie elsewhere (a recorded step would read the old ones), longer texts and other numbers of slots need a new one."""
    engine, model, asked = infer.rollout_engine(slots=3, draft=2), make(), prompts(4, 4)
    few = replace(FREE, max_tokens=6)

    def keeps(model, asked):
        before, answers = engine.kept[1], engine(model, asked, few)
        assert same(answers, infer.rollout_engine(slots=3, draft=2)(model, asked, few))
        return engine.kept[1] is before
    assert not keeps(model, asked) and keeps(model, asked[:3]) and engine.kept[1].caches.capacity == 256
    assert keeps(model, [[30] * 250] * 3) and not keeps(model, [[30] * 251] * 3)
    assert keeps(model, asked) and engine.kept[1].caches.capacity == 512
    assert not keeps(model, asked[:2]) and engine.kept[1].caches.slots == 2 and not keeps(model, asked)
    assert not keeps(make(6), asked) and not keeps(model, asked)
    for p in model.parameters(): p.mul_(1.1)
    assert keeps(model, asked)
    model.lm_head.weight.data = model.lm_head.weight * 1.1
    assert not keeps(model, asked)


def test_a_call_that_failed_leaves_nothing_behind(recording, monkeypatch):
    """A bad prompt behind good ones, and Ctrl-C in the middle: the next call must not answer their requests."""
    engine, model, asked, decode = infer.rollout_engine(slots=3, draft=2), make(), prompts(6, 4), infer.Engine.decode
    first, calls = engine(model, asked, FREE), itertools.count(1)
    with pytest.raises(ValueError, match="outside the vocabulary"): engine(model, [*asked, [96]], FREE)
    assert same(engine(model, asked, FREE), first)

    def interrupted(self):
        if next(calls) == 4: raise KeyboardInterrupt
        decode(self)
    monkeypatch.setattr(infer.Engine, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt): engine(model, asked, FREE)
    assert engine.kept == (None, None) and same(engine(model, asked, FREE), first) and engine.kept[1].submitted == len(asked)


def test_pickling_leaves_caches_and_graphs_behind(recording):
    engine = infer.rollout_engine(slots=3, draft=2, rollback="replay")
    engine(make(), prompts(4, 4), FREE)
    data = pickle.dumps(engine)
    copy = pickle.loads(data)
    assert len(data) < 500 and copy.kept == (None, None)
    assert (copy.slots, copy.options) == (3, dict(draft=2, rollback="replay")) and engine.kept[1] is not None


def test_a_cpu_makes_a_new_engine_for_each_call():
    """There is nothing recorded to keep, and bits do not depend on what was drawn before."""
    engine, model, asked = infer.rollout_engine(slots=3, draft=2), make(), prompts(7, 4)
    first, _ = engine(model, asked, FREE), engine(model, prompts(5, 8), FREE)
    assert [x.logprobs for x in engine(model, asked, FREE)] == [x.logprobs for x in first] and engine.kept == (None, None)
