"""Stage 07, second half: pivots, distillation from several teachers, and the boosted MTP head, each against numbers worked by hand."""
import importlib
import itertools
import json
import math
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import corpus, tasks
from data.batches import Batch

nemotron, sft, rl = (importlib.import_module(m) for m in ("04_model", "06_sft", "07_rlvr_mopd"))
stage = rl
# the smallest sizes that stage 04 accepts, with every kind of layer and the MTP head
MICRO = nemotron.ModelConfig(pattern="MEM*E", d_model=32, vocab=320, heads=2, kv_heads=1, head_dim=16, mamba_heads=16, mamba_head_dim=2, groups=1,
                             state=8, chunk=16, experts=4, experts_per_token=2, latent=16, expert_width=16, shared_width=16)
SMALL = nemotron.ModelConfig(**{**MICRO.__dict__, "vocab": 32})


def make(config=MICRO, seed=0, scale=1.0, dtype=torch.float32):
    """A model whose every matrix matters: at the default init its layers hardly speak."""
    torch.manual_seed(seed)
    model = nemotron.Nemotron(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1: p.normal_(0, scale / math.sqrt(p.shape[-1]))
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return sft.Tokenizer.train(itertools.islice(corpus.stories_and_facts(0), 40), 320)


# ---- PivotRL

def test_pivots_are_the_turns_that_are_neither_solved_nor_hopeless():
    """Keeping a turn of equal rewards wastes its rollouts; the bound is strict, and a mean on it is out."""
    rewards = torch.tensor([[0., 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 0]])
    assert stage.pivot_turns(rewards, 0.8).tolist() == [False, False, True, True]
    assert stage.pivot_turns(rewards, 0.75).tolist() == [False, False, True, False]
    assert stage.pivot_turns(rewards, 0.5).tolist() == [False, False, False, False]


def test_a_call_is_right_whatever_the_order_of_its_arguments():
    """A verifier that compares text refuses what a tool would answer alike; one that compares names only accepts any key."""
    call = lambda name, **arguments: dict(name=name, arguments=arguments)
    expert = [call("find", key="red kite", limit="3"), call("sum", of="1 + 2")]
    assert stage.same_calls(expert, [call("sum", of=" 1  + 2\n"), call("find", limit="3", key="red kite")])
    assert stage.same_calls([call("f", n=3, some=[1, 2])], [call("f", some="[1, 2]", n="3")])      # a model writes text, a data set values
    for other in ([call("find", key="red kite", limit="4"), expert[1]], [call("look", key="red kite", limit="3"), expert[1]], expert[:1],
                  [call("find", key="red kite"), expert[1]], [call("find", limit="red kite", key="3"), expert[1]], [*expert, expert[1]]):
        assert not stage.same_calls(expert, other), other
    assert not stage.same_calls([expert[0], expert[0]], [expert[0], expert[1]])


def test_every_turn_of_a_tool_conversation_is_cut_and_verified():
    """A worked shop question: a turn is judged by the expert's call, the last by its answer, and what does not parse is wrong."""
    task = tasks.draw("shop", 1, 1, 0)[0]
    worked = tasks.ENVIRONMENTS["shop"].worked(task, "regular", random.Random(0))
    pivots = stage.cut_turns(task, [*sft.opening(task), *worked], "regular")
    assert [len(p.history) for p in pivots] == [1, 3, 5] and [p.action for p in pivots] == worked[::2]
    wire = lambda call: "<tool_call>\n<function={}>\n{}</function>\n</tool_call>".format(
        call["name"], "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in call["arguments"].items()))
    first, last = pivots[0], pivots[-1]
    right = first.action["tool_calls"][0]
    assert stage.verify_turn(first, f"any thought</think>\n{wire(right)}\n") == 1
    assert stage.verify_turn(first, f"</think>{wire(dict(right, name='calculate'))}") == 0
    assert stage.verify_turn(first, f"</think>{wire(dict(right, arguments=dict(key='no such thing')))}") == 0
    assert stage.verify_turn(first, f"</think>{task.answer}") == 0      # right, but not what this turn is for
    assert stage.verify_turn(first, wire(right)) == 0                   # no end of thinking
    assert stage.verify_turn(last, f"hm</think>{task.answer}") == 1 and stage.verify_turn(last, f"hm</think>{task.answer}1") == 0
    assert stage.verify_turn(last._replace(mode="off"), task.answer) == 1 and stage.verify_turn(first._replace(mode="off"), wire(right)) == 1


# ---- the distillation loss

def test_a_teacher_equal_to_the_student_teaches_nothing():
    """On-policy and equal: loss and gradient are zero exactly. An advantage that forgets its detach, or a KL bonus, shows here."""
    logp = torch.randn(3, 4, requires_grad=True)
    same = logp.detach()
    loss = stage.mopd_loss(logp, same, same, same, torch.ones(3, 4))
    loss.backward()
    assert loss.item() == 0 and logp.grad.abs().max() == 0


def test_the_advantage_is_what_the_teacher_finds_likelier():
    """Teacher log 2 above the student everywhere: gradient -log 2 / tokens on learnt tokens, 0 on others, whatever the policy that began."""
    logp = torch.randn(2, 3, requires_grad=True)
    mask = torch.tensor([[1., 1, 0], [1, 0, 0]])
    stage.mopd_loss(logp, logp.detach(), logp.detach(), logp.detach() + math.log(2), mask).backward()
    torch.testing.assert_close(logp.grad, -math.log(2) / 3 * mask)
    logp.grad = None
    stage.mopd_loss(logp, logp.detach(), logp.detach(), logp.detach() + math.log(2), mask, tokens=30).backward()
    torch.testing.assert_close(logp.grad, -math.log(2) / 30 * mask)


@pytest.mark.parametrize("ratio, a, value, slope", [(1.5, 1, 1.2, 0), (1.5, -1, -1.5, -1.5), (0.5, -1, -0.8, 0), (0.5, 1, 0.5, 0.5),
                                                    (1.1, 2, 2.2, 2.2)])
def test_the_surrogate_is_clipped_where_it_has_gone_far_enough(ratio, a, value, slope):
    """By hand, both signs: a token the teacher likes is not pushed beyond 1.2 times, one that it dislikes not below 0.8 times."""
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    zero = torch.zeros(1, 1)
    loss = stage.mopd_loss(logp, zero, zero, torch.full((1, 1), float(a)), torch.ones(1, 1))
    loss.backward()
    assert -loss.item() == pytest.approx(value, rel=1e-5) and -logp.grad.item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_tokens_on_which_engine_and_learner_disagree_are_left_out():
    """IcePop: c = pi_prox / pi_gen weighs a token inside [0.5, 2], both ends included, and silences it outside. The denominator stays."""
    c = torch.tensor([[0.49, 0.5, 1.0, 2.0, 2.01]], dtype=torch.float64)
    prox = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    gen = -c.log()
    gen[0, 1], gen[0, 3] = math.log(2), -math.log(2)      # exp gives exactly 0.5 and 2
    logp = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    stage.mopd_loss(logp, prox, gen, torch.ones(1, 5, dtype=torch.float64), torch.ones(1, 5)).backward()
    torch.testing.assert_close(logp.grad, -torch.tensor([[0, 0.5, 1, 2, 0]], dtype=torch.float64) / 5)
    assert prox.grad is None      # neither policy of the past is learnt


def test_the_sampled_gradient_is_that_of_the_full_reverse_kl():
    """Five tokens, all of them enumerated: the mean over what the student may draw equals the gradient of sum p log(p / p_T)."""
    torch.manual_seed(0)
    z, teacher = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64).log_softmax(-1)
    logp = z.log_softmax(-1)
    exact, = torch.autograd.grad((logp.exp() * (logp - teacher)).sum(), z, retain_graph=True)
    now = logp.detach()
    sampled = torch.zeros_like(exact)
    for token in range(5):
        one = slice(token, token + 1)
        loss = stage.mopd_loss(logp[None, one], now[None, one], now[None, one], teacher[None, one], torch.ones(1, 1))
        sampled += now[token].exp() * torch.autograd.grad(loss, z, retain_graph=True)[0]
    torch.testing.assert_close(sampled, exact, rtol=1e-12, atol=1e-14)
    # drawn by an older policy, c makes up for it: the mean over *its* draws is the same
    old, shifted = (now + 0.3 * torch.randn(5, dtype=torch.float64)).log_softmax(-1), torch.zeros_like(exact)
    for token in range(5):
        one = slice(token, token + 1)
        loss = stage.mopd_loss(logp[None, one], now[None, one], old[None, one], teacher[None, one], torch.ones(1, 1))
        shifted += old[token].exp() * torch.autograd.grad(loss, z, retain_graph=True)[0]
    torch.testing.assert_close(shifted, exact, rtol=1e-12, atol=1e-14)


def test_recovery_is_the_share_of_the_gap_that_was_closed():
    """The report's rows: beyond the teacher on Terminal Bench, two thirds on BrowseComp. Without a gap there is no share."""
    assert stage.recovery_rate(54.0, 44.5, 50.0) == pytest.approx(1.727, abs=5e-4)
    assert stage.recovery_rate(44.4, 31.0, 51.0) == pytest.approx(0.67, abs=5e-4)
    assert stage.recovery_rate(88.6, 84.5, 92.5) == pytest.approx(0.513, abs=1e-3)
    with pytest.raises(ValueError, match="no gap"): stage.recovery_rate(0.5, 0.4, 0.4)


# ---- hidden-state mixing

def test_all_states_to_choose_from_predict_the_same_target():
    """Brute force: state j at token t predicts token t + j + 1, so what is mixed for depth k at t comes from token t + k - 1 - j, same document."""
    torch.manual_seed(0)
    doc = torch.tensor([[0] * 4 + [1] * 5 + [-1] * 2, [0] * 7 + [2] * 4])
    b, t = doc.shape
    for k in (1, 2, 3, 6):
        code = lambda row, token, j: 10_000 * row + 100 * token + j
        history = [torch.tensor([[[code(r, s, j), s + j + 1] for s in range(t)] for r in range(b)], dtype=torch.float64) for j in range(k)]
        choice = torch.randint(0, k, (b, t))
        mixed = stage.mix_hidden(history, choice, doc)
        for r, s in itertools.product(range(b), range(t)):
            j = choice[r, s].item()
            at = s + (k - 1 - j)
            if at >= t or doc[r, at] != doc[r, s]: j, at = k - 1, s      # no such state is left: the newest
            assert mixed[r, s].tolist() == [code(r, at, j), s + k], (k, r, s)


def test_choosing_the_newest_state_is_plain_chaining():
    history = [torch.randn(2, 6, 3) for _ in range(4)]
    torch.testing.assert_close(stage.mix_hidden(history, torch.full((2, 6), 3), torch.zeros(2, 6)), history[-1], rtol=0, atol=0)


def test_a_switch_says_whether_the_trunk_s_state_may_be_chosen(monkeypatch):
    """Megatron chooses among h_0 .. h_(k-1), the report among h_1 .. h_(k-1); depth 1 has nothing to choose."""
    seen = []
    plain = stage.mix_hidden
    monkeypatch.setattr(stage, "mix_hidden", lambda history, choice, doc: seen.append((len(history), choice)) or plain(history, choice, doc))
    model, batch = make(), packed(40, documents=(40,), learnt=range(40))
    for mixing, lowest in (("trunk", 0), ("heads", 1)):
        seen.clear()
        stage.boosting_loss(model, batch, depths=4, mixing=mixing)
        assert [n for n, _ in seen] == [2, 3, 4]
        assert [(c.min().item(), c.max().item()) for _, c in seen] == [(lowest, n - 1) for n, _ in seen]
    seen.clear()
    stage.boosting_loss(model, batch, depths=4, mixing="off")
    assert not seen


# ---- boosting

def packed(t, documents, learnt, rows=2, vocab=320, seed=0):
    """A batch of rows of `documents` lengths (the rest is padding); learnt: positions whose *next* token is learnt."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(12, vocab, (rows, t + 1), generator=g)
    doc = torch.full((t + 1,), -1)
    for i, n in enumerate(documents): doc[(doc == -1).nonzero()[0, 0]:][:n] = i
    batch = Batch.from_windows(ids.numpy(), doc.expand(rows, -1).numpy())
    mask = torch.zeros(rows, t, dtype=torch.bool)
    mask[:, list(learnt)] = True
    return batch._replace(mask_bt=batch.mask_bt & mask)


def echo(model):
    """Makes trunk and head the same function of the last token alone: every mixer writes 0, the head hands its embedding through."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(nemotron.OUTPUTS): p.zero_()
        d = model.config.d_model
        model.mtp.layers[0].eh_proj.weight.copy_(torch.cat([torch.eye(d), torch.zeros(d, d)], 1))
        model.backbone.embeddings.weight.mul_(30)      # rmsnorm's epsilon no longer shows
    return model


def test_a_head_equal_to_its_trunk_has_nothing_to_learn():
    """Each depth is compared with the trunk that many tokens later: one token off, and the two would differ."""
    model, batch = echo(make(dtype=torch.float64)), packed(40, (17, 20), range(5, 35))
    losses = stage.boosting_loss(model, batch, depths=5)
    assert losses.total.item() < 1e-6 and len(losses.mtp_k) == 5
    with torch.no_grad(): model.mtp.layers[0].eh_proj.weight.add_(0.1 * torch.randn(32, 64))
    assert stage.boosting_loss(model, batch, depths=5).total.item() > 1e-3


@pytest.mark.parametrize("temperature", [0.5, 2.0, 5.0])
def test_the_loss_is_t_squared_times_the_divergence_of_softened_distributions(temperature):
    """A second derivation: for a small difference delta of logits the loss is Var(delta) / 2 under softmax(z / T), whatever T: without T² it would
    fade as 1 / T². One token, one depth, float64; the difference is put into the head through its last norm."""
    model = echo(make(dtype=torch.float64))
    batch = packed(8, (8,), range(2, 4), rows=1)      # one start: token 2, target 4
    torch.manual_seed(1)
    with torch.no_grad(): model.mtp.layers[-1].final_layernorm.weight.mul_(1 + 1e-3 * torch.randn(32, dtype=torch.float64))
    got = stage.boosting_loss(model, batch, depths=1, temperature=temperature).total.item() * 2      # |A| = 2, one of them has a draft
    h = model.hidden(batch.ids_bt)[0, 3]
    z, other = model.lm_head(h), model.lm_head(h * model.mtp.layers[-1].final_layernorm.weight)
    p, delta = (z / temperature).softmax(-1), other - z
    variance = (p * delta ** 2).sum() - (p * delta).sum() ** 2
    assert got == pytest.approx(variance.item() / 2, rel=2e-2)


def test_boosting_stays_inside_an_answer():
    """By brute force over positions: a draft counts when the token behind its start and every one up to its target are learnt, in one document.
    A mask rolled too little compares with a question, rolled across documents with another conversation."""
    t, documents, learnt = 30, (11, 15), [2, 3, 4, 5, 8, 9, 10, 11, 12, 20, 21, 22, 23, 24, 25, 26]
    batch = packed(t, documents, learnt, rows=1)
    model = make(dtype=torch.float64)
    depths, T = 3, 2.0
    total, counted = 0.0, 0
    first = [0] * 11 + [11] * 15      # where the document of a token begins
    label = [p in learnt and p + 1 < 26 and first[p + 1] == first[p] for p in range(26)] + [False] * 10
    for p in range(26):
        for k in range(1, depths + 1):
            if not all(label[p:p + k + 1]) or first[p + k] != first[p]: continue
            ids = batch.ids_bt[:, first[p]:first[p] + (11 if first[p] == 0 else 15)]
            h = model.hidden(ids)
            here, z = p - first[p], model.lm_head(h)[0, p - first[p] + k]
            for j in range(1, k + 1):      # plain chaining over the document alone, no packing
                shifted = F.pad(ids[:, j:], (0, j))
                h = model.mtp(model.backbone.embeddings(shifted), h)[0]
            p_T = (z / T).softmax(-1)
            total += (p_T * (p_T.log() - (model.lm_head(h)[0, here] / T).log_softmax(-1))).sum().item()
            counted += 1
    assert counted == (3 + 2 + 1) + 1 + 1 + (4 + 3 + 2) and batch.mask_bt.sum() == sum(label)
    got = stage.boosting_loss(model, batch, depths, T, mixing="off").total.item()
    assert got == pytest.approx(T ** 2 * total / (depths * sum(label)), rel=1e-6)


def test_drafts_end_with_the_answer_and_with_the_document():
    """By hand: tokens 0 to 3 are learnt labels, then a gap, then two documents whose labels are all learnt."""
    mask = torch.tensor([[1, 1, 1, 1, 0, 1, 1, 1, 1, 1]]).bool()
    doc = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1, 1]])
    want = {0: [1, 1, 1, 1, 0, 1, 1, 1, 1, 1], 1: [1, 1, 1, 0, 0, 1, 0, 1, 1, 0], 2: [1, 1, 0, 0, 0, 0, 0, 1, 0, 0], 3: [1] + [0] * 9, 4: [0] * 10}
    for depth, row in want.items(): assert stage.inside_answer(mask, doc, depth).int().tolist() == [row], depth


