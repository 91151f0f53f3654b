"""Measure how far predictions move if the weights stay and old tokens come from codes, beside quantized caches.

    python -m benchmarks.exact_model [--encyclopedia FILE]

Every text is read as a model is used: a prompt at once, then chunks of a few tokens through the cache. Divergence is
KL(source with its 16-bit cache, source with the other cache) over the tokens after the prompt, in nats. Shares of the
cache are measured from the live cache at the end of a window, of that in 16 bits. The quantized caches keep the first
four tokens and up to 128 newest ones, and read the prompt exactly, as the codecs do. So do codes in principal axes of
all layers together, after KVTC, of which only the prompt is coded, and whose shares are computed. Some caches are also
read after prompts of thousands of tokens. An interrupted run goes on with what its result lacks. Books are a held-out
novel, chat is the source's own greedy answers, and the encyclopedia is the beginning of any text that is named. The
codecs are kept in `benchmarks/real_conversions`, where other experiments find them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.attention_aware import attention_aware_codec
from benchmarks.principal_codes import AllLayers
from benchmarks.real_quality import CONVERSIONS, MADE_BY, windows_of
from benchmarks.result import CONFIGS, RESULTS, ROOT, earlier, save_result

SINKS, RECENT = 4, 128
"""First and newest tokens that codes of all layers together leave out."""


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


def codec_of(config: dict[str, Any], name: str) -> Path:
    """Return the folder of a codec of this experiment, which is fitted where it is missing.

    Args:
        config: The config of this experiment.
        name: Name of one of its codecs.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_mla.calibrate import built_in_windows
    from optimum_mla.convert.codec import fit_codec

    (line,) = (line for line in config["codecs"] if line["name"] == name)
    folder, how = CONVERSIONS / name, {**line, **{key: config[key] for key in config if key.startswith("calibration")}}
    made_by = folder / MADE_BY
    if made_by.is_file() and how.items() <= json.loads(made_by.read_text(encoding="utf-8")).items():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(ROOT / config["model"])
    model: Any = AutoModelForCausalLM.from_pretrained(ROOT / config["model"], dtype="float32").eval()
    windows = built_in_windows(tokenizer, config["calibration_length"], config["calibration_windows"])
    begun, budget = time.process_time(), {key: value for key, value in line.items() if key not in ("name", "after")}
    codec = (attention_aware_codec if line.get("after") == "AATC" else fit_codec)(model, windows, **budget)
    codec.save(folder)
    made_by.write_text(json.dumps({**how, "fit_cpu_seconds": time.process_time() - begun}), encoding="utf-8")
    return folder


