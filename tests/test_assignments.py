"""The assignments: what is blanked, what their tests tell, and what a course repository must not hold."""
import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
grade, make = (importlib.import_module(f"assignments.{name}") for name in ("grade", "make"))
NAMES = [a.name for a in make.all_assignments()]
UNWRITTEN = "Not" + "ImplementedError"       # in two parts: the suite looks for stubs by this word


def run(*command, cwd=ROOT, **env):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **env})


# --- manifests and generated files

@pytest.mark.skipif(not hasattr(os, "fork"), reason="the gates test every file in a fork")
@pytest.mark.parametrize("name", NAMES)
def test_gates(name):
    """Ours passes, the stub fails for its missing bodies alone, every wrong solution fails: else points are given away, or refused."""
    done = run("assignments/gates.py", name)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert sum(line.startswith("mutant ") and line.endswith("fails") for line in done.stdout.splitlines()) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_handouts_are_what_the_manifest_and_the_stage_say(name):
    """A docstring, a measured number or a test id that changed: run `python assignments/make.py`."""
    assert (ROOT / "assignments" / name / "HANDOUT.md").read_text() == make.handout(make.load(name))


@pytest.mark.parametrize("name", NAMES)
def test_manifests_add_up(name):
    """100 points; a function is blanked once; earlier assignments only are needed."""
    a = make.load(name)
    blank = make.names_of(a)
    assert a.points == 100 and len(set(blank)) == len(blank) and all(p.tests and p.blank for p in a.problems)
    assert set(a.needs) <= set(NAMES) and all(other < name for other in a.needs)


SOURCE = '''
import os

# kept: above
@decorated
def first(a: int = (1), b: dict = {"x": 2},     # kept: in the signature
          c: int = 3) -> dict[str, int]:
    """Kept.

    Kept too.
    """
    # gone: a comment that tells
    def inner(): return a
    return {"b": inner()}

# kept: between

class Box:
    """Kept."""
    x: int = 0
    def value(self) -> int:
        y = self.x       # gone
        return y

    def other(self): return 2
def value(): return 1
'''


def test_blanking_changes_bodies_and_nothing_else():
    """Text outside a body equals ours to the byte, comments that give the answer away go, and pasting is the way back."""
    stub = make.blanked(SOURCE, ["first", "Box.value"], "a9")
    assert stub == SOURCE.replace('''    # gone: a comment that tells
    def inner(): return a
    return {"b": inner()}
''', '    raise UNWRITTEN("a9: first")\n'.replace("UNWRITTEN", UNWRITTEN)).replace('''        y = self.x       # gone
        return y
''', '        raise UNWRITTEN("a9: Box.value")\n'.replace("UNWRITTEN", UNWRITTEN))
    assert make.with_bodies(stub, make.bodies(SOURCE, ["first", "Box.value"])) == SOURCE
    for wrong, words in (("missing", "0 times"), ("Box.other", "no body"), ("value", "no body"), ("Bag.value", "0 times")):
        with pytest.raises(ValueError, match=words): make.blanked(SOURCE, [wrong], "a9")


# --- the student's file in front

def test_the_students_stage_is_the_one_that_every_later_stage_imports(tmp_path):
    """A hook that came after the first import, or only for the tests' own import, would grade our file."""
    (tmp_path / "hers").mkdir()
    (tmp_path / "hers" / "01_nvfp4.py").write_text((ROOT / "01_nvfp4.py").read_text() + "\nHERS = True\n")
    (tmp_path / "test_hers.py").write_text("import importlib\ndef test_hers():\n    assert importlib.import_module('03_latentmoe').nvfp4.HERS\n")
    command = ("-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-q", tmp_path / "test_hers.py")
    done = run(*command, STUDENT=str(tmp_path / "hers"))
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_a_folder_without_a_stage_is_named(monkeypatch, tmp_path):
    """Else every test would pass, on our file."""
    conftest = importlib.import_module("conftest")
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(pytest.UsageError, match="holds no stage"): conftest.put_student_first(tmp_path)
    (tmp_path / "01_quantizer.py").touch()
    with pytest.raises(pytest.UsageError, match="01_quantizer.py, which is no stage"): conftest.put_student_first(tmp_path)


# --- the course repository

@pytest.fixture(scope="module")
def course(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course") / "repository"
    make.export(folder, make.all_assignments())
    return folder


def test_the_course_holds_no_answers(course, tmp_path):
    """No body that a student writes, no wrong solutions, no history, nothing compiled; and the search finds an answer that is there."""
    files = {str(p.relative_to(course)) for p in course.rglob("*") if p.is_file()}
    assert not [f for f in files if any(bad in f for bad in ("mutants", ".git/", ".pyc", "make.py", "gates.py", "test_assignments.py"))]
    assert {"README.md", "conftest.py", "pyproject.toml", "assignments/grade.py", "08_infer.py", "assignments/sandbox/sitecustomize.py"} <= files
    for a in make.all_assignments():
        answers = make.bodies((ROOT / a.stage).read_text(), make.names_of(a))
        assert not make.answers_in(course, answers)
        for name, body in answers.items():
            code = [line.split("  # ")[0].strip() for line in body.splitlines() if not line.strip().startswith("#")]
            long = len(code) >= 3 and min(len("".join(line.split())) for line in code if line) > 40
            (tmp_path / "notes.md").write_text("My notes\n" + body.replace("    ", "  ") + "\nMore")
            assert bool(make.answers_in(tmp_path, {name: body})) or not long, name
    (tmp_path / "full").mkdir(); (tmp_path / "full" / "old.py").touch()
    with pytest.raises(ValueError, match="not empty"): make.export(tmp_path / "full", make.all_assignments())


def test_a_students_first_problem_in_the_course(course):
    """0 points at first, since nothing is written, all of them with the first problem solved in place, as a student does it."""
    a = grade.load(NAMES[0], course)
    before = grade.grade_problem(a, a.problems[0], None, course)
    assert before.score == 0 and all(case.why.startswith(f"{UNWRITTEN}: {a.name}: ") for case in before.cases)
    ours, stub = (ROOT / a.stage).read_text(), (course / a.stage).read_text()
    try:
        (course / a.stage).write_text(make.with_bodies(stub, make.bodies(ours, a.problems[0].blank)))
        assert grade.grade_problem(a, a.problems[0], None, course).score == a.problems[0].points
    finally: (course / a.stage).write_text(stub)


def test_start_blanks_a_file_here_and_overwrites_none(tmp_path):
    """A second call must not wipe out a week of work."""
    config = replace(make.Config(), start=NAMES[0], to=tmp_path / "mine")
    make.main(config)
    a = make.load(NAMES[0])
    assert (tmp_path / "mine" / a.stage).read_text() == make.stub_of(a) != (ROOT / a.stage).read_text()
    with pytest.raises(ValueError, match="exists already"): make.main(config)
