"""A record of the time and memory that conversions on this machine took, beside what was predicted for them."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import constants

logger = logging.getLogger(__name__)

SHOWN = 10
"""Number of the latest conversions whose predictions are compared with what they took."""


@dataclass(frozen=True)
class Outcome:
    """A conversion that was predicted and then made.

    Attributes:
        model: The model, as the user named it.
        method: The method.
        predicted_seconds, seconds: The time that was predicted and the time that it took.
        predicted_bytes, peak_bytes: The memory that was predicted and the highest resident memory.
    """

    model: str
    method: str
    predicted_seconds: float
    seconds: float
    predicted_bytes: int
    peak_bytes: int


def history_file() -> Path:
    """Return the file of outcomes, a line of JSON each, in the folder where Hugging Face libraries keep their data."""
    return Path(constants.HF_HOME) / "optimum_mla" / "conversions.jsonl"


def remember(outcome: Outcome) -> None:
    """Add an outcome to the file. A file that cannot be written is passed over, because conversions do not need it."""
    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome), default=str) + "\n")
    except OSError as error:
        logger.info("the outcome of the conversion was not kept: %s", error)


def outcomes() -> list[Outcome]:
    """Return the latest outcomes, oldest first, without lines that are damaged or that another version wrote."""
    try:
        lines = history_file().read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines[-SHOWN:]:
        try:
            found.append(Outcome(**json.loads(line)))
        except (TypeError, ValueError):
            continue
    return found


def accuracy(found: list[Outcome]) -> str | None:
    """Return a sentence that says how good the predictions of earlier conversions were, or None without any.

    Args:
        found: The outcomes.
    """
    if not found:
        return None
    times = sorted(one.seconds / one.predicted_seconds for one in found)
    memory = sorted(one.peak_bytes / one.predicted_bytes for one in found)
    which = "The last conversion" if len(found) == 1 else f"The last {len(found)} conversions"
    return f"{which} here took {_span(times)} times the predicted time and {_span(memory)} times the predicted memory."


def _span(ratios: list[float]) -> str:
    low, high = f"{ratios[0]:.2g}", f"{ratios[-1]:.2g}"
    return low if low == high else f"{low} to {high}"
