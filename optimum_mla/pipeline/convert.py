"""`mla-convert`: load, transform, measure, write."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel
from typing_extensions import Unpack

from optimum_mla.core.errors import OptionError
from optimum_mla.core.processes import ALONE, Processes
from optimum_mla.export.gguf_file import file_type_of
from optimum_mla.io.claim import claims_output
from optimum_mla.io.folder import atomic_folder, check_output, check_space
from optimum_mla.measure.answers import answers, measure_movement, prompts, text_of
from optimum_mla.measure.memory import bytes_per_token
from optimum_mla.measure.stages import Stages
from optimum_mla.measure.verify import reference_logits, verify
from optimum_mla.models.layer_source import reading_weights
from optimum_mla.models.layers import model_geometry
from optimum_mla.pipeline.announcement import announcement
from optimum_mla.pipeline.checkpoint import load_written
from optimum_mla.pipeline.coding import assist_codec, code_cache
from optimum_mla.pipeline.estimate import conversion_memory
from optimum_mla.pipeline.exporting import exported_model, write_export
from optimum_mla.pipeline.loading import NO_TEXTS, TextOptions
from optimum_mla.pipeline.preparation import ConversionRequest, ConversionSettings, prepare
from optimum_mla.pipeline.unfinished import UnfinishedConversion, made_from, write_model
from optimum_mla.pipeline.wrapped import write_wrapped
from optimum_mla.report.break_even import break_even_tokens
from optimum_mla.report.cards import export_card, model_card, with_section
from optimum_mla.report.schema import CodecReport, ConversionReport, LayerReport
from optimum_mla.report.verdict import quality_warning

CACHE_PROBE_TOKENS = 64
"""Tokens that the live cache is filled with to weigh it."""


def convert(
    model: str,
    output: str | Path,
    method: str = "gqa2mla",
    options: dict[str, Any] | None = None,
    texts: TextOptions = NO_TEXTS,
    announce: Callable[[str], None] | None = None,
    processes: Processes = ALONE,
    **settings: Unpack[ConversionSettings],
) -> ConversionReport | CodecReport:
    """Convert a checkpoint and write the result with its model card and its report.

    Under a budget of bytes the weights stay, and `code_cache` does the work. Otherwise `convert_weights` does.

    Args:
        model: A hub id or a folder.
        output: Folder to write; it appears only when whole.
        method: One of `available_transforms()`.
        options: Keyword arguments of the method. Without any size among them, `kv_cache_budget` is 0.25 where the cache
            can be coded, and `kv_cache_ratio` is 0.5 otherwise.
        texts: Calibration and evaluation texts. Without calibration data, a text that comes with the package is taken.
        announce: Called with a few lines that say what will be done, before it starts.
        processes: The processes that share the work. The first one of them calls this function, and the others call
            `assist`.
        **settings: See `optimum_mla.pipeline.preparation.ConversionSettings`.

    Raises:
        MLAError: Bad input of any kind; `output` is as it was.
    """
    asked = ConversionRequest.of(model, method, options, texts, settings)
    if asked.coded:
        return code_cache(asked, output, announce, processes)
    if asked.codec_only:
        raise OptionError("--codec-only needs --cache-budget: without one the weights are converted, and written.")
    return convert_weights(asked, output, announce, processes)


@claims_output(distributed=True)
def convert_weights(
    asked: ConversionRequest, output: str | Path, announce: Callable[[str], None] | None, processes: Processes
) -> ConversionReport:
    """Convert the attention of a checkpoint, and write the result; arguments and errors are those of `convert`."""
    folder = check_output(output, asked.inputs, asked.overwrite)
    prepared = prepare(asked)
    model, method, export_format = asked.source.name, asked.method, asked.export_format
    config, transformation, data = prepared.config, prepared.transformation, prepared.data
    tokenizer, windows, text = prepared.tokenizer, prepared.windows, prepared.text
    stages = Stages()
    with UnfinishedConversion(
        folder, made_from(asked, data, transformation.options), asked.resume, asked.overwrite
    ) as unfinished:
        with stages.stage("load"):
            source, wrapper = prepared.load(asked.dtype, asked.device, unfinished.folder)
        if export_format == "gguf":
            file_type_of(source.dtype)
        check_space(folder, max(0, weight_bytes(source) - unfinished.bytes))
        run = prepared.run(source, unfinished, processes)
        given = transformation.calibration if transformation.needs_calibration else None
        predicted_bytes = conversion_memory(
            config,
            weight_bytes(source),
            given.numel() if isinstance(given, torch.Tensor) else 0,
            0 if windows is None else windows.numel(),
            any(parameter.is_meta for parameter in source.parameters()),
        )
        if announce is not None:
            wrapped = wrapper is not None
            planned = prepared.planned
            announce(announcement(model, source, transformation, planned, data, predicted_bytes, wrapped=wrapped))
        few = torch.randint(config.vocab_size, (1, CACHE_PROBE_TOKENS))
        speaks = tokenizer is not None and readable_at_once(source)
        questions = prompts(tokenizer, config.vocab_size) if speaks else []
        with stages.stage("measure the source"), reading_weights():
            source_bytes = bytes_per_token(source, few)
            said = answers(source, questions)
            reference = reference_logits(source) if transformation.preserves_computation else None
        with stages.stage("convert"):
            for layer, attention in run.steps():
                unfinished.write_layer(run, layer, attention)
        before, after = run.perplexities or (None, None)

        with atomic_folder(folder, overwrite=asked.overwrite, within=unfinished.folder) as partial:
            final = export_format is None and wrapper is None
            converted_folder = partial if final else unfinished.folder / "converted"
            with stages.stage("write"):
                write_model(run, unfinished, converted_folder)
            with stages.stage("verify"):
                offload = unfinished.folder if final else None
                converted: Any = load_written(converted_folder, folder, asked.device, offload)
                verification = verify(converted, reference)
            with stages.stage("measure the result"):
                cache_bytes = bytes_per_token(converted, few)
                says = answers(converted, questions)  # in one batch, as those of the source
                with reading_weights():
                    movement = measure_movement(source, converted, said) if said else None

            geometry = model_geometry(converted.spec, converted.config)
            itemsize = converted.dtype.itemsize
            report = ConversionReport(
                model=model,
                method=method,
                options=transformation.options,
                data=data,
                cache_numbers_per_token_per_layer=geometry.cache_numbers / len(geometry.layers),
                cache_bytes_per_token=cache_bytes.live,
                source_cache_bytes_per_token=source_bytes.live,
                predicted_cache_bytes_per_token=geometry.cache_bytes(bits=8 * itemsize),
                cache_bytes_per_token_in_16_bits=cache_bytes.in_16_bits,
                source_cache_bytes_per_token_in_16_bits=source_bytes.in_16_bits,
                cache_percent_of_source=100 * cache_bytes.in_16_bits / source_bytes.in_16_bits,
                parameters_added=geometry.parameters_added,
                perplexity_before=before,
                perplexity_after=after,
                conversion_seconds=unfinished.seconds,
                predicted_memory_bytes=predicted_bytes,
                peak_memory_bytes=stages.peak(),
                dtype=str(converted.dtype).removeprefix("torch."),
                seed=asked.seed,
                layers=[_layer_report(layer, result) for layer, result in run.results.items()],
                perplexity_text=None if windows is None else text,
                written_as="wrapper" if wrapper is not None else export_format or "native",
                verification=asdict(verification),
                break_even_tokens=break_even_tokens(
                    geometry.parameters_added * itemsize, source_bytes.live - cache_bytes.live
                ),
                answers=None if movement is None else asdict(movement),
                sample=None
                if not said
                else {
                    "prompt": said[0].prompt,
                    "source": text_of(said[0], tokenizer),
                    "result": text_of(says[0], tokenizer),
                },
                stages=stages.done,
                **prepared.origin,
            )
            report = replace(report, quality_warning=quality_warning(report))
            card = model_card(report, folder.name, asked.source.metadata(), wrapped=wrapper is not None)
            if export_format is not None:
                exported, export_report = exported_model(model, converted, export_format, pad=True)
                write_export(exported, export_format, partial, folder.name, tokenizer)
                export_report.write(partial)
                card = with_section(card, export_card(export_report))
            elif tokenizer is not None:
                tokenizer.save_pretrained(partial)
            if wrapper is not None:
                write_wrapped(asked.source, wrapper, converted, partial, folder)
            report.write(partial)
            (partial / "README.md").write_text(card, encoding="utf-8")
    return report


def assist(
    processes: Processes,
    model: str,
    method: str = "gqa2mla",
    options: dict[str, Any] | None = None,
    texts: TextOptions = NO_TEXTS,
    **settings: Unpack[ConversionSettings],
) -> None:
    """Do this process's share of a conversion that the first of several processes runs and writes.

    Args:
        processes: The processes.
        model, method, options, texts, **settings: As for `convert`.

    Raises:
        MLAError: Bad input of any kind.
    """
    asked = ConversionRequest.of(model, method, options, texts, settings)
    if asked.coded:
        assist_codec(asked, processes)
        return
    prepared = prepare(asked)
    with tempfile.TemporaryDirectory() as scratch:
        source, _ = prepared.load(asked.dtype, asked.device, Path(scratch))
        for _ in prepared.run(source, None, processes).steps():
            pass


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
