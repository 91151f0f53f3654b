"""`optimum-cli mla-convert`."""

from __future__ import annotations

from argparse import ArgumentParser, _ArgumentGroup
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum.commands.mla.common import (
    OUTPUT_HELP,
    add_calibration_text,
    add_evaluation_text,
    add_run_arguments,
    describe,
    hub_options,
)
from optimum.commands.mla.method_options import add_method_options, built_in_options, read_installed_options

SIZE = "size of the cache, at most one of these"
GROUPS = ("method", SIZE, "calibration", "position (rotary embedding)", "other parts of the attention")
"""Titles of the groups in which the options of the built-in methods stand, in the order of the help."""

EVALUATION_HELP = (
    "Text to measure the perplexity on before and after the conversion, in the same formats as --calibration-data. "
    "Default: some windows of the calibration text, which then calibrate nothing, or with --uncalibrated or "
    "--statistics the text that comes with the package."
)


class MLAConvertCommand(BaseOptimumCLICommand):
    """Parses the arguments of `mla-convert`; `optimum_mla.pipeline.convert` does the work."""

    COMMAND = CommandInfo(
        name="mla-convert",
        help="Convert the attention of an LLM to Multi-head Latent Attention, for a smaller KV cache.",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the arguments of the command to a parser."""
        describe(
            parser,
            "Convert the attention of a pretrained decoder LLM to Multi-head Latent\n"
            "Attention (MLA), so that generation caches one small latent per token instead\n"
            "of all keys and values.\n\n"
            "By default the weights stay as they are, old tokens are kept as codes in a\n"
            "quarter of their bytes, and a text that comes with the package calibrates the\n"
            "codes. Text like what the model will read is better: give it with\n"
            "--calibration-data.",
            "optimum-cli mla-convert -m Qwen/Qwen3-0.6B OUTPUT",
            "optimum-cli mla-convert -m Qwen/Qwen3-0.6B --cache-budget 0.125 \\\n"
            "      --calibration-data train.txt --eval-data test.txt OUTPUT",
            "optimum-cli mla-convert -m MODEL --export-format deepseek_v3 \\\n"
            "      --calibration-data train.txt OUTPUT",
        )
        parser.add_argument("-m", "--model", required=True, help="Hub id or folder of the model to convert.")
        parser.add_argument("output", metavar="OUTPUT", help=OUTPUT_HELP)
        groups: dict[str, Any] = {title: parser.add_argument_group(title) for title in GROUPS}
        groups[SIZE] = groups[SIZE].add_mutually_exclusive_group()
        add_method(groups["method"])
        add_calibration_text(groups["calibration"])
        add_calibration_sources(groups["calibration"])
        add_method_options(parser, built_in_options(), groups, "method")
        read_installed_options(parser)
        add_evaluation_text(parser, EVALUATION_HELP, 128)
        add_run(parser)

    def run(self) -> None:
        """Convert the model and print the summary. Bad input prints one line and exits with code 2."""
        from optimum_mla.cli import exit_on_bad_input

        with exit_on_bad_input("OUTPUT is as it was"):
            from optimum_mla.core.errors import InvalidValueError
            from optimum_mla.core.processes import joined_processes
            from optimum_mla.pipeline import TextOptions, assist, convert
            from optimum_mla.report.render import choices, codec_table, sample_lines, summary_table
            from optimum_mla.report.schema import CodecReport
            from optimum_mla.report.verdict import conversion_verdict, next_command

            args = self.args
            if args.latent_norm not in (None, "calibrated"):
                raise InvalidValueError("latent_norm", args.latent_norm, "calibrated")
            args.latent_norm = None if args.latent_norm is None else True
            texts = TextOptions(
                calibration_data=args.calibration_data,
                statistics=args.statistics,
                uncalibrated=args.uncalibrated,
                chat_template=args.chat_template,
                calibration_samples=args.calibration_samples,
                calibration_length=args.calibration_length,
                calibration_repeats=args.calibration_repeats,
                eval_data=args.eval_data,
                eval_samples=args.eval_samples,
                eval_length=args.eval_length,
            )
            options = {name: getattr(args, name) for name in args.method_options}
            names = ("method", "dtype", "device", "seed", "export_format", "try_family")
            common = {name: getattr(args, name) for name in names}
            common |= {"options": options, "texts": texts, "hub": hub_options(args)}
            with joined_processes() as processes:
                if not processes.leads:
                    assist(processes, args.model, **common)
                    return
                report = convert(
                    args.model,
                    args.output,
                    **common,
                    overwrite=args.overwrite,
                    resume=args.resume,
                    announce=lambda text: print(text, flush=True),
                    processes=processes,
                    codec_only=args.codec_only,
                )
            if isinstance(report, CodecReport):
                print(codec_table(report))
            else:
                print(summary_table([report]))
                print(choices(report))
                print(sample_lines(report))
            print(f"\n{conversion_verdict(report)}")
            print(f"Saved to {args.output}")
            command = next_command(report, args.output)
            print(f"Next: {command}" if command else "Next: load it as its README.md shows.")


def add_method(group: _ArgumentGroup) -> None:
    """Add the arguments that say which method converts, and what is written."""
    group.add_argument(
        "--method",
        default="gqa2mla",
        help="Conversion method: gqa2mla, mha2mla, x-ecomla, or the name of a registered one. Default: gqa2mla.",
    )
    group.add_argument(
        "--codec-only",
        action="store_true",
        help="With --cache-budget: write the codec alone, a few MB, without the weights. optimum_mla.load_codec "
        "gives it to any copy of the model. Default: off, and OUTPUT is a model that any tool loads.",
    )
    group.add_argument(
        "--export-format",
        metavar="FORMAT",
        help="Also export the result as mla-export does, so that Transformers loads it without optimum-mla: "
        "deepseek_v3, or as a gguf file for llama.cpp. Default: no export.",
    )


def add_calibration_sources(group: _ArgumentGroup) -> None:
    """Add the arguments that stand in place of a calibration text."""
    group.add_argument(
        "--statistics",
        metavar="FOLDER",
        help="Statistics from mla-calibrate, in place of a text. Nothing is run through the model then, so that "
        "only factorizations take time, and nothing is refitted.",
    )
    group.add_argument(
        "--uncalibrated",
        action="store_true",
        help="Convert without calibration, as the papers do. The result is of no use until it is trained. Default: "
        "off, but at full rank with --positional full, where nothing is lost, there is no calibration.",
    )


def add_run(parser: ArgumentParser) -> None:
    """Add the arguments about how the conversion runs."""
    run = add_run_arguments(parser)
    run.add_argument("--seed", type=int, default=0, metavar="N", help="Seed for random numbers. Default: 0.")
    run.add_argument(
        "--try-family",
        action="store_true",
        help="Convert a model of a type that is not known, if its attention is confirmed to be what the names of "
        "its parts suggest. Says what to register before the result is loaded.",
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="Go on with an interrupted conversion to OUTPUT. The other options must be those that it had.",
    )
