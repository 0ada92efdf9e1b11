"""Reformer: LSH and local layers in a reversible stack whose streams end side by side.

An LSH layer becomes one in mode="paper", which gives the logits of transformers for a whole sequence but
cannot decode; with mode="set" or "multiset" in its place the same weights can. transformers stores no
rotations: it draws them at every call, from hash_seed if there is one. Here they are drawn once, from
hash_seed or else from 0, and kept. Where chunks of local layers do not divide those of LSH, transformers pads
sequences to a common multiple of both, and since chunks read in a circle that changes which tokens are read;
with as many -1 at the end ours gives the same. The logits' bias is in every file; transformers before 5 added
it, as we do, 5 leaves it out.
"""

from collections.abc import Collection, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from writehead.config import ModelConfig
from writehead.convert.errors import shown
from writehead.convert.families.base import (
    ACTIVATIONS,
    Family,
    Fields,
    Unstored,
    activation_name,
    feedforward_of,
    mixer_of,
    position_of,
    stack_of,
    tiled,
)
from writehead.convert.rules import QKV_ROWS, Form, Rule
from writehead.core.pattern import from_spec, to_spec
from writehead.core.pattern.base import And
from writehead.core.pattern.plain import Causal
from writehead.core.pattern.strided import Blocks
from writehead.mixers.reformer import Hashes

LAYER = "stack.blocks.{layer}."
THEIRS = "reformer.encoder.layers.{layer}."
ROTATIONS = THEIRS + "attention.self_attention.rotations"
PLACES = "reformer.embeddings.position_embeddings."
SEEDS = 1024  # tried when a model's rotations must be said by a seed
KINDS = ("lsh", "local")
ROWS = Form(lambda parts, _: parts[0].flatten(0, 1), lambda ours, _: (ours[:, None],))
COLUMNS = Form(lambda parts, _: parts[0].flatten(0, 1), lambda ours, _: (ours[None],))


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    attention = THEIRS + "attention."
    qkv = tuple(f"{attention}self_attention.{name}.weight" for name in ("query", "key", "value"))
    rules = [
        Rule("embedding.table", ("reformer.embeddings.word_embeddings.weight",)),
        Rule("embedding.position.table", (PLACES + "embedding.weight",)),
        Rule("embedding.position.tables.0", (PLACES + "weights.0",), ROWS),
        Rule("embedding.position.tables.1", (PLACES + "weights.1",), COLUMNS),
        Rule("embedding.output", ("lm_head.decoder.weight",)),
        Rule("embedding.bias", ("lm_head.bias",), copies=("lm_head.decoder.bias",)),
        Rule(LAYER + "mixer.hashes.rotations", (ROTATIONS,)),
        Rule(LAYER + "mixer.qk.weight", (attention + "self_attention.query_key.weight",)),
        Rule(LAYER + "mixer.v.weight", (attention + "self_attention.value.weight",)),
        Rule(LAYER + "mixer.qkv.weight", qkv, QKV_ROWS),
        Rule(LAYER + "mixer.out.weight", (attention + "output.dense.weight",)),
    ]
    for kind in ("weight", "bias"):
        rules += [
            Rule(f"stack.norm.{kind}", (f"reformer.encoder.layer_norm.{kind}",)),
            Rule(f"{LAYER}mixer_norm.{kind}", (f"{attention}layer_norm.{kind}",)),
            Rule(f"{LAYER}feedforward_norm.{kind}", (f"{THEIRS}feed_forward.layer_norm.{kind}",)),
            Rule(f"{LAYER}feedforward.inner.{kind}", (f"{THEIRS}feed_forward.dense.dense.{kind}",)),
            Rule(f"{LAYER}feedforward.outer.{kind}", (f"{THEIRS}feed_forward.output.dense.{kind}",)),
        ]
    return tuple(rules)


