"""`mla-quantize`: the cache, and the weights if asked for, in few bits."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Unpack

from optimum_mla.cache import CacheSettings
from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.io.claim import claims_output
from optimum_mla.io.folder import atomic_folder, check_output
from optimum_mla.measure.memory import filled_cache, live_cache_bytes, peak_memory_bytes
from optimum_mla.measure.quality import decoding_perplexity
from optimum_mla.measure.verify import tolerance_of, verify
from optimum_mla.methods.quantize_cache import QuantizeLatentCache
from optimum_mla.models.layers import model_geometry
from optimum_mla.pipeline.loading import NO_TEXTS, TextOptions, carried_card, read_texts
from optimum_mla.pipeline.run_settings import RunOptions, RunSettings
from optimum_mla.report.cards import quantization_card, with_section
from optimum_mla.report.schema import QuantizationReport
from optimum_mla.weights import bitsandbytes_config, check_weights, quantized_by, weight_bytes

LONGEST_PROBE = 4096
"""Tokens, at most, in the caches that are weighed."""


@claims_output()
def quantize(
    model: str,
    output: str | Path,
    cache: CacheSettings | None = None,
    weights: str = "none",
    texts: TextOptions = NO_TEXTS,
    **settings: Unpack[RunSettings],
) -> QuantizationReport:
    """Quantize a converted checkpoint and write the result with its model card and `quantization_report.json`.

    Args:
        model: A hub id or a folder; converted.
        output: Folder to write; it appears only when whole.
        cache: How the cache is stored; None takes `QuantizeLatentCache`'s defaults.
        weights: How the linear layers' weights are stored, one of `WEIGHT_CHOICES`.
        texts: Its evaluation text, if any.
        **settings: See `RunSettings`.

    Raises:
        MLAError: Bad input of any kind; `output` is as it was.
    """
    start = time.perf_counter()
    run = RunOptions(**settings)
    checkpoint = run.checkpoint(model)
    check_weights(weights)
    quantize_cache = QuantizeLatentCache(**(cache.to_dict() if cache else {}))
    folder = check_output(output, {"model": model, "eval-data": texts.eval_data}, run.overwrite)
    config = checkpoint.converted_config()
    quantize_cache.check(config)
    if quantized_by(config) is not None:
        raise UnsupportedModelError(f"model: the weights of {model} are quantized. Name the unquantized model.")
    tokenizer = checkpoint.tokenizer(needed=texts.eval_data is not None)
    _, evaluation, data = read_texts(tokenizer, config, texts)

    loaded: Any = checkpoint.load(run.dtype, run.device)
    context = min(LONGEST_PROBE, getattr(config, "max_position_embeddings", LONGEST_PROBE))
    probe = torch.zeros(1, context, dtype=torch.long)
    geometry = model_geometry(loaded.spec, loaded.config)
    kind = loaded.dtype

    def measured(model: Any) -> tuple[int, int, float | None, float]:
        quality = None if evaluation is None else decoding_perplexity(model, evaluation, model.make_cache)
        cache = filled_cache(model, probe, model.make_cache())
        share = live_cache_bytes(cache, in_16_bits=True) / (2 * geometry.source_cache_numbers * context)
        return live_cache_bytes(cache), weight_bytes(model), quality, 100 * share

    before = measured(loaded)
    quantize_cache(loaded)
    if weights != "none":
        config = loaded.config
        del loaded
        quantization = bitsandbytes_config(config, weights)
        loaded = checkpoint.load(run.dtype, run.device, config=config, quantization_config=quantization)
    # Kernels for quantized weights round activations to 16 bits or fewer.
    verification = verify(loaded, tolerance=tolerance_of(kind if weights == "none" else torch.bfloat16))
    after = measured(loaded)
    report = QuantizationReport(
        model=model,
        cache=quantize_cache.settings.to_dict(),
        weights=weights,
        context_tokens=context,
        cache_bytes_before=before[0],
        cache_bytes_after=after[0],
        source_cache_bytes=geometry.source_cache_numbers * kind.itemsize * context,
        cache_percent_before=before[3],
        cache_percent_after=after[3],
        weight_bytes_before=before[1],
        weight_bytes_after=after[1],
        data=data,
        perplexity_before=before[2],
        perplexity_after=after[2],
        seconds=time.perf_counter() - start,
        peak_memory_bytes=peak_memory_bytes(),
        dtype=str(kind).removeprefix("torch."),
        verification=asdict(verification),
    )
    with atomic_folder(folder, after[1], run.overwrite) as partial:
        loaded.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        report.write(partial)
        card = with_section(carried_card(model, partial, folder.name), quantization_card(report))
        (partial / "README.md").write_text(card, encoding="utf-8")
    return report
