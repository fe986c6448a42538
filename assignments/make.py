"""Makes assignments out of the stages: blanked files, handouts, and a course repository without the answers.

Run:   python assignments/make.py                       # writes every HANDOUT.md anew
       python assignments/make.py --check               # exit code 1 when a committed handout is not what would be written
       python assignments/make.py --start a1 --to mine  # mine/01_nvfp4.py with the functions of a1 blanked; then STUDENT=mine python -m pytest ...
       python assignments/make.py --export DIR          # a repository for students, all assignments blanked;  --only a6: no other one
       python assignments/make.py --export DIR --prove  # and, 3 min: the student's first command there, then every assignment solved in place
A manifest assignments/aN/assignment.toml names the functions. Nothing is copied by hand: what a student gets is the stage's own text, in which the
body of each function is one line that raises NotImplementedError. mutants.toml beside it holds wrong solutions that the tests must tell.
"""
from __future__ import annotations

import ast
import io
import json
import re
import shutil
import string
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from assignments.grade import ROOT, Assignment, Problem, as_markdown, grade_problem, load  # noqa: E402

STUB = 'raise NotImplementedError("{label}: {name}")\n'


class Span(NamedTuple):
    """Where a function's body stands in the text: lines first .. last, counted from 1, docstring left out; indent of its first line."""
    first: int
    last: int
    indent: int


def signature_end(lines: list[str], node: ast.FunctionDef) -> int:
    """The line with the colon that ends `def f(...) -> ...:`."""
    depth, tokens = 0, tokenize.generate_tokens(io.StringIO("".join(lines[node.lineno - 1:])).readline)
    for token in tokens:
        depth += (token.string in "([{") - (token.string in ")]}") if token.type == tokenize.OP else 0
        if token.type == tokenize.OP and token.string == ":" and depth == 0: return node.lineno + token.start[0] - 1
    raise ValueError(f"{node.name} has no end of its signature.")


def find_function(tree: ast.Module, name: str) -> ast.FunctionDef:
    """`name` or `Class.name`. ValueError: not there, or there twice."""
    *owner, short = name.split(".")
    scope = next((n.body for n in tree.body if owner and isinstance(n, ast.ClassDef) and n.name == owner[0]), [] if owner else tree.body)
    found = [n for n in scope if isinstance(n, ast.FunctionDef) and n.name == short]
    if len(found) != 1: raise ValueError(f"{name} is defined {len(found)} times: a manifest names functions, or methods as Class.method.")
    return found[0]


def body_span(source: str, name: str) -> Span:
    node, lines = find_function(ast.parse(source), name), source.splitlines(keepends=True)
    documented = ast.get_docstring(node) is not None
    first = (node.body[0].end_lineno if documented else signature_end(lines, node)) + 1
    if documented and len(node.body) == 1 or first > node.end_lineno:
        raise ValueError(f"{name} has no body on lines of its own: it cannot be blanked.")
    return Span(first, node.end_lineno, node.col_offset + 4)


def bodies(source: str, names: list[str]) -> dict[str, str]:
    """The text of each function's body: the answers."""
    lines = source.splitlines(keepends=True)
    return {name: "".join(lines[span.first - 1:span.last]) for name in names for span in [body_span(source, name)]}


def with_bodies(source: str, new: dict[str, str]) -> str:
    """The source with other bodies; every line outside of them is as it was."""
    lines = source.splitlines(keepends=True)
    for name, span in sorted(((name, body_span(source, name)) for name in new), key=lambda item: -item[1].first):
        lines[span.first - 1:span.last] = [new[name]]
    return "".join(lines)


def blanked(source: str, names: list[str], label: str) -> str:
    """Signature, docstring and all other text stay; the body becomes one line that raises NotImplementedError."""
    return with_bodies(source, {name: " " * body_span(source, name).indent + STUB.format(label=label, name=name) for name in names})


def names_of(assignment: Assignment) -> list[str]: return [name for problem in assignment.problems for name in problem.blank]


def stub_of(assignment: Assignment, source: str | None = None) -> str:
    return blanked((ROOT / assignment.stage).read_text() if source is None else source, names_of(assignment), assignment.name)


def all_assignments() -> list[Assignment]:
    return [load(path.parent.name) for path in sorted((ROOT / "assignments").glob("a*/assignment.toml"))]


# handouts

