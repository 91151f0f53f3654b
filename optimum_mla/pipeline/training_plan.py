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
from optimum_mla.pipeline.checkpoint import Checkpoint, check_dtype, has_codec
from optimum_mla.pipeline.loading import TextOptions, read_texts
from optimum_mla.pipeline.origin import recorded_source
from optimum_mla.pipeline.run_settings import RunSettings
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
class TrainingPlan:
    """A training that can begin as soon as its models are loaded.

    Attributes:
        checkpoint: The model to train.
        config: Its config.
        coded: Whether it has a codec, with which it is trained as it is used.
        source: What it was converted from, or None where no report says so.
        teacher: What it learns from, or None.
        recipe: What trains, and against what.
        folder: The folder to write.
        work: The folder of the checkpoints of the run.
        run: The settings of the run, by which an interrupted one is known again.
        tokenizer: The tokenizer, or None.
        rows: The rows to train on.
        data: The origins of the texts, as in the report.
        length: Tokens per row.
        windows: Token ids [N, L] on which the training is measured, or None.
        text: What these windows are: `evaluation` or `held-back training`.
        keeps_best: Whether the best step is the result, not the last one.
        chosen: The fields of `TrainingArguments`.
        arguments: The same with defaults filled in.
        world: Number of processes.
        place: The device to load on.
        dtype: Of the result; `auto` for the checkpoint's own.
        overwrite: Whether a model in `folder` may be replaced.
    """

    checkpoint: Checkpoint
    config: PreTrainedConfig
    coded: bool
    source: Checkpoint | None
    teacher: Checkpoint | None
    recipe: Recipe
    folder: Path
    work: Path
    run: dict[str, Any]
    tokenizer: Any
    rows: Any
    data: dict[str, dict[str, Any]]
    length: int
    windows: Tensor | None
    text: str
    keeps_best: bool
    chosen: dict[str, Any]
    arguments: TrainingArguments
    world: int
    place: str
    dtype: str
    overwrite: bool


def plan_training(
    checkpoint: Checkpoint,
    output: str | Path,
    train_data: str | Any,
    recipe: Recipe,
    training: dict[str, Any],
    texts: TextOptions,
    settings: TrainingSettings,
) -> TrainingPlan:
    """Return the plan of a training; the arguments are those of `finetune`.

    Raises:
        MLAError: Bad input of any kind.
        TypeError: There is no such setting.
    """
    for name in settings.keys() - TrainingSettings.__annotations__.keys():
        raise TypeError(
            f"finetune() has no setting {name!r}. Its settings are {', '.join(TrainingSettings.__annotations__)}."
        )
    dtype, device = settings.get("dtype", "auto"), settings.get("device")
    overwrite, revision = settings.get("overwrite", False), settings.get("teacher_revision")
    check_dtype(dtype)
    check_training(training)
    check_installed(recipe)
    model, source = checkpoint.location, recorded_source(checkpoint)
    inputs = {
        "model": model,
        "train-data": train_data,
        "eval-data": texts.eval_data,
        "teacher": recipe.teacher,
        "model's source": None if source is None else source.location,
    }
    folder = check_output(output, inputs, overwrite, leading=int(os.environ.get("RANK", 0)) == 0)
    config = checkpoint.converted_config(coded=True)
    coded = has_codec(config)
    if coded:
        check_as_used(recipe, training)
    check_quantized(recipe, config)
    teacher = find_teacher(checkpoint, recipe, revision)
    origin = train_data if isinstance(train_data, str) else "token ids"
    run = {"model": model, "train_data": origin, **recipe.to_dict(), **training}
    run["eval_data"] = texts.eval_data if isinstance(texts.eval_data, str | None) else "token ids"
    run |= {name: getattr(texts, name) for name in ("eval_samples", "eval_length")}
    if revision is not None:
        run["teacher_revision"] = revision
    teaching = None if teacher is None else teacher.location
    read = {"model": model, "train_data": train_data, "eval_data": texts.eval_data, "teacher": teaching}
    for option, value in read.items():
        run |= {f"{option} ({file}: bytes, time)": about for file, about in fingerprint(value).items()}
    work = working_folder(folder, run, settings.get("resume", False), overwrite, inputs)

    tokenizer = checkpoint.tokenizer(needed=isinstance(train_data, str) or texts.eval_data is not None)
    _, evaluation, data = read_texts(tokenizer, config, texts)
    length = window_length(config, recipe.sequence_length, "sequence_length")
    rows, description, held_back = training_data(tokenizer, train_data, recipe, length, evaluation is None)
    data["train-data"] = {"source": origin, **description}
    windows, text = (evaluation, "evaluation") if held_back is None else (held_back, "held-back training")
    if held_back is not None:
        data["held-back"] = {"windows": len(held_back), "tokens_per_window": length}
    # DPO is not after the likelihood of text.
    keeps_best = (
        windows is not None and recipe.objective != "dpo" and bool(training.get("load_best_model_at_end", True))
    )

    world = int(os.environ.get("WORLD_SIZE", 1))
    size = None if recipe.streaming else len(rows)
    chosen = training_arguments(recipe, training, work, size, length, world, keeps_best)
    if device is not None and device.partition(":")[0] == "cpu":
        chosen["use_cpu"] = True
    arguments = make_arguments(chosen)
    if arguments.fsdp and recipe.optimizer == "muon":
        raise InvalidValueError("optimizer", "muon", "adamw for a sharded model", "Its steps need whole matrices.")
    place = device if world == 1 and device is not None else str(arguments.device)
    return TrainingPlan(
        checkpoint=checkpoint,
        config=config,
        coded=coded,
        source=source,
        teacher=teacher,
        recipe=recipe,
        folder=folder,
        work=work,
        run=run,
        tokenizer=tokenizer,
        rows=rows,
        data=data,
        length=length,
        windows=windows,
        text=text,
        keeps_best=keeps_best,
        chosen=chosen,
        arguments=arguments,
        world=world,
        place="cpu" if arguments.fsdp else place,  # A model that is to be sharded is loaded on the CPU.
        dtype=dtype,
        overwrite=overwrite,
    )


