"""From a pattern to tiles: which pieces of the score matrix block-sparse attention computes, in which order.

A union of patterns is cut into parts that want the same order of tokens: strides lie contiguously once the
tokens are the columns of a matrix, and summary columns once the other keys are left out. Blocks drawn at
random are few in no order: they are picked one by one. A pair that several parts have belongs to the first of
them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from writehead.core.pattern.base import And, Or, Order, Pattern
from writehead.core.pattern.picks import Picks, pick


@dataclass(frozen=True, eq=False)
class Tile:
    """A run of queries and the keys that some of them read.

    Attributes:
        start, stop: the queries, as places in their order.
        runs: the keys, as runs of places in theirs.
        masks: for each block of keys which pairs are allowed, (queries, keys) bool, or None = all.
        widths: keys of each block.
    """

    start: int
    stop: int
    runs: tuple[tuple[int, int], ...]
    masks: tuple[Tensor | None, ...]
    widths: tuple[int, ...]

    @property
    def rows(self) -> int:
        """How many queries."""
        return self.stop - self.start

    @property
    def unread(self) -> Tensor | None:
        """(rows,) bool: the queries that read nothing; None if each reads something."""
        if any(mask is None for mask in self.masks):
            return None
        empty = ~torch.cat([mask for mask in self.masks if mask is not None], 1).any(1)
        return empty if bool(empty.any()) else None

    @property
    def cells(self) -> int:
        """Scores computed."""
        return self.rows * sum(b - a for a, b in self.runs)


@dataclass(frozen=True, eq=False)
class Part:
    """Tiles over one order of the tokens.

    Attributes:
        queries, keys: the position of each place, -1 = nothing there; None = the natural order.
        tiles: the pieces.
    """

    queries: Tensor | None
    keys: Tensor | None
    tiles: tuple[Tile, ...]

    def positions(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """The positions of a tile's queries and keys."""
        return _at(self.queries, tile.start, tile.stop), torch.cat(
            [_at(self.keys, *run) for run in tile.runs]
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """All parts of a pattern over a sequence of `length` tokens."""

    length: int
    parts: tuple[Part, ...]
    picks: tuple[Picks, ...] = ()

    @property
    def density(self) -> float:
        """Scores computed, as a share of all pairs, in the mean of the heads."""
        cells = float(sum(tile.cells for part in self.parts for tile in part.tiles))
        cells += sum(float(p.blocks[0].numel() * p.size**2) for p in self.picks)
        return cells / max(1, self.length**2)


@lru_cache(maxsize=256)
def _parts_of(pattern: Pattern, picking: bool) -> tuple[tuple[Order, Pattern], ...]:
    found: dict[Order, Pattern] = {}
    leaves = [(order if picking or not order.block else Order(), part) for order, part in _leaves(pattern)]
    for order, part in sorted(leaves, key=lambda leaf: (leaf[0].block, leaf[0] != Order())):
        found[order] = found[order] | part if order in found else part
    return tuple(found.items())


def parts_of(pattern: Pattern, picking: bool = True) -> dict[Order, Pattern]:
    """A head-free pattern as a union of patterns of one order each, the natural one first and picked blocks
    last (without `picking`: among the natural order)."""
    return dict(_parts_of(pattern, picking))


def skeleton(pattern: Pattern) -> tuple[tuple[Order, Pattern | None], ...]:
    """What two heads must have in common to go through one plan: everything but which blocks are picked,
    where these have one size."""
    parts = _parts_of(pattern, True)
    one = sum(order.block > 0 for order, _ in parts) == 1
    return tuple((order, None if order.block and one else part) for order, part in parts)


def _leaves(pattern: Pattern) -> Iterator[tuple[Order, Pattern]]:
    if isinstance(pattern, Or):
        yield from _leaves(pattern.a)
        yield from _leaves(pattern.b)
    elif isinstance(pattern, And):
        a, b = list(_leaves(pattern.a)), list(_leaves(pattern.b))
        if all(order == Order() for order, _ in (*a, *b)):
            yield Order(), pattern
            return
        for _, left in a:
            for _, right in b:
                yield (left & right).order, left & right
    else:
        yield pattern.order, pattern


def estimate(pattern: Pattern, length: int, size: int) -> float:
    """The share of all pairs that tiles of `size` would compute, without making them."""
    cells = 0
    for order, part in parts_of(pattern).items():
        if order.block:
            row = part.picked(torch.zeros(1, dtype=torch.int64))
            cells += -(-length // order.block) * row.shape[-1] * order.block**2
            continue
        _, _, grid = _grid(part, order, length, size)
        cells += int(grid.sum()) * size * size
    return cells / max(1, length**2)


def natural_size(pattern: Pattern, usual: int) -> int:
    """How large the tiles had best be: as large as those that are picked, unless those are far off."""
    sizes = {order.block for order in parts_of(pattern) if order.block}
    size = max(sizes, default=usual)
    return size if usual // 2 <= size <= 2 * usual else usual


def plan(pattern: Pattern, length: int, size: int) -> Plan:
    """The tiles of a head-free pattern.

    Args:
        pattern: who may read whom.
        length: tokens T, standing at positions 0 to T - 1.
        size: queries and keys of a block.
    """
    return plan_heads((pattern,), length, size)


@lru_cache(maxsize=64)
def plan_heads(patterns: tuple[Pattern, ...], length: int, size: int, picking: bool = True) -> Plan:
    """One plan for K sets of heads, whose patterns differ only in the blocks that they pick.

    Args:
        patterns: of the sets; one skeleton.
        length, size: as of `plan`.
        picking: pick blocks one by one; otherwise only one pattern may be given.
    """
    split = [_parts_of(pattern, picking) for pattern in patterns]
    tiled = tuple(leaf for leaf in split[0] if not leaf[0].block)
    picks, earlier = [], None
    for _, part in tiled:
        earlier = part if earlier is None else earlier | part
    for place in range(len(tiled), len(split[0])):
        order = split[0][place][0]
        own = tuple(leaves[place][1] for leaves in split)
        picks.append(pick(own, earlier, order.block, length))
        earlier = own[0] if earlier is None else earlier | own[0]
    return Plan(length, _tiled(tiled, length, size), tuple(picks))


@lru_cache(maxsize=64)
def _tiled(split: tuple[tuple[Order, Pattern], ...], length: int, size: int) -> tuple[Part, ...]:
    """The parts that are made of tiles."""
    parts, earlier = [], None
    known: dict[bytes, Tensor] = {}
    for order, part in split:
        queries, keys, grid = _grid(part, order, length, size)
        tiles = []
        for i, row in enumerate(grid):
            blocks = row.nonzero().flatten()
            tile = _tile(part, earlier, queries, keys, i * size, blocks, length, size, known)
            tiles += [] if tile is None else [tile]
        parts.append(Part(queries, keys, tuple(tiles)))
        earlier = part if earlier is None else earlier | part
    return tuple(parts)


def _grid(part: Pattern, order: Order, length: int, size: int) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The position of each place of queries and keys, and which blocks of them meet."""
    if order.stride > 1:
        rows = -(-length // order.stride)
        place = torch.arange(order.stride * rows)
        at = place % rows * order.stride + place // rows
        at = torch.where(at < length, at, -1)
        first, last = _ends(len(place), size)
        grid = part.folded(rows).tiles(first[:, None], last[:, None], first, last)
        return at, at, grid.expand(len(first), len(first))
    first, last = _ends(length, size)
    if order.columns is None:
        grid = part.tiles(first[:, None], last[:, None], first, last)
        return None, None, grid.expand(len(first), len(first))
    keys = torch.arange(length)
    keys = keys[order.columns.holds(keys)]
    k0, k1 = (keys[t] for t in _ends(len(keys), size))
    grid = part.tiles(first[:, None], last[:, None], k0, k1)
    return None, keys, grid.expand(len(first), len(k0))


def _ends(count: int, size: int) -> tuple[Tensor, Tensor]:
    first = torch.arange(0, count, size)
    return first, (first + size - 1).clamp_max(count - 1)


def _at(order: Tensor | None, start: int, stop: int) -> Tensor:
    return torch.arange(start, stop) if order is None else order[start:stop]


def _tile(
    part: Pattern,
    earlier: Pattern | None,
    queries: Tensor | None,
    keys: Tensor | None,
    start: int,
    blocks: Tensor,
    length: int,
    size: int,
    known: dict[bytes, Tensor],
) -> Tile | None:
    """The queries from `start` on and those of the blocks of keys that one of them reads."""
    q = _at(queries, start, min(start + size, length if queries is None else len(queries)))
    count = length if keys is None else len(keys)
    runs: list[tuple[int, int]] = []
    masks: list[Tensor | None] = []
    widths = []
    ends = [(block * size, min(block * size + size, count)) for block in blocks.tolist()]
    if not ends:
        return None
    k = torch.cat([_at(keys, a, b) for a, b in ends])
    allowed = part.allows(q[:, None], k) & (q >= 0)[:, None] & (k >= 0)
    if earlier is not None:
        allowed &= ~earlier.allows(q[:, None], k)
    for (a, b), mask in zip(ends, allowed.split([b - a for a, b in ends], 1), strict=True):
        if not bool(mask.any()):
            continue
        if runs and runs[-1][1] == a:
            runs[-1] = (runs[-1][0], b)
        else:
            runs.append((a, b))
        widths.append(b - a)
        masks.append(None if bool(mask.all()) else known.setdefault(_name(mask), mask.clone()))
    return Tile(start, start + len(q), tuple(runs), tuple(masks), tuple(widths)) if runs else None


def _name(mask: Tensor) -> bytes:
    return bytes(str(tuple(mask.shape)), "ascii") + mask.numpy().tobytes()
