"""Model families as data: where each keeps its attention, and a check that a family's data describe its models."""

from optimum_mla.families.project import SourceAttention
from optimum_mla.families.spec import AttentionSpec, sliding_window

__all__ = ["AttentionSpec", "SourceAttention", "sliding_window"]
