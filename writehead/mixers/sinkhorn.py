"""Sinkhorn attention: each block reads itself and a block of mixed keys that a network sorts for it.

Paper     Tay, Bahri, Yang, Metzler, Juan 2020, "Sparse Sinkhorn Attention", arXiv:2002.11296
Equation  R_n = sortnet(summary_n) / temperature, P = exp of R balanced in logs (rows, columns, ..., rows),
          psi(K)_n = sum_m P_nm K_m; queries of block n read [psi(K)_n ; K_n] with one softmax. Causal:
          m < n, summary_n = mean of the tokens up to the first of block n, columns balanced over rows n' <= n
State     all keys and values, the mixed ones of the current block, and for each iteration the log-sum of each
          column so far
Cost      whole sequence O(T W D + (T / W)^2 W D) a head; one token O(W D), the first of a block O(S D)
Decodes   exactly: a row of P is final when the first token of its block is there
Differs   the paper balances columns over all rows, later ones included, which no decoder can; a last row
          normalisation makes the weights of a block add up to 1. Means in place of running sums. The first
          block has nothing to sort. Gumbel noise in training only. The quadratic mixture is another mixer.
          kv_heads: each write-head sorts its blocks once for the query heads that share it
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.core.bind import Of, itself
from writehead.core.cache import KV, append, empty, state_bytes
from writehead.core.heads import QKV
from writehead.core.pattern import Causal
from writehead.core.positions import Positions
from writehead.core.shapes import check_shape
from writehead.core.slots import Layout, Store
from writehead.core.work import Call, Work, products, values
from writehead.mixer import NOTHING, Aux
from writehead.ops.attend import attend
from writehead.ops.sinkhorn import LOW, balance, next_row
from writehead.positions.base import NoPosition, Scheme, has


class SinkhornState(NamedTuple):
    """What later tokens need.

    Attributes:
        kv: all keys and values.
        total: (B, X), the sum of all tokens.
        columns: (B, iterations, G, blocks), the log-sums of the columns of P.
        k, v: (B, W, G, D), mixed for the current block.
    """

    kv: KV
    total: Tensor
    columns: Tensor
    k: Tensor
    v: Tensor


class Sinkhorn(nn.Module):
    """Self-attention over the own block and a sorted one."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int = 32,
        blocks: int = 128,
        iterations: int = 5,
        temperature: float = 0.75,
        sortcut: int | None = None,
        position: Scheme | None = None,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads: query heads H.
            kv_heads: key/value heads G, each with a sorting of its own; default H.
            head_dim: width D of a head; default dim / heads.
            window: tokens W of a block.
            blocks: the most blocks of a sequence, which the sorting network has outputs for.
            iterations: of balancing.
            temperature: below 1 sorts more sharply.
            sortcut: encoders only: all queries read the first so many sorted blocks, and nothing else.
            position: the model's position scheme; keys are turned before they are mixed.

        Raises:
            ValueError: numbers that do not fit, or a position scheme that adds to the scores.
        """
        super().__init__()
        self.position = NoPosition() if position is None else position
        if has(self.position, "bias"):
            raise ValueError(
                "Sinkhorn attention adds no bias to scores, its mixed keys stand nowhere; use rotary, "
                "sinusoidal, learned or axial positions"
            )
        if min(window, blocks, iterations) < 1:
            raise ValueError(
                f"window={window}, blocks={blocks} and iterations={iterations} must be at least 1"
            )
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be above 0; 0.75 is usual")
        if sortcut is not None and not 1 <= sortcut <= blocks:
            raise ValueError(f"sortcut={sortcut} must be from 1 to blocks={blocks}")
        self.qkv = QKV(dim, heads, kv_heads, head_dim)
        self.heads, self.kv_heads, self.head_dim = heads, self.qkv.kv_heads, self.qkv.head_dim
        self.window, self.blocks, self.iterations = window, blocks, iterations
        self.temperature, self.sortcut = temperature, sortcut
        self.inner, self.outer = nn.Linear(dim, dim), nn.Linear(dim, self.kv_heads * blocks)
        self.out = nn.Linear(heads * self.head_dim, dim, bias=False)

    def init_state(self, batch: int, like: Tensor, store: Store = Store()) -> SinkhornState:
        self._check_causal()
        G, D = self.kv_heads, self.head_dim
        wide = torch.promote_types(like.dtype, torch.float32)
        total = like.new_zeros(batch, self.qkv.weight.shape[1], dtype=wide)
        columns = like.new_full((batch, self.iterations, G, self.blocks), LOW, dtype=wide)
        k, v = (like.new_zeros(batch, self.window, G, D) for _ in range(2))
        return SinkhornState(empty(batch, G, (D, D), Causal().reach, store, like), total, columns, k, v)

    def state_bytes(self, batch: int, context: int, itemsize: int, store: Store = Store()) -> int:
        G, D, X = self.kv_heads, self.head_dim, self.qkv.weight.shape[1]
        slots = Layout.of(Causal().reach, store).slots(context, store.capacity)
        size = itemsize if store.dtype is None else store.dtype.itemsize
        kept = max(4, itemsize) * (X + self.iterations * G * self.blocks) + 2 * itemsize * self.window * G * D
        return state_bytes(batch, slots, G, (D, D), size) + batch * kept

    def work(self, call: Call) -> Work:
        D, H, W = self.head_dim, self.heads, self.window
        slot = call.slot_bytes(self.kv_heads, 2 * D)
        sorting = products(self.inner, self.outer) // W
        mixing = self.kv_heads * D * (2 * call.context + call.tokens) // 2 // W * 2
        return Work(
            flops=2 * call.rows * (products(self.qkv, self.out) + sorting + mixing + 2 * H * D * 2 * W),
            weights=values(self),
            state_read=call.batch * slot * (call.context // W + min(2 * W, call.context)),
            state_written=call.rows * slot,
        )

    def bind(self, of: Of = itself) -> Callable[..., tuple[Tensor, SinkhornState, Aux]]:
        project, out, W = self._project(of), of(self.out), self.window

        def run(
            x: Tensor, pos: Positions, state: SinkhornState | None = None
        ) -> tuple[Tensor, SinkhornState, Aux]:
            q, k, v = project(x, pos)
            state = self.init_state(len(x), x) if state is None else state
            kv, keys = append(state.kv, k, v, pos)
            real = pos.valid
            if not bool(real.any()):
                return out(torch.zeros_like(q).flatten(2)), state._replace(kv=kv), NOTHING
            first, last = int(pos.index[real].min()) // W, int(pos.index.max()) // W
            log_k, log_v = (_by_position(t, keys.pos, 0, (last + 1) * W) for t in (keys.k, keys.v))
            mixed_k, mixed_v, state = self._mix(x, pos, state, log_k, log_v, first, last)
            state = state._replace(kv=kv)
            queries = _by_position(q, pos.index, first * W, (last + 1 - first) * W)
            y = self._read(queries, (mixed_k, mixed_v), (log_k[:, first * W :], log_v[:, first * W :]), first)
            at = (pos.index - first * W).clamp_min(0)[..., None, None].expand_as(q)
            return out(y.gather(1, at).flatten(2)), state, NOTHING

        return run

    def forward(
        self, x: Tensor, pos: Positions, state: SinkhornState | None = None
    ) -> tuple[Tensor, SinkhornState, Aux]:
        return self.bind()(x, pos, state)

    def encode(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        """Blocks are sorted over the whole sequence; queries read all of their own and of a sorted block."""
        H, W, (B, T, _) = self.heads, self.window, x.shape
        heads = self._project(itself)(x, pos)
        N = int(pos.index.max()) // W + 1 if bool(pos.valid.any()) else 1
        laid = [_by_position(t, pos.index, 0, N * W) for t in (*heads, pos.valid[..., None, None])]
        queries, k, v, there = laid
        summary = _by_position(x[:, :, None], pos.index, 0, N * W).unflatten(1, (N, W)).sum((2, 3))
        full = there.unflatten(1, (N, W)).any(2)[..., 0, 0]
        scores = self._sort(summary)[..., :N].transpose(1, 2)
        P = balance(scores, (full[:, :, None] & full[:, None])[:, None], self.iterations).to(k.dtype)
        blocks = [t.unflatten(1, (N, W)) for t in (k, v)]
        mixed_k, mixed_v = (torch.einsum("bgnm,bmwgd->bnwgd", P, t) for t in blocks)
        # what is mixed of padded tokens is zeros, weighed as the slot's real tokens are
        if self.sortcut is not None:
            mixed_k, mixed_v = (t[:, : self.sortcut].flatten(1, 2) for t in (mixed_k, mixed_v))
            mask = full[:, : self.sortcut].repeat_interleave(W, 1)[:, None, None]
            y, _ = attend(queries, mixed_k, mixed_v, mask=mask)
        else:
            own = there.unflatten(1, (N, W))[..., 0, 0]
            mask = torch.cat([full[..., None].expand_as(own), own], 2).flatten(0, 1)[:, None, None]
            both = [torch.cat(pair, 2).flatten(0, 1) for pair in ((mixed_k, blocks[0]), (mixed_v, blocks[1]))]
            y, _ = attend(queries.unflatten(1, (N, W)).flatten(0, 1), *both, mask=mask)
            y = y.reshape(B, N * W, H, -1)
        at = pos.index.clamp_min(0)[..., None, None].expand(B, T, H, self.head_dim)
        return self.out(y.gather(1, at).flatten(2)), NOTHING

    def _project(self, of: Of) -> Callable[[Tensor, Positions], tuple[Tensor, Tensor, Tensor]]:
        qkv, H, G, X, scheme = of(self.qkv), self.heads, self.kv_heads, self.inner.in_features, self.position
        turns, infuses = has(scheme, "rotate"), has(scheme, "infuse")

        def run(x: Tensor, pos: Positions) -> tuple[Tensor, Tensor, Tensor]:
            check_shape("x", x, "B T X", B=pos.index.shape[0], T=pos.index.shape[1], X=X)
            self._check_length(pos)
            scheme.check_context(pos)
            qk, v = qkv(x, scheme.infuse(x, pos) if infuses else None)
            q, k = (scheme.rotate(qk, pos) if turns else qk).split([H, G], 2)
            return q, k, v

        return run

    def _sort(self, summary: Tensor) -> Tensor:
        """Summaries (B, n, X) -> scores of blocks (B, n, G, blocks)."""
        scores = self.outer(F.relu(self.inner(summary))).unflatten(-1, (self.kv_heads, self.blocks))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.training:
            uniform = torch.rand_like(scores).clamp(1e-9, 1 - 1e-7)
            scores = scores - torch.log(-torch.log(uniform))
        assert isinstance(scores, Tensor)
        return scores / self.temperature

    def _mix(
        self, x: Tensor, pos: Positions, state: SinkhornState, k: Tensor, v: Tensor, first: int, last: int
    ) -> tuple[Tensor, Tensor, SinkhornState]:
        """Mixed keys and values (B, n, W, G, D) of blocks first, ..., last, and the state that remembers."""
        W, n, B = self.window, last + 1 - first, len(x)
        before = state.total[:, None] + (x * pos.valid[..., None]).to(state.total.dtype).cumsum(1)
        starts = torch.arange(first, last + 1, device=x.device) * W
        here = (pos.index[:, None] == starts[:, None]) & pos.valid[:, None]  # (B, n, T)
        begun, at = here.any(2), here.int().argmax(2)
        summary = before.gather(1, at[..., None].expand(-1, -1, x.shape[2])) / (starts + 1)[:, None]
        scores, columns, rows = self._sort(summary.to(x.dtype)), state.columns, []
        for i in range(n):
            row, after = next_row(scores[:, i], columns, first + i)
            columns = torch.where(begun[:, i, None, None, None], after, columns)
            rows.append(row)
        P = torch.stack(rows, 1)[..., : last + 1].to(k.dtype)  # (B, n, G, blocks)
        new = [torch.einsum("bngm,bmwgd->bnwgd", P, t.unflatten(1, (last + 1, W))) for t in (k, v)]
        kept = begun[..., None, None, None]
        k, v = (torch.where(kept, t, old[:, None]) for t, old in zip(new, (state.k, state.v), strict=True))
        newest = (pos.index.amax(1) // W - first).clamp_min(0)
        some = pos.valid.any(1)[:, None, None, None]
        row = torch.arange(B, device=x.device)
        k_now, v_now = (torch.where(some, t[row, newest], old) for t, old in ((k, state.k), (v, state.v)))
        return k, v, state._replace(total=before[:, -1], columns=columns, k=k_now, v=v_now)

    def _read(
        self, q: Tensor, mixed: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], first: int
    ) -> Tensor:
        """Queries (B, n W, H, D) against the mixed and the own keys of their blocks."""
        B, W, n = len(q), self.window, q.shape[1] // self.window
        blocks = torch.arange(first, first + n, device=q.device)
        sorted_ones = (blocks > 0)[:, None, None].expand(n, W, W)
        triangle = torch.ones(W, W, dtype=torch.bool, device=q.device).tril().expand(n, W, W)
        mask = torch.cat([sorted_ones, triangle], 2).expand(B, n, W, 2 * W).flatten(0, 1)[:, None]
        both = [
            torch.cat([m, t.unflatten(1, (n, W))], 2).flatten(0, 1) for m, t in zip(mixed, own, strict=True)
        ]
        y, _ = attend(q.unflatten(1, (n, W)).flatten(0, 1), *both, mask=mask)
        return y.reshape(B, n * W, *y.shape[2:])

    def _check_length(self, pos: Positions) -> None:
        last = int(pos.index.max()) if pos.index.numel() else -1
        if last >= self.blocks * self.window:
            raise ValueError(
                f"position {last} does not exist: blocks={self.blocks} of window={self.window} tokens end at "
                f"{self.blocks * self.window - 1}"
            )

    def _check_causal(self) -> None:
        if self.sortcut is not None:
            raise ValueError(
                "sortcut serves encoders: all queries read the first sorted blocks; leave it out to decode"
            )


def _by_position(t: Tensor, pos: Tensor, start: int, length: int) -> Tensor:
    """t (B, S, ...) laid out by position, start, ..., start + length - 1; zeros where nothing stands."""
    at = torch.where((pos >= start) & (pos < start + length), pos - start, length)
    shape = (len(t), length + 1, *t.shape[2:])
    index = at.view(*at.shape, *[1] * (t.dim() - 2)).expand_as(t)
    return t.new_zeros(shape).scatter(1, index, t)[:, :length]
