"""`mla-convert`: plan, load, measure, convert, write, verify, measure."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from typing_extensions import Unpack

from optimum_mla.core.errors import OptionError
from optimum_mla.core.processes import ALONE, Processes
from optimum_mla.export.gguf_file import file_type_of
from optimum_mla.io.claim import claims_output
from optimum_mla.io.folder import atomic_folder, check_output, check_space
from optimum_mla.measure.answers import Answer, answers, measure_movement, prompts, text_of
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
from optimum_mla.pipeline.origin import origin_of
from optimum_mla.pipeline.placement import parameter_bytes
from optimum_mla.pipeline.preparation import ConversionRequest, ConversionSettings, Preparation
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
    prepared = Preparation(asked)
    depends_on = made_from(asked, prepared.texts.data, prepared.transformation.options)
    with UnfinishedConversion(folder, depends_on, asked.resume, asked.overwrite) as unfinished:
        conversion = _Conversion(prepared, unfinished, processes)
        if announce is not None:
            announce(conversion.announcement())
        conversion.measure_source()
        conversion.convert()
        with atomic_folder(folder, overwrite=asked.overwrite, within=unfinished.folder) as partial:
            converted = conversion.write_weights(partial)
            report = conversion.report(converted)
            conversion.write_form(converted, report, partial)
    return report


class _Conversion:
    """A conversion of weights under way, with its source loaded.

    Args:
        prepared: What was decided before.
        unfinished: Keeps what was found; weights that find no room in memory lie in its folder.
        processes: The processes that share the work.
    """

    def __init__(self, prepared: Preparation, unfinished: UnfinishedConversion, processes: Processes) -> None:
        self.asked, self.prepared, self.unfinished, self.stages = prepared.asked, prepared, unfinished, Stages()
        with self.stages.stage("load"):
            self.source, self.wrapper = prepared.load(unfinished.folder)
        if self.asked.export_format == "gguf":
            file_type_of(self.source.dtype)
        weights = parameter_bytes(self.source)
        check_space(unfinished.output, max(0, weights - unfinished.bytes))
        self.run = prepared.run(self.source, unfinished, processes)
        method, windows = prepared.transformation, prepared.texts.windows
        tokens = method.calibration if method.needs_calibration else None
        self.predicted_bytes = conversion_memory(
            prepared.config,
            weights,
            tokens.numel() if isinstance(tokens, torch.Tensor) else 0,
            0 if windows is None else windows.numel(),
            any(parameter.is_meta for parameter in self.source.parameters()),
        )
        # Generating with weights that lie on the disk takes too long.
        speaks = prepared.tokenizer is not None and weights < psutil.virtual_memory().available
        self.questions = prompts(prepared.tokenizer, prepared.config.vocab_size) if speaks else []
        self.few = torch.randint(prepared.config.vocab_size, (1, CACHE_PROBE_TOKENS))

    def announcement(self) -> str:
        """Return a few lines that say what will be done."""
        return announcement(self.prepared, self.source, self.predicted_bytes)

    def measure_source(self) -> None:
        """Measure what the result will be compared with: bytes of the cache, answers, and logits where they stay."""
        with self.stages.stage("measure the source"), reading_weights():
            self.source_bytes = bytes_per_token(self.source, self.few)
            self.said = answers(self.source, self.questions)
            exact = self.prepared.transformation.preserves_computation
            self.reference = reference_logits(self.source) if exact else None

    def convert(self) -> None:
        """Convert layer after layer, and write each one to the folder of what is unfinished."""
        with self.stages.stage("convert"):
            for layer, attention in self.run.steps():
                self.unfinished.write_layer(self.run, layer, attention)

    def write_weights(self, partial: Path) -> Any:
        """Write the converted model, and return it as it loads, verified.

        Args:
            partial: The folder of the result. A model that is written in another form lies beside it.
        """
        native = self.asked.export_format is None and self.wrapper is None
        place = partial if native else self.unfinished.folder / "converted"
        with self.stages.stage("write"):
            write_model(self.run, self.unfinished, place)
        with self.stages.stage("verify"):
            offload = self.unfinished.folder if native else None
            converted = load_written(place, self.unfinished.output, self.asked.device, offload)
            self.verification = verify(converted, self.reference)
        return converted

    def report(self, converted: Any) -> ConversionReport:
        """Measure the converted model, and return the report."""
        prepared, transformation = self.prepared, self.prepared.transformation
        with self.stages.stage("measure the result"):
            cached, before = bytes_per_token(converted, self.few), self.source_bytes
            says = answers(converted, self.questions)  # in one batch, as those of the source
            with reading_weights():
                movement = measure_movement(self.source, converted, self.said) if self.said else None
        geometry, itemsize = model_geometry(converted.spec, converted.config), converted.dtype.itemsize
        perplexities = self.run.perplexities or (None, None)
        report = ConversionReport(
            model=self.asked.source.name,
            method=self.asked.method,
            options=transformation.options,
            data=prepared.texts.data,
            cache_numbers_per_token_per_layer=geometry.cache_numbers / len(geometry.layers),
            cache_bytes_per_token=cached.live,
            source_cache_bytes_per_token=before.live,
            predicted_cache_bytes_per_token=geometry.cache_bytes(bits=8 * itemsize),
            cache_bytes_per_token_in_16_bits=cached.in_16_bits,
            source_cache_bytes_per_token_in_16_bits=before.in_16_bits,
            cache_percent_of_source=100 * cached.in_16_bits / before.in_16_bits,
            parameters_added=geometry.parameters_added,
            perplexity_before=perplexities[0],
            perplexity_after=perplexities[1],
            conversion_seconds=self.unfinished.seconds,
            predicted_memory_bytes=self.predicted_bytes,
            peak_memory_bytes=self.stages.peak(),
            dtype=str(converted.dtype).removeprefix("torch."),
            seed=self.asked.seed,
            layers=[_layer_report(layer, result) for layer, result in self.run.results.items()],
            perplexity_text=None if prepared.texts.windows is None else prepared.texts.named,
            written_as="wrapper" if prepared.wrapped else self.asked.export_format or "native",
            verification=asdict(self.verification),
            break_even_tokens=break_even_tokens(geometry.parameters_added * itemsize, before.live - cached.live),
            answers=None if movement is None else asdict(movement),
            sample=self._sample(says) if says else None,
            stages=self.stages.done,
            **origin_of(self.asked.source),  # type: ignore[arg-type]
        )
        return replace(report, quality_warning=quality_warning(report))

    def _sample(self, says: list[Answer]) -> dict[str, str]:
        """Return the first prompt, and what the source and the result say to it."""
        source, result = (text_of(one[0], self.prepared.tokenizer) for one in (self.said, says))
        return {"prompt": self.said[0].prompt, "source": source, "result": result}

    def write_form(self, converted: Any, report: ConversionReport, partial: Path) -> None:
        """Write the result as an export or a wrapper if it is to be one, its tokenizer, its card and its report."""
        source, form, name = self.asked.source, self.asked.export_format, self.unfinished.output.name
        card = model_card(report, name, source.metadata(), wrapped=self.prepared.wrapped)
        if form is not None:
            exported, export_report = exported_model(source.name, converted, form, pad=True)
            write_export(exported, form, partial, name, self.prepared.tokenizer)
            export_report.write(partial)
            card = with_section(card, export_card(export_report))
        elif self.prepared.tokenizer is not None:
            self.prepared.tokenizer.save_pretrained(partial)
        if self.wrapper is not None:
            write_wrapped(source, self.wrapper, converted, partial, self.unfinished.output)
        report.write(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")


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
    prepared = Preparation(asked)
    with tempfile.TemporaryDirectory() as scratch:
        source, _ = prepared.load(Path(scratch))
        for _ in prepared.run(source, None, processes).steps():
            pass  # The first process writes the layers; this one has done its share of each when the step is over.


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
