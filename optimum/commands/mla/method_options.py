"""The arguments of `mla-convert` that are keyword arguments of methods, those of installed packages among them.

A method's class declares them in `command_options`. The built-in methods' are in a file that loads nothing; those of a
package are read by importing it, and that only when a command line names its method or asks for help.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, BooleanOptionalAction, _ArgumentGroup
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

ENTRY_POINTS = "optimum_mla.transforms"
"""The entry-point group in which packages offer methods, as `optimum_mla.methods.registry` has it."""


def built_in_options() -> dict[str, dict[str, Any]]:
    """Return the declarations of the built-in methods by keyword argument, without importing `optimum_mla`.

    Raises:
        RuntimeError: The package is not installed where Python finds it.
    """
    spec = find_spec("optimum_mla")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("optimum_mla: not found. Install optimum-mla again.")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return run_path(str(folder / "methods" / "command_options.py"))["BUILT_IN"]


def add_method_options(
    parser: ArgumentParser, declared: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Any], title: str
) -> None:
    """Add declared options to a parser, whose default `method_options` has the names of all that it has.

    Args:
        parser: The parser of `mla-convert`.
        declared: Declarations by keyword argument; see `ConversionMethod.command_options`.
        groups: Groups of the parser by the title that a declaration gives as its `group`.
        title: Title of the group for those that give none, or one that there is not.
    """
    for name, declaration in declared.items():
        words = {key: value for key, value in declaration.items() if key not in ("group", "flag")}
        if words.get("type") is bool:  # --name and --no-name
            words["action"] = BooleanOptionalAction
            del words["type"]
        group = groups.get(declaration.get("group", title)) or _titled(parser, title)
        group.add_argument(declaration.get("flag", f"--{name.replace('_', '-')}"), dest=name, default=None, **words)
        parser.set_defaults(method_options=[*(parser.get_default("method_options") or []), name])


def _titled(parser: ArgumentParser, title: str) -> _ArgumentGroup:
    """Return the group of a title, which is made if there is none."""
    known = {group.title: group for group in parser._action_groups}
    return known.get(title) or parser.add_argument_group(title)


def add_installed_options(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of the method of an installed package that a command line names.

    Those of all installed methods are added if the command line asks for help, or has an option that is none yet, so
    that an option of another method is refused as such.

    Args:
        parser: The parser of `mla-convert`, which ends the process with one line where the named method cannot be read.
        words: The arguments of the command.
    """
    installed = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if not installed:
        return
    probe = ArgumentParser(add_help=False)
    probe.add_argument("--method", nargs="?")
    probe.add_argument("-h", "--help", action="store_true")
    asked, _ = probe.parse_known_args(list(words))
    if asked.method in installed:
        problem = _add_options_of(parser, installed.pop(asked.method))
        if problem is not None and not asked.help:
            parser.error(f"method {asked.method}: {problem}. Mend or uninstall that package, or take another method.")
    flags = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
    known = tuple(parser._option_string_actions)
    if asked.help or not all(any(option.startswith(flag) for option in known) for flag in flags):
        for point in installed.values():
            _add_options_of(parser, point)


def _add_options_of(parser: ArgumentParser, point: EntryPoint) -> str | None:
    """Add the options of an installed method in a group of their own, or that they cannot be read, and return that."""
    title, known = f"options of {point.name}", built_in_options()
    if any(group.title == title for group in parser._action_groups):
        return None
    try:
        declared = {name: one for name, one in point.load().command_options.items() if one != known.get(name)}
        trial = ArgumentParser(add_help=False)
        add_method_options(trial, declared, {}, title)
        trial.format_help()  # Help texts are formatted with `%` only when they are shown.
        add_method_options(parser, declared, {}, title)
    except (Exception, SystemExit) as error:  # The package of someone else may fail in any way.
        problem = f"its options cannot be read from {point.value}: {' '.join(str(error).split()).rstrip('.')}"
        _titled(parser, title).description = problem
        return problem
    return None


def read_installed_options(parser: ArgumentParser) -> None:
    """Let a parser add the options of installed packages when it parses, because importing a package takes long."""
    parse = parser.parse_known_args

    def parse_known_args(args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        add_installed_options(parser, words)
        return parse(words, namespace)

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]
