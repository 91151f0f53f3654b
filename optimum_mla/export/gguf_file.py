"""Export of a converted model as a GGUF file of llama.cpp's `deepseek2` architecture.

llama.cpp runs Multi-head Latent Attention as DeepSeek has it: a latent that is always normed, no biases, one rotary key
whose neighbouring dims turn together, and frequencies that follow from one base. So the file is made from a
`deepseek_v3` export of a model that was converted with a norm on the latent (`--latent-norm`) and with rotary dims at
every so-many-th frequency (`--shared-rope regular`). All layers are dense.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, PreTrainedTokenizerBase

from optimum_mla.core.errors import InvalidValueError, MissingDependencyError, VerificationError
from optimum_mla.export.checks import refuse
from optimum_mla.export.gguf_vocabulary import vocabulary_of
from optimum_mla.models.family_table import family_of
from optimum_mla.models.layers import model_geometry

FILE_TYPES = ("f32", "f16", "bf16", "q8_0")
"""Types of the matrices in a file. Vectors are always in float32."""
ROUNDING = {"f32": 0.0, "f16": 2.0**-10, "bf16": 2.0**-8, "q8_0": 2.0**-6}
"""The largest difference of a matrix that a type makes, relative to its largest number."""
FILE_TYPES_OF = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
"""The type of a file that holds the matrices of a dtype as they are."""
LLAMA_CPP_ACTIVATIONS = ("silu", "swish")
"""Names of the one activation function that llama.cpp has for deepseek2."""
DOWN_PROJECTIONS = re.compile(r"(q_a|kv_a)_proj(_with_mqa)?\.weight$")
"""The down-projections, whose first rows make a latent that is normed."""
LITE_DEPTHS = (26, 27)
"""Numbers of layers of which llama.cpp expects no latent of queries."""


def check_file_type(name: str) -> None:
    """Refuse a type of file that there is not."""
    if name not in FILE_TYPES:
        raise InvalidValueError("gguf_type", name, ", ".join(FILE_TYPES))


def file_type_of(dtype: torch.dtype) -> str:
    """Return the type of a file that holds the weights of a model as they are.

    Raises:
        InvalidValueError: No type holds this dtype.
    """
    if dtype not in FILE_TYPES_OF:
        allowed = ", ".join(str(known).removeprefix("torch.") for known in FILE_TYPES_OF)
        raise InvalidValueError("dtype", str(dtype).removeprefix("torch."), f"{allowed} for a GGUF file")
    return FILE_TYPES_OF[dtype]


def check_writable(config: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse what no GGUF file can hold, before any work.

    Raises:
        MissingDependencyError: The package `gguf` is not installed.
        UnsupportedModelError: A GGUF file cannot hold the tokenizer, or its model's family has biases.
    """
    installed_gguf()
    layers = model_geometry(family_of(config).spec, config).layers
    if any(g.query_bias or g.key_value_bias or g.output_bias for g in layers):
        raise refuse(
            "the attention of the source has biases, and llama.cpp loads none of latent attention",
            "Export to deepseek_v3, or run the model in this package.",
        )
    if tokenizer is not None:
        vocabulary_of(tokenizer, config.vocab_size)


