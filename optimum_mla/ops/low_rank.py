"""Truncated singular value decomposition in float64, from the symmetric eigenproblem of the smaller Gram matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LowRankFactors(NamedTuple):
    """`up @ down` is the best rank-r approximation of a weight: down [r, d] reads the state, up [m, r] writes."""

    down: Tensor
    up: Tensor


def _eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values [k] in falling order and their directions [k, ·] on the matrix's smaller side, k = min(m, d)."""
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    eigenvalues, vectors = torch.linalg.eigh(gram)
    directions = vectors.flip(-1).T
    # An eigenvector's sign is the library's whim: fix it, so that every machine makes the same factors.
    peaks = directions.gather(-1, directions.abs().argmax(-1, keepdim=True))
    return eigenvalues.flip(-1).clamp_min(0).sqrt(), directions * peaks.sign()


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values [min(m, d)] of `matrix` [m, d] in falling order, float64."""
    matrix = matrix.double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0).sqrt()


def low_rank_factors(matrix: Tensor, rank: int) -> LowRankFactors:
    """Best rank-`rank` factors of `matrix` [m, d], balanced: each side carries the root of the singular values.

    One side is an orthonormal projection and the other is computed through it, so at full rank the product is the
    matrix to float64 rounding however small its last singular values are (a Gram matrix alone would square them away).

    Args:
        matrix: Weight [m, d] in any floating dtype; the factors come back in float64.
        rank: 1 to min(m, d).
    """
    matrix = matrix.double()
    _, directions = _eigenbasis(matrix)
    basis = directions[:rank]  # [r, m] or [r, d]
    if matrix.shape[0] <= matrix.shape[1]:
        down, up = basis @ matrix, basis.T
        scale = down.norm(dim=1).sqrt()
    else:
        down, up = basis, matrix @ basis.T
        scale = up.norm(dim=0).rsqrt()
    # A direction that carries nothing has no scale to share between the sides.
    scale = torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))
    return LowRankFactors(down / scale[:, None], up * scale)
