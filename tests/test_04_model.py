"""Stage 04 against transformers' NemotronH, against published counts, and against itself run in other ways."""
import dataclasses
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

nvfp4, mamba, moe, model04 = (importlib.import_module(m) for m in ("01_nvfp4", "02_mamba", "03_latentmoe", "04_model"))
ModelConfig, Nemotron, PRESETS = model04.ModelConfig, model04.Nemotron, model04.PRESETS
ROOT = Path(__file__).parent.parent

MICRO = ModelConfig(pattern="MEM*E", d_model=64, vocab=96, heads=4, kv_heads=2, head_dim=16, mamba_heads=16, mamba_head_dim=8, groups=4, state=16,
                    chunk=16, experts=8, experts_per_token=3, latent=32, expert_width=48, shared_width=80, routed_scale=2.5,
                    time_step_limit=(0.01, 0.9))
VARIANTS = {"latent": MICRO, "no latent, 2 groups": dataclasses.replace(MICRO, latent=None, groups=2, pattern="E*MME", routed_scale=1.0)}


def ids(*shape, vocab=96, seed=0):
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))


# ---- the oracle: transformers' NemotronH with every parameter moved away from its default

def randomise(state: dict[str, torch.Tensor], seed: int = 0) -> None:
    """At the default init a wrong model passes: norms are 1, conv biases small, D is 1. So every tensor gets values of its own."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda t: torch.rand(t.shape, generator=g) * 2 - 1
    for name, t in state.items():
        if name.endswith("e_score_correction_bias"): t.copy_(0.1 * draw(t))
        elif name.endswith(("A_log", "dt_bias")): t.add_(0.5 * draw(t))
        elif name.endswith(("norm.weight", "norm_f.weight", "layernorm.weight", ".D", "conv1d.bias")): t.add_(0.3 * draw(t))
        elif "embeddings" in name: t.copy_(torch.randn(t.shape, generator=g))
        else: t.copy_(torch.randn(t.shape, generator=g) * 1.5 / math.sqrt(t[0].numel() if "experts." not in name or t.dim() == 2 else t.shape[-1]))


def oracle(config: ModelConfig, seed: int = 0):
    """(transformers' model, ours) with the same random parameters."""
    from transformers import NemotronHConfig, NemotronHForCausalLM
    # the pattern string alone: versions before 5.23 refuse the words that the released Ultra config lists its layers by
    keys = {k: v for k, v in config.to_dict().items() if k not in ("architectures", "model_type", "layers_block_type", "mtp_layers_block_type")}
    theirs = NemotronHForCausalLM(NemotronHConfig(**keys)).eval()
    for layer in theirs.model.layers:
        # its prefill otherwise clamps dt at time_step_min, which the released configs do not ask for
        if hasattr(layer.mixer, "time_step_limit"): layer.mixer.time_step_limit = config.time_step_limit
    with torch.no_grad(): randomise(theirs.state_dict(), seed)
    ours = Nemotron(dataclasses.replace(config, mtp_pattern="", mtp_depths=0))
    ours.load_state_dict({k.replace("model.", "backbone.", 1): v for k, v in theirs.state_dict().items()})
    return theirs, ours


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_embedding_gradient_equal_transformers(config):
    """Batch 3, 33 tokens (two chunks and one token): catches layer order, norm, routing, group sharing, scaling, positions."""
    theirs, ours = oracle(config)
    tokens = ids(3, 33)
    weights = torch.randn(3, 33, 96, generator=torch.Generator().manual_seed(1))
    a, b = ours(tokens), theirs(input_ids=tokens).logits
    assert gap(a, b) < 1e-4
    (a * weights).sum().backward(); (b * weights).sum().backward()
    assert gap(ours.backbone.embeddings.weight.grad, theirs.model.embeddings.weight.grad) < 1e-4


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_prefill_and_decode_equal_transformers(config):
    """21 tokens at once and 5 one by one, both with caches: a window or a state that is one token late shows here."""
    # the oracle's decode step does not clamp dt at all, so this test uses the released limits, which do not bite
    theirs, ours = oracle(dataclasses.replace(config, time_step_limit=(0.0, math.inf)))
    tokens = ids(2, 26)
    with torch.no_grad():
        cache, out = ours.empty_cache(2, 26), theirs(input_ids=tokens[:, :21], use_cache=True)
        assert gap(ours(tokens[:, :21], cache=cache), out.logits) < 1e-4
        for i in range(21, 26):
            out = theirs(input_ids=tokens[:, i:i + 1], past_key_values=out.past_key_values, use_cache=True)
            assert gap(ours(tokens[:, i:i + 1], cache=cache), out.logits) < 1e-4


def mamba_layers(m): return [b.mixer for b in m.backbone.layers if b.letter == "M"]
def moe_layers(m): return [b.mixer for b in m.backbone.layers if b.letter == "E"]


def rotate(x_bhtp, theta=10_000.0):
    """Rotary position embedding, which the released configs mention (rope_theta) and the model does not have."""
    half = x_bhtp.shape[-1] // 2
    angle = torch.arange(x_bhtp.shape[2])[:, None] * theta ** (-torch.arange(half) / half)
    x, y = x_bhtp.split(half, -1)
    return torch.cat([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], -1)


def mutate(name: str, ours, monkeypatch) -> None:
    """One mistake that people make, put into our model."""
    state = ours.state_dict()
    with torch.no_grad():
        for key, t in state.items():
            if name == "no conv bias" and key.endswith("conv1d.bias"): t.zero_()
            if name == "norm weights ignored" and key.endswith(("norm.weight", "norm_f.weight")): t.fill_(1.0)
            if name == "D ignored" and key.endswith(".D"): t.zero_()
            if name == "selection bias ignored" and key.endswith("e_score_correction_bias"): t.zero_()
            if name == "A_log reversed" and key.endswith("A_log"): t.copy_(t.flip(0))
            if name == "dt_bias reversed" and key.endswith("dt_bias"): t.copy_(t.flip(0))
    if name == "gate after the norm":
        def wrong(y, z, weight, groups, eps=1e-5, impl="auto"):
            y = y.unflatten(-1, (groups, -1))
            return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2) * weight * F.silu(z)
        monkeypatch.setattr(mamba, "gated_rmsnorm", wrong)
    if name == "RoPE added":
        right = F.scaled_dot_product_attention
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **kw: right(rotate(q), rotate(k), v, **kw))
    if name == "shared expert reads the latent":
        for layer in moe_layers(ours):
            shared = layer.shared_experts.forward
            layer.shared_experts.forward = lambda x, shared=shared, layer=layer: shared(layer.fc2_latent_proj(layer.fc1_latent_proj(x)))


