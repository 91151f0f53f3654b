"""Model cards: the README.md of each folder that a command writes.

A card is a title and sections. A later command takes the card of its input along, under its own name, and replaces the
sections that its work makes untrue.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from optimum_mla.report.render import export_table, number, quantization_table, recovery_table
from optimum_mla.report.schema import ConversionReport, ExportReport, QuantizationReport, RecoveryReport
from optimum_mla.report.verdict import recovery_verdict

CARRIED = ("license", "license_name", "license_link", "language", "base_model")
"""Fields of the source's model card that the card of the result takes over."""
TAGS = ["optimum-mla", "mla", "kv-cache"]

MODEL_CARD = """\
---
{metadata}---

# {name}

{warning}{model} with Multi-head Latent Attention, converted by optimum-mla {version} with the method `{method}`.

| | source | this model |
|---|---|---|
| cache, bytes per token in 16 bits (measured) | {source_bytes:g} | {bytes:g} ({percent:.1f} %) |
{more}| perplexity on the {text} text | {before} | {after} |
| parameters | | {added:+,} |

`conversion_report.json` holds every option, the rank and error of each layer, data hashes and versions. The licence of
the source model applies.

{use}"""
USE = """\
## Use

```python
import optimum_mla  # registers the model classes
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Without the import Transformers says that the repository contains custom code. That code (`modeling_mla.py`) imports the
same classes, so that `trust_remote_code=True` does in the place of the import where optimum-mla is installed.

To train adapters with PEFT, take `get_peft_model(model, mla_lora_config(model))`, where `mla_lora_config` is imported
from `optimum_mla.recovery`. The source's `k_proj` and `v_proj` have given way to the projections of the latent, so
`target_modules` that name them leave these out.
"""
WRAPPER_USE = """\
## Use

The language model inside is converted; all else is as in the source.

```python
import optimum_mla  # registers the model classes
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```

Without the import Transformers says that it does not recognize this architecture.
"""


def model_card(report: ConversionReport, name: str, source: dict[str, Any], wrapped: bool = False) -> str:
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
    on_hub = report.source_folder is None
    if on_hub:
        metadata["base_model"] = report.model
    metadata["tags"] = TAGS
    more, own = [], (report.source_cache_bytes_per_token, report.cache_bytes_per_token)
    if own != report.shared_bytes:
        more.append(f"| the same in {report.dtype}, as saved | {own[0]:g} | {own[1]:g} |\n")
    if report.answers is not None:
        answers = report.answers
        said = f"{answers['same_guess_percent']:.1f} % (divergence {answers['divergence_nats']:.2g} nats)"
        more.append(f"| same first guess on the source's own answers | | {said} |\n")
    return MODEL_CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        name=name,
        warning="" if report.quality_warning is None else f"**{report.quality_warning}**\n\n",
        text=report.perplexity_text or "evaluation",
        model=f"`{report.model if on_hub else shown(report.model)}`",
        version=report.versions["optimum-mla"],
        method=report.method,
        source_bytes=report.shared_bytes[0],
        bytes=report.shared_bytes[1],
        more="".join(more),
        percent=report.cache_percent_of_source,
        before=number(report.perplexity_before),
        after=number(report.perplexity_after),
        added=report.parameters_added,
        use=(WRAPPER_USE if wrapped else USE).format(name=name),
    )


def shown(name: str) -> str:
    """Return the name of a model or a text for a card: a hub id as it is, and a path without its folders.

    The path of a folder means nothing on another machine.
    """
    path = Path(name)
    return path.resolve().name if path.exists() or path.is_absolute() else name


def renamed(card: str, name: str) -> str:
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


QUANTIZATION_CARD = """\
## Quantized

The cache takes {bits} bits per number of the latent ({backend}, groups of {group_size}) and {rope_bits} bits per number
of a rotary key beside it. At most the newest {residual_length} tokens stay unquantized. Weights: {weights}. `generate`
uses this cache by default, and `cache_implementation` overrides it. Measured:

```
{table}
```
"""


def quantization_card(report: QuantizationReport) -> str:
    """Return the section that `mla-quantize` puts into a model card."""
    return QUANTIZATION_CARD.format(**report.cache, weights=report.weights, table=quantization_table(report))


RECOVERY_CARD = """\
## Recovered

Trained with the objective `{objective}`, {train}, on {tokens:,} tokens of `{source}`{teacher}. {verdict} All settings,
the data's hash and the loss curve are in `recovery_report.json`.

```
{table}
```

![loss](loss.png)
"""
TRAINED = {
    "lora": "LoRA adapters on the {projections}",
    "dora": "DoRA adapters on the {projections}",
    "kv": "the {projections} alone",
    "attention": "the attention, everything else frozen",
    "full": "all parameters",
}


def recovery_card(report: RecoveryReport) -> str:
    """Return the section that `mla-finetune` puts into a model card."""
    return RECOVERY_CARD.format(
        objective=report.recipe["objective"],
        train=TRAINED[report.recipe["train"]].format(
            projections="projections of keys and values" if report.as_used else "latent projections"
        ),
        tokens=report.tokens_seen,
        source=shown(report.data["train-data"]["source"]),
        teacher=f", taught by `{shown(report.teacher)}`" if report.teacher else "",
        verdict=recovery_verdict(report),
        table=recovery_table(report),
    )


EXPORT_CARD = """\
## Use

This folder is a plain `{format}` model: Transformers loads it by `AutoModelForCausalLM.from_pretrained` without
optimum-mla and without remote code, and caches only its latent. Compared with the converted model:

```
{table}
```
"""


GGUF_CARD = """\
## Use

This folder holds a GGUF file of the architecture deepseek2, which llama.cpp runs, caching only the latent:
`llama-cli -m FILE.gguf`. Compared with the converted model, the model that was written to it has:

```
{table}
```
"""


def export_card(report: ExportReport) -> str:
    """Return the section that an export puts into a model card, in place of how the converted model is used."""
    card = GGUF_CARD if report.format == "gguf" else EXPORT_CARD
    return card.format(format=report.format, table=export_table(report))
