"""The table of the model families that can be converted, which `optimum_mla.models.registry` fills."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.families.refused import refusal
from optimum_mla.families.spec import AttentionSpec
from optimum_mla.models.config import MLAConfigMixin


@dataclass(frozen=True)
class Family:
    """A spec and the classes that belong to it."""

    spec: AttentionSpec
    source_config: type[PreTrainedConfig]
    source_model: type[PreTrainedModel]
    source_attention: type[nn.Module]
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]

    @property
    def model_types(self) -> tuple[str, str]:
        """Return the `model_type` of its source models and that of its converted ones."""
        return self.spec.model_type, self.spec.mla_model_type


FAMILIES: dict[str, Family] = {}
"""The families by the `model_type` of their source models."""


def supported_model_types() -> tuple[str, ...]:
    """Return the `model_type` of every family that can be converted."""
    return tuple(sorted(FAMILIES))


def family_of(config: Any) -> Family:
    """Return the family of a source or a converted model's config.

    Raises:
        UnsupportedModelError: No family has this `model_type`.
    """
    model_type = getattr(config, "model_type", None)
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    if (why := refusal(config)) is not None:
        raise UnsupportedModelError(f"model_type: {model_type!r} cannot be converted: {why}.")
    raise UnsupportedModelError(
        f"model_type: got {model_type!r}, supported: {', '.join(supported_model_types())}. Try --try-family, or "
        "describe the family by an AttentionSpec (docs/add_a_family.md)."
    )


def is_converted(config: Any) -> bool:
    """Return whether a config is a converted model's."""
    return isinstance(config, MLAConfigMixin)
