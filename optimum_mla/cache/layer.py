"""One layer of a latent cache: append-only blocks and a window of the newest tokens in full precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from optimum_mla.cache.backends import make_backend
from optimum_mla.cache.blocks import BlockView, Encoder, StoredBlock
from optimum_mla.cache.settings import FULL_BITS, CacheSettings
from optimum_mla.cache.stored import DenseStored, QuantizedStored
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.ops.blocks import CacheView, block_tokens

UNQUANTIZED = CacheSettings()


class LatentLayer(CacheLayerMixin):
    """The cache of one converted layer, with the interface of Transformers' cache layers.

    A window of the newest tokens stays in the model's own dtype: at most `settings.residual_length` tokens, or, without
    quantization, fewer than a block holds. Older tokens are in blocks of up to `block_tokens` tokens. Tokens are
    quantized once, when they leave the window, and never again. The codes of a token depend on that token only.

    Args:
        geometry: Shape of the layer.
        settings: Settings of how its tokens are stored.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, geometry: MLAGeometry, settings: CacheSettings = UNQUANTIZED) -> None:
        super().__init__()
        self.geometry, self.settings = geometry, settings
        vectors = {part.tensor: settings.bits_of(part) for part in geometry.cached_parts if part.setting}
        self.encoders = (_encoder(settings, vectors[0]), _encoder(settings, vectors.get(1, FULL_BITS)))
        self.encodes = settings.quantized
        first, second, factors = geometry.cached_width(0), geometry.cached_width(1), geometry.cached_key_factors
        self.widths = (first, second - factors, factors)
        self.block_tokens = block_tokens(first)
        self._clear()

    def _clear(self) -> None:
        self.blocks: list[StoredBlock] = []
        self.residual: StoredBlock | None = None
        self.seen = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Record the dtype and the device of the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, blockwise: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor] | tuple[CacheView, CacheView]:
        """Append tokens and return the whole cache.

        Args:
            key_states: The first vectors of the new tokens, [B, 1, S, width].
            value_states: The second vectors and the factors of the key norms, [B, 1, S, width].
            *args: Ignored, as Transformers' interface allows them.
            blockwise: Whether to return a view of the blocks instead of a dense copy. The attention of this package
                sets it.
            **kwargs: Ignored, as Transformers' interface allows them.

        Returns:
            Two dense tensors [B, 1, T, width], as Transformers expects them; with `blockwise` the same `CacheView`
            twice.

        Raises:
            InvalidValueError: The tensors do not fit the layer or the tokens in it; see `append`.
        """
        view = self.append(key_states, value_states)
        if blockwise:
            return view, view
        return _dense(view)

    def dense(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return a dense copy of both cached tensors, [B, 1, T, width] each, or two Nones for an empty layer."""
        blocks = [*self.blocks, *([self.residual] if self.residual else [])]
        return _dense(BlockView(blocks)) if blocks else (None, None)

    def append(self, first: Tensor, second: Tensor) -> BlockView:
        """Append tokens and return a view of all tokens, for the attention of the new ones.

        In the view the new tokens are exact, even those that this call quantizes for later calls.

        Args:
            first: The first vectors of the new tokens, [B, 1, S, width].
            second: The second vectors and the factors of the key norms, [B, 1, S, width].

        Raises:
            InvalidValueError: The widths are not those of this layer, or the batch size, dtype or device is not that of
                the tokens in the cache.
        """
        widths = [self.widths[0], sum(self.widths[1:])]
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
        recent = StoredBlock(plain, None, None, self.widths)
        view = BlockView([*self.blocks, recent])
        self.seen += tokens
        self._settle(recent)
        return view

    def _check_fits(self, new: Tensor) -> None:
        """Refuse tokens whose batch size, dtype or device differs from that of the tokens in the cache."""
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
        """Keep the newest tokens of `recent` as the window, and move the others into blocks."""
        leaving = 0
        if not self.encodes:
            leaving = recent.tokens - recent.tokens % self.block_tokens
        elif recent.tokens > self.settings.residual_length:
            leaving = min(recent.tokens - self.settings.residual_length + self.settings.flush_tokens - 1, recent.tokens)
        start = 0
        while start < leaving:
            room = self.block_tokens - self.blocks[-1].tokens if self.blocks else 0
            stop = min(leaving, start + (room or self.block_tokens))
            block = recent.cut(start, stop)
            if self.encodes:
                block = block.encoded(self.encoders)
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
        """Return the number of tokens in the layer."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1, which stands for no limit in Transformers."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of tokens that the next pass attends to, and the index of the first of them.

        Args:
            query_length: Number of new tokens in that pass.
        """
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens.

        Args:
            tokens_to_remove: The number of tokens to remove, as a negative number, as in Transformers.

        Raises:
            ValueError: The number is positive.
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
        """Remove all tokens."""
        self._clear()

    def _change(self, change: Callable[[StoredBlock], StoredBlock]) -> None:
        self.blocks = [change(block) for block in self.blocks]
        self.residual = None if self.residual is None else change(self.residual)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i of the batch by row `beam_idx[i]`, for beam search."""
        self._change(lambda block: block.rows(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch, given by their indices or by a boolean mask [B]."""
        self._change(lambda block: block.rows(torch.as_tensor(indices)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times, with the copies next to each other."""
        self._change(lambda block: block.rows(torch.arange(block.batch).repeat_interleave(repeats)))

    def offload(self) -> None:
        """Move the cached tensors to the CPU."""
        self._change(lambda block: block.to(torch.device("cpu")))

    def prefetch(self) -> None:
        """Move the cached tensors back to the device of the first tokens."""
        if self.is_initialized:
            self._change(lambda block: block.to(self.device))

    @property
    def tensors(self) -> list[Tensor]:
        """Return every tensor that the layer holds."""
        blocks = [*self.blocks, *([self.residual] if self.residual else [])]
        return [tensor for block in blocks for tensor in block.tensors]


def _encoder(settings: CacheSettings, bits: int) -> Encoder | None:
    """Return what stores vectors with `bits` bits per number, or None for the model's own dtype."""
    if bits == FULL_BITS:
        return None
    backend = make_backend(settings.backend, bits)
    return partial(QuantizedStored.quantize, backend=backend, group_size=settings.group_size)


def _dense(view: BlockView) -> tuple[Tensor, Tensor]:
    """Return all tokens of a view as the two tensors [B, 1, T, width] that Transformers expects."""
    block = view.whole()
    second = torch.cat([block.second.dense(), block.key_factors], dim=-1)
    return block.first.dense().unsqueeze(1), second.unsqueeze(1)
