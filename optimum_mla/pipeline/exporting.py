"""`mla-export`: a converted model in a format that needs no plugin."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from optimum_mla.calibrate.text import token_windows, window_length
from optimum_mla.calibrate.windows import check_tokens
from optimum_mla.convert.transformation import MLATransformation
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.number_checks import check_count
from optimum_mla.export.checks import check_exportable, check_padding, different_frequencies, refuse
from optimum_mla.export.deepseek import export_deepseek, planned_config
from optimum_mla.export.gguf_file import check_file_type, check_gguf, check_writable, file_type_of, write_gguf
from optimum_mla.export.latent_norm import check_layers, with_latent_norms
from optimum_mla.export.tensors import rotated_pairs
from optimum_mla.io.claim import claims_output
from optimum_mla.io.folder import atomic_folder, check_output
from optimum_mla.measure.verify import reference_logits, verify
from optimum_mla.models.family_table import family_of
from optimum_mla.models.layers import model_geometry
from optimum_mla.pipeline.loading import carried_card
from optimum_mla.pipeline.placement import parameter_bytes
from optimum_mla.pipeline.run_settings import RunOptions, RunSettings
from optimum_mla.report.cards import export_card, with_section
from optimum_mla.report.schema import ExportReport

PROBE_TOKENS = 64
SIZES = re.compile(r"(\d+)\+(\d+)")
REGULAR: dict[str, Any] = {"shared_rope": "regular", "latent_norm": True}
ENGINE_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "deepseek_v3": {"gqa2mla": {"rope_cache": "cached", "shared_rope": True}, "x-ecomla": {"shared_rope": True}},
    "gguf": {"gqa2mla": {"rope_cache": "cached", **REGULAR}, "x-ecomla": REGULAR},
}
"""By format: options that make a method's result exportable. They are added where the user gives no others."""


def check_format(name: str) -> None:
    """Refuse a format that there is not."""
    if name not in ENGINE_OPTIONS:
        raise InvalidValueError("format", name, ", ".join(ENGINE_OPTIONS))


