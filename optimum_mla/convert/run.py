"""A conversion of one model by one method, which owns everything that it reads and finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_mla.calibrate.layer import LayerCalibration
from optimum_mla.calibrate.perplexity import stream_perplexities
from optimum_mla.calibrate.statistics_folder import CalibrationStatistics
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.calibrate.windows import check_tokens, deciding
from optimum_mla.convert.balance import balanced
from optimum_mla.convert.first_pass import FirstPass
from optimum_mla.convert.method import ConversionMethod
from optimum_mla.convert.probe import check_errors, probe_errors
from optimum_mla.convert.record import LayerResult, Record
from optimum_mla.convert.search import LayerSearch
from optimum_mla.convert.shared_rope import choose_shared_rope
from optimum_mla.core.errors import CorruptWeightsError, UnsupportedModelError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.core.processes import ALONE, Processes
from optimum_mla.core.progress import progress
from optimum_mla.families.project import SourceAttention
from optimum_mla.families.verify import verify_family
from optimum_mla.models.assemble import assemble_model, converted_config, load_attention
from optimum_mla.models.checks import converted_already
from optimum_mla.models.layer_source import LayerSource, reading_weights
from optimum_mla.nn import LatentAttention
from optimum_mla.ops.shared_rope import SharedRope
from optimum_mla.plan.allocation import allocate, scaled
from optimum_mla.stack import remove_spread, returns_to_memory, spread


class Run:
    """A conversion of one model by one method.

    ```python
    run = Run(GQA2MLA(kv_cache_ratio=0.5, calibration=ids), model)
    model = run.convert()
    run.results[0].output_error
    ```

    Args:
        method: The transformation, which stays as it is.
        model: A `PreTrainedModel` or a `GraphModule` that `optimum_mla.trace` returned.
        record: Keeps what is found, and knows what an earlier run has found.
        evaluation: Token ids, [E, L], on which the perplexity before and after the conversion is measured. None takes
            the windows on which a calibrated conversion makes its choices, if `evaluate` says that it is wanted.
        evaluate: Whether the perplexity is measured.
        processes: The processes that share the work, each with a run of its own of the same conversion.

    Attributes:
        source: The layers of the model.
        layers: The indices of the layers to convert.
        results: The results of the conversion, by the index of the layer; empty before it.
        perplexities: The perplexity before and after the conversion, or None if it was not measured.

    Raises:
        MLAError: The model or the calibration tokens do not allow the conversion; see `MLATransformation`.
    """

    def __init__(
        self,
        method: ConversionMethod,
        model: PreTrainedModel | GraphModule,
        record: Record | None = None,
        evaluation: Tensor | None = None,
        evaluate: bool = False,
        processes: Processes = ALONE,
    ) -> None:
        self.method, self.source, self.record = method, LayerSource(model), record or Record()
        self.processes = processes
        self.config, self.family = self.source.config, self.source.family
        self.layers = method.covered_layers(self.config)
        spec = self.family.spec
        for layer in self.layers:
            attention = spec.part(model, spec.attention_path(layer), layer)
            if not isinstance(attention, self.family.source_attention):
                raise converted_already(layer)
            self.source.attention(layer)
        self.statistics, self.tokens = None, None
        if isinstance(method.calibration, CalibrationStatistics):
            self.statistics = method.calibration
        elif method.calibration is not None:
            check_tokens(method.calibration, self.config.vocab_size)
            self.tokens = method.calibration if method.needs_calibration else None
        self.evaluation, self.evaluate = evaluation, evaluate or evaluation is not None
        self.results: dict[int, LayerResult] = {}
        self.perplexities: tuple[float, float] | None = None

    def plans(self) -> dict[int, MLAGeometry]:
        """Return the shape that each layer gets before anything is measured, by the index of the layer.

        Raises:
            InvalidValueError: The options do not fit a layer.
        """
        return {layer: self.method.plan_layer(self.source.attention(layer)) for layer in self.layers}

    def convert(self) -> PreTrainedModel | GraphModule:
        """Convert the model in place and return it. It is unchanged until all layers have been converted.

        Raises:
            UnsupportedModelError: The model is offloaded to the disk, so that it cannot be changed in place.
        """
        if not returns_to_memory(self.source.model):
            raise UnsupportedModelError(
                "model: its weights are offloaded to the disk. Convert its folder with mla-convert, which reads and "
                "writes one layer at a time, or load it into memory."
            )
        return self._assemble({layer: attention for layer, attention in self.steps() if attention is not None})

    @torch.no_grad()
    def steps(self) -> Iterator[tuple[int, LatentAttention | None]]:
        """Convert one layer at a time, and yield the index and the new attention of each layer of the model, in order.

        A layer that is not converted comes with None. The attentions are in the dtype of the source's weights. The
        model is not changed. Once a layer is yielded, `results` has its result; `perplexities` are there at the end.
        """
        model = self.source.model
        if isinstance(model, PreTrainedModel):  # `trace` has checked what it traced
            with reading_weights():
                verify_family(model, self.family.spec, self.layers)
        plans = self._planned()
        walk = None if self.tokens is None else CalibrationWalk(self.source, self.tokens, self.processes)
        evaluated = self._evaluated(walk)
        walks = list(dict.fromkeys(one for one in (walk, evaluated) if one is not None))
        last = self.source.num_layers if evaluated is not None else max(self.layers) + 1
        for layer in progress(range(self.source.num_layers), f"{self.method.name}: layers", main=True):
            attention = None
            if layer in plans:
                attention, self.results[layer] = self._layer(layer, plans[layer], walk)
            yield layer, attention
            for one in walks if layer < last else []:
                one.advance(attention)
        if evaluated is not None:
            windows = None if evaluated is not walk else deciding(len(evaluated.source))
            self.perplexities = stream_perplexities(evaluated, windows, f"{self.method.name}: perplexity")

    def _evaluated(self, walk: CalibrationWalk | None) -> CalibrationWalk | None:
        """Return the walk whose states give the perplexity, or None."""
        if not self.evaluate:
            return None
        return walk if self.evaluation is None else CalibrationWalk(self.source, self.evaluation, self.processes)

    def _planned(self) -> dict[int, MLAGeometry]:
        """Return the shape of each layer, after the choices that concern all layers together."""
        plans = self.plans()
        if not self.method.needs_calibration or self.method.calibration is None:
            return plans
        if self.method.shared_rope:
            self.method = self.method.sharing(self._shared_rope(plans))
            plans = self.plans()
        return plans if self.method.rank_allocation == "uniform" else self._allocate(plans)

    def _shared_rope(self, plans: dict[int, MLAGeometry]) -> SharedRope:
        known = self.record.known("shared rope")
        if known is not None:
            return SharedRope(known["dims"], torch.tensor(known["counts"]))
        found = choose_shared_rope(self.method, self._first_pass(), plans, self.processes)
        self.record.keep("shared rope", {"dims": found.dims, "counts": found.counts.tolist()})
        return found

    def _search(self, walk: CalibrationWalk | None, layer: int, source: SourceAttention) -> LayerSearch | None:
        """Return the search of a layer, by the stored statistics or on the states of a walk, or None without either."""
        if self.statistics is not None:
            return LayerSearch(self.method, self.source, layer, source, self.statistics.layer(layer, source))
        if walk is None:
            return None
        return LayerSearch(self.method, self.source, layer, source, LayerCalibration(walk, source))

    def _best_shape(self, search: LayerSearch, geometry: MLAGeometry) -> MLAGeometry:
        """Return the shape that the first process chooses, because the last digits of predictions may differ."""
        return self.processes.broadcast(search.best_shape(geometry))

    def _first_pass(self) -> FirstPass:
        return FirstPass(self.source, self.tokens, self._search, self.processes)

    def _allocate(self, plans: dict[int, MLAGeometry]) -> dict[int, MLAGeometry]:
        """Return the plans with the same total of ranks, distributed over the layers so that their errors are small."""
        plans, curves, uniform, first = dict(plans), {}, {}, self._first_pass()
        compares = self.method.rank_allocation == "error" and self.tokens is not None
        divergences = self.record.known("divergences") if compares else []
        for layer in progress(self.layers, f"{self.method.name}: rank allocation", main=True):
            known = self.record.known(f"rank curve {layer}")
            search = first.search(layer) if known is None or divergences is None else None
            if known is not None:
                plans[layer] = MLAGeometry(**known["geometry"])
                curves[layer] = dict(known["errors"])
            elif search is not None:
                plans[layer] = self._best_shape(search, plans[layer])
                curves[layer] = search.rank_curve(plans[layer], self.method.rank_allocation)
                found = {"geometry": asdict(plans[layer]), "errors": list(curves[layer].items())}
                self.record.keep(f"rank curve {layer}", found)
            uniform[layer] = plans[layer].kv_lora_rank
            if search is not None and compares:
                first.replace(search.attention(*search.convert(plans[layer])))
        if divergences is None:
            divergences = list(first.divergences(f"{self.method.name}: effect on the predictions").items())
            self.record.keep("divergences", divergences)
        for layer, divergence in divergences:
            curves[layer] = scaled(curves[layer], uniform[layer], divergence)
        shares = self.processes.broadcast(allocate(curves, sum(uniform.values())))
        return {layer: replace(plans[layer], kv_lora_rank=rank) for layer, rank in shares.items()}

    def _layer(
        self, layer: int, geometry: MLAGeometry, walk: CalibrationWalk | None
    ) -> tuple[LatentAttention, LayerResult]:
        """Return the new attention of one layer and its result, from the record if they are in it."""
        known = self.record.layer(layer)
        if known is None:
            return self._build(layer, self.source.attention(layer), geometry, walk)
        tensors, result = known
        attention = load_attention(self.family, self.config, layer, tensors, self.source.rotary, result.geometry)
        return attention.train(self.source.model.training), result

    def _build(
        self, layer: int, source: SourceAttention, geometry: MLAGeometry, walk: CalibrationWalk | None
    ) -> tuple[LatentAttention, LayerResult]:
        """Return the new attention of one layer in the source's dtype, and the result of its conversion."""
        state_error, healed_error = None, None
        search = self._search(walk, layer, source)
        if search is None or self.method.factorization != "calibrated":
            tensors = self.method.convert_layer(source, geometry, None if search is None else search.calibration)
        else:
            if self.method.rank_allocation == "uniform":  # Otherwise the allocation has already chosen the shape.
                geometry = self._best_shape(search, geometry)
            geometry, tensors = search.convert(geometry)
            search.calibration.forget()
        calibration = None if search is None else search.calibration
        if search is not None and isinstance(calibration, LayerCalibration):
            trial = search.attention(geometry, tensors)
            state_error = calibration.error(trial)
            if self.method.heal:
                healing = calibration.heal(trial)
                state_error, healed_error = healing.error_before, healing.error_after
                if healing.weight is not None:
                    tensors["o_proj.weight"] = healing.weight
        cast = balanced(self._cast(source, tensors), geometry, source.input_gain)
        attention = load_attention(self.family, self.config, layer, cast, self.source.rotary, geometry).eval()
        measured, predicted = probe_errors(source, attention, tensors, self.source.implementation)
        check_errors(layer, measured, predicted, attention.o_proj.weight.dtype)
        result = LayerResult(geometry, measured, predicted, state_error, healed_error)
        return attention.train(self.source.model.training), result

    def converted_config(self) -> PreTrainedConfig:
        """Return the config of the converted model, once all layers have been converted."""
        geometries = {layer: result.geometry for layer, result in self.results.items()}
        return converted_config(self.family, self.config, geometries, self.method.name)

    def _assemble(self, attentions: dict[int, LatentAttention]) -> PreTrainedModel | GraphModule:
        """Put the new attentions and the new config into the model and return it."""
        model, config = self.source.model, self.converted_config()
        for attention in attentions.values():
            attention.config = config
        if not isinstance(model, GraphModule):
            device_map = remove_spread(model)
            assembled = assemble_model(model, self.family, config, attentions)
            spread(assembled, device_map)
            return assembled
        for layer, attention in attentions.items():
            model.set_submodule(self.family.spec.attention_path(layer), attention)
        model.meta["config"] = config
        return model

    def attention_nodes(self) -> Iterator[torch.fx.Node]:
        """Yield the `call_module` nodes of the converted attentions, for a model that is a graph."""
        paths = {self.family.spec.attention_path(layer) for layer in self.layers}
        for node in self.source.model.graph.nodes:
            if node.op == "call_module" and node.target in paths:
                yield node

    def _cast(self, source: SourceAttention, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a layer's tensors in the dtype and on the device of the source's weights, and refuse infinite ones."""
        like = next(source.module.parameters())
        dtype = {name: like.dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
        cast = {name: tensor.to(like.device, dtype[name]).contiguous() for name, tensor in tensors.items()}
        broken = [name for name, tensor in cast.items() if not tensor.isfinite().all()]
        if broken:
            narrow = torch.finfo(like.dtype).max < torch.finfo(torch.bfloat16).max
            remedy = "Convert in bfloat16 or float32." if narrow else "Check the weights of the model."
            raise CorruptWeightsError(
                f"{self.method.name}: {', '.join(broken)} left the range of {like.dtype}. {remedy}"
            )
        return cast
