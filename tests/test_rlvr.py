"""Stage 07, reinforcement learning: formulas by hand, masks by token id, log-probabilities that belong to their tokens, one process equal to two,
workers that die, and a policy that learns."""
import collections
import importlib
import itertools
import json
import math
import multiprocessing
import os
import queue
import random
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from data import corpus, curriculum, tasks, worker

nvfp4, model04, pretrain, sft, stage = (importlib.import_module(m) for m in ("01_nvfp4", "04_model", "05_pretrain", "06_sft", "07_rlvr_mopd"))
MICRO = model04.ModelConfig(pattern="MEM*E", d_model=32, vocab=320, heads=2, kv_heads=1, head_dim=16, mamba_heads=16, mamba_head_dim=2, groups=1,
                            state=8, chunk=16, experts=4, experts_per_token=2, latent=16, expert_width=16, shared_width=16)


@pytest.fixture(scope="module")
def tokenizer():
    return stage.Tokenizer.train(itertools.islice(corpus.stories_and_facts(0), 40), 320)


def micro_model(seed=0):
    """Weights larger than at the usual start, so that distributions differ from token to token."""
    torch.manual_seed(seed)
    model = model04.Nemotron(MICRO)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "conv1d" not in name: p.mul_(4.0)
    return model


def tensor(*values): return torch.tensor(values, dtype=torch.float64)


# ---- formulas

@pytest.mark.parametrize("right, won, lost", [(1, 1.0, -0.2582), (2, 3.6148, -0.3789), (8, 1.0328, -1.0328), (15, 0.2582, -1.0)])
def test_advantages_of_sixteen_answers(right, won, lost):
    """By hand, 2 right: the others of a winner are 1 of 15, mean 1/15, deviation sqrt(15/14 · 1/15 · 14/15) = .2582, so 14/15 / .2582 = 3.61.
    1 right: the others of the winner do not differ, and nothing divides his +1."""
    a = stage.leave_one_out_advantage(tensor(*[1.0] * right, *[0.0] * (16 - right))[None])[0]
    assert a[0].item() == pytest.approx(won, abs=1e-4) and a[-1].item() == pytest.approx(lost, abs=1e-4)
    assert (a[:right] == a[0]).all() and (a[right:] == a[-1]).all()


def test_advantage_is_its_definition_within_each_group():
    """One loop an answer over the others; a group must not hear of its neighbours."""
    r = torch.rand(5, 7, dtype=torch.float64)
    a = stage.leave_one_out_advantage(r, clip=1e9)
    for g, i in itertools.product(range(5), range(7)):
        others = torch.cat([r[g, :i], r[g, i + 1:]])
        assert a[g, i].item() == pytest.approx(((r[g, i] - others.mean()) / (others.std() + 1e-6)).item(), rel=1e-9)


def test_equal_rewards_teach_nothing_and_far_ones_are_clipped():
    for value in (0.0, 1.0, 0.1, 1.1): assert (stage.leave_one_out_advantage(torch.full((2, 7), value)).abs() < 1e-6).all()
    assert (stage.leave_one_out_advantage(torch.tensor([[1.0], [3.0]])) == 0).all()
    far = stage.leave_one_out_advantage(tensor(0.0, 0.01, 0.0, 0.01, 5.0)[None])[0]
    assert far[-1] == 20.0 and stage.leave_one_out_advantage(tensor(0.0, 0.01, 0.0, 0.01, 5.0)[None], clip=3.0)[0, -1] == 3.0


def test_two_answers_have_no_deviation_to_divide_by():
    assert stage.leave_one_out_advantage(tensor(1.0, 0.25)[None])[0].tolist() == [0.75, -0.75]


def test_importance_weights_by_hand_and_at_their_edges():
    w = torch.tensor([0.1, 0.2, 0.4999, 0.5, 1.0, 3.0, 5.0, 5.001, 6.0], dtype=torch.float64)
    zero, logp = torch.zeros_like(w), w.log().requires_grad_()
    tis, pop = stage.importance_weights(logp, zero), stage.importance_weights(logp, zero, "icepop", 0.5 - 1e-12, 5 + 1e-12)
    torch.testing.assert_close(tis, tensor(0.2, 0.2, 0.4999, 0.5, 1, 3, 5, 5, 5))
    torch.testing.assert_close(pop, tensor(0, 0, 0, 0.5, 1, 3, 5, 0, 0))
    assert not tis.requires_grad and not pop.requires_grad
    assert stage.importance_weights(tensor(0.0), tensor(math.log(0.5))).item() == pytest.approx(2.0)      # learner over engine, not the reverse
    assert stage.importance_weights(tensor(900.0), tensor(0.0), "icepop").item() == 0.0      # exp overflows
    assert stage.importance_weights(tensor(math.log(0.3)), tensor(0.0), "icepop").item() == 0.0
    with pytest.raises(ValueError, match="'clamp' is unknown: use 'tis' or 'icepop'"): stage.importance_weights(logp, zero, "clamp")


def test_answers_that_engine_and_learner_disagree_about_are_found():
    """Gaps of 0 and ln 2 of either sign give errors 1 and 2; a token that nobody learns does not count."""
    gap, mask = math.log(2) * torch.tensor([[0.0, 1, 9], [0, -1, 9], [0, 0, 0]]), torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    assert stage.mismatched(gap, torch.zeros(3, 3), mask, 1.49).tolist() == [True, True, False]
    assert stage.mismatched(gap, torch.zeros(3, 3), mask, 1.51).tolist() == [False] * 3
    assert stage.mismatched(gap, torch.zeros(3, 3), torch.ones(3, 3), 2.0).tolist() == [True, True, False]      # (1 + 2 + 512) / 3


