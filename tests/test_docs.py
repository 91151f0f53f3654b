"""What README and docs tell a reader to type works as typed, and the numbers that they show are the measured ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def blocks(page: str, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def reader_environment() -> dict[str, str]:
    """The environment of somebody who has activated the virtual environment."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def working_folder(tmp_path: Path) -> Path:
    """A folder that looks like the project's root and may be written."""
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    return tmp_path


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_commands_and_python_run_as_written(page: str, working_folder: Path) -> None:
    commands = [block for block in blocks(page, "bash") if "optimum-cli" in block]
    scripts = blocks(page, "python")
    assert commands
    assert scripts
    for command in commands:
        done = subprocess.run(
            ["bash", "-euc", command], cwd=working_folder, env=reader_environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "% of source" in done.stdout or "% of the source" in done.stdout
    for script in scripts:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=working_folder, env=reader_environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@pytest.mark.parametrize("page", ["docs/recover.md", "docs/benchmark.md"])
def test_python_runs_as_written(page: str, working_folder: Path) -> None:
    for script in blocks(page, "python"):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=working_folder, env=reader_environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["docs/add_a_method.md", "docs/add_a_family.md"])
def test_extension_examples_convert_a_model(page: str, working_folder: Path) -> None:
    (example,) = blocks(page, "python")
    use = {
        "docs/add_a_method.md": (
            "import torch\n"
            "from transformers import AutoModelForCausalLM\n"
            "from optimum_mla.transforms.registry import transform_class\n"
            "source = AutoModelForCausalLM.from_pretrained('benchmarks/reference_model', dtype=torch.float32)\n"
            "ids = torch.arange(40)[None]\n"
            "whole = KeysOnly()(source, copy=True)\n"
            "assert transform_class('keys-only').__name__ == 'KeysOnly'\n"
            "assert (whole(ids).logits - source(ids).logits).abs().max() < 1e-4\n"
            "print(KeysOnly(kv_cache_ratio=0.75)(source).geometry.cache_ratio)\n"
        ),
        "docs/add_a_family.md": (
            "import torch, transformers\n"
            "from optimum_mla import GQA2MLA\n"
            "sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2)\n"
            "heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)\n"
            "source = transformers.ArceeForCausalLM(transformers.ArceeConfig(**sizes, **heads)).eval()\n"
            "ids = torch.arange(40)[None]\n"
            "whole = GQA2MLA()(source, copy=True)\n"
            "assert type(whole).__name__ == 'ArceeMLAForCausalLM'\n"
            "assert (whole(ids).logits - source(ids).logits).abs().max() < 1e-4\n"
            "print(1.0 if GQA2MLA(kv_cache_ratio=0.5)(source).geometry.cache_ratio == 0.5 else 0.0)\n"
        ),
    }[page]
    (working_folder / "example.py").write_text(f"{example}\n{use}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=working_folder, env=reader_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == {"docs/add_a_method.md": 0.75, "docs/add_a_family.md": 1.0}[page]


def test_readme_shows_the_committed_results() -> None:
    result = json.loads((RESULTS / "conversion.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| (\d[\d.]*) % \| (\d+) \| ([\d.]+) \|", readme, re.M)
    measured = []
    for options, run in zip(result["config"]["runs"], result["runs"], strict=True):
        extra = [f"--{name} {value}" for name, value in options.items() if name not in ("method", "kv-cache-ratio")]
        measured.append(
            (
                " ".join([options["method"], *extra]),
                f"{run['cache_percent_of_source']:g}",
                f"{run['cache_bytes_per_token']:.0f}",
                f"{run['perplexity_after']:.2f}",
            )
        )
    assert rows == measured
    quarter = next(run for run, row in zip(result["runs"], rows, strict=True) if row[:2] == ("gqa2mla", "25"))
    headline = f"perplexity\n{quarter['perplexity_before']:.2f} → {quarter['perplexity_after']:.2f}**"
    assert headline in readme
    assert result["runs"][0]["peak_memory_bytes"] > 0


def test_readme_shows_the_measured_quality() -> None:
    result = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))
    runs = [run for run in result["runs"] if run["part"] == "methods" and "impossible" not in run]
    rows = re.findall(r"^\| ([\w-]+ (?:as|full|decoupled)[^|]*) \|(.*)\|$", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) == 6
    for label, cells in rows:
        for model, cell in zip(result["config"]["models"], cells.split("|"), strict=True):
            for ratio, shown in zip((0.5, 0.25), cell.split("/"), strict=True):
                found = [
                    run["excess_log_perplexity"]
                    for run in runs
                    if (run["model"], run["label"], run["ratio"]) == (model, label, ratio)
                ]
                assert shown.strip() == f"{sum(found) / len(found):.3f}"


