"""Write the committed results into the tables of the README and of the docs.

    make tables

A page holds a pair of HTML comments for each block, `<!-- results: NAME -->` and `<!-- end of results -->`. What is
between them is rendered from `benchmarks/results/*.json` by the function NAME of this file, so that no number is copied
by hand. `tests/benchmarks/test_tables.py` checks that the pages are up to date.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.result import RESULTS, ROOT

BLOCK = re.compile(r"<!-- results: (\w+) -->\n.*?<!-- end of results -->", re.DOTALL)
WIDTH = 120
"""Characters in a line of generated prose."""
SMALL_CACHES = (0.25, 0.125, 0.0625)
"""Shares of the cache at which codes are compared with 16 bits on the small models."""
VISIBLE_NATS = 0.005
"""Losses of single trainings that differ by less are not told apart."""


def result(name: str) -> dict[str, Any]:
    """Return the content of a result file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [list(header), ["---"] * len(header), *[list(row) for row in rows]]
    rule = "|".join(["", *lines[1], ""])
    return "\n".join([_line(lines[0]), rule, *(_line(row) for row in lines[2:])])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def llama_cpp() -> str:
    """Return the table of SmolLM2 in llama.cpp beside the converted model in Transformers."""
    found = result("llama_cpp")
    source, own = found["source"], found["converted"]
    rows = [
        [
            f"{name}, Transformers",
            f"16 bit: {about['cache_bytes_per_token']:,}",
            f"{about['perplexity']:.2f}",
            f"{about['largest_logit_difference']:.1g}" if about is own else "",
            "",
            "",
        ]
        for name, about in (("source", source), ("converted", own))
    ]
    rows += [
        [
            f"llama.cpp, file {run['file']} ({run['file_bytes'] / 1e6:.0f} MB)",
            f"{run['cache']}: {run['cache_bytes_per_token']:,.0f}",
            f"{run['perplexity']:.2f}",
            f"{run['largest_logit_difference']:.1g}",
            f"{run['same_greedy_tokens']} of {found['config']['new_tokens']}",
            "yes" if run["same_answer"] else "no",
        ]
        for run in found["runs"]
    ]
    header = (
        *("", "cache, bytes per token", "perplexity, books"),
        *("largest logit difference", "same greedy tokens", "same answer in a chat"),
    )
    return table(header, rows)


ALL_LAYERS = "all-layers-"
"""Beginning of the names of caches with axes of all layers together."""


def engines() -> str:
    """Return the table of engines, with what was run of each and what was measured."""
    coded = next(row for row in result("exact_model")["rows"] if row.get("name") == "codes-12")
    source_bytes = result("llama_cpp")["source"]["cache_bytes_per_token"]
    exported = max(
        (run for run in result("export")["runs"] if run["dtype"] == "float32" and "largest_logit_difference" in run),
        key=lambda run: run["largest_logit_difference"],
    )
    runs = {(run["file"], run["cache"]): run for run in result("llama_cpp")["runs"]}
    exact, half, small = runs["f32", "f32"], runs["f32", "f16"], runs["f32", "q8_0"]
    moved = sorted(text["divergence"] for text in coded["texts"].values())
    same = min(text["same_guess_percent"] for text in coded["texts"].values())
    rows = [
        (
            *("Transformers with optimum-mla", "native, codec, all forms", "all tests of this project"),
            f"SmolLM2, {coded['bytes_per_old_token']:,} bytes for an old token instead of {source_bytes:,}: "
            f"predictions move by {moved[0]:.3f} to {moved[-1]:.3f} nats by kind of text, and at least {same:.1f} % of "
            "the first guesses stay",
            "`make bench-exact-model`",
        ),
        (
            *("`transformers serve`, `transformers chat`", "native, codec or 16 bits"),
            *("answers whole, streamed, several at a time", "the text that `generate` gives"),
            "`transformers serve CONVERTED --trust-remote-code`",
        ),
        (
            *("Transformers", "`deepseek_v3`", "logits; generation with dynamic, static and quantized caches"),
            f"in float32, logits of up to {exported['largest_logit']:.0f} differ by at most "
            f"{exported['largest_logit_difference']:.0e}",
            "`make bench-export`",
        ),
        (
            *("llama.cpp", "GGUF", "logits, greedy tokens, chat, tokenizers, caches, further types of files"),
            f"SmolLM2 in float32: logits differ by at most {exact['largest_logit_difference']:.0e}; "
            f"{half['cache_bytes_per_token']:,.0f} bytes a token in f16, {small['cache_bytes_per_token']:,.0f} in q8_0",
            "`make bench-llama-cpp`",
        ),
        (
            *("vLLM, Transformers backend", "`--latent-norm --pad-to 512+64` (or `256+64`)"),
            *("nothing, only read", "-", "`vllm serve EXPORT --model-impl transformers`"),
        ),
        ("vLLM, SGLang, own models", "`--latent-norm`, in the shapes of their kernels", "nothing, only read", "-", "-"),
        ("FlashMLA kernels", "`--latent-norm`, 512 + 64", "nothing, only read", "-", "-"),
        ("FlashInfer kernels", "`--latent-norm`, 512 or 256, + 64", "nothing, only read", "-", "-"),
    ]
    return table(("engine", "form", "what was run", "what was measured", "command"), rows)


