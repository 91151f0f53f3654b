"""How far back each head attends, and the second moments of its queries, rotated by those distances.

A query reads a key through the rotation by the distance between them, so the query that a key meets is R(Δ) q. Where
attention reaches few tokens, slow pairs hardly turn, and their second moments keep the structure of the queries' own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_mla.calibrate.states import HeadStates, LayerStates

QUERY_STEP = 4
"""Distances are gathered from every so-many-th query."""


def distances(layer: LayerStates, heads: HeadStates, weights: Tensor, row: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Return by how much errors of keys at each distance change the layer's output, to first order.

    The logit of a key with attention weight p and value v changes the output o of its query by p (v - o) W_O per unit,
    which is squared here with one of the two p, because errors of keys with like content are alike.

    Args:
        layer: The layer.
        heads: Its heads on a batch of windows.
        weights: Attention weights, [B, H, L, L].
        row: Weights of the tokens' squared errors, [B, L].
        first: Number of first keys that no error is expected in, such as those of exempt tokens.

    Returns:
        The sums by distance without the first keys, [H, L], and the sum over all distances with them, [H].
    """
    length, device = weights.shape[-1], weights.device
    queries = torch.arange(QUERY_STEP - 1, length, QUERY_STEP, device=device)
    if not len(queries):
        queries = torch.arange(length, device=device)
    p = weights[:, :, queries]  # [B, H, T, L]
    value = heads.value.repeat_interleave(p.shape[1] // heads.value.shape[1], dim=1)
    output = p @ value
    read = value @ layer.output_moments
    apart = (output @ layer.output_moments * output).sum(-1)[..., None] + (read * value).sum(-1)[:, :, None]
    apart = (apart - 2 * output @ read.mT).clamp_min_(0)
    effect = (apart * p * row[:, None, queries, None]).sum(0).double()  # [H, T, L]
    total = effect.sum((1, 2))
    effect[..., :first] = 0
    found = effect.new_zeros(len(effect), length)
    apart_by = (queries[:, None] - torch.arange(length, device=device)).clamp_min(0)  # later keys have no weight
    found.index_add_(1, apart_by.flatten(), effect.flatten(1))
    return found, total


def turned(moments: Tensor, weights: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the mean of R(Δ) M R(Δ)ᵀ over weighted distances Δ, [H, D, D].

    Args:
        moments: The second moments M of half-split heads, [H, D, D].
        weights: The weights of the distances from 0 on, with sum 1, [H, L].
        cos, sin: Cosines and sines of the pairs' angles at each distance, [L, D/2].
    """
    half = cos.shape[1]
    one, two = moments[..., :half], moments[..., half:]
    aa, ba = one.unflatten(1, (2, half)).unbind(1)
    ab, bb = two.unflatten(1, (2, half)).unbind(1)
    by_cos, by_sin = weights[..., None] * cos, weights[..., None] * sin  # [H, L, D/2]
    cc, cs, ss = by_cos.mT @ cos, by_cos.mT @ sin, by_sin.mT @ sin
    sc = cs.mT
    first = torch.cat([cc * aa - cs * ab - sc * ba + ss * bb, cs * aa + cc * ab - ss * ba - sc * bb], dim=2)
    second = torch.cat([sc * aa - ss * ab + cc * ba - cs * bb, ss * aa + sc * ab + cs * ba + cc * bb], dim=2)
    return torch.cat([first, second], dim=1)
