"""Local attention over the pixels of an image, in one and in two dimensions (Image Transformer)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from writehead.core.pattern.base import Pattern, Reach
from writehead.core.shapes import check_multiple


@dataclass(frozen=True)
class Image1D(Pattern):
    """Queries in blocks of `block`: each reads its block up to itself, and the `memory` keys before the
    block."""

    block: int
    memory: int

    def __post_init__(self) -> None:
        if self.block < 1 or self.memory < 0:
            raise ValueError(f"{self}: block must be at least 1, memory at least 0")

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k >= q // self.block * self.block - self.memory)

    @property
    def reach(self) -> Reach:
        return Reach(0, self.block + self.memory)

    @property
    def causal(self) -> bool:
        return True

    def tiles(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        return (k0 <= q1) & (k1 >= q0 // self.block * self.block - self.memory)

    def keys(self, q: Tensor) -> Tensor:
        first = q // self.block * self.block - self.memory
        k = first[:, None] + torch.arange(self.block + self.memory, device=q.device)
        return torch.where((k <= q[:, None]) & (k >= 0), k, -1)


@dataclass(frozen=True)
class Image2D(Pattern):
    """Positions count the pixels of an image `width` wide in blocked raster order: blocks of rows x columns
    from left to right and top to bottom, pixels likewise inside. A query reads its block up to itself, the
    `beside` columns left of the block, and the `above` rows over it with `beside` columns on both sides."""

    width: int
    rows: int
    columns: int
    above: int
    beside: int

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1 or min(self.above, self.beside) < 0:
            raise ValueError(f"{self}: rows and columns must be at least 1, above and beside at least 0")
        check_multiple("width", self.width, "columns", self.columns)

    def pixel(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column of each position."""
        band, rest = pos // (self.rows * self.width), pos % (self.rows * self.width)
        block, inside = rest // (self.rows * self.columns), rest % (self.rows * self.columns)
        return (
            band * self.rows + inside // self.columns,
            block * self.columns + inside % self.columns,
        )

    def position(self, row: Tensor, column: Tensor) -> Tensor:
        """The position of each pixel."""
        band, block = row // self.rows * self.rows * self.width, column // self.columns
        inside = row % self.rows * self.columns + column % self.columns
        return band + block * self.rows * self.columns + inside

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        (row, column), (r, c) = self.pixel(q), self.pixel(k)
        top, left = row // self.rows * self.rows, column // self.columns * self.columns
        within = (c >= left - self.beside) & (c < left + self.columns)
        side = (r >= top) & (r < top + self.rows) & within
        over = (r < top) & (r >= top - self.above) & (c >= left - self.beside)
        return (over & (c < left + self.columns + self.beside) | side) & (k <= q)

    @property
    def reach(self) -> Reach:
        """The farthest key of a block's last query, over all places of the block in its band."""
        first = torch.arange(0, self.width, self.columns)
        top = (self.above // self.rows + 1) * self.rows  # so far down that nothing is clipped
        corner = self.position(torch.tensor(top - self.above), (first - self.beside).clamp_min(0))
        side = self.position(torch.tensor(top), (first - self.beside).clamp_min(0))
        last = self.position(torch.tensor(top + self.rows - 1), first + self.columns - 1)
        return Reach(0, int((last - torch.minimum(corner, side)).max()) + 1)

    @property
    def causal(self) -> bool:
        return True

    def tiles(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        top, bottom, left, right = self._span(q0, q1)
        top, bottom = top // self.rows * self.rows, bottom // self.rows * self.rows + self.rows
        r0, r1, c0, c1 = self._span(k0, k1)
        rows = (r1 >= top - self.above) & (r0 < bottom)
        return (k0 <= q1) & rows & (c1 >= left - self.beside) & (c0 <= right + self.beside)

    def _span(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows from, to and columns from, to that hold a run of positions: whole blocks' columns, and whole
        bands' rows and columns where a run leaves a block or a band."""
        (r0, c0), (r1, c1) = self.pixel(first), self.pixel(last)
        band0, band1 = r0 // self.rows, r1 // self.rows
        block0, block1 = c0 // self.columns, c1 // self.columns
        one_band = band0 == band1
        one_block = one_band & (block0 == block1)
        return (
            torch.where(one_block, r0, band0 * self.rows),
            torch.where(one_block, r1, band1 * self.rows + self.rows - 1),
            torch.where(one_band, block0 * self.columns, 0),
            torch.where(one_band, block1 * self.columns + self.columns - 1, self.width - 1),
        )

    def keys(self, q: Tensor) -> Tensor:
        row, column = self.pixel(q)
        top, left = row // self.rows * self.rows, column // self.columns * self.columns
        r = top[:, None, None] + torch.arange(-self.above, self.rows, device=q.device)[:, None]
        c = left[:, None, None] + torch.arange(-self.beside, self.columns + self.beside, device=q.device)
        inside = (r >= 0) & (c >= 0) & (c < self.width)
        k = self.position(r.clamp_min(0), c.clamp(0, self.width - 1)).flatten(1)
        return torch.where(inside.flatten(1) & self.allows(q[:, None], k), k, -1)
