"""Rotation of half-split dims, with the frequencies gathered from the source model's own cos/sin table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import accumulate
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


class RotaryFrames(ABC):
    """Rotations for queries and for keys that are rotated after they are read from the cache, block by block.

    Only differences of positions count, so a block may have an origin of its own.
    """

    @abstractmethod
    def query(self, span: slice) -> Rotation:
        """For the queries [B, K, S, R/2] that meet the cached tokens `span`."""

    @abstractmethod
    def key(self, span: slice) -> Rotation:
        """For those tokens' keys, [1 or B, K, t, R/2]."""


class AbsoluteFrames(RotaryFrames):
    """Every token at its own position.

    Args:
        keys: Rotation of the cached tokens of a slice; asked for when their block is reached.
        queries: Rotation of the queries.
    """

    def __init__(self, keys: Callable[[slice], Rotation], queries: Rotation) -> None:
        self.keys, self.queries = keys, queries

    def query(self, span: slice) -> Rotation:
        return self.queries

    def key(self, span: slice) -> Rotation:
        return self.keys(span)


class RelativeFrames(RotaryFrames):
    """Positions counted from each block's first token.

    One short table then serves the keys of all blocks, and only queries need frequencies block by block. Right where
    the cached tokens' positions are consecutive and frequencies do not depend on the length.

    Args:
        table: Rotations at positions [1 or B, t].
        distances: How far the queries are behind the first cached token, [1 or B, S].
        sizes: Tokens of the blocks, in order.
    """

    def __init__(self, table: Callable[[Tensor], Rotation], distances: Tensor, sizes: Sequence[int]) -> None:
        starts = [0, *accumulate(sizes)][:-1]
        self.blocks = {start: index for index, start in enumerate(starts)}
        origins = torch.tensor(starts, device=distances.device)
        self.length = distances.shape[1]
        self.queries = table((distances[:, None] - origins[None, :, None]).flatten(1))  # blocks · S positions
        self.keys = table(torch.arange(max(sizes), device=distances.device)[None])

    def query(self, span: slice) -> Rotation:
        first = self.blocks[span.start] * self.length
        return self.queries.at(slice(first, first + self.length))

    def key(self, span: slice) -> Rotation:
        return self.keys.at(slice(0, span.stop - span.start))


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
