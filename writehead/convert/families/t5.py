"""T5: an encoder and a decoder with relative biases, scores that are not scaled, RMS norms, no biases.

The first T5 ties its output matrix to the embedding and scales the last hidden state by X^-1/2; version 1.1
(and Flan-T5) has an output matrix of its own and does not scale.
"""

from collections.abc import Collection
from typing import Any

from writehead.config import ModelConfig
from writehead.convert.errors import shown
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
from writehead.convert.rules import HALVES, QKV_ROWS, SAME, Rule

EMBEDDING = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    tied = ("lm_head.weight",) if config.tie_embeddings else ()
    rules = [
        Rule("encoder.embedding.table", ("shared.weight",), copies=(*EMBEDDING, *tied)),
        Rule("decoder.embedding.output", ("lm_head.weight",)),
    ]
    gated = bool(feedforward_of(config, 0).get("gated"))
    for side, last in (("encoder", 1), ("decoder", 2)):
        ours, theirs = f"{side}.stack.blocks.{{layer}}.", f"{side}.block.{{layer}}.layer."
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        inner = ("wi_0", "wi_1") if gated else ("wi",)
        rules += [
            Rule(f"{side}.embedding.position.table", (bias,)),
            Rule(f"{side}.stack.norm.weight", (f"{side}.final_layer_norm.weight",)),
            Rule(f"{ours}mixer_norm.weight", (f"{theirs}0.layer_norm.weight",)),
            Rule(f"{ours}cross_norm.weight", (f"{theirs}1.layer_norm.weight",)),
            Rule(f"{ours}feedforward_norm.weight", (f"{theirs}{last}.layer_norm.weight",)),
            Rule(
                f"{ours}feedforward.inner.weight",
                tuple(f"{theirs}{last}.DenseReluDense.{name}.weight" for name in inner),
                HALVES if gated else SAME,
            ),
            Rule(f"{ours}feedforward.outer.weight", (f"{theirs}{last}.DenseReluDense.wo.weight",)),
        ]
        for part, place, name in (("mixer", 0, "SelfAttention"), ("cross", 1, "EncDecAttention")):
            qkv = tuple(f"{theirs}{place}.{name}.{x}.weight" for x in "qkv")
            rules.append(Rule(f"{ours}{part}.qkv.weight", qkv, QKV_ROWS))
            rules.append(Rule(f"{ours}{part}.out.weight", (f"{theirs}{place}.{name}.o.weight",)))
    return tuple(rules)


def _read(fields: Fields, names: Collection[str] | None) -> ModelConfig:
    fields.only("is_encoder_decoder", True)
    dim = fields.whole("d_model", REQUIRED, "hidden_size")
    depth = fields.whole("num_layers", REQUIRED, "num_hidden_layers")
    attention = {
        "heads": fields.whole("num_heads", REQUIRED, "num_attention_heads"),
        "head_dim": fields.whole("d_kv", 64, "head_dim"),
        "scale": 1.0,
    }
    shared: dict[str, Any] = {
        "vocab": fields.whole("vocab_size", REQUIRED),
        "dim": dim,
        "feedforward": _feedforward(fields),
        "position": {
            "name": "t5",
            "buckets": fields.whole("relative_attention_num_buckets", 32),
            "max_distance": fields.whole("relative_attention_max_distance", 128),
        },
        "stack": {"name": "residual", "norm": "rms", "eps": fields.number("layer_norm_epsilon", 1e-6)},
    }
    tied, scaled = _output(fields, names)
    fields.ignore("initializer_factor", "n_positions", "dropout_rate")
    return ModelConfig(
        kind="seq2seq",
        depth=fields.maybe_whole("num_decoder_layers") or depth,
        mixer={"name": "mha", **attention},
        cross={"name": "cross", **attention},
        encoder=ModelConfig(
            kind="encoder", depth=depth, mixer={"name": "bidirectional", **attention}, **shared
        ),
        tie_embeddings=tied,
        logit_scale=dim**-0.5 if scaled else 1.0,
        **shared,
    )


def _output(fields: Fields, names: Collection[str] | None) -> tuple[bool, bool]:
    """Is the output matrix the embedding, and is the last hidden state scaled?

    Before transformers 5 one key said both. Since then the scale has its own key, configs always claim to be
    tied, and the tensors say whether they are.
    """
    tied = fields.truth("tie_word_embeddings", True)
    scaled = fields.truth("scale_decoder_outputs", tied)
    if names is not None and not scaled:
        tied = "lm_head.weight" not in names
    return tied, scaled


def _feedforward(fields: Fields) -> dict[str, Any]:
    given = fields.take("feed_forward_proj", "relu")
    word = str(given).removeprefix("gated-")
    gated = word != given
    if word not in ACTIVATIONS:
        raise ValueError(
            f"{fields.what}: feed_forward_proj={shown(given)} is not supported "
            f"(accepted: {', '.join(sorted(ACTIVATIONS))}, each also with gated- before it)"
        )
    name = "gelu_new" if given == "gated-gelu" else word  # the one exception in transformers
    fields.only("dense_act_fn", name, word, None)
    fields.only("is_gated_act", gated, None)
    return {
        "name": "dense",
        "hidden": fields.whole("d_ff", REQUIRED),
        "activation": ACTIVATIONS[name],
        "gated": gated,
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    if config.encoder is None:
        raise ValueError("it needs an encoder")
    mixer, feedforward, position = mixer_of(config, 0), feedforward_of(config, 0), position_of(config)
    act = activation_name(
        feedforward["activation"], {"gelu_tanh": "gelu" if feedforward["gated"] else "gelu_new"}
    )
    return {
        "is_encoder_decoder": True,
        "vocab_size": config.vocab,
        "d_model": config.dim,
        "num_layers": config.encoder.depth,
        "num_decoder_layers": config.depth,
        "num_heads": mixer["heads"],
        "d_kv": mixer["head_dim"],
        "d_ff": feedforward["hidden"],
        "feed_forward_proj": f"gated-{act}" if feedforward["gated"] else act,
        "relative_attention_num_buckets": position["buckets"],
        "relative_attention_max_distance": position["max_distance"],
        "layer_norm_epsilon": stack_of(config)["eps"],
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.logit_scale != 1,
        "decoder_start_token_id": 0,
    }


FAMILIES = (
    Family(
        model_type="t5",
        architecture="T5ForConditionalGeneration",
        prefix="",
        read=_read,
        write=_write,
        rules=_rules,
        ignorable=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    ),
)
