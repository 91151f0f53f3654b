"""Conversions as Optimum transformations, with one file per method."""