def families() -> str:
    """Return the table of families, with what was run of each."""
    found = result("families")
    rows = []
    for name, family in found["families"].items():
        kind, variant = family["model_type"], name.removeprefix(family["model_type"]).lstrip(", ")
        about = variant or family["about"].strip().rstrip(".")
        exact = [f"{family['float32']:.0e}", "-" if family["float64"] is None else f"{family['float64']:.0e}"]
        export = "yes" if family["no_export"] is None else f"no: {family['no_export']}"
        rows.append([f"`{kind}`", about, *exact, f"{family['forms']}", export])
    return table(["`model_type`", "", "float32", "float64", "forms", "`deepseek_v3` export"], rows)


def prose(text: str) -> str:
    """Return a paragraph in lines of at most `WIDTH` characters."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def headline() -> str:
    """Return the README's first sentence: cache and perplexity before and after at a quarter of the cache."""
    found = result("conversion")
    (run,) = [
        run
        for run, asked in zip(found["runs"], found["config"]["runs"], strict=True)
        if asked == {"method": "gqa2mla", "kv-cache-ratio": 0.25}
    ]
    return prose(
        f"**A quarter of the KV cache, before any training: {run['source_cache_bytes_per_token']:.0f} → "
        f"{run['cache_bytes_per_token']:.0f} bytes per token in the live cache, perplexity "
        f"{run['perplexity_before']:.2f} → {run['perplexity_after']:.2f}** (GQA2MLA on the embedded reference model, "
        f"{found['machine']})."
    )


def quality() -> str:
    """Return the excess log-perplexity of each method on the three small models, mean over the seeds."""
    found = result("quality")
    excess: dict[tuple[str, str, float], list[float]] = {}
    for run in found["runs"]:
        if run["part"] == "methods" and "impossible" not in run:
            excess.setdefault((run["label"], run["model"], run["ratio"]), []).append(run["excess_log_perplexity"])
    labels = (
        "GQA2MLA as published",
        "MHA2MLA as published",
        "X-EcoMLA as published",
        "GQA2MLA decoupled, cached",
        "GQA2MLA full",
        "GQA2MLA decoupled, rebuilt",
    )

    def cell(label: str, model: str, ratios: Sequence[float] = (0.5, 0.25)) -> str:
        found = (excess[label, model, ratio] for ratio in ratios)
        return " / ".join(f"{sum(values) / len(values):.3f}" for values in found)

    models = found["config"]["models"]
    rows = [(label, *(cell(label, model) for model in models)) for label in labels]
    kinds = ("grouped-query", "multi-head", "Qwen3-like")
    shown = table(("excess at 50 / 25 %", *kinds), rows)
    label = "GQA2MLA decoupled, rebuilt"
    small = [("excess, latents in 16 bits", *(cell(label, model, SMALL_CACHES) for model in models))]
    coded = result("exact_model")["small"]
    for name, key, digits in (("divergence", "divergence", 5), ("same guess, %", "same_guess_percent", 1)):
        of = {(row["model"], row["kv_cache_budget"]): row[key] for row in coded}
        cells = (" / ".join(f"{of[model, ratio]:.{digits}f}" for ratio in SMALL_CACHES) for model in models)
        small.append((f"{name}, codes of old tokens", *cells))
    header = " / ".join(f"{100 * ratio:g}" for ratio in SMALL_CACHES)
    return "\n\n".join(
        [
            shown,
            table((f"at {header} %", *kinds), small),
            prose(f"Measured by `make bench-quality` on {found['machine'].split(',')[0]}, one thread for each run."),
        ]
    )


