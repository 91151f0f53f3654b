"""Measure the speed and the memory of SmolLM2-135M-Instruct at 1k to 8k tokens by `mla-benchmark`.

    python -m benchmarks.real_speed [--config ...] [--output ...]

Models and caches are timed alternately in one process, and each cell of the memory table runs in a process of its own.
The codecs are those of the experiment on the exact model, which are fitted where they are missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.exact_model import codec_of
from benchmarks.result import CONFIGS, RESULTS, ROOT, save_result


def run(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the tables of speed, of memory and of the memory budget for each codec and dtype of the config."""
    from optimum_mla.models.codec import CODEC_FILE
    from optimum_mla.models.coded import name_codec
    from optimum_mla.pipeline import BenchmarkOptions, benchmark
    from optimum_mla.report.pages import terminal

    codecs = json.loads((ROOT / config["codecs"]).read_text(encoding="utf-8"))
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in config["benchmark"].items()
    }
    source = ROOT / config["model"]
    for dtype, name in itertools.product(config["dtypes"], config["measured"]):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            shutil.copytree(source, folder)
            shutil.copy(codec_of(codecs, name) / CODEC_FILE, folder)
            name_codec(folder)
            report = benchmark(
                str(folder), Path(scratch) / "report", str(source), BenchmarkOptions(**options), dtype=dtype
            )
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
