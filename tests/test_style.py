"""Style is a test: the header contract, section order, sizes, and nothing done at import."""
import ast
import builtins
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = sorted(ROOT.glob("0[1-8]_*.py"))
KERNELS = sorted(p for p in ROOT.glob("kernels/*.py") if p.name != "__init__.py")
stage = pytest.mark.parametrize("path", STAGES, ids=lambda p: p.stem)


def code_lines(source: str) -> int:
    """Lines that hold code: blank lines, comments and docstrings not counted."""
    tree, doc = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            doc |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    used = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            used |= set(range(token.start[0], token.end[0] + 1))
    return len(used - doc)


@stage
def test_a_stage_can_be_read_in_one_sitting(path):
    """At most 700 lines of code and 1,000 in all; a function fits a screen of 60 lines."""
    source = path.read_text()
    assert code_lines(source) <= 700 and len(source.splitlines()) <= 1000
    long = [f"{n.name}: {n.end_lineno - n.lineno + 1}" for n in ast.walk(ast.parse(source))
            if isinstance(n, ast.FunctionDef) and n.end_lineno - n.lineno + 1 > 60]
    assert not long, long


@stage
def test_the_header_keeps_its_contract(path):
    """What is left out, sources, commands, contents; and the contents are the sections, in order."""
    doc = ast.get_docstring(ast.parse(path.read_text()))
    for word in ("Left out:", "Sources:", "Run:", "Contents:", f"python {path.name}"): assert word in doc, word
    sections = re.findall(r"^# %% (\d+) · (.+)$", path.read_text(), re.M)
    assert [int(number) for number, _ in sections] == list(range(1, len(sections) + 1)) and sections
    contents = doc.split("Contents:")[1].split("Letters:")[0]
    listed = [item.split(" ", 1) for item in re.split(r"\s{2,}|\n", contents.strip())]
    assert [int(number) for number, _ in listed] == list(range(1, len(sections) + 1)), listed
    for (_, title), (_, name) in zip(sections, listed):
        assert title.lower().startswith(name.strip().lower()), f"section {title!r} is listed as {name!r}"


def _does_work(node: ast.stmt) -> bool:
    """A statement at module level that a reader would call running something."""
    if isinstance(node, (ast.For, ast.While, ast.With, ast.Delete)): return True
    if isinstance(node, ast.Expr): return not isinstance(node.value, ast.Constant)
    if isinstance(node, ast.If): return not ("__main__" in ast.unparse(node.test) or "TYPE_CHECKING" in ast.unparse(node.test))
    return False


@pytest.mark.parametrize("path", [*STAGES, *KERNELS, *sorted(ROOT.glob("data/**/*.py")), *sorted(ROOT.glob("experiments/*.py"))],
                         ids=lambda p: p.stem)
def test_import_does_nothing(path):
    """A script that works at import cannot be tested, taught from or imported by the next stage."""
    working = [f"line {n.lineno}" for n in ast.parse(path.read_text()).body if _does_work(n)]
    assert not working, working


@stage
def test_nothing_is_used_before_it_is_defined(path):
    """Bottom-up order: a module-level statement, decorator or default may only use names from further up."""
    tree, defined = ast.parse(path.read_text()), set(dir(builtins)) | {"__name__", "__doc__", "__file__"}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bodies = [*node.decorator_list, *(node.args.defaults if isinstance(node, ast.FunctionDef) else node.bases)]
        elif isinstance(node, ast.If): bodies = []
        else: bodies = [node]
        for body in bodies:
            own = {n.id for n in ast.walk(body) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            own |= {a.arg for n in ast.walk(body) if isinstance(n, ast.arguments) for a in n.args}
            later = {id(n) for call in ast.walk(body) if isinstance(call, ast.Lambda) for n in ast.walk(call.body)}      # runs when called
            loads = {n.id for n in ast.walk(body) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and id(n) not in later}
            if isinstance(body, ast.AnnAssign): loads -= {n.id for n in ast.walk(body.annotation) if isinstance(n, ast.Name)}
            assert not loads - defined - own, f"line {node.lineno} uses {loads - defined - own} before it is defined"
        names = [node.name] if hasattr(node, "name") else [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        defined |= set(names) | {(a.asname or a.name).split(".")[0] for a in getattr(node, "names", []) if isinstance(a, ast.alias)}


def test_every_kernel_function_has_a_twin_and_a_test():
    """A public function in kernels/ carries the name of a function in a stage, and the kernel tests mention it."""
    stages = {n.name for p in STAGES for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.FunctionDef)}
    tests = "\n".join(p.read_text() for p in [*(ROOT / "tests").glob("test_kernel*.py"), ROOT / "tests" / "test_context_parallel.py"])
    for path in KERNELS:
        for n in ast.parse(path.read_text()).body:
            public = isinstance(n, ast.FunctionDef) and not n.name.startswith("_") and not any("jit" in ast.unparse(d) for d in n.decorator_list)
            if public: assert n.name in stages and n.name in tests, f"{path.name}: {n.name}"


def test_no_path_or_unfinished_mark_is_left():
    """The repository speaks of itself only, and nothing in it is a stub."""
    bad = re.compile("|".join([r"/" + r"work/", r"/" + r"root/", "TO" + "DO", "FIX" + "ME", "Not" + "ImplementedError", "assert " + "True"]))
    hidden = lambda part: part in ("out", "build") or part.startswith(".") and part not in (".ci", ".github")
    kinds = (".py", ".md", ".toml", ".yml", ".cff")
    files = [p for p in ROOT.rglob("*") if p.suffix in kinds and not any(map(hidden, p.relative_to(ROOT).parts[:-1]))]
    assert len(files) > 8
    found = [f"{p.relative_to(ROOT)}: {m.group()}" for p in files for m in bad.finditer(p.read_text()) if "assignments" not in p.parts]
    assert not found, found
