"""Long-Short Transformer: a window of tokens beside learned summaries of what is further away.

Paper     Zhu et al. 2021, "Long-Short Transformer: Efficient Transformers for Language and Vision",
          arXiv:2107.02192
Equation  summaries of a chunk: kbar_r = sum_s P_sr k_s, P = softmax over its tokens of x W_P, v alike; one
          softmax over [window: (q s + u).LN(k_j) + (q s + v).W_R R_(i-j) | summaries of chunks before the
          query's: q s.(LN'(kbar) + W'_R R_slots)]
State     keys and values of W tokens and of R summaries a chunk of C, the hidden states of the open chunk
Cost      whole sequence O(T (W + R T / C) H D), encoder O(T (W + R) H D); one token O((W + R S / C) H D)
Decodes   exactly: chunks begin at absolute multiples of C, so calls may be cut anywhere
Differs   the authors' cached segments are cut into heads before they are projected, so their calls cannot be
          cut with more than one head; here the state is carried. Norms are per head, so key/value heads can
          be shared. The encoder has no positions of its own
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.core.bind import Of, itself
from writehead.core.cache import KV, Keys, empty, state_bytes
from writehead.core.chunks import Open, between, close, open_bytes, opened, summarise
from writehead.core.heads import QKV
from writehead.core.pattern import Causal, Window
from writehead.core.positions import Positions
from writehead.core.segments import remember
from writehead.core.slots import Layout, Store
from writehead.core.work import Call, Work, products, scores, values
from writehead.mixer import NOTHING, Aux
from writehead.mixers.softmax import _views
from writehead.mixers.transformer_xl import apart, cut_views, distances, projections
from writehead.ops.attend import attend, merge
from writehead.ops.cut import cut
from writehead.positions.relative import Relative


class Short(NamedTuple):
    """The past."""

    open: Open  # hidden states of the open chunk
    near: KV  # the window
    far: KV  # summaries of whole chunks


class LongShort(nn.Module):
    """The causal form: a sliding window, and summaries of every chunk before the query's."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int = 128,
        chunk: int = 16,
        rank: int = 1,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X, even.
            heads, kv_heads, head_dim: as in `Softmax`.
            window: keys W that a query reads one by one, its own among them.
            chunk: tokens C that are summarised together.
            rank: summaries R of a chunk.

        Raises:
            ValueError: numbers that do not divide or are out of range.
        """
        super().__init__()
        if chunk < 1 or rank < 1:
            raise ValueError(f"chunk={chunk} and rank={rank} must both be at least 1")
        self.window, self.chunk, self.rank = Window(window), chunk, rank
        self.qkv = QKV(dim, heads, kv_heads, head_dim)
        H, G, D = self.qkv.heads, self.qkv.kv_heads, self.qkv.head_dim
        self.near_norm, self.far_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.share = nn.Linear(dim, G * rank)
        self.near_places, self.far_places = Relative(dim, G, D), Relative(dim, G, D)
        self.content_bias = nn.Parameter(0.02 * torch.randn(H, D))
        self.place_bias = nn.Parameter(0.02 * torch.randn(H, D))
        self.out = nn.Linear(H * D, dim, bias=False)
        self.scale = D**-0.5

    def init_state(self, batch: int, like: Tensor, store: Store = Store()) -> Short:
        G, widths = self.qkv.kv_heads, (self.qkv.head_dim, self.qkv.head_dim)
        near, far = (empty(batch, G, widths, p.reach, store, like) for p in (self.window, Causal()))
        return Short(opened(batch, self.chunk, like, self.qkv.weight.shape[1]), near, far)

    def state_bytes(self, batch: int, context: int, itemsize: int, store: Store = Store()) -> int:
        G, D, X = self.qkv.kv_heads, self.qkv.head_dim, self.qkv.weight.shape[1]
        size = itemsize if store.dtype is None else store.dtype.itemsize
        total = open_bytes(batch, self.chunk, X, itemsize)
        for pattern, seen in ((self.window, context), (Causal(), context // self.chunk * self.rank)):
            slots = Layout.of(pattern.reach, store).slots(seen, store.capacity)
            total += state_bytes(batch, slots, G, (D, D), size)
        return total

    def work(self, call: Call) -> Work:
        H, G, D = self.qkv.heads, self.qkv.kv_heads, self.qkv.head_dim
        slots = (call.context + call.tokens // 2) // self.chunk * self.rank  # a middle token's
        near, slot = min(call.context, self.window.window), call.batch * call.slot_bytes(G, 2 * D)
        pairs = scores(self.window, H, call) + call.rows * H * slots
        return Work(
            flops=2 * call.rows * (products(self.qkv, self.out, self.share) + 2 * G * D * self.rank)
            + 2 * 2 * D * pairs
            + self.near_places.flops(call.rows * H, near)
            + self.far_places.flops(call.rows * H, slots),
            weights=values(self),
            state_read=(near + call.context // self.chunk * self.rank) * slot,
            state_written=min(call.tokens, self.window.window) * slot,
        )

    def bind(self, of: Of = itself) -> Callable[..., tuple[Tensor, Short, Aux]]:
        query, project = projections(self.qkv)
        near_norm, far_norm, start, out = of(self.near_norm), of(self.far_norm), self.init_state, of(self.out)
        attend_to, compress, rank, G = (
            self._attend(of),
            self._compress(of, project),
            self.rank,
            self.qkv.kv_heads,
        )

        def normed(x: Tensor) -> tuple[Tensor, Tensor]:
            k, v = project(x)
            return near_norm(k), near_norm(v)

        def summaries(x: Tensor) -> tuple[Tensor, Tensor]:
            heads = far_norm(x.unflatten(-1, (2 * G, -1)))
            return heads.narrow(2, 0, G), heads.narrow(2, G, G)

        def run(x: Tensor, pos: Positions, state: Short | None = None) -> tuple[Tensor, Short, Aux]:
            waiting, near, far = start(len(x), x) if state is None else state
            q = query(x, pos)
            near, tokens = remember(near, x, pos, normed)
            waiting, blocks = close(waiting, x, pos)
            none = x.new_zeros(len(x), 1, 2 * G * q.shape[-1])
            far, slots = summarise(far, blocks, rank, compress, summaries, none)
            return out(attend_to(q, tokens, slots, pos).flatten(2)), Short(waiting, near, far), NOTHING

        return run

    def forward(self, x: Tensor, pos: Positions, state: Short | None = None) -> tuple[Tensor, Short, Aux]:
        return self.bind()(x, pos, state)

    def _compress(
        self, of: Of, project: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Callable[[Tensor], Tensor]:
        share, G, R = of(self.share), self.qkv.kv_heads, self.rank

        def run(x: Tensor) -> Tensor:
            """Chunks (B, N, C, X) -> their weighted keys and values (B, N, R, 2 G D)."""
            B, N = x.shape[:2]
            shares = share(x).softmax(2).unflatten(3, (G, R))
            k, v = (t.unflatten(0, (B, N)) for t in project(x.flatten(0, 1)))
            sums = [torch.einsum("bncgr,bncgd->bnrgd", shares, t) for t in (k, v)]
            return torch.cat(sums, 3).flatten(3)

        return run

    def _attend(self, of: Of) -> Callable[[Tensor, Keys, Keys, Positions], Tensor]:
        window, scale, chunk, rank = self.window, self.scale, self.chunk, self.rank
        near_places, far_places = of(self.near_places), of(self.far_places)
        u, v = self.content_bias, self.place_bias

        def run(q: Tensor, near: Keys, far: Keys, pos: Positions) -> Tensor:
            pieces, exact = [], torch.is_grad_enabled()
            views = pos.once(_views, pos, near.pos, window, True)
            lies = pos.once(apart, pos, near.pos, window)
            for view, distance, one, k, val in zip(views, lies, *cut_views(views, q, near), strict=True):
                read = one * scale
                bias = near_places(read + v, distance, pos)
                part = attend(read + u, k, val, mask=view.mask, bias=bias, scale=1.0, exact=exact)
                before = torch.div(view.q, chunk, rounding_mode="floor") * rank
                slots = far if view.whole else between(far, 0, int(before.max()))
                away = distances(before, slots.pos)
                mask = ((away > 0) & (slots.pos >= 0)[:, None] & (view.q >= 0)[:, :, None])[:, None]
                if bool(mask.any()):
                    bias = far_places(read, away, pos)
                    other = attend(read, slots.k, slots.v, mask=mask, bias=bias, scale=1.0, exact=exact)
                    part = merge([part, other])
                pieces.append(part[0])
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

        return run


class LongShortEncoder(nn.Module):
    """The bidirectional form: blocks that also read half a block on each side, and R summaries of
    everything."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int = 128,
        rank: int = 32,
    ) -> None:
        """Make the mixer; `window` is the size of a block, `rank` the summaries of the whole sequence.

        Raises:
            ValueError: numbers that do not divide or are out of range.
        """
        super().__init__()
        if window < 1 or rank < 1:
            raise ValueError(f"window={window} and rank={rank} must both be at least 1")
        self.window, self.rank = window, rank
        self.qkv = QKV(dim, heads, kv_heads, head_dim)
        H, G, D = self.qkv.heads, self.qkv.kv_heads, self.qkv.head_dim
        self.near_norm, self.far_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.share = nn.Linear(dim, G * rank)
        self.out = nn.Linear(H * D, dim, bias=False)

    def work(self, call: Call) -> Work:
        H, G, D = self.qkv.heads, self.qkv.kv_heads, self.qkv.head_dim
        read = min(call.tokens, self.window + 2 * max(self.window // 2, 1)) + self.rank
        return Work(
            flops=2 * call.rows * (products(self.qkv, self.out, self.share) + 2 * G * D * self.rank)
            + 2 * 2 * D * call.rows * H * read,
            weights=values(self),
        )

    def encode(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        G, R = self.qkv.kv_heads, self.rank
        query, project = projections(self.qkv)
        q, (k, v), valid = query(x, pos), project(x), pos.valid
        k, v = self.near_norm(k), self.near_norm(v)
        # an exponential of so low a score is exactly 0, and rows of nothing but padding stay finite
        shares = self.share(x).masked_fill(~valid[..., None], -1e30).softmax(1).unflatten(2, (G, R))
        far = [self.far_norm(torch.einsum("btgr,btgd->brgd", shares, t)) for t in (k, v)]
        pieces, firsts = [], range(0, x.shape[1], self.window)
        bands = [pos.once(_band, pos.index, first, self.window) for first in firsts]
        queries = [slice(first, first + self.window) for first in firsts]
        near = (cut(t, [s for s, _ in bands]) for t in (k, v))
        for t, (_, mask), one, *own in zip(queries, bands, cut(q, queries), *near, strict=True):
            mask = F.pad(mask, (R, 0), value=True)[:, None] & valid[:, t][:, None, :, None]
            keys, seen = (torch.cat([a, b], 1) for a, b in zip(far, own, strict=True))
            pieces.append(attend(one, keys, seen, mask=mask)[0])
        return self.out(torch.cat(pieces, 1).flatten(2)), NOTHING


def _band(index: Tensor, first: int, size: int) -> tuple[slice, Tensor]:
    """The run of slots that `size` queries from `first` on read, and which of them each reads
    (B, T, S)."""
    side, q = max(size // 2, 1), index[:, first : first + size]
    begin = torch.div(q, size, rounding_mode="floor") * size - side
    end = begin + size + 2 * side
    real = q >= 0
    if not bool(real.any()):
        return slice(0, 0), index.new_zeros(*q.shape, 0, dtype=torch.bool)
    low, high = begin[real].min(), end[real].max()
    slots = ((index >= 0) & (index >= low) & (index < high)).any(0).nonzero()
    s = slice(int(slots[0]), int(slots[-1]) + 1)
    k = index[:, None, s]
    return s, (k >= 0) & (k >= begin[..., None]) & (k < end[..., None])
