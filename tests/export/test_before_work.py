"""What an export needs is checked before any work: a conversion, a fit to a text, or even the reading of weights."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from optimum_mla.core.errors import InvalidValueError, MissingDependencyError, MLAError, UnsupportedModelError
from optimum_mla.export.gguf_vocabulary import vocabulary_of
from optimum_mla.pipeline import TextOptions, convert, export
from tests.cases import LLAMA3_ROPE, UNCALIBRATED, source_model, token_ids
from tests.export.test_gguf import REFERENCE

TEXTS = TextOptions(calibration_data=token_ids(1, 400)[0].tolist(), calibration_samples=8, calibration_length=32)
ROWS = 4096
"""Number of tokens of the reference model's tokenizer."""
FOR_GGUF = {"rope_cache": "cached", "shared_rope": "regular", "latent_norm": True, "qk_rope_head_dim": 8}


def saved(folder: Path, family: str = "llama", tokenizer: Any = None, **changes: Any) -> Path:
    """A random model with the reference model's tokenizer, or another one."""
    source_model(family, **{"vocab_size": ROWS, **changes}).save_pretrained(folder)
    (tokenizer or AutoTokenizer.from_pretrained(REFERENCE)).save_pretrained(folder)
    return folder


def changed_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """The reference model's tokenizer with other parts of its `tokenizer.json`."""
    content = json.loads(AutoTokenizer.from_pretrained(REFERENCE).backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content | changes)))


def larger_tokenizer() -> Any:
    """A tokenizer with two tokens more than the model has rows, as fine-tuned models of real life have."""
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    tokenizer.add_tokens(["<one>", "<more>"])
    return tokenizer


def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reading of weights fail."""

    def read(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("optimum_mla.pipeline.checkpoint.Checkpoint.load", read)


BEYOND = (
    r"ids up to 4097 \('<more>'\), and the model's embedding has 4096 rows, for ids up to 4095\. Take the tokens "
    r"without a row \(2\) out of the tokenizer, or give them rows by model\.resize_token_embeddings\."
)
TOKENIZERS: dict[str, tuple[Callable[[], Any], str]] = {
    "more tokens than rows": (larger_tokenizer, BEYOND),
    "an unknown pre-tokenizer": (
        lambda: changed_tokenizer(pre_tokenizer={"type": "WhitespaceSplit"}),
        r"not known here \(WhitespaceSplit\)",
    ),
    "a normalizer": (lambda: changed_tokenizer(normalizer={"type": "Lowercase"}), r"not known here \(Lowercase\)"),
    "another kind of model": (
        lambda: changed_tokenizer(
            model={"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}, added_tokens=[]
        ),
        "BPE tokenizers only, and this model's is of type 'WordLevel'",
    ),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was converted for llama.cpp."""
    folder = tmp_path_factory.mktemp("converted")
    source = saved(folder / "source")
    convert(str(source), folder / "model", options={"kv_cache_ratio": 0.75, **FOR_GGUF}, texts=TEXTS)
    return folder / "model"


@pytest.mark.parametrize("command", ["mla-convert", "mla-export"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_that_no_file_can_hold(
    kind: str, command: str, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = TOKENIZERS[kind]
    nothing_is_read(monkeypatch)
    if command == "mla-convert":
        model = saved(tmp_path / "model", tokenizer=make())
        run = lambda: convert(str(model), tmp_path / "out", texts=TEXTS, export_format="gguf")  # noqa: E731
    else:
        model = Path(shutil.copytree(converted, tmp_path / "model"))
        make().save_pretrained(model)
        run = lambda: export(str(model), tmp_path / "out", "gguf")  # noqa: E731
    with pytest.raises(UnsupportedModelError, match=words) as raised:
        run()
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("command", ["mla-convert", "mla-export"])
def test_a_package_that_is_not_installed(
    command: str, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tmp_path / "model")
    nothing_is_read(monkeypatch)
    monkeypatch.setitem(sys.modules, "gguf", None)
    run: Callable[[], Any] = lambda: export(str(converted), tmp_path / "out", "gguf")  # noqa: E731
    if command == "mla-convert":
        run = lambda: convert(str(model), tmp_path / "out", texts=TEXTS, export_format="gguf")  # noqa: E731
    with pytest.raises(MissingDependencyError, match=r"gguf is needed to write a GGUF file.*optimum-mla\[gguf\]"):
        run()


CONVERSIONS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], str, str]] = {
    "biases": ("qwen2", {}, "gqa2mla", {}, "gguf", "the attention of the source has biases"),
    "an activation": ("llama", {"hidden_act": "gelu"}, "gqa2mla", {}, "gguf", "with SiLU, and this model has 'gelu'"),
    "scaled frequencies": (
        *("llama", {"rope_parameters": LLAMA3_ROPE}, "gqa2mla", {}, "gguf"),
        "computes rotary frequencies from one base",
    ),
    "a depth": (
        *("llama", {"num_hidden_layers": 26}, "x-ecomla", {"q_lora_rank": 16}, "gguf"),
        "takes a model of 26 layers for one without a latent of queries",
    ),
    "rotary dims that do not divide": (
        *("llama", {}, "gqa2mla", {"qk_rope_head_dim": 6}, "gguf"),
        "got 6, allowed: 2, 4, 8, 16 with a regular shared_rope",
    ),
    "rotary dims by another rule": (
        *("llama", {}, "x-ecomla", {"rope_selection": "low"}, "gguf"),
        "computes rotary frequencies from one base",
    ),
    "rotary dims that differ": (
        *("llama", {}, "x-ecomla", {"shared_rope": False}, "deepseek_v3"),
        r"the layers rotate at different frequencies.*--shared-rope",
    ),
    "query ranks that differ": (
        *("llama", {}, "x-ecomla", {"q_energy": 0.9}, "deepseek_v3"),
        r"a query rank of its own.*--q-lora-rank",
    ),
}
"""What is wrong: the source, the conversion, the format and the words of the error."""


