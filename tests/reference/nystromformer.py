"""Nystrom attention from its equations (Xiong et al. 2021, arXiv:2102.03902): one row, head by head."""

from itertools import pairwise

import torch
from torch import Tensor


def bounds(n: int, m: int) -> list[int]:
    """Where m segments of n tokens begin and end: the first n mod m have one token more."""
    sizes = [n // m + (i < n % m) for i in range(m)]
    return [sum(sizes[:i]) for i in range(m + 1)]


def pinv(a: Tensor, iterations: int) -> Tensor:
    z = a.T / (a.sum(0).max() * a.sum(1).max())
    eye = torch.eye(len(a), dtype=a.dtype)
    for _ in range(iterations):
        z = 0.25 * z @ (13 * eye - a @ z @ (15 * eye - a @ z @ (7 * eye - a @ z)))
    return z


def nystrom(q: Tensor, k: Tensor, v: Tensor, m: int, iterations: int, kernel: Tensor | None) -> Tensor:
    """One head q, k, v (n, D) -> (n, D); kernel (K,) of the convolution over time."""
    n, D = q.shape
    q, k = q / D**0.25, k / D**0.25
    if n <= m:
        y = torch.softmax(q @ k.T, -1) @ v
    else:
        cut = bounds(n, m)
        q_mean, k_mean = (torch.stack([t[a:b].mean(0) for a, b in pairwise(cut)]) for t in (q, k))
        rows, a = torch.softmax(q @ k_mean.T, -1), torch.softmax(q_mean @ k_mean.T, -1)
        y = rows @ pinv(a, iterations) @ torch.softmax(q_mean @ k.T, -1) @ v
    if kernel is None:
        return y
    half = len(kernel) // 2
    smooth = []
    for t in range(n):
        near = [(i, t + i - half) for i in range(len(kernel)) if 0 <= t + i - half < n]
        smooth.append(sum(kernel[i] * v[j] for i, j in near))
    return y + torch.stack(smooth)
