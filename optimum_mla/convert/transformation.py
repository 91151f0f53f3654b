"""Methods as Optimum's transformations: they apply to models and to traced graphs, and compose."""

from __future__ import annotations

import copy as copying
import warnings
from abc import abstractmethod
from typing import Any, TypeAlias

from optimum.fx.optimization import Transformation
from torch.fx import GraphModule
from transformers import PreTrainedModel

from optimum_mla.convert.codec import fit_codec
from optimum_mla.convert.method import ConversionMethod
from optimum_mla.convert.run import Run
from optimum_mla.core.errors import InvalidValueError, UncalibratedWarning, UnsupportedModelError
from optimum_mla.models.coded import with_codec
from optimum_mla.models.wrappers import language_model, rewrapped, wrapper_of

Model: TypeAlias = PreTrainedModel | GraphModule


class ModelTransformation(Transformation):
    """An Optimum transformation that takes a `PreTrainedModel` or a `GraphModule`.

    Optimum's own `__call__` and `compose` lint the graph of every result, but only a `GraphModule` has a graph.
    """

    def __call__(self, model: Any, lint_and_recompile: bool = True, copy: bool = False) -> Any:
        """Apply the transformation and return the result.

        Args:
            model: A `PreTrainedModel` or a traced `GraphModule`.
            lint_and_recompile: Whether to check and recompile the graph of a `GraphModule`.
            copy: Whether to transform a copy instead of the model itself.
        """
        model = self.transform(copying.deepcopy(model) if copy else model)
        if lint_and_recompile and isinstance(model, GraphModule):
            model.graph.lint()
            model.recompile()
        return model

    @abstractmethod
    def transform(self, graph_module: Any) -> Any:
        """Transform a model in place and return it."""


class MLATransformation(ConversionMethod, ModelTransformation):
    """Converts attention layers to latent attention.

    It applies to a `PreTrainedModel` or to a `GraphModule` that `optimum_mla.trace` returned. Both are changed in place
    and returned. With `copy=True` the argument is left unchanged and a converted copy is returned.

    Args:
        kv_lora_rank: Size of the latent in numbers per token and layer.
        kv_cache_ratio: Size of the cache, including the rotary key, relative to that of the source model.
        energy: Share of the squared singular values that each layer keeps. The ranks then differ between layers.
        kv_cache_budget: Bytes of the codes of an old token, relative to its keys and values in 16 bits. The weights
            then stay as they are, so all other options but `layers` and `calibration` have no meaning; see
            `optimum_mla.fit_codec`. Only methods with codes have it.
        layers: `all`, a list such as `0-3,8`, the name of a preset, or indices; see `parse_layers`. Of a model in which
            some layers have a sliding window, `all` means the others: a window bounds its cache by itself.
        calibration: Token ids, [N, L], that are run through the model layer by layer; see `optimum_mla.calibrate.walk`.
            Or `CalibrationStatistics` of the model, with which no layer is run and nothing can be refitted.
        factorization: One of the method's `factorizations`. `calibrated` weighs errors by what the layer reads and
            writes on the calibration tokens. It is the default with calibration tokens; otherwise the default is the
            form of the method's paper.
        heal: Whether to refit each layer's output projection in closed form, so that the hidden states come close to
            the source's. A refit is kept if it helps on held-back windows. None refits with a calibrated factorization
            and token ids.
        rank_allocation: How the layers share the budget: `uniform`; `energy`, which minimizes the lost shares of the
            layers' weighted energy; or `error`, which minimizes the measured errors. None takes `error` with a
            calibrated factorization of a fixed rank, and `uniform` otherwise.
        shared_rope: Whether all layers rotate the same number of dims at the same frequencies, which `deepseek_v3` and
            inference engines need. With `regular` these are every so-many-th of the source's frequencies, each once,
            which llama.cpp needs. Ranks are then uniform by default. Only methods with one rotary key have it.

    Raises:
        InvalidValueError: An option is out of range. Limits that depend on the model are checked when the
            transformation is applied.
        UnsupportedModelError: The model's family or state does not allow a conversion.
        CorruptWeightsError: A weight is not finite.
        VerificationError: A converted layer computes something other than its factorization. The model is unchanged.
    """

    @property
    def signature(self) -> int:
        """Return a number that identifies the transformation on the graph nodes that it has changed."""
        return hash((type(self), repr(sorted(self.options.items()))))

    def transform(self, graph_module: Model) -> Model:
        """Convert a model in place and return it. It is unchanged until all layers have been converted.

        Args:
            graph_module: A causal language model, one that `optimum_mla.trace` returned, or one of
                `optimum_mla.models.wrappers.WRAPPERS`, of which the language model is converted.
        """
        if not self.needs_calibration and not self.preserves_computation:
            warnings.warn(
                f"{self.name} without calibration data below full rank: the result is of no use until it is trained. "
                "Give token ids of ordinary text as calibration; optimum_mla.calibrate.built_in_windows returns some.",
                UncalibratedWarning,
                stacklevel=3,  # The caller of `__call__`.
            )
        if self.coded:
            return self._coded(graph_module)
        language = language_of(graph_module)
        run = Run(self, language)
        done = run.convert()
        if isinstance(done, GraphModule):
            for node in run.attention_nodes():
                self.mark_as_transformed(node)
        return done if language is graph_module else rewrapped(graph_module, done)  # type: ignore[arg-type]

    def _coded(self, model: Model) -> PreTrainedModel:
        """Give a model a codec for a budget of bytes, in place, and return it.

        Raises:
            UnsupportedModelError: It is a graph, or a wrapper around a language model.
        """
        if not isinstance(model, PreTrainedModel) or wrapper_of(model.config) is not None:
            raise UnsupportedModelError(
                f"kv_cache_budget: got a {type(model).__name__}, allowed: a causal language model of Transformers. "
                "Give kv_cache_ratio for graphs, and for models that hold a language model."
            )
        calibration, budget = self.calibration, self.budget.kv_cache_budget
        if calibration is None or budget is None:
            raise RuntimeError("a budget of bytes without calibration")
        return with_codec(model, fit_codec(model, calibration, budget, layers=self.layers))


