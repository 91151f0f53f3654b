"""`mla-convert`: load, transform, measure, write."""

from __future__ import annotations

import difflib
import inspect
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_mla.errors import InvalidValueError, OptionError
from optimum_mla.io.folder import atomic_folder, check_output
from optimum_mla.measure.quality_limit import quality_warning
from optimum_mla.measure.verify import reference_logits, verify
from optimum_mla.models.base import model_geometry
from optimum_mla.models.deepseek import check_exportable
from optimum_mla.pipeline.exporting import ENGINE_OPTIONS, check_format, exported_model
from optimum_mla.pipeline.loading import (
    NO_TEXTS,
    TextOptions,
    check_dtype,
    load_model,
    load_source_config,
    load_tokenizer,
    read_texts,
)
from optimum_mla.pipeline.origin import origin_fields
from optimum_mla.report.memory import measured_cache_bytes_per_token, peak_memory_bytes
from optimum_mla.report.quality import perplexity
from optimum_mla.report.render import export_card, model_card
from optimum_mla.report.schema import ConversionReport, LayerReport
from optimum_mla.transforms.base import MLATransformation
from optimum_mla.transforms.calibration import deciding_windows
from optimum_mla.transforms.checks import check_convertible
from optimum_mla.transforms.registry import transform_class

RANK_OPTIONS = {"kv_lora_rank", "kv_cache_ratio", "energy", "d_kv"}
DEFAULT_CACHE_RATIO = 0.5
CACHE_PROBE_TOKENS = 16
"""Tokens that the live cache is filled with to weigh it."""


