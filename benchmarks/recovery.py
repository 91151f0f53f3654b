"""Measure how much quality a short training recovers, by trained parameters, loss and initialization.

    python -m benchmarks.recovery --corpus DIR [--config ...] [--output ...]

    python -m benchmarks.recovery --config benchmarks/configs/recovery_memory.json

DIR holds the books (`*.txt`) that the reference model was trained on; the two held-out books of its card are left out.
Every run sees the same rows, drawn evenly from all books. Perplexity is that of the held-out `evaluation.txt`. Memory
is the highest of the training, in a process of its own. A config with a `random_model` measures memory alone, on a
model with random weights that needs no corpus.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.result import CONFIGS, RESULTS, ROOT, save_result

HELD_OUT = ("evaluation", "calibration")


def texts_of(config: dict[str, Any]) -> Path:
    """Return the folder of the held-out texts, which is that of the model if the config names none."""
    return ROOT / config.get("texts", config["model"])


def token_rows(corpus: Path, config: dict[str, Any], tokens: int) -> list[int]:
    """Return the token ids of evenly spaced rows of all books but the held-out ones."""
    import torch
    from transformers import AutoTokenizer

    from optimum_mla.recovery.data import packed_rows

    length = config["row_tokens"]
    held_out = [(texts_of(config) / f"{name}.txt").read_text(encoding="utf-8")[:200] for name in HELD_OUT]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / config["model"])
    rows: list[list[int]] = []
    for path in sorted(corpus.glob("*.txt")):
        if not any(start in path.read_text(encoding="utf-8") for start in held_out):
            rows += packed_rows(tokenizer, path, length)
    picked = torch.linspace(0, len(rows) - 1, tokens // length).round().long().tolist()
    return [token for index in picked for token in rows[index]]


def random_model(fields: dict[str, Any], folder: Path) -> None:
    """Save a Llama model with random weights in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**fields)).save_pretrained(folder)