@pytest.mark.parametrize("rho, a, value, slope", [(1.5, 1, 1.28, 0), (1.5, -1, -1.5, -1.5), (0.5, -1, -0.8, 0), (0.5, 1, 0.5, 0.5),
                                                  (1.1, 2, 2.2, 2.2), (1.27, 1, 1.27, 1.27), (0.81, -1, -0.81, -0.81)])
def test_the_clip_with_a_stale_old_policy(rho, a, value, slope):
    """Above 1.28 a good answer gains no more, below 0.8 a bad one loses no more; the other two ways are open."""
    logp = tensor(math.log(rho))[None].requires_grad_()
    loss = stage.grpo_loss(logp, torch.zeros(1, 1), tensor(a), torch.ones(1, 1))
    loss.backward()
    assert -loss.item() == pytest.approx(value) and -logp.grad.item() == pytest.approx(slope, abs=1e-12)


def test_with_one_step_a_batch_the_clip_is_inert_and_every_token_counts_alike():
    """rho is 1, so the gradient is - w A / N: 4 learnt tokens in rows of 3 and 1, not a mean of the rows' means."""
    logp = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    mask, weights = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool), torch.tensor([[1.0, 2.0, 0.5], [3.0, 9.0, 9.0]], dtype=torch.float64)
    loss = stage.grpo_loss(logp, logp.detach(), tensor(2.0, -1.0), mask, weights)
    loss.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[-2 / 4, -4 / 4, -1 / 4], [3 / 4, 0, 0]], dtype=torch.float64))
    assert loss.item() == pytest.approx(-(2 * 3.5 - 3.0) / 4)
    assert stage.grpo_loss(logp, logp.detach(), tensor(2.0, -1.0), mask, weights, tokens=8).item() == pytest.approx(-(2 * 3.5 - 3.0) / 8)


def test_effort_by_hand():
    for r, n, out in [(1, 0, 1.1), (1, 7500, 1.05), (0, 7500, 0), (1, 15000, 1), (1, 30000, 0.9), (0, 30000, -0.1)]:
        assert stage.effort_reward(r, n, True) == pytest.approx(out)
        assert stage.effort_reward(r, n, False) == r


# ---- curriculum

def test_quotas_follow_the_bell_and_always_sum():
    """By hand, bins .1 .5 .9 around .5 of width .2: e^-2 = .135 on both sides of 1, 10 shared as 1.06 7.87 1.06."""
    assert stage.gaussian_quotas([0.1, 0.5, 0.9], 0.5, 0.2, 10) == [1, 8, 1] and stage.largest_remainders([2, 1, 1], 5) == [3, 1, 1]
    rng = random.Random(0)
    for _ in range(50):
        bins, total = sorted(rng.random() for _ in range(rng.randrange(1, 9))), rng.randrange(100)
        assert sum(stage.gaussian_quotas(bins, rng.random(), 10 ** rng.uniform(-3, 0), total)) == total
    assert stage.gaussian_quotas([0.9, 0.95], 0.1, 0.001, 4) == [4, 0]      # both weights underflow: the nearest bin is still the nearest


def test_easy_prompts_come_first_and_domains_keep_their_shares():
    def pools(): return {"a": {p / 10: [("a", p, i) for i in range(40)] for p in range(1, 10)}, "b": {0.5: [("b", 5, i) for i in range(40)]}}
    means = []
    for progress in (0.0, 0.5, 1.0):
        got = stage.gaussian_curriculum(pools(), dict(a=3, b=1), progress, 40)
        assert [x[0] for x in got].count("b") == 10 and len(set(got)) == 40
        means.append(sum(x[1] for x in got if x[0] == "a") / 300)
    assert means == pytest.approx([0.7, 0.5, 0.3], abs=0.03)


def test_an_empty_bin_is_refilled_from_the_fullest_and_an_empty_domain_is_said():
    pools = {"a": {0.3: [1], 0.5: [2, 3], 0.7: [4, 5, 6, 7]}}
    got = stage.gaussian_curriculum(pools, dict(a=1), 0.0, 4, start=0.3, sigma=0.01)      # all four are wanted from the bin at .3
    assert got == [1, 4, 5, 2] or got == [1, 4, 5, 6]
    assert sum(map(len, pools["a"].values())) == 3
    with pytest.raises(ValueError, match="a has 3 prompts left and the batch asks for 4: profile more"):
        stage.gaussian_curriculum(pools, dict(a=1), 0.0, 4)


def question(family, domain, level, name): return tasks.Task(family, domain, level, name, "", {})


def test_pools_hold_what_is_solved_sometimes_up_to_the_hardest_level_in_the_band():
    found = [(question("f", "d1", level, f"f{level}{i}"), rate) for level, rates in ((0, (0.5, 1.0, 0.25)), (1, (0.0, 0.5, 0.25)), (2, (0, 0, 0.125)))
             for i, rate in enumerate(rates)]
    found += [(question("g", "d1", 0, "g0"), 0.75), (question("h", "d2", 0, "h0"), 0.8), (question("h", "d2", 0, "h1"), 1.0),
              (question("k", "d3", 0, "k0"), 0.0)]
    pools, table = stage.make_pools(found, (0.1, 0.7))
    names = {domain: {rate: [task.prompt for task in group] for rate, group in bins.items()} for domain, bins in pools.items()}
    # f: level 1 (mean .25) is the highest in the band, 0 comes with it, 2 (.04) does not; g (.75) is above, and d1 has f. d2 has nothing in the band:
    # what is left of it
    assert names == {"d1": {0.5: ["f00", "f11"], 0.25: ["f02", "f12"]}, "d2": {0.8: ["h0"]}}
    assert ["f, level 1", "d1", 3, "25%", "33%", "0%", 2] in table and ["f, level 2", "d1", 3, "4%", "67%", "0%", "-"] in table
    easy = [(question("e", "d", 0, "e0"), 0.9), (question("e", "d", 1, "e1"), 0.5)]       # a level above the band comes with a harder one in it
    assert stage.make_pools(easy, (0.1, 0.7))[0] == {"d": {0.9: [easy[0][0]], 0.5: [easy[1][0]]}}
    with pytest.raises(stage.NothingToLearn, match="no prompt is solved sometimes"): stage.make_pools(found[-1:], (0.1, 0.7))


