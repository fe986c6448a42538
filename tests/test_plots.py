"""Scripts that draw: they read what a run leaves, and refuse what it did not."""
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def rows(steps=60, branch=0.0):
    made = []
    for i in range(1, steps + 1):
        made.append(dict(step=i, loss=5 / i**0.2 + branch, mtp_1=6.0, mtp_2=7.0, lr=1e-3, grad_norm=1.0 + i % 3, max_vio=2.0, max_vio_median=1.2,
                         dead_experts=int(i == 50), tokens_per_s=1000.0))
        if i % 20 == 0: made[-1] |= dict(residual_rms=[0.5, 1.0, 2.0 + i], update_ratio=1e-3)
    return made


def test_a_run_and_its_branches_are_drawn_from_the_files_it_left(tmp_path):
    plot = script("plot_run")
    home = tmp_path / "pretrain"
    config = dict(lr=1e-3, steps=60, decay=0.25, blend_switch=0.75, branches=["fp32", "nvfp4"])
    for folder, made in ((home, rows()), (home / "branch-fp32", rows(8)), (home / "branch-nvfp4", rows(8, 0.05))):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    step = home / "step-000060"
    step.mkdir()
    (step / "pretrain.json").write_text(json.dumps(dict(config=config)))
    (step / "files.json").write_text(json.dumps({"pretrain.json": (step / "pretrain.json").stat().st_size}))
    plot.main(plot.Config(home=home))
    assert all((tmp_path / name).stat().st_size > 20_000 for name in ("05_loss.png", "05_health.png"))
    assert list(plot.read_branches(home, ("nvfp4", "bf16", "fp32"))) == ["nvfp4", "fp32"]
    (home / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no rows: train first"): plot.main(plot.Config(home=home))


def test_the_share_of_the_peak_is_drawn_where_it_is_known(tmp_path, monkeypatch):
    """Half of the rows have it, as after a change of machine: its curve has their steps, in percent, and the title their median."""
    plot, seen = script("plot_run"), []
    nvfp4 = plot.stage("01_nvfp4")
    monkeypatch.setattr(nvfp4, "save_figure", lambda fig, path: seen.append(fig))
    made = [row | (dict(peak_share=0.002 * row["step"]) if row["step"] > 30 else {}) for row in rows(60)]
    for given in (rows(60), made): plot.plot_health(given, tmp_path / "health.png")
    without, with_share = ([ax for ax in fig.axes if "bf16 peak" in ax.get_ylabel()] for fig in seen)
    assert not without and not any("peak" in ax.get_title() for ax in seen[0].axes)
    x, y = with_share[0].lines[0].get_data()
    assert list(x) == list(range(31, 61)) and y.tolist() == pytest.approx([0.2 * i for i in range(31, 61)])
    assert any("9.1 % of the bf16 peak" in ax.get_title() for ax in seen[1].axes)      # 0.002 · 45.5


def test_the_smooth_line_is_the_mean_of_recent_steps():
    assert script("plot_run").smooth([4.0, 2.0, 6.0, 0.0], 2).tolist() == pytest.approx([4, 3, 4, 3])
    assert np.allclose(script("plot_run").smooth([1.0, 2.0], 5), [1, 1.5])


def test_the_model_is_drawn_for_every_preset(tmp_path):
    plot = script("plot_model")
    plot.main(plot.Config(out=tmp_path))
    assert all((tmp_path / name).stat().st_size > 20_000 for name in ("04_layers.png", "04_ledger.png"))
