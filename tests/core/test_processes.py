"""What the processes of one command share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.core.processes import ALONE

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]

COLLECTIVES = """
import torch
from optimum_mla.core.processes import joined_processes
torch.manual_seed(0)
items = [torch.randn(3) * 10.0**place for place in range(5)]
def work(item):
    return item.double() * 0.1, float(item.sum()), len(item)
with joined_processes() as processes:
    done = []
    def counted(item):
        done.append(item)
        return work(item)
    found = list(processes.each(items, counted))
    assert [part[1:] for part in found] == [work(item)[1:] for item in items]
    assert all(torch.equal(part[0], work(item)[0]) for part, item in zip(found, items))
    assert len(done) == (3, 2)[processes.rank]  # in turn
    expected = [0.0, 0.0, 0]
    for item in items:
        expected = [have + term for have, term in zip(expected, work(item))]
    total = processes.summed(items, work)
    assert torch.equal(total[0], expected[0]) and total[1:] == tuple(expected[1:]) and type(total[2]) is int
    assert list(processes.each([], work)) == []
    assert processes.broadcast({"rank": processes.rank}) == {"rank": 0}
    assert processes.leads == (processes.rank == 0) and processes.size == 2
    print("passed", flush=True)
"""


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12))
def test_one_process_does_all_in_order(items: list[float]) -> None:
    found = list(ALONE.each(items, lambda item: (torch.tensor([item]), item)))
    assert [number for _, number in found] == items
    expected = items[0]
    for item in items[1:]:
        expected += item
    tensor, number, count = ALONE.summed(items, lambda item: (torch.tensor([item], dtype=torch.float64), item, 1))
    assert (float(tensor), number, count) == (expected, expected, len(items))
    assert ALONE.broadcast("word") == "word"


def test_two_processes_give_what_one_does_to_the_last_bit(tmp_path: Path) -> None:
    script = tmp_path / "collectives.py"
    script.write_text(COLLECTIVES, encoding="utf-8")
    done = subprocess.run([*TORCHRUN, "2", str(script)], capture_output=True, text=True)
    assert done.stdout.count("passed") == 2, done.stderr[-3000:]
