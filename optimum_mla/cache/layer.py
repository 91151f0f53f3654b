"""One layer of a latent cache: append-only blocks and a window of the newest tokens in full precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from optimum_mla.cache.backends import Backend, make_backend
from optimum_mla.cache.settings import FULL_BITS, CacheSettings
from optimum_mla.cache.stored import DenseStored, QuantizedStored, Stored
from optimum_mla.errors import InvalidValueError
from optimum_mla.geometry import MLAGeometry
from optimum_mla.ops.blocks import Block, CacheView, block_tokens, concatenate

UNQUANTIZED = CacheSettings()


class StoredBlock(NamedTuple):
    """Some consecutive tokens: the first cached vectors, the second, and the key norms' factors."""

    first: Stored
    second: Stored
    scales: Stored

    @property
    def tokens(self) -> int:
        """How many tokens."""
        return self.scales.tokens

    def each(self, change: Callable[[Stored], Stored]) -> StoredBlock:
        """With a change made to every part."""
        return StoredBlock(change(self.first), change(self.second), change(self.scales))

    def cut(self, start: int, stop: int) -> StoredBlock:
        """The tokens from `start` to before `stop`."""
        return self.each(lambda part: part.cut(start, stop))

    def joined(self, newer: StoredBlock) -> StoredBlock:
        """With the tokens of `newer` behind its own."""
        return StoredBlock(
            self.first.joined(newer.first), self.second.joined(newer.second), self.scales.joined(newer.scales)
        )

    def open(self) -> Block:
        """Ready to compute with."""
        return Block(self.first.open(), self.second.open(), self.scales.open().dense())


class BlockView(CacheView):
    """The blocks of a layer; each is decoded when iteration reaches it, and dropped after it."""

    def __init__(self, blocks: list[StoredBlock]) -> None:
        self.blocks = blocks

    @property
    def sizes(self) -> list[int]:
        return [block.tokens for block in self.blocks]

    @property
    def is_dense(self) -> bool:
        return all(isinstance(part, DenseStored) for block in self.blocks for part in block)

    def __iter__(self) -> Iterator[Block]:
        for block in self.blocks:
            yield block.open()

    def whole(self) -> Block:
        return concatenate(list(self))


