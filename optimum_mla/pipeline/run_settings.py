"""The settings that every command has which loads a model and writes a folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

from optimum_mla.pipeline.checkpoint import Checkpoint
from optimum_mla.pipeline.placement import check_dtype


class RunSettings(TypedDict, total=False):
    """How a command loads its model, and whether it may replace its output.

    Attributes:
        dtype: `auto` (the checkpoint's own), `float32`, `bfloat16` or `float16`; for the work, and for weights that the
            command writes.
        device: Torch device; None takes CUDA where it is available.
        overwrite: Replace `output` if it is a folder of the kind that the command writes.
        hub: `revision`, `cache_dir`, `token`, `trust_remote_code` for loading.
    """

    dtype: str
    device: str | None
    overwrite: bool
    hub: dict[str, Any] | None


@dataclass(frozen=True)
class RunOptions:
    """These settings with their defaults; see `RunSettings`."""

    dtype: str = "auto"
    device: str | None = None
    overwrite: bool = False
    hub: dict[str, Any] | None = None

    def checkpoint(self, model: str) -> Checkpoint:
        """Return the checkpoint of a hub id or a folder.

        Raises:
            InvalidValueError: There is no such dtype.
        """
        found = Checkpoint.of(model, self.hub)
        check_dtype(self.dtype)
        return found
