"""Models that read images, whose language model is converted inside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from optimum_mla import GQA2MLA, XEcoMLA, compose
from optimum_mla.cache import LatentCache
from optimum_mla.calibrate.windows import split_for_report
from optimum_mla.core.errors import MLAError, UnsupportedModelError
from optimum_mla.models import language_model
from optimum_mla.models.wrappers import WRAPPERS
from optimum_mla.pipeline import TextOptions, convert, finetune
from optimum_mla.report.schema import ConversionReport
from tests.cases import SIZES, token_ids

pytestmark = pytest.mark.compat

IMAGE, PIXELS = 90, 28
VISION = {
    **{"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": PIXELS, "patch_size": 14},
}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 64}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
GEMMA = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3",
        {"text_config": GEMMA, "vision_config": {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4},
    ),
    "idefics3": ("Idefics3", {"text_config": {"model_type": "llama"}, "scale_factor": 2}),
    "internvl": (
        "InternVL",
        {
            "text_config": {"model_type": "qwen2"},
            "vision_config": {"image_size": [PIXELS, PIXELS], "patch_size": [14, 14]},
            "image_seq_length": 1,
        },
    ),
    "llava": (
        "Llava",
        {
            "text_config": {"model_type": "llama"},
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32},
            "image_seq_length": 4,
        },
    ),
    "mistral3": (
        "Mistral3",
        {
            "text_config": {"model_type": "mistral", "sliding_window": None},
            "vision_config": {"model_type": "pixtral", "head_dim": 16},
            "spatial_merge_size": 1,
        },
    ),
    "smolvlm": ("SmolVLM", {"text_config": {"model_type": "llama"}, "scale_factor": 2}),
}
"""Model type -> class prefix and what its config changes."""
TIED = ("gemma3", "idefics3")
"""Those that the command is tested on with a tied head; the others have one of their own."""
TEXT_ONLY: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Qwen2": (
        "Qwen2_5_VL",
        {**{name: value for name, value in SIZES.items() if name != "head_dim"}, "rope_parameters": ROPE},
        {**QWEN_VISION, "fullatt_block_indexes": [1]},
    ),
    "Qwen3": (
        "Qwen3VL",
        {**SIZES, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [1]},
    ),
}
"""What a language model becomes -> the wrapper's class prefix, and the configs of both parts."""
IDS = token_ids(8, 24).clamp(max=IMAGE - 1)


def wrapper(name: str, **text: Any) -> PreTrainedModel:
    """A wrapper with random weights; `text` changes its language model's config, and whether the head is tied."""
    prefix, changes = MODELS[name]
    image = {"image_token_id": IMAGE} if name in ("idefics3", "internvl", "smolvlm") else {"image_token_index": IMAGE}
    parts = {"text_config": SIZES, "vision_config": VISION}
    fields = {**image, **changes, **{part: {**own, **changes.get(part, {})} for part, own in parts.items()}}
    fields["text_config"] |= text
    if "tie_word_embeddings" in text:
        fields["tie_word_embeddings"] = text["tie_word_embeddings"]
    config = getattr(transformers, f"{prefix}Config")(**fields)
    return getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()


def with_image(name: str) -> dict[str, Tensor]:
    """Inputs with an image of random numbers before the text."""
    tokens = 1 if name in ("idefics3", "internvl", "smolvlm") else 4
    ids = torch.cat([torch.full((1, tokens), IMAGE), IDS[:1, :12]], dim=1)
    pixels = torch.randn(1, 3, PIXELS, PIXELS)
    inputs = {"input_ids": ids, "pixel_values": pixels[None] if name in ("idefics3", "smolvlm") else pixels}
    if name == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if name == "mistral3":
        inputs["image_sizes"] = torch.tensor([[PIXELS, PIXELS]])
    return inputs


def test_every_wrapper_is_tested() -> None:
    assert [one.model_type for one in WRAPPERS] == list(MODELS)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_wrapper_is_exact_at_full_rank_saved_loaded_and_generates(name: str, tmp_path: Path) -> None:
    model, inputs = wrapper(name), with_image(name)
    expected, greedy = model(**inputs).logits, model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert not torch.equal(model(input_ids=IDS[:1, :12]).logits, expected[:, -12:])  # the image counts
    assert GQA2MLA(kv_cache_ratio=1.0)(model) is model
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == f"{name}_mla"
    assert config["text_config"]["model_type"].endswith("_mla")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)
    out = loaded.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, greedy)
    assert isinstance(out.past_key_values, LatentCache)
    assert loaded.geometry.cache_ratio == pytest.approx(1.0, abs=0.4)


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_codes_for_a_wrapper_are_refused_in_a_line(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"kv_cache_budget: got a .* Give kv_cache_ratio for"):
        GQA2MLA(kv_cache_budget=0.25, calibration=IDS)(wrapper(name))


