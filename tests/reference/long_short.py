"""Long-Short attention query by query, from the paper's equations alone (Zhu et al. 2021, arXiv:2107.02192).

Norms are over the width of one head; weights: q (H, D, X), k and v (G, D, X), share (G, R, X) and its bias
(G, R), near and far (weight, bias) of the two norms, out (X, H * D), and for the causal form r and r_far
(G, D, X), u and w (H, D).
"""

import math
from typing import Any

import torch
from reference.transformer_xl import sinusoid
from torch import Tensor


def norm(x: Tensor, weight_bias: tuple[Tensor, Tensor]) -> Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt(centred.square().mean() + 1e-5) * weight_bias[0] + weight_bias[1]


def summaries(
    tokens: Tensor, g: int, weights: dict[str, Any], normed: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """tokens (C, X) -> R normalised keys and values of head g; `normed`: of tokens normalised one by one."""
    found = []
    for row, bias in zip(weights["share"][g], weights["share_bias"][g], strict=True):
        shares = torch.softmax(tokens @ row + bias, 0)
        k, v = (tokens @ weights[name][g].T for name in ("k", "v"))
        if normed:
            k, v = (torch.stack([norm(one, weights["near"]) for one in t]) for t in (k, v))
        k, v = shares @ k, shares @ v
        found.append((norm(k, weights["far"]), norm(v, weights["far"])))
    return found


def causal(x: Tensor, weights: dict[str, Any], window: int, chunk: int) -> Tensor:
    """One row x (T, X) -> (T, X)."""
    H, D, X = weights["q"].shape
    outputs = []
    for i, query in enumerate(x):
        heads = []
        for h in range(H):
            g = h // (H // len(weights["k"]))
            q = weights["q"][h] @ query / math.sqrt(D)
            scores, read = [], []
            far = [
                pair
                for begin in range(0, i // chunk * chunk, chunk)
                for pair in summaries(x[begin : begin + chunk], g, weights)
            ]
            for number, (k, v) in enumerate(far):
                place = weights["r_far"][g] @ sinusoid(len(far) - number, X, x)
                scores.append(q @ (k + place))
                read.append(v)
            for j in range(max(0, i - window + 1), i + 1):
                k, v = (norm(weights[name][g] @ x[j], weights["near"]) for name in ("k", "v"))
                place = weights["r"][g] @ sinusoid(i - j, X, x)
                scores.append((q + weights["u"][h]) @ k + (q + weights["w"][h]) @ place)
                read.append(v)
            heads.append(torch.softmax(torch.stack(scores), 0) @ torch.stack(read))
        outputs.append(weights["out"] @ torch.cat(heads))
    return torch.stack(outputs)


def bidirectional(x: Tensor, weights: dict[str, Any], window: int) -> Tensor:
    """One row x (T, X) -> (T, X): blocks of `window` with half a block, at least one key, on each side."""
    H, D, _ = weights["q"].shape
    outputs, side = [], max(window // 2, 1)
    for i, query in enumerate(x):
        begin = i // window * window
        heads = []
        for h in range(H):
            g = h // (H // len(weights["k"]))
            pairs = summaries(x, g, weights, normed=True)
            for j in range(max(0, begin - side), min(len(x), begin + window + side)):
                k, v = (norm(weights[name][g] @ x[j], weights["near"]) for name in ("k", "v"))
                pairs.append((k, v))
            q = weights["q"][h] @ query / math.sqrt(D)
            shares = torch.softmax(torch.stack([q @ k for k, _ in pairs]), 0)
            heads.append(shares @ torch.stack([v for _, v in pairs]))
        outputs.append(weights["out"] @ torch.cat(heads))
    return torch.stack(outputs)
