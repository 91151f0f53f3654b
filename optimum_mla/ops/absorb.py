"""Products of grouped heads, and when attention in latent space pays.

The latents are one head that all query heads share. They are never expanded along the heads: the heads fold into the
query length instead, so every product is one batched matrix product over the cache as it lies in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHORT_PRODUCT = 256
"""Tokens."""


def grouped_logits(query: Tensor, key: Tensor) -> Tensor:
    """query [B, H, S, R] against key [B, K, T, R], H/K query heads to a key head: [B, H, S, T]."""
    batch, heads, length, dim = query.shape
    folded = query.reshape(batch, key.shape[1], -1, dim)  # [B, K, H/K·S, R]
    return product(key, folded.transpose(2, 3)).transpose(2, 3).reshape(batch, heads, length, -1)


def product(cached: Tensor, other: Tensor) -> Tensor:
    """Matrix product of something with a row per cached token, [..., T, a], and other [..., a, m].

    The cache is the left factor: as the right one, 16-bit kernels on CPUs first rearrange all of it. They are also
    compiled anew for every number of tokens, which costs more than a short product: those are computed in float32.
    """
    if cached.device.type == "cpu" and cached.dtype.itemsize == 2 and cached.shape[-2] < SHORT_PRODUCT:
        return (cached.float() @ other.float()).to(cached.dtype)
    return cached @ other


def grouped_context(weights: Tensor, value: Tensor) -> Tensor:
    """weights [B, H, S, T] over value [B, U, T, v], H/U heads to a value head: [B, H, S, v]."""
    batch, heads, length, tokens = weights.shape
    folded = weights.reshape(batch, value.shape[1], -1, tokens) @ value  # [B, U, H/U·S, v]
    return folded.reshape(batch, heads, length, -1)


def folded_queries(queries: Tensor, up: Tensor) -> Tensor:
    """Queries [B, H, S, a] times the key up-projection [U, a, r], H/U heads to a matrix: [B, H, S, r]."""
    mapped = torch.bmm(_by_matrix(queries, up), up)
    return _by_head(mapped, queries)


def up_projected_context(context: Tensor, mass: Tensor, up: Tensor, bias: Tensor | None, skip: int = 0) -> Tensor:
    """What a weighted sum of latents up-projects to.

    Args:
        context: Weighted sum of latents, [B, H, S, r].
        mass: Sum of the weights, [B, H, S, 1]; by it the bias passes through the sum.
        up: [U, skip + v, r], H/U heads to a matrix.
        bias: [U, skip + v] or None.
        skip: Rows of `up` that are not values. They are computed too: cutting them off first would copy the weight.

    Returns:
        [B, H, S, v].
    """
    rows = _by_matrix(context, up).transpose(1, 2)  # the weight is the left factor, as it lies in memory
    values = _by_head(torch.bmm(up, rows)[:, skip:].transpose(1, 2), context)
    if bias is None:
        return values
    return values + mass * bias[:, skip:].repeat_interleave(values.shape[1] // len(bias), 0)[:, None]


def query_bias_logits(queries: Tensor, bias: Tensor) -> Tensor:
    """What the key up-projection's bias [U, a] adds to every logit of queries [B, H, S, a]: [B, H, S, 1]."""
    return (queries * bias.repeat_interleave(queries.shape[1] // len(bias), 0)[:, None]).sum(-1, keepdim=True)


def _by_matrix(x: Tensor, matrices: Tensor) -> Tensor:
    """x [B, H, S, a] by the matrix that its head takes: [U, B·H/U·S, a].

    All rows of a batch go into one product: broadcasting over the batch would copy the matrices.
    """
    batch, _, _, dim = x.shape
    return x.reshape(batch, len(matrices), -1, dim).transpose(0, 1).reshape(len(matrices), -1, dim)


def _by_head(mapped: Tensor, x: Tensor) -> Tensor:
    """The inverse of `_by_matrix`: [U, B·H/U·S, b] as [B, H, S, b]."""
    return mapped.unflatten(1, (len(x), -1)).transpose(0, 1).reshape(*x.shape[:3], -1)


def absorbing_saves(
    queries: int, tokens: int, rank: int, heads: int, up_heads: int, key_dim: int, value_dim: int
) -> bool:
    """Whether latent-space attention takes fewer multiply-adds than expanding the cache.

    Expanding costs T·r·U·(key + value) once and H·S·T·(key + value) for the attention; absorbing costs
    S·H·r·(key + value) and H·S·T·r for each side that is absorbed. A side of zero dims is not absorbed. What both
    ways do (the rotary logits) does not count.

    Args:
        queries: S. tokens: T. rank: r of the latent. heads: H. up_heads: U.
        key_dim: Position-free key dims (n), or 0 where keys are expanded either way.
        value_dim: v, or 0 where values are.
    """
    dims, sides = key_dim + value_dim, (key_dim > 0) + (value_dim > 0)
    expand = tokens * rank * up_heads * dims + heads * queries * tokens * dims
    absorb = queries * heads * rank * dims + heads * queries * tokens * rank * sides
    return absorb < expand