def test_readme_shows_the_measured_decoding() -> None:
    runs = json.loads((RESULTS / "decode.json").read_text(encoding="utf-8"))["runs"]
    measured = {(run["shape"], run["latent"], run["variant"], run["context"]): run for run in runs}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (Llama[^,|]+ slice), ([^|]+), ([^,|]+) \| ([\d.]+) % \| (.+) / (.+) \| (.+) / (.+) \|$", readme, re.M
    )
    assert len(rows) == 6
    for shape, latent, variant, percent, *speeds in rows:
        short, long = (measured[shape, latent, variant, context] for context in (8192, 32768))
        source = measured[shape, "-", "source", 32768]
        assert percent == f"{100 * long['cache_mb'] / source['cache_mb']:.1f}"
        found = [run[field] for field in ("core_speedup", "model_speedup") for run in (short, long)]
        assert speeds == [f"{speed:.1f}" for speed in found]


def test_readme_shows_what_quantization_costs() -> None:
    runs = json.loads((RESULTS / "cache_quality.json").read_text(encoding="utf-8"))["runs"]
    shown = re.search(
        r"costs ([+-][\d.]+) % perplexity with HQQ and ([+-][\d.]+) % with Quanto", (ROOT / "README.md").read_text()
    )
    assert shown is not None
    for cost, backend in zip(shown.groups(), ("hqq", "quanto"), strict=True):
        wanted = {"kv_cache_ratio": 0.5, "bits": 4, "backend": backend, "residual_length": 0}
        (run,) = [run for run in runs if wanted.items() <= run.items() and "group_size" not in run]
        assert cost == f"{run['percent_over_unquantized']:+.2f}"


def test_recovery_page_shows_what_was_measured() -> None:
    runs = json.loads((RESULTS / "recovery_2m.json").read_text(encoding="utf-8"))["runs"]
    page = (ROOT / "docs" / "recover.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) % \| ([\d., ]+) \| ([\d.]+) % \|$", page, re.M)
    assert len(rows) == len(runs) == 2
    for (train, share, perplexities, closed), run in zip(rows, runs, strict=True):
        assert train == run["recipe"]["train"]
        assert share == f"{run['trainable_percent']:.1f}"
        measured = [run[f"perplexity_{name}"] for name in ("source", "converted", "recovered")]
        assert perplexities == ", ".join(f"{value:.2f}" for value in measured)
        assert closed == f"{run['percent_of_excess_closed']:.1f}"


