"""Block-sparse softmax attention: only the tiles of the score matrix that a pattern touches, forward and
backward.

Scores are never kept: the backward pass recomputes those of a tile from the saved log-sum-exp and adds its
gradients in place to those of the whole sequence, so time and memory grow with the tiles and not with the
square of the length (slices of the whole tensors under plain autograd would each make a gradient as long as
the sequence). Heads of a group share their keys and values; nothing is expanded.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from writehead.core.pattern import Pattern
from writehead.core.pattern.plan import Part, Plan, Tile, natural_size, plan_heads
from writehead.core.split import empty_like
from writehead.ops import picked
from writehead.ops.tile import additive, backward, forward, give, take, unread

BLOCK = 128  # queries and keys of a block
KEPT = 16  # masks and biases of tiles that are kept for the next tiles of a pass


class Bias(NamedTuple):
    """What is added to the scores.

    Attributes:
        of: positions of queries (1, T) and keys (1, S), type -> (1, H or 1, T, S).
        parameters: the tensors that it depends on and that want gradients.
        relative: it depends on the distance of query and key only, so tiles share it.
    """

    of: Callable[[Tensor, Tensor, torch.dtype], Tensor | None]
    parameters: tuple[Tensor, ...] = ()
    relative: bool = False


def block_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    valid: Tensor | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
    size: int | None = None,
) -> Tensor:
    """Attention over a whole sequence whose tokens stand at positions 0 to T - 1.

    Args:
        q: (B, T, H, D).
        k, v: (B, T, G, D), G a divisor of H.
        pattern: who may read whom; a query that may read nothing gets 0.
        valid: (B, T) bool, False where a key is padding; default all are tokens.
        bias: added to the scaled scores.
        scale: default D ** -0.5.
        size: queries and keys of a block; default `BLOCK`.

    Returns:
        y (B, T, H, D).
    """
    H, G = q.shape[2], k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    valid = None if valid is None or bool(valid.all()) else valid
    picking = bias is None  # biases are made for runs of tokens
    pieces, taken = [], []
    for heads in picked.alike(pattern, H, G, picking):
        first = pattern.head(heads[0])
        tiles = plan_heads(
            picked.sets(pattern, heads, H, G) if picking else (first,),
            q.shape[1],
            size or (natural_size(first, BLOCK) if picking else BLOCK),
            picking,
        )
        if heads == list(range(H)):
            return _run(q, k, v, tiles, valid, bias, scale)
        own = torch.tensor(heads, device=q.device)
        shared = torch.tensor(sorted({h * G // H for h in heads}), device=q.device)
        own_bias = None if bias is None else bias._replace(of=_of_heads(bias.of, own))
        part = (q.index_select(2, own), k.index_select(2, shared), v.index_select(2, shared))
        pieces.append(_run(*part, tiles, valid, own_bias, scale))
        taken += heads
    back = torch.tensor(taken, device=q.device).argsort()
    return torch.cat(pieces, 2).index_select(2, back)


def _of_heads(of: Callable[..., Tensor | None], heads: Tensor) -> Callable[..., Tensor]:
    def some(q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
        whole = of(q, k, dtype)
        assert whole is not None
        return whole if whole.shape[1] == 1 else whole.index_select(1, heads)

    return some


def _run(
    q: Tensor, k: Tensor, v: Tensor, tiles: Plan, valid: Tensor | None, bias: Bias | None, scale: float
) -> Tensor:
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    parameters = () if bias is None else bias.parameters
    y = _Blocks.apply(*heads_first, _Pass(tiles, valid, bias, scale), *parameters)  # type: ignore[no-untyped-call]
    assert isinstance(y, Tensor)
    return y.transpose(1, 2)


def _name(tile: Tile) -> tuple[Any, ...]:
    """Equal for tiles with the same mask."""
    return (tile.rows, tile.widths, *map(id, tile.masks))


class _Pass:
    """What the tiles of one call share: the plan, padding, masks and biases."""

    def __init__(self, tiles: Plan, valid: Tensor | None, bias: Bias | None, scale: float) -> None:
        self.plan, self.valid, self.bias, self.scale = tiles, valid, bias, scale
        self.kept: dict[Any, Tensor] = {}
        self.valid_of: dict[int, Tensor] = {}
        self.unread: dict[Any, Tensor | None] = {}

    def added(self, part: Part, tile: Tile, like: Tensor) -> Tensor | None:
        """What is added to a tile's scores, (B or 1, H or 1, queries, keys); -inf where nothing is read."""
        masked = any(mask is not None for mask in tile.masks)
        added = self._once(("mask", *_name(tile)), lambda: additive(tile, like)) if masked else None
        if self.bias is not None:
            bias = self._biased(part, tile, like)
            added = bias if added is None else bias + added
        if self.valid is not None:
            read = take(self._valid(part), tile, 1)
            if not bool(read.all()):
                base = torch.zeros((), dtype=like.dtype, device=like.device) if added is None else added
                added = torch.where(read[:, None, None], base, -torch.inf)
        return added

    def empty(self, tile: Tile, added: Tensor | None) -> Tensor | None:
        """Which queries read nothing, see `unread`; the masks say it once for alike tiles if nothing else
        is added."""
        if self.bias is not None or self.valid is not None:
            return unread(added)
        name = _name(tile)
        if name not in self.unread:
            self.unread[name] = tile.unread
        return self.unread[name]

    def _valid(self, part: Part) -> Tensor:
        assert self.valid is not None
        if part.keys is None:
            return self.valid
        if id(part) not in self.valid_of:
            self.valid_of[id(part)] = _place(self.valid, part.keys, 1)
        return self.valid_of[id(part)]

    def offsets(self, tile: Tile) -> tuple[int, ...]:
        """Equal for tiles whose queries and keys lie at equal distances, in the natural order."""
        return (tile.rows, *(end - tile.start for run in tile.runs for end in run))

    def _biased(self, part: Part, tile: Tile, like: Tensor) -> Tensor:
        assert self.bias is not None

        def make() -> Tensor:
            assert self.bias is not None
            q, k = (p[None].to(like.device) for p in part.positions(tile))
            value = self.bias.of(q, k, like.dtype)
            assert value is not None
            return value.detach()

        shared = self.bias.relative and part.queries is None and part.keys is None
        return self._once(("bias", self.offsets(tile)), make) if shared else make()

    def _once(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        found = self.kept.get(key)
        if found is None:
            if len(self.kept) >= KEPT:
                self.kept.clear()
            found = self.kept[key] = make()
        return found


class _Blocks(torch.autograd.Function):
    """q (B, H, T, D), k and v (B, G, T, D) -> y (B, H, T, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, given: _Pass, *parameters: Tensor) -> Tensor:
        B, H, T, D = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        first = given.plan.parts[0] if given.plan.parts else None
        full = first is not None and first.queries is None and sum(t.rows for t in first.tiles) == T
        y = (q.new_empty if full else q.new_zeros)(B, T, H, D).transpose(1, 2)
        lse = q.new_full((B, H, T), -torch.inf, dtype=wide)
        for n, part in enumerate(given.plan.parts):
            pq, pk, pv = _placed(part, q, k, v)
            whole = n == 0 and part.queries is None
            own_y, own_lse = (
                (y, lse) if whole else (pq.new_zeros(pq.shape), lse.new_full(pq.shape[:3], -torch.inf))
            )
            for tile in part.tiles:
                rows = slice(tile.start, tile.stop)
                added = given.added(part, tile, q)
                side = (pq[:, :, rows], take(pk, tile), take(pv, tile))
                out = forward(*side, added, given.scale, given.empty(tile, added))
                own_y[:, :, rows], own_lse[:, :, rows] = out
            if not whole:
                _merge(y, lse, own_y, own_lse, part.queries)
        for picks in given.plan.picks:
            for rows, *own in picked.forward(picked.Gathered(picks, q, k, v, given.valid, given.scale)):
                _merge(y[:, :, rows], lse[:, :, rows], own[0], own[1], None)
        ctx.save_for_backward(q, k, v, y, lse, *parameters)
        ctx.given = given
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse, *parameters = ctx.saved_tensors
        given: _Pass = ctx.given
        wanted = [p for p, needed in zip(parameters, ctx.needs_input_grad[4:], strict=True) if needed]
        slopes = _Slopes(given, wanted)
        lse = lse.masked_fill(lse == -torch.inf, 0)
        # laid out as (B, T, H, D) and as q, k and v are: whoever joins the three finds them joined already
        totals = tuple(t.transpose(1, 2) for t in empty_like([t.transpose(1, 2) for t in (q, k, v)], 2))
        empty = True
        for part in given.plan.parts:
            pq, pk, pv = _placed(part, q, k, v)
            pg, py, pl = (t if part.queries is None else _place(t, part.queries) for t in (grad, y, lse))
            orders = (part.queries, part.keys, part.keys)
            whole = all(order is None for order in orders)
            own = totals if whole else tuple(torch.empty_like(t) for t in (pq, pk, pv))
            reached = [0, 0, 0] if empty or not whole else [t.shape[2] for t in own]
            for tile in part.tiles:
                rows = slice(tile.start, tile.stop)
                added = given.added(part, tile, q)
                side = (pg[:, :, rows], pq[:, :, rows], take(pk, tile), take(pv, tile), py[:, :, rows])
                found = backward(*side, pl[:, :, rows], added, given.scale, slopes.taker(part, tile))
                runs = (((tile.start, tile.stop),), tile.runs, tile.runs)
                reached = [give(*each) for each in zip(own, found, runs, reached, strict=True)]
            for total, end in zip(own, reached, strict=True):
                total[:, :, end:] = 0
            if not whole:
                for total, value, order in zip(totals, own, orders, strict=True):
                    _back(total.zero_() if empty else total, value, order)
            empty = False
        if empty:
            for total in totals:
                total.zero_()
        for picks in given.plan.picks:
            part_of_all = picked.Gathered(picks, q, k, v, given.valid, given.scale)
            picked.backward(part_of_all, grad, y, lse, totals)
        return *totals, None, *slopes.gradients(ctx.needs_input_grad[4:])


class _Slopes:
    """Gradients of the bias; those of the scores of tiles at equal distances add up first."""

    def __init__(self, given: _Pass, wanted: list[Tensor]) -> None:
        self.given, self.wanted = given, wanted
        self.totals = [torch.zeros_like(p) for p in wanted]
        self.sums: dict[tuple[int, ...], tuple[Part, Tile, Tensor]] = {}

    def taker(self, part: Part, tile: Tile) -> Callable[[Tensor], None] | None:
        """What takes the tile's score gradients (B, H, queries, keys), or None if nobody wants them."""
        bias = self.given.bias
        if bias is None or not self.wanted:
            return None

        def collect(slope: Tensor) -> None:
            slope = slope.sum(0, keepdim=True)
            if not (bias.relative and part.queries is None and part.keys is None):
                self._differentiate(part, tile, slope)
                return
            key = self.given.offsets(tile)
            if key in self.sums:
                self.sums[key][2].add_(slope)
            else:
                if len(self.sums) >= KEPT:
                    self._flush()
                self.sums[key] = (part, tile, slope)

        return collect

    def gradients(self, needed: tuple[bool, ...]) -> Iterator[Tensor | None]:
        self._flush()
        totals = iter(self.totals)
        for need in needed:
            yield next(totals) if need else None

    def _flush(self) -> None:
        for part, tile, slope in self.sums.values():
            self._differentiate(part, tile, slope)
        self.sums.clear()

    def _differentiate(self, part: Part, tile: Tile, slope: Tensor) -> None:
        bias = self.given.bias
        assert bias is not None
        with torch.enable_grad():
            q, k = (p[None].to(slope.device) for p in part.positions(tile))
            value = bias.of(q, k, slope.dtype)
            assert value is not None
            slope = slope.sum_to_size(value.shape)
            found = torch.autograd.grad(value, self.wanted, slope, allow_unused=True)
        for total, gradient in zip(self.totals, found, strict=True):
            if gradient is not None:
                total += gradient


def _placed(part: Part, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in the part's orders."""
    pq = q if part.queries is None else _place(q, part.queries)
    pk, pv = (t if part.keys is None else _place(t, part.keys) for t in (k, v))
    return pq, pk, pv


def _place(t: Tensor, order: Tensor, dim: int = 2) -> Tensor:
    """t in an order of its positions; what stands where there is none is never read."""
    return t.index_select(dim, order.clamp_min(0).to(t.device))


def _back(total: Tensor, value: Tensor, order: Tensor | None) -> None:
    """Add what stands in an order to what stands in the natural one, in place."""
    if order is None:
        total += value
        return
    real = (order >= 0).to(total.device)
    total.index_add_(2, order.to(total.device)[real], value[:, :, real])


def _merge(y: Tensor, lse: Tensor, own_y: Tensor, own_lse: Tensor, order: Tensor | None) -> None:
    """Take a part's y and lse, in its order, into those of the parts before it, in place."""
    if order is not None:
        real = (order >= 0).to(y.device)
        at = order.to(y.device)[real]
        own_y = torch.zeros_like(y).index_copy_(2, at, own_y[:, :, real])
        own_lse = torch.full_like(lse, -torch.inf).index_copy_(2, at, own_lse[:, :, real])
    both = torch.logaddexp(lse, own_lse)
    base = both.masked_fill(both == -torch.inf, 0)
    y.mul_(torch.exp(lse - base)[..., None]).add_(own_y * torch.exp(own_lse - base)[..., None])
    lse.copy_(both)
