"""Patterns: who may read whom, as frozen values that can be printed, compared and combined.

`allows` is the definition. The dense mask, the picture, the tiles of block-sparse attention, the key list of
a decode step, the rule of eviction and the slots of a cache all follow from it, and one property test ties
them together.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Columns(NamedTuple):
    """The positions p with first <= p mod stride < first + width."""

    stride: int
    first: int
    width: int

    def holds(self, pos: Tensor) -> Tensor:
        """bool: is the position one of them?"""
        place = pos % self.stride
        return (place >= self.first) & (place < self.first + self.width)

    def before(self, pos: Tensor) -> Tensor:
        """How many of them are smaller than each position >= 0."""
        return pos // self.stride * self.width + (pos % self.stride - self.first).clamp(0, self.width)


class Reach(NamedTuple):
    """A sound bound on what later queries need: key k at time t if k < lead, or if t - k < window (None = for
    ever), or if k is one of the columns."""

    lead: int
    window: int | None
    columns: Columns | None = None


class Order(NamedTuple):
    """In which order tokens lie so that what a pattern reads is contiguous.

    Attributes:
        stride: with more than 1, tokens lie as the columns of a matrix of that width.
        columns: only these keys can be read.
        block: with a size, each block of queries reads a few blocks of keys, picked from anywhere.
    """

    stride: int = 1
    columns: Columns | None = None
    block: int = 0


class Pattern(ABC):
    """A set of (query position, key position) pairs."""

    @abstractmethod
    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        """bool, broadcast over q and k (both >= 0): may a query at q read the key at k?"""

    @property
    @abstractmethod
    def reach(self) -> Reach:
        """What a cache must keep."""

    @property
    @abstractmethod
    def causal(self) -> bool:
        """Is no pair with k > q in the set?"""

    @abstractmethod
    def keys(self, q: Tensor) -> Tensor:
        """q (N,) -> (N, K) int64: the keys each query may read, in any order, -1 where there are fewer than
        K."""

    def tiles(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        """bool, broadcast: may a query in q0..q1 read a key in k0..k1 (both ends included)? Never False where
        one may."""
        return torch.ones_like(q0 - k0, dtype=torch.bool)

    @property
    def order(self) -> Order:
        """In which order of tokens its tiles are few."""
        return Order()

    def folded(self, rows: int) -> "Pattern":
        """In an order of stride l: a pattern of the places (p mod l) * rows + p // l that has all pairs of
        this one."""
        raise ValueError(f"{self} has no order of its own")

    def picked(self, block: Tensor) -> Tensor:
        """In an order of blocks: block (N,) of queries -> (N, R) blocks of keys that it reads, -1 = none."""
        raise ValueError(f"{self} picks no blocks")

    def needed(self, k: Tensor, t: Tensor) -> Tensor:
        """bool: may a query at a position >= t still read key k? Sound, not necessarily tight."""
        lead, window, columns = self.reach
        if window is None:
            return torch.ones_like(k - t, dtype=torch.bool)
        kept = (k < lead) | (t - k < window)
        return kept if columns is None else kept | columns.holds(k)

    @property
    def heads(self) -> int | None:
        """How many query heads the pattern tells apart; None if all see the same."""
        return None

    def head(self, index: int) -> "Pattern":
        """The pattern of one query head."""
        return self

    def mask(self, q: Tensor, k: Tensor) -> Tensor:
        """q (B, T), k (B, S), -1 = padding -> bool (B, 1 or H, T, S): the dense form."""
        seen = self.allows(q[:, None, :, None], k[:, None, None, :])
        return seen & (k >= 0)[:, None, None, :] & (q >= 0)[:, None, :, None]

    def blocks(self, length: int, size: int) -> Tensor:
        """The block layout of a whole sequence: bool (1 or H, N, N) for N = ceil(length / size) blocks; False
        where no query of the block reads a key of the other."""
        first = torch.arange(0, length, size)
        last = (first + size - 1).clamp_max(length - 1)
        heads = [self.head(h) for h in range(self.heads or 1)]
        grids = [p.tiles(first[:, None], last[:, None], first, last) for p in heads]
        return torch.stack([grid.expand(len(first), len(first)) for grid in grids])

    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The pattern as FlexAttention takes it: (batch, head, query, key) -> may it read?"""
        heads = [self.head(h) for h in range(self.heads or 1)]

        def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = heads[0].allows(q, k)
            for index, pattern in enumerate(heads[1:], 1):
                seen = torch.where(h == index, pattern.allows(q, k), seen)
            return seen

        return mod

    def __and__(self, other: "Pattern") -> "Pattern":
        return And(self, other)

    def __or__(self, other: "Pattern") -> "Pattern":
        return Or(self, other)


