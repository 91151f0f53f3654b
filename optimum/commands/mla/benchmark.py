"""`optimum-cli mla-benchmark`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum.commands.mla.common import (
    OUTPUT_HELP,
    TEXT_HELP,
    add_evaluation_text,
    add_run_arguments,
    describe,
    hub_options,
)

COMPARISON = "mla_comparison"
"""Folder that a comparison is written to if the user names none."""


class MLABenchmarkCommand(BaseOptimumCLICommand):
    """Parses the arguments of `mla-benchmark`; `optimum_mla.pipeline.benchmark` and `compare` do the work."""

    COMMAND = CommandInfo(
        name="mla-benchmark", help="Measure the memory, speed and quality of a model beside those of its source model."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the arguments of the command to a parser."""
        describe(
            parser,
            "Measure the memory, speed and quality of a model, each in a process of its\n"
            "own, beside a baseline, and write report.json, report.md and report.html.",
            "optimum-cli mla-benchmark -m CONVERTED --cache default,hqq-int4 \\\n      --eval-data text.txt OUTPUT",
            "optimum-cli mla-benchmark --compare OUTPUT_1 OUTPUT_2",
        )
        parser.add_argument("-m", "--model", help="Hub id or folder of the model. Needed unless --compare is given.")
        parser.add_argument(
            "output",
            nargs="?",
            metavar="OUTPUT",
            help=f"{OUTPUT_HELP} Needed unless --compare is given, where it defaults to {COMPARISON}.",
        )
        parser.add_argument(
            "--baseline",
            metavar="MODEL",
            help="Hub id or folder of the model to compare with, or none. Default: the folder that the model was "
            "converted from, if it is still there.",
        )
        parser.add_argument(
            "--baselines",
            metavar="NAMES",
            help="What to compare with, separated by commas: source (the baseline, always measured), and the baseline "
            "with a quantized cache of Transformers: source-hqq-int8, -int4, -int2, source-quanto-int4, -int2, "
            "source-kivi-int4, -int2 (keys in groups over tokens). -first4 after a name keeps the first 4 tokens. "
            "Default: source, and source-hqq-int4 if hqq is installed.",
        )
        parser.add_argument(
            "--baseline-revision",
            metavar="REVISION",
            help="Branch, tag or commit of the baseline on the hub. Default: the main branch.",
        )
        parser.add_argument(
            "--compare",
            nargs="+",
            metavar="FOLDER",
            help="Merge the reports in two or more folders into one page instead of measuring.",
        )
        parser.add_argument(
            "--parts",
            nargs="+",
            metavar="PART",
            help="What to measure: memory, speed, quality. Default: all of them, but quality only with --eval-data.",
        )
        parser.add_argument(
            "--format",
            nargs="+",
            metavar="FORMAT",
            help="Pages to write beside report.json: md, html. Default: both.",
        )

        add_memory_and_speed(parser)
        add_quality(parser)
        add_run_arguments(parser, "a report")

    def run(self) -> None:
        """Measure or compare, and print the summary. Bad input prints one line and exits with code 2."""
        from optimum_mla.cli import exit_on_bad_input

        with exit_on_bad_input("OUTPUT holds what was measured before, if anything"):
            from optimum_mla.core.errors import OptionError
            from optimum_mla.measure.sizes import parse_bytes
            from optimum_mla.pipeline import BenchmarkOptions, benchmark, compare
            from optimum_mla.pipeline.benchmarking.options import PARTS
            from optimum_mla.report.pages import FORMATS, terminal

            args = self.args
            give_back(args, "parts", PARTS)
            give_back(args, "format", FORMATS)
            formats = tuple(args.format or FORMATS)
            if args.compare is not None:
                output = args.output or COMPARISON
                compare(args.compare, output, formats, args.overwrite)
                print(f"Saved to {output}")
                return
            for field in ("context_lengths", "batch_sizes"):
                setattr(args, field, integers(args, field))
            for field, name in (("model", "--model"), ("output", "OUTPUT")):
                if getattr(args, field) is None:
                    raise OptionError(f"{name} is missing. It is needed unless --compare is given.")
            named = {
                "context_lengths": args.context_lengths,
                "batch_sizes": args.batch_sizes,
                "parts": args.parts and tuple(args.parts),
                "tasks": args.tasks and listed(args.tasks),
                "baselines": args.baselines and listed(args.baselines),
            }
            options = BenchmarkOptions(
                **{name: value for name, value in named.items() if value is not None},
                caches=listed(args.cache),
                new_tokens=args.new_tokens,
                repeats=args.repeats,
                eval_data=args.eval_data,
                eval_samples=args.eval_samples,
                eval_length=args.eval_length,
                stride=args.stride,
                tasks_path=args.tasks_path,
                tasks_limit=args.tasks_limit,
                memory_budget=None if args.memory_budget is None else parse_bytes(args.memory_budget),
            )
            report = benchmark(
                args.model,
                args.output,
                baseline=args.baseline,
                options=options,
                formats=formats,
                dtype=args.dtype,
                device=args.device,
                overwrite=args.overwrite,
                hub=hub_options(args),
                baseline_revision=args.baseline_revision,
            )
            print(terminal([(args.model, report)]))
            print(f"\nSaved to {args.output}")


