"""The reports that the commands write as JSON files. Names of fields hold the units."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from optimum_mla.report.reading import read_report

REPORTED_PACKAGES = (
    "optimum-mla",
    "torch",
    "transformers",
    "optimum",
    "safetensors",
    "hqq",
    "optimum-quanto",
    "bitsandbytes",
    "peft",
    "trl",
    "accelerate",
)


@dataclass(frozen=True)
class LayerReport:
    """The shape and the errors of one converted layer.

    The errors are those of `optimum_mla.convert.LayerResult`. `rope_cache` is `cached` or `rebuilt` if the rotary key
    is decoupled, and None otherwise.
    """

    layer: int
    attention_form: str
    kv_lora_rank: int
    k_lora_rank: int
    v_lora_rank: int
    q_lora_rank: int | None
    qk_rope_head_dim: int
    num_rope_heads: int
    cache_numbers_per_token: int
    output_error: float
    rope_cache: str | None = None
    state_error: float | None = None
    healed_error: float | None = None
    predicted_error: float | None = None


@dataclass(frozen=True)
class StageReport:
    """The time and memory of one stage of a run.

    Attributes:
        name: Name of the stage.
        seconds: Wall time of the stage.
        peak_bytes: Highest memory of the process during the stage (on CUDA: of the allocator); None if the system
            cannot reset its mark.
    """

    name: str
    seconds: float
    peak_bytes: int | None


class Report:
    """Base of the reports, which are dataclasses that are saved as one JSON file each."""

    file_name: ClassVar[str]
    command: ClassVar[str]
    """Name of the command that writes the report."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return what `write` saved in a folder, by this version or another one.

        Raises:
            ReportError: There is no such file, or it is not a report that this version can read.
        """
        return read_report(cls, Path(folder) / cls.file_name, cls.command)

    def write(self, folder: Path) -> None:
        """Save the report as `file_name` in a folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False, default=str)  # type: ignore[call-overload]
        (folder / self.file_name).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class ConversionReport(Report):
    """The report of one conversion.

    Attributes:
        model: Name of the source model as the user gave it.
        source_folder: Absolute path of the source model's folder; None for a hub id.
        source_config_sha256: SHA-256 of the config file in that folder; None for a hub id.
        source_revision: Commit of the source model on the hub, or the revision that the user gave; None for a folder.
        method: Name of the method.
        options: All options of the method, with defaults resolved.
        data: Source, number of tokens and SHA-256 of the token ids of each text.
        cache_numbers_per_token_per_layer: Numbers cached per token and layer, as a mean over all layers.
        cache_bytes_per_token: Bytes per token of all layers in a live `DynamicCache`, in the saved dtype.
        source_cache_bytes_per_token: The same for the source model.
        predicted_cache_bytes_per_token: Bytes per token that `MLAGeometry` computes.
        cache_percent_of_source: Bytes per token in percent of those of the source model's 16-bit cache. Numbers that
            the saved dtype keeps in 32 bits count in 16, as they would be in a model of 16 bits.
        parameters_added: Parameters of the result minus those of the source model.
        perplexity_before: The source model's perplexity on the text that `perplexity_text` names; None without any.
        perplexity_after: The converted model's perplexity on the same text.
        conversion_seconds: Wall time of the transformation alone.
        predicted_memory_bytes: Peak memory that was predicted before the conversion started.
        peak_memory_bytes: Highest memory of the whole process, with model and libraries.
        dtype: Dtype of the saved weights.
        seed: Seed that the user gave.
        layers: One entry per converted layer.
        perplexity_text: The text of both perplexities: `evaluation`, the user's; `held-back calibration`, windows of
            the calibration text on which nothing was fitted or chosen; `built-in`, windows of the built-in text on
            which nothing was; `calibration`, windows that choices were made on, as there are too few for others; or
            None.
        written_as: What the folder holds: `native`, a model of this package; `wrapper`, the same inside a model that
            reads images; or the format of an export, `deepseek_v3` or `gguf`.
        answers: How far predictions moved on the source's own answers to built-in prompts; the fields of
            `optimum_mla.measure.quality.Movement`. None without a tokenizer, or where weights do not fit into memory.
        cache_bytes_per_token_in_16_bits: `cache_bytes_per_token` with all numbers counted in 16 bits.
        source_cache_bytes_per_token_in_16_bits: The same for the source model.
        quality_warning: A line that says that the conversion cost more than a small loss, or None.
        verification: Results of the checks before writing; the fields of `optimum_mla.measure.Verification`.
        break_even_tokens: Tokens in the cache from which the converted model takes less memory than its source, added
            parameters included; None if it never does.
        sample: A `prompt` and its greedy continuations by the `source` model and by the `result`, or None as `answers`.
        stages: Time and memory of loading, measuring, converting and verifying.
        machine: Processor architecture and operating system.
        versions: Versions of Python and of the packages that matter.
    """

    model: str
    method: str
    options: dict[str, Any]
    data: dict[str, dict[str, Any]]
    cache_numbers_per_token_per_layer: float
    cache_bytes_per_token: float
    source_cache_bytes_per_token: float
    predicted_cache_bytes_per_token: float
    cache_percent_of_source: float
    parameters_added: int
    perplexity_before: float | None
    perplexity_after: float | None
    conversion_seconds: float
    peak_memory_bytes: int
    dtype: str
    seed: int
    layers: list[LayerReport]
    predicted_memory_bytes: int | None = None
    perplexity_text: str | None = None
    written_as: str = "native"
    answers: dict[str, Any] | None = None
    cache_bytes_per_token_in_16_bits: float | None = None
    source_cache_bytes_per_token_in_16_bits: float | None = None
    quality_warning: str | None = None
    verification: dict[str, Any] | None = None
    break_even_tokens: int | None = None
    sample: dict[str, str] | None = None
    stages: list[StageReport] = field(default_factory=list)
    source_folder: str | None = None
    source_config_sha256: str | None = None
    source_revision: str | None = None
    machine: str = field(default_factory=lambda: machine())
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())

    file_name: ClassVar[str] = "conversion_report.json"
    command: ClassVar[str] = "mla-convert"

    @property
    def shared_bytes(self) -> tuple[float, float]:
        """Return the bytes per token of the source and of the result of which the share is made."""
        source, result = self.source_cache_bytes_per_token_in_16_bits, self.cache_bytes_per_token_in_16_bits
        if source is None or result is None:  # a report of an older version
            return self.source_cache_bytes_per_token, self.cache_bytes_per_token
        return source, result


