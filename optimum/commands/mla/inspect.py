"""`optimum-cli mla-inspect`."""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum.commands.mla.common import hub_options


class MLAInspectCommand(BaseOptimumCLICommand):
    """Arguments only; the work is `optimum_mla.pipeline.inspect`."""

    COMMAND = CommandInfo(
        name="mla-inspect", help="What a conversion of a model would give, without loading its weights."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        parser.description = (
            "Say from config and headers alone if a model converts, what cache each method gives, and who runs it.\n"
            "Example: optimum-cli mla-inspect MODEL"
        )
        parser.add_argument("model", help="Hub id or folder.")
        parser.add_argument(
            "--kv-cache-ratios", type=float, nargs="+", help="Cache sizes to show (default 0.5 0.25 0.125)."
        )
        parser.add_argument("--json", action="store_true", help="Print JSON instead of text.")
        parser.add_argument("--revision", help="Branch, tag or commit on the hub.")
        parser.add_argument("--cache-dir", help="Where downloads are kept.")
        parser.add_argument("--token", help="Hub token.")
        parser.add_argument("--trust-remote-code", action="store_true", help="Run code that the repository brings.")

    def run(self) -> None:
        """Print what is known; bad input prints one line and exits with 2."""
        from optimum_mla.cli import exit_on_bad_input

        with exit_on_bad_input():
            import json

            from optimum_mla.pipeline.inspecting import RATIOS, inspect
            from optimum_mla.report.inspection import inspection_text

            found = inspect(self.args.model, tuple(self.args.kv_cache_ratios or RATIOS), hub_options(self.args))
            print(json.dumps(found.to_dict(), indent=2) if self.args.json else inspection_text(found))
