"""Memory of segments: who reads what, and whether the past is kept as hidden states or as keys and values.

Under autograd a memory keeps the hidden states that entered the layer, so that after `detach` the projections
still learn from it; without autograd it keeps their keys and values, as a cache does.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from writehead.core.cache import KV, Keys, append
from writehead.core.pattern import Pattern, Reach
from writehead.core.positions import Positions
from writehead.core.replay import taped

Project: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]  # (B, S, X) -> keys and values (B, S, G, D)


@dataclass(frozen=True)
class Segments(Pattern):
    """A query reads its segment up to itself, and the `memory` keys before that segment.

    Segments begin at the absolute positions 0, segment, 2 segment, ..., however a sequence is cut into calls.
    """

    segment: int
    memory: int

    def __post_init__(self) -> None:
        if self.segment < 1 or self.memory < 0:
            raise ValueError(
                f"Segments(segment={self.segment}, memory={self.memory}): segment must be at least 1, memory "
                f"at least 0; nearest is Segments({max(1, self.segment)}, {max(0, self.memory)})"
            )

    def first(self, q: Tensor) -> Tensor:
        """The first position that a query at q reads; below 0 while there are fewer tokens."""
        return torch.div(q, self.segment, rounding_mode="floor") * self.segment - self.memory

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k >= self.first(q))

    def needed(self, k: Tensor, t: Tensor) -> Tensor:
        return k >= self.first(t)

    @property
    def reach(self) -> Reach:
        return Reach(0, self.segment + self.memory)

    @property
    def causal(self) -> bool:
        return True

    def keys(self, q: Tensor) -> Tensor:
        k = q[:, None] - torch.arange(self.segment + self.memory, device=q.device)
        return torch.where((k >= self.first(q)[:, None]) & (k >= 0), k, -1)


def remember(kv: KV, x: Tensor, pos: Positions, project: Project) -> tuple[KV, Keys]:
    """Store T new tokens and give the keys and values of past and new ones.

    Args:
        kv: an empty cache of keys and values, or what this function gave before; consumed.
        x: hidden states (B, T, X) that enter the layer.
        pos: where the tokens stand; padding is not stored.
        project: makes keys and values of hidden states.

    Returns:
        The memory after the tokens, and what their queries may read.
    """
    return keep(kv, x, pos, project)[:2]


def keep(kv: KV, x: Tensor, pos: Positions, project: Project) -> tuple[KV, Keys, Tensor | None]:
    """As `remember`, and the hidden states (B, S, X) of those keys where the memory keeps them."""
    hidden = kv.v.shape[-1] == 0
    if torch.is_grad_enabled() or taped():
        if not hidden and kv.used == 0 and kv.k.dtype == x.dtype:
            slots = (x.new_zeros(len(x), 1, kv.pos.shape[1], width) for width in (x.shape[-1], 0))
            kv, hidden = replace(kv, k=next(slots), v=next(slots)), True
    elif hidden:
        kv, hidden = projected(kv, project), False
    if not hidden:
        return *append(kv, *project(x), pos), None
    states = x[:, :, None]
    if not (states.requires_grad or kv.k.requires_grad):
        # constants whose projections are learned: `append` would overwrite what the backward pass reads
        kv = replace(kv, k=kv.k.clone())
    kv, keys = append(kv, states, states[..., :0], pos)
    return kv, Keys(*project(keys.k[:, :, 0]), keys.pos), keys.k[:, :, 0]


def projected(kv: KV, project: Project) -> KV:
    """A memory of hidden states as one of keys and values."""
    k, v = project(kv.k[:, 0])
    return replace(kv, k=k.transpose(1, 2).contiguous(), v=v.transpose(1, 2).contiguous())
