"""Many tokens over the recurrence of `ops/scan.py`, in chunks, with the backward pass.

Within a chunk the scores are a small matrix, between chunks only S passes; one S a chunk is stored for the
backward pass, which goes over the chunks once, from the last to the first.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from writehead.ops import by_head


@dataclass(frozen=True)
class Rule:
    """How a sum of weights becomes a denominator.

    Attributes:
        eps: a small number.
        floor: the denominator is max(sum, eps), else sum + eps.
    """

    eps: float
    floor: bool

    def denominator(self, total: Tensor) -> Tensor:
        return total.clamp_min(self.eps) if self.floor else total + self.eps

    def slope(self, total: Tensor) -> Tensor | float:
        """The derivative of `denominator`."""
        return (total > self.eps).to(total.dtype) if self.floor else 1.0


def as_given(like: Tensor) -> AbstractContextManager[Any]:
    """Products in the type of the sums, also inside of autocast, which would make them shorter."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class _Weights(NamedTuple):
    """Factors of one chunk of C tokens, for each row and key/value head (B * G)."""

    pairs: Tensor  # (B * G, C, C) of key s for query t, 0 where s > t; (C, C) where all are alike
    cross: Tensor | None  # (B * G, C, 1) of the past for query t
    carry: Tensor | None  # (B * G, 1, 1) of the past for the state after the chunk
    write: Tensor | None  # (B * G, C, 1) of key s for the state after the chunk


def _weights(
    decay: Tensor | None,
    gain: Tensor | None,
    top: Tensor | None,
    tops: Tensor | None,
    like: Tensor,
    chunk: int,
) -> Callable[[int, int], _Weights]:
    """The factors of tokens a to b, computed when they are needed."""
    triangle = like.new_ones(chunk, chunk).tril()
    if decay is None and gain is None:
        return lambda a, b: _Weights(triangle[: b - a, : b - a], None, None, None)
    later = triangle == 0
    zeros = like.new_zeros(like.shape[0] * like.shape[2], chunk)

    def rows(t: Tensor, a: int, b: int) -> Tensor:
        return t[:, a:b].transpose(1, 2).reshape(-1, b - a)

    def of(a: int, b: int) -> _Weights:
        past = zeros[:, : b - a] if decay is None else rows(decay, a, b).cumsum(1)
        row = past if tops is None else past - rows(tops, a, b)
        column = -past if gain is None else rows(gain, a, b) - past
        pairs = (
            (row[:, :, None] + column[:, None, :]).masked_fill_(later[: b - a, : b - a], -torch.inf).exp_()
        )
        if decay is None and tops is None:
            return _Weights(pairs, None, None, pairs[:, -1, :, None])
        before = (
            row
            if top is None or tops is None
            else row + (top.reshape(-1, 1) if a == 0 else rows(tops, a - 1, a))
        )
        cross = before.exp()
        return _Weights(pairs, cross[..., None], cross[:, -1:, None], pairs[:, -1, :, None])

    return of