def conversion() -> str:
    """Return what `mla-convert` makes of the reference model: the size of the cache and the perplexity."""
    found = result("conversion")
    rows = []
    for asked, run in zip(found["config"]["runs"], found["runs"], strict=True):
        extra = [f"--{name} {value}" for name, value in asked.items() if name not in ("method", "kv-cache-ratio")]
        rows.append(
            (
                f"`{' '.join([asked['method'], *extra])}`",
                f"{run['cache_percent_of_source']:g} %",
                f"{run['cache_bytes_per_token']:.0f}",
                f"{run['perplexity_after']:.2f}",
            )
        )
    first = found["runs"][0]
    seconds = [run["conversion_seconds"] for run in found["runs"]]
    return "\n\n".join(
        [
            prose(
                "End to end with `mla-convert` on the grouped-query model in bfloat16 (source: "
                f"{first['source_cache_bytes_per_token']:.0f} bytes per token, perplexity "
                f"{first['perplexity_before']:.2f}), by `make bench-conversion`:"
            ),
            table(("method", "cache", "bytes per token", "perplexity"), rows),
            prose(f"A conversion took {min(seconds):.0f} to {max(seconds):.0f} seconds on {found['machine']}."),
        ]
    )


def decode() -> str:
    """Return the speed of one decoding step beside the source model, by shape, latent and kind of cache."""
    found = result("decode")
    runs = {(run["shape"], run["latent"], run["variant"], run["context"]): run for run in found["runs"]}
    shown = (
        ("Llama-2-7B slice", "512 + 64"),
        ("Llama-2-7B slice", "512, rebuilt 64"),
        ("Llama-3.2-1B slice", "128 + 32"),
    )
    rows = []
    for shape, latent in shown:
        source = runs[shape, "-", "source", 32768]
        for variant in ("absorbed", "int4 hqq"):
            short, long = (runs[shape, latent, variant, context] for context in (8192, 32768))
            rows.append(
                (
                    f"{shape}, {latent}, {variant}",
                    f"{100 * long['cache_mb'] / source['cache_mb']:.1f} %",
                    f"{short['core_speedup']:.1f} / {long['core_speedup']:.1f}",
                    f"{short['model_speedup']:.1f} / {long['model_speedup']:.1f}",
                )
            )
    early = runs["Llama-3.2-1B slice", "128 + 32", "absorbed", 1024]["core_speedup"]
    return "\n\n".join(
        [
            prose(
                "One step at long context beside the source with its `DynamicCache`, in bfloat16, by "
                f"`make bench-decode` on {found['machine']}. The attention core is what lies between the projections; "
                '"whole" is the slice of 2 or 4 layers with a small vocabulary. At 1k tokens latents save memory but '
                f"not time beside few key heads: there the core is {early:.1f} times as fast."
            ),
            table(("slice, latent", "cache at 32k", "core at 8k / 32k, times as fast", "whole"), rows),
        ]
    )


def cache_quality() -> str:
    """Return what the 4-bit latent costs in perplexity with each library where every token is quantized."""
    costs = {}
    for backend in ("hqq", "quanto"):
        wanted = {"kv_cache_ratio": 0.5, "bits": 4, "backend": backend, "residual_length": 0}
        (run,) = [
            run for run in result("cache_quality")["runs"] if wanted.items() <= run.items() and "group_size" not in run
        ]
        costs[backend] = run["percent_over_unquantized"]
    return prose(
        f"The latent in 4 bits costs {costs['hqq']:+.2f} % perplexity with HQQ and {costs['quanto']:+.2f} % with "
        "Quanto where every token is quantized (half the cache kept, token by token through the live cache, "
        "`make bench-cache-quality`)."
    )


