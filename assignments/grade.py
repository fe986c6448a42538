"""Grades an assignment: runs its tests problem by problem and writes a report to read and Gradescope's results.json.

Run:   python assignments/grade.py a1                                   # the files of this folder
       python assignments/grade.py a1 --student submissions/jane        # jane's file in place of ours, the other stages as they are here
       python assignments/grade.py a1 --student /autograder/submission --results /autograder/results/results.json        # on Gradescope
Points:   those of a problem times the share of its listed tests that pass; a test with several cases passes when all of them do.
Limits:   a problem's tests run in a process of their own, with a time limit, without Python's network and with a cut output. A file that hangs,
          leaves Python, prints without end or starts processes loses the tests it did not reach, and nothing else.
Left out: protection from a file that was written to cheat. It runs in one process with its tests and could forge their results, and the files of
          this folder are within its reach: read the code of a score that surprises you, and grade files of people you do not know in a container.
"""
from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")        # Python 3.10: pytest brings tomli

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = 20_000         # ours: characters of a problem's output that are kept, half from its start and half from its end


@dataclass(frozen=True)
class Problem:
    """One entry [[problem]] of assignment.toml."""
    name: str
    blank: list[str]                # functions of the stage, or Class.method
    points: int
    tests: list[str]                # pytest ids without their parameters: tests/test_01_nvfp4.py::test_size_in_bytes_and_layout
    build: str                      # what to build
    why: str                        # what the report does with it, with its number
    target: str                     # what the measurement shows when it is right: a number or a figure
    low_resource: str               # the same where time or hardware is short
    question: str                   # to be answered in writing, from the measurement
    measure: str                    # the command of that measurement
    title: str = ""


@dataclass(frozen=True)
class Assignment:
    """assignment.toml of one folder."""
    name: str                       # of the folder: a1
    title: str
    stage: str                      # the file whose functions are blanked: 01_nvfp4.py
    about: str
    minutes_cpu: int                # to run all of its tests and measurements, on 2 CPU cores
    minutes_gpu: int                # the same on one GPU
    needs: list[str]                # assignments whose functions its tests call
    problems: list[Problem]
    seconds: int = 120              # limit on one problem's tests
    numbers: dict = field(default_factory=dict)         # $name in the texts above -> where it is in experiments/results.jsonl

    @property
    def points(self) -> int: return sum(problem.points for problem in self.problems)


def load(name: str, root: Path = ROOT) -> Assignment:
    """ValueError: no such assignment, or a manifest with a field that is missing or unknown."""
    path = root / "assignments" / name / "assignment.toml"
    if not path.exists():
        known = ", ".join(sorted(p.parent.name for p in path.parent.parent.glob("*/assignment.toml")))
        raise ValueError(f"there is no assignment {name!r}: choose from {known}.")
    fields = tomllib.loads(path.read_text())
    try: return Assignment(name=name, problems=[Problem(**problem) for problem in fields.pop("problem")], **fields)
    except (TypeError, KeyError) as error: raise ValueError(f"{path} is not a manifest: {error}.") from error


# running

class Ended(NamedTuple):
    """How a process ended and what it printed."""
    how: str            # "" when it ended by itself with exit code 0
    output: str
    seconds: float


