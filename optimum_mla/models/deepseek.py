"""A converted model as a plain `deepseek_v3` one, which Transformers loads without this package.

DeepSeek's attention differs from `DecoupledLatentAttention` in four ways, each of which is undone exactly:

- *It always norms the latent.* One more channel, with zero weights and the constant bias M, makes the norm's
  denominator a constant: sqrt((M² + ‖c‖²)/(r + 1)). The latent is scaled by a power of two so that ‖c‖ can nowhere
  exceed M/2¹⁰, whatever the tokens (the attention's input is RMS-normed, so ‖c‖ is bounded by the weights); the
  relative error is then at most 2⁻²¹. The channel also carries the biases of the up-projections, for which DeepSeek
  has no place.
- *Its logits are divided by sqrt(n + R)*, the source's by sqrt(D): the query weights take the difference.
- *Its rotary frequencies are a formula.* The `longrope` type multiplies each by a factor, so it can hold any.
- *Its queries have a bias only on the way into a query latent.* Query biases go through one of full rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel

from optimum_mla.errors import UnsupportedModelError
from optimum_mla.families.spec import AttentionSpec, sliding_window
from optimum_mla.geometry import MLAGeometry
from optimum_mla.models.assemble import is_tied
from optimum_mla.models.base import model_geometry
from optimum_mla.models.registry import family_of, is_converted

CONSTANT = 2.0**14
"""M: exact in every dtype."""
LARGEST_LATENT = 2.0**4
"""Bound of ‖c‖ after scaling: M/2¹⁰."""
FIXED_ROPE = ("default", "linear", "llama3", "yarn")
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
"""Fields of layers that there are none of."""
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
"""Fields that mean the same in both configs."""


def refuse(reason: str, remedy: str) -> UnsupportedModelError:
    """The error for a model that has no `deepseek_v3` form."""
    return UnsupportedModelError(f"export: {reason}. {remedy}")


def check_exportable(config: Any, pad: bool = False) -> None:
    """Refuse what `deepseek_v3` cannot express, by the config alone.

    Args:
        config: Of a converted model.
        pad: Layers may be padded to the largest rank.

    Raises:
        UnsupportedModelError: With the option that would make the model exportable.
    """
    if not is_converted(config):
        raise refuse("the model is not converted", "Run optimum-cli mla-convert on it first.")
    if getattr(config, "quantization_config", None) is not None:
        raise refuse("the model's weights are quantized", "Export the unquantized model.")
    layers = model_geometry(family_of(config).spec, config).layers
    engine_form = "Convert with --method gqa2mla --rope-cache cached --shared-rope."
    for index, g in enumerate(layers):
        if g.attention_form == "source":
            raise refuse(f"layer {index} keeps the source's attention", "Convert all layers.")
        if g.attention_form == "full":
            raise refuse("the rotation acts on up-projected keys (positional full)", engine_form)
        if g.key_norm:
            raise refuse("the model norms its queries and keys, DeepSeek does not", "Such models run in this package.")
        if g.num_rope_heads > 1:
            raise refuse(f"every layer has {g.num_rope_heads} rotary keys, DeepSeek one", engine_form)
        if g.rope_cache == "rebuilt":
            raise refuse("the rotary key is rebuilt from the latent", engine_form)
        if sliding_window(config, index) is not None:
            raise refuse(f"layer {index} has a sliding window", "Such models run in this package.")
        if g.latent_norm and g.up_bias:
            raise refuse("a latent that is normed leaves no place for biases", "Convert without the latent norm.")
        if g.latent_norm and g.query_bias:
            raise refuse("a query latent that is normed leaves no place for biases", "Convert without the latent norm.")
    for field, values in (
        ("rotary dims", {g.qk_rope_head_dim for g in layers}),
        ("query ranks", {g.q_lora_rank for g in layers}),
        ("latent norms", {g.latent_norm for g in layers}),
    ):
        if len(values) > 1:
            raise refuse(f"layers differ in their {field} ({', '.join(sorted(map(str, values)))})", engine_form)
    ranks = sorted({g.kv_lora_rank for g in layers})
    if len(ranks) > 1 and (not pad or layers[0].latent_norm):
        remedy = "Pad them to the largest with --pad, or convert with --rank-allocation uniform."
        raise refuse(f"the layers' latents have ranks from {ranks[0]} to {ranks[-1]}", remedy)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in FIXED_ROPE:
        raise refuse(f"{rope} rotary scaling depends on the length at hand", "Such models run in this package.")
    if getattr(config, "mlp_bias", False):
        raise refuse("the feed-forward layers have biases, DeepSeek's do not", "Such models run in this package.")


@dataclass(frozen=True)
class Shape:
    """What all layers of the export share.

    Attributes:
        rank: r, the constant channel included. query_rank: r_q likewise, or None.
        normed: The model norms its latents itself: there is no constant channel.
        biased: Down-projections have biases.
        interleaved: Rotary dims lie in pairs side by side, as engines expect them; else half-split.
        pairs: [R/2], source pair of each rotary pair.
    """

    rank: int
    query_rank: int | None
    normed: bool
    biased: bool
    interleaved: bool
    pairs: Tensor


def export_shape(model: PreTrainedModel) -> Shape:
    """The shape of a model that `check_exportable` has let through.

    Raises:
        UnsupportedModelError: The layers rotate different pairs.
    """
    attentions = latent_attentions(model)
    layers = [attention.geometry for attention in attentions]
    orders = [attention.rope_pairs[0].sort().values for attention in attentions]
    if any(not torch.equal(order, orders[0]) for order in orders):
        remedy = "Convert with --shared-rope, which gives all layers the same."
        raise refuse("the layers rotate at different frequencies, DeepSeek's all at the same", remedy)
    g, normed = layers[0], layers[0].latent_norm
    query_rank = g.q_lora_rank
    if g.query_bias and query_rank is None:
        query_rank = g.hidden_size
    constant = 0 if normed else 1
    biased = not normed or any(layer.key_value_bias or layer.output_bias for layer in layers)
    return Shape(
        rank=max(layer.kv_lora_rank for layer in layers) + constant,
        query_rank=None if query_rank is None else query_rank + constant,
        normed=normed,
        biased=biased,
        interleaved=normed,
        pairs=orders[0],
    )


def latent_attentions(model: PreTrainedModel) -> list[Any]:
    """The attention module of every layer."""
    spec: AttentionSpec = family_of(model.config).spec
    return [model.get_submodule(spec.attention_path(layer)) for layer in range(model.config.num_hidden_layers)]


def rope_parameters(model: PreTrainedModel, pairs: Tensor) -> dict[str, Any]:
    """`longrope` factors that turn theta^(-2i/R) into the source's frequencies of `pairs`."""
    config: Any = model.config
    rotary = model.get_submodule(family_of(config).spec.rotary_path)
    frequencies = rotary.inv_freq.detach().double().cpu()[pairs.cpu()]  # type: ignore[operator, union-attr]
    theta = float(config.rope_parameters["rope_theta"])
    plain = theta ** -(torch.arange(len(pairs), dtype=torch.float64) / len(pairs))
    factors = plain / frequencies
    if (factors - 1).abs().max() < 1e-6:  # below the precision of the source's table
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


