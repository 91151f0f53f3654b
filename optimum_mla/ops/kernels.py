"""Kernels that decode in latent space: the reference, one for CPUs, and those that users register.

A kernel is a function that takes a `LatentDecode` and returns an `Attended`, whose context is in latent space,
[B, H, S, r]. It depends neither on the cache nor on the module.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import reduce

import torch
from torch import Tensor

from optimum_mla.ops.absorb import attention_dtype
from optimum_mla.ops.blocks import Latents
from optimum_mla.ops.blockwise import Attended, LatentDecode, Sums, latent_decode, masked_blocks

Kernel = Callable[[LatentDecode], Attended]


ONE = torch.ones(())
"""The sum of softmax weights; sums that are this object need no division."""
PIECE_NUMBERS = 2**17
"""A thread is worth its start if it reads at least so many numbers of the cache."""


def cpu_decode(step: LatentDecode) -> Attended:
    """Run a step with PyTorch's flash attention for CPUs, which gets each block in one piece per thread.

    All query heads share the latents, so they become the rows of one head, and the pieces of the block become its
    heads, because PyTorch's kernel runs heads in parallel, but not the tokens of one head. If a shared rotary key lies
    beside the latent, both are one key; otherwise the rotary logits are passed as an additive mask. Weights, dropout,
    soft-caps, key norms, biases and gradients are left to the reference.
    """
    if (
        step.keep_weights
        or step.dropout
        or step.logit_cap is not None
        or step.logit_bias is not None
        or step.view.num_key_factors
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
    ):
        return latent_decode(step)
    shared_rope = step.rebuild is None and step.rope_heads == 1
    queries: dict[Hashable, Tensor] = {}
    sums: dict[Hashable, list[tuple[Tensor, Tensor]]] = {}
    latents: dict[Hashable, Latents] = {}
    others: list[Sums] = []
    for block, span, mask in masked_blocks(step.view, step.mask):
        if block.first.by_channel:  # PyTorch's kernel takes tokens side by side only.
            others.append(Sums(*(part.flatten(1, 2) for part in step.partial(block, span, mask)[:4])))
            continue
        joining = shared_rope and block.adjacent is not None
        layout: Hashable = (joining, block.first.layout, block.second.layout)
        if layout not in queries:
            lifted = block.first.lift(step.latent_queries)
            if joining:
                lifted = torch.cat([lifted, block.second.lift(step.rope_queries)], dim=-1)
            queries[layout], sums[layout], latents[layout] = lifted, [], block.first
        keys = block.adjacent if joining and block.adjacent is not None else block.first.vectors
        added = None if joining else step.rope_logits(block, span)
        sums[layout] += _flash(queries[layout], keys, step.scaling, _additive(added, mask, step.latent_queries))
    found = [_lowered(_merged(pieces), latents[layout]) for layout, pieces in sums.items()]
    merged = reduce(Sums.merged, [*found, *others])
    context = merged.context if merged.total is ONE else merged.context / merged.total
    return Attended(context.unflatten(1, step.latent_queries.shape[1:3]), ONE, None)


def _additive(added: Tensor | None, mask: Tensor | None, queries: Tensor) -> Tensor | None:
    """Return added logits [B, H, S, t] (or None) and a mask as one additive mask [B, H·S, t], in float32 or wider."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    if mask is not None:
        lowest = torch.finfo(queries.dtype).min
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)
        added = mask.expand(*queries.shape[:3], -1) if added is None else added + mask
        added = added.clamp(min=lowest)  # a row of -inf has no softmax
    return None if added is None else added.flatten(1, 2).to(dtype)


def _flash(queries: Tensor, keys: Tensor, scaling: float, added: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Attend with queries [B, H, S, w] to pieces of keys [B, t, w], which are also the values.

    Returns:
        Pairs of contexts [B, pieces, H·S, w] and logarithms of the sums of weights [B, pieces, H·S].
    """
    tokens = keys.shape[1]
    dtype = attention_dtype(queries.dtype, queries.device, tokens)
    queries, keys = queries.to(dtype), keys.to(dtype)
    rows = queries.flatten(1, 2).unsqueeze(1)  # [B, 1, H·S, w]
    pieces = 1 << (torch.get_num_threads() - 1).bit_length()
    while pieces > max(1, keys[0].numel() // PIECE_NUMBERS):
        pieces //= 2
    found = []
    length, rest = divmod(tokens, pieces)
    for start, count, size in ((0, pieces, length), (tokens - rest, 1, rest)):
        if not size:
            continue
        span = slice(start, start + count * size)
        heads = keys[:, span].unflatten(1, (count, size))  # [B, pieces, t', w]
        bias = None if added is None else added[..., span].unflatten(-1, (count, size)).transpose(1, 2)
        found.append(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                rows.expand(-1, count, -1, -1), heads, heads, attn_mask=bias, scale=scaling
            )
        )
    return found


def _lowered(sums: Sums, latents: Latents) -> Sums:
    """Turn sums of stored vectors, perhaps with a rotary key after them, into sums of latents."""
    return sums._replace(context=latents.lower(sums.context[..., : latents.vectors.shape[-1]]))


def _merged(pieces: list[tuple[Tensor, Tensor]]) -> Sums:
    """Merge the softmaxes of several pieces into one, [B, H·S, ·]."""
    if len(pieces) == 1 and pieces[0][1].shape[1] == 1:
        contexts, totals = pieces[0]
        return Sums(totals[:, 0, :, None], ONE, ONE, contexts[:, 0].to(totals.dtype))
    contexts, totals = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
    totals = totals.unsqueeze(-1)  # [B, pieces, H·S, 1], float32 for 16-bit queries
    peak = totals.amax(dim=1)
    shares = (totals - peak.unsqueeze(1)).exp()
    total = shares.sum(dim=1)
    return Sums(peak, total, total, (contexts * shares).sum(dim=1))


_KERNELS: dict[str, Kernel] = {"cpu": cpu_decode}


def register_kernel(device_type: str, kernel: Kernel) -> None:
    """Make a kernel decode on all devices of a type, such as "cuda", instead of the one so far."""
    _KERNELS[device_type] = kernel


def kernel_for(device_type: str) -> Kernel:
    """Return the kernel of a device type, or the reference if it has none."""
    return _KERNELS.get(device_type, latent_decode)
