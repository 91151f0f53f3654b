"""`mla-inspect` beside what conversions really give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from optimum.commands.optimum_cli import main
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from optimum_mla import GQA2MLA, MHA2MLA, XEcoMLA
from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.measure.memory import resident_peak_bytes
from optimum_mla.methods.registry import transform_class
from optimum_mla.pipeline import TextOptions, convert, export, inspect
from optimum_mla.pipeline.method_choices import METHODS, spelled
from optimum_mla.report.inspection import inspection_text
from tests.cases import FAMILIES, source_model, token_ids

REFERENCE = Path(__file__).resolve().parents[1] / "benchmarks" / "reference_model"
PROGRAM = str(Path(sys.executable).with_name("optimum-mla"))


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_are_what_conversions_give(family: str, tmp_path: Path) -> None:
    source = source_model(family, torch.bfloat16)
    source.save_pretrained(tmp_path)
    found = inspect(str(tmp_path), (0.5,))
    assert (found.state, found.reason, found.dtype) == ("convertible", None, "bfloat16")
    assert found.parameters == source.num_parameters()
    assert found.weight_bytes == 2 * source.num_parameters()
    assert found.source_cache_bytes_per_token == found.cache_bytes_per_token
    spellings = [spelled(name, options) + ", coded" * (size == "kv_cache_budget") for name, options, size in METHODS]
    windowed = family == "mistral with a window"
    assert [choice.method for choice in found.choices] == spellings
    assert all((choice.problem is None) == ("coded" not in choice.method or not windowed) for choice in found.choices)
    turn = list(FAMILIES).index(family)
    for choice, (name, options, size) in [*zip(found.choices, METHODS, strict=True)][turn % 2 :: 2]:
        if choice.problem is not None:
            assert "sliding window" in choice.problem
            continue
        windows = token_ids(4, 72 if size == "kv_cache_budget" else 24)
        method = transform_class(name)(calibration=windows, **{size: 0.5}, **options)
        converted = method(source_model(family, torch.bfloat16))
        if size == "kv_cache_budget":
            codec = converted.latent_codec
            # The gains and 8 bits for all channels may be less than half.
            assert 0.6 * choice.cache_bytes_per_token <= codec.bytes_per_token <= choice.cache_bytes_per_token
            assert choice.cache_percent_of_source == pytest.approx(50, rel=0.01)
            numbers = sum(layer.latent_down.numel() + layer.latent_up.numel() for layer in codec.layers.values())
            assert 0 < numbers <= choice.parameters_added_most
            continue
        # Ranks may move between layers of one total; how many dims rotate is chosen by measuring.
        assert choice.cache_numbers_per_token == pytest.approx(converted.geometry.cache_numbers, abs=3)
        assert choice.cache_bytes_per_token == 2 * choice.cache_numbers_per_token
        assert choice.cache_percent_of_source == pytest.approx(100 * converted.geometry.cache_ratio, abs=1)
        added = converted.num_parameters() - source.num_parameters()
        assert choice.parameters_added <= added <= choice.parameters_added_most
        if options == {"positional": "full"}:
            assert choice.parameters_added == choice.parameters_added_most


def test_features_and_blockers_are_named(tmp_path: Path) -> None:
    wanted = {
        "llama": ([], {}),
        "llama with biases": (["query biases", "key and value biases"], {"llama.cpp (deepseek2)": "biases"}),
        "llama with yarn": (["yarn rotary scaling"], {}),
        "llama multi-head, tied": (["tied embeddings"], {}),
        "mistral with a window": (["sliding windows"], {"plain Transformers (deepseek_v3)": "sliding windows"}),
        "qwen3": (["norms on queries and keys"], {"plain Transformers (deepseek_v3)": "norms on queries and keys"}),
    }
    for number, (family, (features, blocked)) in enumerate(wanted.items()):
        source_model(family).save_pretrained(tmp_path / str(number))
        found = inspect(str(tmp_path / str(number)))
        assert found.features == features
        engines = {engine.engine: engine for engine in found.engines}
        assert engines["Transformers with optimum-mla"].blockers == []
        for name, reason in blocked.items():
            assert any(reason in blocker for blocker in engines[name].blockers)
        if not blocked:
            assert engines["plain Transformers (deepseek_v3)"].blockers == []
        # 64 numbers per token are fewer than any kernel's latent.
        assert "larger than the source's" in engines["FlashMLA kernels"].blockers[0] or blocked


def test_kernels_say_what_they_cost(tmp_path: Path) -> None:
    changes = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128}
    source_model("llama", torch.bfloat16, **changes, num_hidden_layers=1).save_pretrained(tmp_path)
    engines = {engine.engine: engine for engine in inspect(str(tmp_path)).engines}
    assert engines["FlashMLA kernels"].options.endswith("--kv-lora-rank 512 --qk-rope-head-dim 64")
    assert engines["FlashMLA kernels"].cache_percent_of_source == 100 * 576 / 1024


@pytest.mark.parametrize(
    ("method", "blocked"),
    [
        (lambda: XEcoMLA(kv_cache_ratio=0.5), []),
        (lambda: MHA2MLA(kv_cache_ratio=0.5), ["a rotary key per head"]),
        (lambda: GQA2MLA(kv_cache_ratio=0.5), ["layers without a decoupled rotary key"]),
    ],
)
def test_a_converted_model_says_who_runs_it(method: Any, blocked: list[str], tmp_path: Path) -> None:
    model = method()(source_model("llama"))
    model.save_pretrained(tmp_path)
    found = inspect(str(tmp_path))
    assert (found.state, found.choices, found.conversion_memory_bytes) == ("converted", [], None)
    assert found.cache_bytes_per_token == 2 * model.geometry.cache_numbers  # in 16 bits, though the model is in float32
    engines = {engine.engine: engine.blockers for engine in found.engines}
    assert engines["plain Transformers (deepseek_v3)"] == blocked
    sizes = ["rank 24 (it supports 512)", "8 rotary dims (it supports 64), which mla-export --pad-to 512+64 gives"]
    assert engines["FlashMLA kernels"] == (blocked or sizes)


@pytest.mark.parametrize("shared", [True, "regular", False])
def test_frequencies_chosen_by_layer_block_engines(shared: Any, tmp_path: Path) -> None:
    """What is said of an engine agrees with what the export that it loads takes."""
    options = {"kv_cache_ratio": 0.5, "rope_cache": "cached", "qk_rope_head_dim": 16, "shared_rope": shared}
    options["latent_norm"] = shared == "regular"
    texts = TextOptions(
        calibration_data=str(REFERENCE / "calibration.txt"), calibration_samples=4, calibration_length=32
    )
    convert(str(REFERENCE), tmp_path / "out", "gqa2mla", options, texts)
    engines = {engine.engine: engine for engine in inspect(str(tmp_path / "out")).engines}
    assert engines["Transformers with optimum-mla"].blockers == []
    plain, llama_cpp = engines["plain Transformers (deepseek_v3)"], engines["llama.cpp (deepseek2)"]
    assert plain.options == "mla-export --format deepseek_v3"
    assert llama_cpp.options == "mla-export --format gguf"
    assert bool(plain.blockers) == (not shared)
    assert bool(llama_cpp.blockers) == (shared != "regular")
    for engine, form in ((plain, "deepseek_v3"), (llama_cpp, "gguf")):
        if engine.blockers:
            with pytest.raises(UnsupportedModelError):
                export(str(tmp_path / "out"), tmp_path / form, form)
        else:
            export(str(tmp_path / "out"), tmp_path / form, form)


def test_a_checkpoint_larger_than_memory_is_no_matter(tmp_path: Path) -> None:
    AutoConfig.from_pretrained(REFERENCE).save_pretrained(tmp_path)
    rows, width = 2**20, 2**15  # 64 GiB in 16 bits
    entry = {"dtype": "BF16", "shape": [rows, width], "data_offsets": [0, 2 * rows * width]}
    header = json.dumps({"weight": entry}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * rows * width)  # a file of holes
    before = resident_peak_bytes()
    found = inspect(str(tmp_path))
    assert (found.parameters, found.weight_bytes) == (rows * width, 2 * rows * width)
    assert resident_peak_bytes() - before < 2**28


def test_what_cannot_be_converted_says_why(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50)).save_pretrained(tmp_path / "gpt2")
    found = inspect(str(tmp_path / "gpt2"))
    assert found.state == "not convertible"
    assert found.reason is not None
    assert "model_type: got 'gpt2', supported: " in found.reason
    assert inspection_text(found).splitlines()[1].startswith("not convertible: model_type")

    source_model("llama").save_pretrained(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    assert inspect(str(tmp_path / "packed")).reason.startswith("its weights are quantized; ")


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="nowhere did not load"):
        inspect(str(tmp_path / "nowhere"))
    AutoConfig.from_pretrained(REFERENCE).save_pretrained(tmp_path / "empty")
    with pytest.raises(UnsupportedModelError, match="holds no safetensors files"):
        inspect(str(tmp_path / "empty"))
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"\x10\x00\x00\x00")
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors is not a whole safetensors file"):
        inspect(str(tmp_path / "empty"))


def test_a_ratio_that_a_method_cannot_have_is_a_note() -> None:
    found = inspect(str(REFERENCE), (0.125, 1.0))
    assert [choice.method for choice in found.choices if choice.problem] == ["gqa2mla, coded", "x-ecomla"]
    text = inspection_text(found)
    assert "x-ecomla, 0.125: kv_cache_ratio: got 0.125" in text
    assert "gqa2mla, coded, 1: kv_cache_budget: got 1.0, allowed: above 0, up to 0.5" in text
    assert "gqa2mla, 1 " in text


def test_the_command_prints_text_or_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["mla-inspect", str(REFERENCE)]
    monkeypatch.setattr(sys, "argv", ["optimum-cli", *arguments])
    main()
    printed = capsys.readouterr().out
    assert "convertible" in printed
    assert "the source caches 1,536 bytes per token" in printed
    assert " to +" in printed  # parameters, where calibration chooses
    monkeypatch.setattr(sys, "argv", ["optimum-cli", *arguments, "--json", "--kv-cache-ratios", "0.25"])
    main()
    content = json.loads(capsys.readouterr().out)
    assert {choice["kv_cache_ratio"] for choice in content["choices"]} == {0.25}
    assert content["choices"][0]["cache_percent_of_source"] == 25.0
    assert content["conversion_memory_bytes"] > content["weight_bytes"]


def test_only_the_weights_that_transformers_loads_count(tmp_path: Path) -> None:
    source = source_model("llama")
    source.save_pretrained(tmp_path / "whole")
    weights = (tmp_path / "whole" / "model.safetensors").read_bytes()
    (tmp_path / "whole" / "consolidated.safetensors").write_bytes(weights)
    (tmp_path / "whole" / "adapter_model.safetensors").write_bytes(b"no weights")
    assert inspect(str(tmp_path / "whole")).parameters == source.num_parameters()
    source.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1
    assert inspect(str(tmp_path / "sharded")).parameters == source.num_parameters()
    shards[1].unlink()
    with pytest.raises(UnsupportedModelError, match=shards[1].name):
        inspect(str(tmp_path / "sharded"))
    for broken in ("", "[]", '{"weight_map": 1}', "{}"):
        (tmp_path / "sharded" / "model.safetensors.index.json").write_text(broken)
        with pytest.raises(UnsupportedModelError, match=r"model\.safetensors\.index\.json"):
            inspect(str(tmp_path / "sharded"))


def test_headers_are_all_that_is_read(tmp_path: Path) -> None:
    source = source_model("qwen3", torch.bfloat16)
    source.save_pretrained(tmp_path)
    whole = inspect(str(tmp_path))
    path = tmp_path / "model.safetensors"
    weights = path.read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")
    path.write_bytes(weights[:header])
    assert inspect(str(tmp_path)) == whole
    for end in (0, 7, 8, header - 1):
        path.write_bytes(weights[:end])
        with pytest.raises(UnsupportedModelError, match=r"model\.safetensors is (not a whole safetensors file|empty)"):
            inspect(str(tmp_path))


class Hub(SimpleHTTPRequestHandler):
    """What `/OWNER/NAME/resolve/REVISION/FILE` of the hub answers; notes the bytes of each file that it sends."""

    sent: dict[str, int]

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = Path(self.directory) / self.path.rpartition("/")[2]
        content = path.read_bytes() if "/resolve/" in self.path and path.is_file() else None
        self.send_response(404 if content is None else 206 if "range" in self.headers else 200)
        if content is not None and "range" in self.headers:
            first, last = self.headers["range"].removeprefix("bytes=").split("-")
            content = content[int(first) : int(last) + 1]
        for name, value in (("ETag", '"1"'), ("X-Repo-Commit", 40 * "0"), ("Content-Length", len(content or b""))):
            self.send_header(name, str(value))
        self.end_headers()
        if content is not None and self.command == "GET":
            self.sent[path.name] = self.sent.get(path.name, 0) + len(content)
            self.wfile.write(content)


def test_of_a_hub_id_only_config_and_headers_are_read(tmp_path: Path) -> None:
    source = source_model("llama", vocab_size=20_000)
    source.save_pretrained(tmp_path / "model")
    Hub.sent = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(tmp_path / "model")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [PROGRAM, "mla-inspect", "owner/model", "--json", "--cache-dir", str(tmp_path / "downloads")],
        capture_output=True,
        text=True,
        env={name: value for name, value in environment.items() if "proxy" not in name.lower()},
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] == source.num_parameters()
    assert Hub.sent["model.safetensors"] <= 100_001 < (tmp_path / "model" / "model.safetensors").stat().st_size
    assert not list((tmp_path / "downloads").rglob("*.safetensors"))


def test_a_downloaded_model_is_inspected_offline(tmp_path: Path) -> None:
    place = tmp_path / "models--owner--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(40 * "0")
    source = source_model("llama")
    source.save_pretrained(place / "snapshots" / (40 * "0"))
    found = inspect("owner/model", hub={"cache_dir": str(tmp_path)})
    assert (found.state, found.parameters) == ("convertible", source.num_parameters())
    (place / "snapshots" / (40 * "0") / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="the headers of owner/model did not load"):
        inspect("owner/model", hub={"cache_dir": str(tmp_path)})


def test_bad_input_of_the_command_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "mla-inspect", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as exit_:
        main()
    printed = capsys.readouterr()
    assert (exit_.value.code, printed.out) == (2, "")
    (line,) = [line for line in printed.err.splitlines() if "optimum.quanto.subpackage" not in line]
    assert line.startswith("error: model: ")
