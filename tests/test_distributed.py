"""Stage 05 on several processes (gloo on a CPU): the same losses, gradients and weights as one process, and checkpoints for any number of them."""
import importlib
import json
import os
import signal
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

model04, stage = (importlib.import_module(m) for m in ("04_model", "05_pretrain"))
MICRO = model04.ModelConfig(pattern="MEM*E", d_model=32, vocab=320, heads=2, kv_heads=1, head_dim=16, mamba_heads=16, mamba_head_dim=2, groups=1,
                            state=8, chunk=16, experts=4, experts_per_token=2, latent=16, expert_width=16, shared_width=16)
ROWS, SEQ, STEPS = 4, 24, 20
# every micro-batch is one row, so that the mean of the pieces' means is the same however rows are dealt
CONFIG = stage.PretrainConfig(steps=STEPS, batch=ROWS, seq=SEQ, micro_batches=ROWS, lr=1e-2, save_every=1000, health_every=7, aux_weight=1e-2,
                              branches=())
# processes -> name -> (steps, settings). Where 20 steps take long, fewer: the first ones would differ already
LAYOUTS = {2: {"data": (STEPS, dict()), "experts": (STEPS, dict(ep=2)), "context": (STEPS, dict(cp=2)),
               "experts and context": (STEPS, dict(ep=2, cp=2))},
           4: {"data": (STEPS, dict()), "all three": (STEPS, dict(ep=2, cp=2)), "experts on 4": (5, dict(ep=4)), "context on 4": (5, dict(cp=4)),
               "recomputed": (5, dict(ep=2, recompute=True))}}


class Rows:
    """step -> Batch of random tokens in documents of different lengths; of several ranks each gets its rows."""
    def __init__(self, rank=0, ranks=1):
        self.rank, self.ranks = rank, ranks

    def __call__(self, step):
        draw = torch.Generator().manual_seed(step)
        ids_bt = torch.randint(40, 320, (ROWS, SEQ + 1), generator=draw)
        ids_bt[:, 1::2] = ids_bt[:, :-1:2] // 2 + 20      # something to learn
        doc_bt = (torch.rand(ROWS, SEQ + 1, generator=draw) < 0.12).cumsum(1)
        return stage.Batch.from_windows(ids_bt.numpy()[self.rank::self.ranks], doc_bt.numpy()[self.rank::self.ranks])


def trainer(home: Path, config, ranks=None, objective=None):
    torch.manual_seed(0)
    return stage.Trainer(config, model04.Nemotron(MICRO), Rows(**(ranks.rows if ranks else {})), home, ranks=ranks, objective=objective)


def whole(x):
    return x.full_tensor() if isinstance(x, torch.distributed.tensor.DTensor) else x


def weights(run) -> dict:
    """Every parameter as a whole, on all ranks."""
    return {name.removeprefix("weight."): whole(x).clone() for name, x in run.parts().items() if name.startswith(("weight.", "buffer."))}