def test_the_trunk_s_gradient_is_none_and_its_load_zero():
    """Only the head may move, by gradient or by bias: the trunk is a constant of the loss even when nobody has frozen it."""
    model, batch = make(), packed(40, (40,), range(40))
    stage.boosting_loss(model, batch).total.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None and not n.startswith("mtp.")} == {"backbone.embeddings.weight",
                                                                                                          "lm_head.weight"}
    model, batch = make(), packed(40, (40,), range(40))
    for name, p in model.named_parameters(): p.requires_grad_(name.startswith("mtp."))
    losses = stage.boosting_loss(model, batch)
    losses.total.backward()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} == {"mtp"}
    assert losses.load_me[:-1].abs().sum() == 0 and losses.load_me[-1].sum() == 7 * 2 * 40 * 2      # depths, rows, tokens, experts a token


# ---- drafting

def test_every_draft_equals_one_without_a_cache():
    """For each start the head is run anew over the whole past, trunk states up to there and its own behind: a draft that saw another's state, or a
    prefix one too long, differs."""
    model = make(SMALL, dtype=torch.float64).eval()
    ids = torch.randint(12, 32, (24,), generator=torch.Generator().manual_seed(3)).tolist()
    mask = torch.tensor([False] * 6 + [True] * 12 + [False] * 2 + [True] * 3)
    depths, x = 4, torch.tensor([ids])
    trunk, embed = model.hidden(x), model.backbone.embeddings
    p = model.lm_head(trunk)[0].log_softmax(-1)
    there, total, inside = stage.draft_chances(model, ids, mask, depths, greedy=False)
    best, _, _ = stage.draft_chances(model, ids, mask, depths, greedy=True)
    checked = 0
    for t in range(23):
        states = trunk[:, :t + 1]
        for k in range(1, depths + 1):
            if not (t + k < 23 and all(mask[t:t + k + 1])):
                assert there[t, k - 1] == total[t, k - 1] == inside[t, k - 1] == 0
                continue
            h = model.mtp(embed(x[:, 1:t + k + 1]), states)[0][:, -1:]
            states, q, target = torch.cat([states, h], 1), model.lm_head(h)[0, 0].log_softmax(-1), ids[t + k + 1]
            assert total[t, k - 1].item() == pytest.approx(torch.minimum(q.exp(), p[t + k].exp()).sum().item(), abs=1e-6)
            assert there[t, k - 1].item() == pytest.approx(min(1, (q[target] - p[t + k, target]).exp().item()), abs=1e-6)
            assert best[t, k - 1] == float(q.argmax() == target)
            checked += int(inside[t, k - 1])
    assert checked == (11 + 10 + 9 + 8) + (2 + 1)


