"""Processes are reused, join one group, and their failures arrive with a traceback."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from tests.transformers_suite.processes import Ranks, run_distributed, start_rank_processes

pytestmark = pytest.mark.slow


def sum_of_ranks(rank: int, expected: float) -> None:
    value = torch.tensor([rank + 1.0])
    dist.all_reduce(value)
    assert value.item() == expected


def wrong_on_the_second(rank: int) -> None:
    if rank == 1:
        raise ValueError("the second rank is wrong")


def ends_on_the_first(rank: int) -> None:
    if rank == 0:
        os._exit(3)


def test_ranks_join_one_group_and_are_kept() -> None:
    run_distributed(2)(sum_of_ranks)(3.0)
    kept = Ranks.of(2)
    run_distributed(2)(sum_of_ranks)(3.0)
    assert Ranks.of(2) is kept
    with pytest.raises(RuntimeError, match="AssertionError"):
        run_distributed(2)(sum_of_ranks)(4.0)


def test_a_failure_of_one_rank_arrives() -> None:
    with pytest.raises(RuntimeError, match="the second rank is wrong"):
        start_rank_processes(wrong_on_the_second, (), 2)
    assert 2 not in Ranks.kept


def test_a_rank_that_ends_is_told() -> None:
    with pytest.raises(RuntimeError, match="A process ended"):
        start_rank_processes(ends_on_the_first, (), 2)