MUTANTS = ["no conv bias", "norm weights ignored", "D ignored", "selection bias ignored", "A_log reversed", "dt_bias reversed", "gate after the norm",
           "RoPE added", "shared expert reads the latent"]


@pytest.mark.parametrize("mutant", ["none", *MUTANTS])
def test_the_oracle_catches(mutant, monkeypatch):
    """A test that a wrong model passes is worth nothing: each of these mistakes must move the logits by more than the tolerance."""
    theirs, ours = oracle(MICRO)
    tokens = ids(2, 33)
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits
        mutate(mutant, ours, monkeypatch)
        error = gap(ours(tokens), expected)
    assert (error < 1e-4) if mutant == "none" else (error > 1e-3), error


# ---- counts

@pytest.mark.parametrize("name, total, active, mtp", [
    ("ultra", 549.3e9, 54.99e9, 11.22e9), ("super", 120.7e9, 12.23e9, 2.94e9), ("nano", 31.6e9, 3.23e9, 0)])
def test_parameter_counts_are_the_published_ones(name, total, active, mtp):
    """By formula and by building the model: a missing expert or a doubled projection does not survive both. Published to 4 digits or fewer."""
    book = model04.ledger(PRESETS[name])
    assert book.total == pytest.approx(total, rel=2e-3) and book.active == pytest.approx(active, rel=2e-3)
    assert book.mtp == pytest.approx(mtp, rel=2e-3)
    with torch.device("meta"): built = Nemotron(PRESETS[name])
    counted = {n: t.numel() for n, t in built.state_dict().items()}
    head = sum(n for key, n in counted.items() if key.startswith("mtp."))
    assert (sum(counted.values()) - head, head) == (book.total, book.mtp)


@pytest.mark.parametrize("name, tensors", [("super", 42_683), ("ultra", 51_023)])
def test_an_export_has_as_many_tensors_as_the_release(name, tensors):
    with torch.device("meta"): built = Nemotron(PRESETS[name])
    names = [n for n, _ in model04.released_tensors(built)]
    assert len(names) == len(set(names)) == tensors == model04.ledger(PRESETS[name]).tensors


def test_the_mamba_cache_equals_the_attention_cache_at_65536_tokens():
    """Ultra's fp32 SSM state is exactly as large as FP8 keys and values of 65,536 tokens: the report's cross-over, conv windows ignored."""
    book = model04.ledger(PRESETS["ultra"])
    assert book.state_values * 4 == 65_536 * book.kv_values_per_token * 1 == 402_653_184