def test_rejection_sampling_accepts_the_token_that_stands_there_with_q_over_p():
    """Why acceptance can be read off the trunk's own text. All pairs enumerated for 4 tokens: drawn from q, kept with min(1, p / q), else drawn from
    what is left of p; then P(kept | token y came out) = min(1, q / p), y comes out with p, and kept in all is sum min(p, q)."""
    p, q = torch.tensor([0.5, 0.2, 0.2, 0.1]), torch.tensor([0.1, 0.6, 0.2, 0.1])
    rest = (p - q).clamp(min=0) / (p - q).clamp(min=0).sum()
    kept, out = torch.zeros(4), torch.zeros(4)
    for draft in range(4):
        keep = min(1.0, (p[draft] / q[draft]).item())
        kept[draft] += q[draft] * keep
        out[draft] += q[draft] * keep
        out += q[draft] * (1 - keep) * rest
    torch.testing.assert_close(out, p)
    torch.testing.assert_close(kept / out, (q / p).clamp(max=1))
    assert kept.sum().item() == pytest.approx(torch.minimum(p, q).sum().item())


def enumerate_passes(chance, mask):
    """Mean passes by walking through every outcome of every draft, one answer after the other."""
    def walk(t):
        if not (t + 1 < len(mask) and mask[t] and mask[t + 1]): return 0.0
        total, reached = 0.0, 1.0
        for a in range(len(chance[t]) + 1):
            stop = 1 - chance[t][a] if a < len(chance[t]) else 1.0
            if stop: total += reached * stop * (1 + walk(t + a + 1))
            reached *= 1 - stop
        return total
    return sum(walk(t) for t in range(len(mask)) if mask[t] and (not t or not mask[t - 1]))


