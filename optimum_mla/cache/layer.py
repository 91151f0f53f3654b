"""One layer of a latent cache: append-only blocks and a window of the newest tokens in full precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from optimum_mla.cache.backends import Backend, make_backend
from optimum_mla.cache.settings import FULL_BITS, CacheSettings
from optimum_mla.cache.stored import DenseStored, QuantizedStored
from optimum_mla.errors import InvalidValueError
from optimum_mla.geometry import MLAGeometry
from optimum_mla.ops.blocks import Block, CacheView, Latents, block_tokens, concatenate

UNQUANTIZED = CacheSettings()


@dataclass(eq=False)
class StoredBlock:
    """Some consecutive tokens. Nothing assigns to a block's attributes but Transformers' exporters.

    Attributes:
        plain: What keeps the model's dtype, side by side: first vectors, second vectors, the key norms' factors.
        first: The first vectors, where they are quantized.
        second: The second, likewise.
        widths: Of first, second and factors.
    """

    plain: DenseStored
    first: QuantizedStored | None
    second: QuantizedStored | None
    widths: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """How many tokens."""
        return self.plain.tokens

    @property
    def batch(self) -> int:
        """How many rows."""
        return self.plain.batch

    @property
    def quantized(self) -> bool:
        """Whether anything is."""
        return self.first is not None or self.second is not None

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that takes memory."""
        return [tensor for part in (self.plain, self.first, self.second) if part for tensor in part.tensors]

    def _each(self, change: Callable[[Any], Any]) -> StoredBlock:
        first, second = (part and change(part) for part in (self.first, self.second))
        return StoredBlock(change(self.plain), first, second, self.widths)

    def cut(self, start: int, stop: int) -> StoredBlock:
        """The tokens from `start` to before `stop`."""
        return self._each(lambda part: part.cut(start, stop))

    def rows(self, indices: Tensor) -> StoredBlock:
        """The given rows of the batch, in that order."""
        return self._each(lambda part: part.rows(indices))

    def to(self, device: torch.device) -> StoredBlock:
        """On another device."""
        return self._each(lambda part: part.to(device))

    def joined(self, newer: StoredBlock) -> StoredBlock:
        """With the tokens of `newer`, stored alike, behind its own."""
        first = self.first and newer.first and self.first.joined(newer.first)
        second = self.second and newer.second and self.second.joined(newer.second)
        return StoredBlock(self.plain.joined(newer.plain), first, second, self.widths)

    def encoded(self, backends: tuple[Backend | None, Backend | None], group_size: int) -> StoredBlock:
        """With first and second vectors, which are plain still, quantized by these backends."""
        *vectors, scales = self.plain.vectors.split(self.widths, dim=-1)
        kept: list[Tensor] = []
        coded: list[QuantizedStored | None] = []
        for part, backend in zip(vectors, backends, strict=True):
            if backend is None or not part.shape[-1]:
                kept.append(part)
                coded.append(None)
            else:
                coded.append(QuantizedStored.quantize(part, backend, group_size))
        return StoredBlock(DenseStored(torch.cat([*kept, scales], dim=-1)), coded[0], coded[1], self.widths)

    def open(self, memory: Tensor | None = None) -> Block:
        """Ready to compute with.

        Args:
            memory: Where to decode to if its shape is right; else new memory is taken.
        """
        coded = (self.first, self.second)
        kept = [0 if part else width for part, width in zip(coded, self.widths, strict=False)]
        *plain, scales = self.plain.vectors.split([*kept, self.widths[2]], dim=-1)
        if not self.quantized:
            return Block(Latents(plain[0]), Latents(plain[1]), scales, self.plain.vectors[..., : sum(kept)])
        widths = [part.opened_width if part else width for part, width in zip(coded, kept, strict=True)]
        size = (self.batch, self.tokens, sum(widths))
        joined = memory if memory is not None and memory.shape == size else self.plain.buffer.new_empty(size)
        # Slices, not `split`: where gradients are on, none of several views that come together may be written to.
        outs = joined[..., : widths[0]], joined[..., widths[0] :]
        first, second = (
            part.open(out) if part else Latents(out.copy_(vectors))
            for part, vectors, out in zip(coded, plain, outs, strict=True)
        )
        return Block(first, second, scales, joined)


class BlockView(CacheView):
    """The blocks of a layer; each is decoded when iteration reaches it, over the one before."""

    def __init__(self, blocks: list[StoredBlock]) -> None:
        self.blocks = blocks

    @property
    def sizes(self) -> list[int]:
        return [block.tokens for block in self.blocks]

    @property
    def is_dense(self) -> bool:
        return not any(block.quantized for block in self.blocks)

    @property
    def scales(self) -> int:
        return self.blocks[0].widths[2]

    def __iter__(self) -> Iterator[Block]:
        memory: Tensor | None = None
        for stored in self.blocks:
            block = stored.open(memory)
            yield block
            # Fresh pages for every block would take longer than decoding it. Autograd needs what it saw, though.
            memory = block.joined if stored.quantized and not torch.is_grad_enabled() else None

    def whole(self) -> Block:
        return concatenate([stored.open() for stored in self.blocks])


