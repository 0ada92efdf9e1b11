"""What a call must compute and move at least, as mixers and feed-forward layers state it of themselves.

A part states its work as a method `work(call)`; `costs.py` adds the parts up. Only products count as
operations, a multiply-add as two, as `torch.utils.flop_counter` does; norms, activations and the turning of
heads by their positions are left out.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from writehead.core.pattern import Causal, Full, Pattern
from writehead.core.slots import Layout, Store

ROWS = 256  # queries that are looked at together when the pairs of a pattern are counted


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a model: `tokens` new ones in each of `batch` rows, after `context` earlier ones.

    Attributes:
        batch, tokens, context: as above; tokens = 1 is a decode step, context = 0 a prefill or a forward.
        source: tokens of each row's source, where a decoder reads an encoder.
        logits: the last tokens of each row whose logits are computed; default all, a prefill needs 1.
        itemsize: bytes of a weight and, unless the store says otherwise, of a cached value.
        store: how caches are kept.
    """

    batch: int = 1
    tokens: int = 1
    context: int = 0
    source: int = 0
    logits: int | None = None
    itemsize: int = 4
    store: Store = Store()

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("tokens", 1), ("context", 0), ("source", 0), ("itemsize", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    @property
    def asked(self) -> int:
        """Tokens of all rows whose logits are computed."""
        return self.batch * (self.tokens if self.logits is None else min(self.logits, self.tokens))

    @property
    def rows(self) -> int:
        """New tokens of all rows together."""
        return self.batch * self.tokens

    def slot_bytes(self, heads: int, widths: int) -> int:
        """Bytes of a cache slot whose key and value of one head hold `widths` values together."""
        stored = self.store.dtype
        size = self.itemsize if stored is None else stored.itemsize
        return heads * (widths * size + (8 if size == 1 else 0))  # int8 keeps two float32 scales a head


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a call takes; parts add up.

    Attributes:
        flops: operations of all products.
        weights: weight values read, once for the whole call.
        state_read, state_written: bytes of the past that are read, and bytes that are added to it.
    """

    flops: int = 0
    weights: int = 0
    state_read: int = 0
    state_written: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            flops=self.flops + other.flops,
            weights=self.weights + other.weights,
            state_read=self.state_read + other.state_read,
            state_written=self.state_written + other.state_written,
        )


def values(*modules: nn.Module) -> int:
    """Parameters of the modules, one that several share once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def products(*modules: nn.Module) -> int:
    """Entries of the modules' matrices: each is multiplied and added once for every token."""
    return sum({id(p): p.numel() for m in modules for p in m.parameters() if p.dim() > 1}.values())


def scores(pattern: Pattern, heads: int, call: Call) -> int:
    """Scores that a call computes: (query, key) pairs of all rows and query heads.

    A causal query reads the slots that the cache then holds, or the keys of its pattern where the cache grows
    and the pattern leaves some out; the pairs of other patterns are counted.
    """
    if not pattern.causal:
        return call.batch * heads * _allowed(pattern, 0, call.tokens) // (pattern.heads or 1)
    after = call.context + call.tokens
    layout = Layout.of(pattern.reach, call.store)
    if layout.columns is not None or (layout.window is None and pattern != Causal()):
        pairs = _allowed(pattern, call.context, after)
        return call.batch * heads * pairs // (pattern.heads or 1)
    limit = layout.limit
    return call.batch * heads * (_capped_sum(after, limit) - _capped_sum(call.context, limit))


def slots_read(pattern: Pattern, call: Call) -> int:
    """Slots of the past that the call's queries read, of one row."""
    layout = Layout.of(pattern.reach, call.store)
    if call.tokens == 1 and layout.window is None and pattern != Causal():
        keys = pattern.keys(torch.tensor([call.context]))
        return max(0, int((keys >= 0).sum()) - 1)
    return layout.used(call.context)


def _capped_sum(n: int, limit: int | None) -> int:
    """min(1, limit) + ... + min(n, limit)."""
    rising = n if limit is None else min(n, limit)
    return rising * (rising + 1) // 2 + (n - rising) * (limit or 0)


@lru_cache(64)  # patterns are values
def _allowed(pattern: Pattern, start: int, stop: int) -> int:
    """Pairs of the queries start .. stop - 1 with keys before `stop`, of all the heads told apart."""
    if pattern.heads is not None:
        return sum(_allowed(pattern.head(h), start, stop) for h in range(pattern.heads))
    if isinstance(pattern, Full):
        return (stop - start) * stop
    count = 0
    for rows in torch.arange(start, stop).split(ROWS):
        try:
            keys = pattern.keys(rows)
            count += int(((keys >= 0) & (keys < stop)).sum())
        except ValueError:  # a pattern without a list of keys
            count += int(pattern.allows(rows[:, None], torch.arange(stop)).sum())
    return count
