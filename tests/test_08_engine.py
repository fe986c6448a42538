"""Stage 08's engine against stage 04's generate, against fresh prefills of the accepted text, and against exact probabilities."""
import dataclasses
import importlib
import importlib.util
import itertools
import math
import random

import pytest
import torch

mamba, nemotron, sft, infer = (importlib.import_module(m) for m in ("02_mamba", "04_model", "06_sft", "08_infer"))
Tokenizer = importlib.import_module("data.tokenizer").Tokenizer
Engine, SamplingParams, SlotCaches = infer.Engine, infer.SamplingParams, infer.SlotCaches

MICRO = nemotron.ModelConfig(pattern="MEM*E", d_model=32, vocab=96, heads=4, kv_heads=2, head_dim=8, mamba_heads=16, mamba_head_dim=4, groups=2,
                             state=8, chunk=8, experts=8, experts_per_token=3, latent=16, expert_width=16, shared_width=32, routed_scale=2.5,
                             time_step_limit=(0.01, 0.9))
ROLLBACKS = ("snapshot", "replay")


def randomise(model, seed=0):
    """At the default init a wrong model passes: norms are 1, conv biases small, D is 1. So every tensor gets values of its own."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            u = torch.rand(t.shape, generator=g) * 2 - 1
            if name.endswith("e_score_correction_bias"): t.copy_(0.1 * u)
            elif name.endswith(("A_log", "dt_bias")): t.add_(0.5 * u)
            elif name.endswith(("norm.weight", "norm_f.weight", ".D", "conv1d.bias")): t.add_(0.3 * u)
            elif "embeddings" in name: t.copy_(torch.randn(t.shape, generator=g))
            else:
                fan_in = t[0].numel() if "experts." not in name or t.dim() == 2 else t.shape[-1]
                t.copy_(torch.randn(t.shape, generator=g) * 1.5 / math.sqrt(fan_in))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    """Random everywhere, then trained for some steps on noisy text in which two tokens tell the next: drafts are sometimes right, sometimes not."""
    torch.manual_seed(0)
    model, g = randomise(nemotron.Nemotron(MICRO)).train(), torch.Generator().manual_seed(1)
    optimizer, after = torch.optim.Adam(model.parameters(), 5e-3), torch.randperm(96, generator=g)
    for _ in range(30):
        ids = torch.randint(20, 96, (16, 33), generator=g)
        for i in range(2, 33):
            ids[:, i] = torch.where(torch.rand(16, generator=g) < 0.15, ids[:, i], (after[ids[:, i - 1]] + ids[:, i - 2] % 2) % 96)
        optimizer.zero_grad()
        nemotron.loss(model, ids[:, :-1], ids[:, 1:], mtp_weight=1.0).total.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def wild():
    return randomise(nemotron.Nemotron(MICRO), 5).requires_grad_(False)


def prompts(n, seed=0, low=1, high=30):
    rng = random.Random(seed)
    out = []
    for _ in range(n):
        period = [rng.randrange(20, 96) for _ in range(rng.randint(2, 5))]
        out.append((period * 20)[:rng.randint(low, high)])
    return out


GREEDY = dict(temperature=0.0, top_p=1.0, stop_ids=(2, 11))


def answers(engine, asked, sampling, **kwargs):
    ids = [engine.submit(p, sampling, place=i, **kwargs) for i, p in enumerate(asked)]
    out = engine.run()
    return [out[i] for i in ids]


# ---- state

def fresh(model, ids):
    """What 04's own cache holds after a prefill: [(k, v) or (window, state) or None] a layer."""
    cache = model.empty_cache(1, len(ids) + 1)
    with torch.inference_mode(): model.hidden(torch.tensor([ids]), None, cache)
    take = {"*": lambda c: (c.k_bhsp[0, :, :len(ids)], c.v_bhsp[0, :, :len(ids)]), "M": lambda c: (c.window_btc[0], c.state_bhpn[0]),
            "E": lambda c: ()}
    return [take[block.letter](layer) for block, layer in zip(model.backbone.layers, cache.layers)]


def held(caches, slot):
    """The same of a slot; kept inputs of the replay are worked in first."""
    if caches.replays: caches.flush(torch.ones(caches.slots, dtype=torch.bool))
    n, at = int(caches.length_b[slot]), slot * caches.entries + int(caches.entry_b[slot])
    out = []
    for pool in caches.layers:
        if isinstance(pool, infer.KVPool): out.append((pool.k_bhsp[slot, :, :n], pool.v_bhsp[slot, :, :n]))
        elif pool is None: out.append(())
        else: out.append((pool.window_bwc[slot, torch.arange(n - 3, n) % pool.window_bwc.shape[1]], mamba.dequantize_state(pool.state)[at]))
    return out


def gap(a, b): return max(((x - y).abs().max() / y.abs().max().clamp(min=1e-30)).item() for p, q in zip(a, b) for x, y in zip(p, q))


