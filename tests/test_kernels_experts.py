"""kernels/experts.py against stage 03's definition, the loop over experts, in float64: forward and all four gradients."""
import importlib
import itertools

import pytest
import torch
from kernel_checks import DEVICE, assert_no_worse, randn

moe, nvfp4, experts = (importlib.import_module(m) for m in ("03_latentmoe", "01_nvfp4", "kernels.experts"))
NAMES = ("y", "dx", "dweights", "dup", "ddown")


def routed(r=17, e=6, k=2, l=32, f=48, choose="spread", dtype=torch.float32):
    """(x, weights, up, down), all with grad, and the choices. The weights are fp32 and positive, as the router hands them out."""
    score = torch.rand(r, e, generator=torch.Generator().manual_seed(0))
    if choose == "half": score[:, e // 2:] -= 2         # half of the experts see no token
    if choose == "one": score[:, 1] += 2                # one expert sees every token
    make = lambda seed, *shape: randn(*shape, seed=seed, dtype=dtype).requires_grad_()
    inputs = make(1, r, l), randn(r, k, seed=2).abs().requires_grad_(), make(3, e, f, l), make(4, e, l, f)
    return inputs, score.topk(k).indices.to(DEVICE)


def results(run, inputs, chosen, dy_rl):
    y = run(inputs[0], inputs[1], chosen, *inputs[2:])
    return [y, *torch.autograd.grad(y, inputs, dy_rl.to(y.dtype))]


def hold_against_the_loop(inputs, chosen, twin=None):
    dy_rl = randn(*inputs[0].shape, seed=5, dtype=inputs[0].dtype)
    wide = [v.detach().double().cpu().requires_grad_() for v in inputs]
    exact = results(moe.experts_loop, wide, chosen.cpu(), dy_rl.cpu())
    ours, plain = (results(run, inputs, chosen, dy_rl) for run in (twin or experts.experts_grouped, moe.experts_loop))
    for name, a, b, c in zip(NAMES, ours, plain, exact): assert_no_worse(a, b, c, what=name)
    return ours


def with_tiles(monkeypatch, products=None, wgrad=None):
    """Other tiles for the products of rows with weights and for the gradients of the weights; their own for the row kernels."""
    default, changes = experts._tiles, {"sum": {}, "gather": {}, "wgrad": wgrad or {}}
    monkeypatch.setattr(experts, "_tiles", lambda kind, *args: {**default(kind, *args), **changes.get(kind, products or {})})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, choose", [(dict(), "spread"), (dict(r=33), "half"), (dict(r=33, k=1), "one"), (dict(r=1, k=3), "spread"),
                                           (dict(r=17, l=48, f=80), "one"), (dict(r=9, l=6, f=5), "spread")],
                         ids=["spread", "half idle", "all on one, k 1", "one token", "48 and 80 wide", "widths of no whole 16 bytes"])
def test_experts_grouped_is_no_worse_than_the_loop(shape, choose, dtype):
    """Forward and gradients: a permutation taken for its inverse, a lost or doubled tile, a weight applied twice, a tail that reads a neighbour."""
    hold_against_the_loop(*routed(choose=choose, dtype=dtype, **shape))


@pytest.mark.parametrize("r, e, k, half, rows_tma, l, f", [(40, 3, 1, False, True, 48, 80), (57, 2, 2, False, False, 44, 76),
                                                           (57, 2, 2, True, True, 48, 80), (83, 2, 2, True, True, 64, 96),
                                                           (73, 3, 1, True, False, 48, 80), (83, 3, 1, True, True, 44, 76)])
