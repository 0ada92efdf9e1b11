"""What the native engine remembers: keys and values laid out for its kernels, one tensor for several layers.

Layers that keep the same tokens (equal reach, heads and widths) share a `Cache`, so that a model has one, or
two where windows alternate with full attention. A slot's position decides who reads it, as in `core.cache`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from writehead.core.pattern import Reach
from writehead.core.slots import Layout, Store, forget
from writehead.core.state import Node, Once, apply, join, rewind, select, tensors

BLOCK = 16  # slots whose keys lie side by side
STORED = {
    None: torch.float32,
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    torch.int8: torch.int8,
}


@dataclass(frozen=True)
class Kept:
    """What the layers of one cache have in common.

    Attributes:
        layers: how many they are, L.
        heads, kv_heads, head_dim: H, G and D.
        reach: what later queries need.
        piece: tokens a row that one call of the kernels takes at most; a ring has that many slots more, less
            one, so that no token takes the slot of a key that an earlier one of its call still reads.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    reach: Reach
    piece: int

    def of(self, layers: int) -> "Kept":
        """The same of so many layers."""
        return replace(self, layers=layers)

    def layout(self, store: Store) -> Layout:
        """Which slot a position takes."""
        return Layout.of(self.reach, replace(store, slack=max(store.slack, self.piece - 1)))

    def slots(self, store: Store, context: int) -> int:
        """Slots once `context` tokens were written, a multiple of `BLOCK`."""
        return _whole(self.layout(store).slots(context, _whole(store.capacity)))

    def grown(self, cache: "Cache", context: int) -> int:
        """Slots that a cache needs for `context` tokens."""
        limit = cache.layout.limit
        needed = context if limit is None else min(context, limit)
        return cache.slots if needed <= cache.slots else _whole(cache.layout.slots(needed))

    def nbytes(self, rows: int, store: Store, context: int) -> int:
        """Bytes of the cache."""
        values = self.head_dim + _whole(self.head_dim)
        size = values * stored(store).itemsize + (8 if stored(store) == torch.int8 else 0)
        return rows * self.slots(store, context) * (self.layers * self.kv_heads * size + 4)

    def empty(self, rows: int, store: Store) -> "Cache":
        """A cache without tokens."""
        L, G, D, S = self.layers, self.kv_heads, self.head_dim, self.slots(store, 0)
        k = torch.zeros(rows, L, G, S // BLOCK, D, BLOCK, dtype=stored(store))
        v = torch.zeros(rows, L, G, S, _whole(D), dtype=stored(store))
        scales = None
        if k.dtype == torch.int8:
            scales = (torch.zeros(rows, L, G, S), torch.zeros(rows, L, G, S))
        pos = torch.full((rows, S), -1, dtype=torch.int32)
        return Cache(k, v, pos, self.layout(store), 0, scales)


@dataclass(slots=True, eq=False)
class Cache(Node):
    """Keys and values of the layers that keep the same tokens.

    Attributes:
        k: (B, L, G, S/16, D, 16).
        v: (B, L, G, S, D), D padded to a multiple of 16.
        pos: (B, S) int32, -1 = empty.
        layout: which slot a position takes.
        used: from this slot on every row is empty.
        scales: none, or with int8 those of k and v, (B, L, G, S) float32.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    layout: Layout
    used: int
    scales: tuple[Tensor, Tensor] | None

    @property
    def slots(self) -> int:
        """Slots S of every row."""
        return self.pos.shape[1]

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.k, self.v, self.pos, *(self.scales or ()))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Cache":
        return self._with(function, function(self.pos))

    def select(self, index: Tensor, once: Once) -> "Cache":
        blocks = -(-self.used // BLOCK)

        def rows(t: Tensor) -> Tensor:
            chosen, used = (
                t.new_zeros(len(index), *t.shape[1:]),
                blocks * (t.shape[3] // (self.slots // BLOCK)),
            )
            torch.index_select(t.narrow(3, 0, used), 0, index, out=chosen.narrow(3, 0, used))
            return chosen

        return self._with(rows if self.slots else lambda t: t.index_select(0, index), self.pos[index])

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
        whole = a._with(lambda t: torch.cat([t, next(theirs)]), torch.cat([a.pos, b.pos]))
        return replace(whole, used=max(self.used, other.used))

    def rewind(self, n: Tensor, once: Once) -> "Cache":
        pos = forget(self.pos, n, self.layout)
        used = self.used if self.layout.window is not None or not self.slots else int(pos.max()) + 1
        return replace(self, pos=pos, used=used)

    def resized(self, slots: int) -> "Cache":
        """The same with at least so many slots."""
        if slots <= self.slots:
            return self

        def longer(t: Tensor) -> Tensor:
            shape = list(t.shape)
            shape[3] = slots // BLOCK if t.dim() == 6 else slots
            grown = t.new_zeros(shape)
            grown.narrow(3, 0, t.shape[3]).copy_(t)
            return grown

        pos = self.pos.new_full((len(self.pos), slots), -1)
        pos[:, : self.slots] = self.pos
        return self._with(longer, pos)

    def _with(self, function: Callable[[Tensor], Tensor], pos: Tensor) -> "Cache":
        k, v = function(self.k), function(self.v)
        scales = self.scales and (function(self.scales[0]), function(self.scales[1]))
        return Cache(k, v, pos, self.layout, self.used, scales)


@dataclass(slots=True, eq=False)
class NativeState(Node):
    """What the native engine remembers of B rows.

    Attributes:
        next: (B,) int64, the position of each row's next token.
        caches: of the layers that keep the same tokens.
    """

    next: Tensor
    caches: tuple[Cache, ...]

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


def _whole(slots: int) -> int:
    return -(-slots // BLOCK) * BLOCK
