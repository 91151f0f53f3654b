"""The mechanism that every conversion shares: check, plan, collect, convert layer by layer, assemble.

A method is a subclass with two answers: `plan_layer` (what shape a layer gets) and `convert_layer` (its weights).
"""

from __future__ import annotations

import copy as copying
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from optimum.fx.optimization import Transformation
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_mla.errors import CorruptWeightsError, UnsupportedModelError
from optimum_mla.geometry import MLAGeometry
from optimum_mla.models import Family, SourceAttention, family_of
from optimum_mla.models.assemble import assemble_model, converted_config, load_attention
from optimum_mla.nn import LatentAttention
from optimum_mla.progress import progress
from optimum_mla.transforms.budget import RankBudget
from optimum_mla.transforms.calibration import pair_contributions
from optimum_mla.transforms.checks import check_convertible, check_tokens, config_of, converted_already
from optimum_mla.transforms.layers import LayerChoice, parse_layers

PROBE_TOKENS = 128
PROBE_SEED = 0


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer.

    Attributes:
        geometry: Its new shape.
        output_error: Relative root-mean-square error of the attention's output, new against source, on
            `PROBE_TOKENS` seeded Gaussian states scaled like the layer's normed input. Compares layers and methods
            without any text; perplexity is what counts.
    """

    geometry: MLAGeometry
    output_error: float


class MLATransformation(Transformation):
    """Converts attention layers to latent attention.

    Applies to a `PreTrainedModel` or to a `GraphModule` from `optimum_mla.trace`. Both are changed in place and
    returned; `copy=True` leaves the argument as it was and returns a converted copy.

    Args:
        kv_lora_rank: Numbers in the latent, per token and layer.
        kv_cache_ratio: Cached numbers over the source's, rotary key included.
        energy: Share of the squared singular values that each layer keeps; ranks then differ between layers.
        layers: `all`, a list such as `0-3,8`, a preset's name, or indices; see `parse_layers`.
        calibration: Token ids [N, L] to run through the source model, for methods and options that use them.

    Attributes:
        results: By layer, what the last call did.

    Raises:
        InvalidValueError: An option is out of range; when it is applied, with the range for the model at hand.
        UnsupportedModelError: The model's family, or its state, does not allow a conversion.
        CorruptWeightsError: A weight is not finite.
    """

    name: ClassVar[str]
    """Name on the command line, in configs and in reports."""

    default_budget: ClassVar[RankBudget] = RankBudget()
    """Used where the caller sets none."""

    def __init__(
        self,
        kv_lora_rank: int | None = None,
        kv_cache_ratio: float | None = None,
        energy: float | None = None,
        layers: LayerChoice = "all",
        calibration: Tensor | None = None,
    ) -> None:
        budget = RankBudget(kv_lora_rank, kv_cache_ratio, energy)
        self.budget = budget if budget.is_set else self.default_budget
        self.layers = (
            layers if isinstance(layers, str) else tuple(layers) if isinstance(layers, Iterable) else (layers,)
        )
        self.calibration = calibration
        self.results: dict[int, LayerResult] = {}

    @property
    def options(self) -> dict[str, Any]:
        """Every option, defaults resolved, without the calibration tokens."""
        own = {name: value for name, value in vars(self).items() if name not in ("results", "calibration", "budget")}
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
        self, source: SourceAttention, geometry: MLAGeometry, contribution: Tensor | None
    ) -> dict[str, Tensor]:
        """The layer's new parameters and buffers by their names in the attention module, in float64.

        Args:
            source: Weights of the attention to replace.
            geometry: What `plan_layer` gave.
            contribution: [G, D/2] from `pair_contributions`, or None unless `needs_contribution`.
        """

    def without_weights(self) -> MLATransformation:
        """The same transformation, planning without the options that read weights; for `check`."""
        other = copying.copy(self)
        if self.budget.energy is not None:
            other.budget = RankBudget()
        return other

    @property
    def needs_contribution(self) -> bool:
        """Whether `convert_layer` wants the rotary pairs' contributions, measured on the calibration tokens."""
        return False

    def __call__(
        self, model: PreTrainedModel | GraphModule, lint_and_recompile: bool = True, copy: bool = False
    ) -> PreTrainedModel | GraphModule:
        """Convert `model`; see the class."""
        model = self.transform(copying.deepcopy(model) if copy else model)
        if lint_and_recompile and isinstance(model, GraphModule):
            model.graph.lint()
            model.recompile()
        return model

    @torch.no_grad()
    def transform(self, graph_module: PreTrainedModel | GraphModule) -> PreTrainedModel | GraphModule:
        """Convert in place. Nothing is changed before every layer has been planned and converted."""
        model = graph_module
        family, sources, plans = self.plan(model)
        contributions: dict[int, Tensor] = {}
        if self.needs_contribution and self.calibration is not None:
            contributions = pair_contributions(model, family.spec, sources, self.calibration)

        config = converted_config(family, config_of(model), plans, self.name)
        attentions = {}
        self.results = {}
        for layer, source in progress(sources.items(), f"{self.name}: layers"):
            tensors = self._cast(source, self.convert_layer(source, plans[layer], contributions.get(layer)))
            attentions[layer] = load_attention(family, config, layer, tensors, model)
            self.results[layer] = LayerResult(plans[layer], _output_error(source, attentions[layer]))
        if isinstance(model, GraphModule):
            for layer, node in attention_nodes(model, family, sources):
                model.set_submodule(str(node.target), attentions[layer])
                self.mark_as_transformed(node)
            model.meta["config"] = config
            return model
        return assemble_model(model, family, config, attentions)

    def plan(
        self, model: PreTrainedModel | GraphModule
    ) -> tuple[Family, dict[int, SourceAttention], dict[int, MLAGeometry]]:
        """The model's family and, by layer, the attention to convert and the shape that it gets. Changes nothing."""
        family = check_convertible(model)
        sources = self._sources(family, model)
        if self.calibration is not None:
            check_tokens(self.calibration, config_of(model).vocab_size)
        return family, sources, {layer: self.plan_layer(source) for layer, source in sources.items()}

    def check(self, config: PreTrainedConfig) -> None:
        """Raise what converting a model of this config would raise for its options, without its weights."""
        family, weightless = family_of(config), self.without_weights()
        for layer in parse_layers(self.layers, config.num_hidden_layers):
            geometry = family.spec.geometry(config.per_layer_config[layer])
            if geometry.attention_form != "source":
                raise converted_already(layer)
            weightless.plan_layer(SourceAttention(family.spec, nn.Module(), geometry, 1.0, torch.empty(0)))

    def _sources(self, family: Family, model: nn.Module) -> dict[int, SourceAttention]:
        """The attention of every layer to convert. Raises where one is converted already or is not finite."""
        spec, config = family.spec, config_of(model)
        rotary = model.get_submodule(spec.rotary_path)
        sources = {}
        for layer in parse_layers(self.layers, config.num_hidden_layers):
            module = model.get_submodule(spec.attention_path(layer))
            if not isinstance(module, family.source_attention):
                raise converted_already(layer)
            for name in (spec.query, spec.key, spec.value, spec.output):
                if type(module.get_submodule(name)) is not nn.Linear:
                    raise UnsupportedModelError(
                        f"model: {spec.attention_path(layer)}.{name} is no plain linear layer but "
                        f"{type(module.get_submodule(name)).__name__}. Merge adapters and undo quantization first."
                    )
            geometry = spec.geometry(config.per_layer_config[layer])
            gain = model.get_parameter(f"{spec.layer_path(layer)}.{spec.input_norm}.weight").detach()
            scaling = getattr(rotary, "attention_scaling", 1.0)
            sources[layer] = SourceAttention(spec, module, geometry, scaling, gain)
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


