"""Tiles of blocks that are picked one by one, another choice for each head: gathered, many in one product.

A block of queries, of every head and of many places at once, is one row of a batch; its keys are gathered
beside each other. So heads with blocks of their own cost no more calls than heads that share them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from writehead.core.pattern import Pattern
from writehead.core.pattern.picks import Picks
from writehead.core.pattern.plan import skeleton
from writehead.ops import tile

GATHERED = 1 << 22  # numbers of keys that are gathered at once, about


class Gathered:
    """One part of a call: keys and values by blocks, and where each head finds its own."""

    def __init__(self, picks: Picks, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float):
        """q (B, H, T, D), k and v (B, G, T, D), valid (B, T)."""
        self.picks, self.scale, self.valid = picks, scale, valid
        self.length, self.groups = q.shape[2], k.shape[1]
        sets, self.count, self.most = picks.blocks.shape
        self.rows = self.groups if sets == 1 else sets  # heads of the gathered keys
        self.q, self.k, self.v = q, self._by_block(k), self._by_block(v)
        head = torch.arange(self.rows) * self.groups // self.rows
        read = picks.blocks.clamp_min(0).expand(self.rows, -1, -1)
        self.index = (head[:, None, None] * self.count + read).transpose(0, 1).to(q.device)  # (N, rows, R)

    def _by_block(self, t: Tensor) -> Tensor:
        """(B, G, T, D) -> (B, G * N, size * D), zeros behind the last token."""
        t = F.pad(t, (0, 0, 0, self.count * self.picks.size - t.shape[2]))
        return t.reshape(len(t), self.groups * self.count, -1)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Runs of blocks of queries; one that is not full comes alone."""
        numbers = self.rows * self.most * self.k.shape[-1] * len(self.k)
        step, full = max(1, GATHERED // numbers), self.length // self.picks.size
        for first in range(0, full, step):
            yield first, min(full, first + step)
        if full < self.count:
            yield full, self.count

    def queries(self, t: Tensor, first: int, last: int) -> Tensor:
        """t (B, H, T, ...) -> (B * n, H, queries of a block, ...) of a span."""
        own = t[:, :, first * self.picks.size : last * self.picks.size]
        rows: Tensor = own.unflatten(2, (last - first, -1)).transpose(1, 2).flatten(0, 1)
        return rows

    def back(self, t: Tensor, first: int, last: int) -> Tensor:
        """The inverse of `queries`: (B, H, queries of the span, ...)."""
        whole: Tensor = t.unflatten(0, (-1, last - first)).transpose(1, 2).flatten(2, 3)
        return whole

    def keys(self, t: Tensor, first: int, last: int) -> Tensor:
        """Blocks of t (B, G * N, size * D) -> (B * n, rows, R * size, D)."""
        own = t.index_select(1, self.index[first:last].flatten())
        return own.view(-1, self.rows, self.most * self.picks.size, self.q.shape[-1])

    def added(self, first: int, last: int) -> Tensor | None:
        """0 and -inf, (B * n, H, queries of a block, R * size), or None if every key may be read."""
        size, H = self.picks.size, self.q.shape[1]
        mask = self.picks.mask(first, last, self.length)
        seen = None if mask is None else mask.transpose(0, 1).to(self.q.device)[None]  # (1, n, K, ., .)
        if self.valid is not None:
            valid = F.pad(self.valid, (0, self.count * size - self.length)).view(-1, self.count, size)
            read = self.picks.blocks[:, first:last].clamp_min(0).transpose(0, 1).to(valid.device)
            real = valid[:, read].flatten(-2)[..., None, :]  # (B, n, K, 1, R * size)
            seen = real if seen is None else seen & real
        if seen is None:
            return None
        B, K, rows = len(self.k), seen.shape[2], min(size, self.length - first * size)
        seen = seen.expand(B, -1, -1, rows, -1)
        if K > 1 and K < H:
            seen = seen.repeat_interleave(H // K, 2)
        added = torch.where(seen, torch.zeros((), dtype=self.q.dtype, device=self.q.device), -torch.inf)
        return added.flatten(0, 1).expand(-1, H, -1, -1)


def forward(part: Gathered) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each span: the queries, y (B, H, queries, D) and lse (B, H, queries)."""
    for first, last in part.spans():
        side = (
            part.queries(part.q, first, last),
            part.keys(part.k, first, last),
            part.keys(part.v, first, last),
        )
        added = part.added(first, last)
        y, lse = tile.forward(*side, added, part.scale, tile.unread(added))
        size = part.picks.size
        yield slice(first * size, last * size), part.back(y, first, last), part.back(lse, first, last)


def backward(part: Gathered, grad: Tensor, y: Tensor, lse: Tensor, totals: tuple[Tensor, ...]) -> None:
    """Add the part's share of the gradients of q, k and v to the totals, in place."""
    size = part.picks.size
    dk, dv = torch.zeros_like(part.k), torch.zeros_like(part.v)
    for first, last in part.spans():
        pg, pq, py, pl = (part.queries(t, first, last) for t in (grad, part.q, y, lse))
        pk, pv = part.keys(part.k, first, last), part.keys(part.v, first, last)
        found = tile.backward(pg, pq, pk, pv, py, pl, part.added(first, last), part.scale, None)
        totals[0][:, :, first * size : last * size] += part.back(found[0], first, last)
        at = part.index[first:last].flatten()
        for total, value in ((dk, found[1]), (dv, found[2])):
            total.index_add_(1, at, value.reshape(len(total), len(at), -1).to(total.dtype))
    for total, value in zip(totals[1:], (dk, dv), strict=True):
        whole = value.view(len(total), part.groups, -1, total.shape[-1])
        total += whole[:, :, : part.length]


def alike(pattern: Pattern, heads: int, kv_heads: int, picking: bool) -> Iterator[list[int]]:
    """Sets of query heads with one pattern, but for the blocks picked, and as many heads of each key/value
    head."""
    if pattern.heads is None:
        yield list(range(heads))
        return
    sets: dict[Any, dict[int, list[int]]] = {}
    for h in range(heads):
        own = pattern.head(h)
        alike = skeleton(own) if picking else own
        sets.setdefault(alike, {}).setdefault(h * kv_heads // heads, []).append(h)
    for groups in sets.values():
        if len({len(group) for group in groups.values()}) == 1:
            yield [h for group in groups.values() for h in group]
        else:
            yield from groups.values()


def sets(pattern: Pattern, heads: list[int], all_heads: int, kv_heads: int) -> tuple[Pattern, ...]:
    """The patterns of a set's heads: one if all are equal, one for each key/value head if those of its heads
    are, or one for each head."""
    own = [pattern.head(h) for h in heads]
    if len(set(own)) == 1:
        return (own[0],)
    groups: dict[int, list[Pattern]] = {}
    for h, one in zip(heads, own, strict=True):
        groups.setdefault(h * kv_heads // all_heads, []).append(one)
    if all(len(set(group)) == 1 for group in groups.values()):
        return tuple(group[0] for group in groups.values())
    return tuple(own)
