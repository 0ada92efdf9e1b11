"""The feed-forward layer: two matrices with a nonlinearity, plain or gated, whole or in pieces.

Paper     Vaswani et al. 2017, arXiv:1706.03762; Shazeer 2020, "GLU Variants Improve Transformer",
          arXiv:2002.05202;
          pieces: Kitaev et al. 2020, "Reformer", arXiv:2001.04451
Equation  y = W2 f(W1 x), gated: y = W2 (f(Wg x) * W1 x)
State     none
Cost      2 hidden X multiplications a token, 3 if gated
Decodes   token by token
Differs   gate and input matrices are one, so a decode step reads them in one product
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from writehead.core.bind import Of, itself
from writehead.core.shapes import check_choice
from writehead.core.work import Call, Work, products, values
from writehead.mixer import NOTHING, Aux

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


class Dense(nn.Module):
    """The layer as a whole.

    Attributes:
        inner: (hidden, X), or if gated (2 hidden, X): the gate's rows first.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: int | None = None,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = False,
    ) -> None:
        """Make the layer.

        Args:
            dim: width X.
            hidden: inner width; default 4 dim.
            activation: one of `ACTIVATIONS`; gated, "silu" is SwiGLU, "gelu" GEGLU, "relu" ReGLU,
                "sigmoid" GLU.
            gated: multiply the input's projection with the activated gate.
            bias: add biases.
        """
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        hidden = 4 * dim if hidden is None else hidden
        if hidden < 1:
            raise ValueError(f"hidden={hidden} must be at least 1")
        self.inner = nn.Linear(dim, 2 * hidden if gated else hidden, bias=bias)
        self.outer = nn.Linear(hidden, dim, bias=bias)
        self.gated, self.activate = gated, ACTIVATIONS[activation]

    def work(self, call: Call) -> Work:
        return Work(flops=2 * call.rows * products(self), weights=values(self))

    def bind(self, of: Of = itself) -> Callable[[Tensor], tuple[Tensor, Aux]]:
        inner, outer, activate = of(self.inner), of(self.outer), self.activate
        width = self.outer.in_features

        def plain(x: Tensor) -> tuple[Tensor, Aux]:
            return outer(activate(inner(x))), NOTHING

        def gated(x: Tensor) -> tuple[Tensor, Aux]:
            gate, h = inner(x).split(width, -1)  # one gradient, where two slices make two padded ones
            return outer(activate(gate) * h), NOTHING

        return gated if self.gated else plain

    def forward(self, x: Tensor) -> tuple[Tensor, Aux]:
        """x (B, T, X) -> y (B, T, X) and auxiliary values."""
        return self.bind()(x)


class Chunked(nn.Module):
    """The same layer applied to `chunk` tokens at a time: equal results, inner activations of one piece
    only."""

    def __init__(
        self,
        dim: int,
        *,
        chunk: int = 128,
        hidden: int | None = None,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = False,
    ) -> None:
        """Make the layer; chunk is in tokens, the other arguments are those of `Dense`."""
        super().__init__()
        if chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1")
        self.chunk = chunk
        self.dense = Dense(dim, hidden=hidden, activation=activation, gated=gated, bias=bias)

    def work(self, call: Call) -> Work:
        return self.dense.work(call)

    def forward(self, x: Tensor) -> tuple[Tensor, Aux]:
        """x (B, T, X) -> y (B, T, X) and auxiliary values; with autograd each piece is computed again
        backwards."""
        if x.shape[1] <= self.chunk:
            return self.dense(x)  # type: ignore[no-any-return]
        grad = torch.is_grad_enabled()
        pieces = [
            checkpoint(self._piece, piece, use_reentrant=False) if grad else self._piece(piece)
            for piece in x.split(self.chunk, 1)
        ]
        return torch.cat(pieces, 1), NOTHING

    def _piece(self, x: Tensor) -> Tensor:
        return self.dense(x)[0]  # type: ignore[no-any-return]