def installed_gguf() -> Any:
    """Return the package `gguf`.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError("gguf", "gguf", "write a GGUF file") from error
    return gguf


def check_gguf(config: Any) -> None:
    """Refuse a `deepseek_v3` export that llama.cpp cannot run.

    Raises:
        UnsupportedModelError: With the options of a conversion that it could run.
    """
    if config.attention_bias:
        raise refuse("llama.cpp loads no biases of latent attention", "Convert with --latent-norm.")
    if config.hidden_act not in LLAMA_CPP_ACTIVATIONS:
        raise refuse(
            f"llama.cpp computes the feed-forward layers of deepseek2 with SiLU, and this model has "
            f"{config.hidden_act!r}",
            "Export to deepseek_v3.",
        )
    if config.rope_parameters["rope_type"] != "default":
        raise refuse(
            "llama.cpp computes rotary frequencies from one base, and this model's are others",
            "Export to deepseek_v3 if the model's rotary frequencies are scaled; otherwise convert with --shared-rope "
            "regular.",
        )
    if config.q_lora_rank is not None and config.num_hidden_layers in LITE_DEPTHS:
        raise refuse(
            f"llama.cpp takes a model of {config.num_hidden_layers} layers for one without a latent of queries",
            "Convert without --q-lora-rank.",
        )


def gguf_tensors(model: DeepseekV3ForCausalLM, rounded: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file with their names there, on the CPU.

    The up-projection is split into that of the keys, [H, r, n], and that of the values, [H, v, r]. Transformers norms
    latents with an epsilon of their own and llama.cpp with that of all norms, so the down-projections are scaled to
    latents for which the other epsilon is as large.

    Args:
        model: What `export_deepseek` returned.
        rounded: Whether to scale by a power of two, which comes close and leaves weights of 16 bits as exact as they
            are.
    """
    import gguf

    config: Any = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        parts = {name: tensor.detach().cpu()}
        if (down := DOWN_PROJECTIONS.search(name)) is not None:
            norm: Any = model.get_submodule(f"{name[: down.start()]}{down[1]}_layernorm")
            scale = math.sqrt(config.rms_norm_eps / norm.variance_epsilon)
            latent, rotary = parts[name].split([len(norm.weight), tensor.shape[0] - len(norm.weight)])
            scale = 2.0 ** round(math.log2(scale)) if rounded else scale
            parts[name] = torch.cat([latent.float() * scale, rotary.float()])
        if name.endswith("kv_b_proj.weight"):
            heads = parts.pop(name).unflatten(0, (config.num_attention_heads, -1))
            key, value = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
            parts = {name.replace("kv_b_proj", "k_b_proj"): key.mT, name.replace("kv_b_proj", "v_b_proj"): value}
        for part, content in parts.items():
            found = names.get_name(part, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise refuse(f"llama.cpp's deepseek2 has no {part}", "Such models run in this package.")
            yield found, content


def write_gguf(
    model: DeepseekV3ForCausalLM, path: Path, name: str, file_type: str, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Write a `deepseek_v3` export as a GGUF file, and read it back.

    Args:
        model: What `export_deepseek` returned.
        path: The file to write.
        name: Name of the model in the file.
        file_type: Type of the matrices, one of `FILE_TYPES`.
        tokenizer: The model's tokenizer; None writes a file without vocabulary.

    Raises:
        UnsupportedModelError: llama.cpp cannot run the model, or a GGUF file cannot hold its tokenizer.
        MissingDependencyError: The package `gguf` is not installed.
        VerificationError: The file does not hold the weights of the model.
    """
    gguf = installed_gguf()
    check_file_type(file_type)
    config: Any = model.config
    check_gguf(config)
    writer = gguf.GGUFWriter(path, "deepseek2")
    kind = gguf.GGMLQuantizationType[file_type.upper()]
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[f"ALL_{kind.name}" if file_type == "f32" else f"MOSTLY_{kind.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    if tokenizer is not None:
        _add_vocabulary(writer, tokenizer, config.vocab_size)
    written = {}
    for tensor_name, tensor in gguf_tensors(model, rounded=file_type == "bf16"):
        numbers = tensor.float().contiguous().numpy()
        # Rows that blocks of 32 do not fill stay in 16 bits.
        fits = file_type != "q8_0" or numbers.shape[-1] % 32 == 0
        of = gguf.GGMLQuantizationType.F32 if numbers.ndim == 1 else kind if fits else gguf.GGMLQuantizationType.F16
        writer.add_tensor(tensor_name, gguf.quants.quantize(numbers, of), raw_dtype=of)
        written[tensor_name] = numbers
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for stored in gguf.GGUFReader(path).tensors:
        wanted = written.pop(stored.name)
        read = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(wanted.shape)
        if not abs(read - wanted).max() <= ROUNDING[file_type] * abs(wanted).max():
            raise VerificationError(f"verify: {stored.name} in the GGUF file is not what was to be written.")
    if written:
        raise VerificationError(f"verify: the GGUF file lacks {', '.join(written)}.")


def _add_shape(writer: Any, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_leading_dense_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)  # All heads share the latent.
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    # llama.cpp asks for these of every deepseek2, also where no layer has experts.
    writer.add_expert_count(0)
    writer.add_expert_used_count(0)
    writer.add_expert_shared_count(0)
    writer.add_expert_feed_forward_length(config.intermediate_size)


def _add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    found = vocabulary_of(tokenizer, size)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.scores is None:
        writer.add_token_merges(found.merges)
    else:
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.prefixed)
    for name, index in found.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(found.begins)
    if found.chat_template is not None:
        writer.add_chat_template(found.chat_template)
