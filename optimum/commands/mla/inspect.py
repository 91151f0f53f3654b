"""`optimum-cli mla-inspect`."""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum.commands.mla.common import add_hub_arguments, describe, hub_options


class MLAInspectCommand(BaseOptimumCLICommand):
    """Parses the arguments of `mla-inspect`; `optimum_mla.pipeline.inspect` does the work."""

    COMMAND = CommandInfo(
        name="mla-inspect", help="Say what a conversion of a model would give, without loading its weights."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the arguments of the command to a parser."""
        describe(
            parser,
            "Say whether a model can be converted, how large its cache would be with each\n"
            "method, and which engines could run the result. Only the config and the\n"
            "headers of the weights are read.",
            "optimum-cli mla-inspect -m MODEL",
            "optimum-cli mla-inspect -m MODEL --kv-cache-ratios 0.5 0.1 --json",
        )
        parser.add_argument("-m", "--model", dest="named_model", metavar="MODEL", help="Hub id or folder of the model.")
        parser.add_argument("model", nargs="?", metavar="MODEL", help="The same without -m.")
        parser.add_argument(
            "--kv-cache-ratios",
            type=float,
            nargs="+",
            metavar="SHARE",
            help="Cache sizes to show, as shares of the present cache. Default: 0.5 0.25 0.125.",
        )
        parser.add_argument("--json", action="store_true", help="Print JSON instead of text.")
        add_hub_arguments(parser)

    def run(self) -> None:
        """Print what is known about the model. Bad input prints one line and exits with code 2."""
        from optimum_mla.cli import exit_on_bad_input

        with exit_on_bad_input():
            import json
            from dataclasses import asdict

            from optimum_mla.core.errors import OptionError
            from optimum_mla.pipeline.inspecting import RATIOS, inspect
            from optimum_mla.report.inspection import inspection_text

            names = [name for name in (self.args.named_model, self.args.model) if name is not None]
            if len(names) != 1:
                raise OptionError("one MODEL is needed. Name it with -m.")
            found = inspect(names[0], tuple(self.args.kv_cache_ratios or RATIOS), hub_options(self.args))
            print(json.dumps(asdict(found), indent=2) if self.args.json else inspection_text(found))
