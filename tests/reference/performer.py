"""Features of the Performer, one number at a time, from the paper alone: Choromanski et al. 2020,
arXiv:2009.14794, lemma 1 (positive features, both forms) and section 2.3 (generalised attention)."""

import math

import torch
from torch import Tensor


def positive(x: Tensor, directions: Tensor, scale: float, hyperbolic: bool = False) -> Tensor:
    """x (..., D), directions (R, D) -> (..., R) or (..., 2 R), without any stabiliser."""
    x = x * math.sqrt(scale)
    half = (x * x).sum(-1) / 2
    signs = (1, -1) if hyperbolic else (1,)
    features = [torch.exp(sign * (x @ w) - half) for sign in signs for w in directions]
    return torch.stack(features, -1) / math.sqrt(len(features))


def rectified(x: Tensor, directions: Tensor | None, scale: float) -> Tensor:
    """relu(w.x) + 0.001; without directions relu(x) + 0.001."""
    x = x * math.sqrt(scale)
    rows = [x[..., i] for i in range(x.shape[-1])] if directions is None else [x @ w for w in directions]
    return torch.stack([torch.clamp(row, min=0) + 1e-3 for row in rows], -1)
