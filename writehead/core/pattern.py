"""Patterns: who may read whom, as frozen values that can be printed, compared and combined.

`allows` is the definition. The dense mask, the picture, the key list of a decode step, the rule of eviction
and the slots of a cache all follow from it, and one property test ties them together.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from writehead.core.shapes import check_choice


class Reach(NamedTuple):
    """A sound bound on what later queries need: key k at time t if k < lead, or if t - k < window (None = for
    ever)."""

    lead: int
    window: int | None


class Pattern(ABC):
    """A set of (query position, key position) pairs."""

    @abstractmethod
    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        """bool, broadcast over q and k (both >= 0): may a query at q read the key at k?"""

    @property
    @abstractmethod
    def reach(self) -> Reach:
        """What a cache must keep."""

    @property
    @abstractmethod
    def causal(self) -> bool:
        """Is no pair with k > q in the set?"""

    @abstractmethod
    def keys(self, q: Tensor) -> Tensor:
        """q (N,) -> (N, K) int64: the keys each query may read, in any order, -1 where there are fewer than
        K."""

    def needed(self, k: Tensor, t: Tensor) -> Tensor:
        """bool: may a query at a position >= t still read key k? Sound, not necessarily tight."""
        lead, window = self.reach
        return torch.ones_like(k - t, dtype=torch.bool) if window is None else (k < lead) | (t - k < window)

    @property
    def heads(self) -> int | None:
        """How many query heads the pattern tells apart; None if all see the same."""
        return None

    def mask(self, q: Tensor, k: Tensor) -> Tensor:
        """q (B, T), k (B, S), -1 = padding -> bool (B, 1 or H, T, S): the dense form."""
        seen = self.allows(q[:, None, :, None], k[:, None, None, :])
        return seen & (k >= 0)[:, None, None, :] & (q >= 0)[:, None, :, None]

    def __and__(self, other: "Pattern") -> "Pattern":
        return And(self, other)

    def __or__(self, other: "Pattern") -> "Pattern":
        return Or(self, other)


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

    def keys(self, q: Tensor) -> Tensor:
        return torch.arange(self.count, device=q.device).expand(len(q), -1)


@dataclass(frozen=True)
class And(Pattern):
    """The pairs in both patterns."""

    a: Pattern
    b: Pattern

    def __post_init__(self) -> None:
        _same_heads(self.a, self.b)

    def __repr__(self) -> str:
        return f"({self.a} & {self.b})"

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.a.allows(q, k) & self.b.allows(q, k)

    @property
    def reach(self) -> Reach:
        a, b = self.a.reach, self.b.reach
        if a.window == b.window:
            return Reach(min(a.lead, b.lead), a.window)
        return a if b.window is None or (a.window is not None and a.window < b.window) else b

    @property
    def causal(self) -> bool:
        return self.a.causal or self.b.causal

    @property
    def heads(self) -> int | None:
        return self.a.heads or self.b.heads

    def keys(self, q: Tensor) -> Tensor:
        first, second = (self.a, self.b) if self.a.reach.window is not None else (self.b, self.a)
        try:
            k = first.keys(q)
        except ValueError:  # Full has no list; the other one's is enough
            k = second.keys(q)
        return torch.where((k >= 0) & _reads(self, q, k), k, -1)


@dataclass(frozen=True)
class Or(Pattern):
    """The pairs in either pattern."""

    a: Pattern
    b: Pattern

    def __post_init__(self) -> None:
        _same_heads(self.a, self.b)

    def __repr__(self) -> str:
        return f"({self.a} | {self.b})"

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.a.allows(q, k) | self.b.allows(q, k)

    @property
    def reach(self) -> Reach:
        a, b = self.a.reach, self.b.reach
        window = None if a.window is None or b.window is None else max(a.window, b.window)
        return Reach(max(a.lead, b.lead), window)

    @property
    def causal(self) -> bool:
        return self.a.causal and self.b.causal

    @property
    def heads(self) -> int | None:
        return self.a.heads or self.b.heads

    def keys(self, q: Tensor) -> Tensor:
        a, b = self.a.keys(q), self.b.keys(q)
        return torch.cat([a, torch.where(_reads(self.a, q, b), -1, b)], 1)


@dataclass(frozen=True)
class PerHead(Pattern):
    """Query head h follows the h-th pattern."""

    patterns: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        if len(self.patterns) < 2 or any(p.heads for p in self.patterns):
            raise ValueError(
                f"PerHead takes one head-free pattern for each of two or more heads; got {self.patterns}"
            )

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        """q and k carry a head dimension of 1 (or H) third from the end, as `mask` gives them."""
        q, k = torch.broadcast_tensors(q, k)
        return torch.cat([p.allows(q, k) for p in self.patterns], -3)

    @property
    def reach(self) -> Reach:
        bounds = [p.reach for p in self.patterns]
        windows = [b.window for b in bounds]
        return Reach(
            max(b.lead for b in bounds), None if None in windows else max(w for w in windows if w is not None)
        )

    @property
    def causal(self) -> bool:
        return all(p.causal for p in self.patterns)

    @property
    def heads(self) -> int | None:
        return len(self.patterns)

    def keys(self, q: Tensor) -> Tensor:
        union = self.patterns[0]
        for pattern in self.patterns[1:]:
            union = union | pattern
        return union.keys(q)


def _same_heads(a: Pattern, b: Pattern) -> None:
    if a.heads and b.heads and a.heads != b.heads:
        raise ValueError(f"cannot combine a pattern for {a.heads} heads with one for {b.heads}: {a}, {b}")


def _reads(pattern: Pattern, q: Tensor, k: Tensor) -> Tensor:
    """q (N,), k (N, K) -> bool (N, K): may some head of the query read that key?"""
    return pattern.allows(q[:, None, None, None], k[:, None, None]).any(1)[:, 0]


PATTERNS: dict[str, type[Pattern]] = {
    "full": Full,
    "causal": Causal,
    "window": Window,
    "leading": Leading,
    "and": And,
    "or": Or,
    "per_head": PerHead,
}


def to_spec(pattern: Pattern) -> dict[str, Any]:
    """The pattern as plain values for a config: {"name": "window", "window": 256, "after": 0}."""
    name = next(name for name, kind in PATTERNS.items() if kind is type(pattern))
    values = {f.name: getattr(pattern, f.name) for f in fields(pattern)}  # type: ignore[arg-type]
    return {"name": name} | {
        key: to_spec(v) if isinstance(v, Pattern) else [to_spec(p) for p in v] if isinstance(v, tuple) else v
        for key, v in values.items()
    }


def from_spec(spec: Mapping[str, Any] | Pattern) -> Pattern:
    """The pattern that a config describes.

    Raises:
        ValueError: unknown name or field, or a value that the pattern refuses.
    """
    if isinstance(spec, Pattern):
        return spec
    if not isinstance(spec, Mapping):
        raise ValueError(f"a pattern is a mapping such as {{'name': 'causal'}}; got {spec!r}")
    name = str(spec.get("name"))
    check_choice("pattern", name, PATTERNS)
    kinds = {f.name: f for f in fields(PATTERNS[name])}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in spec.items():
        if key != "name":
            check_choice(f"field of pattern {name!r}", str(key), kinds)
            values[key] = _value(f"field {key!r} of pattern {name!r}", value, kinds[key].type)
    missing = [key for key, f in kinds.items() if key not in values and f.default is MISSING]
    if missing:
        raise ValueError(f"pattern {name!r} needs {', '.join(missing)}; got {dict(spec)}")
    return PATTERNS[name](**values)


def _value(what: str, value: Any, kind: Any) -> Any:
    """A field's value out of a spec's: a whole number, a pattern, or several."""
    if kind is int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{what} must be int; got {value!r}")
        return value
    if kind is Pattern:
        if not isinstance(value, Mapping | Pattern):
            raise ValueError(f"{what} must be a pattern; got {value!r}")
        return from_spec(value)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{what} must be a list of patterns; got {value!r}")
    return tuple(map(from_spec, value))
