"""Distribution of a budget of ranks, or of bytes of codes, over calibrated layers."""

from __future__ import annotations

import itertools
import math

ALLOCATIONS = ("uniform", "energy", "error")
REACH = (0.5, 1.5)
"""The lowest and the highest rank at which the error is measured, as multiples of the uniform rank."""
SMALLEST_SHARE = 0.25
"""The smallest rank of a layer as a share of the uniform rank, because errors far from measured ranks are unknown."""


def rank_range(rank: int, largest: int) -> tuple[int, int]:
    """Return the lowest and the highest rank that a curve covers around `rank`, both from 1 to `largest`."""
    low, high = (min(largest, max(1, round(share * rank))) for share in REACH)
    return low, high


def fit_power_law(predicted: dict[int, float], measured: dict[int, float]) -> dict[int, float]:
    """Return predicted errors by rank, to a power and times a factor that make them the measured ones at both ends.

    Where either does not fall, or falls to zero, there is no such power, and the measured errors are returned.

    Args:
        predicted: Predicted squared errors, by rank.
        measured: Measured squared errors at the first and the last of these ranks.
    """
    low, high = min(predicted), max(predicted)
    falls = 0 < predicted[high] < predicted[low] and 0 < measured[high] < measured[low]
    if not falls:
        return measured
    power = math.log(measured[low] / measured[high]) / math.log(predicted[low] / predicted[high])
    return {rank: measured[low] * (error / predicted[low]) ** power for rank, error in predicted.items()}


def scaled(curve: dict[int, float], rank: int, error: float) -> dict[int, float]:
    """Return a curve times the factor that makes the error at a rank within its reach a given one."""
    table = _every_rank(curve)
    held = table[min(max(rank, min(table)), max(table))]
    return {one: value * error / held if held > 0 else error for one, value in curve.items()}


def allocate(curves: dict[int, dict[int, float]], total: int) -> dict[int, int]:
    """Return sizes by layer that make the sum of errors small and add up to `total`, as far as the curves reach.

    A size is a rank, or a number of bytes. It is given out one at a time to the layer whose error falls most, which is
    optimal if the curves are convex. Between measured sizes the logarithm of the error is interpolated linearly.

    Args:
        curves: The squared errors of each layer by size, by the index of the layer.
        total: Sum of the sizes.
    """
    floor = max(1, math.floor(SMALLEST_SHARE * total / len(curves)))
    tables = {layer: _every_rank(curve) for layer, curve in curves.items()}
    ranks = {layer: max(min(table), min(floor, max(table))) for layer, table in tables.items()}
    while sum(ranks.values()) < total:
        gains = {
            layer: table[ranks[layer]] - table[ranks[layer] + 1]
            for layer, table in tables.items()
            if ranks[layer] + 1 in table
        }
        if not gains:
            break
        ranks[max(gains, key=lambda layer: (gains[layer], -ranks[layer]))] += 1
    return ranks


def _every_rank(curve: dict[int, float]) -> dict[int, float]:
    """Return the interpolated curve at every rank from its first to its last."""
    known = sorted(curve)
    table = {known[0]: curve[known[0]]}
    tiny = 1e-300
    for low, high in itertools.pairwise(known):
        start, end = math.log(curve[low] + tiny), math.log(curve[high] + tiny)
        for rank in range(low + 1, high + 1):
            table[rank] = math.exp(start + (end - start) * (rank - low) / (high - low))
    return table
