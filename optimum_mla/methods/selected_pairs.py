"""The base of methods whose rotary keys are some rotary pairs of the source's heads."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from optimum_mla.calibrate.calibration import Calibration
from optimum_mla.convert.transformation import MLATransformation
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.core.number_checks import check_choice
from optimum_mla.methods.options import rope_choices, shapes_that_fit
from optimum_mla.models import SourceAttention
from optimum_mla.ops.rope_mix import identity_mix
from optimum_mla.ops.rope_split import SCORED_SELECTIONS, RopeSplit, select_pairs, split_by_pairs
from optimum_mla.plan.budget import DEFAULT_CACHE_RATIO, RankBudget


class SelectedPairs(MLATransformation):
    """A method that selects rotary pairs by a rule; a subclass returns the shape for a number of rotary dims."""

    default_budget = RankBudget(kv_cache_ratio=DEFAULT_CACHE_RATIO)

    rope_selections: ClassVar[tuple[str, ...]]
    """Rules that the method has; see `select_pairs`."""

    qk_rope_head_dim: int | None

    @abstractmethod
    def shape(self, source: SourceAttention, rope: int) -> MLAGeometry:
        """Return the shape of a layer with R = `rope` rotary dims per head.

        Raises:
            InvalidValueError: The options do not fit the layer, or the rotary keys leave no room for a latent.
        """

    def choose_selection(self, received: str | None) -> str:
        """Return the rule that selects rotary pairs.

        Args:
            received: The caller's rule, or None, which takes `damage` with calibration tokens and `high` without.

        Raises:
            InvalidValueError: The method has no such rule, or the rule needs calibration tokens.
        """
        if received is None:
            return "high" if self.calibration is None else "damage"
        check_choice("rope_selection", received, self.rope_selections)
        if received in SCORED_SELECTIONS and self.calibration is None:
            others = ", ".join(name for name in self.rope_selections if name not in SCORED_SELECTIONS)
            remedy = "Give calibration data, or another selection."
            raise InvalidValueError("rope_selection", received, f"{others} without calibration tokens", remedy)
        return received

    @property
    def needs_calibration(self) -> bool:
        return super().needs_calibration or self.measures_pairs

    def candidates(self, source: SourceAttention, geometry: MLAGeometry) -> list[MLAGeometry]:
        """Return a shape for each of 1/8, 1/4, 3/8, 1/2 and 3/4 of D rotary dims, if calibration may choose R."""
        if self.rope_dims is not None or self.rope_selection == "last":
            return [geometry]
        ropes = rope_choices(geometry.head_dim, (0.125, 0.25, 0.375, 0.5, 0.75), geometry.head_dim - 2)
        return shapes_that_fit(lambda rope: self.shape(source, rope), ropes)

    def pair_scores(self, source: SourceAttention, calibration: Calibration | None) -> Tensor | None:
        """Return the scores of all rotary pairs by which the rule selects, [G, D/2]; None if it needs no scores."""
        if calibration is None or not self.measures_pairs:
            return None
        if self.rope_selection == "contribution":
            return calibration.once("contribution", calibration.contribution)
        g = source.geometry
        mix = identity_mix(g.num_key_value_heads, g.head_dim // 2, source.key.device)
        damage = calibration.once("damage by pairs", lambda: calibration.damage(mix))
        return damage.unflatten(0, (g.num_key_value_heads, -1))

    def select(self, geometry: MLAGeometry, scores: Tensor | None) -> RopeSplit:
        """Return the split of each rotary key head's dims, given the scores of its pairs, [K, D/2]."""
        g = geometry
        pairs = select_pairs(self.rope_selection, g.head_dim, g.qk_rope_head_dim, scores, g.num_rope_heads)
        return split_by_pairs(pairs, g.head_dim)
