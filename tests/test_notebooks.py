"""The notebooks: they equal their sources, retype nothing, hold what a reader was promised, and stay small."""
import ast
import base64
import importlib
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
build = importlib.import_module("notebooks.build")
SOURCES = build.sources()
SECTIONS = ("The question", "By hand", "Three rungs", "Experiment", "The report and our measurement", "Exercises")
notebook = pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)


def stage_of(path: Path) -> Path:
    return ROOT / path.name


def top_level_names(code: str) -> set[str]:
    """What a file defines outside functions, classes and comprehensions, names of imported modules and stages left out."""
    found, inner = set(), (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

    def visit(node):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): found.add(node.name)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): found.add(node.id)
        if isinstance(node, ast.alias) and node.asname: found.add(node.asname)
        imports = isinstance(node, ast.Assign) and "import_module" in ast.unparse(node.value)      # nvfp4 = importlib.import_module("01_nvfp4")
        if not isinstance(node, inner) and not imports:
            for child in ast.iter_child_nodes(node): visit(child)

    visit(ast.parse(code))
    return found


def retyped(code: str, stage: str) -> set[str]:
    """Names that the notebook defines and its stage defines too."""
    modules = {name.asname for node in ast.walk(ast.parse(stage)) if isinstance(node, ast.Import) for name in node.names if name.asname}
    return top_level_names(code) & (top_level_names(stage) - modules)


def stage_alias(code: str, stem: str) -> str | None:
    """The name that a notebook gives its stage: `nvfp4 = import_module("01_nvfp4")`, or in a tuple of several."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Assign) or "import_module" not in ast.unparse(node.value): continue
        strings = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        names = [n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)]
        if stem in strings and len(names) == len(strings): return names[strings.index(stem)]


def code_of(book) -> str:
    return "\n".join(cell.source for cell in book.cells if cell.cell_type == "code")


def sections(book) -> dict[str, list]:
    """{heading: its cells}, by the headings of level 2; the part before the colon of a heading is its name."""
    out, here = {}, None
    for cell in book.cells:
        if heading := re.search(r"^## (.+)$", cell.source, re.M) if cell.cell_type == "markdown" else None: here = heading[1].split(":")[0]
        if here: out.setdefault(here, []).append(cell)
    return out


def code_in(cells: list) -> str:
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def test_every_notebook_has_a_source_and_a_stage():
    """A notebook edited in Jupyter and committed without its source would be lost by the next build."""
    assert SOURCES and {p.stem for p in SOURCES} == {p.stem for p in (ROOT / "notebooks").glob("*.ipynb")}
    assert all(stage_of(p).exists() for p in SOURCES)


@notebook
def test_a_committed_notebook_is_its_source_executed(path):
    """A source changed without a build, or a cell changed in Jupyter only, shows here."""
    assert build.difference(path) is None


def test_a_changed_cell_a_missing_cell_and_an_unexecuted_one_are_differences(tmp_path, monkeypatch):
    """The check has to see what it is there for: another word, a cell less, outputs that were never made."""
    source = tmp_path / "01_nvfp4.py"
    source.write_text("# %% [markdown]\n# # A title\n\n# %%\nx = 1\n\n# %% tags=[\"parameters\"]\nsteps = 2\n")
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    assert "does not exist" in build.difference(source)

    def committed(change):
        book = build.read_source(source)
        for i, cell in enumerate(c for c in book.cells if c.cell_type == "code"): cell.execution_count = i + 1
        change(book)
        nbformat.write(book, tmp_path / "01_nvfp4.ipynb")
        return build.difference(source)

    assert committed(lambda book: None) is None
    assert "cell 0" in committed(lambda book: setattr(book.cells[0], "source", "# Another title"))
    assert "cell 2" in committed(lambda book: book.cells.pop())
    assert "cell 2" in committed(lambda book: setattr(book.cells[2], "metadata", nbformat.from_dict({})))
    assert "not executed" in committed(lambda book: setattr(book.cells[1], "execution_count", None))


@notebook
def test_a_notebook_retypes_nothing_of_its_stage(path):
    """A second copy of a function drifts from the first, and the reader learns from the wrong one."""
    assert not retyped(code_of(build.read_source(path)), stage_of(path).read_text())


@pytest.mark.parametrize("line", ["def quantize(x): return x", "class NVFP4Recipe: pass", "E2M1 = [0, 0.5, 1]", "x, product = 1, 2",
                                  "for decibels in range(3): pass", "if (pack := 3): pass", "import math as hadamard16"])
def test_a_planted_copy_of_a_stage_name_is_found(line):
    """Whatever way a name is bound: def, class, assignment, unpacking, loop, walrus, import. Inside a function it is nobody's business."""
    stage = (ROOT / "01_nvfp4.py").read_text()
    assert len(retyped(f"a = 1\n{line}\n", stage)) == 1
    inside = "def own():\n" + "".join(f"    {row}\n" for row in line.splitlines())
    assert not retyped(inside, stage) and not retyped("import torch.nn.functional as F\nnvfp4 = importlib.import_module('01_nvfp4')\n", stage)


