"""Executes the notebooks' sources and writes them with their outputs, small and the same in every build.

notebooks/src/NN_name.py (jupytext's percent format) is what a person edits; notebooks/NN_name.ipynb is built from it and committed.

Run:   python notebooks/build.py                      # execute all and write them (make notebooks)
       python notebooks/build.py --only 02_mamba      # one of them
       python notebooks/build.py --check              # exit code 1 when a notebook's text or code is not its source's
       python notebooks/build.py --no-write           # execute all and check what comes out, write nothing
       python notebooks/build.py --tiny               # the same with their tiny parameters
"""
from __future__ import annotations

import base64
import importlib
import io
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER, SOURCES = ROOT / "notebooks", ROOT / "notebooks" / "src"
MAX_IMAGE, MAX_NOTEBOOK = 60_000, 500_000      # bytes of one PNG, and of one .ipynb file: a repository of notebooks must stay quick to clone
SECONDS = 90                                   # what a notebook may take on two CPU cores
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
TINY = re.compile(r"^(\w+) = .*\(tiny: (.+)\)\s*$", re.M)       # steps = 600     # training steps (tiny: 20)
ANSWER = re.compile(r"```python\n(.*?)```", re.S)


def sources() -> list[Path]:
    return sorted(SOURCES.glob("0[1-8]_*.py"))


def set_metadata(notebook) -> None:
    """METADATA and nothing else: a kernel writes its version there."""
    import nbformat
    notebook.metadata = nbformat.from_dict(METADATA)


def read_source(path: Path):
    """The notebook of a source, without outputs; the ids of its cells are their numbers, so that they never change by themselves."""
    import jupytext
    notebook = jupytext.reads(path.read_text(), fmt="py:percent")
    for i, cell in enumerate(notebook.cells):
        cell.id, tags = f"cell-{i:02d}", cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    set_metadata(notebook)
    return notebook


def text_of(notebook) -> list[tuple]:
    """What has to equal the source: kind, text and tags of every cell."""
    return [(cell.cell_type, cell.source, tuple(cell.metadata.get("tags", ()))) for cell in notebook.cells]


def difference(path: Path) -> str | None:
    """One sentence about how the committed notebook of a source differs from it; None when it does not, and has been executed."""
    import nbformat
    file = FOLDER / f"{path.stem}.ipynb"
    again = f"run python notebooks/build.py --only {path.stem}."
    if not file.exists(): return f"{file.name} does not exist: {again}"
    built = nbformat.read(file, as_version=4)
    theirs, ours = text_of(built), text_of(read_source(path))
    if theirs != ours:
        i = next((i for i, pair in enumerate(zip(theirs, ours)) if pair[0] != pair[1]), min(len(theirs), len(ours)))
        return f"cell {i} of {file.name} is not that of its source: {again}"
    empty = [i for i, cell in enumerate(built.cells) if cell.cell_type == "code" and cell.execution_count is None]
    return f"cell {empty[0]} of {file.name} was not executed: {again}" if empty else None


def make_tiny(notebook) -> int:
    """Puts the tiny values, which comments in cells tagged `parameters` give, in place of the usual ones; how many there were."""
    count = 0
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()): cell.source, n = TINY.subn(r"\1 = \2", cell.source); count += n
    return count


def answers(notebook) -> list[str]:
    """The code in the collapsed answers of the exercises. It runs after the last cell, so an answer that is wrong stops the build."""
    hidden = [part for cell in notebook.cells if cell.cell_type == "markdown" for part in cell.source.split("<details>")[1:]]
    return [code for part in hidden for code in ANSWER.findall(part.split("</details>")[0])]


