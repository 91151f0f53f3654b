"""Export of a converted model as a `deepseek_v3` model, which Transformers loads without this package.

DeepSeek's attention differs from `DecoupledLatentAttention` in four ways. The export compensates each of them:

- *DeepSeek always norms the latent c.* The export adds a constant channel to the latent, beside which the norm divides
  by a constant; see `optimum_mla.export.constant_channel`.
- *DeepSeek divides logits by sqrt(n + R)*, and the source model divides them by sqrt(D). The query weights are scaled
  by the ratio.
- *DeepSeek computes the rotary frequencies from a formula.* The `longrope` type multiplies each frequency by a factor
  of its own, so it can express any frequencies.
- *DeepSeek has a query bias only in the down-projection of a query latent.* Query biases are exported through a query
  latent of full rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel

from optimum_mla.export.checks import check_exportable
from optimum_mla.export.tensors import Shape, attention_tensors, export_shape, latent_attentions, rotated_pairs
from optimum_mla.families.spec import AttentionSpec
from optimum_mla.models.classes import is_tied
from optimum_mla.models.family_table import family_of
from optimum_mla.models.layers import model_geometry

UNUSED: dict[str, Any] = {
    "num_mtp_layers": 0,
    "n_routed_experts": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}
"""Values for the fields of `DeepseekV3Config` about mixture-of-experts layers, which the export never has."""
CARRIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
)
"""Fields that have the same meaning in the source config and in `DeepseekV3Config`."""


def rope_parameters(config: Any, frequencies: Tensor, shape: Shape) -> dict[str, Any]:
    """Return the config's `rope_parameters`, which give the frequencies of the rotary pairs that are not zero.

    They are of type `default` where the formula theta^(-2i/R) gives these frequencies, and of type `longrope` with a
    factor for each frequency otherwise. The given frequencies are those of all rotary pairs of the source, [D/2].
    """
    frequencies = frequencies.detach().double().cpu()[shape.pairs]
    theta = float(config.rope_parameters["rope_theta"])
    plain = theta ** -(torch.arange(shape.rope_pairs, dtype=torch.float64) / shape.rope_pairs)
    factors = torch.ones_like(plain)
    factors[shape.places] = plain[shape.places] / frequencies
    if (factors - 1).abs().max() < 1e-6:  # The source's float32 frequencies are not more precise than this.
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }


def deepseek_config(config: Any, shape: Shape, frequencies: Tensor) -> DeepseekV3Config:
    """Return the config of an export; `frequencies` are those of all rotary pairs of the source, [D/2]."""
    g = model_geometry(family_of(config).spec, config).layers[0]
    return DeepseekV3Config(
        **{name: getattr(config, name) for name in CARRIED if hasattr(config, name)},
        **UNUSED,
        num_key_value_heads=g.num_attention_heads,
        first_k_dense_replace=config.num_hidden_layers,
        kv_lora_rank=shape.rank,
        q_lora_rank=shape.query_rank,
        qk_nope_head_dim=g.qk_nope_head_dim,
        qk_rope_head_dim=shape.rope_dims,
        v_head_dim=g.v_head_dim,
        rope_parameters=rope_parameters(config, frequencies, shape),
        rope_interleave=shape.interleaved,
        attention_bias=shape.biased,
    )


def planned_config(
    config: Any, pairs: Tensor, pad_to: tuple[int, int] | None = None, latent_norm: bool = False
) -> DeepseekV3Config:
    """Return the config that an export would have, by the config of the converted model alone.

    Args:
        config: The config of a model that has passed `check_exportable`.
        pairs: The source's rotary pairs with whose frequencies all layers rotate, rising, [R/2].
        pad_to: As for `export_deepseek`.
        latent_norm: Whether all latents get a norm, and no biases after it, before the export.

    Raises:
        InvalidValueError: The model is larger than `pad_to`.
    """
    family = family_of(config)
    layers = model_geometry(family.spec, config).layers
    if latent_norm:
        layers = tuple(replace(layer, latent_norm=True, latent_bias=False) for layer in layers)
    with torch.device("meta"):
        skeleton: Any = family.model(config)
    rotary: Any = type(skeleton.get_submodule(family.spec.rotary_path))
    return deepseek_config(config, export_shape(layers, pairs, pad_to), rotary(config).inv_freq)


@torch.no_grad()
def export_deepseek(
    model: PreTrainedModel, pad: bool = False, pad_to: tuple[int, int] | None = None
) -> DeepseekV3ForCausalLM:
    """Return a model as a `DeepseekV3ForCausalLM` that computes the same.

    The two models share all weights other than those of the attention.

    Args:
        model: A converted model.
        pad: Whether to pad layers of lower rank with zeros to the largest rank.
        pad_to: Rank of the latent and dims of the rotary key to which all layers are padded with zeros, such as
            (512, 64), for engines whose kernels take these sizes only. None adds nothing.

    Raises:
        UnsupportedModelError: `deepseek_v3` cannot express the model.
        InvalidValueError: The model is larger than `pad_to`.
    """
    check_exportable(model.config, pad or pad_to is not None)
    attentions = latent_attentions(model)
    shape = export_shape([attention.geometry for attention in attentions], rotated_pairs(model), pad_to)
    spec: AttentionSpec = family_of(model.config).spec
    rotary: Any = model.get_submodule(spec.rotary_path)
    scaling = float(getattr(rotary, "attention_scaling", 1.0))
    places = tuple(f"{spec.attention_path(layer)}." for layer in range(len(attentions)))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(places)}
    for layer, attention in enumerate(attentions):
        norm = model.get_submodule(f"{spec.layer_path(layer)}.{spec.input_norm}")
        gain = float(norm.weight.detach().abs().max())  # type: ignore[union-attr, arg-type, operator]
        for name, tensor in attention_tensors(attention, shape, gain, scaling).items():
            state[f"model.layers.{layer}.self_attn.{name}"] = tensor.to(model.dtype)
    config = deepseek_config(model.config, shape, rotary.inv_freq)
    config.dtype, config.tie_word_embeddings = model.dtype, is_tied(model)
    with torch.device("meta"):
        exported = DeepseekV3ForCausalLM(config)
    exported.load_state_dict(state, strict=not config.tie_word_embeddings, assign=True)
    if config.tie_word_embeddings:
        exported.tie_weights()
    # The frequencies are computed again, because the state dict does not hold them and the model is on the meta device.
    exported.model.rotary_emb = type(exported.model.rotary_emb)(exported.config)
    exported.generation_config = model.generation_config
    return exported.to(model.device).eval()
