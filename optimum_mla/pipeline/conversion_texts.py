"""The texts of a conversion: what calibrates, and what the figures of the report are measured on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from optimum_mla.calibrate import BUILT_IN_TEXT
from optimum_mla.calibrate.statistics_folder import CalibrationStatistics
from optimum_mla.calibrate.windows import deciding_windows
from optimum_mla.core.errors import InvalidValueError, OptionError
from optimum_mla.pipeline.conversion_options import build_transformation
from optimum_mla.pipeline.loading import NO_TEXTS, TextOptions, read_texts

BUILT_IN_WINDOWS = 8
"""Largest number of windows of the built-in text on which an uncalibrated conversion without text is measured."""


@dataclass(frozen=True)
class ConversionTexts:
    """The texts of a conversion after they were read.

    Attributes:
        calibration: What calibrates: token ids, [N, L], statistics, or None.
        windows: Token ids, [N, L], on which the report's figures are measured, or None.
        named: What these windows are. Nothing is fitted to them unless this is `calibration`.
        data: The origins of the texts, as in the report.
    """

    calibration: Tensor | CalibrationStatistics | None
    windows: Tensor | None
    named: str
    data: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, texts: TextOptions, tokenizer: Any, config: PreTrainedConfig) -> ConversionTexts:
        """Read the texts that `calibrated_texts` returned.

        Without an evaluation text, the figures are measured on windows that are left of the calibration text, or else
        on the built-in text, or else on those windows of the calibration text on which candidates are compared.

        Raises:
            MLAError: See `read_texts`; or the statistics cannot be read.
        """
        statistics = None if texts.statistics is None else CalibrationStatistics.read(texts.statistics)
        unread = tokenizer is not None and texts.calibration_data is None and texts.eval_data is None
        if unread and statistics is None:
            texts = replace(texts, eval_data=str(BUILT_IN_TEXT), eval_samples=min(texts.eval_samples, BUILT_IN_WINDOWS))
        calibration, evaluation, data = read_texts(tokenizer, config, texts)
        if statistics is not None:
            data["calibration-data"] = {**statistics.data, "statistics": statistics.digest}
            if unread:
                evaluation, left = left_by(statistics, tokenizer, config, texts)
                data |= left
            return cls(statistics, evaluation, "built-in" if unread else "evaluation", data)
        if evaluation is None and calibration is not None:
            return cls(calibration, deciding_windows(calibration), "calibration", data)
        named = "held-back calibration" if texts.eval_data is None else "evaluation"
        return cls(calibration, evaluation, "built-in" if texts.eval_data == str(BUILT_IN_TEXT) else named, data)

    @property
    def evaluation(self) -> Tensor | None:
        """Return the windows if nothing is fitted to them, or None."""
        return None if self.named == "calibration" else self.windows


def calibrated_texts(texts: TextOptions, method: str, options: dict[str, Any]) -> TextOptions:
    """Return the texts with the built-in text as calibration data, where the user gave none and needs some.

    Raises:
        OptionError: Options about calibration data contradict each other.
        InvalidValueError: There is no such method.
    """
    about_windows = {
        f"--{name.replace('_', '-')}": getattr(texts, name) != getattr(NO_TEXTS, name)
        for name in ("calibration_samples", "calibration_length", "calibration_repeats")
    }
    given, chats = texts.calibration_data is not None, {"--chat-template": texts.chat_template}
    if texts.statistics is not None:
        data = {"--calibration-data": given, "--uncalibrated": texts.uncalibrated}
        exclude_each_other("--statistics", {**data, **chats, **about_windows})
        return texts
    if texts.uncalibrated:
        exclude_each_other("--uncalibrated", about_windows)
        if given:
            exclude_each_other("--calibration-data", {"--uncalibrated": True})
    if given:
        return texts
    if texts.chat_template:
        raise OptionError("--chat-template is about calibration data. Give chats with --calibration-data.")
    if texts.uncalibrated or _preserves_computation(method, options):
        return texts
    return texts.or_built_in()


def exclude_each_other(option: str, others: dict[str, bool]) -> None:
    """Refuse the first one of other options that was given beside an option.

    Raises:
        OptionError: One was given.
    """
    for other, given in others.items():
        if given:
            raise OptionError(f"{other} and {option} exclude each other. Give one of them.")


def _preserves_computation(method: str, options: dict[str, Any]) -> bool:
    """Return whether a conversion without calibration data computes what its source does."""
    try:
        return build_transformation(method, options, None).preserves_computation
    except InvalidValueError:
        return False  # Some options need calibration data. Any other fault is found again later.


def left_by(
    statistics: CalibrationStatistics, tokenizer: Any, config: PreTrainedConfig, texts: TextOptions
) -> tuple[Tensor | None, dict[str, dict[str, Any]]]:
    """Return the windows of the built-in text that stored statistics of it left to the report, and their origin."""
    seen = statistics.data
    text = replace(
        texts,
        calibration_data=str(BUILT_IN_TEXT),
        calibration_samples=max(seen["windows"], BUILT_IN_WINDOWS),
        calibration_length=seen["tokens_per_window"] if seen["source"] == "built-in" else None,
    )
    _, evaluation, data = read_texts(tokenizer, config, text)
    return evaluation, {name: origin for name, origin in data.items() if name == "held-back"}
