"""Attention in latent space: the up-projections are folded into the query and behind the weighted sum.

The latents are one head that all query heads share. They are never expanded along the heads: the heads fold into the
query length instead, so every product here is one batched matrix product over the cache as it lies in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def shared_logits(query: Tensor, key: Tensor) -> Tensor:
    """query [B, H, S, r] against one shared key [B, 1, T, r]: [B, H, S, T]."""
    batch, heads, length, dim = query.shape
    folded = query.reshape(batch, heads * length, dim) @ key[:, 0].transpose(1, 2)
    return folded.view(batch, heads, length, -1)


def grouped_logits(query: Tensor, key: Tensor) -> Tensor:
    """query [B, H, S, R] against key [B, K, T, R], H/K query heads to a key head: [B, H, S, T]."""
    batch, heads, length, dim = query.shape
    folded = query.reshape(batch, key.shape[1], -1, dim) @ key.transpose(2, 3)  # [B, K, H/K·S, T]
    return folded.reshape(batch, heads, length, -1)


def attention_weights(logits: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Softmax over T in float32, back in the logits' dtype.

    Args:
        logits: [B, H, S, T], scaled.
        mask: None, boolean (True: attend) or additive, broadcastable to the logits.
        dropout: Probability, applied to the weights.
    """
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    elif mask is not None:
        logits = logits + mask
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(logits.dtype)
    return nn.functional.dropout(weights, p=dropout) if dropout else weights


def shared_context(weights: Tensor, value: Tensor) -> Tensor:
    """weights [B, H, S, T] over one shared value [B, 1, T, r]: [B, H, S, r]."""
    batch, heads, length, tokens = weights.shape
    folded = weights.reshape(batch, heads * length, tokens) @ value[:, 0]
    return folded.view(batch, heads, length, -1)


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


def absorbed_values(weights: Tensor, latent: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """Weighted sum of the values that `latent` [B, 1, T, r] up-projects to, without up-projecting it: [B, H, S, v].

    Args:
        weights: [B, H, S, T].
        up: [U, v, r].
        bias: [U, v] or None; it passes through the weighted sum with the weights' own sum.
    """
    context = through_up_projection(shared_context(weights, latent), up.transpose(1, 2))
    if bias is None:
        return context
    return context + through_up_projection(weights.sum(-1, keepdim=True), bias.unsqueeze(1))


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
