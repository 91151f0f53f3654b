"""X-EcoMLA, an initialization for distillation with one shared rotary key and optionally low-rank queries."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import Self, Unpack

from optimum_mla.calibrate.calibration import Calibration
from optimum_mla.convert.signature import MLAOptions
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.core.number_checks import check_count, check_number
from optimum_mla.methods.command_options import XECOMLA_OPTIONS
from optimum_mla.methods.decoupled import decoupled_tensors, latent_gain
from optimum_mla.methods.factors import LatentFactors, calibrated_factors, calibrated_problem, gather_dims, stack_rows
from optimum_mla.methods.options import check_rope_dim
from optimum_mla.methods.selected_pairs import SelectedPairs
from optimum_mla.models import SourceAttention
from optimum_mla.ops.low_rank import low_rank_factors, rank_for_energy, singular_values
from optimum_mla.ops.rope_split import RopeSplit, split_by_pairs, split_last_columns
from optimum_mla.ops.weighted import WeightedFactorization


class XEcoMLA(SelectedPairs):
    """Upcycling by SVD (arXiv 2503.11132, Algorithm 1).

    [W_K, W_V] is factorized into the latent. The up-projection gives each head's position-free key dims and its values,
    repeated for H heads. One rotary key, which all heads share, is the average of the rotary dims of the key heads.
    With `q_lora_rank` or `q_energy` the queries are factorized too. Without distillation from a teacher the quality is
    good only near full rank.

    Args:
        q_lora_rank: Rank of the query latent; None keeps the full query projection.
        q_energy: Share of the energy of W_Q that each layer's query latent keeps, as an alternative to `q_lora_rank`.
        qk_rope_head_dim: R, the number of rotary dims. None takes the paper's D/2, or the best R on the calibration
            tokens if the factorization is calibrated.
        rope_selection: The rule that selects the rotary dims. `last` is the choice of Algorithm 1, which takes each
            head's last R dims with the frequencies of a head of R dims; R must then divide D. `high`, `low`, `uniform`,
            `contribution` and `damage` select rotary pairs of the source.
        latent_norm: Whether to put an RMSNorm on the latents, as DeepSeek does. Its gain is the latent's expected size.
        **options: Options of `MLATransformation`. `factorization` may be `joint` or `calibrated`.
    """

    name = "x-ecomla"
    command_options = XECOMLA_OPTIONS
    rope_selections = ("last", "high", "low", "uniform", "contribution", "damage")
    one_rotary_key = True
    factorizations = ("joint", "calibrated")

    def __init__(
        self,
        q_lora_rank: int | None = None,
        q_energy: float | None = None,
        qk_rope_head_dim: int | None = None,
        rope_selection: str | None = None,
        latent_norm: bool = False,
        **options: Unpack[MLAOptions],
    ) -> None:
        super().__init__(**options)
        if q_lora_rank is not None and q_energy is not None:
            raise InvalidValueError("q_lora_rank and q_energy", (q_lora_rank, q_energy), "one of them")
        if q_lora_rank is not None:
            check_count("q_lora_rank", q_lora_rank)
        if q_energy is not None:
            check_number("q_energy", q_energy, "above 0, up to 1")
            if not 0 < q_energy <= 1:
                raise InvalidValueError("q_energy", q_energy, "above 0, up to 1")
        self.q_lora_rank, self.q_energy, self.latent_norm = q_lora_rank, q_energy, latent_norm
        self.qk_rope_head_dim = qk_rope_head_dim
        self.rope_selection = self.choose_selection(rope_selection)

    def without_weights(self) -> Self:
        other = super().without_weights()
        other.q_energy = None
        return other

    def plan_layer(self, source: SourceAttention) -> MLAGeometry:
        head_dim, only_divisors = source.geometry.head_dim, self.rope_selection == "last"
        return self.shape(source, check_rope_dim(self.rope_dims, head_dim, head_dim // 2, only_divisors))

    def shape(self, source: SourceAttention, rope: int) -> MLAGeometry:
        g = source.geometry
        overhead = rope + (g.num_key_value_heads if g.key_norm else 0)
        largest = min(g.hidden_size, 2 * g.num_key_value_heads * g.head_dim)
        cache = g.source_cache_numbers
        rank = self.budget.rank(cache, overhead, largest, lambda: singular_values(stack_rows(source, gained=True)))
        return replace(
            g,
            attention_form="decoupled",
            kv_lora_rank=rank,
            q_lora_rank=self._query_rank(source),
            qk_nope_head_dim=g.head_dim - rope,
            qk_rope_head_dim=rope,
            num_rope_heads=1,
            v_head_dim=g.head_dim,
            num_up_heads=g.num_attention_heads,
            latent_norm=self.latent_norm,
            latent_bias=self.factorization == "calibrated" and not self.latent_norm,
        )

    def _query_rank(self, source: SourceAttention) -> int | None:
        if self.q_energy is not None:
            return rank_for_energy(singular_values(source.query.flatten(0, 1)), self.q_energy)
        largest = min(source.geometry.hidden_size, source.geometry.num_attention_heads * source.geometry.head_dim)
        if self.q_lora_rank is not None and not 1 <= self.q_lora_rank <= largest:
            raise InvalidValueError("q_lora_rank", self.q_lora_rank, f"1 to {largest} for this model")
        return self.q_lora_rank

    def rotary_damage(self, source: SourceAttention, calibration: Calibration) -> Tensor:
        scores = self.pair_scores(source, calibration)
        if scores is None:  # The rule takes the same pairs in all layers, whatever their weights.
            return torch.ones(1, source.geometry.head_dim // 2, dtype=torch.float64)
        total = scores.sum(dim=0, keepdim=True)
        return total if self.rope_selection == "damage" or not total.any() else total / total.sum()

    def problem(
        self, source: SourceAttention, geometry: MLAGeometry, calibration: Calibration
    ) -> WeightedFactorization:
        split = self._split(source, geometry, calibration)
        return calibrated_problem(source, split, calibration, geometry.latent_bias)

    def convert_layer(
        self, source: SourceAttention, geometry: MLAGeometry, calibration: Calibration | None
    ) -> dict[str, Tensor]:
        g = geometry
        split = self._split(source, g, calibration)
        if self.factorization == "calibrated" and calibration is not None:
            factors = calibrated_factors(source, split, g.kv_lora_rank, calibration, g.latent_bias)
        else:
            down, up = low_rank_factors(stack_rows(source, gained=True), g.kv_lora_rank)
            key_up, value_up = up.view(2, g.num_key_value_heads, g.head_dim, -1)  # each [G, D, r]
            factors = LatentFactors(down, gather_dims(key_up, split.nope), value_up)
        tensors = decoupled_tensors(source, g, split, factors)
        if g.latent_norm:
            down = tensors["kv_a_proj_with_mqa.weight"][: g.kv_lora_rank]
            tensors["kv_a_layernorm.weight"] = latent_gain(source, down, calibration)
        return tensors

    def _split(self, source: SourceAttention, g: MLAGeometry, calibration: Calibration | None) -> RopeSplit:
        if self.rope_selection == "last":
            return split_last_columns(g.head_dim, g.qk_rope_head_dim)
        if self.rope is not None and self.measures_pairs:
            return split_by_pairs(self.rope.counts.nonzero()[:, 0][None], g.head_dim)
        # All key heads share the rotary key, so one selection is made by the sums of their scores.
        scores = self.pair_scores(source, calibration)
        total = None if scores is None else scores.sum(dim=0, keepdim=True)
        return self.select(g, total)
