"""Measurement of the memory that the weights of a model take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers as they are stored, counting each whole storage once.

    Packed codes, scales and zeros of quantized layers are included, wherever their library keeps them.
    """
    tensors = [tensor for module in model.modules() for tensor in _held(vars(module))]
    storages = {
        (tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return sum(storages.values())


def _held(value: Any) -> Iterator[Tensor]:
    """Yield the plain tensors inside a value: in containers, tensor subclasses and state objects of bitsandbytes."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _held(getattr(value, name))
        else:
            yield value
            # bitsandbytes keeps scales as attributes of the parameter.
            yield from _held(vars(value))
    elif isinstance(value, dict):
        for item in value.values():
            yield from _held(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _held(item)
    elif type(value).__module__.startswith("bitsandbytes") and not isinstance(value, nn.Module | type):
        yield from _held(vars(value))
