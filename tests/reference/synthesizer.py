"""The Synthesizer from its equations (Tay et al. 2020, arXiv:2005.00743): one row, head by head."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def dense(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """x (T, X) -> (T, N): two layers of one head."""
    return torch.stack([w2 @ torch.relu(w1 @ token + b1) + b2 for token in x])


def outer(a: Tensor, c: Tensor) -> Tensor:
    """a (T, n), c (T, m) -> (T, n m): entry p m + q is a_p c_q."""
    rows = []
    for first, second in zip(a, c, strict=True):
        rows.append(torch.stack([one * other for one in first for other in second]))
    return torch.stack(rows)


def synthesize(
    x: Tensor, v: Tensor, out: Tensor, members: Sequence[Any], mix: Tensor, causal: bool
) -> Tensor:
    """x (T, X) -> (T, X).

    v (G, D, X), out (X, H * D); members: for each the list over heads of scores (T, N or more than T).
    """
    T, H, heads = len(x), len(members[0]), []
    for h in range(H):
        g = h // (H // len(v))
        scores = sum(share * member[h][:T, :T] for share, member in zip(mix, members, strict=True))
        read = x @ v[g].T
        rows = []
        for t in range(T):
            last = t + 1 if causal else T
            rows.append(torch.softmax(scores[t, :last], 0) @ read[:last])
        heads.append(torch.stack(rows))
    return torch.cat(heads, -1) @ out.T
