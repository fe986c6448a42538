"""Stage 08, post-training quantization: held to torchao, ml_dtypes, a layout spelled out by hand, and sums worked on paper."""
import dataclasses
import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from data import corpus
from data.batches import Batch
from data.tokenizer import Tokenizer

nvfp4, moe, model04, infer = (importlib.import_module(m) for m in ("01_nvfp4", "03_latentmoe", "04_model", "08_infer"))
ModelConfig, Nemotron, Recipe = model04.ModelConfig, model04.Nemotron, infer.Recipe
ROOT, F8, BF16, F32, U8 = Path(__file__).parent.parent, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.uint8

MICRO = ModelConfig(pattern="ME*", d_model=32, vocab=64, heads=4, kv_heads=2, head_dim=8, mamba_heads=16, mamba_head_dim=2, groups=2, state=4,
                    chunk=16, experts=2, experts_per_token=1, latent=16, expert_width=48, shared_width=64)
DEEP = dataclasses.replace(MICRO, pattern="MEM*E", d_model=64, experts=8, experts_per_token=3, latent=32)


def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
def bits(x): return x.reshape(-1).contiguous().view(torch.uint8)


def make_model(config=MICRO, seed=0) -> Nemotron:
    """Every parameter with values of its own: at the default init norms are 1 and biases 0, and a wrong model passes."""
    torch.manual_seed(seed)
    model = Nemotron(config)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if p.dim() < 2 or "conv1d" in name: p.add_(0.2 * torch.rand_like(p))
            else: p.normal_(0, 1.2 / p.shape[-1] ** 0.5)
    return model.eval()


def make_batch(vocab=64, b=2, t=40, seed=0) -> Batch:
    ids = torch.randint(3, vocab, (b, t + 1), generator=torch.Generator().manual_seed(seed)).numpy()
    return Batch.from_windows(ids, np.zeros_like(ids))


def read(folder) -> dict[str, torch.Tensor]: return dict(model04.read_tensors(folder))


def write(folder, tensors) -> None:
    """The tensors as the one shard of a checkpoint, in place of what was there."""
    for file in folder.glob("*.safetensors*"): file.unlink()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """(model, its checkpoint, the quantized one by default, the calibration, what quantize_checkpoint returned)."""
    home, model = tmp_path_factory.mktemp("export"), make_model(DEEP)
    model04.save_checkpoint(home / "plain", model)
    amax = infer.calibrate(model, [make_batch()])
    return model, home / "plain", home / "quantized", amax, infer.quantize_checkpoint(home / "plain", Recipe(), home / "quantized", amax)


# ---- the table

@pytest.mark.parametrize("name, fmt", [
    ("backbone.layers.1.mixer.experts.7.up_proj.weight", "nvfp4"), ("backbone.layers.1.mixer.experts.7.down_proj.weight", "nvfp4"),
    ("backbone.layers.1.mixer.shared_experts.up_proj.weight", "fp8"), ("backbone.layers.1.mixer.shared_experts.down_proj.weight", "fp8"),
    ("backbone.layers.0.mixer.in_proj.weight", "fp8"), ("backbone.layers.0.mixer.out_proj.weight", "fp8"),
    *((f"backbone.layers.2.mixer.{x}_proj.weight", "bf16") for x in "qkvo"),
    *((f"backbone.layers.1.mixer.{x}_latent_proj.weight", "bf16") for x in ("fc1", "fc2")),
    ("backbone.layers.1.mixer.gate.weight", "bf16"), ("backbone.layers.1.mixer.gate.e_score_correction_bias", "bf16"),
    ("backbone.layers.0.mixer.conv1d.weight", "bf16"), ("backbone.layers.0.mixer.A_log", "bf16"), ("backbone.embeddings.weight", "bf16"),
    ("lm_head.weight", "bf16"), ("mtp.layers.1.mixer.experts.0.up_proj.weight", "bf16"), ("mtp.layers.0.eh_proj.weight", "bf16"),
    ("mtp.layers.1.mixer.shared_experts.up_proj.weight", "bf16")])
def test_the_table_places_every_kind_of_tensor_as_the_release_does(name, fmt):
    """Name by name: a pattern that is too wide, or the head not first, would put other tensors into codes."""
    assert Recipe().format_of(name)[0] == fmt
    assert Recipe(weights_only=True).format_of(name)[0] == ("w4a16" if fmt == "nvfp4" else fmt)


