"""Ridge regression from sums of products: a linear layer refitted in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-3, 1e-2, 1e-1)
"""Ridges to choose from when the output projection is refitted, in units of the contexts' mean square."""


@dataclass(frozen=True)
class Healing:
    """A refit of the output projection.

    Attributes:
        weight: The new `o_proj.weight` [d, H·v], or None where no ridge was better than the old one.
        error_before: Weighted root-mean-square error on the held-back windows. error_after: with the refitted weight.
    """

    weight: Tensor | None
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Regression:
    """Normal equations of targets on contexts: gram [c, c], cross [c, d], the targets' square, the number of rows."""

    gram: Tensor
    cross: Tensor
    square: float
    rows: int

    def __add__(self, other: Regression) -> Regression:
        return Regression(
            self.gram + other.gram, self.cross + other.cross, self.square + other.square, self.rows + other.rows
        )

    def change(self, weight: Tensor, ridge: float) -> Tensor:
        """Change of `weight` [d, c] that fits best, held near zero by `ridge`."""
        residual = self.cross - self.gram @ weight.T
        damping = ridge * self.gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        damped = self.gram + damping * torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        return torch.cholesky_solve(residual, torch.linalg.cholesky(damped)).T

    def error(self, weight: Tensor, change: Tensor | None) -> float:
        """Root mean square of what `weight + change` leaves, per row and channel."""
        weight = weight if change is None else weight + change
        left = self.square - 2 * float((weight.T * self.cross).sum()) + float(((weight @ self.gram) * weight).sum())
        return (max(left, 0.0) / (self.rows * self.cross.shape[1])) ** 0.5


def heal(weight: Tensor, fitted: Regression, held: Regression, everything: Regression) -> Healing:
    """Refit `weight` [d, c] with the ridge that is best on held-back rows, if any is better than no change.

    Args:
        weight: Float64.
        fitted: Rows that the candidates are fitted to.
        held: Rows that decide between them.
        everything: Rows of the final fit.
    """
    before = held.error(weight, None)
    errors = {ridge: held.error(weight, fitted.change(weight, ridge)) for ridge in RIDGES}
    best = min(errors, key=lambda ridge: errors[ridge])
    if not errors[best] < before:
        return Healing(None, before, before)
    return Healing(weight + everything.change(weight, best), before, errors[best])
