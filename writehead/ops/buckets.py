"""Attention within buckets: each query reads the keys of its bucket that stand nearest before (or around) it.

Keys are sorted by (bucket, position); what a query reads is then a run of at most `window` ranks, and blocks
of queries read blocks of ranks as matrix products. Nothing depends on how many tokens come later or fall into
other buckets, so a prefix of the sequence gives a prefix of the result. Several rounds of buckets are one
softmax over all that they find. Neither forward nor backward keeps scores.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from writehead.core.shapes import check_multiple, check_shape

SCORES = 1 << 21  # so many are held at a time


class Runs(NamedTuple):
    """What the queries read in one round; N = B G pairs of row and key/value head, Q = T H / G queries each.

    Attributes:
        order: (N, S) the key at each rank.
        first, last: (N, Q) ranks first, ..., last - 1 are read.
        q_bucket, k_bucket: (N, Q), (N, S).
        low, high: (N, Q) the positions that those ranks lie between, both included.
    """

    order: Tensor
    first: Tensor
    last: Tensor
    q_bucket: Tensor
    k_bucket: Tensor
    low: Tensor
    high: Tensor


def runs(
    q_bucket: Tensor,
    k_bucket: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    window: int,
    *,
    there: Tensor | None = None,
    both_sides: bool = False,
) -> list[Runs]:
    """Which keys each query reads in one round: of its bucket the `window` last before it.

    Args:
        q_bucket: (B, T, H), buckets >= 0; key/value head h // (H / G) serves query head h.
        k_bucket: (B, S, G).
        q_pos, k_pos: (B, T), (B, S, G), -1 = padding. A key at the query's own position is never read.
        window: the most keys that a query reads, on each side.
        there: (B, S, G), which keys take part; default all.
        both_sides: also the `window` first keys after the query, as a second set of runs.

    Raises:
        ValueError: shapes that do not fit, or a window below 1.
    """
    B, T, H = q_bucket.shape
    check_shape("k_bucket", k_bucket, "B S G", B=B)
    check_shape("k_pos", k_pos, "B S G", B=B, S=k_bucket.shape[1], G=k_bucket.shape[2])
    check_multiple("heads", H, "kv_heads", k_bucket.shape[2])
    if window < 1:
        raise ValueError(f"window={window} must be at least 1")
    S, G = k_bucket.shape[1:]
    if not S * T:
        return []
    qb = q_bucket.unflatten(2, (G, -1)).permute(0, 2, 1, 3).reshape(B * G, -1).long().contiguous()
    kb, kp = (t.transpose(1, 2).reshape(B * G, S).long() for t in (k_bucket, k_pos))
    qp = q_pos[:, None, :, None].expand(B, G, T, H // G).reshape(B * G, -1)
    part = kp >= 0 if there is None else (kp >= 0) & there.transpose(1, 2).reshape(B * G, S)
    span = int(max(q_pos.max(), k_pos.max())) + 2
    most = torch.iinfo(torch.int64).max
    codes, order = torch.where(part, kb * span + kp, most).contiguous().sort(1)
    start = torch.searchsorted(codes, qb * span)
    own = torch.searchsorted(codes, qb * span + qp)
    sides = [(torch.maximum(own - window, start), own)]
    if both_sides:
        after = torch.searchsorted(codes, qb * span + qp, right=True)
        end = torch.searchsorted(codes, (qb + 1) * span)
        sides.append((after, torch.minimum(after + window, end)))
    sorted_pos = kp.gather(1, order)
    found = []
    for first, last in sides:
        last = torch.where(qp >= 0, last, first)
        ends = (sorted_pos.gather(1, at.clamp(0, S - 1)) for at in (first, last - 1))
        found.append(Runs(order, first, last, qb, kb, *ends))
    return found


def bucket_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rounds: Sequence[Runs],
    k_pos: Tensor,
    *,
    window: int,
    scale: float,
    once: bool = False,
) -> tuple[Tensor, Tensor]:
    """One softmax over the keys that all the rounds find.

    Args:
        q: (B, T, H, D).
        k, v: (B, S, G, D), (B, S, G, E).
        rounds: from `runs`; a key that two of them find counts twice.
        k_pos: (B, S, G) positions of the keys.
        window: the longest run.
        scale: factor on the scores.
        once: count every key once, however many rounds find it.

    Returns:
        y (B, T, H, E) and lse (B, T, H), both differentiable; 0 and -inf where nothing is found.
    """
    return _Buckets.apply(q, k, v, list(rounds), k_pos, window, scale, once)  # type: ignore[no-any-return, no-untyped-call]


class _Plan(NamedTuple):
    """The blocks of one round: C queries each, which read 2 W ranks."""

    rows: Tensor  # (blocks * C) row of q as (B T H, D); one past the last = no query
    first: Tensor  # (blocks * C) ranks that it reads, counted from the block's first key
    last: Tensor
    queries: Tensor  # (blocks * C) number among the N Q queries, 0 for none
    keys: Tensor  # (blocks, 2 W) rows of k as (B S G, D)


def _plan(run: Runs, B: int, H: int, G: int, window: int) -> _Plan:
    (N, Q), S, W, C = run.first.shape, run.order.shape[1], window, max(window, 16)
    device, chunks = run.order.device, -(-S // W)
    query = torch.arange(N * Q, device=device)
    read = (run.last > run.first).flatten()
    chunk = (query // Q) * chunks + (run.last.flatten() - 1).div(W, rounding_mode="floor")
    chunk, query = chunk[read], query[read]
    chunk, by = chunk.sort(stable=True)
    query = query[by]
    counts = torch.bincount(chunk, minlength=N * chunks)
    blocks = -(-counts // C)
    before = counts.cumsum(0) - counts
    place = (blocks.cumsum(0) - blocks)[chunk] * C + torch.arange(len(query), device=device) - before[chunk]
    chunk_of = torch.repeat_interleave(torch.arange(N * chunks, device=device), blocks)
    total = len(chunk_of)

    def placed(values: Tensor, empty: int) -> Tensor:
        return torch.full((total * C,), empty, device=device).index_put_((place,), values)

    base = (chunk % chunks - 1) * W
    # query number n Q + t X + x, n = b G + g, is row (b T + t) H + g X + x of q
    n, rest, X = query // Q, query % Q, H // G
    row = ((n // G) * (Q // X) + rest // X) * H + (n % G) * X + rest % X
    ranks = (chunk_of % chunks - 1)[:, None] * W + torch.arange(2 * W, device=device)
    at = chunk_of.div(chunks, rounding_mode="floor")[:, None]
    key = run.order.flatten()[(at * S + ranks.clamp(0, S - 1))]
    keys = ((at // G) * S + key) * G + at % G
    first, last = (placed(t.flatten()[query] - base, 0) for t in (run.first, run.last))
    return _Plan(placed(row, B * (Q // X) * H), first, last, placed(query, 0), keys)


class _Buckets(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rounds: list[Runs],
        k_pos: Tensor,
        window: int,
        scale: float,
        once: bool,
    ) -> tuple[Tensor, Tensor]:
        (B, T, H, _), G, E = q.shape, k.shape[2], v.shape[-1]
        wide = torch.promote_types(q.dtype, torch.float32)
        y, lse = (
            q.new_zeros(B * T * H + 1, E, dtype=wide),
            q.new_full((B * T * H + 1,), -torch.inf, dtype=wide),
        )
        plans = [_plan(run, B, H, G, window) for run in rounds]
        ctx.plans, ctx.rounds, ctx.scale, ctx.once, ctx.k_pos = plans, rounds, scale, once, k_pos
        for number in range(len(plans)):
            for rows, _, scores, values in _slabs(ctx, number, q, k, v):
                top = scores.amax(-1, keepdim=True)
                top = top.masked_fill_(top == -torch.inf, 0)
                shares = scores.sub_(top).exp_()
                total = shares.sum(-1, keepdim=True)
                part = (total.log() + top).flatten()
                mean = (torch.bmm(shares, values) / total.clamp_min(torch.finfo(wide).tiny)).flatten(0, 1)
                old = lse[rows]
                new = torch.logaddexp(old, part)
                share = torch.exp(part - new.masked_fill(new == -torch.inf, 0))[:, None]
                y[rows] = (
                    y[rows] * torch.exp(old - new.masked_fill(new == -torch.inf, 0))[:, None] + mean * share
                )
                lse[rows] = new
        y, lse = y[:-1].view(B, T, H, E), lse[:-1].view(B, T, H)
        ctx.save_for_backward(q, k, v, y, lse)
        return y.to(q.dtype), lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_y: Tensor, g_lse: Tensor) -> tuple[Any, ...]:
        q, k, v, y, lse = ctx.saved_tensors
        wide = lse.dtype
        g_y = g_y.to(wide)
        # d score = share (g_y . v - g_y . y + g_lse)
        offset = _with_spare((g_y * y).sum(-1) - g_lse)
        flat_lse, flat_g = _with_spare(lse.masked_fill(lse == -torch.inf, 0)), _with_spare(g_y)
        g_q = q.new_zeros(q[..., 0].numel() + 1, q.shape[-1], dtype=wide)
        g_k, g_v = (t.new_zeros(t[..., 0].numel(), t.shape[-1], dtype=wide) for t in (k, v))
        for number in range(len(ctx.plans)):
            for rows, keys, scores, values in _slabs(ctx, number, q, k, v):
                n, C, _ = scores.shape
                shares = scores.sub_(flat_lse[rows].view(n, C, 1)).exp_()
                g = flat_g[rows].view(n, C, -1)
                g_v.index_add_(0, keys.flatten(), torch.bmm(shares.transpose(1, 2), g).flatten(0, 1))
                g_s = torch.bmm(g, values.transpose(1, 2)).sub_(offset[rows].view(n, C, 1)).mul_(shares)
                g_s *= ctx.scale
                g_q.index_add_(0, rows, torch.bmm(g_s, _rows(k, keys, wide)).flatten(0, 1))
                own = _rows(_with_spare(q), rows.view(n, C), wide)
                g_k.index_add_(0, keys.flatten(), torch.bmm(g_s.transpose(1, 2), own).flatten(0, 1))
        grads = (g_q[:-1].view_as(q).to(q.dtype), g_k.view_as(k).to(k.dtype), g_v.view_as(v).to(v.dtype))
        return (*grads, None, None, None, None, None)


def _slabs(ctx: Any, number: int, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Blocks of one round, some at a time: rows of q, rows of k, masked scores (n, C, 2 W), values."""
    plan: _Plan = ctx.plans[number]
    wide, width = torch.promote_types(q.dtype, torch.float32), plan.keys.shape[1]
    if not len(plan.keys):
        return
    C = len(plan.rows) // len(plan.keys)
    step = max(1, SCORES // (C * width))
    place, flat_q = torch.arange(width, device=q.device), _with_spare(q)
    for a in range(0, len(plan.keys), step):
        b = min(a + step, len(plan.keys))
        keys, part = plan.keys[a:b], slice(a * C, b * C)
        rows = plan.rows[part]
        scores = torch.bmm(_rows(flat_q, rows.view(b - a, C), wide), _rows(k, keys, wide).transpose(1, 2))
        first, last = (t[part].view(b - a, C, 1) for t in (plan.first, plan.last))
        hidden = (place < first) | (place >= last)
        if ctx.once:
            hidden |= _found_before(ctx, number, plan.queries[part].view(b - a, C), keys)
        yield rows, keys, scores.mul_(ctx.scale).masked_fill_(hidden, -torch.inf), _rows(v, keys, wide)


def _found_before(ctx: Any, number: int, queries: Tensor, keys: Tensor) -> Tensor:
    """(n, C, 2 W): did an earlier round find that key for that query?"""
    found = torch.zeros(*queries.shape, keys.shape[1], dtype=torch.bool, device=keys.device)
    S, G = ctx.k_pos.shape[1:]
    pos = ctx.k_pos.flatten()[keys][:, None]
    at = (keys // G // S * G + keys % G) * S + keys // G % S  # row of (N, S)
    for run in ctx.rounds[:number]:
        low, high, bucket = (t.flatten()[queries][..., None] for t in (run.low, run.high, run.q_bucket))
        read = (run.last > run.first).flatten()[queries][..., None]
        found |= read & (run.k_bucket.flatten()[at][:, None] == bucket) & (pos >= low) & (pos <= high)
    return found


def _rows(t: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of t (..., D), counted over all its leading dimensions, as (n, m, D)."""
    return t.reshape(-1, t.shape[-1]).index_select(0, rows.flatten()).view(*rows.shape, -1).to(dtype)


def _with_spare(t: Tensor) -> Tensor:
    """t (B, T, H, ...) as rows, and one of zeros behind them for places without a query."""
    rows = t.flatten(0, 2)
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