def test_the_ends_of_the_band_belong_to_it_and_nothing_solved_sometimes_does_not():
    """Means of exactly .25 and .5 in a band of .25 to .5; beyond it by an eighth; and a mean of .5 whose prompts are always or never solved."""
    rates = {("f", 0): (0.0, 0.5), ("f", 1): (0.125,), ("g", 0): (0.75, 0.25), ("g", 1): (0.75, 0.5), ("h", 0): (0.0, 1.0)}
    found = [(question(family, "d", level, f"{family}{level}{i}"), rate) for (family, level), some in rates.items() for i, rate in enumerate(some)]
    assert curriculum.levels_to_learn(found, (0.25, 0.5)) == [("d", "f", 0), ("d", "g", 0)]


def test_many_questions_are_asked_of_the_levels_worth_learning_and_few_of_the_others(tokenizer, monkeypatch):
    """Forty prompts asked four times each would be learnt by heart; and a question that was measured twice would count twice."""
    rates = {("f", 0): 1.0, ("f", 1): 0.5, ("f", 2): 0.0, ("g", 0): 0.75, ("g", 1): 0.0}      # f is learnt up to level 1, g nowhere
    asked = []

    class Machine:
        max_turns = levels = 3
        def sample(self, level, rng): return tasks.Task(self.name, "d", level, f"{self.name} {level} {rng.randrange(10**6)}", "x", {})
        def __init__(self, name): self.name = name

    def scripted(draw, model, step, version):
        asked.append([task for task, _ in draw.plan[step]])
        right = lambda task, i: i < rates[task.family, task.level] * draw.answers
        return [types.SimpleNamespace(score=float(right(task, i))) for task, _ in draw.plan[step] for i in range(draw.answers)]

    monkeypatch.setattr(tasks, "ENVIRONMENTS", {"f": Machine("f"), "g": Machine("g")})
    monkeypatch.setattr(stage.RLConfig, "questions", lambda self, n, split: [
        task for name, level in rates for task in tasks.draw(name, level, n, self.seed, split)])
    monkeypatch.setattr(stage.Draw, "__call__", scripted)
    found = stage.profile(None, None, tokenizer, stage.RLConfig(profile=(8, 4), pool=50, rows=40))
    counts = collections.Counter((task.family, task.level) for task, _ in found)
    assert counts == {("f", 0): 50, ("f", 1): 50, ("f", 2): 8, ("g", 0): 8, ("g", 1): 8}
    assert all(rate == rates[task.family, task.level] for task, rate in found) and len({task.prompt for task, _ in found}) == len(found) == 124
    assert max(map(len, asked)) == 11 and sum(map(len, asked)) == 124      # pieces of about 40 answers


def test_a_plan_gives_every_domain_its_turn_and_begins_prompts_anew():
    pools = {d: {0.5: [question("f", d, 0, f"{d}{i}") for i in range(3)]} for d in "abc"}
    plan = stage.make_plan(pools, 60, 4, (0.7, 0.3, 0.15), 0.25, 0)
    counts = [[task.domain for task, _ in step].count(d) for step in plan for d in "abc"]
    assert len(plan) == 60 and {len(step) for step in plan} == {4} and set(counts) == {1, 2}
    assert all(sum(task.domain == d for step in plan for task, _ in step) == 80 for d in "abc")
    first = [task.prompt for step in plan for task, _ in step if task.domain == "a"][:3]
    assert sorted(first) == ["a0", "a1", "a2"]      # all before any comes again
    modes = [mode for step in plan for _, mode in step]
    assert set(modes) == {"regular", "medium"} and 40 <= modes.count("medium") <= 80      # 60 expected of 240, deviation 6.7
    assert plan == stage.make_plan(pools, 60, 4, (0.7, 0.3, 0.15), 0.25, 0)


# ---- rollouts

class Scripted:
    """An engine that says what it is told, a list of turns for each question, and log-probabilities that name their place."""
    def __init__(self, tokenizer, questions, scripts):
        self.tokenizer, self.prompts, self.scripts, self.said = tokenizer, [q.prompt for q in questions], scripts, [0] * len(questions)

    def __call__(self, model, prompts, sampling):
        out = []
        for prompt in prompts:
            who = next(i for i, asked in enumerate(self.prompts) if f"user\n{asked}" in self.tokenizer.decode(prompt))
            ids = self.scripts[who][self.said[who]]
            self.said[who] += 1
            out.append(model04.Completion(list(ids), [-0.01 * (len(prompt) + i) for i in range(len(ids))], ids[-1] == 11))
        return out


def turn_ids(tokenizer, message, mode):
    """Ids that a model writes for one assistant's turn, by stage 06's own rendering of it."""
    ids, learn = sft.render_chat([dict(role="user", content="q"), message], mode, tokenizer=tokenizer)
    return [i for i, learnt in zip(ids, learn) if learnt]


