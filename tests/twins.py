"""Mixers with realistic defects, and the lawful ones that they are made of."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from writehead.core.cache import KV
from writehead.core.pattern import Causal, Pattern, Reach, Window
from writehead.core.slots import Store
from writehead.core.state import CannotRewind, Node
from writehead.mixer import NOTHING
from writehead.mixers.cross import Cross, Memory
from writehead.mixers.softmax import Softmax
from writehead.positions.alibi import ALiBi


class Sums(NamedTuple):
    total: Tensor  # (B, X)
    count: Tensor  # (B, 1)


class Mean(nn.Module):
    """A lawful mixer: y_t is a projection of the mean of all x up to t."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(16, 16)

    def init_state(self, batch, like, store=Store()):
        return Sums(like.new_zeros(batch, 16), like.new_zeros(batch, 1))

    def state_bytes(self, batch, context, itemsize, store=Store()):
        return batch * 17 * itemsize

    def counted(self, pos):
        return pos.valid

    def forward(self, x, pos, state=None):
        state = self.init_state(len(x), x) if state is None else state
        mine = self.counted(pos)[..., None].to(x)
        total = state.total[:, None] + (x * mine).cumsum(1)
        count = state.count[:, None] + mine.cumsum(1)
        return self.out(total / count.clamp_min(1)), Sums(total[:, -1], count[:, -1]), NOTHING


class PaddingRemembered(Mean):
    def counted(self, pos):
        return torch.ones_like(pos.valid)


class AnotherFormulaForOneToken(Mean):
    """Decoding was written a second time and forgot that the mean counts the new token."""

    def forward(self, x, pos, state=None):
        y, after, aux = super().forward(x, pos, state)
        if x.shape[1] == 1 and state is not None:
            y = self.out(after.total / state.count.clamp_min(1))[:, None]
        return y, after, aux


class GradientCutBetweenCalls(Mean):
    def forward(self, x, pos, state=None):
        return super().forward(x, pos, None if state is None else Sums(*(t.detach() for t in state)))


class PastKeptInTheModule(Mean):
    """The sums live in the module; the state only says whether a new sequence begins."""

    def forward(self, x, pos, state=None):
        state = self.init_state(len(x), x) if state is None else state
        if float(state.count.max()) == 0:
            self.past = state
        y, self.past, aux = super().forward(x, pos, self.past)
        return y, Sums(torch.zeros_like(self.past.total), self.past.count), aux


class CentredOverTheBatch(Mean):
    """A batch norm without running statistics."""

    def forward(self, x, pos, state=None):
        return super().forward(x - x.mean(0, keepdim=True), pos, state)


class BytesNotTold(Mean):
    state_bytes = None

    def __getattribute__(self, name):
        if name == "state_bytes":
            raise AttributeError(name)
        return super().__getattribute__(name)


class CountForgottenInBytes(Mean):
    def state_bytes(self, batch, context, itemsize, store=Store()):
        return batch * 16 * itemsize


class NotANumberBesidePadding(Mean):
    """0 / 0 where a row has not begun is out of sight in the outputs, but not in the gradients."""

    def forward(self, x, pos, state=None):
        y, after, aux = super().forward(x, pos, state)
        return y + 0 * torch.where(pos.valid, 1, 0 * x[..., 0] / pos.valid)[..., None], after, aux


class Error(Mean):
    def forward(self, x, pos, state=None):
        if len(x) == 1:
            raise RuntimeError("one row is no batch")
        return super().forward(x, pos, state)


@dataclass(frozen=True)
class Summary(Node):
    """Sums as a node, to break its rules one by one."""

    total: Tensor
    count: Tensor

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.total, self.count)

    def map(self, function):
        return type(self)(function(self.total), function(self.count))

    def join(self, other, once):
        return type(self)(torch.cat([self.total, other.total]), torch.cat([self.count, other.count]))

    def rewind(self, n, once):
        raise CannotRewind("a sum forgets its terms")


