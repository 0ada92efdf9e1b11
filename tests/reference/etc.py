"""ETC from its equations (Ainslie et al. 2020, arXiv:2004.08483): one row, pair by pair."""

import math

import torch
from torch import Tensor


def label(i: int, j: int, clip: int) -> int:
    """The label of a distance: 0 = itself, 1 .. clip behind it, clip + 1 .. 2 clip before it."""
    return min(j - i, clip) if j >= i else clip + min(i - j, clip)


def etc(
    x: Tensor, long: dict, first: dict, g: int, radius: int, clip: int, owner: list, hard: bool
) -> Tensor:
    """x (N, X), the first g tokens global -> (N, X).

    `long` and `first` hold q (H, D, X), k, v (G, D, X), qb (H, D), kb, vb (G, D), out (X, H D), ob (X), and
    vectors (H, labels, D), biases (H, labels), and lk, lv (G, D, X), lkb, lvb (G, D): keys and values for
    readers of the other kind; owner[j] is the global token of long token j (from 0), -1 none.
    """
    H, D, _ = long["q"].shape
    ys = []
    for i in range(len(x)):
        mine = first if i < g else long
        heads = []
        for h in range(H):
            G = len(long["k"])
            kv = h // (H // G)
            q = mine["q"][h] @ x[i] + mine["qb"][h]
            scores, read = [], []
            for j in range(len(x)):
                theirs = first if j < g else long
                if i >= g and j >= g and abs(i - j) > radius:
                    continue
                same = (i < g) == (j < g)
                if same:
                    r = label(i, j, clip)
                else:
                    a, b = (i, j - g) if i < g else (j, i - g)
                    r = 2 * clip + 1 + (owner[b] == a)
                    if hard and i < g and i > 0 and owner[b] != a:
                        continue
                lent = "" if same else "l"
                k = theirs[f"{lent}k"][kv] @ x[j] + theirs[f"{lent}kb"][kv]
                score = q @ k + q @ mine["vectors"][h, r] + mine["biases"][h, r]
                scores.append(score / math.sqrt(D))
                read.append(theirs[f"{lent}v"][kv] @ x[j] + theirs[f"{lent}vb"][kv])
            heads.append(torch.softmax(torch.stack(scores), 0) @ torch.stack(read))
        ys.append(mine["out"] @ torch.cat(heads) + mine["ob"])
    return torch.stack(ys)
