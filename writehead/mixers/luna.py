"""Luna: a short sequence of slots reads the long one, and the long one reads what the slots packed.

Paper     Ma et al. 2021, "Luna: Linear Unified Nested Attention", arXiv:2106.01540
Equation  encoder: Y_P = softmax(P Wq (C Wk)^T / sqrt(D)) C Wk, y = softmax(x Wx (Y_P Wc)^T / sqrt(D)) Y_P Wc,
          P' = LN(Y_P + P) for the next layer; causal: a_j = log2(1 + 2^(x_j Wk . P Wq / sqrt(D))),
          U_t = softmax(q_t . sum_j k_j a_j^T / (t' sqrt(D))), y_t = U_t sum_j a_j v_j^T / t' over j <= t,
          t' = t + 1
State     causal: the two sums, G (2 D M) values in float32 or wider, constant in context length
Cost      whole sequence O(T M H D); one token O(M H D)
Decodes   exactly: the slots of a causal layer are constants, since slots that read the text know its future
Differs   keys are values (the paper's tied form); a position counts as t', so padding changes nothing; an
          encoder layer adds learned slots of its own to those it is handed: the paper's where later ones are
          0, and widens what fewer key/value heads pack; pieces replace the prefix sum, equal up to rounding
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.core.bind import Of, itself
from writehead.core.positions import Positions
from writehead.core.shapes import check_multiple, check_shape
from writehead.core.slots import Store
from writehead.core.work import Call, Work, products, values
from writehead.mixer import NOTHING, Aux
from writehead.ops.attend import attend
from writehead.ops.prefix import prefix

LN2 = 0.6931471805599453


class Sums(NamedTuple):
    """What a causal layer remembers."""

    packed: Tensor  # (B, G, D, M), sum of k_j a_j^T
    unpacked: Tensor  # (B, G, M, D), sum of a_j v_j^T


class Projections(nn.Module):
    """The matrices that both forms have."""

    def __init__(self, dim: int, heads: int, kv_heads: int | None, head_dim: int | None, slots: int) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_multiple("heads", heads, "kv_heads", kv_heads)
        if head_dim is None:
            check_multiple("dim", dim, "heads", heads)
        if slots < 1:
            raise ValueError(f"slots={slots} must be at least 1")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim or dim // heads
        rows = self.kv_heads * self.head_dim
        self.slots = nn.Parameter(torch.randn(slots, dim) * dim**-0.5)
        self.query = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.key = nn.Linear(dim, rows, bias=False)
        self.pack_query = nn.Linear(dim, rows, bias=False)
        self.pack_key = nn.Linear(dim, rows, bias=False)
        self.out = nn.Linear(heads * self.head_dim, dim, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """(..., rows) -> (..., heads, D)."""
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads


class Luna(nn.Module):
    """The causal form."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        slots: int = 32,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads, kv_heads, head_dim: as in `Softmax`; packing has G heads.
            slots: M learned slots.

        Raises:
            ValueError: numbers that do not divide or are out of range.
        """
        super().__init__()
        self.parts = Projections(dim, heads, kv_heads, head_dim, slots)

    def init_state(self, batch: int, like: Tensor, store: Store = Store()) -> Sums:
        G, D, M = self.parts.kv_heads, self.parts.head_dim, len(self.parts.slots)
        dtype = torch.promote_types(like.dtype, torch.float32)
        return Sums(like.new_zeros(batch, G, D, M, dtype=dtype), like.new_zeros(batch, G, M, D, dtype=dtype))

    def state_bytes(self, batch: int, context: int, itemsize: int, store: Store = Store()) -> int:
        G, D, M = self.parts.kv_heads, self.parts.head_dim, len(self.parts.slots)
        return batch * G * 2 * D * M * max(4, itemsize)

    def work(self, call: Call) -> Work:
        p, M = self.parts, len(self.parts.slots)
        held = self.state_bytes(call.batch, 0, call.itemsize)
        matrices = products(p) - p.slots.numel() - p.pack_query.weight.numel()
        # scores of slots and two sums for each key/value head, two readings for each query head
        return Work(
            flops=2 * call.rows * (matrices + 3 * p.kv_heads * p.head_dim * M + 2 * p.heads * p.head_dim * M)
            + 2 * M * p.pack_query.weight.numel(),
            weights=values(p),
            state_read=held,
            state_written=held,
        )

    def bind(self, of: Of = itself) -> Callable[..., tuple[Tensor, Sums, Aux]]:
        p, start = self.parts, self.init_state
        query, key, pack_query, pack_key, out = map(of, (p.query, p.key, p.pack_query, p.pack_key, p.out))
        split, G, X, scale, slots = p.split, p.kv_heads, p.slots.shape[1], p.head_dim**-0.5, p.slots

        def run(x: Tensor, pos: Positions, state: Sums | None = None) -> tuple[Tensor, Sums, Aux]:
            check_shape("x", x, "B T X", B=len(pos.index), T=pos.index.shape[1], X=X)
            packed, unpacked = start(len(x), x) if state is None else state
            q = split(query(x)).unflatten(2, (G, -1)).to(packed)
            k = split(key(x)).to(packed)
            scores = torch.einsum("btgd,mgd->btgm", split(pack_key(x)), split(pack_query(slots))) * scale
            a = log2_1p_exp2(scores).to(packed) * pos.valid[..., None, None]
            share = (pos.index + 1).clamp_min(1).to(packed)[..., None, None, None].reciprocal()
            read, packed = prefix(q, k, a, packed)
            u = (read * share * scale).softmax(-1)
            y, unpacked = prefix(u, a, k * pos.valid[..., None, None], unpacked)
            return out((y * share).flatten(2).to(x.dtype)), Sums(packed, unpacked), NOTHING

        return run

    def forward(self, x: Tensor, pos: Positions, state: Sums | None = None) -> tuple[Tensor, Sums, Aux]:
        return self.bind()(x, pos, state)


class LunaEncoder(nn.Module):
    """The bidirectional form, whose slots go from layer to layer through `pos.streams["luna"]`."""

    streams = ("luna",)  # what it hands on beside x

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        slots: int = 32,
    ) -> None:
        """Make the mixer; the arguments are those of `Luna`, `slots` the same in all layers.

        Raises:
            ValueError: numbers that do not divide or are out of range.
        """
        super().__init__()
        self.parts = Projections(dim, heads, kv_heads, head_dim, slots)
        if self.parts.kv_heads * self.parts.head_dim != dim:
            self.widen: nn.Module = nn.Linear(self.parts.kv_heads * self.parts.head_dim, dim, bias=False)
        else:
            self.widen = nn.Identity()
        self.norm = nn.LayerNorm(dim)

    def work(self, call: Call) -> Work:
        p, M = self.parts, len(self.parts.slots)
        of_slots = p.pack_query.weight.numel() + p.key.weight.numel() + products(self.widen)
        of_tokens = p.query.weight.numel() + p.pack_key.weight.numel() + p.out.weight.numel()
        pairs = 2 * p.head_dim * M * (p.heads + p.kv_heads)
        flops = 2 * call.rows * (of_tokens + pairs) + 2 * call.batch * M * of_slots
        return Work(flops=flops, weights=values(self))

    def encode(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        p, B, M = self.parts, len(x), len(self.parts.slots)
        check_shape("x", x, "B T X", B=len(pos.index), T=pos.index.shape[1], X=p.slots.shape[1])
        handed = pos.streams.get("luna")
        if handed is not None and handed.shape[1] != M:
            raise ValueError(
                f"slots={M} must be the same in all layers; the layer before has {handed.shape[1]}"
            )
        slots = p.slots.expand(B, -1, -1) if handed is None else handed + p.slots
        k = p.split(p.pack_key(x))
        packed = attend(p.split(p.pack_query(slots)), k, k, mask=pos.valid[:, None, None])[0]
        packed = self.widen(packed.flatten(2))
        # a sequence shorter than the slots uses as many of them as it has tokens
        used = torch.arange(M, device=x.device) < pos.valid.sum(1, keepdim=True)
        c = p.split(p.key(packed))
        y = attend(p.split(p.query(x)), c, c, mask=used[:, None, None])[0]
        pos.streams["luna"] = self.norm(packed + slots)
        return p.out(y.flatten(2)), NOTHING


def log2_1p_exp2(x: Tensor) -> Tensor:
    """log2(1 + 2^x): softplus with beta = ln 2, 1 at 0."""
    return F.softplus(x, beta=LN2, threshold=40)
