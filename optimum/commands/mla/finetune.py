"""`optimum-cli mla-finetune`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum.commands.mla.common import add_run_arguments, hub_options

TRAINING_FLAGS: dict[str, tuple[type, str]] = {
    "learning_rate": (float, "Default: 1.5e-3 for adapters, else 5e-4; a hundredth of that for dpo."),
    "lr_scheduler_type": (str, "One of Transformers' (default cosine), or mha2mla: warmup, constant, 1 - sqrt decay."),
    "warmup_steps": (int, "Default: a twentieth of all steps."),
    "num_train_epochs": (float, "Times over the data (default 1)."),
    "max_steps": (int, "Optimizer steps; overrides the epochs, and ends a stream."),
    "per_device_train_batch_size": (int, "Rows a step and device (default 8)."),
    "gradient_accumulation_steps": (int, "Batches a step (default 1)."),
    "weight_decay": (float, "Default 0."),
    "max_grad_norm": (float, "Default 1."),
    "optim": (str, "Optimizer (default adamw_torch)."),
    "seed": (int, "Default 42."),
    "logging_steps": (int, "Steps from one logged loss to the next (default: a fiftieth of all)."),
    "save_steps": (int, "Steps from one checkpoint to the next (default: a fifth of all)."),
    "dataloader_num_workers": (int, "Processes that load data (default 0)."),
    "report_to": (str, "Where losses are logged too, such as tensorboard (default none)."),
}
"""Fields of `TrainingArguments` with a flag of their own; `--training` sets any other."""
TRAINING_SWITCHES = {
    "bf16": "Compute in bfloat16 where that is safe.",
    "gradient_checkpointing": "Compute activations again in the backward pass instead of keeping them.",
}
RECIPE_FLAGS: dict[str, tuple[type, str]] = {
    "objective": (str, "distill (default): a teacher's distribution; sft: next tokens; dpo: preferences."),
    "train": (str, "lora (default), dora: adapters on the latent projections; kv: those projections; attention; full."),
    "layers": (str, "Layers that train, such as 0-7 or 1,3,5 (default all)."),
    "lora_rank": (int, "Default 32."),
    "lora_alpha": (float, "Default: twice the rank."),
    "lora_dropout": (float, "Default 0."),
    "teacher": (str, "Hub id or folder; default: the model that the conversion started from."),
    "teacher_bits": (int, "Load the teacher in 8 or 4 bits (bitsandbytes); default 16, as saved."),
    "kl_weight": (float, "Weight of the KL divergence from the teacher (default 1)."),
    "ce_weight": (float, "Weight of the cross-entropy (default 0)."),
    "temperature": (float, "Of both distributions in the KL divergence (default 1)."),
    "optimizer": (str, "adamw (default), or muon: Muon for matrices, AdamW for the rest."),
    "stage1": (str, "layerwise: first bring the layers' outputs close to the teacher's (default none)."),
    "stage1_share": (float, "Share of the steps for that (default 0.2)."),
    "sequence_length": (int, "Tokens per row (default: up to 512)."),
    "train_tokens": (int, "Read no more training data than so many tokens."),
}
RECIPE_SWITCHES = {
    "merge": "Merge the adapters: the result is a plain converted model.",
    "streaming": "Read the data while training goes on.",
    "chat_template": "The data are chats: rows of messages, rendered by the tokenizer's chat template.",
}


class MLAFinetuneCommand(BaseOptimumCLICommand):
    """Arguments only; the work is `optimum_mla.pipeline.finetune`."""

    COMMAND = CommandInfo(
        name="mla-finetune", help="Recover a converted model's quality: distillation, fine-tuning or DPO."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        parser.description = (
            "Recover the quality of a converted model with little training.\n"
            "Example: optimum-cli mla-finetune -m CONVERTED --train-data text.txt --eval-data held_out.txt --merge OUT"
        )
        parser.add_argument("-m", "--model", help="Hub id or folder of a model from mla-convert.")
        parser.add_argument("output", help="Folder to write; it appears only when whole.")
        parser.add_argument("--config", help="YAML file with any of the options below by name; flags override it.")
        data = "file, folder of .txt files, .jsonl with a text a row, or dataset NAME[:CONFIG[:SPLIT]]"
        parser.add_argument(
            "--train-data", help=f"Text to train on: {data}. For dpo: rows of prompt, chosen and rejected."
        )
        parser.add_argument("--eval-data", help=f"Text for the perplexity before and after: {data}.")
        parser.add_argument("--eval-samples", type=int, help="Windows of it to use (default 128).")
        parser.add_argument("--eval-length", type=int, help="Tokens per window of it (default: up to 512).")
        parser.add_argument(
            "--resume", action="store_true", help="Go on from the newest checkpoint of an interrupted run."
        )

        recipe = parser.add_argument_group("recipe")
        training = parser.add_argument_group("training, with the names of transformers.TrainingArguments")
        for group, flags, switches in (
            (recipe, RECIPE_FLAGS, RECIPE_SWITCHES),
            (training, TRAINING_FLAGS, TRAINING_SWITCHES),
        ):
            for name, (kind, text) in flags.items():
                group.add_argument(*spellings(name), dest=name, type=kind, help=text)
            for name, text in switches.items():
                group.add_argument(*spellings(name), dest=name, action="store_true", default=None, help=text)
        training.add_argument(
            "--training", nargs="+", metavar="NAME=VALUE", help="Any other field of TrainingArguments."
        )
        add_run_arguments(parser)

    def run(self) -> None:
        """Train, print the table; bad input prints one line and exits with 2."""
        import logging

        from optimum_mla.cli import exit_on_bad_input

        # It warns at its import, and of every batch that goes through 8-bit weights.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        again = "OUTPUT was not written; go on from the newest checkpoint with --resume"
        with exit_on_bad_input(interrupted=again):
            from optimum_mla.errors import InvalidValueError
            from optimum_mla.io.folder import located
            from optimum_mla.io.inputs import check_inputs_stay
            from optimum_mla.pipeline import TextOptions, finetune
            from optimum_mla.recovery.recipe import Recipe
            from optimum_mla.report.render import recovery_table

            args = self.args
            extra = read_config(args) | read_fields(args.training or [])
            check_inputs_stay(located(args.output), {"config": args.config})
            for name in ("model", "train_data"):
                if getattr(args, name) is None:
                    raise InvalidValueError(name, None, "a value", f"Give --{name.replace('_', '-')}.")
            texts = {"eval_data": args.eval_data, "eval_samples": args.eval_samples, "eval_length": args.eval_length}
            report = finetune(
                args.model,
                args.output,
                args.train_data,
                recipe=Recipe(**given(args, [*RECIPE_FLAGS, *RECIPE_SWITCHES])),
                training=extra | given(args, [*TRAINING_FLAGS, *TRAINING_SWITCHES]),
                texts=TextOptions(**{name: value for name, value in texts.items() if value is not None}),
                dtype=args.dtype,
                device=args.device,
                overwrite=args.overwrite,
                resume=args.resume,
                hub=hub_options(args),
            )
            if report is not None:
                print(recovery_table(report))
                if report.diverged_at_step is not None:
                    print(f"\nThe loss diverged at step {report.diverged_at_step}: this is the checkpoint before it.")
                print(f"\nSaved to {args.output}")


def spellings(name: str) -> list[str]:
    """Flags of a field: with dashes, and as `TrainingArguments` has it."""
    return list(dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"]))


def given(args: Namespace, names: list[str]) -> dict[str, Any]:
    """What the user said."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def read_config(args: Namespace) -> dict[str, Any]:
    """Fill what no flag said from the YAML file; names of no flag are fields of `TrainingArguments`."""
    if args.config is None:
        return {}
    from pathlib import Path

    import yaml

    from optimum_mla.errors import InvalidValueError

    try:
        content = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidValueError("config", args.config, f"a YAML file that can be read ({error})") from error
    if not isinstance(content, dict):
        raise InvalidValueError("config", args.config, "a YAML file of NAME: VALUE lines")
    extra = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in ("config", "training", "output", "subparsers", "func"):
            raise InvalidValueError("config", name, "options other than that")
        if not hasattr(args, name):
            extra[name] = plain(name, value)
        elif getattr(args, name) is None or getattr(args, name) is False or (name == "dtype" and args.dtype == "auto"):
            setattr(args, name, converted(name, value))
    return extra


def converted(name: str, value: Any) -> Any:
    """A value of the YAML file in its flag's type: YAML reads 1e-4 as text."""
    kind, _ = {**RECIPE_FLAGS, **TRAINING_FLAGS}.get(name, (None, ""))
    if kind is None or value is None:
        return value
    from optimum_mla.errors import InvalidValueError

    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise InvalidValueError(name, value, f"a {kind.__name__}") from error


def read_fields(pairs: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` pairs, values as YAML reads them."""
    import yaml

    from optimum_mla.errors import InvalidValueError

    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InvalidValueError("training", pair, "NAME=VALUE")
        try:
            found[name] = plain(name, yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise InvalidValueError("training", pair, "NAME=VALUE with a YAML value") from error
    return found


def plain(name: str, value: Any) -> Any:
    """A value as it was meant: YAML reads 1e-4 as text, and the strategy `no` as false."""
    if value is False and name.endswith("_strategy"):
        return "no"
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
