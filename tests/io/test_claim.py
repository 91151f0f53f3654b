"""Two processes do not write one output, and a dead one blocks nobody."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from optimum_mla.core.errors import OutputError
from optimum_mla.io.claim import claims_output, hold_claim, lock_file

HOLDING = """
import sys, time
from pathlib import Path
from optimum_mla.io.claim import hold_claim
with hold_claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process, which holds the claim on `tmp_path / "out"`."""
    held = subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert held.stdout is not None
    assert held.stdout.readline() == "held\n"
    yield held
    held.kill()
    held.wait()


def test_the_second_process_is_refused_until_the_first_dies(other: subprocess.Popen[str], tmp_path: Path) -> None:
    calls = []

    @claims_output()
    def command(model: str, output: Path) -> None:
        calls.append(model)

    with pytest.raises(OutputError, match=r"output: another process is writing .*/out\. Wait until it is done"):
        command("first", output=tmp_path / "out")
    command("second", tmp_path / "beside")
    assert calls == ["second"]
    assert list(tmp_path.iterdir()) == []

    other.kill()  # as the system does where memory runs out
    other.wait()
    command("third", tmp_path / "link" / ".." / "out")
    assert calls == ["second", "third"]


def test_a_claim_ends_with_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), hold_claim(tmp_path):
            raise ZeroDivisionError
    assert lock_file(tmp_path) != lock_file(tmp_path / "out")


def test_only_the_writing_process_of_a_distributed_run_claims(
    other: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = claims_output(distributed=True)(lambda output: "ran")
    monkeypatch.setenv("RANK", "1")
    assert command(tmp_path / "out") == "ran"
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(OutputError):
        command(tmp_path / "out")


def test_commands_of_one_process_refuse_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = claims_output()(lambda output: "ran")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OutputError, match=r"all write .*/out\. Start this command without torchrun"):
        command(tmp_path / "out")
