"""Computing something a second time exactly as the first: random numbers, discrete choices, side effects.

Memory is saved by computing activations again in the backward pass. The second computation must draw the
same dropout, and must take the same buckets, clusters and experts even where its inputs differ in the last
bit; and it must not move averages or count anything twice. A `Tape` takes note of the first computation and
guides the second.

    with tape.record():            # the first time
        y = layer(x)
    with tape.replay():            # later: the same numbers drawn, the same choices made
        y = layer(x)
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


class Tape:
    """What one computation drew and chose."""

    def __init__(self) -> None:
        self._choices: list[Any] = []
        self._next: int | None = None  # of the choice to repeat; None = recording
        self._random: list[Tensor] = []
        self._devices: list[int] = []
        self._around: Tape | None = None

    @contextmanager
    def record(self) -> Iterator[None]:
        """Take note of all choices, and of the state of the random generators."""
        self._around, self._choices, self._next = _current.get(), [], None
        self._devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        self._random = [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in self._devices)]
        yield from self._inside()

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Repeat them; afterwards the random generators are as before."""
        self._around, self._next = _current.get(), 0
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._random[0])
            for device, state in zip(self._devices, self._random[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield from self._inside()

    def _inside(self) -> Iterator[None]:
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def choose(self, function: Callable[..., R], args: tuple[Any, ...]) -> R:
        """The choice next in order: taken now and noted, or repeated."""
        if self._next is not None:
            self._next += 1
            return self._choices[self._next - 1]  # type: ignore[no-any-return]
        if self._around is not None:
            choice = self._around.choose(function, args)
        else:
            with torch.no_grad():
                choice = function(*args)
        self._choices.append(choice)
        return choice

    @property
    def replaying(self) -> bool:
        """Is this, or a computation around it, the second one?"""
        return self._next is not None or (self._around is not None and self._around.replaying)


_current: ContextVar[Tape | None] = ContextVar("tape", default=None)


def choose(function: Callable[..., R], *args: Any) -> R:
    """function(*args) without gradients; where a computation is repeated, what it gave the first time.

    For whatever is no continuous function of the input: buckets, clusters, top-k, noise that decides.
    """
    tape = _current.get()
    if tape is not None:
        return tape.choose(function, args)
    with torch.no_grad():
        return function(*args)


def taped() -> bool:
    """Is this computed on behalf of a backward pass, whether autograd is on now (again) or not yet?"""
    return _current.get() is not None


def first_time() -> bool:
    """May side effects happen? Not while something is computed again."""
    tape = _current.get()
    return tape is None or not tape.replaying


def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=contexts)`."""
    tape = Tape()
    return tape.record(), tape.replay()
