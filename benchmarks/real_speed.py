"""Measure the speed and the memory of SmolLM2-135M-Instruct at 1k to 8k tokens by `mla-benchmark`.

    python -m benchmarks.real_speed [--config ...] [--output ...]

Models and caches are timed alternately in one process, and each cell of the memory table runs in a process of its own.
The conversions are those of the experiment on quality, which are made where they are missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.real_quality import conversion_of
from benchmarks.result import CONFIGS, RESULTS, ROOT, save_result


def run(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the tables of speed, of memory and of the memory budget for each conversion and dtype of the config."""
    from optimum_mla.pipeline import BenchmarkOptions, benchmark
    from optimum_mla.report.pages import terminal

    quality = json.loads((ROOT / config["quality"]).read_text(encoding="utf-8"))
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in config["benchmark"].items()
    }
    for dtype, name in itertools.product(config["dtypes"], config["conversions"]):
        folder = conversion_of(quality, name)
        with tempfile.TemporaryDirectory() as scratch:
            output, source = Path(scratch) / "report", str(ROOT / config["model"])
            report = benchmark(str(folder), output, source, BenchmarkOptions(**options), dtype=dtype)
        print(terminal([(name, report)]), flush=True)
        content = asdict(report)
        yield {"name": name, "dtype": dtype, **{table: content[table] for table in ("speed", "memory", "budget")}}


def main() -> None:
    """Run the config and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "real_speed.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "real_speed.json")
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text(encoding="utf-8"))
    runs: list[dict[str, Any]] = []
    for found in run(config):
        runs.append(found)
        save_result(arguments.output, config, runs=runs)


if __name__ == "__main__":
    main()
