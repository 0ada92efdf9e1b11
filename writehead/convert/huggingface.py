"""Hugging Face model folders: which family a config.json speaks of, and the same model in both languages."""

import warnings
from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from typing import Any

from torch import Tensor

from writehead.catalog import MIXERS
from writehead.config import ModelConfig
from writehead.convert.errors import shown
from writehead.convert.families.base import (
    REQUIRED,
    Family,
    Fields,
    feedforward_of,
    full,
    mixer_of,
    position_of,
    stack_of,
)
from writehead.convert.files import Tensors
from writehead.convert.rules import Checkpoint, keys_like, save_weights
from writehead.core.pattern import from_spec, to_spec
from writehead.core.shapes import check_choice

# model_type -> file in families/; the order is that in which `write_config` tries them
FILES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "gemma": "llama",
    "gpt2": "gpt2",
    "gpt_bigcode": "gpt_bigcode",
    "falcon": "falcon",
    "bloom": "bloom",
    "mpt": "mpt",
    "t5": "t5",
    "led": "led",
    "nystromformer": "nystromformer",
    "longformer": "longformer",
    "big_bird": "big_bird",
    "reformer": "reformer",
}
# what two configs must agree in to the letter
SCALARS = (
    "vocab", "dim", "depth", "tie_embeddings", "embed_norm", "embed_norm_last", "token_types",
    "head_transform", "head_bias", "max_context",
)  # fmt: skip


def family(model_type: str) -> Family:
    """The family of that name.

    Raises:
        ValueError: there is none; the message names the nearest and lists all.
    """
    check_choice("model_type", model_type, FILES)
    module = import_module(f"writehead.convert.families.{FILES[model_type]}")
    families: tuple[Family, ...] = module.FAMILIES
    return next(one for one in families if one.model_type == model_type)


def read_config(
    values: Mapping[str, Any], names: Collection[str] | None = None
) -> tuple[Family, ModelConfig]:
    """The family and the model that a Hugging Face config describes.

    Args:
        values: the content of config.json.
        names: the names of the checkpoint's tensors, if known.

    Raises:
        ValueError: an unknown family, a key that is unknown or has a value which we cannot honour.
    """
    fields = Fields(values)
    kind = fields.take("model_type", REQUIRED)
    if not isinstance(kind, str):
        raise ValueError(f"model_type={shown(kind)} must be a word (accepted: {', '.join(sorted(FILES))})")
    found = family(kind)
    config = found.read(fields, names)
    fields.done()
    return found, config


def write_config(config: ModelConfig, model_type: str | None = None) -> tuple[Family, dict[str, Any]]:
    """The family that has such models, and their Hugging Face config.

    Args:
        config: the model.
        model_type: the family to use; default the first that fits.

    Raises:
        ValueError: no family (or not the given one) has such a model; the message says why not, for each.
    """
    against = []
    for kind in FILES if model_type is None else [model_type]:
        one = family(kind)
        try:
            values = {"model_type": kind, "architectures": [one.architecture], **one.write(config)}
            _, back = read_config(values)
            differences = list(_differences(config, back))
        except KeyError as error:
            differences = [f"none of the model's parts has the argument {error} of this family's"]
        except ValueError as error:
            differences = [str(error)]
        if not differences:
            return one, values
        against.append(f"{kind}: {differences[0]}")
    raise ValueError(
        "no Hugging Face family here can hold this model; save it with format='writehead'. "
        f"What stands against each: {'; '.join(against)}"
    )


def open_huggingface(values: Mapping[str, Any], theirs: Tensors) -> Checkpoint:
    """A Hugging Face config and tensors as a checkpoint to load.

    Raises:
        ValueError: what `read_config` raises.
    """
    found, config = read_config(values, theirs.keys())
    beside = found.unstored.make(values, config) if found.unstored else {}
    named = Prefixed(theirs, found.prefix, beside)
    if left := sorted(keys_like(found.dropped, named)):
        warnings.warn(f"left out, since the model has no place for them: {', '.join(left)}", stacklevel=2)
    passed = (*found.ignorable, *found.dropped)
    return Checkpoint(config, found.rules(config), named, longest_side(theirs), passed)


