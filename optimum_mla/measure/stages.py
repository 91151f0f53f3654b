"""Time and memory of the stages of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from optimum_mla.measure.memory import PeakMemory, peak_memory_bytes
from optimum_mla.report.schema import StageReport


class Stages:
    """Measures the seconds and the peak memory of the stages of a run.

    Attributes:
        done: The stages that have ended, in their order.
    """

    def __init__(self) -> None:
        self.done: list[StageReport] = []
        self._peak_bytes = 0

    def peak(self) -> int:
        """Return the highest memory of the process so far, in bytes; see `peak_memory_bytes`."""
        self._peak_bytes = max(self._peak_bytes, peak_memory_bytes())
        return self._peak_bytes

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what runs inside the context. A stage of the same name that ran before is added to.

        Args:
            name: Name of the stage in the report.
        """
        self.peak()  # The mark is set back below.
        memory = PeakMemory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        resets, start = memory.reset(), time.perf_counter()
        yield
        seconds, peak = time.perf_counter() - start, memory.bytes() if resets else None
        earlier = next((one for one in self.done if one.name == name), None)
        if earlier is not None:
            self.done.remove(earlier)
            seconds += earlier.seconds
            peak = None if peak is None or earlier.peak_bytes is None else max(peak, earlier.peak_bytes)
        self.done.append(StageReport(name, seconds, peak))
