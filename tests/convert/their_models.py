"""Tiny random models of every family, made by transformers: one of each kind that differs for us."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}
GPT: dict[str, Any] = {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64}
FALCON = {
    key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "intermediate_size")
}
T5: dict[str, Any] = {
    "vocab_size": 97, "d_model": 48, "d_kv": 10, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3,
    "num_heads": 6,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip
REFORMER: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "num_attention_heads": 6, "attention_head_size": 10, "feed_forward_size": 80,
    "attn_layers": ["local", "lsh", "lsh"], "axial_pos_shape": [4, 16], "axial_pos_embds_dim": [16, 32],
    "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 4, "num_buckets": [2, 4], "num_hashes": 3, "hash_seed": 5,
    "is_decoder": True, "max_position_embeddings": 64,
}  # fmt: skip


def rope(**given: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 5000.0, **given}}


YARN = rope(
    rope_type="yarn",
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=20.0,
    mscale=0.7,
    mscale_all_dim=0.9,
)
LLAMA3 = rope(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
NYSTROM: dict[str, Any] = {
    key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "num_hidden_layers")
} | {
    "num_hidden_layers": 2, "num_landmarks": 5, "segment_means_seq_len": 20, "conv_kernel_size": 7,
    "layer_norm_eps": 1e-3, "type_vocab_size": 3,
}  # fmt: skip
PATTERNED = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"} | {
    "layer_norm_eps": 1e-3, "type_vocab_size": 3,
}  # fmt: skip
LED: dict[str, Any] = {
    "vocab_size": 97, "d_model": 48, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 6,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 64, "attention_window": [4, 8, 4],
    "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 32,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SMALL | {"tie_word_embeddings": True}),
    "llama, untied, all biases": ("Llama", SMALL | {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads, linear scaling": (
        "Llama",
        SMALL | {"head_dim": 12} | rope(rope_type="linear", factor=2.0),
    ),
    "llama, yarn": ("Llama", SMALL | YARN),
    "llama, llama3 scaling": ("Llama", SMALL | LLAMA3),
    "mistral, window": ("Mistral", SMALL | {"sliding_window": 4}),
    "mistral, no window": ("Mistral", SMALL | {"sliding_window": None}),
    "qwen2": ("Qwen2", SMALL | {"tie_word_embeddings": True}),
    "qwen2, window in some layers": (
        "Qwen2",
        SMALL | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 12, "attention_bias": True}),
    "gemma, one write-head": ("Gemma", SMALL | {"num_key_value_heads": 1, "head_dim": 12}),
    "gpt2": ("GPT2", GPT),
    "gpt2, untied, other scales": (
        "GPT2",
        GPT | {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True, "n_inner": 60},
    ),
    "gpt2, unscaled scores": ("GPT2", GPT | {"scale_attn_weights": False, "activation_function": "relu"}),
    "gpt_bigcode, one write-head": ("GPTBigCode", GPT),
    "gpt_bigcode, own heads": ("GPTBigCode", GPT | {"multi_query": False}),
    "falcon, one write-head": ("Falcon", FALCON),
    "falcon, own heads, in sequence": (
        "Falcon",
        FALCON | {"multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "falcon, alibi": ("Falcon", FALCON | {"alibi": True, "num_attention_heads": 8, "bias": True}),
    "falcon, new architecture": (
        "Falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 100},
    ),
    "falcon, new architecture, one norm": (
        "Falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1},
    ),
    "bloom": ("Bloom", {"vocab_size": 97, "hidden_size": 48, "n_layer": 3, "n_head": 6}),
    "mpt": ("Mpt", {"vocab_size": 97, "d_model": 48, "n_layers": 3, "n_heads": 6, "max_seq_len": 64}),
    "mpt, other scale": (
        "Mpt",
        {
            "vocab_size": 97, "d_model": 48, "n_layers": 3, "n_heads": 6, "max_seq_len": 64,
            "attn_config": {"softmax_scale": 0.3},
        },
    ),
    "reformer": ("Reformer", REFORMER),
    "reformer, one kind of layer, learned positions": (
        "Reformer",
        REFORMER
        | {"attn_layers": ["lsh", "lsh"], "axial_pos_embds": False, "num_buckets": 8, "num_hashes": 1, "hash_seed": 0},
    ),
    "t5": ("T5", T5),
    "t5, version 1.1": ("T5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "led": ("LED", LED),
    "nystromformer, masked words": ("Nystromformer", NYSTROM),
    "nystromformer, no head": ("Nystromformer", NYSTROM | {"num_landmarks": 4, "hidden_act": "relu"}),
    "nystromformer, as many landmarks as tokens": (
        "Nystromformer", NYSTROM | {"num_landmarks": 20},
    ),
    "longformer, masked words": ("Longformer", PATTERNED | {"attention_window": [4, 8, 4]}),
    "big_bird, masked words": ("BigBird", PATTERNED | {"block_size": 4, "num_random_blocks": 1}),
    "big_bird, all read all": (
        "BigBird", PATTERNED | {"attention_type": "original_full", "rescale_embeddings": True},
    ),
}  # fmt: skip
ENCODERS = [name for name in CASES if name.startswith(("nystromformer", "longformer", "big_bird"))]
WHOLE = [name for name in CASES if name.startswith("reformer")]  # whom a token reads depends on later ones
SEQ2SEQ = [name for name in CASES if name.startswith(("t5", "led"))]
DECODERS = [name for name in CASES if name not in (*SEQ2SEQ, *ENCODERS, *WHOLE)]


def make(case: str, **changes: Any) -> transformers.PreTrainedModel:
    """The random model of a case in float32; every parameter is random, norms and biases too."""
    kind, values = CASES[case]
    config = getattr(transformers, f"{kind}Config")(**{**values, **changes})
    heads: dict[str, Callable[..., Any]] = {
        "GPT2": transformers.GPT2LMHeadModel,
        "T5": transformers.T5ForConditionalGeneration,
        "LED": transformers.LEDForConditionalGeneration,
        "Reformer": transformers.ReformerModelWithLMHead,
    }
    torch.manual_seed(len(case))
    if case in ENCODERS:
        heads[kind] = getattr(transformers, f"{kind}{'Model' if 'no head' in case else 'ForMaskedLM'}")
    model = heads.get(kind, getattr(transformers, f"{kind}ForCausalLM", None))(config).eval()
    if case == "t5, version 1.1":  # transformers 5 ties what 1.1 does not
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        if case == "led":
            model.final_logits_bias.normal_()
        for name, parameter in model.named_parameters():
            shift = 1.0 if "norm" in name.lower() or "ln_" in name else 0.0
            shift = 0.0 if kind == "Gemma" else shift
            parameter.copy_(torch.randn(parameter.shape) * 0.15 + shift * (parameter.dim() == 1))
    return model
