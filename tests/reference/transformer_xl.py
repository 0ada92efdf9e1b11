"""Transformer-XL segment by segment, query by query, from the paper's equations alone.

Dai et al. 2019, arXiv:1901.02860, section 3.3: the memory is the last M hidden states that entered the layer;
score(i, j) = ((q_i + u).k_j + (q_i + v).W_R R_(i-j)) / sqrt(D) over the memory and the segment up to i.
"""

import math

import torch
from torch import Tensor


def sinusoid(distance: int, width: int, like: Tensor) -> Tensor:
    """All sines, then all cosines."""
    rates = [10000 ** (-2 * i / width) for i in range(width // 2)]
    waves = [math.sin(distance * r) for r in rates] + [math.cos(distance * r) for r in rates]
    return like.new_tensor(waves)


def read(
    query: Tensor, slots: list[Tensor], away: list[int], weights: dict[str, Tensor], clamp: int | None = None
) -> Tensor:
    """One query x_i (X,) against hidden states `slots`, each so many places away -> (X,).

    weights: q (H, D, X), k and v (G, D, X), r (G, D, X), u and w (H, D), out (X, H * D).
    """
    H, D, X = weights["q"].shape
    heads = []
    for h in range(H):
        g = h // (H // len(weights["k"]))
        q = weights["q"][h] @ query
        scores = []
        for x, t in zip(slots, away, strict=True):
            place = weights["r"][g] @ sinusoid(t if clamp is None else min(t, clamp), X, query)
            content = (q + weights["u"][h]) @ (weights["k"][g] @ x)
            scores.append((content + (q + weights["w"][h]) @ place) / math.sqrt(D))
        shares = torch.softmax(torch.stack(scores), 0)
        heads.append(sum(p * (weights["v"][g] @ x) for p, x in zip(shares, slots, strict=True)))
    return weights["out"] @ torch.cat(heads)


def segments(
    x: Tensor, weights: dict[str, Tensor], segment: int, memory: int, clamp: int | None = None
) -> Tensor:
    """One row x (T, X) -> (T, X); gradients are not stopped between segments."""
    kept: list[Tensor] = []
    outputs = []
    for begin in range(0, len(x), segment):
        current = list(x[begin : begin + segment])
        for i, query in enumerate(current):
            slots = kept + current[: i + 1]
            away = list(range(len(slots) - 1, -1, -1))
            outputs.append(read(query, slots, away, weights, clamp))
        kept = (kept + current)[-memory:] if memory else []
    return torch.stack(outputs)


def sliding(x: Tensor, weights: dict[str, Tensor], memory: int, clamp: int | None = None) -> Tensor:
    """One row x (T, X) -> (T, X): every query reads the last `memory` tokens, its own among them."""
    outputs = []
    for t, query in enumerate(x):
        slots = list(x[max(0, t - memory + 1) : t + 1])
        outputs.append(read(query, slots, list(range(len(slots) - 1, -1, -1)), weights, clamp))
    return torch.stack(outputs)
