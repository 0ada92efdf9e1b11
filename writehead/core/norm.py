"""RMS normalisation in few operations: on a CPU a decode step mostly waits for small ones to start."""

import torch
from torch import Tensor, nn


class RMS(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 or wider.

    Paper: Zhang, Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., X) -> the same shape and type."""
        if x.dtype in (torch.bfloat16, torch.float16):
            return self._normal(x.float()).to(x.dtype) * self.weight
        return self._normal(x) * self.weight

    def _normal(self, x: Tensor) -> Tensor:
        root_mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        # hypot gives sqrt(mean(x^2) + eps) in one operation
        return x / torch.hypot(root_mean, root_mean.new_full((), self.eps**0.5))
