"""The commands' work, one function each: load, transform, measure, write."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from optimum_mla.errors import CorruptWeightsError, InvalidValueError, UnsupportedModelError
from optimum_mla.models import family_of, is_converted
from optimum_mla.models.base import model_geometry
from optimum_mla.models.checkpoint import atomic_folder, check_output
from optimum_mla.report.memory import measured_cache_bytes_per_token, peak_memory_bytes
from optimum_mla.report.quality import perplexity
from optimum_mla.report.render import model_card
from optimum_mla.report.schema import ConversionReport, LayerReport
from optimum_mla.text import token_windows
from optimum_mla.transforms.base import MLATransformation
from optimum_mla.transforms.checks import check_convertible
from optimum_mla.transforms.registry import transform_class

DTYPES = ("auto", "float32", "bfloat16", "float16")
RANK_OPTIONS = {"kv_lora_rank", "kv_cache_ratio", "energy", "d_kv"}
DEFAULT_CACHE_RATIO = 0.5
LONGEST_DEFAULT_WINDOW = 512
"""Tokens per sample where the user names no length and the model can take so many."""
CACHE_PROBE_TOKENS = 16
"""Tokens that the live cache is filled with to weigh it."""


@dataclass(frozen=True)
class TextOptions:
    """Texts for a conversion.

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


def convert(
    model: str,
    output: str | Path,
    method: str = "gqa2mla",
    options: dict[str, Any] | None = None,
    texts: TextOptions = TextOptions(),
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    hub: dict[str, Any] | None = None,
) -> ConversionReport:
    """Convert a checkpoint and write the result with its model card and `conversion_report.json`.

    Args:
        model: A hub id or a folder.
        output: Folder to write; it appears only when whole.
        method: One of `available_transforms()`.
        options: Keyword arguments of the method; without any rank among them, `kv_cache_ratio` is 0.5.
        texts: Calibration and evaluation texts.
        dtype: `auto` (the checkpoint's own), `float32`, `bfloat16` or `float16`; for the work and the result.
        device: Torch device; None takes CUDA where it is available.
        seed: For whatever draws random numbers.
        overwrite: Replace `output` if it is a model folder.
        hub: `revision`, `cache_dir`, `token`, `trust_remote_code` for loading.

    Raises:
        MLAError: Bad input of any kind; `output` is as it was.
    """
    torch.manual_seed(seed)
    hub = {name: value for name, value in (hub or {}).items() if value is not None}
    if dtype not in DTYPES:
        raise InvalidValueError("dtype", dtype, ", ".join(DTYPES))
    folder = check_output(output, model, overwrite)
    config = load_source_config(model, hub)
    options = {name: value for name, value in (options or {}).items() if value is not None}
    if not options.keys() & RANK_OPTIONS:
        options["kv_cache_ratio"] = DEFAULT_CACHE_RATIO

    tokenizer = _load_tokenizer(
        model, hub, needed=isinstance(texts.calibration_data, str) or texts.eval_data is not None
    )
    calibration, evaluation, data = _read_texts(tokenizer, config, texts)
    transformation = build_transformation(method, options, calibration)
    transformation.check(config)

    source = _load_model(model, config, dtype, device, hub)
    check_convertible(source)
    probe = torch.zeros(1, CACHE_PROBE_TOKENS, dtype=torch.long)
    source_bytes = measured_cache_bytes_per_token(source, probe)
    before = perplexity(source, evaluation) if evaluation is not None else None
    start = time.perf_counter()
    converted: Any = transformation(source)
    seconds = time.perf_counter() - start
    cache_bytes = measured_cache_bytes_per_token(converted, probe)
    after = perplexity(converted, evaluation) if evaluation is not None else None

    geometry = model_geometry(converted.spec, converted.config)
    itemsize = converted.dtype.itemsize
    report = ConversionReport(
        model=model,
        method=method,
        options=transformation.options,
        data=data,
        cache_numbers_per_token_per_layer=geometry.cache_numbers / len(geometry.layers),
        cache_bytes_per_token=cache_bytes,
        source_cache_bytes_per_token=source_bytes,
        predicted_cache_bytes_per_token=geometry.cache_bytes(bits=8 * itemsize),
        cache_percent_of_source=100 * cache_bytes / source_bytes,
        parameters_added=geometry.parameters_added,
        perplexity_before=before,
        perplexity_after=after,
        conversion_seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        dtype=str(converted.dtype).removeprefix("torch."),
        seed=seed,
        layers=[_layer_report(layer, result) for layer, result in transformation.results.items()],
    )
    weights = sum(p.numel() * p.element_size() for p in converted.parameters())
    with atomic_folder(folder, needed_bytes=weights) as partial:
        converted.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        report.write(partial)
        (partial / "README.md").write_text(model_card(report, folder.name), encoding="utf-8")
    return report


