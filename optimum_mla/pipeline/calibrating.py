"""`mla-calibrate`: gather the statistics of a model on a text, for any number of conversions."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from optimum_mla.calibrate.statistics_folder import FILE_NAME, CalibrationStatistics
from optimum_mla.families.verify import verify_family
from optimum_mla.io.claim import claims_output
from optimum_mla.io.folder import atomic_folder, check_output
from optimum_mla.models.family_table import family_of
from optimum_mla.models.layer_source import reading_weights
from optimum_mla.pipeline.loading import NO_TEXTS, TextOptions, read_texts
from optimum_mla.pipeline.run_settings import RunOptions, RunSettings


@claims_output()
def calibrate(
    model: str,
    output: str | Path,
    texts: TextOptions = NO_TEXTS,
    **settings: Unpack[RunSettings],
) -> tuple[CalibrationStatistics, float]:
    """Gather the statistics of a checkpoint on a text, write them to a folder, and return them and the seconds taken.

    Args:
        model: A hub id or a folder.
        output: Folder to write; it appears only when whole.
        texts: The calibration text. Without calibration data, a text that comes with the package is taken.
        **settings: See `RunSettings`.

    Raises:
        MLAError: Bad input of any kind; `output` is as it was.
    """
    start = time.perf_counter()
    run = RunOptions(**settings)
    checkpoint = run.checkpoint(model)
    inputs = {"model": model, "calibration-data": texts.calibration_data}
    folder = check_output(output, inputs, run.overwrite, (FILE_NAME,), "statistics")
    config = checkpoint.source_config()
    windows: Any
    windows, _, data = read_texts(checkpoint.tokenizer(needed=True), config, texts.or_built_in())
    with tempfile.TemporaryDirectory() as scratch:
        source = checkpoint.load(run.dtype, run.device, Path(scratch))
        with atomic_folder(folder, overwrite=run.overwrite) as partial, reading_weights():
            verify_family(source, family_of(config).spec, range(config.num_hidden_layers))
            CalibrationStatistics.gather(source, windows, partial, data["calibration-data"])
    return CalibrationStatistics.read(folder), time.perf_counter() - start
