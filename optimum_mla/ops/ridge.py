"""Ridge regression from sums of products, which refits a linear layer in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-3, 1e-2, 1e-1)
"""Ridges that a refit of the output projection chooses from, in units of the mean square of the contexts."""


@dataclass(frozen=True)
class Healing:
    """The result of refitting an output projection.

    Attributes:
        weight: The new `o_proj.weight` [d, H·v], or None if no ridge was better than the old weight.
        error_before: Root-mean-square error on the held-back windows with the old weight.
        error_after: The same error with the new weight, or with the old one if there is no new one.
    """

    weight: Tensor | None
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Regression:
    """Sums over rows, from which targets [rows, d] are regressed on contexts [rows, c].

    Attributes:
        gram: Sum of the products of contexts, [c, c].
        cross: Sum of the products of contexts and targets, [c, d].
        square: Sum of the squared targets.
        rows: Number of rows.
    """

    gram: Tensor
    cross: Tensor
    square: float
    rows: int

    def residual(self, weight: Tensor) -> Tensor:
        """Return the sum of the products of contexts and what `weight` [d, c] leaves of the targets, [c, d]."""
        return self.cross - self.gram @ weight.T

    def change(self, residual: Tensor, ridge: float) -> Tensor:
        """Return the change of a weight, [d, c], that fits its `residual` [c, d] best, kept small by `ridge`."""
        damping = (ridge * self.gram.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
        damped = self.gram + damping * torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        return torch.cholesky_solve(residual, torch.linalg.cholesky(damped)).T

    def error(self, weight: Tensor, change: Tensor | None) -> float:
        """Return the root mean square, per row and channel, of the error that `weight + change` leaves."""
        weight = weight if change is None else weight + change
        left = self.square - 2 * float((weight.T * self.cross).sum()) + float(((weight @ self.gram) * weight).sum())
        return (max(left, 0.0) / (self.rows * self.cross.shape[1])) ** 0.5


def heal(weight: Tensor, fitted: Regression, held: Regression) -> Healing:
    """Refit `weight` [d, c] with the ridge that is best on held-back rows, if one is better than no change.

    A weight of zeros switches its layer off and stays as it is.

    Args:
        weight: The old weight, in float64.
        fitted: Sums over the rows that the weight is fitted to.
        held: Sums over the held-back rows that decide between the ridges.
    """
    before = held.error(weight, None)
    if not weight.any():
        return Healing(None, before, before)
    residual = fitted.residual(weight)
    changes = [fitted.change(residual, ridge) for ridge in RIDGES]
    errors = [held.error(weight, change) for change in changes]
    best = errors.index(min(errors))
    if not errors[best] < before:
        return Healing(None, before, before)
    return Healing(weight + changes[best], before, errors[best])