def test_released_configs_round_trip_in_every_style():
    """Pattern string or word list (old and new words), three spellings of infinity, with and without latent and MTP."""
    for config in PRESETS.values():
        released = config.to_dict()
        json.loads(json.dumps(released, allow_nan=False))      # strict JSON: no bare Infinity
        again = ModelConfig.from_dict(released)
        assert again == config
        words = dict(M="linear_attention", E="moe")
        new = {**released, "layers_block_type": [words.get(c, "full_attention") for c in config.pattern]}
        del new["hybrid_override_pattern"]
        assert ModelConfig.from_dict(new) == again
        del new["layers_block_type"]
        assert ModelConfig.from_dict({**new, "hybrid_override_pattern": config.pattern}) == again
    for infinity in (math.inf, 1e308, {"__float__": "Infinity"}):
        assert ModelConfig.from_dict({**PRESETS["ultra"].to_dict(), "time_step_limit": [0.0, infinity]}).time_step_limit == (0.0, math.inf)


@pytest.mark.parametrize("change, word", [
    (dict(d_model=130), "d_model"), (dict(latent=40), "latent"), (dict(expert_width=100), "expert_width"), (dict(shared_width=8), "shared_width"),
    (dict(mamba_heads=24), "mamba_heads"), (dict(groups=3), "groups"), (dict(heads=3), "kv_heads"), (dict(experts_per_token=17), "experts_per_token"),
    (dict(pattern="MX"), "pattern"), (dict(pattern=""), "pattern"), (dict(d_model=48), "MXFP8"), (dict(mtp_depths=-1), "mtp_depths")])
def test_a_width_that_cannot_be_served_is_named(change, word):
    with pytest.raises(ValueError, match=word): ModelConfig(**change)


def test_a_config_of_another_architecture_is_refused():
    with pytest.raises(ValueError, match="attention_bias"): ModelConfig.from_dict({**MICRO.to_dict(), "attention_bias": True})
    with pytest.raises(ValueError, match="lacks vocab_size"): ModelConfig.from_dict({k: v for k, v in MICRO.to_dict().items() if k != "vocab_size"})
    with pytest.raises(ValueError, match="disagree"): ModelConfig.from_dict({**MICRO.to_dict(), "hybrid_override_pattern": "MEM*M"})


@pytest.mark.parametrize("command, words", [
    (["04_model.py", "--preset", "huge"], ["unknown preset 'huge'", "tiny, small, nano, super, ultra"]),
    (["03_latentmoe.py", "--out", f"{__file__}/x"], ["cannot be created"]), (["01_nvfp4.py", "--out", f"{__file__}/x"], ["cannot be created"])])
def test_bad_input_is_one_sentence_and_an_exit_code(command, words):
    """No traceback for what a person can mend, no exit code 0, and nothing computed first that would be lost."""
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and "Traceback" not in run.stderr and not run.stdout and len(run.stderr.strip().splitlines()) == 1
    for word in words: assert word in run.stderr


# ---- placement

def test_placement_name_by_name():
    """A lazy rule for *_proj would put attention and the latent projections into 4 bits; a rule after mtp.* would catch the head's experts."""
    ultra = PRESETS["ultra"]
    expect = {"backbone.layers.0.mixer.in_proj.weight": "nvfp4", "backbone.layers.0.mixer.out_proj.weight": "mxfp8",
              "backbone.layers.1.mixer.experts.up_proj": "nvfp4", "backbone.layers.1.mixer.shared_experts.down_proj.weight": "nvfp4",
              "backbone.layers.1.mixer.fc1_latent_proj.weight": "high", "backbone.layers.1.mixer.fc2_latent_proj.weight": "high",
              "backbone.layers.1.mixer.gate.weight": "high", "backbone.layers.7.mixer.q_proj.weight": "high",
              "backbone.layers.7.mixer.o_proj.weight": "high",
              "backbone.layers.91.mixer.experts.up_proj": "nvfp4", "backbone.layers.92.mixer.in_proj.weight": "high",
              "backbone.layers.92.mixer.out_proj.weight": "high", "backbone.layers.107.mixer.experts.down_proj": "high",
              "backbone.embeddings.weight": "high", "lm_head.weight": "high", "mtp.layers.1.mixer.experts.up_proj": "high",
              "mtp.layers.0.eh_proj.weight": "high", "backbone.layers.0.norm.weight": "high", "backbone.layers.0.mixer.conv1d.weight": "high"}
    assert {name: model04.placement_of(name, ultra)[0] for name in expect} == expect
    kept = {i for i in range(108) if model04.in_last_layers(f"backbone.layers.{i}.mixer.x_proj", ultra)}
    assert kept == set(range(92, 108))


def test_apply_recipe_swaps_exactly_what_the_table_says():
    tiny = Nemotron(PRESETS["tiny"], nvfp4.NVFP4Recipe())
    kinds = {name: type(m).__name__ for name, m in tiny.named_modules() if type(m).__name__ in ("Linear", "NVFP4Linear", "MXFP8Linear")}
    want = {"nvfp4": "NVFP4Linear", "mxfp8": "MXFP8Linear", "high": "Linear"}
    assert kinds == {name: want[model04.placement_of(name + ".weight", tiny.config)[0]] for name in kinds}
    assert set(kinds.values()) == set(want.values())
    assert [block.mixer.experts.recipe is not None for block in tiny.backbone.layers if block.letter == "E"] == [True, True, True, False]
    assert all(not hasattr(m, "recipe") or m.recipe is None for m in tiny.mtp.modules())