def deepseek_config(model: PreTrainedModel, shape: Shape) -> DeepseekV3Config:
    """The config of the export."""
    config, g = model.config, latent_attentions(model)[0].geometry
    return DeepseekV3Config(
        **{name: getattr(config, name) for name in CARRIED if hasattr(config, name)},
        **UNUSED,
        num_key_value_heads=g.num_attention_heads,
        first_k_dense_replace=config.num_hidden_layers,
        kv_lora_rank=shape.rank,
        q_lora_rank=shape.query_rank,
        qk_nope_head_dim=g.qk_nope_head_dim,
        qk_rope_head_dim=g.qk_rope_head_dim,
        v_head_dim=g.v_head_dim,
        rope_parameters=rope_parameters(model, shape.pairs),
        rope_interleave=shape.interleaved,
        attention_bias=shape.biased,
        dtype=model.dtype,
    )


@torch.no_grad()
def export_deepseek(model: PreTrainedModel, pad: bool = False) -> DeepseekV3ForCausalLM:
    """The same model as `DeepseekV3ForCausalLM`; its weights other than the attention's are shared, not copied.

    Args:
        model: A converted model.
        pad: Pad layers of lower rank with zeros.

    Raises:
        UnsupportedModelError: `deepseek_v3` cannot express it.
    """
    check_exportable(model.config, pad)
    shape = export_shape(model)
    spec: AttentionSpec = family_of(model.config).spec
    rotary = model.get_submodule(spec.rotary_path)
    scaling = float(getattr(rotary, "attention_scaling", 1.0))
    places = {f"{spec.attention_path(layer)}." for layer in range(model.config.num_hidden_layers)}
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(place) for place in places)
    }
    for layer, attention in enumerate(latent_attentions(model)):
        norm = model.get_submodule(f"{spec.layer_path(layer)}.{spec.input_norm}")
        gain = float(norm.weight.detach().abs().max())  # type: ignore[union-attr, arg-type, operator]
        for name, tensor in attention_tensors(attention, shape, gain, scaling).items():
            state[f"model.layers.{layer}.self_attn.{name}"] = tensor.to(model.dtype)
    config = deepseek_config(model, shape)
    config.tie_word_embeddings = is_tied(model)
    with torch.device("meta"):
        exported = DeepseekV3ForCausalLM(config)
    exported.load_state_dict(state, strict=not config.tie_word_embeddings, assign=True)
    if config.tie_word_embeddings:
        exported.tie_weights()
    # Buffers are not in the checkpoint.
    exported.model.rotary_emb = type(exported.model.rotary_emb)(exported.config)
    exported.generation_config = model.generation_config
    return exported.to(model.device).eval()


