"""03 · LatentMoE against transformers' NemotronHMoE, against slow definitions in float64, and against numbers worked out by hand."""
import importlib
import math

import pytest
import torch

moe, nvfp4 = importlib.import_module("03_latentmoe"), importlib.import_module("01_nvfp4")
D, E, K, FW, S, L = 32, 8, 3, 24, 40, 16      # model width, experts, chosen, expert width, shared width, latent


def randomise(module, seed=0):
    """Every parameter and the selection bias: at the usual init (bias 0, small weights) a wrong layer passes."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters(): p.copy_(torch.randn(p.shape, generator=draw) * 1.5 / math.sqrt(p.shape[-1]))
        bias = module.get_buffer("gate.e_score_correction_bias")
        bias.copy_(0.1 * torch.randn(bias.shape, generator=draw))
    return module


def layer(latent=L, **kwargs):
    return randomise(moe.LatentMoE(**dict(dict(d_model=D, experts=E, k=K, expert_width=FW, shared_width=S, latent=latent, scale=2.5), **kwargs)))


def gradients(y, inputs, seed=1):
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
    return torch.autograd.grad(y, inputs, dy)


def assert_close(a, b, bound, what=""):
    error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
    assert error <= bound, f"{what}: {error:.1e} > {bound:.0e}"


# --- router

def test_the_bias_changes_who_is_chosen_but_not_how_much_they_count():
    """Weights taken from score + bias would let the balance correction shout down the router."""
    scores = torch.tensor([[0.9, 0.5, 0.4]])
    weights, experts, kept = moe.route(torch.logit(scores), torch.eye(3), torch.tensor([0.0, 0.0, 0.2]), k=2, scale=1.0)
    assert experts.tolist() == [[0, 2]]
    torch.testing.assert_close(weights, torch.tensor([[0.9 / 1.3, 0.4 / 1.3]]))
    torch.testing.assert_close(kept, scores)
    assert moe.route(torch.logit(scores), torch.eye(3), torch.zeros(3), k=2, scale=1.0)[1].tolist() == [[0, 1]]


@pytest.mark.parametrize("k", [1, 3, E])
def test_weights_sum_to_the_scale(k):
    draw = torch.Generator().manual_seed(0)
    x, w, b = torch.randn(33, D, generator=draw), torch.randn(E, D, generator=draw), 0.1 * torch.randn(E, generator=draw)
    weights, experts, _ = moe.route(x, w, b, k, scale=5.0)
    torch.testing.assert_close(weights.sum(1), torch.full((33,), 5.0))
    assert all(len(set(row)) == k for row in experts.tolist())


def test_the_router_computes_in_fp32_whatever_surrounds_it():
    """In bf16 close scores tie and training and inference pick different experts; autocast must not reach inside."""
    x, w = torch.randn(64, D).bfloat16(), torch.randn(E, D)
    expected = (x.float() @ w.T).sigmoid()
    with torch.autocast("cpu", dtype=torch.bfloat16): weights, experts, scores = moe.route(x, w, torch.zeros(E), K, 1.0)
    assert weights.dtype == scores.dtype == torch.float32 and torch.equal(scores, expected)
    assert torch.equal(experts, expected.topk(K).indices)
    assert all(v.dtype == torch.float64 for v in moe.route(x.double(), w.double(), torch.zeros(E), K, 1.0)[::2])
    # the bias too: these two differ by less than a bf16 step
    assert moe.route(torch.zeros(1, D), torch.zeros(2, D), torch.tensor([0.5, 0.50005]), 1, 1.0)[1].item() == 1


def test_no_gradient_reaches_the_selection_bias():
    bias = torch.zeros(E, requires_grad=True)
    weights, _, scores = moe.route(torch.randn(9, D), torch.randn(E, D, requires_grad=True), bias, K, 1.0)
    (weights.square().sum() + scores.sum()).backward()
    assert bias.grad is None


def test_the_selection_bias_stays_fp32_when_the_model_is_cast():
    """In bf16 a bias of 0.5 no longer moves by 0.001, and the cast itself would round it."""
    m = layer()
    before = m.gate.e_score_correction_bias.clone()
    m.bfloat16()
    assert m.gate.weight.dtype == torch.bfloat16 and m.gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(m.gate.e_score_correction_bias, before) and "gate.e_score_correction_bias" in m.state_dict()
    with torch.device("meta"): empty = moe.LatentMoE(D, E, K, FW, S, L)
    assert empty.bfloat16().gate.e_score_correction_bias.dtype == torch.float32


# --- experts: the algorithms against the definition

def routed(r, k, experts=E, l=6, f=5, choose="random", dtype=torch.float64, seed=0):
    """x, weights, up, down (all with grad) and choices. l and f are odd on purpose."""
    draw = torch.Generator().manual_seed(seed)
    score = torch.rand(r, experts, generator=draw)
    if choose == "half": score[:, experts // 2:] = -1            # half of the experts see no token
    if choose == "one": score[:, 1] = 2                          # one expert sees every token
    make = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    return make(r, l), make(r, k), score.topk(k).indices, make(experts, f, l), make(experts, l, f)


def one_at_a_time(x, weights, experts, up, down):
    return moe.ExpertsInCache.apply(x, weights, up, down, *moe.sort_by_expert(experts, len(up)))


ALGORITHMS = {"sorted": moe.experts_sorted, "one at a time": one_at_a_time, "gathered": moe.experts_gathered}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("r, k, choose", [(33, 3, "random"), (33, 1, "one"), (33, E, "random"), (33, 3, "one"), (33, 4, "half"), (1, 2, "random")])
def test_grouped_experts_equal_the_loop(algorithm, r, k, choose):
    """Forward and all four gradients in float64: catches a permutation used for its inverse, a lost empty expert, a weight applied twice."""
    x, weights, experts, up, down = routed(r, k, choose=choose)
    expected = moe.experts_loop(x, weights, experts, up, down)
    y = ALGORITHMS[algorithm](x, weights, experts, up, down)
    assert_close(y, expected, 1e-12, "output")
    for name, a, b in zip(("x", "weights", "up", "down"), gradients(y, (x, weights, up, down)), gradients(expected, (x, weights, up, down))):
        assert_close(a, b, 1e-12, f"gradient of {name}")


def test_a_decode_step_gathers_weights_instead_of_sorting_tokens(monkeypatch):
    """Fewer routed rows than experts and no gradient asked for: the short way must be taken, and only then."""
    taken = []
    right = moe.experts_gathered
    monkeypatch.setattr(moe, "experts_gathered", lambda *args: taken.append(len(args[0])) or right(*args))
    for rows in (1, 2, 3):
        args = routed(rows, K)
        with torch.no_grad(): assert_close(moe.experts_grouped(*args), moe.experts_loop(*args), 1e-12)
        moe.experts_grouped(*args)
    assert taken == [1, 2]      # 2 tokens × 3 choices fit under 8 experts, 3 tokens do not


def test_the_loop_is_the_sum_it_claims_to_be():
    """The definition itself, token by token in plain Python, so that rung 1 is held by something too."""
    x, weights, experts, up, down = routed(5, 2)
    rows = [sum(weights[r, j] * (down[e] @ (up[e] @ x[r]).clamp(min=0) ** 2) for j, e in enumerate(experts[r].tolist())) for r in range(5)]
    assert_close(moe.experts_loop(x, weights, experts, up, down), torch.stack(rows), 1e-13)


def test_an_idle_expert_gets_a_zero_gradient():
    x, weights, experts, up, down = routed(33, 4, choose="half")
    for run in (moe.experts_loop, *ALGORITHMS.values()):
        dup, ddown = gradients(run(x, weights, experts, up, down), (up, down))
        assert dup[E // 2:].eq(0).all() and ddown[E // 2:].eq(0).all() and dup[0].ne(0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [33, 700])
def test_low_precision_is_no_worse_than_the_loop(dtype, rows):
    """Both against float64 on the same rounded inputs; 33 rows go through torch's grouped product, 700 through one expert at a time."""
    x, weights, experts, up, down = routed(rows, K, l=16, f=24, choose="half", dtype=dtype)
    weights = weights.detach().abs().float().requires_grad_()      # the router hands out fp32, positive
    assert (rows * K >= moe.CACHE_ROWS * E) == (rows == 700)
    inputs = (x, weights, up, down)
    wide = [v.detach().double().requires_grad_() for v in inputs]
    exact = moe.experts_loop(wide[0], wide[1], experts, *wide[2:])
    exact = (exact, *gradients(exact, wide))
    outcomes = []
    for run in (moe.experts_grouped, moe.experts_loop):
        y = run(x, weights, experts, up, down)
        assert y.dtype == dtype
        outcomes.append((y, *gradients(y.double(), inputs)))
    for name, ours, plain, true in zip(("y", "x", "weights", "up", "down"), *outcomes, exact):
        error = lambda v, true=true: (v.double() - true).norm().item()
        assert error(ours) <= 1.5 * error(plain) + 1e-12, f"{name}: grouped {error(ours):.1e}, loop {error(plain):.1e}"


