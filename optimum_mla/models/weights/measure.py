"""What a model's weights really take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as they are stored, each storage counted once and whole.

    Packed codes, scales and zeros of quantized layers count, wherever their library keeps them.
    """
    tensors = [tensor for module in model.modules() for tensor in _held(vars(module))]
    storages = {
        (tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return sum(storages.values())


def _held(value: Any) -> Iterator[Tensor]:
    """The plain tensors in a value: inside containers, tensor subclasses and bitsandbytes' state objects."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _held(getattr(value, name))
        else:
            yield value
            # bitsandbytes keeps scales on the parameter.
            yield from _held(vars(value))
    elif isinstance(value, dict):
        for item in value.values():
            yield from _held(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _held(item)
    elif type(value).__module__.startswith("bitsandbytes") and not isinstance(value, nn.Module | type):
        yield from _held(vars(value))
