"""Export of a converted model as a `deepseek_v3` model, which Transformers loads without this package.

DeepSeek's attention differs from `DecoupledLatentAttention` in four ways. The export compensates each of them:

- *DeepSeek always norms the latent c.* The export adds one channel to the latent, with zero weights and the constant
  bias M. The denominator of the norm is then sqrt((M² + ‖c‖²)/(r + 1)), which is almost constant: the latent is scaled
  by a power of two, so that ‖c‖ is at most M/2¹⁰ for any tokens, and the relative error is at most 2⁻²¹. Such a bound
  exists because the input of the attention is RMS-normed, so the weights limit ‖c‖. The channel also carries the
  biases of the up-projections, which DeepSeek does not have.
- *DeepSeek divides logits by sqrt(n + R)*, and the source model divides them by sqrt(D). The query weights are scaled
  by the ratio.
- *DeepSeek computes the rotary frequencies from a formula.* The `longrope` type multiplies each frequency by a factor
  of its own, so it can express any frequencies.
- *DeepSeek has a query bias only in the down-projection of a query latent.* Query biases are exported through a query
  latent of full rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel

from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.families.spec import AttentionSpec, sliding_window
from optimum_mla.models.base import is_tied, model_geometry
from optimum_mla.models.registry import family_of, is_converted
from optimum_mla.stack import FIXED_ROPE_TYPES, rope_type

CONSTANT = 2.0**14
"""The constant M, which every dtype represents exactly."""
LARGEST_LATENT = 2.0**4
"""The upper bound of ‖c‖ after scaling, which is M/2¹⁰."""
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


def refuse(reason: str, remedy: str) -> UnsupportedModelError:
    """Return the error for a model that `deepseek_v3` cannot express.

    Args:
        reason: The reason, as a clause without a period.
        remedy: A sentence that says what to do.
    """
    return UnsupportedModelError(f"export: {reason}. {remedy}")


def check_exportable(config: Any, pad: bool = False) -> None:
    """Check by its config alone whether `deepseek_v3` can express a model.

    Args:
        config: The config of a converted model.
        pad: Whether layers may be padded to the largest rank.

    Raises:
        UnsupportedModelError: The model cannot be exported. The message names the options of a conversion that can be
            exported, if there are any.
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
    rope = rope_type(config)
    if rope not in FIXED_ROPE_TYPES:
        raise refuse(f"{rope} rotary scaling depends on the length at hand", "Such models run in this package.")
    if getattr(config, "mlp_bias", False):
        raise refuse("the feed-forward layers have biases, DeepSeek's do not", "Such models run in this package.")


@dataclass(frozen=True)
class Shape:
    """The shape that all layers of the export share.

    Attributes:
        rank: Rank of the latent, including the constant channel.
        query_rank: Rank of the query latent, including the constant channel, or None without a query latent.
        normed: Whether the model norms its latents itself, so that there is no constant channel.
        biased: Whether the down-projections have biases.
        interleaved: Whether the two dims of a rotary pair are neighbours, as inference engines expect them. Otherwise
            they are R/2 dims apart.
        pairs: The source's rotary pair from which each rotary pair comes, [R/2].
    """

    rank: int
    query_rank: int | None
    normed: bool
    biased: bool
    interleaved: bool
    pairs: Tensor


