"""Calibration: windows of text, the walk that takes them through the layers, and what is measured on it."""

from optimum_mla.calibrate.built_in import BUILT_IN_TEXT, built_in_windows
from optimum_mla.calibrate.recall import with_repeats
from optimum_mla.calibrate.text import token_windows

__all__ = ["BUILT_IN_TEXT", "built_in_windows", "token_windows", "with_repeats"]
