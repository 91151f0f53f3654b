"""All that `mla-finetune` decides before it loads a model's weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, TrainingArguments

from optimum_mla.calibrate.text import window_length
from optimum_mla.core.errors import InvalidValueError, OutputError, first_line
from optimum_mla.io.folder import check_output, kept_folder
from optimum_mla.io.inputs import check_inputs_stay, fingerprint
from optimum_mla.io.journal import Journal, as_json, differing_names
from optimum_mla.models.coded import has_codec
from optimum_mla.pipeline.loading import TextOptions, read_texts
from optimum_mla.pipeline.origin import recorded_source
from optimum_mla.pipeline.run_settings import RunOptions, RunSettings
from optimum_mla.pipeline.teacher import find_teacher
from optimum_mla.recovery.as_used import check_as_used
from optimum_mla.recovery.data import hold_back, pack, preferences, stream
from optimum_mla.recovery.parameters import ADAPTERS
from optimum_mla.recovery.recipe import Recipe, check_installed, check_training, training_arguments
from optimum_mla.recovery.stages import CHECKPOINTS
from optimum_mla.weights.choices import quantized_by

RUN_FILE = "run.jsonl"
"""The journal of a run beside its checkpoints, which holds its settings."""


class TrainingSettings(RunSettings, total=False):
    """How a training runs and what it writes.

    The dtype is that of the result, a revision is that of `model` alone, and with `overwrite` the checkpoints of an
    interrupted run are dropped too.

    Attributes:
        resume: Go on from the newest checkpoint of an interrupted run.
        teacher_revision: Branch, tag or commit of the teacher on the hub; None takes the main branch, or for the
            model that the conversion started from the commit that was converted.
    """

    resume: bool
    teacher_revision: str | None


@dataclass(frozen=True)
class TrainingOptions(RunOptions):
    """These settings with their defaults; see `TrainingSettings`."""

    resume: bool = False
    teacher_revision: str | None = None


@dataclass(frozen=True)
class TrainingTexts:
    """The texts that a training reads.

    Attributes:
        rows: The rows to train on.
        length: Tokens per row.
        windows: Token ids [N, L] on which the training is measured, or None.
        named: What these windows are: `evaluation` or `held-back training`.
        data: The origins of the texts, as in the report.
    """

    rows: Any
    length: int
    windows: Tensor | None
    named: str
    data: dict[str, dict[str, Any]]

    @classmethod
    def read(
        cls, tokenizer: Any, config: PreTrainedConfig, train_data: Any, recipe: Recipe, texts: TextOptions
    ) -> TrainingTexts:
        """Read the texts. Without an evaluation text, rows of a training text are held back, if there are enough.

        Raises:
            MLAError: A text cannot be read, or is too short.
        """
        _, windows, data = read_texts(tokenizer, config, texts)
        length, named = window_length(config, recipe.sequence_length, "sequence_length"), "evaluation"
        if recipe.objective == "dpo":
            rows: Any = preferences(train_data)
            said = {"rows": len(rows), "tokens_per_row": None, "sha256": rows._fingerprint}
        else:
            if recipe.streaming:
                rows = stream(tokenizer, train_data, length, recipe.chat_template)
            else:
                rows = pack(tokenizer, train_data, length, recipe.train_tokens, recipe.chat_template)
            if windows is None:
                rows, windows = hold_back(rows)
                if windows is not None:
                    named = "held-back training"
                    data["held-back"] = {"windows": len(windows), "tokens_per_window": length}
            said = rows.describe()
        data["train-data"] = {"source": source_of_rows(train_data), **said}
        return cls(rows, length, windows, named, data)


class TrainingPlan:
    """A training that can begin as soon as its models are loaded; the arguments are those of `finetune`.

    Attributes:
        checkpoint: The model to train.
        config: Its config.
        coded: Whether it has a codec, with which it is trained as it is used.
        source: What it was converted from, or None where no report says so.
        teacher: What it learns from, or None.
        recipe: What trains, and against what.
        options: How the training runs. The dtype is that of the result.
        folder: The folder to write.
        work: The folder of the checkpoints of the run.
        run: The settings of the run, by which an interrupted one is known again.
        tokenizer: The tokenizer, or None.
        texts: The rows to train on, and the windows to measure on.
        keeps_best: Whether the best step is the result, not the last one.
        chosen: The fields of `TrainingArguments`.
        arguments: The same with defaults filled in.
        place: The device to load on.

    Raises:
        MLAError: Bad input of any kind.
        TypeError: There is no such setting.
    """

    def __init__(
        self,
        model: str,
        output: str | Path,
        train_data: str | Any,
        recipe: Recipe,
        training: dict[str, Any],
        texts: TextOptions,
        settings: TrainingSettings,
    ) -> None:
        for name in settings.keys() - TrainingSettings.__annotations__.keys():
            known = ", ".join(TrainingSettings.__annotations__)
            raise TypeError(f"finetune() has no setting {name!r}. Its settings are {known}.")
        self.recipe, self.options = recipe, TrainingOptions(**settings)
        self.checkpoint = self.options.checkpoint(model)
        check_training(training)
        check_installed(recipe)
        self.source = recorded_source(self.checkpoint)
        read = {"model": model, "train-data": train_data, "eval-data": texts.eval_data, "teacher": recipe.teacher}
        inputs = {**read, "model's source": None if self.source is None else self.source.location}
        self.folder = check_output(output, inputs, self.options.overwrite, leading=leads())
        self.config = self.checkpoint.converted_config(coded=True)
        self.coded = has_codec(self.config)
        if self.coded:
            check_as_used(recipe, training)
        check_quantized(recipe, self.config)
        self.teacher = find_teacher(self.checkpoint, recipe, self.options.teacher_revision)
        read["teacher"] = None if self.teacher is None else self.teacher.location
        self.run = {"model": model, "train_data": source_of_rows(train_data), **recipe.to_dict(), **training}
        self.run |= depends_on(read, texts, self.options)
        self.work = working_folder(self.folder, self.run, self.options, inputs)

        needed = isinstance(train_data, str) or texts.eval_data is not None
        self.tokenizer = self.checkpoint.tokenizer(needed)
        self.texts = TrainingTexts.read(self.tokenizer, self.config, train_data, recipe, texts)
        # DPO is not after the likelihood of text.
        measured = self.texts.windows is not None and recipe.objective != "dpo"
        self.keeps_best = measured and bool(training.get("load_best_model_at_end", True))
        self._choose_arguments(training)

    def _choose_arguments(self, training: dict[str, Any]) -> None:
        """Set what the trainer is given, and the device to load on.

        Raises:
            InvalidValueError: A value that it refuses, or an optimizer that cannot train a sharded model.
        """
        recipe, texts, device = self.recipe, self.texts, self.options.device
        size = None if recipe.streaming else len(texts.rows)
        self.chosen = training_arguments(recipe, training, self.work, size, texts.length, world(), self.keeps_best)
        if device is not None and device.partition(":")[0] == "cpu":
            self.chosen["use_cpu"] = True
        try:
            self.arguments = TrainingArguments(**self.chosen)
        except (ValueError, TypeError, RuntimeError, ImportError) as error:
            allowed = "what transformers.TrainingArguments takes"
            raise InvalidValueError("training", first_line(error), allowed) from error
        if self.arguments.fsdp and recipe.optimizer == "muon":
            raise InvalidValueError("optimizer", "muon", "adamw for a sharded model", "Its steps need whole matrices.")
        self.place = device if world() == 1 and device is not None else str(self.arguments.device)
        if self.arguments.fsdp:  # A model that is to be sharded is loaded on the CPU.
            self.place = "cpu"


def world() -> int:
    """Return the number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def leads() -> bool:
    """Return whether this process writes."""
    return int(os.environ.get("RANK", 0)) == 0


