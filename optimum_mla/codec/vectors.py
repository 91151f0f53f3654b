"""The codec of one layer: from the vectors that it caches to packed codes, and back."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers.utils.generic import maybe_autocast

from optimum_mla.codec import gains
from optimum_mla.codec.layout import Layout
from optimum_mla.codec.packing import pack, unpack
from optimum_mla.core.errors import InvalidValueError


@dataclass(frozen=True)
class VectorCodec:
    """Stores vectors of w numbers in `layout.bytes_per_token` bytes each, in r ≤ w channels.

    A vector c has the latent `latent_down` (c - `centre`), in units of the steps of its channels. The codes of this
    latent are stored, and `centre` + `latent_up` times what they stand for is read. Computations are in float32.

    Attributes:
        layout: Bits of the channels, and the groups that have gains.
        latent_down: [r, w] float32; the steps are folded in.
        latent_up: [w, r] float32; the steps are folded in.
        centre: Mean of the vectors, [w] float32, which stands for what no channel holds.
        weight: What a unit of squared error in each channel costs, [r] float32; the gains are chosen with it.

    Raises:
        InvalidValueError: A tensor does not fit the layout.
    """

    layout: Layout
    latent_down: Tensor
    latent_up: Tensor
    centre: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        channels, width = self.layout.num_channels, len(self.centre)
        wanted = {"latent_down": (channels, width), "latent_up": (width, channels), "weight": (channels,)}
        for name, shape in wanted.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise InvalidValueError(name, list(found), f"{list(shape)}, as the layout says")

    @property
    def width(self) -> int:
        """Return the number of numbers of a vector, w."""
        return len(self.centre)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "layout"}

    def to(self, device: torch.device | str) -> VectorCodec:
        """Return the codec with its tensors on a device."""
        return VectorCodec(self.layout, *(tensor.to(device) for tensor in self.tensors.values()))

    @torch.no_grad()
    def encode(self, vectors: Tensor) -> Tensor:
        """Return the codes of vectors [..., T, w], packed, [..., bytes_per_token, T] uint8."""
        with maybe_autocast(vectors.device.type, enabled=False):
            latents = (vectors.float() - self.centre) @ self.latent_down.mT
        return pack(gains.encode(latents, self.layout, self.weight), self.layout.stored)

    @torch.no_grad()
    def decode(self, packed: Tensor) -> Tensor:
        """Return the vectors that packed codes [..., bytes_per_token, T] stand for, [..., T, w] float32."""
        shape = (*packed.shape[:-2], self.layout.num_channels + self.layout.gain_groups, packed.shape[-1])
        codes = unpack(packed, self.layout.stored, self.centre.new_empty(shape).mT)
        with maybe_autocast(packed.device.type, enabled=False):
            return gains.decode(codes, self.layout) @ self.latent_up.mT + self.centre
