"""`QuantizeLatentCache`: the cache of a converted model in few bits."""

from __future__ import annotations

from typing import Any

from optimum_mla.cache import CacheSettings
from optimum_mla.cache.backends import check_settings
from optimum_mla.errors import UnsupportedModelError
from optimum_mla.models import is_converted
from optimum_mla.models.base import quantizable_layers
from optimum_mla.models.registry import family_of
from optimum_mla.transforms.apply import ModelTransformation
from optimum_mla.transforms.checks import config_of


class QuantizeLatentCache(ModelTransformation):
    """Make a converted model store its cached latents in few bits (MHA2MLA, arXiv 2502.14837, section 3.3 and table 2).

    No weight changes: the settings go into the config, are saved with the model, and every cache that the model makes
    for itself follows them. Composes after a conversion.

    Args:
        bits: Bits of a latent's number: 8, 4 or 2, and 3 with hqq; 16 turns it off.
        backend: `hqq` or `quanto`, or a registered one.
        group_size: At most so many neighbouring numbers of a token's latent share a scale and a zero.
        residual_length: Newest tokens that stay in the model's own dtype, at most.
        rope_bits: 16 or 8, for the rotary key beside the latent.

    Raises:
        InvalidValueError: A value that a field or the backend cannot have.
        MissingDependencyError: The backend's library is not installed.
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
            UnsupportedModelError: Not converted, or every converted layer has a sliding window.
        """
        if not is_converted(config):
            raise UnsupportedModelError("model: it is not converted. Convert it first, for example with GQA2MLA.")
        if not quantizable_layers(family_of(config).spec, config):
            raise UnsupportedModelError(
                "model: every converted layer has a sliding window, whose cache is small and stays as it is."
            )

    def transform(self, graph_module: Any) -> Any:
        """Put the settings into the model's config."""
        config = config_of(graph_module)
        self.check(config)
        config.latent_cache = self.settings.to_dict()
        return graph_module
