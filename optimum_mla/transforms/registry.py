"""Names of the methods. Imports nothing heavy, so that the command line can list them."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

from optimum_mla.errors import InvalidValueError

_TRANSFORMS: dict[str, str] = {
    "gqa2mla": "optimum_mla.transforms.gqa2mla:GQA2MLA",
    "mha2mla": "optimum_mla.transforms.mha2mla:MHA2MLA",
    "x-ecomla": "optimum_mla.transforms.xecomla:XEcoMLA",
}


def available_transforms() -> dict[str, str]:
    """Every registered method: its name and where it is, as `module:Class`."""
    return dict(_TRANSFORMS)


def register_transform(name: str, location: str) -> None:
    """Add a method of your own, for Python and for `optimum-cli mla-convert --method`.

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
    if name not in _TRANSFORMS:
        near = difflib.get_close_matches(name, _TRANSFORMS, n=1)
        remedy = f"Did you mean {near[0]}?" if near else ""
        raise InvalidValueError("method", name, ", ".join(_TRANSFORMS), remedy)
    module, _, attribute = _TRANSFORMS[name].partition(":")
    return getattr(import_module(module), attribute)
