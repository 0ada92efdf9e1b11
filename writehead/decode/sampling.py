"""Choosing the next token from logits: filters, a per-row generator, and the chosen token's log-probability.

The order is Hugging Face's: repetition penalty, temperature, top-k, top-p, min-p; each filter reads the
distribution that the one before it left, renormalised.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from writehead.decode.filters import Floats, candidates, row_problem, to_numpy

SMALLEST_TEMPERATURE = 1e-6  # below this, logits divided by the temperature leave the range of float32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose a token; the default is greedy.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k largest logits, and whatever equals the k-th; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose mass reaches top_p; 1 keeps all.
        min_p: keep tokens at least min_p times as probable as the most probable one; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens already seen; 1 is none.
        seed: any integer from 0; None takes a fresh one from the operating system.

    Raises:
        ValueError: a value outside its range, or a filter that greedy decoding would ignore.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_real("temperature", self.temperature)
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or more; nearest is 0")
        if 0 < self.temperature < SMALLEST_TEMPERATURE:
            raise ValueError(
                f"temperature={self.temperature} is too small to sample with: give 0 (greedy) or at least "
                f"{SMALLEST_TEMPERATURE}"
            )
        if not _is_integer(self.top_k) or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k!r} must be a whole number of tokens, 0 (off) or more")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            _check_real(name, value)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must lie between 0 and 1; nearest is {float(value > 1)}")
        _check_real("repetition_penalty", self.repetition_penalty)
        if self.repetition_penalty <= 0:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} must be above 0; 1.0 turns it off"
            )
        if self.seed is not None and (not _is_integer(self.seed) or self.seed < 0):
            raise ValueError(f"seed={self.seed!r} must be a whole number, 0 or more, or None")
        self._refuse_filters_of_greedy()

    def _refuse_filters_of_greedy(self) -> None:
        for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            if self.temperature == 0 and getattr(self, name) != off:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect at temperature=0 (greedy): give a "
                    f"temperature above 0, such as 1.0, or leave {name} at {off}"
                )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_real(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number")


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


def row_generators(seed: int, numbers: Sequence[int]) -> list[np.random.BitGenerator]:
    """One PCG64 generator per row number, spawned from the seed by NumPy's SeedSequence.

    SeedSequence hashes (seed, number) into 128 bits, so rows and seeds have independent streams, and a
    stream depends on nothing but its own pair. (torch's CPU generator keeps 32 bits of a seed.)
    """
    return [np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(n,))) for n in numbers]


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
        ids, kept = _candidates(b, row, sampling)
        logprobs[b, ids] = kept
    return torch.from_numpy(logprobs).to(logits.device)


def _candidates(b: int, row: Floats, sampling: Sampling) -> tuple[NDArray[np.intp], Floats]:
    problem = row_problem(row.max())
    if problem:
        raise ValueError(f"row {b}: {problem}")
    return candidates(row, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)


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
    tokens = [_invert(b, *pair) for b, pair in enumerate(pairs)]
    return torch.tensor(tokens, dtype=torch.int64, device=logprobs.device)


def _invert(b: int, logprobs: Floats, generator: np.random.BitGenerator) -> int:
    with np.errstate(over="ignore"):  # an infinite total is refused below
        cumulative = np.exp(logprobs).astype(np.float64).cumsum()
    total = float(cumulative[-1])
    if not 0 < total < np.inf:
        raise ValueError(f"row {b} cannot be drawn from: its probabilities add up to {total:g}")
    uniform = (generator.random_raw() >> 11) * 2.0**-53  # below 1, so uniform * total is below total
    return int(cumulative.searchsorted(uniform * total, "right"))


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
        chosen = []
        for b, row in enumerate(to_numpy(scores)):
            ids, logprobs = _candidates(b, row, sampling)
            chosen.append(int(ids[_invert(b, logprobs, rows.generators[b])]))
        tokens = torch.tensor(chosen, dtype=torch.int64, device=logits.device)
    return tokens, model.gather(1, tokens[:, None]).squeeze(1)
