"""Orders and distributions of pixel models, from the papers alone: plain loops.

Parmar et al. 2018 (arXiv:1802.05751, section 3.2), Salimans et al. 2017 (1701.05517, section 2.1).
"""

import math


def order(height: int, width: int, patch: tuple[int, int] | None) -> list[tuple[int, int]]:
    """The places (row, column) of an image in the order of generation."""
    rows, columns = patch or (1, width)
    return [
        (r, c)
        for top in range(0, height, rows)
        for left in range(0, width, columns)
        for r in range(top, top + rows)
        for c in range(left, left + columns)
    ]


def mixture(logits: list[float], means: list[float], scales: list[float], level: int, levels: int) -> float:
    """The probability of a level, by differences of the cumulative function; scales are logarithms."""
    total = sum(math.exp(a) for a in logits)
    step = 2 / (levels - 1)

    def below(edge: float, mean: float, scale: float) -> float:
        return 1 / (1 + math.exp(-(edge - mean) / math.exp(scale)))

    found, value = 0.0, -1 + level * step
    for a, mean, scale in zip(logits, means, scales, strict=True):
        high = 1.0 if level == levels - 1 else below(value + step / 2, mean, scale)
        low = 0.0 if level == 0 else below(value - step / 2, mean, scale)
        found += math.exp(a) / total * (high - low)
    return found
