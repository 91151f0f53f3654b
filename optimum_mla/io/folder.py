"""An output folder that appears whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from optimum_mla.core.errors import MLAError, OutputError
from optimum_mla.io.inputs import check_inputs_stay

logger = logging.getLogger(__name__)

MODEL_FILES = ("config.json", "adapter_config.json", "export_report.json")
"""A folder that holds one of them is a model, an adapter or an export."""
KEPT = {"mla-convert": "unfinished", "mla-finetune": "training"}
"""The commands that can be resumed, each with the word for what it keeps until its output is whole."""


def check_output(
    output: str | Path,
    inputs: Mapping[str, object],
    overwrite: bool,
    files: tuple[str, ...] = MODEL_FILES,
    kind: str = "model",
    leading: bool = True,
) -> Path:
    """Return the output folder, if the result of a command may and can be put there.

    The renames that `atomic_folder` makes at the end are tried and undone at once, so that what the file system does
    not allow is known before any work.

    Args:
        output: The folder as the user named it. Links are followed: what a link points at is written.
        inputs: All that the command reads, by the name of the option. See `check_inputs_stay`.
        overwrite: Whether what is there may be replaced.
        files: A folder that holds any of these files is of the kind that may be replaced.
        kind: The word for that kind in an error.
        leading: Whether this process writes. In the other processes of a distributed run nothing is checked.

    Raises:
        OutputError: It is or holds an input, it exists (without `overwrite`), it does not hold what may be replaced, or
            the file system does not allow to put a folder there.
    """
    with as_output_error(output):
        folder = resolve_output(output)
        if not leading:
            return folder
        check_inputs_stay(folder, inputs)
        if folder.exists():
            check_replaceable(folder, overwrite, files, kind)
        try_renames(folder)
    return folder


def check_replaceable(folder: Path, overwrite: bool, files: tuple[str, ...], kind: str) -> None:
    """Refuse an existing output that must not be replaced, or cannot be deleted afterwards.

    Raises:
        OutputError: The message says why.
    """
    if not folder.is_dir():
        raise OutputError(f"output: {folder} is a file. Choose another folder.")
    if os.path.ismount(folder):
        raise OutputError(
            f"output: {folder} is a mount point, which cannot be renamed. Name a folder in it, such as {folder / kind}."
        )
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"output: {folder} exists. Choose another folder, or replace it with --overwrite.")
    if not any((folder / name).is_file() for name in files):
        raise OutputError(f"output: {folder} holds no {kind} (no {files[0]}), so --overwrite leaves it alone.")
    for place, _, _ in os.walk(folder):
        if os.path.ismount(place):
            raise OutputError(f"output: {folder} holds a mount point ({place}), so it cannot be replaced.")
        if not os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            raise OutputError(f"output: {place} is read-only, so {folder} cannot be replaced. Choose another folder.")


def try_renames(folder: Path) -> None:
    """Make the renames of `atomic_folder` and undo them at once.

    Raises:
        OSError: The file system does not allow one of them. Everything is as it was.
    """
    with make_parents(folder):
        trial = make_temporary_folder(folder)
        try:
            if folder.exists():
                retired = trial.with_suffix(".old")
                try:
                    folder.rename(retired)
                finally:
                    restore_output(retired, folder)
            else:
                trial = trial.rename(folder)
        finally:
            trial.rmdir()


def check_space(output: Path, needed_bytes: int) -> None:
    """Refuse an output for which its disk has too little space.

    Args:
        output: The folder, in a folder that exists.
        needed_bytes: Bytes that will be written.

    Raises:
        OutputError: Fewer bytes are free.
    """
    free = shutil.disk_usage(output.parent).free
    if needed_bytes > free:
        raise OutputError(
            f"output: {output.parent} has {free / 1e9:.2f} GB free, the result needs {needed_bytes / 1e9:.2f} GB. "
            "Free space or choose another disk."
        )


@contextmanager
def atomic_folder(
    output: Path, needed_bytes: int = 0, overwrite: bool = False, within: Path | None = None
) -> Iterator[Path]:
    """Give a temporary folder that takes the name of `output` when the block ends well, and vanishes when it does not.

    Args:
        output: What `check_output` returned.
        needed_bytes: Space that the block will need.
        overwrite: Whether to replace what `output` holds. Its old content is deleted after the new folder stands.
        within: A folder of the same file system in which the temporary folder is made; None takes that of `output`.

    Raises:
        OutputError: There is too little space, before or while writing; then `output` is as it was. Or the finished
            folder could not take its name; then it is kept, and the message says where.
    """
    with as_output_error(output), make_parents(output):
        check_space(output, needed_bytes)
        partial = make_temporary_folder(output, within)
        try:
            yield partial
            partial.chmod(0o755)  # mkdtemp makes it private
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        move_into_place(partial, output, overwrite)


def move_into_place(partial: Path, output: Path, overwrite: bool) -> None:
    """Rename a finished folder to its final name. An old folder of that name goes aside first and is then deleted.

    Raises:
        OutputError: A rename failed. The old folder has its name again; if even that failed, the message says where it
            is. The finished folder is kept where the message says.
    """
    retired = output.with_name(partial.with_suffix(".old").name)
    try:
        if overwrite and output.exists():
            output.rename(retired)
        # Without `overwrite` this fails where another program has put something there in the meantime.
        partial.rename(output)
    except BaseException as error:
        restore_output(retired, output, f"The result is complete, in {partial}.")
        if not isinstance(error, OSError):
            raise
        raise OutputError(
            f"output: the result could not be renamed to {output}: {reason_of(error)}. It is complete, in {partial}."
        ) from error
    if retired.exists():
        try:
            shutil.rmtree(retired)
        except OSError as error:
            logger.warning(
                "output: %s is written. What it held before could not be deleted (%s); the rest of it is in %s.",
                output,
                reason_of(error),
                retired,
            )


def restore_output(retired: Path, output: Path, also: str = "") -> None:
    """Give an old output its name again, if it went aside.

    Raises:
        OutputError: That failed. The message says where the old output is, and whatever `also` says.
    """
    if not retired.exists():
        return
    try:
        retired.rename(output)
    except OSError as error:
        raise OutputError(
            f"output: what {output} held is in {retired} and could not be renamed back: {reason_of(error)}. "
            f"Rename it yourself. {also}".strip()
        ) from error


@contextmanager
def as_output_error(output: str | Path) -> Iterator[None]:
    """Turn an error of the file system into one line about `output`."""
    try:
        yield
    except MLAError:
        raise
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"output: {output} cannot be written: {reason_of(error)}. Nothing was changed there. Choose another folder."
        ) from error


def resolve_output(output: str | Path) -> Path:
    """Return the absolute path of an output, links followed.

    Raises:
        OutputError: The name means nothing here (an unknown home directory, links in a circle, a null byte).
    """
    try:
        return Path(output).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(f"output: {output!s} is no path here: {error}. Choose another folder.") from error


def kept_folder(command: str, output: Path) -> Path:
    """Return the hidden folder beside an output in which a command of `KEPT` keeps what it can be resumed from."""
    return output.with_name(f".{output.name}.{KEPT[command]}")


@contextmanager
def make_parents(folder: Path) -> Iterator[None]:
    """Make the missing folders above `folder`. Those that are still empty when the block ends are deleted again."""
    missing = [place for place in folder.parents if not place.exists()]  # the innermost first
    nearest = folder.parents[len(missing)]
    if not nearest.is_dir():
        raise OutputError(f"output: {nearest} is a file, so {folder} cannot lie in it. Choose another folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for place in missing:
            with suppress(OSError):
                place.rmdir()


def make_temporary_folder(output: Path, within: Path | None = None) -> Path:
    """Make a temporary folder that is named after `output`, in `within` or in the folder of `output`."""
    return Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=within or output.parent))


def reason_of(error: Exception) -> str:
    """Return what the system says about an error, and about which file where that is known."""
    said = getattr(error, "strerror", None) or str(error)
    name = getattr(error, "filename", None)
    return f"{said} ({name})" if name else said
