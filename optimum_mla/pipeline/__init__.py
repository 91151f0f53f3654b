"""The work of the commands, a page or a folder each: plan, load, convert, verify, measure, write."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from optimum_mla.pipeline.conversion_options import build_transformation
from optimum_mla.pipeline.convert import assist, convert
from optimum_mla.pipeline.loading import TextOptions
from optimum_mla.pipeline.quantize import quantize

if TYPE_CHECKING:
    from optimum_mla.pipeline.benchmarking.command import benchmark as benchmark
    from optimum_mla.pipeline.benchmarking.command import compare as compare
    from optimum_mla.pipeline.benchmarking.options import BenchmarkOptions as BenchmarkOptions
    from optimum_mla.pipeline.calibrating import calibrate as calibrate
    from optimum_mla.pipeline.exporting import export as export
    from optimum_mla.pipeline.finetuning import finetune as finetune
    from optimum_mla.pipeline.inspecting import inspect as inspect
    from optimum_mla.pipeline.refitting import refit as refit

LATER = {
    "benchmark": "benchmarking.command",
    "BenchmarkOptions": "benchmarking.options",
    "calibrate": "calibrating",
    "compare": "benchmarking.command",
    "export": "exporting",
    "finetune": "finetuning",
    "inspect": "inspecting",
    "refit": "refitting",
}
"""Modules of what takes seconds to import, or is seldom used: they are imported when somebody asks for it."""

__all__ = [
    "BenchmarkOptions",
    "TextOptions",
    "assist",
    "benchmark",
    "build_transformation",
    "calibrate",
    "compare",
    "convert",
    "export",
    "finetune",
    "inspect",
    "quantize",
    "refit",
]


def __getattr__(name: str) -> Any:
    """Import a name of `LATER` at its first use."""
    if name in LATER:
        return getattr(import_module(f"{__name__}.{LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
