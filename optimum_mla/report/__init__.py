"""Measurements: quality, memory."""
