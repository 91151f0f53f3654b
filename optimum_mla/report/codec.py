"""The report of a model whose weights stay and whose old tokens become codes: its file, its table and its card."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

from optimum_mla.report.cards import CARRIED, TAGS, shown
from optimum_mla.report.render import number, table
from optimum_mla.report.schema import Report, StageReport, installed_versions, machine

STATED_TOKENS = 4096
"""Number of tokens in the cache for which its share of the source's is stated."""
SMALL, LARGE = 0.01, 0.05
"""Divergences in nats up to which the predictions count as the same, and as slightly moved."""


@dataclass(frozen=True)
class CodecLayerReport:
    """The codes of one layer.

    Attributes:
        layer: Index of the layer.
        channels: Pairs of bits and of the number of channels that have them.
        bytes_per_token: Bytes of one token's codes, those of the gains included.
    """

    layer: int
    channels: list[list[int]]
    bytes_per_token: int


@dataclass(frozen=True)
class CodecReport(Report):
    """The report of a codec that `mla-convert --cache-budget` fitted.

    Attributes:
        model: Name of the source model as the user gave it.
        kv_cache_budget: The budget: bytes of a token's codes as a share of its keys and values in 16 bits.
        data: Source, number of tokens and SHA-256 of the token ids of each text.
        exact: Which tokens are never read from codes; the fields of `ExactTokens`.
        coded_bytes_per_token: Bytes of one old token in the layers that are coded.
        source_bytes_per_token: Bytes of one token in the same layers of the source in 16 bits.
        other_bytes_per_token: Bytes of one token in 16 bits in the layers whose cache stays, such as those with a
            sliding window, before a window bounds them.
        percent_at_stated_tokens: Bytes of the coded layers' cache with `stated_tokens` tokens in percent of the
            source's, exact tokens included, all in 16 bits.
        percent_of_long_caches: What this percentage falls to as the cache grows.
        stated_tokens: Number of tokens of the first of the two.
        codec_bytes: Bytes of the file of the codec.
        codec_percent_of_weights: The same in percent of the bytes of the model's weights.
        perplexity_before: The source's perplexity on the tokens that were scored, or None without any.
        perplexity_after: The same where old tokens come from codes.
        divergence_nats: Mean KL divergence of the predictions from the source's on these tokens, or None.
        divergence_stderr_nats: Its standard error over the windows, or None.
        same_guess_percent: Share of these tokens with the same likeliest token, or None.
        prompt_tokens: Tokens that were read as a prompt in each window before the scored ones.
        scored_tokens: Number of scored tokens in all windows.
        quality_text: The text of these figures; see `ConversionReport.perplexity_text`.
        conversion_seconds: Wall time of the fit.
        peak_memory_bytes: Highest memory of the whole process, with model and libraries.
        dtype: Dtype in which the model was run.
        seed: Seed that the user gave.
        layers: One entry per coded layer.
        written_as: `model`, a folder with the weights, or `codec`, the codec alone.
        verification: Results of the checks before writing; the fields of `CodecVerification`.
        stages: Time and memory of loading, fitting, verifying and measuring.
        source_folder: Absolute path of the source model's folder; None for a hub id.
        source_config_sha256: SHA-256 of the config file in that folder; None for a hub id.
        source_revision: Commit of the source model on the hub, or the revision that the user gave; None for a folder.
        machine: Processor architecture and operating system.
        versions: Versions of Python and of the packages that matter.
    """

    model: str
    kv_cache_budget: float
    data: dict[str, dict[str, Any]]
    exact: dict[str, int]
    coded_bytes_per_token: int
    source_bytes_per_token: int
    other_bytes_per_token: int
    percent_at_stated_tokens: float
    percent_of_long_caches: float
    codec_bytes: int
    codec_percent_of_weights: float
    perplexity_before: float | None
    perplexity_after: float | None
    divergence_nats: float | None
    divergence_stderr_nats: float | None
    same_guess_percent: float | None
    prompt_tokens: int | None
    scored_tokens: int | None
    quality_text: str | None
    conversion_seconds: float
    peak_memory_bytes: int
    dtype: str
    seed: int
    layers: list[CodecLayerReport]
    written_as: str
    stated_tokens: int = STATED_TOKENS
    verification: dict[str, Any] | None = None
    stages: list[StageReport] = field(default_factory=list)
    source_folder: str | None = None
    source_config_sha256: str | None = None
    source_revision: str | None = None
    machine: str = field(default_factory=lambda: machine())
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())

    file_name: ClassVar[str] = "codec_report.json"
    command: ClassVar[str] = "mla-convert"


