"""Softmax attention with any head sharing, any pattern and any position scheme.

Paper     Shazeer 2019, "Fast Transformer Decoding: One Write-Head is All You Need", arXiv:1911.02150
          (kv_heads = 1); Ainslie et al. 2023, "GQA", arXiv:2305.13245; Vaswani et al. 2017, arXiv:1706.03762
          (kv_heads = heads); Xiao et al. 2023, arXiv:2309.17453 (window and sinks)
Equation  y_t = sum_s softmax_s(scale q_t.k_s + bias(t, s)) v_s over the keys s that the pattern allows
State     keys and values of the tokens that later ones may read: 2 G D values and a position a slot
          (core/cache.py)
Cost      whole sequence O(T^2 H D); one token O(S H D) operations over S G D * 2 cached values
Decodes   exactly: a decode step is the same call with T = 1
Differs   scores are scaled by D^-1/2 (the 2019 paper folds that into the initialiser); scale=1 gives its
          convention
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from writehead.core.bind import Of, itself
from writehead.core.cache import KV, Keys, append, empty, state_bytes
from writehead.core.chunks import runs_between
from writehead.core.heads import QKV
from writehead.core.pattern import Causal, Full, Pattern, from_spec
from writehead.core.positions import Positions
from writehead.core.shapes import check_choice, check_shape
from writehead.core.slots import Layout, Store
from writehead.core.split import split
from writehead.core.work import Call, Work, products, scores, slots_read, values
from writehead.mixer import NOTHING, Aux
from writehead.ops.attend import attend
from writehead.ops.blocks import Bias
from writehead.ops.whole import attend_whole, pays
from writehead.positions.base import NoPosition, Scheme, has

SCORES = 1 << 20  # a masked or biased call goes over its queries in pieces of about so many scores a head


class Softmax(nn.Module):
    """Self-attention: project, position, remember, attend, project."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: str = "none",
        qk_norm: float | None = None,
        pattern: Pattern | Mapping[str, Any] = Causal(),
        scale: float | None = None,
        position: Scheme | None = None,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads: query heads H.
            kv_heads: key/value heads G, a divisor of H; default H. 1 is multi-query attention.
            head_dim: width D of a head; default dim / heads.
            bias: which projections have one: "none", "qkv" or "all".
            qk_norm: with an epsilon, RMS-normalise query and key heads.
            pattern: who may read whom; a non-causal one makes the mixer an encoder's.
            scale: factor on the scores; default head_dim ** -0.5.
            position: the model's position scheme.

        Raises:
            ValueError: numbers of heads that do not divide, or a pattern for another number of heads.
        """
        super().__init__()
        check_choice("bias", bias, ("none", "qkv", "all"))
        self.pattern = from_spec(pattern)
        if self.pattern.heads not in (None, heads):
            raise ValueError(f"the pattern is for {self.pattern.heads} heads, the mixer has heads={heads}")
        self.qkv = QKV(dim, heads, kv_heads, head_dim, bias != "none", qk_norm)
        self.out = nn.Linear(heads * self.qkv.head_dim, dim, bias=bias == "all")
        self.scale = self.qkv.head_dim**-0.5 if scale is None else scale
        self.position = NoPosition() if position is None else position
        self.biased = has(self.position, "bias")

    def init_state(self, batch: int, like: Tensor, store: Store = Store()) -> KV:
        widths = (self.qkv.head_dim, self.qkv.head_dim)
        return empty(batch, self.qkv.kv_heads, widths, self.pattern.reach, store, like)

    def state_bytes(self, batch: int, context: int, itemsize: int, store: Store = Store()) -> int:
        slots = Layout.of(self.pattern.reach, store).slots(context, store.capacity)
        size = itemsize if store.dtype is None else store.dtype.itemsize
        return state_bytes(batch, slots, self.qkv.kv_heads, (self.qkv.head_dim, self.qkv.head_dim), size)

    def work(self, call: Call) -> Work:
        D, slot = self.qkv.head_dim, call.batch * call.slot_bytes(self.qkv.kv_heads, 2 * self.qkv.head_dim)
        pattern = self.pattern_for(call.tokens)
        new = Layout.of(pattern.reach, call.store).used(call.tokens)
        return Work(
            flops=2 * call.rows * products(self.qkv, self.out)
            + 2 * 2 * D * scores(pattern, self.qkv.heads, call),
            weights=values(self.qkv, self.out),
            state_read=slots_read(pattern, call) * slot,
            state_written=new * slot,
        )

    def bind(self, of: Of = itself) -> Callable[..., tuple[Tensor, KV, Aux]]:
        if not self.pattern.causal:
            raise ValueError(
                f"pattern {self.pattern} reads keys after the query, so it cannot decode: use encode"
            )
        project, attend_to = self._project(of), self._attend(self.pattern)
        out, start = of(self.out), self.init_state

        def run(x: Tensor, pos: Positions, state: KV | None = None) -> tuple[Tensor, KV, Aux]:
            q, k, v = project(x, pos)
            state, keys = append(start(len(x), x) if state is None else state, k, v, pos)
            return out(attend_to(q, keys, pos).flatten(2)), state, NOTHING

        return run

    def forward(self, x: Tensor, pos: Positions, state: KV | None = None) -> tuple[Tensor, KV, Aux]:
        return self.bind()(x, pos, state)

    def encode(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        q, k, v = self._project(itself)(x, pos)
        y = self._attend(self.pattern)(q, Keys(k, v, pos.index), pos)
        return self.out(y.flatten(2)), NOTHING

    def whole(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        """`forward` from the empty past for whoever wants no state after: nothing is cached."""
        return Softmax.encode(self, x, pos)

    def pattern_for(self, length: int) -> Pattern:
        """Who may read whom in a sequence of `length` tokens."""
        return self.pattern

    def _project(
        self, of: Of, module: QKV | None = None
    ) -> Callable[[Tensor, Positions], tuple[Tensor, Tensor, Tensor]]:
        qkv, H, G, X = of(module or self.qkv), self.qkv.heads, self.qkv.kv_heads, self.qkv.weight.shape[1]
        scheme = self.position
        infuse, rotate = scheme.infuse if has(scheme, "infuse") else None, scheme.rotate
        turns, ends = has(scheme, "rotate"), scheme.max_context is not None

        def run(x: Tensor, pos: Positions) -> tuple[Tensor, Tensor, Tensor]:
            B, T = pos.index.shape
            if x.shape != (B, T, X):
                check_shape("x", x, "B T X", B=B, T=T, X=X)
            if ends:
                scheme.check_context(pos)
            heads, v = qkv(x) if infuse is None else qkv(x, infuse(x, pos))
            heads = rotate(heads, pos) if turns else heads
            q, k = split(heads, (H, G), 2)
            return q, k, v

        return run

    def _attend(self, pattern: Pattern) -> Callable[[Tensor, Keys, Positions], Tensor]:
        scale, score_bias = self.scale, self.position.bias if self.biased else None
        plain = pattern in (Causal(), Full()) and not self.biased
        gaps = pattern.causal and pattern.reach.window is None and pattern != Causal()
        wanted = tuple(self.position.parameters()) if self.biased else ()
        bias = None if score_bias is None else Bias(score_bias, wanted, self.position.relative)

        def run(q: Tensor, keys: Keys, pos: Positions) -> Tensor:
            if not plain and keys.pos is pos.index and pays(pattern, q.shape[1], bias is not None):
                return attend_whole(q, keys.k, keys.v, pos, pattern, bias=bias, scale=scale)
            if gaps and q.shape[1] == 1 and keys.pos is not pos.index:
                keys = _picked(keys, pos, pattern)
            pieces = []
            for view in pos.once(_views, pos, keys.pos, pattern, score_bias is not None):
                t, s = view.queries, view.keys
                added = None if score_bias is None else pos.once(score_bias, view.q, view.k, q.dtype)
                part = (q, keys.k, keys.v) if view.whole else (q[:, t], keys.k[:, s], keys.v[:, s])
                pieces.append(attend(*part, mask=view.mask, bias=added, causal=view.causal, scale=scale)[0])
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

        return run


class ByLength(Softmax):
    """Softmax attention of an encoder whose pattern depends on how long a row is."""

    def encode(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        q, k, v = self._project(itself)(x, pos)
        groups = pos.once(_lengths, pos.index)
        sets: dict[Pattern, list[int]] = {}
        for row, length in enumerate(groups):
            sets.setdefault(self.pattern_for(length), []).append(row)
        if len(sets) == 1:
            y = self._attend(next(iter(sets)))(q, Keys(k, v, pos.index), pos)
            return self.out(y.flatten(2)), NOTHING
        pieces, order = [], []
        for pattern, rows in sets.items():
            own = Positions(pos.index[rows])
            pieces.append(self._attend(pattern)(q[rows], Keys(k[rows], v[rows], own.index), own))
            order += rows
        y = torch.cat(pieces)[torch.tensor(order).argsort()]
        return self.out(y.flatten(2)), NOTHING


class View(NamedTuple):
    """A run of queries and the run of keys that some of them read."""

    queries: slice
    keys: slice
    q: Tensor  # (B, T) positions
    k: Tensor  # (B, S) positions
    mask: Tensor | None  # None = all read all, or a triangle
    causal: bool = False  # the last keys are the new tokens, each reads itself and those before
    whole: bool = True  # there is no other view


def _views(pos: Positions, k_pos: Tensor, pattern: Pattern, biased: bool) -> list[View]:
    """The pieces in which a call goes over its queries; masks are made once and shared by the layers."""
    q_pos, everything = pos.index, slice(None)
    T, S = q_pos.shape[1], k_pos.shape[1]
    if pattern == Causal() and not biased and _in_order(pos, k_pos):
        return [View(everything, everything, q_pos, k_pos, None, causal=True)]
    if pattern == Full() and not biased and bool((k_pos >= 0).all()):
        return [View(everything, everything, q_pos, k_pos, None)]
    rows = max(16, SCORES // max(S, 1), _rows_of_band(pattern))
    if rows >= T:
        return [View(everything, everything, q_pos, k_pos, _mask(q_pos, k_pos, pattern))]
    views: list[View] = []
    queries = [slice(first, first + rows) for first in range(0, T, rows)]
    for t, near in zip(queries, _in_reach([q_pos[:, t] for t in queries], k_pos, pattern), strict=True):
        s = _readable(q_pos[:, t], k_pos, pattern, near)
        q, k = q_pos[:, t], k_pos[:, s]
        mask = _mask(q, k, pattern)
        if mask is not None and views and views[-1].mask is not None and torch.equal(mask, views[-1].mask):
            mask = views[-1].mask  # windows are alike all along a sequence, and a graph holds each mask
        views.append(View(t, s, q, k, mask, whole=False))
    return views


def _in_order(pos: Positions, k_pos: Tensor) -> bool:
    """Are the slots the tokens so far, one after the other, and the last of them the new ones?

    With a graph a past needs the mask, which the layers then share.
    """
    if k_pos is pos.index:
        return pos.start is not None or pos.in_place
    T, S = pos.index.shape[1], k_pos.shape[1]
    if T == 1 or torch.is_grad_enabled() or pos.start is None or pos.start + T != S:
        return False
    return bool((k_pos == torch.arange(S, device=k_pos.device)).all())


def _rows_of_band(pattern: Pattern) -> int:
    """Queries whose keys are not many more than those that one of them reads; 0 if that grows with the
    sequence."""
    reach = pattern.reach
    if reach.window is None or reach.columns is not None:
        return 0
    band = max(reach.lead + reach.window, 256)
    return min(band, SCORES // (2 * band))


def _mask(q: Tensor, k: Tensor, pattern: Pattern) -> Tensor | None:
    mask = pattern.mask(q, k)
    return None if bool(mask.all()) else mask


def _in_reach(queries: Sequence[Tensor], k_pos: Tensor, pattern: Pattern) -> list[slice]:
    """For each run of queries (B, T) a run of slots outside of which none of it reads."""
    window = pattern.reach.window
    if window is None or pattern.reach.lead or pattern.reach.columns is not None or not pattern.causal:
        return [slice(0, k_pos.shape[1])] * len(queries)
    spans = []
    for q in queries:
        real = q[q >= 0]
        spans.append((int(real.min()) - window + 1, int(real.max()) + 1) if len(real) else (0, 0))
    return runs_between(k_pos, spans)


def _readable(q: Tensor, k_pos: Tensor, pattern: Pattern, within: slice) -> slice:
    """The run of slots outside of which no query of q reads, itself a part of the run `within`."""
    real = q[q >= 0]
    if not len(real):
        return slice(0, 0)
    k_pos = k_pos[:, within]
    keep = (k_pos >= 0) & pattern.needed(k_pos, real.min())
    if pattern.causal:
        keep &= k_pos <= real.max()
    slots = keep.any(0).nonzero() + within.start
    return slice(int(slots[0]), int(slots[-1]) + 1) if len(slots) else slice(0, 0)


def _picked(keys: Keys, pos: Positions, pattern: Pattern) -> Keys:
    """The slots that one new token a row reads, out of a cache whose slots are positions."""
    at = pos.once(_reads, pos.index, keys.pos, pattern)
    if at is None:
        return keys
    slot, places = at
    index = slot[..., None, None]
    k, v = (t.gather(1, index.expand(-1, -1, *t.shape[2:])) for t in (keys.k, keys.v))
    return Keys(k, v, places)


def _reads(q: Tensor, k_pos: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor] | None:
    """The slots read (B, K) and the positions in them, or None if that is most of the cache."""
    k = pattern.keys(q[:, 0].clamp_min(0))
    k = k[:, (k >= 0).any(0)]
    if 2 * k.shape[1] > k_pos.shape[1]:
        return None
    slot = k.clamp(0, k_pos.shape[1] - 1)
    return slot, torch.where((k >= 0) & (q >= 0), k_pos.gather(1, slot), -1)


def _lengths(index: Tensor) -> list[int]:
    """Of each row: one more than its last position, at least 1."""
    lengths: list[int] = (index.amax(1) + 1).clamp_min(1).tolist()
    return lengths
