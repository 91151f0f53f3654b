"""The measurements of a benchmark, each of which loads its models anew and returns plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from optimum_mla.cache.settings import named_cache
from optimum_mla.cache.source import source_cache
from optimum_mla.measure.memory import PeakMemory, large_tensors, live_cache_bytes, living_storages
from optimum_mla.measure.quality import compare_decoding
from optimum_mla.measure.sizes import predicted_cache_bytes
from optimum_mla.measure.speed import Contender, spread, time_in_turn
from optimum_mla.models.coded import CodedGeneration
from optimum_mla.models.family_table import is_converted
from optimum_mla.pipeline.checkpoint import Checkpoint
from optimum_mla.report.rows import BASELINE, MODEL
from optimum_mla.stack import cache_argument
from optimum_mla.weights import weight_bytes

LARGEST_DIFFERENCE = 0.02
"""The share by which live cache bytes may differ from the predicted ones before a row is flagged."""


def load(request: dict[str, Any], name: str, hub: dict[str, Any] | None = None) -> PreTrainedModel:
    """Return a model as every cell loads it.

    Args:
        request: The keyword arguments that all cells share.
        name: A hub id or a folder.
        hub: Keyword arguments for loading it, if they are not those of the request.
    """
    hub = request["hub"] if hub is None else hub
    return Checkpoint(name, hub).load(request["dtype"], request["device"])


def cache_maker(model: PreTrainedModel, name: str) -> Callable[[], Cache]:
    """Return a function that makes the named cache for a model.

    Args:
        model: The model.
        name: Name of the cache; see `named_cache`, and for a model that is not converted `source_cache`. A model with a
            codec has `default` and `16bit`.
    """
    if is_converted(model.config):
        return lambda: model.make_cache(**named_cache(name))  # type: ignore[operator]
    if isinstance(model, CodedGeneration):
        return model.make_cache if name == "default" else lambda: source_cache(model.config, "default")
    return lambda: source_cache(model.config, name)


def prompt(model: PreTrainedModel, batch: int, tokens: int) -> torch.Tensor:
    """Return seeded random token ids, [batch, tokens], for measurements that do not depend on the text."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    return torch.randint(size, (batch, tokens), generator=generator).to(model.device)