def windows(caches, ids_bt, keeps, k, start):
    """Windows of k + 1 tokens, of which row b keeps keeps[step][b]; what was kept, a list a row."""
    kept, write = [list(row[:start]) for row in ids_bt.tolist()], "none" if caches.replays else "each"
    b = len(ids_bt)
    with torch.inference_mode():
        rows = caches.rows(None, torch.full((b,), start), start, caches.length_b)
        caches.trunk(ids_bt[:, :start], rows); caches.commit(rows, rows.count_r)
        for step, keep in enumerate(keeps):
            at = start + step * (k + 1)
            rows = caches.rows(None, torch.full((b,), k + 1), k + 1, caches.length_b, write)
            caches.trunk(ids_bt[:, at:at + k + 1], rows)
            caches.commit(rows, torch.tensor(keep))
            for i, n in enumerate(keep): kept[i] += ids_bt[i, at:at + n].tolist()
    return kept


@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_rollback_leaves_what_a_fresh_prefill_of_the_kept_text_leaves(wild, k):
    """Every count 0..k + 1 at once, window after window, in fp64: catches a state, window or key that is one token off."""
    model, b = copy_of(wild).double(), k + 2
    ids = torch.randint(3, 96, (b, 9 + 6 * (k + 1)), generator=torch.Generator().manual_seed(k))
    keeps = [[(i + 3 * step) % (k + 2) for i in range(b)] for step in range(6)]
    for rollback in ROLLBACKS:
        for upto in (1, 2, 6):
            caches = SlotCaches(model, b, 80, k, rollback)
            kept = windows(caches, ids, keeps[:upto], k, 9)
            for i in range(b):
                assert int(caches.length_b[i]) == len(kept[i])
                assert gap(held(caches, i), fresh(model, kept[i])) < 1e-10, (rollback, upto, i)


def copy_of(model):
    other = nemotron.Nemotron(model.config)
    other.load_state_dict(model.state_dict())
    return other.eval().requires_grad_(False)


def test_a_pass_reads_and_writes_these_states(wild):
    """Worked by hand: three slots of four entries (k = 2) at their entries 1, 3 and 0. Each token's state goes one entry on, round the ring of its
    own slot; what is no token has no state, or an idle slot would be read, rounded and written in every pass."""
    caches = SlotCaches(wild, 3, 40, 2, "snapshot")
    caches.entry_b.copy_(torch.tensor([1, 3, 0]))

    def states(write, slots, counts, t=3):
        slot_r = None if slots is None else torch.tensor(slots)
        return caches.states_of(caches.rows(slot_r, torch.tensor(counts), t, caches.length_b, write)).tolist()

    assert states("each", None, [3, 0, 2]) == [[1, 2, 3, 0], [-1, -1, -1, -1], [8, 9, 10, -1]]
    assert states("each", [1], [3]) == [[7, 4, 5, 6]]
    assert states("last", None, [3, 1, 0]) == [1, 7, -1] and states("last", [2, 1, 0], [1, 0, 3]) == [8, -1, 1]
    caches = SlotCaches(wild, 3, 40, 2, "replay")
    assert states("none", [2, 1, 0], [1, 0, 3]) == [2, -1, 0]


@pytest.mark.parametrize("k", [1, 4, 7])
def test_snapshot_and_replay_leave_equal_bits(wild, k):
    """fp32 on a CPU: both run the same recurrence, so nothing may differ, flushes included. (Keys differ by rounding: their inputs are equal.)"""
    ids = torch.randint(3, 96, (k + 2, 9 + 8 * (k + 1)), generator=torch.Generator().manual_seed(k))
    keeps = [[(i * 2 + step) % (k + 2) for i in range(k + 2)] for step in range(8)]
    one, two = (SlotCaches(wild, k + 2, 90, k, rollback) for rollback in ROLLBACKS)
    windows(one, ids, keeps, k, 9); windows(two, ids, keeps, k, 9)
    for slot in range(k + 2):
        for a, b in zip(held(one, slot), held(two, slot)):
            for x, y in zip(a, b): assert torch.equal(x, y)


@pytest.mark.parametrize("rollback", ROLLBACKS)
def test_the_head_reads_true_hiddens_of_the_kept_text(model, rollback):
    """After some windows the head's keys up to its length are those of one pass over the text with the trunk's hiddens:
    draft keys must not survive."""
    engine = Engine(model, 2, 80, draft=3, rollback=rollback, prefill_tokens=4)
    asked = prompts(2, 3, 8, 20)
    for p in asked: engine.submit(p, SamplingParams(max_tokens=40, **GREEDY))
    for _ in range(12): engine.step()
    assert sum(engine.running.accepted_k.tolist()) > 0
    for slot, request in engine.owners.items():
        n = int(engine.caches.head_length_b[slot])
        text = torch.tensor([(request.prompt + request.answer.ids)[:n + 1]])
        assert n > len(request.prompt)
        cache = nemotron.KVCache(1, 2, n, 8)
        with torch.inference_mode(): model.mtp(model.backbone.embeddings(text[:, 1:]), model.hidden(text[:, :-1]), caches=[cache, None])
        pool = engine.caches.head_layers[0]
        for ours, theirs in ((pool.k_bhsp, cache.k_bhsp), (pool.v_bhsp, cache.v_bhsp)):
            assert (ours[slot, :, :n] - theirs[0]).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("k", [1, 3])
