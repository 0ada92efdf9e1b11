"""Continue prompts: greedy, sampled, speculative, in ragged batches, token by token or all at once."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from writehead.decode.beam import search
from writehead.decode.engine import Engine, TorchEngine
from writehead.decode.loop import decode
from writehead.decode.options import Options
from writehead.decode.prompts import prepare
from writehead.decode.result import Callback, Event, Generation, Result, Timings, Tokenizer, Track
from writehead.model.decoder import Decoder
from writehead.model.seq2seq import Seq2Seq


def generate(
    model: Engine | Decoder | Seq2Seq,
    prompts: Sequence[Sequence[int]],
    options: Options | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    callback: Callback | None = None,
    **values: Any,
) -> Result:
    """Continue each prompt.

    Args:
        model: an engine or a model; a model is in evaluation mode meanwhile and gets its mode back.
        prompts: token ids of each; for an encoder-decoder model the sources.
        options: how; default greedy, up to 256 tokens.
        tokenizer: gives the texts, stop strings, and a beginning for empty prompts.
        callback: called with each `Event` as it happens; not with beams.
        values: single options by name, which go over `options`: max_new_tokens=64, temperature=0.8, ...

    Returns:
        num_return_sequences continuations of each prompt, in the order of the prompts, and timings.

    Raises:
        ValueError: options, prompts or a context that cannot be had; NaN logits.
    """
    training = isinstance(model, torch.nn.Module) and model.training
    try:
        run = Stream(model, prompts, Options.of(options, values), tokenizer, beams=callback is None)
        for event in run:
            if callback is not None:
                callback(event)
        return Result(run.generations, run.timings)
    finally:
        if isinstance(model, torch.nn.Module):
            model.train(training)


def stream(
    model: Engine | Decoder | Seq2Seq,
    prompts: Sequence[Sequence[int]],
    options: Options | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    **values: Any,
) -> "Stream":
    """Continue each prompt, token by token: an iterator over events; the arguments are those of `generate`.

    Raises:
        ValueError: as `generate`, and with beams, whose texts are known at the end only.
    """
    return Stream(model, prompts, Options.of(options, values), tokenizer, beams=False)


class Stream(Iterator[Event]):
    """A run of decoding: iterate over its events.

    Attributes:
        generations: the continuations so far; they grow.
        timings: what they cost so far.
    """

    def __init__(
        self,
        model: Engine | Decoder | Seq2Seq,
        prompts: Sequence[Sequence[int]],
        options: Options,
        tokenizer: Tokenizer | None,
        beams: bool,
    ) -> None:
        """Check everything; nothing is computed yet."""
        if options.num_beams > 1 and not beams:
            raise ValueError(
                f"num_beams={options.num_beams} cannot be streamed: the best text is known at the end only; "
                "use num_beams=1, or no callback"
            )
        self.engine: Engine = TorchEngine(model) if isinstance(model, Decoder | Seq2Seq) else model
        options = options.ending_at(tokenizer)
        self._prompts = prepare(self.engine, prompts, options, tokenizer)
        self._options, self._tokenizer = options, tokenizer
        self.timings = Timings(self.engine.name, weight_bytes=self.engine.weight_bytes())
        self.generations: list[Generation] = []
        self._events = self._search() if options.num_beams > 1 else self._decode()

    def __next__(self) -> Event:
        with torch.inference_mode():
            return next(self._events)

    def _decode(self) -> Iterator[Event]:
        copies = self._options.num_return_sequences
        tracks = [
            Track(row, row // copies, self._options, self._tokenizer, self.engine.reads_source)
            for row in range(copies * len(self._prompts.given))
        ]
        self.generations = [track.generation for track in tracks]
        yield from decode(self.engine, self._prompts, self._options, tracks, self.timings)

    def _search(self) -> Iterator[Event]:
        self.generations = search(self.engine, self._prompts, self._options, self._tokenizer, self.timings)
        yield from ()