def test_sorting_by_expert_by_hand():
    """The worked example of section 3: tokens choose (2 0) (0 1) (2 1)."""
    order, inverse, offsets = moe.sort_by_expert(torch.tensor([[2, 0], [0, 1], [2, 1]]), 4)
    assert order.tolist() == [1, 2, 3, 5, 0, 4] and inverse.tolist() == [4, 0, 1, 2, 5, 3] and offsets.tolist() == [2, 4, 6, 6]
    assert offsets.dtype == torch.int32


@pytest.mark.parametrize("rows", [33, 700])
def test_two_runs_are_bit_equal(rows):
    """Sums over tokens must not depend on thread timing: resume and recomputation compare bits."""
    torch.set_num_threads(2)
    m, x = layer(), torch.randn(1, rows, D)
    def run():
        x.requires_grad_()
        y, balance = m(x)
        return [y, balance.aux, *torch.autograd.grad(y.square().sum() + balance.aux, [x, *m.parameters()])]
    for a, b in zip(run(), run()): assert torch.equal(a, b)


def test_autocast_reaches_the_experts():
    """torch._grouped_mm and a hand-written Function do not see autocast by themselves."""
    x, weights, experts, up, down = (v.detach() for v in routed(33, K, l=16, f=24, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16): y = moe.experts_grouped(x, weights, experts, up, down)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), moe.experts_loop(x, weights, experts, up, down), 0.03, "bf16 has 8 bits")


