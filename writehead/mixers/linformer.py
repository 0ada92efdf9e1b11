"""Linformer: keys and values are projected along the sequence to R slots.

Paper     Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity", arXiv:2006.04768
Equation  y = softmax(q (E K)^T / sqrt(D)) (F V),  E and F (R, N) learned over positions
State     none: each slot mixes all positions, so no mask could hide the future
Cost      whole sequence O(T R H D); 2 R N parameters, with a projection for each head G times as many
Decodes   not at all; `linformer_prefix` is another function
Differs   a token takes the column of its position, so sequences shorter than N use the first columns as both
          reference codes do
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from writehead.core.heads import QKV
from writehead.core.positions import Positions
from writehead.core.shapes import check_choice
from writehead.core.work import Call, Work, products, values
from writehead.mixer import NOTHING, Aux
from writehead.mixers.transformer_xl import projections
from writehead.ops.attend import attend

SHARING = ("none", "heads", "key_value", "layers")


class Linformer(nn.Module):
    """Bidirectional attention to R projected slots."""

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
        """Make the mixer.

        Args:
            dim: width X.
            heads, kv_heads, head_dim: as in `Softmax`.
            max_context: positions N that the projections know.
            rank: slots R.
            sharing: "none" (E and F for each key/value head), "heads" (one E and one F), "key_value"
                (E = F), "layers" (that, the same in all layers of a model).

        Raises:
            ValueError: numbers that do not divide or are out of range, unknown sharing.
        """
        super().__init__()
        check_choice("sharing", sharing, SHARING)
        if max_context < 1 or rank < 1:
            raise ValueError(f"max_context={max_context} and rank={rank} must both be at least 1")
        self.max_context, self.rank, self.sharing = max_context, rank, sharing
        self.qkv = QKV(dim, heads, kv_heads, head_dim)
        H, G, D = self.qkv.heads, self.qkv.kv_heads, self.qkv.head_dim
        kinds, each = (1 if sharing in ("key_value", "layers") else 2), (G if sharing == "none" else 1)
        self.project = nn.Parameter(torch.empty(max_context, kinds, each, rank))
        nn.init.uniform_(self.project, -(rank**-0.5), rank**-0.5)
        self.out = nn.Linear(H * D, dim, bias=False)

    def work(self, call: Call) -> Work:
        H, G, D = self.qkv.heads, self.qkv.kv_heads, self.qkv.head_dim
        read = min(call.tokens, self.max_context) * self.project[0].numel()
        return Work(
            flops=2
            * call.rows
            * (products(self.qkv, self.out) + 2 * G * D * self.rank + 2 * H * D * self.rank),
            weights=values(self.qkv, self.out) + read,
        )

    def encode(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        query, project = projections(self.qkv)
        q, (k, v) = query(x, pos), project(x)
        check_end(pos, self.max_context)
        B, T, G, _ = k.shape
        columns = self.project[pos.index.clamp_min(0)] * pos.valid[..., None, None, None]
        columns = columns.expand(B, T, 2, G, self.rank)
        slots = [torch.einsum("btgr,btgd->brgd", columns[:, :, i], t) for i, t in enumerate((k, v))]
        return self.out(attend(q, *slots)[0].flatten(2)), NOTHING


def share_projection(mixers: Iterable[Any]) -> None:
    """Give the mixers whose projection belongs to all layers that of the first of them.

    Raises:
        ValueError: projections of different shapes.
    """
    shared = [mixer for mixer in mixers if getattr(mixer, "sharing", None) == "layers"]
    for mixer in shared[1:]:
        ours, first = mixer.project, shared[0].project
        if ours.shape != first.shape:
            raise ValueError(
                f'layers with sharing="layers" need one max_context and one rank; got {first.shape[0]} and '
                f"{first.shape[-1]}, then {ours.shape[0]} and {ours.shape[-1]}"
            )
        mixer.project = first


def check_end(pos: Positions, end: int) -> None:
    """Raise if a token stands behind the last position that a mixer has weights for.

    Raises:
        ValueError: naming the position and the limit.
    """
    last = pos.once(_last, pos.index)
    if last >= end:
        raise ValueError(
            f"position {last} does not exist: this mixer has {end} positions (0 to {end - 1}); shorten the "
            "sequence or make it with a larger max_context"
        )


def _last(index: Tensor) -> int:
    return int(index.max()) if index.numel() else -1
