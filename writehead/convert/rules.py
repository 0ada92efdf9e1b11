"""A conversion is one table of key rules, read in both directions.

A rule says which of our weights it makes, of which tensors of theirs, and how to join and to split them. The
shapes that theirs must have follow from splitting ours, so a table states no shape twice.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from writehead.catalog import MIXERS, argument
from writehead.config import ModelConfig
from writehead.convert.errors import shown

SHOWN = 6  # names listed of each kind of leftover


class BadWeights(ValueError):
    """Tensors that do not make the model which the config describes."""


class Heads(NamedTuple):
    """Query heads H, key/value heads G and head width D of one layer."""

    H: int
    G: int
    D: int


class Form(NamedTuple):
    """How tensors of theirs become one of ours and back; `split` also serves tensors without memory.

    `moves_rows` says that a matrix's rows go elsewhere and nothing else happens to them.
    """

    join: Callable[[Sequence[Tensor], Heads], Tensor]
    split: Callable[[Tensor, Heads], tuple[Tensor, ...]]
    moves_rows: bool = True


def _group(parts: Sequence[Tensor], heads: Heads) -> Tensor:
    """Rows of each key/value head's queries, its key, its value -> rows q | k | v."""
    H, G, D = heads
    fused = parts[0].unflatten(0, (G, H // G + 2, D))
    q, k, v = fused.split([H // G, 1, 1], 1)
    return torch.cat([q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)])


def _ungroup(ours: Tensor, heads: Heads) -> tuple[Tensor, ...]:
    _, G, D = heads
    q, k, v = (part.unflatten(0, (G, -1, D)) for part in _qkv(ours, heads))
    return (torch.cat([q, k, v], 1).flatten(0, 2),)


def _qkv(ours: Tensor, heads: Heads) -> tuple[Tensor, ...]:
    H, G, D = heads
    q, k, v = ours.split([H * D, G * D, G * D])
    return q, k, v


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


SAME = Form(lambda parts, _: parts[0], lambda ours, _: (ours,))
TRANSPOSED = Form(lambda parts, _: parts[0].T.contiguous(), lambda ours, _: (ours.T,), moves_rows=False)
HALVES = Form(lambda parts, _: torch.cat(list(parts)), lambda ours, _: ours.chunk(2))
QKV_ROWS = Form(lambda parts, _: torch.cat(list(parts)), _qkv)
GROUPED = Form(_group, _ungroup)
PLUS_ONE = Form(
    lambda parts, _: _wide(parts[0]) + 1,
    lambda ours, _: ((_wide(ours) - 1).to(ours.dtype),),
    moves_rows=False,
)


@dataclass(frozen=True)
class Rule:
    """One row of a conversion.

    Attributes:
        ours: our weight's name; "{layer}" stands for a number, "{name}" for anything.
        theirs: the keys of the tensors that make it, with the same placeholders.
        form: how they are joined and split.
        copies: further keys under which the only tensor may stand, instead of the first or beside it.
    """

    ours: str
    theirs: tuple[str, ...]
    form: Form = SAME
    copies: tuple[str, ...] = ()


class Match(NamedTuple):
    """A rule applied to one weight of ours, with the placeholders filled in."""

    rule: Rule
    theirs: tuple[str, ...]
    copies: tuple[str, ...]
    heads: Heads


def heads_of(config: ModelConfig, layer: int) -> Heads:
    """The heads of one layer's mixer; zeros for one that has none."""
    spec = config.layer("mixer", layer)
    heads = argument(MIXERS, spec, "heads")
    if not heads:
        return Heads(0, 0, 0)
    kv_heads = argument(MIXERS, spec, "kv_heads") or heads
    return Heads(heads, kv_heads, argument(MIXERS, spec, "head_dim") or config.dim // heads)


@dataclass(frozen=True)
class Checkpoint:
    """A model that is in files.

    Attributes:
        config: the model.
        rules: how its weights are made.
        theirs: its tensors; each is read when asked for, and the model may keep it.
        longest_side: the largest size in any of their shapes.
        ignorable: patterns of keys that hold no weight (masks, rotary tables) and are passed over.
    """

    config: ModelConfig
    rules: tuple[Rule, ...]
    theirs: Mapping[str, Tensor]
    longest_side: int
    ignorable: tuple[str, ...] = ()


@runtime_checkable
class InPieces(Protocol):
    """Tensors of which some rows can be read."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""

    def rows(self, name: str, some: slice) -> Tensor:
        """Some rows of a tensor."""


class Source(NamedTuple):
    """A matrix of theirs that is read some rows at a time."""

    n: int
    k: int
    rows: Callable[[slice], Tensor]


def load_weights(
    checkpoint: Checkpoint,
    like: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Our weights, made of theirs one by one; every tensor of theirs is let go before the next is read.

    Args:
        checkpoint: what there is.
        like: what `model.parts.weights` gives for the model; only shapes are looked at.
        dtype, device: of the result.

    Returns:
        A tensor for each name in `like`.

    Raises:
        BadWeights: tensors that no rule takes, weights that nothing gives, wrong shapes, unequal copies.
    """
    matches = match_weights(checkpoint, like)
    return {name: make(matches[name], weight, checkpoint).to(device, dtype) for name, weight in like.items()}


def match_weights(checkpoint: Checkpoint, like: Mapping[str, Tensor]) -> dict[str, Match]:
    """For each name in `like` the rule that makes that weight of ours.

    Raises:
        BadWeights: tensors that no rule takes, or weights that nothing gives.
    """
    matches = _matches(checkpoint.rules, like, checkpoint.config)
    _check_keys(matches, like, checkpoint)
    return matches


def make(match: Match, like: Tensor, checkpoint: Checkpoint) -> Tensor:
    """One weight of ours, in the type of theirs.

    Raises:
        BadWeights: wrong shapes, or unequal copies.
    """
    wanted = match.rule.form.split(like, match.heads)
    names = present(match, checkpoint.theirs)
    parts = [_read(checkpoint.theirs, key, part) for key, part in zip(names, wanted, strict=True)]
    _check_copies(match, names[0], parts[0], checkpoint.theirs)
    made = match.rule.form.join(parts, match.heads)
    assert made.shape == like.shape, f"{match.rule}: join is not the inverse of split"
    return made


def sources(match: Match, like: Tensor, checkpoint: Checkpoint) -> list[Source]:
    """The matrices that `match.rule.form` joins; none if they cannot be read and joined row by row.

    Raises:
        BadWeights: wrong shapes.
    """
    theirs, form = checkpoint.theirs, match.rule.form
    names = present(match, theirs)
    twice = any(key in theirs for key in (*match.theirs, *match.copies) if key not in names)
    if not isinstance(theirs, InPieces) or not form.moves_rows or twice:
        return []
    found = []
    for key, wanted in zip(names, form.split(like, match.heads), strict=True):
        _check_shape(key, theirs.shape(key), wanted)
        N, K = wanted.shape
        found.append(Source(N, K, partial(_some_rows, theirs, key)))
    return found


def _some_rows(theirs: InPieces, key: str, some: slice) -> Tensor:
    return _check_float(key, theirs.rows(key, some))


def save_weights(rules: Sequence[Rule], ours: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Their tensors, made of our weights; where possible they are views of ours.

    Raises:
        BadWeights: a weight of ours that no rule takes.
    """
    matches = _matches(rules, ours, config)
    if lost := [name for name in ours if name not in matches]:
        raise BadWeights(f"no rule takes {_some(lost)}")
    theirs: dict[str, Tensor] = {}
    for name, match in matches.items():
        parts = match.rule.form.split(ours[name], match.heads)
        for key, tensor in zip(match.theirs, parts, strict=True):
            assert key not in theirs, f"two rules give {key}"
            theirs[key] = tensor
    return theirs


def _matches(rules: Sequence[Rule], names: Iterable[str], config: ModelConfig) -> dict[str, Match]:
    """For each of our weights the rule that speaks of it."""
    compiled = [(re.compile(_pattern(rule.ours)), rule) for rule in rules]
    found: dict[str, Match] = {}
    known: dict[tuple[bool, int], Heads] = {}
    for name in names:
        for regex, rule in compiled:
            if bound := regex.fullmatch(name):
                values = bound.groupdict()
                part = config.encoder if name.startswith("encoder.") else None
                layer = int(values.get("layer") or 0)
                place = (part is None, layer)
                if place not in known:
                    known[place] = heads_of(part or config, layer)
                theirs, copies = (
                    tuple(k.format(**values) for k in keys) for keys in (rule.theirs, rule.copies)
                )
                found[name] = Match(rule, theirs, copies, known[place])
                break
    return found


def _pattern(key: str) -> str:
    """A key with placeholders as a regular expression."""
    return re.escape(key).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{name\}", r"(?P<name>.+)")


def keys_like(patterns: Iterable[str], keys: Iterable[str]) -> set[str]:
    """The keys that one of the patterns, with placeholders as in rules, speaks of."""
    compiled = [re.compile(_pattern(pattern)) for pattern in patterns]
    return {key for key in keys if any(one.fullmatch(key) for one in compiled)}


def present(match: Match, theirs: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The keys to read: the first of a single tensor's names that is there."""
    if match.copies and match.theirs[0] not in theirs:
        return next(((key,) for key in match.copies if key in theirs), match.theirs)
    return match.theirs


def _check_keys(matches: Mapping[str, Match], ours: Iterable[str], checkpoint: Checkpoint) -> None:
    """Raise, listing both sides, unless rules take all of theirs and give all of ours."""
    theirs = checkpoint.theirs
    taken = {key for match in matches.values() for key in (*match.theirs, *match.copies)}
    passed = keys_like(checkpoint.ignorable, theirs)
    left = [key for key in theirs if key not in taken and key not in passed]
    lost = []
    for name in ours:
        if name not in matches:
            lost.append(name)
        elif missing := [key for key in present(matches[name], theirs) if key not in theirs]:
            lost.append(f"{name} (needs {_some(missing)})")
    problems = []
    if left:
        problems.append(f"{len(left)} tensors that no rule takes: {_some(map(shown, left))}")
    if lost:
        problems.append(f"{len(lost)} weights that nothing gives: {_some(lost)}")
    if problems:
        raise BadWeights(f"the tensors are not those of the config: {'; '.join(problems)}")


def _read(theirs: Mapping[str, Tensor], key: str, like: Tensor) -> Tensor:
    tensor = theirs[key]
    _check_shape(key, tensor.shape, like)
    return _check_float(key, tensor)


def _check_shape(key: str, shape: Sequence[int], like: Tensor) -> None:
    if tuple(shape) != tuple(like.shape):
        raise BadWeights(f"{shown(key)} has shape {tuple(shape)}; the config asks for {tuple(like.shape)}")


def _check_float(key: str, tensor: Tensor) -> Tensor:
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise BadWeights(
            f"{shown(key)} has dtype {tensor.dtype}; weights must be float32, float16, bfloat16 or float64"
        )
    return tensor


def _check_copies(match: Match, name: str, tensor: Tensor, theirs: Mapping[str, Tensor]) -> None:
    for key in match.copies:
        if key != name and key in theirs and not torch.equal(_read(theirs, key, tensor), tensor):
            raise BadWeights(
                f"{shown(key)} differs from {shown(name)}, but the config says that they are one tensor"
            )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more
