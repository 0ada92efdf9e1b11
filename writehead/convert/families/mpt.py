"""MPT: ALiBi, and no bias anywhere, not even in its norms."""

from collections.abc import Collection
from typing import Any

from writehead.config import ModelConfig
from writehead.convert.errors import shown
from writehead.convert.families.base import REQUIRED, Family, Fields, mixer_of, stack_of
from writehead.convert.rules import Rule

LAYER = "stack.blocks.{layer}."
THEIRS = "transformer.blocks.{layer}."


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    tied = ("lm_head.weight",) if config.tie_embeddings else ()
    return (
        Rule("embedding.table", ("transformer.wte.weight",), copies=tied),
        Rule("embedding.output", ("lm_head.weight",)),
        Rule("stack.norm.weight", ("transformer.norm_f.weight",)),
        Rule(f"{LAYER}mixer_norm.weight", (f"{THEIRS}norm_1.weight",)),
        Rule(f"{LAYER}feedforward_norm.weight", (f"{THEIRS}norm_2.weight",)),
        Rule(f"{LAYER}mixer.qkv.weight", (f"{THEIRS}attn.Wqkv.weight",)),
        Rule(f"{LAYER}mixer.out.weight", (f"{THEIRS}attn.out_proj.weight",)),
        Rule(f"{LAYER}feedforward.inner.weight", (f"{THEIRS}ffn.up_proj.weight",)),
        Rule(f"{LAYER}feedforward.outer.weight", (f"{THEIRS}ffn.down_proj.weight",)),
    )


def _read(fields: Fields, names: Collection[str] | None) -> ModelConfig:
    dim = fields.whole("d_model", REQUIRED, "hidden_size")
    heads = fields.whole("n_heads", REQUIRED, "num_attention_heads")
    if dim % heads:
        raise ValueError(f"{fields.what}: d_model={dim} is not a multiple of n_heads={heads}")
    given = fields.take("attn_config", {})
    if not isinstance(given, dict):
        raise ValueError(f"{fields.what}: attn_config={shown(given)} must be an object")
    attention = Fields(given, f"{fields.what}: attn_config")
    mixer: dict[str, Any] = {"name": "mha", "heads": heads}
    if attention.take("softmax_scale", None) is not None:
        mixer["scale"] = attention.number("softmax_scale", None)
    _check_attention(attention)
    for key, accepted in (
        ("expansion_ratio", (4,)), ("logit_scale", (None,)), ("no_bias", (True,)),
        ("norm_type", ("low_precision_layernorm", "layernorm")),
    ):  # fmt: skip
        fields.only(key, *accepted)
    # with ALiBi no position is learned; the rest is about training
    fields.ignore("learned_pos_emb", "embedding_fraction", "init_device", "init_config", "verbose")
    return ModelConfig(
        vocab=fields.whole("vocab_size", REQUIRED),
        dim=dim,
        depth=fields.whole("n_layers", REQUIRED, "num_hidden_layers"),
        mixer=mixer,
        feedforward={"name": "dense", "hidden": 4 * dim, "activation": "gelu"},
        position={"name": "alibi"},
        stack={
            "name": "residual",
            "norm": "layer_no_bias",
            "eps": fields.number("layer_norm_epsilon", 1e-5),
        },
        tie_embeddings=fields.truth("tie_word_embeddings", True),
        max_context=fields.whole("max_seq_len", 2048),
    )


def _check_attention(attention: Fields) -> None:
    """Raise unless the keys about attention mean ALiBi over causal multi-head attention."""
    for key, accepted in (
        ("attn_type", ("multihead_attention",)), ("alibi", (True,)), ("clip_qkv", (None, 0, 0.0)),
        ("prefix_lm", (False,)), ("qk_ln", (False,)), ("attn_uses_sequence_id", (False,)),
        ("alibi_bias_max", (8,)),  # transformers passes over other values, which the authors' code does not
    ):  # fmt: skip
        attention.only(key, *accepted)
    attention.ignore("attn_impl")
    attention.done()


def _write(config: ModelConfig) -> dict[str, Any]:
    mixer = mixer_of(config, 0)
    return {
        "d_model": config.dim,
        "n_heads": mixer["heads"],
        "n_layers": config.depth,
        "vocab_size": config.vocab,
        "max_seq_len": config.max_context or 2048,
        "layer_norm_epsilon": stack_of(config)["eps"],
        "tie_word_embeddings": config.tie_embeddings,
        "learned_pos_emb": False,
        "attn_config": {"alibi": True, "softmax_scale": mixer["scale"]},
    }


FAMILIES = (
    Family(
        model_type="mpt",
        architecture="MptForCausalLM",
        prefix="transformer.",
        read=_read,
        write=_write,
        rules=_rules,
    ),
)
