"""Training data: what is packed, in which order, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from optimum_mla.core.errors import CalibrationDataError, InvalidValueError
from optimum_mla.recovery.data import MOST_HELD_BACK, hold_back, pack, packed_rows, preferences, stream

REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_model"
TOKENIZER = AutoTokenizer.from_pretrained(REFERENCE)


@given(count=st.integers(1, 60), length=st.integers(2, 9), tokens=st.none() | st.integers(1, 80))
def test_rows_are_the_ids_in_order_without_the_rest(count: int, length: int, tokens: int | None) -> None:
    ids = list(range(count))
    if tokens is not None and tokens < length:
        with pytest.raises(InvalidValueError, match=f"train_tokens: got {tokens}"):
            pack(None, ids, length, tokens)
        return
    if count < length:
        with pytest.raises(CalibrationDataError, match=f"fewer tokens than one row of {length}"):
            pack(None, ids, length, tokens)
        return
    rows = pack(None, ids, length, tokens)
    kept = min(count // length, count if tokens is None else tokens // length)
    assert torch.equal(rows.ids.flatten(), torch.arange(kept * length))
    assert len(rows) == kept
    assert torch.equal(rows[0]["input_ids"], rows[0]["labels"])


def test_documents_are_packed_end_to_end_with_an_end_token(tmp_path: Path) -> None:
    texts = ["It was a bright morning.", "The old gentleman sat down.", "Nobody spoke."]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n\n")
    expected = [i for text in texts for i in [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]]
    source = str(tmp_path / "rows.jsonl")
    assert [i for row in packed_rows(TOKENIZER, source, 4) for i in row] == expected[: len(expected) // 4 * 4]
    streamed = stream(TOKENIZER, source, 4)
    packed = pack(TOKENIZER, source, 4)
    assert [row["input_ids"].tolist() for row in streamed] == packed.ids.tolist()
    assert [row["input_ids"].tolist() for row in streamed] == packed.ids.tolist()  # it can be read again
    assert streamed.describe() == {"rows": None, "tokens_per_row": 4, "sha256": None}
    assert packed.describe()["rows"] == len(packed)


def test_documents_and_rows_begin_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    bos = TOKENIZER("#")["input_ids"][0]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("# $A", special_tokens=[("#", bos)])
    texts = ["It was a bright morning.", "The old gentleman sat down.", "Nobody spoke."]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    stream_of_ids = [i for text in texts for i in [bos, *TOKENIZER(text)["input_ids"], tokenizer.eos_token_id]]
    rows = pack(tokenizer, str(tmp_path / "rows.jsonl"), 4).ids
    assert (rows[:, 0] == bos).all()
    left = list(stream_of_ids)
    for row in rows.tolist():
        taken = row if left[0] == bos else row[1:]
        assert left[: len(taken)] == taken
        left = left[len(taken) :]
    assert len(left) < 4


def test_a_streamed_text_is_read_no_further_than_needed(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as handle:
        handle.write(b"It was a bright morning. " * 40_000)
        handle.truncate(10**12)  # The rest is a hole of NUL, which would be refused.
    source = str(tmp_path / "a.txt")
    assert pack(TOKENIZER, source, 64, tokens=2048).ids.shape == (32, 64)
    row = next(iter(stream(TOKENIZER, source, 64)))
    assert row["input_ids"].tolist() == pack(TOKENIZER, source, 64, tokens=64)[0]["input_ids"].tolist()


@pytest.mark.parametrize("workers", [1, 2])
def test_every_streamed_row_comes_once_whatever_the_workers(workers: int) -> None:
    rows = stream(None, range(52), 4)
    loaded = DataLoader(rows, batch_size=2, num_workers=workers)
    seen = sorted(row.tolist() for batch in loaded for row in batch["input_ids"])
    assert seen == torch.arange(52).view(13, 4).tolist()


def test_every_streamed_row_comes_once_over_processes_with_workers() -> None:
    rows = stream(None, range(64), 4)
    seen = [
        row.tolist()
        for process in range(2)
        for batch in DataLoader(
            IterableDatasetShard(rows, batch_size=2, num_processes=2, process_index=process),
            batch_size=2,
            num_workers=2,
        )
        for row in batch["input_ids"]
    ]
    assert sorted(seen) == torch.arange(64).view(16, 4).tolist()


def test_no_file_of_a_dataset_is_left_out_whatever_the_workers(tmp_path: Path) -> None:
    for number in range(4):
        table = datasets.Dataset.from_dict({"text": [f"It was {number}{row}." for row in range(10)]})
        table.to_parquet(tmp_path / f"train-{number}.parquet")
    source = f"{tmp_path}:default:train"
    packed = pack(TOKENIZER, source, 4)
    loaded = DataLoader(stream(TOKENIZER, source, 4), batch_size=None, num_workers=2)
    assert sorted(row["input_ids"].tolist() for row in loaded) == sorted(packed.ids.tolist())


def test_ids_that_can_be_read_only_once_are_not_streamed() -> None:
    with pytest.raises(CalibrationDataError, match="read only once"):
        stream(None, iter(range(8)), 4)


@pytest.mark.parametrize(("rows", "held"), [(19, 0), (20, 1), (60, 3), (2000, MOST_HELD_BACK)])
def test_one_row_in_twenty_is_held_back_and_does_not_train(rows: int, held: int) -> None:
    packed = pack(None, range(4 * rows), 4)
    rest, back = hold_back(packed)
    if not held:
        assert rest is packed
        assert back is None
        return
    assert back is not None
    assert back.shape == (held, 4)
    assert len(rest) == rows - held
    assert torch.equal(torch.cat([rest.ids, back]).sort(0).values, packed.ids)
    # Evenly spaced, neither the first row nor the last one.
    spaces = torch.diff(torch.cat([torch.zeros(1), back[:, 0] / 4, torch.tensor([rows])]))
    assert spaces.max() - spaces.min() <= 1


def test_the_first_rows_of_a_stream_are_held_back() -> None:
    rest, back = hold_back(stream(None, list(range(4 * (MOST_HELD_BACK + 3))), 4))
    assert torch.equal(back, torch.arange(4 * MOST_HELD_BACK).view(-1, 4))
    loaded = [DataLoader(rest, batch_size=None, num_workers=workers) for workers in (0, 2)]
    for loader in loaded:
        found = sorted(row["input_ids"][0].item() // 4 for row in loader)
        assert found == [MOST_HELD_BACK, MOST_HELD_BACK + 1, MOST_HELD_BACK + 2]
    short = stream(None, list(range(4 * MOST_HELD_BACK)), 4)
    assert hold_back(short) == (short, None)


def test_the_hash_is_that_of_the_tokens() -> None:
    one = pack(None, range(40), 4).describe()
    digest = hashlib.sha256(torch.arange(40).numpy().tobytes()).hexdigest()
    assert one == {"rows": 10, "tokens_per_row": 4, "sha256": digest}
    assert pack(None, [0, *range(39)], 4).describe()["sha256"] != digest


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 of .*rows.jsonl is not JSON"),
        ('{"txt": "a"}', "row 2 of .*rows.jsonl has no str 'text'"),
        ('{"text": 5}', "row 2"),
        ("5", "row 2"),
    ],
)
def test_a_malformed_line_is_named(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "Nobody spoke."}) + "\n" + line + "\n")
    with pytest.raises(CalibrationDataError, match=words):
        pack(TOKENIZER, str(tmp_path / "rows.jsonl"), 2)


def test_preference_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": "It was", "chosen": " bright.", "rejected": " was.", "more": 1} for _ in range(3)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    table = preferences(path)
    assert table.column_names == ["prompt", "chosen", "rejected"]
    assert table[2] == {"prompt": "It was", "chosen": " bright.", "rejected": " was."}
    for column in ("prompt", "chosen", "rejected"):
        lacking = [{name: value for name, value in row.items() if name != column} for row in rows]
        path.write_text("\n".join(json.dumps(row) for row in [rows[0], *lacking]))
        with pytest.raises(CalibrationDataError, match=f"row 2 of .* has no str '{column}'"):
            preferences(path)
    path.write_text("\n")
    with pytest.raises(CalibrationDataError, match="no rows"):
        preferences(path)