def recovered() -> str:
    """Return the share of the excess log-perplexity that distillation on 2 M tokens closes, in a sentence."""
    runs = {run["recipe"]["train"]: run for run in result("recovery_2m")["runs"]}
    return prose(
        "Distilled from its source on 2 M tokens of books, the reference model at a quarter of its cache gets back "
        f"{runs['full']['percent_of_excess_closed']:.1f} % of its excess log-perplexity where everything trains, and "
        f"{runs['lora']['percent_of_excess_closed']:.1f} % where only adapters on the latent projections do, "
        f"{runs['lora']['trainable_percent']:.1f} % of the parameters (`make bench-recovery-2m`, "
        "[more](recover.md))."
    )


def recovery_2m() -> str:
    """Return the perplexities before and after distillation on 2 M tokens, by what trains."""
    rows = [
        (
            f"`{run['recipe']['train']}`",
            f"{run['trainable_percent']:.1f} %",
            ", ".join(f"{run[f'perplexity_{name}']:.2f}" for name in ("source", "converted", "recovered")),
            f"{run['percent_of_excess_closed']:.1f} %",
        )
        for run in result("recovery_2m")["runs"]
    ]
    return table(("trains", "parameters", "perplexity: source, converted, recovered", "closed"), rows)


def large() -> str:
    """Return the time and memory of conversions of models with layers of Llama-2-7B's shape."""
    found = result("large")
    rows = []
    for run in found["runs"]:
        stages = {stage["name"]: stage["seconds"] for stage in run["stages"]}
        rows.append(
            (
                str(run["layers"]),
                f"{run['weight_bytes'] / 1e9:.1f}",
                f"{stages['convert'] / run['layers']:.0f}",
                f"{run['seconds'] / 60:.0f}",
                f"{run['peak_memory_bytes'] / 1e9:.1f}",
            )
        )
    header = ("layers", "weights, GB", "conversion, seconds a layer", "all in all, minutes", "peak memory, GB")
    asked = found["config"]
    text = prose(
        f"{asked['windows']} windows of {asked['window_tokens']} tokens, by an earlier version, whose budgets of bytes "
        "rewrote the weights: an eighth of the bytes, no refits; "
        f"{found['machine']}, with other work on it (`make bench-large`)."
    )
    return f"{table(header, rows)}\n\n{text}"


def large_computed() -> str:
    """Return the memory that is predicted for conversions of other models with default options."""
    rows = [
        (name, f"{one['weight_bytes'] / 1e9:.1f}", f"{one['memory_bytes'] / 1e9:.1f}")
        for name, one in result("large")["computed"].items()
    ]
    return table(("model of Llama's shapes", "weights, GB", "memory, GB"), rows)


def recovery_runs() -> dict[tuple[str, str], dict[str, Any]]:
    """Return the runs of the recovery experiment by conversion and label."""
    return {(run["conversion"], run["label"]): run for run in result("recovery")["runs"]}


def recovery_grid() -> str:
    """Return the percentage of the excess closed, by what trains, objective and cache."""
    runs = recovery_runs()
    rows = []
    for train in ("lora", "kv", "attention", "full"):
        cells = [
            f"{runs[cache, f'{objective}, {train}']['percent_of_excess_closed']:.1f}"
            for cache in ("25 %", "12.5 %")
            for objective in ("distill", "sft")
        ]
        share = runs["25 %", f"distill, {train}"]["trainable_percent"]
        rows.append((f"`{train}`", f"{share:.1f} %", *cells))
    header = ("trains", "parameters at 25 %", "distill, 25 %", "sft, 25 %", "distill, 12.5 %", "sft, 12.5 %")
    return table(header, rows)


