"""Continues one text with a saved packed model before PyTorch is there, and without it.

A saved model says how the kernels are to be called (`native.outline`), so a text that is greedy or sampled
alone needs NumPy only: its first token comes when PyTorch would still be imported. Everything else, and every
folder that is not quite as expected, is for `engines.open_engine`.
"""

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from writehead.convert.find import find
from writehead.convert.packed_map import PackedMap, is_packed, outline_in, read_packed_header
from writehead.convert.tokenizer import Tokenizer
from writehead.decode.filters import choose, log_softmax, row_generators
from writehead.decode.limits import check_context, check_prompts, check_room, warn_of_length
from writehead.decode.options import Options
from writehead.decode.result import Event, Generation, Timings, Track
from writehead.native.library import library
from writehead.native.outline import TABLE
from writehead.native.solo import SoloEngine
from writehead.native.structs import FORMATS

HONOURED = {
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "eos_token_id",
    "stop_strings",
}


@dataclass(frozen=True)
class Solo:
    """A model that is ready to continue one text.

    Attributes:
        engine: runs it.
        tokenizer: None if the folder holds none.
        source: the folder.
        dtype: the format of its matrices.
        why: about the engine, in words for a report.
        weight_bytes: that one step reads.
    """

    engine: SoloEngine
    tokenizer: Tokenizer | None
    source: Path
    dtype: str
    why: str
    weight_bytes: int


def plain(options: Options) -> bool:
    """Is nothing asked for that needs PyTorch?"""
    usual = Options()
    others = (field.name for field in fields(Options) if field.name not in HONOURED)
    return all(getattr(options, name) == getattr(usual, name) for name in others)


def open_solo(name: str | Path, *, dtype: str | None = None, threads: int | None = None) -> Solo | None:
    """Open a folder of `save_packed`; None if it is anything else, or broken, which `open_engine` explains.

    Args:
        name: of the folder, as for `load`.
        dtype: None, or the format that it must have.
        threads: that compute; default the physical cores that this process may use.
    """
    try:
        folder = find(name)
        if not is_packed(folder) or library()[0] is None:
            return None
        header = read_packed_header(folder)
        outline, format = outline_in(folder, header), header.metadata.get("format")
        if outline is None or outline.places == "function" or format not in FORMATS:
            return None
        if dtype not in (None, format):
            return None
        weights = PackedMap(folder, header)
        tabled = outline.places == "table"
        table = weights.table(TABLE, outline.positions, outline.dim) if tabled else None
        engine = SoloEngine(outline, weights, table, threads)
        weights.check_all_used()
        tokenizer = Tokenizer.from_directory(folder) if (folder / "tokenizer.json").is_file() else None
    except (ValueError, OSError, RecursionError):
        return None
    count = f"{engine.threads} thread{'s' * (engine.threads > 1)}"
    why = f"{engine.instructions}, {format}, {count}, without PyTorch"
    looked_up = [TABLE] if outline.tied else [TABLE, "embedding.table"]
    read = weights.nbytes - sum(map(weights.bytes_of, looked_up))
    return Solo(engine, tokenizer, folder, format, why, read)


class SoloStream(Iterator[Event]):
    """As `decode.generate.Stream`, of one text: iterate over its events.

    Attributes:
        generations: the one continuation so far; it grows.
        timings: what it cost so far.
    """

    def __init__(self, solo: Solo, prompt: list[int], options: Options) -> None:
        """Check everything; nothing is computed yet.

        Raises:
            ValueError: a prompt or a context that cannot be had.
        """
        engine, options = solo.engine, options.ending_at(solo.tokenizer)
        (self._prompt,) = check_prompts(engine, [prompt], options, solo.tokenizer)
        length, new = len(self._prompt), options.max_new_tokens
        check_context(engine, length, new)
        check_room(engine.state_bytes(length + new), 1, length + new, engine.vocab)
        warn_of_length(engine, length, new)
        self._engine, self._options, self._room = engine, options, length + new
        self._track = Track(0, 0, options, solo.tokenizer, False)
        self.generations: list[Generation] = [self._track.generation]
        self.timings = Timings(engine.name, prefill_tokens=length, weight_bytes=solo.weight_bytes)
        self._events = self._decode()

    def __next__(self) -> Event:
        return next(self._events)

    def _decode(self) -> Iterator[Event]:
        t, sampling, clock = self.timings, self._options.sampling, time.perf_counter()
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        (generator,) = row_generators(seed, [0])
        logits, state = self._engine.feed(self._prompt, self._engine.empty(self._room))
        while True:
            token = choose(0, logits, sampling, generator)
            event = self._track.accept(token, float(log_softmax(logits)[token]))
            seconds = time.perf_counter() - clock
            if t.decode_steps:
                t.decode_seconds, t.decode_tokens = t.decode_seconds + seconds, t.decode_tokens + 1
            else:
                t.prefill_seconds = seconds
            yield event
            if self._track.finished:
                return
            clock = time.perf_counter()
            logits, state = self._engine.feed([token], state)
            t.decode_steps += 1
            size = self._engine.state_bytes(len(self._prompt) + t.decode_steps)
            t.state_bytes += (size - t.state_bytes) / t.decode_steps
