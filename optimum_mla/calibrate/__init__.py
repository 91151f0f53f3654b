"""The text on which conversions are calibrated when the user gives none."""

from optimum_mla.calibrate.built_in import BUILT_IN_TEXT, built_in_windows

__all__ = ["BUILT_IN_TEXT", "built_in_windows"]