def test_drafts_are_drawn_from_the_heads_own_distribution(model, k):
    """Temperature and top_p apply to the head too: q of the first draft, worked from one pass of the head over the text with true hiddens. Wrong
    there would still be lossless, and slow."""
    engine, prompt = Engine(model, 1, 60, draft=k), prompts(1, 5, 20, 20)[0]
    engine.submit(prompt, SamplingParams(max_tokens=30, temperature=0.6, top_p=0.8, stop_ids=()))
    for _ in range(3): engine.step()
    text = prompt + engine.owners[0].answer.ids
    with torch.inference_mode():
        drafts, q = infer.propose(engine.caches, engine.running)
        ids = torch.tensor([text])
        h = model.mtp(model.backbone.embeddings(ids[:, 1:]), model.hidden(ids[:, :-1]))[0][0, -1]
    p = (model.lm_head(h).double() / 0.6).softmax(-1).tolist()
    total, want = 0.0, torch.zeros(96, dtype=torch.float64)
    for i in sorted(range(96), key=lambda i: -p[i]):
        if total < 0.8: want[i] = p[i]
        total += p[i]
    assert (q[0, 0] - want / want.sum()).abs().max() < 1e-4 and q.shape == (1, k, 96)
    assert all(q[0, i, drafts[0, i]] > 0 for i in range(k))


# ---- decoding

@pytest.mark.parametrize("rollback", ROLLBACKS)
@pytest.mark.parametrize("k", range(8))
def test_greedy_drafting_writes_what_plain_greedy_writes(model, k, rollback):
    """Token for token as 04's generate, mixed lengths over fewer slots than requests; the drafts were neither all right nor all wrong."""
    asked, s = prompts(9, 1), SamplingParams(max_tokens=24, logprobs=True, **GREEDY)
    if not k and rollback == "replay": return
    engine = Engine(model, 4, 64, draft=k, rollback=rollback, prefill_tokens=16)
    theirs = nemotron.generate(model, asked, nemotron.SamplingParams(max_tokens=24, **GREEDY), return_logprobs=True)
    for ours, plain in zip(answers(engine, asked, s), theirs):
        assert (ours.ids, ours.finished) == (plain.ids, plain.finished)
        assert ours.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    if k: assert 0.05 < engine.acceptance()[0] < 0.95, engine.acceptance()


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("rollback", ROLLBACKS)
def test_greedy_drafting_with_a_head_that_is_always_wrong(wild, k, rollback):
    """A random head: nearly every window is rolled back to its first token."""
    asked = prompts(5, 2)
    theirs = nemotron.generate(wild, asked, nemotron.SamplingParams(max_tokens=20, **GREEDY))
    ours = answers(Engine(wild, 3, 64, draft=k, rollback=rollback), asked, SamplingParams(max_tokens=20, **GREEDY))
    assert [a.ids for a in ours] == [a.ids for a in theirs]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.8, 0.9), (1.0, 0.95)])
def test_the_rollout_engine_returns_what_generate_returns(model, temperature, top_p):
    """Same ids, log-probabilities and ends for the same seed; another seed gives other text."""
    asked, s = prompts(7, 4), nemotron.SamplingParams(max_tokens=15, temperature=temperature, top_p=top_p, seed=3, stop_ids=(25, 33))
    theirs, ours = nemotron.generate(model, asked, s, return_logprobs=True), infer.rollout_engine(slots=3)(model, asked, s)
    assert [(a.ids, a.finished) for a in ours] == [(a.ids, a.finished) for a in theirs]
    for a, b in zip(ours, theirs): assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    model.train()
    assert [a.ids for a in infer.rollout_engine(draft=2)(model, asked, dataclasses.replace(s, max_tokens=2))] and model.training
    model.eval()
    assert type(ours[0]) is nemotron.Completion and any(a.finished for a in ours)
    assert [a.ids for a in infer.rollout_engine()(model, asked, dataclasses.replace(s, seed=4))] != [a.ids for a in ours]
    assert infer.rollout_engine()(model, [], s) == []


@pytest.mark.parametrize("k", [0, 3])
def test_a_request_answers_alone_as_in_any_batch(model, k):
    """Different sampling side by side: temperatures, top_p, greedy, seeds. Alone, in 2 slots and in 6, and in another order: the same ids."""
    asked = prompts(6, 6)
    knobs = [(1, 1), (0, 1), (.7, .9), (1, .5), (0, .9), (1.3, 1)]
    ways = [SamplingParams(max_tokens=12, temperature=t, top_p=p, seed=i) for i, (t, p) in enumerate(knobs)]
    alone = [answers(Engine(model, 1, 64, draft=k), [p], s)[0].ids for p, s in zip(asked, ways)]
    for slots, order in ((2, range(6)), (6, range(6)), (4, [5, 0, 3, 1, 4, 2])):
        engine = Engine(model, slots, 64, draft=k, prefill_tokens=7)
        ids = {engine.submit(asked[i], ways[i]): i for i in order}
        for id, answer in engine.run().items(): assert answer.ids == alone[ids[id]], (slots, ids[id])


def chi_square(counts, expected):
    """(statistic - its mean) in standard deviations of a normal after Wilson and Hilferty; cells expected under 5 are pooled."""
    small = expected < 5
    counts, expected = (torch.cat([z[~small], z[small].sum()[None]]) if small.any() else z for z in (counts, expected))
    if expected[-1] < 1: counts, expected = torch.cat([counts[:-2], counts[-2:].sum()[None]]), torch.cat([expected[:-2], expected[-2:].sum()[None]])
    n = len(expected) - 1
    x = ((counts - expected) ** 2 / expected).sum().item()
    return ((x / n) ** (1 / 3) - (1 - 2 / (9 * n))) / math.sqrt(2 / (9 * n))


