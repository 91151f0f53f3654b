"""Checks of calibration windows, and their division: for fits, for choices, and for the figures of the report."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_mla.core.errors import CalibrationDataError, InvalidValueError

HELD_BACK = 4
"""At most one window of this many is held back from fits and used to compare candidates."""
DECIDING_WINDOWS = 16
"""Largest number of windows that are held back."""
REPORTED = 9
"""At least this many windows of a text stand for each one that is left to the report and calibrates nothing."""
REPORTED_WINDOWS = 16
"""Largest number of windows that are left to the report."""
LEAST_TOKENS = 8
"""Smallest number of different tokens in windows to calibrate on, or their length if they are shorter."""


def windows_to_read(samples: int) -> int:
    """Return how many windows a text must have, so that so many are calibration windows and the report has some too."""
    return samples + min(REPORTED_WINDOWS, max(1, samples // (REPORTED - 1)) if samples >= HELD_BACK else 0)


def split_for_report(windows: Tensor, samples: int) -> tuple[Tensor, Tensor | None]:
    """Divide the windows of a text, [N, L], into those that calibrate and those that only the report is made on.

    The latter are spread evenly over the text. Nothing is fitted or chosen on them.

    Args:
        windows: The windows of the text.
        samples: Largest number of calibration windows.

    Returns:
        The calibration windows, and those of the report; None in their place where fewer than `HELD_BACK` windows would
        be left for the calibration.
    """
    count = len(windows)
    if count <= HELD_BACK:
        return windows[:samples], None
    step = min(count, max(REPORTED, -(-count // REPORTED_WINDOWS)))
    left = torch.zeros(count, dtype=torch.bool)
    left[step - 1 :: step] = True
    return windows[~left][:samples], windows[left]


def deciding(count: int) -> Tensor:
    """Return the indices of the windows that are held back, on which candidates are compared; all, if there are few.

    They are spread evenly over the `count` windows.
    """
    if count < HELD_BACK:
        return torch.arange(count)
    step = max(HELD_BACK, -(-count // DECIDING_WINDOWS))
    return torch.arange(step - 1, count, step)


def fitted(count: int) -> Tensor:
    """Return the indices of the windows that fits and moments see: those not held back, or all if there are few."""
    if count < HELD_BACK:
        return torch.arange(count)
    seen = torch.ones(count, dtype=torch.bool)
    seen[deciding(count)] = False
    return seen.nonzero().flatten()


def deciding_windows(windows: Tensor) -> Tensor:
    """Return those calibration windows [N, L] on which candidates and whole conversions are compared."""
    return windows[deciding(len(windows))]


def check_tokens(tokens: Tensor, vocabulary: int, field: str = "calibration") -> None:
    """Refuse calibration windows that nothing can be measured on.

    Args:
        tokens: The windows, [N, L].
        vocabulary: Number of tokens of the model's vocabulary.
        field: Name of the option that gave them, for the error message.

    Raises:
        InvalidValueError: They are not token ids of the vocabulary.
        CalibrationDataError: Nearly all tokens, or all windows, are the same.
    """
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.numel() == 0:
        received = f"a {tokens.dtype} tensor of shape {list(tokens.shape)}"
        raise InvalidValueError(field, received, "token ids of shape [windows, tokens]")
    check_ids(tokens, vocabulary, field)
    count, length = tokens.shape
    different = len(tokens.unique())
    ordinary = "Give ordinary text like what the model will read."
    if different < min(LEAST_TOKENS, length):
        told = "one token over and over" if different == 1 else f"{different} different tokens"
        raise CalibrationDataError(f"{field}: the {count} windows of {length} tokens hold only {told}. {ordinary}")
    if count > 1 and bool((tokens == tokens[0]).all()):
        raise CalibrationDataError(f"{field}: all {count} windows of {length} tokens are the same. {ordinary}")


def check_ids(tokens: Tensor, vocabulary: int, field: str) -> None:
    """Refuse token ids that a model has no embedding for.

    Args:
        tokens: The ids, of any shape, of which there is one at least.
        vocabulary: Number of tokens of the model's vocabulary.
        field: Name of the option that gave them, for the error message.

    Raises:
        InvalidValueError: They are not token ids of the vocabulary.
    """
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise InvalidValueError(
            field, f"ids {low} to {high}", f"0 to {vocabulary - 1}", "Use the model's own tokenizer."
        )
