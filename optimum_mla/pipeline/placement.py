"""The dtypes and devices that commands take, and where the parts of a model lie."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedConfig

from optimum_mla.core.errors import InvalidValueError, first_line
from optimum_mla.models.family_table import family_of

DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that no model is saved in."""
    if dtype not in DTYPES:
        raise InvalidValueError("dtype", dtype, ", ".join(DTYPES))


def usable_device(device: str | None) -> torch.device:
    """Return a torch device of this machine; None stands for CUDA where it is available, and the CPU otherwise.

    Raises:
        InvalidValueError: There is no such device here, or nothing can be factorized on it.
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device="cpu" if place.type == "mps" else place)
    except (RuntimeError, AssertionError) as error:
        raise InvalidValueError("device", device, "a torch device of this machine", first_line(error)) from error
    if place.type == "mps":
        raise InvalidValueError(
            "device", device, "cpu, or cuda where there is one", "mps has no float64 to factorize in."
        )
    return place


def memory_of(device: str | None) -> int:
    """Return the bytes of memory of a CUDA device or, for the CPU, of the machine; None as for `usable_device`."""
    if torch.cuda.is_available() and not str(device or "cuda").startswith("cpu"):
        return torch.cuda.get_device_properties(torch.device(device or "cuda")).total_memory
    return int(psutil.virtual_memory().total)


def layers_on_disk(config: PreTrainedConfig, device: torch.device) -> dict[str, Any]:
    """Return a `device_map` that leaves the decoder layers of a model on the disk and puts all else on a device."""
    spec = family_of(config).spec
    beside = {f"{spec.base}.{name}": str(device) for name in (spec.embedding, spec.norm, spec.rotary)}
    return {**beside, spec.head: str(device), f"{spec.base}.{spec.layers}": "disk"}


def parameter_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters, also on the meta device, where `weight_bytes` sees one storage."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
