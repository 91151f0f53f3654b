"""Attention over the cache block by block, with an online softmax (Milakov and Gimelshein, arXiv 1805.02867).

Only one block at a time is in memory in full precision, so a step over a quantized cache needs no dense copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from optimum_mla.ops.absorb import grouped_logits
from optimum_mla.ops.blocks import Block, CacheView, Latents
from optimum_mla.ops.rotary import RotaryFrames, rotate


class Attended(NamedTuple):
    """The result of attention over all blocks.

    Attributes:
        context: Weighted sum, [B, H, S, w], in the queries' dtype.
        mass: Sum of the weights, broadcastable to [B, H, S, 1]; it is 1 without dropout.
        weights: Attention weights, [B, H, S, T], or None if they were not asked for.
    """

    context: Tensor
    mass: Tensor
    weights: Tensor | None


class Sums(NamedTuple):
    """Softmax sums over some blocks, divided by exp(peak).

    Attributes:
        peak: Largest logit so far, [B, H, S, 1].
        total: Sum of the weights, [B, H, S, 1].
        mass: Sum of the weights after dropout, [B, H, S, 1].
        context: Weighted sum, [B, H, S, w].
        logits: Masked logits, [B, H, S, t], or None if they were not kept.
    """

    peak: Tensor
    total: Tensor
    mass: Tensor
    context: Tensor
    logits: Tensor | None = None

    def merged(self, new: Sums) -> Sums:
        """Return the sums with those over a further block added."""
        peak = torch.maximum(self.peak, new.peak)
        old_share, new_share = (self.peak - peak).exp(), (new.peak - peak).exp()
        return Sums(
            peak,
            self.total * old_share + new.total * new_share,
            self.mass * old_share + new.mass * new_share,
            torch.addcmul(new.context * new_share, self.context, old_share),
        )


Partial = Callable[[Block, slice, Tensor | None], Sums]
"""A function that attends to one block, given the slice of the cache that it holds and its part of the mask."""


def attend(view: CacheView, partial: Partial, mask: Tensor | None, keep_weights: bool = False) -> Attended:
    """Attend to all blocks of `view`, merging their sums in float32, or in float64 for float64 queries.

    Args:
        view: The cached tokens.
        partial: Attends to one block.
        mask: None, a boolean mask (True means attend) or an additive one, broadcastable to [B, H, S, T].
        keep_weights: Whether to return the weights too. They take H·S·T numbers per row, and `partial` must return its
            logits.
    """
    kept: list[Tensor] = []

    def blocks() -> Iterator[Sums]:
        for block, span, part in masked_blocks(view, mask):
            new = partial(block, span, part)
            if keep_weights and new.logits is not None:
                kept.append(new.logits)
            yield new._replace(logits=None)

    sums = reduce(Sums.merged, blocks())
    weights = (torch.cat(kept, dim=-1) - sums.peak).exp().div(sums.total) if keep_weights else None
    return Attended(sums.context / sums.total, sums.mass / sums.total, weights)


def masked_blocks(view: CacheView, mask: Tensor | None) -> Iterator[tuple[Block, slice, Tensor | None]]:
    """Yield each block of `view`, the slice of tokens that it holds, and the part of the mask for them.

    Raises:
        ValueError: The cache holds no tokens.
    """
    start = 0
    for block in view:
        span = slice(start, start + block.tokens)
        start = span.stop
        yield block, span, None if mask is None else mask[..., span]
    if not start:
        raise ValueError("attention over a cache without tokens")


def softmax_sums(
    logits: Tensor, combine: Callable[[Tensor], Tensor], mask: Tensor | None, dropout: float = 0.0
) -> Sums:
    """Return the softmax sums over one block.

    Args:
        logits: Scaled logits, [B, H, S, t], in float32 or wider.
        combine: Returns the weighted sum [B, H, S, w] for weights [B, H, S, t] in the dtype of the logits.
        mask: The part of the mask for this block.
        dropout: Probability with which a weight is dropped.
    """
    logits = masked(logits, mask)
    # Masked logits are the lowest number or -inf; the latter must not be subtracted from itself.
    peak = logits.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    weights = (logits - peak).exp()
    total = mass = weights.sum(dim=-1, keepdim=True)
    if dropout:
        weights = nn.functional.dropout(weights, p=dropout)
        mass = weights.sum(dim=-1, keepdim=True)
    return Sums(peak, total, mass, combine(weights).to(weights.dtype), logits)


def scaled_queries(queries: Tensor, scaling: float) -> Tensor:
    """Return queries times a factor of the logits, in float32 or wider, so that their own dtype rounds them once.

    The queries are scaled, and not the logits, because there are more of those.
    """
    return queries.to(torch.promote_types(queries.dtype, torch.float32)) * scaling


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Return scaled logits with a soft-cap c applied, c·tanh(logits / c); None leaves them as they are."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return logits [B, H, S, t] with a mask applied, which is None, boolean (True means attend) or additive."""
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits + mask