# --- the layer against transformers

def transformers_layer(ours, latent, d=D):
    """NemotronHMoE with our weights. It picks the two best of each group, so a group must hold at least two experts."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

    config = NemotronHConfig(hidden_size=d, n_routed_experts=E, num_experts_per_tok=K, moe_intermediate_size=FW, moe_latent_size=latent,
                             moe_shared_expert_intermediate_size=S, routed_scaling_factor=2.5, n_group=1, topk_group=1, norm_topk_prob=True,
                             hybrid_override_pattern="ME", intermediate_size=FW)
    theirs = NemotronHMoE(config)
    theirs.load_state_dict(ours.state_dict())       # strict: names and shapes must be the released ones
    return theirs


def error_against(theirs, ours, x):
    """Largest relative error of output and input gradient."""
    with_grad = [x.clone().requires_grad_() for _ in range(2)]
    results = []
    for run, v in ((lambda v: theirs(v), with_grad[0]), (lambda v: ours(v)[0], with_grad[1])):
        y = run(v)
        results.append((y, *gradients(y, (v,))))
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*results))


@pytest.mark.parametrize("latent", [L, D, None])
@pytest.mark.parametrize("shape", [(2, 33), (4, 130)])
def test_the_layer_equals_transformers(latent, shape):
    """Output, input gradient and every parameter gradient; 66 tokens take the grouped product, 520 one expert at a time."""
    ours = layer(latent)
    theirs = transformers_layer(ours, latent)
    x = torch.randn(*shape, D)
    assert error_against(theirs, ours, x) < 1e-5
    dy, mine = torch.randn(*shape, D), dict(ours.named_parameters())
    theirs(x).backward(dy); ours(x)[0].backward(dy)
    for name, p in theirs.named_parameters(): assert_close(mine[name].grad, p.grad, 2e-5, name)


MUTANTS = {
    "selection bias ignored": lambda m: setattr(m.gate, "e_score_correction_bias", torch.zeros(E)),
    "scale left out": lambda m: setattr(m.gate, "scale", 1.0),
    "weights from the biased scores": lambda m: setattr(m.gate, "forward", lambda x: biased_weights(m.gate, x)),
    "weights not normalised": lambda m: setattr(m.gate, "forward", lambda x: raw_weights(m.gate, x)),
    "shared expert reads the latent": lambda m: setattr(m.shared_experts, "forward", wrap(m.shared_experts, m.fc1_latent_proj)),
    "router reads the latent": lambda m: setattr(m.gate, "forward", wrap(m.gate, m.fc1_latent_proj)),
    "shared output scaled": lambda m: setattr(m.shared_experts, "forward", lambda x: 2.5 * moe.SharedExpert.forward(m.shared_experts, x)),
    "experts swapped": lambda m: m.experts.up_proj.data.copy_(m.experts.up_proj.data.flip(0)),
}


def biased_weights(gate, x):
    _, experts, scores = moe.route(x, gate.weight, gate.e_score_correction_bias, gate.k, gate.scale)
    chosen = (scores + gate.e_score_correction_bias).gather(1, experts)
    return gate.scale * chosen / chosen.sum(1, keepdim=True), experts, scores


def raw_weights(gate, x):
    _, experts, scores = moe.route(x, gate.weight, gate.e_score_correction_bias, gate.k, gate.scale)
    return gate.scale * scores.gather(1, experts), experts, scores


def wrap(module, before):
    original = type(module).forward
    return lambda x: original(module, before(x))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_do_not_equal_transformers(mutant):
    """The comparison above must be able to fail. Latent width = model width here, so that reading the wrong one is no shape error."""
    ours = layer(latent=D)
    theirs = transformers_layer(ours, D)
    MUTANTS[mutant](ours)
    assert error_against(theirs, ours, torch.randn(2, 33, D)) > 1e-3


def test_relu_without_the_square_does_not_equal_transformers(monkeypatch):
    ours = layer()
    theirs = transformers_layer(ours, L)
    monkeypatch.setattr(moe, "relu2", torch.relu)
    assert error_against(theirs, ours, torch.randn(2, 33, D)) > 1e-3


def test_the_shared_expert_cannot_read_the_latent():
    """With a latent narrower than the model, the shape refuses it."""
    m = layer()
    assert m.shared_experts.up_proj.in_features == m.gate.weight.shape[1] == D != L
    with pytest.raises(ValueError, match="full width, not the latent"): m.gate(torch.randn(3, L))


# --- balance

def aux_by_hand(scores, k, valid):
    """The loss in plain Python, one sequence, token and expert at a time."""
    losses = []
    for s, sequence in enumerate(scores.tolist()):
        tokens = [row for t, row in enumerate(sequence) if valid[s, t]]
        if not tokens: continue
        f, P = [0.0] * len(tokens[0]), [0.0] * len(tokens[0])
        for row in tokens:
            for e in sorted(range(len(row)), key=lambda e: -row[e])[:k]: f[e] += 1 / (k * len(tokens))
            for e, s_e in enumerate(row): P[e] += s_e / sum(row) / len(tokens)
        losses.append(len(f) * sum(a * b for a, b in zip(f, P)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("k", [1, 3, E])
def test_aux_loss_equals_a_slow_reference(k):
    """With padding inside, and one sequence that is all padding (it must not pull the mean down)."""
    scores = torch.rand(4, 11, E, dtype=torch.float64)
    valid = torch.rand(4, 11) < 0.7
    valid[2] = False
    assert abs(moe.sequence_aux_loss(scores, k, valid).item() - aux_by_hand(scores, k, valid)) < 1e-12
    everything = torch.ones(4, 11, dtype=torch.bool)
    assert abs(moe.sequence_aux_loss(scores, k).item() - aux_by_hand(scores, k, everything)) < 1e-12


def test_aux_loss_by_hand():
    """The docstring's example, 1.5; even routing, 1; everything on one of E experts with a sure router, E."""
    assert moe.sequence_aux_loss(torch.tensor([[[0.6, 0.2], [0.6, 0.2]]]), 1).item() == pytest.approx(1.5)
    turns = 0.5 * torch.ones(1, 4, 4) + 0.1 * torch.eye(4)       # each token prefers another expert: f = P = 1/4
    assert moe.sequence_aux_loss(turns, 1).item() == pytest.approx(1.0)
    sure = torch.zeros(1, 5, 4); sure[..., 2] = 1
    assert moe.sequence_aux_loss(sure, 1).item() == pytest.approx(4.0)
    assert moe.sequence_aux_loss(torch.rand(2, 0, 4), 1).item() == 0


