"""What every command does with bad input."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from optimum_mla.errors import MLAError

BAD_INPUT = 2
"""Exit code."""


@contextmanager
def exit_on_bad_input(interrupted: str = "nothing was written") -> Iterator[None]:
    """Turn an `MLAError` into one line on standard error and exit code 2; Ctrl-C into exit code 130.

    The libraries' own progress bars and warnings stay silent where standard error is no terminal.

    Args:
        interrupted: What to say after Ctrl-C.
    """
    quiet_libraries()
    try:
        yield
    except MLAError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        raise SystemExit(130) from None


def quiet_libraries() -> None:
    """Hide Transformers' bars off a terminal, and the libraries' warnings to their own callers."""
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore", FutureWarning)
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
