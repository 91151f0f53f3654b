"""`mla-benchmark`: measure, or merge what was measured, and write the pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from optimum_mla.errors import InvalidValueError, MissingDependencyError
from optimum_mla.io.folder import atomic_folder, check_output
from optimum_mla.pipeline.benchmark_run import Benchmark, BenchmarkOptions
from optimum_mla.pipeline.loading import check_dtype
from optimum_mla.pipeline.origin import NamedModel, named_model, recorded_source, source_of
from optimum_mla.report.benchmark import BenchmarkReport
from optimum_mla.report.pages import FORMATS, write_pages

NO_BASELINE = "none"


def benchmark(
    model: str,
    output: str | Path,
    baseline: str | None = None,
    options: BenchmarkOptions | None = None,
    formats: Iterable[str] = FORMATS,
    dtype: str = "auto",
    device: str | None = None,
    overwrite: bool = False,
    hub: dict[str, Any] | None = None,
    baseline_revision: str | None = None,
) -> BenchmarkReport:
    """Measure a model's cache, speed and quality beside a baseline, and write `report.json` and its pages.

    Every measurement runs in a process of its own. One that fails says so in its row, and the run goes on. If it is
    interrupted, what was measured by then is written before `KeyboardInterrupt` goes on.

    Args:
        model: A hub id or a folder; converted or not.
        output: Folder to write.
        baseline: What to compare with; None takes the model that the conversion started from, if its folder is still
            there, and `none` nothing.
        options: What to measure.
        formats: Which pages to write: `json` (always written), `md`, `html`.
        dtype: `auto` (each checkpoint's own), `float32`, `bfloat16` or `float16`.
        device: Torch device; None takes CUDA where it is available.
        overwrite: Replace `output` if it holds a report.
        hub: `revision`, `cache_dir`, `token`, `trust_remote_code` for loading. The revision is that of `model` alone.
        baseline_revision: Branch, tag or commit of the baseline on the hub; None takes the main branch.

    Raises:
        MLAError: Bad input of any kind; `output` is as it was.
    """
    hub = {name: value for name, value in (hub or {}).items() if value is not None}
    check_dtype(dtype)
    formats = check_formats(formats)
    options = options or BenchmarkOptions()
    chosen = find_baseline(model, baseline, baseline_revision)
    place = None if chosen is None else chosen.location
    inputs = {"model": model, "baseline": place, "eval-data": options.eval_data, "tasks-path": options.tasks_path}
    folder = check_report_folder(output, inputs, overwrite)
    run = Benchmark(model, chosen, options, dtype, device, hub)
    interrupted = True
    try:
        run.run()
        interrupted = False
    finally:
        report = run.report(interrupted)
        if not interrupted or any((run.memory, run.speed, run.quality, run.tasks)):
            with atomic_folder(folder, overwrite=overwrite) as partial:
                report.write(partial)
                write_pages([(folder.name, report)], partial, formats)
    return report


def find_baseline(model: str, baseline: str | None, revision: str | None) -> NamedModel | None:
    """Return the model to compare with, or None for no comparison.

    Args:
        model: The model to measure.
        baseline: What the user named, `none` for no baseline, or None for the folder that the model was converted
            from, if there still is one.
        revision: The revision that the user gave for it, or None.

    Raises:
        InvalidValueError: The folder that the model was converted from holds another model by now, or a revision is
            given and there is nothing to apply it to.
        ReportError: The report of the conversion cannot be read.
    """
    if baseline not in (None, NO_BASELINE):
        return named_model("baseline", str(baseline), revision)
    if revision is not None:
        raise InvalidValueError("baseline_revision", revision, "None without a baseline", "Name one with --baseline.")
    source = recorded_source(model) if baseline is None else None
    if source is None or not Path(source.location).is_dir():
        return None
    return source_of(model, "baseline", "Name the model to compare with by --baseline, or give --baseline none.")


def compare(
    folders: Iterable[str | Path], output: str | Path, formats: Iterable[str] = FORMATS, overwrite: bool = False
) -> None:
    """Merge several reports into one page.

    Args:
        folders: What `benchmark` wrote.
        output: Folder to write.
        formats: As for `benchmark`; there is no merged JSON.
        overwrite: Replace `output` if it holds a comparison.

    Raises:
        MLAError: A folder without a report, fewer than two, or an output that exists.
    """
    places = [Path(folder) for folder in folders]
    formats = check_formats(formats)
    if len(places) < 2:
        raise InvalidValueError("compare", [str(p) for p in places], "two folders or more")
    if len({place.resolve() for place in places}) < len(places):
        raise InvalidValueError("compare", [str(p) for p in places], "folders that differ")
    folder = check_report_folder(output, {f"report {place}": place for place in places}, overwrite)
    reports = [BenchmarkReport.read(place) for place in places]
    names = [place.resolve().name for place in places]
    if len(set(names)) < len(names):
        names = [str(place) for place in places]
    with atomic_folder(folder, overwrite=overwrite) as partial:
        write_pages(list(zip(names, reports, strict=True)), partial, formats)


def check_formats(formats: Iterable[str]) -> tuple[str, ...]:
    """Refuse a format that is not known, or that needs a package which is not installed."""
    chosen = tuple(formats)
    for name in chosen:
        if name not in FORMATS:
            raise InvalidValueError("format", name, ", ".join(FORMATS))
    if "html" in chosen:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError("matplotlib", "report", "draw the plots of report.html") from error
    return chosen


def check_report_folder(output: str | Path, inputs: Mapping[str, object], overwrite: bool) -> Path:
    """Do what `check_output` does, for a folder of reports."""
    files = ("report.json", "report.html", "report.md")
    return check_output(output, inputs, overwrite, files, "report")
