"""Loads the models, tokenizers and texts of the commands. Bad input becomes an error that says what to do."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from optimum_mla.calibrate import BUILT_IN_TEXT, built_in_windows, with_repeats
from optimum_mla.calibrate.recall import DEFAULT_REPEATS
from optimum_mla.calibrate.text import text_beginning, token_windows, window_length
from optimum_mla.calibrate.windows import check_ids, check_tokens, split_for_report, windows_to_read
from optimum_mla.core.errors import (
    CorruptWeightsError,
    InvalidValueError,
    UnreadableModelError,
    UnsupportedModelError,
    VerificationError,
    first_line,
)
from optimum_mla.core.number_checks import check_count
from optimum_mla.families.guess import spec_source
from optimum_mla.io.faults import TOKENIZER_FILES
from optimum_mla.io.reading import local_folder, reading
from optimum_mla.models import family_of, is_converted
from optimum_mla.models.coded import CONFIG_ENTRY
from optimum_mla.models.registry import try_family
from optimum_mla.models.wrappers import wrapper_of
from optimum_mla.report.cards import renamed, shown
from optimum_mla.report.schema import CodecReport, ConversionReport, RecoveryReport

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
SIZES = {
    "num_hidden_layers": 2**16,
    **dict.fromkeys(("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"), 2**31 - 1),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), 2**63 - 1),
}
"""Fields of configs that are sizes, which Transformers does not check, and the largest value of each."""
RESIDENT_BYTES = 10**9
"""Models with more weights are read one layer at a time where a command can do that."""


@dataclass(frozen=True)
class TextOptions:
    """Texts to work with.

    Attributes:
        calibration_data: What `optimum_mla.io.documents.read_documents` reads, token ids, or None.
        statistics: A folder that `mla-calibrate` wrote, in place of `calibration_data`, or None.
        uncalibrated: Whether to convert without calibration if both are None. Otherwise a text that comes with the
            package is taken.
        chat_template: The calibration data are chats, to be rendered by the tokenizer's chat template.
        calibration_samples: Windows of calibration text.
        calibration_length: Tokens per window; None takes the shorter of 512 and the model's longest context.
        calibration_repeats: Number of windows of which one repeats itself, so that copying counts; 0 for none.
        eval_data: Text for the perplexity before and after, or None.
        eval_samples: At most so many windows of it.
        eval_length: Tokens per window of it; None as for `calibration_length`.
    """

    calibration_data: str | Iterable[int] | None = None
    statistics: str | None = None
    uncalibrated: bool = False
    chat_template: bool = False
    calibration_samples: int = 128
    calibration_length: int | None = None
    calibration_repeats: int = DEFAULT_REPEATS
    eval_data: str | None = None
    eval_samples: int = 128
    eval_length: int | None = None


NO_TEXTS = TextOptions()


def load_config(model: str, hub: dict[str, Any]) -> PreTrainedConfig:
    """Return the config of any model.

    Raises:
        UnreadableModelError: It is not found, does not load, is not of a model that Transformers knows, or has a size
            that no model has.
    """
    with reading("config", model, hub):
        config = AutoConfig.from_pretrained(model, **hub)
    inner = vars(config.get_text_config())
    for name, most in SIZES.items():
        size = inner.get(name)
        if isinstance(size, int) and not 1 <= size <= most:
            raise UnreadableModelError(
                f"model: the config.json of {model} says {name}: {size}, allowed: integers from 1 to {most}. Take the "
                "config that belongs to the weights."
            )
    return config


def load_source_config(
    model: str, hub: dict[str, Any], guess_family: bool = False, wrapped: bool = False, quantized: bool = False
) -> PreTrainedConfig:
    """Return the config of a model that can be converted.

    Args:
        model: A hub id or a folder.
        hub: Keyword arguments for loading from the hub.
        guess_family: Whether a family that is not known is registered as its names suggest.
        wrapped: Whether it may be a wrapper around a language model, whose config is then returned.
        quantized: Whether its weights may be quantized.

    Raises:
        UnsupportedModelError: Not found, not a supported decoder LM, converted already, or quantized.
    """
    config = load_config(model, hub)
    inner = config.text_config if wrapped and wrapper_of(config) is not None else config
    if is_converted(inner):
        raise UnsupportedModelError(f"model: {model} is converted already. Convert the model that it was made from.")
    if getattr(config, "quantization_config", None) is not None and not quantized:
        raise UnsupportedModelError(f"model: the weights of {model} are quantized. Convert the unquantized model.")
    spec = try_family(inner) if guess_family else None
    if spec is not None:
        logger.warning(
            "%s is described by its names alone. If the conversion passes, register this to load the result: %s",
            config.model_type,
            spec_source(spec),
        )
    family_of(inner)
    return config


def load_converted_config(model: str, hub: dict[str, Any], coded: bool = False) -> PreTrainedConfig:
    """Return the config of a converted model.

    Args:
        model: A hub id or a folder.
        hub: Keyword arguments for loading from the hub.
        coded: Whether it may also be a source with a codec beside its weights.

    Raises:
        UnsupportedModelError: Not found, or not converted.
    """
    config = load_config(model, hub)
    if coded and has_codec(config):
        return config
    if is_converted(getattr(config, "text_config", None)):
        raise UnsupportedModelError(
            f"model: {model} is a wrapper around a converted language model. Extract that model with "
            "optimum_mla.models.language_model, as docs/families.md shows, and give it here."
        )
    if not is_converted(config):
        raise not_converted(model, config)
    return config


def has_codec(config: PreTrainedConfig) -> bool:
    """Return whether the config is of a source with a codec beside its weights."""
    return getattr(config, CONFIG_ENTRY, None) is not None


def not_converted(model: str, config: PreTrainedConfig) -> UnsupportedModelError:
    """Return the error for a model whose attention is that of its source, where a converted one is needed."""
    if has_codec(config):
        return UnsupportedModelError(
            f"model: {model} has the weights of its source, and a codec beside them. Quantize and export it as any "
            "model, or run mla-convert --kv-cache-ratio for converted weights."
        )
    return UnsupportedModelError(
        f"model: {model} is not converted. Run optimum-cli mla-convert --kv-cache-ratio 0.5 on it first."
    )


def load_model(
    model: str,
    config: PreTrainedConfig,
    dtype: str,
    device: str | None,
    hub: dict[str, Any],
    offload: Path | None = None,
    kind: Any = AutoModelForCausalLM,
) -> PreTrainedModel:
    """Return the model in evaluation mode, on its device.

    Args:
        model: A hub id or a folder.
        config: Its config.
        dtype: One of `DTYPES`.
        device: Torch device; None takes CUDA where it is available.
        hub: Keyword arguments for loading from the hub.
        offload: A folder for weights that are in files from which no layer can be read alone. With it, layers stay on
            the disk until they are used, if the model is of a supported family and has more than `RESIDENT_BYTES`.
        kind: The Auto class of the model.

    Raises:
        InvalidValueError: There is no such dtype or device here.
        UnreadableModelError: Its weights or its generation config do not load.
        CorruptWeightsError: Weights are missing, or their shapes are not those of the config.
    """
    check_dtype(dtype)
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device="cpu" if place.type == "mps" else place)
    except (RuntimeError, AssertionError) as error:
        raise InvalidValueError("device", device, "a torch device of this machine", first_line(error)) from error
    if place.type == "mps":
        raise InvalidValueError(
            "device", device, "cpu, or cuda where there is one", "mps has no float64 to factorize in."
        )
    if (Path(model) / "generation_config.json").exists():
        # Transformers passes over one that is no JSON, without a word.
        with reading("generation config", model, hub):
            GenerationConfig.from_pretrained(model)
    spread: dict[str, Any] = {}
    quantized = getattr(config, "quantization_config", None) is not None
    if offload is not None and not quantized and expected_bytes(model, config, dtype, hub) > RESIDENT_BYTES:
        spread = {"device_map": layers_on_disk(config, place), "offload_folder": str(offload)}
    try:
        with reading("weights", model, hub):
            # Weights of other shapes are refused below, where their names are known.
            loaded, notes = kind.from_pretrained(
                model,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **spread,
                **hub,
            )
            loaded = loaded.eval() if spread else loaded.to(place).eval()
    except UnreadableModelError as error:
        if not isinstance(error.__cause__, OSError):
            check_buildable(model, config, hub, kind)
        raise
    if others := sorted(notes["mismatched_keys"]):
        name, found, wanted = others[0]
        raise CorruptWeightsError(
            f"model: {len(others)} weights of {model} have other shapes than its config.json says, such as {name}: "
            f"{tuple(found)} in the checkpoint, {tuple(wanted)} by the config. Take both from the same model."
        )
    if missing := sorted(notes["missing_keys"]):
        # Transformers fills them with random numbers.
        raise CorruptWeightsError(
            f"model: the checkpoint of {model} lacks {len(missing)} weights of its config, such as {missing[0]}."
        )
    if left_out := sorted(notes["unexpected_keys"]):
        logger.warning(
            "warning: the checkpoint of %s holds %d tensors that its config does not declare, and the result will not "
            "have them: %s%s.",
            model,
            len(left_out),
            ", ".join(left_out[:8]),
            " and others" if len(left_out) > 8 else "",
        )
    return loaded


def load_written(
    folder: Path, output: Path, device: str | None, offload: Path | None = None, kind: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """Return the model that a command has just written, as a user would load it.

    Args:
        folder: The temporary folder that holds it.
        output: The folder that it is to become, which errors name.
        device, offload, kind: As for `load_model`.

    Raises:
        VerificationError: It does not load, or weights are missing.
    """
    written = str(folder)
    try:
        return load_model(written, load_config(written, {}), "auto", device, {}, offload, kind)
    except (UnreadableModelError, CorruptWeightsError) as error:
        raise VerificationError(f"verify: {str(error).replace(written, str(output))}") from error


def expected_bytes(model: str, config: PreTrainedConfig, dtype: str, hub: dict[str, Any]) -> int:
    """Return the bytes of a model's weights in a dtype, by its config.

    Raises:
        UnreadableModelError: No model can be made of the config.
    """
    wide = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    with reading("config", model, hub), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=hub.get("trust_remote_code"))
    return sum(parameter.numel() for parameter in skeleton.parameters()) * (wide or torch.float32).itemsize


def layers_on_disk(config: PreTrainedConfig, device: torch.device) -> dict[str, Any]:
    """Return a `device_map` that leaves the decoder layers of a model on the disk and puts all else on a device."""
    spec = family_of(config).spec
    beside = {f"{spec.base}.{name}": str(device) for name in (spec.embedding, spec.norm, spec.rotary)}
    return {**beside, spec.head: str(device), f"{spec.base}.{spec.layers}": "disk"}


def check_buildable(
    model: str, config: PreTrainedConfig, hub: dict[str, Any], kind: Any = AutoModelForCausalLM
) -> None:
    """Refuse a config that no model can be made of (sizes of zero, unknown names); it takes no memory for weights.

    Raises:
        UnreadableModelError: What the model's class says about the config.
    """
    with reading("config", model, hub), torch.device("meta"):
        kind.from_config(config, trust_remote_code=hub.get("trust_remote_code"))


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that no model is saved in."""
    if dtype not in DTYPES:
        raise InvalidValueError("dtype", dtype, ", ".join(DTYPES))


