"""Truncated singular value decomposition in float64, computed from the eigenvectors of the smaller Gram matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LowRankFactors(NamedTuple):
    """Factors of a weight [m, d].

    Attributes:
        down: The factor that reads the hidden state, [r, d].
        up: The factor that reads the latent, [m, r]; `up @ down` is the best approximation of rank r.
    """

    down: Tensor
    up: Tensor


def _eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular values [k], falling, and their directions [k, k] on the smaller side, with k = min(m, d)."""
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    eigenvalues, vectors = torch.linalg.eigh(gram)
    directions = vectors.flip(-1).T
    # The sign of an eigenvector is arbitrary. It is fixed here, so that every machine makes the same factors.
    peaks = directions.gather(-1, directions.abs().argmax(-1, keepdim=True))
    return eigenvalues.flip(-1).clamp_min(0).sqrt(), directions * peaks.sign()


def singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values of `matrix` [m, d] in falling order, [min(m, d)], in float64."""
    matrix = matrix.double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0).sqrt()


def rank_for_energy(singular_values: Tensor, energy: float) -> int:
    """Return the smallest rank whose squared singular values hold the share `energy` of their sum.

    This is the dynamic rank selection of X-EcoMLA (arXiv 2503.11132, section 3.2).

    Args:
        singular_values: Singular values in falling order, [k].
        energy: Share to keep, above 0 and up to 1.
    """
    held = singular_values.double().square().cumsum(0)
    # The share is taken of the last cumulative sum, because rounding may make another total larger than it.
    return min(int(torch.searchsorted(held, energy * held[-1]).item()) + 1, len(held))


def low_rank_factors(matrix: Tensor, rank: int) -> LowRankFactors:
    """Return the best factors of `matrix` [m, d] of rank `rank`; both sides carry the root of the singular values.

    One side is an orthonormal projection and the other is computed through it, so at full rank the product is the
    matrix up to float64 rounding, however small its last singular values are; a Gram matrix alone would lose them by
    squaring.

    Args:
        matrix: Weight [m, d] in any floating dtype; the factors are in float64.
        rank: Rank from 1 to min(m, d).
    """
    matrix = matrix.double()
    _, directions = _eigenbasis(matrix)
    basis = directions[:rank]  # [r, m] or [r, d]
    if matrix.shape[0] <= matrix.shape[1]:
        down, up = basis @ matrix, basis.T * matrix.any(1, keepdim=True)  # Rows of zeros stay exactly zero.
        scale = down.norm(dim=1).sqrt()
    else:
        down, up = basis, matrix @ basis.T
        scale = up.norm(dim=0).rsqrt()
    # A direction with a singular value of 0 has no scale that the sides could share.
    scale = torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))
    return LowRankFactors(down / scale[:, None], up * scale)
