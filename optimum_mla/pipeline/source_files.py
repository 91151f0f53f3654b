"""The files of a checkpoint that a result takes over whose weights are those of its source."""

from __future__ import annotations

from pathlib import Path

from optimum_mla.io.faults import TOKENIZER_FILES
from optimum_mla.io.reading import reading
from optimum_mla.models.codec import CODEC_FILE
from optimum_mla.pipeline.checkpoint import Checkpoint
from optimum_mla.report.schema import CodecReport

COPIED = (".json", ".jinja", ".model", ".py", ".tiktoken")
"""Ends of the names of files, beside weights and a tokenizer's text files, that the result takes over."""
LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
"""Beginnings of the names of files that say what may be done with a model."""
NOT_COPIED = ("conversion_report.json", "recovery_report.json", CodecReport.file_name)
"""Files that say what the source is made of, which the result is not."""


def source_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the files of a checkpoint that make up the source: weights, configs, tokenizer, code and licence.

    Of a hub id the weights have been downloaded, because the model was loaded.
    """
    folder, model, hub = checkpoint.folder, checkpoint.location, checkpoint.hub
    if folder is None:
        from huggingface_hub import snapshot_download

        known = {name: hub[name] for name in ("revision", "cache_dir", "token") if name in hub}
        named = [*(f"*{end}" for end in COPIED), *TOKENIZER_FILES, *(f"{name}*" for name in LICENCES)]
        with reading("weights", model, hub):
            folder = Path(snapshot_download(model, allow_patterns=named, ignore_patterns=["*/*"], **known))
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in NOT_COPIED]
    weights = [path for path in files if path.suffix == ".safetensors" and path.name != CODEC_FILE]
    # Some repositories hold their weights a second time, for other libraries.
    weights = [path for path in weights if not path.name.startswith("consolidated")]
    weights = weights or [path for path in files if path.suffix == ".bin"]
    return weights + [
        path
        for path in files
        if path.suffix in COPIED or path.name in TOKENIZER_FILES or path.name.startswith(LICENCES)
    ]
