"""Transformer-XL: each segment reads itself and the hidden states before it, by relative positions.

Paper     Dai et al. 2019, "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context",
          arXiv:1901.02860
Equation  score(i, j) = ((q_i + u).k_j + (q_i + v).W_R R_(i-j)) / sqrt(D), softmax over the keys of i's
          segment up to i and the M positions before that segment
State     keys and values of the last L + M tokens (segment L, memory M), under autograd the hidden states
          they are made of, so that the projections learn from a memory that was detached
Cost      whole sequence O(T (L + M) H D); one token O((L + M) H D)
Decodes   exactly: segments begin at absolute multiples of L, so calls may be cut anywhere; segment = None is
          the sliding form, in which every query reads the last M keys, its own among them
Differs   no stop-gradient inside a call: the caller's `detach` between calls cuts gradients, as the training
          loop does; u and v belong to each layer (the authors' code can share them); the empty memory is
          empty, not zeros that are attended to; the authors' PyTorch code keeps M keys in the sliding form as
          here, their TensorFlow code M + 1
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.core.bind import Of, itself
from writehead.core.cache import KV, Keys, empty, state_bytes
from writehead.core.heads import QKV
from writehead.core.pattern import Pattern, Reach, Window
from writehead.core.positions import Positions
from writehead.core.segments import Segments, remember
from writehead.core.shapes import check_multiple, check_shape
from writehead.core.slots import Layout, Store
from writehead.core.work import Call, Work, products, scores, values
from writehead.mixer import NOTHING, Aux
from writehead.mixers.softmax import View, _views
from writehead.ops.attend import attend
from writehead.ops.cut import cut
from writehead.positions.relative import Relative

NOWHERE = 1 << 60


class TransformerXL(nn.Module):
    """Self-attention with a memory of segments and relative positions."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        segment: int | None = 128,
        memory: int = 128,
        clamp: int | None = None,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X, even.
            heads: query heads H.
            kv_heads: key/value heads G, a divisor of H; default H.
            head_dim: width D of a head; default dim / heads.
            segment: tokens L of a segment; None = every query reads the last `memory` keys.
            memory: tokens M before the segment that its queries read; may differ from training's.
            clamp: larger distances count as this one.

        Raises:
            ValueError: numbers that do not divide or are out of range.
        """
        super().__init__()
        self.pattern: Pattern = Window(memory) if segment is None else Segments(segment, memory)
        self.qkv = QKV(dim, heads, kv_heads, head_dim)
        H, G, D = self.qkv.heads, self.qkv.kv_heads, self.qkv.head_dim
        self.relative = Relative(dim, G, D, clamp)
        self.content_bias = nn.Parameter(0.02 * torch.randn(H, D))
        self.place_bias = nn.Parameter(0.02 * torch.randn(H, D))
        self.out = nn.Linear(H * D, dim, bias=False)
        self.scale = D**-0.5

    def init_state(self, batch: int, like: Tensor, store: Store = Store()) -> KV:
        widths = (self.qkv.head_dim, self.qkv.head_dim)
        return empty(batch, self.qkv.kv_heads, widths, self.pattern.reach, store, like)

    def state_bytes(self, batch: int, context: int, itemsize: int, store: Store = Store()) -> int:
        slots = Layout.of(self.pattern.reach, store).slots(context, store.capacity)
        size = itemsize if store.dtype is None else store.dtype.itemsize
        return state_bytes(batch, slots, self.qkv.kv_heads, (self.qkv.head_dim, self.qkv.head_dim), size)

    def work(self, call: Call) -> Work:
        H, D = self.qkv.heads, self.qkv.head_dim
        limit = Layout.of(self.pattern.reach, call.store).limit
        assert limit is not None
        slot = call.batch * call.slot_bytes(self.qkv.kv_heads, 2 * D)
        farthest = min(call.context + call.tokens, limit) - 1
        return Work(
            flops=2 * call.rows * products(self.qkv, self.out)
            + 2 * 2 * D * scores(self.pattern, H, call)
            + self.relative.flops(call.rows * H, farthest),
            weights=values(self),
            state_read=min(call.context, limit) * slot,
            state_written=min(call.tokens, limit) * slot,
        )

    def bind(self, of: Of = itself) -> Callable[..., tuple[Tensor, KV, Aux]]:
        query, project = projections(self.qkv)
        attend_to, out, start = self._attend(of), of(self.out), self.init_state

        def run(x: Tensor, pos: Positions, state: KV | None = None) -> tuple[Tensor, KV, Aux]:
            q = query(x, pos)
            state, keys = remember(start(len(x), x) if state is None else state, x, pos, project)
            return out(attend_to(q, keys, pos).flatten(2)), state, NOTHING

        return run

    def forward(self, x: Tensor, pos: Positions, state: KV | None = None) -> tuple[Tensor, KV, Aux]:
        return self.bind()(x, pos, state)

    def _attend(self, of: Of) -> Callable[[Tensor, Keys, Positions], Tensor]:
        pattern, scale, relative = self.pattern, self.scale, of(self.relative)
        u, v = self.content_bias, self.place_bias

        def run(q: Tensor, keys: Keys, pos: Positions) -> Tensor:
            pieces, views = [], pos.once(_views, pos, keys.pos, pattern, True)
            away = pos.once(apart, pos, keys.pos, pattern)
            for view, far, one, k, value in zip(views, away, *cut_views(views, q, keys), strict=True):
                bias = relative((one + v) * scale, far, pos)
                pieces.append(attend(one + u, k, value, mask=view.mask, bias=bias, scale=scale)[0])
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

        return run


class TwoMemories(nn.Module):
    """What mixers with a memory of segments and some slots behind it have in common."""

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None,
        head_dim: int | None,
        segment: int,
        memory: int,
        compressed: int,
        ratio: int,
    ) -> None:
        """Make the parts.

        Args:
            dim: width X, even.
            heads, kv_heads, head_dim: as in `Softmax`.
            segment: tokens L that leave the memory together, a multiple of `ratio`.
            memory: tokens M before the segment that its queries read, a multiple of `segment`.
            compressed: slots M_c that reach further back.
            ratio: tokens C that leave one slot.

        Raises:
            ValueError: numbers that do not divide or are out of range.
        """
        super().__init__()
        check_multiple("segment", segment, "ratio", ratio)
        check_multiple("memory", memory, "segment", segment)
        if compressed < 1:
            raise ValueError(f"compressed={compressed} must be at least 1; without it use transformer_xl")
        self.recent = Segments(segment, memory)
        self.compressed, self.ratio = compressed, ratio
        self.per_block, self.lag = segment // ratio, memory // segment
        self.qkv = QKV(dim, heads, kv_heads, head_dim)
        H, G, D = self.qkv.heads, self.qkv.kv_heads, self.qkv.head_dim
        self.relative = Relative(dim, G, D)
        self.content_bias = nn.Parameter(0.02 * torch.randn(H, D))
        self.place_bias = nn.Parameter(0.02 * torch.randn(H, D))
        self.out = nn.Linear(H * D, dim, bias=False)
        self.scale = D**-0.5

    def work(self, call: Call) -> Work:
        H, D = self.qkv.heads, self.qkv.head_dim
        L, M = self.recent.segment, self.recent.memory
        slots = min(self.compressed, max(0, (call.context // L - self.lag) * self.per_block))
        slot = call.batch * call.slot_bytes(self.qkv.kv_heads, 2 * D)
        near = min(call.context, L + M)
        return Work(
            flops=2 * call.rows * products(self.qkv, self.out)
            + 2 * 2 * D * (scores(self.recent, H, call) + call.rows * H * slots)
            + self.relative.flops(call.rows * H, near + slots),
            weights=values(self),
            state_read=(near + slots) * slot,
            state_written=min(call.tokens, L + M) * slot,
        )

    def kept_bytes(
        self, batch: int, seen: Sequence[tuple[Reach, int]], itemsize: int, store: Store = Store()
    ) -> int:
        """Bytes of caches that have seen so many tokens or slots each."""
        D = self.qkv.head_dim
        size = itemsize if store.dtype is None else store.dtype.itemsize
        slots = sum(Layout.of(reach, store).slots(count, store.capacity) for reach, count in seen)
        return state_bytes(batch, slots, self.qkv.kv_heads, (D, D), size)

    def slots_read(self, q: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Which slots (B, S) queries at q (B, T) read (B, 1, T, S), and how many slots away (B, T, S)."""
        first = self.recent.first(q)[:, :, None]  # of the memory; slots hold what lies before it
        end = torch.div(first, self.recent.segment, rounding_mode="floor") * self.per_block
        away = q[:, :, None] - first + end - slot[:, None, :]
        known = (slot >= 0)[:, None] & (q >= 0)[:, :, None]
        read = known & (slot[:, None] < end) & (slot[:, None] >= end - self.compressed)
        return read[:, None], away * read  # distances of the others may be of any size: no sinusoids for them


