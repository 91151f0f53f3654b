"""A model as a command finds it: its place, config, tokenizer, weights and origin.

Bad input becomes an error that says what to do.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from optimum_mla.core.errors import (
    CorruptWeightsError,
    UnreadableModelError,
    UnsupportedModelError,
    VerificationError,
)
from optimum_mla.families.guess import spec_source
from optimum_mla.io.faults import has_tokenizer
from optimum_mla.io.reading import local_folder, reading
from optimum_mla.models import family_of, is_converted
from optimum_mla.models.coded import has_codec
from optimum_mla.models.registry import try_family
from optimum_mla.models.wrappers import wrapper_of
from optimum_mla.pipeline.placement import check_dtype, layers_on_disk, usable_device

logger = logging.getLogger(__name__)

SIZES = {
    "num_hidden_layers": 2**16,
    **dict.fromkeys(("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"), 2**31 - 1),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), 2**63 - 1),
}
"""Fields of configs that are sizes, which Transformers does not check, and the largest value of each."""
RESIDENT_BYTES = 10**9
"""Models with more weights are read one layer at a time where a command can do that."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model as the user named it. A command makes it once and hands it on.

    Attributes:
        location: What is loaded: a hub id or a folder.
        hub: Keyword arguments for loading it: `revision`, `cache_dir`, `token`, `trust_remote_code`.
        shown_as: Its name in reports and model cards if that is not `location`.
        recorded_sha256: SHA-256 of its config when it was converted, or None where that is unknown.
    """

    location: str
    hub: dict[str, Any] = field(default_factory=dict)
    shown_as: str | None = None
    recorded_sha256: str | None = None

    @classmethod
    def of(cls, model: str, hub: dict[str, Any] | None) -> Checkpoint:
        """Return the model of a command, without the keyword arguments that the user did not give."""
        return cls(model, {name: value for name, value in (hub or {}).items() if value is not None})

    @property
    def name(self) -> str:
        """Return the name for reports and model cards."""
        return self.shown_as or self.location

    @property
    def folder(self) -> Path | None:
        """Return the folder of the model, or None for a hub id."""
        return Path(self.location) if Path(self.location).is_dir() else None

    def beside(self, location: str, revision: str | None = None, **about: Any) -> Checkpoint:
        """Return another model that is loaded in the same way as this one, but for its revision.

        Args:
            location: A hub id or a folder.
            revision: Branch, tag or commit on the hub, or None for the main branch.
            **about: `shown_as` and `recorded_sha256`.
        """
        rest = {name: value for name, value in self.hub.items() if name != "revision"}
        return Checkpoint(location, rest if revision is None else {**rest, "revision": revision}, **about)

    def is_same(self, other: Checkpoint) -> bool:
        """Return whether both lead to the same folder, or to the same revision of the same hub id."""
        if self.folder is not None and other.folder is not None:
            return self.folder.samefile(other.folder)
        return (self.location, self.hub.get("revision")) == (other.location, other.hub.get("revision"))

    @cached_property
    def config(self) -> PreTrainedConfig:
        """Return the config of any model.

        Raises:
            UnreadableModelError: It is not found, does not load, is not of a model that Transformers knows, or has a
                size that no model has.
        """
        with reading("config", self.location, self.hub):
            config = AutoConfig.from_pretrained(self.location, **self.hub)
        inner = vars(config.get_text_config())
        for name, most in SIZES.items():
            size = inner.get(name)
            if isinstance(size, int) and not 1 <= size <= most:
                raise UnreadableModelError(
                    f"model: the config.json of {self.location} says {name}: {size}, allowed: integers from 1 to "
                    f"{most}. Take the config that belongs to the weights."
                )
        return config

    def source_config(
        self, guess_family: bool = False, wrapped: bool = False, quantized: bool = False
    ) -> PreTrainedConfig:
        """Return the config of a model that can be converted.

        Args:
            guess_family: Whether a family that is not known is registered as its names suggest.
            wrapped: Whether it may be a wrapper around a language model, whose config is then returned.
            quantized: Whether its weights may be quantized.

        Raises:
            UnsupportedModelError: Not found, not a supported decoder LM, converted already, or quantized.
        """
        config = self.config
        inner = config.text_config if wrapped and wrapper_of(config) is not None else config
        if is_converted(inner):
            raise UnsupportedModelError(
                f"model: {self.location} is converted already. Convert the model that it was made from."
            )
        if getattr(config, "quantization_config", None) is not None and not quantized:
            raise UnsupportedModelError(
                f"model: the weights of {self.location} are quantized. Convert the unquantized model."
            )
        spec = try_family(inner) if guess_family else None
        if spec is not None:
            logger.warning(
                "%s is described by its names alone. If the conversion passes, register this to load the result: %s",
                config.model_type,
                spec_source(spec),
            )
        family_of(inner)
        return config

    def converted_config(self, coded: bool = False) -> PreTrainedConfig:
        """Return the config of a converted model.

        Args:
            coded: Whether it may also be a source with a codec beside its weights.

        Raises:
            UnsupportedModelError: Not found, or not converted.
        """
        config = self.config
        if coded and has_codec(config):
            return config
        if is_converted(getattr(config, "text_config", None)):
            raise UnsupportedModelError(
                f"model: {self.location} is a wrapper around a converted language model. Extract that model with "
                "optimum_mla.models.language_model, as docs/families.md shows, and give it here."
            )
        if not is_converted(config):
            if has_codec(config):
                raise UnsupportedModelError(
                    f"model: {self.location} has the weights of its source, and a codec beside them. Quantize and "
                    "export it as any model, or run mla-convert --kv-cache-ratio for converted weights."
                )
            raise UnsupportedModelError(
                f"model: {self.location} is not converted. Run optimum-cli mla-convert --kv-cache-ratio 0.5 on it "
                "first."
            )
        return config

    def load(
        self,
        dtype: str = "auto",
        device: str | None = None,
        offload: Path | None = None,
        kind: Any = AutoModelForCausalLM,
        config: PreTrainedConfig | None = None,
        **more: Any,
    ) -> PreTrainedModel:
        """Return the model in evaluation mode, on its device.

        Args:
            dtype: One of `DTYPES`.
            device: Torch device; None takes CUDA where it is available.
            offload: A folder for weights that are in files from which no layer can be read alone. With it, layers stay
                on the disk until they are used, if the model is of a supported family and has more than
                `RESIDENT_BYTES`.
            kind: The Auto class of the model.
            config: A config to take instead of the checkpoint's own.
            **more: Further keyword arguments of `from_pretrained`.

        Raises:
            InvalidValueError: There is no such dtype or device here.
            UnreadableModelError: Its weights or its generation config do not load.
            CorruptWeightsError: Weights are missing, or their shapes are not those of the config.
        """
        config = config or self.config
        check_dtype(dtype)
        place = usable_device(device)
        if self.folder is not None and (self.folder / "generation_config.json").exists():
            # Transformers passes over one that is no JSON, without a word.
            with reading("generation config", self.location, self.hub):
                GenerationConfig.from_pretrained(self.location)
        spread: dict[str, Any] = {}
        quantized = getattr(config, "quantization_config", None) is not None
        if "quantization_config" in more:  # Weights are quantized where they are loaded.
            spread = {"device_map": {"": str(place)}}
        elif offload is not None and not quantized and self._expected_bytes(config, dtype) > RESIDENT_BYTES:
            spread = {"device_map": layers_on_disk(config, place), "offload_folder": str(offload)}
        try:
            with reading("weights", self.location, self.hub):
                # Weights of other shapes are refused below, where their names are known.
                how = {"output_loading_info": True, "ignore_mismatched_sizes": True, **spread, **self.hub, **more}
                loaded, notes = kind.from_pretrained(self.location, config=config, dtype=dtype, **how)
                loaded = loaded.eval() if spread else loaded.to(place).eval()
        except UnreadableModelError as error:
            if not isinstance(error.__cause__, OSError):
                self._skeleton(config, kind)
            raise
        self._check_complete(notes)
        return loaded

    def _check_complete(self, notes: dict[str, Any]) -> None:
        """Refuse weights that are not those of the config, and tell which ones were left out.

        Raises:
            CorruptWeightsError: Weights are missing, or their shapes are not those of the config.
        """
        if others := sorted(notes["mismatched_keys"]):
            name, found, wanted = others[0]
            raise CorruptWeightsError(
                f"model: {len(others)} weights of {self.location} have other shapes than its config.json says, such as "
                f"{name}: {tuple(found)} in the checkpoint, {tuple(wanted)} by the config. Take both from the same "
                "model."
            )
        if missing := sorted(notes["missing_keys"]):
            # Transformers fills them with random numbers.
            raise CorruptWeightsError(
                f"model: the checkpoint of {self.location} lacks {len(missing)} weights of its config, such as "
                f"{missing[0]}."
            )
        if left_out := sorted(notes["unexpected_keys"]):
            logger.warning(
                "warning: the checkpoint of %s holds %d tensors that its config does not declare, and the result will "
                "not have them: %s%s.",
                self.location,
                len(left_out),
                ", ".join(left_out[:8]),
                " and others" if len(left_out) > 8 else "",
            )

    def tokenizer(self, needed: bool) -> Any:
        """Return the tokenizer of a model, or None where nothing needs it and there is none that loads.

        A tokenizer that is there and does not load is told in one line on standard error.

        Raises:
            UnsupportedModelError: It is needed, and there is none or it does not load.
        """
        if self.folder is not None and not has_tokenizer(self.folder):
            # Transformers makes an empty one for some families.
            if not needed:
                return None
            raise UnsupportedModelError(
                f"model: {self.location} has no tokenizer, which text needs. Put the files of its tokenizer (such as "
                "tokenizer.json and tokenizer_config.json) into the folder."
            )
        try:
            with reading("tokenizer", self.location, self.hub):
                return AutoTokenizer.from_pretrained(self.location, **self.hub)
        except UnreadableModelError as error:
            if needed:
                raise
            downloaded = local_folder(self.location, self.hub)
            if downloaded is None or has_tokenizer(downloaded):
                logger.warning("warning: %s The run goes on without a tokenizer.", error)
            return None

    def check_buildable(self) -> None:
        """Refuse a config that no model can be made of (sizes of zero, unknown names); it takes no memory for weights.

        Raises:
            UnreadableModelError: What the model's class says about the config.
        """
        self._skeleton(self.config)

    def _skeleton(self, config: PreTrainedConfig, kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
        """Return a model of a config without weights.

        Raises:
            UnreadableModelError: What the model's class says about the config.
        """
        with reading("config", self.location, self.hub), torch.device("meta"):
            return kind.from_config(config, trust_remote_code=self.hub.get("trust_remote_code"))  # type: ignore[no-any-return]

    def _expected_bytes(self, config: PreTrainedConfig, dtype: str) -> int:
        """Return the bytes of a model's weights in a dtype, by its config; errors are those of `_skeleton`."""
        wide = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
        numbers = sum(parameter.numel() for parameter in self._skeleton(config).parameters())
        return numbers * (wide or torch.float32).itemsize

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of the model card, such as the licence; empty where there is none that can be read."""
        from huggingface_hub import hf_hub_download, metadata_load

        card = Path(self.location) / "README.md"
        try:
            if self.folder is None:
                known = {name: self.hub[name] for name in ("revision", "cache_dir", "token") if name in self.hub}
                card = Path(hf_hub_download(self.location, "README.md", **known))
            return metadata_load(card) or {}
        except Exception:  # The hub, the network and YAML raise errors of many unrelated types. A card is never needed.
            return {}


def load_written(
    folder: Path, output: Path, device: str | None, offload: Path | None = None, kind: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """Return the model that a command has just written, as a user would load it; see `Checkpoint.load`.

    Args:
        folder: The temporary folder that holds it.
        output: The folder that it is to become, which errors name.
        device, offload, kind: As for `Checkpoint.load`.

    Raises:
        VerificationError: It does not load, or weights are missing.
    """
    written = str(folder)
    try:
        return Checkpoint(written).load("auto", device, offload, kind)
    except (UnreadableModelError, CorruptWeightsError) as error:
        raise VerificationError(f"verify: {str(error).replace(written, str(output))}") from error
