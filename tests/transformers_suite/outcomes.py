"""Run one test of Transformers on one class and say how it ended."""

from __future__ import annotations

import os
import unittest
from dataclasses import dataclass
from typing import Literal

import pytest
from transformers import set_seed

from tests.transformers_suite.families import Kind
from tests.transformers_suite.tester import case_of

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """How one test ended.

    Args:
        reason: The traceback of a failure, or why the test skipped itself; empty where it passed.
    """

    status: Status
    reason: str = ""


_KNOWN: dict[tuple[str, str, Kind, str], Outcome] = {}


def known(family: str, form: str, kind: Kind, name: str) -> Outcome | None:
    """Return how a test ended, or None where it has not run."""
    return _KNOWN.get((family, form, kind, name))


def outcome(family: str, form: str, kind: Kind, name: str) -> Outcome:
    """Run the test `name` in this process and return how it ended; each is run once."""
    key = (family, form, kind, name)
    if key not in _KNOWN:
        _KNOWN[key] = _run(*key)
    return _KNOWN[key]


def _run(family: str, form: str, kind: Kind, name: str) -> Outcome:
    """Run a test of Transformers through `unittest`, whose result tells skips from failures."""
    # Tests that would start another pytest on themselves run here instead.
    os.environ["_INSIDE_SUB_PROCESS"] = "1"
    set_seed(0)
    result = unittest.TestResult()
    try:
        case_of(family, form, kind)(name).run(result)
    except pytest.skip.Exception as skipped:
        return Outcome("skipped", str(skipped))
    finally:
        del os.environ["_INSIDE_SUB_PROCESS"]
    if result.errors or result.failures:
        return Outcome("failed", "\n".join(text for _, text in [*result.errors, *result.failures]))
    if result.skipped:
        return Outcome("skipped", "; ".join(dict.fromkeys(reason for _, reason in result.skipped)))
    return Outcome("passed")