def test_aux_gradient_pushes_the_crowded_expert_down():
    """Expert 0 is chosen by all: its score must fall and the idle ones' rise. The sign decides between balance and collapse."""
    scores = torch.tensor([[[0.7, 0.3, 0.3, 0.3]] * 3], requires_grad=True)
    moe.sequence_aux_loss(scores, 1).backward()
    assert (scores.grad[..., 0] > 0).all() and (scores.grad[..., 1:] < 0).all()


def test_aux_loss_counts_unbiased_choices():
    """Counted on score + bias, the loss would see an even load once the bias works, and stop telling the router."""
    m = layer(latent=None)
    x = torch.randn(2, 9, D)
    before = m(x)[1]
    m.gate.e_score_correction_bias += torch.linspace(0, 3, E)
    after = m(x)[1]
    assert torch.equal(before.aux, after.aux) and not torch.equal(before.load_e, after.load_e)


def test_the_aux_loss_trains_the_router_and_only_the_router():
    m = layer()
    m(torch.randn(2, 9, D))[1].aux.backward()
    assert m.gate.weight.grad.abs().sum() > 0
    assert all(p.grad is None for name, p in m.named_parameters() if not name.startswith("gate."))
    assert m.eval()(torch.randn(2, 9, D))[1].aux.item() == 0      # a training signal: eval mode does not compute it


