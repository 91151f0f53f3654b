"""The rotary dims that all layers of a model share, which inference engines need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_mla.core.errors import InvalidValueError


@dataclass(frozen=True, eq=False)  # equal by identity, because tensors have no truth value
class SharedRope:
    """The rotary dims that all layers share.

    Attributes:
        dims: R, the number of rotary dims.
        counts: Number of rotary pairs that rotate with each of the source's frequencies, [D/2], R/2 in total.
    """

    dims: int
    counts: Tensor


def regular_pairs(pairs: int, dims: int) -> Tensor:
    """Return every so-many-th of the source's rotary pairs, [R/2].

    Args:
        pairs: Number of the source's rotary pairs, D/2.
        dims: R, the number of rotary dims.

    Raises:
        InvalidValueError: R does not divide D.
    """
    if 2 * pairs % dims:
        raise irregular(pairs, dims)
    return torch.arange(0, pairs, 2 * pairs // dims)


def irregular(pairs: int, dims: int) -> InvalidValueError:
    """Return the error for a number of rotary dims R that does not divide D, given D/2."""
    divisors = ", ".join(str(2 * n) for n in range(1, pairs + 1) if not pairs % n)
    return InvalidValueError("qk_rope_head_dim", dims, f"{divisors} with a regular shared_rope")