def test_acceptance_leaves_the_distribution_of_the_trunk():
    """accept and draw over 200,000 rows: the first token is distributed as p whatever q is. 5 sigma: about one false alarm in 3 million seeds."""
    g = torch.Generator().manual_seed(0)
    n, v, k = 200_000, 7, 2
    p, q = torch.rand(k + 1, v, generator=g).double() ** 3, torch.rand(k, v, generator=g).double() ** 3
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    q[0, 2] = 0; q[0] /= q[0].sum()         # the trunk may write what the head never proposes
    drafts = torch.stack([infer.draw(q[i].expand(n, v), None, torch.rand(n, generator=g).double()) for i in range(k)], 1)
    kept, left = infer.accept(p.expand(n, k + 1, v), q.expand(n, k, v), drafts, torch.rand(n, k, generator=g).double())
    behind = infer.draw(left, None, torch.rand(n, generator=g).double())
    ids = torch.cat([drafts, torch.zeros(n, 1, dtype=torch.long)], 1).scatter(1, kept[:, None], behind[:, None])
    for i in range(k + 1):
        reached = kept >= i
        assert chi_square(torch.bincount(ids[reached, i], minlength=v).double(), p[i] * reached.sum()) < 5
    rate = (kept >= 1).double().mean().item()
    assert abs(rate - torch.minimum(p[0], q[0]).sum().item()) < 5 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("rollback, temperature, top_p", [("snapshot", 1.0, 1.0), ("replay", 0.7, 0.8)])
def test_drafted_text_is_distributed_as_the_models_own(rollback, temperature, top_p):
    """8,000 answers of three tokens over six words against probabilities counted out over all prefixes; 5 sigma, as above. A word that top_p cuts
    must never come."""
    config = dataclasses.replace(MICRO, vocab=6)
    model = randomise(nemotron.Nemotron(config), 7).requires_grad_(False)
    model.lm_head.weight.mul_(0.5)
    def chances(prefix):
        with torch.inference_mode(): p = (model(torch.tensor([prefix]))[0, -1].double() / temperature).softmax(-1).tolist()
        total, out = 0.0, [0.0] * 6
        for i in sorted(range(6), key=lambda i: -p[i]):
            if total < top_p: out[i] = p[i]
            total += p[i]
        return [x / sum(out) for x in out]
    expected, n = torch.zeros(6, 6, 6, dtype=torch.float64), 8000
    for a, b in itertools.product(range(6), repeat=2):
        expected[a, b] = torch.tensor([chances([3])[a] * chances([3, a])[b] * x for x in chances([3, a, b])])
    engine = Engine(model, 500, 8, draft=2, rollback=rollback, prefill_tokens=10_000)
    s = SamplingParams(max_tokens=3, temperature=temperature, top_p=top_p, stop_ids=())
    counts = torch.zeros(6, 6, 6, dtype=torch.float64)
    for answer in answers(engine, [[3]] * n, s): counts[tuple(answer.ids)] += 1
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    assert chi_square(counts[live], expected[live] * n) < 5
    assert 0.1 < engine.acceptance()[0] < 0.95


def test_forced_acceptance_keeps_the_share_it_is_told(wild):
    """For benchmarks: 0.7 kept at each place, whatever the head says; 0 and 1 exactly."""
    for share in (0.0, 0.7, 1.0):
        engine = Engine(wild, 24, 120, draft=3, forced=share)
        answers(engine, [[5]] * 24, SamplingParams(max_tokens=100, stop_ids=(), temperature=0.0))
        offered, accepted = engine.running.offered_k.sum().item(), engine.running.accepted_k.sum().item()
        assert abs(accepted / offered - share) <= 5 * math.sqrt(share * (1 - share) / offered)


@pytest.mark.parametrize("size", [1, 3, 7, 33, 50])
def test_a_prompt_read_in_chunks_leaves_the_same_state(wild, size):
    """Odd chunks, also over and under the 32 tokens where the step gives way to the scan, against 04's prefill in fp64."""
    model, prompt = copy_of(wild).double(), prompts(1, 8, 71, 71)[0]
    engine = Engine(model, 3, 90, draft=2, prefill_tokens=size)
    engine.submit([7] * 30, SamplingParams(max_tokens=60, **GREEDY)); engine.submit(prompt, SamplingParams(max_tokens=5, **GREEDY))
    request = engine.queue[1]
    engine.admit()
    while not request.ready: engine.prefill()
    assert gap(held(engine.caches, request.slot), fresh(model, prompt[:-1])) < 1e-10        # the last token is decoding's


# ---- slots

