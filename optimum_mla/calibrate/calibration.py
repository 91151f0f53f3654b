"""The facts about one layer that a method asks calibration data for, wherever they come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from optimum_mla.calibrate.moments import LayerMoments, QueryMoments
from optimum_mla.families.project import SourceAttention
from optimum_mla.ops.rope_mix import RopeMix, as_pairs, query_aware_mix
from optimum_mla.ops.weighted import WeightedFactorization, WeightedRows

T = TypeVar("T")
SAMPLE_TOKENS = 4096
"""Largest number of tokens whose inputs steps of codes are fitted to."""


class Calibration(ABC):
    """The second moments of one layer and the effects of its rotary components on the calibration text.

    Args:
        source: The layer's attention.

    Attributes:
        measures: Whether converted attentions can be measured on calibration tokens, as `LayerCalibration` does.
    """

    measures = False

    def __init__(self, source: SourceAttention) -> None:
        self.source = source
        self._results: dict[Hashable, Any] = {}
        self._factorized: tuple[Hashable, WeightedFactorization] | None = None

    @property
    @abstractmethod
    def moments(self) -> LayerMoments:
        """Return the second moments of the layer."""

    @property
    def query_moments(self) -> QueryMoments:
        """Return the second moments of the layer's queries, which some calibrations measure on fewer tokens."""
        return self.moments

    @abstractmethod
    def contribution(self) -> Tensor:
        """Return the 2-norm contribution of each rotary pair on the source's states, [G, D/2]; see `moments`."""

    @abstractmethod
    def damage(self, mix: RopeMix) -> Tensor:
        """Return the damage that is done to the logits if a component stops rotating, [C]; see `rotary_damage`."""

    @abstractmethod
    def inputs(self) -> Tensor:
        """Return normed inputs of some tokens on the converted model's states, [T, d].

        They are those of at most `SAMPLE_TOKENS` tokens, evenly spread over the windows without their first tokens.
        """

    @cached_property
    def mix(self) -> RopeMix:
        """Return the mix of the key heads that gathers as much of the logits as possible in few components."""
        return query_aware_mix(*mix_moments(self.source, self.moments))

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return what `compute` returns, which is kept for the next call with the same key until `forget`."""
        if key not in self._results:
            self._results[key] = compute()
        return self._results[key]  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Free all that is kept for other candidates, which is several times as large as the layer."""
        self._results, self._factorized = {}, None

    def factorization(
        self, key: Hashable, rows: Callable[[], list[WeightedRows]], centered: bool = True
    ) -> WeightedFactorization:
        """Return the factorization of rows of weights, weighted by the moments of the layer's inputs.

        The last factorization is kept, so that other ranks of the same rows cost nothing.

        Args:
            key: Identifies the rows, together with `centered`.
            rows: Returns the rows.
            centered: Whether biases after the latent carry the mean of the inputs. Otherwise the latent carries it.
        """
        key = (key, centered)
        if self._factorized is None or self._factorized[0] != key:
            moments = self.moments.inputs if centered else self.moments.raw_inputs
            self._factorized = key, WeightedFactorization(rows(), moments)
        return self._factorized[1]


def mix_moments(source: SourceAttention, moments: LayerMoments) -> tuple[Tensor, Tensor]:
    """Return the second moments of the key heads' pairs, complex [D/2, G, G], and the query energies, [G, D/2].

    Both are what `query_aware_mix` takes. The moments are about zero and not about the mean, because a mean that
    rotates is not constant.
    """
    pairs = as_pairs(source.gained_key)  # [G, D/2, d]
    seen = (pairs.flatten(0, 1) @ moments.inputs.to(pairs.dtype)).view_as(pairs)
    mean = pairs @ moments.input_mean.to(pairs.dtype) + as_pairs(source.gained_key_bias)  # [G, D/2]
    keys = torch.einsum("gpd,hpd->pgh", seen, pairs.conj()) + torch.einsum("gp,hp->pgh", mean, mean.conj())
    heads = source.geometry.num_key_value_heads
    queries = moments.queries.unflatten(0, (heads, -1)).sum(1) * moments.key_scale[:, None, None]
    return keys, queries.diagonal(dim1=-2, dim2=-1).unflatten(-1, (2, -1)).sum(1)
