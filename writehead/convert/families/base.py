"""What a family of Hugging Face models is: how its config reads and writes, and its table of key rules."""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

from torch import Tensor

from writehead.catalog import FEEDFORWARDS, MIXERS, POSITIONS, STACKS, Row, Spec, find, load
from writehead.config import ModelConfig
from writehead.convert.errors import shown
from writehead.convert.rules import Rule, heads_of
from writehead.positions.axial import even_widths

# keys of any Hugging Face config that say nothing about the function which the model computes
IGNORABLE = frozenset(
    [
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_labels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "output_scores",
        "pad_token_id",
        "prefix",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unk_token_id",
        "use_bfloat16",
        "use_cache",
    ]
)
# keys of any config that change the function unless they have these values
INERT: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False,),
}
ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu", "sigmoid": "sigmoid",
    "linear": "identity",
}  # fmt: skip
REQUIRED = object()


class Fields:
    """A Hugging Face config that is read key by key; `done` raises if a key was left that could matter."""

    def __init__(self, values: Mapping[str, Any], what: str = "config.json") -> None:
        self.values, self.what = values, what
        self.known: set[str] = set()

    def take(self, key: str, default: Any, *aliases: str) -> Any:
        """The value under a key or one of its older names; null counts as absent.

        Raises:
            ValueError: two names with different values, or a required key that is absent.
        """
        self.known |= {key, *aliases}
        given = {name: self.values[name] for name in (key, *aliases) if self.values.get(name) is not None}
        if not given:
            if default is REQUIRED:
                raise ValueError(f"{self.what} lacks {key}")
            return default
        first, *others = given.values()
        if any(other != first for other in others):
            raise ValueError(f"{self.what} contradicts itself: {shown(str(given), 120)}")
        return first

    def whole(self, key: str, default: Any, *aliases: str, least: int = 1) -> int:
        """A whole number of at least `least`, below 2**31."""
        value = self.take(key, default, *aliases)
        if type(value) is not int or not least <= value < 2**31:
            raise ValueError(
                f"{self.what}: {key}={shown(value)} must be a whole number from {least} to 2**31 - 1"
            )
        return value

    def maybe_whole(self, key: str, *aliases: str) -> int | None:
        """A whole number of at least 1, or None if absent."""
        return None if self.take(key, None, *aliases) is None else self.whole(key, None, *aliases)

    def number(self, key: str, default: Any, *aliases: str) -> float:
        """A positive finite number."""
        value = self.take(key, default, *aliases)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise ValueError(f"{self.what}: {key}={shown(value)} must be a positive number")
        return float(value)

    def truth(self, key: str, default: bool, *aliases: str) -> bool:
        """True or false."""
        value = self.take(key, default, *aliases)
        if not isinstance(value, bool):
            raise ValueError(f"{self.what}: {key}={shown(value)} must be true or false")
        return value

    def choice(self, key: str, default: Any, table: Mapping[str, str]) -> str:
        """What a table says about a word.

        Raises:
            ValueError: a word that is not in it; the message names the nearest and lists all.
        """
        value = self.take(key, default)
        if not isinstance(value, str) or value not in table:
            near = get_close_matches(str(value), table, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{self.what}: {key}={shown(value)} is not supported{hint} "
                f"(accepted: {', '.join(sorted(table))})"
            )
        return table[value]

    def only(self, key: str, *accepted: Any) -> None:
        """Raise unless a key is absent or has one of the values that change nothing."""
        self.known.add(key)
        value = self.values.get(key, accepted[0])
        if not any(value == one and type(value) is type(one) for one in accepted):
            listed = " or ".join(shown(one) for one in accepted)
            raise ValueError(f"{self.what}: {key}={shown(value)} is not supported; accepted: {listed}")

    def ignore(self, *keys: str) -> None:
        """Keys that change nothing whatever their value."""
        self.known |= set(keys)

    def done(self) -> None:
        """Raise if there is a key that nobody asked for."""
        for key, accepted in INERT.items():
            if key not in self.known:
                self.only(key, *accepted)
        for key in self.values:
            if key not in self.known and key not in IGNORABLE and not key.endswith(("_dropout", "_pdrop")):
                near = get_close_matches(key, self.known | IGNORABLE, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"{self.what}: unknown key {shown(key)}{hint} (a key that might change what the "
                    "model computes is not passed over)"
                )


class Unstored(NamedTuple):
    """Weights of ours that their files do not hold, since their config says how to make them.

    Attributes:
        make: the config.json and the model -> tensors under names that the rules take.
        take: removes those from tensors that the rules gave -> what config.json says of them.
    """

    make: Callable[[Mapping[str, Any], ModelConfig], dict[str, Tensor]]
    take: Callable[[dict[str, Tensor], ModelConfig], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
        model_type, architecture: as in config.json.
        prefix: what a bare model's keys lack, such as "model.".
        read: the model that a config describes, given the checkpoint's tensor names (None = not known).
        write: the config of a model; may be wrong for a model of another family, which reading it back shows.
        rules: the table for a model.
        ignorable: patterns of keys that hold no weights.
        dropped: patterns of keys whose weights have no place here; leaving them out gives a warning.
        unstored: weights that are in no file.
    """

    model_type: str
    architecture: str
    prefix: str
    read: Callable[[Fields, Collection[str] | None], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    rules: Callable[[ModelConfig], tuple[Rule, ...]]
    ignorable: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    unstored: Unstored | None = None


def full(table: Mapping[str, Row], spec: Spec) -> dict[str, Any]:
    """A spec with every argument of its row's constructor that has a value; the constructor is "target"."""
    row = find(table, spec)
    parameters = inspect.signature(load(row)).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {"target": row.target, **defaults, **row.preset, **{k: v for k, v in spec.items() if k != "name"}}


def mixer_of(config: ModelConfig, layer: int) -> dict[str, Any]:
    """The arguments of one layer's mixer, with heads, kv_heads and head_dim as numbers."""
    values = full(MIXERS, config.layer("mixer", layer))
    heads = heads_of(config, layer)
    if heads.H:
        values |= {"heads": heads.H, "kv_heads": heads.G, "head_dim": heads.D}
    return values


def feedforward_of(config: ModelConfig, layer: int) -> dict[str, Any]:
    """The arguments of one layer's feed-forward layer, with hidden as a number; pieces change nothing."""
    values = full(FEEDFORWARDS, config.layer("feedforward", layer))
    values.pop("chunk", None)
    values["target"] = "dense" if values["target"].startswith("feedforward.dense:") else values["target"]
    values["hidden"] = values.get("hidden") or 4 * config.dim
    return values


def stack_of(config: ModelConfig) -> dict[str, Any]:
    """The arguments of the stack."""
    return {key: value for key, value in full(STACKS, config.stack).items() if key != "dropout"}


def position_of(config: ModelConfig) -> dict[str, Any]:
    """The arguments of the position scheme, with the widths of axial tables as numbers."""
    values = full(POSITIONS, config.position)
    if values["target"].startswith("positions.axial:"):
        values["dims"] = values["dims"] or even_widths(config.dim, len(values["shape"]))
    return values


def tiled(specs: Iterable[Spec]) -> Spec | tuple[Spec, ...]:
    """One spec if all are equal, else all of them."""
    listed = tuple(specs)
    return listed[0] if all(spec == listed[0] for spec in listed) else listed


def activation_name(ours: str, preferred: Mapping[str, str]) -> str:
    """Their word for an activation of ours."""
    return preferred.get(ours) or next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)
