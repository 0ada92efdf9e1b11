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
