"""Positions of cached tokens, for keys that are rotated after they are read from the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cached_positions(
    position_ids: Tensor | None,
    attention_mask: Any,
    seen: int | Tensor,
    length: int,
    tokens: int,
    device: torch.device,
) -> Tensor:
    """Positions [1 or B, T] of the cached tokens, counted back from the last new token that is not padding.

    Positions rise by one from slot to slot, or from one attended slot to the next where `generate`'s rule (the running
    sum of the mask) made them: in rows with masked tokens between others, such as right-padded prompts that are then
    decoded. Which of both it was shows in how far the last position lags behind its slot. Masked slots get some
    position, which nobody attends to. The new tokens lie at the cache's end or, in a static cache that is not yet full,
    right behind those already seen.

    Args:
        position_ids: [1 or B, S] of the new tokens; None counts slots.
        attention_mask: As the layer got it.
        seen: Tokens that went through the cache before.
        length: S. tokens: T.
        device: Where the result is needed.
    """
    room = tokens - length
    first_new = seen.clamp(max=room) if isinstance(seen, Tensor) else min(seen, room)
    slots = torch.arange(tokens, device=device)[None]
    if position_ids is None:
        return slots + (seen - first_new)
    attended = _attended_slots(attention_mask, tokens)
    if attended is None:
        return slots - (first_new + length - 1) + position_ids[:, -1:]
    batch = max(attended.shape[0], position_ids.shape[0])
    attended, position_ids = attended.expand(batch, -1), position_ids.expand(batch, -1)
    steps = torch.arange(length, device=device)
    last = (attended[:, first_new + steps] * steps).argmax(dim=-1, keepdim=True)  # [B, 1], among the new tokens
    slot, position = first_new + last, position_ids.gather(1, last)
    running = attended.cumsum(dim=-1)
    at_slot = running.gather(1, slot)
    masked_before = slot + 1 - at_slot
    follows_mask = slot + (seen - first_new) - position == masked_before
    return position + torch.where(follows_mask, running - at_slot, slots - slot)


def _attended_slots(attention_mask: Any, tokens: int) -> Tensor | None:
    """Which cached slots the last new token sees, [1 or B, T] boolean; None where the mask does not say."""
    if not isinstance(attention_mask, Tensor):
        return None
    row = attention_mask[:, 0, -1] if attention_mask.ndim == 4 else attention_mask
    if row.shape[-1] < tokens:
        return None
    row = row[:, :tokens]
    return row > torch.finfo(row.dtype).min / 2 if row.is_floating_point() else row.bool()