def test_bits_per_element_by_hand_by_shape_and_on_disk(tmp_path):
    """MICRO on paper: a forgotten scale, or one counted twice, moves the sum."""
    four = 2 * (2 * 48 * 16)                                       # two experts, up and down
    eight = 96 * 32 + 32 * 32 + 2 * 64 * 32                        # in_proj, out_proj, shared up and down
    head_moe = 2 * (2 * 48 * 16) + 2 * 64 * 32 + 2 * 16 * 32
    attention = 2 * 32 * 32 + 2 * 16 * 32
    sixteen = 2 * 64 * 32 + attention + 2 * 16 * 32 + (48 * 4 + 48) + 32 + 3 * 32 + 32      # ... conv, gated norm, norms, norm_f
    sixteen += 2 * 32 * 32 + attention + head_moe + 5 * 32                                  # the head: eh_proj, two layers, five norms
    full = 3 * 16 + 2 * (2 * 32 + 2)                               # A, D, dt bias; two routers and their biases
    expected = 4.5 * four + 4 * 64 + 8 * eight + 4 * 64 + 16 * sixteen + 32 * full + 2 * 32
    elements = four + eight + sixteen + full
    with torch.device("meta"): shapes = infer.count_bits(model04.released_tensors(Nemotron(MICRO)), Recipe())
    assert infer.bits_per_element(shapes) == expected / elements
    model = make_model()
    model04.save_checkpoint(tmp_path / "plain", model)
    done = infer.quantize_checkpoint(tmp_path / "plain", Recipe(), tmp_path / "q", infer.calibrate(model, [make_batch()]))
    assert {k: (s["tensors"], s["elements"], s["bits"]) for k, s in done.items()} == {k: (s["tensors"], s["elements"], s["bits"])
                                                                                      for k, s in shapes.items()}
    assert 8 * sum(t.nbytes for t in read(tmp_path / "q").values()) == expected


def test_ultra_takes_the_reported_5_03_bits():
    """[Ultra, quantization], from shapes alone: the head counted, and what stage 04 keeps in fp32 at 32 bits."""
    with torch.device("meta"): shares = infer.count_bits(model04.released_tensors(Nemotron(model04.PRESETS["ultra"])), Recipe())
    assert round(infer.bits_per_element(shares), 2) == 5.03
    assert shares["nvfp4", "routed experts"]["elements"] == 48 * 512 * 2 * 2048 * 5120 and sum(s["tensors"] for s in shares.values()) == 51_023


# ---- the layout

