"""The way in which all commands report bad input and interruptions."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from optimum_mla.core.errors import MLAError, first_line, ran_out_of_memory
from optimum_mla.stack.quiet import quiet_libraries

BAD_INPUT = 2
"""Exit code of a command that was given bad input."""
INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended, as shells have it."""
ALONE_SECONDS = 30.0
"""Seconds for which a process of `torchrun` waits for the first process to end with the same error."""


@contextmanager
def exit_on_bad_input(interrupted: str = "nothing was written") -> Iterator[None]:
    """Turn an `MLAError` into one line on standard error and exit code 2, and Ctrl-C into one line and exit code 130.

    A lack of memory is such an error too, because it depends on what is asked for. Warnings of the libraries are
    hidden, and so are their progress bars if standard error is not a terminal. Of several processes of `torchrun` only
    the first one speaks, unless an error is another process's alone.

    Args:
        interrupted: The end of the line after Ctrl-C, which says what was written.
    """
    quiet_libraries()
    try:
        yield
    except MLAError as error:
        end(f"error: {' '.join(str(error).split())}", BAD_INPUT)
    except Exception as error:  # A lack of memory comes as errors of several types; all others are raised again.
        if not ran_out_of_memory(error):
            raise
        remedy = "Ask for less at once, such as fewer or shorter windows or rows, or take a machine with more."
        end(f"error: there is not enough memory ({first_line(error)}). {remedy}", BAD_INPUT)
    except KeyboardInterrupt:
        end(f"interrupted: {interrupted}", INTERRUPTED)


def end(line: str, code: int) -> NoReturn:
    """Print a line on standard error and exit with a code.

    A process of `torchrun` other than the first one waits before it prints an error. Mostly the first one has met the
    same error, and `torchrun` then ends the others while they wait. What is printed also goes into its report.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        rank = int(os.environ["RANK"])
        if rank and code == INTERRUPTED:
            raise SystemExit(code) from None
        if rank:
            time.sleep(ALONE_SECONDS)
            line = f"process {rank}: {line}"
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            told = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(report).write_text(json.dumps({"message": told}), encoding="utf-8")
    print(line, file=sys.stderr, flush=True)
    raise SystemExit(code) from None
