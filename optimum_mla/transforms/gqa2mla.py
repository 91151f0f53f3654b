"""GQA2MLA: every query head gets a key and a value map of its own, at the same cache size."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from optimum_mla.geometry import MLAGeometry
from optimum_mla.models import SourceAttention
from optimum_mla.ops.low_rank import low_rank_factors, singular_values
from optimum_mla.ops.rank_allocation import rank_for_energy
from optimum_mla.transforms.base import MLATransformation


class GQA2MLA(MLATransformation):
    """TransMLA's construction (arXiv 2502.07864v1, sections 4.1-4.3).

    W_K is replicated to H heads and factorized, W'_K = U S Vᵀ, into W_K^a = U √S (d × r_k) and W_K^b = √S Vᵀ
    (r_k × H·D); W_V likewise. At full rank, the default, the model's outputs and the size of its cache are the
    source's, and training can make every query head's keys and values its own. A lower rank makes the cache smaller.
    RoPE acts on the up-projected keys, so the latents carry no position.

    `kv_lora_rank` counts both latents together: r_k + r_v; they get half each.
    """

    name = "gqa2mla"

    @property
    def preserves_computation(self) -> bool:  # type: ignore[override]
        """True at full rank."""
        return not self.budget.is_set or self.budget.kv_cache_ratio == 1.0 or self.budget.energy == 1.0

    def plan_layer(self, source: SourceAttention) -> MLAGeometry:
        g = source.geometry
        full = min(g.num_key_value_heads * g.head_dim, g.hidden_size)
        if self.budget.energy is not None:
            ranks = [
                rank_for_energy(singular_values(weight.flatten(0, 1)), self.budget.energy)
                for weight in (source.key, source.value)
            ]
        else:
            both = self.budget.rank(g.source_cache_numbers, 0, 2 * full, lambda: torch.empty(0), smallest=2)
            ranks = [both // 2, both - both // 2]
        return replace(
            g,
            attention_form="full",
            k_lora_rank=ranks[0],
            v_lora_rank=ranks[1],
            qk_rope_head_dim=g.head_dim,
            v_head_dim=g.head_dim,
            num_up_heads=g.num_attention_heads,
        )

    def convert_layer(
        self, source: SourceAttention, geometry: MLAGeometry, contribution: Tensor | None
    ) -> dict[str, Tensor]:
        g, spec = geometry, source.spec
        share = g.num_attention_heads // g.num_key_value_heads
        tensors = {"q_proj.weight": source.query.flatten(0, 1), **source.output()}
        if g.query_bias:
            tensors["q_proj.bias"] = source.query_bias.flatten()
        sides = (
            ("k", source.key, source.key_bias, g.k_lora_rank),
            ("v", source.value, source.value_bias, g.v_lora_rank),
        )
        for side, weight, bias, rank in sides:
            down, up = low_rank_factors(weight.flatten(0, 1), rank)
            # The replicated weight has the same singular vectors and √(H/G) times the singular values.
            heads = up.view(g.num_key_value_heads, g.head_dim, rank).repeat_interleave(share, dim=0)
            tensors[f"{side}_a_proj.weight"] = down * share**0.25
            tensors[f"{side}_b_proj.weight"] = heads.flatten(0, 1) / share**0.25
            if g.key_value_bias:
                tensors[f"{side}_b_proj.bias"] = bias.repeat_interleave(share, dim=0).flatten()
        if g.key_norm:
            tensors["q_norm.weight"] = source.norm_gain(spec.query_norm)[None]
            tensors["k_norm.weight"] = source.norm_gain(spec.key_norm)[None]
        return tensors
