"""The prefix cache of stage 08 against an engine without one, against prefills from the start, and against sets of prefixes kept by hand."""
import dataclasses
import importlib
import random

import pytest
import test_08_engine as base
import torch

from data import prefixes
from data.prefixes import Prefixes

mamba, nemotron, infer = (importlib.import_module(m) for m in ("02_mamba", "04_model", "08_infer"))
Engine, SamplingParams, KVPool = infer.Engine, infer.SamplingParams, infer.KVPool
trained, BLOCK, ROOM = base.model, 8, 10**9
WAYS = [(0, "snapshot", None), (3, "snapshot", None), (3, "replay", None), (0, "snapshot", "fp8"), (3, "replay", "fp8")]
ways = pytest.mark.parametrize("k, rollback, kv_format", WAYS)


@pytest.fixture(scope="module")
def model(trained):
    """In fp64, where products of other shapes differ by 1e-15: what differs by more is wrong."""
    return base.copy_of(trained).double()


def text(n, seed):
    rng = random.Random(seed)
    return [rng.randrange(20, 96) for _ in range(n)]


def sampling(i, n=7):
    """Greedy and drawn, by turns."""
    return SamplingParams(max_tokens=n, temperature=float(i % 2), top_p=(1.0, 0.9)[i // 2 % 2], seed=i, logprobs=True, stop_ids=())


def engine_of(model, slots=2, prefix_bytes=ROOM, **options):
    """reads: how many tokens of prompts its trunk was given; passes: in passes of how many."""
    engine = Engine(model, slots, options.pop("capacity", 96), prefix_bytes=prefix_bytes, prefix_block=BLOCK, **options)
    trunk, engine.reads, engine.passes = engine.caches.trunk, 0, []

    def counted(ids_rt, rows):
        if not rows.every: engine.reads += int(rows.count_r.sum()); engine.passes.append(ids_rt.shape[1])
        return trunk(ids_rt, rows)

    engine.caches.trunk = counted
    return engine


def ask(engine, prompt, how):
    """(answer, tokens of the prompt that were read)."""
    before, id = engine.reads, engine.submit(prompt, how)
    return engine.run()[id], engine.reads - before


def same(a, b): return (a.ids, a.reason) == (b.ids, b.reason) and a.logprobs == pytest.approx(b.logprobs, abs=1e-9)


class ByHand:
    """Which prefixes of whole blocks have been read, as a set, and what that leaves to read of a prompt."""
    def __init__(self): self.seen = set()

    def to_read(self, prompt):
        n = len(prompt) - 1         # the last token is decoding's
        known = max(m for m in range(n + 1) if m == 0 or tuple(prompt[:m]) in self.seen)
        self.seen |= {tuple(prompt[:m]) for m in range(BLOCK, n + 1, BLOCK)}
        return n - known


# ---- the store

def test_the_longest_stored_prefix_is_found_and_the_one_longest_unused_goes():
    """Worked by hand, blocks of 2, 32 bytes an entry and room for three: an entry that was asked for stays, the oldest unasked goes."""
    store, ones = Prefixes(100, 2), lambda x: {"a": torch.full((4,), float(x)), "b": torch.full((2, 2), float(x))}
    assert store.find([1, 2, 3]) == (0, {}) and (store.hits, store.misses, store.saved, store.nbytes) == (0, 1, 0, 0)
    store.store([1, 2], ones(1)); store.store([1, 2, 3, 4], ones(2)); store.store([5, 6], ones(3))
    assert store.nbytes == 96
    for ids, n, x in (([1, 2, 3, 4, 9], 4, 2), ([1, 2, 3, 4], 4, 2), ([1, 2, 3], 2, 1), ([1, 2, 9, 4], 2, 1), ([1, 2, 4, 3, 3, 4], 2, 1)):
        length, found = store.find(ids)
        assert length == n and found["a"].tolist() == [x] * 4 and found["b"].shape == (2, 2)
    for ids in ([], [1], [2, 1], [9, 1, 2], [3, 4], [6, 5]): assert store.find(ids)[0] == 0
    assert (store.hits, store.misses, store.saved) == (5, 7, 14)
    store.store([7, 8], ones(4))            # [5, 6] has not been asked for since it came
    assert store.nbytes == 96 and [store.find(ids)[0] for ids in ([5, 6], [1, 2, 3, 4], [1, 2], [7, 8])] == [0, 4, 2, 2]
    store.store([1, 2, 3, 4], ones(9))      # is there: used now, and not written again
    store.store([5, 6], ones(5))
    assert [store.find(ids)[0] for ids in ([1, 2, 3, 4], [1, 2], [7, 8], [5, 6])] == [4, 0, 2, 2] and store.find([1, 2, 3, 4])[1]["a"][0] == 2
    store.store([3, 3], {"a": torch.zeros(26)})         # 104 bytes: nothing is driven out for what does not fit
    assert store.nbytes == 96 and store.find([3, 3])[0] == 0 and store.find([5, 6])[0] == 2
    store.store([3, 3], {"a": torch.zeros(25)})
    assert store.nbytes == 100 and len(store.entries) == 1


def test_prefixes_that_end_alike_do_not_displace_each_other():
    """A hash of the last block alone would still answer right, and keep one of these three."""
    store, texts = Prefixes(1000, 2), [[9, 9], [1, 2, 9, 9], [3, 4, 9, 9]]
    for i, ids in enumerate(texts): store.store(ids, {"a": torch.tensor(i)})
    assert [store.find(ids)[1]["a"].item() for ids in texts] == [0, 1, 2]


def test_entries_are_copies_of_their_own_size():
    """A view of a pool would change with it, and keep all of it in memory while a few bytes are counted."""
    store, pool = Prefixes(1000, 1), torch.arange(1000.0).view(10, 2, 50)
    store.store([4], {"k": pool[3, :, :7]})
    want = pool[3, :, :7].clone(); pool.zero_()
    (n, found), view = store.find([4, 5]), torch.ones(2, 7)
    assert n == 1 and torch.equal(found["k"], want) and found["k"].untyped_storage().nbytes() == store.nbytes == 2 * 7 * 4
    assert store.load([4, 5], lambda n: {"k": view}) == 1 and torch.equal(view, want)
    assert store.load([5], lambda n: 1 / 0) == 0


def test_senseless_sizes_are_refused():
    for limit, block in ((-1, 8), (10, 0)):
        with pytest.raises(ValueError, match="use 0 bytes"): Prefixes(limit, block)
    for ids in ([], [1, 2, 3]):
        with pytest.raises(ValueError, match="whole blocks"): Prefixes(10, 2).store(ids, {})


@pytest.mark.parametrize("chain", [lambda before, block: 7, lambda before, block: block[0] % 2], ids=["all alike", "two hashes"])
def test_two_prefixes_of_one_hash_are_not_taken_for_each_other(monkeypatch, model, chain):
    """Every hash collides: found is what was stored for these ids or nothing, and the engine answers as without a cache."""
    monkeypatch.setattr(prefixes, "chain", chain)
    store = Prefixes(100, 2)
    store.store([1, 2], {"a": torch.ones(5)}); store.store([3, 4], {"a": torch.zeros(4)})
    assert store.find([3, 4, 5])[0] == 2 and store.find([1, 2])[0] == store.find([1, 3])[0] == 0 and store.nbytes == 16
    one, other = engine_of(model, draft=2), engine_of(model, prefix_bytes=0, draft=2)
    for i in range(6):
        prompt = text(17, i % 3) + text(5, i)
        assert same(ask(one, prompt, sampling(i))[0], ask(other, prompt, sampling(i))[0])
    assert one.prefixes.misses > 0


# ---- answers

@ways
def test_answers_are_those_of_an_engine_without_a_cache(model, k, rollback, kv_format):
    """Shared beginnings shorter than a block, a block, one token more, several blocks; prompts that end at a boundary, before and behind it. Ids,
    ends and log-probabilities are the same, and the tokens read are those of no stored prefix, counted with a set."""
    options, hand = dict(draft=k, rollback=rollback, kv_format=kv_format, prefill_tokens=20), ByHand()
    one, other = engine_of(model, **options), engine_of(model, prefix_bytes=0, **options)
    saved = i = 0
    asked = [text(shared, shared) + text(tail, 100 * shared + tail) for shared in (5, 8, 9, 16, 17, 27) for tail in (1, 5, 13)]
    for prompt in [*asked, asked[-1][:8], asked[-1][:16], asked[-1][:25], asked[-1]]:       # also what is stored to its last token
        i, (ours, read), (plain, whole) = i + 1, ask(one, prompt, sampling(i)), ask(other, prompt, sampling(i))
        assert same(ours, plain), prompt
        assert read == hand.to_read(prompt) and whole == len(prompt) - 1, prompt
        saved += whole - read
    assert read == (len(prompt) - 1) % BLOCK and saved > 80
    assert one.prefixes.saved == saved and one.prefixes.hits + one.prefixes.misses == i
    if k: assert 0.02 < one.acceptance()[0] < 0.98 and one.acceptance()[0] == pytest.approx(other.acceptance()[0], abs=0.1)


@pytest.mark.parametrize("k, rollback", [(0, "snapshot"), (3, "snapshot"), (3, "replay")])
@pytest.mark.parametrize("tail", [1, 2, 9, 12])
def test_a_hit_leaves_what_reading_everything_leaves(model, k, rollback, tail):
    """Keys, states and windows of the trunk against 04's prefill, the head's keys against one pass with true hiddens, after the prompt and while the
    answer is written. The slot and the rest of memory were spoiled before: nothing but the entry may serve."""
    engine, start = engine_of(model, 2, draft=k, rollback=rollback), text(2 * BLOCK, 3)
    ask(engine, start + text(4, 1), sampling(0, 12))
    for pool in (*engine.caches.layers, *engine.caches.head_layers):
        if isinstance(pool, KVPool): pool.k_bhsp.fill_(50.0); pool.v_bhsp.fill_(-50.0)
        elif pool is not None:
            for z in (pool.window_bwc, *mamba.parts(pool.state), *pool.kept): z.fill_(3)
    engine.running.hidden_bwd.fill_(9.0)
    engine.submit(prompt := start + text(tail, 2), sampling(0, 30))
    engine.admit()
    (slot, request), = engine.owners.items()
    assert request.read == 2 * BLOCK
    while not request.ready: engine.prefill()
    with torch.inference_mode(): hidden = model.hidden(torch.tensor([prompt]))[0]
    if k: assert (engine.running.hidden_bwd[slot, 0] - hidden[len(prompt) - 2]).abs().max() < 1e-10
    for _ in range(3):
        if k:
            n = int(engine.caches.head_length_b[slot])
            told, cache = torch.tensor([(prompt + request.answer.ids)[:n + 1]]), nemotron.KVCache(1, 2, n, 8, dtype=torch.float64)
            assert n == int(engine.caches.length_b[slot]) - max(1, int(engine.running.new_b[slot]))
            with torch.inference_mode(): model.mtp(model.backbone.embeddings(told[:, 1:]), model.hidden(told[:, :-1]), caches=[cache, None])
            pool = engine.caches.head_layers[0]
            for ours, theirs in ((pool.k_bhsp, cache.k_bhsp), (pool.v_bhsp, cache.v_bhsp)):
                assert (ours[slot, :, :n] - theirs[0]).abs().max() < 1e-10 * theirs.abs().max()
        written = (prompt + request.answer.ids)[:int(engine.caches.length_b[slot])]
        assert base.gap(base.held(engine.caches, slot), base.fresh(model, written)) < 1e-10
        engine.step()


@pytest.mark.parametrize("k, rollback", [(0, "snapshot"), (2, "snapshot"), (2, "replay")])
@pytest.mark.parametrize("state_format, kv_format", [("fp32", "fp8"), ("fp16", None), ("fp16_sr", "bf16"), ("int8", "fp8"), ("int8_sr", None)])
def test_every_format_is_stored_bit_for_bit(trained, k, rollback, state_format, kv_format):
    """What lies in a slot behind a boundary lies in another slot after a hit, codes and scales. Without drafts and chance, what comes after a hit is
    what came the first time, bit for bit."""
    engine = engine_of(trained, 2, draft=k, rollback=rollback, state_format=state_format, kv_format=kv_format, prefill_tokens=BLOCK)

    def lies(slot, n):
        pools = [(pool, n) for pool in engine.caches.layers] + [(pool, n - 1) for pool in engine.caches.head_layers]
        at = slot * engine.caches.entries + int(engine.caches.entry_b[slot])
        return [z.clone() for pool, m in pools if pool is not None
                for z in ((pool.k_bhsp[slot][:, :m], pool.v_bhsp[slot][:, :m]) if isinstance(pool, KVPool) else
                          (pool.window_bwc[slot], *(part[at] for part in mamba.parts(pool.state))))]

    prompt, how = text(2 * BLOCK + 5, 1), sampling(1)
    other = engine.submit(text(40, 9), sampling(0, 40))      # takes the first slot, so that the two owners' differ
    for _ in range(9): engine.step()
    id = engine.submit(prompt, how)
    engine.admit()
    while engine.owners[1].read < 2 * BLOCK: engine.prefill()
    first = lies(1, 2 * BLOCK)
    for _ in range(3): engine.step()
    engine.cancel(other); engine.cancel(id)
    again = engine.submit(prompt, how)
    engine.admit()
    assert engine.owners[0].id == again and engine.owners[0].read == 2 * BLOCK
    second = lies(0, 2 * BLOCK)
    assert len(first) == len(second) and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(first, second))
    if k or "sr" in state_format: return
    engine = engine_of(trained, 1, state_format=state_format, kv_format=kv_format)
    (cold, read), (warm, fewer) = ask(engine, prompt, how), ask(engine, prompt, how)
    assert (cold.ids, cold.logprobs) == (warm.ids, warm.logprobs) and read == 2 * BLOCK + 4 and fewer == 4


@ways
def test_requests_that_enter_together_hit_together(model, k, rollback, kv_format):
    """Four at once over an empty store: all read, one entry a prefix. Then four at once that begin at three different boundaries and none."""
    options, start = dict(draft=k, rollback=rollback, kv_format=kv_format, prefill_tokens=30), text(3 * BLOCK, 5)
    one, other = engine_of(model, 4, **options), engine_of(model, 4, prefix_bytes=0, **options)
    lots = [[start + text(n, n) for n in (1, 2, 5, 20)],
            [start + text(4, 77), start[:2 * BLOCK] + text(6, 1), start[:BLOCK + 1] + text(1, 8), text(20, 6)]]
    for lot, read in zip(lots, (24 + 25 + 28 + 43, 3 + 5 + 1 + 19)):
        before, got = one.reads, [e.run() for e in (one, other) if [e.submit(p, sampling(i)) for i, p in enumerate(lot)]]
        for id, answer in got[0].items(): assert same(answer, got[1][id])
        assert one.reads - before == read
    assert len(one.prefixes.entries) == len({key for lot in lots for p in lot for key in map(tuple, (p[:n] for n in range(8, len(p), 8)))})


@pytest.mark.parametrize("k, rollback", [(0, "snapshot"), (3, "replay")])
def test_a_full_store_stays_under_its_limit_and_answers_right(model, k, rollback):
    """Room for some entries only: bytes are those of the tensors and never over the limit, entries go, answers stay. No room for one: nothing is
    stored, everything is read."""
    options = dict(draft=k, rollback=rollback)
    probe, other = engine_of(model, **options), engine_of(model, prefix_bytes=0, **options)
    ask(probe, text(BLOCK + 1, 1), sampling(0))
    small = probe.prefixes.nbytes
    tight, none = engine_of(model, prefix_bytes=4 * small, **options), engine_of(model, prefix_bytes=small - 1, **options)
    stored = set()
    for i in range(12):
        prompt = text(2 * BLOCK, i // 3 % 3) + text(1 + 5 * (i % 3), 50 + i)
        plain, _ = ask(other, prompt, sampling(i))
        assert same(ask(tight, prompt, sampling(i))[0], plain)
        answer, read = ask(none, prompt, sampling(i))
        assert same(answer, plain) and read == len(prompt) - 1
        tensors = [z for entry in tight.prefixes.entries.values() for z in entry.tensors.values()]
        assert sum(z.untyped_storage().nbytes() for z in tensors) == tight.prefixes.nbytes <= 4 * small
        stored |= {entry.ids for entry in tight.prefixes.entries.values()}
    assert len(stored) > len(tight.prefixes.entries) and tight.prefixes.hits > 0
    assert (none.prefixes.nbytes, none.prefixes.hits, len(none.prefixes.entries)) == (0, 0, 0)


@pytest.mark.parametrize("k, rollback", [(0, "snapshot"), (3, "snapshot"), (3, "replay")])
def test_a_cancelled_request_leaves_right_entries_or_none(model, k, rollback):
    """Cancelled before it is read, at every pass of its prompt, and while it answers: another with the same beginning reads what is left and answers
    as ever."""
    prompt, next_ = text(30, 4), text(25, 4) + text(6, 5)
    plain = ask(engine_of(model, 1, 0, draft=k, rollback=rollback), next_, sampling(3))[0]
    for steps, known in ((0, 0), (1, 0), (2, 8), (3, 8), (4, 16), (5, 24), (6, 24), (9, 24)):
        engine = engine_of(model, 1, draft=k, rollback=rollback, prefill_tokens=5)
        id = engine.submit(prompt, sampling(1, 40))
        for _ in range(steps): engine.step()
        assert engine.cancel(id)
        answer, read = ask(engine, next_, sampling(3))
        assert same(answer, plain) and read == 30 - known, steps
    engine = engine_of(model, 1, draft=k, rollback=rollback)
    id = engine.submit(prompt, sampling(1, 40), on_tokens=lambda id, ids, text: engine.cancel(id))
    engine.step()
    answer, read = ask(engine, next_, sampling(3))
    assert same(answer, plain) and read == 6


@ways
def test_a_conversation_reads_each_turn_once(model, k, rollback, kv_format):
    """Each prompt is the one before, its answer and something new: from the second turn on only what lies behind the last prompt's boundary is
    read."""
    options, hand = dict(draft=k, rollback=rollback, kv_format=kv_format, capacity=160), ByHand()
    one, other, prompt = engine_of(model, 1, **options), engine_of(model, 1, 0, **options), text(19, 2)
    for turn in range(5):
        (ours, read), (plain, _) = ask(one, prompt, sampling(turn, 11)), ask(other, prompt, sampling(turn, 11))
        assert same(ours, plain) and read == hand.to_read(prompt)
        if turn: assert one.prefixes.hits == turn and read < 11 + 7 + BLOCK
        prompt = prompt + ours.ids + text(7, 90 + turn)


@pytest.mark.parametrize("k, rollback", [(0, "snapshot"), (2, "snapshot"), (3, "replay")])
def test_a_load_with_a_small_store_answers_as_each_request_alone(model, k, rollback):
    """Sixty requests over four slots with common beginnings, in bursts, some cancelled, the store too small for all."""
    rng, alone = random.Random(k), engine_of(model, 1, 0)
    asked = [text(rng.choice([8, 20, 24]), rng.randrange(3)) + text(rng.randint(1, 9), 200 + i) for i in range(60)]
    how = [dataclasses.replace(sampling(0, rng.randint(1, 8)), seed=i) for i in range(60)]        # greedy: drafting may not change it
    want = [ask(alone, p, s)[0] for p, s in zip(asked, how)]
    engine = engine_of(model, 4, 60_000, draft=k, rollback=rollback, prefill_tokens=12)
    todo, done, gone = list(range(60)), {}, set()
    while todo or not engine.idle:
        for _ in range(rng.choice([0, 0, 1, 6])):
            if todo: assert engine.submit(asked[i := todo.pop(0)], how[i]) == i
        if rng.random() < 0.1 and engine.owners: engine.cancel(id := rng.choice(list(engine.owners.values())).id); gone.add(id)
        done |= dict(engine.step())
        assert engine.prefixes.nbytes <= 60_000
    assert len(done) == 60 and engine.prefixes.hits > 5 and 2 < len(gone) < 30
    for i, answer in done.items():
        if i in gone: assert answer.ids == want[i].ids[:len(answer.ids)]
        else: assert same(answer, want[i]), i


def test_rollouts_of_one_prompt_read_it_once(trained):
    """Groups of answers to the same question, as stage 07 asks for them: the engine reads what 04's generate reads, less the repetitions."""
    group, how = [text(21, 1)] * 6, nemotron.SamplingParams(max_tokens=8, temperature=1.0, seed=3, stop_ids=())
    theirs = nemotron.generate(trained, group, how, return_logprobs=True)
    ours = infer.rollout_engine(slots=2, prefix_bytes=ROOM, prefix_block=BLOCK)(trained, group, how)
    assert [a.ids for a in ours] == [a.ids for a in theirs] and len({tuple(a.ids) for a in ours}) > 1
    for a, b in zip(ours, theirs): assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_without_a_budget_of_bytes_nothing_changes(model):
    """prefix_bytes = 0 keeps the passes as they were: one a step, as long as prefill_tokens; with a cache they end at boundaries, several a step."""
    for bytes_, passes in ((0, [[20], [9]]), (ROOM, [[8, 8, 4], [4, 5]])):
        engine = engine_of(model, 1, bytes_, prefill_tokens=20)
        engine.submit(text(30, 1), sampling(0, 3))
        for want in passes:
            engine.passes.clear(); engine.step()
            assert engine.passes == want
    with pytest.raises(ValueError, match="use 0 bytes"): Engine(model, prefix_bytes=ROOM, prefix_block=0)
    with pytest.raises(ValueError, match="use 0 bytes"): Engine(model, prefix_bytes=-1)