def small_models(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return how far the predictions of the embedded models move, as used: half of a window is the prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    from optimum_mla.calibrate.text import token_windows
    from optimum_mla.convert.codec import fit_codec
    from optimum_mla.measure.quality import compare_decoding

    small, rows = config["small"], []
    texts = ROOT / small["texts"]
    tokenizer = AutoTokenizer.from_pretrained(texts)
    length = small["tokens_per_window"]
    ids = token_windows(tokenizer, str(texts / "calibration.txt"), length, small["calibration_windows"], "calibration")
    windows = token_windows(tokenizer, str(texts / "evaluation.txt"), length, small["windows"], "evaluation")
    for name in small["models"]:
        model: Any = AutoModelForCausalLM.from_pretrained(ROOT / name, dtype="float32").eval()
        for budget in small["budgets"]:
            codec = fit_codec(model, ids, budget)
            caches = (lambda: codec.make_cache(model)), (lambda: DynamicCache(config=model.config))  # noqa: B023
            found = compare_decoding(model, caches[0], windows, length // 2, model, caches[1], config["chunk_tokens"])
            row = {"model": name, "kv_cache_budget": budget, "divergence": found.kl}
            rows.append({**row, "same_guess_percent": 100 * (found.agreement or 0.0)})
            print(rows[-1], flush=True)
    return rows


def long_contexts(config: dict[str, Any], model: Any, tokenizer: Any, encyclopedia: Path | None) -> list[Any]:
    """Return how far caches move the predictions after a prompt of thousands of tokens."""
    from optimum_mla.cache.source import source_cache
    from optimum_mla.calibrate.text import token_windows
    from optimum_mla.models.codec import ModelCodec

    long: dict[str, Any] = {**config, **config["long"]}
    texts = {"books": str(ROOT / config["books"]), **({"encyclopedia": str(encyclopedia)} if encyclopedia else {})}
    length, samples = long["tokens_per_window"], long["windows"]
    windows = {name: token_windows(tokenizer, text, length, samples, name) for name, text in texts.items()}
    known: dict[Any, Any] = {}
    rows = []
    for name in long["caches"]:
        make: Callable[[], Any] = partial(source_cache, model.config, name)
        if name in {line["name"] for line in config["codecs"]}:
            make = partial(ModelCodec.load(codec_of(config, name)).make_cache, model)
        rows.append({"cache": name, **measured(long, model, windows, make, known)})
        print(rows[-1], flush=True)
    return rows


def live_bytes(model: Any, cache: Any) -> int:
    """Return the bytes of a live cache of 4,096 random tokens in 16 bits; None stands for the source's own."""
    import torch

    from optimum_mla.measure.memory import filled_cache, live_cache_bytes

    ids = torch.randint(model.config.vocab_size, (1, 4096), generator=torch.Generator().manual_seed(0))
    return live_cache_bytes(filled_cache(model, ids, cache), in_16_bits=True)


def all_layers_percent(tokens: int, later: int, share: float) -> float:
    """Return the bytes of an `AllLayersCache` in percent of the source's.

    Args:
        tokens: Tokens in the cache.
        later: How many of them came after the prompt.
        share: The share of their bytes that coded tokens keep.
    """
    exact = SINKS + RECENT + later
    return 100 * (exact + share * (tokens - exact)) / tokens


def main() -> None:
    """Measure every cache in the config and write the result."""
    parser = argparse.ArgumentParser(description="Measure codecs beside the quantized caches of the source model.")
    parser.add_argument("--encyclopedia", type=Path)
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_mla.cache.source import source_cache
    from optimum_mla.calibrate import built_in_windows
    from optimum_mla.models.codec import ModelCodec

    config = json.loads((CONFIGS / "exact_model.json").read_text(encoding="utf-8"))
    path = RESULTS / "exact_model.json"
    before, lines = earlier(path, config, "codecs", also=["source_caches", "all_layers", "long"])
    names = {line["name"] for line in lines} | set(config["source_caches"])
    names |= {f"all-layers-{100 * share:g}" for share in config["all_layers"]}
    measured_before = {row.get("name", row["cache"]): row for row in before.get("rows", [])}
    measured_before = {name: row for name, row in measured_before.items() if name in names}
    small = before.get("small") or small_models(config)
    folder = str(ROOT / config["model"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    windows = windows_of(config, model, tokenizer, args.encyclopedia)
    known: dict[Any, Any] = {}
    rows: list[dict[str, Any]] = []
    for line in config["codecs"]:
        if line["name"] in measured_before:
            rows.append(measured_before[line["name"]])
            continue
        place = codec_of(config, line["name"])
        codec = ModelCodec.load(place)
        seconds = json.loads((place / MADE_BY).read_text(encoding="utf-8"))["fit_cpu_seconds"]
        row = {"cache": "codes", **line, "fit_cpu_seconds": seconds, "bytes_per_old_token": codec.bytes_per_token}
        row |= {"percent_at_4096_tokens": 100 * codec.cache_bytes(4096) / codec.source_bytes(4096)}
        rows.append(row | measured(config, model, windows, lambda codec=codec: codec.make_cache(model), known))
        print(rows[-1], flush=True)
        save_result(path, config, rows=rows, small=small)
    for name in config["source_caches"]:
        if name in measured_before:
            rows.append(measured_before[name])
            continue
        make = lambda name=name: source_cache(model.config, name)  # noqa: E731
        row = {"cache": name, "percent_at_4096_tokens": 100 * live_bytes(model, make()) / live_bytes(model, None)}
        rows.append(row | measured(config, model, windows, make, known))
        print(rows[-1], flush=True)
        save_result(path, config, rows=rows, small=small)
    missing = [share for share in config["all_layers"] if f"all-layers-{100 * share:g}" not in measured_before]
    rows += [row for name, row in measured_before.items() if name.startswith("all-layers")]
    if missing:
        length = config["calibration_length"]
        codes = AllLayers(model, built_in_windows(tokenizer, length, config["calibration_windows"]))
    for share in missing:
        row = {"cache": f"all-layers-{100 * share:g}", "percent_at_4096_tokens": all_layers_percent(4096, 0, share)}
        row |= measured(config, model, windows, partial(codes.cache, share, SINKS, RECENT), known)
        tokens = config["tokens_per_window"]
        row["percent"] = all_layers_percent(tokens - 1, tokens - config["prompt_tokens"], share)
        rows.append(row)
        print(rows[-1], flush=True)
    long = before.get("long", []) if before.get("config", {}).get("long") == config["long"] else []
    long = long or long_contexts(config, model, tokenizer, args.encyclopedia)
    save_result(path, config, rows=rows, small=small, long=long)


if __name__ == "__main__":
    main()
