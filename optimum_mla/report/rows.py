"""The report of `mla-benchmark`, saved as `report.json`. Names of fields hold the units."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optimum_mla.report.schema import Report

MODEL, BASELINE = "model", "baseline"
"""The two roles of a model in a report."""


@dataclass(frozen=True)
class Row:
    """Measurements of one model with one cache."""

    role: str  # `model` or `baseline`
    cache: str  # its name; see `optimum_mla.cache.settings.named_cache`

    @property
    def key(self) -> tuple[str, str]:
        """Return what tells models with their caches apart."""
        return self.role, self.cache

    @property
    def name(self) -> str:
        """Return the name of the model with its cache in a table."""
        return self.role if self.cache == "default" else f"{self.role}, {self.cache}"


@dataclass(frozen=True)
class MemoryRow(Row):
    """The memory with one context and batch, measured in a process of its own.

    `flags` are findings that a reader must look at: live bytes that differ from the predicted ones, or a tensor as
    large as full keys and values that is alive after a step.
    """

    context_tokens: int  # per row; the last one was decoded after a prompt of the others
    batch_size: int
    predicted_cache_bytes: float | None = None  # from shapes and settings; None for unknown kinds of models
    live_cache_bytes: int | None = None  # of all tensors that the cache holds after the step, each whole storage once
    live_percent_of_predicted: float | None = None
    prefill_peak_bytes: int | None = None  # of the process (on CUDA: of the allocator) during the prompt, with weights
    decode_step_peak_bytes: int | None = None  # of the decoded token; None if the system cannot reset its mark
    weight_bytes: int | None = None  # of parameters and buffers
    flags: list[str] = field(default_factory=list)
    problem: str | None = None  # why there are no numbers, such as a lack of memory
    live_cache_bytes_in_16_bits: int | None = None  # with numbers of wider dtypes counted in 16 bits


@dataclass(frozen=True)
class BudgetRow(Row):
    """The contexts and batches that fit a memory budget, computed from measured cache bytes."""

    cache_bytes_per_token: float  # increase with each token of one row, over the measured contexts
    cache_fixed_bytes: float  # what does not depend on the number of tokens
    weight_bytes: int  # subtracted from the budget
    longest_context_tokens: int  # of one row, whatever the longest context of the model is
    largest_batch: int  # of rows of `batch_context_tokens` tokens
    batch_context_tokens: int
    cache_bytes_per_token_in_16_bits: float | None = None  # with numbers of wider dtypes counted in 16 bits

    @property
    def shared_bytes(self) -> float:
        """Return the bytes per token of which shares are made."""
        return self.cache_bytes_per_token_in_16_bits or self.cache_bytes_per_token


@dataclass(frozen=True)
class SpeedRow(Row):
    """The speed of prefill and decoding with one context and batch, timed in turn with the baseline.

    Speeds are tokens of all rows over the median time, and spreads the distance between the quartiles of the times in
    percent of the median.
    """

    context_tokens: int  # of the prompt, per row
    batch_size: int
    prefill_tokens_per_second: float | None = None
    prefill_spread_percent: float | None = None
    decode_tokens_per_second: float | None = None
    decode_spread_percent: float | None = None
    attention_percent_of_decode: float | None = None  # share of a step in attention modules, projections included
    prefill_ratio_to_baseline: float | None = None
    decode_ratio_to_baseline: float | None = None
    repeats: int | None = None  # timed prefills
    steps: int | None = None  # timed decoding steps
    problem: str | None = None  # why there are no numbers


@dataclass(frozen=True)
class QualityRow(Row):
    """The next-token quality, one token at a time through the live cache.

    Standard errors are those over the windows, and None for a single one.
    """

    perplexity: float | None = None
    agreement_percent: float | None = None  # of tokens at which the likeliest next token is that of the baseline
    kl_nats: float | None = None  # mean KL divergence from the baseline's next-token distribution to this one
    scored_tokens: int | None = None
    problem: str | None = None  # why there are no numbers
    kl_stderr_nats: float | None = None
    loss_stderr_nats: float | None = None  # of the difference to the baseline's mean negative log-likelihood


@dataclass(frozen=True)
class TaskRow:
    """One metric of one `lm_eval` task, which generates through the model's own cache."""

    role: str
    task: str
    metric: str
    value: float | None = None
    stderr: float | None = None
    problem: str | None = None  # why there is no value

    @property
    def name(self) -> str:
        """Return the name of the model in a table."""
        return self.role


@dataclass(frozen=True, kw_only=True)
class BenchmarkReport(Report, file_name="report.json", command="mla-benchmark"):
    """The report of one run of `mla-benchmark`."""

    baseline: str | None = None
    options: dict[str, Any]  # of the run
    # source, number of tokens and SHA-256 of the token ids of the text, if there is one
    data: dict[str, dict[str, Any]]
    device: str
    threads: int = 0  # of torch
    cache_numbers_per_token: float | None = None  # of all layers together
    baseline_cache_numbers_per_token: float | None = None  # or of the source that a converted model's config describes
    model_max_context_tokens: int | None = None  # as the config allows
    memory_budget_bytes: int  # that `budget` is computed for
    memory: list[MemoryRow] = field(default_factory=list)
    budget: list[BudgetRow] = field(default_factory=list)
    speed: list[SpeedRow] = field(default_factory=list)
    quality: list[QualityRow] = field(default_factory=list)
    tasks: list[TaskRow] = field(default_factory=list)
    interrupted: bool = False  # whether the run was stopped, so that only what was measured before is here
