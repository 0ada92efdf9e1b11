"""What the engines share: rows to decode, scores of a text, files made once, the names of types."""

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[list[int]]
Scored = dict[str, list[Any]]


def rows_of(vocab: int, batch: int, context: int) -> Rows:
    """`batch` rows of `context` tokens drawn with a fixed seed; which tokens they are changes no time."""
    draw = random.Random(0)
    return [[draw.randrange(vocab) for _ in range(context)] for _ in range(batch)]


def scored(logits: Any, ids: list[int]) -> Scored:
    """The best next token after each of `ids`, and the log-probability of each but the first.

    Args:
        logits: numpy, (tokens, vocab).
        ids: the tokens.
    """
    import numpy

    wide = logits.astype(numpy.float64)
    total = numpy.log(numpy.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) + wide.max(-1)
    own = wide[numpy.arange(len(ids) - 1), ids[1:]] - total[:-1]
    return {"best": [int(token) for token in logits.argmax(-1)], "logprobs": [float(x) for x in own]}


def built(path: Path, build: Callable[[Path], object]) -> Path:
    """`path`, made by `build(temporary path)` and renamed into place unless it exists."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            build(Path(folder) / path.name)
            (Path(folder) / path.name).rename(path)
    return path


def accepted(dtype: str, formats: dict[str, str], engine: str) -> str:
    """The engine's word for `dtype`."""
    if dtype not in formats:
        raise ValueError(f"dtype={dtype!r} is not offered for {engine}; offered: {', '.join(formats)}")
    return formats[dtype]
