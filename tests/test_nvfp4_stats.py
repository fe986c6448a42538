"""experiments/nvfp4_stats.py: counts that are right by hand, of the tensors that are really quantized."""
import importlib.util
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("nvfp4_stats", ROOT / "experiments" / "nvfp4_stats.py")
stats = importlib.util.module_from_spec(spec)
sys.modules["nvfp4_stats"] = stats
spec.loader.exec_module(stats)
nvfp4, nemotron = stats.nvfp4, stats.nemotron


def test_shares_of_a_row_counted_by_hand():
    """Block scales are exact here: amax 6 · 448, and blocks of 2688 (scale 448), 6 and 7.05, whose scale 1.175 is rounded down to 1.125."""
    x = torch.zeros(1, 48)
    x[0, 0] = 2688
    x[0, 16:24] = torch.tensor([6.0, -3, 0.2, -0.2, 0.3, 0, -0.0, 1])      # steps of 0.5: both 0.2 go to zero, 0.3 does not
    x[0, 32:35] = torch.tensor([7.05, 6.9, 6.7])                           # the block holds up to 6.75
    q = nvfp4.quantize(x)
    assert q.block_scale.float().tolist() == [[448, 1, 1.125]] and float(q.global_scale) == 1
    assert stats.shares(x, q) == dict(values=48, zero=15 + 10 + 13, flushed=2, clipped=2)


def test_a_step_counts_every_quantized_layer_and_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model, watch = nemotron.Nemotron(nemotron.PRESETS["tiny"], nvfp4.NVFP4Recipe()), stats.Watch()
    model.set_draws(model.draw_seeds(0, 0))
    ids = torch.randint(12, 4096, (1, 33))
    step = lambda: nemotron.loss(model, ids[:, :-1], ids[:, 1:]).total
    before, quantizers = step().item(), (nvfp4.quantize, nvfp4.quantize_rows, nvfp4.quantize_pair)
    with stats.watching(model, watch): total = step(); total.backward()
    assert total.item() == before and (nvfp4.quantize, nvfp4.quantize_rows, nvfp4.quantize_pair) == quantizers
    assert not any(m._forward_pre_hooks or m._backward_pre_hooks for m in model.modules())
    layers = {name for name, m in model.named_modules() if isinstance(m, nvfp4.NVFP4Linear) or getattr(m, "recipe", None) and "experts" in name}
    assert {layer for layer, _ in watch.sums} == layers and len(layers) > 8
    for layer in layers: assert {operand for at, operand in watch.sums if at == layer} == set(stats.OPERANDS), layer
    inner = model.backbone.layers[0].mixer.in_proj
    assert watch.sums["backbone.layers.0.mixer.in_proj", "weight"]["values"] == inner.weight.numel()
    assert watch.sums["backbone.layers.0.mixer.in_proj", "gradient, rows"]["values"] == 32 * inner.out_features


def test_all_linears_means_all_and_ends_with_the_block():
    before = list(nemotron.PLACEMENT)
    with stats.every_linear_in_four_bits(True):
        model = nemotron.Nemotron(nemotron.PRESETS["tiny"], nvfp4.NVFP4Recipe())
        assert type(model.backbone.layers[0].mixer.out_proj) is nvfp4.NVFP4Linear
        assert [type(m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)] == [torch.nn.Linear]      # the output layer
    assert nemotron.PLACEMENT == before
