"""In which order samples are read: a pure function of the step, so a run resumes, and shards, anywhere."""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Words: TypeAlias = NDArray[np.uint64]
Shares: TypeAlias = NDArray[np.float64]
ROUNDS = 6


def mix(*values: int) -> int:
    """A 64-bit hash of whole numbers, the same on every machine."""
    state = np.zeros(1, np.uint64)
    for value in values:
        state = _splitmix(state ^ np.array([value % 2**64], np.uint64))
    return int(state[0])


def shuffled(index: Ints, count: int, key: int) -> Ints:
    """Where a permutation of 0 ... count - 1 takes each index: a Feistel network, which needs no memory.

    Args:
        index: numbers below `count`.
        count: size of the permutation.
        key: which permutation.
    """
    half = np.uint64(max(1, (int(count - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(mix(key, r)) for r in range(ROUNDS)]
    value = index.astype(np.uint64)
    outside = np.ones(len(value), bool)
    while outside.any():  # numbers beyond the count walk on until they are within
        left, right = value[outside] >> half, value[outside] & low
        for k in keys:
            left, right = right, left ^ (_splitmix(right ^ k) & low)
        value[outside] = (left << half) | right
        outside = value >= count
    return value.astype(np.int64)


def uniform(key: int, count: int) -> Shares:
    """(count,) numbers from 0 up to 1, the same on every machine."""
    words = _splitmix(np.arange(count, dtype=np.uint64) + np.uint64(mix(key)))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Order:
    """Which samples make up each batch: every sample once an epoch, in an order of its own each epoch."""

    def __init__(
        self, count: int, batch: int, seed: int, lengths: Ints | None = None, pool: int = 50
    ) -> None:
        """Set the order up.

        Args:
            count: samples.
            batch: samples of a batch.
            seed: which order.
            lengths: (count,) tokens of each sample: batches then hold samples of about one length.
            pool: with lengths, so many batches are sorted together.
        """
        self.count, self.batch, self.seed, self.lengths, self.pool = count, batch, seed, lengths, pool
        self._pool = -1
        self._sorted = np.empty(0, np.int64)

    def __call__(self, step: int) -> Ints:
        """The samples (batch,) of a step, counted from 0."""
        if self.lengths is None:
            return self._samples(step * self.batch, self.batch)
        pool, place = divmod(step, self.pool)
        if pool != self._pool:
            drawn = self._samples(pool * self.pool * self.batch, self.pool * self.batch)
            self._sorted, self._pool = drawn[np.argsort(self.lengths[drawn], kind="stable")], pool
        chosen = int(shuffled(np.array([place]), self.pool, mix(self.seed, 1, pool))[0])
        return self._sorted[chosen * self.batch : (chosen + 1) * self.batch]

    def _samples(self, first: int, count: int) -> Ints:
        places = np.arange(first, first + count)
        epochs = places // self.count
        parts = [
            shuffled(places[epochs == e] % self.count, self.count, mix(self.seed, 0, int(e)))
            for e in np.unique(epochs)
        ]
        return np.concatenate(parts)


def _splitmix(x: Words) -> Words:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
