"""The interface of methods: the options that all of them share, and the questions that each one answers.

A method is a subclass of `MLATransformation` (`optimum_mla.convert.transformation`) that implements `plan_layer`, which
returns the shape that a layer gets, and `convert_layer`, which returns the layer's weights. It holds options and
nothing of a conversion: what `optimum_mla.convert.Run` finds, it keeps itself.
"""

from __future__ import annotations

import copy as copying
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from typing_extensions import Self, Unpack

from optimum_mla.calibrate.calibration import Calibration
from optimum_mla.calibrate.statistics_folder import CalibrationStatistics
from optimum_mla.convert.signature import MethodOptions, MLAOptions, check_method, whole_signature
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.core.layers import parse_layers
from optimum_mla.core.number_checks import check_choice
from optimum_mla.families.spec import full_layers
from optimum_mla.models import SourceAttention, family_of
from optimum_mla.models.assemble import converted_config
from optimum_mla.models.checks import converted_already
from optimum_mla.ops.rope_split import SCORED_SELECTIONS, fixed_pairs
from optimum_mla.ops.rotary import PairTable
from optimum_mla.ops.shared_rope import SharedRope, regular_pairs
from optimum_mla.ops.weighted import WeightedFactorization
from optimum_mla.plan.allocation import ALLOCATIONS
from optimum_mla.plan.budget import RankBudget

CODED_OPTIONS = ("calibration", "kv_cache_budget", "layers")
"""The options that a budget of bytes leaves room for."""