def test_expected_passes_by_hand_and_by_walking_every_outcome():
    """3 tokens behind the first, one draft of chance 1/2: 2.25 passes. All drafts accepted: one pass for k + 1 tokens. None: one a token."""
    assert stage.expected_passes([[0.5], [0.5], [0.0], [0.0]], [True] * 4) == (3, pytest.approx(2.25))
    full = [[1.0 if t + k + 1 < 9 else 0.0 for k in range(3)] for t in range(9)]
    assert stage.expected_passes(full, [True] * 9) == (8, pytest.approx(2))
    assert stage.expected_passes([[0.0] * 3] * 9, [True] * 9) == (8, pytest.approx(8))
    mask = [False, True, True, True, True, False, True, False, True, True, True]
    torch.manual_seed(0)
    doc = torch.zeros(1, 11, dtype=torch.long)
    inside = [stage.inside_answer(torch.tensor([mask]), doc, k)[0] for k in (1, 2, 3)]
    chance = (torch.rand(11, 3) * torch.stack(inside, 1)).tolist()
    tokens, passes = stage.expected_passes(chance, mask)
    assert tokens == 3 + 0 + 2 and passes == pytest.approx(enumerate_passes(chance, mask), rel=1e-6)


def written(model, prompts, n, temperature):
    """Rollouts as acceptance reads them: ids and which of them the model wrote."""
    sampling = nemotron.SamplingParams(max_tokens=n, temperature=temperature, top_p=1.0, stop_ids=())
    return [SimpleNamespace(ids=prompt + c.ids, learn=[False] * len(prompt) + [True] * len(c.ids))
            for prompt, c in zip(prompts, nemotron.generate(model, prompts, sampling))]


