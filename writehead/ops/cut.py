"""Runs of tokens out of a sequence, with a backward pass whose cost is that of the runs.

The gradient of an ordinary slice is as long as the whole sequence, so slicing it run by run costs the square
of its length in the backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, runs: Sequence[slice]) -> tuple[Tensor, ...]:
        ctx.runs, ctx.shape = runs, t.shape
        ctx.set_materialize_grads(False)
        return tuple(t[:, run].clone() for run in runs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        found: Tensor | None = None
        for run, grad in zip(ctx.runs, grads, strict=True):
            if grad is not None:
                found = grad.new_zeros(ctx.shape) if found is None else found
                found[:, run] += grad
        return found, None


_cut: Callable[..., tuple[Tensor, ...]] = _Cut.apply


def cut(t: Tensor, runs: Sequence[slice]) -> Sequence[Tensor]:
    """t (B, T, ...) cut into runs of its tokens, which may overlap: (B, length of the run, ...) each."""
    if len(runs) == 1 or not (torch.is_grad_enabled() and t.requires_grad):
        return [t[:, run] for run in runs]
    return _cut(t, runs)
