"""Inputs are never deleted with an output that is replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from optimum_mla.core.errors import OutputError
from optimum_mla.io.inputs import check_inputs_stay, fingerprint

# Input, output (both relative to a folder that is made below), and what is said.
REFUSED: dict[str, tuple[str, str, str]] = {
    "the same folder": ("model", "model", "is the input model"),
    "the same folder, spelled otherwise": ("model", "text/../model/.", "is the input model"),
    "the same folder, by a link": ("link", "model", "is the input model"),
    "a file in the output": ("out/text.txt", "out", r"holds the input model \(.*text.txt\)"),
    "a file far down in the output": ("out/deep/model", "out", "holds the input model"),
    "a link that lies in the output": ("out/link", "out", "holds the input model"),
    "a link to a file in the output": ("text_link", "out", "holds the input model"),
    "a download whose weights lie in the output": ("snapshot", "out", r"weights.*deleted"),
    "adapters whose base model is the output": ("adapters", "base", "is the input model"),
    "a local dataset with its split": ("out/data:plain:train", "out", "holds the input model"),
    "a filled folder in the input": ("model", "model/sub", "lies in the input model"),
}
ALLOWED = {
    "a new folder in the input": ("model", "model/new"),
    "an empty folder in the input": ("model", "model/empty"),
    "beside each other": ("model", "out"),
    "a name that begins the same": ("out/text.txt", "ou"),
    "a hub id": ("owner/model", "out"),
    "a link elsewhere": ("text_link", "model"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in (
        "model/sub",
        "model/empty",
        "text",
        "out/deep/model",
        "out/data",
        "ou",
        "snapshot",
        "adapters",
        "base",
    ):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("out/text.txt", "out/weights", "model/sub/file", "model/config.json", "ou/file"):
        (tmp_path / file).write_text("")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "out" / "link").symlink_to("../model")
    (tmp_path / "text_link").symlink_to("out/text.txt")
    (tmp_path / "snapshot" / "weights").symlink_to("../out/weights")
    adapter = {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapters" / "adapter_config.json").write_text(json.dumps(adapter))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_an_output_that_would_take_an_input_along_is_refused(case: str, absolute: bool, place: Path) -> None:
    source, output, words = REFUSED[case]
    named = str(place / source) if absolute else source
    with pytest.raises(OutputError, match=words):
        check_inputs_stay(place / output, {"nothing": None, "ids": [1, 2], "model": named})


@pytest.mark.parametrize("case", ALLOWED)
def test_other_outputs_are_not_refused(case: str, place: Path) -> None:
    source, output = ALLOWED[case]
    check_inputs_stay(place / output, {"model": source})


def test_letter_case_is_the_file_systems(tmp_path: Path) -> None:
    (tmp_path / "Model").mkdir()
    if os.path.exists(tmp_path / "model"):  # a file system that takes both for the same
        with pytest.raises(OutputError):
            check_inputs_stay(tmp_path / "model", {"model": str(tmp_path / "Model")})
    else:
        check_inputs_stay(tmp_path / "model", {"model": str(tmp_path / "Model")})


def test_adapters_of_each_other_end(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one).mkdir()
        text = json.dumps({"base_model_name_or_path": str(tmp_path / other)})
        (tmp_path / one / "adapter_config.json").write_text(text)
    check_inputs_stay(tmp_path / "out", {"model": str(tmp_path / "a")})


def test_a_fingerprint_tells_other_content_under_the_same_name(place: Path) -> None:
    def changed(value: str, change: Callable[[], object]) -> bool:
        before = fingerprint(value)
        change()
        return fingerprint(value) != before

    (place / "base" / "model.safetensors").write_bytes(b"0123")
    (place / "out" / "data" / "train.jsonl").write_text("{}")
    about = (place / "base" / "model.safetensors").stat()
    assert fingerprint("base") == {"base/model.safetensors": [4, about.st_mtime_ns]}
    assert changed("out/text.txt", lambda: (place / "out" / "text.txt").write_text("word"))
    assert changed("text_link", lambda: (place / "out" / "text.txt").write_text("words"))
    assert changed("out/data:plain:train", lambda: (place / "out" / "data" / "train.jsonl").write_text("{ }"))
    assert changed("model", lambda: (place / "model" / "sub" / "more").touch())
    assert changed("model", lambda: (place / "model" / "config.json").unlink())
    assert changed("adapters", lambda: (place / "base" / "model.safetensors").write_bytes(b"012"))
    assert changed("snapshot", lambda: os.utime(place / "out" / "weights", ns=(1, 1)))  # of the same size

    (place / "model" / ".git").mkdir()
    (place / "model" / "sub" / "__pycache__").mkdir()
    for unread in (".git/index", ".DS_Store", "README.md", "sub/__pycache__/task.pyc"):
        assert not changed("model", (place / "model" / unread).touch), unread
    for nothing in ("owner/model", "", None, 3, ["model"]):
        assert fingerprint(nothing) == {}
    (place / "model" / "nowhere").symlink_to("missing")
    assert not changed("model", lambda: None)
