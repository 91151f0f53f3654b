"""The cache of a converted model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from optimum_mla.cache import pytree
from optimum_mla.cache.layer import LatentLayer
from optimum_mla.cache.positions import CachedPositions
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.ops.blocks import CacheView


class PositionedCache(Cache):
    """A Transformers cache that knows the positions of its tokens.

    Args:
        layers: One per layer of the model.
        offloading: Keep the layers on the CPU between their turns (CUDA only).
    """

    def __init__(self, layers: list[CacheLayerMixin], offloading: bool = False) -> None:
        super().__init__(layers=layers, offloading=offloading, offload_only_non_sliding=False)
        self.positions = CachedPositions()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; a negative number says how many."""
        super().crop(tokens_to_remove)
        self.positions.cut(int(self.get_seq_length()))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.positions = CachedPositions()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every row of the batch the tokens of another one."""
        super().reorder_cache(beam_idx)
        self.positions.rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        super().batch_repeat_interleave(repeats)
        self.positions.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch, given by their indices or by a boolean mask [B]."""
        super().batch_select_indices(indices)
        self.positions.rows(torch.as_tensor(indices))


class LatentCache(PositionedCache):
    """A Transformers cache whose converted layers store latents in blocks, quantized or not.

    `model.make_cache()` makes one; `generate` does so by itself.

    Args:
        layers: One per layer of the model: `LatentLayer`, or what Transformers takes for a layer that is not converted.
        offloading: Keep the layers on the CPU between their turns (CUDA only).
    """

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, None]]:
        """Yield, for each layer, its two cached tensors as one dense copy each; `DynamicCache` yields keys and values.

        A layer that holds no token yet yields None.
        """
        for layer in self.layers:
            if isinstance(layer, LatentLayer):
                yield *layer.dense(), None
            else:
                yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)

    def note_positions(self, layer_idx: int, length: int, position_ids: Tensor | None) -> None:
        """Take in the positions of the tokens that a layer is about to append.

        Args:
            layer_idx: Which layer.
            length: S, how many tokens.
            position_ids: Their positions, [1 or B, S]; None continues those before.
        """
        self.positions.note(int(self.get_seq_length(layer_idx)), length, position_ids)

    def update_blocks(self, first: Tensor, second: Tensor, layer_idx: int) -> CacheView:
        """Store the new tokens of a converted layer as `update` does, and return its blocks instead of a dense copy.

        Args:
            first: New tokens' first vectors, [B, 1, S, ·]. second: Their second.
            layer_idx: Which layer.

        Raises:
            InvalidValueError: The cache was made for another model.
        """
        if layer_idx >= len(self.layers) or not isinstance(self.layers[layer_idx], LatentLayer):
            raise InvalidValueError(
                "cache",
                f"a cache without a latent layer {layer_idx}",
                "one from this model's make_cache()",
            )
        view, _ = self.update(first, second, layer_idx, blockwise=True)
        return view


pytree.register(LatentCache)
