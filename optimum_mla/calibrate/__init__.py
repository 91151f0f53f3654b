"""The text on which conversions are calibrated when the user gives none."""

from optimum_mla.calibrate.built_in import BUILT_IN_TEXT

__all__ = ["BUILT_IN_TEXT"]
