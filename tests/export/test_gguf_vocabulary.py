"""Vocabularies in GGUF files give the same tokens as the tokenizer that they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.llama import LlamaModel
from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.export.gguf_vocabulary import vocabulary_of
from tests.export.test_gguf import REFERENCE, TEXT, needs_llama_cpp, regular, write_gguf

# Environments with other versions of the dependencies do not have it.
sentencepiece = pytest.importorskip("sentencepiece")
sentencepiece_model_pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")


def test_vocabularies_are_those_of_the_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    found = vocabulary_of(tokenizer, 4096 + 2)
    assert (found.model, found.pre) == ("gpt2", "gpt-2")
    assert found.tokens[:4096] == tokenizer.convert_ids_to_tokens(range(4096))
    assert found.tokens[4096:] == ["[PAD4096]", "[PAD4097]"]
    assert len(found.types) == 4098
    assert all(len(merge.split(" ")) == 2 for merge in found.merges)
    assert found.scores is None
    assert found.prefixed is None
    assert found.special["eos"] == tokenizer.eos_token_id


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer of 1,000 pieces that SentencePiece has learned, as those of Llama 2 and Mistral are."""
    folder = tmp_path_factory.mktemp("pieces")
    sentencepiece.SentencePieceTrainer.train(
        input=f"{REFERENCE}/evaluation.txt",
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=1000,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return folder


@pytest.fixture(scope="module", params=["always", "first", "never", "normalizer", "normalizer, never"])
def tokenizer(pieces: Path, request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """The tokenizer in each of the forms in which Transformers writes it."""
    made = LlamaTokenizer.from_pretrained(pieces, legacy=True)
    if request.param == "always":
        return made
    content = json.loads(made.backend_tokenizer.to_str())
    if request.param.startswith("normalizer"):
        content["pre_tokenizer"] = None
        steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
        if request.param == "normalizer":
            steps = [{"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, *steps]}]
        (content["normalizer"],) = steps
    else:
        content["pre_tokenizer"]["prepend_scheme"] = request.param
    return _fast(content)


def _fast(content: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a `tokenizer.json` describes."""
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=_tokenizer(content), **special)


def _tokenizer(content: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(content))


def _processor(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return SentencePiece itself with the vocabulary that a GGUF file gets."""
    found = vocabulary_of(tokenizer, len(tokenizer))
    assert (found.model, found.pre, found.merges) == ("llama", "default", [])
    assert found.scores is not None
    assert found.prefixed is not None
    proto = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(found.tokens, found.scores, found.types, strict=True):
        proto.pieces.add(piece=token, score=score, type=kind)  # GGUF has SentencePiece's numbers of types.
    proto.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = found.prefixed
    proto.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


TEXTS = (
    TEXT,
    "two  spaces, a\ttab,\nnew lines\n\n and ünïcödé: 東京, 🙂!",
    "In 1876, 3.14159 of them; whatsoever.",
)


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_makes_the_same_tokens_of_the_written_vocabulary(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    processor = _processor(tokenizer)
    expected = tokenizer(text, add_special_tokens=False).input_ids
    assert processor.encode(text) == expected
    assert len(set(expected)) > 10


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.sampled_from("aehinorst  ,.'’é\n0159TW東"), min_size=1, max_size=40))
def test_any_text_has_the_same_tokens(pieces: Path, text: str) -> None:
    # SentencePiece and llama.cpp put a space before a text that begins with one too, Transformers' Metaspace does not.
    text = text.lstrip(" ") or "a"
    made = LlamaTokenizer.from_pretrained(pieces, legacy=True)
    assert _processor(made).encode(text) == made(text, add_special_tokens=False).input_ids


def test_types_and_special_tokens_are_those_of_the_file_of_sentencepiece(pieces: Path) -> None:
    made = LlamaTokenizer.from_pretrained(pieces)
    found = vocabulary_of(made, 1002)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((pieces / "tokenizer.model").read_bytes())
    assert found.tokens[:1000] == [piece.piece for piece in proto.pieces]
    assert found.types[:1000] == [piece.type for piece in proto.pieces]
    assert found.types[1000:] == [gguf.TokenType.UNUSED] * 2
    assert (found.special["unk"], found.special["bos"], found.special["eos"]) == (0, 1, 2)
    assert not found.begins
    assert vocabulary_of(LlamaTokenizer.from_pretrained(pieces, add_bos_token=True), 1002).begins


def test_rules_that_llama_cpp_does_not_have_are_refused(pieces: Path) -> None:
    content = json.loads(LlamaTokenizer.from_pretrained(pieces).backend_tokenizer.to_str())
    split = content | {"pre_tokenizer": {"type": "WhitespaceSplit"}}
    with pytest.raises(UnsupportedModelError, match=r"rule that is not known here \(WhitespaceSplit\).*deepseek_v3"):
        vocabulary_of(_fast(split), 1000)
    merges = content["model"]["merges"]
    twice = next(n for n in range(len(merges)) if "".join(merges[n]) == "".join(merges[n + 1]))
    late = content["model"] | {"merges": [*merges[:twice], *merges[twice + 1 :], merges[twice]]}
    with pytest.raises(UnsupportedModelError, match=r"merges of different rank.*deepseek_v3"):
        vocabulary_of(_fast(content | {"model": late}), 1000)
    byte_level = json.loads(AutoTokenizer.from_pretrained(REFERENCE).backend_tokenizer.to_str())
    with pytest.raises(UnsupportedModelError, match=r"rule that is not known here \(none\); known are those of gpt-2"):
        vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=_tokenizer(byte_level | {"pre_tokenizer": None})), 4096)
    nameless = PreTrainedTokenizerFast(tokenizer_object=_tokenizer(content), unk_token="<unk>")
    with pytest.raises(UnsupportedModelError, match="no bos and no eos token"):
        vocabulary_of(nameless, 1000)
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": False}
    with pytest.raises(UnsupportedModelError, match=r"BPE tokenizers only.*'Unigram'.*deepseek_v3"):
        vocabulary_of(_fast(content | {"model": unigram, "added_tokens": []}), 1000)


@needs_llama_cpp
def test_llama_cpp_makes_the_same_tokens(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    write_gguf(regular(source={"vocab_size": 1024}), tmp_path / "m.gguf", "m", "f32", tokenizer)
    with LlamaModel(tmp_path / "m.gguf") as llama:
        for text in TEXTS:
            assert llama.tokens(text) == tokenizer(text).input_ids
