"""Reading text and cutting it into windows."""

from __future__ import annotations

import itertools
import json
from itertools import pairwise
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from optimum_mla.calibrate.text import (
    PIECE_CHARACTERS,
    cut_windows,
    text_beginning,
    text_pieces,
    token_windows,
    window_length,
)
from optimum_mla.core.errors import CalibrationDataError, InvalidValueError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
REFERENCE = BENCHMARKS / "reference_model"
BOS, EOS = 0, 1


def trained(style: str, **template: str) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer as models have it, trained on a few words.

    Args:
        style: `bytes` (GPT-2, Llama 3, Qwen), or a space in front of every text: by a normalizer (Llama 2), or by a
            pre-tokenizer (`always`, `first`: Mistral, Gemma).
        template: What is put around a text (`single`); nothing by default.
    """
    tokenizer = Tokenizer(models.BPE())
    if style == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif style == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=style)
    # Single words, as vocabularies hold no tokens that span words.
    words = [
        "the",
        "old",
        "gentleman",
        "sat",
        "down.",
        "Nobody",
        "spoke,",
        "42",
        "a",
        "b",
        "c漢字",
        "--",
        "it's",
        "is",
        "done!",
    ]
    tokenizer.train_from_iterator(
        [*words, *(f" {word}" for word in words), "\n\n"] * 3,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"]),
    )
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            **template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


class Letters:
    """A tokenizer: one token a character."""

    def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_windows_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij", encoding="utf-8")
    windows = token_windows(Letters(), tmp_path / "a.txt", length=4)
    assert ["".join(map(chr, row)) for row in windows.tolist()] == ["abcd", "efgh"]
    assert token_windows(Letters(), str(tmp_path / "a.txt"), length=4, samples=1).shape == (1, 4)
    assert token_windows(Letters(), tmp_path / "a.txt", length=4, samples=9).shape == (2, 4)


def test_windows_run_over_the_files_of_a_folder_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("def")
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "ignored.md").write_text("xyz")
    assert "".join(map(chr, token_windows(Letters(), tmp_path, length=6)[0].tolist())) == "abcdef"


def test_windows_of_token_ids() -> None:
    assert torch.equal(token_windows(None, range(7), length=3), torch.arange(6).view(2, 3))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "none").mkdir()
    for source, words in (
        (tmp_path / "latin.txt", "not UTF-8"),
        (tmp_path / "empty.txt", "0 tokens"),
        (tmp_path / "none", "no files of text"),
        (tmp_path / "missing.txt", "No such file"),
        ("no-such/dataset", "no-such/dataset could not be read"),
        ([1.5, 2], "have to be integers"),
    ):
        with pytest.raises(CalibrationDataError, match=words):
            token_windows(Letters(), source, length=2)
    with pytest.raises(CalibrationDataError, match=r"eval-data: .* fewer than one sample of 9"):
        token_windows(Letters(), [1, 2], length=9, field="eval-data")


@given(
    words=st.lists(st.text(st.sampled_from("ab 7_\n\u2028\u0085\x0c，漢字"), max_size=9), min_size=1),
    fill=st.text("xy z"),
    block=st.integers(1000, 2 * PIECE_CHARACTERS),
)
def test_pieces_are_the_text_however_it_is_read(words: list[str], fill: str, block: int) -> None:
    unit = "".join(words) + fill
    text = unit * (2 * PIECE_CHARACTERS // max(1, len(unit)))
    pieces = list(text_pieces(text[start : start + block] for start in range(0, len(text), block)))
    assert pieces == list(text_pieces([text]))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= PIECE_CHARACTERS for piece in pieces)
    assert len(pieces) <= 1 + len(text) // (PIECE_CHARACTERS // 2)


@pytest.mark.parametrize(
    ("unit", "before", "after"),
    [("ab. cd\n\nef gh\n", "f", " g"), ("ab.\n\ncd\n", "d", "\n"), ("ab.;\u0301", "b", ".;"), ("漢字，", "字", "，")],
)
def test_cuts_are_where_tokenizers_split(unit: str, before: str, after: str) -> None:
    pieces = list(text_pieces([unit * PIECE_CHARACTERS]))
    assert len(pieces) > 2
    assert pieces[0].endswith(before)
    assert pieces[1].startswith(after)


@pytest.mark.parametrize("style", ["bytes", "normalizer", "always", "first"])
@given(parts=st.lists(st.sampled_from([" the", " old", "\n\n", " ", ".", " 42", "a", " b", "漢字", ","]), max_size=20))
def test_pieces_give_the_tokens_of_the_whole(
    style: str, parts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokenizer = trained(style)
    text = ("".join(parts) + " it is") * 40
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optimum_mla.calibrate.text.PIECE_CHARACTERS", 200)
        windows = token_windows(tokenizer, file, 1)
    assert windows.flatten().tolist() == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("model", ["reference_model", "multi_head_model", "qwen3_model"])
def test_the_texts_of_the_benchmarks_have_the_tokens_of_the_whole(model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BENCHMARKS / model)
    for file in (BENCHMARKS / model / "calibration.txt", BENCHMARKS / model / "evaluation.txt"):
        whole = tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"]
        assert token_windows(tokenizer, file, 1).flatten().tolist() == whole


def test_no_more_is_read_and_tokenized_than_the_windows_need(tmp_path: Path) -> None:
    seen = 0

    class Counting(Letters):
        def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
            nonlocal seen
            seen += len(text)
            return super().__call__(text, **options)

    for name, head in (("a.txt", b"It is. " * 100_000), ("a.jsonl", b'{"text": "It is. "}\n' * 50_000)):
        with (tmp_path / name).open("wb") as handle:
            handle.write(head)
            handle.truncate(10**12)  # The rest is a hole of NUL, which would be refused.
        seen = 0
        assert token_windows(Counting(), tmp_path / name, length=512, samples=4).shape == (4, 512)
        assert seen <= PIECE_CHARACTERS + 10


@pytest.mark.parametrize(
    ("template", "beginning"), [("$A", []), ("<s> $A", [BOS]), ("<s> $A </s>", [BOS]), ("<s> <s> $A </s>", [BOS, BOS])]
)
def test_windows_begin_as_the_tokenizer_begins_a_text(template: str, beginning: list[int], tmp_path: Path) -> None:
    tokenizer, bare = trained("bytes", single=template), trained("bytes")
    assert text_beginning(tokenizer) == beginning
    text = "the old gentleman sat down. " * 20
    ids = bare(text)["input_ids"]
    (tmp_path / "a.txt").write_text(text)
    windows = token_windows(tokenizer, tmp_path / "a.txt", length=7)
    content = 7 - len(beginning)
    assert windows.tolist() == [
        beginning + ids[start : start + content] for start in range(0, len(ids) - content + 1, content)
    ]
    assert token_windows(tokenizer, ids, length=7).flatten().tolist() == ids[: len(ids) // 7 * 7]  # given ids stay
    overlapping = token_windows(tokenizer, tmp_path / "a.txt", length=7, samples=5, stride=2)
    assert overlapping.tolist() == [beginning + ids[start : start + content] for start in range(0, 10, 2)]


@given(
    ids=st.lists(st.integers(2, 9), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    length=st.integers(1, 9),
    stride=st.none() | st.integers(1, 5),
    beginning=st.sampled_from([[], [BOS]]),
)
def test_windows_do_not_depend_on_the_pieces(
    ids: list[int], cuts: list[int], length: int, stride: int | None, beginning: list[int]
) -> None:
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    pieces = [ids[start:end] for start, end in pairwise(edges)]
    windows = list(cut_windows(pieces, length, beginning, stride))
    front = beginning if length > 1 else []
    content = length - len(front)
    assert windows == [
        front + ids[start : start + content] for start in range(0, len(ids) - content + 1, stride or content)
    ]


CHATS = [[{"role": "user", "content": "Who is there?"}], [{"role": "user", "content": "I."}]]


def test_chats_are_rendered_by_the_template(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    lines = [json.dumps({"messages": chat}) for chat in CHATS]
    (tmp_path / "chats.jsonl").write_text("\n".join([lines[0], "", lines[1]]))
    datasets.Dataset.from_dict({"messages": CHATS}).to_parquet(tmp_path / "corpus" / "train.parquet")
    for source in (str(tmp_path / "chats.jsonl"), f"{tmp_path / 'corpus'}:default"):
        windows = token_windows(tokenizer, source, length=3, chats=True)
        rendered = "user: Who is there? user: I. "
        assert rendered.startswith(tokenizer.decode(windows.flatten()))
        assert len(windows) >= 3


def test_windows_of_chats_begin_as_the_template_does(tmp_path: Path) -> None:
    tokenizer = trained("bytes", single="<s> $A")
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in CHATS))
    body = "{% for m in messages %}{{ 'the old ' }}{% endfor %}"
    old = trained("bytes")("the old ")["input_ids"]
    for template, ids, front in ((body, old * 2, []), ("{{ bos_token }}" + body, [BOS, *old, BOS, *old], [BOS])):
        tokenizer.chat_template = template
        windows = token_windows(tokenizer, tmp_path / "chats.jsonl", length=len(old), chats=True)
        assert windows[0].tolist() == ids[: len(old)]
        assert windows[1][: len(front)].tolist() == front
        assert BOS not in windows[:, 1:2]


def test_chats_that_cannot_be_rendered_are_named(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps({"messages": CHATS[0]}))
    with pytest.raises(CalibrationDataError, match="tokenizer has none"):
        token_windows(tokenizer, good, length=3, chats=True)
    tokenizer.chat_template = "{{ raise_exception('no roles') }}"
    with pytest.raises(CalibrationDataError, match="does not render: no roles"):
        token_windows(tokenizer, good, length=3, chats=True)
    with pytest.raises(CalibrationDataError, match="token ids"):
        token_windows(tokenizer, [1, 2, 3], length=3, chats=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    for text, words in (
        ("{", r"line 1 of .*bad\.jsonl is not JSON"),
        ('{"text": "a"}', r"row 1 of .*bad\.jsonl has no list 'messages', only text \(str\)"),
        ('{"messages": ["Who?"]}', r"a chat of .*bad\.jsonl does not render"),
    ):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(text)
        with pytest.raises(CalibrationDataError, match=words):
            token_windows(tokenizer, bad, length=3, chats=True)


def test_a_window_has_512_tokens_or_as_many_as_the_model_takes() -> None:
    long, short = LlamaConfig(max_position_embeddings=2048), LlamaConfig(max_position_embeddings=256)
    assert window_length(long, None, "eval_length") == 512
    assert window_length(short, None, "eval_length") == 256
    assert window_length(short, 100, "eval_length") == 100
    for wrong in (1, 257):
        with pytest.raises(InvalidValueError, match=rf"eval_length: got {wrong}, allowed: 2 to 256 for this model"):
            window_length(short, wrong, "eval_length")


def test_of_token_ids_no_more_is_taken_than_the_windows_need() -> None:
    endless = (number % 50 for number in itertools.count())
    assert token_windows(None, endless, 16, 4).tolist() == torch.arange(64).remainder(50).view(4, 16).tolist()
