"""Falcon: one write-head and a parallel layer (7B), grouped heads with two norms (40B), or ALiBi (RW).

Transformers adds Falcon's ALiBi before it divides the scores by the square root of the head width, with
slopes rounded to bfloat16; slopes that are divided and rounded alike give the same. It also rounds the
product of slope and position to bfloat16, which no slope can follow: with a power of two of heads the two
agree up to position 256, and beyond that positions there blur into neighbours while they stay exact here.
"""

from collections.abc import Collection
from typing import Any

import torch

from writehead.config import ModelConfig
from writehead.convert.families.base import (
    ACTIVATIONS,
    REQUIRED,
    Family,
    Fields,
    activation_name,
    feedforward_of,
    mixer_of,
    position_of,
    stack_of,
)
from writehead.convert.families.rotary import read_rotary, write_rotary
from writehead.convert.rules import GROUPED, Rule
from writehead.positions.alibi import slopes

LAYER = "stack.blocks.{layer}."
THEIRS = "transformer.h.{layer}."


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    tied = ("lm_head.weight",) if config.tie_embeddings else ()
    stack = stack_of(config)
    two = stack["order"] == "parallel" and not stack["one_norm"]
    norms = ("ln_attn", "ln_mlp") if two else ("input_layernorm", "post_attention_layernorm")
    rules = [
        Rule("embedding.table", ("transformer.word_embeddings.weight",), copies=tied),
        Rule("embedding.output", ("lm_head.weight",)),
    ]
    for kind in ("weight", "bias"):
        rules += [
            Rule(f"stack.norm.{kind}", (f"transformer.ln_f.{kind}",)),
            Rule(f"{LAYER}mixer_norm.{kind}", (f"{THEIRS}{norms[0]}.{kind}",)),
            Rule(f"{LAYER}feedforward_norm.{kind}", (f"{THEIRS}{norms[1]}.{kind}",)),
            Rule(f"{LAYER}mixer.qkv.{kind}", (f"{THEIRS}self_attention.query_key_value.{kind}",), GROUPED),
            Rule(f"{LAYER}mixer.out.{kind}", (f"{THEIRS}self_attention.dense.{kind}",)),
            Rule(f"{LAYER}feedforward.inner.{kind}", (f"{THEIRS}mlp.dense_h_to_4h.{kind}",)),
            Rule(f"{LAYER}feedforward.outer.{kind}", (f"{THEIRS}mlp.dense_4h_to_h.{kind}",)),
        ]
    return tuple(rules)


def _alibi_slopes(heads: int, head_dim: int) -> list[float]:
    rounded = torch.tensor(slopes(heads), device="cpu").bfloat16().double()
    return [float(slope) for slope in rounded * head_dim**-0.5]


def _read(fields: Fields, names: Collection[str] | None) -> ModelConfig:
    dim = fields.whole("hidden_size", REQUIRED, "n_embed")
    heads = fields.whole("num_attention_heads", REQUIRED, "n_head")
    if dim % heads:
        raise ValueError(f"{fields.what}: hidden_size={dim} is not a multiple of num_attention_heads={heads}")
    new = fields.truth("new_decoder_architecture", False)
    one_write_head = fields.truth("multi_query", True)
    given = fields.maybe_whole("num_kv_heads", "n_head_kv")
    kv_heads = (given or heads) if new else 1 if one_write_head else heads
    bias = fields.truth("bias", False)
    hidden = fields.maybe_whole("ffn_hidden_size") or 4 * dim
    fields.ignore("ff_factor")  # says what ffn_hidden_size is, and transformers does not read it
    fields.only("apply_residual_connection_post_layernorm", False)
    context = fields.whole("max_position_embeddings", 2048)
    position: dict[str, Any] = read_rotary(fields, context)
    if fields.truth("alibi", False):
        if heads > 1 << 16:
            raise ValueError(f"{fields.what}: num_attention_heads={heads} is more than {1 << 16}")
        position = {"name": "alibi", "slopes_of_heads": _alibi_slopes(heads, dim // heads)}
    return ModelConfig(
        vocab=fields.whole("vocab_size", REQUIRED),
        dim=dim,
        depth=fields.whole("num_hidden_layers", REQUIRED, "n_layer"),
        mixer={"name": "gqa", "heads": heads, "kv_heads": kv_heads, "bias": "all" if bias else "none"},
        feedforward={
            "name": "dense",
            "hidden": hidden,
            "activation": fields.choice("activation", "gelu", ACTIVATIONS),
            "bias": bias,
        },
        position=position,
        stack={
            "name": "residual",
            **_order(fields, new),
            "norm": "layer",
            "eps": fields.number("layer_norm_epsilon", 1e-5),
        },
        tie_embeddings=fields.truth("tie_word_embeddings", True),
        max_context=context,
    )


def _order(fields: Fields, new: bool) -> dict[str, Any]:
    """Which norms a layer has: the newer architecture counts them, the older shares one if it is parallel."""
    parallel = fields.truth("parallel_attn", True)
    count = fields.take("num_ln_in_parallel_attn", 2 if new else 1)
    if count not in (1, 2) or (new and not parallel) or (not new and count != 1):
        raise ValueError(
            f"{fields.what}: new_decoder_architecture={new} with parallel_attn={parallel} and "
            f"num_ln_in_parallel_attn={count} is not supported (accepted: true with true and "
            "1 or 2, false with either and 1)"
        )
    if not parallel:
        return {"order": "pre"}
    return {"order": "parallel", "one_norm": count == 1}


def _write(config: ModelConfig) -> dict[str, Any]:
    mixer, feedforward = mixer_of(config, 0), feedforward_of(config, 0)
    stack, position = stack_of(config), position_of(config)
    parallel = stack["order"] == "parallel"
    two = parallel and not stack["one_norm"]
    new = two or mixer["kv_heads"] not in (1, mixer["heads"])
    alibi = "slopes_of_heads" in position
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": mixer["heads"],
        "num_kv_heads": mixer["kv_heads"],
        "new_decoder_architecture": new,
        "multi_query": mixer["kv_heads"] == 1 and not new,
        "parallel_attn": parallel,
        "num_ln_in_parallel_attn": 2 if two else 1 if new else None,
        "bias": mixer["bias"] == "all",
        "alibi": alibi,
        "ffn_hidden_size": feedforward["hidden"],
        "activation": activation_name(feedforward["activation"], {}),
        "vocab_size": config.vocab,
        "max_position_embeddings": config.max_context or 2048,
        "layer_norm_epsilon": stack["eps"],
        "tie_word_embeddings": config.tie_embeddings,
        **({} if alibi else write_rotary(position)),
    }


FAMILIES = (
    Family(
        model_type="falcon",
        architecture="FalconForCausalLM",
        prefix="transformer.",
        read=_read,
        write=_write,
        rules=_rules,
        ignorable=("transformer.rotary_emb.inv_freq", THEIRS + "self_attention.rotary_emb.inv_freq"),
    ),
)