def codec_table(report: CodecReport) -> str:
    """Return the table that a run prints at its end, and the model card holds."""
    rows = [
        (
            "bytes of an old token",
            f"{report.source_bytes_per_token:,}",
            f"{report.coded_bytes_per_token:,}",
        ),
        (f"  % of a cache of {report.stated_tokens:,} tokens", "100.0", number(report.percent_at_stated_tokens, 1)),
        ("  % of long caches", "100.0", number(report.percent_of_long_caches, 1)),
        ("perplexity after a prompt", number(report.perplexity_before, 3), number(report.perplexity_after, 3)),
        ("divergence, nats", "0", number(report.divergence_nats, 4)),
        ("same first guess, %", "100.0", number(report.same_guess_percent, 1)),
    ]
    return table(("", "source", "coded"), rows)


def codec_verdict(report: CodecReport) -> str:
    """Return a few sentences that say what the codec saves, what it costs, and what that means."""
    saved = (
        f"Prompts, the first {report.exact['sinks']} tokens and the newest {report.exact['recent']} to "
        f"{report.exact['recent'] + report.exact['together'] - 1} are read exactly. With "
        f"{report.stated_tokens:,} tokens the cache takes {report.percent_at_stated_tokens:.3g} % of the source's in "
        f"16 bits, and {report.percent_of_long_caches:.3g} % when it is long."
    )
    if report.divergence_nats is None:
        return f"{saved} What that costs in quality was not measured, as there was no text in windows long enough."
    moved = report.divergence_nats
    meaning = (
        "The model is as good as before."
        if moved <= SMALL
        else "That is a small loss: a few answers will differ."
        if moved <= LARGE
        else "That is a large loss: give a larger --cache-budget, or calibration text like what the model will read."
    )
    return (
        f"{saved} After a prompt of {report.prompt_tokens} tokens of the {report.quality_text} text the predictions "
        f"moved by {moved:.2g} nats, and {100 - (report.same_guess_percent or 0):.1f} % of the first guesses changed. "
        f"{meaning}"
    )


def next_coded(report: CodecReport, output: str) -> str:
    """Return the command, or the line of Python, that a user would run next on the result."""
    folder = shlex.quote(output.rstrip("/"))
    if report.written_as == "codec":
        return f"load it in Python by optimum_mla.load_codec(model, {output!r}), as its README.md shows."
    return (
        f"optimum-cli mla-benchmark -m {folder} --baseline {shlex.quote(report.model)} --eval-data TEXT {folder}-report"
    )


WEIGHTS_STAY = "The weights are those of the source."
WEIGHTS_TRAINED = "The weights were trained for the codes after the figures below were measured."
CARD = """\
---
{metadata}---

# {name}

{what} by optimum-mla {version}. {weights} `generate` keeps old tokens as codes of few bits,
in the place of their keys and values. Prompts, first and newest tokens are read exactly.

```
{table}
```

`codec_report.json` holds the bits of each layer, data hashes and versions. The licence of the source model applies.

## Use

{use}
"""
MODEL_USE = """\
```python
import optimum_mla  # without it the model is loaded as its source, with a cache in 16 bits
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
ids = tokenizer("The old house stood at the end of the road, and", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=200)[0]))
```

`cache_implementation="dynamic"` generates with the source's own cache, and `model.make_cache()` makes a coded one for
loops of your own."""
CODEC_USE = """\
```python
import optimum_mla
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{model}")
tokenizer = AutoTokenizer.from_pretrained("{model}")
model = optimum_mla.load_codec(model, "{name}")
ids = tokenizer("The old house stood at the end of the road, and", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=200)[0]))
```

The file fits every copy of this model, in any dtype, with plain or quantized weights, and is refused for others."""


def codec_card(report: CodecReport, name: str, source: dict[str, Any]) -> str:
    """Return the model card of a codec, which is the README.md of the output folder.

    Args:
        report: The report of the codec.
        name: Name of the output folder.
        source: Metadata of the source's model card.
    """
    on_hub = report.source_folder is None
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    metadata |= {key: source[key] for key in CARRIED if key in source}
    if on_hub:
        metadata["base_model"] = report.model
    metadata["tags"] = TAGS
    model = report.model if on_hub else shown(report.model)
    whole = report.written_as == "model"
    return CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        name=name,
        what=f"`{model}` with a coded cache," if whole else f"The codec of a cache for `{model}`, fitted",
        version=report.versions["optimum-mla"],
        weights=WEIGHTS_STAY,
        table=codec_table(report),
        use=(MODEL_USE if whole else CODEC_USE).format(name=name, model=model),
    )
