"""`conversion_report.json`: what was done and what was measured. Units are in the field names."""

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
    """One converted layer; the errors and `key_weight` are those of `optimum_mla.transforms.base.LayerResult`.

    `rope_cache` is `cached` or `rebuilt` where the rotary key is decoupled, else None.
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
    key_weight: float | None = None
    state_error: float | None = None
    healed_error: float | None = None
    predicted_error: float | None = None


class Report:
    """A dataclass that is one JSON file."""

    file_name: ClassVar[str]
    command: ClassVar[str]
    """The command that writes it."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return what `write` saved in a folder, by this version or another one.

        Raises:
            ReportError: There is no such file, or it is not a report that this version can read.
        """
        return read_report(cls, Path(folder) / cls.file_name, cls.command)

    def write(self, folder: Path) -> None:
        """Save as `file_name` in `folder`."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)  # type: ignore[call-overload]
        (folder / self.file_name).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class ConversionReport(Report):
    """One conversion.

    Attributes:
        model: What was converted, as the user named it.
        method: Name of the transformation.
        options: Every option of it, defaults resolved.
        data: For each text used: where it came from, its tokens, and the SHA-256 of its token ids.
        cache_numbers_per_token_per_layer: Mean over all layers, after conversion.
        cache_bytes_per_token: Measured from a live `DynamicCache`, all layers, in the saved dtype.
        source_cache_bytes_per_token: Likewise for the source model.
        predicted_cache_bytes_per_token: What `MLAGeometry` computes.
        cache_percent_of_source: From the measured bytes.
        parameters_added: Parameters more than the source model's.
        perplexity_before: The source model's perplexity on the evaluation text, or without one on calibration windows
            that were held back from fits; None without any text.
        perplexity_after: The converted model's perplexity on the same text.
        conversion_seconds: Wall time of the transformation alone.
        peak_memory_bytes: High-water mark of the whole process, model and libraries included.
        dtype: Of the saved weights.
        seed: Given by the user.
        layers: One entry per converted layer.
        perplexity_text: The text that the perplexities are of: `evaluation`, `held-back calibration`, or None.
        quality_warning: A line that says that the perplexity rose beyond the limit, or None.
        verification: What was checked before the model was written; the fields of `optimum_mla.measure.Verification`.
        machine: Processor architecture and operating system.
        versions: Of Python and the packages that matter.
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
    perplexity_text: str | None = None
    quality_warning: str | None = None
    verification: dict[str, Any] | None = None
    machine: str = field(default_factory=lambda: machine())
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())

    file_name: ClassVar[str] = "conversion_report.json"
    command: ClassVar[str] = "mla-convert"


@dataclass(frozen=True)
class QuantizationReport(Report):
    """One run of `mla-quantize`.

    Attributes:
        model: What was quantized, as the user named it.
        cache: The fields of `CacheSettings`.
        weights: How the linear layers' weights are stored.
        context_tokens: Tokens in the caches that were weighed.
        cache_bytes_before: Measured from a live cache of so many tokens, as the model stored it so far.
        cache_bytes_after: Likewise, as it stores it now, with the window in full precision.
        source_cache_bytes: What the model before its conversion would cache for them in the same dtype, computed.
        weight_bytes_before: Parameters and buffers in memory. weight_bytes_after: Likewise.
        data: The evaluation text: where it came from, its tokens, and the SHA-256 of its token ids; or empty.
        perplexity_before: On that text, token by token through the live cache, or None without one.
        perplexity_after: Likewise.
        seconds: Wall time of everything.
        peak_memory_bytes: High-water mark of the whole process.
        dtype: That the model computes in.
        verification: What was checked before the model was written; the fields of `optimum_mla.measure.Verification`.
        machine: Processor architecture and operating system.
        versions: Of Python and the packages that matter.
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
    machine: str = field(default_factory=lambda: machine())
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())

    file_name: ClassVar[str] = "quantization_report.json"
    command: ClassVar[str] = "mla-quantize"


@dataclass(frozen=True)
class RecoveryReport(Report):
    """One run of `mla-finetune`.

    Attributes:
        model: What was trained, as the user named it.
        recipe: The fields of `optimum_mla.recovery.recipe.Recipe`.
        training: What was passed to `TrainingArguments`.
        teacher: The teacher as it was loaded, or None.
        data: For each text used: where it came from, its tokens, and the SHA-256 of its token ids.
        steps: Optimizer steps, both stages. tokens_seen: Tokens of training data in them.
        trainable_parameters: Parameters that trained. total_parameters: All of the model's while it trained.
        trainable_percent: Their share.
        losses: What the trainer logged, one entry a log: `stage`, `step`, `loss`, `learning_rate`, ...
        resumed_at_step: Step that an interrupted run was continued from, or None.
        diverged_at_step: Step at which the loss diverged, or None; the result is then an older checkpoint.
        perplexity_source: Of the model before its conversion, on the evaluation text; None where not measured.
        perplexity_converted: Before this training. perplexity_recovered: Of the saved result.
        seconds: Wall time of the training alone.
        peak_memory_bytes: High-water mark of the process (on CUDA: of the allocator) over the training, with models.
        dtype: Of the result.
        seed: Of the trainer.
        verification: What was checked before the model was written; the fields of `optimum_mla.measure.Verification`.
        machine: Processor architecture and operating system.
        versions: Of Python and the packages that matter.
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
    machine: str = field(default_factory=lambda: machine())
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())

    file_name: ClassVar[str] = "recovery_report.json"
    command: ClassVar[str] = "mla-finetune"


@dataclass(frozen=True)
class ExportReport(Report):
    """One export.

    Attributes:
        model: What was exported, as the user named it.
        format: `deepseek_v3`.
        kv_lora_rank: Of the export; a constant channel, where there is one, included. q_lora_rank: Likewise, or None.
        qk_rope_head_dim: R.
        cache_numbers_per_token: All layers.
        parameters_added: More than the converted model has.
        largest_logit_difference: Between the export and the converted model, on random tokens, in this dtype.
        largest_logit: Of the converted model, to compare that with.
        dtype: Of the weights.
        verification: What was checked before the model was written; the fields of `optimum_mla.measure.Verification`.
        machine: Processor architecture and operating system.
        versions: Of Python and the packages that matter.
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
    verification: dict[str, Any] | None = None
    machine: str = field(default_factory=lambda: machine())
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())

    file_name: ClassVar[str] = "export_report.json"
    command: ClassVar[str] = "mla-export"


def machine() -> str:
    """Processor architecture and operating system."""
    return f"{platform.machine()} {platform.system()}"


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages whose behaviour a result depends on."""
    versions = {"python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
