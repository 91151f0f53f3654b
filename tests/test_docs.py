"""What README and docs tell a reader to type works as typed; `tests/benchmarks/test_tables.py` tests their numbers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def reader_environment() -> dict[str, str]:
    """The environment of somebody who has activated the virtual environment."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def assert_bytes_are_saved(output: str) -> None:
    """A summary's columns of bytes and of shares of the source hold numbers above zero."""
    header, _, *rows = output[output.index("method") :].splitlines() if "bytes/token" in output else ("", "")
    places = [index for index, name in enumerate(re.split(r"\s{2,}", header)) if name in ("bytes/token", "% of source")]
    for row in rows:
        cells = re.split(r"\s{2,}", row)
        if len(cells) != len(re.split(r"\s{2,}", header)):
            break
        assert all(float(cells[place]) > 0 for place in places), row


@pytest.fixture
def working_folder(tmp_path: Path) -> Path:
    """A folder that looks like the project's root and may be written."""
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    return tmp_path


@pytest.mark.parametrize("page", ["README.md", pytest.param("docs/quickstart.md", marks=pytest.mark.slow)])
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
        assert_bytes_are_saved(done.stdout)
    for script in scripts:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=working_folder, env=reader_environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@pytest.mark.slow
def test_the_walkthrough_runs_from_top_to_bottom(working_folder: Path) -> None:
    text = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
    steps = re.findall(r"^```(bash|python)\n(.*?)^```", text, re.M | re.S)
    assert len(steps) >= 9
    said = []
    for language, block in steps:
        program = ["bash", "-euc"] if language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*program, block], cwd=working_folder, env=reader_environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        assert_bytes_are_saved(done.stdout)
        said.append(done.stdout)
    everything = "\n".join(said)
    assert "of the source's bytes per token for" in everything
    assert "DeepseekV3ForCausalLM" in everything
    made = working_folder / "walkthrough_output"
    assert {"converted", "recovered", "quantized", "report", "exported", "run"} <= {
        path.name for path in made.iterdir()
    }
    assert (made / "run" / "3-benchmark" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/recover.md", "docs/benchmark.md", "docs/codec.md"])
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
            "from optimum_mla.methods.registry import transform_class\n"
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
            "full = dict(layer_types=['full_attention'] * 2)\n"
            "source = transformers.CwmForCausalLM(transformers.CwmConfig(**sizes, **heads, **full)).eval()\n"
            "ids = torch.arange(40)[None]\n"
            "whole = GQA2MLA()(source, copy=True)\n"
            "assert type(whole).__name__ == 'CwmMLAForCausalLM'\n"
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


def test_pages_link_to_files_that_exist() -> None:
    for page in [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