def convert(
    model: str,
    output: str | Path,
    method: str = "gqa2mla",
    options: dict[str, Any] | None = None,
    texts: TextOptions = NO_TEXTS,
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    hub: dict[str, Any] | None = None,
    export_format: str | None = None,
) -> ConversionReport:
    """Convert a checkpoint and write the result with its model card and `conversion_report.json`.

    Args:
        model: A hub id or a folder.
        output: Folder to write; it appears only when whole.
        method: One of `available_transforms()`.
        options: Keyword arguments of the method; without any rank among them, `kv_cache_ratio` is 0.5.
        texts: Calibration and evaluation texts.
        dtype: `auto` (the checkpoint's own), `float32`, `bfloat16` or `float16`; for the work and the result.
        device: Torch device; None takes CUDA where it is available.
        seed: For whatever draws random numbers.
        overwrite: Replace `output` if it is a model folder.
        hub: `revision`, `cache_dir`, `token`, `trust_remote_code` for loading.
        export_format: Write the result as `mla-export` does (`deepseek_v3`); options that this needs are then added.

    Raises:
        MLAError: Bad input of any kind; `output` is as it was.
    """
    torch.manual_seed(seed)
    hub = {name: value for name, value in (hub or {}).items() if value is not None}
    check_dtype(dtype)
    inputs = {"model": model, "calibration-data": texts.calibration_data, "eval-data": texts.eval_data}
    folder = check_output(output, inputs, overwrite)
    config = load_source_config(model, hub)
    origin: dict[str, Any] = origin_fields(model, hub)
    options = {name: value for name, value in (options or {}).items() if value is not None}
    if export_format is not None:
        check_format(export_format)
        if method == "gqa2mla" and texts.calibration_data is None:
            remedy = "Give calibration data, or take --method x-ecomla."
            raise InvalidValueError("export_format", export_format, "None for gqa2mla without calibration data", remedy)
        options = {**ENGINE_OPTIONS.get(method, {}), **options}
    if not options.keys() & RANK_OPTIONS:
        options["kv_cache_ratio"] = DEFAULT_CACHE_RATIO

    tokenizer = load_tokenizer(
        model, hub, needed=isinstance(texts.calibration_data, str) or texts.eval_data is not None
    )
    calibration, evaluation, data = read_texts(tokenizer, config, texts)
    transformation = build_transformation(method, options, calibration)
    planned = transformation.check(config)
    if export_format is not None:
        check_exportable(planned, pad=True)

    source = load_model(model, config, dtype, device, hub)
    check_convertible(source)
    probe = torch.zeros(1, CACHE_PROBE_TOKENS, dtype=torch.long)
    source_bytes = measured_cache_bytes_per_token(source, probe)
    windows, text = evaluation, "evaluation"
    if windows is None and calibration is not None:
        windows, text = deciding_windows(calibration), "held-back calibration"
    before = None if windows is None else perplexity(source, windows)
    reference = reference_logits(source) if transformation.preserves_computation else None
    start = time.perf_counter()
    converted: Any = transformation(source)
    seconds = time.perf_counter() - start
    verification = verify(converted, reference)
    cache_bytes = measured_cache_bytes_per_token(converted, probe)
    after = None if windows is None else perplexity(converted, windows)

    geometry = model_geometry(converted.spec, converted.config)
    itemsize = converted.dtype.itemsize
    report = ConversionReport(
        model=model,
        method=method,
        options=transformation.options,
        data=data,
        cache_numbers_per_token_per_layer=geometry.cache_numbers / len(geometry.layers),
        cache_bytes_per_token=cache_bytes,
        source_cache_bytes_per_token=source_bytes,
        predicted_cache_bytes_per_token=geometry.cache_bytes(bits=8 * itemsize),
        cache_percent_of_source=100 * cache_bytes / source_bytes,
        parameters_added=geometry.parameters_added,
        perplexity_before=before,
        perplexity_after=after,
        conversion_seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        dtype=str(converted.dtype).removeprefix("torch."),
        seed=seed,
        layers=[_layer_report(layer, result) for layer, result in transformation.results.items()],
        perplexity_text=None if windows is None else text,
        quality_warning=quality_warning(before, after, text),
        verification=asdict(verification),
        **origin,
    )
    card = model_card(report, folder.name)
    if export_format is not None:
        converted, export_report = exported_model(model, converted, export_format, pad=True)
        card += export_card(export_report)
    weights = sum(p.numel() * p.element_size() for p in converted.parameters())
    with atomic_folder(folder, weights, overwrite) as partial:
        converted.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        report.write(partial)
        if export_format is not None:
            export_report.write(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return report


def build_transformation(method: str, options: dict[str, Any], calibration: Tensor | None) -> MLATransformation:
    """Return the transformation of a method.

    Raises:
        InvalidValueError: There is no such method, or the method refuses the value of an option.
        OptionError: The method does not have one of the options.
    """
    cls = transform_class(method)
    known = option_names(cls)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f" Did you mean {near[0]}?" if near else ""
            raise OptionError(
                f"{method} has no --{name.replace('_', '-')} option.{remedy} "
                f"Its options, as they are named in Python, are: {', '.join(known)}."
            )
    return cls(calibration=calibration, **options)


def option_names(method: type[MLATransformation]) -> list[str]:
    """Return the keyword arguments of a method's class, with those that it passes on to its base classes."""
    names: dict[str, None] = {}
    for base in method.__mro__:
        parameters = inspect.signature(base).parameters.values()
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names |= dict.fromkeys(one.name for one in parameters if one.kind in named)
        if all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters):
            break
    return [name for name in names if name != "calibration"]


def _layer_report(layer: int, result: Any) -> LayerReport:
    g = result.geometry
    return LayerReport(
        layer=layer,
        attention_form=g.attention_form,
        kv_lora_rank=g.kv_lora_rank,
        k_lora_rank=g.k_lora_rank,
        v_lora_rank=g.v_lora_rank,
        q_lora_rank=g.q_lora_rank,
        qk_rope_head_dim=g.qk_rope_head_dim,
        num_rope_heads=g.num_rope_heads,
        rope_cache=g.rope_cache if g.attention_form == "decoupled" else None,
        cache_numbers_per_token=g.cache_numbers,
        output_error=result.output_error,
        key_weight=result.key_weight,
        state_error=result.state_error,
        healed_error=result.healed_error,
        predicted_error=result.predicted_error,
    )