def test_several_tiles_in_each_direction(monkeypatch, r, e, k, half, rows_tma, l, f):
    """Tiles of 32 × 32 × 32, mostly on sizes that are no multiples of them: catches a wrong block order, a table line too few, a tail of the
    contraction that counts. With half, a tile has up to 48 rows: after the first, 57 rows leave 9 for a half one, 73 leave 25 for a whole one and 83
    leave 35, which need both parts. Rows of 44 and 76 are no whole 16 bytes: pointers. At the default tiles small shapes have one tile."""
    with_tiles(monkeypatch, dict(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, half=half, rows_tma=rows_tma),
               dict(BLOCK_L=32, BLOCK_F=32, BLOCK_K=32, panel=False))
    hold_against_the_loop(*routed(r, e, k, l=l, f=f, choose="one", dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype, f", [(torch.bfloat16, 80), (torch.bfloat16, 64), (torch.bfloat16, 76), (torch.float32, 80)], ids=str)
def test_a_panel_holds_what_an_expert_has(monkeypatch, dtype, f):
    """Experts with no rows, one, a whole block, two blocks, a bit more than two, than three and than four, which no panel holds: a row lost at a
    boundary, or one taken from the neighbour, shows in the gradient of the weights. 76 columns are no whole 16 bytes, which no descriptor loads."""
    with_tiles(monkeypatch, wgrad=dict(BLOCK_L=32, BLOCK_F=32, BLOCK_K=16, panel=True))
    loads = [1, 16, 0, 32, 33, 49, 65, 64]
    inputs, _ = routed(sum(loads), len(loads), k=1, l=48, f=f, dtype=dtype)
    chosen = torch.tensor([e for e, n in enumerate(loads) for _ in range(n)], device=DEVICE).view(-1, 1)
    hold_against_the_loop(inputs, chosen.flip(0))


@pytest.mark.parametrize("f", [64, 80])
def test_no_descriptor_stores_past_an_expert(monkeypatch, f):
    """A block that reaches past an expert's last row would overwrite the next expert's gradient. The interpreter runs programs one after the other
    and would repair that, so the condition is tested, and that it is asked: rows of a gradient are l (48) or f."""
    assert experts._blocks_end_with_the_expert(64, 32) and not experts._blocks_end_with_the_expert(80, 32)
    with_tiles(monkeypatch, wgrad=dict(BLOCK_L=32, BLOCK_F=32))
    (x, _, _, _), chosen = routed(r=5, l=48, f=f)
    routing, hidden_qf = experts._Routing(chosen, 6), randn(10, f)
    asked, descriptor = [], experts._descriptor
    monkeypatch.setattr(experts, "_descriptor", lambda out, *block_and_wanted: asked.append((out.shape[1], block_and_wanted[-1]))
                        or descriptor(out, *block_and_wanted))
    for tokens_first in (True, False): experts._weight_gradient(x.detach(), hidden_qf, routing, tokens_first=tokens_first)
    assert asked == [(48, False), (f, f == 64)]


def test_fp16_works_alike():
    hold_against_the_loop(*routed(r=9, dtype=torch.float16))


def test_an_idle_expert_gets_a_zero_gradient():
    """torch.empty without a store would leave the memory's old contents."""
    inputs, chosen = routed(choose="half", dtype=torch.bfloat16)
    dup, ddown = results(experts.experts_grouped, inputs, chosen, randn(17, 32))[3:]
    assert dup[3:].eq(0).all() and ddown[3:].eq(0).all() and dup[:3].ne(0).any() and ddown[:3].ne(0).any()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])       # a loop over rows, and a panel
def test_an_infinity_stays_with_its_expert(dtype):
    """A token or a weight at infinity may spoil its own experts, not those whose rows and weights lie next to it in memory: 0 · inf is NaN."""
    inputs, _ = routed(r=5, e=4, k=1, dtype=dtype)
    chosen = torch.tensor([[0], [0], [1], [2], [2]], device=DEVICE)
    for spoilt in (0, 2, 3):
        mine = [v.detach().clone() for v in inputs]
        mine[spoilt][2 if spoilt == 0 else 1] = float("inf")
        y, dx, _, dup, ddown = results(experts.experts_grouped, [v.requires_grad_() for v in mine], chosen, randn(5, 32))
        assert all(v[[0, 2, 3]].isfinite().all() for v in (dup, ddown)) and all(v[[0, 1, 3, 4]].isfinite().all() for v in (y, dx)), spoilt
        assert not y[2].isfinite().all()


