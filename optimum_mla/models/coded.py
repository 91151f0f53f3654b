"""Models that are their source to the last bit, and whose `generate` keeps old tokens as codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import cached_file

from optimum_mla.cache.codec_layer import CodecCache
from optimum_mla.core.errors import MLAError, UnsupportedModelError, first_line
from optimum_mla.models.codec import CODEC_FILE, ModelCodec
from optimum_mla.stack import CACHE_ARGUMENT

CONFIG_ENTRY = "latent_codec"
"""Field of a config.json that names the file of the codec beside the weights."""
SHIM_NAME = "modeling_latent_codec"
SHIM = '''\
"""Loads this model by its own class in Transformers, with the codec of its cache from optimum-mla.

Where `import optimum_mla` stands before `from_pretrained`, this file is not run, and nothing has to be trusted. With
`trust_remote_code=True` it is run instead. With neither, the model is loaded without its codec.
"""

from optimum_mla.models.coded import coded_loader

CodedForCausalLM = coded_loader("{model_type}")
'''
"""The module that `auto_map` points at."""
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Keyword arguments of `from_pretrained` that say where files are, and that the file of the codec needs too."""

logger: Any = logging.get_logger(__name__)
M = TypeVar("M", bound=PreTrainedModel)


def has_codec(config: PreTrainedConfig) -> bool:
    """Return whether the config is of a source with a codec beside its weights."""
    return getattr(config, CONFIG_ENTRY, None) is not None


class CodedGeneration(PreTrainedModel):
    """Gives a source's own model class a codec, which `generate` uses where no other cache is chosen.

    Attributes:
        latent_codec: The codec of the layers with full attention.
    """

    latent_codec: ModelCodec

    def make_cache(self, offloading: bool = False) -> CodecCache:
        """Return an empty cache in which old tokens become codes, for this model.

        Args:
            offloading: Keep the layers on the CPU between their turns (CUDA only).
        """
        return self.latent_codec.make_cache(self, offloading)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Prepare a `CodecCache` where no cache is given or chosen, and what was chosen otherwise."""
        chosen = generation_config.cache_implementation
        given = model_kwargs.get(CACHE_ARGUMENT) is not None or generation_config.use_cache is False
        if not given and chosen not in (None, "offloaded"):
            said = "cache_implementation=%s is a cache of Transformers' own: it does not use the codec of this model."
            logger.warning_once(said % repr(chosen))
        if given or chosen not in (None, "offloaded"):
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            return
        model_kwargs[CACHE_ARGUMENT] = self.make_cache(offloading=chosen == "offloaded")

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model as Transformers does, with its codec beside the weights and named in the config."""
        pushed, folder = kwargs.pop("push_to_hub", False), Path(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)
        # Other processes write nothing, and adapters are saved without the config of their model.
        if kwargs.get("is_main_process", True) and (folder / "config.json").is_file():
            self.latent_codec.save(folder)
            name_codec(folder)
        if pushed:  # After the codec is there: this saves to a folder of its own, by this method, and uploads that.
            names = ("commit_message", "create_pr", "private", "revision", "token")
            self.push_to_hub(kwargs.get("repo_id", folder.name), **{n: kwargs[n] for n in names if n in kwargs})

    def __reduce__(self) -> Any:
        """Pickle the model as its source class and its codec, because this class is made when it is needed."""
        return _restored, (type(self).__bases__[1], self.__dict__)