def load_tokenizer(model: str, hub: dict[str, Any], needed: bool) -> Any:
    """Return the tokenizer of a model, or None where nothing needs it and there is none that loads.

    A tokenizer that is there and does not load is told in one line on standard error.

    Raises:
        UnsupportedModelError: It is needed, and there is none or it does not load.
    """
    folder = Path(model)
    if folder.is_dir() and not has_tokenizer(folder):
        # Transformers makes an empty one for some families.
        if not needed:
            return None
        raise UnsupportedModelError(
            f"model: {model} has no tokenizer, which text needs. Put the files of its tokenizer (such as "
            "tokenizer.json and tokenizer_config.json) into the folder."
        )
    try:
        with reading("tokenizer", model, hub):
            return AutoTokenizer.from_pretrained(model, **hub)
    except UnreadableModelError as error:
        if needed:
            raise
        downloaded = local_folder(model, hub)
        if downloaded is None or has_tokenizer(downloaded):
            logger.warning("warning: %s The run goes on without a tokenizer.", error)
        return None


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds any file of a tokenizer."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def read_texts(
    tokenizer: Any, config: PreTrainedConfig, texts: TextOptions
) -> tuple[Tensor | None, Tensor | None, dict[str, dict[str, Any]]]:
    """Return the calibration windows, the evaluation windows (None where there are none), and their origins.

    Without an evaluation text, some windows of the calibration text are left to the evaluation, if there are enough.

    Raises:
        InvalidValueError: The number of windows or their length is not possible.
        CalibrationDataError: A text is missing, malformed or shorter than one window.
    """
    check_count("calibration_repeats", texts.calibration_repeats, 0)
    lengths = {}
    for kind, samples, length in (
        ("calibration", texts.calibration_samples, texts.calibration_length),
        ("eval", texts.eval_samples, texts.eval_length),
    ):
        check_count(f"{kind}_samples", samples)
        lengths[kind] = window_length(config, length, f"{kind}_length")
    calibration = evaluation = None
    data: dict[str, dict[str, Any]] = {}
    if texts.eval_data is not None:
        evaluation = _windows(tokenizer, texts.eval_data, lengths["eval"], texts.eval_samples, "eval-data")
        check_ids(evaluation, config.get_text_config().vocab_size, "eval-data")
        data["eval-data"] = _origin(texts.eval_data, evaluation)
    source = texts.calibration_data
    if source is not None:
        samples = texts.calibration_samples
        asked = samples if evaluation is not None else windows_to_read(samples)
        calibration = _windows(
            tokenizer, source, lengths["calibration"], asked, "calibration-data", texts.chat_template
        )
        check_tokens(calibration, config.get_text_config().vocab_size, "calibration-data")
        if evaluation is None:
            calibration, evaluation = split_for_report(calibration, samples)
            if evaluation is not None:
                data["held-back"] = _origin(source, evaluation)
        start = 0 if tokenizer is None else len(text_beginning(tokenizer))
        calibration = with_repeats(calibration, texts.calibration_repeats, start)
        data["calibration-data"] = {**_origin(source, calibration), "repeats": texts.calibration_repeats}
    return calibration, evaluation, data


