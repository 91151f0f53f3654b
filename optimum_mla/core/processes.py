"""The processes that `torchrun` started to do one command's work together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
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

    def _sent(self, terms: Terms, sender: int) -> Terms:
        """Return the tensors and numbers of one process, each on the device that they have there."""
        sends = self.rank == sender
        told: list[Any] = [[_form(term) for term in terms] if sends else None]
        dist.broadcast_object_list(told, sender)
        found = [
            torch.empty(form.shape, dtype=form.dtype, device=form.device) if isinstance(form, _Form) else form
            for form in told[0]
        ]
        for place, term in enumerate(found):
            if isinstance(term, Tensor):
                found[place] = terms[place].contiguous() if sends else term
                dist.broadcast(found[place], sender)
        return tuple(found)

    def told(self, value: T) -> T:
        """Return the value that the first process gives; those of the others are not used."""
        if self.size == 1:
            return value
        box = [value if self.leads else None]
        dist.broadcast_object_list(box, 0)
        return box[0]  # type: ignore[return-value]


class _Form(NamedTuple):
    """The form of a tensor that another process sends, and the type of the device on which each has it."""

    shape: torch.Size
    dtype: torch.dtype
    device: str


def _form(term: Any) -> Any:
    """Return the form of a tensor, and a number as it is."""
    return _Form(term.shape, term.dtype, term.device.type) if isinstance(term, Tensor) else term


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
