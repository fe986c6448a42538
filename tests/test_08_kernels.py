"""Stage 08's passes through the twins of a decode step, interpreted on a CPU, against the same passes in PyTorch."""
import importlib

import pytest
import torch
from kernel_checks import DEVICE
from test_08_engine import MICRO, SamplingParams, answers, copy_of, prompts, randomise

nvfp4, nemotron, infer = (importlib.import_module(m) for m in ("01_nvfp4", "04_model", "08_infer"))
DECODE = ("conv_step", "add_rmsnorm", "route", "relu2", "attend_cells")


@pytest.fixture
def twins(monkeypatch):
    """Calling it makes the stages take the twins of a decode step; the list holds the names of those that ran."""
    ran, plain = [], nvfp4.find_twin

    def find_twin(module, name, impl, x):
        if impl == "torch" or name not in DECODE: return plain(module, name, impl, x)
        ran.append(name)
        return plain(module, name, "triton", x)

    return ran, lambda: monkeypatch.setattr(nvfp4, "find_twin", find_twin)


def passes(model, k, rollback, kv_format):
    """Hiddens of real tokens: two prompts read in chunks of unequal rows, then windows of three slots, of which each keeps another number; the third
    slot is idle at first, and one is given to a new sequence."""
    caches, out, write = infer.SlotCaches(model, 3, 40, k, rollback, kv_format=kv_format), [], "last"
    long = lambda *z: torch.tensor(z, device=DEVICE)
    ids = torch.randint(3, 96, (20, 3, k + 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.inference_mode():
        for slots, counts in ((long(2, 0), long(7, 1)), (long(0, 2), long(2, 1))):
            rows = caches.rows(slots, counts, int(counts.max()), caches.length_b)
            h = caches.trunk(ids.flatten()[:2 * int(counts.max())].view(2, -1), rows)
            caches.commit(rows, counts); out.append(h[rows.real_rt])
        if k: write = "none" if caches.replays else "each"
        for turn in range(4):
            if turn == 2: caches.reset(0)
            counts = long(k + 1, (turn > 0) * (k + 1), k + 1)
            rows = caches.rows(None, counts, k + 1, caches.length_b, write)
            h = caches.trunk(ids[turn], rows)
            keep = torch.minimum(counts, long(turn % (k + 1) + 1, (turn + 1) % (k + 2), k + 1)) if k else counts
            caches.commit(rows, keep); out.append(h[rows.real_rt])
    assert all(x.isfinite().all() for x in out)
    return torch.cat(out)


@pytest.mark.parametrize("k, rollback, kv_format", [(0, "snapshot", None), (2, "replay", "fp8"), (1, "snapshot", "bf16")])
def test_passes_through_the_kernels_give_pytorchs_hiddens(k, rollback, kv_format, twins):
    """fp32: sums in another order only. What a kernel leaves behind, in cells, rings and states, is what the next pass reads."""
    model = randomise(nemotron.Nemotron(MICRO), 5).requires_grad_(False).to(DEVICE)
    with nvfp4.plain_pytorch(): plain = passes(model, k, rollback, kv_format)
    ran, switch = twins
    switch()
    ours = passes(model, k, rollback, kv_format)
    assert set(ran) == set(DECODE)
    # a key that lies at the border of two FP8 or bf16 codes may fall on the other side
    assert (ours - plain).abs().max() < {None: 1e-4, "bf16": 0.02, "fp8": 0.2}[kv_format] * plain.abs().max()


def test_an_engine_through_the_kernels_answers_as_one_without(twins):
    """Greedy, with requests that enter while others decode: one wrong number would be another token soon."""
    model = copy_of(randomise(nemotron.Nemotron(MICRO), 5)).to(DEVICE)
    ask = lambda: [(x.ids, x.finished) for x in answers(infer.Engine(model, 2, 48, 2, prefill_tokens=5), prompts(3, 3, high=9),
                                                        SamplingParams(max_tokens=4, temperature=0.0, stop_ids=()))]
    with nvfp4.plain_pytorch(): plain = ask()
    twins[1]()
    assert ask() == plain and len(plain) == 3
