"""The processes that `torchrun` started to do one command's work together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor

from optimum_mla.core.progress import progress

T = TypeVar("T")
Terms = tuple[Any, ...]
"""Tensors and numbers that one piece of work gives."""

LONGEST_WAIT = timedelta(days=1)
"""Longest time that a process waits for the others. The first one also loads, measures and writes alone."""


@dataclass(frozen=True)
class Processes:
    """Processes that take the same steps on the same data, and share what takes long in each step.

    Each computes some batches of the windows of a text, and all of them know what all batches give. What is computed
    once for all windows, such as a factorization, is computed by every process.

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

    def each(self, items: Sequence[T], work: Callable[[T], Terms]) -> Iterator[Terms]:
        """Yield what `work` gives for each item, in the order of the items, in every process.

        The processes take turns with the items. So what is made of the results does not depend on their number, to the
        last bit: codes and the order of channels follow from differences that are as small as that.

        Args:
            items: The items, the same in every process.
            work: Returns tensors and numbers for an item.
        """
        for start in range(0, len(items), self.size):
            turn = items[start : start + self.size]
            own = work(turn[self.rank]) if self.rank < len(turn) else ()
            for rank in range(len(turn)):
                yield own if self.size == 1 else self._sent(own, rank)

    def summed(self, items: Sequence[T], work: Callable[[T], Terms], title: str | None = None) -> Terms:
        """Return the sums, over all items in their order, of the tensors and numbers that `work` gives for each.

        Args:
            items: The items, of which there is one at least.
            work: Returns the tensors and numbers of an item, as for `each`.
            title: What the progress of this is called; None shows none.
        """
        parts = self.each(items, work)
        numbers: Iterable[int] = range(len(items))
        total: list[Any] = []
        for number, part in zip(numbers if title is None else progress(numbers, title, main=True), parts, strict=True):
            total = list(part) if not number else [have + term for have, term in zip(total, part, strict=True)]
        return tuple(total)

    def broadcast(self, value: T, sender: int = 0) -> T:
        """Return the value that one process gives in every process; those of the others are not used.

        Args:
            value: A value that can be pickled.
            sender: The number of the process that gives it.
        """
        if self.size == 1:
            return value
        return broadcast_object_list([value if self.rank == sender else None], sender)[0]  # type: ignore[no-any-return]

    def _sent(self, terms: Terms, sender: int) -> Terms:
        """Return the tensors and numbers of one process, each on the device that they have there.

        Tensors go from device to device, without the copies that pickling makes.
        """
        forms = [(x.shape, x.dtype, x.device.type) if isinstance(x, Tensor) else x for x in terms]
        forms = self.broadcast(forms, sender)
        if self.rank != sender:
            terms = tuple(torch.empty(x[0], dtype=x[1], device=x[2]) if isinstance(x, tuple) else x for x in forms)
        return tuple(broadcast(x.contiguous(), sender) if isinstance(x, Tensor) else x for x in terms)


ALONE = Processes()
"""The only process of a command."""


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes of `torchrun`, if it has started this one, until the block ends.

    Where there are GPUs, each process takes that of its number on its machine.
    """
    if not torch.distributed.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    gpus = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    state = PartialState(cpu=not gpus, backend=backend, timeout=LONGEST_WAIT)
    yield Processes(state.process_index, state.num_processes)
    # Not in a `finally`: after an error nobody waits, because torchrun ends the other processes.
    state.destroy_process_group()
