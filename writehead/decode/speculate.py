"""Prompt-lookup speculation: draft what followed the same words before, and let the model verify it.

A draft is certain of itself, so verification is exact: at each position a token is chosen as plain decoding
would choose it, from the same distribution with the same random numbers, and the draft holds while it agrees.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from writehead.core.state import CannotRewind, State, rewind, select
from writehead.decode.engine import Engine

LONGEST, SHORTEST = 4, 2  # tokens of the end of the text that are looked up; of one token's matches few hold


class Lookup:
    """Drafts of one row: what followed the latest earlier occurrence of the longest end of its text."""

    def __init__(self, prompt: Sequence[int], most: int) -> None:
        """Start from a prompt.

        Args:
            prompt: token ids.
            most: tokens of a draft at most; fewer while drafts fail.
        """
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where the text went on after it
        self._most = self._length = most
        self.extend(prompt)

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on."""
        for token in tokens:
            # An n-gram is entered when its next token is known, so the end of the text never matches itself.
            for n in range(SHORTEST, min(LONGEST, len(self._text)) + 1):
                self._after[tuple(self._text[-n:])] = len(self._text)
            self._text.append(token)

    def draft(self, most: int) -> list[int]:
        """Tokens that may come next, at most `most`."""
        for n in range(min(LONGEST, len(self._text)), SHORTEST - 1, -1):
            at = self._after.get(tuple(self._text[-n:]))
            if at is not None:
                period = len(self._text) - at  # a match that reaches into the end of the text repeats itself
                return [self._text[at + n % period] for n in range(min(most, self._length))]
        return []

    def judge(self, drafted: int, accepted: int) -> None:
        """Adapt the length of drafts: double after one that held, else one more than held."""
        if drafted:
            grown = 2 * self._length if accepted == drafted else accepted + 1
            self._length = min(self._most, grown)


class Verifier:
    """Feeds tokens and drafts to an engine and takes back what was rejected, on every kind of state."""

    def __init__(self, engine: Engine, state: State) -> None:
        """Take over a state; `state` holds it from now on."""
        self.engine = engine
        try:
            self.state, self.rewinds = rewind(state, 0), True
        except CannotRewind:
            self.state, self.rewinds = state, False
        self._before: State = None
        self._fed: Tensor | None = None

    def feed(self, tokens: Sequence[int], drafts: Sequence[Sequence[int]]) -> Tensor:
        """Feed each row's last token (-1: idle row) and its draft: logits (B, 1 + longest draft, V)."""
        longest = max(map(len, drafts))
        if longest == 0:
            self._fed = None
            logits, self.state = self.engine.step(_tensor(tokens, self.engine), self.state)
            return logits[:, None]
        rows = [[t, *d, *[-1] * (longest - len(d))] for t, d in zip(tokens, drafts, strict=True)]
        self._fed = _tensor(rows, self.engine)
        if not self.rewinds:
            self._before = select(self.state, _tensor(range(len(rows)), self.engine))
        logits, self.state = self.engine.verify(self._fed, self.state)
        return logits

    def take_back(self, rejected: Sequence[int]) -> None:
        """Forget the last rejected[i] tokens of row i of the last call."""
        if self._fed is None or not any(rejected):
            return
        back = _tensor(rejected, self.engine)
        if self.rewinds:
            self.state = rewind(self.state, back)
            return
        count = (self._fed >= 0).sum(1, keepdim=True) - back[:, None]
        place = torch.arange(self._fed.shape[1], device=self._fed.device)
        again = torch.where(place < count, self._fed, -1)[:, : max(1, int(count.max()))]
        _, self.state = self.engine.verify(again, self._before)
        self._before = None

    def keep(self, rows: Sequence[int]) -> None:
        """Row i becomes row rows[i]."""
        self.state = select(self.state, _tensor(rows, self.engine))


def _tensor(values: Sequence[int] | Sequence[Sequence[int]] | range, engine: Engine) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device=engine.device)
