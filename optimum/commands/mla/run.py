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
    return parser.parse_args(step.words())


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
            "result of the one before. A run that was interrupted, or whose recipe was\n"
            "changed, goes on with the first step that is not done. A recipe:\n\n"
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

    def run(self) -> None:
        """Run the recipe. Bad input prints one line and exits with code 2."""
        from optimum_mla.cli import exit_on_bad_input

        with exit_on_bad_input("the steps that were done are kept; run the recipe again to go on"):
            from pathlib import Path

            from optimum_mla.pipeline.recipes import Journal, pending, read_recipe

            folder, steps = read_recipe(Path(self.args.recipe), self.args.output)
            arguments = [parsed(step, number) for number, step in enumerate(steps, 1)]
            journal = Journal(folder)
            waiting = pending(journal, steps)
            for number, (step, args) in enumerate(zip(steps, arguments, strict=True), 1):
                title = f"step {number} of {len(steps)}: {step.command}"
                if step not in waiting:
                    print(f"{title}: done before, {step.output} is kept")
                    continue
                print(f"{title} -> {step.output}", flush=True)
                STEPS[step.command](None, args, from_defaults_factory=True, parser=StepParser()).run()
                journal.note(step)
                print()
            print(f"Done: {folder}")
