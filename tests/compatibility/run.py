"""Run the compatibility subset in the environment of this Python, and write down what was tested with what.

    python -m tests.compatibility.run oldest   # from the environment with the lowest versions
    python -m tests.compatibility.run newest   # from the environment with the newest ones

A run that passes replaces its entry in docs/compatibility.json and the table in docs/compatibility.md; a run that fails
leaves both as they are.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.compatibility.requirements import direct_requirements

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "docs" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- the table begins -->", "<!-- the table ends -->"
ENVIRONMENTS = ("oldest", "newest")
# Transformers' own tests need its source distribution, and compare with one release at a time: `make test` runs them.
SUBSET = ["-m", "compat and not slow", "tests", "--ignore=tests/transformers_suite"]


class Counter:
    """A pytest plugin that counts tests by their outcome."""

    def __init__(self) -> None:
        self.counts = {"passed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test that passed by its call, and a skipped one by whichever phase skipped it."""
        if report.skipped or (report.passed and report.when == "call"):
            self.counts[report.outcome] += 1


def installed() -> dict[str, str]:
    """Return the versions of Python and of every direct dependency in this environment."""
    # A local label such as `+cpu` names a build, not a version.
    packages = {name: version(name).partition("+")[0] for name in direct_requirements("test")}
    return {"python": platform.python_version(), **packages}


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table of a result: one row per package, one column per environment, tests in the last row."""
    columns = [name for name in ENVIRONMENTS if name in result]
    first = ("python", "torch", "transformers")
    names = [*first, *sorted({name for column in columns for name in result[column]["versions"]} - set(first))]
    rows = [["package", *columns], ["---"] * (len(columns) + 1)]
    rows += [[name, *(result[column]["versions"].get(name, "") for column in columns)] for name in names]
    rows.append(["tests passed", *(str(result[column]["passed"]) for column in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_table(page: str, result: dict[str, Any]) -> str:
    """Return a page with the table of a result between its two marker comments."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{table(result)}\n{END}{after}"


def main() -> int:
    """Run the subset, write the result where it passes, and return pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("environment", choices=ENVIRONMENTS)
    arguments, options = parser.parse_known_args()  # the rest are pytest's own
    counter = Counter()
    code = pytest.main([*SUBSET, *options], plugins=[counter])
    if code == pytest.ExitCode.OK:
        result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
        result[arguments.environment] = {"versions": installed(), **counter.counts}
        RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
