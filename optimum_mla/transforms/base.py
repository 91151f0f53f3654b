"""The base class of all conversions, which checks, plans, calibrates, converts layer by layer, and assembles.

A method is a subclass that implements `plan_layer`, which returns the shape that a layer gets, and `convert_layer`,
which returns the layer's weights.
"""

from __future__ import annotations

import copy as copying
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_mla.core.errors import CorruptWeightsError, InvalidValueError, UncalibratedWarning
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.core.layers import LayerChoice, parse_layers
from optimum_mla.core.progress import progress
from optimum_mla.families.spec import source_attention
from optimum_mla.families.verify import verify_family
from optimum_mla.models import Family, SourceAttention, family_of
from optimum_mla.models.assemble import assemble_model, converted_config, load_attention
from optimum_mla.nn import LatentAttention
from optimum_mla.ops.weighted import WeightedFactorization
from optimum_mla.transforms.allocation import ALLOCATIONS, allocate_ranks
from optimum_mla.transforms.apply import ModelTransformation
from optimum_mla.transforms.balance import balanced
from optimum_mla.transforms.budget import RankBudget
from optimum_mla.transforms.calibration import CalibrationWalk, LayerCalibration
from optimum_mla.transforms.checks import check_convertible, check_tokens, config_of, converted_already
from optimum_mla.transforms.options import check_choice
from optimum_mla.transforms.probe import check_errors, probe_errors
from optimum_mla.transforms.search import LayerSearch
from optimum_mla.transforms.shared_rope import SharedRope, choose_shared_rope
from optimum_mla.transforms.signature import whole_signature


@dataclass(frozen=True)
class LayerResult:
    """The result of the conversion of one layer.

    Attributes:
        geometry: The layer's new shape.
        output_error: Root-mean-square error of the new attention's output relative to the source attention's, on seeded
            Gaussian states that are scaled like the layer's normed input (see `transforms.probe`). It compares layers
            and methods without any text, and does not replace perplexity as the measure of quality.
        predicted_error: The same error, computed from the tensors of the factorization.
        key_weight: The weight of key errors against value errors that was chosen, or None without a calibrated
            factorization.
        state_error: The relative error in the hidden state after the attention on held-back calibration windows, which
            includes the errors of earlier layers; None without calibration.
        healed_error: The same error after the refit of the output projection, or None without a refit.
    """

    geometry: MLAGeometry
    output_error: float
    predicted_error: float
    key_weight: float | None = None
    state_error: float | None = None
    healed_error: float | None = None


