"""Grid positions, or learned attention embeddings: a vector for each row, column and channel, added up.

Paper     Child, Gray, Radford, Sutskever 2019, "Generating Long Sequences with Sparse Transformers",
          arXiv:1904.10509
Equation  x_p = E[token_p] + sum over axes a of P_a[i_a(p)]; images: row, column, channel; text and sound:
          row floor(p / l) and column p mod l of a matrix of width l
State     none
Cost      O(X) a token, (n_1 + ... + n_n) X parameters for n_1 ... n_n positions
Decodes   exactly, up to the size of the grid; the next position raises
Differs   `patch` counts the pixels block by block, as the two-dimensional Image Transformer does
          (arXiv:1802.05751; there rows and columns have half of the width each, here they are added up)
"""

from math import prod

import torch
from torch import Tensor, nn

from writehead.core.pattern import Image2D
from writehead.core.positions import Positions
from writehead.core.shapes import check_multiple
from writehead.positions.base import Scheme


class Grid(Scheme):
    """A table for each axis of a grid, all as wide as the model, added to the token embeddings."""

    def __init__(self, dim: int, *, shape: list[int], patch: list[int] | None = None) -> None:
        """Make the tables.

        Args:
            dim: width X.
            shape: positions along each axis, the last one runs fastest: [rows, columns] or [rows, columns,
                channels]; their product is the longest context.
            patch: rows and columns (in positions) of the blocks in which an image is counted; default none.

        Raises:
            ValueError: axes or blocks that do not fit.
        """
        super().__init__()
        if len(shape) < 2 or any(not isinstance(n, int) or n < 1 for n in shape):
            raise ValueError(f"shape={shape} must name at least two axes of at least 1, such as [28, 28]")
        self.shape, self.max_context = list(shape), prod(shape)
        self.blocks = None if patch is None else blocks(shape[0], prod(shape[1:]), patch)
        self.tables = nn.ParameterList(nn.Parameter(torch.empty(n, dim)) for n in shape)
        for table in self.tables:
            nn.init.normal_(table, std=0.125 * (dim * len(shape)) ** -0.5)

    def embed(self, pos: Positions, dtype: torch.dtype) -> Tensor:
        self.check_context(pos)
        rest = pos.index.clamp_min(0)
        if self.blocks is not None:
            row, column = self.blocks.pixel(rest)
            rest = row * self.blocks.width + column
        total: Tensor | None = None
        for table, n in zip(reversed(self.tables), reversed(self.shape), strict=True):
            part = table[rest % n]
            total = part if total is None else total + part
            rest = rest.div(n, rounding_mode="floor")
        assert total is not None
        return total.to(dtype)


def blocks(height: int, width: int, patch: list[int]) -> Image2D:
    """The order of pixels, block by block, of an image of height x width positions.

    Raises:
        ValueError: the image is not whole blocks.
    """
    if len(patch) != 2 or any(not isinstance(n, int) or n < 1 for n in patch):
        raise ValueError(f"patch={patch} must be two numbers of at least 1: rows and columns")
    check_multiple("the image's height", height, "patch rows", patch[0])
    check_multiple("the image's width in positions", width, "patch columns", patch[1])
    return Image2D(width, patch[0], patch[1], 0, 0)
