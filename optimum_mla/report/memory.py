"""What a cache really holds, and how much memory a process has used."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from optimum_mla.cache import LatentLayer
from optimum_mla.stack import cache_argument

PROCESS = Path("/proc/self")
"""The kernel's account of this process, on Linux."""


def cache_tensors(cache: Cache) -> list[Tensor]:
    """Every tensor that the cache object holds, on any attribute of any layer."""
    return [
        tensor
        for layer in cache.layers
        for tensor in (layer.tensors if isinstance(layer, LatentLayer) else _tensors(vars(layer)))
    ]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def live_cache_bytes(cache: Cache) -> int:
    """Bytes of the storage behind a live cache, each storage counted once and whole.

    Whole, because a view of a larger tensor keeps all of it alive. Position counters (int64) are not cache content.
    """
    storages = {
        (tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes()
        for tensor in cache_tensors(cache)
        if tensor.dtype != torch.int64
    }
    return sum(storages.values())


@torch.no_grad()
def measured_cache_bytes(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None) -> int:
    """Fill a fresh cache with `ids` [B, T] and weigh it.

    Args:
        model: A causal language model.
        ids: Token ids.
        cache: An empty cache; None takes a `DynamicCache`.
    """
    cache = DynamicCache(config=model.config) if cache is None else cache
    was_training = model.training
    model.eval()
    model(ids.to(model.device), **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
    model.train(was_training)
    return live_cache_bytes(cache)


def measured_cache_bytes_per_token(model: PreTrainedModel, ids: Tensor) -> float:
    """Bytes per token of a `DynamicCache` that holds `ids` [1, T]."""
    return measured_cache_bytes(model, ids) / ids.numel()


def peak_memory_bytes() -> int:
    """High-water mark of this process so far: resident memory, plus the CUDA allocator's where it was used."""
    return resident_peak_bytes() + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def resident_peak_bytes() -> int:
    """High-water mark of this process's resident memory."""
    try:
        lines = (PROCESS / "status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        import resource  # its mark begins with that of the process which started this one

        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return resident * (1 if sys.platform == "darwin" else 1024)


class PeakMemory:
    """High-water mark of memory from `reset` on: the CUDA allocator's, or the process's resident memory.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device if device.type == "cuda" else None

    def reset(self) -> bool:
        """Start again from what is there now. False where the system cannot do that."""
        if self.cuda is not None:
            torch.cuda.reset_peak_memory_stats(self.cuda)
            return True
        try:
            (PROCESS / "clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def bytes(self) -> int:
        """The mark."""
        if self.cuda is not None:
            return torch.cuda.max_memory_allocated(self.cuda)
        return resident_peak_bytes()


def _living() -> list[tuple[Tensor, torch.UntypedStorage]]:
    """Every living tensor that has memory of its own; wrappers around others (quantized weights) have none."""
    gc.collect()
    return [
        (thing, thing.untyped_storage())
        for thing in gc.get_objects()
        if issubclass(type(thing), Tensor)
        and not hasattr(thing, "__tensor_flatten__")
        and not thing.is_meta
        and thing.layout == torch.strided
    ]


def living_storages() -> list[torch.UntypedStorage]:
    """The memory of every living tensor. It stays taken for as long as the list is kept."""
    return [storage for _, storage in _living()]


def large_tensors(before: list[torch.UntypedStorage], cache: Cache, least_bytes: int) -> list[str]:
    """Shapes of living tensors of `least_bytes` or more that came since `before` and are not in the cache.

    After a step these would be keys or values of full size that somebody keeps beside the cache.

    Args:
        before: `living_storages` of a loaded model, wherever its quantizer keeps scales and zeros.
        cache: What may be there.
        least_bytes: As above.
    """
    known = {storage.data_ptr() for storage in before}
    known |= {tensor.untyped_storage().data_ptr() for tensor in cache_tensors(cache)}
    found = {
        storage.data_ptr(): f"{list(thing.shape)} {str(thing.dtype).removeprefix('torch.')}"
        for thing, storage in _living()
        if storage.nbytes() >= least_bytes and storage.data_ptr() not in known
    }
    return sorted(found.values())