def scaled(prefix, kind, shape) -> dict:
    """The tensors of one quantized weight, as checkpoints.md spells them."""
    o, i = shape
    if kind == "fp8": return {f"{prefix}.weight": (F8, [o, i]), f"{prefix}.weight_scale": (F32, []), f"{prefix}.input_scale": (F32, [])}
    four = {f"{prefix}.weight": (U8, [o, i // 2]), f"{prefix}.weight_scale": (F8, [o, i // 16]), f"{prefix}.weight_scale_2": (F32, [])}
    return four | ({f"{prefix}.input_scale": (F32, [])} if kind == "nvfp4" else {})


def layout(kind: str) -> dict:
    m, e, a, h0, h1 = *(f"backbone.layers.{i}" for i in range(3)), "mtp.layers.0", "mtp.layers.1"
    out = {"backbone.embeddings.weight": (BF16, [64, 32]), "backbone.norm_f.weight": (BF16, [32]), "lm_head.weight": (BF16, [64, 32]),
           **{f"{layer}.norm.weight": (BF16, [32]) for layer in (m, e, a, h0, h1)},
           f"{m}.mixer.A_log": (F32, [16]), f"{m}.mixer.D": (F32, [16]), f"{m}.mixer.dt_bias": (F32, [16]),
           f"{m}.mixer.conv1d.weight": (BF16, [48, 1, 4]), f"{m}.mixer.conv1d.bias": (BF16, [48]), f"{m}.mixer.norm.weight": (BF16, [32]),
           **scaled(f"{m}.mixer.in_proj", "fp8", (96, 32)), **scaled(f"{m}.mixer.out_proj", "fp8", (32, 32)),
           **scaled(f"{e}.mixer.shared_experts.up_proj", "fp8", (64, 32)), **scaled(f"{e}.mixer.shared_experts.down_proj", "fp8", (32, 64)),
           f"{a}.mixer.k_proj.k_scale": (F32, []), f"{a}.mixer.v_proj.v_scale": (F32, []),
           f"{h0}.enorm.weight": (BF16, [32]), f"{h0}.hnorm.weight": (BF16, [32]), f"{h0}.eh_proj.weight": (BF16, [32, 64]),
           f"{h1}.final_layernorm.weight": (BF16, [32]),
           f"{h1}.mixer.shared_experts.up_proj.weight": (BF16, [64, 32]), f"{h1}.mixer.shared_experts.down_proj.weight": (BF16, [32, 64])}
    for n in (0, 1):
        out |= scaled(f"{e}.mixer.experts.{n}.up_proj", kind, (48, 16)) | scaled(f"{e}.mixer.experts.{n}.down_proj", kind, (16, 48))
        out |= {f"{h1}.mixer.experts.{n}.up_proj.weight": (BF16, [48, 16]), f"{h1}.mixer.experts.{n}.down_proj.weight": (BF16, [16, 48])}
    for layer in (e, h1):
        out |= {f"{layer}.mixer.gate.weight": (F32, [2, 32]), f"{layer}.mixer.gate.e_score_correction_bias": (F32, [2]),
                f"{layer}.mixer.fc1_latent_proj.weight": (BF16, [16, 32]), f"{layer}.mixer.fc2_latent_proj.weight": (BF16, [32, 16])}
    for layer in (a, h0):
        out |= {f"{layer}.mixer.{x}_proj.weight": (BF16, [rows, 32]) for x, rows in (("q", 32), ("k", 16), ("v", 16), ("o", 32))}
    return out


@pytest.mark.parametrize("weights_only", [False, True])
def test_every_name_dtype_and_shape_is_modelopts(tmp_path, weights_only):
    """Spelled out for pattern ME* with the head *E: a reader that looks tensors up by name finds each, and no other."""
    model = make_model()
    model04.save_checkpoint(tmp_path / "plain", model)
    infer.quantize_checkpoint(tmp_path / "plain", Recipe(weights_only=weights_only), tmp_path / "q", infer.calibrate(model, [make_batch()]))
    assert {name: (t.dtype, list(t.shape)) for name, t in read(tmp_path / "q").items()} == layout("w4a16" if weights_only else "nvfp4")


@pytest.mark.parametrize("algorithm, weights_only", [("NVFP4", False), ("W4A16_NVFP4", True)])
def test_the_quantization_configs_are_modelopts(tmp_path, algorithm, weights_only):
    """hf_quant_config.json and config.json written out by hand for pattern ME*; the keys of the original config stay."""
    model = make_model()
    model04.save_checkpoint(tmp_path / "plain", model)
    (tmp_path / "plain" / "tokenizer.json").write_text("{}")
    (tmp_path / "plain" / "trainer.pt").write_text("no part of a released checkpoint")
    infer.quantize_checkpoint(tmp_path / "plain", Recipe(weights_only=weights_only), tmp_path / "q", infer.calibrate(model, [make_batch()]))
    e = "backbone.layers.1.mixer"
    four = [f"{e}.experts.{n}.{leaf}" for n in (0, 1) for leaf in ("down_proj", "up_proj")]
    eight = ["backbone.layers.0.mixer.in_proj", "backbone.layers.0.mixer.out_proj", f"{e}.shared_experts.down_proj", f"{e}.shared_experts.up_proj"]
    layers = {name: {"quant_algo": algorithm, "group_size": 16} for name in four} | {name: {"quant_algo": "FP8"} for name in eight}
    producer = {"name": "modelopt", "version": "0.46.0"}
    assert json.loads((tmp_path / "q" / "hf_quant_config.json").read_text()) == {
        "producer": producer, "quantization": {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "quantized_layers": layers}}
    numbers4, numbers8 = dict(dynamic=False, num_bits=4, type="float", group_size=16), dict(dynamic=False, num_bits=8, type="float")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    mine = config.pop("quantization_config")
    assert config == json.loads((tmp_path / "plain" / "config.json").read_text())
    groups = sorted(mine.pop("config_groups").values(), key=lambda group: group["weights"]["num_bits"])
    assert groups == [dict({} if weights_only else dict(input_activations=numbers4), weights=numbers4, targets=four),
                      dict(input_activations=numbers8, weights=numbers8, targets=eight)]
    assert mine == dict(quantized_layers=layers, ignore=[], quant_algo="MIXED_PRECISION", producer=producer, quant_method="modelopt",
                        kv_cache_scheme={"dynamic": False, "num_bits": 8, "type": "float"})
    assert (tmp_path / "q" / "tokenizer.json").exists() and not (tmp_path / "q" / "trainer.pt").exists()


# ---- the numbers

def test_packed_weights_are_what_torchao_reads(export):
    """Nibble order, sign, scale layout: torchao decodes our bytes to the values that we report the error of."""
    torchao = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    model, plain, folder, *_ = export
    stored, before, names = read(folder), read(plain), 0
    for name in stored:
        if not name.endswith("weight_scale_2"): continue
        module, names = name.removesuffix(".weight_scale_2"), names + 1
        codes, scale = stored[f"{module}.weight"], stored[f"{module}.weight_scale"]
        theirs = torchao.NVFP4Tensor(codes, scale, 16, torch.float32, None).dequantize(torch.float32) * stored[name]
        assert torch.equal(theirs, nvfp4.NVFP4Tensor(codes, scale, stored[name]).dequantize())
        w = before[f"{module}.weight"]
        assert (theirs - w).norm() < 0.1 * w.norm()
        torch.testing.assert_close(stored[name], w.abs().max() / (6 * 256), rtol=1e-6, atol=0)      # Four-Over-Six leaves room for the larger scale
    assert names == 2 * 8 * 2


def test_fp8_codes_are_ml_dtypes(export):
    """One scale a tensor, largest magnitude / 448, and the nearest E4M3 value of every quotient."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    _, plain, folder, *_ = export
    stored, before = read(folder), read(plain)
    found = [name for name, t in stored.items() if t.dtype == F8 and name.endswith(".weight")]
    assert len(found) == 2 * 2 + 2 * 2
    for name in found:
        w, scale = before[name].numpy(), stored[f"{name}_scale"].numpy()
        assert scale == np.abs(w).max() / np.float32(448)
        assert np.array_equal((w / scale).astype(ml_dtypes.float8_e4m3fn).view(np.uint8).ravel(), bits(stored[name]).numpy())


def test_scale_rules_on_gaussian_weights_give_the_published_gains():
    """Four-Over-Six -16.4 %, the sweep -27.0 % of max's squared error on Gaussians; FP8 per tensor 31.55 dB  [algorithms: A7, A8]."""
    w, lost = normal(256, 1024), {}
    for rule in ("max", "four_over_six", "mse"):
        parts, values = moe.quantize_weight("x_proj.weight", w, "nvfp4", rule)
        lost[rule] = nvfp4.relative_error(w, values)
        torch.testing.assert_close(parts["weight_scale_2"], w.abs().max() / (6 * (256 if rule == "four_over_six" else 448)), rtol=1e-6, atol=0)
    # three standard errors of a mean over 16,384 blocks are below half a percent
    assert abs(lost["four_over_six"] / lost["max"] - 1 + 0.164) < 0.005 and abs(lost["mse"] / lost["max"] - 1 + 0.270) < 0.005
    _, values = moe.quantize_weight("x_proj.weight", normal(1024, 1024), "fp8")
    assert abs(nvfp4.decibels(nvfp4.relative_error(normal(1024, 1024), values)) - 31.55) < 0.05


def test_a_zero_weight_stays_zero():
    for fmt in ("nvfp4", "fp8"):
        parts, values = moe.quantize_weight("x_proj.weight", torch.zeros(16, 32), fmt)
        assert not values.any() and all(torch.isfinite(p.float()).all() for p in parts.values())


def test_input_scales_are_the_largest_inputs_by_hand(tmp_path):
    """Layer by layer on paper, experts one at a time: an expert's own scale, the input of the wrong product or /6 in place of /(6·448) shows here."""
    model, batch = make_model(dataclasses.replace(MICRO, experts=4, experts_per_token=2)), make_batch()
    model04.save_checkpoint(tmp_path / "plain", model)
    infer.quantize_checkpoint(tmp_path / "plain", Recipe(), tmp_path / "q", infer.calibrate(model, [b for b in batch.split(2)]))
    q, (m, e, a) = read(tmp_path / "q"), model.backbone.layers
    scale = lambda name: q[f"backbone.layers.{name}"].item()
    largest = lambda x: x.abs().max().item()
    with torch.no_grad():
        x = model.backbone.embeddings(batch.ids_bt)
        assert scale("0.mixer.in_proj.input_scale") == pytest.approx(largest(m.norm(x)) / 448, rel=1e-5)
        x = m(x)[0]
        u = e.norm(x).flatten(0, 1)
        z, moe_layer = u @ e.mixer.fc1_latent_proj.weight.T, e.mixer
        _, chosen, _ = moe_layer.gate(u)
        hidden = max(largest((z[(chosen == n).any(1)] @ moe_layer.experts.up_proj[n].T).relu() ** 2) for n in range(4))
        for n in range(4):
            assert scale(f"1.mixer.experts.{n}.up_proj.input_scale") == pytest.approx(largest(z) / 2688, rel=1e-5)
            assert scale(f"1.mixer.experts.{n}.down_proj.input_scale") == pytest.approx(hidden / 2688, rel=1e-5)
        assert scale("1.mixer.shared_experts.up_proj.input_scale") == pytest.approx(largest(u) / 448, rel=1e-5)
        inside = (u @ moe_layer.shared_experts.up_proj.weight.T).relu() ** 2
        assert scale("1.mixer.shared_experts.down_proj.input_scale") == pytest.approx(largest(inside) / 448, rel=1e-5)
        u = a.norm(e(x)[0])
        assert scale("2.mixer.k_proj.k_scale") == pytest.approx(largest(a.mixer.k_proj(u)) / 448, rel=1e-5)
        assert scale("2.mixer.v_proj.v_scale") == pytest.approx(largest(a.mixer.v_proj(u)) / 448, rel=1e-5)


def test_padding_does_not_count_in_calibration():
    model, batch = make_model(), make_batch()
    longer = [torch.cat([x, x.flip(1)], 1) for x in batch]
    as_text, padded = Batch(*longer), Batch(longer[0], longer[1], torch.cat([batch.doc_bt, torch.full_like(batch.doc_bt, -1)], 1), longer[3])
    alone, with_padding, all_text = (infer.calibrate(model, [b]) for b in (batch, padded, as_text))
    assert with_padding == pytest.approx(alone, rel=1e-5) and with_padding != pytest.approx(all_text, rel=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- loading and computing

def test_an_export_reloads_bit_for_bit(export):
    """Every tensor of the files lies in the model, unchanged; those in 16 bits too. Two exports have equal files."""
    _, plain, folder, amax, _ = export
    model = infer.load_quantized(folder)
    codes = infer.load_quantized(folder, packed=True)
    into, stored = infer.targets(codes), read(folder)
    for loaded, kept in ((codes, True), (model, False)):
        assert {m.decoded is None for m in loaded.modules() if isinstance(m, moe.Packed)} == {kept}
    assert into.keys() == stored.keys()
    for name, tensor in stored.items(): assert into[name].dtype == tensor.dtype and torch.equal(bits(into[name]), bits(tensor)), name
    assert model.lm_head.weight.dtype == BF16 and model.backbone.layers[0].mixer.A_log.dtype == F32
    assert model.backbone.layers[3].mixer.k_proj.k_scale == stored["backbone.layers.3.mixer.k_proj.k_scale"]
    again = folder.parent / "again"
    infer.quantize_checkpoint(plain, Recipe(), again, amax, shard_bytes=20_000)
    sizes = [sum(t.nbytes for t in safetensors.torch.load_file(f).values()) for f in again.glob("*.safetensors")]
    assert max(sizes) <= 20_000 and 3 < len(sizes) <= 2 * sum(sizes) / 20_000 + 1      # two neighbours hold more than one may
    assert len({f.name[-14:] for f in again.glob("*.safetensors")}) == 1 and not list(again.glob("*.part"))
    assert all(torch.equal(bits(t), bits(stored[name])) for name, t in read(again).items())
    index = json.loads((again / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored.keys() and index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())


GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nvfp4_by_search(x, scale) -> np.ndarray:
    """x rounded to NVFP4 with a given second level, block by block, by trying every value of the grid: no code of stage 01."""
    import ml_dtypes
    out = np.zeros(x.shape)
    for r, q in itertools.product(range(x.shape[0]), range(x.shape[1] // 16)):
        block = x[r, 16 * q:16 * q + 16].astype(np.float64)
        step = float(np.float32(min(np.abs(block).max() / 6 / scale, 448)).astype(ml_dtypes.float8_e4m3fn)) * scale
        if step: out[r, 16 * q:16 * q + 16] = np.sign(block) * GRID[np.abs(np.abs(block)[:, None] / step - GRID).argmin(1)] * step
    return out


def decoded(stored, module) -> np.ndarray:
    """A weight's values from the file by the formula of the format, in float64."""
    w = stored[f"{module}.weight"]
    if w.dtype == F8: return w.double().numpy() * stored[f"{module}.weight_scale"].item()
    codes = torch.stack((w & 15, w >> 4), -1).flatten(1).numpy()
    values = np.where(codes & 8, -1, 1) * GRID[codes & 7]
    return values * np.repeat(stored[f"{module}.weight_scale"].double().numpy(), 16, 1) * stored[f"{module}.weight_scale_2"].item()


@pytest.mark.parametrize("packed", [False, True])
def test_layers_compute_what_the_format_says(export, packed):
    """An FP8 layer and the experts, in float64 from the file's numbers; a decoded weight and a packed one give the same. One expert of another
    writer has an input scale of its own."""
    import ml_dtypes
    folder = export[2].parent / f"own_scale_{packed}"
    infer.quantize_checkpoint(export[1], Recipe(), folder, export[3])
    stored, x = read(folder), normal(24, 64, seed=2)
    stored["backbone.layers.1.mixer.experts.3.up_proj.input_scale"] *= 0.2      # it cuts: a power of two would change nothing
    write(folder, stored)
    model = infer.load_quantized(folder, dtype=F32, packed=packed)

    s = stored["backbone.layers.0.mixer.in_proj.input_scale"].item()
    rounded = np.clip(x.numpy() / np.float32(s), -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * s
    expected = rounded @ decoded(stored, "backbone.layers.0.mixer.in_proj").T
    assert np.abs(model.backbone.layers[0].mixer.in_proj(x).numpy() - expected).max() < 1e-5 * np.abs(expected).max()

    z, experts = normal(24, 32, seed=3), torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i))[:3] for i in range(24)])
    weights, expected = normal(24, 3, seed=4).abs(), np.zeros((24, 32))
    for n in range(8):
        rows, slot = (experts == n).nonzero(as_tuple=True)
        up, down = (f"backbone.layers.1.mixer.experts.{n}.{leaf}_proj" for leaf in ("up", "down"))
        h = nvfp4_by_search(z[rows].numpy(), stored[f"{up}.input_scale"].item()) @ decoded(stored, up).T
        h = np.maximum(h, 0) ** 2
        y = nvfp4_by_search(h, stored[f"{down}.input_scale"].item()) @ decoded(stored, down).T
        expected[rows.numpy()] += weights[rows, slot, None].numpy() * y
    found = model.backbone.layers[1].mixer.experts(z, weights, experts).numpy()
    # fp32 against float64: a value halfway between two of the grid may round the other way; a wrong scale or order moves all
    apart = np.abs(found - expected) > 1e-5 * np.abs(expected).max()
    assert apart.mean() < 0.05, apart.mean()


def test_weights_only_leaves_inputs_alone(export):
    """On Hopper the same checkpoint serves W4A16: plain products with the decoded weights, for a decode step of 2 rows and for 24."""
    stored, x = read(export[2]), normal(24, 32)
    up, down = (torch.from_numpy(np.stack([decoded(stored, f"backbone.layers.1.mixer.experts.{n}.{leaf}_proj") for n in range(8)]))
                for leaf in ("up", "down"))
    chosen, weights = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i))[:3] for i in range(24)]), normal(24, 3, seed=1).abs()
    expected = sum(weights[:, k, None] * torch.einsum("rf,rlf->rl", torch.einsum("rl,rfl->rf", x.double(), up[chosen[:, k]]).relu() ** 2,
                                                      down[chosen[:, k]]) for k in range(3))
    for packed, rows in itertools.product((False, True), (2, 24)):
        for dtype, bound in ((F32, 1e-5), (BF16, 2e-2)):
            experts = infer.load_quantized(export[2], dtype=dtype, weights_only=True, packed=packed).backbone.layers[1].mixer.experts
            with torch.no_grad(): y = experts(x[:rows].to(dtype), weights[:rows], chosen[:rows])
            assert y.dtype == dtype and (y.double() - expected[:rows]).norm() < bound * expected[:rows].norm()


