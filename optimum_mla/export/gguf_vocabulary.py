"""The vocabulary of a tokenizer as a GGUF file holds it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from optimum_mla.core.errors import UnsupportedModelError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "qwen2": rf"{_WORDS}|\p{{N}}|{_REST}",
    "llama-bpe": rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
}
"""llama.cpp's names of pre-tokenizers, and the expressions by which they split a text."""
SPECIAL = ("bos", "eos", "unk", "pad")
"""Tokens with a meaning of their own, by their names in Transformers."""


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary of byte-level BPE.

    Attributes:
        pre: llama.cpp's name of the rule by which a text is split before it is encoded.
        tokens: All tokens by their ids; ids that the tokenizer does not know have made-up names.
        types: `gguf.TokenType` of each.
        merges: The merges, as two tokens with a space between them.
        special: Ids of special tokens by their names in `SPECIAL`.
        begins: Whether the tokenizer puts the first of them before a text.
        chat_template: The template for chats, or None.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    begins: bool
    chat_template: str | None


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer.

    Args:
        tokenizer: The tokenizer of a model.
        size: Number of rows of the model's embedding.

    Raises:
        UnsupportedModelError: The tokenizer is no byte-level BPE, or splits texts by a rule that is not known here.
    """
    import gguf

    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    model = content.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UnsupportedModelError(
            "export: a GGUF file is written with byte-level BPE tokenizers only, and this model's is another kind. "
            "Export to deepseek_v3, and let llama.cpp's converter write the file."
        )
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, int(gguf.TokenType.NORMAL)
    for added in content.get("added_tokens", ()):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    ids = tokenizer("a").input_ids
    template = tokenizer.chat_template
    return Vocabulary(
        pre=_pre_tokenizer(content["pre_tokenizer"]),
        tokens=tokens,
        types=types,
        merges=merges,
        special={name: index for name, index in special.items() if index is not None},
        begins=bool(ids) and ids[0] == special["bos"],
        chat_template=template if isinstance(template, str) else None,
    )


def _pre_tokenizer(described: dict[str, Any]) -> str:
    """Return llama.cpp's name of a pre-tokenizer."""
    parts = described.get("pretokenizers", [described])
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        expression = parts[0]["pattern"].get("Regex")
        for name, known in SPLITS.items():
            if expression == known:
                return name
    raise UnsupportedModelError(
        f"export: the tokenizer splits texts by a rule that is not known here ({', '.join(kinds)}). Export to "
        "deepseek_v3, and let llama.cpp's converter write the file."
    )
