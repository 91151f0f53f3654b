"""The documents and the scores of the tasks in this folder.

Haystacks and passages come from the held-out novel of the reference model; numbers, names and word lists are drawn
under a seed, so that every run asks the same. Sizes are given in tokens and met by counting characters, since a task
does not know the tokenizer of the model that it tests.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from datasets import Dataset

BENCHMARKS = Path(__file__).resolve().parents[1]
NOVEL = BENCHMARKS / "reference_model" / "evaluation.txt"
ANSWERS = BENCHMARKS / "texts" / "answers.jsonl"
CHARACTERS_PER_TOKEN = 4.2
"""Characters of a token of English prose, chosen low, so that a haystack never exceeds the tokens it is named after."""
COLOURS = ("red", "blue", "green", "silver", "copper", "violet", "crimson", "golden")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SYLLABLES = ("ba", "ko", "mi", "ru", "ta", "vo", "ne", "si", "pu", "da", "lo", "fe")
LAST_WORD = re.compile(r"\b([A-Za-z]{4,})[.!?][\"']?\s")
SENTENCE_END = re.compile(r"[.!?][\"']?(?=\s)")

Split = dict[str, Dataset]


def needle(tokens: int, documents: int, **_: Any) -> Split:
    """Return documents that hide one number in the novel, at depths from its beginning to its end in turn."""
    found = []
    for index in range(documents):
        rng = random.Random(f"needle {tokens} {index}")
        depth, colour, number = DEPTHS[index % len(DEPTHS)], rng.choice(COLOURS), _number(rng)
        text = _hidden(_haystack(rng, tokens), [(depth, colour, number)])
        found.append({"depth": depth, "text": _asked(text, colour), "answer": number})
    return _split(found)


def needles(tokens: int, documents: int, **_: Any) -> Split:
    """Return documents that hide eight numbers at even depths of the novel; each of the numbers is asked for."""
    found = []
    for index in range(documents // len(COLOURS)):
        rng = random.Random(f"needles {tokens} {index}")
        colours = rng.sample(COLOURS, len(COLOURS))
        places = [(i / (len(colours) - 1), colour, _number(rng)) for i, colour in enumerate(colours)]
        text = _hidden(_haystack(rng, tokens), places)
        found += [{"depth": d, "text": _asked(text, colour), "answer": number} for d, colour, number in places]
    return _split(found)


def lookup(pairs: int, documents: int, asked: int = 8, **_: Any) -> Split:
    """Return documents that list invented names with numbers; the numbers of names all along the list are asked for."""
    found = []
    for index in range(documents // asked):
        rng = random.Random(f"lookup {pairs} {index}")
        names = rng.sample([a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES], pairs)
        numbers = {name: _number(rng) for name in names}
        listed = "\n".join(f"{name}: {number}" for name, number in numbers.items())
        for place in range(asked):
            name = names[place * (pairs - 1) // (asked - 1)]
            found.append({"text": f"{listed}\n\nThe same again, one line:\n{name}:", "answer": numbers[name]})
    return _split(found)


def copying(words: int, documents: int, between: int = 0, **_: Any) -> Split:
    """Return documents that ask to copy a list of words of the novel in random order.

    Args:
        words: Words in the list.
        documents: Number of documents.
        between: Tokens of the novel between the list and its copy; without them caches that read recent tokens exactly
            need not find anything in their codes.
    """
    vocabulary = sorted(set(re.findall(r"\b[a-z]{4,9}\b", NOVEL.read_text(encoding="utf-8"))))
    found = []
    for index in range(documents):
        rng = random.Random(f"copying {index}")
        listed = " ".join(rng.sample(vocabulary, words))
        later = f"{_haystack(rng, between)}\n\n" if between else ""
        found.append({"text": f"The list: {listed}\n\n{later}The same list again:", "answer": listed})
    return _split(found)


def last_word(documents: int, characters: int = 600, **_: Any) -> Split:
    """Return passages of the novel that end before the last word of a sentence, which occurs in them earlier."""
    text = " ".join(NOVEL.read_text(encoding="utf-8").split()) + " "
    found = []
    for match in LAST_WORD.finditer(text, characters):
        start, word = match.start(1), match.group(1)
        passage = text[text.index(" ", start - characters) + 1 : start - 1]
        if re.search(rf"\b{word}\b", passage) and passage[-1] not in '.!?"-':
            found.append({"text": passage, "answer": word})
    return _split([found[i * (len(found) - 1) // (documents - 1)] for i in range(documents)])


def agreement(**_: Any) -> Split:
    """Return the instructions with the greedy answers of the unconverted model."""
    return _split([json.loads(line) for line in ANSWERS.read_text(encoding="utf-8").splitlines()])


def exact(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether the text that was written begins with the answer."""
    return {"exact_match": float(results[0].strip().startswith(document["answer"]))}


def same_words(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether all words were written as they should, and the share of words before the first other one."""
    wanted, written = document["answer"].split(), results[0].split()
    same = 0
    while same < min(len(wanted), len(written)) and wanted[same] == written[same]:
        same += 1
    return {"exact_match": float(wanted == written), "same_words": same / max(len(wanted), len(written), 1)}


def _haystack(rng: random.Random, tokens: int) -> str:
    text, characters = NOVEL.read_text(encoding="utf-8"), int(tokens * CHARACTERS_PER_TOKEN)
    start = text.index("\n\n", rng.randrange(len(text) - 2 * characters)) + 2
    return text[start : start + characters]


def _hidden(haystack: str, places: list[tuple[float, str, str]]) -> str:
    """Return a text with sentences hidden at the given depths, each at the nearest end of a sentence."""
    ends = [0, *(match.end() for match in SENTENCE_END.finditer(haystack)), len(haystack)]
    whole = haystack
    for depth, colour, number in reversed(places):  # The last one first, so that the places of the others do not move.
        place = min(ends, key=lambda end: abs(end - depth * len(haystack)))
        whole = f"{whole[:place]} The secret number of the {colour} door is {number}. {whole[place:]}".strip()
    return whole


def _asked(text: str, colour: str) -> str:
    return (
        f"{text}\n\nQuestion: What is the secret number of the {colour} door?\n"
        f"Answer: The secret number of the {colour} door is"
    )


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10000, 100000))


def _split(documents: list[dict[str, Any]]) -> Split:
    return {"test": Dataset.from_list(documents)}
