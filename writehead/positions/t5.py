"""T5 relative bias: distances fall into buckets, each bucket has a learned bias for each head.

Paper     Raffel et al. 2019, "Exploring the Limits of Transfer Learning", arXiv:1910.10683
Equation  score(q, k) = q.k + B[bucket(p_k - p_q), h]; T5 itself does not scale q.k (scale=1)
State     none
Cost      one lookup a score, K H parameters for K buckets
Decodes   exactly, at any position
Differs   bucket borders are computed with integers, so no device rounds them to another side
"""

from bisect import bisect_left, bisect_right

import torch
from torch import Tensor, nn

from writehead.positions.base import Scheme

FARTHEST, MOST = (
    1 << 16,
    1 << 10,
)  # the table of buckets counts up to max_distance with powers of as many as buckets


def bucket_table(buckets: int, max_distance: int) -> list[int]:
    """The bucket of each distance 0 .. max_distance on one side: exact ones first, then logarithmic ones."""
    exact = buckets // 2
    steps, far = buckets - exact, range(exact, max_distance + 1)

    def border(j: int) -> int:
        # the first with floor(ln(distance / exact) / ln(max_distance / exact) steps) > j, as integers
        least = max_distance ** (j + 1) * exact**steps
        return exact + bisect_left(far, least, key=lambda distance: distance**steps * exact ** (j + 1))

    borders = [border(j) for j in range(steps)]
    near = list(range(min(exact, max_distance + 1)))
    return near + [min(buckets - 1, exact + bisect_right(borders, distance)) for distance in far]


class T5Bias(Scheme):
    """One table for all layers of a stack."""

    relative = True

    def __init__(
        self, heads: int, *, buckets: int = 32, max_distance: int = 128, bidirectional: bool = False
    ) -> None:
        """Make the table.

        Args:
            heads: query heads H.
            buckets: how many, half of them for each side if bidirectional.
            max_distance: from here on all distances share the last bucket.
            bidirectional: tell keys after the query from keys before it (encoders).
        """
        super().__init__()
        side = buckets // 2 if bidirectional else buckets
        even = buckets % (2 if bidirectional else 1) == 0
        if not (side >= 2 and buckets <= MOST and side // 2 < max_distance <= FARTHEST and even):
            raise ValueError(
                f"buckets={buckets}, max_distance={max_distance}: need an even number of buckets from "
                f"{4 if bidirectional else 2} to {MOST}, and max_distance above {max(1, side // 2)} "
                f"and up to {FARTHEST}"
            )
        self.side, self.bidirectional = side, bidirectional
        self.steps = bucket_table(side, max_distance)
        self.table = nn.Parameter(torch.empty(buckets, heads))
        nn.init.normal_(self.table, std=0.02)

    def bias(self, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
        steps = torch.tensor(self.steps, device=q.device)
        ahead = k[:, None, :] - q[:, :, None]
        distance = ahead.abs() if self.bidirectional else (-ahead).clamp_min(0)
        bucket = steps[distance.clamp_max(len(steps) - 1)]
        if self.bidirectional:
            bucket = bucket + self.side * (ahead > 0)
        return self.table[bucket].permute(0, 3, 1, 2).to(dtype)
