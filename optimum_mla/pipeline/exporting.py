"""`mla-export`: a converted model in a format that needs no plugin."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_mla.core.errors import InvalidValueError, UnsupportedModelError
from optimum_mla.export.checks import check_exportable
from optimum_mla.export.deepseek import export_deepseek
from optimum_mla.io.claim import claims_output
from optimum_mla.io.folder import atomic_folder, check_output
from optimum_mla.measure.verify import reference_logits, verify
from optimum_mla.models.registry import is_converted
from optimum_mla.pipeline.loading import (
    carried_card,
    check_dtype,
    load_config,
    load_model,
    load_tokenizer,
)
from optimum_mla.report.cards import export_card, with_section
from optimum_mla.report.schema import ExportReport

FORMATS = ("deepseek_v3",)
PROBE_TOKENS = 64
ENGINE_OPTIONS: dict[str, dict[str, Any]] = {
    "gqa2mla": {"rope_cache": "cached", "shared_rope": True},
    "x-ecomla": {"shared_rope": True},
}
"""Options that make a method's result exportable. They are added where the user gives no others."""


def check_format(name: str) -> None:
    """Refuse a format that there is not."""
    if name not in FORMATS:
        raise InvalidValueError("format", name, ", ".join(FORMATS))


@claims_output
def export(
    model: str,
    output: str | Path,
    format: str = "deepseek_v3",
    pad: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    overwrite: bool = False,
    hub: dict[str, Any] | None = None,
) -> ExportReport:
    """Write a converted model as a plain `deepseek_v3` one, with `export_report.json`.

    Args:
        model: A hub id or a folder; converted.
        output: Folder to write; it appears only when whole.
        format: `deepseek_v3`.
        pad: Pad the latents of layers with lower ranks by zeros.
        dtype: `auto` (the checkpoint's own), `float32`, `bfloat16` or `float16`.
        device: Torch device; None takes CUDA where it is available.
        overwrite: Replace `output` if it is a model folder.
        hub: `revision`, `cache_dir`, `token`, `trust_remote_code` for loading.

    Raises:
        MLAError: Bad input of any kind, or a model that the format cannot express; `output` is as it was.
    """
    check_format(format)
    check_dtype(dtype)
    hub = {name: value for name, value in (hub or {}).items() if value is not None}
    folder = check_output(output, {"model": model}, overwrite)
    config = load_config(model, hub)
    if not is_converted(config):
        raise UnsupportedModelError(f"model: {model} is not converted. Run optimum-cli mla-convert on it first.")
    check_exportable(config, pad)
    tokenizer = load_tokenizer(model, hub, needed=False)
    native = load_model(model, config, dtype, device, hub)
    exported, report = exported_model(model, native, format, pad)
    weights = sum(p.numel() * p.element_size() for p in exported.parameters())
    with atomic_folder(folder, weights, overwrite) as partial:
        exported.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        card = with_section(carried_card(model, partial, folder.name), export_card(report))
        report.write(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return report


def exported_model(name: str, native: PreTrainedModel, format: str, pad: bool) -> tuple[PreTrainedModel, ExportReport]:
    """Return the export of a converted model in memory, and what it is beside it.

    Raises:
        UnsupportedModelError: The format cannot express it.
        VerificationError: The export computes something else, or its cache is not what it should be.
    """
    exported = export_deepseek(native, pad)
    verification = verify(exported, reference_logits(native))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(native.config.vocab_size, (2, PROBE_TOKENS), generator=generator).to(native.device)
    ids = ids[:, : getattr(native.config, "max_position_embeddings", PROBE_TOKENS)]
    with torch.no_grad():
        theirs, ours = exported(ids).logits.float(), native(ids).logits.float()
    config: Any = exported.config
    return exported, ExportReport(
        model=name,
        format=format,
        kv_lora_rank=config.kv_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        q_lora_rank=config.q_lora_rank,
        cache_numbers_per_token=(config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers,
        parameters_added=sum(p.numel() for p in exported.parameters()) - sum(p.numel() for p in native.parameters()),
        largest_logit_difference=(theirs - ours).abs().max().item(),
        largest_logit=ours.abs().max().item(),
        dtype=str(native.dtype).removeprefix("torch."),
        verification=asdict(verification),
    )