def looked_up(where: list, rows: list[dict]) -> str:
    """["01_nvfp4", "db", "NVFP4 nearest, Gaussian", "{:.2f}"]: the newest row of a stage that has the fields, the way to the number, its format.
    A table behind the stage names values that the row must have: ["bench_kernels", {case = "..."}, "floor_ms", "{}"]."""
    stage, *way, form = where
    wanted = way.pop(0) if isinstance(way[0], dict) else {}
    for row in reversed(rows):
        if row["stage"] != stage or any(row.get(key) != value for key, value in wanted.items()): continue
        value = row
        for key in way: value = value.get(key) if isinstance(value, dict) else None
        if value is not None: return form.format(value)
    raise ValueError(f"no result row of {stage} holds {' / '.join(way)}: run experiments/record.py, or mend the manifest.")


def given(source: str, names: list[str]) -> str:
    """What a student finds in the file for these functions: signature and docstring."""
    stub, parts = blanked(source, names, ""), []
    lines = stub.splitlines()
    for name in names:
        node = find_function(ast.parse(stub), name)
        indent = " " * node.col_offset
        owner = [f"class {name.split('.')[0]}:", "    ..."] if "." in name else []
        parts.append("\n".join([*owner, *(line.removeprefix(indent) if not owner else line for line in lines[node.lineno - 1:node.end_lineno - 1])]))
    return "\n\n".join(parts)


def section_of(source: str, name: str) -> str:
    """The heading `# %% 4 · Two-level scales` above a function."""
    line = find_function(ast.parse(source), name).lineno
    headings = [text.removeprefix("# %% ") for text in source.splitlines()[:line] if text.startswith("# %% ")]
    return f"“{headings[-1]}”" if headings else "the file"        # of a kernel, which is one section


def problem_text(a: Assignment, problem: Problem, number: int, source: str, template: str, texts) -> str:
    where = dict.fromkeys(section_of(source, name) for name in problem.blank)
    fields = dict(number=number, title=problem.title or problem.name, points=problem.points, build=texts(problem.build), why=texts(problem.why),
                  sections=", ".join(where), code=given(source, problem.blank), tests=" \\\n        ".join(problem.tests),
                  target=texts(problem.target), low_resource=texts(problem.low_resource), question=texts(problem.question), measure=problem.measure)
    return string.Template(template).substitute({key: str(value).strip() for key, value in fields.items()})


def handout(a: Assignment) -> str:
    """HANDOUT.md of an assignment, from assignments/HANDOUT.md, the manifest, the stage and the result rows."""
    rows = [json.loads(line) for line in (ROOT / "experiments" / "results.jsonl").read_text().splitlines()]
    numbers = {name: looked_up(where, rows) for name, where in a.numbers.items()}
    texts = lambda text: string.Template(text.strip()).substitute(numbers)
    source = (ROOT / a.stage).read_text()
    whole, one = (ROOT / "assignments" / "HANDOUT.md").read_text().split("<!-- problem -->\n")
    needs = f" Its tests call what you wrote in {', '.join(a.needs)}." if a.needs else ""
    problems = "\n".join(problem_text(a, problem, i + 1, source, one, texts) for i, problem in enumerate(a.problems))
    return string.Template(whole).substitute(name=a.name, title=a.title, about=texts(a.about), stage=a.stage, points=a.points, needs=needs,
                                             minutes_cpu=a.minutes_cpu, minutes_gpu=a.minutes_gpu, count=len(names_of(a)), problems=problems)


# the course repository

def used_tests(assignments: list[Assignment]) -> list[Path]:
    """The test files that manifests name and the helpers in tests/ that these import."""
    files = {ROOT / test.partition("::")[0] for a in assignments for problem in a.problems for test in problem.tests}
    helpers = {p.stem: p for p in (ROOT / "tests").glob("*.py")}
    for file in list(files):
        files |= {helpers[name] for name in re.findall(r"(?:import|from) (\w+)", file.read_text()) if name in helpers}
    return sorted(files)


def answers_in(folder: Path, answers: dict[str, str]) -> list[str]:
    """Where three lines of an answer in a row, at least 100 characters of code, stand in a text file below a folder: "file: function".
    Layout does not count; comments and blank lines are left out on both sides."""
    strip = lambda text: [line for line in ("".join(raw.split("  # ")[0].split()) for raw in text.splitlines()) if line and not line.startswith("#")]
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try: text = "\n".join(strip(path.read_text()))
        except UnicodeDecodeError: continue
        for name, body in answers.items():
            lines = strip(body)
            runs = ["\n".join(lines[i:i + 3]) for i in range(max(1, len(lines) - 2))]
            if any(len(run) >= 100 and run in text for run in runs): found.append(f"{path.relative_to(folder)}: {name}")
    return found