@pytest.mark.parametrize("case", CONVERSIONS)
def test_a_conversion_that_could_not_be_exported(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, changes, method, options, format, words = CONVERSIONS[case]
    model = saved(tmp_path / "model", family, **changes)
    nothing_is_read(monkeypatch)
    with pytest.raises(MLAError, match=words):
        convert(str(model), tmp_path / "out", method, options, TEXTS, export_format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "options",
    [
        {"rope_selection": "last", "q_lora_rank": 16},
        {"rope_selection": "uniform", "qk_rope_head_dim": 8},
        {"rope_selection": "high", "qk_rope_head_dim": 2},
    ],
    ids=str,
)
def test_rules_that_give_regular_frequencies_need_no_calibration(options: dict[str, Any], tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    options = {"kv_cache_ratio": 0.5, **options}
    convert(str(model), tmp_path / "out", "x-ecomla", options, UNCALIBRATED, export_format="gguf")
    assert [path.suffix for path in (tmp_path / "out").glob("*F32*")] == [".gguf"]


def test_a_dtype_that_no_file_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path / "model", dtype=torch.float64)
    monkeypatch.setattr("optimum_mla.convert.Run.steps", lambda self: pytest.fail("it was converted"))
    with pytest.raises(InvalidValueError, match="dtype: got 'float64', allowed: float32, float16, bfloat16 for a GGUF"):
        convert(str(model), tmp_path / "out", texts=TEXTS, export_format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("source", "arguments", "words"),
    [
        ({}, {"pad_to": "8+8"}, r"pad_to: got '8\+8', allowed: a latent from \d+ and an even number"),
        ({"rope_parameters": LLAMA3_ROPE}, {"format": "gguf"}, "computes rotary frequencies from one base"),
        ({"hidden_act": "gelu"}, {"format": "gguf"}, "with SiLU, and this model has 'gelu'"),
    ],
    ids=["sizes", "scaled frequencies", "an activation"],
)
def test_an_export_is_refused_before_norms_are_fitted(
    source: dict[str, Any],
    arguments: dict[str, Any],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, plain = saved(tmp_path / "source", **source), FOR_GGUF | {"latent_norm": False}
    convert(str(model), tmp_path / "model", options={"kv_cache_ratio": 0.75, **plain}, texts=TEXTS)
    monkeypatch.setattr("optimum_mla.pipeline.exporting.with_latent_norms", lambda *_: pytest.fail("it was fitted"))
    text = f"{REFERENCE}/evaluation.txt"
    with pytest.raises(MLAError, match=words):
        export(str(tmp_path / "model"), tmp_path / "out", latent_norm=True, recover_data=text, **arguments)
    assert not (tmp_path / "out").exists()


def test_a_model_with_more_rows_than_tokens_is_written(tmp_path: Path) -> None:
    """Embeddings are often padded to a multiple of 64."""
    model = saved(tmp_path / "model", vocab_size=ROWS + 64)
    options = {"kv_cache_ratio": 0.75, "qk_rope_head_dim": 8}
    convert(str(model), tmp_path / "out", options=options, texts=TEXTS, export_format="gguf")
    (path,) = (tmp_path / "out").glob("*.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    assert fields["tokenizer.ggml.tokens"][:ROWS] == tokenizer.convert_ids_to_tokens(range(ROWS))
    assert fields["tokenizer.ggml.tokens"][ROWS:] == [f"[PAD{index}]" for index in range(ROWS, ROWS + 64)]
    assert fields["deepseek2.vocab_size"] == ROWS + 64


def test_added_tokens_with_rows_are_held() -> None:
    found = vocabulary_of(larger_tokenizer(), ROWS + 2)
    assert found.tokens[ROWS:] == ["<one>", "<more>"]
    assert found.types[ROWS:] == [int(gguf.TokenType.USER_DEFINED)] * 2
    with pytest.raises(UnsupportedModelError, match=r"Take the tokens without a row \(1\)"):
        vocabulary_of(larger_tokenizer(), ROWS + 1)
