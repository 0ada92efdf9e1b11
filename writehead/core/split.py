"""Cutting a tensor into runs whose gradients are put together again without a copy.

The gradient of `torch.split` copies those of its parts behind one another. Whoever makes the gradients of all
parts can lay them out like the parts (`empty_like`), as views of one tensor, which then is the gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def split(t: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
    """`t.split(sizes, dim)`.

    Args:
        t: any tensor.
        sizes: of the runs; they add up to the dimension.
        dim: the dimension that is cut, not negative.

    Returns:
        Views of t.
    """
    plain = not t.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling()
    if plain or torch._C._are_functorch_transforms_active():
        return tuple(t.split(list(sizes), dim))
    found: tuple[Tensor, ...] = _Split.apply(t, tuple(sizes), dim)  # type: ignore[no-untyped-call]
    return found


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, sizes: tuple[int, ...], dim: int) -> tuple[Tensor, ...]:
        ctx.dim = dim
        return tuple(t.split(list(sizes), dim))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # a gradient that is itself differentiated must be made by operations
        whole = None if torch.is_grad_enabled() else joined(grads, ctx.dim)
        return torch.cat(grads, ctx.dim) if whole is None else whole, None, None


def joined(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """The view of one tensor that holds the parts behind one another, or None if they do not lie so."""
    first, at, size = parts[0], parts[0].storage_offset(), 0
    shape, whole = list(first.shape), first._base
    for part in parts:
        shape[dim] = part.shape[dim]
        beside = part.stride() == first.stride() and part.storage_offset() == at
        if not beside or list(part.shape) != shape or whole is None or part._base is not whole:
            return None
        at += part.shape[dim] * first.stride(dim)
        size += part.shape[dim]
    shape[dim] = size
    return first.as_strided(shape, first.stride())


def empty_like(parts: Sequence[Tensor], dim: int) -> tuple[Tensor, ...]:
    """Tensors in the shapes of the parts, without contents; those of parts that lie behind one another in one
    tensor do too.

    Args:
        parts: of equal shape but for `dim`.
        dim: where a run of them may have been cut out of one tensor.

    Returns:
        One tensor a part.
    """
    made: list[Tensor] = []
    start = 0
    while start < len(parts):
        stop = len(parts)
        while stop > start + 1 and joined(parts[start:stop], dim) is None:
            stop -= 1
        run = parts[start:stop]
        shape = list(run[0].shape)
        shape[dim] = sum(part.shape[dim] for part in run)
        made += run[0].new_empty(shape).split([part.shape[dim] for part in run], dim)
        start = stop
    return tuple(made)
