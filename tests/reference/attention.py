"""Softmax attention as loops over rows, heads, queries and keys, from the papers' equations alone.

Vaswani et al. 2017, arXiv:1706.03762, section 3.2; head sharing: Shazeer 2019, arXiv:1911.02150, and Ainslie
et al. 2023, arXiv:2305.13245: query head h of H reads key/value head h // (H / G).
"""

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D), k (B, S, G, D), v (B, S, G, E) -> y (B, T, H, E) and log-sum-exp (B, T, H).

    mask and bias are (B, H, T, S); causal: the last query reads all keys, each query before it one fewer.
    """
    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
    rows = []
    for b in range(B):
        for t in range(T):
            for h in range(H):
                g = h // (H // G)
                seen = [
                    s
                    for s in range(S)
                    if (mask is None or bool(mask[b, h, t, s])) and not (causal and s > S - T + t)
                ]
                if not seen:
                    rows.append((v.new_zeros(v.shape[-1]), v.new_tensor(-torch.inf)))
                    continue
                scores = [
                    scale * (q[b, t, h] * k[b, s, g]).sum() + (0 if bias is None else bias[b, h, t, s])
                    for s in seen
                ]
                top = max(float(score.detach()) for score in scores)
                shares = [torch.exp(score - top) for score in scores]
                total = sum(shares)
                y = sum(share / total * v[b, s, g] for share, s in zip(shares, seen, strict=True))
                rows.append((y, torch.log(total) + top))
    return (
        torch.stack([y for y, _ in rows]).reshape(B, T, H, -1),
        torch.stack([lse for _, lse in rows]).reshape(B, T, H),
    )
