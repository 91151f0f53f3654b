"""Measure quality against cache bytes on SmolLM2-135M-Instruct, beside the quantized caches of the unconverted model.

    python -m benchmarks.real_quality [--encyclopedia FILE] [--plot docs/real_quality.png] [--plot-only]

Excess is ln(perplexity / that of the source with its 16-bit cache). All tokens are coded, apart from the first ones
where a row says so. Books are a held-out novel, chat is the source's own greedy answers to the instructions of
`benchmarks/texts`, and the encyclopedia is the beginning of any text that is named on the command line. None of it is
calibrated on. A run measures what its result lacks: after an interruption, or when conversions were added to the
config. Delete the result to measure everything again. Conversions are kept in `benchmarks/real_conversions/` for the
other experiments; delete a folder to convert it again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.conversion import NOT_RECORDED, run_conversion
from benchmarks.result import CONFIGS, RESULTS, ROOT, earlier, save_result

CONVERSIONS = ROOT / "benchmarks" / "real_conversions"
MADE_BY = "made_by.json"
"""File in a conversion's folder that says with which options it was made."""
CONTEXT = 4096
"""Tokens from which bytes per token are computed for caches with a window of unquantized tokens."""
ANSWER_TOKENS = 64
SMALLEST = 2e-3
"""The least excess that the plot shows; what is below stands there."""


def converted(model: str, name: str, options: dict[str, Any]) -> Path:
    """Return the folder of a conversion, which is made if there is none with the same options.

    Args:
        model: Folder of the source model.
        name: Name of the folder.
        options: Long options of `mla-convert` without their dashes.
    """
    folder = CONVERSIONS / name
    made_by = folder / MADE_BY
    if made_by.is_file() and json.loads(made_by.read_text(encoding="utf-8")) == options:
        return folder
    run_conversion(model, folder, options)
    made_by.write_text(json.dumps(options), encoding="utf-8")
    return folder


def conversion_of(config: dict[str, Any], name: str) -> Path:
    """Return the folder of a conversion of this experiment, which is made where it is missing.

    Args:
        config: The config of this experiment.
        name: Name of one of its conversions.
    """
    (line,) = (line for line in config["conversions"] if line["name"] == name)
    return converted(config["model"], name, {**config["common"], **line["options"]})


