"""Train the small models that the demo, the tests and the benchmarks convert.

    python benchmarks/train_reference_model.py --corpus DIR [--variant reference|multi_head|qwen3] [--output DIR]

DIR holds UTF-8 text files (`*.txt`), one book each. Two of them are held out: an excerpt of the first becomes the
evaluation text, an excerpt of the second the calibration text; neither trains the model or its tokenizer. The script
writes the bf16 safetensors, the tokenizer, both excerpts and a model card with the measured held-out perplexity.
Everything is deterministic under `--seed` on one machine with one thread count.

The variants differ in their attention alone: `reference` has 8 query and 2 key/value heads, `multi_head` has 8 of both,
`qwen3` is the reference with Qwen3's norm on every query and key head.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import tokenizers
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

VOCABULARY_SIZE = 4096
SEQUENCE_LENGTH = 512  # tokens per training sequence, and the longest position the model has seen
EXCERPT_BYTES = 200_000  # of each held-out book, cut at a paragraph


@dataclass(frozen=True)
class Variant:
    """One of the models: its config class, its number of key/value heads, and how its card introduces it."""

    config: type[LlamaConfig] | type[Qwen3Config]
    kv_heads: int
    title: str
    kind: str
    tokens: int


VARIANTS = {
    "reference": Variant(LlamaConfig, 2, "Reference model", "Llama with grouped-query attention", 16_000_000),
    "multi_head": Variant(LlamaConfig, 8, "Multi-head model", "Llama with multi-head attention", 10_000_000),
    "qwen3": Variant(Qwen3Config, 2, "Qwen3-like model", "Qwen3 (a norm on every query and key head)", 10_000_000),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="Folder of UTF-8 text files to train on.")
    parser.add_argument("--variant", choices=VARIANTS, default="reference")
    parser.add_argument("--output", type=Path, help="Default: benchmarks/VARIANT_model.")
    parser.add_argument("--evaluation-book", default="persuasion.txt", help="Held out: evaluation text.")
    parser.add_argument("--calibration-book", default="hard-times.txt", help="Held out: calibration text.")
    parser.add_argument("--tokens", type=int, help="Training tokens in all. Default: the variant's.")
    parser.add_argument("--batch-size", type=int, default=8, help="Sequences per optimizer step.")
    parser.add_argument("--learning-rate", type=float, default=8e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output = arguments.output or Path(__file__).parent / f"{arguments.variant}_model"
    arguments.tokens = arguments.tokens or VARIANTS[arguments.variant].tokens
    return arguments


def excerpt(book: str, size: int = EXCERPT_BYTES) -> str:
    """Return the middle `size` bytes of a book, from the beginning of a paragraph to the end of another."""
    start = book.index("\n\n", len(book) // 4) + 2
    end = start + len(book[start:].encode()[:size].decode(errors="ignore"))
    return book[start : book.rindex("\n\n", start, end)] + "\n"


def train_tokenizer(books: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(books, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=SEQUENCE_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def token_sequences(tokenizer: PreTrainedTokenizerFast, books: list[str]) -> Tensor:
    """Return all books one after the other, each closed by the end token, cut into rows, [N, SEQUENCE_LENGTH]."""
    stream: list[int] = []
    for ids in tokenizer(books, verbose=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    rows = len(stream) // SEQUENCE_LENGTH
    return torch.tensor(stream[: rows * SEQUENCE_LENGTH]).view(rows, SEQUENCE_LENGTH)


def build_model(tokenizer: PreTrainedTokenizerFast, variant: Variant) -> PreTrainedModel:
    config = variant.config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=variant.kv_heads,
        head_dim=32,
        max_position_embeddings=SEQUENCE_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config)


def train(model: PreTrainedModel, sequences: Tensor, arguments: argparse.Namespace) -> int:
    """Train the model in place for `--tokens` tokens and return how many it has seen.

    There are two optimizers: Muon for the weight matrices, which reaches the loss of AdamW in about half the tokens and
    so makes two CPU cores enough, and AdamW for embeddings and gains. `Trainer` drives only one optimizer.
    """
    steps = arguments.tokens // (arguments.batch_size * SEQUENCE_LENGTH)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    is_matrix = {name: p.ndim == 2 and "embed" not in name for name, p in model.named_parameters()}
    matrices = [p for name, p in model.named_parameters() if is_matrix[name]]
    others = [p for name, p in model.named_parameters() if not is_matrix[name]]
    rate = arguments.learning_rate
    optimizers = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedulers = [
        transformers.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, num_warmup_steps=max(20, steps // 100), num_training_steps=steps, min_lr_rate=0.02
        )
        for optimizer in optimizers
    ]
    order: DataLoader[Tensor] = DataLoader(
        cast("Dataset[Tensor]", sequences), batch_size=arguments.batch_size, shuffle=True, drop_last=True
    )
    batches = itertools.chain.from_iterable(itertools.repeat(order))
    bar = tqdm(itertools.islice(batches, steps), total=steps, desc="training", mininterval=10)
    for ids in bar:
        ids = ids.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return steps * arguments.batch_size * SEQUENCE_LENGTH


MODEL_CARD = """\
---
license: apache-2.0
library_name: transformers
---

