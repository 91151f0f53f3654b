"""Distillation losses that never hold the logits of a whole batch in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_NUMBERS = 2**24
"""Largest number of float32 logits of a model that are in memory at the same time."""
IGNORED = -100
"""Label of tokens that no loss counts."""

Head = Callable[[Tensor], Tensor]


class Distilled(NamedTuple):
    """Losses in nats, as means over the predicted tokens.

    Attributes:
        loss: kl_weight·kl + ce_weight·ce, with a gradient.
        kl: KL(teacher ‖ student) times the squared temperature, detached.
        ce: Cross-entropy of the labels, detached.
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
    """Return the KL divergence from a teacher's next-token distribution, mixed with cross-entropy.

    The loss is that of X-EcoMLA (arXiv 2503.11132, section 3.3). Both heads run over a few tokens at a time, and once
    more in the backward pass, so the logits of neither model are ever in memory as a whole.

    Args:
        student_hidden: Hidden states that go into the student's head, [B, S, d].
        student_head: Returns logits [N, V] for hidden states [N, d].
        teacher_hidden: Hidden states that go into the teacher's head, [B, S, d'], without gradient.
        teacher_head: Returns logits [N, V] for hidden states [N, d'].
        labels: Token ids, [B, S], not yet shifted; -100 for tokens that are not to be predicted.
        kl_weight: Weight of the KL divergence.
        ce_weight: Weight of the cross-entropy.
        temperature: Softens both distributions in the KL divergence (Hinton et al., arXiv 1503.02531).
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
    # A batch without any counted token is one empty piece, whose zero has a gradient: distributed training needs one.
    kl, ce = torch.stack(totals).sum(0) / max(1, len(targets))
    return Distilled(kl_weight * kl + ce_weight * ce, kl.detach(), ce.detach())


def hidden_state_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the mean over layers and tokens of the squared distance to the teacher's states, relative to their norm.

    The distance at every token is divided by the squared norm of the teacher's state there, because a few tokens, above
    all the first, have states that are a hundred times larger than others.

    Args:
        student: Hidden states of the student's layers, [B, S, d] each.
        teacher: Hidden states of the teacher's layers, [B, S, d] each.
    """
    losses = []
    for given, wanted in zip(student, teacher, strict=True):
        wanted = wanted.float()
        distance = (given.float() - wanted).square().sum(-1)
        losses.append((distance / wanted.square().sum(-1).clamp(min=1e-12)).mean())
    return torch.stack(losses).mean()
