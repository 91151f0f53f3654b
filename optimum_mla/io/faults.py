"""Finds out what is wrong with a file of a checkpoint, for the message after a library has refused it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

LFS_POINTER = b"version https://git-lfs"
"""How the small text file begins that Git LFS keeps in place of a large one."""
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
)
"""A folder that holds none of these has no tokenizer."""
FILES = {
    "config": ("config.json",),
    "generation config": ("generation_config.json",),
    "tokenizer": TOKENIZER_FILES,
}
AGAIN = "Download it again, or save the model again."


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds any file of a tokenizer."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def first_fault(folder: Path, part: str) -> str | None:
    """Return one line about the first broken file of a checkpoint, or None if all of them can be read.

    Args:
        folder: The folder of the checkpoint.
        part: `config`, `generation config`, `tokenizer` or `weights`.
    """
    paths = weight_paths(folder) if part == "weights" else (folder / name for name in FILES[part])
    return next((found for found in map(fault, paths) if found is not None), None)


def weight_paths(folder: Path) -> Iterator[Path]:
    """Yield the files that Transformers and PEFT look for, and the shards that an index names."""
    yield folder / "adapter_config.json"
    yield folder / "adapter_model.safetensors"
    yield folder / "model.safetensors"
    for index in INDEXES:
        yield folder / index
        yield from shards(folder / index)
    yield folder / "pytorch_model.bin"


def shards(index: Path) -> list[Path]:
    """Return the files that an index names; none where it is missing or broken."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [index.parent / name for name in sorted(set(names))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def fault(path: Path) -> str | None:
    """Return one line that says what is wrong with a file and what to do; None if nothing is, or without a file."""
    try:
        if path.is_dir():
            return f"{path} is a folder, where a file belongs. {AGAIN}"
        if not path.exists():
            return None
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}). Change its permissions, or download it again."
    if start == LFS_POINTER:
        return f"{path} is a Git LFS pointer, not the file itself. Fetch the file with: git lfs pull"
    if not start:
        return f"{path} is empty. {AGAIN}"
    said = CHECKS.get(path.suffix, check_text)(path)
    return None if said is None else f"{path} {said} {AGAIN}"


def check_json(path: Path) -> str | None:
    """Return what is wrong with a JSON file that should hold an object."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.start})."
    except json.JSONDecodeError as error:
        return f"is not JSON (line {error.lineno}, column {error.colno})."
    except RecursionError:
        return "is not JSON that can be read."
    if not isinstance(content, dict):
        return f"holds JSON of another kind ({type(content).__name__}), where an object belongs."
    return check_index(path, content) if path.name in INDEXES else None


def check_index(path: Path, content: dict[str, Any]) -> str | None:
    """Return what is wrong with the index of a checkpoint in shards."""
    names = content.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        return "has no `weight_map` from the names of tensors to the names of files."
    missing = sorted({name for name in names.values() if not (path.parent / name).is_file()})
    return f"names {missing[0]}, which is not there." if missing else None


def check_safetensors(path: Path) -> str | None:
    """Return what is wrong with a safetensors file; its header tells how long the file must be."""
    try:
        with safe_open(path, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        return f"is not a whole safetensors file ({error})."


def check_pickle(path: Path) -> str | None:
    """Return what is wrong with a file of PyTorch weights, which is read without running any code in it."""
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # the unpickler passes on whatever the bytes lead it to
        return f"does not load as PyTorch weights without running code ({type(error).__name__}). Prefer safetensors."
    return None if isinstance(content, dict) else "holds no dictionary of PyTorch weights."


def check_text(path: Path) -> str | None:
    """Return what is wrong with a text file. Files with other suffixes may hold anything."""
    if path.suffix not in (".txt", ".jinja"):
        return None
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.start})."
    return None


CHECKS = {".json": check_json, ".safetensors": check_safetensors, ".bin": check_pickle}
"""How the files of a suffix are checked."""