def test_the_kernels_take_the_packed_experts(export):
    """W4A16 by the Triton twin of stage 01 equals the decoded stack: what impl "auto" runs on a GPU."""
    experts = infer.load_quantized(export[2], dtype=F32, packed=True).backbone.layers[1].mixer.experts
    x, ends = normal(20, 32), torch.tensor([0, 3, 3, 4, 9, 9, 12, 20], dtype=torch.int32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    w, x, ends = experts.up_proj.to(device).stored(), x.to(device), ends.to(device)
    torch.testing.assert_close(nvfp4.matmul_w4a16(x, w, ends, impl="triton"), nvfp4.matmul_w4a16(x, w, ends, impl="torch"), rtol=1e-4, atol=1e-4)


def test_a_quantized_model_says_nearly_what_the_model_said(tmp_path):
    """After 60 steps on one text the losses are close, and the weight error falls from max over Four-Over-Six to the sweep."""
    torch.manual_seed(0)
    model, batch = Nemotron(DEEP), make_batch(b=4, t=48)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    loss = lambda m: model04.loss(m, *batch, mtp_weight=0.0, aux_weight=0.0).main
    first = loss(model).item()
    for _ in range(60): optimizer.zero_grad(); loss(model).backward(); optimizer.step()
    model.eval()
    model04.save_checkpoint(tmp_path / "plain", model)
    amax, before, errors = infer.calibrate(model, [batch]), loss(model).item(), {}
    assert before < 0.7 * first
    for rule in ("max", "four_over_six", "mse"):
        shares = infer.quantize_checkpoint(tmp_path / "plain", Recipe(scale_rule=rule), tmp_path / "q", amax)
        errors[rule] = shares["nvfp4", "routed experts"]["error"]
        for weights_only in (True, False):
            after = loss(infer.load_quantized(tmp_path / "q", dtype=F32, weights_only=weights_only).eval()).item()
            assert before != after and abs(after - before) < 0.05 * first, (rule, weights_only, before, after)
    assert errors["max"] > errors["four_over_six"] > errors["mse"] > 0


def test_a_quantized_model_generates(export):
    """Caches and decode steps: greedy tokens of generate are those of a pass over the whole text."""
    model, prompt = infer.load_quantized(export[2], dtype=F32), [5, 9, 33, 7]
    out = model04.generate(model, [prompt], model04.SamplingParams(max_tokens=6, temperature=0, stop_ids=()))[0].ids
    for i, token in enumerate(out): assert model(torch.tensor([prompt + out[:i]]))[0, -1].argmax() == token


def test_layers_in_16_bits_round_their_output_only(export):
    """E4M3 codes are exact in bf16 and the sum is in fp32: what differs from fp32 is the rounding of the result (packed FP8: and of the sum)."""
    exact = infer.load_quantized(export[2], dtype=F32)
    for packed in (False, True):
        half = infer.load_quantized(export[2], packed=packed)
        for name, width in (("backbone.layers.0.mixer.in_proj", 64), ("backbone.layers.1.mixer.shared_experts.down_proj", 64)):
            x = normal(3, 5, width).to(BF16)
            y, expected = half.get_submodule(name)(x), exact.get_submodule(name)(x.float())
            assert y.dtype == BF16 and y.shape == expected.shape
            assert ((y.float() - expected).abs() <= 2**-8 * (2.01 if packed else 1.01) * expected.abs() + 1e-6).all()
        x, ends = normal(8, 32).to(BF16), torch.arange(1, 9, dtype=torch.int32)
        name = "backbone.layers.1.mixer.experts.up_proj"
        y, expected = half.get_submodule(name)(x, ends), exact.get_submodule(name)(x.float(), ends)
        assert y.dtype == BF16 and ((y.float() - expected).abs() <= 2**-8 * 1.01 * expected.abs() + 1e-6).all()


# ---- what goes wrong is one sentence

def test_errors_of_quantizing(export, tmp_path):
    _, plain, folder, amax, _ = export
    with pytest.raises(ValueError, match="nowhere has no config.json: give a local checkpoint"):
        infer.quantize_checkpoint(tmp_path / "nowhere", Recipe(), tmp_path / "q", amax)
    with pytest.raises(ValueError, match="is quantized already"): infer.quantize_checkpoint(folder, Recipe(), tmp_path / "q", amax)
    with pytest.raises(ValueError, match="scale_rule='best' is unknown: use one of max, four_over_six, mse"): Recipe(scale_rule="best")
    with pytest.raises(ValueError, match="unknown format 'int4'"): Recipe(precision=(("*", "int4", "all"),))
    with pytest.raises(ValueError, match="holds something else than a quantized checkpoint"): infer.quantize_checkpoint(plain, Recipe(), plain, amax)
    with pytest.raises(ValueError, match="quantizes nothing"):
        infer.quantize_checkpoint(plain, Recipe(precision=(("*", "bf16", "all"),)), tmp_path / "q", amax)
    with pytest.raises(ValueError, match="lm_head.weight cannot be stored as FP8"):
        infer.quantize_checkpoint(plain, Recipe(precision=(("lm_head.*", "fp8", "output"),)), tmp_path / "q", amax)
    with pytest.raises(ValueError, match=r"largest activation seen at backbone.layers.0.mixer.in_proj is 0.0.*calibrate"):
        infer.quantize_checkpoint(plain, Recipe(), tmp_path / "q", {})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="gives no scale"):
            infer.quantize_checkpoint(plain, Recipe(), tmp_path / "q", dict(amax, **{"backbone.layers.0.mixer.in_proj": bad}))
    assert not (tmp_path / "q").exists() and not (tmp_path / "q.part").exists()      # all or nothing


