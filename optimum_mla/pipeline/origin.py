"""Finds the model that a conversion started from: `conversion_report.json` records it, and its config is checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import extract_commit_hash

from optimum_mla.core.errors import InvalidValueError
from optimum_mla.io.reading import local_folder
from optimum_mla.report.schema import CodecReport, ConversionReport

CONFIG_FILES = ("config.json", "adapter_config.json")
"""Files that say what model a folder holds; the first one that is there is hashed."""


@dataclass(frozen=True)
class NamedModel:
    """A second model that a command loads beside its own: a teacher or a baseline.

    Attributes:
        name: Its name as the user gave it, for reports and model cards.
        location: What to load: a hub id or a folder.
        revision: Branch, tag or commit on the hub, or None for the main branch.
        config_sha256: SHA-256 of the config in the folder when the model was converted, or None where that is unknown.
    """

    name: str
    location: str
    revision: str | None = None
    config_sha256: str | None = None

    def hub(self, common: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for loading this model, which has a revision of its own.

        Args:
            common: Those of the command's own model.
        """
        rest = {name: value for name, value in common.items() if name != "revision"}
        return rest if self.revision is None else {**rest, "revision": self.revision}

    def same_files(self, other: NamedModel) -> bool:
        """Return whether both names lead to the same folder, or to the same revision of the same hub id."""
        here, there = Path(self.location), Path(other.location)
        if here.is_dir() and there.is_dir():
            return here.samefile(there)
        return (self.location, self.revision) == (other.location, other.revision)


def named_model(option: str, name: str, revision: str | None) -> NamedModel:
    """Return the model that the user named.

    Raises:
        InvalidValueError: A revision is given for a folder, which has none.
    """
    if revision is not None and Path(name).is_dir():
        raise InvalidValueError(f"{option}_revision", revision, f"None, as {name} is a folder")
    return NamedModel(name, name, revision)


def origin_fields(model: str, hub: dict[str, Any]) -> dict[str, str | None]:
    """Return the fields of `ConversionReport` that tell where to find the source model again.

    Args:
        model: Its hub id or folder, already loaded, so that a download is on this machine.
        hub: Keyword arguments for loading from the hub.
    """
    folder = Path(model)
    if folder.is_dir():
        return {"source_folder": str(folder.resolve()), "source_config_sha256": config_sha256(folder)}
    # The commit stays the same when the branch moves on. It is the name of the download's folder.
    download = local_folder(model, hub)
    commit = extract_commit_hash(f"{download}/config.json", None) if download is not None else None
    return {"source_revision": commit or hub.get("revision")}


def source_metadata(model: str, hub: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of the source's model card, such as its licence; empty where there is none that can be read.

    Args:
        model: Its hub id or folder.
        hub: Keyword arguments for loading from the hub.
    """
    from huggingface_hub import hf_hub_download, metadata_load

    card = Path(model) / "README.md"
    try:
        if not Path(model).is_dir():
            known = {name: hub[name] for name in ("revision", "cache_dir", "token") if name in hub}
            card = Path(hf_hub_download(model, "README.md", **known))
        return metadata_load(card) or {}
    except Exception:  # The hub, the network and YAML raise errors of many unrelated types. A card is never needed.
        return {}


def config_sha256(folder: Path) -> str | None:
    """Return the SHA-256 of the config file in a folder, or None where there is none."""
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            return hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return None


def recorded_source(model: str) -> NamedModel | None:
    """Return what a model was converted from, by the report in its folder; None where there is no report.

    Raises:
        ReportError: The report cannot be read.
    """
    kinds: tuple[type[ConversionReport] | type[CodecReport], ...] = (ConversionReport, CodecReport)
    kind = next((kind for kind in kinds if (Path(model) / kind.file_name).is_file()), None)
    if kind is None:
        return None
    report = kind.read(Path(model))
    location = report.source_folder or report.model
    return NamedModel(report.model, location, report.source_revision, report.source_config_sha256)


def mismatch(source: NamedModel) -> str | None:
    """Return why what lies at a recorded source is not known to be the model that was converted, or None."""
    folder = Path(source.location)
    if not folder.is_absolute():
        # It is a hub id, or the report was written before reports recorded absolute paths.
        return f"the report does not say that the folder {folder} here is this model" if folder.is_dir() else None
    if not folder.is_dir():
        return f"the folder {folder} is not there any more"
    if source.config_sha256 is not None and config_sha256(folder) != source.config_sha256:
        return f"the config in {folder} is not the one of the model that was converted"
    return None


def source_of(model: str, option: str, remedy: str) -> NamedModel:
    """Return what a model was converted from, by the report in its folder.

    Args:
        model: Folder of the converted model.
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
