"""Rotation of half-split dims with frequencies that are gathered from the cos/sin table of the source model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """The rotation of K rotary heads at S positions.

    Attributes:
        cos: Cosines of the angles, [B, K, S, R/2].
        sin: Sines of the angles, [B, K, S, R/2].
    """

    cos: Tensor
    sin: Tensor

    def at(self, span: slice) -> Rotation:
        """Return the rotation at some of the positions."""
        return Rotation(self.cos[:, :, span], self.sin[:, :, span])


class RotaryFrames(ABC):
    """Gives the rotations of queries and of keys that are rotated after they are read from the cache, block by block.

    Only differences of positions matter, so every block may count positions from an origin of its own.
    """

    @abstractmethod
    def query(self, span: slice) -> Rotation:
        """Return the rotation [B, K, S, R/2] of the queries for their products with the cached tokens in `span`."""

    @abstractmethod
    def key(self, span: slice) -> Rotation:
        """Return the rotation of the keys of the cached tokens in `span`, [1 or B, K, t, R/2]."""


class AbsoluteFrames(RotaryFrames):
    """Rotates every token by its own position.

    Args:
        keys: Returns the rotation of the cached tokens in a slice; called when their block is reached.
        queries: Rotation of the queries.
    """

    def __init__(self, keys: Callable[[slice], Rotation], queries: Rotation) -> None:
        self.keys, self.queries = keys, queries

    def query(self, span: slice) -> Rotation:
        return self.queries

    def key(self, span: slice) -> Rotation:
        return self.keys(span)


class RelativeFrames(RotaryFrames):
    """Counts positions from the first token of each block.

    One short table then serves the keys of all blocks, and only the queries need a rotation for each block. This is
    correct if the positions of the cached tokens are consecutive and the frequencies do not depend on the length.

    Args:
        table: Returns the rotations at positions [1 or B, t].
        distances: Positions of the queries relative to the first cached token, [1 or B, S].
        sizes: Number of tokens in each block, in order.
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
    """Return the rotation of `pairs` [K, R/2] from the source's tables [B, S, D], whose two halves are equal."""
    return Rotation(cos[..., pairs].transpose(1, 2), sin[..., pairs].transpose(1, 2))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Return x [B, H, S, R] rotated; H/K consecutive heads share the frequencies of one rotary head."""
    batch, heads, length, dim = x.shape
    rope_heads = rotation.cos.shape[1]
    grouped = x.reshape(batch, rope_heads, heads // rope_heads, length, dim)  # [B, K, H/K, S, R]
    first, second = grouped.chunk(2, dim=-1)
    cos, sin = rotation.cos.unsqueeze(2), rotation.sin.unsqueeze(2)  # [B, K, 1, S, R/2]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).reshape(x.shape)
    return turned.to(x.dtype)  # under autocast the table is in float32 and the projections are not
