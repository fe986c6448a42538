"""A pytest plugin (-p assignments.outcomes): one JSON line for every test as soon as it has ended, in the file that OUTCOMES names.

Written at once and not at the end, because the code under test may leave Python, hang or be killed: what it had passed by then is known.
"""
import json
import os

import pytest


def _write(test: str, outcome: str, error: str, message: str) -> None:
    with open(os.environ["OUTCOMES"], "a") as file:
        file.write(json.dumps(dict(test=test, outcome=outcome, error=error, message=message[:1000])) + "\n")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when != "call" and not report.failed: return          # setting up and tearing down tell nothing unless they fail
    error = call.excinfo.typename if call.excinfo else ""
    _write(item.nodeid, report.outcome, error, str(call.excinfo.value) if call.excinfo else "")


def pytest_collectreport(report):
    """A test file that cannot be imported: most often because the student's file cannot."""
    if report.failed: _write(report.nodeid, "not collected", "", str(report.longrepr).strip().splitlines()[-1])


def pytest_sessionfinish(exitstatus):
    """Without this line the tests did not come to their end; 0 and 1: all were run."""
    if exitstatus in (0, 1): _write("", "finished", "", "")
