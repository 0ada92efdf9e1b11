"""Causal Sinkhorn attention as loops over blocks and tokens, from Tay et al. 2020, arXiv:2002.11296, sections 3.1 to
3.3, with columns balanced over the rows so far and a last normalisation of the rows."""

import torch
from torch import Tensor


def weights(scores: Tensor, iterations: int) -> Tensor:
    """scores (N, M) of the blocks' rows -> weights over the blocks before each, row after row."""
    N = len(scores)
    logs = [[scores[n, m] for m in range(n)] for n in range(N)]
    for _ in range(iterations):
        for n in range(1, N):
            total = torch.logsumexp(torch.stack(logs[n]), 0)
            logs[n] = [entry - total for entry in logs[n]]
        logs = [
            [
                logs[n][m] - torch.logsumexp(torch.stack([logs[i][m] for i in range(m + 1, n + 1)]), 0)
                for m in range(n)
            ]
            for n in range(N)
        ]
    rows = [torch.softmax(torch.stack(row), 0) if row else scores.new_zeros(0) for row in logs]
    return torch.stack([torch.cat([row, row.new_zeros(N - len(row))]) for row in rows])


def attention(x, q, k, v, out, sort, window, iterations):
    """One row x (T, X); q (H, D, X), k and v (G, D, X); out (X, H D); sort: summary (X) -> scores (G, blocks)."""
    T, group, W = len(x), len(q) // len(k), window
    N = -(-T // W)
    scores = torch.stack([sort(x[: n * W + 1].mean(0)) for n in range(N)], 1)  # (G, N, blocks)
    P = [weights(rows, iterations) for rows in scores]
    y = []
    for t in range(T):
        n, heads = t // W, []
        for h in range(len(q)):
            g = h // group
            keys, vals = ([w @ x[s] for s in range(T)] for w in (k[g], v[g]))
            read = [(keys[s], vals[s]) for s in range(n * W, t + 1)]
            if n:
                read += [
                    tuple(sum(P[g][n, m] * part[m * W + o] for m in range(n)) for part in (keys, vals))
                    for o in range(W)
                ]
            shares = torch.softmax(
                torch.stack([(q[h] @ x[t]) @ key for key, _ in read]) / len(q[h]) ** 0.5, 0
            )
            heads.append(shares @ torch.stack([value for _, value in read]))
        y.append(out @ torch.cat(heads))
    return torch.stack(y)