def test_a_step_in_nvfp4_is_close_to_full_precision_and_repeats_its_draws():
    """The recipe must act (losses differ), must not wreck the model (within 2 %), and one set of draws must give one set of gradients."""
    tokens = ids(2, 49, vocab=4096)
    def step(recipe, micro=0):
        torch.manual_seed(0)
        m = Nemotron(PRESETS["tiny"], recipe)
        m.set_draws(m.draw_seeds(1, 2, micro))
        losses = model04.loss(m, tokens[:, :-1], tokens[:, 1:])
        losses.total.backward()
        return losses.total.item(), torch.cat([p.grad.flatten() for p in m.parameters()])
    recipe = nvfp4.NVFP4Recipe()
    (high, g_high), (low, g_low), (again, g_again), (_, g_other) = step(None), step(recipe), step(recipe), step(recipe, micro=1)
    assert high != low and abs(low - high) / high < 0.02
    assert low == again and torch.equal(g_low, g_again) and not torch.equal(g_low, g_other)
    assert torch.isfinite(g_low).all() and F.cosine_similarity(g_low, g_high, dim=0) > 0.8


# ---- documents and padding

@pytest.mark.parametrize("lengths", [(9, 17, 7), (1, 31, 1), (16, 16, 1)])
def test_packed_documents_do_not_see_each_other(lengths):
    """Three documents in one row equal three rows: Mamba state, conv window and attention all reset."""
    torch.manual_seed(0)
    m = Nemotron(MICRO).double()
    with torch.no_grad(): randomise(m.state_dict())
    docs = [ids(1, n, seed=i) for i, n in enumerate(lengths)]
    doc_bt = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], 1)
    packed = m(torch.cat(docs, 1), doc_bt)
    assert gap(packed, torch.cat([m(d) for d in docs], 1)) < 1e-10


def test_a_packed_document_id_that_comes_back_is_another_document():
    """0 1 0: the third part must not attend to the first. An attention that compares ids instead of borders fails."""
    m = Nemotron(MICRO).double()
    with torch.no_grad(): randomise(m.state_dict())
    tokens = ids(1, 15)
    a, b = (m(tokens, torch.tensor([[0] * 5 + [1] * 5 + [last] * 5])) for last in (0, 2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_changes_nothing(side):
    m = Nemotron(MICRO).double()
    with torch.no_grad(): randomise(m.state_dict())
    tokens, pad = ids(2, 19), torch.zeros(2, 6, dtype=torch.long)
    at = {"left": 0, "right": 19, "middle": 8}[side]
    padded = torch.cat([tokens[:, :at], pad, tokens[:, at:]], 1)
    doc_bt = torch.zeros(2, 25, dtype=torch.long); doc_bt[:, at:at + 6] = -1
    out = m(padded, doc_bt)
    assert gap(torch.cat([out[:, :at], out[:, at + 6:]], 1), m(tokens)) < 1e-10
    a = model04.loss(m, tokens[:, :-1], tokens[:, 1:], mtp_weight=0.0)
    assert torch.isfinite(out).all() and a.load_me.sum() == 2 * 18 * 2 * 3          # tokens × MoE layers × chosen experts


def test_padding_counts_neither_in_loss_nor_in_loads():
    m = Nemotron(MICRO).double()
    tokens, doc_bt = ids(1, 20), torch.tensor([[0] * 15 + [-1] * 5])
    padded = model04.loss(m, tokens[:, :-1], tokens[:, 1:], doc_bt[:, 1:])
    plain = model04.loss(m, tokens[:, :14], tokens[:, 1:15])
    assert torch.equal(padded.load_me, plain.load_me)
    for a, b in zip([padded.total, padded.main, *padded.mtp_k, padded.aux], [plain.total, plain.main, *plain.mtp_k, plain.aux]):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


# ---- multi-token prediction

def test_roll_document_on_a_hand_written_example():
    x, doc = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 0, 0, 1, 1]])
    assert model04.roll_document(x, doc, fill=-7).tolist() == [[6, 7, -7, 9, -7]]
    assert model04.roll_document(x, None).tolist() == [[6, 7, 8, 9, 0]]


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_mtp_reads_and_predicts_the_right_tokens(depths, monkeypatch):
    """Two documents 10 11 12 13 | 20 21 22. Depth 1 at position t reads token t+1 and predicts t+2; borders and tails carry no loss."""
    m = Nemotron(dataclasses.replace(MICRO, mtp_depths=depths))
    row, doc = torch.tensor([[10, 11, 12, 13, 20, 21, 22]]), torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    labels = torch.tensor([[11, 12, 13, -1, 21, 22, -1]])
    calls, read = [], []
    right = model04.linear_cross_entropy
    def spy(h, w, labels, mask):
        calls.append((labels.tolist(), mask.tolist()))
        return right(h, w, labels, mask)
    monkeypatch.setattr(model04, "linear_cross_entropy", spy)
    m.mtp.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    out = model04.loss(m, row, labels, doc)
    assert len(out.mtp_k) == depths
    masked = [[y if keep else None for y, keep in zip(*call)] for call in calls]
    assert masked[0] == [11, 12, 13, None, 21, 22, None]
    if depths >= 1: assert masked[1] == [12, 13, None, None, 22, None, None]
    if depths == 2: assert masked[2] == [13, None, None, None, None, None, None]
    embed = m.backbone.embeddings.weight
    want = [[11, 12, 13, 0, 21, 22, 0], [12, 13, 0, 0, 22, 0, 0]]
    for seen, tokens in zip(read, want): assert torch.equal(seen[0], embed[torch.tensor(tokens)])
    ahead = 0.1 * sum(out.mtp_k).item() / depths if depths else 0.0
    assert out.total.item() == pytest.approx(out.main.item() + 1e-4 * out.aux.item() + ahead, rel=1e-6)


