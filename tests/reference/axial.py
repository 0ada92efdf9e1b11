"""The Axial Transformer's autoregressive decoders, from the paper alone: loops over pixels.

Ho et al. 2019 (arXiv:1912.12180, section 3.1): the outer decoder reads rows whole and columns from above, its
output moves down by a row, the inner decoder reads along the row.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Grid = list[list[Tensor]]  # a vector for each row and column of the image
Layer = tuple[Callable[[Tensor], Tensor], ...]  # norm, queries, keys, values, output, norm, feed-forward


def block(x: Grid, layer: Layer, heads: int, sees: Callable[[int, int, int, int], bool]) -> Grid:
    """One pre-norm layer; `sees(r, c, i, j)`: does pixel (r, c) read pixel (i, j)?"""
    norm, query, key, value, out, norm2, feed = layer
    out_grid: Grid = []
    for r, row in enumerate(x):
        out_grid.append([])
        for c, own in enumerate(row):
            read = [norm(x[i][j]) for i in range(len(x)) for j in range(len(x[i])) if sees(r, c, i, j)]
            pieces = []
            q = query(norm(own)).view(heads, -1)
            k = [key(one).view(heads, -1) for one in read]
            v = [value(one).view(heads, -1) for one in read]
            for h in range(heads):
                scores = torch.stack([(q[h] * one[h]).sum() / math.sqrt(q.shape[1]) for one in k])
                weights = (scores - scores.max()).exp()
                weights = weights / weights.sum()
                pieces.append(sum(w * one[h] for w, one in zip(weights, v, strict=True)))
            y = own + out(torch.cat(pieces))
            out_grid[r].append(y + feed(norm2(y)))
    return out_grid


def decoders(h: Grid, shifted: Grid, outer: list[Layer], inner: list[Layer], heads: int) -> Grid:
    """The embedded pixels `h` of all rows but the last, and the pixels moved on by one: the inner decoder's
    output for every pixel."""
    u = h
    for number, layer in enumerate(outer):
        if number % 2 == 0:
            u = block(u, layer, heads, lambda r, c, i, j: i == r)
        else:
            u = block(u, layer, heads, lambda r, c, i, j: j == c and i <= r)
    above = [[torch.zeros_like(one) for one in shifted[0]], *u]  # down by a row
    z = [[a + b for a, b in zip(x, y, strict=False)] for x, y in zip(shifted, above, strict=True)]
    for layer in inner:
        z = block(z, layer, heads, lambda r, c, i, j: i == r and j <= c)
    return z
