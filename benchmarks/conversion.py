"""Measure the cache and the perplexity of the reference model after each method, without any training.

    python -m benchmarks.conversion [--config benchmarks/configs/conversion.json] [--output ...results/conversion.json]

Each run is `optimum-mla convert` in a process of its own, as a user runs it, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.result import CONFIGS, RESULTS, ROOT, save_result

NOT_RECORDED = (
    *("data", "layers", "versions", "machine"),
    *("model", "source_folder", "source_revision", "source_config_sha256"),
)
"""Fields of a conversion report that are left out of the result of each run. The config names the source model, whose
folder has another path on every machine."""


def run_conversion(model: str, output: Path, options: dict[str, Any]) -> Path:
    """Run a conversion in a subprocess in the root of the project.

    Args:
        model: Folder of the source model.
        output: Folder to write.
        options: Long options without their dashes, for example `{"method": "mha2mla", "kv-cache-ratio": 0.5}`. The
            value True gives the option alone.

    Returns:
        The folder `output`.
    """
    arguments: list[str] = []
    for name, value in options.items():
        arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    command = ["convert", "-m", model, *arguments, "--overwrite", str(output)]
    print("$ optimum-mla", *command, flush=True)
    program = str(
        Path(sys.executable).with_name("optimum-mla")
    )  # `optimum-cli` loads other plugins, which may complain
    subprocess.run([program, *command], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return output


def main() -> None:
    """Run every conversion of the config, print the table, write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "conversion.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "conversion.json")
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text(encoding="utf-8"))

    from dataclasses import asdict

    from optimum_mla.report.render import summary_table
    from optimum_mla.report.schema import ConversionReport

    reports = []
    with tempfile.TemporaryDirectory() as scratch:
        for run in config["runs"]:
            folder = run_conversion(config["model"], Path(scratch) / "converted", {**config["common"], **run})
            reports.append(ConversionReport.read(folder))
    print(summary_table(reports))
    runs = [{k: v for k, v in asdict(report).items() if k not in NOT_RECORDED} for report in reports]
    save_result(arguments.output, config, runs=runs)


if __name__ == "__main__":
    main()
