"""`mla-finetune`: plan, load, train, measure, write."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from typing_extensions import Unpack

from optimum_mla.convert.refit import moved_codec
from optimum_mla.core.errors import MLAError, UnreadableModelError
from optimum_mla.io.claim import claims_output
from optimum_mla.io.folder import atomic_folder
from optimum_mla.io.journal import Journal
from optimum_mla.measure.as_used import divergence_as_used
from optimum_mla.measure.codec_checks import codec_reference, verify_codec
from optimum_mla.measure.memory import PeakMemory
from optimum_mla.measure.quality import perplexity
from optimum_mla.measure.verify import reference_logits, tolerance_of, verify
from optimum_mla.models.coded import CodedGeneration
from optimum_mla.pipeline.loading import NO_TEXTS, TextOptions, carried_card
from optimum_mla.pipeline.placement import parameter_bytes
from optimum_mla.pipeline.teacher import load_teacher, perplexity_of_source
from optimum_mla.pipeline.training_plan import RUN_FILE, TrainingPlan, TrainingSettings, world
from optimum_mla.recovery.as_used import check_prompt
from optimum_mla.recovery.held_out import HeldOut
from optimum_mla.recovery.parameters import ADAPTERS, full_state, parameter_counts, prepare
from optimum_mla.recovery.recipe import Recipe
from optimum_mla.recovery.stages import CHECKPOINTS, run_stages
from optimum_mla.report.cards import WEIGHTS_STAY, WEIGHTS_TRAINED, recovery_card
from optimum_mla.report.plots import loss_curve
from optimum_mla.report.schema import RecoveryReport
from optimum_mla.report.verdict import recovery_verdict
from optimum_mla.weights import quantized_by

logger = logging.getLogger(__name__)

TRAINED_DTYPE = "float32"
"""The dtype of parameters that train: AdamW's steps are mostly below the precision of 16 bits."""


