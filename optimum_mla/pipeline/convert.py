"""`mla-convert`: load, transform, measure, write."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_mla.calibrate import BUILT_IN_TEXT
from optimum_mla.calibrate.windows import HELD_BACK, deciding_windows
from optimum_mla.convert import Run
from optimum_mla.core.errors import InvalidValueError, OptionError
from optimum_mla.core.suggestions import did_you_mean
from optimum_mla.export.checks import check_exportable
from optimum_mla.io.claim import claims_output
from optimum_mla.io.folder import atomic_folder, check_output
from optimum_mla.measure.memory import measured_cache_bytes_per_token
from optimum_mla.measure.quality import TOKENS_PER_BATCH, perplexity
from optimum_mla.measure.sample import Sample, continuation, sample_prompt
from optimum_mla.measure.stages import Stages
from optimum_mla.measure.verify import reference_logits, verify
from optimum_mla.methods.base import MLATransformation
from optimum_mla.methods.registry import transform_class
from optimum_mla.methods.signature import whole_signature
from optimum_mla.models.checks import check_convertible
from optimum_mla.models.layers import model_geometry
from optimum_mla.models.registry import family_of
from optimum_mla.pipeline.estimate import conversion_memory, conversion_seconds, duration
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
from optimum_mla.pipeline.origin import origin_fields, source_metadata
from optimum_mla.plan.budget import DEFAULT_CACHE_RATIO
from optimum_mla.report.break_even import break_even_tokens
from optimum_mla.report.cards import export_card, model_card, with_section
from optimum_mla.report.pages import size
from optimum_mla.report.quality_limit import quality_warning
from optimum_mla.report.schema import ConversionReport, LayerReport

RANK_OPTIONS = {"kv_lora_rank", "kv_cache_ratio", "energy", "d_kv"}
CACHE_PROBE_TOKENS = 16
"""Tokens that the live cache is filled with to weigh it."""
BUILT_IN_WINDOWS = 8
"""Largest number of windows of the built-in text on which an uncalibrated conversion without text is measured."""
SMALL_CACHE_RATIO = 0.1
"""Share of the source's cache below which a conversion is announced with a warning."""


