"""GGUF files: what is in them, what cannot be in them, and what llama.cpp makes of them where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.llama import FURTHER_TYPES, LlamaModel, quantize
from optimum_mla import GQA2MLA, XEcoMLA
from optimum_mla.core.errors import InvalidValueError, UnsupportedModelError
from optimum_mla.export.deepseek import export_deepseek
from optimum_mla.export.gguf_file import FILE_TYPES, ROUNDING, gguf_tensors, write_gguf
from optimum_mla.pipeline import TextOptions, convert, export
from tests.cases import source_model, token_ids

REFERENCE = "benchmarks/reference_model"
TEXT = (
    "The old house stood at the end of the road, and nobody had lived there for 25 years. It's a story!\n\nShe: 'no'."
)
CALIBRATION = token_ids(6, 24)
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: make test-llama-cpp"
)


def regular(method: type = GQA2MLA, family: str = "llama", source: dict[str, Any] | None = None, **options: Any) -> Any:
    """A deepseek_v3 export of a random model that was converted for llama.cpp; `source` changes the model's config."""
    cached = {"rope_cache": "cached"} if method is GQA2MLA else {}
    made = method(
        kv_cache_ratio=0.75, shared_rope="regular", latent_norm=True, calibration=CALIBRATION, **cached, **options
    )
    return export_deepseek(made(source_model(family, **(source or {}))))


