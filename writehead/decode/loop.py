"""The loop of greedy, sampled and speculative decoding: choose a token for each row, feed it, drop rows.

Plain decoding is speculation without drafts, so there is one loop.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from writehead.core.state import select
from writehead.decode.engine import Engine
from writehead.decode.options import Options
from writehead.decode.prompts import Prompts
from writehead.decode.result import Event, Timings, Track
from writehead.decode.sampling import Rows, pick
from writehead.decode.speculate import Drafts, Verifier

IDLE = 8  # finished rows leave once they are one in so many: that copies the caches of the others
REFRESH = 16  # steps between looks at how large the caches have become, for the report


def decode(
    engine: Engine, prompts: Prompts, options: Options, tracks: Sequence[Track], timings: Timings
) -> Iterator[Event]:
    """Continue each track to its end; the tracks of a prompt follow one another.

    Args:
        engine: runs the model.
        prompts: what `prepare` laid out.
        options: without beams.
        tracks: take the tokens.
        timings: are kept up to date.

    Raises:
        ValueError: NaN logits.
    """
    clock = time.perf_counter()
    logits, state = engine.start(prompts.tokens, prompts.store, prompts.source)
    copies = len(tracks) // len(prompts.given)
    if copies > 1:
        index = torch.arange(len(prompts.given), device=logits.device).repeat_interleave(copies)
        logits, state = logits[index], select(state, index)
    verifier, chooser = Verifier(engine, state), Chooser(options, prompts, len(tracks), engine)
    del state  # its memory belongs to the verifier
    live, cost = list(tracks), Cost(engine, prompts, timings)
    most = options.prompt_lookup_num_tokens
    speculation = Drafts({t.row: prompts.given[t.generation.prompt] for t in tracks}, most)
    drafts: list[list[int]] = [[] for _ in live]
    block, first = logits[:, None], True
    while True:
        events, held = chooser.choose(block, live, drafts)
        over = [track.finished for track in live]
        verifier.take_back([0 if o else len(d) - h for o, d, h in zip(over, drafts, held, strict=True)])
        seconds = time.perf_counter() - clock
        speculation.learn(events, live, drafts, held, None if first else seconds)
        cost.book(seconds, len(events), sum(map(len, drafts)), sum(held))
        first = False
        yield from events
        clock = time.perf_counter()
        if all(over):
            return
        if sum(over) * IDLE >= len(over):
            rows = [i for i, o in enumerate(over) if not o]
            live = [live[i] for i in rows]
            if len(rows) < len(over):
                verifier.keep(rows)
                chooser.keep(rows)
        drafts = speculation.next(live)
        block = verifier.feed([-1 if t.finished else t.generation.tokens[-1] for t in live], drafts)
        cost.step(live)


class Chooser:
    """Chooses tokens for the rows of a batch, and keeps what choosing has to remember of each."""

    def __init__(self, options: Options, prompts: Prompts, rows: int, engine: Engine) -> None:
        """Start for `rows` rows, the copies of a prompt one after the other."""
        self._sampling, self._least = options.sampling, options.min_new_tokens
        self._eos = torch.tensor(sorted(options.eos), dtype=torch.int64, device=engine.device)
        self._rows = Rows.start(self._sampling, range(rows), engine.vocab, engine.device)
        copies = rows // len(prompts.given)
        self._rows.note(prompts.tokens.to(engine.device).repeat_interleave(copies, 0))

    def choose(
        self, block: Tensor, live: Sequence[Track], drafts: Sequence[Sequence[int]]
    ) -> tuple[list[Event], list[int]]:
        """Choose tokens as plain decoding would, row by row as far as the drafts agree.

        Args:
            block: (B, 1 + longest draft, V) logits after each row's last token and its draft.
            live: the B tracks; finished ones take nothing.
            drafts: of each row.

        Returns:
            What happened, and how many tokens of each draft held.
        """
        events, held = list[Event](), [0] * len(live)
        active = [i for i, track in enumerate(live) if not track.finished]
        for j in range(block.shape[1]):
            if not active:
                break
            tokens, logprobs = self._pick(block[:, j], active, live)
            still = []
            for i, token, logprob in zip(active, tokens.tolist(), logprobs.tolist(), strict=True):
                events.append(live[i].accept(token, logprob))
                if j < len(drafts[i]) and drafts[i][j] == token:
                    held[i] += 1
                    if not live[i].finished:
                        still.append(i)
            active = still
        return events, held

    def keep(self, rows: Sequence[int]) -> None:
        """Row i becomes row rows[i]."""
        self._rows = self._rows.select(rows)

    def _pick(self, logits: Tensor, active: list[int], live: Sequence[Track]) -> tuple[Tensor, Tensor]:
        rows = self._rows
        if len(active) < len(live):
            logits, rows = logits[active], rows.select(active)
        short = [n for n, i in enumerate(active) if len(live[i].generation.tokens) < self._least]
        if short and len(self._eos):
            allowed = logits.clone()
            allowed[torch.tensor(short, device=logits.device)[:, None], self._eos] = -torch.inf
            tokens, _ = pick(allowed, self._sampling, rows)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            logprobs = wide.gather(1, tokens[:, None]).squeeze(1)
        else:
            tokens, logprobs = pick(logits, self._sampling, rows)
        if rows is self._rows:
            rows.note(tokens)
        elif self._rows.seen is not None:
            self._rows.note(
                tokens.new_full((len(live),), -1).index_copy(0, tokens.new_tensor(active), tokens)
            )
        return tokens, logprobs


class Cost:
    """Books what decoding costs into timings; the first round is prefill."""

    def __init__(self, engine: Engine, prompts: Prompts, timings: Timings) -> None:
        self._engine, self._timings = engine, timings
        self._store, self._start = prompts.store, prompts.mean_length
        self._memory = engine.memory_bytes(*prompts.source.shape) if prompts.source is not None else 0
        timings.prefill_tokens = prompts.count
        self._first, self._size = True, 0

    def book(self, seconds: float, tokens: int, drafted: int = 0, held: int = 0) -> None:
        """A round took so long and gave so many tokens."""
        t = self._timings
        if self._first:
            t.prefill_seconds, self._first = seconds, False
            return
        t.decode_seconds += seconds
        t.decode_tokens += tokens
        t.drafted_tokens += drafted
        t.accepted_tokens += held

    def step(self, live: Sequence[Track]) -> None:
        """An engine took a step for these tracks."""
        self.read(len(live), sum(len(track.generation.tokens) for track in live) / len(live))

    def read(self, rows: int, new: float) -> None:
        """An engine took a step for so many rows that have said so many tokens on average."""
        t = self._timings
        if t.decode_steps % REFRESH == 0:
            context = int(self._start + new)
            in_use = replace(self._store, capacity=context)
            self._size = self._engine.state_bytes(rows, context, in_use) + self._memory
        t.decode_steps += 1
        t.state_bytes += (self._size - t.state_bytes) / t.decode_steps
