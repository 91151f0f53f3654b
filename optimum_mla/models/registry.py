"""The config and model classes of the converted models of all families.

A family is one `AttentionSpec`; its `<Family>MLAConfig`, `<Family>MLAModel` and `<Family>MLAForCausalLM` are made from
it here and registered with the Transformers Auto classes.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from optimum_mla.core.errors import UnsupportedModelError, first_line
from optimum_mla.families.built_in import BUILT_IN
from optimum_mla.families.guess import guessed_spec
from optimum_mla.families.refused import refusal
from optimum_mla.families.spec import AttentionSpec
from optimum_mla.models.classes import MLAForCausalLMMixin, MLAModelMixin, base_forward
from optimum_mla.models.coded import register_source
from optimum_mla.models.config import MLA_CONFIG_FIELDS, MLAConfigMixin
from optimum_mla.models.family_table import FAMILIES, Family
from optimum_mla.models.layers import model_geometry
from optimum_mla.models.parallel import TensorParallelPlan
from optimum_mla.nn import LatentAttention
from optimum_mla.stack import enter_class_names, share_checkpoint_names

BUILT_IN_TYPES = [spec.model_type for spec in BUILT_IN.values()]
ENTRY_POINTS = "optimum_mla.families"
"""The entry-point group in which other packages offer families."""


def register_family(spec: AttentionSpec) -> Family:
    """Make a family convertible and its converted models loadable through the Auto classes.

    Args:
        spec: The family; `class_prefix` must name classes of Transformers (`<Prefix>Config`, `<Prefix>ForCausalLM`).

    Returns:
        The family with its classes, which are also attributes of `optimum_mla.models`.

    Raises:
        UnsupportedModelError: Transformers has no such classes, or their `forward` takes no cache.
    """
    known = FAMILIES.get(spec.model_type)
    if known is not None and known.spec == spec:
        return known
    source_config, source_base, source_model, source_attention = _source_classes(spec)
    config = _config_class(spec, source_config)
    base, model = _model_classes(spec, config, source_base, source_model, source_attention)
    family = Family(spec, source_config, source_model, source_attention, config, model)
    FAMILIES[spec.model_type] = family
    for made in (config, base, model):
        for module in (__name__, __package__):
            setattr(sys.modules[module], made.__name__, made)
    AutoConfig.register(spec.mla_model_type, config, exist_ok=True)
    AutoModel.register(config, base, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    register_source(source_config, source_model)
    enter_class_names(spec.mla_model_type, base, model)
    share_checkpoint_names(spec.model_type, spec.mla_model_type)
    for source, made in ((source_base, base), (source_model, model)):
        share_checkpoint_names(source.__name__, made.__name__)
    return family


def _config_class(spec: AttentionSpec, source: Any) -> Any:
    """Return the class of the configs of a family's converted models, given that of its source models."""
    fields = {**MLA_CONFIG_FIELDS, "latent_cache": (dict | None, None)}
    return type(
        f"{spec.class_prefix}MLAConfig",
        (MLAConfigMixin, source),
        {
            **{name: default for name, (_, default) in fields.items()},
            "__module__": __name__,
            "__doc__": f"Config of a {spec.class_prefix} model with latent attention; see `MLAConfigMixin`.",
            "__annotations__": {name: kind for name, (kind, _) in fields.items()},
            "model_type": spec.mla_model_type,
            "base_model_tp_plan": TensorParallelPlan(
                source.base_model_tp_plan, spec.attention, lambda config: model_geometry(spec, config).layers
            ),
        },
    )


def _model_classes(
    spec: AttentionSpec, config: Any, source_base: Any, source_model: Any, source_attention: Any
) -> tuple[Any, Any]:
    """Return the classes of the base model and of the causal language model of a family's converted models."""
    prefix, shared = spec.class_prefix, {"__module__": __name__, "spec": spec, "config_class": config}
    shared["built_in"] = spec.model_type in BUILT_IN_TYPES
    base = type(
        f"{prefix}MLAModel",
        (MLAModelMixin, source_base),
        {
            **shared,
            "__doc__": f"{prefix}Model with latent attention in its converted layers.",
            "forward": base_forward(source_base),
            # Attentions that `output_attentions` records are those of both kinds.
            "_can_record_outputs": {
                **source_base._can_record_outputs,
                "attentions": [LatentAttention, source_attention],
            },
        },
    )
    model = type(
        f"{prefix}MLAForCausalLM",
        (MLAForCausalLMMixin, source_model),
        {
            **shared,
            "__doc__": f"{prefix}ForCausalLM with latent attention in its converted layers.",
            "base_class": base,
        },
    )
    return base, model


def _source_classes(spec: AttentionSpec) -> tuple[Any, Any, Any, Any]:
    """Return the family's config, base model, causal LM and attention classes in Transformers.

    Raises:
        UnsupportedModelError: There is no such family, or no such class in it.
    """
    prefix, module = spec.class_prefix, spec.module or spec.model_type
    text = spec.text_prefix or prefix
    try:
        modeling = import_module(f"transformers.models.{module}.modeling_{module}")
        names = (f"{text}Model", f"{prefix}ForCausalLM", f"{prefix}Attention")
        return getattr(transformers, f"{text}Config"), *(getattr(modeling, name) for name in names)
    except (ImportError, AttributeError) as error:
        raise UnsupportedModelError(
            f"class_prefix: got {prefix!r} for the model_type {spec.model_type!r}, but Transformers has no such "
            f"classes ({first_line(error)}). See docs/add_a_family.md."
        ) from error


def try_family(config: Any) -> AttentionSpec | None:
    """Register a family that is not known yet under the spec that its names suggest.

    Whether this describes the family is checked on the model itself, by `verify_family`, before anything is converted.

    Returns:
        The spec, or None if the family is known.

    Raises:
        UnsupportedModelError: Something is known against the family, its names are not the usual ones, or Transformers
            has no causal language model for the config.
    """
    if any(config.model_type == family.spec.model_type for family in FAMILIES.values()):
        return None
    if (why := refusal(config)) is not None:
        raise UnsupportedModelError(f"model_type: {config.model_type!r} cannot be converted: {why}.")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UnsupportedModelError(f"model_type: {config.model_type!r}: {first_line(error)}") from error
    return register_family(guessed_spec(config, model)).spec


def register_installed_families() -> None:
    """Register the families that installed packages offer as entry points of the group `optimum_mla.families`.

    An entry point names an `AttentionSpec` as `module:SPEC`. One that does not load is left out with a warning.
    """
    for point in entry_points(group=ENTRY_POINTS):
        try:
            register_family(point.load())
        except Exception as error:  # A package of somebody else must not keep this one from being imported.
            warnings.warn(f"the family {point.name!r} ({point.value}) is left out: {first_line(error)}", stacklevel=2)


for _spec in BUILT_IN.values():
    register_family(_spec)
