"""Recipes: YAML files that name the steps from a model to its report, which `mla-run` runs and resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from optimum_mla.core.errors import InvalidValueError, OptionError, OutputError
from optimum_mla.io.folder import KEPT, as_output_error, kept_folder, resolve_output
from optimum_mla.io.inputs import fingerprint
from optimum_mla.io.journal import Journal

COMMANDS = ("mla-convert", "mla-finetune", "mla-quantize", "mla-export", "mla-benchmark")
"""The commands that a recipe may have as steps."""
WITHOUT_MODEL = ("mla-benchmark",)
"""Commands whose output is no model, so that the next step takes the model of the step before."""
INPUTS = (
    "baseline",
    "calibration-data",
    "compare",
    "config",
    "eval-data",
    "recover-data",
    "statistics",
    "tasks-path",
    "teacher",
    "train-data",
)
"""The options, beside the model, that name a file or a folder which a step reads."""
JOURNAL = "run.jsonl"
"""File in the output folder of a run that says which steps were begun and which are done."""


@dataclass(frozen=True)
class Step:
    """One step of a recipe.

    Attributes:
        command: Name of the command.
        options: Its options by name, with dashes and without `model` and `output`.
        model: The model that it works on, as a hub id or a folder.
        output: The folder that it writes.
    """

    command: str
    options: dict[str, Any]
    model: str
    output: Path

    def digest(self, before: str) -> str:
        """Return a SHA-256 that changes with the options of the step, with the files that they name, and with `before`.

        Args:
            before: That of the step before, whose output must be there. It is empty for the first step.
        """
        files = [fingerprint(place) for place in self._inputs()]
        content = json.dumps([before, self.command, self.model, sorted(self.options.items()), files], default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def _inputs(self) -> Iterator[object]:
        """Yield what the step reads, by the names that its options give, and that a YAML file of options gives."""
        yield self.model
        for options in (_settings(self.options.get("config")), self.options):
            for name in INPUTS:
                value = options.get(name)
                yield from value if isinstance(value, list) else [value]


def _settings(path: Any) -> dict[str, Any]:
    """Return the options in a YAML file for `mla-finetune --config`; none where it cannot be read, which it says."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, TypeError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return _named(content) if isinstance(content, dict) else {}


def _named(options: dict[Any, Any]) -> dict[str, Any]:
    """Return options by their names as the command line has them, with dashes."""
    return {str(option).lstrip("-").replace("_", "-"): value for option, value in options.items()}


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
    folder, steps, model = Path(place), [], None
    for number, item in enumerate(content["steps"], 1):
        command, options = _step(number, item)
        given = options.pop("model", model)
        if given is None:
            raise OptionError(f"recipe: step {number} ({command}) names no model. Add model: MODEL to it.")
        step = Step(command, options, str(given), folder / f"{number}-{command.removeprefix('mla-')}")
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
    named = _named(options or {})
    if "output" in named:
        raise OptionError(f"recipe: step {number} ({command}) names an output. A run puts all results into its own.")
    return command, {option: value for option, value in named.items() if value is not None}


@dataclass(frozen=True)
class Start:
    """How a step begins.

    Attributes:
        resume: Whether it goes on with what an interrupted run of the same step kept.
        remark: What to tell the user about that, as the end of a line; may be empty.
    """

    resume: bool
    remark: str = ""


class RunRecord:
    """The record of the steps of a run, kept in its output folder.

    Args:
        folder: The output folder of the run; it is made if there is none.
        overwrite: Whether to begin interrupted steps anew, and to replace results that the record does not know.

    Raises:
        OutputError: The folder holds something else, or cannot be written.
    """

    def __init__(self, folder: Path, overwrite: bool = False) -> None:
        path = folder / JOURNAL
        with as_output_error(folder):
            if folder.is_dir() and any(folder.iterdir()) and not path.is_file():
                raise OutputError(f"output: {folder} exists and holds no run. Name another folder.")
            folder.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(path)
        self._overwrite = overwrite
        self._digest, self._pending = "", False

    def begin(self, step: Step) -> Start | None:
        """Return how a step begins; None if it is done: all before it are, and nothing that it depends on has changed.

        The steps of a run are asked for in their order, each after the one before it is done.

        Raises:
            OutputError: Its output is there, but the record does not say what made it, as after damage to its file.
        """
        self._digest = step.digest(self._digest)
        begun, done = (self._journal.entries.get(f"{word} {step.output.name}") for word in ("begun", "done"))
        self._pending = self._pending or done != self._digest or not step.output.is_dir()
        if not self._pending:
            return None
        if begun is None and step.output.exists() and not self._overwrite:
            raise OutputError(
                f"output: {step.output} is there, but {self._journal.path} does not say what made it. "
                "Move it away, or replace it by mla-run with --overwrite."
            )
        start = Start(resume=False)
        if step.command in KEPT and kept_folder(step.command, resolve_output(step.output)).is_dir():
            # Where the record does not know of what options it is, the command itself finds out.
            if begun in (None, self._digest) and not self._overwrite:
                start = Start(True, ", going on with what was kept of it")
            else:
                asked = "as --overwrite asks" if self._overwrite else "its options, model or text have changed"
                start = Start(False, f", begun anew, without what was kept of it: {asked}")
        elif done not in (None, self._digest):
            start = Start(False, ", done again: its options, model or text have changed")
        self._journal.add(f"begun {step.output.name}", self._digest)
        return start

    def end(self, step: Step) -> None:
        """Record that the step that was begun last is done."""
        self._journal.add(f"done {step.output.name}", self._digest)
