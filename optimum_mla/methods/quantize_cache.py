"""`QuantizeLatentCache`, the transformation that stores the cache of a converted model in few bits."""

from __future__ import annotations

from typing import Any

from optimum_mla.cache import CacheSettings
from optimum_mla.cache.backends import check_settings
from optimum_mla.convert.transformation import ModelTransformation
from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.models import is_converted
from optimum_mla.models.checks import config_of
from optimum_mla.models.family_table import family_of
from optimum_mla.models.layers import quantizable_layers


class QuantizeLatentCache(ModelTransformation):
    """Make a converted model store its cached latents in few bits (MHA2MLA, arXiv 2502.14837, section 3.3 and table 2).

    No weight changes. The settings are written into the config and saved with the model, and every cache that the model
    makes for itself follows them. It can be composed with a conversion that comes before it.

    Args:
        bits: Bits per number of the latent: 8, 4, 2, or with hqq also 3; 16 leaves the latent unquantized.
        backend: Library that quantizes: `hqq`, `quanto`, or the name of a registered one.
        group_size: Largest number of neighbouring numbers of a token's latent that share a scale and a zero.
        residual_length: Largest number of newest tokens that stay in the model's own dtype.
        rope_bits: Bits per number of the rotary key beside the latent: 8, or 16 for unquantized.

    Raises:
        InvalidValueError: A value is of the wrong type or out of range, or the backend cannot store so many bits.
        MissingDependencyError: The library of the backend is not installed.
    """

    preserves_computation = False

    def __init__(
        self,
        bits: int = 4,
        backend: str = "hqq",
        group_size: int = 64,
        residual_length: int = 128,
        rope_bits: int = 16,
    ) -> None:
        super().__init__()
        self.settings = CacheSettings(bits, backend, group_size, residual_length, rope_bits)
        check_settings(self.settings)

    def check(self, config: Any) -> None:
        """Refuse a model whose cache cannot be quantized.

        Raises:
            UnsupportedModelError: The model is not converted, or every converted layer has a sliding window.
        """
        if not is_converted(config):
            raise UnsupportedModelError("model: it is not converted. Convert it first, for example with GQA2MLA.")
        spec = family_of(config).spec
        if not quantizable_layers(spec, config):
            raise UnsupportedModelError(
                "model: every converted layer has a sliding window. The caches of such layers are never quantized."
            )

    def transform(self, graph_module: Any) -> Any:
        """Write the settings into the config of a model or of its traced graph, and return it."""
        config = config_of(graph_module)
        self.check(config)
        config.latent_cache = self.settings.to_dict()
        return graph_module
