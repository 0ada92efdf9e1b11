"""Most-used compression, query by query (Rae et al. 2019, arXiv:1911.05507): each token that leaves the memory
has gathered the attention it received, averaged over heads; the most read ones stay, in their order.
"""

import math

import torch
from reference.transformer_xl import sinusoid
from torch import Tensor


def most_used(
    x: Tensor, w: dict[str, Tensor], segment: int, memory: int, compressed: int, ratio: int
) -> Tensor:
    """One row x (T, X) -> (T, X).

    w: q (H, D, X), k and v (G, D, X), r (G, D, X), u and w (H, D), out (X, H * D).
    """
    H, D, X = w["q"].shape
    received = [0.0] * len(x)
    near: list[int] = []
    kept: list[int] = []
    outputs = []
    for t, query in enumerate(x):
        if t % segment == 0 and t:
            near, leaving = near[-memory:] if memory else [], near[: max(0, len(near) - memory)]
            stay = sorted(leaving, key=lambda j: -received[j])[: len(leaving) // ratio]
            kept = (kept + sorted(stay))[-compressed:]
        near = [*near, t]
        slots = [x[j].detach() for j in kept] + [x[j] for j in near]
        heads = []
        for h in range(H):
            g, q, scores = h // (H // len(w["k"])), w["q"][h] @ query, []
            for i, slot in enumerate(slots):
                place = w["r"][g] @ sinusoid(len(slots) - 1 - i, X, query)
                content = (q + w["u"][h]) @ (w["k"][g] @ slot)
                scores.append((content + (q + w["w"][h]) @ place) / math.sqrt(D))
            shares = torch.softmax(torch.stack(scores), 0)
            for j, share in zip(near, shares[len(kept) :], strict=True):
                received[j] += float(share.detach()) / H
            heads.append(sum(p * (w["v"][g] @ slot) for p, slot in zip(shares, slots, strict=True)))
        outputs.append(w["out"] @ torch.cat(heads))
    return torch.stack(outputs)
