"""Model cards: what a conversion writes, and what later commands change in it."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub import metadata_load

from optimum_mla.pipeline import convert, quantize
from optimum_mla.pipeline.checkpoint import Checkpoint
from optimum_mla.report.cards import name_without_folders, rename_card, with_section
from tests.cases import UNCALIBRATED

REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_model"
CARD = """---
license: mit
---

# old

Words.

## Use

```python
model = AutoModelForCausalLM.from_pretrained("old")
```

## Quantized

Once.
"""


def test_a_card_takes_the_name_of_its_folder() -> None:
    text = rename_card(CARD, "new")
    assert "\n# new\n" in text
    assert 'from_pretrained("new")' in text
    assert "old" not in text


def test_a_section_replaces_the_one_with_its_title_or_comes_last() -> None:
    text = with_section(CARD, "## Use\n\nPlainly.\n")
    assert text.count("## Use") == 1
    assert "from_pretrained" not in text
    assert text.index("Plainly.") < text.index("## Quantized")
    again = with_section(CARD, "## Quantized\n\nTwice.\n")
    assert again.endswith("## Quantized\n\nTwice.\n")
    assert "Once." not in again
    assert with_section(CARD, "## Recovered\n\nA lot.").endswith("Once.\n\n## Recovered\n\nA lot.\n")


def test_paths_lose_their_folders() -> None:
    assert name_without_folders(str(REFERENCE)) == "reference_model"
    assert name_without_folders("/nowhere/at/all") == "all"
    assert name_without_folders("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


def test_the_card_of_a_conversion_carries_the_licence_and_no_path(tmp_path: Path) -> None:
    convert(str(REFERENCE), tmp_path / "alpha", "x-ecomla", {"kv_cache_ratio": 0.5}, UNCALIBRATED)
    metadata = metadata_load(tmp_path / "alpha" / "README.md")
    assert metadata["license"] == "apache-2.0"
    assert metadata["pipeline_tag"] == "text-generation"
    assert "base_model" not in metadata  # A folder is none that the hub knows.
    quantize(str(tmp_path / "alpha"), tmp_path / "second")
    quantize(str(tmp_path / "second"), tmp_path / "third")
    text = (tmp_path / "third" / "README.md").read_text()
    assert "# third\n" in text
    assert "alpha" not in text
    assert "second" not in text
    assert str(tmp_path) not in text
    assert str(REFERENCE.parent) not in text
    assert text.count("## Quantized") == 1
    assert metadata_load(tmp_path / "third" / "README.md") == metadata


def test_metadata_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert Checkpoint(str(tmp_path)).metadata() == {}
    (tmp_path / "README.md").write_text("---\n[\n---\n")
    assert Checkpoint(str(tmp_path)).metadata() == {}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump({'license': 'mit'})}---\n")
    assert Checkpoint(str(tmp_path)).metadata() == {"license": "mit"}
    assert Checkpoint("nobody/nothing").metadata() == {}
