"""The blocks of tokens that a layer of a latent cache holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimum_mla.cache.stored import DenseStored, QuantizedStored
from optimum_mla.ops.blocks import Block, CacheView, Latents, concatenate

Encoder = Callable[[Tensor], QuantizedStored]
"""Stores vectors [B, T, w] in fewer bits than they have."""


@dataclass(eq=False)
class StoredBlock:
    """The cached vectors of some consecutive tokens.

    Treat a block as immutable. The dataclass is not frozen only because Transformers' exporters assign to its
    attributes.

    Attributes:
        plain: The numbers that stay in the model's dtype, side by side: the first vectors, the second vectors, and the
            factors of the key norms, without those that are quantized.
        first: The quantized first vectors, or None if the first vectors are in `plain`.
        second: The quantized second vectors, or None if they are in `plain`.
        widths: Number of entries per token in the first vectors, in the second vectors, and in the factors.
    """

    plain: DenseStored
    first: QuantizedStored | None
    second: QuantizedStored | None
    widths: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return self.plain.tokens

    @property
    def batch(self) -> int:
        """Return the number of rows in the batch."""
        return self.plain.batch

    @property
    def quantized(self) -> bool:
        """Return whether the first or the second vectors are quantized."""
        return self.first is not None or self.second is not None

    @property
    def tensors(self) -> list[Tensor]:
        """Return every tensor that the block holds."""
        return [tensor for part in (self.plain, self.first, self.second) if part for tensor in part.tensors]

    def _each(self, change: Callable[[Any], Any]) -> StoredBlock:
        first, second = (part and change(part) for part in (self.first, self.second))
        return StoredBlock(change(self.plain), first, second, self.widths)

    def cut(self, start: int, stop: int) -> StoredBlock:
        """Return a block with the tokens from `start` to before `stop`."""
        return self._each(lambda part: part.cut(start, stop))

    def rows(self, indices: Tensor) -> StoredBlock:
        """Return a block with the rows of the batch that `indices` gives, in that order."""
        return self._each(lambda part: part.rows(indices))

    def to(self, device: torch.device) -> StoredBlock:
        """Return the block on another device."""
        return self._each(lambda part: part.to(device))

    def joined(self, newer: StoredBlock) -> StoredBlock:
        """Return a block with this block's tokens, followed by those of `newer`, which must be quantized alike."""
        first = self.first and newer.first and self.first.joined(newer.first)
        second = self.second and newer.second and self.second.joined(newer.second)
        return StoredBlock(self.plain.joined(newer.plain), first, second, self.widths)

    def encoded(self, encoders: tuple[Encoder | None, Encoder | None]) -> StoredBlock:
        """Return a quantized copy of a block whose first and second vectors are both still in `plain`.

        Args:
            encoders: What stores the first and the second vectors; None keeps them in the model's dtype.
        """
        first, second, factors = self.widths
        *vectors, key_factors = self.plain.vectors.split([first, second, factors], dim=-1)
        kept: list[Tensor] = []
        coded: list[QuantizedStored | None] = []
        for part, encoder in zip(vectors, encoders, strict=True):
            if encoder is None or not part.shape[-1]:
                kept.append(part)
                coded.append(None)
            else:
                coded.append(encoder(part))
        return StoredBlock(DenseStored(torch.cat([*kept, key_factors], dim=-1)), coded[0], coded[1], self.widths)

    def open(self, memory: Tensor | None = None) -> Block:
        """Return the block in the form that attention computes with, decoding what is quantized.

        Args:
            memory: A tensor to decode into. It is used if its shape is right; otherwise new memory is taken.
        """
        coded = (self.first, self.second)
        kept = [0 if part else width for part, width in zip(coded, self.widths, strict=False)]
        *plain, key_factors = self.plain.vectors.split([*kept, self.plain.width - sum(kept)], dim=-1)
        if not self.quantized:
            return Block(Latents(plain[0]), Latents(plain[1]), key_factors, self.plain.vectors[..., : sum(kept)])
        widths = [part.opened_width if part else width for part, width in zip(coded, kept, strict=True)]
        size = (self.batch, self.tokens, sum(widths))
        fits = memory is not None and memory.shape == size
        joined = memory if memory is not None and fits else self.plain.buffer.new_empty(size)
        # These are slices because autograd forbids writing to any of the views that one call of `split` returns.
        outs = joined[..., : widths[0]], joined[..., widths[0] :]
        first, second = (
            part.open(out) if part else Latents(out.copy_(vectors), vectors.dtype)
            for part, vectors, out in zip(coded, plain, outs, strict=True)
        )
        return Block(first, second, key_factors, joined)


class BlockView(CacheView):
    """A view of a layer's blocks that decodes each block when iteration reaches it.

    Without gradients, a block is decoded into the memory of the block before it, so use a block before taking the next.
    """

    def __init__(self, blocks: list[StoredBlock]) -> None:
        self.blocks = blocks

    @property
    def sizes(self) -> list[int]:
        return [block.tokens for block in self.blocks]

    @property
    def is_dense(self) -> bool:
        return not any(block.quantized for block in self.blocks)

    @property
    def num_key_factors(self) -> int:
        return self.blocks[0].widths[2]

    def __iter__(self) -> Iterator[Block]:
        memory: Tensor | None = None
        for stored in self.blocks:
            block = stored.open(memory)
            yield block
            # Taking new memory for every block would cost more time than decoding. With gradients on, memory is not
            # reused, because autograd still needs the earlier blocks in the backward pass.
            memory = block.adjacent if stored.quantized and not torch.is_grad_enabled() else None

    def whole(self) -> Block:
        return concatenate([stored.open() for stored in self.blocks])
