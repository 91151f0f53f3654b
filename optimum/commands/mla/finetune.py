"""`optimum-cli mla-finetune`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum.commands.mla.common import (
    LENGTH_HELP,
    OUTPUT_HELP,
    TEXT_HELP,
    add_run_arguments,
    describe,
    hub_options,
)

TRAINING_FLAGS: dict[str, tuple[type, str]] = {
    "learning_rate": (
        float,
        "Learning rate. Default: 1e-3 for adapters, 3e-4 for full, 5e-4 for kv and attention; a hundredth of "
        "that for dpo.",
    ),
    "lr_scheduler_type": (
        str,
        "Schedule of the learning rate: one of Transformers', or mha2mla (warmup, constant, 1 - sqrt decay). "
        "Default: cosine.",
    ),
    "warmup_steps": (int, "Steps over which the learning rate rises. Default: 1/20 of all steps."),
    "num_train_epochs": (float, "How many times to go over the data. Default: 1."),
    "max_steps": (int, "Optimizer steps, instead of a number of epochs. Streamed data need it or --train-tokens."),
    "per_device_train_batch_size": (int, "Rows per batch and device. Default: 8."),
    "gradient_accumulation_steps": (int, "Batches per optimizer step. Default: 1."),
    "weight_decay": (float, "Weight decay. Default: 0."),
    "max_grad_norm": (float, "Norm that gradients are clipped to. Default: 1."),
    "optim": (str, "Name of one of Transformers' optimizers, for --optimizer adamw. Default: that of Transformers."),
    "seed": (int, "Seed for random numbers. Default: 42."),
    "logging_steps": (int, "Steps between two logged losses. Default: 1/50 of all steps."),
    "save_steps": (int, "Steps between two checkpoints. Default: 1/5 of all steps."),
    "dataloader_num_workers": (int, "Processes that load data. Default: 0, which loads in the training process."),
    "report_to": (str, "Where to log losses as well, such as tensorboard. Default: none."),
}
"""Fields of `TrainingArguments` with a flag of their own; `--training` sets any other field."""
TRAINING_SWITCHES = {
    "bf16": "Train with bfloat16 mixed precision.",
    "gradient_checkpointing": "Save memory by computing activations again in the backward pass.",
}
RECIPE_FLAGS: dict[str, tuple[type, str]] = {
    "objective": (
        str,
        "What to train towards: distill (the next-token distribution of a teacher), sft (the next token) or dpo "
        "(preferences). Default: distill.",
    ),
    "train": (
        str,
        "What to train: lora or dora (adapters on the latent projections, or on those of keys and values where the "
        "model has a codec), kv (these projections), attention (the whole attention) or full (all parameters). "
        "Default: lora.",
    ),
    "layers": (str, "Layers to train, such as 0-7 or 1,3,5. Default: all."),
    "lora_rank": (int, "Rank of the adapters. Default: 32."),
    "lora_alpha": (float, "Scale of the adapters times their rank. Default: twice the rank."),
    "lora_dropout": (float, "Dropout in the adapters. Default: 0."),
    "teacher": (str, "Hub id or folder of the teacher. Default: the model that the conversion started from."),
    "teacher_bits": (
        int,
        "Bits per weight of the teacher: 8 or 4, quantized by bitsandbytes, or 16 for unquantized. Default: 16.",
    ),
    "kl_weight": (float, "Weight of the KL divergence from the teacher, for distill. Default: 1."),
    "ce_weight": (float, "Weight of the cross-entropy with the text, for distill. Default: 0."),
    "temperature": (float, "Temperature of both distributions in the KL divergence. Default: 1."),
    "optimizer": (str, "Optimizer: adamw, or muon (Muon for matrices, AdamW for the rest). Default: adamw."),
    "stage1": (
        str,
        "Stage before the objective: layerwise (bring the output of each layer close to the teacher's) or none. "
        "Default: none.",
    ),
    "stage1_share": (float, "Share of the steps that the layerwise stage takes. Default: 0.2."),
    "sequence_length": (
        int,
        "Tokens per row of training data. Default: 512, or the model's longest context if that is shorter.",
    ),
    "train_tokens": (int, "Largest number of training tokens to read. Default: all."),
}
RECIPE_SWITCHES = {
    "merge": "Merge the adapters into the weights, so that the result is a plain converted model.",
    "streaming": "Read and tokenize the training data while training goes on.",
    "chat_template": "Treat the training data as chats: rows with a messages column, which the chat template of the "
    "tokenizer renders.",
}
METAVARS: dict[type, str] = {int: "N", float: "X", str: "NAME"}
"""The placeholder that the help shows for a value of each type."""


class MLAFinetuneCommand(BaseOptimumCLICommand):
    """Parses the arguments of `mla-finetune`; `optimum_mla.pipeline.finetune` does the work."""

    COMMAND = CommandInfo(
        name="mla-finetune", help="Recover the quality of a converted model by distillation, fine-tuning or DPO."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the arguments of the command to a parser."""
        describe(
            parser,
            "Recover the quality of a converted model with little training. By default\n"
            "adapters on its latent projections learn from the model that the conversion\n"
            "started from, and the step that is best on held-out text is kept.",
            "optimum-cli mla-finetune -m CONVERTED --train-data text.txt \\\n"
            "      --eval-data held_out.txt --merge OUTPUT",
            "optimum-cli mla-finetune -m CONVERTED --train-data pairs.jsonl \\\n      --objective dpo OUTPUT",
            "optimum-cli mla-finetune --config recipe.yaml OUTPUT",
        )
        parser.add_argument("-m", "--model", help="Hub id or folder of a model from mla-convert.")
        parser.add_argument("output", metavar="OUTPUT", help=OUTPUT_HELP)
        parser.add_argument(
            "--config",
            metavar="FILE",
            help="YAML file with options of this command by name. Options on the command line override it.",
        )
        parser.add_argument(
            "--resume", action="store_true", help="Continue from the newest checkpoint of an interrupted run."
        )

        texts = parser.add_argument_group("text")
        texts.add_argument(
            "--train-data",
            metavar="TEXT",
            help=f"Text to train on: {TEXT_HELP}. For dpo, rows with the columns prompt, chosen and rejected.",
        )
        texts.add_argument(
            "--eval-data",
            metavar="TEXT",
            help="Held-out text, in the same formats, on which the perplexity (with a codec, the divergence from the "
            "teacher) is measured before, during and after the training; the best step is kept. Default: rows that are "
            "held back from the training text.",
        )
        texts.add_argument(
            "--eval-samples", type=int, metavar="N", help="Largest number of windows of it to use. Default: 128."
        )
        texts.add_argument("--eval-length", type=int, metavar="N", help=LENGTH_HELP)

        recipe = parser.add_argument_group("recipe")
        training = parser.add_argument_group("training (fields of transformers.TrainingArguments)")
        for group, flags, switches in (
            (recipe, RECIPE_FLAGS, RECIPE_SWITCHES),
            (training, TRAINING_FLAGS, TRAINING_SWITCHES),
        ):
            for name, (kind, text) in flags.items():
                group.add_argument(*spellings(name), dest=name, type=kind, metavar=METAVARS[kind], help=text)
            for name, text in switches.items():
                group.add_argument(*spellings(name), dest=name, action="store_true", default=None, help=text)
        recipe.add_argument(
            *spellings("teacher_revision"),
            metavar="REVISION",
            help="Branch, tag or commit of the teacher on the hub. Default: the main branch, or the commit that was "
            "converted.",
        )
        training.add_argument(
            "--training", nargs="+", metavar="NAME=VALUE", help="Set any other fields of TrainingArguments."
        )
        add_run_arguments(parser)

    def run(self) -> None:
        """Train the model and print the table. Bad input prints one line and exits with code 2."""
        import logging

        from optimum_mla.cli import exit_on_bad_input

        # bitsandbytes warns when it is imported, and about every batch that goes through 8-bit weights.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        again = "OUTPUT was not written. Continue from the newest checkpoint with --resume"
        with exit_on_bad_input(interrupted=again):
            from optimum_mla.core.errors import OptionError
            from optimum_mla.io.folder import resolve_output
            from optimum_mla.io.inputs import check_inputs_stay
            from optimum_mla.pipeline import TextOptions, finetune
            from optimum_mla.recovery.recipe import Recipe
            from optimum_mla.report.render import recovery_table
            from optimum_mla.report.verdict import recovery_verdict

            args = self.args
            extra = read_config(args) | read_fields(args.training or [])
            check_inputs_stay(resolve_output(args.output), {"config": args.config})
            for name in ("model", "train_data"):
                if getattr(args, name) is None:
                    raise OptionError(f"--{name.replace('_', '-')} is missing. Give it, here or in the --config file.")
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
                teacher_revision=args.teacher_revision,
            )
            if report is not None:
                print(recovery_table(report))
                print(f"\n{recovery_verdict(report)}")
                if report.diverged_at_step is not None:
                    kept = {None: "the checkpoint before it", 0: "the model as it was given"}.get(
                        report.kept_step, f"step {report.kept_step}, which was best on held-out text"
                    )
                    print(f"\nThe loss diverged at step {report.diverged_at_step}: this is {kept}.")
                print(f"Saved to {args.output}")


