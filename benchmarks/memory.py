"""Measure the bytes of live caches at long context by `mla-benchmark` on a slice of a large model.

    python -m benchmarks.memory [--config ...] [--output ...]

Weights are random, which changes no size. Every cell runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.result import CONFIGS, RESULTS, save_result


def run(config: dict[str, Any]) -> dict[str, Any]:
    """Return the tables of memory and of the memory budget."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from optimum_mla.pipeline import BenchmarkOptions, TextOptions, benchmark, convert
    from optimum_mla.report.pages import terminal

    with tempfile.TemporaryDirectory() as scratch:
        source, converted = Path(scratch) / "source", Path(scratch) / "converted"
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**config["source"])).to(getattr(torch, config["dtype"])).save_pretrained(source)
        # Random weights lose nothing by a conversion without calibration, and bytes do not depend on them.
        convert(str(source), converted, config["method"], dict(config["options"]), TextOptions(uncalibrated=True))
        options: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in config["benchmark"].items()
        }
        report = benchmark(str(converted), Path(scratch) / "report", str(source), BenchmarkOptions(**options))
    print(terminal([("slice", report)]))
    content = asdict(report)
    return {name: content[name] for name in ("memory", "budget")}


def main() -> None:
    """Run the config and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "memory.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory.json")
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text(encoding="utf-8"))
    save_result(arguments.output, config, **run(config))


if __name__ == "__main__":
    main()