def test_recovery_page_shows_the_grid() -> None:
    runs = {(r["conversion"], r["label"]): r for r in json.loads((RESULTS / "recovery.json").read_text())["runs"]}
    page = (ROOT / "docs" / "recover.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) % \| ([-\d.]+) \| ([-\d.]+) \| ([-\d.]+) \| ([-\d.]+) \|$", page, re.M)
    assert [row[0] for row in rows] == ["lora", "kv", "attention", "full"]
    for train, share, *cells in rows:
        measured = [
            runs[cache, f"{objective}, {train}"]["percent_of_excess_closed"]
            for cache in ("25 %", "12.5 %")
            for objective in ("distill", "sft")
        ]
        assert cells == [f"{value:.1f}" for value in measured]
        assert share == f"{runs['25 %', f'distill, {train}']['trainable_percent']:.1f}"
    for start in ("random", "SVD", "calibrated"):
        both = [runs[f"X-EcoMLA 25 %, {start}", f"{how}, full"]["perplexity_recovered"] for how in ("distill", "sft")]
        assert f"{both[0]:.1f} / {both[1]:.1f}" in page
    losses = [
        sum(runs[key]["last_losses"]) / 5
        for key in (("100 %, SVD", "sft, kv"), ("source", "sft, W_K and W_V"), ("100 %, identity", "sft, kv"))
    ]
    assert f"no: {losses[0]:.3f} against {losses[1]:.3f}" in page
    assert f"visibly: {losses[0]:.4f} against {losses[2]:.4f}" in page


def test_recovery_page_shows_the_memory_of_a_teacher() -> None:
    runs = {
        r["label"]: r["peak_memory_mb"] / 1e3
        for r in json.loads((RESULTS / "recovery_memory.json").read_text())["runs"]
    }
    page = " ".join((ROOT / "docs" / "recover.md").read_text(encoding="utf-8").split())
    assert f"peaked at {runs['distill, full']:.2f} GB where plain fine-tuning did at {runs['sft, full']:.2f} GB" in page
    assert f"adapters at {runs['distill, lora']:.2f} GB against {runs['sft, lora']:.2f} GB" in page


def test_benchmark_page_shows_what_caches_weigh() -> None:
    result = json.loads((RESULTS / "memory.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w -]+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    assert len(rows) == len(result["budget"]) == 5
    whole = result["budget"][0]["cache_bytes_per_token"]
    for (_, per_token, share, live, ratio), fits in zip(rows, result["budget"], strict=True):
        key = (fits["role"], fits["cache"], 16384)
        cell = next(row for row in result["memory"] if (row["role"], row["cache"], row["context_tokens"]) == key)
        assert cell["flags"] == []
        assert [per_token, share] == [
            f"{fits['cache_bytes_per_token']:.0f}",
            f"{100 * fits['cache_bytes_per_token'] / whole:.1f}",
        ]
        assert [live, ratio] == [f"{cell['live_cache_bytes'] / 1e6:.2f}", f"{cell['live_percent_of_predicted']:.1f}"]


def test_serving_page_shows_what_was_measured() -> None:
    runs = json.loads((RESULTS / "export.json").read_text(encoding="utf-8"))["runs"]
    page = " ".join((ROOT / "docs" / "serving.md").read_text(encoding="utf-8").split())
    by_layer, shared, normed, _, in_16_bits, _ = runs
    for words, value in (
        ("(perplexity {} before)", by_layer["perplexity_source"]),
        ("it is {} where each layer", by_layer["perplexity_converted"]),
        ("{} with `--shared-rope`", shared["perplexity_converted"]),
        ("and {} with `--latent-norm`", normed["perplexity_converted"]),
        ("scores {} in float32", shared["perplexity_exported"]),
        ("in bfloat16 {} before", in_16_bits["perplexity_converted"]),
        ("and {} after", in_16_bits["perplexity_exported"]),
    ):
        assert words.format(f"{value:.2f}") in page
    assert f"difference is {shared['largest_logit_difference']:.1e}" in page


def test_readme_shows_what_training_brings_back() -> None:
    full = {run["recipe"]["train"]: run for run in json.loads((RESULTS / "recovery_2m.json").read_text())["runs"]}
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for train, words in (("full", "{:.1f} % of its excess"), ("lora", "and {:.1f} % where only adapters")):
        assert words.format(full[train]["percent_of_excess_closed"]) in readme
    assert f"{full['lora']['trainable_percent']:.1f} % of the parameters" in readme


def test_pages_link_to_files_that_exist() -> None:
    for page in [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
