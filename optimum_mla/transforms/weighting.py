"""What reads a layer's keys and values, and how hard: the output side of a calibrated factorization."""

from __future__ import annotations

from torch import Tensor

from optimum_mla.models import SourceAttention
from optimum_mla.transforms.calibration import LayerCalibration, output_moments


def key_moments(source: SourceAttention, calibration: LayerCalibration) -> Tensor:
    """Second moments of the queries that read each key head, [G, D, D], in squared change of the hidden state."""
    moments = calibration.moments
    scale = (calibration.key_weight * calibration.logit_scale) ** 2
    grouped = moments.queries.unflatten(0, (source.geometry.num_key_value_heads, -1)).sum(1)
    return grouped * (scale * moments.key_scale)[:, None, None]


def value_moments(source: SourceAttention) -> Tensor:
    """Σ_h W_O,hᵀ W_O,h over the query heads of each value head, [G, D, D]."""
    return output_moments(source).unflatten(0, (source.geometry.num_key_value_heads, -1)).sum(1)


def rotated_moments(moments: Tensor) -> Tensor:
    """The same readers of dims that rotate before they are read, as blocks of one: [X, D, D] to [X·D, 1, 1].

    Averaged over all rotations, the two dims of a pair weigh the same and different pairs do not mix.
    """
    diagonal = moments.diagonal(dim1=-2, dim2=-1).unflatten(-1, (2, -1))  # [X, 2, D/2]
    return diagonal.mean(1).repeat(1, 2).flatten()[:, None, None]
