"""A step's operators, recorded on a CPU once and then repeated without Python: what a CUDA graph does with a GPU's kernels.

A step of preset tiny is some 400 operators, which take less time than Python needs to call them. PyTorch's tracer writes down the operators of one
call. Like a graph of kernels, a trace knows only what it has seen: no branch is taken anew, and no number of Python's changes.

NOTE: PyTorch keeps the tracer but no longer develops it. Its successor, torch.compile, takes 25 s for every variant of a step and needs a C++
compiler; a step of one slot then was faster still (1.1 ms; 1.9 traced, 4.0 plain), one of 32 slots slower.
"""
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

PLAIN = 200      # ours: calls before one is recorded, which costs as much time as some 200 later calls save


class Traced:
    """f() -> tensor, recorded behind its first PLAIN calls. The result of a later call lasts until the next.

    parts: objects whose attributes are all the tensors that f changes, and `model` has those that others may change in place (new weights).
    PITFALL: any other tensor is a constant to the tracer, which computes with its value at the recording for ever.
    """
    def __init__(self, f: Callable[[], Tensor], model: nn.Module, parts: Iterable[object]):
        self.f, self.model, self.parts, self.calls, self.trace = f, model, list(parts), 0, None

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        self.calls += 1
        if self.trace is not None: return self.trace()
        return self.f() if self.calls <= PLAIN else self.record()

    def record(self) -> Tensor:
        """Runs f once more, as any call does, and keeps what it ran."""
        held, results = nn.Module(), []
        held.model, held.forward = self.model, lambda: results.append(self.f()) or results[0]
        tensors = {id(z): z for part in self.parts for z in vars(part).values() if isinstance(z, Tensor)}
        for i, z in enumerate(tensors.values()): held.register_buffer(f"tensor_{i}", z)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")       # of the tracer's age, and of shapes that become constants, as they shall
            self.trace = torch.jit.trace(held, (), check_trace=False)
        return results[0]
