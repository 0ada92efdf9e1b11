"""Initialisations that concern a whole model, after each part has made its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def initialise(model: nn.Module, name: str, depth: int) -> None:
    """Draw a decoder's weights anew.

    Args:
        model: a decoder; changed in place.
        name: "parts" leaves everything as the parts made it; "sparse" is that of the Sparse Transformer
            (arXiv:1904.10509, section 5.3), "axial" that of the Axial Transformer (arXiv:1912.12180, the
            authors' code).
        depth: layers N.

    Raises:
        ValueError: an output matrix that is the embedding table.
    """
    if name == "parts":
        return
    if getattr(model.embedding, "output", None) is None:
        raise ValueError(f"init={name!r} starts the output matrix at 0 or near it: set tie_embeddings=False")
    INITS[name](model, depth)


@torch.no_grad()
def _sparse(model: Any, depth: int) -> None:
    """N(0, 0.125 / sqrt(width in)), the last matrix of each residual branch divided by sqrt(2 N), no
    logits."""
    places = {id(p) for p in model.embedding.position.parameters()}  # which mixers hold too
    last = {id(p) for p in _last(model)}
    for weight in model.stack.parameters():
        if weight.dim() == 2 and id(weight) not in places:
            factor = (2 * depth) ** -0.5 if id(weight) in last else 1.0
            nn.init.normal_(weight, std=0.125 * weight.shape[1] ** -0.5 * factor)
    nn.init.normal_(model.embedding.table, std=0.125 * model.embedding.table.shape[1] ** -0.5)
    model.embedding.output.zero_()
    _no_biases(model)


@torch.no_grad()
def _axial(model: Any, depth: int) -> None:
    """Residual branches and logits begin at almost nothing (variance 1e-10 / width in), embeddings at 5 /
    sqrt(width)."""
    for weight in (*_last(model), model.embedding.output):
        nn.init.normal_(weight, std=1e-5 * weight.shape[1] ** -0.5)
    nn.init.normal_(model.embedding.table, std=5 * model.embedding.table.shape[1] ** -0.5)
    _no_biases(model)


INITS: dict[str, Callable[[Any, int], None]] = {"sparse": _sparse, "axial": _axial}


def _last(model: Any) -> list[nn.Parameter]:
    """The matrices that write into the residual stream."""
    return [
        p for name, p in model.stack.named_parameters() if name.endswith((".out.weight", ".outer.weight"))
    ]


def _no_biases(model: Any) -> None:
    for name, parameter in model.stack.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