def source_of_rows(train_data: Any) -> str:
    """Return the name of training data."""
    return train_data if isinstance(train_data, str) else "token ids"


def depends_on(read: dict[str, Any], texts: TextOptions, options: TrainingOptions) -> dict[str, Any]:
    """Return what the result depends on beside model, recipe and arguments, by the names that errors give.

    Of what the options of `read` name, files are told by their size and time.
    """
    run: dict[str, Any] = {
        "eval_data": texts.eval_data if isinstance(texts.eval_data, str | None) else "token ids",
        "eval_samples": texts.eval_samples,
        "eval_length": texts.eval_length,
    }
    if options.teacher_revision is not None:
        run["teacher_revision"] = options.teacher_revision
    for option, value in read.items():
        name = option.replace("-", "_")
        run |= {f"{name} ({file}: bytes, time)": about for file, about in fingerprint(value).items()}
    return run


def check_quantized(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Refuse to train quantized weights, or to merge adapters into them.

    Raises:
        InvalidValueError: The recipe does that.
    """
    method = quantized_by(config)
    if method is not None and recipe.train not in ADAPTERS:
        remedy = f"The model's weights are quantized ({method})."
        raise InvalidValueError("train", recipe.train, " or ".join(ADAPTERS), remedy)
    if method is not None and recipe.merge:
        remedy = "Keep the adapters, or train the unquantized model and quantize the result."
        raise InvalidValueError("merge", True, f"off, as the weights are quantized ({method})", remedy)


def working_folder(folder: Path, run: dict[str, Any], options: TrainingOptions, inputs: Mapping[str, object]) -> Path:
    """Return the folder of the checkpoints of a run, beside its output.

    Raises:
        OutputError: It holds one of the run's inputs; it holds the checkpoints of an interrupted run, and neither
            `resume` nor `overwrite` is asked for; or `resume` is, and no record tells what run they are of.
        InvalidValueError: The run to go on with had other settings, or its model or text has changed since.
    """
    work = kept_folder("mla-finetune", folder)
    check_inputs_stay(work, inputs)
    before = Journal(work / RUN_FILE).entries.get("run") if options.resume else None
    if before is not None:
        for name in differing_names(before, run):
            allowed = f"{before.get(name)}, as in the interrupted run"
            raise InvalidValueError(name, as_json(run).get(name), allowed, "Start over with --overwrite.")
        return work
    if not leads():
        return work
    if any(work.glob(CHECKPOINTS)):
        kept = f"output: {work} holds checkpoints of an interrupted run"
        if options.resume:
            remedy = "Start over with --overwrite instead of --resume."
            raise OutputError(f"{kept}, but no {RUN_FILE} that tells its settings. {remedy}")
        if not options.overwrite:
            raise OutputError(f"{kept}. Go on with it by --resume, or start over with --overwrite.")
    shutil.rmtree(work, ignore_errors=True)
    return work
