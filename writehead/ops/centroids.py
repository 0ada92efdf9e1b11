"""Online k-means: centroids that follow their members by moving averages."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.core.processes import summed

DECAY, SMOOTH = 0.999, 1e-5  # the values of the Routing Transformer's authors
MOST_CLUSTERS = 1 << 15  # their numbers are kept in 16 bits
SCORES = 1 << 22  # held while tokens look for their centroids


class Centroids(nn.Module):
    """Online k-means: saved buffers, moved in training and fixed otherwise.

    Attributes:
        means: (G, N, D).
        counts, sums: moving averages of how many members each had (G, N), and of their sum (G, N, D).
        together: do they follow the members of all processes that train the model (`train.parallel.share`)?
    """

    def __init__(self, kv_heads: int, clusters: int, head_dim: int) -> None:
        super().__init__()
        means = norm(torch.randn(kv_heads, clusters, head_dim))
        self.together = False
        self.means: Tensor
        self.counts: Tensor
        self.sums: Tensor
        self.register_buffer("means", means)
        self.register_buffer("counts", torch.ones(kv_heads, clusters))
        self.register_buffer("sums", means.clone())

    def score(self, x: Tensor, means: Tensor) -> Tensor:
        """x (B, T, H, D), normalised -> (B, T, H, N)."""
        groups = x.unflatten(2, (len(means), -1))
        return torch.einsum("btgxd,gnd->btgxn", groups, means.to(x.dtype)).flatten(2, 3)

    def nearest(self, x: Tensor, means: Tensor) -> Tensor:
        """x (B, T, H, D), normalised -> (B, T, H) its centroid."""
        step = max(1, SCORES // (len(x) * x.shape[2] * means.shape[1]))
        found = [self.score(piece, means).argmax(-1).to(torch.int16) for piece in x.split(step, 1)]
        return torch.cat(found, 1)

    @torch.no_grad()
    def move(self, x: Tensor, cluster: Tensor, valid: Tensor) -> None:
        """Take the members x (B, T, H, D) of clusters (B, T, H) into the averages; padding is left out."""
        G, N, D = self.means.shape
        x = x.unflatten(2, (G, -1)).permute(2, 0, 1, 3, 4).reshape(G, -1, D).to(self.sums.dtype)
        at = cluster.unflatten(2, (G, -1)).permute(2, 0, 1, 3).reshape(G, -1).long()
        real = valid[None, :, :, None].expand(G, -1, -1, cluster.shape[2] // G).reshape(G, -1).to(x.dtype)
        counts = torch.zeros_like(self.counts).scatter_add_(1, at, real)
        wide = at[..., None].expand(-1, -1, D)
        sums = torch.zeros_like(self.sums).scatter_add_(1, wide, torch.where(real[..., None] > 0, x, 0))
        if self.together:
            counts, sums = summed(counts), summed(sums)
        self.counts.lerp_(counts, 1 - DECAY)
        self.sums.lerp_(sums, 1 - DECAY)
        total = self.counts.sum(1, keepdim=True)
        smooth = (self.counts + SMOOTH) / (total + N * SMOOTH) * total
        self.means.copy_(self.sums / smooth[..., None])


def norm(x: Tensor) -> Tensor:
    """A LayerNorm without weights: heads (..., D) of length sqrt(D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)
