"""GQA2MLA, which converts grouped-query attention in the form of its paper or in forms made for calibration."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from typing_extensions import Unpack

from optimum_mla.calibrate.calibration import Calibration
from optimum_mla.convert.method import refuse_options
from optimum_mla.convert.signature import MLAOptions
from optimum_mla.convert.transformation import MLATransformation
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.core.number_checks import check_choice, check_integer
from optimum_mla.methods.command_options import GQA2MLA_OPTIONS
from optimum_mla.methods.full_form import full_problem, full_shape, full_tensors
from optimum_mla.methods.mixed_heads import MixedHeads
from optimum_mla.methods.options import calibrated_rank, rope_choices, shapes_that_fit
from optimum_mla.models import SourceAttention
from optimum_mla.ops.weighted import WeightedFactorization


class GQA2MLA(MLATransformation):
    """Latent attention with the same cache as grouped-query attention or a smaller one (TransMLA, arXiv 2502.07864).

    `full` rotates all dims of the up-projected keys, so the latent carries no position (sections 4.1-4.3). The paper's
    `split` replicates W_K to H heads and factorizes it, W'_K = U S Vᵀ, into U √S and √S Vᵀ, and W_V likewise; at full
    rank the outputs and the size of the cache are the source's. With `joint` and `calibrated` both share one latent.
    `decoupled` mixes the key heads of each frequency. The R/2 components whose rotation matters most keep it, in one
    rotary key for all heads. The others are position-free, so decoding can run in latent space.

    Args:
        positional: `full`, the default without calibration tokens, or `decoupled`, the default with them.
        rope_cache: With `decoupled`: `cached` keeps the rotary key beside the latent, as DeepSeek does, and makes
            `uniform` the default of `rank_allocation`; `rebuilt`, the default, makes it from the latent.
        qk_rope_head_dim: R, the number of rotary dims, with `decoupled` only. None takes each layer's best one.
        latent_norm: Whether to put an RMSNorm on the latent, as DeepSeek does, with `cached` only. Its gain is chosen
            so that the norm changes the latents of the calibration tokens least, and there are no biases after it.
        **options: Options of `MLATransformation`. `factorization` may be `split`, `joint` or `calibrated`. With
            `split`, `kv_lora_rank` counts both latents, which get half of it each. With `kv_cache_budget` nothing is
            factorized: at full rank the latent is the keys and values themselves, so that the weights stay.
    """

    name = "gqa2mla"
    command_options = GQA2MLA_OPTIONS
    one_rotary_key = True
    factorizations = ("split", "joint", "calibrated")
    has_codes = True

    def __init__(
        self,
        positional: str | None = None,
        rope_cache: str | None = None,
        qk_rope_head_dim: int | None = None,
        latent_norm: bool = False,
        **options: Unpack[MLAOptions],
    ) -> None:
        own = {"positional": positional, "rope_cache": rope_cache, "qk_rope_head_dim": qk_rope_head_dim}
        if rope_cache == "cached" and options.get("rank_allocation") is None:
            options["rank_allocation"] = "uniform"  # Inference engines need latents of one size in all layers.
        super().__init__(**options)
        if self.coded:
            refuse_options({**own, "latent_norm": latent_norm, **options})
        self.positional = positional or ("decoupled" if self.factorization == "calibrated" else "full")
        self.rope_cache = None if self.positional == "full" else rope_cache or "rebuilt"
        self.qk_rope_head_dim, self.latent_norm = qk_rope_head_dim, latent_norm
        check_choice("positional", self.positional, ("full", "decoupled"))
        if self.positional == "decoupled" and self.factorization != "calibrated":
            remedy = "Give calibration data, or take --positional full."
            raise InvalidValueError("positional", positional, "full without a calibrated factorization", remedy)
        for field in ("rope_cache", "qk_rope_head_dim"):
            if own[field] is not None and self.positional == "full":
                remedy = "Take --positional decoupled."
                raise InvalidValueError(field, own[field], "nothing with positional full", remedy)
        if qk_rope_head_dim is not None:
            check_integer("qk_rope_head_dim", qk_rope_head_dim, "even integers from 2")
        if self.rope_cache is not None:
            check_choice("rope_cache", self.rope_cache, ("cached", "rebuilt"))
        for field in ("latent_norm", "shared_rope"):
            if getattr(self, field) and self.rope_cache != "cached":
                allowed = "False without a cached rotary key"
                raise InvalidValueError(field, True, allowed, "Take --rope-cache cached.")

    @property
    def preserves_computation(self) -> bool:  # type: ignore[override]
        """Return whether the outputs stay the same, which is so at full rank if every dim keeps its rotation."""
        whole = not self.budget.is_set or self.budget.kv_cache_ratio == 1.0 or self.budget.energy == 1.0
        return self.coded or (whole and self.positional == "full" and not self.heal)

    def plan_layer(self, source: SourceAttention) -> MLAGeometry:
        if self.positional == "full":
            return full_shape(source, self.budget, self.factorization)
        g, rope = source.geometry, self.rope_dims
        width = g.num_key_value_heads * g.head_dim
        if rope is not None and (rope % 2 or not 2 <= rope <= width - 2):
            raise InvalidValueError("qk_rope_head_dim", rope, f"even integers from 2 to {width - 2} for this model")
        # If R is still to be chosen, the smallest candidate is planned, because it leaves the most room for the latent.
        return self._decoupled_shape(g, rope or max(2, g.head_dim // 4 // 2 * 2))

    def _decoupled_shape(self, source: MLAGeometry, rope: int) -> MLAGeometry:
        """Return the decoupled shape with R = `rope`, and with the rank that the budget then leaves."""
        g = replace(
            source,
            attention_form="decoupled",
            qk_nope_head_dim=source.head_dim,
            qk_rope_head_dim=rope,
            v_head_dim=source.head_dim,
            num_up_heads=source.num_key_value_heads,
            rope_cache=self.rope_cache,  # type: ignore[arg-type]
            latent_norm=self.latent_norm,
            latent_bias=not self.latent_norm,
        )
        held = 2 * g.num_key_value_heads * g.head_dim - (rope if g.rope_cache == "cached" else 0)
        return replace(g, kv_lora_rank=calibrated_rank(self.budget, g, g.cached_width(1), min(held, g.hidden_size)))

    def candidates(self, source: SourceAttention, geometry: MLAGeometry) -> list[MLAGeometry]:
        if geometry.attention_form == "full" or self.rope_dims is not None:
            return [geometry]
        g = source.geometry
        ropes = rope_choices(g.head_dim, (0.25, 0.5, 1, 1.5, 2, 3, 4), g.num_key_value_heads * g.head_dim - 2)
        return shapes_that_fit(lambda rope: self._decoupled_shape(g, rope), ropes) or [geometry]

    def rotary_damage(self, source: SourceAttention, calibration: Calibration) -> Tensor:
        heads = MixedHeads.of(source, calibration).damage.unflatten(0, (source.geometry.num_key_value_heads, -1))
        return heads.sort(dim=0, descending=True).values

    def problem(
        self, source: SourceAttention, geometry: MLAGeometry, calibration: Calibration
    ) -> WeightedFactorization:
        if geometry.attention_form == "full":
            return full_problem(source, calibration)
        return MixedHeads.of(source, calibration, self.rope).problem(geometry)

    def predicted_error(self, source: SourceAttention, geometry: MLAGeometry, calibration: Calibration) -> float | None:
        rebuilt = geometry.rope_cache == "rebuilt"
        if geometry.attention_form == "full" or (calibration.measures and not rebuilt):
            return None
        like, mixed = self.candidates(source, geometry)[-1], MixedHeads.of(source, calibration, self.rope)
        lost = mixed.problem(like if rebuilt else geometry).error(geometry.kv_lora_rank)
        return lost + mixed.stopped_error(geometry)

    def convert_layer(
        self, source: SourceAttention, geometry: MLAGeometry, calibration: Calibration | None
    ) -> dict[str, Tensor]:
        weighing = calibration if self.factorization == "calibrated" else None
        if geometry.attention_form == "full" or weighing is None:
            return full_tensors(source, geometry, weighing)
        return MixedHeads.of(source, weighing, self.rope).tensors(geometry)
