"""How good each engine's answers are, beside its speed: agreement with float32, and perplexity."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from writehead.bench.ours import Scores
from writehead.bench.worker import CaseError
from writehead.train.corpus import texts

WINDOW = 512  # tokens of one window, each read from the empty past


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
        tokens: places compared.
        perplexity: exp of the mean negative log-probability of a token, given those before it in its window.
        agreement: share of places at which its best next token is that of the float32 reference.
        error: why there are no figures.
    """

    engine: str
    dtype: str
    tokens: int
    perplexity: float
    agreement: float
    error: str = ""

    @property
    def agreement_error(self) -> float:
        """The standard error of `agreement`, as if places were independent."""
        return math.sqrt(self.agreement * (1 - self.agreement) / self.tokens) if self.tokens else math.nan

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON."""
        return {**asdict(self), "agreement_error": self.agreement_error}


def read_text(source: Path, characters: int) -> str:
    """The beginning of a text: a file (plain, gzip or JSONL) or all files of a folder, as `train` reads them.

    Raises:
        ValueError: nothing there, or what `train.corpus.texts` refuses.
    """
    held: list[str] = []
    for text in texts([str(source)]):
        held.append(text.text)
        characters -= len(text.text)
        if characters <= 0:
            break
    return "".join(held)


def windows(ids: Sequence[int], length: int = WINDOW) -> list[list[int]]:
    """Consecutive windows of `length` tokens; what is left over is not used.

    Raises:
        ValueError: a window of fewer than two tokens, or too few tokens for one.
    """
    if length < 2 or len(ids) < length:
        raise ValueError(f"windows of {length} tokens: give at least 2, and at most the {len(ids)} there are")
    return [list(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)]


def judge(engine: Scorer, dtype: str, pieces: Sequence[list[int]], reference: Sequence[Scores]) -> Quality:
    """Compare an engine with the reference's scores of the same pieces."""
    same = count = 0
    surprise: list[float] = []
    try:
        for piece, right in zip(pieces, reference, strict=True):
            scores = engine.score(piece)
            same += sum(a == b for a, b in zip(scores.best, right.best, strict=True))
            count += len(right.best)
            surprise += scores.logprobs
    except (CaseError, ValueError) as error:
        return Quality(engine.name, dtype, 0, math.nan, math.nan, str(error))
    return Quality(engine.name, dtype, count, math.exp(-sum(surprise) / len(surprise)), same / count)
