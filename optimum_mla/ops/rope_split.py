"""Choice of the rotary pairs that keep their rotation, and the dims of those pairs.

A head of D dims has D/2 rotary pairs. Transformers stores them half-split: pair k has the dims (k, k + D/2), and pair 0
has the highest frequency.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RopeSplit(NamedTuple):
    """The dims of each rotary key head in two parts; each tensor has one row per head.

    Attributes:
        nope: Dims that become position-free, [K, n].
        rope: Dims that keep rotating, half-split (R/2 first halves, then R/2 second halves), [K, R].
        pairs: For each pair of `rope`, the rotary pair of the source whose frequency it rotates with, [K, R/2].
    """

    nope: Tensor
    rope: Tensor
    pairs: Tensor


SCORED_SELECTIONS = ("contribution", "damage")
"""Selections that take the pairs with the highest scores."""


def select_pairs(selection: str, head_dim: int, rope_dim: int, scores: Tensor | None = None, heads: int = 1) -> Tensor:
    """Return the rotary pairs to keep, in rising order, [K, R/2].

    `high` and `low` frequencies, `uniform` strides and the largest `contribution` are from MHA2MLA (arXiv 2502.14837,
    section 3.1). The largest `damage` is defined in `optimum_mla.calibrate.walk`.

    Args:
        selection: One of `high`, `low`, `uniform`, `contribution`, `damage`.
        head_dim: Dims of a head, D.
        rope_dim: Dims that keep rotating, R; even.
        scores: For `contribution` and `damage`, how much each pair matters, [K, D/2].
        heads: Number of rotary key heads, K.

    Raises:
        ValueError: The selection is unknown, or it needs scores and there are none.
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


def fixed_pairs(selection: str, head_dim: int, rope_dim: int) -> Tensor:
    """Return the rotary pairs that a selection without scores keeps in every layer, in rising order, [R/2].

    Args:
        selection: `last`, whose frequencies are those of `split_last_columns`, or `high`, `low` or `uniform`.
        head_dim: Dims of a head, D.
        rope_dim: Dims that keep rotating, R; even.
    """
    if selection == "last":
        return split_last_columns(head_dim, rope_dim).pairs[0]
    return select_pairs(selection, head_dim, rope_dim)[0]


def split_by_pairs(pairs: Tensor, head_dim: int) -> RopeSplit:
    """Return the split in which both dims of the given pairs [K, R/2] rotate and all other dims do not."""
    rope = torch.cat([pairs, pairs + head_dim // 2], dim=-1)
    rows = []
    for row in rope:
        free = torch.ones(head_dim, dtype=torch.bool, device=pairs.device)
        free[row] = False
        rows.append(free.nonzero().flatten())
    return RopeSplit(torch.stack(rows), rope, pairs)


def split_last_columns(head_dim: int, rope_dim: int) -> RopeSplit:
    """Return the split in which the last R dims rotate with the frequencies of an R-dim head.

    This is the split of X-EcoMLA (arXiv 2503.11132, Algorithm 1). theta^(-2i/R) is the frequency of the source's pair
    i·D/R, so R must divide D.
    """
    pairs = torch.arange(rope_dim // 2) * (head_dim // rope_dim)
    dims = torch.arange(head_dim)
    return RopeSplit(dims[None, : head_dim - rope_dim], dims[None, head_dim - rope_dim :], pairs[None])