def spellings(name: str) -> list[str]:
    """Return the flags of a field: one with dashes, and one with the underscores of `TrainingArguments`."""
    return list(dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"]))


def given(args: Namespace, names: list[str]) -> dict[str, Any]:
    """Return those of the named options that the user gave."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def read_config(args: Namespace) -> dict[str, Any]:
    """Set the options that no flag gave from the YAML file, and return what is left.

    Returns:
        The entries of the file that are no options of the command: fields of `TrainingArguments`.

    Raises:
        InvalidValueError: The file cannot be read, or an option cannot be set by it.
    """
    if args.config is None:
        return {}
    from pathlib import Path

    import yaml

    from optimum_mla.core.errors import InvalidValueError

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
            raise InvalidValueError("config", name, "other options", "Give this one on the command line.")
        if not hasattr(args, name):
            extra[name] = plain(name, value)
        elif getattr(args, name) is None or getattr(args, name) is False or (name == "dtype" and args.dtype == "auto"):
            setattr(args, name, converted(name, value))
    return extra


def converted(name: str, value: Any) -> Any:
    """Return a value of the YAML file in the type of its flag, because YAML reads 1e-4 as text."""
    kind, _ = {**RECIPE_FLAGS, **TRAINING_FLAGS}.get(name, (None, ""))
    if kind is None or value is None:
        return value
    from optimum_mla.core.errors import InvalidValueError

    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise InvalidValueError(name, value, f"a {kind.__name__}") from error


def read_fields(pairs: list[str]) -> dict[str, Any]:
    """Return the fields in `NAME=VALUE` pairs, whose values are read as YAML."""
    import yaml

    from optimum_mla.core.errors import InvalidValueError

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
    """Return a value as the user meant it, because YAML reads 1e-4 as text and the strategy `no` as false."""
    if value is False and name.endswith("_strategy"):
        return "no"
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
