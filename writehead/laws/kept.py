"""The laws of what is kept: budget, rewind."""

from dataclasses import replace

import torch
from torch import Tensor

from writehead.core.slots import Store
from writehead.core.state import CannotRewind, nbytes, rewind
from writehead.laws.subject import BrokenError, Draw, Findings, Subject, Tokens, gap


def budget(s: Subject, draw: Draw) -> Findings:
    if s.reads:
        state = s.start((0, 1, 2))
        before = nbytes(state)
        with torch.no_grad():
            _, state = s.run(draw.tokens(s.length), state)
        yield _bytes("a memory after tokens", nbytes(state), before)
        return
    if not hasattr(s.mixer, "state_bytes"):
        raise BrokenError(
            "the mixer has no state_bytes(batch, context, itemsize, store): its state has no budget"
        )
    for more, slack in ((0, 0), (5, 3), (3 * s.length, 1)):
        store = replace(s.store, capacity=s.store.capacity + more, slack=s.store.slack + slack)
        empty = nbytes(s.start((0, 1, 2), store))
        yield _bytes(f"an empty state with {store}", empty, s.mixer.state_bytes(3, 0, 8, store))
        for context in (1, 7, s.length, 40):
            yield from _spent(s, draw, store, context)
    yield from _grown(s, draw)


def _bytes(what: str, held: int, predicted: int) -> tuple[str, float]:
    if held != predicted:
        raise BrokenError(f"{what} holds {held} bytes, not the {predicted} predicted")
    return f"{what} holds {held} bytes", 0.0


def _spent(s: Subject, draw: Draw, store: Store, context: int) -> Findings:
    """The bytes after `context` tokens, reached in one call, in pieces and with padding."""
    tokens = draw.tokens(context, ragged=False)
    gaps = draw.tokens(context)  # its first row is full
    cuts: list[tuple[Tokens, list[int]]] = [(tokens, [context]), (gaps, [context])]
    if context > 1:
        cuts += [(tokens, draw.pieces(context, 2)), (gaps, draw.pieces(context, min(4, context)))]
    for fed, sizes in cuts:
        with torch.no_grad():
            _, state = s.run(fed, s.start((0, 1, 2), store), sizes)
        what = f"the state of 3 rows after {context} tokens in calls of {sizes} with {store}"
        yield _bytes(what, nbytes(state), s.mixer.state_bytes(3, context, 8, store))


def _grown(s: Subject, draw: Draw) -> Findings:
    """Does the state grow as declared? Fed up to 512 tokens, predicted from there on."""
    state, row, held = s.start([0]), draw.tokens(512, ragged=False).rows([0]), {}
    for i, piece in enumerate(row.split([64] * 8)):
        context = 64 * (i + 1)
        with torch.no_grad():
            _, state = s.run(piece, state)
        held[context] = nbytes(state)
        what = f"the state after {context} tokens"
        yield _bytes(what, held[context], s.mixer.state_bytes(1, context, 8, s.store))
    far = s.mixer.state_bytes(1, 4096, 8, s.store)
    grown = f"{held[64]} bytes at 64 tokens, {held[512]} at 512, {far} at 4096"
    linear = any(letter in s.decodes for letter in "SN") if s.decodes else None
    if linear is False and far > held[512]:
        raise BrokenError(f"declared {s.decodes}, which is bounded, but the state has {grown}")
    if linear and not 8 * held[64] <= far <= 128 * held[64]:  # allocations are powers of two
        raise BrokenError(f"declared {s.decodes}, which is linear, but the state has {grown}")
    yield grown, 0.0


def rewinds(s: Subject, draw: Draw) -> Findings:
    slack = 4
    first = draw.tokens(s.length)
    for own in (replace(s.store, slack=s.store.slack + slack), s.store):
        able: dict[tuple[int, ...], bool] = {}
        for counts in ([1] * 3, [2] * 3, [slack] * 3, [0, slack, 1], [slack + 3] * 3, [s.length // 2, 0, 1]):
            extra = _counted(draw, first, counts)
            later = draw.tokens(9, first)
            with torch.no_grad():
                _, state = s.run(first, s.start((0, 1, 2), own))
                right, _ = s.run(later, state)
                _, state = s.run(first, s.start((0, 1, 2), own))
                _, state = s.run(extra, state)
                n: int | Tensor = counts[0] if len(set(counts)) == 1 else torch.tensor(counts)
                try:
                    state = rewind(state, n)
                except CannotRewind:
                    able[tuple(counts)] = False
                    continue
                able[tuple(counts)] = True
                y, _ = s.run(later, state)
            yield (
                f"outputs after taking back {counts} tokens with {own}",
                gap(y[later.valid], right[later.valid]),
            )
        within = {n: "done" if able[n] else "refused" for n in able if max(n) <= own.slack}
        if len(set(within.values())) == 2:
            raise BrokenError(f"with a slack of {own.slack}, some counts are taken back only: {within}")
        most = max((max(n) for n in able if able[n]), default=0)
        yield f"with a slack of {own.slack}, up to {most} of {s.length // 2} tokens taken back", 0.0


def _counted(draw: Draw, after: Tokens, counts: list[int]) -> Tokens:
    """counts[i] tokens of row i, with padding between and around."""
    length = 2 * max(counts)
    valid = torch.zeros(3, length, dtype=torch.bool)
    for row, count in enumerate(counts):
        valid[row, draw.plain.sample(range(length), count)] = True
    index = torch.where(valid, valid.cumsum(1) + after.index.amax(1, keepdim=True), -1)
    return Tokens(draw.normal(3, length, draw.dim), index)