def check_quantized(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Refuse what cannot be done to quantized weights.

    Raises:
        InvalidValueError: Training them, or merging adapters into them.
    """
    method = quantized_by(config)
    if method is None:
        return
    if recipe.train not in ADAPTERS:
        raise InvalidValueError(
            "train", recipe.train, " or ".join(ADAPTERS), f"The model's weights are quantized ({method})."
        )
    if recipe.merge:
        raise InvalidValueError(
            "merge", True, f"off, as the weights are quantized ({method})",
            "Keep the adapters, or train the unquantized model and quantize the result.",
        )  # fmt: skip


def working_folder(
    folder: Path, run: dict[str, Any], resume: bool, overwrite: bool, inputs: Mapping[str, object]
) -> Path:
    """Return the folder of the checkpoints of a run, beside its output.

    Raises:
        OutputError: It holds one of the run's inputs; it holds the checkpoints of an interrupted run, and neither
            `resume` nor `overwrite` is asked for; or `resume` is, and no record tells what run they are of.
        InvalidValueError: The run to go on with had other settings, or its model or text has changed since.
    """
    work, leading = kept_folder("mla-finetune", folder), int(os.environ.get("RANK", 0)) == 0
    check_inputs_stay(work, inputs)
    before = Journal(work / RUN_FILE).entries.get("run") if resume else None
    if before is not None:
        for name in differing_names(before, run):
            raise InvalidValueError(
                name,
                as_json(run).get(name),
                f"{before.get(name)}, as in the interrupted run",
                "Start over with --overwrite.",
            )
        return work
    if leading and any(work.glob(CHECKPOINTS)):
        if resume:
            raise OutputError(
                f"output: {work} holds checkpoints of an interrupted run, but no {RUN_FILE} that tells its settings. "
                "Start over with --overwrite instead of --resume."
            )
        if not overwrite:
            raise OutputError(
                f"output: {work} holds checkpoints of an interrupted run. "
                "Go on with it by --resume, or start over with --overwrite."
            )
    if leading:
        shutil.rmtree(work, ignore_errors=True)
    return work


def training_data(
    tokenizer: Any, source: Any, recipe: Recipe, length: int, holds_back: bool
) -> tuple[Any, dict[str, Any], Tensor | None]:
    """Return the rows to train on, what the report says about them, and rows that are held back, if any.

    Args:
        tokenizer: The tokenizer of the model.
        source: The training data.
        recipe: The recipe.
        length: Tokens per row.
        holds_back: Whether rows of a text are to be held back, as far as there are enough.
    """
    if recipe.objective == "dpo":
        pairs = preferences(source)
        return pairs, {"rows": len(pairs), "tokens_per_row": None, "sha256": pairs._fingerprint}, None
    if recipe.streaming:
        rows: Any = stream(tokenizer, source, length, recipe.chat_template)
    else:
        rows = pack(tokenizer, source, length, recipe.train_tokens, recipe.chat_template)
    held: Tensor | None = None
    if holds_back:
        rows, held = hold_back(rows)
    return rows, rows.describe(), held


def make_arguments(chosen: dict[str, Any]) -> TrainingArguments:
    """Return `TrainingArguments`, and turn what it complains of into an error with one line.

    Raises:
        InvalidValueError: A value that it refuses.
    """
    try:
        return TrainingArguments(**chosen)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise InvalidValueError("training", first_line(error), "what transformers.TrainingArguments takes") from error
