"""Prefix sums of outer products, read by queries: `scan` without a denominator and without factors.

Luna and the prefix form of Linformer read one such sum, put a softmax over what they read and read a second
one with it, so nothing is divided by the sum of a token's features, which `scan` carries along.
"""

import torch
from torch import Tensor

PIECE = 64  # tokens whose products are made pair by pair


def prefix(q: Tensor, k: Tensor, v: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """q_t . (total + sum_{j <= t} k_j v_j^T) for every token of a call.

    Args:
        q: (B, T, G, H / G, D).
        k, v: (B, T, G, D) and (B, T, G, M); a token where either is 0 is not remembered.
        total: (B, G, D, M), the sum over earlier calls.

    Returns:
        The products (B, T, G, H / G, M), and the sum after the call.
    """
    pieces = []
    for qc, kc, vc in zip(q.split(PIECE, 1), k.split(PIECE, 1), v.split(PIECE, 1), strict=True):
        pairs = torch.einsum("btgxd,bsgd->bgxts", qc, kc).tril()
        near = torch.einsum("bgxts,bsgm->btgxm", pairs, vc)
        pieces.append(near + torch.einsum("btgxd,bgdm->btgxm", qc, total))
        total = total + torch.einsum("bsgd,bsgm->bgdm", kc, vc)
    return torch.cat(pieces, 1), total
