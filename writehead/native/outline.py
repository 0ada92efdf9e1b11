"""A decoder in the numbers that the native kernels take: plain values, which a file can keep.

It is made of a config by `covers` with PyTorch, and needs none itself.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from math import isfinite, prod
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from writehead.native.structs import ACTIVATIONS, BLOCK, NORMS, round_up

TABLE = "embedding.position.table"  # the weight whose rows are added to embeddings
PLACES = ("none", "table", "function")


@dataclass(frozen=True)
class Normal:
    """A norm: one of `NORMS`, its epsilon and the name of its module."""

    kind: str
    eps: float
    name: str


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        name: prefix of its weights.
        inner: the name of the module whose `inner` and `outer` are the feed-forward layer.
        norms: before attention, before the feed-forward layer, of query and of key heads.
        scale: of the scores.
        window, lead: who reads what; window 0 = all.
        cache, place: which of the model's caches, and which of its layers.
        hidden, activation, gated: the feed-forward layer's.
    """

    name: str
    inner: str
    norms: tuple[Normal, Normal, Normal, Normal]
    scale: float
    window: int
    lead: int
    cache: int
    place: int
    hidden: int
    activation: str
    gated: bool


@dataclass(frozen=True)
class Kept:
    """What the layers of one cache have in common.

    Attributes:
        layers: how many they are, L.
        heads, kv_heads, head_dim: H, G and D.
        lead: the first positions, which have slots of their own.
        window: later positions that stay, in a ring; None = all stay.
        piece: tokens a row that one call of the kernels takes at most; a ring has that many slots more, less
            one, so that no token takes the slot of a key that an earlier one of its call still reads.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    lead: int
    window: int | None
    piece: int

    def ring(self, slack: int = 0) -> int:
        """Slots of the ring if `slack` tokens may be taken back; 0 = there is no ring."""
        return 0 if self.window is None else self.window + max(slack, self.piece - 1)

    def shapes(self, rows: int, slots: int, format: str) -> list[tuple[int, ...]]:
        """The shapes of keys, of values and, for int8, of the scales of either, as writehead.h has them.

        Args:
            rows: B.
            slots: S, whole blocks.
            format: "float32", "bfloat16" or "int8".
        """
        each = (rows, self.layers, self.kv_heads, slots // BLOCK)
        D, wide = self.head_dim, round_up(self.head_dim)
        if format == "float32":
            return [(*each, D, BLOCK), (*each, BLOCK, wide)]
        scales = [(*each, BLOCK)] * 2 if format == "int8" else []
        return [(*each, -(-D // 2), BLOCK, 2), (*each, BLOCK // 2, wide, 2), *scales]

    def nbytes(self, rows: int, slots: int, format: str) -> int:
        """Bytes of keys, values, scales and positions in so many slots."""
        k, v, *scales = (prod(shape) for shape in self.shapes(rows, slots, format))
        itemsize = {"float32": 4, "bfloat16": 2, "int8": 1}[format]
        return (k + v) * itemsize + 4 * (sum(scales) + rows * slots)


@dataclass(frozen=True)
class Rotation:
    """Rotary positions: the first `dim` numbers of a head turn.

    Attributes:
        dim: R.
        interleaved: do pairs stand side by side, or half of R apart?
        frequencies: (R/2) angles of a position.
        gain: of cosines and sines.
    """

    dim: int
    interleaved: bool
    frequencies: tuple[float, ...]
    gain: float

    def turns(self, top: int) -> NDArray[np.float32]:
        """Cosines, then sines, of the angles at positions below `top`, (top, R)."""
        # angles are rounded to float32 as the model's own are
        angles = np.arange(top, dtype=np.float32)[:, None] * np.array(self.frequencies, np.float32)
        both = np.concatenate([np.cos(angles), np.sin(angles)], -1)
        return both * np.float32(self.gain)


@dataclass(frozen=True)
class Outline:
    """A model as the native engine sees it.

    Attributes:
        vocab, dim: V and X.
        tied: are embeddings the output matrix too?
        embed_scale, logit_scale: factors of embeddings and of logits.
        layers: all of them.
        caches: what the layers of each cache have in common.
        parallel: do feed-forward layers stand beside attention?
        embed_norm, last_norm: after the embeddings, after the last layer.
        rotation: rotary positions, if it has them.
        slopes: ALiBi's, of each query head; empty without.
        places: what is added to embeddings: nothing ("none"), rows of a table, or a function of the position.
        positions: how many there are; None = any number.
        trained_context: tokens the model was made for; None = unknown.
        piece: tokens a row that one call takes at most; None = any number.
    """

    vocab: int
    dim: int
    tied: bool
    embed_scale: float
    logit_scale: float
    layers: tuple[Layer, ...]
    caches: tuple[Kept, ...]
    parallel: bool
    embed_norm: Normal
    last_norm: Normal
    rotation: Rotation | None
    slopes: tuple[float, ...]
    places: str
    positions: int | None
    trained_context: int | None
    piece: int | None

    def to_dict(self) -> dict[str, Any]:
        """As objects, lists, words and numbers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "Outline":
        """What `to_dict` was called on.

        Raises:
            ValueError: anything else, or values that no model has.
        """
        found: Outline = _made(cls, given)
        found._check()
        return found

    def _check(self) -> None:
        """Raise unless kernels that trust these numbers stay within what they describe."""
        counts = [self.vocab, self.dim, len(self.layers), len(self.caches)]
        counts += [limit for limit in (self.positions, self.trained_context) if limit is not None]
        for kept in self.caches:
            counts += [kept.layers, kept.heads, kept.kv_heads, kept.head_dim, kept.piece, kept.lead + 1]
            counts += [kept.lead + kept.ring() + 1, 1 if kept.window is None else kept.window]
            _sound(kept.heads % max(1, kept.kv_heads) == 0, "heads")
        taken = set()
        for layer in self.layers:
            counts += [layer.hidden, layer.window + 1, layer.lead + 1]
            _sound(0 <= layer.cache < len(self.caches), "cache")
            kept = self.caches[layer.cache]
            _sound(0 <= layer.place < kept.layers, "place")
            _sound(kept.window is None or 0 < layer.window <= kept.window, "window")
            _sound(kept.window is None or layer.lead <= kept.lead, "lead")
            _sound(layer.activation in ACTIVATIONS, "activation")
            _sound(all(norm.kind in NORMS for norm in layer.norms), "norm")
            taken.add((layer.cache, layer.place))
            if self.rotation is not None:
                _sound(2 <= self.rotation.dim <= kept.head_dim, "rotation")
            _sound(len(self.slopes) in (0, kept.heads), "slopes")
        _sound(len(taken) == len(self.layers) == sum(kept.layers for kept in self.caches), "place")
        _sound(all(0 < count < 2**31 for count in counts), "size")
        _sound(self.places in PLACES, "places")
        _sound(self.places != "table" or self.positions is not None, "table")
        _sound({self.embed_norm.kind, self.last_norm.kind} <= set(NORMS), "norm")
        if self.rotation is not None:
            _sound(2 * len(self.rotation.frequencies) == self.rotation.dim, "rotation")
        ring = any(kept.window is not None for kept in self.caches)
        least = min(kept.piece for kept in self.caches)
        _sound((self.piece is None and not ring) or (self.piece is not None and self.piece > 0), "piece")
        _sound(self.piece is None or not ring or self.piece <= least, "piece")


def _sound(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"the outline of the model has a {what} that no model has")


def _made(kind: Any, given: Any) -> Any:
    """A value of a type out of what JSON made of it.

    Raises:
        ValueError: it is of another type.
    """
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        if isinstance(given, dict) and given.keys() == {field.name for field in fields(kind)}:
            return kind(**{name: _made(hints[name], value) for name, value in given.items()})
    elif isinstance(kind, UnionType):
        return None if given is None else _made(get_args(kind)[0], given)
    elif get_origin(kind) is tuple and isinstance(given, list):
        inside = get_args(kind)
        inside = inside[:1] * len(given) if inside[1:] == (...,) else inside
        if len(inside) == len(given):
            return tuple(_made(one, value) for one, value in zip(inside, given, strict=True))
    elif type(given) is kind and (kind is not float or isfinite(given)):
        return given
    raise ValueError(f"the outline of the model holds {str(given)[:40]!r} in the place of {kind}")
