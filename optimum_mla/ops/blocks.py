"""Cached tokens in blocks: what attention may ask of them, however they are stored.

B, S, T, H as everywhere; w is the width of a cached vector, M any number of query vectors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from optimum_mla.ops.absorb import product

BLOCK_NUMBERS = 2**20
"""About so many numbers are looked at together: enough for the matrix products, little beside a long cache."""
SHORTEST_BLOCK = 256


def block_tokens(width: int) -> int:
    """Tokens in a block of vectors of `width` numbers: a power of two."""
    return max(SHORTEST_BLOCK, 2 ** round(math.log2(BLOCK_NUMBERS / width)))


class Latents:
    """Vectors of some cached tokens, ready to compute with.

    Args:
        vectors: [B, T, w].
    """

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    @property
    def layout(self) -> Hashable:
        """Latents of the same layout lift and lower alike."""
        return None

    def lift(self, queries: Tensor) -> Tensor:
        """Queries [..., w] as the stored vectors want them: inner products with those are the ones asked for."""
        return queries

    def lower(self, sums: Tensor) -> Tensor:
        """Weighted sums [..., ·] of the stored vectors as sums of the vectors that they stand for, [..., w]."""
        return sums

    def logits(self, queries: Tensor) -> Tensor:
        """Inner products of queries [B, M, w] with every token's vector: [B, M, T]."""
        return product(self.vectors, self.lift(queries).transpose(1, 2)).transpose(1, 2)

    def context(self, weights: Tensor) -> Tensor:
        """Weighted sums of the vectors, weights [B, M, T]: [B, M, w]."""
        return self.lower(weights @ self.vectors)

    def project(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A linear map, weight [m, w] and bias [m], of every vector: [B, T, m]."""
        projected = product(self.vectors, self.lift(weight).t())
        return projected if bias is None else projected + bias

    def dense(self) -> Tensor:
        """The vectors that these stand for, [B, T, w]."""
        return self.lower(self.vectors)


class ShiftedLatents(Latents):
    """Vectors in groups that share a shift, which is not added to their numbers but stands behind them.

    Adding it would take as long as all the rest of decoding. Instead, a query meets it with the sum of its own group.

    Args:
        vectors: The numbers of all groups, then the groups' shifts: [B, T, G·g + shifts].
        shifts: G, or 0 where there are none.
        group: g.
        width: w; groups are padded behind it.
    """

    def __init__(self, vectors: Tensor, shifts: int, group: int, width: int) -> None:
        super().__init__(vectors)
        self.shifts, self.group, self.width = shifts, group, width

    @property
    def layout(self) -> Hashable:
        return self.shifts, self.group, self.width, self.vectors.shape[-1]

    def lift(self, queries: Tensor) -> Tensor:
        numbers = nn.functional.pad(queries, (0, self.vectors.shape[-1] - self.shifts - self.width))
        if not self.shifts:
            return numbers
        return torch.cat([numbers, numbers.unflatten(-1, (self.shifts, self.group)).sum(-1)], dim=-1)

    def lower(self, sums: Tensor) -> Tensor:
        if self.shifts:
            numbers, shifts = sums.split([sums.shape[-1] - self.shifts, self.shifts], dim=-1)
            sums = (numbers.unflatten(-1, (self.shifts, self.group)) + shifts.unsqueeze(-1)).flatten(-2)
        return sums[..., : self.width]


class Block(NamedTuple):
    """Some consecutive tokens of one layer's cache.

    Attributes:
        first: The first cached vectors: the joint latent, or the key latent.
        second: The second: the rotary key [B, T, K·R] or the value latent; may have no width.
        scales: The key norms' factors [B, T, G], of no width without key norms.
        joined: The vectors of `first` and `second`, as they are stored, where they lie side by side in memory; or None.
    """

    first: Latents
    second: Latents
    scales: Tensor
    joined: Tensor | None = None

    @property
    def tokens(self) -> int:
        """T of this block."""
        return self.scales.shape[1]


class CacheView(ABC):
    """All tokens that a step attends to, oldest first. Iterating opens one block at a time."""

    @property
    def tokens(self) -> int:
        """T, all blocks together."""
        return sum(self.sizes)

    @property
    @abstractmethod
    def sizes(self) -> list[int]:
        """Tokens of each block, in order."""

    @property
    @abstractmethod
    def is_dense(self) -> bool:
        """Whether all tokens lie in memory as plain tensors, so that `whole` decodes nothing."""

    @property
    @abstractmethod
    def scales(self) -> int:
        """G of the key norms' factors, 0 without key norms."""

    @abstractmethod
    def __iter__(self) -> Iterator[Block]:
        """The blocks, in order. What a block holds is good until the next one is asked for."""

    @abstractmethod
    def whole(self) -> Block:
        """Everything as one dense block."""


class TensorView(CacheView):
    """The two tensors of a Transformers cache, [B, 1, T, ·], in slices; nothing is copied.

    Args:
        first: First cached tensor. second: Second cached tensor.
        scales: How many of the last numbers of `second` are key-norm factors.
    """

    def __init__(self, first: Tensor, second: Tensor, scales: int) -> None:
        self.first, self.second = first[:, 0], second[:, 0]
        self.width = self.second.shape[-1] - scales

    @property
    def sizes(self) -> list[int]:
        tokens, size = self.first.shape[1], block_tokens(self.first.shape[2])
        return [min(size, tokens - start) for start in range(0, tokens, size)]

    @property
    def is_dense(self) -> bool:
        return True

    @property
    def scales(self) -> int:
        return self.second.shape[-1] - self.width

    def __iter__(self) -> Iterator[Block]:
        start = 0
        for size in self.sizes:
            yield self._slice(start, start + size)
            start += size

    def whole(self) -> Block:
        return self._slice(0, self.first.shape[1])

    def _slice(self, start: int, stop: int) -> Block:
        second, scales = self.second[:, start:stop].split([self.width, self.second.shape[-1] - self.width], dim=-1)
        return Block(Latents(self.first[:, start:stop]), Latents(second), scales)


def concatenate(blocks: list[Block]) -> Block:
    """One dense block from several."""
    if len(blocks) == 1 and blocks[0].first.layout is blocks[0].second.layout is None:
        return blocks[0]
    return Block(
        Latents(torch.cat([block.first.dense() for block in blocks], dim=1)),
        Latents(torch.cat([block.second.dense() for block in blocks], dim=1)),
        torch.cat([block.scales for block in blocks], dim=1),
    )