class MLATransformation(ModelTransformation):
    """Converts attention layers to latent attention.

    It applies to a `PreTrainedModel` or to a `GraphModule` that `optimum_mla.trace` returned. Both are changed in place
    and returned. With `copy=True` the argument is left unchanged and a converted copy is returned.

    Args:
        kv_lora_rank: Size of the latent in numbers per token and layer.
        kv_cache_ratio: Size of the cache, including the rotary key, relative to that of the source model.
        energy: Share of the squared singular values that each layer keeps. The ranks then differ between layers.
        layers: `all`, a list such as `0-3,8`, the name of a preset, or indices; see `parse_layers`.
        calibration: Token ids, [N, L], that are run through the model layer by layer; see `transforms.calibration`.
        factorization: One of the method's `factorizations`. `calibrated` weighs errors by what the layer reads and
            writes on the calibration tokens. It is the default with calibration tokens; otherwise the default is the
            form of the method's paper.
        heal: Whether to refit each layer's output projection in closed form, so that the hidden states come close to
            the source's. A refit is kept if it helps on held-back windows. None refits with a calibrated factorization.
        rank_allocation: How the layers share the budget: `uniform`; `energy`, which minimizes the lost shares of the
            layers' weighted energy; or `error`, which minimizes the measured errors. None takes `error` with a
            calibrated factorization of fixed size, and `uniform` otherwise.
        shared_rope: Whether all layers rotate the same number of dims at the same frequencies, which `deepseek_v3` and
            inference engines need. Ranks are then uniform by default. Only methods with one rotary key have it.

    Attributes:
        results: The results of the last call, by the index of the layer.

    Raises:
        InvalidValueError: An option is out of range. Limits that depend on the model are checked when the
            transformation is applied.
        UnsupportedModelError: The model's family or state does not allow a conversion.
        CorruptWeightsError: A weight is not finite.
        VerificationError: A converted layer computes something other than its factorization. The model is unchanged.
    """

    name: ClassVar[str]
    """Name of the method on the command line, in configs and in reports."""

    factorizations: ClassVar[tuple[str, ...]] = ("own",)
    """Values that `factorization` may have. The first one is the default without calibration tokens."""

    one_rotary_key: ClassVar[bool] = False
    """True if each layer has a single rotary key, so that all layers can share its frequencies."""

    default_budget: ClassVar[RankBudget] = RankBudget()
    """The budget if the caller gives none."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = whole_signature(cls)  # type: ignore[attr-defined]

    def __init__(
        self,
        kv_lora_rank: int | None = None,
        kv_cache_ratio: float | None = None,
        energy: float | None = None,
        layers: LayerChoice = "all",
        calibration: Tensor | None = None,
        factorization: str | None = None,
        heal: bool | None = None,
        rank_allocation: str | None = None,
        shared_rope: bool = False,
    ) -> None:
        budget = RankBudget(kv_lora_rank, kv_cache_ratio, energy)
        self.budget = budget if budget.is_set else self.default_budget
        self.layers = (
            layers if isinstance(layers, str) else tuple(layers) if isinstance(layers, Iterable) else (layers,)
        )
        self.calibration = calibration
        measured = calibration is not None
        best = "calibrated" if measured and "calibrated" in self.factorizations else self.factorizations[0]
        self.factorization = factorization or best
        check_choice("factorization", self.factorization, self.factorizations)
        self.heal = self.factorization == "calibrated" if heal is None else heal
        if shared_rope and not self.one_rotary_key:
            raise InvalidValueError("shared_rope", True, "False with this method", "It has a rotary key per head.")
        self.shared_rope = shared_rope
        self.rope: SharedRope | None = None
        shared = self.factorization == "calibrated" and self.budget.energy is None
        self.rank_allocation = rank_allocation or ("error" if shared and not shared_rope else "uniform")
        check_choice("rank_allocation", self.rank_allocation, ALLOCATIONS)
        for field, value, needs in (
            ("factorization", self.factorization, self.factorization == "calibrated"),
            ("heal", self.heal, self.heal),
        ):
            if needs and not measured:
                raise InvalidValueError(field, value, "other values without calibration data", "Give calibration data.")
        if self.rank_allocation != "uniform" and not shared:
            remedy = "Others need a calibrated factorization and a fixed size."
            raise InvalidValueError("rank_allocation", rank_allocation, "uniform here", remedy)
        self.results: dict[int, LayerResult] = {}

    @property
    def options(self) -> dict[str, Any]:
        """Return the value of every option, with defaults filled in, without the calibration tokens."""
        hidden = ("results", "calibration", "budget", "rope")
        own = {name: value for name, value in vars(self).items() if name not in hidden}
        return {**own, **vars(self.budget)}

    @property
    def signature(self) -> int:
        """Return a number that identifies the transformation on the graph nodes that it has changed."""
        return hash((type(self), repr(sorted(self.options.items()))))

    @abstractmethod
    def plan_layer(self, source: SourceAttention) -> MLAGeometry:
        """Return the shape that a layer gets.

        Raises:
            InvalidValueError: The options do not fit the layer.
        """

    @abstractmethod
    def convert_layer(
        self, source: SourceAttention, geometry: MLAGeometry, calibration: LayerCalibration | None
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

    def rotary_damage(self, source: SourceAttention, calibration: LayerCalibration) -> Tensor:
        """Return the damage that is done if a component stops rotating, [components, D/2].

        Each column holds the components of one frequency, with the most damaging one first.
        """
        raise NotImplementedError

    @property
    def rope_dims(self) -> int | None:
        """Return the number of rotary dims if it is fixed, or None if each layer chooses it."""
        return self.rope.dims if self.rope is not None else getattr(self, "qk_rope_head_dim", None)

    def problem(
        self, source: SourceAttention, geometry: MLAGeometry, calibration: LayerCalibration
    ) -> WeightedFactorization:
        """Return the weighted factorization of a calibrated layer, which also gives the energy that each rank holds."""
        raise NotImplementedError

    def without_weights(self) -> MLATransformation:
        """Return a copy of the transformation whose `plan_layer` reads no weights; `check` uses it."""
        other = copying.copy(self)
        if self.budget.energy is not None:
            other.budget = RankBudget()
        return other

    @property
    def needs_calibration(self) -> bool:
        """Return whether layers are measured on the calibration tokens."""
        return self.factorization == "calibrated" or self.heal

    @torch.no_grad()
    def transform(self, graph_module: PreTrainedModel | GraphModule) -> PreTrainedModel | GraphModule:
        """Convert a model in place and return it. It is unchanged until all layers have been converted."""
        model, self.rope = graph_module, None
        if not self.needs_calibration and not self.preserves_computation:
            warnings.warn(
                f"{self.name} without calibration data below full rank: the result is of no use until it is trained. "
                "Give token ids of ordinary text as calibration; optimum_mla.calibrate.built_in_windows returns some.",
                UncalibratedWarning,
                stacklevel=4,  # Behind `__call__` and the decorator of this method.
            )
        family, sources, plans = self.plan(model)
        if isinstance(model, PreTrainedModel):  # `trace` has checked what it traced
            verify_family(model, family.spec, sources)
        source_config = config_of(model)
        walk = None
        if self.needs_calibration and self.calibration is not None:
            if self.shared_rope:
                half = CalibrationWalk(model, family.spec, source_config, self.calibration[::2])
                self.rope = choose_shared_rope(self, family, half, sources, plans)
                plans = {layer: self.plan_layer(source) for layer, source in sources.items()}
            if self.rank_allocation != "uniform":
                # Half of the windows suffice here, because errors are only compared with each other.
                half = CalibrationWalk(model, family.spec, source_config, self.calibration[::2])
                plans = self._allocate(family, half, sources, plans)
            walk = CalibrationWalk(model, family.spec, source_config, self.calibration)

        attentions: dict[int, LatentAttention] = {}
        results: dict[int, LayerResult] = {}
        for layer, source in progress(sources.items(), f"{self.name}: layers"):
            while walk is not None and walk.layer < layer:
                walk.advance()
            built = self._build(family, model, layer, source, plans[layer], walk)
            attentions[layer], results[layer] = built
            if walk is not None:
                walk.advance(attentions[layer])
        geometries = {layer: result.geometry for layer, result in results.items()}
        config = converted_config(family, source_config, geometries, self.name)
        for attention in attentions.values():
            attention.config = config
        self.results = results
        if isinstance(model, GraphModule):
            for layer, node in attention_nodes(model, family, sources):
                model.set_submodule(str(node.target), attentions[layer])
                self.mark_as_transformed(node)
            model.meta["config"] = config
            return model
        return assemble_model(model, family, config, attentions)

    def _build(
        self,
        family: Family,
        model: nn.Module,
        layer: int,
        source: SourceAttention,
        geometry: MLAGeometry,
        walk: CalibrationWalk | None,
    ) -> tuple[LatentAttention, LayerResult]:
        """Return the new attention of one layer in the source's dtype, and the result of its conversion."""
        search, key_weight, state_error, healed_error = None, None, None, None
        if walk is not None:
            search = LayerSearch(self, family, model, layer, source, walk.calibrate(source))
        if search is None or self.factorization != "calibrated":
            tensors = self.convert_layer(source, geometry, None if search is None else search.calibration)
        else:
            if self.rank_allocation == "uniform":  # Otherwise the allocation has already chosen the shape.
                geometry = search.best_shape(geometry)
            tensors = search.best_key_weight(geometry)
            key_weight = search.calibration.key_weight
        if search is not None:
            trial = search.attention(geometry, tensors)
            state_error = search.calibration.error(trial)
            if self.heal:
                healing = search.calibration.heal(trial)
                state_error, healed_error = healing.error_before, healing.error_after
                if healing.weight is not None:
                    tensors["o_proj.weight"] = healing.weight
        cast = balanced(self._cast(source, tensors), geometry)
        attention = load_attention(family, config_of(model), layer, cast, model, geometry).eval()
        measured, predicted = probe_errors(source, attention, tensors)
        check_errors(layer, measured, predicted, attention.o_proj.weight.dtype)
        result = LayerResult(geometry, measured, predicted, key_weight, state_error, healed_error)
        return attention.train(model.training), result

    def _allocate(
        self,
        family: Family,
        walk: CalibrationWalk,
        sources: dict[int, SourceAttention],
        plans: dict[int, MLAGeometry],
    ) -> dict[int, MLAGeometry]:
        """Return the plans with the same total of ranks, distributed over the layers so that their errors are small."""
        plans, curves = dict(plans), {}
        for layer, source in progress(sources.items(), f"{self.name}: rank allocation"):
            while walk.layer < layer:
                walk.advance()
            search = LayerSearch(self, family, walk.model, layer, source, walk.calibrate(source))
            plans[layer] = search.best_shape(plans[layer])
            curves[layer] = search.rank_curve(plans[layer], self.rank_allocation)
        ranks = allocate_ranks(curves, sum(plan.kv_lora_rank for plan in plans.values()))
        return {layer: replace(plans[layer], kv_lora_rank=rank) for layer, rank in ranks.items()}

    def plan(
        self, model: PreTrainedModel | GraphModule
    ) -> tuple[Family, dict[int, SourceAttention], dict[int, MLAGeometry]]:
        """Return the model's family and, by layer, the attention to convert and its new shape, without changing it."""
        family = check_convertible(model)
        sources = self._sources(family, model)
        if self.calibration is not None:
            check_tokens(self.calibration, config_of(model).vocab_size)
        return family, sources, {layer: self.plan_layer(source) for layer, source in sources.items()}

    def check(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Return the config that a conversion would give, judging by the source config alone.

        Ranks that depend on the weights, such as those under an energy budget, differ from those of a conversion.

        Raises:
            MLAError: The options do not fit the model.
        """
        family, weightless, geometries = family_of(config), self.without_weights(), {}
        for layer in parse_layers(self.layers, config.num_hidden_layers):
            geometry = family.spec.geometry(config.per_layer_config[layer])
            if geometry.attention_form != "source":
                raise converted_already(layer)
            source = SourceAttention(family.spec, nn.Module(), geometry, 1.0, torch.empty(0))
            geometries[layer] = weightless.plan_layer(source)
        return converted_config(family, config, geometries, self.name)

    def _sources(self, family: Family, model: nn.Module) -> dict[int, SourceAttention]:
        """Return the attention of every layer to convert, and refuse layers that are already converted."""
        spec, config = family.spec, config_of(model)
        sources = {}
        for layer in parse_layers(self.layers, config.num_hidden_layers):
            if not isinstance(spec.part(model, spec.attention_path(layer), layer), family.source_attention):
                raise converted_already(layer)
            sources[layer] = source_attention(spec, model, config, layer)
        return sources

    def _cast(self, source: SourceAttention, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a layer's tensors in the dtype and on the device of the source's weights, and refuse infinite ones."""
        like = next(source.module.parameters())
        dtype = {name: like.dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
        cast = {name: tensor.to(like.device, dtype[name]).contiguous() for name, tensor in tensors.items()}
        broken = [name for name, tensor in cast.items() if not tensor.isfinite().all()]
        if broken:
            raise CorruptWeightsError(
                f"{self.name}: {', '.join(broken)} left the range of {like.dtype}. Convert in bfloat16 or float32."
            )
        return cast


def attention_nodes(
    graph_module: GraphModule, family: Family, layers: dict[int, SourceAttention]
) -> Iterator[tuple[int, torch.fx.Node]]:
    """Yield the index of each layer and the `call_module` node of its attention."""
    targets = {family.spec.attention_path(layer): layer for layer in layers}
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and node.target in targets:
            yield targets[node.target], node
