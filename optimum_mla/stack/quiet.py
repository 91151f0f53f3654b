"""Warnings and progress bars of the libraries, which would stand between the commands' own lines."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def quiet_libraries() -> None:
    """Hide the warnings of the libraries, and their progress bars if standard error is not a terminal."""
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore", FutureWarning)
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
    if int(os.environ.get("RANK", 0)):
        logging.getLogger("optimum_mla").setLevel(logging.ERROR)  # The first process says the same.
