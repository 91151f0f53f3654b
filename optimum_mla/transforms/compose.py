"""Several transformations as one."""

from __future__ import annotations

import copy as copying
from typing import Any

from optimum.fx.optimization import Transformation
from torch.fx import GraphModule

from optimum_mla.errors import InvalidValueError
from optimum_mla.transforms.base import MLATransformation, config_of
from optimum_mla.transforms.layers import parse_layers


class ComposedTransformation(Transformation):
    """Applies its parts in order. Optimum's own `compose` lints every result, which only a `GraphModule` has."""

    def __init__(self, *parts: Transformation) -> None:
        self.parts = parts

    @property
    def preserves_computation(self) -> bool:  # type: ignore[override]
        """Whether every part does."""
        return all(part.preserves_computation for part in self.parts)

    def transform(self, graph_module: Any) -> Any:
        """Apply all parts in place. Raises before any does if two would convert the same layer."""
        self._check_disjoint(config_of(graph_module).num_hidden_layers)
        for part in self.parts:
            graph_module = part(graph_module, lint_and_recompile=False)
        return graph_module

    def _check_disjoint(self, count: int) -> None:
        seen: set[int] = set()
        for part in self.parts:
            if isinstance(part, MLATransformation):
                layers = set(parse_layers(part.layers, count))
                if both := sorted(seen & layers):
                    raise InvalidValueError(
                        "layers", both, "each layer in one transformation", "Give the parts layers of their own."
                    )
                seen |= layers

    def __call__(self, model: Any, lint_and_recompile: bool = True, copy: bool = False) -> Any:
        """Apply to a `PreTrainedModel` or a traced `GraphModule`, in place unless `copy`."""
        model = self.transform(copying.deepcopy(model) if copy else model)
        if lint_and_recompile and isinstance(model, GraphModule):
            model.graph.lint()
            model.recompile()
        return model


def compose(*transformations: Transformation) -> ComposedTransformation:
    """One transformation that applies the given ones in order, for example two methods over layers of their own."""
    return ComposedTransformation(*transformations)
