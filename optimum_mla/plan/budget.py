"""The budget of a latent, which is a rank, a share of the source's cache in numbers or in bytes, or of the energy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.number_checks import check_count, check_number
from optimum_mla.ops.low_rank import rank_for_energy

DEFAULT_CACHE_RATIO = 0.5
"""Share of the source's cache that a conversion keeps where nobody asks for a size."""

DEFAULT_CACHE_BUDGET = 0.25
"""Share of the bytes of the cache that a conversion keeps where nobody asks for a size and latents can be coded."""


@dataclass(frozen=True)
class RankBudget:
    """The size of the latents, given in one of four ways; without any the method takes its own default.

    Attributes:
        kv_lora_rank: Numbers in the latent, per token and layer.
        kv_cache_ratio: Numbers cached per token and layer, rotary key included, divided by the source's `2·G·D`; above
            0 and up to 1.
        energy: Share of the squared singular values that each layer's latent holds, above 0 and up to 1. The ranks of
            the layers then differ.
        kv_cache_budget: Bytes of the codes of an old token, divided by those of its keys and values in 16 bits; above 0
            and up to 0.5.

    Raises:
        InvalidValueError: More than one is given, or a value is not a number or out of range.
    """

    kv_lora_rank: int | None = None
    kv_cache_ratio: float | None = None
    energy: float | None = None
    kv_cache_budget: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) > 1:
            names = " and ".join(given)
            raise InvalidValueError(names, tuple(given.values()), "one of them", "Give either of them, not both.")
        if self.kv_lora_rank is not None:
            check_count("kv_lora_rank", self.kv_lora_rank)
        for name, most in (("kv_cache_ratio", 1), ("energy", 1), ("kv_cache_budget", 0.5)):
            value = getattr(self, name)
            if value is None:
                continue
            check_number(name, value, f"above 0, up to {most}")
            if not 0 < value <= most:
                raise InvalidValueError(name, value, f"above 0, up to {most}")

    @property
    def is_set(self) -> bool:
        """Return whether any of the four is given."""
        return any(value is not None for value in vars(self).values())

    def rank(
        self,
        cache_numbers: int,
        overhead: int,
        largest: int,
        spectrum: Callable[[], Tensor],
        smallest: int = 1,
    ) -> int:
        """Return the rank of the latent in one layer.

        Args:
            cache_numbers: Numbers that the source layer caches per token.
            overhead: Numbers cached beside the latent (rotary key, key norms).
            largest: The rank of the factorized weight itself; a higher one would change nothing.
            spectrum: Returns the singular values of that weight in falling order; called only for `energy`.
            smallest: Lowest rank that the method can use.

        Raises:
            InvalidValueError: The rank is out of range for this layer; the message says the range.
        """
        if self.kv_lora_rank is not None:
            if not smallest <= self.kv_lora_rank <= largest:
                raise InvalidValueError(
                    "kv_lora_rank", self.kv_lora_rank, f"{smallest} to {largest} for this model and method"
                )
            return self.kv_lora_rank
        if self.energy is not None:
            return max(smallest, rank_for_energy(spectrum(), self.energy))
        if self.kv_cache_ratio is None:
            return largest
        rank = int(self.kv_cache_ratio * cache_numbers + 1e-9) - overhead
        if rank < smallest:
            low = (overhead + smallest) / cache_numbers
            remedy = (
                f"{overhead} of {cache_numbers} numbers per token are cached beside the latent." if overhead else ""
            )
            allowed = f"{low:.4g} to 1 for this model and method"
            raise InvalidValueError("kv_cache_ratio", self.kv_cache_ratio, allowed, remedy)
        return min(rank, largest)
