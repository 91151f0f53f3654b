"""Rotation of half-split dims, with the frequencies gathered from the source model's own cos/sin table."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """cos and sin [B, K, S, R/2] of K rotary heads at S positions."""

    cos: Tensor
    sin: Tensor

    def at(self, span: slice) -> Rotation:
        """Those of some of the positions."""
        return Rotation(self.cos[:, :, span], self.sin[:, :, span])


def gather_rotation(cos: Tensor, sin: Tensor, pairs: Tensor) -> Rotation:
    """Pick `pairs` [K, R/2] from the source's table cos, sin [B, S, D], whose two halves are equal."""
    return Rotation(cos[..., pairs].transpose(1, 2), sin[..., pairs].transpose(1, 2))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate x [B, H, S, R], H a multiple of K: consecutive H/K heads share a rotary head's frequencies."""
    batch, heads, length, dim = x.shape
    rope_heads = rotation.cos.shape[1]
    grouped = x.reshape(batch, rope_heads, heads // rope_heads, length, dim)  # [B, K, H/K, S, R]
    first, second = grouped.chunk(2, dim=-1)
    cos, sin = rotation.cos.unsqueeze(2), rotation.sin.unsqueeze(2)  # [B, K, 1, S, R/2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).reshape(x.shape)
