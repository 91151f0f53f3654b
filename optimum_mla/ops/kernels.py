"""Which kernel decodes in latent space: the reference, one made for a device, or one that somebody registered.

A kernel is a function from `LatentDecode` to `Attended`, whose context is in latent space, [B, H, S, r]. It knows
neither the cache nor the module.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optimum_mla.ops.blocks import Block, DenseLatents
from optimum_mla.ops.blockwise import Attended, LatentDecode, Sums, attend, latent_decode

Kernel = Callable[[LatentDecode], Attended]


def cpu_decode(step: LatentDecode) -> Attended:
    """PyTorch's flash attention for CPUs over each dense block, the reference over quantized ones.

    All heads share the latents, so they are the rows of one head. The rotary logits go in as the additive mask. Where
    more is asked for than that kernel does (weights, dropout, key norms, gradients), this is the reference.
    """
    if step.keep_weights or step.dropout or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return latent_decode(step)

    def partial(block: Block, span: slice, mask: Tensor | None) -> Sums:
        if not isinstance(block.first, DenseLatents) or block.scales.shape[-1]:
            return step.partial(block, span, mask)
        return _flash(step, block, span, mask)

    return attend(step.view, partial, step.mask)


def _flash(step: LatentDecode, block: Block, span: slice, mask: Tensor | None) -> Sums:
    queries = step.latent_queries
    batch, heads, length, rank = queries.shape
    added = step.rope_logits(block, span)
    if step.logit_bias is not None:
        bias = step.logit_bias * step.scaling
        added = bias.expand(-1, -1, -1, block.tokens) if added is None else added + bias
    if mask is not None:
        lowest = torch.finfo(queries.dtype).min
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=queries.dtype).masked_fill_(~mask, lowest)
        added = mask.expand(batch, heads, -1, -1) if added is None else added + mask
        added = added.clamp(min=lowest)  # a row of -inf has no softmax
    latents = block.first.dense().unsqueeze(1)  # [B, 1, t, r]
    context, log_total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries.reshape(batch, 1, heads * length, rank),
        latents,
        latents,
        attn_mask=None if added is None else added.reshape(batch, 1, heads * length, -1).to(queries.dtype),
        scale=step.scaling,
    )
    wide = torch.promote_types(queries.dtype, torch.float32)
    peak = log_total.reshape(batch, heads, length, 1).to(wide)
    ones = torch.ones_like(peak)
    return Sums(peak, ones, ones, context.reshape(batch, heads, length, rank).to(wide))


_KERNELS: dict[str, Kernel] = {"cpu": cpu_decode}


def register_kernel(device_type: str, kernel: Kernel) -> None:
    """Decode with `kernel` on a device type ("cuda", ...)."""
    _KERNELS[device_type] = kernel


def kernel_for(device_type: str) -> Kernel:
    """The kernel of a device type; the reference where there is none."""
    return _KERNELS.get(device_type, latent_decode)
