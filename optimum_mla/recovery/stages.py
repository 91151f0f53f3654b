"""The stages of a training, which run one after the other, and their checkpoints."""

from __future__ import annotations

import copy
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
from optimum_mla.recovery.as_used import AsUsedTrainer
from optimum_mla.recovery.distill import DistillationTrainer, LayerwiseTrainer
from optimum_mla.recovery.guard import DivergenceGuard
from optimum_mla.recovery.held_out import HeldOut, HeldOutTrainer
from optimum_mla.recovery.optimizers import trainer_options
from optimum_mla.recovery.recipe import Recipe

CHECKPOINTS = "*/checkpoint-*"
"""Pattern of the folders of checkpoints in the folder of a run."""


@dataclass
class Training:
    """The results of the stages of a run.

    Attributes:
        losses: Log entries with a loss, each with the name of its stage as `stage`.
        held_out: The loss of the held-out text by optimizer step, from the first evaluation on.
        steps: Number of optimizer steps so far.
        kept: Optimizer steps of the weights that are kept because they are best on the held-out text, 0 for those that
            the training began with, or None without such a choice.
        resumed_at: Step of the checkpoint that the run continued from, or None.
        diverged_at: Step at which the loss diverged, or None.
        seconds: Wall time of the trainers alone.
        pair_tokens: Number of tokens of preference pairs that DPO has seen.
    """

    losses: list[dict[str, Any]] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    steps: int = 0
    kept: int | None = None
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
    held_out: HeldOut | None = None,
) -> Training:
    """Run the one or two stages of a recipe; each continues from its newest checkpoint if there is one.

    The last stage is evaluated on the held-out text, if there is some, and ends with the best weights on it. If no step
    was better than the start, it ends with those of its last step, and `kept` is 0.

    Raises:
        TrainingError: The loss diverged before the first checkpoint.
    """
    done = Training()
    stages: list[tuple[str, int]] = [(recipe.objective, chosen["max_steps"])]
    if recipe.stage1 != "none":
        first = max(1, round(recipe.stage1_share * chosen["max_steps"]))
        stages = [(recipe.stage1, first), (recipe.objective, max(1, chosen["max_steps"] - first))]
    begun = max((i for i, (name, _) in enumerate(stages) if newest_checkpoint(work / name)), default=0)
    for index, (name, steps) in enumerate(stages):
        place, last = work / name, name == recipe.objective
        if index < begun:
            state = TrainerState.load_from_json(str(Path(str(newest_checkpoint(place))) / TRAINER_STATE_NAME))
            done.losses += logged(name, state)
            done.steps += state.global_step
            continue
        options = {**chosen, "max_steps": steps, "output_dir": str(place)}
        if len(stages) > 1:
            options["warmup_steps"] = min(chosen["warmup_steps"], steps)
        if not last:
            options |= {"eval_strategy": "no", "load_best_model_at_end": False}
        try:
            trainer = make_trainer(name, model, teacher, rows, tokenizer, recipe, options, held_out if last else None)
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
    teacher: Any,
    rows: Any,
    tokenizer: Any,
    recipe: Recipe,
    options: dict[str, Any],
    held_out: HeldOut | None = None,
) -> Trainer:
    """Return the trainer of one stage; DPO has no use for held-out text."""
    if name == "dpo":
        return dpo_trainer(model, rows, tokenizer, {"max_length": recipe.sequence_length or DEFAULT_WINDOW, **options})
    arguments = TrainingArguments(**{**options, "remove_unused_columns": False})
    common = {"args": arguments, "train_dataset": rows, "held_out": held_out}
    common |= trainer_options(recipe.optimizer, arguments)
    if name == "sft":
        return HeldOutTrainer(model=model, **common)
    if name == "layerwise":
        return LayerwiseTrainer(model, teacher, **common)
    weights = {"kl_weight": recipe.kl_weight, "ce_weight": recipe.ce_weight, "temperature": recipe.temperature}
    kind = AsUsedTrainer if hasattr(model, "latent_codec") else DistillationTrainer
    return kind(model, teacher, **weights, **common)


def dpo_trainer(model: Any, pairs: Any, tokenizer: Any, options: dict[str, Any]) -> Trainer:
    """Return TRL's trainer for direct preference optimization (Rafailov et al., arXiv 2305.18290).

    Its reference is the model in its present state: a frozen copy, or the model without its adapters if it has some.
    Without a padding token the end-of-text token pads.
    """
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model=model,
        ref_model=None if hasattr(model, "disable_adapter") else copy.deepcopy(model).requires_grad_(False).eval(),
        args=DPOConfig(**options),
        train_dataset=pairs,
        processing_class=copy.deepcopy(tokenizer),  # TRL gives it a padding token.
    )


def train_stage(trainer: Trainer, name: str, place: Path, done: Training) -> None:
    """Run one trainer, which ends with its best weights on held-out text, if it has some, or else with its last ones.

    If the loss diverges, weights from before that are loaded.

    Raises:
        TrainingError: The loss diverged before the first checkpoint.
    """
    guard = DivergenceGuard()
    trainer.add_callback(guard)
    checkpoint = newest_checkpoint(place)
    before = done.steps
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        done.resumed_at = before + state.global_step
        if state.global_step >= trainer.args.max_steps:
            # The run was stopped after the last step of this stage, and the trainer would take one more step.
            best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
            trainer._load_from_checkpoint(best or checkpoint)
            done.losses += logged(name, state)
            done.steps += state.global_step
            note_held_out(trainer, state, before, done)
            return
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    done.seconds += time.perf_counter() - start
    losses = logged(name, trainer.state)
    done.losses += losses
    done.pair_tokens += max((int(entry.get("num_tokens", 0)) for entry in trainer.state.log_history), default=0)
    note_held_out(trainer, trainer.state, before, done)
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
    if not done.kept:  # Otherwise the best weights are loaded.
        trainer._load_from_checkpoint(good)
    done.steps += int(good.rpartition("-")[2])
    done.diverged_at = guard.diverged_at


def note_held_out(trainer: Trainer, state: TrainerState, before: int, done: Training) -> None:
    """Note the losses of the held-out text in a stage that came after `before` steps, and which weights are kept."""
    done.held_out |= {before + entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
    if trainer.args.load_best_model_at_end:
        done.kept = before + state.best_global_step if state.best_global_step else 0
