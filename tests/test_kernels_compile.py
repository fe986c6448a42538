"""Every kernel compiles for Hopper (sm_90) and Blackwell (sm_100) on a machine without a GPU, and what is meant to be native there is."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
FILES = sorted(p.stem for p in HERE.glob("test_kernels_*.py") if "\ndef launches(" in p.read_text())
EXACT = ("_append_kernel", "_columns_kernel", "_quantize_kernel", "_step_kernel")       # their codes are those of PyTorch's divisions, bit for bit
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles what it runs")


def compiled(name: str) -> list[dict]:
    """One dict per kernel and architecture; in a process of its own, because this one interprets."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, HERE / "kernel_checks.py", name], capture_output=True, text=True, env=env, cwd=HERE.parent)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("name", FILES)
def test_kernels_compile_for_both_architectures(name):
    """Ultra's shapes, forward and backward. A matrix product must reach the tensor cores; the FP4 product and the quantizer's native branch must be
    Blackwell's own instructions (compiled here, not run: no Blackwell GPU was at hand)."""
    kernels = compiled(name)
    for arch in (90, 100):
        built = [k for k in kernels if k["arch"] == arch]
        print(f"\nsm_{arch}: " + ", ".join(f"{k['kernel']} ({k['mma']} mma, {k['mxf4nvf4']} mxf4nvf4, {k['to_e2m1']} to e2m1)" for k in built))
        assert built and all(k["bytes"] > 0 and k["shared"] <= 227 * 1024 for k in built)
    # PITFALL: Triton's / is approximate for fp32 on a GPU and exact in its interpreter, where the tests of these kernels run without a GPU
    exact = [k for k in kernels if k["kernel"] in EXACT]
    assert not any(k["fast_div"] for k in exact) and bool(exact) == any(k["div"] for k in exact), f"approximate or no divisions: {exact}"
    native = {what: sum(k[what] for k in kernels if k["arch"] == 100) for what in ("mma", "mxf4nvf4", "to_e2m1")}
    if name in ("test_kernels_ssd", "test_kernels_attention", "test_kernels_experts", "test_kernels_nvfp4_gemm"): assert native["mma"] > 0
    if name == "test_kernels_nvfp4_gemm": assert native["mxf4nvf4"] > 0
    if name == "test_kernels_nvfp4": assert native["to_e2m1"] > 0


def test_all_kernel_files_are_compiled():
    """A kernel file without `launches` in its test would never be compiled here."""
    other = ("__init__", "draws", "interpreter")       # what the others import
    assert set(FILES) == {f"test_kernels_{p.stem}" for p in (HERE.parent / "kernels").glob("*.py") if p.stem not in other}