def test_padding_is_counted_in_neither_load_nor_loss():
    """The same tokens with and without padding behind them give the same Balance."""
    m, x = layer(), torch.randn(2, 9, D)
    valid = torch.arange(13).expand(2, 13) < 9
    padded = torch.cat([x, 5 * torch.randn(2, 4, D)], 1)
    y, plain = m(x)
    z, masked = m(padded, valid)
    assert torch.equal(plain.load_e, masked.load_e) and plain.load_e.sum() == 2 * 9 * K and plain.load_e.dtype == torch.int64
    assert_close(masked.aux, plain.aux, 1e-6)
    assert_close(z[:, :9], y, 1e-5)
    assert m(padded)[1].load_e.sum() == 2 * 13 * K


def test_a_layer_keeps_no_count():
    """Activation recomputation runs the forward twice; a counter on the module would count twice."""
    from torch.utils.checkpoint import checkpoint
    m, x = layer(), torch.randn(2, 9, D, requires_grad=True)
    before = {name: v.clone() for name, v in m.state_dict().items()}
    y, balance = checkpoint(m, x, use_reentrant=False)
    plain_y, plain = m(x)
    assert torch.equal(y, plain_y) and torch.equal(balance.load_e, plain.load_e)
    assert torch.equal(gradients(y, (x,))[0], gradients(plain_y, (x,))[0])
    assert all(torch.equal(v, before[name]) for name, v in m.state_dict().items())