@notebook
def test_a_notebook_has_the_promised_parts(path):
    """Question, hand-sized example, three rungs of the stage, an experiment with parameters, a figure, the report, three exercises with answers."""
    book, stage = build.read_source(path), ast.parse(stage_of(path).read_text())
    parts = sections(book)
    assert tuple(parts) == SECTIONS
    alias = stage_alias(code_of(book), path.stem)
    assert alias, "the notebook has to import its stage by name"
    functions = {node.name for node in stage.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert re.search(r"print", code_in(parts["By hand"]))
    used = lambda cells: {n.attr for n in ast.walk(ast.parse(code_in(cells))) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == alias}
    assert used(parts["By hand"]) & functions
    assert len(used(parts["Three rungs"]) & functions) >= 3
    parameters = [cell for cell in parts["Experiment"] if "parameters" in cell.metadata.get("tags", ())]
    assert len(parameters) == 1 and build.TINY.search(parameters[0].source)
    assert re.search(r"save_figure\(|plot_\w+\(", code_in(parts["Experiment"]))
    report = code_in(parts["The report and our measurement"])
    assert "results.jsonl" in report and "newest(" in report and "print_table(" in report
    exercises = "\n".join(cell.source for cell in parts["Exercises"])
    assert len(re.findall(r"^\*\*[123]\. ", exercises, re.M)) == 3
    assert exercises.count("<details><summary>Answer</summary>") == exercises.count("</details>") == 3
    assert len(build.answers(book)) == 3


@notebook
def test_links_name_sections_that_exist(path):
    """A link `[§6 · Quantize](../01_nvfp4.py)` promises a heading; a section that was renumbered or renamed breaks it."""
    text = " ".join(" ".join(cell.source for cell in build.read_source(path).cells if cell.cell_type == "markdown").split())     # a label may wrap
    links = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", text)
    named = 0
    for label, target in links:
        file = ROOT / "notebooks" / target.split("#")[0]
        assert file.exists(), target
        if not label.startswith("§"): continue
        named += file.name == path.name
        headings = re.findall(r"^# %% (\d+ · .+)$", file.read_text(), re.M)
        assert any(re.match(re.escape(label[1:]) + r"($|\W)", heading) for heading in headings), f"{label} is no heading of {file.name}"
    assert named >= 3


@notebook
def test_notebooks_stay_small_and_say_nothing_of_the_machine(path):
    """Figures below 60 kB, notebooks below 500 kB: in git every build is kept for ever."""
    file = ROOT / "notebooks" / f"{path.stem}.ipynb"
    book, text = nbformat.read(file, as_version=4), file.read_text()
    nbformat.validate(book)
    build.check_size(path.stem, book, text)
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    assert all(output.output_type in ("stream", "display_data", "execute_result") and output.get("name") != "stderr" for output in outputs)
    assert book.metadata == build.METADATA and len({cell.id for cell in book.cells}) == len(book.cells)
    assert not re.search(r"/(home|tmp|Users|root)/", text)


def test_sizes_paths_and_what_changes_by_itself_are_seen():
    """A figure of noise is too large; after cleaning, two builds differ in nothing but what was computed."""
    import io

    import numpy
    from PIL import Image
    noise, file = numpy.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=numpy.uint8), io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    picture = base64.b64encode(file.getvalue()).decode()
    book = build.read_source(SOURCES[0])
    cell = next(cell for cell in book.cells if cell.cell_type == "code")
    cell.outputs = [nbformat.v4.new_output("execute_result", {"image/png": picture, "text/plain": "<object at 0x7f00>"}, execution_count=7),
                    nbformat.v4.new_output("stream", name="stderr", text="3 s")]
    cell.metadata["execution"] = {"iopub.execute_input": "now"}
    build.clean(book)
    assert len(cell.outputs) == 1 and cell.outputs[0].execution_count == cell.execution_count == 1 and "execution" not in cell.metadata
    assert "0x7f" not in nbformat.writes(book) and len(cell.outputs[0].data["image/png"]) < len(picture)
    with pytest.raises(ValueError, match="figure of"): build.check_size("a", book, "")
    cell.outputs = []
    with pytest.raises(ValueError, match="500,000"): build.check_size("a", book, "x" * 500_001)
    with pytest.raises(ValueError, match="path of this machine"): build.check_size("a", book, f"{ROOT}/out")
    build.check_size("a", book, "fine")


def test_all_notebooks_find_the_repository_in_the_same_way():
    """The first code cell begins alike in all of them: what is mended in one has to be mended everywhere."""
    first = [next(cell for cell in build.read_source(path).cells if cell.cell_type == "code").source for path in SOURCES]
    common = {text.split("sys.path.insert(0, str(root))\n")[0] for text in first}
    assert len(common) == 1 and "git" in common.pop()
