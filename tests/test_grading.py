"""The grader and the gates on a course of one small file: what a bad submission can do to them, and what weak tests look like."""
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
grade = importlib.import_module("assignments.grade")


def run(*command, cwd):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


STAGE = '''
def double(x):
    """2 x."""
    y = x + x
    return y


def triple(x):
    """3 x."""
    y = 3 * x
    return y
'''
TESTS = '''
import importlib
import pytest

stage = importlib.import_module("01_toy")


@pytest.mark.parametrize("x", [1, 2, 3])
def test_double(x): assert stage.double(x) == 2 * x


def test_triple(): assert stage.triple(1) == 3


def test_weak(): stage.triple(0)


def test_free(): pass
'''
MANIFEST = '''
title = "Toys"
stage = "01_toy.py"
about = "About."
minutes_cpu = 1
minutes_gpu = 1
needs = []
seconds = 4
'''
PROBLEM = '[[problem]]\nname = "{name}"\nblank = ["{name}"]\npoints = 10\ntests = {tests}\n' + "".join(
    f'{field} = "."\n' for field in ("build", "why", "target", "low_resource", "question", "measure"))


def toy(root, *problems, mutants=""):
    """A repository with one stage, one assignment and the machinery; problems: (function, tests)."""
    (root / "tests").mkdir(parents=True)
    shutil.copytree(ROOT / "assignments", root / "assignments", ignore=shutil.ignore_patterns("a[0-9]*", "__pycache__"))
    (root / "assignments" / "a1").mkdir()
    (root / "01_toy.py").write_text(STAGE)
    (root / "conftest.py").write_text("import os, sys\nsys.path.insert(0, os.environ.get('STUDENT', '.'))\n")
    (root / "tests" / "test_toy.py").write_text(TESTS)
    ids = lambda tests: json.dumps([f"tests/test_toy.py::{test}" for test in tests])
    text = MANIFEST + "".join(PROBLEM.format(name=name, tests=ids(tests)) for name, tests in problems)
    (root / "assignments" / "a1" / "assignment.toml").write_text(text)
    (root / "assignments" / "a1" / "mutants.toml").write_text(mutants)
    return grade.load("a1", root)


def mutant(name, find, replace, by): return f'[[mutant]]\nname = "{name}"\nfind = "{find}"\nreplace = "{replace}"\nby = "{by}"\n'


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the gates test every file in a fork")
def test_gates_see_a_weak_test_a_free_test_and_a_mutant_that_does_not_apply(tmp_path):
    """The gates' own alarm: without it a green run says nothing."""
    toy(tmp_path / "weak", ("double", ["test_double"]), ("triple", ["test_weak", "test_free"]),
        mutants=mutant("caught", "x + x", "x", "test_double") + mutant("missed", "3 * x", "4 * x", "test_weak"))
    done = run("assignments/gates.py", "a1", cwd=tmp_path / "weak")
    alarms = [line for line in done.stdout.splitlines() if line.startswith("OPEN")]
    assert done.returncode == 1 and len(alarms) == 2, done.stdout + done.stderr
    assert "stub: tests/test_toy.py::test_free passed" in alarms[0] and "mutant 'missed' passes tests/test_toy.py::test_weak" in alarms[1]
    for name, find, by, words in (("twice", "return y", "test_double", "stands 2 times"), ("other", "x + x", "test_triple", "is no test of the"),
                                  ("outside", "def triple", "test_double", "it changes no body")):
        toy(tmp_path / name, ("double", ["test_double"]), mutants=mutant(name, find, "pass", by))
        assert words in run("assignments/gates.py", "a1", cwd=tmp_path / name).stderr


def submit(folder, double="    return 2 * x", triple="    return 3 * x", head=""):
    folder.mkdir()
    (folder / "01_toy.py").write_text(f"import os, sys, time, socket, pytest\n{head}\ndef double(x):\n{double}\ndef triple(x):\n{triple}\n")
    return folder


BOTH = ("double", ["test_double"]), ("triple", ["test_triple", "test_weak"])


@pytest.mark.parametrize("double, why", [
    ("    while True: pass", "ran into the limit of 4 s"),
    ("    os._exit(0)", "leaves Python"),
    ("    os._exit(1)", "left Python with exit code 1"),
    ("    if x == 3: os._exit(0)\n    return 2 * x", "leaves Python"),
    ("    os.kill(os.getpid(), 9)", "killed by SIGKILL"),
    ("    sys.exit(0)", "SystemExit"),
    ("    pytest.exit('all passed', returncode=0)", "not reached"),
    ("    pytest.skip('not today')", "Skipped"),
    ("    socket.create_connection(('127.0.0.1', PORT), 1)\n    return 2 * x", "there is no network"),
    ("    open(FILE, 'wb').truncate(2**30)\n    return 2 * x", "File too large"),
], ids=["hangs", "leaves", "leaves with 1", "leaves at the last case", "kills itself", "exits", "ends pytest", "skips", "connects", "fills the disk"])
def test_a_bad_function_loses_its_own_points_only(tmp_path, double, why):
    """Whatever it does, its problem gets 0, the other one its 10, and the report says why."""
    a = toy(tmp_path / "root", *BOTH)
    with socket.create_server(("127.0.0.1", 0)) as server:         # one that would answer
        head = f"PORT = {server.getsockname()[1]}\nFILE = {str(tmp_path / 'large')!r}"
        bad, good = grade.grade(a, submit(tmp_path / "her", double, head=head), tmp_path / "root")
    report = grade.as_markdown(a, [bad, good])
    assert (bad.score, good.score) == (0, 10) and "10 of 20 points" in report and why in report, report
    assert bad.seconds < 12


