"""RMS normalisation in few operations: on a CPU a decode step mostly waits for small ones to start."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from writehead.core.bind import Of, itself


class RMS(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 or wider.

    Paper: Zhang, Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def bind(self, of: Of = itself) -> Callable[[Tensor], Tensor]:
        weight, share, floor = self.weight, len(self.weight) ** -0.5, self.eps**0.5

        def normal(x: Tensor) -> Tensor:
            root_mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * share
            # hypot gives sqrt(mean(x^2) + eps) in one operation
            return x / torch.hypot(root_mean, _constant(floor, x.dtype, x.device))

        def run(x: Tensor) -> Tensor:
            if x.dtype in (torch.bfloat16, torch.float16):
                return normal(x.float()).to(x.dtype) * weight
            return normal(x) * weight

        return run

    def forward(self, x: Tensor) -> Tensor:
        """x (..., X) -> the same shape and type."""
        return self.bind()(x)


@cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd may meet it later
        return torch.full((), value, dtype=dtype, device=device)