@pytest.mark.parametrize("mode", ["regular", "medium", "off"])
def test_a_conversation_is_what_stage_06_renders_and_only_the_model_s_words_are_learnt(tokenizer, mode):
    """A worked shop question, played turn by turn, must give 06's ids and mask: prompt, tool responses and heads are False."""
    shop = tasks.ENVIRONMENTS["shop"]
    task = next(t for t in tasks.draw("shop", 1, 20, 0) if t.meta["keys"] and t.meta["expression"])
    talk = sft.thought_of(shop.worked(task, "regular", random.Random(0)))
    script = [turn_ids(tokenizer, message, mode) for message in talk if message["role"] == "assistant"]
    engine = Scripted(tokenizer, [task], [script])
    x, = stage.rollouts(engine, None, tokenizer, [task], [mode], stage.RLConfig().sampling, version=7)
    ids, learn = sft.render_chat(sft.opening(task) + talk, mode, tokenizer=tokenizer, tools=task.tools)
    assert len(script) == 3 and (x.ids, x.learn) == (ids[:len(x.ids)], learn[:len(x.ids)]) and not any(learn[len(x.ids):])
    assert (x.score, x.finished, x.error, x.version) == (1.0, True, None, 7)
    assert [i for i, learnt in zip(x.ids, x.learn) if learnt] == sum(script, [])
    assert [round(-p / 0.01) for p, learnt in zip(x.logp, x.learn) if learnt] == [i for i, learnt in enumerate(x.learn) if learnt]
    assert all(p == 0 for p, learnt in zip(x.logp, x.learn) if not learnt)
    assert x.reward == pytest.approx(1.0 if mode != "medium" else 1 + 0.1 * (1 - len(script[-1]) / 15000))      # the last turn's length


def test_ragged_ends_cut_answers_and_other_cuts_of_a_text(tokenizer):
    """A cut answer scores 0 even when its text would be right; ids stay as drawn where the tokenizer would join them."""
    first, second, third = tasks.draw("gcd", 0, 3, 0)
    letters = [i for c in first.answer for i in tokenizer.encode(c)]
    thought = [*(i for c in "the end" for i in tokenizer.encode(c)), 13]
    spelled = [*thought, *letters, 11]
    assert len(spelled) > len(turn_ids(tokenizer, dict(role="assistant", content=first.answer, reasoning="the end"), "regular"))
    scripts = [[spelled], [thought + tokenizer.encode(second.answer)], [[*tokenizer.encode("Hm."), 11]]]
    a, b, c = stage.rollouts(Scripted(tokenizer, [first, second, third], scripts), None, tokenizer, [first, second, third], ["regular"] * 3,
                             stage.RLConfig().sampling)
    assert (a.score, a.finished, a.ids[-len(spelled):]) == (1.0, True, spelled)
    assert (b.score, b.finished, b.error) == (0.0, False, None) and (c.score, c.finished, c.error) == (0.0, True, "no end of thinking")
    rows = stage.to_rows([a, b, c, c], 2)
    for i, x in enumerate((a, b, c, c)):
        t = len(x.ids) - 1
        assert rows.ids_rt[i, :t].tolist() == x.ids[:-1] and rows.labels_rt[i, :t].tolist() == x.ids[1:] and (rows.doc_rt[i, :t] == 0).all()
        assert rows.labels_rt[i][rows.mask_rt[i]].tolist() == [j for j, learnt in zip(x.ids, x.learn) if learnt]
        assert rows.logp_gen_rt[i][rows.mask_rt[i]].tolist() == pytest.approx([p for p, learnt in zip(x.logp, x.learn) if learnt])
        assert (rows.doc_rt[i, t:] == -1).all() and not rows.mask_rt[i, t:].any()
    assert rows.advantage_rt[:, 0].tolist() == [1.0, -1.0, 0.0, 0.0] and rows.tokens == sum(sum(x.learn) for x in (a, b, c, c))
    filtered = stage.to_rows([a, b, c, c], 2, overlong_filter=True)
    assert not filtered.mask_rt[1].any() and filtered.mask_rt[0].equal(rows.mask_rt[0]) and filtered.advantage_rt[0, 0] == 1.0
    with pytest.raises(ValueError, match="3 rollouts are no groups of 2"): stage.to_rows([a, b, c], 2)


def test_pieces_of_a_batch_add_up_to_it():
    """Sorted by length and cut to their longest: nothing that is learnt may be lost, and the mean over pieces is the loss of the whole."""
    task, draw = question("f", "d", 0, "q"), random.Random(1)
    def make(n): return stage.Rollout(task, "off", [draw.randrange(32, 300) for _ in range(n)], [i > 4 for i in range(n)],
                                      [-draw.random() * (i > 4) for i in range(n)], 0, 0.0, draw.random(), True, None)
    rows = stage.to_rows([make(draw.randrange(6, 60)) for _ in range(12)], 4)
    rows = rows._replace(more=dict(twice=2 * rows.logp_gen_rt))
    pieces, model, objective = rows.split(3), micro_model(), stage.grpo_objective(stage.RLConfig(threshold=1e9))
    assert [p.ids_rt.shape[0] for p in pieces] == [4, 4, 4] and pieces[0].ids_rt.shape[1] < pieces[2].ids_rt.shape[1] == rows.ids_rt.shape[1]
    lengths = [(p.doc_rt >= 0).sum(1) for p in pieces]
    assert all(p.ids_rt.shape[1] == n.max() for p, n in zip(pieces, lengths)) and lengths[0].max() <= lengths[1].min() <= lengths[2].min()
    assert sum(int(p.mask_rt.sum()) for p in pieces) == int(rows.mask_rt.sum()) == int(rows.tokens)
    assert all(p.more["twice"].equal(2 * p.logp_gen_rt) for p in pieces)
    whole = objective(model, rows)
    parts = [objective(model, p) for p in pieces]
    assert whole.total.item() == pytest.approx(sum(p.total.item() for p in parts) / 3, rel=1e-5)
    assert sum(p.sums["weight_histogram"] for p in parts).equal(whole.sums["weight_histogram"])
    assert sum(p.load_me for p in parts).equal(whole.load_me)


