"""Conversions of the language model inside a wrapper, such as a model that reads images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import cached_file

from optimum_mla.core.errors import VerificationError
from optimum_mla.io.reading import reading
from optimum_mla.models.wrappers import rewrapped
from optimum_mla.pipeline.loading import load_config, load_model

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
"""Files with which a processor makes inputs of images; they do not depend on the language model."""
CHECKED_TOKENS = 16


@torch.no_grad()
def write_wrapped(
    model: str, wrapper: PreTrainedModel, language: PreTrainedModel, folder: Path, hub: dict[str, Any]
) -> None:
    """Write a wrapper around a converted language model, and check that it computes the same once it is loaded.

    Args:
        model: The source of the wrapper, as a hub id or a folder.
        wrapper: The wrapper, which is changed.
        language: Its converted language model.
        folder: The folder to write.
        hub: Keyword arguments for loading the source.

    Raises:
        VerificationError: What was written computes something else.
    """
    ids = torch.randint(language.config.vocab_size, (1, CHECKED_TOKENS), device=language.device)
    expected = language(ids).logits
    rewrapped(wrapper, language).save_pretrained(folder)
    where = {name: value for name, value in hub.items() if name != "trust_remote_code"}
    with reading("config", model, hub):
        for name in PROCESSOR_FILES:
            found = cached_file(model, name, _raise_exceptions_for_missing_entries=False, **where)
            if found is not None:
                shutil.copy(found, folder)
    written = str(folder)
    device = str(language.device)
    loaded = load_model(written, load_config(written, {}), "auto", device, {}, kind=AutoModelForImageTextToText)
    if not torch.equal(loaded(ids).logits, expected):
        raise VerificationError("the written model computes other logits than its converted language model.")
