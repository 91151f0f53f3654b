"""The options of `mla-benchmark`: what is measured, on which caches, contexts and texts."""

from __future__ import annotations

from dataclasses import dataclass

from optimum_mla.cache import CacheSettings
from optimum_mla.cache.backends import check_settings
from optimum_mla.cache.settings import CACHE_NAMES, named_cache
from optimum_mla.cache.source import SOURCE, default_baselines, source_cache_name
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.number_checks import check_count

PARTS = ("memory", "speed", "quality")
CONTEXTS = (1024, 4096, 8192, 32768)
BATCHES = (1, 8)


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options that say what a benchmark measures.

    Attributes:
        context_lengths: Numbers of prompt tokens per row.
        batch_sizes: Numbers of rows.
        caches: Names of caches; see `optimum_mla.cache.settings.named_cache`.
        baselines: What to compare with: `source`, the baseline with its unquantized cache, which always takes part, and
            `source-CACHE`, such as `source-hqq-int4`, for the baseline with a quantized cache; see
            `optimum_mla.cache.source`. None takes `source`, and `source-hqq-int4` too if hqq is installed.
        new_tokens: Number of decoding steps after each timed prefill.
        repeats: Number of timed prefills.
        eval_data: The text on which the quality is measured, or None to leave the quality out.
        eval_samples: Largest number of windows that are taken from the text.
        eval_length: Number of tokens per window; None takes 512, or the model's longest context if that is shorter.
        stride: Number of tokens at the end of each window that are scored; None takes half of the window.
        tasks: Names of `lm_eval` tasks.
        tasks_path: A folder with further tasks, or None.
        tasks_limit: Largest number of documents of each task; None takes all.
        memory_budget: Bytes of memory for which the report computes the largest contexts and batches; None takes the
            memory of this machine.
        parts: The parts to measure: `memory`, `speed` and `quality`.

    Raises:
        InvalidValueError: An option is out of range.
    """

    context_lengths: tuple[int, ...] = CONTEXTS
    batch_sizes: tuple[int, ...] = BATCHES
    caches: tuple[str, ...] = ("default",)
    baselines: tuple[str, ...] | None = None
    new_tokens: int = 32
    repeats: int = 5
    eval_data: str | None = None
    eval_samples: int = 128
    eval_length: int | None = None
    stride: int | None = None
    tasks: tuple[str, ...] = ()
    tasks_path: str | None = None
    tasks_limit: int | None = None
    memory_budget: int | None = None
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        for field in ("context_lengths", "batch_sizes"):
            values = getattr(self, field)
            if not values:
                raise InvalidValueError(field, [], "integers from 1")
            for value in values:
                check_count(field, value)
        for field in ("new_tokens", "repeats", "eval_samples"):
            check_count(field, getattr(self, field))
        if self.tasks_limit is not None:
            check_count("tasks_limit", self.tasks_limit)
        for part in self.parts:
            if part not in PARTS:
                raise InvalidValueError("parts", part, ", ".join(PARTS))
        if not self.caches:
            raise InvalidValueError("cache", [], CACHE_NAMES)
        for name in self.caches:
            check_settings(CacheSettings(**named_cache(name)))
        for name in self.baselines or ():
            source_cache_name(name)

    @property
    def baseline_caches(self) -> tuple[str, ...]:
        """Return the names of the baseline's caches, with its unquantized cache first."""
        chosen = default_baselines() if self.baselines is None else self.baselines
        return tuple(dict.fromkeys(source_cache_name(name) for name in (SOURCE, *chosen)))