def longest_side(theirs: Tensors) -> int:
    """The largest size in any tensor's shape; reads no data."""
    return max((size for name in theirs for size in theirs.entry(name).shape), default=0)


def to_huggingface(
    config: ModelConfig, ours: Mapping[str, Tensor], model_type: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our model as a Hugging Face config and tensors.

    Raises:
        ValueError: no family can hold it.
    """
    found, values = write_config(config, model_type)
    name = str(next(iter(ours.values())).dtype).removeprefix("torch.")
    values |= {"dtype": name, "torch_dtype": name}
    theirs = save_weights(found.rules(config), ours, config)
    return values | (found.unstored.take(theirs, config) if found.unstored else {}), theirs


class Prefixed(Mapping[str, Tensor]):
    """Tensors under the names of the full model, also if a bare one was saved without the prefix, and those
    beside them that are in no file."""

    def __init__(self, theirs: Tensors, prefix: str, beside: Mapping[str, Tensor]) -> None:
        bare = not prefix or any(name.startswith(prefix) for name in theirs)
        self.theirs, self.beside = theirs, beside
        self.names = {name if bare or name.startswith("lm_head.") else prefix + name: name for name in theirs}

    def __getitem__(self, name: str) -> Tensor:
        return self.beside[name] if name in self.beside else self.theirs[self.names[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.beside[name].shape) if name in self.beside else self.theirs.shape(self.names[name])

    def rows(self, name: str, some: slice) -> Tensor:
        return self.beside[name][some] if name in self.beside else self.theirs.rows(self.names[name], some)

    def __iter__(self) -> Iterator[str]:
        yield from self.names
        yield from (name for name in self.beside if name not in self.names)

    def __len__(self) -> int:
        return len({*self.names, *self.beside})

    def __contains__(self, name: object) -> bool:
        return name in self.names or name in self.beside


def _differences(a: ModelConfig, b: ModelConfig) -> Iterator[str]:
    """What tells two models apart, however their configs are spelt."""
    if (a.encoder is None) != (b.encoder is None) or a.kind != b.kind:
        yield f"it holds a {b.kind}, the model is a {a.kind}"
        return
    if a.pixels is not None:
        yield "it holds a model of tokens, the model is one of images"
        return
    for name in SCALARS:
        if getattr(a, name) != getattr(b, name) and not (name == "max_context" and a.max_context is None):
            yield f"{name} would become {getattr(b, name)}, it is {getattr(a, name)}"
    for name in ("embed_scale", "logit_scale"):
        if abs(getattr(a, name) - getattr(b, name)) > 1e-6 * abs(getattr(a, name)):
            yield f"{name} would become {getattr(b, name)}, it is {getattr(a, name)}"
    yield from _unequal("position", position_of(a), position_of(b))
    yield from _unequal("stack", stack_of(a), stack_of(b))
    for layer in range(min(a.depth, b.depth)):
        yield from _unequal(f"layer {layer}: mixer", _mixer(a, layer), _mixer(b, layer))
        yield from _unequal(f"layer {layer}: feedforward", feedforward_of(a, layer), feedforward_of(b, layer))
    if a.cross is not None and b.cross is not None:
        yield from _unequal("cross", full(MIXERS, a.cross), full(MIXERS, b.cross))
    if a.encoder is not None and b.encoder is not None:
        yield from (f"encoder: {problem}" for problem in _differences(a.encoder, b.encoder))


def _mixer(config: ModelConfig, layer: int) -> dict[str, Any]:
    values = mixer_of(config, layer)
    if "pattern" in values:
        values["pattern"] = to_spec(from_spec(values["pattern"]))
    return values


def _unequal(what: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    for key in {**a, **b}:
        if a.get(key) != b.get(key):
            yield f"{what} {key} would become {b.get(key)}, it is {a.get(key)}"