def test_an_answer_that_engine_and_learner_disagree_about_is_not_learnt():
    """Of two answers one comes with log-probabilities that are off by 2 (e^2 > 2): its gradient is 0, the other's is as without it."""
    task, model = question("f", "d", 0, "q"), micro_model()
    ids = torch.randint(32, 300, (2, 10))
    learn, doc = [False] * 5 + [True] * 5, torch.zeros(2, 9, dtype=torch.long)
    logp = stage.token_logp(model, ids[:, :-1], doc, ids[:, 1:])[0].detach()
    def grads(gap):
        drawn = [stage.Rollout(task, "off", ids[i].tolist(), learn, [0.0] * 5 + (logp[i, 4:] - gap * i).tolist(), 0, i, float(i), True, None)
                 for i in range(2)]
        rows = stage.to_rows(drawn, 2)._replace(advantage_rt=torch.tensor([[1.0], [float(gap > 0)]]).expand(2, 9))
        loss = stage.grpo_objective(stage.RLConfig())(model, rows)
        return torch.autograd.grad(loss.total, model.lm_head.weight)[0], loss.sums
    (agreed, sums), (filtered, found) = grads(0.0), grads(2.0)
    torch.testing.assert_close(filtered, agreed)
    assert agreed.abs().max() > 0 and (int(sums["mismatched"]), int(found["mismatched"])) == (0, 5)
    assert found["dlogp"].item() == pytest.approx(10.0, rel=1e-4) and found["weight_histogram"].tolist() == [0, 0, 0, 0, 5, 0, 0, 0, 5]


def test_generation_and_training_agree_about_every_token(tokenizer, monkeypatch):
    """Ragged answers of several turns, token by token with caches against one pass over the whole: catches labels that are one off, a response that
    is learnt, and log-probabilities of another temperature. The first turn is forced to be a tool's call."""
    model, plain = micro_model(), tasks.draw("gcd", 0, 3, 0)
    shops = [t for t in tasks.draw("shop", 0, 20, 0) if t.meta["keys"]][:2]
    calls = [turn_ids(tokenizer, sft.thought_of(tasks.ENVIRONMENTS["shop"].worked(t, "regular", random.Random(0)))[0], "regular") for t in shops]
    questions, turns, seeds, drawn = [*shops, *plain], [], set(), model04.sample
    def forced(logits_bv, temperature, top_p, u_b):
        """In the first turn the shop's rows say their calls."""
        next_b = drawn(logits_bv, temperature, top_p, u_b)
        if turns[-1] == 0 and len(logits_bv) == 5:
            place = forced.place
            for i, ids in enumerate(calls): next_b[i] = ids[place] if place < len(ids) else next_b[i]
            forced.place += 1
        return next_b
    forced.place = 0
    monkeypatch.setattr(model04, "sample", forced)
    def engine(model, prompts, sampling):
        turns.append(len(turns)); seeds.add(sampling.seed)
        return stage.sampled(model, prompts, sampling)
    found = stage.rollouts(engine, model, tokenizer, questions, ["regular", "medium", "off", "regular", "medium"],
                           replace(stage.RLConfig().sampling, max_tokens=max(map(len, calls)) + 3))
    assert len(turns) == len(seeds) == 2 and tokenizer.decode(found[0].ids).count("<tool_response>") == 1 and len({len(x.ids) for x in found}) == 5
    rows = stage.to_rows(found)
    logp_rt, entropy_rt, load_me = stage.token_logp(model, rows.ids_rt, rows.doc_rt, rows.labels_rt.masked_fill(~rows.mask_rt, -1))
    assert (logp_rt - rows.logp_gen_rt).abs().max() < 1e-4
    assert rows.logp_gen_rt[rows.mask_rt].std() > 0.3 and (logp_rt[~rows.mask_rt] == 0).all() and (entropy_rt[rows.mask_rt] > 0).all()
    assert load_me.sum(1).tolist() == [2 * sum(len(x.ids) - 1 for x in found)] * 2      # two experts a token, no padding


def test_token_logp_is_log_softmax_and_its_gradient(tokenizer):
    model = micro_model().double()
    ids = torch.randint(32, 300, (2, 9))
    doc, labels = torch.zeros_like(ids), torch.randint(0, 320, (2, 9))
    labels[0, :4] = -1
    logp, entropy, _ = stage.token_logp(model, ids, doc, labels, temperature=2.0)
    logits = model(ids, doc) / 2.0
    for i, t in itertools.product(range(2), range(9)):
        p = logits[i, t].softmax(-1)
        assert logp[i, t].item() == pytest.approx(p[labels[i, t]].log().item() if labels[i, t] >= 0 else 0.0, abs=1e-9)
        assert entropy[i, t].item() == pytest.approx(-(p * p.log()).sum().item() if labels[i, t] >= 0 else 0.0, abs=1e-9)
    weights = torch.randn(2, 9, dtype=torch.float64)
    got = torch.autograd.grad((logp * weights).sum(), model.lm_head.weight)[0]
    every = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-1).view(2, 9)
    torch.testing.assert_close(got, torch.autograd.grad((every * weights).sum(), model.lm_head.weight)[0])
    assert not entropy.requires_grad


