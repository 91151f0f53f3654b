"""The options of `mla-convert` for the built-in methods, in the form that `ConversionMethod.command_options` describes.

`optimum-cli` runs this file alone at every start, because importing the package would load torch. So it imports nothing
of the package.
"""

from typing import Any, TypeAlias

Declarations: TypeAlias = dict[str, dict[str, Any]]

SIZE = "size of the cache, at most one of these"
CALIBRATION = "calibration"
POSITION = "position (rotary embedding)"
OTHER = "other parts of the attention"

EVERY_METHOD: Declarations = {
    "layers": {
        "group": "method",
        "help": "Layers to convert: all, a list such as 0-7 or 1,3,5, or the preset x-ecomla-hybrid. The other layers "
        "keep their attention. Default: all, but where only some layers have a sliding window, these keep it.",
    },
    "kv_cache_ratio": {
        "group": SIZE,
        "type": float,
        "metavar": "SHARE",
        "help": "Numbers in the new cache, in 16 bits each, as a share of those in the source model's cache, above 0 "
        "and up to 1. Default: 0.5 where the latents are not coded.",
    },
    "kv_cache_budget": {
        "group": SIZE,
        "flag": "--cache-budget",
        "type": float,
        "metavar": "SHARE",
        "help": "gqa2mla: leave the weights alone and keep old tokens as codes, in this share of the bytes of their "
        "keys and values in 16 bits, above 0 and up to 0.5. Prompts, first and newest tokens are read exactly. "
        "Default: 0.25, for gqa2mla with calibration, and without options about weights or an export.",
    },
    "kv_lora_rank": {
        "group": SIZE,
        "type": int,
        "metavar": "N",
        "help": "Rank of the latent: how many numbers it has per token and layer.",
    },
    "energy": {
        "group": SIZE,
        "type": float,
        "metavar": "SHARE",
        "help": "Share of the squared singular values that each layer keeps, above 0 and up to 1. The ranks of the "
        "layers then differ.",
    },
    "factorization": {
        "group": CALIBRATION,
        "help": "How weights are factorized: calibrated (errors are weighted by what the layer reads and writes), or "
        "by plain SVD with one joint latent or with split latents for keys and values. Default: calibrated; with "
        "--uncalibrated split for gqa2mla and joint for the others.",
    },
    "heal": {
        "group": CALIBRATION,
        "type": bool,
        "help": "Refit the output projections in closed form and keep those that are better on held-back windows. "
        "Default: on with the calibrated factorization.",
    },
    "rank_allocation": {
        "group": CALIBRATION,
        "metavar": "RULE",
        "help": "How the layers share the cache: error (where the model's predictions gain most), energy (each layer "
        "loses the same share of its energy) or uniform. Default: error, but uniform with --shared-rope, "
        "--statistics, --uncalibrated or 16-bit latents of --rope-cache cached.",
    },
    "shared_rope": {
        "group": POSITION,
        "nargs": "?",
        "const": True,
        "metavar": "regular",
        "help": "x-ecomla, and gqa2mla with --rope-cache cached: give all layers the same number of rotary dims and "
        "the same frequencies, which deepseek_v3 needs. regular: at every so-many-th frequency, which llama.cpp "
        "needs.",
    },
}
"""Options that the base class of methods has."""

_QK_ROPE_HEAD_DIM = {
    "group": POSITION,
    "type": int,
    "metavar": "N",
    "help": "Dims of each rotary key head. Default: chosen for each layer by the measured error; with "
    "--uncalibrated 1/8 of the head dim for mha2mla and 1/2 for x-ecomla.",
}
_ROPE_SELECTION = {
    "group": POSITION,
    "metavar": "RULE",
    "help": "mha2mla and x-ecomla: which dims keep their rotation. high or low frequencies, uniform strides, last "
    "(x-ecomla only: the last dims of each head), or those with the largest contribution or damage, which need "
    "calibration. Default: damage, but high with --uncalibrated.",
}
_LATENT_NORM = {
    "group": OTHER,
    "nargs": "?",
    "const": "calibrated",
    "metavar": "calibrated",
    "help": "x-ecomla, and gqa2mla with --rope-cache cached: put an RMSNorm with calibrated gain on the latents "
    "and no biases after them, for engines that load no biases.",
}

GQA2MLA_OPTIONS: Declarations = {
    "positional": {
        "group": POSITION,
        "metavar": "FORM",
        "help": "gqa2mla: where the position is added. full rotates all up-projected key dims; decoupled has a small "
        "rotary key beside the position-free rest and needs calibration. Default: decoupled, but full with "
        "--uncalibrated.",
    },
    "rope_cache": {
        "group": POSITION,
        "metavar": "FORM",
        "help": "gqa2mla, decoupled: rebuilt computes the rotary key from the latent and caches the latent alone; "
        "cached stores it beside the latent, as DeepSeek does. Default: rebuilt.",
    },
    "qk_rope_head_dim": _QK_ROPE_HEAD_DIM,
    "latent_norm": _LATENT_NORM,
}
MHA2MLA_OPTIONS: Declarations = {"qk_rope_head_dim": _QK_ROPE_HEAD_DIM, "rope_selection": _ROPE_SELECTION}
XECOMLA_OPTIONS: Declarations = {
    **MHA2MLA_OPTIONS,
    "latent_norm": _LATENT_NORM,
    "q_lora_rank": {
        "group": OTHER,
        "type": int,
        "metavar": "N",
        "help": "x-ecomla: rank of a latent for the queries. Default: the queries have no latent.",
    },
    "q_energy": {
        "group": OTHER,
        "type": float,
        "metavar": "SHARE",
        "help": "x-ecomla: share of the squared singular values of the query weight that a latent for the queries "
        "keeps, instead of --q-lora-rank.",
    },
}
BUILT_IN: Declarations = EVERY_METHOD | GQA2MLA_OPTIONS | MHA2MLA_OPTIONS | XECOMLA_OPTIONS
"""Options of all of them, by keyword argument, in the order in which the help of `mla-convert` lists them."""