def build_transformation(method: str, options: dict[str, Any], calibration: Tensor | None) -> MLATransformation:
    """The method's transformation.

    Raises:
        InvalidValueError: No such method, or an option that it does not have.
    """
    cls = transform_class(method)
    try:
        return cls(calibration=calibration, **options)
    except TypeError as error:
        unknown = str(error).rpartition("argument ")[2].strip("'\"")
        raise InvalidValueError(
            unknown, options.get(unknown), f"no such option of {method}", "Leave it out."
        ) from error


def load_source_config(model: str, hub: dict[str, Any]) -> PreTrainedConfig:
    """The config of a model that can be converted.

    Raises:
        UnsupportedModelError: Not found, not a supported decoder LM, converted already, or quantized.
    """
    try:
        config = AutoConfig.from_pretrained(model, **hub)
    except (OSError, ValueError, KeyError) as error:
        if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
            reason = "the folder holds no config.json"
        elif Path(model).is_dir():
            reason = _first_line(error)
        else:
            reason = f"no such folder, and the hub gave: {_first_line(error)}"
        raise UnsupportedModelError(f"model: {model} did not load: {reason}") from error
    if is_converted(config):
        raise UnsupportedModelError(f"model: {model} is converted already. Convert the model that it was made from.")
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"model: the weights of {model} are quantized. Convert the unquantized model.")
    family_of(config)
    return config


def _load_model(
    model: str, config: PreTrainedConfig, dtype: str, device: str | None, hub: dict[str, Any]
) -> PreTrainedModel:
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InvalidValueError("device", device, "a torch device of this machine", _first_line(error)) from error
    try:
        loaded, notes = AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=dtype, output_loading_info=True, **hub
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UnsupportedModelError(f"model: the weights of {model} did not load: {_first_line(error)}") from error
    if missing := sorted(notes["missing_keys"]):
        # Transformers fills them with random numbers.
        raise CorruptWeightsError(
            f"model: the checkpoint of {model} lacks {len(missing)} weights of its config, such as {missing[0]}."
        )
    return loaded.to(place).eval()


def _load_tokenizer(model: str, hub: dict[str, Any], needed: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model, **hub)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if not needed:
            return None
        raise UnsupportedModelError(
            f"model: {model} has no tokenizer that loads, which text needs: {_first_line(error)}"
        ) from error


def _read_texts(
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


def _layer_report(layer: int, result: Any) -> LayerReport:
    g = result.geometry
    return LayerReport(
        layer=layer,
        attention_form=g.attention_form,
        kv_lora_rank=g.kv_lora_rank,
        k_lora_rank=g.k_lora_rank,
        v_lora_rank=g.v_lora_rank,
        q_lora_rank=g.q_lora_rank,
        qk_rope_head_dim=g.qk_rope_head_dim,
        num_rope_heads=g.num_rope_heads,
        rope_cache=g.rope_cache if g.attention_form == "decoupled" else None,
        cache_numbers_per_token=g.cache_numbers,
        output_error=result.output_error,
        key_weight=result.key_weight,
        state_error=result.state_error,
        healed_error=result.healed_error,
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