@torch.no_grad()
def test_layers_of_a_wrapper_are_converted_one_after_the_other() -> None:
    model = wrapper("llava")
    expected = model(input_ids=IDS).logits
    GQA2MLA(kv_cache_ratio=1.0, layers=[0])(model)
    both = compose(GQA2MLA(kv_cache_ratio=1.0, layers=[1]), GQA2MLA(kv_cache_ratio=1.0, layers=[2]))
    both(model)
    assert [layer.attention_form for layer in model.config.text_config.per_layer_config] == ["full"] * 3
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", TEXT_ONLY)
@torch.no_grad()
def test_the_language_models_of_qwen_compute_the_same_on_text(prefix: str, tmp_path: Path) -> None:
    kind, text, vision = TEXT_ONLY[prefix]
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    whole = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    language = language_model(whole)
    assert type(language).__name__ == f"{prefix}ForCausalLM"
    expected = whole(input_ids=IDS).logits
    torch.testing.assert_close(language(IDS).logits, expected)
    GQA2MLA(kv_cache_ratio=1.0)(language)
    torch.testing.assert_close(language(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedModelError, match=r"Extract that model with optimum_mla\.models\.language_model"):
        XEcoMLA(kv_cache_ratio=0.5)(whole)


def test_a_model_that_is_no_wrapper_has_no_language_model_inside() -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is no wrapper"):
        language_model(language_model(wrapper("llava")))


@pytest.mark.parametrize("name", MODELS)
def test_the_command_converts_inside_and_keeps_the_rest(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    wrapper(name, tie_word_embeddings=name in TIED).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 28}', encoding="utf-8")
    windows = {"calibration_samples": len(IDS), "calibration_length": IDS.shape[1], "calibration_repeats": 0}
    texts = TextOptions(calibration_data=IDS.flatten().tolist(), **windows)
    said: list[str] = []
    options = {"kv_cache_ratio": 0.5}
    report = convert(str(folder), tmp_path / "out", options=options, texts=texts, announce=said.append)
    assert "This is the language model of the model" in said[0]
    assert (tmp_path / "out" / "preprocessor_config.json").read_text(encoding="utf-8") == '{"size": 28}'
    assert "AutoModelForImageTextToText" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ConversionReport.read(tmp_path / "out").cache_bytes_per_token == report.cache_bytes_per_token
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    source = AutoModelForImageTextToText.from_pretrained(folder).eval()
    for path, parameter in source.named_parameters():
        if "self_attn" not in path or "vision" in path:
            assert torch.equal(loaded.get_parameter(path), parameter), path
    calibration, _ = split_for_report(IDS, len(IDS))  # the command leaves a window to its report
    same = GQA2MLA(kv_cache_ratio=0.5, calibration=calibration)(source)
    inputs = with_image(name)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, same(**inputs).logits, rtol=1e-3, atol=1e-3)


REFUSALS: dict[str, Callable[[Path, Path], Any]] = {
    "is converted already": lambda model, out: convert(str(model), out),
    r"language_model, as docs/families\.md": lambda model, out: finetune(str(model), out, IDS.flatten().tolist()),
}


@pytest.mark.parametrize("said", REFUSALS)
def test_what_wrappers_cannot_do_is_said_in_a_line(said: str, tmp_path: Path) -> None:
    model = wrapper("llava")
    GQA2MLA(kv_cache_ratio=1.0)(model)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(MLAError, match=said):
        REFUSALS[said](tmp_path / "model", tmp_path / "out")


def test_exports_of_wrappers_are_refused(tmp_path: Path) -> None:
    wrapper("llava").save_pretrained(tmp_path / "model")
    with pytest.raises(MLAError, match="export_format: got 'deepseek_v3', allowed: None for a model around"):
        convert(str(tmp_path / "model"), tmp_path / "out", export_format="deepseek_v3")
