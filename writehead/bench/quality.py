"""How good each engine's answers are, beside its speed: agreement with float32, and perplexity."""

import gzip
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from writehead.bench.ours import Scores
from writehead.bench.worker import CaseError

WINDOW = 512  # tokens of one independent piece of the text


class Scorer(Protocol):
    """An engine that tells what it thinks of a text."""

    name: str

    def score(self, ids: Sequence[int]) -> Scores:
        """Best next tokens and log-probabilities."""


@dataclass(frozen=True)
class Quality:
    """One engine on one text.

    Attributes:
        engine, dtype: what ran.
        agreement: share of positions at which its best next token is that of the float32 reference.
        perplexity: exp of the mean negative log-probability of a token, given up to 511 before it.
        tokens: positions compared.
        error: why there are no figures.
    """

    engine: str
    dtype: str
    agreement: float
    perplexity: float
    tokens: int
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON."""
        return asdict(self)


def read_text(path: Path) -> str:
    """A text file, gzip or plain.

    Raises:
        ValueError: not UTF-8, not gzip in spite of its name, or empty.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: not a text file ({error})") from error
    if not text.strip():
        raise ValueError(f"{path} is empty; give a text to compare engines on")
    return text


def windows(ids: Sequence[int], tokens: int) -> list[list[int]]:
    """The first `tokens` of a text in pieces of 512; a last piece of one token has nothing to predict."""
    ids = list(ids[:tokens])
    return [piece for i in range(0, len(ids), WINDOW) if len(piece := ids[i : i + WINDOW]) > 1]


def judge(engine: Scorer, dtype: str, pieces: Sequence[list[int]], reference: Sequence[Scores]) -> Quality:
    """Compare an engine with the reference's scores of the same pieces."""
    same = count = 0
    surprise: list[float] = []
    try:
        for scores, right in zip(_scores(engine, pieces), reference, strict=True):
            same += sum(a == b for a, b in zip(scores.best, right.best, strict=True))
            count += len(right.best)
            surprise += scores.logprobs
    except (CaseError, ValueError) as error:
        return Quality(engine.name, dtype, math.nan, math.nan, 0, str(error))
    return Quality(engine.name, dtype, same / count, math.exp(-sum(surprise) / len(surprise)), count)


def _scores(engine: Scorer, pieces: Sequence[list[int]]) -> Iterator[Scores]:
    yield from (engine.score(piece) for piece in pieces)
