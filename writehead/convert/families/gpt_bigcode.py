"""GPTBigCode (SantaCoder, StarCoder): GPT-2 with one write-head, or with one for each head."""

from collections.abc import Collection
from typing import Any

from writehead.config import ModelConfig
from writehead.convert.families.base import REQUIRED, Family, Fields, mixer_of
from writehead.convert.families.gpt2 import LAYER, THEIRS, head_scale, read_common, rules_of, write_common
from writehead.convert.rules import GROUPED, SAME, Rule


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    return (
        Rule(f"{LAYER}mixer.qkv.bias", (f"{THEIRS}attn.c_attn.bias",), GROUPED),
        *rules_of(config, SAME, GROUPED),
    )


def _read(fields: Fields, names: Collection[str] | None) -> ModelConfig:
    heads = fields.whole("n_head", REQUIRED, "num_attention_heads")
    scale = head_scale(fields, fields.whole("n_embd", REQUIRED, "hidden_size"), heads)
    kv_heads = 1 if fields.truth("multi_query", True) else heads
    fields.only("num_key_value_heads", kv_heads, None)
    # these choose the precision of the softmax or tell a server what to do
    fields.ignore("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "inference_runner")
    fields.ignore("max_batch_size", "max_sequence_length", "pad_key_length", "pre_allocate_kv_cache")
    fields.ignore("validate_runner_input")
    mixer: dict[str, Any] = {"name": "gqa", "heads": heads, "kv_heads": kv_heads, "bias": "all"}
    return read_common(fields, [mixer if scale is None else mixer | {"scale": scale}], "gelu_pytorch_tanh")


def _write(config: ModelConfig) -> dict[str, Any]:
    mixer = mixer_of(config, 0)
    return write_common(config) | {
        "multi_query": mixer["kv_heads"] == 1,
        "scale_attn_weights": mixer["scale"] != 1,
    }


FAMILIES = (
    Family(
        model_type="gpt_bigcode",
        architecture="GPTBigCodeForCausalLM",
        prefix="transformer.",
        read=_read,
        write=_write,
        rules=_rules,
        ignorable=("transformer.bias", "transformer.h.{layer}.attn.bias"),
    ),
)
