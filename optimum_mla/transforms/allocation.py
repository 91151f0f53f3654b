"""How calibrated layers share one budget."""

from __future__ import annotations

import itertools
import math

ALLOCATIONS = ("uniform", "energy", "error")
GRID = (0.5, 0.75, 1.0, 1.5)
"""Ranks at which the error is measured, in uniform ranks."""
SMALLEST_SHARE = 0.25
"""No layer gets less than this share of the uniform rank: predictions are poor far away from what was measured."""


def rank_grid(rank: int, largest: int) -> list[int]:
    """Ranks to measure around `rank`, rising, 1 to `largest`."""
    return sorted({min(largest, max(1, round(share * rank))) for share in GRID})


def allocate_ranks(curves: dict[int, dict[int, float]], total: int) -> dict[int, int]:
    """Ranks, by layer, that add up to `total` and make the sum of errors least.

    Greedy by the error's fall per number, which is optimal where errors fall ever more slowly; between measured ranks
    the error's logarithm is taken as linear.

    Args:
        curves: By layer, squared error at some ranks, rising.
        total: Numbers to give away.
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
    """The curve at every rank between its first and last."""
    known = sorted(curve)
    table = {known[0]: curve[known[0]]}
    tiny = 1e-300
    for low, high in itertools.pairwise(known):
        start, end = math.log(curve[low] + tiny), math.log(curve[high] + tiny)
        for rank in range(low + 1, high + 1):
            table[rank] = math.exp(start + (end - start) * (rank - low) / (high - low))
    return table
