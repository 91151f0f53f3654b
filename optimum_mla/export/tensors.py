"""The shape and the weights of the attention of an export."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.export.checks import check_padding, different_frequencies
from optimum_mla.export.constant_channel import NormedLatent, Projection, constant_norm
from optimum_mla.families.spec import AttentionSpec
from optimum_mla.models.family_table import family_of


@dataclass(frozen=True)
class Shape:
    """The shape that all layers of the export share.

    Attributes:
        rank: Rank of the latent, including the constant channel.
        query_rank: Rank of the query latent, including the constant channel, or None without a query latent.
        normed: Whether the model norms its latents itself, so that there is no constant channel.
        biased: Whether the down-projections have biases.
        interleaved: Whether the two dims of a rotary pair are neighbours, as inference engines expect them. Otherwise
            they are half of the rotary dims apart.
        pairs: The source's rotary pairs with whose frequencies those of the converted model turn, rising, [R/2].
        rope_pairs: Number of rotary pairs of the export; those that are not in `places` are zero.
        places: Which of the export's rotary pairs each of the converted model's is, in the order of `pairs`, [R/2].
    """

    rank: int
    query_rank: int | None
    normed: bool
    biased: bool
    interleaved: bool
    pairs: Tensor
    rope_pairs: int
    places: Tensor

    @property
    def rope_dims(self) -> int:
        """Return the number of dims of the rotary key."""
        return 2 * self.rope_pairs

    @property
    def slots(self) -> Tensor:
        """Return the rotary dim of the export for each first dim and then each second dim of `places`, [R]."""
        if self.interleaved:
            return torch.cat([2 * self.places, 2 * self.places + 1])
        return torch.cat([self.places, self.places + self.rope_pairs])


def export_shape(layers: Sequence[MLAGeometry], pairs: Tensor, pad_to: tuple[int, int] | None = None) -> Shape:
    """Return the shape of the export of a model that has passed `check_exportable`.

    Args:
        layers: The shapes of the model's layers.
        pairs: The source's rotary pairs with whose frequencies all layers rotate, rising, [R/2].
        pad_to: Rank of the latent and dims of the rotary key that zeros are added for, or None.

    Raises:
        InvalidValueError: The model is larger than it shall be after padding, or the padded one than the memory.
    """
    g, normed = layers[0], layers[0].latent_norm
    query_rank = g.q_lora_rank
    if g.query_bias and query_rank is None:
        query_rank = g.hidden_size
    constant = 0 if normed else 1
    biased = not normed or any(layer.key_value_bias or layer.output_bias for layer in layers)
    rank, count = max(layer.kv_lora_rank for layer in layers) + constant, len(pairs)
    if pad_to is not None:
        check_padding(pad_to, layers, normed)
        rank, count = pad_to[0], pad_to[1] // 2
    return Shape(
        rank=rank,
        query_rank=None if query_rank is None else query_rank + constant,
        normed=normed,
        biased=biased,
        interleaved=normed,
        pairs=pairs,
        rope_pairs=count,
        places=rotary_places(pairs, count, g.head_dim // 2),
    )


def rotated_pairs(model: PreTrainedModel) -> Tensor:
    """Return the source's rotary pairs with whose frequencies all layers of a converted model rotate, rising, [R/2].

    Raises:
        UnsupportedModelError: The layers rotate at different frequencies.
    """
    orders = [attention.rope_pairs[0].sort().values for attention in latent_attentions(model)]
    if any(not torch.equal(order, orders[0]) for order in orders):
        raise different_frequencies()
    return orders[0].cpu()


def rotary_places(pairs: Tensor, count: int, most: int) -> Tensor:
    """Return which of `count` rotary pairs of an export each of the given ones is, [R/2], rising.

    If one base gives the frequencies of the export, pair j turns at base^(-j/count). The given pairs are put where they
    turn so, or else before all pairs that are zero.

    Args:
        pairs: Indices of the source's rotary pairs, [R/2], rising; a pair may be there more than once, from different
            heads.
        count: Number of pairs of the export, at least R/2.
        most: Number of pairs of the source's heads.
    """
    places = pairs * count // most
    regular = bool((places * most == pairs * count).all()) and len(set(places.tolist())) == len(places)
    return places if regular else torch.arange(len(pairs))


def latent_attentions(model: PreTrainedModel) -> list[Any]:
    """Return the attention modules of all layers in order."""
    spec: AttentionSpec = family_of(model.config).spec
    return [model.get_submodule(spec.attention_path(layer)) for layer in range(model.config.num_hidden_layers)]


def attention_tensors(attention: Any, shape: Shape, input_gain: float, rope_scaling: float) -> dict[str, Tensor]:
    """Return the weights of one attention layer by DeepSeek's names, in float64 on the CPU.

    Args:
        attention: A `DecoupledLatentAttention`.
        shape: The shape of the export.
        input_gain: The largest absolute gain of the norm before the attention.
        rope_scaling: The factor by which the source's rotary embedding multiplies cos and sin, as with YaRN.
    """
    hidden_size = attention.geometry.hidden_size
    longest = input_gain * math.sqrt(hidden_size)  # An RMS-normed state is not longer than this after its gain.
    tensors = _query_tensors(attention, shape, longest, rope_scaling) | _key_value_tensors(attention, shape, longest)
    tensors |= {f"o_proj.{part}": double(tensor) for part, tensor in attention.o_proj.named_parameters()}
    if shape.biased and "o_proj.bias" not in tensors:
        tensors["o_proj.bias"] = torch.zeros(hidden_size, dtype=torch.float64)
    return tensors


def _query_tensors(attention: Any, shape: Shape, longest: float, rope_scaling: float) -> dict[str, Tensor]:
    """Return the weights that make queries; see `attention_tensors`.

    They get DeepSeek's order of rotary pairs and the ratio of the two logit scales. They also get the factor of the
    source's rotary embedding twice, because the exported one multiplies neither queries nor keys by it.
    """
    g: MLAGeometry = attention.geometry
    n = g.qk_nope_head_dim
    scale = math.sqrt((n + shape.rope_dims) / g.head_dim)

    def queries(tensor: Tensor) -> Tensor:
        heads = double(tensor).unflatten(0, (g.num_attention_heads, -1)) * scale
        rope = _rotary_rows(attention, shape, heads[:, n:].transpose(0, 1)).transpose(0, 1)
        return torch.cat([heads[:, :n], rope * rope_scaling**2], dim=1).flatten(0, 1)

    if shape.query_rank is None:
        return {"q_proj.weight": queries(attention.q_proj.weight)}
    plain = g.q_lora_rank is None
    up = attention.q_proj if plain else attention.q_b_proj
    down = torch.eye(g.hidden_size, dtype=torch.float64) if plain else double(attention.q_a_proj.weight)
    weight, bias = queries(up.weight), None if up.bias is None else queries(up.bias)
    if shape.normed:
        down_bias = torch.zeros(len(down), dtype=torch.float64)
        made = NormedLatent(down, down_bias, double(attention.q_a_layernorm.weight), weight)
    else:
        made = constant_norm(
            Projection(down), Projection(weight, bias), longest, len(down), attention.o_proj.weight.dtype
        )
    return _named(made, shape, "q_a_proj", "q_a_layernorm", "q_b_proj")


def _key_value_tensors(attention: Any, shape: Shape, longest: float) -> dict[str, Tensor]:
    """Return the weights of the latent of keys and values and of the rotary key; see `attention_tensors`."""
    g: MLAGeometry = attention.geometry
    r, group = g.kv_lora_rank, g.num_attention_heads // g.num_up_heads
    compressed, up = attention.kv_a_proj_with_mqa, attention.kv_b_proj
    weight = double(compressed.weight)
    bias = torch.zeros(len(weight), dtype=torch.float64) if compressed.bias is None else double(compressed.bias)

    def repeated(tensor: Tensor) -> Tensor:
        return double(tensor).unflatten(0, (g.num_up_heads, -1)).repeat_interleave(group, dim=0).flatten(0, 1)

    up_weight, up_bias = repeated(up.weight), None if up.bias is None else repeated(up.bias)
    if shape.normed:
        # The norm divides by the root of the mean square over all channels, those of the padding included.
        share, kept = math.sqrt(shape.rank / r), torch.arange(r)
        made = NormedLatent(
            _spread(weight[:r] * share, kept, shape.rank),
            _spread(bias[:r] * share, kept, shape.rank),
            _spread(double(attention.kv_a_layernorm.weight) / share, kept, shape.rank),
            _spread(up_weight.T, kept, shape.rank).T.contiguous(),
        )
    else:
        dtype = attention.o_proj.weight.dtype
        down = Projection(weight[:r], bias[:r])
        made = constant_norm(down, Projection(up_weight, up_bias), longest, shape.rank - 1, dtype)
    made = made._replace(
        down=torch.cat([made.down, _rotary_rows(attention, shape, weight[r:])]),
        bias=torch.cat([made.bias, _rotary_rows(attention, shape, bias[r:])]),
    )
    return _named(made, shape, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")


def _named(made: NormedLatent, shape: Shape, down: str, norm: str, up: str) -> dict[str, Tensor]:
    """Return the weights of a latent by the names of its three modules."""
    named = {f"{down}.weight": made.down, f"{norm}.weight": made.gain, f"{up}.weight": made.up}
    return {**named, f"{down}.bias": made.bias} if shape.biased else named


def _rotary_rows(attention: Any, shape: Shape, rows: Tensor) -> Tensor:
    """Return the rows of a rotary key or query, [R, ...], in the order of the export, with zeros for other pairs."""
    order = attention.rope_pairs[0].argsort(stable=True).cpu()
    return _spread(rows[torch.cat([order, order + len(order)])], shape.slots, shape.rope_dims)


def _spread(rows: Tensor, places: Tensor, size: int) -> Tensor:
    """Return `size` rows, [size, ...], of which those at `places` are the given ones and the others are zero."""
    return rows.new_zeros(size, *rows.shape[1:]).index_copy(0, places, rows)


def double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64 on the CPU, detached from its graph."""
    return tensor.detach().to("cpu", torch.float64)