@dataclass(frozen=True)
class QuantizationReport(Report):
    """The report of one run of `mla-quantize`.

    Attributes:
        model: Name of the model as the user gave it.
        cache: The fields of `CacheSettings`.
        weights: How the weights of the linear layers are stored.
        context_tokens: Number of tokens in the measured caches.
        cache_bytes_before: Bytes of a live cache with these tokens before the quantization.
        cache_bytes_after: The same after the quantization, with the newest tokens in full precision.
        source_cache_bytes: Computed bytes that the model before its conversion would cache in the same dtype.
        cache_percent_before: Bytes before the quantization in percent of those of the source model's 16-bit cache, with
            numbers of wider dtypes counted in 16 bits. None in reports of older versions.
        cache_percent_after: The same after the quantization.
        weight_bytes_before: Bytes of parameters and buffers in memory before the quantization.
        weight_bytes_after: The same after the quantization.
        data: Source, number of tokens and SHA-256 of the token ids of the evaluation text; empty without text.
        perplexity_before: Perplexity on that text, one token at a time through the live cache, before the quantization;
            None without text.
        perplexity_after: The same after the quantization.
        seconds: Wall time of the whole run.
        peak_memory_bytes: Highest memory of the whole process.
        dtype: Dtype that the model computes in.
        verification: Results of the checks before writing; the fields of `optimum_mla.measure.Verification`.
        machine: Processor architecture and operating system.
        versions: Versions of Python and of the packages that matter.
    """

    model: str
    cache: dict[str, Any]
    weights: str
    context_tokens: int
    cache_bytes_before: int
    cache_bytes_after: int
    source_cache_bytes: float
    weight_bytes_before: int
    weight_bytes_after: int
    data: dict[str, dict[str, Any]]
    perplexity_before: float | None
    perplexity_after: float | None
    seconds: float
    peak_memory_bytes: int
    dtype: str
    verification: dict[str, Any] | None = None
    cache_percent_before: float | None = None
    cache_percent_after: float | None = None
    machine: str = field(default_factory=lambda: machine())
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())

    file_name: ClassVar[str] = "quantization_report.json"
    command: ClassVar[str] = "mla-quantize"


