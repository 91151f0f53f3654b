"""`mla-convert --cache-budget`: fit a codec to the cache of a model, whose weights stay as they are, and write both."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from optimum_mla.convert.codec import codable_layers, fit_codec
from optimum_mla.convert.method import refuse_options
from optimum_mla.convert.record import Record
from optimum_mla.core.errors import OptionError, UnsupportedModelError
from optimum_mla.core.processes import Processes
from optimum_mla.families.spec import sliding_window
from optimum_mla.families.verify import verify_family
from optimum_mla.io.claim import claims_output
from optimum_mla.io.folder import atomic_folder, check_output, check_space
from optimum_mla.io.reading import reading
from optimum_mla.measure.codec_checks import codec_reference, verify_codec
from optimum_mla.measure.quality import Comparison, compare_decoding
from optimum_mla.measure.sizes import layer_numbers
from optimum_mla.measure.stages import Stages
from optimum_mla.models.codec import CODEC_FILE, ModelCodec
from optimum_mla.models.coded import load_codec, name_codec, without_codec
from optimum_mla.models.family_table import family_of
from optimum_mla.models.layer_source import reading_weights
from optimum_mla.models.wrappers import wrapper_of
from optimum_mla.pipeline.checkpoint import Checkpoint
from optimum_mla.pipeline.conversion_texts import ConversionTexts, calibrated_texts
from optimum_mla.pipeline.origin import origin_of
from optimum_mla.pipeline.placement import parameter_bytes
from optimum_mla.pipeline.preparation import ConversionRequest
from optimum_mla.pipeline.source_files import source_files
from optimum_mla.pipeline.unfinished import Unfinished, made_from
from optimum_mla.report.cards import model_card
from optimum_mla.report.render import size
from optimum_mla.report.schema import STATED_TOKENS, CodecLayerReport, CodecReport

SCORED_WINDOWS = 8
"""Largest number of windows on which the predictions are compared."""
SCORED_AT_ONCE = 16
"""Number of tokens that go through the caches at a time where predictions are compared."""
CODEC_FILES = (CODEC_FILE, "config.json")
"""A folder that holds one of them may be replaced by a codec."""


@claims_output(distributed=True)
def code_cache(
    asked: ConversionRequest, output: str | Path, announce: Callable[[str], None] | None, processes: Processes
) -> CodecReport:
    """Fit a codec to a checkpoint, and write it with the source's weights or alone, with a card and a report.

    The request has `kv_cache_budget` among its options, and `layers` if not all layers with full attention are to be
    coded. Its weights may be quantized. The other processes call `assist`. The rest is as for `convert`.
    """
    folder = check_output(output, asked.inputs, asked.overwrite, CODEC_FILES)
    planned = PlannedCodec(asked)
    options = {**asked.options, "layers": planned.layers}
    with Unfinished(folder, made_from(asked, planned.texts.data, options), asked.resume, asked.overwrite) as unfinished:
        coding = _Coding(asked, planned, unfinished)
        check_space(folder, sum(path.stat().st_size for path in coding.source_files))
        if announce is not None:
            announce(coding.announcement())
        codec = coding.fitted(processes)
        with atomic_folder(folder, overwrite=asked.overwrite, within=unfinished.folder) as partial:
            report = coding.write(codec, partial)
            card = model_card(report, folder.name, asked.source.metadata())
            (partial / "README.md").write_text(card, encoding="utf-8")
    return report


class PlannedCodec:
    """A codec that can be fitted as soon as its model is loaded.

    Attributes:
        config: The config of the source.
        layers: The layers to code.
        texts: What calibrates, and what the predictions are compared on.
        budget: Bytes of a token's codes, divided by those of the source's cache in 16 bits.

    Raises:
        MLAError: Bad input of any kind.
    """

    def __init__(self, asked: ConversionRequest) -> None:
        asked.check()
        refuse_options(asked.options)
        if asked.texts.uncalibrated:
            raise OptionError("--uncalibrated and --cache-budget exclude each other: codes are fitted to a text.")
        self.config = config = asked.source.source_config(asked.try_family, wrapped=True, quantized=True)
        if wrapper_of(config) is not None:
            raise UnsupportedModelError(
                f"kv_cache_budget: {asked.source.name} holds a language model (model_type {config.model_type}), "
                "allowed: a language model itself. Extract it as docs/families.md shows, or give --kv-cache-ratio."
            )
        self.layers = codable_layers(config, asked.options.get("layers") or "all")
        texts = calibrated_texts(asked.texts, asked.method, asked.options)
        self.texts = ConversionTexts.read(texts, asked.source.tokenizer(texts.need_tokenizer), config)
        self.budget: float = asked.options["kv_cache_budget"]

    def fit(self, source: PreTrainedModel, processes: Processes, record: Record | None = None) -> ModelCodec:
        """Return the codec, fitted to the loaded source by all processes; only the first one has a record."""
        calibration: Any = self.texts.calibration
        return fit_codec(source, calibration, self.budget, layers=self.layers, processes=processes, record=record)


class _Coding:
    """A fit under way, with its source loaded.

    Args:
        asked: The request.
        planned: The plan.
        unfinished: Keeps what was found; weights that find no room in memory lie in its folder.
    """

    def __init__(self, asked: ConversionRequest, planned: PlannedCodec, unfinished: Unfinished) -> None:
        self.asked, self.planned, self.stages, self._unfinished = asked, planned, Stages(), unfinished
        checkpoint = asked.source
        with self.stages.stage("load"):
            self.source = without_codec(checkpoint.load(asked.dtype, asked.device, unfinished.folder))
            if getattr(planned.config, "quantization_config", None) is not None:
                # Libraries find out at the first pass that weights are not those that the config describes.
                with reading("weights", checkpoint.location, checkpoint.hub), torch.no_grad():
                    self.source(torch.zeros(1, 2, dtype=torch.long, device=self.source.device))
        self.weight_bytes = parameter_bytes(self.source)
        self.source_files = [] if asked.codec_only else source_files(checkpoint)

    def announcement(self) -> str:
        """Return a few lines that say what will be done."""
        planned, config = self.planned, self.source.config
        text = planned.texts.data["calibration-data"]
        named = "the built-in text" if text["source"] == "built-in" else text["source"]
        lines = [
            f"{self.asked.source.name}: {config.num_hidden_layers} layers, {size(self.weight_bytes)} of weights, "
            f"{str(self.source.dtype).removeprefix('torch.')} on {self.source.device}",
            f"codes of old tokens in {100 * planned.budget:.3g} % of their bytes in {len(planned.layers)} layers; the "
            f"weights stay as they are. Fitted on {text['windows']} windows of {text['tokens_per_window']} tokens of "
            f"{named}.",
        ]
        if windows := [n for n in range(config.num_hidden_layers) if sliding_window(config, n) is not None]:
            lines.append(
                f"{len(windows)} layers have a sliding window, which bounds their cache by itself; they keep it."
            )
        if text["source"] == "built-in":
            lines.append("Text like what the model will read is better: give it with --calibration-data.")
        return "\n".join([*lines, ""])

    def fitted(self, processes: Processes) -> ModelCodec:
        """Return the codec, fitted to the source."""
        planned, source = self.planned, self.source
        with self.stages.stage("fit"), reading_weights():
            verify_family(source, family_of(planned.config).spec, planned.layers)
            return planned.fit(source, processes, self._unfinished)

    def write(self, codec: ModelCodec, folder: Path) -> CodecReport:
        """Write the codec, the source's files if they are asked for, and the report, all checked; return the report."""
        with self.stages.stage("write"):
            codec_bytes = codec.save(folder).stat().st_size
            for path in self.source_files:
                shutil.copy(path, folder)
            if not self.asked.codec_only:
                name_codec(folder)
        with self.stages.stage("verify"), reading_weights():
            reference = codec_reference(self.source, codec)
            written = self._loaded_again(folder)
            verification = verify_codec(written, codec, reference)
        measured = self._measured(written, codec)
        report = self._report(codec, codec_bytes, measured, asdict(verification))
        report.write(folder)
        return report

    def _loaded_again(self, folder: Path) -> PreTrainedModel:
        """Return the model that was written, or the source with the codec that was written alone."""
        asked = self.asked
        if asked.codec_only:
            return load_codec(self.source, folder)
        own = {name: value for name, value in asked.source.hub.items() if name == "trust_remote_code"}
        offload = self._unfinished.folder / "written"
        return Checkpoint(str(folder), own).load(asked.dtype, asked.device, offload)

    def _measured(self, written: PreTrainedModel, codec: ModelCodec) -> dict[str, Any]:
        """Return fields of the report: how far the predictions move; none where no token of a window becomes codes."""
        texts = self.planned.texts
        prompt = 0 if texts.evaluation is None else texts.evaluation.shape[1] - texts.evaluation.shape[1] // 2
        if texts.evaluation is None or not codec.exact.coded(prompt):
            return {}
        with self.stages.stage("measure"), reading_weights():
            found = compare_codes(written, codec, self.source, texts.evaluation)
        return {
            "perplexity_before": found.baseline_perplexity,
            "perplexity_after": found.perplexity,
            "divergence_nats": found.kl,
            "divergence_stderr_nats": found.kl_stderr,
            "same_guess_percent": None if found.agreement is None else 100 * found.agreement,
            "prompt_tokens": prompt,
            "scored_tokens": found.tokens,
            "quality_text": texts.named,
        }

    def _report(
        self, codec: ModelCodec, codec_bytes: int, measured: dict[str, Any], verification: dict[str, Any]
    ) -> CodecReport:
        numbers = layer_numbers(self.planned.config) or []
        return CodecReport(
            model=self.asked.source.name,
            kv_cache_budget=self.planned.budget,
            data=self.planned.texts.data,
            exact=asdict(codec.exact),
            coded_bytes_per_token=codec.bytes_per_token,
            source_bytes_per_token=codec.source_bytes(1),
            other_bytes_per_token=2 * (sum(numbers) - sum(one.width for one in codec.layers.values())),
            percent_at_stated_tokens=100 * codec.cache_bytes(STATED_TOKENS) / codec.source_bytes(STATED_TOKENS),
            percent_of_long_caches=100 * codec.bytes_per_token / codec.source_bytes(1),
            codec_bytes=codec_bytes,
            codec_percent_of_weights=100 * codec_bytes / self.weight_bytes,
            **measured,
            conversion_seconds=self._unfinished.seconds,
            peak_memory_bytes=self.stages.peak(),
            dtype=str(self.source.dtype).removeprefix("torch."),
            seed=self.asked.seed,
            layers=_layer_reports(codec),
            written_as="codec" if self.asked.codec_only else "model",
            verification=verification,
            stages=self.stages.done,
            **origin_of(self.asked.source),  # type: ignore[arg-type]
        )


def compare_codes(model: PreTrainedModel, codec: ModelCodec, source: PreTrainedModel, windows: Tensor) -> Comparison:
    """Return how far a model that reads codes is from its source on the second halves of windows, [N, L].

    Their first halves are prompts. `SCORED_WINDOWS` of the windows are taken.
    """
    coded, own = lambda: codec.make_cache(model), lambda: DynamicCache(config=source.config)
    stride = windows.shape[1] // 2
    return compare_decoding(model, coded, windows[:SCORED_WINDOWS], stride, source, own, SCORED_AT_ONCE)


def assist_codec(asked: ConversionRequest, processes: Processes) -> None:
    """Do this process's share of a fit that the first of several processes runs and writes.

    Raises:
        MLAError: Bad input of any kind.
    """
    planned = PlannedCodec(asked)
    with tempfile.TemporaryDirectory() as scratch:
        source = without_codec(asked.source.load(asked.dtype, asked.device, Path(scratch)))
        planned.fit(source, processes)


def _layer_reports(codec: ModelCodec) -> list[CodecLayerReport]:
    return [
        CodecLayerReport(layer, [list(pair) for pair in own.layout.channels], own.layout.bytes_per_token)
        for layer, own in codec.layers.items()
    ]
