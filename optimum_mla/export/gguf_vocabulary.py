"""The vocabulary of a tokenizer as a GGUF file holds it."""

from __future__ import annotations

import json
import re
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
BYTE = re.compile("<0x[0-9A-F]{2}>")
"""SentencePiece's pieces that stand for a byte each."""
REMEDY = "Export to deepseek_v3, and let llama.cpp's converter write the file."


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary of byte-level BPE, or one of SentencePiece's BPE.

    Attributes:
        model: llama.cpp's name of the kind, "gpt2" for byte-level BPE and "llama" for SentencePiece.
        pre: llama.cpp's name of the rule by which a text is split before it is encoded.
        tokens: All tokens by their ids; ids that the tokenizer does not know have made-up names.
        types: `gguf.TokenType` of each.
        merges: The merges, as two tokens with a space between them; empty for SentencePiece, where scores say what is
            merged first.
        scores: SentencePiece's score of each token, and None for byte-level BPE.
        prefixed: Whether a space is put before a text, as SentencePiece does; None for byte-level BPE.
        special: Ids of special tokens by their names in `SPECIAL`.
        begins: Whether the tokenizer puts the first of them before a text.
        chat_template: The template for chats, or None.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float] | None
    prefixed: bool | None
    special: dict[str, int]
    begins: bool
    chat_template: str | None


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer.

    Args:
        tokenizer: The tokenizer of a model.
        size: Number of rows of the model's embedding.

    Raises:
        UnsupportedModelError: The tokenizer is no BPE, has tokens without a row, changes or splits texts by a rule that
            is not known here, or merges in an order that llama.cpp cannot follow.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    model = content.get("model", {})
    if model.get("type") != "BPE":
        raise UnsupportedModelError(
            f"export: a GGUF file is written with BPE tokenizers only, and this model's is of type "
            f"{model.get('type')!r}. {REMEDY}"
        )
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    special = {name: index for name, index in special.items() if index is not None}
    pieces = bool(model.get("byte_fallback"))
    missing = [name for name in ("bos", "eos") if name not in special]
    if pieces and missing:
        raise UnsupportedModelError(
            f"export: the tokenizer has no {' and no '.join(missing)} token, and llama.cpp would take others of a "
            "SentencePiece vocabulary for them. Name them in the tokenizer's config."
        )
    tokens, types = _tokens(content, size, special.get("unk") if pieces else None)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    begun = tokenizer("a").input_ids
    template = tokenizer.chat_template
    return Vocabulary(
        model="llama" if pieces else "gpt2",
        pre="default" if pieces else _pre_tokenizer(content),
        tokens=tokens,
        types=types,
        merges=[] if pieces else [" ".join(merge) for merge in merges],
        scores=_scores(tokens, merges) if pieces else None,
        prefixed=_prefixed(content) if pieces else None,
        special=special,
        begins=bool(begun) and begun[0] == special.get("bos"),
        chat_template=template if isinstance(template, str) else None,
    )


def _tokens(content: dict[str, Any], size: int, unknown: int | None) -> tuple[list[str], list[int]]:
    """Return the tokens of a vocabulary by their ids, and the `gguf.TokenType` of each.

    Args:
        content: The content of the tokenizer's file.
        size: Number of ids; those without a token get made-up ones.
        unknown: Id of SentencePiece's token for what no piece stands for, if there is one.
    """
    import gguf

    model, added_tokens, kinds = content["model"], content.get("added_tokens", ()), gguf.TokenType
    ids = {index: token for token, index in model["vocab"].items()}
    ids |= {added["id"]: added["content"] for added in added_tokens}
    if max(ids) >= size:
        beyond = sum(index >= size for index in ids)
        raise UnsupportedModelError(
            f"export: the tokenizer has ids up to {max(ids)} ({ids[max(ids)]!r}), and the model's embedding has {size} "
            f"rows, for ids up to {size - 1}. Take the tokens without a row ({beyond}) out of the tokenizer, or "
            "give them rows by model.resize_token_embeddings."
        )
    types = [int(kinds.NORMAL if index in ids else kinds.UNUSED) for index in range(size)]
    for added in added_tokens:
        types[added["id"]] = int(kinds.CONTROL if added["special"] else kinds.USER_DEFINED)
    if model.get("byte_fallback"):
        for index, token in ids.items():
            if BYTE.fullmatch(token):
                types[index] = int(kinds.BYTE)
    if unknown is not None:
        types[unknown] = int(kinds.UNKNOWN)
    return [ids.get(index, f"[PAD{index}]") for index in range(size)], types


def _pre_tokenizer(content: dict[str, Any]) -> str:
    """Return llama.cpp's name of the rule by which a byte-level BPE splits a text."""
    changes = [step["type"] for step in _steps(content, "normalizer", "normalizers")]
    if set(changes) - {"NFC"}:  # llama.cpp takes a text as it is, which is most often composed already.
        raise _unknown_rule(changes)
    parts = _steps(content, "pre_tokenizer", "pretokenizers")
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
    raise _unknown_rule(kinds)


def _steps(content: dict[str, Any], name: str, parts: str) -> list[dict[str, Any]]:
    """Return the steps of a part of a tokenizer, which may be several, one, or none."""
    described = content.get(name)
    return [] if described is None else described.get(parts, [described])


def _unknown_rule(kinds: list[str]) -> UnsupportedModelError:
    return UnsupportedModelError(
        "export: the tokenizer changes or splits texts by a rule that is not known here "
        f"({', '.join(kinds) or 'none'}); known are those of gpt-2, smollm, {', '.join(SPLITS)}, and SentencePiece's. "
        f"{REMEDY}"
    )


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Return a score for each token, by which SentencePiece merges in the order of the given merges.

    SentencePiece scores what is made, not what it is made of. The merges that make a token must therefore follow one
    upon the other, as those do that Transformers reads from a file of SentencePiece. What no merge makes comes last.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        made = "".join(merge)
        if made in ranks and "".join(merges[rank - 1]) != made:
            raise UnsupportedModelError(
                f"export: the tokenizer makes {made!r} by merges of different rank, which llama.cpp cannot tell apart. "
                f"{REMEDY}"
            )
        ranks.setdefault(made, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _prefixed(content: dict[str, Any]) -> bool:
    """Return whether a tokenizer with SentencePiece's pieces puts a space before a text.

    Its file says so in one of two ways, by a normalizer or by a pre-tokenizer.
    """
    steps = _steps(content, "normalizer", "normalizers") + _steps(content, "pre_tokenizer", "pretokenizers")
    match steps:
        case [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}]:
            return scheme != "never"
        case [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]:
            return True
        case [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]:
            return False
    raise _unknown_rule([step["type"] for step in steps])
