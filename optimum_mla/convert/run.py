"""A conversion of one model by one method, which owns everything that it reads and finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_mla.calibrate.layer import LayerCalibration
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.calibrate.windows import check_tokens
from optimum_mla.convert.balance import balanced
from optimum_mla.convert.probe import check_errors, probe_errors
from optimum_mla.convert.search import LayerSearch
from optimum_mla.convert.shared_rope import choose_shared_rope
from optimum_mla.core.errors import CorruptWeightsError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.core.layers import parse_layers
from optimum_mla.core.progress import progress
from optimum_mla.families.spec import SourceAttention, source_attention
from optimum_mla.families.verify import verify_family
from optimum_mla.methods.base import MLATransformation
from optimum_mla.models.assemble import assemble_model, converted_config, load_attention
from optimum_mla.models.checks import check_convertible, config_of, converted_already
from optimum_mla.models.registry import Family
from optimum_mla.nn import LatentAttention
from optimum_mla.plan.allocation import allocate_ranks


@dataclass(frozen=True)
class LayerResult:
    """The result of the conversion of one layer.

    Attributes:
        geometry: The layer's new shape.
        output_error: Root-mean-square error of the new attention's output relative to the source attention's, on seeded
            Gaussian states that are scaled like the layer's normed input (see `optimum_mla.convert.probe`). It compares
            layers and methods without any text, and does not replace perplexity as the measure of quality.
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


class LayerSources(Mapping[int, SourceAttention]):
    """The attention of every layer to convert, by the index of the layer.

    Each access makes a new object, so that the float64 weights of a layer are freed after the work on it.

    Args:
        family: The model's family.
        model: A model or a traced one.
        config: The model's config.
        layers: Indices of the layers.

    Raises:
        InvalidValueError: A layer is already converted.
        UnsupportedModelError: A layer has projections that are no plain linear layers.
    """

    def __init__(self, family: Family, model: nn.Module, config: PreTrainedConfig, layers: Sequence[int]) -> None:
        self._family, self._model, self._config, self._layers = family, model, config, layers
        for layer in layers:
            path = family.spec.attention_path(layer)
            if not isinstance(family.spec.part(model, path, layer), family.source_attention):
                raise converted_already(layer)
            self[layer]

    def __getitem__(self, layer: int) -> SourceAttention:
        return source_attention(self._family.spec, self._model, self._config, layer)

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


