"""The answers of `mla-inspect` about inference engines: which ones can run a model, and which conversions of it."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig

from optimum_mla.core.geometry import ModelGeometry
from optimum_mla.families.spec import AttentionSpec, sliding_window
from optimum_mla.models.family_table import family_of
from optimum_mla.ops.rope_split import SCORED_SELECTIONS
from optimum_mla.report.engines import ENGINES, OWN, Engine, blockers, source_blockers
from optimum_mla.report.inspection import EngineChoice
from optimum_mla.report.schema import ConversionReport
from optimum_mla.stack import rope_type


def converted_engines(model: str, config: PreTrainedConfig, geometry: ModelGeometry) -> list[EngineChoice]:
    """Return, for each engine, how it runs the converted model in a folder, or why it cannot."""
    spec, rope, windows, found = family_of(config).spec, rope_type(config), has_windows(config), []
    for engine in ENGINES:
        why = [*other_layers(engine, spec), *blockers(engine, geometry.layers, rope, windows)]
        options = "as it is" if engine is OWN else f"mla-export --format {engine.format}"
        found.append(EngineChoice(engine.name, options, None, why or frequency_blockers(engine, model)))
    return found


def source_engines(config: PreTrainedConfig, source: ModelGeometry) -> list[EngineChoice]:
    """Return, for each engine, the conversion of a source model that it can run, or why it can run none."""
    spec, rope, windows = family_of(config).spec, rope_type(config), has_windows(config)
    first, found = source.layers[0], []
    for engine in ENGINES:
        why = [*other_layers(engine, spec), *source_blockers(engine, first, rope, windows)]
        if engine.kv_lora_ranks is None or engine.qk_rope_head_dim is None:
            options = "any" if engine is OWN else f"gqa2mla or x-ecomla --export-format {engine.format}"
            found.append(EngineChoice(engine.name, options, None, why))
            continue
        wide, rotary = 2 * first.num_key_value_heads * first.head_dim, engine.qk_rope_head_dim
        fitting = [rank for rank in engine.kv_lora_ranks if rank + rotary <= wide]
        if not fitting and not why:
            why = [f"its latent of {min(engine.kv_lora_ranks)} + {rotary} is larger than the source's {wide} numbers"]
        rank = max(fitting, default=min(engine.kv_lora_ranks))
        options = f"gqa2mla --export-format {engine.format} --latent-norm"
        options += f" --kv-lora-rank {rank} --qk-rope-head-dim {rotary}"
        found.append(EngineChoice(engine.name, options, 100 * (rank + rotary) / wide, why))
    return found


def frequency_blockers(engine: Engine, model: str) -> list[str]:
    """Return why an engine cannot run the model in a folder for its rotary frequencies; empty if it can.

    They are read from the report of the conversion. Without a report nothing is said of them.
    """
    path = Path(model) / ConversionReport.file_name
    if engine is OWN or not path.is_file():
        return []
    report = ConversionReport.read(path.parent)
    shared = report.options.get("shared_rope")
    if engine.format == "gguf" and shared != "regular":
        return ["rotary frequencies that do not follow from one base; convert with --shared-rope regular"]
    chosen = report.method == "gqa2mla" or report.options.get("rope_selection") in SCORED_SELECTIONS
    return ["rotary frequencies chosen layer by layer; convert with --shared-rope"] if chosen and not shared else []


def other_layers(engine: Engine, spec: AttentionSpec) -> list[str]:
    """Return why an engine cannot run the layers of a family, whatever their attention; empty if it can."""
    return [] if engine is OWN or spec.llama_block else [f"layers of {spec.model_type}, which are not those of Llama"]


def has_windows(config: PreTrainedConfig) -> bool:
    """Return whether any layer has a sliding window."""
    return any(sliding_window(config, layer) is not None for layer in range(config.num_hidden_layers))