def with_codec(model: M, codec: ModelCodec) -> M:
    """Give a model a codec in place, and return it.

    Its weights and what it computes stay as they are. `generate` keeps old tokens as codes from then on, unless it is
    given a cache or a `cache_implementation`; `make_cache` makes such a cache for loops of one's own.

    Args:
        model: A causal language model as Transformers loads it, in any dtype, with plain or quantized weights.
        codec: A codec that was fitted to this model or to another copy of it.

    Raises:
        UnsupportedModelError: It is another model, or no model of Transformers, such as one that PEFT has wrapped.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"model: got a {type(model).__name__}, allowed: a model of Transformers. Of a model that PEFT has wrapped, "
            "give what get_base_model() returns."
        )
    codec.check(model)
    if not isinstance(model, CodedGeneration):
        model.__class__ = _coded_class(type(model))
    model.latent_codec = codec  # type: ignore[assignment]
    return model


def without_codec(model: M) -> M:
    """Take the codec from a model in place, and return it as it was before `with_codec`."""
    if isinstance(model, CodedGeneration):
        model.__class__ = type(model).__bases__[1]
        del model.__dict__["latent_codec"]
    entries = vars(model.config)
    entries.pop(CONFIG_ENTRY, None)
    if SHIM_NAME in str(entries.get("auto_map")):
        del entries["auto_map"]
    return model


def load_codec(model: M, path: str | Path, **hub: Any) -> M:
    """Give a model the codec that lies in a folder or in a repository of the hub, in place, and return it.

    ```python
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
    model = optimum_mla.load_codec(model, "my-codec")
    ```

    Args:
        model: See `with_codec`.
        path: A folder that `mla-convert` wrote, with or without `--codec-only`, or a hub id.
        **hub: Keyword arguments of `from_pretrained` that say where files are, such as `revision` and `token`.

    Raises:
        UnreadableModelError: There is no such file, or it is damaged.
        UnsupportedModelError: The codec was fitted to another model.
    """
    return with_codec(model, ModelCodec.load(_folder(str(path), hub)))


def name_codec(folder: Path) -> None:
    """Name the codec that lies in the folder of a model in its config.json, so that it is loaded with the model.

    Nothing else in the file changes, but for the entry of a module of a few lines that `trust_remote_code=True` runs.
    """
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields[CONFIG_ENTRY] = CODEC_FILE
    shim = SHIM.format(model_type=fields["model_type"])
    fields["auto_map"] = {"AutoModelForCausalLM": f"{SHIM_NAME}.CodedForCausalLM", **fields.get("auto_map", {})}
    (folder / f"{SHIM_NAME}.py").write_text(shim, encoding="utf-8")
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if weights.is_file() and not index.exists():
        # Engines read every file of tensors in a folder, unless an index says which ones hold the weights.
        with safe_open(weights, framework="pt") as file:
            content = {"metadata": {}, "weight_map": dict.fromkeys(sorted(file.keys()), weights.name)}
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _folder(path: str, hub: dict[str, Any]) -> Path:
    """Return the folder that holds the codec of a model, downloaded where it is on the hub."""
    if Path(path).is_dir():
        return Path(path) / hub.get("subfolder", "")
    try:
        found = cached_file(path, CODEC_FILE, **hub)
    except OSError:
        found = None
    return Path(path) if found is None else Path(found).parent  # `ModelCodec.load` says what it does not find.


_CODED: dict[type[Any], type[CodedGeneration]] = {}
"""The classes of models that have a codec, by those of their sources."""


def _coded_class(source: type[Any]) -> type[CodedGeneration]:
    """Return the class of models of a source class that have a codec. It has the source's name, as saved configs do."""
    fields = {"__module__": source.__module__, "__qualname__": source.__qualname__, "__doc__": source.__doc__}
    if source not in _CODED:
        _CODED[source] = type(source.__name__, (CodedGeneration, source), fields)
    return _CODED[source]


def _restored(source: type[PreTrainedModel], state: dict[str, Any]) -> PreTrainedModel:
    made = _coded_class(source)
    model = made.__new__(made)
    model.__dict__.update(state)
    return model


def register_source(config: type[PreTrainedConfig], source: type[PreTrainedModel]) -> None:
    """Let `AutoModelForCausalLM` give models of a source class their codec, where their config names one.

    A model whose config names none is loaded by its own class, as if this package were not there.
    """

    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = source.from_pretrained(name, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if has_codec(model.config):
            try:
                load_codec(model, name, **{key: kwargs[key] for key in HUB_KEYWORDS if key in kwargs})
            except (MLAError, RuntimeError) as error:  # Weights on several devices may refuse the check.
                said = first_line(error)
                logger.warning("warning: %s The model is loaded without its codec, so its cache is not coded.", said)
        return loaded

    def from_config(cls: Any, config: Any, **kwargs: Any) -> Any:
        return source._from_config(config, **kwargs)

    fields: dict[str, Any] = {"__module__": source.__module__, "__qualname__": source.__qualname__}
    fields |= {
        "__doc__": source.__doc__,
        "from_pretrained": classmethod(from_pretrained),
        "_from_config": classmethod(from_config),
    }
    _LOADERS[config.model_type] = type(source.__name__, (source,), fields)
    AutoModelForCausalLM.register(config, _LOADERS[config.model_type], exist_ok=True)


_LOADERS: dict[str, type[PreTrainedModel]] = {}
"""The classes that load models with their codecs, by the `model_type`."""


def coded_loader(model_type: str) -> type[PreTrainedModel]:
    """Return the class whose `from_pretrained` loads a model of a type with its codec.

    Raises:
        UnsupportedModelError: The family is not registered.
    """
    if model_type not in _LOADERS:
        raise UnsupportedModelError(f"model_type: got {model_type!r}, allowed: {', '.join(sorted(_LOADERS))}")
    return _LOADERS[model_type]
