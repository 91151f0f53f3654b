"""The models that are measured, and the text that their quality is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_mla.calibrate.text import token_windows, window_length
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.models.coded import has_codec
from optimum_mla.models.family_table import is_converted
from optimum_mla.pipeline.benchmarking.options import BenchmarkOptions
from optimum_mla.pipeline.checkpoint import Checkpoint
from optimum_mla.pipeline.loading import text_origin


@dataclass(frozen=True)
class Subject:
    """A model that is measured, as every measuring process loads it.

    Attributes:
        checkpoint: Where it is, with its config and tokenizer.
        dtype: `auto` for the dtype of the checkpoint, or `float32`, `bfloat16` or `float16`.
        device: Torch device; None takes CUDA where it is available.
    """

    checkpoint: Checkpoint
    dtype: str
    device: str | None

    @classmethod
    def of(cls, request: dict[str, Any]) -> Subject:
        """Return the model that `request` of another process described."""
        return cls(Checkpoint(request["location"], request["hub"]), request["dtype"], request["device"])

    def load(self) -> PreTrainedModel:
        """Return the model."""
        return self.checkpoint.load(self.dtype, self.device)

    @property
    def config(self) -> PreTrainedConfig:
        """Return its config."""
        return self.checkpoint.config

    def request(self) -> dict[str, Any]:
        """Return what `of` needs in another process, as JSON can hold it."""
        where = {"location": self.checkpoint.location, "hub": self.checkpoint.hub}
        return {**where, "dtype": self.dtype, "device": self.device}


@dataclass(frozen=True)
class ScoredText:
    """The text on which the quality is measured.

    Attributes:
        windows: Token ids, [N, L].
        stride: Number of tokens at the end of each window that are scored.
        origin: The report's entry about it.
        refusal: Why the baseline cannot be scored on it, or None.
    """

    windows: Tensor
    stride: int
    origin: dict[str, Any]
    refusal: str | None

    @classmethod
    def read(cls, options: BenchmarkOptions, model: Subject, baseline: Subject | None) -> ScoredText | None:
        """Return the text that the options name, or None if they name none or ask for no quality.

        Raises:
            MLAError: There is no tokenizer or no such text, or the windows or the stride are not possible.
        """
        if options.eval_data is None or "quality" not in options.parts:
            return None
        length = window_length(model.config, options.eval_length, "eval_length")
        stride = max(1, length // 2) if options.stride is None else options.stride
        if not 1 <= stride < length:
            raise InvalidValueError("stride", stride, f"1 to {length - 1}, below the window of {length} tokens")
        tokenizer = model.checkpoint.tokenizer(needed=True)
        windows = token_windows(tokenizer, options.eval_data, length, options.eval_samples, "eval-data", stride=stride)
        origin = {**text_origin(options.eval_data, windows), "stride_tokens": stride}
        return cls(windows, stride, origin, None if baseline is None else tokens_differ(model, tokenizer, baseline))


def tokens_differ(model: Subject, tokenizer: Any, baseline: Subject) -> str | None:
    """Return why the baseline's quality cannot be compared with that of a model with a tokenizer, or None."""
    mine, theirs = (one.config.get_text_config().vocab_size for one in (model, baseline))
    if mine != theirs:
        return f"refused: the baseline has a vocabulary of {theirs} tokens, the model of {mine}"
    other = baseline.checkpoint.tokenizer(needed=False)
    if other is not None and other.get_vocab() != tokenizer.get_vocab():
        return "refused: the baseline has another tokenizer"
    return None


def check_caches(names: tuple[str, ...], config: PreTrainedConfig) -> None:
    """Refuse caches that need a converted model if a config is not of one."""
    if is_converted(config):
        return
    coded = has_codec(config)
    allowed = ("default", "16bit") if coded else ("default",)
    for name in names:
        if name not in allowed:
            remedy = "" if coded else "Convert it with optimum-cli mla-convert first."
            kind = "has a codec" if coded else "is not converted"
            raise InvalidValueError("cache", name, f"{', '.join(allowed)}, as the model {kind}", remedy)


def dtype_name(subject: Subject) -> str:
    """Return the dtype in which a model is loaded."""
    own = getattr(subject.config, "dtype", None) or torch.float32
    return str(own).removeprefix("torch.") if subject.dtype == "auto" else subject.dtype
