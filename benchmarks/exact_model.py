"""Measure how far predictions move if the weights stay and old tokens come from codes, beside quantized caches.

    python -m benchmarks.exact_model [--encyclopedia FILE]

Every text is read as a model is used: a prompt at once, then chunks of a few tokens through the cache. Divergence is
KL(source with its 16-bit cache, source with the other cache) over the tokens after the prompt, in nats. Shares of the
cache are measured from the live cache at the end of a window, of that in 16 bits. The quantized caches keep the first
four tokens and up to 128 newest ones, and read the prompt exactly, as the codecs do. Books are a held-out novel, chat
is the source's own greedy answers, and the encyclopedia is the beginning of any text that is named.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.real_quality import windows_of
from benchmarks.result import CONFIGS, RESULTS, ROOT, save_result


def predicted(model: Any, ids: Any, cache: Any, prompt: int, chunk: int) -> Any:
    """Return the logarithms of the predictions after a prompt, [T - prompt, vocabulary]."""
    import torch

    from optimum_mla.stack import CACHE_ARGUMENT

    given = {CACHE_ARGUMENT: cache, "use_cache": True}
    with torch.no_grad():
        model(ids[None, : prompt - 1], **given, logits_to_keep=1)
        parts = [model(part[None], **given).logits[0] for part in ids[prompt - 1 : -1].split(chunk)]
    return torch.cat(parts).float().log_softmax(-1)


def measured(config: dict[str, Any], model: Any, windows: dict[str, Any], make: Callable[[], Any], known: Any) -> Any:
    """Return the share of the live cache and, by text, divergence, excess and share of same first guesses.

    Args:
        config: The config of the experiment.
        model: The source model.
        windows: Token ids of the texts, [N, T].
        make: Makes an empty cache.
        known: Keeps the predictions of the source with its own cache, by text and window.
    """
    from transformers import DynamicCache

    from optimum_mla.measure.memory import live_cache_bytes

    sizes, texts = [], {}
    for name, all_ids in windows.items():
        sums = [0.0, 0.0, 0.0]
        for index, ids in enumerate(all_ids):
            how = config["prompt_tokens"], config["chunk_tokens"]
            whole = DynamicCache(config=model.config)
            if (name, index) not in known:
                known[name, index] = predicted(model, ids, whole, *how), live_cache_bytes(whole, in_16_bits=True)
            (source, source_bytes), cache = known[name, index], make()
            found = predicted(model, ids, cache, *how)
            sizes.append(live_cache_bytes(cache, in_16_bits=True) / source_bytes)
            after = ids[-len(found) :, None]
            sums[0] += float((source.exp() * (source - found)).sum(-1).mean()) / len(all_ids)
            sums[1] += float((source.gather(1, after) - found.gather(1, after)).mean()) / len(all_ids)
            sums[2] += float((source.argmax(-1) == found.argmax(-1)).float().mean()) / len(all_ids)
        texts[name] = {"divergence": sums[0], "excess": sums[1], "same_guess_percent": 100 * sums[2]}
    return {"percent": 100 * sum(sizes) / len(sizes), "texts": texts}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure codecs beside the quantized caches of the source model.")
    parser.add_argument("--encyclopedia", type=Path)
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_mla.cache.source import source_cache
    from optimum_mla.calibrate import built_in_windows
    from optimum_mla.convert.codec import fit_codec

    config = json.loads((CONFIGS / "exact_model.json").read_text(encoding="utf-8"))
    folder = str(ROOT / config["model"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    windows = windows_of(config, model, tokenizer, args.encyclopedia)
    calibration = built_in_windows(tokenizer, config["calibration_length"], config["calibration_windows"])
    known: dict[Any, Any] = {}
    rows: list[dict[str, Any]] = []
    for options in config["codecs"]:
        begun = time.process_time()
        codec = fit_codec(model, calibration, **options)
        seconds = time.process_time() - begun
        row = {"cache": "codes", **options, "fit_cpu_seconds": seconds, "bytes_per_old_token": codec.bytes_per_token}
        row |= {"percent_at_4096_tokens": 100 * codec.cache_bytes(4096) / codec.source_bytes(4096)}
        rows.append(row | measured(config, model, windows, lambda codec=codec: codec.make_cache(model), known))
        print(rows[-1], flush=True)
    for name in config["source_caches"]:
        make = lambda name=name: source_cache(model.config, name)  # noqa: E731
        rows.append({"cache": name} | measured(config, model, windows, make, known))
        print(rows[-1], flush=True)
    save_result(RESULTS / "exact_model.json", config, rows=rows)


if __name__ == "__main__":
    main()
