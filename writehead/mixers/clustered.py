"""Clustered attention: queries of one direction share one row of weights, corrected at its largest keys.

Paper     Vyas, Katharopoulos, Fleuret 2020, "Fast Transformers with Clustered Attention", arXiv:2007.04825
Equation  A^c = softmax(mean of the cluster's queries . K); y_i = sum over the cluster's top_k keys of
          m softmax_k(q_i . k_k) v_k + sum over the others of A^c_k v_k, m = what A^c gives the top_k keys
State     none: encoders only
Cost      O(T C D + T K D) a head, K = top_k, and O(T C bits) for each iteration of k-means
Decodes   not at all: a cluster's mean holds later queries
Differs   the first centroids are tokens at even distances, where the authors draw them; a cluster that
          lost its members keeps its bits. kv_heads: what is clustered are queries, so heads that share keys
          still have clusters of their own
"""

import torch
from torch import Tensor, nn

from writehead.core.bind import itself
from writehead.core.heads import QKV
from writehead.core.positions import Positions
from writehead.core.replay import choose
from writehead.core.shapes import check_shape
from writehead.core.work import Call, Work, products, values
from writehead.mixer import NOTHING, Aux
from writehead.positions.base import NoPosition, Scheme, has


class Clustered(nn.Module):
    """Bidirectional attention by clusters of queries.

    Attributes:
        planes: (H, D + 1, bits), normals and offsets of the random planes whose sides are a query's bits.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        clusters: int = 32,
        top_k: int = 32,
        bits: int = 63,
        iterations: int = 10,
        position: Scheme | None = None,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads: query heads H, each with clusters of its own.
            kv_heads: key/value heads G; default H.
            head_dim: width D of a head; default dim / heads.
            clusters: C of each head.
            top_k: keys whose weights are made for each query; 0 = none, queries of a cluster read alike.
            bits: of a query's hash.
            iterations: of k-means.
            position: the model's position scheme.

        Raises:
            ValueError: numbers that do not fit, or a position scheme that adds to the scores.
        """
        super().__init__()
        if min(clusters, bits, iterations) < 1 or top_k < 0:
            raise ValueError(
                f"clusters={clusters}, bits={bits} and iterations={iterations} must be at least 1, "
                f"top_k={top_k} at least 0"
            )
        self.position = NoPosition() if position is None else position
        if has(self.position, "bias"):
            raise ValueError(
                "clustered attention adds no bias to scores; use rotary, sinusoidal or learned positions"
            )
        self.qkv = QKV(dim, heads, kv_heads, head_dim)
        self.heads, self.kv_heads, self.head_dim = heads, self.qkv.kv_heads, self.qkv.head_dim
        self.clusters, self.top_k, self.iterations = clusters, top_k, iterations
        self.scale: float = self.head_dim**-0.5
        self.out = nn.Linear(heads * self.head_dim, dim, bias=False)
        self.planes: Tensor
        self.register_buffer("planes", torch.randn(heads, self.head_dim + 1, bits))

    def work(self, call: Call) -> Work:
        D, T, H = self.head_dim, call.tokens, self.heads
        searching = H * self.planes.shape[-1] * (D + self.clusters * self.iterations)
        reading = 2 * H * D * (min(self.clusters, T) + min(self.top_k, T))
        return Work(
            flops=2 * call.rows * (products(self.qkv, self.out) + searching + reading),
            weights=values(self.qkv, self.out) + self.planes.numel(),
        )

    def encode(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        H, G = self.heads, self.kv_heads
        check_shape("x", x, "B T X", B=pos.index.shape[0], T=pos.index.shape[1], X=self.out.out_features)
        self.position.check_context(pos)
        infused = self.position.infuse(x, pos) if has(self.position, "infuse") else None
        qk, v = itself(self.qkv)(x, infused)
        q, k = self.position.rotate(qk, pos).split([H, G], 2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        q = torch.where(pos.valid[:, None, :, None], q, 0)
        cluster = choose(self._cluster, q, pos.index)  # (B, H, T)
        y = self._read(q, k, v, cluster, pos)
        return self.out(y.transpose(1, 2).flatten(2)), NOTHING

    def _read(self, q: Tensor, k: Tensor, v: Tensor, cluster: Tensor, pos: Positions) -> Tensor:
        """q (B, H, T, D), k and v (B, G, T, D), clusters (B, H, T) -> y (B, H, T, D)."""
        (B, H, T, D), G, C, K = q.shape, k.shape[1], self.clusters, min(self.top_k, q.shape[2])
        real = pos.valid[:, None].expand(B, H, T)
        wide = cluster[..., None].expand_as(q)
        count = q.new_zeros(B, H, C).scatter_add(2, cluster, real.to(q.dtype))
        mean = q.new_zeros(B, H, C, D).scatter_add(2, wide, q) / count.clamp_min(1)[..., None]
        scores = mean.unflatten(1, (G, -1)) @ k[:, :, None].transpose(-1, -2) * self.scale
        hidden = ~pos.valid[:, None, None, None]
        weights = torch.softmax(scores.masked_fill(hidden, torch.finfo(q.dtype).min), -1).masked_fill(
            hidden, 0
        )
        top = choose(_top, weights, K).flatten(1, 2)  # (B, H, C, K)
        weights = weights.flatten(1, 2)
        mass = weights.gather(3, top).sum(-1)
        rest = weights.scatter(3, top, 0.0)
        y: Tensor = (rest.unflatten(1, (G, -1)) @ v[:, :, None]).flatten(1, 2).gather(2, wide)
        if not K:
            return y
        group = torch.arange(H, device=q.device) // (H // G)
        row, head = torch.arange(B, device=q.device)[:, None, None, None], group[:, None, None]
        mine = top.gather(2, cluster[..., None].expand(-1, -1, -1, K))  # (B, H, T, K)
        own = torch.einsum("bhtd,bhtkd->bhtk", q, k[row, head, mine]) * self.scale
        unread = ~pos.valid[:, None, None].expand(B, H, T, T).gather(3, mine)
        shares = torch.softmax(own.masked_fill(unread, torch.finfo(q.dtype).min), -1).masked_fill(unread, 0)
        shares = shares * mass.gather(2, cluster)[..., None]
        return y + torch.einsum("bhtk,bhtkd->bhtd", shares, v[row, head, mine])

    def _cluster(self, q: Tensor, index: Tensor) -> Tensor:
        """K-means of the queries' bits, distances counted in bits: (B, H, T) cluster numbers."""
        planes, C = self.planes.to(q.dtype), self.clusters
        bits = torch.where(q @ planes[:, :-1] + planes[:, -1:] > 0, 1.0, -1.0)  # (B, H, T, bits)
        valid = index >= 0
        order = torch.where(valid, index, torch.iinfo(torch.int64).max).argsort(1)
        rank = torch.arange(C, device=q.device) * valid.sum(1, keepdim=True) // C
        first = order.gather(1, rank)[:, None, :, None]
        centre = bits.gather(2, first.expand(-1, bits.shape[1], -1, bits.shape[3]))
        real = valid[:, None, :, None]
        for _ in range(self.iterations):
            cluster = (bits @ centre.transpose(2, 3)).argmax(-1)
            wide = cluster[..., None].expand_as(bits)
            votes = torch.zeros_like(centre).scatter_add_(2, wide, bits * real)
            centre = torch.where(votes == 0, centre, votes.sign())
        found: Tensor = (bits @ centre.transpose(2, 3)).argmax(-1)
        return found


def _top(weights: Tensor, count: int) -> Tensor:
    return weights.topk(count, -1).indices