def test_mtp_equals_its_definition_token_by_token():
    """h_k = final_layernorm(block(eh_proj[enorm(emb), hnorm(h_{k-1})])), from the trunk's normed output, written out in float64."""
    m = Nemotron(MICRO).double()
    with torch.no_grad(): randomise(m.state_dict())
    tokens = ids(2, 12)
    h = m.hidden(tokens[:, :-1])
    first, last = m.mtp.layers
    out = model04.loss(m, tokens[:, :-1], tokens[:, 1:])
    norm = lambda x, n: x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * n.weight
    for k, measured in enumerate(out.mtp_k, 1):
        ahead = F.pad(tokens[:, k:-1], (0, k))
        u = torch.cat([norm(m.backbone.embeddings(ahead), first.enorm), norm(h, first.hnorm)], -1) @ first.eh_proj.weight.T
        u = u + first.mixer(norm(u, first.norm))
        u = u + last.mixer(norm(u, last.norm))[0]
        h = norm(u, last.final_layernorm)
        expected = F.cross_entropy((h @ m.lm_head.weight.T)[:, :-k].flatten(0, 1), tokens[:, k + 1:].flatten())
        torch.testing.assert_close(measured, expected, rtol=1e-10, atol=0)
    assert out.load_me.shape == (3, 8) and out.load_me[2].sum() == 2 * 2 * 11 * 3      # both depths count for the head's one router


def test_the_mtp_gradient_reaches_the_trunk():
    m = Nemotron(MICRO)
    tokens = ids(1, 12)
    out = model04.loss(m, tokens[:, :-1], tokens[:, 1:])
    sum(out.mtp_k).backward()
    assert m.backbone.layers[0].mixer.in_proj.weight.grad.abs().max() > 0 and m.mtp.layers[0].eh_proj.weight.grad.abs().max() > 0


# ---- loss and recomputation

@pytest.mark.parametrize("rows, chunk", [(33, 8), (33, 64), (1, 1)])
def test_linear_cross_entropy_equals_its_definition(rows, chunk):
    """Forward and both gradients in float64, with masked rows and negative labels, at a chunk that does not divide the rows."""
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(rows, 16, generator=g, dtype=torch.float64), torch.randn(50, 16, generator=g, dtype=torch.float64)
    labels, mask = torch.randint(0, 50, (rows,), generator=g), torch.rand(rows, generator=g) < 0.7
    mask[0] = True; labels[-1] = labels[-1] if rows == 1 else -100
    results = []
    for f in (lambda h, w: model04.linear_cross_entropy(h, w, labels, mask, chunk=chunk),
              lambda h, w: model04.cross_entropy_definition(h, w, labels.clamp(min=0), mask & (labels >= 0))):
        h_, w_ = h.clone().requires_grad_(), w.clone().requires_grad_()
        value = f(h_, w_) * 3
        value.backward()
        results.append((value, h_.grad, w_.grad))
    for a, b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_rows_are_weighed():
    """Weights above and below 1, and of sum below 1, in float64: a mean weighed by hand; rows of weight 0 may hold labels that do not exist."""
    g = torch.Generator().manual_seed(0)
    h, weight = torch.randn(33, 8, generator=g, dtype=torch.float64), torch.randn(11, 8, generator=g, dtype=torch.float64)
    labels, w = torch.randint(0, 11, (33,), generator=g), torch.rand(33, generator=g, dtype=torch.float64) * 3
    w[::3] = 0
    wild = labels.clone()
    wild[::3] = 99
    for scale in (1.0, 1e-3):
        found = []
        for definition in (True, False):
            a, b = h.clone().requires_grad_(), weight.clone().requires_grad_()
            loss_r = F.cross_entropy(a @ b.T, labels, reduction="none")
            value = (w * loss_r).sum() / w.sum() if definition else model04.linear_cross_entropy(a, b, wild, w * scale, chunk=7)
            value.backward()
            found.append((value.detach(), a.grad, b.grad))
        for want, have in zip(*found): torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model04.cross_entropy_definition(h, weight, labels, w), found[0][0], rtol=1e-12, atol=0)


