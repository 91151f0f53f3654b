"""Conversions of the language model inside a wrapper, such as a model that reads images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import cached_file

from optimum_mla.io.reading import reading
from optimum_mla.measure.verify import check_reference, reference_logits
from optimum_mla.models.wrappers import rewrapped
from optimum_mla.pipeline.loading import load_written

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
"""Files with which a processor makes inputs of images; they do not depend on the language model."""


def write_wrapped(
    model: str, wrapper: PreTrainedModel, language: PreTrainedModel, folder: Path, output: Path, hub: dict[str, Any]
) -> None:
    """Write a wrapper around a converted language model, and check that it computes the same once it is loaded.

    Args:
        model: The source of the wrapper, as a hub id or a folder.
        wrapper: The wrapper, which is changed.
        language: Its converted language model.
        folder: The folder to write.
        output: The folder that it is to become.
        hub: Keyword arguments for loading the source.

    Raises:
        VerificationError: What was written does not load, or computes something else.
    """
    expected = reference_logits(language)
    rewrapped(wrapper, language).save_pretrained(folder)
    where = {name: value for name, value in hub.items() if name != "trust_remote_code"}
    with reading("config", model, hub):
        for name in PROCESSOR_FILES:
            found = cached_file(model, name, _raise_exceptions_for_missing_entries=False, **where)
            if found is not None:
                shutil.copy(found, folder)
    loaded = load_written(folder, output, str(language.device), kind=AutoModelForImageTextToText)
    check_reference(loaded, expected, "the wrapper's logits differ from those of its converted language model")
