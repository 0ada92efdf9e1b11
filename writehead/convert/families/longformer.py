"""Longformer: a window in each layer, projections of their own for global tokens, RoBERTa's layers.

Without a mask of global tokens transformers has none, and neither has the model read here; `tokens=g` in the
mixers of its config makes the first g global. Its table of positions begins with two rows that no token
reads. Its pooler and its heads for classes and answers have no place in an encoder: poolers are left out with
a warning, heads are refused.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from writehead.config import ModelConfig
from writehead.convert.errors import shown
from writehead.convert.families.base import Family, Fields, mixer_of, position_of, tiled
from writehead.convert.families.bert import (
    LAYER,
    encoder_rules,
    has_head,
    head_rules,
    read_encoder,
    write_encoder,
)
from writehead.convert.rules import QKV_ROWS, Rule

THEIRS = "longformer.encoder.layer.{layer}.attention.self."
UNREAD = 2  # rows of positions before the first token's: padding has id 1, positions count from the next


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    rules = encoder_rules("longformer.", UNREAD, "lm_head.decoder.weight")
    rules += head_rules("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder.bias")
    for kind in ("weight", "bias"):
        names = tuple(f"{THEIRS}{name}_global.{kind}" for name in ("query", "key", "value"))
        rules.append(Rule(f"{LAYER}mixer.global_qkv.{kind}", names, QKV_ROWS))
    return tuple(rules)


def _read(fields: Fields, names: Collection[str] | None) -> ModelConfig:
    fields.only("pad_token_id", 1, None)
    fields.only("attention_mode", "longformer", None)
    fields.only("ignore_attention_mask", False, None)
    fields.ignore("onnx_export")
    head = "gelu" if has_head(fields, names, "lm_head.") else None
    config = read_encoder(fields, {"name": "longformer", "tokens": 0}, head)
    windows = fields.take("attention_window", 512)
    windows = windows if isinstance(windows, list) else [windows] * config.depth
    if len(windows) != config.depth or not all(type(w) is int and w > 0 and w % 2 == 0 for w in windows):
        raise ValueError(
            f"{fields.what}: attention_window={shown(windows)} must be an even number above 0, or one for "
            f"each of {config.depth} layers"
        )
    assert isinstance(config.mixer, dict)
    most = fields.whole("max_position_embeddings", 512, least=UNREAD + 1) - UNREAD
    return replace(
        config,
        mixer=tiled({**config.mixer, "window": window} for window in windows),
        position={"name": "learned", "max_context": most},
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    name = "Model" if config.head_transform is None else "ForMaskedLM"
    return write_encoder(config) | {
        "architectures": [f"Longformer{name}"],
        "attention_window": [mixer_of(config, i)["window"] for i in range(config.depth)],
        "max_position_embeddings": position_of(config)["max_context"] + UNREAD,
        "pad_token_id": UNREAD - 1,
    }


FAMILIES = (
    Family(
        model_type="longformer",
        architecture="LongformerForMaskedLM",
        prefix="longformer.",
        read=_read,
        write=_write,
        rules=_rules,
        ignorable=("longformer.embeddings.position_ids",),
        dropped=("longformer.pooler.{name}",),
    ),
)
