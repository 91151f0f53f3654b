"""A device that is not there, for machines without an accelerator.

Its tensors say that they are on `DEVICE`, hold their numbers in the memory of the CPU, and refuse to be mixed with
those of the CPU as those of a GPU do. Importing this registers the device for the whole process, so that tests do it in
a process of their own. It is made of PyTorch's hooks for backends that are written in Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
INDEXED = (
    *(aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index.Tensor),
    *(aten.copy_.default, aten._to_copy.default),
)
"""Operations whose further arguments may lie in the memory of the CPU, on a GPU too."""


class Backend(_DummyBackendModule):
    """What PyTorch asks a backend for."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


_setup_privateuseone_for_python_backend("absent", backend_module=Backend())
torch._C._set_only_lift_cpu_tensors(True)
DEVICE = torch.device("absent", 0)


class There(Tensor):
    """A tensor on the device."""

    held: Tensor

    @staticmethod
    def __new__(cls: type[There], held: Tensor) -> There:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=DEVICE, **layout)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()


class Placed(TorchDispatchMode):
    """Makes factory functions with `device=DEVICE` give tensors on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on the numbers, and refuse one that mixes devices.

    Raises:
        RuntimeError: A tensor on the device is used together with one in the memory of the CPU that is no number.
    """
    if func is aten._fused_sdp_choice.default:
        return 0  # plain mathematics
    tensors = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    here = [tensor for tensor in tensors if not isinstance(tensor, There) and tensor.ndim]
    if func in INDEXED:
        here = [tensor for tensor in here if tensor is args[0]]
    if there and here and func is not aten.copy_.default:
        raise RuntimeError(f"{func}: a tensor on {DEVICE} beside one of shape {list(here[0].shape)} on the CPU")
    asked, given = kwargs.get("device"), dict(kwargs)
    placed = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
    if asked is not None and placed:
        given["device"] = torch.device("cpu")
    if func is aten.copy_.default:
        placed = isinstance(args[0], There)
    held = tree_map_only(There, lambda tensor: tensor.held, (tuple(args), given))
    found = func(*held[0], **held[1])
    if not placed:
        return found
    same = {id(tensor.held): tensor for tensor in there}  # what was changed in place stays the same tensor
    return tree_map_only(Tensor, lambda tensor: same[id(tensor)] if id(tensor) in same else There(tensor), found)
