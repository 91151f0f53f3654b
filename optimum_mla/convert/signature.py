"""Checks that the class of a method is whole, and makes its signature show the options of its base classes too."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, TypedDict

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


@dataclass(frozen=True)
class MethodOptions:
    """These options with their defaults; `MLATransformation` describes them."""

    kv_lora_rank: int | None = None
    kv_cache_ratio: float | None = None
    energy: float | None = None
    layers: LayerChoice = "all"
    calibration: Tensor | CalibrationStatistics | None = None
    factorization: str | None = None
    heal: bool | None = None
    rank_allocation: str | None = None
    shared_rope: bool | str = False
    kv_cache_budget: float | None = None


def whole_signature(cls: type) -> inspect.Signature:
    """Return the signature of a method's class with the options of its base classes in place of `**options`.

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
    else:
        for name, one in inspect.signature(MethodOptions).parameters.items():
            found.setdefault(name, one.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    ordered = sorted(found.values(), key=lambda one: one.kind)
    return inspect.Signature(ordered)


def check_method(cls: Any) -> None:
    """Refuse the class of a method that lacks what its attributes need; one with abstract methods may lack anything.

    Raises:
        TypeError: Something is missing or declared wrongly; the message names all of it.
    """
    if any(getattr(question, "__isabstractmethod__", False) for question in (cls.plan_layer, cls.convert_layer)):
        return
    parameters = inspect.signature(cls).parameters
    missing = [
        f"{attribute}, {reason}"
        for attribute, needed, reason in (
            ("name", True, "by which users select it"),
            ("problem(source, geometry, calibration)", "calibrated" in cls.factorizations, "for `calibrated`"),
            ("rotary_damage(source, calibration)", cls.one_rotary_key, "for `one_rotary_key`"),
        )
        if needed and not hasattr(cls, attribute.partition("(")[0])
    ]
    for option, declaration in cls.command_options.items():
        if option not in parameters:
            missing.append(f"the keyword argument {option}, which command_options declares")
        if not declaration.get("help"):
            missing.append(f"a help text for {option} in command_options")
        missing += [f"command_options of {option} without {key}" for key in ("default", "dest") if key in declaration]
    if missing:
        raise TypeError(f"{cls.__name__} is no whole conversion method. It needs: {'; '.join(missing)}.")
