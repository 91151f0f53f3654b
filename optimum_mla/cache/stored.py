"""Containers of cached vectors: plain ones in the model's dtype, and quantized ones."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from optimum_mla.cache.backends import Backend
from optimum_mla.ops.blocks import Latents, ShiftedLatents

SPARE_TOKENS = 16
"""Number of further tokens for which a buffer gets room when a single token is appended.

With this room, decoding does not copy the buffer at every step.
"""


class Stored(ABC):
    """Base class of the stored vectors of some consecutive tokens.

    Every operation returns a new object. Its memory does not include that of tokens that the operation has dropped.
    """

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Return the number of tokens."""

    @property
    @abstractmethod
    def batch(self) -> int:
        """Return the number of rows in the batch."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Return every tensor that the object holds."""

    @abstractmethod
    def joined(self, newer: Stored) -> Stored:
        """Return an object with this object's tokens, followed by those of `newer`, which must be of the same kind."""

    @abstractmethod
    def cut(self, start: int, stop: int) -> Stored:
        """Return a copy of the tokens from `start` to before `stop`."""

    @abstractmethod
    def rows(self, indices: Tensor) -> Stored:
        """Return the given rows of the batch, in that order, or those that a boolean mask [B] selects."""

    @abstractmethod
    def to(self, device: torch.device) -> Stored:
        """Return the same vectors on another device."""


class DenseStored(Stored):
    """Vectors that are stored without quantization.

    Args:
        buffer: The vectors, [B, T or more, w].
        tokens: T, the number of tokens at the start of the buffer that are in use; None takes all of them.
    """

    def __init__(self, buffer: Tensor, tokens: int | None = None) -> None:
        self.buffer = buffer
        self._tokens = buffer.shape[1] if tokens is None else tokens

    @property
    def width(self) -> int:
        """Return the number of entries of a vector, w."""
        return self.buffer.shape[2]

    @property
    def vectors(self) -> Tensor:
        """Return the vectors of the tokens, [B, T, w], as a view of the buffer."""
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
        """Return an object with this object's tokens, followed by new ones.

        The new tokens are written into the spare room of the buffer if they fit. The returned object then reuses this
        one's buffer; append only to the returned object.

        Args:
            *parts: Vectors of the new tokens, [B, S, width] each. They are put side by side along the last dimension,
                where their widths add up to w.
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
        """Return the vectors in the form that attention computes with."""
        return Latents(self.vectors)


class QuantizedStored(Stored):
    """Vectors that are stored as the codes and parameters of a `Backend`.

    Args:
        stored: Packed codes [B, T, words], scales [B, T, G] and, for affine codes, shifts [B, T, G], where G is the
            number of groups.
        backend: The backend that has packed the codes.
        width: w, the number of entries of a vector.
        group: Number of entries in a group. The last group of a vector may be padded.
        dtype: The dtype of the vectors before quantization.
    """

    def __init__(self, stored: tuple[Tensor, ...], backend: Backend, width: int, group: int, dtype: torch.dtype):
        self.stored, self.backend, self.width, self.group, self.dtype = stored, backend, width, group, dtype

    @classmethod
    @torch.no_grad()
    def quantize(cls, vectors: Tensor, backend: Backend, group_size: int) -> QuantizedStored:
        """Return quantized vectors; no gradient flows back through them.

        Args:
            vectors: The vectors, [B, T, w].
            backend: The backend that quantizes and packs.
            group_size: Largest number of neighbouring entries that share a scale; see `balanced_group`.
        """
        batch, tokens, width = vectors.shape
        group = balanced_group(width, group_size)
        groups = math.ceil(width / group)
        if padding := groups * group - width:
            # The padding repeats the last entry, so it does not change the range of its group.
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
        """Return the number of entries per vector that `open` writes: the scaled codes of all groups and the shifts."""
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
        """Return the vectors in the form that attention computes with: scaled codes, to which the shifts are not added.

        Args:
            out: The tensor to write into, [B, T, `opened_width`]; None takes new memory.
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
    """Return the number of entries per group, so that all groups of a vector are of one size.

    The number of groups is the smallest one with groups of at most `group_size` entries. Their size is rounded up to a
    multiple of 4, so the last group may need padding.

    Args:
        width: Number of entries of a vector.
        group_size: Largest number of entries per group.
    """
    groups = math.ceil(width / group_size)
    return 4 * math.ceil(math.ceil(width / groups) / 4)
