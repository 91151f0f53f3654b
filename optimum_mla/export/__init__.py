"""Converted models in the forms of other software, which run without this package."""
