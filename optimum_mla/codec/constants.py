"""Small tensors of whole numbers that every step needs again."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_KEPT = 4096
"""Number of tensors that are kept, of a few kilobytes each: several times as many as the layers of a model need."""

_KEPT: dict[tuple[tuple[int, ...], torch.dtype, torch.device], Tensor] = {}


def constant(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of the values, [n], which callers must not change.

    Making a tensor from Python numbers takes longer than most operations on it, and on accelerators a transfer, so each
    is made once. All are forgotten when there are too many, as where one process loads many models one after the other.
    """
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    key = (values, dtype, device)
    found = _KEPT.get(key)
    if found is not None:
        return found
    with torch.inference_mode(False):  # A tensor made in inference mode could not take part in training later.
        made = torch.tensor(values, dtype=dtype, device=device)
    if type(made) is Tensor:  # Under a mode that traces it is another type, and of no use after the trace.
        if len(_KEPT) >= MOST_KEPT:
            _KEPT.clear()
        _KEPT[key] = made
    return made
