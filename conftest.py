"""What every test needs: the repository on the import path, no network, one thread count, and a clear word when a package is in the way."""
import importlib
import importlib.metadata
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")   # the suite must pass with the cable pulled
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402
import torch  # noqa: E402

# Without a GPU the Triton twins run in Triton's interpreter, which must be chosen before the first kernel is defined.
if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")


def put_student_first(folder: Path) -> None:
    """STUDENT=dir pytest: a stage or kernel in that folder takes the place of ours, in the tests and in every later stage that imports it."""
    stages, kernel_files = sorted(folder.glob("0[1-8]_*.py")), sorted(folder.glob("kernels/*.py"))
    if not stages and not kernel_files:
        raise pytest.UsageError(f"STUDENT={folder} holds no stage (01_nvfp4.py, ...) and no kernels/: set it to the folder of the file you wrote.")
    unknown = [p.name for p in stages if not (Path(__file__).parent / p.name).exists()]
    if unknown: raise pytest.UsageError(f"STUDENT={folder} holds {unknown[0]}, which is no stage of this repository: give it the stage's name.")
    sys.path.insert(0, str(folder))
    if kernel_files: importlib.import_module("kernels").__path__.insert(0, str(folder / "kernels"))      # one file of the package, not all of it


def pytest_configure(config):
    if os.environ.get("STUDENT"): put_student_first(Path(os.environ["STUDENT"]).resolve())
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    # PITFALL: our folder kernels/ would hide that package, and transformers would import ours in its place.
    raise pytest.UsageError("the PyPI package `kernels` is installed and clashes with this repository's folder kernels/: pip uninstall kernels")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """`pytest tests -m gpu` spends its time compiling kernels, each on one core: with pytest-xdist (of the extra [test]) it takes eight."""
    alone = getattr(config.option, "numprocesses", 0) is None and "PYTEST_XDIST_WORKER" not in os.environ
    if alone and torch.cuda.is_available() and config.option.markexpr == "gpu": config.option.numprocesses = min(8, os.cpu_count() // 2)


def pytest_collection_modifyitems(items):
    """On a machine with a GPU the kernel tests run on it, so they belong to `-m gpu`."""
    if not torch.cuda.is_available(): return
    for item in items:
        if item.path.name.startswith("test_kernels"): item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _same_numbers_everywhere():
    """One thread and one seed: a test must not pass or fail by the machine it runs on."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
