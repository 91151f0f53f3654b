"""Statistics of all layers of a model on a text, which any number of conversions can use in place of the text.

They are gathered on the states of the source model, so a conversion that uses them runs no layer: it costs the
factorizations only. What needs states is left out of it: refits of output projections, and choices by measured error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.fx import GraphModule
from transformers import PreTrainedModel

from optimum_mla.calibrate.statistics import LayerStatistics, StoredCalibration
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.calibrate.windows import check_tokens
from optimum_mla.core.errors import CalibrationDataError, first_line
from optimum_mla.core.progress import progress
from optimum_mla.families.project import SourceAttention
from optimum_mla.io.shards import read_shard, sha256, write_shard
from optimum_mla.models.layer_source import LayerSource

FILE_NAME = "statistics.json"
"""File of a folder of statistics that says what they were gathered from."""
FORMAT = 2
"""Version of that folder's format."""


class CalibrationStatistics:
    """The statistics of all layers of a model, which methods take as `calibration` in place of token ids.

    ```python
    statistics = CalibrationStatistics.gather(model, ids, "statistics")
    smaller = GQA2MLA(kv_cache_ratio=0.25, calibration=CalibrationStatistics.read("statistics"))(model)
    ```

    One layer at a time is read from the folder, and checked against its SHA-256.

    Args:
        folder: The folder that holds them.
        about: The content of its `statistics.json`.

    Attributes:
        folder: The folder.
        data: The origin of the text: `source`, `windows`, `tokens_per_window`, and the `sha256` of the token ids.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.data, self._layers = folder, about["data"], about["layers"]

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def digest(self) -> str:
        """Return a hash of all statistics, of the attention weights and of the text."""
        return hashlib.sha256(json.dumps([self.data, self._layers], sort_keys=True).encode()).hexdigest()

    @classmethod
    @torch.no_grad()
    def gather(
        cls,
        model: PreTrainedModel | GraphModule,
        windows: Tensor,
        folder: str | Path,
        data: dict[str, Any] | None = None,
    ) -> CalibrationStatistics:
        """Gather the statistics of a model's layers, write them to a folder and return them.

        Args:
            model: The model, which is not changed.
            windows: Token ids of the text, [N, L].
            folder: The folder, which is made if it does not exist.
            data: The origin of the text; None describes the token ids.

        Raises:
            InvalidValueError: The windows are no token ids of the model's vocabulary.
            UnsupportedModelError: The model cannot be converted.
        """
        source, place = LayerSource(model), Path(folder)
        check_tokens(windows, source.config.vocab_size)
        place.mkdir(parents=True, exist_ok=True)
        layers = []
        for layer, attention, statistics in _gathered(source, windows):
            file = place / file_name(layer)
            layers.append({"weights": weights_hash(attention), "file": write_shard(file, vars(statistics))})
        found = {
            "source": "token ids",
            "windows": len(windows),
            "tokens_per_window": windows.shape[1],
            "sha256": hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest(),
        }
        about = {"format": FORMAT, "data": data or found, "layers": layers}
        (place / FILE_NAME).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        return cls(place, about)

    @classmethod
    def read(cls, folder: str | Path) -> CalibrationStatistics:
        """Return the statistics that a folder holds.

        Raises:
            CalibrationDataError: It holds none, or they are of a format that this version cannot read.
        """
        path = Path(folder) / FILE_NAME
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CalibrationDataError(
                f"statistics: {folder} holds no statistics ({FILE_NAME}: {first_line(error)}). "
                "Gather some with mla-calibrate."
            ) from error
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise CalibrationDataError(
                f"statistics: {folder} is not of format {FORMAT}, which this version of optimum-mla reads. "
                "Gather them again with mla-calibrate."
            )
        return cls(Path(folder), about)

    def layer(self, index: int, source: SourceAttention) -> StoredCalibration:
        """Return the calibration of one layer.

        Args:
            index: Index of the layer.
            source: The layer's attention.

        Raises:
            CalibrationDataError: The statistics are of a layer with other weights, or their file is damaged.
        """
        if index >= len(self) or self._layers[index]["weights"] != weights_hash(source):
            raise CalibrationDataError(
                f"statistics: {self.folder} was gathered from a model whose attention in layer {index} has other "
                "weights or another dtype. Gather statistics of this model with mla-calibrate, in the same dtype."
            )
        file = self.folder / file_name(index)
        try:
            if sha256(file) != self._layers[index]["file"]:
                raise CalibrationDataError(f"statistics: {file} is damaged. Gather them again with mla-calibrate.")
            return StoredCalibration(source, LayerStatistics(**read_shard(file)))
        except (OSError, SafetensorError) as error:
            raise CalibrationDataError(
                f"statistics: {file} could not be read: {first_line(error)}. Gather them again with mla-calibrate."
            ) from error


def _gathered(source: LayerSource, windows: Tensor) -> Iterator[tuple[int, SourceAttention, LayerStatistics]]:
    walk = CalibrationWalk(source, windows)
    for layer in progress(range(source.num_layers), "statistics: layers", main=True):
        attention = source.attention(layer)
        yield layer, attention, LayerStatistics.gather(walk, attention)
        walk.advance()


def file_name(layer: int) -> str:
    """Return the name of the file that holds the statistics of a layer."""
    return f"layer-{layer:05}.safetensors"


def weights_hash(source: SourceAttention) -> str:
    """Return the SHA-256 of the weights of an attention, in float32, with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(source.module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
