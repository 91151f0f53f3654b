"""Measure the quality before any training at several cache sizes, by method, form, model and calibration seed.

    python -m benchmarks.quality [--config ...] [--output ...] [--plot docs/quality.png] [--workers 2]

Every run converts in a new process with one thread, so that its peak memory is its own. A seed draws the calibration
windows. Quality is the excess log-perplexity ln(after / before) on text that neither the models nor the calibration
have seen. A run measures what its result lacks, for example after lines were added to the config; delete the result to
measure everything again. `--plot-only` draws the plot of a committed result again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.result import CONFIGS, RESULTS, ROOT, earlier, save_result


def expand(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every run of the config with its model, label, method, options, ratio, seed and calibration windows.

    A line of the config may name its own models and ratios, and the option of which the ratio is the value.
    """
    for model in config["models"]:
        for line in config["lines"]:
            if model not in line.get("models", config["models"]):
                continue
            for seed in line["seeds"]:
                for ratio in line.get("ratios", config["ratios"]):
                    yield {"part": "methods", "model": model, **line, "seed": seed, "ratio": ratio}
    ablations = config["ablations"]
    for line in ablations["lines"]:
        for ratio in ablations["ratios"]:
            fixed = {"part": "ablations", "model": ablations["model"], "method": ablations["method"], "seed": 0}
            yield {**fixed, **line, "ratio": ratio}


