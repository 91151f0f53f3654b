"""The folder of a conversion or a fit that is under way, from which an interrupted one goes on."""

from __future__ import annotations

import logging
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from optimum_mla.convert.record import LayerResult, Record
from optimum_mla.convert.run import Run
from optimum_mla.core.errors import MLAError, OptionError, OutputError, UnreadableModelError, VerificationError
from optimum_mla.io.folder import as_output_error, kept_folder, make_parents
from optimum_mla.io.journal import Journal, as_json, differing_names
from optimum_mla.io.shards import data_bytes, place_shards, read_shard, sha256, write_shard
from optimum_mla.models.classes import is_tied
from optimum_mla.nn import LatentAttention
from optimum_mla.pipeline.checkpoint import RESIDENT_BYTES
from optimum_mla.pipeline.origin import origin_of
from optimum_mla.pipeline.placement import usable_device
from optimum_mla.pipeline.preparation import ConversionRequest

logger = logging.getLogger(__name__)

VERSIONED = ("optimum-mla", "torch", "transformers")
"""Packages whose versions are among the options of a conversion."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".json")
"""Files of a checkpoint by which an interrupted conversion tells its source from another."""
FAILED_CHECK = "failed check"
"""Key of the journal under which it says which check of the result failed."""


U = TypeVar("U", bound="Unfinished")


class Unfinished(Record):
    """Keeps what a run finds in a hidden folder beside its output, with a journal.

    It is a context. When it ends well, the folder is deleted. When it is interrupted, or a file cannot be read or
    written, the folder stays, and a conversion with the same options goes on where it was. When the result fails a
    check, the folder stays as well, and another version of the software may go on, since the fault may be the
    software's.

    Args:
        output: The folder that the conversion will write.
        options: All that the result depends on, by name.
        resume: Whether to go on with the unfinished conversion, if there is one.
        overwrite: Whether to start anew if there is one.

    Attributes:
        folder: The hidden folder.
        unit: What is kept of each layer, in the plural.

    Raises:
        OutputError: There is an unfinished conversion, and neither `resume` nor `overwrite` says what to do with it.
        OptionError: The unfinished conversion has other options.
    """

    unit = "fitted layers"

    def __init__(self, output: Path, options: dict[str, Any], resume: bool, overwrite: bool) -> None:
        self.output, self.folder = output, kept_folder("mla-convert", output)
        self._start = time.monotonic()
        self._above = make_parents(output)
        self._path, self._options = self.folder / "journal.jsonl", options
        entries = Journal(self._path).entries
        if resume and entries:
            self._check_options(entries)
        elif not overwrite and len(entries) > 1:
            raise OutputError(
                f"output: an unfinished conversion to {output} lies in {self.folder}. Go on with it by --resume, or "
                "start anew by --overwrite."
            )
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self: U) -> U:
        self._above.__enter__()
        try:
            with as_output_error(self.output):
                self.folder.mkdir(exist_ok=True)
                for left in self.folder.iterdir():
                    if left.is_dir():  # of a process that was killed while it wrote the result
                        shutil.rmtree(left)
                self._journal = Journal(self._path)
                if not self._journal.entries:
                    self._journal.add("options", self._options)
        except BaseException as error:
            self._above.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        journal = Journal(self._path)  # Read again, because an interruption may come after the write.
        kept = sum(key.startswith("layer ") for key in journal.entries)
        # Any other error of ours would come again.
        mendable = OutputError | UnreadableModelError | VerificationError
        passing = not isinstance(error, MLAError) or isinstance(error, mendable)
        if error is None or not passing or len(journal.entries) < 2:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._above.__exit__(kind, error, trace)
            return
        self._above.__exit__(kind, error, trace)
        if isinstance(error, VerificationError):
            journal.add(FAILED_CHECK, str(error))
            raise VerificationError(
                f"{error} Nothing was written to {self.output}. {kept} {self.unit} are kept in "
                f"{self.folder}: the same command with --resume goes on with them, also under other versions of "
                f"{', '.join(VERSIONED)}; --overwrite starts anew."
            ) from error
        logger.warning("kept: %d %s. The same command with --resume goes on.", kept, self.unit)

    def _check_options(self, entries: dict[str, Any]) -> None:
        there, here = entries.get("options", {}), as_json(self._options)
        names = differing_names(there, self._options)
        if FAILED_CHECK in entries:
            for name in [name for name in names if name in VERSIONED]:
                names.remove(name)
                logger.warning("warning: what was kept was made with %s %s; this is %s.", name, there[name], here[name])
        if names:
            said = "; ".join(f"{name} is {here.get(name)!r} and was {there.get(name)!r}" for name in names)
            raise OptionError(
                f"--resume: the unfinished conversion to {self.output} was another one: {said}. Give the options and "
                "the files that it had, or start anew with --overwrite instead of --resume."
            )

    @property
    def seconds(self) -> float:
        """Return the seconds that what is kept took, those of interrupted runs included."""
        kept = [entry for entry in self._journal.entries.values() if isinstance(entry, dict) and "seconds" in entry]
        return max((entry["seconds"] for entry in kept), default=0.0)

    @property
    def bytes(self) -> int:
        """Return the bytes of the kept layers."""
        return sum(path.stat().st_size for path in self.folder.glob("layer-*.safetensors"))

    def known(self, key: str) -> Any:
        """Return the value that was kept under a key, or None."""
        return self._journal.entries.get(key)

    def keep(self, key: str, value: Any) -> None:
        """Keep a value under a key."""
        self._journal.add(key, value)

    def file(self, name: str) -> Path:
        """Return the file of the tensors of a name."""
        kind, number = name.split()
        return self.folder / f"{kind}-{int(number):05}.safetensors"

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """Return the tensors that were kept under a name; None if they were not, or are not as they were written."""
        if self.known(name) is None:
            return None
        if not self._whole(name):
            logger.warning("warning: %s is not as it was written; it is made again.", self.file(name))
            return None
        return read_shard(self.file(name))

    def keep_tensors(self, name: str, tensors: dict[str, Tensor], **said: Any) -> None:
        """Keep tensors under a name, which is a word and a number, with what else `known` is to say of them."""
        with as_output_error(self.output):
            digest = write_shard(self.file(name), tensors)
        self.keep(name, {"sha256": digest, **said, "seconds": self.seconds + time.monotonic() - self._start})
        self._start = time.monotonic()

    def drop_tensors(self, name: str) -> None:
        """Keep the tensors of a name no longer, if there are any."""
        self.keep(name, None)
        with as_output_error(self.output):
            self.file(name).unlink(missing_ok=True)

    def _whole(self, name: str) -> bool:
        entry, path = self.known(name), self.file(name)
        return entry is not None and path.is_file() and sha256(path) == entry["sha256"]


class UnfinishedConversion(Unfinished):
    """Keeps the layers and the choices of a conversion of weights; see `Unfinished`."""

    unit = "converted layers and all choices"

    def layer(self, index: int) -> tuple[dict[str, Tensor], LayerResult] | None:
        """Return the tensors of a layer's converted attention and its result; None if it was not kept, or not whole."""
        entry = self.known(f"layer {index}")
        if entry is None or entry["result"] is None:
            return None
        path = self.shard(index)
        if not self._whole(f"layer {index}"):
            logger.warning("warning: %s is not as it was written; its layer is converted again.", path)
            return None
        return read_shard(path, entry["attention"]), LayerResult.from_dict(entry["result"])

    def shard(self, index: int) -> Path:
        """Return the file of a layer."""
        return self.file(f"layer {index}")

    def write_layer(self, run: Run, index: int, attention: LatentAttention | None) -> None:
        """Write a layer of the converted model with its new attention or its own, unless it was kept already."""
        spec = run.family.spec
        if self._whole(f"layer {index}"):
            return
        path = f"{spec.layer_path(index)}."
        tensors = run.source.layer(index).state_dict(prefix=path)
        if attention is not None:
            prefix = f"{spec.attention_path(index)}."
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
            tensors |= attention.state_dict(prefix=prefix)
        result = run.results[index].to_dict() if index in run.results else None
        self.keep_tensors(f"layer {index}", tensors, attention=f"{spec.attention_path(index)}.", result=result)


