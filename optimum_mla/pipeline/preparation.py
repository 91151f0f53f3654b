"""All that `mla-convert` decides before it loads a model's weights."""

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
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.number_checks import LARGEST_SEED, check_count
from optimum_mla.core.processes import Processes
from optimum_mla.export.checks import check_exportable
from optimum_mla.export.gguf_file import check_writable
from optimum_mla.methods.base import MLATransformation
from optimum_mla.methods.registry import transform_class
from optimum_mla.models.coded import without_codec
from optimum_mla.models.family_table import family_of
from optimum_mla.models.layers import model_geometry
from optimum_mla.models.wrappers import language_model, wrapper_of
from optimum_mla.pipeline.conversion_options import (
    build_transformation,
    calibrated_texts,
    check_calibration_is_used,
    default_size,
)
from optimum_mla.pipeline.exporting import check_method, check_planned, exportable_options
from optimum_mla.pipeline.loading import (
    TextOptions,
    check_dtype,
    load_model,
    load_source_config,
    load_tokenizer,
    read_texts,
)
from optimum_mla.pipeline.origin import origin_fields

RANK_OPTIONS = {"kv_lora_rank", "kv_cache_ratio", "kv_cache_budget", "energy", "d_kv"}
BUILT_IN_WINDOWS = 8
"""Largest number of windows of the built-in text on which an uncalibrated conversion without text is measured."""


@dataclass(frozen=True)
class Preparation:
    """A conversion that can begin as soon as its model is loaded.

    Attributes:
        hub: Keyword arguments for loading from the hub.
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

    hub: dict[str, Any]
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

    def load(
        self, model: str, dtype: str, device: str | None, offload: Path
    ) -> tuple[PreTrainedModel, PreTrainedModel | None]:
        """Return the source model, and the wrapper that it is in, or None; the arguments are those of `load_model`."""
        if self.wrapper is None:
            return without_codec(load_model(model, self.config, dtype, device, self.hub, offload)), None
        whole = load_model(model, self.wrapper, dtype, device, self.hub, kind=AutoModelForImageTextToText)
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


def sized(
    model: str,
    method: str,
    options: dict[str, Any] | None,
    texts: TextOptions,
    hub: dict[str, Any] | None,
    export_format: str | None,
    try_family: bool,
) -> dict[str, Any]:
    """Return the options of a method with all that an export needs, and with a size of the cache.

    The arguments are those of `convert`.

    Raises:
        MLAError: The model cannot be read, or cannot be exported so.
    """
    options = {name: value for name, value in (options or {}).items() if value is not None}
    if export_format is not None:
        options = exportable_options(export_format, method, options)
    if options.keys() & RANK_OPTIONS:
        return options
    hub = {name: value for name, value in (hub or {}).items() if value is not None}
    config = load_source_config(model, hub, try_family, wrapped=True, quantized=True)
    return options | default_size(config, method, options, texts, export_format is not None)


def is_coded(method: str, options: dict[str, Any]) -> bool:
    """Return whether options ask for codes of old tokens, and the method has them."""
    return "kv_cache_budget" in options and transform_class(method).has_codes


def prepare(
    model: str,
    method: str,
    options: dict[str, Any],
    texts: TextOptions,
    dtype: str,
    hub: dict[str, Any] | None,
    export_format: str | None,
    seed: int,
    try_family: bool,
) -> Preparation:
    """Read the texts and decide on the transformation; the arguments are those of `convert`, the options sized.

    Raises:
        MLAError: Bad input of any kind.
    """
    check_count("seed", seed, 0, LARGEST_SEED)
    torch.manual_seed(seed)
    hub = {name: value for name, value in (hub or {}).items() if value is not None}
    check_dtype(dtype)
    whole = load_source_config(model, hub, try_family, wrapped=True)
    config = whole if wrapper_of(whole) is None else whole.text_config
    if export_format is not None and config is not whole:
        remedy = "Extract the language model as docs/families.md shows, and export that."
        raise InvalidValueError("export_format", export_format, "None for a model around a language model", remedy)
    origin: dict[str, Any] = origin_fields(model, hub)
    texts = calibrated_texts(texts, method, options)
    given = texts.calibration_data is not None or texts.statistics is not None
    if export_format is not None and method == "gqa2mla" and not given:
        remedy = "Give calibration data, or take --method x-ecomla."
        raise InvalidValueError("export_format", export_format, "None for gqa2mla without calibration data", remedy)

    tokenizer = load_tokenizer(
        model, hub, needed=isinstance(texts.calibration_data, str | Path) or texts.eval_data is not None
    )
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
        hub=hub,
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
