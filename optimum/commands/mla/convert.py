"""`optimum-cli mla-convert`."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum.commands.mla.common import add_run_arguments, hub_options

METHOD_OPTIONS = (
    "kv_lora_rank",
    "kv_cache_ratio",
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
"""Arguments that go to the method as they are, where they are given."""


class MLAConvertCommand(BaseOptimumCLICommand):
    """Arguments only; the work is `optimum_mla.pipeline.convert`."""

    COMMAND = CommandInfo(
        name="mla-convert", help="Convert a decoder LLM's attention to Multi-head Latent Attention (smaller KV cache)."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        parser.description = (
            "Convert a decoder LLM to Multi-head Latent Attention. Without options: GQA2MLA at half the cache.\n"
            "Calibration data make the result many times better. Example: optimum-cli mla-convert -m Qwen/Qwen3-0.6B "
            "--kv-cache-ratio 0.25 --calibration-data text.txt --eval-data other.txt OUT"
        )
        parser.add_argument("-m", "--model", required=True, help="Hub id or folder of the model to convert.")
        parser.add_argument("output", help="Folder to write; it appears only when whole.")

        method = parser.add_argument_group("method")
        method.add_argument(
            "--method", default="gqa2mla", help="gqa2mla (default), mha2mla, x-ecomla, or a registered one."
        )
        size = method.add_mutually_exclusive_group()
        size.add_argument("--kv-lora-rank", type=int, help="Numbers in the latent, per token and layer.")
        size.add_argument(
            "--kv-cache-ratio",
            type=float,
            help="Cache after over cache before, in (0, 1]. Default 0.5. 1 is full size.",
        )
        size.add_argument(
            "--energy", type=float, help="Share of the weights' energy each layer keeps; ranks then differ."
        )
        method.add_argument("--q-lora-rank", type=int, help="Rank of a query latent (x-ecomla).")
        method.add_argument("--q-energy", type=float, help="Share of the query weight's energy to keep (x-ecomla).")
        method.add_argument(
            "--qk-rope-head-dim", type=int, help="Rotary dims per rotary key head. With calibration data: chosen."
        )
        method.add_argument(
            "--rope-selection",
            help="Dims that keep rotating (mha2mla, x-ecomla): high, low, uniform, last (x-ecomla); with calibration "
            "data contribution or damage (default).",
        )
        method.add_argument(
            "--positional",
            help="Where the position goes (gqa2mla): full (on up-projected keys) or decoupled (in a rotary key of its "
            "own; default with calibration data).",
        )
        method.add_argument(
            "--rope-cache",
            help="The decoupled rotary key of gqa2mla: rebuilt from the latent (default) or cached beside it.",
        )
        method.add_argument(
            "--factorization",
            help="calibrated (default with calibration data), or by plain SVD: joint or split latents for keys and "
            "values.",
        )
        method.add_argument(
            "--heal",
            action=BooleanOptionalAction,
            default=None,
            help="Refit the output projections in closed form (default with a calibrated factorization).",
        )
        method.add_argument(
            "--rank-allocation", help="How layers share the cache: uniform (default), energy, or error."
        )
        method.add_argument(
            "--shared-rope",
            action="store_true",
            default=None,
            help="Rotate as many dims at the same frequencies in all layers, as deepseek_v3 needs it.",
        )
        method.add_argument(
            "--export-format", help="Write the result as mla-export does: deepseek_v3, for plain Transformers."
        )
        method.add_argument(
            "--latent-norm",
            nargs="?",
            const="calibrated",
            help="Put an RMSNorm on the latents, its gain calibrated, and no biases behind them, for engines that load "
            "none (x-ecomla, gqa2mla with a cached rotary key).",
        )
        method.add_argument(
            "--layers", help="all (default), a list such as 0-7 or 1,3,5, or a preset (x-ecomla-hybrid)."
        )

        text = parser.add_argument_group("text")
        text.add_argument(
            "--calibration-data", help="Text file, folder of .txt files, or dataset NAME[:CONFIG[:SPLIT]]."
        )
        text.add_argument(
            "--chat-template",
            action="store_true",
            help="The calibration data are chats (rows with `messages`): render them by the tokenizer's template.",
        )
        text.add_argument("--calibration-samples", type=int, default=128, help="Windows of it to use (default 128).")
        text.add_argument("--calibration-length", type=int, help="Tokens per window (default: up to 512).")
        text.add_argument("--eval-data", help="Text for the perplexity before and after; as --calibration-data.")
        text.add_argument("--eval-samples", type=int, default=128, help="Windows of it to use (default 128).")
        text.add_argument("--eval-length", type=int, help="Tokens per window (default: up to 512).")

        add_run_arguments(parser).add_argument("--seed", type=int, default=0, help="Default 0.")

    def run(self) -> None:
        """Convert, print the summary; bad input prints one line and exits with 2."""
        from optimum_mla.cli import exit_on_bad_input

        with exit_on_bad_input():
            from optimum_mla.errors import InvalidValueError
            from optimum_mla.pipeline import TextOptions, convert
            from optimum_mla.report.render import choices, summary_table

            args = self.args
            if args.latent_norm not in (None, "calibrated"):
                raise InvalidValueError("latent_norm", args.latent_norm, "calibrated")
            args.latent_norm = None if args.latent_norm is None else True
            report = convert(
                args.model,
                args.output,
                method=args.method,
                options={name: getattr(args, name) for name in METHOD_OPTIONS},
                texts=TextOptions(
                    calibration_data=args.calibration_data,
                    chat_template=args.chat_template,
                    calibration_samples=args.calibration_samples,
                    calibration_length=args.calibration_length,
                    eval_data=args.eval_data,
                    eval_samples=args.eval_samples,
                    eval_length=args.eval_length,
                ),
                dtype=args.dtype,
                device=args.device,
                seed=args.seed,
                overwrite=args.overwrite,
                hub=hub_options(args),
                export_format=args.export_format,
            )
            print(summary_table([report]))
            print(choices(report))
            print(f"\nSaved to {args.output}")