def made_from(asked: ConversionRequest, data: dict[str, dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
    """Return all that the result of a conversion depends on, by name, as JSON can hold it."""
    source, files = asked.source, {}
    if source.folder is not None:
        kept = (path for path in sorted(source.folder.iterdir()) if path.suffix in WEIGHT_SUFFIXES)
        files = {f"file {path.name}": [path.stat().st_size, path.stat().st_mtime_ns] for path in kept}
    return {
        "model": source.name,
        **origin_of(source),
        **files,
        **{name: version(name) for name in VERSIONED},
        **{name: getattr(asked, name) for name in ("method", "dtype", "seed")},
        "device": str(usable_device(asked.device)),  # Sums of different devices must not be mixed.
        "calibration data (SHA-256)": data.get("calibration-data", {}).get("sha256"),
        "statistics (SHA-256)": data.get("calibration-data", {}).get("statistics"),
        **options,
    }


def weights_outside_layers(run: Run) -> dict[str, Tensor]:
    """Return the weights of a model that belong to no layer, by their names in it: embedding, last norm and head."""
    spec, source = run.family.spec, run.source
    parts = {f"{spec.base}.{spec.embedding}": source.embedding, f"{spec.base}.{spec.norm}": source.final_norm()}
    if not is_tied(source.model):
        parts[spec.head] = source.head()
    return {name: tensor for path, part in parts.items() for name, tensor in part.state_dict(prefix=f"{path}.").items()}


def write_model(run: Run, unfinished: UnfinishedConversion, folder: Path) -> None:
    """Write the converted model, all of whose layers are kept, as a checkpoint into an empty folder.

    Models of at most `RESIDENT_BYTES` become a single file; others have a file for each layer.
    """
    config = run.converted_config()
    config.tie_word_embeddings = is_tied(run.source.model)
    with torch.device("meta"):
        model = run.family.model(config).to(run.source.dtype)
    model.generation_config = run.source.model.generation_config
    weights = weights_outside_layers(run)
    shards = [unfinished.shard(layer) for layer in range(run.source.num_layers)]
    if sum(data_bytes(shard) for shard in shards) <= RESIDENT_BYTES:
        for shard in shards:
            weights |= read_shard(shard)
        shards = []
    model.save_pretrained(folder, state_dict=weights)
    if shards:
        outside = folder / "model.safetensors"
        place_shards([outside, *shards], folder)
        outside.unlink()
