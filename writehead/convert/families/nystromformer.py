"""Nystromformer: landmarks, a convolution over the values, BERT's layers.

Transformers cuts its tokens into segments only if there are exactly `segment_means_seq_len` of them, which
is the `max_context` of a model here. With as many landmarks as that, as its default config has it, it
computes ordinary attention at every length; here that takes as many landmarks as there are positions. Its
pseudo-inverse starts from a norm over the whole batch; a row by itself gives the same here. The first two
rows of its table of positions are never read.
"""

from collections.abc import Collection
from typing import Any

from writehead.config import ModelConfig
from writehead.convert.families.base import ACTIVATIONS, REQUIRED, Family, Fields, mixer_of, position_of
from writehead.convert.families.bert import (
    LAYER,
    encoder_rules,
    has_head,
    head_rules,
    read_encoder,
    write_encoder,
)
from writehead.convert.rules import Form, Rule

THEIRS = "nystromformer.encoder.layer.{layer}."
HEAD = "cls.predictions."
PLANE = Form(lambda parts, _: parts[0][:, 0, :, 0], lambda ours, _: (ours[:, None, :, None],))


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    head = (f"{HEAD}transform.dense", f"{HEAD}transform.LayerNorm", f"{HEAD}bias", f"{HEAD}decoder.bias")
    body = encoder_rules("nystromformer.", 2, f"{HEAD}decoder.weight")
    return (
        *body,
        *head_rules(*head),
        Rule(f"{LAYER}mixer.conv", (f"{THEIRS}attention.self.conv.weight",), PLANE),
    )


def _read(fields: Fields, names: Collection[str] | None) -> ModelConfig:
    landmarks = fields.whole("num_landmarks", 64)
    length = fields.whole("segment_means_seq_len", 64)
    exact = landmarks == length
    if length % landmarks:
        raise ValueError(
            f"{fields.what}: segment_means_seq_len={length} is not a multiple of num_landmarks={landmarks}"
        )
    fields.only("inv_coeff_init_option", False)
    act = fields.choice("hidden_act", REQUIRED, ACTIVATIONS)
    mixer = {
        "name": "nystromformer",
        "landmarks": fields.whole("max_position_embeddings", REQUIRED) if exact else landmarks,
        "kernel": fields.whole("conv_kernel_size", 65),
        "coupled": True,
    }
    head = act if has_head(fields, names, HEAD) else None
    return read_encoder(fields, mixer, head, 1e-5, max_context=None if exact else length)


def _write(config: ModelConfig) -> dict[str, Any]:
    mixer, most = mixer_of(config, 0), position_of(config)["max_context"]
    landmarks = mixer["landmarks"]
    length = config.max_context or landmarks * max(1, most // landmarks)
    name = "Model" if config.head_transform is None else "ForMaskedLM"
    return write_encoder(config) | {
        "architectures": [f"Nystromformer{name}"],
        "num_landmarks": landmarks,
        "segment_means_seq_len": length,
        "conv_kernel_size": mixer["kernel"],
    }


FAMILIES = (
    Family(
        model_type="nystromformer",
        architecture="NystromformerForMaskedLM",
        prefix="nystromformer.",
        read=_read,
        write=_write,
        rules=_rules,
        ignorable=("nystromformer.embeddings.position_ids", "nystromformer.embeddings.token_type_ids"),
    ),
)