def export_shape(model: PreTrainedModel) -> Shape:
    """Return the shape of the export of a model that has passed `check_exportable`.

    Raises:
        UnsupportedModelError: The layers rotate at different frequencies.
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
    """Return the attention modules of all layers in order."""
    spec: AttentionSpec = family_of(model.config).spec
    return [model.get_submodule(spec.attention_path(layer)) for layer in range(model.config.num_hidden_layers)]


def rope_parameters(model: PreTrainedModel, pairs: Tensor) -> dict[str, Any]:
    """Return the config's `rope_parameters`, which give the frequencies of some of the source's rotary pairs.

    They are of type `default` where the formula theta^(-2i/R) gives these frequencies, and of type `longrope` with a
    factor for each frequency otherwise.

    Args:
        model: A converted model.
        pairs: Indices of the source's rotary pairs, [R/2].
    """
    config: Any = model.config
    rotary = model.get_submodule(family_of(config).spec.rotary_path)
    frequencies = rotary.inv_freq.detach().double().cpu()[pairs.cpu()]  # type: ignore[operator, union-attr]
    theta = float(config.rope_parameters["rope_theta"])
    plain = theta ** -(torch.arange(len(pairs), dtype=torch.float64) / len(pairs))
    factors = plain / frequencies
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


def deepseek_config(model: PreTrainedModel, shape: Shape) -> DeepseekV3Config:
    """Return the config of the export, given the converted model and the shape of the export."""
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
    """Return a model as a `DeepseekV3ForCausalLM` that computes the same.

    The two models share all weights other than those of the attention.

    Args:
        model: A converted model.
        pad: Whether to pad layers of lower rank with zeros to the largest rank.

    Raises:
        UnsupportedModelError: `deepseek_v3` cannot express the model.
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
    # The frequencies are computed again, because the state dict does not hold them and the model is on the meta device.
    exported.model.rotary_emb = type(exported.model.rotary_emb)(exported.config)
    exported.generation_config = model.generation_config
    return exported.to(model.device).eval()


def attention_tensors(attention: Any, shape: Shape, input_gain: float, rope_scaling: float) -> dict[str, Tensor]:
    """Return the weights of one attention layer by DeepSeek's names, in float64 on the CPU.

    Args:
        attention: A `DecoupledLatentAttention`.
        shape: The shape of the export.
        input_gain: The largest absolute gain of the norm before the attention.
        rope_scaling: The factor by which the source's rotary embedding multiplies cos and sin, as with YaRN.
    """
    g: MLAGeometry = attention.geometry
    dtype = attention.o_proj.weight.dtype
    n, half, r = g.qk_nope_head_dim, g.qk_rope_head_dim // 2, g.kv_lora_rank
    order = attention.rope_pairs[0].argsort(stable=True)
    rope_order = torch.cat([order, order + half])
    if shape.interleaved:
        rope_order = rope_order.view(2, half).T.flatten()
    longest = input_gain * math.sqrt(g.hidden_size)  # An RMS-normed state is not longer than this after its gain.

    # The query weights get DeepSeek's order of rotary pairs and the ratio of the two logit scales. They also get the
    # factor of the source's rotary embedding twice, because the exported one multiplies neither queries nor keys by it.
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

    # The down-projection and the up-projection of keys and values follow, and then the rotary key.
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
    """Return weights that compute up·(down·x + down_bias) + up_bias although an RMSNorm follows the down-projection.

    The norm is neutralized by a constant channel, as the docstring of this module explains. Where `dtype` rounds the
    gain of the norm, the up-projection compensates it.

    Args:
        down_name: DeepSeek's name of the down-projection without `_proj`, `kv_a` or `q_a`.
        up_name: DeepSeek's name of the up-projection, `kv_b_proj` or `q_b_proj`.
        down: The weight of the down-projection, [r, d].
        down_bias: The bias of the down-projection, [r], or None.
        up: The weight of the up-projection, [m, r].
        up_bias: The bias of the up-projection, [m], or None.
        longest_input: An upper bound of ‖x‖.
        rank: Number of channels before the constant one. It is at least r, and channels beyond r are zero.
        dtype: The dtype in which the weights will be saved.

    Returns:
        The parameters of both projections and of the norm by DeepSeek's names, in float64.
    """
    if down_bias is None:
        down_bias = torch.zeros(len(down), dtype=torch.float64)
    bound = torch.linalg.matrix_norm(down, 2).item() * longest_input + down_bias.norm().item()
    factor = 2.0 ** math.floor(math.log2(LARGEST_LATENT / bound)) if bound > 0 else 1.0
    width = rank + 1
    # The gain of the norm multiplies the channels by the norm's denominator again, up to the rounding of the dtype. The
    # constant channel leaves the norm as about 1, or as 0 if there is no bias to carry, because a large number would
    # make its neighbours imprecise where a cache is quantized.
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
    """Return a tensor in float64 on the CPU, detached from its graph."""
    return tensor.detach().to("cpu", torch.float64)