def test_two_calls_give_the_same_bits():
    inputs, chosen = routed(r=9, dtype=torch.bfloat16)
    runs = [results(experts.experts_grouped, inputs, chosen, randn(9, 32)) for _ in range(2)]
    for a, b in zip(*runs): assert torch.equal(a, b)


def test_rows_and_weights_may_lie_apart_in_memory():
    """x a slice of a projection, stacks transposed, an incoming gradient of stride 0: a kernel that assumes dense rows reads its neighbours."""
    inputs, chosen = routed(r=17)
    dense = results(experts.experts_grouped, inputs, chosen, torch.ones(17, 32, device=DEVICE))
    turn = lambda v: v.detach().mT.contiguous().mT.requires_grad_()
    sliced = inputs[0].detach().repeat(1, 2)[:, 32:].requires_grad_()
    for x in (sliced, turn(inputs[0])):
        apart = [x, *map(turn, inputs[1:])]
        assert not any(v.is_contiguous() for v in apart)
        y = experts.experts_grouped(apart[0], apart[1], chosen, *apart[2:])
        for a, b in zip((y, *torch.autograd.grad(y.sum(), apart)), dense): assert torch.equal(a, b)       # sum's gradient has strides 0


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,)], ids=str)
def test_only_what_is_asked_for_is_computed(needed):
    """A frozen stack costs no gradient, and the others do not change for it."""
    inputs, chosen = routed(r=5)
    dy = randn(5, 32, seed=5)
    everything = results(experts.experts_grouped, inputs, chosen, dy)
    some = [v.detach().requires_grad_(i in needed) for i, v in enumerate(inputs)]
    y = experts.experts_grouped(some[0], some[1], chosen, *some[2:])
    for i, gradient in zip(needed, torch.autograd.grad(y, [some[i] for i in needed], dy)): assert torch.equal(gradient, everything[1 + i])
    with torch.no_grad(): assert torch.equal(experts.experts_grouped(inputs[0], inputs[1], chosen, *inputs[2:]), everything[0])


def test_autocast_reaches_the_experts_and_gradients_keep_their_parameters_dtype():
    inputs, chosen = routed(r=9)
    with torch.autocast(DEVICE, dtype=torch.bfloat16): cast = results(experts.experts_grouped, inputs, chosen, randn(9, 32))
    low = [v if i == 1 else v.detach().bfloat16().requires_grad_() for i, v in enumerate(inputs)]
    for i, (a, b) in enumerate(zip(cast, results(experts.experts_grouped, low, chosen, randn(9, 32)))):
        assert a.dtype == (torch.bfloat16 if i == 0 else torch.float32) and torch.equal(a, b.to(a.dtype)), NAMES[i]


def test_no_tokens_at_all():
    """A rank of an expert-parallel layer may get none: empty outputs, zero gradients."""
    inputs, chosen = routed(r=0)
    y, dx, dweights, dup, ddown = results(experts.experts_grouped, inputs, chosen, randn(0, 32))
    assert y.shape == dx.shape == (0, 32) and dweights.shape == (0, 2) and dup.eq(0).all() and ddown.eq(0).all()


def test_float64_keeps_its_precision():
    inputs, chosen = routed(r=9)
    wide = [v.detach().double().requires_grad_() for v in inputs]
    for a, b in zip(results(experts.experts_grouped, wide, chosen, randn(9, 32)), results(moe.experts_loop, wide, chosen, randn(9, 32))):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_a_recipe_trains_as_the_stage_does():
    """The same codes in the same products with the same draws: bit for bit the stage's result."""
    inputs, chosen = routed(r=9)
    recipe, dy = nvfp4.NVFP4Recipe(), randn(9, 32, seed=5)
    runs = [results(lambda *args, run=run: run(*args, recipe, 7), inputs, chosen, dy) for run in (experts.experts_grouped, moe.experts_sorted)]
    for a, b in zip(*runs): assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_four_bits_serve(dtype):
    """The values that the codes stand for; and a clear word when somebody wants to train them."""
    (x, weights, up, down), chosen = routed(r=33, dtype=dtype)
    packed = [nvfp4.quantize(v.detach().float(), amax=v.detach().float().abs().amax((1, 2))) for v in (up, down)]
    with torch.no_grad(): y = experts.experts_grouped(x, weights, chosen, *packed)
    plain, wide = [v.dequantize(dtype) for v in packed], [v.dequantize().double().cpu() for v in packed]
    exact = moe.experts_loop(x.detach().double().cpu(), weights.detach().double().cpu(), chosen.cpu(), *wide)
    assert_no_worse(y, moe.experts_loop(x, weights, chosen, *plain), exact)
    with pytest.raises(ValueError, match="no_grad"): experts.experts_grouped(x, weights, chosen, *packed)
    with pytest.raises(ValueError, match="both or neither"): experts.experts_grouped(x, weights, chosen, packed[0], down)