def test_shares_by_place_count_the_drafts_that_were_reached(monkeypatch):
    """By hand, two starts of up to two drafts: the second place is reached with chance 1/2 and 1/5, and accepted there by 1/4 and 1 of that."""
    there, total = torch.tensor([[0.5, 0.3], [0.2, 0.9], [0, 0]]), torch.tensor([[0.6, 0.25], [0.4, 1.0], [0, 0]])
    monkeypatch.setattr(stage, "draft_chances", lambda *_: (there, total, torch.tensor([[1.0, 1], [1, 1], [0, 0]])))
    got = stage.acceptance(make(SMALL), [SimpleNamespace(ids=[20] * 4, learn=[False, True, True, True])], 2, greedy=False)
    assert got.by_draft == pytest.approx([(0.6 + 0.4) / 2, (0.5 * 0.25 + 0.2 * 1.0) / (0.5 + 0.2)])


def test_a_head_equal_to_the_trunk_has_all_of_its_drafts_accepted():
    """Five drafts a pass: six tokens, greedy and at temperature 1. A prefix or target off by one would cost some."""
    model = echo(make(SMALL, seed=1)).eval()
    prompts = [[20, 21, 22], [17, 30, 25, 26, 14]]
    for temperature in (0.0, 1.0):
        got = stage.acceptance(model, written(model, prompts, 25, temperature), 5, greedy=not temperature)      # 24 behind the first: four passes
        assert got.length == pytest.approx(6, rel=1e-3) and got.by_draft == pytest.approx([1.0] * 5, rel=1e-3)


def test_greedy_acceptance_equals_a_speculative_decoder():
    """Played for real: draft from the head, verify with the trunk, keep the agreeing prefix and one token more, until the answer is whole."""
    model = make(SMALL, seed=2, scale=0.6).eval()
    with torch.no_grad():      # a head that is right now and then
        for name, p in model.named_parameters():
            if name.endswith(nemotron.OUTPUTS): p.mul_(0.2)
        model.mtp.layers[0].eh_proj.weight.copy_(torch.cat([torch.eye(32), 0.3 * torch.eye(32)], 1))
    prompt, depths, n = [20, 21, 22, 13], 3, 40
    said = written(model, [prompt], n, 0.0)[0]
    embed, best = model.backbone.embeddings, lambda h: model.lm_head(h)[0, -1].argmax().item()
    ids, passes = prompt + [best(model.hidden(torch.tensor([prompt])))], 0
    while len(ids) < len(prompt) + n:
        states, drafts = model.hidden(torch.tensor([ids[:-1]])), []
        for _ in range(depths):
            h = model.mtp(embed(torch.tensor([(ids + drafts)[1:]])), states)[0][:, -1:]
            states = torch.cat([states, h], 1)
            drafts.append(best(h))
        truth = model(torch.tensor([ids + drafts]))[0, len(ids) - 1:].argmax(-1).tolist()
        agreed = next((i for i, (d, y) in enumerate(zip(drafts, truth)) if d != y), depths)
        ids, passes = ids + truth[:agreed + 1], passes + 1
    assert ids[:len(said.ids)] == said.ids and n - 1 > passes > (n - 1) / 4      # some drafts were kept, some not
    assert stage.acceptance(model, [said], depths, greedy=True).length == pytest.approx((n - 1) / passes)


