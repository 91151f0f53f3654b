"""The texts of the commands, and the model cards that they take along."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from optimum_mla.calibrate import BUILT_IN_TEXT, built_in_windows, with_repeats
from optimum_mla.calibrate.recall import DEFAULT_REPEATS
from optimum_mla.calibrate.text import text_beginning, token_windows, window_length
from optimum_mla.calibrate.windows import check_ids, check_tokens, split_for_report, windows_to_read
from optimum_mla.core.number_checks import check_count
from optimum_mla.report.cards import name_without_folders, rename_card
from optimum_mla.report.schema import CodecReport, ConversionReport, RecoveryReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextOptions:
    """Texts to work with.

    Attributes:
        calibration_data: What `optimum_mla.io.documents.read_documents` reads, token ids, or None.
        statistics: A folder that `mla-calibrate` wrote, in place of `calibration_data`, or None.
        uncalibrated: Whether to convert without calibration if both are None. Otherwise a text that comes with the
            package is taken.
        chat_template: The calibration data are chats, to be rendered by the tokenizer's chat template.
        calibration_samples: Windows of calibration text.
        calibration_length: Tokens per window; None takes the shorter of 512 and the model's longest context.
        calibration_repeats: Number of windows of which one repeats itself, so that copying counts; 0 for none.
        eval_data: Text for the perplexity before and after, or None.
        eval_samples: At most so many windows of it.
        eval_length: Tokens per window of it; None as for `calibration_length`.
    """

    calibration_data: str | Iterable[int] | None = None
    statistics: str | None = None
    uncalibrated: bool = False
    chat_template: bool = False
    calibration_samples: int = 128
    calibration_length: int | None = None
    calibration_repeats: int = DEFAULT_REPEATS
    eval_data: str | None = None
    eval_samples: int = 128
    eval_length: int | None = None

    @property
    def need_tokenizer(self) -> bool:
        """Return whether anything is to be read that is not token ids."""
        return isinstance(self.calibration_data, str | Path) or self.eval_data is not None

    def or_built_in(self) -> TextOptions:
        """Return these texts with the built-in one as calibration data if none are given."""
        return self if self.calibration_data is not None else replace(self, calibration_data=str(BUILT_IN_TEXT))


NO_TEXTS = TextOptions()


def read_texts(
    tokenizer: Any, config: PreTrainedConfig, texts: TextOptions
) -> tuple[Tensor | None, Tensor | None, dict[str, dict[str, Any]]]:
    """Return the calibration windows, the evaluation windows (None where there are none), and their origins.

    Without an evaluation text, some windows of the calibration text are left to the evaluation, if there are enough.

    Raises:
        InvalidValueError: The number of windows or their length is not possible.
        CalibrationDataError: A text is missing, malformed or shorter than one window.
    """
    check_count("calibration_repeats", texts.calibration_repeats, 0)
    lengths = {}
    for kind, samples, length in (
        ("calibration", texts.calibration_samples, texts.calibration_length),
        ("eval", texts.eval_samples, texts.eval_length),
    ):
        check_count(f"{kind}_samples", samples)
        lengths[kind] = window_length(config, length, f"{kind}_length")
    calibration = evaluation = None
    data: dict[str, dict[str, Any]] = {}
    if texts.eval_data is not None:
        evaluation = _windows(tokenizer, texts.eval_data, lengths["eval"], texts.eval_samples, "eval-data")
        check_ids(evaluation, config.get_text_config().vocab_size, "eval-data")
        data["eval-data"] = text_origin(texts.eval_data, evaluation)
    source = texts.calibration_data
    if source is not None:
        samples = texts.calibration_samples
        asked = samples if evaluation is not None else windows_to_read(samples)
        calibration = _windows(
            tokenizer, source, lengths["calibration"], asked, "calibration-data", texts.chat_template
        )
        check_tokens(calibration, config.get_text_config().vocab_size, "calibration-data")
        if evaluation is None:
            calibration, evaluation = split_for_report(calibration, samples)
            if evaluation is not None:
                data["held-back"] = text_origin(source, evaluation)
        start = 0 if tokenizer is None else len(text_beginning(tokenizer))
        calibration = with_repeats(calibration, texts.calibration_repeats, start)
        data["calibration-data"] = {**text_origin(source, calibration), "repeats": texts.calibration_repeats}
    return calibration, evaluation, data


def _windows(tokenizer: Any, source: Any, length: int, samples: int, field: str, chats: bool = False) -> Tensor:
    """Return windows of token ids [N, length] of a text that the user named, or of the built-in one."""
    if source == str(BUILT_IN_TEXT):
        return built_in_windows(tokenizer, length, samples)
    return token_windows(tokenizer, source, length, samples, field, chats)


def text_origin(source: Any, windows: Tensor) -> dict[str, Any]:
    """Return what a report says of the windows [N, L] of a text."""
    name = str(source) if isinstance(source, str | Path) else "token ids"
    return {
        "source": "built-in" if name == str(BUILT_IN_TEXT) else name,
        "windows": len(windows),
        "tokens_per_window": windows.shape[1],
        "sha256": hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest(),
    }


def carried_card(model: str, partial: Path, name: str) -> str:
    """Take the reports along that lie in a model's folder, and return its model card under another name."""
    source = Path(model)
    for report in (ConversionReport.file_name, CodecReport.file_name, RecoveryReport.file_name):
        if (source / report).is_file():
            shutil.copy(source / report, partial)
    card = source / "README.md"
    if not card.is_file():
        return f"# {name}\n\nMade from `{name_without_folders(model)}`.\n"
    try:
        text = card.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        logger.warning("warning: %s is not UTF-8 (byte %d); the copy marks what cannot be read.", card, error.start)
        text = card.read_text(encoding="utf-8", errors="replace")
    return rename_card(text, name)
