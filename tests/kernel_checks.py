"""What the kernel tests share: where twins run, "no worse than plain PyTorch", and compiling for a GPU that is not here.

On a machine with a GPU the tests run there; elsewhere in Triton's interpreter, which conftest.py switches on.
"""
import contextlib
import importlib.util
import json
import sys
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape, seed=0, dtype=torch.float32, scale=1.0):
    """Gaussians that are the same on every device."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return x.to(dtype).to(DEVICE)


def errors(approximation, oracle):
    """(largest, root mean square) error."""
    gap = (approximation.detach().double().cpu() - oracle.detach().double().cpu()).abs()
    return gap.max().item(), gap.square().mean().sqrt().item()


def assert_no_worse(twin, plain, oracle, factor=2.0, what="result"):
    """A kernel may round differently, but not worse, than plain PyTorch in the same dtype; both on the same rounded inputs against float64.
    The floor, 1e-6 of the largest value, is for results that plain PyTorch happens to get exactly."""
    assert twin.shape == plain.shape and twin.dtype == plain.dtype, f"{what}: {twin.shape} {twin.dtype} against {plain.shape} {plain.dtype}"
    floor = 1e-6 * oracle.abs().max().item()
    for name, ours, theirs in zip(("largest", "rms"), errors(twin, oracle), errors(plain, oracle)):
        assert ours <= factor * theirs + floor, f"{what}: {name} error of the twin {ours:.2e}, of plain PyTorch {theirs:.2e}"


class _Driver:
    """Answers what Triton asks a GPU's driver before it compiles."""
    def __init__(self, arch):
        from triton.backends.compiler import GPUTarget
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self): return self.target
    def get_current_device(self): return self.target.arch
    def get_current_stream(self, device): return 0
    def get_active_torch_device(self): return torch.device("meta")


@contextlib.contextmanager
def compiling_for(arch: int):
    """Inside, a kernel launch compiles for sm_<arch> and does not run; yields the list that collects (kernel name, compiled kernel).

    Arguments are meant to be tensors on the device "meta", which have shapes and no memory. Not under TRITON_INTERPRET, and for a process of its
    own: the driver stays a pretended one.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
    launch, compiled = JITFunction.run, []

    def run(self, *args, grid, warmup, **kwargs):
        compiled.append((self.__name__, launch(self, *args, grid=grid, warmup=True, **kwargs)))
        return compiled[-1][1]

    JITFunction.run = run
    driver.set_active(_Driver(arch))
    try: yield compiled
    finally: JITFunction.run = launch


def report(paths: list[str]) -> None:
    """Compile what `launches(device)` of each test file launches, for sm_90 and sm_100; print one JSON line per kernel and architecture.
    PTX operations of interest are counted: tensor-core products, block-scaled FP4 products, conversions to e2m1, divisions, also approximate ones."""
    import re
    root = Path(__file__).parent
    sys.path[:0] = [str(root.parent), str(root)]
    for path in paths:
        spec = importlib.util.spec_from_file_location(path, root / f"{path}.py")
        module = sys.modules[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for arch in (90, 100):
            with compiling_for(arch) as compiled: module.launches("meta", arch)
            for name, kernel in compiled:
                ptx = kernel.asm["ptx"]
                count = lambda pattern, ptx=ptx: len(re.findall(pattern, ptx))
                print(json.dumps(dict(file=path, arch=arch, kernel=name, shared=kernel.metadata.shared, bytes=len(kernel.asm["cubin"]),
                                      mma=count(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync"), mxf4nvf4=count(r"tcgen05\.mma\S*mxf4nvf4\S*"),
                                      to_e2m1=count(r"cvt\.\S*e2m1x2\.f32"), div=count(r"div\.\S*f32"), fast_div=count(r"div\.(?:full|approx)"))),
                      flush=True)


if __name__ == "__main__":
    report(sys.argv[1:])