class _Chunks(torch.autograd.Function):
    """The recurrence in chunks, with a backward pass that goes over them once and stores one S for each."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        s: Tensor,
        decay: Tensor | None,
        gain: Tensor | None,
        top: Tensor | None,
        tops: Tensor | None,
        rule: Rule,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        (B, T, H, M), (G, E) = q.shape, v.shape[2:]
        kept = any(ctx.needs_input_grad)
        spans = [(a, min(a + chunk, T)) for a in range(0, T, chunk)]
        past = s.new_empty(len(spans) + 1 if kept else 2, B * G, M, E + 1)
        past[0] = s.view(B * G, M, E + 1)
        y, total = v.new_empty(B, T, H, E), v.new_empty(B, T, H, 1)
        weights = _weights(decay, gain, top, tops, v, min(chunk, T))
        for n, (a, b) in enumerate(spans):
            w = weights(a, b)
            before, after = (past[n], past[n + 1]) if kept else (past[n % 2], past[(n + 1) % 2])
            queries, keys, values = by_head.queries(q, G, a, b), by_head.heads(k, a, b), _with_one(v, a, b)
            sums = torch.bmm(queries, before)
            if w.cross is not None:
                sums = _scaled(sums, w.cross)
            torch.baddbmm(sums, by_head.scores(queries, keys, w.pairs), values, out=sums)
            sums = sums.view(B, G, H // G, b - a, E + 1).permute(0, 3, 1, 2, 4)
            found = total[:, a:b].view(B, b - a, G, H // G, 1)
            found.copy_(sums[..., E:])
            torch.div(sums[..., :E], rule.denominator(found), out=y[:, a:b].view(B, b - a, G, H // G, E))
            keys = keys if w.write is None else keys * w.write
            torch.bmm(keys.transpose(1, 2), values, out=after)
            after += before if w.carry is None else before * w.carry
        last = past[len(spans) if kept else len(spans) % 2].view_as(s).clone()
        if kept:
            ctx.save_for_backward(q, k, v, decay, gain, top, tops, y, total, past)
            ctx.rule, ctx.chunk = rule, chunk
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, carried: Tensor) -> tuple[Tensor | None, ...]:
        with as_given(grad):
            return _backward(ctx, grad, carried)


def _backward(ctx: Any, grad: Tensor, carried: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients by everything that `_Chunks.forward` takes."""
    q, k, v, decay, gain, top, tops, y, total, past = ctx.saved_tensors
    (B, T, H, M), (G, E), rule, chunk = q.shape, v.shape[2:], ctx.rule, ctx.chunk
    q_grad, k_grad, v_grad = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    after = carried.reshape(B * G, M, E + 1)
    ends = (after * past[-1]).sum((1, 2)).view(B, 1, G)
    weights = _weights(decay, gain, top, tops, v, min(chunk, T))
    for n in reversed(range(len(past) - 1)):
        a, b = n * chunk, min((n + 1) * chunk, T)
        w, before = weights(a, b), past[n]
        queries, keys, values = by_head.queries(q, G, a, b), by_head.heads(k, a, b), _with_one(v, a, b)
        g = by_head.queries(_numerators(grad[:, a:b], y[:, a:b], total[:, a:b], rule), G, 0, b - a)
        crossing = g if w.cross is None else _scaled(g, w.cross)
        by_scores = by_head.scores(g, values, w.pairs)
        found = torch.bmm(crossing, before.transpose(1, 2)).baddbmm_(by_scores, keys)
        by_head.lay(q_grad, found, G, a, b)
        found = torch.bmm(values, after.transpose(1, 2))
        found = found if w.write is None else found.mul_(w.write)
        found = found.baddbmm_(by_scores.transpose(1, 2), queries)
        by_head.lay(k_grad, found, G, a, b)
        found = torch.bmm(keys, after[..., :E])
        found = found if w.write is None else found.mul_(w.write)
        found = found.baddbmm_(by_head.scores(queries, keys, w.pairs).transpose(1, 2), g[..., :E])
        by_head.lay(v_grad, found, G, a, b)
        more = torch.bmm(queries.transpose(1, 2), crossing)
        after = more.add_(after if w.carry is None else after * w.carry)
    decay_grad = gain_grad = None
    if decay is not None or gain is not None:
        # a factor on a key multiplies the key, one on a query's past the query
        by_key = (k_grad * k).sum(-1)
        gain_grad = None if gain is None else by_key
        if decay is not None:
            flow = (q_grad * q).sum(-1).view(B, T, G, H // G).sum(-1) - by_key
            decay_grad = (flow.double().flip(1).cumsum(1).flip(1) + ends).to(decay.dtype)
    s_grad = after.view(B, G, M, E + 1) if ctx.needs_input_grad[3] else None
    return q_grad, k_grad, v_grad, s_grad, decay_grad, gain_grad, None, None, None, None


chunks: Callable[..., tuple[Tensor, Tensor]] = _Chunks.apply


def _with_one(v: Tensor, a: int, b: int) -> Tensor:
    """The same of values, each followed by a 1: (B * G, C, E + 1)."""
    B, _, G, E = v.shape
    values = v.new_empty(B, G, b - a, E + 1)
    values[..., :E] = v[:, a:b].transpose(1, 2)
    values[..., E] = 1
    return values.view(B * G, b - a, E + 1)


def _scaled(rows: Tensor, by: Tensor) -> Tensor:
    """(B * G, X * C, M) times (B * G, C, 1)."""
    return (rows.view(len(rows), -1, by.shape[1], rows.shape[-1]) * by[:, None]).view_as(rows)


def _numerators(grad: Tensor, y: Tensor, total: Tensor, rule: Rule) -> Tensor:
    """The gradient by sums and their total, (B, C, H, E + 1), from that by y = sums / denominator(total)."""
    found = grad.new_empty(*grad.shape[:-1], grad.shape[-1] + 1)
    low = rule.denominator(total)
    torch.div(grad, low, out=found[..., :-1])
    found[..., -1:] = (grad * y).sum(-1, keepdim=True).div_(low).mul_(-1).mul_(rule.slope(total))
    return found