def _read(fields: Fields, names: Collection[str] | None) -> ModelConfig:
    if not fields.truth("is_decoder", False):
        raise ValueError(
            f"{fields.what}: is_decoder=false is not supported; accepted: true (ReformerModelWithLMHead)"
        )
    kinds = fields.take("attn_layers", ["local", "lsh"] * 3)
    if not isinstance(kinds, list | tuple) or not kinds or any(kind not in KINDS for kind in kinds):
        raise ValueError(
            f"{fields.what}: attn_layers={shown(kinds)} must be a list of {' and '.join(map(repr, KINDS))}"
        )
    dim, context = fields.whole("hidden_size", 256), fields.whole("max_position_embeddings", 4096)
    fields.only("tie_word_embeddings", False)
    fields.only("lsh_num_chunks_before", 1)
    fields.only("lsh_num_chunks_after", 0)
    fields.only("local_num_chunks_after", 0)
    fields.only("sinusoidal_pos_embds", False)
    fields.ignore("axial_norm_std", "chunk_size_lm_head", "hidden_dropout_prob", "num_hidden_layers")
    fields.ignore("local_attention_probs_dropout_prob", "lsh_attention_probs_dropout_prob")
    if fields.take("hash_seed", None) is not None:
        fields.whole("hash_seed", None, least=0)
    heads = {
        "heads": fields.whole("num_attention_heads", 12),
        "head_dim": fields.whole("attention_head_size", 64),
    }
    chunk = fields.whole("lsh_attn_chunk_length", 64)
    blocks = Blocks(
        fields.whole("local_attn_chunk_length", 64), fields.whole("local_num_chunks_before", 1, least=0)
    )
    made: dict[str, dict[str, Any]] = {
        "lsh": {
            "name": "reformer", **heads, "buckets": _buckets(fields, context, chunk),
            "rounds": fields.whole("num_hashes", 1), "window": chunk, "mode": "paper",
        },
        "local": {"name": "mha", **heads, "pattern": to_spec(And(Causal(), blocks))},
    }  # fmt: skip
    return ModelConfig(
        vocab=fields.whole("vocab_size", 320),
        dim=dim,
        depth=len(kinds),
        mixer=tiled(made[kind] for kind in kinds),
        feedforward={
            "name": "dense",
            "hidden": fields.whole("feed_forward_size", 512),
            "activation": fields.choice("hidden_act", "relu", ACTIVATIONS),
            "bias": True,
        },
        position=_places(fields, dim, context),
        stack={
            "name": "reversible",
            "norm": "layer",
            "eps": fields.number("layer_norm_eps", 1e-12),
            "output": "concat",
        },
        tie_embeddings=False,
        head_bias=True,
        max_context=context,
    )


