"""The libraries that quantize latents, behind one small interface."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_mla.cache.settings import FULL_BITS, CacheSettings
from optimum_mla.errors import InvalidValueError, MissingDependencyError

_BACKENDS: dict[str, str] = {
    "hqq": "optimum_mla.cache.hqq:HQQBackend",
    "quanto": "optimum_mla.cache.quanto:QuantoBackend",
}


class Encoded(NamedTuple):
    """Quantized columns: number = code·scale + shift.

    Attributes:
        codes: [g, N], not yet packed.
        scale: [N], in 16 bits.
        shift: [N], in 16 bits, or None for a symmetric code.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None


class Backend(ABC):
    """Affine or symmetric quantization of columns, and how codes are packed.

    Every column is one group of one token, with parameters of its own, so tokens and rows of a batch never share any.
    The codes of a token are packed together, so tokens can be joined, cut and picked.

    Args:
        bits: Bits of a code.
    """

    bits_allowed: tuple[int, ...]
    """What the library can do."""
    package: str
    """Name of the library on the package index, which is also the name of the extra."""
    lanes: tuple[int, ...]
    """Where in a packed word its codes start, in bits: n packed words hold codes 0 to n-1 in the first lane, then the
    next n in the second, and so on."""
    parameters: int = 2
    """16-bit numbers beside the codes of a group: scale and shift, or the scale alone."""

    def __init__(self, bits: int) -> None:
        if bits not in self.bits_allowed:
            allowed = ", ".join(str(b) for b in self.bits_allowed)
            raise InvalidValueError("bits", bits, f"{allowed} with the backend {self.package}")
        self.bits = bits

    def packed_bits(self, numbers: int) -> int:
        """Bits that so many codes take, the unused ones of their words included."""
        return self.bits * numbers

    @abstractmethod
    def encode(self, columns: Tensor) -> Encoded:
        """Quantize columns [g, N]."""

    @abstractmethod
    def pack(self, codes: Tensor) -> Tensor:
        """Pack codes [w, N] along the first dimension: [words, N]."""

    def unpack(self, packed: Tensor, out: Tensor) -> None:
        """Write the codes of packed words [..., words] as numbers into `out` [..., w]; the last lane may be short."""
        words, width = packed.shape[-1], out.shape[-1]
        for lane, shift in enumerate(self.lanes):
            start, stop = lane * words, min((lane + 1) * words, width)
            if stop > start:
                part = packed[..., : stop - start]
                if shift:
                    part = part >> shift
                if shift < max(self.lanes):
                    part = part & (2**self.bits - 1)
                out[..., start:stop].copy_(part)


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit dtype of scales and zeros for a model's dtype."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def available_backends() -> tuple[str, ...]:
    """Names of the backends, whether their library is installed or not."""
    return tuple(_BACKENDS)


def register_backend(name: str, location: str) -> None:
    """Add a backend.

    Args:
        name: What users will type.
        location: `module:Class` of a `Backend`; imported when it is first used.
    """
    _BACKENDS[name] = location


def make_backend(name: str, bits: int) -> Backend:
    """The named backend for codes of `bits` bits.

    Raises:
        InvalidValueError: No such backend, or bits that it cannot do.
        MissingDependencyError: Its library is not installed.
    """
    if name not in _BACKENDS:
        near = difflib.get_close_matches(name, _BACKENDS, n=1)
        raise InvalidValueError("backend", name, ", ".join(_BACKENDS), f"Did you mean {near[0]}?" if near else "")
    module, _, attribute = _BACKENDS[name].partition(":")
    try:
        backend = getattr(import_module(module), attribute)
    except ImportError as error:
        raise MissingDependencyError(error.name or name, name, f"quantize the cache with {name}") from error
    return backend(bits)


def check_settings(settings: CacheSettings) -> None:
    """Raise what `make_backend` raises for what these settings need."""
    for bits in {settings.bits, settings.rope_bits} - {FULL_BITS}:
        make_backend(settings.backend, bits)
