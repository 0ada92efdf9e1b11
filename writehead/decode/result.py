"""What decoding gives back: continuations as they grow, and what they cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, overload

from writehead.decode.options import Options
from writehead.decode.stream import TextStream


class Tokenizer(Protocol):
    """What decoding asks of a tokenizer.

    Attributes:
        bos: what an empty prompt starts from; None = nothing.
        eos: the tokens that end a text unless the options name others.
    """

    bos: int | None
    eos: frozenset[int]

    @property
    def strips_space(self) -> bool:
        """Has a text one space more in front than its author wrote?"""

    def is_special(self, number: int) -> bool:
        """Is a token no part of the text?"""

    def token_bytes(self, number: int) -> bytes:
        """The bytes that a token stands for."""


class Event(NamedTuple):
    """One more token of one continuation.

    Attributes:
        row: which continuation: prompt number * num_return_sequences + number of the sequence.
        token, logprob: the token and its log-probability under the model itself, untempered and unfiltered.
        text: what became safe to print, often nothing; always nothing without a tokenizer.
        finish_reason: "eos", "stop" or "length" with the last token, else None.
    """

    row: int
    token: int
    logprob: float
    text: str
    finish_reason: str | None


@dataclass
class Generation:
    """One continuation.

    Attributes:
        prompt: number of the prompt.
        tokens: what was added, an end-of-sequence token included.
        logprobs: of each token, under the model itself, untempered and unfiltered.
        finish_reason: "eos", "stop", "length"; None while it grows.
        text: the tokens as text without end-of-sequence and stop string; None without a tokenizer.
        score: of a beam: the sum of its logprobs over the length penalty.
    """

    prompt: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    text: str | None = None
    score: float | None = None


@dataclass
class Timings:
    """What decoding cost; the first token of a continuation comes from prefill, the others from steps.

    Attributes:
        engine: its name.
        prefill_seconds, prefill_tokens: reading the prompts.
        decode_seconds, decode_tokens, decode_steps: everything after; a step adds a token to each row, with
            speculation several; each beam's token counts.
        drafted_tokens, accepted_tokens: of speculation.
        weight_bytes: what one step reads of the model.
        state_bytes: what one step reads of the caches, on average.
    """

    engine: str
    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    weight_bytes: int = 0
    state_bytes: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Decoded tokens per second."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes of weights and caches read for each decoded token; 0 if there was no decode step."""
        total = (self.weight_bytes + self.state_bytes) * self.decode_steps
        return total / self.decode_tokens if self.decode_tokens else 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes of weights and caches read per second of decoding."""
        return self.bytes_per_token * self.decode_rate


class Result(Sequence[Generation]):
    """The continuations, in the order of the prompts, and what they cost."""

    def __init__(self, generations: list[Generation], timings: Timings) -> None:
        self.generations, self.timings = generations, timings

    def __len__(self) -> int:
        return len(self.generations)

    @overload
    def __getitem__(self, index: int) -> Generation: ...

    @overload
    def __getitem__(self, index: slice) -> list[Generation]: ...

    def __getitem__(self, index: int | slice) -> Generation | list[Generation]:
        return self.generations[index]


class Track:
    """One continuation while it grows: takes tokens, says when it is finished."""

    def __init__(
        self, row: int, prompt: int, options: Options, tokenizer: Tokenizer | None, begins: bool
    ) -> None:
        """Start without tokens.

        Args:
            row, prompt: numbers of the continuation and of its prompt.
            options: when it ends.
            tokenizer: makes text of it.
            begins: is it a text of its own, and not the rest of one?
        """
        self.row, self.generation = row, Generation(prompt)
        self._strips = begins and tokenizer is not None and tokenizer.strips_space
        self._limit, self._eos = options.max_new_tokens, options.eos
        self._text: TextStream | None = None
        if tokenizer is not None:
            self._text = TextStream(self._bytes(tokenizer), options.stop_strings)
            self.generation.text = ""

    @property
    def finished(self) -> bool:
        """Is it complete?"""
        return self.generation.finish_reason is not None

    @property
    def left(self) -> int:
        """Tokens that it may still take."""
        return self._limit - len(self.generation.tokens)

    def accept(self, token: int, logprob: float) -> Event:
        """Take the next token."""
        g = self.generation
        g.tokens.append(token)
        g.logprobs.append(logprob)
        piece = ""
        if token in self._eos:
            g.finish_reason = "eos"
        elif self._text is not None:
            piece = self._text.push(token)
            if self._text.stopped:
                g.finish_reason = "stop"
        if g.finish_reason is None and self.left == 0:
            g.finish_reason = "length"
        if self._text is not None:
            if self.finished:
                piece += self._text.finish()
            g.text = (g.text or "") + piece
        return Event(self.row, token, logprob, piece, g.finish_reason)

    def _bytes(self, tokenizer: Tokenizer) -> Callable[[int], bytes]:
        def token_bytes(token: int) -> bytes:
            if tokenizer.is_special(token):
                return b""
            given = tokenizer.token_bytes(token)
            if self._strips and given:
                self._strips = False
                return given.removeprefix(b" ")
            return given

        return token_bytes


Callback = Callable[[Event], object]
