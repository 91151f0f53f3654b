"""Arguments and wording that several commands share."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter, _ArgumentGroup
from typing import Any

OUTPUT_HELP = "Folder to write. It appears only when everything in it is complete."
TEXT_HELP = (
    "a UTF-8 text file, a file of rows with a text column (such as .jsonl, .csv or .parquet), a folder of such files, "
    "or a dataset as NAME[:CONFIG[:SPLIT]]"
)
"""The texts that every command reads; `optimum_mla.io.documents` reads them."""
LENGTH_HELP = "Tokens per window. Default: 512, or the model's longest context if that is shorter."


def describe(parser: ArgumentParser, text: str, *examples: str) -> None:
    """Set what the help of a command says above its arguments, and the examples that it shows below them."""
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.description = text
    parser.epilog = "\n".join(["examples:", *(f"  {example}" for example in examples)])


def add_run_arguments(parser: ArgumentParser, replaced: str = "a model") -> _ArgumentGroup:
    """Add the arguments about dtype, device and the output folder, and those about the hub; return the first group.

    Args:
        parser: The parser of the command.
        replaced: What an OUTPUT that exists must hold so that `--overwrite` replaces it.
    """
    run = parser.add_argument_group("run")
    run.add_argument(
        "--dtype",
        default="auto",
        help="Floating-point type to work and save in: auto (the checkpoint's own), float32, bfloat16 or float16. "
        "Default: auto.",
    )
    run.add_argument("--device", help="Torch device, such as cuda:1. Default: cuda if there is one, otherwise cpu.")
    run.add_argument("--overwrite", action="store_true", help=f"Replace OUTPUT if it exists and holds {replaced}.")
    add_hub_arguments(parser)
    return run


def add_calibration_text(group: _ArgumentGroup) -> None:
    """Add the arguments about the text to calibrate on."""
    group.add_argument(
        "--calibration-data",
        metavar="TEXT",
        help=f"Text to calibrate on: {TEXT_HELP}. Default: a text that comes with the package, of books, thirty "
        "languages, program code, and questions with answers.",
    )
    group.add_argument(
        "--calibration-samples", type=int, default=128, metavar="N", help="Windows of text to use. Default: 128."
    )
    group.add_argument("--calibration-length", type=int, metavar="N", help=LENGTH_HELP)
    group.add_argument(
        "--calibration-repeats",
        type=int,
        default=3,
        metavar="N",
        help="Let one window of N repeat itself, so that the heads that copy words of long ago count; 0 for none. "
        "Default: 3.",
    )
    group.add_argument(
        "--chat-template",
        action="store_true",
        help="Treat the calibration data as chats: rows with a messages column, which the chat template of the "
        "tokenizer renders.",
    )


def add_evaluation_text(parser: ArgumentParser, about: str, samples: int, title: str = "evaluation") -> _ArgumentGroup:
    """Add the arguments about the text on which the quality is measured, in a group of its own; return the group.

    Args:
        parser: The parser of the command.
        about: The help of `--eval-data`.
        samples: Default of `--eval-samples`.
        title: Title of the group.
    """
    group = parser.add_argument_group(title)
    group.add_argument("--eval-data", metavar="TEXT", help=about)
    group.add_argument(
        "--eval-samples",
        type=int,
        default=samples,
        metavar="N",
        help=f"Largest number of windows of text to use. Default: {samples}.",
    )
    group.add_argument("--eval-length", type=int, metavar="N", help=LENGTH_HELP)
    return group


def add_hub_arguments(parser: ArgumentParser) -> None:
    """Add the arguments about the Hugging Face Hub."""
    hub = parser.add_argument_group("hub")
    hub.add_argument("--revision", help="Branch, tag or commit of MODEL on the hub. Default: the main branch.")
    hub.add_argument("--cache-dir", metavar="FOLDER", help="Folder for downloads. Default: the hub's own cache.")
    hub.add_argument("--token", help="Access token for the hub. Default: the token of your login.")
    hub.add_argument("--trust-remote-code", action="store_true", help="Allow code from the model's repository to run.")


def hub_options(args: Namespace) -> dict[str, Any]:
    """Return the keyword arguments for loading from the hub."""
    return {name: getattr(args, name) for name in ("revision", "cache_dir", "token", "trust_remote_code")}
