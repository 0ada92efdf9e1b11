"""BLOOM: ALiBi, a norm on the embeddings, each head's query, key and value in neighbouring rows."""

from collections.abc import Collection
from typing import Any

from writehead.config import ModelConfig
from writehead.convert.families.base import REQUIRED, Family, Fields, mixer_of, stack_of
from writehead.convert.rules import GROUPED, Rule

LAYER = "stack.blocks.{layer}."
THEIRS = "transformer.h.{layer}."


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    tied = ("lm_head.weight",) if config.tie_embeddings else ()
    rules = [
        Rule("embedding.table", ("transformer.word_embeddings.weight",), copies=tied),
        Rule("embedding.output", ("lm_head.weight",)),
    ]
    for kind in ("weight", "bias"):
        rules += [
            Rule(f"embedding.norm.{kind}", (f"transformer.word_embeddings_layernorm.{kind}",)),
            Rule(f"stack.norm.{kind}", (f"transformer.ln_f.{kind}",)),
            Rule(f"{LAYER}mixer_norm.{kind}", (f"{THEIRS}input_layernorm.{kind}",)),
            Rule(f"{LAYER}feedforward_norm.{kind}", (f"{THEIRS}post_attention_layernorm.{kind}",)),
            Rule(f"{LAYER}mixer.qkv.{kind}", (f"{THEIRS}self_attention.query_key_value.{kind}",), GROUPED),
            Rule(f"{LAYER}mixer.out.{kind}", (f"{THEIRS}self_attention.dense.{kind}",)),
            Rule(f"{LAYER}feedforward.inner.{kind}", (f"{THEIRS}mlp.dense_h_to_4h.{kind}",)),
            Rule(f"{LAYER}feedforward.outer.{kind}", (f"{THEIRS}mlp.dense_4h_to_h.{kind}",)),
        ]
    return tuple(rules)


def _read(fields: Fields, names: Collection[str] | None) -> ModelConfig:
    dim = fields.whole("hidden_size", REQUIRED, "n_embed")
    heads = fields.whole("n_head", REQUIRED, "num_attention_heads")
    if dim % heads:
        raise ValueError(f"{fields.what}: hidden_size={dim} is not a multiple of n_head={heads}")
    fields.only("apply_residual_connection_post_layernorm", False)
    eps = fields.number("layer_norm_epsilon", 1e-5)
    if eps != 1e-5:
        raise ValueError(f"{fields.what}: layer_norm_epsilon={eps} is not supported; accepted: 1e-05")
    # how training was parallelised and which kernels it used; the trained length, which ALiBi does not bind
    fields.ignore("pretraining_tp", "slow_but_exact", "offset_alibi", "masked_softmax_fusion", "seq_length")
    fields.ignore("bias_dropout_fusion", "skip_bias_add", "skip_bias_add_qkv", "attention_softmax_in_fp32")
    fields.ignore("n_inner")
    return ModelConfig(
        vocab=fields.whole("vocab_size", REQUIRED),
        dim=dim,
        depth=fields.whole("n_layer", REQUIRED, "num_hidden_layers"),
        mixer={"name": "mha", "heads": heads, "bias": "all"},
        feedforward={"name": "dense", "hidden": 4 * dim, "activation": "gelu_tanh", "bias": True},
        position={"name": "alibi"},
        stack={"name": "residual", "norm": "layer", "eps": eps},
        tie_embeddings=fields.truth("tie_word_embeddings", True),
        embed_norm=True,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.dim,
        "n_layer": config.depth,
        "n_head": mixer_of(config, 0)["heads"],
        "vocab_size": config.vocab,
        "layer_norm_epsilon": stack_of(config)["eps"],
        "tie_word_embeddings": config.tie_embeddings,
    }


FAMILIES = (
    Family(
        model_type="bloom",
        architecture="BloomForCausalLM",
        prefix="transformer.",
        read=_read,
        write=_write,
        rules=_rules,
    ),
)
