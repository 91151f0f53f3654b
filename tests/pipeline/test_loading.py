"""Broken checkpoints: one line that names the file, whatever the library raised, and nothing is written."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from optimum_mla.core.errors import InvalidValueError, MLAError, UnreadableModelError
from optimum_mla.io.reading import reading
from optimum_mla.pipeline import TextOptions, convert, export, finetune, inspect, quantize
from optimum_mla.pipeline.checkpoint import Checkpoint
from tests.cases import UNCALIBRATED, source_model

REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_model"
PROGRAM = str(Path(sys.executable).with_name("optimum-mla"))
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TEXTS = TextOptions(eval_data=str(REFERENCE / "evaluation.txt"), eval_samples=1, eval_length=16)

Break = Callable[[Path], Any]


def text(name: str, content: str | bytes) -> Break:
    """Replace a file."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def changed(name: str, **values: Any) -> Break:
    """Change fields of a JSON file."""

    def write(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps(content | values))

    return write


def cut(name: str, keep: slice) -> Break:
    """Keep a part of a file."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[keep])


def pickled(content: Any = None, keep: slice | None = None) -> Break:
    """Replace the weights by a PyTorch file: of the same weights, or of something else, or a part of that file."""

    def write(folder: Path) -> None:
        torch.save(load_file(folder / WEIGHTS) if content is None else content, folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()
        if keep is not None:
            cut("pytorch_model.bin", keep)(folder)

    return write


def folder_for(name: str) -> Break:
    """Put a folder where a file was."""

    def write(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return write


SPIRAL = {"rope_type": "spiral", "rope_theta": 10000.0}
CONFIGS: dict[str, tuple[str, Break]] = {
    "config that is no JSON": (r"config\.json is not JSON \(line 1, column 2\)", text("config.json", "{")),
    "config that is empty": (r"config\.json is empty", text("config.json", "")),
    "config that is a list": (r"config\.json holds JSON of another kind \(list\)", text("config.json", "[]")),
    "config that is null": (r"config\.json holds JSON of another kind \(NoneType\)", text("config.json", "null")),
    "config in another encoding": (r"config\.json is not UTF-8 \(byte 2\)", text("config.json", b'{"\xff": 1}')),
    "config that Git LFS keeps": (r"config\.json is a Git LFS pointer.*git lfs pull", text("config.json", LFS)),
    "config that is a folder": (r"config\.json is a folder", folder_for("config.json")),
    "no config": (r"broken did not load: the folder holds no config\.json", lambda f: (f / "config.json").unlink()),
    "adapters alone": (
        r"holds adapters without their model\. Merge them",
        lambda f: (f / "config.json").rename(f / "adapter_config.json"),
    ),
    "no model type": (r"model_type.*config\.json", text("config.json", "{}")),
    "a word for a size": (r"hidden_size.*got str.*config\.json", changed("config.json", hidden_size="x")),
    "half a head": (r"hidden_size.*got float.*config\.json", changed("config.json", hidden_size=64.5)),
    "no layers": (r"num_hidden_layers.*NoneType.*config\.json", changed("config.json", num_hidden_layers=None)),
    "heads that do not divide": (
        r"multiple of the number of attention heads.*config\.json",
        changed("config.json", num_attention_heads=5, head_dim=None),
    ),
    **{
        f"{name} {size}": (
            rf"the config\.json of \S+broken says {name}: {size}, allowed: integers from 1 to \d+\. Take the config",
            changed("config.json", **{name: size}),
        )
        for name, size in (
            ("num_hidden_layers", 0),
            ("num_hidden_layers", -1),
            ("num_hidden_layers", 10**12),
            ("num_key_value_heads", 0),
            ("num_key_value_heads", 10**12),
            ("hidden_size", 0),
            ("hidden_size", -4),
            ("head_dim", -1),
            ("vocab_size", 0),
            ("max_position_embeddings", 0),
        )
    },
    "an unknown rope": (r"spiral.*config\.json", changed("config.json", rope_parameters=SPIRAL)),
    "half a rope": (
        r"factor.*config\.json",
        changed("config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
    ),
    "a word for the rope": (r"rope_parameters.*config\.json", changed("config.json", rope_parameters="yarn")),
    "an unknown activation": (r"wobble.*config\.json", changed("config.json", hidden_act="wobble")),
    "an unknown dtype": (r"float13.*config\.json", changed("config.json", dtype="float13")),
    "too few layer types": (r"layer_types.*config\.json", changed("config.json", layer_types=["full_attention"])),
}
HEADERS: dict[str, tuple[str, Break]] = {
    "weights that Git LFS keeps": (r"model\.safetensors is a Git LFS pointer.*git lfs pull", text(WEIGHTS, LFS)),
    "weights that are empty": (r"model\.safetensors is empty", text(WEIGHTS, "")),
    "half a header": (r"model\.safetensors is not a whole safetensors file", cut(WEIGHTS, slice(100))),
    "other bytes": (r"model\.safetensors is not a whole safetensors file", text(WEIGHTS, b"\x93" * 5000)),
    "a broken index": (r"index\.json is not JSON", text(INDEX, "{")),
    "an index that is a list": (r"index\.json holds JSON of another kind \(list\)", text(INDEX, "[]")),
    "an index without a map": (r"index\.json has no `weight_map`", text(INDEX, "{}")),
    "an index of numbers": (r"index\.json has no `weight_map`", text(INDEX, '{"weight_map": {"a": 1}}')),
    "an index that Git LFS keeps": (r"index\.json is a Git LFS pointer", text(INDEX, LFS)),
    "a missing shard": (r"index\.json names model-00002.*not there", lambda f: shard(f).unlink()),
    "a shard that Git LFS keeps": (r"model-00002\S* is a Git LFS pointer", lambda f: shard(f).write_text(LFS)),
}
PICKLES: dict[str, tuple[str, Break]] = {
    "a pickle that is no pickle": (r"pytorch_model\.bin does not load as PyTorch weights", pickled(keep=slice(7))),
    "a pickle that runs code": (r"pytorch_model\.bin does not load .* without running code", pickled(torch.nn.Tanh())),
    "half a pickle": (r"pytorch_model\.bin does not load as PyTorch weights", pickled(keep=slice(5000))),
    "a pickled list": (r"pytorch_model\.bin holds no dictionary", pickled([1, 2])),
}
WEIGHT_DATA: dict[str, tuple[str, Break]] = {
    "weights that are cut off": (r"model\.safetensors is not a whole safetensors file", cut(WEIGHTS, slice(-1000))),
    "a shard that is cut off": (
        r"model-00002\S* is not a whole safetensors file",
        lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-8]),
    ),
    "other shapes": (
        r"9 weights of .* such as model\.layers\.0\.mlp\.down_proj\.weight: \(64, 80\) in the checkpoint, \(64, 96\)",
        changed("config.json", intermediate_size=96),
    ),
    "another vocabulary": (r"embed_tokens|lm_head", changed("config.json", vocab_size=4097)),
    "missing layers": (r"lacks 9 weights", changed("config.json", num_hidden_layers=4)),
    "adapters without weights": (
        r"the weights of .*broken did not load.*adapter_model\.safetensors",
        lambda f: (f / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(f), "target_modules": ["q_proj"]})
        ),
    ),
    "broken adapters": (r"adapter_config\.json is not JSON", text("adapter_config.json", "{")),
    "broken generation config": (r"generation_config\.json is not JSON", text("generation_config.json", "{")),
    "generation config that is a list": (
        r"generation_config\.json holds JSON of another kind",
        text("generation_config.json", "[]"),
    ),
    "generation config of words": (
        r"the generation config of .*broken did not load.*generation_config\.json",
        changed("generation_config.json", max_new_tokens="x"),
    ),
    **PICKLES,
}
TOKENIZERS: dict[str, tuple[str, Break]] = {
    "a broken tokenizer": (r"tokenizer\.json is not JSON", text("tokenizer.json", "{")),
    "an empty tokenizer": (r"tokenizer\.json is empty", text("tokenizer.json", "")),
    "a tokenizer that Git LFS keeps": (r"tokenizer\.json is a Git LFS pointer", text("tokenizer.json", LFS)),
    "a tokenizer that is a list": (r"tokenizer\.json holds JSON of another kind", text("tokenizer.json", "[]")),
    "another kind of tokenizer": (r"tokenizer of .*KeyError", text("tokenizer.json", "{}")),
    "an unknown model in it": (r"ModelUntagged", changed("tokenizer.json", model={"type": "Nonsense"})),
    "half a tokenizer": (r"the tokenizer of .*broken did not load", lambda f: (f / "tokenizer.json").unlink()),
    "a broken config of it": (r"tokenizer_config\.json is not JSON", text("tokenizer_config.json", "{")),
    "a config of it that is a list": (r"tokenizer_config\.json holds JSON of", text("tokenizer_config.json", "[]")),
    "its config in another encoding": (r"tokenizer_config\.json is not UTF-8", text("tokenizer_config.json", b"{\xff")),
    "tokens that are none": (
        r"added_tokens_decoder",
        changed("tokenizer_config.json", added_tokens_decoder={"x": 3}),
    ),
    "a chat template in another encoding": (
        r"chat_template\.jinja is not UTF-8 \(byte 0\)",
        text("chat_template.jinja", b"\xff"),
    ),
}


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make `one`, `sharded` (the same in several files) and `converted`, each with a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    source = source_model("llama", vocab_size=4096)
    source.save_pretrained(folder / "one")
    source.save_pretrained(folder / "sharded", max_shard_size="300KB")
    for name in ("one", "sharded"):
        AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder / name)
    convert(str(folder / "one"), folder / "converted", "x-ecomla", {"kv_cache_ratio": 0.5}, UNCALIBRATED)
    return folder


@pytest.fixture
def broken(models: Path, tmp_path: Path) -> Callable[[str, Break], str]:
    """Break a copy of a model."""

    def make(case: str, harm: Break, model: str = "one") -> str:
        sharded = "shard" in case or "index" in case
        shutil.copytree(models / ("sharded" if sharded else model), tmp_path / "broken")
        harm(tmp_path / "broken")
        return str(tmp_path / "broken")

    return make


def check_line(error: MLAError, words: str, tmp_path: Path) -> None:
    line = str(error)
    assert "\n" not in line
    assert line.startswith("model: ")
    assert str(tmp_path / "broken") in line
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
    assert re.search(words, line), line


@pytest.mark.parametrize("case", {**CONFIGS, **HEADERS, **WEIGHT_DATA})
def test_a_broken_model_is_one_line_of_convert(case: str, broken: Callable[..., str], tmp_path: Path) -> None:
    words, harm = {**CONFIGS, **HEADERS, **WEIGHT_DATA}[case]
    model = broken(case, harm)
    with pytest.raises(MLAError) as caught:
        convert(model, tmp_path / "out", options={"kv_cache_ratio": 0.5}, texts=UNCALIBRATED)
    check_line(caught.value, words, tmp_path)


@pytest.mark.parametrize("case", {**CONFIGS, **HEADERS})
def test_a_broken_model_is_one_line_of_inspect(case: str, broken: Callable[..., str], tmp_path: Path) -> None:
    words, harm = {**CONFIGS, **HEADERS}[case]
    model = broken(case, harm)
    with pytest.raises(MLAError) as caught:
        inspect(model)
    check_line(caught.value, words, tmp_path)


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_broken_tokenizer_is_refused_where_text_is_read(
    case: str, broken: Callable[..., str], tmp_path: Path
) -> None:
    words, harm = TOKENIZERS[case]
    model = broken(case, harm)
    with pytest.raises(MLAError) as caught:
        convert(model, tmp_path / "out", options={"kv_cache_ratio": 0.5}, texts=TEXTS)
    check_line(caught.value, words, tmp_path)


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_broken_tokenizer_that_nothing_needs_is_said(
    case: str, broken: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    words, harm = TOKENIZERS[case]
    model = broken(case, harm)
    assert Checkpoint(model).tokenizer(needed=False) is None
    (record,) = [record for record in caplog.records if record.name.startswith("optimum_mla")]
    assert re.search(words, record.getMessage()), record.getMessage()
    assert "goes on without a tokenizer" in record.getMessage()


def test_a_model_without_a_tokenizer_is_nothing_to_speak_of(
    broken: Callable[..., str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model = broken("bare", lambda f: [path.unlink() for path in f.glob("tokenizer*")])
    assert Checkpoint(model).tokenizer(needed=False) is None
    assert caplog.text == ""
    with pytest.raises(MLAError, match=r"broken has no tokenizer, which text needs\. Put"):
        convert(model, tmp_path / "out", texts=TEXTS)


def test_a_family_whose_tokenizer_is_made_of_nothing_has_none(tmp_path: Path) -> None:
    source_model("qwen2").save_pretrained(tmp_path)
    assert Checkpoint(str(tmp_path)).tokenizer(needed=False) is None


COMMANDS: dict[str, Callable[[str, Path], Any]] = {
    "quantize": lambda model, out: quantize(model, out),
    "export": lambda model, out: export(model, out),
    "finetune": lambda model, out: finetune(model, out, str(REFERENCE / "evaluation.txt")),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", ["config that is null", "weights that are cut off", "other shapes"])
def test_a_broken_converted_model_is_one_line(
    command: str, case: str, broken: Callable[..., str], tmp_path: Path
) -> None:
    words, harm = {**CONFIGS, **WEIGHT_DATA}[case]
    model = broken(case, harm, "converted")
    with pytest.raises(MLAError) as caught:
        COMMANDS[command](model, tmp_path / "out")
    check_line(caught.value, words, tmp_path)


@pytest.mark.parametrize(
    ("command", "case"),
    [
        ("mla-convert", "weights that Git LFS keeps"),
        ("mla-inspect", "config that is null"),
        pytest.param("mla-inspect", "weights that Git LFS keeps", marks=pytest.mark.slow),
        pytest.param("mla-convert", "another kind of tokenizer", marks=pytest.mark.slow),
    ],
)
def test_the_command_ends_with_one_line_and_code_two(
    command: str, case: str, broken: Callable[..., str], tmp_path: Path
) -> None:
    words, harm = {**CONFIGS, **HEADERS, **TOKENIZERS}[case]
    model = broken(case, harm)
    arguments = ["mla-inspect", "-m", model]
    if command == "mla-convert":
        arguments = [command, "-m", model, "--eval-data", str(REFERENCE / "evaluation.txt"), str(tmp_path / "out")]
    done = subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    check_line(MLAError(line.removeprefix("error: ")), words, tmp_path)
    assert done.stdout == ""


def test_the_command_says_in_one_line_that_a_tokenizer_was_left_out(broken: Callable[..., str], tmp_path: Path) -> None:
    model = broken("tokenizer", text("tokenizer.json", "{}"))
    done = subprocess.run(
        [
            PROGRAM,
            "mla-convert",
            "-m",
            model,
            "--method",
            "x-ecomla",
            "--uncalibrated",
            "--eval-samples",
            "1",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    others = ("optimum.quanto.subpackage", "x-ecomla: ")
    (line,) = [line for line in done.stderr.splitlines() if not any(name in line for name in others)]
    assert line.startswith(f"warning: model: the tokenizer of {model} did not load")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), InvalidValueError("bits", 5, "4")])
def test_what_is_not_about_the_input_passes_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, reading("weights", "model"):
        raise error
    assert caught.value is error


def test_what_is_wrong_with_a_given_config_is_said_of_it(models: Path) -> None:
    checkpoint = Checkpoint(str(models / "one"))
    given = copy.deepcopy(checkpoint.config)
    given.hidden_act = "nonsense"
    with pytest.raises(UnreadableModelError, match="nonsense") as caught:
        checkpoint.load(device="cpu", config=given)
    assert "the weights of" not in str(caught.value)
    checkpoint.load(device="cpu")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(broken: Callable[..., str], tmp_path: Path) -> None:
    model = broken("unreadable", lambda f: (f / WEIGHTS).chmod(0))
    with pytest.raises(MLAError, match=r"model\.safetensors cannot be read \(Permission denied\)"):
        convert(model, tmp_path / "out", texts=UNCALIBRATED)