def test_no_head_no_drafts():
    """A checkpoint that another tool saved has lost its mtp.* tensors: the word must say what to do."""
    bare = make(nemotron.ModelConfig(**{**SMALL.__dict__, "mtp_pattern": "", "mtp_depths": 0}))
    with pytest.raises(ValueError, match="no MTP weights"): stage.acceptance(bare, written(bare, [[20]], 4, 0.0), 3, greedy=True)
    mamba = make(nemotron.ModelConfig(**{**SMALL.__dict__, "mtp_pattern": "M*E"}))
    with pytest.raises(ValueError, match="without Mamba"): stage.acceptance(mamba, written(mamba, [[20]], 4, 0.0), 3, greedy=True)


# ---- teachers and the run

@pytest.fixture(scope="module")
def config():
    return rl.RLConfig(families=("chain_sum", "gcd"), level=0, sync=True, prompts=4, answers=4, micro_batches=2, max_tokens=8, warmup_steps=1,
                       medium=0.0)


def saved(folder, model, tokenizer):
    nemotron.save_checkpoint(folder, model, tokenizer)
    return folder


def rollout(domain, prompt, answer):
    task = tasks.Task("gcd", domain, 0, f"question {prompt}", "1", {})
    n = len(prompt)
    return rl.Rollout(task, "regular", [*prompt, *answer], [False] * n + [True] * len(answer), [0.0] * n + [-1.0] * len(answer), 0, 1.0, 1.0, True,
                      None)


def test_only_the_teacher_of_a_rollout_s_domain_is_asked():
    """Rows of two domains in one batch: each teacher reads its own rows, and the numbers land on the right rows and tokens."""
    models = dict(numbers=make(seed=1), logic=make(seed=2))
    domains = ["numbers", "logic", "logic", "numbers"]
    drawn = [rollout(d, (20 + i, 30), (40 + i, 50, 60 + i, 11)[:3 + i % 2]) for i, d in enumerate(domains)]
    rows, read = rl.to_rows(drawn), {"numbers": [], "logic": []}
    handles = [m.backbone.embeddings.register_forward_hook(lambda _, given, __, d=d: read[d].append(given[0].clone())) for d, m in models.items()]
    got = stage.teacher_logp(rows, domains, models)
    for handle in handles: handle.remove()
    assert {d: [x[:, 0].tolist() for x in seen] for d, seen in read.items()} == {"numbers": [[20, 23]], "logic": [[21, 22]]}
    for i, x in enumerate(drawn):
        logp = models[x.task.domain](torch.tensor([x.ids])).log_softmax(-1)[0]
        for t in range(got.shape[1]):
            learnt = t + 1 < len(x.ids) and x.learn[t + 1]
            assert got[i, t].item() == pytest.approx(logp[t, x.ids[t + 1]].item() if learnt else 0.0, abs=1e-5)
    with pytest.raises(ValueError, match="no teacher for tools"): stage.teacher_logp(rows, ["numbers", "tools", "logic", "logic"], models)


def test_the_objective_divides_by_the_whole_batch_and_reads_its_own_rows():
    """Token by token: - sum of c (log pi_T - log pi) / N, also when a step is computed in pieces; kl is logged as their mean. The gradient is the
    same in pieces: a piece that divided by its own tokens would weigh short answers more."""
    model = make(seed=1)
    drawn = [rollout("numbers", (20 + i, 30), tuple(range(40, 41 + 3 * i)) + (11,)) for i in range(4)]
    drawn = [x._replace(logp=[model(torch.tensor([x.ids])).log_softmax(-1)[0, max(t - 1, 0), i].item() - 0.3 if on else 0.0
                              for t, (i, on) in enumerate(zip(x.ids, x.learn))]) for x in drawn]
    rows = stage.with_teachers(rl.to_rows(drawn), drawn, dict(numbers=make(seed=2)))
    objective = stage.mopd_objective(stage.MOPDConfig())
    whole = objective(model, rows)
    whole.total.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    gap = n = 0
    for x in drawn:
        student, teacher = (m(torch.tensor([x.ids])).log_softmax(-1)[0] for m in (model, make(seed=2)))
        for t in range(2, len(x.ids)): gap, n = gap + (student - teacher)[t - 1, x.ids[t]].item(), n + 1
    assert whole.total.item() == pytest.approx(math.exp(0.3) * gap / n, rel=1e-4) and whole.sums["kl"].item() == pytest.approx(gap, rel=1e-4)
    for piece in rows.split(2): (objective(model, piece).total / 2).backward()
    for a, p in zip(grads, [p for p in model.parameters() if p.grad is not None]): torch.testing.assert_close(p.grad, a, rtol=1e-3, atol=1e-5)


