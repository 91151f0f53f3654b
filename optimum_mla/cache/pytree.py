"""Latent caches as inputs and outputs of exported programs: their tensors are leaves, everything else is structure.

A structure holds nothing but what JSON holds, so that exported programs can be saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from optimum_mla.cache.backends import Backend
from optimum_mla.cache.blocks import StoredBlock
from optimum_mla.cache.positions import CachedPositions
from optimum_mla.cache.settings import CacheSettings
from optimum_mla.cache.stored import Stored
from optimum_mla.core.geometry import MLAGeometry

OPENED = (Cache, CacheLayerMixin, CachedPositions, StoredBlock, Stored)
"""Classes whose objects hold tensors."""
SLOT = {"tensor": True}
"""The placeholder that takes the place of a tensor in a structure."""


def flatten(value: Any) -> tuple[list[Any], Any]:
    """Return the tensors of a cache in a fixed order, and its structure."""
    leaves: list[Any] = []
    structure = _structure(value, leaves)
    return leaves, structure


def _structure(value: Any, leaves: list[Any]) -> Any:
    if isinstance(value, Tensor):
        leaves.append(value)
        return SLOT
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_structure(item, leaves) for item in value]}
    if isinstance(value, OPENED):
        return {"object": _path(value), "state": {k: _structure(part, leaves) for k, part in vars(value).items()}}
    if isinstance(value, MLAGeometry | CacheSettings):
        return {"made": _path(value), "of": asdict(value)}
    if isinstance(value, Backend):
        return {"made": _path(value), "of": {"bits": value.bits}}
    if isinstance(value, torch.dtype | torch.device):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    raise TypeError(f"a cache with a {type(value).__name__} cannot be exported")


def unflatten(leaves: Any, structure: Any) -> Any:
    """Return the cache of a structure, with the given tensors in their places."""
    return _built(structure, iter(leaves))


def _built(structure: Any, leaves: Iterator[Any]) -> Any:
    if not isinstance(structure, dict):
        return structure
    if structure == SLOT:
        return next(leaves)
    kind, content = next(iter(structure.items()))
    if kind in ("list", "tuple"):
        items = [_built(part, leaves) for part in content]
        return items if kind == "list" else tuple(items)
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "device":
        return torch.device(content)
    if kind == "made":
        return _class(content)(**structure["of"])
    built = _class(content).__new__(_class(content))
    for name, part in structure["state"].items():
        built.__dict__[name] = _built(part, leaves)
    return built


def _path(value: Any) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"


def _class(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _with_keys(value: Any) -> tuple[list[Any], Any]:
    leaves, structure = flatten(value)
    return [(pytree.SequenceKey(index), leaf) for index, leaf in enumerate(leaves)], structure


def register(cache_class: type[Cache]) -> None:
    """Let `torch.export` take caches of a class."""
    pytree.register_pytree_node(
        cache_class,
        flatten,
        unflatten,
        serialized_type_name=f"{cache_class.__module__}.{cache_class.__qualname__}",
        flatten_with_keys_fn=_with_keys,
    )
