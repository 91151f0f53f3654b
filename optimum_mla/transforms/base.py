"""The mechanism that every conversion shares: check, plan, collect, convert layer by layer, assemble.

A method is a subclass with two answers: `plan_layer` (what shape a layer gets) and `convert_layer` (its weights).
"""

from __future__ import annotations

import copy as copying
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_mla.errors import CorruptWeightsError, InvalidValueError
from optimum_mla.families.spec import source_attention
from optimum_mla.families.verify import verify_family
from optimum_mla.geometry import MLAGeometry
from optimum_mla.layers import LayerChoice, parse_layers
from optimum_mla.models import Family, SourceAttention, family_of
from optimum_mla.models.assemble import assemble_model, converted_config, load_attention
from optimum_mla.nn import LatentAttention
from optimum_mla.ops.weighted import WeightedFactorization
from optimum_mla.progress import progress
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


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer.

    Attributes:
        geometry: Its new shape.
        output_error: Relative root-mean-square error of the attention's output, new against source, on seeded Gaussian
            states scaled like the layer's normed input (`transforms.probe`). It compares layers and methods without any
            text; perplexity is what counts.
        predicted_error: The same error as the factorization's own tensors predict it.
        key_weight: The weight of key against value errors that was found, or None without calibration.
        state_error: Error in the hidden state behind the attention on held-back calibration windows, relative to the
            state, earlier layers' errors included; or None.
        healed_error: The same after the refit of the output projection, or None where it was not refitted.
    """

    geometry: MLAGeometry
    output_error: float
    predicted_error: float
    key_weight: float | None = None
    state_error: float | None = None
    healed_error: float | None = None


class MLATransformation(ModelTransformation):
    """Converts attention layers to latent attention.

    Applies to a `PreTrainedModel` or to a `GraphModule` from `optimum_mla.trace`. Both are changed in place and
    returned; `copy=True` leaves the argument as it was and returns a converted copy.

    Args:
        kv_lora_rank: Numbers in the latent, per token and layer.
        kv_cache_ratio: Cached numbers over the source's, rotary key included.
        energy: Share of the squared singular values that each layer keeps; ranks then differ between layers.
        layers: `all`, a list such as `0-3,8`, a preset's name, or indices; see `parse_layers`.
        calibration: Token ids [N, L] to run through the model, layer by layer; see `transforms.calibration`.
        factorization: One of the method's `factorizations`. `calibrated` weighs errors by what the layer really reads
            and writes; it is the default with calibration tokens, the paper's own form without.
        heal: Refit each layer's output projection in closed form, so that the converted block gives the source's hidden
            states; kept where it helps on held-back windows. None: with a calibrated factorization.
        rank_allocation: How calibrated layers share the budget: `uniform`, `energy` (the same share of each layer's
            weighted energy is lost), or `error` (where the measured error falls most). None: `error` where it can be.
        shared_rope: All layers rotate as many dims at the same frequencies, which `deepseek_v3` and its engines need;
            the ranks are then uniform unless `rank_allocation` says otherwise. For methods with one rotary key.

    Attributes:
        results: By layer, what the last call did.

    Raises:
        InvalidValueError: An option is out of range; when it is applied, with the range for the model at hand.
        UnsupportedModelError: The model's family, or its state, does not allow a conversion.
        CorruptWeightsError: A weight is not finite.
        VerificationError: A converted layer computes something else than its factorization; the model is as it was.
    """

    name: ClassVar[str]
    """Name on the command line, in configs and in reports."""

    factorizations: ClassVar[tuple[str, ...]] = ("own",)
    """What `factorization` may be; the first is the default without calibration tokens."""

    one_rotary_key: ClassVar[bool] = False
    """Whether layers have a single rotary key, which they can share the frequencies of."""

    default_budget: ClassVar[RankBudget] = RankBudget()
    """Used where the caller sets none."""

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
        """Every option, defaults resolved, without the calibration tokens."""
        hidden = ("results", "calibration", "budget", "rope")
        own = {name: value for name, value in vars(self).items() if name not in hidden}
        return {**own, **vars(self.budget)}

    @property
    def signature(self) -> int:
        """Identifies the transformation on the graph nodes that it has changed."""
        return hash((type(self), repr(sorted(self.options.items()))))

    @abstractmethod
    def plan_layer(self, source: SourceAttention) -> MLAGeometry:
        """The shape that a layer gets. Raises `InvalidValueError` where the options do not fit it."""

    @abstractmethod
    def convert_layer(
        self, source: SourceAttention, geometry: MLAGeometry, calibration: LayerCalibration | None
    ) -> dict[str, Tensor]:
        """The layer's new parameters and buffers by their names in the attention module, in float64.

        Args:
            source: Weights of the attention to replace.
            geometry: What `plan_layer` gave, or the chosen one of `candidates`.
            calibration: Measurements at this layer, or None unless `needs_calibration`.
        """

    def candidates(self, source: SourceAttention, geometry: MLAGeometry) -> list[MLAGeometry]:
        """Shapes of the same cache size for the calibration data to choose from, cheapest first."""
        return [geometry]

    def rotary_damage(self, source: SourceAttention, calibration: LayerCalibration) -> Tensor:
        """What stopping a rotation costs, [slots, D/2]: for each frequency its components, the costliest first."""
        raise NotImplementedError

    @property
    def rope_dims(self) -> int | None:
        """R where it is not each layer's to choose."""
        return self.rope.dims if self.rope is not None else getattr(self, "qk_rope_head_dim", None)

    def problem(
        self, source: SourceAttention, geometry: MLAGeometry, calibration: LayerCalibration
    ) -> WeightedFactorization:
        """What a calibrated layer factorizes; tells the energy that each rank holds."""
        raise NotImplementedError

    def without_weights(self) -> MLATransformation:
        """The same transformation, planning without the options that read weights; for `check`."""
        other = copying.copy(self)
        if self.budget.energy is not None:
            other.budget = RankBudget()
        return other

    @property
    def needs_calibration(self) -> bool:
        """Whether layers are measured on the calibration tokens."""
        return self.factorization == "calibrated" or self.heal

    @torch.no_grad()
    def transform(self, graph_module: PreTrainedModel | GraphModule) -> PreTrainedModel | GraphModule:
        """Convert in place. Nothing is changed before every layer has been planned and converted."""
        model, self.rope = graph_module, None
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
                # Errors are only compared here, which half of the windows do as well.
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
        """One layer's new attention in the source's dtype, and what became of the layer."""
        search, key_weight, state_error, healed_error = None, None, None, None
        if walk is not None:
            search = LayerSearch(self, family, model, layer, source, walk.calibrate(source))
        if search is None or self.factorization != "calibrated":
            tensors = self.convert_layer(source, geometry, None if search is None else search.calibration)
        else:
            if self.rank_allocation == "uniform":  # else the allocation has chosen the shape
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
        """The plans with the latents' numbers, together as many as before, where they lower the error most."""
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
        """The model's family and, by layer, the attention to convert and the shape that it gets. Changes nothing."""
        family = check_convertible(model)
        sources = self._sources(family, model)
        if self.calibration is not None:
            check_tokens(self.calibration, config_of(model).vocab_size)
        return family, sources, {layer: self.plan_layer(source) for layer, source in sources.items()}

    def check(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config that a model of this config would get, without its weights: ranks may differ where they decide.

        Raises:
            MLAError: What converting it would raise for its options.
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
        """The attention of every layer to convert. Raises where one is converted already or is not finite."""
        spec, config = family.spec, config_of(model)
        sources = {}
        for layer in parse_layers(self.layers, config.num_hidden_layers):
            if not isinstance(spec.part(model, spec.attention_path(layer), layer), family.source_attention):
                raise converted_already(layer)
            sources[layer] = source_attention(spec, model, config, layer)
        return sources

    def _cast(self, source: SourceAttention, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer's tensors in the source weights' dtype and on their device."""
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
    """Each layer's index and its attention's `call_module` node."""
    targets = {family.spec.attention_path(layer): layer for layer in layers}
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and node.target in targets:
            yield targets[node.target], node
