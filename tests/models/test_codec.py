"""The codec of a model: its file, and the models that it takes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from optimum_mla import GQA2MLA
from optimum_mla.cache.codec_layer import ExactTokens
from optimum_mla.convert.codec import fit_codec
from optimum_mla.core.errors import InvalidValueError, UnreadableModelError, UnsupportedModelError
from optimum_mla.measure.memory import live_cache_bytes
from optimum_mla.models.codec import CODEC_FILE, ModelCodec
from optimum_mla.stack import cache_argument
from tests.cases import source_model, token_ids

EXACT = ExactTokens(sinks=4, recent=8, together=4)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return source_model("llama").eval()


@pytest.fixture(scope="module")
def codec(model: PreTrainedModel) -> ModelCodec:
    return fit_codec(model, token_ids(8, 48), 0.4, exact=EXACT)


def test_a_saved_codec_is_the_same(codec: ModelCodec, tmp_path: Path) -> None:
    assert codec.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / CODEC_FILE
    again = ModelCodec.load(tmp_path / "new" / "folder")
    assert (again.model_type, again.exact, again.layers.keys()) == ("llama", EXACT, codec.layers.keys())
    for index, layer in codec.layers.items():
        assert again.layers[index].layout == layer.layout
        assert all(torch.equal(tensor, again.layers[index].tensors[name]) for name, tensor in layer.tensors.items())
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [CODEC_FILE]


@torch.no_grad()
def test_a_cache_that_was_saved_or_copied_goes_on(model: PreTrainedModel, codec: ModelCodec, tmp_path: Path) -> None:
    ids, cache = token_ids(2, 48), codec.make_cache(model)
    model(ids[:, :36], **cache_argument(model, cache))
    torch.save(cache, tmp_path / "cache.pt")
    copies = [copy.deepcopy(cache), torch.load(tmp_path / "cache.pt", weights_only=False)]
    expected = model(ids[:, 36:], **cache_argument(model, cache)).logits
    for other in copies:
        assert torch.equal(model(ids[:, 36:], **cache_argument(model, other)).logits, expected)
        assert live_cache_bytes(other) == live_cache_bytes(cache) == 2 * codec.cache_bytes(48, 4)


@pytest.mark.parametrize("damage", ["missing", "torn", "other"])
def test_a_file_that_is_none_is_named(codec: ModelCodec, tmp_path: Path, damage: str) -> None:
    if damage != "missing":
        path = codec.save(tmp_path)
        path.write_bytes(path.read_bytes()[:-100] if damage == "torn" else b"nothing")
    with pytest.raises(UnreadableModelError, match=f"codec: .*{CODEC_FILE} could not be read"):
        ModelCodec.load(tmp_path)


@pytest.mark.parametrize("entry", ["model_type", "exact", "layouts"])
def test_damaged_metadata_are_named(codec: ModelCodec, tmp_path: Path, entry: str) -> None:
    path = codec.save(tmp_path)
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["latent_codec"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    described[entry] = {"no": "such"} if entry == "exact" else 3
    if entry == "model_type":
        del described[entry]
    save_file(tensors, path, metadata={"latent_codec": json.dumps(described)})
    with pytest.raises(UnreadableModelError, match="could not be read"):
        ModelCodec.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_copy_of_the_model_is_taken(codec: ModelCodec, dtype: torch.dtype) -> None:
    codec.check(source_model("llama", dtype))


def test_another_model_is_refused(model: PreTrainedModel, codec: ModelCodec) -> None:
    other = source_model("llama")
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight.normal_()
    with pytest.raises(UnsupportedModelError, match="the keys and values of layer 1 are not those"):
        codec.make_cache(other)
    with pytest.raises(UnsupportedModelError, match=r"got a qwen3, allowed: the llama of this codec"):
        codec.make_cache(source_model("qwen3"))
    with pytest.raises(UnsupportedModelError, match="allowed: a Transformers causal LM"):
        codec.make_cache(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("budget", "match"),
    [
        (0.0, r"kv_cache_budget: got 0.0, allowed: above 0, up to 0.5"),
        (0.6, r"kv_cache_budget: got 0.6, allowed: above 0, up to 0.5"),
        (1e-4, r"kv_cache_budget: got 0.0001, allowed: [\d.]+ to 0.5 for this model"),
        ("much", "kv_cache_budget: got 'much'"),
    ],
)
def test_a_budget_out_of_range_is_refused(model: PreTrainedModel, budget: float, match: str) -> None:
    with pytest.raises(InvalidValueError, match=match):
        fit_codec(model, token_ids(8, 48), budget, exact=EXACT)


def test_models_that_cannot_have_one_are_refused(model: PreTrainedModel) -> None:
    ids = token_ids(8, 48)
    with pytest.raises(UnsupportedModelError, match="converted already"):
        fit_codec(GQA2MLA()(source_model("llama")), ids, exact=EXACT)
    with pytest.raises(InvalidValueError, match="calibration_length: got 48, allowed: more than 68"):
        fit_codec(model, ids)
    dynamic = source_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UnsupportedModelError, match="depend on the length"):
        fit_codec(dynamic, ids, exact=EXACT)


def test_bytes_go_to_the_layers_that_the_predictions_need(codec: ModelCodec, model: PreTrainedModel) -> None:
    assert len({layer.layout.bytes_per_token for layer in codec.layers.values()}) > 1
    total = sum(layer.width // 2 * 4 for layer in codec.layers.values())
    assert codec.bytes_per_token <= 0.4 * total


def test_the_same_text_gives_the_same_codec(model: PreTrainedModel, codec: ModelCodec) -> None:
    again = fit_codec(model, token_ids(8, 48), 0.4, exact=EXACT)
    for index, layer in codec.layers.items():
        assert again.layers[index].layout == layer.layout
        assert torch.equal(again.layers[index].latent_down, layer.latent_down)
