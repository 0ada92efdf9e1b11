"""Compression of completed blocks: hidden states wait until their block of C positions is whole.

Blocks begin at the absolute positions 0, C, 2 C, ... of each row, however a sequence is cut into calls and
whatever padding it carries; a block is handed out once, by the call that brings its last token.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from writehead.core.cache import KV, Keys
from writehead.core.positions import Positions
from writehead.core.segments import Project, remember


class Open(NamedTuple):
    """The block of each row that is not yet whole.

    A sum of the past that cannot rewind, which `rewind` says since these are bare tensors.
    """

    rest: Tensor  # (B, C, X), zeros beyond the tokens seen
    seen: Tensor  # (B,) tokens of all blocks


class Blocks(NamedTuple):
    """Blocks that a call completed."""

    tokens: Tensor  # (B, N, C, X), N >= 1
    number: Tensor  # (B, N) of the block, -1 = not whole


def opened(batch: int, chunk: int, like: Tensor, width: int) -> Open:
    """No token seen."""
    rest = like.new_zeros(batch, chunk, width)
    return Open(rest, torch.zeros(batch, dtype=torch.int64, device=like.device))


def open_bytes(batch: int, chunk: int, width: int, itemsize: int) -> int:
    """Bytes of an `Open`."""
    return batch * (chunk * width * itemsize + 8)


def close(state: Open, x: Tensor, pos: Positions) -> tuple[Open, Blocks | None]:
    """Take T new tokens in.

    Args:
        state: what waits; consumed.
        x: (B, T, X), what stands at `pos`; padding is left out.
        pos: where the tokens stand.

    Returns:
        What waits now, and the blocks that became whole, or None if there is none in any row.
    """
    rest, before = state
    B, C, X = rest.shape
    start = torch.div(before, C, rounding_mode="floor") * C
    after = torch.maximum(before, pos.index.amax(1) + 1)
    whole = torch.div(after - start, C, rounding_mode="floor")
    N = int(whole.max())
    row, token = pos.valid.nonzero(as_tuple=True)
    slot = pos.index[row, token] - start[row]
    if N == 0 and not torch.is_grad_enabled():
        rest[row, slot] = x[row, token].to(rest.dtype)
        return Open(rest, after), None
    seen = torch.cat([rest, rest.new_zeros(B, N * C, X)], 1)
    seen = seen.index_put((row, slot), x[row, token].to(rest.dtype)).unflatten(1, (N + 1, C))
    rows = torch.arange(B, device=x.device)
    left = Open(seen[rows, whole], after)
    if N == 0:
        return left, None
    order = torch.arange(N, device=x.device)
    first = torch.div(start, C, rounding_mode="floor")[:, None]
    number = torch.where(order < whole[:, None], first + order, -1)
    return left, Blocks(seen[:, :N].to(x.dtype), number)


def between(keys: Keys, low: int, high: int) -> Keys:
    """The run of slots that holds all positions from `low` up to, not including, `high`."""
    (s,) = runs_between(keys.pos, [(low, high)])
    return Keys(keys.k[:, s], keys.v[:, s], keys.pos[:, s])


def runs_between(pos: Tensor, spans: Sequence[tuple[int, int]]) -> list[slice]:
    """For each (low, high) a run of slots (B, S) with all positions from `low` up to, not including, `high`.

    It costs one look at the slots, however many runs are asked for: where positions rise from slot to slot a
    run holds nothing else at its ends, in a ring it may be longer.
    """
    if not spans or not pos.numel():
        return [slice(0, 0)] * len(spans)
    none = torch.iinfo(pos.dtype).max
    highest = pos.amax(0).cummax(0).values  # before the run every position is below low
    lowest = torch.where(pos < 0, none, pos).amin(0).flip(0).cummin(0).values.flip(0)
    lows, highs = (torch.tensor(ends, device=pos.device) for ends in zip(*spans, strict=True))
    starts = torch.searchsorted(highest, lows.clamp_min(0)).tolist()
    stops = torch.searchsorted(lowest, highs).tolist()  # and behind it every one at least high
    return [slice(a, max(a, b)) for a, b in zip(starts, stops, strict=True)]


def summarise(
    kv: KV,
    blocks: Blocks | None,
    per_block: int,
    compress: Callable[[Tensor], Tensor],
    project: Project,
    like: Tensor,
) -> tuple[KV, Keys]:
    """Store the summaries of completed blocks and give all that are kept.

    Args:
        kv: the summaries so far; the i-th of block b has position b * per_block + i. Consumed.
        blocks: what `close` gave.
        per_block: summaries R of one block.
        compress: blocks (B, N, C, X) -> summaries (B, N, R, Y).
        project: makes keys and values of summaries (B, S, Y).
        like: new tokens (B, T, Y), for the type where there is no block.
    """
    if blocks is None:
        none = torch.full((len(like), 1), -1, device=like.device)
        return remember(kv, torch.zeros_like(like[:, :1]), Positions(none), project)
    number = blocks.number[..., None]
    each = torch.arange(per_block, device=number.device)
    index = torch.where(number < 0, -1, number * per_block + each).flatten(1)
    return remember(kv, compress(blocks.tokens).flatten(1, 2), Positions(index), project)
