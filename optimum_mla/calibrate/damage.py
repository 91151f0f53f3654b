"""The damage that is done to the logits of a layer if a rotary component stops rotating."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_mla.calibrate.states import LayerStates
from optimum_mla.calibrate.windows import fitted
from optimum_mla.ops.rope_mix import RopeMix, as_pairs, mixed_keys

DAMAGE_WINDOWS = 16
"""Largest number of fitted windows on which the damage of stopped rotations is measured."""
DAMAGE_ROWS = 32
"""Largest number of query tokens per window on which that damage is measured."""


def rotary_damage(layer: LayerStates, mix: RopeMix) -> Tensor:
    """Return the damage that is done if a component stops rotating, [C], where C = G·D/2.

    The damage is the squared change of the logits, summed over query heads and averaged over query tokens. Softmax
    ignores a shift that all logits of a query share, so the change is taken as its variance under the query's
    attention. It is weighted like the queries in `LayerMoments.queries`, and includes the scale of the logits.

    Args:
        layer: The layer on the states of the walk.
        mix: The mixing of the key heads that makes the components.
    """
    g, walk = layer.geometry, layer.walk
    windows = fitted(len(walk.windows))
    windows = windows[:: -(-len(windows) // DAMAGE_WINDOWS)]
    length = walk.converted.shape[1]
    rows = torch.linspace(length / DAMAGE_ROWS, length - 1, min(DAMAGE_ROWS, length), device=walk.device).long()
    pairs = g.head_dim // 2
    first, second = torch.triu_indices(4, 4, device=walk.device)
    twice = torch.where(first == second, 1.0, 2.0).double()
    scaling = layer.source.attention_scaling
    turns = torch.complex(*(part[0].double() for part in layer.cos_sin))  # [L, D/2]

    def sums(window: Tensor) -> tuple[Tensor]:
        total = torch.zeros(g.num_key_value_heads * pairs, dtype=torch.float64, device=walk.device)
        heads = layer.heads(walk.converted[window, None])
        weights = layer.weights(heads.query, heads.key)
        effect = layer.value_spread(weights, heads.value)[0] * layer.relative_weights[window]  # [H, L]
        factors = heads.key_factor[0].double()  # [G, L]
        # The components are mixed from keys without the factor of the key norm, because each head has its own.
        raw = heads.key[0].double() / factors[..., None] if g.key_norm else heads.key[0].double()
        components = mixed_keys(mix, raw.mT)  # [C, L]
        still, turned = components * scaling, components * turns.T.repeat(g.num_key_value_heads, 1)
        parts = torch.stack([turned.real, turned.imag, still.real, still.imag])  # [4, C, L]
        share, products = g.num_attention_heads // g.num_key_value_heads, None
        for head in range(g.num_attention_heads):
            group = head // share
            if products is None or (g.key_norm and head % share == 0):
                u = parts * factors[group] if g.key_norm else parts
                products = u[first] * u[second]  # [10, C, L]
            attention = weights[0, head, rows].double()  # [rows, L]
            means = torch.einsum("rt,act->arc", attention, u)
            squares = torch.einsum("rt,nct->nrc", attention, products)
            covariance = squares - means[first] * means[second]  # [10, rows, C]
            pair = as_pairs(heads.query[0, head, rows].double().T[None])[0]  # [D/2, rows]
            moving = mix.queries[:, :, group].T[..., None] * pair  # [G, D/2, rows]
            a, b = (moving * turns[rows].T).flatten(0, 1).T, (moving * scaling).flatten(0, 1).T  # [rows, C]
            reader = torch.stack([a.real, a.imag, -b.real, -b.imag])
            change = (reader[first] * reader[second] * covariance * twice[:, None, None]).sum(0)
            total += (change * effect[head, rows, None].double()).sum(0).clamp_min(0)
        return (total,)

    (total,) = walk.processes.summed(list(windows), sums)
    return total * g.head_dim**-1.0 / (len(windows) * len(rows))  # type: ignore[no-any-return]
