"""Rounding of latents to their codes.

A latent of a coded layer is its own code: the step and the centre of each channel are folded into the projections
before and after it, so a code is the integer next to the latent, within the range of the channel's bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from optimum_mla.codec.constants import constant
from optimum_mla.core.segments import ChannelBits


@lru_cache(maxsize=1024)
def halves(channels: ChannelBits) -> tuple[int, ...]:
    """Return 2^(b-1) for the bits b of each channel, by which its smallest code is below zero."""
    return tuple(2 ** (bits - 1) for bits, count in channels for _ in range(count))


@lru_cache(maxsize=1024)
def _largest(channels: ChannelBits) -> tuple[int, ...]:
    return tuple(half - 1 for half in halves(channels))


@lru_cache(maxsize=1024)
def _smallest(channels: ChannelBits) -> tuple[int, ...]:
    return tuple(-half for half in halves(channels))


def code_bounds(channels: ChannelBits, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest code of each channel, [r] each.

    Codes of b bits are from -2^(b-1) to 2^(b-1) - 1. The projections put the centre of the values on -1/2, the middle
    of this range.

    Args:
        channels: Bits of the channels.
        like: A tensor whose dtype and device the result has.
    """
    return (
        constant(_smallest(channels), like.dtype, like.device),
        constant(_largest(channels), like.dtype, like.device),
    )


def coded(latents: Tensor, channels: ChannelBits, exempt: Tensor | None = None, limit: float | None = None) -> Tensor:
    """Return latents rounded to their codes. Gradients pass as if nothing was rounded, but not where it was clipped.

    Args:
        latents: The latents, [..., r].
        channels: Bits of the channels.
        exempt: Tokens that are not rounded, [...] boolean; None for no token.
        limit: Mean squared clipping error over the channels beyond which a token is not rounded; None for no limit.
    """
    low, high = code_bounds(channels, latents)
    clipped = latents.clamp(low, high)
    if limit is not None:
        outlying = (latents - clipped).detach().float().square().mean(-1) > limit
        exempt = outlying if exempt is None else exempt | outlying
    rounded = clipped + (clipped.detach().round() - clipped.detach())
    return rounded if exempt is None else torch.where(exempt.unsqueeze(-1), latents, rounded)


def is_coded(latents: Tensor, channels: ChannelBits) -> Tensor:
    """Return which latents [..., r] are codes, [...] boolean. Those of exempt tokens are not, except by chance."""
    low, high = code_bounds(channels, latents)
    return (latents == latents.clamp(low, high).round()).all(-1)
