"""`optimum-cli mla-quantize`."""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum.commands.mla.common import add_run_arguments, hub_options


class MLAQuantizeCommand(BaseOptimumCLICommand):
    """Arguments only; the work is `optimum_mla.pipeline.quantize`."""

    COMMAND = CommandInfo(
        name="mla-quantize", help="Store a converted model's latent cache, and its weights if asked for, in few bits."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        parser.description = (
            "Store the latent cache of a converted model in few bits; its generate then uses that cache by itself.\n"
            "Example: optimum-cli mla-quantize -m CONVERTED --cache-bits 4 --eval-data text.txt OUT"
        )
        parser.add_argument("-m", "--model", required=True, help="Hub id or folder of a model from mla-convert.")
        parser.add_argument("output", help="Folder to write; it appears only when whole.")

        cache = parser.add_argument_group("cache")
        cache.add_argument(
            "--cache-bits",
            type=int,
            default=4,
            help="Bits of a latent's number: 8, 4 (default), 2; hqq also 3; 16: off.",
        )
        cache.add_argument("--cache-backend", default="hqq", help="hqq (default), quanto, or a registered one.")
        cache.add_argument(
            "--group-size", type=int, default=64, help="Numbers of a latent that share a scale, at most (default 64)."
        )
        cache.add_argument(
            "--residual-length", type=int, default=128, help="Newest tokens that stay unquantized (default 128)."
        )
        cache.add_argument(
            "--rope-bits", type=int, default=16, help="Bits of a rotary key beside the latent: 16 (default) or 8."
        )
        parser.add_argument(
            "--weights",
            default="none",
            help="Weights of the linear layers: none (default), bnb-nf4, bnb-int8, hqq-int4, hqq-int8, quanto-int4, "
            "quanto-int8.",
        )

        text = parser.add_argument_group("text")
        text.add_argument(
            "--eval-data",
            help="Text for the perplexity before and after, token by token through the cache: file, folder of .txt "
            "files, or dataset NAME[:CONFIG[:SPLIT]].",
        )
        text.add_argument("--eval-samples", type=int, default=32, help="Windows of it to use (default 32).")
        text.add_argument("--eval-length", type=int, help="Tokens per window (default: up to 512).")
        add_run_arguments(parser)

    def run(self) -> None:
        """Quantize, print the table; bad input prints one line and exits with 2."""
        from optimum_mla.cli import exit_on_bad_input

        with exit_on_bad_input():
            from optimum_mla.cache import CacheSettings
            from optimum_mla.pipeline import TextOptions, quantize
            from optimum_mla.report.render import quantization_table

            args = self.args
            report = quantize(
                args.model,
                args.output,
                cache=CacheSettings(
                    args.cache_bits, args.cache_backend, args.group_size, args.residual_length, args.rope_bits
                ),
                weights=args.weights,
                texts=TextOptions(
                    eval_data=args.eval_data, eval_samples=args.eval_samples, eval_length=args.eval_length
                ),
                dtype=args.dtype,
                device=args.device,
                overwrite=args.overwrite,
                hub=hub_options(args),
            )
            print(quantization_table(report))
            print(f"\nSaved to {args.output}")
