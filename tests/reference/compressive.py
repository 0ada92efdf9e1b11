"""The Compressive Transformer segment by segment, from the paper's equations alone.

Rae et al. 2019, arXiv:1911.05507, algorithm 1: after a segment, the oldest n_s of the memory are compressed
and join the compressed memory. Distances count slots, a compressed one being one step wide.
"""

import math
from collections.abc import Callable

import torch
from reference.transformer_xl import read
from torch import Tensor


def compressive(
    x: Tensor,
    weights: dict[str, Tensor],
    segment: int,
    memory: int,
    compressed: int,
    compress: Callable[[Tensor], Tensor],
) -> Tensor:
    """One row x (T, X) -> (T, X).

    weights: as `transformer_xl.read` takes them.
    compress: hidden states (n_s, X) that leave the memory -> (n_s / c, X); no gradient flows through it.
    """
    m: list[Tensor] = []
    cm: list[Tensor] = []
    outputs = []
    for begin in range(0, len(x), segment):
        current = list(x[begin : begin + segment])
        for i, query in enumerate(current):
            slots = cm + m + current[: i + 1]
            away = list(range(len(slots) - 1, -1, -1))
            outputs.append(read(query, slots, away, weights))
        m = m + current
        if len(m) > memory and len(current) == segment:
            evicted, m = m[: len(m) - memory], m[len(m) - memory :]
            cm = (cm + list(compress(torch.stack(evicted)).detach()))[-compressed:]
    return torch.stack(outputs)


def conv(weight: Tensor, bias: Tensor, ratio: int) -> Callable[[Tensor], Tensor]:
    """A convolution over time whose kernel and stride are `ratio`; weight (X, ratio, X)."""

    def run(x: Tensor) -> Tensor:
        groups = [x[i : i + ratio] for i in range(0, len(x), ratio)]
        return torch.stack([torch.einsum("ocx,cx->o", weight, group) + bias for group in groups])

    return run


def content(query: Tensor, slots: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """softmax(q.k / sqrt(D)) v of one query over slots (S, X), without positions: (H, D)."""
    H, D, _ = weights["q"].shape
    heads = []
    for h in range(H):
        g = h // (H // len(weights["k"]))
        q = weights["q"][h] @ query
        shares = torch.softmax(slots @ weights["k"][g].T @ q / math.sqrt(D), 0)
        heads.append(shares @ (slots @ weights["v"][g].T))
    return torch.stack(heads)


def reconstruction(
    x: Tensor, weights: dict[str, Tensor], segment: int, memory: int, compress: Callable[[Tensor], Tensor]
) -> Tensor:
    """Mean square difference of reading the segment that leaves next, as it is and compressed."""
    errors = []
    for t, query in enumerate(x):
        first = t // segment * segment - memory
        if first >= 0:
            leaving = x[first : first + segment]
            difference = content(query, leaving, weights) - content(query, compress(leaving), weights)
            errors.append(difference.square().mean())
    return torch.stack(errors).mean()
