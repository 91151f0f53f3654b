"""Perplexity from the hidden states after the last layer, at both ends of a walk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from optimum_mla.calibrate.walk import CalibrationWalk

VOCABULARY_ROWS = 16384
"""Number of tokens of the vocabulary whose logits are computed at once, which bounds the memory of the head."""
LARGEST_MEAN_LOSS = 700.0
"""Largest mean loss whose exponential is taken; that of more would overflow a float."""


def stream_perplexities(
    walk: CalibrationWalk, windows: Tensor | None = None, title: str = "perplexity"
) -> tuple[float, float]:
    """Return the perplexities of the source and of the converted model on the tokens of a walk that is at its end.

    Every window starts from an empty context, and all its tokens but the first are predicted.

    Args:
        walk: The walk, after the last layer.
        windows: Indices of the windows that count; None takes all.
        title: What the progress of this is called.
    """
    ids = walk.windows if windows is None else walk.windows[windows]
    norm, head = walk.model.final_norm().to(walk.dtype), walk.model.head()
    logits = partial(walk.model.family.spec.logits, walk.model.config)
    streams = [states if windows is None else states[windows] for states in (walk.source, walk.converted)]

    def losses(batch: tuple[Tensor, ...]) -> tuple[float, ...]:
        *parts, of = batch
        targets = of.to(walk.device)[:, 1:].flatten()
        return tuple(_loss(norm(part[:, :-1]).flatten(0, 1), head, targets, logits) for part in parts)

    batches = list(zip(*map(walk.batches, (*streams, ids)), strict=True))
    means = (total / ids[:, 1:].numel() for total in walk.processes.summed(batches, losses, title))
    before, after = (math.exp(mean) if mean < LARGEST_MEAN_LOSS else math.inf for mean in means)
    return before, after


def _loss(states: Tensor, head: nn.Module, targets: Tensor, logits: Callable[[Tensor], Tensor]) -> float:
    """Return the sum of the negative log-likelihoods of targets [T] after states [T, d].

    The head is cast to the dtype of the states a part at a time, and `logits` makes the logits of what it returns.
    """
    weight, bias = head.get_parameter("weight"), dict(head.named_parameters()).get("bias")
    wanted = (states * weight[targets].to(states.dtype)).sum(-1)
    if bias is not None:
        wanted = wanted + bias[targets].to(states.dtype)
    wanted = logits(wanted)
    total = torch.full_like(wanted, -math.inf)
    for part in head_parts(states, head):
        total = torch.logaddexp(total, logits(part).logsumexp(-1))
    return float((total - wanted).double().sum())


def head_parts(states: Tensor, head: nn.Module) -> Iterator[Tensor]:
    """Yield what the head gives for states [T, d], for at most `VOCABULARY_ROWS` tokens of the vocabulary at a time.

    Its weight is cast to the dtype of the states in the same parts.
    """
    weight, bias = head.get_parameter("weight"), dict(head.named_parameters()).get("bias")
    for start in range(0, len(weight), VOCABULARY_ROWS):
        rows = slice(start, start + VOCABULARY_ROWS)
        added = None if bias is None else bias[rows].to(states.dtype)
        yield nn.functional.linear(states, weight[rows].to(states.dtype), added)
