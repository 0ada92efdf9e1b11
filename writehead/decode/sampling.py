"""Choosing the next token from logits: filters, a per-row generator, and the chosen token's log-probability.

The order is Hugging Face's: repetition penalty, temperature, top-k, top-p, min-p; each filter reads the
distribution that the one before it left, renormalised.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from writehead.decode.filters import Floats, choose, filtered, invert, row_generators, row_problem
from writehead.decode.options import Sampling


@dataclass
class Rows:
    """What choosing tokens remembers of each row of a batch; `start` makes one per `generate` call.

    Args:
        generators: one bit generator per row; empty when greedy.
        seen: (B, V) bool, the tokens each row has seen; None without a repetition penalty.
        seed: the seed behind the generators, also when the operating system gave it; None when greedy.
    """

    generators: list[np.random.BitGenerator]
    seen: Tensor | None
    seed: int | None

    @classmethod
    def start(
        cls, sampling: Sampling, numbers: Sequence[int], vocab: int, device: torch.device | str = "cpu"
    ) -> "Rows":
        """Fresh rows that have seen nothing.

        Args:
            sampling: the filters and the seed.
            numbers: which random stream each row draws from, normally range(B).
            vocab: V.
            device: where the logits will be.
        """
        generators, seen, seed = list[np.random.BitGenerator](), None, None
        if sampling.temperature > 0:
            seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
            generators = row_generators(seed, numbers)
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(len(numbers), vocab, dtype=torch.bool, device=device)
        return cls(generators, seen, seed)

    def note(self, tokens: Tensor) -> None:
        """Mark tokens (B,) or (B, T), -1 for padding, as seen; the prompt counts, and each chosen token."""
        if self.seen is not None:
            mark(self.seen, tokens)

    def select(self, index: Sequence[int]) -> "Rows":
        """Row i becomes row index[i]; the generators move along and are not copied.

        Raises:
            ValueError: a row is taken twice, whose copies would share one stream.
        """
        twice = next((i for n, i in enumerate(index) if i in index[:n]), None)
        if self.generators and twice is not None:
            raise ValueError(f"row {twice} is taken twice: two rows cannot draw from one random stream")
        generators = [self.generators[i] for i in index] if self.generators else []
        return Rows(generators, None if self.seen is None else self.seen[list(index)], self.seed)


def to_numpy(x: Tensor) -> Floats:
    """The tensor's values, float32 or wider; they share memory where they can."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    values: Floats = wide.numpy(force=True)
    return values


def mark(seen: Tensor, tokens: Tensor) -> None:
    """Set seen (B, V) in place at tokens (B,) or (B, T); -1 is padding and marks nothing."""
    tokens = tokens.reshape(len(seen), -1)
    rows, columns = (tokens >= 0).nonzero(as_tuple=True)
    seen[rows, tokens[rows, columns]] = True


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make seen tokens less likely: their logits are multiplied by the penalty below 0 and divided above.

    Args:
        logits: (B, V); not changed.
        seen: (B, V) bool, kept by `mark`.
        penalty: above 0; below 1 it favours seen tokens.

    Returns:
        The penalised logits, (B, V).
    """
    penalised = torch.minimum if penalty >= 1 else torch.maximum  # both cases at once, a third of the time
    return torch.where(seen, penalised(logits * penalty, logits / penalty), logits)


def filtered_logprobs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities to draw from: temperature, then top-k, then top-p, then min-p, then normalise.

    The semantics are those of transformers 5.23: top-k keeps every logit equal to the k-th; top-p drops the
    least probable while the mass dropped stays at or below 1 - top_p, but never the last; min-p compares
    with the most probable token left. Of equal tokens at top-p's border the lowest ids stay, as many as in
    transformers, which leaves the choice to an unstable sort. Temperature 0 puts all mass on the first of the
    largest logits.

    Args:
        logits: (B, V), already penalised, any float dtype; not changed.
        sampling: its repetition_penalty is not applied here.

    Returns:
        (B, V), float32 or wider, -inf for removed tokens.

    Raises:
        ValueError: a row of logits holds NaN or +inf or nothing but -inf.
    """
    rows = to_numpy(logits)
    logprobs = np.full_like(rows, -np.inf)
    for b, row in enumerate(rows):
        ids, left = filtered(b, row, sampling)
        logprobs[b, ids] = left
    return torch.from_numpy(logprobs).to(logits.device)


def greedy(scores: Tensor) -> Tensor:
    """Index of the largest entry of each row of scores (B, V), the lowest among equals."""
    return torch.from_numpy(to_numpy(scores).argmax(-1)).to(scores.device)


def draw(logprobs: Tensor, generators: Sequence[np.random.BitGenerator]) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution, in float64.

    A row takes one 53-bit uniform number from its own generator and nothing else, so its tokens are the same
    alone and in any batch. A token of zero mass is never drawn.

    Args:
        logprobs: (B, V), normalised or not.
        generators: B of them; each is advanced by one step.

    Returns:
        Tokens (B,) int64.

    Raises:
        ValueError: the number of generators is not B, or a row's mass is zero, infinite or NaN.
    """
    _check_generators(len(logprobs), generators)
    pairs = zip(to_numpy(logprobs), generators, strict=True)
    tokens = [invert(b, *pair) for b, pair in enumerate(pairs)]
    return torch.tensor(tokens, dtype=torch.int64, device=logprobs.device)


def _check_generators(B: int, generators: Sequence[np.random.BitGenerator]) -> None:
    if len(generators) != B:
        raise ValueError(
            f"{B} rows of log-probabilities but {len(generators)} generators: "
            "each row needs its own, as `Rows.start` makes them at a temperature above 0"
        )


def pick(logits: Tensor, sampling: Sampling, rows: Rows) -> tuple[Tensor, Tensor]:
    """Choose the next token of each row: greedy at temperature 0 (lowest id among equals), else drawn.

    Args:
        logits: (B, V), as the model gave them; not changed.
        sampling: how to choose.
        rows: from `Rows.start`; generators advance, the table is only read: `rows.note` the tokens you keep.

    Returns:
        Tokens (B,) int64, and their log-probabilities (B,) under the model itself, as rescoring the text
        gives them: the log-softmax of `logits` before penalty, temperature and filters.

    Raises:
        ValueError: a row of logits holds NaN or +inf or nothing but -inf, or `rows` was started otherwise.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    model = logits.log_softmax(-1)
    spoilt = model[:, 0].isnan()  # what spoils a row spoils its normaliser, so any one column tells
    if bool(spoilt.any()):
        b = int(spoilt.nonzero()[0])
        raise ValueError(f"row {b}: {row_problem(float(logits[b].max()))}")
    scores = logits
    if sampling.repetition_penalty != 1:
        if rows.seen is None:
            raise ValueError(
                f"repetition_penalty={sampling.repetition_penalty} needs rows that note what was seen: "
                "start them with this sampling"
            )
        scores = penalise(logits, rows.seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        tokens = greedy(scores)
    else:
        _check_generators(len(logits), rows.generators)
        pairs = zip(to_numpy(scores), rows.generators, strict=True)
        chosen = [choose(b, row, sampling, generator) for b, (row, generator) in enumerate(pairs)]
        tokens = torch.tensor(chosen, dtype=torch.int64, device=logits.device)
    return tokens, model.gather(1, tokens[:, None]).squeeze(1)
