"""The config fields of a converted model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from optimum_mla.core.errors import UnsupportedModelError

MLA_CONFIG_FIELDS: dict[str, tuple[Any, Any]] = {
    "attention_form": (str, "source"),
    "mla_method": (str | None, None),
    "kv_lora_rank": (int, 0),
    "k_lora_rank": (int, 0),
    "v_lora_rank": (int, 0),
    "q_lora_rank": (int | None, None),
    "qk_nope_head_dim": (int, 0),
    "qk_rope_head_dim": (int, 0),
    "num_rope_heads": (int, 1),
    "v_head_dim": (int, 0),
    "num_up_heads": (int, 0),
    "rope_cache": (str, "cached"),
    "latent_norm": (bool, False),
    "latent_bias": (bool, False),
}
"""Type and default of every field that a converted config adds; all but `mla_method` are `MLAGeometry`'s fields."""

SHIM_NAME = "modeling_mla"


class MLAConfigMixin(PreTrainedConfig):
    """Config fields of a converted model, on top of the source family's own.

    The fields are those of `optimum_mla.core.geometry.MLAGeometry`. They hold for every layer unless `per_layer_config`
    (Transformers' own mechanism for layers that differ) says otherwise; a layer whose `attention_form` is `source`
    keeps the attention of the source model. `num_key_value_heads` and `head_dim` stay the source's.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        layers = (kwargs.get("per_layer_config") or {}).values()
        if kwargs.get("channel_bits") or any("channel_bits" in layer for layer in layers):
            raise UnsupportedModelError(
                "model: its weights were converted for codes by an older version. Convert its source again with "
                "mla-convert --cache-budget, which leaves the weights alone and loses less."
            )
        quantization = kwargs.get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("quant_method") in ("mla_hqq", "mla_quanto"):
            raise UnsupportedModelError(
                "model: its weights were quantized with HQQ or Quanto by an older version. Run mla-quantize --weights "
                "bnb-nf4 or bnb-int8 on the unquantized model."
            )
        super().__post_init__(**kwargs)
        prefix = type(self).__name__.removesuffix("MLAConfig")
        # Lets `trust_remote_code=True` load the folder where optimum-mla is installed but was not imported.
        self.auto_map = {
            "AutoConfig": f"{SHIM_NAME}.{prefix}MLAConfig",
            "AutoModel": f"{SHIM_NAME}.{prefix}MLAModel",
            "AutoModelForCausalLM": f"{SHIM_NAME}.{prefix}MLAForCausalLM",
        }

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: Transformers would save this package's module with the config, in the place of the few lines."""

    @property
    def qk_head_dim(self) -> int:
        """Return n + R; Transformers takes it as the sign of latent attention when it sizes static caches."""
        layer = self.per_layer_config[0]
        return (layer.qk_nope_head_dim + layer.qk_rope_head_dim) or layer.head_dim
