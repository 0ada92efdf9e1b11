"""Axial positions: a grid of positions whose vectors are put together from one small table for each axis.

Paper     Kitaev, Kaiser, Levskaya 2020, "Reformer: The Efficient Transformer", arXiv:2001.04451 (Trax and
          transformers); Ho et al. 2019, "Axial Attention", arXiv:1912.12180
Equation  x_p = E[token_p] + [P_1[i_1] ; ... ; P_n[i_n]], p = (...(i_1 n_2 + i_2) n_3 + ...) + i_n
State     none
Cost      O(X) a token, n_1 d_1 + ... + n_n d_n parameters for n_1 ... n_n positions
Decodes   exactly, up to the size of the grid; the next position raises
Differs   the tables of the axes stand side by side, as in Trax; other code adds them up
"""

from math import prod

import torch
from torch import Tensor, nn

from writehead.core.positions import Positions
from writehead.positions.base import Scheme


class Axial(Scheme):
    """A table for each axis of a grid of positions, side by side, added to the token embeddings."""

    def __init__(self, dim: int, *, shape: list[int], dims: list[int] | None = None) -> None:
        """Make the tables.

        Args:
            dim: width X.
            shape: positions along each axis, the last one runs fastest; their product is the longest context.
            dims: widths of the tables, X together; default as even as they can be.

        Raises:
            ValueError: axes or widths that do not fit.
        """
        super().__init__()
        if len(shape) < 2 or any(not isinstance(n, int) or n < 1 for n in shape):
            raise ValueError(f"shape={shape} must name at least two axes of at least 1, such as [64, 64]")
        even = even_widths(dim, len(shape))
        dims = even if dims is None else dims
        if len(dims) != len(shape) or sum(dims) != dim or min(dims) < 1:
            raise ValueError(f"dims={dims} must be {len(shape)} widths of {dim} together, such as {even}")
        self.shape, self.max_context = list(shape), prod(shape)
        self.tables = nn.ParameterList(
            nn.Parameter(torch.empty(n, d)) for n, d in zip(shape, dims, strict=True)
        )
        for table in self.tables:
            nn.init.normal_(table, std=0.02)

    def embed(self, pos: Positions, dtype: torch.dtype) -> Tensor:
        self.check_context(pos)
        rest, parts = pos.index.clamp_min(0), []
        for table, n in zip(reversed(self.tables), reversed(self.shape), strict=True):
            parts.append(table[rest % n])
            rest = rest.div(n, rounding_mode="floor")
        return torch.cat(parts[::-1], -1).to(dtype)


def even_widths(dim: int, axes: int) -> list[int]:
    """Widths of the tables of so many axes, dim together, as even as they can be."""
    return [dim // axes + (i < dim % axes) for i in range(axes)]
