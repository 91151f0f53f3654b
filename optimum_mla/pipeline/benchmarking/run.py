"""A run of `mla-benchmark`, which makes every measurement in a process of its own, one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from optimum_mla.calibrate.text import context_limit
from optimum_mla.core.progress import progress
from optimum_mla.measure.sizes import budget_rows, layer_numbers
from optimum_mla.models.family_table import family_of, is_converted
from optimum_mla.models.layers import model_geometry
from optimum_mla.pipeline.benchmarking.cells import OUT_OF_MEMORY, CellError, run_cell
from optimum_mla.pipeline.benchmarking.options import BenchmarkOptions
from optimum_mla.pipeline.benchmarking.subjects import ScoredText, Subject, check_caches, dtype_name
from optimum_mla.pipeline.checkpoint import Checkpoint
from optimum_mla.pipeline.placement import memory_of
from optimum_mla.report.rows import BASELINE, MODEL, BenchmarkReport, MemoryRow, QualityRow, SpeedRow, TaskRow


class Benchmark:
    """A run of measurements, which collects the rows of its report.

    Args:
        model: The model to measure.
        baseline: The model to compare with, or None.
        options: What to measure.
        dtype, device: As for `Subject`.

    Raises:
        MLAError: A model, a tokenizer, a text or a task cannot be used.
    """

    def __init__(
        self, model: Checkpoint, baseline: Checkpoint | None, options: BenchmarkOptions, dtype: str, device: str | None
    ) -> None:
        self.options = options
        self.subjects: dict[str, Subject] = {}  # in the order of the rows
        for role, one in ((BASELINE, baseline), (MODEL, model)):
            if one is not None:
                self.subjects[role] = Subject(one, dtype, device)
        self.model, self.baseline = self.subjects[MODEL], self.subjects.get(BASELINE)
        for subject in (self.model, self.baseline):
            if subject is not None:
                _ = subject.config  # One that cannot be read is refused before anything is measured.
        check_caches(options.caches, self.model.config)
        self.text = ScoredText.read(options, self.model, self.baseline)
        if options.tasks:
            from optimum_mla.measure.tasks import task_manager

            task_manager(list(options.tasks), options.tasks_path)
            self.model.checkpoint.tokenizer(needed=True)
        self.memory: list[MemoryRow] = []
        self.speed: list[SpeedRow] = []
        self.quality: list[QualityRow] = []
        self.tasks: list[TaskRow] = []

    def run(self) -> None:
        """Make all measurements. If an exception ends the run, `report` still gives the rows up to then."""
        for step in progress(list(self._steps()), "benchmark"):
            step()

    def _steps(self) -> Iterator[Callable[[], None]]:
        """Yield the measurements in the order in which they are made."""
        options = self.options
        sizes = list(itertools.product(options.context_lengths, options.batch_sizes))
        if "memory" in options.parts:
            for (role, cache), size in itertools.product(self._contenders(), sizes):
                yield partial(self._measure_memory, role, cache, *size)
        if "speed" in options.parts:
            for size in sizes:
                yield partial(self._measure_speed, *size)
        if self.text is not None:
            for cache in options.caches:
                yield partial(self._measure_quality, self.text, MODEL, cache)
            # The first comparison also gives the baseline's own perplexity.
            for cache in options.baseline_caches[1:] if self._compared(self.text) else ():
                yield partial(self._measure_quality, self.text, BASELINE, cache)
        if options.tasks:
            for role in self.subjects:
                yield partial(self._measure_tasks, role)

    def _contenders(self) -> list[tuple[str, str]]:
        """Return each role with each of its caches."""
        caches = {MODEL: self.options.caches, BASELINE: self.options.baseline_caches}
        return [(role, cache) for role in self.subjects for cache in caches[role]]

    def _compared(self, text: ScoredText) -> bool:
        return self.baseline is not None and text.refusal is None

    def _too_long(self, role: str, tokens: int) -> str | None:
        limit = context_limit(self.subjects[role].config)
        return None if limit is None or tokens <= limit else f"skipped: the {role}'s context ends at {limit} tokens"

    def _measure_memory(self, role: str, cache: str, context: int, batch: int) -> None:
        row = MemoryRow(role, cache, context, batch)
        problem = self._too_long(role, context)
        if problem is None:
            request = {"model": self.subjects[role].request(), "cache": cache, "context": context, "batch": batch}
            try:
                row = replace(row, **run_cell("memory", request))
            except CellError as error:
                problem = str(error)
        self.memory.append(replace(row, problem=problem))

    def _measure_speed(self, context: int, batch: int) -> None:
        problems = {role: self._too_long(role, context) for role in self.subjects}
        for failed in self.memory:
            smaller = failed.context_tokens <= context and failed.batch_size <= batch
            if smaller and (failed.problem or "").startswith(OUT_OF_MEMORY):
                problems[failed.role] = f"{OUT_OF_MEMORY}, as in the memory table"
        able = [role for role, problem in problems.items() if problem is None]
        rows: list[dict[str, Any]] = []
        if MODEL in able:
            request = {
                "model": self.model.request(),
                "baseline": self.baseline.request() if self.baseline is not None and BASELINE in able else None,
                "caches": {MODEL: self.options.caches, BASELINE: self.options.baseline_caches},
                "context": context,
                "batch": batch,
                "new_tokens": self.options.new_tokens,
                "repeats": self.options.repeats,
            }
            try:
                rows = run_cell("speed", request)["rows"]
            except CellError as error:
                problems |= dict.fromkeys(able, str(error))
        elif BASELINE in able:
            problems[BASELINE] = "skipped: there is no model row to compare with"
        found = {(row.pop("role"), row.pop("cache")): row for row in rows}
        for role, cache in self._contenders():
            values = found.get((role, cache), {"problem": problems[role]})
            self.speed.append(replace(SpeedRow(role, cache, context, batch), **values))

    def _measure_quality(self, text: ScoredText, role: str, cache: str) -> None:
        request = {
            "model": self.subjects[role].request(),
            "baseline": self.baseline.request() if self.baseline is not None and self._compared(text) else None,
            "cache": cache,
            "windows": text.windows.tolist(),
            "stride": text.stride,
        }
        try:
            found = run_cell("quality", request)
        except CellError as error:
            self.quality.append(QualityRow(role, cache, problem=str(error)))
            return
        if self.baseline is not None and all(known.cache != "default" or known.role == MODEL for known in self.quality):
            tokens = found["tokens"] if self._compared(text) else None
            own = QualityRow(BASELINE, "default", found["baseline_perplexity"], problem=text.refusal)
            self.quality.insert(0, replace(own, scored_tokens=tokens))
        self.quality.append(
            QualityRow(
                role,
                cache,
                perplexity=found["perplexity"],
                agreement_percent=None if found["agreement"] is None else 100 * found["agreement"],
                kl_nats=found["kl"],
                kl_stderr_nats=found["kl_stderr"],
                loss_stderr_nats=found["loss_stderr"],
                scored_tokens=found["tokens"],
            )
        )

    def _measure_tasks(self, role: str) -> None:
        options = self.options
        request = {
            "model": self.subjects[role].request(),
            "tasks": options.tasks,
            "tasks_path": options.tasks_path,
            "batch": min(options.batch_sizes),
            "limit": options.tasks_limit,
        }
        try:
            self.tasks += [TaskRow(role, *row) for row in run_cell("tasks", request)["rows"]]
        except CellError as error:
            self.tasks += [TaskRow(role, task, "-", problem=str(error)) for task in options.tasks]

    def report(self, interrupted: bool) -> BenchmarkReport:
        """Return the report with the rows that were measured.

        Args:
            interrupted: Whether the run ended before all measurements were made.
        """
        config, device = self.model.config, self.model.device
        budget = memory_of(device) if self.options.memory_budget is None else self.options.memory_budget
        own, source = layer_numbers(config), None
        if self.baseline is not None:
            source = layer_numbers(self.baseline.config)
        elif is_converted(config):
            source = [g.source_cache_numbers for g in model_geometry(family_of(config).spec, config).layers]
        return BenchmarkReport(
            model=self.model.checkpoint.name,
            baseline=None if self.baseline is None else self.baseline.checkpoint.name,
            options={name: value for name, value in vars(self.options).items() if name != "memory_budget"},
            data={} if self.text is None else {"eval-data": self.text.origin},
            dtype=dtype_name(self.model),
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            cache_numbers_per_token=None if own is None else sum(own),
            baseline_cache_numbers_per_token=None if source is None else sum(source),
            model_max_context_tokens=context_limit(config),
            memory_budget_bytes=budget,
            memory=self.memory,
            budget=budget_rows(self.memory, budget),
            speed=self.speed,
            quality=self.quality,
            tasks=self.tasks,
            interrupted=interrupted,
            threads=torch.get_num_threads(),
        )
