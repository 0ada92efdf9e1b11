"""The key/value cache: keys, values and the position of each slot, under one write rule.

`slots` says which position lives where. Ragged rows, padding and rewinding need no rule of their own: every
slot knows its position.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from writehead.core.pattern import Reach
from writehead.core.positions import Positions
from writehead.core.slots import Layout, Store, forget
from writehead.core.state import Node, Once, State


class Keys(NamedTuple):
    """What one call of attention reads."""

    k: Tensor  # (B, S, G, D)
    v: Tensor  # (B, S, G, D)
    pos: Tensor  # (B, S), -1 = nothing there


class Plan(NamedTuple):
    """Where the tokens of one call go; computed once for all layers with the same layout."""

    pos: Tensor  # (B, S) the slots' positions after the write
    seen: Tensor  # (B, used), its part in use
    used: int
    run: tuple[int, int] | None  # the slots, if every row fills the same run of them
    at: tuple[Tensor, Tensor, Tensor] | None  # else row, token and slot of each token to store


@dataclass(slots=True, eq=False)
class KV(Node):
    """Keys and values with the position of each slot.

    Attributes:
        k, v: (B, G, S, D), G before S so that a head's slots lie together; with int8, their data.
        pos: (B, S) int64, -1 = empty; layers with equal layouts share it.
        layout: which slot a position takes.
        used: from this slot on every row is empty.
        scales: none, or with int8 those of k and v, (B, G, S, 1) float32.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    layout: Layout
    used: int = 0
    scales: tuple[Tensor, Tensor] | None = None

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.k, self.v, self.pos, *(self.scales or ()))

    def map(self, function: Callable[[Tensor], Tensor]) -> "KV":
        scales = self.scales and (function(self.scales[0]), function(self.scales[1]))
        return replace(self, k=function(self.k), v=function(self.v), pos=function(self.pos), scales=scales)

    def select(self, index: Tensor, once: Once) -> "KV":
        pos = once(torch.index_select, self.pos, 0, index)
        k, v, *scales = (_rows(t, index, self.used) for t in (self.k, self.v, *(self.scales or ())))
        return replace(self, k=k, v=v, pos=pos, scales=(scales[0], scales[1]) if scales else None)

    def join(self, other: Node, once: Once) -> "KV":
        assert isinstance(other, KV)
        if self.layout != other.layout or (self.scales is None) != (other.scales is None):
            raise ValueError(f"cannot join caches of different kinds: {self.layout} and {other.layout}")
        slots = max(self.pos.shape[1], other.pos.shape[1])
        a, b = _resize(self, slots), _resize(other, slots)
        scales = None
        if a.scales is not None and b.scales is not None:
            scales = (torch.cat([a.scales[0], b.scales[0]]), torch.cat([a.scales[1], b.scales[1]]))
        pos = once(_join_pos, self.pos, other.pos)
        used = max(self.used, other.used)
        return KV(torch.cat([a.k, b.k]), torch.cat([a.v, b.v]), pos, self.layout, used, scales)

    def rewind(self, n: Tensor, once: Once) -> "KV":
        pos = once(forget, self.pos, n, self.layout)
        used = self.used if self.layout.window is not None else once(_top, pos)
        return replace(self, pos=pos, used=used)


def empty(batch: int, kv_heads: int, widths: tuple[int, int], reach: Reach, store: Store, like: Tensor) -> KV:
    """A cache without tokens.

    Args:
        batch: rows.
        kv_heads: heads of keys and values.
        widths: head width of keys, of values.
        reach: what later queries need (`Pattern.reach`).
        store: capacity, slack and storage type.
        like: a tensor of the computation's type and device.
    """
    layout = Layout.of(reach, store)
    slots = layout.slots(0, store.capacity)
    dtype = store.dtype or like.dtype
    k, v = (like.new_zeros(batch, kv_heads, slots, width, dtype=dtype) for width in widths)
    scales = None
    if dtype == torch.int8:
        scale = like.new_zeros(batch, kv_heads, slots, 1, dtype=torch.float32)
        scales = (scale, scale.clone())
    return KV(k, v, like.new_full((batch, slots), -1, dtype=torch.int64), layout, 0, scales)


