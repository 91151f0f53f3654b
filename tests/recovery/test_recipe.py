"""Recipes, what their trainers are given, and the learning rates that come of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from optimum_mla.core.errors import InvalidValueError
from optimum_mla.recovery.data import pack
from optimum_mla.recovery.guard import DivergenceGuard
from optimum_mla.recovery.recipe import Recipe, check_training, training_arguments
from tests.nn.test_attention import build

PLACE = Path("nowhere")
CONFIGS = Path(__file__).resolve().parents[2] / "benchmarks" / "configs"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"objective": "distil"}, "objective"),
        ({"train": "kvs"}, "train"),
        ({"stage1": "layers"}, "stage1"),
        ({"stage1": "layerwise", "objective": "dpo"}, "stage1"),
        ({"stage1_share": 1.0}, "stage1_share"),
        ({"teacher_bits": 2}, "teacher_bits"),
        ({"train_tokens": 0}, "train_tokens"),
        ({"merge": True, "train": "full"}, "merge"),
        ({"teacher": "somebody", "objective": "sft"}, "teacher"),
        ({"temperature": 0.0}, "temperature"),
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"kl_weight": 0.0}, "kl_weight"),
    ],
)
def test_recipes_that_cannot_be(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        Recipe(**options)
    assert caught.value.field == field


def test_a_teacher_takes_part_where_something_is_to_be_learned_from_it() -> None:
    assert Recipe().taught
    assert not Recipe(objective="sft").taught
    assert Recipe(objective="sft", stage1="layerwise", teacher="somebody").taught


def test_unknown_training_arguments_get_a_suggestion() -> None:
    with pytest.raises(InvalidValueError, match=r"Did you mean learning_rate\?"):
        check_training({"learning_rat": 1.0})
    with pytest.raises(InvalidValueError):
        check_training({"output_dir": "elsewhere"})
    check_training({"learning_rate": 1.0, "weight_decay": 0.1})


@pytest.mark.parametrize(
    ("training", "rows", "world", "steps"),
    [
        ({}, 64, 1, 8),
        ({}, 65, 1, 9),
        ({"num_train_epochs": 2.5}, 64, 1, 20),
        ({"gradient_accumulation_steps": 2}, 64, 2, 2),
        ({"per_device_train_batch_size": 3}, 10, 1, 4),
        ({"max_steps": 7, "num_train_epochs": 3}, 64, 1, 7),
        ({"max_steps": 5}, None, 1, 5),
    ],
)
def test_steps_are_those_of_the_data(training: dict[str, Any], rows: int | None, world: int, steps: int) -> None:
    chosen = training_arguments(Recipe(), training, PLACE, rows, 32, world)
    assert chosen["max_steps"] == steps
    assert chosen["warmup_steps"] == max(1, round(steps / 20))
    assert 1 <= chosen["save_steps"] <= steps
    TrainingArguments(**chosen)


@pytest.mark.parametrize("name", ["recovery", "recovery_2m", "recovery_memory"])
def test_benchmarks_are_made_with_the_defaults(name: str) -> None:
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    # Sizes, precision and what is compared; no rate, schedule, warm-up or rank.
    sizes = {"bf16", "per_device_train_batch_size", "max_steps", "save_strategy"}
    for case in config["runs"]:
        assert {**config["training"], **case.get("training", {})}.keys() <= sizes
        assert case.get("recipe", {}).keys() <= {"objective", "train", "stage1", "stage1_share"}


def test_the_rate_goes_by_what_trains() -> None:
    for train, rate in (("lora", 1e-3), ("kv", 5e-4), ("attention", 5e-4), ("full", 3e-4)):
        assert training_arguments(Recipe(train=train), {}, PLACE, 64, 32, 1)["learning_rate"] == pytest.approx(rate)
    assert training_arguments(Recipe(), {"learning_rate": 0.1}, PLACE, 64, 32, 1)["learning_rate"] == 0.1


@pytest.mark.parametrize(
    ("training", "wanted"),
    [
        ({}, ("steps", 2, True)),
        ({"save_steps": 3}, ("steps", 3, True)),
        ({"save_strategy": "epoch"}, ("epoch", 2, True)),
        ({"save_strategy": "best"}, ("steps", 2, True)),
        ({"save_strategy": "no"}, ("no", None, False)),
    ],
)
def test_held_out_text_is_measured_at_every_checkpoint(training: dict[str, Any], wanted: tuple[Any, ...]) -> None:
    chosen = training_arguments(Recipe(), training, PLACE, 80, 32, 1, held_out=True)
    made = TrainingArguments(**chosen)
    assert (made.eval_strategy.value, made.eval_steps, made.load_best_model_at_end) == wanted
    if wanted[2]:
        assert (made.metric_for_best_model, made.greater_is_better) == ("loss", False)
    plain = TrainingArguments(**training_arguments(Recipe(), training, PLACE, 80, 32, 1))
    assert not plain.load_best_model_at_end


def test_a_stream_ends_somewhere() -> None:
    with pytest.raises(InvalidValueError, match="max_steps"):
        training_arguments(Recipe(streaming=True), {}, PLACE, None, 32, 1)
    chosen = training_arguments(Recipe(streaming=True, train_tokens=32 * 8 * 5), {}, PLACE, None, 32, 1)
    assert chosen["max_steps"] == 5


def rates(model: Any, chosen: dict[str, Any]) -> list[float]:
    """Learning rate of every step, from a real trainer's scheduler."""
    trainer = Trainer(model=model, args=TrainingArguments(**chosen))
    trainer.create_optimizer_and_scheduler(chosen["max_steps"])
    found = []
    for _ in range(chosen["max_steps"]):
        found.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return found


def test_the_papers_schedule_warms_up_stays_and_decays(tmp_path: Path) -> None:
    training = {"lr_scheduler_type": "mha2mla", "learning_rate": 1.0, "max_steps": 100, "warmup_steps": 10}
    found = rates(build("Llama", "shared rotary key"), training_arguments(Recipe(), training, tmp_path, None, 8, 1))
    assert found[:10] == pytest.approx([step / 10 for step in range(10)])
    assert found[10:90] == pytest.approx([1.0] * 80)
    assert found[90:] == pytest.approx([1 - math.sqrt(step / 10) for step in range(10)], abs=1e-6)


@pytest.mark.parametrize(("rate", "diverges"), [(1e-4, False), (1e3, True)])
def test_a_loss_that_diverges_stops_the_training(rate: float, diverges: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build("Llama", "shared rotary key")
    vocabulary = model.config.vocab_size
    rows = pack(None, torch.randint(vocabulary, (512,), generator=torch.Generator().manual_seed(0)).tolist(), 8)
    training = {"learning_rate": rate, "max_steps": 12, "logging_steps": 5, "save_steps": 2, "warmup_steps": 1}
    training["lr_scheduler_type"] = "constant"
    guard = DivergenceGuard()
    options = training_arguments(Recipe(), training, tmp_path, len(rows), 8, 1)
    trainer = Trainer(model=model, args=TrainingArguments(**options), train_dataset=rows, callbacks=[guard])
    trainer.train()
    saved = sorted(int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    if diverges:
        assert guard.diverged_at is not None
        assert trainer.state.global_step == guard.diverged_at < 12
        assert all(step < guard.diverged_at for step in saved)
    else:
        assert guard.diverged_at is None
        assert trainer.state.global_step == 12
        assert saved == [10, 12]
