"""Recipes: YAML files that name the steps from a model to its report, which `mla-run` runs and resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from optimum_mla.core.errors import InvalidValueError, OptionError, OutputError, first_line

COMMANDS = ("mla-convert", "mla-finetune", "mla-quantize", "mla-export", "mla-benchmark")
"""The commands that a recipe may have as steps."""
WITHOUT_MODEL = ("mla-benchmark",)
"""Commands whose output is no model, so that the next step takes the model of the step before."""
JOURNAL = "run.json"
"""File in the output folder of a run that says which steps are done."""


@dataclass(frozen=True)
class Step:
    """One step of a recipe.

    Attributes:
        command: Name of the command.
        options: Its options by name, with dashes and without `model` and `output`.
        model: The model that it works on, as a hub id or a folder.
        output: The folder that it writes.
        digest: SHA-256 of this step and all steps before it, which changes if any of their options does.
    """

    command: str
    options: dict[str, Any]
    model: str
    output: Path
    digest: str

    def words(self) -> list[str]:
        """Return the arguments of the command, as they would be typed."""
        words = ["-m", self.model, str(self.output), "--overwrite"]
        for name, value in self.options.items():
            if value is True:
                words.append(f"--{name}")
            elif value is False:
                words.append(f"--no-{name}")
            else:
                values = value if isinstance(value, list) else [value]
                words += [f"--{name}", *map(str, values)]
        return words


def read_recipe(path: Path, output: str | None = None) -> tuple[Path, list[Step]]:
    """Return the output folder of a recipe and its steps.

    A recipe is a mapping with `output`, the folder of the run, and `steps`, a list whose items each map the name of a
    command to its options. The first step names its `model`. Each later one works on the result of the step before
    unless it names another model.

    Args:
        path: The YAML file.
        output: A folder instead of the recipe's.

    Raises:
        OptionError: The file is missing, not YAML, or not of this form.
        InvalidValueError: A step is no command that a recipe may have.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"recipe: {path} could not be read: {error.strerror}. Name a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"recipe: {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("steps"), list) or not content["steps"]:
        raise OptionError(f"recipe: {path} has no list of steps. Give it output: FOLDER and steps: with a list.")
    if unknown := sorted(set(map(str, content)) - {"output", "steps"}):
        raise OptionError(f"recipe: {path} has the field {unknown[0]}. Its fields are output and steps.")
    place = output or content.get("output")
    if not isinstance(place, str):
        raise OptionError(f"recipe: {path} names no output folder. Add output: FOLDER, or name it on the command line.")
    folder, steps, model, digest = Path(place), [], None, ""
    for number, item in enumerate(content["steps"], 1):
        command, options = _step(number, item)
        given = options.pop("model", model)
        if given is None:
            raise OptionError(f"recipe: step {number} ({command}) names no model. Add model: MODEL to it.")
        told = json.dumps([digest, command, given, sorted(options.items())], default=str)
        digest = hashlib.sha256(told.encode()).hexdigest()
        step = Step(command, options, str(given), folder / f"{number}-{command.removeprefix('mla-')}", digest)
        steps.append(step)
        if command not in WITHOUT_MODEL:
            model = str(step.output)
    return folder, steps


def _step(number: int, item: Any) -> tuple[str, dict[str, Any]]:
    """Return the command of a step, and its options with dashes in their names."""
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, dict) or len(item) != 1:
        raise OptionError(f"recipe: step {number} has to be one command with its options, such as mla-quantize: {{}}.")
    ((name, options),) = item.items()
    command = name if str(name).startswith("mla-") else f"mla-{name}"
    if command not in COMMANDS:
        raise InvalidValueError(f"step {number}", name, ", ".join(COMMANDS))
    if not isinstance(options or {}, dict):
        raise OptionError(f"recipe: step {number} ({command}) has options that are no mapping of names to values.")
    named = {str(option).lstrip("-").replace("_", "-"): value for option, value in (options or {}).items()}
    if "output" in named:
        raise OptionError(f"recipe: step {number} ({command}) names an output. A run puts all results into its own.")
    return command, {option: value for option, value in named.items() if value is not None}


class Journal:
    """The record of the steps of a run that are done, kept in its output folder.

    Args:
        folder: The output folder of the run; it is made if there is none.

    Raises:
        OutputError: The folder holds something else, or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        try:
            if folder.is_dir() and any(folder.iterdir()) and not self.path.is_file():
                raise OutputError(f"output: {folder} exists and holds no run. Name another folder.")
            folder.mkdir(parents=True, exist_ok=True)
            self.done: dict[str, str] = {}
            if self.path.is_file():
                self.done = json.loads(self.path.read_text(encoding="utf-8"))["done"]
            self.write()
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"output: {folder} cannot be used for a run: {first_line(error)}") from error

    def is_done(self, step: Step) -> bool:
        """Return whether a step ran with the same options, and so did all before it, and its result is there."""
        return self.done.get(step.output.name) == step.digest and step.output.is_dir()

    def note(self, step: Step) -> None:
        """Record that a step is done."""
        self.done[step.output.name] = step.digest
        self.write()

    def write(self) -> None:
        """Save the record."""
        self.path.write_text(json.dumps({"done": self.done}, indent=2) + "\n", encoding="utf-8")


def pending(journal: Journal, steps: Sequence[Step]) -> list[Step]:
    """Return the steps that are still to run, which are all from the first that is not done."""
    first = next((number for number, step in enumerate(steps) if not journal.is_done(step)), len(steps))
    return list(steps[first:])
