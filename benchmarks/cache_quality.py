"""Measure the perplexity with a quantized latent cache, one token at a time through the live cache.

    python -m benchmarks.cache_quality [--config ...] [--output ...]

A `residual_length` of 0 quantizes every token at once, which is the state that a long context approaches. Bytes are
those of the live cache after a window, per token.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.result import CONFIGS, RESULTS, ROOT, save_result


def run(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the measurements of every cache of the config on every conversion."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_mla.calibrate.text import token_windows
    from optimum_mla.measure.memory import measured_cache_bytes
    from optimum_mla.measure.quality import decoding_perplexity
    from optimum_mla.pipeline import build_transformation

    folder = ROOT / config["model"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = config["tokens_per_window"]
    calibration = token_windows(
        tokenizer, str(folder / "calibration.txt"), length, config["calibration_samples"], "calibration-data"
    )
    windows = token_windows(tokenizer, str(folder / "evaluation.txt"), length, config["eval_windows"], "eval-data")
    runs: list[dict[str, Any]] = []
    for ratio in config["kv_cache_ratios"]:
        source = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        model = build_transformation("gqa2mla", {"kv_cache_ratio": ratio}, calibration)(source)
        reference = None
        for cache in config["caches"]:

            def make(settings: dict[str, Any] = cache, model: Any = model) -> Any:
                return model.make_cache(**settings)

            value = decoding_perplexity(model, windows, make)
            reference = reference or value
            # The model computes in float32 here, so unquantized numbers take twice the bytes that they take in 16 bits.
            weight = measured_cache_bytes(model, windows[:1], make()) / length
            runs.append(
                {
                    "kv_cache_ratio": ratio,
                    **cache,
                    "perplexity": value,
                    "percent_over_unquantized": 100 * (value / reference - 1),
                    "cache_bytes_per_token": weight,
                }
            )
            print(f"{ratio} {cache}: {value:.3f} ({runs[-1]['percent_over_unquantized']:+.2f} %)", flush=True)
    return runs


def main() -> None:
    """Run the config and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "cache_quality.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "cache_quality.json")
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text(encoding="utf-8"))
    save_result(arguments.output, config, runs=run(config))


if __name__ == "__main__":
    main()
