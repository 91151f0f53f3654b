"""Second moments of one layer, which weigh the errors of its factorization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_mla.calibrate.distances import distances, turned
from optimum_mla.calibrate.states import HeadStates, LayerStates
from optimum_mla.calibrate.windows import fitted

FIRST_TOKENS = 4
"""Number of tokens at the start of a window whose latents may be many times larger than those of others."""


@dataclass(frozen=True)
class QueryMoments:
    """Second moments of what reads the keys of one layer, in float64.

    Attributes:
        queries: Second moments of each query head after its norm and before its rotation, [H, D, D]. The weight of a
            query is the effect of its logits on the layer's output: the variance, under its attention, of what the
            values add to the hidden state.
        relative_queries: The same as the keys meet them, [H, D, D]: turned by the distance between query and key, with
            the distances weighted by the effect of such keys on the output. Keys of the first tokens are left out.
        key_scale: Mean square of the factor by which the key norm multiplies each key head, [G]; ones without a norm.
    """

    queries: Tensor
    relative_queries: Tensor
    key_scale: Tensor


@dataclass(frozen=True)
class LayerMoments(QueryMoments):
    """Second moments of one layer in float64.

    Attributes:
        inputs: Covariance of the normed inputs of the attention, [d, d]. Half of a token's weight is the same for all
            tokens, and the other half is proportional to the attention that the token receives.
        input_mean: Mean of the normed inputs with the same weights, [d].
    """

    inputs: Tensor
    input_mean: Tensor

    @property
    def raw_inputs(self) -> Tensor:
        """Return the second moments of the inputs about zero instead of about their mean, [d, d]."""
        return self.inputs + torch.outer(self.input_mean, self.input_mean)


def gather_moments(layer: LayerStates) -> LayerMoments:
    """Return the second moments of a layer, gathered in one pass over the fitted windows of the converted stream."""

    def sums(windows: Tensor) -> tuple[Tensor | float, ...]:
        heads, weights, row = _attended(layer, windows)
        received = (weights * row[:, None, :, None]).sum((1, 2)) / layer.geometry.num_attention_heads  # [B, L]
        share = (0.5 + 0.5 * received).flatten().double()[:, None]
        flat = heads.normed.flatten(0, 1).double()
        return (
            *_query_sums(layer, heads, weights, row),
            (flat * share).T @ flat,
            (flat * share).sum(0),
            float(share.sum()),
        )

    *queries, inputs, mean, total = layer.walk.processes.summed(layer.walk.fitted_batches(), sums)
    mean = mean / total
    return LayerMoments(
        **vars(_query_moments(layer, *queries)), inputs=inputs / total - mean[:, None] * mean, input_mean=mean
    )


def gather_query_moments(layer: LayerStates, tokens: int) -> QueryMoments:
    """Return the second moments of the queries of a layer on the converted stream.

    Args:
        layer: The layer.
        tokens: Largest number of tokens to measure on, which are whole fitted windows, one at least, evenly spread.
    """
    walk = layer.walk
    found = fitted(len(walk.windows))
    count = min(len(found), max(1, tokens // walk.windows.shape[1]))
    spread = found[torch.arange(count) * len(found) // count]

    def sums(windows: Tensor) -> tuple[Tensor | float, ...]:
        return _query_sums(layer, *_attended(layer, windows))

    return _query_moments(layer, *walk.processes.summed(walk.batches(spread), sums))


def _attended(layer: LayerStates, windows: Tensor) -> tuple[HeadStates, Tensor, Tensor]:
    """Return the heads, the attention weights and the weights of the tokens' squared errors of some windows."""
    heads = layer.heads(layer.walk.converted[windows])
    return heads, layer.weights(heads.query, heads.key), layer.relative_weights[windows]


def _query_sums(layer: LayerStates, heads: HeadStates, weights: Tensor, row: Tensor) -> tuple[Tensor | float, ...]:
    """Return sums over some windows: of queries, of distances, of squared key factors, and of tokens."""
    effect = (layer.value_spread(weights, heads.value) * row[:, None]).double()[..., None]  # [B, H, L, 1]
    query = heads.query.double()
    return (
        ((query * effect).mT @ query).sum(0),
        *distances(layer, heads, weights, row, FIRST_TOKENS),
        heads.key_factor.double().square().sum((0, 2)),
        row.numel(),
    )


def _query_moments(
    layer: LayerStates, queries: Tensor, apart: Tensor, reached: Tensor, key_scale: Tensor, count: int
) -> QueryMoments:
    """Return the moments of the queries, given the sums over all windows; see `_query_sums`."""
    queries = queries / count
    cos, sin = (part[0].double() / layer.source.attention_scaling for part in layer.cos_sin)
    kept = apart.sum(1, keepdim=True)
    first = torch.zeros(1, dtype=torch.long, device=layer.walk.device)
    nearest = torch.nn.functional.one_hot(first, apart.shape[1]).double()
    share = torch.where(kept > 0, apart / kept, nearest)  # what reads first tokens only reads no other distance
    part = (kept[:, 0] / reached.clamp_min(torch.finfo(torch.float64).tiny))[:, None, None]
    relative = turned(queries, share, cos, sin) * part
    return QueryMoments(queries, relative, key_scale / count)


def contribution(layer: LayerStates) -> Tensor:
    """Return the 2-norm contribution of each rotary pair (MHA2MLA, arXiv 2502.14837, section 3.1), [G, D/2].

    It is the mean, over the tokens of the fitted windows, of the product of the norms of the query's pair and of the
    key's pair, averaged over the query heads of a group. It is measured on the states of the source model. Rotation is
    left out because it does not change the norm of a pair.
    """
    g, walk = layer.geometry, layer.walk

    def sums(windows: Tensor) -> tuple[Tensor, int]:
        heads = layer.heads(walk.source[windows])
        sizes = [x.double().unflatten(-1, (2, -1)).norm(dim=-2) for x in (heads.query, heads.key)]  # [B, X, L, D/2]
        grouped = sizes[0].unflatten(1, (g.num_key_value_heads, -1)).mean(2)
        return (grouped * sizes[1]).sum((0, 2)), heads.normed.shape[:2].numel()

    total, tokens = walk.processes.summed(walk.fitted_batches(), sums)
    return total / tokens  # type: ignore[no-any-return]
