"""Prefix sums of outer products, read by queries: `scan` without a denominator and without factors.

Luna and the prefix form of Linformer read one such sum, put a softmax over what they read and read a second
one with it, so nothing is divided by the sum of a token's features, which `scan` carries along.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from writehead.ops import by_head
from writehead.ops.scan_chunks import as_given

PIECE = 64  # tokens whose products are made pair by pair


def prefix(q: Tensor, k: Tensor, v: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """q_t . (total + sum_{j <= t} k_j v_j^T) for every token of a call.

    Args:
        q: (B, T, G, H / G, D).
        k, v: (B, T, G, D) and (B, T, G, M); a token where either is 0 is not remembered.
        total: (B, G, D, M), the sum over earlier calls.

    Returns:
        The products (B, T, G, H / G, M), and the sum after the call.
    """
    with as_given(q):
        y, total = _prefix(q.flatten(2, 3), k, v, total, PIECE)
    return y.unflatten(2, q.shape[2:4]), total


class _Prefix(torch.autograd.Function):
    """The sum in pieces, with a backward pass that goes over them once and stores one sum for each."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, total: Tensor, piece: int
    ) -> tuple[Tensor, Tensor]:
        (B, T, H, D), (G, M) = q.shape, v.shape[2:]
        kept = any(ctx.needs_input_grad)
        spans = [(a, min(a + piece, T)) for a in range(0, T, piece)]
        sums = total.new_empty(len(spans) + 1 if kept else 2, B * G, D, M)
        sums[0] = total.reshape(B * G, D, M)
        y, pairs = q.new_empty(B, T, H, M), _triangle(q, min(piece, T))
        for n, (a, b) in enumerate(spans):
            before, after = (sums[n], sums[n + 1]) if kept else (sums[n % 2], sums[(n + 1) % 2])
            queries, keys, values = (
                by_head.queries(q, G, a, b),
                by_head.heads(k, a, b),
                by_head.heads(v, a, b),
            )
            scores = by_head.scores(queries, keys, pairs[: b - a, : b - a])
            by_head.lay(y, torch.bmm(queries, before).baddbmm_(scores, values), G, a, b)
            torch.baddbmm(before, keys.transpose(1, 2), values, out=after)
        last = sums[len(spans) if kept else len(spans) % 2].view_as(total).clone()
        if kept:
            ctx.save_for_backward(q, k, v, sums)
            ctx.piece = piece
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, carried: Tensor) -> tuple[Tensor | None, ...]:
        with as_given(grad):
            return _backward(ctx, grad, carried)


def _backward(ctx: Any, grad: Tensor, carried: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients by everything that `_Prefix.forward` takes."""
    q, k, v, sums = ctx.saved_tensors
    (B, T, _, D), (G, M), piece = q.shape, v.shape[2:], ctx.piece
    q_grad, k_grad, v_grad = (t.new_empty(t.shape) for t in (q, k, v))
    after, pairs = carried.reshape(B * G, D, M), _triangle(q, min(piece, T))
    for n in reversed(range(len(sums) - 1)):
        a, b = n * piece, min((n + 1) * piece, T)
        queries, keys, values = by_head.queries(q, G, a, b), by_head.heads(k, a, b), by_head.heads(v, a, b)
        g, own = by_head.queries(grad, G, a, b), pairs[: b - a, : b - a]
        by_scores = by_head.scores(g, values, own)
        by_head.lay(q_grad, torch.bmm(g, sums[n].transpose(1, 2)).baddbmm_(by_scores, keys), G, a, b)
        found = torch.bmm(values, after.transpose(1, 2)).baddbmm_(by_scores.transpose(1, 2), queries)
        by_head.lay(k_grad, found, G, a, b)
        found = torch.bmm(keys, after).baddbmm_(by_head.scores(queries, keys, own).transpose(1, 2), g)
        by_head.lay(v_grad, found, G, a, b)
        after = torch.baddbmm(after, queries.transpose(1, 2), g)
    return q_grad, k_grad, v_grad, after.view(B, G, D, M), None


_prefix: Callable[..., tuple[Tensor, Tensor]] = _Prefix.apply


def _triangle(like: Tensor, size: int) -> Tensor:
    return like.new_ones(size, size).tril()