def _drain(pipe, kept: list[bytes], cap: int) -> None:
    """Read to the end, whatever comes, and keep the first and the last half of `cap` bytes: a full pipe would stop the process for ever."""
    first, last, total = b"", b"", 0
    try:
        while chunk := pipe.read1(65536):
            total += len(chunk)
            room = cap // 2 - len(first)
            first, last = first + chunk[:max(room, 0)], (last + chunk[max(room, 0):])[-(cap // 2):]
            kept[:] = [first, b"\n[... cut ...]\n" if total > cap else b"", last]
    except (OSError, ValueError): pass         # closed from outside


def _kill(process: subprocess.Popen, mark: str) -> None:
    """The process group, then whatever left the group but still has our mark in its environment (on Linux, where /proc shows it)."""
    try: os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError): pass
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environ.read_bytes(): os.kill(int(environ.parent.name), signal.SIGKILL)
        except (OSError, ValueError): pass     # not ours, or gone by now


def run_limited(command: list[str], seconds: float, env: dict, cwd: Path = ROOT, cap: int = OUTPUT) -> Ended:
    """Run a command with a time limit; nothing that it started is left behind, and at most about `cap` bytes of its output are kept."""
    mark, kept, started = f"GRADE_RUN={uuid.uuid4()}", [], time.perf_counter()
    env = {**env, "GRADE_RUN": mark.partition("=")[2]}
    process = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    reader = threading.Thread(target=_drain, args=(process.stdout, kept, cap), daemon=True)
    reader.start()
    try:
        code = process.wait(timeout=seconds)
        how = "" if code == 0 else f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left Python with exit code {code}"
    except subprocess.TimeoutExpired:
        how = f"ran into the limit of {seconds:g} s"
    finally:
        _kill(process, mark)
        process.wait()
    reader.join(timeout=5)          # with all writers dead the pipe ends; a reader that waits even so is left alone
    return Ended(how, b"".join(kept).decode(errors="replace"), time.perf_counter() - started)


class Case(NamedTuple):
    """One listed test: its cases together."""
    test: str
    passed: bool
    why: str            # "" when it passed


class Graded(NamedTuple):
    problem: Problem
    score: float
    cases: list[Case]
    note: str           # what went wrong with the whole problem, "" when nothing did
    output: str
    seconds: float


def judged(test: str, rows: list[dict], note: str) -> Case:
    """A test passes when it was reached and each of its cases passed: a test that was skipped, by whomever, shows nothing."""
    mine = [row for row in rows if row["test"].partition("[")[0] == test]
    bad = next((row for row in mine if row["outcome"] != "passed"), None)
    if bad: return Case(test, False, f"{bad['error'] or bad['outcome']}: {bad['message'].strip().partition(chr(10))[0]}")
    # NOTE: a process that died may have died between two cases of the last test it wrote a line for
    if mine and not (note and rows[-1] in mine): return Case(test, True, "")
    return Case(test, False, next((row["message"] for row in rows if row["outcome"] == "not collected"), "not reached"))


def grade_problem(assignment: Assignment, problem: Problem, student: Path | None, root: Path = ROOT) -> Graded:
    """Run one problem's tests with the student's file in front."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.jsonl"
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "sandbox"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
               "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OUTCOMES": str(outcomes)}
        env.pop("STUDENT", None)
        if student is not None: env["STUDENT"] = str(student)
        command = [sys.executable, "-m", "pytest", "-p", "assignments.outcomes", "-p", "no:cacheprovider", "--tb=short", *problem.tests]
        ended = run_limited(command, assignment.seconds, env, root)
        rows = [json.loads(line) for line in outcomes.read_text().splitlines() if line.endswith("}")] if outcomes.exists() else []
    told = any(row["outcome"] in ("finished", "not collected") for row in rows)
    note = "" if told else f"The tests' process {ended.how or 'ended before its tests did: something in the file leaves Python'}."
    cases = [judged(test, rows, note) for test in problem.tests]
    score = round(problem.points * sum(case.passed for case in cases) / len(cases), 2)
    return Graded(problem, score, cases, note, ended.output, ended.seconds)


def grade(assignment: Assignment, student: Path, root: Path = ROOT) -> list[Graded]:
    """Every problem of an assignment. Of the student's folder only the assignment's own stage is taken: an earlier stage that is wrong, or a file
    that would hide a library's, costs nothing here. ValueError: the file is not there."""
    file = Path(student) / assignment.stage
    if not file.is_file(): file = Path(student) / file.name         # norm.py for kernels/norm.py, as uploads come without folders
    if not file.is_file(): raise ValueError(f"{assignment.stage} was not found in {student}: hand in the file under this name.")
    if file.resolve() == (root / assignment.stage).resolve():
        return [grade_problem(assignment, problem, None, root) for problem in assignment.problems]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / assignment.stage
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        return [grade_problem(assignment, problem, Path(folder), root) for problem in assignment.problems]


# reports

def as_markdown(assignment: Assignment, graded: list[Graded], error: str = "") -> str:
    total = sum(g.score for g in graded)
    lines = [f"# {assignment.name} · {assignment.title}: {total:g} of {assignment.points} points", ""]
    if error: lines += [error, ""]
    for g in graded:
        lines += [f"## {g.problem.name}: {g.score:g} of {g.problem.points} points  ({g.seconds:.0f} s)", ""]
        if g.note: lines += [g.note, ""]
        lines += [f"- {'pass' if case.passed else 'FAIL'}  `{case.test}`{'' if case.passed else ': ' + case.why}" for case in g.cases] + [""]
        if not all(case.passed for case in g.cases):
            lines += ["Again, alone:", "", f"    python -m pytest {' '.join(case.test for case in g.cases if not case.passed)}", ""]
    return "\n".join(lines)


def as_gradescope(assignment: Assignment, graded: list[Graded], error: str = "") -> dict:
    """The schema of Gradescope's autograder: a test a problem, each with its points, and what it says to the student."""
    said = lambda g: [g.note, *(f"{'pass' if case.passed else 'FAIL'} {case.test}  {case.why}".rstrip() for case in g.cases), g.output]
    tests = [dict(name=f"{assignment.name} · {g.problem.name}", score=g.score, max_score=g.problem.points, visibility="visible",
                  status="passed" if all(case.passed for case in g.cases) else "failed", output="\n".join(filter(None, said(g))))
             for g in graded]
    if error: tests = [dict(name=assignment.name, score=0, max_score=assignment.points, visibility="visible", status="failed", output=error)]
    return dict(tests=tests, execution_time=round(sum(g.seconds for g in graded), 1), visibility="visible")


@dataclass(frozen=True)
class Config:
    """Grades one assignment."""
    name: str                                   # a1, a2, ...
    student: Path | None = None                 # folder with the student's file; without it the files of this folder are graded
    results: Path | None = None                 # where to write Gradescope's results.json
    report: Path | None = None                  # where to write the report; it is printed in any case


def main(config: Config) -> int:
    """Exit code 0 whenever a report was written, whatever the score."""
    try: assignment = load(config.name)
    except ValueError as error: print(f"grade: {error}"); return 2
    student = config.student or ROOT
    graded, error = [], ""
    try: graded = grade(assignment, student)
    except ValueError as problem: error = str(problem)
    report = as_markdown(assignment, graded, error)
    print(report)
    if config.report: config.report.parent.mkdir(parents=True, exist_ok=True); config.report.write_text(report)
    if config.results:
        config.results.parent.mkdir(parents=True, exist_ok=True)
        config.results.write_text(json.dumps(as_gradescope(assignment, graded, error), indent=1))
    return 0


if __name__ == "__main__":
    import tyro
    sys.exit(main(tyro.cli(Config, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))))
