"""Adds the commands of optimum-mla to `optimum-cli`, which imports this at every start, so it must stay light."""

from optimum.commands.base import BaseOptimumCLICommand

from optimum.commands.mla.benchmark import MLABenchmarkCommand
from optimum.commands.mla.calibrate import MLACalibrateCommand
from optimum.commands.mla.convert import MLAConvertCommand
from optimum.commands.mla.export import MLAExportCommand
from optimum.commands.mla.finetune import MLAFinetuneCommand
from optimum.commands.mla.inspect import MLAInspectCommand
from optimum.commands.mla.quantize import MLAQuantizeCommand
from optimum.commands.mla.run import MLARunCommand

REGISTER_COMMANDS: list[type[BaseOptimumCLICommand]] = [
    MLAConvertCommand,
    MLAFinetuneCommand,
    MLAQuantizeCommand,
    MLABenchmarkCommand,
    MLAInspectCommand,
    MLACalibrateCommand,
    MLAExportCommand,
    MLARunCommand,
]