@claims_output
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
    announce: Callable[[str], None] | None = None,
) -> ConversionReport:
    """Convert a checkpoint and write the result with its model card and `conversion_report.json`.

    Args:
        model: A hub id or a folder.
        output: Folder to write; it appears only when whole.
        method: One of `available_transforms()`.
        options: Keyword arguments of the method; without any rank among them, `kv_cache_ratio` is 0.5.
        texts: Calibration and evaluation texts. Without calibration data, a text that comes with the package is taken.
        dtype: `auto` (the checkpoint's own), `float32`, `bfloat16` or `float16`; for the work and the result.
        device: Torch device; None takes CUDA where it is available.
        seed: For whatever draws random numbers.
        overwrite: Replace `output` if it is a model folder.
        hub: `revision`, `cache_dir`, `token`, `trust_remote_code` for loading.
        export_format: Write the result as `mla-export` does (`deepseek_v3`); options that this needs are then added.
        announce: Called with a few lines that say what will be done and how long it should take, before it starts.

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
        options = {**ENGINE_OPTIONS.get(method, {}), **options}
    if not options.keys() & RANK_OPTIONS:
        options["kv_cache_ratio"] = DEFAULT_CACHE_RATIO
    texts = calibrated_texts(texts, method, options)
    if export_format is not None and method == "gqa2mla" and texts.calibration_data is None:
        remedy = "Give calibration data, or take --method x-ecomla."
        raise InvalidValueError("export_format", export_format, "None for gqa2mla without calibration data", remedy)

    stages = Stages()
    tokenizer = load_tokenizer(
        model, hub, needed=isinstance(texts.calibration_data, str | Path) or texts.eval_data is not None
    )
    if tokenizer is not None and texts.calibration_data is None and texts.eval_data is None:
        texts = replace(texts, eval_data=str(BUILT_IN_TEXT), eval_samples=min(texts.eval_samples, BUILT_IN_WINDOWS))
    calibration, evaluation, data = read_texts(tokenizer, config, texts)
    transformation = build_transformation(method, options, calibration)
    check_calibration_is_used(transformation, texts, method)
    planned = transformation.check(config)
    if export_format is not None:
        check_exportable(planned, pad=True)

    with stages.stage("load"):
        source = load_model(model, config, dtype, device, hub)
    check_convertible(source)
    windows, text = evaluation, "evaluation" if texts.eval_data != str(BUILT_IN_TEXT) else "built-in"
    if windows is None and calibration is not None:
        windows, text = deciding_windows(calibration), "held-back calibration"
    if announce is not None:
        announce(announcement(model, source, transformation, planned, windows, data))
    probe = torch.zeros(1, CACHE_PROBE_TOKENS, dtype=torch.long)
    source_bytes = measured_cache_bytes_per_token(source, probe)
    prompt = None if tokenizer is None else sample_prompt(tokenizer)
    with stages.stage("measure the source"):
        before = None if windows is None else perplexity(source, windows)
        said = None if prompt is None else continuation(source, tokenizer, prompt[1])
    reference = reference_logits(source) if transformation.preserves_computation else None
    run = Run(transformation, source)
    start = time.perf_counter()
    with stages.stage("convert"):
        converted: Any = run.convert()
    seconds = time.perf_counter() - start
    with stages.stage("verify"):
        verification = verify(converted, reference)
    cache_bytes = measured_cache_bytes_per_token(converted, probe)
    with stages.stage("measure the result"):
        after = None if windows is None else perplexity(converted, windows)
        says = None if prompt is None else continuation(converted, tokenizer, prompt[1])

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
        peak_memory_bytes=stages.peak(),
        dtype=str(converted.dtype).removeprefix("torch."),
        seed=seed,
        layers=[_layer_report(layer, result) for layer, result in run.results.items()],
        perplexity_text=None if windows is None else text,
        quality_warning=quality_warning(before, after, text),
        verification=asdict(verification),
        break_even_tokens=break_even_tokens(geometry.parameters_added * itemsize, source_bytes - cache_bytes),
        sample=None if prompt is None else asdict(Sample(prompt[0], str(said), str(says))),
        stages=stages.done,
        **origin,
    )
    card = model_card(report, folder.name, source_metadata(model, hub))
    if export_format is not None:
        converted, export_report = exported_model(model, converted, export_format, pad=True)
        card = with_section(card, export_card(export_report))
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


def calibrated_texts(texts: TextOptions, method: str, options: dict[str, Any]) -> TextOptions:
    """Return the texts with the built-in text as calibration data, where the user gave none and needs some.

    Args:
        texts: The texts that the user gave.
        method: Name of the method.
        options: Keyword arguments of the method.

    Raises:
        OptionError: Options about calibration data contradict each other.
        InvalidValueError: There is no such method.
    """
    if texts.calibration_data is not None:
        if texts.uncalibrated:
            raise OptionError("--uncalibrated and --calibration-data exclude each other. Give one of them.")
        return texts
    if texts.chat_template:
        raise OptionError("--chat-template is about calibration data. Give chats with --calibration-data.")
    if texts.uncalibrated or _preserves_computation(method, options):
        return texts
    return replace(texts, calibration_data=str(BUILT_IN_TEXT))


def _preserves_computation(method: str, options: dict[str, Any]) -> bool:
    """Return whether a conversion without calibration data computes what its source does."""
    try:
        return build_transformation(method, options, None).preserves_computation
    except InvalidValueError:
        return False  # Some options need calibration data. Any other fault is found again later.


def check_calibration_is_used(transformation: MLATransformation, texts: TextOptions, method: str) -> None:
    """Refuse a lossy conversion whose options leave the calibration data unused, unless the user asked for that.

    Raises:
        OptionError: The calibration data would not be used.
    """
    if texts.calibration_data is None or transformation.needs_calibration:
        return
    raise OptionError(
        f"{method} with the factorization {transformation.factorization} uses no calibration data, and its result is "
        "of no use until it is trained. Give --uncalibrated without --calibration-data if you will train it, or leave "
        "out --factorization."
    )


def announcement(
    model: str,
    source: PreTrainedModel,
    transformation: MLATransformation,
    planned: Any,
    windows: Tensor | None,
    data: dict[str, dict[str, Any]],
) -> str:
    """Return a few lines that say what a conversion will do, and about how long and with how much memory.

    Args:
        model: Name of the model.
        source: The loaded source model.
        transformation: The transformation, with its calibration tokens.
        planned: The config that the conversion will give.
        windows: Token ids on which the perplexity is measured, or None.
        data: The origins of the texts, as in the report.
    """
    parameters = sum(p.numel() for p in source.parameters())
    geometry = model_geometry(family_of(planned).spec, planned)
    lines = [
        f"{model}: {len(geometry.layers)} layers, {parameters / 1e6:,.0f} M parameters, "
        f"{str(source.dtype).removeprefix('torch.')} on {source.device}",
        f"{transformation.name}: cache of about {100 * geometry.cache_ratio:.3g} % of the source's",
    ]
    text = data.get("calibration-data")
    if text is None:
        lines[-1] += ", without calibration"
        if not transformation.preserves_computation:
            lines.append("warning: without calibration the result is of no use until it is trained (mla-finetune).")
    else:
        named = "the built-in text" if text["source"] == "built-in" else text["source"]
        lines[-1] += f", calibrated on {text['windows']} windows of {text['tokens_per_window']} tokens of {named}"
        if text["source"] == "built-in":
            lines.append("Text like what the model will read is better: give it with --calibration-data.")
        if text["windows"] < HELD_BACK:
            lines.append(
                f"warning: fewer than {HELD_BACK} windows, so none is held back: choices are made on what was fitted."
            )
    if geometry.cache_ratio < SMALL_CACHE_RATIO:
        lines.append(
            f"warning: {100 * geometry.cache_ratio:.2g} % of the cache is less than models of today can do with; "
            "expect to train the result, or take --kv-cache-ratio 0.25 with mla-quantize --cache-bits 4 behind it."
        )
    calibration = transformation.calibration
    memory = conversion_memory(
        source.config,
        geometry,
        sum(p.numel() * p.element_size() for p in source.parameters()),
        0 if calibration is None else calibration.numel(),
        0 if windows is None else min(windows.numel(), TOKENS_PER_BATCH),
    )
    seconds = conversion_seconds(source, transformation, windows)
    return "\n".join([*lines, f"This should take {duration(seconds)} and {size(memory)} of memory.", ""])


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
            hint = did_you_mean(name, known)
            raise OptionError(
                f"{method} has no --{name.replace('_', '-')} option. {hint}{' ' if hint else ''}"
                f"Its options, as they are named in Python, are: {', '.join(known)}."
            )
    return cls(calibration=calibration, **options)


def option_names(method: type[MLATransformation]) -> list[str]:
    """Return the keyword arguments of a method's class, with those that it passes on to its base classes."""
    return [name for name in whole_signature(method).parameters if name != "calibration"]


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
