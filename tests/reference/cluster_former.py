"""Cluster-Former's attention as loops over windows, from Wang et al. 2020, arXiv:2009.06097."""

import torch
from torch import Tensor


def clustered(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    means: Tensor,
    window: int,
    stride: int,
    question: int,
) -> Tensor:
    """One row x (T, X); q, k, v (H, D, X), (G, D, X), (G, D, X); out (X, H D); means (C, X)."""
    T, (H, D, _), G = len(x), q.shape, len(k)
    rest = range(question, T)
    order = sorted(rest, key=lambda t: (int((means @ x[t]).argmax()), t))
    windows, start = [], 0
    while True:
        windows.append([*range(question), *order[start : start + window]])
        if start + window >= len(order):
            break
        start += stride
    found: list[list[Tensor]] = [[] for _ in range(T)]
    for held in windows:
        for t in held:
            heads = []
            for h in range(H):
                g = h // (H // G)
                scores = torch.stack([(q[h] @ x[t]) @ (k[g] @ x[s]) for s in held]) / D**0.5
                heads.append(torch.softmax(scores, 0) @ torch.stack([v[g] @ x[s] for s in held]))
            found[t].append(torch.cat(heads))
    return torch.stack([out @ torch.stack(parts).mean(0) for parts in found])