def yes(holds: bool) -> str:
    """Return whether a claim holds, in a word."""
    return "yes" if holds else "no"


def recovery_claims() -> str:
    """Return what the papers claim about training, with the measured numbers."""
    runs = recovery_runs()
    starts = {
        start: [runs[f"X-EcoMLA 25 %, {start}", f"{how}, full"]["perplexity_recovered"] for how in ("distill", "sft")]
        for start in ("random", "SVD", "calibrated")
    }
    keys = (("100 %, SVD", "sft, kv"), ("source", "sft, W_K and W_V"), ("100 %, identity", "sft, kv"))
    svd, source, identity = (sum(runs[key]["last_losses"]) / len(runs[key]["last_losses"]) for key in keys)
    held_out = [runs[key]["perplexity_recovered"] for key in (keys[0], keys[2])]
    random, calibrated = starts["random"][0], starts["calibrated"][0]
    against = ", ".join(f"{distill:.1f} / {sft:.1f}" for distill, sft in starts.values())
    rows = (
        (
            "X-EcoMLA: an SVD start beats a random one",
            f"{yes(starts['SVD'][0] < random)}: perplexity {starts['SVD'][0]:.1f} against {random:.1f} at equal "
            f"tokens, from a calibrated start {calibrated:.1f}",
        ),
        (
            "X-EcoMLA: KL to a teacher beats cross-entropy",
            f"{yes(all(distill < sft for distill, sft in starts.values()))}, from these three starts: {against}",
        ),
        (
            "TransMLA: a converted model trains to a lower loss than its source with only W_K and W_V trained",
            f"{yes(svd < source)}: {svd:.3f} against {source:.3f}, mean of the last five logs",
        ),
        (
            "TransMLA: orthogonal decomposition beats identity expansion",
            f"{'not visibly' if abs(svd - identity) < VISIBLE_NATS else yes(svd < identity)}: {svd:.4f} against "
            f"{identity:.4f}; on the held-out book {held_out[0]:.2f} against {held_out[1]:.2f}",
        ),
    )
    return table(("claim", "found"), rows)


def teacher_memory() -> str:
    """Return the peak memory of trainings with and without a teacher, in a sentence."""
    peak = {run["label"]: f"{run['peak_memory_mb'] / 1e3:.2f} GB" for run in result("recovery_memory")["runs"]}
    return prose(
        f"A teacher of equal size adds little memory: full distillation peaked at {peak['distill, full']} where plain "
        f"fine-tuning did at {peak['sft, full']}, adapters at {peak['distill, lora']} against {peak['sft, lora']} "
        "(`make bench-recovery-memory`: a model of 98 M parameters with random weights, batches of 2048 tokens)."
    )


def memory() -> str:
    """Return the bytes per token of each cache, and the live bytes of 16,384 tokens beside the predicted ones."""
    found = result("memory")
    names = {("baseline", "default"): "source", ("model", "default"): "16-bit latent"}
    whole = found["budget"][0]["cache_bytes_per_token"]
    cells = {(row["role"], row["cache"]): row for row in found["memory"] if row["context_tokens"] == 16384}
    rows = []
    for fits in found["budget"]:
        key = fits["role"], fits["cache"]
        rows.append(
            (
                names.get(key, fits["cache"]),
                f"{fits['cache_bytes_per_token']:.0f}",
                f"{100 * fits['cache_bytes_per_token'] / whole:.1f}",
                f"{cells[key]['live_cache_bytes'] / 1e6:.2f}",
                f"{cells[key]['live_percent_of_predicted']:.1f}",
            )
        )
    header = ("cache", "bytes per token", "% of the source's", "live at 16,384 tokens, MB", "live / predicted, %")
    return table(header, rows)


