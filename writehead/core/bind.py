"""Binding: a module's computation as a plain function, its weights looked up once instead of at every call.

A module with a `bind` method has its mathematics there, once; its `forward` binds and calls. Training passes
`itself`, so parts are called as modules and their hooks run. A decode engine passes `bound`, which binds
the parts too: on a CPU the look-ups and calls of modules otherwise take as long as the small operations
between them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.backends import mkldnn
from torch.nn import functional as F

Of: TypeAlias = Callable[[nn.Module], Callable[..., Any]]
FEW, MANY = 3, 256  # between these numbers of rows a packed matrix is faster (docs/log.md)


def itself(module: nn.Module) -> Callable[..., Any]:
    """The module, to be called with its hooks."""
    return module


def bound(module: nn.Module) -> Callable[..., Any]:
    """The module's computation without look-ups; valid while its parameters stay the same objects."""
    return _bind(module, bound)


def packed(module: nn.Module) -> Callable[..., Any]:
    """As `bound`, and matrices get a packed copy (`Product`) at their first call with a few rows."""
    return _bind(module, packed)


def _bind(module: nn.Module, of: Of) -> Callable[..., Any]:
    if type(module) is nn.Linear:
        return product(of, module.weight, module.bias)
    if type(module) is nn.LayerNorm:
        shape, eps = list(module.normalized_shape), module.eps
        return partial(F.layer_norm, normalized_shape=shape, weight=module.weight, bias=module.bias, eps=eps)
    bind = getattr(module, "bind", None)
    return module if bind is None else bind(of)


def product(of: Of, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x (..., K) -> x W^T + b, weight (N, K), as `of` has it: with a packed copy or without."""
    packs = of is packed and weight.is_cpu and weight.dtype == torch.float32 and mkldnn.is_available()
    return Product(weight, bias) if packs else partial(F.linear, weight=weight, bias=bias)


class Product:
    """x W^T + b without a graph; 4 to 256 rows go through a copy of W in oneDNN's blocked layout.

    MKL runs so few rows at a third of the memory's speed; the copy runs them at most of it. It is made at
    their first call.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.copy: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if not FEW < rows <= MANY:
            return F.linear(x, self.weight, self.bias)
        if self.copy is None:
            self.copy = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 16)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.copy, self.bias, "none", [], "")
        return y
