"""Compressive Transformer that keeps the tokens which were read most.

Paper     Rae et al. 2019, "Compressive Transformers for Long-Range Sequence Modelling", arXiv:1911.05507
Equation  Transformer-XL's attention over [cm, m, h]: M_c compressed slots, M recent tokens, the segment of L
          tokens up to the query; of a segment that leaves m, the L / C tokens which received the most
          attention since they were written, averaged over heads, stay in cm, in their order
State     keys and values of M + 2 L tokens and of M_c + L / C slots, the attention that each token of M + L
          received, in float32 or wider
Cost      whole sequence O(T (L + M + M_c) H D), segment after segment; one token O((L + M + M_c) H D)
Decodes   exactly: segments begin at absolute multiples of L, so calls may be cut anywhere; attention that is
          equal up to rounding may be ordered either way
Differs   nothing; which tokens stay has no gradient, and no gradient flows back into them
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from writehead.core.bind import Of, itself
from writehead.core.cache import KV, Keys, append, empty
from writehead.core.pattern import Reach
from writehead.core.positions import Positions
from writehead.core.segments import Project, keep, projected, remember
from writehead.core.slots import Store
from writehead.mixer import NOTHING, Aux
from writehead.mixers.transformer_xl import TwoMemories, distances, projections
from writehead.ops.cut import cut, lay

NOT_READ = -1e30  # a score whose exponential is exactly 0, and rows of nothing but padding stay finite


class Used(NamedTuple):
    """The past."""

    recent: KV  # the segment before the memory, the memory and the open segment
    old: KV  # tokens that stay
    attention: Tensor  # (B, N, L) received by the tokens of segment n at n modulo N


class MostUsed(TwoMemories):
    """Self-attention with a memory, and behind it those tokens that were read most."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        segment: int = 128,
        memory: int = 128,
        compressed: int = 128,
        ratio: int = 2,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X, even.
            heads, kv_heads, head_dim: as in `Softmax`.
            segment: tokens L of which some stay together, a multiple of `ratio`.
            memory: tokens M before the segment that its queries read, a multiple of `segment`.
            compressed: slots M_c that reach further back.
            ratio: of so many tokens C one stays.

        Raises:
            ValueError: numbers that do not divide or are out of range.
        """
        super().__init__(dim, heads, kv_heads, head_dim, segment, memory, compressed, ratio)

    @property
    def reaches(self) -> tuple[Reach, Reach]:
        """Of recent tokens, among them the segment that left the memory last, and of those that stay."""
        L, M = self.recent.segment, self.recent.memory
        return Reach(0, M + 2 * L), Reach(0, self.compressed + self.per_block)

    def init_state(self, batch: int, like: Tensor, store: Store = Store()) -> Used:
        G, widths = self.qkv.kv_heads, (self.qkv.head_dim, self.qkv.head_dim)
        recent, old = (empty(batch, G, widths, reach, store, like) for reach in self.reaches)
        dtype = torch.promote_types(like.dtype, torch.float32)
        return Used(recent, old, like.new_zeros(batch, self.lag + 1, self.recent.segment, dtype=dtype))

    def state_bytes(self, batch: int, context: int, itemsize: int, store: Store = Store()) -> int:
        L = self.recent.segment
        left = max(0, (context - 1) // L - self.lag) if context else 0
        seen = zip(self.reaches, (context, left * self.per_block), strict=True)
        received = batch * (self.lag + 1) * L * max(4, itemsize)
        return received + self.kept_bytes(batch, list(seen), itemsize, store)

    def bind(self, of: Of = itself) -> Callable[..., tuple[Tensor, Used, Aux]]:
        query, project = projections(self.qkv)
        take, out, start, L = self._take(of, project), of(self.out), self.init_state, self.recent.segment

        def run(x: Tensor, pos: Positions, state: Used | None = None) -> tuple[Tensor, Used, Aux]:
            state, q = start(len(x), x) if state is None else state, query(x, pos)
            segments = pos.once(in_segments, pos, L)
            if not segments:
                return out(torch.zeros_like(q).flatten(2)), state, NOTHING
            columns, found = [run for _, run, _ in segments], []
            parts = zip(segments, cut(x, columns), cut(q, columns), strict=True)
            for (number, _, here), tokens, queries in parts:
                y, state = take(tokens, queries, here, number, state)
                found.append(y)
            return out(lay(found, columns, x.shape[1]).flatten(2)), state, NOTHING

        return run

    def forward(self, x: Tensor, pos: Positions, state: Used | None = None) -> tuple[Tensor, Used, Aux]:
        return self.bind()(x, pos, state)

    def _take(self, of: Of, project: Project) -> Callable[..., tuple[Tensor, Used]]:
        """One segment's tokens: choose what stays of the one that leaves, read, add up what was read."""
        read, L, lag, R = self._read(of), self.recent.segment, self.lag, self.per_block

        def run(x: Tensor, q: Tensor, pos: Positions, number: int, state: Used) -> tuple[Tensor, Used]:
            recent, old, attention = state
            recent, near, hidden = keep(recent, x, pos, project)
            begins, place = (pos.index == number * L).any(1), number % (lag + 1)
            leaving = number - lag - 1
            stays = most_read(attention[:, place], R) + leaving * L
            order = leaving * R + torch.arange(R, device=x.device)
            index = torch.where((begins & (leaving >= 0))[:, None], order, -1)
            slot = (near.pos[:, None] == stays[:, :, None]).to(torch.uint8).argmax(2)
            if hidden is not None:
                picked = hidden.detach().gather(1, slot[..., None].expand(-1, -1, hidden.shape[-1]))
                old, far = remember(old, picked, Positions(index), project)
            else:
                old = projected(old, project) if old.v.shape[-1] == 0 else old
                at = slot[..., None, None].expand(-1, -1, *near.k.shape[2:])
                old, far = append(old, near.k.gather(1, at), near.v.gather(1, at), Positions(index))
            y, received = read(q, near, far, pos)
            fresh = torch.arange(lag + 1, device=x.device) == place
            attention = attention.masked_fill((begins[:, None] & fresh)[..., None], 0)
            known = near.pos.clamp_min(0)
            flat = _segment(known, L) % (lag + 1) * L + known % L
            attention = attention.flatten(1).scatter_add(1, flat, received.to(attention))
            return y, Used(recent, old, attention.unflatten(1, (lag + 1, L)))

        return run

    def _read(self, of: Of) -> Callable[[Tensor, Keys, Keys, Positions], tuple[Tensor, Tensor]]:
        pattern, scale, relative, G = self.recent, self.scale, of(self.relative), self.qkv.kv_heads
        u, v = self.content_bias, self.place_bias

        def run(q: Tensor, near: Keys, far: Keys, pos: Positions) -> tuple[Tensor, Tensor]:
            """What the queries read (B, T, H, D), and the attention that each near key received (B, S)."""
            placed, read = (q + v) * scale, ((q + u) * scale).unflatten(2, (G, -1))
            mask, away = self.slots_read(pos.index, far.pos)
            parts = (
                (near, pattern.mask(pos.index, near.pos), distances(pos.index, near.pos)),
                (far, mask, away),
            )
            found = []
            for keys, allowed, distance in parts:
                content = torch.einsum("btgxd,bsgd->bgxts", read, keys.k).flatten(1, 2)
                found.append((content + relative(placed, distance, pos)).masked_fill(~allowed, NOT_READ))
            weights = torch.cat(found, -1).softmax(-1) * pos.valid[:, None, :, None]
            value = torch.cat([near.v, far.v], 1)
            y = torch.einsum("bgxts,bsgd->btgxd", weights.unflatten(1, (G, -1)), value).flatten(2, 3)
            return y, weights[..., : near.pos.shape[1]].detach().mean(1).sum(1)

        return run


