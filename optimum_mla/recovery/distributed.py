"""What is left to do by hand when several processes train: gathering a sharded model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor


def full_state(model: nn.Module) -> dict[str, Any] | None:
    """The whole state of a model that is sharded over processes, which all have to call this.

    Returns:
        On the first process all tensors, on the CPU; on the others nothing. None where the model is not sharded.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