def projections(
    qkv: QKV, learn: bool = True
) -> tuple[Callable[[Tensor, Positions], Tensor], Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """The queries of new tokens, and the keys and values of new or remembered ones, as functions of hidden
    states; without `learn` no gradient reaches their weights."""
    H, G, D, X = qkv.heads, qkv.kv_heads, qkv.head_dim, qkv.weight.shape[1]
    q_rows, kv_rows = (qkv.weight if learn else qkv.weight.detach()).split([H * D, 2 * G * D])

    def query(x: Tensor, pos: Positions) -> Tensor:
        B, T = pos.index.shape
        check_shape("x", x, "B T X", B=B, T=T, X=X)
        return F.linear(x, q_rows).view(B, T, H, D)

    def project(x: Tensor) -> tuple[Tensor, Tensor]:
        heads = F.linear(x, kv_rows).unflatten(-1, (2 * G, D))
        return heads.narrow(2, 0, G), heads.narrow(2, G, G)

    return query, project


def cut_views(views: Sequence[View], q: Tensor, keys: Keys) -> list[Sequence[Tensor]]:
    """The queries, keys and values of each view."""
    read = [view.keys for view in views]
    return [cut(q, [view.queries for view in views]), cut(keys.k, read), cut(keys.v, read)]


def apart(pos: Positions, k_pos: Tensor, pattern: Pattern) -> list[Tensor]:
    """How far back each key of each view lies, (B or 1, T, S); views that are alike share one tensor, which a
    graph holds for as long as its scores."""
    found: list[Tensor] = []
    before: tuple[Tensor, Tensor] | None = None
    for view in pos.once(_views, pos, k_pos, pattern, True):
        rows = 1 if pos.start is not None and bool((view.k == view.k[:1]).all()) else len(view.q)
        q, k = view.q[:rows], view.k[:rows]
        first = q[:, :1]
        places = (q - first, k - first)
        alike = before is not None and all(torch.equal(a, b) for a, b in zip(before, places, strict=True))
        found.append(found[-1] if alike else distances(q, k))
        before = places
    return found


def distances(q: Tensor, k: Tensor) -> Tensor:
    """Positions q (B, T) and k (B, S) -> how far back each key lies (B, T, S); below 0 where nothing stands,
    since the largest distance says how many sinusoids are made."""
    return q[:, :, None] - torch.where(k < 0, NOWHERE, k)[:, None, :]
