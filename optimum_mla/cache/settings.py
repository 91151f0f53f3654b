"""How a latent cache is stored. Plain values; imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from optimum_mla.errors import InvalidValueError

FULL_BITS = 16
"""Stands for "as the model computes": no quantization."""
CACHE_NAMES = "default, 16bit, or BACKEND-intBITS such as hqq-int4"


def named_cache(name: str) -> dict[str, Any]:
    """The fields of `CacheSettings` that a short name stands for, on top of the model's own.

    Args:
        name: `default` (as the model stores it by itself), `16bit` (unquantized), or `BACKEND-intBITS`.

    Raises:
        InvalidValueError: Another name.
    """
    if name == "default":
        return {}
    if name == "16bit":
        return {"bits": FULL_BITS, "rope_bits": FULL_BITS}
    backend, _, bits = name.rpartition("-int")
    if not backend or not bits.isdigit():
        raise InvalidValueError("cache", name, CACHE_NAMES)
    return {"bits": int(bits), "backend": backend}


@dataclass(frozen=True)
class CacheSettings:
    """Storage of the cached latents.

    Attributes:
        bits: Bits of a latent's number, 8, 4 or 2 (hqq: also 3); 16 keeps the model's own dtype.
        backend: Name of the library that quantizes; see `available_backends`.
        group_size: At most so many neighbouring numbers of one token's latent share a scale and a zero.
        residual_length: Newest tokens that stay in the model's own dtype, at most.
        rope_bits: 16 or 8, for the rotary key that is cached beside the latent.
    """

    bits: int = FULL_BITS
    backend: str = "hqq"
    group_size: int = 64
    residual_length: int = 128
    rope_bits: int = FULL_BITS

    def __post_init__(self) -> None:
        if self.group_size < 8 or self.group_size % 4:
            raise InvalidValueError("group_size", self.group_size, "multiples of 4 from 8")
        if self.residual_length < 0:
            raise InvalidValueError("residual_length", self.residual_length, "integers from 0 (tokens)")
        if self.rope_bits not in (8, FULL_BITS):
            raise InvalidValueError("rope_bits", self.rope_bits, "8, 16")

    @property
    def quantized(self) -> bool:
        """Whether anything is stored in fewer bits than the model computes in."""
        return self.bits != FULL_BITS or self.rope_bits != FULL_BITS

    @property
    def flush_tokens(self) -> int:
        """Tokens that leave the full-precision window together, so that not every step quantizes one."""
        return max(1, self.residual_length // 4)

    def to_dict(self) -> dict[str, Any]:
        """As it is saved in a model's config."""
        return asdict(self)

    def window_tokens(self, prompt: int, steps: int = 0) -> int:
        """Tokens in full precision behind a prompt of so many tokens and so many steps of one token."""
        if not self.quantized:
            return prompt + steps
        window = 0
        for arriving in (prompt, *[1] * steps):
            window += arriving
            if window > self.residual_length:
                window = max(0, self.residual_length - self.flush_tokens + 1)
        return window

    @classmethod
    def from_dict(cls, content: dict[str, Any] | None) -> CacheSettings:
        """What `to_dict` gave; None is the unquantized cache.

        Raises:
            InvalidValueError: A field that does not exist, or a value it cannot have.
        """
        known = [f.name for f in fields(cls)]
        for name in content or {}:
            if name not in known:
                raise InvalidValueError("latent_cache", name, ", ".join(known), "Remove it from the config.")
        return cls(**(content or {}))