@pytest.mark.parametrize("k, rollback", [(0, "snapshot"), (3, "snapshot"), (3, "replay")])
def test_a_cancelled_request_leaks_nothing_into_its_slot(model, k, rollback):
    """One slot, an owner cancelled in its prefill, in decoding and from inside its own stream; everything it could leave is then spoiled."""
    asked, s = prompts(2, 9, 12, 20), SamplingParams(max_tokens=12, **GREEDY)
    clean = answers(Engine(model, 1, 64, draft=k, rollback=rollback), asked[1:], s)[0].ids
    for steps in (0, 2, 9, 10, 11):        # waiting, in its prefill, decoding
        engine = Engine(model, 1, 64, draft=k, rollback=rollback, prefill_tokens=5)
        first, second = engine.submit(asked[0] * 2, dataclasses.replace(s, max_tokens=60, stop_ids=())), engine.submit(asked[1], s)
        done = dict(pair for _ in range(steps) for pair in engine.step())
        assert engine.cancel(first) and not engine.cancel(first) and not engine.cancel(99)
        for pool in (*engine.caches.layers, *engine.caches.head_layers):
            if isinstance(pool, infer.KVPool): pool.k_bhsp.fill_(50.0); pool.v_bhsp.fill_(-50.0)
            elif pool is not None:
                for z in (pool.window_bwc, *mamba.parts(pool.state), *pool.kept): z.fill_(3)
        done |= engine.run()
        assert done[first].reason == "cancelled" and not done[first].finished
        assert done[second].ids == clean
    engine = Engine(model, 1, 64, draft=k, rollback=rollback)
    first = engine.submit(asked[0], s, on_tokens=lambda id, ids, text: engine.cancel(id)); second = engine.submit(asked[1], s)
    done = engine.run()
    assert done[first].reason == "cancelled" and 1 <= len(done[first].ids) <= k + 1 and done[second].ids == clean


@pytest.mark.parametrize("k, rollback", [(0, "snapshot"), (3, "snapshot"), (2, "replay")])
def test_two_hundred_requests_come_and_go(model, k, rollback):
    """Random lengths, arrivals and cancellations: each answer equals the one alone (a prefix of it when cancelled), tensors stay what they were."""
    rng = random.Random(0)
    asked = prompts(200, 11, 1, 25)
    ways = [SamplingParams(max_tokens=rng.randint(1, 14), temperature=rng.choice([0.0, 1.0]), top_p=rng.choice([1.0, 0.9]), seed=i)
            for i in range(200)]
    alone = answers_by_place(model, asked, ways, k)
    engine = Engine(model, 8, 40, draft=k, rollback=rollback, prefill_tokens=20)
    size = lambda: (sum(engine.caches.bytes_per_slot().values()), len([x for x in vars(engine.caches).values() if isinstance(x, torch.Tensor)]))
    before, streamed, done, ids, cancelled = size(), {}, {}, {}, set()
    stream = lambda id, new, text: streamed.setdefault(id, []).extend(new)
    todo = list(range(200))
    while todo or not engine.idle:
        for _ in range(rng.choice([0, 0, 1, 2, 12])):
            if todo: i = todo.pop(0); ids[engine.submit(asked[i], ways[i], stream)] = i
        if rng.random() < 0.25 and (open_ := [id for id in ids if id not in done and id not in cancelled]):
            victim = rng.choice(open_)
            if engine.cancel(victim): cancelled.add(victim)
        for id, answer in engine.step():
            assert id not in done
            done[id] = answer
        assert size() == before and len(engine.owners) <= 8
    assert len(done) == 200 and len(cancelled) > 10 and not engine.owners and not engine.queue and not engine.done
    for id, answer in done.items():
        want = alone[ids[id]]
        assert streamed.get(id, []) == answer.ids
        if id in cancelled: assert answer.reason == "cancelled" and answer.ids == want.ids[:len(answer.ids)]
        else: assert (answer.ids, answer.reason) == (want.ids, want.reason)


def answers_by_place(model, asked, ways, k):
    """Each request in an engine of its own slot: one engine of one slot, one after the other, each in a slot that was made new."""
    if k: return [answers(Engine(model, 1, 40, draft=k), [p], s)[0] for p, s in zip(asked, ways)]
    out = []
    for p, s in zip(asked, ways):
        c = nemotron.generate(model, [p], nemotron.SamplingParams(s.max_tokens, s.temperature, s.top_p, s.seed, s.stop_ids))[0]
        out.append(infer.Answer(c.ids, [], c.finished, reason="stop_id" if c.finished else "length"))
    return out


def test_what_cannot_be_served_is_refused_with_a_sentence(model):
    """Empty prompt, unknown ids, a prompt longer than a slot, stop strings without a tokenizer, wrong formats; a full cache ends an answer."""
    engine, s = Engine(model, 2, 16, draft=3), SamplingParams(max_tokens=50, stop_ids=())
    for prompt, word in (([], "empty"), ([5, 96], "vocabulary"), ([-1], "vocabulary"), ([5] * 17, "holds 16")):
        with pytest.raises(ValueError, match=word): engine.submit(prompt, s)
    with pytest.raises(ValueError, match="tokenizer"): engine.submit([5], dataclasses.replace(s, stop=("x",)))
    with pytest.raises(ValueError, match="empty stop"): engine.submit([5], dataclasses.replace(s, stop=("",)))
    with pytest.raises(ValueError, match="tokenizer"): engine.submit([5], dataclasses.replace(s, budget=3))
    for options in (dict(draft=16), dict(rollback="undo"), dict(kv_format="int4"), dict(state_format="fp8"), dict(slots=0), dict(prefill_tokens=0)):
        with pytest.raises(ValueError): Engine(model, **options)
    with pytest.raises(ValueError, match="MTP"): Engine(nemotron.Nemotron(dataclasses.replace(MICRO, mtp_pattern="", mtp_depths=0)), draft=1)
    assert engine.idle
    for n in (1, 13, 15, 16):
        for k in (0, 3):
            answer = answers(Engine(model, 2, 16, draft=k), [[30] * n], dataclasses.replace(s, temperature=0.0))[0]
            plain = nemotron.generate(model, [[30] * n], nemotron.SamplingParams(max_tokens=17 - n, stop_ids=(), temperature=0.0))[0]
            assert (answer.ids, answer.reason) == (plain.ids, "cache")


