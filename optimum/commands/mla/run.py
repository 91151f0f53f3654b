"""`optimum-cli mla-run`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any, NoReturn

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum.commands.mla.benchmark import MLABenchmarkCommand
from optimum.commands.mla.common import describe
from optimum.commands.mla.convert import MLAConvertCommand
from optimum.commands.mla.export import MLAExportCommand
from optimum.commands.mla.finetune import MLAFinetuneCommand
from optimum.commands.mla.method_options import add_installed_options
from optimum.commands.mla.quantize import MLAQuantizeCommand

STEPS: dict[str, type[BaseOptimumCLICommand]] = {
    command.COMMAND.name: command
    for command in (
        MLAConvertCommand,
        MLAFinetuneCommand,
        MLAQuantizeCommand,
        MLAExportCommand,
        MLABenchmarkCommand,
    )
}


class StepParser(ArgumentParser):
    """The parser of one step, which raises an error where a parser of the command line ends the process."""

    def error(self, message: str) -> NoReturn:
        """Raise the error that the arguments cause.

        Raises:
            OptionError: Always.
        """
        from optimum_mla.core.errors import OptionError

        raise OptionError(f"{self.prog}: {message}")


def words(step: Any, parser: ArgumentParser) -> list[str]:
    """Return the arguments of a step, as they would be typed.

    Args:
        step: The `Step` of a recipe.
        parser: The parser of its command. It tells what `false` stands for: `--no-NAME` where there is one; otherwise a
            switch, or an option that may stand without a value, is left out.
    """
    known = parser._option_string_actions
    typed = ["-m", step.model, str(step.output), "--overwrite"]
    for name, value in step.options.items():
        flag, off = f"--{name}", f"--no-{name}"
        if value is False and off in known:
            typed.append(off)
        elif value is False and flag in known and known[flag].nargs in (0, "?"):
            continue
        elif isinstance(value, bool):
            typed.append(flag)
        else:
            values = value if isinstance(value, list) else [value]
            typed += [flag, *map(str, values)]
    return typed


def parsed(step: Any, number: int) -> Namespace:
    """Return the arguments of a step.

    Args:
        step: The `Step` of a recipe.
        number: Its number, for messages.

    Raises:
        OptionError: The command does not have an option of the step, or the option not that value.
    """
    parser = StepParser(prog=f"recipe: step {number} ({step.command})", allow_abbrev=False)
    STEPS[step.command].parse_args(parser)
    if STEPS[step.command] is MLAConvertCommand:  # Before `words`, which asks the parser what `false` stands for.
        add_installed_options(parser, words(step, parser))
    return parser.parse_args(words(step, parser))


class MLARunCommand(BaseOptimumCLICommand):
    """Runs the steps of a recipe; `optimum_mla.pipeline.recipes` reads them and remembers which are done."""

    COMMAND = CommandInfo(
        name="mla-run", help="Run a YAML recipe: convert, finetune, quantize, benchmark. Resumes by step."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the arguments of the command to a parser."""
        describe(
            parser,
            "Run the steps of a YAML recipe, one command after the other, each on the\n"
            "result of the one before. Run again, it goes on with the first step that is\n"
            "not done, or whose options, model or texts have changed. A conversion or a\n"
            "training that was interrupted goes on where it was. A recipe:\n\n"
            "  output: FOLDER\n"
            "  steps:\n"
            "    - mla-convert: {model: MODEL, kv-cache-ratio: 0.25}\n"
            "    - mla-finetune: {train-data: TEXT, merge: true}\n"
            "    - mla-quantize: {cache-bits: 4}\n"
            "    - mla-benchmark: {eval-data: TEXT}\n\n"
            "Every option of a command may stand in its step, without the dashes in front.",
            "optimum-cli mla-run recipe.yaml",
        )
        parser.add_argument("recipe", metavar="RECIPE", help="The YAML file.")
        parser.add_argument("output", nargs="?", metavar="OUTPUT", help="Folder of the run. Default: the recipe's.")
        parser.add_argument(
            "--overwrite",
            action="store_true",
            help="Begin a step that was interrupted anew, and replace results of which the folder of the run has no "
            "record.",
        )

    def run(self) -> None:
        """Run the recipe. Bad input prints one line and exits with code 2."""
        from optimum_mla.cli import INTERRUPTED, exit_on_bad_input

        with exit_on_bad_input("the steps that were done are kept; run the recipe again to go on"):
            from pathlib import Path

            from optimum_mla.io.claim import hold_claim
            from optimum_mla.io.folder import resolve_output
            from optimum_mla.pipeline.recipes import RunRecord, read_recipe

            folder, steps = read_recipe(Path(self.args.recipe), self.args.output)
            arguments = [parsed(step, number) for number, step in enumerate(steps, 1)]
            with hold_claim(resolve_output(folder)):
                record = RunRecord(folder, self.args.overwrite)
                for number, (step, args) in enumerate(zip(steps, arguments, strict=True), 1):
                    title = f"step {number} of {len(steps)}: {step.command}"
                    start = record.begin(step)
                    if start is None:
                        print(f"{title}: done before, {step.output} is kept")
                        continue
                    print(f"{title} -> {step.output}{start.remark}", flush=True)
                    args.resume = start.resume
                    try:
                        STEPS[step.command](None, args, from_defaults_factory=True, parser=StepParser()).run()
                    except SystemExit as end:
                        if end.code == INTERRUPTED:
                            raise KeyboardInterrupt from None
                        raise
                    record.end(step)
                    print()
            print(f"Done: {folder}")
