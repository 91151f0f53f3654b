"""An output folder that appears whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optimum_mla.errors import OutputError

MODEL_FILES = ("config.json", "adapter_config.json")
"""A folder that holds one of them is a model or an adapter."""


def check_output(
    output: str | Path, source: str | Path, overwrite: bool, files: tuple[str, ...] = MODEL_FILES, kind: str = "model"
) -> Path:
    """The output folder, if what is made of `source` may be written there.

    Args:
        output: As the user named it.
        source: Input that it must not be.
        overwrite: Whether what is there may be replaced.
        files: Any of them shows that what is there is of the kind that may be replaced.
        kind: What that is called.

    Raises:
        OutputError: It is the source itself, exists (without `overwrite`), is no model folder that may be replaced, or
            its parent cannot be written.
    """
    folder = Path(output).expanduser()
    if Path(source).exists() and folder.resolve() == Path(source).resolve():
        raise OutputError(f"output: {output} is the input model. Choose another folder.")
    if folder.exists():
        if not folder.is_dir():
            raise OutputError(f"output: {output} is a file. Choose another folder.")
        occupied = any(folder.iterdir())
        if occupied and not overwrite:
            raise OutputError(f"output: {output} exists. Choose another folder, or replace it with --overwrite.")
        if occupied and not any((folder / name).is_file() for name in files):
            raise OutputError(f"output: {output} holds no {kind} (no {files[0]}), so --overwrite leaves it alone.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent):
            pass  # only whether it can be made matters
    except OSError as error:
        raise OutputError(f"output: {folder.parent} cannot be written: {error.strerror}.") from error
    return folder


@contextmanager
def atomic_folder(output: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name when the block ends well, and vanishes when it does not.

    Args:
        output: From `check_output`. What it held before is deleted after the new folder stands.
        needed_bytes: Space that the block will need.

    Raises:
        OutputError: Too little space, before or while writing.
    """
    free = shutil.disk_usage(output.parent).free
    if needed_bytes > free:
        raise OutputError(
            f"output: {output.parent} has {free / 1e9:.2f} GB free, the result needs {needed_bytes / 1e9:.2f} GB. "
            "Free space or choose another disk."
        )
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        if output.exists():
            retired = partial.with_suffix(".old")
            output.rename(retired)
            partial.rename(output)
            shutil.rmtree(retired)
        else:
            partial.rename(output)
    except OSError as error:
        raise OutputError(
            f"output: writing {output} failed: {error.strerror or error}. Nothing was left there."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