def test_requests_wait_while_no_slot_is_free(model):
    """Two slots, five requests: never more than two inside, first come first served."""
    engine, order = Engine(model, 2, 40), []
    for i in range(5): engine.submit([30 + i], SamplingParams(max_tokens=4, stop_ids=()), on_tokens=lambda id, ids, text: order.append(id))
    engine.step()
    assert len(engine.owners) == 2 and len(engine.queue) == 3
    engine.run()
    assert sorted(set(order)) == list(dict.fromkeys(order)) == [0, 1, 2, 3, 4] and len(order) == 20


# ---- text

@pytest.fixture(scope="module")
def tokenizer(): return Tokenizer({bytes([i]): i for i in range(256)})


class Scripted:
    """Stands in for the model's choice: every step writes the next token of a script, at any draft length."""
    def __init__(self, monkeypatch, script):
        self.places = {}
        def step(caches, run, forced=None):
            w, out, counts = caches.draft + 1, [], []
            for slot in range(caches.slots):
                on, made = bool(run.new_b[slot] > 0), int(run.made_b[slot])
                out.append((script[made:made + w] + [0] * w)[:w]); counts.append(w if on else 0)
            counts = torch.tensor(counts)
            run.made_b += counts
            return torch.tensor(out), counts, torch.zeros(caches.slots, w)
        monkeypatch.setattr(infer, "speculative_step", step)
        monkeypatch.setattr(infer.sys.modules["data.traces"], "PLAIN", 10**9)     # Python is no operator


def wide_model(vocab):
    return randomise(nemotron.Nemotron(dataclasses.replace(MICRO, vocab=vocab)), 3).requires_grad_(False)


