"""Distances seen by the query: a learned map of sinusoids, multiplied with each query.

Paper     Dai et al. 2019, "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context",
          arXiv:1901.02860
Equation  score(q, distance t) = q . W_R R_t,  R_t = [sin(t w_i) | cos(t w_i)],  w_i = 10000^(-2i/X)
State     none: a cache slot's position is enough
Cost      one token O(H D X + H X S), or for many tokens O(S X G D + T H D S): whichever is less is computed
Decodes   exactly, at any distance
Differs   distances come from positions, so nothing is shifted and no part of the scores is garbage
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.core.positions import Positions
from writehead.core.shapes import check_multiple


class Relative(nn.Module):
    """Scores of queries by how far away each key is; unlike a `Scheme`, they depend on the query.

    Attributes:
        weight: W_R, rows of all key/value heads (G D, X).
    """

    def __init__(self, dim: int, kv_heads: int, head_dim: int, clamp: int | None = None) -> None:
        """Make the map.

        Args:
            dim: width X of the sinusoids, even.
            kv_heads, head_dim: G and D; query head h of H uses the map of head h // (H / G).
            clamp: larger distances count as this one.

        Raises:
            ValueError: an odd width, or a clamp below 1.
        """
        super().__init__()
        check_multiple("dim", dim, "two", 2)
        if clamp is not None and clamp < 1:
            raise ValueError(f"clamp={clamp} must be at least 1, or nothing")
        self.kv_heads, self.head_dim, self.clamp = kv_heads, head_dim, clamp
        self.weight = nn.Parameter(torch.empty(kv_heads * head_dim, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, q: Tensor, distance: Tensor, pos: Positions) -> Tensor:
        """Score every pair.

        Args:
            q: (B, T, H, D), scaled and with its bias.
            distance: (B or 1, T, S) int64; pairs below 0 get any score, for a mask to remove.
            pos: the call, whose layers share the sinusoids.

        Returns:
            (B, H, T, S).
        """
        B, T, H, D = q.shape
        G, X = self.kv_heads, self.weight.shape[1]
        index, N = pos.once(_index, distance, self.clamp)
        waves = pos.once(wave, N, X, q.dtype, q.device)
        groups = q.unflatten(2, (G, H // G))
        if by_query(B * T * H, N, G, D, X):
            mapped = torch.einsum("btgxd,gdc->bgxtc", groups, self.weight.view(G, D, X))
            scores = mapped @ waves.T
        else:
            scores = torch.einsum("btgxd,ngd->bgxtn", groups, F.linear(waves, self.weight).view(N, G, D))
        return scores.reshape(B, H, T, N).gather(3, index[:, None].expand(B, H, -1, -1))

    def flops(self, rows: int, farthest: int) -> int:
        """Operations of scoring `rows` queries (of all heads) against distances up to `farthest`."""
        N = 1 + (farthest if self.clamp is None else min(farthest, self.clamp))
        G, D, X = self.kv_heads, self.head_dim, self.weight.shape[1]
        if by_query(rows, N, G, D, X):
            return 2 * rows * X * (D + N)
        return 2 * N * G * D * X + 2 * rows * D * N


def by_query(rows: int, N: int, G: int, D: int, X: int) -> bool:
    """Is mapping the queries cheaper than mapping N sinusoids?"""
    return rows * X * (D + N) <= N * G * D * X + rows * D * N


def wave(N: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sinusoids of the distances 0 to N - 1, all sines before all cosines: (N, X)."""
    wide = torch.promote_types(dtype, torch.float32)
    rates = 10000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=wide) / dim)
    angles = torch.arange(N, device=device, dtype=wide)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1).to(dtype)


def _index(distance: Tensor, clamp: int | None) -> tuple[Tensor, int]:
    """Distances that exist in a table, and how many rows it needs."""
    index = distance.clamp(0, clamp)
    return index, int(index.max()) + 1 if index.numel() else 1