def test_bias_update_by_hand():
    """Overloaded down, underloaded up, exact mean untouched; in place; one row per layer works too."""
    bias = torch.tensor([0.5, 0.0, 0.0, -0.5])
    moe.update_expert_bias(bias, torch.tensor([6, 1, 1, 0]))
    torch.testing.assert_close(bias, torch.tensor([0.499, 0.001, 0.001, -0.499]))
    moe.update_expert_bias(bias, torch.tensor([2, 2, 3, 1]), rate=0.1)
    torch.testing.assert_close(bias, torch.tensor([0.499, 0.001, -0.099, -0.399]))
    moe.update_expert_bias(bias, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(bias, torch.tensor([0.499, 0.001, -0.099, -0.399]))
    two = torch.zeros(2, 4)
    moe.update_expert_bias(two, torch.tensor([[4, 0, 0, 0], [0, 0, 0, 4]]), rate=1.0)
    assert two.tolist() == [[-1, 1, 1, 1], [1, 1, 1, -1]]


def test_bias_update_lands_on_the_side_of_the_mean_that_integers_name():
    """Loads beyond 2**24 lose their last digit in fp32; the comparison with the mean must not."""
    bias, big = torch.zeros(3), 2 ** 24
    moe.update_expert_bias(bias, torch.tensor([big, big + 1, big + 2]), rate=1.0)
    assert bias.tolist() == [1, 0, -1]


def test_max_violation_and_dead_experts_by_hand():
    """max / mean without the -1: even is 1, everything on k of E experts is E/k (23.27 for Ultra)."""
    assert moe.max_violation(torch.tensor([6, 1, 1, 0])).item() == 3 and moe.dead_experts(torch.tensor([6, 1, 1, 0])).item() == 1
    assert moe.max_violation(torch.tensor([5, 5])).item() == 1 and moe.dead_experts(torch.tensor([5, 5])).item() == 0
    worst = torch.zeros(512, dtype=torch.int64); worst[:22] = 1000
    assert moe.max_violation(worst).item() == pytest.approx(512 / 22)
    assert moe.max_violation(torch.zeros(4, dtype=torch.int64)).item() == 0
    assert moe.max_violation(torch.tensor([[6, 1, 1, 0], [2, 2, 2, 2]])).tolist() == [3, 1]


def test_the_bias_balances_a_router_that_nothing_else_balances():
    """Inputs with a large common part start at MaxVio E/k with a dead expert; 200 shrinking steps must make the load even, no weight moved."""
    m, x = layer(latent=None), torch.randn(1, 512, D) + 4
    m.gate.e_score_correction_bias.zero_()
    start = m(x)[1].load_e
    assert moe.max_violation(start).item() > 2.5 and moe.dead_experts(start).item() >= 1
    for step in range(200): moe.update_expert_bias(m.gate.e_score_correction_bias, m(x)[1].load_e, rate=0.02 * (1 - step / 200))
    assert moe.max_violation(m(x)[1].load_e).item() < 1.05


# --- NVFP4, costs, errors

def per_expert(x, weights, experts, up, down, recipe):
    """The quantised experts, one plain nvfp4_linear at a time; no expert may share a scale with another."""
    y = torch.zeros_like(x)
    for e in range(len(up)):
        rows, slots = (experts == e).nonzero(as_tuple=True)
        if not len(rows): continue
        hidden = moe.relu2(nvfp4.nvfp4_linear(x[rows], up[e], recipe))
        y = y.index_add(0, rows, nvfp4.nvfp4_linear(hidden, down[e], recipe) * weights[rows, slots, None])
    return y


@pytest.mark.parametrize("choose", ["random", "half"])
def test_experts_under_a_recipe_equal_nvfp4_linear_expert_by_expert(choose):
    """Forward and backward, nearest everywhere so that both sides round alike; very different experts would show a shared scale."""
    recipe = nvfp4.NVFP4Recipe(stochastic_gradients=False)
    x, weights, experts, up, down = routed(33, K, l=32, f=16, choose=choose, dtype=torch.float32)
    with torch.no_grad(): up.mul_(10.0 ** torch.arange(-4, 4)[:, None, None])
    y, expected = moe.experts_grouped(x, weights, experts, up, down, recipe), per_expert(x, weights, experts, up, down, recipe)
    assert_close(y, expected, 1e-6, "output")
    for name, a, b in zip(("x", "weights", "up", "down"), gradients(y, (x, weights, up, down)), gradients(expected, (x, weights, up, down))):
        for e in range(E) if a.dim() == 3 else [slice(None)]: assert_close(a[e], b[e], 1e-5, f"gradient of {name}")
    assert (y - moe.experts_loop(x, weights, experts, up, down)).norm() > 0.01 * y.norm()     # it did quantise


def test_the_draw_seed_repeats_and_differs():
    """Same seed, same gradients (resume, recomputation); another seed, other gradients; up and down do not share their draws."""
    m = layer(latent=32, expert_width=32)
    m.experts.recipe = nvfp4.NVFP4Recipe()
    x = torch.randn(1, 33, D)
    def run(seed):
        m.experts.draw_seed = seed
        return torch.autograd.grad(m(x)[0].square().sum(), [m.experts.up_proj, m.experts.down_proj])
    first, again, other = run(1), run(1), run(2)
    for a, b, c in zip(first, again, other): assert torch.equal(a, b) and not torch.equal(a, c)


def test_up_and_down_draw_apart(monkeypatch):
    seeds, plain = [], nvfp4.nvfp4_linear
    monkeypatch.setattr(nvfp4, "nvfp4_linear", lambda *args, seed=0, **kwargs: (seeds.append(seed), plain(*args, seed=seed, **kwargs))[1])
    m = layer(latent=32, expert_width=32)
    m.experts.recipe, m.experts.draw_seed = nvfp4.NVFP4Recipe(), 7
    m(torch.randn(1, 9, D)); m(torch.randn(1, 9, D))
    assert len(seeds) == 4 and seeds[0] != seeds[1] and seeds[:2] == seeds[2:]


def test_a_latent_pays_for_alpha_times_the_experts():
    """l = d/a with a·E experts and a·k chosen: parameters, FLOPs and traffic of the plain layer, plus two projections, counted on real layers."""
    narrow, wide = moe.LatentMoE(64, 32, 8, 48, 40, latent=16), moe.LatentMoE(64, 8, 2, 48, 40)
    routed_parameters = lambda m: sum(p.numel() for p in m.experts.parameters())
    assert routed_parameters(narrow) == routed_parameters(wide)
    a, b = moe.layer_cost(64, 16, 32, 8, 48, batch=4), moe.layer_cost(64, 64, 8, 2, 48, batch=4)
    assert a.parameters == routed_parameters(narrow) + 2 * 64 * 16 and b.parameters == routed_parameters(wide)
    assert a.flops - b.flops == 2 * (2 * 64 * 16) and a.sent_bytes == b.sent_bytes == 2 * 8 * 16 * 2 and a.log10_choices > b.log10_choices
    # one token reads exactly its k experts: 8 · 2 · 16 · 48 weights of 4.5 bits, and the projections in two bytes each
    assert moe.layer_cost(64, 16, 32, 8, 48, batch=1).read_bytes == pytest.approx(8 * 2 * 16 * 48 * 4.5 / 8 + 2 * 64 * 16 * 2)
    assert not hasattr(wide, "fc1_latent_proj") and wide.experts.up_proj.shape == (8, 48, 64)


def test_bad_sizes_are_refused_with_one_sentence():
    with pytest.raises(ValueError, match="k=9 of 8 experts"): moe.LatentMoE(D, 8, 9, FW, S, L)
    with pytest.raises(ValueError, match="k=0 of 8 experts"): moe.Router(D, 8, 0)
    with pytest.raises(ValueError, match="latent is 0"): moe.LatentMoE(D, 8, 2, FW, S, latent=0)
    with pytest.raises(ValueError, match="expert_width is -1"): moe.LatentMoE(D, 8, 2, -1, S)
    with pytest.raises(ValueError, match="k=5 of 4"): moe.route(torch.randn(3, D), torch.randn(4, D), torch.zeros(4), 5, 1.0)
    with pytest.raises(ValueError, match="width 32, got 31"): moe.route(torch.randn(3, 31), torch.randn(4, D), torch.zeros(4), 2, 1.0)
    with pytest.raises(ValueError, match="selection bias"): moe.route(torch.randn(3, D), torch.randn(4, D), torch.zeros(5), 2, 1.0)
    with pytest.raises(ValueError, match="k=9 of 8"): moe.sequence_aux_loss(torch.rand(1, 3, 8), 9)
    with pytest.raises(ValueError, match="one load per expert"): moe.update_expert_bias(torch.zeros(4), torch.zeros(5))
    x, weights, experts, up, down = routed(7, 2)
    with pytest.raises(ValueError, match="cannot serve rows"): moe.experts_grouped(x[:, :-1], weights, experts, up, down)
    with pytest.raises(ValueError, match="cannot serve rows"): moe.experts_grouped(x, weights, experts, up, up)
    with pytest.raises(ValueError, match="steps is 0"): moe.Config(steps=0)


def test_the_demo_runs_and_writes(tmp_path, capsys):
    """Two steps: every table prints, the figure and the rows exist."""
    moe.main(moe.Config(steps=2, out=tmp_path))
    shown = capsys.readouterr().out
    assert all(f"{i} · " in shown for i in (1, 2, 3, 4)) and "nan" not in shown
    assert (tmp_path / "03_balance.png").stat().st_size > 10_000 and len((tmp_path / "results.jsonl").read_text().splitlines()) == 5


def test_three_bf16_parts_hold_an_fp32_number():
    """What fp32_product hands to tensor cores: the parts sum to the number exactly, and a bf16 tensor is not split."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 4096)
    parts = moe.bf16_parts(x)
    assert len(parts) == 3 and all(part.dtype == torch.bfloat16 for part in parts) and torch.equal(sum(part.double() for part in parts), x.double())
    assert moe.bf16_parts(parts[0]) == [parts[0]]


def test_the_gradient_of_a_permutation_is_the_permutation_back():
    """By hand, and held against autograd's: rows 2 0 1 in the order 1 2 0."""
    order_q, inverse_q = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
    x_ql = torch.tensor([[2.0], [0], [1]], dtype=torch.float64, requires_grad=True)
    y_ql = moe.Permuted.apply(x_ql, order_q, inverse_q)
    assert y_ql[:, 0].tolist() == [0, 1, 2]
    assert torch.autograd.grad(y_ql, x_ql, torch.tensor([[10.0], [20], [30]], dtype=torch.float64))[0][:, 0].tolist() == [30, 10, 20]
    assert torch.autograd.gradcheck(lambda x: moe.Permuted.apply(x, order_q, inverse_q), x_ql)
