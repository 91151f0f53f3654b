"""The weights of a family's own attention from heads in the form of this package: the way back from `project`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_mla.families.project import SourceAttention


@dataclass(frozen=True)
class HeadWeights:
    """Weights of the heads of an attention, with dims in the order of this package and logits scaled by D^-½.

    Attributes:
        query, key, value: Weights [H, D, d], [G, D, d] and [G, D, d].
        query_bias, key_bias, value_bias: Biases [H, D], [G, D] and [G, D], or None where the family has none.
        query_gain, key_gain: Gains of the norms, [1, D], or [H, D] and [G, D] for norms over all heads; None without.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    query_gain: Tensor | None = None
    key_gain: Tensor | None = None


def restored(source: SourceAttention, heads: HeadWeights) -> dict[str, Tensor]:
    """Return the parameters of the family's projections and head norms by their names in its attention, in float64.

    Args:
        source: An attention of the family; its own weights are not read.
        heads: The weights of the heads.
    """
    spec, factor = source.spec, source.query_factor

    def family_order(tensor: Tensor) -> Tensor:
        if source.order is None:
            return tensor
        return tensor[:, source.order.to(tensor.device).argsort()]

    def unscaled(tensor: Tensor) -> Tensor:
        if factor is None:
            return tensor
        there = factor.to(tensor.device)
        return tensor / (there if tensor.ndim == 2 else there[:, None])

    found: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        packed: dict[str, Tensor] = {}
        for part in ("query", "key", "value"):
            heads_of = getattr(heads, part if kind == "weight" else f"{part}_bias")
            if heads_of is None:
                continue
            if part == "query" and spec.query_norm is None:
                heads_of = unscaled(heads_of)
            packed[part] = heads_of if part == "value" else family_order(heads_of)
        if spec.fused is None:
            found |= {f"{getattr(spec, part)}.{kind}": one.flatten(0, 1) for part, one in packed.items()}
        elif packed and spec.fused_by_head:
            found[f"{spec.fused}.{kind}"] = torch.stack(list(packed.values()), dim=1).flatten(0, 2)
        elif packed:
            found[f"{spec.fused}.{kind}"] = torch.cat(list(packed.values())).flatten(0, 1)
    for name, gain in ((spec.query_norm, heads.query_gain), (spec.key_norm, heads.key_gain)):
        if name is not None and gain is not None:
            gain = unscaled(gain.double()) if name == spec.query_norm else gain.double()
            found[f"{name}.weight"] = (family_order(gain) - spec.norm_offset).flatten()
    return found