def execute(notebook, seconds: int = 3 * SECONDS) -> None:
    """Runs every cell, then the answers, in a kernel of this Python started in notebooks/, as Jupyter would. nbclient's CellExecutionError shows the
    cell and its traceback; TimeoutError after `seconds` in one cell. ours: three times SECONDS, for a machine with other work."""
    import nbclient
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbformat.v4 import new_code_cell

    class ThisPython(KernelSpecManager):       # PITFALL: an installed kernel named python3 may belong to another environment
        def get_kernel_spec(self, kernel_name):
            argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=argv, display_name="Python 3", language="python")

    length = len(notebook.cells)
    notebook.cells += [new_code_cell(code) for code in answers(notebook)]
    with tempfile.TemporaryDirectory() as home:       # no start-up files or history of the person who builds
        manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisPython())
        client = nbclient.NotebookClient(notebook, km=manager, timeout=seconds, record_timing=False, resources={"metadata": {"path": str(FOLDER)}})
        # NOTE: one thread, because sums over two may end in other digits
        client.execute(env=os.environ | dict(OMP_NUM_THREADS="1", IPYTHONDIR=home, PYDEVD_DISABLE_FILE_VALIDATION="1"))
    del notebook.cells[length:]


def shrink_png(data: str) -> str:
    """A base64 PNG with a palette of at most 64 colours and no metadata: a third of the size, and no version of matplotlib in it."""
    from PIL import Image
    image, buffer = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), io.BytesIO()
    image.quantize(64, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def clean(notebook) -> None:
    """Removes what changes from build to build: progress bars, warnings and timings on stderr, execution counts, metadata of outputs."""
    count = 0
    for cell in notebook.cells:
        if cell.cell_type != "code": continue
        count += 1
        cell.execution_count = count
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if "execution_count" in output: output.execution_count = count
            if "metadata" in output: output.metadata = {}
            if image := output.get("data", {}).get("image/png"): output.data = {"image/png": shrink_png(image), "text/plain": "<figure>"}
        cell.metadata.pop("execution", None)
    set_metadata(notebook)


def check_size(name: str, notebook, text: str) -> None:
    """ValueError for a notebook or figure that is too large to commit, or one that names a path of this machine."""
    images = [output.data["image/png"] for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})]
    largest = max((len(base64.b64decode(image)) for image in images), default=0)
    if largest > MAX_IMAGE: raise ValueError(f"{name} has a figure of {largest:,} bytes, and {MAX_IMAGE:,} are allowed: draw fewer points or panels.")
    if len(text.encode()) > MAX_NOTEBOOK: raise ValueError(f"{name} has {len(text.encode()):,} bytes, and {MAX_NOTEBOOK:,} are allowed: print less.")
    if str(ROOT) in text or str(Path.home()) + "/" in text: raise ValueError(f"{name} prints a path of this machine: print names only.")


def build(path: Path, write: bool = True) -> None:
    """Executes one source, checks what came out, and writes its notebook."""
    import nbformat
    notebook = read_source(path)
    execute(notebook)
    clean(notebook)
    nbformat.validate(notebook)
    text = nbformat.writes(notebook) + "\n"
    check_size(path.stem, notebook, text)
    if write: (FOLDER / f"{path.stem}.ipynb").write_text(text)


@dataclass(frozen=True)
class Config:
    only: tuple[str, ...] = ()     # names such as 02_mamba; none = all
    check: bool = False            # compare committed notebooks with their sources instead
    write: bool = True             # --no-write: execute, and check sizes, only
    tiny: bool = False             # execute with tiny parameters instead, and write nothing


def main(config: Config) -> None:
    from tqdm import tqdm
    known = {path.stem: path for path in sources()}
    if unknown := [name for name in config.only if name not in known]: raise ValueError(f"there is no notebook {unknown[0]}: {', '.join(known)}.")
    chosen = [path for name, path in known.items() if not config.only or name in config.only]
    if config.check:
        wrong = [sentence for path in chosen if (sentence := difference(path))]
        if wrong: raise ValueError("\n".join(wrong))
        return print(f"{len(chosen)} notebooks are those of their sources")
    for path in (bar := tqdm(chosen, unit="notebook")):
        bar.set_description(path.stem)
        if not config.tiny: build(path, config.write); continue
        notebook = read_source(path)
        make_tiny(notebook)
        execute(notebook)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    importlib.import_module("01_nvfp4").run_command(main, Config, __doc__)