@dataclass(frozen=True)
class And(Pattern):
    """The pairs in both patterns."""

    a: Pattern
    b: Pattern

    def __post_init__(self) -> None:
        _same_heads(self.a, self.b)

    def __repr__(self) -> str:
        return f"({self.a} & {self.b})"

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.a.allows(q, k) & self.b.allows(q, k)

    @property
    def reach(self) -> Reach:
        a, b = self.a.reach, self.b.reach
        if a[1:] == b[1:]:
            return Reach(min(a.lead, b.lead), *a[1:])
        return min(a, b, key=_size)

    @property
    def causal(self) -> bool:
        return self.a.causal or self.b.causal

    @property
    def heads(self) -> int | None:
        return self.a.heads or self.b.heads

    def head(self, index: int) -> Pattern:
        return self.a.head(index) & self.b.head(index) if self.heads else self

    def tiles(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        return self.a.tiles(q0, q1, k0, k1) & self.b.tiles(q0, q1, k0, k1)

    @property
    def order(self) -> Order:
        return self.a.order if self.a.order != Order() else self.b.order

    def folded(self, rows: int) -> Pattern:
        return (self.a if self.a.order != Order() else self.b).folded(rows)

    def picked(self, block: Tensor) -> Tensor:
        return (self.a if self.a.order != Order() else self.b).picked(block)

    def keys(self, q: Tensor) -> Tensor:
        first, second = sorted((self.a, self.b), key=lambda p: p.reach.window is None)
        try:
            k = first.keys(q)
        except ValueError:  # Full has no list; the other one's is enough
            k = second.keys(q)
        return torch.where((k >= 0) & _reads(self, q, k), k, -1)


@dataclass(frozen=True)
class Or(Pattern):
    """The pairs in either pattern."""

    a: Pattern
    b: Pattern

    def __post_init__(self) -> None:
        _same_heads(self.a, self.b)

    def __repr__(self) -> str:
        return f"({self.a} | {self.b})"

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.a.allows(q, k) | self.b.allows(q, k)

    @property
    def reach(self) -> Reach:
        return _joint([self.a.reach, self.b.reach])

    @property
    def causal(self) -> bool:
        return self.a.causal and self.b.causal

    @property
    def heads(self) -> int | None:
        return self.a.heads or self.b.heads

    def head(self, index: int) -> Pattern:
        return self.a.head(index) | self.b.head(index) if self.heads else self

    def tiles(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        return self.a.tiles(q0, q1, k0, k1) | self.b.tiles(q0, q1, k0, k1)

    @property
    def order(self) -> Order:
        return self.a.order if self.a.order == self.b.order else Order()

    def folded(self, rows: int) -> Pattern:
        return self.a.folded(rows) | self.b.folded(rows)

    def picked(self, block: Tensor) -> Tensor:
        return torch.cat([self.a.picked(block), self.b.picked(block)], -1)

    def keys(self, q: Tensor) -> Tensor:
        a, b = self.a.keys(q), self.b.keys(q)
        return torch.cat([a, torch.where(_reads(self.a, q, b), -1, b)], 1)


@dataclass(frozen=True)
class PerHead(Pattern):
    """Query head h follows the h-th pattern."""

    patterns: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        if len(self.patterns) < 2 or any(p.heads for p in self.patterns):
            raise ValueError(
                f"PerHead takes one head-free pattern for each of two or more heads; got {self.patterns}"
            )

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        """q and k carry a head dimension of 1 (or H) third from the end, as `mask` gives them."""
        q, k = torch.broadcast_tensors(q, k)
        return torch.cat([p.allows(q, k) for p in self.patterns], -3)

    @property
    def reach(self) -> Reach:
        return _joint([p.reach for p in self.patterns])

    @property
    def causal(self) -> bool:
        return all(p.causal for p in self.patterns)

    @property
    def heads(self) -> int | None:
        return len(self.patterns)

    def head(self, index: int) -> Pattern:
        return self.patterns[index]

    def keys(self, q: Tensor) -> Tensor:
        union = self.patterns[0]
        for pattern in self.patterns[1:]:
            union = union | pattern
        return union.keys(q)


def _same_heads(a: Pattern, b: Pattern) -> None:
    if a.heads and b.heads and a.heads != b.heads:
        raise ValueError(f"cannot combine a pattern for {a.heads} heads with one for {b.heads}: {a}, {b}")


def _reads(pattern: Pattern, q: Tensor, k: Tensor) -> Tensor:
    """q (N,), k (N, K) -> bool (N, K): may some head of the query read that key?"""
    return pattern.allows(q[:, None, None, None], k[:, None, None]).any(1)[:, 0]


def _size(reach: Reach) -> tuple[bool, bool, int]:
    """Which of two bounds keeps less: everything, columns, a longer window."""
    return reach.window is None, reach.columns is not None, reach.window or 0


def _joint(bounds: list[Reach]) -> Reach:
    """What keeps all that the bounds keep; columns of one stride become one run."""
    lead, windows = max(b.lead for b in bounds), [b.window for b in bounds]
    columns = [b.columns for b in bounds if b.columns is not None]
    if None in windows or len({c.stride for c in columns}) > 1:
        return Reach(lead, None)
    run = None
    if columns:
        first = min(c.first for c in columns)
        run = Columns(columns[0].stride, first, max(c.first + c.width for c in columns) - first)
    return Reach(lead, max(w for w in windows if w is not None), run)
