"""The attention modules of converted layers."""

from optimum_mla.nn.attention import DecoupledLatentAttention, FullRopeLatentAttention, LatentAttention

ATTENTION_FORMS: dict[str, type[LatentAttention]] = {
    "decoupled": DecoupledLatentAttention,
    "full": FullRopeLatentAttention,
}
"""Module class of each `attention_form` but `source`."""

__all__ = ["ATTENTION_FORMS", "DecoupledLatentAttention", "FullRopeLatentAttention", "LatentAttention"]