@pytest.mark.parametrize("k", [0, 3])
def test_a_stop_string_across_tokens_ends_the_answer_before_it(tokenizer, monkeypatch, k):
    """Bytes as tokens: the stop word comes in pieces. The stream never shows a part of it, holds half characters back, and adds up to the text."""
    vocab = -(-len(tokenizer) // 16) * 16
    script = tokenizer.encode("grün ENE ENDE and more")
    Scripted(monkeypatch, script)
    engine, seen = Engine(wide_model(vocab), 2, 64, draft=k, tokenizer=tokenizer), []
    s = SamplingParams(max_tokens=40, stop=("ENDE", "zzz"), stop_ids=(2,))
    answer = answers(engine, [[100]], s, on_tokens=lambda id, ids, text: seen.append(text))[0]
    assert (answer.text, answer.reason, answer.finished) == ("grün ENE ", "stop", True)
    assert tokenizer.decode(answer.ids) == "grün ENE ENDE" and "".join(seen) == answer.text and "\ufffd" not in "".join(seen)
    whole = answers(engine, [[100]], dataclasses.replace(s, stop=(), max_tokens=3))[0]
    assert (whole.text, whole.reason) == ("gr\ufffd", "length")        # cut inside a character


@pytest.mark.parametrize("text, n, margin, cut", [("ab\ncdefgh\nij", 4, 500, "ab\ncdefgh\n"), ("abcdefghijkl", 4, 3, "abcdefg"),
                                                   ("abc</think>x\ny", 2, 1, "abc")])
def test_a_budget_closes_the_trace(tokenizer, monkeypatch, text, n, margin, cut):
    """At the next newline after N tokens, by force at N + margin; the third trace (margin 1) too. What follows </think> is the model's again,
    at the place behind it (the script goes by places)."""
    script = tokenizer.encode(text)
    Scripted(monkeypatch, script + [11])
    engine = Engine(wide_model(-(-len(tokenizer) // 16) * 16), 2, 256, tokenizer=tokenizer)
    talk = [dict(role="user", content="2+2?")]
    s = SamplingParams(max_tokens=30, logprobs=True)
    answer = infer.generate_with_budget(engine, [talk], "regular", dataclasses.replace(s, budget=n, margin=margin))[0]
    assert answer.inserted == len(cut) and answer.ids[answer.inserted] == sft.END_THINK and answer.logprobs[answer.inserted] == 0
    assert answer.text == cut + "</think>" + text[len(cut) + 1:] and answer.reason == "stop_id" and len(answer.ids) == len(answer.logprobs)
    off = infer.generate_with_budget(engine, [talk], "off", dataclasses.replace(s, budget=n, margin=margin))[0]
    assert off.inserted is None and off.text == text


def test_a_budget_leaves_alone_what_ends_by_itself(tokenizer, monkeypatch):
    """A trace that closes itself in time is not touched, however long the answer; a budget never reached changes nothing of the model's text."""
    ask = lambda model, s: infer.generate_with_budget(Engine(model, 1, 256, tokenizer=tokenizer), [talk], "regular", s)
    script = tokenizer.encode("ab") + [sft.END_THINK] + tokenizer.encode("long\nanswer") + [11]
    talk, s = [dict(role="user", content="2+2?")], SamplingParams(max_tokens=30)
    model = wide_model(-(-len(tokenizer) // 16) * 16)
    with monkeypatch.context() as m:
        Scripted(m, script)
        answer = ask(model, dataclasses.replace(s, budget=4, margin=2))[0]
    assert answer.ids == script and answer.inserted is None
    prompt = sft.render_chat(talk, "regular", tokenizer=tokenizer, generation_prompt=True)[0]
    plain = nemotron.generate(model, [prompt], nemotron.SamplingParams(max_tokens=30))[0]
    assert ask(model, dataclasses.replace(s, budget=1000))[0].ids == plain.ids
    # closed at once: the model goes on as from the prompt with the insertion, with the dice of later places
    cut = ask(model, dataclasses.replace(s, budget=1, margin=0))[0]
    assert cut.ids[0] == plain.ids[0] and cut.inserted == 1 and len(cut.ids) == 30 or cut.finished
    later = infer.dice(s, 0)[0, 2].item()
    with torch.inference_mode(): logits = model(torch.tensor([[*prompt, *cut.ids[:2]]]))[:, -1].float()
    assert cut.ids[2] == nemotron.sample(logits, 1.0, 0.95, torch.tensor([later], dtype=torch.float64)).item()


# ---- formats and bytes

@pytest.mark.parametrize("state_format, near", [("fp16", 2e-3), ("fp16_sr", 4e-3), ("int8", 0.05), ("int8_sr", 0.1)])
@pytest.mark.parametrize("k, rollback", [(0, "snapshot"), (3, "snapshot"), (3, "replay")])
def test_rounded_states_stay_near(model, state_format, near, k, rollback):
    """The state of layer 0 after 50 tokens within the format's step of the exact one, relative to its largest value; the answers come."""
    engine = Engine(model, 2, 64, draft=k, rollback=rollback, state_format=state_format, prefill_tokens=9)
    engine.submit(prompts(1, 3, 20, 20)[0], SamplingParams(max_tokens=40, temperature=0.0, stop_ids=()))
    while not engine.owners or len(engine.owners[0].answer.ids) < 30: engine.step()
    (slot, request), = engine.owners.items()
    n = int(engine.caches.length_b[slot])
    exact, ours = fresh(model, (request.prompt + request.answer.ids)[:n]), held(engine.caches, slot)
    error = (ours[0][1] - exact[0][1]).abs().max() / exact[0][1].abs().max()
    assert 0 < error < near
    assert len(answers(engine, prompts(3, 4), SamplingParams(max_tokens=9, stop_ids=()))[0].ids) == 9


def test_fp8_keys_are_near_and_scaled(model):
    """e4m3 holds 4 significant bits: keys within 1/16 of themselves; a scale that is stored with must be multiplied back."""
    for scale in (1.0, 0.25):
        caches = SlotCaches(model, 1, 40, kv_format="fp8")
        pool = next(p for p in caches.layers if isinstance(p, infer.KVPool))
        pool.k_scale = pool.v_scale = scale
        ids, t = torch.randint(20, 96, (1, 30), generator=torch.Generator().manual_seed(0)), 30
        with torch.inference_mode():
            rows = caches.rows(None, torch.tensor([t]), t, caches.length_b)
            h = caches.trunk(ids, rows); caches.commit(rows, rows.count_r)
            k, v = (z.view(torch.float8_e4m3fn)[:, :, :t].float() * scale for z in (pool.k_bhsp, pool.v_bhsp))
            want = fresh(model, ids[0].tolist())[MICRO.pattern.index("*")]
            for ours, theirs in zip((k[0], v[0]), want): assert ((ours - theirs).abs() <= theirs.abs() / 16 + scale * 2**-9).all()
            assert (h - model.hidden(ids)).abs().max() < 0.3 * h.abs().max()


@pytest.mark.parametrize("saturates", [True, False], ids=["own cast", "cast before torch 2.12"])
def test_keys_beyond_the_range_of_fp8_are_cut_with_their_sign(saturates, monkeypatch):
    """Worked by hand, scale 1/2: 208 is a value of E4M3, 448 its largest. The cast alone gave NaN beyond 464 before torch 2.12; one such key makes
    every later answer of its slot NaN; but a NaN must not become a number."""
    cast, inf, nan, every = torch.Tensor.to, math.inf, math.nan, torch.tensor([0])
    older = lambda x, *how, **more: cast(torch.where(x.abs() > 464, nan, x) if how == (torch.float8_e4m3fn,) else x, *how, **more)
    if not saturates: monkeypatch.setattr(torch.Tensor, "to", older)
    pool = infer.KVPool(1, 1, 6, 4, torch.float8_e4m3fn)
    new_rthp = torch.tensor([[[[104.0, 224.0, 240.0, 1e6]], [[-104.0, -225.0, -inf, inf]], [[nan, 0.0, -300.0, 300.0]]]])
    rows = infer.Rows(every, every, every + 3, torch.ones(1, 3).bool(), torch.tensor([[0, 1, 2]]), 3, True, False, "last")
    seen = pool.exchange(pool.k_bhsp, new_rthp, 0.5, rows)
    want = torch.tensor([[[[104.0, 224.0, 224.0, 224.0], [-104.0, -224.0, -224.0, 224.0], [nan, 0.0, -224.0, 224.0]]]])
    torch.testing.assert_close(seen, want, rtol=0, atol=0, equal_nan=True)


def test_the_caches_cost_what_the_report_says():
    """65,536 tokens of Ultra's FP8 keys weigh as much as its fp32 states; formats, drafts and rollbacks cost what their layout says."""
    with torch.device("meta"): ultra = nemotron.Nemotron(nemotron.preset("ultra"))
    cost = SlotCaches(ultra, 1, 65_535, kv_format="fp8").bytes_per_slot()         # and the cell for no token
    book = nemotron.ledger(ultra.config)
    assert cost["kv"] == cost["state"] == 48 * 256 * 64 * 128 * 4 == 65_536 * book.kv_values_per_token
    assert SlotCaches(ultra, 1, 1, state_format="fp16_sr").bytes_per_slot()["state"] * 2 == cost["state"]
    assert SlotCaches(ultra, 1, 1, state_format="int8").bytes_per_slot()["state"] == cost["state"] // 4 + 48 * 256 * 64 * 4
    model = nemotron.Nemotron(MICRO).bfloat16()
    for kv, size in (("fp8", 1), (None, 2), ("bf16", 2), ("fp32", 4)):
        one = SlotCaches(model, 3, 63, kv_format=kv).bytes_per_slot()
        assert one == dict(kv=64 * 2 * 2 * 8 * size, state=2 * 16 * 4 * 8 * 4, window=2 * 4 * 96 * 2, kept=0)
    plain, snap, ring = (SlotCaches(model, 2, 64, k, r).bytes_per_slot() for k, r in ((0, "snapshot"), (6, "snapshot"), (6, "replay")))
    assert snap["state"] == 8 * plain["state"] and ring["state"] == plain["state"] and ring["kept"] == 2 * 17 * (2 * 64 + 2 * 2 * 2 * 8 + 4 * 16)
    assert snap["kv"] == 2 * (64 + 6 + 1) * 2 * 2 * 8 * 2       # the head has keys of its own


@pytest.mark.parametrize("rollback", ROLLBACKS)
def test_a_checkpoint_in_four_bits_is_drafted_for_like_any_other(model, rollback, tmp_path):
    """Experts in packed codes inside the engine's passes: greedy drafts write what generate writes with the same checkpoint. Inputs are not
    rounded, so that products of other shapes cannot cross a border between two codes."""
    nemotron.save_checkpoint(tmp_path / "plain", model)
    recipe = infer.Recipe(weights_only=True, kv_fp8=False, precision=(("mtp.*", "bf16", "head"), ("*.mixer.experts.*", "nvfp4", "experts")))
    infer.quantize_checkpoint(tmp_path / "plain", recipe, tmp_path / "codes", {})
    small, prompts = infer.load_quantized(tmp_path / "codes", dtype=torch.float32), [[25, 31, 40], [50, 22, 77, 90, 34], [61]]
    sampling = nemotron.SamplingParams(max_tokens=12, temperature=0.0, stop_ids=())
    plain, drafted = nemotron.generate(small, prompts, sampling), infer.rollout_engine(draft=3, rollback=rollback)(small, prompts, sampling)
    assert [x.ids for x in drafted] == [x.ids for x in plain]
    assert isinstance(small.backbone.layers[1].mixer.experts, importlib.import_module("03_latentmoe").QuantizedExperts)


def test_a_checkpoints_scales_of_keys_reach_the_cache(model, tmp_path):
    """Keys 2,000 times as large as E4M3 reaches: with the checkpoint's scales the cache keeps them to 4 significant bits; without, it would cut all
    of them at 448."""
    large = copy_of(model)
    layer = large.backbone.layers[MICRO.pattern.index("*")].mixer
    for proj in (layer.k_proj, layer.v_proj): proj.weight.mul_(448 * 2000 / proj.weight.abs().amax() / 4)
    nemotron.save_checkpoint(tmp_path / "plain", large)
    ids, t = torch.randint(20, 96, (1, 30), generator=torch.Generator().manual_seed(0)), 30
    amax = infer.calibrate(large, [infer.Batch(ids, ids, torch.zeros_like(ids), ids > 0)])
    recipe = infer.Recipe(weights_only=True, precision=(("backbone.*.shared_experts.*", "fp8", "shared"),))
    infer.quantize_checkpoint(tmp_path / "plain", recipe, tmp_path / "codes", amax)
    small = infer.load_quantized(tmp_path / "codes", dtype=torch.float32)
    caches = SlotCaches(small, 1, 40, kv_format="fp8")
    with torch.inference_mode():
        rows = caches.rows(None, torch.tensor([t]), t, caches.length_b)
        caches.trunk(ids, rows); caches.commit(rows, rows.count_r)
    pool, want = next((p, w) for p, w in zip(caches.layers, fresh(small, ids[0].tolist())) if isinstance(p, infer.KVPool))
    for stored, scale, theirs in ((pool.k_bhsp, pool.k_scale, want[0]), (pool.v_bhsp, pool.v_scale, want[1])):
        assert theirs.abs().max() > 1000 and scale.item() == pytest.approx(theirs.abs().max().item() / 448, rel=0.1)
        ours = stored.view(torch.float8_e4m3fn)[0, :, :t].float() * scale
        assert ((ours - theirs).abs() <= theirs.abs() / 15 + scale * 2**-9).all()
    assert next(p for p in SlotCaches(small, 1, 40).layers if isinstance(p, infer.KVPool)).k_scale == 1.0
