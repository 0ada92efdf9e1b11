"""Attention over whole sequences, wherever their tokens stand: by tiles where a pattern leaves many out."""

from functools import lru_cache

import torch
from torch import Tensor

from writehead.core.pattern import Pattern
from writehead.core.pattern.plan import estimate
from writehead.core.positions import Positions
from writehead.ops import blocks
from writehead.ops.blocks import Bias, block_attend

SPARSE = 0.6  # tiles pay where they have less than this share of all pairs
LONGEST = 1 << 14  # beyond so many tokens the tiles of a pattern that has most pairs take long to list


def pays(pattern: Pattern, tokens: int, biased: bool) -> bool:
    """Are tiles faster, or smaller, than the dense form for a whole sequence?

    Args:
        pattern: who may read whom.
        tokens: T.
        biased: a bias is added to the scores, which the dense form keeps for all pairs.
    """
    if tokens <= 2 * blocks.BLOCK:
        return False
    return (biased and tokens <= LONGEST) or _density(pattern, tokens, blocks.BLOCK) < SPARSE


@lru_cache(maxsize=64)
def _density(pattern: Pattern, tokens: int, size: int) -> float:
    heads = [pattern.head(h) for h in range(pattern.heads or 1)]
    return sum(estimate(p, tokens, size) for p in heads) / len(heads)


def attend_whole(
    q: Tensor, k: Tensor, v: Tensor, pos: Positions, pattern: Pattern, *, bias: Bias | None, scale: float
) -> Tensor:
    """Block-sparse attention of tokens among themselves.

    Args:
        q: (B, T, H, D).
        k, v: (B, T, G, D).
        pos: where the tokens stand; padding anywhere.
        pattern, bias, scale: as `block_attend` takes them.

    Returns:
        y (B, T, H, D).
    """
    if pos.in_place:
        return block_attend(q, k, v, pattern, valid=pos.valid, bias=bias, scale=scale)
    row, token, at, valid = pos.once(_places, pos.index)
    q, k, v = (_spread(t, row, token, at, valid.shape[1]) for t in (q, k, v))
    y = block_attend(q, k, v, pattern, valid=valid, bias=bias, scale=scale)
    return y[torch.arange(len(y), device=y.device)[:, None], pos.index.clamp_min(0)]


def _places(index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, token and position of everything that is not padding, and which positions (B, N) are taken."""
    row, token = (index >= 0).nonzero(as_tuple=True)
    at = index[row, token]
    valid = torch.zeros(
        len(index), int(index.max()) + 1 if len(at) else 1, dtype=torch.bool, device=index.device
    )
    valid[row, at] = True
    return row, token, at, valid


def _spread(t: Tensor, row: Tensor, token: Tensor, at: Tensor, length: int) -> Tensor:
    """t (B, T, ...) with each token at its position, zeros elsewhere."""
    return t.new_zeros(len(t), length, *t.shape[2:]).index_put((row, at), t[row, token])
