"""`optimum-cli mla-calibrate`."""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum.commands.mla.common import OUTPUT_HELP, add_calibration_text, add_run_arguments, describe, hub_options


class MLACalibrateCommand(BaseOptimumCLICommand):
    """Parses the arguments of `mla-calibrate`; `optimum_mla.pipeline.calibrate` does the work."""

    COMMAND = CommandInfo(
        name="mla-calibrate", help="Gather the statistics of a model on a text once, for any number of conversions."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the arguments of the command to a parser."""
        describe(
            parser,
            "Run a text through a model once and keep what conversions need to know.\n"
            "mla-convert --statistics OUTPUT then converts the model by any method and to\n"
            "any size in the time that the factorizations take. Conversions that are\n"
            "calibrated on the text itself take longer and lose less.",
            "optimum-cli mla-calibrate -m Qwen/Qwen3-0.6B STATISTICS",
            "optimum-cli mla-convert -m Qwen/Qwen3-0.6B --statistics STATISTICS \\\n      --kv-cache-ratio 0.25 OUTPUT",
        )
        parser.add_argument("-m", "--model", required=True, help="Hub id or folder of the model.")
        parser.add_argument("output", metavar="OUTPUT", help=OUTPUT_HELP)
        parser.add_argument(
            "--refit",
            metavar="CODEC",
            help="Fit the codec in this folder again to the weights of the model, for example after training, to the "
            "same bytes, and write it to OUTPUT if it moves the predictions less than the old one, which is written "
            "otherwise. Default: statistics are gathered.",
        )
        add_calibration_text(parser.add_argument_group("text"))
        add_run_arguments(parser, "statistics")

    def run(self) -> None:
        """Gather the statistics and print where they are. Bad input prints one line and exits with code 2."""
        from optimum_mla.cli import exit_on_bad_input

        with exit_on_bad_input():
            from optimum_mla.pipeline import TextOptions, calibrate, refit

            args = self.args
            texts = TextOptions(
                calibration_data=args.calibration_data,
                chat_template=args.chat_template,
                calibration_samples=args.calibration_samples,
                calibration_length=args.calibration_length,
                calibration_repeats=args.calibration_repeats,
            )
            common = {"dtype": args.dtype, "device": args.device, "overwrite": args.overwrite, "hub": hub_options(args)}
            if args.refit is not None:
                found = refit(args.model, args.refit, args.output, texts, **common)
                which = "The refitted codec was kept" if found.refitted else "The codec was kept as it was"
                print(
                    f"Predictions move by {found.divergence_before:.2g} nats with the codec as it was, and by "
                    f"{found.divergence_after:.2g} with the one that was fitted again in {found.seconds:.0f} seconds."
                )
                print(f"{which}. Saved to {args.output}")
                print(f"Next: load it in Python by optimum_mla.load_codec(model, {args.output!r}).")
                return
            statistics, seconds = calibrate(args.model, args.output, texts=texts, **common)
            data = statistics.data
            print(
                f"Statistics of {len(statistics)} layers on {data['windows']} windows of {data['tokens_per_window']} "
                f"tokens, in {seconds:.0f} seconds"
            )
            print(f"Saved to {args.output}")
            print(
                f"Next: optimum-cli mla-convert -m {args.model} --statistics {args.output} --kv-cache-ratio 0.25 RESULT"
            )
