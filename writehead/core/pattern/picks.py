"""Blocks of keys that blocks of queries pick one by one, such as random ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from writehead.core.pattern.base import And, Or, Pattern


@dataclass(frozen=True, eq=False)
class Picks:
    """For each block of queries the blocks of keys that it reads, of one size, as K sets of heads have it.

    Attributes:
        size: tokens of a block.
        blocks: (K, N, R), of N blocks of queries at most R blocks of keys, -1 = none.
        clear: (K, N, R) bool, may each query of the block read each key of the other, and for the first time?
        patterns: of the K sets.
        earlier: what earlier parts have.
    """

    size: int
    blocks: Tensor
    clear: Tensor
    patterns: tuple[Pattern, ...]
    earlier: Pattern | None

    def mask(self, first: int, last: int, length: int) -> Tensor | None:
        """Blocks first..last - 1 of queries: bool (K, n, queries of a block, R * size), None = all."""
        if bool(self.clear[:, first:last].all()):
            return None
        q = torch.arange(first * self.size, min(last * self.size, length)).view(last - first, -1, 1)
        read = self.blocks[:, first:last, None]
        k = (read[..., None] * self.size + torch.arange(self.size)).flatten(-2)
        real = (read >= 0).repeat_interleave(self.size, -1) & (k < length)
        seen = torch.stack([p.allows(q, own) for p, own in zip(self.patterns, k.clamp_min(0), strict=True)])
        if self.earlier is not None:
            seen &= ~self.earlier.allows(q, k.clamp_min(0))
        return seen & real


def pick(patterns: tuple[Pattern, ...], earlier: Pattern | None, size: int, length: int) -> Picks:
    """The blocks of `size` tokens that K patterns pick in a sequence, apart from what an earlier one has."""
    block = torch.arange(-(-length // size))
    found = []
    for pattern in patterns:
        read = pattern.picked(block)
        read = torch.where(read * size < length, read, -1).sort(-1).values
        twice = torch.zeros_like(read, dtype=torch.bool)
        twice[:, 1:] = read[:, 1:] == read[:, :-1]
        found.append(torch.where(twice, -1, read))
    blocks = torch.stack(found)
    clear = (blocks >= 0) & ((blocks + 1) * size <= length)
    clear &= torch.tensor([_picks_whole(pattern) for pattern in patterns])[:, None, None]
    if earlier is not None:
        q0, k0 = (block * size)[:, None], blocks.clamp_min(0) * size
        q1 = (q0 + size - 1).clamp_max(length - 1)
        met = [earlier.tiles(q0, q1, own, (own + size - 1).clamp_max(length - 1)) for own in k0]
        clear &= ~torch.stack([m.expand(blocks.shape[1:]) for m in met])
    return Picks(size, blocks, clear, patterns, earlier)


def _picks_whole(pattern: Pattern) -> bool:
    """Does every query of a block read every key of the blocks picked?"""
    if isinstance(pattern, Or):
        return _picks_whole(pattern.a) and _picks_whole(pattern.b)
    return not isinstance(pattern, And)
