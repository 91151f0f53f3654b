"""Conversions as Optimum transformations: one method, one file."""
