"""A cache for models whose weights are left alone: old tokens become codes, first and newest ones stay exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from optimum_mla.cache.cache import PositionedCache
from optimum_mla.cache.positions import CachedPositions
from optimum_mla.codec.vectors import VectorCodec
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.ops.positions import first_tokens
from optimum_mla.ops.rotary import Rotation, rotate

Turns = Callable[[slice, torch.device], tuple[Tensor, Tensor]]
"""Returns cos and sin of all pairs, [1 or B, T, D/2] each, for the cached tokens in a slice, on a device."""


@dataclass(frozen=True)
class ExactTokens:
    """Which tokens of a coded cache keep their keys and values.

    Attributes:
        sinks: Number of first tokens of each sequence, without padding, that are never read from codes.
        recent: Least number of newest tokens that are never read from codes.
        together: Number of tokens that become codes at a time, once so many more than `recent` are exact.
    """

    sinks: int = 4
    recent: int = 64
    together: int = 64

    def coded(self, tokens: int) -> int:
        """Return how many of a sequence's tokens are codes."""
        return max(0, tokens - self.recent) // self.together * self.together


EXACT_TOKENS = ExactTokens()
TILE = 1024
"""Tokens whose codes are opened at a time on CPUs, so that what lies between codes and keys stays in fast memory."""


class CodecLayer(CacheLayerMixin):
    """The cache of one layer of full attention, with the interface of Transformers' cache layers.

    What attention reads is exact for the tokens of the pass itself, for the newest tokens and for the first ones. All
    other keys and values come from codes. A token is coded once, from its exact key and value. Codes hold keys before
    their rotation. `keys` and `values` are those of the newest tokens, [B, G, R, D], rotated.

    Args:
        codec: The codec of [key ; value] of all heads, w = 2·G·D.
        turns: Gives the rotation of cached tokens.
        order: The family's dim at each place of a head, [D], or None where the order is the same; see `PairTable`.
        exact: Which tokens stay exact.

    Attributes:
        coded: Number of tokens that are codes.
        starts: Place of the first token of each row that is no padding, [1 or B]; None stands for 0.
    """

    is_croppable = True
    is_sliding = False

    def __init__(
        self, codec: VectorCodec, turns: Turns, order: Tensor | None = None, exact: ExactTokens = EXACT_TOKENS
    ) -> None:
        super().__init__()
        self.codec, self.exact, self._cos_sin, self._order = codec, exact, turns, order
        self.starts: Tensor | None = None
        self._clear()

    def _clear(self) -> None:
        self.keys: Any = None
        self.values: Any = None
        self.codes: Any = None
        self.sinks: Any = None
        self.coded = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take over the dtype, the device and the shape of the first tokens."""
        width = 2 * key_states.shape[1] * key_states.shape[3]
        if width != self.codec.width or key_states.shape != value_states.shape:
            found = f"keys {list(key_states.shape)} and values {list(value_states.shape)}"
            raise InvalidValueError("cache", found, f"{self.codec.width} numbers a token, as the codec was fitted to")
        self.dtype, self.device = key_states.dtype, key_states.device
        self.codec = self.codec.to(self.device)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        batch = len(key_states)
        self.codes = torch.empty(batch, self.codec.layout.bytes_per_token, 0, dtype=torch.uint8, device=self.device)
        shape = (2, batch, key_states.shape[1], self.exact.sinks, key_states.shape[3])
        self.sinks = key_states.new_zeros(shape)  # keys, then values
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens and return the keys and values that the new ones attend to, [B, G, T, D] each.

        Args:
            key_states: Rotated keys of the new tokens, [B, G, S, D].
            value_states: Their values, [B, G, S, D].
            *args: Ignored, as Transformers' interface allows them.
            **kwargs: Ignored, as Transformers' interface allows them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        keys, values = self._open() if self.coded else (self.keys, self.values)
        leaving = self.exact.coded(self.get_seq_length()) - self.coded
        if leaving > 0:
            self._encode(leaving)
        return keys, values

    def _slots(self) -> Tensor:
        """Return the places of the sinks in the cache, [B, sinks]."""
        ordinal = torch.arange(self.exact.sinks, device=self.device)
        if self.starts is None:
            return ordinal.expand(len(self.keys), -1)
        return self.starts.to(self.device).expand(len(self.keys))[:, None] + ordinal

    def _encode(self, count: int) -> None:
        """Turn the oldest exact tokens into codes."""
        keys, values = (part[:, :, :count] for part in (self.keys, self.values))
        slots = self._slots() - self.coded
        inside = ((slots >= 0) & (slots < count))[:, None, :, None]
        place = slots.clamp(0, count - 1)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.sinks = torch.stack(
            [
                torch.where(inside, part.gather(2, place), held)
                for part, held in zip((keys, values), self.sinks, strict=True)
            ]
        )
        cos, sin = (part.unsqueeze(1) for part in self._cos_sin(slice(self.coded, self.coded + count), self.device))
        keys = keys if self._order is None else keys[..., self._order.to(keys.device)]
        size = (cos.square() + sin.square()).repeat(1, 1, 1, 2)  # the square of the rotary embedding's attention factor
        plain = rotate(keys.float(), Rotation(cos, -sin)) / size
        vectors = torch.cat([part.transpose(1, 2).flatten(2) for part in (plain, values.float())], dim=-1)
        self.codes = torch.cat([self.codes, self.codec.encode(vectors)], dim=-1)
        # Copies, because a view would keep the memory of what has become codes.
        self.keys, self.values = self.keys[:, :, count:].clone(), self.values[:, :, count:].clone()
        self.coded += count

    def _open(self) -> tuple[Tensor, Tensor]:
        """Return the rotated keys and the values of all tokens, [B, G, T, D] each."""
        batch, heads, recent, dim = self.keys.shape
        opened = self.keys.new_empty(2, batch, heads, self.coded + recent + 1, dim)
        order = None if self._order is None else self._order.to(self.device).argsort()
        step = TILE if self.device.type == "cpu" else max(1, self.coded)
        for start in range(0, self.coded, step):
            span = slice(start, min(start + step, self.coded))
            vectors = self.codec.decode(self.codes[..., span]).unflatten(-1, (2, heads, dim))  # [B, t, 2, G, D]
            keys = rotate(vectors[:, :, 0], Rotation(*(part.unsqueeze(2) for part in self._cos_sin(span, self.device))))
            keys = keys if order is None else keys[..., order]
            opened[0, :, :, span] = keys.transpose(1, 2)
            opened[1, :, :, span] = vectors[:, :, 1].transpose(1, 2)
        for index, new in enumerate((self.keys, self.values)):
            opened[index, :, :, self.coded : -1] = new
        # Sinks that are not among the codes go to one more place at the end, so that no size depends on the data.
        slots = self._slots()
        place = torch.where(slots < self.coded, slots, self.coded + recent)[None, :, None, :, None]
        opened.scatter_(3, place.expand(2, -1, heads, -1, dim), self.sinks)
        return opened[0, :, :, :-1], opened[1, :, :, :-1]

    def get_seq_length(self) -> int:
        """Return the number of tokens in the layer."""
        return self.coded + (self.keys.shape[-2] if self.is_initialized else 0)

    def get_max_length(self) -> int:
        """Return -1, which stands for no limit in Transformers."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of tokens that the next pass attends to, and the index of the first of them."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens. Those before them that are codes stay codes.

        Args:
            tokens_to_remove: The number of tokens to remove, as a negative number, as in Transformers.

        Raises:
            ValueError: The number is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop: got {tokens_to_remove}, allowed: 0 or less, the number of tokens to remove")
        if not self.is_initialized or not tokens_to_remove:
            return
        recent = self.keys.shape[-2]
        kept = max(0, recent + tokens_to_remove)
        self.coded = max(0, self.coded + min(0, recent + tokens_to_remove))
        self.keys, self.values = self.keys[:, :, :kept].clone(), self.values[:, :, :kept].clone()
        self.codes = self.codes[..., : self.coded].clone()

    def reset(self) -> None:
        """Remove all tokens."""
        self._clear()

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change all tensors along the batch, [B, ...]."""
        if self.is_initialized:
            self.keys, self.values, self.codes = change(self.keys), change(self.values), change(self.codes)
            self.sinks = torch.stack([change(part) for part in self.sinks])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i of the batch by row `beam_idx[i]`, for beam search."""
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch, given by their indices or by a boolean mask [B]."""
        self._change(lambda tensor: tensor[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times, with the copies next to each other."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Move the cached tensors to the CPU."""
        self._change(lambda tensor: tensor.to("cpu"))

    def prefetch(self) -> None:
        """Move the cached tensors back to the device of the first tokens."""
        self._change(lambda tensor: tensor.to(self.device))

    @property
    def tensors(self) -> list[Tensor]:
        """Return every tensor that the layer holds."""
        return [self.keys, self.values, self.codes, self.sinks] if self.is_initialized else []


