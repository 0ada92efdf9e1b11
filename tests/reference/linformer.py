"""Linformer from its equation (Wang et al. 2020, arXiv:2006.04768): one row, head by head."""

import math

import torch
from torch import Tensor


def linformer(x: Tensor, q: Tensor, k: Tensor, v: Tensor, e: Tensor, f: Tensor, out: Tensor) -> Tensor:
    """x (T, X) -> (T, X).

    q (H, D, X), k and v (G, D, X), e and f (G, R, N) with N >= T, out (X, H * D).
    """
    H, D, _ = q.shape
    T, heads = len(x), []
    for h in range(H):
        g = h // (H // len(k))
        keys, read = e[g][:, :T] @ (x @ k[g].T), f[g][:, :T] @ (x @ v[g].T)
        shares = torch.softmax(x @ q[h].T @ keys.T / math.sqrt(D), -1)
        heads.append(shares @ read)
    return torch.cat(heads, -1) @ out.T


def prefix(x: Tensor, q: Tensor, k: Tensor, v: Tensor, e: Tensor, f: Tensor, out: Tensor) -> Tensor:
    """The same of every token's past alone: row t of the Linformer of x up to t."""
    return torch.stack([linformer(x[: t + 1], q, k, v, e, f, out)[-1] for t in range(len(x))])
