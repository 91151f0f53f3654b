"""The text that comes with the package."""

from __future__ import annotations

from pathlib import Path

BUILT_IN_TEXT = Path(__file__).parent / "general.jsonl.xz"
"""A file of passages, each with its source: books, thirty languages, program code, and questions with answers.

All of it is in the public domain or was written for this project. `benchmarks/calibration_text.py` made it.
"""
