"""`optimum-cli mla-export`."""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum.commands.mla.common import add_run_arguments, hub_options


class MLAExportCommand(BaseOptimumCLICommand):
    """Arguments only; the work is `optimum_mla.pipeline.export`."""

    COMMAND = CommandInfo(
        name="mla-export", help="Write a converted model as a plain deepseek_v3 one, which needs no plugin."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        parser.description = (
            "Write a converted model in a format that Transformers loads without optimum-mla.\n"
            "Example: optimum-cli mla-export -m CONVERTED --format deepseek_v3 OUT"
        )
        parser.add_argument("-m", "--model", required=True, help="Hub id or folder of a model from mla-convert.")
        parser.add_argument("output", help="Folder to write; it appears only when whole.")
        parser.add_argument("--format", default="deepseek_v3", help="deepseek_v3 (default).")
        parser.add_argument("--pad", action="store_true", help="Pad layers of lower rank with zeros.")
        add_run_arguments(parser)

    def run(self) -> None:
        """Export, print what came out; bad input prints one line and exits with 2."""
        from optimum_mla.cli import exit_on_bad_input

        with exit_on_bad_input():
            from optimum_mla.pipeline import export
            from optimum_mla.report.render import export_table

            args = self.args
            report = export(
                args.model,
                args.output,
                format=args.format,
                pad=args.pad,
                dtype=args.dtype,
                device=args.device,
                overwrite=args.overwrite,
                hub=hub_options(args),
            )
            print(export_table(report))
            print(f"\nSaved to {args.output}")
