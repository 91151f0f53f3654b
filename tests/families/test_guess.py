"""Families that nobody described: guessed and confirmed, refused with a reason, or offered by another package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_mla import AttentionSpec
from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.families.guess import guessed_spec, spec_source
from optimum_mla.families.refused import ALREADY_LATENT, refusal
from optimum_mla.models import family_of, family_table, supported_model_types
from optimum_mla.models.registry import try_family
from optimum_mla.pipeline import convert
from tests.cases import FAMILIES, FURTHER_FAMILIES, SIZES, UNCALIBRATED, source_model

UNDESCRIBED = {"exaone4": ("Exaone4", {"sliding_window": None}), "glm": ("Glm", {}), "cwm": ("Cwm", {})}
GUESSABLE = ("llama", "llama with biases", "qwen2", "qwen3", "mixtral", "olmo2", "phi3", "starcoder2", "stablelm")


@pytest.fixture
def _forgotten_families() -> Iterator[None]:
    before = dict(family_table.FAMILIES)
    for unknown in ("cwm", "glm"):  # Another test may have registered them.
        family_table.FAMILIES.pop(unknown, None)
    yield
    family_table.FAMILIES.clear()
    family_table.FAMILIES.update(before)


@pytest.mark.parametrize("family", GUESSABLE)
def test_guesses_are_what_the_families_are_described_by(family: str) -> None:
    model = source_model(family)
    spec = family_of(model.config).spec
    guess = guessed_spec(model.config, model)
    for name in ("fused", "query_norm", "key_norm", "joint_norms", "input_norm", "after_attention", "class_prefix"):
        assert getattr(guess, name) == getattr(spec, name)
    assert guess.geometry(model.config) == spec.geometry(model.config)


def test_a_spec_is_written_as_it_is_made() -> None:
    spec = AttentionSpec("x", "X", query_bias="attention_bias", joint_norms=True, input_norm=None)
    text = spec_source(spec)
    assert "rotary" not in text
    assert eval(text, {"AttentionSpec": AttentionSpec}) == spec


@pytest.mark.usefixtures("_forgotten_families")
def test_a_family_is_tried_and_its_result_says_what_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.CwmConfig(**SIZES, layer_types=["full_attention"] * 3, sliding_window=8)
    torch.manual_seed(0)
    transformers.CwmForCausalLM(config).eval().save_pretrained(tmp_path / "source")
    source = str(tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match="--try-family"):
        convert(source, tmp_path / "out", options={"kv_cache_ratio": 1.0}, texts=UNCALIBRATED)
    convert(source, tmp_path / "out", options={"kv_cache_ratio": 1.0}, texts=UNCALIBRATED, try_family=True)
    assert "AttentionSpec(model_type='cwm', class_prefix='Cwm'" in caplog.text
    # The folder registers its family itself where its code is trusted.
    script = (
        "import torch; from transformers import AutoModelForCausalLM as A;"
        f"a = A.from_pretrained({source!r}); b = A.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True);"
        "ids = torch.arange(2, 20)[None];"
        "assert (a(ids).logits - b(ids).logits).abs().max() < 1e-4; print(type(b).__name__)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "CwmMLAForCausalLM", done.stderr


@pytest.mark.usefixtures("_forgotten_families")
def test_a_guess_that_the_model_refutes_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.GlmForCausalLM(transformers.GlmConfig(**SIZES)).eval().save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match="interleaved=True"):
        convert(str(tmp_path / "source"), tmp_path / "out", options={"kv_cache_ratio": 1.0}, try_family=True)
    assert not (tmp_path / "out").exists()


def test_known_families_are_not_tried() -> None:
    for name in ("llama", "gemma2"):
        assert try_family(source_model(name).config) is None


def test_names_that_nobody_can_read_are_told() -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11)
    with pytest.raises(UnsupportedModelError, match="not those of Llama"):
        try_family(config)


def test_reasons_of_refusals() -> None:
    with pytest.raises(UnsupportedModelError, match="latent already"):
        family_of(transformers.DeepseekV3Config())
    with pytest.raises(UnsupportedModelError, match="sinks"):
        family_of(transformers.GptOssConfig())
    with pytest.raises(UnsupportedModelError, match=r"'gemma3_text'.*docs/families\.md"):
        family_of(transformers.Gemma3Config())
    supported = supported_model_types()
    assert not set(ALREADY_LATENT) & set(supported)
    for family in FAMILIES | FURTHER_FAMILIES:
        assert refusal(source_model(family).config) is None


def extracted(folder: Path) -> PreTrainedModel:
    """The language model of a wrapper, as docs/families.md extracts it."""
    page = Path("docs/families.md").read_text(encoding="utf-8")
    (code,) = (block.split("```")[0] for block in page.split("```python") if "language_model(whole)" in block)
    names: dict[str, object] = {}
    exec(code.replace('"MODEL"', repr(str(folder))).replace('"FOLDER"', repr(str(folder / "text"))), names)
    return AutoModelForCausalLM.from_pretrained(folder / "text")


def test_the_language_model_in_a_wrapper_can_be_extracted(tmp_path: Path) -> None:
    text = {**SIZES, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4}, mm_tokens_per_image=4
    )
    wrapper = transformers.Gemma3ForConditionalGeneration(config).eval()
    wrapper.save_pretrained(tmp_path)
    inner = extracted(tmp_path)
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        assert torch.allclose(inner(ids).logits, wrapper(ids).logits, atol=1e-5)
    assert family_of(inner.config).spec.model_type == "gemma3_text"


def test_installed_packages_offer_families_and_backends(tmp_path: Path) -> None:
    (tmp_path / "mine_family.py").write_text(
        "from optimum_mla import AttentionSpec\nSPEC = AttentionSpec(model_type='cwm', class_prefix='Cwm')\n"
    )
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[optimum_mla.families]\ncwm = mine_family:SPEC\nbroken = no_such_module:SPEC\n"
        "[optimum_mla.backends]\nmine = optimum_mla.cache.hqq:HQQBackend\n"
    )
    script = (
        "import warnings; warnings.simplefilter('ignore'); import optimum_mla;"
        "from optimum_mla.cache.backends import available_backends, make_backend;"
        "assert 'cwm' in optimum_mla.supported_model_types(); assert 'mine' in available_backends();"
        "from transformers import AutoConfig; print(type(AutoConfig.for_model('cwm_mla')).__name__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "CwmMLAConfig", done.stderr
