"""`mla-finetune` on a tiny converted model: what it writes, how it goes on after a kill, and what it refuses."""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from optimum.commands.optimum_cli import main
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from optimum_mla.calibrate.text import token_windows
from optimum_mla.core.errors import InvalidValueError, OptionError, OutputError, TrainingError
from optimum_mla.measure.quality import perplexity
from optimum_mla.pipeline import TextOptions, convert, finetune, quantize
from optimum_mla.recovery.data import pack, stream
from optimum_mla.recovery.recipe import Recipe
from optimum_mla.report.cards import rename_card
from optimum_mla.report.schema import RecoveryReport
from optimum_mla.report.verdict import recovery_verdict
from tests.cases import UNCALIBRATED

REFERENCE = Path(__file__).resolve().parents[1] / "benchmarks" / "reference_model"
EVALUATION = str(REFERENCE / "evaluation.txt")
TEXTS = TextOptions(eval_data=EVALUATION, eval_samples=2, eval_length=32)
PROGRAM = str(Path(sys.executable).with_name("optimum-mla"))
# Patched where they are looked up.
MODULE = importlib.import_module("optimum_mla.pipeline.finetuning")
STAGES = importlib.import_module("optimum_mla.recovery.stages")

SMALL: dict[str, Any] = {"sequence_length": 32, "lora_rank": 4}
SHORT: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 2}
PAIRS = [
    {"prompt": "The old man said", "chosen": " that he would go home.", "rejected": " blue blue blue."},
    {"prompt": "She went", "chosen": " to the market.", "rejected": " xx yy zz."},
] * 4