def export(target: Path, assignments: list[Assignment]) -> None:
    """A repository without the answers. ValueError: the folder holds something already, or an answer has slipped in."""
    if target.exists() and any(target.iterdir()): raise ValueError(f"{target} is not empty: choose a new folder, or older files are handed out.")
    # PITFALL: a list of what goes in, not of what stays out. Compiled files, .git, mutants and whatever is added next year are answers too.
    files = [*ROOT.glob("0[1-8]_*.py"), *(ROOT / name for name in ("conftest.py", "pyproject.toml", "constraints-cpu.txt", "LICENSE", ".gitignore")),
             *(ROOT / "kernels").glob("*.py"), *(ROOT / "data").rglob("*.py"), *used_tests(assignments),
             *(ROOT / "experiments" / f"{name}.py" for name in ("serving", "plot_model", "plot_run", "bench_kernels")),     # stages call these
             *(ROOT / "assignments" / name for name in ("grade.py", "outcomes.py", "sandbox/sitecustomize.py")),
             *(ROOT / "assignments" / a.name / name for a in assignments for name in ("assignment.toml", "HANDOUT.md"))]
    for file in files:
        to = target / file.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, to)
    answers = {}
    for a in assignments:
        answers.update(bodies((ROOT / a.stage).read_text(), names_of(a)))
        (target / a.stage).write_text(stub_of(a, (target / a.stage).read_text()))
    listed = "\n".join(f"| [{a.name}](assignments/{a.name}/HANDOUT.md) | {a.title} | `{a.stage}` | {a.points} | {', '.join(a.needs) or 'nothing'} |"
                       for a in assignments)
    course = string.Template((ROOT / "assignments" / "COURSE.md").read_text())
    (target / "README.md").write_text(course.substitute(first=assignments[0].name, assignments=listed))
    if leaks := answers_in(target, answers): raise ValueError(f"answers are in what was exported: {'; '.join(leaks)}. Do not hand {target} out.")


def prove(target: Path, assignments: list[Assignment]) -> None:
    """What a student meets in the exported folder: the first command gives 0 points for missing bodies alone; and with the answers put in place,
    those of an assignment and of what it needs and no others, every assignment gives all of its points. ValueError: otherwise."""
    first, stubs = assignments[0], {a.stage: (target / a.stage).read_text() for a in assignments}
    command = [sys.executable, "assignments/grade.py", first.name]
    report = subprocess.run(command, cwd=target, capture_output=True, text=True).stdout
    failed = [line for line in report.splitlines() if line.startswith("- ")]
    missing = [line for line in failed if f"NotImplementedError: {first.name}: " in line]
    if f": 0 of {first.points} points" not in report or not failed or missing != failed: raise ValueError(f"the first command printed\n{report}")
    print(f"python {' '.join(command[1:])}: {report.splitlines()[0].removeprefix('# ')}, {len(failed)} tests wait for their functions")
    for a in assignments:
        for other in [load(name) for name in a.needs if name in {b.name for b in assignments}] + [a]:
            answers = bodies((ROOT / other.stage).read_text(), names_of(other))
            (target / other.stage).write_text(with_bodies(stubs[other.stage], answers))
        graded = [grade_problem(a, problem, None, target) for problem in a.problems]
        for stage, text in stubs.items(): (target / stage).write_text(text)
        if any(g.score < g.problem.points for g in graded): raise ValueError(f"{a.name}, solved, in the exported folder:\n{as_markdown(a, graded)}")
        print(f"{a.name} solved: {sum(g.score for g in graded):g} points in {sum(g.seconds for g in graded):.0f} s")


@dataclass(frozen=True)
class Config:
    """Makes assignments out of the stages."""
    check: bool = False             # compare the committed handouts, write nothing
    export: Path | None = None      # a new folder for the course repository
    only: str | None = None         # with --export: one assignment, the other stages whole
    prove: bool = False             # with --export: try there what a student will
    start: str | None = None        # an assignment whose blanked stage you want to work on here
    to: Path = Path("mine")         # with --start: the folder for it


def main(config: Config) -> None:
    assignments = all_assignments()
    if config.export:
        handed = [load(config.only)] if config.only else assignments
        export(config.export, handed)
        if config.prove: prove(config.export, handed)
        return print(f"{config.export} is ready: {len(list(config.export.rglob('*.*')))} files, no answers.")
    if config.start:
        a = load(config.start)
        file = config.to / a.stage
        if file.exists(): raise ValueError(f"{file} exists already and is not overwritten: choose another folder with --to.")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(stub_of(a))
        return print(f"{file} has {len(names_of(a))} functions to write.\n    STUDENT={config.to} python -m pytest {a.problems[0].tests[0]}")
    for a in assignments:
        path, text = ROOT / "assignments" / a.name / "HANDOUT.md", handout(a)
        if not config.check: path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            raise ValueError(f"{path.relative_to(ROOT)} is out of date: run python assignments/make.py.")


if __name__ == "__main__":
    import tyro
    try: main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error: sys.exit(f"make: {error}")