class Run:
    """A conversion of one model by one method.

    ```python
    run = Run(GQA2MLA(kv_cache_ratio=0.5, calibration=ids), model)
    model = run.convert()
    run.results[0].output_error
    ```

    Args:
        method: The transformation, which stays as it is.
        model: A `PreTrainedModel` or a `GraphModule` that `optimum_mla.trace` returned. It is changed in place.

    Attributes:
        family: The model's family.
        sources: The attention of every layer to convert, by the index of the layer.
        results: The results of the conversion, by the index of the layer; empty before it.

    Raises:
        MLAError: The model or the calibration tokens do not allow the conversion; see `MLATransformation`.
    """

    def __init__(self, method: MLATransformation, model: PreTrainedModel | GraphModule) -> None:
        self.method, self.model = method, model
        self.family = check_convertible(model)
        self.config = config_of(model)
        layers = parse_layers(method.layers, self.config.num_hidden_layers)
        self.sources = LayerSources(self.family, model, self.config, layers)
        if method.calibration is not None:
            check_tokens(method.calibration, self.config.vocab_size)
        self.results: dict[int, LayerResult] = {}

    def plans(self) -> dict[int, MLAGeometry]:
        """Return the shape that each layer gets before anything is measured, by the index of the layer.

        Raises:
            InvalidValueError: The options do not fit a layer.
        """
        return {layer: self.method.plan_layer(source) for layer, source in self.sources.items()}

    @torch.no_grad()
    def convert(self) -> PreTrainedModel | GraphModule:
        """Convert the model in place and return it. It is unchanged until all layers have been converted."""
        model, plans = self.model, self.plans()
        if isinstance(model, PreTrainedModel):  # `trace` has checked what it traced
            verify_family(model, self.family.spec, self.sources)
        walk, tokens = None, self.method.calibration
        if self.method.needs_calibration and tokens is not None:
            half = tokens[::2]  # These suffice where errors are only compared with each other.
            if self.method.shared_rope:
                shared = choose_shared_rope(self.method, self.family, self._walk(half), self.sources, plans)
                self.method = self.method.sharing(shared)
                plans = self.plans()
            if self.method.rank_allocation != "uniform":
                plans = self._allocate(self._walk(half), plans)
            walk = self._walk(tokens)

        attentions: dict[int, LatentAttention] = {}
        results: dict[int, LayerResult] = {}
        for layer, source in progress(self.sources.items(), f"{self.method.name}: layers", main=True):
            while walk is not None and walk.layer < layer:
                walk.advance()
            attentions[layer], results[layer] = self._build(layer, source, plans[layer], walk)
            if walk is not None:
                walk.advance(attentions[layer])
        self.results = results
        return self._assemble(attentions)

    def _walk(self, windows: Tensor) -> CalibrationWalk:
        return CalibrationWalk(self.model, self.family.spec, self.config, windows)

    def _search(self, walk: CalibrationWalk, layer: int, source: SourceAttention) -> LayerSearch:
        return LayerSearch(self.method, self.family, self.model, layer, source, LayerCalibration(walk, source))

    def _allocate(self, walk: CalibrationWalk, plans: dict[int, MLAGeometry]) -> dict[int, MLAGeometry]:
        """Return the plans with the same total of ranks, distributed over the layers so that their errors are small."""
        plans, curves = dict(plans), {}
        for layer, source in progress(self.sources.items(), f"{self.method.name}: rank allocation", main=True):
            while walk.layer < layer:
                walk.advance()
            search = self._search(walk, layer, source)
            plans[layer] = search.best_shape(plans[layer])
            curves[layer] = search.rank_curve(plans[layer], self.method.rank_allocation)
        ranks = allocate_ranks(curves, sum(plan.kv_lora_rank for plan in plans.values()))
        return {layer: replace(plans[layer], kv_lora_rank=rank) for layer, rank in ranks.items()}

    def _build(
        self, layer: int, source: SourceAttention, geometry: MLAGeometry, walk: CalibrationWalk | None
    ) -> tuple[LatentAttention, LayerResult]:
        """Return the new attention of one layer in the source's dtype, and the result of its conversion."""
        search, key_weight, state_error, healed_error = None, None, None, None
        if walk is not None:
            search = self._search(walk, layer, source)
        if search is None or self.method.factorization != "calibrated":
            calibration = None if search is None else search.calibration
            tensors = self.method.convert_layer(source, geometry, calibration)
        else:
            if self.method.rank_allocation == "uniform":  # Otherwise the allocation has already chosen the shape.
                geometry = search.best_shape(geometry)
            tensors = search.best_key_weight(geometry)
            key_weight = search.calibration.key_weight
        if search is not None:
            trial = search.attention(geometry, tensors)
            state_error = search.calibration.error(trial)
            if self.method.heal:
                healing = search.calibration.heal(trial)
                state_error, healed_error = healing.error_before, healing.error_after
                if healing.weight is not None:
                    tensors["o_proj.weight"] = healing.weight
        cast = balanced(self._cast(source, tensors), geometry)
        attention = load_attention(self.family, self.config, layer, cast, self.model, geometry).eval()
        measured, predicted = probe_errors(source, attention, tensors)
        check_errors(layer, measured, predicted, attention.o_proj.weight.dtype)
        result = LayerResult(geometry, measured, predicted, key_weight, state_error, healed_error)
        return attention.train(self.model.training), result

    def _assemble(self, attentions: dict[int, LatentAttention]) -> PreTrainedModel | GraphModule:
        """Put the new attentions and the new config into the model and return it."""
        model, geometries = self.model, {layer: result.geometry for layer, result in self.results.items()}
        config = converted_config(self.family, self.config, geometries, self.method.name)
        for attention in attentions.values():
            attention.config = config
        if not isinstance(model, GraphModule):
            return assemble_model(model, self.family, config, attentions)
        for layer, node in attention_nodes(model, self.family, attentions):
            model.set_submodule(str(node.target), attentions[layer])
            self.method.mark_as_transformed(node)
        model.meta["config"] = config
        return model

    def _cast(self, source: SourceAttention, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a layer's tensors in the dtype and on the device of the source's weights, and refuse infinite ones."""
        like = next(source.module.parameters())
        dtype = {name: like.dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
        cast = {name: tensor.to(like.device, dtype[name]).contiguous() for name, tensor in tensors.items()}
        broken = [name for name, tensor in cast.items() if not tensor.isfinite().all()]
        if broken:
            raise CorruptWeightsError(
                f"{self.method.name}: {', '.join(broken)} left the range of {like.dtype}. "
                "Convert in bfloat16 or float32."
            )
        return cast


def attention_nodes(
    graph_module: GraphModule, family: Family, attentions: Mapping[int, nn.Module]
) -> Iterator[tuple[int, torch.fx.Node]]:
    """Yield the index of each layer and the `call_module` node of its attention."""
    targets = {family.spec.attention_path(layer): layer for layer in attentions}
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and node.target in targets:
            yield targets[node.target], node
