"""Conversions of the language model inside a wrapper, such as a model that reads images."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import cached_file

from optimum_mla.io.reading import reading
from optimum_mla.measure.verify import check_reference, reference_logits
from optimum_mla.models.wrappers import rewrapped
from optimum_mla.pipeline.checkpoint import Checkpoint, load_written

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
"""Files with which a processor makes inputs of images; they do not depend on the language model."""


def write_wrapped(
    source: Checkpoint, wrapper: PreTrainedModel, language: PreTrainedModel, folder: Path, output: Path
) -> None:
    """Write a wrapper around a converted language model, and check that it computes the same once it is loaded.

    Args:
        source: The source of the wrapper.
        wrapper: The wrapper, which is changed.
        language: Its converted language model.
        folder: The folder to write.
        output: The folder that it is to become.

    Raises:
        VerificationError: What was written does not load, or computes something else.
    """
    expected = reference_logits(language)
    rewrapped(wrapper, language).save_pretrained(folder)
    where = {name: value for name, value in source.hub.items() if name != "trust_remote_code"}
    with reading("config", source.location, source.hub):
        for name in PROCESSOR_FILES:
            found = cached_file(source.location, name, _raise_exceptions_for_missing_entries=False, **where)
            if found is not None:
                shutil.copy(found, folder)
    loaded = load_written(folder, output, str(language.device), kind=AutoModelForImageTextToText)
    check_reference(loaded, expected, "the wrapper's logits differ from those of its converted language model")
