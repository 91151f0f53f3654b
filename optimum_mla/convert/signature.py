"""Signatures of methods that show every option, also those that a class passes on to its base classes."""

from __future__ import annotations

import inspect
from typing import TypedDict

from torch import Tensor

from optimum_mla.calibrate.statistics_folder import CalibrationStatistics
from optimum_mla.core.layers import LayerChoice

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class MLAOptions(TypedDict, total=False):
    """The options of `MLATransformation` with their types, by which editors complete those of the methods."""

    kv_lora_rank: int | None
    kv_cache_ratio: float | None
    energy: float | None
    layers: LayerChoice
    calibration: Tensor | CalibrationStatistics | None
    factorization: str | None
    heal: bool | None
    rank_allocation: str | None
    shared_rope: bool | str
    kv_cache_budget: float | None


def whole_signature(cls: type) -> inspect.Signature:
    """Return the signature of a class with the options of its base classes in place of `**options`.

    The options of the class come first. Those of its bases can only be given by keyword.
    """
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        for one in parameters:
            if one.kind in NAMED and one.name not in found:
                own = base is cls or not found
                found[one.name] = one if own else one.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        if all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters):
            break
    ordered = sorted(found.values(), key=lambda one: one.kind)
    return inspect.Signature(ordered)
