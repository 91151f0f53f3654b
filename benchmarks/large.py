"""Measure the time and the memory of conversions of large models, by their number of layers.

    python -m benchmarks.large [--config ...] [--output ...] [--layers N ...]

The models have random weights, which take the same work as trained ones, and are written one layer at a time into a
folder for temporary files (a 7B-shaped layer takes 0.4 GB, the whole is deleted at the end). Every conversion runs in a
process of its own, whose peak memory is measured. Numbers of layers that an earlier run has measured with the same
config are kept. For other shapes it is computed what `mla-inspect` would say of a conversion with default options.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import optimum_mla  # noqa: F401
from benchmarks.result import CONFIGS, RESULTS, earlier, save_result
from optimum_mla.io.shards import place_shards, write_shard

STANDARD_DEVIATION = 0.02
SEED = 0


def write_random_model(folder: Path, config: dict[str, Any], layers: int) -> int:
    """Write a Llama model with random weights, one layer at a time, and return the bytes of its weights.

    Args:
        folder: The folder of the checkpoint, which is made.
        config: The config of the experiment.
        layers: Number of decoder layers.
    """
    dtype = getattr(torch, config["dtype"])
    model_config = LlamaConfig(**config["shape"], num_hidden_layers=layers, dtype=config["dtype"])
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(model_config).state_dict().items()}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        parts.setdefault(name.split(".")[2] if ".layers." in name else "outside", []).append(name)
    folder.mkdir()
    model_config.architectures = ["LlamaForCausalLM"]
    model_config.save_pretrained(folder)
    generator, total, shards = torch.Generator().manual_seed(SEED), 0, []
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for part, names in parts.items():
            tensors = {
                name: torch.ones(shapes[name], dtype=dtype)
                if "norm" in name
                else (STANDARD_DEVIATION * torch.randn(shapes[name], generator=generator)).to(dtype)
                for name in names
            }
            total += sum(tensor.nbytes for tensor in tensors.values())
            shards.append(Path(scratch) / f"{part}.safetensors")
            write_shard(shards[-1], tensors)
        place_shards(shards, folder)
    return total


def convert_one(folder: str, config: dict[str, Any]) -> dict[str, Any]:
    """Convert a model in this process, and return the seconds, the CPU seconds and the peak memory of the stages.

    Args:
        folder: The folder of the model.
        config: The config of the experiment.
    """
    from optimum_mla.pipeline import TextOptions, convert

    ids = torch.randint(
        config["shape"]["vocab_size"],
        (config["windows"] * config["window_tokens"],),
        generator=torch.Generator().manual_seed(SEED),
    )
    texts = TextOptions(
        calibration_data=ids.tolist(),
        calibration_samples=config["windows"],
        calibration_length=config["window_tokens"],
    )
    started = time.perf_counter()
    report = convert(folder, f"{folder}-converted", options=config["options"], texts=texts)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "conversion_seconds": report.conversion_seconds,
        "peak_memory_bytes": report.peak_memory_bytes,
        "stages": [
            {"name": stage.name, "seconds": stage.seconds, "peak_bytes": stage.peak_bytes} for stage in report.stages
        ],
    }


def run(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return the findings about a conversion of a model with so many layers, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="large-model-") as scratch:
        folder = Path(scratch) / "model"
        weight_bytes = write_random_model(folder, config, layers)
        command = [sys.executable, "-m", "benchmarks.large", "--convert", str(folder), json.dumps(config)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
    return {"layers": layers, "weight_bytes": weight_bytes, **found}


def expectation(shape: dict[str, Any], dtype: str) -> dict[str, int]:
    """Return the size of a model and the memory that a conversion of its weights is predicted to take.

    Args:
        shape: Arguments of its `LlamaConfig`.
        dtype: Dtype of its weights.
    """
    from optimum_mla.pipeline.inspecting import default_memory

    config = LlamaConfig(**shape, dtype=dtype)
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters())
    bytes_ = numbers * getattr(torch, dtype).itemsize
    return {"weight_bytes": bytes_, "memory_bytes": default_memory(config, bytes_)}


def main() -> None:
    """Convert a model for each number of layers, and write the result after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "large.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "large.json")
    parser.add_argument("--layers", type=int, nargs="+", help="Numbers of layers. Default: those of the config.")
    parser.add_argument("--convert", nargs=2, metavar=("FOLDER", "CONFIG"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.convert is not None:
        folder, text = arguments.convert
        print(json.dumps(convert_one(folder, json.loads(text))))
        return
    config = json.loads(arguments.config.read_text(encoding="utf-8"))
    known, measured = earlier(arguments.output, config, "layers", also=["computed"])
    computed = {name: expectation(shape, config["dtype"]) for name, shape in config["computed"].items()}
    runs: list[dict[str, Any]] = [one for one in known.get("runs", []) if one["layers"] in measured]
    for layers in arguments.layers or config["layers"]:
        if all(one["layers"] != layers for one in runs):
            runs.append(run(config, layers))
            print(json.dumps(runs[-1]), flush=True)
        runs = sorted(runs, key=lambda one: int(one["layers"]))
        save_result(arguments.output, config, runs=runs, computed=computed)


if __name__ == "__main__":
    main()
