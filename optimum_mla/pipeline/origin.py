"""Finds the model that a conversion started from: `conversion_report.json` records it, and its config is checked."""

from __future__ import annotations

from pathlib import Path

from optimum_mla.core.errors import InvalidValueError
from optimum_mla.pipeline.checkpoint import Checkpoint, config_sha256
from optimum_mla.report.schema import CodecReport, ConversionReport


def named_model(option: str, location: str, revision: str | None, model: Checkpoint) -> Checkpoint:
    """Return a model that the user named beside the command's own one.

    Args:
        option: The option that names it, for the error.
        location: A hub id or a folder.
        revision: Branch, tag or commit on the hub, or None.
        model: The command's own model, with which it shares how it is loaded.

    Raises:
        InvalidValueError: A revision is given for a folder, which has none.
    """
    if revision is not None and Path(location).is_dir():
        raise InvalidValueError(f"{option}_revision", revision, f"None, as {location} is a folder")
    return model.beside(location, revision)


def recorded_source(model: Checkpoint) -> Checkpoint | None:
    """Return what a model was converted from, by the report in its folder; None where there is no report.

    Raises:
        ReportError: The report cannot be read.
    """
    kinds: tuple[type[ConversionReport] | type[CodecReport], ...] = (ConversionReport, CodecReport)
    kind = next((kind for kind in kinds if (Path(model.location) / kind.file_name).is_file()), None)
    if kind is None:
        return None
    report = kind.read(Path(model.location))
    location = report.source_folder or report.model
    about = {"shown_as": report.model, "recorded_sha256": report.source_config_sha256}
    return model.beside(location, report.source_revision, **about)


def mismatch(source: Checkpoint) -> str | None:
    """Return why what lies at a recorded source is not known to be the model that was converted, or None."""
    folder = Path(source.location)
    if not folder.is_absolute():
        # It is a hub id, or the report was written before reports recorded absolute paths.
        return f"the report does not say that the folder {folder} here is this model" if folder.is_dir() else None
    if not folder.is_dir():
        return f"the folder {folder} is not there any more"
    if source.recorded_sha256 is not None and config_sha256(folder) != source.recorded_sha256:
        return f"the config in {folder} is not the one of the model that was converted"
    return None


def source_of(model: Checkpoint, option: str, remedy: str) -> Checkpoint:
    """Return what a model was converted from, by the report in its folder.

    Args:
        model: The converted model.
        option: The option that the source is the default of, for the error.
        remedy: What to do about the error.

    Raises:
        InvalidValueError: There is no report, or what lies where it points is not known to be the source.
        ReportError: The report cannot be read.
    """
    source = recorded_source(model)
    if source is None:
        allowed = (
            "a hub id or folder, as the model has no conversion_report.json or codec_report.json that names its source"
        )
        raise InvalidValueError(option, None, allowed)
    problem = mismatch(source)
    if problem is not None:
        allowed = f"the model that was converted: {problem}"
        raise InvalidValueError(option, source.name, allowed, remedy)
    return source
