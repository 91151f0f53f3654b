"""The parameters of a converted model that train, and the whole state of a sharded one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from optimum_mla.core.errors import InvalidValueError, MissingDependencyError, UnsupportedModelError
from optimum_mla.core.layers import LayerChoice, parse_layers
from optimum_mla.core.number_checks import check_count
from optimum_mla.core.suggestions import did_you_mean
from optimum_mla.models.coded import CodedGeneration
from optimum_mla.models.family_table import family_of, is_converted
from optimum_mla.nn import LatentAttention
from optimum_mla.nn.projections import LATENT_PROJECTIONS
from optimum_mla.weights import quantized_by

if TYPE_CHECKING:
    from peft import LoraConfig

TRAIN_CHOICES = ("lora", "dora", "kv", "attention", "full")
ADAPTERS = ("lora", "dora")


def kv_projections(model: Any, layers: LayerChoice = "all") -> dict[str, nn.Module]:
    """Return the linear layers that make keys and values, by name.

    In converted layers they are those that write or read a latent, and in layers whose cache a codec codes the source's
    own: one for keys and one for values, or the one that makes queries too.

    Args:
        model: A converted model, or one with a codec.
        layers: Layers to take, in the forms that a conversion accepts.

    Raises:
        UnsupportedModelError: The model is neither, or none of the chosen layers is.
        InvalidValueError: The model does not have the chosen layers.
    """
    coded = isinstance(model, CodedGeneration)
    if not coded and not (isinstance(model, PreTrainedModel) and is_converted(model.config)):
        raise UnsupportedModelError("model: it is not converted. Run optimum-cli mla-convert on it first.")
    config = model.config
    chosen = parse_layers(layers, config.num_hidden_layers)
    if coded:
        spec = family_of(config).spec
        names = [spec.key, spec.value] if spec.fused is None else [spec.fused]
        coded_layers = [index for index in chosen if index in model.latent_codec.layers]
        if not coded_layers:
            raise UnsupportedModelError(f"layers: none of {layers} has codes. Choose layers that have.")
        paths = [f"{spec.attention_path(index)}.{name}" for index in coded_layers for name in names]
        return {path: model.get_submodule(path) for path in paths}
    found = {
        f"{path}.{name}": projection
        for path, attention in model.named_modules()
        if isinstance(attention, LatentAttention) and attention.layer_idx in chosen
        for name, projection in attention.named_children()
        if name in LATENT_PROJECTIONS
    }
    if not found:
        raise UnsupportedModelError(f"layers: none of {layers} is converted. Choose converted layers.")
    return found


def kv_parameters(model: nn.Module, layers: LayerChoice = "all") -> Iterator[nn.Parameter]:
    """Yield the parameters of what `kv_projections` returns, as TransMLA trains them (arXiv 2502.07864v1, 5.2)."""
    for module in kv_projections(model, layers).values():
        yield from module.parameters()


def mla_lora_config(
    model: nn.Module, rank: int = 32, alpha: float | None = None, layers: LayerChoice = "all", **options: Any
) -> LoraConfig:
    """Return a PEFT `LoraConfig` that targets what `kv_projections` returns and nothing else.

    Args:
        model: A converted model, or one with a codec.
        rank: Rank of the adapters.
        alpha: Numerator of their scale alpha/rank; None takes twice the rank.
        layers: Layers to take, in the forms that a conversion accepts.
        options: Further fields of `LoraConfig`, such as `use_dora` or `lora_dropout`.

    Raises:
        MLAError: The model or a layer is not converted, PEFT is not installed, or the rank is out of range.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingDependencyError("peft", "train", "train adapters") from error
    targets = list(kv_projections(model, layers))
    check_count("lora_rank", rank, 1, model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=targets,
        **options,
    )


def prepare(
    model: PreTrainedModel,
    train: str = "lora",
    layers: LayerChoice = "all",
    lora_rank: int = 32,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
) -> Any:
    """Make the chosen parameters of a model train and freeze all others.

    Args:
        model: A converted model, or one with a codec; changed in place.
        train: `lora` or `dora` (adapters on what `kv_projections` returns), `kv` (those projections themselves),
            `attention` (all of the attention of the chosen layers, converted or not) or `full` (everything).
        layers: Layers that train, in the forms that a conversion accepts; `full` takes only `all`.
        lora_rank: Rank of the adapters.
        lora_alpha: Numerator of their scale; None takes twice the rank.
        lora_dropout: Dropout in the adapters.

    Returns:
        The model; with adapters, a `PeftModel` around it.

    Raises:
        MLAError: The model is not converted, or it cannot be trained in this way.
    """
    if train not in TRAIN_CHOICES:
        raise InvalidValueError("train", train, ", ".join(TRAIN_CHOICES), did_you_mean(train, TRAIN_CHOICES))
    kv_projections(model, layers)  # raises if there are none
    if train in ADAPTERS:
        config = mla_lora_config(
            model, lora_rank, lora_alpha, layers, lora_dropout=lora_dropout, use_dora=train == "dora"
        )
        from peft import get_peft_model

        return get_peft_model(model, config)
    if (method := quantized_by(model.config)) is not None:
        raise InvalidValueError(
            "train", train, ", ".join(ADAPTERS), f"The model's weights are quantized ({method}) and cannot train."
        )
    if train == "full":
        if layers != "all":
            raise InvalidValueError("layers", layers, "all with train full")
        return model.requires_grad_(True)
    model.requires_grad_(False)
    if train == "kv":
        for parameter in kv_parameters(model, layers):
            parameter.requires_grad_(True)
        return model
    spec = family_of(model.config).spec
    for index in parse_layers(layers, model.config.num_hidden_layers):
        model.get_submodule(spec.attention_path(index)).requires_grad_(True)
    return model


def parameter_counts(model: Any) -> tuple[int, int]:
    """Return the number of parameters that train, and of all; tied ones count once, bitsandbytes' as unpacked."""
    return model.num_parameters(only_trainable=True), model.num_parameters()


def full_state(model: nn.Module) -> dict[str, Any] | None:
    """Return the whole state of a model that is sharded over processes, which all have to call this.

    Returns:
        All tensors on the CPU in the first process, and an empty dictionary in the others. None if the model is not
        sharded.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
