"""`mla-convert`: load, transform, measure, write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from optimum_mla.calibrate import BUILT_IN_TEXT
from optimum_mla.calibrate.statistics_folder import CalibrationStatistics
from optimum_mla.calibrate.windows import deciding_windows
from optimum_mla.convert import Run
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.export.checks import check_exportable
from optimum_mla.io.claim import claims_output
from optimum_mla.io.folder import atomic_folder, check_output, check_space
from optimum_mla.measure.memory import measured_cache_bytes_per_token
from optimum_mla.measure.quality import TOKENS_PER_BATCH
from optimum_mla.measure.sample import Sample, continuation, sample_prompt
from optimum_mla.measure.stages import Stages
from optimum_mla.measure.verify import reference_logits, verify
from optimum_mla.models.layer_source import reading_weights
from optimum_mla.models.layers import model_geometry
from optimum_mla.models.registry import family_of
from optimum_mla.pipeline.announcement import announcement
from optimum_mla.pipeline.conversion_options import (
    build_transformation,
    calibrated_texts,
    check_calibration_is_used,
    default_size,
)
from optimum_mla.pipeline.estimate import PROBE_TOKENS, conversion_memory, conversion_seconds, probe, work_of
from optimum_mla.pipeline.exporting import exportable_options, exported_model, write_export
from optimum_mla.pipeline.history import Outcome, remember
from optimum_mla.pipeline.loading import (
    NO_TEXTS,
    TextOptions,
    check_dtype,
    load_config,
    load_model,
    load_source_config,
    load_tokenizer,
    read_texts,
)
from optimum_mla.pipeline.origin import origin_fields, source_metadata
from optimum_mla.pipeline.unfinished import UnfinishedConversion, write_model
from optimum_mla.report.break_even import break_even_tokens
from optimum_mla.report.cards import export_card, model_card, with_section
from optimum_mla.report.quality_limit import quality_warning
from optimum_mla.report.schema import ConversionReport, LayerReport

RANK_OPTIONS = {"kv_lora_rank", "kv_cache_ratio", "kv_cache_budget", "energy", "d_kv"}
CACHE_PROBE_TOKENS = 64
"""Tokens that the live cache is filled with to weigh it."""
BUILT_IN_WINDOWS = 8
"""Largest number of windows of the built-in text on which an uncalibrated conversion without text is measured."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".json")
"""Files of a checkpoint by which an interrupted conversion tells its source from another."""


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
    resume: bool = False,
    announce: Callable[[str], None] | None = None,
    try_family: bool = False,
) -> ConversionReport:
    """Convert a checkpoint and write the result with its model card and `conversion_report.json`.

    Args:
        model: A hub id or a folder.
        output: Folder to write; it appears only when whole.
        method: One of `available_transforms()`.
        options: Keyword arguments of the method. Without any size among them, `kv_cache_budget` is 0.125 where latents
            can be coded, and `kv_cache_ratio` is 0.5 otherwise.
        texts: Calibration and evaluation texts. Without calibration data, a text that comes with the package is taken.
        dtype: `auto` (the checkpoint's own), `float32`, `bfloat16` or `float16`; for the work and the result.
        device: Torch device; None takes CUDA where it is available.
        seed: For whatever draws random numbers.
        overwrite: Replace `output` if it is a model folder, and throw an unfinished conversion to it away.
        hub: `revision`, `cache_dir`, `token`, `trust_remote_code` for loading.
        export_format: Write the result as `mla-export` does (`deepseek_v3`, `gguf`), with the options that this needs.
        resume: Go on with an interrupted conversion to `output`, which must have had the same options. It gives what an
            uninterrupted one gives.
        try_family: Describe a family that is not known by what its names suggest, if the model confirms it.
        announce: Called with a few lines that say what will be done and how long it should take, before it starts.

    Raises:
        MLAError: Bad input of any kind; `output` is as it was.
    """
    torch.manual_seed(seed)
    hub = {name: value for name, value in (hub or {}).items() if value is not None}
    check_dtype(dtype)
    inputs = {
        "model": model,
        "calibration-data": texts.calibration_data,
        "statistics": texts.statistics,
        "eval-data": texts.eval_data,
    }
    folder = check_output(output, inputs, overwrite)
    config = load_source_config(model, hub, try_family)
    origin: dict[str, Any] = origin_fields(model, hub)
    options = {name: value for name, value in (options or {}).items() if value is not None}
    if export_format is not None:
        options = exportable_options(export_format, method, options)
    if not options.keys() & RANK_OPTIONS:
        options |= default_size(config, method, options, texts, export_format is not None)
    texts = calibrated_texts(texts, method, options)
    given = texts.calibration_data is not None or texts.statistics is not None
    if export_format is not None and method == "gqa2mla" and not given:
        remedy = "Give calibration data, or take --method x-ecomla."
        raise InvalidValueError("export_format", export_format, "None for gqa2mla without calibration data", remedy)

    stages = Stages()
    tokenizer = load_tokenizer(
        model, hub, needed=isinstance(texts.calibration_data, str | Path) or texts.eval_data is not None
    )
    if tokenizer is not None and texts.calibration_data is None and texts.eval_data is None:
        texts = replace(texts, eval_data=str(BUILT_IN_TEXT), eval_samples=min(texts.eval_samples, BUILT_IN_WINDOWS))
    calibration, evaluation, data = read_texts(tokenizer, config, texts)
    statistics = None if texts.statistics is None else CalibrationStatistics.read(texts.statistics)
    if statistics is not None:
        data["calibration-data"] = {**statistics.data, "statistics": statistics.digest}
    transformation = build_transformation(method, options, calibration if statistics is None else statistics)
    check_calibration_is_used(transformation, texts, method)
    planned = transformation.check(config)
    if export_format is not None:
        check_exportable(planned, pad=True)
    windows, text = evaluation, "evaluation" if texts.eval_data != str(BUILT_IN_TEXT) else "built-in"
    if windows is None and calibration is not None:
        windows, text = deciding_windows(calibration), "held-back calibration"

    made_from = {
        **conversion_identity(model, hub),
        **{"method": method, "dtype": dtype, "device": device, "seed": seed},
        "calibration data (SHA-256)": data.get("calibration-data", {}).get("sha256"),
        "statistics (SHA-256)": data.get("calibration-data", {}).get("statistics"),
        **transformation.options,
    }
    with UnfinishedConversion(folder, made_from, resume, overwrite) as unfinished:
        with stages.stage("load"):
            source = load_model(model, config, dtype, device, hub, offload=unfinished.folder)
        check_space(folder, max(0, weight_bytes(source) - unfinished.bytes))
        measured_on = evaluation if transformation.needs_calibration else windows
        run = Run(transformation, source, unfinished, measured_on, evaluate=windows is not None)
        work = work_of(transformation, len(run.layers), measured_on)
        length = PROBE_TOKENS if calibration is None else calibration.shape[1]
        predicted_seconds = conversion_seconds(probe(config, source.device, length), work)
        predicted_bytes = conversion_memory(
            config,
            model_geometry(family_of(config).spec, config),
            weight_bytes(source),
            work.tokens,
            0 if windows is None else min(windows.numel(), TOKENS_PER_BATCH),
            any(parameter.is_meta for parameter in source.parameters()),
        )
        if announce is not None:
            announce(announcement(model, source, transformation, planned, data, predicted_seconds, predicted_bytes))
        few = torch.randint(config.vocab_size, (1, CACHE_PROBE_TOKENS))
        prompt = None if tokenizer is None or not readable_at_once(source) else sample_prompt(tokenizer)
        with stages.stage("measure the source"), reading_weights():
            source_bytes = measured_cache_bytes_per_token(source, few)
            said = None if prompt is None else continuation(source, tokenizer, prompt[1])
            reference = reference_logits(source) if transformation.preserves_computation else None
        with stages.stage("convert"):
            for layer, attention in run.steps():
                unfinished.write_layer(run, layer, attention)
        before, after = run.perplexities or (None, None)

        with atomic_folder(folder, overwrite=overwrite, within=unfinished.folder) as partial:
            converted_folder = partial if export_format is None else unfinished.folder / "converted"
            with stages.stage("write"):
                write_model(run, unfinished, converted_folder)
            with stages.stage("verify"):
                written = str(converted_folder)
                offload = None if export_format is not None else unfinished.folder
                converted: Any = load_model(written, load_config(written, {}), "auto", device, {}, offload)
                verification = verify(converted, reference)
            with stages.stage("measure the result"):
                cache_bytes = measured_cache_bytes_per_token(converted, few)
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
                conversion_seconds=unfinished.seconds,
                predicted_seconds=predicted_seconds,
                predicted_memory_bytes=predicted_bytes,
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
                exported, export_report = exported_model(model, converted, export_format, pad=True)
                write_export(exported, export_format, partial, folder.name, tokenizer)
                export_report.write(partial)
                card = with_section(card, export_card(export_report))
            elif tokenizer is not None:
                tokenizer.save_pretrained(partial)
            report.write(partial)
            (partial / "README.md").write_text(card, encoding="utf-8")
    if not resume:
        made = (predicted_seconds, report.conversion_seconds, predicted_bytes, report.peak_memory_bytes)
        remember(Outcome(model, method, *made))
    return report


def conversion_identity(model: str, hub: dict[str, Any]) -> dict[str, Any]:
    """Return what tells a source model, and the software that converts it, from others, as values that JSON can hold.

    Args:
        model: Its hub id or folder.
        hub: Keyword arguments for loading from the hub.
    """
    versions = {name: version(name) for name in ("optimum-mla", "torch", "transformers")}
    files = {}
    if Path(model).is_dir():
        kept = (path for path in sorted(Path(model).iterdir()) if path.suffix in WEIGHT_SUFFIXES)
        files = {f"file {path.name}": [path.stat().st_size, path.stat().st_mtime_ns] for path in kept}
    return {"model": model, **origin_fields(model, hub), **files, **versions}


def readable_at_once(model: PreTrainedModel) -> bool:
    """Return whether a model's weights fit into the memory that is free, so that generating with it is quick enough."""
    return bool(weight_bytes(model) < psutil.virtual_memory().available)


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of a model's weights, wherever they lie."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


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
        state_error=result.state_error,
        healed_error=result.healed_error,
        predicted_error=result.predicted_error,
    )