def exportable_options(format: str, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a conversion with those that its export needs.

    Raises:
        InvalidValueError: There is no such format, or it cannot hold what the given options make.
    """
    check_format(format)
    needed = ENGINE_OPTIONS[format].get(method, {})
    for name, value in needed.items() if format == "gguf" else ():
        if options.get(name, value) != value:
            raise InvalidValueError(name, options[name], f"{value} with the export format gguf")
    if options.get("kv_cache_budget") is not None:
        remedy = "No format has codes, so the budget would not hold. Give kv_cache_ratio."
        raise InvalidValueError("kv_cache_budget", options["kv_cache_budget"], "nothing with an export format", remedy)
    return {**needed, **options}


def check_conversion(format: str, transformation: MLATransformation, planned: PreTrainedConfig) -> None:
    """Refuse a conversion whose result could not be exported, before any work.

    Raises:
        UnsupportedModelError: The format cannot express it, such as layers with rotary dims of their own.
    """
    check_exportable(planned, pad=True)
    if getattr(transformation, "q_energy", None) is not None:
        reason = "with --q-energy each layer has a query rank of its own, DeepSeek's all have the same"
        raise refuse(reason, "Convert with --q-lora-rank.")
    if not transformation.same_rotary_dims:
        raise different_frequencies()
    first = model_geometry(family_of(planned).spec, planned).layers[0]
    check_planned(format, planned, transformation.rotary_pairs(first))


def check_planned(
    format: str,
    config: PreTrainedConfig,
    pairs: Tensor | None,
    pad_to: tuple[int, int] | None = None,
    latent_norm: bool = False,
) -> None:
    """Refuse an export by the shapes that it would have.

    Args:
        format: The format.
        config: The config of the converted model, which has passed `check_exportable`.
        pairs: The source's rotary pairs with which all layers rotate, [R/2], or None where they are still to be chosen.
        pad_to: As for `export_deepseek`.
        latent_norm: Whether the model gets norms on its latents before it is exported.

    Raises:
        UnsupportedModelError: llama.cpp cannot run it.
        InvalidValueError: The model is larger than `pad_to`.
    """
    if pairs is not None:
        planned = planned_config(config, pairs, pad_to, latent_norm)
        if format == "gguf":
            check_gguf(planned)


class ExportSettings(RunSettings, total=False):
    """The settings of what an export writes.

    Attributes:
        pad: Pad the latents of layers with lower ranks by zeros.
        gguf_type: Type of the matrices in a GGUF file, one of `FILE_TYPES`; None takes that of the model's dtype.
        pad_to: Rank of the latent and dims of the rotary key, such as `512+64`, to which all layers are padded by
            zeros; None adds none.
        latent_norm: Give a model that was converted without it a norm on its latents and no biases after them, fitted
            to `recover_data`; see `optimum_mla.export.latent_norm`.
        recover_data: What `optimum_mla.io.documents.read_documents` reads, or token ids.
        recover_samples: Windows of that text.
        recover_length: Tokens per window; None takes the shorter of 512 and the model's longest context.
    """

    pad: bool
    gguf_type: str | None
    pad_to: str | None
    latent_norm: bool
    recover_data: str | None
    recover_samples: int
    recover_length: int | None


@dataclass(frozen=True)
class ExportOptions(RunOptions):
    """A format, and these settings with their defaults; see `ExportSettings`."""

    format: str = "deepseek_v3"
    pad: bool = False
    gguf_type: str | None = None
    pad_to: str | None = None
    latent_norm: bool = False
    recover_data: str | None = None
    recover_samples: int = 128
    recover_length: int | None = None

    def checked(self) -> tuple[int, int] | None:
        """Check what can be checked without a model, and return the sizes of `pad_to`.

        Raises:
            InvalidValueError: There is no such format or type, or two options exclude each other.
        """
        check_format(self.format)
        if self.gguf_type is not None:
            check_file_type(self.gguf_type)
            if self.format != "gguf":
                raise InvalidValueError("gguf_type", self.gguf_type, f"nothing with the format {self.format}")
        if self.latent_norm != (self.recover_data is not None):
            allowed = "True together with recover_data"
            remedy = "Give --latent-norm and --recover-data TEXT."
            raise InvalidValueError("latent_norm", self.latent_norm, allowed, remedy)
        return None if self.pad_to is None else _sizes(self.pad_to)

    def windows(self, config: PreTrainedConfig, tokenizer: Any) -> Tensor | None:
        """Return the windows of the text to which norms are fitted, [N, L], or None where there is none."""
        if self.recover_data is None:
            return None
        check_count("recover_samples", self.recover_samples)
        length = window_length(config, self.recover_length, "recover_length")
        windows = token_windows(tokenizer, self.recover_data, length, self.recover_samples, "recover-data")
        check_tokens(windows, config.vocab_size, "recover-data")
        return windows


@claims_output()
def export(
    model: str,
    output: str | Path,
    format: str = "deepseek_v3",
    **settings: Unpack[ExportSettings],
) -> ExportReport:
    """Write a converted model as a plain `deepseek_v3` one, with `export_report.json`.

    Args:
        model: A hub id or a folder; converted.
        output: Folder to write; it appears only when whole.
        format: `deepseek_v3`, or `gguf` for a file that llama.cpp runs.
        **settings: See `ExportSettings` and `RunSettings`.

    Raises:
        MLAError: Bad input of any kind, or a model that the format cannot express; `output` is as it was.
    """
    asked = ExportOptions(format=format, **settings)
    sizes = asked.checked()
    checkpoint = asked.checkpoint(model)
    folder = check_output(output, {"model": model, "recover-data": asked.recover_data}, asked.overwrite)
    config = checkpoint.converted_config()
    layers = model_geometry(family_of(config).spec, config).layers
    if asked.latent_norm:
        check_layers(layers)
    tokenizer = checkpoint.tokenizer(needed=asked.latent_norm)
    if asked.format == "gguf":
        check_writable(config, tokenizer)
    check_exportable(config, asked.pad or sizes is not None)
    if sizes is not None:
        check_padding(sizes, layers, asked.latent_norm or layers[0].latent_norm)
    windows = asked.windows(config, tokenizer)
    native = checkpoint.load(asked.dtype, asked.device)
    check_planned(asked.format, config, rotated_pairs(native), sizes, asked.latent_norm)
    before, after = None, None
    if windows is not None:
        normed = with_latent_norms(native, windows)
        native, (before, after) = normed.model, normed.perplexities
    exported, report = exported_model(model, native, asked.format, asked.pad, sizes)
    report = replace(report, perplexity_without_norm=before, perplexity_with_norm=after)
    with atomic_folder(folder, parameter_bytes(exported), asked.overwrite) as partial:
        write_export(exported, asked.format, partial, folder.name, tokenizer, asked.gguf_type)
        card = with_section(carried_card(model, partial, folder.name), export_card(report))
        report.write(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return report


def write_export(
    exported: Any, format: str, folder: Path, name: str, tokenizer: Any, gguf_type: str | None = None
) -> None:
    """Write an export and its tokenizer, if it has one, into a folder.

    Matrices in a GGUF file have the type `gguf_type`, or that of the model's dtype.
    """
    if format == "gguf":
        of = gguf_type or file_type_of(exported.dtype)
        write_gguf(exported, folder / f"{name}-{of.upper()}.gguf", name, of, tokenizer)
        return
    exported.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _sizes(text: str) -> tuple[int, int]:
    """Return the rank and the rotary dims of a text such as `512+64`."""
    found = SIZES.fullmatch(text)
    if found is None:
        raise InvalidValueError("pad_to", text, "RANK+DIMS, such as 512+64 for a latent of 512 and a rotary key of 64")
    return int(found[1]), int(found[2])


def exported_model(
    name: str, native: PreTrainedModel, format: str, pad: bool, pad_to: tuple[int, int] | None = None
) -> tuple[PreTrainedModel, ExportReport]:
    """Return the export of a converted model in memory, and what it is beside it.

    Raises:
        UnsupportedModelError: The format cannot express it.
        VerificationError: The export computes something else, or its cache is not what it should be.
    """
    exported = export_deepseek(native, pad, pad_to)
    if format == "gguf":
        check_gguf(exported.config)
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
