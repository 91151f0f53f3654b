"""The lines that `mla-convert` prints before it starts."""

from __future__ import annotations

from transformers import PreTrainedModel

from optimum_mla.calibrate.windows import HELD_BACK
from optimum_mla.models.family_table import family_of
from optimum_mla.models.layers import kept_layers, model_geometry
from optimum_mla.pipeline.preparation import Preparation
from optimum_mla.report.render import size

SMALL_CACHE_RATIO = 0.1
"""Share of the source's cache below which a conversion is announced with a warning."""


def announcement(prepared: Preparation, source: PreTrainedModel, memory: int) -> str:
    """Return a few lines that say what a conversion of weights will do, and in how many bytes of `memory`."""
    transformation, planned = prepared.transformation, prepared.planned
    parameters = sum(p.numel() for p in source.parameters())
    geometry = model_geometry(family_of(planned).spec, planned)
    lines = [
        f"{prepared.asked.source.name}: {len(geometry.layers)} layers, {parameters / 1e6:,.0f} M parameters, "
        f"{str(source.dtype).removeprefix('torch.')} on {source.device}",
        f"{transformation.name}: cache of about {100 * geometry.cache_ratio:.3g} % of the source's",
    ]
    data = prepared.texts.data
    text = data.get("calibration-data")
    if text is None:
        lines[-1] += ", without calibration"
        if not transformation.preserves_computation:
            lines.append("warning: without calibration the result is of no use until it is trained (mla-finetune).")
    else:
        named = "the built-in text" if text["source"] == "built-in" else text["source"]
        lines[-1] += f", calibrated on {text['windows']} windows of {text['tokens_per_window']} tokens of {named}"
        if "held-back" in data:
            left = data["held-back"]
            other = "" if left["source"] == text["source"] else " of the built-in text"
            lines[-1] += f"; {left['windows']} more{other} are left to the figures at the end"
        if "statistics" in text:
            lines.append("Statistics need the least time. Calibration on the text itself loses less.")
        elif text["source"] == "built-in":
            lines.append("Text like what the model will read is better: give it with --calibration-data.")
        if text["windows"] < HELD_BACK:
            lines.append(
                f"warning: fewer than {HELD_BACK} windows, so none is held back: choices are made on what was fitted."
            )
    if prepared.wrapped:
        lines.append("This is the language model of the model, whose other parts stay as they are.")
    lines += kept_layers(planned)
    if geometry.cache_ratio < SMALL_CACHE_RATIO:
        lines.append(
            f"warning: {100 * geometry.cache_ratio:.2g} % of the cache is less than models of today can do with; "
            "expect to train the result, or take --kv-cache-ratio 0.25 with mla-quantize --cache-bits 4 behind it."
        )
    lines.append(f"This should take {size(memory)} of memory. How long it takes is said after the first layer.")
    return "\n".join([*lines, ""])
