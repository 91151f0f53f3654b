"""Measurement of the bytes that a live cache holds, and of the memory that a process has used."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from optimum_mla.cache import LatentLayer
from optimum_mla.measure.quality import evaluating, read_through
from optimum_mla.stack import kept_tables

PROCESS = Path("/proc/self")
"""The folder in which Linux describes this process."""


def cache_tensors(cache: Cache) -> list[Tensor]:
    """Return every tensor that a cache object holds in any attribute of any layer."""
    return [
        tensor
        for layer in cache.layers
        for tensor in (layer.tensors if isinstance(layer, LatentLayer) else _tensors(vars(layer)))
    ]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):  # A wrapper, such as Quanto's, has no memory of its own.
            return [tensor for name in value.__tensor_flatten__()[0] for tensor in _tensors(getattr(value, name))]
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def live_cache_bytes(cache: Cache, in_16_bits: bool = False) -> int:
    """Return the bytes of memory behind a live cache, counting each whole storage once.

    Whole storages are counted because a view of a larger tensor keeps all of it alive. Position counters (int64) are
    not counted.

    Args:
        cache: The cache.
        in_16_bits: Count numbers of wider dtypes in 16 bits, as they would be in the cache of a model of 16 bits. Codes
            weigh the same in both.
    """
    storages = {
        (tensor.device, tensor.untyped_storage().data_ptr()): tensor
        for tensor in cache_tensors(cache)
        if tensor.dtype != torch.int64
    }
    return sum(
        tensor.untyped_storage().nbytes() * 2 // tensor.itemsize
        if in_16_bits and tensor.is_floating_point() and tensor.itemsize > 2
        else tensor.untyped_storage().nbytes()
        for tensor in storages.values()
    )


@torch.no_grad()
def filled_cache(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None) -> Cache:
    """Fill a cache with tokens and return it.

    Args:
        model: A causal language model.
        ids: Token ids, [B, T].
        cache: An empty cache; None takes a new `DynamicCache`.
    """
    cache = DynamicCache(config=model.config) if cache is None else cache
    with evaluating(model):
        read_through(model, cache, ids, logits_to_keep=1)
    return cache


def measured_cache_bytes(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None) -> int:
    """Fill a cache with tokens and return its bytes; the arguments are those of `filled_cache`."""
    return live_cache_bytes(filled_cache(model, ids, cache))


class BytesPerToken(NamedTuple):
    """The bytes that each token adds to a live cache: as they are, and with all numbers counted in 16 bits."""

    live: float
    in_16_bits: float


def bytes_per_token(model: PreTrainedModel, ids: Tensor) -> BytesPerToken:
    """Return the bytes that each token of the second half of `ids` [1, T] adds to the model's own cache.

    The first half is left out, because the first tokens of a sequence may be stored in more bits than others.
    """
    half = ids.shape[1] // 2
    make: Any = getattr(model, "make_cache", lambda: None)
    before, after = (filled_cache(model, part, make()) for part in (ids[:, :half], ids))
    added = ((live_cache_bytes(after, kind) - live_cache_bytes(before, kind)) for kind in (False, True))
    return BytesPerToken(*(size / (ids.shape[1] - half) for size in added))


def peak_memory_bytes() -> int:
    """Return the highest memory of this process so far: resident memory, plus that of the CUDA allocator."""
    return resident_peak_bytes() + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def resident_peak_bytes() -> int:
    """Return the highest resident memory of this process so far."""
    try:
        lines = (PROCESS / "status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        if sys.platform == "win32":
            return psutil.Process().memory_info().peak_wset
        import resource  # its mark starts from that of the parent process

        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return resident * (1 if sys.platform == "darwin" else 1024)


class PeakMemory:
    """Measures the highest memory since `reset`: that of the CUDA allocator, or the resident memory of the process.

    Args:
        device: Device of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device if device.type == "cuda" else None

    def reset(self) -> bool:
        """Set the mark to the present memory, and return whether the system can do that."""
        if self.cuda is not None:
            torch.cuda.reset_peak_memory_stats(self.cuda)
            return True
        try:
            (PROCESS / "clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def bytes(self) -> int:
        """Return the mark in bytes."""
        if self.cuda is not None:
            return torch.cuda.max_memory_allocated(self.cuda)
        return resident_peak_bytes()


def _living() -> list[tuple[Tensor, torch.UntypedStorage]]:
    """Return every living tensor and its memory.

    Those that have none are left out: wrappers, such as quantized weights, and the stand-ins that a compiler keeps.
    """
    gc.collect()
    living = [
        (thing, thing.untyped_storage())
        for thing in gc.get_objects()
        if issubclass(type(thing), Tensor)
        and not hasattr(thing, "__tensor_flatten__")
        and thing.layout == torch.strided
    ]
    return [(thing, storage) for thing, storage in living if storage.device.type != "meta"]


def living_storages() -> list[torch.UntypedStorage]:
    """Return the memory of every living tensor, which is not freed as long as the list is kept."""
    return [storage for _, storage in _living()]


def large_tensors(before: list[torch.UntypedStorage], cache: Cache, least_bytes: int) -> list[str]:
    """Return the shapes of large living tensors that are neither older than a step nor part of the cache.

    Such tensors are keys or values of full size that something keeps beside the cache. The table of rotary angles, as
    long as the longest block of the cache, is none of them, because all layers share it.

    Args:
        before: The result of `living_storages` before the step, which includes scales and zeros of quantized weights.
        cache: The cache whose tensors are allowed.
        least_bytes: Bytes from which a tensor counts as large.
    """
    known = {storage.data_ptr() for storage in before}
    known |= {tensor.untyped_storage().data_ptr() for tensor in (*cache_tensors(cache), *kept_tables())}
    found = {
        storage.data_ptr(): f"{list(thing.shape)} {str(thing.dtype).removeprefix('torch.')}"
        for thing, storage in _living()
        if storage.nbytes() >= least_bytes and storage.data_ptr() not in known
    }
    return sorted(found.values())
