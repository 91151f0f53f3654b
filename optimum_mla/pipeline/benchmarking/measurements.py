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
from optimum_mla.pipeline.benchmarking.subjects import Subject
from optimum_mla.report.rows import BASELINE, MODEL
from optimum_mla.stack import cache_argument
from optimum_mla.weights import weight_bytes

LARGEST_DIFFERENCE = 0.02
"""The share by which live cache bytes may differ from the predicted ones before a row is flagged."""


def cache_maker(model: PreTrainedModel, name: str) -> Callable[[], Cache]:
    """Return a function that makes a cache for a model; see `named_cache`, and `source_cache` for one not converted.

    A model with a codec has `default` and `16bit`.
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
def measure_memory(model: Subject, cache: str, context: int, batch: int) -> dict[str, Any]:
    """Return the fields of a `MemoryRow`: the memory of a cache and of the passes that fill it.

    Each of `batch` rows has `context` tokens. The last one is decoded in a step of its own, as in generation.
    """
    loaded = model.load()
    ids, held = prompt(loaded, batch, context), cache_maker(loaded, cache)()
    steps = min(1, context - 1)
    before = living_storages()
    peak = PeakMemory(loaded.device)
    peak.reset()
    loaded(ids[:, : context - steps], **cache_argument(loaded, held), use_cache=True, logits_to_keep=1)
    prefill = peak.bytes()
    resets = peak.reset()
    if steps:
        loaded(ids[:, -steps:], **cache_argument(loaded, held), use_cache=True, logits_to_keep=1)
    step = peak.bytes() if resets else None
    live, predicted = live_cache_bytes(held), predict_cache(loaded, cache, context, steps)
    flags = []
    if predicted is not None:
        expected, spare = batch * predicted[0], batch * predicted[1]
        apart = max(expected * (1 - LARGEST_DIFFERENCE) - live, live - expected * (1 + LARGEST_DIFFERENCE) - spare)
        if apart > 0:
            flags.append(f"the live cache is {100 * live / expected:.0f} % of what it should be")
    if is_converted(loaded.config):
        one = min(layer.source_cache_numbers // 2 for layer in loaded.geometry.layers)  # type: ignore[union-attr]
        flags += [
            f"alive after a step: {shape}, as large as the keys of a layer"
            for shape in large_tensors(before, held, batch * context * one * loaded.dtype.itemsize)
        ]
    return {
        "predicted_cache_bytes": None if predicted is None else batch * predicted[0],
        "live_cache_bytes": live,
        "live_cache_bytes_in_16_bits": live_cache_bytes(held, in_16_bits=True),
        "live_percent_of_predicted": None if predicted is None else 100 * live / (batch * predicted[0]),
        "prefill_peak_bytes": prefill,
        "decode_step_peak_bytes": step,
        "weight_bytes": weight_bytes(loaded),
        "flags": flags,
    }


def predict_cache(model: PreTrainedModel, cache: str, context: int, steps: int) -> tuple[float, float] | None:
    """Return what `predicted_cache_bytes` does, with the codes of a model that has a codec."""
    itemsize = model.dtype.itemsize
    predicted = predicted_cache_bytes(model.config, cache, context, itemsize, steps)
    if predicted is None or cache != "default" or not isinstance(model, CodedGeneration):
        return predicted
    codec = model.latent_codec
    return predicted[0] - (codec.source_bytes(context, itemsize) - codec.cache_bytes(context, itemsize)), predicted[1]


def measure_speed(
    model: Subject,
    baseline: Subject | None,
    caches: dict[str, Sequence[str]],
    context: int,
    batch: int,
    new_tokens: int,
    repeats: int,
) -> dict[str, Any]:
    """Measure the speed of a model with several caches, and of a baseline, in turn.

    Args:
        model: The model.
        baseline: The baseline, or None.
        caches: Names of the caches of each role; see `named_cache` and `source_cache`. Ratios refer to the baseline's
            first one.
        context: Number of prompt tokens in each row.
        batch: Number of rows.
        new_tokens: Number of decoding steps after each prefill.
        repeats: Number of timed prefills.

    Returns:
        A dict whose `rows` hold the fields of a `SpeedRow` each, with the baseline's first.
    """
    contenders: dict[tuple[str, str], Contender] = {}
    for role, subject in ((BASELINE, baseline), (MODEL, model)):
        if subject is not None:
            loaded = subject.load()
            contenders |= {(role, cache): Contender(loaded, cache_maker(loaded, cache)) for cache in caches[role]}
    time_in_turn([*contenders.values()], prompt(loaded, batch, context), new_tokens, repeats)
    first = None if baseline is None else next(iter(contenders.values()))
    rows = []
    for (role, cache), one in contenders.items():
        prefill, step = median(one.prefill_seconds), median(one.step_seconds)
        against = None if one is first else first
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


def measure_quality(
    model: Subject, baseline: Subject | None, cache: str, windows: list[list[int]], stride: int
) -> dict[str, Any]:
    """Return the fields of what `compare_decoding` returns on windows of token ids, [N, L]; see there for `stride`.

    The baseline, if there is one, has its default cache.
    """
    loaded, other = model.load(), None if baseline is None else baseline.load()
    theirs = None if other is None else cache_maker(other, "default")
    found = compare_decoding(loaded, cache_maker(loaded, cache), torch.tensor(windows), stride, other, theirs)
    return dataclasses.asdict(found)


def measure_tasks(
    model: Subject, tasks: list[str], tasks_path: str | None, batch: int, limit: int | None
) -> dict[str, Any]:
    """Run tasks of `lm_eval` on a model; see `optimum_mla.measure.tasks`.

    Returns:
        A dict whose `rows` hold a task, a metric, its value and its standard error each.
    """
    from optimum_mla.measure.tasks import evaluate_tasks, task_manager

    loaded, tokenizer = model.load(), model.checkpoint.tokenizer(needed=True)
    return {"rows": evaluate_tasks(loaded, tokenizer, task_manager(tasks, tasks_path), tasks, batch, limit)}