def language_of(model: Model) -> Model:
    """Return what is converted of a model: the language model inside a wrapper, or the model itself."""
    wrapped = isinstance(model, PreTrainedModel) and wrapper_of(model.config) is not None
    return language_model(model) if wrapped else model  # type: ignore[arg-type]


class ComposedTransformation(ModelTransformation):
    """A transformation that applies its parts in order."""

    def __init__(self, *parts: Transformation) -> None:
        self.parts = parts

    @property
    def preserves_computation(self) -> bool:  # type: ignore[override]
        """Return whether every part preserves the computation."""
        return all(part.preserves_computation for part in self.parts)

    def transform(self, graph_module: Any) -> Any:
        """Apply all parts in place.

        Before any part is applied, all conversions are planned, so that a refused one leaves the model unchanged.

        Raises:
            InvalidValueError: Two parts convert the same layer, or one with a budget of bytes is not alone.
        """
        seen: set[int] = set()
        language = language_of(graph_module)
        for part in self.flattened():
            if isinstance(part, MLATransformation):
                if part.coded and sum(isinstance(other, MLATransformation) for other in self.flattened()) > 1:
                    raise InvalidValueError(
                        "kv_cache_budget",
                        part.budget.kv_cache_budget,
                        "nothing beside another method",
                        "It leaves the weights alone; name its layers by `layers`.",
                    )
                if part.coded:
                    continue
                plans = Run(part, language).plans()
                if both := sorted(seen & set(plans)):
                    raise InvalidValueError(
                        "layers", both, "each layer in one transformation", "Give the parts layers of their own."
                    )
                seen |= set(plans)
        for part in self.flattened():
            graph_module = part(graph_module, lint_and_recompile=False)
        return graph_module

    def flattened(self) -> list[Transformation]:
        """Return the parts, in which nested compositions are replaced by their own parts."""
        nested = [p.flattened() if isinstance(p, ComposedTransformation) else [p] for p in self.parts]
        return [part for parts in nested for part in parts]


def compose(*transformations: Transformation) -> ComposedTransformation:
    """Return a transformation that applies the given ones in order, such as two methods on different layers."""
    return ComposedTransformation(*transformations)
