"""The models beside the one that trains: its teacher, and the source that it was converted from."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_mla.core.errors import InvalidValueError, MLAError
from optimum_mla.measure.quality import perplexity
from optimum_mla.pipeline.checkpoint import Checkpoint
from optimum_mla.pipeline.origin import mismatch, named_model, source_of
from optimum_mla.recovery.recipe import Recipe

logger = logging.getLogger(__name__)


def find_teacher(model: Checkpoint, recipe: Recipe, revision: str | None) -> Checkpoint | None:
    """Return the teacher that the recipe names, or else the model that the conversion started from.

    Returns:
        None if the recipe needs no teacher.

    Raises:
        InvalidValueError: The source is needed and not known, or a revision is given and there is nothing to apply it
            to.
        ReportError: The report of the conversion cannot be read.
    """
    if not recipe.taught:
        if revision is not None:
            raise InvalidValueError("teacher_revision", revision, f"None, as {recipe.objective} has no teacher")
        return None
    if recipe.teacher is not None:
        return named_model("teacher", recipe.teacher, revision, model)
    source = source_of(model, "teacher", "Name the model to learn from with --teacher.")
    return source if revision is None else named_model("teacher", source.location, revision, model)


def load_teacher(
    teacher: Checkpoint, recipe: Recipe, config: PreTrainedConfig, tokenizer: Any, place: str
) -> PreTrainedModel:
    """Return the teacher, which is of the student's vocabulary.

    Raises:
        InvalidValueError: Its vocabulary or its tokenizer is another one.
        UnsupportedModelError: It does not load.
    """
    name = teacher.location
    sizes = [c.get_text_config().vocab_size for c in (teacher.config, config)]
    if sizes[0] != sizes[1]:
        raise InvalidValueError(
            "teacher", name, f"models with a vocabulary of {sizes[1]} tokens, as the student has ({sizes[0]} here)"
        )
    theirs = teacher.tokenizer(needed=False)
    if tokenizer is not None and theirs is not None and theirs.get_vocab() != tokenizer.get_vocab():
        raise InvalidValueError("teacher", name, "models with the student's tokenizer", "Its tokens are other words.")
    options: dict[str, Any] = {}
    if recipe.teacher_bits != 16:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if recipe.teacher_bits == 8
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        )
    return teacher.load("auto", place, **options)


def perplexity_of_source(
    source: Checkpoint, loaded: PreTrainedModel | None, windows: Tensor, place: str
) -> float | None:
    """Return the source's perplexity on windows, [N, L]; None, and one line on standard error, where that fails.

    It is loaded on the device `place`, unless it is in memory already in full precision, as the teacher.
    """
    if loaded is not None:
        return perplexity(loaded, windows)
    problem = mismatch(source)
    if problem is None:
        try:
            return perplexity(source.load("auto", place), windows)
        except MLAError as error:
            problem = str(error)
        except torch.OutOfMemoryError:
            problem = "there is not enough memory for it beside the models that train"
    logger.warning("warning: the perplexity of the source %s is not measured: %s", source.name, problem)
    return None
