"""Cached tokens in blocks: what attention may ask of them, however they are stored.

B, S, T, H as everywhere; w is the width of a cached vector, M any number of query vectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

BLOCK_TOKENS = 512
"""Tokens that a decode step looks at together: large enough for the matrix products, small beside a long cache."""


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
        # The cache is the left factor: as the right one, bf16 kernels on CPUs first rearrange all of it.
        return (self.vectors @ queries.transpose(1, 2)).transpose(1, 2)

    def context(self, weights: Tensor) -> Tensor:
        return weights @ self.vectors

    def project(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(self.vectors, weight, bias)

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
    @abstractmethod
    def tokens(self) -> int:
        """T, all blocks together."""

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
    def tokens(self) -> int:
        return self.first.shape[1]

    @property
    def is_dense(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Block]:
        for start in range(0, self.tokens, BLOCK_TOKENS):
            yield self._slice(start, min(start + BLOCK_TOKENS, self.tokens))

    def whole(self) -> Block:
        return self._slice(0, self.tokens)

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
