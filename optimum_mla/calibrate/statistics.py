"""Statistics of one layer on a text, with which it can be converted without the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_mla.calibrate.calibration import Calibration
from optimum_mla.calibrate.layer import LayerCalibration
from optimum_mla.calibrate.moments import LayerMoments
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.core.errors import CalibrationDataError
from optimum_mla.families.project import SourceAttention
from optimum_mla.ops.rope_mix import RopeMix, identity_mix


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of one layer, with the names that they have in a file.

    Attributes:
        inputs, input_mean, queries, relative_queries, key_scale: See `LayerMoments`.
        contribution: 2-norm contribution of each rotary pair, [G, D/2].
        damage: Damage that is done if a rotary pair stops rotating, [G·D/2].
        mix_keys, mix_queries: The maps of `Calibration.mix`, [D/2, G, G, 2] with real and imaginary parts.
        mixed_damage: Damage that is done if a component of this mix stops rotating, [G·D/2].
        sample: Normed inputs of some tokens, [T, d]; see `Calibration.inputs`.
        state_weight: Mean weight of a squared error in the hidden state, [1]; see `CalibrationWalk.row_weights`. It
            makes the errors of different layers comparable.
    """

    inputs: Tensor
    input_mean: Tensor
    queries: Tensor
    relative_queries: Tensor
    key_scale: Tensor
    contribution: Tensor
    damage: Tensor
    mix_keys: Tensor
    mix_queries: Tensor
    mixed_damage: Tensor
    sample: Tensor
    state_weight: Tensor

    @classmethod
    def gather(cls, walk: CalibrationWalk, source: SourceAttention) -> LayerStatistics:
        """Return the statistics of the layer that a walk stands before.

        Args:
            walk: A walk in which no layer has been converted.
            source: The layer's attention.
        """
        layer, g = LayerCalibration(walk, source), source.geometry
        plain = identity_mix(g.num_key_value_heads, g.head_dim // 2, walk.device)
        return cls(
            **vars(layer.moments),
            contribution=layer.contribution(),
            damage=layer.damage(plain),
            mix_keys=torch.view_as_real(layer.mix.keys),
            mix_queries=torch.view_as_real(layer.mix.queries),
            mixed_damage=layer.damage(layer.mix),
            sample=layer.inputs(),
            state_weight=walk.row_weights.double().mean()[None],
        )


class StoredCalibration(Calibration):
    """Calibration of one layer by stored statistics.

    Args:
        source: The layer's attention.
        statistics: The statistics of the layer.
    """

    def __init__(self, source: SourceAttention, statistics: LayerStatistics) -> None:
        super().__init__(source)
        device = source.input_gain.device
        self._known = {name: tensor.to(device) for name, tensor in vars(statistics).items()}
        self.state_weight = float(statistics.state_weight)
        # The stored mix belongs to the stored damage: eigenvectors differ between machines where eigenvalues are equal.
        self.mix = RopeMix(*(torch.view_as_complex(self._known[f"mix_{side}"]) for side in ("keys", "queries")))

    @property
    def moments(self) -> LayerMoments:
        return LayerMoments(**{name: self._known[name] for name in LayerMoments.__dataclass_fields__})

    def inputs(self) -> Tensor:
        return self._known["sample"]

    def contribution(self) -> Tensor:
        return self._known["contribution"]

    def damage(self, mix: RopeMix) -> Tensor:
        g = self.source.geometry
        plain = identity_mix(g.num_key_value_heads, g.head_dim // 2, mix.keys.device)
        for known, name in ((self.mix, "mixed_damage"), (plain, "damage")):
            if all(torch.equal(one, other) for one, other in zip(mix, known, strict=True)):
                return self._known[name]
        raise CalibrationDataError(
            "statistics: they do not hold the damage for this mix of the key heads. Give calibration text instead."
        )
