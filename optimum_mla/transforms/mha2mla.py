"""MHA2MLA: each key head keeps a few rotary pairs, the rest of keys and values becomes one latent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from optimum_mla.errors import InvalidValueError
from optimum_mla.geometry import MLAGeometry
from optimum_mla.models import SourceAttention
from optimum_mla.ops.low_rank import LowRankFactors, low_rank_factors, singular_values
from optimum_mla.ops.rope_split import RopeSplit, select_pairs, split_by_pairs
from optimum_mla.transforms.base import MLATransformation
from optimum_mla.transforms.budget import RankBudget
from optimum_mla.transforms.decoupled import decoupled_tensors, gather_dims, reorder_query
from optimum_mla.transforms.options import check_choice, check_rope_dim, choose_selection

FACTORIZATIONS = ("joint", "split")


class MHA2MLA(MLATransformation):
    """Partial RoPE and a low-rank latent (arXiv 2502.14837, sections 3.1 and 3.2).

    Of the D/2 rotary pairs of each key head R/2 keep their rotation and are cached as they are, one rotary key a key
    head (K = G). The position-free rest and the values, [W_K,nope , W_V], are factorized: by one SVD (`joint`), or by
    two of half the rank (`split`).

    Args:
        d_kv: The paper's rank per key head, instead of `kv_lora_rank` = d_kv·G.
        qk_rope_head_dim: R; the paper's choice is D/8.
        rope_selection: `high`, `low`, `uniform`, or `contribution`, which needs calibration tokens. By default
            `contribution` with calibration tokens and `high` without.
        factorization: `joint` or `split`.
        **options: Of `MLATransformation`.
    """

    name = "mha2mla"
    default_budget = RankBudget(kv_cache_ratio=0.5)
    rope_selections = ("high", "low", "uniform", "contribution")

    def __init__(
        self,
        d_kv: int | None = None,
        qk_rope_head_dim: int | None = None,
        rope_selection: str | None = None,
        factorization: Literal["joint", "split"] = "joint",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if d_kv is not None and any(options.get(name) is not None for name in vars(RankBudget())):
            raise InvalidValueError("d_kv", d_kv, "nothing beside another rank option", "Give one of them.")
        if d_kv is not None and d_kv < 1:
            raise InvalidValueError("d_kv", d_kv, "integers from 1")
        check_choice("factorization", factorization, FACTORIZATIONS)
        if d_kv is not None:
            self.budget = RankBudget()  # d_kv says it all: no default beside it
        self.d_kv, self.qk_rope_head_dim, self.factorization = d_kv, qk_rope_head_dim, factorization
        self.rope_selection = choose_selection(rope_selection, self.rope_selections, self.calibration, "high")

    @property
    def needs_contribution(self) -> bool:
        return self.rope_selection == "contribution"

    def plan_layer(self, source: SourceAttention) -> MLAGeometry:
        g = source.geometry
        rope = check_rope_dim(self.qk_rope_head_dim, g.head_dim, default=g.head_dim // 8)
        heads, nope = g.num_key_value_heads, g.head_dim - rope
        overhead = heads * rope + (heads if g.key_norm else 0)
        if self.factorization == "joint":
            largest, smallest = min(g.hidden_size, heads * (nope + g.head_dim)), 1
        else:
            largest, smallest = 2 * min(g.hidden_size, heads * min(nope, g.head_dim)), 2
        if self.d_kv is not None:
            if not smallest <= self.d_kv * heads <= largest:
                raise InvalidValueError("d_kv", self.d_kv, f"1 to {largest // heads} for this model and method")
            rank = self.d_kv * heads
        else:
            # Which pairs rotate is not known before they are measured; the energy of the whole weight stands in for it.
            rank = self.budget.rank(
                g.source_cache_numbers, overhead, largest, lambda: singular_values(_stack(source)), smallest
            )
        return replace(
            g,
            attention_form="decoupled",
            kv_lora_rank=min(rank, largest),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
            num_rope_heads=heads,
            v_head_dim=g.head_dim,
            num_up_heads=heads,
        )

    def convert_layer(
        self, source: SourceAttention, geometry: MLAGeometry, contribution: Tensor | None
    ) -> dict[str, Tensor]:
        g = geometry
        pairs = select_pairs(self.rope_selection, g.head_dim, g.qk_rope_head_dim, contribution, g.num_rope_heads)
        split = split_by_pairs(pairs, g.head_dim)
        down, up = self._factorize(source, split, g.kv_lora_rank)
        boundary = g.num_up_heads * g.qk_nope_head_dim
        query, query_bias = reorder_query(source, split)
        tensors = decoupled_tensors(
            source,
            g,
            split,
            down,
            key_up=up[:boundary].view(g.num_up_heads, g.qk_nope_head_dim, -1),
            value_up=up[boundary:].view(g.num_up_heads, g.v_head_dim, -1),
            rope_key=gather_dims(source.key, split.rope),
            rope_bias=gather_dims(source.key_bias, split.rope),
        )
        tensors["q_proj.weight"] = query.flatten(0, 1)
        if g.query_bias:
            tensors["q_proj.bias"] = query_bias.flatten()
        return tensors

    def _factorize(self, source: SourceAttention, split: RopeSplit, rank: int) -> LowRankFactors:
        key, value = gather_dims(source.key, split.nope).flatten(0, 1), source.value.flatten(0, 1)
        if self.factorization == "joint":
            return low_rank_factors(torch.cat([key, value]), rank)
        keys, values = low_rank_factors(key, rank // 2), low_rank_factors(value, rank - rank // 2)
        return LowRankFactors(torch.cat([keys.down, values.down]), torch.block_diag(keys.up, values.up))


def _stack(source: SourceAttention) -> Tensor:
    """[W_K ; W_V], [2·G·D, d]."""
    return torch.cat([source.key.flatten(0, 1), source.value.flatten(0, 1)])