def test_a_reward_that_is_no_number_names_family_and_prompt(tokenizer):
    class Broken(tasks.Environment):
        def score(self, task, completion, thinking=True): return math.nan
    task = question("broken", "d", 0, "why?")
    with pytest.raises(ValueError, match="family broken scored an answer nan; the prompt is 'why\\?'"):
        stage.rollouts(Scripted(tokenizer, [task], [[[40, 11]]]), None, tokenizer, [task], ["off"], stage.RLConfig().sampling,
                       environments=dict(broken=Broken()))


def test_what_rollouts_refuse(tokenizer):
    """Log-probabilities at temperature 1 are another policy's when something else drew; an engine that keeps none is found at once."""
    task, sampling = question("gcd", "numbers", 0, "q"), stage.RLConfig().sampling
    for bad in (dict(temperature=0.7), dict(top_p=0.95), dict(temperature=0.0)):
        with pytest.raises(ValueError, match="rollouts need 1 and 1"):
            stage.rollouts(None, None, tokenizer, [task], ["off"], replace(sampling, **bad))
    silent = lambda model, prompts, sampling: [model04.Completion([40, 11], [], True)]
    with pytest.raises(ValueError, match="0 log-probabilities for 2 tokens"): stage.rollouts(silent, None, tokenizer, [task], ["off"], sampling)


# ---- learning

class Bandit(tasks.Environment):
    """A question whose right answers are one class of letters in eight."""
    name, domain, levels = "bandit", "d", 1
    def score(self, task, completion, thinking=True): return float(bool(completion) and ord(completion[0]) % 8 == task.meta["class"])


class OneToken:
    """The engine for a bandit: an answer is a single token, and complete. `stop`: the call at which this engine fails."""
    def __init__(self, stop=10**9): self.calls, self.stop = 0, stop
    def __call__(self, model, prompts, sampling):
        self.calls += 1
        if self.calls > self.stop: raise ValueError("the sandbox is on fire")
        return stage.sampled(model, prompts, replace(sampling, max_tokens=1, stop_ids=tuple(range(320))))


def bandit(tokenizer, config, engine=None, prompts=2):
    plan = [[(tasks.Task("bandit", "d", 0, f"question {i}", "", {"class": 2 * i + 1}), "off") for i in range(prompts)] for _ in range(config.steps)]
    return stage.Draw(engine or OneToken(), tokenizer, plan, config.answers, config.sampling, config.seed, config.effort, dict(bandit=Bandit()))


def run(tokenizer, home, config, trainer=None, engine=None, after=None):
    trainer = trainer or stage.RLTrainer(config.training(), micro_model(), None, home, policy=stage.grpo_objective(config), tokenizer=tokenizer)
    read = lambda model, drawn: stage.to_rows(drawn, config.answers)
    assert stage.fit_policy(trainer, bandit(tokenizer, config, engine), config, read, after)
    return trainer


@pytest.fixture
def config(tmp_path):
    return stage.RLConfig(out=tmp_path, prompts=2, answers=16, steps=4, lr=3e-3, warmup_steps=2, micro_batches=2, sync=True, save_every=2)


def test_a_step_moves_what_it_should_and_nothing_else(tokenizer, config, tmp_path):
    """Router weights and the head are untouched to the bit, the experts' selection bias moves by its rate, the rest learns."""
    before = {name: x.clone() for name, x in micro_model().state_dict().items()}
    trainer = run(tokenizer, tmp_path / "a", replace(config, steps=1, warmup_steps=1, seed=2))
    after = trainer.model.state_dict()
    assert trainer.rows[0]["grad_norm"] > 0      # the seed gives different rewards
    same = {name for name in before if after[name].equal(before[name])}
    routers = {name for name in before if name.endswith("gate.weight")}
    head = {name for name in before if name.startswith("mtp.")}
    biases = {name for name in before if name.endswith("e_score_correction_bias")} - head
    assert len(routers) == 3 and len(biases) == 2 and same == routers | head
    for name in biases: assert set(after[name].sub(before[name]).abs().mul(1000).round(decimals=3).unique().tolist()) <= {0.0, 1.0}
    assert trainer.optimizer.param_groups[0]["betas"] == (0.9, 0.999) and all(g["weight_decay"] == 0 for g in trainer.optimizer.param_groups)


def test_grpo_learns_a_bandit_with_two_questions(tokenizer, config, tmp_path):
    """From an eighth by chance to nine in ten; the questions want different letters, so advantages must stay with their prompts."""
    settings = replace(config, steps=50, lr=6e-3, warmup_steps=5, save_every=1000, answers=32, micro_batches=1)
    rows = run(tokenizer, tmp_path / "a", settings).rows
    early, late = (sum(row["reward"] for row in part) / len(part) for part in (rows[:2], rows[-5:]))
    assert early < 0.3 and late > 0.9
    assert rows[-1]["entropy"] < rows[0]["entropy"] and all(row["age"] == 0 and row["dlogp"] < 1e-5 for row in rows)


def test_learning_rate_warms_up_from_a_tenth_and_stays(tokenizer, config):
    """[RL] 4e-7 to 4e-6 in ten steps, then constant."""
    make = replace(config, steps=40, lr=4e-6, warmup_steps=10).training()
    rates = [pretrain.wsd_lr(n, make.steps, make.warmup_steps, make.decay_steps, make.lr, make.lr_min) for n in (1, 5, 10, 11, 40)]
    assert rates == pytest.approx([4e-7, 2e-6, 4e-6, 4e-6, 4e-6])


