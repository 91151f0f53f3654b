"""Errors that a user can act on: the field, the value received, the values allowed, and what to do."""

from __future__ import annotations


class MLAError(Exception):
    """Base of every error that bad input causes. The command line prints it as one line and exits with code 2."""


class InvalidValueError(MLAError, ValueError):
    """A field holds a value that it cannot hold.

    Args:
        field: Name of the option or argument, as the user typed it (without dashes).
        received: The value that was given.
        allowed: What the field accepts here, in words (a range for this model, a list of names, ...).
        remedy: One imperative sentence that says what to do next; may be empty.
    """

    def __init__(self, field: str, received: object, allowed: str, remedy: str = "") -> None:
        self.field, self.received, self.allowed, self.remedy = field, received, allowed, remedy
        message = f"{field}: got {received!r}, allowed: {allowed}."
        super().__init__(f"{message} {remedy}" if remedy else message)


class OptionError(MLAError, ValueError):
    """An option that is needed is missing, or the command or method does not have the option that was given."""


class UnsupportedModelError(MLAError, ValueError):
    """The model cannot be converted: unknown family, already converted, quantized weights, or not a decoder LM."""


class UnsupportedStackError(MLAError, RuntimeError):
    """The installed release of Transformers names or builds things in a way that this package cannot read."""


class UnknownKeywordError(MLAError, TypeError):
    """A model or an attention was given a keyword argument that it would not use."""


class UnreadableModelError(UnsupportedModelError):
    """A file of the model is missing or broken, or a library does not take what is in it."""


class ReportError(MLAError, ValueError):
    """A report file is missing, or it is not a report that this version can read."""


class VerificationError(MLAError, RuntimeError):
    """A model that was about to be written does not do what it must; see `optimum_mla.measure.verify`."""


class CorruptWeightsError(MLAError, ValueError):
    """The checkpoint's weights are unusable (NaN or infinite values, missing tensors)."""


class CalibrationDataError(MLAError, ValueError):
    """A text or dataset is missing, empty, in a wrong encoding, or too short for one sample."""


class OutputError(MLAError, OSError):
    """The output folder exists, equals the input, or cannot be written."""


class TrainingError(MLAError, RuntimeError):
    """A training went wrong in a way that other settings may mend."""


class MissingDependencyError(MLAError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{package} is needed to {purpose}. Install it with: pip install 'optimum-mla[{extra}]'")


class UncalibratedWarning(UserWarning):
    """A conversion below full rank has no calibration data, so its result must be trained before it is of any use."""


NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "bad_alloc",
    "storage size calculation overflowed",
)
"""Words by which torch, its libraries and the system say that there is not as much memory."""


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or an error that caused it, means that there was not enough memory."""
    while error is not None:
        text = str(error).lower()
        named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")  # The latter is torch's.
        if named or any(words in text for words in NO_MEMORY):
            return True
        error = error.__cause__
    return False


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class where it has no message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