def layout(changes: dict):
    processes = int(os.environ["WORLD_SIZE"]) // changes.get("cp", 1)
    config = replace(CONFIG, **changes, micro_batches=ROWS // processes)
    return config, stage.join(config)


def train_all(rank: int, world: int, folder: Path) -> None:
    results = {}
    for name, (steps, changes) in LAYOUTS[world].items():
        config, ranks = layout(changes)
        run = trainer(folder / f"{name}-{world}", config, ranks)
        first = run.train_step()
        gradients_from = {n: whole(x).clone() for n, x in run.parts().items() if n.startswith("exp_avg.")}      # a tenth of the first gradient
        rows = [first, *(run.train_step() for _ in range(steps - 1))]
        results[name] = dict(rows=rows, weights=weights(run), gradients=gradients_from,
                             local=sum(stage.local(p).numel() for p in run.model.parameters()))
    if rank == 0: torch.save(results, folder / f"{world}.pt")


def save_and_die(rank: int, world: int, folder: Path) -> None:
    """A checkpoint at step 6; one process is gone in step 9."""
    config, ranks = layout(dict(ep=2, save_every=3, keep=1))
    run = trainer(folder / "run", config, ranks)
    for _ in range(8):
        run.train_step()
        if run.step == 6: run.save()
    if rank == world - 1: os.kill(os.getpid(), signal.SIGKILL)
    run.train_step()


def go_on(rank: int, world: int, folder: Path) -> None:
    config, ranks = layout(dict(ep=world, cp=1))
    run = stage.Trainer.load(stage.newest_checkpoint(folder / "run"), config, Rows(**ranks.rows), folder / "again", ranks=ranks)
    rows = [run.train_step() for _ in range(4)]
    found = weights(run)
    if rank == 0: torch.save(dict(rows=rows, weights=found), folder / f"again-{world}.pt")


def worker(rank: int, world: int, folder: str, task: str) -> None:
    torch.set_num_threads(1)
    os.environ |= dict(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{task}-{world}", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try: globals()[task](rank, world, Path(folder))
    finally: dist.destroy_process_group()


def spawn(task: str, world: int, folder: Path) -> None:
    method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
    if method == "forkserver": mp.set_forkserver_preload(["torch", "torch._dynamo"])
    mp.start_processes(worker, (world, str(folder), task), nprocs=world, start_method=method)


def first_gradients(run) -> dict:
    run.train_step()
    return {n: x.clone() for n, x in run.parts().items() if n.startswith("exp_avg.")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, the same rows."""
    home = tmp_path_factory.mktemp("alone")
    gradients = first_gradients(trainer(home, CONFIG))
    run, rows, points = trainer(home, CONFIG), [], {}
    for _ in range(STEPS):
        rows.append(run.train_step())
        points[run.step] = weights(run)
    return dict(rows=rows, gradients=gradients, points=points)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for world in LAYOUTS: spawn("train_all", world, folder)
    return {world: torch.load(folder / f"{world}.pt", weights_only=True) for world in LAYOUTS}


CASES = [(world, name) for world, names in LAYOUTS.items() for name in names]


@pytest.mark.parametrize("world, name", CASES, ids=[f"{name}, {world} ranks" for world, name in CASES])
def test_losses_and_gradients_are_those_of_one_process(world, name, found, alone):
    """fp32. A gradient summed where a mean belongs, a token counted twice at a cut, or a bias moved by one rank's loads alone shows here."""
    many = found[world][name]["rows"]
    steps, one = len(many), alone["rows"][:len(many)]
    for key in ("loss", "total", "mtp_1", "mtp_2", "aux", "grad_norm"):
        assert [row[key] for row in many] == pytest.approx([row[key] for row in one], rel=1e-5 if key != "grad_norm" else 1e-4), key
    assert [row["max_vio"] for row in many] == [row["max_vio"] for row in one] and alone["rows"][-1]["loss"] < one[0]["loss"] - 0.2
    for key, x in alone["gradients"].items():
        assert (found[world][name]["gradients"][key] - x).abs().max() <= 1e-4 * x.abs().max() + 1e-12, key
    for key, x in alone["points"][steps].items():
        assert (found[world][name]["weights"][key] - x).norm() <= 1e-3 * x.norm() + 1e-6, key


@pytest.mark.parametrize("world", LAYOUTS)
def test_every_process_holds_its_share_only(world, found):
    """Weights, gradients and moments are cut evenly: what FSDP is for. Vectors shorter than the ranks leave some with nothing."""
    total = sum(p.numel() for p in model04.Nemotron(MICRO).parameters())
    for name, run in found[world].items(): assert run["local"] < total / world * 1.1, name


def test_a_killed_run_goes_on_with_fewer_processes(tmp_path, alone):
    """Four ranks, one is killed; two, then one, find the checkpoint and end with the losses of an undisturbed run."""
    with pytest.raises(Exception, match="SIGKILL|terminated"): spawn("save_and_die", 4, tmp_path)
    assert [p.name for p in stage.checkpoints(tmp_path / "run")] == ["step-000006"] and stage.damage(tmp_path / "run" / "step-000006") is None
    want = alone["rows"][6:10]
    for world in (2, 1):
        spawn("go_on", world, tmp_path)
        got = torch.load(tmp_path / f"again-{world}.pt", weights_only=True)
        assert [row["step"] for row in got["rows"]] == [7, 8, 9, 10]
        assert [row["loss"] for row in got["rows"]] == pytest.approx([row["loss"] for row in want], rel=1e-5)
    plain = stage.Trainer.load(tmp_path / "run" / "step-000006", CONFIG, Rows(), tmp_path / "plain")      # without torchrun at all
    assert [plain.train_step()["loss"] for _ in range(4)] == pytest.approx([row["loss"] for row in want], rel=1e-5)
    saved = plain.save()
    assert json.loads((saved / "config.json").read_text())["hidden_size"] == 32 and model04.load_checkpoint(saved).config == MICRO


def test_sizes_that_do_not_fit_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="start them with torchrun"): stage.join(replace(CONFIG, ep=2))
    with pytest.raises(ValueError, match="cp = 0 must be at least 1"): replace(CONFIG, cp=0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="dp 3 · cp 1 must be the 4 processes"): stage.join(replace(CONFIG, dp=3))
    with pytest.raises(ValueError, match="cannot be dealt to dp = 4 processes in micro_batches = 4"): stage.join(CONFIG)
    with pytest.raises(ValueError, match="ep = 3 must divide"): stage.join(replace(CONFIG, ep=3, micro_batches=1))
    monkeypatch.delenv("WORLD_SIZE")
    assert stage.join(CONFIG) is None
