"""The residual stack: blocks of a mixer and a feed-forward layer, pre-norm, post-norm or side by side.

Paper     Vaswani et al. 2017, arXiv:1706.03762 (post-norm); Xiong et al. 2020, arXiv:2002.04745 (pre-norm);
          Wang, Komatsuzaki 2021, GPT-J (parallel)
Equation  pre: x + f(norm(x)); post: norm(x + f(x)); parallel: x + mixer(norm(x)) + feedforward(norm'(x))
State     the mixers' states, one a layer
Cost      the layers'
Decodes   as its mixers do
Differs   nothing
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.core.bind import Of, itself
from writehead.core.norm import RMS
from writehead.core.positions import Positions
from writehead.core.shapes import check_choice
from writehead.core.state import State
from writehead.mixer import NOTHING, Aux
from writehead.stack import Layers, stateless

NORMS = ("rms", "layer", "layer_no_bias")


class Block(nn.Module):
    """One layer: a mixer, cross-attention if given, and a feed-forward layer, each with its norm."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        feedforward: nn.Module,
        cross: nn.Module | None,
        *,
        order: str,
        norm: str,
        eps: float,
        dropout: float,
        one_norm: bool,
    ) -> None:
        super().__init__()
        self.mixer, self.feedforward, self.cross = mixer, feedforward, cross
        self.order, self.dropout = order, dropout
        self.mixer_norm = make_norm(norm, dim, eps)
        self.cross_norm = None if cross is None else make_norm(norm, dim, eps)
        self.feedforward_norm = None if one_norm else make_norm(norm, dim, eps)

    def bind(self, of: Of = itself) -> Callable[..., tuple[Tensor, tuple[State, State], Aux]]:
        return self._around(of(self.mixer), of)

    def _around(self, mixer: Callable[..., Any], of: Of) -> Callable[..., Any]:
        """The layer, with a function that mixes as its mixer does."""
        mixer_norm, feed = of(self.mixer_norm), self._feed(of)
        cross = None
        if self.cross is not None and self.cross_norm is not None:
            cross = (of(self.cross), of(self.cross_norm))
        post, add = self.order == "post", self._add

        def run(
            x: Tensor, pos: Positions, state: tuple[State, State]
        ) -> tuple[Tensor, tuple[State, State], Aux]:
            own, memory = state
            h = x if post else mixer_norm(x)
            y, own, aux = mixer(h, pos, own)
            if cross is not None:
                x = mixer_norm(add(x, y)) if post else add(x, y)
                h = x if post else cross[1](x)
                y, memory, more = cross[0](h, pos, memory)
                aux = merge_aux(aux, more)
            x, more = feed(x, h, y)
            return x, (own, memory), merge_aux(aux, more)

        return run

    def forward(
        self, x: Tensor, pos: Positions, state: tuple[State, State]
    ) -> tuple[Tensor, tuple[State, State], Aux]:
        """x (B, T, X) -> the same after this layer, the layer's state, auxiliary values."""
        return self.bind()(x, pos, state)

    def whole(self, x: Tensor, pos: Positions, state: tuple[State, State]) -> tuple[Tensor, Aux]:
        """`forward` from the empty past without a state after, which a mixer with a `whole` does not make."""
        y, _, aux = self._around(stateless(self.mixer, "whole"), itself)(x, pos, state)
        return y, aux

    def encode(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        """The bidirectional form: no state."""
        y, _, aux = self._around(stateless(self.mixer, "encode"), itself)(x, pos, (None, None))
        return y, aux

    def _feed(self, of: Of) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Aux]]:
        """The rest of the layer, from its input x, what the last sublayer read (h) and what it gave (y)."""
        feedforward, before, add = of(self.feedforward), of(self.mixer_norm), self._add
        if self.cross_norm is not None:
            before = of(self.cross_norm)
        norm = None if self.feedforward_norm is None else of(self.feedforward_norm)

        def parallel(x: Tensor, h: Tensor, y: Tensor) -> tuple[Tensor, Aux]:
            z, aux = feedforward(h if norm is None else norm(x))
            return add(x, y + z), aux

        def pre(x: Tensor, h: Tensor, y: Tensor) -> tuple[Tensor, Aux]:
            assert norm is not None
            x = add(x, y)
            y, aux = feedforward(norm(x))
            return add(x, y), aux

        def post(x: Tensor, h: Tensor, y: Tensor) -> tuple[Tensor, Aux]:
            assert norm is not None
            x = before(add(x, y))
            y, aux = feedforward(x)
            return norm(add(x, y)), aux

        return {"parallel": parallel, "pre": pre, "post": post}[self.order]

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + dropout(y), whose factors are those that torch's function draws, in one pass."""
        if not (self.training and self.dropout):
            return x + y
        if x.dtype != y.dtype:
            return x + F.dropout(y, self.dropout)
        kept = torch.empty_like(y).bernoulli_(1 - self.dropout)
        return torch.addcmul(x, y, kept, value=1 / (1 - self.dropout))


