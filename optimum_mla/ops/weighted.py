"""Low-rank factors with errors weighted on both sides, by what a weight reads and by what reads its results.

With second moments Q of what reads a weight's rows and S of the weight's inputs, a change δ of the weight costs
E‖Q^½ δ x‖² = ‖Q^½ δ S^½‖²_F. The best rank-r change is a truncated singular value decomposition of Q^½ W S^½ with both
roots undone (input weighting: SVD-LLM v2, arXiv 2503.12340; CARE). Any factor Q = L Lᵀ serves as the root, so these are
Cholesky factors, and the decomposition is one symmetric eigenproblem of the smaller side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_mla.core.errors import CalibrationDataError

DAMPING = 1e-6
"""Share of the largest row norm that is added to the diagonal of a second moment, so that it can be inverted even if
channels are dead. A moment of zeros gets that of the largest moment beside it."""


class WeightedRows(NamedTuple):
    """Rows of a matrix to factorize, and the second moments of what reads them.

    Attributes:
        weight: The rows, [m, d].
        moment: Second moments of the readers in b diagonal blocks, [b, m/b, m/b]. With b = m each row has one weight;
            with b = 1 the whole matrix of moments is used.
    """

    weight: Tensor
    moment: Tensor


class WeightedFactors(NamedTuple):
    """Factors of several blocks of rows that share one latent.

    Attributes:
        down: The factor that reads the hidden state, [r, d].
        ups: For each block, the factor that reads the latent, [m_i, r]; `ups[i] @ down` approximates the rows.
        costs: Weighted squared error that a unit of squared error in each channel of the latent costs, [r]. Errors of
            different channels add up.
    """

    down: Tensor
    ups: list[Tensor]
    costs: Tensor


def largest_norm(moments: Sequence[Tensor]) -> Tensor:
    """Return the largest row norm of some second moments [..., n, n], a scalar, or 1 if all of them are zero."""
    largest = torch.stack([_norms(moment).max() for moment in moments]).max()
    return torch.where(largest > 0, largest, 1.0)


def _norms(moment: Tensor) -> Tensor:
    """Return the largest row norm of each second moment [..., n, n]."""
    return torch.linalg.matrix_norm(moment, ord=float("inf"))


def damped_cholesky(moment: Tensor, name: str, largest: Tensor | None = None) -> Tensor:
    """Return lower factors L with L Lᵀ = `moment` [..., n, n] after adding `DAMPING` to its diagonal.

    A moment of zeros gives a multiple of the identity, because its root has to be invertible too.

    Args:
        moment: Second moments, positive semidefinite up to rounding.
        name: What the moment belongs to, for the error message.
        largest: What a moment of zeros is damped relative to; None takes the largest norm of these moments.

    Raises:
        CalibrationDataError: The moment holds NaN or infinite values.
    """
    if not moment.isfinite().all():
        raise CalibrationDataError(
            f"calibration: the second moment of the {name} is not finite. The model overflows on this text, although "
            "calibration computes in float32: check its weights, or give another text."
        )
    size = _norms(moment)
    damping = DAMPING * torch.where(size > 0, size, largest_norm([moment]) if largest is None else largest)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    factor, info = torch.linalg.cholesky_ex(moment + damping[..., None, None] * eye)
    while (info != 0).any():  # rounding can leave eigenvalues a little below zero
        damping = damping * 10
        factor, info = torch.linalg.cholesky_ex(moment + damping[..., None, None] * eye)
    return factor


class WeightedFactorization:
    """The best approximations of stacked rows by one shared latent, for every rank.

    Errors of rows that nothing reads do not count, nor does any error where all inputs are zero.

    Args:
        rows: Blocks of rows, which share the latent.
        inputs: Second moment of the inputs, [d, d].
    """

    def __init__(self, rows: Sequence[WeightedRows], inputs: Tensor) -> None:
        largest = largest_norm([block.moment for block in rows])
        self._roots = [damped_cholesky(block.moment, "readers of a weight", largest) for block in rows]
        self._input_root = damped_cholesky(inputs, "layer's inputs")
        read = torch.cat([(_norms(block.moment) > 0).repeat_interleave(block.moment.shape[-1]) for block in rows])
        self._read = (read & inputs.any())[:, None]  # [m, 1]. Elsewhere the damping alone would count as an error.
        weighted = torch.cat([_times(root.mT, block.weight) for root, block in zip(self._roots, rows, strict=True)])
        self._matrix = weighted @ self._input_root  # [m, d]
        self._wide = self._matrix.shape[0] <= self._matrix.shape[1]
        gram = self._matrix @ self._matrix.T if self._wide else self._matrix.T @ self._matrix
        values, vectors = torch.linalg.eigh(gram)
        self.energies = values.flip(-1).clamp_min(0)  # [min(m, d)], falling: error at rank r is the sum from r on
        directions = vectors.flip(-1).T
        # The sign of an eigenvector is arbitrary. It is fixed here, so that every machine makes the same factors.
        self._directions = directions * directions.gather(-1, directions.abs().argmax(-1, keepdim=True)).sign()
        if not self._read.all():
            up = self._up(len(self.energies)) * self._read
            self.energies = up.square().sum(0) * (self.energies if self._wide else 1.0)

    def _up(self, rank: int) -> Tensor:
        """Return the weighted factor that reads the latent, [m, r], before its scale."""
        basis = self._directions[:rank]
        up = basis.T if self._wide else self._matrix @ basis.T
        return up * self._matrix.any(1, keepdim=True)  # Rows of zeros stay zero, whatever rounding would make of them.

    def error(self, rank: int) -> float:
        """Return the weighted squared error that the best factors of a rank leave."""
        return float(self.energies[rank:].sum())

    def factors(self, rank: int) -> WeightedFactors:
        """Return the best factors of a rank; both sides carry the root of the scale of each latent channel."""
        basis = self._directions[:rank]
        down = basis @ self._matrix if self._wide else basis  # [r, d], of the weighted matrix
        up = self._up(rank)
        down = torch.linalg.solve_triangular(self._input_root, down, upper=False, left=False)
        sizes = [root.shape[0] * root.shape[-1] for root in self._roots]
        ups = [_solve(root.mT, part) for root, part in zip(self._roots, up.split(sizes), strict=True)]
        scale = (down.norm(dim=1) / torch.cat(ups).norm(dim=0)).sqrt()
        scale = torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))
        costs = (up * self._read).square().sum(0) * scale.square()
        return WeightedFactors(down / scale[:, None], [part * scale for part in ups], costs)


def _times(blocks: Tensor, weight: Tensor) -> Tensor:
    """Return the block-diagonal matrix [b, n, n] times `weight` [b·n, d]."""
    return (blocks @ weight.unflatten(0, (blocks.shape[0], -1))).flatten(0, 1)


def _solve(upper_blocks: Tensor, weight: Tensor) -> Tensor:
    """Return the inverse of upper triangular blocks [b, n, n] times `weight` [b·n, r]."""
    split = weight.unflatten(0, (upper_blocks.shape[0], -1))
    return torch.linalg.solve_triangular(upper_blocks, split, upper=True).flatten(0, 1)
