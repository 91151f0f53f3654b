"""`mla-finetune`: load, train, measure, write."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments, set_seed

from optimum_mla.calibrate.text import window_length
from optimum_mla.convert.refit import moved_codec
from optimum_mla.core.errors import InvalidValueError, MLAError, OutputError, UnreadableModelError, first_line
from optimum_mla.io.claim import claims_output
from optimum_mla.io.folder import atomic_folder, check_output, kept_folder
from optimum_mla.io.inputs import check_inputs_stay, fingerprint
from optimum_mla.io.journal import Journal, as_kept, differing
from optimum_mla.measure.as_used import divergence_as_used
from optimum_mla.measure.codec_checks import codec_reference, verify_codec
from optimum_mla.measure.memory import PeakMemory
from optimum_mla.measure.quality import perplexity
from optimum_mla.measure.verify import reference_logits, tolerance_of, verify
from optimum_mla.models.coded import CodedGeneration
from optimum_mla.pipeline.loading import (
    NO_TEXTS,
    TextOptions,
    carried_card,
    check_dtype,
    has_codec,
    load_converted_config,
    load_model,
    load_tokenizer,
    read_texts,
)
from optimum_mla.pipeline.origin import recorded_source
from optimum_mla.pipeline.teacher import find_teacher, load_teacher, perplexity_of_source
from optimum_mla.recovery.as_used import check_as_used, check_prompt
from optimum_mla.recovery.data import hold_back, pack, preferences, stream
from optimum_mla.recovery.distributed import full_state
from optimum_mla.recovery.held_out import HeldOut
from optimum_mla.recovery.parameters import ADAPTERS, parameter_counts, prepare
from optimum_mla.recovery.recipe import Recipe, check_installed, check_training, training_arguments
from optimum_mla.recovery.stages import CHECKPOINTS, run_stages
from optimum_mla.report.cards import recovery_card
from optimum_mla.report.codec import WEIGHTS_STAY, WEIGHTS_TRAINED
from optimum_mla.report.plots import loss_curve
from optimum_mla.report.schema import RecoveryReport
from optimum_mla.report.verdict import recovery_verdict
from optimum_mla.weights import quantized_by

logger = logging.getLogger(__name__)

TRAINED_DTYPE = "float32"
"""The dtype of parameters that train: AdamW's steps are mostly below the precision of 16 bits."""
RUN_FILE = "run.jsonl"
"""The journal of a run beside its checkpoints, which holds its settings."""


