"""Cached vectors as they lie in memory: plain, or quantized."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from optimum_mla.cache.backends import Backend
from optimum_mla.ops.blocks import DenseLatents, Latents


class Stored(ABC):
    """Vectors of some tokens at rest. Operations return new objects that share no memory with dropped tokens."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """How many tokens."""

    @property
    @abstractmethod
    def batch(self) -> int:
        """How many rows."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that takes memory."""

    @abstractmethod
    def joined(self, newer: Stored) -> Stored:
        """With the tokens of `newer` behind its own."""

    @abstractmethod
    def cut(self, start: int, stop: int) -> Stored:
        """The tokens from `start` to before `stop`."""

    @abstractmethod
    def rows(self, indices: Tensor) -> Stored:
        """The given rows of the batch, in that order."""

    @abstractmethod
    def to(self, device: torch.device) -> Stored:
        """On another device."""

    @abstractmethod
    def open(self) -> Latents:
        """Ready to compute with."""


class DenseStored(Stored):
    """A plain tensor [B, T, w]."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    @property
    def tokens(self) -> int:
        return self.vectors.shape[1]

    @property
    def batch(self) -> int:
        return self.vectors.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.vectors,)

    def joined(self, newer: Stored) -> DenseStored:
        return DenseStored(torch.cat([self.vectors, *newer.tensors], dim=1))

    def cut(self, start: int, stop: int) -> DenseStored:
        return DenseStored(self.vectors[:, start:stop].clone())

    def rows(self, indices: Tensor) -> DenseStored:
        return DenseStored(self.vectors.index_select(0, indices.to(self.vectors.device)))

    def to(self, device: torch.device) -> DenseStored:
        return DenseStored(self.vectors.to(device, non_blocking=True))

    def open(self) -> Latents:
        return DenseLatents(self.vectors)


class QuantizedStored(Stored):
    """Codes and parameters of a `Backend`, each [·, G, B, T] for G groups a vector.

    Args:
        stored: What `Backend.encode` gave, the columns apart by group, row and token.
        backend: Who can decode it.
        width: w. group: Numbers in a group; the last one may hold some that do not count.
        dtype: Of the vectors.
    """

    def __init__(self, stored: tuple[Tensor, ...], backend: Backend, width: int, group: int, dtype: torch.dtype):
        self.stored, self.backend, self.width, self.group, self.dtype = stored, backend, width, group, dtype

    @classmethod
    def quantize(cls, vectors: Tensor, backend: Backend, group_size: int) -> QuantizedStored:
        """Quantize vectors [B, T, w]."""
        width = vectors.shape[-1]
        group = balanced_group(width, group_size)
        groups = math.ceil(width / group)
        if padding := groups * group - width:
            # The last number again: it leaves its group's range as it is.
            vectors = torch.cat([vectors, vectors[..., -1:].expand(*vectors.shape[:-1], padding)], dim=-1)
        columns = vectors.unflatten(-1, (groups, group)).permute(3, 2, 0, 1)  # [g, G, B, T]
        stored = backend.encode(columns.flatten(1))
        apart = tuple(tensor.unflatten(-1, columns.shape[1:]) for tensor in stored)
        return cls(apart, backend, width, group, vectors.dtype)

    def _with(self, change: Callable[[Tensor], Tensor]) -> QuantizedStored:
        stored = tuple(change(tensor) for tensor in self.stored)
        return QuantizedStored(stored, self.backend, self.width, self.group, self.dtype)

    @property
    def tokens(self) -> int:
        return self.stored[0].shape[-1]

    @property
    def batch(self) -> int:
        return self.stored[0].shape[-2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.stored

    def joined(self, newer: Stored) -> QuantizedStored:
        further = iter(newer.tensors)
        return self._with(lambda tensor: torch.cat([tensor, next(further)], dim=-1))

    def cut(self, start: int, stop: int) -> QuantizedStored:
        return self._with(lambda tensor: tensor[..., start:stop].clone())

    def rows(self, indices: Tensor) -> QuantizedStored:
        return self._with(lambda tensor: tensor.index_select(-2, indices.to(tensor.device)))

    def to(self, device: torch.device) -> QuantizedStored:
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def open(self) -> Latents:
        groups, batch, tokens = self.stored[0].shape[1:]
        flat = tuple(tensor.flatten(1) for tensor in self.stored)
        columns = self.backend.decode(flat, self.group, self.dtype)
        # Channel-major, and in a vector first all groups' first numbers, then their second ones, ...
        spread = columns.reshape(self.group * groups, batch, tokens).transpose(0, 1)  # [B, g·G, T]
        return SpreadLatents(spread, groups, self.width)


class SpreadLatents(Latents):
    """Vectors decoded to [B, g·G, T], the numbers of their G groups interleaved.

    Queries and weights are brought into that order, not the cache into theirs.
    """

    def __init__(self, vectors: Tensor, groups: int, width: int) -> None:
        self.vectors, self.groups, self.width = vectors, groups, width

    def _spread(self, x: Tensor) -> Tensor:
        """Numbers [..., w] in the order of the vectors, zero where those are padded: [..., g·G]."""
        x = nn.functional.pad(x, (0, self.vectors.shape[1] - self.width))
        return x.unflatten(-1, (self.groups, -1)).transpose(-1, -2).flatten(-2)

    def _gather(self, x: Tensor) -> Tensor:
        """The inverse of `_spread`."""
        return x.unflatten(-1, (-1, self.groups)).transpose(-1, -2).flatten(-2)[..., : self.width]

    def logits(self, queries: Tensor) -> Tensor:
        return self._spread(queries) @ self.vectors

    def context(self, weights: Tensor) -> Tensor:
        return self._gather((self.vectors @ weights.transpose(1, 2)).transpose(1, 2))

    def project(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        projected = (self._spread(weight) @ self.vectors).transpose(1, 2)  # [B, T, m]
        return projected if bias is None else projected + bias

    def dense(self) -> Tensor:
        return self._gather(self.vectors.transpose(1, 2))


def balanced_group(width: int, group_size: int) -> int:
    """Numbers per group so that as many groups as `group_size` asks for are of equal size, a multiple of 4."""
    groups = math.ceil(width / group_size)
    return 4 * math.ceil(math.ceil(width / groups) / 4)
