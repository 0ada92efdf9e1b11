"""Who reads what, on the image: the keys of one query as pixels."""

from dataclasses import dataclass
from typing import Any

import torch
from rich.text import Text
from torch import Tensor

from writehead.core.pattern import Image2D

COLOURS = torch.tensor([[242, 242, 242], [33, 84, 153], [230, 120, 30]], dtype=torch.uint8)


@dataclass(frozen=True)
class Grid:
    """How tokens lie on an image.

    Attributes:
        width: tokens of a row.
        order: the two-dimensional order of blocks in which tokens come, or None: row after row.
    """

    width: int
    order: Image2D | None = None

    def cells(self, keys: Tensor, query: int) -> Tensor:
        """keys (S,) bool -> (rows, width): 0 = not read, 1 = read, 2 = the query itself."""
        place = torch.arange(len(keys))
        if self.order is not None:
            row, column = self.order.pixel(place)
            place = row * self.width + column
        rows = int(place.max()) // self.width + 1
        cells = torch.zeros(rows * self.width, dtype=torch.int64)
        cells[place] = keys.long()
        cells[place[query]] = 2
        return cells.view(rows, self.width)


def grid_of(mixer: Any, pattern: Any) -> Grid | None:
    """The image that a mixer is made for; None if it states none."""
    if isinstance(pattern, Image2D):
        return Grid(pattern.width, pattern)
    width = getattr(mixer, "image_width", None)
    return None if width is None else Grid(width)


def lines(cells: Tensor) -> list[Text]:
    """Cells as text: # is read, Q the query."""
    return [Text(" ".join(".#Q"[code] for code in row)) for row in cells.tolist()]


def pixels(cells: Tensor, scale: int) -> Tensor:
    """Cells as uint8 (height, width, 3), `scale` pixels to a cell; the last one is a line between cells."""
    big = COLOURS[cells].repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    if scale > 2:
        big[scale - 1 :: scale] = 255
        big[:, scale - 1 :: scale] = 255
    return big