def test_shapes_that_do_not_fit_are_refused():
    (x, weights, up, down), chosen = routed(r=9)
    for args in ((x[:, :16], weights, chosen, up, down), (x, weights[:, :1], chosen, up, down), (x, weights, chosen, up, down.mT)):
        with pytest.raises(ValueError, match="cannot serve"): experts.experts_grouped(*args)


@pytest.mark.parametrize("height", [1, 16, 64])
def test_the_table_names_every_row_once(height):
    """For any routing: each of an expert's rows in one tile, and the bound on tiles never too small."""
    for loads in ([0, 0, 0, 0], [70, 0, 0, 0], [0, 0, 0, 1], [16, 64, 1, 0], [17, 65, 3, 1], [1, 1, 1, 1]):
        chosen = torch.tensor([e for e, n in enumerate(loads) for _ in range(n)], dtype=torch.long, device=DEVICE).view(-1, 1)
        seen, ends = [], list(itertools.accumulate(loads))
        for tile, (e, start, end, first, tiles) in enumerate(experts._Routing(chosen, 4).plan(height).tolist()):
            if tile >= first + tiles: continue
            assert end == ends[e] and start == end - loads[e] and tiles == -(-loads[e] // height)
            row = start + (tile - first) * height
            seen += range(row, min(row + height, end))
        assert seen == list(range(sum(loads))), loads


def test_the_stage_finds_its_twin(monkeypatch):
    """impl="triton" runs kernels/experts.py, not the PyTorch body."""
    inputs, chosen = routed(r=9)
    y = moe.experts_grouped(inputs[0], inputs[1], chosen, *inputs[2:], impl="triton")
    assert torch.equal(y, experts.experts_grouped(inputs[0], inputs[1], chosen, *inputs[2:]))
    monkeypatch.setattr(experts, "experts_grouped", lambda *args: "the twin")
    assert moe.experts_grouped(inputs[0], inputs[1], chosen, *inputs[2:], impl="triton") == "the twin"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("r, k, l", [(17, 3, 48), (9, 1, 6), (1, 4, 1100), (0, 2, 32)])
def test_copies_and_their_weighted_sum_are_no_worse_than_pytorch(r, k, l, dtype):
    """Where rows travel between the two (expert parallelism, 4 bits). A place taken for its inverse, a token's copies not summed, a weight of another
    pair, a row wider than a block of which only the first block counts: the gradients differ."""
    x, weights, up, down = (randn(r, 2 * l, seed=1, dtype=dtype)[:, ::2], randn(r, k, seed=2).abs(), randn(r * k, l, seed=3, dtype=dtype),
                            randn(r, l, seed=4, dtype=dtype))
    order_q, inverse_q, _ = moe.sort_by_expert(torch.rand(r, 7, generator=torch.Generator().manual_seed(0)).topk(k).indices.to(DEVICE), 7)

    def run(copy, add, wide=None):
        a, w, rows = (v.detach().to(wide or v.dtype).requires_grad_() for v in (x, weights, up))
        copies, total = copy(a, k, order_q, inverse_q), add(rows, order_q, inverse_q, w)
        return [copies, total, *torch.autograd.grad(copies, a, rows.detach()), *torch.autograd.grad(total, (rows, w), down.to(total.dtype))]

    plain = [lambda *args: moe.copy_to_experts(*args, impl="torch"), lambda *args: moe.weighted_sum(*args, impl="torch")]
    ours, same, exact = run(experts.copy_to_experts, experts.weighted_sum), run(*plain), run(*plain, wide=torch.float64)
    for name, a, b, c in zip(("copies", "sum", "dx", "drows", "dweights"), ours, same, exact):
        assert a.dtype == b.dtype and a.shape == b.shape
        if r: assert_no_worse(a, b, c, what=name)


def test_float64_rows_stay_with_the_stage():
    """An algorithm is compared with another in float64, which these kernels would sum in fp32."""
    x, weights = randn(5, 8, seed=1).double(), randn(5, 2, seed=2).double()
    order_q, inverse_q, _ = moe.sort_by_expert(torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]], device=DEVICE), 3)
    copies = experts.copy_to_experts(x, 2, order_q, inverse_q)
    assert torch.equal(copies, x[order_q // 2])
    torch.testing.assert_close(experts.weighted_sum(copies, order_q, inverse_q, weights), x * weights.sum(1, keepdim=True), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("r, k, e", [(1, 1, 1), (1, 6, 64), (13, 3, 7), (32, 22, 37), (40, 2, 3), (0, 4, 5)])
def test_few_pairs_are_sorted_and_planned_as_many_are(r, k, e, monkeypatch):
    """By counting, against PyTorch's stable sort: equal experts keep their order, an expert without rows has no tile, and lines of the table that no
    tile needs send their programs home."""
    chosen = torch.rand(r, e, generator=torch.Generator().manual_seed(r)).topk(min(k, e)).indices.to(DEVICE)
    if e == 37: chosen = chosen // 3        # some experts idle, others several times a token
    few = experts._Routing(chosen, e)
    monkeypatch.setattr(experts, "_FEW", -1)
    many = experts._Routing(chosen, e)
    for name in ("order_q", "inverse_q", "token_q", "offsets_e"):
        ours, theirs = getattr(few, name), getattr(many, name)
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name
    order = sorted(range(chosen.numel()), key=lambda i: chosen.flatten()[i].item())
    assert few.order_q.tolist() == order and few.token_q.tolist() == [i // chosen.shape[1] for i in order]
    for height in (1, 4, 16):
        theirs = many.plan(height)
        used = sum(-(-n // height) for n in chosen.flatten().bincount(minlength=e).tolist())
        with monkeypatch.context() as m:
            m.setattr(experts, "_FEW", 2048)
            ours = few.plan(height)
        assert ours.shape == theirs.shape and torch.equal(ours[:used], theirs[:used]) and not ours[used:, 3:].any()


@pytest.mark.parametrize("dtype, weight_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("r, e, d, k", [(1, 6, 33, 1), (3, 64, 130, 6), (13, 37, 1024, 22), (33, 5, 40, 5)])
def test_few_tokens_are_routed_as_the_stage_routes_them(r, e, d, k, dtype, weight_dtype):
    """Scores as good as PyTorch's, the same experts in the same order, and weights of the scores without the bias: a bias that counts in a weight, a
    mean over all experts, an expert chosen twice, a lane past the last expert or token. Rows are a slice."""
    x, weight, bias = randn(r, d + 7, seed=1, dtype=dtype)[:, 3:3 + d], randn(e, d, seed=2, dtype=weight_dtype, scale=d**-0.5), randn(e, seed=3)
    with torch.no_grad():
        ours = moe.route(x, weight, bias, k, 2.5, impl="triton")
        plain = moe.route(x.float(), weight.float(), bias, k, 2.5, impl="torch")
    scores = torch.sigmoid(x.double() @ weight.double().T)
    assert_no_worse(ours[2], plain[2], scores, factor=4.0, what="scores")       # PyTorch's product adds in blocks, too: now and then it is lucky
    order = (scores + bias.double()).argsort(-1, descending=True)[:, :k]        # no two are closer than fp32's rounding, see the next line
    best = (scores + bias.double()).gather(1, order)
    assert k == 1 or (best[:, :-1] - best[:, 1:]).min() > 1e-6
    assert torch.equal(ours[1], order) and ours[1].dtype == torch.int64
    exact = scores.gather(1, order)
    torch.testing.assert_close(ours[0].double(), 2.5 * exact / exact.sum(1, keepdim=True), rtol=2e-6, atol=0)


def test_equal_scores_go_to_the_smaller_expert():
    """Ties in groups, and a largest value below zero, where the order of bits turns round. Without a rule two runs could differ."""
    make = lambda *shape: torch.zeros(*shape, device=DEVICE)
    bias = torch.tensor([-2.0, -1.0, -3.0, -1.0, -2.0, -1.0, -9.0], device=DEVICE)
    weights, chosen, scores = experts.route(make(2, 4), make(7, 4), bias, 5, 1.0)
    assert chosen.tolist() == [[1, 3, 5, 0, 4]] * 2 and torch.equal(scores, make(2, 7) + 0.5)
    torch.testing.assert_close(weights, make(2, 5) + 0.2)
    assert experts.route(make(1, 4), make(64, 4), make(64), 64, 1.0)[1].tolist() == [list(range(64))]
    assert [z.shape for z in experts.route(make(0, 4), make(7, 4), bias, 5, 1.0)] == [(0, 5), (0, 5), (0, 7)]


def test_a_gradient_or_many_rows_keep_the_stages_router(monkeypatch):
    """The two kernels have no backward: a router that trains through them would stand still."""
    called, x, weight = [], randn(3, 8), randn(6, 8, seed=1)
    monkeypatch.setattr(experts, "route", lambda *args: called.append(len(args[0])) or moe.route(*args, impl="torch"))
    moe.route(x, weight.requires_grad_(), torch.zeros(6, device=DEVICE), 2, 1.0, impl="triton")[0].sum().backward()
    assert weight.grad.any() and not called
    with torch.no_grad():
        for rows in (moe.FEW_ROWS, moe.FEW_ROWS + 1): moe.route(randn(rows, 8), weight, torch.zeros(6, device=DEVICE), 2, 1.0, impl="triton")
        moe.route(x.double(), weight.double(), torch.zeros(6, device=DEVICE), 2, 1.0, impl="triton")
    assert called == [moe.FEW_ROWS]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_relu2_is_the_stages_bit_for_bit(dtype):
    """Also NaN, infinities, -0 and a tensor that ends inside a block; with a gradient the stage's own runs."""
    x = randn(3, 777, seed=1, dtype=dtype)
    x[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    assert torch.equal(experts.relu2(x.T).nan_to_num(-1.0), moe.relu2(x.T, impl="torch").nan_to_num(-1.0))
    with torch.no_grad(): assert torch.equal(moe.relu2(x[:, 4:], impl="triton"), experts.relu2(x[:, 4:]))
    x = x[1:].clone().requires_grad_()
    assert torch.autograd.grad(moe.relu2(x, impl="triton").sum(), x)[0].any()


def launches(device, arch):
    """Every kernel at Ultra's sizes: a training step of 4096 tokens and a decode step of 64."""
    e, k, l, f = 512, 22, 2048, 5120
    make = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, device=device, dtype=dtype, requires_grad=True)
    up, down = make(e, f, l), make(e, l, f)
    for tokens in (4096, 64):
        inputs = make(tokens, l), make(tokens, k, dtype=torch.float32), torch.empty(tokens, k, device=device, dtype=torch.long), up, down
        with torch.set_grad_enabled(tokens > 64): y = experts.experts_grouped(*inputs)
        if tokens > 64: torch.autograd.grad(y, (*inputs[:2], up, down), torch.empty_like(y))
    order = torch.empty(4096 * k, device=device, dtype=torch.long)
    copies = experts.copy_to_experts(inputs[0][:1].expand(4096, l), k, order, order)
    total = experts.weighted_sum(copies, order, order, make(4096, k, dtype=torch.float32))
    torch.autograd.grad(total, inputs[0], torch.empty_like(total))
    for tokens in (1, 32):      # Super's router
        experts.route(torch.empty(tokens, 4096, dtype=torch.bfloat16, device=device), torch.empty(512, 4096, device=device),
                      torch.empty(512, device=device), 22, 5.0)
    experts.relu2(inputs[0].detach())
