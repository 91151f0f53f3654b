"""Folders of the experiments, and the form of their results."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIGS, RESULTS = ROOT / "benchmarks" / "configs", ROOT / "benchmarks" / "results"


def machine_class() -> str:
    """Return the processor, threads, accelerator and operating system, without any name of the machine."""
    import torch

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {accelerator}, {platform.system()}"


def commit() -> str:
    """Return the commit of the project, or `unknown` outside a clone."""
    answer = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or "unknown"


def earlier(
    path: Path, config: dict[str, Any], lines: str, also: Sequence[str] = ()
) -> tuple[dict[str, Any], list[Any]]:
    """Return what an earlier run has measured, and those lines of the config of which it holds.

    Both are empty if anything but these lists has changed in the config.

    Args:
        path: The result of the earlier run, which need not exist.
        config: The config of this run.
        lines: Name of the config's list of things that are measured one after the other.
        also: Names of other such lists, whose measurements the caller compares.
    """
    if not path.is_file():
        return {}, []
    found = json.loads(path.read_text(encoding="utf-8"))
    lists = dict.fromkeys([lines, *also])
    if {**found["config"], **lists} != {**config, **lists}:
        return {}, []
    return found, [line for line in config[lines] if line in found["config"][lines]]


def save_result(path: Path, config: dict[str, Any], remark: str = "", **content: Any) -> dict[str, Any]:
    """Write and return the findings of an experiment with its config, the commit, the machine class and the versions.

    Args:
        path: JSON file to write.
        config: Config of the experiment.
        remark: A remark on the machine, such as how many runs shared it.
        content: The findings.
    """
    from optimum_mla.report.schema import installed_versions

    machine = machine_class() + (f"; {remark}" if remark else "")
    result = {"config": config, "commit": commit(), "machine": machine, "versions": installed_versions(), **content}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")  # An interrupted run must not cut off what `earlier` reads.
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return result
