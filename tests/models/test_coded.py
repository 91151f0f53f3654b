"""Models with a codec: they are their source, `generate` codes old tokens by itself, and they are saved and loaded."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, PreTrainedModel

from optimum_mla import GQA2MLA, MHA2MLA, CalibrationStatistics, compose, load_codec, trace
from optimum_mla.cache.codec_layer import CodecCache, ExactTokens
from optimum_mla.convert.codec import fit_codec
from optimum_mla.core.errors import InvalidValueError, UnreadableModelError, UnsupportedModelError
from optimum_mla.measure.memory import live_cache_bytes
from optimum_mla.models.codec import CODEC_FILE, ModelCodec
from optimum_mla.models.coded import CodedGeneration, coded_loader, with_codec, without_codec
from optimum_mla.pipeline.placement import layers_on_disk
from tests.cases import source_model, token_ids

EXACT = ExactTokens(sinks=4, recent=8, together=4)
IDS = token_ids(8, 48)
PROMPT = token_ids(2, 30)
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def codec() -> ModelCodec:
    return fit_codec(source_model("llama").eval(), IDS, 0.4, exact=EXACT)


def model(dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    return source_model("llama", dtype, **sizes).eval()


@torch.no_grad()
def test_the_model_is_its_source_and_generates_over_codes(codec: ModelCodec) -> None:
    source = model()
    expected, kind = source(PROMPT).logits, type(source)
    coded: Any = with_codec(source, codec)
    assert coded is source
    assert isinstance(coded, kind)
    assert type(coded).__name__ == kind.__name__
    assert torch.equal(coded(PROMPT).logits, expected)
    made = coded.generate(PROMPT, **GREEDY)
    assert isinstance(made.past_key_values, CodecCache)
    assert made.past_key_values.layers[0].coded == EXACT.coded(41)
    assert live_cache_bytes(made.past_key_values) == 2 * codec.cache_bytes(41, 4)
    own = coded.generate(PROMPT, past_key_values=coded.make_cache(), **GREEDY)
    assert torch.equal(own.sequences, made.sequences)
    # Codes move the predictions a little; what follows the prompt at once is exact.
    plain = model().generate(PROMPT, output_logits=True, **GREEDY)
    assert torch.equal(plain.sequences[:, 30], made.sequences[:, 30])


@torch.no_grad()
@pytest.mark.parametrize("chosen", ["dynamic", "static", "given", "none"])
def test_another_cache_that_is_chosen_is_taken(
    codec: ModelCodec, chosen: str, caplog: pytest.LogCaptureFixture
) -> None:
    once: Any = logging.Logger.warning_once  # type: ignore[attr-defined]
    once.cache_clear()
    coded: Any = with_codec(model(), codec)
    options: dict[str, Any] = {"cache_implementation": chosen}
    if chosen == "given":
        options = {"past_key_values": DynamicCache(config=coded.config)}
    elif chosen == "none":
        options = {"use_cache": False}
    made, plain = coded.generate(PROMPT, **options, **GREEDY), model().generate(PROMPT, **GREEDY)
    assert not isinstance(made.past_key_values, CodecCache)
    assert torch.equal(made.sequences, plain.sequences)
    assert ("does not use the codec of this model" in caplog.text) == (chosen in ("dynamic", "static"))


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 3, "do_sample": True},
        {"assistant": 1},
    ],
    ids=str,
)
def test_ways_to_generate(codec: ModelCodec, options: dict[str, Any]) -> None:
    coded: Any = with_codec(model(), codec)
    if options.pop("assistant", None):
        options["assistant_model"] = with_codec(model(), codec)
    one = "assistant_model" in options or "prompt_lookup_num_tokens" in options
    made = coded.generate(PROMPT[:1] if one else PROMPT, **{**GREEDY, **options})
    assert isinstance(made.past_key_values, CodecCache)
    assert made.sequences.shape[1] == 42


@torch.no_grad()
def test_it_is_saved_loaded_copied_and_pickled(codec: ModelCodec, tmp_path: Path) -> None:
    coded: Any = with_codec(model(), codec)
    coded.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert config["latent_codec"] == CODEC_FILE
    expected = coded.generate(PROMPT, **GREEDY).sequences
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    for again in (loaded, copy.deepcopy(coded), pickle.loads(pickle.dumps(coded))):
        assert isinstance(again, CodedGeneration)
        assert torch.equal(again.generate(PROMPT, **GREEDY).sequences, expected)
    back = without_codec(loaded)
    assert type(back) is type(model())
    assert torch.equal(back.generate(PROMPT, **GREEDY).sequences, model().generate(PROMPT, **GREEDY).sequences)
    _, notes = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    assert type(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))) is type(model())


def test_what_goes_back_names_no_codec(codec: ModelCodec, tmp_path: Path) -> None:
    with_codec(model(), codec).save_pretrained(tmp_path / "coded")
    back = without_codec(AutoModelForCausalLM.from_pretrained(tmp_path / "coded"))
    back.save_pretrained(tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text(encoding="utf-8"))
    assert not {"latent_codec", "auto_map"} & set(config)
    index = json.loads((tmp_path / "coded" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    other = tmp_path / "root" / "inner"
    with_codec(model(), codec).save_pretrained(other)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "root", subfolder="inner"), CodedGeneration)
    coded: Any = with_codec(model(), codec)
    coded.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none" / CODEC_FILE).exists()


def test_offloaded_weights_are_checked_too(codec: ModelCodec, tmp_path: Path) -> None:
    with_codec(model(), codec).save_pretrained(tmp_path / "coded")
    place = layers_on_disk(AutoConfig.from_pretrained(tmp_path / "coded"), torch.device("cpu"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "coded", device_map=place, offload_folder=tmp_path / "offload"
    )
    assert isinstance(loaded, CodedGeneration)
    assert isinstance(loaded.generate(PROMPT, **GREEDY).past_key_values, CodecCache)


SCRIPT = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **eval(sys.argv[2]))
print(type(model).__module__, "optimum_mla" in sys.modules, hasattr(model, "latent_codec"))
"""


