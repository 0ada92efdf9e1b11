"""Compressive Transformer: what leaves the memory is compressed and kept for longer.

Paper     Rae et al. 2019, "Compressive Transformers for Long-Range Sequence Modelling", arXiv:1911.05507
Equation  Transformer-XL's attention over [cm, m, h]: M_c compressed slots, M recent tokens, the segment of L
          tokens up to the query; a segment of hidden states that leaves m becomes L / C slots of cm, f_c(h)
State     keys and values of L + M tokens and of M_c + (M + L) / C slots, hidden states of the open segment
Cost      whole sequence O(T (L + M + M_c) H D); one token O((L + M + M_c) H D); reach M + C M_c a layer
Decodes   exactly: segments begin at absolute multiples of L, so calls may be cut anywhere
Differs   a segment is compressed when it is whole and read once it has left m, which gives the paper's
          function and spares the hidden states of m; distances count slots, as in the paper;
          most-used compression is `most_used`; the reconstruction loss is a mean over queries and channels
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from writehead.core.bind import Of, itself
from writehead.core.cache import KV, Keys, empty
from writehead.core.chunks import Open, close, open_bytes, opened, runs_between, summarise
from writehead.core.pattern import Reach
from writehead.core.positions import Positions
from writehead.core.segments import Segments, keep
from writehead.core.shapes import check_choice
from writehead.core.slots import Store
from writehead.core.work import Call, Work, products
from writehead.mixer import NOTHING, Aux
from writehead.mixers.softmax import View, _views
from writehead.mixers.transformer_xl import TwoMemories, apart, cut_views, projections
from writehead.ops.attend import attend, merge
from writehead.ops.cut import cut

PIECE = 256  # queries of the reconstruction loss at a time


class Compressed(NamedTuple):
    """The past."""

    open: Open  # hidden states of the open segment
    recent: KV  # memory and open segment
    old: KV  # compressed slots, also those of segments that the memory still holds


class Pool(nn.Module):
    """f_c: every C hidden states of a block (B, N, L, X) become one."""

    def __init__(self, dim: int, ratio: int, kind: str) -> None:
        super().__init__()
        check_choice("compression", kind, ("conv", "max", "mean"))
        self.ratio, self.kind = ratio, kind
        self.map = nn.Linear(ratio * dim, dim) if kind == "conv" else None

    def forward(self, x: Tensor) -> Tensor:
        groups: Tensor = x.unflatten(2, (-1, self.ratio))
        if self.map is not None:
            return self.map(groups.flatten(3))  # type: ignore[no-any-return]
        return groups.mean(3) if self.kind == "mean" else torch.amax(groups, 3)


class Compressive(TwoMemories):
    """Self-attention with a memory, and a compressed memory behind it."""

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
        compression: str = "conv",
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X, even.
            heads, kv_heads, head_dim: as in `Softmax`.
            segment: tokens L that are compressed together, a multiple of `ratio`.
            memory: tokens M before the segment that its queries read, a multiple of `segment`.
            compressed: slots M_c that reach further back.
            ratio: tokens C that become one slot.
            compression: "conv" (learned by the reconstruction loss in aux alone), "max" or "mean".

        Raises:
            ValueError: numbers that do not divide or are out of range, an unknown compression.
        """
        super().__init__(dim, heads, kv_heads, head_dim, segment, memory, compressed, ratio)
        self.compress = Pool(dim, ratio, compression)

    @property
    def reach(self) -> Reach:
        """Of the compressed slots, those that wait behind the memory, and those of the open segment, which
        its last query stores while it reads the oldest."""
        return Reach(0, self.compressed + (self.recent.memory + self.recent.segment) // self.ratio)

    def init_state(self, batch: int, like: Tensor, store: Store = Store()) -> Compressed:
        widths = (self.qkv.head_dim, self.qkv.head_dim)
        recent, old = (
            empty(batch, self.qkv.kv_heads, widths, reach, store, like)
            for reach in (self.recent.reach, self.reach)
        )
        return Compressed(opened(batch, self.recent.segment, like, self.qkv.weight.shape[1]), recent, old)

    def state_bytes(self, batch: int, context: int, itemsize: int, store: Store = Store()) -> int:
        L, X = self.recent.segment, self.qkv.weight.shape[1]
        seen = ((self.recent.reach, context), (self.reach, context // L * self.per_block))
        return open_bytes(batch, L, X, itemsize) + self.kept_bytes(batch, seen, itemsize, store)

    def work(self, call: Call) -> Work:
        work = super().work(call)
        return replace(work, flops=work.flops + 2 * call.rows * (products(self.compress) // self.ratio))

    def bind(self, of: Of = itself) -> Callable[..., tuple[Tensor, Compressed, Aux]]:
        query, project = projections(self.qkv)
        attend_to, lose, out, start = self._attend(of), self._lose(), of(self.out), self.init_state
        compress, per_block, learns = of(self.compress), self.per_block, self.compress.map is not None

        def pooled(blocks: Tensor) -> Tensor:
            # neither the language model's loss reaches f_c nor anything flows back into the tokens
            with torch.no_grad():
                slots: Tensor = compress(blocks)
            return slots

        def run(x: Tensor, pos: Positions, state: Compressed | None = None) -> tuple[Tensor, Compressed, Aux]:
            waiting, recent, old = start(len(x), x) if state is None else state
            q = query(x, pos)
            recent, near, hidden = keep(recent, x, pos, project)
            waiting, blocks = close(waiting, x.detach(), pos)
            old, far = summarise(old, blocks, per_block, pooled, project, x)
            aux = lose(q, hidden, near, pos) if learns and self.training and hidden is not None else NOTHING
            return out(attend_to(q, near, far, pos).flatten(2)), Compressed(waiting, recent, old), aux

        return run

    def forward(
        self, x: Tensor, pos: Positions, state: Compressed | None = None
    ) -> tuple[Tensor, Compressed, Aux]:
        return self.bind()(x, pos, state)

    def _attend(self, of: Of) -> Callable[[Tensor, Keys, Keys, Positions], Tensor]:
        pattern, scale, relative = self.recent, self.scale, of(self.relative)
        u, v, per_block, most = self.content_bias, self.place_bias, self.per_block, self.compressed

        def run(q: Tensor, near: Keys, far: Keys, pos: Positions) -> Tensor:
            pieces, exact = [], torch.is_grad_enabled()
            views = pos.once(_views, pos, near.pos, pattern, True)
            runs = pos.once(_old, pos, near.pos, far.pos, pattern, per_block, most)
            old = (cut(far.k, runs), cut(far.v, runs))
            lies = pos.once(apart, pos, near.pos, pattern)
            parts = zip(views, lies, runs, *cut_views(views, q, near), *old, strict=True)
            for view, distance, run, one, k, val, *slots in parts:
                placed, read = (one + v) * scale, one + u
                bias = relative(placed, distance, pos)
                part = attend(read, k, val, mask=view.mask, bias=bias, scale=scale, exact=exact)
                mask, away = self.slots_read(view.q, far.pos[:, run])
                if bool(mask.any()):
                    bias = relative(placed, away, pos)
                    other = attend(read, *slots, mask=mask, bias=bias, scale=scale, exact=exact)
                    part = merge([part, other])
                pieces.append(part[0])
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

        return run

    def _lose(self) -> Callable[[Tensor, Tensor, Keys, Positions], Aux]:
        """The attention reconstruction loss, whose gradient reaches f_c only.

        Each query reads by content alone, without positions, the segment that leaves the memory when its own
        ends: once as tokens and once compressed.
        """
        L, lag, scale, per_block = self.recent.segment, self.lag, self.scale, self.per_block
        _, project = projections(self.qkv, learn=False)

        def run(q: Tensor, hidden: Tensor, near: Keys, pos: Positions) -> Aux:
            q, leaving = q.detach(), _floor(pos.index, L) - lag
            valid = pos.valid & (leaving >= 0)
            number, blocks = _gather(hidden.detach(), near.pos, leaving, valid, L)
            k, v = project(self.compress(blocks).flatten(1, 2))
            slots = Keys(k, v, number.repeat_interleave(per_block, 1))
            blocks_of = torch.where(near.pos >= 0, _floor(near.pos, L), -2)
            tokens = Keys(near.k.detach(), near.v.detach(), blocks_of)
            error = _errors(q, slots, tokens, torch.where(valid, leaving, -1), scale)
            return {"reconstruction": error / valid.sum().clamp_min(1)}

        return run


def _errors(q: Tensor, slots: Keys, tokens: Keys, asked: Tensor, scale: float) -> Tensor:
    """The sum over queries of what they read of the tokens and of the slots of one block apart.

    Args:
        q: (B, T, H, D).
        slots, tokens: what they read; positions are numbers of blocks.
        asked: (B, T) the block of each query, -1 = none.
        scale: of the scores.
    """
    queries, spans = [], []
    for first in range(0, q.shape[1], PIECE):
        real = asked[:, first : first + PIECE]
        real = real[real >= 0]
        if len(real):
            queries.append(slice(first, first + PIECE))
            spans.append((int(real.min()), int(real.max()) + 1))
    runs, total = runs_between(slots.pos, spans), q.new_zeros(())
    read = runs_between(tokens.pos, spans)
    pieces = zip(queries, read, runs, cut(slots.k, runs), cut(slots.v, runs), strict=True)
    for t, s, run, k, v in pieces:
        short = _read_block(q[:, t], Keys(k, v, slots.pos[:, run]), asked[:, t], scale)
        whole = Keys(tokens.k[:, s], tokens.v[:, s], tokens.pos[:, s])
        long = _read_block(q[:, t], whole, asked[:, t], scale)
        total = total + ((long - short).square().mean((2, 3)) * (asked[:, t] >= 0)).sum()
    return total


def _read_block(q: Tensor, keys: Keys, asked: Tensor, scale: float) -> Tensor:
    """What queries read of the one block (B, T) that each asks for, -1 = none; positions are blocks."""
    mask = (asked[:, :, None] == keys.pos[:, None]) & (asked >= 0)[:, :, None]
    return attend(q, keys.k, keys.v, mask=mask[:, None], scale=scale, exact=True)[0]


def _floor(index: Tensor, size: int) -> Tensor:
    return torch.div(index, size, rounding_mode="floor")


def _gather(hidden: Tensor, pos: Tensor, leaving: Tensor, valid: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The numbers (B, N) and hidden states (B, N, L, X) of the blocks that queries ask for.

    Args:
        hidden, pos: hidden states (B, S, X) and their positions, -1 = nothing.
        leaving, valid: (B, T) the block that each query asks for, and whether it does.
        size: tokens L of a block.
    """
    low = torch.where(valid, leaving, leaving.max()).amin(1).clamp_min(0)
    N = max(1, int(torch.where(valid, leaving - low[:, None], 0).max()) + 1)
    slot = pos - (low * size)[:, None]
    row, token = ((pos >= 0) & (slot >= 0) & (slot < N * size)).nonzero(as_tuple=True)
    grid = hidden.new_zeros(len(hidden), N * size, hidden.shape[-1])
    grid[row, slot[row, token]] = hidden[row, token]
    return low[:, None] + torch.arange(N, device=pos.device), grid.unflatten(1, (N, size))


def _old(
    pos: Positions, near: Tensor, slot: Tensor, recent: Segments, per_block: int, most: int
) -> list[slice]:
    """The run of compressed slots (B, S) that each view of the call may read."""
    views: list[View] = pos.once(_views, pos, near, recent, True)
    if len(views) == 1:
        return [slice(None)]
    spans = []
    for view in views:
        ends = _floor(recent.first(view.q[view.q >= 0]), recent.segment) * per_block
        spans.append((int(ends.min()) - most, int(ends.max())) if len(ends) else (0, 0))
    return runs_between(slot, spans)
