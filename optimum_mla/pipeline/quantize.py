"""`mla-quantize`: the cache, and the weights if asked for, in few bits."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
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
    probe = _Probe(loaded, evaluation)
    quantize_cache(loaded)
    if weights != "none":
        how = {"config": loaded.config, "quantization_config": bitsandbytes_config(loaded.config, weights)}
        del loaded  # Both together may find no room in memory.
        loaded = checkpoint.load(run.dtype, run.device, **how)
    # Kernels for quantized weights round activations to 16 bits or fewer.
    verification = verify(loaded, tolerance=tolerance_of(probe.dtype if weights == "none" else torch.bfloat16))
    report = QuantizationReport(
        model=model,
        cache=quantize_cache.settings.to_dict(),
        weights=weights,
        **probe.report(loaded),
        data=data,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=peak_memory_bytes(),
        verification=asdict(verification),
    )
    with atomic_folder(folder, report.weight_bytes_after, run.overwrite) as partial:
        loaded.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        card = with_section(carried_card(model, partial, folder.name), quantization_card(report))
        report.write(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return report


class _Probe:
    """Measures a model before and after it is quantized.

    Args:
        model: The model before, which is measured at once.
        windows: Token ids, [N, L], on which the perplexity is measured, or None.
    """

    def __init__(self, model: Any, windows: Tensor | None) -> None:
        self.windows, self.dtype = windows, model.dtype
        self.tokens = min(LONGEST_PROBE, getattr(model.config, "max_position_embeddings", LONGEST_PROBE))
        self.source_numbers = self.tokens * model_geometry(model.spec, model.config).source_cache_numbers
        self.before = self._measure(model)

    def _measure(self, model: Any) -> dict[str, Any]:
        quality = None if self.windows is None else decoding_perplexity(model, self.windows, model.make_cache)
        cache = filled_cache(model, torch.zeros(1, self.tokens, dtype=torch.long), model.make_cache())
        return {
            "cache_bytes": live_cache_bytes(cache),
            "cache_percent": 100 * (live_cache_bytes(cache, in_16_bits=True) / (2 * self.source_numbers)),
            "weight_bytes": weight_bytes(model),
            "perplexity": quality,
        }

    def report(self, quantized: Any) -> dict[str, Any]:
        """Return the measured fields of the report on a quantized model."""
        return {
            "context_tokens": self.tokens,
            "source_cache_bytes": self.source_numbers * self.dtype.itemsize,
            "dtype": str(self.dtype).removeprefix("torch."),
            **{f"{name}_before": value for name, value in self.before.items()},
            **{f"{name}_after": value for name, value in self._measure(quantized).items()},
        }
