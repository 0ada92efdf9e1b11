"""GPT-2: learned positions, biases everywhere, matrices stored transposed (input by output)."""

from collections.abc import Collection
from typing import Any

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
    tiled,
)
from writehead.convert.rules import TRANSPOSED, Form, Rule

LAYER = "stack.blocks.{layer}."
THEIRS = "transformer.h.{layer}."


def rules_of(config: ModelConfig, matrix: Form, qkv: Form) -> tuple[Rule, ...]:
    """The table of GPT-2 and GPTBigCode, which store matrices and fused projections in different forms."""
    tied = ("lm_head.weight",) if config.tie_embeddings else ()
    rules = [
        Rule("embedding.table", ("transformer.wte.weight",), copies=tied),
        Rule("embedding.output", ("lm_head.weight",)),
        Rule("embedding.position.table", ("transformer.wpe.weight",)),
        Rule(f"{LAYER}mixer.qkv.weight", (f"{THEIRS}attn.c_attn.weight",), qkv),
        Rule(f"{LAYER}mixer.out.weight", (f"{THEIRS}attn.c_proj.weight",), matrix),
        Rule(f"{LAYER}feedforward.inner.weight", (f"{THEIRS}mlp.c_fc.weight",), matrix),
        Rule(f"{LAYER}feedforward.outer.weight", (f"{THEIRS}mlp.c_proj.weight",), matrix),
        Rule(f"{LAYER}mixer.out.bias", (f"{THEIRS}attn.c_proj.bias",)),
        Rule(f"{LAYER}feedforward.inner.bias", (f"{THEIRS}mlp.c_fc.bias",)),
        Rule(f"{LAYER}feedforward.outer.bias", (f"{THEIRS}mlp.c_proj.bias",)),
    ]
    for kind in ("weight", "bias"):
        rules += [
            Rule(f"stack.norm.{kind}", (f"transformer.ln_f.{kind}",)),
            Rule(f"{LAYER}mixer_norm.{kind}", (f"{THEIRS}ln_1.{kind}",)),
            Rule(f"{LAYER}feedforward_norm.{kind}", (f"{THEIRS}ln_2.{kind}",)),
        ]
    return tuple(rules)


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    return (
        Rule(f"{LAYER}mixer.qkv.bias", (f"{THEIRS}attn.c_attn.bias",)),
        *rules_of(config, TRANSPOSED, TRANSPOSED),
    )


def read_common(fields: Fields, mixers: list[dict[str, Any]], activation: str) -> ModelConfig:
    """What GPT-2 and GPTBigCode configs say alike."""
    dim = fields.whole("n_embd", REQUIRED, "hidden_size")
    context = fields.whole("n_positions", 1024, "max_position_embeddings")
    fields.ignore("n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels")
    fields.ignore("summary_first_dropout", "layer_norm_eps")
    return ModelConfig(
        vocab=fields.whole("vocab_size", 50257),
        dim=dim,
        depth=fields.whole("n_layer", REQUIRED, "num_hidden_layers"),
        mixer=tiled(mixers),
        feedforward={
            "name": "dense",
            "hidden": fields.maybe_whole("n_inner") or 4 * dim,
            "activation": fields.choice("activation_function", activation, ACTIVATIONS),
            "bias": True,
        },
        position={"name": "learned", "max_context": context},
        stack={"name": "residual", "norm": "layer", "eps": fields.number("layer_norm_epsilon", 1e-5)},
        tie_embeddings=fields.truth("tie_word_embeddings", True),
        max_context=context,
    )


def _read(fields: Fields, names: Collection[str] | None) -> ModelConfig:
    heads = fields.whole("n_head", REQUIRED, "num_attention_heads")
    dim = fields.whole("n_embd", REQUIRED, "hidden_size")
    scale = head_scale(fields, dim, heads)
    by_layer = fields.truth("scale_attn_by_inverse_layer_idx", False)
    fields.ignore("reorder_and_upcast_attn")
    depth = min(fields.whole("n_layer", REQUIRED, "num_hidden_layers"), 1 << 16) if by_layer else 1
    mixers: list[dict[str, Any]] = [{"name": "mha", "heads": heads, "bias": "all"} for _ in range(depth)]
    if scale is not None or by_layer:
        first = (dim // heads) ** -0.5 if scale is None else scale
        mixers = [mixer | {"scale": first / (i + 1)} for i, mixer in enumerate(mixers)]
    return read_common(fields, mixers, "gelu_new")


def head_scale(fields: Fields, dim: int, heads: int) -> float | None:
    """None for the usual factor on the scores, 1.0 if the config switches it off."""
    if dim % heads:
        raise ValueError(f"{fields.what}: n_embd={dim} is not a multiple of n_head={heads}")
    return None if fields.truth("scale_attn_weights", True) else 1.0


def write_common(config: ModelConfig) -> dict[str, Any]:
    """What GPT-2 and GPTBigCode configs say alike."""
    mixer, feedforward = mixer_of(config, 0), feedforward_of(config, 0)
    return {
        "n_embd": config.dim,
        "n_layer": config.depth,
        "n_head": mixer["heads"],
        "n_positions": position_of(config)["max_context"],
        "n_inner": feedforward["hidden"],
        "vocab_size": config.vocab,
        "layer_norm_epsilon": stack_of(config)["eps"],
        "tie_word_embeddings": config.tie_embeddings,
        "activation_function": activation_name(feedforward["activation"], {"gelu_tanh": "gelu_new"}),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    scales = [mixer_of(config, layer)["scale"] for layer in range(min(config.depth, 2))]
    by_layer = len(scales) == 2 and scales[0] is not None and scales[1] == scales[0] / 2
    return write_common(config) | {
        "scale_attn_weights": scales[0] != 1,
        "scale_attn_by_inverse_layer_idx": by_layer,
    }


FAMILIES = (
    Family(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        read=_read,
        write=_write,
        rules=_rules,
        ignorable=("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias"),
    ),
)
