"""LSH attention in its paper's form: chunks of the sorted sequence read themselves and the chunk before.

Rounds lie end to end on one circular axis, keys of other buckets inside the two chunks are read too, and a
key that several rounds find counts each time. Whom a token may read depends on how many tokens there are and
where the others fall, so this form serves training and scoring only.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from writehead.ops.attend import attend, merge


def look_back(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bucket: Tensor,
    pos: Tensor,
    *,
    buckets: int,
    chunk: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attention over two chunks of each round, all rounds merged.

    Args:
        q, k, v: (B, T, H, D); a sequence of at most one chunk is read whole.
        bucket: (B, T, H, R), below `buckets`.
        pos: (B, T), -1 = padding, which shares a bucket of its own.
        buckets: how many there are.
        chunk: tokens of a chunk.
        causal: read earlier tokens only. A token never reads itself.

    Returns:
        y (B, T, H, D) and lse (B, T, H), 0 and -inf where nothing is read. The scores are q . k.
    """
    B, T, H, R = bucket.shape
    if chunk >= T:
        return attend(q, k, v, mask=_visible(pos, pos, causal)[:, None], scale=1.0, exact=True)
    more = -T % chunk
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, more)).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    pos = F.pad(pos, (0, more), value=-1)[:, None].expand(B, H, -1).flatten(0, 1)
    bucket = F.pad(bucket, (0, 0, 0, 0, 0, more)).permute(0, 2, 3, 1).reshape(B * H, R, -1).long()
    bucket = torch.where(pos[:, None] >= 0, bucket, buckets)
    bucket = bucket + (buckets + 1) * torch.arange(R, device=bucket.device)[:, None]
    order = bucket.flatten(1).sort(stable=True, dim=1).indices
    token = order % (T + more)

    def chunks(t: Tensor) -> Tensor:
        at = token if t.dim() == 2 else token[..., None].expand(-1, -1, t.shape[-1])
        return t.gather(1, at).reshape(B * H, -1, chunk, *t.shape[2:])

    def two(t: Tensor) -> Tensor:
        return torch.cat([t.roll(1, 1), t], 2).flatten(0, 1)

    places = chunks(pos)
    mask = _visible(places.flatten(0, 1), two(places), causal)
    queries, keys, values = chunks(q).flatten(0, 1), two(chunks(k)), two(chunks(v))
    y, lse = attend(
        queries[:, :, None], keys[:, :, None], values[:, :, None], mask=mask[:, None], scale=1.0, exact=True
    )
    back = order.argsort(1)
    y = y.reshape(B * H, -1, v.shape[-1]).gather(1, back[..., None].expand(-1, -1, v.shape[-1]))
    lse = lse.reshape(B * H, -1).gather(1, back)
    parts = zip(y.unflatten(1, (R, -1)).unbind(1), lse.unflatten(1, (R, -1)).unbind(1), strict=True)
    y, lse = merge(list(parts))
    y, lse = (t.unflatten(0, (B, H)).transpose(1, 2)[:, :T] for t in (y, lse))
    return y, lse


def _visible(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """q (B, T), k (B, S) positions -> (B, T, S): may it be read?"""
    q, k = q[:, :, None], k[:, None]
    seen = (k < q if causal else k != q) & (k >= 0) & (q >= 0)
    assert isinstance(seen, Tensor)
    return seen