def make_conversion(name: str, spec: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    """Convert the reference model, and replace its latent projections by another start if the config has one."""
    import torch
    from transformers import AutoModelForCausalLM

    from optimum_mla.pipeline import TextOptions, convert

    model = ROOT / config["model"]
    texts = TextOptions(uncalibrated=True)
    if spec["calibrated"]:
        texts = TextOptions(
            calibration_data=str(texts_of(config) / "calibration.txt"),
            calibration_samples=config["calibration_windows"],
            calibration_length=config["row_tokens"],
        )
    convert(str(model), folder, spec["method"], dict(spec["options"]), texts, dtype="float32")
    start = spec.get("start")
    if start is None:
        return
    from optimum_mla.recovery.parameters import kv_projections

    converted = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        if start == "random":
            for module in kv_projections(converted).values():
                torch.nn.init.normal_(module.get_parameter("weight"), std=converted.config.initializer_range)
        else:
            expand_by_identity(converted, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    converted.save_pretrained(folder)


def expand_by_identity(converted: Any, source: Any) -> None:
    """Start as the source: its projections become down-projections, and up-projections copy heads to query heads."""
    import torch

    for layer, original in zip(converted.model.layers, source.model.layers, strict=True):
        attention, old = layer.self_attn, original.self_attn
        g = attention.geometry
        eye = torch.eye(g.num_key_value_heads * g.head_dim).view(g.num_key_value_heads, g.head_dim, -1)
        copies = eye.repeat_interleave(g.num_attention_heads // g.num_key_value_heads, dim=0).flatten(0, 1)
        attention.k_a_proj.weight.copy_(old.k_proj.weight)
        attention.v_a_proj.weight.copy_(old.v_proj.weight)
        attention.k_b_proj.weight.copy_(copies)
        attention.v_b_proj.weight.copy_(copies)


def train_source(
    case: dict[str, Any], folder: Path, ids: list[int], config: dict[str, Any], output: Path
) -> dict[str, Any]:
    """Train W_K and W_V of the source model on the same rows, which TransMLA compares with."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    from optimum_mla.calibrate.text import token_windows
    from optimum_mla.measure.memory import PeakMemory
    from optimum_mla.measure.quality import perplexity
    from optimum_mla.recovery.data import pack
    from optimum_mla.recovery.recipe import Recipe, training_arguments

    path = ROOT / config["model"]
    length = config["row_tokens"]
    rows = pack(None, ids, length)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.k_proj.requires_grad_(True)
        layer.self_attn.v_proj.requires_grad_(True)
    windows = token_windows(AutoTokenizer.from_pretrained(path), path / "evaluation.txt", length)
    before = perplexity(model, windows)
    training = {**config["training"], **case.get("training", {})}
    options = training_arguments(Recipe(objective="sft", train="kv"), training, output, len(rows), length, 1)
    options["save_strategy"] = "no"
    trainer = Trainer(model=model, args=TrainingArguments(**options), train_dataset=rows)
    peak = PeakMemory(model.device)
    peak.reset()
    trainer.train()
    peak_bytes = peak.bytes()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "perplexity_source": before,
        "perplexity_converted": before,
        "perplexity_recovered": perplexity(model, windows),
        "last_losses": losses[-5:],
        "trainable_parameters": trained,
        "trainable_percent": 100 * trained / model.num_parameters(),
        "peak_memory_mb": peak_bytes / 1e6,
    }


def train(case: dict[str, Any], model: Path, ids: list[int], config: dict[str, Any], output: Path) -> dict[str, Any]:
    """Run `finetune` once and return what was measured."""
    from optimum_mla.pipeline import TextOptions, finetune
    from optimum_mla.recovery.recipe import Recipe
    from optimum_mla.report.render import closed_share

    length = config["row_tokens"]
    recipe = Recipe(sequence_length=length, train_tokens=case["tokens"], **case["recipe"])
    evaluation = None if "random_model" in config else str(texts_of(config) / "evaluation.txt")
    texts = TextOptions(eval_data=evaluation, eval_length=length, eval_samples=config.get("evaluation_windows", 10**6))
    # The last step is measured, because the text that chose the best one would flatter it.
    training = {**config["training"], **case.get("training", {}), "load_best_model_at_end": False}
    report = finetune(str(model), output, ids, recipe, training, texts, overwrite=True)
    if report is None:
        raise RuntimeError("a process of its own measures nothing")
    share = closed_share(report)
    return {
        "perplexity_source": report.perplexity_source,
        "perplexity_converted": report.perplexity_converted,
        "perplexity_recovered": report.perplexity_recovered,
        "percent_of_excess_closed": None if share is None else 100 * share,
        "last_losses": [entry["loss"] for entry in report.losses][-5:],
        "trainable_parameters": report.trainable_parameters,
        "trainable_percent": report.trainable_percent,
        "seconds": report.seconds,
        "peak_memory_mb": report.peak_memory_bytes / 1e6,
    }


def run(config: dict[str, Any], corpus: Path | None, workers: int) -> list[dict[str, Any]]:
    """Run everything in the config, each run in a process of its own, so that its peak memory is its own."""
    most, length = max(case["tokens"] for case in config["runs"]), config["row_tokens"]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        if corpus is None:
            random_model(config["random_model"], place / "random")
            config = {**config, "model": str(place / "random")}
            ids = [token % config["random_model"]["vocab_size"] for token in range(most)]
        else:
            ids = token_rows(corpus, config, most)
        folders = {"source": place / "source"}
        for name in dict.fromkeys(case["conversion"] for case in config["runs"]):
            if name != "source":
                folders[name] = place / f"model-{len(folders)}"
                make_conversion(name, config["conversions"][name], config, folders[name])

        def one(numbered: tuple[int, dict[str, Any]]) -> dict[str, Any]:
            number, case = numbered
            data = place / f"ids-{number}.json"
            step = most // case["tokens"]  # a run with fewer tokens also takes evenly spaced rows
            rows = [ids[start : start + length] for start in range(0, most, step * length)]
            data.write_text(json.dumps([token for row in rows for token in row]), encoding="utf-8")
            output = place / f"out-{number}"
            content = {"case": case, "model": str(folders[case["conversion"]]), "data": str(data), "config": config}
            command = [
                sys.executable,
                "-m",
                "benchmarks.recovery",
                "--case",
                json.dumps({**content, "output": str(output)}),
            ]
            threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **threads})
            if done.returncode:
                raise RuntimeError(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            shutil.rmtree(output, ignore_errors=True)
            closed = found.get("percent_of_excess_closed")
            source, converted, recovered = (
                found[f"perplexity_{name}"] or math.nan for name in ("source", "converted", "recovered")
            )
            excess = None if corpus is None else math.log(recovered / source)
            print(
                f"{case['conversion']:26} {case['label']:18} {case['tokens']:8} tokens "
                f" {source:.3f} -> {converted:.3f} -> {recovered:.3f}  closed {closed or math.nan:.1f} %"
                f"  trained {found['trainable_percent']:.1f} %  peak {found['peak_memory_mb']:.0f} MB",
                flush=True,
            )
            return {**case, **found, "excess_log_perplexity": excess}

        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(one, enumerate(config["runs"])))


def main() -> None:
    """Run the config and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--config", type=Path, default=CONFIGS / "recovery.json")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--workers", type=int, default=2, help="Runs at a time; they share the cores.")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        content = json.loads(arguments.case)
        ids = json.loads(Path(content["data"]).read_text(encoding="utf-8"))
        work = train_source if content["case"]["conversion"] == "source" else train
        found = work(content["case"], Path(content["model"]), ids, content["config"], Path(content["output"]))
        print(json.dumps(found))
        return
    config = json.loads(arguments.config.read_text(encoding="utf-8"))
    if "random_model" not in config and (arguments.corpus is None or not any(arguments.corpus.glob("*.txt"))):
        parser.error("--corpus: name a folder of .txt books")
    runs = run(config, arguments.corpus, arguments.workers)
    save_result(arguments.output or RESULTS / arguments.config.name, config, runs=runs)


if __name__ == "__main__":
    main()