def masked_softmax(logits: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Return the attention weights of all scaled logits [B, H, S, T] at once, with mask and dropout applied."""
    weights = masked(logits, mask).softmax(dim=-1)
    return nn.functional.dropout(weights, p=dropout) if dropout else weights


@dataclass(frozen=True)
class RotaryRebuild:
    """Computes a rotary key that is not cached from the latent.

    Attributes:
        weight: Weight of the projection from the latent, [K·R, r].
        bias: Its bias, [K·R], or None.
        frames: Rotations of queries and keys, block by block.
    """

    weight: Tensor
    bias: Tensor | None
    frames: RotaryFrames

    def key(self, block: Block, span: slice) -> Tensor:
        """Return the rotated rotary key of a block, [B, K, t, R]."""
        rotation = self.frames.key(span)
        flat = block.first.project(self.weight, self.bias)  # [B, t, K·R]
        return rotate(flat.unflatten(-1, (rotation.cos.shape[1], -1)).transpose(1, 2), rotation)


@dataclass(frozen=True)
class LatentDecode:
    """The input of one step of decoupled attention in latent space, for the reference and for every kernel.

    Attributes:
        latent_queries: Queries with the key up-projection folded in, [B, H, S, r].
        rope_queries: Rotary part of the queries, [B, H, S, R], already rotated if the rotary key is cached and not yet
            rotated if it is rebuilt; R may be 0.
        logit_bias: What the bias of the up-projection adds to every logit of a query, [B, H, S, 1], where key norms or
            a soft-cap make a difference of it; None elsewhere, as a softmax does not see it.
        scaling: Factor that multiplies the logits.
        rope_heads: Number of heads of the rotary key, K.
        view: The cached tokens, first those that are quantized, then those in full precision.
        rebuild: Computes the rotary key from the latent, or None if it is cached.
        mask: None, a boolean mask (True means attend) or an additive one, broadcastable to [B, H, S, T].
        logit_cap: Soft-cap of the scaled logits, or None.
        dropout: Probability with which a weight is dropped.
        keep_weights: Whether the weights are to be returned.
    """

    latent_queries: Tensor
    rope_queries: Tensor
    logit_bias: Tensor | None
    scaling: float
    rope_heads: int
    view: CacheView
    rebuild: RotaryRebuild | None
    mask: Tensor | None
    logit_cap: float | None = None
    dropout: float = 0.0
    keep_weights: bool = False

    def rope_logits(self, block: Block, span: slice) -> Tensor | None:
        """Return the scaled rotary part of the logits, [B, H, S, t], in float32, or None without rotary dims."""
        if not self.rope_queries.shape[-1]:
            return None
        queries = scaled_queries(self.rope_queries, self.scaling)
        if self.rebuild is None:
            key = block.second.dense().unflatten(-1, (self.rope_heads, -1)).transpose(1, 2)  # [B, K, t, R]
            return grouped_logits(queries, key)
        return grouped_logits(rotate(queries, self.rebuild.frames.query(span)), self.rebuild.key(block, span))

    def partial(self, block: Block, span: slice, mask: Tensor | None) -> Sums:
        """Attend to one block with plain torch operations."""
        batch, heads, length, _ = self.latent_queries.shape
        latent, rotary = (scaled_queries(queries, self.scaling) for queries in (self.latent_queries, self.rope_queries))
        if self.rebuild is None and self.rope_heads == 1 and rotary.shape[-1] and block.adjacent is not None:
            # Latent and rotary key are one key of one head.
            joined = torch.cat([block.first.lift(latent), block.second.lift(rotary)], dim=-1)
            keys = Latents(block.adjacent[..., : joined.shape[-1]])
            logits = keys.logits(joined.reshape(batch, heads * length, -1)).unflatten(1, (heads, length))
        else:
            folded = latent.reshape(batch, heads * length, -1)
            logits = block.first.logits(folded).unflatten(1, (heads, length))  # [B, H, S, t]
            if (rope := self.rope_logits(block, span)) is not None:
                logits = logits + rope
        if self.logit_bias is not None:
            logits = logits + self.logit_bias * self.scaling
        if key_heads := block.key_factors.shape[-1]:
            factors = block.key_factors.to(logits.dtype)
            factors = factors.transpose(1, 2).repeat_interleave(heads // key_heads, dim=1)  # [B, H, t]
            logits = logits * factors.unsqueeze(2)

        def combine(weights: Tensor) -> Tensor:
            return block.first.context(weights.flatten(1, 2)).unflatten(1, (heads, length))

        return softmax_sums(capped(logits, self.logit_cap), combine, mask, self.dropout)


def latent_decode(step: LatentDecode) -> Attended:
    """Run a step with plain torch operations; every other kernel must agree with this reference."""
    return attend(step.view, step.partial, step.mask, step.keep_weights)
