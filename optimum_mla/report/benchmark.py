"""`report.json` of `mla-benchmark`: a model's cache, speed and quality as measured. Units are in the names."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from optimum_mla.report.schema import Report, installed_versions, machine

MODEL, BASELINE = "model", "baseline"
"""Whose row it is."""


@dataclass(frozen=True)
class MemoryRow:
    """One model with one cache, context and batch, measured in a process of its own.

    Attributes:
        role: `model` or `baseline`.
        cache: Name of the cache; see `optimum_mla.cache.settings.named_cache`.
        context_tokens: Tokens in each row's cache, the last of them from a step of its own. batch_size: Rows.
        predicted_cache_bytes: From shapes and settings alone; None where the model's kind is unknown.
        live_cache_bytes: Of every tensor that the cache object holds after that, each storage once and whole.
        live_percent_of_predicted: Their ratio.
        prefill_peak_bytes: High-water mark of the process (on CUDA: of the allocator) over the prompt, with weights.
        decode_step_peak_bytes: Likewise over one further token; None where the system cannot reset the mark.
        weight_bytes: Parameters and buffers.
        flags: What is wrong: live and predicted apart, or something of full key/value size alive after a step.
        problem: Why there are no numbers (beyond the model's context, out of memory, ...), or None.
    """

    role: str
    cache: str
    context_tokens: int
    batch_size: int
    predicted_cache_bytes: float | None = None
    live_cache_bytes: int | None = None
    live_percent_of_predicted: float | None = None
    prefill_peak_bytes: int | None = None
    decode_step_peak_bytes: int | None = None
    weight_bytes: int | None = None
    flags: list[str] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True)
class BudgetRow:
    """What fits a memory budget, from measured cache bytes.

    Attributes:
        role, cache: As in `MemoryRow`.
        cache_bytes_per_token: Slope over the measured contexts, for one row. cache_fixed_bytes: What is there besides.
        weight_bytes: Subtracted from the budget first.
        longest_context_tokens: At batch 1, as far as memory goes; the model's own limit is the report's.
        largest_batch: Rows of `batch_context_tokens` tokens.
        batch_context_tokens: Their length.
    """

    role: str
    cache: str
    cache_bytes_per_token: float
    cache_fixed_bytes: float
    weight_bytes: int
    longest_context_tokens: int
    largest_batch: int
    batch_context_tokens: int


@dataclass(frozen=True)
class SpeedRow:
    """Prefill and decoding of one model with one cache, timed in turn with the baseline.

    Attributes:
        role, cache, context_tokens, batch_size: As in `MemoryRow`.
        prefill_tokens_per_second: Prompt tokens of all rows over the median time of a prefill.
        prefill_spread_percent: Distance of the quartiles, in percent of the median.
        decode_tokens_per_second: New tokens of all rows over the median time of a step.
        decode_spread_percent: Likewise.
        attention_percent_of_decode: Share of a step spent in the attention modules, projections included.
        prefill_ratio_to_baseline: Times as fast. decode_ratio_to_baseline: Likewise.
        repeats: Prefills timed. steps: Decoding steps timed.
        problem: Why there are no numbers, or None.
    """

    role: str
    cache: str
    context_tokens: int
    batch_size: int
    prefill_tokens_per_second: float | None = None
    prefill_spread_percent: float | None = None
    decode_tokens_per_second: float | None = None
    decode_spread_percent: float | None = None
    attention_percent_of_decode: float | None = None
    prefill_ratio_to_baseline: float | None = None
    decode_ratio_to_baseline: float | None = None
    repeats: int | None = None
    steps: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class QualityRow:
    """Next-token quality, token by token through the live cache.

    Attributes:
        role, cache: As in `MemoryRow`.
        perplexity: exp of the mean negative log-likelihood of the scored tokens.
        agreement_percent: How often the likeliest next token is the baseline's.
        kl_nats: Mean KL divergence from the baseline's next-token distribution to this one.
        scored_tokens: How many.
        problem: Why there are no numbers, or None.
    """

    role: str
    cache: str
    perplexity: float | None = None
    agreement_percent: float | None = None
    kl_nats: float | None = None
    scored_tokens: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class TaskRow:
    """One metric of one `lm_eval` task; what it generates comes through the model's own cache.

    Attributes:
        role: As in `MemoryRow`.
        task, metric: `lm_eval`'s names.
        value: The metric. stderr: Its standard error, or None.
        problem: Why there is none, or None.
    """

    role: str
    task: str
    metric: str
    value: float | None = None
    stderr: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class BenchmarkReport(Report):
    """One run of `mla-benchmark`.

    Attributes:
        model: As the user named it. baseline: Likewise, or None.
        options: What was asked for.
        data: The evaluation text: where it came from, its tokens, and the SHA-256 of its token ids; or empty.
        dtype: That the model computes in. device: Where.
        cache_numbers_per_token: Of the model, all layers. baseline_cache_numbers_per_token: Of the baseline, or of the
            source that a converted model's config remembers.
        model_max_context_tokens: What its config allows.
        memory_budget_bytes: For `budget`.
        memory, budget, speed, quality, tasks: The measurements.
        interrupted: It was stopped; what had been measured by then is here.
        machine: Processor architecture and operating system. threads: Of torch.
        versions: Of Python and the packages that matter.
    """

    model: str
    baseline: str | None
    options: dict[str, Any]
    data: dict[str, dict[str, Any]]
    dtype: str
    device: str
    cache_numbers_per_token: float | None
    baseline_cache_numbers_per_token: float | None
    model_max_context_tokens: int | None
    memory_budget_bytes: int
    memory: list[MemoryRow] = field(default_factory=list)
    budget: list[BudgetRow] = field(default_factory=list)
    speed: list[SpeedRow] = field(default_factory=list)
    quality: list[QualityRow] = field(default_factory=list)
    tasks: list[TaskRow] = field(default_factory=list)
    interrupted: bool = False
    threads: int = 0
    machine: str = field(default_factory=lambda: machine())
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())

    file_name: ClassVar[str] = "report.json"
    command: ClassVar[str] = "mla-benchmark"

    def to_dict(self) -> dict[str, Any]:
        """Return its fields as they are saved."""
        return asdict(self)
