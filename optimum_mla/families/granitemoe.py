"""Granite with experts."""

from dataclasses import replace

from optimum_mla.families.granite import SPEC as GRANITE

SPEC = replace(GRANITE, model_type="granitemoe", class_prefix="GraniteMoe")
