"""Causal attention through features as a recurrence, token by token, from the papers' equations alone.

Katharopoulos et al. 2020, arXiv:2006.16236, equations 16 to 20 (the recurrent form); Choromanski et al. 2020,
arXiv:2009.14794, section 2; Peng et al. 2021, arXiv:2103.02143, equations 5 and 7 (the gate). Query head h of
H reads the sums of key/value head h // (H / G).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, denominator: Callable[[Tensor], Tensor], forget: Tensor | None = None
) -> Tensor:
    """One row: features q (T, H, M) and k (T, G, M), values v (T, G, E) -> (T, H, E).

    With gates forget (T, G): S = f S + (1 - f) k v^T, and z alike.
    """
    (T, H, M), (G, E) = q.shape, v.shape[1:]
    S = [v.new_zeros(M, E) for _ in range(G)]
    z = [v.new_zeros(M) for _ in range(G)]
    rows = []
    for t in range(T):
        for g in range(G):
            keep, add = (1, 1) if forget is None else (forget[t, g], 1 - forget[t, g])
            S[g] = keep * S[g] + add * torch.outer(k[t, g], v[t, g])
            z[g] = keep * z[g] + add * k[t, g]
        heads = [(h, h // (H // G)) for h in range(H)]
        rows.append(torch.stack([q[t, h] @ S[g] / denominator(q[t, h] @ z[g]) for h, g in heads]))
    return torch.stack(rows)


def bidirectional(q: Tensor, k: Tensor, v: Tensor, denominator: Callable[[Tensor], Tensor]) -> Tensor:
    """The same when every token reads every other: explicit weights, normalised row by row."""
    (T, H, _), G = q.shape, v.shape[1]
    rows = []
    for t in range(T):
        heads = []
        for h in range(H):
            g = h // (H // G)
            weights = [q[t, h] @ k[s, g] for s in range(T)]
            top = sum(w * v[s, g] for s, w in enumerate(weights))
            heads.append(top / denominator(sum(weights)))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def elu_plus_one(x: Tensor) -> Tensor:
    """The Linear Transformer's feature map."""
    return torch.where(x > 0, x + 1, torch.exp(torch.clamp(x, max=0)))


def project(x: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, X), queries (H, D, X), keys and values (G, D, X) -> (T, H, D), (T, G, D), (T, G, D)."""
    return tuple(
        torch.stack([torch.stack([w @ token for w in heads]) for token in x])
        for heads in (queries, keys, values)
    )
