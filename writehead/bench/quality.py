"""What a cheaper engine costs in quality: agreement with a reference, and perplexity, on the same tokens.

Texts are read in windows, each from the empty past, with the true tokens fed; all tokens of a window but the
first are predicted. Agreement is the share of places where the most probable token is the reference's.
"""

import gzip
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from writehead.core.cache import Store
from writehead.decode.engine import Engine

PIECE = 128  # tokens that one call verifies: bounds the logits
Say = Callable[[str], None]


@dataclass(frozen=True)
class Quality:
    """One engine on one text.

    Attributes:
        engine: its name.
        tokens: tokens predicted.
        perplexity: exp of the mean negative log-likelihood of a token.
        agreement: share of places where its best token is the reference's; 1 for the reference itself.
    """

    engine: str
    tokens: int
    perplexity: float
    agreement: float

    @property
    def agreement_error(self) -> float:
        """The standard error of `agreement`, as if places were independent."""
        return math.sqrt(self.agreement * (1 - self.agreement) / self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON."""
        return {**asdict(self), "agreement_error": self.agreement_error}


def read_text(path: Path) -> str:
    """The text in a file, which may be compressed with gzip.

    Raises:
        ValueError: it cannot be read, or is not text.
    """
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError) as error:
        problem = (isinstance(error, OSError) and error.strerror) or "is no whole gzip file"
        raise ValueError(f"{path}: {problem.lower()}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def windows(ids: Sequence[int], length: int) -> list[Tensor]:
    """Consecutive windows of `length` tokens; what is left over is not used.

    Raises:
        ValueError: a window of fewer than two tokens, or too few tokens for one.
    """
    if length < 2 or len(ids) < length:
        raise ValueError(f"windows of {length} tokens: give at least 2, and at most the {len(ids)} there are")
    whole = len(ids) // length * length
    return list(torch.tensor(ids[:whole], dtype=torch.int64).view(-1, length))


def logits(engine: Engine, window: Tensor) -> Iterator[Tensor]:
    """The logits (T, V) after each token of a window (T) but the last, in pieces."""
    fed = window[None, :-1]
    first, state = engine.start(fed[:, :1], Store(capacity=len(window)))
    yield first
    for piece in fed[:, 1:].split(PIECE, 1):
        if piece.shape[1]:
            found, state = engine.verify(piece, state)
            yield found[0]


@torch.inference_mode()
def compare(
    engines: Mapping[str, Engine], texts: Sequence[Tensor], *, say: Say = lambda text: None
) -> list[Quality]:
    """Measure engines on windows of tokens.

    Args:
        engines: by name; the first is the reference.
        texts: from `windows`.
        say: told what happens.
    """
    losses = dict.fromkeys(engines, 0.0)
    agreed = dict.fromkeys(engines, 0)
    count = 0
    for number, window in enumerate(texts, 1):
        say(f"window {number} of {len(texts)}")
        best: Tensor | None = None
        for name, engine in engines.items():
            chosen, at = [], 1
            for piece in logits(engine, window):
                target = window[at : at + len(piece)]
                wide = piece.to(torch.promote_types(piece.dtype, torch.float32))
                losses[name] += float(torch.nn.functional.cross_entropy(wide, target, reduction="sum"))
                chosen.append(wide.argmax(-1))
                at += len(piece)
            found = torch.cat(chosen)
            best = found if best is None else best
            agreed[name] += int((found == best).sum())
        count += len(window) - 1
    return [Quality(name, count, math.exp(losses[name] / count), agreed[name] / count) for name in engines]