# {title} of optimum-mla

A small {kind}, trained from scratch so that the demo, the tests and the benchmarks run on
real weights without a download. It writes plausible English and knows nothing.

| | |
|---|---|
| parameters | {parameters:,} (bfloat16, tied embeddings) |
| hidden size, layers | {hidden_size}, {layers} |
| query heads, key/value heads, head dim | {heads}, {kv_heads}, {head_dim} |
| tokenizer | byte-level BPE, {vocabulary:,} tokens |
| trained on | {tokens:,} tokens of {books} public-domain books, sequences of {length} |
| optimizer | Muon (matrices) and AdamW (embeddings, gains), learning rate {learning_rate:g}, cosine, seed {seed} |
| perplexity per token, held out | **{evaluation:.2f}** on `evaluation.txt`, {calibration:.2f} on `calibration.txt` |

`evaluation.txt` and `calibration.txt` are excerpts of two books ({evaluation_book}, {calibration_book}) that neither
the model nor its tokenizer has seen; their perplexity is over non-overlapping windows of {length} tokens, with the
bfloat16 weights computed in float32. All books are in the public domain.

Made by `python benchmarks/train_reference_model.py --corpus DIR --variant {variant}`.
"""


def main() -> None:
    arguments = parse_arguments()
    held_out = {"evaluation": arguments.evaluation_book, "calibration": arguments.calibration_book}
    training_files = [p for p in sorted(arguments.corpus.glob("*.txt")) if p.name not in held_out.values()]
    books = [path.read_text(encoding="utf-8") for path in training_files]
    tokenizer = train_tokenizer(books)
    sequences = token_sequences(tokenizer, books)
    print(f"{len(books)} books, {sequences.numel():,} tokens")

    torch.manual_seed(arguments.seed)
    variant = VARIANTS[arguments.variant]
    model = build_model(tokenizer, variant)
    tokens = train(model, sequences, arguments)
    model.to("cpu", torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    for name, book in held_out.items():
        text = excerpt((arguments.corpus / book).read_text(encoding="utf-8"))
        (arguments.output / f"{name}.txt").write_text(text, encoding="utf-8")

    from optimum_mla.calibrate.text import token_windows
    from optimum_mla.measure.quality import perplexity

    model = AutoModelForCausalLM.from_pretrained(arguments.output, dtype=torch.float32)
    measured = {
        name: perplexity(model, token_windows(tokenizer, arguments.output / f"{name}.txt", length=SEQUENCE_LENGTH))
        for name in held_out
    }
    config = model.config
    card = MODEL_CARD.format(
        variant=arguments.variant,
        title=variant.title,
        kind=variant.kind,
        parameters=model.num_parameters(),
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocabulary=config.vocab_size,
        tokens=tokens,
        books=len(books),
        length=SEQUENCE_LENGTH,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        evaluation_book=arguments.evaluation_book,
        calibration_book=arguments.calibration_book,
        **measured,
    )
    (arguments.output / "README.md").write_text(card, encoding="utf-8")
    print(f"held-out perplexity: {measured}")


if __name__ == "__main__":
    main()
