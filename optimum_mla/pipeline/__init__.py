"""The commands' work, one file each: load, transform, measure, write."""

from typing import TYPE_CHECKING, Any

from optimum_mla.pipeline.convert import build_transformation, convert
from optimum_mla.pipeline.loading import TextOptions, load_source_config
from optimum_mla.pipeline.quantize import quantize

if TYPE_CHECKING:
    from optimum_mla.pipeline.finetuning import finetune as finetune

__all__ = ["TextOptions", "build_transformation", "convert", "finetune", "load_source_config", "quantize"]


def __getattr__(name: str) -> Any:
    """`finetune`, whose trainers take seconds to import, only when somebody asks for it."""
    if name == "finetune":
        from optimum_mla.pipeline.finetuning import finetune

        return finetune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
