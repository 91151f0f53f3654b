"""Gathering of a model that is sharded over several training processes."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor


def full_state(model: nn.Module) -> dict[str, Any] | None:
    """Return the whole state of a model that is sharded over processes, which all have to call this.

    Returns:
        All tensors on the CPU in the first process, and an empty dictionary in the others. None if the model is not
        sharded.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
