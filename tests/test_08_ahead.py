"""Stage 08's engine with several windows between two looks of the host, against 04's generate, against one window at a time, and by hand."""
import dataclasses
import importlib
import random
import types

import pytest
import test_08_engine as base
import torch
from test_08_engine import MICRO, prompts
from test_08_rollouts import FREE, exchange, make
from torch.utils._python_dispatch import TorchDispatchMode

from data import terminal

nemotron, infer = (importlib.import_module(m) for m in ("04_model", "08_infer"))
Engine, SamplingParams = infer.Engine, infer.SamplingParams
model, tokenizer = base.model, base.tokenizer       # fixtures
AHEAD = (1, 2, 5, 8)
WAYS = [(0, "snapshot"), (3, "snapshot"), (3, "replay")]
ways = pytest.mark.parametrize("k, rollback", WAYS)


def mixed(n, seed=0):
    """(prompts, ways to answer): lengths, seeds, stop ids, greedy and drawn, by turns."""
    rng = random.Random(seed)
    how = [SamplingParams(max_tokens=rng.randint(1, 30), temperature=(0.0, 1.0, 0.7)[i % 3], top_p=(1.0, 0.9)[i % 2], seed=i, logprobs=i % 4 < 2,
                          stop_ids=tuple(rng.sample(range(20, 96), 6)) if i % 5 else ()) for i in range(n)]
    return prompts(n, seed, 1, 25), how


def serve(engine, asked, how, on_tokens=None):
    ids = [engine.submit(p, s, on_tokens, place=i) for i, (p, s) in enumerate(zip(asked, how))]
    done = engine.run()
    return [done[i] for i in ids]


def told(answers): return [(a.ids, a.text, a.reason, a.finished, a.inserted) for a in answers]


def watched(engine):
    """Checks every pass: tokens that are there lie in cells that a slot has, and their dice in its row."""
    rows, caches = engine.caches.rows, engine.caches

    def checked(*args, **kwargs):
        out = rows(*args, **kwargs)
        assert (out.at_rt[out.real_rt] < caches.capacity + caches.draft).all() and (engine.running.made_b <= caches.capacity + caches.draft).all()
        return out
    caches.rows = checked
    return engine


# ---- the same answers

@ways
def test_answers_do_not_depend_on_how_far_ahead_windows_run(model, k, rollback):
    """Twenty requests of all sorts over four slots, some up to the last cell: ids and ends are those of 04's generate, alone (drawn with drafts:
    those of one window at a time), and no window leaves its slot's cells. A slot that went on would leak, or end late."""
    asked, how = mixed(20)
    asked[3], asked[8], how[8] = [30] * 38, [31] * 40, dataclasses.replace(how[8], stop_ids=())
    first = None
    for ahead in AHEAD:
        engine = watched(Engine(model, 4, 40, draft=k, rollback=rollback, prefill_tokens=16, ahead=ahead))
        answers = serve(engine, asked, how)
        first = first or answers
        assert told(answers) == told(first)
        for a, b, s in zip(answers, first, how):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4) and len(a.logprobs) == len(a.ids) * s.logprobs
    for i, (a, p, s) in enumerate(zip(first, asked, how)):
        if k and s.temperature: continue
        room = 41 - len(p)
        plain = nemotron.SamplingParams(min(s.max_tokens, room), s.temperature, s.top_p, s.seed, s.stop_ids)
        want = nemotron.generate(model, [[5]] * i + [p], plain)[i]      # 04's dice go by place, so there are i others before it
        assert a.ids == want.ids and a.reason == ("stop_id" if want.finished else "length" if s.max_tokens <= room else "cache"), i
    assert {a.reason for a in first} == {"stop_id", "length", "cache"}


