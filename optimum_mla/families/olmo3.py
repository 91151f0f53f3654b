"""OLMo 3: OLMo 2 with sliding windows in some layers."""

from dataclasses import replace

from optimum_mla.families.olmo2 import SPEC as OLMO2

SPEC = replace(OLMO2, model_type="olmo3", class_prefix="Olmo3")
