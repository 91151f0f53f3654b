"""`optimum-cli mla-export`."""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum.commands.mla.common import (
    LENGTH_HELP,
    OUTPUT_HELP,
    TEXT_HELP,
    add_run_arguments,
    describe,
    hub_options,
)


class MLAExportCommand(BaseOptimumCLICommand):
    """Parses the arguments of `mla-export`; `optimum_mla.pipeline.export` does the work."""

    COMMAND = CommandInfo(
        name="mla-export",
        help="Write a converted model as a plain deepseek_v3 model or a GGUF file, which need no optimum-mla.",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the arguments of the command to a parser."""
        describe(
            parser,
            "Write a converted model in a format that Transformers or llama.cpp loads\n"
            "without optimum-mla. The model must have been converted to a form that the\n"
            "format can hold, for example by mla-convert --method x-ecomla --shared-rope.\n"
            "With --export-format, mla-convert does both in one step.",
            "optimum-cli mla-export -m CONVERTED OUTPUT",
        )
        parser.add_argument("-m", "--model", required=True, help="Hub id or folder of a model from mla-convert.")
        parser.add_argument("output", metavar="OUTPUT", help=OUTPUT_HELP)
        parser.add_argument(
            "--format",
            default="deepseek_v3",
            help="Format to write: deepseek_v3, or gguf, a file for llama.cpp. Default: deepseek_v3.",
        )
        parser.add_argument(
            "--gguf-type",
            metavar="TYPE",
            help="gguf: type of the matrices in the file, f32, f16, bf16 or q8_0. Default: that of the model's dtype.",
        )
        parser.add_argument(
            "--pad",
            action="store_true",
            help="Pad the latents of layers with a lower rank with zeros, so that all layers have one size.",
        )
        parser.add_argument(
            "--pad-to",
            metavar="RANK+DIMS",
            help="Pad the latent and the rotary key of every layer with zeros to these sizes, such as 512+64 or "
            "256+64, for engines whose kernels take no others. The model computes the same, but its cache grows.",
        )
        norm = parser.add_argument_group("norm on the latent")
        norm.add_argument(
            "--latent-norm",
            action="store_true",
            help="Give a model that was converted without --latent-norm a norm on its latents and no biases after "
            "them, for engines that load no biases. It is fitted to --recover-data layer by layer.",
        )
        norm.add_argument("--recover-data", metavar="TEXT", help=f"Text to fit the norms to: {TEXT_HELP}.")
        norm.add_argument(
            "--recover-samples", type=int, default=128, metavar="N", help="Windows of text to use. Default: 128."
        )
        norm.add_argument("--recover-length", type=int, metavar="N", help=LENGTH_HELP)
        add_run_arguments(parser)

    def run(self) -> None:
        """Export the model and print the table. Bad input prints one line and exits with code 2."""
        from optimum_mla.cli import exit_on_bad_input

        with exit_on_bad_input():
            from optimum_mla.pipeline import export
            from optimum_mla.report.render import export_table

            args = self.args
            report = export(
                args.model,
                args.output,
                format=args.format,
                gguf_type=args.gguf_type,
                pad=args.pad,
                pad_to=args.pad_to,
                dtype=args.dtype,
                device=args.device,
                overwrite=args.overwrite,
                hub=hub_options(args),
                latent_norm=args.latent_norm,
                recover_data=args.recover_data,
                recover_samples=args.recover_samples,
                recover_length=args.recover_length,
            )
            print(export_table(report))
            print(f"\nSaved to {args.output}")