@pytest.mark.parametrize("head, why", [("sys.exit(0)", "SystemExit"), ("os._exit(0)", "leaves Python"), ("while True: pass", "limit of 4 s"),
                                       ("def broken(:", "SyntaxError"), ("import no_such_library", "no_such_library")])
def test_a_file_that_cannot_be_imported_gets_a_report(tmp_path, head, why):
    """The first thing that goes wrong in a real submission."""
    a = toy(tmp_path / "root", ("triple", ["test_triple"]))
    graded = grade.grade(a, submit(tmp_path / "her", head=head), tmp_path / "root")
    assert graded[0].score == 0 and why in grade.as_markdown(a, graded) + graded[0].output


def test_megabytes_of_output_are_cut_and_cost_nothing(tmp_path):
    """40 MB, which pytest collects, and 30 MB past it: a pipe that nobody empties would stop the process, a buffer would fill the report."""
    a = toy(tmp_path / "root", ("double", ["test_double"]))
    flood = "    for _ in range(300): os.write(2, b'x' * 100_000)\n    print('y' * 10_000_000)\n    return 2 * x"
    graded = grade.grade(a, submit(tmp_path / "her", flood), tmp_path / "root")
    assert graded[0].score == 10 and len(graded[0].output) < 2 * grade.OUTPUT
    code = "import os\nfor _ in range(300): os.write(1, b'x' * 100_000)\nprint('the end')"
    loud = grade.run_limited([sys.executable, "-c", code], 20, dict(os.environ))
    assert loud.how == "" and len(loud.output) < grade.OUTPUT + 100 and "[... cut ...]" in loud.output and loud.output.endswith("the end\n")


def alive(pid: int) -> bool:
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError: return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("leave", ["pass", "os.setsid()"], ids=["in the group", "in a session of its own"])
def test_a_process_that_outlives_the_tests_is_ended(tmp_path, leave):
    """It keeps the output's pipe open, and would run on the grader's machine for ever."""
    a = toy(tmp_path / "root", ("double", ["test_double"]))
    note = tmp_path / "pid"
    fork = f"""    if not os.path.exists(NOTE) and os.fork() == 0:
        {leave}
        open(NOTE + ".new", "w").write(str(os.getpid())); os.rename(NOTE + ".new", NOTE)
        while True: os.write(1, b"still here\\n"); time.sleep(0.01)
    while not os.path.exists(NOTE): time.sleep(0.01)
    return 2 * x"""
    started = time.perf_counter()
    graded = grade.grade(a, submit(tmp_path / "her", fork, head=f"NOTE = {str(note)!r}"), tmp_path / "root")
    assert graded[0].score == 10 and time.perf_counter() - started < 10
    deadline = time.time() + 5
    while alive(int(note.read_text())) and time.time() < deadline: time.sleep(0.05)
    assert not alive(int(note.read_text()))


def test_points_are_shared_among_a_problems_tests(tmp_path):
    """Two tests, one passes: half. A test of three cases passes when all do. Gradescope gets the same numbers."""
    a = toy(tmp_path / "root", *BOTH)
    graded = grade.grade(a, submit(tmp_path / "her", "    return 2 if x == 1 else 0", "    return 4 * x"), tmp_path / "root")
    assert [g.score for g in graded] == [0, 5]
    found = grade.as_gradescope(a, graded)
    said = [(test["score"], test["max_score"], test["visibility"], test["status"]) for test in found["tests"]]
    assert said == [(0, 10, "visible", "failed"), (5, 10, "visible", "failed")]
    assert found["execution_time"] > 0 and json.loads(json.dumps(found)) == found
    assert "pass tests/test_toy.py::test_weak" in found["tests"][1]["output"] and "AssertionError" in found["tests"][1]["output"]


def test_only_the_assignments_own_file_is_taken_and_its_absence_is_said(tmp_path):
    """A random.py beside it would hide the library's; a stage under another name is the likeliest mistake of all."""
    a = toy(tmp_path / "root", *BOTH)
    folder = submit(tmp_path / "her")
    for name in ("random.py", "conftest.py", "pytest.py", "02_other.py"): (folder / name).write_text("raise SystemExit(0)")
    assert [g.score for g in grade.grade(a, folder, tmp_path / "root")] == [10, 10]
    (tmp_path / "empty").mkdir()
    done = run("assignments/grade.py", "a1", "--student", tmp_path / "empty", "--results", tmp_path / "new" / "results.json", cwd=tmp_path / "root")
    words = f"01_toy.py was not found in {tmp_path / 'empty'}"
    assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr
    found = json.loads((tmp_path / "new" / "results.json").read_text())
    assert found["tests"][0]["output"].startswith(words) and found["tests"][0]["score"] == 0 and found["tests"][0]["max_score"] == 20
    assert "choose from a1" in run("assignments/grade.py", "a7", cwd=tmp_path / "root").stdout
