"""Chains of additive couplings, differentiated without keeping what lies between them.

A coupling takes the streams (a, b) to (b, a + f(b)). Its input follows from its output, a = n - f(b), so
the backward pass computes each f a second time, from the last one to the first, and holds the streams of one
only.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from writehead.core.positions import Positions
from writehead.core.replay import Tape
from writehead.core.state import State, apply, select, tensors

Branch: TypeAlias = Callable[[Tensor, Positions, State], tuple[Tensor, State, Mapping[str, Tensor]]]


@dataclass
class Coupling:
    """One f of a chain.

    Attributes:
        branch: f(b, pos, state) -> what it adds, the state after, auxiliary values.
        modules: those whose parameters it uses.
        state: its past, or None.
        keep: is the state after it wanted?
        streams: names of what it takes from `pos.streams` and hands on there. That cannot be found again from
            its output, so it is kept.
    """

    branch: Branch
    modules: Sequence[nn.Module]
    state: State = None
    keep: bool = False
    streams: Sequence[str] = ()

    def __post_init__(self) -> None:
        found = {id(p): p for module in self.modules for p in module.parameters() if p.requires_grad}
        self.parameters = list(found.values())
        past = {id(t): t for t in tensors(self.state) if t.requires_grad}
        self.past = list(past.values())


@dataclass
class Drift:
    """How far the input that the last backward pass arrived at was from the true one.

    Attributes:
        worst: the largest deviation, relative to the largest value of the input; None = not measured yet.
    """

    worst: float | None = None


@dataclass
class _Run:
    """One pass through a chain: what autograd.Function cannot hold."""

    couplings: Sequence[Coupling]
    pos: Positions
    drift: Drift | None
    first: dict[str, Tensor]  # what was handed to the first beside x
    tapes: list[Tape] = field(default_factory=list)
    after: list[State] = field(default_factory=list)
    aux: list[dict[str, int]] = field(default_factory=list)  # names, and where among the outputs
    places: list[list[int]] = field(default_factory=list)  # of the tensors of each state after
    handed: list[dict[str, Tensor]] = field(default_factory=list)  # what each was handed beside x
    ends: list[Tensor] = field(default_factory=list)  # both streams, which the backward pass takes away


def plain(
    x: Tensor, pos: Positions, couplings: Iterable[Coupling]
) -> tuple[Tensor, Tensor, list[State], list[Mapping[str, Tensor]]]:
    """The chain as it reads, both streams beginning with x; autograd, if on, keeps everything."""
    a = b = x
    states, aux = [], []
    for coupling in couplings:
        y, after, more = coupling.branch(b, pos, coupling.state)
        a, b = b, a + y
        states.append(after if coupling.keep else None)
        aux.append(more)
    return a, b, states, aux


def reversible(
    x: Tensor, pos: Positions, couplings: Sequence[Coupling], drift: Drift | None = None
) -> tuple[Tensor, Tensor, list[State], list[Mapping[str, Tensor]]]:
    """The same values and gradients, with the activations of one coupling at a time.

    Args:
        x: (B, T, X), both streams at the beginning; in no fewer bits than they shall be kept in.
        pos: where the tokens stand.
        couplings: the chain; a state that is kept is not consumed.
        drift: where to note how exactly the backward pass found x again.

    Returns:
        The two streams, the state after each coupling (None where it is not kept), and auxiliary values.
    """
    run = _Run(couplings, pos, drift, dict(pos.streams))
    inputs = {id(t): t for c in couplings for t in (*c.past, *c.parameters)}
    inputs |= {id(t): t for t in pos.streams.values() if t.requires_grad}
    a, b, *more = _Chain.apply(  # type: ignore[no-untyped-call]
        run, x, list(inputs), *inputs.values()
    )
    states = []
    for after, places in zip(run.after, run.places, strict=True):
        found = iter([more[i] if i >= 0 else None for i in places])
        states.append(apply(after, partial(_put, found)))
    return a, b, states, [{name: more[i] for name, i in names.items()} for names in run.aux]


def _put(outputs: Iterator[Tensor | None], t: Tensor) -> Tensor:
    """The output that stands for t, or t itself."""
    output = next(outputs)
    return t if output is None else output


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, x: Tensor, names: list[int], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.names = run, names
        known = {id(t) for t in inputs}
        device = x.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        a = b = x
        outputs: list[Tensor] = []
        for coupling in run.couplings:
            tape = Tape()
            run.handed.append({n: run.pos.streams[n] for n in coupling.streams if n in run.pos.streams})
            state = _copy(coupling.state) if coupling.keep else coupling.state
            with tape.record():
                y, after, aux = coupling.branch(b, run.pos, state)
            a, b = b, a + y
            run.tapes.append(tape)
            kept = list(_distinct(after)) if coupling.keep else []
            run.after.append(after if coupling.keep else None)
            run.places.append([_place(t, known, outputs) for t in kept])
            run.aux.append({name: _place(t, set(), outputs) for name, t in aux.items()})
        a, b = (x.clone() if t is x else t for t in (a, b))
        run.ends = [a.detach(), b.detach()]  # what autograd saves stays until the backward pass has ended
        ctx.save_for_backward(*([x] if run.drift is not None else []))
        ctx.set_materialize_grads(False)
        return (a, b, *outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        run: _Run = ctx.run
        if not run.ends:
            raise RuntimeError("a second backward pass needs retain_graph=True in the first one")
        (a, b), true = run.ends, ctx.saved_tensors
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            run.ends = []
        found: dict[int, Tensor] = {}
        g_a, g_b = (torch.zeros_like(t) if g is None else g for t, g in zip((a, b), grads, strict=False))
        more = grads[2:]
        beside: dict[str, Tensor] = {}
        streams = run.pos.streams
        run.pos.settle(graph=False)
        for i in reversed(range(len(run.couplings))):
            wanted = [run.places[i], list(run.aux[i].values())]
            g_more = [more[p] if p >= 0 else None for places in wanted for p in places]
            y, g, beside = _again(ctx, i, a, g_b, g_more, beside, found)
            a, b = b - y, a
            g_a, g_b = g_b, g_a + g
            run.pos.settle()  # what carries a gradient serves one coupling
            del y, g
        run.pos.streams = streams
        if run.drift is not None:
            size = true[0].abs().max().clamp_min(torch.finfo(true[0].dtype).tiny)
            run.drift.worst = float(
                torch.maximum((a - true[0]).abs().max(), (b - true[0]).abs().max()) / size
            )
        for name, g in beside.items():
            if run.first[name].requires_grad:
                found[id(run.first[name])] = g
        return (None, g_a + g_b, None, *(found.get(name) for name in ctx.names))


def _again(
    ctx: Any,
    i: int,
    b: Tensor,
    g_y: Tensor,
    g_more: list[Tensor | None],
    beside: dict[str, Tensor],
    found: dict[int, Tensor],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What coupling i added, computed again from b, and its gradient by b; others are added to `found`.

    `beside` is the gradient by each stream that it handed on; the third result that by each it was handed.
    """
    run: _Run = ctx.run
    coupling, device = run.couplings[i], ctx.autocast
    leaf = b.detach().requires_grad_()
    past = {id(t): t.detach().requires_grad_() for t in coupling.past}
    state = apply(coupling.state, lambda t: past.get(id(t), t))
    pos = run.pos
    handed = {name: t.detach().requires_grad_() for name, t in run.handed[i].items()}
    pos.streams.update(handed)
    with torch.enable_grad(), run.tapes[i].replay():
        with torch.autocast(device[0], device[1], enabled=device[2]):  # of the forward pass, so not of `grad`
            y, after, aux = coupling.branch(leaf, pos, state)
        outputs = [y, *(_distinct(after) if coupling.keep else ()), *aux.values()]
        outputs += [pos.streams[name] for name in coupling.streams]
        wanted = [g_y, *g_more, *(beside.get(name) for name in coupling.streams)]
        pairs = [
            (t, g.to(t.dtype))
            for t, g in zip(outputs, wanted, strict=True)
            if g is not None and t.requires_grad
        ]
        leaves = [leaf, *handed.values(), *past.values(), *coupling.parameters]
        outs, gs = [t for t, _ in pairs], [g for _, g in pairs]
        by = torch.autograd.grad(outs, leaves, gs, allow_unused=True) if pairs else [None] * len(leaves)
    names = [*past, *(id(p) for p in coupling.parameters)]
    for key, g in zip(names, by[1 + len(handed) :], strict=True):
        if g is not None:
            found[key] = found[key] + g if key in found else g
    passed = {name: g for name, g in beside.items() if name not in coupling.streams}
    passed |= {name: g for name, g in zip(handed, by[1:], strict=False) if g is not None}
    return y.detach(), torch.zeros_like(b) if by[0] is None else by[0], passed


def _copy(state: State) -> State:
    """The state as a value of its own, since a call consumes what it is given."""
    first = next(tensors(state), None)
    return state if first is None else select(state, torch.arange(len(first), device=first.device))


def _distinct(state: State) -> Iterable[Tensor]:
    """Each tensor of the tree once, in the order in which `apply` meets them."""
    found: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        found.append(t)
        return t

    apply(state, note)
    return found


def _place(t: Tensor, known: set[int], outputs: list[Tensor]) -> int:
    """Where t comes to stand among the outputs of the function; -1 = it has no gradient or is an input."""
    if id(t) in known or not t.is_floating_point():
        return -1
    outputs.append(t)
    return len(outputs) - 1
