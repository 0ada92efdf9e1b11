"""Binding: a module's computation as a plain function, its weights looked up once instead of at every call.

A module with a `bind` method has its mathematics there, once; its `forward` binds and calls. Training passes
`itself`, so parts are called as modules and their hooks run. A decode engine passes `bound`, which binds
the parts too: on a CPU the look-ups and calls of modules otherwise take as long as the small operations
between them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from torch import nn
from torch.nn import functional as F

Of: TypeAlias = Callable[[nn.Module], Callable[..., Any]]


def itself(module: nn.Module) -> Callable[..., Any]:
    """The module, to be called with its hooks."""
    return module


def bound(module: nn.Module) -> Callable[..., Any]:
    """The module's computation without look-ups; valid while its parameters stay the same objects."""
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    if type(module) is nn.LayerNorm:
        shape, eps = list(module.normalized_shape), module.eps
        return partial(F.layer_norm, normalized_shape=shape, weight=module.weight, bias=module.bias, eps=eps)
    bind = getattr(module, "bind", None)
    return module if bind is None else bind(bound)
