"""The attention modules of converted layers."""

from optimum_mla.nn.attention import LatentAttention
from optimum_mla.nn.decoupled import DecoupledLatentAttention
from optimum_mla.nn.full_rope import FullRopeLatentAttention

ATTENTION_FORMS: dict[str, type[LatentAttention]] = {
    "decoupled": DecoupledLatentAttention,
    "full": FullRopeLatentAttention,
}
"""Module class of each `attention_form` but `source`."""

__all__ = ["ATTENTION_FORMS", "DecoupledLatentAttention", "FullRopeLatentAttention", "LatentAttention"]
