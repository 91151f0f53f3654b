"""Training through a cache of codes: the loss, its gradients, what is written and what is refused."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, TrainingArguments

from optimum_mla import fit_codec
from optimum_mla.cache.codec_layer import ExactTokens
from optimum_mla.core.errors import InvalidValueError, UnreadableModelError
from optimum_mla.measure.as_used import divergence_as_used
from optimum_mla.models.coded import CodedGeneration, with_codec
from optimum_mla.pipeline import TextOptions, convert, finetune
from optimum_mla.recovery.as_used import AsUsedTrainer
from optimum_mla.recovery.parameters import kv_projections, prepare
from optimum_mla.recovery.recipe import Recipe
from optimum_mla.report.schema import CodecReport, RecoveryReport
from optimum_mla.report.verdict import recovery_verdict
from optimum_mla.stack import cache_argument
from tests.cases import source_model, token_ids

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "benchmarks" / "reference_model"
PROGRAM = str(Path(sys.executable).with_name("optimum-mla"))
TEXT = str(REFERENCE / "calibration.txt")
FEW = TextOptions(calibration_data=TEXT, calibration_samples=8, calibration_length=288)
EVALUATION = TextOptions(eval_data=str(REFERENCE / "evaluation.txt"), eval_samples=4, eval_length=288)
SHORT: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2}
EXACT = ExactTokens(sinks=2, recent=4, together=4)


@pytest.mark.parametrize(
    ("family", "length"), [("llama", 24), ("llama", 25), ("phi3", 24), ("qwen3", 24), ("granite", 24)]
)
def test_the_loss_is_the_divergence_after_the_prompt(family: str, length: int, tmp_path: Path) -> None:
    teacher, ids = source_model(family), token_ids(3, length)
    model: Any = with_codec(copy.deepcopy(teacher), fit_codec(teacher, token_ids(8, 48), 0.3, 0, EXACT))
    trainable = prepare(model, "kv")
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = AsUsedTrainer(trainable, copy.deepcopy(teacher), args=arguments)
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    half, cache = length // 2, model.make_cache()
    with torch.no_grad():
        model(ids[:, :half], **cache_argument(model, cache), use_cache=True)
        found = model(ids[:, half:], **cache_argument(model, cache), use_cache=True).logits[:, :-1].log_softmax(-1)
        wanted = teacher(ids, use_cache=False).logits[:, half:-1].log_softmax(-1)
    assert cache.layers[0].coded > 0
    expected = (wanted.exp() * (wanted - found)).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    assert loss > 1e-5
    loss.backward()
    projections = kv_projections(model)
    assert len(projections) == 3 * (1 if family == "phi3" else 2)
    for name, parameter in model.named_parameters():
        trains = name.rpartition(".")[0] in projections
        assert parameter.requires_grad == trains
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trains


@torch.no_grad()
@pytest.mark.parametrize("teacher_has_codec", [False, True])
def test_the_measured_divergence_is_that_of_the_second_halves(teacher_has_codec: bool) -> None:
    source, ids, half = source_model("llama"), token_ids(3, 25), 12
    codec = fit_codec(source, token_ids(8, 48), 0.3, 0, EXACT)
    model: Any = with_codec(copy.deepcopy(source), codec)
    # The state before the first token of a second half is one of the prompt's last pass, which is read exactly.
    wanted = source(ids).logits[:, half - 1 : -1].log_softmax(-1)
    cache = model.make_cache()
    model(ids[:, : half - 1], **cache_argument(model, cache), use_cache=True)
    found = model(ids[:, half - 1 : -1], **cache_argument(model, cache), use_cache=True).logits.log_softmax(-1)
    divergence = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert divergence > 1e-5
    teacher = with_codec(copy.deepcopy(source), codec) if teacher_has_codec else source
    assert divergence_as_used(model, teacher, ids) == pytest.approx(divergence, rel=1e-3)


def test_mixed_precision_trains_and_dropout_leaves_the_prompt_alone(tmp_path: Path) -> None:
    source, ids = source_model("llama"), token_ids(2, 48)
    model: Any = with_codec(copy.deepcopy(source), fit_codec(source, token_ids(8, 48), 0.3, 0, EXACT))
    trainable = prepare(model, "lora", lora_rank=4, lora_dropout=0.5)
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", bf16=True, max_steps=2, per_device_train_batch_size=2
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = AsUsedTrainer(trainable, copy.deepcopy(source), args=arguments, train_dataset=rows)
    trained = {name: weight.clone() for name, weight in trainable.named_parameters() if weight.requires_grad}
    trainer.train()
    assert all(
        not torch.equal(weight, trained[name]) for name, weight in trainable.named_parameters() if name in trained
    )
    assert trainable.training


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("coded") / "out"
    convert(str(REFERENCE), output, options={"kv_cache_budget": 0.0625}, texts=FEW)
    return output


def test_the_command_trains_as_used(coded: Path, tmp_path: Path) -> None:
    output = tmp_path / "trained"
    done = subprocess.run(
        [
            *(PROGRAM, "mla-finetune", "-m", str(coded), "--train-data", TEXT, "--sequence-length", "288"),
            *("--train", "attention", "--max-steps", "6", "--learning-rate", "1e-4", "--eval-length", "288"),
            *("--eval-data", str(REFERENCE / "evaluation.txt"), "--eval-samples", "4", str(output)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = RecoveryReport.read(output)
    assert report.as_used
    assert report.perplexity_source == 1
    assert report.perplexity_converted is not None
    assert 1.0001 < report.perplexity_converted < 1.1
    assert recovery_verdict(report) in done.stdout
    assert "divergence from the teacher" in done.stdout
    assert CodecReport.read(output).percent_of_long_caches == pytest.approx(6.25, rel=0.05)
    assert "The weights were trained for the codes" in (output / "README.md").read_text(encoding="utf-8")
    model: Any = AutoModelForCausalLM.from_pretrained(output)
    assert isinstance(model, CodedGeneration)
    model.latent_codec.check(model)
    before, after = load_file(coded / "model.safetensors"), load_file(output / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert all("self_attn" in name for name in changed)
    assert bool(changed) == bool(report.kept_step)
    ids = torch.randint(4096, (1, 200), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    exact, plain = model(ids, **cache_argument(model, cache)).logits, model(ids, use_cache=False).logits
    torch.testing.assert_close(exact, plain)


def test_adapters_are_merged(coded: Path, tmp_path: Path) -> None:
    recipe = Recipe(lora_rank=4, merge=True, sequence_length=288)
    finetune(str(coded), tmp_path / "out", TEXT, recipe, SHORT, EVALUATION)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), CodedGeneration)


@pytest.mark.parametrize(
    ("recipe", "training", "field"),
    [
        ({"objective": "sft"}, {}, "objective"),
        ({"stage1": "layerwise"}, {}, "stage1"),
        ({}, {"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"sequence_length": 200}, {}, "sequence_length"),
        ({"layers": "9"}, {}, "layers"),
    ],
)
def test_what_cannot_be_trained_through_codes_is_refused(
    coded: Path, tmp_path: Path, recipe: dict[str, Any], training: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidValueError, match=f"^{field}: "):
        finetune(str(coded), tmp_path / "out", TEXT, Recipe(**recipe), {**SHORT, **training}, EVALUATION)
    assert not (tmp_path / "out").exists()


def test_a_codec_that_is_gone_is_one_line(coded: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(coded, broken)
    (broken / "latent_codec.safetensors").unlink()
    with pytest.raises(UnreadableModelError, match=r"^model: the codec of"):
        finetune(str(broken), tmp_path / "out", TEXT, Recipe(sequence_length=288), SHORT, EVALUATION)