def run(spec: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Convert and measure one run in this process, and return what was found."""
    import time

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from optimum_mla.calibrate.text import token_windows
    from optimum_mla.core.errors import InvalidValueError
    from optimum_mla.measure.memory import bytes_per_token, peak_memory_bytes
    from optimum_mla.measure.quality import perplexity
    from optimum_mla.pipeline import build_transformation

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    texts = ROOT / config["texts"]
    tokenizer = AutoTokenizer.from_pretrained(texts)
    model = AutoModelForCausalLM.from_pretrained(ROOT / spec["model"], dtype=torch.float32).eval()
    calibration = draw_windows(
        tokenizer,
        texts / "calibration.txt",
        spec.get("calibration_windows", config["calibration_windows"]),
        config["calibration_length"],
        spec["seed"],
    )
    published = spec["options"].get("factorization", "calibrated") != "calibrated"
    if published and spec["options"].get("rope_selection") != "contribution":
        calibration = None
    evaluation = token_windows(tokenizer, texts / "evaluation.txt", config["evaluation_length"])
    row = {name: spec[name] for name in ("part", "model", "label", "seed", "ratio")}
    before = perplexity(model, evaluation)
    source_bytes = bytes_per_token(model, evaluation[:1, :32]).live
    start = time.perf_counter()
    try:
        options = {**spec["options"], "kv_cache_ratio": spec["ratio"]}
        transformation = build_transformation(spec["method"], options, calibration)
        converted: Any = transformation(model)
    except InvalidValueError as error:  # there is no room for the rotary key of this method
        return row | {"impossible": str(error)}
    seconds = time.perf_counter() - start
    after = perplexity(converted, evaluation)
    cache = bytes_per_token(converted, evaluation[:1, :32]).live
    return row | {
        "perplexity_before": before,
        "perplexity_after": after,
        "excess_log_perplexity": math.log(after / before),
        "cache_bytes_per_token": cache,
        "cache_share": cache / source_bytes,
        "seconds": seconds,
        "peak_memory_mb": peak_memory_bytes() / 1e6,
    }


def draw_windows(tokenizer: Any, text: Path, count: int, length: int, seed: int) -> Any:
    """Return windows at random places of the text, [count, length]."""
    import torch

    from optimum_mla.calibrate.text import token_windows

    stream = token_windows(tokenizer, text, 1).flatten()
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - length, (count,), generator=generator)
    return torch.stack([stream[start : start + length] for start in starts])


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the excess log-perplexity against the kept cache, with one panel per model; shades are ranges over seeds."""
    from matplotlib.figure import Figure

    runs = [r for r in result["runs"] if r["part"] == "methods" and "impossible" not in r]
    models = list(dict.fromkeys(r["model"] for r in runs))
    labels = list(dict.fromkeys(r["label"] for r in runs))
    figure = Figure(figsize=(4.2 * len(models), 4.2), layout="constrained")
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axis, model in zip(axes, models, strict=True):
        source = next(r for r in runs if r["model"] == model)["perplexity_before"]
        for number, label in enumerate(labels):
            points: dict[float, list[float]] = {}
            for r in runs:
                if r["model"] == model and r["label"] == label:
                    points.setdefault(r["ratio"], []).append(max(r["excess_log_perplexity"], 1e-4))
            ratios = sorted(points)
            low, high = [min(points[x]) for x in ratios], [max(points[x]) for x in ratios]
            middle = [sum(points[x]) / len(points[x]) for x in ratios]
            style = "--" if "published" in label else "-"
            axis.plot([100 * x for x in ratios], middle, style, marker="o", ms=3, color=f"C{number}", label=label)
            axis.fill_between([100 * x for x in ratios], low, high, color=f"C{number}", alpha=0.2)
        axis.set(xscale="log", yscale="log", xlabel="cache kept, % of the source's")
        axis.set_xticks([6.25, 12.5, 25, 50, 75], ["6.25", "12.5", "25", "50", "75"], minor=False)
        axis.minorticks_off()
        axis.set_title(f"{Path(model).name.removesuffix('_model')} (source {source:.1f})", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ln(perplexity after / before)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


def summary(result: dict[str, Any]) -> str:
    """Return the mean excess log-perplexity over the seeds by model and line, with one column per ratio."""
    from optimum_mla.report.render import Table

    lines = []
    groups = dict.fromkeys((r["part"], r["model"], r["label"]) for r in result["runs"])
    ratios = result["config"]["ratios"]
    for part, model, label in groups:
        cells = []
        for ratio in ratios:
            found = [
                r["excess_log_perplexity"]
                for r in result["runs"]
                if (r["part"], r["model"], r["label"], r["ratio"]) == (part, model, label, ratio)
                and "impossible" not in r
            ]
            cells.append(f"{sum(found) / len(found):.4f}" if found else "-")
        lines.append([f"{Path(model).name}: {label}", *cells])
    return str(Table(["excess log-perplexity at", *[f"{100 * ratio:g} %" for ratio in ratios]], lines))


def _key(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[name] for name in ("part", "model", "label", "seed", "ratio"))


def main() -> None:
    """Run everything, print the table, and write the result and the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "quality.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "quality.png")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--plot-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.plot_only:
        plot(json.loads(arguments.output.read_text(encoding="utf-8")), arguments.plot)
        return
    config = json.loads(arguments.config.read_text(encoding="utf-8"))
    known, measured = earlier(arguments.output, config, "lines")
    names = {line["label"] for line in config["lines"] if line not in measured}
    kept = [row for row in known.get("runs", []) if row["label"] not in names]
    found = {_key(row): row for row in kept}
    specs = [spec for spec in expand(config) if _key(spec) not in found]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["optimum_mla", "optimum_mla.pipeline", "transformers.models.qwen3.modeling_qwen3"])
    result: dict[str, Any] = known
    with context.Pool(arguments.workers, maxtasksperchild=1) as pool:
        for row in pool.imap(functools.partial(run, config=config), specs):
            found[_key(row)] = row
            shown = f"{row['excess_log_perplexity']:.4f}" if "impossible" not in row else "impossible"
            print(f"{row['model']} {row['label']} {row['ratio']} seed {row['seed']}: {shown}", flush=True)
            rows = [found[_key(spec)] for spec in expand(config) if _key(spec) in found]
            result = save_result(arguments.output, config, "one thread for each run", runs=rows)
    print(summary(result))
    plot(result, arguments.plot)


if __name__ == "__main__":
    main()
