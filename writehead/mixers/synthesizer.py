"""Synthesizer: attention weights from the query alone, or from nothing but positions, without keys.

Paper     Tay et al. 2020, "Synthesizer: Rethinking Self-Attention in Transformer Models", arXiv:2005.00743
Equation  y = softmax(sum_n a_n B_n) V, a on the simplex; dense B_i = W2 relu(W1 x_i + b1) + b2; random B = R;
          factorised dense B_(i, p b + q) = A_ip C_iq; factorised random B = R1 R2^T; dot B = Q K^T / sqrt(D)
State     values of all tokens, keys only with a dot member; positions up to N
Cost      whole sequence O(T^2 H D): what is saved is the product of queries and keys; one token O(S H D)
Decodes   exactly: the weights of a token depend on itself and its position
Differs   nothing is shared among query heads and values are not tied to keys, as the Mesh-TensorFlow code
          does; the two factors of the factorised form cover every pair, as the equation says
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.core.bind import Of, itself
from writehead.core.cache import KV, Keys, append, empty, state_bytes
from writehead.core.heads import QKV
from writehead.core.pattern import Causal, Full, Pattern
from writehead.core.positions import Positions
from writehead.core.shapes import check_choice, check_shape
from writehead.core.slots import Layout, Store
from writehead.core.work import Call, Work, products, scores, values
from writehead.mixer import NOTHING, Aux
from writehead.mixers.linformer import check_end
from writehead.mixers.softmax import View, _views
from writehead.ops.attend import attend
from writehead.ops.cut import cut

MEMBERS = ("dense", "random", "factorised_dense", "factorised_random", "dot")


class Dense(nn.Module):
    """Scores against N positions by a small network of the query, one for each head; with two factors each
    gives its own, and their products cover the N pairs."""

    def __init__(self, dim: int, heads: int, head_dim: int, factors: tuple[int, ...]) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, len(factors) * heads * head_dim)
        self.shape = (len(factors), heads, head_dim)
        self.outer = nn.ParameterList(torch.randn(heads, n, head_dim) * head_dim**-0.5 for n in factors)
        self.bias = nn.ParameterList(torch.zeros(heads, n) for n in factors)

    def forward(self, x: Tensor, end: int) -> Tensor:
        """x (B, T, X) -> (B, H, T, end)."""
        inner = F.relu(self.inner(x)).unflatten(-1, self.shape).unbind(2)
        if len(inner) == 1:
            return self._factor(inner[0], 0, end)
        a, c = (self._factor(inner[i], i, None) for i in range(2))
        pairs: Tensor = a[..., :, None] * c[..., None, :]
        return pairs.flatten(-2)[..., :end]

    def _factor(self, inner: Tensor, i: int, end: int | None) -> Tensor:
        scores: Tensor = torch.einsum("bthd,hnd->bhtn", inner, self.outer[i][:, :end])
        bias: Tensor = self.bias[i][:, None, :end]
        return scores + bias


class Table(nn.Module):
    """Scores between positions that no token changes, whole or as a product of two factors."""

    def __init__(self, heads: int, positions: int, rank: int | None) -> None:
        super().__init__()
        width = positions if rank is None else rank
        self.left = nn.Parameter(torch.randn(heads, positions, width) * (1 if rank is None else width**-0.5))
        self.right = None if rank is None else nn.Parameter(torch.randn(heads, positions, rank))

    def forward(self, index: Tensor, end: int) -> Tensor:
        """Positions (B, T) -> (B, H, T, end)."""
        left = self.left[:, :, :end] if self.right is None else self.left
        rows = left[:, index.clamp_min(0)].transpose(0, 1)
        return rows if self.right is None else rows @ self.right[:, :end].transpose(1, 2)


class Synthesizer(nn.Module):
    """Self-attention with synthetic scores, causal or bidirectional."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        max_context: int = 512,
        members: list[str] | tuple[str, ...] = ("dense",),
        rank: int = 8,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads, kv_heads, head_dim: as in `Softmax`.
            max_context: positions N.
            members: what is mixed, of `MEMBERS`; each at most once.
            rank: width of the factors of factorised_random.

        Raises:
            ValueError: numbers that do not divide or are out of range, unknown or repeated members.
        """
        super().__init__()
        for member in members:
            check_choice("member", member, MEMBERS)
        if not members or len(set(members)) < len(members):
            raise ValueError(f"members={list(members)} must name one or more kinds, each once")
        if max_context < 1 or rank < 1:
            raise ValueError(f"max_context={max_context} and rank={rank} must both be at least 1")
        self.max_context, self.members, self.dot = max_context, tuple(members), "dot" in members
        self.pattern: Pattern = Causal()
        self.qkv = QKV(dim, heads, kv_heads, head_dim)
        H, G, D = self.qkv.heads, self.qkv.kv_heads, self.qkv.head_dim
        if not self.dot:  # neither queries nor keys: the projection makes values only
            self.qkv.weight = nn.Parameter(self.qkv.weight.detach()[-G * D :].clone())
        side = next(n for n in range(int(max_context**0.5), 0, -1) if max_context % n == 0)
        self.scores = nn.ModuleDict()
        for name in members:
            if name in ("dense", "factorised_dense"):
                factors = (max_context,) if name == "dense" else (side, max_context // side)
                self.scores[name] = Dense(dim, H, D, factors)
            elif name != "dot":
                self.scores[name] = Table(H, max_context, None if name == "random" else rank)
        self.mix = nn.Parameter(torch.zeros(len(members))) if len(members) > 1 else None
        self.out = nn.Linear(H * D, dim, bias=False)

    @property
    def widths(self) -> tuple[int, int]:
        """Of a stored key and value."""
        return (self.qkv.head_dim if self.dot else 0, self.qkv.head_dim)

    def init_state(self, batch: int, like: Tensor, store: Store = Store()) -> KV:
        return empty(batch, self.qkv.kv_heads, self.widths, self.pattern.reach, store, like)

    def state_bytes(self, batch: int, context: int, itemsize: int, store: Store = Store()) -> int:
        slots = Layout.of(self.pattern.reach, store).slots(context, store.capacity)
        size = itemsize if store.dtype is None else store.dtype.itemsize
        return state_bytes(batch, slots, self.qkv.kv_heads, self.widths, size)

    def work(self, call: Call) -> Work:
        H, D = self.qkv.heads, self.qkv.head_dim
        slot = call.batch * call.slot_bytes(self.qkv.kv_heads, sum(self.widths))
        pairs = scores(self.pattern, H, call)
        per_pair = D + (D if self.dot else 0) + (D if "dense" in self.members else 0)
        flops = 2 * call.rows * products(self.qkv, self.out) + 2 * per_pair * pairs
        for name, part in self.scores.items():
            assert isinstance(part, Dense | Table)
            if isinstance(part, Dense):
                flops += 2 * call.rows * part.inner.weight.numel()
                flops += 2 * call.rows * sum(p.numel() for p in part.outer) * (name != "dense")
            elif part.right is not None:
                flops += 2 * part.right.shape[-1] * pairs
        return Work(
            flops=flops,
            weights=values(self),
            state_read=call.context * slot,
            state_written=call.tokens * slot,
        )

    def bind(self, of: Of = itself) -> Callable[..., tuple[Tensor, KV, Aux]]:
        project, attend_to, out, start = self._project(of), self._attend(of), of(self.out), self.init_state
        pattern = self.pattern

        def run(x: Tensor, pos: Positions, state: KV | None = None) -> tuple[Tensor, KV, Aux]:
            q, k, v = project(x, pos)
            state, keys = append(start(len(x), x) if state is None else state, k, v, pos)
            return out(attend_to(x, q, keys, pos, pattern).flatten(2)), state, NOTHING

        return run

    def forward(self, x: Tensor, pos: Positions, state: KV | None = None) -> tuple[Tensor, KV, Aux]:
        return self.bind()(x, pos, state)

    def encode(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        q, k, v = self._project(itself)(x, pos)
        y = self._attend(itself)(x, q, Keys(k, v, pos.index), pos, Full())
        return self.out(y.flatten(2)), NOTHING

    def _project(self, of: Of) -> Callable[[Tensor, Positions], tuple[Tensor, Tensor, Tensor]]:
        H, G, D, X = self.qkv.heads, self.qkv.kv_heads, self.qkv.head_dim, self.out.weight.shape[0]
        dot, weight, end = self.dot, self.qkv.weight, self.max_context

        def run(x: Tensor, pos: Positions) -> tuple[Tensor, Tensor, Tensor]:
            check_shape("x", x, "B T X", B=len(pos.index), T=pos.index.shape[1], X=X)
            check_end(pos, end)
            heads = F.linear(x, weight).unflatten(-1, (-1, D))
            if dot:
                q, k, v = heads.split([H, G, G], 2)
                return q, k, v
            return x.new_zeros(*x.shape[:2], H, 0), heads[..., :0], heads

        return run

    def _attend(self, of: Of) -> Callable[[Tensor, Tensor, Keys, Positions, Pattern], Tensor]:
        synthetic = self._synthetic(of)
        mix, at = self.mix, self.members.index("dot") if self.dot else None
        random = self.scores["random"] if "random" in self.members else None
        table = random.left if isinstance(random, Table) else None

        def run(x: Tensor, q: Tensor, keys: Keys, pos: Positions, pattern: Pattern) -> Tensor:
            pieces, shares = [], None if mix is None else mix.softmax(0)
            if at is not None:
                q = q if shares is None else q * shares[at]
            else:  # no product of queries and keys: one of width 1 that is zero
                q, k = q.new_zeros(*q.shape[:3], 1), keys.k.new_zeros(*keys.k.shape[:3], 1)
                keys = keys._replace(k=k)
            scale = keys.k.shape[-1] ** -0.5
            views = pos.once(_views, pos, keys.pos, pattern, True)
            for view, own in zip(views, _rows(table, views, pos.start), strict=True):
                t, s = view.queries, view.keys
                bias = synthetic(x[:, t], view, own, shares, pos)
                part = attend(q[:, t], keys.k[:, s], keys.v[:, s], mask=view.mask, bias=bias, scale=scale)
                pieces.append(part[0])
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

        return run

    def _synthetic(
        self, of: Of
    ) -> Callable[[Tensor, View, Tensor | None, Tensor | None, Positions], Tensor | None]:
        """The sum of the synthetic scores (B, H, T, S) of a view, which may bring its rows of the table."""
        parts = [
            (self.members.index(name), of(part), isinstance(part, Dense), name == "random")
            for name, part in self.scores.items()
        ]

        def run(
            x: Tensor, view: View, own: Tensor | None, shares: Tensor | None, pos: Positions
        ) -> Tensor | None:
            columns, end = pos.once(_columns, view.k)
            total: Tensor | None = None
            for n, part, dense, whole in parts:
                if whole and own is not None:
                    one: Tensor = own[:, :, :end].expand(len(x), -1, -1, -1)
                else:
                    one = part(x, end) if dense else part(view.q, end)
                one = one if shares is None else shares[n] * one
                total = one if total is None else total + one
            if total is None:
                return None
            if isinstance(columns, int):
                return total[..., columns:]
            return total.gather(3, columns[:, None, None].expand(*total.shape[:3], -1))

        return run


def _rows(table: Tensor | None, views: Sequence[View], start: int | None) -> Sequence[Tensor | None]:
    """The rows (H, T, N) of a table of scores that each view of a call from `start` on reads.

    Cut at once: picked view by view each would have a gradient as large as the table.
    """
    if table is None or start is None or len(views) == 1:
        return [None] * len(views)
    ends = [view.queries.start + view.q.shape[1] for view in views]
    runs = [slice(start + view.queries.start, start + end) for view, end in zip(views, ends, strict=True)]
    return cut(table, runs)


def _columns(k: Tensor) -> tuple[Tensor | int, int]:
    """Which columns of a table keys at k (B, S) read, and how many columns the table needs.

    A number stands for the run from that column to the end: slot s of every row holds position first + s.
    """
    end = max(int(k.max()) + 1, 1) if k.numel() else 1
    first = end - k.shape[1]
    run = torch.arange(first, end, device=k.device)
    if first >= 0 and bool(((k == run) | (k < 0)).all()):
        return first, end
    return k.clamp_min(0), end
