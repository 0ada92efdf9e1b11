"""The best tokens so far of every cluster: clusters that pick their members, and never look ahead.

A token enters a cluster if it is among the `window` best that the cluster has seen, its own turn included,
and reads the members at that moment. So the outputs are those of clusters picked anew from every prefix, each
asked for its last token only; they depend on nothing later, and the members are all that need be remembered.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from writehead.core.replay import choose
from writehead.core.slots import Store

COMPARED = 1 << 22  # pairs of tokens of a cluster held at a time


class Heaps(NamedTuple):
    """For each head and cluster up to W members, in the order in which they came.

    Attributes:
        k, v: (B, H, N, W, D).
        score: (B, H, N, W), -inf = empty.
    """

    k: Tensor
    v: Tensor
    score: Tensor


class Turn(NamedTuple):
    """Who is where in one piece of a sequence, M = W members before and C tokens of the piece.

    Attributes:
        token: (B, H, N, P) the tokens that enter, as numbers of the piece; each cluster has up to P.
        reads: (B, H, N, P, M) what each reads, nothing for entries beyond a cluster's number.
        stays: (B, H, N, W) the members after the piece, numbers of the M.
        real: (B, H, N, W) are there so many?
    """

    token: Tensor
    reads: Tensor
    stays: Tensor
    real: Tensor


def empty(
    batch: int, heads: int, clusters: int, window: int, head_dim: int, store: Store, like: Tensor
) -> Heaps:
    """Heaps without members.

    Raises:
        ValueError: int8, which needs scales that heaps do not have.
    """
    if store.dtype == torch.int8:
        raise ValueError("clusters' members hold no int8; use a cache dtype of float32, bfloat16 or float16")
    shape = (batch, heads, clusters, window)
    k, v = (like.new_zeros(*shape, head_dim, dtype=store.dtype or like.dtype) for _ in range(2))
    return Heaps(k, v, like.new_full(shape, -torch.inf, dtype=_wide(like)))


def heap_bytes(heads: int, clusters: int, window: int, head_dim: int, itemsize: int, width: int) -> int:
    """Bytes of one row; `itemsize` of keys and values, `width` of a score."""
    return heads * clusters * window * (2 * head_dim * itemsize + width)


def take(
    q: Tensor, k: Tensor, v: Tensor, score: Tensor, heaps: Heaps, *, scale: float, spare: float = 1e-2
) -> tuple[Tensor, Heaps]:
    """Attention of new tokens within the clusters they enter, averaged over these, and the heaps after them.

    Args:
        q, k, v: (B, T, H, D).
        score: (B, T, H, N) of each token for each cluster, -inf = padding; without gradient.
        heaps: the members before them.
        scale: factor on the attention's scores.
        spare: added to the number of clusters before dividing by it.

    Returns:
        y (B, T, H, D), 0 for a token that enters no cluster.
    """
    B, T, H, N = score.shape
    step = _step(B * H * N, heaps.score.shape[-1])
    y = []
    q, k, v, score = (t.transpose(1, 2) for t in (q, k, v, score))
    for a in range(0, T, step):
        now = slice(a, a + step)
        part, heaps = _piece(q[:, :, now], k[:, :, now], v[:, :, now], score[:, :, now], heaps, scale, spare)
        y.append(part)
    return torch.cat(y, 2).transpose(1, 2) if y else v.transpose(1, 2), heaps


def _step(rows: int, window: int) -> int:
    """Tokens of a piece: few enough to compare each with each, enough to be worth it."""
    most = 8
    while most < 64 and rows * 2 * most * (window + 2 * most) <= COMPARED:
        most *= 2
    return most


def _piece(
    q: Tensor, k: Tensor, v: Tensor, score: Tensor, heaps: Heaps, scale: float, spare: float
) -> tuple[Tensor, Heaps]:
    """`take` for one piece, (B, H, C, ...)."""
    N = score.shape[-1]
    marks = score.detach().to(heaps.score.dtype).transpose(2, 3)  # (B, H, N, C)
    turn = choose(_turn, marks, heaps.score)
    keys, values = (
        torch.cat([old.to(new.dtype), new[:, :, None].expand(-1, -1, N, -1, -1)], 3)
        for old, new in ((heaps.k, k), (heaps.v, v))
    )
    marks = torch.cat([heaps.score, marks], 3)

    def of(t: Tensor, at: Tensor) -> Tensor:
        return t.gather(3, at[..., None].expand(*at.shape, t.shape[-1]))

    queries = of(q[:, :, None].expand(-1, -1, N, -1, -1), turn.token)
    scores = torch.einsum("bhnpd,bhnmd->bhnpm", queries, keys).to(_wide(q)) * scale
    some = turn.reads.any(-1, keepdim=True)
    shares = torch.softmax(scores.masked_fill(~turn.reads & some, -torch.inf), -1) * some
    found = torch.einsum("bhnpm,bhnmd->bhnpd", shares.to(v.dtype), values)
    at = turn.token.flatten(2)
    y = torch.zeros_like(v).scatter_add(2, at[..., None].expand(-1, -1, -1, v.shape[-1]), found.flatten(2, 3))
    count = v.new_zeros(v.shape[:3]).scatter_add(2, at, some[..., 0].flatten(2).to(v.dtype))
    after = Heaps(
        of(keys, turn.stays).to(heaps.k.dtype),
        of(values, turn.stays).to(heaps.v.dtype),
        marks.gather(3, turn.stays).masked_fill(~turn.real, -torch.inf),
    )
    return y / (count + spare)[..., None], after


def _turn(new: Tensor, old: Tensor) -> Turn:
    """Who enters, reads and stays; new (B, H, N, C) and old (B, H, N, W) scores; older ones win ties."""
    C, W = new.shape[-1], old.shape[-1]
    both = torch.cat([old, new], -1)
    there, order = both > -torch.inf, torch.arange(W + C, device=new.device)
    later = order[W:, None] >= order  # (C, M): the token has come when member m is asked for
    better = new[..., None] > both[..., None, :]
    better |= (new[..., None] == both[..., None, :]) & (order[W:, None] < order)
    before = (old[..., None] > both[..., None, :]) | (
        (old[..., None] == both[..., None, :]) & (order[:W, None] < order)
    )
    rank = before.sum(-2)[..., None, :] + better.cumsum(
        -2
    )  # (B, H, N, C, M) better ones when token c has come
    inside = (rank < W) & there[..., None, :] & later
    enters = inside[..., W:].diagonal(dim1=-2, dim2=-1)
    most = int(enters.sum(-1).max()) if C else 0
    token = (~enters).to(torch.int8).sort(dim=-1, stable=True).indices[..., :most]
    reads = (
        inside.gather(3, token[..., None].expand(*token.shape, W + C)) & enters.gather(3, token)[..., None]
    )
    last = inside[..., -1, :]
    stays = (~last).to(torch.int8).sort(dim=-1, stable=True).indices[..., :W]
    return Turn(token, reads, stays, last.gather(3, stays))


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