@pytest.mark.parametrize("method", [GQA2MLA, XEcoMLA])
@pytest.mark.parametrize("dims", [4, 8])
def test_regular_rotary_dims_are_at_every_so_many_th_frequency(method: type, dims: int) -> None:
    exported = regular(method, qk_rope_head_dim=dims)
    assert exported.config.rope_parameters["rope_type"] == "default"
    assert exported.config.qk_rope_head_dim == dims
    frequencies = exported.model.rotary_emb.inv_freq
    assert torch.allclose(frequencies, source_model("llama").model.rotary_emb.inv_freq[:: 16 // dims])


def test_rotary_dims_that_are_not_regular_are_refused() -> None:
    with pytest.raises(InvalidValueError, match="2, 4, 8, 16 with a regular shared_rope"):
        regular(qk_rope_head_dim=6)
    with pytest.raises(InvalidValueError, match=r"shared_rope.*'odd'.*regular"):
        GQA2MLA(kv_cache_ratio=0.5, rope_cache="cached", shared_rope="odd", calibration=CALIBRATION)


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_a_file_holds_the_model_in_its_type(file_type: str, tmp_path: Path) -> None:
    exported = regular(family="llama multi-head, tied")
    write_gguf(exported, tmp_path / "m.gguf", "m", file_type, None)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = exported.config
    assert fields["general.architecture"] == "deepseek2"
    assert fields["deepseek2.attention.kv_lora_rank"] == config.kv_lora_rank
    assert fields["deepseek2.attention.key_length"] == config.kv_lora_rank + config.qk_rope_head_dim
    assert fields["deepseek2.leading_dense_block_count"] == fields["deepseek2.block_count"] == 3
    wanted = dict(gguf_tensors(exported))
    assert "output.weight" not in wanted  # The head is tied.
    assert {tensor.name for tensor in reader.tensors} == set(wanted)
    for tensor in reader.tensors:
        read = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).reshape(
            wanted[tensor.name].shape
        )
        limit = ROUNDING[file_type] * wanted[tensor.name].abs().max()
        assert (read - wanted[tensor.name]).abs().max() <= limit
    key = wanted["blk.1.attn_k_b.weight"]
    up = exported.model.layers[1].self_attn.kv_b_proj.weight.unflatten(0, (4, -1))
    assert torch.equal(key, up[:, : config.qk_nope_head_dim].mT)


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_latents_are_normed_with_the_one_epsilon_of_the_file(eps: float) -> None:
    exported = regular(XEcoMLA, source={"rms_norm_eps": eps}, q_lora_rank=40)
    tensors, attention = dict(gguf_tensors(exported)), exported.model.layers[1].self_attn
    # States so small that the epsilon is a part of what the norm divides by.
    states = 1e-3 * torch.randn(5, exported.config.hidden_size, generator=torch.Generator().manual_seed(3))
    for name, down, norm, rank in (
        ("attn_q_a", attention.q_a_proj, attention.q_a_layernorm, exported.config.q_lora_rank),
        ("attn_kv_a_mqa", attention.kv_a_proj_with_mqa, attention.kv_a_layernorm, exported.config.kv_lora_rank),
    ):
        made = states @ tensors[f"blk.1.{name}.weight"].T
        gain = tensors[f"blk.1.{name.removesuffix('_mqa')}_norm.weight"]
        found = torch.nn.functional.rms_norm(made[:, :rank], (rank,), gain, eps)
        with torch.no_grad():
            assert torch.allclose(found, norm(down(states)[:, :rank]), rtol=1e-4, atol=1e-6)
            assert torch.allclose(made[:, rank:], down(states)[:, rank:], rtol=1e-5, atol=1e-7)


def test_weights_of_bfloat16_are_not_rounded_again_for_the_epsilon(tmp_path: Path) -> None:
    exported = regular(source={"rms_norm_eps": 1e-5}).to(torch.bfloat16)
    write_gguf(exported, tmp_path / "m.gguf", "m", "bf16", None)
    (stored,) = (of for of in gguf.GGUFReader(tmp_path / "m.gguf").tensors if of.name == "blk.1.attn_kv_a_mqa.weight")
    read = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
    weight, rank = exported.model.layers[1].self_attn.kv_a_proj_with_mqa.weight.float(), exported.config.kv_lora_rank
    # The power of two next to the root of 10, by which the other epsilon is larger.
    assert torch.equal(read[:rank], 4 * weight[:rank])
    assert torch.equal(read[rank:], weight[rank:])


def test_what_llama_cpp_cannot_run_is_refused(tmp_path: Path) -> None:
    plain = GQA2MLA(kv_cache_ratio=0.75, rope_cache="cached", shared_rope=True, calibration=CALIBRATION)
    with pytest.raises(UnsupportedModelError, match=r"no biases.*--latent-norm"):
        write_gguf(export_deepseek(plain(source_model("llama"))), tmp_path / "m.gguf", "m", "f32", None)
    sizes = {"kv_cache_ratio": 0.75, "qk_rope_head_dim": 6, "latent_norm": True}
    irregular = GQA2MLA(rope_cache="cached", shared_rope=True, calibration=CALIBRATION, **sizes)
    with pytest.raises(UnsupportedModelError, match="--shared-rope regular"):
        write_gguf(export_deepseek(irregular(source_model("llama"))), tmp_path / "m.gguf", "m", "f32", None)
    with pytest.raises(InvalidValueError, match="f32, f16, bf16, q8_0"):
        write_gguf(regular(), tmp_path / "m.gguf", "m", "q3", None)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InvalidValueError, match=r"latent_norm.*False.*True with the export format gguf"):
        convert(REFERENCE, tmp_path / "out", options={"latent_norm": False}, export_format="gguf")
    for format in ("gguf", "deepseek_v3"):
        with pytest.raises(
            InvalidValueError, match=r"kv_cache_budget: got 0\.4, allowed: nothing with an export format"
        ):
            convert(REFERENCE, tmp_path / "out", options={"kv_cache_budget": 0.4}, export_format=format)


def test_all_pairs_of_the_source_follow_from_its_base(tmp_path: Path) -> None:
    selecting = XEcoMLA(kv_cache_ratio=0.5, shared_rope=True, latent_norm=True, calibration=CALIBRATION)
    native = selecting(source_model("llama"))
    with pytest.raises(UnsupportedModelError, match="--shared-rope regular"):
        write_gguf(export_deepseek(native), tmp_path / "m.gguf", "m", "f32", None)
    write_gguf(export_deepseek(native, pad_to=(64, 16)), tmp_path / "m.gguf", "m", "f32", None)
    assert (tmp_path / "m.gguf").is_file()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model, converted for llama.cpp."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    options = {"kv_cache_ratio": 0.5, "rope_cache": "cached", "shared_rope": "regular", "latent_norm": True}
    options["qk_rope_head_dim"] = 32  # llama.cpp's quantized caches want multiples of 32.
    convert(
        REFERENCE,
        folder,
        options=options,
        texts=TextOptions(calibration_samples=8, calibration_length=64, eval_samples=1),
    )
    return folder


