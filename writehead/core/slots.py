"""Which slot of a cache a position takes, how many slots there are, and how caches are kept.

Position p lives in slot p while p < lead, and in slot lead + (p - lead) mod (window + slack) after that. With
the reach of a pattern this gives a growing cache (Causal has no window), a ring (Window) and a ring behind
sinks (Window | Leading).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from writehead.core.pattern import Columns, Reach
from writehead.core.state import CannotRewind

SMALLEST = 16  # slots of the first allocation
STORED = (None, torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8)


@dataclass(frozen=True, kw_only=True)
class Store:
    """How caches are kept.

    Attributes:
        capacity: tokens to make room for at once; beyond it a cache doubles.
        slack: tokens that a ring keeps beyond its window, so that `rewind` may take back as many.
        dtype: None = as computed; a float type, or int8 with a scale for each slot and head.
    """

    capacity: int = 0
    slack: int = 0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.capacity < 0 or self.slack < 0:
            raise ValueError(f"capacity={self.capacity} and slack={self.slack} must be at least 0")
        if self.dtype not in STORED:
            raise ValueError(
                f"cache dtype {self.dtype} is not accepted; use one of {', '.join(map(str, STORED))}"
            )


class Layout(NamedTuple):
    """Which slot a position takes, and how many slots there are.

    The first `lead` positions have slots of their own, then comes a ring for what a window reads, then the
    columns, which are kept for ever.
    """

    lead: int
    window: int | None
    slack: int
    columns: Columns | None = None

    @classmethod
    def of(cls, reach: Reach, store: Store) -> "Layout":
        """The layout that keeps what the pattern's reach says, and the store's slack."""
        if reach.window is None:
            return cls(0, None, 0)
        # a ring has a slot, also if nothing is read
        return cls(reach.lead, max(1, reach.window), store.slack, reach.columns)

    @property
    def ring(self) -> int:
        """Slots of the ring: the most positions, other than columns, among window + slack successive ones."""
        assert self.window is not None
        run = self.window + self.slack
        if self.columns is None:
            return run
        others = self.columns.stride - self.columns.width
        periods, rest = divmod(run, self.columns.stride)
        return max(1, periods * others + min(rest, others))

    @property
    def limit(self) -> int | None:
        """The most slots a row can fill; None = ever more."""
        return None if self.window is None or self.columns is not None else self.lead + self.ring

    def slot(self, pos: Tensor) -> Tensor:
        """The slot of each position >= 0."""
        if self.window is None:
            return pos
        if self.columns is None:
            return torch.where(pos < self.lead, pos, self.lead + (pos - self.lead) % self.ring)
        before = self.columns.before(pos)
        column, other = self.lead + self.ring + before, self.lead + (pos - before) % self.ring
        kept = torch.where(self.columns.holds(pos), column, other)
        return torch.where(pos < self.lead, pos, kept)

    def used(self, context: int) -> int:
        """Slots up to the last one in use after `context` tokens."""
        if self.window is None:
            return context
        count = 0 if self.columns is None else int(self.columns.before(torch.tensor(context)))
        return self.lead + self.ring + count if count else min(context, self.lead + self.ring)

    def slots(self, context: int, capacity: int = 0) -> int:
        """Slots allocated once `context` tokens were written to a cache created with `capacity`."""
        used, first = self.used(context), self.used(capacity)
        return first if used <= first else self.grown(used)

    def grown(self, used: int) -> int:
        """Slots of a cache that was enlarged because it needed `used`."""
        slots = max(SMALLEST, 1 << (used - 1).bit_length())
        return slots if self.limit is None else min(slots, self.limit)


def forget(pos: Tensor, n: Tensor, layout: Layout) -> Tensor:
    """The slots' positions before the last n[i] tokens of row i.

    Args:
        pos: (B, S), -1 = empty.
        n: (B,).
        layout: of the slots.

    Raises:
        ValueError: more tokens than a row holds.
        CannotRewind: a ring that no longer holds what was read before those tokens.
    """
    have = pos.amax(1) + 1 if pos.shape[1] else torch.zeros_like(n)
    keep = have - n
    if bool((keep < 0).any()):
        raise ValueError(f"cannot take back {n.tolist()} tokens of rows that hold {have.tolist()}")
    if layout.window is not None:
        oldest = (keep - layout.window + 1).clamp_min(0)  # what the next query reads must still be there
        oldest = torch.where(
            oldest < layout.lead, torch.minimum(keep, torch.full_like(keep, layout.lead)), oldest
        )
        there = ((pos >= oldest[:, None]) & (pos < keep[:, None])).sum(1)
        if bool((there < keep - oldest).any()):
            raise CannotRewind(
                f"a ring of window {layout.window} and slack {layout.slack} no longer holds what was read "
                f"before the last {int(n.max())} tokens; create its state with Store(slack={int(n.max())})"
            )
    return torch.where(pos < keep[:, None], pos, -1)
