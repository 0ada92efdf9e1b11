"""The last keys of every bucket: what attention within buckets remembers, constant in the context."""

from typing import NamedTuple

import torch
from torch import Tensor

from writehead.core.slots import Store
from writehead.ops.buckets import Runs, bucket_attention, runs


class Rings(NamedTuple):
    """For each round, key/value head and bucket a ring of `window` slots; M = buckets * window.

    Attributes:
        k, v: (B, R, G, M, D).
        pos: (B, R, G, M), -1 = empty.
        bucket: (B, R, G, M, R), the bucket of each key in every round.
        given: (B, R, G, buckets), how many keys each bucket was given so far.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    bucket: Tensor
    given: Tensor


class Asked(NamedTuple):
    """One call: queries and keys with their buckets in R rounds.

    Attributes:
        q: (B, T, H, D).
        k, v: (B, T, G, D).
        q_bucket, k_bucket: (B, T, H, R), (B, T, G, R).
        pos: (B, T), -1 = padding.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_bucket: Tensor
    k_bucket: Tensor
    pos: Tensor


def empty(
    batch: int,
    rounds: int,
    kv_heads: int,
    buckets: int,
    window: int,
    head_dim: int,
    store: Store,
    like: Tensor,
) -> Rings:
    """Rings without keys, in the type of `like` unless the store names another.

    Raises:
        ValueError: int8, which needs scales that rings do not have.
    """
    if store.dtype == torch.int8:
        raise ValueError("rings of buckets hold no int8; use a cache dtype of float32, bfloat16 or float16")
    slots = (batch, rounds, kv_heads, buckets * window)
    k, v = (like.new_zeros(*slots, head_dim, dtype=store.dtype or like.dtype) for _ in range(2))
    pos, bucket = (like.new_full(shape, -1, dtype=torch.int64) for shape in (slots, (*slots, rounds)))
    return Rings(k, v, pos, bucket, like.new_zeros(*slots[:3], buckets, dtype=torch.int64))


def ring_bytes(rounds: int, kv_heads: int, buckets: int, window: int, head_dim: int, itemsize: int) -> int:
    """Bytes of one row."""
    slot = 2 * head_dim * itemsize + 8 * (1 + rounds)
    return rounds * kv_heads * buckets * (window * slot + 8)


def read(asked: Asked, rings: Rings | None, window: int, scale: float, once: bool) -> tuple[Tensor, Tensor]:
    """What each query finds among the last `window` keys before it in its buckets.

    Args:
        asked: the new tokens; rings: the keys before them, or None.
        window: keys a bucket.
        scale: factor on the scores.
        once: count a key once, however many rounds find it.

    Returns:
        y (B, T, H, D) and lse (B, T, H).
    """
    q, k, v, q_bucket, k_bucket, pos = asked
    R = q_bucket.shape[-1]
    k_pos = pos[..., None].expand(-1, -1, k.shape[2])
    there = (k_pos >= 0)[:, None].expand(-1, R, -1, -1)
    if rings is not None:
        B, _, G, M, _ = rings.k.shape
        flat = (rings.k.to(k.dtype), rings.v.to(v.dtype), rings.bucket)
        old_k, old_v, old_bucket = (t.transpose(2, 3).reshape(B, R * M, G, -1) for t in flat)
        k, v = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)
        k_bucket = torch.cat([old_bucket, k_bucket.long()], 1)
        old = rings.pos.transpose(2, 3).reshape(B, R * M, G)
        k_pos = torch.cat([old, k_pos], 1)
        own = (
            torch.arange(R, device=pos.device).repeat_interleave(M)
            == torch.arange(R, device=pos.device)[:, None]
        )
        there = torch.cat([own[None, :, :, None].expand(B, -1, -1, G), there], 2)
    rounds: list[Runs] = []
    for r in range(R):
        rounds += runs(q_bucket[..., r], k_bucket[..., r], pos, k_pos, window, there=there[:, r])
    return bucket_attention(q, k, v, rounds, k_pos, window=window, scale=scale, once=once)


def write(asked: Asked, rings: Rings, window: int) -> Rings:
    """The rings after the new keys: of each bucket the last ones stay. Without autograd `rings` is
    consumed."""
    B, T, G, R = asked.k_bucket.shape
    N = rings.given.shape[-1]
    bucket = asked.k_bucket.permute(0, 3, 2, 1).long()  # (B, R, G, T)
    bucket = torch.where(asked.pos[:, None, None] >= 0, bucket, N)
    ordered, token = bucket.sort(stable=True, dim=-1)
    new = torch.zeros(B, R, G, N + 1, dtype=torch.int64, device=bucket.device)
    new.scatter_add_(-1, bucket, torch.ones_like(bucket))
    before = new.cumsum(-1) - new
    rank = torch.arange(T, device=bucket.device) - before.gather(-1, ordered)
    stays = (ordered < N) & (rank >= new.gather(-1, ordered) - window)
    b, r, g, at = stays.nonzero(as_tuple=True)
    home, token = ordered[b, r, g, at], token[b, r, g, at]
    slot = home * window + (rings.given[b, r, g, home] + rank[b, r, g, at]) % window
    index = (b, r, g, slot)
    return Rings(
        _put(rings.k, index, asked.k[b, token, g]),
        _put(rings.v, index, asked.v[b, token, g]),
        _put(rings.pos, index, asked.pos[b, token]),
        _put(rings.bucket, index, asked.k_bucket[b, token, g].long()),
        rings.given + new[..., :N],
    )


def step(asked: Asked, rings: Rings, window: int, scale: float, once: bool) -> tuple[Tensor, Tensor]:
    """`read` for one token, T = 1: only the rings of its own buckets are looked at."""
    q, (B, _, H, R), G = asked.q[:, 0], asked.q_bucket.shape, rings.k.shape[2]
    device = q.device
    row, turn = torch.arange(B, device=device)[:, None, None, None], torch.arange(R, device=device)[:, None]
    head = torch.arange(H, device=device)[:, None, None] // (H // G)
    slot = asked.q_bucket[:, 0].long()[..., None] * window + torch.arange(window, device=device)
    index = (row, turn, head, slot)  # (B, H, R, W)
    pos = rings.pos[index]
    hidden = (pos < 0) | (asked.pos[:, :, None, None] < 0)
    if once:
        mine = asked.q_bucket[:, 0]
        oldest = pos.masked_fill(pos < 0, torch.iinfo(torch.int64).max).amin(-1)  # (B, H, R)
        bucket = rings.bucket[index]
        for r in range(1, R):
            for s in range(r):
                again = (bucket[:, :, r, :, s] == mine[:, :, s, None]) & (
                    pos[:, :, r] >= oldest[:, :, s, None]
                )
                hidden[:, :, r] |= again
    k, v = rings.k[index].to(q.dtype), rings.v[index].to(q.dtype)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (
        (torch.einsum("bhd,bhrwd->bhrw", q, k).to(wide) * scale).masked_fill(hidden, -torch.inf).flatten(2)
    )
    lse = scores.logsumexp(-1)
    shares = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    y = torch.einsum("bhs,bhsd->bhd", shares.to(v.dtype), v.flatten(2, 3))
    return y[:, None], lse[:, None]


def _put(old: Tensor, index: tuple[Tensor, ...], new: Tensor) -> Tensor:
    """old with `new` at the index: in place unless autograd needs what was there."""
    new = new.to(old.dtype)
    if torch.is_grad_enabled() and (old.requires_grad or new.requires_grad):
        return old.index_put(index, new)
    old[index] = new
    return old
