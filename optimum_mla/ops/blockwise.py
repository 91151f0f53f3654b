"""Attention that walks over the cache block by block, with an online softmax (Milakov, Gimelshein, arXiv 1805.02867).

At any time one block is in memory in full precision, so a step over a quantized cache needs no dense copy of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from optimum_mla.ops.absorb import grouped_logits
from optimum_mla.ops.blocks import Block, CacheView
from optimum_mla.ops.rotary import Rotation, rotate


class Attended(NamedTuple):
    """What attention over all blocks gave.

    Attributes:
        context: Weighted sum, [B, H, S, w], in the queries' dtype.
        mass: Sum of the weights, [B, H, S, 1]: 1 but for dropout.
        weights: [B, H, S, T], or None where they were not asked for.
    """

    context: Tensor
    mass: Tensor
    weights: Tensor | None


def attend(
    view: CacheView,
    score: Callable[[Block, slice], tuple[Tensor, Callable[[Tensor], Tensor]]],
    mask: Tensor | None,
    dropout: float = 0.0,
    keep_weights: bool = False,
) -> Attended:
    """Softmax attention over the blocks of `view`; the softmax is in float32, or float64 for such queries.

    Args:
        view: The cached tokens.
        score: For a block whose tokens are the given slice of the cache, its scaled logits [B, H, S, t], and what
            makes a weighted sum [B, H, S, w] over it out of weights [B, H, S, t].
        mask: None, boolean (True: attend) or additive, broadcastable to [B, H, S, T].
        dropout: Probability, applied to the weights.
        keep_weights: Whether to return the weights too; they take H·S·T numbers.
    """
    sums: _Sums | None = None
    kept: list[Tensor] = []
    start = 0
    for block in view:
        span = slice(start, start + block.tokens)
        start = span.stop
        logits, combine = score(block, span)
        dtype = logits.dtype
        logits = masked(logits.to(torch.promote_types(dtype, torch.float32)), mask, span)
        if keep_weights:
            kept.append(logits)
        # Masked logits are the lowest number or -inf; the latter must not be subtracted from itself.
        peak = logits.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
        if sums is not None:
            peak = torch.maximum(sums.peak, peak)
        weights = (logits - peak).exp()
        total = mass = weights.sum(dim=-1, keepdim=True)
        if dropout:
            weights = nn.functional.dropout(weights, p=dropout)
            mass = weights.sum(dim=-1, keepdim=True)
        new = _Sums(peak, total, mass, combine(weights.to(dtype)).to(weights.dtype))
        sums = new if sums is None else sums.merged(new)
    if sums is None:
        raise ValueError("attention over a cache without tokens")
    attention = (torch.cat(kept, dim=-1) - sums.peak).exp().div(sums.total).to(dtype) if keep_weights else None
    return Attended((sums.context / sums.total).to(dtype), (sums.mass / sums.total).to(dtype), attention)


class _Sums(NamedTuple):
    """Softmax sums over some blocks, relative to exp(peak)."""

    peak: Tensor
    total: Tensor
    mass: Tensor
    context: Tensor

    def merged(self, new: _Sums) -> _Sums:
        """With the sums over a further block, whose peak is already that of both."""
        fade = (self.peak - new.peak).exp()
        return _Sums(
            new.peak,
            torch.addcmul(new.total, self.total, fade),
            torch.addcmul(new.mass, self.mass, fade),
            torch.addcmul(new.context, self.context, fade),
        )


def masked(logits: Tensor, mask: Tensor | None, span: slice) -> Tensor:
    """Logits [B, H, S, t] of the tokens `span` under the mask of all tokens."""
    if mask is None:
        return logits
    here = mask[..., span]
    if here.dtype == torch.bool:
        return logits.masked_fill(~here, torch.finfo(logits.dtype).min)
    return logits + here


def masked_softmax(logits: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Attention weights of scaled logits [B, H, S, T] in one piece; mask and dropout as for `attend`."""
    dtype = logits.dtype
    logits = masked(logits.to(torch.promote_types(dtype, torch.float32)), mask, slice(0, logits.shape[-1]))
    weights = logits.softmax(dim=-1).to(dtype)
    return nn.functional.dropout(weights, p=dropout) if dropout else weights


@dataclass(frozen=True)
class RotaryRebuild:
    """How a rotary key that is not cached comes out of the latent.

    Attributes:
        weight: [K·R, r]. bias: [K·R] or None.
        rotation: Frequencies at the positions of all cached tokens, cos and sin [1 or B, K, T, R/2].
    """

    weight: Tensor
    bias: Tensor | None
    rotation: Rotation

    def key(self, block: Block, span: slice) -> Tensor:
        """Rotated rotary key [B, K, t, R] of a block."""
        flat = block.first.project(self.weight, self.bias)  # [B, t, K·R]
        heads = flat.unflatten(-1, (self.rotation.cos.shape[1], -1)).transpose(1, 2)
        return rotate(heads, self.rotation.at(span))


@dataclass(frozen=True)
class LatentDecode:
    """Everything that one step of decoupled attention in latent space needs; a fused kernel gets the same.

    Attributes:
        latent_queries: Queries with the key up-projection folded in, [B, H, S, r].
        rope_queries: Rotated, [B, H, S, R]; R may be 0.
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


Kernel = Callable[[LatentDecode], Attended]
"""A decode kernel: the context it gives is in latent space, [B, H, S, r]."""

_KERNELS: dict[str, Kernel] = {}


def register_kernel(device_type: str, kernel: Kernel) -> None:
    """Decode with `kernel` on a device type ("cuda", ...) instead of `latent_decode`."""
    _KERNELS[device_type] = kernel


def kernel_for(device_type: str) -> Kernel:
    """The registered kernel of a device type, or `latent_decode`."""
    return _KERNELS.get(device_type, latent_decode)


def latent_decode(step: LatentDecode) -> Attended:
    """The reference kernel, in plain torch: what every other must agree with."""
    batch, heads, length, _ = step.latent_queries.shape
    # The scaling goes on the queries: once a step instead of once a cached token.
    folded = (step.latent_queries * step.scaling).reshape(batch, heads * length, -1)
    rope = step.rope_queries * step.scaling
    bias = None if step.logit_bias is None else step.logit_bias * step.scaling

    def score(block: Block, span: slice) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        logits = block.first.logits(folded).unflatten(1, (heads, length))  # [B, H, S, t]
        if rope.shape[-1]:
            logits = logits + grouped_logits(rope, rotary_key(block, span))
        if bias is not None:
            logits = logits + bias
        scales = block.scales.shape[-1]
        if scales:
            factors = block.scales.transpose(1, 2).repeat_interleave(heads // scales, dim=1)  # [B, H, t]
            logits = logits * factors.unsqueeze(2)
        return logits, lambda weights: block.first.context(weights.flatten(1, 2)).unflatten(1, (heads, length))

    def rotary_key(block: Block, span: slice) -> Tensor:
        if step.rebuild is not None:
            return step.rebuild.key(block, span)
        return block.second.dense().unflatten(-1, (step.rope_heads, -1)).transpose(1, 2)  # [B, K, t, R]

    return attend(step.view, score, step.mask, step.dropout, step.keep_weights)
