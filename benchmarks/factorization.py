"""Measure the time and memory of the calibrated factorization of one layer at the size of large models.

    python -m benchmarks.factorization [--config ...] [--output ...]

Weights and second moments are random, because values do not change the work. The rows are those of the full form of
GQA2MLA: all keys with one weight per row, and all values with the moments of W_O.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.result import CONFIGS, RESULTS, save_result


def measure(layer: dict[str, Any], ratio: float) -> dict[str, Any]:
    """Factorize one layer and return the seconds and the peak memory."""
    import torch

    from optimum_mla.measure.memory import peak_memory_bytes
    from optimum_mla.ops.weighted import WeightedFactorization, WeightedRows

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d, heads, dim = layer["hidden_size"], layer["num_key_value_heads"], layer["head_dim"]
    width, inputs, outputs = heads * dim, random(d, d), random(heads, 2 * dim, dim)
    moments = inputs.T @ inputs
    rows = [
        WeightedRows(random(width, d), random(width, 1, 1).square()),
        WeightedRows(random(width, d), outputs.mT @ outputs),
    ]
    rank = int(ratio * 2 * width)
    start = time.perf_counter()
    WeightedFactorization(rows, moments).factors(rank)
    seconds = time.perf_counter() - start
    return {**layer, "rank": rank, "seconds": seconds, "peak_memory_mb": peak_memory_bytes() / 1e6}


def main() -> None:
    """Measure every layer of the config, the smallest first, and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "factorization.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "factorization.json")
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text(encoding="utf-8"))
    layers = sorted(config["layers"], key=lambda layer: layer["num_key_value_heads"])
    runs = []
    for layer in layers:
        runs.append(measure(layer, config["kv_cache_ratio"]))
        print(f"{layer['name']}: {runs[-1]['seconds']:.1f} s, {runs[-1]['peak_memory_mb']:.0f} MB at most")
    save_result(arguments.output, config, runs=runs)


if __name__ == "__main__":
    main()
