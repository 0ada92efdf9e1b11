"""States: what a mixer remembers of the past, as a tree whose every tensor has the batch as dimension 0.

A state is a Tensor, None, a number (the same for all rows), a tuple of states, or a `Node` with rules of its
own. Decoding knows states only through the functions here, so every mode works on every mechanism.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

State: TypeAlias = (
    Any  # Tensor | None | int | Node | tuple[State, ...]; mypy has no recursive Any-free form for NamedTuples
)
S = TypeVar("S")


class Once:
    """Runs each (function, arguments) once; tensors are told apart by identity, so layers that share one
    share results."""

    def __init__(self) -> None:
        self._done: dict[tuple[Any, ...], tuple[tuple[Any, ...], Any]] = {}

    def __call__(self, function: Callable[..., S], *args: Any) -> S:
        key = (function, *[id(a) if isinstance(a, Tensor) else a for a in args])
        done = self._done.get(key)
        if done is None:
            # the arguments are kept, since an id is only valid while its object lives
            done = self._done[key] = (args, function(*args))
        return done[1]

    def settle(self, known: Tensor, graph: bool) -> None:
        """Keep what follows from `known` alone and carries no gradient; the rest is forgotten.

        Args:
            known: arguments are this tensor, or what was made of it.
            graph: was autograd on? If not, no float says whether it should carry a gradient, and none stays.
        """
        alive, left = {id(known)}, {}
        for key, (args, result) in self._done.items():  # what results are made of comes before them
            found = list(_inside(result))
            if any(t.requires_grad or not (graph or _whole(t)) for t in found):
                continue
            if all(id(t) in alive for t in _inside(args)):
                left[key] = (args, result)
                alive.update(id(t) for t in found)
        self._done = left


def _whole(t: Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex())


def _inside(value: Any) -> Iterator[Tensor]:
    """Every tensor of nested tuples, lists and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for child in value:
            yield from _inside(child)
    elif is_dataclass(value):
        for part in fields(value):
            yield from _inside(getattr(value, part.name))


class Node(ABC):
    """A state with its own rules for rows and for time."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """Every tensor held."""

    @abstractmethod
    def map(self, function: Callable[[Tensor], Tensor]) -> "Node":
        """The same state with `function` applied to every batch-first tensor."""

    def select(self, index: Tensor, once: Once) -> "Node":
        """Row i becomes row index[i]."""
        return self.map(lambda t: once(torch.index_select, t, 0, index))

    @abstractmethod
    def join(self, other: "Node", once: Once) -> "Node":
        """The rows of this state, then those of `other`."""

    @abstractmethod
    def rewind(self, n: Tensor, once: Once) -> "Node":
        """The state before the last n[i] tokens of row i."""


class CannotRewind(ValueError):
    """Raised by `rewind` on a state that sums up its past; keep a copy (`select`) of it before the tokens at
    stake."""


def tensors(state: State) -> Iterator[Tensor]:
    """Every tensor of the tree, shared ones as often as they are referred to."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Node):
        yield from state.tensors()
    elif isinstance(state, tuple):
        for child in state:
            yield from tensors(child)


def select(state: S, index: Tensor, once: Once | None = None) -> S:
    """Row i becomes row index[i]: reorder beams, repeat a prompt's row, drop finished rows.

    Args:
        state: any state of B rows; it is left as it was, the result is an independent copy.
        index: (R,) row numbers, repeats allowed.
        once: shares results with the rest of a larger tree; nodes pass on theirs.
    """
    once = once or Once()

    def walk(s: State) -> State:
        if isinstance(s, Tensor):
            return once(torch.index_select, s, 0, index)
        if isinstance(s, Node):
            return s.select(index, once)
        return _rebuild(s, [walk(child) for child in s]) if isinstance(s, tuple) else s

    return walk(state)  # type: ignore[no-any-return]


def join(a: S, b: S, once: Once | None = None) -> S:
    """The rows of `a`, then those of `b`: admit new prompts to a running batch.

    Raises:
        ValueError: the two trees do not have the same structure.
    """
    once = once or Once()

    def walk(x: State, y: State) -> State:
        if type(x) is not type(y) or (isinstance(x, tuple) and len(x) != len(y)):
            raise ValueError(f"cannot join a state of {type(x).__name__} with one of {type(y).__name__}")
        if isinstance(x, Tensor):
            return once(_cat, x, y)
        if isinstance(x, Node):
            return x.join(y, once)
        if isinstance(x, tuple):
            return _rebuild(x, [walk(p, q) for p, q in zip(x, y, strict=True)])
        if x != y:
            raise ValueError(f"cannot join states whose fixed entries differ: {x!r} and {y!r}")
        return x

    return walk(a, b)  # type: ignore[no-any-return]


def rewind(state: S, n: int | Tensor, once: Once | None = None) -> S:
    """The state before the last `n` tokens; `state` itself is consumed.

    Args:
        state: any state that can rewind.
        n: how many tokens to take back, one number or (B,).

    Raises:
        CannotRewind: some part of the state only keeps a summary of its past, or forgot what it would need.
    """
    once = once or Once()
    first = next(tensors(state), None)
    if first is None:
        return state
    count = torch.full((len(first),), n, device=first.device) if isinstance(n, int) else n
    if int(count.min()) < 0:
        raise ValueError(f"n={n} must not be negative")

    def walk(s: State) -> State:
        if isinstance(s, Tensor):
            raise CannotRewind(
                "a summary of the past cannot rewind; keep a copy with select() before the tokens at stake"
            )
        if isinstance(s, Node):
            return s.rewind(count, once)
        return _rebuild(s, [walk(child) for child in s]) if isinstance(s, tuple) else s

    return walk(state)  # type: ignore[no-any-return]


def detach(state: S) -> S:
    """The same state, its gradient cut: between segments of training."""
    return apply(state, Tensor.detach)


def apply(state: S, function: Callable[[Tensor], Tensor]) -> S:
    """The same tree with `function` applied to every tensor, once to a shared one."""
    once = Once()

    def walk(s: State) -> State:
        if isinstance(s, Tensor):
            return once(function, s)
        if isinstance(s, Node):
            return s.map(lambda t: once(function, t))
        return _rebuild(s, [walk(child) for child in s]) if isinstance(s, tuple) else s

    return walk(state)  # type: ignore[no-any-return]


def nbytes(state: State) -> int:
    """Bytes held by the tree's tensors; one that several layers share counts once."""
    return sum({id(t): t.nbytes for t in tensors(state)}.values())


def _cat(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b])


def _rebuild(like: tuple[State, ...], children: list[State]) -> State:
    return type(like)(*children) if hasattr(like, "_fields") else tuple(children)