@torch.no_grad()
def memory_cell(name: str, cache: str, context: int, batch: int, **common: Any) -> dict[str, Any]:
    """Measure the memory of a cache and of the passes that fill it.

    The last token is decoded in a step of its own, as in generation.

    Args:
        name: The model, as a hub id or a folder.
        cache: Name of the cache; see `named_cache`.
        context: Number of tokens in each row.
        batch: Number of rows.
        **common: How to load the model: `hub`, `dtype` and `device`.

    Returns:
        The measured fields of a `MemoryRow`.
    """
    model = load(common, name)
    ids, held = prompt(model, batch, context), cache_maker(model, cache)()
    steps = min(1, context - 1)
    before = living_storages()
    peak = PeakMemory(model.device)
    peak.reset()
    model(ids[:, : context - steps], **cache_argument(model, held), use_cache=True, logits_to_keep=1)
    prefill = peak.bytes()
    resets = peak.reset()
    if steps:
        model(ids[:, -steps:], **cache_argument(model, held), use_cache=True, logits_to_keep=1)
    step = peak.bytes() if resets else None
    live = live_cache_bytes(held)

    predicted = predicted_cache_bytes(model.config, cache, context, model.dtype.itemsize, steps)
    if isinstance(model, CodedGeneration) and cache == "default" and predicted is not None:
        codec, itemsize = model.latent_codec, model.dtype.itemsize
        saved = codec.source_bytes(context, itemsize) - codec.cache_bytes(context, itemsize)
        predicted = predicted[0] - saved, predicted[1]
    flags = []
    if predicted is not None:
        expected, spare = batch * predicted[0], batch * predicted[1]
        apart = max(expected * (1 - LARGEST_DIFFERENCE) - live, live - expected * (1 + LARGEST_DIFFERENCE) - spare)
        if apart > 0:
            flags.append(f"the live cache is {100 * live / expected:.0f} % of what it should be")
    if is_converted(model.config):
        one = min(layer.source_cache_numbers // 2 for layer in model.geometry.layers)  # type: ignore[union-attr]
        flags += [
            f"alive after a step: {shape}, as large as the keys of a layer"
            for shape in large_tensors(before, held, batch * context * one * model.dtype.itemsize)
        ]
    return {
        "predicted_cache_bytes": None if predicted is None else batch * predicted[0],
        "live_cache_bytes": live,
        "live_cache_bytes_in_16_bits": live_cache_bytes(held, in_16_bits=True),
        "live_percent_of_predicted": None if predicted is None else 100 * live / (batch * predicted[0]),
        "prefill_peak_bytes": prefill,
        "decode_step_peak_bytes": step,
        "weight_bytes": weight_bytes(model),
        "flags": flags,
    }


def speed_cell(
    name: str,
    baseline: str | None,
    caches: list[str],
    context: int,
    batch: int,
    new_tokens: int,
    repeats: int,
    baseline_caches: Sequence[str] = ("default",),
    baseline_hub: dict[str, Any] | None = None,
    **common: Any,
) -> dict[str, Any]:
    """Measure the speed of a model with several caches, and of a baseline, in turn.

    Args:
        name: The model, as a hub id or a folder.
        baseline: The baseline, as a hub id or a folder, or None.
        caches: Names of the model's caches; see `named_cache`.
        context: Number of prompt tokens in each row.
        batch: Number of rows.
        new_tokens: Number of decoding steps after each prefill.
        repeats: Number of timed prefills.
        baseline_caches: Names of the baseline's caches; see `source_cache`. The first one is what ratios refer to.
        baseline_hub: Keyword arguments for loading the baseline; None takes those of the model.
        **common: How to load the model: `hub`, `dtype` and `device`.

    Returns:
        A dict whose `rows` hold the fields of a `SpeedRow` each, with the baseline's first.
    """
    labels, contenders = [], []
    if baseline is not None:
        other = load(common, baseline, baseline_hub)
        for cache in baseline_caches:
            labels.append((BASELINE, cache))
            contenders.append(Contender(other, cache_maker(other, cache)))
    model = load(common, name)
    for cache in caches:
        labels.append((MODEL, cache))
        contenders.append(Contender(model, cache_maker(model, cache)))
    time_in_turn(contenders, prompt(model, batch, context), new_tokens, repeats)
    rows = []
    for (role, cache), one in zip(labels, contenders, strict=True):
        prefill, step = median(one.prefill_seconds), median(one.step_seconds)
        against = contenders[0] if baseline is not None and one is not contenders[0] else None
        rows.append(
            {
                "role": role,
                "cache": cache,
                "prefill_tokens_per_second": batch * context / prefill,
                "prefill_spread_percent": 100 * spread(one.prefill_seconds),
                "decode_tokens_per_second": batch / step,
                "decode_spread_percent": 100 * spread(one.step_seconds),
                "attention_percent_of_decode": None if one.attention_share is None else 100 * one.attention_share,
                "prefill_ratio_to_baseline": median(against.prefill_seconds) / prefill if against else None,
                "decode_ratio_to_baseline": median(against.step_seconds) / step if against else None,
                "repeats": len(one.prefill_seconds),
                "steps": len(one.step_seconds),
            }
        )
    return {"rows": rows}


def quality_cell(
    name: str,
    baseline: str | None,
    cache: str,
    windows: list[list[int]],
    stride: int,
    baseline_hub: dict[str, Any] | None = None,
    **common: Any,
) -> dict[str, Any]:
    """Measure the quality of a model with `compare_decoding`.

    Args:
        name: The model, as a hub id or a folder.
        baseline: The baseline, as a hub id or a folder, or None.
        cache: Name of the model's cache; see `named_cache`.
        windows: Token ids of the windows to score.
        stride: Number of tokens at the end of each window that are scored.
        baseline_hub: Keyword arguments for loading the baseline; None takes those of the model.
        **common: How to load the model: `hub`, `dtype` and `device`.

    Returns:
        The fields of the result of `compare_decoding`.
    """
    model = load(common, name)
    other = None if baseline is None else load(common, baseline, baseline_hub)
    found = compare_decoding(
        model,
        cache_maker(model, cache),
        torch.tensor(windows),
        stride,
        other,
        None if other is None else cache_maker(other, "default"),
    )
    return dataclasses.asdict(found)


def tasks_cell(
    name: str, tasks: list[str], tasks_path: str | None, batch: int, limit: int | None, **common: Any
) -> dict[str, Any]:
    """Run tasks of `lm_eval` on a model.

    Args:
        name: The model, as a hub id or a folder.
        tasks: Names of the tasks.
        tasks_path: A folder with further tasks, or None.
        batch: Batch size.
        limit: Largest number of documents of each task, or None for all.
        **common: How to load the model: `hub`, `dtype` and `device`.

    Returns:
        A dict whose `rows` hold a task, a metric, its value and its standard error each.
    """
    from optimum_mla.measure.tasks import evaluate_tasks, task_manager

    model = load(common, name)
    tokenizer = Checkpoint(name, common["hub"]).tokenizer(needed=True)
    return {"rows": evaluate_tasks(model, tokenizer, task_manager(tasks, tasks_path), tasks, batch, limit)}
