"""Big Bird, the encoder: blocks near, at both ends and at random, BERT's layers.

Transformers draws its random blocks anew for each call in training and has none in evaluation (there it
counts block 0 once more for each); here they are drawn once, by a counter with the layer's number for a seed.
Rows of so few blocks that it takes ordinary attention, at most 5 + 2 r, read all here up to 5 + r blocks. Its
pooler, which guessing words does not need, and its head for next sentences are left out with a warning.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from writehead.config import ModelConfig
from writehead.convert.families.base import ACTIVATIONS, REQUIRED, Family, Fields, mixer_of, tiled
from writehead.convert.families.bert import (
    encoder_rules,
    has_head,
    head_rules,
    read_encoder,
    write_encoder,
)
from writehead.convert.rules import Rule

HEAD = "cls.predictions."
KINDS = {"block_sparse": "big_bird", "original_full": "bidirectional"}


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    head = (f"{HEAD}transform.dense", f"{HEAD}transform.LayerNorm", f"{HEAD}bias", f"{HEAD}decoder.bias")
    return (*encoder_rules("bert.", 0, f"{HEAD}decoder.weight"), *head_rules(*head))


def _read(fields: Fields, names: Collection[str] | None) -> ModelConfig:
    fields.only("use_bias", True)
    kind = fields.choice("attention_type", "block_sparse", KINDS)
    act = fields.choice("hidden_act", REQUIRED, ACTIVATIONS)
    block, random = fields.whole("block_size", 64), fields.whole("num_random_blocks", 3, least=0)
    scale = fields.whole("hidden_size", REQUIRED) ** 0.5 if fields.truth("rescale_embeddings", False) else 1.0
    head = act if has_head(fields, names, HEAD) else None
    config = read_encoder(fields, {"name": kind}, head, embed_scale=scale)
    if kind == "bidirectional":
        return config
    assert isinstance(config.mixer, dict)
    own = {**config.mixer, "block": block, "random": random}
    return replace(config, mixer=tiled({**own, "seed": layer} for layer in range(config.depth)))


def _write(config: ModelConfig) -> dict[str, Any]:
    mixer = mixer_of(config, 0)
    name = "Model" if config.head_transform is None else "ForMaskedLM"
    values = write_encoder(config) | {
        "architectures": [f"BigBird{name}"],
        "rescale_embeddings": config.embed_scale != 1,
    }
    if "block" not in mixer:
        return values | {"attention_type": "original_full"}
    sizes = {"block_size": mixer["block"], "num_random_blocks": mixer["random"]}
    return values | {"attention_type": "block_sparse"} | sizes


FAMILIES = (
    Family(
        model_type="big_bird",
        architecture="BigBirdForMaskedLM",
        prefix="bert.",
        read=_read,
        write=_write,
        rules=_rules,
        ignorable=("bert.embeddings.position_ids", "bert.embeddings.token_type_ids"),
        dropped=("bert.pooler.{name}", "cls.seq_relationship.{name}"),
    ),
)
