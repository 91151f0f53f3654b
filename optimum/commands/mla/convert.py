"""`optimum-cli mla-convert`."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum.commands.mla.common import (
    LENGTH_HELP,
    OUTPUT_HELP,
    add_calibration_text,
    add_run_arguments,
    describe,
    hub_options,
)

METHOD_OPTIONS = (
    "kv_lora_rank",
    "kv_cache_ratio",
    "kv_cache_budget",
    "energy",
    "q_lora_rank",
    "q_energy",
    "qk_rope_head_dim",
    "rope_selection",
    "positional",
    "rope_cache",
    "factorization",
    "heal",
    "rank_allocation",
    "latent_norm",
    "shared_rope",
    "layers",
)
"""Arguments that are passed to the method unchanged if the user gives them."""


class MLAConvertCommand(BaseOptimumCLICommand):
    """Parses the arguments of `mla-convert`; `optimum_mla.pipeline.convert` does the work."""

    COMMAND = CommandInfo(
        name="mla-convert",
        help="Convert the attention of an LLM to Multi-head Latent Attention, for a smaller KV cache.",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the arguments of the command to a parser."""
        describe(
            parser,
            "Convert the attention of a pretrained decoder LLM to Multi-head Latent\n"
            "Attention (MLA), so that generation caches one small latent per token instead\n"
            "of all keys and values.\n\n"
            "By default the weights stay as they are, old tokens are kept as codes in a\n"
            "quarter of their bytes, and a text that comes with the package calibrates the\n"
            "codes. Text like what the model will read is better: give it with\n"
            "--calibration-data.",
            "optimum-cli mla-convert -m Qwen/Qwen3-0.6B OUTPUT",
            "optimum-cli mla-convert -m Qwen/Qwen3-0.6B --cache-budget 0.125 \\\n"
            "      --calibration-data train.txt --eval-data test.txt OUTPUT",
            "optimum-cli mla-convert -m MODEL --export-format deepseek_v3 \\\n"
            "      --calibration-data train.txt OUTPUT",
        )
        parser.add_argument("-m", "--model", required=True, help="Hub id or folder of the model to convert.")
        parser.add_argument("output", metavar="OUTPUT", help=OUTPUT_HELP)

        method = parser.add_argument_group("method")
        method.add_argument(
            "--method",
            default="gqa2mla",
            help="Conversion method: gqa2mla, mha2mla, x-ecomla, or the name of a registered one. Default: gqa2mla.",
        )
        method.add_argument(
            "--layers",
            help="Layers to convert: all, a list such as 0-7 or 1,3,5, or the preset x-ecomla-hybrid. The other layers "
            "keep their attention. Default: all, but where only some layers have a sliding window, these keep it.",
        )
        method.add_argument(
            "--codec-only",
            action="store_true",
            help="With --cache-budget: write the codec alone, a few MB, without the weights. optimum_mla.load_codec "
            "gives it to any copy of the model. Default: off, and OUTPUT is a model that any tool loads.",
        )
        method.add_argument(
            "--export-format",
            metavar="FORMAT",
            help="Also export the result as mla-export does, so that Transformers loads it without optimum-mla: "
            "deepseek_v3, or as a gguf file for llama.cpp. Default: no export.",
        )

        group = parser.add_argument_group("size of the cache, at most one of these")
        size = group.add_mutually_exclusive_group()
        size.add_argument(
            "--kv-cache-ratio",
            type=float,
            metavar="SHARE",
            help="Numbers in the new cache, in 16 bits each, as a share of those in the source model's cache, above 0 "
            "and up to 1. Default: 0.5 where the latents are not coded.",
        )
        size.add_argument(
            "--cache-budget",
            dest="kv_cache_budget",
            type=float,
            metavar="SHARE",
            help="gqa2mla: leave the weights alone and keep old tokens as codes, in this share of the bytes of their "
            "keys and values in 16 bits, above 0 and up to 0.5. Prompts, first and newest tokens are read exactly. "
            "Default: 0.25, for gqa2mla with calibration, and without options about weights or an export.",
        )
        size.add_argument(
            "--kv-lora-rank",
            type=int,
            metavar="N",
            help="Rank of the latent: how many numbers it has per token and layer.",
        )
        size.add_argument(
            "--energy",
            type=float,
            metavar="SHARE",
            help="Share of the squared singular values that each layer keeps, above 0 and up to 1. The ranks of the "
            "layers then differ.",
        )

        calibration = parser.add_argument_group("calibration")
        add_calibration_text(calibration)
        calibration.add_argument(
            "--statistics",
            metavar="FOLDER",
            help="Statistics from mla-calibrate, in place of a text. Nothing is run through the model then, so that "
            "only factorizations take time, and nothing is refitted.",
        )
        calibration.add_argument(
            "--uncalibrated",
            action="store_true",
            help="Convert without calibration, as the papers do. The result is of no use until it is trained. Default: "
            "off, but at full rank with --positional full, where nothing is lost, there is no calibration.",
        )
        calibration.add_argument(
            "--factorization",
            help="How weights are factorized: calibrated (errors are weighted by what the layer reads and writes), or "
            "by plain SVD with one joint latent or with split latents for keys and values. Default: calibrated; with "
            "--uncalibrated split for gqa2mla and joint for the others.",
        )
        calibration.add_argument(
            "--heal",
            action=BooleanOptionalAction,
            default=None,
            help="Refit the output projections in closed form and keep those that are better on held-back windows. "
            "Default: on with the calibrated factorization.",
        )
        calibration.add_argument(
            "--rank-allocation",
            metavar="RULE",
            help="How the layers share the cache: error (where the model's predictions gain most), energy (each layer "
            "loses the same share of its energy) or uniform. Default: error, but uniform with --shared-rope, "
            "--statistics, --uncalibrated or 16-bit latents of --rope-cache cached.",
        )

        position = parser.add_argument_group("position (rotary embedding)")
        position.add_argument(
            "--positional",
            metavar="FORM",
            help="gqa2mla: where the position is added. full rotates all up-projected key dims; decoupled has a small "
            "rotary key beside the position-free rest and needs calibration. Default: decoupled, but full with "
            "--uncalibrated.",
        )
        position.add_argument(
            "--rope-cache",
            metavar="FORM",
            help="gqa2mla, decoupled: rebuilt computes the rotary key from the latent and caches the latent alone; "
            "cached stores it beside the latent, as DeepSeek does. Default: rebuilt.",
        )
        position.add_argument(
            "--qk-rope-head-dim",
            type=int,
            metavar="N",
            help="Dims of each rotary key head. Default: chosen for each layer by the measured error; with "
            "--uncalibrated 1/8 of the head dim for mha2mla and 1/2 for x-ecomla.",
        )
        position.add_argument(
            "--rope-selection",
            metavar="RULE",
            help="mha2mla and x-ecomla: which dims keep their rotation. high or low frequencies, uniform strides, last "
            "(x-ecomla only: the last dims of each head), or those with the largest contribution or damage, which need "
            "calibration. Default: damage, but high with --uncalibrated.",
        )
        position.add_argument(
            "--shared-rope",
            nargs="?",
            const=True,
            metavar="regular",
            help="x-ecomla, and gqa2mla with --rope-cache cached: give all layers the same number of rotary dims and "
            "the same frequencies, which deepseek_v3 needs. regular: at every so-many-th frequency, which llama.cpp "
            "needs.",
        )

        other = parser.add_argument_group("other parts of the attention")
        other.add_argument(
            "--latent-norm",
            nargs="?",
            const="calibrated",
            metavar="calibrated",
            help="x-ecomla, and gqa2mla with --rope-cache cached: put an RMSNorm with calibrated gain on the latents "
            "and no biases after them, for engines that load no biases.",
        )
        other.add_argument(
            "--q-lora-rank",
            type=int,
            metavar="N",
            help="x-ecomla: rank of a latent for the queries. Default: the queries have no latent.",
        )
        other.add_argument(
            "--q-energy",
            type=float,
            metavar="SHARE",
            help="x-ecomla: share of the squared singular values of the query weight that a latent for the queries "
            "keeps, instead of --q-lora-rank.",
        )

        evaluation = parser.add_argument_group("evaluation")
        evaluation.add_argument(
            "--eval-data",
            metavar="TEXT",
            help="Text to measure the perplexity on before and after the conversion, in the same formats as "
            "--calibration-data. Default: some windows of the calibration text, which then calibrate nothing, or with "
            "--uncalibrated or --statistics the text that comes with the package.",
        )
        evaluation.add_argument(
            "--eval-samples",
            type=int,
            default=128,
            metavar="N",
            help="Largest number of windows of text to use. Default: 128.",
        )
        evaluation.add_argument("--eval-length", type=int, metavar="N", help=LENGTH_HELP)

        run = add_run_arguments(parser)
        run.add_argument("--seed", type=int, default=0, metavar="N", help="Seed for random numbers. Default: 0.")
        run.add_argument(
            "--try-family",
            action="store_true",
            help="Convert a model of a type that is not known, if its attention is confirmed to be what the names of "
            "its parts suggest. Says what to register before the result is loaded.",
        )
        run.add_argument(
            "--resume",
            action="store_true",
            help="Go on with an interrupted conversion to OUTPUT. The other options must be those that it had. With "
            "--cache-budget nothing is kept of an interrupted run.",
        )

    def run(self) -> None:
        """Convert the model and print the summary. Bad input prints one line and exits with code 2."""
        from optimum_mla.cli import exit_on_bad_input

        with exit_on_bad_input("OUTPUT is as it was"):
            from optimum_mla.core.errors import InvalidValueError
            from optimum_mla.core.processes import joined_processes
            from optimum_mla.pipeline import TextOptions, assist, convert
            from optimum_mla.report.render import choices, codec_table, sample_lines, summary_table
            from optimum_mla.report.schema import CodecReport
            from optimum_mla.report.verdict import conversion_verdict, next_command

            args = self.args
            if args.latent_norm not in (None, "calibrated"):
                raise InvalidValueError("latent_norm", args.latent_norm, "calibrated")
            args.latent_norm = None if args.latent_norm is None else True
            texts = TextOptions(
                calibration_data=args.calibration_data,
                statistics=args.statistics,
                uncalibrated=args.uncalibrated,
                chat_template=args.chat_template,
                calibration_samples=args.calibration_samples,
                calibration_length=args.calibration_length,
                calibration_repeats=args.calibration_repeats,
                eval_data=args.eval_data,
                eval_samples=args.eval_samples,
                eval_length=args.eval_length,
            )
            options = {name: getattr(args, name) for name in METHOD_OPTIONS}
            names = ("method", "dtype", "device", "seed", "export_format", "try_family")
            common = {name: getattr(args, name) for name in names}
            common |= {"options": options, "texts": texts, "hub": hub_options(args)}
            with joined_processes() as processes:
                if not processes.leads:
                    assist(processes, args.model, **common)
                    return
                report = convert(
                    args.model,
                    args.output,
                    **common,
                    overwrite=args.overwrite,
                    resume=args.resume,
                    announce=lambda text: print(text, flush=True),
                    processes=processes,
                    codec_only=args.codec_only,
                )
            if isinstance(report, CodecReport):
                print(codec_table(report))
            else:
                print(summary_table([report]))
                print(choices(report))
                print(sample_lines(report))
            print(f"\n{conversion_verdict(report)}")
            print(f"Saved to {args.output}")
            command = next_command(report, args.output)
            print(f"Next: {command}" if command else "Next: load it as its README.md shows.")
