"""A process that draws the data of reinforcement learning while another one learns from it: weights in shared memory, taken up in flight.

Drawing takes most of the time, so it has a process of its own:
    worker    waits until the weights are at most `age` steps behind, draws batch n, sends it, goes on with n + 1
    learner   takes batch n, one optimizer step, publishes weights n + 1
The weights lie in shared memory with their version. A hook on the embedding takes newer ones in the middle of an answer: stage 04's generate embeds
every token that it writes; stage 08's engine calls the hook before each step, because drafts are to be verified by the weights that read them, and a
recorded step runs no hook (it finds weights where they were, copied in place). Caches are not computed again, so that an answer may mix two policies;
only importance weights correct it, as in Ultra.

Sources: [Ultra] Nemotron 3 Ultra report, arXiv 2606.15007, RLVR · [RL] NVIDIA NeMo-RL, async GRPO: trajectory age, in-flight weight updates
"""
from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import multiprocessing as mp
from torch import nn


class SharedWeights:
    """A model's tensors in shared memory, and how many optimizer steps they have seen. The version's lock guards both."""
    def __init__(self, model: nn.Module, version: int):
        self.tensors = {name: x.detach().cpu().clone().share_memory_() for name, x in model.state_dict().items()}
        self.version = mp.get_context("spawn").Value("q", version)

    @torch.no_grad()
    def publish(self, model: nn.Module, version: int) -> None:
        if not self.version.get_lock().acquire(timeout=5.0): raise ValueError("the generation worker died with the weights in hand: use --resume.")
        for name, x in model.state_dict().items(): self.tensors[name].copy_(x)
        self.version.value = version
        self.version.get_lock().release()

    @torch.no_grad()
    def refresh(self, model: nn.Module, version: int) -> int:
        """Copies the weights into the model when they are not of this version; returns theirs. Ends the process when the learner has stopped."""
        if self.version.value == version: return version
        if self.version.value < 0: sys.exit()
        with self.version.get_lock():
            for name, x in model.state_dict().items(): x.copy_(self.tensors[name])
            return self.version.value


def work(draw: Callable, build: Callable[[], nn.Module], device: str, shared: SharedWeights, steps: range, age: int, in_flight: bool, threads: int,
         pipe) -> None:
    """The worker's process: sends the rollouts of every step, or one sentence when it fails."""
    for which in (signal.SIGINT, signal.SIGTERM): signal.signal(which, signal.SIG_IGN)      # they reach both; the learner finishes its step first
    torch.set_num_threads(threads)
    try:
        model, version = build().to(device), -1
        def follow(*_) -> None: nonlocal version; version = shared.refresh(model, version)
        if in_flight: model.backbone.embeddings.register_forward_pre_hook(follow)
        for step in steps:
            while 0 <= shared.version.value < step - age:
                if not mp.parent_process().is_alive(): return
                time.sleep(0.002)
            follow()
            pipe.send(draw(model, step, version))
    except Exception as error:
        with contextlib.suppress(BrokenPipeError): pipe.send(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
        if os.environ.get("TRACEBACK"): raise


def begin(pipe, *rest) -> None:
    """What the new process runs: its first message is what it draws."""
    work(pipe.recv(), *rest, pipe)


class Worker:
    """A second process that draws while this one learns: draw(model, step, version of its weights) for steps `first` to `end`. build() makes another
    model of the same sizes. ValueError from take() when the process has failed or is gone."""
    def __init__(self, draw: Callable, build: Callable[[], nn.Module], model: nn.Module, first: int, end: int, age: int = 1, in_flight: bool = True,
                 threads: int = 1):
        context = mp.get_context("spawn")
        self.shared, self.ready = SharedWeights(model, first), queue.Queue()
        self.pipe, theirs = context.Pipe()
        args = (theirs, build, next(model.parameters()).device.type, self.shared, range(first, end), age, in_flight, threads)
        self.process = context.Process(target=begin, args=args, daemon=True)
        self.process.start()
        theirs.close()      # or the end of the process would not be the end of the pipe
        # PITFALL: among the arguments a long plan would fill the pipe that start() writes them to, and start() waits for ever for a process that has
        # died before it read them
        try: self.pipe.send(draw)
        except OSError as error:
            self.process.join(5)
            raise ValueError(f"the generation worker died before it began, with exit code {self.process.exitcode}. It imports the script that was "
                             'started: a script of your own must call this under  if __name__ == "__main__":  .') from error
        # NOTE: a pipe holds 64 KB and a batch is larger; without this thread the worker would wait until the learner reads
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True: self.ready.put(self.pipe.recv())
        self.ready.put(None)

    def take(self, step: int) -> list:
        found = self.ready.get()
        if found is None: self.process.join(5); found = f"it died with exit code {self.process.exitcode}; --resume goes on from the last checkpoint."
        if isinstance(found, str): raise ValueError(f"the generation worker failed at step {step + 1}: {found}")
        return found

    def close(self) -> None:
        self.shared.version.value = -1
        self.process.join(2)
        self.process.kill()
        self.process.join()      # gone, and not only told to go