def export() -> str:
    """Return what the forms that engines run cost in perplexity, and how far an export is from its original."""
    rows = []
    options = {
        "rotary frequencies by layer": "`--rope-cache cached`",
        "shared": "`--rope-cache cached --shared-rope`",
        "shared, latent norm": "`--rope-cache cached --shared-rope --latent-norm`",
        "shared, latent norm at the export": "`--rope-cache cached --shared-rope`, then `mla-export --latent-norm`",
    }
    for run in result("export")["runs"]:
        exported = run.get("perplexity_exported")
        difference = run.get("largest_logit_difference")
        rows.append(
            (
                options[run["form"]],
                run["dtype"],
                f"{run['perplexity_source']:.2f}",
                f"{run['perplexity_converted']:.2f}",
                "-" if exported is None else f"{exported:.2f}",
                "-" if difference is None else f"{difference:.1e}",
            )
        )
    return table(("form", "dtype", "source", "converted", "exported", "largest logit difference of the export"), rows)


def _rises(row: dict[str, Any], whole: dict[str, float]) -> list[str]:
    """Return by how many percent the perplexity of a row is above that of the source, for every text."""
    return [f"{100 * (value / whole[name] - 1):+.1f} %" for name, value in row["perplexity"].items()]


def _named(row: dict[str, Any]) -> str:
    """Return the name of a row of the experiment on the real model: who stores what."""
    if "series" in row:
        return row["series"] + ("" if row["cache"] == "16bit" else f", latent in {row['cache']}")
    return f"unconverted, {row['cache']}" + (f", first {row['sinks']} tokens in 16 bits" if row["sinks"] else "")


def real_quality_all() -> str:
    """Return every row of the experiment on the real model, the largest cache first."""
    found = result("real_quality")
    whole = found["source"][0]["perplexity"]
    header = ("cache", "% of the source's bytes", *(f"perplexity, {name}" for name in whole))
    sides = []
    for rows in (found["source"][1:], found["ours"]):
        ordered = sorted(rows, key=lambda row: -row["percent"])
        sides.append(table(header, [(_named(row), f"{row['percent']:.1f}", *_rises(row, whole)) for row in ordered]))
    tokens = ", ".join(f"{count:,} of {name}" for name, count in found["tokens"].items())
    return "\n\n".join(
        [
            sides[0],
            sides[1],
            prose(f"Measured by `make bench-real-quality` on {tokens}, {found['machine']}."),
        ]
    )


def real_conversion() -> str:
    """Return the time and memory of each stage of the conversions of the real model."""
    found = result("real_quality")
    runs = [row for row in found["ours"] if "conversion" in row]
    names = [stage["name"] for stage in runs[0]["conversion"]["stages"]]
    rows = []
    for row in runs:
        stages = {stage["name"]: stage for stage in row["conversion"]["stages"]}
        peaks = [stage["peak_bytes"] for stage in stages.values() if stage["peak_bytes"] is not None]
        peak = f"{max(peaks) / 1e9:.1f}" if peaks else "-"
        rows.append((f"`{row['name']}`", *(f"{stages[name]['seconds']:.0f}" for name in names), peak))
    return table(("conversion", *(f"{name}, s" for name in names), "peak, GB"), rows)


ABILITIES = (
    ("needle_1k", "exact_match", "one number in 1k tokens"),
    ("needle_2k", "exact_match", "in 2k"),
    ("needle_4k", "exact_match", "in 4k"),
    ("needle_8k", "exact_match", "in 8k"),
    ("needles_1k", "exact_match", "one of eight numbers in 1k"),
    ("needles_2k", "exact_match", "in 2k"),
    ("needles_4k", "exact_match", "in 4k"),
    ("needles_8k", "exact_match", "in 8k"),
    ("lookup_50", "exact_match", "a name in a list of 50"),
    ("lookup_200", "exact_match", "in a list of 200"),
    ("copying", "same_words", "16 words copied"),
    ("copying_later", "same_words", "8 words copied, 400 tokens later"),
    ("last_word", "acc", "last word of a passage"),
    ("agreement", "exact_match", "the source's answer, word for word"),
    ("agreement", "same_words", "its words before the first other one"),
)
"""The rows of the table of abilities: task, metric, and what the page calls them."""


