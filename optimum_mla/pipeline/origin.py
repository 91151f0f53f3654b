"""Records in a report where a model is from, and finds it again by that record, with a check of its config."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers.utils.hub import extract_commit_hash

from optimum_mla.core.errors import InvalidValueError
from optimum_mla.io.reading import local_folder
from optimum_mla.pipeline.checkpoint import Checkpoint
from optimum_mla.report.schema import CodecReport, ConversionReport

CONFIG_FILES = ("config.json", "adapter_config.json")
"""Files that say what model a folder holds; the first one that is there is hashed."""


def origin_of(model: Checkpoint) -> dict[str, str | None]:
    """Return the fields of a report that tell where to find a model again, which has been loaded or downloaded."""
    if model.folder is not None:
        return {"source_folder": str(model.folder.resolve()), "source_config_sha256": config_sha256(model.folder)}
    # The commit stays the same when the branch moves on. It is the name of the download's folder.
    download = local_folder(model.location, model.hub)
    commit = extract_commit_hash(f"{download}/config.json", None) if download is not None else None
    return {"source_revision": commit or model.hub.get("revision")}


def config_sha256(folder: Path) -> str | None:
    """Return the SHA-256 of the config file in a folder, or None where there is none."""
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            return hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return None


def named_model(option: str, location: str, revision: str | None, model: Checkpoint) -> Checkpoint:
    """Return a model that the user named by an option, which is loaded as the command's own model is.

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

    Errors name the option that it is the default of, and the remedy.

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
