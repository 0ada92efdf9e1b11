"""Multi-head, grouped and multi-query attention with a window, token by token, from the papers alone.

Shazeer 2019, arXiv:1911.02150: section 2.3 (incremental multi-head attention: a step appends a key and value
to the memory and reads it), section 3 (multi-query: one head of keys and values). The window counts the query
itself. Scores are scaled by D^-1/2 (Vaswani et al. 2017); the 2019 paper leaves that to the initialiser.
"""

import math

import torch
from torch import Tensor


def incremental(
    x: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    window: int | None = None,
    sinks: int = 0,
) -> Tensor:
    """One row x (T, X) -> (T, X).

    queries (H, D, X), keys and values (G, D, X), out (X, H * D): the weights of each head.
    """
    H, D, _ = queries.shape
    group = H // len(keys)
    memory: list[list[tuple[Tensor, Tensor]]] = [[] for _ in keys]
    outputs = []
    for t, token in enumerate(x):
        for g, head in enumerate(memory):
            head.append((keys[g] @ token, values[g] @ token))
        heads = []
        for h in range(H):
            q = queries[h] @ token
            seen = [
                pair
                for s, pair in enumerate(memory[h // group])
                if window is None or t - s < window or s < sinks
            ]
            weights = torch.softmax(torch.stack([(q * k).sum() / math.sqrt(D) for k, _ in seen]), 0)
            heads.append(sum(w * v for w, (_, v) in zip(weights, seen, strict=True)))
        outputs.append(out @ torch.cat(heads))
    return torch.stack(outputs)
