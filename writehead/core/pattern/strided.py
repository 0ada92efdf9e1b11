"""Patterns with a stride: columns of a matrix, summary columns, dilated windows, axes of an image."""

from dataclasses import dataclass

import torch
from torch import Tensor

from writehead.core.pattern.base import Columns, Order, Pattern, Reach
from writehead.core.pattern.plain import Causal, Window


def _least(name: str, **values: int) -> None:
    """Raise unless every field is at least 1."""
    for field, value in values.items():
        if value < 1:
            raise ValueError(f"{name}({field}={value}): {field} must be at least 1")


def _multiple(low: Tensor, high: Tensor, of: int) -> Tensor:
    """bool: is a multiple of `of` among low..high?"""
    return high // of * of >= low


@dataclass(frozen=True)
class Strided(Pattern):
    """A query reads itself and every stride-th key before it."""

    stride: int

    def __post_init__(self) -> None:
        _least("Strided", stride=self.stride)

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((q - k) % self.stride == 0)

    @property
    def reach(self) -> Reach:
        return Reach(0, None)

    @property
    def causal(self) -> bool:
        return True

    @property
    def order(self) -> Order:
        return Order(self.stride)

    def folded(self, rows: int) -> Pattern:
        return Causal() & Block(rows)

    def tiles(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        return (q1 >= k0) & _multiple((q0 - k1).clamp_min(0), q1 - k0, self.stride)

    def keys(self, q: Tensor) -> Tensor:
        count = int(q.max()) // self.stride + 1 if q.numel() else 0
        k = q[:, None] - self.stride * torch.arange(count, device=q.device)
        return k.clamp_min(-1)


@dataclass(frozen=True)
class Fixed(Pattern):
    """A query reads `columns` columns of every block of `stride` keys, up to itself: the last ones, or with
    part p the p-th group of columns from the end."""

    stride: int
    columns: int
    part: int = 0

    def __post_init__(self) -> None:
        _least("Fixed", stride=self.stride, columns=self.columns)
        if self.part < 0 or self.columns * (self.part + 1) > self.stride:
            raise ValueError(
                f"Fixed(stride={self.stride}, columns={self.columns}, part={self.part}): a block has parts 0 "
                f"to {self.stride // self.columns - 1}"
            )

    @property
    def held(self) -> Columns:
        """The columns read."""
        return Columns(self.stride, self.stride - self.columns * (self.part + 1), self.columns)

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & self.held.holds(k)

    @property
    def reach(self) -> Reach:
        return Reach(0, 0, self.held)

    @property
    def causal(self) -> bool:
        return True

    @property
    def order(self) -> Order:
        return Order(1, self.held)

    def tiles(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        end = torch.minimum(k1, q1) + 1
        return (k0 <= q1) & (self.held.before(end.clamp_min(0)) > self.held.before(k0))

    def keys(self, q: Tensor) -> Tensor:
        k = torch.arange(int(q.max()) + 1 if q.numel() else 0, device=q.device)
        k = k[self.held.holds(k)].expand(len(q), -1)
        return torch.where(k <= q[:, None], k, -1)


@dataclass(frozen=True)
class Dilated(Pattern):
    """A window with gaps: -after <= (q - k) / dilation < window, where that is a whole number."""

    window: int
    dilation: int
    after: int = 0

    def __post_init__(self) -> None:
        _least("Dilated", window=self.window, dilation=self.dilation)
        if self.after < 0:
            raise ValueError(f"Dilated(after={self.after}): after must be at least 0")

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        distance = q - k
        near = (distance < self.window * self.dilation) & (distance >= -self.after * self.dilation)
        return near & (distance % self.dilation == 0)

    @property
    def reach(self) -> Reach:
        return Reach(0, self.dilation * (self.window - 1) + 1)

    @property
    def causal(self) -> bool:
        return self.after == 0

    @property
    def order(self) -> Order:
        return Order(self.dilation)

    def folded(self, rows: int) -> Pattern:
        return Window(self.window, self.after) & Block(rows)

    def tiles(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        low = (q0 - k1).clamp_min(-self.after * self.dilation)
        return _multiple(low, (q1 - k0).clamp_max((self.window - 1) * self.dilation), self.dilation)

    def keys(self, q: Tensor) -> Tensor:
        steps = torch.arange(self.after, -self.window, -1, device=q.device)
        return (q[:, None] + self.dilation * steps).clamp_min(-1)


@dataclass(frozen=True)
class Block(Pattern):
    """A query reads one block of `size` keys: its own; with back = s the block s before it (its own where
    there is none); with an order, block a reads block order[a] and blocks beyond the order read nothing."""

    size: int
    back: int = 0
    blocks_read: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _least("Block", size=self.size)
        if self.back < 0 or (self.back and self.blocks_read):
            raise ValueError(
                f"Block(back={self.back}): back must be at least 0, and 0 where an order is given"
            )
        if self.blocks_read and sorted(self.blocks_read) != list(range(len(self.blocks_read))):
            raise ValueError(
                f"Block(blocks_read={self.blocks_read}): it must hold each of "
                f"0 to {len(self.blocks_read) - 1} once"
            )

    def _read(self, block: Tensor) -> Tensor:
        """The block that each block of queries reads, -1 = none."""
        if self.blocks_read:
            order = torch.tensor((*self.blocks_read, -1), device=block.device)
            return order[block.clamp_max(len(order) - 1)]
        return torch.where(block >= self.back, block - self.back, block)

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return k // self.size == self._read(q // self.size)

    @property
    def reach(self) -> Reach:
        back = [a - b for a, b in enumerate(self.blocks_read)]
        return Reach(0, self.size * (max(back, default=self.back) + 1))

    @property
    def causal(self) -> bool:
        return False

    def tiles(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        q0, q1, k0, k1 = (t // self.size for t in (q0, q1, k0, k1))
        seen = torch.zeros_like(q0 - k0, dtype=torch.bool)
        if self.blocks_read:
            for a, b in enumerate(self.blocks_read):
                seen |= (q0 <= a) & (q1 >= a) & (k0 <= b) & (k1 >= b)
            return seen
        own = (q0 <= k1) & (q1 >= k0)
        earlier = (q0 - self.back <= k1) & (q1 - self.back >= k0)
        return (own & (q0 < self.back)) | earlier if self.back else own

    def keys(self, q: Tensor) -> Tensor:
        first = self._read(q // self.size) * self.size
        k = first[:, None] + torch.arange(self.size, device=q.device)
        return torch.where(first[:, None] >= 0, k, -1)


@dataclass(frozen=True)
class Blocks(Pattern):
    """A window counted in blocks of `size`: a query reads its block, `before` ones before it and `after`
    behind it."""

    size: int
    before: int
    after: int = 0

    def __post_init__(self) -> None:
        _least("Blocks", size=self.size)
        if self.before < 0 or self.after < 0:
            raise ValueError(f"{self}: before and after must be at least 0")

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        distance = q // self.size - k // self.size
        return (distance <= self.before) & (distance >= -self.after)

    @property
    def reach(self) -> Reach:
        return Reach(0, self.size * (self.before + 1))

    @property
    def causal(self) -> bool:
        return False

    def tiles(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        near = q0 // self.size - k1 // self.size <= self.before
        return near & (q1 // self.size - k0 // self.size >= -self.after)

    def keys(self, q: Tensor) -> Tensor:
        first = (q // self.size - self.before) * self.size
        count = (self.before + 1 + self.after) * self.size
        return (first[:, None] + torch.arange(count, device=q.device)).clamp_min(-1)


@dataclass(frozen=True)
class Axis(Pattern):
    """Tokens are a height x width image, row after row: axis 0 reads the query's column, axis 1 its row."""

    height: int
    width: int
    axis: int

    def __post_init__(self) -> None:
        _least("Axis", height=self.height, width=self.width)
        if self.axis not in (0, 1):
            raise ValueError(f"Axis(axis={self.axis}): axis must be 0 (columns) or 1 (rows)")

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        line = (q - k) % self.width == 0 if self.axis == 0 else q // self.width == k // self.width
        size = self.height * self.width
        return line & (q < size) & (k < size)

    @property
    def reach(self) -> Reach:
        return Reach(0, self.width * (self.height - 1) + 1 if self.axis == 0 else self.width)

    @property
    def causal(self) -> bool:
        return False

    @property
    def order(self) -> Order:
        return Order(self.width) if self.axis == 0 else Order()

    def folded(self, rows: int) -> Pattern:
        return Block(rows)

    def tiles(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        if self.axis == 1:
            return Block(self.width).tiles(q0, q1, k0, k1)
        return _multiple(q0 - k1, q1 - k0, self.width)

    def keys(self, q: Tensor) -> Tensor:
        steps = torch.arange(self.height if self.axis == 0 else self.width, device=q.device)
        column, row = q[:, None] % self.width, q[:, None] // self.width
        k = column + steps * self.width if self.axis == 0 else row * self.width + steps
        return torch.where(row < self.height, k, -1)