class Residual(Layers):
    """Blocks one after the other, then a last norm."""

    def __init__(
        self,
        dim: int,
        layers: Sequence[tuple[nn.Module, nn.Module, nn.Module | None]],
        *,
        order: str = "pre",
        norm: str = "rms",
        eps: float = 1e-6,
        dropout: float = 0.0,
        one_norm: bool = False,
        last_norm: bool = True,
    ) -> None:
        """Make the stack.

        Args:
            dim: width X.
            layers: mixer, feed-forward layer and cross-attention (or None) of each layer.
            order: "pre", "post" or "parallel".
            norm: one of `NORMS`.
            eps: the norms' epsilon.
            dropout: on what each sublayer adds.
            one_norm: parallel only: mixer and feed-forward layer share one norm.
            last_norm: normalise the output of the last block.
        """
        super().__init__()
        check_choice("order", order, ("pre", "post", "parallel"))
        if one_norm and order != "parallel":
            raise ValueError(f'one_norm=True needs order="parallel"; got order={order!r}')
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must be from 0 up to 1")
        if not 0 <= eps < 1:
            raise ValueError(f"eps={eps} must be from 0 up to 1; 1e-6 is usual")
        if order == "parallel" and any(cross is not None for _, _, cross in layers):
            raise ValueError('a decoder with cross-attention needs order="pre" or "post"; got "parallel"')
        self.blocks = nn.ModuleList(
            Block(dim, *layer, order=order, norm=norm, eps=eps, dropout=dropout, one_norm=one_norm)
            for layer in layers
        )
        self.norm = make_norm(norm, dim, eps) if last_norm else nn.Identity()

    def bind(self, of: Of = itself) -> Callable[..., tuple[Tensor, tuple[State, ...], Aux]]:
        blocks, norm = [of(block) for block in self.blocks], of(self.norm)

        def run(x: Tensor, pos: Positions, state: tuple[State, ...]) -> tuple[Tensor, tuple[State, ...], Aux]:
            after, aux = [], NOTHING
            for block, own in zip(blocks, state, strict=True):
                x, own, more = block(x, pos, own)
                after.append(own)
                aux = merge_aux(aux, more)
            return norm(x), tuple(after), aux

        return run

    def forward(
        self, x: Tensor, pos: Positions, state: tuple[State, ...]
    ) -> tuple[Tensor, tuple[State, ...], Aux]:
        """x (B, T, X) -> the stack's output, the layers' states, auxiliary values of all layers."""
        return self.bind()(x, pos, state)

    def whole(self, x: Tensor, pos: Positions, state: tuple[State, ...]) -> tuple[Tensor, Aux]:
        """The same from the empty past for whoever wants no state after."""
        aux = NOTHING
        for block, own in zip(self.blocks, state, strict=True):
            x, more = block.whole(x, pos, own)  # type: ignore[operator]
            aux = merge_aux(aux, more)
        return self.norm(x), aux

    def encode(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        """The bidirectional form: x (B, T, X) -> the stack's output and auxiliary values."""
        aux = NOTHING
        for block in self.blocks:
            x, more = block.encode(x, pos)  # type: ignore[operator]
            aux = merge_aux(aux, more)
        return self.norm(x), aux


def make_norm(kind: str, dim: int, eps: float) -> nn.Module:
    """A norm over the last dimension.

    Raises:
        ValueError: unknown kind.
    """
    check_choice("norm", kind, NORMS)
    return RMS(dim, eps) if kind == "rms" else nn.LayerNorm(dim, eps, bias=kind == "layer")


def merge_aux(a: Aux, b: Aux) -> Aux:
    """Auxiliary values of two parts: those with the same name add up."""
    if not b:
        return a
    return {**a, **{name: a[name] + value if name in a else value for name, value in b.items()}}
