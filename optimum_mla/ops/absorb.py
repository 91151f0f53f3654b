"""Products of grouped heads, and when attention in latent space pays.

The latents are one head that all query heads share. They are never expanded along the heads: the heads fold into the
query length instead, so every product is one batched matrix product over the cache as it lies in memory.
"""

from __future__ import annotations

from torch import Tensor


def grouped_logits(query: Tensor, key: Tensor) -> Tensor:
    """query [B, H, S, R] against key [B, K, T, R], H/K query heads to a key head: [B, H, S, T]."""
    batch, heads, length, dim = query.shape
    folded = query.reshape(batch, key.shape[1], -1, dim)  # [B, K, H/K·S, R]
    # Keys are the left factor: as the right one, bf16 kernels on CPUs first rearrange all of them.
    return (key @ folded.transpose(2, 3)).transpose(2, 3).reshape(batch, heads, length, -1)


def grouped_context(weights: Tensor, value: Tensor) -> Tensor:
    """weights [B, H, S, T] over value [B, U, T, v], H/U heads to a value head: [B, H, S, v]."""
    batch, heads, length, tokens = weights.shape
    folded = weights.reshape(batch, value.shape[1], -1, tokens) @ value  # [B, U, H/U·S, v]
    return folded.reshape(batch, heads, length, -1)


def through_up_projection(x: Tensor, weight: Tensor) -> Tensor:
    """Apply per-head matrices: x [B, H, S, a] times weight [U, a, b], H/U heads to a matrix: [B, H, S, b]."""
    batch, heads, length, _ = x.shape
    folded = x.reshape(batch, weight.shape[0], -1, x.shape[-1])  # [B, U, H/U·S, a]
    return (folded @ weight).reshape(batch, heads, length, -1)


def up_projected_context(context: Tensor, mass: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """What a weighted sum of latents up-projects to.

    Args:
        context: Weighted sum of latents, [B, H, S, r].
        mass: Sum of the weights, [B, H, S, 1]; by it the bias passes through the sum.
        up: [U, v, r].
        bias: [U, v] or None.

    Returns:
        [B, H, S, v].
    """
    values = through_up_projection(context, up.transpose(1, 2))
    return values if bias is None else values + through_up_projection(mass, bias.unsqueeze(1))


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
