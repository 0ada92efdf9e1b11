"""LED: an encoder with Longformer's windows, a decoder that reads everything, BART's layers.

As with Longformer, transformers has no global tokens unless a mask names some, and neither has the model
read here; `tokens=1` in the encoder's mixers makes the first token global, as it is for summaries. The
decoder starts from the token that ends a text: `decoder_start_token_id=2`, where T5 starts from padding.
"""

from collections.abc import Collection
from typing import Any

from writehead.config import ModelConfig
from writehead.convert.errors import shown
from writehead.convert.families.base import (
    ACTIVATIONS,
    Family,
    Fields,
    activation_name,
    feedforward_of,
    mixer_of,
    position_of,
    tiled,
)
from writehead.convert.rules import QKV_ROWS, Form, Rule

EPS = 1e-5  # of their norms, which no key states
ROW = Form(lambda parts, _: parts[0][0], lambda ours, _: (ours[None],), moves_rows=False)
COPIES = ("led.encoder.embed_tokens.weight", "led.decoder.embed_tokens.weight", "lm_head.weight")
GLOBAL, LOCAL = ("query_global", "key_global", "value_global"), ("query", "key", "value")


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    rules = [
        Rule("encoder.embedding.table", ("led.shared.weight",), copies=COPIES),
        Rule("decoder.embedding.bias", ("final_logits_bias",), ROW),
    ]
    for side in ("encoder", "decoder"):
        positions = (f"led.{side}.embed_positions.weight",)
        rules.append(Rule(f"{side}.embedding.position.table", positions))
        for kind in ("weight", "bias"):
            rules += _layer_rules(side, kind)
    return tuple(rules)


def _layer_rules(side: str, kind: str) -> list[Rule]:
    """The rules of one half's weights, or of its biases."""
    ours, theirs = f"{side}.stack.blocks.{{layer}}.", f"led.{side}.layers.{{layer}}."
    pairs = {
        f"{side}.embedding.norm": f"led.{side}.layernorm_embedding",
        f"{ours}mixer_norm": f"{theirs}self_attn_layer_norm",
        f"{ours}cross_norm": f"{theirs}encoder_attn_layer_norm",
        f"{ours}feedforward_norm": f"{theirs}final_layer_norm",
        f"{ours}feedforward.inner": f"{theirs}fc1",
        f"{ours}feedforward.outer": f"{theirs}fc2",
        f"{ours}mixer.out": f"{theirs}self_attn.{'output' if side == 'encoder' else 'out_proj'}",
        f"{ours}cross.out": f"{theirs}encoder_attn.out_proj",
    }
    inner = f"{theirs}self_attn.longformer_self_attn."
    if side == "encoder":
        heads = {
            f"{ours}mixer.qkv": [f"{inner}{name}" for name in LOCAL],
            f"{ours}mixer.global_qkv": [f"{inner}{name}" for name in GLOBAL],
        }
    else:
        heads = {
            f"{ours}{part}.qkv": [f"{theirs}{name}.{x}_proj" for x in "qkv"]
            for part, name in (("mixer", "self_attn"), ("cross", "encoder_attn"))
        }
    rules = [Rule(f"{a}.{kind}", (f"{b}.{kind}",)) for a, b in pairs.items()]
    return rules + [
        Rule(f"{a}.{kind}", tuple(f"{b}.{kind}" for b in bs), QKV_ROWS) for a, bs in heads.items()
    ]


def _read(fields: Fields, names: Collection[str] | None) -> ModelConfig:
    fields.only("is_encoder_decoder", True)
    fields.only("tie_word_embeddings", True)
    fields.ignore("init_std", "dropout", "encoder_layerdrop", "decoder_layerdrop", "num_hidden_layers")
    dim = fields.whole("d_model", 1024, "hidden_size")
    shared: dict[str, Any] = {
        "vocab": fields.whole("vocab_size", 50265),
        "dim": dim,
        "stack": {"name": "residual", "order": "post", "norm": "layer", "eps": EPS, "last_norm": False},
        "embed_norm": True,
        "embed_norm_last": True,
    }
    activation = fields.choice("activation_function", "gelu", ACTIVATIONS)
    halves: dict[str, dict[str, Any]] = {}
    attentions: dict[str, dict[str, Any]] = {}
    for side, positions in (("encoder", 16384), ("decoder", 1024)):
        aliases = ("num_attention_heads",) if side == "encoder" else ()
        heads = fields.whole(f"{side}_attention_heads", 16, *aliases)
        if dim % heads:
            raise ValueError(
                f"{fields.what}: d_model={dim} is not a multiple of {side}_attention_heads={heads}"
            )
        attentions[side] = {"heads": heads, "bias": "all"}
        halves[side] = {
            "depth": fields.whole(f"{side}_layers", 12),
            "feedforward": {
                "name": "dense",
                "hidden": fields.whole(f"{side}_ffn_dim", 4096),
                "activation": activation,
                "bias": True,
            },
            "position": {
                "name": "learned",
                "max_context": fields.whole(f"max_{side}_position_embeddings", positions),
            },
        }
    windows = _windows(fields, halves["encoder"]["depth"])
    mixers = ({"name": "longformer", "tokens": 0, "window": w, **attentions["encoder"]} for w in windows)
    return ModelConfig(
        kind="seq2seq",
        mixer={"name": "mha", **attentions["decoder"]},
        cross={"name": "cross", **attentions["decoder"]},
        encoder=ModelConfig(kind="encoder", mixer=tiled(mixers), **halves["encoder"], **shared),
        head_bias=True,
        **halves["decoder"],
        **shared,
    )


def _windows(fields: Fields, depth: int) -> list[int]:
    windows = fields.take("attention_window", 512)
    windows = windows if isinstance(windows, list) else [windows] * depth
    if len(windows) != depth or not all(type(w) is int and w > 0 and w % 2 == 0 for w in windows):
        raise ValueError(
            f"{fields.what}: attention_window={shown(windows)} must be an even number above 0, or one for "
            f"each of {depth} layers"
        )
    return windows


def _write(config: ModelConfig) -> dict[str, Any]:
    if config.encoder is None:
        raise ValueError("it needs an encoder")
    feedforward = feedforward_of(config, 0)
    values: dict[str, Any] = {
        "is_encoder_decoder": True,
        "vocab_size": config.vocab,
        "d_model": config.dim,
        "activation_function": activation_name(feedforward["activation"], {"gelu_tanh": "gelu_new"}),
        "attention_window": [mixer_of(config.encoder, i)["window"] for i in range(config.encoder.depth)],
        "tie_word_embeddings": config.tie_embeddings,
        "decoder_start_token_id": 2,
    }
    for side, half in (("encoder", config.encoder), ("decoder", config)):
        values |= {
            f"{side}_layers": half.depth,
            f"{side}_attention_heads": mixer_of(half, 0)["heads"],
            f"{side}_ffn_dim": feedforward_of(half, 0)["hidden"],
            f"max_{side}_position_embeddings": position_of(half)["max_context"],
        }
    return values


FAMILIES = (
    Family(
        model_type="led",
        architecture="LEDForConditionalGeneration",
        prefix="led.",
        read=_read,
        write=_write,
        rules=_rules,
    ),
)
