"""The libraries that quantize latents, behind one small interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from importlib.metadata import entry_points
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_mla.cache.settings import FULL_BITS, CacheSettings
from optimum_mla.core.errors import InvalidValueError, MissingDependencyError
from optimum_mla.core.suggestions import did_you_mean

_BACKENDS: dict[str, str] = {
    "hqq": "optimum_mla.cache.hqq:HQQBackend",
    "quanto": "optimum_mla.cache.quanto:QuantoBackend",
}

ENTRY_POINTS = "optimum_mla.backends"
"""The entry-point group in which other packages offer backends."""


class Encoded(NamedTuple):
    """Quantized columns, where each number is approximated by code·scale + shift.

    Attributes:
        codes: The codes before packing, [g, N].
        scale: The scale of each column in a 16-bit dtype, [N].
        shift: The shift of each column in a 16-bit dtype, [N], or None for a symmetric code.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None


class Backend(ABC):
    """Base class of the libraries that quantize columns of numbers and pack their codes.

    Every column is one group of one token and has its own scale and shift, so the codes of a token do not depend on
    other tokens or rows. The codes of each token are packed separately, so tokens can be joined, cut and selected
    without unpacking.

    Args:
        bits: Bits per code.

    Raises:
        InvalidValueError: The library has no codes of so many bits.
    """

    bits_allowed: tuple[int, ...]
    """Numbers of bits per code that the library supports."""
    package: str
    """Name of the library on the package index, which is also the name of the extra."""
    lanes: tuple[int, ...]
    """The bit positions at which the codes of a packed word start.

    Of n packed words, the first lane holds codes 0 to n-1, the second lane the next n codes, and so on.
    """
    parameters: int = 2
    """Number of 16-bit parameters per group: 2 for scale and shift, 1 for the scale alone."""

    def __init__(self, bits: int) -> None:
        if bits not in self.bits_allowed:
            allowed = ", ".join(str(b) for b in self.bits_allowed)
            raise InvalidValueError("bits", bits, f"{allowed} with the backend {self.package}")
        self.bits = bits

    def packed_bits(self, numbers: int) -> int:
        """Return the bits that `numbers` packed codes take, including unused bits of their words."""
        return self.bits * numbers

    @abstractmethod
    def encode(self, columns: Tensor) -> Encoded:
        """Return the codes and parameters of N columns, [g, N], of g numbers each."""

    @abstractmethod
    def pack(self, codes: Tensor) -> Tensor:
        """Return codes [w, N] packed along the first dimension, [words, N]."""

    def unpack(self, packed: Tensor, out: Tensor) -> None:
        """Unpack codes and write them into `out` as numbers of its dtype.

        Args:
            packed: Packed words, [..., words].
            out: The tensor to write into, [..., w]. It may have fewer entries than the words have codes; the further
                codes are padding.
        """
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
    """Return the 16-bit dtype in which scales and shifts are stored, for the dtype of the model."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def available_backends() -> tuple[str, ...]:
    """Return the names of all backends, whether or not their libraries are installed.

    These are the built-in backends, the registered ones, and those that installed packages offer as entry points of the
    group `optimum_mla.backends`.
    """
    return tuple(_locations())


def _locations() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)} | _BACKENDS


def register_backend(name: str, location: str) -> None:
    """Add a backend to this process.

    To offer a backend on the command line too, a package declares an entry point in the group `optimum_mla.backends`.

    Args:
        name: The name by which users select it.
        location: The place of a `Backend` class, as `module:Class`. It is imported when it is first used.
    """
    _BACKENDS[name] = location


def make_backend(name: str, bits: int) -> Backend:
    """Return the named backend for codes of `bits` bits.

    Raises:
        InvalidValueError: There is no such backend, or it has no codes of so many bits.
        MissingDependencyError: The library of the backend is not installed.
    """
    location = _BACKENDS.get(name) or _locations().get(name)
    if location is None:
        known = available_backends()
        raise InvalidValueError("backend", name, ", ".join(known), did_you_mean(name, known))
    module, _, attribute = location.partition(":")
    try:
        backend = getattr(import_module(module), attribute)
    except ImportError as error:
        raise MissingDependencyError(error.name or name, name, f"quantize the cache with {name}") from error
    return backend(bits)


def check_settings(settings: CacheSettings) -> None:
    """Check that the backend of these settings exists and can store the bits that they ask for.

    Raises:
        InvalidValueError: There is no such backend, or it has no codes of so many bits.
        MissingDependencyError: The library of the backend is not installed.
    """
    for bits in {settings.bits, settings.rope_bits} - {FULL_BITS}:
        make_backend(settings.backend, bits)
