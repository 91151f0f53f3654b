"""No input of a command lies where its output will replace something."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from optimum_mla.core.errors import OutputError


def check_inputs_stay(folder: Path, inputs: Mapping[str, object]) -> None:
    """Refuse to replace a folder if an input would be deleted with it.

    Folders are compared as the file system knows them, so that links, `..` and letter case make no difference.

    Args:
        folder: What is going to be replaced or deleted. It need not exist.
        inputs: The name of each option and its value. Values that name nothing on this machine (hub ids, names of
            datasets, token ids, None) are passed over.

    Raises:
        OutputError: `folder` is an input or holds one, or it holds files and lies in a folder that is an input.
    """
    for name, value in inputs.items():
        for place in input_paths(value):
            if folder.exists() and folder.samefile(place):
                raise OutputError(f"output: {folder} is the input {name}. Choose another folder.")
            if is_inside(place, folder):
                raise OutputError(
                    f"output: {folder} holds the input {name} ({place}), which would be deleted with it. "
                    "Choose another folder."
                )
            if place.is_dir() and is_inside(folder, place) and folder.is_dir() and any(folder.iterdir()):
                raise OutputError(
                    f"output: {folder} is not empty and lies in the input {name} ({place}), a part of which would be "
                    "deleted with it. Choose another folder, or delete it yourself first."
                )


def input_paths(value: object) -> Iterator[Path]:
    """Yield the files and folders of this machine that an input reads.

    These are the path itself, the targets of the links that lie in a folder (as in a download from the hub), and the
    base model of a folder of adapters.
    """
    path = local_path(value)
    if path is None:
        return
    yield path
    if path.is_dir():
        yield from (entry for entry in path.iterdir() if entry.is_symlink() and entry.exists())
        base = local_path(adapter_base(path))
        if base is not None:
            yield base


def local_path(value: object) -> Path | None:
    """Return the path that an option names on this machine, or None where it names something else."""
    if not isinstance(value, str | os.PathLike):
        return None
    # A local dataset may be followed by its config and its split: `FOLDER:CONFIG:SPLIT`.
    for text in (str(value), str(value).partition(":")[0]):
        if text and os.path.exists(text):
            return Path(text)
    return None


def fingerprint(value: object) -> dict[str, list[int]]:
    """Return the size and the time of the last change of the files that an option names, in bytes and nanoseconds.

    They tell other content under the same name, and take no time however large the files are, where a hash of a large
    model takes minutes. So a copy that did not keep the times counts as other content. Hidden files, compiled Python
    code and pages (`.md`) are no part of a folder, and the base model of a folder of adapters is.

    Args:
        value: A file or a folder. Anything else, such as a hub id, names no files.
    """
    path = local_path(value)
    if path is None:
        return {}
    files = [] if path.is_dir() else [path]
    for root in (path, local_path(adapter_base(path)) or path):
        for place, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name[0] != "." and name != "__pycache__"]
            files += [Path(place, name) for name in names if name[0] != "." and not name.endswith(".md")]
    found = {}
    for file in sorted(files):
        with suppress(OSError):  # A link may lead to nothing.
            about = file.stat()
            found[str(file)] = [about.st_size, about.st_mtime_ns]
    return found


def adapter_base(folder: Path) -> object:
    """Return the name of the model that the adapters in a folder belong to, or None if there are no readable ones."""
    try:
        content = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("base_model_name_or_path") if isinstance(content, dict) else None


def is_inside(place: Path, folder: Path) -> bool:
    """Return whether a path is an existing folder or lies in it, either as it is spelled or after all links."""
    if not folder.exists():
        return False
    ways = (place.absolute(), place.resolve())
    above = dict.fromkeys(up for way in ways for up in (way, *way.parents))
    return any(up.exists() and up.samefile(folder) for up in above)