def source_model(folder: Path, dtype: torch.dtype, **changes: Any) -> str:
    """A Llama with random weights on the reference model's tokenizer; large enough weights that its logits differ."""
    config = {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**config, **changes})).to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` and `converted` in float32, `half_source` and `half` in bfloat16, `train.txt` and `pairs.jsonl`."""
    folder = tmp_path_factory.mktemp("models")
    for source, converted, dtype in (("source", "converted", torch.float32), ("half_source", "half", torch.bfloat16)):
        convert(
            source_model(folder / source, dtype), folder / converted, "gqa2mla", {"kv_cache_ratio": 0.5}, UNCALIBRATED
        )
    (folder / "train.txt").write_text((REFERENCE / "calibration.txt").read_text()[:3000])
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in PAIRS))
    return folder


@pytest.fixture
def train(models: Path, tmp_path: Path) -> Callable[..., RecoveryReport]:
    """`finetune` into `tmp_path / output`; what is no field of the recipe goes to `finetune` itself."""

    def run(
        output: str = "out",
        model: str = "converted",
        data: str = "train.txt",
        training: dict[str, Any] | None = None,
        texts: TextOptions = TEXTS,
        resume: bool = False,
        overwrite: bool = False,
        **recipe: Any,
    ) -> RecoveryReport:
        report = finetune(
            str(models / model),
            tmp_path / output,
            str(models / data),
            Recipe(**{**SMALL, **recipe}),
            {**SHORT, **(training or {})},
            texts,
            resume=resume,
            overwrite=overwrite,
        )
        assert report is not None
        return report

    return run


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str, list[str]]]:
    """The command in this process: its exit code, standard output, and lines of standard error."""

    def run(*arguments: str) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "mla-finetune", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code  # type: ignore[assignment]
        printed = capsys.readouterr()
        # Where optimum-quanto is installed, optimum-cli itself complains about it before any command runs.
        return code, printed.out, [x for x in printed.err.splitlines() if "optimum.quanto.subpackage" not in x]

    return run


@pytest.fixture
def with_callback(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainerCallback | None], None]:
    """Every trainer that is made from now on has this callback; None ends that."""
    original = STAGES.make_trainer

    def use(callback: TrainerCallback | None) -> None:
        def make(*arguments: Any, **options: Any) -> Any:
            trainer = original(*arguments, **options)
            if callback is not None:
                trainer.add_callback(callback)
            return trainer

        monkeypatch.setattr(STAGES, "make_trainer", make)

    return use


class Interrupt(TrainerCallback):
    """Ctrl-C at the end of a step, or at the end of one of the second stage."""

    def __init__(self, step: int, stage: str = "") -> None:
        self.step, self.stage = step, stage

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and args.output_dir.endswith(self.stage):
            raise KeyboardInterrupt


def flags(**values: Any) -> list[str]:
    """Command-line flags."""
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def windows(count: int = 2) -> Tensor:
    """Of the evaluation text, as `TEXTS` has them."""
    return token_windows(AutoTokenizer.from_pretrained(REFERENCE), EVALUATION, 32, count)


def read_report(folder: Path) -> RecoveryReport:
    """What a run wrote."""
    return RecoveryReport(**json.loads((folder / "recovery_report.json").read_text()))


def loss_values(report: RecoveryReport) -> list[float]:
    return [entry["loss"] for entry in report.losses]


def weights_of(folder: Path) -> dict[str, Tensor]:
    """What a folder holds, adapters or a model."""
    return load_file(next(folder.glob("*.safetensors")))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(windows()).logits.float()


def same_weights(a: Path, b: Path, tolerance: float = 0.0) -> None:
    first, second = weights_of(a), weights_of(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0.0, atol=tolerance, msg=name)


CHOICES = [
    ("distill", "lora"),
    pytest.param("distill", "dora", marks=pytest.mark.slow),
    ("distill", "kv"),
    pytest.param("distill", "attention", marks=pytest.mark.slow),
    ("distill", "full"),
    ("sft", "lora"),
    pytest.param("sft", "full", marks=pytest.mark.slow),
    ("dpo", "lora"),
    pytest.param("dpo", "kv", marks=pytest.mark.slow),
]


@pytest.mark.compat
@pytest.mark.parametrize(("objective", "trained"), CHOICES)
def test_report_tells_what_the_saved_model_measures(
    objective: str, trained: str, models: Path, train: Callable[..., RecoveryReport], tmp_path: Path
) -> None:
    data = "pairs.jsonl" if objective == "dpo" else "train.txt"
    report = train(model="half", data=data, objective=objective, train=trained)
    out = tmp_path / "out"

    # Nothing but the output: checkpoints and half-written folders are gone.
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert read_report(out) == report
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype is torch.bfloat16
    assert report.dtype == "bfloat16"
    before = AutoModelForCausalLM.from_pretrained(models / "half")
    if trained in ("lora", "dora"):
        # Transformers by itself rounds adapters to the model's dtype, and leaves DoRA's magnitudes out; PEFT does not.
        assert perplexity(model, windows()) == pytest.approx(report.perplexity_recovered, rel=1e-2)
        with_adapters = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models / "half"), out)
        assert perplexity(with_adapters, windows()) == pytest.approx(report.perplexity_recovered, rel=1e-5)
    else:
        assert perplexity(model, windows()) == pytest.approx(report.perplexity_recovered, rel=1e-5)
    # Parameters that train are measured in float32, the checkpoint is in bfloat16.
    assert perplexity(before, windows()) == pytest.approx(report.perplexity_converted, rel=5e-3)
    source = AutoModelForCausalLM.from_pretrained(models / "half_source")
    assert perplexity(source, windows()) == pytest.approx(report.perplexity_source, rel=1e-5)
    assert report.perplexity_recovered != report.perplexity_converted
    assert model.generate(windows(1)[:, :8], max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 12)

    assert report.steps == 6
    assert [entry["step"] for entry in report.losses] == [1, 2, 3, 4, 5, 6]
    assert {entry["stage"] for entry in report.losses} == {objective}
    assert all(math.isfinite(loss) for loss in loss_values(report))
    if objective != "dpo":
        assert report.tokens_seen == 6 * 2 * 32
        assert report.data["train-data"]["tokens_per_row"] == 32
    else:
        # The reference is the model itself, so both answers begin equally likely. TRL 1.10 rounds the loss to bfloat16.
        assert report.losses[0]["loss"] == pytest.approx(math.log(2), abs=2e-3)
    assert report.data["train-data"]["sha256"]
    assert (report.resumed_at_step, report.diverged_at_step) == (None, None)
    assert report.teacher == (str(models / "half_source") if objective == "distill" else None)
    assert (report.recipe["objective"], report.recipe["train"]) == (objective, trained)
    assert report.training["max_steps"] == 6

    names = {path.name for path in out.iterdir()}
    assert {"recovery_report.json", "loss.png", "README.md", "conversion_report.json", "tokenizer.json"} <= names
    assert (out / "conversion_report.json").read_bytes() == (models / "half" / "conversion_report.json").read_bytes()
    assert (out / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    card = (out / "README.md").read_text()
    assert card.startswith(rename_card((models / "half" / "README.md").read_text(), "out"))
    assert "## Recovered" in card
    assert f"`{objective}`" in card

    total = before.num_parameters()
    saved = weights_of(out)
    if trained in ("lora", "dora"):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names
        assert report.trainable_parameters == sum(value.numel() for value in saved.values())
        assert report.total_parameters == total + report.trainable_parameters
        return
    untouched = weights_of(models / "half")
    changed = {name for name in saved if not torch.equal(saved[name], untouched[name])}
    assert report.total_parameters == total
    if trained == "full":
        assert report.trainable_parameters == total
        assert any("mlp" in name for name in changed)
    else:
        assert changed
        assert all(("self_attn.k" in name or "self_attn.v" in name) == (trained == "kv") for name in changed) or (
            trained == "attention" and all("self_attn" in name for name in changed)
        )
    assert report.trainable_percent == pytest.approx(100 * report.trainable_parameters / report.total_parameters)


def test_first_losses_are_the_models_own(models: Path, train: Callable[..., RecoveryReport]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    ids = pack(tokenizer, models / "train.txt", 32, 128).ids
    assert ids.shape == (4, 32)
    # One batch is all the data, so its order does not matter.
    once = {"max_steps": 1, "per_device_train_batch_size": 4}
    student = AutoModelForCausalLM.from_pretrained(models / "converted")
    teacher = AutoModelForCausalLM.from_pretrained(models / "source")
    with torch.no_grad():
        given, wanted = (model(ids).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
    entropy = -given.gather(-1, ids[:, 1:, None]).mean().item()
    divergence = (wanted.exp() * (wanted - given)).sum(-1).mean().item()
    sft = train("sft", objective="sft", train="kv", train_tokens=128, training=once)
    assert loss_values(sft) == pytest.approx([entropy], rel=1e-5)
    mixed = train("mixed", train="kv", train_tokens=128, training=once, kl_weight=0.5, ce_weight=0.25)
    assert loss_values(mixed) == pytest.approx([0.5 * divergence + 0.25 * entropy], rel=1e-4)
    split = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    accumulated = train("split", train="kv", train_tokens=128, training=split, kl_weight=0.5, ce_weight=0.25)
    assert loss_values(accumulated) == pytest.approx(loss_values(mixed), rel=1e-5)
    assert accumulated.tokens_seen == mixed.tokens_seen == 128


@pytest.mark.compat
@pytest.mark.parametrize(
    ("trained", "model", "tolerance"),
    [
        ("lora", "converted", 1e-4),
        pytest.param("dora", "converted", 1e-4, marks=pytest.mark.slow),
        pytest.param("lora", "half", 3e-2, marks=pytest.mark.slow),
        pytest.param("dora", "half", 3e-2, marks=pytest.mark.slow),
    ],
)
def test_adapters_load_both_ways_and_merge_to_the_same_model(
    trained: str, model: str, tolerance: float, models: Path, train: Callable[..., RecoveryReport], tmp_path: Path
) -> None:
    train("adapters", model=model, train=trained)
    report = train("merged", model=model, train=trained, merge=True)
    base = AutoModelForCausalLM.from_pretrained(models / model)
    plain = logits(base)
    wanted = logits(PeftModel.from_pretrained(base, tmp_path / "adapters"))
    assert (wanted - plain).abs().max() > 1e-3
    if trained == "lora":
        # Transformers by itself rounds adapters to the model's dtype, and leaves DoRA's magnitudes out.
        direct = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapters"))
        allowed = 0.0 if model == "converted" else tolerance * wanted.abs().max()
        assert (direct - wanted).abs().max() <= allowed
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype is base.dtype
    assert (logits(merged) - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert perplexity(merged, windows()) == pytest.approx(report.perplexity_recovered, rel=1e-5)
    assert weights_of(tmp_path / "merged").keys() == weights_of(models / model).keys()


def test_adapters_stay_in_the_chosen_layers(train: Callable[..., RecoveryReport], tmp_path: Path) -> None:
    train(layers="1", training={"max_steps": 2})
    assert {name.partition("layers.")[2][0] for name in weights_of(tmp_path / "out")} == {"1"}


def test_an_adapter_folder_can_be_overwritten(train: Callable[..., RecoveryReport], tmp_path: Path) -> None:
    train(training={"max_steps": 2})
    report = train(training={"max_steps": 3}, overwrite=True)
    assert read_report(tmp_path / "out") == report
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_first_stage_brings_the_layers_close(models: Path, train: Callable[..., RecoveryReport]) -> None:
    report = train(stage1="layerwise", stage1_share=0.5, train="full", training={"max_steps": 20, "warmup_steps": 2})
    stages = [entry["stage"] for entry in report.losses]
    assert stages == ["layerwise"] * 10 + ["distill"] * 10
    assert report.steps == 20
    assert report.tokens_seen == 20 * 2 * 32
    layerwise = loss_values(report)[:10]
    assert sum(layerwise[-3:]) < 0.8 * sum(layerwise[:3])
    assert report.perplexity_recovered < report.perplexity_converted


def test_the_first_stage_also_precedes_sft(models: Path, train: Callable[..., RecoveryReport]) -> None:
    report = train(stage1="layerwise", objective="sft", train="kv", training={"max_steps": 4})
    assert [entry["stage"] for entry in report.losses] == ["layerwise", *["sft"] * 3]
    assert report.teacher == str(models / "source")


def test_another_teacher_may_be_larger(models: Path, train: Callable[..., RecoveryReport], tmp_path: Path) -> None:
    larger = source_model(
        tmp_path / "larger", torch.float32, hidden_size=96, num_hidden_layers=2, tie_word_embeddings=False
    )
    report = train(teacher=larger, train="kv", training={"max_steps": 8})
    assert report.teacher == larger
    # It is another random model: nothing like the source, which this run measures all the same.
    assert loss_values(report)[0] > 0.5
    source = AutoModelForCausalLM.from_pretrained(models / "source")
    assert perplexity(source, windows()) == pytest.approx(report.perplexity_source, rel=1e-5)
    with pytest.raises(InvalidValueError, match=r"num_hidden_layers 3 \(2 here\)"):
        train("other", teacher=larger, stage1="layerwise")


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 4])
def test_teacher_in_few_bits_teaches_nearly_the_same(
    bits: int, models: Path, train: Callable[..., RecoveryReport]
) -> None:
    plain = train("plain", model="half", train="kv", training={"max_steps": 3})
    report = train(model="half", train="kv", teacher_bits=bits, training={"max_steps": 3})
    # The source is measured as it is, not as the teacher in few bits.
    assert report.perplexity_source == pytest.approx(plain.perplexity_source, rel=1e-6)
    assert loss_values(report) != loss_values(plain)
    assert loss_values(report) == pytest.approx(loss_values(plain), rel={8: 0.05, 4: 0.3}[bits])


def test_streaming_reads_the_same_rows_in_order(
    models: Path, train: Callable[..., RecoveryReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    packed = pack(tokenizer, models / "train.txt", 32).ids
    assert torch.equal(torch.stack([row["input_ids"] for row in stream(tokenizer, models / "train.txt", 32)]), packed)

    seen: list[Tensor] = []
    original = STAGES.DistillationTrainer.compute_loss

    def spy(self: Any, model: Any, inputs: dict[str, Tensor], *rest: Any, **options: Any) -> Any:
        seen.append(inputs["input_ids"].clone())
        return original(self, model, inputs, *rest, **options)

    monkeypatch.setattr(STAGES.DistillationTrainer, "compute_loss", spy)
    report = train(streaming=True, train="kv")
    assert torch.equal(torch.cat(seen), packed[:12])
    assert report.tokens_seen == 12 * 32
    seen.clear()
    # Without max_steps the tokens say when to end.
    report = train("tokens", streaming=True, train="kv", train_tokens=4 * 2 * 32, training={"max_steps": -1})
    assert report.steps == 4
    assert torch.equal(torch.cat(seen), packed[:8])


def test_epochs_go_over_all_the_data(models: Path, train: Callable[..., RecoveryReport]) -> None:
    report = train(train="kv", train_tokens=5 * 32, training={"max_steps": -1, "num_train_epochs": 2})
    # Five rows are three batches of two, the last one short; tokens are counted by whole batches.
    assert report.steps == 6
    assert report.data["train-data"]["rows"] == 5
    assert report.tokens_seen == pytest.approx(2 * 5 * 32, rel=0.25)


@pytest.mark.slow
def test_training_recovers_most_of_the_reference_models_loss(tmp_path: Path) -> None:
    convert(str(REFERENCE), tmp_path / "converted", "gqa2mla", {"kv_cache_ratio": 0.25}, UNCALIBRATED, dtype="float32")
    report = finetune(
        str(tmp_path / "converted"),
        tmp_path / "out",
        str(REFERENCE / "calibration.txt"),
        Recipe(sequence_length=128, lora_rank=16, merge=True, train_tokens=25 * 4 * 128),
        {"per_device_train_batch_size": 4},
        replace(TEXTS, eval_samples=8, eval_length=128),
    )
    assert report is not None
    assert report.steps == 25
    source, before, after = report.perplexity_source, report.perplexity_converted, report.perplexity_recovered
    assert source < after < before
    assert math.log(after / source) < 0.6 * math.log(before / source)


# Interrupted runs


@pytest.mark.parametrize(
    ("trained", "stage1", "interrupt", "resumed"),
    [
        ("lora", "none", Interrupt(5), 4),
        pytest.param("full", "none", Interrupt(5), 4, marks=pytest.mark.slow),
        ("lora", "layerwise", Interrupt(5, "distill"), 6 + 4),
        ("kv", "layerwise", Interrupt(1, "distill"), 6),
        pytest.param("kv", "layerwise", Interrupt(3, "layerwise"), 2, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    trained: str,
    stage1: str,
    interrupt: Interrupt,
    resumed: int,
    models: Path,
    train: Callable[..., RecoveryReport],
    with_callback: Any,
    tmp_path: Path,
) -> None:
    # Dropout draws random numbers in every step, so their state has to come back too.
    recipe = {
        "train": trained,
        "stage1": stage1,
        "stage1_share": 0.5,
        "lora_dropout": 0.2 if trained == "lora" else 0.0,
        "optimizer": "muon" if stage1 == "layerwise" else "adamw",
    }
    steps = {"training": {"max_steps": 12}}
    call = (str(models / "converted"), tmp_path / "parts", str(models / "train.txt"))
    whole = train("whole", **recipe, **steps)
    with_callback(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train("parts", **recipe, **steps)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".parts.training", "whole"]
    with_callback(None)

    with pytest.raises(OutputError, match=r"--resume.*--overwrite"):
        train("parts", **recipe, **steps)
    with pytest.raises(InvalidValueError, match=r"learning_rate.*--overwrite"):
        train("parts", **recipe, training={"max_steps": 12, "learning_rate": 1e-4}, resume=True)
    with pytest.raises(InvalidValueError, match=r"temperature: got 2\.0, allowed: 1\.0, as in the interrupted run"):
        train("parts", **recipe, **steps, temperature=2.0, resume=True)
    with pytest.raises(InvalidValueError, match="train_data"):
        train("parts", **recipe, **steps, data="pairs.jsonl", resume=True)
    rest = {k: v for k, v in SHORT.items() if k != "max_steps"}
    with pytest.raises(InvalidValueError, match="max_steps: got None, allowed: 12"):
        finetune(*call, Recipe(**SMALL, **recipe), rest, TEXTS, resume=True)
    with pytest.raises(InvalidValueError, match="eval_samples: got 3, allowed: 2"):
        train("parts", **recipe, **steps, texts=replace(TEXTS, eval_samples=3), resume=True)
    with pytest.raises(InvalidValueError, match=r"half.*converted, as in the interrupted run"):
        train("parts", **recipe, **steps, model="half", resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".parts.training", "whole"]

    report = train("parts", **recipe, **steps, resume=True)
    assert report.resumed_at_step == resumed
    assert [(e["stage"], e["step"]) for e in report.losses] == [(e["stage"], e["step"]) for e in whole.losses]
    assert loss_values(report) == pytest.approx(loss_values(whole), abs=1e-6)
    same_weights(tmp_path / "parts", tmp_path / "whole", 1e-6)
    assert (report.steps, report.tokens_seen) == (whole.steps, whole.tokens_seen)
    assert report.perplexity_recovered == pytest.approx(whole.perplexity_recovered, rel=1e-6)
    # The measurement before the training is of the model as it was given, not of the checkpoint.
    assert report.perplexity_converted == pytest.approx(whole.perplexity_converted, rel=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_a_run_goes_on_only_with_the_same_text_and_model(
    models: Path, train: Callable[..., RecoveryReport], with_callback: Any, tmp_path: Path
) -> None:
    text, model, held = tmp_path / "text.txt", tmp_path / "model", tmp_path / "held-out.txt"
    held.write_bytes(Path(str(TEXTS.eval_data)).read_bytes())
    words = (models / "train.txt").read_text(encoding="utf-8")
    text.write_text(words, encoding="utf-8")
    shutil.copytree(models / "converted", model)
    # What a user of Python may give: JSON has no tuples.
    run = {"model": model, "data": text, "layers": (0, 2), "training": {"label_names": ("labels",)}}
    run["texts"] = replace(TEXTS, eval_data=str(held))
    with_callback(Interrupt(5))
    with pytest.raises(KeyboardInterrupt):
        train(**run)
    with_callback(None)
    for path, option in ((text, "train_data"), (held, "eval_data"), (model / "model.safetensors", "model")):
        about = path.stat()
        os.utime(path, ns=(1, 1))
        was = re.escape(f"[{about.st_size}, {about.st_mtime_ns}]")
        with pytest.raises(
            InvalidValueError, match=rf"{option} \({path}: bytes, time\): got .*, allowed: {was}, as in"
        ):
            train(**run, resume=True)
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    (model / "README.md").write_text("A note.", encoding="utf-8")
    assert train(**run, resume=True).resumed_at_step == 4


@pytest.mark.parametrize(
    "damage", [b"", b"\0" * 100, b'{"key": "run", "value": {"model"'], ids=["empty", "zeros", "torn"]
)
def test_checkpoints_without_a_record_are_neither_taken_nor_deleted(
    damage: bytes, train: Callable[..., RecoveryReport], with_callback: Any, tmp_path: Path
) -> None:
    with_callback(Interrupt(3))
    with pytest.raises(KeyboardInterrupt):
        train()
    with_callback(None)
    work = tmp_path / ".out.training"
    (work / "run.jsonl").write_bytes(damage)
    for overwrite in (False, True):
        with pytest.raises(
            OutputError, match=r"holds checkpoints .*, but no run\.jsonl that tells its settings\. Start"
        ):
            train(resume=True, overwrite=overwrite)
    assert (work / "distill" / "checkpoint-2" / "trainer_state.json").is_file()
    assert train(overwrite=True).resumed_at_step is None


def test_a_muon_state_of_an_older_version_is_refused_in_one_line(
    train: Callable[..., RecoveryReport], with_callback: Any, tmp_path: Path
) -> None:
    with_callback(Interrupt(3))
    with pytest.raises(KeyboardInterrupt):
        train(optimizer="muon")
    with_callback(None)
    path = tmp_path / ".out.training" / "distill" / "checkpoint-2" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    torch.save({"parts": [{"state": state["state"], "param_groups": [group]} for group in state["param_groups"]]}, path)
    with pytest.raises(OptionError, match=r"--resume: the state of the optimizer muon .* with --overwrite instead"):
        train(optimizer="muon", resume=True)
    assert path.is_file()
    assert train(optimizer="muon", overwrite=True).resumed_at_step is None


@pytest.mark.slow
def test_dpo_goes_on_with_its_first_reference(
    train: Callable[..., RecoveryReport], with_callback: Any, tmp_path: Path
) -> None:
    options = {"data": "pairs.jsonl", "objective": "dpo", "train": "kv"}
    whole = train("whole", **options)
    with_callback(Interrupt(5))
    with pytest.raises(KeyboardInterrupt):
        train("parts", **options)
    with_callback(None)
    report = train("parts", **options, resume=True)
    assert report.resumed_at_step == 4
    assert loss_values(report) == pytest.approx(loss_values(whole), abs=1e-6)
    same_weights(tmp_path / "parts", tmp_path / "whole", 1e-6)


def test_overwrite_starts_an_interrupted_run_over(
    train: Callable[..., RecoveryReport], with_callback: Any, tmp_path: Path
) -> None:
    with_callback(Interrupt(5))
    with pytest.raises(KeyboardInterrupt):
        train(train="kv", training={"learning_rate": 1e-2})
    with_callback(None)
    report = train(train="kv", overwrite=True)
    assert report.resumed_at_step is None
    whole = train("whole", train="kv")
    assert loss_values(report) == pytest.approx(loss_values(whole), abs=1e-6)
    same_weights(tmp_path / "out", tmp_path / "whole", 1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(
    "written", [b"", b'{"best_global_step": null, "epo', b"\0" * 50], ids=["none", "torn", "zeros"]
)
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    written: bytes, train: Callable[..., RecoveryReport], with_callback: Any, tmp_path: Path
) -> None:
    whole = train("whole")
    with_callback(Interrupt(5))
    with pytest.raises(KeyboardInterrupt):
        train()
    with_callback(None)
    newest = tmp_path / ".out.training" / "distill" / "checkpoint-4"
    # The trainer writes these last.
    if written:
        (newest / "trainer_state.json").write_bytes(written)
    else:
        for name in ("trainer_state.json", "rng_state.pth", "optimizer.pt"):
            (newest / name).unlink()
    report = train(resume=True)
    assert report.resumed_at_step == 2
    assert loss_values(report) == pytest.approx(loss_values(whole), abs=1e-6)


def test_a_run_interrupted_after_its_last_step_takes_no_other(
    train: Callable[..., RecoveryReport], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = train("whole", train="kv")

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(MODULE, "finished", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(train="kv")
    report = train(train="kv", resume=True)
    assert (report.resumed_at_step, report.steps) == (6, 6)
    assert loss_values(report) == loss_values(whole)
    same_weights(tmp_path / "out", tmp_path / "whole")


def test_a_run_interrupted_before_its_first_checkpoint_starts_over(
    train: Callable[..., RecoveryReport], with_callback: Any, tmp_path: Path
) -> None:
    with_callback(Interrupt(1))
    with pytest.raises(KeyboardInterrupt):
        train(train="kv")
    with_callback(None)
    report = train(train="kv", resume=True)
    assert (report.resumed_at_step, report.steps) == (None, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_resume_of_nothing_is_a_run(train: Callable[..., RecoveryReport], tmp_path: Path) -> None:
    report = train(resume=True, training={"max_steps": 2})
    assert (report.resumed_at_step, report.steps) == (None, 2)


@pytest.mark.slow
def test_a_killed_command_is_resumed_by_the_same_command(
    models: Path, train: Callable[..., RecoveryReport], tmp_path: Path
) -> None:
    training = {**SHORT, "max_steps": 60, "save_steps": 10}
    arguments = [
        *("mla-finetune", "-m", str(models / "converted"), "--train-data", str(models / "train.txt")),
        *flags(**SMALL, **training, eval_data=EVALUATION, eval_samples=2, eval_length=32),
        str(tmp_path / "out"),
    ]
    checkpoint = tmp_path / ".out.training" / "distill" / "checkpoint-10" / "trainer_state.json"
    # One thread, as in this process: the sums are the same to the last bit.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as run:
        deadline = time.monotonic() + 120
        while not checkpoint.is_file() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
        run.communicate()
    assert run.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.training"]

    resumed = subprocess.run(
        [PROGRAM, *arguments, "--resume"], capture_output=True, text=True, env=environment, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "Saved to" in resumed.stdout
    report = read_report(tmp_path / "out")
    whole = train("whole", training=training)
    assert report.resumed_at_step in (10, 20, 30, 40, 50)
    assert loss_values(report) == pytest.approx(loss_values(whole), abs=1e-6)
    same_weights(tmp_path / "out", tmp_path / "whole", 1e-6)


def test_ctrl_c_says_how_to_go_on(models: Path, command: Any, with_callback: Any, tmp_path: Path) -> None:
    with_callback(Interrupt(3))
    base = ["-m", str(models / "converted"), "--train-data", str(models / "train.txt"), *flags(**SMALL, **SHORT)]
    code, out, err = command(*base, str(tmp_path / "out"))
    assert code == 130
    assert err == ["interrupted: OUTPUT was not written. Continue from the newest checkpoint with --resume"]
    assert "Saved" not in out
    code, _, err = command(*base, str(tmp_path / "out"))
    assert (code, len(err)) == (2, 1)
    assert "--resume" in err[0]
    with_callback(None)
    code, out, _ = command(*base, "--resume", str(tmp_path / "out"))
    assert code == 0
    assert read_report(tmp_path / "out").resumed_at_step == 2


# Divergence

ABSURD = {"learning_rate": 10.0, "lr_scheduler_type": "constant"}


def test_divergence_before_the_first_checkpoint_writes_nothing(
    train: Callable[..., RecoveryReport], tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"learning_rate: .* step \d.*before the first checkpoint.* 10"):
        train(train="full", training={**ABSURD, "save_steps": 6})
    assert list(tmp_path.iterdir()) == []


class Poison(TrainerCallback):
    """Keeps the weights of every checkpoint, and ruins them in one step."""

    def __init__(self, step: int, factor: float, frozen: bool = True) -> None:
        self.step, self.factor, self.frozen = step, factor, frozen
        self.saved: dict[int, dict[str, Tensor]] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved[state.global_step] = {n: p.detach().clone() for n, p in kwargs["model"].named_parameters()}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                for parameter in kwargs["model"].parameters():
                    if parameter.requires_grad or self.frozen:
                        parameter.mul_(self.factor)


@pytest.mark.parametrize("factor", [30.0, math.nan])
def test_divergence_goes_back_to_the_newest_good_checkpoint(
    factor: float, train: Callable[..., RecoveryReport], with_callback: Any, tmp_path: Path
) -> None:
    poison = Poison(5, factor)
    with_callback(poison)
    report = train(train="full", training={"max_steps": 12})
    assert report.diverged_at_step == 6
    assert sorted(poison.saved) == [2, 4]
    # The loss of step 5 was good, and was that of the checkpoint of step 4.
    assert report.steps == 4
    assert report.tokens_seen == 4 * 2 * 32
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in model.named_parameters():
        assert torch.equal(value, poison.saved[4][name])
    assert perplexity(model, windows()) == pytest.approx(report.perplexity_recovered, rel=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_checkpoint_whose_own_update_was_the_bad_one_is_not_taken(
    models: Path, train: Callable[..., RecoveryReport], with_callback: Any, tmp_path: Path
) -> None:
    # A step's loss is of the weights before its update: the one that ruins them looks good when it is saved.
    keep = Poison(-1, 1.0)
    with_callback(keep)
    training = {**ABSURD, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "save_steps": 1}
    report = train(train="full", training=training)
    assert report.diverged_at_step is not None
    saved = keep.saved[report.steps]
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters():
        assert torch.equal(value, saved[name])
    assert report.perplexity_recovered < 2 * report.perplexity_converted


def test_divergent_adapters_go_back_too(
    models: Path, train: Callable[..., RecoveryReport], with_callback: Any, tmp_path: Path
) -> None:
    poison = Poison(5, math.nan, frozen=False)  # an optimizer ruins only what trains
    with_callback(poison)
    report = train(training={"max_steps": 12})
    assert (report.diverged_at_step, report.steps) == (6, 4)
    saved = {name.replace(".default", ""): value for name, value in poison.saved[4].items() if "lora" in name}
    written = weights_of(tmp_path / "out")
    assert written.keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in written.items())


def test_the_command_says_that_the_loss_diverged(
    models: Path, command: Callable[..., tuple[int, str, list[str]]], with_callback: Any, tmp_path: Path
) -> None:
    with_callback(Poison(5, 30.0))
    base = ["-m", str(models / "converted"), "--train-data", str(models / "train.txt"), *flags(train="kv", **SMALL)]
    code, out, _ = command(*base, *flags(**SHORT), str(tmp_path / "out"))
    assert code == 0
    report = read_report(tmp_path / "out")
    assert report.diverged_at_step == 6
    best = f"step {report.kept_step}, which was best on held-out text"
    kept = "the model as it was given" if report.kept_step == 0 else best
    assert f"The loss diverged at step 6: this is {kept}." in out
    shutil.rmtree(tmp_path / "out")
    code, out, err = command(*base, *flags(**{**SHORT, "save_steps": 6}), str(tmp_path / "out"))
    assert code == 2
    assert len(err) == 1
    assert err[0].startswith("error: learning_rate: the loss was")
    assert list(tmp_path.iterdir()) == []


# Held-out text


class Ruin(TrainerCallback):
    """Keeps what trains at every checkpoint, and adds noise to it at the beginning of a step."""

    def __init__(self, step: int, size: float) -> None:
        self.step, self.size = step, size
        self.saved: dict[int, dict[str, Tensor]] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = {n: p.detach().clone() for n, p in kwargs["model"].named_parameters() if p.requires_grad}
        self.saved[state.global_step] = {name.replace(".default", ""): value for name, value in trained.items()}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            draw = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in kwargs["model"].parameters():
                    if parameter.requires_grad:
                        parameter.add_(self.size * torch.randn(parameter.shape, generator=draw))


LEARNS: dict[str, Any] = {"model": "reference", "training": {"max_steps": 8, "lr_scheduler_type": "constant"}}
"""A training that brings the perplexity down, until something ruins the weights."""


@pytest.fixture(scope="module")
def reference(models: Path) -> Path:
    """`reference` beside the other models: the trained model, converted so that it is bad and learns quickly."""
    convert(str(REFERENCE), models / "reference", "x-ecomla", {"kv_cache_ratio": 0.25}, UNCALIBRATED, dtype="float32")
    return models / "reference"


@pytest.mark.parametrize("trained", ["lora", "kv"])
def test_the_step_that_is_best_on_held_out_text_is_kept(
    trained: str, reference: Path, train: Callable[..., RecoveryReport], with_callback: Any, tmp_path: Path
) -> None:
    ruin = Ruin(5, 0.1)
    with_callback(ruin)
    report = train(train=trained, **LEARNS)
    measured = {entry["step"]: entry["perplexity"] for entry in report.perplexities}
    assert list(measured) == [2, 4, 6, 8]
    assert measured[4] < measured[2] < report.perplexity_converted
    assert measured[6] > measured[4]
    assert measured[8] > measured[4]
    assert (report.kept_step, report.steps, report.tokens_seen) == (4, 8, 8 * 2 * 32)
    assert report.perplexity_text == "evaluation"
    assert report.perplexity_recovered == pytest.approx(measured[4], rel=1e-5)
    saved = weights_of(tmp_path / "out")
    for name, value in ruin.saved[4].items():
        assert torch.equal(saved[name], value)
    words = f"to {measured[4]:.2f} after 4 steps, whose weights are saved. After 8 steps it was {measured[8]:.2f}."
    assert words in recovery_verdict(report)
    assert words in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("trained", ["lora", "kv"])
def test_a_training_that_makes_held_out_text_worse_says_so_and_saves_the_model_as_it_was(
    trained: str, reference: Path, train: Callable[..., RecoveryReport], with_callback: Any, tmp_path: Path
) -> None:
    said = []

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.getMessage(), (tmp_path / "out").exists()))

    with_callback(Ruin(0, 0.1))
    watch = Watch()
    logging.getLogger("optimum_mla").addHandler(watch)
    report = train(model="reference", train=trained, merge=trained == "lora")
    logging.getLogger("optimum_mla").removeHandler(watch)
    best = min(report.perplexities, key=lambda entry: entry["perplexity"])
    before = report.perplexity_converted
    assert best["perplexity"] > before
    assert (report.kept_step, report.steps) == (0, 6)
    assert report.perplexity_recovered == pytest.approx(before, rel=1e-6)
    ((line, there),) = [entry for entry in said if "warning" in entry[0]]
    assert not there  # It was said before anything was written.
    assert line == recovery_verdict(report)
    assert line.startswith(
        f"warning: the training made the model worse: its perplexity on the evaluation text was {before:.2f} before, "
        f"and at best {best['perplexity']:.2f} after {best['step']} of 6 steps. The model is saved as it was given."
    )
    saved, given = weights_of(tmp_path / "out"), weights_of(reference)
    assert saved.keys() == given.keys()
    assert all(torch.equal(saved[name], value) for name, value in given.items())


def test_without_checkpoints_the_end_is_compared_with_the_beginning(
    reference: Path, train: Callable[..., RecoveryReport], with_callback: Any
) -> None:
    with_callback(Ruin(1, 0.1))
    report = train(model="reference", train="kv", training={"save_strategy": "no"})
    assert (report.kept_step, [entry["step"] for entry in report.perplexities]) == (0, [6])
    with_callback(None)
    learns = {**LEARNS, "training": {**LEARNS["training"], "save_strategy": "no"}}
    report = train(train="kv", overwrite=True, **learns)
    assert report.kept_step == 8
    assert report.perplexity_recovered < report.perplexity_converted


def test_the_last_step_is_saved_where_that_is_asked_for(
    reference: Path, train: Callable[..., RecoveryReport], with_callback: Any, tmp_path: Path
) -> None:
    ruin = Ruin(5, 0.1)
    with_callback(ruin)
    report = train(model="reference", train="kv", training={"load_best_model_at_end": False})
    assert (report.kept_step, report.perplexities) == (None, [])
    assert report.perplexity_recovered > report.perplexity_converted
    assert recovery_verdict(report).startswith("warning: the training made the model worse: it raised the perplexity")
    saved = weights_of(tmp_path / "out")
    assert all(torch.equal(saved[name], value) for name, value in ruin.saved[6].items())


def test_the_best_step_outlives_an_interruption_and_a_divergence(
    reference: Path, train: Callable[..., RecoveryReport], with_callback: Any, tmp_path: Path
) -> None:
    class Both(Ruin):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                raise KeyboardInterrupt

    ruin = Both(3, 0.1)
    with_callback(ruin)
    with pytest.raises(KeyboardInterrupt):
        train(train="kv", **LEARNS)
    with_callback(None)
    report = train(train="kv", resume=True, **LEARNS)
    assert (report.resumed_at_step, report.kept_step) == (6, 2)
    saved = weights_of(tmp_path / "out")
    assert all(torch.equal(saved[name], value) for name, value in ruin.saved[2].items())

    ruin = Ruin(5, 30.0)
    with_callback(ruin)
    report = train(train="kv", overwrite=True, **LEARNS)
    assert (report.diverged_at_step, report.kept_step) == (6, 4)
    saved = weights_of(tmp_path / "out")
    assert all(torch.equal(saved[name], value) for name, value in ruin.saved[4].items())


def test_rows_are_held_back_where_there_is_no_evaluation_text(
    reference: Path, models: Path, train: Callable[..., RecoveryReport]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    rows = pack(tokenizer, models / "train.txt", 32).ids
    report = train(texts=TextOptions(), train="kv", objective="sft", **LEARNS)
    assert report.perplexity_text == "held-back training"
    count = report.data["held-back"]["windows"]
    assert count == len(rows) // 20
    assert report.data["train-data"]["rows"] == len(rows) - count
    assert "perplexity on text held back from the training data from" in recovery_verdict(report)
    assert report.perplexity_source is None  # Nobody asked for it, and it is not in memory.
    streamed = train(
        texts=TextOptions(),
        train="kv",
        overwrite=True,
        streaming=True,
        **{**LEARNS, "sequence_length": 8},
    )
    assert streamed.data["held-back"]["windows"] == 32
    few = train(texts=TextOptions(), train="kv", overwrite=True, train_tokens=8 * 32, training={"max_steps": 2})
    assert (few.perplexity_text, few.kept_step, few.perplexity_converted) == (None, None, None)
    assert "--eval-data" in recovery_verdict(few)


# Bad input


def test_a_setting_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"finetune\(\) has no setting 'overwite'\. Its settings are dtype, device"):
        finetune("model", tmp_path / "out", "text.txt", overwite=True)  # type: ignore[call-arg]
    assert list(tmp_path.iterdir()) == []


BAD_INPUT: dict[str, tuple[str, dict[str, Any]]] = {
    "unconverted model": (r"source is not converted\. Run optimum-cli mla-convert", {"model": "{models}/source"}),
    "no such model": (r"model: .*no such folder", {"model": "{models}/nowhere"}),
    "no such data": (r"nowhere\.txt could not be read: .*No such file", {"train_data": "{models}/nowhere.txt"}),
    "empty data": (
        r"train-data: .*empty\.txt holds fewer tokens than one row of 32",
        {"train_data": "{bad}/empty.txt"},
    ),
    "no JSON": (r"line 2 of .*malformed\.jsonl is not JSON", {"train_data": "{bad}/malformed.jsonl"}),
    "no text": (r"row 2 of .*pairless\.jsonl has no str 'text'", {"train_data": "{bad}/pairless.jsonl"}),
    "pairs without a column": (
        r"row 3 of .*lacking\.jsonl has no str 'rejected'",
        {"train_data": "{bad}/lacking.jsonl", "objective": "dpo"},
    ),
    "no pairs": (r"empty\.jsonl holds no rows", {"train_data": "{bad}/empty.jsonl", "objective": "dpo"}),
    "another vocabulary": (r"teacher: .*vocabulary of 4096 tokens.*\(512 here\)", {"teacher": "{bad}/vocabulary"}),
    "another tokenizer": (r"teacher: .*student's tokenizer", {"teacher": "{bad}/words"}),
    "no such teacher": (r"nowhere did not load", {"teacher": "{bad}/nowhere"}),
    "teacher without distillation": (
        r"teacher: .*objective distill",
        {"teacher": "{models}/source", "objective": "sft"},
    ),
    "teacher in 5 bits": (r"teacher_bits: got 5, allowed: 16, 8, 4", {"teacher_bits": 5}),
    "unknown objective": (r"objective: got 'distil', .*Did you mean distill\?", {"objective": "distil"}),
    "unknown choice": (r"train: got 'atention', .*Did you mean attention\?", {"train": "atention"}),
    "unknown optimizer": (r"optimizer: got 'moun', .*Did you mean muon\?", {"optimizer": "moun"}),
    "unknown argument": (r"adam_beta3: .*Did you mean adam_beta[12]\?", {"training": "adam_beta3=0.9"}),
    "argument of another type": (r"adam_beta1: got 'x', allowed: a float", {"training": "adam_beta1=x"}),
    "argument of ours": (r"output_dir: ", {"training": "output_dir=elsewhere"}),
    "argument without a value": (r"training: got 'adam_beta1', allowed: NAME=VALUE", {"training": "adam_beta1"}),
    "argument that is no YAML": (r"training: got 'adam_beta1=\[0", {"training": "adam_beta1=[0"}),
    "refused argument": (r"training: .*bogus", {"training": "save_strategy=bogus"}),
    "unknown schedule": (r"training: .*bogus", {"lr_scheduler_type": "bogus"}),
    "no batch": (r"per_device_train_batch_size: got 0", {"per_device_train_batch_size": 0, "max_steps": -1}),
    "negative rate": (r"learning_rate: got -1", {"learning_rate": -1}),
    "negative seed": (r"seed: got -1", {"seed": -1}),
    "a seed that numpy does not take": (r"seed: got 4294967296, allowed: .* to 4294967295", {"seed": 2**32}),
    "too much dropout": (r"lora_dropout: got 2", {"lora_dropout": 2}),
    **{
        f"{name} of {value}": (
            rf"{name}: got {re.escape(value)}, allowed: (finite )?numbers (from|above) 0",
            {name: value},
        )
        for name, value in (
            *((name, "nan") for name in ("learning_rate", "num_train_epochs", "weight_decay", "max_grad_norm")),
            *((name, "nan") for name in ("lora_alpha", "lora_dropout", "kl_weight", "ce_weight", "temperature")),
            ("learning_rate", "inf"),
            ("num_train_epochs", "inf"),
            ("stage1_share", "nan"),
            ("temperature", "1e+308"),
        )
    },
    "a field of nan": (r"adam_epsilon: got nan, allowed: finite numbers from 0", {"training": "adam_epsilon=.nan"}),
    "no steps": (r"max_steps: got 0, allowed: integers from 1", {"max_steps": 0}),
    "negative steps": (r"warmup_steps: got -5, allowed: finite numbers from 0", {"warmup_steps": -5}),
    "more workers than a machine has": (
        r"dataloader_num_workers: got 1000000000000, allowed: integers from 0 to 1024",
        {"dataloader_num_workers": 10**12},
    ),
    "a rank beyond the model": (r"lora_rank: got 1000000, allowed: integers from 1 to \d+\.", {"lora_rank": 10**6}),
    "more tokens than can be counted": (r"train_tokens: got 1000.*integers from 1 to 922", {"train_tokens": 10**26}),
    "unknown logger": (r"training: .*bogus is not supported", {"report_to": "bogus"}),
    "evaluation, which is ours": (r"eval_strategy: got 'steps'", {"training": "eval_strategy=steps"}),
    "no rank": (r"lora_rank: got 0", {"lora_rank": 0}),
    "layers beyond the model": (r"layers: .*0 to 2", {"layers": "1-3"}),
    "merge without adapters": (r"merge: .*lora or dora", {"train": "kv", "merge": None}),
    "rows beyond the context": (r"sequence_length: got 129, allowed: 2 to 128", {"sequence_length": 129}),
    "no tokens": (r"train_tokens: got 0", {"train_tokens": 0}),
    "an endless stream": (r"max_steps: .*streamed", {"streaming": None, "max_steps": -1}),
    "no weights of the losses": (r"kl_weight: got 0", {"kl_weight": 0}),
    "unknown dtype": (r"dtype: got 'int3'", {"dtype": "int3"}),
    "unknown device": (r"device: got 'abacus'", {"device": "abacus"}),
    "no such config": (r"config: .*nowhere\.yaml", {"config": "{bad}/nowhere.yaml"}),
    "malformed config": (r"config: .*broken\.yaml.*YAML", {"config": "{bad}/broken.yaml"}),
    "config without names": (r"config: .*list\.yaml.*NAME: VALUE", {"config": "{bad}/list.yaml"}),
    "output in the config": (r"config: got 'output'", {"config": "{bad}/output.yaml"}),
    "words where numbers belong": (r"learning_rate: got 'fast', allowed: a float", {"config": "{bad}/words.yaml"}),
    "unknown argument in the config": (r"lerning_rate: .*Did you mean learning_rate\?", {"config": "{bad}/typo.yaml"}),
    "config that is a switch": (r"unknown|bogus", {"config": "{bad}/field.yaml"}),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("bad")
    files = {
        "empty.txt": "",
        "empty.jsonl": "",
        "malformed.jsonl": '{"text": "one"}\n{"text": \n',
        "pairless.jsonl": '{"text": "one"}\n{"prompt": "two"}\n',
        "lacking.jsonl": "\n".join([*(json.dumps(pair) for pair in PAIRS[:2]), '{"prompt": "a", "chosen": "b"}']),
        "broken.yaml": "learning_rate: [1\ntrain: {",
        "list.yaml": "- one\n- two\n",
        "output.yaml": "output: elsewhere\n",
        "words.yaml": "learning_rate: fast\n",
        "typo.yaml": "lerning_rate: 1.0e-4\n",
        "field.yaml": "eval_strategy: bogus\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    source_model(folder / "vocabulary", torch.float32, vocab_size=512)
    source_model(folder / "words", torch.float32)
    tokenizer = json.loads((folder / "words" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    # Two single characters swapped: as many tokens, but other words.
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "words" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, models: Path, bad: Path, command: Callable[..., tuple[int, str, list[str]]], tmp_path: Path
) -> None:
    words, options = BAD_INPUT[case]
    given = {"model": "{models}/converted", "train_data": "{models}/train.txt", **SMALL, **SHORT, **options}
    if "config" in options:
        given.pop("learning_rate", None)
    arguments = [
        str(word).format(models=models, bad=bad)
        for name, value in given.items()
        for word in ([f"--{name.replace('_', '-')}"] if value is None else [f"--{name.replace('_', '-')}", value])
    ]
    code, out, err = command(str(tmp_path / "out"), *arguments)
    assert code == 2, (out, err)
    (line,) = err
    assert line.startswith("error: ")
    assert re.search(words, line), line
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_missing_arguments_are_named(models: Path, command: Any, tmp_path: Path) -> None:
    code, _, err = command("-m", str(models / "converted"), str(tmp_path / "out"))
    assert (code, len(err)) == (2, 1)
    assert "--train-data" in err[0]
    code, _, err = command("--train-data", str(models / "train.txt"), str(tmp_path / "out"))
    assert (code, len(err)) == (2, 1)
    assert "--model" in err[0]
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_left_alone(models: Path, command: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    base = ["-m", str(models / "converted"), "--train-data", str(models / "train.txt"), *flags(**SMALL, **SHORT)]
    code, _, err = command(*base, str(out))
    assert (code, len(err)) == (2, 1)
    assert "exists" in err[0]
    code, _, err = command(*base, "--overwrite", str(out))
    assert (code, len(err)) == (2, 1)
    assert "no model" in err[0]
    assert (out / "thesis.txt").read_text() == "years of work"
    code, _, err = command(*base, "--overwrite", str(models / "converted"))
    assert (code, len(err)) == (2, 1)
    assert "is the input model" in err[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bad_input_of_the_program_itself(models: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [PROGRAM, "mla-finetune", "-m", str(models / "source"), "--train-data", "x.txt", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if "optimum.quanto.subpackage" not in line]
    assert line.startswith("error: model: ")
    assert "mla-convert" in line
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_its_report_needs_a_teacher(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "converted", tmp_path / "bare")
    (tmp_path / "bare" / "conversion_report.json").unlink()
    call = (str(tmp_path / "bare"), tmp_path / "out", str(models / "train.txt"))
    with pytest.raises(InvalidValueError, match=r"teacher: .*conversion_report"):
        finetune(*call, Recipe(**SMALL), SHORT)
    report = finetune(*call, Recipe(**SMALL, teacher=str(models / "source")), {**SHORT, "max_steps": 2}, TEXTS)
    assert report is not None
    assert report.perplexity_source is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "out"]


# Quantized weights


@pytest.mark.parametrize("weights", ["bnb-nf4", "bnb-int8"])
def test_adapters_on_quantized_weights(weights: str, models: Path, tmp_path: Path) -> None:
    quantize(str(models / "converted"), tmp_path / "quantized", weights=weights)
    call = (str(tmp_path / "quantized"), tmp_path / "out", str(models / "train.txt"))
    with pytest.raises(InvalidValueError, match=r"merge: .*quantized"):
        finetune(*call, Recipe(**SMALL, merge=True), SHORT)
    with pytest.raises(InvalidValueError, match=r"train: got 'kv', allowed: lora or dora.*quantized"):
        finetune(*call, Recipe(**SMALL, train="kv"), SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["quantized"]

    # All the data in every batch: the loss falls step by step.
    training = {**SHORT, "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    report = finetune(*call, Recipe(**SMALL, train_tokens=4 * 32), training, TEXTS)
    assert report is not None
    losses = loss_values(report)
    assert losses[-1] < 0.9 * losses[0]
    assert all(after < before for before, after in itertools.pairwise(losses[1:]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "quantized"]
    assert {name.rpartition("lora_")[2] for name in weights_of(tmp_path / "out")} == {"A.weight", "B.weight"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert perplexity(model, windows()) == pytest.approx(report.perplexity_recovered, rel=1e-4)
    # A packed weight counts as what it stands for.
    full = AutoModelForCausalLM.from_pretrained(models / "converted").num_parameters()
    assert report.total_parameters - report.trainable_parameters == full


# Options


def test_flags_override_the_config_and_other_fields_pass_through(models: Path, command: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"model: {models / 'converted'}\n"
        f"train-data: {models / 'train.txt'}\n"
        f"eval_data: {EVALUATION}\neval_samples: 2\neval-length: 32\n"
        "train: kv\nsequence-length: 32\nmerge: false\nlayers: 1\n"
        "max_steps: 3\nper_device_train_batch_size: 2\nlearning_rate: 1e-3\nweight_decay: 0.1\nlogging-steps: 1\n"
        "adam_beta2: 0.95\nadam-epsilon: 1e-6\nbf16: false\n"
    )
    code, out, err = command(
        *("--config", str(tmp_path / "run.yaml"), "--learning-rate", "5e-4", "--weight-decay", "0"),
        *(
            "--max_steps",
            "2",
            "--training",
            "adam_beta1=0.8",
            "torch_empty_cache_steps=1",
            "max_grad_norm=0.5",
            "save_strategy=no",
            "--",
        ),
        str(tmp_path / "out"),
    )
    assert code == 0, err
    report = read_report(tmp_path / "out")
    assert report.recipe["train"] == "kv"
    assert report.recipe["sequence_length"] == 32
    assert report.data["eval-data"]["windows"] == 2
    wanted = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 5e-4, "weight_decay": 0.0}
    wanted |= {"save_strategy": "no"}
    wanted |= {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "max_grad_norm": 0.5, "bf16": False}
    assert {name: report.training[name] for name in wanted} == wanted
    assert report.steps == 2
    rows = {line.strip().split("  ")[0]: line.split()[-1] for line in out.splitlines() if "  " in line.strip()}
    assert float(rows["converted"]) == pytest.approx(report.perplexity_converted, abs=1e-3)
    assert float(rows["recovered"]) == pytest.approx(report.perplexity_recovered, abs=1e-3)
    assert int(rows["tokens seen"].replace(",", "")) == 2 * 2 * 32
    assert f"Saved to {tmp_path / 'out'}" in out


def test_dtype_of_the_result(train: Callable[..., RecoveryReport], models: Path, tmp_path: Path) -> None:
    for model, dtype in (("half", "float32"), ("converted", "bfloat16")):
        out = tmp_path / dtype
        report = finetune(
            *(str(models / model), out, str(models / "train.txt")),
            recipe=Recipe(**SMALL, merge=True),
            training={**SHORT, "max_steps": 2},
            texts=TEXTS,
            dtype=dtype,
        )
        assert report is not None
        result = AutoModelForCausalLM.from_pretrained(out)
        assert report.dtype == str(result.dtype).removeprefix("torch.") == dtype
        assert perplexity(result, windows()) == pytest.approx(report.perplexity_recovered, rel=1e-5)


@pytest.mark.slow
def test_memory_savers_change_little(train: Callable[..., RecoveryReport]) -> None:
    plain = train("plain", train="full")
    checkpointed = train("checkpointed", train="full", training={"gradient_checkpointing": True})
    assert loss_values(checkpointed) == pytest.approx(loss_values(plain), abs=1e-5)
    half = train("half", train="full", training={"bf16": True})
    assert loss_values(half) != loss_values(plain)
    assert loss_values(half) == pytest.approx(loss_values(plain), rel=5e-2)


def test_training_a_recovered_model_again_keeps_its_history(
    models: Path, train: Callable[..., RecoveryReport], tmp_path: Path
) -> None:
    train("first", train="kv", training={"max_steps": 2})
    report = finetune(
        *(str(tmp_path / "first"), tmp_path / "second", str(models / "train.txt")),
        recipe=Recipe(**SMALL, objective="sft", train="full"),
        training={**SHORT, "max_steps": 2},
        texts=TEXTS,
    )
    assert report is not None
    # The source is still what the conversion started from.
    source = AutoModelForCausalLM.from_pretrained(models / "source")
    assert report.perplexity_source == pytest.approx(perplexity(source, windows()), rel=1e-5)
    assert (tmp_path / "second" / "README.md").read_text().count("## Recovered") == 2
    assert read_report(tmp_path / "second") == report
