"""Measurements of memory, speed and quality, and the reports that show them."""
