"""How well a decoder predicts texts: perplexity of tokens, words and bytes, with the protocol said."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from writehead.convert.tokenizer import Tokenizer
from writehead.core.state import State, detach
from writehead.model.decoder import Decoder
from writehead.train.corpus import texts
from writehead.train.tokens import Encode, Tokens


@dataclass(frozen=True)
class Perplexity:
    """The score of a model on texts.

    Attributes:
        nll: negative log-likelihood of all scored tokens, in nats.
        tokens: scored tokens, those that end a document among them.
        documents, words, bytes: of the texts; words are what white space separates.
        window, stride: tokens that a call reads, and of these the last ones that it scores (the first call
            scores all): equal for windows that do not overlap.
        carried: each window goes on from the state after the one before.
    """

    nll: float
    tokens: int
    documents: int
    words: int
    bytes: int
    window: int
    stride: int
    carried: bool

    @property
    def per_token(self) -> float:
        """exp of the mean over tokens."""
        return math.exp(self.nll / self.tokens)

    @property
    def per_word(self) -> float:
        """exp of nats a word: comparable between tokenizers."""
        return _exp(self.nll / self.words)

    @property
    def per_byte(self) -> float:
        """exp of nats a byte: comparable between tokenizers."""
        return math.exp(self.nll / self.bytes)

    @property
    def bits_per_byte(self) -> float:
        """Bits that a byte takes."""
        return self.nll / self.bytes / math.log(2)


def perplexity(
    model: Decoder,
    tokenizer: Tokenizer,
    sources: tuple[str, ...],
    *,
    window: int | None = None,
    stride: int | None = None,
    carry: bool = False,
    batch: int = 8,
    field: str = "text",
) -> Perplexity:
    """Score texts one after the other, each ended by the token that ends a text, as training has them.

    The first text follows the token that begins one (else that which ends one); without either its first
    token is not scored.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        sources: as data.train of a run.
        window: tokens that a call reads; default what the model was made for, at most 1024.
        stride: tokens by which windows move on; default `window`, smaller ones slide.
        carry: go on from the state after the window before; windows do not overlap then.
        batch: windows computed together.
        field: key of JSONL lines.

    Raises:
        ValueError: a window or stride that cannot be had, or texts with fewer than two tokens.
    """
    window, stride = _checked(model, window, stride, carry)
    encode = Encode(tokenizer)
    end = np.array(sorted(tokenizer.eos)[:1], encode.dtype)
    first = end if not tokenizer.add_bos or tokenizer.bos is None else np.array([tokenizer.bos], encode.dtype)
    parts, documents, words, size = [first], 0, 0, 0
    for text in texts(sources, field):
        (ids,) = encode([text.text])
        parts += [ids, end] if text.ends else [ids]
        documents, words, size = (
            documents + text.ends,
            words + len(text.text.split()),
            size + len(text.text.encode()),
        )
    tokens = np.concatenate(parts)
    if len(tokens) < 2 or not size:
        raise ValueError(f"the texts have {size} bytes, too few to predict one token from another")
    nll = score_carried(model, tokens, window) if carry else score(model, tokens, window, stride, batch)
    return Perplexity(nll, len(tokens) - 1, documents, max(words, 1), size, window, stride, carry)


@torch.inference_mode()
def score(model: Decoder, tokens: Tokens, window: int, stride: int, batch: int) -> float:
    """Nats of all tokens but the first, in windows that start `stride` apart.

    Args:
        model: in evaluation mode.
        tokens: (N,) at least 2.
        window, stride, batch: see `perplexity`.
    """
    total = 0.0
    for inputs, targets in _windows(tokens, window, stride, batch):
        logits, _ = model(inputs.to(model.embedding.table.device))
        total += _nats(logits, targets)
    return total


@torch.inference_mode()
def score_carried(model: Decoder, tokens: Tokens, window: int) -> float:
    """Nats of all tokens but the first, window after window, each from the state after the one before."""
    total, state, device = 0.0, model.init_state(1), model.embedding.table.device
    for first in range(0, len(tokens) - 1, window):
        piece = torch.from_numpy(tokens[first : first + window + 1].astype(np.int64))[None]
        x, state = _hidden(model, piece[:, :-1].to(device), state)
        total += _nats(model.logits(x), piece[:, 1:])
    return total


def _hidden(model: Decoder, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    x, state, _ = model.hidden(tokens, state)
    return x, detach(state)


def _windows(tokens: Tokens, window: int, stride: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs (B, T) and targets (B, T), -1 = padding or scored by an earlier window."""
    count = 1 + max(0, -(-(len(tokens) - 1 - window) // stride))
    for first in range(0, count, batch):
        rows = range(first, min(first + batch, count))
        table = np.full((len(rows), window + 1), -1, np.int64)
        for line, row in zip(table, rows, strict=True):
            piece = tokens[row * stride : row * stride + window + 1]
            line[: len(piece)] = piece
        targets = table[:, 1:].copy()
        targets[int(first == 0) :, : window - stride] = -1
        inputs = np.where(table[:, 1:] < 0, -1, table[:, :-1])  # the last token has nothing to predict
        yield torch.from_numpy(inputs), torch.from_numpy(targets)


def _nats(logits: Tensor, targets: Tensor) -> float:
    flat = targets.flatten().to(logits.device)
    return float(F.cross_entropy(logits.flatten(0, 1).float(), flat, ignore_index=-1, reduction="sum"))


def _checked(model: Decoder, window: int | None, stride: int | None, carry: bool) -> tuple[int, int]:
    limit = model.embedding.position.max_context
    if window is None:
        window = min(model.config.max_context or 1024, 1024, limit or 1024)
    if window < 1 or (limit is not None and window > limit):
        raise ValueError(f"window={window} must be from 1 to {limit or 'any number of'} positions")
    if carry and stride not in (None, window):
        raise ValueError(f"stride={stride} does not go with carry, whose windows do not overlap")
    if carry and limit is not None:
        raise ValueError(f"carry needs positions without end; this model has {limit}")
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} must be from 1 to window={window}")
    return window, stride


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
