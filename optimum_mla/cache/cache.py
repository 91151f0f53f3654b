"""The cache of a converted model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from optimum_mla.cache import pytree
from optimum_mla.cache.layer import LatentLayer
from optimum_mla.errors import InvalidValueError
from optimum_mla.ops.blocks import CacheView


class LatentCache(Cache):
    """A Transformers cache whose converted layers store latents in blocks, quantized or not.

    `model.make_cache()` makes one; `generate` does so by itself.

    Args:
        layers: One per layer of the model: `LatentLayer`, or what Transformers takes for a layer that is not converted.
        offloading: Keep the layers on the CPU between their turns (CUDA only).
    """

    def __init__(self, layers: list[CacheLayerMixin], offloading: bool = False) -> None:
        super().__init__(layers=layers, offloading=offloading, offload_only_non_sliding=False)

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, None]]:
        """Yield, for each layer, its two cached tensors as one dense copy each; `DynamicCache` yields keys and values.

        A layer that holds no token yet yields None.
        """
        for layer in self.layers:
            if isinstance(layer, LatentLayer):
                yield *layer.dense(), None
            else:
                yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)

    def update_blocks(self, first: Tensor, second: Tensor, layer_idx: int) -> CacheView:
        """As `update`, for a converted layer, without a dense copy of its cache.

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