def _buckets(fields: Fields, context: int, chunk: int) -> int | list[int]:
    """Their number; where the config leaves it open what transformers chooses for the longest sequence."""
    given = fields.take("num_buckets", None)
    factors: list[Any] = [*given] if isinstance(given, list | tuple) else [given]
    if given is not None and not (factors and all(type(n) is int and 2 <= n < 2**31 for n in factors)):
        raise ValueError(
            f"{fields.what}: num_buckets={shown(given)} must be an even whole number, or several"
        )
    if isinstance(given, list | tuple):
        return factors
    if given is not None:
        return fields.whole("num_buckets", None)
    power = max(1, (2 * (context // chunk)).bit_length() - 1)
    if 1 << power <= 2 * max(int((context // chunk) ** 0.5), chunk):
        return 1 << power
    return [1 << power // 2, 1 << power - power // 2]


def _places(fields: Fields, dim: int, context: int) -> dict[str, Any]:
    shape, widths = (
        fields.take(key, value)
        for key, value in (("axial_pos_shape", [64, 64]), ("axial_pos_embds_dim", [64, 192]))
    )
    if not fields.truth("axial_pos_embds", True):
        return {"name": "learned", "max_context": context}
    for key, pair in (("axial_pos_shape", shape), ("axial_pos_embds_dim", widths)):
        pair = list(pair) if isinstance(pair, list | tuple) else [pair]
        if len(pair) != 2 or any(type(n) is not int or not 1 <= n < 2**31 for n in pair):
            raise ValueError(f"{fields.what}: {key}={shown(pair)} must be two whole numbers of at least 1")
    if sum(widths) != dim:
        raise ValueError(f"{fields.what}: axial_pos_embds_dim={list(widths)} must be {dim} together")
    return {"name": "axial", "shape": list(shape), "dims": list(widths)}


def _write(config: ModelConfig) -> dict[str, Any]:
    mixers = [mixer_of(config, i) for i in range(config.depth)]
    kinds = ["lsh" if "buckets" in mixer else "local" for mixer in mixers]
    position, feedforward, first = position_of(config), feedforward_of(config, 0), mixers[0]
    values: dict[str, Any] = {
        "hidden_size": config.dim,
        "attn_layers": kinds,
        "num_attention_heads": first["heads"],
        "attention_head_size": first["head_dim"],
        "vocab_size": config.vocab,
        "feed_forward_size": feedforward["hidden"],
        "hidden_act": activation_name(feedforward["activation"], {"gelu_tanh": "gelu_new"}),
        "layer_norm_eps": stack_of(config)["eps"],
        "axial_pos_embds": "shape" in position,
        "is_decoder": True,
        "tie_word_embeddings": False,
    }
    longest = position.get("max_context")
    if "shape" in position:
        values |= {"axial_pos_shape": position["shape"], "axial_pos_embds_dim": position["dims"]}
        longest = prod(position["shape"])
    values["max_position_embeddings"] = config.max_context or longest
    for kind, mixer in zip(kinds, mixers, strict=True):
        values |= _layer(kind, mixer)
    return values


def _layer(kind: str, mixer: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of layers of one kind."""
    if kind == "lsh":
        return {
            "num_buckets": mixer["buckets"],
            "num_hashes": mixer["rounds"],
            "lsh_attn_chunk_length": mixer["window"],
        }
    pattern = from_spec(mixer["pattern"])
    blocks = pattern.b if isinstance(pattern, And) else None
    if not isinstance(blocks, Blocks):
        raise ValueError(f"its local layers read blocks; pattern {pattern} does not")
    return {"local_attn_chunk_length": blocks.size, "local_num_chunks_before": blocks.before}


def _draw(values: Mapping[str, Any], config: ModelConfig) -> dict[str, Tensor]:
    """The rotations of every LSH layer."""
    drawn: dict[str, Tensor] = {}
    made: Tensor | None = None
    for layer in range(config.depth):
        mixer = config.layer("mixer", layer)
        if mixer["name"] == "reformer":
            if made is None:
                hashes = Hashes(mixer["heads"], mixer["head_dim"], mixer["buckets"], mixer["rounds"])
                hashes.draw(values.get("hash_seed") or 0)
                made = hashes.rotations
            drawn[ROTATIONS.format(layer=layer)] = made.clone()
    return drawn


def _seed(theirs: dict[str, Tensor], config: ModelConfig) -> dict[str, Any]:
    """The seed that all rotations come from.

    Raises:
        ValueError: there is none among the first SEEDS.
    """
    names = [ROTATIONS.format(layer=layer) for layer in range(config.depth)]
    kept = [theirs.pop(name) for name in names if name in theirs]
    if not kept:
        return {}
    shape = tuple(kept[0].shape)
    for seed in range(SEEDS) if all(torch.equal(kept[0], other) for other in kept) else ():
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if torch.equal(drawn.to(kept[0]), kept[0]):
            return {"hash_seed": seed}
    raise ValueError(
        "transformers stores no rotations, it draws the same for all LSH layers from a seed; no seed from 0 "
        f"to {SEEDS - 1} gives this model's: save it with format='writehead', or before training call "
        "mixer.hashes.draw(0) on each LSH layer"
    )


FAMILIES = (
    Family(
        model_type="reformer",
        architecture="ReformerModelWithLMHead",
        prefix="reformer.",
        read=_read,
        write=_write,
        rules=_rules,
        unstored=Unstored(_draw, _seed),
    ),
)
