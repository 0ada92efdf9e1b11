"""The laws of time and rows: split, causal, select, padding."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from writehead.core.slots import Store
from writehead.core.state import State, join, select
from writehead.laws.subject import (
    Draw,
    Findings,
    Subject,
    Tokens,
    gap,
    gapped,
    leaf_of,
    nothing,
    spread,
)


def split(s: Subject, draw: Draw) -> Findings:
    T = s.length
    first = draw.tokens(T)
    later = draw.tokens(7, first)
    weight = draw.normal(3, T + 7, draw.dim)

    def outcome(sizes: list[int], store: Store, graph: bool) -> dict[str, Tensor]:
        a, b = (leaf_of(first), leaf_of(later)) if graph else (first, later)
        with torch.set_grad_enabled(graph):
            y, state = s.run(a, s.start((0, 1, 2), store), sizes)
            z, _ = s.run(b, state)
            found = {"outputs": y[a.valid], "outputs of the next call": z[b.valid]}
            if graph:
                both = torch.cat([y, z], 1)
                value = (both * weight)[torch.cat([a.valid, b.valid], 1)].sum()
                found |= s.gradients(value, {"x": a.x, "x of the next call": b.x})
        return found

    whole = outcome([T], s.store, s.exact)
    if not s.reads:
        with torch.no_grad():
            yield "state None", gap(s.run(first, None)[0], s.run(first, s.start((0, 1, 2), Store()))[0])
    cuts = [[1] * T, [1, T - 1], [T - 1, 1], *(draw.pieces(T, parts) for parts in (2, 3))]
    roomy = replace(s.store, capacity=s.store.capacity + T // 2, slack=s.store.slack + 2)
    for store, graph in ((s.store, True), (s.store, False), (roomy, False)):
        for sizes in cuts if s.exact or not graph else []:
            for what, value in outcome(sizes, store, graph).items():
                yield f"{what}, calls of {sizes} tokens", gap(value, whole[what])


def causal(s: Subject, draw: Draw) -> Findings:
    T = s.length
    past = draw.tokens(5)

    def begin(after: Tokens | None) -> State:
        return s.start((0, 1, 2)) if after is None else s.run(after, s.start((0, 1, 2)))[1]

    for after in (None, past):
        where = "" if after is None else " of a second call"
        tokens = leaf_of(draw.tokens(T, after))
        plain, _ = s.run(tokens, begin(after))
        for t in (1, *sorted(draw.plain.sample(range(2, T - 1), 8)), T - 1):
            changed = tokens.x.detach().clone()
            changed[:, t] += 10 * draw.normal(3, draw.dim)
            before = tokens.valid[:, :t]
            with torch.no_grad():
                y, _ = s.run(Tokens(changed, tokens.index), begin(after))
            yield f"outputs before token {t}{where}, changed", gap(y[:, :t][before], plain[:, :t][before])
            weight = draw.normal(3, t, draw.dim)
            gradient = s.gradients((plain[:, :t] * weight)[before].sum(), {"x": tokens.x})["gradient of x"]
            yield (
                f"gradient of outputs before token {t}{where} by later tokens",
                nothing(gradient[:, t:]),
            )


def select_rows(s: Subject, draw: Draw) -> Findings:
    first = draw.tokens(s.length)
    later, other = draw.tokens(12, first), draw.tokens(12, first)
    with torch.no_grad():
        alone, then = [], []
        for row in range(3):
            y, state = s.run(first.rows([row]), s.start([row]))
            alone.append(y[0])
            then.append(s.run(later.rows([row]), state)[0][0])

        y, state = s.run(first, s.start((0, 1, 2)))
        yield from _against("three", y, (0, 1, 2), first, alone)
        for rows in ([0, 1, 2], [2, 0, 1], [1, 1, 0, 2, 2], [0, 2], [2]):
            index = torch.tensor(rows)
            y, _ = s.run(first.rows(rows), select(s.start((0, 1, 2)), index))
            yield from _against(f"an empty past selected by {rows}", y, rows, first, alone)
            y, _ = s.run(later.rows(rows), select(state, index))
            yield from _against(f"a state selected by {rows}", y, rows, later, then)
            s.run(other.rows(rows), select(state, index))  # must leave the state as it was
        twice = Tokens(
            torch.cat([later.x[1:2], other.x[1:2]]), torch.cat([later.index[1:2], other.index[1:2]])
        )
        y, _ = s.run(twice, select(state, torch.tensor([1, 1])))
        yield from _against("a row continued in two ways", y, [1], later, then)
        y, _ = s.run(later, state)
        yield from _against("a state that was selected from", y, (0, 1, 2), later, then)
        yield from _joined(s, first, later, then)
    leaf = leaf_of(first)
    y, _ = s.run(leaf, s.start((0, 1, 2)))
    for row in range(3):
        by = s.gradients((y[row] * draw.normal(*y.shape[1:]))[leaf.valid[row]].sum(), {"x": leaf.x})
        others = [i for i in range(3) if i != row]
        yield f"gradient of row {row} by other rows", nothing(by["gradient of x"][others])


def _against(what: str, y: Tensor, rows: Sequence[int], tokens: Tokens, right: list[Tensor]) -> Findings:
    """Is each row of y, which are those rows of `tokens`, what it is alone?"""
    for i, row in enumerate(rows):
        valid = tokens.valid[row]
        yield f"row {row} of {what}", gap(y[i][valid], right[row][valid])


def _joined(s: Subject, first: Tokens, later: Tokens, then: list[Tensor]) -> Findings:
    """Batches that were run apart, the second one in a cache of another capacity."""
    room = replace(s.store, capacity=s.store.capacity + 2 * s.length)
    begin = first.split([12, s.length - 12])[0]
    begun = [s.run(begin.rows([row]), s.start([row]))[0][0] for row in range(3)]
    for left, right in (((0,), (1, 2)), ((2, 1), (0,))):
        rows = (*left, *right)
        for a, b in ((s.store, room), (room, s.store)):
            _, p = s.run(first.rows(left), s.start(left, a))
            _, q = s.run(first.rows(right), s.start(right, b))
            y, _ = s.run(later.rows(rows), join(p, q))
            yield from _against(f"batches {left} and {right} joined", y, rows, later, then)
        _, p = s.run(first.rows(left), s.start(left))
        mixed = [later.rows(left), begin.rows(right)]
        both = Tokens(torch.cat([t.x for t in mixed]), torch.cat([t.index for t in mixed]))
        y, _ = s.run(both, join(p, s.start(right)))
        yield from _against(f"rows {left} joined by new ones", y, left, later, then)
        yield from _against(f"new rows that joined {left}", y[len(left) :], right, begin, begun)


def padding(s: Subject, draw: Draw) -> Findings:
    T, pads = s.length, 5
    tokens = draw.tokens(T, ragged=False)
    later = draw.tokens(7, tokens, ragged=False)
    weight = draw.normal(3, T, draw.dim)
    leaf = leaf_of(tokens)
    plain, state = s.run(leaf, s.start((0, 1, 2)))
    right = s.gradients((plain * weight).sum(), {"x": leaf.x})
    with torch.no_grad():
        after, _ = s.run(later, state)
        singly, _ = s.run(tokens, s.start((0, 1, 2)), [1] * T)
    for where, places in gapped(draw, T, pads).items():
        leaf = leaf_of(spread(tokens, places, T + pads, s.garbage))
        rows = torch.arange(3)[:, None]
        y, state = s.run(leaf, s.start((0, 1, 2), pads=pads))
        yield f"outputs beside padding {where}", gap(y[rows, places], plain)
        found = s.gradients((y[rows, places] * weight).sum(), {"x": leaf.x})
        by = found.pop("gradient of x")
        yield f"gradient by padding {where}", nothing(by[~leaf.valid])
        yield f"gradient of x beside padding {where}", gap(by[rows, places], right["gradient of x"])
        for what, value in found.items():
            yield f"{what} beside padding {where}", gap(value, right[what])
        with torch.no_grad():
            z, _ = s.run(later, state)
            yield f"outputs of the call after padding {where}", gap(z, after)
            if where in ("in different places", "anywhere"):
                y, _ = s.run(Tokens(leaf.x.detach(), leaf.index), s.start((0, 1, 2)), [1] * (T + pads))
                yield f"outputs of single tokens beside padding {where}", gap(y[rows, places], singly)
    with torch.no_grad():
        yield from _idle(s, tokens, later, plain, after)


def _idle(s: Subject, tokens: Tokens, later: Tokens, plain: Tensor, after: Tensor) -> Findings:
    """Calls that are padding for some rows, or for all."""
    none = Tokens(torch.full_like(tokens.x, s.garbage), torch.full_like(tokens.index, -1))

    def only(*rows: int) -> Tokens:
        mine = torch.zeros(3, dtype=torch.bool)
        mine[list(rows)] = True
        return Tokens(
            torch.where(mine[:, None, None], tokens.x, none.x),
            torch.where(mine[:, None], tokens.index, none.index),
        )

    _, state = s.run(Tokens(none.x[:, :3], none.index[:, :3]), s.start((0, 1, 2)))
    y, state = s.run(only(0, 2), state)
    yield "outputs of two rows while one has padding only", gap(y[[0, 2]], plain[[0, 2]])
    _, state = s.run(Tokens(none.x[:, :1], none.index[:, :1]), state)
    y, state = s.run(only(1), state)
    yield "outputs of a row that comes after calls of padding", gap(y[1], plain[1])
    _, state = s.run(none, state)
    y, _ = s.run(later, state)
    yield "outputs after a whole call of padding", gap(y, after)