@needs_llama_cpp
def test_llama_cpp_computes_what_the_converted_model_does(converted: Path, tmp_path: Path) -> None:
    export(str(converted), tmp_path / "out", "gguf", dtype="float32")
    (path,) = (tmp_path / "out").glob("*-F32.gguf")
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(converted)
    ids = tokenizer(TEXT).input_ids
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
        greedy = model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0, len(ids) :].tolist()
    numbers = model.geometry.cache_numbers
    differences = {}
    for cache, size in {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}.items():
        with LlamaModel(path, cache=cache) as llama:
            assert llama.tokens(TEXT) == ids
            differences[cache] = (torch.from_numpy(llama.logits(ids)) - expected).abs().max()
            # llama.cpp prints hundredths of a mebibyte.
            assert llama.cache_bytes == pytest.approx(numbers * size * llama.cells, abs=0.006 * 2**20)
            if cache == "f32":
                assert llama.greedy(ids, 32) == greedy
    assert differences["f32"] < 1e-3
    assert differences["f16"] < differences["q8_0"] < differences["q4_0"]


@needs_llama_cpp
def test_llama_cpp_norms_latents_of_models_with_another_epsilon(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    exported = regular(source={"rms_norm_eps": 1e-3, "vocab_size": 4096})
    write_gguf(exported, tmp_path / "m.gguf", "m", "f32", tokenizer)
    ids = tokenizer(TEXT).input_ids
    with torch.no_grad():
        expected = exported(torch.tensor([ids])).logits[0].numpy()
    with LlamaModel(tmp_path / "m.gguf") as llama:
        assert abs(llama.logits(ids) - expected).max() < 1e-5 * abs(expected).max()


@needs_llama_cpp
@pytest.mark.parametrize("pad_to", ["64+64", "512+64"])
def test_llama_cpp_computes_the_same_of_a_padded_model(converted: Path, tmp_path: Path, pad_to: str) -> None:
    export(str(converted), tmp_path / "plain", "gguf", dtype="float32")
    export(str(converted), tmp_path / "padded", "gguf", dtype="float32", pad_to=pad_to)
    ids = AutoTokenizer.from_pretrained(converted)(TEXT).input_ids
    logits, sizes = {}, {}
    for kind in ("plain", "padded"):
        (path,) = (tmp_path / kind).glob("*.gguf")
        with LlamaModel(path, cache="f32") as llama:
            logits[kind], sizes[kind] = llama.logits(ids), llama.cache_bytes / llama.cells
    rank, dims = map(int, pad_to.split("+"))
    assert sizes["padded"] == pytest.approx(6 * 4 * (rank + dims), rel=0.01)
    assert abs(logits["padded"] - logits["plain"]).max() < 1e-3
    assert sizes["plain"] < sizes["padded"]


@needs_llama_cpp
@pytest.mark.parametrize("kind", FURTHER_TYPES)
def test_llama_cpp_makes_other_types_of_an_f16_file(converted: Path, tmp_path: Path, kind: str) -> None:
    export(str(converted), tmp_path / "out", "gguf", dtype="float32", gguf_type="f16")
    (path,) = (tmp_path / "out").glob("*.gguf")
    quantize(path, tmp_path / "small.gguf", kind)
    assert (tmp_path / "small.gguf").stat().st_size < 0.7 * path.stat().st_size
    ids = AutoTokenizer.from_pretrained(converted)(TEXT).input_ids
    with LlamaModel(path) as llama, LlamaModel(tmp_path / "small.gguf") as small:
        correlation = numpy.corrcoef(llama.logits(ids).ravel(), small.logits(ids).ravel())[0, 1]
    assert correlation > 0.95


@needs_llama_cpp
def test_one_command_converts_and_writes_the_file(tmp_path: Path) -> None:
    texts = TextOptions(calibration_samples=8, calibration_length=64, eval_samples=1)
    convert(REFERENCE, tmp_path / "out", "x-ecomla", {"kv_cache_ratio": 0.5}, texts, export_format="gguf")
    (path,) = (tmp_path / "out").glob("*-BF16.gguf")
    assert not (tmp_path / "out" / "config.json").exists()
    with LlamaModel(path, cache="f16") as llama:
        assert len(llama.greedy(llama.tokens(TEXT), 8)) == 8
