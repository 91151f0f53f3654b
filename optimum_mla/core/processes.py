"""The processes that `torchrun` started to do one command's work together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=1)
"""Longest time that a process waits for the others. The first one also loads, measures and writes alone."""


@dataclass(frozen=True)
class Processes:
    """Processes that take the same steps on the same data, and share what takes long in each step.

    Each computes its share of the windows of a text, and all of them know the sums and the states of all windows. What
    is computed once for all windows, such as a factorization, is computed by every process.

    Attributes:
        rank: The number of this process, from 0 on.
        size: The number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Return whether this is the process that speaks and writes."""
        return self.rank == 0

    def share(self, items: Tensor) -> Tensor:
        """Return this process's share of the rows of a tensor [N, ...], which are consecutive and may be none."""
        return items[slice(*self._bounds(len(items), self.rank))]

    def gathered(self, rows: Tensor, count: int) -> Tensor:
        """Return the rows of all processes, [count, ...].

        Args:
            rows: What was made of this process's share, [n, ...].
            count: Number of rows of all shares together.
        """
        if self.size == 1:
            return rows
        found = rows.new_empty(count, *rows.shape[1:])
        for rank in range(self.size):
            part = found[slice(*self._bounds(count, rank))]
            if rank == self.rank:
                part.copy_(rows)
            if len(part):
                dist.broadcast(part, rank)
        return found

    def total(self, *sums: Tensor | float) -> tuple[Any, ...]:
        """Return the sums of tensors and of numbers over all processes, each as what was given."""
        if self.size == 1:
            return sums
        found: list[Tensor | float] = []
        for own in sums:
            # Numbers travel in the float64 of Python, through the memory of the CPU.
            tensor = own.clone() if isinstance(own, Tensor) else torch.tensor(own, dtype=torch.float64)
            dist.all_reduce(tensor)
            found.append(tensor if isinstance(own, Tensor) else type(own)(tensor.item()))
        return tuple(found)

    def told(self, value: T) -> T:
        """Return the value that the first process gives; those of the others are not used."""
        if self.size == 1:
            return value
        box = [value if self.leads else None]
        dist.broadcast_object_list(box, 0)
        return box[0]  # type: ignore[return-value]

    def _bounds(self, count: int, rank: int) -> tuple[int, int]:
        return count * rank // self.size, count * (rank + 1) // self.size


ALONE = Processes()
"""The only process of a command."""


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes of `torchrun`, if it has started this one, until the block ends.

    Where there are GPUs, each process takes that of its number on its machine.
    """
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=LONGEST_WAIT)
    yield Processes(dist.get_rank(), dist.get_world_size())
    # After an error nobody waits: torchrun ends the other processes.
    dist.destroy_process_group()