@claims_output(distributed=True)
def finetune(
    model: str,
    output: str | Path,
    train_data: str | Any,
    recipe: Recipe | None = None,
    training: dict[str, Any] | None = None,
    texts: TextOptions = NO_TEXTS,
    dtype: str = "auto",
    device: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    hub: dict[str, Any] | None = None,
    teacher_revision: str | None = None,
) -> RecoveryReport | None:
    """Train a converted checkpoint, or one with a codec, and write the result.

    Its model card, a loss curve and `recovery_report.json` lie beside it.

    The result is that of the step which is best on held-out text: the evaluation text, or rows that are held back from
    the training text. The model as it was given is step 0, and is written unchanged if no step is better. With
    `load_best_model_at_end` false in `training`, and with DPO, the result is that of the last step.

    A model with a codec is trained as it is used: half of a row is a prompt, and the loss is on what follows. Its
    divergence from the teacher is measured in the same way, in place of perplexities.

    Runs as it is under `torchrun` and `accelerate launch`; the first process then measures and writes. Checkpoints lie
    beside the output until it is written.

    Args:
        model: A hub id or a folder; converted, or with a codec.
        output: Folder to write; it appears only when whole. Adapters that are not merged are written as such.
        train_data: Text as for `TextOptions`, or preference pairs for DPO.
        recipe: What trains, and against what; None takes the defaults.
        training: Fields of `transformers.TrainingArguments`; `lr_scheduler_type` may also be `mha2mla`.
        texts: Its evaluation text, if any; the largest number and the length of its windows.
        dtype: Of the result: `auto` (the checkpoint's own), `float32`, `bfloat16` or `float16`.
        device: Torch device; None takes CUDA where it is available.
        overwrite: Replace `output` if it is a model folder, and drop the checkpoints of an interrupted run.
        resume: Go on from the newest checkpoint of an interrupted run.
        hub: `revision`, `cache_dir`, `token`, `trust_remote_code` for loading. The revision is that of `model` alone.
        teacher_revision: Branch, tag or commit of the teacher on the hub; None takes the main branch, or for the
            model that the conversion started from the commit that was converted.

    Returns:
        The report; None in processes that write nothing.

    Raises:
        MLAError: Bad input of any kind, or a loss that diverged before the first checkpoint; `output` is as it was.
    """
    recipe, training = recipe or Recipe(), dict(training or {})
    hub = {name: value for name, value in (hub or {}).items() if value is not None}
    check_dtype(dtype)
    check_training(training)
    check_installed(recipe)
    source = recorded_source(model)
    inputs = {
        "model": model,
        "train-data": train_data,
        "eval-data": texts.eval_data,
        "teacher": recipe.teacher,
        "model's source": None if source is None else source.location,
    }
    folder = check_output(output, inputs, overwrite, leading=int(os.environ.get("RANK", 0)) == 0)
    config = load_converted_config(model, hub, coded=True)
    coded = has_codec(config)
    if coded:
        check_as_used(recipe, training)
    check_quantized(recipe, config)
    taught_by = find_teacher(model, recipe, teacher_revision)
    origin = train_data if isinstance(train_data, str) else "token ids"
    run = {"model": model, "train_data": origin, **recipe.to_dict(), **training}
    run["eval_data"] = texts.eval_data if isinstance(texts.eval_data, str | None) else "token ids"
    run |= {name: getattr(texts, name) for name in ("eval_samples", "eval_length")}
    if teacher_revision is not None:
        run["teacher_revision"] = teacher_revision
    teaching = None if taught_by is None else taught_by.location
    read = {"model": model, "train_data": train_data, "eval_data": texts.eval_data, "teacher": teaching}
    for option, value in read.items():
        run |= {f"{option} ({file}: bytes, time)": about for file, about in fingerprint(value).items()}
    work = working_folder(folder, run, resume, overwrite, inputs)

    tokenizer = load_tokenizer(model, hub, needed=isinstance(train_data, str) or texts.eval_data is not None)
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
    if arguments.fsdp:
        place = "cpu"  # it is sharded from there

    precision = "auto" if recipe.train in ADAPTERS or quantized_by(config) else TRAINED_DTYPE
    student: Any = load_model(model, config, precision, place, hub)
    if coded:
        if not isinstance(student, CodedGeneration):
            raise UnreadableModelError(
                f"model: the codec of {model} does not load, or is of other weights. Fit one to these weights by "
                "mla-calibrate --refit."
            )
        check_prompt("sequence_length", length, student.latent_codec.exact)
        if windows is not None:
            check_prompt("eval_length", windows.shape[1], student.latent_codec.exact)
    saved_dtype = getattr(torch, dtype) if dtype != "auto" else dtype_of(config, student)
    teacher = None if taught_by is None else load_teacher(taught_by, recipe, config, tokenizer, place, hub)
    leading = arguments.process_index == 0

    def loss(model: Any, windows: Tensor) -> float:
        return divergence_as_used(model, teacher, windows) if coded else math.log(perplexity(model, windows))

    source_perplexity = before = None
    if leading and windows is not None:
        before = math.exp(loss(student, windows))
        if coded:
            source_perplexity = 1.0
        elif source is not None:
            # A quantized teacher's perplexity is not that of the source.
            exact = taught_by is not None and recipe.teacher_bits == 16 and taught_by.same_files(source)
            loaded = teacher if exact else None
            if exact or evaluation is not None:  # It is not loaded for text that nobody asked to measure.
                source_perplexity = perplexity_of_source(source, loaded, windows, place, hub)

    set_seed(arguments.seed)  # adapters begin with random numbers

    def prepared(model: PreTrainedModel) -> Any:
        lora = recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout
        return prepare(model, recipe.train, recipe.layers, *lora)

    trainee = prepared(student)
    counts = parameter_counts(trainee)
    if leading:
        work.mkdir(parents=True, exist_ok=True)
        Journal(work / RUN_FILE).add("run", run)
    peak = PeakMemory(student.device)
    peak.reset()
    held_out = None
    if keeps_best and windows is not None:
        start = None if before is None else math.log(before)
        held_out = HeldOut(windows, lambda model: loss(model, windows), start)
    try:
        done = run_stages(trainee, teacher, rows, tokenizer, recipe, chosen, work, held_out)
    except MLAError:
        if leading and not any(work.glob(CHECKPOINTS)):
            shutil.rmtree(work, ignore_errors=True)
        raise
    peak_bytes = peak.bytes()
    teacher = teacher if coded else None
    whole = full_state(trainee)
    if not leading:
        return None
    if whole is not None:  # The other processes have returned, so nothing may be computed with the sharded one.
        trainee = prepared(load_model(model, config, precision, "cpu", hub))
        trainee.load_state_dict(whole)
    if keeps_best and before is not None and windows is not None and done.kept is None:
        # No checkpoint was measured, as where none is saved or the first stage diverged.
        done.held_out[done.steps] = loss(trainee, windows)
        done.kept = done.steps if done.held_out[done.steps] < math.log(before) else 0
    if done.kept == 0:
        trainee = prepared(load_model(model, config, precision, place if whole is None else "cpu", hub))
    # Merging and casting must not change what was trained.
    trained_dtype = torch.bfloat16 if quantized_by(config) else trainee.dtype
    # Rounding to 16 bits moves predictions as much as good codes do, so that both ends are measured before it.
    after = None if windows is None or not coded else math.exp(loss(trainee, windows))
    reference = reference_logits(trainee) if recipe.train in ADAPTERS else None
    final = finished(trainee, recipe, saved_dtype)
    whole_model = final.get_base_model() if recipe.train in ADAPTERS and not recipe.merge else final
    verification = verify(whole_model, reference, tolerance_of(trained_dtype, saved_dtype))
    if coded:
        codec = moved_codec(whole_model, whole_model.latent_codec)
        whole_model.latent_codec = codec
        verify_codec(whole_model, codec, codec_reference(whole_model, codec))
    if windows is not None and not coded:
        after = math.exp(loss(final, windows))
    per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * world
    report = RecoveryReport(
        model=model,
        recipe=recipe.to_dict(),
        training={name: value for name, value in chosen.items() if name != "output_dir"},
        teacher=None if taught_by is None else taught_by.name,
        data=data,
        steps=done.steps,
        tokens_seen=done.steps * per_step * length if recipe.objective != "dpo" else done.pair_tokens,
        trainable_parameters=counts[0],
        total_parameters=counts[1],
        trainable_percent=100 * counts[0] / counts[1],
        losses=done.losses,
        resumed_at_step=done.resumed_at,
        diverged_at_step=done.diverged_at,
        perplexity_source=source_perplexity,
        perplexity_converted=before,
        perplexity_recovered=after,
        seconds=done.seconds,
        peak_memory_bytes=peak_bytes,
        dtype=str(saved_dtype).removeprefix("torch."),
        seed=arguments.seed,
        verification=asdict(verification),
        perplexity_text=None if windows is None else text,
        perplexities=[{"step": step, "perplexity": math.exp(loss)} for step, loss in done.held_out.items()],
        kept_step=done.kept,
        as_used=coded,
    )
    verdict = recovery_verdict(report)
    if verdict.startswith("warning"):
        logger.warning(verdict)
    weights = sum(p.numel() * p.element_size() for p in final.parameters())
    with atomic_folder(folder, weights, overwrite) as partial:
        final.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        # Before the report: a model that was trained before brings its own one along.
        # Each training has a section of its own, so that the card keeps their history.
        carried = carried_card(model, partial, folder.name).replace(WEIGHTS_STAY, WEIGHTS_TRAINED)
        card = f"{carried.rstrip()}\n\n{recovery_card(report)}"
        report.write(partial)
        loss_curve(report, partial / "loss.png")
        (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)
    return report


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
        for name in differing(before, run):
            raise InvalidValueError(
                name,
                as_kept(run).get(name),
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


def finished(model: Any, recipe: Recipe, dtype: torch.dtype) -> Any:
    """Return the trained model as it is to be saved: adapters merged if asked for, in its dtype, in evaluation mode."""
    if recipe.train in ADAPTERS:
        if recipe.merge:
            # In float32: a merged update is often below the precision of 16 bits of the weight that it goes into.
            return cast(model.float().merge_and_unload(), dtype).eval()
        return model.eval()
    return cast(model, dtype).eval()


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast a model's parameters to a dtype. Buffers stay: rotary frequencies are in float32 whatever the checkpoint."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def dtype_of(config: PreTrainedConfig, model: PreTrainedModel) -> torch.dtype:
    """Return the dtype that a checkpoint was saved in."""
    return getattr(config, "dtype", None) or model.dtype
