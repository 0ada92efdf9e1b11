"""Features of Random Feature Attention, one number at a time, from the paper alone: Peng et al. 2021,
arXiv:2103.02143, equation 3 and section 3.1 (unit vectors, a learned scale), appendix (arc-cosine)."""

import math

import torch
from torch import Tensor


def features(x: Tensor, directions: Tensor, sigma: Tensor, kernel: str) -> Tensor:
    """x (..., D), directions (R, D), sigma (D,) -> (..., 2 R) or, for "arccos", (..., R)."""
    x = x / (x * x).sum(-1, keepdim=True).sqrt()
    places = [(x * sigma * e).sum(-1) for e in directions]
    if kernel == "gaussian":
        waves = [torch.sin(p) for p in places] + [torch.cos(p) for p in places]
    else:
        waves = [torch.clamp(p, min=0) for p in places]
    return torch.stack(waves, -1) / math.sqrt(len(directions))
