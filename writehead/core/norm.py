"""RMS normalisation in few operations: on a CPU a decode step mostly waits for small ones to start."""

from collections.abc import Callable
from functools import cache
from typing import Any

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
        weight, eps = self.weight, self.eps

        def run(x: Tensor) -> Tensor:
            if x.dtype in (torch.bfloat16, torch.float16):
                wide = x.float()
                return (wide / _size(wide, eps)).to(x.dtype) * weight
            if torch.is_grad_enabled() and weight.dtype == x.dtype:
                y: Tensor = _Normal.apply(x, weight, eps)  # type: ignore[no-untyped-call]
                return y
            return x / _size(x, eps) * weight

        return run

    def forward(self, x: Tensor) -> Tensor:
        """x (..., X) -> the same shape and type."""
        return self.bind()(x)


class _Normal(torch.autograd.Function):
    """RMS with its gradient in half the passes that autograd makes of it; y = n w, n = x / size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = _size(x, eps)
        ctx.save_for_backward(x, weight)
        ctx.size, ctx.eps = size, eps
        return (x / size).mul_(weight)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        size = _size(x, ctx.eps) if torch.is_grad_enabled() else ctx.size  # it too has derivatives
        n = x / size
        along = outer * n
        mean = (along @ weight)[..., None] / -len(weight)
        return torch.addcmul(outer * weight, n, mean) / size, along.flatten(0, -2).sum(0), None


def _size(x: Tensor, eps: float) -> Tensor:
    """sqrt(mean(x^2) + eps) over the last dimension, which is kept."""
    root_mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    return torch.hypot(root_mean, _constant(eps**0.5, x.dtype, x.device))  # both steps in one operation


@cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd may meet it later
        return torch.full((), value, dtype=dtype, device=device)
