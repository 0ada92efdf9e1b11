"""Random blocks, drawn by a counter: a block of queries draws the same ones in a sequence of any length."""

from dataclasses import dataclass

import torch
from torch import Tensor

from writehead.core.pattern.base import Order, Pattern, Reach

LOW = (1 << 32) - 1  # the hash works on 32 bits, held in int64
ODD = (0x7FEB352D, 0x846CA68B)  # multipliers of a published 32-bit integer hash (lowbias32)


def mix(x: Tensor) -> Tensor:
    """32 well-mixed bits of each 32-bit number."""
    x = (x ^ x >> 16) * ODD[0] & LOW
    x = (x ^ x >> 15) * ODD[1] & LOW
    return x ^ x >> 16


@dataclass(frozen=True)
class Random(Pattern):
    """Queries of a block read `count` blocks drawn without repetition.

    Block 0 and the blocks nearer than `near` + 1 are not drawn, since windows and global tokens have them.
    Without `blocks` only earlier blocks are drawn (causal); with it, those of a sequence of so many blocks,
    except the last one.
    """

    size: int
    count: int
    seed: int = 0
    near: int = 1
    blocks_drawn: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.count < 1 or self.near < 0 or self.blocks_drawn < 0 or self.seed < 0:
            raise ValueError(
                f"{self}: size and count must be at least 1, seed, near and blocks_drawn at least 0"
            )

    @property
    def order(self) -> Order:
        return Order(block=self.size)

    def picked(self, block: Tensor) -> Tensor:
        return self.table(block)

    def table(self, block: Tensor) -> Tensor:
        """block (...) -> (..., count): the blocks that each one reads, -1 where there are no more to draw."""
        low = (block - self.near).clamp_min(1)  # first of the run that is left out
        if self.blocks_drawn:
            end = self.blocks_drawn - 1
            high = (block + self.near + 1).clamp(1, max(end, 1))
            low = torch.minimum(low, high)
            left = (end - 1 - (high - low)).clamp_min(0)
        else:
            high, left = low, low - 1
        drawn: list[Tensor] = []
        for i in range(self.count):
            ticket = mix(mix(mix(block + 1) + self.seed & LOW) + i & LOW)
            place = ticket % (left - i).clamp_min(1)
            for earlier in _sorted(drawn):
                place = place + (place >= earlier)
            drawn.append(torch.where(left > i, place, LOW))
        found = torch.stack(drawn, -1)
        number = found + 1
        number = torch.where(number >= low[..., None], number + (high - low)[..., None], number)
        return torch.where(found == LOW, -1, number)

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return (self.table(q // self.size) == (k // self.size)[..., None]).any(-1)

    @property
    def reach(self) -> Reach:
        return Reach(0, self.blocks_drawn * self.size or None)

    @property
    def causal(self) -> bool:
        return not self.blocks_drawn

    def tiles(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        q0, q1, k0, k1 = torch.broadcast_tensors(*(t // self.size for t in (q0, q1, k0, k1)))
        seen = torch.zeros_like(q0, dtype=torch.bool)
        for step in range(int((q1 - q0).max()) + 1 if q0.numel() else 0):
            at = torch.minimum(q0[..., :1] + step, q1[..., :1])  # rows of the grid share their queries
            read = self.table(at)
            seen |= ((read >= k0[..., None]) & (read <= k1[..., None])).any(-1)
        return seen

    def keys(self, q: Tensor) -> Tensor:
        read = self.table(q // self.size)[..., None]
        k = read * self.size + torch.arange(self.size, device=q.device)
        return torch.where(read >= 0, k, -1).flatten(1)


def _sorted(drawn: list[Tensor]) -> list[Tensor]:
    return list(torch.stack(drawn, -1).sort(-1).values.unbind(-1)) if drawn else []