def answers(model: Any, tokenizer: Any, instructions: list[str]) -> list[list[dict[str, str]]]:
    """Return chats of each instruction and the model's greedy answer to it."""
    import torch

    chats = []
    for instruction in instructions:
        asked = [{"role": "user", "content": instruction}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            new = model.generate(**ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        said = tokenizer.decode(new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        chats.append([*asked, {"role": "assistant", "content": said}])
    return chats


def windows_of(config: dict[str, Any], model: Any, tokenizer: Any, encyclopedia: Path | None) -> dict[str, Any]:
    """Return the token ids to score by the name of their text."""
    import torch

    from optimum_mla.calibrate.text import cut_windows, token_windows

    length, samples = config["tokens_per_window"], config["windows"]
    found = {"books": token_windows(tokenizer, str(ROOT / config["books"]), length, samples, "books")}
    if encyclopedia is not None:
        found["encyclopedia"] = token_windows(tokenizer, str(encyclopedia), length, samples, "encyclopedia")
    instructions = (ROOT / config["instructions"]).read_text(encoding="utf-8").splitlines()
    chats = answers(model, tokenizer, instructions)
    pieces = [tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"] for chat in chats]
    found["chat"] = torch.tensor(list(cut_windows(pieces, length, []))[:samples])
    return found


def source_rows(
    config: dict[str, Any], model: Any, tokenizer: Any, windows: dict[str, Any], known: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the measurements of the source with each of its caches, of which some may be known.

    `components-N` codes keys and values apart in their principal axes, at N % of the bytes.
    """
    import torch

    from benchmarks.coded_caches import coded_cache, kivi_percent
    from benchmarks.principal_codes import PrincipalCodes
    from optimum_mla.cache.source import source_cache
    from optimum_mla.calibrate import built_in_windows
    from optimum_mla.measure.memory import measured_cache_bytes

    measured = {(row["cache"], row["sinks"]): row for row in known}
    rows: list[dict[str, Any]] = [{"cache": "16bit", "sinks": 0, "percent": 100.0}]
    probe = windows["books"][:1]
    half = type(model).from_pretrained(ROOT / config["model"], dtype=torch.bfloat16).eval()
    whole = measured_cache_bytes(half, probe)
    for name in config["source_caches"]:
        if name.startswith("kivi"):
            percent = kivi_percent(int(name[-1]))
        elif name.startswith("components"):
            percent = float(name.partition("-")[2])
        else:
            percent = 100 * measured_cache_bytes(half, probe, source_cache(model.config, name)) / whole
        rows += [{"cache": name, "sinks": sinks, "percent": percent} for sinks in config["sinks"]]
    del half
    rows = [measured.get((row["cache"], row["sinks"]), row) for row in rows]
    components = None
    for row in rows:
        if "perplexity" in row:
            continue
        make: Callable[[], Any] | None = None
        if row["cache"].startswith("components"):
            if components is None:
                common = config["common"]
                ids = built_in_windows(tokenizer, common["calibration-length"], common["calibration-samples"])
                components = PrincipalCodes(model, ids)
            make = partial(components.cache, row["percent"] / 100, row["sinks"])
        elif row["cache"] != "16bit":
            make = partial(coded_cache, model.config, row["cache"], row["sinks"])
        row["perplexity"] = {name: one_pass_perplexity(model, ids, make) for name, ids in windows.items()}
        print(row, flush=True)
    return rows


def one_pass_perplexity(model: Any, windows: Any, make_cache: Any) -> float:
    """Return the perplexity in one pass, whose keys and values go through a cache if there is one."""
    import torch

    from optimum_mla.measure.quality import perplexity
    from optimum_mla.stack import cache_argument

    if make_cache is None:
        return perplexity(model, windows)
    total = 0.0
    with torch.no_grad():
        for ids in windows.split(8):
            logits = model(ids, **cache_argument(model, make_cache()), use_cache=True).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
            )
            total += loss.item()
    return math.exp(total / windows[:, 1:].numel())


def conversion_rows(config: dict[str, Any], line: dict[str, Any], windows: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the measurements of one conversion with each of its caches."""
    from dataclasses import asdict

    from transformers import AutoModelForCausalLM

    from optimum_mla.measure.quality import decoding_perplexity, perplexity
    from optimum_mla.measure.sizes import predicted_cache_bytes
    from optimum_mla.report.schema import ConversionReport

    folder = conversion_of(config, line["name"])
    report = asdict(ConversionReport.read(folder))
    about = {name: value for name, value in report.items() if name not in NOT_RECORDED}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    source_bytes = 2 * sum(g.source_cache_numbers for g in model.geometry.layers)
    rows: list[dict[str, Any]] = []
    for cache in line["caches"]:
        if cache == "16bit":
            percent = 100 * model.geometry.cache_bytes() / source_bytes
            found = {name: perplexity(model, ids) for name, ids in windows.items()}
        else:
            backend, _, bits = cache.rpartition("-int")
            ends = [
                predicted_cache_bytes(model.config, cache, tokens, 2) or (0, 0) for tokens in (CONTEXT, 2 * CONTEXT)
            ]
            percent = 100 * (ends[1][0] - ends[0][0]) / CONTEXT / source_bytes

            def make(model: Any = model, backend: str = backend, bits: str = bits) -> Any:
                return model.make_cache(backend=backend, bits=int(bits), residual_length=0)

            found = {name: decoding_perplexity(model, ids, make) for name, ids in windows.items()}
        rows.append({"name": line["name"], "cache": cache, "percent": percent, "perplexity": found})
        print(rows[-1], flush=True)
    rows[0]["conversion"] = about
    return rows


def add_excess(rows: list[dict[str, Any]], whole: dict[str, float]) -> None:
    """Add the excess log-perplexity over the source with its 16-bit cache to each row."""
    for row in rows:
        row["excess"] = {name: math.log(value / whole[name]) for name, value in row["perplexity"].items()}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the excess against the bytes, one panel for each text."""
    from matplotlib.figure import Figure

    texts = list(result["source"][0]["perplexity"])
    figure = Figure(figsize=(4.2 * len(texts), 4.0), layout="constrained")
    panels = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    styles = {
        "components": ("#15803d", "^"),
        "kivi": ("#64748b", "s"),
        "hqq": ("#a3a3a3", "o"),
        "quanto": ("#d4a373", "D"),
    }
    for axes, text in zip(panels, texts, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in result["source"][1:]:
            kind = row["cache"].partition("-")[0]
            label = f"unconverted, {kind}" + (f", first {row['sinks']} tokens in 16 bits" if row["sinks"] else "")
            lines.setdefault(label, []).append((row["percent"], max(row["excess"][text], SMALLEST)))
        for label, points in lines.items():
            colour, marker = styles[label.split(", ")[1]]
            style = ":" if "first" in label else "--"
            axes.plot(*zip(*sorted(points), strict=True), style, marker=marker, color=colour, label=label, markersize=4)
        ours: dict[str, list[tuple[float, float]]] = {}
        for row in result["ours"]:
            label = f"{row['series']}" + ("" if row["cache"] == "16bit" else f", {row['cache']}")
            ours.setdefault(label, []).append((row["percent"], max(row["excess"][text], SMALLEST)))
        for colour, (label, points) in zip(COLOURS * 2, ours.items(), strict=False):
            axes.plot(*zip(*sorted(points), strict=True), "-", marker="o", color=colour, label=label)
        axes.set(
            title=text, xlabel="cache, % of the source's bytes", xscale="log", yscale="log", ylim=(SMALLEST / 1.3, 2)
        )
        axes.set_xticks([6, 12, 25, 50, 100], ["6", "12", "25", "50", "100"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("excess log-perplexity")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


COLOURS = ("#2563eb", "#06b6d4", "#f97316", "#ef4444", "#10b981", "#a855f7", "#0f172a")


def main() -> None:
    """Measure everything in the config and write the result and the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "real_quality.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "real_quality.json")
    parser.add_argument("--encyclopedia", type=Path, help="A UTF-8 text of an encyclopedia. Default: left out.")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "real_quality.png")
    parser.add_argument("--plot-only", action="store_true", help="Draw the plot of a committed result again.")
    arguments = parser.parse_args()
    if arguments.plot_only:
        draw(json.loads(arguments.output.read_text(encoding="utf-8")), arguments.plot)
        return
    config = json.loads(arguments.config.read_text(encoding="utf-8"))

    from transformers import AutoModelForCausalLM, AutoTokenizer

    import optimum_mla  # noqa: F401

    known, measured = earlier(arguments.output, config, "conversions", also=["source_caches"])
    tokenizer = AutoTokenizer.from_pretrained(ROOT / config["model"])
    model = AutoModelForCausalLM.from_pretrained(ROOT / config["model"], dtype="float32").eval()
    windows = windows_of(config, model, tokenizer, arguments.encyclopedia)
    tokens = {name: ids.numel() for name, ids in windows.items()}
    if known.get("tokens") != tokens:
        known = {}
    source = source_rows(config, model, tokenizer, windows, known.get("source", []))
    del model
    names = {line["name"] for line in measured}
    ours: list[dict[str, Any]] = [row for row in known.get("ours", []) if row["name"] in names]
    texts = {"encyclopedia": arguments.encyclopedia.name} if arguments.encyclopedia else {}
    for line in [{}, *config["conversions"]]:
        if line and not any(row["name"] == line["name"] for row in ours):
            ours += [{"series": line["series"], **row} for row in conversion_rows(config, line, windows)]
        for rows in (source, ours):
            add_excess(rows, source[0]["perplexity"])
        result = save_result(arguments.output, config, texts=texts, tokens=tokens, source=source, ours=ours)
    draw(result, arguments.plot)


if __name__ == "__main__":
    main()
