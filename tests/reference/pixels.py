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


def inputs(image: list, levels: int, patch: tuple[int, int] | None) -> tuple[list[int], list[int]]:
    """What a model of a colour image reads, and what it must say, position by position.

    Args:
        image: bytes by row, column and channel.
        levels: L; tables hold L rows for each channel, and one for the beginning behind them.
        patch: rows and columns of the blocks in which positions run, a channel being a column.

    Returns:
        The row of the table that each position reads, and the level that it predicts.
    """
    height, width, channels = len(image), len(image[0]), len(image[0][0])
    said = []
    for row, column in order(height, width * channels, patch):
        channel = column % channels
        said.append((channel, image[row][column // channels][channel] * levels // 256))
    read = [channels * levels] + [channel * levels + level for channel, level in said[:-1]]
    return read, [level for _, level in said]