def share_positions(states: Sequence[State]) -> list[State]:
    """Let empty caches of equal layout hold one position tensor, so that a step plans once for all of
    them."""
    first: dict[tuple[Layout, torch.Size], Tensor] = {}
    return [
        replace(s, pos=first.setdefault((s.layout, s.pos.shape), s.pos)) if isinstance(s, KV) else s
        for s in states
    ]


def append(kv: KV, k: Tensor, v: Tensor, pos: Positions) -> tuple[KV, Keys]:
    """Store the keys and values of T new tokens and give what their queries may read.

    Without autograd the cache is written in place: `kv` is consumed.

    Args:
        kv: the past.
        k, v: (B, T, G, D), new keys and values in the type of the computation.
        pos: where the tokens stand; padding is not stored.

    Returns:
        The cache after the tokens, and keys and values of past and new tokens as they are stored.
    """
    plan = pos.once(_plan, pos, kv.pos, kv.used, kv.layout)
    if plan.run is not None and kv.used and k.shape[1] == 1 and kv.k.dtype == k.dtype:
        kv = _write(kv, plan, ((k.transpose(1, 2), None), (v.transpose(1, 2), None)))
        k, v = (t.narrow(2, 0, kv.used).transpose(1, 2) for t in (kv.k, kv.v))
        return kv, Keys(k, v, plan.seen)
    new, dtype = (_encode(k.transpose(1, 2), kv), _encode(v.transpose(1, 2), kv)), k.dtype
    if kv.used == 0:
        k, v = (_decode(*t, dtype).transpose(1, 2) for t in new)
        keys = Keys(k, v, pos.index)
    elif kv.layout.window is not None and k.shape[1] - 1 > kv.layout.slack:
        # a later token of this call may take the slot of a key that an earlier one still reads
        past = _read(kv, pos.once(_narrow, kv.pos, kv.used), dtype)
        k, v = (_decode(*t, dtype).transpose(1, 2) for t in new)
        both = pos.once(_cat_pos, past.pos, pos.index)
        keys = Keys(torch.cat([past.k, k], 1), torch.cat([past.v, v], 1), both)
    else:
        kv = _write(kv, plan, new)
        return kv, _read(kv, plan.seen, dtype)
    return _write(kv, plan, new), keys


def state_bytes(batch: int, slots: int, kv_heads: int, widths: tuple[int, int], itemsize: int) -> int:
    """Bytes of a cache with that many slots; itemsize 1 is int8 with its scales."""
    per_head = sum(widths) * itemsize + (8 if itemsize == 1 else 0)
    return batch * slots * (kv_heads * per_head + 8)


def _plan(pos: Positions, kept: Tensor, used: int, layout: Layout) -> Plan:
    index, T, start = pos.index, pos.index.shape[1], pos.start
    run, at = None, None
    if start is not None:
        first, last = (int(layout.slot(torch.tensor(p))) for p in (start, start + T - 1))
        in_a_run = last - first == T - 1 and (layout.columns is None or T == 1)
        run = (first, last + 1) if in_a_run else None
    if run is not None:
        top = run[1]
    else:
        stays = index >= 0
        if layout.window is not None:
            newest = index.amax(1, keepdim=True)
            recent = index > newest - layout.window - layout.slack
            stays &= (index < layout.lead) | recent
            if layout.columns is not None:
                stays |= layout.columns.holds(index) & (index >= 0)
        row, token = stays.nonzero(as_tuple=True)
        at = (row, token, layout.slot(index)[row, token])
        top = int(at[2].max()) + 1 if len(row) else 0
    used = max(used, top)
    have = kept.shape[1]
    after = F.pad(kept, (0, layout.grown(used) - have), value=-1) if used > have else kept.clone()
    if run is not None:
        after[:, run[0] : run[1]] = index
    elif at is not None:
        after[at[0], at[2]] = index[at[0], at[1]]
    return Plan(after, after[:, :used], used, run, at)


