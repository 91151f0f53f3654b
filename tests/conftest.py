"""Offline and quiet, with a fixed seed for every test."""

from __future__ import annotations

import os
import shutil
import tempfile

# What commands keep for later runs goes into a folder of this run, not into the user's home.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings
from transformers.utils import logging

# The models are tiny: a second thread costs more than it brings, and many times more on busy cores.
torch.set_num_threads(1)
logging.disable_progress_bar()
logging.set_verbosity_error()
# Times vary too much on shared machines for a deadline to mean anything.
settings.register_profile("project", deadline=None, max_examples=30)
settings.load_profile("project")


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
