"""The work of `mla-benchmark`: measuring models, merging reports, and writing the pages of reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from typing_extensions import Unpack

from optimum_mla.core.errors import InvalidValueError, MissingDependencyError
from optimum_mla.io.claim import claims_output
from optimum_mla.io.folder import atomic_folder, check_output
from optimum_mla.pipeline.benchmarking.options import BenchmarkOptions
from optimum_mla.pipeline.benchmarking.run import Benchmark
from optimum_mla.pipeline.checkpoint import Checkpoint
from optimum_mla.pipeline.origin import named_model, recorded_source, source_of
from optimum_mla.pipeline.run_settings import RunOptions, RunSettings
from optimum_mla.report.pages import FORMATS, write_pages
from optimum_mla.report.rows import BenchmarkReport

NO_BASELINE = "none"


@claims_output()
def benchmark(
    model: str,
    output: str | Path,
    baseline: str | None = None,
    options: BenchmarkOptions | None = None,
    formats: Iterable[str] = FORMATS,
    baseline_revision: str | None = None,
    **settings: Unpack[RunSettings],
) -> BenchmarkReport:
    """Measure a model's cache, speed and quality beside a baseline, and write `report.json` and its pages.

    Every measurement runs in a process of its own. If a measurement fails, its row says so and the run continues. If
    the run is interrupted, the rows that were measured are written before `KeyboardInterrupt` is raised again.

    Args:
        model: The model to measure, converted or not, as a hub id or a folder.
        output: The folder to write.
        baseline: The model to compare with, as a hub id or a folder. None takes the model that was converted, if its
            folder still exists, and `none` measures without a baseline.
        options: What to measure; None takes the default options.
        formats: Names of the pages to write: `json` (which is always written), `md` and `html`.
        baseline_revision: Branch, tag or commit of the baseline on the hub; None takes the main branch.
        **settings: See `RunSettings`. A revision applies to `model` only.

    Returns:
        The report that was written.

    Raises:
        MLAError: An argument or an input file is invalid. `output` is then unchanged.
    """
    given = RunOptions(**settings)
    checkpoint = given.checkpoint(model)
    formats = check_formats(formats)
    options = options or BenchmarkOptions()
    chosen = find_baseline(checkpoint, baseline, baseline_revision)
    place = None if chosen is None else chosen.location
    inputs = {"model": model, "baseline": place, "eval-data": options.eval_data, "tasks-path": options.tasks_path}
    folder = check_report_folder(output, inputs, given.overwrite)
    run = Benchmark(checkpoint, chosen, options, given.dtype, given.device)
    interrupted = True
    try:
        run.run()
        interrupted = False
    finally:
        report = run.report(interrupted)
        if not interrupted or any((run.memory, run.speed, run.quality, run.tasks)):
            with atomic_folder(folder, overwrite=given.overwrite) as partial:
                report.write(partial)
                write_pages([(folder.name, report)], partial, formats)
    return report


def find_baseline(model: Checkpoint, baseline: str | None, revision: str | None) -> Checkpoint | None:
    """Return the model to compare with, or None for no comparison; the arguments are those of `benchmark`.

    Raises:
        InvalidValueError: The folder from which the model was converted now holds another model, or a revision is given
            without a baseline.
        ReportError: The report of the conversion cannot be read.
    """
    if baseline not in (None, NO_BASELINE):
        return named_model("baseline", str(baseline), revision, model)
    if revision is not None:
        raise InvalidValueError("baseline_revision", revision, "None without a baseline", "Name one with --baseline.")
    source = recorded_source(model) if baseline is None else None
    if source is None or not Path(source.location).is_dir():
        return None
    return source_of(model, "baseline", "Name the model to compare with by --baseline, or give --baseline none.")


@claims_output()
def compare(
    folders: Iterable[str | Path], output: str | Path, formats: Iterable[str] = FORMATS, overwrite: bool = False
) -> None:
    """Merge several reports into one page.

    Args:
        folders: The folders that `benchmark` wrote.
        output: The folder to write.
        formats: Names of the pages to write, `md` and `html`. There is no merged JSON, so `json` writes nothing.
        overwrite: Whether `output` may be replaced if it holds a comparison.

    Raises:
        MLAError: A folder holds no report, fewer than two different folders are given, or `output` exists.
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
    """Return the formats as a tuple after checking them.

    Raises:
        InvalidValueError: A format is unknown.
        MissingDependencyError: The package that a format needs is not installed.
    """
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
    """Return the output folder after checking with `check_output` that a report may be written there."""
    files = ("report.json", "report.html", "report.md")
    return check_output(output, inputs, overwrite, files, "report")
