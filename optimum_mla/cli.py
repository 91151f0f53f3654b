"""The way in which all commands report bad input and interruptions."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from optimum_mla.core.errors import MLAError

BAD_INPUT = 2
"""Exit code of a command that was given bad input."""
INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended, as shells have it."""


@contextmanager
def exit_on_bad_input(interrupted: str = "nothing was written") -> Iterator[None]:
    """Turn an `MLAError` into one line on standard error and exit code 2, and Ctrl-C into one line and exit code 130.

    Warnings of the libraries are hidden, and so are their progress bars if standard error is not a terminal.

    Args:
        interrupted: The end of the line after Ctrl-C, which says what was written.
    """
    quiet_libraries()
    try:
        yield
    except MLAError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def quiet_libraries() -> None:
    """Hide the warnings of the libraries, and their progress bars if standard error is not a terminal."""
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore", FutureWarning)
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
