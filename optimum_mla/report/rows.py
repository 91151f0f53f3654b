"""The report of `mla-benchmark`, saved as `report.json`. Names of fields hold the units."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from optimum_mla.report.schema import Report, installed_versions, machine

MODEL, BASELINE = "model", "baseline"
"""The two roles of a model in a report."""


@dataclass(frozen=True)
class MemoryRow:
    """The memory of one model with one cache, context and batch, measured in a process of its own.

    Attributes:
        role: `model` or `baseline`.
        cache: Name of the cache; see `optimum_mla.cache.settings.named_cache`.
        context_tokens: Tokens per row in the cache; the last one was decoded after a prompt of the others.
        batch_size: Number of rows.
        predicted_cache_bytes: Bytes of the cache, computed from shapes and settings; None for unknown kinds of models.
        live_cache_bytes: Bytes of all tensors that the cache object holds after the step, each whole storage once.
        live_percent_of_predicted: Live bytes in percent of the predicted ones.
        prefill_peak_bytes: Highest memory of the process (on CUDA: of the allocator) during the prompt, with weights.
        decode_step_peak_bytes: The same for the decoded token; None if the system cannot reset its mark.
        weight_bytes: Bytes of parameters and buffers.
        flags: Findings that a reader must look at: live bytes that differ from the predicted ones, or a tensor as large
            as full keys and values that is alive after a step.
        problem: Why there are no numbers, such as a lack of memory, or None.
        live_cache_bytes_in_16_bits: The live bytes with numbers of wider dtypes counted in 16 bits, as in a model of 16
            bits. None in reports of older versions.
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
    live_cache_bytes_in_16_bits: int | None = None


@dataclass(frozen=True)
class BudgetRow:
    """The contexts and batches that fit a memory budget, computed from measured cache bytes.

    Attributes:
        role: `model` or `baseline`.
        cache: Name of the cache.
        cache_bytes_per_token: Increase of the cache with each token of one row, over the measured contexts.
        cache_bytes_per_token_in_16_bits: The same with numbers of wider dtypes counted in 16 bits; shares of the
            baseline's cache are made of these. None in reports of older versions.
        cache_fixed_bytes: Bytes of the cache that do not depend on the number of tokens.
        weight_bytes: Bytes of the weights, which are subtracted from the budget.
        longest_context_tokens: Longest context of one row that fits, whatever the longest context of the model is.
        largest_batch: Largest number of rows of `batch_context_tokens` tokens that fit.
        batch_context_tokens: Tokens per row for `largest_batch`.
    """

    role: str
    cache: str
    cache_bytes_per_token: float
    cache_fixed_bytes: float
    weight_bytes: int
    longest_context_tokens: int
    largest_batch: int
    batch_context_tokens: int
    cache_bytes_per_token_in_16_bits: float | None = None

    @property
    def shared_bytes(self) -> float:
        """Return the bytes per token of which shares are made."""
        return self.cache_bytes_per_token_in_16_bits or self.cache_bytes_per_token


@dataclass(frozen=True)
class SpeedRow:
    """The speed of prefill and decoding of one model with one cache, timed in turn with the baseline.

    Attributes:
        role: `model` or `baseline`.
        cache: Name of the cache.
        context_tokens: Tokens per row in the prompt.
        batch_size: Number of rows.
        prefill_tokens_per_second: Prompt tokens of all rows over the median time of a prefill.
        prefill_spread_percent: Distance between the quartiles of the times, in percent of the median.
        decode_tokens_per_second: New tokens of all rows over the median time of a step.
        decode_spread_percent: Distance between the quartiles of the times of steps, in percent of the median.
        attention_percent_of_decode: Share of a step that the attention modules take, projections included.
        prefill_ratio_to_baseline: Prefill speed divided by that of the baseline.
        decode_ratio_to_baseline: Decoding speed divided by that of the baseline.
        repeats: Number of timed prefills.
        steps: Number of timed decoding steps.
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
    """The next-token quality of one model with one cache, one token at a time through the live cache.

    Attributes:
        role: `model` or `baseline`.
        cache: Name of the cache.
        perplexity: Exponential of the mean negative log-likelihood of the scored tokens.
        agreement_percent: Share of tokens at which the likeliest next token is that of the baseline.
        kl_nats: Mean KL divergence from the baseline's next-token distribution to this one.
        scored_tokens: Number of scored tokens.
        problem: Why there are no numbers, or None.
        kl_stderr_nats: Standard error of `kl_nats` over the windows; None for a single one.
        loss_stderr_nats: Standard error of the difference to the baseline's mean negative log-likelihood, likewise.
    """

    role: str
    cache: str
    perplexity: float | None = None
    agreement_percent: float | None = None
    kl_nats: float | None = None
    scored_tokens: int | None = None
    problem: str | None = None
    kl_stderr_nats: float | None = None
    loss_stderr_nats: float | None = None


@dataclass(frozen=True)
class TaskRow:
    """One metric of one `lm_eval` task, which generates through the model's own cache.

    Attributes:
        role: `model` or `baseline`.
        task: Name of the task.
        metric: Name of the metric.
        value: Value of the metric.
        stderr: Standard error of the value, or None.
        problem: Why there is no value, or None.
    """

    role: str
    task: str
    metric: str
    value: float | None = None
    stderr: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class BenchmarkReport(Report):
    """The report of one run of `mla-benchmark`.

    Attributes:
        model: Name of the model as the user gave it.
        baseline: Name of the baseline, or None.
        options: The options of the run.
        data: Source, number of tokens and SHA-256 of the token ids of the evaluation text; empty without text.
        dtype: Dtype that the model computes in.
        device: Device that the model runs on.
        cache_numbers_per_token: Numbers that all layers of the model together cache per token.
        baseline_cache_numbers_per_token: The same for the baseline, or for the source model that the config of a
            converted model describes.
        model_max_context_tokens: Longest context that the config of the model allows.
        memory_budget_bytes: Memory that `budget` is computed for.
        memory: Measurements of memory.
        budget: Contexts and batches that fit the memory budget.
        speed: Measurements of speed.
        quality: Measurements of quality.
        tasks: Results of `lm_eval` tasks.
        interrupted: Whether the run was stopped, so that the report holds only what was measured before.
        threads: Number of threads of torch.
        machine: Processor architecture and operating system.
        versions: Versions of Python and of the packages that matter.
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
        """Return the fields as they are saved."""
        return asdict(self)
