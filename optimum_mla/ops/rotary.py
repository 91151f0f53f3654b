"""Rotation of half-split dims with frequencies that are gathered from the cos/sin tables of the source model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class PairTable:
    """Reads a family's tables of cos and sin as those of the D/2 pairs of a head, of which each turns by one angle.

    In this package dim i of a head turns with dim i + D/2. Dims that the family does not rotate are pairs that stand
    still, whose cosine is the attention factor of the rotary embedding.

    Attributes:
        head_dim: Number of dims of a head, D.
        interleaved: Whether the family turns dims 2i and 2i + 1 together, instead of i and i plus half of its rotary
            dims.
        repeated: Whether its tables repeat each angle for neighbouring dims, instead of in their second half.
        rotates: Whether the layer rotates queries and keys at all.
        scaling: Attention factor of the rotary embedding, which cos and sin are multiplied by.
    """

    head_dim: int
    interleaved: bool = False
    repeated: bool = False
    rotates: bool = True
    scaling: float = 1.0

    def cos_sin(self, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the pairs, [B, S, D/2] each, of the family's tables [B, S, W] with W rotary dims."""
        if not self.rotates:
            shape = (*table[0].shape[:-1], self.head_dim // 2)
            return table[0].new_ones(shape), table[1].new_zeros(shape)
        half = table[0].shape[-1] // 2
        cos, sin = (part[..., ::2] if self.repeated else part[..., :half] for part in table)
        still = self.head_dim // 2 - half
        if still:
            cos = torch.nn.functional.pad(cos, (0, still), value=self.scaling)
            sin = torch.nn.functional.pad(sin, (0, still))
        return cos, sin

    def order(self, width: int) -> Tensor | None:
        """Return the family's dim at each place of a head, [D], or None where the order is the same.

        Args:
            width: Number of dims that the family rotates, W.
        """
        if not self.rotates or (width == self.head_dim and not self.interleaved):
            return None
        turning = torch.arange(width)
        first, second = (turning[::2], turning[1::2]) if self.interleaved else turning.chunk(2)
        still = torch.arange(width, self.head_dim).chunk(2) if width < self.head_dim else (turning[:0], turning[:0])
        return torch.cat([first, still[0], second, still[1]])


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
        keys: Rotation at the positions from 0, at least as many as a block has tokens.
        distances: Positions of the queries relative to the first cached token, [1 or B, S].
        sizes: Number of tokens in each block, in order.
    """

    def __init__(
        self, table: Callable[[Tensor], Rotation], keys: Rotation, distances: Tensor, sizes: Sequence[int]
    ) -> None:
        starts = [0, *accumulate(sizes)][:-1]
        self.blocks = {start: index for index, start in enumerate(starts)}
        origins = torch.tensor(starts, device=distances.device)
        self.length = distances.shape[1]
        self.queries = table((distances[:, None] - origins[None, :, None]).flatten(1))  # blocks · S positions
        self.keys = keys

    def query(self, span: slice) -> Rotation:
        first = self.blocks[span.start] * self.length
        return self.queries.at(slice(first, first + self.length))

    def key(self, span: slice) -> Rotation:
        return self.keys.at(slice(0, span.stop - span.start))


def gather_rotation(cos: Tensor, sin: Tensor, pairs: Tensor) -> Rotation:
    """Return the rotation of `pairs` [K, R/2] from the tables of all pairs [B, S, D/2], in the same order in memory."""
    if is_transposed(cos):
        return Rotation(cos.mT[:, pairs].mT, sin.mT[:, pairs].mT)
    return Rotation(cos[..., pairs].transpose(1, 2), sin[..., pairs].transpose(1, 2))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Return x [B, H, S, R] rotated; H/K consecutive heads share the frequencies of one rotary head.

    The result is in the same order in memory as x: dim by dim or token by token.
    """
    batch, heads, length, dim = x.shape
    rope_heads = rotation.cos.shape[1]
    grouped = x.reshape(batch, rope_heads, heads // rope_heads, length, dim)  # [B, K, H/K, S, R]
    first, second = grouped.chunk(2, dim=-1)
    cos, sin = rotation.cos.unsqueeze(2), rotation.sin.unsqueeze(2)  # [B, K, 1, S, R/2]
    exact = x.dtype.itemsize >= 4  # In 16 bits it would be rounded elsewhere, and training compares with the other way.
    wider = torch.promote_types(x.dtype, cos.dtype) == x.dtype
    if exact and wider and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Half of the passes over memory, which decoding from rebuilt keys waits for; autograd cannot follow them.
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        written = torch.empty_like(grouped)
        one, other = written.chunk(2, dim=-1)
        torch.mul(first, cos, out=one).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=other).addcmul_(first, sin)
        return written.reshape(x.shape)
    halves = first * cos - second * sin, second * cos + first * sin
    turned = torch.cat([half.mT for half in halves], dim=-2).mT if is_transposed(x) else torch.cat(halves, dim=-1)
    return turned.reshape(x.shape).to(x.dtype)  # under autocast the table is in float32 and the projections are not


def is_transposed(x: Tensor) -> bool:
    """Return whether the last dimension but one is the one whose numbers lie side by side in memory."""
    return x.stride(-1) != 1 and x.stride(-2) == 1