def test_a_damaged_file_and_a_nan_are_named(export, tmp_path):
    tensors = read(export[1])
    folder = tmp_path / "nan"
    folder.mkdir()
    (folder / "config.json").write_text((export[1] / "config.json").read_text())
    for name in ("backbone.layers.0.mixer.in_proj.weight", "backbone.layers.1.mixer.experts.2.up_proj.weight"):
        broken = tensors[name].clone()
        broken[3, 4] = float("nan")
        write(folder, dict(tensors, **{name: broken}))
        with pytest.raises(ValueError, match=f"{name} holds NaN or Inf"): infer.quantize_checkpoint(folder, Recipe(), tmp_path / "q", export[3])
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.safetensors is cut short or damaged"):
        infer.quantize_checkpoint(folder, Recipe(), tmp_path / "q", export[3])


def test_a_width_that_blocks_do_not_divide_is_named(tmp_path):
    """A table of one's own may put attention into 4 bits; 3 heads of 8 make 24 columns."""
    model = make_model(dataclasses.replace(MICRO, heads=3, kv_heads=1))
    model04.save_checkpoint(tmp_path / "plain", model)
    table = (("*.[qkvo]_proj.weight", "nvfp4", "attention"), *infer.PRECISION)
    with pytest.raises(ValueError, match=r"2.mixer.o_proj.weight has shape \(32, 24\), and blocks hold 16"):
        infer.quantize_checkpoint(tmp_path / "plain", Recipe(precision=table), tmp_path / "q", infer.calibrate(model, [make_batch()]))


