"""Fixed patterns as sets of positions, and attention over sets, from the papers alone: plain loops.

Child et al. 2019 (arXiv:1904.10509, section 4.2), Qiu et al. 2019 (1911.02972, section 3), Parmar et al. 2018
(1802.05751, section 3.2), Beltagy et al. 2020 (2004.05150, section 3.1), Zaheer et al. 2020 (2007.14062,
section 2 and appendix D), Ainslie et al. 2020 (2004.08483, section 3).
"""

import math

import torch
from torch import Tensor


def strided(i: int, stride: int) -> tuple[set[int], set[int]]:
    """The window and the stride of query i."""
    near = {j for j in range(i + 1) if i - j < stride}
    return near, {j for j in range(i + 1) if (i - j) % stride == 0}


def fixed(i: int, stride: int, columns: int, part: int = 0) -> tuple[set[int], set[int]]:
    """The block and the summary columns of query i."""
    last = stride - columns * part
    near = {j for j in range(i + 1) if j // stride == i // stride}
    return near, {j for j in range(i + 1) if last - columns <= j % stride < last}


def block_bert(i: int, length: int, blocks: int, shift: int) -> set[int]:
    """The keys of query i in a sequence cut into `blocks`."""
    size = math.ceil(length / blocks)
    return {j for j in range(length) if j // size == (i // size + shift) % blocks}


def image_1d(i: int, block: int, memory: int) -> set[int]:
    return {j for j in range(i + 1) if j >= i // block * block - memory}


def image_2d(height: int, width: int, block: tuple[int, int], margin: tuple[int, int]) -> list[set[int]]:
    """For each pixel in the order of generation, the places in that order that it reads."""
    (rows, columns), (above, beside) = block, margin
    order = [
        (r, c)
        for top in range(0, height, rows)
        for left in range(0, width, columns)
        for r in range(top, top + rows)
        for c in range(left, left + columns)
    ]
    place = {pixel: n for n, pixel in enumerate(order)}
    sets = []
    for n, (row, column) in enumerate(order):
        top, left = row - row % rows, column - column % columns
        seen = {place[r, c] for r in range(top, top + rows) for c in range(left, left + columns)}
        seen = {m for m in seen if m <= n}
        for r in range(max(0, top - above), top):
            seen |= {place[r, c] for c in range(max(0, left - beside), min(width, left + columns + beside))}
        for r in range(top, top + rows):
            seen |= {place[r, c] for c in range(max(0, left - beside), left)}
        sets.append(seen)
    return sets


def longformer(i: int, length: int, window: int, dilation: int, marked: set[int]) -> set[int]:
    """The keys of a query that is not global."""
    near = {i + dilation * step for step in range(-(window // 2), window // 2 + 1)}
    return {j for j in near if 0 <= j < length} | marked


def big_bird(i: int, length: int, block: int, random: dict[int, list[int]]) -> set[int]:
    """The keys of query i; `random` has the random blocks of each block row."""
    blocks = math.ceil(length / block)
    a = i // block
    read = (
        set(range(blocks)) if a in (0, blocks - 1) else {0, a - 1, a, a + 1, blocks - 1, *random.get(a, [])}
    )
    return {j for j in range(length) if j // block in read}


def attention(q: Tensor, k: Tensor, v: Tensor, sets: list[set[int]]) -> Tensor:
    """One head: q (T, D), k and v (S, D) -> (T, D); a query that reads nothing gives 0."""
    rows = []
    for i, seen in enumerate(sets):
        keys = sorted(seen)
        if not keys:
            rows.append(torch.zeros_like(v[0]))
            continue
        logits = torch.stack([(q[i] * k[j]).sum() / math.sqrt(q.shape[1]) for j in keys])
        weights = torch.exp(logits - logits.max())
        weights = weights / weights.sum()
        rows.append(sum(w * v[j] for w, j in zip(weights, keys, strict=True)))
    return torch.stack(rows)


def layer(x: Tensor, weights: tuple[Tensor, ...], sets: list[list[set[int]]]) -> Tensor:
    """x (T, X) -> (T, X); weights as queries (H, D, X), keys and values (G, D, X), output (X, H D); the sets
    of each query head."""
    queries, keys, values, out = weights
    group = len(queries) // len(keys)
    heads = [
        attention(x @ w.T, x @ keys[h // group].T, x @ values[h // group].T, sets[h])
        for h, w in enumerate(queries)
    ]
    return torch.cat(heads, 1) @ out.T
