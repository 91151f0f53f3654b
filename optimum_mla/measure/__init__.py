"""Measurements of a model: what it does, beside what it must do."""

from optimum_mla.measure.verify import Verification, reference_logits, tolerance_of, verify

__all__ = ["Verification", "reference_logits", "tolerance_of", "verify"]
