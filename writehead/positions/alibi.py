"""ALiBi: a penalty on distance, with a different slope for each head.

Paper     Press, Smith, Lewis 2021, "Train Short, Test Long", arXiv:2108.12409
Equation  score(q, k) = q.k / sqrt(D) - slope_h |p_q - p_k|
State     none: a cache slot's position is enough
Cost      one multiply and add a score
Decodes   exactly, at any position, in rings too, since the distance is the true one
Differs   |p_q - p_k| serves encoders as well; the paper is causal
"""

from math import isfinite

import torch
from torch import Tensor

from writehead.positions.base import Scheme


def slopes(heads: int) -> list[float]:
    """The authors' slopes: a geometric series for powers of two, else padded with every second one of the
    next power.

    Args:
        heads: any number of query heads from 1 to 65536.
    """
    if not 1 <= heads <= 65536:
        raise ValueError(f"heads={heads} must be at least 1 and at most 65536")
    power = 1 << (heads.bit_length() - 1)
    first = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    rest = [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * power, 2)]
    return (first + rest)[:heads]


class ALiBi(Scheme):
    """The linear bias; its slopes are constants, not parameters."""

    relative = True

    def __init__(self, heads: int, *, slopes_of_heads: list[float] | None = None) -> None:
        """Make the bias.

        Args:
            heads: query heads H.
            slopes_of_heads: H slopes in place of the paper's, for checkpoints that were trained with others.
        """
        super().__init__()
        given = slopes(heads) if slopes_of_heads is None else list(slopes_of_heads)
        if len(given) != heads:
            raise ValueError(f"slopes_of_heads has {len(given)} slopes for heads={heads}")
        if not all(isinstance(slope, int | float) and isfinite(slope) for slope in given):
            raise ValueError(f"slopes_of_heads must be finite numbers; got {given}")
        self.slope_list = given

    def bias(self, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
        slope = torch.tensor(self.slope_list, dtype=dtype, device=q.device)
        distance = (q[:, None, :, None] - k[:, None, None, :]).abs().to(dtype)
        return -slope[:, None, None] * distance
