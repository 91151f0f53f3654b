"""llama.cpp behind a few functions, for the tests of GGUF files and their benchmark."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

CACHE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "q4_0": 2}
"""ggml's numbers of the types that a cache may have."""
FURTHER_TYPES = {"q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
"""llama.cpp's numbers of the types of files that it makes of an f16 file and that are measured here."""
CACHE_LINE = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB \( *(\d+) cells")


@lru_cache(maxsize=1)
def _log() -> tuple[list[str], Any]:
    """Return the list that llama.cpp's messages go to, and the function that it calls, which must not be freed."""
    import llama_cpp

    lines: list[str] = []
    note = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(note, ctypes.c_void_p(0))
    return lines, note


def quantize(path: Path, to: Path, kind: str) -> None:
    """Write a file in one of `FURTHER_TYPES`, as the program `llama-quantize` does."""
    import llama_cpp

    _log()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = FURTHER_TYPES[kind], 1
    if llama_cpp.llama_model_quantize(str(path).encode(), str(to).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp cannot write {path.name} as {kind}")


class LlamaModel:
    """A model in llama.cpp, and the size of its cache as llama.cpp reports it.

    Args:
        path: A GGUF file.
        tokens: Tokens that the cache has room for.
        cache: Type of the cache, one of `CACHE_TYPES`.
    """

    def __init__(self, path: Path, tokens: int = 512, cache: str = "f32") -> None:
        import llama_cpp

        lines, _ = _log()
        lines.clear()
        kind = CACHE_TYPES[cache]
        # verbose=True leaves the log where it was set to go.
        self.model: Any = llama_cpp.Llama(
            str(path), n_ctx=tokens, logits_all=True, verbose=True, n_threads=1, type_k=kind, type_v=kind,
            flash_attn=cache.startswith("q"),
        )  # fmt: skip
        mebibytes, cells = next(found.groups() for line in lines if (found := CACHE_LINE.search(line)))
        self.cache_bytes, self.cells = float(mebibytes) * 2**20, int(cells)

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.model.close()

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the logits of a text [S, vocabulary] from an empty cache."""
        self.model.reset()
        self.model.eval(list(ids))
        return np.array(self.model.scores[: len(ids)])

    def greedy(self, ids: Sequence[int], new: int) -> list[int]:
        """Return so many tokens after a prompt, the likeliest at each step."""
        self.model.reset()
        found: list[int] = []
        for token in self.model.generate(list(ids), temp=0.0, top_k=1, repeat_penalty=1.0):
            found.append(int(token))
            if len(found) == new:
                break
        return found

    def answer(self, message: str, new: int) -> str:
        """Return the likeliest answer of at most so many tokens to a message, asked by the file's chat template."""
        self.model.reset()
        asked = [{"role": "user", "content": message}]
        said = self.model.create_chat_completion(asked, max_tokens=new, temperature=0.0, repeat_penalty=1.0)
        return str(said["choices"][0]["message"]["content"])

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return list(self.model.tokenize(text.encode(), add_bos=True, special=True))
