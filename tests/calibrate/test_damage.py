"""The damage of stopped rotations against a slow explicit loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optimum_mla.calibrate.damage import DAMAGE_ROWS, DAMAGE_WINDOWS
from optimum_mla.calibrate.windows import HELD_BACK
from optimum_mla.ops.rope_mix import RopeMix, identity_mix, query_aware_mix
from tests.calibrate.walked import (
    FAMILIES,
    GROUPS,
    HEAD_DIM,
    HEADS,
    IDS,
    PAIRS,
    Heads,
    Walked,
    pairs,
)
from tests.cases import token_ids


def slow_damage(walked: Walked, mix: RopeMix, windows: list[int], rows: list[int]) -> Tensor:
    """Variance, under each row's attention, of the logits' change when one component stops rotating; weighted."""
    output = walked.layer.self_attn.o_proj.weight
    total = torch.zeros(GROUPS * PAIRS, dtype=torch.float64)
    for window in windows:
        heads = Heads(walked, window)
        spread = [[heads.spread(output, head, t) for t in rows] for head in range(HEADS)]
        raw = pairs(heads.raw_key)  # [G, L, D/2]
        for component in range(GROUPS * PAIRS):
            j, p = divmod(component, PAIRS)
            mixed = sum(mix.keys[p, j, g] * raw[g, :, p] for g in range(GROUPS))
            for head in range(HEADS):
                key = mixed * heads.key_factor[head // 2]
                query = mix.queries[p, j, head // 2] * pairs(heads.query[head])[:, p]
                for row, t in enumerate(rows):
                    turned = ((query[t] * heads.turn[t, p]).conj() * key * heads.turn[:, p]).real
                    still = (query[t].conj() * key).real * heads.factor**2
                    change = (turned - still) / HEAD_DIM**0.5
                    weights = heads.weights[head, t]
                    variance = weights @ (change - weights @ change).square()
                    total[component] += variance * spread[head][row] * walked.row_weights[window, t]
    return total / (len(windows) * len(rows))


def random_mix() -> RopeMix:
    root = torch.randn(PAIRS, GROUPS, GROUPS, dtype=torch.complex128)
    return query_aware_mix(root @ root.mH, torch.rand(GROUPS, PAIRS, dtype=torch.float64) + 0.1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mixed", [False, True])
def test_damage_is_that_of_a_slow_loop(family: str, mixed: bool) -> None:
    walked = Walked(family, IDS[:2, :12])
    mix = random_mix() if mixed else identity_mix(GROUPS, PAIRS)
    expected = slow_damage(walked, mix, windows=[0, 1], rows=list(range(12)))
    damage = walked.calibration.damage(mix)
    assert expected.min() > 0
    assert torch.allclose(damage, expected, rtol=1e-6, atol=1e-9 * float(expected.max()))


def test_damage_of_many_tokens_is_measured_on_a_part_of_them() -> None:
    count, length = 2 * DAMAGE_WINDOWS, DAMAGE_ROWS + 8
    walked = Walked("llama", token_ids(count, length))
    rows = torch.linspace(length / DAMAGE_ROWS, length - 1, DAMAGE_ROWS).long().tolist()
    assert len(set(rows)) == DAMAGE_ROWS
    mix = random_mix()
    expected = slow_damage(
        walked, mix, windows=[w for w in range(count) if w % HELD_BACK != HELD_BACK - 1][::2], rows=rows
    )
    assert torch.allclose(walked.calibration.damage(mix), expected, rtol=1e-6, atol=1e-9 * float(expected.max()))
