"""Cached vectors as they lie in memory: plain, or quantized."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from optimum_mla.cache.backends import Backend
from optimum_mla.ops.blocks import Latents, ShiftedLatents

SPARE_TOKENS = 16
"""A tensor that tokens are appended to one by one gets room for so many more, not to be copied at every step."""


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
        """Return the given rows of the batch, in that order, or those that a boolean mask [B] selects."""

    @abstractmethod
    def to(self, device: torch.device) -> Stored:
        """On another device."""


class DenseStored(Stored):
    """Plain vectors.

    Args:
        buffer: [B, T or more, w].
        tokens: How many of them count; None: all.
    """

    def __init__(self, buffer: Tensor, tokens: int | None = None) -> None:
        self.buffer = buffer
        self._tokens = buffer.shape[1] if tokens is None else tokens

    @property
    def vectors(self) -> Tensor:
        """[B, T, w]."""
        return self.buffer[:, : self._tokens]

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def batch(self) -> int:
        return self.buffer.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.buffer,)

    def joined(self, newer: Stored) -> DenseStored:
        (further,) = newer.tensors
        return DenseStored(torch.cat([self.vectors, further[:, : newer.tokens]], dim=1))

    def appended(self, *parts: Tensor) -> DenseStored:
        """With new tokens, whose vectors [B, S, w] come in pieces to be put side by side.

        They are written into the spare room where there is some. `self` does not see them, but must not be appended to
        again.
        """
        count = parts[0].shape[1]
        total = self._tokens + count
        if torch.is_grad_enabled() and any(part.requires_grad for part in (self.buffer, *parts)):
            new = torch.cat(parts, dim=-1)
            return DenseStored(torch.cat([self.vectors, new], dim=1))
        buffer = self.buffer
        if total > buffer.shape[1] or (buffer.is_inference() and not torch.is_inference_mode_enabled()):
            room = total + SPARE_TOKENS if count == 1 else total
            buffer = parts[0].new_empty(self.batch, room, self.buffer.shape[2])
            buffer[:, : self._tokens] = self.vectors
        new = buffer[:, self._tokens : total]
        torch.cat(parts, dim=-1, out=new) if len(parts) > 1 else new.copy_(parts[0])
        return DenseStored(buffer, total)

    def cut(self, start: int, stop: int) -> DenseStored:
        return DenseStored(self.vectors[:, start:stop].clone(memory_format=torch.contiguous_format))

    def rows(self, indices: Tensor) -> DenseStored:
        return DenseStored(self.vectors[indices.to(self.buffer.device)])

    def to(self, device: torch.device) -> DenseStored:
        return DenseStored(self.buffer.to(device, non_blocking=True), self._tokens)

    def open(self) -> Latents:
        """Ready to compute with."""
        return Latents(self.vectors)


class QuantizedStored(Stored):
    """Vectors as codes and parameters of a `Backend`.

    Args:
        stored: Packed codes [B, T, words], scales [B, T, G] and, for affine codes, shifts [B, T, G], of G groups.
        backend: Who can unpack them.
        width: w. group: Numbers in a group; the last one may hold some that do not count.
        dtype: Of the vectors.
    """

    def __init__(self, stored: tuple[Tensor, ...], backend: Backend, width: int, group: int, dtype: torch.dtype):
        self.stored, self.backend, self.width, self.group, self.dtype = stored, backend, width, group, dtype

    @classmethod
    @torch.no_grad()
    def quantize(cls, vectors: Tensor, backend: Backend, group_size: int) -> QuantizedStored:
        """Quantize vectors [B, T, w]. Codes are constants: no gradient goes through them."""
        batch, tokens, width = vectors.shape
        group = balanced_group(width, group_size)
        groups = math.ceil(width / group)
        if padding := groups * group - width:
            # The last number again: it leaves its group's range as it is.
            vectors = torch.cat([vectors, vectors[..., -1:].expand(-1, -1, padding)], dim=-1)
        columns = vectors.unflatten(-1, (groups, group)).permute(3, 2, 0, 1)  # [g, G, B, T]
        codes, *parameters = backend.encode(columns.flatten(1))
        by_number = codes.unflatten(-1, (groups, -1)).transpose(0, 1).flatten(0, 1)  # [G·g, B·T]
        stored = [backend.pack(by_number), *(p.view(groups, -1) for p in parameters if p is not None)]
        at_rest = tuple(tensor.t().contiguous().unflatten(0, (batch, tokens)) for tensor in stored)
        return cls(at_rest, backend, width, group, vectors.dtype)

    def _with(self, change: Callable[[Tensor], Tensor]) -> QuantizedStored:
        stored = tuple(change(tensor) for tensor in self.stored)
        return QuantizedStored(stored, self.backend, self.width, self.group, self.dtype)

    @property
    def tokens(self) -> int:
        return self.stored[0].shape[1]

    @property
    def batch(self) -> int:
        return self.stored[0].shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.stored

    @property
    def opened_width(self) -> int:
        """Numbers of a vector as `open` gives it: the scaled codes of all groups, then their shifts."""
        groups = self.stored[1].shape[-1]
        return groups * (self.group + len(self.stored) - 2)

    def joined(self, newer: Stored) -> QuantizedStored:
        further = iter(newer.tensors)
        return self._with(lambda tensor: torch.cat([tensor, next(further)], dim=1))

    def cut(self, start: int, stop: int) -> QuantizedStored:
        return self._with(lambda tensor: tensor[:, start:stop].clone(memory_format=torch.contiguous_format))

    def rows(self, indices: Tensor) -> QuantizedStored:
        return self._with(lambda tensor: tensor[indices.to(tensor.device)])

    def to(self, device: torch.device) -> QuantizedStored:
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def open(self, out: Tensor | None = None) -> Latents:
        """Ready to compute with.

        Args:
            out: Where to write, [B, T, `opened_width`]; None takes new memory.
        """
        codes, scale, *shift = self.stored
        groups = scale.shape[-1]
        if out is None:
            out = codes.new_empty(self.batch, self.tokens, self.opened_width, dtype=self.dtype)
        numbers = out[..., : groups * self.group]
        self.backend.unpack(codes, numbers)
        numbers.unflatten(-1, (groups, self.group)).mul_(scale.unsqueeze(-1))
        if shift:
            out[..., groups * self.group :].copy_(shift[0])
        return ShiftedLatents(out, groups if shift else 0, self.group, self.width)


def balanced_group(width: int, group_size: int) -> int:
    """Numbers per group so that as many groups as `group_size` asks for are of equal size, a multiple of 4."""
    groups = math.ceil(width / group_size)
    return 4 * math.ceil(math.ceil(width / groups) / 4)
