"""Files that each hold a part of a checkpoint's weights, and the index that names them all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
BLOCK_BYTES = 1 << 20


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors to a safetensors file, and return the SHA-256 of the file.

    The file has its name only when it is whole and on the disk.

    Args:
        path: The file.
        tensors: The tensors by name.
    """
    partial = path.with_name(f".{path.name}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    with partial.open("r+b") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    return sha256(path)


def read_shard(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a safetensors file whose names begin with `prefix`, by the rest of their names."""
    with safe_open(path, "pt") as file:
        return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def place_shards(shards: list[Path], folder: Path) -> None:
    """Put shards into a folder as `model-00001-of-N.safetensors` and so on, with their index.

    A shard is linked, or copied where the file system has no links; the given files stay.

    Args:
        shards: The files in their order.
        folder: The folder of the checkpoint.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        placed = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        try:
            os.link(shard, placed)
        except OSError:
            shutil.copy(shard, placed)
        with safe_open(shard, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), placed.name)
        total += data_bytes(shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def data_bytes(path: Path) -> int:
    """Return the bytes of all tensors in a safetensors file: what follows the header, whose length comes first."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
