"""The commands' work, one file each: load, transform, measure, write."""

from optimum_mla.pipeline.convert import build_transformation, convert
from optimum_mla.pipeline.finetune import finetune
from optimum_mla.pipeline.loading import TextOptions, load_source_config
from optimum_mla.pipeline.quantize import quantize

__all__ = ["TextOptions", "build_transformation", "convert", "finetune", "load_source_config", "quantize"]