class LatentLayer(CacheLayerMixin):
    """Cache of one converted layer, behind the Transformers contract.

    The newest tokens stay in the model's own dtype, at most `settings.residual_length` of them. Older ones are in
    blocks of up to `block_tokens` tokens: quantized once, on the way out of that window, and never again. A token's
    codes depend on nothing but that token.

    Args:
        geometry: Shape of the layer.
        settings: How its tokens are stored.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, geometry: MLAGeometry, settings: CacheSettings = UNQUANTIZED) -> None:
        super().__init__()
        self.geometry, self.settings = geometry, settings
        full = geometry.attention_form == "full"
        make = lambda bits: None if bits == FULL_BITS else make_backend(settings.backend, bits)  # noqa: E731
        self.first_backend = make(settings.bits)
        self.second_backend = self.first_backend if full else make(settings.rope_bits)
        self.block_tokens = block_tokens(self._first_width)
        second = geometry.cache_numbers - self._first_width
        self._second_widths = [second - geometry.scale_numbers, geometry.scale_numbers]
        self._clear()

    def _clear(self) -> None:
        self.blocks: list[StoredBlock] = []
        self.residual: StoredBlock | None = None
        self.seen = 0
        self.is_initialized = False

    @property
    def _first_width(self) -> int:
        return self.geometry.kv_lora_rank or self.geometry.k_lora_rank

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take note of dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, blockwise: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor] | tuple[CacheView, CacheView]:
        """Append tokens, [B, 1, S, ·] each, and return the whole cache as two dense tensors [B, 1, T, ·].

        That is the contract. With `blockwise`, which the attention of this package asks for, no dense copy is made:
        the view of the blocks stands in both places.
        """
        view = self.append(key_states, value_states)
        if blockwise:
            return view, view
        block = view.whole()
        second = torch.cat([block.second.dense(), block.scales], dim=-1)
        return block.first.dense().unsqueeze(1), second.unsqueeze(1)

    def append(self, first: Tensor, second: Tensor) -> CacheView:
        """Append tokens, [B, 1, S, ·] each, and return what their attention sees.

        The new tokens are seen as they came, also those that are quantized in the same call.

        Raises:
            InvalidValueError: The tensors are not of this layer's widths.
        """
        widths = [self._first_width, sum(self._second_widths)]
        if [first.shape[-1], second.shape[-1]] != widths:
            raise InvalidValueError(
                "past_key_values", [first.shape[-1], second.shape[-1]], f"widths {widths} of the model it was made for"
            )
        if not self.is_initialized:
            self.lazy_initialization(first, second)
        other, scales = second[:, 0].split(self._second_widths, dim=-1)
        new = StoredBlock(DenseStored(first[:, 0]), DenseStored(other), DenseStored(scales))
        recent = new if self.residual is None else self.residual.joined(new)
        view = BlockView([*self.blocks, recent])
        self.seen += new.tokens
        self._settle(recent)
        return view

    def _settle(self, recent: StoredBlock) -> None:
        """Keep the newest of `recent` as the window and store the rest in blocks."""
        settings = self.settings
        leaving = 0
        if recent.tokens > settings.residual_length:
            leaving = min(recent.tokens - settings.residual_length + settings.flush_tokens - 1, recent.tokens)
        start = 0
        while start < leaving:
            room = self.block_tokens - self.blocks[-1].tokens if self.blocks else 0
            stop = min(leaving, start + (room or self.block_tokens))
            block = self._encode(recent.cut(start, stop))
            if room:
                self.blocks[-1] = self.blocks[-1].joined(block)
            else:
                self.blocks.append(block)
            start = stop
        if leaving == recent.tokens:
            self.residual = None
        elif leaving or self.residual is None:
            self.residual = recent.cut(leaving, recent.tokens)
        else:
            self.residual = recent  # joined just now, so nobody else's memory

    def _encode(self, block: StoredBlock) -> StoredBlock:
        def stored(part: Stored, backend: Backend | None) -> Stored:
            (vectors,) = part.tensors
            if backend is None or not vectors.shape[-1]:
                return part
            return QuantizedStored.quantize(vectors, backend, self.settings.group_size)

        return StoredBlock(
            stored(block.first, self.first_backend), stored(block.second, self.second_backend), block.scales
        )

    def get_seq_length(self) -> int:
        """Tokens in the layer."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that the next step attends to, and the position of the first of them."""
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; a negative number says how many.

        Raises:
            ValueError: A positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop: got {tokens_to_remove}, allowed: 0 or less, the number of tokens to remove")
        remove = min(-tokens_to_remove, self.seen)
        self.seen -= remove
        if self.residual is not None:
            kept = max(0, self.residual.tokens - remove)
            remove -= self.residual.tokens - kept
            self.residual = self.residual.cut(0, kept) if kept else None
        while remove and self.blocks:
            last = self.blocks.pop()
            if last.tokens > remove:
                self.blocks.append(last.cut(0, last.tokens - remove))
            remove -= min(remove, last.tokens)

    def reset(self) -> None:
        """Forget everything."""
        self._clear()

    def _change(self, change: Callable[[Stored], Stored]) -> None:
        self.blocks = [block.each(change) for block in self.blocks]
        self.residual = None if self.residual is None else self.residual.each(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every row of the batch the tokens of another one."""
        self._change(lambda part: part.rows(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        self._change(lambda part: part.rows(torch.as_tensor(indices)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self._change(lambda part: part.rows(torch.arange(part.batch).repeat_interleave(repeats)))

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._change(lambda part: part.to(torch.device("cpu")))

    def prefetch(self) -> None:
        """Move everything back to where it is computed with."""
        if self.is_initialized:
            self._change(lambda part: part.to(self.device))

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that takes memory."""
        blocks = [*self.blocks, *([self.residual] if self.residual else [])]
        return [tensor for block in blocks for part in block for tensor in part.tensors]
