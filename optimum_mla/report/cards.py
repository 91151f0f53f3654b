"""Model cards: the README.md of each folder that a command writes.

A card is a title and sections. A later command takes the card of its input along, under its own name, and replaces the
sections that its work makes untrue.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from optimum_mla.report.render import codec_table, export_table, fill, quantization_table, recovery_table
from optimum_mla.report.schema import CodecReport, ConversionReport, ExportReport, QuantizationReport, RecoveryReport
from optimum_mla.report.verdict import recovery_verdict

CARRIED = ("license", "license_name", "license_link", "language", "base_model")
"""Fields of the source's model card that the card of the result takes over."""
TAGS = ["optimum-mla", "mla", "kv-cache"]
WEIGHTS_STAY = "The weights are those of the source."
WEIGHTS_TRAINED = "The weights were trained for the codes after the figures below were measured."
"""The sentence that replaces `WEIGHTS_STAY` in the card of a codec when the model is trained."""
TRAINED = {
    "lora": "LoRA adapters on the {projections}",
    "dora": "DoRA adapters on the {projections}",
    "kv": "the {projections} alone",
    "attention": "the attention, everything else frozen",
    "full": "all parameters",
}


def model_card(report: ConversionReport | CodecReport, name: str, source: dict[str, Any], wrapped: bool = False) -> str:
    """Return the model card of a conversion, which is the README.md of the output folder.

    Args:
        report: The report of the conversion.
        name: Name of the output folder.
        source: Metadata of the source's model card.
        wrapped: Whether the converted language model is inside a model that reads images.
    """
    task = "image-text-to-text" if wrapped else "text-generation"
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task}
    metadata |= {field: source[field] for field in CARRIED if field in source}
    if report.source_folder is None:
        metadata["base_model"] = report.model
    metadata["tags"] = TAGS
    values = {
        "metadata": yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        "model": name_without_folders(report.model),
        "version": report.versions["optimum-mla"],
    }
    if isinstance(report, CodecReport):
        table = codec_table(report)
        return fill("codec_card.md", report=report, name=name, table=table, weights=WEIGHTS_STAY, **values)
    return fill("model_card.md", report=report, name=name, wrapped=wrapped, **values)


def name_without_folders(name: str) -> str:
    """Return the name of a model or a text for a card: a hub id as it is, and a path without its folders.

    The path of a folder means nothing on another machine.
    """
    path = Path(name)
    return path.resolve().name if path.exists() or path.is_absolute() else name


def rename_card(card: str, name: str) -> str:
    """Return a card under the name of another folder: its title, and what its example loads."""
    card = re.sub(r"(?m)^# .*$", lambda _: f"# {name}", card, count=1)
    return re.sub(r"from_pretrained\(([\"']).*?\1", lambda _: f'from_pretrained("{name}"', card)


def with_section(card: str, section: str) -> str:
    """Return a card with a section, in place of the one with the same title if there is one, or at its end.

    Args:
        card: The card.
        section: The section, which begins with its title as a heading of the second level.
    """
    title = section.splitlines()[0]
    old = re.compile(rf"(?ms)^{re.escape(title)}$.*?(?=^## |\Z)")
    section = section.rstrip() + "\n"
    if old.search(card):
        return old.sub(lambda _: section + "\n", card, count=1).rstrip() + "\n"
    return f"{card.rstrip()}\n\n{section}"


def quantization_card(report: QuantizationReport) -> str:
    """Return the section that `mla-quantize` puts into a model card."""
    return fill("quantization_section.md", report=report, table=quantization_table(report))


def recovery_card(report: RecoveryReport) -> str:
    """Return the section that `mla-finetune` puts into a model card."""
    projections = "projections of keys and values" if report.as_used else "latent projections"
    return fill(
        "recovery_section.md",
        report=report,
        train=TRAINED[report.recipe["train"]].format(projections=projections),
        source=name_without_folders(report.data["train-data"]["source"]),
        teacher=report.teacher and name_without_folders(report.teacher),
        verdict=recovery_verdict(report),
        table=recovery_table(report),
    )


def export_card(report: ExportReport) -> str:
    """Return the section that an export puts into a model card, in place of how the converted model is used."""
    return fill("export_section.md", report=report, table=export_table(report))