def real_abilities() -> str:
    """Return what each model and cache answers right, in percent with standard errors."""
    cells: dict[tuple[str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for run in result("real_abilities")["runs"]:  # Some tasks were measured in runs of their own.
        found = {(row["task"], row["metric"]): row for row in run["metrics"]}
        cells.setdefault((run["model"], run["cache"]), {}).update(found)
    rows = []
    for task, metric, name in ABILITIES:
        measured = [side.get((task, metric)) for side in cells.values()]
        shown = ["-" if row is None else f"{100 * row['value']:.1f} ± {100 * row['stderr']:.1f}" for row in measured]
        rows.append((name, str(next((row["documents"] for row in measured if row), "-")), *shown))
    names = [model if cache in ("16bit", "codes") else f"{model}, {cache}" for model, cache in cells]
    return table(("% right", "questions", *names), rows)


def real_depths() -> str:
    """Return how often a single number is found at each depth of the text, over all lengths."""
    runs = result("real_abilities")["runs"]
    found = {
        (run["model"], run["cache"]): {
            row["task"].removeprefix("needle at "): row["value"]
            for row in run["metrics"]
            if row["task"].startswith("needle at ")
        }
        for run in runs
        if any(row["task"].startswith("needle at ") for row in run["metrics"])
    }
    depths = list(next(iter(found.values())))
    rows = [
        (model if cache == "16bit" else f"{model}, {cache}", *(f"{100 * values[depth]:.1f}" for depth in depths))
        for (model, cache), values in found.items()
        if len(values) == len(depths)
    ]
    return table(("% found, at a depth of", *depths), rows)


def _ratio(value: float | None) -> str:
    """Return a ratio to the baseline, which is 1 for the baseline itself."""
    return "1" if value is None else f"{value:.2f}"


def real_speed() -> str:
    """Return the speed of the real model beside its source, and the bytes of both caches, by context."""
    rows = []
    for run in result("real_speed")["runs"]:
        memory = {((row["role"], row["cache"]), row["context_tokens"]): row for row in run["memory"]}
        for row in run["speed"]:
            key = row["role"], row["cache"]
            held = memory[key, row["context_tokens"]]
            if key[0] == "baseline":
                name = "unconverted" if key[1] == "default" else f"unconverted, {key[1]}"
            else:
                name = f"`{run['name']}`"
            rows.append(
                (
                    run["dtype"],
                    f"{row['context_tokens']:,}",
                    name,
                    f"{held['live_cache_bytes'] / 1e6:.1f}",
                    f"{row['prefill_tokens_per_second']:.0f}",
                    _ratio(row["prefill_ratio_to_baseline"]),
                    f"{row['decode_tokens_per_second']:.1f}",
                    _ratio(row["decode_ratio_to_baseline"]),
                )
            )
    header = (
        "computed in",
        "context",
        "model and cache",
        "live cache, MB",
        "prompt, tokens/s",
        "ratio",
        "decoding, tokens/s",
        "ratio",
    )
    return table(header, rows)


def fidelity() -> str:
    """Return how far the predictions of the real model move on running text and on passages read twice."""
    found = result("fidelity")
    sides = []
    for kind, told in (("windows", "windows of {:,}"), ("read_twice", "read again, {:,}")):
        sets = [one for one in found["measured"] if one["kind"] == kind]
        header = ("divergence / excess, nats", *(f"{one['text']}, {told.format(one['tokens'])}" for one in sets))
        rows = []
        for number, row in enumerate(found["config"]["rows"]):
            cells = (one["rows"][number] for one in sets)
            shown = _named(row) if "cache" in row else f"`{row['model']}`"
            rows.append((shown, *(f"{cell['divergence']:.3f} / {cell['excess']:.3f}" for cell in cells)))
        sides.append(table(header, rows))
    return "\n\n".join([*sides, prose(f"Measured by `make bench-fidelity` on {found['machine']}.")])


def coded_summary() -> str:
    """Return what the README shows of codes beside the source's own quantized caches."""
    found = result("exact_model")
    names = list(found["rows"][0]["texts"])
    rows = []
    for row in sorted(found["rows"], key=lambda row: -row["percent_at_4096_tokens"]):
        if "gain_groups" in row:
            continue
        told, share = f"its own {row['cache'].split('-first')[0]} cache", row["percent_at_4096_tokens"]
        if row["cache"].startswith(ALL_LAYERS):
            told = all_layers_name(row["cache"])
        if row["cache"] == "codes":
            told = codes_name(row) if "after" in row else f"**{codes_name(row)}**"
        cells = (f"{text['divergence']:.4f} ({text['same_guess_percent']:.1f} %)" for text in row["texts"].values())
        rows.append((told, f"{share:.1f} %", *cells))
    header = ("SmolLM2-135M-Instruct", "cache of 4,096 tokens", *names)
    return table(header, rows)


def all_layers_name(cache: str) -> str:
    """Return what the tables call a cache with axes of all layers together."""
    return f"axes of all layers after KVTC, {cache.removeprefix(ALL_LAYERS)} %, no entropy coding"


def codes_name(row: dict[str, Any]) -> str:
    """Return what the tables call a codec."""
    budget = f"{100 * row['kv_cache_budget']:g} %"
    if "after" in row:
        return f"bits by attention after {row['after']}, {budget}, no entropy coding"
    groups = {0: ", no gains"}.get(
        row.get("gain_groups", 8), f", {row.get('gain_groups')} gains" * ("gain_groups" in row)
    )
    return f"codes, budget {budget}{groups}"


def exact_model() -> str:
    """Return how far predictions move with the weights left alone, the largest cache first."""
    found = result("exact_model")
    names = list(found["rows"][0]["texts"])
    header = ("cache", "live", "4,096 tokens", *(f"{name}: divergence / same guess" for name in names))
    rows = []
    for row in sorted(found["rows"], key=lambda row: -row["percent"]):
        told = row["cache"].replace("-first4", ", first 4 exact")
        if told == "codes":
            told = codes_name(row)
        if told.startswith(ALL_LAYERS):
            told = all_layers_name(told)
        long = f"{row['percent_at_4096_tokens']:.1f} %" if "percent_at_4096_tokens" in row else "-"
        cells = (f"{text['divergence']:.4f} / {text['same_guess_percent']:.1f} %" for text in row["texts"].values())
        rows.append((told, f"{row['percent']:.1f} %", long, *cells))
    long = found["config"]["long"]
    columns = (f"{name}: divergence / same guess" for name in found["long"][0]["texts"])
    long_header = (f"after {long['prompt_tokens']:,} tokens", "live", *columns)
    far = []
    for row in found["long"]:
        line = next((line for line in found["config"]["codecs"] if line["name"] == row["cache"]), None)
        told = row["cache"].replace("-first4", ", first 4 exact") if line is None else codes_name(line)
        cells = (f"{text['divergence']:.4f} / {text['same_guess_percent']:.1f} %" for text in row["texts"].values())
        far.append((told, f"{row['percent']:.1f} %", *cells))
    measured = prose(f"Measured by `make bench-exact-model` on {found['machine']}.")
    return "\n\n".join([table(header, rows), table(long_header, far), measured])


BLOCKS: dict[str, Callable[[], str]] = {
    made.__name__: made
    for made in (
        headline,
        quality,
        conversion,
        decode,
        cache_quality,
        recovered,
        recovery_2m,
        recovery_grid,
        recovery_claims,
        teacher_memory,
        memory,
        export,
        real_quality_all,
        real_conversion,
        real_abilities,
        real_depths,
        fidelity,
        real_speed,
        large,
        large_computed,
        families,
        llama_cpp,
        engines,
        exact_model,
        coded_summary,
    )
}
"""The functions that render blocks, by the names that pages use."""


def pages() -> list[Path]:
    """Return the pages that may hold blocks."""
    return [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rendered(text: str) -> str:
    """Return the text of a page with its blocks rendered anew.

    Raises:
        KeyError: A block has a name that this file does not render.
    """
    return BLOCK.sub(
        lambda found: f"<!-- results: {found[1]} -->\n\n{BLOCKS[found[1]]()}\n\n<!-- end of results -->", text
    )


def main() -> None:
    """Render the blocks of all pages and say which pages changed."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := rendered(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
