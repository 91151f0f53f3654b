"""The reports that the commands write as JSON files. Names of fields hold the units."""

from __future__ import annotations

import json
import platform
import reprlib
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from typing_extensions import Self

from optimum_mla.core.errors import ReportError

PACKAGES = ("optimum-mla", "torch", "transformers", "optimum", "accelerate", "safetensors")
OPTIONAL_PACKAGES = ("hqq", "optimum-quanto", "bitsandbytes", "peft", "trl")
STATED_TOKENS = 4096
"""Number of tokens in the cache for which the report of a codec states the share of the source's cache."""
JSON_NAMES = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", list: "a list"}


def this_machine() -> str:
    """Return the processor architecture and the operating system."""
    return f"{platform.machine()} {platform.system()}"


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    versions = {"python": platform.python_version()}
    for package in (*PACKAGES, *OPTIONAL_PACKAGES):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def check_value(kind: Any, value: Any, place: str = "") -> Any:
    """Return a value from JSON as the type of a field, with dataclasses in the place of objects.

    Fields that the dataclass does not have are passed over, as reports of newer versions may say more, and those that
    are missing take their default.

    Args:
        kind: The type: a dataclass, a plain class, a list, a dictionary, or one of these or None.
        value: What the JSON holds.
        place: Where it holds it, such as `layers[3].rope_cache`, for the error.

    Raises:
        ReportError: The value is of another type, or a field without a default is missing. The message names the place.
    """
    plain, inner = get_origin(kind) or kind, get_args(kind)
    if NoneType in inner:
        return None if value is None else check_value(inner[0], value, place)
    if is_dataclass(kind) and isinstance(value, dict):
        hints, found = get_type_hints(kind), {}
        for one in fields(kind):
            name = f"{place}.{one.name}" if place else one.name
            if one.name in value:
                found[one.name] = check_value(hints[one.name], value[one.name], name)
            elif one.default is MISSING and one.default_factory is MISSING:
                raise ReportError(f"the field {name} is missing")
        return kind(**found)  # type: ignore[operator]
    if plain is list and isinstance(value, list):
        return [check_value(inner[0], item, f"{place}[{index}]") for index, item in enumerate(value)]
    if plain is dict and isinstance(value, dict):
        return {name: check_value(inner[1], item, f"{place}.{name}") for name, item in value.items()}
    # JSON does not tell 64.0 from 64, and Python counts True as 1.
    wanted = (int, float) if plain is float else plain
    if plain is Any or (isinstance(value, wanted) and (plain is bool or not isinstance(value, bool))):
        return value
    where = f"the field {place}" if place else "its content"
    raise ReportError(f"{where} is {reprlib.repr(value)}, not {JSON_NAMES.get(plain, 'an object')}")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Base of the reports, which are dataclasses that are saved as one JSON file each."""

    file_name: ClassVar[str]
    command: ClassVar[str]  # which writes the report

    model: str  # as the user named it
    dtype: str  # of the weights that are saved, or in which the model computes where none are saved
    machine: str = field(default_factory=this_machine)
    versions: dict[str, str] = field(default_factory=installed_versions)

    def __init_subclass__(cls, file_name: str = "", command: str = "") -> None:
        cls.file_name, cls.command = file_name, command

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return what `write` saved in a folder, by this version or another one.

        Raises:
            ReportError: There is no such file, or it is not a report that this version can read.
        """
        path = Path(folder) / cls.file_name
        try:
            return check_value(cls, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            why = str(error) if isinstance(error, ReportError) else "it is not JSON in UTF-8"
            why = error.strerror or why if isinstance(error, OSError) else why
            remedy = f"Name a folder that optimum-cli {cls.command} wrote, or run it again."
            said = f"{path} is no report of {cls.command} that this version reads: {why}. {remedy}"
            raise ReportError(f"report: {said}") from error

    def write(self, folder: Path) -> None:
        """Save the report as `file_name` in a folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False, default=str)
        (folder / self.file_name).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class StageReport:
    """The time and memory of one stage of a run."""

    name: str
    seconds: float
    peak_bytes: int | None = None  # of the process (on CUDA: of the allocator); None if its mark cannot be reset


@dataclass(frozen=True, kw_only=True)
class SourceReport(Report):
    """Base of the reports of all conversions, with the place of the source model, the texts and the effort."""

    source_folder: str | None = None  # absolute path; None for a hub id
    source_config_sha256: str | None = None  # of the config file in that folder; None for a hub id
    source_revision: str | None = None  # commit on the hub, or the revision that the user gave; None for a folder
    data: dict[str, dict[str, Any]]  # source, number of tokens and SHA-256 of the token ids of each text
    seed: int
    perplexity_before: float | None = None  # of the source model; None without a text
    perplexity_after: float | None = None  # of the result on the same text
    conversion_seconds: float  # of the transformation alone
    peak_memory_bytes: int  # of the whole process, with model and libraries
    stages: list[StageReport] = field(default_factory=list)
    verification: dict[str, Any] | None = None  # results of the checks before writing


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """The shape and the errors of one converted layer; the errors are those of `optimum_mla.convert.LayerResult`."""

    layer: int
    attention_form: str
    kv_lora_rank: int
    k_lora_rank: int
    v_lora_rank: int
    q_lora_rank: int | None = None
    qk_rope_head_dim: int
    num_rope_heads: int
    cache_numbers_per_token: int
    output_error: float
    rope_cache: str | None = None  # `cached` or `rebuilt`; None without a decoupled rotary key
    state_error: float | None = None
    healed_error: float | None = None
    predicted_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class ConversionReport(SourceReport, file_name="conversion_report.json", command="mla-convert"):
    """The report of one conversion to latent attention.

    `perplexity_text` names the text of both perplexities: `evaluation`, the user's; `held-back calibration`, windows of
    the calibration text on which nothing was fitted or chosen; `built-in`, such windows of the built-in text;
    `calibration`, windows that choices were made on, as there are too few for others; or None.
    """

    method: str
    options: dict[str, Any]  # all options of the method, with defaults resolved
    cache_numbers_per_token_per_layer: float  # mean over all layers
    cache_bytes_per_token: float  # of all layers in a live `DynamicCache`, in the saved dtype
    source_cache_bytes_per_token: float
    predicted_cache_bytes_per_token: float  # as `MLAGeometry` computes them
    cache_percent_of_source: float  # with numbers that the saved dtype keeps in 32 bits counted in 16
    cache_bytes_per_token_in_16_bits: float | None = None
    source_cache_bytes_per_token_in_16_bits: float | None = None
    parameters_added: int  # less those of the source model
    break_even_tokens: int | None = None  # in the cache, from which the whole takes less memory; None if it never does
    perplexity_text: str | None = None
    answers: dict[str, Any] | None = None  # `measure.quality.Movement` on the source's own answers to built-in prompts
    sample: dict[str, str] | None = None  # a `prompt`, and how the `source` and the `result` go on
    quality_warning: str | None = None  # says that the conversion cost more than a small loss
    predicted_memory_bytes: int | None = None
    layers: list[LayerReport]
    written_as: str = "native"  # `native`, `wrapper` (inside a model that reads images), `deepseek_v3` or `gguf`

    @property
    def shared_bytes(self) -> tuple[float, float]:
        """Return the bytes per token of the source and of the result of which the share is made."""
        source, result = self.source_cache_bytes_per_token_in_16_bits, self.cache_bytes_per_token_in_16_bits
        if source is None or result is None:  # a report of an older version
            return self.source_cache_bytes_per_token, self.cache_bytes_per_token
        return source, result


@dataclass(frozen=True)
class CodecLayerReport:
    """The codes of one layer."""

    layer: int
    channels: list[list[int]]  # pairs of bits and of the number of channels that have them
    bytes_per_token: int  # of its codes, those of the gains included


@dataclass(frozen=True, kw_only=True)
class CodecReport(SourceReport, file_name="codec_report.json", command="mla-convert"):
    """The report of a codec that `mla-convert --cache-budget` fitted: weights stay, and old tokens become codes.

    The perplexities and the divergence are those of the tokens that were scored after a prompt in each window.
    """

    kv_cache_budget: float  # bytes of a token's codes as a share of its keys and values in 16 bits
    exact: dict[str, int]  # which tokens are never read from codes; the fields of `ExactTokens`
    coded_bytes_per_token: int  # of an old token in the layers that are coded
    source_bytes_per_token: int  # of a token in the same layers of the source in 16 bits
    other_bytes_per_token: int  # of a token in 16 bits in the layers whose cache stays, before a window bounds them
    stated_tokens: int = STATED_TOKENS
    percent_at_stated_tokens: float  # of the source's cache with these tokens in 16 bits, exact tokens included
    percent_of_long_caches: float  # what this falls to as the cache grows
    codec_bytes: int  # of its file
    codec_percent_of_weights: float
    divergence_nats: float | None = None  # mean KL divergence of the predictions from the source's
    divergence_stderr_nats: float | None = None  # over the windows
    same_guess_percent: float | None = None  # of the tokens with the same likeliest token
    prompt_tokens: int | None = None  # read in each window before the scored ones
    scored_tokens: int | None = None  # in all windows
    quality_text: str | None = None  # as `ConversionReport.perplexity_text`
    layers: list[CodecLayerReport]
    written_as: str  # `model`, a folder with the weights, or `codec`, the codec alone


@dataclass(frozen=True, kw_only=True)
class QuantizationReport(Report, file_name="quantization_report.json", command="mla-quantize"):
    """The report of one run of `mla-quantize`, whose figures are those before and after the quantization.

    The percentages are of the source model's 16-bit cache, with numbers of wider dtypes counted in 16 bits. The
    perplexities were measured one token at a time through the live cache, and are None without text.
    """

    cache: dict[str, Any]  # the fields of `CacheSettings`
    weights: str  # how those of the linear layers are stored
    context_tokens: int  # in the measured caches
    cache_bytes_before: int  # of a live cache
    cache_bytes_after: int  # with the newest tokens in full precision
    source_cache_bytes: float  # computed for the model before its conversion in the same dtype
    cache_percent_before: float | None = None
    cache_percent_after: float | None = None
    weight_bytes_before: int  # of parameters and buffers in memory
    weight_bytes_after: int
    # source, number of tokens and SHA-256 of the token ids of the text, if there is one
    data: dict[str, dict[str, Any]]
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    seconds: float  # of the whole run
    peak_memory_bytes: int  # of the whole process
    verification: dict[str, Any] | None = None  # results of the checks before writing


@dataclass(frozen=True, kw_only=True)
class RecoveryReport(Report, file_name="recovery_report.json", command="mla-finetune"):
    """The report of one run of `mla-finetune`.

    `as_used` says that the model has a codec. The perplexities are then exponentials of the divergence from the
    teacher, on text that follows a prompt and is read through the cache, and that of the source is 1.
    """

    recipe: dict[str, Any]  # the fields of `optimum_mla.recovery.recipe.Recipe`
    training: dict[str, Any]  # what was passed to `TrainingArguments`
    teacher: str | None = None  # as the user or the conversion report names it
    data: dict[str, dict[str, Any]]  # source, number of tokens and SHA-256 of the token ids of each text
    seed: int
    steps: int  # of the optimizer in all stages
    tokens_seen: int
    trainable_parameters: int
    total_parameters: int  # during the training
    trainable_percent: float
    losses: list[dict[str, Any]]  # what the trainer logged: `stage`, `step`, `loss`, `learning_rate` and more
    resumed_at_step: int | None = None
    diverged_at_step: int | None = None  # the result is then an older checkpoint
    perplexity_source: float | None = None  # of the model before its conversion, on the held-out text
    perplexity_converted: float | None = None  # of the model before this training
    perplexity_recovered: float | None = None  # of the saved result
    perplexity_text: str | None = None  # `evaluation` or `held-back training`
    perplexities: list[dict[str, Any]] = field(default_factory=list)  # on the way, by `step` in all stages
    kept_step: int | None = None  # the saved weights, best on that text; 0 as given, None for the last without a choice
    as_used: bool = False
    seconds: float  # of the training alone
    peak_memory_bytes: int  # of the process (on CUDA: of the allocator) during the training, with models
    verification: dict[str, Any] | None = None  # results of the checks before writing


@dataclass(frozen=True, kw_only=True)
class ExportReport(Report, file_name="export_report.json", command="mla-export"):
    """The report of one export.

    The perplexities are those of the converted model without and with latent norms that the export added, on held-back
    windows of the text that the norms were fitted to (on all of it if it has fewer than four).
    """

    format: str  # `deepseek_v3` or `gguf`
    kv_lora_rank: int  # with the constant channel if there is one
    q_lora_rank: int | None = None
    qk_rope_head_dim: int
    cache_numbers_per_token: int  # of all layers together
    parameters_added: int  # less those of the converted model
    largest_logit_difference: float  # from the converted model's logits on random tokens, in this dtype
    largest_logit: float  # of the converted model, for comparison
    perplexity_without_norm: float | None = None
    perplexity_with_norm: float | None = None
    verification: dict[str, Any] | None = None  # results of the checks before writing
