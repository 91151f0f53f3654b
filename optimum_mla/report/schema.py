"""`conversion_report.json`: what was done and what was measured. Units are in the field names."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPORT_NAME = "conversion_report.json"
REPORTED_PACKAGES = ("optimum-mla", "torch", "transformers", "optimum", "safetensors")


@dataclass(frozen=True)
class LayerReport:
    """One converted layer; the errors and `key_weight` are those of `optimum_mla.transforms.base.LayerResult`.

    `rope_cache` is `cached` or `rebuilt` where the rotary key is decoupled, else None.
    """

    layer: int
    attention_form: str
    kv_lora_rank: int
    k_lora_rank: int
    v_lora_rank: int
    q_lora_rank: int | None
    qk_rope_head_dim: int
    num_rope_heads: int
    cache_numbers_per_token: int
    output_error: float
    rope_cache: str | None = None
    key_weight: float | None = None
    state_error: float | None = None
    healed_error: float | None = None


@dataclass(frozen=True)
class ConversionReport:
    """One conversion.

    Attributes:
        model: What was converted, as the user named it.
        method: Name of the transformation.
        options: Every option of it, defaults resolved.
        data: For each text used: where it came from, its tokens, and the SHA-256 of its token ids.
        cache_numbers_per_token_per_layer: Mean over all layers, after conversion.
        cache_bytes_per_token: Measured from a live `DynamicCache`, all layers, in the saved dtype.
        source_cache_bytes_per_token: Likewise for the source model.
        predicted_cache_bytes_per_token: What `MLAGeometry` computes.
        cache_percent_of_source: From the measured bytes.
        parameters_added: Parameters more than the source model's.
        perplexity_before: On the evaluation text, or None without one. perplexity_after: likewise, converted.
        conversion_seconds: Wall time of the transformation alone.
        peak_memory_bytes: High-water mark of the whole process, model and libraries included.
        dtype: Of the saved weights.
        seed: Given by the user.
        layers: One entry per converted layer.
        machine: Processor architecture and operating system.
        versions: Of Python and the packages that matter.
    """

    model: str
    method: str
    options: dict[str, Any]
    data: dict[str, dict[str, Any]]
    cache_numbers_per_token_per_layer: float
    cache_bytes_per_token: float
    source_cache_bytes_per_token: float
    predicted_cache_bytes_per_token: float
    cache_percent_of_source: float
    parameters_added: int
    perplexity_before: float | None
    perplexity_after: float | None
    conversion_seconds: float
    peak_memory_bytes: int
    dtype: str
    seed: int
    layers: list[LayerReport]
    machine: str = field(default_factory=lambda: f"{platform.machine()} {platform.system()}")
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())

    def write(self, folder: Path) -> None:
        """Save as `conversion_report.json` in `folder`."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ConversionReport:
        """Load what `write` saved."""
        content = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
        content["layers"] = [LayerReport(**layer) for layer in content["layers"]]
        return cls(**content)


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages whose behaviour a result depends on."""
    versions = {"python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return versions