class ConversionMethod(ABC):
    """The options of a method, and the questions that it answers; `MLATransformation` describes the options."""

    name: ClassVar[str]
    """Name of the method on the command line, in configs and in reports."""

    factorizations: ClassVar[tuple[str, ...]] = ("own",)
    """Values that `factorization` may have. The first one is the default without calibration tokens."""

    one_rotary_key: ClassVar[bool] = False
    """True if each layer has a single rotary key, so that all layers can share its frequencies."""

    has_codes: ClassVar[bool] = False
    """True if the method takes a budget of bytes, under which a codec is fitted and the weights stay."""

    rope_selection: str = "damage"
    """The rule that selects the rotary pairs of a layer."""

    default_budget: ClassVar[RankBudget] = RankBudget()
    """The budget if the caller gives none."""

    rope: SharedRope | None = None
    """The rotary dims that all layers share, in a copy that `sharing` returned."""

    command_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """The class's own keyword arguments that `mla-convert` takes as options, each with a declaration.

    A declaration has a `help` text and may have `type` (`int`, `float`; `bool` makes a pair of switches, as of `heal`),
    `metavar`, `choices`, `nargs` and `const` as `ArgumentParser.add_argument` has them, and `flag` if the option has
    another name. `group` is the title under which the help shows an option of a built-in method; those of a package
    have a group of their own. The default is that of the keyword argument, because only what a user gives is passed on.
    """

    problem: Callable[[SourceAttention, MLAGeometry, Calibration], WeightedFactorization]
    """Returns the weighted factorization of a calibrated layer, which also gives the energy that each rank holds.

    A method with the factorization `calibrated` has to define it.
    """

    rotary_damage: Callable[[SourceAttention, Calibration], Tensor]
    """Returns the damage that is done if a component stops rotating, [components, D/2].

    Each column holds the components of one frequency, with the most damaging one first. A method with `one_rotary_key`
    has to define it, because `shared_rope` asks for it.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = signature = whole_signature(cls)  # type: ignore[attr-defined]
        own = vars(cls).get("command_options", {})
        inherited = [vars(base).get("command_options", {}) for base in reversed(cls.__mro__[1:])]
        passed_on = {
            name: one for options in inherited for name, one in options.items() if name in signature.parameters
        }
        cls.command_options = passed_on | own
        check_method(cls)

    def __init__(self, **options: Unpack[MLAOptions]) -> None:
        for name in options.keys() - vars(MethodOptions()).keys():
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")
        given = MethodOptions(**options)
        budget = RankBudget(given.kv_lora_rank, given.kv_cache_ratio, given.energy, given.kv_cache_budget)
        self.budget = budget if budget.is_set else self.default_budget
        layers = given.layers
        self.layers = (
            layers if isinstance(layers, str) else tuple(layers) if isinstance(layers, Iterable) else (layers,)
        )
        self.calibration = given.calibration
        measured = self.calibration is not None
        best = "calibrated" if measured and "calibrated" in self.factorizations else self.factorizations[0]
        self.factorization = given.factorization or best
        check_choice("factorization", self.factorization, self.factorizations)
        stored = isinstance(self.calibration, CalibrationStatistics)
        self.heal = self.factorization == "calibrated" and not stored if given.heal is None else given.heal
        if self.heal and stored:
            remedy = "Give calibration text: the refit needs the states of its tokens."
            raise InvalidValueError("heal", True, "False with statistics", remedy)
        self.shared_rope = given.shared_rope
        if not isinstance(self.shared_rope, bool):
            check_choice("shared_rope", self.shared_rope, ("regular",))
        if self.shared_rope and not self.one_rotary_key:
            raise InvalidValueError("shared_rope", True, "False with this method", "It has a rotary key per head.")
        shared = self.factorization == "calibrated" and self.budget.energy is None
        self.rank_allocation = given.rank_allocation or ("error" if shared and not self.shared_rope else "uniform")
        check_choice("rank_allocation", self.rank_allocation, ALLOCATIONS)
        if self.coded:
            self._check_coded()
        for field, value, needs in (
            ("factorization", self.factorization, self.factorization == "calibrated"),
            ("heal", self.heal, self.heal),
        ):
            if needs and not measured:
                raise InvalidValueError(field, value, "other values without calibration data", "Give calibration data.")
        if self.rank_allocation != "uniform" and not shared:
            remedy = "Others need a calibrated factorization and a fixed size."
            raise InvalidValueError("rank_allocation", given.rank_allocation, "uniform here", remedy)

    @property
    def coded(self) -> bool:
        """Return whether there is a budget of bytes, under which the weights stay and old tokens become codes."""
        return self.budget.kv_cache_budget is not None

    def _check_coded(self) -> None:
        """Refuse a budget of bytes where the method has no codes, or nothing to fit them to."""
        budget = self.budget.kv_cache_budget
        if not self.has_codes:
            remedy = "Take gqa2mla, or give kv_cache_ratio."
            raise InvalidValueError("kv_cache_budget", budget, f"nothing with {self.name}", remedy)
        if self.calibration is None:
            remedy = "Give calibration data: codes are fitted to a text."
            raise InvalidValueError("kv_cache_budget", budget, "nothing without calibration", remedy)

    def covered_layers(self, config: PreTrainedConfig) -> tuple[int, ...]:
        """Return the indices of the layers that a conversion of a model covers, in rising order.

        Raises:
            InvalidValueError: The choice of layers is malformed or empty, or the model has fewer layers.
        """
        chosen = parse_layers(self.layers, config.num_hidden_layers)
        return tuple(full_layers(config)) if self.layers == "all" else chosen

    @property
    def options(self) -> dict[str, Any]:
        """Return the value of every option, with defaults filled in, without the calibration tokens."""
        hidden = ("calibration", "budget", "rope")
        if self.coded:
            return {"layers": self.layers, "kv_cache_budget": self.budget.kv_cache_budget}
        own = {name: value for name, value in vars(self).items() if name not in hidden}
        return {**own, **vars(self.budget)}

    @abstractmethod
    def plan_layer(self, source: SourceAttention) -> MLAGeometry:
        """Return the shape that a layer gets.

        Raises:
            InvalidValueError: The options do not fit the layer.
        """

    @abstractmethod
    def convert_layer(
        self, source: SourceAttention, geometry: MLAGeometry, calibration: Calibration | None
    ) -> dict[str, Tensor]:
        """Return the layer's new parameters and buffers by their names in the attention module, in float64.

        Args:
            source: The attention to replace.
            geometry: The new shape, which is the result of `plan_layer` or one of `candidates`.
            calibration: Measurements at this layer, or None unless `needs_calibration`.
        """

    def candidates(self, source: SourceAttention, geometry: MLAGeometry) -> list[MLAGeometry]:
        """Return shapes of one cache size, cheapest first, from which calibration data choose the best."""
        return [geometry]

    @property
    def rope_dims(self) -> int | None:
        """Return the number of rotary dims if it is fixed, or None if each layer chooses it."""
        return self.rope.dims if self.rope is not None else getattr(self, "qk_rope_head_dim", None)

    @property
    def same_rotary_dims(self) -> bool:
        """Return whether all layers rotate the same number of dims at the same frequencies."""
        fixed = self.rope_dims is not None or self.rope_selection == "last" or not self.needs_calibration
        return bool(self.shared_rope) or (fixed and not self.measures_pairs)

    @property
    def measures_pairs(self) -> bool:
        """Return whether calibration chooses the rotary pairs of a layer."""
        return self.rope_selection in SCORED_SELECTIONS

    def rotary_pairs(self, geometry: MLAGeometry) -> Tensor | None:
        """Return the source's rotary pairs with which a layer rotates, [R/2], or None if they are measured.

        With a regular `shared_rope` whose number of rotary dims is still to be chosen, they are some of those returned.

        Args:
            geometry: The planned shape of the layer.

        Raises:
            InvalidValueError: The number of rotary dims does not allow a regular `shared_rope`.
        """
        if not self.measures_pairs:
            return fixed_pairs(self.rope_selection, geometry.head_dim, geometry.qk_rope_head_dim)
        if self.shared_rope != "regular":
            return None
        return regular_pairs(geometry.head_dim // 2, self.rope_dims or geometry.head_dim)

    def predicted_error(self, source: SourceAttention, geometry: MLAGeometry, calibration: Calibration) -> float | None:
        """Return the squared error of a shape that follows from closed forms, to compare the shapes of one layer.

        It has no unit. None means that the shapes have to be measured, because no closed form orders them well enough.
        Where `calibration` cannot measure, methods return an error whose order is less certain, if they have any.
        """
        return None

    def without_weights(self) -> Self:
        """Return a copy of the method whose `plan_layer` reads no weights; `check` uses it."""
        other = copying.copy(self)
        if self.budget.energy is not None:
            other.budget = RankBudget()
        return other

    @property
    def needs_calibration(self) -> bool:
        """Return whether layers are measured on the calibration tokens."""
        return self.factorization == "calibrated" or self.heal

    def sharing(self, rope: SharedRope) -> Self:
        """Return a copy of the method whose layers all have the given rotary dims."""
        other = copying.copy(self)
        other.rope = rope
        return other

    def check(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Return the config that a conversion would give, judging by the source config alone.

        Under a budget of bytes the attention stays, and so does the config.

        Ranks that depend on the weights, such as those under an energy budget, differ from those of a conversion.

        Raises:
            MLAError: The options do not fit the model.
        """
        if self.coded:
            return config
        family, weightless, geometries = family_of(config), self.without_weights(), {}
        for layer in self.covered_layers(config):
            geometry = family.spec.geometry(config.per_layer_config[layer])
            if geometry.attention_form != "source":
                raise converted_already(layer)
            source = SourceAttention(family.spec, nn.Module(), geometry, PairTable(geometry.head_dim), torch.empty(0))
            geometries[layer] = weightless.plan_layer(source)
        return converted_config(family, config, geometries, self.name)


def refuse_options(given: Mapping[str, Any]) -> None:
    """Refuse options about weights under a budget of bytes, which leaves the weights alone.

    Args:
        given: Options by name; None stands for one that was not given.

    Raises:
        InvalidValueError: One of them is about weights.
    """
    for name, value in given.items():
        if name not in CODED_OPTIONS and value is not None and value is not False:
            remedy = "It is about converted weights, and these stay. Leave it out, or give kv_cache_ratio."
            raise InvalidValueError(name, value, "nothing with kv_cache_budget", remedy)