def _windows(tokenizer: Any, source: Any, length: int, samples: int, field: str, chats: bool = False) -> Tensor:
    """Return windows of token ids [N, length] of a text that the user named, or of the built-in one."""
    if source == str(BUILT_IN_TEXT):
        return built_in_windows(tokenizer, length, samples)
    return token_windows(tokenizer, source, length, samples, field, chats)


def _origin(source: Any, windows: Tensor) -> dict[str, Any]:
    """Return what a report says of the windows [N, L] of a text."""
    name = str(source) if isinstance(source, str | Path) else "token ids"
    return {
        "source": "built-in" if name == str(BUILT_IN_TEXT) else name,
        "windows": len(windows),
        "tokens_per_window": windows.shape[1],
        "sha256": hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest(),
    }


def carried_card(model: str, partial: Path, name: str) -> str:
    """Take the reports along that lie in a model's folder, and return its model card for the folder of the result.

    Args:
        model: The model, as a hub id or a folder.
        partial: The folder that is being written.
        name: The name that it will have.
    """
    source = Path(model)
    for report in (ConversionReport.file_name, CodecReport.file_name, RecoveryReport.file_name):
        if (source / report).is_file():
            shutil.copy(source / report, partial)
    card = source / "README.md"
    if not card.is_file():
        return f"# {name}\n\nMade from `{shown(model)}`.\n"
    try:
        text = card.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        logger.warning("warning: %s is not UTF-8 (byte %d); the copy marks what cannot be read.", card, error.start)
        text = card.read_text(encoding="utf-8", errors="replace")
    return renamed(text, name)