@pytest.mark.parametrize(
    ("options", "said"), [({}, "False False"), ({"trust_remote_code": True}, "True True")], ids=str
)
def test_without_the_package_it_is_its_source(
    codec: ModelCodec, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with_codec(model(), codec).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(options)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == f"transformers.models.llama.modeling_llama {said}"


def test_a_plain_model_is_loaded_by_its_own_class(tmp_path: Path) -> None:
    source = model()
    source.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(source)
    assert issubclass(coded_loader("llama"), type(source))
    with pytest.raises(UnsupportedModelError, match="model_type: got 'none', allowed: arcee"):
        coded_loader("none")


def test_a_codec_that_does_not_fit_leaves_the_source_with_a_warning(
    codec: ModelCodec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_codec(model(), codec).save_pretrained(tmp_path)
    other = model()
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight.normal_()
    other.save_pretrained(tmp_path / "other")
    for left in (CODEC_FILE, "config.json", "modeling_latent_codec.py"):
        (tmp_path / "other" / left).write_bytes((tmp_path / left).read_bytes())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    assert not isinstance(loaded, CodedGeneration)
    assert "the keys and values of layer 0 are not those" in caplog.text
    assert "loaded without its codec" in caplog.text
    (tmp_path / CODEC_FILE).unlink()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(model())


def test_load_codec_names_what_is_wrong(codec: ModelCodec, tmp_path: Path) -> None:
    codec.save(tmp_path)
    assert isinstance(load_codec(model(torch.bfloat16), tmp_path), CodedGeneration)
    with pytest.raises(UnreadableModelError, match=f"codec: .*{CODEC_FILE} could not be read"):
        load_codec(model(), tmp_path / "nowhere")
    with pytest.raises(UnsupportedModelError, match=r"got a PeftModel.*get_base_model"):
        load_codec(get_peft_model(model(), LoraConfig(target_modules=["k_proj"])), tmp_path)  # type: ignore[type-var]
    with pytest.raises(UnsupportedModelError, match="got a qwen2, allowed: the llama of this codec"):
        load_codec(source_model("qwen2"), tmp_path)


@torch.no_grad()
def test_peft_adapts_the_projections_of_the_source_and_merges(codec: ModelCodec) -> None:
    coded = with_codec(model(), codec)
    adapted: Any = get_peft_model(coded, LoraConfig(r=2, target_modules=["k_proj", "v_proj"]))
    assert isinstance(adapted, PeftModel)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 3
    with torch.enable_grad():
        adapted(PROMPT, labels=PROMPT).loss.backward()
    assert all(adapted.get_parameter(name).grad is not None for name in trained)
    assert isinstance(adapted.generate(input_ids=PROMPT, **GREEDY).past_key_values, CodecCache)
    merged: Any = adapted.merge_and_unload()
    assert isinstance(merged.generate(PROMPT, **GREEDY).past_key_values, CodecCache)


QUANTIZED = {"bnb-nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
QUANTIZED["bnb-int8"] = BitsAndBytesConfig(load_in_8bit=True)


@torch.no_grad()
@pytest.mark.parametrize("how", QUANTIZED)
def test_quantized_weights_stay_as_they_are(how: str, tmp_path: Path) -> None:
    fits = {"intermediate_size": 128}  # as the kernels of bitsandbytes for CPUs want it
    model(**fits).save_pretrained(tmp_path)

    def quantized() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QUANTIZED[how]).eval()

    source = quantized()
    expected = source(PROMPT).logits
    fitted = fit_codec(source, IDS, 0.4, exact=EXACT)
    coded: Any = with_codec(source, fitted)
    assert torch.equal(coded(PROMPT).logits, expected)
    assert isinstance(coded.generate(PROMPT, **GREEDY).past_key_values, CodecCache)
    fitted.check(quantized())
    fitted.check(model(**fits))  # The codec of quantized weights serves the weights that they stand for.


@torch.no_grad()
def test_the_transformation_gives_a_codec_and_takes_it_back(tmp_path: Path) -> None:
    source, windows = model(), token_ids(6, 80)
    expected = source(PROMPT).logits
    method = GQA2MLA(kv_cache_budget=0.25, calibration=windows)
    assert method.options == {"layers": "all", "kv_cache_budget": 0.25}
    assert method.preserves_computation
    assert method.check(source.config) is source.config
    copied: Any = method(source, copy=True)
    assert isinstance(copied, CodedGeneration)
    assert not isinstance(source, CodedGeneration)
    coded: Any = method(source)
    assert coded is source
    assert torch.equal(coded(PROMPT).logits, expected)
    whole = coded.latent_codec.source_bytes(1)
    assert coded.latent_codec.bytes_per_token == pytest.approx(0.25 * whole, rel=0.02)
    some: Any = GQA2MLA(kv_cache_budget=0.25, calibration=windows, layers="1-2")(model())
    assert list(some.latent_codec.layers) == [1, 2]
    statistics = CalibrationStatistics.gather(model(), windows, tmp_path)
    stored: Any = GQA2MLA(kv_cache_budget=0.25, calibration=statistics)(model())
    assert stored.latent_codec.bytes_per_token == pytest.approx(0.25 * whole, rel=0.02)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "too much": (lambda: GQA2MLA(kv_cache_budget=0.7, calibration=IDS), InvalidValueError, "got 0.7, allowed: above 0"),
    "method": (lambda: MHA2MLA(kv_cache_budget=0.25, calibration=IDS), InvalidValueError, "nothing with mha2mla"),
    "no text": (lambda: GQA2MLA(kv_cache_budget=0.25), InvalidValueError, "nothing without calibration"),
    "about weights": (
        lambda: GQA2MLA(kv_cache_budget=0.25, calibration=IDS, rope_cache="cached"),
        InvalidValueError,
        "rope_cache: got 'cached', allowed: nothing with kv_cache_budget",
    ),
    "heal": (
        lambda: GQA2MLA(kv_cache_budget=0.25, calibration=IDS, heal=True),
        InvalidValueError,
        "heal: got True, allowed: nothing with kv_cache_budget",
    ),
    "short windows": (
        lambda: GQA2MLA(kv_cache_budget=0.25, calibration=IDS)(model()),
        InvalidValueError,
        "calibration_length: got 48, allowed: more than 68",
    ),
    "composed": (
        lambda: compose(
            GQA2MLA(kv_cache_budget=0.25, calibration=IDS, layers="0"), GQA2MLA(kv_cache_ratio=0.5, layers="1")
        )(model()),
        InvalidValueError,
        "kv_cache_budget: got 0.25, allowed: nothing beside another method",
    ),
    "a graph": (
        lambda: GQA2MLA(kv_cache_budget=0.25, calibration=IDS)(trace(model())),
        UnsupportedModelError,
        "kv_cache_budget: got a TracedLlamaForCausalLM",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_budget_leaves_no_room_for_is_refused(name: str) -> None:
    made, kind, said = REFUSED[name]
    with pytest.raises(kind, match=said.replace(".", r"\.")):
        made()


def test_models_whose_weights_were_converted_for_codes_are_refused_in_a_line(tmp_path: Path) -> None:
    converted: PreTrainedModel = GQA2MLA(kv_cache_ratio=0.5, calibration=token_ids(4, 24))(model())
    converted.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    layers = {"channel_bits": [], "per_layer_config": {"0": {"channel_bits": [[4, 8]]}}}
    for fields in ({**config, "channel_bits": [[4, 8]]}, {**config, **layers}):
        path.write_text(json.dumps(fields), encoding="utf-8")
        with pytest.raises(UnsupportedModelError, match="Convert its source again with mla-convert --cache-budget"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
