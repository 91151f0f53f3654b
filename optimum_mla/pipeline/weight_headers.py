"""The names, dtypes and shapes of the weights of a checkpoint, read from the headers of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optimum_mla.core.errors import UnsupportedModelError, first_line
from optimum_mla.io.reading import reading
from optimum_mla.pipeline.checkpoint import Checkpoint


def headers(checkpoint: Checkpoint) -> dict[str, tuple[str, list[int]]]:
    """Return the dtype (as safetensors names it) and the shape of every tensor of a checkpoint by the tensor's name.

    Raises:
        UnsupportedModelError: There are no safetensors files.
        UnreadableModelError: A safetensors file is broken.
    """
    from huggingface_hub import get_safetensors_metadata, parse_local_safetensors_file_metadata

    model, hub, folder, files = checkpoint.location, checkpoint.hub, checkpoint.folder, []
    if folder is None:
        try:
            found = get_safetensors_metadata(model, revision=hub.get("revision"), token=hub.get("token"))
            files = list(found.files_metadata.values())
        except Exception as error:  # The hub and the network raise errors of many unrelated types.
            folder = downloaded(model, hub)
            if folder is None:
                raise UnsupportedModelError(
                    f"model: the headers of {model} did not load: {first_line(error)}"
                ) from error
    if folder is not None:
        with reading("weights", str(folder)):
            files = [parse_local_safetensors_file_metadata(path) for path in weight_files(folder)]
    tensors = {name: (str(info.dtype), list(info.shape)) for file in files for name, info in file.tensors.items()}
    if not tensors:
        raise UnsupportedModelError(
            f"model: {model} holds no safetensors files. Save it with save_pretrained of a current Transformers."
        )
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder that Transformers would load, without adapters and other files."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]


def downloaded(model: str, hub: dict[str, Any]) -> Path | None:
    """Return the folder of this machine's cache that holds the weights of a hub id, or None."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("model.safetensors", "model.safetensors.index.json"):
        found = try_to_load_from_cache(model, name, cache_dir=hub.get("cache_dir"), revision=hub.get("revision"))
        if isinstance(found, str):
            return Path(found).parent
    return None
