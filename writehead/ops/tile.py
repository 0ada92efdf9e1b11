"""One tile of block-sparse attention: a run of queries against the keys that some of them read."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from writehead.core.pattern.plan import Tile
from writehead.ops.attend import flash

KEYS = 1024  # keys whose scores are held at once where the backward pass is not fused

flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, scale: float, empty: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One tile: y and lse of its queries, 0 and -inf where nothing is read (`empty`)."""
    if q.is_cpu:
        y, lse = flash(q, k, v, 0.0, False, attn_mask=added, scale=scale)
    else:
        scores = _scores(q, k, added, scale)
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
        y = _unfold(_fold(weights.to(v.dtype), k.shape[1]) @ v, q.shape[1])
    return y, lse if empty is None else lse.masked_fill(empty, -torch.inf)


def unread(added: Tensor | None) -> Tensor | None:
    """The queries that read nothing, (B or 1, H or 1, queries) bool; None = what is added cannot say that."""
    return None if added is None else (added == -torch.inf).all(-1)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    added: Tensor | None,
    scale: float,
    slopes_to: Callable[[Tensor], None] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One tile's share of the gradients of q, k and v; y and lse are those of all keys that a query reads."""
    if q.is_cpu and slopes_to is None:
        found = flash_backward(grad, q, k, v, y, lse, 0.0, False, attn_mask=added, scale=scale)
        return found[0], found[1], found[2]
    dtype, G = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    grad, q, k, v = (t.to(dtype) for t in (grad, q, k, v))
    delta = (grad * y).sum(-1, keepdim=True)
    dq, dks, dvs, slopes = torch.zeros_like(q), [], [], []
    for a in range(0, k.shape[2], KEYS):
        keys = slice(a, a + KEYS)
        some = None if added is None else added[..., keys]
        weights = torch.exp(_scores(q, k[:, :, keys], some, scale) - lse[..., None])
        slope = weights * (_unfold(_fold(grad, G) @ v[:, :, keys].transpose(-1, -2), q.shape[1]) - delta)
        dvs.append(_fold(weights, G).transpose(-1, -2) @ _fold(grad, G))
        dks.append(_fold(slope, G).transpose(-1, -2) @ _fold(q, G) * scale)
        dq += _unfold(_fold(slope, G) @ k[:, :, keys], q.shape[1]) * scale
        slopes.append(slope)
    if slopes_to is not None:
        slopes_to(torch.cat(slopes, -1))
    return dq, torch.cat(dks, 2), torch.cat(dvs, 2)


def _scores(q: Tensor, k: Tensor, added: Tensor | None, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = _unfold(_fold(q, k.shape[1]) @ k.transpose(-1, -2), q.shape[1]).to(wide) * scale
    return scores if added is None else scores + added


def _fold(t: Tensor, groups: int) -> Tensor:
    """(B, H, T, E) -> (B, G, H / G * T, E): the queries of a group as rows of one product."""
    return t.reshape(t.shape[0], groups, -1, t.shape[-1])


def _unfold(t: Tensor, heads: int) -> Tensor:
    return t.reshape(t.shape[0], heads, -1, t.shape[-1])


def additive(tile: Tile, like: Tensor) -> Tensor:
    """A tile's masks as one tensor (1, 1, queries, keys) of 0 and -inf."""
    rows = tile.rows
    pieces = [
        torch.ones(rows, width, dtype=torch.bool) if mask is None else mask
        for mask, width in zip(tile.masks, tile.widths, strict=True)
    ]
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    return torch.where(torch.cat(pieces, 1).to(like.device), zero, -torch.inf)[None, None]


def take(t: Tensor, tile: Tile, dim: int = 2) -> Tensor:
    """The tile's keys out of a part's."""
    runs = [t.narrow(dim, a, b - a) for a, b in tile.runs]
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim)


def give(total: Tensor, value: Tensor, runs: Sequence[tuple[int, int]], reached: int) -> int:
    """Add the value's rows to these runs of the total's, in place; what lies from `reached` on is empty yet.

    Returns:
        Where the total is empty now.
    """
    at = 0
    for a, b in runs:
        old, own = min(max(a, reached), b), value[:, :, at : at + b - a]
        if reached < a:
            total[:, :, reached:a] = 0
        if a < old:
            total[:, :, a:old] += own[:, :, : old - a]
        if old < b:
            total[:, :, old:b] = own[:, :, old - a :]
        reached, at = max(reached, b), at + b - a
    return reached
