"""The stages of a training, which run one after the other, and their checkpoints."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from optimum_mla.calibrate.text import DEFAULT_WINDOW
from optimum_mla.core.errors import InvalidValueError, MLAError, TrainingError, first_line
from optimum_mla.io.faults import check_json
from optimum_mla.recovery.distill import DistillationTrainer, LayerwiseTrainer
from optimum_mla.recovery.dpo import dpo_trainer
from optimum_mla.recovery.guard import DivergenceGuard
from optimum_mla.recovery.optimizers import trainer_options
from optimum_mla.recovery.recipe import Recipe

CHECKPOINTS = "*/checkpoint-*"
"""Pattern of the folders of checkpoints in the folder of a run."""


@dataclass
class Training:
    """The results of the stages of a run.

    Attributes:
        losses: Log entries with a loss, each with the name of its stage as `stage`.
        steps: Number of optimizer steps so far.
        resumed_at: Step of the checkpoint that the run continued from, or None.
        diverged_at: Step at which the loss diverged, or None.
        seconds: Wall time of the trainers alone.
        pair_tokens: Number of tokens of preference pairs that DPO has seen.
    """

    losses: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    resumed_at: int | None = None
    diverged_at: int | None = None
    seconds: float = 0.0
    pair_tokens: int = 0


def run_stages(
    model: Any,
    teacher: PreTrainedModel | None,
    rows: Any,
    tokenizer: Any,
    recipe: Recipe,
    chosen: dict[str, Any],
    work: Path,
) -> Training:
    """Run the one or two stages of a recipe; each continues from its newest checkpoint if there is one.

    Raises:
        TrainingError: The loss diverged before the first checkpoint.
    """
    done = Training()
    stages: list[tuple[str, int]] = [(recipe.objective, chosen["max_steps"])]
    if recipe.stage1 != "none":
        first = max(1, round(recipe.stage1_share * chosen["max_steps"]))
        stages = [(recipe.stage1, first), (recipe.objective, max(1, chosen["max_steps"] - first))]
    folders = [work / name for name, _ in stages]
    begun = max((i for i, place in enumerate(folders) if newest_checkpoint(place)), default=0)
    for (name, _), place in list(zip(stages, folders, strict=True))[:begun]:
        state = TrainerState.load_from_json(str(Path(str(newest_checkpoint(place))) / TRAINER_STATE_NAME))
        done.losses += logged(name, state)
        done.steps += state.global_step
    for (name, steps), place in list(zip(stages, folders, strict=True))[begun:]:
        options = {**chosen, "max_steps": steps, "output_dir": str(place)}
        if len(stages) > 1:
            options["warmup_steps"] = min(chosen["warmup_steps"], steps)
        try:
            trainer = make_trainer(name, model, teacher, rows, tokenizer, recipe, options)
        except (MLAError, torch.OutOfMemoryError):
            raise
        except (ValueError, RuntimeError, ImportError) as error:
            # Some arguments are checked by the trainer only, such as `report_to` and `eval_strategy`.
            raise InvalidValueError("training", first_line(error), "what transformers.Trainer takes") from error
        train_stage(trainer, name, place, done)
        if done.diverged_at is not None:
            break
    return done


def newest_checkpoint(place: Path, before: float = math.inf) -> str | None:
    """Return the newest complete checkpoint of a stage at a step below `before`, or None.

    A checkpoint is incomplete if the process was killed while it was written.
    """
    # The trainer writes this file last.
    found = {
        int(path.parent.name.rpartition("-")[2]): path.parent
        for path in place.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")
        if check_json(path) is None
    }
    steps = [step for step in found if step < before]
    return str(found[max(steps)]) if steps else None


def logged(stage: str, state: TrainerState) -> list[dict[str, Any]]:
    """Return the logged losses of a stage for the report."""
    return [{"stage": stage, **entry} for entry in state.log_history if "loss" in entry]


def make_trainer(
    name: str,
    model: Any,
    teacher: PreTrainedModel | None,
    rows: Any,
    tokenizer: Any,
    recipe: Recipe,
    options: dict[str, Any],
) -> Trainer:
    """Return the trainer of one stage."""
    if name == "dpo":
        return dpo_trainer(model, rows, tokenizer, {"max_length": recipe.sequence_length or DEFAULT_WINDOW, **options})
    arguments = TrainingArguments(**{**options, "remove_unused_columns": False})
    common = {"args": arguments, "train_dataset": rows, **trainer_options(recipe.optimizer, arguments)}
    if name == "sft":
        return Trainer(model=model, **common)
    if teacher is None:
        raise InvalidValueError("teacher", None, "a hub id or folder")
    if name == "layerwise":
        return LayerwiseTrainer(model, teacher, **common)
    weights = {"kl_weight": recipe.kl_weight, "ce_weight": recipe.ce_weight, "temperature": recipe.temperature}
    return DistillationTrainer(model, teacher, **weights, **common)


def train_stage(trainer: Trainer, name: str, place: Path, done: Training) -> None:
    """Run one trainer; if its loss diverges, load the newest checkpoint from before that.

    Raises:
        TrainingError: The loss diverged before the first checkpoint.
    """
    guard = DivergenceGuard()
    trainer.add_callback(guard)
    checkpoint = newest_checkpoint(place)
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        done.resumed_at = done.steps + state.global_step
        if state.global_step >= trainer.args.max_steps:
            # The run was stopped after the last step of this stage, and the trainer would take one more step.
            trainer._load_from_checkpoint(checkpoint)
            done.losses += logged(name, state)
            done.steps += state.global_step
            return
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    done.seconds += time.perf_counter() - start
    losses = logged(name, trainer.state)
    done.losses += losses
    done.pair_tokens += max((int(entry.get("num_tokens", 0)) for entry in trainer.state.log_history), default=0)
    if guard.diverged_at is None:
        done.steps += trainer.state.global_step
        return
    # The loss of a step belongs to the weights before its update, so a checkpoint is good if a later loss is good.
    vouched = max((entry["step"] for entry in losses if entry["step"] < guard.diverged_at), default=0)
    good = newest_checkpoint(place, before=vouched)
    if good is None:
        raise TrainingError(
            f"learning_rate: the loss was {guard.value:.3g} at step {guard.diverged_at}, before the first checkpoint. "
            f"Try a learning rate below {trainer.args.learning_rate:g}."
        )
    trainer._load_from_checkpoint(good)
    done.steps += int(good.rpartition("-")[2])
    done.diverged_at = guard.diverged_at
