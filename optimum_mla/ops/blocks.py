"""Cached tokens in blocks: what attention may ask of them, however they are stored.

B, S, T, H as everywhere; w is the width of a cached vector, M any number of query vectors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_mla.ops.absorb import product

BLOCK_NUMBERS = 2**19
"""About so many numbers are looked at together: enough for the matrix products, little beside a long cache."""
SHORTEST_BLOCK = 256


def block_tokens(width: int) -> int:
    """Tokens in a block of vectors of `width` numbers: a power of two."""
    return max(SHORTEST_BLOCK, 2 ** round(math.log2(BLOCK_NUMBERS / width)))


class Latents(ABC):
    """Vectors [B, T, w] of some cached tokens, ready to compute with."""

    @abstractmethod
    def logits(self, queries: Tensor) -> Tensor:
        """Inner products of queries [B, M, w] with every token's vector: [B, M, T]."""

    @abstractmethod
    def context(self, weights: Tensor) -> Tensor:
        """Weighted sums of the vectors, weights [B, M, T]: [B, M, w]."""

    @abstractmethod
    def project(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A linear map, weight [m, w] and bias [m], of every vector: [B, T, m]."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The vectors as they came, [B, T, w]."""


class DenseLatents(Latents):
    """Vectors in a plain tensor [B, T, w]."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    def logits(self, queries: Tensor) -> Tensor:
        return product(self.vectors, queries.transpose(1, 2)).transpose(1, 2)

    def context(self, weights: Tensor) -> Tensor:
        return weights @ self.vectors

    def project(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        projected = product(self.vectors, weight.t())
        return projected if bias is None else projected + bias

    def dense(self) -> Tensor:
        return self.vectors


class Block(NamedTuple):
    """Some consecutive tokens of one layer's cache.

    Attributes:
        first: The first cached vectors: the joint latent, or the key latent.
        second: The second: the rotary key [B, T, K·R] or the value latent; may have no width.
        scales: The key norms' factors [B, T, G], of no width without key norms.
    """

    first: Latents
    second: Latents
    scales: Tensor

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

    @abstractmethod
    def __iter__(self) -> Iterator[Block]:
        """The blocks, in order."""

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

    def __iter__(self) -> Iterator[Block]:
        start = 0
        for size in self.sizes:
            yield self._slice(start, start + size)
            start += size

    def whole(self) -> Block:
        return self._slice(0, self.first.shape[1])

    def _slice(self, start: int, stop: int) -> Block:
        second, scales = self.second[:, start:stop].split([self.width, self.second.shape[-1] - self.width], dim=-1)
        return Block(DenseLatents(self.first[:, start:stop]), DenseLatents(second), scales)


def concatenate(blocks: list[Block]) -> Block:
    """One dense block from several."""
    return Block(
        DenseLatents(torch.cat([block.first.dense() for block in blocks], dim=1)),
        DenseLatents(torch.cat([block.second.dense() for block in blocks], dim=1)),
        torch.cat([block.scales for block in blocks], dim=1),
    )
