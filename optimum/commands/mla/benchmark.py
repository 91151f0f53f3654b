"""`optimum-cli mla-benchmark`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum.commands.mla.common import add_run_arguments, hub_options

COMPARISON = "mla_comparison"
"""Where a comparison goes if no output is named."""


class MLABenchmarkCommand(BaseOptimumCLICommand):
    """Arguments only; the work is `optimum_mla.pipeline.benchmark` and `compare`."""

    COMMAND = CommandInfo(
        name="mla-benchmark", help="Measure a model's cache, speed and quality beside the model it was made from."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        parser.description = (
            "Measure memory, speed and quality, each in a process of its own, and write report.json, .md and .html.\n"
            "Example: optimum-cli mla-benchmark -m CONVERTED --cache default,hqq-int4 --eval-data text.txt OUT\n"
            "Compare: optimum-cli mla-benchmark --compare OUT OUT_2"
        )
        parser.add_argument("-m", "--model", help="Hub id or folder; needed unless --compare.")
        parser.add_argument(
            "output", nargs="?", help=f"Folder to write; it appears only when whole. With --compare: {COMPARISON}."
        )
        parser.add_argument(
            "--baseline",
            help="Model to compare with; default: the conversion's source, if it is a folder; none: nothing.",
        )
        parser.add_argument(
            "--compare", nargs="+", metavar="DIR", help="Merge the reports of several runs into one page."
        )
        parser.add_argument(
            "--parts",
            nargs="+",
            help="What to measure: memory, speed, quality (default: all; quality needs --eval-data).",
        )

        load = parser.add_argument_group("memory and speed")
        load.add_argument("--context-lengths", nargs="+", help="Prompt tokens (default 1024 4096 8192 32768).")
        load.add_argument("--batch-sizes", nargs="+", help="Rows (default 1 8).")
        load.add_argument(
            "--cache",
            default="default",
            help="Caches of the model, with commas: default, 16bit, BACKEND-intBITS such as hqq-int4 or quanto-int8.",
        )
        load.add_argument("--new-tokens", type=int, default=32, help="Steps after each timed prefill (default 32).")
        load.add_argument("--repeats", type=int, default=5, help="Timed prefills (default 5).")
        load.add_argument("--memory-budget", help="What to fill, such as 24GB; default: this machine's memory.")

        text = parser.add_argument_group("quality")
        text.add_argument("--eval-data", help="Text: file, folder of .txt files, or dataset NAME[:CONFIG[:SPLIT]].")
        text.add_argument("--eval-samples", type=int, default=128, help="Windows of it, at most (default 128).")
        text.add_argument("--eval-length", type=int, help="Tokens per window (default: up to 512).")
        text.add_argument("--stride", type=int, help="Tokens at a window's end that are scored (default: half of it).")
        text.add_argument("--tasks", help="lm_eval tasks, with commas.")
        text.add_argument("--tasks-path", help="Folder with further task files.")
        text.add_argument("--tasks-limit", type=int, help="Documents of each task, at most.")

        parser.add_argument(
            "--format", nargs="+", help="Pages to write beside report.json: json, md, html (default: all)."
        )
        add_run_arguments(parser)

    def run(self) -> None:
        """Measure or compare, print the summary; bad input prints one line and exits with 2."""
        from optimum_mla.cli import exit_on_bad_input

        with exit_on_bad_input("what was measured by then, if anything, is in OUTPUT"):
            from optimum_mla.errors import InvalidValueError
            from optimum_mla.pipeline import BenchmarkOptions, benchmark, compare
            from optimum_mla.pipeline.benchmark_run import PARTS
            from optimum_mla.report.pages import FORMATS, terminal
            from optimum_mla.report.sizes import parse_bytes

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
            for field in ("model", "output"):
                if getattr(args, field) is None:
                    raise InvalidValueError(field, None, "a value, unless --compare")
            named = {
                "context_lengths": args.context_lengths,
                "batch_sizes": args.batch_sizes,
                "parts": args.parts and tuple(args.parts),
                "tasks": args.tasks and listed(args.tasks),
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
            )
            print(terminal([(args.model, report)]))
            print(f"\nSaved to {args.output}")


def listed(text: str) -> tuple[str, ...]:
    """The words between the commas, each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",")))


def give_back(args: Namespace, field: str, known: tuple[str, ...]) -> None:
    """Take the output from the end of an option that takes several words, which the parser gave it to."""
    words = getattr(args, field) or []
    if args.compare is None and args.output is None and len(words) > 1 and words[-1] not in known:
        args.output = words.pop()


def integers(args: Namespace, field: str) -> tuple[int, ...] | None:
    """The numbers of an option that takes several; a word behind them is the output, which the parser gave to them."""
    words = list(getattr(args, field) or [])
    if args.output is None and words and not words[-1].lstrip("-").isdigit():
        args.output = words.pop()
    from optimum_mla.errors import InvalidValueError

    try:
        return tuple(int(word) for word in words) or None
    except ValueError as error:
        raise InvalidValueError(field, words, "integers from 1") from error
