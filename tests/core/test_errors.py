"""Errors say what is wrong and what to do, and the command line prints each as one line with exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimum_mla.cli import BAD_INPUT, exit_on_bad_input
from optimum_mla.core import errors
from optimum_mla.core.errors import InvalidValueError, MissingDependencyError, MLAError

KINDS = sorted(
    (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MLAError)),
    key=lambda kind: kind.__name__,
)
"""Every kind of error of the package; a new one is in it by itself."""


def test_a_bad_value_is_told_with_field_value_range_and_remedy() -> None:
    error = InvalidValueError("kv_lora_rank", 900, "1 to 512 for this model", "Lower it.")
    assert str(error) == "kv_lora_rank: got 900, allowed: 1 to 512 for this model. Lower it."
    assert (error.field, error.received, error.remedy) == ("kv_lora_rank", 900, "Lower it.")
    assert str(InvalidValueError("dtype", "int3", "float32")) == "dtype: got 'int3', allowed: float32."


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_command_line_prints_one_line_and_exits_with_two(
    kind: type[MLAError], capsys: pytest.CaptureFixture[str]
) -> None:
    made = {
        InvalidValueError: lambda: InvalidValueError("rank", 9, "1 to 8", "Lower it."),
        MissingDependencyError: lambda: MissingDependencyError("trl", "train", "train with DPO"),
    }
    error = made.get(kind, lambda: kind("model: it is broken.\n  Repair it."))()
    with pytest.raises(SystemExit) as exit_, exit_on_bad_input():
        raise error
    assert exit_.value.code == BAD_INPUT == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == f"error: {' '.join(str(error).split())}\n"
    assert told.err.count("\n") == 1


def test_other_errors_are_not_taken_for_bad_input() -> None:
    with pytest.raises(ZeroDivisionError), exit_on_bad_input():
        raise ZeroDivisionError


def test_ctrl_c_says_what_was_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_, exit_on_bad_input("half of it was written"):
        raise KeyboardInterrupt
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "interrupted: half of it was written\n"


def test_a_missing_package_names_the_extra_that_brings_it() -> None:
    error = MissingDependencyError("trl", "train", "train with DPO")
    assert str(error) == "trl is needed to train with DPO. Install it with: pip install 'optimum-mla[train]'"


def test_a_lack_of_memory_is_bad_input_and_other_errors_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    for lacking in (lambda: torch.empty(2**60), lambda: torch.empty(2**62, 2**62), lambda: bytearray(2**62)):
        with pytest.raises(SystemExit) as exit_, exit_on_bad_input():
            lacking()
        assert exit_.value.code == BAD_INPUT
        line = capsys.readouterr().err
        assert line.startswith("error: there is not enough memory (")
        assert line.count("\n") == 1
    with pytest.raises(RuntimeError, match="shapes"), exit_on_bad_input():
        raise RuntimeError("shapes do not match")


def test_of_several_processes_the_first_one_says_what_is_wrong(tmp_path: Path) -> None:
    script = tmp_path / "bad.py"
    script.write_text(
        "import os\n"
        "from optimum_mla import cli\n"
        "from optimum_mla.core.errors import InvalidValueError\n"
        "with cli.exit_on_bad_input():\n"
        "    raise InvalidValueError('kv_cache_budget', 7.0, 'above 0, up to 0.5')\n"
    )
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", str(script)]
    done = subprocess.run(start, capture_output=True, text=True)
    line = "error: kv_cache_budget: got 7.0, allowed: above 0, up to 0.5."
    assert done.returncode == 1  # that of torchrun
    ours, _, theirs = done.stderr.partition("Traceback")
    assert [said for said in ours.splitlines() if "error: " in said] == [line]
    # torchrun names the cause at the end of its report.
    assert theirs.count(line) == 1
    assert f"traceback : {line}" in theirs
    assert theirs.index("Root Cause") < theirs.index(line)


def test_a_process_that_fails_alone_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("optimum_mla.cli.ALONE_SECONDS", 0.0)
    monkeypatch.setattr("optimum_mla.cli.quiet_libraries", lambda: None)  # Later tests read the log.
    report = tmp_path / "error.json"
    for name, value in (("TORCHELASTIC_RUN_ID", "1"), ("RANK", "2"), ("TORCHELASTIC_ERROR_FILE", str(report))):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit_, exit_on_bad_input():
        raise MLAError("model: it is not here.")
    assert exit_.value.code == BAD_INPUT
    assert capsys.readouterr().err == "process 2: error: model: it is not here.\n"
    assert json.loads(report.read_text())["message"]["message"] == "process 2: error: model: it is not here."
