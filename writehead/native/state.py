"""What the native engine remembers: keys and values laid out for its kernels, one tensor for several layers.

Layers that keep the same tokens (equal reach, heads and widths) share a `Cache`, so that a model has one, or
two where windows alternate with full attention. A slot's position decides who reads it, as in `core.cache`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from writehead.core.slots import Layout, Store, forget
from writehead.core.state import Node, Once, apply, join, rewind, select, tensors
from writehead.native.outline import Kept
from writehead.native.structs import BLOCK, FORMATS, Call, pointer, round_up
from writehead.native.structs import Cache as CacheStruct

STORED = {
    None: torch.float32,
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    torch.int8: torch.int8,
}


@dataclass(slots=True, eq=False)
class Cache(Node):
    """Keys and values of the layers that keep the same tokens.

    Attributes:
        k: float32 (B, L, G, S/16, D, 16), else (B, L, G, S/16, D/2, 16, 2), D padded to a multiple of 2.
        v: float32 (B, L, G, S/16, 16, D), else (B, L, G, S/16, 8, D, 2), D padded to a multiple of 16.
        pos: (B, S) int32, -1 = empty.
        layout: which slot a position takes.
        scales: none, or with int8 those of k and v, (B, L, G, S/16, 16) float32.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    layout: Layout
    scales: tuple[Tensor, Tensor] | None

    @property
    def slots(self) -> int:
        """Slots S of every row."""
        return self.pos.shape[1]

    @property
    def room(self) -> float:
        """Tokens that it can take without more slots, infinite where it forgets."""
        limit = self.layout.limit
        return math.inf if limit is not None and limit <= self.slots else self.slots

    @property
    def used(self) -> int:
        """From this slot on every row is empty."""
        whole = self.layout.window is not None or not self.pos.numel()
        return self.slots if whole else int(self.pos.max()) + 1

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.k, self.v, self.pos, *(self.scales or ()))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Cache":
        return self._with(function, function(self.pos))

    def select(self, index: Tensor, once: Once) -> "Cache":
        filled = -(-self.used // BLOCK)

        def rows(t: Tensor) -> Tensor:
            chosen = t.new_zeros(len(index), *t.shape[1:])
            torch.index_select(t.narrow(3, 0, filled), 0, index, out=chosen.narrow(3, 0, filled))
            return chosen

        return self._with(rows, self.pos[index])

    def join(self, other: Node, once: Once) -> "Cache":
        assert isinstance(other, Cache)
        if self.layout != other.layout or self.k.dtype != other.k.dtype:
            raise ValueError(
                "cannot join caches of different kinds: "
                f"{self.layout} in {self.k.dtype} and {other.layout} in {other.k.dtype}"
            )
        slots = max(self.slots, other.slots)
        a, b = self.resized(slots), other.resized(slots)
        theirs = iter([b.k, b.v, *(b.scales or ())])
        return a._with(lambda t: torch.cat([t, next(theirs)]), torch.cat([a.pos, b.pos]))

    def rewind(self, n: Tensor, once: Once) -> "Cache":
        return replace(self, pos=forget(self.pos, n, self.layout))

    def grown(self, context: int) -> "Cache":
        """The same with slots for so many tokens."""
        limit = self.layout.limit
        needed = context if limit is None else min(context, limit)
        return self if needed <= self.slots else self.resized(round_up(self.layout.slots(needed)))

    def resized(self, slots: int) -> "Cache":
        """The same with at least so many slots."""
        if slots <= self.slots:
            return self

        def longer(t: Tensor) -> Tensor:
            grown = t.new_zeros(*t.shape[:3], slots // BLOCK, *t.shape[4:])
            grown.narrow(3, 0, t.shape[3]).copy_(t)
            return grown

        pos = self.pos.new_full((len(self.pos), slots), -1)
        pos[:, : self.slots] = self.pos
        return self._with(longer, pos)

    def struct(self, kept: Kept) -> CacheStruct:
        """What the kernels read and fill."""
        return CacheStruct(
            FORMATS.index(_format(self.k.dtype)),
            kept.layers,
            kept.heads,
            kept.kv_heads,
            kept.head_dim,
            self.slots,
            self.layout.lead,
            0 if self.layout.window is None else self.layout.ring,
            *map(pointer, (self.k, self.v, *(self.scales or (None, None)), self.pos)),
        )

    def _with(self, function: Callable[[Tensor], Tensor], pos: Tensor) -> "Cache":
        k, v = function(self.k), function(self.v)
        scales = self.scales and (function(self.scales[0]), function(self.scales[1]))
        return Cache(k, v, pos, self.layout, scales)


@dataclass(slots=True, eq=False)
class Bound:
    """A state as the kernels take it, as long as its tensors stay where they are.

    Attributes:
        call: what is the same in all of its calls.
        top: no token stands at this position or beyond.
        room: nor may one stand at this position or beyond.
    """

    call: Call
    top: int
    room: float

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Nothing: a copy has tensors of its own, and is bound when it is used."""
        return type(None), ()


@dataclass(slots=True, eq=False)
class NativeState(Node):
    """What the native engine remembers of B rows.

    Attributes:
        next: (B,) int64, the position of each row's next token.
        caches: of the layers that keep the same tokens.
        bound: to the kernels, once they took tokens into it; of this object alone.
    """

    next: Tensor
    caches: tuple[Cache, ...]
    bound: Bound | None = None

    def tensors(self) -> Iterator[Tensor]:
        yield self.next
        yield from tensors(self.caches)

    def map(self, function: Callable[[Tensor], Tensor]) -> "NativeState":
        return NativeState(function(self.next), apply(self.caches, function))

    def select(self, index: Tensor, once: Once) -> "NativeState":
        return NativeState(self.next[index], select(self.caches, index, once))

    def join(self, other: Node, once: Once) -> "NativeState":
        assert isinstance(other, NativeState)
        return NativeState(torch.cat([self.next, other.next]), join(self.caches, other.caches, once))

    def rewind(self, n: Tensor, once: Once) -> "NativeState":
        return NativeState(self.next - n, rewind(self.caches, n, once))


def empty(kept: Kept, rows: int, store: Store) -> Cache:
    """A cache without tokens."""
    S, dtype = _slots(kept, store, 0), stored(store)
    keys, values, *scales = kept.shapes(rows, S, _format(dtype))
    k, v = torch.zeros(keys, dtype=dtype), torch.zeros(values, dtype=dtype)
    pos = torch.full((rows, S), -1, dtype=torch.int32)
    both = (torch.zeros(scales[0]), torch.zeros(scales[1])) if scales else None
    return Cache(k, v, pos, _layout(kept, store), both)


def nbytes(kept: Kept, rows: int, store: Store, context: int) -> int:
    """Bytes of a cache once `context` tokens were written."""
    return kept.nbytes(rows, _slots(kept, store, context), _format(stored(store)))


def stored(store: Store) -> torch.dtype:
    """The type in which the engine keeps keys and values.

    Raises:
        ValueError: one that it has no kernels for.
    """
    if store.dtype not in STORED:
        raise ValueError(
            f"the native engine keeps caches in float32, bfloat16 or int8; got {store.dtype}; "
            "use one of these, or the PyTorch engine"
        )
    return STORED[store.dtype]


def _format(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layout(kept: Kept, store: Store) -> Layout:
    """Which slot a position takes."""
    if kept.window is None:
        return Layout(0, None, 0)
    return Layout(kept.lead, kept.window, kept.ring(store.slack) - kept.window)


def _slots(kept: Kept, store: Store, context: int) -> int:
    return round_up(_layout(kept, store).slots(context, round_up(store.capacity)))