def test_pieces_of_a_batch_add_up_to_it():
    """totals_k says what the weights of the whole batch sum to: two rows alone, of 19 and 4 tokens to learn, give the loss and gradients of both."""
    m, tokens = Nemotron(MICRO), ids(2, 25)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[0, :5] = mask[1, 4:] = False
    weigh = lambda mask_bt, doc_bt: mask_bt * torch.linspace(1, 2, mask_bt.shape[1])
    def run(rows, **more):
        m.zero_grad()
        out = model04.loss(m, tokens[rows, :-1], tokens[rows, 1:], None, mask[rows], aux_weight=0.0, weigh=weigh, **more)
        out.total.backward()
        return torch.stack([out.main, *out.mtp_k]).detach(), m.backbone.layers[0].mixer.in_proj.weight.grad.clone()
    w, totals = mask, []
    for _ in range(3):
        totals.append(weigh(w, None).sum())
        w = model04.roll_document(w, None, fill=False)
    whole, parts = run(slice(0, 2)), [run(slice(i, i + 1), totals_k=torch.stack(totals)) for i in (0, 1)]
    for want, a, b in zip(whole, *parts): torch.testing.assert_close(a + b, want, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(whole[0], run(slice(0, 1))[0], rtol=1e-4)


def test_nothing_to_learn_gives_zero():
    h, w = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    value = model04.linear_cross_entropy(h, w, torch.full((4,), -1))
    value.backward()
    assert value == 0 and h.grad.abs().max() == 0 and w.grad.abs().max() == 0


def test_recomputation_changes_neither_gradients_nor_loads():
    """Activation recomputation runs every block twice; loads counted in the forward pass on the module would come out doubled."""
    tokens = ids(2, 25)
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        m = Nemotron(MICRO); m.recompute = recompute
        losses = model04.loss(m, tokens[:, :-1], tokens[:, 1:])
        losses.total.backward()
        m.update_expert_bias(losses.load_me)
        results.append((losses, {n: p.grad for n, p in m.named_parameters()}, [r.e_score_correction_bias for r in m.routers()]))
    (la, ga, ba), (lb, gb, bb) = results
    assert torch.equal(la.load_me, lb.load_me) and la.load_me.sum() == (2 * 48 + 2 * 48) * 3
    assert all(torch.equal(ga[n], gb[n]) for n in ga) and all(torch.equal(x, y) and x.abs().max() > 0 for x, y in zip(ba, bb))


# ---- checkpoints

def test_transformers_opens_our_directory(tmp_path):
    """No missing and no unexpected key but mtp.*, and the same logits: names, shapes and the expert split are the released ones."""
    transformers = pytest.importorskip("transformers", "5.23", reason="older versions refuse the layer words of the released Ultra config")
    ours = Nemotron(MICRO)
    with torch.no_grad(): randomise(ours.state_dict())
    model04.save_checkpoint(tmp_path, ours, shard_bytes=60_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    theirs, info = transformers.NemotronHForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["mismatched_keys"] and all(k.startswith("mtp.") for k in info["unexpected_keys"])
    for layer in theirs.model.layers:
        if hasattr(layer.mixer, "time_step_limit"): layer.mixer.time_step_limit = MICRO.time_step_limit
    tokens = ids(2, 20)
    with torch.no_grad(): assert gap(ours(tokens), theirs(input_ids=tokens).logits) < 1e-4


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_we_open_transformers_directory(config, tmp_path):
    theirs, _ = oracle(config)
    theirs.save_pretrained(tmp_path)
    ours = model04.load_checkpoint(tmp_path)
    tokens = ids(2, 20)
    with torch.no_grad(): assert gap(ours(tokens), theirs(input_ids=tokens).logits) < 1e-4
    assert not hasattr(ours, "mtp")


def test_save_and_load_give_back_every_bit(tmp_path):
    ours = Nemotron(MICRO)
    with torch.no_grad(): randomise(ours.state_dict())
    model04.save_checkpoint(tmp_path, ours)
    again = model04.load_checkpoint(tmp_path)
    assert again.config == MICRO and all(torch.equal(a, again.state_dict()[n]) for n, a in ours.state_dict().items())
    half = model04.load_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16 and half.backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert half.routers()[0].e_score_correction_bias.dtype == torch.float32 and torch.isfinite(half(ids(1, 5)).float()).all()


def rewrite(directory, change):
    """Applies `change` to the tensors of the one shard in a checkpoint directory."""
    from safetensors.torch import load_file, save_file
    file = next(directory.glob("*.safetensors"))
    tensors = load_file(file); change(tensors); save_file(tensors, file)


@pytest.mark.parametrize("problem, change, words", [
    ("missing", lambda t: t.pop("backbone.layers.1.mixer.experts.3.up_proj.weight"),
     ["missing backbone.layers.1.mixer.experts.3.up_proj.weight", "[48, 32]"]),
    ("unexpected", lambda t: t.update(extra=torch.zeros(2)), ["unexpected extra", "[2]"]),
    ("shape", lambda t: t.update({"lm_head.weight": torch.zeros(5, 64)}), ["wrong shape of lm_head.weight", "expected [96, 64]", "found [5, 64]"])])
def test_a_misfit_is_named_with_expected_and_found(problem, change, words, tmp_path):
    model04.save_checkpoint(tmp_path, Nemotron(MICRO))
    rewrite(tmp_path, change)
    with pytest.raises(ValueError) as error: model04.load_checkpoint(tmp_path)
    for word in words: assert word in str(error.value)


def test_a_checkpoint_cut_short_is_one_sentence(tmp_path):
    model04.save_checkpoint(tmp_path, Nemotron(MICRO))
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cut short or damaged"): model04.load_checkpoint(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="is missing in"): model04.load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no config.json"): model04.load_checkpoint(tmp_path / "nowhere")


# ---- generation

@pytest.fixture(scope="module")
def trained_like():
    m = Nemotron(MICRO)
    with torch.no_grad(): randomise(m.state_dict())
    return m


GREEDY = model04.SamplingParams(max_tokens=9, temperature=0.0, stop_ids=())


def test_cached_generation_equals_recomputing_everything(trained_like):
    prompt = ids(1, 13)[0].tolist()
    out = model04.generate(trained_like, [prompt], GREEDY, return_logprobs=True)[0]
    row, logps = list(prompt), []
    for _ in range(9):
        with torch.no_grad(): logits = trained_like(torch.tensor([row]))[0, -1]
        row.append(logits.argmax().item()); logps.append(logits.log_softmax(-1)[row[-1]].item())
    assert out.ids == row[13:] and out.logprobs == pytest.approx(logps, abs=1e-4) and not out.finished


def test_a_prompt_answers_the_same_alone_and_in_a_ragged_batch(trained_like):
    """Left padding must be invisible to attention, conv window and state; sampling must not depend on the neighbours."""
    prompts = [ids(1, n, seed=n)[0].tolist() for n in (1, 17, 5)]
    for params in (GREEDY, model04.SamplingParams(max_tokens=9, seed=3, stop_ids=())):
        together = model04.generate(trained_like, prompts, params)
        alone = model04.generate(trained_like, prompts[:1], params)
        assert together[0].ids == alone[0].ids
        if params.temperature == 0: assert [model04.generate(trained_like, [p], params)[0].ids for p in prompts] == [c.ids for c in together]


def test_seeds_stops_and_bad_prompts(trained_like):
    prompt = [ids(1, 7)[0].tolist()]
    draw = lambda seed: model04.generate(trained_like, prompt, model04.SamplingParams(max_tokens=12, seed=seed, stop_ids=()))[0].ids
    assert draw(1) == draw(1) and draw(1) != draw(2)
    free = draw(1)
    stopped = model04.generate(trained_like, prompt, model04.SamplingParams(max_tokens=12, seed=1, stop_ids=(free[4],)))[0]
    assert stopped.ids == free[:free.index(free[4]) + 1] and stopped.finished
    with pytest.raises(ValueError, match="prompt 1 is empty"): model04.generate(trained_like, [[5], []], GREEDY)
    with pytest.raises(ValueError, match="outside the vocabulary"): model04.generate(trained_like, [[96]], GREEDY)
    with pytest.raises(ValueError, match="top_p"): model04.SamplingParams(top_p=0.0)


def test_sampling_follows_temperature_and_top_p():
    """Inverse-CDF sampling over 20,000 evenly spaced u: counts equal probabilities to 1e-3; top_p keeps the token that crosses it."""
    logits = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25]))
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    count = lambda t, p: torch.bincount(model04.sample(logits.expand(20_000, 4), t, p, u), minlength=4) / 20_000
    torch.testing.assert_close(count(1.0, 1.0), torch.tensor([0.1, 0.5, 0.15, 0.25]), atol=1e-3, rtol=0)
    torch.testing.assert_close(count(1.0, 0.7), torch.tensor([0.0, 2 / 3, 0.0, 1 / 3]), atol=1e-3, rtol=0)
    squared = torch.tensor([0.1, 0.5, 0.15, 0.25]) ** 2
    torch.testing.assert_close(count(0.5, 1.0), squared / squared.sum(), atol=1e-3, rtol=0)
    assert count(1.0, 1e-9)[1] == 1 and count(0, 1.0)[1] == 1


