"""Llama and its kin: Mistral (a window), Qwen2 (biases, some windows), Qwen3 (query and key norms), Gemma 1.

A sliding window of W is W keys including the query's own in both libraries. Gemma stores the weights of
norms less 1.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
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
    tiled,
)
from writehead.convert.families.rotary import read_rotary, write_rotary
from writehead.convert.rules import HALVES, PLUS_ONE, QKV_ROWS, SAME, Rule
from writehead.core.pattern import Window, from_spec

LAYER = "stack.blocks.{layer}."
THEIRS = "model.layers.{layer}."
NAMES = {"gelu_tanh": "gelu_pytorch_tanh"}


def _rules(config: ModelConfig, norm: Any = SAME) -> tuple[Rule, ...]:
    tied = ("lm_head.weight",) if config.tie_embeddings else ()
    rules = [
        Rule("embedding.table", ("model.embed_tokens.weight",), copies=tied),
        Rule("embedding.output", ("lm_head.weight",)),
        Rule("stack.norm.weight", ("model.norm.weight",), norm),
        Rule(LAYER + "mixer_norm.weight", (THEIRS + "input_layernorm.weight",), norm),
        Rule(LAYER + "feedforward_norm.weight", (THEIRS + "post_attention_layernorm.weight",), norm),
    ]
    for kind in ("weight", "bias"):
        qkv = tuple(f"{THEIRS}self_attn.{name}_proj.{kind}" for name in "qkv")
        inner = tuple(f"{THEIRS}mlp.{name}_proj.{kind}" for name in ("gate", "up"))
        rules += [
            Rule(f"{LAYER}mixer.qkv.{kind}", qkv, QKV_ROWS),
            Rule(f"{LAYER}mixer.out.{kind}", (f"{THEIRS}self_attn.o_proj.{kind}",)),
            Rule(f"{LAYER}feedforward.inner.{kind}", inner, HALVES),
            Rule(f"{LAYER}feedforward.outer.{kind}", (f"{THEIRS}mlp.down_proj.{kind}",)),
        ]
    for name in "qk":
        rules.append(Rule(f"{LAYER}mixer.qkv.{name}_norm.weight", (f"{THEIRS}self_attn.{name}_norm.weight",)))
    return tuple(rules)


@dataclass(frozen=True)
class Traits:
    """In what a family differs from Llama: defaults of its config, and keys that only it has."""

    kv_heads: int | None = None
    head_dim: int | None = None
    activation: str = "silu"
    tied: bool = False
    attention_bias: bool = False  # has the key
    mlp_bias: bool = False  # has the key
    bias: str = "none"
    qk_norm: bool = False
    window: str = "none"  # "all": in all layers; "some": in those that the config names
    context: int = 2048


TRAITS: Mapping[str, Traits] = {
    "llama": Traits(attention_bias=True, mlp_bias=True),
    "mistral": Traits(kv_heads=8, window="all", context=131072),
    "qwen2": Traits(kv_heads=32, bias="qkv", window="some", context=32768),
    "qwen3": Traits(
        kv_heads=32, head_dim=128, attention_bias=True, qk_norm=True, window="some", context=32768
    ),
    "gemma": Traits(
        kv_heads=16,
        head_dim=256,
        activation="gelu_pytorch_tanh",
        tied=True,
        attention_bias=True,
        context=8192,
    ),
}


def _read(kind: str, fields: Fields, names: Collection[str] | None) -> ModelConfig:
    traits = TRAITS[kind]
    dim, depth = fields.whole("hidden_size", REQUIRED), fields.whole("num_hidden_layers", REQUIRED)
    heads = fields.whole("num_attention_heads", REQUIRED)
    context = fields.whole("max_position_embeddings", traits.context)
    eps = fields.number("rms_norm_eps", 1e-6)
    bias = "all" if traits.attention_bias and fields.truth("attention_bias", False) else traits.bias
    mixer: dict[str, Any] = {
        "name": "gqa",
        "heads": heads,
        "kv_heads": fields.whole("num_key_value_heads", traits.kv_heads or heads),
        "bias": bias,
    }
    head_dim = fields.maybe_whole("head_dim") or traits.head_dim
    if head_dim is not None and head_dim * heads != dim:
        mixer["head_dim"] = head_dim
    elif head_dim is None and dim % heads:
        raise ValueError(f"{fields.what}: hidden_size={dim} is not a multiple of num_attention_heads={heads}")
    if traits.qk_norm:
        mixer["qk_norm"] = eps
    feedforward = {
        "name": "dense",
        "hidden": fields.whole("intermediate_size", REQUIRED),
        "activation": _activation(kind, fields, traits),
        "gated": True,
        "bias": traits.mlp_bias and fields.truth("mlp_bias", False),
    }
    fields.only("pretraining_tp", 1, None)
    fields.only("rope_interleaved", False)
    fields.only("use_bidirectional_attention", None, False)
    windows = _windows(fields, traits, depth)
    patterns = [mixer if w is None else mixer | {"pattern": {"name": "window", "window": w}} for w in windows]
    return ModelConfig(
        vocab=fields.whole("vocab_size", REQUIRED),
        dim=dim,
        depth=depth,
        mixer=tiled(patterns),
        feedforward=feedforward,
        position=read_rotary(fields, context),
        stack={"name": "residual", "norm": "rms", "eps": eps},
        tie_embeddings=fields.truth("tie_word_embeddings", traits.tied),
        embed_scale=dim**0.5 if kind == "gemma" else 1.0,
        max_context=context,
    )


def _activation(kind: str, fields: Fields, traits: Traits) -> str:
    given = fields.choice("hidden_act", traits.activation, ACTIVATIONS)
    if kind != "gemma":
        return given
    newer = fields.take("hidden_activation", None)
    if newer is not None:
        return fields.choice("hidden_activation", newer, ACTIVATIONS)
    return (
        "gelu_tanh" if given == "gelu" else given
    )  # Gemma's first configs say gelu and mean the approximation


def _windows(fields: Fields, traits: Traits, depth: int) -> list[int | None]:
    """The window of each layer, None = all of the past."""
    if traits.window == "none":
        return [None]
    if traits.window == "all":
        # a Mistral config without the key has the first Mistral's window; null means none
        absent = "sliding_window" not in fields.values
        window = 4096 if absent else fields.maybe_whole("sliding_window")
        return [window]
    first = fields.whole("max_window_layers", 28, least=0)
    window = fields.maybe_whole("sliding_window")
    window = (
        (4096 if "sliding_window" not in fields.values else window)
        if fields.truth("use_sliding_window", False)
        else None
    )
    types = fields.take("layer_types", None)
    if types is None:
        return [window if i >= first else None for i in range(min(depth, 1 << 16))]
    if not isinstance(types, list) or len(types) != depth:
        raise ValueError(f"{fields.what}: layer_types must name each of the {depth} layers")
    accepted = {"full_attention": None, "sliding_attention": window}
    for name in types:
        if name not in accepted or (name == "sliding_attention" and window is None):
            raise ValueError(
                f"{fields.what}: layer_types has {shown(name)}; accepted: full_attention, and "
                "sliding_attention with use_sliding_window and sliding_window"
            )
    return [accepted[name] for name in types]


def _write(kind: str, config: ModelConfig) -> dict[str, Any]:
    traits = TRAITS[kind]
    mixers = [mixer_of(config, layer) for layer in range(config.depth)]
    mixer, feedforward = mixers[0], feedforward_of(config, 0)
    values: dict[str, Any] = {
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": mixer["heads"],
        "num_key_value_heads": mixer["kv_heads"],
        "head_dim": mixer["head_dim"],
        "intermediate_size": feedforward["hidden"],
        "hidden_act": activation_name(feedforward["activation"], NAMES),
        "vocab_size": config.vocab,
        "max_position_embeddings": config.max_context or traits.context,
        "rms_norm_eps": stack_of(config)["eps"],
        "tie_word_embeddings": config.tie_embeddings,
        **write_rotary(position_of(config)),
    }
    if traits.attention_bias:
        values["attention_bias"] = mixer["bias"] == "all"
    if traits.mlp_bias:
        values["mlp_bias"] = feedforward["bias"]
    windows = [p.window if isinstance(p := from_spec(m["pattern"]), Window) else None for m in mixers]
    if traits.window == "all":
        values["sliding_window"] = windows[0]
    elif traits.window == "some":
        values |= {
            "use_sliding_window": any(windows),
            "sliding_window": next(filter(None, windows), None),
            "max_window_layers": next((i for i, w in enumerate(windows) if w), config.depth),
            "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
        }
    return values


def _family(kind: str, name: str, rules: Callable[[ModelConfig], tuple[Rule, ...]] = _rules) -> Family:
    return Family(
        model_type=kind,
        architecture=f"{name}ForCausalLM",
        prefix="model.",
        read=partial(_read, kind),
        write=partial(_write, kind),
        rules=rules,
        ignorable=("model.layers.{layer}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
    )


FAMILIES = (
    _family("llama", "Llama"),
    _family("mistral", "Mistral"),
    _family("qwen2", "Qwen2"),
    _family("qwen3", "Qwen3"),
    _family("gemma", "Gemma", partial(_rules, norm=PLUS_ONE)),
)
