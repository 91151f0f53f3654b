"""What the commands load: models, tokenizers, texts. Bad input becomes an error that says what to do."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from optimum_mla.errors import CorruptWeightsError, InvalidValueError, UnsupportedModelError, first_line
from optimum_mla.models import family_of, is_converted
from optimum_mla.report.schema import ConversionReport, RecoveryReport
from optimum_mla.text import token_windows

DTYPES = ("auto", "float32", "bfloat16", "float16")
LONGEST_DEFAULT_WINDOW = 512
"""Tokens per sample where the user names no length and the model can take so many."""


@dataclass(frozen=True)
class TextOptions:
    """Texts to work with.

    Attributes:
        calibration_data: What `optimum_mla.text.read_documents` reads, token ids, or None.
        chat_template: The calibration data are chats, to be rendered by the tokenizer's chat template.
        calibration_samples: Windows of calibration text.
        calibration_length: Tokens per window; None takes the shorter of 512 and the model's longest context.
        eval_data: Text for the perplexity before and after, or None.
        eval_samples: At most so many windows of it.
        eval_length: Tokens per window of it; None as for `calibration_length`.
    """

    calibration_data: str | Iterable[int] | None = None
    chat_template: bool = False
    calibration_samples: int = 128
    calibration_length: int | None = None
    eval_data: str | None = None
    eval_samples: int = 128
    eval_length: int | None = None


NO_TEXTS = TextOptions()


def load_config(model: str, hub: dict[str, Any]) -> PreTrainedConfig:
    """The config of any model.

    Raises:
        UnsupportedModelError: Not found, or not a model that Transformers knows.
    """
    try:
        return AutoConfig.from_pretrained(model, **hub)
    except (OSError, ValueError, KeyError) as error:
        if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
            reason = "the folder holds no config.json"
        elif Path(model).is_dir():
            reason = first_line(error)
        else:
            reason = f"no such folder, and the hub gave: {first_line(error)}"
        raise UnsupportedModelError(f"model: {model} did not load: {reason}") from error


def load_source_config(model: str, hub: dict[str, Any]) -> PreTrainedConfig:
    """The config of a model that can be converted.

    Raises:
        UnsupportedModelError: Not found, not a supported decoder LM, converted already, or quantized.
    """
    config = load_config(model, hub)
    if is_converted(config):
        raise UnsupportedModelError(f"model: {model} is converted already. Convert the model that it was made from.")
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"model: the weights of {model} are quantized. Convert the unquantized model.")
    family_of(config)
    return config


def load_converted_config(model: str, hub: dict[str, Any]) -> PreTrainedConfig:
    """The config of a converted model.

    Raises:
        UnsupportedModelError: Not found, or not converted.
    """
    config = load_config(model, hub)
    if not is_converted(config):
        raise UnsupportedModelError(f"model: {model} is not converted. Run optimum-cli mla-convert on it first.")
    return config


def load_model(
    model: str, config: PreTrainedConfig, dtype: str, device: str | None, hub: dict[str, Any]
) -> PreTrainedModel:
    """The model in evaluation mode.

    Raises:
        InvalidValueError: No such dtype or device here.
        UnsupportedModelError: Its weights do not load.
        CorruptWeightsError: Some are missing.
    """
    check_dtype(dtype)
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InvalidValueError("device", device, "a torch device of this machine", first_line(error)) from error
    try:
        loaded, notes = AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=dtype, output_loading_info=True, **hub
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UnsupportedModelError(f"model: the weights of {model} did not load: {first_line(error)}") from error
    if missing := sorted(notes["missing_keys"]):
        # Transformers fills them with random numbers.
        raise CorruptWeightsError(
            f"model: the checkpoint of {model} lacks {len(missing)} weights of its config, such as {missing[0]}."
        )
    return loaded.to(place).eval()


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that no model is saved in."""
    if dtype not in DTYPES:
        raise InvalidValueError("dtype", dtype, ", ".join(DTYPES))


def load_tokenizer(model: str, hub: dict[str, Any], needed: bool) -> Any:
    """The tokenizer, or None where there is none and nothing needs it."""
    try:
        return AutoTokenizer.from_pretrained(model, **hub)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if not needed:
            return None
        raise UnsupportedModelError(
            f"model: {model} has no tokenizer that loads, which text needs: {first_line(error)}"
        ) from error


def read_texts(
    tokenizer: Any, config: PreTrainedConfig, texts: TextOptions
) -> tuple[Tensor | None, Tensor | None, dict[str, dict[str, Any]]]:
    """Calibration windows, evaluation windows (either may be None), and where they came from."""
    longest = getattr(config, "max_position_embeddings", LONGEST_DEFAULT_WINDOW)
    windows: dict[str, Tensor] = {}
    data: dict[str, dict[str, Any]] = {}
    for kind, source, samples, length in (
        ("calibration", texts.calibration_data, texts.calibration_samples, texts.calibration_length),
        ("eval", texts.eval_data, texts.eval_samples, texts.eval_length),
    ):
        if samples < 1:
            raise InvalidValueError(f"{kind}_samples", samples, "integers from 1")
        length = min(LONGEST_DEFAULT_WINDOW, longest) if length is None else length
        if not 2 <= length <= longest:
            raise InvalidValueError(f"{kind}_length", length, f"2 to {longest} for this model")
        if source is not None:
            field = f"{kind}-data"
            chats = texts.chat_template and kind == "calibration"
            ids = windows[field] = token_windows(tokenizer, source, length, samples, field, chats)
            digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
            origin = source if isinstance(source, str) else "token ids"
            data[field] = {"source": origin, "windows": len(ids), "tokens_per_window": length, "sha256": digest}
    return windows.get("calibration-data"), windows.get("eval-data"), data


def source_of(model: str, needed: bool = True) -> str | None:
    """What a model was converted from, according to the report in its folder.

    Raises:
        InvalidValueError: That is needed and not known.
    """
    report = Path(model) / ConversionReport.file_name
    if report.is_file():
        return ConversionReport.read(Path(model)).model
    if needed:
        raise InvalidValueError(
            "teacher", None, "a hub id or folder, as the model has no conversion_report.json that names its source"
        )
    return None


def carried_card(model: str, partial: Path) -> str | None:
    """Take the reports along that lie in a model's folder, and return its model card."""
    source = Path(model)
    for name in (ConversionReport.file_name, RecoveryReport.file_name):
        if (source / name).is_file():
            shutil.copy(source / name, partial)
    card = source / "README.md"
    return card.read_text(encoding="utf-8") if card.is_file() else None
