"""Reading of report files. Those of other versions are read as far as that is safe."""

from __future__ import annotations

import json
import types
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from optimum_mla.core.errors import ReportError

T = TypeVar("T")


def read_report(kind: type[T], path: Path, command: str) -> T:
    """Return the report in a file.

    Fields that this version does not know are passed over. Fields that are missing take their default, or None where
    they may be None.

    Args:
        kind: A dataclass.
        path: A JSON file.
        command: The command that writes such files, for the error.

    Raises:
        ReportError: There is no such file, it is not JSON, or a field is missing or of another type.
    """
    remedy = f"Run optimum-cli {command} again, or move the file away."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ReportError(
            f"report: {path.parent} holds no {path.name}. Name a folder that optimum-cli {command} wrote."
        ) from error
    except OSError as error:
        raise ReportError(f"report: {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise ReportError(f"report: {path} is not JSON in UTF-8, so it is no report of {command}. {remedy}") from error
    try:
        return built(kind, content, "")
    except ReportError as error:
        raise ReportError(
            f"report: {path} is no report of {command} that this version reads: {error}. {remedy}"
        ) from error


def built(kind: type[T], content: Any, place: str) -> T:
    """Return an object of a dataclass from what JSON holds.

    Args:
        kind: The dataclass. Its fields may hold lists of other dataclasses.
        content: The value in the JSON file.
        place: Place of the value in the file, such as `layers[3].`, for the error.

    Raises:
        ReportError: A field is missing or of another type; the message names it.
    """
    if not isinstance(content, dict):
        raise ReportError(f"{place.rstrip('.') or 'its content'} is a {type(content).__name__}, not an object")
    hints = get_type_hints(kind)
    found = {}
    for field in fields(kind):  # type: ignore[arg-type]
        name, wanted = field.name, hints[field.name]
        if name in content:
            found[name] = converted(wanted, content[name], f"{place}{name}")
        elif not has_default(field):
            if not fits(wanted, None):
                raise ReportError(f"the field {place}{name} is missing")
            found[name] = None
    return kind(**found)


def has_default(field: Field[Any]) -> bool:
    """Return whether a field of a dataclass may be left out."""
    return field.default is not MISSING or field.default_factory is not MISSING


def converted(wanted: Any, value: Any, place: str) -> Any:
    """Return the value of a field in its type; the dataclasses of a list are built.

    Raises:
        ReportError: It is of another type.
    """
    (row,) = get_args(wanted) if get_origin(wanted) is list else (None,)
    if is_dataclass(row) and isinstance(row, type) and isinstance(value, list):
        return [built(row, item, f"{place}[{number}].") for number, item in enumerate(value)]
    if not fits(wanted, value):
        raise ReportError(f"the field {place} is a {type(value).__name__}")
    return value


def fits(wanted: Any, value: Any) -> bool:
    """Return whether a value from JSON is of a type: a class, a union, a list or a dictionary."""
    if wanted is Any:
        return True
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return any(fits(one, value) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(inner[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(inner[1], item) for item in value.values())
    if wanted in (int, float):
        # JSON does not tell 64.0 from 64.
        return isinstance(value, int | wanted) and not isinstance(value, bool)
    return isinstance(value, wanted)
