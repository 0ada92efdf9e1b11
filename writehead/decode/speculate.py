"""Prompt-lookup speculation: draft what followed the same words before, and let the model verify it.

A draft is certain of itself, so verification is exact: at each position a token is chosen as plain decoding
would choose it, from the same distribution with the same random numbers, and the draft holds while it agrees.
Verifying takes longer than a plain step, so drafts are fed as far as what was measured says that they pay.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import accumulate, repeat
from operator import mul

import torch
from torch import Tensor

from writehead.core.state import CannotRewind, State, rewind, select
from writehead.decode.engine import Engine
from writehead.decode.result import Event, Track

SAMPLES, TRUSTED = 8, 3  # timings kept of a length, and how many of them must be there to be believed
FORGET = 0.95  # what a round leaves of the weight of those before it
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


class Pace:
    """How long drafts pay: what calls of each length took, and how often a drafted token held."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}  # by the tokens a row that a call takes
        self._rows = 0
        self._tried = self._held = 1.0

    def took(self, rows: int, tokens: int, seconds: float) -> None:
        """A round with so many rows, and tokens for each of them, took so long."""
        if rows != self._rows:
            self._seconds, self._rows = {}, rows
        self._seconds.setdefault(tokens, deque(maxlen=SAMPLES)).append(seconds)

    def judged(self, drafted: int, held: int) -> None:
        """Of a draft so many tokens held; what comes after the first that did not says nothing."""
        self._tried = FORGET * self._tried + min(held + 1, drafted)
        self._held = FORGET * self._held + held

    def longest(self, lengths: Sequence[int]) -> int:
        """The longest draft to feed, where the rows have drafts of these lengths (0 = none, or idle)."""
        share, most = self._held / self._tried, max(lengths, default=0)
        if self._cost(1) is None:  # a few plain steps tell what drafts must beat
            rounds = sum(map(len, self._seconds.values())) - len(self._seconds.get(1, ()))
            return most if share > 0.5 and rounds < TRUSTED else 0
        # a draft of n tokens is expected to give 1 + share + ... + share^n tokens
        gains = list(accumulate(accumulate(repeat(share, most), mul, initial=1.0)))
        rates = [
            sum(gains[min(n, length)] for length in lengths) / (self._cost(1 + n) or 1)
            for n in range(most + 1)
        ]
        return max(range(most + 1), key=lambda n: rates[n])

    def _cost(self, tokens: int) -> float | None:
        """Seconds of a round: the least of those measured, or between those of its neighbours."""
        known = {n: min(times) for n, times in self._seconds.items() if len(times) >= TRUSTED}
        below = max((n for n in known if n <= tokens), default=None)
        above = min((n for n in known if n >= tokens), default=None)
        if below is None:
            return None
        if above is None or above == below:
            return known[below]  # no worse than the longest that is known, until it is tried
        way = (tokens - below) / (above - below)
        return known[below] + way * (known[above] - known[below])


class Drafts:
    """The drafts of all rows, as long as they pay."""

    def __init__(self, texts: Mapping[int, Sequence[int]], most: int) -> None:
        """Start from the prompts.

        Args:
            texts: token ids by the numbers of the tracks.
            most: tokens of a draft at most; 0 = none are made.
        """
        self._lookups = {row: Lookup(text, most) for row, text in texts.items()} if most else {}
        self._pace, self._offered = Pace(), list[list[int]]()

    def next(self, live: Sequence[Track]) -> list[list[int]]:
        """The drafts to feed for these tracks."""
        if not self._lookups:
            return [[] for _ in live]
        self._offered = [
            [] if track.finished else self._lookups[track.row].draft(track.left - 1) for track in live
        ]
        longest = self._pace.longest([len(draft) for draft in self._offered])
        return [draft[:longest] for draft in self._offered]

    def learn(
        self,
        events: Sequence[Event],
        live: Sequence[Track],
        drafts: Sequence[Sequence[int]],
        held: Sequence[int],
        seconds: float | None,
    ) -> None:
        """What became of drafts: the tokens chosen, how many held, what the round took (None: unknown)."""
        if not self._lookups:
            return
        first: dict[int, int] = {}
        for event in events:
            first.setdefault(event.row, event.token)
            self._lookups[event.row].extend([event.token])
        for track, offered, draft, count in zip(live, self._offered, drafts, held, strict=False):
            if draft:
                self._lookups[track.row].judge(len(draft), count)
                self._pace.judged(len(draft), count)
            elif offered and track.row in first:  # it was not fed, but the text tells what it was worth
                self._pace.judged(1, int(offered[0] == first[track.row]))
        if seconds is not None:
            self._pace.took(len(live), 1 + max(map(len, drafts)), seconds)


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