@pytest.mark.parametrize("k", [0, 2])
def test_a_load_with_cancellations_mixes_nothing(model, k):
    """Eighty requests come in bursts, some stream, some are cancelled between steps: each answer is the one alone, or its beginning."""
    rng, (asked, how) = random.Random(k), mixed(80, 5)
    how = [dataclasses.replace(s, temperature=0.0, seed=i) for i, s in enumerate(how)]
    alone = [serve(Engine(model, 1, 60), [p], [s])[0] for p, s in zip(asked, how)]
    engine, done, gone, heard, todo = Engine(model, 5, 60, draft=k, prefill_tokens=20, ahead=5), {}, set(), {}, list(range(80))
    hear = lambda id, ids, text: heard.setdefault(id, []).extend(ids)
    while todo or not engine.idle:
        for _ in range(rng.choice([0, 1, 2, 9])):
            if todo: engine.submit(asked[i := todo.pop(0)], how[i], hear if i % 3 == 0 else None)
        if rng.random() < 0.4 and engine.owners: engine.cancel(id := rng.choice([r.id for r in engine.owners.values()])); gone.add(id)
        done |= dict(engine.step())
    assert len(done) == 80 and 5 < len(gone) < 40 and any(a.ids for i, a in done.items() if i in gone)
    for i, a in done.items():
        assert a.ids == alone[i].ids[:len(a.ids)] if i in gone else told([a]) == told([alone[i]])
        if i % 3 == 0: assert heard.get(i, []) == a.ids


@pytest.mark.parametrize("k, rollback", [(0, "snapshot"), (3, "replay")])
def test_a_prefix_cache_hits_as_with_one_window(model, k, rollback):
    """Shared beginnings over three slots: the same answers, and blocks are found."""
    rng = random.Random(3)
    starts = [[rng.randrange(20, 96) for _ in range(16)] for _ in range(2)]
    asked = [starts[i % 2] + [rng.randrange(20, 96) for _ in range(rng.randint(1, 6))] for i in range(12)]
    how, out = [SamplingParams(max_tokens=rng.randint(1, 12), temperature=i % 2, seed=i, stop_ids=(40, 50)) for i in range(12)], []
    for ahead, stored in ((1, 0), (1, 10**8), (5, 10**8)):
        engine = Engine(model, 3, 60, draft=k, rollback=rollback, ahead=ahead, prefix_bytes=stored, prefix_block=8)
        out.append(told(serve(engine, asked, how)))
        assert not stored or engine.prefixes.hits >= 6
    assert out[0] == out[1] == out[2]


# ---- streams, stop strings, budgets

