"""Losses over a few tokens at a time against the same losses of whole logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from optimum_mla.recovery import losses
from optimum_mla.recovery.losses import IGNORED, distillation_loss, hidden_state_loss

VOCABULARY, WIDTH, TEACHER_WIDTH = 23, 6, 9


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads() -> tuple[nn.Linear, nn.Linear]:
    student, teacher = nn.Linear(WIDTH, VOCABULARY, bias=False), nn.Linear(TEACHER_WIDTH, VOCABULARY, bias=False)
    with torch.no_grad():
        student.weight.copy_(randn(VOCABULARY, WIDTH, seed=1))
        teacher.weight.copy_(randn(VOCABULARY, TEACHER_WIDTH, seed=2))
    return student, teacher


def whole(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL and cross-entropy of whole logits [B, S, V] in float64."""
    kept = labels[:, 1:] != IGNORED
    given, wanted = student[:, :-1][kept].double(), teacher[:, :-1][kept].double()
    p = (wanted / temperature).softmax(-1)
    kl = (p * ((wanted / temperature).log_softmax(-1) - (given / temperature).log_softmax(-1))).sum(-1).mean()
    return kl * temperature**2, nn.functional.cross_entropy(given, labels[:, 1:][kept])


@given(
    batch=st.integers(1, 3),
    length=st.integers(2, 9),
    chunk=st.integers(1, 12),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    weights=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.7, 0.4)]),
    ignored=st.booleans(),
)
def test_chunks_give_the_loss_and_the_gradients_of_whole_logits(
    batch: int, length: int, chunk: int, temperature: float, weights: tuple[float, float], ignored: bool
) -> None:
    student_head, teacher_head = heads()
    hidden, taught = randn(batch, length, WIDTH, seed=3), randn(batch, length, TEACHER_WIDTH, seed=4)
    labels = torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(5))
    if ignored and length > 2:
        labels[0, 1:-1] = IGNORED
    one, other = hidden.clone().requires_grad_(True), hidden.clone().requires_grad_(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK_NUMBERS", chunk * VOCABULARY)
        found = distillation_loss(one, student_head, taught, teacher_head, labels, *weights, temperature)
        found.loss.backward()
    gradient = student_head.weight.grad
    student_head.weight.grad = None
    kl, ce = whole(student_head(other), teacher_head(taught).detach(), labels, temperature)
    expected = weights[0] * kl + weights[1] * ce
    expected.backward()
    assert abs(found.loss.item() - expected.item()) <= 1e-5 * max(1.0, abs(expected.item()))
    assert abs(found.kl.item() - kl.item()) <= 1e-5 * max(1.0, kl.item())
    assert abs(found.ce.item() - ce.item()) <= 1e-5 * max(1.0, ce.item())
    assert one.grad is not None
    assert other.grad is not None
    assert (one.grad - other.grad).abs().max() <= 1e-5
    assert (gradient - student_head.weight.grad).abs().max() <= 1e-5 * max(1.0, gradient.abs().max().item())
    assert teacher_head.weight.grad is None


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    head, _ = heads()
    hidden = randn(2, 7, WIDTH, seed=3).requires_grad_(True)
    labels = torch.ones(2, 7, dtype=torch.long)
    found = distillation_loss(hidden, head, hidden.detach(), head, labels)
    found.loss.backward()
    assert found.kl.item() == pytest.approx(0.0, abs=1e-6)
    assert hidden.grad is not None
    assert hidden.grad.abs().max() <= 1e-6


def test_a_batch_without_any_target_stays_in_the_graph() -> None:
    student_head, teacher_head = heads()
    hidden = randn(2, 5, WIDTH, seed=3).requires_grad_(True)
    labels = torch.full((2, 5), IGNORED)
    found = distillation_loss(hidden, student_head, randn(2, 5, TEACHER_WIDTH, seed=4), teacher_head, labels)
    found.loss.backward()
    assert found.loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_the_largest_logits_in_memory_are_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", 4 * VOCABULARY)
    student_head, teacher_head = heads()
    rows: list[int] = []
    for head in (student_head, teacher_head):
        head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    hidden = randn(3, 11, WIDTH, seed=3).requires_grad_(True)
    labels = torch.ones(3, 11, dtype=torch.long)
    taught = randn(3, 11, TEACHER_WIDTH, seed=4)
    distillation_loss(hidden, student_head, taught, teacher_head, labels, 1.0, 0.5).loss.backward()
    assert max(rows) == 4
    assert sum(rows) > 2 * 30  # both heads, forwards and again backwards


def test_hidden_states_count_relative_to_each_token() -> None:
    teacher = [torch.tensor([[[3.0, 4.0], [300.0, 400.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])]
    student = [teacher[0] + torch.tensor([[[1.0, 0.0], [100.0, 0.0]]]), teacher[1].clone()]
    # 1/25 and 10000/250000 in the first layer, nothing in the second.
    assert hidden_state_loss(student, teacher).item() == pytest.approx(0.04 / 2)
