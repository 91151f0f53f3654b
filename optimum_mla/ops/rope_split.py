"""Which rotary pairs keep their rotation, and where their dims are.

A head of D dims has D/2 rotary pairs. Transformers stores them half-split: pair k is dims (k, k + D/2), and pair 0
turns fastest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RopeSplit(NamedTuple):
    """A partition of each head's dims; K rows, one per rotary key head.

    nope: [K, n] dims that become position-free. rope: [K, R] dims that keep rotating, half-split (R/2 first halves,
    then R/2 second halves). pairs: [K, R/2] for each of them the source's rotary pair, whose frequency it turns with.
    """

    nope: Tensor
    rope: Tensor
    pairs: Tensor


SCORED_SELECTIONS = ("contribution", "damage")
"""Selections that take the pairs with the highest scores."""


def select_pairs(selection: str, head_dim: int, rope_dim: int, scores: Tensor | None = None, heads: int = 1) -> Tensor:
    """Rotary pairs to keep, [K, R/2], rising.

    MHA2MLA (arXiv 2502.14837), section 3.1: `high` and `low` frequencies, `uniform` strides, or the top `contribution`;
    ours: the top `damage` (`optimum_mla.transforms.calibration`).

    Args:
        selection: One of `high`, `low`, `uniform`, `contribution`, `damage`.
        head_dim: D.
        rope_dim: R, even.
        scores: [K, D/2], for `contribution` and `damage`: the larger, the more the pair matters.
        heads: K.
    """
    total, kept = head_dim // 2, rope_dim // 2
    if selection in SCORED_SELECTIONS:
        if scores is None:
            raise ValueError(f"{selection} selects by scores: none were given")
        return scores.topk(kept, dim=-1).indices.sort(dim=-1).values
    if selection == "high":
        chosen = torch.arange(kept)
    elif selection == "low":
        chosen = torch.arange(total - kept, total)
    elif selection == "uniform":
        chosen = torch.arange(kept) * total // max(kept, 1)
    else:
        raise ValueError(f"unknown selection {selection!r}")
    return chosen.expand(heads, kept)


def split_by_pairs(pairs: Tensor, head_dim: int) -> RopeSplit:
    """Partition the D dims of each head: both dims of the pairs [K, R/2] rotate, the others do not."""
    rope = torch.cat([pairs, pairs + head_dim // 2], dim=-1)
    rows = []
    for row in rope:
        free = torch.ones(head_dim, dtype=torch.bool)
        free[row.cpu()] = False
        rows.append(free.nonzero().flatten())
    return RopeSplit(torch.stack(rows), rope.cpu(), pairs.cpu())


def split_last_columns(head_dim: int, rope_dim: int) -> RopeSplit:
    """X-EcoMLA's partition (arXiv 2503.11132, Algorithm 1): the last R dims turn with the frequencies of an R-dim head.

    theta^(-2i/R) is the source's frequency of pair i·D/R, so R must divide D.
    """
    pairs = torch.arange(rope_dim // 2) * (head_dim // rope_dim)
    dims = torch.arange(head_dim)
    return RopeSplit(dims[None, : head_dim - rope_dim], dims[None, head_dim - rope_dim :], pairs[None])
