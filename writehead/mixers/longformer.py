"""Longformer: a window, with gaps for some heads, and global tokens with projections of their own.

Paper     Beltagy, Peters, Cohan 2020, "Longformer: The Long-Document Transformer", arXiv:2004.05150
Equation  a query that is not global: one softmax over the global keys and the keys i + d k, |k| <= w/2, with
          q, k, v; a global query: softmax over all keys with q_g, k_g, v_g
State     encoder: none; causal form: a ring of d (w - 1) + 1 keys and values behind those of the global
          tokens, and k_g, v_g of the global tokens
Cost      whole sequence O(T (w + g)), and g T for the global rows
Decodes   the causal form exactly; the paper's encoder cannot decode
Differs   global tokens are the first g unless `encode` is told which; the causal form counts the query in its
          window and lets the first g tokens be global for what follows, which the paper's has not
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from writehead.core.bind import Of, itself
from writehead.core.cache import KV, Keys, append, empty, state_bytes
from writehead.core.heads import QKV
from writehead.core.pattern import Causal, Dilated, Full, Leading, Pattern, PerHead, Reach, Readers, Window
from writehead.core.positions import Positions
from writehead.core.shapes import check_multiple, check_shape
from writehead.core.slots import Layout, Store
from writehead.core.state import Node, Once
from writehead.core.work import Call, Work
from writehead.mixer import NOTHING, Aux
from writehead.mixers.softmax import Softmax
from writehead.ops.attend import attend
from writehead.ops.blocks import block_attend
from writehead.positions.base import Scheme


@dataclass(frozen=True)
class Past(Node):
    """What the causal form remembers.

    Attributes:
        near: keys and values of window and global tokens.
        first: those that global queries read, of the global tokens.
    """

    near: KV
    first: KV

    def tensors(self) -> Iterator[Tensor]:
        yield from self.near.tensors()
        yield from self.first.tensors()

    def map(self, function: Callable[[Tensor], Tensor]) -> "Past":
        return Past(self.near.map(function), self.first.map(function))

    def select(self, index: Tensor, once: Once) -> "Past":
        return Past(self.near.select(index, once), self.first.select(index, once))

    def join(self, other: Node, once: Once) -> "Past":
        assert isinstance(other, Past)
        return Past(self.near.join(other.near, once), self.first.join(other.first, once))

    def rewind(self, n: Tensor, once: Once) -> "Past":
        keep = self.near.pos.amax(1) + 1 - n if self.near.pos.shape[1] else torch.zeros_like(n)
        pos = torch.where(self.first.pos < keep[:, None], self.first.pos, -1)
        return Past(self.near.rewind(n, once), replace(self.first, pos=pos))


class Longformer(Softmax):
    """The encoder of the paper and its causal form."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: str = "qkv",
        window: int = 512,
        dilations: list[int] | None = None,
        tokens: int = 1,
        causal: bool = False,
        position: Scheme | None = None,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads: query heads H.
            kv_heads: key/value heads G of both projections; default H.
            head_dim: width D; default dim / heads.
            bias: which projections have one, as in `Softmax`.
            window: w; half of it lies on each side of the query, in the causal form all up to the query.
            dilations: d of each key/value head, 1 = no gaps (0 in the paper); default 1.
            tokens: g, how many tokens at the beginning are global.
            causal: the causal form.
            position: the model's position scheme.

        Raises:
            ValueError: a window that is odd or too small, or dilations that are not one for each head.
        """
        if window < 1 or tokens < 0 or (window % 2 and not causal):
            raise ValueError(
                f"window={window}, tokens={tokens}: the window must be at least 1 and, for an encoder, even; "
                f"nearest is {max(2, window + window % 2)}; tokens must be at least 0"
            )
        groups = heads if kv_heads is None else kv_heads
        check_multiple("heads", heads, "kv_heads", groups)
        given = [1] * groups if dilations is None else list(dilations)
        if len(given) != groups:
            raise ValueError(f"dilations={given}: need one for each of {groups} key/value heads")
        back, after = (window, 0) if causal else (window // 2 + 1, window // 2)
        own: list[Pattern] = [
            Window(back, after) if d == 1 else Dilated(back, d, after)
            for d in (given[h * groups // heads] for h in range(heads))
        ]
        self.windows = own[0] if len(set(own)) == 1 else PerHead(tuple(own))
        local = self.windows | Leading(tokens) if tokens else self.windows
        self.local = Causal() & local if causal and tokens else local
        pattern = self.local if causal or not tokens else self.local | Readers(tokens)
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            bias=bias,
            pattern=pattern,
            position=position,
        )
        self.tokens = tokens
        self.global_qkv = QKV(dim, heads, kv_heads, head_dim, bias != "none")

    def init_state(self, batch: int, like: Tensor, store: Store = Store()) -> Past:  # type: ignore[override]
        widths = (self.qkv.head_dim, self.qkv.head_dim)
        first = empty(batch, self.qkv.kv_heads, widths, self._first, store, like)
        return Past(super().init_state(batch, like, store), first)

    def state_bytes(self, batch: int, context: int, itemsize: int, store: Store = Store()) -> int:
        size = itemsize if store.dtype is None else store.dtype.itemsize
        slots = Layout.of(self._first, store).slots(min(context, self.tokens), store.capacity)
        first = state_bytes(batch, slots, self.qkv.kv_heads, (self.qkv.head_dim, self.qkv.head_dim), size)
        return super().state_bytes(batch, context, itemsize, store) + first

    @property
    def _first(self) -> Reach:
        return Reach(self.tokens, 0)

    def work(self, call: Call) -> Work:
        H, G, D, X = self.qkv.heads, self.qkv.kv_heads, self.qkv.head_dim, self.qkv.weight.shape[1]
        asked = max(0, min(self.tokens - call.context, call.tokens))
        projected = asked if self.pattern.causal else call.tokens
        read = asked * (asked + 1) // 2 + asked * call.context if self.pattern.causal else 0
        rows = call.batch * (asked * H + projected * 2 * G) * D * X
        more = 2 * rows + (2 * 2 * D * H * call.batch * read)
        return super().work(call) + Work(flops=more, weights=(H + 2 * G) * D * X if asked else 0)

    def bind(  # type: ignore[override]
        self, of: Of = itself
    ) -> Callable[..., tuple[Tensor, Past, Aux]]:
        if not self.pattern.causal:
            super().bind(of)  # says why not
        project, attend_to, out = self._project(of), self._attend(self.pattern), of(self.out)
        project_first, attend_first = self._project(of, self.global_qkv), self._attend(Causal())
        start, tokens = self.init_state, self.tokens

        def run(x: Tensor, pos: Positions, state: Past | None = None) -> tuple[Tensor, Past, Aux]:
            q, k, v = project(x, pos)
            near, first = (lambda past: (past.near, past.first))(state or start(len(x), x))
            near, keys = append(near, k, v, pos)
            y = attend_to(q, keys, pos)
            count, own = pos.once(_leading, pos.index, tokens)
            if count:
                q, k, v = project_first(x[:, :count], own)
                first, keys = append(first, k, v, own)
                ours = attend_first(q, keys, own)
                ours = torch.where((own.index >= 0)[..., None, None], ours, y[:, :count])
                y = torch.cat([ours, y[:, count:]], 1)
            return out(y.flatten(2)), Past(near, first), NOTHING

        return run

    def whole(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        y, _, aux = self(x, pos)
        return y, aux

    def encode(self, x: Tensor, pos: Positions, marked: Tensor | None = None) -> tuple[Tensor, Aux]:
        """The bidirectional form.

        Args:
            x: (B, T, X).
            pos: where the tokens stand.
            marked: (B, T) bool, which tokens are global; default the first ones.

        Raises:
            ValueError: `marked` in the causal form, with a position scheme that adds a bias, or of another
                shape.
        """
        if self.pattern.causal:
            if marked is not None:
                raise ValueError("the causal form has its first tokens global: marked is for the encoder")
            y, _, aux = self(x, pos)
            return y, aux
        q, k, v = self._project(itself)(x, pos)
        if marked is None:
            y = self._attend(self.local)(q, Keys(k, v, pos.index), pos)
            marked = (pos.index >= 0) & (pos.index < self.tokens)
        else:
            check_shape("marked", marked, "B T", B=len(x), T=x.shape[1])
            if self.biased:
                raise ValueError("global tokens anywhere need a position scheme without a bias on the scores")
            marked = marked & pos.valid
            y = self._around(q, k, v, pos, marked)
        if bool(marked.any()):
            y = self._reading_all(x, pos, marked, y)
        return self.out(y.flatten(2)), NOTHING

    def _around(self, q: Tensor, k: Tensor, v: Tensor, pos: Positions, marked: Tensor) -> Tensor:
        """Queries that are not global: copies of the global keys go in front, where all read them."""
        token, there = _gathered(marked)
        M = token.shape[1]
        index = pos.index if pos.in_place else torch.where(pos.valid, pos.valid.cumsum(1) - 1, -1)
        if not pos.in_place and bool((index != pos.index).any()):
            raise ValueError("global tokens anywhere need rows that start at position 0 and have no gaps")
        at = token[..., None, None]
        k, v = (torch.cat([t.gather(1, at.expand(-1, -1, *t.shape[2:])), t], 1) for t in (k, v))
        q = torch.cat([q.new_zeros(len(q), M, *q.shape[2:]), q], 1)
        pattern = self.windows | Leading(M) if M else self.windows
        if pos.in_place:
            valid = torch.cat([there, pos.valid & ~marked], 1)
            return block_attend(q, k, v, pattern, valid=valid, scale=self.scale)[:, M:]
        front = torch.where(there, torch.arange(M, device=q.device), -1)
        k_pos = torch.cat([front, torch.where(marked | (pos.index < 0), -1, pos.index + M)], 1)
        later = Positions(torch.where(pos.index >= 0, pos.index + M, -1))
        return self._attend(pattern)(q[:, M:], Keys(k, v, k_pos), later)

    def _reading_all(self, x: Tensor, pos: Positions, marked: Tensor, y: Tensor) -> Tensor:
        """y (B, T, H, D) with the rows of global queries replaced."""
        token, there = _gathered(marked)
        q, k, v = self._project(itself, self.global_qkv)(x, pos)
        q = q.gather(1, token[..., None, None].expand(-1, -1, *q.shape[2:]))
        places = torch.where(there, pos.index.gather(1, token), -1)
        bias = self.position.bias(places, pos.index, q.dtype) if self.biased else None
        ours, _ = attend(q, k, v, mask=Full().mask(places, pos.index), bias=bias, scale=self.scale)
        row, slot = there.nonzero(as_tuple=True)
        return y.index_put((row, token[row, slot]), ours[row, slot])


def _leading(index: Tensor, tokens: int) -> tuple[int, Positions]:
    """How many columns of a call hold one of the first `tokens` positions, and those positions."""
    own = torch.where(index < tokens, index, -1)
    columns = (own >= 0).any(0).nonzero()
    count = int(columns.max()) + 1 if len(columns) else 0
    return count, Positions(own[:, :count])


def _gathered(marked: Tensor) -> tuple[Tensor, Tensor]:
    """The marked tokens of each row: their columns (B, M), and which of the M there are."""
    count = marked.sum(1)
    most = int(count.max()) if marked.numel() else 0
    token = marked.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return token, torch.arange(most, device=marked.device) < count[:, None]
