"""MHA2MLA, which keeps a few rotary pairs of each key head and factorizes the rest of keys and values into a latent."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from typing_extensions import Unpack

from optimum_mla.calibrate.calibration import Calibration
from optimum_mla.calibrate.weighting import STOPPED_WEIGHT
from optimum_mla.convert.signature import MLAOptions
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.core.number_checks import check_count
from optimum_mla.methods.command_options import MHA2MLA_OPTIONS
from optimum_mla.methods.decoupled import decoupled_tensors
from optimum_mla.methods.factors import calibrated_factors, calibrated_problem, joint_factors, split_factors, stack_rows
from optimum_mla.methods.options import check_rope_dim
from optimum_mla.methods.selected_pairs import SelectedPairs
from optimum_mla.models import SourceAttention
from optimum_mla.ops.low_rank import singular_values
from optimum_mla.ops.rope_mix import identity_mix
from optimum_mla.ops.rope_split import RopeSplit
from optimum_mla.ops.weighted import WeightedFactorization
from optimum_mla.plan.budget import RankBudget


class MHA2MLA(SelectedPairs):
    """Partial RoPE and a low-rank latent (arXiv 2502.14837, sections 3.1 and 3.2).

    R/2 of the D/2 rotary pairs of each key head keep their rotation and are cached without compression, so there are as
    many rotary keys as key heads G. The other key dims and the values, [W_K,nope , W_V], are factorized by one SVD
    (`joint`), by two SVDs of half the rank each (`split`), or with weights from calibration tokens (`calibrated`).

    Args:
        d_kv: The rank per key head, as the paper counts it; d_kv·G is then the rank of the latent.
        qk_rope_head_dim: R, the number of rotary dims per head. None takes the paper's D/8, or the best R on the
            calibration tokens if the factorization is calibrated.
        rope_selection: The rule that selects the rotary pairs: `high`, `low` or `uniform`, or, measured on calibration
            tokens, `contribution` or `damage`. The default is `damage` with calibration tokens and `high` without.
        **options: Options of `MLATransformation`. `factorization` may be `joint`, `split` or `calibrated`.
    """

    name = "mha2mla"
    command_options = MHA2MLA_OPTIONS
    rope_selections = ("high", "low", "uniform", "contribution", "damage")
    factorizations = ("joint", "split", "calibrated")

    def __init__(
        self,
        d_kv: int | None = None,
        qk_rope_head_dim: int | None = None,
        rope_selection: str | None = None,
        **options: Unpack[MLAOptions],
    ) -> None:
        super().__init__(**options)
        if d_kv is not None and any(options.get(name) is not None for name in vars(RankBudget())):
            raise InvalidValueError("d_kv", d_kv, "nothing beside another rank option", "Give one of them.")
        if d_kv is not None:
            check_count("d_kv", d_kv)
            self.budget = RankBudget()  # `d_kv` sets the rank, so the default budget does not apply.
        self.d_kv, self.qk_rope_head_dim = d_kv, qk_rope_head_dim
        self.rope_selection = self.choose_selection(rope_selection)

    def plan_layer(self, source: SourceAttention) -> MLAGeometry:
        head_dim = source.geometry.head_dim
        return self.shape(source, check_rope_dim(self.qk_rope_head_dim, head_dim, default=head_dim // 8))

    def shape(self, source: SourceAttention, rope: int) -> MLAGeometry:
        g = source.geometry
        heads, nope = g.num_key_value_heads, g.head_dim - rope
        overhead = heads * rope + (heads if g.key_norm else 0)
        if self.factorization != "split":
            largest, smallest = min(g.hidden_size, heads * (nope + g.head_dim)), 1
        else:
            largest, smallest = 2 * min(g.hidden_size, heads * min(nope, g.head_dim)), 2
        if self.d_kv is not None:
            if not smallest <= self.d_kv * heads <= largest:
                raise InvalidValueError("d_kv", self.d_kv, f"1 to {largest // heads} for this model and method")
            rank = self.d_kv * heads
        else:
            # The energy is that of the whole weight, because the pairs that rotate are not known before measuring.
            rank = self.budget.rank(
                g.source_cache_numbers,
                overhead,
                largest,
                lambda: singular_values(stack_rows(source)),
                smallest,
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
            latent_bias=self.factorization == "calibrated",
        )

    def _split(self, source: SourceAttention, geometry: MLAGeometry, calibration: Calibration | None) -> RopeSplit:
        return self.select(geometry, self.pair_scores(source, calibration))

    def problem(
        self, source: SourceAttention, geometry: MLAGeometry, calibration: Calibration
    ) -> WeightedFactorization:
        return calibrated_problem(source, self._split(source, geometry, calibration), calibration)

    def predicted_error(self, source: SourceAttention, geometry: MLAGeometry, calibration: Calibration) -> float | None:
        if calibration.measures:
            return None
        stopped = self._split(source, geometry, calibration).nope  # [G, n]
        pairs = geometry.head_dim // 2
        mix = identity_mix(geometry.num_key_value_heads, pairs, stopped.device)
        damage = calibration.damage(mix).unflatten(0, (-1, pairs)).gather(1, stopped % pairs).sum() / 2
        return self.problem(source, geometry, calibration).error(geometry.kv_lora_rank) + STOPPED_WEIGHT * float(damage)

    def convert_layer(
        self, source: SourceAttention, geometry: MLAGeometry, calibration: Calibration | None
    ) -> dict[str, Tensor]:
        split = self._split(source, geometry, calibration)
        if self.factorization == "calibrated" and calibration is not None:
            factors = calibrated_factors(source, split, geometry.kv_lora_rank, calibration)
        else:
            plain = joint_factors if self.factorization == "joint" else split_factors
            factors = plain(source, split, geometry.kv_lora_rank)
        return decoupled_tensors(source, geometry, split, factors)
