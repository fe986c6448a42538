"""What an assignment must keep: our file passes, the blanked one fails by NotImplementedError alone, every wrong solution of mutants.toml fails.

Run:   python assignments/gates.py a1        # 10 to 40 s: a table of what each file did to the tests; exit code 1 when a gate is open
Every file is tested in a fork of one process that has imported torch already, so that a dozen of them cost little more than their tests.
"""
from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from assignments.grade import ROOT, Assignment, load, tomllib  # noqa: E402
from assignments.make import bodies, names_of, stub_of, with_bodies  # noqa: E402


def mutants(a: Assignment, source: str) -> dict[str, tuple[str, str]]:
    """Name -> (wrong file, the test that must tell it). ValueError: a change that does not apply exactly once, or lies outside of what a student
    writes, or a test that is none of the assignment's."""
    answers, files = bodies(source, names_of(a)), {}
    tests = {test.partition("::")[2]: test for problem in a.problems for test in problem.tests}
    for mutant in tomllib.loads((ROOT / "assignments" / a.name / "mutants.toml").read_text())["mutant"]:
        name, find = mutant["name"], mutant["find"]
        count = source.count(find)
        if count != 1: raise ValueError(f"{a.name}, mutant {name!r}: its text stands {count} times in {a.stage}, not once.")
        if not any(find in body for body in answers.values()): raise ValueError(f"{a.name}, mutant {name!r}: it changes no body.")
        if mutant["by"] not in tests: raise ValueError(f"{a.name}, mutant {name!r}: {mutant['by']} is no test of the assignment.")
        files[name] = source.replace(find, mutant["replace"]), tests[mutant["by"]]
    return files


def tested(a: Assignment, text: str | None, tests: list[str], first_failure: bool = False) -> list[dict]:
    """Outcomes of some tests with this text as the assignment's file, None: ours as it lies here. In a fork, which sees nothing of earlier ones."""
    import pytest
    with tempfile.TemporaryDirectory() as folder:
        outcomes, log = Path(folder) / "outcomes.jsonl", Path(folder) / "log"
        outcomes.touch()
        if text is not None:
            file = Path(folder) / "student" / a.stage
            file.parent.mkdir(parents=True)
            file.write_text(text)
        child = os.fork()
        if not child:
            code = 70
            try:
                for stream in (1, 2): os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
                os.chdir(ROOT)
                os.environ.update(OUTCOMES=str(outcomes), PYTHONDONTWRITEBYTECODE="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
                os.environ.pop("STUDENT", None)
                if text is not None: os.environ["STUDENT"] = str(Path(folder) / "student")
                code = pytest.main(["-p", "assignments.outcomes", "-p", "no:cacheprovider", "-q", "--assert=plain", *["-x"] * first_failure, *tests])
            finally: os._exit(code)
        status = os.waitpid(child, 0)[1]
        rows = [json.loads(line) for line in outcomes.read_text().splitlines()]
        if os.waitstatus_to_exitcode(status) not in (0, 1, 2) or not rows:
            raise ValueError(f"the tests of {a.name} did not run:\n{log.read_text()[-2000:]}")
        return rows


@dataclass
class Gates:
    """What the files did: complaints that must be empty, and a line each to print."""
    open: list[str]
    lines: list[str]


def run_gates(a: Assignment) -> Gates:
    """All four gates of one assignment. The pasted body needs no run: blanked and filled in again, the file must be ours to the byte."""
    source = (ROOT / a.stage).read_text()
    stub, listed, gates = stub_of(a, source), [test for problem in a.problems for test in problem.tests], Gates([], [])
    if with_bodies(stub, bodies(source, names_of(a))) != source: gates.open.append("our bodies pasted into the stub do not give our file.")

    rows = [row for row in tested(a, None, listed) if row["test"]]
    named = {row["test"].partition("[")[0] for row in rows}
    gates.open += [f"ours: {row['test']} {row['outcome']} ({row['error']}: {row['message'][:200]})" for row in rows if row["outcome"] != "passed"]
    gates.open += [f"ours: {test} did not run." for test in listed if test not in named]
    gates.lines.append(f"ours: {len(rows)} cases of {len(named)} tests pass")

    rows = [row for row in tested(a, stub, listed) if row["test"]]
    fine = [row for row in rows if row["outcome"] == "failed" and row["error"] == "NotImplementedError" and row["message"].startswith(f"{a.name}: ")]
    gates.open += [f"stub: {row['test']} {row['outcome']} ({row['error']}: {row['message'][:200]})" for row in rows if row not in fine]
    gates.open += [f"stub: {test} did not run." for test in listed if test not in {row["test"].partition("[")[0] for row in rows}]
    gates.lines.append(f"stub: {len(fine)} cases fail with NotImplementedError")

    for name, (text, test) in mutants(a, source).items():
        failed = [row for row in tested(a, text, [test], first_failure=True) if row["outcome"] == "failed"]
        if not failed: gates.open.append(f"mutant {name!r} passes {test}.")
        gates.lines.append(f"mutant {name}: {failed[0]['test'].partition('::')[2][:90] + ' fails' if failed else 'PASSES'}")
    return gates


def main() -> int:
    import torch  # noqa: F401  before the forks, which then need not
    gc.freeze()         # torch's many objects stay out of the garbage collections that pytest makes in each of them
    for name in sys.argv[1:]:
        gates = run_gates(load(name))
        print("\n".join([f"{name}:", *gates.lines, *(f"OPEN  {line}" for line in gates.open)]))
        if gates.open: return 1
    return 0


if __name__ == "__main__": sys.exit(main())
