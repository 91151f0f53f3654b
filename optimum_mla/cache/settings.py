"""Settings of how a latent cache is stored. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.geometry import CachedPart
from optimum_mla.core.number_checks import check_integer

FULL_BITS = 16
"""Number of bits that stands for the dtype in which the model computes, without quantization."""
ALLOWED = {
    "bits": "16, 8, 4, 2, or with hqq also 3",
    "group_size": "multiples of 4 from 8",
    "residual_length": "integers from 0 (tokens)",
    "rope_bits": "8, 16",
}
"""Values that the numeric fields of `CacheSettings` take, in words."""
CACHE_NAMES = "default, 16bit, or BACKEND-intBITS such as hqq-int4"


def named_cache(name: str) -> dict[str, Any]:
    """Return the fields of `CacheSettings` that a short name sets on top of the model's own settings.

    Args:
        name: `default` (no change), `16bit` (unquantized), or `BACKEND-intBITS`, such as `hqq-int4`.

    Raises:
        InvalidValueError: The name is none of these.
    """
    if name == "default":
        return {}
    if name == "16bit":
        return {"bits": FULL_BITS, "rope_bits": FULL_BITS}
    backend, _, bits = name.rpartition("-int")
    if not backend or not bits.isdigit():
        raise InvalidValueError("cache", name, CACHE_NAMES)
    return {"bits": int(bits), "backend": backend}


@dataclass(frozen=True, slots=True)  # The slots are there because exporters would write to a `__dict__`.
class CacheSettings:
    """Settings that say how a cache stores its latents.

    Attributes:
        bits: Bits per number of the latent: 8, 4, 2, or with hqq also 3; 16 keeps the model's own dtype.
        backend: Name of the library that quantizes; see `available_backends`.
        group_size: Largest number of neighbouring numbers of one token's latent that share a scale and a zero.
        residual_length: Largest number of newest tokens that stay in the model's own dtype.
        rope_bits: Bits per number of the rotary key that is cached beside the latent: 8, or 16 for the model's dtype.

    Raises:
        InvalidValueError: A value is of the wrong type or out of range.
    """

    bits: int = FULL_BITS
    backend: str = "hqq"
    group_size: int = 64
    residual_length: int = 128
    rope_bits: int = FULL_BITS

    def __post_init__(self) -> None:
        for field, allowed in ALLOWED.items():
            check_integer(field, getattr(self, field), allowed)
        if not isinstance(self.backend, str):
            raise InvalidValueError("backend", self.backend, "the name of a library, such as hqq")
        if self.group_size < 8 or self.group_size % 4:
            raise InvalidValueError("group_size", self.group_size, ALLOWED["group_size"])
        if self.residual_length < 0:
            raise InvalidValueError("residual_length", self.residual_length, ALLOWED["residual_length"])
        if self.rope_bits not in (8, FULL_BITS):
            raise InvalidValueError("rope_bits", self.rope_bits, ALLOWED["rope_bits"])

    @property
    def quantized(self) -> bool:
        """Return whether anything is stored in fewer bits than the model computes with."""
        return self.bits != FULL_BITS or self.rope_bits != FULL_BITS

    def bits_of(self, part: CachedPart) -> int:
        """Return the bits per number of a part after it has left the window of unquantized tokens."""
        return FULL_BITS if part.setting is None else getattr(self, part.setting)

    @property
    def flush_tokens(self) -> int:
        """Return the number of tokens that are quantized together, so that not every step has to quantize one."""
        return max(1, self.residual_length // 4)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they are saved in a model's config."""
        return asdict(self)

    def window_tokens(self, prompt: int, steps: int = 0) -> int:
        """Return how many of the newest tokens are in full precision.

        Args:
            prompt: Tokens that came in one call.
            steps: Tokens that came one by one after them.
        """
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
        """Return the settings that `to_dict` gave; None stands for the unquantized cache.

        Raises:
            InvalidValueError: A field does not exist, or it cannot have the value.
        """
        known = [f.name for f in fields(cls)]
        for name in content or {}:
            if name not in known:
                raise InvalidValueError("latent_cache", name, ", ".join(known), "Remove it from the config.")
        return cls(**(content or {}))
