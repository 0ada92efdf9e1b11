"""The plain patterns: everything, the past, a window, the first tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from writehead.core.pattern.base import Pattern, Reach


@dataclass(frozen=True)
class Full(Pattern):
    """Every query reads every key."""

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.ones_like(q - k, dtype=torch.bool)

    @property
    def reach(self) -> Reach:
        return Reach(0, None)

    @property
    def causal(self) -> bool:
        return False

    def keys(self, q: Tensor) -> Tensor:
        raise ValueError("Full has no finite list of keys: combine it with Causal or Window")


@dataclass(frozen=True)
class Causal(Pattern):
    """Every query reads itself and all before it."""

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return k <= q

    @property
    def reach(self) -> Reach:
        return Reach(0, None)

    @property
    def causal(self) -> bool:
        return True

    def tiles(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        return k0 <= q1

    def keys(self, q: Tensor) -> Tensor:
        k = torch.arange(int(q.max()) + 1 if q.numel() else 0, device=q.device).expand(len(q), -1)
        return torch.where(k <= q[:, None], k, -1)


@dataclass(frozen=True)
class Window(Pattern):
    """A query reads `window` keys up to and including its own, and `after` keys behind it: -after <= q - k <
    window."""

    window: int
    after: int = 0

    def __post_init__(self) -> None:
        if self.window < 1 or self.after < 0:
            raise ValueError(
                f"Window(window={self.window}, after={self.after}): window counts the query itself and must "
                f"be at least 1, after at least 0; nearest is "
                f"Window({max(1, self.window)}, {max(0, self.after)})"
            )

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        distance = q - k
        return (distance < self.window) & (distance >= -self.after)

    @property
    def reach(self) -> Reach:
        return Reach(0, self.window)

    @property
    def causal(self) -> bool:
        return self.after == 0

    def tiles(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        return (q0 - k1 < self.window) & (q1 - k0 >= -self.after)

    def keys(self, q: Tensor) -> Tensor:
        k = q[:, None] + torch.arange(self.after, -self.window, -1, device=q.device)
        return k.clamp_min(-1)


@dataclass(frozen=True)
class Leading(Pattern):
    """Every query reads the first `count` keys (attention sinks, global tokens)."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"Leading({self.count}): count must be at least 1")

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return (k < self.count) & (q >= 0)

    @property
    def reach(self) -> Reach:
        return Reach(self.count, 0)

    @property
    def causal(self) -> bool:
        return False

    def tiles(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        return (k0 < self.count) & (q1 >= 0)

    def keys(self, q: Tensor) -> Tensor:
        return torch.arange(self.count, device=q.device).expand(len(q), -1)


@dataclass(frozen=True)
class Span(Pattern):
    """Every query reads the `count` keys from `start` on."""

    start: int
    count: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.count < 1:
            raise ValueError(f"{self}: start must be at least 0, count at least 1")

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return (k >= self.start) & (k < self.start + self.count) & (q >= 0)

    @property
    def reach(self) -> Reach:
        return Reach(self.start + self.count, 0)

    @property
    def causal(self) -> bool:
        return False

    def tiles(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        return (k1 >= self.start) & (k0 < self.start + self.count) & (q1 >= 0)

    def keys(self, q: Tensor) -> Tensor:
        return torch.arange(self.start, self.start + self.count, device=q.device).expand(len(q), -1)


@dataclass(frozen=True)
class Readers(Pattern):
    """The `count` queries from `start` on read every key: with Leading or Span, the global tokens of an
    encoder."""

    count: int
    start: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.start < 0:
            raise ValueError(f"{self}: count must be at least 1, start at least 0")

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return (q >= self.start) & (q < self.start + self.count) & (k >= 0)

    @property
    def reach(self) -> Reach:
        return Reach(0, self.start + self.count)  # the last of them is the last that reads anything

    @property
    def causal(self) -> bool:
        return False

    def tiles(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        return (q1 >= self.start) & (q0 < self.start + self.count) & (k1 >= 0)

    def keys(self, q: Tensor) -> Tensor:
        raise ValueError("Readers has no finite list of keys: combine it with Causal or Window")


def everywhere(start: int, count: int) -> Pattern:
    """Global tokens: the `count` from `start` on read all and are read by all."""
    return Span(start, count) | Readers(count, start)