def divergence(student, teacher, prompts):
    """Mean over the student's own tokens of the full KL(student || teacher)."""
    said = written(student, prompts, 8, 1.0)
    total = count = 0
    for x in said:
        p, q = (m(torch.tensor([x.ids]))[0].log_softmax(-1) for m in (student, teacher))
        t = torch.tensor(x.learn[1:])
        total, count = total + (p.exp() * (p - q)).sum(-1)[:-1][t].sum().item(), count + int(t.sum())
    return total / count


class TwoPrompts:
    """A Draw whose questions are one token: 20 is of one domain, 21 of the other."""
    answers = 1

    def __init__(self, rows, steps): self.rows, self.plan = rows, [None] * steps

    def __call__(self, model, step, version):
        out = []
        for domain, first in (("numbers", 20), ("logic", 21)):
            sampling = nemotron.SamplingParams(max_tokens=6, top_p=1.0, seed=2 * step + first % 2, stop_ids=())
            for c in rl.sampled(model, [[first, 13, 14]] * self.rows, sampling):
                out.append(rl.Rollout(tasks.Task("", domain, 0, "", "", {}), "regular", [first, 13, 14, *c.ids], [False] * 3 + [True] * 6,
                                      [0.0] * 3 + c.logprobs, version, 0.0, 0.0, True, None))
        return out


def test_distillation_pulls_the_student_to_two_teachers_at_once(tmp_path):
    """Two unrelated teachers, one student: after 100 steps its divergence from the right one is a third on either domain, and half of that from the
    other. Teachers mixed up, a sign, or a mask off by one leaves it where it was."""
    student, teachers = make(SMALL, 3, 0.5), dict(numbers=make(SMALL, 5, 0.5).eval(), logic=make(SMALL, 6, 0.5).eval())
    prompts = dict(numbers=[[20, 13, 14]] * 64, logic=[[21, 13, 14]] * 64)
    kl = lambda: {(on, to): divergence(student, teachers[to], prompts[on]) for on in teachers for to in teachers}
    before = kl()
    config = rl.RLConfig(sync=True, steps=100, prompts=40, answers=2, micro_batches=1, lr=5e-3, warmup_steps=5, out=tmp_path)
    trainer = rl.RLTrainer(config.training(), student, None, tmp_path, policy=stage.mopd_objective(stage.MOPDConfig()))
    rl.fit_policy(trainer, TwoPrompts(40, 100), config, lambda model, drawn: stage.with_teachers(rl.to_rows(drawn), drawn, teachers))
    after = kl()
    for on, other in (("numbers", "logic"), ("logic", "numbers")):
        assert after[on, on] < before[on, on] / 3 and after[on, on] < after[on, other] / 2, (before, after)
    assert np.mean([row["kl"] for row in trainer.rows[-10:]]) < np.mean([row["kl"] for row in trainer.rows[:5]]) / 2


