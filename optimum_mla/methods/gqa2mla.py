"""GQA2MLA, which converts grouped-query attention in the form of its paper or in forms made for calibration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from optimum_mla.calibrate.calibration import Calibration
from optimum_mla.calibrate.weighting import key_moments, value_moments
from optimum_mla.convert.method import refuse_options
from optimum_mla.convert.signature import MLAOptions
from optimum_mla.convert.transformation import MLATransformation
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.core.number_checks import check_choice, check_integer
from optimum_mla.methods.mixed_heads import MixedHeads
from optimum_mla.methods.options import shapes_that_fit
from optimum_mla.models import SourceAttention
from optimum_mla.ops.low_rank import low_rank_factors, rank_for_energy, singular_values
from optimum_mla.ops.weighted import WeightedFactorization, WeightedRows

ROPE_CANDIDATES = (0.25, 0.5, 1, 1.5, 2, 3, 4)
"""Numbers of rotary dims from which calibration chooses, as multiples of the head dim."""


class GQA2MLA(MLATransformation):
    """Latent attention with the same cache as grouped-query attention or a smaller one (TransMLA, arXiv 2502.07864).

    `positional` says which keys are rotated:

    - `full` rotates all dims of the up-projected keys, so the latent carries no position (sections 4.1-4.3). The
      paper's `split` factorization replicates W_K to H heads and factorizes it, W'_K = U S Vᵀ, into W_K^a = U √S
      (d × r_k) and W_K^b = √S Vᵀ (r_k × H·D), and does the same with W_V. At full rank the outputs and the size of the
      cache are those of the source, and training can give every query head keys and values of its own. With `joint` or
      `calibrated` keys and values share one latent.
    - `decoupled` mixes the key heads of each rotary frequency. The R/2 components whose rotation matters most keep it,
      in one rotary key that all heads share. The other components are position-free, so decoding can run in latent
      space. The rotary key is `cached` beside the latent, as in DeepSeek, or `rebuilt` from the latent, so that only
      the latent is cached.

    The default is `full` with `split` without calibration tokens, and `decoupled` with `rebuilt` and `calibrated` with
    them. Under a budget of bytes (`kv_cache_budget`) nothing is factorized: at full rank the latent is the keys and the
    values themselves (section 4.1), so the weights stay, and old tokens are kept as codes.

    Args:
        positional: `full` or `decoupled`.
        rope_cache: `cached` or `rebuilt`, with `decoupled` only. With `cached`, the default of `rank_allocation` is
            `uniform`.
        qk_rope_head_dim: R, the number of rotary dims, with `decoupled` only. None chooses it in each layer by the
            measured error.
        latent_norm: Whether to put an RMSNorm on the latent, as DeepSeek does, with `cached` only. Its gain is chosen
            so that the norm changes the latents of the calibration tokens least, and there are no biases after it.
        **options: Options of `MLATransformation`. `factorization` may be `split`, `joint` or `calibrated`. With
            `split`, `kv_lora_rank` counts both latents, which get half of it each.
    """

    name = "gqa2mla"
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
        decoupled = self.factorization == "calibrated"
        self.positional = positional or ("decoupled" if decoupled else "full")
        check_choice("positional", self.positional, ("full", "decoupled"))
        if self.positional == "decoupled" and not decoupled:
            remedy = "Give calibration data, or take --positional full."
            raise InvalidValueError("positional", positional, "full without a calibrated factorization", remedy)
        for field in ("rope_cache", "qk_rope_head_dim"):
            value = own[field]
            if value is not None and self.positional == "full":
                raise InvalidValueError(field, value, "nothing with positional full", "Take --positional decoupled.")
        if qk_rope_head_dim is not None:
            check_integer("qk_rope_head_dim", qk_rope_head_dim, "even integers from 2")
        self.rope_cache = None if self.positional == "full" else rope_cache or "rebuilt"
        if self.rope_cache is not None:
            check_choice("rope_cache", self.rope_cache, ("cached", "rebuilt"))
        self.qk_rope_head_dim, self.latent_norm = qk_rope_head_dim, latent_norm
        if latent_norm and self.rope_cache != "cached":
            raise InvalidValueError(
                "latent_norm", True, "False without a cached rotary key", "Take --rope-cache cached."
            )
        if self.shared_rope and self.rope_cache != "cached":
            raise InvalidValueError(
                "shared_rope", True, "False without a cached rotary key", "Take --rope-cache cached."
            )

    @property
    def preserves_computation(self) -> bool:  # type: ignore[override]
        """Return whether the outputs stay the same, which is so at full rank if every dim keeps its rotation."""
        whole = not self.budget.is_set or self.budget.kv_cache_ratio == 1.0 or self.budget.energy == 1.0
        return self.coded or (whole and self.positional == "full" and not self.heal)

    def plan_layer(self, source: SourceAttention) -> MLAGeometry:
        g = source.geometry
        width = g.num_key_value_heads * g.head_dim
        biased = self.factorization == "calibrated" and not self.latent_norm
        common = replace(g, v_head_dim=g.head_dim, latent_bias=biased, latent_norm=self.latent_norm)
        if self.positional == "decoupled":
            return self._plan_decoupled(common)
        if self.factorization == "split":
            ranks = self._split_ranks(source, min(width, g.hidden_size))
            shape = {"k_lora_rank": ranks[0], "v_lora_rank": ranks[1], "num_up_heads": g.num_attention_heads}
        else:
            largest = min(2 * width, g.hidden_size)
            energies = None if self.factorization == "calibrated" else lambda: singular_values(_stack(source))
            shape = {"kv_lora_rank": self._rank(g, 0, largest, energies), "num_up_heads": g.num_key_value_heads}
        return replace(common, attention_form="full", qk_rope_head_dim=g.head_dim, **shape)  # type: ignore[arg-type]

    def _rank(self, g: MLAGeometry, overhead: int, largest: int, energies: Any) -> int:
        if self.budget.energy is not None and energies is None:
            return largest  # The rank is set from the weighted energies once the layer has been measured.
        return self.budget.rank(g.source_cache_numbers, overhead, largest, energies)

    def _split_ranks(self, source: SourceAttention, full: int) -> list[int]:
        if self.budget.energy is not None:
            weights = (source.key, source.value)
            return [rank_for_energy(singular_values(w.flatten(0, 1)), self.budget.energy) for w in weights]
        cache = source.geometry.source_cache_numbers
        both = self.budget.rank(cache, 0, 2 * full, lambda: torch.empty(0), smallest=2)
        return [both // 2, both - both // 2]

    def _plan_decoupled(self, g: MLAGeometry) -> MLAGeometry:
        width = g.num_key_value_heads * g.head_dim
        rope = self.rope_dims
        if rope is not None and (rope % 2 or not 2 <= rope <= width - 2):
            raise InvalidValueError("qk_rope_head_dim", rope, f"even integers from 2 to {width - 2} for this model")
        # If R is still to be chosen, the smallest candidate is planned, because it leaves the most room for the latent.
        rope = rope or max(2, int(ROPE_CANDIDATES[0] * g.head_dim) // 2 * 2)
        geometry = replace(
            g,
            attention_form="decoupled",
            qk_nope_head_dim=g.head_dim,
            qk_rope_head_dim=rope,
            num_rope_heads=1,
            num_up_heads=g.num_key_value_heads,
            rope_cache=self.rope_cache,  # type: ignore[arg-type]
        )
        return self._with_rope(geometry, rope)

    def _with_rope(self, geometry: MLAGeometry, rope: int) -> MLAGeometry:
        """Return the shape with another number of rotary dims, and the rank that the budget then leaves."""
        g = replace(geometry, qk_rope_head_dim=rope)
        held = 2 * g.num_key_value_heads * g.head_dim - (rope if g.rope_cache == "cached" else 0)
        return replace(g, kv_lora_rank=self._rank(g, g.cached_width(1), min(held, g.hidden_size), None))

    def candidates(self, source: SourceAttention, geometry: MLAGeometry) -> list[MLAGeometry]:
        """Return a shape for every number of rotary dims that the budget allows."""
        if geometry.attention_form == "full" or self.rope_dims is not None:
            return [geometry]
        width = geometry.num_key_value_heads * geometry.head_dim
        ropes = dict.fromkeys(max(2, int(share * geometry.head_dim) // 2 * 2) for share in ROPE_CANDIDATES)
        return shapes_that_fit(lambda rope: self._with_rope(geometry, rope), [r for r in ropes if r <= width - 2]) or [
            geometry
        ]

    def rotary_damage(self, source: SourceAttention, calibration: Calibration) -> Tensor:
        heads = MixedHeads.of(source, calibration).damage.unflatten(0, (source.geometry.num_key_value_heads, -1))
        return heads.sort(dim=0, descending=True).values

    def problem(
        self, source: SourceAttention, geometry: MLAGeometry, calibration: Calibration
    ) -> WeightedFactorization:
        if geometry.attention_form == "decoupled":
            mixed = MixedHeads.of(source, calibration, self.rope)
            return mixed.problem(geometry)
        # The gain of a key norm is part of the readers here, because it stays in the norm, after the latent.
        gain = source.key_gain
        return calibration.factorization(
            "full",
            lambda: [
                WeightedRows(
                    source.key.flatten(0, 1),
                    gain[..., None] * key_moments(source, calibration.moments, rotating=True) * gain[:, None],
                ),
                WeightedRows(source.value.flatten(0, 1), value_moments(source)),
            ],
        )

    def predicted_error(self, source: SourceAttention, geometry: MLAGeometry, calibration: Calibration) -> float | None:
        rebuilt = geometry.rope_cache == "rebuilt"
        if geometry.attention_form != "decoupled" or (calibration.measures and not rebuilt):
            return None
        like, mixed = self.candidates(source, geometry)[-1], MixedHeads.of(source, calibration, self.rope)
        lost = mixed.problem(like if rebuilt else geometry).error(geometry.kv_lora_rank)
        return lost + mixed.stopped_error(geometry)

    def convert_layer(
        self, source: SourceAttention, geometry: MLAGeometry, calibration: Calibration | None
    ) -> dict[str, Tensor]:
        g = geometry
        if g.attention_form == "decoupled" and calibration is not None:
            return MixedHeads.of(source, calibration, self.rope).tensors(g)
        tensors = {"q_proj.weight": source.query.flatten(0, 1), **source.output()}
        if g.query_bias:
            tensors["q_proj.bias"] = source.query_bias.flatten()
        if g.key_norm:
            tensors |= {"q_norm.weight": source.query_gain, "k_norm.weight": source.key_gain}
        return tensors | (self._joint(source, g, calibration) if g.kv_lora_rank else self._split(source, g))

    def _split(self, source: SourceAttention, g: MLAGeometry) -> dict[str, Tensor]:
        """Return the projections of the paper's two latents, one for keys and one for values."""
        share = g.num_up_heads // g.num_key_value_heads
        tensors = {}
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
            if g.up_bias:
                tensors[f"{side}_b_proj.bias"] = bias.repeat_interleave(share, dim=0).flatten()
        return tensors

    def _joint(self, source: SourceAttention, g: MLAGeometry, calibration: Calibration | None) -> dict[str, Tensor]:
        """Return the projections of one latent for both keys and values."""
        biases = torch.cat([source.key_bias.flatten(), source.value_bias.flatten()])
        weight = _stack(source)
        if calibration is None or self.factorization == "joint":
            down, up = low_rank_factors(weight, g.kv_lora_rank)
        else:
            factors = self.problem(source, g, calibration).factors(g.kv_lora_rank)
            down, up = factors.down, torch.cat(factors.ups)
            center = calibration.moments.input_mean
            biases = biases + weight @ center - up @ (down @ center)
        keys = g.num_up_heads * g.head_dim
        tensors = {"kv_a_proj.weight": down, "k_b_proj.weight": up[:keys], "v_b_proj.weight": up[keys:]}
        if g.up_bias:
            tensors |= {"k_b_proj.bias": biases[:keys], "v_b_proj.bias": biases[keys:]}
        return tensors


def _stack(source: SourceAttention) -> Tensor:
    """Return the key and value weights stacked, [2·G·D, d]."""
    return torch.cat([source.key.flatten(0, 1), source.value.flatten(0, 1)])