def attention_tensors(attention: Any, shape: Shape, input_gain: float, rope_scaling: float) -> dict[str, Tensor]:
    """One layer's weights by DeepSeek's names, in float64.

    Args:
        attention: A `DecoupledLatentAttention`.
        shape: Of the export.
        input_gain: Largest gain of the norm before it.
        rope_scaling: What the source's table multiplies onto cos and sin (YaRN).
    """
    g: MLAGeometry = attention.geometry
    dtype = attention.o_proj.weight.dtype
    n, half, r = g.qk_nope_head_dim, g.qk_rope_head_dim // 2, g.kv_lora_rank
    order = attention.rope_pairs[0].argsort(stable=True)
    rope_order = torch.cat([order, order + half])
    if shape.interleaved:
        rope_order = rope_order.view(2, half).T.flatten()
    longest = input_gain * math.sqrt(g.hidden_size)  # of an RMS-normed state, after its gain

    # Queries: DeepSeek's order of rotary pairs, the difference in scale, and the table's factor for both sides.
    scale = torch.full((g.qk_head_dim,), math.sqrt(g.qk_head_dim / g.head_dim), dtype=torch.float64)
    scale[n:] *= rope_scaling**2
    rows = torch.cat([torch.arange(n), n + rope_order.cpu()])
    tensors: dict[str, Tensor] = {}

    def queries(tensor: Tensor) -> Tensor:
        heads = double(tensor).unflatten(0, (g.num_attention_heads, -1))[:, rows]
        return (heads * scale.view(-1, *[1] * (heads.ndim - 2))).flatten(0, 1)

    if shape.query_rank is None:
        tensors["q_proj.weight"] = queries(attention.q_proj.weight)
    else:
        plain = g.q_lora_rank is None
        up = attention.q_proj if plain else attention.q_b_proj
        down = torch.eye(g.hidden_size, dtype=torch.float64) if plain else double(attention.q_a_proj.weight)
        weight, bias = queries(up.weight), None if up.bias is None else queries(up.bias)
        if shape.normed:
            made = {"q_a_proj.weight": down, "q_b_proj.weight": weight}
            made["q_a_layernorm.weight"] = double(attention.q_a_layernorm.weight)
            if shape.biased:
                made["q_a_proj.bias"] = torch.zeros(len(down), dtype=torch.float64)
        else:
            made = constant_norm("q_a", "q_b_proj", down, None, weight, bias, longest, len(down), dtype)
        tensors |= made

    # Keys and values.
    compressed = attention.kv_a_proj_with_mqa
    weight = double(compressed.weight)
    bias = torch.zeros(len(weight), dtype=torch.float64) if compressed.bias is None else double(compressed.bias)
    share = g.num_attention_heads // g.num_up_heads

    def repeated(tensor: Tensor) -> Tensor:
        return double(tensor).unflatten(0, (g.num_up_heads, -1)).repeat_interleave(share, dim=0).flatten(0, 1)

    up_weight = repeated(attention.kv_b_proj.weight)
    up_bias = None if attention.kv_b_proj.bias is None else repeated(attention.kv_b_proj.bias)
    if shape.normed:
        tensors["kv_a_proj_with_mqa.weight"], tensors["kv_b_proj.weight"] = weight[:r], up_weight
        tensors["kv_a_layernorm.weight"] = double(attention.kv_a_layernorm.weight)
        if shape.biased:
            tensors["kv_a_proj_with_mqa.bias"] = bias[:r]
    else:
        made = constant_norm(
            "kv_a", "kv_b_proj", weight[:r], bias[:r], up_weight, up_bias, longest, shape.rank - 1, dtype
        )
        for part in ("weight", "bias"):
            tensors[f"kv_a_proj_with_mqa.{part}"] = made.pop(f"kv_a_proj.{part}")
        tensors |= made
    rotary = {"weight": weight[r:][rope_order.cpu()], "bias": bias[r:][rope_order.cpu()]}
    for part, rows_ in rotary.items():
        name = f"kv_a_proj_with_mqa.{part}"
        if name in tensors:
            tensors[name] = torch.cat([tensors[name], rows_])
    for part, tensor in attention.o_proj.named_parameters():
        tensors[f"o_proj.{part}"] = double(tensor)
    if shape.biased and "o_proj.bias" not in tensors:
        tensors["o_proj.bias"] = torch.zeros(g.hidden_size, dtype=torch.float64)
    return tensors