def test_a_resumed_run_continues_to_the_bit(tokenizer, config, tmp_path):
    straight = run(tokenizer, tmp_path / "a", config)
    def stop(trainer):
        if trainer.step == 3: raise KeyboardInterrupt
        return {}
    with pytest.raises(KeyboardInterrupt): run(tokenizer, tmp_path / "b", config, after=stop)
    folder = pretrain.newest_checkpoint(tmp_path / "b")
    assert folder.name == "step-000002"
    loaded = stage.RLTrainer.load(folder, config.training(), None, tmp_path / "b", policy=stage.grpo_objective(config), tokenizer=tokenizer)
    resumed = run(tokenizer, tmp_path / "b", config, loaded)
    for key in ("loss", "reward", "grad_norm", "entropy"): assert [r[key] for r in straight.rows[2:]] == [r[key] for r in resumed.rows]
    assert all(x.equal(y) for x, y in zip(straight.model.state_dict().values(), resumed.model.state_dict().values()))


# ---- two processes

def test_the_worker_takes_new_weights_in_the_middle_of_an_answer(tokenizer):
    """The worker's function itself, with a pipe that is a list: while it draws, another version is published."""
    learner, sent = micro_model(1), []
    shared = stage.SharedWeights(learner, 3)
    def draw(model, step, version):
        first = model.lm_head.weight.equal(learner.lm_head.weight)
        with torch.no_grad():
            for p in learner.parameters(): p.add_(1.0)
        shared.publish(learner, 4)
        stage.sampled(model, [[40, 41]], stage.RLConfig(max_tokens=2).sampling)
        return version, first, all(x.equal(y) for x, y in zip(model.state_dict().values(), learner.state_dict().values()))
    pipe, threads = type("Pipe", (), dict(send=staticmethod(sent.append))), torch.get_num_threads()
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        for in_flight in (True, False):
            shared.publish(learner, 3)
            worker.work(draw, partial(model04.Nemotron, MICRO), "cpu", shared, range(3, 4), 1, in_flight, 1, pipe)
    finally:
        for which, handler in handlers.items(): signal.signal(which, handler)
        torch.set_num_threads(threads)
    assert sent == [(3, True, True), (3, True, False)]


def test_two_processes_at_age_0_are_one_process_to_the_bit(tokenizer, config, tmp_path):
    """Same questions, same dice, same weights: whatever differs is a mistake in sending weights or rollouts."""
    one, two = run(tokenizer, tmp_path / "a", config), run(tokenizer, tmp_path / "b", replace(config, sync=False, age=0))
    for key in ("loss", "reward", "grad_norm", "entropy", "dlogp", "weight_histogram", "age", "max_vio"):
        assert [row[key] for row in one.rows] == [row[key] for row in two.rows], key
    assert len({row["reward"] for row in one.rows}) > 1 and one.rows[-1]["grad_norm"] > 0
    assert all(x.equal(y) for x, y in zip(one.model.state_dict().values(), two.model.state_dict().values()))


def test_one_step_off_policy_until_the_worker_is_killed(tokenizer, config, tmp_path):
    """Age 1 from the second step on, and its trace in the log-probabilities. Killed, it must not leave the learner waiting."""
    killed = []
    def kill(trainer):
        if trainer.step == 5:
            for child in multiprocessing.active_children(): os.kill(child.pid, signal.SIGKILL)
            killed.append(time.perf_counter())
        return {}
    with pytest.raises(ValueError, match=r"worker failed at step \d: it died with exit code -9; --resume goes on"):
        run(tokenizer, tmp_path / "a", replace(config, sync=False, steps=2000), after=kill)
    assert time.perf_counter() - killed[0] < 5
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [row["age"] for row in rows[:5]] == [0, 1, 1, 1, 1]
    assert rows[0]["dlogp"] < 1e-5 and all(1e-5 < row["dlogp"] < 0.5 for row in rows[2:])
    assert pretrain.newest_checkpoint(tmp_path / "a").name in ("step-000004", "step-000006")


