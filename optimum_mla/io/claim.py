"""The claim of a command on its output, so that no two processes write the same folder."""

from __future__ import annotations

import functools
import getpass
import hashlib
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from optimum_mla.core.errors import OutputError
from optimum_mla.io.folder import resolve_output

F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def hold_claim(folder: Path) -> Iterator[None]:
    """Hold the claim on an output folder, which may not exist yet, until the block ends.

    The claim is a lock of the system on a file in the folder for temporary files. It ends with the process that holds
    it, however that process ends, so a process that was killed blocks nobody.

    Args:
        folder: The absolute path of the output.

    Raises:
        OutputError: Another process of this machine holds the claim.
    """
    lock = FileLock(lock_file(folder))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            f"output: another process is writing {folder}. Wait until it is done, or choose another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def lock_file(folder: Path) -> Path:
    """Return the file whose lock is the claim on a folder, in a folder of this user's own that exists."""
    place = Path(tempfile.gettempdir()) / f"optimum-mla-{getpass.getuser()}"
    place.mkdir(mode=0o700, exist_ok=True)
    return place / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.lock"


def claims_output(distributed: bool = False) -> Callable[[F], F]:
    """Return a decorator, with which a command holds the claim on its argument `output` while it runs.

    Args:
        distributed: Whether the processes of `torchrun` may run the command together. Only that of rank 0 claims then.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            output = signature.bind(*args, **kwargs).arguments["output"]
            if not distributed and int(os.environ.get("WORLD_SIZE", 1)) > 1:
                raise OutputError(
                    f"output: the processes of torchrun would all write {output}. Start this command without torchrun; "
                    "mla-convert and mla-finetune share their work between processes."
                )
            if int(os.environ.get("RANK", 0)) != 0:
                return function(*args, **kwargs)
            with hold_claim(resolve_output(output)):
                return function(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate
