"""`mla-convert --cache-budget`: fit a codec to the cache of a model, whose weights stay as they are, and write both."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from optimum_mla.calibrate.statistics_folder import CalibrationStatistics
from optimum_mla.convert.codec import codable_layers, fit_codec
from optimum_mla.core.errors import OptionError, UnsupportedModelError
from optimum_mla.core.number_checks import LARGEST_SEED, check_count
from optimum_mla.core.processes import ALONE, Processes
from optimum_mla.families.spec import sliding_window
from optimum_mla.families.verify import verify_family
from optimum_mla.io.claim import claims_output
from optimum_mla.io.faults import TOKENIZER_FILES
from optimum_mla.io.folder import atomic_folder, check_output, check_space
from optimum_mla.io.reading import reading
from optimum_mla.measure.codec_checks import codec_reference, verify_codec
from optimum_mla.measure.quality import compare_decoding
from optimum_mla.measure.sizes import layer_numbers
from optimum_mla.measure.stages import Stages
from optimum_mla.methods.options import refuse_options
from optimum_mla.models.codec import CODEC_FILE, ModelCodec
from optimum_mla.models.coded import load_codec, name_codec, without_codec
from optimum_mla.models.family_table import family_of
from optimum_mla.models.layer_source import reading_weights
from optimum_mla.models.wrappers import wrapper_of
from optimum_mla.pipeline.conversion_options import calibrated_texts
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
from optimum_mla.pipeline.preparation import left_by
from optimum_mla.report.cards import model_card
from optimum_mla.report.render import size
from optimum_mla.report.schema import STATED_TOKENS, CodecLayerReport, CodecReport

logger = logging.getLogger(__name__)

SCORED_WINDOWS = 8
"""Largest number of windows on which the predictions are compared."""
SCORED_AT_ONCE = 16
"""Number of tokens that go through the caches at a time where predictions are compared."""
CODEC_FILES = (CODEC_FILE, "config.json")
"""A folder that holds one of them may be replaced by a codec."""
COPIED = (".json", ".jinja", ".model", ".py", ".tiktoken")
"""Ends of the names of files, beside weights and a tokenizer's text files, that the result takes over."""
LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
"""Beginnings of the names of files that say what may be done with a model."""
NOT_COPIED = ("conversion_report.json", "recovery_report.json", CodecReport.file_name)
"""Files that say what the source is made of, which the result is not."""


@claims_output(distributed=True)
def code_cache(
    model: str,
    output: str | Path,
    options: dict[str, Any],
    texts: TextOptions = NO_TEXTS,
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    hub: dict[str, Any] | None = None,
    codec_only: bool = False,
    announce: Callable[[str], None] | None = None,
    try_family: bool = False,
    processes: Processes = ALONE,
) -> CodecReport:
    """Fit a codec to a checkpoint, and write it with the source's weights or alone, with a card and a report.

    Args:
        model: A hub id or a folder. Its weights may be quantized.
        output: Folder to write; it appears only when whole.
        options: `kv_cache_budget`, and `layers` if not all layers with full attention are to be coded.
        texts: Calibration and evaluation texts. Without calibration data, a text that comes with the package is taken.
        dtype: The dtype in which the model is run; the weights are written as they are. See `convert`.
        device: Torch device; None takes CUDA where it is available.
        seed: For whatever draws random numbers.
        overwrite: Replace `output` if it holds a model or a codec.
        hub: `revision`, `cache_dir`, `token`, `trust_remote_code` for loading.
        codec_only: Write the codec without the model's weights.
        announce: Called with a few lines that say what will be done, before it starts.
        try_family: Describe a family that is not known by what its names suggest, if the model confirms it.
        processes: The processes that share the fit. The others of them call `assist_codec`.

    Raises:
        MLAError: Bad input of any kind; `output` is as it was.
    """
    inputs = {
        "model": model,
        "calibration-data": texts.calibration_data,
        "statistics": texts.statistics,
        "eval-data": texts.eval_data,
    }
    folder = check_output(output, inputs, overwrite, CODEC_FILES)
    config, hub, layers, budget = _checked(model, options, texts, dtype, seed, hub, try_family)
    calibration, evaluation, data = _read(model, config, budget, texts, hub)
    stages = Stages()
    with tempfile.TemporaryDirectory() as scratch:
        with stages.stage("load"):
            source = without_codec(load_model(model, config, dtype, device, hub, Path(scratch)))
            if getattr(config, "quantization_config", None) is not None:
                # Libraries find out at the first pass that weights are not those that the config describes.
                with reading("weights", model, hub), torch.no_grad():
                    source(torch.zeros(1, 2, dtype=torch.long, device=source.device))
        source_files = [] if codec_only else _source_files(model, hub)
        check_space(folder, sum(path.stat().st_size for path in source_files))
        weights = sum(p.numel() * p.element_size() for p in source.parameters())
        if announce is not None:
            announce(_announcement(model, source, budget, layers, data, weights))
        start = time.perf_counter()
        with stages.stage("fit"), reading_weights():
            verify_family(source, family_of(config).spec, layers)
            codec = fit_codec(source, calibration, budget, layers=layers, processes=processes)
        seconds = time.perf_counter() - start
        with atomic_folder(folder, overwrite=overwrite) as partial:
            with stages.stage("write"):
                codec_bytes = codec.save(partial).stat().st_size
                for path in source_files:
                    shutil.copy(path, partial)
                if not codec_only:
                    name_codec(partial)
            with stages.stage("verify"), reading_weights():
                reference = codec_reference(source, codec)
                if codec_only:
                    written = load_codec(source, partial)
                else:
                    own = {name: value for name, value in hub.items() if name == "trust_remote_code"}
                    place = str(partial)
                    written = load_model(place, load_config(place, own), dtype, device, own, Path(scratch) / "written")
                verification = verify_codec(written, codec, reference)
            found, prompt = None, 0
            length = 0 if evaluation is None else evaluation.shape[1]
            if evaluation is not None and codec.exact.coded(length - length // 2):
                scored, stride = evaluation[:SCORED_WINDOWS], length // 2
                prompt = length - stride
                with stages.stage("measure"), reading_weights():
                    found = compare_decoding(
                        written,
                        lambda: codec.make_cache(written),
                        scored,
                        stride,
                        source,
                        lambda: DynamicCache(config=config),
                        SCORED_AT_ONCE,
                    )
            numbers = layer_numbers(config) or []
            report = CodecReport(
                model=model,
                kv_cache_budget=budget,
                data=data,
                exact=asdict(codec.exact),
                coded_bytes_per_token=codec.bytes_per_token,
                source_bytes_per_token=codec.source_bytes(1),
                other_bytes_per_token=2 * (sum(numbers) - sum(one.width for one in codec.layers.values())),
                percent_at_stated_tokens=100 * codec.cache_bytes(STATED_TOKENS) / codec.source_bytes(STATED_TOKENS),
                percent_of_long_caches=100 * codec.bytes_per_token / codec.source_bytes(1),
                codec_bytes=codec_bytes,
                codec_percent_of_weights=100 * codec_bytes / weights,
                perplexity_before=None if found is None else found.baseline_perplexity,
                perplexity_after=None if found is None else found.perplexity,
                divergence_nats=None if found is None else found.kl,
                divergence_stderr_nats=None if found is None else found.kl_stderr,
                same_guess_percent=None if found is None or found.agreement is None else 100 * found.agreement,
                prompt_tokens=None if found is None else prompt,
                scored_tokens=None if found is None else found.tokens,
                quality_text=None if found is None else _quality_text(texts),
                conversion_seconds=seconds,
                peak_memory_bytes=stages.peak(),
                dtype=str(source.dtype).removeprefix("torch."),
                seed=seed,
                layers=_layer_reports(codec),
                written_as="codec" if codec_only else "model",
                verification=asdict(verification),
                stages=stages.done,
                **origin_fields(model, hub),  # type: ignore[arg-type]
            )
            report.write(partial)
            card = model_card(report, folder.name, source_metadata(model, hub))
            (partial / "README.md").write_text(card, encoding="utf-8")
    return report


def assist_codec(
    processes: Processes,
    model: str,
    options: dict[str, Any],
    texts: TextOptions = NO_TEXTS,
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 0,
    hub: dict[str, Any] | None = None,
    try_family: bool = False,
) -> None:
    """Do this process's share of a fit that the first of several processes runs and writes.

    Args:
        processes: The processes.
        model, options, texts, dtype, device, seed, hub, try_family: As for `code_cache`.

    Raises:
        MLAError: Bad input of any kind.
    """
    config, hub, layers, budget = _checked(model, options, texts, dtype, seed, hub, try_family)
    calibration, _, _ = _read(model, config, budget, texts, hub)
    with tempfile.TemporaryDirectory() as scratch:
        source = without_codec(load_model(model, config, dtype, device, hub, Path(scratch)))
        fit_codec(source, calibration, budget, layers=layers, processes=processes)


def _checked(
    model: str,
    options: dict[str, Any],
    texts: TextOptions,
    dtype: str,
    seed: int,
    hub: dict[str, Any] | None,
    try_family: bool,
) -> tuple[PreTrainedConfig, dict[str, Any], tuple[int, ...], float]:
    """Return the config of the source, the keywords for the hub, the layers to code and the budget, all checked."""
    check_count("seed", seed, 0, LARGEST_SEED)
    torch.manual_seed(seed)
    check_dtype(dtype)
    hub = {name: value for name, value in (hub or {}).items() if value is not None}
    refuse_options(options)
    if texts.uncalibrated:
        raise OptionError("--uncalibrated and --cache-budget exclude each other: codes are fitted to a text.")
    config = load_source_config(model, hub, try_family, wrapped=True, quantized=True)
    if wrapper_of(config) is not None:
        raise UnsupportedModelError(
            f"kv_cache_budget: {model} holds a language model (model_type {config.model_type}), allowed: a language "
            "model itself. Extract it as docs/families.md shows, or give --kv-cache-ratio."
        )
    return config, hub, codable_layers(config, options.get("layers") or "all"), options["kv_cache_budget"]


def _read(
    model: str, config: PreTrainedConfig, budget: float, texts: TextOptions, hub: dict[str, Any]
) -> tuple[Tensor | CalibrationStatistics, Tensor | None, dict[str, dict[str, Any]]]:
    """Return what calibrates, the windows that are left to the report, and the origins of the texts."""
    texts = calibrated_texts(texts, "gqa2mla", {"kv_cache_budget": budget})
    needed = isinstance(texts.calibration_data, str | Path) or texts.eval_data is not None
    tokenizer = load_tokenizer(model, hub, needed=needed)
    statistics = None if texts.statistics is None else CalibrationStatistics.read(texts.statistics)
    calibration, evaluation, data = read_texts(tokenizer, config, texts)
    if statistics is not None:
        data["calibration-data"] = {**statistics.data, "statistics": statistics.digest}
        if tokenizer is not None and evaluation is None:
            evaluation, left = left_by(statistics, tokenizer, config, texts)
            data |= left
        return statistics, evaluation, data
    if calibration is None:
        raise RuntimeError("no calibration windows were read")
    return calibration, evaluation, data


def _source_files(model: str, hub: dict[str, Any]) -> list[Path]:
    """Return the files of a checkpoint that make up the source: weights, configs, tokenizer, code and licence.

    Args:
        model: A hub id or a folder. Of a hub id the weights have been downloaded, because the model was loaded.
        hub: Keyword arguments for loading from the hub.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        known = {name: hub[name] for name in ("revision", "cache_dir", "token") if name in hub}
        named = [*(f"*{end}" for end in COPIED), *TOKENIZER_FILES, *(f"{name}*" for name in LICENCES)]
        with reading("weights", model, hub):
            folder = Path(snapshot_download(model, allow_patterns=named, ignore_patterns=["*/*"], **known))
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in NOT_COPIED]
    weights = [path for path in files if path.suffix == ".safetensors" and path.name != CODEC_FILE]
    # Some repositories hold their weights a second time, for other libraries.
    weights = [path for path in weights if not path.name.startswith("consolidated")]
    weights = weights or [path for path in files if path.suffix == ".bin"]
    return weights + [
        path
        for path in files
        if path.suffix in COPIED or path.name in TOKENIZER_FILES or path.name.startswith(LICENCES)
    ]


def _announcement(
    model: str, source: Any, budget: float, layers: tuple[int, ...], data: dict[str, dict[str, Any]], weights: int
) -> str:
    """Return a few lines that say what will be done."""
    config, text = source.config, data["calibration-data"]
    named = "the built-in text" if text["source"] == "built-in" else text["source"]
    lines = [
        f"{model}: {config.num_hidden_layers} layers, {size(weights)} of weights, "
        f"{str(source.dtype).removeprefix('torch.')} on {source.device}",
        f"codes of old tokens in {100 * budget:.3g} % of their bytes in {len(layers)} layers; the weights stay as they "
        f"are. Fitted on {text['windows']} windows of {text['tokens_per_window']} tokens of {named}.",
    ]
    if windows := [n for n in range(config.num_hidden_layers) if sliding_window(config, n) is not None]:
        lines.append(f"{len(windows)} layers have a sliding window, which bounds their cache by itself; they keep it.")
    if text["source"] == "built-in":
        lines.append("Text like what the model will read is better: give it with --calibration-data.")
    return "\n".join([*lines, ""])


def _quality_text(texts: TextOptions) -> str:
    """Return the name of the text on which the predictions are compared."""
    if texts.eval_data is not None:
        return "evaluation"
    return "built-in" if texts.statistics is not None else "held-back calibration"


def _layer_reports(codec: ModelCodec) -> list[CodecLayerReport]:
    return [
        CodecLayerReport(layer, [list(pair) for pair in own.layout.channels], own.layout.bytes_per_token)
        for layer, own in codec.layers.items()
    ]
