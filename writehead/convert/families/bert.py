"""What BERT's kin have in common: vectors of words, positions and types under one norm, layers that are
normalised after each part, and a head that guesses masked words."""

from collections.abc import Collection
from typing import Any

from torch.nn import functional as F

from writehead.config import ModelConfig
from writehead.convert.families.base import (
    ACTIVATIONS,
    REQUIRED,
    Fields,
    activation_name,
    feedforward_of,
    mixer_of,
    position_of,
    stack_of,
)
from writehead.convert.rules import QKV_ROWS, SAME, Form, Rule

LAYER = "stack.blocks.{layer}."


def without_first(rows: int) -> Form:
    """A table whose first rows no position reads: they are left out here, and are zeros when written."""
    if not rows:
        return SAME
    return Form(lambda parts, _: parts[0][rows:], lambda ours, _: (F.pad(ours, (0, 0, rows, 0)),))


def encoder_rules(prefix: str, first_position: int = 0, output: str | None = None) -> list[Rule]:
    """The table for all but the head and what is particular to an attention.

    Args:
        prefix: what the keys begin with, such as "bert.".
        first_position: the row of their table of positions that the first token reads.
        output: a key under which the table of words may stand once more.
    """
    embeddings, theirs = f"{prefix}embeddings.", f"{prefix}encoder.layer.{{layer}}."
    positions = (f"{embeddings}position_embeddings.weight",)
    rules = [
        Rule("embedding.table", (f"{embeddings}word_embeddings.weight",), copies=(output,) if output else ()),
        Rule("embedding.position.table", positions, without_first(first_position)),
        Rule("embedding.types", (f"{embeddings}token_type_embeddings.weight",)),
    ]
    for kind in ("weight", "bias"):
        qkv = tuple(f"{theirs}attention.self.{name}.{kind}" for name in ("query", "key", "value"))
        rules += [
            Rule(f"embedding.norm.{kind}", (f"{embeddings}LayerNorm.{kind}",)),
            Rule(f"{LAYER}mixer.qkv.{kind}", qkv, QKV_ROWS),
            Rule(f"{LAYER}mixer.out.{kind}", (f"{theirs}attention.output.dense.{kind}",)),
            Rule(f"{LAYER}mixer_norm.{kind}", (f"{theirs}attention.output.LayerNorm.{kind}",)),
            Rule(f"{LAYER}feedforward.inner.{kind}", (f"{theirs}intermediate.dense.{kind}",)),
            Rule(f"{LAYER}feedforward.outer.{kind}", (f"{theirs}output.dense.{kind}",)),
            Rule(f"{LAYER}feedforward_norm.{kind}", (f"{theirs}output.LayerNorm.{kind}",)),
        ]
    return rules


def head_rules(dense: str, norm: str, bias: str, copy: str) -> list[Rule]:
    """The table for the head that guesses masked words; its matrix is the table of words.

    Args:
        dense, norm: their keys without the last word.
        bias, copy: the key of the bias on the logits, and one under which it may stand once more.
    """
    rules = [Rule("embedding.bias", (bias,), copies=(copy,))]
    for kind in ("weight", "bias"):
        rules.append(Rule(f"embedding.transform.inner.{kind}", (f"{dense}.{kind}",)))
        rules.append(Rule(f"embedding.transform.norm.{kind}", (f"{norm}.{kind}",)))
    return rules


def has_head(fields: Fields, names: Collection[str] | None, keys: str) -> bool:
    """Does the checkpoint guess masked words? Its tensors say so, or the config if they are not known."""
    if names is not None:
        return any(name.startswith(keys) for name in names)
    architectures = fields.take("architectures", [])
    return any(str(name).endswith("ForMaskedLM") for name in architectures)


def read_encoder(
    fields: Fields, mixer: dict[str, Any], head: str | None, eps: float = 1e-12, **more: Any
) -> ModelConfig:
    """The encoder of a config, given its mixer (without heads and biases).

    Args:
        fields: the config.
        mixer: name and arguments that are particular to the attention.
        head: the activation in the head that guesses masked words; None = no head.
        eps: the norms' epsilon if the config states none.
        more: further keys of `ModelConfig`.
    """
    dim = fields.whole("hidden_size", REQUIRED)
    heads = fields.whole("num_attention_heads", REQUIRED)
    if dim % heads:
        raise ValueError(f"{fields.what}: hidden_size={dim} is not a multiple of num_attention_heads={heads}")
    fields.ignore("hidden_dropout_prob", "attention_probs_dropout_prob")
    # without it transformers has two biases in the head, one of which it never adds
    fields.only("tie_word_embeddings", True)
    return ModelConfig(
        kind="encoder",
        vocab=fields.whole("vocab_size", REQUIRED),
        dim=dim,
        depth=fields.whole("num_hidden_layers", REQUIRED),
        mixer={"heads": heads, "bias": "all", **mixer},
        feedforward={
            "name": "dense",
            "hidden": fields.whole("intermediate_size", REQUIRED),
            "activation": fields.choice("hidden_act", REQUIRED, ACTIVATIONS),
            "bias": True,
        },
        position={"name": "learned", "max_context": fields.whole("max_position_embeddings", REQUIRED)},
        stack={
            "name": "residual", "order": "post", "norm": "layer", "last_norm": False,
            "eps": fields.number("layer_norm_eps", eps),
        },
        embed_norm=True,
        embed_norm_last=True,
        token_types=fields.whole("type_vocab_size", 2),
        head_transform=head,
        head_bias=head is not None,
        **more,
    )  # fmt: skip


def write_encoder(config: ModelConfig) -> dict[str, Any]:
    """What the configs of BERT's kin say alike; keys that a family must state are all there."""
    feedforward = feedforward_of(config, 0)
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": mixer_of(config, 0)["heads"],
        "intermediate_size": feedforward["hidden"],
        "hidden_act": activation_name(feedforward["activation"], {"gelu_tanh": "gelu_new"}),
        "max_position_embeddings": position_of(config)["max_context"],
        "type_vocab_size": config.token_types,
        "layer_norm_eps": stack_of(config)["eps"],
        "tie_word_embeddings": config.tie_embeddings,
    }
