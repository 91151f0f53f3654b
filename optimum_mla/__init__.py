"""optimum-mla: convert pretrained decoder LLMs to Multi-head Latent Attention.

Importing the package registers the classes of converted models with the Transformers Auto classes.
"""

from typing import TYPE_CHECKING, Any

from optimum_mla import models as models
from optimum_mla.cache import LatentCache
from optimum_mla.calibrate.statistics_folder import CalibrationStatistics
from optimum_mla.convert.codec import fit_codec
from optimum_mla.convert.transformation import MLATransformation, compose
from optimum_mla.core.geometry import MLAGeometry, ModelGeometry
from optimum_mla.methods.gqa2mla import GQA2MLA
from optimum_mla.methods.mha2mla import MHA2MLA
from optimum_mla.methods.quantize_cache import QuantizeLatentCache
from optimum_mla.methods.registry import available_transforms, register_transform
from optimum_mla.methods.xecomla import XEcoMLA
from optimum_mla.models import AttentionSpec, register_family, supported_model_types
from optimum_mla.models.codec import ModelCodec
from optimum_mla.models.coded import load_codec
from optimum_mla.models.registry import register_installed_families
from optimum_mla.models.tracing import trace

# Last, because the packages that offer families import from this one.
register_installed_families()

if TYPE_CHECKING:
    from optimum_mla.pipeline import benchmark as benchmark

__version__ = "0.1.0"

__all__ = [
    "GQA2MLA",
    "MHA2MLA",
    "AttentionSpec",
    "CalibrationStatistics",
    "LatentCache",
    "MLAGeometry",
    "MLATransformation",
    "ModelCodec",
    "ModelGeometry",
    "QuantizeLatentCache",
    "XEcoMLA",
    "available_transforms",
    "benchmark",
    "compose",
    "fit_codec",
    "load_codec",
    "register_family",
    "register_transform",
    "supported_model_types",
    "trace",
]


def __getattr__(name: str) -> Any:
    """Import `benchmark` at its first use: its libraries are needed only by those who measure."""
    if name == "benchmark":
        from optimum_mla.pipeline import benchmark

        return benchmark
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
