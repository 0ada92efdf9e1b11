"""Routed heads as loops over tokens, from Roy et al. 2020, arXiv:2003.05997, with clusters chosen by tokens."""

import torch
from torch import Tensor


def normalised(x: Tensor) -> Tensor:
    """A layer norm without weights."""
    away = x - x.mean()
    return away / (away.square().mean() + 1e-6).sqrt()


def routed(x: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, means: Tensor, window: int) -> Tensor:
    """One row x (T, X); q (H, D, X), k and v (G, D, X); out (X, H D); means (G, N, D)."""
    y, group = [], len(q) // len(k)
    for t in range(len(x)):
        heads = []
        for h in range(len(q)):
            g = h // group
            query = normalised(q[h] @ x[t])
            keys = [normalised(k[g] @ token) for token in x[: t + 1]]
            mine = int((means[g] @ query).argmax())
            found = [s for s in range(t) if int((means[g] @ keys[s]).argmax()) == mine][-window:]
            found.append(t)
            scores = torch.stack([query @ keys[s] for s in found])
            heads.append(torch.softmax(scores, 0) @ torch.stack([v[g] @ x[s] for s in found]))
        y.append(out @ torch.cat(heads))
    return torch.stack(y)


def picked(
    x: Tensor, q: Tensor, v: Tensor, out: Tensor, means: Tensor, window: int, spare: float = 1e-2
) -> Tensor:
    """Every token reads the clusters that would pick it, were it the last: the authors' decoder, token by token.

    One row x (T, X); q and v (H, D, X); out (X, H D); means (H, N, D).
    """
    y = []
    for t in range(len(x)):
        heads = []
        for h in range(len(q)):
            keys = [normalised(q[h] @ token) for token in x[: t + 1]]
            total, count = torch.zeros_like(keys[0]), 0
            for centroid in means[h]:
                order = sorted(range(t + 1), key=lambda s, c=centroid, k=keys: -float((c @ k[s]).detach()))[
                    :window
                ]
                if t in order:
                    scores = torch.stack([keys[t] @ keys[s] for s in order])
                    total = total + torch.softmax(scores, 0) @ torch.stack([v[h] @ x[s] for s in order])
                    count += 1
            heads.append(total / (count + spare))
        y.append(out @ torch.cat(heads))
    return torch.stack(y)
