"""Composition of several transformations into one."""

from __future__ import annotations

from typing import Any

from optimum.fx.optimization import ReversibleTransformation, Transformation

from optimum_mla.convert.run import Run
from optimum_mla.convert.wrapped import language_of
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.methods.base import MLATransformation
from optimum_mla.methods.transformation import ModelTransformation


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

    def reverse(self, graph_module: Any) -> Any:
        """Undo all parts in place, the last one first.

        Raises:
            InvalidValueError: A part cannot be undone.
        """
        for part in reversed(self.flattened()):
            if not isinstance(part, ReversibleTransformation):
                raise InvalidValueError("reverse", type(part).__name__, "transformations that can be reversed")
            graph_module = part(graph_module, lint_and_recompile=False, reverse=True)
        return graph_module

    def flattened(self) -> list[Transformation]:
        """Return the parts, in which nested compositions are replaced by their own parts."""
        nested = [p.flattened() if isinstance(p, ComposedTransformation) else [p] for p in self.parts]
        return [part for parts in nested for part in parts]


def compose(*transformations: Transformation) -> ComposedTransformation:
    """Return a transformation that applies the given ones in order, such as two methods on different layers."""
    return ComposedTransformation(*transformations)