def test_a_worker_that_dies_before_it_begins_is_told_from_one_that_waits(tmp_path):
    """A script without a main guard: the worker imports it, starts a worker itself and dies. Handed over by start(), a plan of more than 64 KB would
    keep the learner waiting for ever."""
    script = tmp_path / "unguarded.py"
    script.write_text("import sys\nsys.path.insert(0, sys.argv[1])\nimport torch\nfrom data.worker import Worker\n"
                      "Worker([0] * 200_000, torch.nn.Identity, torch.nn.Linear(1, 1), 0, 1)\n")
    ended = subprocess.run([sys.executable, script, Path(stage.__file__).parent], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1 and "the generation worker died before it began, with exit code 1" in ended.stderr


class Dying:
    """A process that is gone, and has an exit code, once somebody has waited for it; alive until it is killed."""
    def __init__(self, told=False): self.told, self.gone = told, False
    def kill(self): self.told = True
    def join(self, timeout=None): self.gone |= self.told

    @property
    def exitcode(self): return -9 if self.gone else None


def test_a_killed_worker_is_waited_for():
    """Told to go and not gone, it would still hold its memory when the next one starts; and before it is waited for it has no exit code to report."""
    made = worker.Worker.__new__(worker.Worker)
    made.shared, made.process, made.ready = types.SimpleNamespace(version=types.SimpleNamespace(value=3)), Dying(), queue.Queue()
    made.close()
    assert made.process.gone and made.shared.version.value < 0
    made.process = Dying(told=True)
    made.ready.put(None)
    with pytest.raises(ValueError, match="failed at step 5: it died with exit code -9"): made.take(4)


def test_what_a_worker_stumbles_over_reaches_the_user(tokenizer, config, tmp_path):
    with pytest.raises(ValueError, match="worker failed at step 2: the sandbox is on fire"):
        run(tokenizer, tmp_path / "a", replace(config, sync=False), engine=OneToken(stop=1))


def test_ctrl_c_reaches_both_and_the_step_is_saved(tokenizer, config, tmp_path):
    """A terminal and a scheduler signal the whole group: the worker must outlive it until the learner has finished, and then be gone."""
    settings = replace(config, sync=False, steps=2000, save_every=1000)
    def interrupt(trainer):
        if trainer.step == 2:
            for which in (os.getpid(), *(child.pid for child in multiprocessing.active_children())): os.kill(which, signal.SIGTERM)
        return {}
    trainer = stage.RLTrainer(settings.training(), micro_model(), None, tmp_path / "a", policy=stage.grpo_objective(settings), tokenizer=tokenizer)
    read = lambda model, drawn: stage.to_rows(drawn, settings.answers)
    assert not stage.fit_policy(trainer, bandit(tokenizer, settings), settings, read, interrupt)
    assert pretrain.newest_checkpoint(tmp_path / "a").name == f"step-{trainer.step:06d}" and trainer.step in (2, 3)
    assert not multiprocessing.active_children()


# ---- the command

class Coin(Bandit):
    """Solved by about half of all answers, whoever gives them."""
    name, domain = "coin", "coins"
    def sample(self, level, rng): return tasks.Task("coin", "coins", level, f"flip {rng.randrange(10**6)}", "x", {"class": rng.randrange(2)})
    def score(self, task, completion, thinking=True): return float(bool(completion) and ord(completion[-1]) % 2 == task.meta["class"])


def test_the_command_runs_every_phase_and_goes_on(tokenizer, config, tmp_path, monkeypatch, capsys):
    """Start to end on a stand-in family, and again with --resume from half way: the rows must be those of the first time."""
    monkeypatch.setattr(tasks, "ENVIRONMENTS", dict(coin=Coin()))
    monkeypatch.setattr(tasks, "DOMAINS", dict(coins=["coin"]))
    monkeypatch.setattr(stage, "TEACHERS", dict(coins="rlvr"))
    plain = stage.reinforce
    monkeypatch.setattr(stage, "reinforce", lambda config, base, engine=None: plain(config, base, OneToken()))
    base = tmp_path / "sft" / "step-000001"
    with pytest.raises(ValueError, match="run python 06_sft.py first"): stage.main(replace(config, families=("all",)))
    model04.save_checkpoint(base, micro_model(), tokenizer)
    (base / "files.json").write_text(json.dumps({f.name: f.stat().st_size for f in base.iterdir()}))
    after = stage.MOPDConfig(teachers=("coins",), teacher_steps=2, teacher_prompts=2, warmup=(6, 2), steps=2, prompts=4, boost=(2, 1, 64),
                             boost_rollouts=4, depths=2, held_out=6)
    settings = replace(config, families=("all",), band=(0.0, 1.0), eval_every=2, medium=0.3, max_tokens=4, seed=1, mopd=after)
    stage.main(settings)
    text = capsys.readouterr().out
    for part in ("pass rates before", "coin, level 0", "teacher of coins: rlvr", "answered exactly (95 % interval), and recovery", "tokens a pass"):
        assert part in text, part
    row = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
    assert row["stage"] == "07_rlvr_mopd" and set(row["accuracy"]) == {"SFT", "RLVR", "MOPD1", "teacher"}
    assert {d for by in row["accuracy"].values() for d in by} == {"coins"} and all(1 <= x <= 3 for x in row["drafts"].values())
    assert (tmp_path / "07_rlvr_mopd.png").exists() and len(list(tmp_path.glob("*/step-*"))) >= 6
    log = config.home / "metrics.jsonl"
    first = [json.loads(line) for line in log.read_text().splitlines()]
    assert [("held_out" in r) for r in first] == [False, True, False, True]
    for key in ("score_by_domain", "zero_advantage", "weight_histogram", "dlogp", "age", "tokens", "entropy", "reward"): assert key in first[0]
    assert sum(first[0]["weight_histogram"]) == pytest.approx(1.0) and set(first[0]["score_by_domain"]) == {"coins"}
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"): stage.main(settings)
    pretrain.shutil.rmtree(config.home / "step-000004")
    with pytest.raises(ValueError, match="had lr = 0.003, not 0.1"): stage.main(replace(settings, resume=True, lr=0.1))
    stage.main(replace(settings, resume=True))
    again = [json.loads(line) for line in log.read_text().splitlines()]
    for key in ("loss", "reward", "grad_norm", "held_out"): assert [r.get(key) for r in again] == [r.get(key) for r in first], key
    repeated = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
    assert all(repeated[key] == row[key] for key in ("accuracy", "recovery", "drafts"))


def test_settings_that_cannot_be_are_refused():
    for bad, message in ((dict(answers=1), "answers = 1 must be at least 2"), (dict(age=-1), "age = -1 must be at least 0"),
                         (dict(prompts=3, answers=3, micro_batches=2), "9 answers cannot be cut into micro_batches = 2"),
                         (dict(medium=2.0), "medium = 2.0 must be a share"), (dict(domains=("cooking",)), "unknown domain 'cooking': choose some of"),
                         (dict(weights="none"), "weights = 'none' is unknown"), (dict(effort=(0.1, 0)), "must be positive")):
        with pytest.raises(ValueError, match=message): stage.RLConfig(**bad)
