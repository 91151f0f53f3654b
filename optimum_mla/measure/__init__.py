"""Measurements of memory, speed and quality, and the checks that a model passes before it is written."""

from optimum_mla.measure.verify import Verification, reference_logits, tolerance_of, verify

__all__ = ["Verification", "reference_logits", "tolerance_of", "verify"]
