"""GGUF files of transformers' models, in any of the types that the package gguf can write."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf


def write_gguf(
    path: Path,
    model: Any,
    architecture: str,
    extra: Callable[[gguf.GGUFWriter], None] = lambda w: None,
    kind: Callable[[str], str] = lambda name: "F32",
) -> None:
    """Write a transformers model as llama.cpp's converter would: llama q and k in pairs, gemma norms + 1.

    `kind` gives the type of a matrix by the name it has in the file.
    """
    c = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    if architecture == "gemma":
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    extra(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
            tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        if architecture == "gemma" and "norm" in name:
            tensor = tensor + 1
        own, values = names.get_name(name, (".weight", ".bias")), tensor.float().numpy()
        type = gguf.GGMLQuantizationType[kind(own) if tensor.dim() == 2 else "F32"]
        writer.add_tensor(own, gguf.quants.quantize(values, type), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
