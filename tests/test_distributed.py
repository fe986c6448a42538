"""Stage 05 on several processes (gloo on a CPU): the same losses, gradients and weights as one process, and checkpoints for any number of them."""
import importlib
import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

model04, stage = (importlib.import_module(m) for m in ("04_model", "05_pretrain"))
MICRO = model04.ModelConfig(pattern="MEM*E", d_model=32, vocab=320, heads=2, kv_heads=1, head_dim=16, mamba_heads=16, mamba_head_dim=2, groups=1,
                            state=8, chunk=16, experts=4, experts_per_token=2, latent=16, expert_width=16, shared_width=16)
ROWS, SEQ, STEPS = 4, 24, 20
# every micro-batch is one row, so that the mean of the pieces' means is the same however rows are dealt
CONFIG = stage.PretrainConfig(steps=STEPS, batch=ROWS, seq=SEQ, micro_batches=ROWS, lr=1e-2, save_every=1000, health_every=7, aux_weight=1e-2,
                              branches=())
COMPILER = any(map(shutil.which, ("g++", "clang++", "cl")))
# processes -> name -> (steps, settings). Where 20 steps take long, fewer: the first ones would differ already
LAYOUTS = {2: {"data": (STEPS, dict()), "experts": (STEPS, dict(ep=2)), "context": (STEPS, dict(cp=2)),
               "experts and context": (STEPS, dict(ep=2, cp=2)), **({"compiled": (3, dict(ep=2, compile=True))} if COMPILER else {})},
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


class Disk:
    """What writes this process's part of a checkpoint, under control: held back until `gate` opens, slow, or full."""
    def __init__(self, home: Path):
        self.gate, self.reached, self.full, self.found = threading.Event(), threading.Event(), False, []
        plain = dcp.FileSystemWriter.write_data

        def write_data(writer, *args):
            self.found.append(names(home))
            self.reached.set()
            assert self.gate.wait(60)
            time.sleep(0.3)      # whoever does not wait comes too early
            if self.full: raise OSError(28, "No space left on device")
            return plain(writer, *args)
        dcp.FileSystemWriter.write_data = write_data


def names(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir()) if home.exists() else []


def save_and_die(rank: int, world: int, folder: Path) -> None:
    """A checkpoint at step 6; one at step 8 is being written when, in step 9, a process is gone."""
    config, ranks = layout(dict(ep=2, save_every=3, keep=1))
    run = trainer(folder / "run", config, ranks)
    for _ in range(7):
        run.train_step()
        if run.step == 6: run.save()
    run.wait()
    disk = Disk(run.home)
    run.train_step()
    run.save()
    assert disk.reached.wait(60)
    if rank == world - 1: os.kill(os.getpid(), signal.SIGKILL)
    run.train_step()


def save_and_go_on(rank: int, world: int, folder: Path) -> None:
    """Steps 3 and 6 saved at once, and then by a run that trains on; after that all that must wait for a disk, and two that refuse."""
    config, ranks = layout(dict(ep=2, keep=9))
    plain = trainer(folder / "at once", replace(config, async_save=False), ranks)
    for _ in range(6):
        plain.train_step()
        if plain.step in (3, 6): plain.save()
    run = trainer(folder / "meanwhile", config, ranks)
    disk, said = Disk(run.home), []
    for _ in range(3): run.train_step()
    run.save()
    for _ in range(3): run.train_step()
    assert disk.reached.wait(60)
    held = names(run.home)
    disk.gate.set()
    run.save()      # has to wait for the first
    run.wait()
    run.fit(8, save_at={7})
    fitted = names(run.home)
    run.train_step()
    run.save()
    run.restore(run.home / "step-000008")
    restored = names(run.home)
    replace_folder = os.replace
    def refuse(*args): raise OSError(30, "Read-only file system")
    for disk.full, os.replace in ((rank == 1, replace_folder), (False, refuse if rank == 0 else replace_folder)):      # a part, or the whole
        if run.step == 8: run.train_step(); run.train_step()
        run.save()
        try: run.wait()
        except ValueError as error: said.append(str(error))
    os.replace = replace_folder
    results = dict(held=held, found=disk.found, fitted=fitted, restored=restored, said=said, left=names(run.home))
    torch.save(results, folder / f"saved-{rank}.pt")


def go_on(rank: int, world: int, folder: Path) -> None:
    config, ranks = layout(dict(ep=world, cp=1))
    run = stage.Trainer.load(stage.newest_checkpoint(folder / "run"), config, Rows(**ranks.rows), folder / "again", ranks=ranks)
    rows = [run.train_step() for _ in range(4)]
    found = weights(run)
    if rank == 0: torch.save(dict(rows=rows, weights=found), folder / f"again-{world}.pt")


def worker(rank: int, world: int, folder: str, task: str) -> None:
    torch.set_num_threads(1)
    stage.MESSAGE = 6000      # MICRO has 3,104 to 4,448 numbers a layer: two, two and one share a gather
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
    assert names(tmp_path / "run") == ["step-000006", "step-000008.part"] and stage.newest_checkpoint(tmp_path / "run").name == "step-000006"
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


def test_a_checkpoint_holds_the_step_at_which_it_was_saved_though_training_goes_on(tmp_path):
    """Written only after three more steps, it equals the one written at once, bit for bit: a copy that shares memory with the model would not. It has
    no name before it is whole, and the next save, the end of fit and a restore wait for it; a disk that refuses one process stops all of them."""
    spawn("save_and_go_on", 2, tmp_path)
    for step in (3, 6):
        one, two = (stage.Trainer.load(tmp_path / home / f"step-{step:06d}", CONFIG, Rows(), tmp_path).parts() for home in ("at once", "meanwhile"))
        assert one.keys() == two.keys() and all(torch.equal(x, two[key]) for key, x in one.items()) and one["step.lm_head.weight"] == step
    for rank in range(2):
        got = torch.load(tmp_path / f"saved-{rank}.pt", weights_only=True)
        whole = [f"step-{step:06d}" for step in (3, 6, 7, 8, 9)]
        assert got["held"] == ["step-000003.part"] and "step-000003" in got["found"][1] and "step-000003.part" not in got["found"][1]
        assert [name for name in got["fitted"] if name[0] == "s"] == whole[:4]
        assert [name for name in got["restored"] if name[0] == "s"] == [name for name in got["left"] if name[0] == "s"] == whole
        assert "step-000010 (No space left on device): make room" in got["said"][0]
        assert ("Read-only file system" if rank == 0 else "another process was refused") in got["said"][1] and len(got["said"]) == 2


def test_sizes_that_do_not_fit_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="start them with torchrun"): stage.join(replace(CONFIG, ep=2))
    with pytest.raises(ValueError, match="cp = 0 must be at least 1"): replace(CONFIG, cp=0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="dp 3 · cp 1 must be the 4 processes"): stage.join(replace(CONFIG, dp=3))
    with pytest.raises(ValueError, match="cannot be dealt to dp = 4 processes in micro_batches = 4"): stage.join(CONFIG)
    with pytest.raises(ValueError, match="ep = 3 must divide"): stage.join(replace(CONFIG, ep=3, micro_batches=1))
    monkeypatch.delenv("WORLD_SIZE")
    assert stage.join(CONFIG) is None