def test_a_table_of_ones_own_loads_too(tmp_path):
    """Attention in 4 bits, experts in FP8, keys' scales beside codes: what a search over formats writes."""
    model, batch = make_model(DEEP), make_batch()
    model04.save_checkpoint(tmp_path / "plain", model)
    table = (("mtp.*", "bf16", "head"), ("*.[qkvo]_proj.weight", "nvfp4", "attention"), ("*.experts.*", "fp8", "experts"),
             ("*.fc1_latent_proj.*", "w4a16", "down"))
    infer.quantize_checkpoint(tmp_path / "plain", Recipe(precision=table), tmp_path / "q", infer.calibrate(model, [batch]))
    loaded = infer.load_quantized(tmp_path / "q", dtype=F32)
    kinds = {name: m.fmt for name, m in loaded.named_modules() if isinstance(m, moe.Packed)}
    assert kinds["backbone.layers.3.mixer.k_proj"] == "nvfp4" and kinds["backbone.layers.1.mixer.experts.up_proj"] == "fp8"
    assert kinds["backbone.layers.1.mixer.fc1_latent_proj"] == "w4a16" and len(kinds) == 4 + 2 * 3
    assert loaded.backbone.layers[3].mixer.k_proj.k_scale > 0
    with torch.no_grad(): exact, found = model(batch.ids_bt), loaded(batch.ids_bt)
    assert 0.005 < ((found - exact).norm() / exact.norm()).item() < 0.35
    assert torch.equal(found, infer.load_quantized(tmp_path / "q", dtype=F32)(batch.ids_bt))