class BeamsNotMoved(Summary):
    def select(self, index, once):
        return self.map(lambda t: t[torch.arange(len(index)) % len(t)])


class JoinedTheOtherWayRound(Summary):
    def join(self, other, once):
        return type(self)(torch.cat([other.total, self.total]), torch.cat([other.count, self.count]))


class OnlyTheCountRewound(Summary):
    def rewind(self, n, once):
        return replace(self, count=self.count - n[:, None])


class NothingRewound(Summary):
    def rewind(self, n, once):
        return self


def with_state(kind):
    class Noded(Mean):
        def init_state(self, batch, like, store=Store()):
            return kind(*super().init_state(batch, like))

        def forward(self, x, pos, state=None):
            y, after, aux = super().forward(x, pos, state)
            return y, kind(*after), aux

    return Noded()


@dataclass(frozen=True)
class SeesTheNextToken(Causal):
    def allows(self, q, k):
        return k <= q + 1


@dataclass(frozen=True)
class RingOneTooShort(Window):
    @property
    def reach(self):
        return Reach(0, self.window - 1)


@dataclass(frozen=True)
class NothingEverForgotten(Window):
    @property
    def reach(self):
        return Reach(0, None)


class FromShapes(ALiBi):
    """Distances counted in slots from the end, which holds only while all rows are equally long."""

    def bias(self, q, k, dtype):
        T, S = q.shape[1], k.shape[1]
        return super().bias(torch.arange(S - T, S)[None], torch.arange(S)[None], dtype)


class Changed(Softmax):
    """Softmax over a window whose cache is of another kind."""

    def __init__(self, kind):
        super().__init__(16, heads=4, pattern=Window(4))
        self.kind = kind

    def _as(self, kv):
        return self.kind(kv.k, kv.v, kv.pos, kv.layout, kv.used, kv.scales)

    def init_state(self, batch, like, store=Store()):
        return self._as(super().init_state(batch, like, store))

    def forward(self, x, pos, state=None):
        y, kv, aux = super().forward(x, pos, state)
        return y, self._as(kv), aux


class SharedWhenNothingMoves(KV):
    def select(self, index, once):
        same = torch.equal(index, torch.arange(len(self.pos)))
        return self if same else super().select(index, once)


class RewoundBeyondTheRing(KV):
    def rewind(self, n, once):
        keep = self.pos.amax(1, keepdim=True) - n[:, None]
        return replace(self, pos=torch.where(self.pos <= keep, self.pos, -1))


class PadsEncoded(Softmax):
    def encode(self, x, pos):
        pos.index = torch.arange(x.shape[1]).expand(len(x), -1)
        return super().encode(x, pos)


class CentredEncoder(Softmax):
    def encode(self, x, pos):
        return super().encode(x - (x * pos.valid[..., None]).mean((0, 1)), pos)


class ReadsInOrder(Cross):
    """Row i reads source i modulo their number, wherever the rows have gone."""

    def forward(self, x, pos, state):
        y, _, aux = super().forward(x, pos, replace(state, row=torch.arange(len(x)) % len(state.k)))
        return y, state, aux


class ReadsSourcePadding(Cross):
    def remember(self, source, pos):
        memory = super().remember(source, pos)
        return replace(memory, mask=torch.ones_like(memory.mask))


@dataclass(frozen=True)
class SourcesJoinedUnnumbered(Memory):
    def join(self, other, once):
        joined = super().join(other, once)
        return replace(joined, row=torch.cat([self.row, other.row]))


class UnnumberedCross(Cross):
    def remember(self, source, pos):
        memory = super().remember(source, pos)
        return SourcesJoinedUnnumbered(memory.k, memory.v, memory.mask, memory.row)


def softmax(pattern: Pattern = Causal(), **options):
    return Softmax(16, heads=4, pattern=pattern, **options)
