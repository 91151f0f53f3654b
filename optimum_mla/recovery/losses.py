"""Distillation losses that never hold the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_NUMBERS = 2**24
"""Logits in float32 that are alive together, per model."""
IGNORED = -100
"""Label of a token that no loss counts."""

Head = Callable[[Tensor], Tensor]


class Distilled(NamedTuple):
    """Means over the predicted tokens, in nats.

    Attributes:
        loss: kl_weight·kl + ce_weight·ce; has a gradient.
        kl: KL(teacher ‖ student), times the temperature squared; detached.
        ce: Cross-entropy of the labels; detached.
    """

    loss: Tensor
    kl: Tensor
    ce: Tensor


def distillation_loss(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    labels: Tensor,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
) -> Distilled:
    """KL to a teacher's next-token distribution, mixed with cross-entropy (X-EcoMLA, arXiv 2503.11132, section 3.3).

    Both heads run over a few tokens at a time, and once more in the backward pass, so neither model's logits are ever
    whole in memory.

    Args:
        student_hidden: What goes into the student's head, [B, S, d].
        student_head: Makes logits [N, V] of [N, d].
        teacher_hidden: [B, S, d'], without gradient.
        teacher_head: Makes logits [N, V] of [N, d'].
        labels: [B, S], not yet shifted; -100 where the token is not to be predicted.
        kl_weight: Factor on the KL divergence.
        ce_weight: Factor on the cross-entropy.
        temperature: Both distributions are softened by it for the KL divergence (Hinton et al., arXiv 1503.02531).
    """
    targets = labels[:, 1:].flatten()
    counted = targets != IGNORED
    student = student_hidden[:, :-1].flatten(0, 1)[counted]
    teacher = teacher_hidden[:, :-1].flatten(0, 1)[counted]
    targets = targets[counted]

    def sums(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        logits = student_head(student).float()
        with torch.no_grad():
            wanted = (teacher_head(teacher).float() / temperature).log_softmax(-1)
        given = (logits / temperature).log_softmax(-1)
        kl = torch.nn.functional.kl_div(given, wanted, reduction="sum", log_target=True) * temperature**2
        plain = given if temperature == 1.0 else logits.log_softmax(-1)
        return torch.stack([kl, torch.nn.functional.nll_loss(plain, targets, reduction="sum")])

    with torch.no_grad():
        vocabulary = student_head(student[:1]).shape[-1]
    pieces = zip(*(x.split(max(1, CHUNK_NUMBERS // vocabulary)) for x in (student, teacher, targets)), strict=True)
    totals = [checkpoint(sums, *piece, use_reentrant=False) for piece in pieces]
    # The zero keeps a batch without any counted token in the graph, which distributed training wants.
    kl, ce = (torch.stack(totals).sum(0) if totals else student_hidden.sum() * torch.zeros(2)) / max(1, len(targets))
    return Distilled(kl_weight * kl + ce_weight * ce, kl.detach(), ce.detach())


def hidden_state_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over the layers of the squared distance of their outputs, relative to the teacher's spread.

    A few tokens (the first, above all) have states a hundred times larger than the others, so every token counts
    relative to its own state.

    Args:
        student: Hidden states [B, S, d] of the layers. teacher: Likewise.
    """
    losses = []
    for given, wanted in zip(student, teacher, strict=True):
        wanted = wanted.float()
        distance = (given.float() - wanted).square().sum(-1)
        losses.append((distance / wanted.square().sum(-1).clamp(min=1e-12)).mean())
    return torch.stack(losses).mean()
