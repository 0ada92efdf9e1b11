"""Batches of windows, lanes, labelled texts and pairs: each is a function of its step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from writehead.train.order import Ints, Order, mix
from writehead.train.tokens import Tokens


class Batch(NamedTuple):
    """What one step learns from.

    Attributes:
        tokens: (B, T) what the model (or its decoder) reads, -1 = padding.
        target: (B, T) what follows each token, -1 = nothing to learn; (B, 1) the class of labelled texts.
        source: (B, S) what a seq2seq model's encoder reads.
        fresh: does a carried state start anew here?
        owners: (B, T) the column of each token's summary, for an encoder that reads it.
        alone: (B, N, S) up to N sentences that are hidden in each row, each alone behind its summary.
        asked: (B, N) the columns of their summaries in the row, -1 = none.
    """

    tokens: Tensor
    target: Tensor
    source: Tensor | None = None
    fresh: bool = True
    owners: Tensor | None = None
    alone: Tensor | None = None
    asked: Tensor | None = None

    @property
    def scored(self) -> int:
        """Targets that count."""
        return int((self.target >= 0).sum())

    @property
    def read(self) -> int:
        """Real tokens that the model reads."""
        every = (self.tokens, self.source, self.alone)
        return sum(int((tokens >= 0).sum()) for tokens in every if tokens is not None)

    def piece(self, index: int, of: int) -> "Batch":
        """The rows of one of several equal pieces."""
        rows = slice(index * len(self.tokens) // of, (index + 1) * len(self.tokens) // of)
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        made: dict[str, Any] = {k: function(v) for k, v in self._asdict().items() if isinstance(v, Tensor)}
        return self._replace(**made)


class Batches(Protocol):
    """The batches of a data set by number; training asks for any number, evaluation for those below `count`.

    Attributes:
        count: batches of one pass over the data.
    """

    count: int

    def __call__(self, step: int) -> Batch:
        """The batch of a step from 0."""


class Windows:
    """Windows of a stream, each once an epoch, at offsets that differ from epoch to epoch."""

    def __init__(self, tokens: Tokens, length: int, batch: int, seed: int | None) -> None:
        """Make it; without a seed the windows come in order, the last batch perhaps smaller."""
        self.tokens, self.length, self.batch, self.seed = tokens, length, batch, seed
        self.windows = (len(tokens) - 1) // length
        self.order = None if seed is None else Order(self.windows, batch, seed)
        self.count = max(1, self.windows // batch) if seed is not None else -(-self.windows // batch)

    def __call__(self, step: int) -> Batch:
        if self.order is None or self.seed is None:
            first = step * self.batch
            chosen = np.arange(first, min(first + self.batch, self.windows))
            return _windows(self.tokens, chosen * self.length, self.length)
        epochs = (step * self.batch + np.arange(self.batch)) // self.windows
        slack = (len(self.tokens) - 1) % self.length + 1
        shift = np.array([mix(self.seed, 2, int(epoch)) % slack for epoch in epochs])
        return _windows(self.tokens, self.order(step) * self.length + shift, self.length)


class Lanes:
    """Consecutive windows: row b goes through the b-th part of the stream, so that states can be carried."""

    def __init__(self, tokens: Tokens, length: int, batch: int) -> None:
        self.tokens, self.length, self.batch = tokens, length, batch
        self.lane = (len(tokens) - 1) // batch
        self.count = self.lane // length

    def __call__(self, step: int) -> Batch:
        place = step % self.count
        first = np.arange(self.batch) * self.lane + place * self.length
        return _windows(self.tokens, first, self.length)._replace(fresh=place == 0)


class Sample(NamedTuple):
    """One text with its target: a class, or the tokens of a translation."""

    tokens: Tokens
    target: Tokens | int


class Samples:
    """Labelled texts or pairs in batches of about one length."""

    def __init__(self, samples: Sequence[Sample], batch: int, seed: int | None, start: int | None) -> None:
        """Make it; `start` is the token that a translation's decoder starts from, None for classes."""
        self.samples, self.batch, self.start = samples, batch, start
        lengths = np.array([len(s.tokens) + (0 if start is None else len(s.target)) for s in samples])  # type: ignore[arg-type]
        self.order = None if seed is None else Order(len(samples), batch, seed, lengths)
        self._sorted = np.argsort(lengths, kind="stable")
        self.count = max(1, len(samples) // batch) if seed is not None else -(-len(samples) // batch)

    def __call__(self, step: int) -> Batch:
        first = step * self.batch
        chosen = self._sorted[first : first + self.batch] if self.order is None else self.order(step)
        rows = [self.samples[i] for i in chosen]
        tokens = _padded([row.tokens for row in rows])
        if self.start is None:
            return Batch(tokens, torch.tensor([[row.target] for row in rows]))
        target = _padded([np.asarray(row.target) for row in rows])
        said = torch.cat([torch.full((len(rows), 1), self.start), target[:, :-1]], 1)
        return Batch(torch.where(target >= 0, said, -1), target, tokens)


def _windows(tokens: Tokens, first: Ints, length: int) -> Batch:
    rows = torch.from_numpy(np.stack([tokens[i : i + length + 1] for i in first]).astype(np.int64))
    return Batch(rows[:, :-1], rows[:, 1:])


def _padded(rows: Sequence[Tokens]) -> Tensor:
    table = np.full((len(rows), max(map(len, rows))), -1, np.int64)
    for row, tokens in zip(table, rows, strict=True):
        row[: len(tokens)] = tokens
    return torch.from_numpy(table)
