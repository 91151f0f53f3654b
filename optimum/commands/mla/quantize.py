"""`optimum-cli mla-quantize`."""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum.commands.mla.common import (
    OUTPUT_HELP,
    TEXT_HELP,
    add_evaluation_text,
    add_run_arguments,
    describe,
    hub_options,
)


class MLAQuantizeCommand(BaseOptimumCLICommand):
    """Parses the arguments of `mla-quantize`; `optimum_mla.pipeline.quantize` does the work."""

    COMMAND = CommandInfo(
        name="mla-quantize",
        help="Store the latent cache of a converted model, and optionally its weights, in few bits.",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the arguments of the command to a parser."""
        describe(
            parser,
            "Store the latent cache of a converted model in few bits. The settings are\n"
            "saved with the model, and its generate() then uses the quantized cache by\n"
            "default.",
            "optimum-cli mla-quantize -m CONVERTED --cache-bits 4 \\\n      --eval-data text.txt OUTPUT",
            "optimum-cli mla-quantize -m CONVERTED --weights bnb-nf4 OUTPUT",
        )
        parser.add_argument("-m", "--model", required=True, help="Hub id or folder of a model from mla-convert.")
        parser.add_argument("output", metavar="OUTPUT", help=OUTPUT_HELP)

        add_cache(parser)
        weights = parser.add_argument_group("weights")
        weights.add_argument(
            "--weights",
            default="none",
            metavar="NAME",
            help="How to quantize the weights of the linear layers by bitsandbytes: none, bnb-nf4 (4 bits) or bnb-int8 "
            "(8 bits). Default: none.",
        )
        about = "Text to measure the perplexity on before and after, one token at a time through the cache"
        add_evaluation_text(parser, f"{about}: {TEXT_HELP}. Default: none.", 32)
        add_run_arguments(parser)

    def run(self) -> None:
        """Quantize the model and print the table. Bad input prints one line and exits with code 2."""
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


def add_cache(parser: ArgumentParser) -> None:
    """Add the arguments that say how the cache is stored."""
    cache = parser.add_argument_group("cache")
    cache.add_argument(
        "--cache-bits",
        type=int,
        default=4,
        metavar="N",
        help="Bits per number of the latent: 8, 4, 2, or with hqq also 3; 16 leaves the latent unquantized. "
        "Default: 4.",
    )
    cache.add_argument(
        "--cache-backend",
        default="hqq",
        metavar="NAME",
        help="Library that quantizes the cache: hqq, quanto, or the name of a registered one. Default: hqq.",
    )
    cache.add_argument(
        "--group-size",
        type=int,
        default=64,
        metavar="N",
        help="Largest number of neighbouring numbers of a latent that share one scale. Default: 64.",
    )
    cache.add_argument(
        "--residual-length",
        type=int,
        default=128,
        metavar="N",
        help="Largest number of newest tokens that stay unquantized. Default: 128.",
    )
    cache.add_argument(
        "--rope-bits",
        type=int,
        default=16,
        metavar="N",
        help="Bits per number of a rotary key that is cached beside the latent: 8, or 16 for unquantized. Default: 16.",
    )
