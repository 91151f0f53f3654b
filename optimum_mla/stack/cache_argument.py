"""Finds out what the installed Transformers calls the cache: as an argument, and in a model's outputs."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_args

from transformers import Cache, GenerationMixin

from optimum_mla.core.errors import InvalidValueError, UnsupportedStackError

RELEASED_NAMES = ("past_key_values", "cache")
"""The names that released versions of Transformers have given to the argument, the oldest first."""
OLD_LAYER_NAME = "layer_past"
"""The name by which the layers of a few old families, such as GPT-NeoX, still hand the cache to their attention."""
CANONICAL = "cache"
"""The name of the argument inside this package, whatever the installed release calls it."""


def takes_a_cache(annotation: Any) -> bool:
    """Return whether an annotation names a Transformers `Cache`, as a class, in a union, or in a string."""
    if isinstance(annotation, str):
        return re.search(r"\bCache\b", annotation) is not None
    if isinstance(annotation, type):
        return issubclass(annotation, Cache)
    return any(takes_a_cache(part) for part in get_args(annotation))


@functools.lru_cache(maxsize=1024)
def cache_parameter(function: Callable[..., Any]) -> tuple[str, int] | None:
    """Return the name and the place of the argument by which a function takes a cache.

    Args:
        function: A function or an unbound method; decorators that keep its signature are looked through.

    Returns:
        The name, and the number of positional arguments before it (`self` counts). None where the function names no
        such argument, as wrappers do that take `**kwargs`.
    """
    parameters = inspect.signature(function).parameters.values()
    for place, parameter in enumerate(parameters):
        if takes_a_cache(parameter.annotation):
            return parameter.name, place
    return None


def installed_name() -> str:
    """Return what the installed Transformers calls the cache argument in generation.

    Raises:
        UnsupportedStackError: `GenerationMixin.prepare_inputs_for_generation` names no argument that is a `Cache`.
    """
    found = cache_parameter(GenerationMixin.prepare_inputs_for_generation)
    if found is None:
        raise UnsupportedStackError(
            "transformers: GenerationMixin.prepare_inputs_for_generation has no argument annotated as a Cache, so this "
            "version of optimum-mla cannot tell how the installed Transformers hands the cache on. Update optimum-mla."
        )
    return found[0]


CACHE_ARGUMENT = installed_name()
"""The name of the cache argument in the installed release."""
ACCEPTED_NAMES = tuple(dict.fromkeys((*RELEASED_NAMES, CACHE_ARGUMENT)))
"""The names under which the public surface of this package takes a cache, the oldest first."""
OUTDATED_NAMES = ACCEPTED_NAMES[: ACCEPTED_NAMES.index(CACHE_ARGUMENT)]
"""Those that the installed release has replaced; they work, with a warning."""


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Return the keyword argument that hands `cache` to a model, for `model(ids, **cache_argument(model, cache))`.

    Args:
        model: Any Transformers model, or a wrapper around one.
        cache: A Transformers cache or None.
    """
    found = cache_parameter(type(model).forward)
    return {found[0] if found else CACHE_ARGUMENT: cache}


def cache_position(function: Callable[..., Any]) -> int:
    """Return how many positional arguments stand before the cache in a source model's `forward`, `self` included.

    Raises:
        UnsupportedStackError: The function has no argument that is a `Cache`.
    """
    return _required(function)[1]


def cache_name(function: Callable[..., Any]) -> str:
    """Return what a source class's `forward` calls the cache.

    Raises:
        UnsupportedStackError: The function has no argument that is a `Cache`.
    """
    return _required(function)[0]


def _required(function: Callable[..., Any]) -> tuple[str, int]:
    found = cache_parameter(function)
    if found is None:
        raise UnsupportedStackError(
            f"transformers: {function.__module__}.{function.__qualname__} has no argument annotated as a Cache, so a "
            "converted model of this family could not be given one. Update optimum-mla, or use another release of "
            "Transformers."
        )
    return found


def cache_of(outputs: Any) -> Any:
    """Return the cache that a model's or `generate`'s outputs hold, or None.

    Args:
        outputs: A `ModelOutput`.
    """
    if is_dataclass(outputs):
        for field in fields(outputs):
            if takes_a_cache(field.type):
                return getattr(outputs, field.name)
    return None


def renamed_cache(keywords: dict[str, Any], name: str, owner: str) -> dict[str, Any]:
    """Return keyword arguments in which the cache, by whatever known name it came, is called `name`.

    Args:
        keywords: Arguments as a caller gave them.
        name: The wanted name.
        owner: Who was called, for messages.

    Raises:
        InvalidValueError: Two different caches came by two names.
    """
    given = [known for known in ACCEPTED_NAMES if known in keywords]
    if given in ([], [name]):
        if given and name in OUTDATED_NAMES:
            _warn(name, owner)
        return keywords
    rest = {key: value for key, value in keywords.items() if key not in given}
    values = [keywords[known] for known in given if keywords[known] is not None]
    if len(values) > 1 and any(value is not values[0] for value in values):
        raise InvalidValueError(
            " and ".join(given), "two caches", "one cache", f"{owner} takes it as {CACHE_ARGUMENT}."
        )
    for known in given:
        if known in OUTDATED_NAMES:
            _warn(known, owner)
    return {**rest, name: values[0] if values else None}


def _warn(name: str, owner: str) -> None:
    if not _is_compiling():
        message = f"`{name}` of `{owner}` is called `{CACHE_ARGUMENT}` in the installed release of Transformers."
        warnings.warn(message, FutureWarning, stacklevel=4)


def _is_compiling() -> bool:
    import torch

    return torch.compiler.is_compiling()


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the `forward` of an attention with an argument `cache`, so that it takes it by every known name.

    Args:
        forward: A method with a parameter called `cache`.
    """

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if OLD_LAYER_NAME in kwargs:
            kwargs[CACHE_ARGUMENT] = kwargs.pop(OLD_LAYER_NAME)
        return forward(self, *args, **renamed_cache(kwargs, CANONICAL, f"{type(self).__name__}.forward"))

    return wrapper
