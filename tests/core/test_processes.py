"""What the processes of one command share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.core.processes import ALONE, Processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]

COLLECTIVES = """
import torch
from optimum_mla.core.processes import joined_processes
with joined_processes() as processes:
    rows = torch.arange(10.0).view(5, 2)
    own = processes.share(rows)
    assert torch.equal(processes.gathered(own + 1, 5), rows + 1)
    assert torch.equal(processes.gathered(processes.share(rows[:1]), 1), rows[:1])
    found = processes.total(own.sum(0).double(), float(len(own)), len(own))
    assert found[0].tolist() == [20.0, 25.0] and found[1:] == (5.0, 5) and type(found[2]) is int
    assert processes.told({"rank": processes.rank}) == {"rank": 0}
    assert processes.leads == (processes.rank == 0) and processes.size == 2
    print("passed", flush=True)
"""


@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_are_all_rows_once(rows: int, size: int) -> None:
    shares = [Processes(rank, size).share(torch.arange(rows)) for rank in range(size)]
    assert torch.cat(shares).tolist() == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_keeps_what_it_has() -> None:
    rows = torch.randn(3, 2)
    assert torch.equal(ALONE.share(rows), rows)
    assert ALONE.gathered(rows, 3) is rows
    assert ALONE.total(rows, 2)[1] == 2
    assert ALONE.told("word") == "word"


def test_two_processes_gather_and_add_up(tmp_path: Path) -> None:
    script = tmp_path / "collectives.py"
    script.write_text(COLLECTIVES, encoding="utf-8")
    done = subprocess.run([*TORCHRUN, "2", str(script)], capture_output=True, text=True)
    assert done.stdout.count("passed") == 2, done.stderr[-3000:]