def _write(kv: KV, plan: Plan, new: tuple[tuple[Tensor, Tensor | None], ...]) -> KV:
    kv = _resize(kv, plan.pos.shape[1])
    (k, k_scale), (v, v_scale) = new
    scales = kv.scales
    if scales is not None and k_scale is not None and v_scale is not None:
        scales = (_put(scales[0], k_scale, plan), _put(scales[1], v_scale, plan))
    return KV(_put(kv.k, k, plan), _put(kv.v, v, plan), plan.pos, kv.layout, plan.used, scales)


def _put(old: Tensor, new: Tensor, plan: Plan) -> Tensor:
    """old (B, G, S, D), new (B, G, T, D): in place unless autograd needs what was there."""
    graph = torch.is_grad_enabled() and (old.requires_grad or new.requires_grad)
    if plan.run is not None:
        a, b = plan.run
        if graph:
            return old.slice_scatter(new, 2, a, b)
        old.narrow(2, a, b - a).copy_(new)
        return old
    assert plan.at is not None
    row, token, slot = plan.at
    values = new.transpose(1, 2)[row, token]
    flat = old.transpose(1, 2)
    if graph:
        return flat.index_put((row, slot), values).transpose(1, 2)
    flat[row, slot] = values
    return old


def _read(kv: KV, pos: Tensor, dtype: torch.dtype) -> Keys:
    scales = kv.scales or (None, None)
    k, v = (
        _decode(t[:, :, : kv.used], None if s is None else s[:, :, : kv.used], dtype).transpose(1, 2)
        for t, s in zip((kv.k, kv.v), scales, strict=True)
    )
    return Keys(k, v, pos)


def _encode(t: Tensor, kv: KV) -> tuple[Tensor, Tensor | None]:
    """The stored form of t (B, G, T, D)."""
    if kv.scales is None:
        return (t if t.dtype == kv.k.dtype else t.to(kv.k.dtype)), None
    if not t.shape[-1]:  # a cache of values without keys
        return t.to(torch.int8), t.new_zeros(*t.shape[:-1], 1, dtype=torch.float32)
    scale = t.detach().abs().amax(-1, keepdim=True).float() / 127
    return (t / scale.clamp_min(1e-30).to(t)).round().to(torch.int8), scale


def _decode(t: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return t if t.dtype == dtype else t.to(dtype)
    return t.to(dtype) * scale.to(dtype)


def _resize(kv: KV, slots: int) -> KV:
    more = slots - kv.pos.shape[1]
    if more == 0:
        return kv
    k, v, *scales = (F.pad(t, (0, 0, 0, more)) for t in (kv.k, kv.v, *(kv.scales or ())))
    return replace(kv, k=k, v=v, scales=(scales[0], scales[1]) if scales else None)


def _rows(t: Tensor, index: Tensor, used: int) -> Tensor:
    """Rows of t (B, G, S, D); slots that nothing uses are not copied."""
    if torch.is_grad_enabled() and t.requires_grad:
        return t.index_select(0, index)
    rows = t.new_zeros(len(index), *t.shape[1:])
    torch.index_select(t.narrow(2, 0, used), 0, index, out=rows.narrow(2, 0, used))
    return rows


def _narrow(t: Tensor, used: int) -> Tensor:
    return t[:, :used]


def _cat_pos(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b], 1)


def _join_pos(a: Tensor, b: Tensor) -> Tensor:
    slots = max(a.shape[1], b.shape[1])
    return torch.cat([F.pad(t, (0, slots - t.shape[1]), value=-1) for t in (a, b)])


def _top(pos: Tensor) -> int:
    return int(pos.max()) + 1 if pos.numel() else 0
