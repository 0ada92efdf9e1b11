"""Luna from its equations (Ma et al. 2021, arXiv:2106.01540), tied keys and values, head by head.

Weights: q (H, D, X), c (G, D, X), pq and pc (G, D, X), slots (M, X), out (X, H * D).
"""

import math

import torch
from torch import Tensor


def causal(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """One row x (T, X) -> (T, X), token by token."""
    H, D, _ = w["q"].shape
    outputs = []
    for t, query in enumerate(x):
        heads = []
        for h in range(H):
            g = h // (H // len(w["c"]))
            keys = [w["c"][g] @ token for token in x[: t + 1]]
            slots = w["slots"] @ w["pq"][g].T
            packs = [
                torch.log2(1 + 2 ** (slots @ (w["pc"][g] @ token) / math.sqrt(D))) for token in x[: t + 1]
            ]
            q = w["q"][h] @ query / math.sqrt(D)
            u = torch.softmax(sum((q @ k) * a for k, a in zip(keys, packs, strict=True)) / (t + 1), 0)
            heads.append(sum((u @ a) * v for a, v in zip(packs, keys, strict=True)) / (t + 1))
        outputs.append(w["out"] @ torch.cat(heads))
    return torch.stack(outputs)


def bidirectional(x: Tensor, slots: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One row x (T, X) and slots (M, X) -> what the tokens read (T, X), and what the slots packed (M, G * D).

    A sequence of fewer tokens than slots uses as many slots as it has tokens.
    """
    H, D, _ = w["q"].shape
    packs = []
    for pq, pc in zip(w["pq"], w["pc"], strict=True):
        c = x @ pc.T
        packs.append(torch.softmax(slots @ pq.T @ c.T / math.sqrt(D), -1) @ c)
    packed = torch.cat(packs, -1)
    heads = []
    for h in range(H):
        c = packed[: len(x)] @ w["c"][h // (H // len(w["c"]))].T
        heads.append(torch.softmax(x @ w["q"][h].T @ c.T / math.sqrt(D), -1) @ c)
    return torch.cat(heads, -1) @ w["out"].T, packed