def most_read(attention: Tensor, count: int) -> Tensor:
    """The places (B, count) of the largest values of each row (B, L), in order; the earlier of equal ones."""
    order = attention.sort(dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(1).values


def _segment(index: Tensor, size: int) -> Tensor:
    return torch.div(index, size, rounding_mode="floor")


def in_segments(pos: Positions, size: int) -> list[tuple[int, slice, Positions]]:
    """For each segment that a call touches: its number, the run of columns with its tokens of all rows, and
    their positions, other segments' tokens as padding."""
    valid, index, T = pos.valid, pos.index, pos.index.shape[1]
    if not bool(valid.any()):
        return []
    numbers = _segment(index, size)
    number = numbers[valid]
    low = int(number.min())
    if low == int(number.max()):
        return [(low, slice(0, T), pos)]
    column = torch.arange(T, device=index.device).expand_as(index)[valid]
    none = column.new_full((int(number.max()) - low + 1,), T)
    first = none.scatter_reduce(0, number - low, column, "amin").tolist()
    last = torch.zeros_like(none).scatter_reduce(0, number - low, column, "amax").tolist()
    found = []
    for n, (a, b) in enumerate(zip(first, last, strict=True), low):
        if a < T:
            run = slice(a, b + 1)
            own = torch.where(numbers[:, run] == n, index[:, run], -1)
            found.append((n, run, Positions(own)))
    return found
