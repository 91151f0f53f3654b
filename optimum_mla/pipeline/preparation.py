"""The request of a conversion, and all that `mla-convert` decides before it loads a model's weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from optimum_mla.calibrate import BUILT_IN_TEXT
from optimum_mla.calibrate.statistics_folder import CalibrationStatistics
from optimum_mla.calibrate.windows import deciding_windows
from optimum_mla.convert import Run
from optimum_mla.convert.record import Record, SharedRecord
from optimum_mla.convert.transformation import MLATransformation
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.number_checks import LARGEST_SEED, check_count
from optimum_mla.core.processes import Processes
from optimum_mla.export.checks import check_exportable
from optimum_mla.export.gguf_file import check_writable
from optimum_mla.methods.registry import transform_class
from optimum_mla.models.coded import without_codec
from optimum_mla.models.family_table import family_of
from optimum_mla.models.layers import model_geometry
from optimum_mla.models.wrappers import language_model, wrapper_of
from optimum_mla.pipeline.checkpoint import Checkpoint, check_dtype
from optimum_mla.pipeline.conversion_options import (
    build_transformation,
    calibrated_texts,
    check_calibration_is_used,
    default_size,
)
from optimum_mla.pipeline.exporting import check_method, check_planned, exportable_options
from optimum_mla.pipeline.loading import TextOptions, read_texts
from optimum_mla.pipeline.run_settings import RunSettings

RANK_OPTIONS = {"kv_lora_rank", "kv_cache_ratio", "kv_cache_budget", "energy", "d_kv"}
BUILT_IN_WINDOWS = 8
"""Largest number of windows of the built-in text on which an uncalibrated conversion without text is measured."""


class ConversionSettings(RunSettings, total=False):
    """How a conversion runs and what it writes. With `overwrite`, an unfinished conversion is thrown away too.

    Attributes:
        seed: For whatever draws random numbers.
        export_format: Write the result as `mla-export` does (`deepseek_v3`, `gguf`), with the options that this needs.
        resume: Go on with an interrupted conversion to `output`, which must have had the same options. It gives what an
            uninterrupted one gives.
        try_family: Describe a family that is not known by what its names suggest, if the model confirms it.
        codec_only: Under a budget of bytes, write the codec without the model's weights.
    """

    seed: int
    export_format: str | None
    resume: bool
    try_family: bool
    codec_only: bool


@dataclass(frozen=True)
class ConversionRequest:
    """A conversion as it was asked for, which the command, the function and the other processes share.

    Attributes:
        source: The model to convert.
        method: One of `available_transforms()`.
        options: Keyword arguments of the method.
        texts: Calibration and evaluation texts.
        dtype, device, overwrite: See `RunSettings`.
        seed, export_format, resume, try_family, codec_only: See `ConversionSettings`.
    """

    source: Checkpoint
    method: str
    options: dict[str, Any]
    texts: TextOptions
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0
    overwrite: bool = False
    export_format: str | None = None
    resume: bool = False
    try_family: bool = False
    codec_only: bool = False

    @classmethod
    def of(
        cls, model: str, method: str, options: dict[str, Any] | None, texts: TextOptions, settings: ConversionSettings
    ) -> ConversionRequest:
        """Return the request of a user, with all options that an export needs, and with a size of the cache.

        Raises:
            MLAError: The model cannot be read, or cannot be exported so.
        """
        options = {name: value for name, value in (options or {}).items() if value is not None}
        further = {name: value for name, value in settings.items() if name != "hub"}
        asked = cls(Checkpoint.of(model, settings.get("hub")), method, options, texts, **further)  # type: ignore[arg-type]
        if asked.export_format is not None:
            options = exportable_options(asked.export_format, method, options)
        if not options.keys() & RANK_OPTIONS:
            config = asked.source.source_config(asked.try_family, wrapped=True, quantized=True)
            options |= default_size(config, method, options, texts, asked.export_format is not None)
        return replace(asked, options=options)

    @property
    def coded(self) -> bool:
        """Return whether codes of old tokens are asked for, and the method has them."""
        return "kv_cache_budget" in self.options and transform_class(self.method).has_codes

    @property
    def inputs(self) -> dict[str, Any]:
        """Return what the conversion reads, by the name of the option, for the check that no output replaces it."""
        return {
            "model": self.source.location,
            "calibration-data": self.texts.calibration_data,
            "statistics": self.texts.statistics,
            "eval-data": self.texts.eval_data,
        }

    def check(self) -> None:
        """Refuse a seed or a dtype that does not exist, and set the seed.

        Raises:
            InvalidValueError: There is no such seed or dtype.
        """
        check_count("seed", self.seed, 0, LARGEST_SEED)
        torch.manual_seed(self.seed)
        check_dtype(self.dtype)


@dataclass(frozen=True)
class Preparation:
    """A conversion that can begin as soon as its model is loaded.

    Attributes:
        source: The model to convert.
        config: The config of the source model, or of the language model inside it.
        wrapper: The config of the source model if it is a wrapper around a language model, or None.
        origin: Where the source model is from, as fields of a report.
        tokenizer: Its tokenizer, or None.
        transformation: The transformation, with its calibration tokens or statistics.
        planned: The config that it will give.
        data: The origins of the texts, as in the report.
        windows: Token ids on which the perplexity is reported, or None.
        text: What these windows are.
        measured_on: Token ids that are run through both models for the perplexity alone, or None where it is that of
            the calibration windows.
    """

    source: Checkpoint
    config: PreTrainedConfig
    wrapper: PreTrainedConfig | None
    origin: dict[str, Any]
    tokenizer: Any
    transformation: MLATransformation
    planned: PreTrainedConfig
    data: dict[str, dict[str, Any]]
    windows: Tensor | None
    text: str
    measured_on: Tensor | None

    def load(self, dtype: str, device: str | None, offload: Path) -> tuple[PreTrainedModel, PreTrainedModel | None]:
        """Return the source model, and the wrapper that it is in, or None; see `Checkpoint.load`."""
        if self.wrapper is None:
            return without_codec(self.source.load(dtype, device, offload)), None
        whole = self.source.load(dtype, device, kind=AutoModelForImageTextToText)
        return language_model(whole), whole

    def run(self, source: PreTrainedModel, record: Record | None, processes: Processes) -> Run:
        """Return the run of the conversion.

        Args:
            source: The loaded source model.
            record: The record of the findings, which only the first process has.
            processes: The processes that share the work.
        """
        shared = SharedRecord(record or Record(), processes)
        evaluate = self.windows is not None
        return Run(self.transformation, source, shared, self.measured_on, evaluate, processes)


def prepare(asked: ConversionRequest) -> Preparation:
    """Read the texts and decide on the transformation.

    Raises:
        MLAError: Bad input of any kind.
    """
    asked.check()
    source, method, options, export_format = asked.source, asked.method, asked.options, asked.export_format
    whole = source.source_config(asked.try_family, wrapped=True)
    config = whole if wrapper_of(whole) is None else whole.text_config
    if export_format is not None and config is not whole:
        remedy = "Extract the language model as docs/families.md shows, and export that."
        raise InvalidValueError("export_format", export_format, "None for a model around a language model", remedy)
    origin: dict[str, Any] = source.origin()
    texts = calibrated_texts(asked.texts, method, options)
    given = texts.calibration_data is not None or texts.statistics is not None
    if export_format is not None and method == "gqa2mla" and not given:
        remedy = "Give calibration data, or take --method x-ecomla."
        raise InvalidValueError("export_format", export_format, "None for gqa2mla without calibration data", remedy)

    needed = isinstance(texts.calibration_data, str | Path) or texts.eval_data is not None
    tokenizer = source.tokenizer(needed)
    if export_format == "gguf":
        check_writable(config, tokenizer)
    statistics = None if texts.statistics is None else CalibrationStatistics.read(texts.statistics)
    unread = texts.calibration_data is None and texts.eval_data is None
    if tokenizer is not None and unread and statistics is None:
        texts = replace(texts, eval_data=str(BUILT_IN_TEXT), eval_samples=min(texts.eval_samples, BUILT_IN_WINDOWS))
    calibration, evaluation, data = read_texts(tokenizer, config, texts)
    if statistics is not None:
        data["calibration-data"] = {**statistics.data, "statistics": statistics.digest}
        if tokenizer is not None and unread:
            evaluation, left = left_by(statistics, tokenizer, config, texts)
            data |= left
    transformation = build_transformation(method, options, calibration if statistics is None else statistics)
    check_calibration_is_used(transformation, texts, method)
    planned = transformation.check(config)
    if export_format is not None:
        check_exportable(planned, pad=True)
        check_method(transformation)
        first = model_geometry(family_of(planned).spec, planned).layers[0]
        check_planned(export_format, planned, transformation.rotary_pairs(first))
    windows, text = evaluation, "evaluation"
    if texts.eval_data == str(BUILT_IN_TEXT) or (statistics is not None and unread):
        text = "built-in"
    elif texts.eval_data is None and evaluation is not None:
        text = "held-back calibration"
    elif evaluation is None and calibration is not None:
        windows, text = deciding_windows(calibration), "calibration"
    return Preparation(
        source=source,
        config=config,
        wrapper=None if config is whole else whole,
        origin=origin,
        tokenizer=tokenizer,
        transformation=transformation,
        planned=planned,
        data=data,
        windows=windows,
        text=text,
        measured_on=evaluation if transformation.needs_calibration else windows,
    )


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
