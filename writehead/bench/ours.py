"""Our engines as contestants: the native one in each packed format, the PyTorch one in each float type."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from writehead.bench.peer_engines.common import rows_of
from writehead.convert.packed import load_packed
from writehead.core.slots import Store
from writehead.core.state import State, rewind
from writehead.decode.engine import Engine, TorchEngine
from writehead.decode.sampling import greedy
from writehead.model.decoder import Decoder
from writehead.native.covers import why_not
from writehead.native.engine import NativeEngine
from writehead.native.library import library
from writehead.native.weights import pack_model

NATIVE, TORCH = "writehead", "writehead (torch)"
PIECE = 128  # tokens of a text that one call verifies: bounds the logits
FLOATS = ("float32", "bfloat16")


class Scores(NamedTuple):
    """What an engine says of a text."""

    best: list[int]  # the most likely token after each token
    logprobs: list[float]  # of each token but the first, given those before


class Ours:
    """One of our engines, with the operations of a `Peer`."""

    def __init__(self, name: str, engine: Engine, cache: torch.dtype | None = None) -> None:
        """Wrap an engine; `cache` is the type of its keys and values, None = as computed."""
        self.name, self.engine, self.cache = name, engine, cache
        self._key, self._held = (0, 0), list[tuple[Tensor, State]]()

    def hold(self, context: int, tokens: Tensor, state: State) -> None:
        """Take a state of `context` tokens in each row for `decode`; `tokens` (B,) come next."""
        self._held, self._key = [(tokens, state)], (context, len(tokens))

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds from an empty cache to the logits of the last of `ids`."""
        tokens = torch.tensor([list(ids)])
        start = time.perf_counter()
        self.engine.start(tokens, self._store(len(ids)))
        return time.perf_counter() - start

    def decode(self, context: int, batch: int, new_tokens: int) -> float:
        """Seconds of a step of `batch` rows behind `context` tokens each, over `new_tokens` steps."""
        if self._key != (context, batch):
            self._held.clear()  # before the next state is allocated
            rows = torch.tensor(rows_of(self.engine.vocab, batch, context))
            logits, state = self.engine.start(rows, self._store(context + new_tokens))
            self.hold(context, greedy(logits), state)
        tokens, state = self._held.pop()
        first, start = tokens, time.perf_counter()
        for _ in range(new_tokens):
            logits, state = self.engine.step(tokens, state)
            tokens = greedy(logits)
        seconds = time.perf_counter() - start
        with torch.inference_mode():
            self._held.append((first, rewind(state, new_tokens)))
        return seconds / new_tokens

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The n tokens that continue `ids` greedily."""
        logits, state = self.engine.start(torch.tensor([list(ids)]), self._store(len(ids) + n))
        found = [int(logits.argmax())]
        while len(found) < n:
            logits, state = self.engine.step(torch.tensor(found[-1:]), state)
            found.append(int(logits.argmax()))
        return found

    def score(self, ids: Sequence[int]) -> Scores:
        """What the engine says of the text `ids`."""
        tokens = torch.tensor([list(ids)])
        logits, state = self.engine.start(tokens[:, :1], self._store(len(ids)))
        best, logprobs = [int(logits.argmax())], [_logprobs(logits, tokens[0, 1:2])]
        for first in range(1, len(ids), PIECE):
            found, state = self.engine.verify(tokens[:, first : first + PIECE], state)
            best += found[0].argmax(-1).tolist()
            logprobs.append(_logprobs(found[0], tokens[0, first + 1 : first + 1 + PIECE]))
        return Scores(best, torch.cat(logprobs).tolist())

    def _store(self, capacity: int) -> Store:
        return Store(capacity=capacity, dtype=self.cache)


def _logprobs(logits: Tensor, following: Tensor) -> Tensor:
    """The log-probabilities (N,) of the tokens that follow (N,), behind the first N of the logits (T, V)."""
    return logits[: len(following)].float().log_softmax(-1).gather(1, following[:, None])[:, 0]


def native_missing(model: Decoder) -> str | None:
    """Why the native engine does not run the model here; None if it does."""
    return why_not(model.config) or (None if library()[0] is not None else library()[1])


def contestants(model: Decoder, kind: str, threads: int, source: Path | None = None) -> Iterable[Ours]:
    """Our engines that compute in `kind`: the native one where it runs, the PyTorch one in float types.

    Args:
        model: float32 weights; of one that is blank the native engine reads `source`, and PyTorch nothing.
        kind: "float32", "bfloat16", "int8" or "int4".
        threads: of the native engine.
        source: the files of a model that memory holds only once.
    """
    cache = torch.float32 if kind == "float32" else torch.bfloat16
    if source is not None:
        yield Ours(NATIVE, NativeEngine(load_packed(source, kind).model, threads=threads), cache)
        return
    if native_missing(model) is None:
        yield Ours(NATIVE, NativeEngine(pack_model(model, kind), threads=threads), cache)
    if kind in FLOATS:
        twin = model if kind == "float32" else _copy(model, getattr(torch, kind))
        yield Ours(TORCH, TorchEngine(twin))


def _copy(model: Decoder, dtype: torch.dtype) -> Decoder:
    twin = Decoder(model.config).to(dtype)
    twin.load_state_dict(model.state_dict())
    return twin