def test_a_round_asks_every_domain_alike_and_keeps_its_checkpoint(tmp_path, tokenizer, config, monkeypatch):
    """distil, from checkpoint to checkpoint: batches of both domains in equal shares, one rollout a prompt, scored by the loaded teachers; the end
    is saved, routers have not moved, and a second run over it is refused."""
    student = make(seed=3)
    base = saved(tmp_path / "base", student, tokenizer)
    folders = {d: saved(tmp_path / d, make(seed=i), tokenizer) for i, d in enumerate(("arithmetic", "numbers"))}
    seen, plain = [], stage.teacher_logp
    monkeypatch.setattr(stage, "teacher_logp", lambda rows, domains, models: seen.append(domains) or plain(rows, domains, models))
    settings, own = stage.MOPDConfig(teachers=tuple(folders), steps=3, prompts=8, lr=1e-3), rl.replace(config, out=tmp_path)
    folder = stage.distil(base, folders, own, settings)
    assert [sorted(d) for d in seen] == [["arithmetic"] * 4 + ["numbers"] * 4] * 3
    after = nemotron.load_checkpoint(folder).state_dict()
    for name, x in student.state_dict().items(): assert torch.equal(x, after[name]) == (name.startswith("mtp.") or name.endswith("gate.weight")), name
    rows = [json.loads(line) for line in (tmp_path / "mopd" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and rows[0]["kl"] > 0 and rows[0]["dlogp"] < 1e-4
    with pytest.raises(ValueError, match="--resume goes on"): stage.distil(base, folders, own, settings)
    assert stage.distil(base, folders, rl.replace(own, resume=True), settings) == folder      # nothing left to do


def test_single_turns_are_drawn_scored_and_masked(tokenizer, config):
    """A pivot's prompt is not learnt, its turn is, and its reward is the verifier's: an engine that repeats the expert is always right."""
    task = tasks.draw("shop", 1, 1, 0)[0]
    worked = tasks.ENVIRONMENTS["shop"].worked(task, "regular", random.Random(0))
    turns = stage.cut_turns(task, [*sft.opening(task), *worked], "regular")
    whole, learn = sft.render_chat([*sft.opening(task), *worked], tokenizer=tokenizer, tools=task.tools)
    ends = [i + 1 for i, x in enumerate(learn) if x and (i + 1 == len(learn) or not learn[i + 1])]
    seen = []

    def engine(model, prompts, sampling):
        seen.append(sampling.seed)
        out = []
        for prompt in prompts:
            assert whole[:len(prompt)] == prompt      # the conversation up to the turn, to the token
            new = whole[len(prompt):next(e for e in ends if e > len(prompt))]
            if len(out) % 2: new = new[:-3] + new[-2:]      # every second one lacks </tool_call>, or a piece of its answer
            out.append(nemotron.Completion(new, [-0.5] * len(new), True))
        return out

    draw = stage.PivotDraw(engine, tokenizer, [turns, turns], 2, config.sampling, 5)
    assert pickle.loads(pickle.dumps(stage.replace(draw, engine=rl.sampled))).plan == draw.plan      # it travels to the worker
    drawn = draw(None, 0, 7)
    assert len(drawn) == 2 * len(turns) and {x.version for x in drawn} == {7}
    for x in drawn[::2]:
        first = x.learn.index(True)
        assert x.score == x.reward == 1 and x.ids == whole[:len(x.ids)] and x.learn == [False] * first + learn[first:len(x.ids)]
        assert all((p == -0.5) == on for p, on in zip(x.logp, x.learn))
    assert not any(x.score for x in drawn[1::2])
    draw(None, 1, 7)
    assert seen[0] != seen[1]      # other dice every step
    flat = stage.PivotDraw(engine, tokenizer, [turns[-1:]], 2, config.sampling)
    with pytest.raises(ValueError, match="no turn is worth training"):
        stage.find_pivots(None, stage.replace(flat, engine=lambda m, prompts, s: [nemotron.Completion([11], [0.0], True)] * 2), 0.9)


def test_boosting_moves_the_head_and_nothing_else(tmp_path, tokenizer, config):
    """Trained for real from a checkpoint: embeddings, trunk and output layer are the same to the bit, the head is not, and its loss has fallen."""
    model = make(seed=4)
    base = saved(tmp_path / "base", model, tokenizer)
    settings = stage.MOPDConfig(boost=(12, 2, 128), boost_rollouts=8, boost_lr=5e-3, depths=3)
    folder = stage.boost_mtp(base, rl.replace(config, out=tmp_path), settings)
    after, before = nemotron.load_checkpoint(folder).state_dict(), model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("mtp.") for name in moved)
    assert {n for n, p in model.named_parameters() if n.startswith("mtp.")} <= moved | {"mtp.layers.1.mixer.gate.e_score_correction_bias"}
    rows = [json.loads(line) for line in (tmp_path / "boosted" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"] and stage.Tokenizer.load(folder).encode("a b") == tokenizer.encode("a b")
    bare = make(nemotron.ModelConfig(**{**MICRO.__dict__, "mtp_pattern": "", "mtp_depths": 0}))
    with pytest.raises(ValueError, match="no MTP weights.*take a checkpoint"):
        stage.boost_mtp(saved(tmp_path / "bare", bare, tokenizer), rl.replace(config, out=tmp_path / "x"), settings)


def test_a_domain_with_nothing_to_learn_keeps_its_earlier_teacher(monkeypatch, config):
    """A run of hours must not end because one domain is solved; another error must end it."""
    words = dict(numbers=stage.NothingToLearn("all solved"), tools=None)
    def train(domain, base, config, m, mark, engine):
        if words[domain]: raise words[domain]
        return f"{base}/{domain}{mark}"
    monkeypatch.setattr(stage, "train_teacher", train)
    settings = stage.MOPDConfig(teachers=("numbers", "tools"))
    assert stage.train_teachers("a", {}, config, settings) == {"tools": "a/tools"}
    assert stage.train_teachers("b", {"numbers": "old"}, config, settings, "-2") == {"numbers": "old", "tools": "b/tools-2"}
    with pytest.raises(ValueError, match="none of numbers has a teacher"):
        stage.train_teachers("a", {}, config, rl.replace(settings, teachers=("numbers",)))
    words["tools"] = ValueError("the worker died")
    with pytest.raises(ValueError, match="died"): stage.train_teachers("a", {}, config, settings)


def test_an_interval_of_the_recovery_needs_a_gap():
    """Half of a clear gap, closed: the interval holds one half. A teacher that is ahead by chance has none."""
    before, teacher, student = np.zeros(200), np.r_[np.ones(120), np.zeros(80)], np.r_[np.ones(60), np.zeros(140)]
    low, high = stage.recovery_interval(student, before, teacher)
    assert 0.4 < low < 0.5 < high < 0.6
    assert stage.recovery_interval(student, before, np.r_[np.ones(2), np.zeros(198)]) is None


def test_settings_that_cannot_work_are_refused():
    for wrong, word in ((dict(teachers=("cooking",)), "no teacher for cooking"), (dict(teachers=()), "any domain"), (dict(pivot=(9, 1)), "pivot"),
                        (dict(mixing="some"), "unknown mixing"), (dict(rounds=0), "rounds")):
        with pytest.raises(ValueError, match=word): stage.MOPDConfig(**wrong)
