"""`mla-calibrate --refit`: fit a codec again after training, and keep the better one."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import DynamicCache
from typing_extensions import Unpack

from optimum_mla.calibrate import BUILT_IN_TEXT
from optimum_mla.convert.refit import moved_codec, refit_codec
from optimum_mla.core.errors import CalibrationDataError, OptionError, OutputError
from optimum_mla.io.claim import claims_output
from optimum_mla.io.folder import atomic_folder, check_output
from optimum_mla.measure.codec_checks import codec_reference, verify_codec
from optimum_mla.measure.quality import compare_decoding
from optimum_mla.models.codec import CODEC_FILE, ModelCodec
from optimum_mla.models.coded import with_codec, without_codec
from optimum_mla.models.layer_source import reading_weights
from optimum_mla.pipeline.coding import SCORED_AT_ONCE, SCORED_WINDOWS
from optimum_mla.pipeline.loading import NO_TEXTS, TextOptions, read_texts
from optimum_mla.pipeline.run_settings import RunOptions, RunSettings


@dataclass(frozen=True)
class Refit:
    """The result of a refit: how far both codecs move the predictions, and which one was kept.

    Attributes:
        divergence_before: How far the old codec moves the predictions of the present weights, in nats.
        divergence_after: How far the new one does.
        refitted: Whether the new one was written, because it moves them less.
        seconds: Wall time of the fit.
    """

    divergence_before: float
    divergence_after: float
    refitted: bool
    seconds: float


@claims_output()
def refit(
    model: str,
    codec: str,
    output: str | Path,
    texts: TextOptions = NO_TEXTS,
    **settings: Unpack[RunSettings],
) -> Refit:
    """Fit a codec again to a model that was trained, compare both on windows that nothing was fitted to, write one.

    Args:
        model: A hub id or a folder with the present weights.
        codec: A folder with the codec of the weights before the training.
        output: Folder to write the codec to; it appears only when whole.
        texts: The calibration text. Without calibration data, a text that comes with the package is taken.
        **settings: See `RunSettings`.

    Raises:
        MLAError: Bad input of any kind; `output` is as it was.
    """
    run = RunOptions(**settings)
    checkpoint = run.checkpoint(model)
    inputs = {"model": model, "refit": codec, "calibration-data": texts.calibration_data}
    folder = check_output(output, inputs, run.overwrite, (CODEC_FILE,), "codec")
    if (folder / "config.json").exists():
        raise OutputError(f"output: {folder} holds a model, and a codec alone would replace it. Choose another folder.")
    if texts.chat_template and texts.calibration_data is None:
        raise OptionError("--chat-template is about calibration data. Give chats with --calibration-data.")
    old = ModelCodec.load(codec)
    config = checkpoint.source_config(quantized=True)
    tokenizer = checkpoint.tokenizer(needed=True)
    if texts.calibration_data is None:
        texts = replace(texts, calibration_data=str(BUILT_IN_TEXT))
    windows, left, _ = read_texts(tokenizer, config, texts)
    if windows is None or left is None:
        raise CalibrationDataError("calibration-data: too few windows to compare two codecs. Give more text.")
    length = left.shape[1]
    if not old.exact.coded(length - length // 2):
        raise CalibrationDataError(
            f"calibration_length: in windows of {length} tokens no prompt has codes to compare. Give longer ones."
        )
    with tempfile.TemporaryDirectory() as scratch:
        source: Any = without_codec(checkpoint.load(run.dtype, run.device, Path(scratch)))
        start = time.perf_counter()
        with reading_weights():
            codecs = [moved_codec(source, old), refit_codec(source, old, windows)]
            seconds = time.perf_counter() - start
            scored, moved = left[:SCORED_WINDOWS], []
            for one in codecs:
                found = compare_decoding(
                    source,
                    lambda one=one: one.make_cache(source),  # type: ignore[misc]
                    scored,
                    scored.shape[1] // 2,
                    source,
                    lambda: DynamicCache(config=config),
                    SCORED_AT_ONCE,
                )
                moved.append(found.kl or 0.0)
            refitted = moved[1] < moved[0]
            kept = codecs[refitted]
            reference = codec_reference(source, kept)
            with atomic_folder(folder, overwrite=run.overwrite) as partial:
                kept.save(partial)
                verify_codec(with_codec(source, ModelCodec.load(partial)), kept, reference)
    return Refit(moved[0], moved[1], refitted, seconds)
