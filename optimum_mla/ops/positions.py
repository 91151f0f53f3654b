"""Positions of cached tokens, for keys that are rotated after they are read from the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimum_mla.core.errors import InvalidValueError


def cached_positions(
    position_ids: Tensor | None,
    attention_mask: Any,
    seen: int | Tensor,
    length: int,
    tokens: int,
    device: torch.device,
    windowed: bool = False,
) -> Tensor:
    """Return the positions [1 or B, T] of the cached tokens, counted back from the last new token that is not padding.

    Positions rise by one from slot to slot, or from one attended slot to the next where `generate`'s rule (the running
    sum of the mask) made them: in rows with masked tokens between others, such as right-padded prompts that are then
    decoded. How far the last position lags behind its slot tells which of the two rules made it. Masked slots get an
    arbitrary position, because nothing attends to them. The new tokens are at the end of the cache, or right
    after the tokens already seen in a static cache that is not yet full.

    A layer with a sliding window does not see the padding before its window: there, every lag tells of padding.

    Args:
        position_ids: Positions of the new tokens, [1 or B, S]; None takes the numbers of their slots.
        attention_mask: The mask that the layer got.
        seen: Number of tokens that went through the cache before.
        length: Number of new tokens, S.
        tokens: Number of slots in the cache, T.
        device: Device of the result.
        windowed: Whether the layer has a sliding window, so that its mask does not tell all padding.
    """
    room = tokens - length
    first_new = seen.clamp(max=room) if isinstance(seen, Tensor) else min(seen, room)
    slots = torch.arange(tokens, device=device)[None]
    if position_ids is None:
        return slots + (seen - first_new)
    attended = _attended_slots(attention_mask, tokens)
    if attended is None:
        return slots - (first_new + length - 1) + position_ids[:, -1:]
    if windowed:  # what lies before the window is counted like attended slots
        attended = attended | (attended.cumsum(dim=-1) == 0)
    batch = max(attended.shape[0], position_ids.shape[0])
    attended, position_ids = attended.expand(batch, -1), position_ids.expand(batch, -1)
    steps = torch.arange(length, device=device)
    last = (attended[:, first_new + steps] * steps).argmax(dim=-1, keepdim=True)  # [B, 1], among the new tokens
    slot, position = first_new + last, position_ids.gather(1, last)
    running = attended.cumsum(dim=-1)
    at_slot = running.gather(1, slot)
    lag = slot + (seen - first_new) - position
    follows_mask = lag > 0 if windowed else lag == slot + 1 - at_slot
    return position + torch.where(follows_mask, running - at_slot, slots - slot)


def check_positions(
    positions: Tensor,
    position_ids: Tensor | None,
    attention_mask: Any,
    seen: int | Tensor,
    length: int,
    windowed: bool = False,
) -> None:
    """Refuse positions that a cache cannot hold, where they do not fit what `cached_positions` takes them for.

    Transformers' own caches hold no positions. Those of the older tokens follow from the new ones only if they rise by
    one from slot to slot, or from one attended slot to the next.

    Args:
        positions: What `cached_positions` gave, [1 or B, T].
        position_ids: The new tokens' positions, [1 or B, S], or None.
        attention_mask: The mask of the layer.
        seen: Tokens that went through the cache before.
        length: S.
        windowed: Whether the layer has a sliding window. How much padding lies before it is not known there, so
            `check_given_positions` has to look at the mask of the whole text as well.

    Raises:
        InvalidValueError: The given positions are others.
    """
    if position_ids is None or torch.compiler.is_compiling():
        return
    tokens = positions.shape[1]
    first = int(min(int(seen), tokens - length))
    attended = _attended_slots(attention_mask, tokens)
    if attended is None:
        attended = torch.ones_like(positions, dtype=torch.bool)
    new = slice(first, first + length)
    guessed, given = torch.broadcast_tensors(positions[:, new], position_ids.to(positions))
    slot = torch.arange(first, first + length, device=positions.device) + int(seen) - first
    if windowed:  # slots before the first attended one may be out of range rather than padding
        holes = (~attended & (attended.cumsum(-1) > 0)).cumsum(-1)[:, new]
        by_rule = (given == slot) | (given <= slot - holes)
    else:
        by_rule = (given == slot) | (given == slot - (~attended).cumsum(-1)[:, new])
    _refuse(given, (guessed == given) & by_rule | ~attended[:, new])


def check_given_positions(position_ids: Tensor | None, attention_mask: Any, seen: int | Tensor) -> None:
    """Refuse positions that are neither the numbers of the tokens' slots nor those that `generate` makes of a mask.

    Args:
        position_ids: The new tokens' positions, [1 or B, S], or None.
        attention_mask: The mask of the whole text [B, T], or None where nothing is masked. Masks of other shapes are
            left to `check_positions`.
        seen: Tokens that went through the cache before.

    Raises:
        InvalidValueError: The given positions are others.
    """
    if position_ids is None or torch.compiler.is_compiling():
        return
    first, length = int(seen), position_ids.shape[-1]
    slot = torch.arange(first, first + length, device=position_ids.device)
    if attention_mask is None:
        _refuse(position_ids, position_ids == slot)
    elif isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and attention_mask.shape[1] >= first + length:
        attended = attention_mask.to(position_ids.device).bool()
        new = slice(first, first + length)
        given, running = torch.broadcast_tensors(position_ids, attended.cumsum(-1)[:, new] - 1)
        _refuse(given, (given == slot) | (given == running) | ~attended[:, new])


def _refuse(given: Tensor, fits: Tensor) -> None:
    if not bool(fits.all()):
        given, fits = torch.broadcast_tensors(given, fits)
        raise InvalidValueError(
            "position_ids",
            given[~fits][:4].tolist(),
            "positions that follow from the slots of the cache and the mask",
            "This cache holds no positions: use one from the model's make_cache().",
        )


def _attended_slots(attention_mask: Any, tokens: int) -> Tensor | None:
    """Return which cached slots any new token attends to, boolean [1 or B, T]; None if the mask does not say."""
    if not isinstance(attention_mask, Tensor):
        return None
    rows = attention_mask[:, 0] if attention_mask.ndim == 4 else attention_mask[:, None]
    if rows.shape[-1] < tokens:
        return None
    rows = rows[..., :tokens]
    rows = rows > torch.finfo(rows.dtype).min / 2 if rows.is_floating_point() else rows.bool()
    return rows.any(dim=1)


def first_tokens(position_ids: Tensor, count: int) -> Tensor:
    """Return which tokens are among the first `count` of their sequences, [1 or B, S] boolean.

    Padding before a sequence is not among them, although its positions are as small: they do not rise.

    Args:
        position_ids: Positions of the tokens, [1 or B, S].
        count: Number of first tokens.
    """
    following = torch.cat([position_ids[:, 1:], position_ids[:, -1:] + 1], dim=1)
    return (position_ids < count) & (following > position_ids)