def test_errors_of_loading(export, tmp_path):
    _, plain, folder, *_ = export
    with pytest.raises(ValueError, match="is not quantized: open it with load_checkpoint"): infer.load_quantized(plain)
    with pytest.raises(ValueError, match="is quantized: open it with load_quantized"): model04.load_checkpoint(folder)
    with pytest.raises(ValueError, match="no config.json"): infer.load_quantized(tmp_path)
    stored, name = read(folder), "backbone.layers.1.mixer.experts.2.up_proj"
    for file in ("config.json", "hf_quant_config.json"): (tmp_path / file).write_text((folder / file).read_text())
    for change, words in [({f"{name}.weight": None}, rf"{name}.weight: expected \[48, 16\] uint8, found nothing"),
                          ({f"{name}.weight": torch.zeros(48, 8, dtype=U8)}, r"\(1 tensors\).*found \[48, 8\] uint8"),
                          ({f"{name}.weight_scale": torch.zeros(48, 2)}, r"expected \[48, 2\] float8_e4m3fn, found \[48, 2\]$"),
                          ({"backbone.extra": torch.zeros(3)}, r"backbone.extra: expected nothing, found \[3\]"),
                          ({f"{name.replace('.2.', '.0.')}.weight_scale_2": None}, "has only one of its two projections quantized")]:
        write(tmp_path, {k: v for k, v in {**stored, **change}.items() if v is not None})
        with pytest.raises(ValueError, match=words): infer.load_quantized(tmp_path)


