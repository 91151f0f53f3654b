"""Names of the methods. Imports nothing heavy, so that the command line can list them."""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from optimum_mla.errors import InvalidValueError

_TRANSFORMS: dict[str, str] = {
    "gqa2mla": "optimum_mla.transforms.gqa2mla:GQA2MLA",
    "mha2mla": "optimum_mla.transforms.mha2mla:MHA2MLA",
    "x-ecomla": "optimum_mla.transforms.xecomla:XEcoMLA",
}


ENTRY_POINTS = "optimum_mla.transforms"
"""Entry-point group in which other packages offer methods."""


def available_transforms() -> dict[str, str]:
    """Every method, built in, registered or offered by an installed package: its name and place, as `module:Class`."""
    return _TRANSFORMS | {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def register_transform(name: str, location: str) -> None:
    """Add a method of your own to this process.

    A package adds one for the command line too, by an entry point in the group `optimum_mla.transforms`.

    Args:
        name: What users will type.
        location: `module:Class` of an `MLATransformation`; imported when it is first asked for.
    """
    _TRANSFORMS[name] = location


def transform_class(name: str) -> Any:
    """The class of a registered method.

    Raises:
        InvalidValueError: No such method; suggests the nearest name.
    """
    transforms = available_transforms()
    if name not in transforms:
        near = difflib.get_close_matches(name, transforms, n=1)
        remedy = f"Did you mean {near[0]}?" if near else ""
        raise InvalidValueError("method", name, ", ".join(transforms), remedy)
    module, _, attribute = transforms[name].partition(":")
    return getattr(import_module(module), attribute)
