"""Applying a transformation to models as well as to traced graphs."""

from __future__ import annotations

import copy as copying
from typing import Any

from optimum.fx.optimization import Transformation
from torch.fx import GraphModule


class ModelTransformation(Transformation):
    """An Optimum transformation that takes a `PreTrainedModel` or a `GraphModule`.

    Optimum's own `__call__` and `compose` lint every result, which only a `GraphModule` has.
    """

    def __call__(self, model: Any, lint_and_recompile: bool = True, copy: bool = False) -> Any:
        """Apply to a `PreTrainedModel` or a traced `GraphModule`, in place unless `copy`."""
        model = self.transform(copying.deepcopy(model) if copy else model)
        if lint_and_recompile and isinstance(model, GraphModule):
            model.graph.lint()
            model.recompile()
        return model