@dataclass(frozen=True)
class RecoveryReport(Report):
    """The report of one run of `mla-finetune`.

    Attributes:
        model: Name of the trained model as the user gave it.
        recipe: The fields of `optimum_mla.recovery.recipe.Recipe`.
        training: Fields that were passed to `TrainingArguments`.
        teacher: Name of the teacher as the user or the conversion report gives it, or None.
        data: Source, number of tokens and SHA-256 of the token ids of each text.
        steps: Number of optimizer steps in all stages.
        tokens_seen: Number of training tokens in these steps.
        trainable_parameters: Number of parameters that trained.
        total_parameters: Number of all parameters during the training.
        trainable_percent: Trained parameters in percent of all.
        losses: Entries that the trainer logged, with `stage`, `step`, `loss`, `learning_rate` and more.
        resumed_at_step: Step from which an interrupted run was continued, or None.
        diverged_at_step: Step at which the loss diverged, or None; the result is then an older checkpoint.
        perplexity_source: Perplexity of the model before its conversion on the held-out text; None if not measured.
        perplexity_converted: Perplexity of the model before this training; None if not measured.
        perplexity_recovered: Perplexity of the saved result; None if not measured.
        perplexity_text: The held-out text of these perplexities: `evaluation`, `held-back training`, or None.
        perplexities: Entries with `step` (optimizer steps in all stages) and `perplexity`, measured on the way.
        kept_step: Optimizer steps of the saved weights, which were best on that text; 0 is the model as it was given.
            None if the last weights were saved without such a choice.
        as_used: Whether the model has a codec. The perplexities are then exponentials of the divergence from the
            teacher, on text that follows a prompt and is read through the cache, and that of the source is 1.
        seconds: Wall time of the training alone.
        peak_memory_bytes: Highest memory of the process (on CUDA: of the allocator) during the training, with models.
        dtype: Dtype of the result.
        seed: Seed of the trainer.
        verification: Results of the checks before writing; the fields of `optimum_mla.measure.Verification`.
        machine: Processor architecture and operating system.
        versions: Versions of Python and of the packages that matter.
    """

    model: str
    recipe: dict[str, Any]
    training: dict[str, Any]
    teacher: str | None
    data: dict[str, dict[str, Any]]
    steps: int
    tokens_seen: int
    trainable_parameters: int
    total_parameters: int
    trainable_percent: float
    losses: list[dict[str, Any]]
    resumed_at_step: int | None
    diverged_at_step: int | None
    perplexity_source: float | None
    perplexity_converted: float | None
    perplexity_recovered: float | None
    seconds: float
    peak_memory_bytes: int
    dtype: str
    seed: int
    verification: dict[str, Any] | None = None
    perplexity_text: str | None = None
    perplexities: list[dict[str, Any]] = field(default_factory=list)
    kept_step: int | None = None
    as_used: bool = False
    machine: str = field(default_factory=lambda: machine())
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())

    file_name: ClassVar[str] = "recovery_report.json"
    command: ClassVar[str] = "mla-finetune"


@dataclass(frozen=True)
class ExportReport(Report):
    """The report of one export.

    Attributes:
        model: Name of the exported model as the user gave it.
        format: Name of the format, `deepseek_v3`.
        kv_lora_rank: Rank of the latent in the export, with the constant channel if there is one.
        q_lora_rank: Rank of the query latent in the export, or None.
        qk_rope_head_dim: Number of rotary dims, R.
        cache_numbers_per_token: Numbers that all layers together cache per token.
        parameters_added: Parameters of the export minus those of the converted model.
        largest_logit_difference: Largest difference between the logits of the export and of the converted model on
            random tokens in this dtype.
        largest_logit: Largest logit of the converted model, for comparison.
        dtype: Dtype of the weights.
        perplexity_without_norm: Perplexity of the converted model on held-back windows of the text that latent norms
            were fitted to (on all of it if it has fewer than four), or None if the export did not add them.
        perplexity_with_norm: The same with these norms.
        verification: Results of the checks before writing; the fields of `optimum_mla.measure.Verification`.
        machine: Processor architecture and operating system.
        versions: Versions of Python and of the packages that matter.
    """

    model: str
    format: str
    kv_lora_rank: int
    q_lora_rank: int | None
    qk_rope_head_dim: int
    cache_numbers_per_token: int
    parameters_added: int
    largest_logit_difference: float
    largest_logit: float
    dtype: str
    perplexity_without_norm: float | None = None
    perplexity_with_norm: float | None = None
    verification: dict[str, Any] | None = None
    machine: str = field(default_factory=lambda: machine())
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())

    file_name: ClassVar[str] = "export_report.json"
    command: ClassVar[str] = "mla-export"


def machine() -> str:
    """Return the processor architecture and the operating system."""
    return f"{platform.machine()} {platform.system()}"


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    versions = {"python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
