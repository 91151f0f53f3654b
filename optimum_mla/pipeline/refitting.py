"""`mla-calibrate --refit`: fit a codec again after training, and keep the better one."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from optimum_mla.convert.refit import moved_codec, refit_codec
from optimum_mla.core.errors import CalibrationDataError, OptionError, OutputError
from optimum_mla.io.claim import claims_output
from optimum_mla.io.folder import atomic_folder, check_output
from optimum_mla.measure.codec_checks import codec_reference, verify_codec
from optimum_mla.models.codec import CODEC_FILE, ModelCodec
from optimum_mla.models.coded import with_codec, without_codec
from optimum_mla.models.layer_source import reading_weights
from optimum_mla.pipeline.checkpoint import Checkpoint
from optimum_mla.pipeline.coding import compare_codes
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
    old = ModelCodec.load(codec)
    windows, left = _windows(checkpoint, texts, old)
    with tempfile.TemporaryDirectory() as scratch:
        source: Any = without_codec(checkpoint.load(run.dtype, run.device, Path(scratch)))
        start = time.perf_counter()
        with reading_weights():
            codecs = [moved_codec(source, old), refit_codec(source, old, windows)]
            seconds = time.perf_counter() - start
            before, after = (compare_codes(source, one, source, left).kl or 0.0 for one in codecs)
            kept = codecs[after < before]
            reference = codec_reference(source, kept)
            with atomic_folder(folder, overwrite=run.overwrite) as partial:
                kept.save(partial)
                verify_codec(with_codec(source, ModelCodec.load(partial)), kept, reference)
    return Refit(before, after, after < before, seconds)


def _windows(checkpoint: Checkpoint, texts: TextOptions, codec: ModelCodec) -> tuple[Tensor, Tensor]:
    """Return the windows that a codec is fitted to, and those on which two are compared, [N, L] each.

    Raises:
        MLAError: The text cannot be read, or is too short for a comparison.
    """
    if texts.chat_template and texts.calibration_data is None:
        raise OptionError("--chat-template is about calibration data. Give chats with --calibration-data.")
    config = checkpoint.source_config(quantized=True)
    windows, left, _ = read_texts(checkpoint.tokenizer(needed=True), config, texts.or_built_in())
    if windows is None or left is None:
        raise CalibrationDataError("calibration-data: too few windows to compare two codecs. Give more text.")
    length = left.shape[1]
    if not codec.exact.coded(length - length // 2):
        raise CalibrationDataError(
            f"calibration_length: in windows of {length} tokens no prompt has codes to compare. Give longer ones."
        )
    return windows, left
