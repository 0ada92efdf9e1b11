"""Learned absolute positions: one trained vector for each position up to a hard limit.

Paper     Gehring et al. 2017, "Convolutional Sequence to Sequence Learning", arXiv:1705.03122
Equation  x_p = E[token_p] + P[p]
State     none
Cost      O(X) a token, max_context X parameters
Decodes   exactly, up to max_context positions; the next one raises
Differs   nothing
"""

import torch
from torch import Tensor, nn

from writehead.core.positions import Positions
from writehead.positions.base import Scheme


class Learned(Scheme):
    """A table of max_context rows, added to the token embeddings."""

    def __init__(self, dim: int, *, max_context: int) -> None:
        super().__init__()
        if max_context < 1:
            raise ValueError(f"max_context={max_context} must be at least 1")
        self.max_context: int = max_context
        self.table = nn.Parameter(torch.empty(max_context, dim))
        nn.init.normal_(self.table, std=0.02)

    def embed(self, pos: Positions, dtype: torch.dtype) -> Tensor:
        self.check_context(pos)
        return self.table[pos.index.clamp_min(0)].to(dtype)
