"""Attention within buckets as loops over rows, tokens, heads and rounds.

Kitaev et al. 2020, arXiv:2001.04451, section 3, in the form whose prefixes are consistent: query i reads, in each
round, the last `window` keys before it in its bucket; both sides: also the first `window` after it.
"""

import torch
from torch import Tensor


def found(q_bucket, k_bucket, q_pos, k_pos, window, both_sides=False) -> list[int]:
    """Which of the keys (lists of buckets and positions, position -1 = none) one query reads in one round."""
    mine = sorted(
        (p, s) for s, (p, b) in enumerate(zip(k_pos, k_bucket, strict=True)) if p >= 0 and b == q_bucket
    )
    before = [s for p, s in mine if p < q_pos][-window:]
    after = [s for p, s in mine if p > q_pos][:window]
    return before + after if both_sides else before


def bucket_attention(q, k, v, q_buckets, k_buckets, q_pos, k_pos, window, scale, once, both_sides=False):
    """q (B, T, H, D), k and v (B, S, G, D); buckets: for each round (B, T, H) and (B, S, G); positions (B, T) and
    (B, S) -> y (B, T, H, D), lse (B, T, H)."""
    (B, T, H, _), G = q.shape, k.shape[2]
    ys, lses = [], []
    for b in range(B):
        for t in range(T):
            for h in range(H):
                g, keys = h // (H // G), []
                for mine, theirs in zip(q_buckets, k_buckets, strict=True):
                    if q_pos[b, t] >= 0:
                        keys += found(
                            int(mine[b, t, h]), theirs[b, :, g].tolist(), int(q_pos[b, t]), k_pos[b].tolist(),
                            window, both_sides,
                        )  # fmt: skip
                keys = sorted(set(keys)) if once else keys
                if not keys:
                    ys.append(v.new_zeros(v.shape[-1]))
                    lses.append(v.new_tensor(-torch.inf))
                    continue
                scores = torch.stack([scale * (q[b, t, h] * k[b, s, g]).sum() for s in keys])
                ys.append(torch.softmax(scores, 0) @ torch.stack([v[b, s, g] for s in keys]))
                lses.append(torch.logsumexp(scores, 0))
    return torch.stack(ys).view(B, T, H, -1), torch.stack(lses).view(B, T, H)


def lsh(x: Tensor, qk: Tensor, v: Tensor, out: Tensor, rotations: Tensor, window: int, once: bool) -> Tensor:
    """One row of shared-QK attention, token by token: x (T, X); qk, v (H, D, X); out (X, H D);
    rotations (H, D, R, half the buckets)."""
    (H, D, _), T, R = qk.shape, len(x), rotations.shape[2]
    queries = [[qk[h] @ token for token in x] for h in range(H)]
    y = []
    for t in range(T):
        heads = []
        for h in range(H):
            keys = []
            for r in range(R):
                turned = [query @ rotations[h, :, r] for query in queries[h][: t + 1]]
                bucket = [int(torch.cat([p, -p]).argmax()) for p in turned]
                keys += found(bucket[t], bucket[:t], t, list(range(t)), window)
            keys = (sorted(set(keys)) if once else keys) or [t]
            k = torch.stack([queries[h][s] for s in keys])
            length = (k.square().mean(1) + 1e-6).sqrt() * D**0.5
            scores = (k @ queries[h][t]) / length
            heads.append(torch.softmax(scores, 0) @ torch.stack([v[h] @ x[s] for s in keys]))
        y.append(out @ torch.cat(heads))
    return torch.stack(y)
