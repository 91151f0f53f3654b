"""The registry of methods. It imports no heavy library, so that the command line can list the methods quickly."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.suggestions import did_you_mean

_TRANSFORMS: dict[str, str] = {
    "gqa2mla": "optimum_mla.methods.gqa2mla:GQA2MLA",
    "mha2mla": "optimum_mla.methods.mha2mla:MHA2MLA",
    "x-ecomla": "optimum_mla.methods.xecomla:XEcoMLA",
}


ENTRY_POINTS = "optimum_mla.transforms"
"""The entry-point group in which other packages offer methods."""


def available_transforms() -> dict[str, str]:
    """Return the names of all methods and their places as `module:Class`.

    These are the built-in methods, the registered ones, and those that installed packages offer.
    """
    return _TRANSFORMS | {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def register_transform(name: str, location: str) -> None:
    """Add a method of your own to this process.

    To offer a method on the command line too, a package declares an entry point in the group `optimum_mla.transforms`.

    Args:
        name: The name by which users select it.
        location: The place of an `MLATransformation` class, as `module:Class`. It is imported when it is first used.
    """
    _TRANSFORMS[name] = location


def transform_class(name: str) -> Any:
    """Return the class of a method.

    Raises:
        InvalidValueError: There is no such method. The message suggests a similar name if there is one.
    """
    transforms = available_transforms()
    if name not in transforms:
        raise InvalidValueError("method", name, ", ".join(transforms), did_you_mean(name, transforms))
    module, _, attribute = transforms[name].partition(":")
    return getattr(import_module(module), attribute)