def test_the_kv_cache_refuses_to_overflow(trained_like):
    cache = trained_like.empty_cache(1, 4)
    with torch.no_grad(), pytest.raises(ValueError, match="holds 4 tokens and 5 are needed"): trained_like(ids(1, 5), cache=cache)


# ---- a slice of a preset

def test_the_slice_is_quantised_as_the_middle_of_the_whole_model():
    """Four layers would keep the last one high and three the MoE: the slice's formats must be those of Ultra's first M, * and E."""
    recipe = nvfp4.NVFP4Recipe()
    blocks = model04.slice_blocks(PRESETS["ultra"], recipe, "meta", torch.bfloat16)
    kinds = {"Linear": "high", "NVFP4Linear": "nvfp4", "MXFP8Linear": "mxfp8"}
    for block, layer in zip(blocks, (0, 7, 1), strict=True):
        assert block.letter == PRESETS["ultra"].pattern[layer] and block.norm.weight.shape == (8192,)
        found = {name: kinds[type(m).__name__] for name, m in block.named_modules() if type(m).__name__ in kinds}
        assert found == {name: model04.placement_of(f"backbone.layers.{layer}.{name}.weight", PRESETS["ultra"])[0] for name in found}
    mixers = [block.mixer for block in blocks]
    assert mixers[2].experts.recipe is recipe and mixers[2].experts.up_proj.shape == (512, 5120, 2048)
    assert mixers[2].experts.up_proj.dtype == mixers[0].in_proj.weight.dtype == torch.bfloat16
    assert mixers[0].A_log.dtype == mixers[2].gate.weight.dtype == mixers[2].gate.e_score_correction_bias.dtype == torch.float32


