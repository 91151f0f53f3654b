"""A first description of a family that nobody has described, which `verify_family` then confirms or refutes."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import nn

from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.families.spec import AttentionSpec

NORM_NAMES = (("q_norm", "k_norm"), ("query_layernorm", "key_layernorm"))
FUSED_NAMES = ("qkv_proj",)
BESIDE = ("pre_feedforward_layernorm", "post_attention_layernorm")


def guessed_spec(config: Any, model: nn.Module) -> AttentionSpec:
    """Return the spec that the names of a model's modules and the shapes of its norms suggest.

    The weights of the model may be on the meta device.

    Raises:
        UnsupportedModelError: The model has no `model.layers.0.self_attn` with the usual projections.
    """
    prefix = type(model).__name__.removesuffix("ForCausalLM")
    text = type(config).__name__.removesuffix("Config")
    module = type(model).__module__.split(".")[-2]
    try:
        layer: Any = model.get_submodule("model.layers.0")
        attention: Any = layer.self_attn
        fused = next((name for name in FUSED_NAMES if hasattr(attention, name)), None)
        projections = {name: getattr(attention, fused or name) for name in ("q_proj", "k_proj", "v_proj")}
        biases = [projections[name].bias is not None for name in projections] + [attention.o_proj.bias is not None]
    except AttributeError as error:
        raise UnsupportedModelError(
            f"model_type: nothing is known about {config.model_type!r}, and its names are not those of Llama: {error}. "
            "Describe it by an AttentionSpec (docs/add_a_family.md)."
        ) from error
    norms = next((names for names in NORM_NAMES if hasattr(attention, names[0])), (None, None))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    joint = norms[0] is not None and getattr(attention, norms[0]).weight.numel() > head_dim
    input_norm = "input_layernorm" if hasattr(layer, "input_layernorm") else None
    after = next((name for name in BESIDE if hasattr(layer, name)), None)
    return AttentionSpec(
        model_type=config.model_type,
        class_prefix=prefix,
        text_prefix=None if text == prefix else text,
        module=None if module == config.model_type else module,
        query_bias=biases[0],
        key_value_bias=biases[1],
        output_bias=biases[3],
        query_norm=norms[0],
        key_norm=norms[1],
        joint_norms=joint,
        fused=fused,
        input_norm=input_norm,
        after_attention=after if input_norm is not None else "mlp",
    )


def spec_source(spec: AttentionSpec) -> str:
    """Return the Python expression of a spec, without the fields that have their default."""
    given = [
        f"{field.name}={getattr(spec, field.name)!r}"
        for field in fields(spec)
        if getattr(spec, field.name) != field.default
    ]
    return f"AttentionSpec({', '.join(given)})"
