"""Latents that are stored as their integer codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optimum_mla.cache.stored import Stored
from optimum_mla.codec import ChannelBits, is_coded, pack, total_channels, unpack
from optimum_mla.ops.blocks import Latents

INDEX_DTYPE = torch.int32


class CodedStored(Stored):
    """Latents of some tokens as packed codes, and the latents of exempt tokens beside them.

    Args:
        packed: Packed codes of all tokens, [B, bytes, T] uint8. Those of exempt tokens are not read.
        places: Row and token of each exempt latent, [E, 2] int32.
        exempt: The exempt latents, [E, r] in the model's dtype.
        channels: Bits of the channels.
    """

    def __init__(self, packed: Tensor, places: Tensor, exempt: Tensor, channels: ChannelBits) -> None:
        self.packed, self.places, self.exempt, self.channels = packed, places, exempt, channels

    @classmethod
    @torch.no_grad()
    def encode(cls, latents: Tensor, channels: ChannelBits) -> CodedStored:
        """Return stored latents [B, T, r]. Those that are no codes are exempt: the attention has not rounded them."""
        places = (~is_coded(latents, channels)).nonzero()
        exempt = latents[places[:, 0], places[:, 1]]
        return cls(pack(latents, channels), places.to(INDEX_DTYPE), exempt, channels)

    @property
    def tokens(self) -> int:
        return self.packed.shape[2]

    @property
    def batch(self) -> int:
        return self.packed.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.packed, self.places, self.exempt

    @property
    def opened_width(self) -> int:
        """Return the number of entries per token that `open` writes."""
        return total_channels(self.channels)

    def joined(self, newer: Stored) -> CodedStored:
        packed, places, exempt = newer.tensors
        later = places + places.new_tensor([0, self.tokens])
        return CodedStored(
            torch.cat([self.packed, packed], dim=2),
            torch.cat([self.places, later]),
            torch.cat([self.exempt, exempt]),
            self.channels,
        )

    def cut(self, start: int, stop: int) -> CodedStored:
        packed = self.packed[:, :, start:stop].clone(memory_format=torch.contiguous_format)
        inside = (self.places[:, 1] >= start) & (self.places[:, 1] < stop)
        places = self.places[inside] - self.places.new_tensor([0, start])
        return CodedStored(packed, places, self.exempt[inside], self.channels)

    def rows(self, indices: Tensor) -> CodedStored:
        indices = indices.to(self.packed.device)
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        row, entry = (indices[:, None] == self.places[:, 0]).nonzero(as_tuple=True)
        places = torch.stack([row.to(INDEX_DTYPE), self.places[entry, 1]], dim=1)
        return CodedStored(self.packed[indices], places, self.exempt[entry], self.channels)

    def to(self, device: torch.device) -> CodedStored:
        move: Callable[[Tensor], Tensor] = lambda tensor: tensor.to(device, non_blocking=True)  # noqa: E731
        return CodedStored(move(self.packed), move(self.places), move(self.exempt), self.channels)

    def open(self, out: Tensor | None = None) -> Latents:
        """Return the latents in the form that attention computes with.

        Args:
            out: The tensor to write into, [B, T, r]; None takes new memory.
        """
        if out is None:
            out = self.exempt.new_empty(self.batch, self.opened_width, self.tokens).mT
        unpack(self.packed, self.channels, out)
        if len(self.places):
            out[self.places[:, 0].long(), self.places[:, 1].long()] = self.exempt.to(out.dtype)
        return Latents(out, self.exempt.dtype)