def test_the_slice_runs_forward_and_backward_in_16_bits():
    """Every parameter and the input get a finite gradient in bf16, without and with the recipe: what --slice times is the whole step."""
    for recipe in (None, nvfp4.NVFP4Recipe()):
        torch.manual_seed(0)
        blocks = model04.slice_blocks(MICRO, recipe, "cpu", torch.bfloat16)
        x_btd, dy_btd = torch.randn(2, 1, 33, 64, dtype=torch.bfloat16)
        y_btd, = model04.run_blocks(blocks, x_btd, None)
        grads = model04.run_blocks(blocks, x_btd.requires_grad_(), dy_btd)
        assert y_btd.shape == grads[0].shape == (1, 33, 64) and len(grads) == 1 + sum(1 for block in blocks for _ in block.parameters())
        assert all(torch.isfinite(g).all() for g in grads) and (torch.stack([g.float().abs().max() for g in grads]) > 0).all()


def test_the_slice_writes_a_row_for_each_precision_and_layer(tmp_path, capsys, monkeypatch):
    """Counted work over measured time: a layer's FLOPs from the ledger, the output layer and the three other layers not among them."""
    monkeypatch.setitem(PRESETS, "tiny", MICRO)
    monkeypatch.setattr(nvfp4, "best_ms", lambda call, repeats=3: (2.0, call()))
    model04.main(model04.Config(slice=True, tokens=5, out=tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    high = "bf16" if torch.cuda.is_available() else "fp32"
    assert [(r["precision"], r["layers"]) for r in rows] == [(p, part) for p in (high, "nvfp4") for part in ("M*E", "M", "*", "E")]
    attention = 5 * (2 * 64 * (4 * 16 + 2 * 2 * 16 + 4 * 16) + 4 * 4 * 16 * 3)      # q, k, v, o; then scores and values over 3 tokens on average
    assert [rows[2][k] for k in ("forward_tflops", "both_tflops")] == pytest.approx([attention / 2e-3 / 1e12, 3 * attention / 2e-3 / 1e12])
    assert rows[0]["both_tflops"] == pytest.approx(sum(r["both_tflops"] for r in rows[1:4])) and "5 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [(dict(preset="ultra"), "ultra needs a CUDA device with about 79 GB .* --preset tiny --slice"),
                                          (dict(tokens=0), "--tokens 0"), (dict(preset="huge"), "unknown preset 'huge'")])
def test_a_slice_that_cannot_run_is_one_sentence(flags, words, tmp_path, monkeypatch):
    """Ultra's experts on a CPU must not start to fill 46 GB first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=words): model04.main(model04.Config(slice=True, out=tmp_path, **flags))
