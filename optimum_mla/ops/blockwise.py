"""Attention that walks over the cache block by block, with an online softmax (Milakov, Gimelshein, arXiv 1805.02867).

At any time one block is in memory in full precision, so a step over a quantized cache needs no dense copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from optimum_mla.ops.absorb import grouped_logits
from optimum_mla.ops.blocks import Block, CacheView
from optimum_mla.ops.rotary import RotaryFrames, rotate


class Attended(NamedTuple):
    """What attention over all blocks gave.

    Attributes:
        context: Weighted sum, [B, H, S, w], in the queries' dtype.
        mass: Sum of the weights, broadcasting to [B, H, S, 1]: 1 but for dropout.
        weights: [B, H, S, T], or None where they were not asked for.
    """

    context: Tensor
    mass: Tensor
    weights: Tensor | None


class Sums(NamedTuple):
    """Softmax sums over some blocks, relative to exp(peak).

    Attributes:
        peak: [B, H, S, 1]. total: Sum of the weights, likewise. mass: Likewise, after dropout.
        context: Weighted sum, [B, H, S, w].
        logits: [B, H, S, t], masked, or None where they are not at hand.
    """

    peak: Tensor
    total: Tensor
    mass: Tensor
    context: Tensor
    logits: Tensor | None = None

    def merged(self, new: Sums) -> Sums:
        """With the sums over a further block."""
        peak = torch.maximum(self.peak, new.peak)
        old_share, new_share = (self.peak - peak).exp(), (new.peak - peak).exp()
        return Sums(
            peak,
            self.total * old_share + new.total * new_share,
            self.mass * old_share + new.mass * new_share,
            torch.addcmul(new.context * new_share, self.context, old_share),
        )


Partial = Callable[[Block, slice, Tensor | None], Sums]
"""Attention over one block, whose tokens are the given slice of the cache, under its part of the mask."""


def attend(view: CacheView, partial: Partial, mask: Tensor | None, keep_weights: bool = False) -> Attended:
    """Softmax attention over the blocks of `view`, merged in float32, or float64 for such queries.

    Args:
        view: The cached tokens.
        partial: Attention over one block.
        mask: None, boolean (True: attend) or additive, broadcastable to [B, H, S, T].
        keep_weights: Whether to return the weights too; they take H·S·T numbers, and `partial` must give its logits.
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
    """The blocks of `view`, which of its tokens each holds, and the mask's part for them."""
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
    """The sums over one block.

    Args:
        logits: Scaled, [B, H, S, t].
        combine: Makes a weighted sum [B, H, S, w] out of weights [B, H, S, t] of the logits' dtype.
        mask: This block's part.
        dropout: Probability, applied to the weights.
    """
    dtype = logits.dtype
    logits = masked(logits.to(torch.promote_types(dtype, torch.float32)), mask)
    # Masked logits are the lowest number or -inf; the latter must not be subtracted from itself.
    peak = logits.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    weights = (logits - peak).exp()
    total = mass = weights.sum(dim=-1, keepdim=True)
    if dropout:
        weights = nn.functional.dropout(weights, p=dropout)
        mass = weights.sum(dim=-1, keepdim=True)
    return Sums(peak, total, mass, combine(weights.to(dtype)).to(weights.dtype), logits)


def masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits [B, H, S, t] under a mask: None, boolean or additive."""
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits + mask


def masked_softmax(logits: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Attention weights of scaled logits [B, H, S, T] in one piece; mask and dropout as for `attend`."""
    dtype = logits.dtype
    logits = masked(logits.to(torch.promote_types(dtype, torch.float32)), mask)
    weights = logits.softmax(dim=-1).to(dtype)
    return nn.functional.dropout(weights, p=dropout) if dropout else weights


@dataclass(frozen=True)
class RotaryRebuild:
    """How a rotary key that is not cached comes out of the latent.

    Attributes:
        weight: [K·R, r]. bias: [K·R] or None.
        frames: Rotations of queries and keys, block by block.
    """

    weight: Tensor
    bias: Tensor | None
    frames: RotaryFrames

    def key(self, block: Block, span: slice) -> Tensor:
        """Rotated rotary key [B, K, t, R] of a block."""
        rotation = self.frames.key(span)
        flat = block.first.project(self.weight, self.bias)  # [B, t, K·R]
        return rotate(flat.unflatten(-1, (rotation.cos.shape[1], -1)).transpose(1, 2), rotation)


@dataclass(frozen=True)
class LatentDecode:
    """Everything that one step of decoupled attention in latent space needs; a fused kernel gets the same.

    Attributes:
        latent_queries: Queries with the key up-projection folded in, [B, H, S, r].
        rope_queries: [B, H, S, R], rotated where the rotary key is cached, else not yet; R may be 0.
        logit_bias: What the up-projection's bias adds to every logit of a query, [B, H, S, 1], or None.
        scaling: Factor on the logits.
        rope_heads: K.
        view: Cached tokens: quantized blocks, then those in full precision.
        rebuild: How to get the rotary key from the latent, or None where it is cached.
        mask: None, boolean or additive, broadcastable to [B, H, S, T].
        dropout: Probability, applied to the weights.
        keep_weights: Whether the weights are asked for.
    """

    latent_queries: Tensor
    rope_queries: Tensor
    logit_bias: Tensor | None
    scaling: float
    rope_heads: int
    view: CacheView
    rebuild: RotaryRebuild | None
    mask: Tensor | None
    dropout: float = 0.0
    keep_weights: bool = False

    def rope_logits(self, block: Block, span: slice) -> Tensor | None:
        """The rotary part of the logits, scaled, [B, H, S, t], or None without any."""
        if not self.rope_queries.shape[-1]:
            return None
        queries = self.rope_queries * self.scaling
        if self.rebuild is None:
            key = block.second.dense().unflatten(-1, (self.rope_heads, -1)).transpose(1, 2)  # [B, K, t, R]
            return grouped_logits(queries, key)
        return grouped_logits(rotate(queries, self.rebuild.frames.query(span)), self.rebuild.key(block, span))

    def partial(self, block: Block, span: slice, mask: Tensor | None) -> Sums:
        """Attention over one block, in plain torch."""
        batch, heads, length, _ = self.latent_queries.shape
        # The scaling goes on the queries: once a step instead of once a cached token.
        folded = (self.latent_queries * self.scaling).reshape(batch, heads * length, -1)
        logits = block.first.logits(folded).unflatten(1, (heads, length))  # [B, H, S, t]
        if (rope := self.rope_logits(block, span)) is not None:
            logits = logits + rope
        if self.logit_bias is not None:
            logits = logits + self.logit_bias * self.scaling
        if scales := block.scales.shape[-1]:
            factors = block.scales.transpose(1, 2).repeat_interleave(heads // scales, dim=1)  # [B, H, t]
            logits = logits * factors.unsqueeze(2)

        def combine(weights: Tensor) -> Tensor:
            return block.first.context(weights.flatten(1, 2)).unflatten(1, (heads, length))

        return softmax_sums(logits, combine, mask, self.dropout)


def latent_decode(step: LatentDecode) -> Attended:
    """The reference kernel, in plain torch: what every other must agree with."""
    return attend(step.view, step.partial, step.mask, step.keep_weights)