# ---- the command

def test_the_command_quantizes_a_run_and_prints_both_tables(tmp_path, capsys):
    """The newest checkpoint of a run's folder; figures of the row are those of the tables; a second time it replaces its own output."""
    texts = list(itertools.islice(corpus.worked_tasks(0), 400))
    tokenizer, model = Tokenizer.train(texts, 1024), make_model(dataclasses.replace(MICRO, vocab=1024))
    run = tmp_path / "run" / "step-000003"
    model04.save_checkpoint(run, model, tokenizer)
    (run / "files.json").write_text(json.dumps({f.name: f.stat().st_size for f in run.iterdir()}))
    config = infer.QuantizeConfig(base=tmp_path / "run", out=tmp_path / "out" / "q", tokens=600)
    for _ in range(2): infer.main(config)
    shown = capsys.readouterr().out
    row = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[-1])
    assert row["bits_per_element"] == pytest.approx(8 * sum(t.nbytes for t in read(tmp_path / "out" / "q").values())
                                                    / sum(t.numel() for t in read(run).values()))
    assert row["error_db"].keys() == {"routed experts", "shared experts", "Mamba projections"} and f"{row['bits_per_element']:.3f} bits" in shown
    assert all(f"{x:.4f}" in shown for x in row["losses"].values()) and len(row["losses"]) == 3
    assert Tokenizer.load(tmp_path / "out" / "q").encode("12 + 30") == tokenizer.encode("12 + 30")
    with pytest.raises(ValueError, match="is quantized already"): infer.main(dataclasses.replace(config, base=config.out))
    with pytest.raises(ValueError, match="--tokens 0"): infer.main(dataclasses.replace(config, tokens=0))


def test_quantize_is_a_subcommand():
    """`python 08_infer.py quantize --preset tiny` prints the bill; a wrong folder is one sentence and exit code 1."""
    call = lambda *args: subprocess.run([sys.executable, ROOT / "08_infer.py", *args], capture_output=True, text=True, cwd=ROOT)
    shown = call("quantize", "--preset", "tiny")
    assert shown.returncode == 0 and "routed experts" in shown.stdout and "10.85" in shown.stdout
    wrong = call("quantize", "--base", "nowhere")
    assert wrong.returncode == 1 and wrong.stderr.strip() == "08_infer: nowhere has no config.json: give a local checkpoint directory."
