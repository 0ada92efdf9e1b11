"""Clusters that pick their members: each centroid takes the tokens of a sequence that score highest."""

import torch
from torch import Tensor

from writehead.ops.attend import attend


def best(score: Tensor, pos: Tensor, window: int) -> Tensor:
    """The tokens that each centroid takes, in order: (B, H, N, W) numbers of tokens.

    Whether a token is taken depends on later ones, so this serves whole sequences only.

    Args:
        score: (B, T, H, N) of each token for each of N centroids.
        pos: (B, T), -1 = padding, which is taken only where there is nothing else.
        window: tokens that a centroid takes, W = all if there are fewer.
    """
    taken = score.permute(0, 2, 3, 1).masked_fill((pos < 0)[:, None, None], -torch.inf)
    return taken.topk(min(window, pos.shape[1]), -1).indices.sort(-1).values


def within(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    members: Tensor,
    pos: Tensor,
    *,
    scale: float,
    own: bool = True,
    spare: float = 1e-2,
) -> Tensor:
    """Causal attention within clusters, averaged over the clusters that a token is in.

    Args:
        q, k, v: (B, T, H, D).
        members: (B, H, N, W), from `best`.
        pos: (B, T), -1 = padding.
        scale: factor on the scores.
        own: may a token read itself? If not, it does where it reads nothing else.
        spare: added to the number of clusters before dividing by it.

    Returns:
        y (B, T, H, D); 0 for a token that is in no cluster.
    """
    (B, T), (_, H, N, _), D = pos.shape, members.shape, v.shape[-1]

    def rows(t: Tensor) -> Tensor:
        every = t.transpose(1, 2)[:, :, None].expand(-1, -1, N, -1, -1)
        return every.gather(3, members[..., None].expand(-1, -1, -1, -1, t.shape[-1])).flatten(0, 2)[
            :, :, None
        ]

    places = pos[:, None, None].expand(B, H, N, T).gather(3, members)
    a, b = places.flatten(0, 2)[:, :, None], places.flatten(0, 2)[:, None]
    mask = (b >= 0) & (b <= a)
    if not own:
        others = mask & (a != b)
        mask = torch.where(others.any(-1, keepdim=True), others, mask)
    part, _ = attend(rows(q), rows(k), rows(v), mask=mask[:, None], scale=scale, exact=True)
    at = members.flatten(2)
    y = part.new_zeros(B, H, T, D).scatter_add(
        2, at[..., None].expand(-1, -1, -1, D), part.reshape(B, H, -1, D)
    )
    inside = (places >= 0).flatten(2).to(part.dtype)
    count = part.new_zeros(B, H, T).scatter_add(2, at, inside)
    return (y / (count + spare)[..., None]).transpose(1, 2)
