"""The request of a conversion, and all that `mla-convert` decides before it loads a model's weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from optimum_mla.convert import Run
from optimum_mla.convert.record import Record, SharedRecord
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.number_checks import LARGEST_SEED, check_count
from optimum_mla.core.processes import Processes
from optimum_mla.export.gguf_file import check_writable
from optimum_mla.methods.registry import transform_class
from optimum_mla.models.coded import without_codec
from optimum_mla.models.wrappers import language_model, wrapper_of
from optimum_mla.pipeline.checkpoint import Checkpoint
from optimum_mla.pipeline.conversion_options import (
    build_transformation,
    check_calibration_is_used,
    default_size,
)
from optimum_mla.pipeline.conversion_texts import ConversionTexts, calibrated_texts
from optimum_mla.pipeline.exporting import check_conversion, exportable_options
from optimum_mla.pipeline.loading import TextOptions
from optimum_mla.pipeline.placement import check_dtype
from optimum_mla.pipeline.run_settings import RunSettings

RANK_OPTIONS = {"kv_lora_rank", "kv_cache_ratio", "kv_cache_budget", "energy", "d_kv"}


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

    def check_export(self, wrapped: bool, calibrated: bool) -> None:
        """Refuse what cannot be exported, whatever its shapes.

        Raises:
            InvalidValueError: The source model is a wrapper around a language model, or gqa2mla is not calibrated.
        """
        if self.export_format is None:
            return
        if wrapped:
            allowed = "None for a model around a language model"
            remedy = "Extract the language model as docs/families.md shows, and export that."
            raise InvalidValueError("export_format", self.export_format, allowed, remedy)
        if self.method == "gqa2mla" and not calibrated:
            allowed = "None for gqa2mla without calibration data"
            remedy = "Give calibration data, or take --method x-ecomla."
            raise InvalidValueError("export_format", self.export_format, allowed, remedy)


class Preparation:
    """A conversion of weights that can begin as soon as its model is loaded.

    Args:
        asked: The request.

    Attributes:
        config: The config of the source model, or of the language model inside it.
        wrapped: Whether the source model is a wrapper around a language model.
        tokenizer: Its tokenizer, or None.
        texts: Its texts.
        transformation: The transformation, with its calibration tokens or statistics.
        planned: The config that it will give.

    Raises:
        MLAError: Bad input of any kind.
    """

    def __init__(self, asked: ConversionRequest) -> None:
        self.asked = asked
        asked.check()
        whole = asked.source.source_config(asked.try_family, wrapped=True)
        self.wrapped = wrapper_of(whole) is not None
        self.config = whole.text_config if self.wrapped else whole
        texts = calibrated_texts(asked.texts, asked.method, asked.options)
        asked.check_export(self.wrapped, texts.calibration_data is not None or texts.statistics is not None)
        self.tokenizer = asked.source.tokenizer(texts.need_tokenizer)
        if asked.export_format == "gguf":
            check_writable(self.config, self.tokenizer)
        self.texts = ConversionTexts.read(texts, self.tokenizer, self.config)
        self.transformation = build_transformation(asked.method, asked.options, self.texts.calibration)
        check_calibration_is_used(self.transformation, texts, asked.method)
        self.planned = self.transformation.check(self.config)
        if asked.export_format is not None:
            check_conversion(asked.export_format, self.transformation, self.planned)

    def load(self, offload: Path) -> tuple[PreTrainedModel, PreTrainedModel | None]:
        """Return the source model, and the wrapper that it is in, or None; see `Checkpoint.load`."""
        asked = self.asked
        if not self.wrapped:
            return without_codec(asked.source.load(asked.dtype, asked.device, offload)), None
        whole = asked.source.load(asked.dtype, asked.device, kind=AutoModelForImageTextToText)
        return language_model(whole), whole

    def run(self, source: PreTrainedModel, record: Record | None, processes: Processes) -> Run:
        """Return the run of the conversion of the loaded source, whose findings only the first process records."""
        # The perplexity on windows of the calibration text comes with the walk through them.
        windows = self.texts.evaluation if self.transformation.needs_calibration else self.texts.windows
        shared = SharedRecord(record or Record(), processes)
        return Run(self.transformation, source, shared, windows, self.texts.windows is not None, processes)