@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("stop", [("ENDE", "zzz"), ("E E",), ()])
def test_a_stream_says_the_same_pieces_in_bursts(tokenizer, monkeypatch, k, stop):
    """Every call of on_tokens, ids and text, is that of one window at a time; without a stream the answer is the same."""
    base.Scripted(monkeypatch, tokenizer.encode("grün ENE ENDE and Ω more") + [2, 50])
    big, heard, out = base.wide_model(-(-len(tokenizer) // 16) * 16), {}, []
    for ahead in AHEAD:
        for stream in (lambda id, ids, text, ahead=ahead: heard.setdefault(ahead, []).append((id, ids, text)), None):
            engine = Engine(big, 2, 64, draft=k, tokenizer=tokenizer, ahead=ahead)
            s = SamplingParams(max_tokens=40, stop=stop, stop_ids=(2,), logprobs=True)
            out.append(told(serve(engine, [[100], [101]], [s, dataclasses.replace(s, max_tokens=3)], stream)))
            assert all(len(a.logprobs) == len(a.ids) for a in serve(engine, [[100]], [s]))
    want = {("ENDE", "zzz"): "grün ENE ", ("E E",): "grün EN", (): "grün ENE ENDE and Ω more"}[stop]
    assert all(x == out[0] for x in out) and all(x == heard[1] for x in heard.values())
    assert out[0][0][1:3] == (want, "stop" if stop else "stop_id") and out[0][1][1:3] == ("gr\ufffd", "length")
    assert "".join(text for id, _, text in heard[8] if id == 0) == want


@pytest.mark.parametrize("victim", [0, 1])
@ways
def test_a_stream_that_cancels_stops_where_one_window_at_a_time_stops(model, k, rollback, victim):
    """Request 0 cancels itself, or another that streams nothing, at its n-th piece: what the GPU has computed beyond must not be in the answers."""
    asked, s = prompts(3, 9, 5, 12), SamplingParams(max_tokens=16, temperature=0.0, stop_ids=())
    for n in (1, 4):
        out = []
        for ahead in AHEAD:
            engine, calls = Engine(model, 2, 64, draft=k, rollback=rollback, ahead=ahead), []

            def stream(id, ids, text, engine=engine, calls=calls, n=n):
                calls.append(ids)
                if len(calls) == n: assert engine.cancel(victim)
            engine.submit(asked[0], s, stream); engine.submit(asked[1], s); engine.submit(asked[2], s)
            done = engine.run()
            out.append((told(done[i] for i in range(3)), calls))
            assert done[victim].reason == "cancelled" and len(done[victim].ids) < 16 and done[2].reason == "length"
        assert all(x == out[0] for x in out)


@pytest.mark.parametrize("text, n, margin", [("ab\ncdefgh\nij", 4, 500), ("abcdefghijkl", 4, 3), ("abc</think>x\ny", 2, 1)])
@pytest.mark.parametrize("k", [0, 3])
def test_budgets_close_traces_at_the_same_token(tokenizer, monkeypatch, text, n, margin, k):
    base.Scripted(monkeypatch, tokenizer.encode(text) + [11])
    big, s, out = base.wide_model(-(-len(tokenizer) // 16) * 16), SamplingParams(max_tokens=30, logprobs=True, budget=n, margin=margin), []
    for ahead in AHEAD:
        engine = Engine(big, 2, 256, draft=k, tokenizer=tokenizer, ahead=ahead)
        out.append(told(infer.generate_with_budget(engine, [[dict(role="user", content="2+2?")]] * 3, "regular", s)))
    assert all(x == out[0] for x in out) and out[0][0][4] is not None


def test_a_budget_with_a_real_model(tokenizer):
    """The trace goes on from the prompt with the insertion in it: tokens that were launched behind it are not the answer's."""
    big, s, out = base.wide_model(-(-len(tokenizer) // 16) * 16), SamplingParams(max_tokens=20, budget=3, margin=2, seed=5), []
    for ahead in AHEAD:
        engine = Engine(big, 2, 256, tokenizer=tokenizer, ahead=ahead)
        out.append(told(infer.generate_with_budget(engine, [[dict(role="user", content=x)] for x in "abc"], "regular", s)))
    assert all(x == out[0] for x in out) and any(x[4] is not None for x in out[0])


@pytest.mark.parametrize("k", [0, 2])
def test_an_answer_ends_at_the_first_of_its_ends(monkeypatch, tokenizer, k):
    """Tokens come eight windows at once; where they end is counted out one by one: stop id, max_tokens, the last cell, two of them at one token."""
    script = [20, 30, 20, 40, 41, 42, 43, 50, 51, 52, 53, 54, 55, 56, 57, 58]
    base.Scripted(monkeypatch, script)
    big = base.wide_model(-(-len(tokenizer) // 16) * 16)
    for words in (None, tokenizer):
        engine = Engine(big, 3, 12, draft=k, ahead=8, tokenizer=words)
        for stop in ((), (30,), (42, 50), (58,), (20, 56)):
            for most in range(1, 16):
                for n in (1, 4, 12):
                    ids, reason = [], None
                    for token in script:
                        ids.append(token)
                        reason = "stop_id" if token in stop else "length" if len(ids) == most else "cache" if n + len(ids) > 12 else None
                        if reason: break
                    answer, = serve(engine, [[60] * n], [SamplingParams(most, stop_ids=stop)])
                    assert (answer.ids, answer.reason, answer.finished) == (ids, reason, reason == "stop_id")
                    assert answer.text == ("" if words is None else tokenizer.decode(ids[:-1] if answer.finished else ids))


def test_what_may_become_a_stop_string_is_held_back():
    """The longest beginning of one that the text ends with; a whole one would have stopped it."""
    for text, stops, n in (("so ab", ("abc",), 2), ("", ("abc",), 0), ("aab", ("ab", "abab"), 2), ("aba", ("abab",), 3), ("x", (), 0)):
        assert terminal.held_back(text, stops) == n


# ---- windows

def test_windows_are_launched_only_where_they_can_matter(model, monkeypatch):
    """One while a prompt is being read, `ahead` when all are, and no more than the longest answer still has tokens."""
    step, windows = infer.packed_step, []
    monkeypatch.setattr(infer, "packed_step", lambda *args: windows.append(1) or step(*args))
    engine = Engine(model, 3, 64, prefill_tokens=10, ahead=4)
    for n, most in ((5, 14), (28, 7)): engine.submit([30] * n, SamplingParams(max_tokens=most, temperature=0.0, stop_ids=()))
    counts = []
    while not engine.idle: before = len(windows); engine.step(); counts.append(len(windows) - before)
    assert counts == [1, 1, 1, 4, 4, 3]     # steps 1 to 4 read 4 + 6, 10, 10 and 1 tokens; the first answer has 14, one a window


@ways
def test_a_full_answer_stops_by_itself(model, k, rollback):
    """Counters of drafts are those of one window at a time when only the length ends answers, and nothing of a stopped slot moves any more."""
    counts = []
    for ahead in AHEAD:
        engine = Engine(model, 3, 40, draft=k, rollback=rollback, ahead=ahead)
        serve(engine, [[30], [31, 32], [40]], [SamplingParams(max_tokens=n, temperature=0.0, stop_ids=()) for n in (20, 9, 100)])
        counts.append((engine.running.offered_k.tolist(), engine.running.accepted_k.tolist(), engine.running.made_b.tolist()))
        assert not engine.running.new_b.any() and (engine.running.made_b < torch.tensor([20, 9, 40]) + k + 1).all()
        assert (engine.caches.length_b <= torch.tensor([21, 11, 41]) + k).all()
    assert all(x == counts[0] for x in counts)


@ways
def test_results_that_share_one_memory_are_kept_apart(model, k, rollback):
    """A recorded step writes every result over the last one."""
    asked, how = mixed(6, 2)
    out = []
    for shared in (False, True):
        engine, memory = Engine(model, 3, 64, draft=k, rollback=rollback, ahead=5), {}

        def replay(how, engine=engine, memory=memory):
            x = infer.packed_step(engine.caches, engine.running)
            return memory.setdefault(how, torch.empty_like(x)).copy_(x)
        if shared: engine.graphs = replay
        out.append(told(serve(engine, asked, how)))
    assert out[0] == out[1]


def test_weights_change_between_looks_only():
    """New weights come before the fifth look of three windows: each token has the log-probability of the weights of its look."""
    model, pieces = make(), {}
    calls, new = exchange(model, 5)
    engine = Engine(model, 3, 80, draft=2, ahead=3, forced=0.7)
    watch = lambda id, ids, text: pieces.setdefault(id, []).append((len(calls), ids))
    asked, done, steps = prompts(3, 2, 5, 20), {}, 0
    how = SamplingParams(**vars(dataclasses.replace(FREE, max_tokens=40, stop_ids=())) | dict(logprobs=True))
    for i, prompt in enumerate(asked): engine.submit(prompt, how, watch, i)
    while not engine.idle: done.update(engine.step()); steps += 1
    assert len(calls) == steps > 6
    for i, prompt in enumerate(asked):
        again, said, pending = make(), [], prompt[-1]
        cache = again.empty_cache(1, 80)
        with torch.inference_mode():
            again.hidden(torch.tensor([prompt[:-1]]), None, cache)
            for step, ids in pieces[i]:
                if step == 5: again.load_state_dict(new, strict=False)
                for token in ids:
                    said.append(again.lm_head(again.hidden(torch.tensor([[pending]]), None, cache)[0, -1]).log_softmax(-1)[token].item())
                    pending = token
        assert done[i].logprobs == pytest.approx(said, abs=1e-4) and sum(step == 4 for step, _ in pieces[i]) == 3


# ---- admission

class Writes(TorchDispatchMode):
    def __init__(self): super().__init__(); self.n = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.n += any(word in str(op) for word in ("index_put", "copy_", "fill_", "zero_", "scatter"))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("k, rollback", [(0, "snapshot"), (3, "replay")])
def test_requests_that_enter_together_find_their_own_numbers(model, k, rollback):
    """Nine enter six slots that others have left, with unequal dice: each slot holds its request's token, counts, limit, temperature to the last bit,
    and dice; states and windows are zero there and only there. As many writes for one as for six."""
    engine, (asked, how) = Engine(model, 8, 40, draft=k, rollback=rollback, ahead=2), mixed(9, 4)
    how[2] = dataclasses.replace(how[2], max_tokens=100)
    stay = [engine.submit([50, 51], SamplingParams(max_tokens=30, temperature=0.0, stop_ids=())) for _ in range(8)]
    for _ in range(3): engine.step()
    for i in (0, 2, 3, 5, 6, 7): engine.cancel(stay[i])
    ids = [engine.submit(p, s, place=i) for i, (p, s) in enumerate(zip(asked, how))]
    before = {name: z.clone() for name, z in vars(engine.running).items() if isinstance(z, torch.Tensor)}
    for pool in engine.caches.mambas: pool.window_bwc.fill_(3); [z.fill_(3) for z in infer.mamba.parts(pool.state)]
    engine.admit()
    assert {slot: r.id for slot, r in engine.owners.items()} == {1: stay[1], 4: stay[4]} | dict(zip((0, 2, 3, 5, 6, 7), ids))
    assert [r.id for r in engine.queue] == ids[6:]
    run, caches = engine.running, engine.caches
    for slot, i in zip((0, 2, 3, 5, 6, 7), range(6)):
        n = min(how[i].max_tokens, 41 - len(asked[i]))
        assert (run.ids_bw[slot, 0], run.new_b[slot], run.made_b[slot], run.limit_b[slot]) == (asked[i][-1], len(asked[i]) == 1, 0, n)
        assert (run.temperature_b[slot].item(), run.top_p_b[slot].item()) == (how[i].temperature, how[i].top_p)
        assert torch.equal(run.dice_b3i[slot, :, :n], infer.dice(how[i], i)[:, :n]) and not run.hidden_bwd[slot, 0].any()
        assert caches.length_b[slot] == caches.head_length_b[slot] == caches.entry_b[slot] == caches.kept_b[slot] == 0
        for z in (z for pool in caches.mambas for z in (pool.window_bwc[slot], *(x[slot * caches.entries] for x in infer.mamba.parts(pool.state)))):
            assert not z.any()
    for slot in (1, 4):
        for name, z in before.items():
            if z.shape[:1] == (8,): assert torch.equal(getattr(run, name)[slot], z[slot]), name
        for pool in caches.mambas: assert (pool.window_bwc[slot] == 3).all() and (pool.state[slot * caches.entries] == 3).all()
    counts = []
    for n in (1, 6):
        engine = Engine(model, 8, 40, draft=k, rollback=rollback)
        for i in range(n): engine.submit(asked[i], dataclasses.replace(how[i], max_tokens=9))
        with Writes() as writes: engine.admit()
        counts.append(writes.n)
    assert counts[0] == counts[1]


def test_a_slot_left_between_steps_decodes_no_more(model):
    """A cancelled request's slot that nobody takes: its lengths stay, and the next owner begins new."""
    engine = Engine(model, 2, 40, ahead=3)
    ids = [engine.submit([30 + i], SamplingParams(max_tokens=30, temperature=0.0, stop_ids=())) for i in range(2)]
    engine.step(); engine.cancel(ids[0]); engine.step()
    length = engine.caches.length_b.tolist()
    engine.step()
    assert engine.caches.length_b[0] == length[0] and engine.caches.length_b[1] == length[1] + 3 and not engine.running.new_b[0]


# ---- rollouts

@pytest.mark.parametrize("options", [dict(ahead=8), dict(ahead=5, draft=3)], ids=str)
def test_rollouts_ahead_are_rollouts(options):
    model, asked = make(), prompts(9, 4)
    one, other = (infer.rollout_engine(slots=3, **o)(model, asked, FREE) for o in (options | dict(ahead=1), options))
    assert [(x.ids, x.finished) for x in one] == [(x.ids, x.finished) for x in other]
    for a, b in zip(one, other): assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    if "draft" not in options: assert [x.ids for x in other] == [x.ids for x in nemotron.generate(model, asked, FREE)]


def test_a_gpu_gets_more_slots_and_fewer_looks(monkeypatch):
    """What rollout_engine asks of Engine, on a GPU and on a CPU; what is told wins."""
    seen = []

    class Asked(Exception): pass

    def engine(model, **size): seen.append(size); raise Asked
    monkeypatch.setattr(infer, "Engine", engine)

    def size(gpu, *args, **options):
        weight = types.SimpleNamespace(is_cuda=gpu)
        model = types.SimpleNamespace(lm_head=types.SimpleNamespace(weight=weight), state_dict=dict)
        with pytest.raises(Asked): infer.rollout_engine(*args, **options)(model, [[1] * 9] * 5, FREE)
        return seen[-1]
    assert size(False) == dict(slots=5, capacity=256) and size(False, 3, draft=2) == dict(slots=3, capacity=256, draft=2)
    assert size(True) == dict(slots=256, capacity=256, ahead=8, prefill_tokens=8192)
    assert size(True, 2048, ahead=2, capacity=300) == dict(slots=2048, capacity=300, ahead=2, prefill_tokens=8192) and size(True, 0)["slots"] == 0


def test_no_window_is_refused():
    with pytest.raises(ValueError, match="at least 1"): Engine(nemotron.Nemotron(MICRO), ahead=0)
