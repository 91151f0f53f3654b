"""A run of `mla-benchmark`, which makes every measurement in a process of its own, one after the other."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from optimum_mla.calibrate.text import context_limit, token_windows, window_length
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.progress import progress
from optimum_mla.measure.sizes import budget_rows, layer_numbers
from optimum_mla.models.coded import CONFIG_ENTRY
from optimum_mla.models.family_table import family_of, is_converted
from optimum_mla.models.layers import model_geometry
from optimum_mla.pipeline.cell_options import BenchmarkOptions
from optimum_mla.pipeline.cells import OUT_OF_MEMORY, CellError, run_cell
from optimum_mla.pipeline.checkpoint import Checkpoint
from optimum_mla.report.rows import (
    BASELINE,
    MODEL,
    BenchmarkReport,
    MemoryRow,
    QualityRow,
    SpeedRow,
    TaskRow,
)


class Benchmark:
    """A run of measurements, which collects the rows of its report.

    Args:
        model: The model to measure.
        baseline: The model to compare with, or None.
        options: What to measure.
        dtype: `auto` for the dtype of each checkpoint, or `float32`, `bfloat16` or `float16`.
        device: Torch device; None takes CUDA where it is available.

    Raises:
        MLAError: A model, a tokenizer, a text or a task cannot be used.
    """

    def __init__(
        self,
        model: Checkpoint,
        baseline: Checkpoint | None,
        options: BenchmarkOptions,
        dtype: str,
        device: str | None,
    ) -> None:
        self.model, self.baseline, self.options = model, baseline, options
        self.common: dict[str, Any] = {"dtype": dtype, "device": device}
        self.config = model.config
        self.baseline_config = None if baseline is None else baseline.config
        self._check_caches()
        self.windows, self.data, self.refusal = self._texts()
        if options.tasks:
            from optimum_mla.measure.tasks import task_manager

            task_manager(list(options.tasks), options.tasks_path)
            model.tokenizer(needed=True)
        self.memory: list[MemoryRow] = []
        self.speed: list[SpeedRow] = []
        self.quality: list[QualityRow] = []
        self.tasks: list[TaskRow] = []

    def _check_caches(self) -> None:
        """Refuse caches that need a converted model if the model is not converted."""
        if is_converted(self.config):
            return
        coded = getattr(self.config, CONFIG_ENTRY, None) is not None
        allowed = ("default", "16bit") if coded else ("default",)
        for name in self.options.caches:
            if name not in allowed:
                remedy = "" if coded else "Convert it with optimum-cli mla-convert first."
                kind = "has a codec" if coded else "is not converted"
                raise InvalidValueError("cache", name, f"{', '.join(allowed)}, as the model {kind}", remedy)

    def _texts(self) -> tuple[Tensor | None, dict[str, dict[str, Any]], str | None]:
        """Return the windows to score, their origin, and why the baseline cannot be scored on them.

        Returns:
            The token ids of the windows [N, L], or None without them; the report's entry about the data; and the reason
            for which the baseline cannot be scored, or None.
        """
        options = self.options
        if options.eval_data is None or "quality" not in options.parts:
            return None, {}, None
        length = window_length(self.config, options.eval_length, "eval_length")
        stride = max(1, length // 2) if options.stride is None else options.stride
        if not 1 <= stride < length:
            raise InvalidValueError("stride", stride, f"1 to {length - 1}, below the window of {length} tokens")
        tokenizer = self.model.tokenizer(needed=True)
        windows = token_windows(tokenizer, options.eval_data, length, options.eval_samples, "eval-data", stride=stride)
        data = {
            "eval-data": {
                "source": options.eval_data,
                "windows": len(windows),
                "tokens_per_window": length,
                "stride_tokens": stride,
                "sha256": hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest(),
            }
        }
        return windows, data, self._tokens_differ(tokenizer)

    def _tokens_differ(self, tokenizer: Any) -> str | None:
        """Return why the baseline's quality cannot be compared, or None."""
        if self.baseline is None or self.baseline_config is None:
            return None
        sizes = [config.get_text_config().vocab_size for config in (self.config, self.baseline_config)]
        if sizes[0] != sizes[1]:
            return f"refused: the baseline has a vocabulary of {sizes[1]} tokens, the model of {sizes[0]}"
        theirs = self.baseline.tokenizer(needed=False)
        if theirs is not None and theirs.get_vocab() != tokenizer.get_vocab():
            return "refused: the baseline has another tokenizer"
        return None

    def run(self) -> None:
        """Make all measurements. If an exception ends the run, `report` still gives the rows up to then."""
        steps = [*self._memory_steps(), *self._speed_steps(), *self._quality_steps()]
        steps += [(self._tasks_step, (role,)) for role in self._roles() if self.options.tasks]
        for step, arguments in progress(steps, "benchmark"):
            step(*arguments)

    def _roles(self) -> list[str]:
        return [MODEL] if self.baseline is None else [BASELINE, MODEL]

    def _one(self, role: str) -> dict[str, Any]:
        """Return the part of a request that says how to load the model of a role."""
        model = self.model if role == MODEL else self.baseline
        if model is None:
            raise RuntimeError("a measurement of a baseline without one")
        return {"name": model.location, "hub": model.hub, **self.common}

    def _both(self, baseline: bool) -> dict[str, Any]:
        """Return the part of a request that says how to load the model, and the baseline if it takes part."""
        theirs = self._one(BASELINE) if baseline else {"name": None, "hub": {}}
        return {**self._one(MODEL), "baseline": theirs["name"], "baseline_hub": theirs["hub"]}

    def _caches(self, role: str) -> Iterable[str]:
        return self.options.caches if role == MODEL else self.options.baseline_caches

    def _sizes(self) -> Iterable[tuple[int, int]]:
        return itertools.product(self.options.context_lengths, self.options.batch_sizes)

    def _too_long(self, role: str, tokens: int) -> str | None:
        config = self.config if role == MODEL else self.baseline_config
        limit = context_limit(config)
        return None if limit is None or tokens <= limit else f"skipped: the {role}'s context ends at {limit} tokens"

    def _memory_steps(self) -> list[Any]:
        if "memory" not in self.options.parts:
            return []
        cells = [
            (role, cache, *size) for role in self._roles() for cache in self._caches(role) for size in self._sizes()
        ]
        return [(self._memory_step, cell) for cell in cells]

    def _memory_step(self, role: str, cache: str, context: int, batch: int) -> None:
        row = MemoryRow(role, cache, context, batch)
        problem = self._too_long(role, context)
        if problem is None:
            request = {"cache": cache, "context": context, "batch": batch, **self._one(role)}
            try:
                row = replace(row, **run_cell("memory", request))
            except CellError as error:
                problem = str(error)
        self.memory.append(replace(row, problem=problem))

    def _speed_steps(self) -> list[Any]:
        return [(self._speed_step, size) for size in self._sizes()] if "speed" in self.options.parts else []

    def _speed_step(self, context: int, batch: int) -> None:
        options = self.options
        everyone = [(role, cache) for role in self._roles() for cache in self._caches(role)]
        problems = {role: self._too_long(role, context) for role in self._roles()}
        able = [role for role, problem in problems.items() if problem is None]
        out = [row for row in self.memory if (row.problem or "").startswith(OUT_OF_MEMORY)]
        for failed in out:
            if failed.context_tokens <= context and failed.batch_size <= batch:
                problems[failed.role] = f"{OUT_OF_MEMORY}, as in the memory table"
                able = [role for role in able if role != failed.role]
        rows: list[dict[str, Any]] = []
        if MODEL in able:
            request = {
                "caches": list(options.caches),
                "baseline_caches": list(options.baseline_caches),
                "context": context,
                "batch": batch,
                "new_tokens": options.new_tokens,
                "repeats": options.repeats,
                **self._both(BASELINE in able),
            }
            try:
                rows = run_cell("speed", request)["rows"]
            except CellError as error:
                problems |= dict.fromkeys(able, str(error))
        elif BASELINE in able:
            problems[BASELINE] = "skipped: there is no model row to compare with"
        found = {(row.pop("role"), row.pop("cache")): row for row in rows}
        for role, cache in everyone:
            row = SpeedRow(role, cache, context, batch)
            values = found.get((role, cache), {"problem": problems[role]})
            self.speed.append(replace(row, **values))

    def _quality_steps(self) -> list[Any]:
        if self.windows is None:
            return []
        # The first comparison also gives the baseline's own perplexity.
        theirs = [] if self.refusal is not None else self.options.baseline_caches[1:]
        cells = [(MODEL, cache) for cache in self.options.caches]
        cells += [(BASELINE, cache) for cache in theirs if self.baseline is not None]
        return [(self._quality_step, cell) for cell in cells]

    def _quality_step(self, role: str, cache: str) -> None:
        row = QualityRow(role, cache)
        windows = [] if self.windows is None else self.windows.tolist()
        compared = self.baseline is not None and self.refusal is None
        request = {
            "cache": cache,
            "windows": windows,
            "stride": self.data["eval-data"]["stride_tokens"],
            **self._both(compared),
            **self._one(role),
        }
        try:
            found = run_cell("quality", request)
        except CellError as error:
            self.quality.append(replace(row, problem=str(error)))
            return
        if self.baseline is not None and all(known.cache != "default" or known.role == MODEL for known in self.quality):
            theirs = QualityRow(BASELINE, "default", found["baseline_perplexity"], problem=self.refusal)
            self.quality.insert(0, replace(theirs, scored_tokens=found["tokens"] if compared else None))
        self.quality.append(
            replace(
                row,
                perplexity=found["perplexity"],
                agreement_percent=None if found["agreement"] is None else 100 * found["agreement"],
                kl_nats=found["kl"],
                kl_stderr_nats=found["kl_stderr"],
                loss_stderr_nats=found["loss_stderr"],
                scored_tokens=found["tokens"],
            )
        )

    def _tasks_step(self, role: str) -> None:
        options = self.options
        request = {
            "tasks": list(options.tasks),
            "tasks_path": options.tasks_path,
            "batch": min(options.batch_sizes),
            "limit": options.tasks_limit,
            **self._one(role),
        }
        try:
            rows = run_cell("tasks", request)["rows"]
        except CellError as error:
            self.tasks += [TaskRow(role, task, "-", problem=str(error)) for task in options.tasks]
            return
        self.tasks += [TaskRow(role, *row) for row in rows]

    def report(self, interrupted: bool) -> BenchmarkReport:
        """Return the report with the rows that were measured.

        Args:
            interrupted: Whether the run ended before all measurements were made.
        """
        options, budget = self.options, self.options.memory_budget
        budget = machine_memory(self.common["device"]) if budget is None else budget
        source = None
        if self.baseline_config is not None:
            source = layer_numbers(self.baseline_config)
        elif is_converted(self.config):
            source = [g.source_cache_numbers for g in model_geometry(family_of(self.config).spec, self.config).layers]
        own = layer_numbers(self.config)
        dtype = self.common["dtype"]
        if dtype == "auto":
            dtype = str(getattr(self.config, "dtype", None) or torch.float32).removeprefix("torch.")
        return BenchmarkReport(
            model=self.model.name,
            baseline=None if self.baseline is None else self.baseline.name,
            options={name: value for name, value in vars(options).items() if name != "memory_budget"},
            data=self.data,
            dtype=dtype,
            device=self.common["device"] or ("cuda" if torch.cuda.is_available() else "cpu"),
            cache_numbers_per_token=None if own is None else sum(own),
            baseline_cache_numbers_per_token=None if source is None else sum(source),
            model_max_context_tokens=context_limit(self.config),
            memory_budget_bytes=budget,
            memory=self.memory,
            budget=budget_rows(self.memory, budget),
            speed=self.speed,
            quality=self.quality,
            tasks=self.tasks,
            interrupted=interrupted,
            threads=torch.get_num_threads(),
        )


def machine_memory(device: str | None) -> int:
    """Return the bytes of memory of a CUDA device or, for the CPU, of the machine.

    Args:
        device: Torch device; None takes CUDA where it is available.
    """
    if torch.cuda.is_available() and not str(device or "cuda").startswith("cpu"):
        return torch.cuda.get_device_properties(torch.device(device or "cuda")).total_memory
    import psutil

    return psutil.virtual_memory().total