class CodecCache(PositionedCache):
    """A Transformers cache for a model whose weights are left alone, of which old tokens are codes.

    `ModelCodec.make_cache` makes one for a model, to be given to `generate` or to the model as its cache.

    Args:
        make_layers: Returns the layers, given a function that returns the positions of the cached tokens.
        offloading: Keep the layers on the CPU between their turns (CUDA only).
    """

    def __init__(
        self,
        make_layers: Callable[[Callable[[], CachedPositions]], Sequence[CacheLayerMixin]],
        offloading: bool = False,
    ) -> None:
        super().__init__(list(make_layers(self._cached_positions)), offloading)

    def _cached_positions(self) -> CachedPositions:
        return self.positions

    def note(self, length: int, position_ids: Tensor | None, attention_mask: Any) -> None:
        """Take in where the tokens of a pass stand, before the pass.

        Args:
            length: S, the number of new tokens.
            position_ids: Their positions, [1 or B, S]; None continues those before.
            attention_mask: The mask of all tokens, [B, T], which leaves padding out. With any other form, or with None,
                the positions tell where padding is.
        """
        seen = self.get_seq_length()
        self.positions.cut(seen)
        self.positions.note(seen, length, position_ids)
        starts = None
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and attention_mask.shape[1] >= length:
            real = attention_mask.bool()
            # A row of padding alone begins with the next pass.
            starts = torch.where(real.any(1), real.int().argmax(1), real.shape[1])
        elif position_ids is not None and not seen:
            starts = first_tokens(position_ids, 1).int().argmax(1)
        if starts is not None or not seen:
            for layer in self._coded_layers:
                layer.starts = starts

    @property
    def _coded_layers(self) -> list[CodecLayer]:
        return [layer for layer in self.layers if isinstance(layer, CodecLayer)]

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self._coded_layers:
            if layer.starts is not None and len(layer.starts) > 1:
                layer.starts = change(layer.starts)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every row of the batch the tokens of another one."""
        super().reorder_cache(beam_idx)
        self._rows(lambda starts: starts[beam_idx.to(starts.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        super().batch_repeat_interleave(repeats)
        self._rows(lambda starts: starts.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch, given by their indices or by a boolean mask [B]."""
        super().batch_select_indices(indices)
        self._rows(lambda starts: starts[indices])
