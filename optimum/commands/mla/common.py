"""Arguments that several commands have."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _ArgumentGroup
from typing import Any


def add_run_arguments(parser: ArgumentParser) -> _ArgumentGroup:
    """Dtype, device, what may be overwritten, and where models come from."""
    run = parser.add_argument_group("run")
    run.add_argument("--dtype", default="auto", help="auto (default, as saved), float32, bfloat16, float16.")
    run.add_argument("--device", help="Torch device; default: cuda where there is one, else cpu.")
    run.add_argument("--overwrite", action="store_true", help="Replace OUTPUT if it holds a model.")
    run.add_argument("--revision", help="Branch, tag or commit on the hub.")
    run.add_argument("--cache-dir", help="Where downloads are kept.")
    run.add_argument("--token", help="Hub token.")
    run.add_argument("--trust-remote-code", action="store_true", help="Run code that the model's repository brings.")
    return run


def hub_options(args: Namespace) -> dict[str, Any]:
    """How to load from the hub."""
    return {name: getattr(args, name) for name in ("revision", "cache_dir", "token", "trust_remote_code")}