class LatentLayer(CacheLayerMixin):
    """Cache of one converted layer, behind the Transformers contract.

    The newest tokens stay in the model's own dtype, at most `settings.residual_length` of them (without quantization,
    as many as make a block). Older ones are in blocks of up to `block_tokens` tokens: quantized once, on the way out of
    that window, and never again. A token's codes depend on nothing but that token.

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
        first_backend = make(settings.bits)
        self.backends = (first_backend, first_backend if full else make(settings.rope_bits))
        self.block_tokens = block_tokens(self._first_width)
        second = geometry.cache_numbers - self._first_width
        self._second_widths = (second - geometry.scale_numbers, geometry.scale_numbers)
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
        return _dense(view)

    def dense(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return a dense copy of both cached tensors, [B, 1, T, ·] each; None for an empty layer."""
        blocks = [*self.blocks, *([self.residual] if self.residual else [])]
        return _dense(BlockView(blocks)) if blocks else (None, None)

    def append(self, first: Tensor, second: Tensor) -> BlockView:
        """Append tokens, [B, 1, S, ·] each, and return what their attention sees.

        The new tokens are seen as they came, also those that are quantized in the same call.

        Raises:
            InvalidValueError: The tensors are not of this layer's widths, or not of the batch, dtype and device of the
                tokens that are there.
        """
        widths = [self._first_width, sum(self._second_widths)]
        if [first.shape[-1], second.shape[-1]] != widths:
            raise InvalidValueError(
                "cache", [first.shape[-1], second.shape[-1]], f"widths {widths} of the model it was made for"
            )
        if not self.is_initialized:
            self.lazy_initialization(first, second)
        batch, _, tokens, _ = first.shape
        self._check_fits(first)
        older = DenseStored(first.new_empty(batch, 0, sum(widths))) if self.residual is None else self.residual.plain
        plain = older.appended(first[:, 0], second[:, 0])
        recent = StoredBlock(plain, None, None, (self._first_width, *self._second_widths))
        view = BlockView([*self.blocks, recent])
        self.seen += tokens
        self._settle(recent)
        return view

    def _check_fits(self, new: Tensor) -> None:
        """Refuse tokens that cannot stand behind those that are there."""
        held = self.residual or (self.blocks[-1] if self.blocks else None)
        found = (new.shape[0], new.dtype, new.device)
        if held is not None and found != (expected := (held.batch, self.dtype, held.plain.buffer.device)):
            raise InvalidValueError(
                "cache",
                "new tokens of {} rows in {} on {}".format(*found),
                "{} rows in {} on {}, as in the cache".format(*expected),
                "Make a cache for each batch with make_cache(), or repeat its rows with batch_repeat_interleave.",
            )

    def _settle(self, recent: StoredBlock) -> None:
        """Keep the newest of `recent` as the window and store the rest in blocks."""
        settings, leaving = self.settings, 0
        if not settings.quantized:
            leaving = recent.tokens - recent.tokens % self.block_tokens
        elif recent.tokens > settings.residual_length:
            leaving = min(recent.tokens - settings.residual_length + settings.flush_tokens - 1, recent.tokens)
        start = 0
        while start < leaving:
            room = self.block_tokens - self.blocks[-1].tokens if self.blocks else 0
            stop = min(leaving, start + (room or self.block_tokens))
            block = recent.cut(start, stop)
            if settings.quantized:
                block = block.encoded(self.backends, settings.group_size)
            if room:
                self.blocks[-1] = self.blocks[-1].joined(block)
            else:
                self.blocks.append(block)
            start = stop
        if leaving == recent.tokens:
            self.residual = None
        elif leaving:
            self.residual = recent.cut(leaving, recent.tokens)
        else:
            self.residual = recent

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

    def _change(self, change: Callable[[StoredBlock], StoredBlock]) -> None:
        self.blocks = [change(block) for block in self.blocks]
        self.residual = None if self.residual is None else change(self.residual)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every row of the batch the tokens of another one."""
        self._change(lambda block: block.rows(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch, given by their indices or by a boolean mask [B]."""
        self._change(lambda block: block.rows(torch.as_tensor(indices)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self._change(lambda block: block.rows(torch.arange(block.batch).repeat_interleave(repeats)))

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._change(lambda block: block.to(torch.device("cpu")))

    def prefetch(self) -> None:
        """Move everything back to where it is computed with."""
        if self.is_initialized:
            self._change(lambda block: block.to(self.device))

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that takes memory."""
        blocks = [*self.blocks, *([self.residual] if self.residual else [])]
        return [tensor for block in blocks for tensor in block.tensors]


def _dense(view: BlockView) -> tuple[Tensor, Tensor]:
    """Return all tokens of a view as the two tensors [B, 1, T, ·] of the Transformers contract."""
    block = view.whole()
    second = torch.cat([block.second.dense(), block.scales], dim=-1)
    return block.first.dense().unsqueeze(1), second.unsqueeze(1)
