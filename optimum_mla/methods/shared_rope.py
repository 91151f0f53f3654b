"""The rotary dims that all layers of a model share, which inference engines need."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SharedRope:
    """The rotary dims that all layers share.

    Attributes:
        dims: R, the number of rotary dims.
        counts: Number of rotary pairs that rotate with each of the source's frequencies, [D/2], R/2 in total.
    """

    dims: int
    counts: Tensor