def listed(text: str) -> tuple[str, ...]:
    """Return the words between the commas of a text, each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",")))


def give_back(args: Namespace, field: str, known: tuple[str, ...]) -> None:
    """Set the output to the last word of an option that takes several words, if that word is none of its own.

    The parser cannot tell where such an option ends, so it also takes an OUTPUT that stands after it.

    Args:
        args: The parsed arguments; changed in place.
        field: The option.
        known: The words that the option may have.
    """
    words = getattr(args, field) or []
    if args.compare is None and args.output is None and len(words) > 1 and words[-1] not in known:
        args.output = words.pop()


def integers(args: Namespace, field: str) -> tuple[int, ...] | None:
    """Return the numbers of an option that takes several, and set the output to the word after them, if there is one.

    Raises:
        InvalidValueError: A word is not an integer.
    """
    words = list(getattr(args, field) or [])
    if args.output is None and words and not words[-1].lstrip("-").isdigit():
        args.output = words.pop()
    from optimum_mla.core.errors import InvalidValueError

    try:
        return tuple(int(word) for word in words) or None
    except ValueError as error:
        raise InvalidValueError(field, words, "integers from 1, separated by spaces") from error


def add_memory_and_speed(parser: ArgumentParser) -> None:
    """Add the arguments about the caches, the prompts and the steps that are measured."""
    load = parser.add_argument_group("memory and speed")
    load.add_argument(
        "--context-lengths", nargs="+", metavar="N", help="Prompt lengths in tokens. Default: 1024 4096 8192 32768."
    )
    load.add_argument("--batch-sizes", nargs="+", metavar="N", help="Prompts per batch. Default: 1 8.")
    load.add_argument(
        "--cache",
        default="default",
        metavar="NAMES",
        help="Caches of the model to measure, separated by commas: default (as the model is saved), 16bit "
        "(unquantized), or BACKEND-intBITS such as hqq-int4 or quanto-int8. Default: default.",
    )
    load.add_argument(
        "--new-tokens",
        type=int,
        default=32,
        metavar="N",
        help="Decoding steps to time after each prefill. Default: 32.",
    )
    load.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="How often each prefill is timed. Default: 5."
    )
    load.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="Memory to compute the longest context and the largest batch for, such as 24GB. Default: the memory "
        "of this machine.",
    )


def add_quality(parser: ArgumentParser) -> None:
    """Add the arguments about the texts and the tasks that are scored."""
    about = f"Text to measure the quality on: {TEXT_HELP}. Default: none."
    evaluation = add_evaluation_text(parser, about, 128, title="quality")
    evaluation.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="Tokens at the end of each window that are scored. Default: half of the window.",
    )
    evaluation.add_argument(
        "--tasks", metavar="NAMES", help="Tasks of lm_eval to run, separated by commas. Default: none."
    )
    evaluation.add_argument("--tasks-path", metavar="FOLDER", help="Folder with further task files for lm_eval.")
    evaluation.add_argument(
        "--tasks-limit", type=int, metavar="N", help="Largest number of documents per task. Default: all."
    )
