"""Runs of tokens out of a sequence and back into one, with backward passes whose cost is that of the runs.

The gradient of an ordinary slice is as long as the whole sequence, so slicing it run by run costs the square
of its length in the backward pass, and adding runs to a sequence one by one costs it in the forward pass.
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


class _Lay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: int, runs: Sequence[slice], *pieces: Tensor) -> Tensor:
        ctx.runs = runs
        found = pieces[0].new_zeros(pieces[0].shape[0], tokens, *pieces[0].shape[2:])
        for run, piece in zip(runs, pieces, strict=True):
            found[:, run] += piece
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad[:, run] for run in ctx.runs)


_lay: Callable[..., Tensor] = _Lay.apply


def lay(pieces: Sequence[Tensor], runs: Sequence[slice], tokens: int) -> Tensor:
    """The sum of pieces (B, length of the run, ...), each at its run of T = `tokens`: (B, T, ...).

    What no run covers is 0.
    """
    if len(runs) == 1 and runs[0] == slice(0, tokens):
        return pieces[0]
    return _lay(tokens, runs, *pieces)