def _output_error(source: SourceAttention, attention: LatentAttention) -> float:
    """`LayerResult.output_error`."""
    gain = source.input_gain
    generator = torch.Generator().manual_seed(PROBE_SEED)
    states = torch.randn(1, PROBE_TOKENS, source.geometry.hidden_size, generator=generator).to(gain) * gain
    position_embeddings = attention.rotary(states, torch.arange(PROBE_TOKENS, device=gain.device)[None])
    # Every implementation but eager is causal by itself without a mask.
    causal = torch.full((PROBE_TOKENS, PROBE_TOKENS), torch.finfo(gain.dtype).min, dtype=gain.dtype, device=gain.device)
    mask = causal.triu(1)[None, None] if attention.config._attn_implementation == "eager" else None
    outputs = []
    for module in (source.module, attention):
        training = module.training
        module.eval()  # dropout is no error
        outputs.append(module(states, position_embeddings=position_embeddings, attention_mask=mask)[0].double())
        module.train(training)
    before, after = outputs
    size = before.norm()
    return float((after - before).norm() / (size if size > 0 else 1.0))


def attention_nodes(
    graph_module: GraphModule, family: Family, layers: dict[int, SourceAttention]
) -> Iterator[tuple[int, torch.fx.Node]]:
    """Each layer's index and its attention's `call_module` node."""
    targets = {family.spec.attention_path(layer): layer for layer in layers}
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and node.target in targets:
            yield targets[node.target], node
