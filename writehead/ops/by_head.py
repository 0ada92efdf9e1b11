"""Chunks of a call with its heads first, so that products are one batched product over key/value heads.

The rows of a key/value head G of row B are its X = H / G queries, each of C tokens: (B * G, X * C, M).
"""

import torch
from torch import Tensor


def queries(t: Tensor, kv_heads: int, a: int, b: int) -> Tensor:
    """Tokens a to b of (B, T, H, M) as the rows of each key/value head: (B * G, X * C, M)."""
    rows: Tensor = t[:, a:b].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    return rows.reshape(t.shape[0] * kv_heads, -1, t.shape[-1])


def lay(out: Tensor, rows: Tensor, kv_heads: int, a: int, b: int) -> None:
    """Put rows (B * G, X * C, M) back, as tokens a to b of (B, T, H, M); X is 1 for H = G."""
    B, _, H, M = out.shape
    place = out[:, a:b].view(B, b - a, kv_heads, H // kv_heads, M)
    place.copy_(rows.view(B, kv_heads, H // kv_heads, b - a, M).permute(0, 3, 1, 2, 4))


def heads(t: Tensor, a: int, b: int) -> Tensor:
    """Tokens a to b of (B, T, G, M), heads first: (B * G, C, M)."""
    return t[:, a:b].transpose(1, 2).reshape(-1, b - a, t.shape[-1])


def scores(rows: Tensor, columns: Tensor, pairs: Tensor) -> Tensor:
    """Products of (B * G, X * C, M) and (B * G, C, M), weighted by pairs (C, C) or (B * G, C, C):
    (B * G, X * C, C)."""
    found = torch.bmm(rows, columns.transpose(1, 2))
    C = columns.shape[1]
    found.view(len(found), -1, C, C).mul_(pairs if pairs.dim() == 2 else pairs[:, None])
    return found
