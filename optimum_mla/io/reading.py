"""The boundary to the libraries that read checkpoints: whatever they raise about an input becomes one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optimum_mla.core.errors import MLAError, UnreadableModelError
from optimum_mla.io.faults import first_fault

PLAIN = (OSError, ValueError, RuntimeError)
"""Errors whose message tells enough; of others the kind is told too (the message of a KeyError is only the key)."""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
LONGEST_REASON = 300
"""Characters of a library's message that are shown."""


@contextmanager
def reading(part: str, model: str, hub: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Turn every error of a library that reads a part of a checkpoint into one line.

    Only the call of the library belongs into the block: an error of this package's own code is a bug and must be seen.
    `MLAError`, `MemoryError` and `KeyboardInterrupt` pass through.

    Args:
        part: `config`, `generation config`, `tokenizer` or `weights`.
        model: A hub id or a folder, as the user named it.
        hub: `cache_dir` and `revision` with which it is loaded.

    Raises:
        UnreadableModelError: The file, what is wrong with it, and what to do.
    """
    try:
        yield
    except (MLAError, MemoryError):
        raise
    except Exception as error:  # The loaders of configs, weights and tokenizers raise errors of many unrelated types.
        what = model if part == "config" else f"the {part} of {model}"
        raise UnreadableModelError(
            f"model: {what} did not load: {explain_failure(part, model, hub or {}, error)}"
        ) from error


def explain_failure(part: str, model: str, hub: Mapping[str, Any], error: Exception) -> str:
    """Return why a part of a checkpoint did not load, from its files if one of them is broken."""
    folder = local_folder(model, hub)
    if folder is None:
        return f"no such folder, and the hub gave: {one_sentence(error)}"
    if part == "config" and not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        return "the folder holds adapters without their model. Merge them (mla-finetune --merge) and name the result."
    if part == "config" and not (folder / "config.json").exists():
        return "the folder holds no config.json. Name the folder of a model that save_pretrained wrote."
    found = first_fault(folder, part)
    if found is not None:
        return found
    if part == "weights":
        return f"{one_sentence(error)} (in {folder})"
    names = {"config": "config.json", "generation config": "generation_config.json", "tokenizer": "tokenizer files"}
    return f"{one_sentence(error)} Check the {names[part]} in {folder}."


def one_sentence(error: BaseException) -> str:
    """Return an error's message as one sentence of plain text."""
    lines = [line.strip() for line in COLOURS.sub("", str(error)).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    # A heading such as "Validation error for field 'hidden_size':" says nothing without what follows.
    for line in lines[1:]:
        if not text.endswith((":", ": ")):
            break
        text = f"{text} {line}"
    if len(text) > LONGEST_REASON:
        text = f"{text[:LONGEST_REASON].rstrip()} ..."
    if lines and not isinstance(error, PLAIN):
        text = f"{type(error).__name__}: {text}"
    return text if text.endswith((".", "!", "?")) else f"{text}."


def local_folder(model: str, hub: Mapping[str, Any]) -> Path | None:
    """Return the folder of a checkpoint on this machine: the folder itself or a download; None if there is neither."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(
            model, "config.json", cache_dir=hub.get("cache_dir"), revision=hub.get("revision")
        )
    except HFValidationError:  # the name cannot be a hub id
        return None
    return Path(found).parent if isinstance(found, str) else None