def constant_norm(
    down_name: str,
    up_name: str,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    longest_input: float,
    rank: int,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """A low-rank map up·(down·x + down_bias) + up_bias with an RMSNorm in its middle that changes nothing.

    Args:
        down_name, up_name: DeepSeek's names: `kv_a` and `kv_b_proj`, or `q_a` and `q_b_proj`.
        down, down_bias: [r, d] and [r]. up, up_bias: [·, r] and [·].
        longest_input: ‖x‖ at most.
        rank: Channels before the constant one; r or more, the rest zero.
        dtype: That the weights will be saved in: what it rounds is made up for.
    """
    if down_bias is None:
        down_bias = torch.zeros(len(down), dtype=torch.float64)
    bound = torch.linalg.matrix_norm(down, 2).item() * longest_input + down_bias.norm().item()
    factor = 2.0 ** math.floor(math.log2(LARGEST_LATENT / bound)) if bound > 0 else 1.0
    width = rank + 1
    # What the norm makes of the channels, with the roundings of the dtype. The constant one leaves it as about 1, if it
    # is needed at all, so that it spoils no neighbour where a cache is quantized.
    root = torch.tensor(CONSTANT / math.sqrt(width), dtype=torch.float64)
    gain = root.to(dtype).double()
    small = torch.tensor(0.0 if up_bias is None else 1 / math.sqrt(width), dtype=torch.float64).to(dtype)
    constant = ((CONSTANT / root).to(dtype) * small).double()
    made = {
        f"{down_name}_proj.weight": torch.zeros(width, down.shape[1], dtype=torch.float64),
        f"{down_name}_proj.bias": torch.zeros(width, dtype=torch.float64),
        f"{down_name}_layernorm.weight": torch.cat([gain.repeat(rank), small.double()[None]]),
        f"{up_name}.weight": torch.zeros(len(up), width, dtype=torch.float64),
    }
    made[f"{down_name}_proj.weight"][: len(down)] = down * factor
    made[f"{down_name}_proj.bias"][: len(down)] = down_bias * factor
    made[f"{down_name}_proj.bias"][-1] = CONSTANT
    made[f"{up_name}.weight"][:, : up.shape[1]] = up * (root / gain) / factor
    if up_bias is not None:
        made[f"{up_name}.weight"][:, -1] = up_bias / constant
    return made


def double(tensor: Tensor) -> Tensor:
    """In float64 on the CPU."""
    return tensor.detach().to("cpu", torch.float64)