@claims_output(distributed=True)
def finetune(
    model: str,
    output: str | Path,
    train_data: str | Any,
    recipe: Recipe | None = None,
    training: dict[str, Any] | None = None,
    texts: TextOptions = NO_TEXTS,
    **settings: Unpack[TrainingSettings],
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
        **settings: See `optimum_mla.pipeline.training_plan.TrainingSettings`.

    Returns:
        The report; None in processes that write nothing.

    Raises:
        MLAError: Bad input of any kind, or a loss that diverged before the first checkpoint; `output` is as it was.
    """
    run = Training(TrainingPlan(model, output, train_data, recipe or Recipe(), training or {}, texts, settings))
    run.measure_source()
    trained = run.train()
    if trained is None:
        return None
    report = run.finish(trained)
    run.write(report)
    return report


class Training:
    """One training: loads its models, and holds what is measured on the way.

    Args:
        plan: What was decided before.

    Attributes:
        leads: Whether this process measures and writes.
        before: Perplexity of the model as it was given, or the exponential of its divergence from the teacher; None if
            it was not measured.
        source_perplexity: The same of what it was converted from.
    """

    def __init__(self, plan: TrainingPlan) -> None:
        self.plan, self.leads = plan, plan.arguments.process_index == 0
        recipe, quantized = plan.recipe, quantized_by(plan.config)
        self.precision = "auto" if recipe.train in ADAPTERS or quantized else TRAINED_DTYPE
        self.student: Any = plan.checkpoint.load(self.precision, plan.place)
        if plan.coded:
            self._check_codec()
        own, asked = getattr(plan.config, "dtype", None) or self.student.dtype, plan.options.dtype
        self.dtype = own if asked == "auto" else getattr(torch, asked)
        self.teacher: Any = None
        if plan.teacher is not None:
            self.teacher = load_teacher(plan.teacher, recipe, plan.config, plan.tokenizer, plan.place)
        self.before: float | None = None
        self.source_perplexity: float | None = None

    def _check_codec(self) -> None:
        """Refuse a codec that did not load, and rows or windows of which no token is read from codes."""
        plan = self.plan
        if not isinstance(self.student, CodedGeneration):
            raise UnreadableModelError(
                f"model: the codec of {plan.checkpoint.name} does not load, or is of other weights. Fit one to these "
                "weights by mla-calibrate --refit."
            )
        check_prompt("sequence_length", plan.texts.length, self.student.latent_codec.exact)
        if plan.texts.windows is not None:
            check_prompt("eval_length", plan.texts.windows.shape[1], self.student.latent_codec.exact)

    def loss(self, model: Any, windows: Tensor) -> float:
        """Return the loss of a model on windows [N, L]: its log-perplexity, or as used its divergence, in nats."""
        if self.plan.coded:
            return divergence_as_used(model, self.teacher, windows)
        return math.log(perplexity(model, windows))

    def measure_source(self) -> None:
        """Measure the model as it was given, and what it was converted from."""
        plan, windows, source = self.plan, self.plan.texts.windows, self.plan.source
        if not self.leads or windows is None:
            return
        self.before = math.exp(self.loss(self.student, windows))
        if plan.coded:
            self.source_perplexity = 1.0
        elif source is not None:
            # A quantized teacher's perplexity is not that of the source.
            exact = plan.teacher is not None and plan.recipe.teacher_bits == 16 and plan.teacher.is_same(source)
            if exact or plan.texts.named == "evaluation":  # It is not loaded for text that nobody asked to measure.
                loaded = self.teacher if exact else None
                self.source_perplexity = perplexity_of_source(source, loaded, windows, plan.place)

    def prepared(self, model: PreTrainedModel) -> Any:
        """Return a model in which only what the recipe says trains."""
        recipe = self.plan.recipe
        return prepare(model, recipe.train, recipe.layers, recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout)

    def train(self) -> Any:
        """Train, and return the model of the kept step; None in processes that write nothing."""
        plan, work = self.plan, self.plan.work
        set_seed(plan.arguments.seed)  # adapters begin with random numbers
        trainee = self.prepared(self.student)
        self.counts = parameter_counts(trainee)
        if self.leads:
            work.mkdir(parents=True, exist_ok=True)
            Journal(work / RUN_FILE).add("run", plan.run)
        peak = PeakMemory(self.student.device)
        peak.reset()
        held_out = None
        if plan.keeps_best and plan.texts.windows is not None:
            start = None if self.before is None else math.log(self.before)
            windows = plan.texts.windows
            held_out = HeldOut(windows, lambda model: self.loss(model, windows), start)
        try:
            self.done = run_stages(
                trainee, self.teacher, plan.texts.rows, plan.tokenizer, plan.recipe, plan.chosen, work, held_out
            )
        except MLAError:
            if self.leads and not any(work.glob(CHECKPOINTS)):
                shutil.rmtree(work, ignore_errors=True)
            raise
        self.peak_bytes = peak.bytes()
        self.teacher = self.teacher if plan.coded else None
        whole = full_state(trainee)
        return self._kept(trainee, whole) if self.leads else None

    def _kept(self, trainee: Any, whole: dict[str, Any] | None) -> Any:
        """Return the model of the kept step: the one after the last step, or of its whole weights if it was sharded."""
        plan, done, place = self.plan, self.done, self.plan.place if whole is None else "cpu"
        if whole is not None:  # The other processes have returned, so nothing may be computed with the sharded one.
            trainee = self.prepared(plan.checkpoint.load(self.precision, "cpu"))
            trainee.load_state_dict(whole)
        if plan.keeps_best and self.before is not None and plan.texts.windows is not None and done.kept is None:
            # No checkpoint was measured, as where none is saved or the first stage diverged.
            done.held_out[done.steps] = self.loss(trainee, plan.texts.windows)
            done.kept = done.steps if done.held_out[done.steps] < math.log(self.before) else 0
        return self.prepared(plan.checkpoint.load(self.precision, place)) if done.kept == 0 else trainee

    def finish(self, trained: Any) -> RecoveryReport:
        """Merge and cast the trained model, check that this changed nothing, measure it, and return the report."""
        plan, recipe, windows = self.plan, self.plan.recipe, self.plan.texts.windows
        # Merging and casting must not change what was trained.
        trained_dtype = torch.bfloat16 if quantized_by(plan.config) else trained.dtype
        # Rounding to 16 bits moves predictions as much as good codes do, so that both ends are measured before it.
        after = None if windows is None or not plan.coded else math.exp(self.loss(trained, windows))
        reference = reference_logits(trained) if recipe.train in ADAPTERS else None
        self.final = finished(trained, recipe, self.dtype)
        whole = self.final.get_base_model() if recipe.train in ADAPTERS and not recipe.merge else self.final
        verification = verify(whole, reference, tolerance_of(trained_dtype, self.dtype))
        if plan.coded:
            whole.latent_codec = moved_codec(whole, whole.latent_codec)
            verify_codec(whole, whole.latent_codec, codec_reference(whole, whole.latent_codec))
        elif windows is not None:
            after = math.exp(self.loss(self.final, windows))
        done, arguments = self.done, plan.arguments
        per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * world()
        return RecoveryReport(
            model=plan.checkpoint.name,
            recipe=recipe.to_dict(),
            training={name: value for name, value in plan.chosen.items() if name != "output_dir"},
            teacher=None if plan.teacher is None else plan.teacher.name,
            data=plan.texts.data,
            steps=done.steps,
            tokens_seen=done.steps * per_step * plan.texts.length if recipe.objective != "dpo" else done.pair_tokens,
            trainable_parameters=self.counts[0],
            total_parameters=self.counts[1],
            trainable_percent=100 * self.counts[0] / self.counts[1],
            losses=done.losses,
            resumed_at_step=done.resumed_at,
            diverged_at_step=done.diverged_at,
            perplexity_source=self.source_perplexity,
            perplexity_converted=self.before,
            perplexity_recovered=after,
            seconds=done.seconds,
            peak_memory_bytes=self.peak_bytes,
            dtype=str(self.dtype).removeprefix("torch."),
            seed=arguments.seed,
            verification=asdict(verification),
            perplexity_text=None if windows is None else plan.texts.named,
            perplexities=[{"step": step, "perplexity": math.exp(loss)} for step, loss in done.held_out.items()],
            kept_step=done.kept,
            as_used=plan.coded,
        )

    def write(self, report: RecoveryReport) -> None:
        """Write the result with its card, its loss curve and its report, and remove the checkpoints."""
        plan = self.plan
        verdict = recovery_verdict(report)
        if verdict.startswith("warning"):
            logger.warning(verdict)
        with atomic_folder(plan.folder, parameter_bytes(self.final), plan.options.overwrite) as partial:
            self.final.save_pretrained(partial)
            if plan.tokenizer is not None:
                plan.tokenizer.save_pretrained(partial)
            # Before the report: a model that was trained before brings its own one along.
            # Each training has a section of its own, so that the card keeps their history.
            carried = carried_card(plan.checkpoint.location, partial, plan.folder.name)
            carried = carried.replace(WEIGHTS_STAY, WEIGHTS_TRAINED)
            report.write(partial)
            loss_curve(report, partial / "loss.png")
            card = f"{carried.rstrip()}\n\n{recovery_card(report)}"
            (partial / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(plan.work, ignore_errors=True)


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
