"""The base class of transformations that apply to models as well as to traced graphs."""

from __future__ import annotations

import copy as copying
from typing import Any

from optimum.fx.optimization import ReversibleTransformation
from torch.fx import GraphModule


class ModelTransformation(ReversibleTransformation):
    """An Optimum transformation that takes a `PreTrainedModel` or a `GraphModule`.

    Optimum's own `__call__` and `compose` lint the graph of every result, but only a `GraphModule` has a graph.
    """

    def __call__(self, model: Any, lint_and_recompile: bool = True, copy: bool = False, reverse: bool = False) -> Any:
        """Apply the transformation and return the result.

        Args:
            model: A `PreTrainedModel` or a traced `GraphModule`.
            lint_and_recompile: Whether to check and recompile the graph of a `GraphModule`.
            copy: Whether to transform a copy instead of the model itself.
            reverse: Whether to undo the transformation instead.
        """
        model = copying.deepcopy(model) if copy else model
        model = self.reverse(model) if reverse else self.transform(model)
        if lint_and_recompile and isinstance(model, GraphModule):
            model.graph.lint()
            model.recompile()
        return model
