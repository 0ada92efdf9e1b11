"""Prefix Linformer: the slots of a token hold what stands up to it, so it can decode.

Paper     after Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity", arXiv:2006.04768, which
          has no causal form; this one is not the paper's function
Equation  K_t = K_{t-1} + E_t k_t^T, V_t = V_{t-1} + F_t v_t^T, y_t = softmax(q_t K_t^T / sqrt(D)) V_t, with
          E_t and F_t the columns of position t of the learned (R, N) projections
State     the two sums, G (2 R D) values in float32 or wider, constant in context length
Cost      whole sequence O(T R H D), 2 R N parameters, with a projection for each head G times as many; one
          token O(R H D)
Decodes   exactly, up to N positions; the next one raises
Differs   a token's slots hold the terms of its past instead of all, so their distribution changes along the
          sequence; trained weights of a Linformer do not carry over
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from writehead.core.bind import Of, itself
from writehead.core.positions import Positions
from writehead.core.slots import Store
from writehead.core.work import Call, Work, products, values
from writehead.mixer import NOTHING, Aux
from writehead.mixers.linformer import Linformer, check_end
from writehead.mixers.transformer_xl import projections
from writehead.ops.prefix import prefix

PIECE = 2048  # tokens whose scores are made at a time, few enough for a processor's cache


class Slots(NamedTuple):
    """The past."""

    keys: Tensor  # (B, G, D, R), sum of k_j E_j^T
    values: Tensor  # (B, G, R, D), sum of F_j v_j^T


class LinformerPrefix(nn.Module):
    """Causal attention to R projected slots."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        max_context: int = 512,
        rank: int = 128,
        sharing: str = "heads",
    ) -> None:
        """Make the mixer; the arguments are those of `Linformer`.

        Raises:
            ValueError: numbers that do not divide or are out of range, unknown sharing.
        """
        super().__init__()
        made = Linformer(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_context=max_context,
            rank=rank,
            sharing=sharing,
        )
        self.max_context, self.rank, self.sharing = max_context, rank, sharing
        self.qkv, self.project, self.out = made.qkv, made.project, made.out

    def init_state(self, batch: int, like: Tensor, store: Store = Store()) -> Slots:
        G, D, R = self.qkv.kv_heads, self.qkv.head_dim, self.rank
        dtype = torch.promote_types(like.dtype, torch.float32)
        return Slots(like.new_zeros(batch, G, D, R, dtype=dtype), like.new_zeros(batch, G, R, D, dtype=dtype))

    def state_bytes(self, batch: int, context: int, itemsize: int, store: Store = Store()) -> int:
        return batch * self.qkv.kv_heads * 2 * self.rank * self.qkv.head_dim * max(4, itemsize)

    def work(self, call: Call) -> Work:
        H, G, D, R = self.qkv.heads, self.qkv.kv_heads, self.qkv.head_dim, self.rank
        held = self.state_bytes(call.batch, 0, call.itemsize)
        read = min(call.tokens, self.max_context) * self.project[0].numel()
        return Work(
            flops=2 * call.rows * (products(self.qkv, self.out) + 2 * (G + H) * D * R),
            weights=values(self.qkv, self.out) + read,
            state_read=held,
            state_written=held,
        )

    def bind(self, of: Of = itself) -> Callable[..., tuple[Tensor, Slots, Aux]]:
        query, project = projections(self.qkv)
        start, out, columns, end = self.init_state, of(self.out), self.project, self.max_context
        G, scale, R = self.qkv.kv_heads, self.qkv.head_dim**-0.5, self.rank

        def run(x: Tensor, pos: Positions, state: Slots | None = None) -> tuple[Tensor, Slots, Aux]:
            q, (k, v) = query(x, pos), project(x)
            check_end(pos, end)
            keys, sums = start(len(x), x) if state is None else state
            if pos.start is None:
                here = columns[pos.index.clamp_min(0)] * pos.valid[..., None, None, None]
            else:
                here = columns[pos.start : pos.start + x.shape[1]][None].expand(len(x), -1, -1, -1, -1)
            e, f = here.to(keys).expand(*here.shape[:2], 2, G, R).unbind(2)
            given = (q.unflatten(2, (G, -1)).to(keys) * scale, k.to(keys), v.to(keys), e, f)
            pieces = []
            for q, k, v, e, f in zip(*(t.split(PIECE, 1) for t in given), strict=True):
                scores, keys = prefix(q, k, e, keys)
                y, sums = prefix(scores.softmax(-1), f, v, sums)
                pieces.append(y)
            y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
            return out(y.flatten(2).to(x.dtype)), Slots(keys, sums), NOTHING

        return run

    def forward(self, x: Tensor, pos: Positions, state: Slots | None = None) -> tuple[Tensor, Slots, Aux]:
        return self.bind()(x, pos, state)
